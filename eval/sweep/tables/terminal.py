"""The table of a sweep on a terminal: as many columns as fit, failures and what the numbers mean below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from eval.formats import p_value
from eval.sweep.tables.table import SweepTable, TableRow
from eval.sweep.tables.texts import (
    CLEAR,
    change_text,
    count_text,
    demo_warning,
    method,
    published_change_text,
    published_text,
    ranks,
    remarks,
    score_text,
    seeds_text,
    span_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_GAP: Final = 2
_MIN_CELL: Final = 18
_MAX_CELL: Final = 40


class _Column(NamedTuple):
    """A column."""

    heading: str
    texts: tuple[str, ...]
    """One per row."""
    rank: int = 0
    """Columns of the highest rank are left out first where the terminal is narrow; 0 stays."""
    block: str = ""
    """Heading above it and those of the same block beside it."""
    is_left: bool = False
    bold: frozenset[int] = frozenset()
    """Numbers of rows."""


def terminal_table(table: SweepTable, width: int = 100) -> RenderableType:
    """Return the table for a terminal.

    Columns that do not fit are left out, the least telling first: prefix, parameters, seeds, p, the
    paper's change, intervals, the paper's figure. The files have them all.

    Args:
        table: What to show.
        width: Of the terminal, in characters.
    """
    from rich.console import Group
    from rich.text import Text

    columns = _fitting(_columns(table), width)
    widths = _widths(columns, width)
    lines = [Text(table.title, style="bold")]
    if table.source:
        lines.append(Text(table.source, style="dim"))
    lines.append(Text())
    if len(table.scores) > 1:
        lines.append(_block_line(columns, widths))
    lines.append(_line([column.heading for column in columns], columns, widths, "bold"))
    lines.append(Text("─" * _total(widths), style="dim"))
    group: str | None = None
    for number, row in enumerate(table.rows):
        if row.group != group and row.group is not None:
            lines.append(Text(row.group, style="italic"))
        group = row.group
        cells = [column.texts[number] for column in columns]
        lines.append(
            _line(cells, columns, widths, "red" if row.failures and not row.scores else "", number)
        )
    lines.append(Text())
    for row in table.rows:
        lines += [
            Text(f"{row.name}, seed {one.seed}: {one.step} failed: {one.reason} ({one.log})", "red")
            for one in row.failures
        ]
    lines += [Text(remark, "yellow") for remark in (*remarks(table), *table.notes)]
    if (warning := demo_warning(table)) is not None:
        lines.append(Text(warning, "yellow"))
    lines.append(Text(" ".join(method(table)), "dim"))
    return Group(*lines)


def _columns(table: SweepTable) -> list[_Column]:
    rows, best = table.rows, ranks(table)
    found = [
        _Column(heading, tuple(_cell(row, at) for row in rows), is_left=True)
        for at, heading in enumerate(table.columns)
    ]
    many = len(table.scores) > 1
    for column in table.scores:
        name, block = column.name, column.heading
        scores = [row.scores.get(name) for row in rows]
        changes = [row.changes.get(name) for row in rows]
        found += [
            _Column(
                "score" if many else block,
                tuple(score_text(row, name) for row in rows),
                block=block,
                bold=frozenset(i for i, row in enumerate(rows) if best.get((row.name, name)) == 1),
            ),
            _Column(
                f"{100 * table.level:g} %",
                tuple("" if one is None else span_text(one.span) for one in scores),
                3,
                block,
            ),
            _Column("change", tuple(_change(table, row, name) for row in rows), 1, block),
            _Column(
                "p",
                tuple("" if c is None else p_value(c.p_holm).replace(" ", "") for c in changes),
                5,
                block,
            ),
            _Column("paper", tuple(published_text(row, name) for row in rows), 2, block),
            _Column(
                "its change",
                tuple(published_change_text(table, row, name) for row in rows),
                4,
                block,
            ),
        ]
    if any(len(row.seeds) > 1 for row in rows):
        found.append(_Column("seeds", tuple(seeds_text(row) for row in rows), 6))
    found += [
        _Column("trained", tuple(count_text(row.n_trainable) for row in rows), 7),
        _Column("prefix", tuple(str(row.n_prefix or "") for row in rows), 8),
    ]
    return [column for column in found if column.rank == 0 or any(map(str.strip, column.texts))]


def _cell(row: TableRow, at: int) -> str:
    return row.cells[at] if at < len(row.cells) else ""


def _change(table: SweepTable, row: TableRow, name: str) -> str:
    """Return a change with its mark, or a blank in the mark's place."""
    if row.name == table.baseline:
        return "baseline "
    found = row.changes.get(name)
    return change_text(table, row, name) + (CLEAR if found is not None and found.is_clear else " ")


def _fitting(columns: Sequence[_Column], width: int) -> list[_Column]:
    """Leave out columns until the rest fits; those of one rank together."""
    kept = list(columns)
    while (last := max(column.rank for column in kept)) > 0 and _least(kept) > width:
        kept = [column for column in kept if column.rank < last]
    return kept


def _least(columns: Sequence[_Column]) -> int:
    """Return the width that columns need if long cells are cut."""
    return _total([min(_natural(c), _MIN_CELL) if c.is_left else _natural(c) for c in columns])


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _GAP * (len(widths) - 1)


def _natural(column: _Column) -> int:
    from rich.cells import cell_len

    return max(cell_len(text) for text in (column.heading, *column.texts))


def _widths(columns: Sequence[_Column], width: int) -> list[int]:
    """Return the widths of columns: cells get what the numbers leave."""
    found = [min(_natural(c), _MAX_CELL) if c.is_left else _natural(c) for c in columns]
    over = _total(found) - width
    cells = [at for at, column in enumerate(columns) if column.is_left]
    while over > 0 and (wide := [at for at in cells if found[at] > _MIN_CELL]):
        found[max(wide, key=lambda at: found[at])] -= 1
        over -= 1
    return found


def _line(
    cells: Sequence[str],
    columns: Sequence[_Column],
    widths: Sequence[int],
    style: str = "",
    number: int = -1,
) -> Text:
    from rich.text import Text

    line = Text(style=style, no_wrap=True, overflow="ellipsis")
    for at, (cell, column, width) in enumerate(zip(cells, columns, widths, strict=True)):
        text = Text(" ".join(cell.split()) if column.is_left else cell)
        text.truncate(width, overflow="ellipsis")
        text.align("left" if column.is_left else "right", width)
        if number in column.bold:
            text.stylize("bold")
        line.append_text(text)
        if at < len(cells) - 1:
            line.append(" " * _GAP)
    return line


def _block_line(columns: Sequence[_Column], widths: Sequence[int]) -> Text:
    """Return the headings of the score columns, each over its block."""
    from rich.text import Text

    line = Text(style="bold", no_wrap=True, overflow="ellipsis")
    at = 0
    while at < len(columns):
        block = columns[at].block
        end = at + 1
        while end < len(columns) and columns[end].block == block:
            end += 1
        text = Text(block)
        width = _total(widths[at:end])
        text.truncate(width, overflow="ellipsis")
        text.align("center", width)
        line.append_text(text)
        if end < len(columns):
            line.append(" " * _GAP)
        at = end
    return line
