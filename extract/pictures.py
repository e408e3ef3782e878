"""Pictures of a video: decord by random access where it can be trusted, else PyAV in sequence.

decord 0.6 answers with a wrong picture, silently, for streams whose groups of pictures are not
closed (measured in docs/decoding.md). So it is asked only where the packets prove that every seek
is exact; everything else is decoded by PyAV from the first packet on.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cache.errors import MediaError
from extract.media import (
    DecodeLimits,
    FirstPicture,
    MediaFacts,
    open_media,
    packets_of,
    to_rgb,
    words,
)

DECORD_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers with an index of key frames; MPEG-PS, MPEG-TS and AVI seek inexactly."""
DECORD_CODECS = ("h264", "vp8", "vp9")
"""Codecs whose key frames we can prove to be clean entry points."""

_SAME_PICTURE = 1.0
"""Mean absolute difference, of 255, below which two decoders show one picture; 0.0 is usual."""
_SAME_TIME_S = 0.002
_H264_IDR = 5
_VP8_SHOWN = 0x10


class PacketTable:
    """Presentation times of a video stream, from its packets, and reasons not to seek in it."""

    def __init__(self, stream: VideoStream) -> None:
        """Start an empty table for a stream; packets follow in container order."""
        self.doubt: str | None = None
        """Why random access cannot be trusted; None while nothing speaks against it."""
        self._pts_s: list[float] = []
        self._group_pts_s: float | None = None
        self._codec = stream.codec_context.name if stream.codec_context else ""
        extra = (stream.codec_context.extradata or b"") if stream.codec_context else b""
        # avcC: byte 0 is 1, the low bits of byte 4 are the size of a length field, less one.
        self._nal_length = (extra[4] & 3) + 1 if len(extra) > 4 and extra[0] == 1 else 0

    def __len__(self) -> int:
        """Count the pictures that the packets promise."""
        return len(self._pts_s)

    @property
    def pts_s(self) -> list[float]:
        """Presentation times in seconds, ascending."""
        return sorted(self._pts_s)

    def add(self, packet: Packet[VideoStream]) -> None:
        """Enter one packet; those that an edit list cuts off show nothing and do not count."""
        if packet.size == 0:
            return
        if packet.is_discard:
            self._suspect("an edit list cuts pictures off")
            return
        if packet.is_corrupt:
            self._suspect("a packet is marked as damaged")
        if packet.pts is None:
            self._suspect("a packet has no presentation time")
            self._pts_s.append(self._pts_s[-1] if self._pts_s else 0.0)
            return
        pts_s = float(packet.pts * packet.time_base)
        self._pts_s.append(pts_s)
        if packet.is_keyframe:
            self._group_pts_s = pts_s
            if self._codec == "h264" and not self._has_idr(bytes(packet)):
                self._suspect("a key frame is no clean entry point (no IDR picture)")
        elif self._group_pts_s is None:
            self._suspect("the stream does not start with a key frame")
        elif pts_s < self._group_pts_s:
            self._suspect("a group of pictures is open (a picture shown before its key frame)")
        if self._codec == "vp8" and not bytes(packet)[0] & _VP8_SHOWN:
            self._suspect("a packet holds a picture that is never shown")

    def close(self, complaints: Sequence[str]) -> None:
        """Check the whole once all packets are in; complaints are the container's."""
        for complaint in complaints:
            self._suspect(complaint)
        times = self.pts_s
        if any(b <= a for a, b in pairwise(times)):
            self._suspect("two pictures have the same presentation time")

    def _suspect(self, reason: str) -> None:
        self.doubt = self.doubt or reason

    def _has_idr(self, data: bytes) -> bool:
        if not self._nal_length:
            return False  # Annex B: not an MP4 or Matroska stream as they should be.
        at = 0
        while at + self._nal_length < len(data):
            size = int.from_bytes(data[at : at + self._nal_length], "big")
            at += self._nal_length
            if data[at] & 0x1F == _H264_IDR:
                return True
            at += size
        return False


@dataclass
class SequentialRead:
    """What decoding a stream from start to end gave."""

    pts_s: list[float] = field(default_factory=list)
    """One time per decoded picture, in output order."""
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    """The wanted pictures by index, each (H, W, 3) uint8 RGB as displayed."""
    n_damaged: int = 0
    """Packets that did not decode, and pictures that the decoder had to conceal."""
    remark: str | None = None
    """The decoder's first complaint, or a repair of the time stamps; None if all is well."""


def decord_refusal(facts: MediaFacts, table: PacketTable, first: FirstPicture | None) -> str | None:
    """Return why decord must not be asked for this stream, or None if it may be tried."""
    if facts.container not in DECORD_CONTAINERS:
        return f"container {facts.container} seeks inexactly"
    if facts.video_codec not in DECORD_CODECS:
        return f"codec {facts.video_codec} has no provable entry points"
    if facts.n_video_streams != 1:
        return f"the file has {facts.n_video_streams} video streams and decord picks its own"
    if first is None:
        return "no first picture to compare with"
    if first.bits != 8 or first.interlaced or first.orientation.mirrored:
        return "decord shows deep, interlaced or mirrored pictures differently"
    return table.doubt


def read_with_decord(
    path: Path, wanted: Sequence[int], times_s: Sequence[float], first: FirstPicture
) -> dict[int, np.ndarray]:
    """Fetch the wanted pictures by random access, after checking that decord agrees.

    Args:
        path: the file.
        wanted: distinct ascending indices.
        times_s: the packets' presentation times, ascending; decord must count as many pictures
            and space them alike (it moves the first one to zero).
        first: the first picture as PyAV decodes it; decord's must look the same.

    Returns:
        The wanted pictures by index, each (H, W, 3) uint8 RGB as displayed.

    Raises:
        MediaError: if decord is missing, fails or disagrees; the text is the reason.
    """
    try:
        decord: Any = importlib.import_module("decord")
    except (ImportError, OSError, RuntimeError) as error:
        raise MediaError(f"decord cannot be imported ({words(error)})") from error
    decord.logging.set_level(decord.logging.QUIET)
    try:
        # One thread: the workers are the parallelism, and more threads are known to hang.
        reader = decord.VideoReader(str(path.absolute()), num_threads=1)
        n_frames = len(reader)
        if n_frames != len(times_s):
            raise MediaError(f"decord counts {n_frames} pictures, the packets {len(times_s)}")
        starts_s = reader.get_frame_timestamp(range(n_frames))[:, 0].astype(np.float64)
        drift_s = np.abs((starts_s - starts_s[0]) - (np.asarray(times_s) - times_s[0])).max()
        # float32 time stamps: about 1e-7 of the value is rounding.
        if not drift_s <= _SAME_TIME_S + 4e-7 * abs(times_s[-1]):
            raise MediaError(f"decord's time stamps are off by up to {drift_s:.3g} s")
        batch = reader.get_batch([0, *wanted]).asnumpy()
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, OSError) as error:
        raise MediaError(f"decord failed ({words(error)})") from error
    except UnicodeEncodeError:
        raise MediaError("decord takes no file whose name is not Unicode") from None
    if batch.shape[1:] != first.rgb.shape:
        raise MediaError(f"decord shows {batch.shape[1:]}, PyAV {first.rgb.shape}")
    off = float(np.abs(batch[0].astype(np.int16) - first.rgb.astype(np.int16)).mean())
    if off > _SAME_PICTURE:
        raise MediaError(f"decord's first picture differs from PyAV's by {off:.1f} of 255")
    return {index: batch[i + 1] for i, index in enumerate(wanted)}


def read_in_sequence(
    path: Path, stream_index: int, wanted: set[int], limits: DecodeLimits
) -> SequentialRead:
    """Decode a video stream from its first packet to its last, keeping only the wanted pictures.

    Damaged packets are counted and passed over; what decodes is the truth of count and times.

    Raises:
        MediaError: if the file cannot be opened or exceeds the limits.
    """
    read = SequentialRead()
    times: list[float | None] = []
    with open_media(path) as container:
        stream = container.streams[stream_index]
        assert isinstance(stream, VideoStream)
        stream.codec_context.thread_count = 1  # Damage is concealed alike in every run.
        rate = stream.guessed_rate or stream.average_rate
        complaints: list[str] = []
        for packet in packets_of(container, [stream], complaints):
            try:
                frames = cast(list[VideoFrame], packet.decode())
            except (FFmpegError, ValueError) as error:
                read.n_damaged += 1
                complaints.append(words(error))
                continue
            for frame in frames:
                if frame.width * frame.height > limits.max_picture_px:
                    raise MediaError(too_large(frame.width, frame.height, limits))
                if len(times) >= limits.max_frames:
                    raise MediaError(too_long(len(times) + 1, limits))
                if len(times) in wanted:
                    read.frames[len(times)] = to_rgb(frame)
                times.append(frame.time)
                read.n_damaged += frame.is_corrupt
    if read.n_damaged and not complaints:
        complaints.append("the decoder concealed damaged pictures")
    read.pts_s, repaired = _whole_times(times, 1.0 / float(rate) if rate else None)
    read.remark = "; ".join([*complaints[:1], *repaired]) or None
    return read


def _whole_times(
    times: Sequence[float | None], step_s: float | None
) -> tuple[list[float], list[str]]:
    """Fill in missing presentation times; return the times and what had to be repaired."""
    if not times:
        return [], []
    if None not in times:
        whole = [t for t in times if t is not None]
        if all(b > a for a, b in pairwise(whole)):
            return whole, []
    if step_s is None:
        raise MediaError(
            "the stream states neither ordered time stamps nor a frame rate; re-mux the file"
        )
    start_s = times[0] or 0.0
    rebuilt = [start_s + i * step_s for i in range(len(times))]
    return rebuilt, ["time stamps are missing or not ascending, rebuilt from the frame rate"]


def too_large(width_px: int, height_px: int, limits: DecodeLimits) -> str:
    """Word the refusal of an oversized picture."""
    return (
        f"a picture has {width_px} x {height_px} pixels, at most {limits.max_picture_px} are "
        "allowed; raise DecodeLimits.max_picture_px or scale the file down"
    )


def too_long(n_frames: int, limits: DecodeLimits) -> str:
    """Word the refusal of an overlong video."""
    return (
        f"the video has {n_frames} pictures or more, at most {limits.max_frames} are allowed; "
        "raise DecodeLimits.max_frames or cut the file"
    )
