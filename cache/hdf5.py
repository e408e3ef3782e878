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
import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cache import layout
from cache.commit import ClipTokens, Entry, Status
from cache.errors import (
    CacheMissError,
    CorruptTokensError,
    MissingDependencyError,
    SchemaError,
    StoreError,
)
from cache.files import fsync_file, fsync_folder
from cache.hdf5_file import (
    COLUMNS,
    FORMAT_NAME,
    FORMAT_VERSION,
    PER_TOKEN,
    Group,
    Table,
    Unit,
    careful,
    check_format,
    checked,
    counts,
    crc,
    first_line,
    group_name,
    opened,
    parse,
    require_hdf5,
    side_arrays,
)
from cache.layout import CLIPS_PER_SHARD, STORED_DTYPES
from cache.quantize import Quantized
from cache.shards import Values, crc32c
from cache.spec import TokenSpec
from cache.store import TokenStore

try:
    import h5py
except ImportError as error:
    raise MissingDependencyError(
        f"HDF5 files need the package h5py ({error}). Install it with: pip install 'emocache[exchange]'"
    ) from error

_LIBVER = ("v108", "v108")
"""Checksummed metadata that HDF5 1.8 and later read. Newer bounds mark a file as being written,
and refuse to open it again after a kill."""
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
        groups = checked(file, partial)
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
    return sorted(set(chosen), key=group_name)


def _table_of(store: TokenStore, spec: TokenSpec) -> Table:
    """Return the index of what counts in a store."""
    index = store.index(spec)
    entries: list[Entry] = []
    numbers: list[int] = []
    lines: list[str] = []
    for commit in store.commits(spec):
        clips = [e for e in commit.clips if (known := index.get(e.key)) and known.row == e.row]
        if not clips:
            continue
        unit = Unit(
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
    columns: dict[str, Values] = {n: np.array(values[n], dtype) for n, dtype in COLUMNS.items()}
    return Table(columns, "".join(lines).encode())


Wanted = Sequence[tuple[TokenSpec, Table]]


def _require_same(path: Path, wanted: Wanted) -> None:
    with opened(path) as groups:
        if not _is_same(groups, wanted):
            raise StoreError(
                f"{path}: is an emocache export of other clips than the store holds now. Nothing was "
                "changed; give another path, or remove the file to export again."
            )


def _is_same(groups: Sequence[Group], wanted: Wanted) -> bool:
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
        with careful(partial):
            check_format(file, partial)
        try:
            if _is_same(checked(file, partial), wanted):
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


def _add_group(file: h5py.File, spec: TokenSpec, table: Table) -> None:
    group = file.create_group(group_name(spec))
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
    for side in side_arrays(spec):
        n_rows = table.n_tokens if side.name in PER_TOKEN else len(table)
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
    file: h5py.File, groups: Sequence[Group], store: TokenStore, is_begun: bool, on_clip: OnClip
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


def _from_store(group: Group, row: int, store: TokenStore) -> dict[str, Values]:
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
        s.name: np.asarray(beside[s.name], s.dtype) for s in side_arrays(spec) if s.name in beside
    }
    if sides:
        sides["side_crc32c"] = np.asarray(crc(list(sides.values())), "<u4")
    return {"tokens": stored, **sides}


def _write(group: Group, row: int, found: Mapping[str, Values]) -> None:
    for name, values in found.items():
        group.datasets[name][_place(group, name, row)] = values


def _place(group: Group, name: str, row: int) -> slice | int:
    """Return where a clip stands in a dataset: among the tokens, or among the clips."""
    return group.table.span(row) if name in PER_TOKEN else row


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # h5py raises either, the system's number in its text
        stated = re.search(r"\berrno = (\d+)", str(error))
        number = stated[1] if stated else getattr(error, "errno", None)
        why = os.strerror(int(number)) if number else first_line(error)
        raise StoreError(
            f"{partial}: cannot be written ({why}). What is there stays; free space or fix the "
            "permissions and run the same command again."
        ) from error


@contextmanager
def _locked(partial: Path) -> Iterator[h5py.File]:
    """Open an unfinished export of ours for writing, alone."""
    require_hdf5(partial)
    try:
        file = h5py.File(partial, "r+", libver=_LIBVER, locking="best-effort")
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK):
            raise StoreError(
                f"{partial}: another export is writing it, or it may not be written. Wait for that "
                "one, or give another path."
            ) from None
        raise StoreError(
            f"{partial}: cannot be opened ({first_line(error)}). Remove it to export from the start."
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


def inspect_hdf5(path: Path) -> list[tuple[TokenSpec, Counter[Status]]]:
    """Check that a file is an export of ours; return its specs and how many clips have which status.

    Its index is checked whole; the checksums of the tokens are not.

    Raises:
        StoreError: Not an HDF5 file, not ours, of a newer version, or unsafe to read.
        SchemaError: Its text does not decode.
        CorruptTokensError: Its index is damaged.
    """
    with opened(path) as groups:
        return [(group.spec, counts(group.table)) for group in groups]


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
    with opened(path) as groups:
        for group in groups:
            _import_group(group, path.name, store, report, on_clip or _ignore)
    return report


def _import_group(
    group: Group, origin: str, store: TokenStore, report: ImportReport, on_clip: OnClip
) -> None:
    table = group.table
    wanted = _missing(group, store, report)
    units = [parse(Unit, line, origin) for line in table.units.splitlines()]
    bounds = np.searchsorted(table.columns["unit"], np.arange(len(units) + 1)).tolist()
    for unit, start, end in zip(units, bounds, bounds[1:], strict=False):
        for first in range(start, end, CLIPS_PER_SHARD):
            rows = range(first, min(first + CLIPS_PER_SHARD, end))
            clips = [_clip(group, row, unit, report) for row in rows if wanted[row]]
            _commit(group.spec, [c for c in clips if c is not None], unit, origin, store, report)
            for _ in rows:
                on_clip()
    if any(wanted):
        store.write_snapshot(group.spec)


def _missing(group: Group, store: TokenStore, report: ImportReport) -> Values:
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


def _clip(group: Group, row: int, unit: Unit, report: ImportReport) -> ClipTokens | None:
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


def _read(group: Group, row: int) -> dict[str, Values]:
    """Read what the file holds of a clip with tokens."""
    return {
        name: np.asarray(dataset[_place(group, name, row)])
        for name, dataset in group.datasets.items()
    }


def _why_damaged(group: Group, row: int, found: Mapping[str, Values]) -> str | None:
    if crc32c(found["tokens"]) != group.table.columns["crc32c"][row]:
        return "the tokens fail their checksum"
    sides = [found[side.name] for side in side_arrays(group.spec)]
    if sides and crc(sides[:-1]) != sides[-1]:
        return "what stands beside the tokens fails its checksum"
    return None


def _commit(
    spec: TokenSpec,
    clips: Sequence[ClipTokens],
    unit: Unit,
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
