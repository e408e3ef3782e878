"""A store's later life: what nobody needs any more, what is scattered, and copies of it."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cache import layout
from cache.commit import Commit, Entry, Status, commit_key, read_commit, unit_ids, write_commit
from cache.errors import StoreError
from cache.index import read_index, write_snapshot
from cache.layout import CLIPS_PER_SHARD
from cache.spec import TokenSpec
from cache.storage import LocalStorage, Storage, exists, walk
from cache.store import TokenStore

DAY_S = 24 * 3600.0
"""A writer that has not committed for so long is taken for dead. A guess is enough: if it is alive,
its unit is closed to it, and it writes the unit again."""


@dataclass
class Garbage:
    """Files that no reader needs, by why."""

    files: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> keys."""
    n_bytes: int = 0
    n_spared: int = 0
    """Uncommitted shards that a writer may still be working on."""

    @property
    def n_files(self) -> int:
        """Number of files."""
        return sum(map(len, self.files.values()))


def collect_garbage(
    store: TokenStore,
    keep: Collection[TokenSpec] | None = None,
    *,
    delete: bool = False,
    abandon_after_s: float = DAY_S,
) -> Garbage:
    """Find, and if asked remove, what cannot be reached.

    That are: specs that serve none of `keep`; shards that were never committed, or whose unit was
    committed by another attempt; units that compaction replaced; temporary files of killed writers;
    snapshots that a newer one superseded. Readers and writers may go on meanwhile. Extraction jobs
    are left alone: they are small, and tell what was done.

    Args:
        store: What to clean.
        keep: Specs that are wanted; None keeps all.
        delete: False only looks.
        abandon_after_s: Age at which an uncommitted shard counts as abandoned.
    """
    collector = _Collector(store, delete, abandon_after_s)
    for spec in store.specs.values():
        if keep is not None and not any(spec.serves(wanted) for wanted in keep):
            collector.drop_spec(spec)
        else:
            collector.drop_replaced(spec)
            collector.drop_uncommitted(spec, "shard that was never committed")
            collector.drop_old_snapshots(spec)
    collector.drop_partial_files()
    if delete:
        if isinstance(store.storage, LocalStorage):
            store.storage.prune(layout.ZARR)
        store.refresh()
    return collector.found


class _Collector:
    """One run of garbage collection.

    What makes deleting safe beside a writer: an uncommitted unit is first closed, by creating the
    commit record that its writer would have to create. Whoever creates it has decided.
    """

    def __init__(self, store: TokenStore, delete: bool, abandon_after_s: float) -> None:
        self.store = store
        self.storage: Storage = store.storage
        self.delete = delete
        self.abandon_after_s = abandon_after_s
        self.found = Garbage()
        self._now_s = storage_time_s(self.storage) if delete else None

    def drop_spec(self, spec: TokenSpec) -> None:
        """Remove everything of a spec but the marks that keep late writers harmless."""
        self.drop_uncommitted(spec, "shard that was never committed", all_of_them=True)
        why = f"{spec.stream} spec {spec.spec_id}, which no kept preset uses"
        spec_id = spec.spec_id
        for identity in unit_ids(self.storage, spec_id):
            if not read_commit(self.storage, spec_id, identity).abandoned:
                self._drop(commit_key(spec_id, identity), why)
        for name in self.storage.names(layout.snapshots(spec_id)):
            self._drop(f"{layout.snapshots(spec_id)}/{name}", why)
        # The highest claim stays: shard numbers are never used twice, not even by a spec's return.
        for name in sorted(self.storage.names(layout.claims(spec_id)))[:-1]:
            self._drop(f"{layout.claims(spec_id)}/{name}", why)
        group = layout.group(spec)
        self._drop(f"{group}/zarr.json", why)  # from here on it is not listed
        for key in list(walk(self.storage, group)):
            if key != f"{group}/zarr.json":
                self._drop(key, why)
        self._drop(layout.probe(spec_id), why)

    def drop_replaced(self, spec: TokenSpec) -> None:
        """Remove units whose clips a compacted unit took over."""
        index = read_index(self.storage, spec.spec_id)
        gone = [
            identity.decode()
            for identity, shard, counts in zip(
                index.units.ids, index.units.shard, index.units.counts, strict=True
            )
            if shard >= 0 and not counts
        ]
        commits = [read_commit(self.storage, spec.spec_id, identity) for identity in gone]
        if not gone:
            return
        for commit in commits:
            why = "unit that compaction replaced"
            self._drop(commit_key(spec.spec_id, commit.unit_id), why)
            self._drop_shard(spec, commit.shard, why)
        if self.delete:
            # The old snapshots name units that are gone now; readers pass them over.
            write_snapshot(self.storage, spec.spec_id, read_index(self.storage, spec.spec_id))

    def drop_uncommitted(self, spec: TokenSpec, why: str, *, all_of_them: bool = False) -> None:
        """Remove the shards of attempts that lost or died."""
        folder = layout.claims(spec.spec_id)
        committed = {c.unit_id: c for c in self._commits(spec)}
        shards = {c.shard for c in committed.values() if not c.abandoned}
        for name in sorted(self.storage.names(folder)):
            if not name.isdigit() or int(name) in shards:
                continue
            files = list(self._shard_files(spec, int(name)))
            if not files and not all_of_them:
                continue
            unit = _claimed_unit(self.storage, f"{folder}/{name}")
            if unit is None:  # a damaged claim: without its unit's name it cannot be closed
                self.found.n_spared += bool(files)
                continue
            if unit not in committed:
                if not all_of_them and self._age_s(f"{folder}/{name}") < self.abandon_after_s:
                    self.found.n_spared += bool(files)
                    continue
                if self.delete and not self._close(spec, unit, int(name)):
                    continue  # its writer committed it just now
            for key in files:
                self._drop(key, why)

    def drop_old_snapshots(self, spec: TokenSpec) -> None:
        """Remove all snapshots but the newest that is of use."""
        names = sorted(self.storage.names(layout.snapshots(spec.spec_id)))
        n_units = len(unit_ids(self.storage, spec.spec_id))
        usable = [name for name in names if int(name.split("-")[0]) <= n_units]
        for name in names:
            if name not in usable[-1:]:
                key = f"{layout.snapshots(spec.spec_id)}/{name}"
                self._drop(key, "snapshot that a newer one superseded")

    def drop_partial_files(self) -> None:
        """Remove temporary files that no living writer can own."""
        if not isinstance(self.storage, LocalStorage):
            return
        for key in self.storage.partial_files():
            if self._age_s(key) >= self.abandon_after_s:
                self._drop(key, "temporary file of a killed writer")

    def _commits(self, spec: TokenSpec) -> Iterator[Commit]:
        for identity in unit_ids(self.storage, spec.spec_id):
            yield read_commit(self.storage, spec.spec_id, identity)

    def _close(self, spec: TokenSpec, unit: str, shard: int) -> bool:
        """Close a unit for good; False if it is committed with this shard after all."""
        tombstone = Commit(
            unit_id=unit,
            spec_id=spec.spec_id,
            shard=shard,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance={},
            n_bytes=0,
            clips=(),
            abandoned=True,
        )
        if write_commit(self.storage, tombstone):
            return True
        commit = read_commit(self.storage, spec.spec_id, unit)
        return commit.abandoned or commit.shard != shard

    def _shard_files(self, spec: TokenSpec, shard: int) -> Iterator[str]:
        for plan in layout.arrays(spec):
            key = f"{layout.group(spec)}/{plan.name}/{plan.chunk_file(shard)}"
            if exists(self.storage, key):
                yield key

    def _drop_shard(self, spec: TokenSpec, shard: int, why: str) -> None:
        for key in self._shard_files(spec, shard):
            self._drop(key, why)

    def _drop(self, key: str, why: str) -> None:
        try:
            self.found.n_bytes += self.storage.size(key)
        except FileNotFoundError:
            return
        self.found.files.setdefault(why, []).append(key)
        if self.delete:
            self.storage.delete(key)

    def _age_s(self, key: str) -> float:
        """Return a file's age by the storage's clock; of a dry run by the newest file that it has."""
        try:
            written_s = self.storage.modified_s(key)
        except FileNotFoundError:
            return 0.0
        now_s = self._now_s
        if now_s is None:
            now_s = datetime.now(UTC).timestamp()  # nothing may be written; only a forecast
        return now_s - written_s


def storage_time_s(storage: Storage) -> float:
    """Return the time by the storage's own clock: a client's may be wrong, or jump."""
    key = f"claims/.time-{uuid.uuid4().hex}"
    try:
        storage.create(key, b"")
        return storage.modified_s(key)
    except OSError as error:
        raise StoreError(
            f"{storage.url}: cannot be written ({error.strerror or error}), so nothing was removed."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            storage.delete(key)


def _claimed_unit(storage: Storage, key: str) -> str | None:
    """Return the unit that an attempt claimed a shard for; None if the claim does not say."""
    try:
        found = json.loads(storage.read(key)).get("unit_id")
    except (FileNotFoundError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


# ---------------------------------------------------------------------------- compaction


@dataclass
class Compacted:
    """What compaction did."""

    n_units_before: int = 0
    """Units that were joined."""
    n_units_after: int = 0
    n_bytes_freed: int = 0
    """What garbage collection can remove now."""


def compact(
    store: TokenStore,
    spec: TokenSpec,
    *,
    fill: float = 0.75,
    on_unit: Callable[[], None] | None = None,
) -> Compacted:
    """Join units that are small, or mostly superseded, to full shards.

    Every new unit says which it replaces, and counts from its commit on; the old files stay, for
    readers that are at work, until `collect_garbage`. Killed in between, it has done some units.

    Args:
        store: What to compact.
        spec: Of which spec.
        fill: Units with at most this share of a shard's clips are joined.
        on_unit: Called after each new unit.
    """
    index = store.index(spec)
    living: dict[int, list[Entry]] = {shard: [] for shard in index.shards()}
    for entry in index:
        living[entry.row // CLIPS_PER_SHARD].append(entry)
    commits = {commit.shard: commit for commit in store.commits(spec)}
    small = {
        shard: entries
        for shard, entries in living.items()
        if shard in commits and len(entries) <= fill * CLIPS_PER_SHARD
    }
    done = Compacted()
    for shards in _packs({shard: len(entries) for shard, entries in small.items()}):
        old = [commits[shard] for shard in shards]
        clips = [store.clip_tokens(spec, entry) for shard in shards for entry in small[shard]]
        if len(shards) < 2 and len(clips) == len(old[0].clips):
            continue  # nothing to join, nothing to leave behind
        names = sorted(commit.unit_id for commit in old)
        if clips:
            provenance = merge_provenance([commit.provenance for commit in old])
            new = store.commit(spec, clips, provenance, after=names, replaces=names)
            done.n_units_after += 1
            done.n_bytes_freed -= new.n_bytes
        done.n_units_before += len(old)
        done.n_bytes_freed += sum(commit.n_bytes for commit in old)
        if on_unit is not None:
            on_unit()
    if done.n_units_before:
        store.write_snapshot(spec)
    return done


def _packs(sizes: Mapping[int, int]) -> list[list[int]]:
    """Put whole units together to shards: first fit, the largest first."""
    packs: list[tuple[int, list[int]]] = []
    for shard, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        for place, (total, members) in enumerate(packs):
            if total + size <= CLIPS_PER_SHARD:
                packs[place] = (total + size, [*members, shard])
                break
        else:
            packs.append((size, [shard]))
    return [members for _, members in packs]


def merge_provenance(parts: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the provenance of a unit that was joined from several; differing values stand together."""
    keys = dict.fromkeys(key for part in parts for key in part)
    return {
        key: " | ".join(dict.fromkeys(part[key] for part in parts if key in part)) for key in keys
    }


# ---------------------------------------------------------------------------- copies


@dataclass
class Synced:
    """What a copy did."""

    n_clips: int = 0
    """Clips and streams that were copied."""
    n_known: int = 0
    """Those that the other store had already."""
    n_bytes: int = 0
    """Size of the files that were written."""


def sync(
    source: TokenStore,
    target: TokenStore,
    specs: Collection[TokenSpec] | None = None,
    on_clip: Callable[[], None] | None = None,
) -> Synced:
    """Copy what another store lacks, clip by clip, checked when read and when written.

    Interrupted, it continues where it was. Stored numbers are copied as they are, whatever the
    compression on either side. Extraction jobs are not copied.

    Args:
        source: Where the tokens are.
        target: Where they shall be, too.
        specs: Which; default all.
        on_clip: Called for each clip and stream, copied or known.

    Raises:
        CorruptTokensError: Stored bytes of the source fail their checksum.
        StoreError: The target cannot be written.
    """
    done = Synced()
    for spec in specs if specs is not None else list(source.specs.values()):
        there = target.index(spec)
        for commit in source.commits(spec):
            clips = []
            for entry in commit.clips:
                counts = source.index(spec).get(entry.key)
                known = there.get(entry.key)
                is_settled = known is not None and (
                    known.status is not Status.FAILED or entry.status is Status.FAILED
                )
                if counts is None or counts.row != entry.row or is_settled:
                    done.n_known += known is not None
                else:
                    clips.append(source.clip_tokens(spec, entry))
                if on_clip is not None:
                    on_clip()
            if clips:
                after = {unit for clip in clips for unit in there.failed_in(clip.key)}
                written = target.commit(spec, clips, commit.provenance, after)
                done.n_clips += len(clips)
                done.n_bytes += written.n_bytes
        key = layout.probe(spec.spec_id)
        if exists(source.storage, key):
            target.storage.create(key, source.storage.read(key))
        target.write_snapshot(spec)
    return done
