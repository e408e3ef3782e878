"""What the report on the benchmarks is made of, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from eval.benchmarks import Benchmark
from eval.judging.results import EmerScore, LexicalScore, MmeScore
from eval.results.sets import Confusion, LabelScores, MeanLikelihoods
from eval.scoring.calibration import Calibration
from eval.scoring.intervals import Interval
from eval.scoring.result import Scored
from eval.scoring.slices import Slice, SliceBy

if TYPE_CHECKING:
    from eval.results.examples import ExampleBrowser


@dataclass(frozen=True)
class RunScores:
    """One run on the benchmarks; `run_scores` makes it."""

    name: str
    """The row of the tables."""
    scored: Mapping[str, Scored]
    """Benchmark id -> its score; not all sets need be there."""
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Benchmark id, `avg-9` or `avg-18` -> confidence interval; any may be missing."""
    slices: Mapping[str, Mapping[SliceBy, tuple[Slice, ...]]] = field(default_factory=dict)
    """Benchmark id -> division -> scores of its parts; any may be missing."""


@dataclass(frozen=True)
class ResultsData:
    """Everything that the report says."""

    title: str
    created: str
    """ISO 8601 date and time; the caller's clock, so that equal data give equal files."""
    runs: tuple[RunScores, ...] = ()
    judged: tuple[EmerScore | MmeScore | LexicalScore, ...] = ()
    """Reasoning, as `eval.judging.results.read_judged` reads it."""
    examples: ExampleBrowser | None = None
    """See `browse_examples`; None: a few of the first run, without pictures."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Versions, seeds, digests: name to value."""
    notes: tuple[str, ...] = ()
    """What a reader must know to judge the numbers."""


class SetRun(NamedTuple):
    """One run on one set."""

    name: str
    scored: Scored
    interval: Interval | None
    labels: tuple[LabelScores, ...]
    confusion: Confusion | None
    slices: Mapping[SliceBy, tuple[Slice, ...]]
    likelihoods: MeanLikelihoods | None
    calibration: Calibration | None


class SetView(NamedTuple):
    """All runs on one set."""

    benchmark: Benchmark
    runs: tuple[SetRun, ...]
    published: tuple[tuple[str, float], ...]
    """Model -> its published score, in percent: those of the figure, then the best if it is another."""
