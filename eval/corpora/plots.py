"""The figures of a corpus: splits, labels side by side, durations, action units, benchmarks.

They have the form of the figures of the two papers. Hues are of the Okabe-Ito palette, which stays apart
for colour-blind readers, and no figure needs its colours to be read. See `eval.plots` for themes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cache.files import write_aside, write_text_aside
from cache.labels import LabelField
from eval.corpora.statistics import CorpusStatistics, Histogram, UnitCounts, total
from eval.figures import PAPER, Plot, Theme, draw, hide_spines, one_line
from extract.annotate.evidence.action_units import load_units
from extract.corpora.check import BENCHMARK_GROUPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH_IN: Final = 9.8
_COLUMNS: Final = 3
MAX_LABELS: Final = 26
"""Labels drawn in a panel; of more, the most frequent ones."""
MAX_EMOTIONS: Final = 12
"""Emotions whose action units are drawn."""
_GREY: Final = "#9aa0a8"
FAMILIES: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "happy": ("#e69f00", ("happy", "happiness", "joy", "joyful", "excited", "positive")),
    "surprise": ("#56b4e9", ("surprise", "surprised")),
    "neutral": (_GREY, ("neutral",)),
    "sad": ("#0072b2", ("sad", "sadness")),
    "angry": ("#d55e00", ("angry", "anger", "mad", "negative")),
    "fear, worry": ("#cc79a7", ("fear", "fearful", "scared", "worried", "worry", "anxiety", "anxious")),
    "disgust": ("#009e73", ("disgust", "disgusted")),
    "other": ("#f0e442", ()),
}  # fmt: skip
"""Kin of labels -> hue, and the labels of all corpora that belong to it. Only figures use it: no label is
ever mapped to another one."""
_DARK_TEXT: Final = ("#e69f00", "#56b4e9", _GREY, "#cc79a7", "#f0e442")
"""Hues on which dark text is read better than white."""
_POLARITY: Final = {"positive": "#0072b2", "neutral": _GREY, "negative": "#d55e00"}
_SPLIT_HUES: Final = {"train": "#0072b2", "val": "#e69f00", "test": "#d55e00"}


def draw_corpus(stats: CorpusStatistics) -> dict[str, Plot]:
    """Draw all figures for which a manifest has data.

    Returns:
        Name -> figure: splits, labels-FIELD for each label field, families (of emotions, with two corpora
        or more), durations, action-units, action-units-by-emotion, benchmarks.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    builds: dict[str, Callable[[Theme], Figure]] = {"splits": lambda t: _splits(stats, t)}
    for field, corpora in stats.labels.items():
        shown = {
            name: labels for name, labels in corpora.items() if any(map(total, labels.values()))
        }
        if shown:
            # Bound now: the loop's variables change before the figure is drawn.
            builds[f"labels-{field}"] = lambda t, f=field, c=shown: _labels(f, c, t)  # type: ignore[misc]
    emotions = stats.labels.get("emotion", {})
    if len(emotions) > 1:
        builds["families"] = lambda t: _families(emotions, t)
    durations, units = stats.durations, stats.action_units
    if durations is not None and stats.together.durations is not None:
        median_s = stats.together.durations.median_s
        builds["durations"] = lambda t: _durations(durations, median_s, t)
    if units is not None:
        builds["action-units"] = lambda t: _units(units, t)
        if units.by_emotion:
            builds["action-units-by-emotion"] = lambda t: _units_by_emotion(units, t)
    if stats.benchmarks:
        builds["benchmarks"] = lambda t: _benchmarks(stats.benchmarks, t)
    return {name: draw(build, f"corpus-{name}") for name, build in builds.items()}


def write_plots(plots: Mapping[str, Plot], out_dir: Path) -> None:
    """Write each figure as `corpus-NAME.png` and, on a white ground, as `corpus-NAME.svg`."""
    for name, plot in plots.items():
        with write_aside(out_dir / f"corpus-{name}.png") as aside:
            aside.write_bytes(plot.png)
        write_text_aside(out_dir / f"corpus-{name}.svg", stand_alone(plot.svg))


def stand_alone(svg: str) -> str:
    """Return an SVG element of a page as a file of its own, with the colours of paper."""
    colours = {
        "rule": PAPER.rule, "muted": PAPER.muted, "accent": PAPER.accent, "warn": PAPER.warn,
    }  # fmt: skip
    svg = re.sub(r"var\(--(\w+)\)", lambda found: colours[found[1]], svg)
    svg = svg.replace("currentColor", PAPER.ink)
    names = 'xmlns="http://www.w3.org/2000/svg" style="background:#ffffff"'
    return svg.replace("<svg", f"<svg {names}", 1) + "\n"


def _splits(stats: CorpusStatistics, theme: Theme) -> Figure:
    names = sorted(stats.corpora, key=lambda name: stats.corpora[name].n_records)
    figure, axes = _one(0.32 * len(names) + 1.1)
    splits = [s for s in stats.together.splits if s in _SPLIT_HUES]
    others = [s for s in stats.together.splits if s not in _SPLIT_HUES]
    left = [0.0] * len(names)
    for split in (*splits, *(["other or none"] if others else [])):
        counted = [split] if split in _SPLIT_HUES else others
        found = [float(sum(stats.corpora[n].splits.get(s, 0) for s in counted)) for n in names]
        axes.barh(
            range(len(names)), found, left=left, color=_SPLIT_HUES.get(split, _GREY), label=split,
            height=0.72,
        )  # fmt: skip
        left = [a + b for a, b in zip(left, found, strict=True)]
    for y, value in enumerate(left):
        _value(axes, value, y, f"{value:,.0f}", theme)
    axes.set_yticks(range(len(names)), [one_line(name) for name in names])
    axes.set_xlim(0, 1.12 * max(left))
    _thousands(axes)
    axes.set_xlabel("records")
    _legend(figure)
    _finish(axes, theme, "x")
    return figure


def _labels(
    field: LabelField, corpora: Mapping[str, Mapping[str, Mapping[str, int]]], theme: Theme
) -> Figure:
    """Draw one panel for each corpus, on one scale of shares."""
    panels = {
        corpus: _most({label: total(splits) for label, splits in labels.items()}, MAX_LABELS)
        for corpus, labels in corpora.items()
    }
    sums = {c: sum(total(splits) for splits in labels.values()) for c, labels in corpora.items()}
    hues = _POLARITY if field == "sentiment" else {name: hue for name, (hue, _) in FAMILIES.items()}
    if field == "intent":
        hues = {}

    def hue_of(label: str) -> str:
        return hues.get(label if field == "sentiment" else _family(label), theme.accent)

    figure, grid = _panels([len(labels) for labels in panels.values()])
    highest = max(n / sums[c] for c, labels in panels.items() for n in labels.values())
    for axes, (corpus, counts) in zip(grid, panels.items(), strict=True):
        shares = [100 * n / sums[corpus] for n in counts.values()]
        axes.barh(range(len(counts)), shares, color=[hue_of(x) for x in counts], height=0.74)
        for y, share in enumerate(shares):
            _value(axes, share, y, f"{share:.1f}", theme)
        axes.set_yticks(range(len(counts)), [one_line(label, 16) for label in counts])
        _shares(axes, 122 * highest)
        axes.set_title(f"{one_line(corpus)}  n = {sums[corpus]:,}", fontsize=10, color=theme.ink)
        _finish(axes, theme, "x")
    _label_below(grid, "share of the labels, %")
    if hues:
        used = {hue_of(label) for counts in panels.values() for label in counts}
        _legend(figure, hues={name: hue for name, hue in hues.items() if hue in used})
    return figure


def _families(emotions: Mapping[str, Mapping[str, Mapping[str, int]]], theme: Theme) -> Figure:
    """Draw the corpora below each other, each bar 100 %, labels by kin."""
    names = [name for name, labels in emotions.items() if any(map(total, labels.values()))][::-1]
    figure, axes = _one(0.36 * len(names) + 1.2)
    shares: dict[str, list[float]] = {}
    for name in names:
        counts = {label: total(splits) for label, splits in emotions[name].items()}
        for family in FAMILIES:
            n = sum(c for label, c in counts.items() if _family(label) == family)
            shares.setdefault(family, []).append(100 * n / sum(counts.values()))
    left = [0.0] * len(names)
    for family, found in shares.items():
        hue = FAMILIES[family][0]
        if not any(found):
            continue
        axes.barh(range(len(names)), found, left=left, color=hue, label=family, height=0.76)
        for y, share in enumerate(found):
            if share >= 4:
                axes.text(
                    left[y] + share / 2, y, f"{share:.0f}", ha="center", va="center_baseline",
                    color=PAPER.ink if hue in _DARK_TEXT else "#ffffff", fontsize=9,
                )  # fmt: skip
        left = [a + b for a, b in zip(left, found, strict=True)]
    axes.set_yticks(range(len(names)), [one_line(name) for name in names])
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the corpus's emotion labels, %")
    _legend(figure)
    _finish(axes, theme, "x")
    return figure


def _durations(found: Histogram, median_s: float, theme: Theme) -> Figure:
    figure, axes = _one(3.4)
    main = [*found.counts[:-1], found.counts[-1] - found.n_beyond]
    axes.stairs(main, found.edges, fill=True, color=theme.accent)
    last, width = found.edges[-1], found.edges[1] - found.edges[0]
    if found.n_beyond:
        # A gap, then one bar for all the rest: its width is no range of seconds.
        axes.bar(last + 2 * width, found.n_beyond, width=width, color=theme.warn)
    ticks = [tick for tick in _round_ticks(last) if tick <= last - 2 * width]
    names = [f"{tick:g}" for tick in ticks]
    if found.n_beyond:
        ticks, names = [*ticks, last + 2 * width], [*names, f"> {last:g}"]
    axes.set_xticks(ticks, names)
    axes.axvline(median_s, color=theme.muted, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        f"median {median_s:.2f} s", (median_s, 1), xycoords=("data", "axes fraction"), xytext=(4, 5),
        textcoords="offset points", color=theme.muted, ha="left",
    )  # fmt: skip
    axes.set_xlim(0, last + 3.5 * width)
    axes.set_xlabel("duration of the clip, s")
    axes.set_ylabel("records")
    _thousands(axes, "y")
    _finish(axes, theme, "y")
    return figure


def _units(found: UnitCounts, theme: Theme) -> Figure:
    names = load_units().units
    figure, axes = _one(0.27 * len(found.units) + 0.9)
    shares = [100 * n / found.n_records for n in found.units.values()]
    axes.barh(range(len(shares)), shares, color=theme.accent, height=0.74)
    for y, (share, n) in enumerate(zip(shares, found.units.values(), strict=True)):
        _value(axes, share, y, f"{share:.1f}  ({n:,})", theme)
    axes.set_yticks(
        range(len(shares)),
        [f"{u}  {names[u].name}" if u in names else one_line(u) for u in found.units],
    )
    axes.set_ylim(len(shares) - 0.4, -0.6)
    _shares(axes, 1.2 * max(shares) or 1)
    axes.set_xlabel("share of the records with action units, %")
    _finish(axes, theme, "x")
    return figure


def _units_by_emotion(found: UnitCounts, theme: Theme) -> Figure:
    chosen = list(found.by_emotion)[:MAX_EMOTIONS]
    names = load_units().units
    figure, grid = _panels([max(map(len, found.by_emotion.values()), default=1)] * len(chosen))
    shares = {
        emotion: {
            u: 100 * n / found.n_of_emotion[emotion] for u, n in found.by_emotion[emotion].items()
        }
        for emotion in chosen
    }
    highest = max((s for units in shares.values() for s in units.values()), default=1.0)
    for axes, (emotion, units) in zip(grid, shares.items(), strict=True):
        axes.barh(range(len(units)), list(units.values()), color=_hue(emotion), height=0.74)
        for y, share in enumerate(units.values()):
            _value(axes, share, y, f"{share:.0f}", theme)
        labels = [f"{one_line(names[u].name, 20)} {u[2:]}" if u in names else u for u in units]
        axes.set_yticks(range(len(units)), labels, fontsize=8)
        _shares(axes, 1.2 * highest)
        n = found.n_of_emotion[emotion]
        axes.set_title(f"{one_line(emotion)}  n = {n:,}", fontsize=10, color=theme.ink)
        _finish(axes, theme, "x")
    _label_below(grid, "share of the records, %")
    return figure


def _benchmarks(counts: Mapping[str, int], theme: Theme) -> Figure:
    """Draw the benchmarks by the groups of the paper's Table 2, with its counts as marks."""
    from extract.corpora.registry import corpus_ids, corpus_row

    paper = {b: n for c in corpus_ids() for b, n in corpus_row(c).expected.benchmarks.items()}
    groups = {g: [b for b in names if b in counts] for g, names in BENCHMARK_GROUPS.items()}
    known = {b for names in groups.values() for b in names}
    groups["others"] = [b for b in counts if b not in known]
    groups = {group: names for group, names in groups.items() if names}
    hues = dict(
        zip(
            (*BENCHMARK_GROUPS, "others"),
            ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", _GREY),
            strict=True,
        )
    )
    figure, axes = _one(0.3 * (len(counts) + len(groups)) + 1.2)
    y, ticks, labels, highest = 0.0, list[float](), list[str](), 1
    marked = False
    for group, names in groups.items():
        axes.barh(
            [y + i for i in range(len(names))], [counts[b] for b in names], color=hues[group],
            height=0.72, label=f"{group}, {sum(counts[b] for b in names):,}",
        )  # fmt: skip
        for name in names:
            expected = paper.get(name)
            text = f"{counts[name]:,}"
            if expected is not None and expected != counts[name]:
                text += f"  (Table 2: {expected:,})"
                axes.plot(
                    [expected, expected], [y - 0.42, y + 0.42], color=theme.ink, lw=1.6,
                    label=None if marked else "Table 2, where it differs",
                )  # fmt: skip
                marked = True
            highest = max(highest, counts[name], expected or 0)
            _value(axes, max(counts[name], expected or 0), y, text, theme)
            ticks.append(y)
            labels.append(one_line(name))
            y += 1
        y += 0.6
    axes.set_yticks(ticks, labels)
    axes.set_ylim(y - 1, -0.7)
    axes.set_xlim(0, 1.3 * highest)
    axes.set_xlabel("evaluation items")
    _thousands(axes)
    _legend(figure, 3)
    _finish(axes, theme, "x")
    return figure


def _one(height_in: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    return figure, figure.add_subplot()


def _panels(n_bars: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Return panels in rows of three, each row as high as its longest list needs."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    n_rows = -(-len(n_bars) // _COLUMNS)
    most = [max(n_bars[i * _COLUMNS : (i + 1) * _COLUMNS]) for i in range(n_rows)]
    heights = [0.22 * n + 0.62 for n in most]
    engine = ConstrainedLayoutEngine(h_pad=0.09)
    figure = Figure(figsize=(_WIDTH_IN, sum(heights) + 0.6), layout=engine)
    grid = figure.add_gridspec(n_rows, _COLUMNS, height_ratios=heights)
    panels = [figure.add_subplot(grid[divmod(i, _COLUMNS)]) for i in range(len(n_bars))]
    for place, axes in enumerate(panels):
        axes.set_ylim(most[place // _COLUMNS] - 0.4, -0.6)  # bars of one row are equally thick
    return figure, panels


def _label_below(panels: Sequence[Axes], text: str) -> None:
    """Label the lowest panel of each column."""
    for axes in panels[-_COLUMNS:]:
        axes.set_xlabel(text, fontsize=9)


def _shares(axes: Axes, limit: float) -> None:
    """Let an axis of percent reach to a limit, with numbers up to 100 only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, limit)
    ticks = MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]).tick_values(0, limit)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= min(limit, 100)])


def _value(axes: Axes, x: float, y: float, text: str, theme: Theme) -> None:
    """Write a number behind the end of a bar."""
    note = axes.annotate(
        text, (x, y), xytext=(4, 0), textcoords="offset points", va="center_baseline", fontsize=8,
        color=theme.muted,
    )  # fmt: skip
    note.set_in_layout(False)  # it lies inside the axes, and measuring it takes a third of the time


def _legend(figure: Figure, n_columns: int = 8, hues: Mapping[str, str] | None = None) -> None:
    """Put a legend above the figure: of what was drawn with a label, lines last, or of `hues`."""
    from matplotlib.patches import Patch

    if hues is None:
        pairs = [
            pair
            for axes in figure.axes
            for pair in zip(*axes.get_legend_handles_labels(), strict=True)
        ]
        pairs.sort(key=lambda pair: hasattr(pair[0], "get_linestyle"))
    else:
        pairs = [(Patch(color=hue), name) for name, hue in hues.items()]
    figure.legend(
        [handle for handle, _ in pairs], [name for _, name in pairs], loc="outside upper left",
        ncols=n_columns, frameon=False, fontsize=9,
    )  # fmt: skip


def _finish(axes: Axes, theme: Theme, grid: str) -> None:
    axes.grid(axis="x" if grid == "x" else "y", color=theme.rule, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color=theme.rule, labelsize=8.5)
    axes.tick_params(axis="y" if grid == "x" else "x", length=0)
    hide_spines(axes, "top", "right", "left" if grid == "y" else "bottom")
    axes.spines["bottom" if grid == "y" else "left"].set_color(theme.rule)


def _thousands(axes: Axes, axis: str = "x") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    chosen = axes.xaxis if axis == "x" else axes.yaxis
    chosen.set_major_locator(MaxNLocator(nbins=6, integer=True))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _round_ticks(last: float) -> Iterable[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(tick) for tick in MaxNLocator(nbins=8).tick_values(0, last) if tick >= 0]


def _most(counts: Mapping[str, int], n: int) -> dict[str, int]:
    """Return all in their order if they fit, else the most frequent."""
    if len(counts) <= n:
        return dict(counts)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n])


def _family(label: str) -> str:
    return next((name for name, (_, labels) in FAMILIES.items() if label in labels), "other")


def _hue(label: str) -> str:
    return FAMILIES[_family(label)][0]
