"""Whose fault it was: clips that workers died with, and what is known of clips that failed.

A worker writes down which clips are in its encoder before it runs. When it dies, whoever takes over
its unit gives each of them a strike. The first death is most often not the clip's fault; after two a clip
is encoded alone, and only deaths with the clip alone count against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cache.clip import Record
from extract.decode_pool import DecodeFailure
from extract.failures import Evidence, Failure
from extract.jobs.job import Job
from extract.jobs.lease import Claim
from extract.jobs.session import WorkerState

ALONE_AFTER = 2
"""Deaths with a clip in the encoder after which it is encoded alone. Not the first: the same batch
again gives the same bytes."""
QUARANTINE_AFTER = 3
"""Deaths with a clip alone in the encoder after which it is taken for the cause."""


@dataclass(frozen=True)
class Suspects:
    """SHA-256 of clips of a unit with which workers died."""

    alone: frozenset[str] = field(default_factory=frozenset)
    """To be encoded alone."""
    guilty: frozenset[str] = field(default_factory=frozenset)
    """Not to be encoded at all."""


def suspects(job: Job, claim: Claim, records: Sequence[Record]) -> Suspects:
    """Give the clips strikes with which the unit's last holder died, and count all their strikes."""
    if not claim.attempt:
        return Suspects()
    clips = {record.sha256 for record in records}
    if claim.predecessor is not None:
        dead = claim.predecessor
        job.strike(clips.intersection(dead.encoding), dead.worker_id, alone=dead.encoding_alone)
    strikes = job.strikes(clips)
    return Suspects(
        frozenset(key for key, s in strikes.items() if s.n_together >= ALONE_AFTER or s.n_alone),
        frozenset(key for key, s in strikes.items() if s.n_alone >= QUARANTINE_AFTER),
    )


def quarantine(record: Record) -> DecodeFailure:
    """Return why a guilty clip has no tokens."""
    message = f"{record.media}: {QUARANTINE_AFTER} workers died while it was alone in the encoder"
    return DecodeFailure(Failure("crash", message), QUARANTINE_AFTER)


def evidence(record: Record, found: DecodeFailure, worker: WorkerState) -> Evidence:
    """Return what is known of a failed clip."""
    return Evidence(
        key=record.sha256,
        uid=record.uid,
        media=record.media,
        kind=found.failure.kind,
        message=found.failure.message,
        attempts=found.attempts,
        exit_signal=found.exit_signal,
        stderr_tail=found.stderr_tail,
        facts=found.facts,
        host=worker.host,
        worker_id=worker.worker_id,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
