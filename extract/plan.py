"""What is missing: manifest x specs - store = units of work. Decides, does no decoding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from cache.clip import Record
from cache.commit import Entry, Status
from cache.layout import CLIPS_PER_SHARD, STORED_DTYPES, arrays
from cache.recipes import label_of
from cache.spec import TokenSpec
from cache.store import TokenStore
from extract.failures import FailureKind, kind_of
from extract.jobs.job import Job, PlanDocument, PlannedUnit, job_id

NEVER = "not encoded yet"
RETRY = "failed before, to be tried again"
OTHER_SPEC = "encoded, but under another spec only"
"""Why tokens are missing."""

UNIT_CLIPS = CLIPS_PER_SHARD
"""Clips of a unit by default: one shard. docs/cluster.md says when to choose more."""


@dataclass(frozen=True)
class Unit:
    """A pack of clips with the specs that all of them miss; one worker encodes and commits it."""

    rows: tuple[int, ...]
    """Which records of the manifest."""
    records: tuple[Record, ...]
    specs: tuple[TokenSpec, ...]


@dataclass(frozen=True)
class Plan:
    """The work that a manifest needs under some specs."""

    specs: tuple[TokenSpec, ...]
    labels: tuple[str, ...]
    """What people call the specs, in their order; keys of the tables below."""
    units: tuple[Unit, ...]
    n_clips: int
    """Distinct clips of the manifest."""
    retry: tuple[FailureKind, ...] = ()
    unit_clips: int = UNIT_CLIPS
    known: dict[str, Counter[Status]] = field(default_factory=dict)
    """Label -> how many clips the store knows already, by status."""
    served: dict[str, Counter[str]] = field(default_factory=dict)
    """Label -> how many of the known clips come from a richer spec, by its spec_id."""
    misses: dict[str, Counter[str]] = field(default_factory=dict)
    """Label -> how many clips lack tokens, by reason."""
    n_bytes: dict[str, int] = field(default_factory=dict)
    """Label -> bytes of tokens to be written, by the durations that containers state; one that is not
    known counts as a whole window."""

    @property
    def n_missing(self) -> int:
        """Clips for which some encoder must run."""
        return sum(len(u.records) for u in self.units)

    @property
    def n_objects(self) -> int:
        """Files or objects that the store will gain: shards, small arrays, claims and commit records."""
        return sum(
            math.ceil(len(unit.records) / CLIPS_PER_SHARD) * (len(arrays(spec)) + 2)
            for unit in self.units
            for spec in unit.specs
        )


def make_plan(
    records: Sequence[Record],
    specs: Sequence[TokenSpec],
    store: TokenStore | None,
    *,
    retry: Collection[FailureKind] = (),
    unit_clips: int = UNIT_CLIPS,
) -> Plan:
    """Compare a manifest with a store.

    Tokens of a richer spec (`TokenSpec.serves`) are as good as those of the spec itself.

    Args:
        records: The manifest's records; records that share a clip share its tokens.
        specs: What is wanted; one whose weights are not known takes any stored weights.
        store: Where tokens are, or will be; None for a store that does not exist yet.
        retry: Kinds of failure that count as missing.
        unit_clips: Most clips of a unit.
    """
    labels = unique_labels(specs)
    plan = Plan(
        tuple(specs), labels, (), 0, tuple(sorted(retry)), unit_clips,
        known={label: Counter() for label in labels},
        served={label: Counter() for label in labels},
        misses={label: Counter() for label in labels},
        n_bytes=dict.fromkeys(labels, 0),
    )  # fmt: skip
    looks = [
        _Look(spec, label, store, frozenset(retry))
        for spec, label in zip(specs, labels, strict=True)
    ]
    work: dict[tuple[int, ...], list[int]] = {}
    for row, record in enumerate(records):
        missing = tuple(n for n, look in enumerate(looks) if look.misses(record, plan))
        if missing:
            work.setdefault(missing, []).append(row)
    units = tuple(
        Unit(pack, tuple(records[row] for row in pack), tuple(specs[n] for n in missing))
        for missing, rows in work.items()
        for pack in _packs(rows, unit_clips)
    )
    n_clips = len({record.sha256 for record in records})
    return Plan(
        plan.specs, labels, units, n_clips, plan.retry, unit_clips,
        plan.known, plan.served, plan.misses, plan.n_bytes,
    )  # fmt: skip


class _Look:
    """Looks the records up for one spec."""

    def __init__(
        self,
        spec: TokenSpec,
        label: str,
        store: TokenStore | None,
        retry: frozenset[FailureKind],
    ) -> None:
        self._spec = spec
        self._label = label
        self._store = store
        self._retry = retry
        self._sources = store.sources(spec) if store is not None else []
        stored = store.specs.values() if store is not None else ()
        self._others = [
            other for other in stored if other.stream == spec.stream and other not in self._sources
        ]
        self._richer = {s.spec_id for s in self._sources if not spec.accepts(s)}
        self._seen: set[str] = set()
        self._bytes_of = bytes_counter(spec)

    def misses(self, record: Record, plan: Plan) -> bool:
        """True if this record's clip must be encoded; counts it in the plan's tables."""
        key = record.token_key(self._spec)
        if key in self._seen:
            return False
        self._seen.add(key)
        found = self._store.find(self._sources, key) if self._store is not None else None
        if found is not None and not _again(found[1], self._retry):
            source, entry = found
            plan.known[self._label][entry.status] += 1
            if source.spec_id in self._richer:
                plan.served[self._label][source.spec_id] += 1
            return False
        plan.misses[self._label][RETRY if found is not None else self._why(record)] += 1
        plan.n_bytes[self._label] += self._bytes_of(record)
        return True

    def _why(self, record: Record) -> str:
        if self._store is None:
            return NEVER
        index = self._store.index
        elsewhere = any(record.token_key(other) in index(other) for other in self._others)
        return OTHER_SPEC if elsewhere else NEVER


def _again(entry: Entry, retry: Collection[FailureKind]) -> bool:
    return entry.status is Status.FAILED and bool(retry) and kind_of(entry.reason) in retry


def open_job(store: TokenStore, records: Sequence[Record], plan: Plan) -> Job:
    """Return the job that does a plan: one that others began on the same records and specs, or a new one."""
    number = {spec.spec_id: n for n, spec in enumerate(plan.specs)}
    document = PlanDocument(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        specs=plan.specs,
        n_records=len(records),
        units=tuple(
            PlannedUnit(rows=unit.rows, specs=tuple(number[s.spec_id] for s in unit.specs))
            for unit in plan.units
        ),
        retry=plan.retry,
        unit_clips=plan.unit_clips,
    )
    identity = job_id(records, plan.specs, plan.retry)
    return Job.open_or_create(store.storage, document, identity)


def unique_labels(specs: Sequence[TokenSpec]) -> tuple[str, ...]:
    """Return the specs' labels; a number tells apart those that would be called the same."""
    labels = [label_of(spec) for spec in specs]
    total, so_far = Counter(labels), Counter[str]()
    unique = []
    for label in labels:
        so_far[label] += 1
        unique.append(f"{label} ({so_far[label]})" if total[label] > 1 else label)
    return tuple(unique)


def token_bytes(spec: TokenSpec, record: Record) -> int:
    """Return how many bytes a record's tokens take, as far as its container tells."""
    return bytes_counter(spec)(record)


def bytes_counter(spec: TokenSpec) -> Callable[[Record], int]:
    """Return `token_bytes` of one spec, for many records."""
    most, *tail = spec.max_shape
    per_token = math.prod(tail) * np.dtype(STORED_DTYPES[spec.dtype]).itemsize

    def count(record: Record) -> int:
        n_tokens = most
        if spec.stream == "audio":
            clip = record.seen_clip
            if clip.has_audio is False:
                return 0
            if clip.duration_s is not None:
                n_tokens = spec.audio_tokens(clip.duration_s)
        return n_tokens * per_token

    return count


def _packs(rows: Sequence[int], size: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(rows), size):
        yield tuple(rows[start : start + size])
