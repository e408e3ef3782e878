"""Greedy answers, exact and fast: prompts computed packed, keys and values kept where they are written.

::

    pack   BOS head | prefix 0 | tail | tail | BOS head | prefix 1 | tail      each position once
                 |                 |      |                        |
                 v                 v      v                        v
    rows   [.. head prefix 0 tail] [head prefix 0 tail] [. head prefix 1 tail]  + room for the reply

The prompts of a batch are one packed forward pass without padding, in which a clip's prefix is computed
once for all its questions. Its keys and values go into one row per question, of buffers that have
room for the whole reply: a step writes one position and copies nothing. Rows end at the same column,
so that all write to the same one. A row whose reply ended gives its place to the last one, so that no
step computes what nobody reads.

The same rows score offered labels: all labels of a question are one more pass behind its prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, Cache

from train.llm.attention import PACKED, Segments, UnpackableError, attention_of

ROWS = "emocache_rows"
"""Name of this attention among those of transformers."""
_SCORED_AT_ONCE = 512
"""Positions of candidates in one pass: each has logits over the whole vocabulary."""
PREFILLED_AT_ONCE = 2048
"""Positions of prompts in one pass, at the borders of clips: more are computed slower on a CPU, see
docs/evaluation_speed.md."""


@dataclass(frozen=True)
class Answer:
    """What was found about one question."""

    ids: list[int]
    """Of the reply, without the one that ended it."""
    likelihoods: list[float] | None = None
    """Of each candidate, among all; they sum to 1. None: no candidates were given."""


def row_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visible: Tensor | None = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend from new positions to kept rows and the new positions; transformers' attention interface.

    Args:
        module: The calling layer.
        query: (R, heads, M, channels).
        key: (R, key heads, K, channels), the new ones last.
        value: Like `key`.
        attention_mask: Not used; `visible` says all.
        visible: (R, 1, M, K) bool, which keys each query sees; None: all.
        scaling: Of the products; None is 1 / sqrt(channels).
        others: What else a model's layers pass on, for example `sliding_window`.

    Returns:
        (R, M, heads, channels), and no weights.

    Raises:
        UnpackableError: The model sees a window that several new positions at once may leave.
    """
    window = others.get("sliding_window")
    n_rows, n_heads, n_new, width = query.shape
    if window is not None and key.shape[2] > window:
        if n_new > 1:
            raise UnpackableError(
                f"this language model's attention sees {window} positions only, fewer than a prompt with "
                "its labels. Set execution.attention=padded."
            )
        # Columns of a row follow one another, and the query stands at the last.
        key, value = key[:, :, -window:], value[:, :, -window:]
        visible = None if visible is None else visible[..., -window:]
    n_groups = n_heads // key.shape[1]
    if n_groups > 1:
        # Heads that share keys become queries side by side, so that keys are read once.
        query = query.reshape(n_rows, key.shape[1], n_groups * n_new, width)
        if visible is not None and n_new > 1:
            visible = visible.repeat(1, 1, n_groups, 1)
    found = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling)
    return found.reshape(n_rows, n_heads, n_new, -1).transpose(1, 2), None


_uncompiled: Any = torch.compiler.disable
AttentionInterface.register(ROWS, _uncompiled(row_attention))


class RowCache(Cache):
    """Keys and values of R rows in buffers that never move: prompts at the left, replies behind.

    All prompts end at one column, so shorter ones begin later. While packs are computed (`fill`) their keys
    are put into the rows; afterwards all rows grow by the same columns.
    """

    def __init__(self, questions: Sequence[Tensor], n_more: int, device: torch.device) -> None:
        """Plan the rows; memory is taken as each layer's first keys come.

        Args:
            questions: Places (L,) int64 of each row's positions in the pack.
            n_more: Columns behind the prompts.
            device: Of the model.
        """
        super().__init__(layers=[])
        self.lengths = [len(places) for places in questions]
        """Positions of the prompt of each row that is kept."""
        self.n_prompt = max(self.lengths)
        """Columns of the longest prompt."""
        self.n_said = 0
        """Columns of the replies so far."""
        self._n_columns = self.n_prompt + n_more
        shifted = [pad(places, (self.n_prompt - len(places), 0)) for places in questions]
        self._places = torch.stack(shifted).to(device)
        begins = self.n_prompt - torch.tensor(self.lengths, device=device)
        self._valid = torch.arange(self._n_columns, device=device) >= begins.unsqueeze(1)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._rows = self._columns = self._new = slice(0, 0)
        self._pack: tuple[slice, Tensor] | None = None

    def fill(self, rows: slice, first: int) -> None:
        """Prepare a pass that computes prompts.

        Args:
            rows: Whose prompts are in it.
            first: Place of its first position among all.
        """
        self._pack = rows, (self._places[rows] - first).clamp(min=0)

    def open(self, n_new: int, rows: slice | None = None) -> Tensor | None:
        """Prepare the next pass, which computes new columns of some rows, or of all that are kept.

        Returns:
            Which columns each of the rows may see, (R, 1, 1, K) bool, the new ones last; None: all.
        """
        self._pack = None
        self._rows = slice(0, len(self.lengths)) if rows is None else rows
        lengths = self.lengths[self._rows]
        end = self.n_prompt + self.n_said + n_new
        self._columns, self._new = slice(self.n_prompt - max(lengths), end), slice(end - n_new, end)
        if min(lengths) == max(lengths):
            return None
        return self._valid[self._rows, None, None, self._columns]

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Keep some rows only; the places of those that go are filled from behind.

        Args:
            rows: In ascending order.

        Returns:
            Which of the old rows stands at each place now.
        """
        order = list(range(len(rows)))
        free = sorted(set(order) - set(rows))
        for place, row in zip(free, rows[len(rows) - len(free) :], strict=True):
            used = slice(self.n_prompt - self.lengths[row], self.n_prompt + self.n_said)
            for buffer in (*self._keys, *self._values):
                buffer[place, :, used] = buffer[row, :, used]
            self._valid[place] = self._valid[row]
            order[place] = row
        self.lengths = [self.lengths[row] for row in order]
        return order

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values; return what its queries attend to."""
        if self._pack is not None:
            for buffers, packed in ((self._keys, key_states), (self._values, value_states)):
                if layer_idx == len(buffers):
                    _, n_heads, _, width = packed.shape
                    shape = len(self._places), n_heads, self._n_columns, width
                    buffers.append(packed.new_empty(shape))
                rows, places = self._pack
                buffers[layer_idx][rows, :, : self.n_prompt] = packed[0][:, places].transpose(0, 1)
            return key_states, value_states
        keys, values = self._keys[layer_idx][self._rows], self._values[layer_idx][self._rows]
        keys[:, :, self._new], values[:, :, self._new] = key_states, value_states
        return keys[:, :, self._columns], values[:, :, self._columns]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns in use; no position is counted from them."""
        return self.n_prompt + self.n_said


class Prompts:
    """The questions of a batch, computed up to where their replies begin."""

    def __init__(self, llm: Any, embeddings: Tensor, segments: Segments, n_more: int) -> None:
        """Compute the prompts.

        Args:
            llm: A transformers causal language model.
            embeddings: (N, H), of the pack's positions.
            segments: Which see which.
            n_more: Longest reply, or the most positions of a question's candidates together.

        Raises:
            UnpackableError: The model cannot compute packed sequences of this length.
        """
        self._llm, self._device = llm, embeddings.device
        self._cache = RowCache(segments.questions, n_more, self._device)
        position_ids = torch.zeros(len(embeddings), dtype=torch.long)
        for places in segments.questions:
            position_ids[places] = torch.arange(len(places))
        position_ids = position_ids.to(self._device).unsqueeze(0)
        ends = torch.stack([places[-1] for places in segments.questions]).to(self._device)
        logits = []
        with attention_of(llm, PACKED):
            for rows, (start, end), own in parts_of(segments, PREFILLED_AT_ONCE):
                self._cache.fill(rows, start)
                output = llm(
                    inputs_embeds=embeddings[start:end].unsqueeze(0),
                    position_ids=position_ids[:, start:end],
                    past_key_values=self._cache,
                    use_cache=True,
                    logits_to_keep=ends[rows] - start,
                    segments=own,
                )
                logits.append(output.logits[0])
        self.logits: Tensor = torch.cat(logits)
        """(R, vocabulary): what may follow the last token of each row."""

    def say(self, ids: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Add a token to some rows, and forget the others.

        Args:
            ids: A token for each of the rows.
            rows: In ascending order.

        Returns:
            Which of the old rows stands at each place now.
        """
        cache = self._cache
        order = cache.keep(rows)
        token_of = dict(zip(rows, ids, strict=True))
        input_ids = torch.tensor([[token_of[row]] for row in order])
        position_ids = torch.tensor([[n + cache.n_said] for n in cache.lengths])
        self.logits = self._forward(input_ids, position_ids, cache.open(1))[:, -1]
        cache.n_said += 1
        return order

    def log_likelihoods(self, candidates: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """Return the log-likelihood of each candidate behind its prompt, in nats; before any `say`.

        Args:
            candidates: Of each row any number of token sequences, each with its end.

        Raises:
            UnpackableError: A window that is shorter than a prompt with its candidates.
        """
        first = log_softmax(self.logits).cpu()
        found = [[float(first[row, c[0]]) for c in own] for row, own in enumerate(candidates)]
        n_new = max((sum(len(c) - 1 for c in own) for own in candidates), default=0)
        if n_new:
            n_rows = max(1, _SCORED_AT_ONCE // n_new)
            for start in range(0, len(candidates), n_rows):
                part = slice(start, min(start + n_rows, len(candidates)))
                if any(len(c) > 1 for own in candidates[part] for c in own):
                    self._add_behind(part, candidates[part], n_new, found[part])
        return found

    def _add_behind(
        self,
        rows: slice,
        candidates: Sequence[Sequence[Sequence[int]]],
        n_new: int,
        found: Sequence[list[float]],
    ) -> None:
        """Add the log-likelihoods of all tokens of candidates but the first ones.

        A row's candidates lie end to end; each sees the prompt and itself.
        """
        shape = len(candidates), n_new
        input_ids = torch.zeros(shape, dtype=torch.long)
        position_ids = torch.zeros(shape, dtype=torch.long)
        owner = torch.full(shape, -1)
        asked: list[tuple[int, int, int, int]] = []  # row, candidate, column, token that follows
        for row, own in enumerate(candidates):
            at = 0
            for number, ids in enumerate(own):
                stop = at + len(ids) - 1
                input_ids[row, at:stop] = torch.tensor(ids[:-1])
                begin = self._cache.lengths[rows.start + row]
                position_ids[row, at:stop] = torch.arange(begin, begin + stop - at)
                owner[row, at:stop] = number
                asked += ((row, number, at + i, token) for i, token in enumerate(ids[1:]))
                at = stop
        visible = self._cache.open(n_new, rows)
        itself = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril().unsqueeze(1).to(self._device)
        if visible is None:
            n_before = self._cache.lengths[rows.start]
            visible = itself.new_ones(shape[0], 1, 1, n_before + n_new)
        seen = torch.cat([visible[..., :-n_new].expand(-1, -1, n_new, -1), itself], dim=-1)
        scores = log_softmax(self._forward(input_ids, position_ids, seen))
        row_of, number_of, columns, tokens = zip(*asked, strict=True)
        terms = scores[list(row_of), list(columns), list(tokens)].tolist()
        for row, number, term in zip(row_of, number_of, terms, strict=True):
            found[row][number] += term

    def _forward(self, input_ids: Tensor, position_ids: Tensor, visible: Tensor | None) -> Tensor:
        with attention_of(self._llm, ROWS):
            output = self._llm(
                input_ids=input_ids.to(self._device),
                position_ids=position_ids.to(self._device),
                past_key_values=self._cache,
                use_cache=True,
                visible=visible,
            )
        return cast(Tensor, output.logits)


def parts_of(
    segments: Segments, n_at_once: int
) -> Iterator[tuple[slice, tuple[int, int], Segments]]:
    """Take a batch apart at the borders of clips.

    Args:
        segments: Of the batch.
        n_at_once: Positions that a part has at the most, unless a single clip has more.

    Yields:
        Which questions are in a part, its first position and its end, and its segments.
    """
    clips: list[list[tuple[int, int, int, int]]] = []
    for row in segments.rows:
        start, _, first, stop = row
        if stop > first and first < start:
            clips[-1].append(row)  # behind a shared prefix
        else:
            clips.append([row])
    part: list[tuple[int, int, int, int]] = []
    n_questions = 0
    for number, clip in enumerate(clips):
        part += clip
        n_next = clips[number + 1][-1][1] if number + 1 < len(clips) else 0
        at = part[0][0]
        if n_next and n_next - at <= n_at_once:
            continue
        own = Segments(tuple((a - at, b - at, c - at, d - at) for a, b, c, d in part))
        rows = slice(n_questions, n_questions + len(own.questions))
        yield rows, (at, part[-1][1]), own
        n_questions, part = rows.stop, []


def greedy(prompts: Prompts, limits: Sequence[int], stop_ids: Collection[int]) -> list[list[int]]:
    """Answer all questions, each by its likeliest next token, until it ends.

    Args:
        prompts: R questions.
        limits: Longest reply of each; 0 asks for none.
        stop_ids: Each ends a reply.

    Returns:
        The ids of each reply, without the one that ends it.
    """
    stops = frozenset(stop_ids)
    replies: list[list[int]] = [[] for _ in limits]
    asked = list(range(len(limits)))
    while True:
        ids = prompts.logits.argmax(dim=-1).tolist()
        rows = []
        for row, (number, token) in enumerate(zip(asked, ids, strict=True)):
            reply = replies[number]
            if token not in stops and len(reply) < limits[number]:
                reply.append(token)
                if len(reply) < limits[number]:
                    rows.append(row)
        if not rows:
            return replies
        order = prompts.say([ids[row] for row in rows], rows)
        asked = [asked[row] for row in order]


def log_softmax(logits: Tensor) -> Tensor:
    """Return log-probabilities over the last axis, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def shares_of(log_likelihoods: Sequence[float]) -> list[float]:
    """Return probabilities among some candidates, which sum to 1."""
    found: list[float] = torch.tensor(log_likelihoods, dtype=torch.float64).softmax(0).tolist()
    return found
