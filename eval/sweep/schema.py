"""What passes between the parts of a sweep: the file, its trials, and what each of them came to.

::

    SweepFile --(rows)--> Trials --(plan)--> tokens to encode, runs to train
        --(run)--> TrialResult per trial --(results)--> table, page, LaTeX, CSV

A *row* is a line of the table: a preset with settings. A *trial* is a row with one seed. Trials whose
resolved presets are equal share one *run*, whose key is a digest of that preset.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, FiniteFloat, JsonValue, PrivateAttr, model_validator

from cache.schema import Model
from eval.parse import LabelReading
from train.config import Preset

Scale = Literal["full", "demo"]
"""`demo`: every network at the size of the bundled tiny ones, on a generated corpus."""

Place = tuple[str | int, ...]
"""A field of a file: keys and list positions, from the outermost."""

MAX_NAME = 200
"""Longest name: one with a seed names a folder, and file systems end at 255 bytes."""
MAX_SEED = 2**63 - 1
"""Largest seed: a signed number of 64 bits, which torch takes."""
MAX_TRIALS = 1000
"""Most rows times seeds of a sweep: more than anybody trains, and soon resolved and planned."""


def not_finite(data: Any) -> Place | None:
    """Return where plain data holds a number that JSON has not (NaN, infinity); None if nowhere."""
    if isinstance(data, float):
        return None if math.isfinite(data) else ()
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(data, Mapping):
        items = data.items()
    elif isinstance(data, list | tuple):
        items = enumerate(data)
    for key, value in items:
        if (inner := not_finite(value)) is not None:
            return (key, *inner)
    return None


def _finite(value: JsonValue) -> JsonValue:
    if not_finite(value) is not None:
        raise ValueError("a setting must be finite; .nan and .inf are no numbers to train with")
    return value


def _some_value(axis: tuple[JsonValue, ...]) -> tuple[JsonValue, ...]:
    if not axis:
        raise ValueError("an axis without values makes no rows; give it some, or leave it out")
    return axis


Seed = Annotated[int, Field(strict=True, ge=0, le=MAX_SEED)]
"""Strict, so that `true` and `1.0` are not taken for seeds."""
SettingValue = Annotated[JsonValue, AfterValidator(_finite)]
"""Value of a setting, as it survives in JSON files."""


@dataclass(frozen=True)
class Source:
    """The text that a sweep was read from."""

    path: str
    """As the user gave it; of a shipped file its name."""
    text: str
    lines: Mapping[Place, int] = field(repr=False)
    """Field -> the line of its key, counted from 1."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def where(self, place: Place) -> str:
        """Return `FILE:LINE` of a field, or of the innermost one around it that the file has."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"{self.path}:{self.lines.get(place, 1)}"


class ScoreColumn(Model):
    """One figure that every row gets."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=MAX_NAME)
    heading: str
    kind: Literal["benchmark", "split"]
    """`benchmark`: the mean over sets of MMEVerse-Bench; `split`: a score on records of a manifest."""
    sets: tuple[str, ...] = ()
    """Benchmark alone: names of `eval/benchmarks.yaml`, whose scores are averaged."""
    split: str = "test"
    """Split alone, as are the next two."""
    task: str = "emotion"
    metric: Literal["accuracy", "weighted_f1", "macro_f1", "uar"] = "weighted_f1"
    reading: LabelReading = "label"
    """Split alone: how a label is read in a reply; `last-word` as the predecessor does."""


class Axis(Model):
    """A plot of the rows along one setting, as the papers draw them."""

    key: str
    """Dotted path of the setting on the horizontal axis; its value is taken from each resolved row."""
    heading: str
    log: bool = False
    by: str | None = None
    """Dotted path of another setting: one line for each of its values."""


class SweepRow(Model):
    """One line of the table."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=MAX_NAME)
    cells: tuple[str, ...] = ()
    """What the line shows under `SweepFile.columns`; empty shows the name."""
    group: str | None = None
    """Heading above it and those of the same group behind it."""
    preset: str | None = None
    """None takes the sweep's."""
    set: dict[str, SettingValue] = Field(default_factory=dict)
    """Dotted path -> value, over the sweep's settings."""
    stage: str | None = None
    """Score the model as it is behind this stage; None scores it behind the last."""
    seeds: tuple[Seed, ...] = ()
    """Empty takes the sweep's."""
    published: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Score column -> the paper's figure, as printed (in percent where the paper has percent)."""
    note: str | None = None


class SweepFile(Model):
    """A sweep as its YAML file says it."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=MAX_NAME)
    title: str
    source: str | None = None
    """Where the rows are published."""
    about: str | None = None
    """What a reader should know: choices that the source leaves open."""
    preset: str
    set: dict[str, SettingValue] = Field(default_factory=dict)
    """Settings of all rows."""
    seeds: tuple[Seed, ...] = Field(default=(42,), min_length=1)
    columns: tuple[str, ...] = ("row",)
    """Headings of the rows' cells."""
    scores: tuple[ScoreColumn, ...] = Field(min_length=1)
    rows: tuple[SweepRow, ...] = ()
    grid: dict[str, Annotated[tuple[SettingValue, ...], AfterValidator(_some_value)]] = Field(
        default_factory=dict
    )
    """Dotted path -> values: each row, or the one row that the sweep is without rows, once per
    combination."""
    baseline: str | None = None
    """Row that the others are tested against."""
    plot: Axis | None = None
    demo: dict[str, SettingValue] = Field(default_factory=dict)
    """Settings of all rows at demo scale, over the row's own: steps and batches."""

    _source: Source | None = PrivateAttr(default=None)

    @property
    def read_from(self) -> Source | None:
        """Where `eval.sweep.file.read_sweep` found it; None if it was made in code."""
        return self._source

    def where(self, *place: str | int) -> str:
        """Return `FILE:LINE` of a field, for messages: `sweep.where("rows", 3, "set")`."""
        return self._source.where(place) if self._source else f"sweep '{self.name}'"

    @model_validator(mode="after")
    def _some_row(self) -> SweepFile:
        if not self.rows and not self.grid:
            raise ValueError("a sweep without rows and without a grid has nothing to train")
        return self


@dataclass(frozen=True)
class Row:
    """A line of the table with all grid values filled in."""

    name: str
    cells: tuple[str, ...]
    group: str | None
    settings: dict[str, Any]
    """The row's own settings, without the sweep's: what makes it differ."""
    stage: str | None
    published: dict[str, float]
    seeds: tuple[int, ...]
    note: str | None = None
    preset: str | None = None
    """None takes the sweep's."""
    number: int | None = None
    """Which of the file's rows it comes from, counted from 0; None in a grid without rows."""


@dataclass(frozen=True)
class Trial:
    """A row with one seed, ready to be trained."""

    row: str
    seed: int
    preset: Preset
    """Resolved and at its scale; weights digests are open until the plan fills them."""
    stage: str | None

    @property
    def name(self) -> str:
        """The row with its seed: folder of its scores."""
        return f"{self.row}@{self.seed}"


class TrialResult(Model):
    """What a trial came to: OUT/trials/ROW@SEED/result.json."""

    schema_version: Literal[1] = 1
    row: str
    seed: int
    run_key: str
    """Folder of its run in OUT/runs; trials with equal presets share one."""
    status: Literal["ok", "failed"]
    failed_step: Literal["extract", "train", "score"] | None = None
    reason: str | None = None
    """Why it failed, in one line; the whole is in the trial's log."""
    scores: dict[str, float] = Field(default_factory=dict)
    """Score column -> value as a fraction."""
    predictions: dict[str, str] = Field(default_factory=dict)
    """Score column -> predictions.jsonl, or the folder of a benchmark, relative to OUT."""
    n_trainable: int | None = None
    spec_ids: dict[str, str] = Field(default_factory=dict)
    """Input -> spec of the tokens that it read."""
    train_s: float | None = None
    """Wall time of training, shared by the trials of a run."""
    score_s: float | None = None
