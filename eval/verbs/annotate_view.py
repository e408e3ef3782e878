"""How an annotation is shown: its estimate, its progress and its report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cache.commit import Status
from eval.progress import (
    JobView,
    Surroundings,
    failures_in_words,
    human_time,
    job_line,
    panel,
)

if TYPE_CHECKING:
    from extract.annotate.presets import Preset
    from extract.annotate.report import AnnotationEstimate, AnnotationReport, FailedStep
    from extract.summary import Progress as JobProgress
    from extract.summary import Watch

logger = logging.getLogger(__name__)

_LINE_EVERY_S = 30.0
_LOOK_EVERY_S = 1.5


def table(*columns: str, numbers: Sequence[str] = ()) -> Table:
    """Return an empty table; columns named in `numbers` stand to the right."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in columns:
        made.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    return made


def money(cost: float | None) -> str:
    """Return a sum of money, in whatever currency the prices are; a dash without prices."""
    if cost is None:
        return "-"
    return f"{cost:,.2f}" if cost >= 1 or cost == 0 else f"{cost:.4f}"


# ---------------------------------------------------------------------------- before


def estimate_table(found: AnnotationEstimate) -> Table:
    """Return what each role will take."""
    columns = ("requests", "tokens in", "tokens out", "hours", "money")
    made = table("role", *columns, numbers=columns)
    for role in found.roles:
        made.add_row(
            role.role,
            f"{role.requests:,}",
            f"{role.tokens_in:,}",
            f"{role.tokens_out:,}",
            f"{role.hours:,.1f}",
            money(role.cost),
        )
    made.add_row(
        "together",
        f"{found.requests:,}",
        f"{found.tokens_in:,}",
        f"{found.tokens_out:,}",
        f"{found.hours:,.1f}",
        money(found.cost),
        style="bold",
    )
    return made


def estimate_lines(found: AnnotationEstimate, preset: Preset) -> Iterator[str]:
    """Yield what the estimate rests on."""
    assumed = found.assumptions
    yield (
        f"{found.n_todo:,} of {found.n_records:,} records to annotate"
        + "".join(f"; {n:,} {why}" for why, n in found.left_out.items())
    )
    in_flight = ", ".join(f"{role} {o.in_flight}" for role, o in preset.roles.items())
    yield (
        f"assumed: {assumed.request_s:g} s per request with this many in flight: {in_flight or 'none'}; "
        f"{assumed.retried_share:.0%} sent twice; {assumed.image_tokens:g} tokens per picture, "
        f"{assumed.audio_tokens_per_s:g} per second of sound, {assumed.bytes_per_token:g} bytes per token "
        f"of text, {found.clue_bytes:g} bytes per clue; answers of "
        + (", ".join(f"{n:.0f} ({role})" for role, n in found.answer_tokens.items()) or "none")
        + " tokens"
    )
    if found.measured:
        told = ", ".join(f"{role} {n}" for role, n in found.measured.items())
        yield f"measured instead of assumed, on answers at hand: prompt and answer of {told}"
    yield "hours: roles are asked side by side, so that of the slowest counts; change with assumptions.*"
    if found.detector_core_hours is not None:
        yield f"OpenFace takes about {found.detector_core_hours:,.1f} core hours beside that"
    if any(o.price is None for o in preset.roles.values()):
        yield "money: give prices, e.g. consolidate.price='{tokens_in: 2.5, tokens_out: 10}' per million"


# ---------------------------------------------------------------------------- while it runs


class AnnotationView(JobView):
    """Looks at an annotation every few seconds, and shows what it saw."""

    def __init__(
        self, console: Console, watch: Watch, around: Surroundings, preset: Preset
    ) -> None:
        """Show nothing yet; use `annotation_view`."""
        super().__init__(console, watch, around, _LOOK_EVERY_S)
        self._preset = preset

    def look(self) -> None:
        """See `JobView.look`."""
        now_s = time.monotonic()
        found = self.latest = self._watch.look(now_s)
        if self._live is not None:
            self._live.update(annotation_panel(found, self._around, self._preset), refresh=True)
        elif now_s - self._spoke_s >= _LINE_EVERY_S:
            self._spoke_s = now_s
            logger.info("%s", annotation_line(found, self._around))


@contextmanager
def annotation_view(
    console: Console,
    watch: Watch,
    around: Surroundings,
    preset: Preset,
    *,
    in_background: bool = True,
) -> Iterator[AnnotationView]:
    """Show an annotation while it runs: on a terminal a view that is drawn again, else a line every 30 s."""
    view = AnnotationView(console, watch, around, preset)
    with view.shown(in_background=in_background):
        yield view


def usage_of(found: JobProgress) -> dict[str, float]:
    """Return what all workers of a job used up, by role and measure."""
    total: dict[str, float] = {}
    for worker in found.workers:
        for name, value in worker.usage.items():
            total[name] = total.get(name, 0.0) + value
    return total


def annotation_line(found: JobProgress, around: Surroundings) -> str:
    """Return the state of an annotation in one line, for a log."""
    line = job_line(found, around).replace("extracting:", "annotating:", 1)
    requests = sum(v for name, v in usage_of(found).items() if name.endswith(" requests"))
    return f"{line}, {requests:,.0f} requests"


def annotation_panel(
    found: JobProgress, around: Surroundings, preset: Preset | None = None
) -> Group:
    """Return the live view of an annotation."""
    return panel(found, "records", _facts(found, around, preset))


def _facts(
    found: JobProgress, around: Surroundings, preset: Preset | None
) -> Iterator[tuple[str, Text]]:
    is_done = found.n_units_done == found.n_units
    if found.alive and not is_done:
        left = "" if found.left_s is None else f", about {human_time(found.left_s)} left"
        yield "rate", Text(f"{found.clips_per_s:.1f} records/s over the last minute{left}")
    if around.n_hits:
        yield "hits", Text(f"{around.n_hits:,} records were annotated already")
    failed = failures_in_words(found)
    yield "failed", Text(failed or "none", style="yellow" if failed else "")
    usage = usage_of(found)
    for role in dict.fromkeys(name.partition(" ")[0] for name in usage):
        yield role, Text(_role_in_words(role, usage, preset))
    if found.alive and found.seconds.encode_s:
        n = max(1, found.n_clips)
        spent = [f"{name} {human_time(s / n)}" for name, s in found.seconds.encode_s.items()]
        yield "per record", Text(" · ".join(spent))
    if found.alive or not is_done:
        wanted = "" if around.n_wanted is None else f" of {around.n_wanted}"
        at_work = f"{len(found.alive)}{wanted} at work"
        if not found.alive and around.n_wanted is None:
            at_work = "none at work; run the same command again to continue"
        yield "workers", Text(at_work)
    if around.dashboard:
        yield "dashboard", Text(around.dashboard)
    if around.tail:
        yield "logs", Text(around.tail)
    for note in around.notes:
        yield "note", Text(note, style="yellow")


def _role_in_words(role: str, usage: Mapping[str, float], preset: Preset | None) -> str:
    requests, tokens_in, tokens_out = (
        usage.get(f"{role} {measure}", 0.0) for measure in ("requests", "tokens_in", "tokens_out")
    )
    text = f"{requests:,.0f} requests, {tokens_in:,.0f} tokens in, {tokens_out:,.0f} out"
    options = None if preset is None else {str(k): v for k, v in preset.roles.items()}.get(role)
    if options is not None and options.price is not None:
        text += f", {money(options.price.of(tokens_in, tokens_out))}"
    return text


# ---------------------------------------------------------------------------- afterwards


def step_table(found: AnnotationReport) -> Table:
    """Return how each step ended."""
    columns = ("ok", "absent", "failed")
    made = table("step", *columns, "because", numbers=columns)
    for step in found.steps:
        why = [f"{n:,} {reason}" for reason, n in step.absent_because.items()]
        why += [f"{n:,} {kind}" for kind, n in step.failed_by_kind.items()]
        counts = [step.counts.get(s, 0) for s in (Status.OK, Status.ABSENT, Status.FAILED)]
        made.add_row(step.step, *(f"{n:,}" for n in counts), "; ".join(why))
    return made


def cost_table(found: AnnotationReport) -> Table:
    """Return what each role took."""
    columns = ("answers", "requests", "tokens in", "tokens out", "money")
    made = table("role", *columns, numbers=columns)
    for role in found.roles:
        made.add_row(
            role.role,
            f"{role.answers:,}",
            f"{role.requests:,}",
            f"{role.tokens_in:,}",
            f"{role.tokens_out:,}",
            money(role.cost),
        )
    if len(found.roles) > 1:
        answers = sum(role.answers for role in found.roles)
        made.add_row(
            "together",
            f"{answers:,}",
            f"{found.requests:,}",
            f"{found.tokens_in:,}",
            f"{found.tokens_out:,}",
            money(found.cost),
            style="bold",
        )
    return made


def failure_table(failures: Sequence[FailedStep]) -> Table:
    """Return failed steps by kind, the most frequent first."""
    numbers: dict[tuple[str, str], int] = {}
    for failure in failures:
        place = (failure.kind, failure.step)
        numbers[place] = numbers.get(place, 0) + 1
    made = table("kind", "step", "records", numbers=("records",))
    for (kind, step), n in sorted(numbers.items(), key=lambda item: -item[1]):
        made.add_row(kind, step, f"{n:,}")
    return made
