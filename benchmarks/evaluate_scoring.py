"""Scoring and reporting the eighteen sets without a model; for `evaluate.py`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from train_report import Result

from eval.benchmarks import Benchmark, benchmarks
from eval.predictions import ClipFacts, Prediction, write_predictions

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT.parent / "shared" / "reference" / "emotion_wheel"
N_RUNS = 3


def scoring(work: Path) -> Result:
    """Score and report the whole bench, each as the command that a user types.

    Three of four replies are right; each has reasoning, an answer tag and likelihoods.
    """
    file = work / "predictions.jsonl"
    n = write_predictions(file, _predictions())
    command = [sys.executable, "-m", "emocache", "score", str(file), "--task", "all"]
    if not wheels().is_dir():
        raise ImportError(f"the wheel tables ({wheels()}); set EMOCACHE_WHEELS")
    score_s = [_run([*command, "--json"]) for _ in range(N_RUNS)]
    table_s = [_run(command) for _ in range(N_RUNS)]
    report = work / "report"
    report_s = [_run([*command, "--report", str(report)]) for _ in range(N_RUNS)]
    return {
        "n": n,
        "n_sets": len(benchmarks()),
        "file_mb": file.stat().st_size / 1e6,
        "score_s": sorted(score_s)[N_RUNS // 2],
        "table_s": sorted(table_s)[N_RUNS // 2],
        "report_s": sorted(report_s)[N_RUNS // 2],
        "page_mb": (report / "benchmark.html").stat().st_size / 1e6,
        "first_group_s": _first_lookup(),
    }


def wheels() -> Path:
    """Return the folder of the wheel tables."""
    return Path(os.environ.get("EMOCACHE_WHEELS", WHEELS))


def _run(command: list[str]) -> float:
    began_s = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env={**os.environ, "EMOCACHE_WHEELS": str(wheels())},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return time.perf_counter() - began_s


def _first_lookup() -> dict[str, float]:
    """Return how long building the lookup takes, and finding it built."""
    from eval.scoring.wheels import Wheels

    found = {}
    for name in ("built", "found built"):
        began_s = time.perf_counter()
        Wheels.load(wheels())
        found[name] = time.perf_counter() - began_s
    return found


def _predictions() -> Iterator[Prediction]:
    for row in benchmarks().values():
        chance = random.Random(row.id)
        for i in range(row.n):
            yield _prediction(row, i, chance)


def _prediction(row: Benchmark, i: int, chance: random.Random) -> Prediction:
    several = row.field in ("emotion_multi", "emotion_ov")
    truths = tuple(chance.sample(row.options, chance.randint(1, 3) if several else 1))
    named = truths if chance.random() < 0.75 else tuple(chance.sample(row.options, len(truths)))
    weights = [chance.random() for _ in row.options]
    text = "The brows are drawn together, the voice rises at the end, and the words are short. " * 3
    return Prediction(
        uid=f"{row.corpus}/{i:06d}",
        task=row.task,
        benchmark=row.id,
        split="test",
        reply=f"<think>{text}</think><answer>{', '.join(named)}</answer>",
        label=None if several else named[0],
        labels=named if several else (),
        parse="tag",
        truth=None if several else truths[0],
        truths=truths if several else (),
        likelihoods={o: w / sum(weights) for o, w in zip(row.options, weights, strict=True)},
        n_tokens=60,
        about=ClipFacts(language=chance.choice(["en", "zh"]), duration_s=chance.uniform(1, 20)),
        run="made-up",
        spec_ids={"audio": "a", "video": "v", "image": "i"},
    )
