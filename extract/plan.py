"""What is missing: manifest x specs - store = units of work. Decides, does no decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cache.clip import Record
from cache.commit import Status
from cache.layout import CLIPS_PER_SHARD
from cache.spec import Stream, TokenSpec
from cache.store import TokenStore


@dataclass(frozen=True)
class Unit:
    """A pack of clips with the specs that all of them miss; one worker commits it."""

    records: tuple[Record, ...]
    specs: tuple[TokenSpec, ...]


@dataclass(frozen=True)
class Plan:
    """The work that a manifest needs under some specs."""

    units: tuple[Unit, ...]
    n_clips: int
    """Distinct clips of the manifest."""
    known: dict[Stream, Counter[Status]] = field(default_factory=dict)
    """Stream -> how many clips the store knows already, by status."""

    @property
    def n_missing(self) -> int:
        """Clips for which some encoder must run."""
        return sum(len(u.records) for u in self.units)


def make_plan(
    records: Sequence[Record],
    specs: Sequence[TokenSpec],
    store: TokenStore,
    *,
    retry_failed: bool = False,
) -> Plan:
    """Compare a manifest with a store.

    Args:
        records: The manifest's records; records that share a clip share its tokens.
        specs: Resolved specs, one per stream.
        store: Where tokens are, or will be.
        retry_failed: Treat clips that failed before as missing.
    """
    known: dict[Stream, Counter[Status]] = {spec.stream: Counter() for spec in specs}
    work: dict[tuple[TokenSpec, ...], list[Record]] = {}
    seen: set[tuple[str, str]] = set()
    for record in records:
        missing = []
        for spec in specs:
            key = record.token_key(spec)
            if (spec.spec_id, key) in seen:
                continue
            seen.add((spec.spec_id, key))
            entry = store.index(spec).entries.get(key)
            if entry is None or (retry_failed and entry.status is Status.FAILED):
                missing.append(spec)
            else:
                known[spec.stream][entry.status] += 1
        if missing:
            work.setdefault(tuple(missing), []).append(record)
    units = tuple(
        Unit(tuple(pack), missing)
        for missing, todo in work.items()
        for pack in _packs(todo, CLIPS_PER_SHARD)
    )
    return Plan(units, len({r.clip.sha256 for r in records}), known)


def _packs(records: Sequence[Record], size: int) -> Iterable[Sequence[Record]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]
