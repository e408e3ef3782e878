r"""Tables of a report as LaTeX, ready for `\input`: booktabs rules, best bold, second best on grey."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from eval.results.tables import OTHER_COUNT, Cell, Row, Table

_SPECIAL: Final = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_"},
}
_SIGNS: Final = {
    "\N{EN DASH}": "--",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    OTHER_COUNT: r"\textdagger{}",
}
HEAD: Final = r"""% Needs booktabs, and xcolor with the option table.
\providecommand{\best}[1]{\textbf{#1}}
\providecommand{\second}[1]{\cellcolor{gray!25}#1}
"""


def latex(tables: Sequence[Table]) -> str:
    """Return tables as LaTeX source: one `tabular` each, with notes as comments."""
    return HEAD + "".join(f"\n{_tabular(table)}" for table in tables)


def escape_latex(text: str) -> str:
    r"""Escape a text for LaTeX, on one line and without control characters.

    A cell behind `\\` or a rule would be taken as its argument if it began with `[` or `*`.
    """
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    text = "".join(_SPECIAL.get(c) or _SIGNS.get(c) or c for c in text.strip())
    return f"{{{text[0]}}}{text[1:]}" if text.startswith(("[", "*")) else text


def _tabular(table: Table) -> str:
    n = len(table.columns)
    lines = [
        f"% {_comment(table.caption)}",
        rf"\begin{{tabular}}{{l{'r' * n}}}",
        r"\toprule",
        _line(["Model", *map(escape_latex, table.columns)]),
    ]
    for title, rows in table.groups:
        lines.append(r"\midrule")
        if title:
            lines.append(rf"\multicolumn{{{n + 1}}}{{l}}{{\textit{{{escape_latex(title)}}}}} \\")
        for row in rows:
            lines.extend(_lines(row))
    if table.foot:
        lines.append(r"\midrule")
        lines.extend(_small(name, texts) for name, texts in table.foot)
    lines.extend((r"\bottomrule", r"\end{tabular}"))
    lines.extend(f"% {_comment(note)}" for note in table.notes)
    return "\n".join(lines) + "\n"


def _lines(row: Row) -> list[str]:
    lines = [_line([escape_latex(row.model), *map(_cell, row.cells)])]
    lines.extend(_small(name, texts) for name, texts in row.below)
    return lines


def _cell(cell: Cell) -> str:
    text = escape_latex(cell.text)
    text = (
        rf"\best{{{text}}}" if cell.rank == 1 else rf"\second{{{text}}}" if cell.rank == 2 else text
    )
    return f"{text}{escape_latex(cell.mark)}"


def _small(name: str, texts: Sequence[str]) -> str:
    return _line(
        [rf"{{\scriptsize {escape_latex(text)}}}" if text else "" for text in (name, *texts)]
    )


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _comment(text: str) -> str:
    return re.sub(r"\s+", " ", text)
