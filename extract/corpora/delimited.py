"""Delimited text as rows: delimiter and encoding are found, and what is wrong is told by its line."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cache.errors import ManifestError, near_miss
from extract.corpora.values import Row

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "pipe"}
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_GUESSES = ("gb18030", "big5", "shift_jis", "cp1252")
_SAMPLE_CHARS = 1 << 16


def read_delimited(file: Path, name: str, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of a CSV, TSV or text file.

    Args:
        file: The file.
        name: Of the file, for places.
        options: delimiter, encoding, quote, columns.

    Raises:
        ManifestError: Not text, not a table, or no rows.
    """
    encoding = encoding_of(file, name, options)
    try:
        with file.open(encoding=encoding, newline="") as text:
            yield from _delimited(text, name, options)
    except UnicodeError:
        raise not_text(file, name, encoding) from None
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read ({error.strerror})") from None


def _delimited(text: io.TextIOBase, name: str, options: Mapping[str, Any]) -> Iterator[Row]:
    sample = text.read(_SAMPLE_CHARS)
    if "\0" in sample:
        raise ManifestError(
            f"{name}: holds NUL characters, so it is damaged, not text, or UTF-16 without its mark. "
            "If it is UTF-16, give the option encoding: utf-16-le (or utf-16-be)."
        )
    text.seek(0)
    quote = str(options.get("quote", '"'))
    dialect: dict[str, Any] = {"strict": True, "quotechar": quote or None}
    if not quote:
        dialect["quoting"] = csv.QUOTE_NONE
    dialect["delimiter"] = _delimiter(sample, name, options, dialect)
    reader = csv.reader(text, **dialect)
    line = 1
    given = options.get("columns")
    try:
        names = _names(given, name, 0) if given else _header(reader, name)
        line = reader.line_num + 1
        n, n_rows = len(names), 0
        for values in reader:
            if len(values) != n:
                if not any(values):
                    line = reader.line_num + 1
                    continue
                raise _ragged(name, line, values, n, reader.line_num)
            yield f"{name}, line {line}", dict(zip(names, map(str.strip, values), strict=True))
            n_rows += 1
            line = reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(
            f"{name}, line {line}: not a well-formed table ({error}). A quote that is never closed, or a "
            'quote inside a text (to be written ""), does that; if quotes are plain characters here, '
            'give the option quote: "".'
        ) from None
    if not n_rows:
        raise ManifestError(
            f"{name}: no rows{'' if given else ' below the header'}. Give a complete file."
        )


def _header(reader: Iterator[list[str]], name: str) -> list[str]:
    for values in reader:
        if any(value.strip() for value in values):
            return _names(values, name, 1)
    raise ManifestError(f"{name}: the file is empty; no header and no rows. Give a complete file.")


def _names(values: Iterable[Any], name: str, line: int) -> list[str]:
    names = [str(v).strip() or f"column_{i}" for i, v in enumerate(values, 1)]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ManifestError(
            f"{name}{f', line {line}' if line else ''}: column {twice[0]!r} stands twice in the header "
            f"({', '.join(names)}). Rename one of them."
        )
    return names


def _ragged(name: str, line: int, values: list[str], n: int, end: int) -> ManifestError:
    what = "more" if len(values) > n else "fewer"
    span = f" (it ends in line {end})" if end > line else ""
    return ManifestError(
        f"{name}, line {line}{span}: {what} values than the header has columns ({len(values)} instead "
        f"of {n}). Quote texts that hold the delimiter, or give another one (option delimiter)."
    )


def _delimiter(
    sample: str, name: str, options: Mapping[str, Any], dialect: Mapping[str, Any]
) -> str:
    """Return the delimiter that the options give, or the one that splits the header into most columns."""
    columns = {d: _columns(sample, d, dialect) for d in _DELIMITERS}
    given = options.get("delimiter")
    if given is None:
        # A delimiter that also splits the rows below like the header is better than one that does not.
        best = max(columns, key=lambda d: (columns[d][0] > 1, columns[d][1], columns[d][0]))
        return best if columns[best][0] > 1 else ","
    words = {word: d for d, word in _DELIMITERS.items()} | {"\\t": "\t", "space": " "}
    delimiter = words.get(str(given), str(given))
    if len(delimiter) != 1:
        raise ManifestError(
            f"{name}: option delimiter: {given!r} is not one character. Allowed: one character, or "
            f"{', '.join(words)}."
        )
    if _columns(sample, delimiter, dialect)[0] == 1:
        other = max(columns, key=lambda d: columns[d][0])
        if columns[other][0] > 1:
            head = (sample.splitlines() or [""])[0]
            raise ManifestError(
                f"{name}: one column with the delimiter {given!r}, but its header holds another one: "
                f"{head[:80]!r}. Give the option delimiter: {_DELIMITERS[other]}, or none: it is found."
            )
    return delimiter


def _columns(sample: str, delimiter: str, dialect: Mapping[str, Any]) -> tuple[int, bool]:
    """Return how many columns a delimiter gives the first row, and whether the next ones have as many."""
    lines = io.StringIO(sample, newline="")
    rows: list[list[str]] = []
    try:
        reader = csv.reader(lines, **{**dialect, "delimiter": delimiter})
        rows = [row for row in itertools.islice(reader, 21) if row]
    except csv.Error:  # the sample may end inside a quote
        pass
    if not rows:
        return 1, False
    # The last one may be cut off.
    complete = rows[:-1] if len(rows) > 2 else rows
    return len(rows[0]), all(len(row) == len(rows[0]) for row in complete)


def encoding_of(file: Path, name: str, options: Mapping[str, Any]) -> str:
    """Return the encoding that the options give, or that the file's first bytes mark, or UTF-8.

    Raises:
        ManifestError: An encoding that Python does not know, or the file cannot be read.
    """
    if encoding := options.get("encoding"):
        try:
            "".encode(str(encoding))
        except LookupError:
            raise ManifestError(
                f"{name}: option encoding: {encoding!r} is no encoding that Python knows."
                f"{near_miss(str(encoding), ('utf-8', 'utf-16', *_GUESSES))} For example utf-8, utf-16, "
                f"{', '.join(_GUESSES)}."
            ) from None
        return str(encoding)
    try:
        with file.open("rb") as data:
            head = data.read(4)
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read ({error.strerror})") from None
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def not_text(file: Path, name: str, encoding: str) -> ManifestError:
    """Return the error of a file that does not decode: its line, and the encodings that fit."""
    data = file.read_bytes()
    line = 1
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"{error.reason}, byte {data[error.start : error.start + 1].hex()}"
    except UnicodeError as error:
        what = str(error)
    else:
        what = "cut off"
    fitting = [guess for guess in _GUESSES if guess != encoding and _decodes(data, guess)]
    cure = f"these fit: {', '.join(fitting)}" if fitting else f"for example {', '.join(_GUESSES)}"
    return ManifestError(
        f"{name}, line {line}: not {encoding.removesuffix('-sig').upper()} text ({what}). Give the "
        f"source's option encoding; {cure}."
    )


def _decodes(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeError:
        return False
    return True
