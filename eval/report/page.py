"""The report of a run: one self-contained HTML page and its Markdown twin.

`ReportData` holds everything that a report says, as plain data; `write_report` turns it into files
and reads nothing else. Scores are fractions everywhere but here: percent and human units are made
in this file. All text from outside is escaped, in HTML and in Markdown.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cache.files import write_aside, write_text_aside
from eval.figures import Plot
from eval.formats import (
    NONE,
    escape_markdown,
    excerpt,
    human_size,
    number,
    p_value,
    percent,
    points,
    signed_points,
    span,
)
from eval.metrics import MultiLabelScores, SingleLabelScores
from eval.pages import page_environment
from eval.parse import ParseHow
from eval.plots import Curve, draw_training
from eval.report.data import ReportData, ScoreRow
from eval.report.history import describe_curves, summarize_stages, training_curves
from eval.report.plots import (
    MAX_BAR_LABELS,
    MAX_CONDITIONS,
    MAX_PANELS,
    MAX_ZEROS,
    draw_confusions,
    draw_label_bars,
    draw_likelihoods,
    draw_reliability,
    draw_slices,
)
from eval.results.pictures import WAVE_HEIGHT, WAVE_WIDTH

if TYPE_CHECKING:
    from rich.table import Table


_MEANINGS: Final[dict[ParseHow, str]] = {
    "tag": "a label, inside an answer tag",
    "exact": "a label, without a tag",
    "alias": "another word for a label",
    "other": "no label: counted as neutral",
    "off_list": "no label: counted as wrong",
    "empty": "no text: counted as wrong",
}


def write_report(data: ReportData, out_dir: Path) -> tuple[Path, Path]:
    """Write `report.html`, `report.md` and the figures of the latter into a folder.

    The HTML page needs neither network nor script and no other file; the Markdown file links to
    `report-confusion.png`, `report-training.png` and others beside it. Older files are replaced.

    Returns:
        The paths of the HTML and of the Markdown file.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    environment = page_environment("A report")
    from markupsafe import Markup  # jinja2 brings it

    environment.filters.update(
        pct=percent,
        points=points,
        signed=signed_points,
        span=span,
        p_value=p_value,
        size=human_size,
        count=lambda value: f"{value:,}",
        number=number,
        excerpt=excerpt,
        md=lambda text: Markup(escape_markdown(str(text))),
    )
    curves = training_curves(data.history)
    head = data.rows[0].scores
    plots = _plots(data, curves)
    context: dict[str, Any] = {
        "data": data,
        "head": head,
        **_majority(head),
        "meanings": _MEANINGS,
        "slice_rows": _slice_rows(data.rows),
        "calibrated": [row for row in data.rows if row.calibration is not None],
        "tested": any(row.change is not None for row in data.rows),
        "max_conditions": MAX_CONDITIONS,
        "max_zeros": MAX_ZEROS,
        "n_matrices": _n_matrices(data),
        "wave": (WAVE_WIDTH, WAVE_HEIGHT),
        "stages": summarize_stages(data.history, curves),
        "validated": any(curve.val_steps for curve in curves),
        "timed": any(curve.waits for curve in curves),
        **describe_curves(curves),
        "figures": {name: Markup(plot.svg) for name, plot in plots.items()},
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        with write_aside(out_dir / f"report-{name}.png") as aside:
            aside.write_bytes(plot.png)
    paths = out_dir / "report.html", out_dir / "report.md"
    for path in paths:
        text = environment.get_template(f"{path.name}.j2").render(context).lstrip()
        write_text_aside(path, text)
    return paths


def _n_matrices(data: ReportData) -> int:
    """Return how many confusion matrices are drawn at most: large ones would fill pages."""
    return MAX_CONDITIONS if len(data.rows[0].scores.labels) <= MAX_ZEROS else 1


def _plots(data: ReportData, curves: Sequence[Curve]) -> dict[str, Plot]:
    """Draw what the data hold something for."""
    rows, plots = data.rows, {}
    matrices = [(r.name, r.scores) for r in rows if isinstance(r.scores, SingleLabelScores)]
    if matrices:
        named = matrices if len(matrices) > 1 else [("", matrices[0][1])]
        plots["confusion"] = draw_confusions(named[: _n_matrices(data)])
    if len(rows[0].scores.labels) <= MAX_BAR_LABELS:
        plots["labels"] = draw_label_bars([(row.name, row.scores.per_class) for row in rows])
    if 0 < len(data.likelihoods) <= MAX_PANELS:
        plots["likelihoods"] = draw_likelihoods(data.likelihoods)
    calibrated = [(row.name, row.calibration) for row in rows if row.calibration is not None]
    if calibrated:
        plots["reliability"] = draw_reliability(calibrated)
    if rows[0].slices:
        plots["slices"] = draw_slices([(row.name, row.slices) for row in rows])
    if curves:
        plots["training"] = draw_training(curves)
    return plots


def _slice_rows(rows: Sequence[ScoreRow]) -> list[tuple[str, str, int, list[tuple[str, str]]]]:
    """Return division, slice, clips, and the score with its interval under each condition."""
    found = []
    for division, parts in rows[0].slices.items():
        for number_, part in enumerate(parts):
            cells = []
            for row in rows:
                own = row.slices[division][number_]
                if own.score is None or own.interval is None:
                    cells.append((NONE, ""))
                else:
                    cells.append((percent(own.score), span(own.interval)))
            found.append((division, part.name, part.n, cells))
    return found


def _majority(head: SingleLabelScores | MultiLabelScores) -> dict[str, Any]:
    """Return what accuracy means, and what always giving the commonest answer would reach."""
    if isinstance(head, MultiLabelScores):
        commonest, share = ", ".join(head.commonest), head.commonest_share
        return {"accuracy": "Exact sets", "majority": commonest, "majority_share": share}
    largest = max(head.per_class, key=lambda entry: entry.support)
    share = largest.support / head.n_scored
    return {"accuracy": "Accuracy (WAR)", "majority": largest.label, "majority_share": share}


def score_table(rows: Sequence[ScoreRow]) -> Table:
    """Return the score table for a terminal: percent, one row per condition."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Heads of two lines, and nothing that wraps: it must fit 80 columns.
    table = Table(
        title="Scores in percent",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("condition", no_wrap=True)
    intervals = [row.intervals.get("accuracy") for row in rows]
    level = next((f"{100 * i.level:g} %\ninterval" for i in intervals if i is not None), None)
    shown = ["accuracy", *([level] if level else []), "weighted\nF1", "UAR"]
    for column in (*shown, "scored", "off\nlist", "empty"):
        table.add_column(column, justify="right", no_wrap=True, vertical="bottom")
    for row, found in zip(rows, intervals, strict=True):
        scores = row.scores
        between = NONE if found is None else f"{100 * found.low:.1f}-{100 * found.high:.1f}"
        about = [] if level is None else [between]
        table.add_row(
            Text(row.name),  # not markup: a name may hold brackets
            percent(scores.accuracy),
            *about,
            percent(scores.weighted_f1),
            percent(scores.uar),
            f"{scores.n_scored:,}",
            f"{scores.n_off_list:,}",
            NONE if scores.n_empty is None else f"{scores.n_empty:,}",
        )
    return table
