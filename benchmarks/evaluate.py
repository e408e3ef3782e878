"""What evaluation costs, as ratios of measurements of one run.

    python benchmarks/evaluate.py [--section NAME ...] [--repeats N] [--device cpu|cuda] [--out DIR]

- shared: two questions about a clip behind one prefix, next to two prompts.
- batched: replies in batches, next to one at a time, short and long; and next to transformers' own
  generation.
- cached: a reply from stored tokens, next to one that decodes and encodes the clip, and next to what
  the operations predict. On a CPU only.
- scoring: 36,133 predictions of 18 sets, scored and reported by the command line.

Weights are random. On a CPU the language model has 0.1 billion parameters, and the encoders of `cached` are
scaled with it, so that they cost as much beside it as the paper's beside 7 billion; a GPU runs the
true sizes. What is compared runs by turns, in random order; a ratio is the median of those of the
repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # ahead of this folder, in which `train` is a file
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import evaluate_cached  # noqa: E402
import evaluate_scoring  # noqa: E402
import evaluate_speed  # noqa: E402
import torch  # noqa: E402
from train_input import Bench  # noqa: E402
from train_report import Goal, Result, goal_table, machine, number, say, table  # noqa: E402
from train_setup import CPU_SCALE, FULL_SCALE, QUICK_SCALE  # noqa: E402

DEFAULT_CLIPS = ROOT.parent / "shared" / "clips"
_WORK: dict[str, Callable[[Bench], Result]] = {
    "shared": evaluate_speed.shared,
    "batched": evaluate_speed.batched,
    "cached": evaluate_cached.cached,
    "scoring": lambda bench: evaluate_scoring.scoring(bench.work),
}


def goals(found: Mapping[str, Result], device: str) -> list[Goal]:
    """Return what was to be reached, and what was measured."""
    shared, cached, scoring = (found.get(name, {}) for name in ("shared", "cached", "scoring"))
    rows = {row["replies"]: row for row in found.get("batched", {}).get("rows", ())}
    single = {kind: row["ours, one at a time"] for kind, row in rows.items()}
    plain = {kind: row["transformers, one at a time"] for kind, row in rows.items()}
    off = abs(cached["ratio"] / cached["predicted"] - 1) if cached else None
    bounds = (
        {"short": ">= 1.05", "long": ">= 1.5"} if device == "cpu" else dict.fromkeys(rows, ">= 8")
    )
    return [
        Goal("shared", "two questions: two prompts / one prefix", ">= 1.6", shared.get("ratio")),
        *(
            Goal(
                "batched",
                f"{kind} replies: one at a time / batched, {whose}",
                bound,
                ratios.get(kind),
            )
            for kind, bound in bounds.items()
            for whose, ratios in (("ours", single), ("transformers' own one at a time", plain))
        ),
        Goal("cached", "anew / cached, off what the operations predict", "<= 0.1", off),
        Goal("scoring", "36,133 predictions, all metrics, s", "<= 20", scoring.get("score_s")),
        Goal("scoring", "the same with the report, s", "<= 30", scoring.get("report_s")),
        Goal("scoring", "size of the page, MB", "<= 15", scoring.get("page_mb")),
    ]


def cached_table(found: Result) -> str:
    """Lay out what `cached` found."""
    columns = {
        "clips": f"{found['n_clips']} ({found['n_real']} real)",
        "from the store, s": number(found["cached_s"]),
        "anew, s": number(found["anew_s"]),
        "of it decoding, s": number(found["decode_s"]),
        "anew / cached": number(found["ratio"]),
        "operations": number(found["predicted"]),
        "equal replies": "yes" if found["equal_replies"] else "NO",
    }
    return table("A reply from the store, and anew", list(columns), [list(columns.values())])


def scoring_table(found: Result) -> str:
    """Lay out what `scoring` found."""
    first = found["first_group_s"]
    columns = {
        "predictions": f"{found['n']:,} of {found['n_sets']} sets",
        "file, MB": number(found["file_mb"]),
        "--json, s": number(found["score_s"]),
        "with intervals, s": number(found["table_s"]),
        "with report, s": number(found["report_s"]),
        "page, MB": number(found["page_mb"]),
        "wheels built, s": number(first["built"]),
        "found built, s": number(first["found built"]),
    }
    return table("Scoring, as commands", list(columns), [list(columns.values())])


_TABLES: dict[str, Callable[[Result], str]] = {
    "shared": evaluate_speed.shared_table,
    "batched": evaluate_speed.batched_table,
    "cached": cached_table,
    "scoring": scoring_table,
}


def main() -> None:
    """Measure and report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=list(_WORK), help="default: all")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clips", type=Path, default=DEFAULT_CLIPS, help="real clips, if any")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that everything runs")
    parser.add_argument("--out", type=Path, help="save evaluate.json there")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none")
    scale = FULL_SCALE if arguments.device == "cuda" else CPU_SCALE
    scale = QUICK_SCALE if arguments.quick else scale
    if arguments.repeats is not None:
        scale = replace(scale, repeats=arguments.repeats)
    chosen = arguments.section or [
        name for name in _WORK if name != "cached" or arguments.device == "cpu"
    ]
    about = machine(arguments.device)
    print(f"{about['device']}, {about['cpu']}, torch {about['packages']['torch']}: {scale.name}")
    found: dict[str, Result] = {}
    work = Path(tempfile.mkdtemp(prefix="emocache-evaluate-"))
    try:
        bench = Bench(scale, arguments.device, work, arguments.clips)
        for name in chosen:
            began_s = time.monotonic()
            found[name] = _WORK[name](bench)
            print(_TABLES[name](found[name]), flush=True)
            say(f"{name}: done ({time.monotonic() - began_s:.0f} s)")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    reached = goals(found, arguments.device)
    print(goal_table(reached), flush=True)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        document = {
            **{"machine": about, "scale": scale.name, "quick": arguments.quick},
            **{"goals": [goal.as_json() for goal in reached], **found},
        }
        (arguments.out / "evaluate.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
