"""Files of rows: tables, JSON, Parquet, Hugging Face datasets and folder trees, as rows of text.

A row is `(where, {column: value})`; `where` is for people: `train.csv, line 12`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from cache.errors import ManifestError
from extract.corpora.delimited import read_delimited
from extract.corpora.objects import read_objects
from extract.corpora.reading import Reader, check_options, relative
from extract.corpora.values import Flat, Row

OPTIONS = ("delimiter", "encoding", "quote", "columns", "key", "records", "separator", "pattern")
"""Of the reader `table`."""


def read_table(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read a file by its suffix: .csv, .tsv, .txt, .json, .jsonl, .ndjson or .parquet.

    Args:
        file: The file.
        folder: The dataset's folder, which places are told relative to.
        options: See `OPTIONS`; docs/corpora_own.md describes them.

    Yields:
        Rows of stripped text.

    Raises:
        ManifestError: The file cannot be read as a table; says where and what to do.
    """
    name = relative(file, folder)
    check_options(options, OPTIONS, name, "table")
    extra = {}
    if pattern := options.get("pattern"):
        extra = _parts(str(pattern), name)
    suffix = file.suffix.lower()
    if suffix in (".json", ".jsonl", ".ndjson"):
        rows = read_objects(file, name, options)
    elif suffix == ".parquet":
        rows = _read_parquet(file, name, options)
    elif suffix in (".csv", ".tsv", ".txt", ""):
        rows = read_delimited(file, name, options)
    else:
        raise ManifestError(
            f"{name}: the reader 'table' knows no files of the kind {suffix!r}. Allowed: .csv, .tsv, "
            ".txt, .json, .jsonl, .ndjson, .parquet. Name another file, or another reader."
        )
    for where, row in rows:
        row.update(extra)
        yield where, row


def read_path(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Make a row of a file's path: columns `path`, `stem` and the named parts of option `pattern`.

    Raises:
        ManifestError: The path does not match the pattern.
    """
    name = relative(file, folder)
    check_options(options, ("pattern",), name, "paths")
    row = {"path": name, "stem": file.stem}
    if pattern := options.get("pattern"):
        row.update(_parts(str(pattern), name))
    yield name, row


def _parts(pattern: str, path: str) -> dict[str, str]:
    names, regex = compile_pattern(pattern)
    found = regex.fullmatch(path)
    if found is None:
        raise ManifestError(
            f"{path}: does not match the pattern {pattern!r}. Give the source's `files` so that only "
            "fitting files are read, or correct the pattern ({name} is a part without a slash, * any "
            "text without one, ** any text)."
        )
    return dict(zip(names, found.groups(), strict=True))


@lru_cache(maxsize=64)
def compile_pattern(pattern: str) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """Return the names of a path pattern's parts and the expression that finds them.

    Raises:
        ManifestError: A name stands twice or is empty.
    """
    names: list[str] = []
    regex = ""
    for piece in re.split(r"(\{[^{}]*\}|\*\*/?|\*)", pattern):
        if piece.startswith("{") and piece.endswith("}"):
            name = piece[1:-1].strip()
            if not name or name in names:
                raise ManifestError(
                    f"pattern {pattern!r}: a part {'stands twice' if name else 'has no name'}: {piece}. "
                    "Give each part its own name."
                )
            names.append(name)
            regex += "([^/]+?)"
        elif piece.startswith("**"):
            regex += "(?:.*/)?" if piece.endswith("/") else ".*"
        else:
            regex += "[^/]*" if piece == "*" else re.escape(piece)
    return tuple(names), re.compile(regex)


def _read_parquet(file: Path, name: str, options: Mapping[str, Any]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from extract.corpora.arrow import class_names, plain_columns, text_rows

    flat = Flat(name, str(options.get("separator", "; ")))
    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            names = class_names(schema)
            for batch in opened.iter_batches(4096, columns=plain_columns(schema)):
                yield from text_rows(batch, names, flat, f"{name}, row", number)
                number += batch.num_rows
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise ManifestError(
            f"{name}: not a readable Parquet file ({first}). It is damaged or cut off; get it again."
        ) from None
    if not number:
        raise ManifestError(f"{name}: no rows. Give a complete file.")
    flat.tell()


def _read_datasets(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    from extract.corpora.arrow import read_datasets

    return read_datasets(file, folder, options)


READERS: dict[str, Reader] = {
    "table": read_table,
    "paths": read_path,
    "huggingface": _read_datasets,
}
"""The readers that know no corpus."""
