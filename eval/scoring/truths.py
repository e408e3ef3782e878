"""True labels: from the predictions file itself, or from a csv, jsonl or npz file of their own."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cache.errors import ManifestError, PredictionError
from cache.labels import LabelField
from eval.benchmarks import Benchmark, Protocol
from eval.scoring.sources import Row, read_bytes, read_objects
from eval.scoring.texts import labels_of, plain, words_of
from extract.corpora.readers.npz import read_npz

IDS = (
    "video_id", "video_ids", "name", "names", "id", "ids", "uid", "uids", "filename", "filenames", "file",
    "clip", "clip_id", "video", "sample_id", "key",
)  # fmt: skip
"""Columns that may hold the id, the first that is there."""
MODES = ("mode", "split")
_FIRST = ("answer", "answers", "truth", "truths")
_LAST = ("label", "labels", "ground_truth", "gt", "target")
_OF_FIELD: Mapping[LabelField, tuple[str, ...]] = {
    "emotion": ("emotion", "emotions", "discrete", "emo"),
    "emotion_multi": ("emotion_multi", "emotions", "multi", "emotion"),
    "emotion_ov": ("openset", "open", "ov", "emotion_ov", "emotions", "emotion"),
    "sentiment": ("sentiment", "sentiments", "polarity", "valence", "val"),
    "intent": ("intent", "intents", "intention"),
}
_NUMBER: Final = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True)
class Truth:
    """A true label, or several, as they are compared."""

    labels: tuple[str, ...]
    """Empty: none is known, or of a set with several labels there is none."""
    remark: str | None = None
    """What was done to the text: `trimmed`, `sign`, `merged`; None: nothing."""


@dataclass(frozen=True)
class Truths:
    """The truths of a file."""

    name: str
    rows: Mapping[tuple[str | None, str], Row]
    """Mode (None where the file has none) and id -> the row."""
    column: str
    """Which column holds the label."""

    @property
    def has_modes(self) -> bool:
        """True if the rows tell which part of the set they are of."""
        return any(mode is not None for mode, _ in self.rows)

    def value(self, row: Row) -> Any:
        """Return the label of a row as it stands."""
        return row.fields[self.column]


def read_truths(path: Path, row: Benchmark) -> Truths:
    """Read a truths file: csv, tsv, jsonl, a JSON list, or npz of plain arrays.

    Raises:
        PredictionError: It is missing, empty, has no column of ids or of labels, or an id twice.
    """
    data = read_bytes(path)
    rows = list(_npz(path) if path.suffix.lower() == ".npz" else read_objects(path, data))
    if not rows:
        raise PredictionError(
            f"{path}: no truths; the file is empty. Give one with a row per clip."
        )
    columns = list(rows[0].fields)
    id_column = _column(path, columns, IDS, "ids")
    mode_column = next((c for name in MODES for c in columns if plain(c) == name), None)
    others = [column for column in columns if column not in (id_column, mode_column)]
    label_column = (
        others[0]
        if len(others) == 1
        else _column(path, others, (*_FIRST, *_OF_FIELD[row.field], *_LAST), "labels")
    )
    found: dict[tuple[str | None, str], Row] = {}
    for one in rows:
        for column in filter(None, (id_column, label_column, mode_column)):
            if one.fields.get(column) is None:
                raise PredictionError(
                    f"{one.where}: no '{column}'; the rows above have it. Complete the row."
                )
        mode = str(one.fields[mode_column]) if mode_column else None
        key = mode, _id(one, id_column)
        if key in found:
            raise PredictionError(
                f"{one.where}: id {key[1]!r} is already on line {found[key].number}; keep one of the two."
            )
        found[key] = one
    return Truths(str(path), found, label_column)


def true_labels(value: Any, row: Benchmark, protocol: Protocol, where: str) -> Truth:
    """Return a truth as it is compared.

    Args:
        value: Of the file: text, a number (sentiment), or a list of texts (several labels).
        row: The benchmark.
        protocol: `released` leaves the truth of accuracy sets as it stands.
        where: File and line, for messages.

    Raises:
        PredictionError: Not such a value, or a blank one where one label is needed.
    """
    if row.metric in ("wheel-f", "map"):
        return _several(value, row, where)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if row.field == "sentiment" and (is_number or (isinstance(value, str) and _is_number(value))):
        number = float(value)
        if number != number:
            raise PredictionError(f"{where}: the truth is not a number (NaN). Give its value.")
        return Truth(
            ("positive" if number > 0 else "negative" if number < 0 else "neutral",), "sign"
        )
    if not isinstance(value, str):
        raise PredictionError(
            f"{where}: the truth is {value!r}, not text. Allowed: the name of a label, such as "
            f"{row.options[0]!r}."
        )
    if protocol == "released":
        return Truth((value if row.metric == "accuracy" else plain(value),))
    text = plain(value)
    if not text:
        raise PredictionError(
            f"{where}: the truth is blank. Allowed: the name of a label, such as {row.options[0]!r}."
        )
    if _is_number(text):
        raise PredictionError(
            f"{where}: the truth {text!r} is a number. {row.id} needs the names of labels, such as "
            f"{', '.join(row.options)}."
        )
    if text in row.merged:
        return Truth((row.merged[text],), "merged")
    return Truth((text,), "trimmed" if text != value else None)


def _several(value: Any, row: Benchmark, where: str) -> Truth:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise PredictionError(
            f"{where}: the truth is {value!r}. Allowed: labels separated by commas, or a list of texts."
        )
    split = labels_of
    if row.metric == "wheel-f":
        # A truth written as a list is one; its brackets are no words.
        texts = [_unwrapped(text) for text in texts]
        split = words_of
    return Truth(tuple(dict.fromkeys(label for text in texts for label in split(text))))


def _unwrapped(text: str) -> str:
    text = text.strip()
    return text[1:-1] if text.startswith("[") and text.endswith("]") else text


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _npz(path: Path) -> Iterator[Row]:
    try:
        for number, (place, fields) in enumerate(read_npz(path, path.parent, {}), start=1):
            yield Row(place, number, fields)
    except ManifestError as error:
        if "Python objects" not in str(error):
            raise PredictionError(str(error)) from error
        raise PredictionError(
            f"{path}: holds Python objects (MERBench's label.npz does), and reading them would run code from "
            "the file. Where you trust it, load it with allow_pickle=True and write plain arrays: "
            "np.savez('truths.npz', names=np.array(names, str), labels=np.array(labels, str))"
        ) from None
    except (NotImplementedError, RuntimeError, zlib.error) as error:  # of a damaged archive
        raise PredictionError(
            f"{path}: not a readable .npz archive ({error}); get it again."
        ) from None


def _column(path: Path, columns: Sequence[str], wanted: Iterable[str], what: str) -> str:
    names = list(dict.fromkeys(wanted))
    for name in names:
        for column in columns:
            if plain(column) == name:
                return column
    raise PredictionError(
        f"{path}: no column or field of {what} (got {', '.join(map(str, columns[:12]))}). Name it one of: "
        f"{', '.join(names)}."
    )


def _id(row: Row, column: str) -> str:
    found = row.fields[column]
    text = str(found) if isinstance(found, str | int) and not isinstance(found, bool) else ""
    if not text.strip():
        raise PredictionError(
            f"{row.where}: the id is {found!r}; each row needs the id of its clip."
        )
    return text
