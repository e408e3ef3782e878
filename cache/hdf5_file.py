"""The HDF5 file of an export: what stands where, and reading one that may be hostile with care."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c as crc32c_library
import numpy as np
from pydantic import Field, ValidationError

from cache import layout
from cache.commit import Status
from cache.errors import (
    CorruptTokensError,
    EmocacheError,
    MissingDependencyError,
    SchemaError,
    StoreError,
)
from cache.layout import STORED_DTYPES
from cache.schema import M, Model, describe
from cache.shards import Values
from cache.spec import TokenSpec

try:
    import h5py
except ImportError as error:
    raise MissingDependencyError(
        f"HDF5 files need the package h5py ({error}). Install it with: pip install 'emocache[exchange]'"
    ) from error

FORMAT_NAME = "emocache-hdf5"
FORMAT_VERSION = 1
COLUMNS = {
    "clip": "S64",
    "status": "<i1",
    "valid_len": "<i4",
    "offset": "<i8",
    "crc32c": "<u4",
    "truncated": "<u1",
    "unit": "<i4",
}
"""One value per clip, in the order in which `index_crc32c` covers them."""
PER_TOKEN = {"tokens", "token_scale"}
"""Datasets with a row per token; all others have one per clip."""
_MAX_CLIPS = 2**26
_MAX_CLIP_BYTES = 2**30
_MAX_TEXT_BYTES = 2**20
"""Bounds of what a file may declare, far above what any store holds."""
_MAX_VALID_LEN = 2**16 - 1
"""The store's index keeps lengths in 16 bits."""


class Unit(Model):
    """One line of the dataset `units`: what a commit record says beside numbers."""

    unit_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,24}$")
    created: str
    provenance: dict[str, str]
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why a stream failed, by clip."""
    remarks: dict[str, str] = Field(default_factory=dict)
    """Damage that decoding passed over, by clip."""


@dataclass(frozen=True)
class Table:
    """The index of one spec: a row per clip, clips of one unit together."""

    columns: dict[str, Values]
    units: bytes
    """JSON lines, one per unit."""

    def __len__(self) -> int:
        return len(self.columns["clip"])

    @property
    def n_tokens(self) -> int:
        """Rows of the dataset `tokens`."""
        return int(self.columns["valid_len"].sum(dtype=np.int64))

    @property
    def crc32c(self) -> int:
        """The index's own checksum, `index_crc32c`."""
        return crc([*self.columns.values(), np.frombuffer(self.units, np.uint8)])

    def equals(self, other: Table) -> bool:
        """True if the other table says the same of the same clips."""
        same = (np.array_equal(self.columns[name], other.columns[name]) for name in COLUMNS)
        return self.units == other.units and all(same)

    def key(self, row: int) -> str:
        """Return a clip's token key."""
        return str(self.columns["clip"][row].decode())

    def span(self, row: int) -> slice:
        """Return where a clip stands in `tokens`."""
        start = int(self.columns["offset"][row])
        return slice(start, start + int(self.columns["valid_len"][row]))

    def is_ok(self, row: int) -> bool:
        """True if the clip has tokens."""
        return bool(self.columns["status"][row] == Status.OK.code)


@dataclass(frozen=True)
class _Side:
    """A dataset beside `tokens` that the index does not hold."""

    name: str
    dtype: str
    tail: tuple[int, ...]
    """Shape of one row."""
    fill: float


@dataclass(frozen=True)
class Group:
    """An open group of a file, checked."""

    spec: TokenSpec
    table: Table
    datasets: dict[str, h5py.Dataset]
    """`tokens` and what stands beside them."""


def crc(parts: Sequence[Values]) -> int:
    """Return the CRC-32C of several little-endian arrays, one after the other."""
    value = 0
    for part in parts:
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        value = crc32c_library.crc32c(data, value)
    return value


def side_arrays(spec: TokenSpec) -> list[_Side]:
    """Return what is stored beside the tokens, the checksum of it last."""
    plans = [p for p in layout.arrays(spec) if p.name != "tokens" and not p.is_derived]
    sides = [
        _Side(
            p.name,
            np.dtype(p.dtype).newbyteorder("<").str,
            p.tail[1:] if p.name in PER_TOKEN else p.tail,
            p.fill,
        )
        for p in plans
    ]
    return [*sides, _Side("side_crc32c", "<u4", (), 0)] if sides else []


def group_name(spec: TokenSpec) -> str:
    """Return the name of a spec's group."""
    return f"{spec.stream}-{spec.spec_id}"


def counts(table: Table) -> Counter[Status]:
    """Return how many clips have which status."""
    codes = Counter(table.columns["status"].tolist())
    return Counter({status: codes[status.code] for status in Status if codes[status.code]})


@contextmanager
def opened(path: Path) -> Iterator[list[Group]]:
    """Open a file for reading and check all of it except the tokens."""
    if path.name.endswith(".partial"):
        raise StoreError(
            f"{path}: an export that was interrupted. Run the same `emocache store export` again to "
            "finish it."
        )
    require_hdf5(path)
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be opened as HDF5 ({first_line(error)}). It is truncated, damaged or "
            "being written; nothing was changed. Copy or export it again."
        ) from None
    with file:
        yield checked(file, path)


def require_hdf5(path: Path) -> None:
    """Raise StoreError unless the file is there and is HDF5."""
    if not path.exists():
        raise StoreError(
            f"{path}: no such file. Make one with: emocache store export STORE --hdf5 FILE"
        )
    if not path.is_file() or not h5py.is_hdf5(path):
        raise StoreError(
            f"{path}: not an HDF5 file. Nothing was changed; give a file that `emocache store export "
            "--hdf5` wrote, or for an export a path that is free."
        )


def checked(file: h5py.File, path: Path) -> list[Group]:
    """Check all of a file except the tokens."""
    with careful(path):
        check_format(file, path)
        return [_open_group(file, name, path) for name in sorted(file)]


@contextmanager
def careful(path: Path) -> Iterator[None]:
    """Put what h5py raises for a file that it cannot represent into one line."""
    try:
        yield
    except EmocacheError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: holds what emocache never writes ({first_line(error)}). Nothing was changed; "
            "copy or export the file again."
        ) from error


def check_format(file: h5py.File, path: Path) -> None:
    """Raise StoreError unless the file is an export of a version that is known."""
    try:
        name = _text(file, "format", str(path))
    except StoreError:
        name = ""
    if name != FORMAT_NAME:
        raise StoreError(
            f"{path}: an HDF5 file, but not one of emocache (no attribute format = {FORMAT_NAME}). "
            "Nothing was changed; give a file that `emocache store export --hdf5` wrote."
        )
    version = _number(file, "format_version", str(path))
    if not 0 < version <= FORMAT_VERSION:
        raise StoreError(
            f"{path}: format version {version}, this emocache reads up to {FORMAT_VERSION}. Update "
            "emocache; nothing was changed."
        )


def _refused(where: str, what: str) -> StoreError:
    return StoreError(
        f"{where}: {what}, which emocache never writes. Nothing was changed; copy or export the file "
        "again, or ask whoever made it."
    )


def _attribute(node: h5py.Group | h5py.Dataset, name: str, where: str, kinds: str) -> Any:
    """Return a scalar attribute after a look at its type and size."""
    if name not in node.attrs:
        raise _refused(where, f"no attribute {name!r}")
    found = node.attrs.get_id(name)
    if found.dtype.kind not in kinds or found.shape or found.dtype.itemsize > _MAX_TEXT_BYTES:
        raise _refused(where, f"attribute {name!r} of type {found.dtype} and shape {found.shape}")
    return node.attrs[name]


def _text(node: h5py.Group | h5py.Dataset, name: str, where: str) -> str:
    return bytes(_attribute(node, name, where, "S")).decode("utf-8", errors="replace")


def _number(node: h5py.Group, name: str, where: str) -> int:
    return int(_attribute(node, name, where, "iu"))


def _node(parent: h5py.Group, name: str, kind: type, where: str) -> Any:
    """Open a group or dataset that stands in this file."""
    link = parent.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise _refused(where, f"{name!r} is a link that leads elsewhere ({type(link).__name__})")
    node = parent[name]
    if not isinstance(node, kind):
        raise _refused(where, f"{name!r} is a {type(node).__name__}")
    return node


def _dataset(
    group: h5py.Group, name: str, dtype: str, shape: tuple[int | None, ...], where: str
) -> h5py.Dataset:
    """Open a dataset of the expected type and shape whose bytes all stand in this file.

    Args:
        group: Where it is.
        name: Its name.
        dtype: Exactly this.
        shape: None for an axis of any length.
        where: For messages.
    """
    if name not in group:
        raise _refused(where, f"no dataset {name!r}")
    found = _node(group, name, h5py.Dataset, where)
    if found.dtype != np.dtype(dtype) or found.dtype.hasobject:
        raise _refused(where, f"{name!r} holds {found.dtype} instead of {np.dtype(dtype)}")
    fits = found.shape is not None and len(found.shape) == len(shape)
    if not fits or any(b not in (None, a) for a, b in zip(found.shape, shape, strict=True)):
        wanted = tuple("any" if n is None else n for n in shape)
        raise _refused(where, f"{name!r} has shape {found.shape} instead of {wanted}")
    properties = found.id.get_create_plist()
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count():
        raise _refused(
            where, f"{name!r} is chunked, compressed or kept outside the file (h5repack does that)"
        )
    # A shape costs nothing to declare: what is not in the file is not read.
    start, size = found.id.get_offset(), os.fstat(found.file.id.get_vfd_handle()).st_size
    if found.nbytes and (start is None or start + found.nbytes > size):
        raise _refused(
            where,
            f"{name!r} claims {found.nbytes} bytes in a file of {size}, or has no place in it",
        )
    return found


def _open_group(file: h5py.File, name: str, path: Path) -> Group:
    where = f"{path}, group {name!r}"
    group = _node(file, name, h5py.Group, where)
    for member in group:
        _node(group, member, h5py.Dataset, where)
    spec = _spec(group, name, where)
    table = _read_table(group, spec, where)
    dtype = np.dtype(STORED_DTYPES[spec.dtype]).newbyteorder("<").str
    shape = (table.n_tokens, *spec.max_shape[1:])
    datasets = {"tokens": _dataset(group, "tokens", dtype, shape, where)}
    for side in side_arrays(spec):
        n_rows = table.n_tokens if side.name in PER_TOKEN else len(table)
        shape = (n_rows, *side.tail)
        datasets[side.name] = _dataset(group, side.name, side.dtype, shape, where)
    return Group(spec, table, datasets)


def _spec(group: h5py.Group, name: str, where: str) -> TokenSpec:
    spec = parse(TokenSpec, _text(group, "spec", where), where)
    stated = _text(group, "spec_id", where)
    if not spec.is_resolved or spec.spec_id != stated or group_name(spec) != name:
        raise StoreError(
            f"{where}: the spec does not hash to its spec_id {stated!r}. The text was edited or "
            "damaged; export the file again. Nothing was changed."
        )
    shape = spec.max_shape
    n_bytes = math.prod(shape) * np.dtype(STORED_DTYPES[spec.dtype]).itemsize
    if n_bytes > _MAX_CLIP_BYTES or shape[0] > _MAX_VALID_LEN:
        raise _refused(where, f"the spec allows clips of {shape} tokens")
    return spec


def parse(model: type[M], text: str | bytes, where: str) -> M:
    """Validate JSON of unknown origin, by pydantic's parser: it bounds nesting and numbers."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise SchemaError(f"{where}: {describe(model, error)}. Nothing was changed.") from None


def _read_table(group: h5py.Group, spec: TokenSpec, where: str) -> Table:
    n_clips = _dataset(group, "clip", "S64", (None,), where).shape[0]
    text = _dataset(group, "units", "<u1", (None,), where)
    if n_clips > _MAX_CLIPS:
        raise _refused(where, f"an index of {n_clips} clips")
    columns: dict[str, Values] = {
        name: _dataset(group, name, dtype, (n_clips,), where)[...]
        for name, dtype in COLUMNS.items()
    }
    table = Table(columns, text[...].tobytes())
    if table.crc32c != _number(group, "index_crc32c", where):
        raise CorruptTokensError(
            f"{where}: the index fails its checksum. The file was damaged or edited; copy or export it "
            "again. Nothing was changed."
        )
    wrong = _what_is_wrong(table, spec)
    if wrong is not None:
        raise _refused(where, wrong)
    for number, line in enumerate(table.units.splitlines()):
        parse(Unit, line, f"{where}, line {number} of units")
    return table


def _what_is_wrong(table: Table, spec: TokenSpec) -> str | None:
    """Return the first contradiction in an index; None if it is sound."""
    columns, n_units = table.columns, len(table.units.splitlines())
    keys, status, valid_len = columns["clip"], columns["status"], columns["valid_len"]
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    if not np.isin(np.ascontiguousarray(keys).view(np.uint8), digits).all():
        return "a clip's key that is not 64 hexadecimal digits"
    if len(np.unique(keys)) != len(keys):
        return "one clip twice"
    if not np.isin(status, [s.code for s in Status]).all() or (columns["truncated"] > 1).any():
        return "a status that does not exist"
    is_ok = status == Status.OK.code
    shortest = 1 if spec.stream == "audio" else spec.max_shape[0]
    lengths = valid_len[is_ok]
    if valid_len[~is_ok].any() or (lengths < shortest).any() or (lengths > spec.max_shape[0]).any():
        return f"a valid_len that does not fit {spec.max_shape}"
    total = np.cumsum(valid_len, dtype=np.int64)
    if (columns["offset"] != total - valid_len).any():
        return "clips that overlap or leave gaps"
    numbers = columns["unit"]
    if len(numbers) and (
        numbers[0] < 0 or numbers[-1] >= n_units or (numbers[1:] < numbers[:-1]).any()
    ):
        return "a unit that does not exist, or units out of order"
    return None


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text, in one line."""
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"\s+", " ", text)
