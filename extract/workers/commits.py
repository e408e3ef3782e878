"""Committing in the background: while shards are written and synced, the encoders go on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Self

from cache.commit import Commit
from cache.store import TokenStore
from extract.workers.unit import Chunk, Clock, UnitWork

_WAITING = 4
"""Shards that may wait to be written; more would only fill memory while the disk is slow."""


class Committer:
    """One thread that does what it is given, in order. A context manager.

    The first failure is kept, everything behind it is dropped, and `check` raises it in the thread
    that works on.
    """

    def __init__(self, store: TokenStore, clock: Clock) -> None:
        """Commit to `store`, which this thread has for itself; `clock` gets the time that it takes."""
        self._store, self._clock = store, clock
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commit", daemon=True)

    def commit(
        self,
        unit: UnitWork,
        chunk: Chunk,
        label: str,
        provenance: Mapping[str, str],
        after: Iterable[str],
    ) -> None:
        """Write a shard; waits while too many wait already."""
        self.do(lambda: self._commit(unit, chunk, label, provenance, frozenset(after)))

    def do(self, task: Callable[[], None]) -> None:
        """Do something behind all that was given before."""
        self.check()
        self._tasks.put(task)

    def flush(self) -> None:
        """Wait until everything is done.

        Raises:
            Exception: What went wrong.
        """
        self._tasks.join()
        self.check()

    def check(self) -> None:
        """Raise what went wrong, if something did."""
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._tasks.put(None)
        self._thread.join()

    def _commit(
        self,
        unit: UnitWork,
        chunk: Chunk,
        label: str,
        provenance: Mapping[str, str],
        after: frozenset[str],
    ) -> None:
        began_s = time.monotonic()
        commit: Commit = self._store.commit(chunk.spec, chunk.clips, provenance, after)
        progress = unit.progress
        progress.counts[label].update(entry.status for entry in commit.clips)
        progress.n_bytes += commit.n_bytes
        for clock in (progress.seconds, self._clock):
            clock.write_s += time.monotonic() - began_s

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self._failure is None:
                    task()
            except BaseException as error:  # noqa: BLE001 - raised again by `check`, in the worker's thread
                self._failure = error
            finally:
                self._tasks.task_done()
