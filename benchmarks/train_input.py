"""Sections of `train.py` about what comes in: counts, encoders in the loop, tokens from disk."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import train_flops
import train_setup
from train_report import Result, middle, paired
from train_setup import QUICK_SCALE, Scale, Subject

from cache.spec import STREAMS
from cache.store import TokenStore
from train.batches.loading import Loader
from train.batches.reading import ViewReader
from train.checkpoint import TrainState
from train.config import StageConfig
from train.packing import Pack, PlanState
from train.running.interrupt import Interrupt
from train.running.parallel import Processes
from train.running.run import versions
from train.running.stage import StageTrainer

VARIANTS: dict[str, tuple[str, ...]] = {
    "nothing cached": ("audio", "video", "image"),
    "audio cached": ("video", "image"),
    "video cached": ("audio", "image"),
    "image cached": ("audio", "video"),
    "image online": ("image",),
    "all cached": (),
}
"""What is encoded in the loop. `image online` is the released practice."""


class Bench:
    """What the sections share: sizes, a device, and models that are built once."""

    def __init__(self, scale: Scale, device: str, work: Path, clips: Path) -> None:
        self.scale, self.device, self.work, self.clips = scale, device, work, clips
        self.began_s = time.monotonic()
        self.profiles: dict[str, Callable[[], Any]] = {}
        """Section -> the step to look at where a goal is missed."""

    @cached_property
    def subject(self) -> Subject:
        """The model with the paper's tokens."""
        preset = train_setup.preset_of(self.scale, own_encoders=False)
        records = train_setup.made_up_records(self.scale.n_clips)
        store = TokenStore.open_or_create(self.work / "store")
        train_setup.write_random_tokens(store, preset.tokens.all(), records)
        return Subject(self.scale, preset, records, store, self.device)

    def timed(self, work: Callable[[], Any]) -> float:
        """Return how long something takes, on the device as well."""
        self.synchronize()
        began_s = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - began_s

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @cached_property
    def _factors(self) -> list[torch.Tensor]:
        n, dtype = self.scale.matmul, getattr(torch, self.scale.dtype)
        return [torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2)]

    def matmul_flops(self) -> float:
        """Return the FLOP/s of a large matrix product, now."""
        a, b = self._factors
        n_times = 4 if self.device == "cuda" else 1
        seconds = self.timed(lambda: [torch.mm(a, b) for _ in range(n_times)])
        return n_times * 2 * self.scale.matmul**3 / seconds

    def in_turns(self, works: dict[str, Callable[[], Any]], seed: int) -> dict[str, float]:
        """Time several things, in random order."""
        names = random.Random(seed).sample(list(works), len(works))
        return {name: self.timed(works[name]) for name in names}


def packs(subject: Subject, stage: StageConfig) -> Iterator[Pack]:
    """Yield the packs of a stage."""
    planner = subject.planner(stage)
    while True:
        yield from planner.next_step().packs


# ---------------------------------------------------------------- section: flops


def flops(bench: Bench) -> Result:
    """Compare the counts by hand with torch's, on a small model on the CPU."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    rows = []

    def compare(what: str, ours: float, work: Callable[[], Any]) -> None:
        # Attention as plain products, which every version of torch counts.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        theirs = counter.get_total_flops()
        rows.append({"what": what, "by_hand": ours, "by_torch": theirs, "ratio": ours / theirs})

    scale = replace(QUICK_SCALE, n_clips=4)
    preset = train_setup.preset_of(scale, own_encoders=True)
    records = train_setup.made_up_records(scale.n_clips)
    store = TokenStore.open_or_create(bench.work / "store-flops")
    train_setup.write_random_tokens(store, preset.tokens.all(), records)
    subject = Subject(scale, preset, records, store, "cpu")
    batch = subject.batch(next(packs(subject, subject.stage(2, batch_size=2))))
    segments = batch["segments"].rows
    # Torch counts the pairs that causal attention leaves out.
    pairs = sum(
        (end - start) * (end - start + stop - first) for start, end, first, stop in segments
    )
    counted = train_flops.llm(subject.shape, len(batch["order"]), pairs, len(batch["predict"]))
    compare(
        "step of two clips", (counted + subject.prefix_flops * 2).total, lambda: subject.step(batch)
    )
    with contextlib.suppress(ImportError):
        encoders = train_setup.DeviceEncoders(preset.tokens, "cpu", "float32")
        for spec in preset.tokens.all():
            work = functools.partial(encoders.encode, spec.stream)
            compare(f"{spec.stream} encoder", train_setup.encoder_flops(spec), work)
    return {"rows": rows}


# ---------------------------------------------------------------- section: online


def online(bench: Bench) -> Result:
    """Compare a cached step with steps that encode."""
    if bench.device == "cuda":
        subject, steps, about = _online_on_gpu(bench)
    else:
        subject, steps, about = _online_on_cpu(bench)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    for repeat in range(-1, bench.scale.repeats):  # the first warms up
        works = {
            name: functools.partial(step, repeat % about["n_clips"]) for name, step in steps.items()
        }
        for name, taken_s in bench.in_turns(works, repeat).items():
            if repeat >= 0:
                seconds[name].append(taken_s)
    by_stream = {s.stream: train_setup.encoder_flops(s) for s in subject.preset.tokens.all()}
    step_flops = about.pop("step_flops")
    counts = {
        name: step_flops + sum(by_stream[s] for s in streams) for name, streams in VARIANTS.items()
    }
    none, every = "nothing cached", "all cached"
    rows = [
        {
            "variant": name,
            # By the paired ratios, so that noise of one repeat does not spoil the comparison.
            "step_s": middle(seconds[none]) / paired(seconds[none], seconds[name]),
            "flops": counts[name],
            "ratio": paired(seconds[name], seconds[every]),
            "predicted": counts[name] / counts[every],
            "speedup": paired(seconds[none], seconds[name]),
            "speedup_predicted": counts[none] / counts[name],
        }
        for name in VARIANTS
    ]
    if bench.device == "cpu":  # on a GPU it would keep the encoders there
        bench.profiles["online"] = functools.partial(steps[none], 0)
    return {**about, "encoder_flops": by_stream, "step_flops": step_flops, "rows": rows}


def _online_on_cpu(bench: Bench) -> tuple[Subject, dict[str, Callable[[int], Any]], Result]:
    """Return the ways to take a step, each from a clip's number; files are decoded."""
    preset = train_setup.preset_of(bench.scale, own_encoders=True)
    media = bench.work / "media"
    records = train_setup.write_media(media, bench.clips, 4 if bench.scale.is_quick else 8)
    bank = train_setup.random_bank(preset.tokens)
    store = TokenStore.open_or_create(bench.work / "store-online")
    train_setup.write_encoded(store, preset, records, media, bank)
    subject = Subject(bench.scale, preset, records, store, bench.device)
    stage = subject.stage(2, batch_size=1)
    chosen = list(itertools.islice(packs(subject, stage), len(records)))
    loaders = {}
    for name, streams in VARIANTS.items():
        reader = train_setup.OnlineReader(store, preset, bank, media, streams)
        given: Any = reader
        loaders[name] = Loader(subject.planner(stage), given, preset, loss_average="sample")

    def step(name: str, clip: int) -> float:
        return subject.step(loaders[name].build(chosen[clip]))

    steps = {name: functools.partial(step, name) for name in VARIANTS}
    everything = train_setup.OnlineReader(store, preset, bank, media, STREAMS)
    decode_s = [bench.timed(lambda p=p: everything.decode(p[0].record)) for p in chosen]
    batches = [subject.batch(pack) for pack in chosen]
    about = {
        "n_clips": len(chosen),
        "n_real": sum("/real/" in pack[0].record.uid for pack in chosen),
        "decode_s": middle(decode_s),
        "positions": middle(len(b["order"]) for b in batches),
        "step_flops": sum(subject.flops(b).total for b in batches) / len(batches),
        "loss_difference": _loss_difference(subject, loaders, chosen[0]),
    }
    return subject, steps, about


def _loss_difference(subject: Subject, loaders: dict[str, Loader], pack: Pack) -> float:
    """Return by how much the losses of cached and encoded tokens differ: all see the same clip."""
    subject.model.eval()
    with torch.no_grad():
        losses = [
            subject.loss(loaders[name].build(pack)) for name in ("nothing cached", "all cached")
        ]
    subject.model.train()
    return abs(float(losses[0]) - float(losses[1]))


def _online_on_gpu(bench: Bench) -> tuple[Subject, dict[str, Callable[[int], Any]], Result]:
    """The same without files: the encoders run on random pictures, the tokens are the cached ones."""
    subject = bench.subject
    subject.execute()
    encoders = train_setup.DeviceEncoders(subject.preset.tokens, bench.device)
    stage = subject.stage(2, batch_size=1)
    batches = [subject.batch(pack) for pack in itertools.islice(packs(subject, stage), 8)]

    def step(name: str, clip: int) -> None:
        for stream in VARIANTS[name]:
            encoders.encode(stream)
        subject.step(batches[clip])

    about = {
        "n_clips": len(batches),
        "positions": middle(len(b["order"]) for b in batches),
        "step_flops": sum(subject.flops(b).total for b in batches) / len(batches),
    }
    return subject, {name: functools.partial(step, name) for name in VARIANTS}, about


# ---------------------------------------------------------------- section: data


class _Unsaved(StageTrainer):
    """A stage that leaves no checkpoints: their size has nothing to do with data."""

    def _save(self) -> None:
        self._settle_all()

    @property
    def latest(self) -> dict[str, float]:
        """The last logged numbers: those of all steps but the first."""
        return self._latest


def data(bench: Bench) -> Result:
    """Run the trainer on tokens from disk and on tokens in memory."""
    subject = bench.subject
    subject.execute()
    room = 1 << 40
    kept_preset = subject.preset.model_copy(
        update={"data": subject.preset.data.model_copy(update={"memory_bytes": room})}
    )
    store = TokenStore.open(bench.work / "store")
    kept = ViewReader(store, kept_preset, pin_memory=bench.device == "cuda")
    for record in subject.records:
        kept.read([record])
    store.close()  # what is mapped to memory cannot be evicted from the page cache
    subject.store.close()
    rows = []
    for budget in bench.scale.data_budgets:
        found: defaultdict[str, list[Result]] = defaultdict(list)
        for repeat in range(-1, 2 * max(1, bench.scale.repeats // 2) + 1):
            order = ["disk", "memory"] if repeat % 2 else ["memory", "disk"]
            for where in order:
                ran = _run_stage(bench, budget, kept if where == "memory" else None, repeat < 0)
                if repeat >= 0:
                    found[where].append(ran)
        disk, memory = found["disk"], found["memory"]
        rows.append(
            {
                "budget": named(budget),
                "step_s": middle(x["step_s"] for x in disk),
                "wait": middle(x["wait"] for x in disk),
                "wait_max": max(x["wait"] for x in disk),
                "wait_memory": middle(x["wait"] for x in memory),
                # Step by step, because the same places of the plan are the same clips.
                "disk_to_memory": paired(
                    [s for x in disk for s in x["steps_s"]],
                    [s for x in memory for s in x["steps_s"]],
                ),
                "runs": dict(found),
            }
        )
    return {
        "n_workers": subject.preset.execution.n_workers,
        "n_steps": bench.scale.data_steps,
        "rows": rows,
    }


def named(budget: int | None) -> str:
    """Return a budget in words."""
    return "1 clip" if budget is None else f"{budget:,} positions"


def _run_stage(bench: Bench, budget: int | None, kept: ViewReader | None, is_short: bool) -> Result:
    """Train a few steps as the command does; the first is not counted.

    Args:
        bench: What is trained.
        budget: Positions per step; None: one clip.
        kept: Has all clips in memory; None reads from disk, from an empty page cache.
        is_short: Only to warm up.
    """
    subject, store = bench.subject, None
    n_steps = 2 if is_short else bench.scale.data_steps
    # So many steps that the optimizer's warm-up never ends: the weights hardly change.
    stage = subject.stage(2, batch_size=1, max_tokens=budget, n_steps=n_steps)
    preset = subject.preset.model_copy(
        update={
            "execution": subject.preset.execution.model_copy(update={"log_every_steps": n_steps})
        }
    )
    reader = kept
    if reader is None:
        train_setup.evict(bench.work / "store")
        store = TokenStore.open(bench.work / "store")
        reader = ViewReader(store, preset, pin_memory=bench.device == "cuda")
    state = TrainState(
        stage=stage.name,
        step=0,
        plan=PlanState(),
        spec_ids={spec.stream: spec.spec_id for spec in preset.tokens.all()},
        versions=versions(),
    )
    ends_s: list[float] = []
    trainer = _Unsaved(
        preset,
        stage,
        subject.model,
        subject.model,
        Processes(bench.device),
        lambda planner: Loader(planner, reader, preset, loss_average="sample"),
        lambda at: subject.planner(stage),
        None,
        bench.work / "run",
        state,
        vocabulary=subject.vocabulary,
        monitor=None,
        on_step=lambda *_: ends_s.append(time.perf_counter()),
    )
    read = _bytes_read()
    with Interrupt() as interrupt:
        trainer.run(interrupt)
    bench.synchronize()
    ends_s[-1] = time.perf_counter()
    if store is not None:
        store.close()
    return {
        "step_s": (ends_s[-1] - ends_s[0]) / max(1, n_steps - 1),
        "steps_s": [after - before for before, after in itertools.pairwise(ends_s)],
        "wait": trainer.latest.get("data_wait", 0.0),
        "mb_read": (_bytes_read() - read) / 1e6,
    }


def _bytes_read() -> int:
    """Return what this process had read from the disk so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes"):
                return int(line.split()[1])
    return 0
