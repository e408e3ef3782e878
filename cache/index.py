"""The index of one spec: which committed row holds which clip, 43 bytes a clip.

The truth are the commit records. A *snapshot* is derived from them, an Arrow file that opens without
being parsed, so that a store of millions of clips opens in well under a second. Its name holds the
CRC-32C of its content; one that is damaged or out of date is passed over, and the commit records are
read instead.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.commit import Commit, Entry, Status, read_commit, unit_ids
from cache.errors import SchemaError, StoreError
from cache.layout import CLIPS_PER_SHARD, snapshots
from cache.layout import commits as commits_folder
from cache.storage import LocalStorage, Storage

logger = logging.getLogger(__name__)

T = TypeVar("T")
_SNAPSHOT_VERSION = 1
_STATUSES = (Status.OK, Status.ABSENT, Status.FAILED)
_NEVER = -1
_TRUNCATED, _NOTED = 4, 8
"""Bits of the column `flags`; the two lowest hold the status."""
_LISTINGS = 5
"""Equal listings, of which a record is not there, after which a reader takes it for damage."""
_FETCHES = 16
"""Commit records that are asked for at once: of a bucket, each takes a round trip."""

_COLUMNS = {
    "k0": np.uint64,  # the key, 64 bits at a time
    "k1": np.uint64,
    "k2": np.uint64,
    "k3": np.uint64,
    "row": np.uint32,
    "valid_len": np.uint16,
    "crc32c": np.uint32,
    "flags": np.uint8,
}
Columns = dict[str, npt.NDArray[Any]]


class Located(NamedTuple):
    """Where clips are, one number each."""

    row: npt.NDArray[np.int64]
    valid_len: npt.NDArray[np.int64]
    crc32c: npt.NDArray[np.int64]
    status: npt.NDArray[np.int64]
    """`Status.code`; -1 where nothing is committed."""


class Note(NamedTuple):
    """What few entries have beside the columns."""

    reason: str | None = None
    remark: str | None = None


@dataclass(frozen=True)
class UnitTable:
    """The units of a spec, sorted by id."""

    ids: npt.NDArray[np.bytes_]
    shard: npt.NDArray[np.int64]
    """-1 for an abandoned unit."""
    n_bytes: npt.NDArray[np.int64]
    counts: npt.NDArray[np.bool_]
    """False for a unit that was replaced or abandoned."""


class Index:
    """All committed entries of one spec.

    A clip may stand in several units: two runs that overlapped, or a retry. The lowest row that has
    a final status counts, whatever the order of the commits; `failed` counts only while nothing
    better is known; replaced units do not count.
    """

    def __init__(self, commits: Iterable[Commit] = (), base: Index | None = None) -> None:
        """Index commits, on top of what `base` holds."""
        fresh = list(commits)
        replaced = {identity for commit in fresh for identity in commit.replaces}
        old = base.columns if base is not None else _empty_columns()
        self.notes: dict[int, Note] = dict(base.notes) if base is not None else {}
        """Row -> what its entry has beside the columns."""
        self.failures: dict[str, tuple[str, ...]] = dict(base.failures) if base is not None else {}
        """Token key -> units that recorded the clip as failed, now or before a retry."""
        self.units: UnitTable = _merge_units(
            base.units if base is not None else None, fresh, replaced
        )
        # A base may hold rows of units that a fresh commit replaces.
        gone = self.units.shard[~self.units.counts]
        if len(gone) and len(old["row"]):
            keep = ~np.isin(old["row"] // CLIPS_PER_SHARD, gone)
            old = {name: values[keep] for name, values in old.items()}
        live = [c for c in fresh if not c.abandoned and self._counts(c.unit_id)]
        entries = [entry for commit in live for entry in commit.clips]
        for commit in live:
            self._note_all(commit)
        self.columns: Columns = _merge(old, _columns_of(entries, self.notes)) if entries else old
        self._added: dict[str, Entry] = {}

    def __len__(self) -> int:
        known = sum(self._at(key) is None for key in self._added)
        return len(self.columns["row"]) + known

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __iter__(self) -> Iterator[Entry]:
        """Yield every entry, in the order of the keys."""
        keys = {self._key(place) for place in range(len(self.columns["row"]))} | set(self._added)
        for key in sorted(keys):
            entry = self.get(key)
            assert entry is not None
            yield entry

    @property
    def n_units(self) -> int:
        """Committed units that count."""
        return int(self.units.counts.sum())

    @property
    def n_bytes(self) -> int:
        """Size of the files of all units that count."""
        return int(self.units.n_bytes[self.units.counts].sum())

    def get(self, key: str) -> Entry | None:
        """Return a clip's entry; None if nothing is committed."""
        place = self._at(key)
        known = None if place is None else self._entry(place, key)
        added = self._added.get(key)
        return added if known is None or (added and _beats(added, known)) else known

    def locate(self, keys: Sequence[str]) -> Located:
        """Return where several clips are; much quicker than one `get` each.

        Args:
            keys: 64 hexadecimal digits each.
        """
        words = np.frombuffer(bytes.fromhex("".join(keys)), ">u8").reshape(-1, 4).astype(np.uint64)
        first = self.columns["k0"]
        found = np.zeros((4, len(keys)), np.int64)
        found[3] = _NEVER
        if len(first):
            at = np.searchsorted(first, words[:, 0])
            at[at == len(first)] = 0
            same = np.ones(len(keys), np.bool_)
            for i in range(4):
                same &= self.columns[f"k{i}"][at] == words[:, i]
            names = ("row", "valid_len", "crc32c", "flags")
            found[:, same] = [self.columns[name][at[same]] for name in names]
            found[3, same] &= 3
        for place in np.flatnonzero(found[3] == _NEVER).tolist():
            self._put(found[:, place], keys[place])  # never committed, or two keys share 64 bits
        if self._added:
            for place, key in enumerate(keys):
                if key in self._added:
                    self._put(found[:, place], key)
        return Located(*found)

    def _put(self, column: npt.NDArray[np.int64], key: str) -> None:
        entry = self.get(key)
        if entry is not None:
            column[:] = entry.row, entry.valid_len, entry.crc32c or 0, entry.status.code

    def counts(self) -> Counter[Status]:
        """Return how many clips have which status."""
        if self._added:
            return Counter(entry.status for entry in self)
        found = np.bincount(self.columns["flags"] & 3, minlength=len(_STATUSES))
        return Counter({s: int(n) for s, n in zip(_STATUSES, found, strict=False) if n})

    def failed_in(self, key: str) -> frozenset[str]:
        """Return the units that recorded a clip as failed."""
        return frozenset(self.failures.get(key, ()))

    def has_unit(self, identity: str) -> bool:
        """True if a unit's commit is part of this index."""
        place = np.searchsorted(self.units.ids, np.bytes_(identity))
        return bool(place < len(self.units.ids) and self.units.ids[place] == identity.encode())

    def counts_unit(self, identity: str) -> bool:
        """True if a unit's commit is part of this index, neither replaced nor abandoned."""
        return self.has_unit(identity) and self._counts(identity)

    def unit_of(self, entry: Entry) -> str:
        """Return the id of the unit whose commit holds an entry."""
        place = np.flatnonzero(self.units.shard == entry.row // CLIPS_PER_SHARD)[0]
        return str(self.units.ids[place].decode())

    def shards(self) -> set[int]:
        """Return the numbers of the shards that count."""
        return set(self.units.shard[self.units.counts].tolist())

    def add(self, commit: Commit) -> None:
        """Take in one more commit, cheaply: a writer's own."""
        self.units = _merge_units(self.units, [commit], set(commit.replaces))
        self._note_all(commit)
        for entry in commit.clips:
            known = self._added.get(entry.key)
            if known is None or _beats(entry, known):
                self._added[entry.key] = entry

    def settled(self) -> Index:
        """Return the same index with everything that was added in the columns."""
        if not self._added:
            return self
        merged = _merge(self.columns, _columns_of(self._added.values(), self.notes))
        return _index(merged, self.units, self.notes, self.failures)

    # ---------------------------------------------------------------- inside

    def _counts(self, identity: str) -> bool:
        place = np.searchsorted(self.units.ids, np.bytes_(identity))
        return bool(self.units.counts[place])

    def _note_all(self, commit: Commit) -> None:
        for entry in commit.clips:
            if entry.reason is not None or entry.remark is not None:
                self.notes[entry.row] = Note(entry.reason, entry.remark)
            if entry.status is Status.FAILED:
                known = self.failures.get(entry.key, ())
                self.failures[entry.key] = tuple(sorted({*known, commit.unit_id}))

    def _at(self, key: str) -> int | None:
        """Return the place of a key in the columns."""
        words = _words(key)
        if words is None:
            return None
        low, high = 0, len(self.columns["k0"])
        for i, word in enumerate(words):
            column = self.columns[f"k{i}"][low:high]
            high = low + int(np.searchsorted(column, word, "right"))
            low += int(np.searchsorted(column, word, "left"))
        return low if low < high else None

    def _key(self, place: int) -> str:
        return "".join(f"{int(self.columns[f'k{i}'][place]):016x}" for i in range(4))

    def _entry(self, place: int, key: str) -> Entry:
        row, valid_len, crc, flags = (
            int(self.columns[name][place]) for name in ("row", "valid_len", "crc32c", "flags")
        )
        status = _STATUSES[flags & 3]
        note = self.notes.get(row, Note()) if flags & _NOTED else Note()
        return Entry.model_construct(
            key=key,
            row=row,
            status=status,
            valid_len=valid_len,
            crc32c=crc if status is Status.OK else None,
            reason=note.reason,
            remark=note.remark,
            truncated=bool(flags & _TRUNCATED),
        )


def _index(
    columns: Columns, units: UnitTable, notes: dict[int, Note], failures: dict[str, tuple[str, ...]]
) -> Index:
    made = Index()
    made.columns, made.units, made.notes, made.failures = columns, units, notes, failures
    return made


def _beats(a: Entry, b: Entry) -> bool:
    return (a.status is Status.FAILED, a.row) < (b.status is Status.FAILED, b.row)


def _words(key: str) -> list[np.uint64] | None:
    """Return a key as four numbers; None if it is none (a mistyped one)."""
    try:
        found = bytes.fromhex(key)
    except ValueError:
        return None
    return list(np.frombuffer(found, ">u8").astype(np.uint64)) if len(found) == 32 else None


def _empty_columns() -> Columns:
    return {name: np.empty(0, dtype) for name, dtype in _COLUMNS.items()}


def _columns_of(entries: Iterable[Entry], notes: dict[int, Note]) -> Columns:
    entries = list(entries)
    keys = np.frombuffer(b"".join(bytes.fromhex(e.key) for e in entries), ">u8").reshape(-1, 4)
    columns: Columns = {f"k{i}": keys[:, i].astype(np.uint64) for i in range(4)}
    columns["row"] = np.array([e.row for e in entries], np.uint32)
    columns["valid_len"] = np.array([e.valid_len for e in entries], np.uint16)
    columns["crc32c"] = np.array([e.crc32c or 0 for e in entries], np.uint32)
    columns["flags"] = np.array(
        [e.status.code | _TRUNCATED * e.truncated | _NOTED * (e.row in notes) for e in entries],
        np.uint8,
    )
    return columns


def _merge(a: Columns, b: Columns) -> Columns:
    """Join two tables; of each key, the entry that counts."""
    both = {name: np.concatenate([a[name], b[name]]) for name in _COLUMNS}
    failed = both["flags"] & 3 == Status.FAILED.code
    order = np.lexsort((both["row"], failed, both["k3"], both["k2"], both["k1"], both["k0"]))
    first = np.ones(len(order), np.bool_)
    keys = [both[f"k{i}"][order] for i in range(4)]
    first[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    return {name: values[order[first]] for name, values in both.items()}


def _merge_units(
    base: UnitTable | None, commits: Sequence[Commit], replaced: set[str]
) -> UnitTable:
    ids = np.array([c.unit_id for c in commits], "S24")
    shard = np.array([-1 if c.abandoned else c.shard for c in commits], np.int64)
    n_bytes = np.array([c.n_bytes for c in commits], np.int64)
    counts = shard >= 0
    if base is not None:
        ids = np.concatenate([base.ids, ids])
        shard = np.concatenate([base.shard, shard])
        n_bytes = np.concatenate([base.n_bytes, n_bytes])
        counts = np.concatenate([base.counts, counts])
    if replaced:
        counts = counts & ~np.isin(ids, np.array(sorted(replaced), "S24"))
    order = np.argsort(ids, kind="stable")
    return UnitTable(ids[order], shard[order], n_bytes[order], counts[order])


# -------------------------------------------------------------------- reading and snapshots


def read_index(storage: Storage, spec_id: str) -> Index:
    """Read all that is committed under a spec.

    Raises:
        SchemaError: A commit record is damaged.
        StoreError: Records vanish again and again.
    """
    n_equal, before = 0, None
    while n_equal < _LISTINGS:
        n_equal += 1
        try:
            listed = np.array(unit_ids(storage, spec_id), "S24")
            if before is not None and not np.array_equal(listed, before):
                n_equal = 1  # others are at work, which says nothing of damage
            before = listed
            base = _newest_snapshot(storage, spec_id, listed)
            fresh = listed if base is None else np.setdiff1d(listed, base.units.ids)
            commits = in_parallel(
                lambda name: read_commit(storage, spec_id, name.decode()), fresh.tolist(), storage
            )
        except FileNotFoundError:
            continue  # a unit that was listed was collected as garbage meanwhile: list again
        return Index(commits, base) if commits or base is None else base
    raise StoreError(
        f"{storage.url}/{commits_folder(spec_id)}: commit records are listed and then not there, {_LISTINGS} "
        "times over. Look at the file system; a broken link among them has this effect."
    )


def in_parallel(work: Callable[[Any], T], items: Sequence[Any], storage: Storage) -> list[T]:
    """Do `work` on each item: of a bucket several at once, of a disk one after the other."""
    if isinstance(storage, LocalStorage) or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(_FETCHES) as pool:
        return list(pool.map(work, items))


def write_snapshot(storage: Storage, spec_id: str, index: Index) -> str:
    """Write an index as a snapshot and remove older ones; return the new one's key.

    The order of the two makes this safe beside readers and other writers: any snapshot whose units
    are all still committed is a right beginning.
    """
    index = index.settled()
    batch = pa.record_batch(
        [pa.array(index.columns[name]) for name in _COLUMNS],
        schema=pa.schema(
            [(name, pa.from_numpy_dtype(dtype)) for name, dtype in _COLUMNS.items()],
            metadata={
                "emocache_snapshot": str(_SNAPSHOT_VERSION),
                "ids": index.units.ids.astype("S24").tobytes(),
                "shard": index.units.shard.astype("<i8").tobytes(),
                "n_bytes": index.units.n_bytes.astype("<i8").tobytes(),
                "counts": index.units.counts.tobytes(),
                "notes": json.dumps(list(index.notes.items())),
                "failures": json.dumps(index.failures),
            },
        ),
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    name = f"{len(index.units.ids):08d}-{crc32c.crc32c(data):08x}.arrow"
    older = [n for n in storage.names(snapshots(spec_id)) if n < name]
    key = f"{snapshots(spec_id)}/{name}"
    storage.replace(key, data, durable=False)
    for superseded in older:
        storage.delete(f"{snapshots(spec_id)}/{superseded}")
    return key


def _newest_snapshot(
    storage: Storage, spec_id: str, listed: npt.NDArray[np.bytes_]
) -> Index | None:
    """Return the newest snapshot that is whole and holds no unit that is gone."""
    for name in sorted(storage.names(snapshots(spec_id)), reverse=True):
        key = f"{snapshots(spec_id)}/{name}"
        try:
            found = read_snapshot(storage, key)
        except FileNotFoundError:
            continue  # a newer one took its place
        except (pa.ArrowInvalid, SchemaError, ValueError, KeyError) as error:
            logger.warning(
                "%s/%s: passed over (%s). The commit records are read instead, which takes longer; "
                "`emocache store doctor` writes a new one.",
                *(storage.url, key, error),
            )
            continue
        ids = found.units.ids
        if len(ids) <= len(listed) and bool(np.isin(ids, listed, assume_unique=True).all()):
            return found
    return None


def read_snapshot(storage: Storage, key: str) -> Index:
    """Read one snapshot, without copying its columns.

    Raises:
        FileNotFoundError: It is gone.
        SchemaError: Its content does not have the checksum in its name, or is of another version.
    """
    if isinstance(storage, LocalStorage):
        source = pa.memory_map(str(storage.path(key)))
    else:
        source = pa.BufferReader(storage.read(key))
    data = source.read_buffer()
    stated = key.rsplit("-", 1)[-1].removesuffix(".arrow")
    if f"{crc32c.crc32c(memoryview(data)):08x}" != stated:
        raise SchemaError("its checksum differs")
    batch = pa.ipc.open_file(data).get_batch(0)
    metadata = batch.schema.metadata
    if metadata.get(b"emocache_snapshot") != str(_SNAPSHOT_VERSION).encode():
        raise SchemaError("it is of another version")
    units = UnitTable(
        np.frombuffer(metadata[b"ids"], "S24"),
        np.frombuffer(metadata[b"shard"], "<i8"),
        np.frombuffer(metadata[b"n_bytes"], "<i8"),
        np.frombuffer(metadata[b"counts"], np.bool_),
    )
    columns = {  # not by to_numpy, which imports pandas where there is one: a third of a second
        name: np.frombuffer(batch.column(name).buffers()[1], dtype, count=batch.num_rows)
        for name, dtype in _COLUMNS.items()
    }
    notes = {row: Note(*note) for row, note in json.loads(metadata[b"notes"])}
    failures = {key: tuple(units) for key, units in json.loads(metadata[b"failures"]).items()}
    return _index(columns, units, notes, failures)
