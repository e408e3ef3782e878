"""Means over clips that were judged once or several times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from eval.judging.results import Repeated


def repeated(values: Sequence[Sequence[float | None]], n_repeats: int) -> Repeated:
    """Return mean, spread and errors of ratings.

    Args:
        values: (n clips, n repeats); None where an answer held no number.
        n_repeats: Columns; needed where there are no clips.
    """
    clips = [m for row in values if (m := mean(row)) is not None]
    by_repeat = tuple(mean(row[r] for row in values) for r in range(n_repeats))
    told = [m for m in by_repeat if m is not None]
    spread, clip_spread = deviation(told), deviation(clips)
    return Repeated(
        mean=mean(clips),
        by_repeat=by_repeat,
        spread=spread,
        standard_error=None if spread is None else spread / math.sqrt(len(told)),
        clip_error=None if clip_spread is None else clip_spread / math.sqrt(len(clips)),
        n=len(clips),
    )


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the numbers among the values; None of none."""
    found = [value for value in values if value is not None]
    return math.fsum(found) / len(found) if found else None


def deviation(values: Sequence[float]) -> float | None:
    """Return the standard deviation (n - 1); None of fewer than two numbers."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))
