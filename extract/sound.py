"""The sound of a clip: decoded packets to one mono waveform at 16 kHz."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.error import FFmpegError
from av.packet import Packet

from cache.encoders import SAMPLE_RATE_HZ
from extract.media import DecodeLimits, words


@dataclass(frozen=True)
class AudioTrack:
    """A decoded sound stream."""

    waveform: np.ndarray
    """(N,) float32, mono, 16 kHz, full scale 1.0; at most `max_audio_s` from the start."""
    duration_s: float
    """Decoded length of the whole stream, also when the waveform holds less."""
    start_s: float
    """Presentation time of the first sample on the container's clock."""
    stream_index: int
    """Container index of the stream."""

    @property
    def truncated(self) -> bool:
        """True if the waveform ends before the stream does."""
        return len(self.waveform) + 1 < self.duration_s * SAMPLE_RATE_HZ


class SoundReader:
    """Collects one sound stream as 16 kHz mono, up to a limit, and measures all of it."""

    def __init__(self, stream: AudioStream, limits: DecodeLimits) -> None:
        """Start on a stream; its packets follow in container order."""
        self._stream_index = stream.index
        self._limit = round(limits.max_audio_s * SAMPLE_RATE_HZ)
        self._parts: list[np.ndarray] = []
        self._n_kept = 0
        self._duration_s = Fraction(0)
        self._start_s: float | None = None
        self._resampler: av.AudioResampler | None = None
        self._form: tuple[str, str, int] | None = None
        self.n_damaged = 0
        """Packets that did not decode."""
        self.complaints: list[str] = []
        """What the decoder said about them."""

    def add(self, packet: Packet[AudioStream]) -> None:
        """Decode one packet; damaged ones are counted and passed over."""
        try:
            for frame in packet.decode():
                self._add_frame(frame)
        except (FFmpegError, ValueError) as error:
            self.n_damaged += 1
            self.complaints.append(words(error))

    def _add_frame(self, frame: AudioFrame) -> None:
        if self._start_s is None:
            self._start_s = frame.time or 0.0
        if frame.sample_rate < 1:
            raise ValueError(f"sample rate of {frame.sample_rate} Hz")
        self._duration_s += Fraction(frame.samples, frame.sample_rate)
        if self._n_kept >= self._limit:
            return
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self._form:
            # The sound may change its form in mid-stream; a resampler serves one form only.
            self._flush()
            self._form = form
            self._resampler = av.AudioResampler(
                format="flt",
                layout="mono",
                rate=SAMPLE_RATE_HZ,
                # Channels are averaged; without this, float stereo becomes 3 dB louder and clips.
                options={"rematrix_maxval": "1.0"},
            )
        assert self._resampler is not None
        frame.pts = None  # Only the samples count; odd time stamps must not stretch them.
        self._keep(self._resampler.resample(frame))

    def _flush(self) -> None:
        if self._resampler is not None:
            self._keep(self._resampler.resample(None))
            self._resampler = None

    def _keep(self, frames: Sequence[AudioFrame]) -> None:
        for frame in frames:
            self._parts.append(frame.to_ndarray().reshape(-1))  # (1, n) -> (n,)
            self._n_kept += self._parts[-1].size

    def close(self) -> tuple[AudioTrack | None, str | None]:
        """Return the track and a remark on damage, or None and the reason why there is none."""
        try:
            self._flush()
        except (FFmpegError, ValueError) as error:
            self.complaints.append(words(error))
        said = self.complaints[0] if self.complaints else None
        if not self._n_kept:
            reason = "the stream holds no samples that decode"
            return None, f"{reason} ({said})" if said else reason
        waveform = np.concatenate(self._parts)[: self._limit]
        if not np.isfinite(waveform).all():
            return None, "the samples are not all finite numbers; the file is damaged"
        start_s, duration_s = self._start_s or 0.0, float(self._duration_s)
        return AudioTrack(waveform, duration_s, start_s, self._stream_index), said
