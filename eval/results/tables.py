"""The tables of the paper with our own rows in them, as plain data: pages, LaTeX and CSV lay them out.

Scores are in percent here, as the paper prints them, and compared as printed, so that equal numbers are
equally bold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from cache.errors import PredictionError
from eval.benchmarks import Benchmark, Protocol, averages, benchmarks, published
from eval.judging.results import (
    PUBLISHED_JUDGE,
    EmerScore,
    Judge,
    LexicalScore,
    MmeScore,
    Repeated,
    beside_published,
    one_judge,
)
from eval.scoring.result import Scored

if TYPE_CHECKING:
    from eval.scoring.intervals import Interval

NOTHING: Final = "\N{EN DASH}"
OTHER_COUNT: Final = "\N{DAGGER}"
"""Mark of a score over another number of items than published."""
OURS: Final = "This report"
"""The group of our own rows."""


class Cell(NamedTuple):
    """One number of a table."""

    text: str
    value: float | None = None
    """As printed; None: nothing to compare."""
    rank: int = 0
    """1: the best of its column, 2: the second best, 0: neither, or not ranked."""
    mark: str = ""
    """Of a footnote."""


class Row(NamedTuple):
    """One model."""

    model: str
    cells: tuple[Cell, ...]
    is_ours: bool = False
    below: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Lines in small print under it: name, one text per column."""


class Table(NamedTuple):
    """A table in the layout of the paper."""

    name: str
    """For file names and anchors."""
    caption: str
    columns: tuple[str, ...]
    groups: tuple[tuple[str, tuple[Row, ...]], ...]
    """Title of a block of rows -> its rows; an empty title is not printed."""
    foot: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Lines in small print under all rows."""
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows."""
        return tuple(row for _, rows in self.groups for row in rows)


def recognition_tables(
    runs: Mapping[str, Mapping[str, Scored]],
    intervals: Mapping[str, Mapping[str, Interval]],
) -> tuple[Table, ...]:
    """Return the two blocks of Table 4 with our rows; a block of which we scored no set is left out.

    A score over fewer items than published is shown and marked, but not ranked. An average is given only
    if all of its sets are there.

    Args:
        runs: Name of a run -> benchmark id -> its score.
        intervals: The same for confidence intervals; any may be missing.
    """
    found = []
    for name, average, is_first in (("avg-9", "Avg-9", True), ("avg-18", "Avg-18", False)):
        sets = [row for row in benchmarks().values() if row.unibench == is_first]
        if any(row.id in scored for scored in runs.values() for row in sets):
            found.append(_recognition(runs, intervals, sets, name, average))
    return tuple(found)


def protocol_of(runs: Mapping[str, Mapping[str, Scored]]) -> Protocol | None:
    """Return the one protocol of all scores; None if there are none.

    Raises:
        PredictionError: Scores of several protocols: they may not share a table.
    """
    found: dict[Protocol, str] = {}
    for run, scored in runs.items():
        for task, one in scored.items():
            found.setdefault(one.result.protocol, f"{run}, {task}")
    if len(found) > 1:
        told = "; ".join(f"{protocol} ({where})" for protocol, where in found.items())
        raise PredictionError(
            f"scores of several protocols may not share a table, got {told}. Score all predictions with "
            "the same --protocol, or write a report for each."
        )
    return next(iter(found), None)


def _recognition(
    runs: Mapping[str, Mapping[str, Scored]],
    intervals: Mapping[str, Mapping[str, Interval]],
    sets: Sequence[Benchmark],
    name: str,
    average: str,
) -> Table:
    groups: dict[str, list[Row]] = {}
    for row in published().recognition:
        cells = [_plain(row.scores.get(one.id)) for one in sets]
        groups.setdefault(f"Input: {', '.join(row.input)}", []).append(
            Row(row.model, (*cells, _plain(row.averages.get(name))))
        )
    groups[OURS] = [
        _own_row(run, scored, intervals.get(run, {}), sets, name) for run, scored in runs.items()
    ]
    ranked = _ranked_groups(groups)
    cells = [cell for _, rows in ranked for row in rows for cell in row.cells]
    what = "MER-UniBench" if name == "avg-9" else "MMEVerse-Bench beyond MER-UniBench"
    return Table(
        name=f"table-4-{name}",
        caption=f"The {len(sets)} sets of {what}, in percent",
        columns=(*(row.short for row in sets), average),
        groups=ranked,
        foot=(("published items", (*(f"{row.n:,}" for row in sets), "")),),
        notes=(
            *([_count_note(runs, sets)] if any(cell.mark for cell in cells) else []),
            *_average_notes(name),
        ),
    )


def _own_row(
    run: str,
    scored: Mapping[str, Scored],
    intervals: Mapping[str, Interval],
    sets: Sequence[Benchmark],
    name: str,
) -> Row:
    cells: list[Cell] = []
    scored_items, offered_items = [], []
    for row in sets:
        one = scored.get(row.id)
        cells.append(Cell(NOTHING) if one is None else _own_cell(one.result.score, [(one, row.n)]))
        scored_items.append("" if one is None else f"{one.result.counts.scored:,}")
        offered_items.append("" if one is None else f"{one.result.counts.offered:,}")
    averaged = [row for row in benchmarks().values() if row.unibench or name == "avg-18"]
    mean = averages({task: one.result.score for task, one in scored.items()}).get(name)
    if mean is None:
        there = sum(row.id in scored for row in averaged)
        cells.append(Cell(NOTHING))
        scored_items.append(f"{there} of {len(averaged)} sets")
    else:
        cells.append(_own_cell(mean, [(scored[row.id], row.n) for row in averaged]))
        scored_items.append("")
    below = [("scored", tuple(scored_items)), ("offered", (*offered_items, ""))]
    if intervals:
        level = next(iter(intervals.values())).level
        keys = (*(row.id for row in sets), name)
        between = tuple(span(intervals[key]) if key in intervals else "" for key in keys)
        below.insert(0, (f"{100 * level:g} % interval", between))
    return Row(run, tuple(cells), is_ours=True, below=tuple(below))


def _own_cell(score: float, over: Sequence[tuple[Scored, int]]) -> Cell:
    """Return a score of ours; `over`: the sets that it rests on, with their published counts."""
    if math.isnan(score):
        return Cell(NOTHING)
    value = round(100 * score, 2)
    offered = [(one.result.counts.offered, n) for one, n in over]
    is_ranked = all(found >= n for found, n in offered) and not any(map(_by_other_rule, over))
    mark = "" if all(found == n for found, n in offered) else OTHER_COUNT
    return Cell(f"{value:.2f}", value if is_ranked else None, mark=mark)


def _by_other_rule(over: tuple[Scored, int]) -> bool:
    """Whether a score follows another rule than the published ones."""
    return over[0].result.protocol == "unibench" and over[0].benchmark.metric == "waf"


def span(interval: Interval | None) -> str:
    """Return an interval of fractions in percent: `75.1\N{EN DASH}79.6`."""
    if interval is None:
        return NOTHING
    return f"{100 * interval.low:.1f}\N{EN DASH}{100 * interval.high:.1f}"


def _plain(value: float | None) -> Cell:
    return Cell(NOTHING) if value is None else Cell(f"{value:.2f}", value)


def _average_notes(name: str) -> list[str]:
    """Say which published averages are not those of their rows."""
    notes = []
    for row in published().recognition:
        mean = averages(row.scores)[name]
        if abs(mean - row.averages[name]) > 0.0051:
            printed = f"{row.averages[name]:.2f}"
            notes.append(
                f"{row.model}: {name.capitalize()} as printed, {printed}; its row gives {mean:.2f}."
            )
    return notes


def _count_note(runs: Mapping[str, Mapping[str, Scored]], sets: Sequence[Benchmark]) -> str:
    fewer = any(
        scored[row.id].result.counts.offered < row.n
        for scored in runs.values()
        for row in sets
        if row.id in scored
    )
    said = f"{OTHER_COUNT} Over another number of items than published."
    return f"{said} A score over fewer items is not ranked." if fewer else said


def _ranked_groups(
    groups: Mapping[str, Sequence[Row]],
) -> tuple[tuple[str, tuple[Row, ...]], ...]:
    """Mark the best and the second best of each column; equal numbers share a rank."""
    rows = [row for members in groups.values() for row in members]
    best = []
    for column in zip(*(row.cells for row in rows), strict=True):
        values = {cell.value for cell in column if cell.value is not None}
        best.append(sorted(values, reverse=True)[:2])
    return tuple(
        (title, tuple(_marked(row, best) for row in rows)) for title, rows in groups.items()
    )


def _marked(row: Row, best: Sequence[Sequence[float]]) -> Row:
    cells = [
        cell if cell.value not in top else cell._replace(rank=top.index(cell.value) + 1)
        for cell, top in zip(row.cells, best, strict=True)
    ]
    return row._replace(cells=tuple(cells))


def emer_table(scores: Sequence[EmerScore]) -> Table:
    """Return Table 5 with our rows in a block of their own: another judge's ratings do not compare.

    Raises:
        MixedJudgesError: Our rows have different judges.
    """
    judge = one_judge(scores)
    rows = [Row(row.model, (_rating(row.clue), _rating(row.label))) for row in published().emer]
    ours = [
        Row(
            score.name,
            tuple(
                Cell(NOTHING if part.mean is None else f"{part.mean:.2f}")
                for part in (score.clue, score.label)
            ),
            is_ours=True,
            below=(
                *_errors((score.clue, score.label), 1),
                ("rated", (f"{score.clue.n:,}", f"{score.label.n:,}")),
                ("offered", (f"{score.offered:,}",) * 2),
            ),
        )
        for score in scores
    ]
    return Table(
        name="table-5",
        caption="EMER, mean ratings from 1 to 10",
        columns=("Clue overlap", "Label overlap"),
        groups=_beside(rows, ours, judge),
        notes=() if judge is None else (beside_published(judge), *_notes(scores)),
    )


def mme_table(scores: Sequence[MmeScore]) -> Table:
    """Return Table 6 with our rows in a block of their own: another judge's marks do not compare.

    Raises:
        MixedJudgesError: Our rows have different judges.
    """
    judge = one_judge(scores)
    kinds: dict[str, list[Row]] = {"open": [], "closed": []}
    for row in published().mme_emotion:
        printed = (_as_printed(row.rec), _as_printed(row.rea), _as_printed(row.cot))
        about = (Cell(row.llm or NOTHING), Cell(f"{row.steps:.1f}"), Cell(f"{row.tokens:.1f}"))
        kinds[row.kind].append(Row(row.model, (*about, *printed)))
    ours = []
    for score in scores:
        parts = (score.rec, score.rea, score.cot)
        means = (Cell(NOTHING if p.mean is None else f"{100 * p.mean:.2f}") for p in parts)
        about = (Cell(NOTHING), _mean(score.steps), _mean(score.tokens))
        n = (*("",) * 3, *(f"{part.n:,}" for part in parts))
        errors = tuple((name, ("", "", "", *texts)) for name, texts in _errors(parts, 100))
        offered = ("offered", (*("",) * 3, *(f"{score.offered:,}",) * 3))
        ours.append(Row(score.name, (*about, *means), True, (*errors, ("scored", n), offered)))
    blocks = [_ranked_groups({kind: rows}) for kind, rows in kinds.items()]
    titles = ("Open models, published", "Closed models, published")
    groups = [(title, block[0][1]) for title, block in zip(titles, blocks, strict=True)]
    units = {score.token_unit for score in scores}
    told = (f"Our tokens: {', '.join(sorted(units))}.",) if units else ()
    notes = () if judge is None else (beside_published(judge, frames=True), *told, *_notes(scores))
    return Table(
        name="table-6",
        caption="MME-Emotion: means per reply, scores in percent",
        columns=("LLM", "Avg step", "Avg token", "Rec-S", "Rea-S", "CoT-S"),
        groups=(*groups, *([(_ours(judge), tuple(ours))] if judge is not None else [])),
        notes=notes,
    )


def lexical_table(scores: Sequence[LexicalScore]) -> Table:
    """Return word overlap with the reference descriptions, in percent: no judge rates it."""
    rows = tuple(
        Row(
            score.name,
            tuple(
                Cell(NOTHING if value is None else f"{100 * value:.2f}")
                for value in (score.precision, score.recall, score.f1, score.lcs_f1)
            ),
            is_ours=True,
            below=(("scored / offered", (f"{score.scored:,} / {score.offered:,}", "", "", "")),),
        )
        for score in scores
    )
    return Table(
        name="lexical",
        caption="Lexical overlap with the references, in percent. No judge: no substitute for ratings",
        columns=("Precision", "Recall", "F1", "F1 of the longest common subsequence"),
        groups=(("", rows),),
        notes=_notes(scores),
    )


def _beside(
    rows: Sequence[Row], ours: Sequence[Row], judge: Judge | None
) -> tuple[tuple[str, tuple[Row, ...]], ...]:
    ranked = _ranked_groups({f"Published, judge {PUBLISHED_JUDGE}": rows})
    return ranked if judge is None else (*ranked, (_ours(judge), tuple(ours)))


def _ours(judge: Judge | None) -> str:
    return OURS if judge is None else f"{OURS}, judge {judge.model} ({judge.version})"


def _errors(parts: Sequence[Repeated], factor: float) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return spread over repeats and standard error over clips, where there are any."""
    lines = []
    for name, values in (
        ("s.d. of repeats", [part.spread for part in parts]),
        ("s.e. over clips", [part.clip_error for part in parts]),
    ):
        if any(value is not None for value in values):
            texts = (
                NOTHING if v is None else f"\N{PLUS-MINUS SIGN}{factor * v:.2f}" for v in values
            )
            lines.append((name, tuple(texts)))
    return tuple(lines)


def _rating(value: float) -> Cell:
    return Cell(f"{value:.2f}", value)


def _as_printed(value: float) -> Cell:
    """Return a score of Table 6, which gives one decimal to most rows and two to some."""
    one = f"{value:.1f}"
    return Cell(one if float(one) == value else f"{value:.2f}", value)


def _mean(value: float | None) -> Cell:
    return Cell(NOTHING if value is None else f"{value:.1f}")


def _notes(
    scores: Sequence[EmerScore] | Sequence[MmeScore] | Sequence[LexicalScore],
) -> tuple[str, ...]:
    """Return what must be known of our rows: reasons with counts, and notes."""
    notes: list[str] = []
    for score in scores:
        if score.reasons:
            told = "; ".join(f"{reason}: {n:,}" for reason, n in score.reasons.items())
            notes.append(f"{score.name}: {told}.")
        notes.extend(score.notes)
    return tuple(dict.fromkeys(notes))
