"""What is missing: manifest x specs - store = units of work. Decides, does no decoding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from cache.clip import Record
from cache.commit import Entry, Status
from cache.layout import CLIPS_PER_SHARD, STORED_DTYPES
from cache.spec import AUDIO_FRAMES_PER_S, Stream, TokenSpec
from cache.store import TokenStore

NEVER = "not encoded yet"
RETRY = "failed before, to be tried again"
OTHER_SPEC = "encoded, but under another spec only"
"""Why tokens are missing."""


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
    served: dict[Stream, Counter[str]] = field(default_factory=dict)
    """Stream -> how many of the known clips come from a richer spec, by its spec_id."""
    misses: dict[Stream, Counter[str]] = field(default_factory=dict)
    """Stream -> how many clips lack tokens, by reason."""
    n_bytes: dict[Stream, int] = field(default_factory=dict)
    """Stream -> bytes of tokens to be written, by the durations that containers state; one that is not
    known counts as a whole window."""

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

    Tokens of a richer spec (`TokenSpec.serves`) are as good as those of the spec itself.

    Args:
        records: The manifest's records; records that share a clip share its tokens.
        specs: One per stream; one whose weights are not known takes any stored weights.
        store: Where tokens are, or will be.
        retry_failed: Treat clips that failed before as missing.
    """
    streams = [spec.stream for spec in specs]
    known: dict[Stream, Counter[Status]] = {s: Counter() for s in streams}
    served: dict[Stream, Counter[str]] = {s: Counter() for s in streams}
    misses: dict[Stream, Counter[str]] = {s: Counter() for s in streams}
    n_bytes: dict[Stream, int] = dict.fromkeys(streams, 0)
    sources = {spec: store.sources(spec) for spec in specs}
    work: dict[tuple[TokenSpec, ...], list[Record]] = {}
    seen: set[tuple[Stream, str]] = set()
    for record in records:
        missing = []
        for spec in specs:
            key, stream = record.token_key(spec), spec.stream
            if (stream, key) in seen:
                continue
            seen.add((stream, key))
            found = store.find(sources[spec], key)
            if found is not None and not (retry_failed and found[1].status is Status.FAILED):
                source, entry = found
                known[stream][entry.status] += 1
                if not spec.accepts(source):
                    served[stream][source.spec_id] += 1
                continue
            missing.append(spec)
            misses[stream][_why_missing(store, spec, record, found)] += 1
            n_bytes[stream] += token_bytes(spec, record)
        if missing:
            work.setdefault(tuple(missing), []).append(record)
    units = tuple(
        Unit(tuple(pack), missing)
        for missing, todo in work.items()
        for pack in _packs(todo, CLIPS_PER_SHARD)
    )
    n_clips = len({record.clip.sha256 for record in records})
    return Plan(units, n_clips, known, served, misses, n_bytes)


def _why_missing(
    store: TokenStore, spec: TokenSpec, record: Record, found: tuple[TokenSpec, Entry] | None
) -> str:
    if found is not None:
        return RETRY
    same_stream = [other for other in store.specs.values() if other.stream == spec.stream]
    elsewhere = any(record.token_key(other) in store.index(other) for other in same_stream)
    return OTHER_SPEC if elsewhere else NEVER


def token_bytes(spec: TokenSpec, record: Record) -> int:
    """Return how many bytes a record's tokens take, as far as its container tells."""
    if spec.stream == "audio" and record.clip.has_audio is False:
        return 0
    n_tokens, *tail = spec.max_shape
    if spec.stream == "audio" and record.clip.duration_s is not None:
        n_tokens = min(n_tokens, math.ceil(record.clip.duration_s * AUDIO_FRAMES_PER_S))
    return n_tokens * math.prod(tail) * np.dtype(STORED_DTYPES[spec.dtype]).itemsize


def _packs(records: Sequence[Record], size: int) -> Iterable[Sequence[Record]]:
    for start in range(0, len(records), size):
        yield records[start : start + size]
