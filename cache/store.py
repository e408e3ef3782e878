"""The token store: open, commit a unit once, read what is committed."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import zarr
from zarr.core.array import Array

from cache import layout
from cache.commit import ClipTokens, Commit, Entry, Status, read_commit, unit_ids
from cache.errors import (
    CacheMissError,
    CorruptTokensError,
    SchemaError,
    SpecMismatchError,
    StoreError,
)
from cache.index import Index, in_parallel, read_index, write_snapshot
from cache.layout import CLIPS_PER_SHARD, FORMAT_NAME, FORMAT_VERSION, ArrayPlan, Compression
from cache.place import open_storage
from cache.quantize import Quantized, dequantize
from cache.schema import Model, decode, decode_json
from cache.shards import Access, Shard, Values, can_read, crc32c, decode_chunk
from cache.spec import TokenSpec, describe_differences, differences
from cache.storage import LocalStorage, Storage
from cache.writer import UnitWriter

_PROBE_TOLERANCE = 2e-2
"""Largest relative difference of the golden probe: half precision and other devices pass, another
weight, layer or normalisation does not (those differ by far more than a tenth)."""

_SNAPSHOT_EVERY = 256
"""Own commits after which a writer refreshes the snapshot, so that others open the store quickly."""

ZarrArray = Array[Any]
logger = logging.getLogger(__name__)

_alive: weakref.WeakSet[TokenStore] = weakref.WeakSet()


@dataclass(frozen=True)
class StoredTokens:
    """A clip's tokens as read: audio (T, D), video (F, P, D) or image (1 + P, D)."""

    tokens: Values
    """Of the spec's dtype (bfloat16 as `ml_dtypes.bfloat16`); float32 for int8 specs."""
    entry: Entry


class Marker(Model):
    """What `store.json` holds."""

    format: Literal["emocache-store"]
    version: int
    compression: Compression = "none"


class TokenStore:
    """A folder or bucket of committed tokens; see `cache.layout` for what stands where.

    Readers see committed data only. A store may be read while others write to it; `refresh` shows
    what was committed since.
    """

    def __init__(self, storage: Storage, compression: Compression = "none") -> None:
        """Use `TokenStore.open` or `TokenStore.open_or_create`."""
        self.storage = storage
        self.compression: Compression = compression
        self._forget()
        _alive.add(self)

    def _forget(self) -> None:
        self._indexes: dict[str, Index] = {}
        self._arrays: dict[tuple[str, str], ZarrArray] = {}
        self._writers: dict[str, UnitWriter] = {}
        self._own_commits: dict[str, int] = {}
        self._plans: dict[str, ArrayPlan | None] = {}
        self._shards: OrderedDict[tuple[str, int, Access], Shard] = OrderedDict()
        self._small: OrderedDict[tuple[str, str, int], Values] = OrderedDict()
        self._lock = threading.Lock()

    def _after_fork(self) -> None:
        """In a forked child: a thread of the parent may have held the lock, and is not here."""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"TokenStore({self.root!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave open arrays and files behind: a spawned worker opens its own."""
        return {
            "storage": self.storage,
            "compression": self.compression,
            "_indexes": self._indexes,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open nothing yet."""
        self.__init__(state["storage"], state["compression"])  # type: ignore[misc]
        self._indexes = state["_indexes"]

    @property
    def root(self) -> str:
        """The store's path or URL."""
        return self.storage.url

    @classmethod
    def open(cls, where: str | Path) -> TokenStore:
        """Open an existing store.

        Args:
            where: A folder, or a URL such as `s3://bucket/prefix`.

        Raises:
            StoreError: No such folder, not a store, or written by a newer version.
        """
        return cls._open(open_storage(where))

    @classmethod
    def _open(cls, storage: Storage) -> TokenStore:
        where = storage.url
        try:
            found = decode_json(Marker, storage.read(layout.MARKER), f"{where}/{layout.MARKER}")
        except (FileNotFoundError, NotADirectoryError):
            if isinstance(storage, LocalStorage) and not storage.root.exists():
                raise StoreError(
                    f"{where}: no such store. Create it with: emocache extract PRESET --store {where} ..."
                ) from None
            raise StoreError(
                f"{where}: not an emocache store (no {layout.MARKER} in it). Give the folder that "
                "`emocache extract --store` wrote; nothing was changed."
            ) from None
        except SchemaError as error:
            raise StoreError(
                f"{str(error).rstrip('.')}. If this is a store, `emocache store doctor` restores the file."
            ) from None
        except OSError as error:
            raise StoreError(f"{where}: cannot be read ({error.strerror or error}).") from None
        if found.version > FORMAT_VERSION:
            raise StoreError(
                f"{where}: store format {found.version}, this version reads up to {FORMAT_VERSION}. "
                "Update emocache; nothing was changed."
            )
        return cls(storage, found.compression)

    @classmethod
    def open_or_create(
        cls,
        where: str | Path,
        *,
        compression: Compression = "none",
        single_committer: bool = False,
    ) -> TokenStore:
        """Open a store for writing, creating it in an empty or new place.

        Args:
            where: A folder, or a URL such as `s3://bucket/prefix`.
            compression: Of a store that is created; an existing one keeps its own.
            single_committer: Permit a bucket that ignores create-once requests: the caller warrants
                that one process at a time writes.

        Raises:
            StoreError: The place holds something else, cannot be written, or cannot keep two writers
                apart.
        """
        storage = open_storage(where)
        if not isinstance(storage, LocalStorage):
            from cache.object_storage import require_exactly_once

            try:
                warning = require_exactly_once(storage, single_committer=single_committer)
            except OSError as error:
                raise StoreError(
                    f"{where}: cannot be written ({error.strerror or error})."
                ) from None
            if warning is not None:
                logger.warning("%s", warning)
        try:
            if layout.MARKER not in storage.names(""):
                _create(storage, compression)
        except (NotADirectoryError, FileExistsError):
            raise StoreError(f"{where}: is a file; give a folder for the store.") from None
        except OSError as error:
            raise StoreError(f"{where}: cannot be written ({error.strerror or error}).") from None
        return cls._open(storage)

    # ---------------------------------------------------------------- what is in it

    @cached_property
    def specs(self) -> dict[str, TokenSpec]:
        """The stored specs by spec_id."""
        keys = [f"{layout.ZARR}/{n}/zarr.json" for n in sorted(self.storage.folders(layout.ZARR))]
        found = in_parallel(self._read_spec, keys, self.storage)
        return {spec.spec_id: spec for spec in found if spec is not None}

    def _read_spec(self, key: str) -> TokenSpec | None:
        where = f"{self.root}/{key}"
        cure = "restore the file from a copy of the store, or run `emocache store doctor`"
        spec_id = key.split("/")[-2].rpartition("-")[2]
        try:
            attributes = json.loads(self.storage.read(key)).get("attributes", {}).get("emocache")
            found = attributes["spec"]
        except (FileNotFoundError, ValueError, AttributeError, TypeError, KeyError) as error:
            if not self.storage.names(layout.commits(spec_id)):
                return None  # someone else's group, or a writer is creating it
            raise StoreError(
                f"{where}: is gone or damaged ({type(error).__name__}: {error}), but tokens are committed "
                f"under it; {cure}."
            ) from None
        try:
            spec = decode(TokenSpec, found, where)
        except SchemaError as error:
            raise StoreError(f"{error}. The metadata was edited or damaged; {cure}.") from None
        if spec.spec_id != spec_id:
            raise StoreError(
                f"{where}: the spec does not hash to its spec_id {spec_id!r}. The metadata was edited "
                f"or damaged; {cure}."
            )
        return spec

    def close(self) -> None:
        """Close every file; the store may still be used and opens them again."""
        with self._lock:
            self._shards.clear()
            self._small.clear()
        self._arrays.clear()

    def refresh(self) -> None:
        """Forget what was read; later calls see what others have committed since."""
        self._forget()
        self.__dict__.pop("specs", None)

    def index(self, spec: TokenSpec) -> Index:
        """Return all committed entries of a spec (read once, see `refresh`)."""
        if spec.spec_id not in self._indexes:
            self._indexes[spec.spec_id] = read_index(self.storage, spec.spec_id)
        return self._indexes[spec.spec_id]

    def catch_up(self, spec: TokenSpec) -> Index:
        """Return the index with what others committed since it was read."""
        index = self.index(spec)
        listed = np.array(unit_ids(self.storage, spec.spec_id), "S24")
        fresh = np.setdiff1d(listed, index.units.ids).tolist()
        for commit in in_parallel(
            lambda name: read_commit(self.storage, spec.spec_id, name.decode()), fresh, self.storage
        ):
            index.add(commit)
        return index

    def commits(self, spec: TokenSpec) -> Iterator[Commit]:
        """Read the commit records of the units that count, one by one."""
        index = self.index(spec)
        for identity in unit_ids(self.storage, spec.spec_id):
            if index.counts_unit(identity):
                yield read_commit(self.storage, spec.spec_id, identity)

    def sources(self, wanted: TokenSpec) -> list[TokenSpec]:
        """Return the stored specs that hold what `wanted` asks for: itself first, then richer ones."""
        found = [spec for spec in self.specs.values() if spec.serves(wanted)]
        return sorted(found, key=lambda spec: (not wanted.accepts(spec), spec.spec_id))

    def resolve(self, wanted: TokenSpec) -> TokenSpec:
        """Return the stored spec that `wanted` means, or a richer one that serves it.

        A wanted spec may leave the weights digest open; then one stored spec must fit.

        Raises:
            CacheMissError: The store holds no tokens of this stream at all.
            SpecMismatchError: Only tokens of other specs (the differing fields are listed), or
                several that fit.
        """
        fitting = self.sources(wanted)
        digests = {spec.encoder.weights_sha256 for spec in fitting}
        if len(digests) > 1:
            raise SpecMismatchError(
                f"{self.root}: {len(fitting)} stored {wanted.stream} specs fit, of different "
                f"weights. Choose one with tokens.{wanted.stream}.encoder.weights_sha256=... "
                f"Stored: {', '.join(sorted(map(str, digests)))}"
            )
        if fitting:
            return fitting[0]
        same_stream = [s for s in self.specs.values() if s.stream == wanted.stream]
        if not same_stream:
            raise CacheMissError(
                f"{self.root}: holds no {wanted.stream} tokens. "
                "Write them with: emocache extract PRESET --manifest ... --store ..."
            )
        nearest = min(same_stream, key=lambda s: len(differences(wanted, s)))
        fields = differences(wanted, nearest)
        if not wanted.is_resolved:
            fields.pop("encoder.weights_sha256", None)
        raise SpecMismatchError(
            f"{self.root}: no {wanted.stream} tokens of the wanted spec. "
            f"The nearest stored spec is {nearest.spec_id}: {describe_differences(fields)}. "
            "Extract with the wanted settings, or change the settings to the stored ones."
        )

    # ---------------------------------------------------------------- reading

    def entry(self, spec: TokenSpec, key: str, uid: str | None = None) -> Entry:
        """Return what is committed of a clip.

        Raises:
            CacheMissError: Nothing is.
        """
        found = self.index(spec).get(key)
        if found is None:
            raise CacheMissError(
                f"{uid or key[:16]}: no committed {spec.stream} tokens under spec {spec.spec_id} in "
                f"{self.root}. Create them with: emocache extract PRESET --manifest ... "
                f"--store {self.root}"
            )
        return found

    def clip_tokens(self, spec: TokenSpec, entry: Entry) -> ClipTokens:
        """Return a committed clip as what `commit` takes, checked, and not converted in any way.

        Raises:
            CorruptTokensError: The stored bytes fail their checksum.
        """
        tokens: Values | Quantized | None = None
        index: list[int] = []
        times: list[float] = []
        if entry.status is Status.OK:
            tokens, entry = self.read_stored(spec, entry.key)
            if spec.dtype == "bfloat16":
                assert not isinstance(tokens, Quantized)
                tokens = tokens.view(ml_dtypes.bfloat16)
            index, times = self.frame_times(spec, entry.row)
        return ClipTokens(
            entry.key,
            entry.status,
            tokens,
            entry.reason,
            entry.remark,
            entry.truncated,
            tuple(index),
            tuple(times),
        )

    def find(self, sources: Sequence[TokenSpec], key: str) -> tuple[TokenSpec, Entry] | None:
        """Return the first source that has a clip, and its entry; a failed one only if no other has.

        Args:
            sources: Stored specs, from `sources`.
            key: Token key, equal under all of them.
        """
        failed = None
        for spec in sources:
            entry = self.index(spec).get(key)
            if entry is not None and entry.status is not Status.FAILED:
                return spec, entry
            failed = failed or (None if entry is None else (spec, entry))
        return failed

    def ok_entry(self, spec: TokenSpec, key: str, uid: str | None = None) -> Entry:
        """Return a clip's entry if there are tokens.

        Raises:
            CacheMissError: Nothing is committed, or the clip is absent or failed.
        """
        entry = self.entry(spec, key, uid)
        if entry.status is not Status.OK:
            raise CacheMissError(
                f"{uid or key[:16]}: the {spec.stream} stream is {entry.status.value}"
                f"{f' ({entry.reason})' if entry.reason else ''}, so there are no tokens. "
                "Mask the stream or leave the clip out."
            )
        return entry

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
        stored, entry = self.read_stored(spec, key, uid)
        if isinstance(stored, Quantized):
            return StoredTokens(dequantize(stored), entry)
        if spec.dtype == "bfloat16":
            return StoredTokens(stored.view(ml_dtypes.bfloat16), entry)
        return StoredTokens(stored, entry)

    def read_stored(
        self, spec: TokenSpec, key: str, uid: str | None = None
    ) -> tuple[Values | Quantized, Entry]:
        """Read a clip's valid tokens as they are stored: bfloat16 as uint16 bits, int8 with scales.

        Raises:
            CacheMissError: Nothing is committed, or the clip is absent or failed.
            CorruptTokensError: The stored bytes fail their checksum.
        """
        entry = self.ok_entry(spec, key, uid)
        try:
            return self._read_stored(spec, entry, uid), entry
        except FileNotFoundError:
            # Compaction moved the clip, and garbage collection removed the old shard: look again.
            self.refresh()
            moved = self.ok_entry(spec, key, uid)
            if moved.row == entry.row:
                raise self.corrupt(spec, entry, uid, "its shard is gone") from None
            return self.read_stored(spec, key, uid)

    def _read_stored(self, spec: TokenSpec, entry: Entry, uid: str | None) -> Values | Quantized:
        plan = self.plan(spec)
        try:
            if plan is None:
                tokens = self.read_with_zarr(spec, entry)
                checksum = crc32c(tokens)
            else:
                tokens = np.empty((entry.valid_len, *plan.tail[1:]), plan.dtype)
                number, place = divmod(entry.row, CLIPS_PER_SHARD)
                found = self.shard(spec, number).read_into(tokens, place, check=True)
                assert found is not None
                checksum = found
            if checksum != entry.crc32c:
                raise CorruptTokensError("CRC-32C differs from the commit record")
            if spec.dtype != "int8":
                return tokens
            return Quantized(tokens, *self.scales(spec, entry))
        except FileNotFoundError:
            raise
        except (ValueError, OSError, CorruptTokensError) as error:
            raise self.corrupt(spec, entry, uid, str(error)) from error

    def plan(self, spec: TokenSpec) -> ArrayPlan | None:
        """Return the plan of a spec's tokens if they can be read by byte range; None for zarr's path."""
        if spec.spec_id not in self._plans:
            key = f"{layout.group(spec)}/tokens/zarr.json"
            try:
                metadata = json.loads(self.storage.read(key))
            except ValueError as error:
                raise StoreError(
                    f"{self.root}/{key}: not a JSON document ({error}). `emocache store doctor` "
                    "writes it again."
                ) from None
            compression = can_read(metadata, layout.arrays(spec)[0])
            self._plans[spec.spec_id] = (
                None if compression is None else layout.arrays(spec, compression)[0]
            )
        return self._plans[spec.spec_id]

    def shard(self, spec: TokenSpec, number: int, *, access: Access = "read") -> Shard:
        """Return a shard, open; safe among threads.

        Raises:
            FileNotFoundError: It is gone.
            CorruptTokensError: It is truncated, or its index is damaged.
        """
        name = (spec.spec_id, number, access)
        with self._lock:
            found = self._shards.get(name)
            if found is not None:
                self._shards.move_to_end(name)
                return found
        plan = self.plan(spec)
        assert plan is not None
        key = f"{layout.group(spec)}/{plan.name}/{plan.chunk_file(number)}"
        opened = Shard(self.storage, key, plan, access=access)
        with self._lock:
            self._shards[name] = opened
            while len(self._shards) > _max_open_shards():
                self._shards.popitem(last=False)
        return opened

    def scales(self, spec: TokenSpec, entry: Entry) -> tuple[Values, Values]:
        """Return `token_scale` (of the valid tokens) and `channel_exponent` of an int8 clip."""
        number, place = divmod(entry.row, CLIPS_PER_SHARD)
        found = [self._unit_part(spec, n, number) for n in ("token_scale", "channel_exponent")]
        return found[0][place][: entry.valid_len], found[1][place]

    def _unit_part(self, spec: TokenSpec, array: str, number: int) -> Values:
        """Return one unit's rows of a small array."""
        name = (spec.spec_id, array, number)
        with self._lock:
            if name in self._small:
                return self._small[name]
        (plan,) = (p for p in layout.arrays(spec) if p.name == array)
        key = f"{layout.group(spec)}/{array}/{plan.chunk_file(number)}"
        found = decode_chunk(plan, self.storage.read(key))
        with self._lock:
            self._small[name] = found
            while len(self._small) > _max_open_shards():
                self._small.popitem(last=False)
        return found

    def read_with_zarr(self, spec: TokenSpec, entry: Entry) -> Values:
        """Read a clip's valid tokens as stored through zarr-python: slower, for any layout."""
        try:
            array = self._array(spec, "tokens", rows=entry.row + 1)
            return np.asarray(array[entry.row, : entry.valid_len])
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise CorruptTokensError(
                f"zarr-python cannot open the array ({type(error).__name__}: {error}); if its zarr.json is "
                "damaged, `emocache store doctor` writes it again"
            ) from error

    def corrupt(
        self, spec: TokenSpec, entry: Entry, uid: str | None, why: str
    ) -> CorruptTokensError:
        """Return the error for a clip whose stored bytes are damaged."""
        return CorruptTokensError(
            f"{uid or entry.key[:16]}: damaged {spec.stream} tokens, row {entry.row} of "
            f"{self.root}/{layout.group(spec)} ({why}). Restore that shard from a copy of the store; "
            "`emocache store verify` names every damaged clip."
        )

    def _array(self, spec: TokenSpec, name: str, rows: int = 0) -> ZarrArray:
        """Return an array for reading, at least `rows` long.

        Its metadata may be shorter than what is committed if the writer that extended it was
        killed (`UnitWriter._grow`); the commit record is the truth, so the length is corrected in
        memory.
        """
        known = self._arrays.get((spec.spec_id, name))
        if known is None or known.shape[0] < rows:
            where = self.storage.zarr_store(layout.group(spec))
            known = zarr.open_array(where, path=name, mode="r", zarr_format=3)
            if known.shape[0] < rows:
                metadata = replace(known.metadata, shape=(rows, *known.shape[1:]))
                known = ZarrArray(replace(known.async_array, metadata=metadata))
            self._arrays[spec.spec_id, name] = known
        return known

    def frame_times(self, spec: TokenSpec, row: int) -> tuple[list[int], list[float]]:
        """Return the frame indices and presentation times (s) of a row; empty for audio."""
        if spec.frames is None:
            return [], []
        names = ("frame_index", "frame_pts_s")
        if self.plan(spec) is None:
            index, times = (np.asarray(self._array(spec, n, rows=row + 1)[row]) for n in names)
        else:
            number, place = divmod(row, CLIPS_PER_SHARD)
            try:
                index, times = (self._unit_part(spec, n, number)[place] for n in names)
            except (FileNotFoundError, CorruptTokensError) as error:
                raise CorruptTokensError(
                    f"{self.root}/{layout.group(spec)}: the frame times of row {row} are gone or "
                    f"damaged ({error}). Restore the file from a copy of the store."
                ) from None
        return index.tolist(), times.tolist()

    # ---------------------------------------------------------------- writing

    def commit(
        self,
        spec: TokenSpec,
        clips: Sequence[ClipTokens],
        provenance: Mapping[str, str],
        after: Iterable[str] = (),
        replaces: Sequence[str] = (),
    ) -> Commit:
        """Write a unit of clips and make it visible, all or nothing, once.

        If another worker committed the same unit meanwhile, its commit is returned.

        Args:
            spec: Must be resolved.
            clips: 1 to `CLIPS_PER_SHARD`, distinct keys.
            provenance: Library versions and device.
            after: Units that recorded some of these clips as failed (see `unit_id`).
            replaces: Units all of whose clips that count are among these (compaction).

        Raises:
            CorruptTokensError: Tokens of another shape, or with NaN or infinity: nothing is written.
            StoreError: The disk is full or cannot be written: nothing becomes visible.
        """
        writer = self._writers.get(spec.spec_id)
        if writer is None:
            writer = UnitWriter(self.storage, spec, self.compression)
            self._writers[spec.spec_id] = writer
        commit = writer.commit(clips, provenance, after, replaces)
        self.__dict__.pop("specs", None)
        index = self._indexes.get(spec.spec_id)
        if index is not None and not index.has_unit(commit.unit_id):
            index.add(commit)
        self._own_commits[spec.spec_id] = self._own_commits.get(spec.spec_id, 0) + 1
        if self._own_commits[spec.spec_id] % _SNAPSHOT_EVERY == 0:
            self.write_snapshot(spec)
        return commit

    def write_snapshot(self, spec: TokenSpec) -> str:
        """Write a spec's index as a snapshot, so that the store opens quickly; return its key."""
        index = read_index(self.storage, spec.spec_id)
        self._indexes[spec.spec_id] = index
        return write_snapshot(self.storage, spec.spec_id, index)

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
        key = layout.probe(spec.spec_id)
        if self.storage.create(key, json.dumps([float(v) for v in values]).encode()):
            return
        try:
            recorded = np.asarray(json.loads(self.storage.read(key)), np.float64)
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{self.root}/{key}: the recorded probe is damaged ({error}). Restore the file from a copy; "
                "without it, a changed library would go unnoticed."
            ) from None
        got = np.asarray(values, np.float64)
        worst = math.inf
        if recorded.shape == got.shape:
            scale = max(1e-6, float(np.abs(recorded).max()))
            worst = float(np.abs(recorded - got).max()) / scale
        if not worst <= _PROBE_TOLERANCE:
            raise SpecMismatchError(
                f"{self.root}: the {spec.stream} encoder answers the fixed input differently "
                f"from when spec {spec.spec_id} was first extracted (relative difference "
                f"{worst:.3g}, allowed {_PROBE_TOLERANCE}). A library or device changed its numbers. "
                "Restore the versions that `emocache store show` prints, or use a new store."
            )


def _after_fork() -> None:
    for store in list(_alive):
        store._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _create(storage: Storage, compression: Compression) -> None:
    """Make a store in an empty or new place. Two workers that do so at once both succeed."""
    names = [*storage.names(""), *storage.folders("")]
    strangers = sorted(set(names) - layout.OWN_NAMES)
    if strangers:
        raise StoreError(
            f"{storage.url}: not empty and not an emocache store (holds {strangers[0]!r}). "
            "Give a new or empty folder; nothing was changed."
        )
    root_group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    storage.create(f"{layout.ZARR}/zarr.json", json.dumps(root_group).encode())
    marker = Marker(format=FORMAT_NAME, version=FORMAT_VERSION, compression=compression)
    storage.create(layout.MARKER, marker.model_dump_json().encode())


def _max_open_shards() -> int:
    """Shards that stay open: a quarter of the files that this process may open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(4096, soft // 4))
