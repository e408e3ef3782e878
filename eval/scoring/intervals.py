"""How sure a score is, and whether two differ: bootstrap intervals and paired tests on tallies.

Items count as drawn independently from one population of clips: nothing here knows that clips of one
dialogue are kin, or that another training of the same model would answer otherwise. Every function is
seeded: the same items, in any order, give the same numbers.

Items that add the same numbers to a tally are interchangeable, so samples are drawn as counts of
distinct rows: the same distribution, and a fraction of the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.errors import MissingDependencyError, PredictionError
from cache.schema import Model
from eval.scoring.tally import Floats, Tally

N_SAMPLES = 1000
"""Bootstrap samples."""
N_SWAPS = 10_000
"""Random swaps of a paired test; the smallest p value is one over this."""
_CHUNK = 1 << 22
"""Numbers drawn at once: 32 MiB."""
_EPSILON = 1e-12
"""Differences of two sums of the same numbers in another order stay below it."""


class Interval(Model):
    """A bootstrap confidence interval of a score, by the percentile method."""

    low: float
    high: float
    level: float
    """How often such an interval is meant to hold the score of all clips of the kind: 0.95."""
    n: int
    """Bootstrap samples."""


class PairedTest(Model):
    """Two runs on the same items, by one metric."""

    difference: float
    """Score of the second run less that of the first."""
    low: float
    """Of the difference: both runs are resampled with the same items."""
    high: float
    level: float
    p_value: float
    """Two-sided: how often a difference as large arises if, for each item, chance decides which reply is
    whose. (1 + so many) / (1 + swaps)."""
    n_items: int
    """Scored items."""
    n_better: int
    """Items on which the second run's reply instead of the first's would raise the first's score."""
    n_worse: int
    """Items on which it would lower it; on all others it changes nothing."""


class McNemar(Model):
    """McNemar's exact test of two runs that are right or wrong on each item."""

    n_only_first: int
    """Items that only the first run has right."""
    n_only_second: int
    p_value: float
    """Two-sided, of the binomial distribution with one half."""


def interval(tally: Tally, *, n: int = N_SAMPLES, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the bootstrap interval of a score: scored items are drawn with replacement.

    A sample in which the score is undefined does not count. Of a score that no item could change, all
    right for example, the interval is a point: it then says nothing about clips that were not tried.

    Args:
        tally: What was scored.
        n: Bootstrap samples.
        level: Between 0 and 1.
        seed: Of the samples.

    Raises:
        PredictionError: No item is scored.
    """
    return mean_interval([tally], n=n, level=level, seed=seed)


def mean_interval(
    tallies: Sequence[Tally], *, n: int = N_SAMPLES, level: float = 0.95, seed: int = 0
) -> Interval:
    """Return the interval of the plain mean of several scores, Avg-9 for example.

    Each set is resampled for itself, as if no clip were in two of them.
    """
    samples = [
        _resampled(t.values[t.scored], t, n, np.random.default_rng([seed, i]))
        for i, t in enumerate(tallies)
    ]
    low, high, n_defined = _percentiles(np.mean(samples, axis=0), level)
    return Interval(low=low, high=high, level=level, n=n_defined)


def paired(
    first: Tally,
    second: Tally,
    *,
    n: int = N_SAMPLES,
    n_swaps: int = N_SWAPS,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Compare two runs on the same items: interval of the difference, and a permutation test.

    Args:
        first: One run.
        second: The other: the same items in the same order, hence the same columns.
        n: Bootstrap samples.
        n_swaps: Random swaps of the test.
        level: Of the interval.
        seed: Of samples and swaps.

    Raises:
        PredictionError: No item is scored, or the tallies are not of the same items.
    """
    draws = draw_pair(first, second, n=n, n_swaps=n_swaps, seed=seed)
    return summarize_draws([draws], level)


def paired_mean(
    pairs: Sequence[tuple[Tally, Tally]],
    *,
    n: int = N_SAMPLES,
    n_swaps: int = N_SWAPS,
    level: float = 0.95,
    seed: int = 0,
) -> PairedTest:
    """Compare two runs by the plain mean of their scores on several sets; see `paired`."""
    draws = [
        draw_pair(first, second, n=n, n_swaps=n_swaps, seed=(seed, i))
        for i, (first, second) in enumerate(pairs)
    ]
    return summarize_draws(draws, level)


@dataclass(frozen=True)
class PairDraws:
    """What chance makes of the difference of two runs on one set; several may be averaged."""

    difference: float
    """The observed one."""
    samples: Floats
    """(n,): in each bootstrap sample."""
    swaps: Floats
    """(n_swaps,): when chance decides which reply is whose."""
    n_items: int
    n_better: int
    n_worse: int


def draw_pair(
    first: Tally,
    second: Tally,
    *,
    n: int = N_SAMPLES,
    n_swaps: int = N_SWAPS,
    seed: int | Sequence[int] = 0,
) -> PairDraws:
    """Draw what `paired` needs; arguments and errors as there.

    Give sets that are to be averaged seeds of their own, or their draws move together.
    """
    scored = _scored_of_both(first, second)
    a, b = first.values[scored], second.values[scored]
    gains = gain(first, second)[scored]
    place = [seed] if isinstance(seed, int) else list(seed)
    return PairDraws(
        difference=float(second.score(b.sum(axis=0)) - first.score(a.sum(axis=0))),
        samples=_resampled_difference(a, b, first, n, np.random.default_rng([*place, 0])),
        swaps=_swapped(a, b, first, n_swaps, np.random.default_rng([*place, 1])),
        n_items=len(gains),
        n_better=int((gains > 0).sum()),
        n_worse=int((gains < 0).sum()),
    )


def summarize_draws(draws: Sequence[PairDraws], level: float = 0.95) -> PairedTest:
    """Return interval and p value of the mean difference over sets."""
    difference = math.fsum(one.difference for one in draws) / len(draws)
    low, high, _ = _percentiles(np.mean([one.samples for one in draws], axis=0), level)
    # Written so that an undefined difference, too, speaks against the finding.
    swapped = np.abs(np.mean([one.swaps for one in draws], axis=0))
    hits = ~(swapped < abs(difference) - _EPSILON)
    return PairedTest(
        difference=difference,
        low=low,
        high=high,
        level=level,
        p_value=(1 + int(hits.sum())) / (1 + len(hits)),
        n_items=sum(one.n_items for one in draws),
        n_better=sum(one.n_better for one in draws),
        n_worse=sum(one.n_worse for one in draws),
    )


def gain(first: Tally, second: Tally) -> Floats:
    """Return what the first run's score would gain if one item's reply were the second run's, (n,).

    Works for every metric: an F or a mean average precision has no score per item, but a change of one
    item changes it.
    """
    changed = first.sums + (second.values - first.values)
    gains: Floats = first.score(changed) - first.total
    gains[~(np.abs(gains) > _EPSILON)] = 0.0  # rounding, and NaN
    return gains


def mcnemar(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> McNemar:
    """Test whether two runs are right equally often on the same items.

    Args:
        first: (n,) bool: the first run is right.
        second: (n,) bool: the second run is.

    Raises:
        PredictionError: The lengths differ.
        MissingDependencyError: scipy is not installed.
    """
    if first.shape != second.shape:
        raise PredictionError(
            f"cannot compare {len(first)} items with {len(second)}; pass the same items of both runs."
        )
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise MissingDependencyError(
            "Comparing runs needs scipy: pip install 'emocache[eval]'"
        ) from error
    n_first, n_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = n_first + n_second
    p_value = float(binomtest(n_first, n).pvalue) if n else 1.0
    return McNemar(n_only_first=n_first, n_only_second=n_second, p_value=p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number, by Holm's step-down method, in the same order.

    Below a level, a corrected value keeps the chance of a single false alarm among all tests below it.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def _scored_of_both(first: Tally, second: Tally) -> npt.NDArray[np.bool_]:
    """Return which items are scored, (n,) bool; refuse tallies of different items."""
    if first.columns != second.columns or first.values.shape != second.values.shape:
        raise PredictionError(
            f"cannot compare: {len(first.values)} items with sums {_names(first)} and "
            f"{len(second.values)} items with sums {_names(second)}; both must be of the same items, "
            "truths and metric. Score the common items of both runs."
        )
    return first.scored | second.scored


def _names(tally: Tally) -> str:
    shown = ", ".join(tally.columns[:4])
    return f"{shown}, ..." if len(tally.columns) > 4 else shown


def _resampled(values: Floats, tally: Tally, n: int, rng: np.random.Generator) -> Floats:
    """Return the scores of n bootstrap samples of rows, (n,)."""
    parts = [tally.score(weights @ rows) for weights, rows in _draws(values, n, rng)]
    return np.concatenate(parts)


def _resampled_difference(
    a: Floats, b: Floats, tally: Tally, n: int, rng: np.random.Generator
) -> Floats:
    """Return differences of scores in n bootstrap samples, the same items of both runs, (n,)."""
    k = a.shape[1]
    parts = []
    for weights, rows in _draws(np.hstack([a, b]), n, rng):
        sums = weights @ rows
        parts.append(tally.score(sums[:, k:]) - tally.score(sums[:, :k]))
    return np.concatenate(parts)


def _draws(values: Floats, n: int, rng: np.random.Generator) -> Iterator[tuple[Floats, Floats]]:
    """Yield how often each distinct row is drawn, (samples, distinct), with the rows."""
    if not len(values):
        raise PredictionError(
            "no item is scored, so there is nothing to resample. Check the task and the truths."
        )
    rows, counts = np.unique(values, axis=0, return_counts=True)
    for size in _chunks(n, len(rows)):
        drawn = rng.multinomial(len(values), counts / len(values), size=size)
        yield drawn.astype(np.float64), rows


def _swapped(a: Floats, b: Floats, tally: Tally, n: int, rng: np.random.Generator) -> Floats:
    """Return the difference of scores when each item's replies are swapped by chance, (n,)."""
    sum_a, sum_b = a.sum(axis=0), b.sum(axis=0)
    # Only what a swap would change matters, and of equal changes only how many are swapped.
    change = b - a
    rows, counts = np.unique(change[change.any(axis=1)], axis=0, return_counts=True)
    parts = []
    for size in _chunks(n, len(rows)):
        moved = rng.binomial(counts, 0.5, size=(size, len(rows))).astype(np.float64) @ rows
        parts.append(tally.score(sum_b - moved) - tally.score(sum_a + moved))
    return np.concatenate(parts)


def _chunks(n: int, width: int) -> Iterator[int]:
    """Split n samples so that each part draws a bounded count of numbers."""
    most = max(1, _CHUNK // max(1, width))
    for start in range(0, n, most):
        yield min(most, n - start)


def _percentiles(samples: Floats, level: float) -> tuple[float, float, int]:
    """Return the interval that holds the middle of the samples, and how many are defined."""
    defined: Any = samples[~np.isnan(samples)]
    if not len(defined):
        raise PredictionError(
            "the score is undefined in every bootstrap sample: nothing that is scored enters it. Check "
            "the task and the truths."
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high), len(defined)
