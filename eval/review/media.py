"""What a browser that cannot play a clip gets of it: a strip of frames and the sound.

Files are decoded by `extract.decode` in a process of their own, so a hostile one costs itself alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from extract.annotate.evidence.media import jpeg_bytes, wav_bytes
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool, Prepared
from extract.inputs import ClipInputs, InputRequest

if TYPE_CHECKING:
    import numpy as np

    from cache.clip import Record

N_FRAMES = 12
"""Frames of a strip, spread evenly, beside the peak frame."""
_LONGEST_PX = 640
_LONGEST_SOUND_S = 600.0
_JPEG_QUALITY = 85
_N_KEPT = 6


@dataclass(frozen=True)
class StripFrame:
    """One frame."""

    index: int
    """Which decoded frame it is."""
    pts_s: float
    """Its presentation time."""
    is_peak: bool
    jpeg: bytes = field(repr=False)


@dataclass(frozen=True)
class Strip:
    """What there is to see and to hear of a clip."""

    frames: tuple[StripFrame, ...] = ()
    """In order of time."""
    wav: bytes | None = field(default=None, repr=False)
    """Mono at 16 kHz; None without sound."""
    problems: tuple[str, ...] = ()
    """Why pictures or sound are not there."""


class StripReader:
    """Decodes clips as they are asked for, and keeps the last few. May be shared by threads."""

    def __init__(self) -> None:
        """Make a reader; no process is started yet."""
        self._pool = DecodePool(1)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Future[Prepared]] = OrderedDict()

    def read(self, record: Record, path: Path, sha256: str) -> Strip:
        """Decode a clip, or return what is kept of it. Nothing that the file holds makes it raise.

        Args:
            record: Its peak is one of the frames.
            path: The media file.
            sha256: Digest of the file.
        """
        with self._lock:
            decoding = self._kept.pop(record.uid, None)
            if decoding is None:
                requests = _requests(record)
                decoding = self._pool.submit(DecodeJob(path, sha256, record.media, requests))
            self._kept[record.uid] = decoding
            while len(self._kept) > _N_KEPT:
                self._kept.popitem(last=False)
        prepared = decoding.result()
        if isinstance(prepared, DecodeFailure):
            return Strip(problems=(str(prepared.failure.reason),))
        return _strip(record, prepared)

    def close(self) -> None:
        """End the process."""
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


def _requests(record: Record) -> tuple[InputRequest, ...]:
    pictures: dict[str, Any] = {"size_px": _LONGEST_PX, "interpolation": "bicubic"}
    peak = record.peak_index
    return (
        InputRequest(stream="video", frames="uniform", n_frames=N_FRAMES, **pictures),
        InputRequest(
            stream="image", frames="middle" if peak is None else "peak", peak_index=peak, **pictures
        ),
        InputRequest(stream="audio", window_s=_LONGEST_SOUND_S),
    )


def _strip(record: Record, inputs: ClipInputs) -> Strip:
    found: dict[int, StripFrame] = {}
    video, image, audio = inputs.streams
    for stream in (video, image):
        if stream.array is None:
            continue
        pictures = inputs.arrays[stream.array]
        for index, pts_s, row in zip(stream.index, stream.pts_s, stream.pick, strict=True):
            is_peak = index == record.peak_index
            if index not in found:
                jpeg = _jpeg(pictures[row], inputs.facts)
                found[index] = StripFrame(index, round(pts_s, 3), is_peak, jpeg)
    wav = None if audio.array is None else wav_bytes(inputs.arrays[audio.array])
    problems = dict.fromkeys(s.failure.reason for s in inputs.streams if s.failure is not None)
    return Strip(tuple(found[index] for index in sorted(found)), wav, tuple(problems))


def _jpeg(square: np.ndarray, facts: dict[str, Any]) -> bytes:
    """Return a picture that was made square as JPEG with its own aspect; (S, S, 3) uint8."""
    from PIL import Image

    width, height = facts.get("width_px") or _LONGEST_PX, facts.get("height_px") or _LONGEST_PX
    shrink = min(1.0, _LONGEST_PX / max(width, height))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    return jpeg_bytes(Image.fromarray(square).resize(size), _JPEG_QUALITY)
