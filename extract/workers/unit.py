"""One unit of work in a worker's hands: which clips miss what, in which batches, and what is committed.

Decides; does no decoding, no encoding and no I/O. Two rules make a repeated unit give the same bytes:
a batch is made of the clips at fixed positions of the unit, whoever encodes it and whatever else
failed, and a shard of the clips at fixed positions, too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cache.clip import Record
from cache.commit import ClipTokens, Status
from cache.encoders import SoundEncoder, VideoMaeEncoder
from cache.layout import CLIPS_PER_SHARD
from cache.spec import Stream, TokenSpec
from extract.failures import kind_of
from extract.jobs.job import ReceiptFailure
from extract.jobs.lease import Claim
from extract.jobs.session import StageSeconds


def tokens_per_clip(spec: TokenSpec) -> int:
    """Return the tokens that an encoder computes for a clip, padding included."""
    encoder = spec.encoder
    if isinstance(encoder, SoundEncoder):
        return encoder.n_context
    assert spec.frames is not None
    per_picture = spec.patches_per_side**2
    if isinstance(encoder, VideoMaeEncoder):
        return spec.n_steps * per_picture
    return spec.frames.n_frames * (1 + per_picture)


@dataclass(frozen=True)
class Batch:
    """Clips of a unit that are encoded together under one spec."""

    unit: int
    spec: TokenSpec
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Clips of a unit that are committed together: a shard."""

    spec: TokenSpec
    positions: tuple[int, ...]
    clips: tuple[ClipTokens, ...]


@dataclass
class Clock:
    """Where time went, in seconds; adds up what `StageSeconds` then tells."""

    decode_cpu_s: float = 0.0
    decode_wait_s: float = 0.0
    encode_s: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By spec label."""
    write_s: float = 0.0
    fetch_s: float = 0.0
    idle_s: float = 0.0

    def told(self) -> StageSeconds:
        """Return the sums as a document."""
        return StageSeconds(**{**vars(self), "encode_s": dict(self.encode_s)})


@dataclass
class Progress:
    """What was done of a unit so far."""

    counts: defaultdict[str, Counter[Status]] = field(default_factory=lambda: defaultdict(Counter))
    """Label -> clips by status."""
    failures: list[ReceiptFailure] = field(default_factory=list)
    remarks: list[tuple[str, Stream, str]] = field(default_factory=list)
    """(uid, stream, damage that decoding passed over)"""
    truncated: list[str] = field(default_factory=list)
    started_s: float = 0.0
    """Unix time."""
    n_clips: int = 0
    n_bytes: int = 0
    seconds: Clock = field(default_factory=Clock)


class UnitWork:
    """A claimed unit."""

    def __init__(
        self,
        claim: Claim,
        records: Sequence[Record],
        missing: Mapping[str, Collection[str]],
        batch_tokens: int,
        suspects: Collection[str] = (),
    ) -> None:
        """Take up a unit.

        Args:
            claim: The lease.
            records: The unit's records, in the order of its rows.
            missing: spec_id -> token keys that have no tokens yet.
            batch_tokens: Most encoder tokens in a batch.
            suspects: SHA-256 of clips that are encoded alone.
        """
        self.claim = claim
        self.records = tuple(records)
        self.progress = Progress()
        self.is_lost = False
        """True once another worker is known to have taken the unit over: it signs it off."""
        self._suspects = frozenset(suspects)
        self._missing: dict[str, frozenset[int]] = {}
        self._results: dict[str, dict[int, ClipTokens]] = {}
        self._committed: dict[str, set[int]] = {}
        for spec in claim.specs:
            keys, seen, positions = missing[spec.spec_id], set[str](), set[int]()
            for position, record in enumerate(self.records):
                key = record.token_key(spec)
                if key in keys and key not in seen:  # records that share a clip are one clip
                    seen.add(key)
                    positions.add(position)
            self._missing[spec.spec_id] = frozenset(positions)
            self._results[spec.spec_id] = {}
            self._committed[spec.spec_id] = set()
        self._per_batch = {
            spec.spec_id: max(1, batch_tokens // tokens_per_clip(spec)) for spec in claim.specs
        }

    @property
    def positions(self) -> list[int]:
        """Positions of the clips that must be decoded."""
        missing = frozenset[int]().union(*self._missing.values())
        return sorted(p for p in missing if not self.is_done(p))

    def is_done(self, position: int) -> bool:
        """True if a clip has a result under every spec."""
        return all(position in self._results[s.spec_id] for s in self.specs_of(position))

    def specs_of(self, position: int) -> list[TokenSpec]:
        """Return the specs whose tokens a clip misses."""
        return [s for s in self.claim.specs if position in self._missing[s.spec_id]]

    def batch_of(self, spec: TokenSpec, position: int) -> Batch:
        """Return the batch that a clip is part of."""
        if self.records[position].sha256 in self._suspects:
            return Batch(self.claim.unit, spec, (position,))
        size = self._per_batch[spec.spec_id]
        start = position // size * size
        together = (
            p
            for p in sorted(self._missing[spec.spec_id])
            if start <= p < start + size and self.records[p].sha256 not in self._suspects
        )
        return Batch(self.claim.unit, spec, tuple(together))

    def finish_clip(self, spec: TokenSpec, position: int, clip: ClipTokens) -> Chunk | None:
        """Note a clip's result; return the shard that it completes."""
        self._results[spec.spec_id][position] = clip
        first = position // CLIPS_PER_SHARD * CLIPS_PER_SHARD
        wanted = [p for p in self._missing[spec.spec_id] if first <= p < first + CLIPS_PER_SHARD]
        done = self._results[spec.spec_id]
        if any(p not in done for p in wanted):
            return None
        return self._chunk(spec, wanted)

    def rest(self) -> list[Chunk]:
        """Return what is encoded but not yet part of a shard: for a worker that must end."""
        chunks = []
        for spec in self.claim.specs:
            done = self._results[spec.spec_id].keys() - self._committed[spec.spec_id]
            for first in range(0, len(self.records), CLIPS_PER_SHARD):
                some = [p for p in done if first <= p < first + CLIPS_PER_SHARD]
                if some:
                    chunks.append(self._chunk(spec, some))
        return chunks

    def _chunk(self, spec: TokenSpec, positions: Collection[int]) -> Chunk:
        ordered = tuple(sorted(positions))
        self._committed[spec.spec_id].update(ordered)
        # Popped, not looked up: tokens that are on their way to the store need not stay here.
        results = self._results[spec.spec_id]
        clips = tuple(results[p] for p in ordered)
        for position, clip in zip(ordered, clips, strict=True):
            results[position] = ClipTokens(clip.key, clip.status)
        return Chunk(spec, ordered, clips)

    @property
    def is_encoded(self) -> bool:
        """True once every clip has a result under every spec."""
        return all(
            self._missing[spec.spec_id] <= self._results[spec.spec_id].keys()
            for spec in self.claim.specs
        )

    def note(self, spec: TokenSpec, position: int, clip: ClipTokens) -> None:
        """Note what is remarkable in a clip's result, for the receipt."""
        record, progress = self.records[position], self.progress
        if clip.status is Status.FAILED:
            progress.failures.append(
                ReceiptFailure(
                    uid=record.uid,
                    key=clip.key,
                    stream=spec.stream,
                    kind=kind_of(clip.reason),
                    reason=clip.reason or "",
                )
            )
        if clip.remark is not None:
            progress.remarks.append((record.uid, spec.stream, clip.remark))
        if clip.truncated:
            progress.truncated.append(record.uid)
