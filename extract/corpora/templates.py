"""Templates: text with `{Column}` in it, compiled once to functions of a row."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache

from cache.errors import ManifestError, near_miss
from extract.corpora.row import Template

Render = Callable[[Mapping[str, str]], str]
"""A row to text; empty if a column is."""

_PIECES = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]|[^{}]+")


@lru_cache(maxsize=1024)
def parse(template: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split a template into texts and columns: there is one text more than there are columns.

    Raises:
        ManifestError: A brace without its partner, or a column without a name.
    """
    texts, columns = [""], []
    for piece in _PIECES.findall(template):
        if piece in ("{{", "}}"):
            texts[-1] += piece[0]
        elif piece in ("{", "}"):
            raise ManifestError(
                f"template {template!r}: a single {piece!r}. Write {{Column}} for a column, {{{{ and }}}} "
                "for braces."
            )
        elif piece.startswith("{"):
            name = piece[1:-1].strip()
            if not name:
                raise ManifestError(f"template {template!r}: a column without a name: {{}}.")
            columns.append(name)
            texts.append("")
        else:
            texts[-1] += piece
    return tuple(texts), tuple(columns)


def columns_of(template: Template) -> tuple[str, ...]:
    """Return the columns that a template names, each once; see `parse` for the errors."""
    given = (template,) if isinstance(template, str) else template
    return tuple(dict.fromkeys(c for one in given for c in parse(one)[1]))


def compile_template(template: Template, columns: Collection[str], what: str) -> Render:
    """Make a function of a template.

    Args:
        template: One, or several of which the first that is not empty counts.
        columns: Columns of the file. Of several templates, those that name others are left out.
        what: The field and the file, for the error.

    Raises:
        ManifestError: A column that the file does not have, with a near miss and those it has.
    """
    if isinstance(template, str):
        missing = [c for c in parse(template)[1] if c not in columns]
        if missing:
            raise ManifestError(unknown_column(missing[0], columns, what))
        return _render(template)
    fitting = [t for t in template if all(c in columns for c in parse(t)[1])]
    if not fitting:
        wanted = ", ".join(map(repr, columns_of(template)))
        raise ManifestError(
            f"{what}: none of the columns {wanted} is there. Found: {', '.join(columns) or 'none'}. "
            "Correct the mapping, or the file."
        )
    if len(fitting) == 1:
        return _render(fitting[0])
    renders = [_render(t) for t in fitting]

    def first(row: Mapping[str, str]) -> str:
        for render in renders:
            if text := render(row):
                return text
        return ""

    return first


def unknown_column(name: str, columns: Collection[str], what: str) -> str:
    """Say that a file has no such column, and what it has."""
    return (
        f"{what}: no column {name!r}.{near_miss(name, columns)} Found: {', '.join(columns) or 'none'}. "
        "Correct the mapping; a column that only some files have goes into the source's `may_lack`."
    )


def _render(template: str) -> Render:
    texts, columns = parse(template)
    if not columns:
        constant = texts[0]
        return lambda row: constant
    if len(columns) == 1:
        column = columns[0]
        if texts == ("", ""):
            return lambda row: row.get(column, "")
        before, after = texts

        def one(row: Mapping[str, str]) -> str:
            value = row.get(column, "")
            return f"{before}{value}{after}" if value else ""

        return one
    shape = "%s".join(text.replace("%", "%%") for text in texts)

    def several(row: Mapping[str, str]) -> str:
        values = tuple([row.get(column, "") for column in columns])
        return shape % values if all(values) else ""

    return several
