"""The numbers of a job, from its receipts and its workers: how far it is, and what it cost.

Times are those of the workers' own clocks; between hosts they agree as well as the clocks do.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cache.commit import Status
from cache.schema import Model
from extract.failures import KINDS, AnyKind, Evidence, FailureKind, kind_of
from extract.jobs.job import Job, Receipt, ReceiptFailure
from extract.jobs.session import LEASE_TIMEOUT_S, StageSeconds, WorkerState
from extract.plan import unique_labels

if TYPE_CHECKING:
    from cache.clip import Record
    from cache.store import TokenStore

_MAX_BINS = 120
"""Points of the throughput curve."""
_MIN_BIN_S = 1.0

Outcome = Literal["working", "ended", "vanished"]
"""`vanished`: it neither works nor said that it ended. It was killed, or its machine was."""


class WorkerSummary(Model):
    """What one worker did, from its first heartbeat to its last."""

    worker_id: str
    session: str
    engine: str
    host: str
    device: str
    log: str | None
    started_s: float
    """Unix time by the worker's clock, like `seen_s`."""
    seen_s: float
    """Its last heartbeat."""
    outcome: Outcome
    end_reason: str | None
    """Why it ended before the work was done; None if it did not."""
    unit: int | None
    """What it works on; None if it does not."""
    n_units: int
    n_clips: int
    n_failed: int
    seconds: StageSeconds
    gpu_busy: float | None
    """Share of time, 0 to 1; None if it is not known."""
    usage: dict[str, float] = Field(default_factory=dict)
    """What it used up of endpoints, by role and measure."""

    @property
    def lifetime_s(self) -> float:
        """Time between its first and its last heartbeat."""
        return max(0.0, self.seen_s - self.started_s)

    @property
    def clips_per_s(self) -> float:
        """Clips a second over its lifetime."""
        return self.n_clips / self.lifetime_s if self.lifetime_s else 0.0


class Throughput(Model):
    """Clips a second over time, all workers together, in equal steps."""

    start_s: float
    """Unix time of the first step's beginning."""
    step_s: float
    clips_per_s: tuple[float, ...]


class JobSummary(Model):
    """What a job, or one session of it, did."""

    schema_version: Literal[1] = 1
    job_id: str
    generation: int
    session: str | None = None
    """None: everything that was done for the job."""
    created: str
    """UTC, ISO 8601."""
    engines: tuple[str, ...]
    devices: tuple[str, ...]
    n_units: int
    """Of the job."""
    n_units_done: int
    n_planned: int
    """Clips of the job."""
    n_clips: int
    """Clips that were worked on, failed ones included; of a session, also those that another one had
    begun."""
    counts: dict[str, dict[Status, int]]
    """Spec label -> clips by status."""
    n_failed: int
    """Clips of which at least one stream failed."""
    failed_by_kind: dict[AnyKind, int]
    """Clips by the kind of their failure; one that failed in two ways counts under both."""
    failures: tuple[ReceiptFailure, ...]
    remarks: tuple[tuple[str, str, str], ...]
    """(uid, stream, damage that decoding passed over)."""
    truncated: tuple[str, ...]
    """Records whose sound is longer than the encoder's window."""
    n_bytes: int
    """Size of the committed files."""
    started_s: float | None
    """Unix time at which the first worker began; None if none has."""
    ended_s: float | None
    """The last sign of life of any worker."""
    seconds: StageSeconds
    """All workers together, as far as heartbeats and receipts tell."""
    worker_s: float
    """Lifetimes of all workers together."""
    active_s: float
    """Time in which at least one worker lived: pauses between sessions do not count."""
    workers: tuple[WorkerSummary, ...]
    """In the order in which they started."""
    throughput: Throughput | None = None
    price_per_hour: float | None = Field(default=None, ge=0)
    """Price of one worker's hour, in the user's currency."""

    @property
    def is_done(self) -> bool:
        """True if no unit is left."""
        return self.n_units_done == self.n_units

    @property
    def clips_per_s(self) -> float:
        """Clips a second, all workers together, while any worked."""
        return self.n_clips / self.active_s if self.active_s else 0.0

    @property
    def n_vanished(self) -> int:
        """Workers that were killed, or whose machine was."""
        return sum(worker.outcome == "vanished" for worker in self.workers)

    @property
    def worker_hours_per_1000(self) -> float | None:
        """Worker-hours that 1000 clips took; None before the first clip."""
        return self.worker_s / 3600 / self.n_clips * 1000 if self.n_clips else None

    @property
    def price_per_1000(self) -> float | None:
        """What 1000 clips cost; None without a price."""
        hours = self.worker_hours_per_1000
        return None if hours is None or self.price_per_hour is None else hours * self.price_per_hour


def summarise(
    job: Job,
    *,
    session: str | None = None,
    price_per_hour: float | None = None,
    lease_timeout_s: float = LEASE_TIMEOUT_S,
) -> JobSummary:
    """Return the numbers of a job.

    Args:
        job: A job, finished or not.
        session: Count only what this start of an extraction did.
        price_per_hour: Price of one worker's hour.
        lease_timeout_s: Silence after which a worker is taken for dead.
    """
    receipts = [r for r in job.receipts() if session in (None, r.session)]
    workers = [w for w in _workers(job, lease_timeout_s) if session in (None, w.session)]
    receipts.sort(key=lambda receipt: (receipt.unit, receipt.ended_s))
    failures = tuple(failure for receipt in receipts for failure in receipt.failures)
    n_planned = sum(len(unit.rows) for unit in job.plan.units)
    return JobSummary(
        job_id=job.job_id,
        generation=job.generation,
        session=session,
        created=job.plan.created,
        engines=_distinct(worker.engine for worker in workers),
        devices=_distinct(worker.device for worker in workers),
        n_units=len(job.plan.units),
        n_units_done=job.n_done(),
        n_planned=n_planned,
        # A clip may be begun by one worker and ended by another: both worked on it.
        n_clips=min(n_planned, sum(receipt.n_clips for receipt in receipts)),
        counts=_add_counts(receipts, unique_labels(job.plan.specs)),
        n_failed=len({failure.uid for failure in failures}),
        failed_by_kind=_failed_by_kind(receipts),
        failures=failures,
        remarks=tuple(remark for receipt in receipts for remark in receipt.remarks),
        truncated=_distinct(uid for receipt in receipts for uid in receipt.truncated),
        n_bytes=sum(receipt.n_bytes for receipt in receipts),
        started_s=min((worker.started_s for worker in workers), default=None),
        ended_s=max((worker.seen_s for worker in workers), default=None),
        # The last heartbeat tells less than receipts that came after it; receipts know nothing of units
        # that were not finished.
        seconds=_longer(
            add_seconds(worker.seconds for worker in workers),
            add_seconds(receipt.seconds for receipt in receipts),
        ),
        worker_s=sum(worker.lifetime_s for worker in workers),
        active_s=_covered_s(workers),
        workers=tuple(workers),
        throughput=_throughput(receipts),
        price_per_hour=price_per_hour,
    )


def add_seconds(parts: Iterable[StageSeconds]) -> StageSeconds:
    """Return the sum of what several workers or units took."""
    plain: Counter[str] = Counter()
    encode: Counter[str] = Counter()
    for part in parts:
        fields = part.model_dump()
        encode.update(fields.pop("encode_s"))
        plain.update(fields)
    return StageSeconds(**plain, encode_s=dict(encode))


def _longer(a: StageSeconds, b: StageSeconds) -> StageSeconds:
    """Return the longer time of each stage."""
    encode_s = {
        label: max(a.encode_s.get(label, 0.0), b.encode_s.get(label, 0.0))
        for label in _distinct([*a.encode_s, *b.encode_s])
    }
    plain = {
        name: max(getattr(a, name), getattr(b, name))
        for name in StageSeconds.model_fields
        if name != "encode_s"
    }
    return StageSeconds(**plain, encode_s=encode_s)


def _workers(job: Job, lease_timeout_s: float) -> tuple[WorkerSummary, ...]:
    """Return all workers of a job, in the order of their start."""
    found = job.workers(lease_timeout_s=lease_timeout_s)
    workers = [_worker(state, is_alive=is_alive) for state, is_alive in found]
    return tuple(sorted(workers, key=lambda worker: (worker.started_s, worker.worker_id)))


def _worker(state: WorkerState, *, is_alive: bool) -> WorkerSummary:
    outcome: Outcome = "ended" if state.ended else "working" if is_alive else "vanished"
    return WorkerSummary(
        worker_id=state.worker_id,
        session=state.session,
        engine=state.engine,
        host=state.host,
        device=state.device,
        log=state.log,
        started_s=state.started_s,
        seen_s=max(state.started_s, state.updated_s),
        outcome=outcome,
        end_reason=state.end_reason,
        unit=state.unit if outcome == "working" else None,
        n_units=state.n_units,
        n_clips=state.n_clips,
        n_failed=state.n_failed,
        seconds=state.seconds,
        gpu_busy=state.gpu_busy,
        usage=state.usage,
    )


def _covered_s(workers: Sequence[WorkerSummary]) -> float:
    """Return how long at least one of some workers, in the order of their start, lived."""
    covered, until_s = 0.0, float("-inf")
    for worker in workers:
        covered += max(0.0, worker.seen_s - max(worker.started_s, until_s))
        until_s = max(until_s, worker.seen_s)
    return covered


def _add_counts(receipts: Sequence[Receipt], labels: Sequence[str]) -> dict[str, dict[Status, int]]:
    """Return clips by status for each spec of the receipts, in the order of `labels`."""
    total: dict[str, Counter[Status]] = {}
    for receipt in receipts:
        for label, counts in receipt.counts.items():
            total.setdefault(label, Counter()).update(counts)
    return {label: dict(total[label]) for label in _distinct([*labels, *total]) if label in total}


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))


def _throughput(receipts: Sequence[Receipt]) -> Throughput | None:
    """Spread the clips of each receipt evenly over the time that it took."""
    worked = [r for r in receipts if r.n_clips]
    if not worked:
        return None
    start = min(receipt.started_s for receipt in worked)
    end = max(receipt.ended_s for receipt in worked)
    step_s = max(_MIN_BIN_S, (end - start) / _MAX_BINS)
    bins = [0.0] * max(1, -int(-(end - start) // step_s))
    for receipt in worked:
        first, last = (receipt.started_s - start) / step_s, (receipt.ended_s - start) / step_s
        if last - first < 1e-6:  # too quick for the clock
            bins[min(int(first), len(bins) - 1)] += receipt.n_clips
            continue
        for number in range(int(first), min(len(bins), int(last) + 1)):
            overlap = min(last, number + 1) - max(first, number)
            bins[number] += receipt.n_clips * max(0.0, overlap) / (last - first)
    return Throughput(
        start_s=start, step_s=step_s, clips_per_s=tuple(clips / step_s for clips in bins)
    )


# ---------------------------------------------------------------------------- while it runs


class Progress(Model):
    """How far a job is, at one look."""

    schema_version: Literal[1] = 1
    job_id: str
    generation: int
    created: str
    """UTC, ISO 8601."""
    n_units: int
    n_units_done: int
    n_planned: int
    """Clips of the job."""
    n_clips: int
    """Of them, those that are encoded, also in units that are not finished yet."""
    n_failed: int
    """Clips, units in progress included."""
    failed_by_kind: dict[AnyKind, int]
    """As far as receipts tell: those of units in progress come later."""
    clips_per_s: float
    """Over the last minute; at the first look, the sum of what living workers did over their lives."""
    left_s: float | None
    """At this rate; None while there is none."""
    seconds: StageSeconds
    """All workers of the job together."""
    workers: tuple[WorkerSummary, ...]
    """In the order in which they started."""

    @property
    def alive(self) -> tuple[WorkerSummary, ...]:
        """The workers that are at work."""
        return tuple(worker for worker in self.workers if worker.outcome == "working")

    @property
    def gpu_busy(self) -> float | None:
        """Mean over the workers that know it."""
        known = [worker.gpu_busy for worker in self.alive if worker.gpu_busy is not None]
        return sum(known) / len(known) if known else None


class Watch:
    """Looks at a job again and again, to tell how fast it goes."""

    def __init__(
        self, job: Job, *, window_s: float = 60.0, lease_timeout_s: float = LEASE_TIMEOUT_S
    ) -> None:
        """Watch a job.

        Args:
            job: A job, running or not.
            window_s: Time over which the rate is taken.
            lease_timeout_s: Silence after which a worker is taken for dead.
        """
        self.job = job
        self._window_s = window_s
        self._lease_timeout_s = lease_timeout_s
        self._clips: deque[tuple[float, int]] = deque()

    def look(self, now_s: float) -> Progress:
        """Return how far the job is.

        Args:
            now_s: A clock that never goes back, such as `time.monotonic()`.
        """
        receipts = self.job.receipts()
        workers = _workers(self.job, self._lease_timeout_s)
        alive = [worker for worker in workers if worker.outcome == "working"]
        n_planned = sum(len(unit.rows) for unit in self.job.plan.units)
        n_clips, n_failed = _clips_done(self.job, receipts, workers)
        self._clips.append((now_s, n_clips))
        while len(self._clips) > 2 and now_s - self._clips[1][0] >= self._window_s:
            self._clips.popleft()
        since_s, before = self._clips[0]
        if now_s > since_s:
            rate = max(0, n_clips - before) / (now_s - since_s)
        else:
            rate = sum(worker.clips_per_s for worker in alive)
        return Progress(
            job_id=self.job.job_id,
            generation=self.job.generation,
            created=self.job.plan.created,
            n_units=len(self.job.plan.units),
            n_units_done=self.job.n_done(),
            n_planned=n_planned,
            n_clips=n_clips,
            n_failed=n_failed,
            failed_by_kind=_failed_by_kind(receipts),
            clips_per_s=rate,
            left_s=(n_planned - n_clips) / rate if rate else None,
            seconds=add_seconds(worker.seconds for worker in workers),
            workers=workers,
        )


def _clips_done(
    job: Job, receipts: Sequence[Receipt], workers: Sequence[WorkerSummary]
) -> tuple[int, int]:
    """Return how many clips are encoded, and how many of them failed, units in progress included."""
    done = {receipt.unit for receipt in receipts if not receipt.partial}
    n_clips = sum(len(job.plan.units[unit].rows) for unit in done)
    n_clips += sum(r.n_clips for r in receipts if r.partial and r.unit not in done)
    failed = {failure.uid for receipt in receipts for failure in receipt.failures}
    n_failed = len(failed)
    for worker in workers:
        if worker.outcome != "working":
            continue
        own = [receipt for receipt in receipts if receipt.worker_id == worker.worker_id]
        n_clips += max(0, worker.n_clips - sum(receipt.n_clips for receipt in own))
        known = sum(len({failure.uid for failure in receipt.failures}) for receipt in own)
        n_failed += max(0, worker.n_failed - known)
    return min(n_clips, sum(len(unit.rows) for unit in job.plan.units)), n_failed


def _failed_by_kind(receipts: Iterable[Receipt]) -> dict[AnyKind, int]:
    """Return how many clips failed, by kind, the most frequent first."""
    found = {(f.kind, f.uid) for receipt in receipts for f in receipt.failures}
    return dict(Counter(kind for kind, _ in sorted(found)).most_common())


# ---------------------------------------------------------------------------- what failed


class FailedClip(Model):
    """A clip of which a store says that it failed, and all that is known of it."""

    key: str
    """Token key."""
    uid: str | None
    """None if neither a manifest nor a job names it."""
    media: str | None
    kind: FailureKind
    reason: str
    specs: tuple[str, ...]
    """Labels of the specs under which it failed so."""
    evidence: Evidence | None = None
    """What the worker saw that gave it up; None if it was not kept."""


class FailureList(Model):
    """What `emocache extract failures --json` prints."""

    schema_version: Literal[1] = 1
    failures: tuple[FailedClip, ...]


def find_failures(store: TokenStore, records: Sequence[Record] | None = None) -> list[FailedClip]:
    """Return the clips that a store says failed, the most frequent kind first.

    Args:
        store: Its index tells which clips failed, its jobs what is known of them.
        records: A manifest's; only its clips are looked at, and named. Default: everything.
    """
    specs = tuple(store.specs.values())
    known = _names(store, records)
    found: dict[tuple[str, str], list[str]] = {}
    for spec, label in zip(specs, unique_labels(specs), strict=True):
        wanted = None if records is None else {record.token_key(spec) for record in records}
        for entry in store.index(spec):
            if entry.status is Status.FAILED and (wanted is None or entry.key in wanted):
                place = (entry.key, entry.reason or "no reason is recorded")
                found.setdefault(place, []).append(label)
    if not found:
        return []
    jobs = Job.latest(store.storage)
    evidence = _evidence(jobs, {known.get(key, (None, None, key))[2] for key, _ in found})
    if records is None:
        for job in jobs:
            for receipt in job.receipts():
                for failure in receipt.failures:
                    known.setdefault(failure.key, (failure.uid, None, failure.key))
    clips = []
    for (key, reason), under in found.items():
        uid, media, clip = known.get(key, (None, None, key))
        seen = evidence.get(clip)
        if seen is not None:
            uid, media = uid or seen.uid, media or seen.media
        clips.append(
            FailedClip(
                key=key,
                uid=uid,
                media=media,
                kind=kind_of(reason),
                reason=reason,
                specs=tuple(sorted(under)),
                evidence=seen if seen is not None and seen.kind == kind_of(reason) else None,
            )
        )
    n = Counter(clip.kind for clip in clips)
    return sorted(
        clips, key=lambda c: (-n[c.kind], KINDS.index(c.kind), c.uid or "", c.key, c.specs)
    )


def _names(
    store: TokenStore, records: Sequence[Record] | None
) -> dict[str, tuple[str | None, str | None, str]]:
    """Return token key -> (uid, media path, digest of the clip)."""
    return {
        record.token_key(spec): (record.uid, record.media, record.sha256)
        for record in records or ()
        for spec in store.specs.values()
    }


def _evidence(jobs: Iterable[Job], keys: set[str]) -> dict[str, Evidence]:
    """Return the newest that is known of some clips."""
    found: dict[str, Evidence] = {}
    for job in jobs:
        missing = keys - found.keys()
        if missing:
            found |= job.evidence(missing)
    return found
