"""Which frames of a clip a stream looks at: index arithmetic only, no media, no I/O.

The paper takes the middle frame for the global view and 16 uniform frames for the temporal view
(reference, section 1.2); the released code takes 16 consecutive ones. Every rule here is deterministic,
so two runs store the same tokens.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

from cache.errors import SchemaError, near_miss

FrameKind = Literal["middle", "first", "peak", "uniform", "window"]
"""The ways to choose frames; `peak` needs an index from the record (Algorithm 1 of the paper)."""

_KINDS: tuple[str, ...] = get_args(FrameKind)


def window_draw(seed: int, sha256: str) -> int:
    """Return the number that places a clip's window: 0 to 2^64 - 1, by seed and digest alone.

    The released code draws offsets from one stream for all clips, so that they depend on the order of
    the files and on which ones failed before. These depend on neither.
    """
    digest = hashlib.sha256(f"{seed}:{sha256}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def frame_indices(
    kind: FrameKind,
    n_frames_available: int,
    n_frames: int = 1,
    peak_index: int | None = None,
    draw: int | None = None,
) -> list[int]:
    """Return the indices of the chosen frames in presentation order.

    `middle` is N // 2, `first` is 0, `peak` is the index that the record gives, and `uniform` are
    the centres of n equal segments, floor((i + 0.5) * N / n). A clip with fewer than n frames
    repeats frames, evenly, instead of being padded.

    `window` are n consecutive frames from draw mod (N - n) on: like the released code's, they never
    reach the last frame. A clip of at most n frames gives frames from the first to the last at equal
    distances, floor(i (N - 1) / (n - 1)), and repeats some.

    Args:
        kind: the rule.
        n_frames_available: N, the frames that can be decoded from the clip; at least 1.
        n_frames: n, the frames wanted; only `uniform` and `window` take more than one.
        peak_index: 0-based index of the peak frame; used by `peak` alone.
        draw: from `window_draw`; used by `window` alone.

    Returns:
        `n_frames` indices, non-decreasing, each in [0, n_frames_available).

    Raises:
        SchemaError: for an unknown rule, a count below 1, several frames from a rule that gives
            one, a window without a draw, or a peak index that is missing or outside the clip.
    """
    if kind not in _KINDS:
        raise SchemaError(
            f"unknown frame rule {kind!r}: allowed are {', '.join(_KINDS)}."
            f"{near_miss(str(kind), _KINDS)}"
        )
    if n_frames_available < 1:
        raise SchemaError(
            f"cannot choose frames from {n_frames_available} frames: at least 1 is needed; "
            "a clip without decodable pictures is `absent` or `failed`, not sampled."
        )
    if n_frames < 1:
        raise SchemaError(f"n_frames is {n_frames}: at least 1 frame must be asked for.")
    if kind == "uniform":
        # floor((i + 1/2) * N / n) in whole numbers: no rounding, whatever N and n are.
        return [(2 * i + 1) * n_frames_available // (2 * n_frames) for i in range(n_frames)]
    if kind == "window":
        return _window(n_frames_available, n_frames, draw)
    if n_frames != 1:
        raise SchemaError(
            f"frame rule {kind!r} gives one frame, but n_frames is {n_frames}: "
            "ask for 1, or use 'uniform'."
        )
    if kind == "middle":
        return [n_frames_available // 2]
    if kind == "first":
        return [0]
    if peak_index is None:
        raise SchemaError(
            "frame rule 'peak' needs peak_index, but the record has none: annotate the corpus "
            "with peak frames first, or use 'middle'."
        )
    if not 0 <= peak_index < n_frames_available:
        raise SchemaError(
            f"peak_index {peak_index} is outside the clip: it has {n_frames_available} frames, so "
            f"0 to {n_frames_available - 1} are allowed; annotate this clip again, "
            "or use 'middle'."
        )
    return [peak_index]


def _window(n_available: int, n: int, draw: int | None) -> list[int]:
    if draw is None:
        raise SchemaError("frame rule 'window' needs a draw: take it from `window_draw`.")
    if n_available > n:
        start = draw % (n_available - n)
        return list(range(start, start + n))
    return [i * (n_available - 1) // max(1, n - 1) for i in range(n)]
