"""What `train.llm.decoding` does, for language models that cannot compute packed sequences: by transformers.

Rows are padded, and each question has the whole prefix of its clip in front of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from train.llm.attention import Segments
from train.llm.decoding import log_softmax


def pad_rows(rows: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return rows of unequal length as (R, L) int64, padded with 0, and their mask (R, L) bool."""
    side = "left" if left else "right"
    index = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return index, nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def replies_by_rows(
    llm: Any,
    embeddings: Tensor,
    segments: Segments,
    limits: Sequence[int],
    stop_ids: Collection[int],
) -> list[list[int]]:
    """Answer greedily by transformers' own generation; see `train.llm.decoding.greedy`."""
    if not any(limits):
        return [[] for _ in limits]
    # Generation continues at the right end, so padding stands at the left.
    index, mask = pad_rows(segments.questions, left=True)
    generated = llm.generate(
        inputs_embeds=embeddings[index.to(embeddings.device)],
        attention_mask=mask.long().to(embeddings.device),
        max_new_tokens=max(limits),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # some models' own settings have one, even for the likeliest token
        eos_token_id=list(stop_ids),
        pad_token_id=next(iter(stop_ids)),
    )
    replies = []
    for ids, limit in zip(generated.tolist(), limits, strict=True):
        end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
        replies.append(ids[: min(end, limit)])
    return replies


def likelihoods_by_rows(
    llm: Any,
    embeddings: Tensor,
    segments: Segments,
    candidates: Sequence[Sequence[Sequence[int]]],
) -> list[list[float]]:
    """Return log-likelihoods, each candidate in a row of its own; see `Prompts.log_likelihoods`."""
    found = []
    table = llm.get_input_embeddings()
    for places, own in zip(segments.questions, candidates, strict=True):
        of_row = []
        for ids in own:
            behind = torch.tensor(ids, device=embeddings.device)
            row = torch.cat([embeddings[places.to(embeddings.device)], table(behind[:-1])])
            output = llm(inputs_embeds=row[None], use_cache=False, logits_to_keep=len(ids))
            scores = log_softmax(output.logits[0])
            of_row.append(float(scores.gather(1, behind.unsqueeze(1)).sum()))
        found.append(of_row)
    return found


class GrowingReply:
    """One question, answered token by token; as `Prompts` of one row."""

    def __init__(self, llm: Any, embeddings: Tensor, segments: Segments) -> None:
        """Compute the prompt."""
        (places,) = segments.questions
        self._llm = llm
        row = embeddings[places.to(embeddings.device)].unsqueeze(0)
        self._keep(llm(inputs_embeds=row, use_cache=True, logits_to_keep=1))

    def say(self, ids: Sequence[int], rows: Sequence[int]) -> list[int]:
        """Add a token."""
        self._keep(
            self._llm(
                input_ids=torch.tensor([list(ids)], device=self.logits.device),
                past_key_values=self._past,
                use_cache=True,
            )
        )
        return [0]

    def _keep(self, output: Any) -> None:
        self.logits: Tensor = output.logits[:, -1]
        self._past = output.past_key_values
