"""What a worker of a job array says on its terminal or in its log: a line every 30 seconds."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Self

from cache.errors import EmocacheError

if TYPE_CHECKING:
    from extract.jobs.job import Job

logger = logging.getLogger(__name__)

LINE_EVERY_S = 30.0
"""Between two lines."""


class WorkerLines:
    """Says every 30 seconds how far one worker of many is. A context manager."""

    def __init__(self, job: Job, doing: str, things: str) -> None:
        """Start counting.

        Args:
            job: Whose worker this is.
            doing: Word for the work, for example `extracting`.
            things: What is counted, for example `clips`.
        """
        self._job, self._doing, self._things = job, doing, things
        self._n = 0
        self._began_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def advance(self) -> None:
        """Count one more."""
        self._n += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(LINE_EVERY_S):
            rate = self._n / (time.monotonic() - self._began_s)
            try:
                n_done = self._job.n_done()
            except EmocacheError as error:  # the worker itself has its say on that
                logger.debug("the job cannot be looked at: %s", error)
                continue
            logger.info(
                "%s: %d %s by this worker, %.1f a second; %d of the job's %d units are done",
                self._doing, self._n, self._things, rate, n_done, len(self._job.plan.units),
            )  # fmt: skip
