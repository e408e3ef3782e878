"""A corpus as a Parquet table of records: write, read, validate, in streams or as a whole.

The schema is in docs/manifest.md. One row is one Record; the table's own facts (schema version,
media root, label spaces) are one JSON document in the Parquet metadata under the key `emocache`.
"""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from cache.clip import Record
from cache.errors import ManifestError, near_miss
from cache.files import write_aside
from cache.labels import LABEL_FIELDS, LabelField, LabelSpace
from cache.schema import Model, decode

_METADATA_KEY = b"emocache"
_ROWS = 4096
"""Records of a row group: what is in memory at a time when a manifest is streamed."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _pairs(key: str, value: str, kind: pa.DataType) -> pa.DataType:
    """Return the type of a mapping: as a list of pairs, which every Parquet reader knows."""
    return pa.list_(pa.struct([_required(key, pa.string()), _required(value, kind)]))


_CLIP = pa.struct(
    [
        _required("sha256", pa.string()),
        _required("n_bytes", pa.int64()),
        ("duration_s", pa.float64()),
        ("has_video", pa.bool_()),
        ("has_audio", pa.bool_()),
        ("has_image", pa.bool_()),
        ("container", pa.string()),
        ("video_codec", pa.string()),
        ("audio_codec", pa.string()),
        ("width_px", pa.int64()),
        ("height_px", pa.int64()),
        ("n_frames", pa.int64()),
        ("sample_rate_hz", pa.int64()),
    ]
)
_SUBTITLE = pa.struct(
    [
        _required("text", pa.string()),
        ("language", pa.string()),
        _required("origin", pa.string()),
    ]
)
_PEAK = pa.struct(
    [
        _required("index", pa.int64()),
        ("pts_s", pa.float64()),
        ("method", pa.string()),
        ("score", pa.float64()),
    ]
)
_DESCRIPTION = pa.struct(
    [
        _required("kind", pa.string()),
        _required("text", pa.string()),
        ("target", pa.string()),
        ("model", pa.string()),
        ("version", pa.string()),
        ("prompt_id", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        _required("uid", pa.string()),
        _required("media", pa.string()),
        ("clip", _CLIP),
        ("split", pa.string()),
        ("split_native", pa.string()),
        ("split_axes", _pairs("axis", "value", pa.string())),
        ("benchmarks", pa.list_(pa.string())),
        ("parent", pa.string()),
        ("speaker", pa.string()),
        ("person", pa.string()),
        ("language", pa.string()),
        ("subtitles", pa.list_(_SUBTITLE)),
        ("emotion", pa.string()),
        ("emotion_multi", pa.list_(pa.string())),
        ("emotion_ov", pa.list_(pa.string())),
        ("sentiment", pa.string()),
        ("intent", pa.string()),
        ("sentiment_score", pa.float64()),
        ("valence", pa.float64()),
        ("arousal", pa.float64()),
        ("dominance", pa.float64()),
        ("peak", _PEAK),
        ("action_units", _pairs("unit", "intensity", pa.float64())),
        ("descriptions", pa.list_(_DESCRIPTION)),
    ]
)
"""Columns of a manifest. Only `uid` and `media` must be there; the others may be null, or missing."""
_MAPPINGS = {"split_axes": ("axis", "value"), "action_units": ("unit", "intensity")}
_FIRST_TEXTS = {
    "description": "multimodal",
    "audio_description": "audio_tone",
    "image_description": "visual_objective",
}
"""Columns of schema 1 -> kind of description."""


class CorpusNote(Model):
    """What is known of a corpus as a whole."""

    title: str | None = None
    licence: str | None = None
    """In words: who may use it, and for what."""
    source: str | None = None
    """Where the records came from."""


class Header(Model):
    """What is true of a whole manifest."""

    schema_version: Literal[2] = 2
    media_root: str
    """Folder that every media path is relative to; a relative one starts at the manifest's folder."""
    label_spaces: dict[str, LabelSpace] = Field(default_factory=dict)
    """`<corpus>/<field>` -> the space of that field of the corpus's records; a bare `<field>` is that of
    every corpus without one of its own."""
    scales: dict[str, tuple[float, float]] = Field(default_factory=dict)
    """`<corpus>/sentiment_score` or `<corpus>/vad` -> lowest and highest number."""
    corpora: dict[str, CorpusNote] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _of_fields(self) -> Header:
        for key in self.label_spaces:
            field = key.rpartition("/")[2]
            if field not in LABEL_FIELDS:
                raise ValueError(
                    f"label_spaces: {key!r} names no label field.{near_miss(field, LABEL_FIELDS)} "
                    f"Allowed behind the corpus: {', '.join(LABEL_FIELDS)}"
                )
        return self

    def space(self, corpus: str, field: LabelField) -> LabelSpace | None:
        """Return the label space of a field of a corpus; None if it has none."""
        own = self.label_spaces.get(f"{corpus}/{field}")
        return self.label_spaces.get(field) if own is None else own

    def check(self, record: Record) -> None:
        """Raise a ValueError if a record has a label that its space does not hold."""
        for field in LABEL_FIELDS:
            labels = record.labels_of(field)
            if not labels:
                continue
            space = self.space(record.corpus, field)
            if space is None:
                raise ValueError(
                    f"{record.uid}: {field} {labels[0]!r}, but the manifest has no label space for it"
                )
            for label in labels:
                if not space.holds(label):
                    raise ValueError(f"{record.uid}: {space.refusal(label)}")


class Manifest(Model):
    """A named list of records."""

    header: Header
    records: tuple[Record, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        twice = [uid for uid, n in Counter(r.uid for r in self.records).items() if n > 1]
        if twice:
            raise ValueError(
                f"duplicate uid {twice[0]!r} ({len(twice)} in all); a uid names one record"
            )
        for record in self.records:
            self.header.check(record)
        return self

    def __len__(self) -> int:
        return len(self.records)

    @property
    def splits(self) -> dict[str | None, int]:
        """Number of records per split."""
        return dict(Counter(r.split for r in self.records))

    def select(self, split: str) -> tuple[Record, ...]:
        """Return the records of one split.

        Raises:
            ManifestError: No record is in it; names the splits that exist.
        """
        chosen = tuple(r for r in self.records if r.split == split)
        if not chosen:
            names = sorted(s for s in self.splits if s is not None)
            raise ManifestError(
                f"no record is in split {split!r}.{near_miss(split, names)} "
                f"The manifest has: {', '.join(names) or 'no splits at all'}."
            )
        return chosen


def media_root(manifest: Manifest, path: Path) -> Path:
    """Return the absolute media root of a manifest that was read from `path`."""
    return (path.parent / manifest.header.media_root).resolve()


class ManifestWriter:
    """Writes a manifest record by record: whole or not at all.

    Use as a context manager; an exception inside leaves what was there before.
    """

    def __init__(self, path: Path, header: Header) -> None:
        """Open nothing yet.

        Args:
            path: Where the manifest will stand.
            header: Must hold the label spaces of all records to come.
        """
        self._path, self._header = path, header
        self._rows: list[dict[str, Any]] = []
        self._uids: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._stack.enter_context(write_aside(self._path))
        metadata = {_METADATA_KEY: self._header.model_dump_json().encode()}
        self._schema = SCHEMA.with_metadata(metadata)
        self._file = self._stack.enter_context(pq.ParquetWriter(aside, self._schema))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
        except BaseException as failed:
            self._stack.__exit__(type(failed), failed, failed.__traceback__)
            raise
        self._stack.__exit__(kind, error, trace)

    def __len__(self) -> int:
        return len(self._uids)

    def write(self, record: Record) -> None:
        """Add a record.

        Raises:
            ManifestError: A uid for the second time, or a label outside its space.
        """
        if record.uid in self._uids:
            raise ManifestError(f"duplicate uid {record.uid!r}; a uid names one record")
        try:
            self._header.check(record)
        except ValueError as error:
            raise ManifestError(str(error)) from None
        self._uids.add(record.uid)
        self._rows.append(_row(record))
        if len(self._rows) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as Parquet: whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    with ManifestWriter(path, manifest.header) as writer:
        for record in manifest.records:
            writer.write(record)


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        ManifestError: Not there, not Parquet, not a manifest, a missing column, or an invalid
            record (row, field, value).
    """
    header = read_header(path)
    # 130,000 records are some million objects, through which the collector would go again and again:
    # 12 of 16 s. None of them is garbage.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        records = tuple(iter_records(path))
        return decode(Manifest, {"header": header, "records": records}, str(path))
    finally:
        if was_enabled:
            gc.enable()


def read_header(path: Path) -> Header:
    """Read what is true of a whole manifest; see `read_manifest` for the errors."""
    with _open(path) as file:
        return _header(file, path)


def count_records(path: Path) -> int:
    """Return the number of records without reading them; see `read_manifest` for the errors."""
    with _open(path) as file:
        _header(file, path)
        n: int = file.metadata.num_rows
        return n


def iter_records(path: Path) -> Iterator[Record]:
    """Read a manifest's records one by one, each validated; some thousand are in memory at a time.

    Raises:
        ManifestError: As `read_manifest`; a uid that occurs twice, where it occurs again.
        SchemaError: An invalid record: row, field, value.
    """
    with _open(path) as file:
        header = _header(file, path)
        later = [name for name in SCHEMA.names if name in file.schema_arrow.names]
        is_first = "label" in file.schema_arrow.names
        uids: set[str] = set()
        number = 0
        for batch in file.iter_batches(_ROWS, columns=None if is_first else later):
            for row in batch.to_pylist():
                where = f"{path}, row {number} (uid {row.get('uid')!r})"
                record = decode(Record, _first(row) if is_first else plain_row(row), where)
                if record.uid in uids:
                    raise ManifestError(f"{where}: duplicate uid; a uid names one record")
                uids.add(record.uid)
                try:
                    header.check(record)
                except ValueError as error:
                    raise ManifestError(f"{where}: {error}") from None
                yield record
                number += 1


def _open(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise ManifestError(
            f"{path}: no such manifest file. Create it with: emocache index DIR --out {path}"
        )
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(
            f"{path}: not a readable Parquet file ({_first_line(error)}). "
            f"Create a manifest with: emocache index DIR --out {path}"
        ) from None


def _header(file: pq.ParquetFile, path: Path) -> Header:
    metadata = file.schema_arrow.metadata or {}
    if _METADATA_KEY not in metadata:
        raise ManifestError(
            f"{path}: a Parquet file, but not an emocache manifest (no '{_METADATA_KEY.decode()}' "
            "metadata). Create one with: emocache index DIR --out FILE"
        )
    names = file.schema_arrow.names
    missing = [name for name in ("uid", "media") if name not in names]
    if missing:
        raise ManifestError(
            f"{path}: missing column {', '.join(missing)}; found {', '.join(names)}. "
            "Write it again with: emocache index"
        )
    try:
        data = json.loads(metadata[_METADATA_KEY])
    except ValueError as error:
        raise ManifestError(
            f"{path}, header: not a JSON document ({error}); the file is damaged"
        ) from None
    if isinstance(data, dict) and data.get("schema_version", 1) == 1:
        data = _second_header(data)
    return decode(Header, data, f"{path}, header")


def _row(record: Record) -> dict[str, Any]:
    row = record.model_dump(mode="json")
    for name, (key, value) in _MAPPINGS.items():
        row[name] = [{key: k, value: v} for k, v in row[name].items()]
    return row


def plain_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as a Record takes it: no nulls where it has a default, mappings as such."""
    found = {name: value for name, value in row.items() if value is not None}
    for name, (key, value) in _MAPPINGS.items():
        if found.get(name):
            found[name] = {pair[key]: pair[value] for pair in found[name]}
        else:
            found.pop(name, None)
    return found


def _first(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a manifest of schema 1 as a Record takes it."""
    found = {name: row.get(name) for name in ("uid", "media", "clip", "split")}
    found["emotion"] = row.get("label")
    if row.get("subtitle"):
        found["subtitles"] = [{"text": row["subtitle"]}]
    if row.get("peak_index") is not None:
        found["peak"] = {"index": row["peak_index"]}
    found["descriptions"] = [
        {"kind": kind, "text": row[name]} for name, kind in _FIRST_TEXTS.items() if row.get(name)
    ]
    return found


def _second_header(first: dict[str, Any]) -> dict[str, Any]:
    """Return the header of schema 1 in the form of schema 2."""
    found = {name: value for name, value in first.items() if name != "label_space"}
    space = first.get("label_space")
    return {
        **found,
        "schema_version": 2,
        "label_spaces": {} if space is None else {"emotion": space},
    }


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def relative_root(root: Path, manifest_path: Path) -> str:
    """Return `root` relative to the manifest's folder, so that both can move together."""
    return Path(os.path.relpath(root.resolve(), manifest_path.parent.resolve())).as_posix()
