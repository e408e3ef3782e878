"""JSON as rows: lists of objects, objects of objects, objects inside them, an object a line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.errors import ManifestError, near_miss
from extract.corpora.delimited import encoding_of, not_text
from extract.corpora.values import Flat, Row


def read_objects(file: Path, name: str, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of a JSON file; one with an object a line is streamed.

    Args:
        file: The file.
        name: Of the file, for places.
        options: encoding, key, records, separator.

    Raises:
        ManifestError: Not JSON, no objects where the options say, or no rows.
    """
    encoding = encoding_of(file, name, options)
    flat = Flat(name, str(options.get("separator", "; ")))
    try:
        with file.open(encoding=encoding) as text:
            first = text.read(1)
            while first.isspace():
                first = text.read(1)
            text.seek(0)
            if file.suffix.lower() != ".json" and first != "[":
                yield from _json_lines(text, name, flat, options)
            else:
                yield from _json_document(text, name, flat, options)
    except UnicodeError:
        raise not_text(file, name, encoding) from None
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read ({error.strerror})") from None
    if not flat.n_rows:
        raise ManifestError(f"{name}: no rows; the list is empty. Give a complete file.")
    flat.tell()


def _json_document(
    text: io.TextIOBase, name: str, flat: Flat, options: Mapping[str, Any]
) -> Iterator[Row]:
    try:
        document = json.load(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # an object a line, under the name .json
            text.seek(0)
            yield from _json_lines(text, name, flat, options)
            return
        raise ManifestError(
            f"{name}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}). The file is "
            "damaged or cut off; get it again."
        ) from None
    for number, (key, found) in enumerate(_objects(document, name, options), 1):
        where = f"{name}, entry {number if key is None else repr(key)}"
        row = flat.row(found, where)
        if key is not None:
            row[str(options.get("key", "key"))] = key
        yield where, row


def _json_lines(
    text: io.TextIOBase, name: str, flat: Flat, options: Mapping[str, Any]
) -> Iterator[Row]:
    path = str(options.get("records") or "")
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManifestError(
                f"{where}: not JSON ({error.msg}, column {error.colno}). Each line must be one object; "
                "the file may be damaged or cut off."
            ) from None
        if not isinstance(found, dict):
            raise ManifestError(
                f"{where}: a {type(found).__name__}, not an object. Each line must be one object."
            )
        if not path:
            yield where, flat.row(found, where)
            continue
        for n, inner in enumerate(_walk([found], path.split("."), name), 1):
            place = f"{where}, entry {n}"
            yield place, flat.row(inner, place)


def _objects(
    document: Any, name: str, options: Mapping[str, Any]
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield the objects of a document, with their keys where they have some."""
    path = options.get("records")
    if path:
        roots = document if isinstance(document, list) else [document]
        for found in _walk(roots, str(path).split("."), name):
            yield None, found
        return
    if isinstance(document, dict):
        if document and all(isinstance(value, dict) for value in document.values()):
            yield from document.items()
            return
        lists = [k for k, v in document.items() if isinstance(v, list) and v[:1] and _is_object(v)]
        hint = f"the option records: {lists[0]}" if lists else "the option records: dotted.path"
        raise ManifestError(
            f"{name}: one object with {', '.join(map(repr, list(document)[:8]))}, not a list of objects "
            f"and not an object of objects. Say where the list is with {hint}."
        )
    if not isinstance(document, list):
        raise ManifestError(
            f"{name}: a {type(document).__name__}, not a list of objects. Give another file."
        )
    for number, found in enumerate(document, 1):
        if not isinstance(found, dict):
            raise ManifestError(
                f"{name}, entry {number}: a {type(found).__name__}, not an object; a row needs named "
                "values. Say where the objects are with the option records: dotted.path."
            )
        yield None, found


def _is_object(values: list[Any]) -> bool:
    return isinstance(values[0], dict)


def _walk(roots: Iterable[Any], path: Sequence[str], name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects at a dotted path, through lists, with the plain values of their ancestors."""
    for root in roots:
        if not isinstance(root, dict):
            raise ManifestError(
                f"{name}: a {type(root).__name__} where an object with {path[0]!r} is expected. Correct "
                "the option records."
            )
        if path[0] not in root:
            raise ManifestError(
                f"{name}: option records: no {path[0]!r} in an object.{near_miss(path[0], root)} Found: "
                f"{', '.join(root) or 'nothing'}."
            )
        inner = root[path[0]]
        around = {k: v for k, v in root.items() if not isinstance(v, dict | list)}
        below: Iterable[Any] = inner if isinstance(inner, list) else [inner]
        if len(path) > 1:
            below = _walk(below, path[1:], name)
        for found in below:
            if not isinstance(found, dict):
                raise ManifestError(
                    f"{name}: option records: {path[-1]!r} holds a {type(found).__name__}, not objects."
                )
            yield around | found
