"""Which records are to be annotated: manifest x preset - results. Decides, asks nobody."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cache.clip import Record
from cache.labels import LabelField
from cache.schema import canonical_json
from cache.storage import Storage
from extract.annotate.results import Results, is_wanted, result_key
from extract.failures import AnyKind
from extract.jobs.job import Job, PlanDocument, PlannedUnit

UNIT_CLIPS = 16
"""Records that a worker takes at a time; few, so that the last ones are shared."""


@dataclass(frozen=True)
class AnnotationPlan:
    """The work that a manifest needs."""

    keys: dict[int, str]
    """Row of each record that is to be annotated -> what its result is known by."""
    todo: tuple[int, ...]
    """Of these, the rows without a usable result; records of one clip stand together."""
    units: tuple[tuple[int, ...], ...] = ()
    """The same, in packs: two records of one clip are in one, as their questions are the same."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Why others are not annotated -> how many."""
    retry: tuple[AnyKind, ...] = ()
    unit_clips: int = UNIT_CLIPS
    n_failed: int = 0
    """Records whose result has a failed step that is not tried again."""


def plan_annotation(
    records: Sequence[Record],
    settings: str,
    targets: Sequence[LabelField],
    results: Results,
    *,
    splits: Collection[str] = (),
    limit: int | None = None,
    retry: Collection[AnyKind] = (),
    unit_clips: int = UNIT_CLIPS,
) -> AnnotationPlan:
    """Compare a manifest with what was annotated.

    Args:
        records: The manifest's.
        settings: Digest of what decides the texts.
        targets: Label fields that guide descriptions.
        results: What is known.
        splits: Only records of these; empty takes all.
        limit: At most so many records, the first ones.
        retry: Kinds of failure that are tried again.
        unit_clips: Most records of a unit.

    Raises:
        ManifestError: A record's media were never looked at.
    """
    keys: dict[int, str] = {}
    left_out = Counter[str]()
    todo: list[int] = []
    n_failed = 0
    for row, record in enumerate(records):
        if splits and record.split not in splits:
            left_out[f"not in split {' or '.join(sorted(splits))}"] += 1
            continue
        if limit is not None and len(keys) >= limit:
            left_out[f"beyond the first {limit}"] += 1
            continue
        key = keys[row] = result_key(record, settings, targets)
        # Without failures to retry, that there is a result is enough: reading all of them takes time.
        found = results.get(key) if retry and key in results else None
        if key not in results or (retry and is_wanted(found, retry)):
            todo.append(row)
        elif found is not None and found.failures:
            n_failed += 1
    groups: dict[str, list[int]] = {}
    for row in todo:
        groups.setdefault(records[row].sha256, []).append(row)
    units = tuple(_packs(groups.values(), unit_clips))
    return AnnotationPlan(
        keys,
        tuple(row for unit in units for row in unit),
        units,
        left_out,
        tuple(sorted(retry)),
        unit_clips,
        n_failed,
    )


def open_job(storage: Storage, n_records: int, plan: AnnotationPlan) -> Job:
    """Return the job that does a plan: one that others began on the same records, or a new one.

    Args:
        storage: Of the work folder.
        n_records: Of the manifest.
        plan: With work left.
    """
    document = PlanDocument(
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        work="annotation",
        n_records=n_records,
        units=tuple(PlannedUnit(rows=rows) for rows in plan.units),
        retry=plan.retry,
        unit_clips=plan.unit_clips,
    )
    return Job.open_or_create(storage, document, job_id(plan))


def job_id(plan: AnnotationPlan) -> str:
    """Return the identity of a job: 16 hexadecimal digits of its inputs, equal on every machine."""
    told = {"work": "annotation", "keys": list(plan.keys.items()), "retry": plan.retry}
    return hashlib.sha256(canonical_json(told).encode()).hexdigest()[:16]


def created_s(job: Job) -> float:
    """Return when a job was planned, in Unix time: what failed later was tried for this job."""
    return datetime.fromisoformat(job.plan.created).timestamp()


def _packs(groups: Iterable[Sequence[int]], size: int) -> Iterator[tuple[int, ...]]:
    pack: list[int] = []
    for group in groups:
        if pack and len(pack) + len(group) > size:
            yield tuple(pack)
            pack = []
        pack += group
    if pack:
        yield tuple(pack)
