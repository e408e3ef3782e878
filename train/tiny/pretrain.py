"""Train the tiny LLaMA-architecture chat model and its tokenizer, on text about a small world.

    python -m train.tiny.pretrain --out DIR [--seed 0]

The text is that of `train.tiny.world`, in the form of `train.prompt`; where a real prompt
has prefix tokens, these have cue words between filler words, and their embeddings are blurred,
scaled, dropped and made noisy, so that the frozen model later reads soft evidence from adapters.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from train.prompt import render
from train.tiny.world import (
    FILLER,
    Chat,
    draw_chat,
    plain_text,
)

logger = logging.getLogger(__name__)

VOCABULARY = 768
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"


@dataclass(frozen=True)
class Sample:
    """One training sequence as ids; the evidence lies in `[start, stop)`."""

    ids: tuple[int, ...]
    start: int
    stop: int
    answer_at: int
    """Position of the first fully supervised token."""


def train_tokenizer(out: Path, rng: random.Random) -> Any:
    """Train a byte-level BPE on the world's text, save it to `out` and load it from there."""

    def texts() -> Iterator[str]:
        for _ in range(3000):
            chat = draw_chat(rng)
            prompt = render(
                chat.task,
                chat.instruction,
                chat.options,
                subtitle=chat.subtitle,
                label=chat.label,
                description=chat.reasoning,
            )
            yield from (prompt.head, *chat.evidence, prompt.tail, prompt.answer or "")
            yield plain_text(rng)
        yield from (" ".join(FILLER) for _ in range(50))

    tokenizer = Tokenizer(models.BPE())
    # A blank before each segment, as LLaMA's own tokenizer sets: a label is the same token in the
    # list of options and as an answer.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[UNK, BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNK,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2048,
        },
    )
    return AutoTokenizer.from_pretrained(out)


class Sampler:
    """Draws samples as ids; pieces of text are tokenised once."""

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        self.tokenizer, self.rng = tokenizer, rng
        self.piece = cache(self._piece)

    def _piece(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def evidence(self, chat: Chat, n_tokens: int) -> list[int]:
        """Lay the cue pieces out at random places among filler, up to about `n_tokens`."""
        rng, pieces = self.rng, [self.piece(text) for text in chat.evidence]
        if rng.random() < 0.3:  # as the cues stand, without filler
            return [i for piece in pieces for i in piece]
        filler: list[tuple[int, ...]] = []
        missing = n_tokens - sum(map(len, pieces))
        noisy = rng.random() < 0.3
        while missing > 0:
            kind = rng.random()
            if kind < 0.15:
                extra = self.piece(rng.choice(chat.evidence))
            elif noisy:
                extra = (rng.randrange(4, len(self.tokenizer)),)
            else:
                extra = self.piece(rng.choice(FILLER))
            filler.append(extra)
            missing -= len(extra)
        ordered = list(pieces)
        for extra in filler:
            ordered.insert(rng.randint(0, len(ordered)), extra)
        return [i for piece in ordered for i in piece][:256]

    def chat(self, chat: Chat, n_tokens: int) -> Sample:
        """Return a chat as ids."""
        tokens = chat.tokens(self.tokenizer)
        evidence = self.evidence(chat, n_tokens)
        start = len(tokens.head_ids)
        stop = start + len(evidence)
        ids = (*tokens.head_ids, *evidence, *tokens.tail_ids, *tokens.answer_ids)
        return Sample(ids, start, stop, len(ids) - len(tokens.answer_ids))

    def draw(self) -> Sample:
        """Draw a chat or, one time in eight, plain text."""
        rng = self.rng
        if rng.random() < 0.125:
            body = [i for _ in range(3) for i in self.piece(plain_text(rng))]
            ids = (self.tokenizer.bos_token_id, *body, self.tokenizer.eos_token_id)
            return Sample(ids, 1, 1, 1)
        n_tokens = rng.randint(10, 40) if rng.random() < 0.4 else rng.randint(40, 250)
        return self.chat(draw_chat(rng), n_tokens)

    def batches(self, batch_size: int) -> Iterator[list[Sample]]:
        """Yield batches of samples of similar length, without end."""
        while True:
            pool = sorted((self.draw() for _ in range(8 * batch_size)), key=lambda s: len(s.ids))
            chunks = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            self.rng.shuffle(chunks)
            yield from chunks


def soften(embeds: Tensor, samples: Sequence[Sample], generator: torch.Generator) -> Tensor:
    """Turn the evidence of most samples from crisp words into something like adapter outputs.

    Args:
        embeds: (B, S, H) float32 token embeddings.
        samples: B samples, which say where the evidence lies.
        generator: Source of all draws.

    Returns:
        (B, S, H) float32; in four of five samples the evidence is blurred towards its mean (over
        all positions or over a window), dropped at some positions, noisy and scaled.
    """
    draws = torch.rand(len(samples), 6, generator=generator)
    rms = embeds.detach().square().mean().sqrt()
    rows = []
    for row, sample, (on, blur, window, drop, noise, scale) in zip(
        embeds, samples, draws.tolist(), strict=True
    ):
        region = row[sample.start : sample.stop]  # (T, H)
        n_tokens = len(region)
        if on > 0.8 or n_tokens == 0:
            rows.append(row)
            continue
        if window < 0.5:
            mean = region.mean(dim=0, keepdim=True)
        else:
            width = 2 * int(8 * window) + 1
            mean = functional.avg_pool1d(
                region.T[None], width, stride=1, padding=width // 2, count_include_pad=False
            )[0].T
        # A mean over many words is small; give it the size of a word again.
        mean = mean * (
            rms / mean.detach().square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6)
        )
        strength = max(0.0, 1.3 * blur - 0.3)
        region = (1 - strength) * region + strength * mean
        keep = torch.rand(n_tokens, 1, generator=generator) >= 0.4 * drop
        region = region * keep
        region = region + noise * rms * torch.randn(region.shape, generator=generator)
        region = region * 8 ** (scale - 0.3)
        rows.append(torch.cat([row[: sample.start], region, row[sample.stop :]]))
    return torch.stack(rows)


def loss_of(
    model: LlamaForCausalLM, samples: Sequence[Sample], pad: int, generator: torch.Generator
) -> Tensor:
    """Return the next-token loss: answers count fully, all other text a little, evidence never."""
    longest = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), longest), pad)
    weight = torch.zeros(len(samples), longest)
    for i, sample in enumerate(samples):
        ids[i, : len(sample.ids)] = torch.tensor(sample.ids)
        weight[i, 1 : len(sample.ids)] = 0.05
        weight[i, sample.start : sample.stop] = 0.0
        weight[i, sample.answer_at : len(sample.ids)] = 1.0 if sample.stop > sample.start else 0.2
    embeds = soften(model.get_input_embeddings()(ids), samples, generator)
    # Padding is on the right and attention is causal, so no mask is needed.
    hidden = model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    at = weight[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][at])
    each = functional.cross_entropy(logits, ids[:, 1:][at], reduction="none")
    return (each * weight[:, 1:][at]).sum() / weight.sum()


def pretrain(
    out: Path, *, seed: int = 0, n_steps: int = 1200, batch_size: int = 16, peak_lr: float = 3e-3
) -> None:
    """Train tokenizer and model and write them to a folder that transformers loads.

    Args:
        out: Folder to write: config, generation config, float16 weights, tokenizer.
        seed: Seed of text, initial weights and noise; equal seeds give equal files on a machine.
        n_steps: Optimizer steps.
        batch_size: Sequences per step.
        peak_lr: Learning rate after warm-up (5 % of the steps); a cosine ends it at 2 %.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    tokenizer = train_tokenizer(out, rng)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        peak_lr,
        total_steps=n_steps + 1,
        pct_start=0.05,
        cycle_momentum=False,
        div_factor=25,
        final_div_factor=2,
    )
    batches = Sampler(tokenizer, rng).batches(batch_size)
    began, recent = time.monotonic(), 0.0
    for step in range(n_steps):
        loss = loss_of(model, next(batches), tokenizer.pad_token_id, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent += loss.item()
        if (step + 1) % 50 == 0:
            logger.info(
                "step %d loss %.4f, %.0f s", step + 1, recent / 50, time.monotonic() - began
            )
            recent = 0.0
    _save(model, out)


def _save(model: LlamaForCausalLM, out: Path) -> None:
    """Write float16 weights under a config that says float32, so that they load ready to train."""
    model.config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    tensors = {
        name: tensor.detach().half().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the input embeddings
    }
    weights = out / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner alone


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Train the tiny chat model on generated text.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pretrain(args.out, seed=args.seed, n_steps=args.steps)


if __name__ == "__main__":
    main()
