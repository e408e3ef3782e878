"""Rows of predictions files, in the released format and in ours, and their scores."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.benchmarks import Benchmark
from eval.predictions import Prediction
from eval.scoring.result import BenchmarkScore
from eval.scoring.score import score_file

KNOWN = ("happy", "sad", "angry")
"""Words that the wheels of these tests group."""


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(
    pairs: Sequence[tuple[Any, str]], mode: str | None = "test", **more: Any
) -> list[dict[str, Any]]:
    """Return rows of the released format; pairs of truth and reply."""
    return [
        {"video_id": f"v{i}", "answer": truth, "response": reply}
        | ({"mode": mode} if mode else {})
        | more
        for i, (truth, reply) in enumerate(pairs)
    ]


def score(
    path: Path, rows: Iterable[Mapping[str, Any]], task: str, **options: Any
) -> BenchmarkScore:
    return score_file(write(path / "predictions.jsonl", rows), task, **options).result


def truths_for(row: Benchmark, n: int, rng: random.Random) -> list[Any]:
    """Return truths that the set scores, unevenly spread."""
    if row.metric == "map":
        return [
            ", ".join(o for i, o in enumerate(row.options) if rng.random() < 1 / (i + 2))
            for _ in range(n)
        ]
    if row.metric == "wheel-f":
        return [", ".join(rng.sample(KNOWN, rng.randint(1, 2))) for _ in range(n)]
    names = KNOWN if row.metric == "hit-rate" else row.options
    return rng.choices(names, weights=range(1, len(names) + 1), k=n)


def own(uid: str, reply: str, **fields: Any) -> Prediction:
    """Return a line of our own format; how it was parsed plays no part here."""
    given: dict[str, Any] = {
        "task": "emotion", "label": None, "parse": "off_list" if reply else "empty", "truth": None,
        "run": "run-1", "spec_ids": {"audio": "a-1"},
    } | fields  # fmt: skip
    return Prediction.model_validate({"uid": uid, "reply": reply} | given)
