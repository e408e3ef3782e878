"""A corpus as a Parquet table of records: write, read, validate.

The schema is in docs/manifest.md. One row is one Record; the table's own facts (schema version,
media root, label space) are one JSON document in the Parquet metadata under the key `emocache`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import model_validator

from cache.clip import Record
from cache.errors import ManifestError, near_miss
from cache.files import write_aside
from cache.labels import LabelSpace
from cache.schema import Model, decode, decode_json

_METADATA_KEY = b"emocache"

_CLIP = pa.struct(
    [
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("n_bytes", pa.int64(), nullable=False),
        ("duration_s", pa.float64()),
        ("has_video", pa.bool_()),
        ("has_audio", pa.bool_()),
        ("has_image", pa.bool_()),
    ]
)
_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string(), nullable=False),
        pa.field("media", pa.string(), nullable=False),
        pa.field("clip", _CLIP, nullable=False),
        ("split", pa.string()),
        ("subtitle", pa.string()),
        ("label", pa.string()),
        ("description", pa.string()),
        ("peak_index", pa.int64()),
        ("audio_description", pa.string()),
        ("image_description", pa.string()),
    ]
)
# Manifests of earlier releases have no such columns; a file without them reads as one with nulls.
_LATER_COLUMNS = ("audio_description", "image_description")


class Header(Model):
    """What is true of a whole manifest."""

    schema_version: Literal[1] = 1
    media_root: str
    """Folder that every media path is relative to; a relative one starts at the manifest's folder."""
    label_space: LabelSpace | None = None
    """None if no record carries a label."""


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
        space = self.header.label_space
        for record in self.records:
            if record.label is None:
                continue
            if space is None:
                raise ValueError(f"{record.uid}: label {record.label!r} but no label space")
            if record.label not in space.labels:
                raise ValueError(
                    f"{record.uid}: label {record.label!r} is not in the label space "
                    f"'{space.name}'.{near_miss(record.label, space.labels)} "
                    f"Allowed: {', '.join(space.labels)}"
                )
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


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as Parquet: whole or not at all.

    Raises:
        OSError: The folder cannot be written.
    """
    header = manifest.header.model_dump_json().encode()
    rows = [r.model_dump(mode="json") for r in manifest.records]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA.with_metadata({_METADATA_KEY: header}))
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside:
        pq.write_table(table, aside)


def read_manifest(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        ManifestError: Not there, not Parquet, not a manifest, a missing column, or an invalid
            record (row, field, value).
    """
    if not path.is_file():
        raise ManifestError(
            f"{path}: no such manifest file. Create it with: emocache index DIR --out {path}"
        )
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ManifestError(
            f"{path}: not a readable Parquet file ({_first_line(error)}). "
            f"Create a manifest with: emocache index DIR --out {path}"
        ) from None
    metadata = table.schema.metadata or {}
    if _METADATA_KEY not in metadata:
        raise ManifestError(
            f"{path}: a Parquet file, but not an emocache manifest (no '{_METADATA_KEY.decode()}' "
            "metadata). Create one with: emocache index DIR --out FILE"
        )
    header = decode_json(Header, metadata[_METADATA_KEY], f"{path}, header")
    needed = [name for name in _SCHEMA.names if name not in _LATER_COLUMNS]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise ManifestError(
            f"{path}: missing column {', '.join(missing)}; found {', '.join(table.column_names)}. "
            "Write it again with: emocache index"
        )
    records = tuple(_records(table, path))
    return decode(Manifest, {"header": header, "records": records}, str(path))


def _records(table: pa.Table, path: Path) -> Iterator[Record]:
    rows: Sequence[dict[str, Any]] = table.to_pylist()
    for number, row in enumerate(rows):
        yield decode(Record, row, f"{path}, row {number} (uid {row.get('uid')!r})")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def relative_root(root: Path, manifest_path: Path) -> str:
    """Return `root` relative to the manifest's folder, so that both can move together."""
    return Path(os.path.relpath(root.resolve(), manifest_path.parent.resolve())).as_posix()
