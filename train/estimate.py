"""What a run would train and cost, before it is started: steps, arithmetic, memory, time.

The steps are laid out by the run's own planner, from the real records and the real tokenizer; the
language model is shapes without weights, no token is read, and nothing is written. Arithmetic and
memory are formulas over those shapes (`Costs` explains each term), time is arithmetic over speed.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cache.errors import ManifestError
from cache.manifest import Manifest
from cache.store import TokenStore
from train.backbone import context_length, decoder_layers, empty_llm, load_tokenizer
from train.config import Preset, StageConfig
from train.data import Renderer
from train.loop import check_lengths
from train.mixture import Mixture
from train.model import EmotionLlama
from train.packing import Grouper, Pack, Planner, Step
from train.parallel import Parallel
from train.reading import ViewReader, usable

N_STEPS = 64
"""Steps of each stage that are laid out; the others are taken to be like them."""

EFFICIENCY = {"cuda": 0.5, "cpu": 0.7}
"""Assumed share of the speed of a large matrix product that training reaches; no measurement."""

_MEASURED_S = 0.03
"""A product that takes this long is long enough to be timed."""


# --------------------------------------------------------------------------- what it costs


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
            shared = len(prompts[0].head_ids) + group.n_prefix
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
        shapes = self._preset.view_shapes().values()
        return 4 * (sum(n * width for n, width in shapes) + self._preset.tokens.image.encoder.width)

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


def measure_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the speed of a large matrix product on a device, in less than a second."""
    cuda = device.type == "cuda"
    size = 256
    while True:
        a = torch.ones(size, size, dtype=dtype, device=device)
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            a @ a
            if cuda:
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
            if taken[-1] > _MEASURED_S and len(taken) > 1:
                break
        if min(taken) > _MEASURED_S / 4 or size >= 8192:
            return float(2 * size**3 / min(taken))
        size *= 2


# --------------------------------------------------------------------------- the estimate


@dataclass(frozen=True)
class Spread:
    """A number that differs from step to step."""

    least: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize one number per step."""
        return cls(min(values), sum(values) / len(values), max(values))


@dataclass(frozen=True)
class StageEstimate:
    """What a stage would train. Numbers per step are over all processes."""

    name: str
    n_steps: int
    n_laid_out: int
    """Steps that the numbers were counted on."""
    tasks: dict[str, float]
    """Task -> share of the questions."""
    clips: Spread
    positions: Spread
    """Positions of the language model per step, without padding."""
    answer_tokens: Spread
    fill: float | None
    """Share of the token budget that packs use; None without a budget."""
    epochs: float
    """Draws of the whole stage over training records."""
    flops: Flops
    """Mean of a step, all processes together."""
    memory: Memory
    """Of a process with the mean pack."""
    memory_most: Memory
    """Of a process with the largest pack."""
    step_s: float
    """Mean of the slowest process."""

    @property
    def total_s(self) -> float:
        """Seconds of all steps."""
        return self.n_steps * self.step_s


@dataclass(frozen=True)
class Estimate:
    """What a run would train and cost."""

    preset: Preset
    """With the specs that the store holds."""
    device: torch.device
    n_processes: int
    parallel: Parallel
    n_records: int
    """To train on."""
    n_val_records: int
    trainable: dict[str, int]
    """Component -> trained parameters."""
    n_frozen: int
    flops_per_s: float
    """Of a large matrix product on one device, measured or given."""
    efficiency: float
    """Assumed share of it that training reaches."""
    host_bytes: float
    """Batches prepared ahead and views kept, in one process, in the memory of the machine."""
    stages: tuple[StageEstimate, ...]

    @property
    def n_trainable(self) -> int:
        """Trained parameters of all components."""
        return sum(self.trainable.values())

    @property
    def total_s(self) -> float:
        """Seconds of all stages."""
        return sum(stage.total_s for stage in self.stages)


def estimate(
    preset: Preset,
    manifest: Manifest,
    store: TokenStore,
    *,
    n_processes: int = 1,
    device: torch.device,
    flops_per_s: float | None = None,
    parallel: Parallel = "ddp",
) -> Estimate:
    """Lay out the first steps of every stage and add up what they cost.

    Args:
        preset: The resolved configuration.
        manifest: Records with labels.
        store: Committed tokens; their index is read, no token is.
        n_processes: Processes that would share the run, each with a device like this one.
        device: What one process would train on.
        flops_per_s: Speed of a large matrix product on it; None measures it.
        parallel: How several processes would share the model.

    Raises:
        CheckpointError: The language model's config or tokenizer cannot be loaded.
        SpecMismatchError: The store does not hold what the preset asks for.
        CacheMissError: Clips of the training split were never extracted.
        ManifestError: No labels, or no record for a task of the mixture.
        SchemaError: LoRA names no layer of the model, or a sample does not fit.
    """
    space = manifest.header.label_space
    if space is None:
        raise ManifestError(
            "the manifest holds no labels, so there is nothing to train on. "
            "Index with a table: emocache index DIR --out FILE --labels labels.csv"
        )
    reader = ViewReader(store, preset)
    preset, data = preset.model_copy(update={"tokens": reader.resolved}), preset.data
    records = usable(manifest.select(data.train_split), reader, data)
    val_records = []
    if data.val_split is not None and data.val_split in manifest.splits:
        val_records = usable(manifest.select(data.val_split), reader, data)
    mixtures = [
        Mixture(records, stage, preset.seed + number, reader.streams_of)
        for number, stage in enumerate(preset.stages)
    ]
    with torch.device("meta"):
        model = EmotionLlama(preset, empty_llm(preset.model.llm))
    limit = context_length(model.llm.get_base_model())
    grouper = Grouper(
        preset, reader, Renderer(preset, load_tokenizer(preset.model.llm), space), limit
    )
    check_lengths(records + val_records, preset, grouper, reader, limit)
    laid_out = [
        _lay_out(Planner(mixture, grouper.groups, stage.optim, n_processes), stage)
        for mixture, stage in zip(mixtures, preset.stages, strict=True)
    ]
    costs = Costs(preset, model, device)
    speed = flops_per_s or measure_flops_per_s(device, getattr(torch, preset.model.llm.dtype))
    efficiency = EFFICIENCY.get(device.type, EFFICIENCY["cuda"])

    def stage_of(stage: StageConfig, steps: Sequence[Step]) -> StageEstimate:
        return _stage_estimate(
            stage, steps, costs, preset, len(records), n_processes, parallel, speed * efficiency
        )

    stages = tuple(map(stage_of, preset.stages, laid_out))
    n_ahead = preset.execution.n_ahead if preset.execution.n_workers else 1
    ahead_bytes = max(
        n_ahead * stage.optim.accumulate * estimated.memory.batch_bytes
        for stage, estimated in zip(preset.stages, stages, strict=True)
    )
    return Estimate(
        preset=preset,
        device=device,
        n_processes=n_processes,
        parallel=parallel,
        n_records=len(records),
        n_val_records=len(val_records),
        trainable=model.trainable(),
        n_frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        flops_per_s=speed,
        efficiency=efficiency,
        host_bytes=ahead_bytes + min(data.memory_bytes, len(records) * costs.clip_bytes),
        stages=stages,
    )


def _lay_out(planner: Planner, stage: StageConfig) -> list[Step]:
    return [planner.next_step() for _ in range(min(N_STEPS, stage.n_steps))]


def _stage_estimate(
    stage: StageConfig,
    steps: Sequence[Step],
    costs: Costs,
    preset: Preset,
    n_records: int,
    n_processes: int,
    parallel: Parallel,
    flops_per_s: float,
) -> StageEstimate:
    padded = preset.execution.attention == "padded"
    works = [[Work.of(pack, padded=padded) for pack in step.packs] for step in steps]
    packs = [work for of_step in works for work in of_step]
    mean = _mean(packs)
    per_step = len(packs) / len(steps)
    mean_flops = costs.flops(mean)
    memories = [costs.memory(work, n_processes, parallel) for work in packs]
    slowest = [
        max(
            sum(costs.flops(work).total for work in of_step[rank::n_processes])
            for rank in range(n_processes)
        )
        for of_step in works
    ]
    tasks = Counter(q.task for s in steps for pack in s.packs for g in pack for q in g.questions)
    budget = stage.optim.max_tokens
    positions = [step.n_positions for step in steps]
    # A draw may be several groups, so draws are counted by the plan.
    n_draws = steps[-1].after.next_place - len(steps[-1].after.waiting)
    return StageEstimate(
        name=stage.name,
        n_steps=stage.n_steps,
        n_laid_out=len(steps),
        tasks={task: n / tasks.total() for task, n in sorted(tasks.items())},
        clips=Spread.of([sum(map(len, step.packs)) for step in steps]),
        positions=Spread.of(positions),
        answer_tokens=Spread.of([step.n_answer_tokens for step in steps]),
        fill=None if budget is None else sum(positions) / (len(packs) * budget),
        epochs=stage.n_steps * n_draws / len(steps) / n_records,
        flops=Flops(**{name: per_step * n for name, n in vars(mean_flops).items()}),
        memory=costs.memory(mean, n_processes, parallel),
        memory_most=max(memories, key=lambda memory: memory.total_bytes),
        step_s=sum(slowest) / len(slowest) / flops_per_s,
    )


def _mean(packs: Sequence[Work]) -> Work:
    n = len(packs)
    return Work(
        sum(w.n_clips for w in packs) / n,
        sum(w.n_positions for w in packs) / n,
        sum(w.n_pairs for w in packs) / n,
        sum(w.n_logits for w in packs) / n,
    )


# --------------------------------------------------------------------------- as text


def lines(found: Estimate) -> list[str]:
    """Return an estimate as plain text, a dozen to two dozen lines."""
    llm, execution = found.preset.model.llm, found.preset.execution
    n, n_all = found.n_trainable, found.n_trainable + found.n_frozen
    kind = f", {llm.quantize} weights" if llm.quantize else ""
    several = f", shared by {found.parallel}" if found.n_processes > 1 else ""
    processes = "1 process" if found.n_processes == 1 else f"{found.n_processes} processes"
    parts = ", ".join(f"{name} {count:,}" for name, count in found.trainable.items())
    text = [
        f"preset {found.preset.name} on {found.device}, {processes}{several}; nothing is trained "
        "or written",
        f"records        {found.n_records:,} to train on, {found.n_val_records:,} to validate on",
        f"trained        {n:,} parameters, {n / n_all:.2%} of all {n_all:,}",
        f"  of which     {parts}",
        f"frozen         {found.n_frozen:,} parameters, {llm.dtype}{kind}",
    ]
    for stage, config in zip(found.stages, found.preset.stages, strict=True):
        text += _stage_lines(stage, config.optim.max_tokens)
    text += [
        f"all stages     {sum(s.n_steps for s in found.stages):,} steps, "
        f"{_flop(sum(s.n_steps * s.flops.total for s in found.stages))}, {_duration(found.total_s)}",
        f"host memory    {_size(found.host_bytes)} per process for batches ahead and kept views",
        f"assumed        {found.efficiency:g} of the {_flop(found.flops_per_s)}/s that a large "
        f"matrix product reaches; activations {'' if execution.checkpoint_activations else 'not '}"
        "checkpointed; no reading, validation, checkpoints, exchange of gradients, or memory of the "
        f"runtime; steps like the first {max(s.n_laid_out for s in found.stages)} of each stage",
    ]
    return text


def _stage_lines(stage: StageEstimate, budget: int | None) -> list[str]:
    tasks = ", ".join(f"{name} {share:.1%}" for name, share in stage.tasks.items())
    flops, memory = stage.flops, stage.memory
    parts = {
        "frozen": memory.frozen_bytes,
        "trained with moments": memory.trained_bytes,
        "activations": memory.activations_bytes,
        "logits": memory.logits_bytes,
        "batch": memory.batch_bytes,
    }
    held = ", ".join(f"{name} {_size(n_bytes)}" for name, n_bytes in parts.items())
    fill = (
        f"; {stage.fill:.1%} of the budget of {budget:,} filled" if stage.fill is not None else ""
    )
    return [
        f"{stage.name}: {stage.n_steps:,} steps, {stage.epochs:.3g} passes over the records, "
        f"{_duration(stage.total_s)}",
        f"  tasks        {tasks} of the questions",
        f"  clips        {_spread(stage.clips)} per step (least / mean / most)",
        f"  positions    {_spread(stage.positions)} per step{fill}",
        f"  answers      {_spread(stage.answer_tokens)} tokens per step",
        f"  arithmetic   {_flop(flops.total)} per step: layers {_flop(flops.layers)}, attention "
        f"{_flop(flops.attention)}, LoRA {_flop(flops.lora)}, logits {_flop(flops.logits)}, prefix "
        f"{_flop(flops.prefix)}",
        f"  memory       {_size(memory.total_bytes)} per process: {held}; "
        f"{_size(stage.memory_most.total_bytes)} with the largest pack",
        f"  time         {stage.step_s:.3g} s per step",
    ]


def _spread(spread: Spread) -> str:
    return f"{spread.least:,.0f} / {spread.mean:,.1f} / {spread.most:,.0f}"


def _flop(n: float) -> str:
    for prefix, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if n >= size:
            return f"{n / size:.3g} {prefix}FLOP"
    return f"{n / 1e6:.3g} MFLOP"


def _size(n_bytes: float) -> str:
    if n_bytes >= 2**30:
        return f"{n_bytes / 2**30:.2f} GiB"
    return f"{n_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    for name, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"
