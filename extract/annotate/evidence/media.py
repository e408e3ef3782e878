"""What the models behind an endpoint see and hear of a clip: one frame as JPEG, the sound as WAV.

    with MediaReader(n_decoders=4) as reader:
        media = reader.submit(record, path).result()
        media.picture.jpeg, media.sound.wav()

Files are decoded by `extract.decode` in processes of their own (`extract.decode_pool`), as they are for
encoders: a hostile one costs itself alone. Those hand over square pictures, so the frame is asked for
with its longest side as the square's and its shorter side is brought to its length here. That side is
resampled twice: on real clips this changes a value by 0.8 grey levels at most in the mean, less than
the JPEG itself does.
"""

from __future__ import annotations

import io
import wave
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field

from cache.clip import Record, file_sha256
from cache.encoders import SAMPLE_RATE_HZ
from cache.schema import Model
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool, Prepared
from extract.failures import Failure
from extract.inputs import ClipInputs, InputRequest, StreamInput

if TYPE_CHECKING:
    from extract.encoders.base import Waveform

Status = Literal["ok", "absent", "failed"]
_Size = tuple[int | None, int | None]
_FULL_SCALE = 2**15


class MediaLimits(Model):
    """How much of a clip is sent."""

    longest_side_px: int = Field(default=1024, ge=16)
    """A larger picture is shrunk to it; a smaller one stays as it is."""
    jpeg_quality: int = Field(default=92, ge=1, le=95)
    max_sound_s: float | None = Field(default=120.0, gt=0)
    """Sound beyond it is cut off, and flagged; None takes all that decoding keeps (an hour)."""
    frame: Literal["peak", "middle"] = "peak"
    """`peak`: the record's own frame, the middle one where it has none."""


@dataclass(frozen=True)
class Picture:
    """One frame of a clip."""

    status: Status
    failure: Failure | None = None
    """Only of a `failed` one."""
    jpeg: bytes | None = field(default=None, repr=False)
    """RGB, with the aspect of the video; only of an `ok` one, as are the four below."""
    width_px: int | None = None
    height_px: int | None = None
    index: int | None = None
    """Which decoded frame it is."""
    pts_s: float | None = None
    """Its presentation time."""
    is_peak: bool = False
    """True if it is the record's peak frame, False if it is the middle one."""
    remark: str | None = None
    """Damage that decoding passed over."""


@dataclass(frozen=True)
class Sound:
    """The sound of a clip, mono at 16 kHz."""

    status: Status
    failure: Failure | None = None
    """Only of a `failed` one."""
    waveform: Waveform | None = field(default=None, repr=False)
    """(N,) float32, full scale 1.0, from the start; only of an `ok` one, as are the two below."""
    duration_s: float | None = None
    """Length of the whole sound, also where the waveform holds less."""
    truncated: bool = False
    """True if the waveform ends before the sound does."""
    remark: str | None = None
    """Damage that decoding passed over."""

    @property
    def kept_s(self) -> float:
        """Length of the waveform."""
        return 0.0 if self.waveform is None else len(self.waveform) / SAMPLE_RATE_HZ

    def wav(self) -> bytes:
        """Return a WAV file of 16-bit samples; raises ValueError without sound."""
        if self.waveform is None:
            raise ValueError(f"there is no sound to write: its status is {self.status!r}")
        return wav_bytes(self.waveform)


@dataclass(frozen=True)
class ClipMedia:
    """What is sent of one clip."""

    picture: Picture
    sound: Sound
    evidence: DecodeFailure | None = None
    """More about a clip that ended its decoder."""


class MediaReader:
    """Decodes clips in processes of their own; they start when there is work for them."""

    def __init__(
        self,
        limits: MediaLimits | None = None,
        *,
        n_decoders: int = 1,
        pool: DecodePool | None = None,
        **pool_options: Any,
    ) -> None:
        """Make a reader; no process is started yet.

        Args:
            limits: How much of a clip is sent.
            n_decoders: Processes that decode at once.
            pool: A pool to use in place of one of its own; the caller closes it.
            pool_options: `deadline_s`, `memory_bytes` and others of `DecodePool`.
        """
        self.limits = limits or MediaLimits()
        self._owns_pool = pool is None
        self._pool = pool or DecodePool(n_decoders, **pool_options)

    def submit(self, record: Record, path: Path) -> Future[ClipMedia]:
        """Read a clip when its turn comes; the future raises what `DecodePool.submit`'s does.

        Nothing that the file holds makes it raise.

        Args:
            record: Its clip's digest is checked, its peak is the frame.
            path: The media file.
        """
        done: Future[ClipMedia] = Future()
        done.set_running_or_notify_cancel()
        try:
            # Of media that nobody looked at, the digest is what is there now.
            digest = record.clip.sha256 if record.clip is not None else file_sha256(path)
        except FileNotFoundError:
            message = f"{record.media}: there is no such file. Check the media root."
            done.set_result(_all_failed(Failure("missing", message)))
            return done
        except OSError as error:
            message = f"{record.media} cannot be read ({error.strerror or error})."
            done.set_result(_all_failed(Failure("unreadable", message)))
            return done
        job = DecodeJob(path, digest, record.media, ())
        if record.clip is not None:
            self._decode(job, record, (record.clip.width_px, record.clip.height_px), done)
        else:  # a look at the header tells the size, so that the same picture comes of it
            facts = self._pool.submit(job)
            facts.add_done_callback(lambda answer: self._measured(answer, job, record, done))
        return done

    def read(self, record: Record, path: Path) -> ClipMedia:
        """Read a clip and wait for it; see `submit`."""
        return self.submit(record, path).result()

    def close(self) -> None:
        """End the processes; what is not done is given up."""
        if self._owns_pool:
            self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _peak_of(self, record: Record) -> int | None:
        return record.peak_index if self.limits.frame == "peak" else None

    def _measured(
        self, answer: Future[Prepared], job: DecodeJob, record: Record, done: Future[ClipMedia]
    ) -> None:
        # A callback of the pool's thread: whatever goes wrong belongs to the one who waits.
        try:
            prepared = answer.result()
            if isinstance(prepared, DecodeFailure):
                done.set_result(_all_failed(prepared.failure, prepared))
            else:
                self._decode(job, record, _size_of(prepared), done)
        except BaseException as error:  # noqa: BLE001
            done.set_exception(error)

    def _decode(self, job: DecodeJob, record: Record, size: _Size, done: Future[ClipMedia]) -> None:
        requests = (self._picture_request(record, size), self._sound_request())
        try:
            prepared = self._pool.submit(replace(job, requests=requests))
        except RuntimeError:  # the pool was closed since the header was looked at
            raise CancelledError from None
        prepared.add_done_callback(lambda answer: self._finish(answer, record, done))

    def _picture_request(self, record: Record, size: _Size) -> InputRequest:
        peak = self._peak_of(record)
        longest = max(size[0] or 0, size[1] or 0) or self.limits.longest_side_px
        return InputRequest(
            stream="image",
            frames="middle" if peak is None else "peak",
            peak_index=peak,
            size_px=min(longest, self.limits.longest_side_px),
            interpolation="bicubic",
        )

    def _sound_request(self) -> InputRequest:
        return InputRequest(stream="audio", window_s=self.limits.max_sound_s)

    def _finish(self, answer: Future[Prepared], record: Record, done: Future[ClipMedia]) -> None:
        try:
            prepared = answer.result()
            if isinstance(prepared, DecodeFailure):
                done.set_result(_all_failed(prepared.failure, prepared))
                return
            picture, sound = prepared.streams
            is_peak = self._peak_of(record) is not None
            done.set_result(
                ClipMedia(self._picture(picture, prepared, is_peak), self._sound(sound, prepared))
            )
        except BaseException as error:  # noqa: BLE001
            done.set_exception(error)

    def _picture(self, found: StreamInput, inputs: ClipInputs, is_peak: bool) -> Picture:
        if found.array is None:
            return Picture(found.status, found.failure)
        square = inputs.arrays[found.array][0]  # (S, S, 3)
        rgb = with_aspect(square, _size_of(inputs), self.limits.longest_side_px)
        return Picture(
            "ok",
            jpeg=jpeg_bytes(rgb, self.limits.jpeg_quality),
            width_px=rgb.width,
            height_px=rgb.height,
            index=found.index[0],
            pts_s=found.pts_s[0],
            is_peak=is_peak,
            remark=found.remark,
        )

    def _sound(self, found: StreamInput, inputs: ClipInputs) -> Sound:
        if found.array is None:
            return Sound(found.status, found.failure)
        waveform, duration_s = inputs.arrays[found.array], inputs.audio_duration_s
        if self.limits.max_sound_s is not None:
            waveform = waveform[: round(self.limits.max_sound_s * SAMPLE_RATE_HZ)]
        whole_s = len(waveform) / SAMPLE_RATE_HZ if duration_s is None else duration_s
        # A resampler may round the last sample away: that is no cut.
        truncated = len(waveform) + 1 < whole_s * SAMPLE_RATE_HZ
        return Sound("ok", None, waveform, whole_s, truncated, found.remark)


def _all_failed(failure: Failure, evidence: DecodeFailure | None = None) -> ClipMedia:
    return ClipMedia(Picture("failed", failure), Sound("failed", failure), evidence)


def _size_of(inputs: ClipInputs) -> _Size:
    """Return width and height of the frames as displayed, as far as the container tells."""
    return inputs.facts.get("width_px"), inputs.facts.get("height_px")


def with_aspect(square: np.ndarray, true_size: _Size, limit_px: int) -> Image.Image:
    """Bring a picture that was made square back to its aspect.

    Args:
        square: (S, S, 3) uint8.
        true_size: Width and height of the frame as displayed, as far as they are known.
        limit_px: The longest side may not be longer.
    """
    picture = Image.fromarray(square)
    width, height = true_size
    if not width or not height:
        return picture
    shrink = min(1.0, limit_px / max(width, height))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    if size == picture.size:
        return picture
    if shrink == 1.0:
        # The shorter side was only stretched: reading it at the old pixels' centres undoes that,
        # where an antialiased resize would blur it.
        steps = (picture.width / width, 0, 0, 0, picture.height / height, 0)
        return picture.transform(size, Image.Transform.AFFINE, steps, Image.Resampling.BICUBIC)
    return picture.resize(size, Image.Resampling.BICUBIC)


def jpeg_bytes(picture: Image.Image, quality: int) -> bytes:
    """Return a picture as a JPEG file; equal pictures give equal bytes with one Pillow."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality, subsampling=0)
    return file.getvalue()


def wav_bytes(waveform: Waveform) -> bytes:
    """Return a WAV file of 16-bit samples, mono at 16 kHz.

    Sound that was stored with 16 bits comes out as it was: 1.0 is 32768, and what is beyond is clipped.

    Args:
        waveform: (N,) float32.
    """
    samples = np.clip(np.rint(waveform * _FULL_SCALE), -_FULL_SCALE, _FULL_SCALE - 1)
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE_HZ)
        writer.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


def has_only_sound(path: Path) -> bool:
    """Return whether a file is a sound file without pictures, as a process of its own finds."""
    try:
        job = DecodeJob(path, file_sha256(path), path.name, ())
    except OSError:
        return False
    with DecodePool(1) as pool:
        prepared = pool.submit(job).result()
    facts = {} if isinstance(prepared, DecodeFailure) else prepared.facts
    return bool(facts.get("has_audio")) and not facts.get("has_video")
