"""What a comparison of runs says, as plain data."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field

from cache.schema import Model
from eval.results.sides import ComparedRun, Unit
from eval.scoring.intervals import Interval, McNemar, PairedTest

LEVEL: Final = 0.05
"""A corrected p value below it is marked."""


class RunScore(Model):
    """One run on one set."""

    score: float
    """On the compared items."""
    interval: Interval
    n_only: int
    """Its items that another run lacks; they are not compared."""
    own_score: float | None
    """On all its own items; None where these are the compared ones."""


class Part(Model):
    """A class or a wheel of a set."""

    name: str
    scores: tuple[float | None, ...]
    """Per run; None where it has none."""


class Change(Model):
    """An item on which a run and the reference do not count alike."""

    id: str
    mode: str | None
    truth: tuple[str, ...]
    predicted: tuple[tuple[str, ...], tuple[str, ...]]
    """As they were compared: of the reference, of the other run."""
    replies: tuple[str, str]
    """Raw."""
    subtitle: str | None
    gain: float
    """What the reference's score would gain with the other reply."""


class Difference(Model):
    """A run against the reference on one set."""

    run: str
    test: PairedTest
    mcnemar: McNemar | None
    """Where items are right or wrong."""
    p_value: float
    """McNemar's exact one where there is one, else that of the permutation test."""
    p_holm: float | None
    """Corrected for the number of sets and runs compared; None of an average, which is none of them."""
    better: tuple[Change, ...] = ()
    """Items that the run has better: examples, the weightiest of each truth first."""
    worse: tuple[Change, ...] = ()
    better_ids: tuple[str, ...] = ()
    """All of them, in the order of the file."""
    worse_ids: tuple[str, ...] = ()

    @property
    def is_clear(self) -> bool:
        """True if the corrected p value is below `LEVEL`."""
        return self.p_holm is not None and self.p_holm < LEVEL


class SetComparison(Model):
    """All runs on one set."""

    id: str
    title: str
    metric: str
    """In words."""
    unit: Unit
    kind: Literal["set", "average"] = "set"
    n_common: int
    """Items that all runs have."""
    n_scored: int
    """Of them, those that are scored."""
    scores: tuple[RunScore, ...]
    """In the order of the runs."""
    parts: tuple[Part, ...] = ()
    differences: tuple[Difference, ...]
    """One for each run but the first."""
    notes: tuple[str, ...] = ()


class Comparison(Model):
    """Everything that a comparison says."""

    runs: tuple[ComparedRun, ...] = Field(min_length=2)
    """The first is the reference."""
    protocol: str | None
    """By which benchmarks were scored; None: none was."""
    level: float
    """Of all intervals."""
    n_samples: int
    n_swaps: int
    seed: int
    sets: tuple[SetComparison, ...]
    averages: tuple[SetComparison, ...] = ()
    """Avg-9 and Avg-18, where all runs have all their sets."""
    findings: tuple[str, ...] = ()
    """What is not compared, since not all runs have it."""

    @property
    def n_tests(self) -> int:
        """How many p values are corrected together."""
        return sum(len(one.differences) for one in self.sets)
