"""Is a store whole? `verify` reads all of it and changes nothing; `doctor` rebuilds what is derived.

Both make the same inspection. A finding that can be repaired carries its repair, so that `verify`
calls derived exactly what `doctor` writes anew: array metadata, the small derived arrays, claims,
snapshots, the store's own marker. The truth are the commit records and the shards; where one of these
is damaged, nothing else is trusted in its place, and only a copy of the store helps.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cache import layout
from cache.clip import Record
from cache.commit import Entry, Status, read_commit, unit_ids
from cache.errors import SchemaError, StoreError
from cache.index import Index
from cache.inspection import (
    JSON_ERRORS,
    Finding,
    Problem,
    SpecCheck,
    VerifyReport,
    damage,
    derived,
    fits,
    garbage,
    some,
)
from cache.layout import FORMAT_NAME, FORMAT_VERSION, Compression
from cache.place import open_storage
from cache.schema import decode, decode_json
from cache.spec import TokenSpec
from cache.storage import LocalStorage, Storage
from cache.store import Marker, TokenStore
from cache.writer import group_metadata

_AUDIO_TOLERANCE = 5
"""Tokens (0.1 s) by which a sound may differ from the container's duration: codecs pad. Measured: 0 for
the ten sound files of `docs/decoding.md` that state one, up to 5 fewer beside pictures."""
_GROUP_NAME = re.compile(r"(audio|video|image)-([0-9a-f]{16})")
_SPEC_ID = re.compile(r"[0-9a-f]{16}")


@dataclass
class DoctorReport:
    """What `doctor` did and what it cannot do."""

    repaired: list[Finding] = field(default_factory=list)
    """In a dry run, what would be repaired."""
    remaining: list[Finding] = field(default_factory=list)
    """Needs another cure, which each finding names."""


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
            check = SpecCheck(store, spec)
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

    def settle(problems: Iterable[Problem]) -> None:
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
            settle(SpecCheck(store, spec).inspect())
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


def _inspect_store(
    store: TokenStore, candidates: Sequence[TokenSpec]
) -> tuple[list[Problem], list[TokenSpec]]:
    """Check what belongs to no spec, and each group's metadata; return the specs that are known."""
    storage = store.storage
    group_problems, specs = _groups(storage, candidates)
    problems = [*_marker(store), *_root(storage), *group_problems]
    if isinstance(storage, LocalStorage) and (partial := storage.partial_files()):
        what = f"{len(partial)} temporary files of killed or running writers ({some(partial)})"
        problems.append(garbage(storage, None, what))
    return problems, specs


def _marker_damage(storage: Storage) -> str | None:
    try:
        decode_json(Marker, storage.read(layout.MARKER), layout.MARKER)
    except FileNotFoundError:
        return "is missing"
    except SchemaError as error:
        return f"is damaged ({error})"
    return None


def _marker(store: TokenStore) -> list[Problem]:
    why = _marker_damage(store.storage)
    if why is None:
        return []

    def repair() -> None:
        version = _stated_version(store.storage)
        marker = Marker(format=FORMAT_NAME, version=version, compression=store.compression)
        store.storage.replace(layout.MARKER, marker.model_dump_json().encode())

    return [derived(store.storage, None, layout.MARKER, why, repair)]


def _stated_version(storage: Storage) -> int:
    """Return the newest format version that a group states; this one's own if none does."""
    versions = []
    for name in storage.folders(layout.ZARR):
        try:
            document = json.loads(storage.read(f"{layout.ZARR}/{name}/zarr.json"))
            versions.append(int(document["attributes"]["emocache"]["format_version"]))
        except (FileNotFoundError, *JSON_ERRORS):
            continue  # `_groups` reports it
    return max(versions, default=FORMAT_VERSION)


def _compression(storage: Storage) -> Compression:
    """Find out how a store's chunks are compressed, without its marker."""
    for spec in _groups(storage, ())[1]:
        check = SpecCheck(TokenStore(storage), spec)
        check.read_records()
        found = check.compression()
        if found is not None:
            return found
    return "none"


def _is_evidently_a_store(storage: Storage) -> bool:
    groups = any(_GROUP_NAME.fullmatch(name) for name in storage.folders(layout.ZARR))
    return groups or any(_SPEC_ID.fullmatch(name) for name in storage.folders("commits"))


_ROOT_GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def _root(storage: Storage) -> list[Problem]:
    """Check the metadata of the Zarr hierarchy's root: nothing of ours needs it, strangers do."""
    key = f"{layout.ZARR}/zarr.json"
    try:
        found = json.loads(storage.read(key))
    except FileNotFoundError:
        why = "is missing"
    except ValueError as error:
        why = f"is not a JSON document ({error})"
    else:
        if isinstance(found, dict) and fits(found, {"zarr_format": 3, "node_type": "group"}):
            return []
        why = "does not describe a Zarr v3 group"
    data = json.dumps(_ROOT_GROUP).encode()
    return [derived(storage, None, key, why, lambda: storage.replace(key, data))]


def _groups(
    storage: Storage, candidates: Sequence[TokenSpec]
) -> tuple[list[Problem], list[TokenSpec]]:
    """Read the group metadata of every spec."""
    named = {
        match[2]: match[0]
        for name in sorted(storage.folders(layout.ZARR))
        if (match := _GROUP_NAME.fullmatch(name))
    }
    committed = {name for name in storage.folders("commits") if _holds_commits(storage, name)}
    problems, known, lost = list[Problem](), dict[str, TokenSpec](), dict[str, str]()
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
        problems.append(damage(storage, spec_id, key, why, cure))
    for spec_id in sorted(committed - named.keys()):
        why = f"commit records without tokens: there is no group {layout.ZARR}/*-{spec_id}"
        cure = f"The copy of the store is not complete: copy {layout.ZARR} again."
        problems.append(damage(storage, spec_id, layout.commits(spec_id), why, cure))
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
    except JSON_ERRORS as error:
        raise SchemaError(f"no spec can be read from it: {error!r}") from None
    spec = decode(TokenSpec, stored, folder)
    if not spec.is_resolved or folder != f"{spec.stream}-{spec.spec_id}":
        raise SchemaError(f"its spec does not hash to the spec_id in the folder's name {folder}")
    ours = layout.group_attributes(spec)["emocache"]
    same = fits(document, {"zarr_format": 3, "node_type": "group"}) and all(
        attributes.get(name, ours[name]) == ours[name]
        for name in ("spec_id", "clips_per_shard", "status_codes")
    )
    return spec, not same or "spec_id" not in attributes


def _group_problem(storage: Storage, spec: TokenSpec, why: str) -> Problem:
    key = f"{layout.group(spec)}/zarr.json"

    def repair() -> None:
        storage.replace(key, group_metadata(spec, layout.arrays(spec))["zarr.json"])

    return derived(storage, spec.spec_id, key, why, repair)


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


def _compare_with_records(
    root: str, spec: TokenSpec, check: SpecCheck, records: Sequence[Record]
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
            f"tokens under {spec.spec_id} ({some(absent)})"
        )
        cure = f"Encode them with: emocache extract PRESET --manifest ... --store {root}"
        if check.n_unreadable:
            cure = f"Restore the damaged commit records first; they may be there. {cure}"
        findings.append(Finding("missing", spec.spec_id, what, cure))
    for why, uids in wrong.items():
        what = f"{root}: {why} under {spec.spec_id}: {len(uids)} clips ({some(uids)})"
        cure = (
            "Index the folder again with `emocache index`; if both still disagree, `emocache store "
            "verify --deep` encodes clips again and tells."
        )
        findings.append(Finding("damage", spec.spec_id, what, cure))
    return findings


def _disagreement(spec: TokenSpec, entry: Entry, record: Record) -> str | None:
    """Return how an entry contradicts what a manifest says of the clip."""
    clip = record.seen_clip
    has = {"audio": clip.has_audio, "video": clip.has_video, "image": clip.has_image}[spec.stream]
    if has and entry.status is Status.ABSENT and entry.reason is None:
        return f"the {spec.stream} stream is absent, but the manifest says that there is one"
    if has is False and entry.status is Status.OK:
        return f"there are {spec.stream} tokens, but the manifest says that there is no such stream"
    if spec.stream != "audio" or entry.status is not Status.OK or clip.duration_s is None:
        return None
    expected = spec.audio_tokens(clip.duration_s)
    if entry.valid_len > expected + _AUDIO_TOLERANCE:
        return "more audio tokens than the clip's duration holds"
    # Beside pictures a sound may end early; where damage was passed over, samples are lost.
    is_sound = not (clip.has_video or clip.has_image) and entry.remark is None
    if is_sound and entry.valid_len < expected - _AUDIO_TOLERANCE:
        return "fewer audio tokens than the clip's duration holds"
    return None
