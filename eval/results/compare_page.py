"""A comparison as a page, as Markdown, and as a table on a terminal.

Scores are fractions everywhere but here, where they become percent; ratings of a judge stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cache.files import write_aside, write_text_aside
from eval.figures import Plot, Theme, draw, hide_spines, one_line
from eval.formats import escape_markdown, excerpt, p_value, percent, points, signed_points, span
from eval.pages import page_environment
from eval.results.comparison import LEVEL, Comparison, Difference, SetComparison
from eval.results.sides import Unit
from eval.scoring.intervals import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_MINUS: Final = "\N{MINUS SIGN}"
_NONE: Final = "\N{EN DASH}"
FILES: Final = ("compare.html", "compare.md", "compare.json")
"""What is written, beside a figure for each run but the first."""


class Verdict(NamedTuple):
    """How a run fares against the reference over all sets."""

    run: str
    n_better: int
    """Sets with a corrected p value below `LEVEL`."""
    n_worse: int
    n_sets: int
    average: SetComparison | None
    """Avg-18, else Avg-9, else the only set."""
    difference: Difference | None
    """Of the run by that."""


class Fact(NamedTuple):
    """Something that made the replies of each run."""

    name: str
    values: tuple[str, ...]
    is_equal: bool


def write_comparison(comparison: Comparison, out: Path, created: str) -> tuple[Path, ...]:
    """Write `FILES` and the figures of the Markdown into a folder; older files are replaced.

    The HTML page needs neither network nor script and no other file.

    Args:
        comparison: What to say.
        out: The folder; it is made.
        created: ISO 8601 date and time; the caller's clock, so that equal data give equal files.

    Returns:
        The paths of `FILES`.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    environment = page_environment("A comparison")
    from markupsafe import Markup  # jinja2 brings it

    environment.filters.update(
        count=lambda value: f"{value:,}",
        p=_p_value,
        excerpt=excerpt,
        labels=lambda found, nothing="no label": ", ".join(found) or nothing,
        md=lambda text: Markup(escape_markdown(str(text))),
    )
    others = [run.name for run in comparison.runs[1:]]
    plots = {}
    for number, run in enumerate(others):
        if (plot := draw_differences(comparison, number)) is not None:
            plots[run] = (f"compare-{number + 1}.png", plot)
    context: dict[str, Any] = {
        "data": comparison,
        "created": created,
        "reference": comparison.runs[0].name,
        "others": others,
        "names": [run.name for run in comparison.runs],
        "facts": facts(comparison),
        "verdicts": [verdict(comparison, number) for number in range(len(others))],
        "rows": [*comparison.averages, *comparison.sets],
        "alpha": LEVEL,
        "figures": {run: (name, Markup(plot.svg)) for run, (name, plot) in plots.items()},
        "scale": _scale(comparison),
        "score": score,
        "between": between,
        "change": change,
        "change_between": change_between,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.values():
        with write_aside(out / name) as aside:
            aside.write_bytes(plot.png)
    html, markdown, document = (out / name for name in FILES)
    for path in (html, markdown):
        write_text_aside(path, environment.get_template(f"{path.name}.j2").render(context))
    write_text_aside(document, comparison.model_dump_json(indent=1) + "\n")
    return html, markdown, document


def comparison_table(comparison: Comparison) -> Table:
    """Return the comparison for a terminal: a line per set, of more than two runs one per run."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    names = [run.name for run in comparison.runs]
    is_pair = len(names) == 2
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("set", overflow="fold", min_width=8)
    if not is_pair:
        table.add_column("run", overflow="fold", min_width=8)
    for name in names if is_pair else ["score"]:
        table.add_column(
            Text(name), justify="right", overflow="fold", min_width=min(8, max(5, len(name)))
        )
    for name in (f"change ({comparison.level:.0%})", "p", "better/\nworse", "scored"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in (*comparison.sets, *comparison.averages):
        first = score(one.unit, one.scores[0].score)
        if not is_pair:
            table.add_row(Text(one.id), Text(names[0]), first, "", "", "", f"{one.n_scored:,}")
        for number, found in enumerate(one.differences, start=1):
            own = one.scores[number].score
            p = found.p_value if found.p_holm is None else found.p_holm
            last = number == len(one.differences)
            cells = [Text(one.id), Text(first)] if is_pair else [Text(), Text(found.run)]
            table.add_row(
                *cells,
                score(one.unit, own),
                f"{change(one.unit, one.scores[0].score, own)} {_short(one.unit, found)}",
                f"{p_value(p).replace(' ', '')}{'*' if found.is_clear else ' '}",
                f"{found.test.n_better}/{found.test.n_worse}",
                f"{one.n_scored:,}" if is_pair else "",
                end_section=last and not is_pair,
            )
    return table


def caption(comparison: Comparison) -> str:
    """Return what the columns of a comparison mean, in a few lines."""
    n = comparison.n_tests
    corrected = f", corrected for {n} tests (Holm)" if n > 1 else ""
    averages = "; of averages not corrected" if comparison.averages else ""
    return (
        f"{_scale(comparison)} In brackets: {comparison.level:.0%} bootstrap intervals. p: two-sided, "
        f"paired{corrected}{averages}; * below {LEVEL}. Clips count as independent; another training of the "
        "same model would differ, too."
    )


def _scale(comparison: Comparison) -> str:
    """Say in which units scores are."""
    units = {one.unit for one in comparison.sets}
    protocol = f", protocol {comparison.protocol}" if comparison.protocol else ""
    if units == {"rating"}:
        return "Scores and changes are ratings of the judge."
    ratings = " Those of EMER are ratings." if "rating" in units else ""
    return f"Scores in percent{protocol}, changes in points of percent.{ratings}"


def verdict(comparison: Comparison, number: int) -> Verdict:
    """Return how the run behind the reference, counted from 0, fares over all sets."""
    found = [one.differences[number] for one in comparison.sets]
    average = comparison.averages[-1] if comparison.averages else None
    if average is None and len(comparison.sets) == 1:
        average = comparison.sets[0]
    return Verdict(
        run=comparison.runs[number + 1].name,
        n_better=sum(d.is_clear and d.test.difference > 0 for d in found),
        n_worse=sum(d.is_clear and d.test.difference < 0 for d in found),
        n_sets=len(found),
        average=average,
        difference=None if average is None else average.differences[number],
    )


def facts(comparison: Comparison) -> list[Fact]:
    """Return what made the replies of each run, what differs first."""
    names = dict.fromkeys(name for run in comparison.runs for name in run.facts)
    found = []
    for name in names:
        values = tuple(run.facts.get(name, _NONE) for run in comparison.runs)
        found.append(Fact(name, values, len(set(values)) == 1))
    return sorted(found, key=lambda fact: fact.is_equal)


def score(unit: Unit, value: float | None) -> str:
    """Return a score as it is shown."""
    if value is None:
        return _NONE
    return percent(value) if unit == "percent" else f"{value:.2f}"


def between(unit: Unit, interval: Interval) -> str:
    """Return an interval of a score, in brackets."""
    if unit == "percent":
        return span(interval)
    return f"({interval.low:.2f} to {interval.high:.2f})"


def change(unit: Unit, first: float | None, second: float | None) -> str:
    """Return the signed distance of two scores as they are shown."""
    if first is None or second is None:
        return _NONE
    # A rating is shown with as many digits as a percentage, so its distance is written the same way.
    scale = 1 if unit == "percent" else 0.01
    return points(scale * second, scale * first)


def change_between(unit: Unit, found: Difference) -> str:
    """Return the interval of a difference, in brackets."""
    scale = 1 if unit == "percent" else 0.01
    low, high = (signed_points(scale * border) for border in (found.test.low, found.test.high))
    return f"({low} to {high})"


def _short(unit: Unit, found: Difference) -> str:
    """Return the interval of a difference for a narrow terminal."""
    scale, digits = (100, 1) if unit == "percent" else (1, 2)
    shown = [f"{scale * border:+.{digits}f}" for border in (found.test.low, found.test.high)]
    return f"({', '.join(shown)})".replace("-", _MINUS)


def _p_value(value: float | None) -> str:
    return _NONE if value is None else p_value(value)


def draw_differences(comparison: Comparison, number: int) -> Plot | None:
    """Draw the differences of a run from the reference, a line per set; None if there is none in percent.

    Args:
        comparison: Of all runs.
        number: Which run behind the reference, from 0.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    rows = [one for one in (*comparison.averages, *comparison.sets) if one.unit == "percent"]
    if not rows:
        return None
    reference, run = comparison.runs[0].name, comparison.runs[number + 1].name
    return draw(
        lambda theme: _differences(rows, number, reference, run, theme), f"differences-{number}"
    )


def _differences(
    rows: Sequence[SetComparison], number: int, reference: str, run: str, theme: Theme
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 1.1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, one in enumerate(rows):
        found = one.differences[number]
        middle = 100 * found.test.difference
        is_clear = found.is_clear
        color = theme.muted
        if is_clear:
            color = theme.accent if middle > 0 else theme.warn
        axes.plot(
            [100 * found.test.low, 100 * found.test.high], [place, place], color=color,
            linewidth=3.0 if one.kind == "average" else 2.0, solid_capstyle="butt",
        )  # fmt: skip
        axes.plot(
            [middle], [place], color=color, marker="D" if one.kind == "average" else "o",
            markersize=7.0 if is_clear else 5.5, markeredgecolor=color,
        )  # fmt: skip
    axes.axvline(0, color=theme.ink, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [one_line(one.id, 40) for one in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", color=theme.rule, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=theme.ink)
    axes.set_xlabel(
        f"points: {one_line(run, 30)} better to the right, {one_line(reference, 30)} to the left"
    )
    hide_spines(axes, "top", "right", "left")
    axes.spines["bottom"].set_color(theme.rule)
    return figure
