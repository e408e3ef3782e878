"""Who works on which unit: leases, one per attempt at a unit.

A lease is a file `leases/<unit>.<attempt>` that is created once, so that of several workers one has
it. Nothing is ever taken away: the highest attempt of a unit counts, and a worker may create the next
one where the holder released its own (by creating `leases/<unit>.<attempt>.released`), ended, or
died. The creation alone decides; listings only say where it is worth trying.
"""

from __future__ import annotations

import hashlib
import logging
import re
import time
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cache.index import in_parallel
from cache.schema import Model
from cache.spec import TokenSpec
from cache.storage import Storage, exists
from extract.jobs.session import (
    Sighting,
    WorkerSession,
    WorkerState,
    create_document,
    look_at,
    read_or_note,
)

logger = logging.getLogger(__name__)

LISTING_AGE_S = 5.0
"""How long file names that were listed are gone by, while there are free units among them."""
_LEASE = re.compile(r"(\d{6,})\.(\d{3,})(\.released)?")
_RECEIPT = re.compile(r"(\d{6,})(\.part-.+)?\.json")


class LeaseDocument(Model):
    """Content of a lease's file."""

    worker_id: str
    created: str
    """UTC, ISO 8601. For people; nothing is decided by a clock."""
    nonce: str
    """Random, so that no two attempts to create it take one file for their own."""


@dataclass(frozen=True)
class Lease:
    """The right to work on a unit."""

    unit: int
    attempt: int
    predecessor: WorkerState | None
    """As in `Claim`."""


@dataclass(frozen=True)
class Claim:
    """A unit that a worker holds."""

    unit: int
    attempt: int
    worker_id: str
    rows: tuple[int, ...]
    """Into the manifest's records."""
    specs: tuple[TokenSpec, ...]
    predecessor: WorkerState | None = None
    """The last state of the worker that died while it held the unit; None if there was none, if it
    ended properly, or if its file cannot be read."""


@dataclass
class Listing:
    """What the file names of a job said at one moment."""

    attempts: dict[int, int] = field(default_factory=dict)
    """Unit -> its highest attempt."""
    released: set[tuple[int, int]] = field(default_factory=set)
    """Units and attempts that were given back."""
    done: set[int] = field(default_factory=set)
    """Units with a receipt."""
    read_s: float = field(default_factory=time.monotonic)

    def is_free(self, unit: int) -> bool:
        """True if nobody holds the unit: never leased, or released."""
        attempt = self.attempts.get(unit)
        return attempt is None or (unit, attempt) in self.released


class Leases:
    """The leases of a job."""

    def __init__(self, storage: Storage, root: str, n_units: int) -> None:
        """Use the leases of the job at `root`."""
        self.storage, self.root, self.n_units = storage, root, n_units
        self._listing: Listing | None = None
        self._holders: dict[tuple[int, int], str] = {}

    def claim(self, me: WorkerSession, exclude: Collection[int]) -> Lease | None:
        """Take a unit; see `Job.claim`."""
        known = self._listing
        if known is not None and time.monotonic() - known.read_s < LISTING_AGE_S:
            lease = self._claim_free(known, me, exclude)
            if lease is not None:
                return lease
        self._listing = listing = self._list()
        return self._claim_free(listing, me, exclude) or self._take_over(listing, me, exclude)

    def is_last(self, unit: int, attempt: int) -> bool:
        """True if nobody has taken the unit over since: attempts have no gaps."""
        return not exists(self.storage, self._key(unit, attempt + 1))

    def release(self, unit: int, attempt: int) -> None:
        """Give a unit back: everyone sees at once that it is free."""
        self.storage.create(f"{self._key(unit, attempt)}.released", b"{}", durable=False)

    def _claim_free(
        self, listing: Listing, me: WorkerSession, exclude: Collection[int]
    ) -> Lease | None:
        """Take a unit that nobody holds."""
        for unit in self._todo(listing, me, exclude):
            if listing.is_free(unit) and (lease := self._take(unit, listing, me)) is not None:
                return lease
        return None

    def _take_over(
        self, listing: Listing, me: WorkerSession, exclude: Collection[int]
    ) -> Lease | None:
        """Take a unit whose holder is dead."""
        held = [(unit, listing.attempts[unit]) for unit in self._todo(listing, me, exclude)]
        for unit, predecessor in self._orphans(held, me).items():
            lease = self._take(unit, listing, me, predecessor)
            # Its holder may have finished it since the listing, before it ended.
            if lease is not None and not exists(self.storage, receipt_key(self.root, unit)):
                return lease
        return None

    def _todo(self, listing: Listing, me: WorkerSession, exclude: Collection[int]) -> list[int]:
        """Return the units that are not done, from a place on that differs between workers."""
        start = int(hashlib.sha256(me.worker_id.encode()).hexdigest(), 16) % self.n_units
        order = [*range(start, self.n_units), *range(start)]
        return [unit for unit in order if unit not in listing.done and unit not in exclude]

    def _take(
        self,
        unit: int,
        listing: Listing,
        me: WorkerSession,
        predecessor: WorkerState | None = None,
    ) -> Lease | None:
        """Try to create the unit's next lease; None if another worker did."""
        attempt = listing.attempts.get(unit, -1) + 1
        document = LeaseDocument(
            worker_id=me.worker_id,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            nonce=uuid.uuid4().hex,
        )
        # Not synced: should a power cut lose a lease, the unit is encoded twice and committed once.
        is_ours = create_document(self.storage, self._key(unit, attempt), document, durable=False)
        listing.attempts[unit] = attempt  # ours or another's, it is there now
        return Lease(unit, attempt, predecessor) if is_ours else None

    def _list(self) -> Listing:
        """List leases, then receipts: so a unit that is finished meanwhile is seen as done."""
        listing = Listing()
        for name in self.storage.names(f"{self.root}/leases"):
            match = _LEASE.fullmatch(name)
            if match is None:
                continue
            unit, attempt = int(match[1]), int(match[2])
            if match[3]:
                listing.released.add((unit, attempt))
            else:
                listing.attempts[unit] = max(attempt, listing.attempts.get(unit, 0))
        listing.done = done_units(self.storage, self.root)
        return listing

    def _orphans(
        self, held: list[tuple[int, int]], me: WorkerSession
    ) -> dict[int, WorkerState | None]:
        """Return the units whose holder ended or died, and the last state of one that died.

        Each holder is looked at once, and only our own heartbeat tells the storage's time.

        Args:
            held: Units and their highest attempts, not released.
            me: Who asks. What it holds itself is no orphan.
        """
        holders = in_parallel(self._holder, held, self.storage)
        names = sorted({name for name in holders if name is not None and name != me.worker_id})
        looks = in_parallel(self._look, names, self.storage)
        seen: dict[str | None, Sighting | None] = dict(zip(names, looks, strict=True))
        others = [
            (unit, seen.get(holder) or self._lease_alone(unit, attempt))
            for (unit, attempt), holder in zip(held, holders, strict=True)
            if holder != me.worker_id
        ]
        now_s = me.storage_now_s() if others else None
        return {
            unit: None if sighting.has_ended else sighting.state
            for unit, sighting in others
            if sighting.is_dead(now_s, me.lease_timeout_s)
        }

    def _holder(self, place: tuple[int, int]) -> str | None:
        """Return who has a lease; None if its file is damaged. A lease never changes: it is read once."""
        if place not in self._holders:
            lease = read_or_note(self.storage, self._key(*place), LeaseDocument, logger.warning)
            if lease is None:
                return None
            self._holders[place] = lease.worker_id
        return self._holders[place]

    def _look(self, worker_id: str) -> Sighting | None:
        return look_at(self.storage, self.root, worker_id, logger.debug)

    def _lease_alone(self, unit: int, attempt: int) -> Sighting:
        """Judge by a lease's own age, where it or its holder's file is gone or damaged."""
        return Sighting(None, self.storage.modified_s(self._key(unit, attempt)))

    def _key(self, unit: int, attempt: int) -> str:
        return f"{self.root}/leases/{unit:06d}.{attempt:03d}"


def receipt_key(root: str, unit: int, part: str = "") -> str:
    """Return the key of a unit's receipt, or with `part` of one for a part of it."""
    return f"{root}/receipts/{unit:06d}{part}.json"


def receipt_names(storage: Storage, root: str) -> Iterator[tuple[str, int | None]]:
    """Yield the names of all receipts, each with its unit, or None if that is only partly done."""
    for name in storage.names(f"{root}/receipts"):
        match = _RECEIPT.fullmatch(name)
        if match is not None:
            yield name, None if match[2] else int(match[1])


def done_units(storage: Storage, root: str) -> set[int]:
    """Return the units that have a receipt, whether or not it can be read."""
    return {unit for _, unit in receipt_names(storage, root) if unit is not None}
