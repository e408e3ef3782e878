"""The plot of reuse: which tokens each row of a sweep encodes, which it finds, and what that adds up to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cache.spec import TokenSpec
from eval.figures import Theme, hide_spines, one_line
from eval.sweep.planning.costs import row_encodings
from eval.sweep.planning.plan import SweepPlan
from extract.plan import unique_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW_IN, _COLUMN_IN = 0.27, 0.36
"""Height of a row and width of a column, inches."""


def reuse_figure(plan: SweepPlan, names: Sequence[str] = ()) -> Callable[[Theme], Figure]:
    """Return what draws the plot, for `eval.figures.draw` and for a file.

    On the left a mark for each input of each row: full where its tokens are encoded, a ring where a row
    above has encoded them. On the right the operations of encoding, added up from the first row down.

    Args:
        plan: Of a sweep; what is stored already does not matter.
        names: What to call the rows, in their order; none: their names.
    """
    shown = list(names) or [row.name for row in plan.rows]

    def build(theme: Theme) -> Figure:
        from matplotlib.figure import Figure

        n_rows, n_columns = len(plan.rows), len(plan.encoded)
        figure = Figure(
            figsize=(5.6 + _COLUMN_IN * n_columns, 2.2 + _ROW_IN * n_rows), layout="constrained"
        )
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(_COLUMN_IN * n_columns, 3.2))
        _draw_marks(left, plan, shown, theme)
        _draw_sums(right, plan, theme)
        for axes in (left, right):
            axes.tick_params(length=0)
            axes.set_axisbelow(True)
            axes.grid(axis="y", color=theme.rule, lw=0.6)
        return figure

    return build


def _draw_marks(axes: Axes, plan: SweepPlan, names: Sequence[str], theme: Theme) -> None:
    columns = {spec: place for place, spec in enumerate(plan.encoded)}
    seen: set[TokenSpec] = set()
    new: list[tuple[int, int]] = []
    found: list[tuple[int, int]] = []
    for y, row in enumerate(plan.rows):
        for spec in dict.fromkeys(wanted.source for wanted in row.inputs.values()):
            (found if spec in seen else new).append((columns[spec], y))
            seen.add(spec)
    if found:
        x, y_ = zip(*found, strict=True)
        axes.scatter(
            x, y_, s=46, facecolors="none", edgecolors=theme.muted, label="found in the store"
        )
    x, y_ = zip(*new, strict=True)
    axes.scatter(x, y_, s=46, color=theme.accent, label="encoded")
    labels = [one_line(label, 30) for label in unique_labels(plan.encoded)]
    axes.set_xticks(range(len(labels)), labels, rotation=55, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(names)), [one_line(name, 44) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=2, frameon=False)
    hide_spines(axes, "top", "right", "left", "bottom")


def _draw_sums(axes: Axes, plan: SweepPlan, theme: Theme) -> None:
    alone, shared = [0.0], [0.0]
    for row in row_encodings(plan):
        alone.append(alone[-1] + row.alone.flops)
        shared.append(shared[-1] + row.new.flops)
    unit, size = next((u, s) for u, s in _UNITS if alone[-1] >= s)
    y = range(len(plan.rows))
    for sums, color, label in (
        (alone, theme.warn, "every row its own"),
        (shared, theme.accent, "shared store"),
    ):
        values = [value / size for value in sums[1:]]
        axes.plot(values, y, color=color, lw=2, marker="o", ms=3)
        axes.annotate(
            f"{label}\n{values[-1]:.3g}", (values[-1], y[-1]), xytext=(0, -14),
            textcoords="offset points", ha="center", va="top", color=color, annotation_clip=False,
        )  # fmt: skip
    axes.set_xlim(0, 1.12 * alone[-1] / size)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(f"{unit} of encoding, added up")
    hide_spines(axes, "right", "left", "bottom", "top")


_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("FLOP", 0.0))
