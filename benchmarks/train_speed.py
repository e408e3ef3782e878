"""Sections of `train.py` about the step itself: packing, prefixes, FLOP/s, memory, execution."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import multiprocessing
import resource
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import train_flops
import train_setup
from train_input import Bench, named, packs
from train_report import Result, middle, paired, say
from train_setup import FULL_SCALE, QUICK_SCALE, Subject

from train.data import Group, PrefixBatch
from train.llm.attention import attention_of
from train.packing import Pack

PAPER_SAMPLES = 400_000
"""100,000 steps on 4 GPUs with one clip each."""
GPU_LIMIT_S = 330.0
"""No further way of execution is begun after so long: compilation may take a minute each."""


# ---------------------------------------------------------------- section: packing


def packing(bench: Bench) -> Result:
    """Compare packed and padded batches of the same clips, and fill token budgets."""
    n_clips = bench.scale.pack_clips
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return _packing_of(bench, n_clips)
        n_clips //= 2  # 0 would fail otherwise
        _free(bench.subject)


def _packing_of(bench: Bench, n_clips: int) -> Result:
    subject, scale = bench.subject, bench.scale
    stage = subject.stage(2, batch_size=n_clips)
    chosen = list(itertools.islice(packs(subject, stage), scale.repeats + 1))
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    predicted, real_padded = [], []
    for repeat, pack in enumerate(chosen, start=-1):
        batch = subject.batch(pack)

        def step(how: str, batch: PrefixBatch = batch) -> None:
            subject.execute(attention=how)
            subject.step(batch)

        works = {how: functools.partial(step, how) for how in ("packed", "padded")}
        found = bench.in_turns(works, repeat)
        if repeat < 0:
            continue
        for how, taken_s in found.items():
            seconds[how].append(taken_s)
        lengths = [group.n_positions for group in pack]
        predicted.append(train_flops.padded_positions(lengths) / sum(lengths))
        real_padded.append(sum(lengths) / train_flops.padded_positions(lengths))
        bench.profiles["packing"] = functools.partial(step, "packed")
    subject.execute()
    ratios = [p / q for p, q in zip(seconds["padded"], seconds["packed"], strict=True)]
    return {
        "n_clips": n_clips,
        "packed_samples_per_s": n_clips / middle(seconds["packed"]),
        "padded_samples_per_s": n_clips / middle(seconds["packed"]) / middle(ratios),
        "ratio": middle(ratios),
        "predicted": middle(predicted),
        "of_predicted": paired(ratios, predicted),
        "real_padded": middle(real_padded),
        "text": _text_lengths(chosen),
        "budgets": [_filled(subject, budget) for budget in (2048, 4096, 8192)],
    }


def _text_lengths(chosen: Sequence[Pack]) -> Result:
    prompts = [q.prompt for pack in chosen for group in pack for q in group.questions]
    records = [group.record for pack in chosen for group in pack]
    texts = [text for r in records for text in r.described("multimodal")]
    n_words = sum(len(text.split()) for text in texts)
    tokenizer = train_setup.load_bundled_tokenizer()
    n_tokens = sum(len(tokenizer(text).input_ids) for text in texts)
    return {
        "tail": middle(len(p.tail_ids) for p in prompts),
        "answer_min": min(len(p.answer_ids) for p in prompts),
        "answer_max": max(len(p.answer_ids) for p in prompts),
        "tokens_per_word": n_tokens / n_words,
    }


def _filled(subject: Subject, budget: int) -> Result:
    """Return how much of a budget packs use."""
    n_packs = 60
    chosen = itertools.islice(packs(subject, subject.stage(2, max_tokens=budget)), n_packs)
    sizes, real = [], []
    for number_, pack in enumerate(chosen):
        sizes.append(sum(group.n_positions for group in pack) / budget)
        if number_ < 4:
            # Every position of a batch shows a token, each text token and valid prefix token once.
            batch = subject.batch(pack)
            n_text = len(batch["text_ids"]) + (len(pack) - 1) * len(
                pack[0].questions[0].prompt.head_ids
            )
            n_valid = sum(group.n_prefix for group in pack)
            real.append((n_text + n_valid) / len(batch["order"]))
    return {
        "budget": budget,
        "used": sum(sizes) / n_packs,
        "used_min": min(sizes),
        "real": min(real),
    }


# ---------------------------------------------------------------- section: shared


def shared(bench: Bench) -> Result:
    """Compare three questions behind one prefix with three sequences."""
    subject, scale = bench.subject, bench.scale
    subject.execute()
    rows = []
    for mix in (1, 2):
        stage = subject.stage(mix, batch_size=1, pairs_per_clip=3)
        seconds: defaultdict[str, list[float]] = defaultdict(list)
        predicted, by_flops, positions = [], [], []
        for repeat, pack in enumerate(
            itertools.islice(packs(subject, stage), scale.repeats + 1), start=-1
        ):
            single = tuple(replace(g, questions=(q,)) for g in pack for q in g.questions)
            batches = {"shared": subject.batch(pack), "separate": subject.batch(single)}
            works = {name: functools.partial(subject.step, b) for name, b in batches.items()}
            found = bench.in_turns(works, repeat)
            if repeat < 0:
                continue
            for name, taken_s in found.items():
                seconds[name].append(taken_s)
            one, apart = _shared_positions(pack)
            predicted.append(apart / one)
            positions.append(one)
            by_flops.append(
                subject.flops(batches["separate"]).total / subject.flops(batches["shared"]).total
            )
            bench.profiles["shared"] = works["shared"]
        ratios = [a / b for a, b in zip(seconds["separate"], seconds["shared"], strict=True)]
        rows.append(
            {
                "mix": ("labels only", "stage 2")[mix - 1],
                "positions": middle(positions),
                "shared_pairs_per_s": 3 / middle(seconds["shared"]),
                "separate_pairs_per_s": 3 / middle(seconds["shared"]) / middle(ratios),
                "ratio": middle(ratios),
                "predicted": middle(predicted),
                "predicted_by_flops": middle(by_flops),
                "of_predicted": paired(ratios, predicted),
            }
        )
    return {"rows": rows}


def _shared_positions(pack: Sequence[Group]) -> tuple[int, int]:
    """Return the positions of a pack of one clip, and of its questions as sequences of their own."""
    one = apart = 0
    for group in pack:
        prompts = [q.prompt for q in group.questions]
        own = [len(p.tail_ids) + len(p.answer_ids) for p in prompts]
        found = train_flops.shared_positions(len(prompts[0].head_ids) + group.n_prefix, own)
        one, apart = one + found[0], apart + found[1]
    return one, apart


# ---------------------------------------------------------------- section: mfu


def mfu(bench: Bench) -> Result:
    """Measure forward and backward passes next to a matrix product, ours and transformers' alone."""
    subject, scale = bench.subject, bench.scale
    subject.execute()
    rows = []
    for budget in scale.budgets:
        pack = next(packs(subject, subject.stage(2, batch_size=1, max_tokens=budget)))
        batch = subject.batch(pack)
        plain = _PlainStep(subject, batch)
        works = {"ours": functools.partial(_gradients, subject, batch), "plain": plain.run}
        counts = {"ours": subject.flops(batch).total, "plain": plain.flops}
        shares: defaultdict[str, list[float]] = defaultdict(list)
        speeds, peaks, seconds = [], [], []
        try:
            for repeat in range(-1, scale.repeats):
                peak = bench.matmul_flops()
                found = bench.in_turns(works, repeat)
                peak = (peak + bench.matmul_flops()) / 2
                if repeat < 0:
                    continue
                peaks.append(peak)
                seconds.append(found["ours"])
                speeds.append(counts["ours"] / found["ours"])
                for name in works:
                    shares[name].append(counts[name] / found[name] / peak)
        except torch.OutOfMemoryError:
            _free(subject)
            rows.append({"positions": len(batch["order"]), "failed": "out of memory"})
            continue
        rows.append(
            {
                "positions": len(batch["order"]),
                "n_clips": len(pack),
                "tflop": counts["ours"] / 1e12,
                "seconds": middle(seconds),
                "tflops": middle(speeds) / 1e12,
                "matmul_tflops": middle(peaks) / 1e12,
                "mfu": middle(shares["ours"]),
                "plain_mfu": middle(shares["plain"]),
                "ours_to_plain": paired(shares["ours"], shares["plain"]),
            }
        )
        bench.profiles["mfu"] = works["ours"]
    subject.optimizer.zero_grad(set_to_none=True)
    return {"matmul": scale.matmul, "rows": rows}


def _gradients(subject: Subject, batch: PrefixBatch) -> None:
    subject.loss(batch).backward()
    subject.optimizer.zero_grad(set_to_none=True)


class _PlainStep:
    """The same language model by transformers and peft alone: rows of one length, no padding."""

    def __init__(self, subject: Subject, batch: PrefixBatch) -> None:
        self._subject = subject
        n_rows = len(batch["tokens"]["audio"])
        length = len(batch["order"]) // n_rows
        self._keep = max(1, len(batch["predict"]) // n_rows)
        shape = (n_rows, length, subject.shape.width)
        dtype = getattr(torch, subject.scale.dtype)
        self._given = torch.randn(shape, device=subject.device, dtype=dtype)
        size = (n_rows * self._keep,)
        self._targets = torch.randint(subject.vocabulary, size, device=subject.device)
        pairs = n_rows * train_flops.n_pairs([(0, length, 0, 0)])
        counted = train_flops.llm(subject.shape, n_rows * length, pairs, n_rows * self._keep)
        self.flops = counted.total

    def run(self) -> None:
        """Compute gradients."""
        subject = self._subject
        given = self._given.detach().requires_grad_()
        with subject.precision(), attention_of(subject.base, "sdpa"):
            output: Any = subject.model.llm(
                inputs_embeds=given, use_cache=False, logits_to_keep=self._keep
            )
        logits = output.logits.float().flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, self._targets).backward()
        subject.optimizer.zero_grad(set_to_none=True)


def _free(subject: Subject) -> None:
    subject.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- section: memory


def memory(bench: Bench) -> Result:
    """Measure the peak of a step of one clip, with and without checkpointed activations."""
    rows = []
    for is_checkpointed in (False, True):
        if bench.device == "cuda":
            row = _gpu_peak(bench, is_checkpointed)
        else:
            row = _in_child(_cpu_peak, bench.scale.is_quick, is_checkpointed)
        rows.append({"checkpointed": is_checkpointed, **row})
    return {"rows": rows}


def _gpu_peak(bench: Bench, is_checkpointed: bool) -> Result:
    subject = bench.subject
    subject.execute(checkpoint_activations=is_checkpointed)
    batch = subject.batch(next(packs(subject, subject.stage(2, batch_size=1))))
    subject.step(batch)
    _free(subject)
    torch.cuda.reset_peak_memory_stats()
    seconds = bench.timed(lambda: subject.step(batch))
    subject.execute()
    return {
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "weights_gib": _weights_gib(subject),
        "positions": len(batch["order"]),
        "step_s": seconds,
    }


def _weights_gib(subject: Subject) -> float:
    return sum(p.nbytes for p in subject.model.parameters()) / 2**30


def _cpu_peak(is_quick: bool, is_checkpointed: bool) -> Result:
    """Take one step at full size; this process is fresh."""
    scale = replace(QUICK_SCALE if is_quick else FULL_SCALE, n_clips=2)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(scale, "cpu", Path(folder), Path(folder))
        subject = bench.subject
        subject.execute(checkpoint_activations=is_checkpointed)
        batch = subject.batch(next(packs(subject, subject.stage(2, batch_size=1))))
        built_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds = bench.timed(lambda: subject.step(batch))
        # In KiB on Linux, and it grows only.
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "peak_gib": peak_kib / 2**20,
            "built_gib": built_kib / 2**20,
            "weights_gib": _weights_gib(subject),
            "positions": len(batch["order"]),
            "step_s": seconds,
        }


def _in_child(work: Callable[..., Result], *arguments: Any) -> Result:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(theirs, work, arguments))
    child.start()
    theirs.close()
    try:
        result: Result = ours.recv()
    except EOFError:
        result = {"failed": "its process was killed"}
    child.join()
    return result


def _call(pipe: Any, work: Callable[..., Result], arguments: tuple[Any, ...]) -> None:
    pipe.send(work(*arguments))


# ---------------------------------------------------------------- section: execution


def execution(bench: Bench) -> Result:
    """Go through batch sizes and ways of execution on a GPU."""
    subject, rows = bench.subject, []
    ways = [
        {"checkpoint_activations": checkpoint, "compile": compiled}
        for compiled in (False, True)
        for checkpoint in (False, True)
    ]
    batches = {
        budget: [
            subject.batch(pack)
            for pack in itertools.islice(
                packs(subject, subject.stage(2, batch_size=1, max_tokens=budget)), 6
            )
        ]
        for budget in bench.scale.budgets
    }
    for way in ways:
        for budget, given in batches.items():
            row: Result = {"budget": named(budget), "how": _in_words(way), **way}
            rows.append(row)
            if time.monotonic() - bench.began_s > GPU_LIMIT_S:
                row["failed"] = "no time left"
                continue
            subject.execute(**way)
            try:
                row |= _speed(bench, given)
            except torch.OutOfMemoryError:
                row["failed"] = "out of memory"
            except Exception as error:  # noqa: BLE001 - compilation has many ways to fail
                traceback.print_exc()
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            _free(subject)
            done = (
                row.get("failed") or f"{row['samples_per_s']:.2f} samples/s, MFU {row['mfu']:.2f}"
            )
            say(f"execution: {row['budget']}, {row['how']}: {done}")
    subject.execute()
    return {"n_samples": PAPER_SAMPLES, "rows": rows}


def _in_words(way: dict[str, bool]) -> str:
    words = ("checkpointed",) * way["checkpoint_activations"] + ("compiled",) * way["compile"]
    return " and ".join(words) or "plain"


def _speed(bench: Bench, batches: Sequence[PrefixBatch]) -> Result:
    """Return the speed of optimizer steps from batches in memory."""
    subject = bench.subject
    began_s = time.perf_counter()
    for batch in batches[:2]:  # compiles, allocates
        subject.step(batch)
    bench.synchronize()
    warm_up_s = time.perf_counter() - began_s
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    peaks, seconds = [], []
    for batch in batches:
        peaks.append(bench.matmul_flops())
        seconds.append(bench.timed(functools.partial(subject.step, batch)))
    n_samples = sum(len(batch["uids"]) for batch in batches)
    n_flops = sum(subject.flops(batch).total for batch in batches)
    rate, speed = n_samples / sum(seconds), n_flops / sum(seconds)
    peak_bytes = torch.cuda.max_memory_allocated() if bench.device == "cuda" else 0
    return {
        "warm_up_s": warm_up_s,
        "step_s": middle(seconds),
        "positions": middle(len(batch["order"]) for batch in batches),
        "samples_per_s": rate,
        "tflops": speed / 1e12,
        "matmul_tflops": middle(peaks) / 1e12,
        "mfu": speed / middle(peaks),
        "peak_gib": peak_bytes / 2**30,
        "hours_1": PAPER_SAMPLES / rate / 3600,
        "hours_4": PAPER_SAMPLES / rate / 3600 / 4,
    }
