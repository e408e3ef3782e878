"""Figures of a training and of stored tokens, each as inline SVG for HTML and as PNG beside Markdown.

Those of scores are in `eval.report.plots`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cache.files import write_aside
from cache.statistics import OUTLIER_FACTOR, TokenStatistics
from eval.figures import Plot, Theme, draw, hide_spines, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MAX_POINTS: Final = 2000
"""Points drawn per curve; of a longer history every n-th row, so that the page stays small."""


class Curve(NamedTuple):
    """The training history of one stage."""

    stage: str
    steps: Sequence[int]
    """Optimizer steps since the start of the first stage, rising."""
    losses: Sequence[float]
    """Not-a-number leaves a gap."""
    learning_rates: Sequence[float]
    val_steps: Sequence[int] = ()
    """Where validation was run, on the same axis of steps, rising."""
    val_losses: Sequence[float] = ()
    waits: Sequence[float] = ()
    """Share of the time waited for data, per entry of `steps`; empty if it was not logged."""

    @property
    def last_step(self) -> int:
        """Where the stage ends."""
        return max((*self.steps[-1:], *self.val_steps[-1:]))


def draw_training(curves: Sequence[Curve]) -> Plot:
    """Draw a history over the steps of all stages, with the borders between stages.

    One panel for the losses of training and validation, one for the learning rate and, if it was
    logged, one for the share of the time waited for data.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    return draw(lambda theme: _training(curves, theme), "training")


def plot_statistics(statistics: TokenStatistics, path: Path) -> Plot:
    """Draw token norms, the channels by RMS, and the lengths of clips; write the PNG to `path`.

    Returns:
        Both forms, for a page that shows the figure as well.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        OSError: `path` cannot be written.
    """
    plot = draw(lambda theme: _statistics(statistics, theme), f"statistics-{statistics.stream}")
    with write_aside(path) as aside:
        aside.write_bytes(plot.png)
    return plot


def _training(curves: Sequence[Curve], theme: Theme) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    has_waits = any(curve.waits for curve in curves)
    figure = Figure(figsize=(9.8, 5.6 if has_waits else 4.4), layout="constrained")
    panels = figure.subplots(
        3 if has_waits else 2, 1, sharex=True, height_ratios=[2, 1, 0.8][: 2 + has_waits]
    )
    top, rates, bottom = panels[0], panels[1], panels[-1]
    for curve in curves:
        _series(top, curve.steps, curve.losses, theme.accent, "training")
        _series(top, curve.val_steps, curve.val_losses, theme.warn, "validation", ls=(0, (4, 1.5)))
        _series(rates, curve.steps, curve.learning_rates, theme.accent)
        if curve.waits:
            _series(bottom, curve.steps, [100 * share for share in curve.waits], theme.accent)
    if any(curve.val_steps for curve in curves):
        # Once for all stages, and outside: no corner of the panel is empty in every history.
        handles, names = top.get_legend_handles_labels()
        by_name = dict(zip(names, handles, strict=True))
        figure.legend(by_name.values(), by_name, loc="outside upper right", ncols=2, frameon=False)
    for position, curve in enumerate(curves):
        start = 0 if position == 0 else curves[position - 1].last_step
        if position:
            for axes in panels:
                axes.axvline(start, color=theme.muted, lw=1, ls=(0, (4, 3)))
        middle = (start + curve.last_step) / 2
        top.annotate(
            one_line(curve.stage, 40),
            (middle, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            color=theme.muted,
        )
    top.set_ylabel("loss")
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    rates.set_ylim(0, max((x for c in curves for x in c.learning_rates), default=0) * 1.08 or 1)
    if has_waits:
        bottom.set_ylabel("waiting, %")
        longest = max(filter(isfinite, (x for c in curves for x in c.waits)), default=0)
        bottom.set_ylim(0, max(5, 108 * longest))  # below 5 % nothing is worth a look
    bottom.set_xlabel("optimizer step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.set_xlim(0, max(1, curves[-1].last_step) * 1.01)
    for axes in panels:
        axes.grid(axis="y", color=theme.rule, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(color=theme.rule)
        hide_spines(axes, "top", "right", "left")
        axes.spines["bottom"].set_color(theme.rule)
    figure.align_ylabels(panels)
    return figure


def _series(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    color: str,
    label: str | None = None,
    ls: Any = "-",
) -> None:
    """Draw one line, of a long one every n-th point, with marks if they can be told apart."""
    if not steps:
        return
    stride = -(-len(steps) // MAX_POINTS)
    marker = "o" if len(steps) <= 30 else ""
    axes.plot(
        steps[::stride],
        values[::stride],
        color=color,
        marker=marker,
        ms=3,
        lw=1.4,
        ls=ls,
        label=label,
    )


def _statistics(statistics: TokenStatistics, theme: Theme) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.8, 3.3), layout="constrained")
    norms, channels, lengths = figure.subplots(1, 3)
    _token_norms(norms, statistics, theme)
    _channel_rms(channels, statistics, theme)
    _lengths(lengths, statistics, theme)
    for axes in (norms, channels, lengths):
        axes.grid(axis="y", color=theme.rule, lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", color=theme.rule)
        hide_spines(axes, "top", "right", "left")
        axes.spines["bottom"].set_color(theme.rule)
    return figure


def _token_norms(axes: Axes, statistics: TokenStatistics, theme: Theme) -> None:
    shown, median = statistics.token_norms, statistics.token_norm.p50
    zeros = f", {statistics.n_zero_tokens:,} are 0" if statistics.n_zero_tokens else ""
    _head(axes, "token norms", f"median {median:.3g}{zeros}", theme)
    axes.set_xlabel("L2 norm")
    axes.set_ylabel("tokens")
    if not shown.counts:
        return
    axes.stairs(shown.counts, shown.edges, fill=True, color=theme.accent)
    axes.axvline(median, color=theme.muted, lw=1, ls=(0, (4, 3)))
    low, high = shown.edges[0], shown.edges[-1]
    if high > 10 * low:
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
    elif high < 1.1 * low:
        axes.set_xlim(0.93 * low, 1.07 * high)


def _channel_rms(axes: Axes, statistics: TokenStatistics, theme: Theme) -> None:
    values = sorted(statistics.channel_rms, reverse=True)
    outliers = statistics.outlier_channels
    note = f"{len(outliers) or 'none'} above {OUTLIER_FACTOR:g}x the median"
    if outliers:
        note += f", no. {outliers[0].channel} is {outliers[0].factor:.0f}x"
    _head(axes, "RMS of channels", note, theme)
    axes.set_xlabel("rank of the channel")
    axes.set_ylabel("RMS")
    axes.set_xscale("log")  # a few outliers among a thousand channels
    _plain_numbers(axes.xaxis)
    axes.plot(range(1, len(values) + 1), values, color=theme.accent, lw=1.4)
    ranks = range(1, len(outliers) + 1)
    axes.plot(ranks, [c.rms for c in outliers], "o", color=theme.warn, ms=3.5)
    if values[0] > 10 * statistics.median_channel_rms > 0:
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, (1, 2, 5))
    else:
        axes.set_ylim(0, values[0] * 1.08 or 1)


def _lengths(axes: Axes, statistics: TokenStatistics, theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel("clips")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if statistics.durations_s is not None and statistics.duration_s is not None:
        shown, median = statistics.durations_s, statistics.duration_s.p50
        _head(axes, "durations", f"median {median:.3g} s", theme)
        axes.set_xlabel("valid sound [s]")
        axes.stairs(shown.counts, shown.edges, fill=True, color=theme.accent)
        axes.axvline(median, color=theme.muted, lw=1, ls=(0, (4, 3)))
        return
    _head(axes, "lengths", f"median {statistics.valid_len.p50:g}", theme)
    axes.set_xlabel("stored frames" if statistics.stream == "video" else "stored tokens")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    lengths, counts = zip(*statistics.valid_lens, strict=True)
    axes.bar(lengths, counts, width=0.8, color=theme.accent)
    axes.set_xlim(min(lengths) - 2, max(lengths) + 2)


def _head(axes: Axes, title: str, note: str, theme: Theme) -> None:
    axes.set_title(f"{title}\n{note}", fontsize=9, color=theme.muted)


def _plain_numbers(axis: Axis, steps: Sequence[int] = (1,)) -> None:
    """Label a log axis with these steps of each decade: powers of ten would need math text."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
