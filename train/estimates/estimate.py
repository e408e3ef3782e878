"""What a run would train and cost, before it is started: steps, arithmetic, memory, time.

The steps are laid out by the run's own planner, from the real records and the real tokenizer; the
language model is shapes without weights, no token is read, and nothing is written. Arithmetic and
memory are formulas over those shapes (`train.estimates.costs` explains each term), time is arithmetic
over speed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cache.manifest import Manifest
from cache.store import TokenStore
from train.batches.reading import ViewReader
from train.batches.records import records_to_train_on, records_to_validate_on
from train.config import Preset, StageConfig
from train.data import Renderer
from train.estimates.costs import Costs, Flops, Memory, Work
from train.llm.backbone import context_length, empty_llm, load_tokenizer
from train.loop import check_labels, check_lengths, run_tasks
from train.mixture import Mixture
from train.model import EmotionLlama
from train.packing import Grouper, Planner, Step
from train.running.parallel import Parallel

N_STEPS = 64
"""Steps of each stage that are laid out; the others are taken to be like them."""

EFFICIENCY = {"cuda": 0.5, "cpu": 0.7}
"""Assumed share of the speed of a large matrix product that training reaches; no measurement."""

_MEASURED_S = 0.03
"""A product that takes this long is long enough to be timed."""


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
    check_labels(manifest, preset, "the manifest")
    reader = ViewReader(store, preset)
    preset, data = preset.model_copy(update={"tokens": reader.resolved}), preset.data
    records = records_to_train_on(manifest, preset, reader)
    val_records = records_to_validate_on(manifest, preset, reader)
    mixtures = [
        Mixture(records, stage, preset.seed + number, reader.streams_of)
        for number, stage in enumerate(preset.stages)
    ]
    with torch.device("meta"):
        model = EmotionLlama(preset, empty_llm(preset.model.llm))
    limit = context_length(model.llm.get_base_model())
    renderer = Renderer(preset, load_tokenizer(preset.model.llm), manifest.header)
    grouper = Grouper(preset, reader, renderer, limit)
    renderer.wording.check(records + val_records, run_tasks(preset))
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
