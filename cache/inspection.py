"""One spec of a store, looked at from all sides: what `cache.audit` reports and repairs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import crc32c as crc32c_library
import ml_dtypes
import numpy as np
import pyarrow as pa
from numcodecs import Blosc
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata.v3 import ArrayV3Metadata

from cache import layout
from cache.commit import Commit, Entry, Status, commit_key, read_commit, unit_id, unit_ids
from cache.errors import CorruptTokensError, EmocacheError, SchemaError
from cache.index import Index, in_parallel, read_snapshot, write_snapshot
from cache.layout import CLIPS_PER_SHARD, ArrayPlan, Compression
from cache.shards import Shard, Values, can_read, crc32c, decode_chunk, encode_chunk
from cache.spec import TokenSpec
from cache.storage import Storage
from cache.store import TokenStore
from cache.writer import group_metadata

Severity = Literal["damage", "derived", "garbage", "missing"]
_N_THREADS = 2
"""Checksums and file reads run beside one another; more would only compete for the disk."""
_CRC_BYTES = 4
_SHOWN = 3
"""Names in a message; the others are counted."""
_SHARDS_TRIED = 8
"""Committed shards that are asked for the compression when the metadata is lost."""
JSON_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What a JSON document of another form than expected gives."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a store."""

    severity: Severity
    """`damage`: a shard, a commit record or a spec is lost or altered; `derived`: `doctor` rebuilds
    it; `garbage`: files that nothing refers to; `missing`: not in this store, or not all of it."""
    spec_id: str | None
    """None for what belongs to the whole store."""
    what: str
    cure: str


@dataclass
class VerifyReport:
    """What `verify` read and found."""

    findings: list[Finding] = field(default_factory=list)
    n_specs: int = 0
    n_units: int = 0
    """Committed units that count."""
    n_clips: int = 0
    """Clips whose tokens were read."""
    n_bytes: int = 0
    """Bytes of these, as stored."""

    def count(self, severity: Severity) -> int:
        """Number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def is_whole(self) -> bool:
        """True if there is nothing but garbage."""
        return all(finding.severity == "garbage" for finding in self.findings)


@dataclass(frozen=True)
class Problem:
    """A finding, and how to repair it, if it can be."""

    finding: Finding
    repair: Callable[[], None] | None = None


def garbage(storage: Storage, spec_id: str | None, what: str) -> Problem:
    """Return a problem that garbage collection cures."""
    cure = f"Run: emocache store gc {storage.url}"
    return Problem(Finding("garbage", spec_id, f"{storage.url}: {what}", cure))


def derived(
    storage: Storage, spec_id: str | None, key: str, why: str, repair: Callable[[], None]
) -> Problem:
    """Return a problem whose repair is at hand: the file follows from others."""
    cure = f"Run: emocache store doctor {storage.url}"
    return Problem(Finding("derived", spec_id, f"{storage.url}/{key}: {why}", cure), repair)


def damage(storage: Storage, spec_id: str, key: str, why: str, cure: str | None = None) -> Problem:
    """Return a problem that only a copy of the store cures."""
    cure = cure or f"Restore {storage.url}/{key} from a copy of the store."
    return Problem(Finding("damage", spec_id, f"{storage.url}/{key}: {why}", cure))


def some(names: Iterable[object]) -> str:
    """List a few of many."""
    every = [str(name) for name in names]
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def fits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """True if all that is wanted was found, whatever else was."""
    return all(found.get(name) == value for name, value in wanted.items())


@dataclass
class _UnitRead:
    problems: list[Problem] = field(default_factory=list)
    n_clips: int = 0
    n_bytes: int = 0


class SpecCheck:
    """The inspection of one spec."""

    def __init__(self, store: TokenStore, spec: TokenSpec) -> None:
        self.store, self.storage, self.spec = store, store.storage, spec
        self.spec_id, self.group = spec.spec_id, layout.group(spec)
        self.commits: list[Commit] = []
        """Every record that could be read."""
        self.live: list[Commit] = []
        """Those that count: neither replaced nor abandoned."""
        self.n_unreadable = 0
        """Records that could not be read, or contradict themselves."""
        self.listed: list[str] = []
        self.plans: list[ArrayPlan] = []
        """Empty for a layout that is not ours, which zarr-python reads."""
        self.without_shard: set[str] = set()
        """Units whose shard is gone."""
        self.without_record: set[int] = set()
        """Shards whose commit record is gone, as a snapshot tells."""

    def _damage(self, key: str, why: str, cure: str | None = None) -> Problem:
        return damage(self.storage, self.spec_id, key, why, cure)

    def _derived(self, key: str, why: str, repair: Callable[[], None]) -> Problem:
        return derived(self.storage, self.spec_id, key, why, repair)

    def inspect(self) -> list[Problem]:
        """Check everything but the tokens themselves."""
        # The shards before the records, so that what is committed meanwhile is no leftover.
        on_disk = self._numbers_on_disk()
        problems = self.read_records()
        compression = self.compression()
        if compression is not None:
            self.plans = layout.arrays(self.spec, compression)
        problems += self._check_claims()
        if self.plans:
            problems += self._check_metadata()
            problems += self._check_shards_exist()
            for found in in_parallel(self._check_derived, self.live, self.storage):
                problems += found
        problems += self._check_snapshots()
        if self.plans:
            problems += self._check_leftovers(on_disk)
        return problems + self._check_probe()

    # -------------------------------------------------------------------- records

    def read_records(self) -> list[Problem]:
        """Read every commit record, which the other checks start from."""
        problems = []
        self.listed = unit_ids(self.storage, self.spec_id)
        for found in in_parallel(self._read_record, self.listed, self.storage):
            if isinstance(found, Commit):
                self.commits.append(found)
            elif found is not None:
                self.n_unreadable += 1
                problems.append(found)
        replaced = {identity for commit in self.commits for identity in commit.replaces}
        self.live = [c for c in self.commits if not c.abandoned and c.unit_id not in replaced]
        by_shard: dict[int, str] = {}
        for commit in self.live:
            other = by_shard.setdefault(commit.shard, commit.unit_id)
            if other != commit.unit_id:
                why = f"the units {other} and {commit.unit_id} both have it, so one is overwritten"
                problems.append(self._damage(self._file("tokens", commit.shard), why))
        return problems

    def _read_record(self, identity: str) -> Commit | Problem | None:
        key = commit_key(self.spec_id, identity)
        try:
            commit = read_commit(self.storage, self.spec_id, identity)
            why = _contradiction(self.spec, commit)
        except FileNotFoundError:
            return None  # collected as garbage meanwhile
        except SchemaError as error:
            why = str(error).removeprefix(f"{self.storage.url}/{key}: ")
        except OSError as error:
            why = f"cannot be read ({error.strerror or error})"
        return commit if why is None else self._damage(key, f"commit record: {why}")

    def _still_counts(self, commit: Commit) -> bool:
        """Look again whether a unit was replaced, and its files removed, since the records were read."""
        listed = unit_ids(self.storage, self.spec_id)
        if commit.unit_id not in listed:
            return False
        fresh = [self._read_record(identity) for identity in set(listed) - set(self.listed)]
        return not any(isinstance(c, Commit) and commit.unit_id in c.replaces for c in fresh)

    # -------------------------------------------------------------------- layout and metadata

    def _file(self, array: str, shard: int) -> str:
        """Return the key of one unit's part of an array."""
        (plan,) = (p for p in layout.arrays(self.spec) if p.name == array)
        return f"{self.group}/{array}/{plan.chunk_file(shard)}"

    def _metadata(self, array: str) -> dict[str, Any] | None:
        """Return an array's metadata; None if it is missing or no JSON document."""
        try:
            found = json.loads(self.storage.read(f"{self.group}/{array}/zarr.json"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def compression(self) -> Compression | None:
        """Return how chunks are compressed; None for a layout that is not ours."""
        metadata = self._metadata("tokens")
        try:
            found = None if metadata is None else can_read(metadata, layout.arrays(self.spec)[0])
        except JSON_ERRORS:
            found = None
        if found is not None:
            return found
        # The metadata is lost, damaged or of another layout: the shards themselves tell.
        first = [(c, next((e for e in c.clips if e.status is Status.OK), None)) for c in self.live]
        tried = [(commit, entry) for commit, entry in first if entry is not None]
        compressions: tuple[Compression, ...] = ("none", "zstd")
        for commit, entry in tried[:_SHARDS_TRIED]:
            for compression in compressions:
                plan = layout.arrays(self.spec, compression)[0]
                if self._reads(plan, commit, entry):
                    return compression
        return None if tried and metadata is not None else self.store.compression

    def _reads(self, plan: ArrayPlan, commit: Commit, entry: Entry) -> bool:
        """True if a clip's tokens have the checksum that the commit record states."""
        try:
            shard = Shard(self.storage, self._file("tokens", commit.shard), plan)
            tokens = shard.read(entry.row % CLIPS_PER_SHARD, entry.valid_len)
        except (CorruptTokensError, OSError):
            return False
        return crc32c(tokens) == entry.crc32c

    def _check_metadata(self) -> list[Problem]:
        wanted = group_metadata(self.spec, self.plans)
        n_rows = max((c.shard + 1 for c in self.live), default=0) * CLIPS_PER_SHARD
        problems = []
        for plan in self.plans:
            found = self._metadata(plan.name)
            ours = json.loads(wanted[f"{plan.name}/zarr.json"])
            if found is None:
                why = "is missing or not a JSON document"
            elif not _same_array(found, ours):
                why = "differs from what the spec says"
            elif found["shape"][0] < n_rows:
                why = f"covers {found['shape'][0]} rows of {n_rows}"
            else:
                continue
            problems.append(self._metadata_problem(plan.name, ours, why))
        return problems

    def _metadata_problem(self, array: str, ours: dict[str, Any], why: str) -> Problem:
        key = f"{self.group}/{array}/zarr.json"

        def repair() -> None:
            # As `UnitWriter._grow`: write what all claims need, then look whether there are more.
            n_rows = -1
            while (needed := self._rows_claimed()) > n_rows:
                n_rows = needed
                data = json.dumps({**ours, "shape": [n_rows, *ours["shape"][1:]]}, indent=2)
                self.storage.replace(key, data.encode())

        return self._derived(key, f"array metadata {why}", repair)

    def _rows_claimed(self) -> int:
        names = self.storage.names(layout.claims(self.spec_id))
        claimed = [int(name) for name in names if name.isdigit()]
        return (max([*claimed, *(c.shard for c in self.live)], default=-1) + 1) * CLIPS_PER_SHARD

    def _check_claims(self) -> list[Problem]:
        """A shard without its claim would be claimed again, and written over, by the next writer."""
        folder = layout.claims(self.spec_id)
        names = set(self.storage.names(folder))
        lost = {
            name: commit
            for commit in self.commits
            if (name := f"{commit.shard:08d}") not in names and not commit.abandoned
        }
        if not lost:
            return []

        def repair() -> None:
            for name, commit in lost.items():
                note = {"unit_id": commit.unit_id, "host": "", "pid": 0}
                self.storage.create(f"{folder}/{name}", json.dumps(note).encode())

        why = (
            f"{len(lost)} committed shards are not claimed ({some(lost)}), so that the next writer "
            "would take their numbers"
        )
        return [self._derived(folder, why, repair)]

    # -------------------------------------------------------------------- small arrays

    def _check_derived(self, commit: Commit) -> list[Problem]:
        problems = []
        for plan, values in _derived_values(self.plans, commit):
            key, data = self._file(plan.name, commit.shard), encode_chunk(plan, values)
            try:
                stored = self.storage.read(key)
                if stored == data:
                    continue
                found = decode_chunk(plan, stored)
            except FileNotFoundError:
                if not self._still_counts(commit):
                    return []
                why = "is missing"
            except OSError as error:
                why = f"cannot be read ({error.strerror or error})"
            except CorruptTokensError as error:
                why = f"is damaged ({error})"
            else:
                if not self._is_right(commit, plan, found, values):
                    why = (
                        "whole by its checksum, but says otherwise than the commit record "
                        f"{commit.unit_id}, which nothing else confirms"
                    )
                    problems.append(self._damage(key, why, _COMPARE))
                    continue
                why = "differs from the commit record"
            problems.append(self._derived(key, why, self._rewrite(commit, key, data)))
        return problems

    def _rewrite(self, commit: Commit, key: str, data: bytes) -> Callable[[], None]:
        def repair() -> None:
            self.storage.replace(key, data)
            try:
                self.storage.size(commit_key(self.spec_id, commit.unit_id))
            except FileNotFoundError:
                self.storage.delete(key)  # garbage collection removed the unit beside us

        return repair

    def _is_right(self, commit: Commit, plan: ArrayPlan, found: Values, wanted: Values) -> bool:
        """True if a commit record that a whole array contradicts is confirmed by something else.

        That is its own checksum. Records of old stores have none, and a damaged one may still
        decode: their clips are confirmed by the record's name, which is their hash, and the rest of
        an entry by the checksum of the tokens.
        """
        if self._has_checksum(commit):
            return True
        if plan.name == "clip":
            keys = [entry.key for entry in commit.clips]
            names = {unit_id(self.spec_id, keys, after) for after in ((), commit.replaces)}
            return commit.unit_id in names
        return all(
            entry.status is not Status.OK or self._reads(self.plans[0], commit, entry)
            for entry in commit.clips
            if found[entry.row % CLIPS_PER_SHARD] != wanted[entry.row % CLIPS_PER_SHARD]
        )

    def _has_checksum(self, commit: Commit) -> bool:
        """True if a record has a checksum, which `read_commit` has compared then."""
        return b'"checksum":' in self.storage.read(commit_key(self.spec_id, commit.unit_id))

    # -------------------------------------------------------------------- shards

    def _check_shards_exist(self) -> list[Problem]:
        encoded = [c for c in self.live if c.count(Status.OK)]
        gone = [c for c in in_parallel(self._if_gone, encoded, self.storage) if c is not None]
        self.without_shard = {commit.unit_id for commit in gone}
        if not gone:
            return []
        n_clips = sum(commit.count(Status.OK) for commit in gone)
        shards = sorted(commit.shard for commit in gone)
        why = (
            f"{len(gone)} of {len(encoded)} committed shards are missing ({some(shards)}), "
            f"{n_clips} clips"
        )
        cure = (
            f"Restore {self.storage.url}/{self._file('tokens', shards[0])}"
            f"{' and the others' if len(gone) > 1 else ''} from a copy of the store; if this store is "
            f"itself a copy, it is not complete: copy {layout.ZARR} again."
        )
        return [self._damage(f"{self.group}/tokens", why, cure)]

    def _if_gone(self, commit: Commit) -> Commit | None:
        try:
            self.storage.size(self._file("tokens", commit.shard))
        except FileNotFoundError:
            return commit if self._still_counts(commit) else None
        return None

    def read_clips(self, report: VerifyReport, on_clip: Callable[[], None] | None) -> None:
        """Read every clip that counts, and what is stored beside it."""
        units = [commit for commit in self.live if commit.unit_id not in self.without_shard]
        work = self._read_unit if self.plans else self._read_foreign_unit
        pool = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="verify")
        try:
            for found in pool.map(work, units):
                report.findings += [problem.finding for problem in found.problems]
                report.n_clips += found.n_clips
                report.n_bytes += found.n_bytes
                for _ in range(found.n_clips if on_clip is not None else 0):
                    assert on_clip is not None
                    on_clip()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_unit(self, commit: Commit) -> _UnitRead:
        found = _UnitRead()
        key = self._file("tokens", commit.shard)
        encoded = [entry for entry in commit.clips if entry.status is Status.OK]
        if not encoded:
            return found
        try:
            shard = Shard(self.storage, key, self.plans[0])
        except (CorruptTokensError, OSError) as error:
            if self._still_counts(commit):
                found.problems.append(self._broken_shard(commit, key, error))
            return found
        broken: dict[str, list[Entry]] = {}
        for entry in encoded:
            why, n_bytes = self._clip_damage(key, shard, entry)
            found.n_clips += 1
            found.n_bytes += n_bytes
            if why is not None:
                broken.setdefault(why, []).append(entry)
        for why, entries in broken.items():
            found.problems.append(self._broken_clips(commit, key, why, entries))
        for plan in self.plans[1:]:
            if not plan.is_derived:
                found.problems += self._small_damage(commit, plan)
        return found

    def _broken_shard(self, commit: Commit, key: str, error: Exception) -> Problem:
        small = sum(len(_empty_chunk(plan)) for plan in self.plans[1:])
        why = str(error).removeprefix(f"{key}: ")
        try:
            n_bytes, wanted = self.storage.size(key), commit.n_bytes - small
        except OSError as size_error:
            why = f"cannot be read ({size_error.strerror or size_error})"
        else:
            if n_bytes < wanted:
                why = f"truncated to {n_bytes} bytes of {wanted}"
        return self._damage(key, f"{why}; it holds {commit.count(Status.OK)} clips")

    def _clip_damage(self, key: str, shard: Shard, entry: Entry) -> tuple[str | None, int]:
        """Return what is wrong with a clip, if anything, and the bytes that were read.

        The checksum of each chunk is checked too: it covers the padding of a sound's last second,
        which our readers do not look at and other libraries do.
        """
        place, plan = entry.row % CLIPS_PER_SHARD, self.plans[0]
        try:
            start, n_bytes = shard.span(place, entry.valid_len)
            data = memoryview(self.storage.read_range(key, start, n_bytes))
            bodies = []
            for at, length in shard.chunks(place, entry.valid_len):
                chunk = data[at - start : at - start + length]
                body, checksum = chunk[:-_CRC_BYTES], bytes(chunk[-_CRC_BYTES:])
                if crc32c_library.crc32c(body) != int.from_bytes(checksum, "little"):
                    return "the checksum of a chunk differs", len(data)
                bodies.append(body if plan.compression == "none" else Blosc().decode(body))
        except (CorruptTokensError, RuntimeError) as error:
            return str(error), 0
        except OSError as error:
            return f"cannot be read ({error.strerror or error})", 0
        joined = bodies[0] if len(bodies) == 1 else b"".join(bodies)
        count = entry.valid_len * math.prod(plan.tail[1:])
        dtype = np.dtype(plan.dtype).newbyteorder("<")
        if len(joined) < count * dtype.itemsize:
            return "a chunk is shorter than the spec says", len(data)
        tokens = np.frombuffer(joined, dtype, count)
        if crc32c(tokens) != entry.crc32c:
            return _RECORD_DIFFERS, len(data)
        return _value_damage(self.spec, tokens), len(data)

    def _broken_clips(
        self, commit: Commit, key: str, why: str, entries: Sequence[Entry]
    ) -> Problem:
        names = some(f"row {entry.row}, clip {entry.key[:16]}" for entry in entries)
        why = f"{why}: {len(entries)} of {commit.count(Status.OK)} clips ({names})"
        if why.startswith(_NOT_FINITE):
            cure = "Encode these clips again into a new store: the encoder gave these values."
            return self._damage(key, why, cure)
        if why.startswith(_RECORD_DIFFERS):
            record = commit_key(self.spec_id, commit.unit_id)
            return self._damage(record, f"commit record: {why}")
        return self._damage(key, why)

    def _small_damage(self, commit: Commit, plan: ArrayPlan) -> list[Problem]:
        """Check one unit's part of an array that only the encoder can give: frames or scales."""
        key = self._file(plan.name, commit.shard)
        try:
            values = decode_chunk(plan, self.storage.read(key))
        except (CorruptTokensError, OSError) as error:
            if not self._still_counts(commit):
                return []
            reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            return [self._damage(key, f"{reason}; it belongs to {len(commit.clips)} clips")]
        rows = [e.row % CLIPS_PER_SHARD for e in commit.clips if e.status is Status.OK]
        if plan.name != "token_scale" or np.isfinite(values[rows]).all():
            return []
        return [self._broken_clips(commit, key, _NOT_FINITE, commit.clips)]

    def _read_foreign_unit(self, commit: Commit) -> _UnitRead:
        """Read a unit of another layout through zarr-python."""
        found = _UnitRead()
        broken: dict[str, list[Entry]] = {}
        for entry in commit.clips:
            if entry.status is not Status.OK:
                continue
            found.n_clips += 1
            try:
                tokens = self.store.read_with_zarr(self.spec, entry)
            except (OSError, RuntimeError, *JSON_ERRORS) as error:
                broken.setdefault(f"cannot be read ({error})", []).append(entry)
                continue
            found.n_bytes += tokens.nbytes
            why = (
                "CRC-32C differs from the commit record"
                if crc32c(tokens) != entry.crc32c
                else _value_damage(self.spec, tokens)
            )
            if why is not None:
                broken.setdefault(why, []).append(entry)
        where = f"{self.group}/tokens"
        for why, entries in broken.items():
            found.problems.append(self._broken_clips(commit, where, why, entries))
        return found

    # -------------------------------------------------------------------- leftovers

    def _numbers_on_disk(self) -> set[int]:
        """Return the numbers of all shards of which some file may be there."""
        names: set[str] = set()
        for plan in layout.arrays(self.spec):
            folder = f"{self.group}/{plan.name}/c"
            listing = self.storage.folders if plan.tail else self.storage.names
            names.update(listing(folder))
        return {int(name) for name in names if name.isdigit()}

    def _check_leftovers(self, on_disk: set[int]) -> list[Problem]:
        if self.n_unreadable:
            return []  # whose shards they are cannot be told
        used = {commit.shard for commit in self.live} | self.without_record
        unused = sorted(number for number in on_disk - used if self._n_files(number))
        if not unused:
            return []
        closed = {commit.shard for commit in self.commits}
        names = set(self.storage.names(layout.claims(self.spec_id)))
        claimed = [n for n in unused if n in closed or f"{n:08d}" in names]
        strange = [n for n in unused if n not in claimed]
        problems = []
        if strange:
            what = f"{len(strange)} shards that no record and no claim knows ({some(strange)})"
            cure = (
                "The copy of the store is not complete: copy commits/ and claims/ again, before "
                "anything is written to it."
            )
            what = f"{self.storage.url}/{self.group}: {what}"
            problems.append(Problem(Finding("missing", self.spec_id, what, cure)))
        if claimed:
            what = (
                f"{len(claimed)} shards of {self.spec_id} that are not committed ({some(claimed)}): "
                "of killed or running writers, or replaced by compaction. If this store is a copy, make "
                "sure first that all of commits/ was copied"
            )
            problems.append(garbage(self.storage, self.spec_id, what))
        return problems

    def _n_files(self, shard: int) -> int:
        """Count the files of a shard: a writer that gave up leaves empty folders."""
        count = 0
        for plan in self.plans:
            try:
                self.storage.size(self._file(plan.name, shard))
            except FileNotFoundError:
                continue
            count += 1
        return count

    # -------------------------------------------------------------------- snapshots and probe

    def _check_snapshots(self) -> list[Problem]:
        bad: dict[str, str] = {}
        doubtful: list[Problem] = []
        for name in sorted(self.storage.names(layout.snapshots(self.spec_id))):
            key = f"{layout.snapshots(self.spec_id)}/{name}"
            try:
                snapshot = read_snapshot(self.storage, key)
            except FileNotFoundError:
                continue  # a newer one took its place
            except (pa.ArrowException, EmocacheError, OSError, *JSON_ERRORS) as error:
                bad[key] = f"is damaged ({error})"
                continue
            if gone := self._gone(snapshot):
                lost = self._lost(snapshot, gone)
                if lost is not None:
                    doubtful.append(lost)
                else:
                    bad[key] = "is out of date: it names units that are gone"
            elif self._contradicts(snapshot):
                why = "says otherwise than the commit records"
                if all(map(self._has_checksum, self.commits)):
                    bad[key] = why
                else:
                    why = f"snapshot, whole by its checksum, {why}, which nothing else confirms"
                    doubtful.append(self._damage(key, why, _COMPARE))

        def repair() -> None:
            written = write_snapshot(self.storage, self.spec_id, Index(self.commits))
            for key in bad.keys() - {written}:
                self.storage.delete(key)

        if not bad:
            return doubtful
        why = "; ".join(f"{key.rsplit('/', 1)[-1]} {why}" for key, why in bad.items())
        problem = self._derived(layout.snapshots(self.spec_id), f"snapshot {why}", repair)
        if not self.n_unreadable and not doubtful:
            return [problem]
        # A whole snapshot may be all that is left of a record: it is not replaced now.
        cure = (
            "Restore the damaged commit records first, then run: emocache store doctor "
            f"{self.storage.url}"
        )
        return [*doubtful, Problem(replace(problem.finding, cure=cure))]

    def _gone(self, snapshot: Index) -> set[str]:
        """Return the units of a snapshot that have no record."""
        gone = {identity.decode() for identity in snapshot.units.ids.tolist()} - set(self.listed)
        return gone - set(unit_ids(self.storage, self.spec_id)) if gone else gone  # some may be new

    def _lost(self, snapshot: Index, gone: set[str]) -> Problem | None:
        """Report records that are gone though no other unit took their clips over."""
        table = snapshot.units
        counted = table.counts & np.isin(table.ids, [identity.encode() for identity in gone])
        unit_of = dict(zip(table.shard[counted].tolist(), table.ids[counted].tolist(), strict=True))
        index = Index(self.commits)
        lost = {
            entry.row // CLIPS_PER_SHARD
            for entry in snapshot
            if entry.row // CLIPS_PER_SHARD in unit_of and entry.key not in index
        }
        if not lost or self.n_unreadable:
            return None
        self.without_record |= lost
        names = sorted(f"{unit_of[shard].decode()}.json" for shard in lost)
        why = f"{len(lost)} commit records are gone that a snapshot names ({some(names)})"
        cure = (
            f"Restore {self.storage.url}/{layout.commits(self.spec_id)} from a copy of the store; if this "
            "store is itself a copy, it is not complete. If `emocache store gc` was interrupted, run it "
            "again."
        )
        return self._damage(layout.commits(self.spec_id), why, cure)

    def _contradicts(self, snapshot: Index) -> bool:
        """True if a snapshot does not say what the records of its units say."""
        ids = {identity.decode() for identity in snapshot.units.ids.tolist()}
        commits = [commit for commit in self.commits if commit.unit_id in ids]
        if len(commits) < len(ids):
            return False  # newer than what was read, or some records are damaged
        units = Index(commits).units
        columns = ("ids", "shard", "n_bytes", "counts")
        if any(not np.array_equal(getattr(units, c), getattr(snapshot.units, c)) for c in columns):
            return True
        replaced = {identity for commit in commits for identity in commit.replaces}
        live = [c for c in commits if not c.abandoned and c.unit_id not in replaced]
        entries = [entry for commit in live for entry in commit.clips]
        by_row = {entry.row: entry for entry in entries}
        settled = {entry.key for entry in entries if entry.status is not Status.FAILED}
        keys = sorted({entry.key for entry in entries})
        if len(keys) != len(snapshot):
            return True
        # Which of several rows of a clip it names may differ: compaction changes the order.
        rows = zip(keys, *(column.tolist() for column in snapshot.locate(keys)), strict=True)
        return not all(
            (entry := by_row.get(row)) is not None
            and (entry.key, entry.valid_len, entry.crc32c or 0) == (key, valid_len, checksum)
            and entry.status.code == status
            and (entry.status is not Status.FAILED or key not in settled)
            for key, row, valid_len, checksum, status in rows
        )

    def _check_probe(self) -> list[Problem]:
        key = layout.probe(self.spec_id)
        try:
            values = np.asarray(json.loads(self.storage.read(key)), np.float64)
            if values.ndim == 1 and len(values) and np.isfinite(values).all():
                return []
            why = "is not a list of finite numbers"
        except FileNotFoundError:
            return []  # imported tokens have none
        except (ValueError, TypeError, OSError) as error:
            why = f"cannot be read ({error})"
        cure = (
            f"Restore {self.storage.url}/{key} from a copy of the store, or remove it: the next "
            "extraction records the answer anew; compare stored tokens first with `emocache store "
            "verify --deep`."
        )
        return [self._damage(key, f"the encoder's recorded answer {why}", cure)]


_RECORD_DIFFERS = "its checksum is not that of the tokens, which are whole by their own"
_NOT_FINITE = "holds NaN or infinity"
_COMPARE = "Compare both with a copy of the store, and restore what differs there."


def _contradiction(spec: TokenSpec, commit: Commit) -> str | None:
    """Return how a commit record that decodes contradicts itself or the spec."""
    rows, keys = {entry.row for entry in commit.clips}, {entry.key for entry in commit.clips}
    if not len(rows) == len(keys) == len(commit.clips):
        return "names a row or a clip twice"
    if any(row // CLIPS_PER_SHARD != commit.shard for row in rows):
        return f"names rows outside its shard {commit.shard}"
    longest = spec.max_shape[0]
    for entry in commit.clips:
        is_ok = entry.status is Status.OK
        fits = entry.valid_len <= longest if spec.stream == "audio" else entry.valid_len == longest
        if is_ok != (entry.crc32c is not None) or is_ok != (entry.valid_len > 0):
            return f"row {entry.row}: status {entry.status.value} with {entry.valid_len} tokens"
        if is_ok and not fits:
            return f"row {entry.row}: {entry.valid_len} tokens, the spec says {longest}"
        if is_ok and not 0 <= (entry.crc32c or 0) < 2**32:
            return f"row {entry.row}: {entry.crc32c} is no CRC-32C"
    return None


def _same_array(found: dict[str, Any], ours: dict[str, Any]) -> bool:
    """True if array metadata means what ours does, apart from the length of the first axis."""
    try:
        data = ArrayV3Metadata.from_dict(found).to_buffer_dict(default_buffer_prototype())
        normal = json.loads(data["zarr.json"].to_bytes())
        wanted = {**ours, "shape": [normal["shape"][0], *ours["shape"][1:]]}
    except JSON_ERRORS:
        return False
    attributes = normal.pop("attributes"), wanted.pop("attributes")
    return bool(fits(*attributes) and normal == wanted)


def _empty_chunk(plan: ArrayPlan) -> bytes:
    return encode_chunk(plan, np.full((CLIPS_PER_SHARD, *plan.tail), plan.fill, plan.dtype))


def _derived_values(plans: Iterable[ArrayPlan], commit: Commit) -> list[tuple[ArrayPlan, Values]]:
    """Return one unit's rows of the derived arrays, as the commit record says."""
    found = []
    for plan in plans:
        if not plan.is_derived:
            continue
        values = np.full((CLIPS_PER_SHARD, *plan.tail), plan.fill, plan.dtype)
        for entry in commit.clips:
            place = entry.row % CLIPS_PER_SHARD
            if plan.name == "valid_len":
                values[place] = entry.valid_len
            elif plan.name == "status":
                values[place] = entry.status.code
            else:
                assert plan.name == "clip", "every derived array is known here"
                values[place] = np.frombuffer(bytes.fromhex(entry.key), np.uint8)
        found.append((plan, values))
    return found


def _value_damage(spec: TokenSpec, tokens: Values) -> str | None:
    """Return why tokens as stored are no tokens: NaN and infinity, in the spec's own dtype."""
    if spec.dtype == "int8":
        return None  # `_small_damage` looks at the scales
    values = tokens.view(ml_dtypes.bfloat16) if spec.dtype == "bfloat16" else tokens
    return None if np.isfinite(values).all() else _NOT_FINITE
