"""The token store: open, commit a unit once, read what is committed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.array import Array

from cache.commit import (
    ClipTokens,
    Commit,
    Entry,
    Index,
    Status,
    build_index,
    read_commit,
    read_index,
    unit_id,
    write_commit,
)
from cache.errors import (
    CacheMissError,
    CorruptTokensError,
    SpecMismatchError,
    StoreError,
)
from cache.files import create_once, fsync_file, fsync_folder, write_aside
from cache.layout import (
    CLIPS_PER_SHARD,
    FORMAT_NAME,
    FORMAT_VERSION,
    ArrayPlan,
    Layout,
    arrays,
    group_attributes,
)
from cache.schema import Model, decode, decode_json
from cache.spec import Stream, TokenSpec, describe_differences, differences

_PROBE_TOLERANCE = 2e-2
"""Largest relative difference of the golden probe: half precision and other devices pass, another
weight, layer or normalisation does not (those differ by far more than a tenth)."""

ZarrArray = Array[Any]
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class StoredTokens:
    """A clip's tokens as read: audio (T, D), video (F, P, D) or image (1 + P, D)."""

    tokens: Floats
    entry: Entry


class _Marker(Model):
    format: Literal["emocache-store"]
    version: int


class TokenStore:
    """A folder of committed tokens; see `cache.layout` for what stands where.

    Readers see committed data only. A store may be read while others write to it; `refresh` shows
    what was committed since.
    """

    def __init__(self, root: Path) -> None:
        """Use `TokenStore.open` or `TokenStore.open_or_create`."""
        self.layout = Layout(root)
        self._indexes: dict[str, Index] = {}
        self._arrays: dict[tuple[str, str], ZarrArray] = {}

    def __repr__(self) -> str:
        return f"TokenStore({str(self.layout.root)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave open arrays behind: a spawned worker opens its own."""
        return {"layout": self.layout, "_indexes": self._indexes, "_arrays": {}}

    @classmethod
    def open(cls, root: Path) -> TokenStore:
        """Open an existing store.

        Raises:
            StoreError: No such folder, not a store, or written by a newer version.
        """
        marker = Layout(root).marker
        if not root.exists():
            raise StoreError(
                f"{root}: no such store. Create it with: emocache extract PRESET --store {root} ..."
            )
        if not marker.is_file():
            raise StoreError(
                f"{root}: not an emocache store (no {marker.name} in it). Give the folder that "
                "`emocache extract --store` wrote; nothing was changed."
            )
        found = decode_json(_Marker, marker.read_bytes(), str(marker))
        if found.version > FORMAT_VERSION:
            raise StoreError(
                f"{root}: store format {found.version}, this version reads up to {FORMAT_VERSION}. "
                "Update emocache; nothing was changed."
            )
        return cls(root)

    @classmethod
    def open_or_create(cls, root: Path) -> TokenStore:
        """Open a store, creating it in an empty or new folder.

        Raises:
            StoreError: The folder holds something else, or cannot be written.
        """
        layout = Layout(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not layout.marker.is_file():
                strangers = sorted(
                    p.name for p in root.iterdir() if not p.name.endswith(".partial")
                )
                if strangers and set(strangers) != {layout.zarr.name}:
                    raise StoreError(
                        f"{root}: not empty and not an emocache store (holds {strangers[0]!r}). "
                        "Give a new or empty folder; nothing was changed."
                    )
                zarr.open_group(layout.zarr, mode="a", zarr_format=3)
                marker = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
                create_once(layout.marker, json.dumps(marker).encode())
        except (NotADirectoryError, FileExistsError):
            raise StoreError(f"{root}: is a file; give a folder for the store.") from None
        except PermissionError as error:
            raise StoreError(f"{root}: cannot be written ({error.strerror}).") from None
        return cls.open(root)

    # ---------------------------------------------------------------- what is in it

    @cached_property
    def specs(self) -> dict[str, TokenSpec]:
        """The stored specs by spec_id."""
        found: dict[str, TokenSpec] = {}
        for path in sorted(self.layout.zarr.glob("*-*/zarr.json")):
            attributes = json.loads(path.read_bytes()).get("attributes", {}).get("emocache")
            if not isinstance(attributes, dict) or "spec" not in attributes:
                continue
            spec = decode(TokenSpec, attributes["spec"], str(path))
            if spec.spec_id != attributes.get("spec_id"):
                raise StoreError(
                    f"{path}: the spec does not hash to its spec_id {attributes.get('spec_id')!r}. "
                    "The metadata was edited or damaged; restore the file from a copy."
                )
            found[spec.spec_id] = spec
        return found

    def refresh(self) -> None:
        """Forget what was read; later calls see what others have committed since."""
        self._indexes.clear()
        self._arrays.clear()
        self.__dict__.pop("specs", None)

    def index(self, spec: TokenSpec) -> Index:
        """Return all committed entries of a spec (read once, see `refresh`)."""
        if spec.spec_id not in self._indexes:
            self._indexes[spec.spec_id] = read_index(self.layout.commits(spec.spec_id))
        return self._indexes[spec.spec_id]

    def resolve(self, wanted: TokenSpec) -> TokenSpec:
        """Return the stored spec that `wanted` means.

        A wanted spec may leave the weights digest open; then one stored spec must fit.

        Raises:
            CacheMissError: The store holds no tokens of this stream at all.
            SpecMismatchError: Only tokens of other specs (the differing fields are listed), or
                several that fit.
        """
        same_stream = [s for s in self.specs.values() if s.stream == wanted.stream]
        fitting = [s for s in same_stream if wanted.accepts(s)]
        if len(fitting) == 1:
            return fitting[0]
        if len(fitting) > 1:
            digests = ", ".join(f"{s.encoder.weights_sha256}" for s in fitting)
            raise SpecMismatchError(
                f"{self.layout.root}: {len(fitting)} stored {wanted.stream} specs fit, of different "
                f"weights. Choose one with tokens.{wanted.stream}.encoder.weights_sha256=... "
                f"Stored: {digests}"
            )
        if not same_stream:
            raise CacheMissError(
                f"{self.layout.root}: holds no {wanted.stream} tokens. "
                "Write them with: emocache extract PRESET --manifest ... --store ..."
            )
        nearest = min(same_stream, key=lambda s: len(differences(wanted, s)))
        fields = differences(wanted, nearest)
        if not wanted.is_resolved:
            fields.pop("encoder.weights_sha256", None)
        raise SpecMismatchError(
            f"{self.layout.root}: no {wanted.stream} tokens of the wanted spec. "
            f"The nearest stored spec is {nearest.spec_id}: {describe_differences(fields)}. "
            "Extract with the wanted settings, or change the settings to the stored ones."
        )

    # ---------------------------------------------------------------- reading

    def entry(self, spec: TokenSpec, key: str, uid: str | None = None) -> Entry:
        """Return what is committed of a clip.

        Raises:
            CacheMissError: Nothing is.
        """
        found = self.index(spec).entries.get(key)
        if found is None:
            raise CacheMissError(
                f"{uid or key[:16]}: no committed {spec.stream} tokens under spec {spec.spec_id} in "
                f"{self.layout.root}. Create them with: emocache extract PRESET --manifest ... "
                f"--store {self.layout.root}"
            )
        return found

    def read(self, spec: TokenSpec, key: str, uid: str | None = None) -> StoredTokens:
        """Read a clip's valid tokens.

        Args:
            spec: A stored spec (`resolve`).
            key: `Record.token_key(spec)`.
            uid: Names the record in errors.

        Raises:
            CacheMissError: Nothing is committed, or the clip is absent or failed.
            CorruptTokensError: The stored bytes fail their checksum.
        """
        entry = self.entry(spec, key, uid)
        if entry.status is not Status.OK:
            raise CacheMissError(
                f"{uid or key[:16]}: the {spec.stream} stream is {entry.status.value}"
                f"{f' ({entry.reason})' if entry.reason else ''}, so there are no tokens. "
                "Mask the stream or leave the clip out."
            )
        try:
            array = self._array(spec, "tokens", rows=entry.row + 1)
            tokens = np.asarray(array[entry.row, : entry.valid_len])
        except (ValueError, OSError) as error:
            raise self._corrupt(spec, entry, uid, str(error)) from error
        if _crc32(tokens) != entry.crc32:
            raise self._corrupt(spec, entry, uid, "CRC-32 differs from the commit record")
        return StoredTokens(tokens, entry)

    def _corrupt(
        self, spec: TokenSpec, entry: Entry, uid: str | None, why: str
    ) -> CorruptTokensError:
        return CorruptTokensError(
            f"{uid or entry.key[:16]}: damaged {spec.stream} tokens, row {entry.row} of "
            f"{self.layout.group(spec)} ({why}). Restore that shard from a copy of the store."
        )

    def _array(self, spec: TokenSpec, name: str, rows: int = 0) -> ZarrArray:
        """Return an array for reading, at least `rows` long.

        Its metadata may be shorter than what is committed if the writer that extended it was
        killed (`_grow`); the commit record is the truth, so the length is corrected in memory.
        """
        known = self._arrays.get((spec.spec_id, name))
        if known is None or known.shape[0] < rows:
            known = zarr.open_array(self.layout.group(spec) / name, mode="r", zarr_format=3)
            if known.shape[0] < rows:
                metadata = replace(known.metadata, shape=(rows, *known.shape[1:]))
                known = ZarrArray(replace(known.async_array, metadata=metadata))
            self._arrays[spec.spec_id, name] = known
        return known

    def frame_times(self, spec: TokenSpec, row: int) -> tuple[list[int], list[float]]:
        """Return the frame indices and presentation times (s) of a row; empty for audio."""
        if spec.frames is None:
            return [], []
        index = np.asarray(self._array(spec, "frame_index", rows=row + 1)[row])
        times = np.asarray(self._array(spec, "frame_pts_s", rows=row + 1)[row])
        return index.tolist(), times.tolist()

    # ---------------------------------------------------------------- writing

    def commit(
        self,
        spec: TokenSpec,
        clips: Sequence[ClipTokens],
        provenance: Mapping[str, str],
        after: Iterable[str] = (),
    ) -> Commit:
        """Write a unit of clips and make it visible, all or nothing, once.

        The steps: claim a shard number (create-once), write the shard and its small arrays, sync,
        read back and compare, create the commit record. A kill before the last step leaves garbage
        that no reader looks at. If another worker committed the same unit meanwhile, its commit is
        returned and this attempt's files are removed.

        Args:
            spec: Must be resolved.
            clips: 1 to `CLIPS_PER_SHARD`, distinct keys.
            provenance: Library versions and device.
            after: Units that recorded some of these clips as failed (see `unit_id`).

        Raises:
            CorruptTokensError: Tokens of another shape, or with NaN or infinity: nothing is written.
            StoreError: The disk is full or cannot be written: nothing becomes visible.
        """
        _check_unit(spec, clips)
        identity = unit_id(spec.spec_id, (c.key for c in clips), after)
        commits = self.layout.commits(spec.spec_id)
        known = commits / f"{identity}.json"
        if known.is_file():
            return read_commit(known)
        shard: int | None = None
        try:
            self._ensure_group(spec)
            shard = self._claim(spec)
            self._grow(spec)
            entries = self._write_shard(spec, shard, clips)
            commit = Commit(
                unit_id=identity,
                spec_id=spec.spec_id,
                shard=shard,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                provenance=dict(provenance),
                n_bytes=sum(p.stat().st_size for p in self._shard_files(spec, shard)),
                clips=tuple(entries),
            )
            won = write_commit(commits, commit)
        except OSError as error:
            if shard is not None:
                self._discard(spec, shard)
            raise StoreError(
                f"{self.layout.root}: cannot write ({error.strerror or error}). Nothing of this unit "
                "became visible; free space or fix the permissions and run the same command again."
            ) from error
        if not won:
            self._discard(spec, shard)
            return read_commit(known)
        self._remember(spec, commit)
        return commit

    def _remember(self, spec: TokenSpec, commit: Commit) -> None:
        index = self._indexes.get(spec.spec_id)
        if index is not None:
            self._indexes[spec.spec_id] = build_index((*index.commits, commit))

    def _ensure_group(self, spec: TokenSpec) -> None:
        """Create a spec's group with empty arrays: whole, by renaming a finished folder."""
        final = self.layout.group(spec)
        if final.is_dir():
            return
        aside = self.layout.root / f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
        try:
            group = zarr.create_group(aside, zarr_format=3, attributes=group_attributes(spec))
            for plan in arrays(spec):
                _create_array(group, plan)
            with contextlib.suppress(OSError):  # another worker was first: the folder is not empty
                aside.rename(final)
            if not final.is_dir():
                raise StoreError(f"{final}: cannot be created; check the folder's permissions.")
            fsync_folder(final.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        self.__dict__.pop("specs", None)

    def _claim(self, spec: TokenSpec) -> int:
        """Take the next free shard number for this attempt alone."""
        folder = self.layout.claims(spec.spec_id)
        folder.mkdir(parents=True, exist_ok=True)
        shard = self._n_claimed(spec)
        while not create_once(folder / f"{shard:08d}", f"pid {os.getpid()}\n".encode()):
            shard += 1
        return shard

    def _n_claimed(self, spec: TokenSpec) -> int:
        names = [p.name for p in self.layout.claims(spec.spec_id).iterdir() if p.name.isdigit()]
        return max(map(int, names), default=-1) + 1

    def _grow(self, spec: TokenSpec) -> None:
        """Make every array long enough for all claimed shards.

        Array metadata is replaced as a whole, so two growing writers may overwrite one another.
        Each therefore writes the length that all *claims* need and looks again afterwards: whoever
        writes last leaves the greatest.
        """
        while True:
            wanted = self._n_claimed(spec) * CLIPS_PER_SHARD
            short = False
            for plan in arrays(spec):
                path = self.layout.group(spec) / plan.name / "zarr.json"
                metadata = json.loads(path.read_bytes())
                if metadata["shape"][0] < wanted:
                    short = True
                    metadata["shape"][0] = wanted
                    with write_aside(path) as aside:
                        aside.write_text(json.dumps(metadata, indent=2))
            if not short:
                return

    def _write_shard(self, spec: TokenSpec, shard: int, clips: Sequence[ClipTokens]) -> list[Entry]:
        dtype = np.dtype(spec.dtype)
        start = shard * CLIPS_PER_SHARD
        rows = slice(start, start + CLIPS_PER_SHARD)
        block = np.zeros((CLIPS_PER_SHARD, *spec.max_shape), dtype)
        small = {
            p.name: np.full((CLIPS_PER_SHARD, *p.tail), p.fill, p.dtype)
            for p in arrays(spec)
            if not p.is_sharded
        }
        entries = []
        for offset, clip in enumerate(clips):
            valid_len, crc32 = 0, None
            if clip.tokens is not None:
                valid_len = len(clip.tokens)
                block[offset, :valid_len] = clip.tokens
                crc32 = _crc32(block[offset, :valid_len])
                if spec.frames is not None:
                    small["frame_index"][offset] = clip.frame_index
                    small["frame_pts_s"][offset] = clip.frame_pts_s
            small["valid_len"][offset] = valid_len
            small["status"][offset] = clip.status.code
            small["clip"][offset] = np.frombuffer(bytes.fromhex(clip.key), np.uint8)
            entries.append(
                Entry(
                    key=clip.key,
                    row=start + offset,
                    status=clip.status,
                    valid_len=valid_len,
                    crc32=crc32,
                    reason=clip.reason,
                    truncated=clip.truncated,
                )
            )
        group = zarr.open_group(self.layout.group(spec), mode="r+", zarr_format=3)
        for name, values in {"tokens": block, **small}.items():
            array = group[name]
            assert isinstance(array, Array)
            array[rows] = values
        for path in self._shard_files(spec, shard):
            fsync_file(path)
            fsync_folder(path.parent)
        read_back = np.asarray(self._array(spec, "tokens", rows=rows.stop)[rows])
        if read_back.tobytes() != block.tobytes():
            raise CorruptTokensError(
                f"{self.layout.group(spec)}: shard {shard} reads back differently from what was "
                "written; nothing was committed. Check the disk and run the command again."
            )
        return entries

    def _shard_files(self, spec: TokenSpec, shard: int) -> list[Path]:
        """Files of one unit that exist (an all-fill part of an array has none)."""
        group = self.layout.group(spec)
        files = [group / plan.name / plan.chunk_file(shard) for plan in arrays(spec)]
        return [f for f in files if f.is_file()]

    def _discard(self, spec: TokenSpec, shard: int) -> None:
        for path in self._shard_files(spec, shard):
            path.unlink(missing_ok=True)

    # ---------------------------------------------------------------- golden probe

    def check_probe(self, spec: TokenSpec, values: Sequence[float]) -> None:
        """Compare the encoder's answer to a fixed input with the one recorded first.

        This catches a library upgrade that changes numbers under the same spec.

        Args:
            spec: A resolved spec.
            values: The answer, a few numbers of order one.

        Raises:
            SpecMismatchError: The answers differ.
        """
        path = self.layout.probe(spec.spec_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        if create_once(path, json.dumps([float(v) for v in values]).encode()):
            return
        recorded = np.asarray(json.loads(path.read_bytes()), np.float64)
        got = np.asarray(values, np.float64)
        worst = math.inf
        if recorded.shape == got.shape:
            scale = max(1e-6, float(np.abs(recorded).max()))
            worst = float(np.abs(recorded - got).max()) / scale
        if not worst <= _PROBE_TOLERANCE:
            raise SpecMismatchError(
                f"{self.layout.root}: the {spec.stream} encoder answers the fixed input differently "
                f"from when spec {spec.spec_id} was first extracted (relative difference "
                f"{worst:.3g}, allowed {_PROBE_TOLERANCE}). A library or device changed its numbers. "
                "Restore the versions that `emocache store show` prints, or use a new store."
            )

    # ---------------------------------------------------------------- summaries

    def streams(self) -> dict[Stream, list[TokenSpec]]:
        """Stored specs by stream."""
        found: dict[Stream, list[TokenSpec]] = {}
        for spec in self.specs.values():
            found.setdefault(spec.stream, []).append(spec)
        return found


def _create_array(group: zarr.Group, plan: ArrayPlan) -> None:
    group.create_array(
        plan.name,
        shape=(0, *plan.tail),
        dtype=plan.dtype,
        chunks=plan.chunk,
        shards=plan.shard,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        fill_value=plan.fill,
        dimension_names=plan.dimensions,
    )


def _check_unit(spec: TokenSpec, clips: Sequence[ClipTokens]) -> None:
    if not 0 < len(clips) <= CLIPS_PER_SHARD or len({c.key for c in clips}) != len(clips):
        raise StoreError(
            f"a unit holds 1 to {CLIPS_PER_SHARD} distinct clips, got {len(clips)} with "
            f"{len({c.key for c in clips})} keys"
        )
    wanted = spec.max_shape
    for clip in clips:
        if (clip.tokens is not None) != (clip.status is Status.OK):
            raise CorruptTokensError(f"{clip.key[:16]}: status {clip.status} and tokens disagree")
        if clip.tokens is None:
            continue
        shape = clip.tokens.shape
        ragged = spec.stream == "audio"
        fits = shape[1:] == wanted[1:] and (
            0 < shape[0] <= wanted[0] if ragged else shape[0] == wanted[0]
        )
        if not fits:
            raise CorruptTokensError(
                f"{clip.key[:16]}: {spec.stream} tokens of shape {shape}, the spec says "
                f"{'up to ' if ragged else ''}{wanted}. The encoder does not fit the spec."
            )
        if not is_storable(clip.tokens, spec):
            raise CorruptTokensError(
                f"{clip.key[:16]}: {spec.stream} tokens hold NaN or infinity as {spec.dtype}. "
                "Nothing was written; check the encoder's precision."
            )


def is_storable(tokens: Floats, spec: TokenSpec) -> bool:
    """True if every value is finite in the spec's stored dtype."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(tokens.astype(spec.dtype, copy=False)).all())


def _crc32(tokens: npt.NDArray[Any]) -> int:
    little = np.ascontiguousarray(tokens, dtype=tokens.dtype.newbyteorder("<"))
    return zlib.crc32(little.data)
