"""Progress: a bar, or a live view of an extraction job, on a terminal; otherwise a line every 30 s."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cache.errors import EmocacheError

if TYPE_CHECKING:
    from extract.summary import Progress as JobProgress
    from extract.summary import Watch

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


# ---------------------------------------------------------------------------- extraction jobs


@dataclass(frozen=True)
class Surroundings:
    """What a live view shows beside the numbers of the job."""

    n_hits: int = 0
    """Clips that were in the store before."""
    n_wanted: int | None = None
    """Workers that were asked for; None if nobody knows."""
    dashboard: str | None = None
    tail: str | None = None
    """Command that follows the workers' logs."""
    notes: tuple[str, ...] = ()


class JobView:
    """Looks at a job every few seconds, and shows what it saw."""

    def __init__(
        self, console: Console, watch: Watch, around: Surroundings, every_s: float
    ) -> None:
        """Show nothing yet; use `job_view`."""
        self._console, self._watch = console, watch
        self._around, self._every_s = around, every_s
        self._live: Live | None = None
        self._closing = threading.Event()
        self._spoke_s = time.monotonic()
        self.latest: JobProgress | None = None
        """The last look."""

    def show(
        self,
        *,
        n_wanted: int | None = None,
        dashboard: str | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Show what the engine says of itself from now on."""
        self._around = replace(self._around, n_wanted=n_wanted, dashboard=dashboard, notes=notes)

    def look(self) -> None:
        """Look at the job once, and show it.

        Raises:
            StoreError: The storage cannot be read.
        """
        now_s = time.monotonic()
        found = self.latest = self._watch.look(now_s)
        if self._live is not None:
            self._live.update(job_panel(found, self._around), refresh=True)
        elif now_s - self._spoke_s >= _LINE_EVERY_S:
            self._spoke_s = now_s
            logger.info("%s", job_line(found, self._around))

    def run(self, is_over: Callable[[JobProgress], bool]) -> None:
        """Look again and again in this thread until `is_over`, which sees every look."""
        while True:
            self.look()
            assert self.latest is not None
            if is_over(self.latest):
                return
            time.sleep(self._every_s)

    def _poll(self) -> None:
        while not self._closing.wait(self._every_s):
            self._try_to_look()

    def _try_to_look(self) -> None:
        try:
            self.look()
        except EmocacheError as error:  # the work itself goes on, and may not notice
            logger.debug("the live view could not look: %s", error)

    @contextmanager
    def shown(self, *, in_background: bool) -> Iterator[JobView]:
        """Show the view inside this block."""
        thread = threading.Thread(target=self._poll, name="live view", daemon=True)
        live = None
        if self._console.is_terminal:
            live = Live(console=self._console, auto_refresh=False, transient=False)
            live.start()
        self._live = live
        if in_background:
            thread.start()
        try:
            yield self
        finally:
            self._closing.set()
            if in_background:
                thread.join()
                if live is not None:
                    self._try_to_look()
            if live is not None:
                live.stop()


@contextmanager
def job_view(
    console: Console,
    watch: Watch,
    around: Surroundings,
    *,
    is_remote: bool,
    in_background: bool = True,
) -> Iterator[JobView]:
    """Show a job while it runs: on a terminal a view that is drawn again, else a line every 30 s.

    Args:
        console: Where.
        watch: Looks at the job.
        around: What is known beside it.
        is_remote: The store is a bucket, which is asked less often.
        in_background: False if the caller uses `JobView.run`.
    """
    view = JobView(console, watch, around, every_s=10.0 if is_remote else 1.5)
    with view.shown(in_background=in_background):
        yield view


def job_panel(found: JobProgress, around: Surroundings = Surroundings()) -> Group:
    """Return the live view of an extraction."""
    return panel(found, "clips", _facts(found, around))


def panel(found: JobProgress, things: str, facts: Iterable[tuple[str, Text]]) -> Group:
    """Return a live view: a bar, and facts below it.

    Args:
        found: How far the job is.
        things: What it counts, for example `clips`.
        facts: Name and value of each line.
    """
    head = Table.grid(padding=(0, 2))
    head.add_row(
        ProgressBar(total=max(1, found.n_planned), completed=found.n_clips, width=36),
        Text(f"{found.n_clips:,} of {found.n_planned:,} {things}", style="bold"),
        Text(f"unit {found.n_units_done:,} of {found.n_units:,}", style="dim"),
    )
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    for name, value in facts:
        lines.add_row(name, value)
    return Group(head, lines)


def _facts(found: JobProgress, around: Surroundings) -> Iterator[tuple[str, Text]]:
    is_done = found.n_units_done == found.n_units
    if found.alive and not is_done:
        left = "" if found.left_s is None else f", about {human_time(found.left_s)} left"
        yield "rate", Text(f"{found.clips_per_s:.1f} clips/s over the last minute{left}")
    if around.n_hits:
        yield "hits", Text(f"{around.n_hits:,} clips were in the store already")
    failed = failures_in_words(found)
    yield "failed", Text(failed or "none", style="yellow" if failed else "")
    seconds = found.seconds
    if found.alive:
        spent = [f"{label} {human_time(value)}" for label, value in seconds.encode_s.items()]
        spent.append(f"waiting for decoding {human_time(seconds.decode_wait_s)}")
        spent.append(f"writing {human_time(seconds.write_s)}")
        yield "time", Text(" · ".join(spent))
    if found.alive or not is_done:
        yield "workers", Text(_workers_in_words(found, around))
    if around.dashboard:
        yield "dashboard", Text(around.dashboard)
    if around.tail:
        yield "logs", Text(around.tail)
    for note in around.notes:
        yield "note", Text(note, style="yellow")


def _workers_in_words(found: JobProgress, around: Surroundings) -> str:
    if not found.alive and around.n_wanted is None:
        return "none at work; run the same command again to continue"
    wanted = "" if around.n_wanted is None else f" of {around.n_wanted}"
    busy = "" if found.gpu_busy is None else f", GPU {found.gpu_busy:.0%} busy"
    return f"{len(found.alive)}{wanted} at work{busy}"


def job_line(found: JobProgress, around: Surroundings) -> str:
    """Return the state of a job in one line, for a log."""
    wanted = "" if around.n_wanted is None else f" of {around.n_wanted}"
    n = len(found.alive)
    parts = [
        f"extracting: {found.n_clips:,} of {found.n_planned:,} clips",
        f"{found.clips_per_s:.1f} a second",
        f"{failures_in_words(found) or 'none'} failed",
        f"{n}{wanted} worker{'s' * (n != 1 or bool(wanted))} at work",
    ]
    if found.left_s is not None:
        parts.append(f"about {human_time(found.left_s)} left")
    return ", ".join(parts)


def failures_in_words(found: JobProgress) -> str:
    """Return how many clips failed, and of what: `3 (2 crash, 1 missing)`; empty if none did."""
    if not found.n_failed:
        return ""
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in found.failed_by_kind.items())
    return f"{found.n_failed:,}{f' ({kinds})' if kinds else ''}"


def human_time(seconds: float) -> str:
    """Return a time in the one or two units that fit it: `0.4 s`, `12 s`, `3 min 20 s`, `5 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h"
