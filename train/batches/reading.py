"""The store as the trainer sees it: a record's views, what it lacks, and which records to use."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cache.clip import Record
from cache.commit import Entry, Status
from cache.errors import CacheMissError, CorruptTokensError
from cache.reader import StreamBatch, TokenReader
from cache.spec import STREAMS, Stream, TokenSpec
from cache.store import TokenStore
from train.config import STREAM_OF, DataConfig, Input, Preset, Tokens


@dataclass(frozen=True, eq=False)
class Views:
    """The views of C clips: those of the inputs that the model has."""

    tokens: dict[str, Tensor]
    """`audio`, `video`, `image`, `local`: (C, T, D) float32; `image_cls`: (C, D). Zeros where masked."""
    masks: dict[str, Tensor]
    """`audio`, `video`, `image`, `local`: (C, T) bool, True where valid. Of an image whose CLS token
    alone is stored, so that T is 0: (C, 1)."""

    @property
    def n_bytes(self) -> int:
        """Memory that the tokens take."""
        return sum(t.nbytes for t in self.tokens.values())


class ViewReader:
    """Reads clips from a store and applies a preset's views. May be used by several threads."""

    def __init__(self, store: TokenStore, preset: Preset, *, pin_memory: bool = False) -> None:
        """Resolve the preset's specs against the store.

        Args:
            store: An open store.
            preset: Specs, views, memory.
            pin_memory: Page-locked batches, for copies to a GPU.

        Raises:
            SpecMismatchError: The store holds other specs, or cannot serve a view.
            CacheMissError: A stream was never extracted.
        """
        self.store = store
        self._preset = preset
        wanted = preset.tokens.by_input()
        self.specs: dict[Input, TokenSpec] = {n: store.resolve(s) for n, s in wanted.items()}
        """Input -> the stored spec."""
        self._sources = {name: store.sources(spec) for name, spec in wanted.items()}
        self._n_tokens = {name: shape[0] for name, shape in preset.view_shapes().items()}
        self._readers = {
            (name, source.spec_id): TokenReader(
                store,
                {source.stream: source},
                {source.stream: getattr(preset.views, name)},
                missing="mask",
                pin_memory=pin_memory,
            )
            for name, sources in self._sources.items()
            for source in sources
        }
        self._memory_left = preset.data.memory_bytes
        self._memory: dict[str, Views] = {}

    @property
    def resolved(self) -> Tokens:
        """The stored specs."""
        return Tokens(**{name: spec for name, spec in self.specs.items()})

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams that the model reads anything of."""
        return tuple(s for s in STREAMS if any(STREAM_OF[name] == s for name in self.specs))

    def statuses(self, record: Record) -> dict[Input, Status]:
        """Return what the store knows of a record; raises CacheMissError if anything is missing."""
        return {name: self._find(name, record)[1].status for name in self.specs}

    def has(self, record: Record, name: Input) -> bool:
        """Return whether a record has tokens of an input."""
        return self._find(name, record)[1].status is Status.OK

    def streams_of(self, record: Record) -> tuple[Stream, ...]:
        """Return the streams of which a record has tokens of some input."""
        there = {STREAM_OF[n] for n, status in self.statuses(record).items() if status is Status.OK}
        return tuple(stream for stream in STREAMS if stream in there)

    def n_valid(self, record: Record) -> dict[Input, int]:
        """Return how many tokens of each view are valid, without reading them."""
        found: dict[Input, int] = {}
        for name in self.specs:
            _, entry = self._find(name, record)
            n = self._n_tokens[name] if entry.status is Status.OK else 0
            found[name] = min(n, entry.valid_len) if name == "audio" else n
        return found

    def _find(self, name: Input, record: Record) -> tuple[TokenSpec, Entry]:
        """Return the stored spec that has a record's clip, and the entry.

        Raises:
            CacheMissError: None has.
        """
        spec = self.specs[name]
        key = record.token_key(spec)
        found = self.store.find(self._sources[name], key)
        return found if found is not None else (spec, self.store.entry(spec, key, record.uid))

    def read(
        self, records: Sequence[Record], hidden: Sequence[Collection[str]] | None = None
    ) -> Views:
        """Return the views of several records; what is hidden or has no tokens is masked.

        Args:
            records: C records.
            hidden: Streams to mask, for each of them; those that the model does not read have no
                effect.

        Raises:
            CacheMissError: A stream was never extracted for a clip.
            CorruptTokensError: Stored bytes are damaged, or a token is not a finite number.
        """
        known = [self._memory.get(record.uid) for record in records]
        if all(v is not None for v in known):
            found = _stack([v for v in known if v is not None])
        else:
            found = self._read(records)
            self._keep(records, found)
        if hidden is not None and any(hidden):
            for place, streams in enumerate(hidden):
                for name in self._preset.hidden_inputs(streams):
                    found.masks[name][place] = False
                    found.tokens[name][place] = 0
                    if name == "image":
                        found.tokens["image_cls"][place] = 0
        return found

    def _keep(self, records: Sequence[Record], found: Views) -> None:
        """Keep clips in memory while there is room; the caller may change what it got."""
        n_bytes = found.n_bytes // len(records)
        for place, record in enumerate(records):
            if n_bytes > self._memory_left:
                return
            if record.uid not in self._memory:
                self._memory_left -= n_bytes
                self._memory[record.uid] = Views(
                    {name: t[place : place + 1].clone() for name, t in found.tokens.items()},
                    {name: m[place : place + 1].clone() for name, m in found.masks.items()},
                )

    def _read(self, records: Sequence[Record]) -> Views:
        tokens: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for name in self.specs:
            stream = STREAM_OF[name]
            sources = [self._find(name, record)[0].spec_id for record in records]
            parts = {}
            for source in dict.fromkeys(sources):
                places = [i for i, s in enumerate(sources) if s == source]
                chosen = [records[i] for i in places]
                batch = self._readers[name, source].read(chosen)[stream]
                for numbers in (batch.tokens, batch.cls):
                    if numbers is not None:
                        _refuse_non_finite(name, chosen, numbers)
                parts[source] = places, batch
            merged = [(places, b.tokens, _mask(b), b.cls) for places, b in parts.values()]
            tokens[name] = _merge([(p, t) for p, t, _, _ in merged])
            masks[name] = _merge([(p, m) for p, _, m, _ in merged])
            cls = [(p, c) for p, _, _, c in merged if c is not None]
            if cls:
                tokens["image_cls"] = _merge(cls)
        return Views(tokens, masks)


def _mask(batch: StreamBatch) -> Tensor:
    """Return which tokens are valid; of CLS tokens alone, which of them are."""
    if batch.mask.shape[1]:
        return batch.mask
    return torch.tensor([[status is Status.OK] for status in batch.status])


def _merge(parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
    """Put rows from several specs back into the order of the batch; one spec needs no copy."""
    if len(parts) == 1:
        return parts[0][1]
    n = sum(len(places) for places, _ in parts)
    whole = parts[0][1].new_empty((n, *parts[0][1].shape[1:]))
    for places, rows in parts:
        whole[list(places)] = rows
    return whole


def _stack(views: Sequence[Views]) -> Views:
    def joined(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    return Views(joined([v.tokens for v in views]), joined([v.masks for v in views]))


def _refuse_non_finite(name: Input, records: Sequence[Record], tokens: Tensor) -> None:
    """Raise for tokens that would make every gradient a NaN; a sum sees them all."""
    # numpy's, because torch's would start threads that take cores from the model in training.
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.add.reduce(tokens.numpy().reshape(-1))
    if np.isfinite(total):
        return
    for record, clip in zip(records, tokens, strict=True):
        n_bad = int((~torch.isfinite(clip)).sum())
        if n_bad:
            raise CorruptTokensError(
                f"{record.uid}: {n_bad} of {clip.numel()} numbers of its {name} tokens are not finite "
                "(NaN or infinity). Extract this clip again: `emocache store verify` names all such."
            )


def usable(records: Sequence[Record], reader: ViewReader, data: DataConfig) -> list[Record]:
    """Apply the choice about absent and failed streams to every record, before anything runs.

    Returns:
        The records to use. One without a single valid stream is never among them.

    Raises:
        CacheMissError: A clip was never extracted, or the choice is to refuse.
    """
    kept = []
    for record in records:
        found = reader.statuses(record)
        for status, choice in ((Status.ABSENT, data.absent), (Status.FAILED, data.failed)):
            inputs = [name for name, its in found.items() if its is status]
            if inputs and choice == "refuse":
                raise CacheMissError(
                    f"{record.uid}: {', '.join(inputs)} is {status.value}, and data.{status.value} is "
                    f"'refuse'. Set data.{status.value}=mask or data.{status.value}=drop, or "
                    f"{'extract again with --retry-failed' if status is Status.FAILED else 'leave it out'}."
                )
            if inputs and choice == "drop":
                break
        else:
            if any(status is Status.OK for status in found.values()):
                kept.append(record)
    return kept
