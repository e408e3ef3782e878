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

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import Any, cast

import torch
from torch import Tensor, nn

from train.adapters import ModalAdapters
from train.config import ExecutionConfig, Preset
from train.fusion import make_fusion
from train.llm.attention import PACKED, Segments, UnpackableError, attention_of
from train.llm.backbone import decoder_layers, load_llm, load_tokenizer, with_lora
from train.llm.decoding import Answer, Prompts, greedy, shares_of
from train.llm.padded import GrowingReply, likelihoods_by_rows, pad_rows, replies_by_rows


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
        view_widths: dict[str, int] = {name: s[1] for name, s in preset.view_shapes().items()}
        image = preset.tokens.image
        cls_width = {} if image is None else {"cls": image.encoder.width}
        llm_width = llm.get_input_embeddings().embedding_dim
        self.fusion = make_fusion(
            preset.model.fusion,
            view_widths.get("audio"),
            cls_width.get("cls"),
            view_widths.get("video"),
        )
        widths = {"fusion": preset.model.fusion.out_width, **view_widths, **cls_width}
        self.adapters = ModalAdapters(
            {name: width for name, width in widths.items() if name in self.layout.names}, llm_width
        )
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
        if "image_cls" in tokens:
            blocks["cls"] = tokens["image_cls"].unsqueeze(1)
        if self.fusion is not None:
            blocks["fusion"], _ = self.fusion(
                tokens.get("audio"),
                tokens.get("image_cls"),
                tokens.get("video"),
                masks.get("audio"),
                masks["image"].any(dim=1) if "image" in masks else None,
                masks.get("video"),
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
        rows = segments.questions
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
        found = self.answer(
            tokens,
            masks,
            text_ids,
            order,
            segments,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
        )
        return [answer.ids for answer in found]

    def label_likelihoods(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        text_ids: Tensor,
        order: Tensor,
        segments: Segments,
        *,
        candidates: Sequence[Sequence[Sequence[int]]],
    ) -> list[list[float]]:
        """Compare the offered answers to each question of a batch by their likelihood.

        Args:
            tokens: See `PrefixBatch`; also of the next four, as in `reply`.
            masks: See there.
            text_ids: See there.
            order: See there.
            segments: See there.
            candidates: Of each question what it may be answered, each with its end; see
                `Renderer.candidates`.

        Returns:
            Of each question the candidates' probabilities, which sum to 1: the softmax of their
            log-likelihoods, each the sum over all tokens, so that long candidates are not favoured.
        """
        found = self.answer(
            tokens, masks, text_ids, order, segments, max_new_tokens=0, candidates=candidates
        )
        return [answer.likelihoods or [] for answer in found]

    @torch.inference_mode()
    def answer(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        text_ids: Tensor,
        order: Tensor,
        segments: Segments,
        *,
        max_new_tokens: int | Sequence[int],
        stop_ids: Collection[int] = (),
        candidates: Sequence[Sequence[Sequence[int]]] = (),
    ) -> list[Answer]:
        """Do what `reply` and `label_likelihoods` do, with each prompt computed once for both.

        Args:
            tokens: See `PrefixBatch`; also of the next four, as in `reply`.
            masks: See there.
            text_ids: See there.
            order: See there.
            segments: See there.
            max_new_tokens: Longest reply, of all questions or of each; 0 asks for none.
            stop_ids: Each ends a reply.
            candidates: Of each question; an empty list asks for no likelihoods. None given: of no question.
        """
        n = len(segments.questions)
        limits = [max_new_tokens] * n if isinstance(max_new_tokens, int) else list(max_new_tokens)
        offered = list(candidates) or [()] * n
        with self._precision(order.device):
            embeddings = self.embed(tokens, masks, text_ids, order)
            scores, replies = self._answers(embeddings, segments, limits, stop_ids, offered)
        return [
            Answer(ids, shares_of(own) if own else None)
            for ids, own in zip(replies, scores, strict=True)
        ]

    def _answers(
        self,
        embeddings: Tensor,
        segments: Segments,
        limits: Sequence[int],
        stop_ids: Collection[int],
        offered: Sequence[Sequence[Sequence[int]]],
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Return the log-likelihoods of what is offered to each question, and the replies."""
        base = self.llm.get_base_model()
        scores: list[list[float]] = [[] for _ in limits]
        if not self._padded:
            n_scored = max(sum(len(ids) - 1 for ids in own) for own in offered)
            with suppress(UnpackableError):
                prompts = Prompts(base, embeddings, segments, max(n_scored, *limits))
                if any(offered):
                    scores = prompts.log_likelihoods(offered)
                return scores, greedy(prompts, limits, stop_ids)
        with attention_of(base, self._own_attention):
            if any(offered):
                scores = likelihoods_by_rows(base, embeddings, segments, offered)
            return scores, replies_by_rows(base, embeddings, segments, limits, stop_ids)

    def stream(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        text_ids: Tensor,
        order: Tensor,
        segments: Segments,
        *,
        max_new_tokens: int,
        stop_ids: Collection[int],
    ) -> Iterator[int]:
        """Answer one question greedily; the ids are those of `reply`, each as soon as it is known.

        Args:
            tokens: See `PrefixBatch`; also of the next four, as in `reply`, of a single question.
            masks: See there.
            text_ids: See there.
            order: See there.
            segments: See there.
            max_new_tokens: Longest reply.
            stop_ids: Each ends the reply.

        Yields:
            The ids of the reply, without the one that ends it.
        """
        base = self.llm.get_base_model()
        # Nothing that this thread computes between two tokens may be affected: no context stays open.
        with torch.inference_mode(), self._precision(order.device):
            embeddings = self.embed(tokens, masks, text_ids, order)
            saying: Prompts | GrowingReply | None = None
            if not self._padded:
                with suppress(UnpackableError):
                    saying = Prompts(base, embeddings, segments, max_new_tokens)
            if saying is None:
                with attention_of(base, self._own_attention):
                    saying = GrowingReply(base, embeddings, segments)
        for number in range(max_new_tokens):
            token = int(saying.logits.argmax())
            if token in stop_ids:
                return
            yield token
            if number + 1 < max_new_tokens:
                with (
                    torch.inference_mode(),
                    self._precision(order.device),
                    attention_of(base, self._own_attention),
                ):
                    saying.say([token], [0])


def build(preset: Preset) -> tuple[EmotionLlama, Any]:
    """Return the model with freshly initialised trainable parts, and its tokenizer."""
    torch.manual_seed(preset.seed)
    tokenizer = load_tokenizer(preset.model.llm)
    return EmotionLlama(preset, load_llm(preset.model.llm)), tokenizer
