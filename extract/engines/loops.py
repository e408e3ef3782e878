"""What runs inside a Dask worker: one worker loop, and the chance to finish when the process must end.

Dask only starts loops; which units they take is settled in the store. Nothing but two small JSON
documents crosses the network: the worker's configuration, and how its loop ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

from distributed import WorkerPlugin, get_worker
from distributed.utils import sync

from cache import errors
from cache.errors import EmocacheError, EncoderError
from cache.schema import Model, decode_json
from extract.workers import drain, loop

if TYPE_CHECKING:
    from distributed import Worker

logger = logging.getLogger(__name__)

DRAIN_S = 90.0
"""Longest wait for a loop to commit what it has done when its process must end. Whoever ends the
process may wait less: after SIGTERM, Dask's nanny gives a worker 8 s."""
JOB_STARTED = "EMOCACHE_JOB_STARTED_S"
"""Environment variable that job scripts set: when the job began, Unix time."""
PLUGIN_NAME = "emocache-drain"


class LoopEnd(Model):
    """How a loop ended."""

    end_reason: str | None = None
    """Why before the work was done; None if it did not."""
    expired: bool = False
    """The worker's walltime is nearly over: start nothing on it again."""
    error: str | None = None
    """Class of the error that ended it."""
    message: str = ""
    must_stop: bool = False
    """The error ends the whole run; otherwise it concerns this worker's process."""

    def as_error(self) -> EmocacheError:
        """Return the error as it was in the worker: of the same class, with the same message."""
        cls = getattr(errors, str(self.error), None)
        if not (isinstance(cls, type) and issubclass(cls, EmocacheError)):
            return EmocacheError(f"{self.error}: {self.message}")
        error: EmocacheError = cls.__new__(cls, self.message)  # cls(...) may want other arguments
        return error


def run_loop(config_json: str, walltime_s: float | None, rank_by_name: bool) -> str:
    """Run one worker loop in this Dask worker.

    Args:
        config_json: A `LoopConfig` of some kind, whose `drain_after_s` counts from the start of the job.
        walltime_s: Of the job that this worker runs in; None if it may stay.
        rank_by_name: The worker's name is its number on this machine.

    Returns:
        A `LoopEnd` as JSON.
    """
    config = loop.read_config(config_json)
    drain_after_s = config.drain_after_s
    left_s = time_left_s(walltime_s, drain_after_s)
    if left_s is not None:
        if left_s <= 0:
            return LoopEnd(expired=True).model_dump_json()
        # The nanny may have replaced this process since the job began: its own age says nothing.
        config = config.model_copy(update={"drain_after_s": left_s})
    let_worker_drain()
    rank = int(get_worker().name) if rank_by_name else 0
    try:
        from extract.jobs.session import WorkerState

        answer = loop.work(config.model_dump_json(), rank)
        state = decode_json(WorkerState, answer, "the worker's answer")
    except EncoderError as error:
        return _failed(error, must_stop=False)
    except EmocacheError as error:
        return _failed(error, must_stop=True)
    except Exception as error:  # the process boundary: reported to the engine, which counts them
        logger.exception("the worker loop failed")
        return _failed(error, must_stop=False)
    left_s = time_left_s(walltime_s, drain_after_s)
    expired = left_s is not None and left_s <= 0
    return LoopEnd(end_reason=state.end_reason, expired=expired).model_dump_json()


def let_worker_drain() -> None:
    """See to it that this Dask worker lets its loops finish before it closes.

    Not through the scheduler: on somebody else's, a plugin would outlive us, and workers that cannot
    load it do not start.
    """
    worker = get_worker()
    if PLUGIN_NAME not in worker.plugins:
        sync(worker.loop, worker.plugin_add, plugin=DrainPlugin(), name=PLUGIN_NAME)


def time_left_s(walltime_s: float | None, drain_after_s: float | None) -> float | None:
    """Return how long this worker may still take units; None if there is no limit.

    Args:
        walltime_s: Of its job.
        drain_after_s: How long after the start of the job it shall finish up.
    """
    started = os.environ.get(JOB_STARTED)
    if walltime_s is None or drain_after_s is None or started is None:
        return None
    return float(started) + min(walltime_s, drain_after_s) - time.time()


def identity() -> tuple[str, int]:
    """Return host and process id, by which a worker's state in the store is known."""
    return socket.gethostname(), os.getpid()


async def drain_loops() -> None:
    """Have the loops of this Dask worker end, without waiting for their next look at the store."""
    drain.drain_all("told to stop")


async def leave(dask_worker: Worker) -> None:
    """Close this Dask worker and its nanny, and so end its job.

    The scheduler's own way, `retire_workers`, refuses while a worker holds the last copy of an answer.
    """
    reason = "no longer needed"
    leaving = asyncio.ensure_future(dask_worker.close(reason=reason))
    leaving.add_done_callback(lambda task: task.cancelled() or task.result())


def _failed(error: Exception, *, must_stop: bool) -> str:
    name = type(error).__name__
    return LoopEnd(error=name, message=str(error), must_stop=must_stop).model_dump_json()


class DrainPlugin(WorkerPlugin):
    """Lets the loops of a Dask worker commit what they have done before it closes."""

    def setup(self, worker: Worker) -> None:
        """Let signals end the worker as Dask does, in order.

        Batch systems and terminals send them to every process of a job. Left alone, SIGTERM kills the
        worker at once, while its nanny still believes that it gives it time to close.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        loop = asyncio.get_running_loop()

        def close() -> None:
            self._closing = asyncio.ensure_future(worker.close(nanny=False, reason="SIGTERM"))

        def on_signal(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(close)

        signal.signal(signal.SIGTERM, on_signal)
        if worker.nanny is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the front

    async def teardown(self, worker: Worker) -> None:
        """Have all loops of this process end, and wait for that."""
        drain.drain_all("its Dask worker closes")
        if not await asyncio.to_thread(drain.idle, DRAIN_S):
            logger.warning("a worker loop did not end within %g s", DRAIN_S)
