"""From rows and what their trials came to, to the table: means, intervals, tests, published figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.errors import EmocacheError
from eval.scoring.intervals import N_SAMPLES, N_SWAPS, holm
from eval.sweep.schema import Row, Scale, ScoreColumn, SweepFile, TrialResult
from eval.sweep.tables.statistics import (
    EPSILON,
    Sides,
    change,
    n_scored,
    read_sides,
    score_of,
    span_over_clips,
    span_over_seeds,
)
from eval.sweep.tables.table import ALPHA, Change, Failure, RowScore, Span, SweepTable, TableRow
from train.config import Preset

Replies = Mapping[str, Mapping[int, Sides]]
"""Score column -> seed -> the replies of a row."""


def tabulate(
    sweep: SweepFile,
    rows: Sequence[Row],
    results: Sequence[TrialResult],
    *,
    out: Path,
    scale: Scale,
    presets: Mapping[str, Preset] | None = None,
    wheels: Path | None = None,
    n_samples: int = N_SAMPLES,
    n_swaps: int = N_SWAPS,
) -> SweepTable:
    """Make the table of a sweep, whichever of its trials are done.

    Args:
        sweep: The file, with the score columns that were scored.
        rows: Its rows, expanded, in the order of the table.
        results: What trials came to; of other rows or seeds they are left out.
        out: The sweep's folder, to which predictions are relative.
        scale: At which presets were trained.
        presets: Row -> its resolved preset, for the tokens of its prefix and its place in the plot.
        wheels: Folder of the emotion wheels; None: that of the environment.
        n_samples: Bootstrap samples.
        n_swaps: Swaps of the permutation tests.
    """
    found = {(one.row, one.seed): one for one in results}
    lines: list[TableRow] = []
    replies: dict[str, Replies] = {}
    for row in rows:
        own = {seed: found[row.name, seed] for seed in row.seeds if (row.name, seed) in found}
        remarks: list[str] = []
        replies[row.name] = {
            column.name: _replies(own, column, out, wheels, remarks) for column in sweep.scores
        }
        line = _line(row, own, (presets or {}).get(row.name), sweep)
        scores = {
            column.name: score
            for column in sweep.scores
            if (score := _score(own, column, replies[row.name][column.name], n_samples, remarks))
        }
        lines.append(
            line.model_copy(update={"scores": scores, "remarks": (*dict.fromkeys(remarks),)})
        )
    of_baseline = next((line for line in lines if line.name == sweep.baseline), None)
    tested = [
        _tested(line, of_baseline, sweep, replies, lambda column, base, row, names, n_asked: change(
            column, base, row, names, n=n_samples, n_swaps=n_swaps, n_asked=n_asked
        ))
        for line in lines
    ]  # fmt: skip
    corrected = _corrected(tested)
    return SweepTable(
        name=sweep.name,
        title=sweep.title,
        source=sweep.source,
        about=sweep.about,
        scale=scale,
        columns=sweep.columns,
        scores=sweep.scores,
        baseline=sweep.baseline,
        plot=sweep.plot,
        rows=corrected,
        n_samples=n_samples,
        n_swaps=n_swaps,
        n_tests=sum(len(line.changes) for line in corrected),
        notes=_notes(sweep, corrected),
    )


def setting(preset: Preset, path: str) -> Any:
    """Return the value at a dotted path of a preset, as JSON; None if it leads nowhere."""
    value: Any = preset.model_dump(mode="json")
    for part in path.split("."):
        if isinstance(value, list):
            at = int(part) if part.isdigit() else len(value)
            value = value[at] if at < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _line(
    row: Row, own: Mapping[int, TrialResult], preset: Preset | None, sweep: SweepFile
) -> TableRow:
    """Return a row without its scores."""
    axis = sweep.plot
    known = sorted(own.values(), key=lambda one: one.status != "ok")
    return TableRow(
        name=row.name,
        cells=row.cells or (row.name,),
        group=row.group,
        note=row.note,
        stage=row.stage,
        settings=json.loads(json.dumps(row.settings)),
        seeds=row.seeds,
        published=row.published,
        n_trainable=next((one.n_trainable for one in known if one.n_trainable is not None), None),
        prefix={} if preset is None else dict(preset.layout().blocks),
        spec_ids=known[0].spec_ids if known else {},
        run_keys={str(seed): one.run_key for seed, one in own.items()},
        n_done=sum(
            one.status == "ok" and all(column.name in one.scores for column in sweep.scores)
            for one in own.values()
        ),
        failures=tuple(
            Failure(
                seed=seed,
                step=one.failed_step or "unknown",
                reason=one.reason or "no reason was written",
                log=f"trials/{row.name}@{seed}/log.txt",
            )
            for seed, one in own.items()
            if one.status == "failed"
        ),
        at=None if axis is None or preset is None else setting(preset, axis.key),
        line=None
        if axis is None or axis.by is None or preset is None
        else setting(preset, axis.by),
    )


def _replies(
    own: Mapping[int, TrialResult],
    column: ScoreColumn,
    out: Path,
    wheels: Path | None,
    remarks: list[str],
) -> dict[int, Sides]:
    """Return what each scored seed replied, if its replies give the score that its result states."""
    found: dict[int, Sides] = {}
    for seed, one in own.items():
        stated = one.scores.get(column.name)
        if stated is None:
            continue
        if column.name not in one.predictions:
            remarks.append(f"{column.heading}: its replies were not kept")
            continue
        try:
            sides = read_sides(out / one.predictions[column.name], column, wheels=wheels)
            given = score_of(sides)
        # The score stands without its replies; what needs them is missing, and said.
        except EmocacheError as error:
            remarks.append(f"{column.heading}: its replies cannot be read: {error}")
            continue
        if abs(given - stated) < EPSILON:
            found[seed] = sides
        else:
            remarks.append(
                f"{column.heading}: its replies now give {100 * given:.2f}, its result says "
                f"{100 * stated:.2f}; neither interval nor test"
            )
    return found


def _score(
    own: Mapping[int, TrialResult],
    column: ScoreColumn,
    replies: Mapping[int, Sides],
    n_samples: int,
    remarks: list[str],
) -> RowScore | None:
    """Return a score over seeds; None if no seed has it."""
    values = {
        seed: one.scores[column.name] for seed, one in own.items() if column.name in one.scores
    }
    if not values:
        return None
    span: Span | None = None
    if len(values) > 1:
        span = span_over_seeds([*values.values()])
        if span is None:
            remarks.append(f"{column.heading}: no interval, all seeds have one score")
    elif replies:
        span = span_over_clips(next(iter(replies.values())), n=n_samples)
        if span is None:
            remarks.append(
                f"{column.heading}: no interval, no sample of its clips has another score"
            )
    return RowScore(
        mean=math.fsum(values.values()) / len(values),
        by_seed={str(seed): value for seed, value in values.items()},
        span=span,
        n_items=n_scored(next(iter(replies.values()))) if replies else None,
    )


def _tested(
    line: TableRow,
    of_baseline: TableRow | None,
    sweep: SweepFile,
    replies: Mapping[str, Replies],
    compared: Callable[
        [ScoreColumn, Mapping[int, Sides], Mapping[int, Sides], tuple[str, str], int], Change
    ],
) -> TableRow:
    """Return a row with its tests against the baseline, not yet corrected."""
    if of_baseline is None or of_baseline is line:
        return line
    base = of_baseline.name
    n_asked = max(len(of_baseline.seeds), len(line.seeds))
    changes: dict[str, Change] = {}
    remarks = [*line.remarks]
    for column in sweep.scores:
        first, second = replies[base][column.name], replies[line.name][column.name]
        if not first or not second:
            continue
        try:
            found = compared(column, first, second, (base, line.name), n_asked)
        except EmocacheError as error:
            remarks.append(f"{column.heading}: not tested: {error}")
            continue
        changes[column.name] = found
        if found.n_seeds == 1 < n_asked:
            remarks.append(
                f"{column.heading}: not marked: of several seeds, row and {base} have only one in common "
                "that is done"
            )
        elif found.n_seeds > 1 and found.span.over == "clips":
            remarks.append(
                f"{column.heading}: the change is the same in all {found.n_seeds} seeds, so that its "
                "interval is over clips"
            )
        common = sorted(first.keys() & second.keys())
        counts = [min(n_scored(sides[seed]) for seed in common) for sides in (second, first)]
        most = max(n_scored(sides[seed]) for seed in common for sides in (second, first))
        if {*counts, most} != {found.n_items}:
            remarks.append(
                f"{column.heading}: scored on {counts[0]:,} clips and {base} on {counts[1]:,}; the change "
                f"is on the {found.n_items:,} that "
                + ("both have" if found.n_seeds == 1 else "all compared seeds have")
            )
    return line.model_copy(update={"changes": changes, "remarks": tuple(remarks)})


def _corrected(lines: Sequence[TableRow]) -> tuple[TableRow, ...]:
    """Return rows with p values corrected for the number of all tests."""
    p_values = iter(holm([one.p_value for line in lines for one in line.changes.values()]))
    return tuple(
        line.model_copy(
            update={
                "changes": {
                    name: one.model_copy(update={"p_holm": next(p_values)})
                    for name, one in line.changes.items()
                }
            }
        )
        for line in lines
    )


def _notes(sweep: SweepFile, lines: Sequence[TableRow]) -> tuple[str, ...]:
    """Return what a reader must know before the numbers."""
    notes = []
    failed = [line.name for line in lines if line.failures]
    n_open = sum(line.n_open for line in lines)
    if failed:
        notes.append(
            f"{len(failed)} of {len(lines)} rows have failed trials: {', '.join(failed)}. The reasons are "
            "below the table; --retry-failed tries them again."
        )
    if n_open:
        n_all = sum(len(line.seeds) for line in lines)
        notes.append(f"{n_open} of {n_all} trials are not done yet.")
    base = next((line for line in lines if line.name == sweep.baseline), None)
    if base is not None and not base.scores:
        notes.append(f"The baseline {base.name} has no score, so no row is tested against it.")
    elif base is not None:
        notes += [
            f"The baseline {base.name} has no score under {column.heading}, so no row is tested on it."
            for column in sweep.scores
            if column.name not in base.scores
        ]
    if any(
        1 < len(line.seeds) != len(score.by_seed)
        for line in lines
        for score in line.scores.values()
    ):
        notes.append(
            "Means of rows with failed or open seeds are over fewer seeds than those of others."
        )
    some = [one for line in lines for one in line.changes.values()]
    if any(one.p_holm < ALPHA and one.span.over == "seeds" and not one.is_clear for one in some):
        notes.append(
            "Where the test on clips finds a difference and the interval over seeds does not, the row is "
            "not marked."
        )
    return tuple(notes)
