"""Floating-point operations of a training step, counted by hand: a multiplication and an addition are 2.

What is computed twice only to save memory is counted once, norms, activations and softmax not at
all. Of causal attention only the pairs of a query and a key that it sees count. `train.py` compares
these counts with `torch.utils.flop_counter`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Rows = Iterable[tuple[int, int, int, int]]
"""Segments of a batch: (first query, end, first key of the shared prefix, end)."""


@dataclass(frozen=True)
class Flops:
    """Of a forward and a backward pass."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, n: float) -> Flops:
        return Flops(self.forward * n, self.backward * n)


@dataclass(frozen=True)
class LlmShape:
    """A LLaMA with as many key heads as query heads, and LoRA on q and v."""

    width: int
    n_layers: int
    mlp_width: int
    vocabulary: int
    rank: int


@dataclass(frozen=True)
class PrefixShape:
    """What stands before the language model: Conv-Attention and the modal adapters."""

    blocks: Mapping[str, tuple[int, int]]
    """Block of the prefix -> (tokens, channels); `fusion` is one of them."""
    fusion_inputs: tuple[int, int, int]
    """Channels of audio, image context and video."""
    hidden_width: int
    fused_width: int
    n_conv_blocks: int


def n_pairs(rows: Rows) -> int:
    """Return how many pairs of a query and a key that it sees there are.

    A query sees the shared prefix, the queries before it and itself.
    """
    total = 0
    for start, end, first, stop in rows:
        n = end - start
        total += n * (stop - first) + n * (n + 1) // 2
    return total


def llm(shape: LlmShape, n_positions: int, pairs: float, n_predicted: int) -> Flops:
    """Return what the frozen language model with LoRA takes, for H wide, M its MLP, N positions.

    Args:
        shape: Sizes.
        n_positions: N.
        pairs: See `n_pairs`.
        n_predicted: Positions whose logits are computed.
    """
    h, n = shape.width, n_positions
    weights = 4 * h * h + 3 * h * shape.mlp_width  # q, k, v, o; gate, up, down
    linear = 2 * n * weights  # backward as much: gradients of activations, none of frozen weights
    scores = 2 * 2 * h * pairs  # Q K^T and P V; backward dQ, dK, dP, dV: twice as much
    # Per tuned layer N x H x r and N x r x H, two such layers; backward both kinds of gradients.
    lora = 2 * (2 * n * h * shape.rank + 2 * n * shape.rank * h)
    logits = 2 * n_predicted * h * shape.vocabulary  # frozen as well
    forward = shape.n_layers * (linear + scores + lora) + logits
    backward = shape.n_layers * (linear + 2 * scores + 2 * lora) + logits
    return Flops(forward, backward)


def prefix(shape: PrefixShape, llm_width: int) -> Flops:
    """Return what fusion and adapters take for one clip."""
    total = Flops()
    for name, (n_tokens, channels) in shape.blocks.items():
        once = 2.0 * n_tokens * channels * llm_width
        # Gradients of the weights; of the inputs only where they come from trained parts.
        total += Flops(once, once * (2 if name == "fusion" else 1))
    if "fusion" in shape.blocks:
        n_tokens, out = shape.blocks["fusion"]
        h, c = shape.hidden_width, shape.fused_width
        first = sum(d * h for d in shape.fusion_inputs)  # its inputs need no gradient
        rest = 3 * h * c  # the second layers of the three MLPs
        rest += 3 * c * h + h * c + c * 3  # attention branch
        rest += 3 * c * c + shape.n_conv_blocks * 3 * c * c  # convolution branch, kernels of 3
        rest += c * out
        total += Flops(2 * n_tokens * (first + rest), 2 * n_tokens * (first + 2 * rest))
    return total


def vit(
    width: int, depth: int, mlp_width: int, patch_px: int, size_px: int, n_pictures: int
) -> Flops:
    """Return what a vision transformer takes for a clip's pictures; nothing is trained."""
    n_patches = (size_px // patch_px) ** 2
    n = n_patches + 1
    block = 2 * n * (4 * width**2 + 2 * width * mlp_width) + 4 * width * n * n
    embedding = 2 * n_patches * 3 * patch_px**2 * width
    return Flops(n_pictures * (depth * block + embedding))


def whisper(width: int, n_layers: int, n_mels: int, n_context: int) -> Flops:
    """Return what Whisper's encoder takes: always for its whole window."""
    n = n_context
    block = 2 * n * (4 * width**2 + 2 * width * 4 * width) + 4 * width * n * n
    stem = 2 * (2 * n) * 3 * n_mels * width + 2 * n * 3 * width * width  # two convolutions of 3
    return Flops(n_layers * block + stem)


def padded_positions(lengths: Sequence[int]) -> int:
    """Return the positions of rows of these lengths, padded to the longest."""
    return len(lengths) * max(lengths)


def shared_positions(n_shared: int, own: Sequence[int]) -> tuple[int, int]:
    """Return the positions of questions behind one shared prefix, and of each with its own.

    Args:
        n_shared: Head and prefix.
        own: Tail and answer of each question.
    """
    return n_shared + sum(own), len(own) * n_shared + sum(own)
