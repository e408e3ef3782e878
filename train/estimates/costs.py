"""What a pack costs a language model of given shapes: arithmetic and memory, term by term."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from train.config import Preset
from train.llm.backbone import decoder_layers
from train.model import EmotionLlama
from train.packing import Pack
from train.running.parallel import Parallel


@dataclass(frozen=True)
class Work:
    """What the cost of a pack follows from; of several packs the sum or the mean."""

    n_clips: float
    """Encoded prefixes."""
    n_positions: float
    """Positions that the language model computes, padding included."""
    n_pairs: float
    """Pairs of a query and a key that attention multiplies."""
    n_logits: float
    """Positions whose logits are computed."""

    @classmethod
    def of(cls, pack: Pack, *, padded: bool) -> Work:
        """Count a pack as `EmotionLlama` computes it.

        Packed, a clip is encoded once; its T positions see half of T * T pairs, and a further
        question sees the clip and itself. Padded, every question is a row with the clip before it,
        all rows are as long as the longest, and no pair is skipped.
        """
        positions = pairs = logits = 0.0
        rows: list[tuple[int, int]] = []  # (positions, answer tokens) of each question
        for group in pack:
            prompts = [question.prompt for question in group.questions]
            shared = group.n_shared
            texts = [len(p.tail_ids) + len(p.answer_ids) for p in prompts]
            rows += [(shared + n, len(p.answer_ids)) for n, p in zip(texts, prompts, strict=True)]
            positions += group.n_positions
            pairs += shared**2 / 2 + sum(n * shared + n**2 / 2 for n in texts)
            logits += group.n_answer_tokens
        if padded:
            n_rows, longest = len(rows), max(n for n, _ in rows)
            positions, pairs = n_rows * longest, n_rows * longest**2
            logits = n_rows * (longest - min(n - n_answer - 1 for n, n_answer in rows))
        return cls(len(pack), positions, pairs, logits)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiplication and its addition counted as two."""

    layers: float
    """Frozen weights of the decoder layers."""
    attention: float
    lora: float
    logits: float
    prefix: float
    """Pre-fusion and adapters."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.layers + self.attention + self.lora + self.logits + self.prefix


@dataclass(frozen=True)
class Memory:
    """Bytes in one process, at the end of a forward pass, when they are most."""

    frozen_bytes: float
    trained_bytes: float
    """Weights, gradients, Adam's moments."""
    activations_bytes: float
    logits_bytes: float
    batch_bytes: float
    """The tokens of one forward pass."""

    @property
    def total_bytes(self) -> float:
        """All of them."""
        held = self.frozen_bytes + self.trained_bytes + self.activations_bytes
        return held + self.logits_bytes + self.batch_bytes


@dataclass(frozen=True)
class _Map:
    """A frozen matrix of a decoder layer."""

    n_in: int
    n_out: int
    times: int = 1
    """Experts that one position meets."""


class Costs:
    """What a pack costs, from the shapes of a model on the meta device.

    Any architecture whose decoder layers are matrices and softmax attention is read the same way:
    every frozen parameter of two dimensions in a layer is a matrix that each position meets, one of
    three a stack of experts, of which each position meets `num_experts_per_tok`.
    """

    def __init__(self, preset: Preset, model: EmotionLlama, device: torch.device) -> None:
        """Read the shapes; `device` decides how dropout's masks are kept."""
        base = model.llm.get_base_model()
        config = base.config.get_text_config()
        layers = list(decoder_layers(base))
        self._preset, self._model = preset, model
        self._n_layers, self._width = len(layers), int(config.hidden_size)
        self._n_heads = int(config.num_attention_heads)
        channels = getattr(config, "head_dim", None) or self._width // self._n_heads
        self._attention_width = self._n_heads * int(channels)
        self._head = math.prod(base.get_output_embeddings().weight.shape)
        self._vocabulary = int(base.get_output_embeddings().weight.shape[0])
        self._float_bytes = int(getattr(torch, preset.model.llm.dtype).itemsize)
        # On a CPU dropout keeps a factor, on a GPU a bit in a byte.
        self._mask_bytes = 1 if device.type == "cuda" else self._float_bytes
        n_experts = getattr(config, "num_experts_per_tok", None)
        maps = [_maps(layer, n_experts) for layer in layers]
        self._weights = sum(m.n_in * m.n_out * m.times for own in maps for m in own)
        self._last_weights = sum(own[-1].n_in * own[-1].n_out * own[-1].times for own in maps)
        self._lora = [
            p
            for layer in layers
            for name, p in layer.named_parameters()
            if p.requires_grad and "lora_" in name
        ]
        self._saved_bytes = sum(map(self._saved_of, maps)) + self._saved_of_lora()
        self._frozen_bytes = {
            id(p): _stored_bytes(p, quantize)
            for p, quantize in _frozen(model.llm, preset.model.llm.quantize)
        }
        self._in_layers = {id(p) for layer in layers for p in layer.parameters()}
        self._fusion = list(model.fusion.parameters()) if model.fusion is not None else []

    def flops(self, work: Work) -> Flops:
        """Return the operations of a forward and a backward pass.

        - A frozen matrix of w weights takes 2 w operations for each position forward, and as many
          backward, for the gradient of its input: all layers have one, since trained tokens stand
          at the beginning. Its own gradient is never computed.
        - A trained matrix (LoRA, pre-fusion) takes twice 2 w backward, for its input's gradient and
          its own; an adapter of stored tokens once, since those have no gradient.
        - Attention multiplies queries by keys and weights by values: 4 * width for each pair, and
          T * T / 2 pairs for T positions, which is 4 * T^2 * width / 2 a sequence. Backward takes
          2.5 times that: flash attention computes the first product again, then four.
        - Logits, 2 * width * vocabulary forward and as many backward, at supervised positions only.
        - `execution.checkpoint_activations` runs the layers' forward pass, attention and LoRA
          included, once more; but for a layer's last matrix, whose output is not needed again.
        - Look-ups, norms, activations and the optimizer are left out: they wait for memory.
        """
        again = int(self._preset.execution.checkpoint_activations)
        n_tokens = dict(self._model.layout.blocks)
        adapters = {
            name: n_tokens.get(name, 0) * _n_weights(adapter.parameters())
            for name, adapter in self._model.adapters.maps.items()
        }
        # As if every weight of the pre-fusion met every fusion token.
        fused = adapters.pop("fusion", 0) + n_tokens.get("fusion", 0) * _n_weights(self._fusion)
        pair = 4 * self._attention_width * self._n_layers
        return Flops(
            layers=2
            * work.n_positions
            * ((2 + again) * self._weights - again * self._last_weights),
            attention=pair * work.n_pairs * (3.5 + again),
            lora=2 * _n_weights(self._lora) * work.n_positions * (3 + again),
            logits=2 * self._head * work.n_logits * 2,
            prefix=2 * work.n_clips * (2 * sum(adapters.values()) + 3 * fused),
        )

    def memory(self, work: Work, n_processes: int = 1, parallel: Parallel = "ddp") -> Memory:
        """Return the bytes of a pack in one process.

        - Frozen weights in their dtype. Quantized ones, all linear layers but the output's, take 1
          byte and a float32 per row, or half a byte and a float32 for every 64.
        - Trained ones in float32: weight, gradient and two moments, 16 bytes; 2 more for autocast's
          copy, and 4 more for the buckets in which several processes (ddp) exchange gradients.
        - Activations that the backward pass needs: see `_saved_of`; of all layers, and once more of
          one layer for the gradients in flight. With `execution.checkpoint_activations` every layer
          keeps its input only, and one layer at a time everything. In front of the layers: the
          inputs of adapters in the model's dtype, and the pre-fusion's outputs.
        - Logits: 12 bytes each, in float32: the probabilities' logarithm, and its gradient twice.
        - fsdp divides weights, gradients and moments by the processes. Two layers (one computed,
          one fetched) and what is outside the layers are held whole.
        """
        several = n_processes > 1
        per_trained = 16 + (self._float_bytes if self._float_bytes < 4 else 0)
        per_trained += 4 if several and parallel == "ddp" else 0
        trained = {id(p): p.numel() for p in self._model.parameters() if p.requires_grad}
        frozen_bytes = float(sum(self._frozen_bytes.values()))
        trained_bytes = float(per_trained * sum(trained.values()))
        if several and parallel == "fsdp":
            inside = outside = 0.0
            weights_bytes = self._frozen_bytes | {key: 4.0 * n for key, n in trained.items()}
            for key, n_bytes in weights_bytes.items():
                inside += n_bytes if key in self._in_layers else 0
                outside += 0 if key in self._in_layers else n_bytes
            frozen_bytes = frozen_bytes / n_processes + outside + 2 * inside / self._n_layers
            trained_bytes /= n_processes
        return Memory(
            frozen_bytes=frozen_bytes,
            trained_bytes=trained_bytes,
            activations_bytes=self._activations_bytes(work),
            logits_bytes=12 * self._vocabulary * work.n_logits,
            batch_bytes=self.clip_bytes * work.n_clips,
        )

    @property
    def clip_bytes(self) -> int:
        """Bytes of the tokens of one clip in a batch, float32."""
        shapes, image = self._preset.view_shapes().values(), self._preset.tokens.image
        cls_width = 0 if image is None else image.encoder.width
        return 4 * (sum(n * width for n, width in shapes) + cls_width)

    def _activations_bytes(self, work: Work) -> float:
        layer_bytes = self._saved_bytes / self._n_layers
        if self._preset.execution.checkpoint_activations:
            layers_bytes = self._n_layers * self._float_bytes * self._width + 2 * layer_bytes
        else:
            layers_bytes = self._saved_bytes + layer_bytes
        last_norm_bytes = 4 * self._width
        copies_bytes = self.clip_bytes * self._float_bytes / 4 if self._float_bytes < 4 else 0
        n_fusion = dict(self._model.layout.blocks).get("fusion", 0)
        # Of each map its output and what the activation or dropout makes of it.
        sizes = [2 * p.shape[0] for p in self._fusion if p.ndim > 1]
        clip_bytes = copies_bytes + n_fusion * self._float_bytes * sum(sizes)
        return work.n_positions * (layers_bytes + last_norm_bytes) + work.n_clips * clip_bytes

    def _saved_of(self, maps: Sequence[_Map]) -> float:
        """Return the bytes per position that one decoder layer keeps, but for LoRA's.

        - Inputs of frozen matrices are not kept: only the weights' gradients would need them.
        - Outputs of the matrices are, by what follows: queries, keys and values by attention, gate
          and up by the activation and its product. The two outputs that are added to the residual
          (attention's, the feed-forward's) are not.
        - Attention's result, with one float32 per head; the activation of the gate, as wide as the
          input of the widest matrix.
        - The inputs of two norms, in float32.
        """
        outputs = sum(m.n_out * m.times for m in maps) - 2 * self._width
        widest = max(m.n_in * m.times for m in maps)
        kept = outputs + self._attention_width + widest
        return self._float_bytes * kept + 4 * self._n_heads + 2 * 4 * self._width

    def _saved_of_lora(self) -> float:
        """Return the bytes per position that LoRA keeps in all layers.

        Each keeps its input, after dropout, with dropout's mask, and what is between its matrices.
        """
        first = [p for p in self._lora if p.shape[0] == self._preset.model.lora.r]
        dropped = self._preset.model.lora.dropout > 0
        per_input = self._float_bytes + (self._mask_bytes if dropped else 0)
        return sum(per_input * p.shape[1] + self._float_bytes * p.shape[0] for p in first)


def _maps(layer: nn.Module, n_experts: int | None) -> list[_Map]:
    found = []
    for p in layer.parameters():
        if p.requires_grad or p.ndim < 2:
            continue
        n_out, n_in = p.shape[-2:]
        times = min(n_experts or p.shape[0], p.shape[0]) if p.ndim > 2 else 1
        found.append(_Map(n_in, n_out, times))
    return found


def _n_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many numbers the matrices among some parameters have."""
    return sum(p.numel() for p in parameters if p.ndim > 1)


def _frozen(llm: Any, quantize: str | None) -> list[tuple[nn.Parameter, str | None]]:
    """Return the frozen parameters, and how each is quantized."""
    head = llm.get_base_model().get_output_embeddings()
    linear = {id(m.weight) for m in llm.modules() if isinstance(m, nn.Linear) and m is not head}
    return [
        (p, quantize if id(p) in linear else None) for p in llm.parameters() if not p.requires_grad
    ]


def _stored_bytes(p: nn.Parameter, quantize: str | None) -> float:
    n = p.numel()
    if quantize == "8bit":
        return n + 4 * p.shape[0]
    if quantize == "4bit":
        return n / 2 + 4 * n / 64
    return n * p.element_size()
