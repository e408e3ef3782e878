"""Records to batches: the seam between the store and the model.

A *prefix batch* is a dictionary, documented field by field at `PrefixBatch`. Everything that builds
a batch (training, evaluation, prediction) goes through `collate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from cache.clip import Record
from cache.manifest import Header
from train.batches.reading import Views
from train.config import Preset
from train.fusion import fused_mask
from train.llm.attention import Segments
from train.mixture import Ask
from train.prompt import PromptTokens, tokenize
from train.text.turns import TextTokenizer, encode, turns_of
from train.text.wording import Wording


class PrefixBatch(TypedDict):
    """What the model takes: C clips, each with one or more questions, end to end in N positions.

    ::

        BOS head | prefix of clip 0 | tail, answer | tail, answer | BOS head | prefix of clip 1 | ...

    Masked tokens of the prefix are left out. Questions of one clip do not see each other. With several
    splice points the prefix is in as many groups, with text between them.
    """

    tokens: dict[str, Tensor]
    """By input, see `train.batches.reading.Views`."""
    masks: dict[str, Tensor]
    """By input, see `train.batches.reading.Views`."""
    text_ids: Tensor
    """(S,) int64: the head and what is between the prefix's groups, once, then tails and answers."""
    order: Tensor
    """(N,) int64: what stands at each position: i < S is text i, S + c P + p is token p of the
    prefix of clip c, P long."""
    position_ids: Tensor
    """(N,) int64: counted within a clip; each question continues behind the prefix."""
    segments: Segments
    """Which positions see which."""
    predict: Tensor
    """(K,) int64: positions whose next token is supervised."""
    targets: Tensor
    """(K,) int64: those tokens."""
    weights: Tensor
    """(K,) float32: how much each counts; over an answer they sum to 1, or are 1 each."""
    answer_of: Tensor
    """(K,) int64: number of the answer, in [0, A), that each belongs to."""
    uids: tuple[str, ...]
    """Of each answer (or question), A in all."""
    tasks: tuple[str, ...]
    """Of each answer (or question)."""


@dataclass(frozen=True)
class Question:
    """A rendered question about a clip, with its answer in training."""

    task: str
    prompt: PromptTokens


@dataclass(frozen=True)
class Group:
    """A clip with its questions, ready to be laid out; all see the same streams."""

    record: Record
    questions: tuple[Question, ...]
    hidden: tuple[str, ...] = ()
    """Streams that are masked though the clip may have them."""
    n_prefix: int = 0
    """Valid tokens of the prefix."""

    @property
    def n_shared(self) -> int:
        """Positions in front of the questions: the head and the prefix, with the text between its groups."""
        first = self.questions[0].prompt
        return len(first.head_ids) + sum(map(len, first.between_ids)) + self.n_prefix

    @property
    def n_positions(self) -> int:
        """Positions that the group takes in a batch."""
        prompts = [q.prompt for q in self.questions]
        return self.n_shared + sum(len(p.tail_ids) + len(p.answer_ids) for p in prompts)

    @property
    def longest(self) -> int:
        """Positions of its longest question with the prefix: what a context must hold."""
        prompts = [q.prompt for q in self.questions]
        return self.n_shared + max(len(p.tail_ids) + len(p.answer_ids) for p in prompts)

    @property
    def n_answer_tokens(self) -> int:
        """Supervised tokens."""
        return sum(len(q.prompt.answer_ids) for q in self.questions)


class Renderer:
    """Renders records to token ids by one preset, tokenizer and set of label spaces."""

    def __init__(self, preset: Preset, tokenizer: TextTokenizer, header: Header) -> None:
        """Read the instruction pools and the chat template.

        Args:
            preset: Prompt settings and seed.
            tokenizer: Of the language model.
            header: Of the manifest, for its label spaces.

        Raises:
            SchemaError: Damaged pools, or a chat template that cannot be used.
        """
        self.preset = preset
        self.tokenizer = tokenizer
        self.wording = Wording(preset, header)
        self.turns = turns_of(tokenizer, preset.prompt.chat)

    def question(
        self, record: Record, ask: Ask, *, with_answer: bool, vary: bool = True
    ) -> Question:
        """Render and tokenize one question about a record; see `Wording.render`.

        Without its answer it is for a trained model, so that the settings for asking count.
        """
        prompt = tokenize(
            self.wording.render(
                record,
                ask,
                with_answer=with_answer,
                vary=vary,
                asking=not with_answer,
                turns=self.turns,
            ),
            self.tokenizer,
            max_answer_tokens=self.preset.prompt.max_answer_tokens,
            turns=self.turns,
            n_bos=1 if with_answer else self.preset.prompt.eval_bos,
        )
        return Question(ask.task, prompt)

    def candidates(self, options: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Return each option as the answer that a recognition task would be given: its ids and the end."""
        ends = self.turns.end_ids
        return tuple((*encode(self.tokenizer, name.lower()), *ends) for name in options)


def model_arguments(batch: PrefixBatch) -> dict[str, Any]:
    """Return what `EmotionLlama.forward` takes of a batch: all but the names, of which the count."""
    found: dict[str, Any] = {k: v for k, v in batch.items() if k not in ("uids", "tasks")}
    return {**found, "n_answers": len(batch["uids"])}


def prefix_masks(preset: Preset, masks: Mapping[str, Tensor]) -> Tensor:
    """Return which prefix tokens are valid, (C, P) bool, in the order of the prefix."""
    names, blocks = preset.layout().names, dict(masks)
    image = masks["image"].any(dim=1) if "image" in masks else None
    if image is not None:
        blocks["cls"] = image.unsqueeze(1)
    if "fusion" in names:
        fused = fused_mask(preset.model.fusion, masks.get("audio"), image, masks.get("video"))
        blocks["fusion"] = fused
    return torch.cat([blocks[name] for name in names], dim=1)


def collate(
    preset: Preset,
    groups: Sequence[Group],
    views: Views,
    loss_average: Literal["sample", "token"] = "sample",
) -> PrefixBatch:
    """Lay clips and their questions end to end.

    Args:
        preset: Layout of the prefix, masks.
        groups: C clips.
        views: Of the same clips, in the same order.
        loss_average: What counts the same in the loss, every answer or every token.
    """
    masks = views.masks
    if not preset.data.mask_missing:
        masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    valid = prefix_masks(preset, masks).numpy()
    n_prefix, parts = valid.shape[1], preset.layout().groups
    prompts = [q.prompt for group in groups for q in group.questions]
    head, between = prompts[0].head_ids, prompts[0].between_ids
    text = list(head)
    texts: list[Any] = [np.arange(len(head))]  # what stands in front of each part of the prefix
    for ids in between:
        texts.append(np.arange(len(text), len(text) + len(ids)))
        text += ids
    n_text = len(text) + sum(len(p.tail_ids) + len(p.answer_ids) for p in prompts)
    order: list[Any] = []
    places: list[Any] = []
    rows: list[tuple[int, int, int, int]] = []
    predict: list[Any] = []
    targets: list[int] = []
    answer_of: list[int] = []
    at = number = 0
    for clip, group in enumerate(groups):
        n_shared = sum(map(len, texts)) + int(valid[clip].sum())
        for own, part in zip(texts, parts, strict=True):
            tokens = np.flatnonzero(valid[clip, part]) + part.start
            order += [own, tokens + n_text + clip * n_prefix]
        places.append(np.arange(n_shared))
        start, first = at, at
        at += n_shared
        if len(group.questions) > 1:
            rows.append((start, at, start, start))
        for question in group.questions:
            tail, answer = question.prompt.tail_ids, question.prompt.answer_ids
            n = len(tail) + len(answer)
            order.append(np.arange(len(text), len(text) + n))
            places.append(np.arange(n_shared, n_shared + n))
            text += [*tail, *answer]
            if len(group.questions) > 1:
                rows.append((at, at + n, first, first + n_shared))
            else:
                rows.append((start, at + n, start, start))
            # The token at position i is predicted at position i - 1.
            predict.append(np.arange(at + len(tail) - 1, at + n - 1))
            targets += answer
            answer_of += [number] * len(answer)
            at, number = at + n, number + 1
    counts = np.bincount(answer_of, minlength=number) if targets else np.ones(number)
    by_answer = loss_average == "sample"
    return PrefixBatch(
        tokens=views.tokens,
        masks=masks,
        text_ids=torch.tensor(text),
        order=torch.from_numpy(np.concatenate(order)),
        position_ids=torch.from_numpy(np.concatenate(places)),
        segments=Segments(tuple(rows)),
        predict=torch.from_numpy(np.concatenate(predict)),
        targets=torch.tensor(targets, dtype=torch.long),
        weights=torch.tensor(
            [1 / counts[i] if by_answer else 1.0 for i in answer_of], dtype=torch.float32
        ),
        answer_of=torch.tensor(answer_of, dtype=torch.long),
        uids=tuple(group.record.uid for group in groups for _ in group.questions),
        tasks=tuple(q.task for group in groups for q in group.questions),
    )
