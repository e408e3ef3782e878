"""Predictions files as rows: our own format, and the one that was released with the paper.

Released: an object per line (or a JSON list, or a CSV table) with `video_id`, `answer` (the truth),
`response` (the model's text), `mode` (which part of the set), and maybe `new_response` (a cleaned
answer). Ours: `docs/predictions.md`. Every row keeps its line, so that an error can name it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache.errors import ManifestError, PredictionError, near_miss
from eval.predictions import Prediction, read_predictions
from extract.corpora.delimited import read_delimited

ID, TRUTH, REPLY, CLEANED, MODE = "video_id", "answer", "response", "new_response", "mode"
"""Fields of the released format."""
RELEASED = (ID, TRUTH, REPLY, CLEANED, MODE)
PREDICTIONS = "predictions.jsonl"
"""The file of a run, where a folder is given."""
TABLES = (".csv", ".tsv")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One reply with what its file tells about it."""

    where: str
    """File and line."""
    number: int
    """Of the line, from 1."""
    fields: Mapping[str, Any]
    """Of the released format, as they stand; of ours the same, filled from the prediction."""
    prediction: Prediction | None = None

    @property
    def mode(self) -> str | None:
        """Which part of the set it is of; None: the row does not tell."""
        mode = self.fields.get(MODE)
        return None if mode is None else str(mode)

    def id(self) -> str:
        """Return the id of the clip; raises PredictionError if it is no text or number, or blank."""
        found = self.fields.get(ID)
        if isinstance(found, int) and not isinstance(found, bool):
            return str(found)
        if not isinstance(found, str) or not found.strip():
            raise PredictionError(
                f"{self.where}: field '{ID}' is {_told(self.fields, ID)}; each row needs the id of its clip."
            )
        return found

    def text(self, fields: Sequence[str]) -> str:
        """Return the first field that the row has.

        Raises:
            PredictionError: It has none of them, or it is no text.
        """
        for name in fields:
            if name in self.fields:
                if not isinstance(self.fields[name], str):
                    raise PredictionError(
                        f"{self.where}: field '{name}' is {_told(self.fields, name)}, not text. A model that "
                        'wrote nothing has the text "" (it counts as wrong); a row without reply is refused.'
                    )
                return str(self.fields[name])
        hint = near_miss(fields[-1], self.fields)
        raise PredictionError(
            f"{self.where}: the row has no reply: no field {' or '.join(map(repr, reversed(fields)))} (got "
            f"{', '.join(map(str, self.fields)) or 'none'}).{hint} Add the text that the model wrote, "
            '"" if it wrote nothing.'
        )


@dataclass(frozen=True)
class Source:
    """All rows of a predictions file."""

    name: str
    """The file, for messages."""
    kind: Literal["ours", "released"]
    rows: tuple[Row, ...]
    file: str | None = None
    """Its name and digest; None: it never was one."""


def read_source(path: Path) -> Source:
    """Read a predictions file of either format; of a folder its `predictions.jsonl`.

    Raises:
        PredictionError: It is missing, empty, of neither format, or a line does not decode.
    """
    if path.is_dir():
        path = path / PREDICTIONS
    data = read_bytes(path)
    file = f"{path.name} sha256:{hashlib.sha256(data).hexdigest()[:16]}"
    found = read_objects(path, data)
    one = next(found, None)
    if one is None:
        raise PredictionError(
            f"{path}: no predictions; the file is empty. Give one with a row per clip."
        )
    if "uid" in one.fields and path.suffix.lower() not in TABLES:
        return Source(str(path), "ours", own_rows(read_predictions(path), str(path)), file)
    if not set(one.fields) & {ID, REPLY, CLEANED}:
        raise PredictionError(
            f"{one.where}: fields {', '.join(map(str, one.fields)) or 'none'} are of no predictions file. "
            f"Allowed: the released format ({', '.join(RELEASED)}), or ours (docs/predictions.md)."
        )
    return Source(str(path), "released", (one, *found), file)


def own_rows(predictions: Sequence[Prediction], name: str) -> tuple[Row, ...]:
    """Return our own predictions as rows.

    Args:
        predictions: As read or as computed.
        name: Of their file, for messages.
    """
    rows = []
    for number, one in enumerate(predictions, start=1):
        fields = {ID: one.uid, REPLY: one.reply, MODE: one.split}
        rows.append(Row(f"{name}, uid {one.uid!r}, task {one.task!r}", number, fields, one))
    return tuple(rows)


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file; raises PredictionError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise PredictionError(
            f"{path}: cannot be read ({error.strerror}). Give an existing file."
        ) from error


def read_objects(path: Path, data: bytes) -> Iterator[Row]:
    """Yield the objects of JSON lines or of a JSON list, or the rows of a CSV or TSV table.

    Raises:
        PredictionError: The file is no such thing; the line is named.
    """
    text = _decoded(path, data.removeprefix(_BOM))
    if path.suffix.lower() in TABLES:
        yield from _table(path, text)
    elif text.lstrip()[:1] == "[":
        yield from _list(path, text)
    else:
        # Not splitlines: a reply may hold U+2028.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _row(
                    _parsed(line, f"{path}, line {number}"), f"{path}, line {number}", number
                )


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PredictionError(
            f"{path}, line {line}: not text in UTF-8 (byte {data[error.start]:02x}). Save the file as UTF-8."
        ) from None


def _table(path: Path, text: str) -> Iterator[Row]:
    if not text.strip():
        return
    try:
        # Each place ends in "line N".
        for place, fields in read_delimited(path, str(path), {}):
            # A table has every column in every row; a blank cell here is a field that the row lacks.
            told = {k: v for k, v in fields.items() if v or k not in (CLEANED, MODE)}
            yield Row(place, int(place.rpartition(" ")[2]), told)
    except ManifestError as error:
        raise PredictionError(str(error)) from error


def _list(path: Path, text: str) -> Iterator[Row]:
    found = _parsed(text, str(path))
    for number, one in enumerate(found, start=1):
        yield _row(one, f"{path}, item {number}", number)


def _parsed(text: str, where: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PredictionError(
            f"{where}: not JSON ({error}). Allowed: one JSON object per line, a JSON list of objects, or "
            "a table named .csv or .tsv. A last line that is cut off was not written to its end."
        ) from None
    return _repaired(found) if "\\ud" in text.lower() else found


def _repaired(found: Any) -> Any:
    """Replace halves of surrogate pairs, which JSON may hold and no text file can."""
    if isinstance(found, str):
        return found.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(found, dict):
        return {_repaired(key): _repaired(value) for key, value in found.items()}
    return [_repaired(one) for one in found] if isinstance(found, list) else found


def _row(found: Any, where: str, number: int) -> Row:
    if not isinstance(found, dict):
        raise PredictionError(
            f"{where}: a {type(found).__name__}, not an object with fields such as {', '.join(RELEASED)}."
        )
    return Row(where, number, found)


def _told(fields: Mapping[str, Any], name: str) -> str:
    """Say what a field holds, shortly."""
    if name not in fields:
        return "missing"
    text = json.dumps(fields[name], ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:59] + "…"
