"""Parquet and Hugging Face datasets as rows of text; class numbers become class names."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cache.errors import ManifestError, MissingDependencyError, near_miss
from extract.corpora.reading import check_options, relative
from extract.corpora.values import Flat

ClassNames = Mapping[str, Sequence[str]]
"""Column -> names of its classes."""
_DATASET_OPTIONS = ("separator", "split", "config")


def plain_columns(schema: pa.Schema) -> list[str]:
    """Return the leaf columns that hold no bytes: embedded sound and pictures are never read."""
    return [leaf for field in schema for leaf in _leaves(field.name, field.type)]


def _leaves(name: str, kind: pa.DataType) -> Iterator[str]:
    if pa.types.is_struct(kind):
        for field in kind:
            yield from _leaves(f"{name}.{field.name}", field.type)
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        yield name


def class_names(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Return the class names that the `datasets` library left in the metadata of a file."""
    try:
        info = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {name: found for name, one in info.items() if (found := _names_in(one))}


def _names_in(feature: Any) -> Sequence[str] | None:
    """Return the names of a ClassLabel, or of a list of them."""
    if isinstance(feature, list) and feature:
        return _names_in(feature[0])
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        return feature.get("names")
    return _names_in(feature.get("feature"))


def text_rows(
    batch: pa.RecordBatch | pa.Table, names: ClassNames, flat: Flat, place: str, start: int
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a batch as text.

    Args:
        batch: Some rows.
        names: Columns whose numbers are classes.
        flat: Turns values into text.
        place: Goes before the row's number, which counts from 1.
        start: Rows before the batch.
    """
    for number, found in enumerate(batch.to_pylist(), start + 1):
        where = f"{place} {number}"
        for column, classes in names.items():
            if column in found:
                found[column] = _named(found[column], classes, where, column)
        yield where, flat.row(found, where)


def _named(value: Any, classes: Sequence[str], where: str, column: str) -> Any:
    if isinstance(value, list):
        return [_named(item, classes, where, column) for item in value]
    if value is None or value == -1:  # the library's mark of "no label"
        return None
    if not isinstance(value, int) or not 0 <= value < len(classes):
        raise ManifestError(
            f"{where}: column {column!r} holds class {value!r}, but there are {len(classes)} classes "
            f"({', '.join(classes[:10])}). The file contradicts its own header."
        )
    return classes[value]


def read_datasets(
    file: Path, folder: Path, options: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Read a Hugging Face dataset: what `save_to_disk` wrote, or a folder as the hub has it.

    Args:
        file: The folder, or a file in it.
        folder: The dataset's folder.
        options: `split` and `config` choose a part; `separator` joins lists.

    Yields:
        Rows with a further column `split`, where the dataset has splits and no such column.

    Raises:
        ManifestError: The library cannot read it.
        MissingDependencyError: The library is not installed.
    """
    home = file if file.is_dir() else file.parent
    name = relative(home, folder)
    name = folder.name if name == "." else name
    check_options(options, _DATASET_OPTIONS, name, "huggingface")
    flat = Flat(name, str(options.get("separator", "; ")))
    for split, part in _splits(home, name, options).items():
        features = part.features or {}
        names = {c: found for c, f in features.items() if (found := _feature_names(f))}
        plain = [
            c for c in features if type(features[c]).__name__ not in ("Audio", "Image", "Video")
        ]
        hidden = [c for c in features if c not in plain]
        part = _undecoded(part, hidden)
        start = 0
        for batch in part.with_format("arrow").iter(batch_size=2048):
            place = f"{name}, {split}, row" if split else f"{name}, row"
            for where, row in text_rows(_without_bytes(batch), names, flat, place, start):
                row.setdefault("split", split)
                yield where, row
            start += batch.num_rows
    if not flat.n_rows:
        raise ManifestError(f"{name}: the dataset has no rows.")
    flat.tell()


def _feature_names(feature: Any) -> Sequence[str] | None:
    names = getattr(feature, "names", None)
    if names is not None and type(feature).__name__ == "ClassLabel":
        return list(names)
    if isinstance(feature, list) and feature:
        return _feature_names(feature[0])
    inner = getattr(feature, "feature", None)
    return None if inner is None else _feature_names(inner)


def _undecoded(part: Any, columns: Sequence[str]) -> Any:
    for column in columns:
        part = part.cast_column(column, type(part.features[column])(decode=False))
    return part


def _without_bytes(batch: pa.Table) -> pa.Table:
    """Drop embedded media; a struct of bytes and path keeps its path."""
    for place, field in enumerate(batch.schema):
        if pa.types.is_struct(field.type) and any(pa.types.is_binary(f.type) for f in field.type):
            chunk = batch.column(place).combine_chunks()
            if isinstance(chunk, pa.ChunkedArray):
                chunk = pa.concat_arrays(chunk.chunks)
            kept = [f for f in field.type if not pa.types.is_binary(f.type)]
            values = pa.StructArray.from_arrays([chunk.field(f.name) for f in kept], fields=kept)
            batch = batch.set_column(place, field.name, values)
    binary = [f.name for f in batch.schema if pa.types.is_binary(f.type)]
    return batch.drop_columns(binary) if binary else batch


def _splits(home: Path, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingDependencyError(
            f"{name}: reading Hugging Face datasets needs the library `datasets`: "
            "pip install 'emocache[hub]'"
        ) from None
    is_saved = any((home / n).is_file() for n in ("dataset_dict.json", "state.json"))
    try:
        if is_saved:
            found = datasets.load_from_disk(str(home))
        else:
            found = datasets.load_dataset(str(home), options.get("config"), streaming=True)
    except Exception as error:  # noqa: BLE001  the library raises errors of many libraries
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ManifestError(
            f"{home}: the `datasets` library cannot read this folder ({first[:300]}). Give a folder that "
            "save_to_disk wrote, or one as the hub has it (Parquet files and README.md)."
        ) from None
    if not isinstance(found, dict):
        found = {str(getattr(found, "split", None) or ""): found}
    wanted = options.get("split")
    if wanted is None:
        return dict(found)
    if wanted not in found:
        raise ManifestError(
            f"{name}: no split {wanted!r}.{near_miss(str(wanted), found)} Found: {', '.join(found)}."
        )
    return {str(wanted): found[wanted]}
