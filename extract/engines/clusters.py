"""Where Dask workers come from: processes of this machine, the jobs of a batch system, a running cluster.

Job scripts are dask-jobqueue's. Ours on top: a submission that the batch system refuses is tried again,
a job that left the queue without a word is replaced, and workers know when their walltime ends.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import dask.config
from distributed import Adaptive, Client, LocalCluster, Security
from distributed.deploy.spec import ProcessInterface

from cache.errors import ExtractionStopped
from extract.engines.job_scripts import NAME, job_class, job_options, walltime_of
from extract.engines.options import EngineOptions

logger = logging.getLogger(__name__)

_QUEUE_TIMEOUT_S = 10.0
"""Longest wait for an answer of the batch system."""
_TEND_EVERY_S = 30.0
_MAX_PAUSE_S = 30.0
"""Between two attempts to submit a job that the batch system refuses."""
_CLOSE_S = 20.0
_ADAPT_EVERY = "2s"
_LOOPBACK = "127.0.0.1:0"
"""For Dask's pages, which ask nobody who he is; without bokeh there are some bare ones left."""


class Fleet(Protocol):
    """The workers of one run, and how to get more."""

    walltime_s: float | None
    """Of each worker's job."""
    rank_by_name: bool
    """Workers are named by their number on this machine."""
    is_ours: bool
    """Workers may be started, restarted and closed."""
    n_wanted: int
    """How many to have; may be changed."""

    def connect(self, timeout_s: float) -> Client:
        """Return a client; OSError if the scheduler does not answer."""

    @property
    def dashboard_link(self) -> str | None:
        """Dask's own page."""

    def trouble(self) -> str | None:
        """What keeps workers from starting, if it is known to be in vain to wait."""

    def report(self) -> str:
        """What there is to say of workers that do not come."""

    def tend(self) -> None:
        """Replace what was lost."""

    def close(self) -> None:
        """End all workers that are ours; those in the queue too."""


def open_fleet(options: EngineOptions, session: str) -> Fleet:
    """Start what gives workers. Call within `dask.config.set(dask_settings())`.

    Raises:
        SchemaError: The options do not fit the engine.
        ExtractionStopped: The batch system is not here.
    """
    if options.kind == "local":
        return LocalFleet(options)
    if options.kind == "dask":
        return ForeignFleet(options)
    return JobFleet(options, session)


class _Wanted(Adaptive):
    """Keeps as many workers as are wanted: Dask's own estimate knows nothing of units."""

    n_wanted = 0

    async def target(self) -> int:
        return self.n_wanted

    async def workers_to_close(self, target: int) -> list[str]:
        return []  # who is idle, the supervisor knows: to Dask, all loops look alike


def _own_keys(folder: Path | None = None) -> Security:
    """Return keys of this run's own: whoever can talk to a Dask scheduler may run anything as its user.

    Args:
        folder: Where to write them, for workers on other machines; only the user may look into it.
    """
    keys: Security = Security.temporary()
    if folder is None:
        return keys
    config = keys.get_tls_config_for_role("worker")  # the same for each role
    for name in ("ca_file", "key", "cert"):
        (folder / name).write_text(config[name], encoding="ascii")
    roles = {
        f"tls_{role}_{name}": str(folder / name)
        for role in ("client", "scheduler", "worker")
        for name in ("key", "cert")
    }
    return Security(tls_ca_file=str(folder / "ca_file"), require_encryption=True, **roles)


def _has_bokeh() -> bool:
    return importlib.util.find_spec("bokeh") is not None


class ForeignFleet:
    """A Dask cluster that somebody else runs."""

    walltime_s: float | None = None
    rank_by_name = False
    is_ours = False

    def __init__(self, options: EngineOptions) -> None:
        """Use the scheduler at `options.scheduler`."""
        assert options.scheduler is not None
        self._address = options.scheduler
        self._link: str | None = None
        self.n_wanted = options.workers

    def connect(self, timeout_s: float) -> Client:
        """See `Fleet.connect`."""
        client = Client(self._address, timeout=timeout_s, set_as_default=False)
        self._link = client.dashboard_link if _has_bokeh() else None
        return client

    @property
    def dashboard_link(self) -> str | None:
        """See `Fleet.dashboard_link`."""
        return self._link

    def trouble(self) -> str | None:
        """See `Fleet.trouble`."""
        return None

    def report(self) -> str:
        """See `Fleet.report`."""
        return (
            f"The scheduler at {self._address} has no workers; start some, for example "
            f"`dask worker {self._address} --nthreads 1`, in this environment."
        )

    def tend(self) -> None:
        """See `Fleet.tend`."""

    def close(self) -> None:
        """See `Fleet.close`."""


class _OwnFleet:
    """A cluster whose scheduler runs in this process."""

    is_ours = True
    _cluster: Any
    _adaptive: _Wanted

    @property
    def n_wanted(self) -> int:
        """See `Fleet.n_wanted`."""
        return self._adaptive.n_wanted

    @n_wanted.setter
    def n_wanted(self, n: int) -> None:
        self._adaptive.n_wanted = n

    def connect(self, timeout_s: float) -> Client:
        """See `Fleet.connect`."""
        return Client(self._cluster, timeout=timeout_s, set_as_default=False)

    @property
    def dashboard_link(self) -> str | None:
        """See `Fleet.dashboard_link`."""
        service = self._cluster.scheduler.services.get("dashboard")
        # Not Dask's own link: that names a host on whose address nothing listens.
        return f"http://127.0.0.1:{service.port}/status" if service and _has_bokeh() else None

    def _close_cluster(self) -> None:
        self._adaptive.stop()
        try:
            self._cluster.close(timeout=_CLOSE_S)
        except OSError as error:  # too slow, or a connection broke: the processes end all the same
            logger.warning("the Dask cluster did not close in order: %s", error)


class LocalFleet(_OwnFleet):
    """Processes of this machine, reachable from it alone."""

    walltime_s: float | None = None
    rank_by_name = True

    def __init__(self, options: EngineOptions) -> None:
        """Start the processes."""
        self._cluster = LocalCluster(
            n_workers=options.workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            security=_own_keys(),
            dashboard_address=_LOOPBACK,
            memory_limit=0,
            silence_logs=logging.CRITICAL,  # of the workers, which write to this terminal
        )
        self._adaptive = self._cluster.adapt(
            Adaptive=_Wanted,
            minimum=options.least_workers,
            maximum=options.workers,
            interval=_ADAPT_EVERY,
        )
        self.n_wanted = options.workers

    def trouble(self) -> str | None:
        """See `Fleet.trouble`."""
        return None

    def report(self) -> str:
        """See `Fleet.report`."""
        return "Processes do not start on this machine; what Dask says is in *-engine.log of the log folder."

    def tend(self) -> None:
        """See `Fleet.tend`: Dask restarts processes by itself."""

    def close(self) -> None:
        """See `Fleet.close`."""
        self._close_cluster()


# ---------------------------------------------------------------------------- batch systems


class JobFleet(_OwnFleet):
    """Jobs of a batch system, one worker each, and the scheduler in this process."""

    rank_by_name = False

    def __init__(self, options: EngineOptions, session: str) -> None:
        """Start the scheduler and submit the first jobs."""
        from dask_jobqueue.core import JobQueueCluster

        base = job_class(options.kind)
        command = shlex.split(base.submit_command)[0]
        if shutil.which(command) is None:
            raise ExtractionStopped(
                f"--engine {options.kind} submits jobs with `{command}`, which is not on this machine. "
                "Run this on a machine from which you can submit jobs."
            )
        self.walltime_s = walltime_of(options)
        self._options = options
        self._refusals: deque[str] = deque(maxlen=5)
        self._n_lost = 0
        self._heard: dict[str, str] = {}
        """Worker -> its last job that was heard of."""
        self._tended_s = time.monotonic()
        self._state: dict[str, bool] = {"closing": False}
        chosen = dask.config.get(f"jobqueue.{options.kind}.scheduler-options", None) or {}
        shared = options.log_dir or Path.cwd()
        shared.mkdir(parents=True, exist_ok=True)
        self._keys = tempfile.TemporaryDirectory(dir=shared, prefix=".dask-keys-")
        with warnings.catch_warnings():
            # A machine without a route to anywhere: the scheduler is on loopback then.
            warnings.filterwarnings("ignore", "Couldn't detect a suitable IP", RuntimeWarning)
            self._cluster = JobQueueCluster(
                job_cls=_patient(base, self._refusals, self._state),
                name=f"{NAME}-{session}",
                scheduler_options={
                    "dashboard_address": _LOOPBACK,
                    **chosen,
                },
                security=_own_keys(Path(self._keys.name)),
                silence_logs=logging.ERROR,
                **job_options(options),
            )
        self._adaptive = self._cluster.adapt(
            Adaptive=_Wanted,
            minimum_jobs=options.least_workers,
            maximum_jobs=options.workers,
            interval=_ADAPT_EVERY,
        )
        self.n_wanted = options.workers

    def trouble(self) -> str | None:
        """See `Fleet.trouble`."""
        if len(self._refusals) >= 3:
            return f"{self._options.kind} refuses the jobs: {self._refusals[-1]}"
        if self._n_lost >= 3:
            return f"{self._n_lost} jobs ended before their worker could connect. {self.report()}"
        return None

    def report(self) -> str:
        """See `Fleet.report`."""
        ids = sorted(self._jobs().values())
        if self._refusals:
            said = f"The last refusal: {self._refusals[-1]}"
        elif self._options.kind == "slurm" and ids:
            states = self._queue(ids)
            if states is None:
                said = "squeue does not answer."
            else:
                found = [f"job {n} {states.get(n, 'is no longer in the queue')}" for n in ids]
                said = f"The queue says: {'; '.join(found)}."
        else:
            said = f"Jobs: {', '.join(ids) or 'none'}."
        words = self._last_words()
        folder = self._options.log_dir
        return (
            said
            + (f" The last line of a job's output: {words}." if words else "")
            + (f" Their output is in {folder}." if folder else " Give a log folder to see more.")
        )

    def tend(self) -> None:
        """Replace jobs that left the queue before their worker connected: Dask waits for them for ever."""
        self._note_heard()
        if self._options.kind != "slurm" or time.monotonic() - self._tended_s < _TEND_EVERY_S:
            return
        self._tended_s = time.monotonic()
        silent = self._silent()
        states = self._queue(list(silent.values())) if silent else None
        if states is None:
            return
        self._note_heard()
        for name, number in silent.items():
            if number not in states and name in self._silent():
                logger.warning("job %s ended before its worker connected", number)
                self._n_lost += 1
                self._cluster.loop.add_callback(self._cluster.workers.pop, name, None)

    def close(self) -> None:
        """See `Fleet.close`."""
        self._state["closing"] = True
        ids = sorted(self._jobs().values())
        self._close_cluster()
        cancel = shlex.split(job_class(self._options.kind).cancel_command)
        if self._options.kind == "slurm" and ids and (left := self._queue(ids)):
            with suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run([*cancel, *left], timeout=_QUEUE_TIMEOUT_S, check=False)
        self._keys.cleanup()

    # ---------------------------------------------------------------- parts

    def _note_heard(self) -> None:
        heard = {str(w["name"]) for w in self._cluster.scheduler_info["workers"].values()}
        if heard:
            self._n_lost = 0
            self._refusals.clear()
        self._heard |= {name: job for name, job in self._jobs().items() if name in heard}

    def _silent(self) -> dict[str, str]:
        """Return worker -> job of those that were submitted and never heard of."""
        return {n: job for n, job in self._jobs().items() if self._heard.get(n) != job}

    def _jobs(self) -> dict[str, str]:
        """Return worker -> job."""
        jobs = dict(self._cluster.workers)  # Dask's thread changes it
        return {str(name): str(job.job_id) for name, job in jobs.items() if job.job_id}

    @staticmethod
    def _queue(ids: Collection[str]) -> dict[str, str] | None:
        """Return job -> its state and reason, of those in the queue; None if Slurm does not answer."""
        command = ["squeue", "--noheader", "--format=%i %T (%r)", "--me"]
        try:
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=_QUEUE_TIMEOUT_S, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        lines = [line.strip().partition(" ") for line in answer.stdout.splitlines()]
        return {number: said for number, _, said in lines if number in ids}

    def _last_words(self) -> str | None:
        folder = self._options.log_dir
        if folder is None:
            return None
        files = [p for p in folder.glob(f"{NAME}-*.err") if p.stat().st_size]
        if not files:
            return None
        newest = max(files, key=lambda path: path.stat().st_mtime)
        lines = newest.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else None


def _patient(base: Any, refusals: deque[str], state: Mapping[str, bool]) -> Any:
    """Return a job class that submits again and again.

    A busy controller does not answer now and then, and a job that Dask could not submit once is lost to
    it for good.
    """

    class PatientJob(base):  # type: ignore[misc]
        async def start(self) -> None:
            pause_s = 1.0
            while not state["closing"]:
                try:
                    return await super().start()  # type: ignore[no-any-return]
                except (OSError, RuntimeError, ValueError) as error:
                    refusals.append(_said_by(error))
                    logger.warning("a job was not submitted: %s", refusals[-1])
                wake_s = time.monotonic() + pause_s
                while time.monotonic() < wake_s and not state["closing"]:
                    await asyncio.sleep(0.1)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
            return await ProcessInterface.start(self)  # type: ignore[no-any-return]

    return PatientJob


def _said_by(error: Exception) -> str:
    """Return what the batch system said, of dask-jobqueue's many lines."""
    _, _, said = str(error).partition("stderr:\n")
    lines = [line.strip() for line in (said or str(error)).splitlines() if line.strip()]
    return "; ".join(lines) or type(error).__name__
