"""Scores of parts of the items: by corpus, language, duration, and by what a clip lacks.

A slice never comes without its count, and a small one says little: look at its interval. Intervals of
slices are not corrected for their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final, Literal, get_args

import numpy as np
from pydantic import Field

from cache.errors import SchemaError
from cache.schema import Model
from eval.predictions import Prediction
from eval.scoring.intervals import N_SAMPLES, Interval, interval
from eval.scoring.tally import Tally

SliceBy = Literal["corpus", "language", "duration", "missing"]
"""What items are divided by. `missing`: streams that the model did not get, since the clip lacks them,
extraction failed, or they were masked."""
SLICINGS: Final[tuple[SliceBy, ...]] = get_args(SliceBy)
EDGES_S: Final = (2.0, 5.0, 10.0)
"""Borders of the slices by duration, in seconds."""
UNKNOWN: Final = "not known"


class Slice(Model):
    """The score of one part of the items."""

    name: str
    """For example `en`, `2 to 5 s`, `without audio`."""
    n_offered: int = Field(ge=1)
    n: int = Field(ge=0)
    """Of them, those that are scored."""
    score: float | None
    """A fraction; None: none of them is scored."""
    interval: Interval | None


def slices(
    tally: Tally,
    predictions: Sequence[Prediction | None],
    *,
    by: Sequence[SliceBy] = SLICINGS,
    edges_s: Sequence[float] = EDGES_S,
    n: int = N_SAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> dict[SliceBy, tuple[Slice, ...]]:
    """Divide the items of a score, and score each part.

    Every item is in exactly one slice of each division. A division that leaves all items in one slice
    is left out: it would repeat the score.

    Args:
        tally: What was scored.
        predictions: The line behind each row of the tally; None: nothing is known of it.
        by: What to divide by.
        edges_s: Borders between durations in seconds, rising; a clip on a border belongs above.
        n: Bootstrap samples of each interval.
        level: Of the intervals.
        seed: Of the samples.

    Returns:
        Division to its slices: durations rising, all others by name, unknown ones last.

    Raises:
        SchemaError: Borders do not rise, or there are not as many predictions as rows.
    """
    if len(predictions) != len(tally.values):
        raise SchemaError(
            f"slices: {len(predictions)} predictions for {len(tally.values)} items; pass one per item, "
            "None where there is none."
        )
    found: dict[SliceBy, tuple[Slice, ...]] = {}
    names_of = _namers(edges_s)
    for division in by:
        name_of, order = names_of[division]
        names = np.array([UNKNOWN if p is None else name_of(p) for p in predictions], dtype=object)
        present = sorted(set(names), key=lambda name: (name == UNKNOWN, order(name), name))
        if len(present) > 1:
            found[division] = tuple(
                _slice(tally, str(name), names == name, n, level, seed) for name in present
            )
    return found


def quantile_edges(predictions: Sequence[Prediction | None], k: int = 4) -> tuple[float, ...]:
    """Return borders that divide the known durations into k parts of about equal size.

    In seconds, to a hundredth; fewer borders come back where many clips are equally long.
    """
    known = [
        p.about.duration_s for p in predictions if p and p.about and p.about.duration_s is not None
    ]
    if not known:
        return ()
    found = np.quantile(known, [i / k for i in range(1, k)])
    shortest = min(known)
    return tuple(sorted({edge for edge in np.round(found, 2).tolist() if edge > shortest}))


def _slice(tally: Tally, name: str, chosen: np.ndarray, n: int, level: float, seed: int) -> Slice:
    part = Tally(
        tally.columns, tally.values[chosen], tally.score, tally.parts, tally.scored[chosen]
    )
    n_scored = int(part.scored.sum())
    score = part.total if n_scored else math.nan
    is_defined = not math.isnan(score)
    return Slice(
        name=name,
        n_offered=len(part.values),
        n=n_scored,
        score=score if is_defined else None,
        interval=interval(part, n=n, level=level, seed=seed) if is_defined else None,
    )


_Namer = tuple[Callable[[Prediction], str], Callable[[str], int]]


def _namers(edges_s: Sequence[float]) -> dict[SliceBy, _Namer]:
    """Return for each division how an item's slice is named, and how names are ordered."""
    if list(edges_s) != sorted(set(edges_s)) or any(not edge > 0 for edge in edges_s):
        raise SchemaError(
            f"edges_s: {list(edges_s)} do not rise from above 0; for example 2, 5, 10 (seconds)."
        )
    durations = _duration_names(edges_s)

    def duration(prediction: Prediction) -> str:
        about = prediction.about
        if about is None or about.duration_s is None:
            return UNKNOWN
        return durations[int(np.searchsorted(edges_s, about.duration_s, side="right"))]

    def by_name(_: str) -> int:
        return 0

    return {
        "corpus": (lambda p: p.uid.partition("/")[0], by_name),
        "language": (lambda p: (p.about and p.about.language) or UNKNOWN, by_name),
        "duration": (
            duration,
            lambda name: durations.index(name) if name in durations else len(durations),
        ),
        "missing": (_missing, lambda name: name.count("+") + (name != _NOTHING)),
    }


_NOTHING: Final = "nothing missing"


def _missing(prediction: Prediction) -> str:
    absent = prediction.about.absent if prediction.about else ()
    streams = sorted({*absent, *prediction.masked})
    if streams:
        return f"without {' + '.join(streams)}"
    return _NOTHING if prediction.about else UNKNOWN


def _duration_names(edges_s: Sequence[float]) -> list[str]:
    if not edges_s:
        return ["all lengths"]
    shown = [str(float(edge)).removesuffix(".0") for edge in edges_s]  # all digits: names differ
    between = [f"{low} to {high} s" for low, high in pairwise(shown)]
    return [f"under {shown[0]} s", *between, f"from {shown[-1]} s"]
