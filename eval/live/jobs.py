"""The work of the page, in threads: so many jobs at once, so many waiting, and no more.

A job belongs to its thread, not to the browser that asked: it ends what it began and cleans up after itself,
also if nobody looks any more. What it tells on the way is seen by whoever follows it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from eval.live.uploads import BusyError

Say = Callable[[Any], None]
"""Tells whoever follows the job how far it is."""

_LOOK_S = 0.4
"""Longest time between two looks at how many are ahead in the line."""


class Waiting:
    """Said of a job that has not begun: how many are ahead of it."""

    def __init__(self, n_ahead: int) -> None:
        self.n_ahead = n_ahead


class Stopped(Exception):
    """A job was stopped, or nobody follows it any more."""


class Job:
    """One piece of work. It is stopped at the next thing it says once nobody follows it."""

    def __init__(self, line: JobLine, work: Callable[[Say], Any]) -> None:
        self._line = line
        self._work = work
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._latest: Any = None
        self.began = False
        self._stop = threading.Event()
        self.future: Future[Any] = Future()

    def run(self) -> Any:
        """Do the work; called by the thread of the line."""
        self.began = True
        try:
            return self._work(self._say)
        finally:
            self._line.done(self)

    def _say(self, told: Any) -> None:
        if self._stop.is_set():
            raise Stopped
        self._latest = told
        self._wake()

    def end_soon(self) -> None:
        """Have the job end at the next thing it says."""
        self._stop.set()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the server has ended
            self._stop.set()

    def stop(self) -> None:
        """End the job: at the next thing it says, or before it begins. Who follows it hears at once."""
        self._stop.set()
        if self.future.cancel():
            self._line.done(self)
        self._wake()

    async def follow(self) -> AsyncIterator[Any]:
        """Yield what the job says, the latest each time, and its result at last.

        Leaving the iteration stops the job, or takes it out of the line.

        Raises:
            Stopped: It was stopped.
            Exception: What the work raised.
        """
        self.future.add_done_callback(lambda _: self._wake())
        n_ahead = None
        try:
            while not self.future.done() and not self._stop.is_set():
                if not self.began:
                    before, n_ahead = n_ahead, self._line.n_ahead(self)
                    if n_ahead != before:
                        yield Waiting(n_ahead)
                try:
                    # Only who waits in the line has to look by the clock.
                    await asyncio.wait_for(self._news.wait(), None if self.began else _LOOK_S)
                except TimeoutError:
                    continue
                self._news.clear()
                told, self._latest = self._latest, None
                if told is not None:
                    yield told
            if self._stop.is_set():
                raise Stopped
            yield self.future.result()
        finally:
            self.stop()


class JobLine:
    """The line in which jobs wait for their turn.

    Args:
        n_at_once: Jobs that run side by side.
        max_waiting: Jobs that may wait behind them.
    """

    def __init__(self, n_at_once: int, max_waiting: int) -> None:
        self._n_at_once = n_at_once
        self._max_waiting = max_waiting
        self._guard = threading.Lock()
        self._jobs: list[Job] = []
        self._threads = ThreadPoolExecutor(n_at_once, thread_name_prefix="page")

    def submit(self, work: Callable[[Say], Any]) -> Job:
        """Put work at the end of the line; call it where an event loop runs.

        Raises:
            BusyError: The line is full.
        """
        job = Job(self, work)
        with self._guard:
            if len(self._jobs) >= self._n_at_once + self._max_waiting:
                raise BusyError(
                    f"This page is busy: {len(self._jobs)} questions are being answered or wait already. "
                    "Try again in a minute."
                )
            self._jobs.append(job)
        job.future = self._threads.submit(job.run)
        return job

    def n_ahead(self, job: Job) -> int:
        """Return how many jobs are before this one in the line; those that run count too."""
        with self._guard:
            return self._jobs.index(job) if job in self._jobs else 0

    def done(self, job: Job) -> None:
        """Take a job out of the line."""
        with self._guard:
            if job in self._jobs:
                self._jobs.remove(job)

    def close(self) -> None:
        """Stop everything; what runs ends at the next thing it says."""
        with self._guard:
            for job in self._jobs:
                job.end_soon()
        self._threads.shutdown(wait=True, cancel_futures=True)
