"""The figures of a benchmark report: scores beside published ones, heat map, confusion, labels.

The first two stand in the page; the last two are for Markdown and for papers: in the page every set has
its own tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from eval.benchmarks import RecognitionRow, benchmarks, published
from eval.figures import Plot, Theme, draw, hide_spines, one_line
from eval.results.sets import Confusion, LabelScores
from eval.scoring.intervals import Interval
from eval.scoring.result import Scored

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COMPARED: Final = ("Emotion-LLaMAv2 (Stage 2)", "AffectGPT", "Emotion-LLaMA")
"""Published rows that stand beside ours in the first figure."""
MIN_HEAT: Final = 3
"""Sets from which a heat map says more than the table."""
_WIDTH_IN: Final = 9.8
_COLUMNS: Final = 3
_MARKERS: Final = ("D", "s", "^")
_WHITE_TEXT_ABOVE: Final = 0.86
"""Depth of a cell from which white text has more contrast than dark text."""
_HUES: Final = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of runs from the third on."""


def draw_scores(
    runs: Mapping[str, Mapping[str, Scored]], intervals: Mapping[str, Mapping[str, Interval]]
) -> Plot:
    """Draw each set as a line: our scores with intervals, three published models, the range of all.

    Args:
        runs: Name of a run -> benchmark id -> its score.
        intervals: The same for confidence intervals; any may be missing.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return draw(lambda theme: _scores(runs, intervals, theme), "benchmark-scores")


def draw_heat(runs: Mapping[str, Mapping[str, Scored]]) -> Plot | None:
    """Draw scores of all models on the sets that we scored; None if those are few.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    tasks = _tasks(runs)
    if len(tasks) < MIN_HEAT:
        return None
    return draw(lambda theme: _heat(runs, tasks, theme), "benchmark-heat")


def draw_confusions(found: Mapping[str, Confusion]) -> Plot:
    """Draw confusion matrices side by side, small ones first: shares of each true label, in percent.

    Args:
        found: Title of a panel -> matrix; at least one.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    ordered = dict(sorted(found.items(), key=lambda panel: len(panel[1].rows)))
    return draw(lambda theme: _confusions(ordered, theme), "benchmark-confusions")


def draw_labels(found: Mapping[str, Sequence[LabelScores]]) -> Plot:
    """Draw F1, precision and recall of each true label, a panel per set, small ones first.

    Args:
        found: Title of a panel -> its labels; at least one.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    true = {title: [x for x in labels if x.n_true] for title, labels in found.items()}
    ordered = dict(sorted(true.items(), key=lambda panel: len(panel[1])))
    return draw(lambda theme: _labels(ordered, theme), "benchmark-labels")


def _tasks(runs: Mapping[str, Mapping[str, Scored]]) -> list[str]:
    return [task for task in benchmarks() if any(task in scored for scored in runs.values())]


def _percent_of(scored: Mapping[str, Scored], task: str) -> float:
    """Return a score in percent; NaN leaves a gap."""
    return 100 * scored[task].result.score if task in scored else math.nan


def _scores(
    runs: Mapping[str, Mapping[str, Scored]],
    intervals: Mapping[str, Mapping[str, Interval]],
    theme: Theme,
) -> Figure:
    from matplotlib.figure import Figure

    tasks = _tasks(runs)
    rows = published().recognition
    gap = 0.7 if len({benchmarks()[task].unibench for task in tasks}) > 1 else 0
    places = [i + (0 if benchmarks()[task].unibench else gap) for i, task in enumerate(tasks)]
    per_run = 0.16 if len(runs) > 1 else 0.0
    row_in = max(0.3, 0.14 + 0.12 * len(runs))
    figure = Figure(figsize=(_WIDTH_IN, row_in * (places[-1] + 1) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    lows = [min(row.scores[task] for row in rows) for task in tasks]
    highs = [max(row.scores[task] for row in rows) for task in tasks]
    axes.hlines(
        places, lows, highs, color=theme.rule, lw=5, zorder=1, label="range of all published models"
    )
    for model, marker in zip(_compared(rows), _MARKERS, strict=True):
        axes.plot(
            [model.scores[task] for task in tasks], places, marker, color=theme.muted, mfc="none",
            mew=1.1, ms=5, zorder=2, label=model.model,
        )  # fmt: skip
    hues = (theme.accent, theme.warn, *_HUES)
    for number, (name, scored) in enumerate(runs.items()):
        shift = per_run * (number - (len(runs) - 1) / 2)
        ys, hue = [place + shift for place in places], hues[number % len(hues)]
        for y, task in zip(ys, tasks, strict=True):
            if (between := intervals.get(name, {}).get(task)) is not None:
                ends = [100 * between.low, 100 * between.high]
                axes.plot(ends, [y, y], color=hue, lw=2, zorder=3, solid_capstyle="butt")
        xs = [_percent_of(scored, task) for task in tasks]
        axes.plot(xs, ys, "o", color=hue, ms=6, zorder=4, label=one_line(name, 40))
    axes.set_yticks(places, [benchmarks()[task].short for task in tasks])
    axes.set_ylim(places[-1] + 0.7, -0.7)
    axes.set_xlim(0, 101.5)
    axes.set_xlabel("score, %")
    handles, labels = axes.get_legend_handles_labels()
    order = [*range(len(labels) - len(runs), len(labels)), *range(len(labels) - len(runs))]
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside upper left", ncols=3,
        frameon=False, fontsize=9,
    )  # fmt: skip
    _finish(axes, theme)
    return figure


def _compared(rows: Sequence[RecognitionRow]) -> list[RecognitionRow]:
    return [next(row for row in rows if row.model == name) for name in COMPARED]


def _heat(runs: Mapping[str, Mapping[str, Scored]], tasks: Sequence[str], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    table = [(row.model, [row.scores[t] for t in tasks], False) for row in published().recognition]
    table += [
        (name, [_percent_of(scored, t) for t in tasks], True) for name, scored in runs.items()
    ]
    gap = 0.35  # between what was published and our own rows
    height_in = 0.27 * (len(table) + gap) + 1.0
    width_in = min(_WIDTH_IN, 2.6 + 0.42 * len(tasks))
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.add_subplot()
    cells, places = [], []
    ends = []
    for column in zip(*(values for _, values, _ in table), strict=True):
        known = [value for value in column if not math.isnan(value)]
        ends.append((min(known), max(known)))
    for number, (_, values, is_ours) in enumerate(table):
        y = number + (gap if is_ours else 0)
        places.append(y)
        for x, (value, (low, high)) in enumerate(zip(values, ends, strict=True)):
            if math.isnan(value):
                continue
            depth = 0.06 + 0.88 * ((value - low) / (high - low) if high > low else 1.0)
            cells.append((x, y, depth))
            is_best = value == high
            _write(axes, x, y, f"{value:.1f}", depth, theme, weight="bold" if is_best else "normal")
    _paint(axes, cells, theme.accent)
    axes.set_xlim(-0.5, len(tasks) - 0.5)
    axes.set_ylim(places[-1] + 0.5, -0.5)
    axes.set_xticks(
        range(len(tasks)), [benchmarks()[task].short for task in tasks], rotation=40, ha="left",
        rotation_mode="anchor",
    )  # fmt: skip
    axes.xaxis.tick_top()
    axes.set_yticks(places, [one_line(name, 28) for name, _, _ in table])
    for label, (_, _, is_ours) in zip(axes.get_yticklabels(), table, strict=True):
        label.set_fontweight("bold" if is_ours else "normal")
    axes.tick_params(length=0, labelsize=8.5)
    hide_spines(axes, "top", "right", "bottom", "left")
    return figure


def _confusions(found: Mapping[str, Confusion], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    heights = [max(len(matrix.rows) for matrix in row) for row in _in_rows(list(found.values()))]
    figure = Figure(
        figsize=(_WIDTH_IN, sum(0.22 * n + 1.25 for n in heights)), layout="constrained"
    )
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=[n + 4 for n in heights])
    for place, (title, matrix) in enumerate(found.items()):
        axes = figure.add_subplot(grid[divmod(place, _COLUMNS)])
        _matrix(axes, matrix, theme)
        axes.set_title(one_line(title, 40), fontsize=9.5, color=theme.ink, loc="left")
    return figure


def _matrix(axes: Axes, matrix: Confusion, theme: Theme) -> None:
    n = len(matrix.columns)
    hits: list[tuple[float, float, float]] = []
    misses: list[tuple[float, float, float]] = []
    for y, row in enumerate(matrix.rows):
        for x, count in enumerate(row.counts):
            share = count / row.n
            (hits if x < matrix.n_labels else misses).append((x, y, share))
            if share >= 0.005:
                _write(axes, x, y, f"{100 * share:.0f}", share, theme, size=6.5)
    _paint(axes, hits, theme.accent)
    _paint(axes, misses, theme.warn)
    axes.set_xlim(-0.5, n - 0.5)
    axes.set_ylim(len(matrix.rows) - 0.5, -0.5)
    axes.set_xticks(
        range(n), [one_line(c, 15) for c in matrix.columns], rotation=55, ha="right",
        rotation_mode="anchor",
    )  # fmt: skip
    axes.set_yticks(
        range(len(matrix.rows)),
        [one_line(row.label if row.is_scored else f"({row.label})", 18) for row in matrix.rows],
    )
    axes.tick_params(length=0, labelsize=7)
    for side in axes.spines.values():
        side.set_color(theme.rule)


def _labels(found: Mapping[str, Sequence[LabelScores]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    heights = [max(map(len, row)) for row in _in_rows(list(found.values()))]
    figure = Figure(
        figsize=(_WIDTH_IN, sum(0.2 * n + 0.62 for n in heights) + 0.5), layout="constrained"
    )
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=[n + 2 for n in heights])
    for place, (title, labels) in enumerate(found.items()):
        axes = figure.add_subplot(grid[divmod(place, _COLUMNS)])
        ys = range(len(labels))
        axes.barh(
            ys,
            [100 * x.f1 for x in labels],
            color=theme.accent,
            alpha=0.45,
            height=0.66,
            label="F1",
        )
        shown: dict[str, Any] = {"linestyle": "", "ms": 4.2, "mew": 1.1, "color": theme.ink}
        axes.plot(
            [100 * x.precision if x.n_predicted else math.nan for x in labels],
            ys,
            "o",
            mfc="none",
            label="precision",
            **shown,
        )
        axes.plot([100 * x.recall for x in labels], ys, "o", label="recall", **shown)
        axes.set_yticks(ys, [one_line(x.label, 16) for x in labels])
        axes.set_ylim(heights[place // _COLUMNS] - 0.4, -0.6)  # bars of one row are equally thick
        axes.set_xlim(0, 102)
        axes.set_title(one_line(title, 40), fontsize=9.5, color=theme.ink, loc="left")
        _finish(axes, theme, size=7.5)
    for axes in figure.axes[-_COLUMNS:]:
        axes.set_xlabel("%", fontsize=8)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3,
        frameon=False, fontsize=9,
    )  # fmt: skip
    return figure


def _in_rows(panels: Sequence[Any]) -> list[Sequence[Any]]:
    return [panels[i : i + _COLUMNS] for i in range(0, len(panels), _COLUMNS)]


def _paint(axes: Axes, cells: Sequence[tuple[float, float, float]], hue: str) -> None:
    """Fill unit cells at (x, y), as deep as the third number says."""
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    squares = [Rectangle((x - 0.48, y - 0.47), 0.96, 0.94) for x, y, _ in cells]
    colors = [to_rgba(hue, depth) for _, _, depth in cells]
    axes.add_collection(PatchCollection(squares, facecolors=colors, linewidths=0))


def _write(
    axes: Axes, x: float, y: float, text: str, depth: float, theme: Theme, *, size: float = 7.5,
    weight: str = "normal",
) -> None:  # fmt: skip
    """Write a number into a cell."""
    note = axes.text(
        x, y, text, ha="center", va="center_baseline", fontsize=size, fontweight=weight,
        color="#ffffff" if depth > _WHITE_TEXT_ABOVE else theme.ink,
    )  # fmt: skip
    note.set_in_layout(False)  # it lies inside the axes, and measuring it takes time


def _finish(axes: Axes, theme: Theme, *, size: float = 8.5) -> None:
    axes.grid(axis="x", color=theme.rule, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=theme.rule, labelsize=size)
    axes.tick_params(axis="y", length=0)
    hide_spines(axes, "top", "right", "bottom")
    axes.spines["left"].set_color(theme.rule)
