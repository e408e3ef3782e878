"""The eighteen sets of MMEVerse-Bench as data, and what was published about them.

`benchmarks.yaml` says of each set what is asked, what is offered, how it is scored and how many items
Table 2 counts; `published.yaml` holds the rows of Tables 4, 5 and 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

import yaml
from pydantic import Field, model_validator

from cache.errors import SchemaError, near_miss
from cache.labels import LabelField
from cache.schema import Model, decode

Metric = Literal["hit-rate", "waf", "wheel-f", "accuracy", "map"]
METRICS: Mapping[Metric, str] = MappingProxyType(
    {
        "hit-rate": "hit rate, mean over five emotion wheels",
        "waf": "weighted average F1 without neutral",
        "wheel-f": "F of mean precision and recall, mean over five emotion wheels",
        "accuracy": "accuracy",
        "map": "mean average precision of 0/1 indicators",
    }
)
"""What each means, in words."""
WHEEL_METRICS: tuple[Metric, ...] = ("hit-rate", "wheel-f")
"""Metrics that need the wheel tables."""

Protocol = Literal["paper", "released", "unibench"]
"""`paper`: published counts and rules, a reply reduced to its answer tag. `released`: what the scorers
released with the paper do. `unibench`: the rules of MER-UniBench's own scorer."""
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

_TASKS: dict[LabelField, str] = {
    "emotion": "emotion",
    "emotion_multi": "multi-label",
    "emotion_ov": "open-vocabulary",
    "sentiment": "sentiment",
    "intent": "intent",
}


class Modes(Model):
    """Values of `mode` in a released predictions file that count; empty: every row."""

    paper: tuple[str, ...] = ()
    released: tuple[str, ...] | None = None
    """None: as `paper`."""


class Benchmark(Model):
    """One set of MMEVerse-Bench."""

    id: str
    title: str
    short: str
    """The column of Table 4."""
    corpus: str
    """Id of the corpus row whose records it scores."""
    set: str
    """Which part of the corpus, in words."""
    n: int = Field(gt=0)
    """Items, by Table 2."""
    field: LabelField
    """Of the record, with the truth."""
    options: tuple[str, ...] = Field(min_length=2)
    """What the model is offered, in lower case; of an open vocabulary examples."""
    metric: Metric
    modes: Modes = Modes()
    merged: dict[str, str] = Field(default_factory=dict)
    """Truth of the corpus -> the truth that counts for it here."""
    unibench: bool = False
    """One of the nine sets of MER-UniBench, over which Avg-9 is taken."""
    note: str | None = None
    """What one must know of its counts."""

    @model_validator(mode="after")
    def _plain_options(self) -> Benchmark:
        if any(o != o.strip().lower() for o in self.options):
            raise ValueError("options are in lower case, without outer blanks")
        return self

    @property
    def task(self) -> str:
        """Name of the recognition task that asks for its label."""
        return _TASKS[self.field]

    def modes_of(self, protocol: Protocol) -> tuple[str, ...]:
        """Return which values of `mode` count; empty: all."""
        released = self.modes.released
        return released if protocol == "released" and released is not None else self.modes.paper


class RecognitionRow(Model):
    """A row of Table 4, in percent."""

    model: str
    input: tuple[str, ...]
    scores: dict[str, float]
    """Benchmark id -> score."""
    averages: dict[str, float]
    """`avg-9`, `avg-18`, as printed."""


class EmerRow(Model):
    """A row of Table 5: mean ratings, 1 to 10."""

    model: str
    clue: float
    label: float


class MmeRow(Model):
    """A row of Table 6: scores in percent, means per reply."""

    model: str
    kind: Literal["open", "closed"]
    llm: str | None
    """Size of its language model."""
    steps: float
    tokens: float
    rec: float = Field(alias="rec-s")
    rea: float = Field(alias="rea-s")
    cot: float = Field(alias="cot-s")


class Published(Model):
    """Tables 4, 5 and 6."""

    recognition: tuple[RecognitionRow, ...]
    emer: tuple[EmerRow, ...]
    mme_emotion: tuple[MmeRow, ...] = Field(alias="mme-emotion")


@cache
def benchmarks() -> Mapping[str, Benchmark]:
    """Return the eighteen sets by id, in the order of Table 4."""
    found = [decode(Benchmark, row, "benchmarks.yaml") for row in _read("benchmarks.yaml")]
    return MappingProxyType({row.id: row for row in found})


@cache
def published() -> Published:
    """Return the published rows of Tables 4, 5 and 6."""
    return decode(Published, _read("published.yaml"), "published.yaml")


def benchmark(name: str) -> Benchmark:
    """Return a set by its id; raises SchemaError that lists the known ones."""
    if name not in benchmarks():
        raise SchemaError(
            f"unknown benchmark '{name}'.{near_miss(name, benchmarks())} Allowed: "
            f"{', '.join(benchmarks())}."
        )
    return benchmarks()[name]


def check_protocol(name: str) -> Protocol:
    """Return the protocol; raises SchemaError that lists the known ones."""
    for known in PROTOCOLS:
        if name == known:
            return known
    raise SchemaError(
        f"unknown protocol '{name}'.{near_miss(name, PROTOCOLS)} Allowed: {', '.join(PROTOCOLS)}."
    )


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Return Avg-9 and Avg-18: plain means over sets, whatever their sizes; absent unless complete.

    Args:
        scores: Benchmark id -> score, in any unit.
    """
    groups = {
        "avg-9": [row.id for row in benchmarks().values() if row.unibench],
        "avg-18": list(benchmarks()),
    }
    return {
        name: sum(scores[i] for i in ids) / len(ids)
        for name, ids in groups.items()
        if all(i in scores for i in ids)
    }


def _read(name: str) -> Any:
    return yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
