"""What training from cached tokens costs, as ratios of measurements of one run.

    python benchmarks/train.py [--section NAME ...] [--repeats N] [--device cpu|cuda] [--out DIR]

- flops: the operations counted by hand (`train_flops.py`) next to torch's own counter.
- online: a step from the cache, next to steps in which some or all streams are decoded and encoded.
  On a GPU the encoders alone: no decoding, random pictures.
- data: how long a step waits for its data, and tokens from disk next to tokens in memory.
- packing: clips end to end next to padded rows of the same clips; how full the budget gets.
- shared: three questions about a clip behind one prefix, next to three sequences.
- mfu: operations per second, next to those of a large matrix product.
- memory: peak of a step at LLaMA-2-7B's sizes, with and without checkpointed activations. On a CPU,
  where it takes minutes and 22 GiB, only when it is named.
- execution: batch sizes, checkpointing and compilation, and the hours of the paper's run. GPU only.

Weights are random. On a CPU the language model has 0.1 billion parameters and the online encoders are
scaled with it, so that they cost as much beside it as the paper's beside 7 billion; a GPU runs the true
sizes. What is compared runs by turns, in random order; a ratio is the median of those of the repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # ahead of this folder, in which `train` is this file
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import train_input  # noqa: E402
import train_speed  # noqa: E402
from train_input import Bench  # noqa: E402
from train_report import Result, goal_table, goals, machine, plot, say, show  # noqa: E402
from train_setup import CPU_SCALE, FULL_SCALE, QUICK_SCALE  # noqa: E402

DEFAULT_CLIPS = ROOT.parent / "shared" / "clips"
SECTIONS = ("flops", "online", "data", "packing", "shared", "mfu", "memory", "execution")

_WORK: dict[str, Callable[[Bench], Result]] = {
    "flops": train_input.flops,
    "online": train_input.online,
    "data": train_input.data,
    "packing": train_speed.packing,
    "shared": train_speed.shared,
    "mfu": train_speed.mfu,
    "memory": train_speed.memory,
    "execution": train_speed.execution,
}


def profile(bench: Bench, sections: Sequence[str]) -> None:
    """Print where the time of the steps of some sections goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    activities = [ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if bench.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        key = "self_device_time_total"
    for name in sections:
        if name not in bench.profiles:
            continue
        with recorded(activities=activities) as found:
            bench.profiles[name]()
            bench.synchronize()
        print(f"\n### Profile of {name}\n")
        print(found.key_averages().table(sort_by=key, row_limit=14, max_name_column_width=50))


def run_sections(
    bench: Bench,
    chosen: Sequence[str],
    found: dict[str, Result],
    left_out: dict[str, str],
    save: Callable[[], None],
) -> None:
    """Run sections and print their tables.

    Args:
        bench: What is measured.
        chosen: Which.
        found: Gets their results.
        left_out: Gets why others have none.
        save: Called behind each.
    """
    for name in SECTIONS:
        if name not in chosen:
            continue
        if name == "execution" and bench.device != "cuda" and not bench.scale.is_quick:
            left_out[name] = "needs a GPU"
            continue
        began_s = time.monotonic()
        try:
            found[name] = _WORK[name](bench)
            show(name, found[name])
        except ImportError as error:
            left_out[name] = f"not importable here: {error}"
        except Exception as error:  # noqa: BLE001 - the other sections took long, too
            traceback.print_exc()
            left_out[name] = f"failed: {type(error).__name__}: {error}"
        say(f"{name}: {left_out.get(name, 'done')} ({time.monotonic() - began_s:.0f} s)")
        save()


def main() -> None:
    """Measure and report."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--section", action="append", choices=SECTIONS, help="default: all")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clips", type=Path, default=DEFAULT_CLIPS, help="real clips, if any")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that everything runs")
    parser.add_argument("--profile", action="store_true", help="look at steps that miss a goal")
    parser.add_argument("--out", type=Path, help="save train.json and train.svg there")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is none")
    scale = FULL_SCALE if arguments.device == "cuda" else CPU_SCALE
    scale = QUICK_SCALE if arguments.quick else scale
    chosen = arguments.section or list(SECTIONS)
    if arguments.section is None and arguments.device == "cpu":
        chosen.remove("memory")
    about = machine(arguments.device)
    if arguments.repeats is not None:
        scale = replace(scale, repeats=arguments.repeats)
    found: dict[str, Result] = {}
    left_out: dict[str, str] = {}

    def save() -> None:
        if arguments.out is None:
            return
        document = {
            **{"machine": about, "scale": scale.name, "quick": arguments.quick},
            "goals": [goal.as_json() for goal in goals(found)],
            **{"left_out": left_out, **found},
        }
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "train.json").write_text(json.dumps(document, indent=1) + "\n")

    print(f"{about['device']}, {about['cpu']}, torch {about['packages']['torch']}: {scale.name}")
    work = Path(tempfile.mkdtemp(prefix="emocache-train-"))
    try:
        bench = Bench(scale, arguments.device, work, arguments.clips)
        run_sections(bench, chosen, found, left_out, save)
        for name, why in left_out.items():
            print(f"\n{name}: {why}")
        reached = goals(found)
        print(goal_table(reached), flush=True)
        if arguments.out:
            try:
                plot(found, arguments.out / "train.svg")
            except ImportError as error:
                say(f"no chart: {error}")
        if arguments.profile:
            missed = {goal.section for goal in reached if goal.is_met is False}
            profile(bench, [name for name in SECTIONS if name in missed])
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if any(why.startswith("failed") for why in left_out.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
