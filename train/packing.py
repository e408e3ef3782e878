"""Samples to packs: which clips share a forward pass, decided before anything is read.

With a token budget, packs are filled exactly where samples in waiting allow it: the oldest sample
always goes first, so none waits for ever, and the rest of the budget is filled by the subset of the
others whose lengths come closest to it. The plan is a value: a place in the mixture and the places
in waiting; from it the same packs follow, in any process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field

from cache.clip import Record
from cache.errors import SchemaError
from cache.schema import Model
from cache.spec import STREAMS, Stream
from train.batches.reading import ViewReader
from train.config import OptimConfig, Preset
from train.data import Group, Renderer
from train.fusion import fused_mask
from train.mixture import Ask, Mixture, Sample
from train.text.tasks import TASK_TABLE

N_WAITING = 48
"""Samples among which a pack's filling is chosen."""

Pack = tuple[Group, ...]


class PlanState(Model):
    """Where a plan stands: all that is needed to go on with it."""

    next_place: int = Field(default=0, ge=0)
    """First place of the mixture that was never looked at."""
    waiting: tuple[int, ...] = ()
    """Places that were looked at and are not in a pack yet, oldest first."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step trains on, over all processes."""

    packs: tuple[Pack, ...]
    """Process r of n takes packs r, r + n, ..."""
    after: PlanState
    """The plan's state behind this step."""

    @property
    def n_answers(self) -> int:
        """Questions with their answers."""
        return sum(len(group.questions) for pack in self.packs for group in pack)

    @property
    def n_answer_tokens(self) -> int:
        """Supervised tokens."""
        return sum(group.n_answer_tokens for pack in self.packs for group in pack)

    @property
    def n_positions(self) -> int:
        """Positions that the language model computes."""
        return sum(group.n_positions for pack in self.packs for group in pack)


class Grouper:
    """Turns samples into groups: renders questions, counts valid prefix tokens."""

    def __init__(
        self, preset: Preset, reader: ViewReader, renderer: Renderer, max_positions: int | None
    ) -> None:
        """Group for one store and tokenizer.

        Args:
            preset: Layout and masks.
            reader: Knows what a clip lacks.
            renderer: Makes token ids.
            max_positions: The language model's context; None if it has no limit.
        """
        self._preset, self._reader, self._renderer = preset, reader, renderer
        self._max_positions = max_positions
        self._layout = preset.layout()

    def groups(self, sample: Sample, *, vary: bool = True) -> tuple[Group, ...]:
        """Return a sample as groups, one unless its questions may not see the same streams.

        Raises:
            SchemaError: A sequence is longer than the context.
        """
        by_hidden: dict[tuple[Stream, ...], list[Ask]] = {}
        for ask in sample.asks:
            by_hidden.setdefault(self._hidden(sample, ask), []).append(ask)
        return tuple(
            self.group(sample.record, asks, hidden, with_answer=True, vary=vary)
            for hidden, asks in by_hidden.items()
        )

    def group(
        self,
        record: Record,
        asks: Sequence[Ask],
        hidden: tuple[Stream, ...] = (),
        *,
        with_answer: bool,
        vary: bool = False,
    ) -> Group:
        """Return a record with questions that see the same streams.

        Raises:
            SchemaError: A sequence is longer than the context.
        """
        questions = tuple(
            self._renderer.question(record, ask, with_answer=with_answer, vary=vary) for ask in asks
        )
        group = Group(record, questions, hidden, self._n_prefix(record, hidden))
        if self._max_positions is not None and group.longest > self._max_positions:
            raise SchemaError(
                f"{record.uid}: a sequence of {group.longest} positions ({group.n_prefix} of the prefix) "
                f"is longer than the language model's context of {self._max_positions}. Lower "
                "prompt.max_answer_tokens or the views' token numbers, shorten its subtitle, or leave "
                "the record out."
            )
        return group

    def _hidden(self, sample: Sample, ask: Ask) -> tuple[Stream, ...]:
        """Return what a question may not see; modality dropout never hides the last stream."""
        by_task = TASK_TABLE[ask.task].hides
        left = {s for s in self._reader.streams_of(sample.record) if s not in by_task}
        dropped = [s for s in sample.hidden if s in left]
        if len(dropped) == len(left):
            dropped = dropped[1:]
        return tuple(s for s in STREAMS if s in by_task or s in dropped)

    def _n_prefix(self, record: Record, hidden: Sequence[str]) -> int:
        """Return how many prefix tokens are valid, as `train.data.prefix_masks` will find them."""
        if not self._preset.data.mask_missing:
            return self._layout.total
        n_valid = self._reader.n_valid(record)
        gone = self._preset.hidden_inputs(hidden)
        n: dict[str, int] = {name: 0 if name in gone else n for name, n in n_valid.items()}
        n["cls"] = int("image" in n and "image" not in gone and self._reader.has(record, "image"))
        n["fusion"] = dict(self._layout.blocks).get("fusion", 0)
        if n["fusion"] and not n["cls"] and not n.get("video"):
            # Only then may fusion tokens be masked, where short audio ends.
            n["fusion"] = fused_audio_only(self._preset, n.get("audio", 0))
        return sum(n[name] for name in self._layout.names)


def fused_audio_only(preset: Preset, n_audio: int) -> int:
    """Return the valid fusion tokens of a clip with `n_audio` valid audio tokens and nothing else."""
    shapes = preset.view_shapes()
    masks = {name: torch.arange(n).unsqueeze(0) < 0 for name, (n, _) in shapes.items()}
    if "audio" in masks:
        masks["audio"] = torch.arange(shapes["audio"][0]).unsqueeze(0) < n_audio
    context = torch.zeros(1, dtype=torch.bool) if "image" in masks else None
    found = fused_mask(preset.model.fusion, masks.get("audio"), context, masks.get("video"))
    return int(found.sum())


class Planner:
    """The steps of a stage, one after another."""

    def __init__(
        self,
        mixture: Mixture,
        grouper: Callable[[Sample], tuple[Group, ...]],
        optim: OptimConfig,
        n_processes: int = 1,
        state: PlanState | None = None,
    ) -> None:
        """Start, or go on, at a state.

        Args:
            mixture: Samples by place.
            grouper: Usually `Grouper.groups`.
            optim: Clips or positions per pack, packs per process and step.
            n_processes: Processes that share a step.
            state: Where to go on; None starts.
        """
        self._mixture, self._grouper, self._optim = mixture, grouper, optim
        self._n_packs = n_processes * optim.accumulate
        state = state or PlanState()
        self._next_place = state.next_place
        self._waiting = [(place, self._groups(place)) for place in state.waiting]

    def next_step(self) -> Step:
        """Return the next step.

        Raises:
            SchemaError: A sample that no pack can hold.
        """
        packs = tuple(self._next_pack() for _ in range(self._n_packs))
        waiting = tuple(place for place, _ in self._waiting)
        return Step(packs, PlanState(next_place=self._next_place, waiting=waiting))

    def _groups(self, place: int) -> tuple[Group, ...]:
        groups = self._grouper(self._mixture[place])
        size, limit = _size(groups), self._optim.max_tokens
        if limit is not None and size > limit:
            raise SchemaError(
                f"{groups[0].record.uid}: its sequences take {size} positions, more than a forward pass "
                f"may have. Raise stages.N.optim.max_tokens (now {limit}), or lower "
                "stages.N.pairs_per_clip."
            )
        return groups

    def _take(self) -> tuple[int, tuple[Group, ...]]:
        place = self._next_place
        groups = self._groups(place)
        self._next_place += 1
        return place, groups

    def _next_pack(self) -> Pack:
        limit = self._optim.max_tokens
        if limit is None:
            taken = [self._take() for _ in range(self._optim.batch_size)]
            return tuple(group for _, groups in taken for group in groups)
        while len(self._waiting) < N_WAITING:
            self._waiting.append(self._take())
        _, first = self._waiting.pop(0)
        sizes = [_size(groups) for _, groups in self._waiting]
        chosen = best_filling(sizes, limit - _size(first))
        groups = [*first, *(g for i in chosen for g in self._waiting[i][1])]
        self._waiting = [w for i, w in enumerate(self._waiting) if i not in set(chosen)]
        return tuple(groups)


def _size(groups: Sequence[Group]) -> int:
    return sum(group.n_positions for group in groups)


def best_filling(sizes: Sequence[int], room: int) -> list[int]:
    """Return which of the sizes together come closest to `room` without going over it.

    Exact, by the sums that can be reached, kept as the bits of one integer per item. Of equal
    fillings the one with the earliest items wins, so that what waits longest goes first.
    """
    reach = [1]
    cut = (1 << (room + 1)) - 1
    for size in sizes:
        reach.append((reach[-1] | (reach[-1] << size)) & cut)
    total = reach[-1].bit_length() - 1
    chosen = []
    for i in range(len(sizes) - 1, -1, -1):
        if not reach[i] >> total & 1:  # the sum needs this item: without it, it is out of reach
            chosen.append(i)
            total -= sizes[i]
    return chosen[::-1]
