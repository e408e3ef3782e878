"""What extraction would do on clusters that nobody measured: a discrete event model of the job design.

    python benchmarks/cluster_model.py [--costs F.json] [--seed 0] [--json F] [--plot F.svg]

1 to 512 workers claim units by create-once leases, encode clips at measured or derived costs, and
commit shards of 32 clips to a shared store that has latencies, request limits and bandwidth. Some are
slow, some are killed. Printed for each number of clips, of workers, and unit size: throughput, work
done twice, waiting for the store, the last percent, cost. docs/cluster_model.md says what is measured,
published or assumed, and what is left out.

How detailed it is: up to 20,000 clips each clip's cost is drawn. Above, that of a shard is, with the
mean and variance of sampled shards; and far from the end of a run a worker takes several units in
one event, at most a quarter of its share of what is left.

`--costs` reads what was measured, a JSON document of the model `Costs`.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import math
import operator
import random
import sys
import time
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache.errors import EmocacheError, SchemaError
from cache.layout import CLIPS_PER_SHARD
from cache.schema import Model, decode_json, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

DETAIL_CLIPS = 20_000
"""Up to here each clip's cost is drawn, and each unit is claimed in an event of its own."""
SPANS_PER_WORKER: Final = 4
"""Of a larger run, a worker takes this part of its share of what is left in one event."""
SPANS_PER_KILL: Final = 2
GIVE_UP_AFTER = 500.0
GIVE_UP_S = 86_400.0
"""A run that takes so many times as long as perfect workers, and this, has failed."""
ENOUGH_EVENTS: Final = 10_000
MOST_RUNS: Final = 5
"""A cell of a table is the mean of so many runs, or of fewer that have so many events."""
RECORDS_AT_ONCE: Final = 16
"""Small documents that `cache.index.in_parallel` reads at once."""
SNAPSHOT_BYTES: Final = 51
"""Of an index, for each clip (docs/reading.md)."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0)]


# ---------------------------------------------------------------- what is put in


class Spread(Model):
    """Seconds that a clip takes: measured ones, or a log-normal distribution."""

    mean_s: Seconds | None = None
    cv: Seconds = 0.0
    """Standard deviation / mean."""
    samples_s: tuple[Seconds, ...] | None = Field(default=None, min_length=1)
    """Measured, one a clip; drawn with replacement."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if (self.mean_s is None) == (self.samples_s is None):
            raise ValueError("give either mean_s (and cv) or samples_s")
        return self

    def moments(self) -> tuple[float, float]:
        """Return mean and variance."""
        if self.samples_s is not None:
            return float(np.mean(self.samples_s)), float(np.var(self.samples_s))
        assert self.mean_s is not None
        return self.mean_s, (self.cv * self.mean_s) ** 2

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Draw the seconds of `n` clips."""
        if self.samples_s is not None:
            return rng.choice(np.asarray(self.samples_s), n)
        assert self.mean_s is not None
        if not self.mean_s or not self.cv:
            return np.full(n, self.mean_s)
        sigma = math.sqrt(math.log1p(self.cv**2))
        return rng.lognormal(math.log(self.mean_s) - sigma**2 / 2, sigma, n)


class StreamCost(Model):
    """What is stored of a clip under one spec."""

    name: str
    bytes_per_clip: int = Field(ge=0)
    n_arrays: int = Field(ge=1)
    """Zarr arrays of the spec's group: `len(cache.layout.arrays(spec))`."""
    batch_clips: int = Field(default=1, ge=1)
    """Clips of one batch. Before each, the worker writes down what it will encode; a worker that
    drains ends the batch that it has begun."""


def v2_streams(batches: tuple[int, int, int]) -> tuple[StreamCost, ...]:
    """Return preset v2 as float16, in these batches; clips of 4 s are assumed."""
    sizes = (4 * 50 * 1280 * 2, 16 * 4 * 1408 * 2, 1025 * 1408 * 2)
    rows = zip(("audio", "video", "image"), sizes, (4, 6, 6), batches, strict=True)
    return tuple(
        StreamCost(name=name, bytes_per_clip=size, n_arrays=n_arrays, batch_clips=batch)
        for name, size, n_arrays, batch in rows
    )


class Costs(Model):
    """What a clip costs a worker of normal speed."""

    schema_version: Literal[1] = 1
    name: str
    source: str
    """Where the numbers come from: machine, date, command; or what was assumed."""
    encode: Spread
    """All encoders together, in a batch; decoding and writing not included."""
    decode: Spread
    """CPU seconds of one decoder process."""
    n_decoders: int = Field(default=1, ge=1)
    """Decoder processes of a worker."""
    start_s: Seconds = 0.0
    """From the start of a worker's process to its first claim: imports, loading weights."""
    streams: tuple[StreamCost, ...] = Field(default=v2_streams((1, 1, 1)), min_length=1)

    @property
    def clip_s(self) -> float:
        """Mean seconds that one clip takes a worker: the slower of encoding and decoding."""
        return max(self.encode.moments()[0], self.decode.moments()[0] / self.n_decoders)


GPU: Final = Costs(
    name="one GPU",
    source="architecture.md section 6: 8.2 + 2.1 + 1.9 TFLOP a clip, at an assumed 100 TFLOP/s; "
    "14 clips took 0.07 to 2.0 s to decode there, of which a mean of 0.5 s is assumed",
    encode=Spread(mean_s=(8.2 + 2.1 + 1.9) / 100, cv=0.1),
    decode=Spread(mean_s=0.5, cv=1.0),
    n_decoders=8,
    start_s=60,
    streams=v2_streams((21, 7, 31)),  # 32,768 tokens, as extract/config.py has it for a GPU
)
CPU: Final = Costs(
    name="two CPU cores",
    source="docs/full_size.md: 254.8 s for two clips and the golden probe, decoding included (an upper "
    "bound); 19 s to build the encoders",
    encode=Spread(mean_s=254.8 / 2, cv=0.2),
    decode=Spread(mean_s=0.0),
    start_s=5.4 + 13.6,
)


class Latency(Model):
    """Seconds until a request is answered, its body not included: log-normal."""

    median_s: Seconds
    p99_s: Seconds

    @model_validator(mode="after")
    def _is_ordered(self) -> Self:
        if self.p99_s < self.median_s or (self.p99_s > 0 and not self.median_s):
            raise ValueError("p99_s is at least median_s, and both are 0 or neither is")
        return self

    def moments(self) -> tuple[float, float]:
        """Return mean and variance."""
        if not self.median_s:
            return 0.0, 0.0
        variance = (math.log(self.p99_s / self.median_s) / 2.3263) ** 2
        mean = self.median_s * math.exp(variance / 2)
        return mean, mean**2 * math.expm1(variance)


class Store(Model):
    """The shared store, as all workers see it together."""

    name: str
    put: Latency
    get: Latency
    page: Latency
    """One page of a listing."""
    page_names: int = Field(default=1000, ge=1)
    """Most names in a page; a listing's pages come one after the other."""
    puts_per_s: Rate = math.inf
    gets_per_s: Rate = math.inf
    """Pages of listings count here, too."""
    bytes_per_s: Rate = math.inf
    """Of all workers, in each direction."""
    worker_bytes_per_s: Rate = math.inf
    """Of one worker, in each direction."""
    part_bytes: int = Field(default=8 * 2**20, ge=1)
    parts_at_once: int = Field(default=4, ge=1)


BUCKET: Final = Store(
    name="bucket",
    put=Latency(median_s=0.06, p99_s=0.3),
    get=Latency(median_s=0.03, p99_s=0.15),
    page=Latency(median_s=0.08, p99_s=0.4),
    puts_per_s=3500,
    gets_per_s=5500,
    bytes_per_s=12.5e9,
    worker_bytes_per_s=1.25e9,
)


class Design(Model):
    """How workers use the store; the defaults are what the code did when this was written.

    Since then it lists shard numbers and looks up retaken units only.
    """

    shard_numbers: Literal["walk", "listed"] = "walk"
    """`walk`: from its own last number on, a writer tries one after the other (`UnitWriter._claim`);
    `listed`: it lists the claims from there on and takes the next."""
    index: Literal["claim", "retaken"] = "claim"
    """When a worker looks up what of a unit is committed. `claim`: each time, for which it lists all
    commit records and reads the new ones (`TokenStore.catch_up`); `retaken`: only of a unit that was
    held before, by the names of that unit's own records."""
    leases: Literal["whole", "folders"] = "whole"
    """A claim lists the leases and receipts of all units, or of the thousand around it."""
    list_age_s: Seconds = 5.0
    """How long a listing serves for claims."""
    poll_s: Rate = 2.0
    """A worker that found no unit asks again after this time."""
    in_flight: int = Field(default=1, ge=0)
    """Shards (of all streams) that may be on their way to the store while the encoders go on."""
    read_back: Literal["clip", "shard"] = "clip"
    """A shard is read back by one request for each clip, or by one in all."""
    announce: Literal["before", "ahead"] = "before"
    """The encoders wait while the worker writes down what they get next (`WorkerSession.beat`), or it
    is written while they encode the batch before."""
    snapshot_every: int = Field(default=256, ge=0)
    """Own commits of a spec after which a writer refreshes the index's snapshot; 0: never."""
    heartbeat_s: Rate = 10.0
    lease_timeout_s: Seconds = 120.0
    # CPU seconds of the worker's own Python, measured: see docs/cluster_model.md.
    scan_s: Seconds = 0.05e-6
    """Of each unit at each claim, done or not."""
    parse_s: Seconds = 0.6e-6
    """Of each name that was listed."""
    record_s: Seconds = 2e-4
    """To take a commit record into the index."""
    merge_s: Seconds = 1e-7
    """The same, for each unit that the index holds already."""
    plan_s: Seconds = 0.19e-6
    """To decode the plan, for each clip."""
    plan_bytes: Seconds = 8.3
    """Of the plan, for each clip."""


AS_IS: Final = Design()
AMENDED: Final = Design(
    shard_numbers="listed", index="retaken", leases="folders", read_back="shard",
    announce="ahead", snapshot_every=0, scan_s=0,
)  # fmt: skip


class Faults(Model):
    """What goes wrong."""

    slow_share: float = Field(default=0.0, ge=0, le=1)
    """Workers that are slower than the others, for good."""
    slow_factor: float = Field(default=3.0, ge=1)
    kill_mean_s: Rate = math.inf
    """Mean time until a worker is killed, exponential."""
    warning_s: Seconds = 0.0
    """Between the signal and the kill."""
    restart_s: Seconds = 180.0
    """From the kill to the start of another worker in its place."""


class Scenario(Model):
    """One run."""

    n_clips: int = Field(ge=1, le=2**40)
    n_workers: int = Field(ge=1, le=4096)
    unit_clips: int = Field(ge=1)
    costs: Costs
    store: Store = BUCKET
    design: Design = AS_IS
    faults: Faults = Faults()
    seed: int = 0

    @model_validator(mode="after")
    def _leaves_room(self) -> Self:
        if self.n_workers / self.design.heartbeat_s >= self.store.puts_per_s:
            raise ValueError(
                f"{self.n_workers} heartbeats every {self.design.heartbeat_s:g} s are more than the "
                f"store takes ({self.store.puts_per_s:g} PUT/s)"
            )
        return self


class Outcome(Model):
    """What came of a run."""

    is_complete: bool
    """False if the model gave up: the run would take hundreds of times as long as it should."""
    makespan_s: float
    clips_per_s: float
    efficiency: float
    """Throughput / that of as many workers that only encode."""
    repeated: float
    """Clip-encodings that were lost and done again / clips."""
    store_wait: float
    """Share of the workers' time in which they claimed, or waited for their commits."""
    queue_wait: float
    """Of it and of background commits: seconds beyond the latencies, because of the store's limits, over
    the workers' time."""
    idle: float
    """Share of the workers' time in which there was no unit to claim."""
    puts_per_s: float
    gets_per_s: float
    """Pages of listings included."""
    refused_per_commit: float
    """Create-once requests that another worker had beaten, for each shard of a stream."""
    tail_s: float
    """From 99 % to 100 % of the clips."""
    worker_hours: float
    hours_per_1000: float
    """Worker-hours for 1000 clips."""
    n_kills: int
    committed_clips: int
    n_events: int


# ---------------------------------------------------------------- requests


class Bundle(NamedTuple):
    """Requests of one operation: how many, and how many of them one after the other."""

    puts: float = 0
    gets: float = 0
    pages: float = 0
    up_bytes: float = 0
    down_bytes: float = 0
    puts_in_turn: float = 0
    gets_in_turn: float = 0
    cpu_s: float = 0

    def __add__(self, other: tuple[Any, ...]) -> Bundle:
        return Bundle(*map(operator.add, self, other))

    def times(self, n: float) -> Bundle:
        """Return the same `n` times over."""
        return Bundle(*[amount * n for amount in self])


def puts(n: float, size: float = 0) -> Bundle:
    """Return `n` PUT requests in turn."""
    return Bundle(puts=n, puts_in_turn=n, up_bytes=size)


def gets(n: float, size: float = 0, at_once: int = 1) -> Bundle:
    """Return `n` GET requests, `at_once` at a time."""
    return Bundle(gets=n, gets_in_turn=math.ceil(n / at_once), down_bytes=size)


def commit_requests(
    n_clips: int, streams: Iterable[StreamCost], store: Store, design: Design
) -> Bundle:
    """Return what committing one shard of each stream asks of a bucket, if nobody is in the way.

    As `cache.writer.UnitWriter` does it: look for the record, claim a number, read the arrays'
    metadata, write the shard and the small arrays, read back, create the record.
    """
    total = Bundle()
    for stream in streams:
        size = n_clips * stream.bytes_per_clip
        n_parts = math.ceil(size / store.part_bytes)
        upload = puts(1, size)
        if n_parts > 1:  # begun, sent in parts, completed
            in_turn = 2 + math.ceil(n_parts / store.parts_at_once)
            upload = Bundle(puts=n_parts + 2, puts_in_turn=in_turn, up_bytes=size)
        read_back = 1 if design.read_back == "shard" else n_clips
        total += (
            puts(1 + stream.n_arrays - 1 + 1)  # claim, small arrays, record
            + gets(1 + stream.n_arrays)  # record, metadata
            + upload
            + gets(2 + read_back, size)  # size, shard's index, clips
        )
    return total


# ---------------------------------------------------------------- units that nobody holds


class FreeUnits:
    """Numbers of units as a few stretches, so that a hundred million clips cost no memory."""

    def __init__(self, n_units: int) -> None:
        """Begin with all of them."""
        self._starts, self._ends = [0], [n_units]
        self._part: list[int] = []
        self.n = n_units

    def take(self, cursor: int, n: int) -> tuple[int, int]:
        """Take up to `n` units from the first free one at or after `cursor`, cyclically.

        A unit of which a part is done is taken alone.

        Returns:
            The first, and how many.
        """
        assert self.n, "there are free units"
        at = bisect_right(self._starts, cursor) - 1
        if at < 0 or self._ends[at] <= cursor:
            at = (at + 1) % len(self._starts)
            cursor = self._starts[at]
        n = min(n, self._ends[at] - cursor)
        if self._part:
            place = bisect_left(self._part, cursor)
            if place < len(self._part) and self._part[place] < cursor + n:
                n = max(1, self._part[place] - cursor)
                if self._part[place] == cursor:
                    del self._part[place]
        start, end = self._starts[at], self._ends[at]
        rest = [(a, b) for a, b in ((start, cursor), (cursor + n, end)) if a < b]
        self._starts[at : at + 1] = [a for a, _ in rest]
        self._ends[at : at + 1] = [b for _, b in rest]
        self.n -= n
        return cursor, n

    def give_back(self, start: int, n: int, *, in_part: bool = False) -> None:
        """Take units in again."""
        at = bisect_left(self._starts, start)
        assert at == 0 or self._ends[at - 1] <= start, "nobody else gave these back"
        assert at == len(self._starts) or start + n <= self._starts[at], "they were not free"
        self._starts.insert(at, start)
        self._ends.insert(at, start + n)
        if in_part:
            insort(self._part, start)
        self.n += n


# ---------------------------------------------------------------- the simulation

DOWN, STARTING, CLAIMING, ENCODING, WAITING, IDLE, SPAN, DRAINED = range(8)
"""What a worker does. `WAITING`: for its commits; `DRAINED`: for the kill that it was warned of."""
N_LIMITS: Final = 4
"""Of the store: requests that write, requests that read, bytes up, bytes down."""


class _Span:
    """Several units that a worker does in one event."""

    def __init__(self, first: int, n: int, n_shards: int, start_s: float) -> None:
        self.first, self.n, self.n_shards, self.start_s = first, n, n_shards, start_s
        self.claim_s = self.encode_s = self.commit_s = self.queue_s = self.end_s = 0.0
        self.asked = Bundle()
        self.loads = [0.0] * N_LIMITS

    def share(self, now: float) -> float:
        """Return how much of it is over."""
        return min(1.0, (now - self.start_s) / max(self.end_s - self.start_s, 1e-9))


class _Worker:
    """One place in the cluster, with the process that runs there now."""

    def __init__(self, number: int, slow: float) -> None:
        self.number, self.slow = number, slow
        self.phase, self.since_s, self.alive_s = DOWN, 0.0, 0.0
        self.epoch = self.commit_epoch = self.life = 0
        self.forget()

    def forget(self) -> None:
        """Become a fresh process."""
        self.unit, self.unit_size, self.at, self.chunk = -1, 0, 0, 0
        self.chunk_start_s = self.chunk_end_s = 0.0
        self.pending: deque[tuple[int, int]] = deque()
        """Encoded and not committed: unit, clips."""
        self.blocked = self.draining = False
        self.asked, self.asked_s, self.answered_s = Bundle(), 0.0, 0.0
        self.cursor, self.n_commits = 0, 0
        self.next_shard, self.caught_up = -1.0, 0.0
        self.is_fresh = True
        self.listed_s = -math.inf
        self.span: _Span | None = None


Handler = Callable[[_Worker, float, int], None]


class Simulation:
    """One run, event by event."""

    def __init__(self, scenario: Scenario) -> None:
        """Prepare a run; see `run`."""
        self.s = s = scenario
        self.design, self.costs = s.design, s.costs
        self.unit_clips = min(s.unit_clips, s.n_clips)
        self.n_units = -(-s.n_clips // self.unit_clips)
        self.per_unit = -(-self.unit_clips // CLIPS_PER_SHARD)
        self.n_streams = len(s.costs.streams)
        self.is_detailed = s.n_clips <= DETAIL_CLIPS
        self.rng = random.Random(s.seed)
        self.np_rng = np.random.default_rng(s.seed)
        self.normals = self._draw_normals()
        self.free = FreeUnits(self.n_units)
        self.orphans: deque[int] = deque()
        """Units whose holder is known to be dead."""
        self.progress: dict[int, int] = {}
        """Unit that is begun -> its committed clips."""
        self.done = bytearray(self.n_units)
        self.claimed_s: dict[int, float] = {}
        n_slow = round(s.faults.slow_share * s.n_workers)
        slow = set(self.rng.sample(range(s.n_workers), n_slow))
        self.workers = [
            _Worker(i, s.faults.slow_factor if i in slow else 1.0) for i in range(s.n_workers)
        ]
        self.idle: list[_Worker] = []
        self.n_alive = self.n_spans = 0
        self.heap: list[tuple[float, int, Handler, _Worker, int]] = []
        self.numbers = itertools.count()
        # What is needed again and again.
        self.decode = s.costs.decode.moments()
        self.shard_clips = min(CLIPS_PER_SHARD, self.unit_clips)
        self.shard_s, self.shard_variance = self._shard_moments()
        """Of the seconds from a shard's first clip to its last, at normal speed."""
        self.latencies = (s.store.put.moments(), s.store.get.moments(), s.store.page.moments())
        self.step_s = self.n_streams * (self.latencies[0][0] + self.latencies[1][0])
        beats_per_s = s.n_workers / s.design.heartbeat_s
        self.limits = (
            s.store.puts_per_s - beats_per_s, s.store.gets_per_s, s.store.bytes_per_s,
            s.store.bytes_per_s,
        )  # fmt: skip
        self.busy_until_s = [0.0] * N_LIMITS
        self.span_loads = [0.0] * N_LIMITS
        """What all spans that run ask for in a second."""
        self.span_pace = self.span_offset = 0.0
        """At time t these spans have committed `span_pace * t - span_offset` shards."""
        self.commits = [
            commit_requests(n, s.costs.streams, s.store, s.design)
            for n in range(min(CLIPS_PER_SHARD, self.unit_clips) + 1)
        ]
        n_batches = [
            sum(math.ceil(n / stream.batch_clips) for stream in s.costs.streams)
            for n in range(min(CLIPS_PER_SHARD, self.unit_clips) + 1)
        ]
        waits = s.design.announce == "before"
        self.beats = [Bundle(puts=n, puts_in_turn=n if waits else 0) for n in n_batches]
        """A worker says what it encodes before each batch."""
        self.batch_clips = min(stream.batch_clips for stream in s.costs.streams)
        self.refusal = puts(1) + gets(1)
        """A create-once request that is refused: `ObjectStorage.create` then reads what is there."""
        # What has happened.
        self.committed = 0
        self.lost = self.n_refused = 0.0
        self.n_done = self.n_leases = self.n_receipts = self.n_shards = self.n_snapshot = 0
        self.n_kills = self.n_events = 0
        self.spent_s = [0.0] * 8
        self.lived_s = self.queue_s = self.t99_s = 0.0
        self.n_puts = self.n_gets = 0.0

    def _shard_moments(self, n_samples: int = 256) -> tuple[float, float]:
        """Return mean and variance of a whole shard's seconds, from samples."""
        shape = (n_samples, self.shard_clips)
        encode_s = self.costs.encode.draw(math.prod(shape), self.np_rng).reshape(shape)
        decode_s = self.costs.decode.draw(math.prod(shape), self.np_rng).reshape(shape)
        side = np.maximum(decode_s.sum(1) / self.costs.n_decoders, decode_s.max(1))
        found = np.maximum(encode_s.sum(1), side)
        return float(found.mean()), float(found.var())

    def run(self) -> Outcome:
        """Play the run to its end."""
        for worker in self.workers:
            self._at(0.0, self._start, worker, worker.life)
        now = 0.0
        perfect_s = self.s.n_clips * self.costs.clip_s / self.s.n_workers
        patience_s = GIVE_UP_AFTER * perfect_s + GIVE_UP_S
        while self.committed < self.s.n_clips and now < patience_s:
            now, _, handle, worker, token = heapq.heappop(self.heap)
            self.n_events += 1
            handle(worker, now, token)
        for worker in self.workers:
            self._enter(worker, DOWN, now)
        assert self.n_done == self.done.count(1), "every unit is done once"
        return self._outcome(now)

    def _outcome(self, makespan_s: float) -> Outcome:
        s, lived_s = self.s, self.lived_s
        n_polls = self.spent_s[IDLE] / self.design.poll_s
        poll = self._listing() + self._pages_of(self.n_receipts) + self._orphan_requests()
        n_puts = self.n_puts + lived_s / self.design.heartbeat_s + n_polls * poll.puts
        n_gets = self.n_gets + n_polls * (poll.gets + poll.pages)
        return Outcome(
            is_complete=self.committed == s.n_clips,
            makespan_s=makespan_s,
            clips_per_s=self.committed / makespan_s,
            efficiency=self.committed * self.costs.clip_s / (s.n_workers * makespan_s),
            repeated=self.lost / max(1, self.committed),
            store_wait=(self.spent_s[CLAIMING] + self.spent_s[WAITING]) / lived_s,
            queue_wait=self.queue_s / lived_s,
            idle=self.spent_s[IDLE] / lived_s,
            puts_per_s=n_puts / makespan_s,
            gets_per_s=n_gets / makespan_s,
            refused_per_commit=self.n_refused / max(1, self.n_shards * self.n_streams),
            tail_s=makespan_s - self.t99_s,
            worker_hours=lived_s / 3600,
            hours_per_1000=lived_s / 3.6 / max(1, self.committed),
            n_kills=self.n_kills,
            committed_clips=self.committed,
            n_events=self.n_events,
        )

    # ------------------------------------------------------------ small things

    def _at(self, when: float, handle: Handler, w: _Worker, token: int) -> None:
        heapq.heappush(self.heap, (when, next(self.numbers), handle, w, token))

    def _enter(self, w: _Worker, phase: int, now: float) -> None:
        """Change what a worker does, and book the time of what it did."""
        if w.span is not None and phase != SPAN:
            self._leave_span(w, now)
        if w.phase != DOWN:
            self.spent_s[w.phase] += now - w.since_s
        if w.phase == DOWN and phase != DOWN:
            w.alive_s = now
            self.n_alive += 1
        elif w.phase != DOWN and phase == DOWN:
            self.lived_s += now - w.alive_s
            self.n_alive -= 1
        w.phase, w.since_s = phase, now

    def _size(self, unit: int) -> int:
        return min(self.unit_clips, self.s.n_clips - unit * self.unit_clips)

    def _draw(self, mean: float, variance: float) -> float:
        """Draw from the log-normal distribution of this mean and variance."""
        if variance <= 0 or mean <= 0:
            return mean
        spread = math.log1p(variance / mean**2)
        return mean * math.exp(math.sqrt(spread) * next(self.normals) - spread / 2)

    def _draw_normals(self) -> Iterator[float]:
        while True:
            yield from self.np_rng.standard_normal(4096).tolist()

    def _book(self, b: Bundle, share: float = 1.0) -> None:
        self.n_puts += share * b.puts
        self.n_gets += share * (b.gets + b.pages)

    def _pages_of(self, n_names: float) -> Bundle:
        n_pages = max(1, math.ceil(n_names / self.s.store.page_names))
        return Bundle(pages=n_pages, cpu_s=n_names * self.design.parse_s)

    def _alone_s(self, b: Bundle) -> float:
        """Draw how long requests take where nobody else is."""
        put, get, page = self.latencies
        mean = b.puts_in_turn * put[0] + b.gets_in_turn * get[0] + b.pages * page[0]
        body_s = (b.up_bytes + b.down_bytes) / self.s.store.worker_bytes_per_s
        return self._draw(mean, self._variance(b)) + body_s + b.cpu_s

    def _variance(self, b: Bundle) -> float:
        put, get, page = self.latencies
        return b.puts_in_turn * put[1] + b.gets_in_turn * get[1] + b.pages * page[1]

    def _serve(self, b: Bundle, now: float, w: _Worker | None = None) -> float:
        """Send requests from now on; return when all are answered. Who comes first is served first.

        Args:
            b: The requests.
            now: When the first is sent.
            w: Who waits for them: should it be killed meanwhile, it sends no more.
        """
        self._book(b)
        alone = end = now + self._alone_s(b)
        # Spans are stretched as if all workers asked for as much: what they leave is for the others.
        fair = max(1, self.n_alive - self.n_spans) / max(1, self.n_alive)
        for i, amount in enumerate((b.puts, b.gets + b.pages, b.up_bytes, b.down_bytes)):
            limit = self.limits[i]
            if amount and limit != math.inf:
                left = max(limit - self.span_loads[i], fair * limit)
                self.busy_until_s[i] = max(self.busy_until_s[i], now) + amount / left
                end = max(end, self.busy_until_s[i])
        self.queue_s += end - alone
        if w is not None:
            w.asked, w.asked_s, w.answered_s = b, now, end
        return end

    def _recall(self, w: _Worker, now: float) -> None:
        """Take back what a killed worker would have asked."""
        if now >= w.answered_s:
            return
        b, share = w.asked, (w.answered_s - now) / (w.answered_s - w.asked_s)
        self._book(b, -share)
        for i, amount in enumerate((b.puts, b.gets + b.pages, b.up_bytes, b.down_bytes)):
            if amount and self.limits[i] != math.inf:
                saved_s = share * amount / self.limits[i]
                self.busy_until_s[i] = max(now, self.busy_until_s[i] - saved_s)

    # ------------------------------------------------------------ a worker's life

    def _start(self, w: _Worker, now: float, _life: int) -> None:
        w.forget()
        w.cursor = self.rng.randrange(self.n_units)
        self._enter(w, STARTING, now)
        faults = self.s.faults
        if faults.kill_mean_s != math.inf:
            kill_s = now + self.rng.expovariate(1 / faults.kill_mean_s)
            if faults.warning_s:
                self._at(max(now, kill_s - faults.warning_s), self._warn, w, w.life)
            self._at(kill_s, self._kill, w, w.life)
        self._at(now + self.costs.start_s, self._open, w, w.epoch)

    def _open(self, w: _Worker, now: float, epoch: int) -> None:
        """Read the plan and, as far as the design asks for it, what is in the store."""
        if epoch != w.epoch:
            return
        n = self.s.n_clips
        asked = gets(1, n * self.design.plan_bytes) + Bundle(cpu_s=n * self.design.plan_s)
        if self.design.index == "claim":
            asked += self._read_index()
            w.caught_up = self._frontier(now)
        if self.design.shard_numbers == "walk":  # `UnitWriter._n_claimed`: claims, records
            asked += self._pages_of(self.n_shards).times(2 * self.n_streams)
        else:  # is there this number? doubling it, then halving the step
            asked += gets(math.ceil(2 * math.log2(self.n_shards + 1))).times(self.n_streams)
        self._at(self._serve(asked, now, w), self._claim, w, w.epoch)

    def _read_index(self) -> Bundle:
        """Return what reading the index of each stream asks for: `cache.index.read_index`."""
        fresh = self.n_shards - self.n_snapshot
        one = self._pages_of(self.n_shards) + Bundle(pages=1)  # records, snapshots
        one += gets(fresh, 0, RECORDS_AT_ONCE) + Bundle(cpu_s=fresh * self.design.record_s)
        if self.n_snapshot:
            n_clips = self.n_snapshot * min(CLIPS_PER_SHARD, self.unit_clips)
            one += gets(1, n_clips * SNAPSHOT_BYTES)
        return one.times(self.n_streams)

    def _catch_up(self, fresh: float, n_times: int = 1) -> Bundle:
        """Return what bringing the index up to date asks for: all names, and the new records.

        Args:
            fresh: New shards.
            n_times: Over so many claims.
        """
        in_turn = max(fresh / RECORDS_AT_ONCE, min(fresh, n_times))
        record_s = self.design.record_s + self.design.merge_s * self.n_shards
        new = Bundle(gets=fresh, gets_in_turn=in_turn, cpu_s=fresh * record_s)
        return (self._pages_of(self.n_shards).times(n_times) + new).times(self.n_streams)

    def _frontier(self, now: float) -> float:
        """Return how many shards have a number by now, those of running spans included."""
        return self.n_shards + self.span_pace * now - self.span_offset

    def _warn(self, w: _Worker, now: float, life: int) -> None:
        """Tell a worker that it will be killed: it ends its batch, commits, gives its unit back."""
        if life != w.life:
            return
        if w.phase == SPAN:
            self._settle(w, now)
        w.draining = True
        w.epoch += 1
        if w.phase == ENCODING:
            batch = self.batch_clips
            done = math.ceil(self._encoded_share(w, now) * w.chunk / batch) * batch
            if done:
                done = min(w.chunk, done)
                w.chunk_end_s -= (w.chunk_end_s - w.chunk_start_s) * (1 - done / w.chunk)
                w.chunk = done
                self._at(max(now, w.chunk_end_s), self._encoded, w, w.epoch)
                return
        self._ask_no_more(w, now)
        if not w.blocked:
            self._enter(w, WAITING, now)
            self._end_drain(w, now)

    def _end_drain(self, w: _Worker, now: float) -> None:
        """Give the unit back once everything is committed."""
        if w.pending:
            return
        self._enter(w, DRAINED, now)
        if w.unit >= 0:
            self.n_receipts += 1
            self.free.give_back(w.unit, 1, in_part=True)
            w.unit = -1
            self._wake(now)

    def _kill(self, w: _Worker, now: float, life: int) -> None:
        if life != w.life:
            return
        self.n_kills += 1
        if w.phase == SPAN:
            self._settle(w, now)
        held = {unit for unit, _ in w.pending}
        self.lost += sum(n for _, n in w.pending)
        if w.phase == ENCODING:
            self.lost += self._encoded_share(w, now) * w.chunk
        if w.unit >= 0:
            held.add(w.unit)
        self._recall(w, now)
        silent_s = self.rng.uniform(0, self.design.heartbeat_s)
        for unit in sorted(held):
            expired_s = max(now, now - silent_s + self.design.lease_timeout_s)
            self._at(expired_s, self._expired, w, unit)
        self._ask_no_more(w, now)
        w.life += 1
        w.epoch += 1
        w.commit_epoch += 1
        self._enter(w, DOWN, now)
        w.forget()
        self._at(now + self.s.faults.restart_s, self._start, w, w.life)

    def _encoded_share(self, w: _Worker, now: float) -> float:
        if now <= w.chunk_start_s:
            return 0.0
        length = w.chunk_end_s - w.chunk_start_s
        return min(1.0, (now - w.chunk_start_s) / length) if length else 1.0

    def _expired(self, _w: _Worker, now: float, unit: int) -> None:
        """A dead worker's lease is so old that others may see it."""
        self.orphans.append(unit)
        self._wake(now)

    def _wake(self, now: float) -> None:
        """Let the idle worker that asks next find what is there now."""
        if not self.idle:
            return
        poll_s = self.design.poll_s

        def next_poll(w: _Worker) -> float:
            return w.since_s + math.ceil((now - w.since_s) / poll_s) * poll_s

        w = min(self.idle, key=next_poll)
        self.idle.remove(w)
        w.epoch += 1
        self._at(max(now, next_poll(w)), self._claim, w, w.epoch)

    def _ask_no_more(self, w: _Worker, now: float) -> None:
        """Take a worker off those that ask for units; if one was on its way to it, send another."""
        if w in self.idle:
            self.idle.remove(w)
        elif w.phase in (IDLE, CLAIMING) and (self.free.n or self.orphans):
            self._wake(now)

    # ------------------------------------------------------------ claiming

    def _claim(self, w: _Worker, now: float, epoch: int) -> None:
        """List what there is, unless that was done a moment ago."""
        if epoch != w.epoch:
            return
        self._enter(w, CLAIMING, now)
        asked = Bundle(cpu_s=self.n_units * self.design.scan_s)
        if now - w.listed_s >= self.design.list_age_s:
            w.listed_s = now
            asked += self._listing()
        self._at(self._serve(asked, now, w), self._take, w, w.epoch)

    def _listing(self) -> Bundle:
        most = self.s.store.page_names if self.design.leases == "folders" else math.inf
        return self._pages_of(min(most, self.n_leases)) + self._pages_of(min(most, self.n_receipts))

    def _orphan_requests(self) -> Bundle:
        """Return what it takes to see whose holder is dead: leases, workers' files, own heartbeat."""
        n_held = min(self.s.n_workers, self.n_units - self.n_done)
        return puts(1) + gets(2) + gets(n_held, 0, RECORDS_AT_ONCE).times(3)

    def _take(self, w: _Worker, now: float, epoch: int) -> None:
        """Create a lease; units that are free come before those of the dead."""
        if epoch != w.epoch:
            return
        asked = puts(1)
        if self.free.n:
            unit, n = self.free.take(w.cursor, self._units_at_once(w))
            n_refused = self._n_beaten(w.cursor, unit, w.listed_s)
            self.n_refused += n_refused
            asked += self.refusal.times(n_refused)
            if n > 1 and self._size(unit + n - 1) < self.unit_clips:
                n -= 1
                self.free.give_back(unit + n, 1)
            self.n_leases += n
            if n > 1:
                self._begin_span(w, unit, n, now)
                return
        elif self.orphans:
            unit = self.orphans.popleft()
            self.n_leases += 1
            asked += self._orphan_requests()
        else:
            self._enter(w, IDLE, now)
            self.idle.append(w)
            return
        self.claimed_s[unit] = now
        w.unit, w.unit_size = unit, self._size(unit)
        if self.design.index == "claim":
            frontier = self._frontier(now)
            asked += self._catch_up(max(0.0, frontier - w.caught_up))
            w.caught_up = frontier
        elif unit in self.progress:
            asked += gets(self.per_unit * self.n_streams, 0, RECORDS_AT_ONCE)
        w.at = self.progress.setdefault(unit, 0)
        self._encode(w, now, asked)

    def _n_beaten(self, begin: int, unit: int, listed_s: float) -> int:
        """Return how many units on the way were free when the worker listed them."""
        n = 0
        while unit - 1 - n >= begin and self.claimed_s.get(unit - 1 - n, -math.inf) > listed_s:
            n += 1
        return n

    # ------------------------------------------------------------ encoding and committing

    def _encode(self, w: _Worker, now: float, asked: Bundle) -> None:
        """Begin with the clips of the next shard, once `asked` is answered."""
        w.chunk = min(CLIPS_PER_SHARD - w.at % CLIPS_PER_SHARD, w.unit_size - w.at)
        w.chunk_start_s = self._serve(asked + self.beats[w.chunk], now, w)
        self._enter(w, ENCODING, w.chunk_start_s)
        if w.is_fresh:  # the encoders wait for the first clip; then decoding runs ahead of them
            w.is_fresh = False
            w.chunk_start_s += self._draw(*self.decode) * w.slow
        w.chunk_end_s = w.chunk_start_s + self._clips_s(w.chunk) * w.slow
        self._at(w.chunk_end_s, self._encoded, w, w.epoch)

    def _clips_s(self, n: int) -> float:
        """Draw how long clips take from the first to the last, at normal speed."""
        n_decoders = self.costs.n_decoders
        if self.is_detailed:
            encode_s = float(self.costs.encode.draw(n, self.np_rng).sum())
            decode_s = self.costs.decode.draw(n, self.np_rng)
            return max(encode_s, float(decode_s.sum()) / n_decoders, float(decode_s.max()))
        part = n / self.shard_clips
        return self._draw(part * self.shard_s, part * self.shard_variance)

    def _encoded(self, w: _Worker, now: float, epoch: int) -> None:
        if epoch != w.epoch:
            return
        w.at += w.chunk
        w.pending.append((w.unit, w.chunk))
        if w.at == w.unit_size:
            w.unit = -1
        self._enter(w, WAITING, now)
        w.blocked = len(w.pending) > self.design.in_flight
        if len(w.pending) == 1:
            self._commit(w, now)
        if not w.blocked:
            self._go_on(w, now)

    def _go_on(self, w: _Worker, now: float) -> None:
        """Encode the clips of the next shard, of this unit or of another."""
        if w.draining:
            self._end_drain(w, now)
        elif w.unit >= 0:
            self._encode(w, now, Bundle())
        else:
            w.epoch += 1
            self._claim(w, now, w.epoch)

    def _commit(self, w: _Worker, now: float) -> None:
        """Begin with the first shard that waits."""
        unit, n_clips = w.pending[0]
        asked = self.commits[n_clips]
        frontier = self._frontier(now)
        # The numbers that others took since this worker's last. Those that others take while it
        # tries these count for them as if it had its own already: each cycle costs as many.
        gap = max(0.0, frontier - w.next_shard) if w.next_shard >= 0 else 0.0
        if gap and self.design.shard_numbers == "walk":
            asked += self._refusals(gap)
        elif gap:
            asked += self._refusals(1) + self._pages_of(gap).times(self.n_streams)
        self.n_shards += 1
        w.next_shard = frontier + 1
        w.n_commits += 1
        every = self.design.snapshot_every
        if every and w.n_commits % every == 0:
            asked += self._snapshot()
        if self.progress[unit] + n_clips == self._size(unit):
            asked += puts(1)  # the receipt
        self._at(self._serve(asked, now), self._committed, w, w.commit_epoch)

    def _refusals(self, n_shards: float) -> Bundle:
        """Return the requests for numbers that others have, of each stream, and count them."""
        n = n_shards * self.n_streams
        self.n_refused += n
        return self.refusal.times(n)

    def _n_others(self) -> int:
        """Return the workers that work, without one."""
        return max(0, self.n_alive - len(self.idle) - 1)

    def _snapshot(self) -> Bundle:
        """Return what refreshing the snapshots asks for: `cache.store.TokenStore.write_snapshot`."""
        n_bytes = self.n_shards * min(CLIPS_PER_SHARD, self.unit_clips) * SNAPSHOT_BYTES
        asked = self._read_index() + puts(1, n_bytes).times(self.n_streams)
        self.n_snapshot = self.n_shards
        return asked

    def _committed(self, w: _Worker, now: float, epoch: int) -> None:
        if epoch != w.commit_epoch:
            return
        unit, n = w.pending.popleft()
        done = self.progress[unit] + n
        assert done <= self._size(unit), "each clip is committed once"
        self.progress[unit] = done
        self._add(n, now)
        if done == self._size(unit):
            self.done[unit] = 1
            self.n_done += 1
            self.n_receipts += 1
            del self.progress[unit]
        if w.pending:
            self._commit(w, now)
        if w.blocked:
            w.blocked = False
            self._go_on(w, now)
        elif w.draining and w.phase == WAITING:
            self._end_drain(w, now)

    def _add(self, n_clips: int, now: float) -> None:
        self.committed += n_clips
        if not self.t99_s and self.committed >= 0.99 * self.s.n_clips:
            self.t99_s = now

    # ------------------------------------------------------------ several units in one event

    def _units_at_once(self, w: _Worker) -> int:
        if self.is_detailed:
            return 1
        n = self.free.n // (self.s.n_workers * SPANS_PER_WORKER)
        if self.s.faults.kill_mean_s != math.inf and n > 1:
            unit_s = self.costs.clip_s * self.unit_clips * w.slow
            n = min(n, int(self.s.faults.kill_mean_s / SPANS_PER_KILL / unit_s))
        return max(1, n)

    def _begin_span(self, w: _Worker, first: int, n: int, now: float) -> None:
        """Draw what `n` fresh units take together; where all ask too much, the store stretches it."""
        w.span = span = _Span(first, n, n * self.per_unit, now)
        n_whole = n * self.unit_clips / self.shard_clips
        variance = n_whole * self.shard_variance
        span.encode_s = w.slow * self._draw(n_whole * self.shard_s, variance)
        commit, claim = self._span_commits(w, span), self._span_claims(span)
        span.claim_s, span.commit_s = self._alone_s(claim), self._alone_s(commit)
        span.asked = asked = claim + commit + self._span_others(span)
        length = self._span_s(span, w.slow**2 * variance + self._variance(commit))
        self.n_spans += 1
        stretch = 1.0
        demand = (asked.puts, asked.gets + asked.pages, asked.up_bytes, asked.down_bytes)
        for i, amount in enumerate(demand):
            span.loads[i] = amount / length
            self.span_loads[i] += span.loads[i]
            # Workers that are about to begin ask for as much as those that have begun.
            total = self.span_loads[i] * max(1.0, self.n_alive / self.n_spans)
            stretch = max(stretch, total / self.limits[i])
        span.queue_s = (stretch - 1) * length
        span.end_s = now + stretch * length
        self.span_pace += span.n_shards / (span.end_s - now)
        self.span_offset += span.n_shards / (span.end_s - now) * now
        w.is_fresh = False
        self._enter(w, SPAN, now)
        self._at(span.end_s, self._span_ends, w, w.epoch)

    def _span_s(self, span: _Span, variance: float) -> float:
        """Return how long a span takes where the store has no limits.

        Args:
            span: With the seconds of each part.
            variance: Of the seconds of encoding and committing together.
        """
        busy_s = span.claim_s + span.encode_s
        if not self.design.in_flight:
            return max(busy_s + span.commit_s, 1e-9)
        # Shard by shard, the slower of two normal variables (Clark's formula).
        theta = math.sqrt(variance / span.n_shards)
        ahead_s = (busy_s - span.commit_s) / span.n_shards
        if not theta:
            return max(busy_s, span.commit_s, 1e-9)
        alpha = ahead_s / theta
        below = 0.5 * math.erfc(-alpha / math.sqrt(2))
        density = math.exp(-(alpha**2) / 2) / math.sqrt(2 * math.pi)
        return span.commit_s + span.n_shards * (ahead_s * below + theta * density)

    def _span_claims(self, span: _Span) -> Bundle:
        """Return what claiming a span's units asks for; each may need a listing of its own."""
        n, design = span.n, self.design
        asked = puts(n) + Bundle(cpu_s=n * self.n_units * design.scan_s)
        asked += self.beats[-1].times(n * self.unit_clips / (len(self.beats) - 1))
        listing = self._listing()
        unit_s = span.encode_s / n + listing.pages * self.latencies[2][0] + listing.cpu_s
        share = min(1.0, unit_s / design.list_age_s) if design.list_age_s else 1.0
        return asked + listing.times(n * share)

    def _span_commits(self, w: _Worker, span: _Span) -> Bundle:
        """Return what committing a span's units asks for."""
        n_whole, rest = divmod(self.unit_clips, CLIPS_PER_SHARD)
        asked = self.commits[-1].times(n_whole * span.n) + puts(span.n)  # and receipts
        if rest:
            asked += self.commits[rest].times(span.n)
        n_others = self._n_others()
        if self.design.shard_numbers == "listed" and n_others:
            asked += self._refusals(span.n_shards)
            asked += self._pages_of(n_others).times(span.n_shards * self.n_streams)
        every = self.design.snapshot_every
        if every:
            n_before, w.n_commits = w.n_commits, w.n_commits + span.n_shards
            n_snapshots = w.n_commits // every - n_before // every
            if n_snapshots:
                asked += self._snapshot().times(n_snapshots)
        return asked

    def _span_others(self, span: _Span) -> Bundle:
        """Return what others' commits during a span ask of this worker, and add its time.

        In the time of one of its own commits, each other worker does one, a slower worker's time being
        longer. Their numbers are to be tried, their records to be read.
        """
        n_others, design = self._n_others(), self.design
        asked = Bundle()
        if design.index == "claim":
            asked = self._catch_up((n_others + 1) * span.n_shards, span.n)
            span.claim_s += self._alone_s(asked)
        if design.shard_numbers == "walk":
            busy_s, walk_s = span.claim_s + span.encode_s, n_others * self.step_s * span.n_shards
            usual_s = span.commit_s + walk_s + (0.0 if design.in_flight else busy_s)
            factor = max(1.0, busy_s / usual_s) if design.in_flight and usual_s else 1.0
            walk = self._refusals(n_others * span.n_shards * min(factor, self.s.faults.slow_factor))
            span.commit_s += self._alone_s(walk)
            asked += walk
        return asked

    def _span_ends(self, w: _Worker, now: float, epoch: int) -> None:
        if epoch != w.epoch:
            return
        span = w.span
        assert span is not None
        self._enter(w, CLAIMING, now)
        self.n_shards += span.n_shards
        w.next_shard = w.caught_up = self._frontier(now)
        self._finish(span.first, span.n, now)
        w.epoch += 1
        self._claim(w, now, w.epoch)

    def _finish(self, first: int, n: int, now: float) -> None:
        """Count units of a span as committed."""
        if not n:
            return
        assert not self.done.count(1, first, first + n), "each unit is committed once"
        self.done[first : first + n] = b"\x01" * n
        self.n_done += n
        self.n_receipts += n
        self._add((n - 1) * self.unit_clips + self._size(first + n - 1), now)

    def _leave_span(self, w: _Worker, now: float) -> None:
        """Book a span's time and requests, as far as it came."""
        span = w.span
        assert span is not None
        w.span = None
        share = span.share(now)
        pace = span.n_shards / (span.end_s - span.start_s)
        self.span_pace -= pace
        self.span_offset -= pace * span.start_s
        for i in range(N_LIMITS):
            self.span_loads[i] -= span.loads[i]
        self.n_spans -= 1
        self._book(span.asked, share)
        self.queue_s += share * span.queue_s
        passed_s = now - w.since_s
        self.spent_s[CLAIMING] += share * span.claim_s
        self.spent_s[ENCODING] += share * span.encode_s
        self.spent_s[WAITING] += passed_s - share * (span.claim_s + span.encode_s)
        w.since_s = now

    def _settle(self, w: _Worker, now: float) -> None:
        """End a span in its middle: some of its units are done, one is in work, some are untouched."""
        span = w.span
        assert span is not None
        busy_s = max(span.claim_s + span.encode_s, 1e-9)
        at = min(span.share(now) * span.n_shards, span.n_shards - 1e-6)
        n_encoded = int(at)
        part = at - n_encoded
        n_pending = 0
        if not self.design.in_flight or span.commit_s > busy_s:
            # First the encoders work, then they wait for a commit.
            cycle_s = span.commit_s + (0.0 if self.design.in_flight else busy_s)
            part *= cycle_s / busy_s
            n_encoded += part >= 1.0
            n_pending = min(n_encoded, self.design.in_flight + (part >= 1.0))
        elif part < span.commit_s / busy_s:
            n_pending = min(1, n_encoded)
        self._enter(w, WAITING, now)
        n_committed = n_encoded - n_pending
        self.n_shards += n_committed
        w.next_shard = w.caught_up = self._frontier(now)
        n_done, n_parts = divmod(n_committed, self.per_unit)
        self._finish(span.first, n_done, now)
        # The unit that is encoded, or the last one if all are.
        last = min(n_encoded // self.per_unit, span.n - 1)
        for number in range(n_done, last + 1):
            self.progress[span.first + number] = 0
        if n_parts:
            self.progress[span.first + n_done] = n_parts * CLIPS_PER_SHARD
            self._add(n_parts * CLIPS_PER_SHARD, now)
        is_committing = bool(w.pending)  # of units before the span
        for number in range(n_committed, n_encoded):
            unit, place = divmod(number, self.per_unit)
            size = self._size(span.first + unit) - place * CLIPS_PER_SHARD
            w.pending.append((span.first + unit, min(CLIPS_PER_SHARD, size)))
        w.unit = span.first + last
        w.unit_size = self._size(w.unit)
        w.at = (n_encoded - last * self.per_unit) * CLIPS_PER_SHARD
        if last + 1 < span.n:
            self.free.give_back(span.first + last + 1, span.n - last - 1)
            self.n_leases -= span.n - last - 1
            self._wake(now)
        if w.pending and not is_committing:
            self._commit(w, now)
        if w.at >= w.unit_size:
            w.unit = -1
        if n_pending > self.design.in_flight or w.unit < 0:
            w.blocked = bool(w.pending)
            return
        length = span.encode_s / span.n_shards
        self._enter(w, ENCODING, now)
        w.chunk = min(CLIPS_PER_SHARD, w.unit_size - w.at)
        w.chunk_start_s, w.chunk_end_s = now - part * length, now + (1 - part) * length


# ---------------------------------------------------------------- what is simulated


class Case(Model):
    """A table: one way to work, for several numbers of clips and workers, and unit sizes."""

    title: str
    costs: Costs
    design: Design
    faults: Faults
    clips: tuple[int, ...]
    workers: tuple[int, ...]
    unit_clips: tuple[int, ...]
    store: Store = BUCKET


class Row(Model):
    """What came of one cell of a case."""

    n_clips: int
    n_workers: int
    unit_clips: int
    outcome: Outcome


WORKERS: Final = (1, 8, 64, 512)
GPU_CLIPS: Final = (129_218, 10**6, 10**7, 10**8)
"""The first are the paper's."""
CPU_CLIPS: Final = (1000, 10_000, 129_218)
GPU_UNITS: Final = (8, 32, 128, 512)
CPU_UNITS: Final = (4, 8, 16, 32, 128)
NO_KILLS: Final = Faults(slow_share=0.05)
KILLS: Final = Faults(slow_share=0.05, kill_mean_s=4 * 3600)
WARNED: Final = Faults(slow_share=0.05, kill_mean_s=4 * 3600, warning_s=120)
CHANGES: Final[tuple[tuple[str, dict[str, Any], dict[str, Any]], ...]] = (
    ("the code as it is", {}, {}),
    (
        "the code as it is, on a shared file system",
        {},
        {
            "put": Latency(median_s=0.005, p99_s=0.05),
            "get": Latency(median_s=0.001, p99_s=0.01),
            "page": Latency(median_s=0.005, p99_s=0.05),
            "puts_per_s": 10_000,
            "gets_per_s": 10_000,
        },
    ),
    ("+ shard numbers listed instead of tried", {"shard_numbers": "listed"}, {}),
    ("+ index only for units that were held before", {"index": "retaken"}, {}),
    ("+ a shard read back by one request", {"read_back": "shard"}, {}),
    ("+ batches announced while others are encoded", {"announce": "ahead"}, {}),
    ("+ leases in folders of 1000 units", {"leases": "folders", "scan_s": 0.0}, {}),
    ("+ no snapshots during the run: amended", {"snapshot_every": 0}, {}),
    (
        "amended, store 3 times as slow to answer",
        {},
        {
            "put": Latency(median_s=0.18, p99_s=0.9),
            "get": Latency(median_s=0.09, p99_s=0.45),
            "page": Latency(median_s=0.24, p99_s=1.2),
        },
    ),
    ("amended, an eighth of the bandwidth", {}, {"bytes_per_s": BUCKET.bytes_per_s / 8}),
    ("amended, four times the requests", {}, {"puts_per_s": 14_000, "gets_per_s": 22_000}),
)
"""Name, change of the design on top of those before, change of the store for this row alone."""
CHANGE_CELLS: Final = ((129_218, 8), (129_218, 64), (10**6, 64), (10**6, 512), (10**8, 512))
CHANGE_UNIT: Final = 128
PLOT_CLIPS: Final = 10**6
PLOT_WORKERS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PLOT_CURVES: Final = ((AMENDED, 128), (AMENDED, 32), (AMENDED, 8), (AS_IS, 128), (AS_IS, 8))


def cases(costs: Costs | None, clips: Sequence[int], workers: Sequence[int]) -> list[Case]:
    """Return the tables that are made.

    Args:
        costs: To take instead of the GPU's, without the CPU's tables; None for both.
        clips: To take instead of each table's own; empty for those.
        workers: The same.
    """
    gpu: dict[str, Any] = {
        "costs": costs or GPU, "clips": tuple(clips) or GPU_CLIPS, "unit_clips": GPU_UNITS,
        "workers": tuple(workers) or WORKERS,
    }  # fmt: skip
    cpu = {**gpu, "costs": CPU, "clips": tuple(clips) or CPU_CLIPS, "unit_clips": CPU_UNITS}
    fewer = {**gpu, "clips": tuple(clips) or (GPU_CLIPS[0], GPU_CLIPS[1], GPU_CLIPS[3])}
    name = gpu["costs"].name
    found = [
        Case(title=f"{name}, the code as it is", design=AS_IS, faults=NO_KILLS, **gpu),
        Case(title=f"{name}, amended", design=AMENDED, faults=NO_KILLS, **gpu),
        Case(title=f"{name}, amended, killed", design=AMENDED, faults=KILLS, **fewer),
        Case(title=f"{name}, amended, killed with notice", design=AMENDED, faults=WARNED, **fewer),
    ]
    if costs is None:
        title = f"{CPU.name}, the code as it is, killed"
        found.append(Case(title=title, design=AS_IS, faults=KILLS, **cpu))
        found.append(Case(title=f"{title} with notice", design=AS_IS, faults=WARNED, **cpu))
    return found


def run_cell(scenario: Scenario) -> Outcome:
    """Return the mean of some runs: short runs depend on chance, so they are repeated."""
    runs = [Simulation(scenario).run()]
    while sum(run.n_events for run in runs) < ENOUGH_EVENTS and len(runs) < MOST_RUNS:
        again = scenario.model_copy(update={"seed": scenario.seed + len(runs)})
        runs.append(Simulation(again).run())
    mean: dict[str, Any] = {
        name: sum(getattr(run, name) for run in runs) / len(runs) for name in Outcome.model_fields
    }
    mean["is_complete"] = all(run.is_complete for run in runs)
    for name in ("n_kills", "committed_clips", "n_events"):
        mean[name] = round(mean[name])
    return Outcome(**mean)


def run_case(case: Case, seed: int) -> list[Row]:
    """Simulate every cell of a table."""
    return [
        Row(
            n_clips=n_clips,
            n_workers=n_workers,
            unit_clips=unit_clips,
            outcome=run_cell(
                Scenario(
                    n_clips=n_clips, n_workers=n_workers, unit_clips=unit_clips, costs=case.costs,
                    store=case.store, design=case.design, faults=case.faults, seed=seed,
                )
            ),
        )
        for n_clips in case.clips
        for n_workers in case.workers
        for unit_clips in case.unit_clips
    ]  # fmt: skip


def cells(rows: Iterable[Row]) -> dict[tuple[int, int], list[Row]]:
    """Group rows by the numbers of clips and of workers."""
    found: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.n_clips, row.n_workers), []).append(row)
    return found


def recommend(rows: Sequence[Row]) -> Row:
    """Return the row with the best unit size, of rows that differ in nothing else.

    Of those whose throughput is within 1 % of the largest, the one that repeats the least work; of
    several that do, to a hundredth of a percent, the largest unit, which needs the fewest files.
    """
    best = max(row.outcome.clips_per_s for row in rows)
    good = [row for row in rows if row.outcome.clips_per_s >= 0.99 * best]
    return min(good, key=lambda row: (round(row.outcome.repeated, 4), -row.unit_clips))


def run_changes(costs: Costs, seed: int) -> list[tuple[str, list[Row]]]:
    """Simulate one change of the design after the other, each on top of those before."""
    found, design = [], AS_IS
    for name, change, store in CHANGES:
        design = design.model_copy(update=change)
        case = Case(
            title=name, costs=costs, design=design, faults=NO_KILLS, clips=(), workers=(),
            unit_clips=(CHANGE_UNIT,), store=BUCKET.model_copy(update=store),
        )  # fmt: skip
        rows = [
            run_case(case.model_copy(update={"clips": (n,), "workers": (w,)}), seed)[0]
            for n, w in CHANGE_CELLS
        ]
        found.append((name, rows))
    return found


# ---------------------------------------------------------------- tables and plot


def table(*columns: str) -> Table:
    """Return an empty table whose columns but the first are numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    return made


def percent(share: float, digits: int = 1) -> str:
    """Format a share."""
    return f"{100 * share:.{digits}f}"


def duration(seconds: float) -> str:
    """Format a time with a unit that suits it."""
    for unit, length in (("y", 365.25 * 86_400), ("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"


def print_case(console: Console, case: Case, rows: Sequence[Row], price: float | None) -> None:
    """Print a case: efficiency for each unit size, then what the recommended one costs."""
    sizes = [f"{size}" for size in case.unit_clips]
    console.print(f"{case.title}: efficiency, %, for units of so many clips")
    first = table("clips", "workers", *sizes)
    figures = table(
        "clips", "workers", "unit", "clips/s", "takes", "last 1 %", "twice, %", "store, %", "queue, %",
        "idle, %", "PUT/s", "GET/s", "refused", "h/1000", *(["price/1000"] if price else []),
    )  # fmt: skip
    for (n_clips, n_workers), group in cells(rows).items():
        chosen = recommend(group)
        marks = [
            percent(row.outcome.efficiency) + ("" if row.outcome.is_complete else "!")
            for row in group
        ]
        marks[group.index(chosen)] = f"[bold]{marks[group.index(chosen)]}[/]"
        first.add_row(f"{n_clips:,}", f"{n_workers}", *marks)
        o = chosen.outcome
        figures.add_row(
            f"{n_clips:,}", f"{n_workers}", f"{chosen.unit_clips}", f"{o.clips_per_s:.3g}",
            duration(o.makespan_s), duration(o.tail_s), percent(o.repeated, 2), percent(o.store_wait),
            percent(o.queue_wait), percent(o.idle), f"{o.puts_per_s:,.0f}", f"{o.gets_per_s:,.0f}",
            f"{o.refused_per_commit:.1f}", f"{o.hours_per_1000:.3g}",
            *([f"{o.hours_per_1000 * price:.3g}"] if price else []),
        )  # fmt: skip
    console.print(first)
    console.print(f"{case.title}: what the unit size that is recommended comes to")
    console.print(figures)


def print_changes(console: Console, changes: Sequence[tuple[str, Sequence[Row]]]) -> None:
    """Print the efficiency after each change of the design."""
    heads = [f"{n:,} on {w}" for n, w in CHANGE_CELLS]
    console.print(f"What to change: efficiency, %, units of {CHANGE_UNIT} clips")
    made = table("design", *heads)
    for name, rows in changes:
        made.add_row(name, *(percent(row.outcome.efficiency) for row in rows))
    console.print(made)


def plot(path: Path, costs: Costs, tables: Mapping[str, Sequence[Row]], seed: int) -> None:
    """Save efficiency against workers, and repeated work against the unit size."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from eval.figures import PAPER, settings_of

    settings = {**settings_of(PAPER, "cluster_model"), "svg.fonttype": "path"}
    with rc_context(settings):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_efficiency(left, costs, seed)
        draw_repeated(right, tables)
        for axes in (left, right):
            axes.grid(axis="y", color=PAPER.rule, lw=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(which="both", color=PAPER.rule)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(PAPER.rule)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, facecolor=PAPER.ground, metadata=metadata)


def draw_efficiency(axes: Axes, costs: Costs, seed: int) -> None:
    """Draw a curve for each design and unit size, named at its beginning."""
    from eval.figures import PAPER

    offset: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    for design, unit_clips in PLOT_CURVES:
        case = Case(
            title="", costs=costs, design=design, faults=NO_KILLS, clips=(PLOT_CLIPS,),
            workers=PLOT_WORKERS, unit_clips=(unit_clips,),
        )  # fmt: skip
        values = [100 * row.outcome.efficiency for row in run_case(case, seed)]
        is_amended = design is AMENDED
        colour = PAPER.accent if is_amended else PAPER.warn
        alpha = 1.0 if unit_clips == max(n for _, n in PLOT_CURVES) else 0.6
        axes.plot(PLOT_WORKERS, values, color=colour, alpha=alpha, marker="o", ms=3, lw=1.6)
        axes.annotate(
            f"{unit_clips}", (PLOT_WORKERS[0], values[0]), xytext=(-6, 3 if alpha == 1.0 else -3),
            color=colour, ha="right",
            va="center_baseline", **offset,
        )  # fmt: skip
        if alpha == 1.0:
            axes.annotate(
                "amended" if is_amended else "the code as it is", (PLOT_WORKERS[0], values[0]),
                xytext=(0, 14 if is_amended else 9), color=colour, **offset,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(PLOT_WORKERS, [str(n) for n in PLOT_WORKERS])
    axes.minorticks_off()
    axes.set_xlim(0.55, PLOT_WORKERS[-1] * 1.1)
    axes.set_ylim(0, 110)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("workers")
    axes.set_ylabel("efficiency [%]")
    title = f"Workers of {costs.name} each, {PLOT_CLIPS:,} clips, units of 8 to 128 clips"
    axes.set_title(title, fontsize=10)


def draw_repeated(axes: Axes, tables: Mapping[str, Sequence[Row]]) -> None:
    """Draw what is encoded twice where workers are killed."""
    from eval.figures import PAPER

    offset: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    nothing = []
    for title, rows in tables.items():
        if "killed" not in title:
            continue
        largest = max(row.n_clips for row in rows)
        shown = [row for row in rows if row.n_clips == largest and row.n_workers == 64]
        is_cpu, is_warned = title.startswith(CPU.name), "notice" in title
        name = f"{title.split(',')[0]}, {'2 min notice' if is_warned else 'no notice'}"
        if not shown or max(row.outcome.repeated for row in shown) < 1e-5:
            nothing += [name] if shown else []
            continue
        sizes = [row.unit_clips for row in shown]
        values = [100 * row.outcome.repeated for row in shown]
        colour = PAPER.warn if is_cpu else PAPER.accent
        style = "--" if is_warned else "-"
        axes.plot(sizes, values, color=colour, marker="o", ms=3, lw=1.6, ls=style)
        axes.annotate(
            name,
            (sizes[-1], values[-1]),
            xytext=(60 if is_cpu else 0, 7),
            color=colour,
            ha="right",
            **offset,
        )
    for number, name in enumerate(nothing):
        axes.text(
            0.98, 0.04 + 0.05 * number, f"{name}: less than 0.001 %", color=PAPER.accent,
            transform=axes.transAxes, ha="right", fontsize=9,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({*CPU_UNITS, *GPU_UNITS})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    axes.minorticks_off()
    axes.set_ylim(0.005, 40)
    axes.set_xlabel("clips of a unit")
    axes.set_ylabel("clips encoded twice [%]")
    axes.set_title("64 workers, each killed every 4 hours on average", fontsize=10)


# ---------------------------------------------------------------- the program


def numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers of at least 1 between commas."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{min(found)} is less than 1")
    return found


def main() -> None:
    """Simulate, print, and save what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", type=Path, help="JSON of measured costs, see the model Costs")
    parser.add_argument("--clips", type=numbers, default=(), help="such as 129218,1000000")
    parser.add_argument("--workers", type=numbers, default=(), help="such as 1,40")
    parser.add_argument("--price-per-worker-hour", type=float, metavar="PRICE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="save all figures")
    parser.add_argument("--plot", type=Path, help="save a chart, .svg or .png")
    arguments = parser.parse_args()
    price = arguments.price_per_worker_hour
    if price is not None and not price > 0:
        parser.error(f"--price-per-worker-hour: {price} is not more than 0")
    began_s = time.process_time()
    try:
        costs = read_costs(arguments.costs) if arguments.costs else None
        found = report(costs, arguments)
    except EmocacheError as error:
        sys.exit(f"cluster_model.py: {error}")
    except ValidationError as error:  # such as more heartbeats than the store takes
        sys.exit(f"cluster_model.py: {describe(Scenario, error)}")
    seconds = time.process_time() - began_s
    print(f"simulated in {seconds:.0f} s of one core", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"cpu_s": round(seconds, 1), **found}, indent=1) + "\n"
        )


def read_costs(path: Path) -> Costs:
    """Read measured costs.

    Raises:
        SchemaError: The file cannot be read, or does not decode.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror}). Give a JSON file.") from None
    return decode_json(Costs, text, str(path))


def report(costs: Costs | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Simulate all tables, print them, draw the plot; return everything as plain data."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    tables: dict[str, list[Row]] = {}
    saved = []
    for case in cases(costs, arguments.clips, arguments.workers):
        rows = tables[case.title] = run_case(case, arguments.seed)
        print_case(console, case, rows, arguments.price_per_worker_hour)
        best = [recommend(group) for group in cells(rows).values()]
        data = case.model_dump(mode="json")
        for key, some in (("rows", rows), ("recommended", best)):
            data[key] = [row.model_dump(mode="json") for row in some]
        saved.append(data)
    is_default = not (arguments.clips or arguments.workers)
    changes = run_changes(costs or GPU, arguments.seed) if is_default else []
    if changes:
        print_changes(console, changes)
    if arguments.plot:
        plot(arguments.plot, costs or GPU, tables, arguments.seed)
    return {
        "seed": arguments.seed,
        "cases": saved,
        "changes": [
            {"name": name, "rows": [row.model_dump(mode="json") for row in rows]}
            for name, rows in changes
        ],
    }


if __name__ == "__main__":
    main()
