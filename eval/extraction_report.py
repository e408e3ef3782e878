"""The report of an extraction job: one self-contained HTML page, and the same numbers as JSON.

`extract.summary.JobSummary` holds everything that a report says. The figures are drawn by the
template, so that no plotting library is needed where extraction runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple

from cache.files import write_text_aside
from eval.formats import excerpt, human_size, number
from eval.pages import page_environment
from eval.progress import human_time
from eval.tables import MEANINGS
from extract.failures import AnyKind
from extract.summary import JobSummary, WorkerSummary

REPORT_HTML: Final = "report.html"
REPORT_JSON: Final = "report.json"

_MUCH_WAITING: Final = 0.2
"""Share of the encoders' time above which waiting for decoding is worth a remark."""

MAX_WORKERS: Final = 200
"""Workers that a page shows; the JSON has all of them."""
MAX_EXAMPLES: Final = 5
"""Failed clips that a page shows of each kind."""

_WIDTH, _LEFT, _RIGHT = 940.0, 64.0, 12.0
"""Of every figure, in SVG units; the figures share their time axis."""
_CURVE_HEIGHT: Final = 170.0
_ROW_HEIGHT, _THIN_ROW_HEIGHT = 20.0, 8.0
_LABELLED_ROWS: Final = 40
"""With more workers the rows are thin and bear no names."""
_TIME_STEPS_S: Final = (
    *(1, 2, 5, 10, 20, 30),
    *(60 * n for n in (1, 2, 5, 10, 20, 30)),
    *(3600 * n for n in (1, 2, 3, 6, 12)),
    *(86_400 * n for n in (1, 2, 5, 10, 30, 100)),
)


class Tick(NamedTuple):
    """A mark on an axis."""

    place: float
    label: str


class Curve(NamedTuple):
    """Throughput over time, as an SVG area."""

    path: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    height: float
    """Of the figure, labels included."""


class Lane(NamedTuple):
    """One worker's life."""

    name: str
    y: float
    height: float
    x: float
    width: float
    style: str
    """CSS class: working, ended, stopped or vanished."""
    hint: str


class Timeline(NamedTuple):
    """When each worker lived."""

    lanes: list[Lane]
    x_ticks: list[Tick]
    height: float
    has_names: bool


class Part(NamedTuple):
    """A part of a stacked bar, and a row of the table below it."""

    name: str
    style: str
    """CSS class."""
    seconds: float
    x: float
    width: float


class Stages(NamedTuple):
    """Where time went, as two bars of one scale."""

    encoders: list[Part]
    """What the workers' own threads did, one thing at a time."""
    beside: list[Part]
    """What went on at the same time, in other processes and threads."""


class FailureRow(NamedTuple):
    """Failed clips of one kind."""

    kind: AnyKind
    meaning: str
    n_clips: int
    examples: list[tuple[str, str, str]]
    """(uid, streams, reason)."""


def write_extraction_report(
    summary: JobSummary, store: str, out_dir: Path, *, notes: Sequence[str] = ()
) -> tuple[Path, Path]:
    """Write `report.html` and `report.json` into a folder; older files are replaced.

    Args:
        summary: All numbers.
        store: Path or URL of the store, for the heading.
        out_dir: Created if it is not there.
        notes: What a reader must know beside what the numbers say themselves.

    Returns:
        The paths of both files.

    Raises:
        MissingDependencyError: jinja2 is not installed; the JSON file is there by then.
        OSError: The folder cannot be written.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    json_path, html_path = out_dir / REPORT_JSON, out_dir / REPORT_HTML
    write_text_aside(json_path, summary.model_dump_json(indent=2) + "\n")
    write_text_aside(html_path, render_extraction_report(summary, store, notes))
    return html_path, json_path


def render_extraction_report(summary: JobSummary, store: str, notes: Sequence[str] = ()) -> str:
    """Return the HTML page; see `write_extraction_report`."""
    environment = page_environment("The HTML report of an extraction")
    environment.filters.update(
        count=lambda value: f"{value:,}",
        number=number,
        excerpt=excerpt,
        size=human_size,
        time=human_time,
        moment=_moment,
        moment_of_day=lambda unix_s: _moment(unix_s).partition(" ")[2],
        pct=lambda share: f"{100 * share:.1f}",
    )
    stages = stages_of(summary)
    context: dict[str, Any] = {
        "data": summary,
        "store": store,
        "notes": [*_own_notes(summary), *notes],
        "curve": curve(summary),
        "timeline": timeline(summary),
        "stages": stages,
        "encoders_s": sum(part.seconds for part in stages.encoders),
        "advice": _advice(summary),
        "one_day": len({_moment(worker.started_s)[:10] for worker in summary.workers}) == 1,
        "most_units": max((worker.n_units for worker in summary.workers), default=0),
        "shown": summary.workers[:MAX_WORKERS],
        "failures": failure_rows(summary),
        "ends": end_in_words,
        "figure": {"width": _WIDTH, "left": _LEFT, "right": _WIDTH - _RIGHT},
    }
    return environment.get_template("extraction.html.j2").render(context)


def end_in_words(worker: WorkerSummary) -> str:
    """Return how a worker ended, for people."""
    if worker.outcome == "working":
        return "at work"
    if worker.outcome == "vanished":
        return "vanished (killed?)"
    return f"ended early: {worker.end_reason}" if worker.end_reason else "no work was left"


def failure_rows(summary: JobSummary) -> list[FailureRow]:
    """Return failed clips by kind, the most frequent kind first."""
    rows = []
    for kind, n_clips in summary.failed_by_kind.items():
        streams: dict[tuple[str, str], list[str]] = {}
        for failure in summary.failures:
            if failure.kind == kind:
                streams.setdefault((failure.uid, failure.reason), []).append(failure.stream)
        examples = [
            (uid, ", ".join(dict.fromkeys(under)), reason)
            for (uid, reason), under in list(streams.items())[:MAX_EXAMPLES]
        ]
        rows.append(FailureRow(kind, MEANINGS[kind], n_clips, examples))
    return rows


def stages_of(summary: JobSummary) -> Stages:
    """Return where the workers' time went, in the order of the bars; parts without time are left out.

    What is no stage of its own (loading weights, reading the store's index) is `other`.
    """
    seconds = summary.seconds
    named = [
        (f"encoding, {label}", f"e{n % 5}", value)
        for n, (label, value) in enumerate(seconds.encode_s.items())
    ]
    named += [
        ("waiting for decoding", "wait", seconds.decode_wait_s),
        ("idle, no unit to take", "idle", seconds.idle_s),
    ]
    known = sum(value for _, _, value in named)
    named.append(("starting, loading, other", "other", max(0.0, summary.worker_s - known)))
    beside = [
        ("decoding, CPU time", "decode", seconds.decode_cpu_s),
        ("fetching remote media", "fetch", seconds.fetch_s),
        ("writing and committing", "write", seconds.write_s),
    ]
    longest = max(sum(value for _, _, value in bar) for bar in (named, beside))
    return Stages(_parts(named, longest), _parts(beside, longest))


def _parts(named: Sequence[tuple[str, str, float]], longest: float) -> list[Part]:
    parts: list[Part] = []
    x = 0.0
    for name, style, value in named:
        if value > 0:
            width = _WIDTH * value / longest
            parts.append(Part(name, style, value, x, width))
            x += width
    return parts


def curve(summary: JobSummary) -> Curve | None:
    """Return throughput over the time axis of all workers; None before the first receipt."""
    found = summary.throughput
    if found is None or summary.started_s is None or summary.ended_s is None:
        return None
    start_s, span_s = _time_axis(summary)
    top = max(found.clips_per_s) or 1.0
    step = nice_step(top, 4)
    ceiling = step * math.ceil(top / step - 1e-9)
    steps = [(_CURVE_HEIGHT * (1 - value / ceiling)) for value in found.clips_per_s]
    first = _x(found.start_s - start_s, span_s)
    points = [f"M{first:.1f},{_CURVE_HEIGHT:.1f}"]
    for place, y in enumerate(steps):
        begin = _x(found.start_s - start_s + place * found.step_s, span_s)
        end = _x(found.start_s - start_s + (place + 1) * found.step_s, span_s)
        points.append(f"L{begin:.1f},{y:.1f}L{min(end, _WIDTH - _RIGHT):.1f},{y:.1f}")
    last = _x(found.start_s - start_s + len(steps) * found.step_s, span_s)
    points.append(f"L{min(last, _WIDTH - _RIGHT):.1f},{_CURVE_HEIGHT:.1f}Z")
    y_ticks = [
        Tick(_CURVE_HEIGHT * (1 - n * step / ceiling), f"{n * step:g}")
        for n in range(round(ceiling / step) + 1)
    ]
    return Curve("".join(points), _time_ticks(span_s), y_ticks, _CURVE_HEIGHT)


def timeline(summary: JobSummary) -> Timeline | None:
    """Return a lane for each worker on the time axis of all of them; None if there was none."""
    if summary.started_s is None or summary.ended_s is None:
        return None
    start_s, span_s = _time_axis(summary)
    shown = summary.workers[:MAX_WORKERS]
    has_names = len(shown) <= _LABELLED_ROWS
    row = _ROW_HEIGHT if has_names else _THIN_ROW_HEIGHT
    lanes = []
    for place, worker in enumerate(shown):
        x = _x(worker.started_s - start_s, span_s)
        end = _x(worker.seen_s - start_s, span_s)
        style = "stopped" if worker.outcome == "ended" and worker.end_reason else worker.outcome
        lived = f"{_moment(worker.started_s)} to {_moment(worker.seen_s)}, {worker.n_clips:,} clips"
        lanes.append(
            Lane(
                f"{place + 1}",
                place * row,
                row,
                x,
                max(1.5, end - x),
                style,
                f"{worker.worker_id} on {worker.host}: {lived}, {end_in_words(worker)}",
            )
        )
    return Timeline(lanes, _time_ticks(span_s), row * len(shown), has_names)


def nice_step(top: float, n_steps: int) -> float:
    """Return a round step (1, 2 or 5 times a power of ten) that reaches `top` in about `n_steps`."""
    raw = top / n_steps
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))


def _time_axis(summary: JobSummary) -> tuple[float, float]:
    assert summary.started_s is not None
    assert summary.ended_s is not None
    start_s, end_s = summary.started_s, summary.ended_s
    if summary.throughput is not None:  # receipts may be older than the heartbeat that was lost
        start_s = min(start_s, summary.throughput.start_s)
    return start_s, max(1.0, end_s - start_s)


def _x(since_s: float, span_s: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - _RIGHT) * since_s / span_s


def _time_ticks(span_s: float) -> list[Tick]:
    step = next((s for s in _TIME_STEPS_S if span_s / s <= 8), _TIME_STEPS_S[-1])
    return [Tick(_x(at, span_s), _elapsed(at, step)) for at in range(0, int(span_s) + 1, step)]


def _elapsed(at_s: int, step_s: int) -> str:
    if at_s == 0:
        return "0"
    if step_s < 60:
        return f"{at_s} s" if at_s < 60 else f"{at_s // 60}:{at_s % 60:02d} min"
    if step_s < 3600:
        return f"{at_s // 60} min" if at_s < 3600 else f"{at_s // 3600}:{at_s % 3600 // 60:02d} h"
    if step_s < 86_400:
        return f"{at_s // 3600} h"
    return f"{at_s // 86_400} d"


def _moment(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _advice(summary: JobSummary) -> str:
    """Return which part limits the speed, in a sentence."""
    seconds = summary.seconds
    encode_s = sum(seconds.encode_s.values())
    if not encode_s:
        return ""
    share = seconds.decode_wait_s / (seconds.decode_wait_s + encode_s)
    if share > _MUCH_WAITING:
        return (
            f"The encoders waited for decoding {share:.0%} of their time: give each worker more "
            "decoders (--decoders, and cores for them)."
        )
    return "The encoders are what limits the speed, not decoding."


def _own_notes(summary: JobSummary) -> list[str]:
    """Return what the numbers say that a reader should not overlook."""
    notes = []
    left = summary.n_units - summary.n_units_done
    if left:
        at_work = sum(worker.outcome == "working" for worker in summary.workers)
        notes.append(
            f"The job is not finished: {left:,} of {summary.n_units:,} units are left. "
            + (
                f"{at_work} workers are at it."
                if at_work
                else "Run the same command again to continue."
            )
        )
    n = summary.n_vanished
    if n:
        notes.append(
            f"{n} worker{'s' * (n > 1)} vanished without a word: killed by the scheduler or the system, "
            "or the machine failed. What was committed stays; another worker takes over the rest."
        )
    if summary.truncated:
        notes.append(
            f"{len(summary.truncated):,} clips are longer than the audio encoder's window; only their "
            "beginning was encoded."
        )
    if summary.remarks:
        notes.append(
            f"Decoding passed over damage in {len(summary.remarks):,} streams that are ok otherwise."
        )
    return notes
