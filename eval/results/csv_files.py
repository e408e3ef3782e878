"""A report as CSV: a line per run and set, one per label, and one per wheel or class."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import TYPE_CHECKING

from eval.benchmarks import averages
from eval.results.tables import protocol_of

if TYPE_CHECKING:
    from eval.results.data import RunScores, SetView


def csv_files(runs: Sequence[RunScores], views: Sequence[SetView]) -> dict[str, str]:
    """Return the CSV files by name; scores are fractions, and what is not known is empty."""
    scores: list[list[object]] = []
    labels: list[list[object]] = []
    parts: list[list[object]] = []
    for view in views:
        for run in view.runs:
            result = run.scored.result
            between, counts = run.interval, result.counts
            where = [run.name, result.task]
            ends = ["", "", ""] if between is None else [between.low, between.high, between.level]
            scores.append(
                [*where, result.protocol, result.reading, result.metric, result.score, *ends,
                 counts.offered, counts.scored, counts.skipped, counts.published or ""]
            )  # fmt: skip
            parts.extend(
                [*where, part, value, result.part_counts.get(part, "")]
                for part, value in result.parts.items()
            )
            labels.extend([*where, *label] for label in run.labels)
    for run_of in runs:
        means = averages({task: one.result.score for task, one in run_of.scored.items()})
        for name, mean in means.items():
            between = run_of.intervals.get(name)
            ends = ["", "", ""] if between is None else [between.low, between.high, between.level]
            row = [
                run_of.name,
                name,
                protocol_of({"": run_of.scored}),
                "",
                "mean of sets",
            ]
            scores.append([*row, mean, *ends, *[""] * 4])
    return {
        "benchmark.csv": _csv(
            "run task protocol reading metric score low high level offered scored skipped published",
            scores,
        ),
        "benchmark-labels.csv": _csv(
            "run task label precision recall f1 n_true n_predicted", labels
        ),
        "benchmark-parts.csv": _csv("run task part score n", parts),
    }


def _csv(names: str, rows: Iterable[Sequence[object]]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names.split())
    writer.writerows(rows)
    return text.getvalue()
