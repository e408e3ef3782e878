"""What the table of a sweep says, as plain data: pages, texts and plots lay it out.

Scores are fractions; published figures stay as printed, in percent. Nothing here depends on when or how
often the sweep was started, so that equal trials give an equal `table.json`.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, JsonValue

from cache.schema import Model
from eval.sweep.schema import Axis, Scale, ScoreColumn

LEVEL: Final = 0.95
"""Of every interval."""
ALPHA: Final = 0.05
"""A corrected p value below it is marked."""


class Span(Model):
    """A confidence interval, and what it is about."""

    low: float
    high: float
    over: Literal["seeds", "clips"]
    """`seeds`: Student's t over the trainings of a row; `clips`: bootstrap over the clips of its one
    training, which says nothing of what another seed would give."""


class RowScore(Model):
    """One score of a row."""

    mean: float
    """Over the seeds that are done."""
    by_seed: dict[str, float]
    span: Span | None
    """None: there is none to give; `TableRow.remarks` says why."""
    n_items: int | None
    """Scored clips of one seed; None: its predictions could not be read."""


class Change(Model):
    """A row's score less the baseline's, from the same seeds and the same clips."""

    difference: float
    """Mean over the common seeds."""
    span: Span
    p_value: float
    """Paired permutation test on clips, two-sided; of several seeds, of their mean difference, a
    clip swapped in all of them together."""
    p_holm: float
    """Corrected for the number of rows and scores that are tested."""
    n_seeds: int
    """That both have."""
    n_asked: int
    """Seeds that were asked for, of the one or of the other."""
    n_items: int
    """Scored clips of one seed."""
    n_better: int
    """Clips whose replies, of all seeds, would alone raise the baseline's score."""
    n_worse: int

    @property
    def is_clear(self) -> bool:
        """True if the corrected p is below `ALPHA` and nothing that seeds tell speaks against it.

        The test takes each training as given; the interval over seeds does not, and must be without 0.
        Where several seeds were asked for and one is common, they tell nothing, and nothing is clear;
        where the change is the same in all, there is no such interval, and the test decides.
        """
        if self.p_holm >= ALPHA:
            return False
        if self.span.over == "seeds":
            return self.span.low > 0 or self.span.high < 0
        return self.n_seeds > 1 or self.n_asked == 1


class Failure(Model):
    """A trial that came to nothing."""

    seed: int
    step: str
    reason: str
    log: str
    """Relative to the sweep's folder."""


class TableRow(Model):
    """One line of the table."""

    name: str
    cells: tuple[str, ...]
    """Under `SweepTable.columns`."""
    group: str | None
    note: str | None
    stage: str | None
    settings: dict[str, JsonValue]
    """The row's own."""
    seeds: tuple[int, ...]
    """All that are asked for."""
    scores: dict[str, RowScore] = Field(default_factory=dict)
    """Score column -> over the seeds that are done."""
    changes: dict[str, Change] = Field(default_factory=dict)
    """Score column -> against the baseline."""
    published: dict[str, float] = Field(default_factory=dict)
    """Score column -> the paper's figure, in percent as printed."""
    n_trainable: int | None = None
    prefix: dict[str, int] = Field(default_factory=dict)
    """Block -> its tokens, in the order in which they enter the language model; empty: not known."""
    spec_ids: dict[str, str] = Field(default_factory=dict)
    """Input -> spec of the tokens that it reads."""
    run_keys: dict[str, str] = Field(default_factory=dict)
    """Seed -> folder of its training in OUT/runs."""
    n_done: int = 0
    """Seeds that have every score and did not fail."""
    failures: tuple[Failure, ...] = ()
    at: JsonValue = None
    """Where it stands on the plot's axis."""
    line: JsonValue = None
    """Which line of the plot it is on."""
    remarks: tuple[str, ...] = ()
    """Why an interval or a test is missing."""

    def n_scored(self, column: str) -> int:
        """Return how many seeds have a score."""
        return len(self.scores[column].by_seed) if column in self.scores else 0

    def failures_of(self, column: str) -> tuple[Failure, ...]:
        """Return the failures that left a score out: a trial may fail behind scores that it has."""
        has = self.scores[column].by_seed if column in self.scores else {}
        return tuple(one for one in self.failures if str(one.seed) not in has)

    @property
    def n_open(self) -> int:
        """Seeds that have not failed and lack a score."""
        return len(self.seeds) - self.n_done - len(self.failures)

    @property
    def n_prefix(self) -> int | None:
        """Tokens of the prefix."""
        return sum(self.prefix.values()) if self.prefix else None


class SweepTable(Model):
    """Everything that the table says: OUT/table.json."""

    schema_version: Literal[1] = 1
    name: str
    title: str
    source: str | None
    about: str | None
    scale: Scale
    columns: tuple[str, ...]
    scores: tuple[ScoreColumn, ...]
    baseline: str | None
    plot: Axis | None
    rows: tuple[TableRow, ...]
    level: float = LEVEL
    n_samples: int
    """Bootstrap samples of each interval over clips."""
    n_swaps: int
    """Of each permutation test."""
    n_tests: int
    """P values that are corrected together."""
    notes: tuple[str, ...] = ()

    @property
    def of_baseline(self) -> TableRow | None:
        """The row that the others are tested against."""
        return next((row for row in self.rows if row.name == self.baseline), None)

    def has_published(self, column: str) -> bool:
        """True if any row has a published figure for a score."""
        return any(column in row.published for row in self.rows)

    def published_change(self, row: TableRow, column: str) -> float | None:
        """Return how far a published figure is from the baseline's, in points of percent."""
        base = self.of_baseline
        if base is None or base is row:
            return None
        if column not in row.published or column not in base.published:
            return None
        # The paper prints two decimals, so does their difference.
        return round(row.published[column] - base.published[column], 2)
