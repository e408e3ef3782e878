"""Watches over the worker loops in Dask workers: starts them, replaces them, and sees to the end.

What is done and what is left, the job in the store says. Nothing that a loop returns matters, so a lost
worker, client or scheduler loses nothing.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import dask.config
from distributed import Client, Future

from cache.errors import EmocacheError, ExtractionStopped, StoreError
from cache.schema import decode_json
from extract.config import LoopConfig
from extract.engines.clusters import Fleet, open_fleet
from extract.engines.job_scripts import dask_settings
from extract.engines.loops import LoopEnd, drain_loops, identity, leave, run_loop
from extract.engines.options import BATCH_KINDS, TICK_S, EngineOptions, EngineState, log_note
from extract.engines.surroundings import Interrupts, environment_kept, quiet
from extract.jobs.job import Job

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 5.0
"""Between two looks at what is left of the job: it lists files of the store."""
_WATCH_S = 60.0
"""Fewer workers than wanted for so long are worth a note."""
_LINGER_S = 60.0
"""Loops that do not return so long after the last unit was done are left alone."""
_LAST_WORDS_S = 120.0
"""Time for the other loops to commit when one has failed."""
_REST_S = 5.0
"""Before a loop is started again on a worker where it ended early."""
_RPC_S = 15.0
_CONNECT_S = 5.0
_MAX_TIMEOUTS = 5
_MAX_STORE_FAILURES = 5


def supervise(
    options: EngineOptions,
    config: LoopConfig,
    job: Job,
    on_tick: Callable[[EngineState], None],
) -> EngineState:
    """Do `extract.engines.start.run_engine` for an engine of Dask's."""
    settings = dask_settings(options.worker_ttl_s)
    settings["distributed.nanny.pre-spawn-environ"] = {}
    with ExitStack() as stack:
        stack.enter_context(dask.config.set(settings))
        stack.enter_context(quiet(options.log_dir, config.session))
        stack.enter_context(environment_kept())
        interrupts = stack.enter_context(Interrupts())
        fleet = open_fleet(options, config.session)
        stack.callback(fleet.close)
        return _Supervisor(options, config, job, fleet, interrupts, on_tick).run()


@dataclass
class _Loops:
    """The loops that were started, and the workers they run on. Addresses are Dask's."""

    running: dict[str, Future[str]] = field(default_factory=dict)
    resting: dict[str, float] = field(default_factory=dict)
    """Address -> when a loop may be started there again."""
    failures: Counter[str] = field(default_factory=Counter)
    """Host -> loops that failed there since a loop last ended well."""
    n_started: int = 0


class _Supervisor:
    """Keeps one loop running on each worker until the job is done.

    Each loop is bound to its worker. Dask would queue two on one worker while another stands idle, and
    would run a lost one again on a machine that has its loop already.
    """

    def __init__(
        self,
        options: EngineOptions,
        config: LoopConfig,
        job: Job,
        fleet: Fleet,
        interrupts: Interrupts,
        on_tick: Callable[[EngineState], None],
    ) -> None:
        self._options = options
        self._config = config
        self._job = job
        self._fleet = fleet
        self._interrupts = interrupts
        self._on_tick = on_tick
        self._client: Client | None = None
        self._loops = _Loops()
        self._workers: frozenset[str] = frozenset()
        """Addresses of those that are there."""
        self._identities: dict[str, tuple[str, int]] = {}
        self._fit: set[str] = set()
        self._unfit: dict[str, str] = {}
        """Workers of somebody else's that can do our work, and those that cannot, and why."""
        self._idle: frozenset[str] = frozenset()
        self._idle_seen_s = time.monotonic()
        self._undone = set(job.undone())
        self._looked_s = self._progress_s = self._enough_s = time.monotonic()
        self._n_store_failures = self._n_timeouts = 0
        self._silent_s = 0.0
        self._has_seen_workers = False
        self._no_workers_s = time.monotonic()
        self._stopping_s: float | None = None
        self._error: EmocacheError | None = None
        self._notes: dict[str, str] = {}
        log = log_note(options, config.session)
        if log is not None:
            self._notes["logs"] = log
        if options.walltime_s is None and fleet.walltime_s is not None:
            self._notes["walltime"] = (
                f"each job gets {fleet.walltime_s / 60:.0f} min, as dask-jobqueue is configured (--walltime)"
            )
        if options.gpus_per_worker > 1:
            self._notes["gpus"] = (
                f"each worker asks for {options.gpus_per_worker} GPUs and uses one"
            )

    def run(self) -> EngineState:
        try:
            while True:
                self._interrupted()
                self._step()
                if self._is_over():
                    break
                self._watch()
                self._on_tick(self._state())
                time.sleep(TICK_S)
        finally:
            if self._client is not None:
                self._client.close(timeout=5)
        if self._error is not None:
            raise self._error
        state = self._state()
        self._on_tick(state)
        return state

    def _state(self) -> EngineState:
        return EngineState(
            self._options.kind,
            len(self._workers),
            self._fleet.n_wanted,
            self._fleet.dashboard_link,
            tuple(self._notes.values()),
            self._stopping_s is not None and bool(self._undone),
        )

    # ---------------------------------------------------------------- one look at everything

    def _step(self) -> None:
        self._look_at_job()
        try:
            if self._client is None:
                self._connect()
            if self._client is not None:
                self._look_at_workers(self._client)
                self._reap()
                if self._stopping_s is None and self._undone:
                    self._want()
                    self._start_loops(self._client)
                self._n_timeouts = 0
        except OSError as error:  # Dask's errors of communication are such, too
            self._on_silence(error)
        self._check_workers()

    def _look_at_job(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = time.monotonic()
        try:
            undone = set(self._job.undone())
            if self._stopping_s is None and self._job.stop_requested(self._config.session):
                self._begin_stop("the session was asked to stop")
        except StoreError:
            # Workers bear a hiccup of the storage, too: need we be the first to give up?
            self._n_store_failures += 1
            if self._n_store_failures >= _MAX_STORE_FAILURES:
                raise
            return
        self._n_store_failures = 0
        if undone != self._undone:
            self._progress_s = time.monotonic()
        self._undone = undone

    def _look_at_workers(self, client: Client) -> None:
        if client.status != "running":
            raise OSError(f"the Dask client is {client.status}")
        scheduler: Any = client.scheduler
        workers = frozenset(client.sync(scheduler.ncores, callback_timeout=_RPC_S))
        if not self._fleet.is_ours:
            self._look_at_strangers(client, workers)
        self._workers = workers - set(self._unfit)
        for address in set(self._loops.running) - self._workers:
            self._loops.running.pop(address).cancel()
            logger.info("worker %s is gone", address)
        for table in (self._loops.resting, self._identities):
            for address in set(table) - self._workers:
                del table[address]

    def _look_at_strangers(self, client: Client, workers: frozenset[str]) -> None:
        """Sort out workers in whose environment we are not installed: a loop would only kill them."""

        def can_load() -> bool:  # travels as it is, for want of a module to find it in
            from importlib.util import find_spec

            return find_spec("extract.engines.loops") is not None

        new = sorted(workers - self._fit - set(self._unfit))
        if not new:
            return
        answers = client.run(can_load, workers=new, on_error="return")
        self._fit |= {address for address, answer in answers.items() if answer is True}
        self._unfit |= {a: repr(answer) for a, answer in answers.items() if answer is not True}
        if self._unfit:
            address, reason = next(iter(self._unfit.items()))
            self._notes["unfit"] = (
                f"{len(self._unfit)} Dask workers cannot load emocache, first {address} ({reason}): install "
                "the same version in their environment."
            )

    def _reap(self) -> None:
        """Take note of loops that ended."""
        for address, future in list(self._loops.running.items()):
            if not future.done():
                continue
            del self._loops.running[address]
            end = None
            try:
                if future.status == "finished":
                    end = decode_json(LoopEnd, future.result(timeout=_RPC_S), "the end of a loop")
                elif future.status == "error":
                    error = future.exception(timeout=_RPC_S)
                    end = LoopEnd(error=type(error).__name__, message=str(error))
            except TimeoutError:  # the worker took its answer with it
                future.cancel()
            if end is not None:
                self._on_end(address, end)

    def _on_end(self, address: str, end: LoopEnd) -> None:
        self._loops.resting[address] = time.monotonic() + _REST_S
        host = address.rpartition(":")[0]
        if end.error is not None:
            if end.must_stop:
                self._error = self._error or end.as_error()
                self._begin_stop(f"a worker failed: {end.error}")
                return
            self._on_failed_process(address, host, end)
            return
        self._loops.failures.pop(host, None)
        self._look_at_job(now=True)
        if end.expired and self._fleet.is_ours:
            self._close_workers([address])
        elif end.end_reason is not None:
            logger.info("the loop on %s ended early: %s", address, end.end_reason)

    def _on_failed_process(self, address: str, host: str, end: LoopEnd) -> None:
        """A worker's process is not to be trusted any more; too often, and the run ends."""
        self._loops.failures[host] += 1
        logger.warning("the worker on %s failed: %s: %s", address, end.error, end.message)
        if self._loops.failures.total() > 2 * self._options.workers + 1:
            self._error = self._error or ExtractionStopped(
                f"{self._loops.failures.total()} workers failed and none ended well; the last, on "
                f"{address}: {end.error}: {end.message}. See the logs; all that is committed stays."
            )
            self._begin_stop("workers fail again and again")
        elif self._fleet.is_ours and self._client is not None:
            if self._loops.failures[host] > 1 and self._options.kind in BATCH_KINDS:
                self._close_workers([address])  # the batch system may give us a better machine
            else:
                self._restart_worker(self._client, address)

    def _restart_worker(self, client: Client, address: str) -> None:
        """Have its nanny start the process anew, without waiting: other workers and the user may have news.

        `Client.restart_workers` waits until the new process is there, many seconds on a loaded machine.
        """
        scheduler: Any = client.scheduler

        async def restart() -> None:
            try:
                await scheduler.restart_workers(
                    workers=[address],
                    timeout=_RPC_S,
                    wait_for_workers=False,
                    on_error="return",
                    stimulus_id=f"emocache-restart-{time.time()}",
                )
            except OSError as error:  # Dask's errors of communication are such, too
                logger.warning("the worker on %s could not be restarted: %s", address, _text(error))

        # Nothing starts there until it is gone: the new process has another address, or the time is over.
        self._loops.resting[address] = time.monotonic() + 2 * _RPC_S
        assert client.loop is not None, "it is connected"
        client.loop.add_callback(restart)

    # ---------------------------------------------------------------- starting

    def _connect(self) -> None:
        self._client = self._fleet.connect(_CONNECT_S)
        if self._notes.pop("scheduler", None):
            logger.warning("the Dask scheduler is back")

    def _on_silence(self, error: OSError) -> None:
        """Try again, with a new client if need be: an old one never gets its tasks back."""
        client = self._client
        if isinstance(error, TimeoutError) and client is not None and client.status == "running":
            self._n_timeouts += 1
            if self._n_timeouts < _MAX_TIMEOUTS:
                return
        if "scheduler" not in self._notes:
            self._silent_s = time.monotonic()
            self._notes["scheduler"] = (
                f"the Dask scheduler does not answer ({_text(error)}), trying again"
            )
            logger.warning("%s", self._notes["scheduler"])
        if client is not None:
            client.close(timeout=1)
        self._client = None
        self._workers = frozenset()
        self._loops.running.clear()
        waited_s = time.monotonic() - self._silent_s
        if waited_s > self._options.start_timeout_s:
            raise ExtractionStopped(
                f"the Dask scheduler does not answer ({_text(error)}), for {waited_s:.0f} s now. All that "
                "is committed stays; see that it runs, and run the same command again."
            ) from error

    def _start_loops(self, client: Client) -> None:
        now_s = time.monotonic()
        free = [
            address
            for address in sorted(self._workers - set(self._loops.running))
            if self._loops.resting.get(address, 0.0) <= now_s
        ]
        n_more = min(self._options.workers, max(len(self._undone), 1)) - len(self._loops.running)
        for address in free[: max(0, n_more)]:
            self._loops.n_started += 1
            self._loops.running[address] = client.submit(
                run_loop,
                self._config.model_dump_json(),
                self._fleet.walltime_s,
                self._fleet.rank_by_name,
                key=f"emocache-{self._config.session}-{self._loops.n_started}",
                pure=False,
                workers=[address],
                allow_other_workers=False,
            )

    def _want(self) -> None:
        """Give workers back near the end of a job, when there are more of them than units."""
        options = self._options
        n = max(options.least_workers, min(options.workers, len(self._undone)))
        surplus = len(self._workers) - n
        if n == options.workers or not self._fleet.is_ours:
            self._fleet.n_wanted = options.workers
        elif surplus <= 0:
            self._fleet.n_wanted = n
        elif time.monotonic() - self._idle_seen_s > 1.5 * self._config.heartbeat_s:
            # A worker tells what it holds with its next heartbeat: idle is who was so twice.
            self._idle_seen_s = time.monotonic()
            idle = self._idle_workers()
            self._close_workers(sorted(idle & self._idle)[:surplus])
            self._idle = idle

    def _idle_workers(self) -> frozenset[str]:
        """Return addresses of workers whose loop holds no unit."""
        assert self._client is not None
        new = sorted(self._workers - set(self._identities))
        if new:
            self._identities |= self._client.run(identity, workers=new, on_error="ignore")
        busy = {
            (state.host, state.pid)
            for state, is_alive in self._job.workers(lease_timeout_s=self._config.lease_timeout_s)
            if is_alive and not state.ended and state.unit in self._undone
        }
        return frozenset(a for a in self._workers if self._identities.get(a) not in busy)

    def _close_workers(self, addresses: list[str]) -> None:
        if addresses and self._client is not None:
            logger.info("closing %s", ", ".join(addresses))
            self._client.run(leave, workers=addresses, wait=False, on_error="ignore")

    # ---------------------------------------------------------------- ending

    def _interrupted(self) -> None:
        if self._interrupts.n and self._stopping_s is None:
            self._begin_stop("interrupted; once more ends it at once")

    def _begin_stop(self, reason: str) -> None:
        if self._stopping_s is not None:
            return
        self._stopping_s = time.monotonic()
        self._notes["stop"] = f"stopping, workers commit what they have: {reason}"
        logger.info("%s", self._notes["stop"])
        self._job.request_stop(self._config.session)
        if self._fleet.is_ours and self._client is not None and self._workers:
            with suppress(OSError):  # sooner is nicer, no more: they look into the store anyway
                self._client.run(drain_loops, wait=False, on_error="ignore")

    def _is_over(self) -> bool:
        if not self._loops.running:
            return self._stopping_s is not None or not self._undone
        now_s = time.monotonic()
        if self._error is not None and self._stopping_s is not None:
            return now_s - self._stopping_s > _LAST_WORDS_S
        if not self._undone and now_s - self._progress_s > _LINGER_S:
            self._notes["linger"] = (
                f"{len(self._loops.running)} workers had not ended {_LINGER_S:.0f} s after the last unit"
            )
            logger.warning("%s", self._notes["linger"])
            return True
        return False

    # ---------------------------------------------------------------- watching

    def _check_workers(self) -> None:
        now_s = time.monotonic()
        if self._workers:
            self._has_seen_workers = True
            self._no_workers_s = now_s
            self._fleet.tend()
            return
        if self._stopping_s is not None or not self._undone or self._client is None:
            return
        self._fleet.tend()
        queued = self._options.kind in BATCH_KINDS
        if self._has_seen_workers and queued:
            return  # preempted, say: the queue gives machines again when it pleases
        trouble = self._fleet.trouble()
        waited_s = now_s - self._no_workers_s
        if trouble is None and waited_s <= self._options.start_timeout_s:
            return
        lost = "all workers are gone" if self._has_seen_workers else "no worker has started"
        raise ExtractionStopped(
            f"{lost}: asked for {self._options.workers}, waited {waited_s:.0f} s. "
            f"{trouble or self._notes.get('unfit') or self._fleet.report()}"
            f"{' The jobs were taken out of the queue.' if queued else ''} All that is committed stays."
        )

    def _watch(self) -> None:
        """Say so when workers are lacking for long."""
        n, wanted = len(self._workers), self._fleet.n_wanted
        if n >= wanted or self._stopping_s is not None or not self._undone:
            self._enough_s = time.monotonic()
            if self._notes.pop("workers", None):
                logger.info("all %d workers are there", n)
            return
        lacking_s = time.monotonic() - self._enough_s
        if lacking_s > _WATCH_S:
            if "workers" not in self._notes:
                logger.warning("%d of %d workers for %.0f s", n, wanted, lacking_s)
            self._notes["workers"] = f"{n} of {wanted} workers for {lacking_s:.0f} s"


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__
