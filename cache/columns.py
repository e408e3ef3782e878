"""Single columns of a manifest, as Arrow arrays: to count and choose among records without reading them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.errors import ManifestError
from cache.manifest import SCHEMA, ManifestWriter, iter_records, read_header


def read_columns(path: Path, names: Sequence[str]) -> pa.Table:
    """Read some columns of a manifest.

    The records are not validated, as only a part of them is read; `cache.manifest.iter_records` does
    that.

    Args:
        path: The manifest; one of schema 1 is read as if it were of schema 2.
        names: Columns, or parts of one: `clip.duration_s`, or `descriptions.kind`, which gives a list of
            kinds for each record.

    Returns:
        One column for each name, under that name; null where the file has no such column.

    Raises:
        ManifestError: Not a manifest, or a column of another type.
    """
    header = read_header(path)
    file = pq.ParquetFile(path)
    if "label" in file.schema_arrow.names:
        with file, tempfile.TemporaryDirectory() as folder:
            later = Path(folder) / "m.parquet"
            with ManifestWriter(later, header) as writer:
                for record in iter_records(path):
                    writer.write(record)
            return read_columns(later, names)
    with file:
        leaves = [file.schema.column(i).path for i in range(len(file.schema.names))]
        wanted = [leaf for leaf in leaves if any(_is_part(leaf, name) for name in names)]
        found = file.read(columns=wanted)
    columns = []
    for name in names:
        kind = _type(name)
        try:
            columns.append(_column(found, name, kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ManifestError(
                f"{path}: column {name!r} is not of type {kind} ({str(error).splitlines()[0]}). Write the "
                "manifest again with: emocache index"
            ) from None
    return pa.table(columns, names=list(names))


def corpus_of(uids: pa.Array) -> pa.Array:
    """Return the first part of each uid."""
    return pc.list_element(pc.split_pattern(uids, "/", max_splits=1), 0)


def _is_part(leaf: str, name: str) -> bool:
    """Whether a stored column, `subtitles.list.element.text` for example, belongs to a name."""
    head, _, part = name.partition(".")
    parts = leaf.split(".")
    return parts[0] == head and part in ("", parts[-1])


def _type(name: str) -> pa.DataType:
    head, _, part = name.partition(".")
    kind = SCHEMA.field(head).type
    if not part:
        return kind
    if pa.types.is_list(kind):
        return pa.list_(kind.value_type.field(part).type)
    return kind.field(part).type


def _column(found: pa.Table, name: str, kind: pa.DataType) -> Any:
    head, _, part = name.partition(".")
    if head not in found.column_names:
        return pa.nulls(len(found), kind)
    # One chunk: row groups are small, and lists are taken apart by their offsets.
    column = pa.concat_arrays(found[head].chunks) if found[head].num_chunks else None
    if column is None:
        return pa.array([], kind)
    if not part:
        return column.cast(kind)
    if not pa.types.is_list(column.type):
        fields = [column.type.field(i).name for i in range(column.type.num_fields)]
        if part not in fields:
            return pa.nulls(len(column), kind)
        return pc.struct_field(column, part).cast(kind)
    inner = pc.list_flatten(column)
    fields = [inner.type.field(i).name for i in range(inner.type.num_fields)]
    values = (
        pc.struct_field(inner, part) if part in fields else pa.nulls(len(inner), kind.value_type)
    )
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    offsets = pa.concat_arrays(
        [pa.array([0], pa.int64()), pc.cumulative_sum(lengths).cast(pa.int64())]
    ).cast(pa.int32())
    return pa.ListArray.from_arrays(offsets, values.cast(kind.value_type))
