"""The table of a sweep in words and numbers: for papers, for spreadsheets, and for the other layouts.

Scores are fractions up to here; percent is made in this file and by the filters of the page.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Final

from eval.formats import percent, points, signed_points
from eval.results.latex import HEAD, escape_latex
from eval.results.tables import span as plain_span
from eval.scoring.intervals import Interval
from eval.sweep.tables.table import ALPHA, Change, Span, SweepTable, TableRow

FAILED: Final = "failed"
OPEN: Final = "open"
_FIXED: Final = (
    "row", "group", "stage", "score", "status", "n_seeds", "mean", "low", "high", "interval_over",
    "by_seed", "n_items", "change", "change_low", "change_high", "p", "p_holm", "n_better", "n_worse",
    "published_percent", "n_trainable", "n_prefix", "reason",
)  # fmt: skip
"""Headings of the CSV; those of the cells come behind the first."""
CLEAR: Final = "*"
"""Mark of a change beyond chance."""


_WORDS: Final = {
    "accuracy": "accuracy",
    "weighted_f1": "weighted F1",
    "macro_f1": "macro F1",
    "uar": "mean recall of classes (UAR)",
}


def ranks(table: SweepTable) -> dict[tuple[str, str], int]:
    """Return (row, score column) -> 1 for the best and 2 for the second best as printed."""
    found: dict[tuple[str, str], int] = {}
    for column in table.scores:
        printed = {
            row.name: percent(row.scores[column.name].mean)
            for row in table.rows
            if column.name in row.scores
        }
        best = sorted({float(text) for text in printed.values()}, reverse=True)[:2]
        for name, text in printed.items():
            if len(printed) > 1 and float(text) in best:
                found[name, column.name] = best.index(float(text)) + 1
    return found


def score_text(row: TableRow, column: str) -> str:
    """Return a score in percent, or in a word why there is none."""
    if column in row.scores:
        return percent(row.scores[column].mean)
    return FAILED if row.failures else OPEN


def span_text(span: Span | None) -> str:
    """Return an interval in percent: `75.1\N{EN DASH}79.6`."""
    return plain_span(
        None if span is None else Interval(low=span.low, high=span.high, level=0.95, n=0)
    )


def change_text(table: SweepTable, row: TableRow, column: str) -> str:
    """Return how far a row is from the baseline, in points of percent."""
    found, base = row.changes.get(column), table.of_baseline
    if found is None or base is None:
        return ""
    means = row.scores[column].mean, base.scores[column].mean
    if abs(means[0] - means[1] - found.difference) < 1e-9:
        return points(*means)  # so that a reader who subtracts finds no contradiction
    return signed_points(found.difference)  # of common seeds and clips


def change_span(found: Change) -> str:
    """Return the interval of a change in points of percent."""
    return f"{signed_points(found.span.low)} to {signed_points(found.span.high)}"


def published_text(row: TableRow, column: str) -> str:
    """Return the paper's figure as printed there."""
    return f"{row.published[column]:.2f}" if column in row.published else ""


def published_change_text(table: SweepTable, row: TableRow, column: str) -> str:
    """Return how far the paper's figure is from its baseline's."""
    found = table.published_change(row, column)
    return "" if found is None else signed_points(found / 100)


def count_text(n: int | None) -> str:
    """Return a large number in three digits or so: `71.5M`."""
    if n is None:
        return ""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if n >= size:
            return f"{n / size:.1f}{unit}"
    return str(n)


def seeds_text(row: TableRow) -> str:
    """Return how many seeds are done."""
    n = len(row.seeds)
    return str(n) if row.n_done == n else f"{row.n_done} of {n}"


def method(table: SweepTable) -> tuple[str, ...]:
    """Say how the numbers came about, a sentence or two per entry."""
    kinds = {score.span.over for row in table.rows for score in row.scores.values() if score.span}
    said = []
    metrics = ", ".join(
        f"{column.heading}: {_WORDS[column.metric]} of the task {column.task!r} on split {column.split!r}"
        + (", the last word of a reply as its label" if column.reading == "last-word" else "")
        if column.kind == "split"
        else f"{column.heading}: mean over {len(column.sets)} sets of MMEVerse-Bench"
        for column in table.scores
    )
    said.append(f"Scores in percent. {metrics}.")
    if "seeds" in kinds:
        said.append(
            f"Of rows with several seeds the score is the mean and the {100 * table.level:g} % interval is "
            "Student's over the trainings: it tells what another seed would give."
        )
    if "clips" in kinds:
        said.append(
            f"Of rows with one seed the {100 * table.level:g} % interval is a bootstrap over clips "
            f"({table.n_samples:,} samples): another seed would differ, too."
        )
    if table.n_tests:
        several = any(len(row.seeds) > 1 for row in table.rows)
        said.append(
            f"Change: against {table.baseline}, on the same seeds and clips. p: paired permutation test "
            f"on clips ({table.n_swaps:,} swaps{', each of a clip in all seeds together' * several}), "
            f"corrected for {table.n_tests} test{'s' * (table.n_tests > 1)} by Holm's method; {CLEAR} below "
            f"{ALPHA}"
            + (
                " and, where several seeds are asked for, an interval over two or more of them without 0; a "
                "change that is the same in all seeds has none, and the test alone decides."
                if several
                else "."
            )
        )
    return tuple(said)


def demo_warning(table: SweepTable) -> str | None:
    """Say what numbers at demo scale mean; None at full scale."""
    if table.scale != "demo":
        return None
    published = any(row.published for row in table.rows)
    return (
        "Demo scale: every network is tiny, encoders without bundled weights are random, and scores are of "
        "generated clips, whatever their columns are called. They show that the sweep works, and say nothing "
        "about emotions."
        + (
            " Published figures are of the full-size models and do not compare."
            if published
            else ""
        )
    )


def remarks(table: SweepTable) -> tuple[str, ...]:
    """Return why intervals and tests are missing; rows with one reason share a line."""
    found: dict[str, list[str]] = {}
    for row in table.rows:
        for remark in row.remarks:
            found.setdefault(remark, []).append(row.name)
    return tuple(f"{', '.join(names)}: {remark}" for remark, names in found.items())


def latex(table: SweepTable) -> str:
    r"""Return the table as LaTeX source ready for `\input`: one `tabular`, notes as comments."""
    best = ranks(table)
    blocks = [(column, _latex_parts(table, column.name)) for column in table.scores]
    n_cells, n_numbers = len(table.columns), sum(len(parts) for _, parts in blocks)
    lines = [f"% {_comment(table.title)}"]
    if (warning := demo_warning(table)) is not None:
        lines.append(f"% {_comment(warning)}")
    lines += [rf"\begin{{tabular}}{{{'l' * n_cells}{'r' * n_numbers}}}", r"\toprule"]
    if len(blocks) > 1:
        lines.append(
            _tex_line([""] * n_cells + [_spanned(c.heading, parts) for c, parts in blocks])
        )
        lines.append(_rules(n_cells, [len(parts) for _, parts in blocks]))
    headings = [
        "Score"
        if len(blocks) > 1 and part == "score"
        else column.heading
        if part == "score"
        else part
        for column, parts in blocks
        for part in parts
    ]
    lines.append(_tex_line(map(escape_latex, [*table.columns, *headings])))
    group: str | None = None
    lines.append(r"\midrule")
    for number, row in enumerate(table.rows):
        if row.group != group:
            lines += [r"\midrule"] if number else []
            if row.group is not None:
                title = rf"\textit{{{escape_latex(row.group)}}}"
                lines.append(rf"\multicolumn{{{n_cells + n_numbers}}}{{l}}{{{title}}} \\")
        group = row.group
        cells = [escape_latex(cell) for cell in row.cells] + [""] * (n_cells - len(row.cells))
        for column, parts in blocks:
            rank = best.get((row.name, column.name), 0)
            cells += [_tex_cell(table, row, column.name, part, rank) for part in parts]
        lines.append(_tex_line(cells))
    lines += [r"\bottomrule", r"\end{tabular}"]
    for row in table.rows:
        lines += [f"% {row.name}, seed {x.seed}: {_comment(x.reason)}" for x in row.failures]
    lines += [f"% {_comment(note)}" for note in (*table.notes, *method(table))]
    return HEAD + "\n" + "\n".join(lines) + "\n"


def _latex_parts(table: SweepTable, column: str) -> list[str]:
    """Return the headings of a score's columns: score, change, published."""
    parts = ["score"]
    if any(column in row.changes for row in table.rows):
        parts.append("Change")
    if table.has_published(column):
        parts.append("Published")
    return parts


def _tex_cell(table: SweepTable, row: TableRow, column: str, part: str, rank: int) -> str:
    if part == "Change":
        found = row.changes.get(column)
        mark = CLEAR if found is not None and found.is_clear else ""
        return escape_latex(change_text(table, row, column)) + (f"$^{mark}$" if mark else "")
    if part == "Published":
        return published_text(row, column)
    text = escape_latex(score_text(row, column))
    text = rf"\best{{{text}}}" if rank == 1 else rf"\second{{{text}}}" if rank == 2 else text
    if column in row.scores and (span := row.scores[column].span) is not None:
        text += rf" {{\scriptsize ({escape_latex(span_text(span))})}}"
    return text


def _spanned(heading: str, parts: Sequence[str]) -> str:
    return rf"\multicolumn{{{len(parts)}}}{{c}}{{{escape_latex(heading)}}}"


def _rules(n_cells: int, sizes: Sequence[int]) -> str:
    """Return a rule under the heading of each block."""
    found, start = [], n_cells + 1
    for size in sizes:
        found.append(rf"\cmidrule(lr){{{start}-{start + size - 1}}}")
        start += size
    return " ".join(found)


def _tex_line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _comment(text: str) -> str:
    return " ".join(text.split())


def csv_text(table: SweepTable) -> str:
    """Return a line per row and score: fractions, published figures as printed, empty where unknown."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    shown = _cell_headings(table)
    writer.writerow([_FIXED[0], *shown.values(), *_FIXED[1:]])
    for row in table.rows:
        cells = [row.cells[at] if at < len(row.cells) else "" for at in shown]
        for column in table.scores:
            writer.writerow(
                [row.name, *cells, row.group, row.stage, column.name, *_numbers(row, column.name)]
            )
    return text.getvalue()


def _cell_headings(table: SweepTable) -> dict[int, str]:
    """Return which cells have columns of their own, under headings that nothing else has."""
    taken, found = set(_FIXED), {}
    for at, heading in enumerate(table.columns):
        name = _slug(heading)
        if name == _FIXED[0] and all(row.cells[at : at + 1] == (row.name,) for row in table.rows):
            continue  # it would say the row's name twice
        if not name or name in taken:
            name = f"cell:{name}"
        number, free = 1, name
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        taken.add(free)
        found[at] = free
    return found


def _slug(heading: str) -> str:
    return "_".join(heading.lower().split())


def _numbers(row: TableRow, column: str) -> list[object]:
    score, found = row.scores.get(column), row.changes.get(column)
    n_scored, failures = row.n_scored(column), row.failures_of(column)
    status = "ok" if n_scored == len(row.seeds) else FAILED if failures else OPEN
    values: list[object] = [status, n_scored]
    if score is None:
        values += [None] * 6
    else:
        span = score.span
        seeds = " ".join(f"{seed}={value!r}" for seed, value in score.by_seed.items())
        ends = [None] * 3 if span is None else [span.low, span.high, span.over]
        values += [score.mean, *ends, seeds, score.n_items]
    if found is None:
        values += [None] * 7
    else:
        values += [found.difference, found.span.low, found.span.high, found.p_value, found.p_holm]
        values += [found.n_better, found.n_worse]
    reason = "; ".join(f"seed {x.seed}, {x.step}: {x.reason}" for x in failures) or None
    return [*values, row.published.get(column), row.n_trainable, row.n_prefix, reason]
