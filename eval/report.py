"""The report of a run: one self-contained HTML page and its Markdown twin.

`ReportData` holds everything that a report says, as plain data; `write_report` turns it into files
and reads nothing else. Scores are fractions everywhere but here: percent and human units are made
in this file. All text from outside is escaped, in HTML and in Markdown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pydantic import Field, field_validator, model_validator

from cache.files import write_aside, write_text_aside
from cache.schema import Model
from eval.metrics import MultiLabelScores, SingleLabelScores
from eval.pages import page_environment
from eval.parse import ParseHow
from eval.plots import Curve, draw_confusion, draw_training

if TYPE_CHECKING:
    from rich.table import Table

_MINUS: Final = "\N{MINUS SIGN}"
_NONE: Final = "\N{EN DASH}"
_MEANINGS: Final[dict[ParseHow, str]] = {
    "tag": "a label, inside an answer tag",
    "exact": "a label, without a tag",
    "alias": "another word for a label",
    "off_list": "no label: counted as wrong",
    "empty": "no text: counted as wrong",
}


class ScoreRow(Model):
    """The scores under one condition."""

    name: str
    """The condition, for example `all streams` or `audio masked`."""
    scores: SingleLabelScores | MultiLabelScores


class HistoryRow(Model):
    """What was logged behind one training step: of training, of validation, or of both."""

    stage: str
    step: int = Field(ge=0)
    """Optimizer steps since the start of the run or of the stage; where a stage counts from the
    start again, the report adds the steps of the stages before."""
    loss: float | None = None
    """Mean cross-entropy per answer token, nats; None where only validation was logged."""
    learning_rate: float | None = None
    """None exactly where `loss` is."""
    tokens_per_s: float | None = None
    clips_per_s: float | None = None
    data_wait: float | None = None
    """Share of the time since the row before that training waited for data."""
    val_loss: float | None = None
    """The same loss on records that are never trained on; None where nothing was validated."""
    val_token_accuracy: float | None = None
    """Share of the answer tokens that were the likeliest, each given the true ones before it."""

    @model_validator(mode="after")
    def _some_loss(self) -> HistoryRow:
        if (self.loss is None) != (self.learning_rate is None):
            raise ValueError("loss and learning_rate are of one step: give both or neither")
        if self.loss is None and self.val_loss is None:
            raise ValueError("a row of a history needs loss or val_loss")
        return self


class Fact(Model):
    """One measured quantity, for example `encoding`, 12.4, `clips/s`."""

    name: str
    value: float | str
    unit: str = ""


class StoreRow(Model):
    """What the store holds of one stream under one spec."""

    stream: str
    spec_id: str
    n_ok: int
    n_absent: int
    """Clips without such a stream."""
    n_failed: int
    size_bytes: int


class OffListReply(Model):
    """A reply that held no label."""

    uid: str
    truth: str | None
    reply: str


class Parsing(Model):
    """How the replies of all conditions together were parsed."""

    counts: dict[ParseHow, int]
    examples: tuple[OffListReply, ...] = Field(default=(), max_length=5)


class ReportData(Model):
    """Everything that a report says."""

    title: str
    created: str
    """ISO 8601 date and time; the caller's clock, so that equal data give equal files."""
    preset: str
    run_path: str
    weights: str | None = None
    """Which weights of the run were scored; None if nobody said."""
    store_path: str
    rows: tuple[ScoreRow, ...] = Field(min_length=1)
    """Conditions; the first is the headline, and the others are compared with it."""
    history: tuple[HistoryRow, ...] = ()
    """In the order of training."""
    throughput: tuple[Fact, ...] = ()
    store: tuple[StoreRow, ...] = ()
    parsing: Parsing | None = None
    provenance: dict[str, str] = Field(default_factory=dict)
    """Versions, seeds, digests: name to value."""
    notes: tuple[str, ...] = ()
    """What a reader must know to judge the numbers."""

    @field_validator("history")
    @classmethod
    def _check_history(cls, history: tuple[HistoryRow, ...]) -> tuple[HistoryRow, ...]:
        """Refuse a history whose stages are mixed or whose steps go back."""
        done: set[str] = set()
        for before, row in pairwise(history):
            if row.stage == before.stage:
                if row.step <= before.step:
                    raise ValueError(
                        f"stage {row.stage!r}: step {row.step} follows step {before.step}; "
                        "steps must rise within a stage"
                    )
                continue
            done.add(before.stage)
            if row.stage in done:
                raise ValueError(f"stage {row.stage!r} comes back; list each stage in one piece")
        return history


class StageSummary(NamedTuple):
    """One stage of the training in one table row."""

    stage: str
    last_step: int
    """Optimizer steps since the start of the first stage."""
    first_loss: float | None
    last_loss: float | None
    n_bad: int
    """Logged losses, of training or of validation, that are not finite."""
    clips_per_s: float | None
    """Median of what was logged, as the two below."""
    tokens_per_s: float | None
    data_wait: float | None
    """A share."""
    best_val_loss: float | None
    """The lowest; None if nothing was validated."""
    best_step: int | None
    """Where that was, counted as `last_step`."""
    best_token_accuracy: float | None
    """What was right there; a share."""


def write_report(data: ReportData, out_dir: Path) -> tuple[Path, Path]:
    """Write `report.html`, `report.md` and the figures of the latter into a folder.

    The HTML page needs neither network nor script and no other file; the Markdown file links to
    `report-confusion.png` and `report-training.png` beside it. Older files are replaced.

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
        size=human_size,
        count=lambda value: f"{value:,}",
        number=number,
        excerpt=excerpt,
        md=lambda text: Markup(escape_markdown(str(text))),
    )
    curves = training_curves(data.history)
    head = data.rows[0].scores
    plots = {} if isinstance(head, MultiLabelScores) else {"confusion": draw_confusion(head)}
    if curves:
        plots["training"] = draw_training(curves)
    context: dict[str, Any] = {
        "data": data,
        "head": head,
        **_majority(head),
        "meanings": _MEANINGS,
        "stages": summarize_stages(data.history, curves),
        "validated": any(curve.val_steps for curve in curves),
        "timed": any(curve.waits for curve in curves),
        **_words(curves),
        "figures": {name: Markup(plot.svg) for name, plot in plots.items()},
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        with write_aside(out_dir / f"report-{name}.png") as aside:
            aside.write_bytes(plot.png)
    paths = out_dir / "report.html", out_dir / "report.md"
    for path in paths:
        text = environment.get_template(f"{path.name}.j2").render(context)
        write_text_aside(path, text)
    return paths


def _majority(head: SingleLabelScores | MultiLabelScores) -> dict[str, Any]:
    """Return what accuracy means, and what always giving the commonest answer would reach."""
    if isinstance(head, MultiLabelScores):
        commonest, share = ", ".join(head.commonest), head.commonest_share
        return {"accuracy": "Exact sets", "majority": commonest, "majority_share": share}
    largest = max(head.per_class, key=lambda entry: entry.support)
    share = largest.support / head.n_scored
    return {"accuracy": "Accuracy (WAR)", "majority": largest.label, "majority_share": share}


def _words(curves: Sequence[Curve]) -> dict[str, str]:
    """Return what the figure of the training shows, and what its table means."""
    validated = any(curve.val_steps for curve in curves)
    timed = any(curve.waits for curve in curves)
    shown = ["Loss in training and validation" if validated else "Loss", "learning rate"]
    if timed:
        shown.append("share of the time that training waited for data")
    about = ["Steps count from the start of the first stage."]
    if validated:
        about.append(
            "Validation is on records that are never trained on; tokens right: of the true answers, "
            "each given those before it, at the step of the best loss."
        )
    rates = "Speeds and waiting" if timed else "Speeds"
    about.append(f"{rates} are medians of what was logged; tokens include those of the prefix.")
    return {
        "shown_history": f"{', '.join(shown[:-1])} and {shown[-1]}",
        "about_history": " ".join(about),
    }


def score_table(rows: Sequence[ScoreRow]) -> Table:
    """Return the score table for a terminal: percent, one row per condition."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "condition",
        title="Scores in percent",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for column in ("accuracy", "weighted F1", "UAR", "scored", "off list", "empty"):
        table.add_column(column, justify="right")
    for row in rows:
        scores = row.scores
        table.add_row(
            Text(row.name),  # not markup: a name may hold brackets
            percent(scores.accuracy),
            percent(scores.weighted_f1),
            percent(scores.uar),
            f"{scores.n_scored:,}",
            f"{scores.n_off_list:,}",
            _NONE if scores.n_empty is None else f"{scores.n_empty:,}",
        )
    return table


def training_curves(history: Iterable[HistoryRow]) -> list[Curve]:
    """Split a history by stage, on one axis of steps that rises through all stages."""
    curves: list[Curve] = []
    rows: dict[str, list[HistoryRow]] = {}
    for row in history:
        rows.setdefault(row.stage, []).append(row)
    end = 0
    for stage, part in rows.items():
        offset = end if part[0].step <= end else 0
        end = part[-1].step + offset
        trained = [row for row in part if row.loss is not None and row.learning_rate is not None]
        validated = [row for row in part if row.val_loss is not None]
        waits = [math.nan if row.data_wait is None else row.data_wait for row in trained]
        curves.append(
            Curve(
                stage,
                [row.step + offset for row in trained],
                [row.loss for row in trained if row.loss is not None],
                [row.learning_rate for row in trained if row.learning_rate is not None],
                [row.step + offset for row in validated],
                [row.val_loss for row in validated if row.val_loss is not None],
                [] if all(map(math.isnan, waits)) else waits,
            )
        )
    return curves


def summarize_stages(history: Sequence[HistoryRow], curves: Sequence[Curve]) -> list[StageSummary]:
    """Return one row per stage, in the order of training."""
    summaries = []
    for curve in curves:
        rows = [row for row in history if row.stage == curve.stage]
        validated = [row for row in rows if row.val_loss is not None]
        finite = [
            (loss, step, row.val_token_accuracy)
            for loss, step, row in zip(curve.val_losses, curve.val_steps, validated, strict=True)
            if math.isfinite(loss)
        ]
        best = min(finite, key=lambda entry: entry[0], default=(None, None, None))
        summaries.append(
            StageSummary(
                stage=curve.stage,
                last_step=curve.last_step,
                first_loss=next(iter(curve.losses), None),
                last_loss=next(reversed(curve.losses), None),
                n_bad=sum(not math.isfinite(x) for x in (*curve.losses, *curve.val_losses)),
                clips_per_s=_median(row.clips_per_s for row in rows),
                tokens_per_s=_median(row.tokens_per_s for row in rows),
                data_wait=_median(row.data_wait for row in rows),
                best_val_loss=best[0],
                best_step=best[1],
                best_token_accuracy=best[2],
            )
        )
    return summaries


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def percent(fraction: float) -> str:
    """Return a fraction as percent with two decimals, without the sign: 0.5 -> `50.00`."""
    return f"{100 * fraction:.2f}"


def points(fraction: float, base: float) -> str:
    """Return the signed distance of two fractions in percentage points: `+1.50`."""
    # The distance of the printed numbers, so that a reader who subtracts finds no contradiction.
    distance = round(float(percent(fraction)) - float(percent(base)), 2)
    sign = "+" if distance > 0 else _MINUS if distance < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(distance):.2f}"


def human_size(size_bytes: int) -> str:
    """Return a size in the binary unit that keeps it below 1024: `1.50 MiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1023.95 or unit == "TiB":
            break
    return f"{size:.2f} {unit}"


def number(value: float | str | None) -> str:
    """Return a number with four significant digits, whole numbers in full; text as it stands."""
    if value is None:
        return _NONE
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", _MINUS)
    return f"{value:.4g}".replace("-", _MINUS)


def excerpt(text: str, limit: int = 280) -> str:
    """Return a text cut to a length that fits a table, with the length it had."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"


def escape_markdown(text: str) -> str:
    """Escape a text for a Markdown table cell: no HTML, no markup, one line."""
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", text)
