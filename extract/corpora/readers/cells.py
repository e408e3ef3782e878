"""Tables whose cells hold more than one thing: lists, numbers without their zeros, ids that tell.

::

    ['Monica Geller', 'Phoebe Buffay']    -> Monica Geller;Phoebe Buffay     option lists
    22                                    -> 00022                           option pad
    dia_622_utt_8_ch                      -> dialogue dia_622, tongue ch     option parts
    ch                                    -> zh                              option values
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from cache.errors import ManifestError, near_miss
from extract.corpora.reading import check_options, relative
from extract.corpora.tables import OPTIONS, read_table
from extract.corpora.values import Row

MAX_LIST_CHARS = 10_000
"""Longer cells are no lists: a literal is parsed, and nesting costs stack."""
MAX_ID_CHARS = 300
"""Longer ids are not taken apart: an expression may take forever on them."""
_OWN = ("lists", "pad", "parts", "values")
_PLAIN = re.compile(r"\s*[,;，；、]\s*")  # noqa: RUF001  full-width punctuation of Chinese releases


def read_cells(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read a table, and take some of its cells apart.

    Args:
        file: Any that the reader `table` takes.
        folder: The dataset's folder.
        options: Those of `table`, and in this order: `lists`: columns with lists, as Python or JSON
            literals or plain words, which become texts joined by `;`, and are never evaluated; `pad`:
            column -> digits, for numbers that lost their leading zeros in a spreadsheet; `parts`:
            column -> regular expression, whose named groups become columns, empty where the cell does
            not match; `values`: column -> value as written -> what it means.

    Raises:
        ManifestError: A column that is not there, a cell that is no list of texts, or an option that
            cannot be.
    """
    name = relative(file, folder)
    check_options(options, (*OPTIONS, *_OWN), name, "cells")
    lists = options.get("lists", ())
    lists = (lists,) if isinstance(lists, str) else tuple(lists)
    pads = {c: _digits(n, name) for c, n in _mapping(options, "pad", name).items()}
    parts = {c: _compiled(e, name) for c, e in _mapping(options, "parts", name).items()}
    values = _mapping(options, "values", name)
    rest = {key: value for key, value in options.items() if key not in _OWN}
    for where, row in read_table(file, folder, rest):
        for column in lists:
            text = _cell(row, column, where)
            row[column] = ";".join(listed(text, f"{where}, column {column!r}"))
        for column, digits in pads.items():
            text = _cell(row, column, where)
            if text.isdecimal():
                row[column] = text.zfill(digits)
        for column, expression in parts.items():
            text = _cell(row, column, where)
            found = expression.fullmatch(text) if len(text) <= MAX_ID_CHARS else None
            for part in expression.groupindex:
                row[part] = (found[part] or "") if found else ""
        for column, meanings in values.items():
            text = _cell(row, column, where)
            row[column] = str(meanings.get(text, text))
        yield where, row


def listed(text: str, where: str) -> tuple[str, ...]:
    """Return the texts of a list as it stands in a cell.

    Raises:
        ManifestError: It is too long, or a literal of something else than texts.
    """
    if len(text) > MAX_LIST_CHARS:
        raise ManifestError(
            f"{where}: {len(text)} characters; a list of names or labels has at most {MAX_LIST_CHARS}. "
            "The columns of the file may be shifted."
        )
    text = text.strip()
    if not (text.startswith(("[", "(")) and text.endswith(("]", ")"))):
        return _words(text)
    inner = text[1:-1].strip()
    if not inner.startswith(("'", '"')):
        return _words(inner)
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ManifestError(
            f"{where}: {text[:80]!r} is not a list of texts such as ['a', 'b']. Correct the cell."
        ) from None
    if isinstance(found, str):  # ('a') is no tuple
        found = [found]
    if not all(isinstance(item, str) for item in found):
        raise ManifestError(
            f"{where}: {text[:80]!r} holds more than texts. A list such as ['a', 'b'] is expected; "
            "correct the cell."
        )
    return tuple(item.strip() for item in found if item.strip())


def _words(text: str) -> tuple[str, ...]:
    return tuple(w for w in (part.strip("'\" ") for part in _PLAIN.split(text)) if w)


def _mapping(options: Mapping[str, Any], option: str, name: str) -> Mapping[str, Any]:
    found = options.get(option, {})
    if not isinstance(found, Mapping):
        raise ManifestError(
            f"{name}: option {option}: a {type(found).__name__}, not a mapping of columns."
        )
    return found


def _digits(value: Any, name: str) -> int:
    text = str(value)
    if not text.isdecimal() or not 0 < int(text) <= 20:
        raise ManifestError(
            f"{name}: option pad: {value!r} is not a number of digits from 1 to 20."
        )
    return int(text)


@lru_cache(maxsize=64)
def _compiled(expression: str, name: str) -> re.Pattern[str]:
    try:
        found = re.compile(str(expression))
    except re.error as error:
        raise ManifestError(
            f"{name}: option parts: {expression!r} is not a regular expression ({error})."
        ) from None
    if not found.groupindex:
        raise ManifestError(
            f"{name}: option parts: {expression!r} has no named group; write (?P<column>...)."
        )
    return found


def _cell(row: Mapping[str, str], column: str, where: str) -> str:
    if column not in row:
        raise ManifestError(
            f"{where}: no column {column!r} to take apart.{near_miss(column, row)} Found: "
            f"{', '.join(row)}."
        )
    return row[column]
