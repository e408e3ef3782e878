"""What a sweep came to, written into its folder: page, Markdown, LaTeX, CSV, JSON and plots.

    written = write_results(out)
    console.print(terminal_table(written.table, console.width))

It reads `sweep.json`, the results of trials and their predictions, and nothing of models or tokens, so it
may run at any time: trials that are not done are shown as open.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from cache.files import write_aside, write_text_aside
from eval.corpora.plots import stand_alone
from eval.scoring.intervals import N_SAMPLES, N_SWAPS
from eval.sweep.state import Begun, read_begun, results_of
from eval.sweep.tables.page import render
from eval.sweep.tables.plots import draw_table
from eval.sweep.tables.table import SweepTable
from eval.sweep.tables.tabulate import tabulate
from eval.sweep.tables.texts import csv_text, latex

FILES: Final = ("table.html", "table.md", "table.tex", "table.csv", "table.json")
"""What is written, beside a plot as `table-NAME.svg` and `.png`."""


class Written(NamedTuple):
    """What was said, and where."""

    table: SweepTable
    files: tuple[Path, ...]
    """`FILES`, in that order."""


def read_table(
    out: Path, *, wheels: Path | None = None, n_samples: int = N_SAMPLES, n_swaps: int = N_SWAPS
) -> SweepTable:
    """Read what the trials of a sweep came to, and compute its table.

    Args:
        out: Folder of the sweep.
        wheels: Folder of the emotion wheels, where a benchmark needs them; None: that of EMOCACHE_WHEELS.
        n_samples: Bootstrap samples of each interval.
        n_swaps: Swaps of each permutation test.

    Raises:
        SchemaError: No sweep was begun in the folder, or a file of it is damaged.
    """
    return _tabulate(out, read_begun(out), wheels, n_samples, n_swaps)


def write_results(
    out: Path,
    *,
    wheels: Path | None = None,
    n_samples: int = N_SAMPLES,
    n_swaps: int = N_SWAPS,
) -> Written:
    """Write `FILES` and the plots of a sweep into its folder; older ones are replaced.

    Equal trials give equal files, but for the times of the page's last section.

    Args:
        out: Folder of the sweep.
        wheels: See `read_table`, as the arguments below.
        n_samples: Bootstrap samples of each interval.
        n_swaps: Swaps of each permutation test.

    Raises:
        SchemaError: No sweep was begun in the folder, or a file of it is damaged.
        MissingDependencyError: jinja2, matplotlib or scipy is not installed.
    """
    begun = read_begun(out)
    table = _tabulate(out, begun, wheels, n_samples, n_swaps)
    plots = draw_table(table)
    html, markdown = render(table, begun, results_of(out, begun.trials), plots)
    for name, plot in plots.items():
        with write_aside(out / f"table-{name}.png") as aside:
            aside.write_bytes(plot.png)
        write_text_aside(out / f"table-{name}.svg", stand_alone(plot.svg))
    texts = (html, markdown, latex(table), csv_text(table), table.model_dump_json(indent=1) + "\n")
    paths = tuple(out / name for name in FILES)
    for path, text in zip(paths, texts, strict=True):
        write_text_aside(path, text)
    return Written(table, paths)


def _tabulate(
    out: Path, begun: Begun, wheels: Path | None, n_samples: int, n_swaps: int
) -> SweepTable:
    return tabulate(
        begun.sweep,
        begun.rows,
        [*results_of(out, begun.trials).values()],
        out=out,
        scale=begun.scale,
        presets={trial.row: trial.preset for trial in begun.trials},
        wheels=wheels,
        n_samples=n_samples,
        n_swaps=n_swaps,
    )
