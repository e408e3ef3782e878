"""The pictures of a clip that a judge sees: about one a second, ten at most.

Files are decoded in processes of their own, as for encoders: a hostile one costs itself alone.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cache.clip import file_sha256
from extract.annotate.endpoints.questions import MediaPart
from extract.annotate.evidence.media import jpeg_bytes, with_aspect
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool, Prepared
from extract.inputs import InputRequest

MOST = 10
SIDE_PX = 512
"""Longest side of a picture; a larger one is shrunk to it."""
_QUALITY = 85


class Frames(NamedTuple):
    """The pictures of a clip, in order."""

    parts: tuple[MediaPart, ...]
    problem: str = ""
    """Why there are none; empty if there are some."""


class FrameReader:
    """Reads pictures ahead of whoever asks for them.

    Args:
        most: Pictures of a clip, at most.
        n_decoders: Processes that decode at once.
    """

    def __init__(self, most: int = MOST, n_decoders: int = 1) -> None:
        self._most = most
        self._n_decoders = n_decoders
        self._pool = DecodePool(n_decoders)

    def __enter__(self) -> FrameReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.close()

    def read(self, paths: Iterable[Path]) -> Iterator[Frames]:
        """Yield the pictures of each file, in the order of the files.

        Raises:
            ExtractionStopped: No decoder starts on this machine.
        """
        ahead: deque[_Reading] = deque()
        for path in paths:
            ahead.append(_Reading(path, self._pool, self._most))
            if len(ahead) > 2 * self._n_decoders:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


class _Reading:
    """One file: first its header, which tells how long it is, then its pictures."""

    def __init__(self, path: Path, pool: DecodePool, most: int) -> None:
        self._pool, self._most = pool, most
        self._problem = ""
        self._facts: Future[Prepared] | None = None
        try:
            self._job = DecodeJob(path, file_sha256(path), path.name, ())
        except OSError as error:
            self._problem = f"cannot be read ({error.strerror or error})"
        else:
            self._facts = pool.submit(self._job)

    def result(self) -> Frames:
        """Wait for the pictures."""
        if self._facts is None:
            return Frames((), self._problem)
        looked = self._facts.result()
        if isinstance(looked, DecodeFailure):
            return Frames((), looked.failure.message)
        facts = looked.facts
        size = facts.get("width_px"), facts.get("height_px")
        longest = min(max(size[0] or 0, size[1] or 0) or SIDE_PX, SIDE_PX)
        request = InputRequest(
            stream="image",
            frames="uniform",
            n_frames=n_frames(facts.get("duration_s"), self._most),
            size_px=longest,
            interpolation="bicubic",
        )
        found = self._pool.submit(replace(self._job, requests=(request,))).result()
        if isinstance(found, DecodeFailure):
            return Frames((), found.failure.message)
        [stream] = found.streams
        if stream.array is None:
            told = "has no picture" if stream.failure is None else stream.failure.message
            return Frames((), told)
        pictures = found.arrays[stream.array]
        # A clip with fewer frames than asked for repeats some: the judge gets each once.
        rows = dict.fromkeys(stream.pick)
        return Frames(
            tuple(
                MediaPart.of(
                    "image/jpeg", jpeg_bytes(with_aspect(pictures[row], size, SIDE_PX), _QUALITY)
                )
                for row in rows
            )
        )


def n_frames(duration_s: float | None, most: int = MOST) -> int:
    """Return how many pictures to take, from the centres of as many equal parts.

    Args:
        duration_s: Of the clip; None where the container does not say.
        most: At most.
    """
    if duration_s is None or not math.isfinite(duration_s):
        return most
    return max(1, min(most, math.ceil(duration_s)))
