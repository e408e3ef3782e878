"""The assembled model: fusion, modal adapters and LoRA around a frozen language model.

::

    audio (B, T, Da) -----+-------------------> adapter --> audio block ---+
    video (B, T, Dv) ---+-|-------------------> adapter --> video block --+|
    image (B, I, Di) ---|-|-------------------> adapter --> image block -+||
    image_cls (B, Dc) --+-+-> Conv-Attention -> adapter --> fusion block||||
                                                                        vvvv
    BOS, head ------------------------------------------> [head | prefix | tail | answer | EOS]
                                                                          |
                                                   frozen LLM + LoRA -----+--> loss on the answer
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cache.errors import CheckpointError
from train.adapters import ModalAdapters
from train.config import LlmConfig, Preset
from train.data import IGNORE
from train.fusion import ConvAttention

TINY_LLM = "emocache/tiny"
"""Name of the bundled language model."""


class EmotionLlama(nn.Module):
    """Prefix tokens in front of a chat model."""

    def __init__(self, preset: Preset, llm: Any) -> None:
        """Assemble the trainable parts around a language model.

        Args:
            preset: Shapes of the views, the fusion and LoRA.
            llm: A transformers causal language model; it is frozen and wrapped by peft.
        """
        super().__init__()
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        self.layout = preset.layout()
        view_widths: dict[str, int] = {s: shape[1] for s, shape in preset.view_shapes().items()}
        llm_width = llm.get_input_embeddings().embedding_dim
        self.fusion = ConvAttention(
            preset.model.fusion,
            view_widths["audio"],
            preset.tokens.image.encoder.width,
            view_widths["video"],
        )
        self.adapters = ModalAdapters(
            {"fusion": preset.model.fusion.out_width, **view_widths}, llm_width
        )
        lora = preset.model.lora
        self.llm = get_peft_model(
            llm,
            PeftConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )

    def trainable(self) -> dict[str, int]:
        """Number of trainable parameters by component."""
        groups = {
            "fusion": self.fusion,
            **{f"adapter.{name}": m for name, m in self.adapters.maps.items()},
            "lora": self.llm,
        }
        return {
            name: sum(p.numel() for p in module.parameters() if p.requires_grad)
            for name, module in groups.items()
        }

    def prefix(self, tokens: dict[str, Tensor], masks: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the prefix embeddings (B, P, H) float32 and their mask (B, P)."""
        fused, fused_mask = self.fusion(
            tokens["audio"],
            tokens["image_cls"],
            tokens["video"],
            masks["audio"],
            masks["image"].any(dim=1),
            masks["video"],
        )
        blocks = {**tokens, "fusion": fused}
        block_masks = {**masks, "fusion": fused_mask}
        embeddings = [self.adapters(name, blocks[name]) for name in self.layout.names]
        return (
            torch.cat(embeddings, dim=1),
            torch.cat([block_masks[name] for name in self.layout.names], dim=1),
        )

    def embed(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        head_ids: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the sequence's embeddings (B, L, H) in the LLM's dtype and its mask (B, L)."""
        table = self.llm.get_input_embeddings()
        prefix, prefix_mask = self.prefix(tokens, masks)
        batch = len(prefix)
        head = table(head_ids).unsqueeze(0).expand(batch, -1, -1)
        sequence = torch.cat([head, prefix.to(head.dtype), table(text_ids)], dim=1)
        head_mask = torch.ones(batch, len(head_ids), dtype=torch.bool, device=head.device)
        return sequence, torch.cat([head_mask, prefix_mask, text_mask], dim=1)

    def forward(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        head_ids: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        labels: Tensor,
    ) -> dict[str, Tensor]:
        """Return `{"loss": mean cross entropy over the supervised positions}`; see `PrefixBatch`."""
        sequence, mask = self.embed(tokens, masks, head_ids, text_ids, text_mask)
        output: Any = self.llm(
            inputs_embeds=sequence,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            use_cache=False,
            # The token at place i is predicted at place i - 1: the last of the prefix, then the text.
            logits_to_keep=labels.shape[1] + 1,
        )
        logits = output.logits[:, :-1].float()
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE
        )
        return {"loss": loss}

    @torch.inference_mode()
    def reply(
        self,
        tokens: dict[str, Tensor],
        masks: dict[str, Tensor],
        head_ids: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        *,
        max_new_tokens: int,
        eos_token_id: int,
    ) -> list[list[int]]:
        """Continue a batch greedily.

        Args:
            tokens: See `PrefixBatch`.
            masks: See `PrefixBatch`.
            head_ids: See `PrefixBatch`.
            text_ids: The tails without answers.
            text_mask: See `PrefixBatch`.
            max_new_tokens: Longest reply.
            eos_token_id: Ends a reply.

        Returns:
            The ids of each reply, without EOS.
        """
        sequence, mask = self.embed(tokens, masks, head_ids, text_ids, text_mask)
        # Generation continues at the right end, so padding moves to the left.
        n_pad = text_mask.shape[1] - text_mask.sum(dim=1)
        place = torch.arange(sequence.shape[1], device=sequence.device)
        order = (place.unsqueeze(0) - n_pad.unsqueeze(1)) % sequence.shape[1]
        sequence = sequence.gather(1, order.unsqueeze(-1).expand_as(sequence))
        llm: Any = self.llm
        generated = llm.generate(
            inputs_embeds=sequence,
            attention_mask=mask.gather(1, order).long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
        )
        replies = []
        for ids in generated.tolist():
            replies.append(ids[: ids.index(eos_token_id)] if eos_token_id in ids else ids)
        return cast(list[list[int]], replies)


def positions(mask: Tensor) -> Tensor:
    """Return position ids (B, L): masked tokens take none, as in transformers' generation."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)


def llm_path(config: LlmConfig) -> str:
    """Return the folder or hub name to load, resolving the bundled model's name."""
    if config.path == TINY_LLM:
        return str(Path(__file__).parent / "tiny" / "llm")
    return config.path


def load_llm(config: LlmConfig) -> tuple[Any, Any]:
    """Load a frozen chat model and its tokenizer.

    Returns:
        The model and the tokenizer.

    Raises:
        CheckpointError: No such folder, not a causal language model, or damaged weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    quiet: Any = transformers_logging
    quiet.disable_progress_bar()
    path = llm_path(config)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        llm = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, config.dtype),
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"language model {config.path!r} cannot be loaded: {first[:300]} "
            "Give a folder with config.json, safetensors and a tokenizer: model.llm.path=FOLDER"
        ) from None
    return llm, tokenizer


def build(preset: Preset) -> tuple[EmotionLlama, Any]:
    """Return the model with freshly initialised trainable parts, and its tokenizer."""
    torch.manual_seed(preset.seed)
    llm, tokenizer = load_llm(preset.model.llm)
    return EmotionLlama(preset, llm), tokenizer
