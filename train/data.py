"""Stored tokens to batches: the seam between the store and the model.

A *prefix batch* is a dictionary, documented field by field at `PrefixBatch`. Everything that builds
a batch (training, evaluation, prediction) goes through `collate`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache.clip import Record
from cache.commit import Entry, Status
from cache.errors import CacheMissError
from cache.labels import LabelSpace
from cache.reader import TokenReader
from cache.spec import STREAMS, Stream, TokenSpec
from cache.store import TokenStore
from train.config import DataConfig, Preset, Tokens
from train.mixture import Mixture
from train.prompt import (
    InstructionPools,
    PromptTokens,
    TextTokenizer,
    choose_instruction,
    load_instructions,
    option_order,
    render,
    tokenize,
)

IGNORE = -100
"""Label of a position that is not supervised, as in torch's cross entropy."""


class PrefixBatch(TypedDict):
    """What the model takes. B samples, S text positions (tail and answer, right-padded)."""

    tokens: dict[str, Tensor]
    """`audio`, `video`, `image`: (B, T, D) float32; `image_cls`: (B, D). Zeros where masked."""
    masks: dict[str, Tensor]
    """`audio`, `video`, `image`: (B, T) bool, True where valid."""
    head_ids: Tensor
    """(H,) int64: BOS and the text before the prefix, equal for all samples."""
    text_ids: Tensor
    """(B, S) int64."""
    text_mask: Tensor
    """(B, S) bool, False on padding."""
    labels: Tensor
    """(B, S) int64: the answer's ids where supervised, -100 elsewhere."""


@dataclass(frozen=True)
class ClipViews:
    """The views of one clip."""

    tokens: dict[str, npt.NDArray[np.float32]]
    """As in `PrefixBatch`, without the batch axis."""
    masks: dict[str, npt.NDArray[np.bool_]]

    @property
    def n_bytes(self) -> int:
        """Memory that the arrays take."""
        return sum(a.nbytes for a in self.tokens.values())


class ViewReader:
    """Reads clips from a store and applies a preset's views."""

    def __init__(self, store: TokenStore, preset: Preset) -> None:
        """Resolve the preset's specs against the store.

        Raises:
            SpecMismatchError: The store holds other specs, or cannot serve a view.
            CacheMissError: A stream was never extracted.
        """
        self.store = store
        self.specs: dict[Stream, TokenSpec] = {
            spec.stream: store.resolve(spec) for spec in preset.tokens.all()
        }
        self._sources = {spec.stream: store.sources(spec) for spec in preset.tokens.all()}
        self._readers = {
            source.spec_id: TokenReader(
                store, {stream: source}, {stream: getattr(preset.views, stream)}, missing="mask"
            )
            for stream, sources in self._sources.items()
            for source in sources
        }
        self._memory_left = preset.data.memory_bytes
        self._memory: dict[str, ClipViews] = {}

    @property
    def resolved(self) -> Tokens:
        """The stored specs."""
        return Tokens(**{stream: spec for stream, spec in self.specs.items()})

    def statuses(self, record: Record) -> dict[Stream, Status]:
        """Return what the store knows of a record; raises CacheMissError if anything is missing."""
        return {stream: self._find(stream, record)[1].status for stream in self.specs}

    def _find(self, stream: Stream, record: Record) -> tuple[TokenSpec, Entry]:
        """Return the stored spec that has a record's clip, and the entry.

        Raises:
            CacheMissError: None has.
        """
        spec = self.specs[stream]
        key = record.token_key(spec)
        found = self.store.find(self._sources[stream], key)
        return found if found is not None else (spec, self.store.entry(spec, key, record.uid))

    def read(self, record: Record, masked: Collection[str] = ()) -> ClipViews:
        """Return a record's views; a stream without tokens, or in `masked`, is masked.

        Raises:
            CacheMissError: A stream was never extracted for this clip.
            CorruptTokensError: Stored bytes are damaged.
        """
        known = self._memory.get(record.uid)
        if known is None:
            known = self._read(record)
            if known.n_bytes <= self._memory_left:
                self._memory_left -= known.n_bytes
                self._memory[record.uid] = known
        if not masked:
            return known
        tokens, masks = dict(known.tokens), dict(known.masks)
        for stream in masked:
            masks[stream] = np.zeros_like(masks[stream])
            for name in (stream, "image_cls") if stream == "image" else (stream,):
                tokens[name] = np.zeros_like(tokens[name])
        return ClipViews(tokens, masks)

    def _read(self, record: Record) -> ClipViews:
        tokens: dict[str, npt.NDArray[np.float32]] = {}
        masks: dict[str, npt.NDArray[np.bool_]] = {}
        for stream in self.specs:
            source, _ = self._find(stream, record)
            found = self._readers[source.spec_id].read([record])[stream]
            tokens[stream], masks[stream] = found.tokens[0].numpy(), found.mask[0].numpy()
            if found.cls is not None:
                tokens["image_cls"] = found.cls[0].numpy()
        return ClipViews(tokens, masks)


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
            streams = [stream for stream in STREAMS if found[stream] is status]
            if streams and choice == "refuse":
                raise CacheMissError(
                    f"{record.uid}: {', '.join(streams)} is {status.value}, and data.{status.value} is "
                    f"'refuse'. Set data.{status.value}=mask or data.{status.value}=drop, or "
                    f"{'extract again with --retry-failed' if status is Status.FAILED else 'leave it out'}."
                )
            if streams and choice == "drop":
                break
        else:
            if any(status is Status.OK for status in found.values()):
                kept.append(record)
    return kept


class Renderer:
    """Renders records to token ids by one preset, tokenizer and label space."""

    def __init__(self, preset: Preset, tokenizer: TextTokenizer, labels: LabelSpace) -> None:
        """Read the instruction pools; raises SchemaError if they are damaged."""
        self.preset = preset
        self.tokenizer = tokenizer
        self.labels = labels
        self.pools: InstructionPools = load_instructions(preset.prompt.instructions)

    def prompt(self, record: Record, task: str, epoch: int, *, with_answer: bool) -> PromptTokens:
        """Render and tokenize one record.

        With an answer, for training, instruction and option order vary by pass; without, the
        record's first instruction and the native order are used.
        """
        config = self.preset.prompt
        seed = self.preset.seed
        rendered = render(
            task,
            choose_instruction(task, seed, record.uid, epoch, self.pools),
            option_order(self.labels.labels, seed, record.uid, epoch, shuffle=with_answer),
            subtitle=record.subtitle if config.use_subtitle else None,
            label=record.label if with_answer else None,
            description=record.description if with_answer and task == "think" else None,
            prompt_style=config.style,
        )
        return tokenize(rendered, self.tokenizer, max_answer_tokens=config.max_answer_tokens)


@dataclass(frozen=True)
class Item:
    """One sample, ready to be collated."""

    views: ClipViews
    prompt: PromptTokens


class TrainDataset(Dataset[Item]):
    """The samples of a stage, in the order in which they are trained."""

    def __init__(self, mixture: Mixture, reader: ViewReader, renderer: Renderer) -> None:
        """Bind a sequence of samples to a store and a renderer."""
        self.mixture = mixture
        self.reader = reader
        self.renderer = renderer

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, place: int) -> Item:
        sample = self.mixture[place]
        prompt = self.renderer.prompt(sample.record, sample.task, sample.epoch, with_answer=True)
        return Item(self.reader.read(sample.record), prompt)


def collate(items: Sequence[Item]) -> PrefixBatch:
    """Stack items to a batch; text is right-padded with id 0 and masked."""
    texts = [(*i.prompt.tail_ids, *i.prompt.answer_ids) for i in items]
    size = max(map(len, texts))
    text_ids = torch.zeros(len(items), size, dtype=torch.long)
    labels = torch.full((len(items), size), IGNORE)
    text_mask = torch.zeros(len(items), size, dtype=torch.bool)
    for row, (item, ids) in enumerate(zip(items, texts, strict=True)):
        text_ids[row, : len(ids)] = torch.tensor(ids)
        text_mask[row, : len(ids)] = True
        n_tail = len(item.prompt.tail_ids)
        labels[row, n_tail : len(ids)] = text_ids[row, n_tail : len(ids)]
    first = items[0].views
    return PrefixBatch(
        tokens={
            name: torch.from_numpy(np.stack([i.views.tokens[name] for i in items]))
            for name in first.tokens
        },
        masks={
            name: torch.from_numpy(np.stack([i.views.masks[name] for i in items]))
            for name in first.masks
        },
        head_ids=torch.tensor(items[0].prompt.head_ids),
        text_ids=text_ids,
        text_mask=text_mask,
        labels=labels,
    )
