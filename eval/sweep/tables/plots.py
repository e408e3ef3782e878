"""The plots of a sweep: scores along a setting, as the papers draw them, or a dot per row with intervals.

Published figures are drawn hollow. Each score has a panel and a scale of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from eval.figures import Plot, Theme, draw, hide_spines, one_line
from eval.sweep.schema import Axis, ScoreColumn
from eval.sweep.tables.table import RowScore, SweepTable, TableRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN: Final = 9.8
_HUES: Final = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of lines from the third on."""
_MARKERS: Final = ("o", "s", "^", "D", "v", "P")


class _Point(NamedTuple):
    """A row on a line."""

    place: float
    """On the axis of the rows or of the setting."""
    score: float
    """In percent, as all that follow; NaN where there is none."""
    published: float
    between: tuple[float, float] | None
    seeds: tuple[float, ...]
    """The score of each, where there are several."""
    is_baseline: bool


def draw_table(table: SweepTable) -> dict[str, Plot]:
    """Draw a sweep: `curve` where it has a plot of its own, and `rows` otherwise; nothing without scores.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = [
        column
        for column in table.scores
        if any(column.name in row.scores or column.name in row.published for row in table.rows)
    ]
    if not shown:
        return {}
    if table.plot is not None and any(row.at is not None for row in table.rows):
        axis = table.plot
        return {"curve": draw(lambda theme: _curves(table, axis, shown, theme), "sweep-curve")}
    return {"rows": draw(lambda theme: _dots(table, shown, theme), "sweep-rows")}


def caption(table: SweepTable, name: str) -> str:
    """Return what a plot shows, for readers who do not see it too."""
    what = "Scores" if len(table.scores) > 1 else table.scores[0].heading
    along = f"along {table.plot.heading}" if name == "curve" and table.plot else "of each row"
    kinds = {score.span.over for row in table.rows for score in row.scores.values() if score.span}
    over = " and ".join(
        text for kind, text in (("seeds", "over seeds"), ("clips", "over clips")) if kind in kinds
    )
    bars = f" Bars: {100 * table.level:g} % intervals {over}." if kinds else ""
    seeds = any(len(score.by_seed) > 1 for row in table.rows for score in row.scores.values())
    bars += " Ticks: single seeds." if seeds else ""
    paper = ""
    if any(row.published for row in table.rows):
        paper = " Hollow: published" + (", by full-size models." if table.scale == "demo" else ".")
    if name == "curve" and table.scale == "demo":
        along += " as it is at demo scale"
    return f"{what} {along}, in percent.{bars}{paper}"


def _curves(table: SweepTable, axis: Axis, shown: Sequence[ScoreColumn], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    places = _places(table.rows, axis)
    figure = Figure(figsize=(min(_WIDTH_IN, 5.6 * len(shown) + 1.2), 3.9), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, column in zip(panels, shown, strict=True):
        lines = _lines(table, axis, column, places)
        hues = (theme.accent, theme.warn, *_HUES)
        for number, (name, points) in enumerate(lines.items()):
            _curve(axes, name, points, hues[number % len(hues)], number, theme)
        _scale_x(axes, table.rows, axis, places)
        axes.set_xlabel(axis.heading)
        axes.set_title(f"{column.heading}, %", fontsize=10, loc="left", color=theme.ink)
        axes.margins(y=0.12)
        _finish(axes, theme)
    _legend(figure, panels[0])
    return figure


def _curve(
    axes: Axes, name: str, points: Sequence[_Point], hue: str, number: int, theme: Theme
) -> None:
    """Draw one line: its scores with intervals, and what was published of the same rows."""
    marker = _MARKERS[number % len(_MARKERS)]
    if own := [p for p in points if not math.isnan(p.score)]:
        axes.plot(
            [p.place for p in own], [p.score for p in own], marker=marker, ms=6, lw=1.6, color=hue,
            zorder=4, label=name or "this sweep",
        )  # fmt: skip
        for p in own:
            axes.plot([p.place] * len(p.seeds), p.seeds, "_", color=hue, ms=9, mew=1.4, zorder=3)
            if p.between is not None:
                axes.plot(
                    [p.place, p.place], p.between, color=hue, lw=1.4, alpha=0.65, zorder=3,
                    solid_capstyle="butt",
                )  # fmt: skip
    if paper := [p for p in points if not math.isnan(p.published)]:
        axes.plot(
            [p.place for p in paper], [p.published for p in paper], marker=marker, ms=7, lw=1.2, ls=":",
            color=theme.muted, mfc="none", mew=1.3, zorder=2,
            label=f"{name}, published" if name else "published",
        )  # fmt: skip


def _lines(
    table: SweepTable, axis: Axis, column: ScoreColumn, places: Mapping[str, float]
) -> dict[str, list[_Point]]:
    """Return the points of each line in the order of the axis."""
    found: dict[str, list[_Point]] = {}
    for row in table.rows:
        if row.at is None:
            continue
        name = "" if axis.by is None else f"{axis.by.rpartition('.')[2]} {_word(row.line)}"
        found.setdefault(name, []).append(_point(table, row, column.name, places[_key(row.at)]))
    return {name: sorted(points, key=lambda p: p.place) for name, points in found.items()}


def _point(table: SweepTable, row: TableRow, column: str, place: float) -> _Point:
    score = row.scores.get(column)
    span = score.span if score is not None else None
    return _Point(
        place=place,
        score=math.nan if score is None else 100 * score.mean,
        published=row.published.get(column, math.nan),
        between=None if span is None else (100 * span.low, 100 * span.high),
        seeds=_of_seeds(score),
        is_baseline=row.name == table.baseline,
    )


def _of_seeds(score: RowScore | None) -> tuple[float, ...]:
    if score is None or len(score.by_seed) < 2:
        return ()
    return tuple(100 * value for value in score.by_seed.values())


def _places(rows: Sequence[TableRow], axis: Axis) -> dict[str, float]:
    """Return where each value stands on the axis: numbers at themselves, all others one beside another."""
    values = {_key(row.at): row.at for row in rows if row.at is not None}
    numbers = {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if len(numbers) == len(values) and not (axis.log and min(numbers.values()) <= 0):
        return numbers
    return {key: float(at) for at, key in enumerate(values)}


def _scale_x(axes: Axes, rows: Sequence[TableRow], axis: Axis, places: Mapping[str, float]) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    values = {_key(row.at): row.at for row in rows if row.at is not None}
    if axis.log and all(map(_is_number, values.values())) and min(places.values()) > 0:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
    if len(values) <= 12:  # the tried values themselves, rather than round numbers between them
        axes.set_xticks([places[key] for key in values], [_word(v) for v in values.values()])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _word(value: object) -> str:
    if value is None:
        return "none"
    return f"{value:g}" if _is_number(value) else one_line(str(value), 18)


def _dots(table: SweepTable, shown: Sequence[ScoreColumn], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    places, headings = _rows_down(table.rows)
    height_in = 0.27 * (max(places) + 1) + 1.25
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for axes, column in zip(panels, shown, strict=True):
        points = [
            _point(table, row, column.name, place)
            for row, place in zip(table.rows, places, strict=True)
        ]
        _dot_panel(axes, points, theme)
        axes.set_title(f"{column.heading}, %", fontsize=10, loc="left", color=theme.ink)
        _finish(axes, theme, along="x")
    first = panels[0]
    names = [one_line(title, 44) for title in _titles(table)]
    first.set_yticks([*places, *headings], [*names, *headings.values()])
    for label, place in zip(first.get_yticklabels(), [*places, *headings], strict=True):
        if place in headings:
            label.set_fontstyle("italic")
            label.set_color(theme.muted)
    for label, row in zip(first.get_yticklabels(), table.rows, strict=False):
        if row.name == table.baseline:
            label.set_fontweight("bold")
    first.set_ylim(max(places) + 0.7, min([*places, *headings]) - 0.7)
    for axes in panels[1:]:
        axes.tick_params(axis="y", labelleft=False)
    _legend(figure, *panels)
    return figure


def _dot_panel(axes: Axes, points: Sequence[_Point], theme: Theme) -> None:
    own = [p for p in points if not math.isnan(p.score)]
    for base in (p for p in own if p.is_baseline):
        axes.axvline(base.score, color=theme.muted, lw=0.9, ls="--", zorder=1, label="baseline")
    for p in points:
        axes.plot(p.seeds, [p.place] * len(p.seeds), "|", color=theme.accent, ms=9, mew=1.4)
        if p.between is not None:
            axes.plot(
                p.between, [p.place, p.place], color=theme.accent, lw=2, zorder=3,
                solid_capstyle="butt",
            )  # fmt: skip
    if paper := [p for p in points if not math.isnan(p.published)]:
        axes.plot(
            [p.published for p in paper], [p.place for p in paper], "D", color=theme.muted, mfc="none",
            mew=1.2, ms=5.5, zorder=2, label="published",
        )  # fmt: skip
    if own:
        axes.plot(
            [p.score for p in own], [p.place for p in own], "o", color=theme.accent, ms=6, zorder=4,
            label="this sweep",
        )  # fmt: skip
    low, high = axes.get_xlim()
    room = 0.06 * (high - low) or 1.0
    axes.set_xlim(max(low - room, min(low, 0.0)), min(high + room, max(high, 100.0)))


def _rows_down(rows: Sequence[TableRow]) -> tuple[list[float], dict[float, str]]:
    """Return the place of each row from above, and of each group's heading."""
    places: list[float] = []
    headings: dict[float, str] = {}
    at, group = 0.0, None
    for row in rows:
        if row.group != group and row.group is not None:
            at += 0.35 if places else 0.0
            headings[at] = one_line(row.group, 44)
            at += 1
        group = row.group
        places.append(at)
        at += 1
    return places, headings


def _titles(table: SweepTable) -> list[str]:
    """Return each row's cells in one line, without empty ones; rows that look alike say what each cell is.

    Where the first cells tell all rows apart, they stand alone: what follows explains them.
    """
    found: list[dict[str, str]] = []
    for row in table.rows:
        cells = zip(table.columns, row.cells, strict=False)
        found.append({head: c for head, c in cells if c.strip(" -\N{EN DASH}\N{EM DASH}")})
    firsts = [own.get(table.columns[0], "") for own in found]
    if all(firsts) and len({*firsts}) == len(firsts):
        return firsts
    short = [
        " + ".join(own.values()) or row.name for own, row in zip(found, table.rows, strict=True)
    ]
    return [
        title
        if short.count(title) == 1
        else " + ".join(f"{cell} ({head.lower()})" for head, cell in own.items())
        for title, own in zip(short, found, strict=True)
    ]


def _legend(figure: Figure, *panels: Axes) -> None:
    """Say what is what above the panels, each thing once."""
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    order = sorted(found, key=lambda label: (label == "baseline", "published" in label))
    figure.legend(
        [found[label] for label in order], [one_line(label, 40) for label in order],
        loc="outside upper left", ncols=4, frameon=False, fontsize=9,
    )  # fmt: skip


def _finish(axes: Axes, theme: Theme, *, along: str = "y") -> None:
    axes.grid(axis="x" if along == "x" else "y", color=theme.rule, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=theme.rule, labelsize=9)
    axes.tick_params(axis="y" if along == "x" else "x", length=0 if along == "x" else 3)
    hide_spines(axes, "top", "right", *(["bottom"] if along == "x" else ["left"]))
    axes.spines["left" if along == "x" else "bottom"].set_color(theme.rule)
