"""All that the report of a run says, as plain data. Scores are fractions."""

from __future__ import annotations

from itertools import pairwise

from pydantic import Field, field_validator

from cache.schema import Model
from eval.metrics import MultiLabelScores, SingleLabelScores
from eval.parse import ParseHow
from eval.report.history import HistoryRow
from eval.results.examples import ExampleBrowser
from eval.scoring.calibration import Calibration
from eval.scoring.intervals import Interval, PairedTest
from eval.scoring.slices import Slice


class ScoreRow(Model):
    """The scores under one condition."""

    name: str
    """The condition, for example `all streams` or `audio masked`."""
    scores: SingleLabelScores | MultiLabelScores
    intervals: dict[str, Interval] = Field(default_factory=dict)
    """`accuracy`, `weighted_f1`, `uar` -> confidence interval; any may be missing."""
    change: PairedTest | None = None
    """Of accuracy, against the first condition on the same clips."""
    calibration: Calibration | None = None
    """None where no likelihoods were computed."""
    slices: dict[str, tuple[Slice, ...]] = Field(default_factory=dict)
    """Division (`corpus`, `duration`, ...) -> accuracy of its slices."""


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
    """How the replies were parsed."""

    counts: dict[ParseHow, int]
    """Of all conditions together."""
    conditions: dict[str, dict[ParseHow, int]] = Field(default_factory=dict)
    """Of each condition; empty: not told."""
    examples: tuple[OffListReply, ...] = Field(default=(), max_length=5)


class LabelLikelihoods(Model):
    """What the model gives each offered label, over the clips of one true label."""

    truth: str
    n: int
    """Clips."""
    means: dict[str, dict[str, float]]
    """Condition -> offered label -> mean probability."""


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
    about: tuple[str, ...] = ()
    """What the data are, a paragraph each."""
    method: tuple[str, ...] = ()
    """How the replies came about and how they are scored, a paragraph each."""
    prompt: str | None = None
    """What the model was asked about one of the clips, word by word."""
    likelihoods: tuple[LabelLikelihoods, ...] = ()
    """By true label, in the label space's order; empty: not computed."""
    examples: ExampleBrowser | None = None
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
