"""The assembled model: fusion, modal adapters and LoRA around a frozen language model.

::

    audio (C, T, Da) -----+-------------------> adapter --> audio block ---+
    video (C, T, Dv) ---+-|-------------------> adapter --> video block --+|
    image (C, I, Di) ---|-|-------------------> adapter --> image block -+||
    image_cls (C, Dc) --+-+-> pre-fusion -----> adapter --> fusion block||||
                                                                        vvvv
    BOS, head ------------------------------------------> [head | prefix | tail | answer | EOS] ...
                                                                          |
                             frozen LLM + LoRA, packed or padded ---------+--> loss on the answers
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from train.adapters import ModalAdapters
from train.attention import PACKED, Segments, attention_of
from train.backbone import decoder_layers, load_llm, load_tokenizer, with_lora
from train.config import ExecutionConfig, Preset
from train.fusion import make_fusion


class EmotionLlama(nn.Module):
    """Prefix tokens in front of a chat model."""

    def __init__(self, preset: Preset, llm: Any) -> None:
        """Assemble the trainable parts around a language model.

        Args:
            preset: Shapes of the views, the fusion and LoRA.
            llm: A transformers causal language model; it is frozen and wrapped by peft.

        Raises:
            SchemaError: LoRA names a layer that the model does not have.
        """
        super().__init__()
        self.layout = preset.layout()
        view_widths: dict[str, int] = {s: shape[1] for s, shape in preset.view_shapes().items()}
        llm_width = llm.get_input_embeddings().embedding_dim
        self.fusion = make_fusion(
            preset.model.fusion,
            view_widths["audio"],
            preset.tokens.image.encoder.width,
            view_widths["video"],
        )
        fusion_width = {} if self.fusion is None else {"fusion": preset.model.fusion.out_width}
        self.adapters = ModalAdapters({**fusion_width, **view_widths}, llm_width)
        self.llm = with_lora(llm, preset.model.lora)
        dtype = getattr(torch, preset.model.llm.dtype)
        self._half: torch.dtype | None = None if dtype == torch.float32 else dtype
        self._own_attention: str = self.llm.get_base_model().config._attn_implementation
        self.set_execution(ExecutionConfig())

    def set_execution(self, execution: ExecutionConfig) -> None:
        """Choose how the language model is computed; no number depends on it but by rounding.

        Raises:
            SchemaError: The model's blocks cannot be found, to compile them.
        """
        base = self.llm.get_base_model()
        self._padded = execution.attention == "padded"
        # Not for the forward pass alone: recomputed activations are computed in the backward pass.
        base.config._attn_implementation = self._own_attention if self._padded else PACKED
        if execution.checkpoint_activations:
            # transformers renamed it in 5.2x.
            new = "activation_checkpointing_enable"
            name = new if hasattr(base, new) else "gradient_checkpointing_enable"
            getattr(base, name)({"use_reentrant": False})
        if execution.compile:
            for layer in decoder_layers(base):
                layer.compile(dynamic=True)

    def trainable(self) -> dict[str, int]:
        """Number of trainable parameters by component."""
        groups: dict[str, nn.Module] = {} if self.fusion is None else {"fusion": self.fusion}
        groups |= {f"adapter.{name}": m for name, m in self.adapters.maps.items()}
        groups["lora"] = self.llm
        return {
            name: sum(p.numel() for p in module.parameters() if p.requires_grad)
            for name, module in groups.items()
        }

    def prefix(self, tokens: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        """Return the prefix embeddings (C, P, H), masked tokens included."""
        blocks = dict(tokens)
        if self.fusion is not None:
            blocks["fusion"], _ = self.fusion(
                tokens["audio"],
                tokens["image_cls"],
                tokens["video"],
                masks["audio"],
                masks["image"].any(dim=1),
                masks["video"],
            )
        embeddings = [self.adapters(name, blocks[name]) for name in self.layout.names]
        return torch.cat(embeddings, dim=1)

    def embed(
        self, tokens: dict[str, Tensor], masks: dict[str, Tensor], text_ids: Tensor, order: Tensor
    ) -> Tensor:
        """Return the embeddings of a batch's positions, (N, H) in the LLM's dtype."""
        text = self.llm.get_input_embeddings()(text_ids)
        prefix = self.prefix(tokens, masks).to(text.dtype)
        return torch.cat([text, prefix.flatten(0, 1)])[order]

    def forward(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        text_ids: Tensor,
        order: Tensor,
        position_ids: Tensor,
        segments: Segments,
        predict: Tensor,
        targets: Tensor,
        weights: Tensor,
        answer_of: Tensor,
        n_answers: int,
    ) -> dict[str, Tensor]:
        """Compute the loss of a batch; see `PrefixBatch` for the arguments.

        Returns:
            `loss_sum`: weighted sum of the cross entropies, nats. `answer_loss`: (A,) their mean over
            each answer's tokens. `answer_correct`: (A,) share of its tokens that are the likeliest.
        """
        with self._precision(order.device):
            embeddings = self.embed(tokens, masks, text_ids, order)
            logits = self._logits(embeddings, position_ids, segments, predict)
        if self._half is not None:
            logits = logits.float()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        with torch.no_grad():
            zero = losses.new_zeros(n_answers)
            counts = zero.index_add(0, answer_of, torch.ones_like(losses)).clamp(min=1)
            correct = (logits.argmax(dim=-1) == targets).to(losses.dtype)
            answer_loss = zero.index_add(0, answer_of, losses.detach()) / counts
            answer_correct = zero.index_add(0, answer_of, correct) / counts
        return {
            "loss_sum": (losses * weights).sum(),
            "answer_loss": answer_loss,
            "answer_correct": answer_correct,
        }

    def _precision(self, device: torch.device) -> Any:
        """Return the context in which half-precision models compute: trained weights stay float32."""
        if self._half is None:
            return nullcontext()
        return torch.autocast(device.type, self._half)

    def _logits(
        self, embeddings: Tensor, position_ids: Tensor, segments: Segments, predict: Tensor
    ) -> Tensor:
        """Return the logits (K, vocabulary) behind the positions `predict`."""
        if self._padded:
            return self._logits_by_rows(embeddings, position_ids, segments, predict)
        output: Any = self.llm(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=position_ids.unsqueeze(0),
            use_cache=False,
            logits_to_keep=predict,
            segments=segments,
        )
        return cast(Tensor, output.logits[0])

    def _logits_by_rows(
        self, embeddings: Tensor, position_ids: Tensor, segments: Segments, predict: Tensor
    ) -> Tensor:
        """The same, each question in a row of its own with the prefix before it."""
        rows = question_rows(segments)
        index, mask = pad_rows(rows, left=False)
        index, mask = index.to(embeddings.device), mask.to(embeddings.device)
        row_of = torch.zeros(len(embeddings), dtype=torch.long)
        column_of = torch.zeros(len(embeddings), dtype=torch.long)
        for number, places in enumerate(rows):
            # Of the shared prefix, which is in several rows, nothing is predicted.
            row_of[places], column_of[places] = number, torch.arange(len(places))
        at = predict.cpu()
        rows_of, columns = row_of[at].to(predict.device), column_of[at].to(predict.device)
        first = int(column_of[at].min())
        output: Any = self.llm(
            inputs_embeds=embeddings[index],
            attention_mask=mask.long(),
            position_ids=position_ids[index],
            use_cache=False,
            logits_to_keep=index.shape[1] - first,
        )
        return cast(Tensor, output.logits[rows_of, columns - first])

    @torch.inference_mode()
    def reply(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        text_ids: Tensor,
        order: Tensor,
        segments: Segments,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
    ) -> list[list[int]]:
        """Answer the questions of a batch greedily.

        Args:
            tokens: See `PrefixBatch`.
            masks: See `PrefixBatch`.
            text_ids: See `PrefixBatch`; without answers.
            order: See `PrefixBatch`.
            segments: See `PrefixBatch`.
            max_new_tokens: Longest reply.
            stop_ids: Each ends a reply.

        Returns:
            The ids of each reply, without the one that ends it.
        """
        base = self.llm.get_base_model()
        with self._precision(order.device), attention_of(base, self._own_attention):
            embeddings = self.embed(tokens, masks, text_ids, order)
            # Generation continues at the right end, so padding stands at the left.
            index, mask = pad_rows(question_rows(segments), left=True)
            llm: Any = self.llm
            generated = llm.generate(
                inputs_embeds=embeddings[index.to(order.device)],
                attention_mask=mask.long().to(order.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=list(stop_ids),
                pad_token_id=next(iter(stop_ids)),
            )
        replies = []
        for ids in generated.tolist():
            end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
            replies.append(ids[:end])
        return cast(list[list[int]], replies)


def question_rows(segments: Segments) -> list[Tensor]:
    """Return the positions of each question's whole sequence: its prefix, then its own."""
    shared = {(first, stop) for _, _, first, stop in segments.rows if stop > first}
    return [
        torch.cat([torch.arange(first, stop), torch.arange(start, end)])
        for start, end, first, stop in segments.rows
        if (start, end) not in shared
    ]


def pad_rows(rows: list[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
    """Return rows of unequal length as (R, L) int64, padded with 0, and their mask (R, L) bool."""
    side = "left" if left else "right"
    index = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
    ones = [torch.ones(len(row), dtype=torch.bool) for row in rows]
    return index, nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)


def build(preset: Preset) -> tuple[EmotionLlama, Any]:
    """Return the model with freshly initialised trainable parts, and its tokenizer."""
    torch.manual_seed(preset.seed)
    tokenizer = load_tokenizer(preset.model.llm)
    return EmotionLlama(preset, load_llm(preset.model.llm)), tokenizer
