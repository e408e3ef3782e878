"""One progress display: a bar on a terminal, otherwise a line every 30 seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 30.0


class Bar:
    """A count towards a total."""

    def __init__(self, what: str, total: int, unit: str, progress: Progress | None) -> None:
        """Start at zero; use `progress_bar`."""
        self._what, self._total, self._unit = what, total, unit
        self._progress = progress
        self._task: TaskID | None = None
        if progress is not None:
            self._task = progress.add_task(what, total=total, unit=unit, note="")
        self._done = 0
        self._started = self._spoke = time.monotonic()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more, and show a short remark such as the loss."""
        self._done += n
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=n, note=note)
            return
        now = time.monotonic()
        if now - self._spoke >= _LINE_EVERY_S:
            self._spoke = now
            rate = self._done / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            logger.info(
                "%s: %d of %d %s, %.1f a second, about %.0f s left %s",
                self._what, self._done, self._total, self._unit, rate, left, note,
            )  # fmt: skip


@contextmanager
def progress_bar(console: Console, what: str, total: int, unit: str) -> Iterator[Bar]:
    """Show progress of `total` units of work, for example clips or steps, on a console."""
    if not console.is_terminal:
        yield Bar(what, total, unit, None)
        return
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(what, total, unit, progress)
