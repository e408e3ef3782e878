"""The units in a worker's hands, from the claim until they are signed off or given back."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from cache.commit import ClipTokens, Status
from cache.errors import StoreError
from cache.spec import TokenSpec
from cache.store import TokenStore
from extract.encoders.bank import EncoderBank
from extract.failures import TRANSIENT, kind_of
from extract.jobs.job import Job, Receipt
from extract.jobs.session import WorkerSession
from extract.workers.commits import Committer
from extract.workers.unit import Chunk, UnitWork

logger = logging.getLogger(__name__)


class Ledger:
    """Takes in results clip by clip, has whole shards committed, and leaves a receipt of each unit."""

    def __init__(
        self,
        job: Job,
        store: TokenStore,
        committer: Committer,
        session: WorkerSession,
        bank: EncoderBank,
        labels: Mapping[str, str],
        faces: str | None = None,
    ) -> None:
        """Start with empty hands.

        Args:
            job: Where units are signed off.
            store: Where earlier failures of clips are looked up; `committer` has its own.
            committer: Writes shards in the background.
            session: Who works.
            bank: What makes the tokens.
            labels: spec_id -> label.
            faces: Where boxes of faces come from, for the provenance of tokens of faces.
        """
        self._job, self._store, self._committer = job, store, committer
        self._session, self._bank, self._labels = session, bank, labels
        self._faces = faces
        self.units: list[UnitWork] = []
        """Claimed, and not yet wholly encoded."""
        self.n_units = 0
        """Signed off."""
        self._held: list[Callable[[], None]] = []
        """What waits until it is clear that the media are there at all."""

    def add(self, unit: UnitWork) -> None:
        """Take up a unit; one of which nothing is missing is signed off at once."""
        unit.progress.started_s = time.time()
        self.units.append(unit)
        self._sign_off_if_encoded(unit)

    def settle(self, unit: UnitWork, spec: TokenSpec, position: int, clip: ClipTokens) -> None:
        """Take in a clip's result; a shard that it completes is committed."""
        unit.note(spec, position, clip)
        chunk = unit.finish_clip(spec, position, clip)
        if chunk is not None:
            self._take_chunk(unit, chunk)
        self._sign_off_if_encoded(unit)

    def give_up(self, reason: str | None) -> None:
        """Commit what is encoded, and give the units back.

        Raises:
            StoreError: The store cannot be written.
        """
        for unit in self.units:
            if self._job.holds(unit.claim):
                for chunk in unit.rest():
                    self._commit(unit, chunk)
        self._committer.flush()
        self.hand_back(reason)

    def hand_back(self, reason: str | None) -> None:
        """Give the units back as they are; shards of them that were committed stay."""
        for unit in self.units:
            has_done = any(counts.total() for counts in unit.progress.counts.values())
            try:
                self._job.release(unit.claim, self._receipt(unit) if has_done else None)
                logger.info("unit %d is given back: %s", unit.claim.unit, reason)
            except StoreError as error:  # others find it free once they see that this worker ended
                logger.warning("unit %d cannot be given back: %s", unit.claim.unit, error)
        self.units.clear()

    def trust(self) -> None:
        """Commit the failures that were held back: the media are there, or no work is left."""
        held, self._held = self._held, []
        for task in held:
            task()

    def _take_chunk(self, unit: UnitWork, chunk: Chunk) -> None:
        """Commit a shard; one in which every clip failed may mean that a disk is gone, and waits."""
        if all(_may_pass(clip) for clip in chunk.clips):
            self._held.append(lambda: self._commit(unit, chunk))
        else:
            self.trust()
            self._commit(unit, chunk)

    def _commit(self, unit: UnitWork, chunk: Chunk) -> None:
        if self._session.lost and not self._job.holds(unit.claim):
            logger.warning(
                "unit %d was taken over while the store was out of reach", unit.claim.unit
            )
            unit.is_lost = True
            return
        index = self._store.index(chunk.spec)
        failed_before = {unit_id for clip in chunk.clips for unit_id in index.failed_in(clip.key)}
        label = self._labels[chunk.spec.spec_id]
        provenance = self._bank.provenance(chunk.spec)
        if chunk.spec.crop is not None and self._faces is not None:
            provenance["faces"] = self._faces
        self._committer.commit(unit, chunk, label, provenance, failed_before)

    def _sign_off_if_encoded(self, unit: UnitWork) -> None:
        if unit.is_encoded and unit in self.units:
            self.units.remove(unit)
            # Behind the unit's commits: the receipt says that they are done.
            if self._held:
                self._held.append(lambda: self._committer.do(lambda: self._sign_off(unit)))
            else:
                self._committer.do(lambda: self._sign_off(unit))

    def _sign_off(self, unit: UnitWork) -> None:
        if unit.is_lost:
            return
        self._job.finish(unit.claim, self._receipt(unit))
        self.n_units += 1
        self._session.update(n_units=self.n_units)
        logger.info("unit %d is done", unit.claim.unit)

    def _receipt(self, unit: UnitWork) -> Receipt:
        progress, worker = unit.progress, self._session.state
        return Receipt(
            unit=unit.claim.unit,
            worker_id=worker.worker_id,
            session=worker.session,
            engine=worker.engine,
            device=worker.device,
            started_s=progress.started_s,
            ended_s=time.time(),
            n_clips=progress.n_clips,
            counts={label: dict(counts) for label, counts in progress.counts.items()},
            failures=tuple(progress.failures),
            remarks=tuple(progress.remarks),
            truncated=tuple(dict.fromkeys(progress.truncated)),
            n_bytes=progress.n_bytes,
            seconds=progress.seconds.told(),
        )


def _may_pass(clip: ClipTokens) -> bool:
    """True for a failure that says more about the place than about the clip."""
    return clip.status is Status.FAILED and kind_of(clip.reason) in TRANSIENT
