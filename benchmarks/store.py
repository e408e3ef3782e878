"""The token store's speed next to what else one would use, as ratios of paired measurements.

    python benchmarks/store.py [--clips 832] [--repeats 5] [--json F] [--plot F.svg]

Reading: shuffled batches of 8 clips of the paper's sizes, as a dict of tensors in the stored dtype.
A pass reads 5/13 of the clips (320 of 832), at random, in a fresh process, with an emptied page
cache (cold); then the same clips again and again in other orders, for 2 s (warm). Streaming formats
read an epoch in their own order for at most 8 s, and neither their start nor the filling of their
shuffle buffer counts; the others get two batches to open files. Repeats are interleaved, candidates
in random order; a ratio is the median over the repeats. Every candidate runs in the fastest of its
modes, found beforehand, when it is also compared with the source byte by byte. Batches are dropped
at once. Few clips flatter the streaming formats, and warm passes that fit in the processor's cache.

Writing: bulk, with checksums and fsync, next to a plain append and zarr-python. Opening: a store of
130,000 clips. See requirements.txt for the packages; one that is missing costs its row.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import loaders  # noqa: E402
from loaders import BATCH, GROUP, STREAMS, Batch, FlatFiles, MadeUpClips, Memmap, Mode  # noqa: E402

FULL, VIDEO = "all streams", "video only"
VIEWS = {FULL: STREAMS, VIDEO: ("video",)}
EPOCH_CAP_S = 8.0
"""A streaming format's epoch is cut here."""
CAP_S = {"cold": math.inf, "warm": 2.0}
ROUNDS = 100
"""A warm pass goes over its clips until the time is up, but not more often."""
CHILD_LIMIT_S = 1200
N_OPENING = 130_000
N_WRITTEN_UNITS = 4
BY_NAME = {candidate.name: candidate for candidate in loaders.CANDIDATES}
OURS, UNCHECKED = loaders.Ours.name, loaders.OursUnchecked.name
BEST_PACKAGED = "the best packaged loader"
GOALS = (
    *(("warm", FULL, Memmap.name, 1.8), ("warm", FULL, "safetensors", 1.3)),
    *(("warm", FULL, BEST_PACKAGED, 3), ("warm", FULL, "zarr-python", 8)),
    *(("warm", FULL, "tensorstore", 2), ("cold", FULL, Memmap.name, 2)),
    *(("cold", FULL, ".npy per clip", 1.6), ("cold", FULL, BEST_PACKAGED, 1.5)),
    *(("warm", VIDEO, Memmap.name, 0.8), ("warm", VIDEO, "LitData", 5)),
)
"""How many times as fast as another candidate ours is to be, at least."""
Result = dict[str, Any]

# ---------------------------------------------------------------- one task, one fresh process


def in_child(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call `work` in a fresh process and return its result.

    Raises:
        RuntimeError: It raised, was killed or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_call, args=(theirs, work, arguments))
    child.start()
    theirs.close()
    try:
        if not ours.poll(CHILD_LIMIT_S):
            raise RuntimeError(f"took longer than {CHILD_LIMIT_S} s")
        done, result = ours.recv()
    except EOFError:
        raise RuntimeError("its process was killed") from None
    finally:
        child.join(10)
        child.kill()  # some packages leave threads that never end
        child.join()
    if not done:
        raise RuntimeError(result)
    return result


def _call(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of DataLoader's workers, as most have it
    try:
        answer = True, work(*arguments)
    except Exception as error:  # noqa: BLE001 - it is raised again in the parent, as text
        if not isinstance(error, ImportError):
            traceback.print_exc()
        answer = False, f"{type(error).__name__}: {error}"
    pipe.send(answer)


def files_in(folder: Path) -> list[Path]:
    """Return every file under a folder."""
    return [path for path in folder.rglob("*") if path.is_file()]


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache, and as root its names too."""
    for path in files_in(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with contextlib.suppress(PermissionError):
        Path("/proc/sys/vm/drop_caches").write_text("2")


def disk_bytes() -> int:
    """Return what this process and its worker processes had read from the disk so far."""
    pids = [os.getpid(), *(p.pid for p in multiprocessing.active_children())]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/io").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


# ---------------------------------------------------------------- reading


def write_data(name: str, work: Path, n_clips: int) -> float:
    """Write a candidate's data unless an earlier run did; return their size on the disk / payload."""
    candidate, clips = BY_NAME[name](), MadeUpClips(n_clips)
    modules = [importlib.import_module(package) for package in candidate.packages]
    state = [n_clips, *(getattr(module, "__version__", "") for module in modules)]
    folder, marker = work / candidate.folder, work / f"{candidate.folder}.json"
    if candidate.folder == loaders.OnStore.folder:
        state = [n_clips]  # several read it
    if not marker.is_file() or json.loads(marker.read_text()) != state:
        marker.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        is_source = candidate.folder == Memmap.folder
        candidate.write(clips if is_source else FlatFiles(work / Memmap.folder), folder)
        os.sync()
        marker.write_text(json.dumps(state))
    on_disk = sum(path.stat().st_blocks * 512 for path in files_in(folder))
    return on_disk / clips.n_bytes(range(n_clips), STREAMS) / candidate.n_layouts


def read_passes(
    name: str, work: Path, n_clips: int, view: str, mode: Mode, states: Sequence[str], seed: int
) -> Result:
    """Time a cold and then a warm pass of one candidate; this process is fresh.

    Args:
        name: The candidate.
        work: Where the data stand.
        n_clips: How many there are.
        view: Which streams are read.
        mode: How.
        states: Which of the passes count; the first is done in any case.
        seed: Chooses the clips. 0: a short trial, with a comparison against the source.
    """
    candidate, streams, source = BY_NAME[name](), VIEWS[view], MadeUpClips(n_clips)
    for package in candidate.packages:
        importlib.import_module(package)
    folder = work / candidate.folder
    shuffled = np.random.default_rng(seed).permutation(n_clips).tolist()
    n_read = n_clips * 5 // 13 // BATCH * BATCH
    chosen, rest = shuffled[: n_read if seed else n_read // 2], shuffled[n_read:]
    again = [c for i in range(ROUNDS) for c in random.Random(i).sample(chosen, len(chosen))]
    if "cold" in states:
        evict(folder)
    before = disk_bytes()
    candidate.open(folder, streams, mode)
    beginning: list[Batch] = []
    if not candidate.is_streaming:
        beginning += candidate.batches(in_batches(rest[: 2 * BATCH]))
    visited: list[int] = []
    found: Result = {}
    for state, clips in (("cold", chosen), ("warm", again))[: 1 + ("warm" in states)]:
        start = functools.partial(candidate.batches, in_batches(clips))
        if candidate.is_streaming:
            if state == "warm":
                read_through(folder)  # the first epoch may have been cut
            epoch = start()
            beginning, start = [next(epoch)], functools.partial(iter, epoch)
        for batch in beginning:
            visited += batch["clip"].tolist()
            if seed == 0:
                check(batch, source, streams)
        beginning = []
        rate, cpu_ms, seen = consume(start, EPOCH_CAP_S if candidate.is_streaming else CAP_S[state])
        if state in states:
            found[state] = {"clips_per_s": rate}
            if mode.how != "workers":
                found[state]["cpu_ms"] = cpu_ms
            if state == "cold":
                payload = source.n_bytes(visited + seen, streams)
                found[state]["disk_ratio"] = (disk_bytes() - before) / payload
    candidate.close()
    return found


def in_batches(clips: Sequence[int]) -> loaders.Order:
    """Cut clips into batches."""
    return [clips[i : i + BATCH] for i in range(0, len(clips), BATCH)]


def read_through(folder: Path) -> None:
    """Read a folder's files into the page cache."""
    for path in files_in(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 22):
                pass


def consume(
    start_batches: Callable[[], Iterator[Batch]], cap_s: float
) -> tuple[float, float, list[int]]:
    """Take batches until there are no more or the time is up.

    Returns:
        Clips per second; this process's CPU time per clip (ms), its threads included; the clips.
    """
    gc.collect()
    clips: list[int] = []
    start, cpu = time.perf_counter(), time.process_time()
    for batch in start_batches():
        clips += batch["clip"].tolist()
        if time.perf_counter() - start > cap_s:
            break
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return len(clips) / seconds, cpu_s * 1000 / max(1, len(clips)), clips


def check(batch: Batch, source: MadeUpClips, streams: Sequence[str]) -> None:
    """Compare a batch with the source, byte by byte; AssertionError if anything differs."""
    for place, clip in enumerate(batch["clip"].tolist()):
        truths = source[clip]
        for stream in streams:
            got, truth = batch[stream][place].numpy(), truths[stream]
            if stream == "audio":
                length = int(batch["audio_len"][place])
                assert len(got) == int(batch["audio_len"].max()), "padded to another length"
                assert not got[length:].any(), f"clip {clip}: the padding is not zero"
                got = got[:length]
            assert (got.shape, got.dtype) == (truth.shape, truth.dtype), f"{stream}: {got.shape}"
            assert got.tobytes() == truth.tobytes(), f"clip {clip}: {stream} differs"


# ---------------------------------------------------------------- writing and opening

Unit = tuple[Sequence[int], list[dict[str, Any]]]


def measure_writing(work: Path, repeats: int) -> dict[str, list[float]]:
    """Return clips per second of each writer, per repeat; a unit is durable when it is written.

    One unit more, before the clock starts, creates what is created once.
    """
    source = MadeUpClips((1 + N_WRITTEN_UNITS) * GROUP)
    units: list[Unit] = [(clips, [source[c] for c in clips]) for clips in loaders.groups(source)]
    writers: dict[str, Callable[[Path, list[Unit]], Callable[[int], None]]] = {
        "emocache": _our_writer,
        "raw append": functools.partial(_raw_writer, each_unit=True),
        "raw append, fsync once": functools.partial(_raw_writer, each_unit=False),
        "zarr-python": _zarr_writer,
    }
    found = defaultdict(list)
    for repeat in range(repeats):
        for name in random.Random(repeat).sample(list(writers), len(writers)):
            with tempfile.TemporaryDirectory(dir=work) as folder:
                write = writers[name](Path(folder), units)
                write(0)
                os.sync()
                start = time.perf_counter()
                for number in range(1, len(units)):
                    write(number)
                rate = N_WRITTEN_UNITS * GROUP / (time.perf_counter() - start)
                found[name].append(rate)
    return {name: found[name] for name in writers}


def _our_writer(folder: Path, units: list[Unit]) -> Callable[[int], None]:
    from cache.store import TokenStore

    store = TokenStore.open_or_create(folder)
    return lambda number: loaders.commit_unit(store, *units[number])


def _raw_writer(folder: Path, units: list[Unit], *, each_unit: bool) -> Callable[[int], None]:
    files = {stream: (folder / stream).open("wb", buffering=0) for stream in STREAMS}

    def write(number: int) -> None:
        for stream, file in files.items():
            for tokens in units[number][1]:
                file.write(tokens[stream].data)
            if each_unit or number == len(units) - 1:
                os.fsync(file.fileno())

    return write


def _zarr_writer(folder: Path, units: list[Unit]) -> Callable[[int], None]:
    """Assign whole shards of the store's shapes and codecs, from blocks that are made beforehand."""
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec

    from cache.layout import arrays

    made, blocks = {}, {}
    for stream, spec in loaders.specs().items():
        plan = arrays(spec)[0]
        made[stream] = zarr.create_array(
            folder / stream,
            shape=(len(units) * GROUP, *plan.tail),
            dtype="float16",
            chunks=plan.chunk,
            shards=plan.shard,
            serializer=BytesCodec(),
            compressors=[Crc32cCodec()],
            fill_value=0,
        )
        blocks[stream] = np.zeros((len(units), GROUP, *plan.tail), np.float16)
        for number, (_, clips) in enumerate(units):
            for place, tokens in enumerate(clips):
                blocks[stream][number, place, : len(tokens[stream])] = tokens[stream]

    def write(number: int) -> None:
        for stream, array in made.items():
            array[number * GROUP : (number + 1) * GROUP] = blocks[stream][number]
            for path in files_in(folder / stream / "c" / str(number)):
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    return write


def measure_writer_memory(work: Path) -> dict[str, float]:
    """Return what `commit` allocates at most beside its input, in clips of the stream.

    Two units are committed; the second counts.
    """
    from cache.store import TokenStore

    source, found = MadeUpClips(2 * GROUP), {}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        store = TokenStore.open_or_create(Path(folder))
        for stream, spec in loaders.specs().items():
            first, second = (
                loaders.make_unit(spec, clips, [source[c][stream] for c in clips])
                for clips in loaders.groups(source)
            )
            store.commit(spec, first, {})
            tracemalloc.start()
            store.commit(spec, second, {})
            found[stream] = tracemalloc.get_traced_memory()[1] / max(
                c.tokens.nbytes for c in second
            )
            tracemalloc.stop()
    return found


def write_opening_store(root: Path) -> None:
    """Write what a store of 130,000 clips holds beside its tokens: commit records and snapshots."""
    from cache.commit import Commit, Entry, Status, commit_key
    from cache.index import Index, write_snapshot
    from cache.storage import LocalStorage
    from cache.store import TokenStore

    TokenStore.open_or_create(root)
    storage = LocalStorage(root)
    keys = [hashlib.sha256(str(clip).encode()).hexdigest() for clip in range(N_OPENING)]
    for spec in loaders.specs().values():
        commits = []
        for shard, first in enumerate(range(0, N_OPENING, GROUP)):
            entries = tuple(
                Entry(key=k, row=first + i, status=Status.OK, valid_len=250, crc32c=first)
                for i, k in enumerate(keys[first : first + GROUP])
            )
            commit = Commit(
                unit_id=hashlib.sha256(f"{spec.spec_id} {shard}".encode()).hexdigest()[:24],
                spec_id=spec.spec_id,
                shard=shard,
                created="2026-01-01T00:00:00+00:00",
                provenance={"torch": "2.15.0", "device": "cuda"},
                n_bytes=100_000_000,
                clips=entries,
            )
            data = commit.model_dump_json(exclude_defaults=True).encode()
            storage.replace(commit_key(spec.spec_id, commit.unit_id), data, durable=False)
            commits.append(commit)
        write_snapshot(storage, spec.spec_id, Index(commits))


def measure_opening(root: Path) -> dict[str, float]:
    """Return the time (ms) and growth of memory (MB) of opening a store and its three indexes."""
    from cache.store import TokenStore

    wanted = loaders.specs()
    gc.collect()
    before, start = _resident_mb(), time.perf_counter()
    store = TokenStore.open(root)
    indexes = [store.index(spec) for spec in wanted.values()]
    elapsed_ms = (time.perf_counter() - start) * 1000
    after = _resident_mb()
    assert all(len(index) == N_OPENING for index in indexes)
    grown = {name: after[name] - before[name] for name in before}
    return {"ms": elapsed_ms, "own_mb": grown["RssAnon"], "mapped_mb": grown["RssFile"]}


def _resident_mb() -> dict[str, float]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) / 1000 for name in ("RssAnon", "RssFile")}


# ---------------------------------------------------------------- the run


class Run:
    """The measurements."""

    def __init__(
        self, work: Path, n_clips: int, names: Sequence[str], states: Sequence[str]
    ) -> None:
        self.work, self.n_clips, self.states, self.names = work, n_clips, states, list(names)
        self.left_out: dict[str, str] = {}
        """Candidate -> why it is not in the tables."""
        self.size: dict[str, float] = {}
        self.trials: dict[tuple[str, str, str], dict[Mode, float]] = {}
        """(view, state, candidate) -> mode -> clips per second, once."""
        self.modes: dict[tuple[str, str, str], Mode] = {}
        self.reading: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
        self.writing: dict[str, list[float]] = {}
        self.memory: dict[str, float] = {}
        self.opening: list[dict[str, float]] = []

    def prepare(self) -> None:
        """Write every candidate's data; leave out those that cannot be."""
        for name in dict.fromkeys([Memmap.name, *self.names]):
            say(f"data of {name}")
            try:
                self.size[name] = in_child(write_data, name, self.work, self.n_clips)
            except RuntimeError as error:
                is_missing = str(error).startswith(("ModuleNotFoundError", "ImportError"))
                self._leave_out(name, f"{'not installed' if is_missing else 'failed'}: {error}")

    def _leave_out(self, name: str, why: str) -> None:
        say(f"{name}: {why}")
        self.left_out[name] = why
        self.names = [n for n in self.names if n != name]

    def choose_modes(self) -> None:
        """Try each mode once, compare its batches with the source, keep the fastest."""
        for name in list(self.names):
            for view in VIEWS:
                found = {}
                for mode in BY_NAME[name].modes:
                    try:
                        found[mode] = self._read(name, view, mode, self.states, 0)
                    except RuntimeError as error:
                        if str(error).startswith("AssertionError"):
                            raise
                        say(f"{name}, {view}, {mode}: {error}")
                if not found:
                    self._leave_out(name, "failed: no mode runs")
                    break
                for state in self.states:
                    rates = {mode: passes[state]["clips_per_s"] for mode, passes in found.items()}
                    best = max(rates, key=lambda m: rates[m])
                    # The cost of checksums is that of the same mode.
                    self.modes[view, state, name] = (
                        self.modes.get((view, state, OURS), best) if name == UNCHECKED else best
                    )
                    self.trials[view, state, name] = rates
                    shown = "; ".join(f"{mode}: {rate:.0f}" for mode, rate in rates.items())
                    say(f"{name}, {view}, {state}: {shown}")

    def read(self, repeats: int) -> None:
        """Measure reading."""
        jobs = [(name, view) for name in self.names for view in VIEWS]
        for repeat in range(1, repeats + 1):
            say(f"reading, repeat {repeat} of {repeats}")
            for name, view in random.Random(repeat).sample(jobs, len(jobs)):
                modes = {state: self.modes[view, state, name] for state in self.states}
                for mode in dict.fromkeys(modes.values()):
                    states = [state for state in self.states if modes[state] == mode]
                    for state, result in self._read(name, view, mode, states, repeat).items():
                        self.reading[view, state, name].append(result)

    def _read(self, name: str, view: str, mode: Mode, states: Sequence[str], seed: int) -> Result:
        found: Result = in_child(
            read_passes, name, self.work, self.n_clips, view, mode, states, seed
        )
        return found

    def write_and_open(self, repeats: int) -> None:
        """Measure writing and opening."""
        say("writing")
        self.writing = in_child(measure_writing, self.work, repeats)
        self.memory = in_child(measure_writer_memory, self.work)
        say("opening")
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            in_child(write_opening_store, Path(folder) / "store")
            for _ in range(repeats):
                self.opening.append(in_child(measure_opening, Path(folder) / "store"))

    # ------------------------------------------------------------ figures

    def values(self, view: str, state: str, name: str, what: str = "clips_per_s") -> list[float]:
        """Return a figure of a candidate, per repeat; empty if not measured."""
        return [x[what] for x in self.reading.get((view, state, name), []) if what in x]

    def ratio(self, view: str, state: str, other: str) -> float | None:
        """Return how many times as fast ours is as `other`."""
        return paired(self.values(view, state, OURS), self.values(view, state, other))

    def best_packaged(self, view: str, state: str) -> str:
        """Return the fastest data-loading package."""
        rates = {
            n: median(self.values(view, state, n)) for n in self.names if BY_NAME[n].is_packaged
        }
        return max(rates, key=lambda n: rates[n] or 0, default="none")

    def goals(self) -> list[tuple[str, str, float | None]]:
        """Return what is to be reached: description, bound, measured."""
        rows: list[tuple[str, str, float | None]] = []
        for state, view, other, least in GOALS:
            name = self.best_packaged(view, state) if other == BEST_PACKAGED else other
            what = other if name == other else f"{other} ({name})"
            rows.append(
                (f"{state}, {view}: times {what}", f">= {least}", self.ratio(view, state, name))
            )
        read = median(self.values(FULL, "cold", OURS, "disk_ratio"))
        rows.append(("cold: bytes from disk / payload", "<= 1.02", read))
        for state, most in (("cold", 5), ("warm", 20)):
            kept = self.ratio(FULL, state, UNCHECKED)
            cost = None if kept is None else 100 * (1 - kept)
            rows.append((f"{state}: cost of checksums, %", f"<= {most}", cost))
        rows.append(("size on disk / payload", "<= 1.02", self.size.get(OURS)))
        for what, unit, most in (("ms", "ms", 100), ("MB of own memory", "own_mb", 10)):
            measured = median([x[unit] for x in self.opening])
            what = f"opening {N_OPENING:,} clips, 3 streams: {what}"
            rows.append((what, f"<= {most}", measured))
        for name, least in (("raw append", 0.75), ("zarr-python", 10)):
            measured = paired(self.writing.get("emocache", []), self.writing.get(name, []))
            rows.append((f"durable write: times {name}", f">= {least}", measured))
        rows.append(("writer's memory, in clips (image)", "<= 2", self.memory.get("image")))
        return rows

    def as_json(self) -> Result:
        """Return everything that was measured."""
        reading = [
            {
                **dict(zip(("view", "state", "candidate"), cell, strict=True)),
                "mode": str(self.modes[cell]),
                "trials_clips_per_s": {str(m): rate for m, rate in self.trials[cell].items()},
                "repeats": self.reading[cell],
            }
            for cell in self.modes
        ]
        goals = [
            {"goal": what, "bound": bound, "measured": x, "met": is_met(bound, x)}
            for what, bound, x in self.goals()
        ]
        return {
            **{"machine": machine(), "clips": self.n_clips, "goals": goals, "reading": reading},
            **{"size_ratio": self.size, "writing_clips_per_s": self.writing},
            **{"writer_memory_clips": self.memory, "opening": self.opening},
            "left_out": self.left_out,
        }


def paired(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return the median of a/b, repeat by repeat."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True)) if a and b else None


def median(values: Sequence[float]) -> float | None:
    """Return the median; None of nothing."""
    return statistics.median(values) if values else None


def is_met(bound: str, measured: float | None) -> bool | None:
    """Compare a figure with a bound such as `>= 1.8`; None if it was not measured."""
    if measured is None:
        return None
    sign, number = bound.split()
    return measured >= float(number) if sign == ">=" else measured <= float(number)


def say(text: str) -> None:
    """Report progress; the tables alone go to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def machine() -> Result:
    """Return what the figures depend on."""
    cpu = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
    packages = ["torch", "numpy", "zarr", "tensorstore", "h5py", "safetensors", "litdata"]
    packages += ["mosaicml-streaming", "webdataset", "datasets", "pyarrow"]
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "cpu": f"{os.cpu_count()} x {cpu[0].split(': ')[1] if cpu else platform.machine()}",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": versions,
        "load_average": os.getloadavg(),
    }


# ---------------------------------------------------------------- tables and plot


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    print(f"\n### {title}\n")
    for row in (heads, ["-" * w for w in widths], *rows):
        print("| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |")


def number(value: float | None, digits: int = 4) -> str:
    """Format a figure; nothing if there is none."""
    return "" if value is None else f"{value:.{digits}g}"


def print_report(run: Run) -> None:
    """Print all tables."""
    for view in VIEWS:
        heads, rows = ["candidate"], [[name] for name in run.names]
        for state in run.states:
            heads += [f"{state}: clips/s (range)", "emocache is", "mode"]
            for row in rows:
                rates, ratio = run.values(view, state, row[0]), run.ratio(view, state, row[0])
                row.append(f"{median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})")
                row.append("" if ratio is None else f"{ratio:.2f} x")
                row.append(str(run.modes[view, state, row[0]]))
        heads += ["CPU ms/clip, warm", "disk reads/payload, cold", "size/payload"]
        for row in rows:
            row.append(number(median(run.values(view, "warm", row[0], "cpu_ms")), 2))
            row.append(number(median(run.values(view, "cold", row[0], "disk_ratio"))))
            row.append(number(run.size[row[0]]))
        blank = [""] * (len(heads) - 2)
        rows += [[name, why.split(":")[0], *blank] for name, why in run.left_out.items()]
        print_table(f"Reading, {view}", heads, rows)
    if run.writing:
        rows = [[name, number(median(rates))] for name, rates in run.writing.items()]
        print_table("Writing with fsync", ["writer", "clips/s"], rows)
    rows = []
    for what, bound, x in run.goals():
        met = {True: "yes", False: "no", None: "not measured"}[is_met(bound, x)]
        rows.append([what, bound, number(x), met])
    print_table("Goals", ["goal", "bound", "measured", "met"], rows)


def plot(run: Run, path: Path) -> None:
    """Save a bar chart of the clips per second, all streams."""
    from matplotlib.figure import Figure

    rates = {s: {n: median(run.values(FULL, s, n)) or 0 for n in run.names} for s in run.states}
    names = sorted((n for n in run.names if n != UNCHECKED), key=lambda n: rates["warm"][n])
    figure = Figure(figsize=(10, 1.2 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(run.states), sharey=True, squeeze=False)[0]
    for panel, state in zip(panels, run.states, strict=True):
        colours = ["#c8501e" if name == OURS else "#9aa5b1" for name in names]
        bars = panel.barh(names, [rates[state][n] for n in names], color=colours, height=0.72)
        panel.bar_label(bars, [f"{rates[state][n]:,.0f}" for n in names], padding=3)
        panel.margins(x=0.14)
        panel.set(xlabel="clips per second", title=f"{state} page cache")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    clip_mb = MadeUpClips(run.n_clips).n_bytes(range(run.n_clips), STREAMS) / run.n_clips / 1e6
    figure.suptitle(f"Shuffled batches of {BATCH} clips, {FULL}, {clip_mb:.1f} MB a clip")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=832, help="3.7 MB each, in each format")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where the data are written, and kept")
    parser.add_argument("--only", help=f"comma-separated: {', '.join(BY_NAME)}")
    parser.add_argument("--skip-cold", action="store_true")
    parser.add_argument("--skip-writing", action="store_true", help="and opening")
    parser.add_argument("--json", type=Path, help="save all figures")
    parser.add_argument("--plot", type=Path, help="save a chart, .svg or .png")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(BY_NAME)
    if unknown := sorted(set(names) - set(BY_NAME)):
        parser.error(f"--only: no {unknown[0]!r}; allowed: {', '.join(BY_NAME)}")
    if arguments.clips < 2 * GROUP:
        parser.error(f"--clips: {arguments.clips} is too few; give at least {2 * GROUP}")
    names.sort(key=list(BY_NAME).index)
    multiprocessing.set_forkserver_preload(["torch", "zarr", "pydantic", "pyarrow"])
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        states = ["warm"] if arguments.skip_cold else ["warm", "cold"]
        run = Run(work, arguments.clips, names, states)
        run.prepare()
        run.choose_modes()
        run.read(arguments.repeats)
        if not arguments.skip_writing:
            run.write_and_open(arguments.repeats)
    print_report(run)
    if arguments.json:
        arguments.json.write_text(json.dumps(run.as_json(), indent=1) + "\n")
    if arguments.plot:
        plot(run, arguments.plot)


if __name__ == "__main__":
    main()
