"""What extraction costs beside decoding and encoding, as ratios of measurements of one run.

    python benchmarks/extract.py [--work DIR] [--only overhead,streams] [--quick] [--device cuda]
        [--json F] [--costs F] [--plot F.svg]

- overhead: `emocache extract` with a worker for each core, next to the CPU time that decoding and
  encoding its clips take one after the other in a single thread, divided by the number of cores.
- streams: three streams in one pass, next to one decoding plus the encoders' own times, and next to
  three passes. On one core, so that nothing is hidden behind something else.
- batching: clips encoded together next to one at a time, for each kind of encoder: speed, and by how
  much the tokens differ. What size suits `extract.config.CPU_BATCH_TOKENS`?
- resume: the command on a store that lacks nothing, and a plan of a large corpus.
- device: speed of single encoders and of a worker on `--device`, achieved FLOP/s, and how many cores
  must decode to keep it busy. At full size on CUDA only.

Encoders have random weights, in files as upstream publishes them. Clips are those of `--clips` and
generated ones. `--quick` goes through everything in a minute; its figures mean nothing. What is made
and could be used again stays in `--work`. `--costs` writes what `cluster_model.py` reads.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

# Ahead of this folder, in which `extract` is this file.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from encoders import FULL, MIDDLE, TINY, Networks

from cache.clip import Clip, Record
from cache.encoders import Encoder, WhisperEncoder
from cache.layout import CLIPS_PER_SHARD, arrays
from cache.spec import TokenSpec
from extract.config import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, Precision, n_cores
from extract.tiny.made_up import checkpoint_path, of_one_width, write_checkpoint
from extract.workers.unit import tokens_per_clip

if TYPE_CHECKING:
    from threading import Barrier

    from cache.manifest import Manifest
    from extract.encoders.bank import EncoderBank, EncoderInput
    from extract.jobs.job import Job, Receipt

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CLIPS = ROOT.parent / "shared" / "clips"
SECTIONS = ("overhead", "streams", "batching", "resume", "device")
START_LIMIT_S = 600.0
"""Longest wait of children for one another."""
CANDIDATE_TOKENS = tuple(2**power for power in range(9, 16))
"""Networks of a batch among which one is recommended."""
NEAR_BEST = 0.98
"""A smaller batch is as good as the best if it is this fast."""
DATASHEET_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16, as NVIDIA states it for the SXM modules and the L40S."""

Result = dict[str, Any]
console = Console(width=150)
progress = Console(stderr=True)


# ---------------------------------------------------------------- how much of everything


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    networks: Networks
    n_clips: int
    max_real: int
    unit_clips: int
    encode_every: int
    """Every so many-th clip is encoded to learn the encoders' own times."""
    stream_clips: int
    batch_clips: int
    batch_sizes: tuple[int, ...]
    batch_width: int
    batch_heads: int
    repeats: int
    n_finished: int
    """Clips of the store that lacks nothing."""
    n_planned: int
    device_clips: int
    device_sizes: tuple[int, ...]
    """Clips encoded together."""


TRUE_SCALE = Scale(
    networks=MIDDLE,
    n_clips=200,
    max_real=100,
    unit_clips=CLIPS_PER_SHARD,
    encode_every=4,
    stream_clips=20,
    batch_clips=16,
    batch_sizes=(1, 2, 4, 8, 16),
    batch_width=384,
    batch_heads=6,
    repeats=3,
    n_finished=10_000,
    n_planned=130_000,
    device_clips=16,
    device_sizes=(1, 2, 4, 8),
)
QUICK_SCALE = Scale(
    networks=TINY,
    n_clips=6,
    max_real=2,
    unit_clips=3,
    encode_every=2,
    stream_clips=2,
    batch_clips=3,
    batch_sizes=(1, 3),
    batch_width=64,
    batch_heads=4,
    repeats=1,
    n_finished=320,
    n_planned=2_000,
    device_clips=3,
    device_sizes=(1, 2),
)


# ---------------------------------------------------------------- clips, weights, processes


@dataclass(frozen=True)
class Subject:
    """Clips, and the encoders that they are encoded with."""

    manifest: Path
    specs: tuple[TokenSpec, ...]
    weights: Mapping[str, Path] = field(default_factory=dict)
    """Kind of encoder -> checkpoint."""
    device: str = "cpu"
    precision: Precision = "float32"

    def read(self) -> Manifest:
        """Return the manifest."""
        from cache.manifest import read_manifest

        return read_manifest(self.manifest)

    def media_root(self) -> Path:
        """Return the folder of the clips."""
        from cache.manifest import media_root

        return media_root(self.read(), self.manifest)

    def bank(self, specs: Sequence[TokenSpec] | None = None) -> EncoderBank:
        """Return the encoders, or some of them."""
        from extract.encoders.bank import EncoderBank

        wanted = self.specs if specs is None else specs
        kinds: set[str] = {spec.encoder.kind for spec in wanted}
        weights = {kind: path for kind, path in self.weights.items() if kind in kinds}
        return EncoderBank(wanted, weights, self.device, self.precision)

    @property
    def batch_tokens(self) -> int:
        """What a worker takes by default."""
        return CPU_BATCH_TOKENS if self.device == "cpu" else GPU_BATCH_TOKENS

    def batch_clips(self, spec: TokenSpec) -> int:
        """Return how many clips a worker encodes together."""
        return max(1, self.batch_tokens // tokens_per_clip(spec))


def prepare(
    work: Path, clips: Path, scale: Scale, encoders: Sequence[Encoder], device: str = "cpu"
) -> tuple[Path, dict[str, Path]]:
    """Write clips and random weights, once; return the manifest, and checkpoints by kind of encoder."""
    from extract.index import MEDIA_SUFFIXES

    found = clips.glob("*") if clips.is_dir() else ()
    media = [path for path in found if path.suffix.lower() in MEDIA_SUFFIXES]
    real = sorted(media, key=lambda path: (path.stat().st_size, path.name))[: scale.max_real]
    manifest = work / f"corpus-{scale.n_clips}-{len(real)}" / "manifest.parquet"
    if not manifest.exists():
        in_child(write_corpus, manifest, real, scale.n_clips)
    dtype = "float32" if device == "cpu" else "float16"
    folder = work / f"weights-{dtype}"
    if not all(checkpoint_path(encoder, folder).exists() for encoder in encoders):
        in_child(write_checkpoints, encoders, folder, device, dtype)
    return manifest, {e.kind: checkpoint_path(e, folder) for e in encoders}


def write_corpus(manifest: Path, real: Sequence[Path], n_clips: int) -> None:
    """Write real and generated clips beside a manifest in which they are mixed."""
    from cache.manifest import Manifest, write_manifest
    from extract.corpora.demo import write_demo_corpus
    from extract.index import index_folder

    root = manifest.parent
    (root / "real").mkdir(parents=True, exist_ok=True)
    for path in real:
        shutil.copyfile(path, root / "real" / path.name)
    write_demo_corpus(root / "generated", n_clips=n_clips - len(real))
    indexed, _ = index_folder(root, manifest, corpus="benchmark")
    records = tuple(sorted(indexed.records, key=lambda record: record.sha256))
    write_manifest(manifest, Manifest(header=indexed.header, records=records))


def write_checkpoints(encoders: Sequence[Encoder], folder: Path, device: str, dtype: str) -> None:
    """Write random weights of several encoders."""
    for encoder in encoders:
        write_checkpoint(encoder, folder, device=device, dtype=dtype)


def subject_of(
    work: Path, clips: Path, scale: Scale, networks: Networks, device: str = "cpu"
) -> Subject:
    """Return clips and the three streams' encoders."""
    encoders = (networks.whisper, networks.eva)
    manifest, weights = prepare(work, clips, scale, encoders, device)
    precision: Precision = "float32" if device == "cpu" else "bfloat16"
    return Subject(manifest, networks.specs(), weights, device, precision)


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in a fresh process and return its result."""
    return in_children(work, [arguments])[0]


def in_children(work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call `work` in as many fresh processes at once as there are arguments.

    Raises:
        RuntimeError: One raised, or was killed.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    for given in arguments:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_call, args=(theirs, work, given))
        child.start()
        theirs.close()
        started.append((child, ours))
    results = []
    for child, pipe in started:
        try:
            done, result = pipe.recv()
        except EOFError:
            done, result = False, "its process was killed"
        child.join()
        if not done:
            raise RuntimeError(f"{work.__name__}: {result}")
        results.append(result)
    return results


def _call(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = True, work(*arguments)
    except Exception as error:  # noqa: BLE001 - it is raised again in the parent, as text
        traceback.print_exc()
        answer = False, f"{type(error).__name__}: {error}"
    pipe.send(answer)


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    began_s: float
    """Unix time, as is `ended_s`."""
    ended_s: float
    peak_bytes: int
    """Of its largest process; this one's if that is larger, so it imports no torch."""
    cpu_s: float
    """Of all its processes that it waited for."""
    output: str

    @property
    def wall_s(self) -> float:
        """How long it took."""
        return self.ended_s - self.began_s


def run_command(words: Sequence[str | Path], allowed: Sequence[int] = (0,)) -> Ran:
    """Run `emocache` in a process of its own.

    Raises:
        RuntimeError: It ended with an exit code that is not allowed; says what it printed last.
    """
    command = [sys.executable, "-m", "emocache", *map(str, words)]
    with tempfile.TemporaryFile() as file:
        began_s = time.time()
        child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        ended_s = time.time()
        child.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read().decode(errors="replace")
    if child.returncode not in allowed:
        raise RuntimeError(f"emocache {words[0]} ended with {child.returncode}: {output[-2000:]}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Ran(began_s, ended_s, usage.ru_maxrss * 1024, cpu_s, output)


def middle(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


# ---------------------------------------------------------------- what clips cost by themselves


@dataclass
class Decoded:
    """Clips that were decoded in this process."""

    cpu_s: dict[str, float]
    """uid -> CPU time."""
    streams: dict[str, tuple[str, ...]]
    """uid -> labels of the specs whose stream the clip has."""
    given: dict[str, list[EncoderInput]]
    """Label -> what the encoder gets, of the clips that are to be encoded."""


def decode_clips(
    subject: Subject,
    bank: EncoderBank,
    rows: Sequence[int],
    every: int,
    barrier: Barrier | None = None,
) -> Decoded:
    """Decode clips one after the other; keep the inputs of every so many-th."""
    from extract.inputs import ClipInputs, prepare_inputs, request_of
    from extract.plan import unique_labels
    from extract.workers.results import encoder_input

    records, root = subject.read().records, subject.media_root()
    labels = unique_labels(bank.specs)
    found = Decoded({}, {}, {label: [] for label in labels})

    def inputs_of(record: Record) -> ClipInputs:
        requests = [request_of(spec, record) for spec in bank.specs]
        return prepare_inputs(root / record.media, record.sha256, record.media, requests)

    inputs_of(records[rows[0]])  # imports
    if barrier is not None:
        barrier.wait(START_LIMIT_S)
    for number, row in enumerate(rows):
        record = records[row]
        inputs = inputs_of(record)
        found.cpu_s[record.uid] = inputs.decode_cpu_s
        ok = [
            (x, stream)
            for x, stream in zip(labels, inputs.streams, strict=True)
            if stream.status == "ok"
        ]
        found.streams[record.uid] = tuple(label for label, _ in ok)
        if number % every == 0:
            for label, stream in ok:
                found.given[label].append(encoder_input(inputs, stream))
    return found


def whole_clips(records: Sequence[Record], n_clips: int) -> list[int]:
    """Return the rows of clips with sound and film, up to 15 s long; every other one real, if possible."""
    whole = [
        row
        for row, record in enumerate(records)
        if record.seen_clip.has_audio
        and record.seen_clip.has_video
        and (record.seen_clip.duration_s or 0) <= 15
    ]
    real = [row for row in whole if is_real(records[row].uid)]
    made = [row for row in whole if not is_real(records[row].uid)]
    pairs = itertools.zip_longest(real, made)
    return [row for pair in pairs for row in pair if row is not None][:n_clips]


def is_real(uid: str) -> bool:
    """True for a clip that was not generated."""
    return "/real/" in uid


def clip_costs(
    subject: Subject, rows: Sequence[int], every: int, barrier: Barrier | None = None
) -> Result:
    """Return the CPU time of decoding clips, and of encoding some of them in a worker's batches.

    One thread, nothing else in this process.
    """
    import torch

    from extract.plan import unique_labels

    torch.set_num_threads(1)
    bank = subject.bank()
    decoded = decode_clips(subject, bank, rows, every, barrier)
    encode_s = {}
    for spec, label in zip(bank.specs, unique_labels(bank.specs), strict=True):
        given, size = decoded.given[label], subject.batch_clips(spec)
        if not given:
            continue
        bank.encode(spec, given[:size])  # loads, allocates
        began_s = time.process_time()
        encode_batches(bank, spec, given, size)
        encode_s[label] = (time.process_time() - began_s) / len(given)
    return {"decode_s": decoded.cpu_s, "streams": decoded.streams, "encode_s": encode_s}


def encode_batches(
    bank: EncoderBank, spec: TokenSpec, given: Sequence[EncoderInput], size: int
) -> list[np.ndarray[Any, Any]]:
    """Encode clips, `size` at a time.

    Raises:
        RuntimeError: A clip cannot be encoded.
    """
    found = []
    for start in range(0, len(given), size):
        for tokens in bank.encode(spec, given[start : start + size]):
            if not isinstance(tokens, np.ndarray):
                raise RuntimeError(f"a clip cannot be encoded: {tokens}")
            found.append(tokens)
    return found


def merged(parts: Sequence[Result]) -> Result:
    """Return the costs that several processes measured on parts of the clips."""
    encode: defaultdict[str, list[float]] = defaultdict(list)
    for part in parts:
        for label, seconds in part["encode_s"].items():
            encode[label].append(seconds)
    return {
        "decode_s": {uid: s for part in parts for uid, s in part["decode_s"].items()},
        "streams": {uid: s for part in parts for uid, s in part["streams"].items()},
        "encode_s": {label: statistics.mean(seconds) for label, seconds in encode.items()},
    }


def totals(costs: Result) -> dict[str, float]:
    """Return what all clips take: decoding, and each encoder."""
    total = {"decoding": sum(costs["decode_s"].values())}
    for label, seconds in costs["encode_s"].items():
        total[label] = seconds * sum(label in labels for labels in costs["streams"].values())
    return total


# ---------------------------------------------------------------- section: overhead


def overhead(work: Path, clips: Path, scale: Scale, n_workers: int) -> Result:
    """Compare `emocache extract` with the CPU time of decoding and encoding."""
    subject = subject_of(work, clips, scale, scale.networks)
    rows = range(len(subject.read()))
    alone = in_child(clip_costs, subject, rows, scale.encode_every)
    store = work / "store-overhead"
    shutil.rmtree(store, ignore_errors=True)
    weights = [f"--encoder-weights={kind}={path}" for kind, path in subject.weights.items()]
    ran = run_command(
        [
            *("extract", "v2", *scale.networks.settings(), *weights),
            *("--manifest", subject.manifest, "--store", store),
            *("--engine", "local", "--workers", str(n_workers)),
            *("--unit-clips", str(scale.unit_clips)),
        ],
        allowed=(0, 1),  # 1: some clips could not be decoded
    )
    busy = alone if scale is QUICK_SCALE else costs_together(subject, scale.encode_every, n_workers)
    need_s = {name: seconds / n_workers for name, seconds in totals(alone).items()}
    need_busy_s = {name: seconds / n_workers for name, seconds in totals(busy).items()}
    took = timeline(store, ran)
    in_units_s = took["last_s"] - took["first_s"]
    ideal_s, ideal_busy_s = sum(need_s.values()), sum(need_busy_s.values())
    return {
        "networks": scale.networks.name,
        "n_clips": len(rows),
        "n_real": sum(is_real(record.uid) for record in subject.read().records),
        "n_workers": n_workers,
        "wall_s": ran.wall_s,
        "cpu_s": ran.cpu_s,
        "need_s": need_s,
        "need_busy_s": need_busy_s,
        "ratio": ran.wall_s / ideal_s,
        "ratio_without_start": in_units_s / ideal_s,
        "ratio_busy": ran.wall_s / ideal_busy_s,
        "ratio_busy_without_start": in_units_s / ideal_busy_s,
        "timeline": took,
        "alone": alone,
        "stores": stored(store, subject),
    }


def costs_together(subject: Subject, every: int, n_processes: int) -> Result:
    """Measure what clips cost while all cores do so: they may share memory, caches, even circuits."""
    rows = range(len(subject.read()))
    barrier = multiprocessing.get_context("spawn").Barrier(n_processes)
    parts = [(subject, rows[n::n_processes], every, barrier) for n in range(n_processes)]
    return merged(in_children(clip_costs, parts))


def timeline(store: Path, ran: Ran) -> Result:
    """Return where the time of an extraction went, in seconds of its wall time.

    Of each worker: until its first unit, with its units, after its last one. Means over the workers.
    """
    from cache.store import TokenStore
    from extract.jobs.job import Job

    (job,) = Job.latest(TokenStore.open(store).storage)
    receipts = job.receipts()
    last_s = max(receipt.ended_s for receipt in receipts)
    states = [state for state, _ in job.workers()]
    shares: defaultdict[str, float] = defaultdict(float)
    firsts, write_s, n_clips = [], 0.0, 0
    for state in states:
        own = [receipt for receipt in receipts if receipt.worker_id == state.worker_id]
        if not own:  # others had taken all units before it came
            first_s = own_last_s = min(state.started_s, last_s)
        else:
            first_s = min(r.started_s for r in own)
            own_last_s = max(r.ended_s for r in own)
            firsts.append(first_s)
        known_s = 0.0
        for receipt in own:
            for label, seconds in receipt.seconds.encode_s.items():
                shares[label] += seconds
                known_s += seconds
            shares["waiting for decoding"] += receipt.seconds.decode_wait_s
            known_s += receipt.seconds.decode_wait_s
            write_s += receipt.seconds.write_s
            n_clips += receipt.n_clips
        shares["start-up"] += first_s - ran.began_s
        shares["claims, messages, waiting for the disk"] += own_last_s - first_s - known_s
        shares["waiting for the last worker"] += last_s - own_last_s
        shares["ending"] += ran.ended_s - last_s
    return {
        "shares_s": {name: seconds / len(states) for name, seconds in shares.items()},
        "first_s": min(firsts),
        "last_s": last_s,
        "start_s": statistics.mean(firsts) - ran.began_s,
        "write_s": write_s / len(states),
        "n_worked": n_clips,
    }


def stored(folder: Path, subject: Subject) -> list[Result]:
    """Return what a clip's tokens take on disk, for each spec of a store, and a worker's batch."""
    from cache.store import TokenStore

    store = TokenStore.open(folder)
    found = []
    for spec in store.specs.values():
        commits = list(store.commits(spec))
        n_clips = sum(len(commit.clips) for commit in commits)
        n_bytes = sum(commit.n_bytes for commit in commits)
        found.append(
            {
                "name": spec.stream,
                "bytes_per_clip": n_bytes // n_clips,
                "n_arrays": len(arrays(spec)),
                "batch_clips": subject.batch_clips(spec),
            }
        )
    return found


# ---------------------------------------------------------------- section: streams


def streams(work: Path, clips: Path, scale: Scale) -> Result:
    """Compare one pass with its parts, and with three passes."""
    subject = subject_of(work, clips, scale, scale.networks)
    repeats = in_child(
        stream_passes, subject, scale.stream_clips, scale.repeats, work / "store-streams"
    )
    return {
        "networks": scale.networks.name,
        "n_clips": scale.stream_clips,
        "repeats": repeats,
        "to_parts": middle(r["one_s"] / sum(r["parts_s"].values()) for r in repeats),
        "to_three_passes": middle(r["one_s"] / sum(r["three_s"].values()) for r in repeats),
    }


def stream_passes(subject: Subject, n_clips: int, n_repeats: int, folder: Path) -> list[Result]:
    """Encode clips that have all streams, in one pass and in three; on one core alone."""
    from extract.plan import unique_labels

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    records = subject.read().records
    rows = whole_clips(records, n_clips)
    chosen = tuple(records[row] for row in rows)
    found = []
    for _ in range(n_repeats):
        parts_s = totals(clip_costs(subject, rows, 1))
        one_s = pass_s(subject, subject.specs, chosen, folder)
        labels = unique_labels(subject.specs)
        three_s = {
            label: pass_s(subject, [spec], chosen, folder)
            for spec, label in zip(subject.specs, labels, strict=True)
        }
        found.append({"parts_s": parts_s, "one_s": one_s, "three_s": three_s})
    return found


def pass_s(
    subject: Subject, specs: Sequence[TokenSpec], records: Sequence[Record], folder: Path
) -> float:
    """Extract into a new store; return the seconds from the first claim to the last receipt."""
    _, receipts = extract_here(subject, specs, records, folder)
    return span_s(receipts)


def span_s(receipts: Sequence[Receipt]) -> float:
    """Return the seconds from the first claim to the last receipt: loading weights does not count."""
    return max(r.ended_s for r in receipts) - min(r.started_s for r in receipts)


def extract_here(
    subject: Subject,
    specs: Sequence[TokenSpec],
    records: Sequence[Record],
    folder: Path,
    **options: Any,
) -> tuple[Job, list[Receipt]]:
    """Extract into a new store, in this process; return the job and its receipts."""
    from cache.store import TokenStore
    from extract.jobs.job import Job
    from extract.plan import make_plan
    from extract.run import extract

    shutil.rmtree(folder, ignore_errors=True)
    store, bank = TokenStore.open_or_create(folder), subject.bank(specs)
    plan = make_plan(records, bank.specs, store)
    options |= {"device": subject.device, "precision": subject.precision}
    extract(plan, records, bank, store, subject.media_root(), **options)
    (job,) = Job.latest(store.storage)
    return job, job.receipts()


# ---------------------------------------------------------------- section: batching


def batching(work: Path, clips: Path, scale: Scale, device: str) -> Result:
    """Compare batches of several sizes with one clip at a time."""
    kinds = of_one_width(scale.batch_width, scale.batch_heads)
    encoders = [spec.encoder for spec in kinds.values()]
    manifest, weights = prepare(work, clips, scale, encoders)
    precisions: list[Precision] = ["float32"] if device == "cpu" else ["float32", "bfloat16"]
    subject = Subject(manifest, tuple(kinds.values()), weights, device)
    found = [
        row
        for precision in precisions
        for row in in_child(sweep, replace(subject, precision=precision), tuple(kinds), scale)
    ]
    return {
        "width": scale.batch_width,
        "n_clips": scale.batch_clips,
        "rows": found,
        "by_tokens": by_tokens([row for row in found if row["precision"] == "float32"]),
    }


def sweep(subject: Subject, names: Sequence[str], scale: Scale) -> list[Result]:
    """Encode the same clips in batches of several sizes, in a worker's number of threads."""
    import torch

    torch.set_num_threads(max(1, n_cores() - 1))
    bank = subject.bank()
    rows = whole_clips(subject.read().records, scale.batch_clips)
    decoded = decode_clips(subject, bank, rows, 1)
    found = []
    for spec, name, given in zip(bank.specs, names, decoded.given.values(), strict=True):
        single = encode_batches(bank, spec, given, 1)
        rates: defaultdict[int, list[float]] = defaultdict(list)
        differs: dict[int, tuple[float, float]] = {}
        for repeat in range(scale.repeats):
            sizes = random.Random(repeat).sample(scale.batch_sizes, len(scale.batch_sizes))
            for size in sizes:
                if size > len(given):
                    continue
                began_s = time.perf_counter()
                together = encode_batches(bank, spec, given, size)
                rates[size].append(len(given) / (time.perf_counter() - began_s))
                differs[size] = difference(single, together)
        one = middle(rates[1])
        found += [
            {
                "kind": name,
                "precision": subject.precision,
                "tokens_per_clip": tokens_per_clip(spec),
                "size": size,
                "clips_per_s": middle(rates[size]),
                "ratio": middle(rates[size]) / one,
                "max_difference": differs[size][0],
                "relative_l2": differs[size][1],
            }
            for size in sorted(rates)
        ]
    return found


def difference(
    one: Sequence[np.ndarray[Any, Any]], many: Sequence[np.ndarray[Any, Any]]
) -> tuple[float, float]:
    """Return the largest difference of a number, and the largest |a - b| / |a| of a clip."""
    largest = max(float(np.abs(a - b).max()) for a, b in zip(one, many, strict=True))
    relative = max(
        float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(one, many, strict=True)
    )
    return largest, relative


def by_tokens(rows: Sequence[Result]) -> Result:
    """Return how near to its best speed each number of tokens in a batch brings the encoders.

    The geometric mean over the kinds of encoder of (speed at the batch size that so many tokens
    allow) / (speed at the kind's best size). Recommended is the smallest number that is near the
    best: small batches need less memory, and lose less where a worker dies.
    """
    kinds: defaultdict[str, dict[int, Result]] = defaultdict(dict)
    for row in rows:
        kinds[row["kind"]][row["size"]] = row
    near = {}
    for tokens in CANDIDATE_TOKENS:
        logs = []
        for sizes in kinds.values():
            allowed = max(1, tokens // sizes[1]["tokens_per_clip"])
            speed = sizes[max(size for size in sizes if size <= allowed)]["clips_per_s"]
            logs.append(math.log(speed / max(row["clips_per_s"] for row in sizes.values())))
        near[tokens] = math.exp(statistics.mean(logs))
    best = max(near.values())
    recommended = min(tokens for tokens, speed in near.items() if speed >= NEAR_BEST * best)
    return {"near_best": near, "recommended": recommended, "now": CPU_BATCH_TOKENS}


# ---------------------------------------------------------------- section: resume

SMALL = (
    "tokens.image.pixels.size_px=28",
    "tokens.video.pixels.size_px=28",
    "tokens.video.frames.n_frames=4",
)
"""Settings of the demo preset that make its tokens small: 2 x 2 patches, 4 frames."""


def resume(work: Path, scale: Scale) -> Result:
    """Time the command where nothing is to be done, and the plan of a large corpus."""
    folder = work / f"finished-{scale.n_finished}"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        in_child(write_finished, folder, scale.n_finished)
    planned = folder / f"planned-{scale.n_planned}.parquet"
    if not planned.exists():
        in_child(write_records, planned, scale.n_planned)

    def command(manifest: Path, *more: str) -> Ran:
        where = ("--manifest", manifest, "--store", folder / "store")
        return run_command(["extract", "demo", *SMALL, *where, *more])

    command(folder / "finished.parquet")  # remembers the checkpoints' digests
    finished = [command(folder / "finished.parquet") for _ in range(scale.repeats)]
    for ran in finished:
        if "nothing to do" not in ran.output:
            raise RuntimeError(f"there was something to do: {ran.output[-2000:]}")
    plans = [command(planned, "--plan", "--calibrate", "0") for _ in range(scale.repeats)]
    return {
        "n_finished": scale.n_finished,
        "n_planned": scale.n_planned,
        "again_s": [ran.wall_s for ran in finished],
        "again_bytes": max(ran.peak_bytes for ran in finished),
        "plan_s": [ran.wall_s for ran in plans],
        "plan_bytes": max(ran.peak_bytes for ran in plans),
    }


def write_records(manifest: Path, n_clips: int) -> None:
    """Write a manifest of made-up clips. Their files are one and the same: nothing opens it."""
    from cache.manifest import Header, Manifest, write_manifest

    manifest.parent.mkdir(parents=True, exist_ok=True)
    (manifest.parent / "clip.mp4").touch()
    records = tuple(
        Record(
            uid=f"made-up/{n:06d}",
            media="clip.mp4",
            clip=Clip(
                sha256=hashlib.sha256(f"clip {n}".encode()).hexdigest(),
                n_bytes=100_000,
                duration_s=4.0,
                has_video=True,
                has_audio=True,
                has_image=True,
            ),
        )
        for n in range(n_clips)
    )
    write_manifest(manifest, Manifest(header=Header(media_root="."), records=records))


def write_finished(folder: Path, n_clips: int) -> None:
    """Write a store that holds the tokens of all clips of a manifest, small and random."""
    from cache.commit import ClipTokens, Status
    from cache.manifest import read_manifest
    from cache.store import TokenStore
    from eval.verbs.arguments import wanted
    from extract.encoders.bank import EncoderBank

    manifest = folder / "finished.parquet"
    write_records(manifest, n_clips)
    asked = wanted(["demo", *SMALL])
    bank = EncoderBank(asked.specs, asked.weights, names=asked.names)
    store = TokenStore.open_or_create(folder / "store")
    records = read_manifest(manifest).records
    rng = np.random.default_rng(0)
    for spec in bank.specs:
        shape = (2, *spec.max_shape[1:]) if spec.stream == "audio" else spec.max_shape
        n_frames = spec.frames.n_frames if spec.frames is not None else 0
        places = tuple(range(n_frames))
        times_s = tuple(n / 15 for n in places)
        for start in range(0, n_clips, CLIPS_PER_SHARD):
            unit = [
                ClipTokens(
                    record.token_key(spec),
                    Status.OK,
                    rng.standard_normal(shape, dtype=np.float32),
                    frame_index=places,
                    frame_pts_s=times_s,
                )
                for record in records[start : start + CLIPS_PER_SHARD]
            ]
            store.commit(spec, unit, {"made": "up"})
        store.write_snapshot(spec)
    (folder / "done").touch()


# ---------------------------------------------------------------- section: device


def device_section(work: Path, clips: Path, scale: Scale, device: str) -> Result:
    """Measure encoders and a worker on a device: at full size on a GPU, else at the small size."""
    on_gpu = device != "cpu"
    if on_gpu and scale is TRUE_SCALE:
        networks = FULL
        scale = replace(scale, device_clips=scale.n_clips, device_sizes=(1, 2, 4, 8, 16, 32, 64))
    else:
        networks = scale.networks
    subject = subject_of(work, clips, scale, networks, device)
    found: Result = in_child(device_costs, subject, scale, work / "store-device")
    about = {"networks": networks.name, "is_full_size": networks is FULL, "device": device}
    return {**about, **found}


def device_costs(subject: Subject, scale: Scale, folder: Path) -> Result:
    """Time each encoder by batch size, count its operations, then run a worker."""
    import torch

    n_decoders = max(1, n_cores() - 1)
    if subject.device == "cpu":  # as the worker below does
        torch.set_num_threads(max(1, n_cores() - n_decoders))
    records = subject.read().records
    rows = [i * len(records) // scale.device_clips for i in range(scale.device_clips)]
    bank = subject.bank()
    decoded = decode_clips(subject, bank, rows, 1)
    peak = matmul_flops(subject)
    encoders = [
        encoder_speed(subject, bank, spec, given, scale, peak)
        for spec, given in zip(bank.specs, decoded.given.values(), strict=True)
    ]
    labels = list(decoded.given)
    del bank
    decoded.given.clear()
    chosen = tuple(records[row] for row in rows)
    with _GpuBusy(subject.device) as busy:
        job, receipts = extract_here(subject, subject.specs, chosen, folder, n_decoders=n_decoders)
    wall_s = span_s(receipts)
    encode_s = sum(sum(r.seconds.encode_s.values()) for r in receipts)
    n_clips = sum(r.n_clips for r in receipts)
    real = [s for uid, s in decoded.cpu_s.items() if is_real(uid)]
    made = [s for uid, s in decoded.cpu_s.items() if not is_real(uid)]
    return {
        "name": torch.cuda.get_device_name() if subject.device != "cpu" else "CPU",
        "precision": subject.precision,
        "n_clips": n_clips,
        "n_decoders": n_decoders,
        "matmul_flops": peak,
        "datasheet_flops": datasheet_flops(subject.device),
        "encoders": dict(zip(labels, encoders, strict=True)),
        "clips_per_s": n_clips / wall_s,
        "encode_share": encode_s / wall_s,
        "gpu_busy": busy.share,
        "decode_wait_share": sum(r.seconds.decode_wait_s for r in receipts) / wall_s,
        "encode_s": encode_s / n_clips,
        "decode_s": {
            name: statistics.mean(s) for name, s in (("real", real), ("generated", made)) if s
        },
        "alone": {
            "decode_s": decoded.cpu_s,
            "streams": decoded.streams,
            "encode_s": {x: e["at_default_s"] for x, e in zip(labels, encoders, strict=True)},
        },
        "start_s": min(r.started_s for r in receipts) - job.workers()[0][0].started_s,
        "stores": stored(folder, subject),
    }


def encoder_speed(
    subject: Subject,
    bank: EncoderBank,
    spec: TokenSpec,
    given: Sequence[EncoderInput],
    scale: Scale,
    peak: float,
) -> Result:
    """Time one encoder at several batch sizes, and count the operations of a clip."""
    from torch.utils.flop_counter import FlopCounterMode

    full = [one for one in given if len(set(one.pick)) == max(len(set(x.pick)) for x in given)]

    def clip_s(size: int) -> float:
        batch = list(itertools.islice(itertools.cycle(full), size))
        bank.encode(spec, batch)
        times_s = []
        for _ in range(scale.repeats):
            began_s = time.perf_counter()
            bank.encode(spec, batch)  # ends with a copy from the device, so it is complete
            times_s.append(time.perf_counter() - began_s)
        return middle(times_s) / size

    default = subject.batch_clips(spec)
    by_size = {size: clip_s(size) for size in sorted({*scale.device_sizes, default})}
    with FlopCounterMode(display=False) as counter:
        bank.encode(spec, full[:1])
    flops = counter.get_total_flops()
    best = min(by_size, key=lambda size: by_size[size])
    return {
        "flops": flops,
        "clip_s": by_size,
        "best_size": best,
        "default_size": default,
        "at_default_s": by_size[default],
        "host_s": host_s(spec, full[0]),
        "flops_per_s": flops / by_size[best],
        "of_matmul": flops / by_size[best] / peak,
    }


def host_s(spec: TokenSpec, given: EncoderInput) -> float:
    """Return the seconds in which the CPU prepares one clip's input; pictures cross as they are."""
    if not isinstance(spec.encoder, WhisperEncoder):
        return 0.0
    from extract.mel import log_mel

    encoder = spec.encoder
    times_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        log_mel(given.values, n_mels=encoder.n_mels, n_context=encoder.n_context)
        times_s.append(time.perf_counter() - began_s)
    return middle(times_s)


def matmul_flops(subject: Subject) -> float:
    """Return the FLOP/s of a large matrix product: what a device gives in practice."""
    import torch

    n = 8192 if subject.device != "cpu" else 1024
    a, b = (
        torch.randn(n, n, device=subject.device, dtype=getattr(torch, subject.precision))
        for _ in range(2)
    )
    times_s = []
    for _ in range(12):
        began_s = time.perf_counter()
        torch.mm(a, b)
        if subject.device != "cpu":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began_s)
    return 2 * float(n) ** 3 / middle(times_s[2:])


def datasheet_flops(device: str) -> float | None:
    """Return what the maker states for this GPU in bfloat16; None if it stands not in our table."""
    if device == "cpu":
        return None
    import torch

    name = torch.cuda.get_device_name()
    return next((flops for part, flops in DATASHEET_FLOPS.items() if part in name), None)


class _GpuBusy:
    """Samples how busy the GPU is while a block runs. Stays None without NVIDIA's library."""

    def __init__(self, device: str) -> None:
        self.share: float | None = None
        self._device = device
        self._ended = threading.Event()
        self._samples: list[int] = []
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        import torch

        while not self._ended.wait(0.2):
            try:
                self._samples.append(torch.cuda.utilization())
            except (ModuleNotFoundError, RuntimeError):  # no pynvml, or no such right
                return

    def __enter__(self) -> _GpuBusy:
        if self._device != "cpu":
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        while self._samples and self._samples[0] == 0:  # loading weights is not the worker's work
            del self._samples[0]
        if self._samples:
            self.share = statistics.mean(self._samples) / 100


# ---------------------------------------------------------------- what came out


def machine() -> Result:
    """Return what the figures depend on."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    versions = {}
    for package in ("torch", "timm", "transformers", "openai-whisper", "numpy", "distributed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": f"{n_cores()} x {cpu[0].split(': ')[1] if cpu else platform.machine()}",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": versions,
        "load_average": os.getloadavg(),
    }


def goals(found: Mapping[str, Result]) -> list[tuple[str, float, float]]:
    """Return (goal, upper bound, measured) of all that was measured."""
    rows = []
    if over := found.get("overhead"):
        rows.append(("extraction / ((decoding + encoding) / cores)", 1.10, over["ratio"]))
    if one := found.get("streams"):
        what = "three streams in one pass / (one decoding + the encoders)"
        rows.append((what, 1.05, one["to_parts"]))
    if again := found.get("resume"):
        plan = f"planning {again['n_planned']:,} clips"
        what = f"running a finished extraction of {again['n_finished']:,} clips again, s"
        rows += [
            (what, 5.0, middle(again["again_s"])),
            (f"{plan}, s", 10.0, middle(again["plan_s"])),
            (f"{plan}, peak GiB", 1.0, again["plan_bytes"] / 2**30),
        ]
    return rows


def table(title: str, *heads: str) -> Table:
    """Return an empty table; all columns but the first are numbers."""
    made = Table(title=title, title_justify="left", box=MARKDOWN)
    for number, head in enumerate(heads):
        made.add_column(head, justify="right" if number else "left")
    return made


def show(found: Mapping[str, Result], *, quick: bool) -> None:
    """Print all tables."""
    shows = {
        "overhead": show_overhead,
        "streams": show_streams,
        "batching": show_batching,
        "resume": show_resume,
        "device": show_device,
    }
    for name, show_section in shows.items():
        if name in found:
            console.print()
            show_section(found[name])
    made = table("Goals", "goal", "at most", "measured", "met")
    for what, bound, measured in goals(found):
        verdict = "too quick to tell" if quick else "met" if measured <= bound else "missed"
        made.add_row(what, f"{bound:g}", f"{measured:.3g}", verdict)
    if made.row_count:
        console.print()
        console.print(made)


def show_overhead(found: Result) -> None:
    """Print the section's tables."""
    n, wall_s = found["n_workers"], found["wall_s"]
    title = f"Overhead: {found['n_clips']} clips, {found['n_real']} of them real, {n} workers, "
    made = table(
        title + found["networks"], f"CPU time / {n}", "one process alone, s", "all cores busy, s"
    )
    for name, seconds in found["need_s"].items():
        made.add_row(name, f"{seconds:.1f}", f"{found['need_busy_s'][name]:.1f}")
    ideal = [sum(found[name].values()) for name in ("need_s", "need_busy_s")]
    made.add_row("together", *(f"{seconds:.1f}" for seconds in ideal))
    made.add_row("whole command / this", f"{found['ratio']:.3f}", f"{found['ratio_busy']:.3f}")
    made.add_row(
        "first claim to last receipt / this",
        f"{found['ratio_without_start']:.3f}",
        f"{found['ratio_busy_without_start']:.3f}",
    )
    console.print(made)
    made = table("Where the command's time went", "part", "s, mean of the workers", "share")
    for name, seconds in sorted(found["timeline"]["shares_s"].items(), key=lambda item: -item[1]):
        made.add_row(name, f"{seconds:.1f}", f"{100 * seconds / wall_s:.1f} %")
    made.add_row("together: the command", f"{wall_s:.1f}", "100 %")
    made.add_row("writing, in the background", f"{found['timeline']['write_s']:.1f}", "")
    made.add_row("CPU time of all processes / workers", f"{found['cpu_s'] / n:.1f}", "")
    console.print()
    console.print(made)


def show_streams(found: Result) -> None:
    """Print the section's table."""
    title = f"Streams: {found['n_clips']} clips, one core, {found['networks']}, s"
    made = table(
        title, "repeat", *found["repeats"][0]["parts_s"], "sum", "one pass", "three passes"
    )
    for number, repeat in enumerate(found["repeats"], start=1):
        parts = repeat["parts_s"].values()
        values = [*parts, sum(parts), repeat["one_s"], sum(repeat["three_s"].values())]
        made.add_row(str(number), *(f"{value:.1f}" for value in values))
    console.print(made)
    console.print(
        f"one pass is {found['to_parts']:.3f} of its parts, {found['to_three_passes']:.3f} of three passes"
    )


def show_batching(found: Result) -> None:
    """Print the section's tables."""
    sizes = sorted({row["size"] for row in found["rows"]})
    heads = [f"{size}" for size in sizes]
    title = f"Batching: {found['n_clips']} clips, width {found['width']}, 2 blocks; speed by clips in a batch"
    made = table(
        title, "encoder", "tokens a clip", "clips/s, 1", *heads, "largest difference", "relative L2"
    )
    kinds: defaultdict[tuple[str, str], list[Result]] = defaultdict(list)
    for row in found["rows"]:
        kinds[row["kind"], row["precision"]].append(row)
    for (kind, precision), rows in kinds.items():
        made.add_row(
            f"{kind}, {precision}",
            str(rows[0]["tokens_per_clip"]),
            f"{rows[0]['clips_per_s']:.2f}",
            *(f"{row['ratio']:.2f}" for row in rows),
            f"{max(row['max_difference'] for row in rows):.1e}",
            f"{max(row['relative_l2'] for row in rows):.1e}",
        )
    console.print(made)
    near = found["by_tokens"]
    made = table(
        "Speed next to each encoder's best", "tokens in a batch", *map(str, near["near_best"])
    )
    made.add_row("geometric mean", *(f"{speed:.3f}" for speed in near["near_best"].values()))
    console.print()
    console.print(made)
    console.print(f"recommended: {near['recommended']} tokens; CPU_BATCH_TOKENS is {near['now']}")


def show_resume(found: Result) -> None:
    """Print the section's table."""
    made = table(
        "Nothing to do, and planning", "command", "clips", "s, median", "s, range", "peak MiB"
    )
    rows = (("extract, again", "n_finished", "again"), ("extract --plan", "n_planned", "plan"))
    for what, n_clips, name in rows:
        times_s = found[f"{name}_s"]
        made.add_row(
            what,
            f"{found[n_clips]:,}",
            f"{middle(times_s):.2f}",
            f"{min(times_s):.2f}-{max(times_s):.2f}",
            f"{found[f'{name}_bytes'] / 2**20:.0f}",
        )
    console.print(made)


def show_device(found: Result) -> None:
    """Print the section's tables."""
    size = "full size" if found["is_full_size"] else "the small size, for want of a GPU"
    if not found["is_full_size"] and found["device"] != "cpu":
        size = "a small size"
    title = f"Device: {found['name']}, {found['precision']}, {size}: {found['networks']}"
    heads = (
        "GFLOP a clip",
        "ms, by default",
        "clips in it",
        "ms, at best",
        "clips in it",
        "of it, mel ms",
    )
    made = table(title, "encoder", *heads, "TFLOP/s", "of a matrix product")
    for label, one in found["encoders"].items():
        made.add_row(
            label,
            f"{one['flops'] / 1e9:.1f}",
            f"{1e3 * one['at_default_s']:.1f}",
            str(one["default_size"]),
            f"{1e3 * one['clip_s'][one['best_size']]:.1f}",
            str(one["best_size"]),
            f"{1e3 * one['host_s']:.1f}",
            f"{one['flops_per_s'] / 1e12:.2f}",
            f"{100 * one['of_matmul']:.0f} %",
        )
    console.print(made)
    stated = found["datasheet_flops"]
    console.print(
        f"a matrix product: {found['matmul_flops'] / 1e12:.2f} TFLOP/s"
        + (
            f", {100 * found['matmul_flops'] / stated:.0f} % of what the maker states"
            if stated
            else ""
        )
    )
    busy = found["gpu_busy"]
    console.print(
        f"one worker, {found['n_decoders']} decoders: {found['clips_per_s']:.2f} clips/s; encoding "
        f"{100 * found['encode_share']:.0f} % of the time, waiting for decoding "
        f"{100 * found['decode_wait_share']:.0f} %"
        + (f"; the GPU was busy {100 * busy:.0f} % of it" if busy is not None else "")
    )
    for kind, seconds in found["decode_s"].items():
        console.print(
            f"{kind} clips: {seconds:.3f} s of a core to decode, so {seconds / found['encode_s']:.2f} cores "
            "keep one device busy"
        )


def costs_document(found: Mapping[str, Result], about: Result) -> str:
    """Return what `cluster_model.py --costs` reads: of the GPU if there was one, else of the CPU.

    Raises:
        RuntimeError: Neither was measured.
    """
    from cluster_model import Costs, Spread, StreamCost  # beside this file

    device = found.get("device", {})
    on_gpu = device.get("device", "cpu") != "cpu"
    if not on_gpu and "overhead" not in found:
        raise RuntimeError("--costs needs the section overhead, or device with --device cuda")
    part = device if on_gpu else found["overhead"]
    alone = part["alone"]
    decode_s = list(alone["decode_s"].values())
    encode_s = [
        sum(alone["encode_s"].get(x, 0.0) for x in has) for has in alone["streams"].values()
    ]
    source = f"benchmarks/extract.py, {about['cpu']}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    if not on_gpu:
        encode_s = [a + b for a, b in zip(encode_s, decode_s, strict=True)]
        decode_s = [0.0]
        source += "; decoding shares the core, so it counts as encoding"
    costs = Costs(
        name=f"{device['name'] if on_gpu else 'one CPU core'}, {part['networks']}",
        source=source,
        encode=Spread(samples_s=tuple(encode_s)),
        decode=Spread(samples_s=tuple(decode_s)),
        n_decoders=device["n_decoders"] if on_gpu else 1,
        start_s=part["start_s"] if on_gpu else part["timeline"]["start_s"],
        streams=tuple(StreamCost(**stream) for stream in part["stores"]),
    )
    return costs.model_dump_json(indent=1)


def plot(found: Mapping[str, Result], path: Path) -> None:
    """Save a chart: where the time of an extraction goes, and what batches do for each encoder."""
    from matplotlib.figure import Figure

    parts = [name for name in ("overhead", "batching") if name in found]
    if not parts:
        raise RuntimeError("--plot needs the section overhead or batching")
    figure = Figure(figsize=(10, 3.2 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for panel, name in zip(panels, parts, strict=True):
        (plot_overhead if name == "overhead" else plot_batching)(panel, found[name])
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def plot_overhead(panel: Any, found: Result) -> None:
    """Draw two bars: what the work needs, and what the command took."""
    took, needs = found["timeline"]["shares_s"], found["need_s"]
    encoders = [name for name in needs if name != "decoding"]
    others = [name for name in took if name not in encoders]
    colours = dict(zip(encoders, ("#1f4e79", "#4f81bd", "#9dc3e6"), strict=False)) | {
        "decoding": "#7f9f5f"
    }
    waste = ("#c8501e", "#e8955a", "#f3c9a5", "#a0522d", "#d9b08c", "#888888")
    colours |= dict(zip(sorted(others, key=lambda name: -took[name]), waste, strict=False))
    bars = {
        "CPU time of the work / cores,\none process alone": needs,
        "the same, all cores busy": found["need_busy_s"],
        "the command": {**{n: took.get(n, 0.0) for n in encoders}, **{n: took[n] for n in others}},
    }
    seen = set()
    for row, parts in enumerate(bars.values()):
        left = 0.0
        for name, seconds in parts.items():
            label = None if name in seen else name
            seen.add(name)
            panel.barh(
                row, seconds, left=left, color=colours.get(name, "#888888"), label=label, height=0.6
            )
            left += seconds
        panel.annotate(f" {left:.0f} s", (left, row), va="center")
    panel.set_yticks(range(len(bars)), list(bars))
    panel.invert_yaxis()
    panel.margins(x=0.08)
    panel.set(
        xlabel="seconds",
        title=f"{found['n_clips']} clips, {found['n_workers']} workers on as many cores: "
        f"{found['ratio']:.2f} times the CPU time of decoding and encoding",
    )
    panel.legend(
        fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False
    )


def plot_batching(panel: Any, found: Result) -> None:
    """Draw speed by tokens in a batch, one line for each encoder."""
    lines: defaultdict[str, list[Result]] = defaultdict(list)
    for row in found["rows"]:
        if row["precision"] == "float32":
            lines[row["kind"]].append(row)
    for kind, rows in lines.items():
        tokens = [row["size"] * row["tokens_per_clip"] for row in rows]
        panel.plot(tokens, [row["ratio"] for row in rows], marker="o", markersize=4, label=kind)
    panel.axhline(1, color="#888888", linewidth=0.8)
    panel.axvline(CPU_BATCH_TOKENS, color="#c8501e", linestyle="--", label="CPU_BATCH_TOKENS")
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set(
        xlabel="encoder tokens in a batch",
        ylabel="clips/s next to one by one",
        title=f"Batches across clips, float32, width {found['width']}",
    )
    panel.legend(fontsize=8, ncols=2, frameon=False)


# ---------------------------------------------------------------- command line


def main() -> None:
    """Measure and report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, help="where clips, weights and stores are made, and kept"
    )
    parser.add_argument(
        "--clips", type=Path, default=DEFAULT_CLIPS, help="folder of real clips, if any"
    )
    parser.add_argument("--only", help=f"comma-separated: {', '.join(SECTIONS)}")
    parser.add_argument("--device", default="cpu", help="of batching and device: cpu or cuda")
    parser.add_argument("--workers", type=int, default=n_cores(), help="default: one for each core")
    parser.add_argument("--repeats", type=int, help="of what is cheap to repeat")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that everything runs")
    parser.add_argument("--json", type=Path, help="save all figures")
    parser.add_argument("--costs", type=Path, help="save what cluster_model.py reads")
    parser.add_argument("--plot", type=Path, help="save a chart, .svg or .png")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else list(SECTIONS)
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"--only: no {unknown[0]!r}; allowed: {', '.join(SECTIONS)}")
    scale = QUICK_SCALE if arguments.quick else TRUE_SCALE
    if arguments.repeats is not None:
        scale = replace(scale, repeats=arguments.repeats)
    about = machine()
    found: dict[str, Result] = {}
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work = work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # digests of checkpoints, remembered
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        sections: dict[str, Callable[[], Result]] = {
            "overhead": lambda: overhead(work, arguments.clips, scale, arguments.workers),
            "streams": lambda: streams(work, arguments.clips, scale),
            "batching": lambda: batching(work, arguments.clips, scale, arguments.device),
            "resume": lambda: resume(work, scale),
            "device": lambda: device_section(work, arguments.clips, scale, arguments.device),
        }
        for name in SECTIONS:
            if name not in chosen:
                continue
            began_s = time.monotonic()
            progress.print(f"{name} ...", end=" ")
            try:
                found[name] = sections[name]()
            except Exception:  # noqa: BLE001 - the other sections took long, too
                traceback.print_exc()
            if arguments.json:
                document = {"machine": about, "quick": arguments.quick, **found}
                arguments.json.write_text(json.dumps(document, indent=1) + "\n")
            progress.print(f"{time.monotonic() - began_s:.0f} s", highlight=False)
    console.print(f"{about['cpu']}, torch {about['packages']['torch']}", highlight=False)
    show(found, quick=arguments.quick)
    if arguments.costs:
        arguments.costs.write_text(costs_document(found, about) + "\n")
    if arguments.plot:
        plot(found, arguments.plot)
    if failed := [name for name in chosen if name not in found]:
        sys.exit(f"these sections failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
