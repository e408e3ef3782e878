"""Is a store whole? `verify` reads all of it and changes nothing; `doctor` rebuilds what is derived.

Both make the same inspection. A finding that can be repaired carries its repair, so that `verify`
calls derived exactly what `doctor` writes anew: array metadata, the small derived arrays, claims,
snapshots, the store's own marker. The truth are the commit records and the shards; where one of these
is damaged, nothing else is trusted in its place, and only a copy of the store helps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import crc32c as crc32c_library
import ml_dtypes
import numpy as np
import pyarrow as pa
from numcodecs import Blosc
from zarr.core.buffer import default_buffer_prototype
from zarr.core.metadata.v3 import ArrayV3Metadata

from cache import layout
from cache.clip import Record
from cache.commit import Commit, Entry, Status, commit_key, read_commit, unit_id, unit_ids
from cache.errors import CorruptTokensError, EmocacheError, SchemaError, StoreError
from cache.index import Index, in_parallel, read_snapshot, write_snapshot
from cache.layout import CLIPS_PER_SHARD, FORMAT_NAME, FORMAT_VERSION, ArrayPlan, Compression
from cache.schema import decode, decode_json
from cache.shards import Shard, Values, can_read, crc32c, decode_chunk, encode_chunk
from cache.spec import AUDIO_FRAMES_PER_S, TokenSpec
from cache.storage import LocalStorage, Storage, open_storage
from cache.store import Marker, TokenStore
from cache.writer import group_metadata

Severity = Literal["damage", "derived", "garbage", "missing"]

_N_THREADS = 2
"""Checksums and file reads run beside one another; more would only compete for the disk."""
_CRC_BYTES = 4
_SHOWN = 3
"""Names in a message; the others are counted."""
_SHARDS_TRIED = 8
"""Committed shards that are asked for the compression when the metadata is lost."""
_AUDIO_TOLERANCE = 5
"""Tokens (0.1 s) by which a sound may differ from the container's duration: codecs pad. Measured: 0 for
the ten sound files of `docs/decoding.md` that state one, up to 5 fewer beside pictures."""
_GROUP_NAME = re.compile(r"(audio|video|image)-([0-9a-f]{16})")
_SPEC_ID = re.compile(r"[0-9a-f]{16}")
_JSON_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError)
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


@dataclass
class DoctorReport:
    """What `doctor` did and what it cannot do."""

    repaired: list[Finding] = field(default_factory=list)
    """In a dry run, what would be repaired."""
    remaining: list[Finding] = field(default_factory=list)
    """Needs another cure, which each finding names."""


@dataclass(frozen=True)
class _Problem:
    finding: Finding
    repair: Callable[[], None] | None = None


def verify(
    store: TokenStore,
    records: Iterable[Record] | None = None,
    on_clip: Callable[[], None] | None = None,
) -> VerifyReport:
    """Read everything that is committed, and compare it with its checksums, spec and records.

    Nothing is changed, and nothing that is found stops the work. Shards of units that are replaced
    (compaction) are not read.

    Args:
        store: Opened by `TokenStore.open`, or by `doctor_open` if its marker is damaged.
        records: A manifest's: also report clips that are not in the store, and entries that
            contradict what the manifest says of the clip.
        on_clip: Called after each clip that was read.

    Raises:
        StoreError: The store cannot be listed.
    """
    report = VerifyReport()
    wanted = None if records is None else list(records)
    with _naming(store.root, "read"):
        problems, specs = _inspect_store(store, ())
        report.findings += [problem.finding for problem in problems]
        for spec in specs:
            check = _SpecCheck(store, spec)
            report.findings += [problem.finding for problem in check.inspect()]
            check.read_clips(report, on_clip)
            report.n_specs += 1
            report.n_units += len(check.live)
            if wanted is not None:
                report.findings += _compare_with_records(store.root, spec, check, wanted)
    return report


def doctor(
    store: TokenStore, *, dry_run: bool = False, specs: Sequence[TokenSpec] = ()
) -> DoctorReport:
    """Rebuild what can be derived from committed data; report what cannot.

    Safe beside running writers and readers: files are created or replaced as a whole, in the way in
    which writers do it. A second run finds nothing to do. Tokens are read only where a record and an
    array contradict one another; `verify` reads all of them.

    Args:
        store: From `doctor_open`.
        dry_run: Change nothing; report what would be done.
        specs: Candidates for groups whose metadata is lost, known again by their `spec_id`. One
            without weights is tried with the weights of the store's other specs.

    Raises:
        StoreError: The store cannot be listed or written.
    """
    report = DoctorReport()

    def settle(problems: Iterable[_Problem]) -> None:
        for problem in problems:
            if problem.repair is None:
                report.remaining.append(problem.finding)
                continue
            if not dry_run:
                problem.repair()
            report.repaired.append(problem.finding)

    with _naming(store.root, "read" if dry_run else "read or written"):
        problems, found = _inspect_store(store, specs)
        settle(problems)
        for spec in found:
            settle(_SpecCheck(store, spec).inspect())
    if not dry_run:
        store.refresh()
    return report


def doctor_open(where: str | Path) -> TokenStore:
    """Open a store whose marker `store.json` may be lost or damaged; nothing is written.

    `doctor` writes the marker again.

    Raises:
        StoreError: Not a store, of a newer version, or nothing but a damaged marker.
    """
    storage = open_storage(where)
    with _naming(storage.url, "read"):
        if _marker_damage(storage) is None or not _is_evidently_a_store(storage):
            return TokenStore.open(where)
        version = _stated_version(storage)
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{storage.url}: store format {version}, this version reads up to {FORMAT_VERSION}. "
                "Update emocache; nothing was changed."
            )
        return TokenStore(storage, _compression(storage))


@contextmanager
def _naming(root: str, action: str) -> Iterator[None]:
    """Name the store in errors of the file system that concern all of it."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{root}: cannot be {action} ({error.strerror or error}). Check the permissions and the "
            "disk, and run the same command again."
        ) from error


# ------------------------------------------------------------------------- the store as a whole


def _inspect_store(
    store: TokenStore, candidates: Sequence[TokenSpec]
) -> tuple[list[_Problem], list[TokenSpec]]:
    """Check what belongs to no spec, and each group's metadata; return the specs that are known."""
    storage = store.storage
    group_problems, specs = _groups(storage, candidates)
    problems = [*_marker(store), *_root(storage), *group_problems]
    if isinstance(storage, LocalStorage) and (partial := storage.partial_files()):
        what = f"{len(partial)} temporary files of killed or running writers ({_some(partial)})"
        problems.append(_garbage(storage, None, what))
    return problems, specs


def _garbage(storage: Storage, spec_id: str | None, what: str) -> _Problem:
    cure = f"Run: emocache store gc {storage.url}"
    return _Problem(Finding("garbage", spec_id, f"{storage.url}: {what}", cure))


def _derived(
    storage: Storage, spec_id: str | None, key: str, why: str, repair: Callable[[], None]
) -> _Problem:
    cure = f"Run: emocache store doctor {storage.url}"
    return _Problem(Finding("derived", spec_id, f"{storage.url}/{key}: {why}", cure), repair)


def _damage(
    storage: Storage, spec_id: str, key: str, why: str, cure: str | None = None
) -> _Problem:
    cure = cure or f"Restore {storage.url}/{key} from a copy of the store."
    return _Problem(Finding("damage", spec_id, f"{storage.url}/{key}: {why}", cure))


def _some(names: Iterable[object]) -> str:
    """List a few of many."""
    every = [str(name) for name in names]
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


def _marker_damage(storage: Storage) -> str | None:
    try:
        decode_json(Marker, storage.read(layout.MARKER), layout.MARKER)
    except FileNotFoundError:
        return "is missing"
    except SchemaError as error:
        return f"is damaged ({error})"
    return None


def _marker(store: TokenStore) -> list[_Problem]:
    why = _marker_damage(store.storage)
    if why is None:
        return []

    def repair() -> None:
        version = _stated_version(store.storage)
        marker = Marker(format=FORMAT_NAME, version=version, compression=store.compression)
        store.storage.replace(layout.MARKER, marker.model_dump_json().encode())

    return [_derived(store.storage, None, layout.MARKER, why, repair)]


def _stated_version(storage: Storage) -> int:
    """Return the newest format version that a group states; this one's own if none does."""
    versions = []
    for name in storage.folders(layout.ZARR):
        try:
            document = json.loads(storage.read(f"{layout.ZARR}/{name}/zarr.json"))
            versions.append(int(document["attributes"]["emocache"]["format_version"]))
        except (FileNotFoundError, *_JSON_ERRORS):
            continue  # `_groups` reports it
    return max(versions, default=FORMAT_VERSION)


def _compression(storage: Storage) -> Compression:
    """Find out how a store's chunks are compressed, without its marker."""
    for spec in _groups(storage, ())[1]:
        check = _SpecCheck(TokenStore(storage), spec)
        check.read_records()
        found = check.compression()
        if found is not None:
            return found
    return "none"


def _is_evidently_a_store(storage: Storage) -> bool:
    groups = any(_GROUP_NAME.fullmatch(name) for name in storage.folders(layout.ZARR))
    return groups or any(_SPEC_ID.fullmatch(name) for name in storage.folders("commits"))


_ROOT_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def _root(storage: Storage) -> list[_Problem]:
    """Check the metadata of the Zarr hierarchy's root: nothing of ours needs it, strangers do."""
    key = f"{layout.ZARR}/zarr.json"
    try:
        found = json.loads(storage.read(key))
    except FileNotFoundError:
        why = "is missing"
    except ValueError as error:
        why = f"is not a JSON document ({error})"
    else:
        if isinstance(found, dict) and _fits(found, {"zarr_format": 3, "node_type": "group"}):
            return []
        why = "does not describe a Zarr v3 group"
    data = json.dumps(_ROOT_GROUP).encode()
    return [_derived(storage, None, key, why, lambda: storage.replace(key, data))]


def _fits(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(found.get(name) == value for name, value in wanted.items())


def _groups(
    storage: Storage, candidates: Sequence[TokenSpec]
) -> tuple[list[_Problem], list[TokenSpec]]:
    """Read the group metadata of every spec."""
    named = {
        match[2]: match[0]
        for name in sorted(storage.folders(layout.ZARR))
        if (match := _GROUP_NAME.fullmatch(name))
    }
    committed = {name for name in storage.folders("commits") if _holds_commits(storage, name)}
    problems, known, lost = list[_Problem](), dict[str, TokenSpec](), dict[str, str]()
    for spec_id, folder in named.items():
        try:
            spec, differs = _read_group(storage, folder)
        except FileNotFoundError:
            if spec_id in committed:  # else a writer is creating the group, or died doing so
                lost[spec_id] = "is missing"
        except SchemaError as error:
            lost[spec_id] = f"is damaged ({error})"
        else:
            known[spec_id] = spec
            if differs:
                problems.append(_group_problem(storage, spec, "differs from what its spec says"))
    for spec_id, why in lost.items():
        found = _find_spec(spec_id, candidates, known.values())
        if found is not None:
            problems.append(_group_problem(storage, found, why))
            known[spec_id] = found
            continue
        key = f"{layout.ZARR}/{named[spec_id]}/zarr.json"
        n_units = len(unit_ids(storage, spec_id))
        cure = (
            f"Restore {storage.url}/{key} from a copy of the store. If the preset and the checkpoint of "
            "these tokens are known, `emocache store doctor` with them writes it again."
        )
        why = f"{why}, and with it the spec of {n_units} committed units"
        problems.append(_damage(storage, spec_id, key, why, cure))
    for spec_id in sorted(committed - named.keys()):
        why = f"commit records without tokens: there is no group {layout.ZARR}/*-{spec_id}"
        cure = f"The copy of the store is not complete: copy {layout.ZARR} again."
        problems.append(_damage(storage, spec_id, layout.commits(spec_id), why, cure))
    return problems, sorted(known.values(), key=lambda spec: (spec.stream, spec.spec_id))


def _holds_commits(storage: Storage, spec_id: str) -> bool:
    """True if a spec has a commit; of one that was dropped, only tombstones of dead writers stay."""
    for identity in unit_ids(storage, spec_id):
        try:
            if not read_commit(storage, spec_id, identity).abandoned:
                return True
        except FileNotFoundError:
            continue
        except SchemaError:
            return True
    return False


def _read_group(storage: Storage, folder: str) -> tuple[TokenSpec, bool]:
    """Return a group's spec, and whether its other metadata differs from what we write.

    Raises:
        FileNotFoundError: There is none.
        SchemaError: The spec cannot be read, or is not the one that the folder is named by.
    """
    key = f"{layout.ZARR}/{folder}/zarr.json"
    try:
        document = json.loads(storage.read(key))
        attributes = document["attributes"]["emocache"]
        stored = attributes["spec"]
    except _JSON_ERRORS as error:
        raise SchemaError(f"no spec can be read from it: {error!r}") from None
    spec = decode(TokenSpec, stored, folder)
    if not spec.is_resolved or folder != f"{spec.stream}-{spec.spec_id}":
        raise SchemaError(f"its spec does not hash to the spec_id in the folder's name {folder}")
    ours = layout.group_attributes(spec)["emocache"]
    same = _fits(document, {"zarr_format": 3, "node_type": "group"}) and all(
        attributes.get(name, ours[name]) == ours[name]
        for name in ("spec_id", "clips_per_shard", "status_codes")
    )
    return spec, not same or "spec_id" not in attributes


def _group_problem(storage: Storage, spec: TokenSpec, why: str) -> _Problem:
    key = f"{layout.group(spec)}/zarr.json"

    def repair() -> None:
        storage.replace(key, group_metadata(spec, layout.arrays(spec))["zarr.json"])

    return _derived(storage, spec.spec_id, key, why, repair)


def _find_spec(
    spec_id: str, candidates: Iterable[TokenSpec], known: Iterable[TokenSpec]
) -> TokenSpec | None:
    """Return the candidate with this id; its weights may be those of another spec of the store."""
    weights: dict[str, set[str | None]] = {"whisper": set(), "eva": set()}
    for spec in known:
        weights[spec.encoder.kind].add(spec.encoder.weights_sha256)
    for candidate in candidates:
        digests = {None} if candidate.is_resolved else weights[candidate.encoder.kind]
        resolved = [candidate if d is None else candidate.with_weights(d) for d in digests]
        for spec in resolved:
            if spec.spec_id == spec_id:
                return spec
    return None


# ------------------------------------------------------------------------------------ one spec


@dataclass
class _UnitRead:
    problems: list[_Problem] = field(default_factory=list)
    n_clips: int = 0
    n_bytes: int = 0


class _SpecCheck:
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

    def _damage(self, key: str, why: str, cure: str | None = None) -> _Problem:
        return _damage(self.storage, self.spec_id, key, why, cure)

    def _derived(self, key: str, why: str, repair: Callable[[], None]) -> _Problem:
        return _derived(self.storage, self.spec_id, key, why, repair)

    def inspect(self) -> list[_Problem]:
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

    def read_records(self) -> list[_Problem]:
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

    def _read_record(self, identity: str) -> Commit | _Problem | None:
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
        except _JSON_ERRORS:
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

    def _check_metadata(self) -> list[_Problem]:
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

    def _metadata_problem(self, array: str, ours: dict[str, Any], why: str) -> _Problem:
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

    def _check_claims(self) -> list[_Problem]:
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
            f"{len(lost)} committed shards are not claimed ({_some(lost)}), so that the next writer "
            "would take their numbers"
        )
        return [self._derived(folder, why, repair)]

    # -------------------------------------------------------------------- small arrays

    def _check_derived(self, commit: Commit) -> list[_Problem]:
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

    def _check_shards_exist(self) -> list[_Problem]:
        encoded = [c for c in self.live if c.count(Status.OK)]
        gone = [c for c in in_parallel(self._if_gone, encoded, self.storage) if c is not None]
        self.without_shard = {commit.unit_id for commit in gone}
        if not gone:
            return []
        n_clips = sum(commit.count(Status.OK) for commit in gone)
        shards = sorted(commit.shard for commit in gone)
        why = (
            f"{len(gone)} of {len(encoded)} committed shards are missing ({_some(shards)}), "
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

    def _broken_shard(self, commit: Commit, key: str, error: Exception) -> _Problem:
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
    ) -> _Problem:
        names = _some(f"row {entry.row}, clip {entry.key[:16]}" for entry in entries)
        why = f"{why}: {len(entries)} of {commit.count(Status.OK)} clips ({names})"
        if why.startswith(_NOT_FINITE):
            cure = "Encode these clips again into a new store: the encoder gave these values."
            return self._damage(key, why, cure)
        if why.startswith(_RECORD_DIFFERS):
            record = commit_key(self.spec_id, commit.unit_id)
            return self._damage(record, f"commit record: {why}")
        return self._damage(key, why)

    def _small_damage(self, commit: Commit, plan: ArrayPlan) -> list[_Problem]:
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
            except (OSError, RuntimeError, *_JSON_ERRORS) as error:
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

    def _check_leftovers(self, on_disk: set[int]) -> list[_Problem]:
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
            what = f"{len(strange)} shards that no record and no claim knows ({_some(strange)})"
            cure = (
                "The copy of the store is not complete: copy commits/ and claims/ again, before "
                "anything is written to it."
            )
            what = f"{self.storage.url}/{self.group}: {what}"
            problems.append(_Problem(Finding("missing", self.spec_id, what, cure)))
        if claimed:
            what = (
                f"{len(claimed)} shards of {self.spec_id} that are not committed ({_some(claimed)}): "
                "of killed or running writers, or replaced by compaction. If this store is a copy, make "
                "sure first that all of commits/ was copied"
            )
            problems.append(_garbage(self.storage, self.spec_id, what))
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

    def _check_snapshots(self) -> list[_Problem]:
        bad: dict[str, str] = {}
        doubtful: list[_Problem] = []
        for name in sorted(self.storage.names(layout.snapshots(self.spec_id))):
            key = f"{layout.snapshots(self.spec_id)}/{name}"
            try:
                snapshot = read_snapshot(self.storage, key)
            except FileNotFoundError:
                continue  # a newer one took its place
            except (pa.ArrowException, EmocacheError, OSError, *_JSON_ERRORS) as error:
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
        return [*doubtful, _Problem(replace(problem.finding, cure=cure))]

    def _gone(self, snapshot: Index) -> set[str]:
        """Return the units of a snapshot that have no record."""
        gone = {identity.decode() for identity in snapshot.units.ids.tolist()} - set(self.listed)
        return gone - set(unit_ids(self.storage, self.spec_id)) if gone else gone  # some may be new

    def _lost(self, snapshot: Index, gone: set[str]) -> _Problem | None:
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
        why = f"{len(lost)} commit records are gone that a snapshot names ({_some(names)})"
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

    def _check_probe(self) -> list[_Problem]:
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
    except _JSON_ERRORS:
        return False
    attributes = normal.pop("attributes"), wanted.pop("attributes")
    return bool(_fits(*attributes) and normal == wanted)


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


# -------------------------------------------------------------------------------- the manifest


def _compare_with_records(
    root: str, spec: TokenSpec, check: _SpecCheck, records: Sequence[Record]
) -> list[Finding]:
    """Compare a manifest's records with what is committed of their clips."""
    index = Index(check.commits)
    by_key = {record.token_key(spec): record for record in records}
    absent: list[str] = []
    wrong: dict[str, list[str]] = {}
    for key, record in by_key.items():
        entry = index.get(key)
        if entry is None:
            absent.append(record.uid)
        elif (why := _disagreement(spec, entry, record)) is not None:
            wrong.setdefault(why, []).append(record.uid)
    findings = []
    if absent:
        what = (
            f"{root}: {len(absent)} of {len(by_key)} clips of the manifest have no {spec.stream} "
            f"tokens under {spec.spec_id} ({_some(absent)})"
        )
        cure = f"Encode them with: emocache extract PRESET --manifest ... --store {root}"
        if check.n_unreadable:
            cure = f"Restore the damaged commit records first; they may be there. {cure}"
        findings.append(Finding("missing", spec.spec_id, what, cure))
    for why, uids in wrong.items():
        what = f"{root}: {why} under {spec.spec_id}: {len(uids)} clips ({_some(uids)})"
        cure = (
            "Index the folder again with `emocache index`; if both still disagree, `emocache store "
            "verify --deep` encodes clips again and tells."
        )
        findings.append(Finding("damage", spec.spec_id, what, cure))
    return findings


def _disagreement(spec: TokenSpec, entry: Entry, record: Record) -> str | None:
    """Return how an entry contradicts what a manifest says of the clip."""
    clip = record.clip
    has = {"audio": clip.has_audio, "video": clip.has_video, "image": clip.has_image}[spec.stream]
    if has and entry.status is Status.ABSENT:
        return f"the {spec.stream} stream is absent, but the manifest says that there is one"
    if has is False and entry.status is Status.OK:
        return f"there are {spec.stream} tokens, but the manifest says that there is no such stream"
    if spec.stream != "audio" or entry.status is not Status.OK or clip.duration_s is None:
        return None
    expected = min(spec.max_shape[0], math.ceil(clip.duration_s * AUDIO_FRAMES_PER_S))
    if entry.valid_len > expected + _AUDIO_TOLERANCE:
        return "more audio tokens than the clip's duration holds"
    # Beside pictures a sound may end early; where damage was passed over, samples are lost.
    is_sound = not (clip.has_video or clip.has_image) and entry.remark is None
    if is_sound and entry.valid_len < expected - _AUDIO_TOLERANCE:
        return "fewer audio tokens than the clip's duration holds"
    return None
