"""One `.npy` file per clip, the layout of older projects: written from a store, or taken into one.

docs/exchange.md describes the folder. A folder of files says nothing of what made its numbers, so what
is imported stands under a spec of its own (`unknown_origin`) that no extraction can ever have.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import ml_dtypes
import numpy as np

from cache.clip import Record
from cache.commit import ClipTokens, Entry, Status
from cache.errors import (
    CacheMissError,
    CorruptTokensError,
    ManifestError,
    SchemaError,
    StoreError,
)
from cache.files import write_aside, write_text_aside
from cache.layout import CLIPS_PER_SHARD
from cache.schema import Model, decode_json
from cache.shards import Values, crc32c
from cache.spec import TokenSpec
from cache.store import TokenStore

DESCRIPTION = "emocache.json"
"""The file that tells what an exported folder holds."""

_VERSION = 1
_SHOWN = 5
"""Names in a message."""
_NAME_BYTES = 200
"""Longest file name from a uid; file systems end at 255."""
_UNSAFE = re.compile(r'^\.|[%/\\:*?"<>|\x00-\x1f\x7f]')

OnClip = Callable[[], None]


class _Unit(Model):
    unit_id: str
    created: str
    provenance: dict[str, str]


class _Row(Model):
    """One clip of a folder."""

    clip: str
    uid: str | None = None
    status: Literal["ok", "absent", "failed", "missing"]
    """`missing`: the store holds nothing of this record."""
    file: str | None = None
    """None unless the status is ok."""
    valid_len: int = 0
    crc32c: int | None = None
    """CRC-32C of the array in the file."""
    stored_crc32c: int | None = None
    """CRC-32C of the tokens in the store: another one where the file's dtype is another."""
    unit: int | None = None
    reason: str | None = None
    remark: str | None = None
    truncated: bool = False
    frame_index: tuple[int, ...] = ()
    frame_pts_s: tuple[float | None, ...] = ()


class _Folder(Model):
    """The content of `emocache.json`."""

    format: Literal["emocache-npy"] = "emocache-npy"
    version: int = _VERSION
    complete: bool
    """False while files are being written."""
    spec_id: str
    spec: TokenSpec
    dtype: str
    """Of the files: bfloat16 and int8 are written as the float32 numbers that they mean."""
    units: tuple[_Unit, ...] = ()
    clips: tuple[_Row, ...] = ()


@dataclass(frozen=True)
class NpyExportReport:
    """What an export to a folder did."""

    folder: Path
    n_written: int
    n_kept: int
    """Files that were there with the right content."""
    without_file: Counter[str] = field(default_factory=Counter)
    """Clips without a file, by status: absent, failed, missing."""

    @property
    def nothing_to_do(self) -> bool:
        """True if every file was there."""
        return self.n_written == 0


@dataclass
class NpyImportReport:
    """What an import from a folder did."""

    spec: TokenSpec
    """What the clips stand under: the declared spec, marked as of unknown origin."""
    imported: Counter[Status] = field(default_factory=Counter)
    """Clips committed by this run."""
    n_known: int = 0
    """Clips that the store had."""
    failures: dict[str, str] = field(default_factory=dict)
    """Files that were recorded as failed, with the reason."""
    n_without_file: int = 0
    """Records of which the folder has no file; nothing is recorded of them."""


def safe_name(uid: str) -> str:
    """Return a uid as a file name: what file systems refuse is percent-encoded, `/` as `%2F`."""
    return _UNSAFE.sub(lambda found: f"%{ord(found[0]):02X}", uid)


# -------------------------------------------------------------------- export


def export_npy(
    store: TokenStore,
    spec: TokenSpec,
    folder: Path,
    records: Sequence[Record] | None = None,
    on_clip: OnClip | None = None,
) -> NpyExportReport:
    """Write one `.npy` file per clip that has tokens, and `emocache.json` that describes them.

    Clips that are absent or failed have no file and stand in `emocache.json` with their reason. Run
    again after a kill, or after the store has grown: right files are kept.

    Args:
        store: The store to read.
        spec: A stored spec.
        folder: New, empty, or written by an earlier export of the same spec.
        records: Only these clips, under their uid; None: all clips, under their key.
        on_clip: Called for each clip.

    Raises:
        CacheMissError: The spec is not in the store.
        CorruptTokensError: Stored bytes fail their checksum.
        StoreError: The folder holds something else.
    """
    if spec.spec_id not in store.specs:
        raise CacheMissError(
            f"{store.root}: holds no tokens of spec {spec.spec_id}, so there is nothing to export. "
            f"Stored: {', '.join(store.specs) or 'nothing'}"
        )
    dtype = spec.dtype if spec.dtype in ("float16", "float32") else "float32"
    begun = _Folder(complete=False, spec_id=spec.spec_id, spec=spec, dtype=dtype)
    _require_own(folder, spec)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_aside(folder / DESCRIPTION, _document(begun))
    units, entries = _committed(store, spec)
    rows, n_written = [], 0
    for key, uid in _targets(spec, entries, records):
        row, array = _row(store, spec, key, uid, entries.get(key))
        if row.file is not None and array is not None and not _holds(folder / row.file, array):
            with write_aside(folder / row.file, durable=False) as aside, aside.open("wb") as file:
                np.save(file, array, allow_pickle=False)
            n_written += 1
        rows.append(row)
        if on_clip is not None:
            on_clip()
    done = begun.model_copy(update={"complete": True, "units": units, "clips": tuple(rows)})
    write_text_aside(folder / DESCRIPTION, _document(done))
    n_files = sum(row.file is not None for row in rows)
    without_file = Counter(str(row.status) for row in rows if row.file is None)
    return NpyExportReport(folder, n_written, n_files - n_written, without_file)


def _document(folder: _Folder) -> str:
    """Return a folder's description as JSON, one unit and one clip a line."""
    head = folder.model_dump_json(exclude={"units", "clips"}).removesuffix("}")
    units = ",\n".join(unit.model_dump_json() for unit in folder.units)
    clips = ",\n".join(row.model_dump_json(exclude_defaults=True) for row in folder.clips)
    return f'{head},\n"units":[\n{units}\n],\n"clips":[\n{clips}\n]}}\n'


def _require_own(folder: Path, spec: TokenSpec) -> None:
    """Refuse a folder in which files of others could be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder}: is a file; give a folder for the .npy files.")
    description = folder / DESCRIPTION
    if not description.is_file():
        strangers = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
        if strangers:
            raise StoreError(
                f"{folder}: not empty and not an emocache export (holds {strangers[0]!r}). Give a new "
                "or empty folder; nothing was changed."
            )
        return
    found = decode_json(_Folder, description.read_bytes(), str(description))
    if found.version > _VERSION or found.spec_id != spec.spec_id:
        raise StoreError(
            f"{folder}: holds an export of spec {found.spec_id}, version {found.version}; wanted "
            f"{spec.spec_id}, version {_VERSION}. Give another folder; nothing was changed."
        )


def _committed(
    store: TokenStore, spec: TokenSpec
) -> tuple[tuple[_Unit, ...], dict[str, tuple[Entry, int]]]:
    """Return the units, and each clip's entry with the number of its unit."""
    index = store.index(spec)
    units: list[_Unit] = []
    entries = {}
    for commit in store.commits(spec):
        for entry in commit.clips:
            known = index.get(entry.key)
            if known is not None and known.row == entry.row:
                entries[entry.key] = entry, len(units)
        units.append(
            _Unit(
                unit_id=commit.unit_id, created=commit.created, provenance=dict(commit.provenance)
            )
        )
    return tuple(units), entries


def _targets(
    spec: TokenSpec, entries: Mapping[str, object], records: Sequence[Record] | None
) -> Iterator[tuple[str, str | None]]:
    """Yield the key and the uid of each clip to export."""
    if records is None:
        yield from ((key, None) for key in sorted(entries))
    else:
        yield from ((record.token_key(spec), record.uid) for record in records)


def _row(
    store: TokenStore, spec: TokenSpec, key: str, uid: str | None, known: tuple[Entry, int] | None
) -> tuple[_Row, Values | None]:
    """Return a clip's line, and its tokens if there are any."""
    if known is None:
        return _Row(clip=key, uid=uid, status="missing"), None
    entry, unit = known
    row = _Row(
        clip=key,
        uid=uid,
        status=entry.status.value,
        unit=unit,
        reason=entry.reason,
        remark=entry.remark,
        truncated=entry.truncated,
    )
    if entry.status is not Status.OK:
        return row, None
    stored = store.read(spec, key, uid)
    array = stored.tokens
    if array.dtype == ml_dtypes.bfloat16:  # a .npy file has no name for it
        array = array.astype(np.float32)
    index, times = store.frame_times(spec, stored.entry.row)
    name = safe_name(uid) if uid is not None else key
    found = {
        "file": f"{name if len(name.encode()) <= _NAME_BYTES else key}.npy",
        "valid_len": len(array),
        "crc32c": crc32c(array),
        "stored_crc32c": entry.crc32c,
        "frame_index": tuple(index),
        "frame_pts_s": tuple(None if t != t else t for t in times),  # JSON has no NaN
    }
    return row.model_copy(update=found), array


def _holds(path: Path, array: Values) -> bool:
    """True if a file has this content already."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    same = found.dtype == array.dtype and found.shape == array.shape
    return bool(same and crc32c(found) == crc32c(array))


# -------------------------------------------------------------------- import


def unknown_origin(spec: TokenSpec, name: str) -> TokenSpec:
    """Return a declared spec, marked as of unknown origin.

    What weights made the files cannot be known. The weights digest becomes the SHA-256 of
    `origin unknown: <name>`, which is no digest of any weights, so the `spec_id` is that of no
    extraction: reuse by content never mixes the two, nor two folders of different names.

    Args:
        spec: What the files are believed to be; its weights digest is put aside.
        name: A lasting name for the collection. The same one again continues it.

    Raises:
        SchemaError: The name is empty.
    """
    if not name.strip():
        raise SchemaError("an imported collection needs a name, for example 'lab features 2023'")
    return spec.with_weights(hashlib.sha256(f"origin unknown: {name}".encode()).hexdigest())


def import_npy(
    folder: Path,
    store: TokenStore,
    spec: TokenSpec,
    records: Sequence[Record],
    provenance: Mapping[str, str],
    *,
    name: str,
    on_clip: OnClip | None = None,
) -> NpyImportReport:
    """Commit `.npy` files of unknown origin under a declared spec.

    All names, shapes and dtypes are checked before anything is committed. An array of zeros, or with
    NaN or infinity, is recorded as failed: in such folders zeros stand for what could not be read.
    Records without a file are left unknown. Run again after a kill: what is committed is skipped.

    A file, relative to `folder` and without `.npy`, names a record by the first of: uid (with `/` as
    a folder or as `%2F`), source id (the uid after its corpus), media path without suffix, media file
    name without suffix, SHA-256 of the clip.

    Args:
        folder: Where the files are, in sub-folders or not.
        store: Where the clips go.
        spec: What the files are believed to be; see `unknown_origin`.
        records: What the files may belong to.
        provenance: What is known; `origin`, `declared_name` and `imported_from` are added.
        name: A lasting name for the collection; see `unknown_origin`.
        on_clip: Called for each clip that has a file.

    Raises:
        ManifestError: No files, or files that name no record, or several.
        CorruptTokensError: Files of another shape or dtype, or not plain arrays.
        SchemaError: An int8 spec, or no name.
        StoreError: The store cannot be written.
    """
    spec = unknown_origin(spec, name)
    if spec.dtype == "int8":
        raise SchemaError(
            "dtype 'int8' cannot be declared for .npy files: they do not hold its scales. Declare "
            "float16, bfloat16 or float32, whichever the numbers have."
        )
    by_key = _match(folder, spec, records)
    _check_files(folder, spec, by_key)
    facts = {
        **provenance,
        "origin": "unknown",
        "declared_name": name,
        "imported_from": folder.resolve().name,
    }
    keys = {record.token_key(spec) for record in records}
    report = NpyImportReport(spec, n_without_file=len(keys - by_key.keys()))
    wanted = sorted(by_key)
    for start in range(0, len(wanted), CLIPS_PER_SHARD):
        part = wanted[start : start + CLIPS_PER_SHARD]
        _commit(folder, store, {key: by_key[key][0] for key in part}, facts, report)
        for _ in part:
            if on_clip is not None:
                on_clip()
    if report.imported:
        store.write_snapshot(spec)
    return report


def _match(folder: Path, spec: TokenSpec, records: Sequence[Record]) -> dict[str, list[Path]]:
    """Return the files of each token key."""
    files = sorted(path for path in folder.rglob("*.npy") if path.is_file())
    if not files:
        raise ManifestError(f"{folder}: no .npy files there. Give the folder that holds them.")
    tables = _names(spec, records)
    by_key: dict[str, list[Path]] = defaultdict(list)
    unknown: list[str] = []
    ambiguous: list[str] = []
    for path in files:
        shown = path.relative_to(folder).as_posix()
        stem = shown.removesuffix(".npy")
        found: set[str] = next((table[stem] for table in tables if stem in table), set())
        if len(found) == 1:
            by_key[next(iter(found))].append(path)
        else:
            (ambiguous if found else unknown).append(shown)
    if unknown:
        raise ManifestError(
            f"{folder}: {len(unknown)} of {len(files)} files name no record: {_some(unknown)}. A file "
            "is named <uid>.npy, <source id>.npy, <media file name>.npy or <clip sha256>.npy; move "
            "others out, or give the manifest that has them. Nothing was imported."
        )
    if ambiguous:
        raise ManifestError(
            f"{folder}: {len(ambiguous)} of {len(files)} files name several clips: {_some(ambiguous)}. "
            "Name them by uid, with / as %2F. Nothing was imported."
        )
    return dict(by_key)


def _names(spec: TokenSpec, records: Sequence[Record]) -> list[dict[str, set[str]]]:
    """Return what a file's name may be, by rule: name -> token keys."""
    tables: list[dict[str, set[str]]] = [defaultdict(set) for _ in range(5)]
    for record in records:
        key = record.token_key(spec)
        source = record.uid.partition("/")[2] or record.uid
        media = PurePosixPath(record.media).with_suffix("")
        names = (
            {record.uid, safe_name(record.uid)},
            {source, safe_name(source)},
            {str(media)},
            {media.name},
            {record.sha256, key},
        )
        for table, found in zip(tables, names, strict=True):
            for name in found:
                table[name].add(key)
    return tables


def _check_files(folder: Path, spec: TokenSpec, by_key: Mapping[str, Sequence[Path]]) -> None:
    """Look at the headers of all files, and at the content of those that share a clip."""
    wrong = []
    for paths in by_key.values():
        for path in paths:
            why = _what_is_wrong(path, spec)
            if why is not None:
                wrong.append(f"{path.relative_to(folder).as_posix()} ({why})")
    if wrong:
        raise CorruptTokensError(
            f"{folder}: {len(wrong)} files are not {spec.stream} tokens of the declared spec: "
            f"{_some(wrong)}. Convert the files or declare what they are. Nothing was imported."
        )
    for first, *others in by_key.values():
        differing = [p for p in others if crc32c(_load(p)) != crc32c(_load(first))]
        if differing:
            names = [p.relative_to(folder).as_posix() for p in (first, *differing)]
            raise ManifestError(
                f"{folder}: {' and '.join(names)} belong to one clip and differ. Keep the right one. "
                "Nothing was imported."
            )


def _what_is_wrong(path: Path, spec: TokenSpec) -> str | None:
    """Return why a file cannot be tokens of a spec, from its header and size."""
    try:
        array = _map(path)
    except (OSError, ValueError, EOFError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    # A .npy file has no name for bfloat16, so its numbers come as float32.
    dtype = np.dtype("float32" if spec.dtype == "bfloat16" else spec.dtype)
    if array.dtype != dtype:
        return f"{array.dtype}, wanted {dtype}"
    wanted, got = spec.max_shape, array.shape
    if spec.stream == "audio":
        fits = len(got) == len(wanted) and 0 < got[0] <= wanted[0] and got[1:] == wanted[1:]
        return None if fits else f"shape {got}, wanted up to {wanted}"
    return None if got == wanted else f"shape {got}, wanted {wanted}"


def _map(path: Path) -> Values:
    """Open an array without reading it; this function has no way to unpickle.

    Raises:
        ValueError: Not a .npy file, an array of objects, or shorter than its header says.
        OSError: It cannot be read.
    """
    found: Values = np.lib.format.open_memmap(path, mode="r")
    return found


def _load(path: Path) -> Values:
    return np.array(_map(path), order="C")


def _commit(
    folder: Path,
    store: TokenStore,
    files: Mapping[str, Path],
    provenance: Mapping[str, str],
    report: NpyImportReport,
) -> None:
    """Commit one unit of files, except what the store has."""
    spec, index = report.spec, store.index(report.spec)
    clips = []
    for key, path in files.items():
        known = index.get(key)
        clip = None
        if known is None or known.status is Status.FAILED:
            clip = _clip(folder, path, spec, key)
        if clip is not None and clip.reason is not None:
            report.failures[path.relative_to(folder).as_posix()] = clip.reason
        if clip is None or (known is not None and clip.status is Status.FAILED):
            report.n_known += 1
        else:
            clips.append(clip)
    if clips:
        after = {identity for clip in clips for identity in index.failed_in(clip.key)}
        commit = store.commit(spec, clips, provenance, after)
        report.imported.update(entry.status for entry in commit.clips)


def _clip(folder: Path, path: Path, spec: TokenSpec, key: str) -> ClipTokens:
    """Return a file's content as it is committed."""
    array = _load(path)
    if not np.isfinite(array).all():
        return _failed(key, "NaN or infinity in the imported file")
    if not array.any():
        return _failed(key, "all zeros in the imported file")
    if spec.dtype == "bfloat16":
        rounded = array.astype(ml_dtypes.bfloat16)
        if (rounded.astype(np.float32) != array).any():
            raise CorruptTokensError(
                f"{path.relative_to(folder).as_posix()}: its numbers are not bfloat16, so storing "
                "them would round. Declare float32, or convert the files."
            )
        array = rounded
    n_frames = spec.frames.n_frames if spec.frames else 0
    # Which frames they were is not known: the fill values of the store's arrays say so.
    return ClipTokens(
        key,
        Status.OK,
        array,
        frame_index=(-1,) * n_frames,
        frame_pts_s=(float("nan"),) * n_frames,
    )


def _failed(key: str, reason: str) -> ClipTokens:
    return ClipTokens(key, Status.FAILED, reason=reason)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
