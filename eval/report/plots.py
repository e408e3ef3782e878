"""Figures of scores, each as inline SVG for the HTML page and as PNG beside Markdown.

Where conditions are compared they stand side by side in equal panels, or share a panel in the colours
blue, vermilion, grey and black, in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from eval.figures import Plot, Theme, draw, hide_spines, one_line
from eval.metrics import ClassScores, SingleLabelScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from eval.report.data import LabelLikelihoods
    from eval.scoring.calibration import Calibration
    from eval.scoring.slices import Slice

OFF_LIST: Final = "off list"
"""The name of the last column of a confusion matrix."""
MAX_CONDITIONS: Final = 4
"""Conditions that figures show; tables have all."""
MAX_PANELS: Final = 12
"""True labels for which likelihoods are drawn."""
MAX_BAR_LABELS: Final = 30
"""Labels for which bars are drawn."""
MAX_ZEROS: Final = 12
"""Labels up to which a confusion matrix shows its zeros; in larger ones an empty cell is one."""

_WHITE_TEXT_ABOVE: Final = 0.75
"""Share of a row from which dark text on a cell has less contrast than white text."""


def draw_confusion(scores: SingleLabelScores) -> Plot:
    """Draw a confusion matrix: colour is the share of the row, the text in a cell is the count.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return draw(lambda theme: _confusions([("", scores)], theme), "confusion")


def draw_confusions(conditions: Sequence[tuple[str, SingleLabelScores]]) -> Plot:
    """Draw the confusion matrices of the first conditions side by side; all have the same labels.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = conditions[:MAX_CONDITIONS]
    return draw(lambda theme: _confusions(shown, theme), "confusion")


def draw_label_bars(conditions: Sequence[tuple[str, Sequence[ClassScores]]]) -> Plot:
    """Draw precision, recall and F1 of each label under the first conditions.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = conditions[:MAX_CONDITIONS]
    return draw(lambda theme: _label_bars(shown, theme), "labels")


def draw_likelihoods(panels: Sequence[LabelLikelihoods]) -> Plot:
    """Draw mean likelihoods, a panel per true label and a bar per offered label and condition.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return draw(lambda theme: _likelihoods(panels[:MAX_PANELS], theme), "likelihoods")


def draw_reliability(conditions: Sequence[tuple[str, Calibration]]) -> Plot:
    """Draw how often the likeliest label is true by its likelihood, and how the likelihoods spread.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = conditions[:MAX_CONDITIONS]
    return draw(lambda theme: _reliability(shown, theme), "reliability")


def draw_slices(conditions: Sequence[tuple[str, Mapping[str, Sequence[Slice]]]]) -> Plot:
    """Draw the score of each slice with its interval, a mark per condition.

    Args:
        conditions: Name, and division -> its slices; all have the same divisions and slices.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    shown = conditions[:MAX_CONDITIONS]
    return draw(lambda theme: _slices(shown, theme), "slices")


def _confusions(conditions: Sequence[tuple[str, SingleLabelScores]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    labels = conditions[0][1].labels
    n, names = len(labels), [one_line(label) for label in labels]
    longest = max(map(len, names))
    n_across = min(len(conditions), max(1, 24 // (n + 1)))
    n_down = -(-len(conditions) // n_across)
    cell_in = 0.54 if n_across == 1 else 0.46
    width_in = 0.9 + 0.09 * longest + n_across * cell_in * (n + 1.5)
    height_in = n_down * (0.7 + 0.07 * longest + 0.42 * n + 0.25 * (len(conditions) > 1))
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    panels = list(figure.subplots(n_down, n_across, sharex=True, sharey=True, squeeze=False).flat)
    _spread(figure)
    for number, ((name, scores), axes) in enumerate(zip(conditions, panels, strict=False)):
        _matrix(axes, scores, theme)
        if name:
            _title(axes, name)
        if number % n_across == 0:
            axes.set_ylabel("truth")
        if number >= (n_down - 1) * n_across:
            axes.set_xlabel("predicted")
    for axes in panels[len(conditions) :]:
        axes.set_visible(False)
    return figure


def _matrix(axes: Axes, scores: SingleLabelScores, theme: Theme) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    n = len(scores.labels)
    names = [one_line(label) for label in scores.labels]
    longest = max(map(len, names))
    columns = [*range(n), n + 0.3]  # a gap before "off list": it is no class
    cells, colors = [], []
    for y, row in enumerate(scores.confusion):
        total = sum(row)
        for x, count in zip(columns, row, strict=True):
            share = count / total if total else 0.0
            cells.append(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92))
            colors.append(to_rgba(theme.accent if x < n else theme.warn, share))
            if not count and n > MAX_ZEROS:
                continue
            ink = "#ffffff" if share > _WHITE_TEXT_ABOVE else theme.ink
            text = axes.text(
                x,
                y,
                f"{count:,}",
                ha="center",
                va="center_baseline",
                color=ink if count else theme.muted,
                fontsize=10 if count < 10_000 else 8,
            )
            text.set_in_layout(False)  # it lies inside, and measuring a thousand takes seconds
    axes.add_collection(
        PatchCollection(cells, facecolors=colors, edgecolors=theme.rule, linewidths=1)
    )
    axes.set_xlim(-0.55, n + 0.85)
    axes.set_ylim(n - 0.5, -0.5)
    slanted = n > 3 and longest > 6
    axes.set_xticks(
        columns,
        [*names, OFF_LIST],
        rotation=35 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor" if slanted else "default",
    )
    axes.set_yticks(range(n), names)
    axes.tick_params(length=0)
    hide_spines(axes, "top", "right", "bottom", "left")


def _label_bars(conditions: Sequence[tuple[str, Sequence[ClassScores]]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    labels = [entry.label for entry in conditions[0][1]]
    n_across = min(len(conditions), 3)
    n_down = -(-len(conditions) // n_across)
    height_in = n_down * (0.42 * len(labels) + 0.85) + 0.3
    figure = Figure(figsize=(9.8, height_in), layout="constrained")
    panels = list(figure.subplots(n_down, n_across, sharex=True, sharey=True, squeeze=False).flat)
    _spread(figure)
    kinds = (
        ("precision", theme.muted, [[c.precision for c in found] for _, found in conditions]),
        ("recall", theme.warn, [[c.recall for c in found] for _, found in conditions]),
        ("F1", theme.accent, [[c.f1 for c in found] for _, found in conditions]),
    )
    for number, ((name, _), axes) in enumerate(zip(conditions, panels, strict=False)):
        for place, (kind, color, values) in enumerate(kinds):
            ys = [y + 0.26 * (place - 1) for y in range(len(labels))]
            shown = [100 * value for value in values[number]]
            axes.barh(ys, shown, height=0.24, color=color, label=kind)
        _title(axes, name)
        _percent_axis(axes, theme)
    for axes in panels[len(conditions) :]:
        axes.set_visible(False)
    first = figure.axes[0]
    first.set_yticks(range(len(labels)), [one_line(label) for label in labels])
    first.set_ylim(len(labels) - 0.45, -0.55)
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=3, frameon=False)
    figure.supxlabel("percent", fontsize=10)
    return figure


def _likelihoods(panels: Sequence[LabelLikelihoods], theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    conditions = list(panels[0].means)[:MAX_CONDITIONS]
    colors = _colors(theme)
    labels = list(dict.fromkeys(x for p in panels for c in conditions for x in p.means[c]))
    n_across = min(len(panels), 3)
    n_down = -(-len(panels) // n_across)
    height = 0.8 / len(conditions)
    row_in = max(0.26, 0.115 * len(conditions))
    height_in = n_down * (row_in * len(labels) + 0.55) + 0.7
    figure = Figure(figsize=(9.8, height_in), layout="constrained")
    grid = figure.subplots(n_down, n_across, sharex=True, sharey=True, squeeze=False)
    _spread(figure)
    for panel, axes in zip(panels, grid.flat, strict=False):
        for place, condition in enumerate(conditions):
            means = panel.means[condition]
            ys = [y + height * (place - (len(conditions) - 1) / 2) for y in range(len(labels))]
            shown = [100 * means.get(label, 0.0) for label in labels]
            axes.barh(ys, shown, height=0.92 * height, color=colors[place], label=condition)
        if panel.truth in labels:
            y = labels.index(panel.truth)
            axes.axhspan(y - 0.48, y + 0.48, color=theme.accent, alpha=0.12, lw=0, zorder=0)
        _title(axes, f"true: {one_line(panel.truth)} (n = {panel.n:,})")
        _percent_axis(axes, theme)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    first = figure.axes[0]
    first.set_yticks(range(len(labels)), [one_line(label) for label in labels])
    first.set_ylim(len(labels) - 0.5, -0.5)
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    figure.supxlabel("mean likelihood, percent", fontsize=10)
    return figure


def _reliability(conditions: Sequence[tuple[str, Calibration]], theme: Theme) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n = len(conditions)
    figure = Figure(figsize=(min(9.8, 1.0 + 2.95 * n), 3.9), layout="constrained")
    grid = figure.subplots(2, n, sharex=True, sharey="row", squeeze=False, height_ratios=[2.6, 1])
    _spread(figure)
    for column, (name, found) in enumerate(conditions):
        top, bottom = grid[0][column], grid[1][column]
        top.plot([0, 100], [0, 100], color=theme.muted, lw=1, ls=(0, (4, 3)))
        filled = [b for b in found.bins if b.n]
        xs = [100 * b.probability for b in filled if b.probability is not None]
        ys = [100 * b.accuracy for b in filled if b.accuracy is not None]
        areas = [14 + 120 * b.n / found.n for b in filled]
        top.plot(xs, ys, color=theme.accent, lw=1.2)
        top.scatter(xs, ys, s=areas, color=theme.accent, zorder=3, clip_on=False)
        _title(top, name)
        bottom.bar(
            [50 * (b.low + b.high) for b in found.bins],
            [b.n for b in found.bins],
            width=92 / len(found.bins),
            color=theme.accent,
        )
        bottom.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        for axes in (top, bottom):
            axes.grid(axis="y", color=theme.rule, lw=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(color=theme.rule)
            hide_spines(axes, "top", "right", "left")
            axes.spines["bottom"].set_color(theme.rule)
        top.set_xlim(0, 102)
        top.set_ylim(0, 102)
        bottom.set_xlabel("likelihood of the likeliest label, %")
    grid[0][0].set_ylabel("it is true, %")
    grid[1][0].set_ylabel("clips")
    figure.align_ylabels([grid[0][0], grid[1][0]])
    return figure


def _slices(
    conditions: Sequence[tuple[str, Mapping[str, Sequence[Slice]]]], theme: Theme
) -> Figure:
    from matplotlib.figure import Figure

    colors = _colors(theme)
    divisions = conditions[0][1]
    ticks: list[float] = []
    names: list[str] = []
    heads: list[tuple[float, str]] = []
    at: dict[tuple[str, str], float] = {}
    y = 0.0
    for division, found in divisions.items():
        heads.append((y, division))
        y += 1
        for part in found:
            at[division, part.name] = y
            ticks.append(y)
            names.append(f"{one_line(part.name, 34)} (n = {part.n:,})")
            y += 1
        y += 0.4
    figure = Figure(figsize=(8.2, 0.7 + 0.34 * y), layout="constrained")
    axes = figure.add_subplot()
    step = 0.66 / max(1, len(conditions))
    for place, (name, found_divisions) in enumerate(conditions):
        xs, ys, lows, highs = [], [], [], []
        for division, found in found_divisions.items():
            for part in found:
                if part.score is not None and part.interval is not None:
                    xs.append(100 * part.score)
                    ys.append(at[division, part.name] + step * (place - (len(conditions) - 1) / 2))
                    lows.append(100 * part.interval.low)
                    highs.append(100 * part.interval.high)
        axes.hlines(ys, lows, highs, color=colors[place], lw=1.8)
        marker = "osD^"[place]
        axes.plot(xs, ys, marker, color=colors[place], ms=5, label=name, clip_on=False)
    for head, division in heads:
        axes.text(
            -0.012, head, division, transform=axes.get_yaxis_transform(), ha="right", va="center",
            fontweight="bold",
        )  # fmt: skip
    axes.set_yticks(ticks, names)
    axes.set_ylim(y - 0.4, -0.6)
    _percent_axis(axes, theme)
    axes.set_xlabel("accuracy, percent")
    if len(conditions) > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    return figure


def _spread(figure: Figure) -> None:
    """Keep the last number of one panel's axis apart from the first of the next."""
    figure.set_layout_engine("constrained", wspace=0.05)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(one_line(text, 40), fontsize=10, pad=6)


def _percent_axis(axes: Axes, theme: Theme) -> None:
    axes.set_xlim(0, 100)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.grid(axis="x", color=theme.rule, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    hide_spines(axes, "top", "right", "bottom")
    axes.spines["left"].set_color(theme.rule)


def _colors(theme: Theme) -> tuple[str, ...]:
    return theme.accent, theme.warn, theme.muted, theme.ink
