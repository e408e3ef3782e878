"""A job: how any number of workers share one plan, of extraction or annotation, through the store alone.

A plan's units are written down once; each worker claims a unit, makes and commits what is missing
of it, and leaves a receipt. Workers may come and go, be killed, and belong to different engines: they
know of one another only what stands in the store. All of it coordinates and reports; what is encoded,
the commit records alone say, and a job's folder may be removed at any time when no worker runs.

::

    jobs/<job_id>/<generation>/plan.json                        create-once: the units
                               leases/<unit>.<attempt>          create-once: see `extract.jobs.lease`
                               receipts/<unit>.json             create-once: the unit is done
                               receipts/<unit>.part-<worker_id>-<attempt>.json   it is partly done
                               workers/<worker_id>.json         see `extract.jobs.session`
                               strikes/<key>.<worker_id>        create-once: the worker died encoding it
                               stops/<session>                  create-once: its workers shall end
                               evidence/<key>.json              why a clip failed

A job is known by its inputs. Where its last generation is done and there is work again, the next
generation starts with a new plan.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from cache import layout
from cache.clip import Record
from cache.commit import Status
from cache.errors import SchemaError, StoreError
from cache.index import in_parallel
from cache.lifecycle import storage_time_s
from cache.schema import Model, canonical_json
from cache.spec import Stream, TokenSpec
from cache.storage import Storage, exists
from extract.config import Work
from extract.failures import AnyKind, Evidence
from extract.jobs.lease import Claim, Leases, done_units, receipt_key, receipt_names
from extract.jobs.session import (
    LEASE_TIMEOUT_S,
    Note,
    Sighting,
    StageSeconds,
    WorkerSession,
    WorkerState,
    create_document,
    encode,
    look_at,
    read_document,
    read_or_note,
    stop_key,
    storage_errors,
)

logger = logging.getLogger(__name__)

PLAN_VERSION = 1


# ---------------------------------------------------------------------------- documents


class PlannedUnit(Model):
    """Clips that one worker encodes together."""

    rows: tuple[int, ...] = Field(min_length=1)
    """Into the manifest's records."""
    specs: tuple[int, ...] = ()
    """Into `PlanDocument.specs`: those that some clip lacked when the plan was made; none where the
    work is no encoding."""


class PlanDocument(Model):
    """All work of one generation of a job."""

    schema_version: Literal[1] = 1
    created: str
    """UTC, ISO 8601, by the clock of the planning machine. For people, and for the order of jobs."""
    work: Work = "tokens"
    specs: tuple[TokenSpec, ...] = ()
    """What is encoded; none where the work is no encoding."""
    n_records: int = Field(ge=0)
    """Of the manifest."""
    units: tuple[PlannedUnit, ...] = Field(min_length=1)
    retry: tuple[AnyKind, ...] = ()
    """Failed clips of these kinds are tried again."""
    unit_clips: int = Field(ge=1)
    """Most clips of a unit."""

    @model_validator(mode="after")
    def _points_to_what_there_is(self) -> Self:
        for number, unit in enumerate(self.units):
            if min(unit.rows) < 0 or max(unit.rows) >= self.n_records:
                raise ValueError(f"unit {number} names rows outside the {self.n_records} records")
            if bool(unit.specs) != (self.work == "tokens"):
                raise ValueError(
                    f"unit {number} names {len(unit.specs)} specs in a plan of {self.work}"
                )
            if any(not 0 <= spec < len(self.specs) for spec in unit.specs):
                raise ValueError(f"unit {number} names specs outside the {len(self.specs)} specs")
        return self


class ReceiptFailure(Model):
    """One stream of one clip that failed, or one step of its annotation."""

    uid: str
    key: str
    stream: str
    kind: AnyKind
    reason: str


class Receipt(Model):
    """What a worker did for a unit. Its times are by the worker's clock, for people only."""

    unit: int
    worker_id: str
    session: str
    engine: str
    device: str
    started_s: float
    ended_s: float
    n_clips: int
    partial: bool = False
    """The worker gave the unit back; another does the rest."""
    counts: dict[str, dict[Status, int]] = Field(default_factory=dict)
    """Spec label, or step of an annotation -> status -> clips that this worker committed."""
    failures: tuple[ReceiptFailure, ...] = ()
    remarks: tuple[tuple[str, Stream, str], ...] = ()
    """(uid, stream, damage that decoding passed over)"""
    truncated: tuple[str, ...] = ()
    """uids of clips of which only the beginning was encoded."""
    n_bytes: int = 0
    seconds: StageSeconds = StageSeconds()


class _Strike(Model):
    alone: bool


@dataclass(frozen=True)
class Strikes:
    """How many workers died with a clip in their encoder."""

    n_together: int = 0
    """It was in a batch with others, so it may be innocent."""
    n_alone: int = 0


def job_id(
    records: Iterable[Record], specs: Iterable[TokenSpec], retry: Iterable[AnyKind] = ()
) -> str:
    """Return the identity of a job: 16 hexadecimal digits of its inputs, equal on every machine."""
    by_id = {spec.spec_id: spec for spec in specs}
    clips = [
        [record.media, *(record.token_key(by_id[spec_id]) for spec_id in sorted(by_id))]
        for record in records
    ]
    inputs = {"clips": clips, "specs": sorted(by_id), "retry": sorted(set(retry))}
    return hashlib.sha256(canonical_json(inputs).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------- the job


class Job:
    """One generation of a job. May be shared by threads; every process opens its own."""

    def __init__(
        self, storage: Storage, job_id: str, generation: int, plan: PlanDocument, *, joined: bool
    ) -> None:
        """Use a generation whose plan stands in the store; see `open_or_create` and `latest`."""
        self.storage = storage
        self.job_id = job_id
        self.generation = generation
        self.root = _root(job_id, generation)
        """Key of the folder."""
        self.plan = plan
        self.joined = joined
        """False if this call created the generation."""
        self._leases = Leases(storage, self.root, len(plan.units))
        self._receipts: dict[str, Receipt] = {}

    def __repr__(self) -> str:
        return f"Job({self.storage.url}/{self.root})"

    @classmethod
    def open(cls, storage: Storage, job_id: str, generation: int) -> Job:
        """Open a generation that another process made.

        Raises:
            SchemaError: Its plan is damaged, or of a newer version.
            StoreError: There is none, or the storage cannot be read.
        """
        with storage_errors(storage, "read"):
            try:
                plan = _read_plan(storage, job_id, generation)
            except FileNotFoundError:
                raise StoreError(
                    f"{storage.url}: holds no plan of job {job_id}, generation {generation}. Start it with "
                    "`emocache extract` or `emocache annotate`, or give the place in which it was started."
                ) from None
        return cls(storage, job_id, generation, plan, joined=True)

    @classmethod
    def open_or_create(cls, storage: Storage, document: PlanDocument, job_id: str) -> Job:
        """Join the last generation of a job if it has work left, else start the next one.

        Args:
            storage: The store's.
            document: The plan, should a generation be started; processes that do so at once agree on
                one of their plans.
            job_id: See `job_id`.

        Raises:
            SchemaError: The plan of the last generation is damaged, or of a newer version.
            StoreError: The storage cannot be read or written.
        """
        with storage_errors(storage, "read or written"):
            generation = max(_generations(storage, job_id), default=0)
            while True:
                try:
                    job = cls(
                        storage, job_id, generation,
                        _read_plan(storage, job_id, generation), joined=True,
                    )  # fmt: skip
                except FileNotFoundError:
                    if create_document(storage, _plan_key(job_id, generation), document):
                        return cls(storage, job_id, generation, document, joined=False)
                    continue  # another process was faster: its plan is there now
                if job.undone():
                    return job
                generation += 1

    @classmethod
    def latest(cls, storage: Storage, note: Note = logger.warning) -> list[Job]:
        """Return all generations of all jobs of a store, the newest first.

        Args:
            storage: The store's.
            note: Told about each plan that cannot be read.

        Raises:
            StoreError: The storage cannot be read.
        """

        def read(place: tuple[str, int]) -> Job | None:
            try:
                return cls(storage, *place, _read_plan(storage, *place), joined=True)
            except FileNotFoundError:
                return None  # it is being made
            except SchemaError as error:
                note(f"passed over: {error}")
                return None

        with storage_errors(storage, "read"):
            places = [
                (identity, number)
                for identity in sorted(storage.folders(layout.JOBS))
                for number in _generations(storage, identity)
            ]
            jobs = [job for job in in_parallel(read, places, storage) if job is not None]
        return sorted(jobs, key=lambda job: job.plan.created, reverse=True)

    # ---------------------------------------------------------------- units

    def undone(self) -> list[int]:
        """Return the units without a receipt, in order."""
        with storage_errors(self.storage, "read"):
            done = done_units(self.storage, self.root)
        return [unit for unit in range(len(self.plan.units)) if unit not in done]

    def n_done(self) -> int:
        """Return the number of units that have a receipt."""
        return len(self.plan.units) - len(self.undone())

    def claim(self, me: WorkerSession, *, exclude: Collection[int] = ()) -> Claim | None:
        """Take a unit that nobody works on.

        Units that are free come first, from a place on that differs between workers; then those whose
        holder ended or died, so that a unit that kills its workers does not keep them from the others.

        Args:
            me: Who takes it; started.
            exclude: Units that are not wanted.

        Returns:
            None if nothing can be claimed now. Unless all units are done, ask again after some
            seconds: a holder may die yet.

        Raises:
            StoreError: The storage cannot be read or written.
        """
        with storage_errors(self.storage, "read or written"):
            lease = self._leases.claim(me, exclude)
        if lease is None:
            return None
        planned = self.plan.units[lease.unit]
        return Claim(
            unit=lease.unit,
            attempt=lease.attempt,
            worker_id=me.worker_id,
            rows=planned.rows,
            specs=tuple(self.plan.specs[number] for number in planned.specs),
            predecessor=lease.predecessor,
        )

    def holds(self, claim: Claim) -> bool:
        """True unless another worker has taken the unit over."""
        with storage_errors(self.storage, "read"):
            return self._leases.is_last(claim.unit, claim.attempt)

    def finish(self, claim: Claim, receipt: Receipt) -> bool:
        """Mark a unit as done for good; False if a worker that took it over was faster."""
        receipt = receipt.model_copy(update={"partial": False})
        with storage_errors(self.storage, "written"):
            return create_document(self.storage, receipt_key(self.root, claim.unit), receipt)

    def release(self, claim: Claim, receipt: Receipt | None = None) -> None:
        """Give a unit back.

        Args:
            claim: The unit.
            receipt: What was done of it, if anything was.
        """
        with storage_errors(self.storage, "written"):
            if receipt is not None:
                receipt = receipt.model_copy(update={"partial": True})
                part = f".part-{claim.worker_id}-{claim.attempt:03d}"
                key = receipt_key(self.root, claim.unit, part)
                create_document(self.storage, key, receipt)
            self._leases.release(claim.unit, claim.attempt)

    # ---------------------------------------------------------------- blame and evidence

    def strike(self, keys: Iterable[str], worker_id: str, *, alone: bool) -> None:
        """Note that a worker died with these clips in its encoder; each counts once per worker."""
        with storage_errors(self.storage, "written"):
            for key in keys:
                place = f"{self.root}/strikes/{key}.{worker_id}"
                create_document(self.storage, place, _Strike(alone=alone))

    def strikes(self, keys: Iterable[str]) -> dict[str, Strikes]:
        """Return how often workers died with these clips in their encoder."""
        wanted = set(keys)
        with storage_errors(self.storage, "read"):
            names = [
                name
                for name in self.storage.names(f"{self.root}/strikes")
                if name.partition(".")[0] in wanted
            ]
            found = in_parallel(self._read_strike, names, self.storage)
        n_together, n_alone = dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0)
        for name, alone in zip(names, found, strict=True):
            (n_alone if alone else n_together)[name.partition(".")[0]] += 1
        return {key: Strikes(n_together[key], n_alone[key]) for key in wanted}

    def write_evidence(self, evidence: Evidence) -> None:
        """Keep what is known of a failed clip, in the place of what was known before."""
        key = f"{self.root}/evidence/{evidence.key}.json"
        with storage_errors(self.storage, "written"):
            self.storage.replace(key, encode(evidence), durable=False)

    def evidence(
        self, keys: Collection[str] | None = None, note: Note = logger.warning
    ) -> dict[str, Evidence]:
        """Return what is known of failed clips, by token key.

        Args:
            keys: Of which clips; default all.
            note: Told about each file that cannot be read.
        """
        folder = f"{self.root}/evidence"
        with storage_errors(self.storage, "read"):
            names = [
                name
                for name in sorted(self.storage.names(folder))
                if keys is None or name.removesuffix(".json") in keys
            ]
            found = in_parallel(
                lambda name: read_or_note(self.storage, f"{folder}/{name}", Evidence, note),
                names,
                self.storage,
            )
        return {evidence.key: evidence for evidence in found if evidence is not None}

    # ---------------------------------------------------------------- stopping, and looking on

    def request_stop(self, session: str) -> None:
        """Ask the workers of a session to give back what they hold and end.

        Raises:
            SchemaError: No session can have this name.
            StoreError: The storage cannot be written.
        """
        with storage_errors(self.storage, "written"):
            self.storage.create(stop_key(self.root, session), b"{}", durable=False)

    def stop_requested(self, session: str) -> bool:
        """True if the workers of a session were asked to end."""
        with storage_errors(self.storage, "read"):
            return exists(self.storage, stop_key(self.root, session))

    def receipts(self, note: Note = logger.warning) -> list[Receipt]:
        """Return all receipts, of partly done units too, in the order of units. Each is read once.

        Args:
            note: Told about each file that cannot be read; its unit counts as done all the same.
        """
        with storage_errors(self.storage, "read"):
            names = sorted(name for name, _ in receipt_names(self.storage, self.root))
            new = [name for name in names if name not in self._receipts]
            read = in_parallel(
                lambda name: read_or_note(
                    self.storage, f"{self.root}/receipts/{name}", Receipt, note
                ),
                new,
                self.storage,
            )
        self._receipts |= {name: r for name, r in zip(new, read, strict=True) if r is not None}
        return [self._receipts[name] for name in names if name in self._receipts]

    def workers(
        self, *, lease_timeout_s: float = LEASE_TIMEOUT_S, note: Note = logger.warning
    ) -> list[tuple[WorkerState, bool]]:
        """Return the last state of every worker, in the order of their start, and whether it lives.

        Args:
            lease_timeout_s: Silence after which a worker is taken for dead.
            note: Told about each file that cannot be read.
        """
        with storage_errors(self.storage, "read"):
            names = self.storage.names(f"{self.root}/workers")
            looks = in_parallel(
                lambda name: look_at(self.storage, self.root, name.removesuffix(".json"), note),
                [name for name in names if name.endswith(".json")],
                self.storage,
            )
            seen = [sighting for sighting in looks if sighting is not None]
            now_s = self._now_s(seen)
        found = [
            (sighting.state, not sighting.is_dead(now_s, lease_timeout_s))
            for sighting in seen
            if sighting.state is not None
        ]
        return sorted(found, key=lambda item: (item[0].started_s, item[0].worker_id))

    # ---------------------------------------------------------------- parts

    def _read_strike(self, name: str) -> bool:
        """Return whether a clip was alone in the encoder; not known counts as no."""
        key = f"{self.root}/strikes/{name}"
        strike = read_or_note(self.storage, key, _Strike, logger.warning)
        return strike is not None and strike.alone

    def _now_s(self, seen: Sequence[Sighting]) -> float | None:
        """Return the time by the storage's clock; of one that cannot be written, the newest heartbeat."""
        if all(sighting.is_gone for sighting in seen):
            return None
        try:
            return storage_time_s(self.storage)
        except StoreError:
            return max(sighting.seen_s for sighting in seen)


def _root(job_id: str, generation: int) -> str:
    return f"{layout.jobs(job_id)}/{generation:04d}"


def _plan_key(job_id: str, generation: int) -> str:
    return f"{_root(job_id, generation)}/plan.json"


def _generations(storage: Storage, job_id: str) -> list[int]:
    return sorted(int(name) for name in storage.folders(layout.jobs(job_id)) if name.isdigit())


def _read_plan(storage: Storage, job_id: str, generation: int) -> PlanDocument:
    """Read a plan.

    Raises:
        FileNotFoundError: There is none.
        SchemaError: It is damaged, or of a newer version.
    """
    key = _plan_key(job_id, generation)
    try:
        return read_document(storage, key, PlanDocument)
    except SchemaError as error:
        version = _stated_version(storage, key)
        if version is not None and version > PLAN_VERSION:
            raise SchemaError(
                f"{storage.url}/{key}: plan of version {version}, this version reads up to "
                f"{PLAN_VERSION}. Update emocache; nothing was changed."
            ) from None
        raise SchemaError(
            f"{error} This is the plan of a job. Without a copy of it, end the job's workers "
            f"and remove the folder {storage.url}/{_root(job_id, generation)}: what is committed stays, "
            "and the next run makes a new plan."
        ) from None


def _stated_version(storage: Storage, key: str) -> int | None:
    try:
        version = json.loads(storage.read(key))["schema_version"]
    except (ValueError, KeyError, TypeError):
        return None
    return version if isinstance(version, int) else None
