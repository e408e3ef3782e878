"""Chance in a sweep: intervals of scores, and rows against the baseline on the same clips.

A row with one seed has a bootstrap interval over clips, a row with several Student's interval over its
trainings. Tests pair a row with the baseline seed by seed; what chance draws is a clip, with its replies of
all seeds, since the seeds of a row err on the same clips.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from cache.errors import MissingDependencyError, PredictionError
from eval.predictions import Prediction, read_predictions
from eval.results.compare import aligned
from eval.results.sides import Side, find_predictions, item_of, read_run
from eval.scoring import rules
from eval.scoring.intervals import N_SAMPLES, N_SWAPS, draw_pair, mean_interval, summarize_draws
from eval.scoring.tally import Floats, Tally
from eval.sweep.schema import ScoreColumn
from eval.sweep.tables.table import LEVEL, Change, Span
from train.text.tasks import SEVERAL_LABELS, TASK_TABLE, check_task

if TYPE_CHECKING:
    from eval.scoring.intervals import PairDraws

Sides = Mapping[str, Side]
"""Set -> a trial's replies and how they count. A `split` column has one set, named by its split."""
_SINGLE: Final = {
    "accuracy": rules.accuracy,
    "weighted_f1": rules.weighted_f1,
    "macro_f1": rules.macro_f1,
    "uar": rules.uar,
}
EPSILON: Final = 1e-9
"""Two computations of one score differ by less."""


def read_sides(path: Path, column: ScoreColumn, *, wheels: Path | None = None) -> Sides:
    """Read what a trial replied for a score column.

    Args:
        path: A predictions file, or the folder of an evaluation or a benchmark.
        column: What is scored.
        wheels: Folder of the emotion wheels, for the sets of a benchmark that need them.

    Raises:
        PredictionError: No file, or none that holds what the column scores.
        SchemaError: Wheel tables that are needed and not there.
    """
    if column.kind == "split":
        return {column.split: side_of(read_predictions(find_predictions(path)), column)}
    sides = read_run(path, wheels=wheels).sides
    missing = [name for name in column.sets if name not in sides]
    if missing:
        raise PredictionError(
            f"{path}: no replies for {', '.join(missing)}, over which '{column.name}' is averaged. "
            "Ask the sets again: remove the trial's folder and run the sweep."
        )
    return {name: sides[name] for name in column.sets}


def side_of(predictions: Sequence[Prediction], column: ScoreColumn) -> Side:
    """Return the replies that a `split` column scores, with their tally.

    Raises:
        PredictionError: None of them is to its task.
    """
    task = check_task(column.task)
    own = [p for p in predictions if p.task == task and not p.masked]
    if not own:
        raise PredictionError(
            f"none of {len(predictions)} replies is to the task {task!r} with all streams, which "
            f"'{column.name}' scores."
        )
    several = TASK_TABLE[task].label in SEVERAL_LABELS
    items = tuple(item_of(p, several) for p in own)
    if several:
        tally = _several(column.metric, [i.truth for i in items], [i.predicted for i in items])
    else:
        tally = _SINGLE[column.metric]([p.truth for p in own], [p.label for p in own])
    return Side(
        title=column.heading,
        metric=column.metric,
        corpus="",  # several may be in a split: items keep their whole uids
        items=items,
        tally=tally,
        is_exact=column.metric == "accuracy",
        rules={},
    )


def _several(
    metric: str, truths: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> Tally:
    """Tally a task with several labels per clip; see `eval.metrics.MultiLabelScores`."""
    known = [tuple(truth) or None for truth in truths]
    if metric == "accuracy":
        exact = [None if t is None else "right" for t in known]
        said = ["right" if {*t} == {*p} else None for t, p in zip(truths, predicted, strict=True)]
        return rules.accuracy(exact, said)
    base = rules.mean_average_precision(known, predicted)
    k = len(base.columns) // 3

    def score(sums: Floats) -> Floats:
        tp, said, true = sums[..., :k], sums[..., k : 2 * k], sums[..., 2 * k : 3 * k]
        present = true > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = np.nan_to_num(2 * tp / (said + true))
            recall = np.nan_to_num(tp / true)
            if metric == "weighted_f1":
                return np.asarray((f1 * true).sum(-1) / true.sum(-1))
            each = f1 if metric == "macro_f1" else recall
            return np.asarray(np.where(present, each, 0.0).sum(-1) / present.sum(-1))

    return replace(base, score=score)


def score_of(sides: Sides) -> float:
    """Return a column's score: the plain mean over its sets.

    Raises:
        PredictionError: Of a set, no reply has a truth that counts.
    """
    for name, side in sides.items():
        if math.isnan(side.tally.total):
            raise PredictionError(
                f"none of {len(side.items)} replies for '{name}' has a truth that counts, so there is no "
                "score. Check the labels of its records."
            )
    return math.fsum(side.tally.total for side in sides.values()) / len(sides)


def n_scored(sides: Sides) -> int:
    """Return how many items enter a column's score."""
    return sum(int(side.tally.scored.sum()) for side in sides.values())


def span_over_clips(sides: Sides, *, n: int = N_SAMPLES) -> Span | None:
    """Return the bootstrap interval of one training's score; None if no sample differs from another."""
    found = mean_interval([side.tally for side in sides.values()], n=n, level=LEVEL)
    if found.low == found.high:
        return None
    return Span(low=found.low, high=found.high, over="clips")


def span_over_seeds(
    values: Sequence[float], *, bounds: tuple[float, float] = (0.0, 1.0)
) -> Span | None:
    """Return Student's interval of a mean over trainings; None if they do not differ at all.

    It takes the scores of seeds as drawn from a normal distribution, which a handful cannot show.

    Args:
        values: One number per seed, at least two.
        bounds: Between which the numbers lie by their nature, and so does the interval.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise MissingDependencyError(
            "Intervals over seeds need scipy: pip install 'emocache[eval]'"
        ) from error
    n = len(values)
    mean = math.fsum(values) / n
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    if spread < EPSILON:
        return None
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * spread / math.sqrt(n)
    low, high = bounds
    return Span(low=max(low, mean - half), high=min(high, mean + half), over="seeds")


def change(
    column: ScoreColumn,
    base: Mapping[int, Sides],
    row: Mapping[int, Sides],
    names: tuple[str, str],
    *,
    n: int = N_SAMPLES,
    n_swaps: int = N_SWAPS,
    n_asked: int | None = None,
) -> Change:
    """Compare a row with the baseline: seed by seed, on the clips that all of them have.

    The p value is corrected later, when all are known; see `eval.scoring.intervals.holm`.

    Args:
        column: What is compared.
        base: Seed -> the baseline's replies.
        row: Seed -> the row's; at least one seed in common.
        names: Of baseline and row, for messages.
        n: Bootstrap samples.
        n_swaps: Swaps of the permutation test.
        n_asked: Seeds that were asked for; None: the common ones.

    Raises:
        PredictionError: No common seed or clip, or the two disagree about a truth.
    """
    seeds = sorted(base.keys() & row.keys())
    if not seeds:
        raise PredictionError(f"{names[1]} and {names[0]} have no seed in common that is done")
    draws: list[PairDraws] = []
    by_set: list[list[float]] = []
    called = names if len(seeds) == 1 else [f"{x}, seed {s}," for s in seeds for x in names]
    for name in base[seeds[0]]:
        sides = [side for seed in seeds for side in (base[seed][name], row[seed][name])]
        tallies = aligned(name, sides, called)
        first, second = tallies[::2], tallies[1::2]
        place = zlib.crc32(f"{column.name} {name}".encode())
        pair = _side_by_side(first), _side_by_side(second)
        draws.append(draw_pair(*pair, n=n, n_swaps=n_swaps, seed=(0, place)))
        by_set.append([b.total - a.total for a, b in zip(first, second, strict=True)])
    differences = [math.fsum(of_seed) / len(by_set) for of_seed in zip(*by_set, strict=True)]
    test = summarize_draws(draws, LEVEL)
    over_seeds = span_over_seeds(differences, bounds=(-1.0, 1.0)) if len(seeds) > 1 else None
    return Change(
        difference=test.difference,
        span=over_seeds or Span(low=test.low, high=test.high, over="clips"),
        p_value=test.p_value,
        p_holm=test.p_value,
        n_seeds=len(seeds),
        n_asked=n_asked or len(seeds),
        n_items=test.n_items,
        n_better=test.n_better,
        n_worse=test.n_worse,
    )


def _side_by_side(tallies: Sequence[Tally]) -> Tally:
    """Return one tally of the mean score over seeds, whose items are clips with their replies of all seeds.

    Drawn or swapped one by one, n alike seeds would pass for n times as many clips.
    """
    if len(tallies) == 1:
        return tallies[0]
    first, n = tallies[0], len(tallies)

    def score(sums: Floats) -> Floats:
        return np.asarray(first.score(sums.reshape(*sums.shape[:-1], n, -1)).mean(-1))

    return Tally(
        columns=first.columns * n,
        values=np.hstack([tally.values for tally in tallies]),
        score=score,
        parts=lambda _: {},
        scored=np.any([tally.scored for tally in tallies], axis=0),
    )
