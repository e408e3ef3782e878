"""Runs against one another, on the same items: scores, differences, tests, and what changed.

The first run is the reference; every other one is compared with it. Only items that all runs have are
compared, and what is left out for that is counted and said. Truths must agree.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from cache.errors import PredictionError
from eval.benchmarks import benchmarks
from eval.judging.results import one_judge
from eval.results.comparison import (
    Change,
    Comparison,
    Difference,
    Part,
    RunScore,
    SetComparison,
)
from eval.results.sides import Run, Side
from eval.scoring.intervals import (
    N_SAMPLES,
    N_SWAPS,
    Interval,
    PairDraws,
    draw_pair,
    gain,
    holm,
    mcnemar,
    mean_interval,
    summarize_draws,
)
from eval.scoring.result import Item
from eval.scoring.tally import Floats, Tally

N_EXAMPLES: Final = 8
"""Changed items shown per set, run and direction."""

Key = tuple[str, str, int]
"""Mode, id, and which of equally named items."""


def compare(
    runs: Sequence[Run],
    *,
    level: float = 0.95,
    n_samples: int = N_SAMPLES,
    n_swaps: int = N_SWAPS,
    n_examples: int = N_EXAMPLES,
    seed: int = 0,
    on_set: Callable[[str], None] | None = None,
) -> Comparison:
    """Compare two or more runs on every set that all of them have.

    Args:
        runs: From `eval.results.sides.read_run`; the first is the reference.
        level: Of the intervals.
        n_samples: Bootstrap samples.
        n_swaps: Swaps of the permutation tests.
        n_examples: Changed items shown per set, run and direction.
        seed: Of samples and swaps.
        on_set: Called with the name of each set that is done.

    Raises:
        PredictionError: Fewer than two runs, no common set, or no common item in one; or the runs
            disagree about a truth, or were scored by different rules.
        MixedJudgesError: Ratings are of different judges.
    """
    if len(runs) < 2:
        raise PredictionError(
            f"nothing to compare with: {len(runs)} run given, at least two are needed. "
            "emocache compare RUN_A RUN_B"
        )
    names = [run.facts.name for run in runs]
    known = list(benchmarks())
    common = sorted(  # as in Table 4, then what is no benchmark, as it came
        (name for name in runs[0].sides if all(name in run.sides for run in runs)),
        key=lambda name: known.index(name) if name in known else len(known),
    )
    if not common:
        listed = "; ".join(f"{run.facts.name} has {', '.join(run.sides)}" for run in runs)
        raise PredictionError(
            f"no set is in all runs: {listed}. Compare predictions for the same sets."
        )
    for kind in dict.fromkeys(score.kind for run in runs for score in run.judged):
        one_judge(score for run in runs for score in run.judged if score.kind == kind)
    findings = _only_some(runs, common)
    chance = _Chance(level, n_samples, n_swaps, seed)
    sets: list[_Set] = []
    for name in common:
        sides = [run.sides[name] for run in runs]
        _check_rules(name, sides, names)
        sets.append(_compare_set(name, sides, names, chance, n_examples))
        found = sets[-1].found
        if (remark := _left_out(found, names)) is not None:
            findings.append(remark)
        if on_set is not None:
            on_set(name)
    return Comparison(
        runs=tuple(run.facts for run in runs),
        protocol=next(
            (p for name in common if (p := runs[0].sides[name].rules.get("protocol"))), None
        ),
        level=level,
        n_samples=n_samples,
        n_swaps=n_swaps,
        seed=seed,
        sets=_corrected([one.found for one in sets]),
        averages=_averages(sets, names, chance),
        findings=tuple(findings),
    )


@dataclass(frozen=True)
class _Chance:
    """How much is drawn."""

    level: float
    n_samples: int
    n_swaps: int
    seed: int

    def seed_of(self, name: str) -> tuple[int, int]:
        """Return the seed of a set: its own, whichever other sets are compared."""
        return self.seed, zlib.crc32(name.encode())

    def interval(self, tallies: Sequence[Tally]) -> Interval:
        """Return the interval of the mean score."""
        return mean_interval(tallies, n=self.n_samples, level=self.level, seed=self.seed)


@dataclass(frozen=True)
class _Set:
    """A compared set, and what its averages need."""

    found: SetComparison
    tallies: tuple[Tally, ...]
    """Of the common items, per run."""
    draws: tuple[PairDraws, ...]
    """Per run but the first."""


def _check_rules(name: str, sides: Sequence[Side], names: Sequence[str]) -> None:
    """Refuse scores that mean different things."""
    for side, run in zip(sides[1:], names[1:], strict=True):
        first = sides[0]
        if side.metric != first.metric or side.rules != first.rules:
            told = {**first.rules, "metric": first.metric}
            other = {**side.rules, "metric": side.metric}
            differing = [
                f"{what} {told.get(what, 'none')!r} and {other.get(what, 'none')!r}"
                for what in dict.fromkeys((*told, *other))
                if told.get(what) != other.get(what)
            ]
            raise PredictionError(
                f"{name}: {names[0]} and {run} were scored by different rules: {'; '.join(differing)}. "
                "Score both in the same way."
            )


def _only_some(runs: Sequence[Run], common: Sequence[str]) -> list[str]:
    """Say which sets and replies are not compared."""
    having: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for run in runs for name in run.sides):
        if name not in common:
            owners = tuple(run.facts.name for run in runs if name in run.sides)
            having.setdefault(owners, []).append(name)
    found = [
        f"not compared, since only {' and '.join(owners)} {'has' if len(owners) == 1 else 'have'} "
        f"{'it' if len(sets) == 1 else 'them'}: {', '.join(sets)}"
        for owners, sets in having.items()
    ]
    for facts in (run.facts for run in runs):
        if facts.n_unlisted:
            found.append(
                f"not compared, since they name no label of a list: {facts.n_unlisted:,} of {facts.name}'s "
                f"{facts.n:,} replies"
            )
    return found


def _left_out(found: SetComparison, names: Sequence[str]) -> str | None:
    """Say how many items not all runs have."""
    more = [
        f"{score.n_only:,} of {name}"
        for score, name in zip(found.scores, names, strict=True)
        if score.n_only
    ]
    if not more:
        return None
    n = found.n_common
    return (
        f"{found.id}: compared on the {n:,} item{'s' * (n != 1)} that all runs have, without "
        f"{', '.join(more)}"
    )


def _keys(sides: Sequence[Side]) -> list[list[Key]]:
    """Return what tells the items apart, per run: the id, and the mode only if ids repeat.

    Our ids are `<corpus>/<id of the clip>`, those of the released format and of truth files the latter;
    their modes are other words than our splits.
    """
    ids = [[item.id.removeprefix(f"{side.corpus}/") for item in side.items] for side in sides]
    is_unique = all(len(set(own)) == len(own) for own in ids)
    found: list[list[Key]] = []
    for side, own in zip(sides, ids, strict=True):
        modes = ["" if is_unique else item.mode or "" for item in side.items]
        seen: Counter[tuple[str, str]] = Counter()
        keys = []
        for mode, name in zip(modes, own, strict=True):
            keys.append((mode, name, seen[mode, name]))
            seen[mode, name] += 1
        found.append(keys)
    return found


def aligned(name: str, sides: Sequence[Side], names: Sequence[str]) -> tuple[Tally, ...]:
    """Return the tallies of the items that all runs have, in one order and with one set of columns.

    Args:
        name: Of the set, for messages.
        sides: What each run brings to it.
        names: Of the runs.

    Raises:
        PredictionError: No item is in all runs, none of them is scored, or the runs disagree about a truth.
    """
    return _aligned(name, sides, _common_rows(name, sides, names))


def _common_rows(name: str, sides: Sequence[Side], names: Sequence[str]) -> list[list[int]]:
    """Return the rows of the items that all runs have, per run, in the order of the first."""
    places = [{key: row for row, key in enumerate(own)} for own in _keys(sides)]
    common = [key for key in places[0] if all(key in place for place in places)]
    if not common:
        shown = "; ".join(
            f"{run} has {len(place):,}, such as {next(iter(place))[1]!r}"
            for run, place in zip(names, places, strict=True)
        )
        raise PredictionError(
            f"{name}: no item is in all runs: {shown}. Compare predictions for the same items, with the "
            "same ids."
        )
    rows = [[place[key] for key in common] for place in places]
    first = [sides[0].items[row] for row in rows[0]]
    for side, own, run in zip(sides[1:], rows[1:], names[1:], strict=True):
        pairs = zip(first, (side.items[row] for row in own), strict=True)
        other = [(a, b) for a, b in pairs if set(a.truth) != set(b.truth)]
        if other:
            shown = "; ".join(
                f"{a.id!r} {_words(a.truth)} and {_words(b.truth)}" for a, b in other[:3]
            )
            raise PredictionError(
                f"{name}: {names[0]} and {run} disagree about the truth of {len(other):,} of "
                f"{len(common):,} items: {shown}{', and more' if len(other) > 3 else ''}. Scores against "
                "different truths do not compare: score both against the same labels, with --truths FILE."
            )
    return rows


def _words(labels: Sequence[str]) -> str:
    return repr(", ".join(labels)) if labels else "no label"


def _aligned(name: str, sides: Sequence[Side], rows: Sequence[Sequence[int]]) -> tuple[Tally, ...]:
    """Return the tallies of the common items, all with the columns of the first run's."""
    first = sides[0].tally
    found = []
    for side, own in zip(sides, rows, strict=True):
        chosen = np.asarray(own)
        values = _by_name(side.tally, first.columns)[chosen]
        found.append(
            Tally(first.columns, values, first.score, first.parts, side.tally.scored[chosen])
        )
    if not any(one.scored.any() for one in found):
        raise PredictionError(
            f"{name}: none of the {len(rows[0]):,} items that all runs have is scored. Check the truths."
        )
    return tuple(found)


def _by_name(tally: Tally, columns: Sequence[str]) -> Floats:
    """Return a tally's numbers under other columns, (n, len(columns)).

    Files with different items may hold different classes. A class that one of them lacks is the truth
    of no common item, so that neither leaving its sums out nor taking them as 0 changes a score.
    """
    if tally.columns == tuple(columns):
        return tally.values
    place = {name: at for at, name in enumerate(tally.columns)}
    values = np.zeros((len(tally.values), len(columns)))
    for at, name in enumerate(columns):
        if name in place:
            values[:, at] = tally.values[:, place[name]]
    return values


def _compare_set(
    name: str, sides: Sequence[Side], names: Sequence[str], chance: _Chance, n_examples: int
) -> _Set:
    rows = _common_rows(name, sides, names)
    tallies = _aligned(name, sides, rows)
    scores = []
    for side, own, tally in zip(sides, rows, tallies, strict=True):
        n_only = len(side.items) - len(own)
        scores.append(
            RunScore(
                score=tally.total,
                interval=chance.interval([tally]),
                n_only=n_only,
                own_score=side.tally.total if n_only else None,
            )
        )
    draws = tuple(
        draw_pair(
            tallies[0],
            tally,
            n=chance.n_samples,
            n_swaps=chance.n_swaps,
            seed=chance.seed_of(name),
        )
        for tally in tallies[1:]
    )
    items = [[side.items[row] for row in own] for side, own in zip(sides, rows, strict=True)]
    differences = []
    for number, drawn in enumerate(draws, start=1):
        test = summarize_draws([drawn], chance.level)
        exact = None
        if sides[0].is_exact:
            exact = mcnemar(_right(tallies[0]), _right(tallies[number]))
        gains = gain(tallies[0], tallies[number]).tolist()
        pairs = list(zip(items[0], items[number], gains, strict=True))
        better, worse = [p for p in pairs if p[2] > 0], [p for p in pairs if p[2] < 0]
        differences.append(
            Difference(
                run=names[number],
                test=test,
                mcnemar=exact,
                p_value=test.p_value if exact is None else exact.p_value,
                p_holm=None,
                better=_examples(better, n_examples),
                worse=_examples(worse, n_examples),
                better_ids=tuple(a.id for a, _, _ in better),
                worse_ids=tuple(a.id for a, _, _ in worse),
            )
        )
    found = SetComparison(
        id=name,
        title=sides[0].title,
        metric=sides[0].metric,
        unit=sides[0].unit,
        n_common=len(rows[0]),
        n_scored=int(tallies[0].scored.sum()),
        scores=tuple(scores),
        parts=_parts(tallies),
        differences=tuple(differences),
        notes=_notes(sides, names),
    )
    return _Set(found, tallies, draws)


def _notes(sides: Sequence[Side], names: Sequence[str]) -> tuple[str, ...]:
    """Return what must be known of the scores; what is not said of all runs names its own."""
    having: dict[str, list[str]] = {}
    for side, name in zip(sides, names, strict=True):
        for note in side.notes:
            having.setdefault(note, []).append(name)
    return tuple(
        note if len(owners) == len(sides) else f"{', '.join(owners)}: {note}"
        for note, owners in having.items()
    )


def _right(tally: Tally) -> npt.NDArray[np.bool_]:
    """Return which scored items are right, where each is right or wrong, (n,) bool."""
    found: npt.NDArray[np.bool_] = tally.score(tally.values[tally.scored]) > 0.5
    return found


def _parts(tallies: Sequence[Tally]) -> tuple[Part, ...]:
    of_run = [tally.parts(tally.sums) for tally in tallies]
    return tuple(
        Part(name=name, scores=tuple(_defined(parts.get(name)) for parts in of_run))
        for name in of_run[0]
        if any(_defined(parts.get(name)) is not None for parts in of_run)
    )


def _defined(value: float | None) -> float | None:
    return None if value is None or np.isnan(value) else value


def _examples(pairs: list[tuple[Item, Item, float]], n: int) -> tuple[Change, ...]:
    """Return n changes: the weightiest of each truth, then the second of each, and so on."""
    seen: Counter[tuple[str, ...]] = Counter()
    ranked = []
    # Rounded, so that equal changes stay in the order of the file.
    for a, b, value in sorted(pairs, key=lambda pair: -round(abs(pair[2]), 9)):
        ranked.append((seen[a.truth], (a, b, value)))
        seen[a.truth] += 1
    ranked.sort(key=lambda entry: entry[0])
    return tuple(_change(*pair) for _, pair in ranked[:n])


def _change(a: Item, b: Item, value: float) -> Change:
    about = a.prediction.about if a.prediction is not None else None
    return Change(
        id=a.id,
        mode=a.mode,
        truth=a.truth,
        predicted=(a.predicted, b.predicted),
        replies=(a.reply, b.reply),
        subtitle=about.subtitle if about is not None else None,
        gain=value,
    )


def _corrected(sets: Sequence[SetComparison]) -> tuple[SetComparison, ...]:
    """Return the sets with p values corrected for the number of all tests."""
    corrected = iter(holm([d.p_value for one in sets for d in one.differences]))
    return tuple(
        one.model_copy(
            update={
                "differences": tuple(
                    d.model_copy(update={"p_holm": next(corrected)}) for d in one.differences
                )
            }
        )
        for one in sets
    )


def _averages(
    sets: Sequence[_Set], names: Sequence[str], chance: _Chance
) -> tuple[SetComparison, ...]:
    """Compare by Avg-9 and Avg-18, if all of their sets are there."""
    of = {one.found.id: one for one in sets}
    rows = benchmarks().values()
    groups = {"avg-9": [r.id for r in rows if r.unibench], "avg-18": [r.id for r in rows]}
    found = []
    for average, ids in groups.items():
        if not all(i in of for i in ids):
            continue
        own = [of[i] for i in ids]
        differences = []
        for number, run in enumerate(names[1:]):
            test = summarize_draws([one.draws[number] for one in own], chance.level)
            differences.append(
                Difference(run=run, test=test, mcnemar=None, p_value=test.p_value, p_holm=None)
            )
        scores = []
        for number in range(len(names)):
            tallies = [one.tallies[number] for one in own]
            scores.append(
                RunScore(
                    score=sum(tally.total for tally in tallies) / len(tallies),
                    interval=chance.interval(tallies),
                    n_only=sum(one.found.scores[number].n_only for one in own),
                    own_score=None,
                )
            )
        found.append(
            SetComparison(
                id=average,
                title=f"Average of {len(ids)} sets",
                metric="plain mean over sets",
                unit="percent",
                kind="average",
                n_common=sum(one.found.n_common for one in own),
                n_scored=sum(one.found.n_scored for one in own),
                scores=tuple(scores),
                differences=tuple(differences),
            )
        )
    return tuple(found)
