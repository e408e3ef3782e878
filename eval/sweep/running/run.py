"""Lead a sweep: encode what its rows lack, then train and score them, each in a process of its own.

::

    plan -> one process that encodes  -> a process per run, `jobs` of them at a time:
            (`tokens`)                 train, then score the trials that share it (`trial`)

Processes write what they do and what came of it into the sweep's folder; this one starts them, looks at
that, and writes down the failure of those that died without a word. It loads neither torch nor a model.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import ExtractionStopped, StoppedError
from cache.manifest import Header, Manifest, write_manifest
from eval.sweep.running.at_work import TOKENS, AtWork, Order, read_at_work, write_order
from eval.sweep.running.tokens import TokensOrder, TokensPart, tokens_child, write_tokens_order
from eval.sweep.running.trial import AGAIN, DONE, STOPPED, child
from eval.sweep.schema import Scale, ScoreColumn
from eval.sweep.state import BegunTrial, copy_log, fail, is_settled, read_result, work_file
from extract.config import n_cores
from extract.engines.options import EngineOptions
from train.running.interrupt import Interrupt

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from cache.spec import TokenSpec
    from eval.sweep.planning.plan import Extraction, SweepPlan

logger = logging.getLogger(__name__)

TICK_S = 0.5
_PRELOADED = (
    "emocache",
    "eval.asking.ask",
    "eval.generate",
    "eval.sweep.tables.statistics",
    "eval.sweep.running.tokens",
    "eval.sweep.running.trial",
    "extract.engines.start",
    "extract.workers.worker",
    "peft",
    "sklearn.metrics",
    "torch.utils.tensorboard",
    "train.loop",
    "transformers.models.llama.modeling_llama",
)
"""What the processes need, imported once: each is then there in a moment."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_BATCH_SIZE: Mapping[Scale, int] = {"full": 16, "demo": 32}
"""Clips that a model is asked about at once."""


@dataclass(frozen=True)
class Start:
    """What one start of a sweep is told."""

    out: Path
    manifest: Path
    media_root: str
    store: str
    scale: Scale
    scores: tuple[ScoreColumn, ...]
    device: str = "auto"
    jobs: int = 1
    """Runs that are trained side by side; 0, of an array: all."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """Where the encoders run."""
    precision: str = "float32"
    """Of the encoders."""
    n_decoders: int | None = None
    faces: str | None = None
    wheels: Path | None = None

    @property
    def n_threads(self) -> int:
        """Of each training: all of an array's task, as the environment says, or its share of the cores."""
        if self.engine.kind == "slurm":
            return self.engine.cpus_per_worker
        given = os.environ.get("OMP_NUM_THREADS", "")
        return (
            int(given) if given.isdigit() and int(given) else max(1, n_cores() // max(1, self.jobs))
        )


OnTick = Callable[[], None]


def lead(start: Start, plan: SweepPlan, trials: Sequence[BegunTrial], on_tick: OnTick) -> None:
    """Do all that some trials lack.

    Args:
        start: Where, and how.
        plan: Of these trials.
        trials: Those that are wanted; settled ones are left alone.
        on_tick: Called about twice a second.

    Raises:
        StoppedError: Ctrl-C or a signal; what was done stays.
        ExtractionStopped: Nothing at all can be encoded.
        KeyboardInterrupt: Ctrl-C for the second time.
    """
    with Interrupt() as interrupt:
        crew = Crew(start, interrupt, on_tick)
        encode(start, plan, trials, crew)
        orders = orders_of(start, plan, open_trials(start, trials))
        crew.train(orders)
    left = len(open_trials(start, trials))
    if left:
        raise StoppedError(
            f"stopped with {left} of {len(trials)} trials left. What was done stays; run the same command "
            "to continue."
        )


def open_trials(start: Start, trials: Sequence[BegunTrial]) -> list[BegunTrial]:
    """Return the trials that have neither failed nor every score."""
    return [t for t in trials if not is_settled(read_result(start.out, t.name), start.scores)]


def orders_of(start: Start, plan: SweepPlan, trials: Sequence[BegunTrial]) -> list[Order]:
    """Return what each process is told: one order per run, with the trials that share it."""
    presets = {trial.name: trial.preset for trial in plan.trials}
    shared: dict[str, list[BegunTrial]] = {}
    for trial in trials:
        shared.setdefault(trial.run_key, []).append(trial)
    return [
        Order(
            out=str(start.out.resolve()),
            run_key=key,
            # Rows that share a run differ in their presets' names; the run must not.
            preset=presets[own[0].name].model_copy(update={"name": f"run-{key}"}),
            trials=tuple(own),
            scores=start.scores,
            manifest=str(start.manifest.resolve()),
            store=start.store,
            scale=start.scale,
            device=start.device,
            n_threads=start.n_threads,
            batch_size=_BATCH_SIZE[start.scale],
            wheels=None if start.wheels is None else str(start.wheels.resolve()),
        )
        for key, own in shared.items()
    ]


# ---------------------------------------------------------------------------- tokens


def encode(start: Start, plan: SweepPlan, trials: Sequence[BegunTrial], crew: Crew) -> None:
    """Encode what is missing; what cannot be encoded fails the rows that need it, and no others.

    Raises:
        ExtractionStopped: Nothing at all can be encoded, and no row goes without.
    """
    if not plan.extractions:
        return
    parts = parts_of(start, plan)
    why = crew.encode(tokens_order(start, parts, _rows_of(plan, plan.encoded)))
    if why is None or crew.is_stopping:
        return
    # One encoder is to blame, or all of them are: each is tried alone.
    alone = [(spec, part.only(spec)) for part in parts for spec in part.specs]
    faults: dict[TokenSpec, str] = {}
    if len(alone) > 1:
        logger.warning("encoding failed (%s); each encoder is now tried alone", why)
    for spec, part in alone:
        told: str | None = why
        if len(alone) > 1:
            told = crew.encode(tokens_order(start, [part], _rows_of(plan, [spec])))
        if crew.is_stopping:
            return
        if told is not None:
            faults[spec] = told
    wanted = open_trials(start, trials)
    lost = {row for spec in faults for row in _rows_of(plan, [spec])}
    if len(faults) == len(alone) and all(trial.row in lost for trial in wanted):
        raise ExtractionStopped(
            f"the tokens cannot be encoded: {why} The log: {work_file(start.out, TOKENS, 'log')}"
        )
    for spec, reason in faults.items():
        rows = _rows_of(plan, [spec])
        failed = [trial for trial in open_trials(start, trials) if trial.row in rows]
        fail(start.out, failed, "extract", reason)
        for trial in failed:
            copy_log(start.out, TOKENS, trial.name)


def _rows_of(plan: SweepPlan, encoded: Sequence[TokenSpec]) -> tuple[str, ...]:
    """Return the rows that read some tokens, in the order of the table."""
    rows = {
        row
        for wanted in plan.wanted
        if wanted.encoded in encoded and wanted.n_missing
        for row in wanted.rows
    }
    return tuple(row.name for row in plan.rows if row.name in rows)


def parts_of(start: Start, plan: SweepPlan) -> list[TokensPart]:
    """Return what is to be encoded, with a manifest of its own where that is not all of the corpus."""
    return [_part(start, number, part, plan) for number, part in enumerate(plan.extractions)]


def _part(start: Start, number: int, part: Extraction, plan: SweepPlan) -> TokensPart:
    manifest = start.manifest
    if part.records != plan.records:  # workers read the records that they are to encode from a file
        manifest = work_file(start.out, TOKENS, f"{number}.parquet")
        manifest.parent.mkdir(parents=True, exist_ok=True)
        # Labels are not needed, and their spaces are another manifest's.
        bare = tuple(record.model_copy(update=_NO_LABELS) for record in part.records)
        write_manifest(manifest, Manifest(header=Header(media_root=start.media_root), records=bare))
    return TokensPart(
        manifest=str(manifest.resolve()),
        specs=part.plan.specs,
        weights={spec_id: str(path.resolve()) for spec_id, path in part.weights.items()},
        unit_clips=part.plan.unit_clips,
    )


_NO_LABELS: Mapping[str, Any] = {
    "emotion": None,
    "emotion_multi": (),
    "emotion_ov": (),
    "sentiment": None,
    "intent": None,
}


def tokens_order(
    start: Start, parts: Sequence[TokensPart], rows: Sequence[str] = ()
) -> TokensOrder:
    """Return what the process that encodes is told."""
    return TokensOrder(
        out=str(start.out.resolve()),
        store=start.store,
        media_root=start.media_root,
        faces=start.faces,
        parts=tuple(parts),
        rows=tuple(rows),
        device=start.device,
        precision=start.precision,
        n_decoders=start.n_decoders,
        engine=start.engine,
    )


# ---------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class _Process:
    """A process at work, and the end of a pipe that it watches: it ends when we do."""

    process: ForkServerProcess
    alive: connection.Connection
    order: Order | None = None
    slot: int = 0


class Crew:
    """Starts processes, waits for them, and sees to what those that died have left."""

    def __init__(self, start: Start, interrupt: Interrupt, on_tick: OnTick) -> None:
        """Start nothing yet."""
        self._start, self._interrupt, self._on_tick = start, interrupt, on_tick
        self._context = multiprocessing.get_context("forkserver")
        self._told: set[int | None] = set()
        """Processes that were asked to stop."""

    @property
    def is_stopping(self) -> bool:
        """True once a signal came."""
        return self._interrupt.requested

    def encode(self, order: TokensOrder) -> str | None:
        """Have some tokens encoded; return why that failed, if it did and nobody stopped it."""
        out = self._start.out
        one = self._begin(tokens_child, write_tokens_order(order))
        with self._ending([one]):
            while not self._wait([one]):
                pass
        code = one.process.exitcode
        if code in (DONE, STOPPED, -signal.SIGTERM) or self.is_stopping:
            if code != DONE:
                self._interrupt.requested = True
            return None
        said = read_at_work(out).get(TOKENS)
        work_file(out, TOKENS, "json").unlink(missing_ok=True)
        if said is not None and said.note:
            return said.note
        return _why(code, work_file(out, TOKENS, "log"))

    def train(self, orders: Sequence[Order]) -> None:
        """Have runs trained and scored, some at a time."""
        queue = deque(orders)
        free = deque(range(self._start.jobs))
        at_work: list[_Process] = []
        with self._ending(at_work):
            while at_work or (queue and not self.is_stopping):
                while queue and free and not self.is_stopping:
                    slot = free.popleft()
                    order = queue.popleft().model_copy(update={"slot": slot})
                    # What an earlier process of this run said is not what this one dies of.
                    work_file(self._start.out, order.run_key, "json").unlink(missing_ok=True)
                    at_work.append(self._begin(child, write_order(order), order, slot))
                for ended in self._wait(at_work):
                    at_work.remove(ended)
                    free.append(ended.slot)
                    again = self._settle(ended)
                    if again is not None:
                        queue.appendleft(again)

    def _settle(self, ended: _Process) -> Order | None:
        """See to what a process has left; return an order for what can still be done."""
        order = ended.order
        assert order is not None
        out, code = self._start.out, ended.process.exitcode
        left = open_trials(self._start, order.trials)
        said = read_at_work(out).get(order.run_key)
        if code != STOPPED and not self.is_stopping:
            work_file(out, order.run_key, "json").unlink(missing_ok=True)
        if not left or self.is_stopping:
            return None
        if code in (STOPPED, -signal.SIGTERM):
            logger.warning("run %s was stopped by a signal from elsewhere", order.run_key)
            return None
        if code != AGAIN:
            note_death(out, order, left, said, _why(code, _log_of(out, order, said)))
            left = open_trials(self._start, order.trials)
        return order.model_copy(update={"trials": tuple(left)}) if left else None

    def _begin(
        self, target: Callable[..., None], file: Path, order: Order | None = None, slot: int = 0
    ) -> _Process:
        self._context.set_forkserver_preload([*_PRELOADED])
        with _threads(self._start.n_threads):
            forkserver.ensure_running()
        reader, writer = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=target, args=(str(file), reader), name=f"emocache-{file.name}"
        )
        process.start()
        reader.close()
        return _Process(process, writer, order, slot)

    def _wait(self, at_work: Sequence[_Process]) -> list[_Process]:
        """Wait a moment; return the processes that ended."""
        connection.wait([one.process.sentinel for one in at_work], TICK_S)
        if self.is_stopping:
            for one in at_work:
                if one.process.is_alive() and one.process.pid not in self._told:
                    self._told.add(one.process.pid)
                    one.process.terminate()  # once: the second time would be "at once"
        ended = [one for one in at_work if not one.process.is_alive()]
        for one in ended:
            one.process.join()
            one.alive.close()
        self._on_tick()
        return ended

    @contextmanager
    def _ending(self, at_work: Sequence[_Process]) -> Iterator[None]:
        """Leave no process behind, whatever happens in this block."""
        try:
            yield
        finally:
            for one in at_work:
                if one.process.is_alive():
                    one.process.kill()
                    one.process.join()


def note_death(
    out: Path, order: Order, left: Sequence[BegunTrial], said: AtWork | None, why: str
) -> None:
    """Write down what the death of a process means for the trials that it has left.

    Args:
        out: Folder of the sweep.
        order: What it was told.
        left: Its trials without a result.
        said: What it did last; None: it never said.
        why: For people.
    """
    if said is not None and said.step == "score":
        # Others of this run may well be scored.
        fail(out, [trial for trial in left if trial.name == said.trial], "score", why)
        return
    fail(out, left, "train", why)
    for trial in left:
        copy_log(out, order.run_key, trial.name)


def _log_of(out: Path, order: Order, said: AtWork | None) -> Path:
    from eval.sweep.state import LOG_FILE, trial_folder

    if said is not None and said.step == "score" and said.trial is not None:
        return trial_folder(out, said.trial) / LOG_FILE
    return work_file(out, order.run_key, "log")


def _why(code: int | None, log: Path) -> str:
    """Say how a process died."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = (
            " The system does that when memory runs out: fewer --jobs, or smaller batches, need less."
            if -code == signal.SIGKILL
            else ""
        )
        return f"its process was ended by {name}.{hint}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    words = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return f"its process ended with code {code}: {words}"


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """Let libraries that are loaded inside this block, by processes too, start so many threads."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(n)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
