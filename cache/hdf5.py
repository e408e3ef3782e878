"""A store as one HDF5 file, to hand on: written, continued, checked, read back.

docs/exchange.md describes the file. The store tells beforehand how large everything is, so the file
is laid out first, complete with its index, and then only bytes are filled in at fixed places: no
kill can damage its structure, and what an interrupted export wrote is known by its checksums.
Datasets are contiguous: without chunks, filters, links or types of variable length there is little
that a hostile file could do, and what a dataset claims can be compared with the size of the file.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import crc32c as crc32c_library
import ml_dtypes
import numpy as np
from pydantic import Field, ValidationError

from cache import layout
from cache.commit import ClipTokens, Entry, Status
from cache.errors import (
    CacheMissError,
    CorruptTokensError,
    EmocacheError,
    MissingDependencyError,
    SchemaError,
    StoreError,
)
from cache.files import fsync_file, fsync_folder
from cache.layout import CLIPS_PER_SHARD, STORED_DTYPES
from cache.quantize import Quantized
from cache.schema import M, Model, describe
from cache.shards import Values, crc32c
from cache.spec import TokenSpec
from cache.store import TokenStore

try:
    import h5py
except ImportError as error:
    raise MissingDependencyError(
        f"HDF5 files need the package h5py ({error}). Install it with: pip install 'emocache[exchange]'"
    ) from error

FORMAT_NAME = "emocache-hdf5"
FORMAT_VERSION = 1

_LIBVER = ("v108", "v108")
"""Checksummed metadata that HDF5 1.8 and later read. Newer bounds mark a file as being written,
and refuse to open it again after a kill."""
_COLUMNS = {
    "clip": "S64",
    "status": "<i1",
    "valid_len": "<i4",
    "offset": "<i8",
    "crc32c": "<u4",
    "truncated": "<u1",
    "unit": "<i4",
}
"""One value per clip, in the order in which `index_crc32c` covers them."""
_PER_TOKEN = {"tokens", "token_scale"}
"""Datasets with a row per token; all others have one per clip."""
_MAX_CLIPS = 2**26
_MAX_CLIP_BYTES = 2**30
_MAX_TEXT_BYTES = 2**20
"""Bounds of what a file may declare, far above what any store holds."""
_MAX_VALID_LEN = 2**16 - 1
"""The store's index keeps lengths in 16 bits."""

OnClip = Callable[[], None]


@dataclass(frozen=True)
class ExportReport:
    """What an export did."""

    path: Path
    n_clips: int
    """In the file, over all specs, of any status."""
    n_written: int
    """Clips with tokens that this run wrote."""
    n_kept: int
    """Clips with tokens that an interrupted run had written, and that were verified."""
    n_bytes: int
    """Size of the file."""
    nothing_to_do: bool = False
    """The file was there, with this content."""
    restarted: str | None = None
    """Why what an interrupted export had written could not be used."""


@dataclass
class ImportReport:
    """What an import did."""

    imported: Counter[Status] = field(default_factory=Counter)
    """Clips committed by this run, over all specs."""
    n_known: int = 0
    """Clips that the store had."""
    n_different: int = 0
    """Of those: clips of which the store holds other bytes or another status, and keeps them."""
    damaged: list[str] = field(default_factory=list)
    """Clips of the file that fail their checksum and were left out, with the reason."""


class _Unit(Model):
    """One line of the dataset `units`: what a commit record says beside numbers."""

    unit_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,24}$")
    created: str
    provenance: dict[str, str]
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why a stream failed, by clip."""
    remarks: dict[str, str] = Field(default_factory=dict)
    """Damage that decoding passed over, by clip."""


@dataclass(frozen=True)
class _Table:
    """The index of one spec: a row per clip, clips of one unit together."""

    columns: dict[str, Values]
    units: bytes
    """JSON lines, one per unit."""

    def __len__(self) -> int:
        return len(self.columns["clip"])

    @property
    def n_tokens(self) -> int:
        return int(self.columns["valid_len"].sum(dtype=np.int64))

    @property
    def crc32c(self) -> int:
        return _crc([*self.columns.values(), np.frombuffer(self.units, np.uint8)])

    def equals(self, other: _Table) -> bool:
        same = (np.array_equal(self.columns[name], other.columns[name]) for name in _COLUMNS)
        return self.units == other.units and all(same)

    def key(self, row: int) -> str:
        return str(self.columns["clip"][row].decode())

    def span(self, row: int) -> slice:
        start = int(self.columns["offset"][row])
        return slice(start, start + int(self.columns["valid_len"][row]))

    def is_ok(self, row: int) -> bool:
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
class _Group:
    """An open group of a file, checked."""

    spec: TokenSpec
    table: _Table
    datasets: dict[str, h5py.Dataset]
    """`tokens` and what stands beside them."""


def _crc(parts: Sequence[Values]) -> int:
    """Return the CRC-32C of several little-endian arrays, one after the other."""
    value = 0
    for part in parts:
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        value = crc32c_library.crc32c(data, value)
    return value


def _sides(spec: TokenSpec) -> list[_Side]:
    plans = [p for p in layout.arrays(spec) if p.name != "tokens" and not p.is_derived]
    sides = [
        _Side(
            p.name,
            np.dtype(p.dtype).newbyteorder("<").str,
            p.tail[1:] if p.name in _PER_TOKEN else p.tail,
            p.fill,
        )
        for p in plans
    ]
    return [*sides, _Side("side_crc32c", "<u4", (), 0)] if sides else []


# -------------------------------------------------------------------- export


def export_hdf5(
    store: TokenStore,
    path: Path,
    specs: Sequence[TokenSpec] | None = None,
    on_clip: OnClip | None = None,
) -> ExportReport:
    """Write committed clips of a store to one HDF5 file.

    The file grows as `<path>.partial` and takes its name when it is whole. Run again after a kill:
    what is there and passes its checksums is kept.

    Args:
        store: The store to read.
        path: The file to make. One that is there already is never written to.
        specs: Stored specs; None for all.
        on_clip: Called for each clip of any status.

    Raises:
        CacheMissError: A spec is not in the store, or the store is empty.
        CorruptTokensError: Stored bytes fail their checksum; the message names the clip.
        StoreError: `path` or `<path>.partial` is something else, another export is at work, or the
            disk cannot be written.
    """
    wanted = [(spec, _table_of(store, spec)) for spec in _chosen(store, specs)]
    n_clips = sum(len(table) for _, table in wanted)
    partial = path.with_name(f"{path.name}.partial")
    if os.path.lexists(path):
        _require_same(path, wanted)
        if partial.exists() and partial.samefile(path):
            partial.unlink()  # killed between its two names
        return ExportReport(path, n_clips, 0, 0, path.stat().st_size, nothing_to_do=True)
    with _writing(partial):
        path.parent.mkdir(parents=True, exist_ok=True)
    is_begun, restarted = _is_begun(partial, wanted)
    if not is_begun:
        with _writing(partial):
            _lay_out(partial, wanted)
    with _locked(partial) as file:
        groups = _checked(file, partial)
        if not _is_same(groups, wanted):
            raise StoreError(f"{partial}: another export began it meanwhile. Give another path.")
        n_written, n_kept = _fill(file, groups, store, is_begun, on_clip or _ignore)
    with _writing(partial):
        fsync_file(partial)
        try:
            _give_name(partial, path)
        except FileExistsError:
            raise StoreError(
                f"{path}: appeared while the export was written, and was left alone. The export is "
                f"{partial}; give it another name yourself."
            ) from None
    size = path.stat().st_size
    return ExportReport(path, n_clips, n_written, n_kept, size, restarted=restarted)


def _ignore() -> None:
    """Take no note of progress."""


def _chosen(store: TokenStore, specs: Sequence[TokenSpec] | None) -> list[TokenSpec]:
    stored = store.specs
    chosen = list(stored.values()) if specs is None else list(specs)
    unknown = [spec.spec_id for spec in chosen if spec.spec_id not in stored]
    if unknown or not chosen:
        raise CacheMissError(
            f"{store.root}: holds no tokens of spec {unknown[0] if unknown else '(any)'}, so there "
            f"is nothing to export. Stored: {', '.join(stored) or 'nothing'}"
        )
    return sorted(set(chosen), key=_group_name)


def _group_name(spec: TokenSpec) -> str:
    return f"{spec.stream}-{spec.spec_id}"


def _table_of(store: TokenStore, spec: TokenSpec) -> _Table:
    """Return the index of what counts in a store."""
    index = store.index(spec)
    entries: list[Entry] = []
    numbers: list[int] = []
    lines: list[str] = []
    for commit in store.commits(spec):
        clips = [e for e in commit.clips if (known := index.get(e.key)) and known.row == e.row]
        if not clips:
            continue
        unit = _Unit(
            unit_id=commit.unit_id,
            created=commit.created,
            provenance=commit.provenance,
            reasons={e.key: e.reason for e in clips if e.reason is not None},
            remarks={e.key: e.remark for e in clips if e.remark is not None},
        )
        numbers += [len(lines)] * len(clips)
        entries += clips
        lines.append(unit.model_dump_json() + "\n")
    lengths = np.array([e.valid_len for e in entries], np.int64)
    values: dict[str, Any] = {
        "clip": [e.key.encode() for e in entries],
        "status": [e.status.code for e in entries],
        "valid_len": lengths,
        "offset": np.cumsum(lengths) - lengths,
        "crc32c": [e.crc32c or 0 for e in entries],
        "truncated": [e.truncated for e in entries],
        "unit": numbers,
    }
    columns: dict[str, Values] = {n: np.array(values[n], dtype) for n, dtype in _COLUMNS.items()}
    return _Table(columns, "".join(lines).encode())


Wanted = Sequence[tuple[TokenSpec, _Table]]


def _require_same(path: Path, wanted: Wanted) -> None:
    with _opened(path) as groups:
        if not _is_same(groups, wanted):
            raise StoreError(
                f"{path}: is an emocache export of other clips than the store holds now. Nothing was "
                "changed; give another path, or remove the file to export again."
            )


def _is_same(groups: Sequence[_Group], wanted: Wanted) -> bool:
    there = {group.spec.spec_id: group.table for group in groups}
    return there.keys() == {spec.spec_id for spec, _ in wanted} and all(
        there[spec.spec_id].equals(table) for spec, table in wanted
    )


def _is_begun(partial: Path, wanted: Wanted) -> tuple[bool, str | None]:
    """Return whether an interrupted export left a file of the same clips, and why not.

    One of ours that is of no use is removed; anything else is refused.
    """
    if not os.path.lexists(partial):
        return False, None
    with _locked(partial) as file:
        with _careful(partial):
            _check_format(file, partial)
        try:
            if _is_same(_checked(file, partial), wanted):
                return True, None
            why = "the store holds other clips than when the interrupted export began"
        except (StoreError, SchemaError, CorruptTokensError) as error:
            why = f"what an interrupted export left is damaged ({error})"
        partial.unlink()  # locked, so nobody else is filling it
    return False, why


def _lay_out(partial: Path, wanted: Wanted) -> None:
    """Make a file that lacks nothing but the tokens and what stands beside them."""
    aside = partial.with_name(f".{partial.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    try:
        with h5py.File(aside, "x", libver=_LIBVER, locking="best-effort") as file:
            _describe(file, {})
            for spec, table in wanted:
                _add_group(file, spec, table)
        fsync_file(aside)
        _give_name(aside, partial)
    except FileExistsError:
        pass  # another export was quicker: its lock and its index are looked at next
    finally:
        aside.unlink(missing_ok=True)


def _describe(node: h5py.Group, attributes: Mapping[str, str | int]) -> None:
    """Set attributes: numbers, and text of fixed length."""
    common: dict[str, str | int] = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION}
    for name, value in {**common, **attributes}.items():
        node.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)


def _add_group(file: h5py.File, spec: TokenSpec, table: _Table) -> None:
    group = file.create_group(_group_name(spec))
    values = layout.group_attributes(spec)["emocache"]["how_to_read"].partition("== 0")[2]
    _describe(
        group,
        {
            "spec_id": spec.spec_id,
            "spec": spec.canonical_json(),
            "status_codes": json.dumps({s.value: s.code for s in Status}),
            "how_to_read": "row r of clip, status, offset and valid_len is one clip; its tokens are "
            f"tokens[offset[r] : offset[r] + valid_len[r]] where status[r] == 0{values}. token_scale, "
            "if there, has the rows of tokens; line unit[r] of units says what made the clip. crc32c is the "
            "CRC-32C of the clip's bytes in tokens",
            "index_crc32c": table.crc32c,
        },
    )
    for name, column in table.columns.items():
        _add(group, name, column.dtype.str, column.shape)[...] = column
    text = np.frombuffer(table.units, np.uint8)
    _add(group, "units", "<u1", text.shape)[...] = text
    dtype = np.dtype(STORED_DTYPES[spec.dtype]).newbyteorder("<").str
    tokens = _add(group, "tokens", dtype, (table.n_tokens, *spec.max_shape[1:]))
    if spec.dtype == "bfloat16":
        tokens.attrs["torch_dtype"] = np.bytes_(b"bfloat16")
    for side in _sides(spec):
        n_rows = table.n_tokens if side.name in _PER_TOKEN else len(table)
        _add(group, side.name, side.dtype, (n_rows, *side.tail), side.fill)


def _add(
    group: h5py.Group, name: str, dtype: str, shape: tuple[int, ...], fill: float = 0
) -> h5py.Dataset:
    """Create a dataset whose place in the file is settled now."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    # Zeros come from the file system, without being written.
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER if fill == 0 else h5py.h5d.FILL_TIME_ALLOC)
    return group.create_dataset(name, shape, dtype, fillvalue=fill or None, dcpl=properties)


def _fill(
    file: h5py.File, groups: Sequence[_Group], store: TokenStore, is_begun: bool, on_clip: OnClip
) -> tuple[int, int]:
    """Write every clip that is not there yet; return how many were written and how many kept."""
    partial = Path(file.filename)
    n_written = n_kept = 0
    for group in groups:
        table = group.table
        last_of_unit = np.append(np.diff(table.columns["unit"]) != 0, True)
        for row in range(len(table)):
            if table.is_ok(row):
                if is_begun and _why_damaged(group, row, _read(group, row)) is None:
                    n_kept += 1
                else:
                    found = _from_store(group, row, store)
                    with _writing(partial):
                        _write(group, row, found)
                    n_written += 1
            on_clip()
            if last_of_unit[row]:
                with _writing(partial):
                    file.flush()
    return n_written, n_kept


def _from_store(group: _Group, row: int, store: TokenStore) -> dict[str, Values]:
    """Return what a store holds of a clip, by dataset."""
    spec, table = group.spec, group.table
    stored, entry = store.read_stored(spec, table.key(row))
    if entry.crc32c != table.columns["crc32c"][row]:
        raise StoreError(
            f"{store.root}: clip {entry.key[:16]} changed while it was exported. Run the same "
            "command again."
        )
    beside: dict[str, Any] = {}
    if spec.frames is not None:
        beside["frame_index"], beside["frame_pts_s"] = store.frame_times(spec, entry.row)
    if isinstance(stored, Quantized):
        beside["token_scale"] = stored.token_scale
        beside["channel_exponent"] = stored.channel_exponent
        stored = stored.values
    sides: dict[str, Values] = {
        s.name: np.asarray(beside[s.name], s.dtype) for s in _sides(spec) if s.name in beside
    }
    if sides:
        sides["side_crc32c"] = np.asarray(_crc(list(sides.values())), "<u4")
    return {"tokens": stored, **sides}


def _write(group: _Group, row: int, found: Mapping[str, Values]) -> None:
    for name, values in found.items():
        group.datasets[name][_place(group, name, row)] = values


def _place(group: _Group, name: str, row: int) -> slice | int:
    """Return where a clip stands in a dataset: among the tokens, or among the clips."""
    return group.table.span(row) if name in _PER_TOKEN else row


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises either, the system's number in its text
        stated = re.search(r"\berrno = (\d+)", str(error))
        number = stated[1] if stated else getattr(error, "errno", None)
        why = os.strerror(int(number)) if number else _first_line(error)
        raise StoreError(
            f"{partial}: cannot be written ({why}). What is there stays; free space or fix the "
            "permissions and run the same command again."
        ) from error


@contextmanager
def _locked(partial: Path) -> Iterator[h5py.File]:
    """Open an unfinished export of ours for writing, alone."""
    _require_hdf5(partial)
    try:
        file = h5py.File(partial, "r+", libver=_LIBVER, locking="best-effort")
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            raise StoreError(
                f"{partial}: another export is writing it, or it may not be written. Wait for that "
                "one, or give another path."
            ) from None
        raise StoreError(
            f"{partial}: cannot be opened ({_first_line(error)}). Remove it to export from the start."
        ) from None
    try:
        yield file
    finally:
        with _writing(partial):
            file.close()


def _give_name(source: Path, target: Path) -> None:
    """Rename a file, unless the name is taken.

    Raises:
        FileExistsError: It is.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links, such as a memory stick's
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        source.rename(target)
    else:
        source.unlink()
    fsync_folder(target.parent)


# -------------------------------------------------------------------- import


def inspect_hdf5(path: Path) -> list[tuple[TokenSpec, Counter[Status]]]:
    """Check that a file is an export of ours; return its specs and how many clips have which status.

    Its index is checked whole; the checksums of the tokens are not.

    Raises:
        StoreError: Not an HDF5 file, not ours, of a newer version, or unsafe to read.
        SchemaError: Its text does not decode.
        CorruptTokensError: Its index is damaged.
    """
    with _opened(path) as groups:
        return [(group.spec, _counts(group.table)) for group in groups]


def _counts(table: _Table) -> Counter[Status]:
    codes = Counter(table.columns["status"].tolist())
    return Counter({status: codes[status.code] for status in Status if codes[status.code]})


def import_hdf5(path: Path, store: TokenStore, on_clip: OnClip | None = None) -> ImportReport:
    """Commit the clips of an export to a store, except those that it has; bytes stay the same.

    The whole index is checked first: a file that is not ours changes nothing. A clip whose bytes fail
    their checksum is left out and reported. Run again after a kill: what is committed is skipped.

    Args:
        path: A file of `export_hdf5`.
        store: Where the clips go; `inspect_hdf5` first, if it is to be created.
        on_clip: Called for each clip of the file.

    Raises:
        StoreError: Not an HDF5 file, not ours, of a newer version, or unsafe to read; or the store
            cannot be written.
        SchemaError: The file's text does not decode.
        CorruptTokensError: The file's index is damaged, or tokens are not finite.
    """
    report = ImportReport()
    with _opened(path) as groups:
        for group in groups:
            _import_group(group, path.name, store, report, on_clip or _ignore)
    return report


def _import_group(
    group: _Group, origin: str, store: TokenStore, report: ImportReport, on_clip: OnClip
) -> None:
    table = group.table
    wanted = _missing(group, store, report)
    units = [_parse(_Unit, line, origin) for line in table.units.splitlines()]
    bounds = np.searchsorted(table.columns["unit"], np.arange(len(units) + 1)).tolist()
    for unit, start, end in zip(units, bounds, bounds[1:], strict=False):
        for first in range(start, end, CLIPS_PER_SHARD):
            rows = range(first, min(first + CLIPS_PER_SHARD, end))
            clips = [_clip(group, row, unit, report) for row in rows if wanted[row]]
            _commit(group.spec, [c for c in clips if c is not None], unit, origin, store, report)
            for _ in rows:
                on_clip()


def _missing(group: _Group, store: TokenStore, report: ImportReport) -> Values:
    """Return which rows the store lacks; one that failed there is wanted if it did not fail here."""
    columns = group.table.columns
    known = store.index(group.spec).locate([group.table.key(r) for r in range(len(group.table))])
    failed = Status.FAILED.code
    is_better = (known.status == failed) & (columns["status"] != failed)
    wanted: Values = (known.status < 0) | is_better
    settled = ~wanted & (columns["status"] != failed)
    other = (known.status != columns["status"]) | (known.crc32c != columns["crc32c"])
    report.n_known += int((~wanted).sum())
    report.n_different += int((settled & other).sum())
    return wanted


def _clip(group: _Group, row: int, unit: _Unit, report: ImportReport) -> ClipTokens | None:
    """Return a clip as it is committed; None if its bytes are damaged."""
    spec, table = group.spec, group.table
    key = table.key(row)
    status = next(s for s in Status if s.code == table.columns["status"][row])
    remark = unit.remarks.get(key)
    truncated = bool(table.columns["truncated"][row])
    if status is not Status.OK:
        reason = unit.reasons.get(key)
        return ClipTokens(key, status, reason=reason, remark=remark, truncated=truncated)
    found = _read(group, row)
    why = _why_damaged(group, row, found)
    if why is not None:
        report.damaged.append(f"{spec.stream} of {key[:16]}: {why}")
        return None
    tokens: Values | Quantized = found["tokens"]
    if spec.dtype == "bfloat16":
        tokens = found["tokens"].view(ml_dtypes.bfloat16)
    elif spec.dtype == "int8":
        tokens = Quantized(found["tokens"], found["token_scale"], found["channel_exponent"])
    return ClipTokens(
        key,
        status,
        tokens,
        remark=remark,
        truncated=truncated,
        frame_index=tuple(found["frame_index"].tolist()) if spec.frames else (),
        frame_pts_s=tuple(found["frame_pts_s"].tolist()) if spec.frames else (),
    )


def _read(group: _Group, row: int) -> dict[str, Values]:
    """Read what the file holds of a clip with tokens."""
    return {
        name: np.asarray(dataset[_place(group, name, row)])
        for name, dataset in group.datasets.items()
    }


def _why_damaged(group: _Group, row: int, found: Mapping[str, Values]) -> str | None:
    if crc32c(found["tokens"]) != group.table.columns["crc32c"][row]:
        return "the tokens fail their checksum"
    sides = [found[side.name] for side in _sides(group.spec)]
    if sides and _crc(sides[:-1]) != sides[-1]:
        return "what stands beside the tokens fails its checksum"
    return None


def _commit(
    spec: TokenSpec,
    clips: Sequence[ClipTokens],
    unit: _Unit,
    origin: str,
    store: TokenStore,
    report: ImportReport,
) -> None:
    if not clips:
        return
    # The first origin survives being handed on again.
    first = {"exported_unit": unit.unit_id, "exported_created": unit.created}
    provenance = {**first, **unit.provenance, "imported_from": origin}
    index = store.index(spec)
    after = {identity for clip in clips for identity in index.failed_in(clip.key)}
    commit = store.commit(spec, clips, provenance, after)
    report.imported.update(entry.status for entry in commit.clips)


# -------------------------------------------------------------------- reading with care


@contextmanager
def _opened(path: Path) -> Iterator[list[_Group]]:
    """Open a file for reading and check all of it except the tokens."""
    if path.name.endswith(".partial"):
        raise StoreError(
            f"{path}: an export that was interrupted. Run the same `emocache store export` again to "
            "finish it."
        )
    _require_hdf5(path)
    try:
        file = h5py.File(path, "r", locking="best-effort")
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be opened as HDF5 ({_first_line(error)}). It is truncated, damaged or "
            "being written; nothing was changed. Copy or export it again."
        ) from None
    with file:
        yield _checked(file, path)


def _require_hdf5(path: Path) -> None:
    if not path.exists():
        raise StoreError(
            f"{path}: no such file. Make one with: emocache store export STORE --hdf5 FILE"
        )
    if not path.is_file() or not h5py.is_hdf5(path):
        raise StoreError(
            f"{path}: not an HDF5 file. Nothing was changed; give a file that `emocache store export "
            "--hdf5` wrote, or for an export a path that is free."
        )


def _checked(file: h5py.File, path: Path) -> list[_Group]:
    """Check all of a file except the tokens."""
    with _careful(path):
        _check_format(file, path)
        return [_open_group(file, name, path) for name in sorted(file)]


@contextmanager
def _careful(path: Path) -> Iterator[None]:
    """Put what h5py raises for a file that it cannot represent into one line."""
    try:
        yield
    except EmocacheError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path}: holds what emocache never writes ({_first_line(error)}). Nothing was changed; "
            "copy or export the file again."
        ) from error


def _check_format(file: h5py.File, path: Path) -> None:
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


def _open_group(file: h5py.File, name: str, path: Path) -> _Group:
    where = f"{path}, group {name!r}"
    group = _node(file, name, h5py.Group, where)
    for member in group:
        _node(group, member, h5py.Dataset, where)
    spec = _spec(group, name, where)
    table = _read_table(group, spec, where)
    dtype = np.dtype(STORED_DTYPES[spec.dtype]).newbyteorder("<").str
    shape = (table.n_tokens, *spec.max_shape[1:])
    datasets = {"tokens": _dataset(group, "tokens", dtype, shape, where)}
    for side in _sides(spec):
        n_rows = table.n_tokens if side.name in _PER_TOKEN else len(table)
        shape = (n_rows, *side.tail)
        datasets[side.name] = _dataset(group, side.name, side.dtype, shape, where)
    return _Group(spec, table, datasets)


def _spec(group: h5py.Group, name: str, where: str) -> TokenSpec:
    spec = _parse(TokenSpec, _text(group, "spec", where), where)
    stated = _text(group, "spec_id", where)
    if not spec.is_resolved or spec.spec_id != stated or _group_name(spec) != name:
        raise StoreError(
            f"{where}: the spec does not hash to its spec_id {stated!r}. The text was edited or "
            "damaged; export the file again. Nothing was changed."
        )
    shape = spec.max_shape
    n_bytes = math.prod(shape) * np.dtype(STORED_DTYPES[spec.dtype]).itemsize
    if n_bytes > _MAX_CLIP_BYTES or shape[0] > _MAX_VALID_LEN:
        raise _refused(where, f"the spec allows clips of {shape} tokens")
    return spec


def _parse(model: type[M], text: str | bytes, where: str) -> M:
    """Validate JSON of unknown origin, by pydantic's parser: it bounds nesting and numbers."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise SchemaError(f"{where}: {describe(model, error)}. Nothing was changed.") from None


def _read_table(group: h5py.Group, spec: TokenSpec, where: str) -> _Table:
    n_clips = _dataset(group, "clip", "S64", (None,), where).shape[0]
    text = _dataset(group, "units", "<u1", (None,), where)
    if n_clips > _MAX_CLIPS:
        raise _refused(where, f"an index of {n_clips} clips")
    columns: dict[str, Values] = {
        name: _dataset(group, name, dtype, (n_clips,), where)[...]
        for name, dtype in _COLUMNS.items()
    }
    table = _Table(columns, text[...].tobytes())
    if table.crc32c != _number(group, "index_crc32c", where):
        raise CorruptTokensError(
            f"{where}: the index fails its checksum. The file was damaged or edited; copy or export it "
            "again. Nothing was changed."
        )
    wrong = _what_is_wrong(table, spec)
    if wrong is not None:
        raise _refused(where, wrong)
    for number, line in enumerate(table.units.splitlines()):
        _parse(_Unit, line, f"{where}, line {number} of units")
    return table


def _what_is_wrong(table: _Table, spec: TokenSpec) -> str | None:
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


def _first_line(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return re.sub(r"\s+", " ", text)
