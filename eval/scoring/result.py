"""What scoring a set gives: plain data that is printed, written as JSON and laid out in reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from cache.schema import Model
from eval.benchmarks import Benchmark, Metric, Protocol
from eval.predictions import Prediction
from eval.scoring.tally import Tally

Reading = Literal["raw", "tag", "label", "last-word"]
"""How much of a reply is compared. `raw`: all of it, as it stands; `tag`: the content of its answer tag,
if it has one; `label`: what `eval.parse` reads in it, so punctuation and aliases are forgiven; `last-word`:
its last word, or neutral if that was not offered, as Emotion-LLaMA's scorer does."""


class Counts(Model):
    """Where the items of a set went."""

    offered: int
    """`scored` and `skipped` together: all rows handed in for the set, also of other modes and ids without
    a truth, and true ids without a row."""
    scored: int
    """Of them, those that enter the score; of wheels, those that at least one wheel scores."""
    skipped: int
    reasons: dict[str, int] = Field(default_factory=dict)
    """Why items are not scored -> how many."""
    published: int | None = None
    """Items of the set by Table 2."""


class Example(Model):
    """A reply that was hard to read."""

    id: str
    truth: str
    reply: str
    how: str


class WheelTables(Model):
    """Which word tables a score rests on."""

    digest: str
    """SHA-256 over the digests of all tables, 16 hexadecimal digits."""
    files: dict[str, str]
    """File -> its SHA-256, 16 hexadecimal digits."""
    published: bool
    """True if they are those of the published scores."""


class BenchmarkScore(Model):
    """The score of one set under one protocol; every score is a fraction."""

    task: str
    """Id of the benchmark."""
    protocol: Protocol
    metric: Metric
    reading: Reading
    score: float
    parts: dict[str, float]
    """Per wheel, or per class; a part without a scored item is left out."""
    part_counts: dict[str, int]
    """Scored items of each part."""
    extras: dict[str, float] = Field(default_factory=dict)
    """What the literature reports beside it: `uar`, `accuracy`, `weighted_f1`, ..."""
    counts: Counts
    replies: dict[str, int] = Field(default_factory=dict)
    """How the replies of offered items read against the offered labels; see `eval.parse`."""
    examples: tuple[Example, ...] = ()
    """Replies off the list, empty ones, ..."""
    other_protocols: dict[str, float] = Field(default_factory=dict)
    """Protocol -> score, where it reads otherwise."""
    notes: tuple[str, ...] = ()
    """What a reader must know to judge the number."""
    wheels: WheelTables | None = None
    run: str | None = None
    """Id of the run, where the file tells."""
    file: str | None = None
    """Name and digest of the predictions."""


@dataclass(frozen=True)
class Item:
    """One offered item."""

    id: str
    mode: str | None
    truth: tuple[str, ...]
    """True labels, as they were compared."""
    reply: str
    """Raw."""
    predicted: tuple[str, ...]
    """Labels as they were compared: one, several, or none."""
    how: str
    """How the reply reads against the offered labels."""
    prediction: Prediction | None = None
    """The line of our own format, where it is one."""


@dataclass(frozen=True)
class Scored:
    """A score with all that it was computed from."""

    benchmark: Benchmark
    result: BenchmarkScore
    items: tuple[Item, ...]
    """Offered items, in the order of the tally's rows."""
    tally: Tally
