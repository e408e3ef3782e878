"""Tables, goals and the chart of `train.py`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = dict[str, Any]

ACCENT, GREY, PALE, DARK = "#c8501e", "#9aa5b1", "#d7dce1", "#1f4e79"


@dataclass(frozen=True)
class Goal:
    """A figure that is to be reached."""

    section: str
    what: str
    bound: str
    """Such as `>= 0.9`."""
    measured: float | None

    @property
    def is_met(self) -> bool | None:
        """None if it was not measured."""
        if self.measured is None:
            return None
        sign, number = self.bound.split()
        return self.measured >= float(number) if sign == ">=" else self.measured <= float(number)

    def as_json(self) -> Result:
        """Return it as it is saved."""
        return {
            **{"section": self.section, "goal": self.what, "bound": self.bound},
            **{"measured": self.measured, "met": self.is_met},
        }


def middle(values: Iterable[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def paired(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the median of a / b, repeat by repeat."""
    return middle(x / y for x, y in zip(a, b, strict=True))


def number(value: float | None, digits: int = 3) -> str:
    """Format a figure; nothing if there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) + " |"
        for row in (heads, ["-" * w for w in widths], *rows)
    ]
    return "\n".join([f"\n### {title}\n", *lines])


def goal_table(goals: Sequence[Goal]) -> str:
    """Return the goals as a table."""
    words = {True: "met", False: "MISSED", None: "not measured"}
    rows = [[g.what, g.bound, number(g.measured, 4), words[g.is_met]] for g in goals]
    return table("Goals", ["goal", "bound", "measured", ""], rows)


def say(text: str) -> None:
    """Report progress; the tables alone go to stdout."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def machine(device: str) -> Result:
    """Return what the figures depend on."""
    import torch

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    models = [line.split(": ")[1] for line in text.splitlines() if line.startswith("model name")]
    packages = {}
    for name in ("torch", "transformers", "peft", "timm", "numpy", "zarr"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "cpu": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": packages,
        "load_average": os.getloadavg(),
    }


# ---------------------------------------------------------------- goals and tables


def goals(found: dict[str, Result]) -> list[Goal]:
    """Return what is to be reached."""
    rows: list[Goal] = []
    if "online" in found:
        by = {row["variant"]: row for row in found["online"]["rows"]}
        for name in ("all cached", "audio cached", "video cached", "image cached"):
            row = by[name]
            what = f"{name}: speed-up over all online / what FLOPs predict"
            rows.append(Goal("online", what, ">= 0.9", row["speedup"] / row["speedup_predicted"]))
        row = by["image online"]
        what = "all cached: speed-up over image online / what FLOPs predict"
        rows.append(Goal("online", what, ">= 0.9", row["ratio"] / row["predicted"]))
    for row in found.get("data", {}).get("rows", ()):
        wait = 100 * row["wait"]
        rows.append(Goal("data", f"{row['budget']}: waiting for data, % of the step", "<= 2", wait))
        ratio = row["disk_to_memory"]
        rows.append(Goal("data", f"{row['budget']}: step from disk / memory", "<= 1.03", ratio))
    if "packing" in found:
        one = found["packing"]
        real = 100 * min(row["real"] for row in one["budgets"])
        rows.append(Goal("packing", "packed: real tokens, % of positions", ">= 97", real))
        for row in one["budgets"]:
            what = f"budget of {row['budget']:,}: used, %"
            rows.append(Goal("packing", what, ">= 97", 100 * row["used"]))
        what = "packed / padded samples/s, of what the removed padding predicts"
        rows.append(Goal("packing", what, ">= 0.95", one["of_predicted"]))
    for row in found.get("shared", {}).get("rows", ()):
        what = f"shared prefix / separate pairs/s, {row['mix']}"
        rows.append(Goal("shared", what, ">= 2", row["ratio"]))
    for row in found.get("mfu", {}).get("rows", ()):
        if "mfu" not in row:
            continue
        what = f"{row['positions']:,} positions: FLOP/s, % of a matrix product's"
        rows.append(Goal("mfu", what, ">= 75", 100 * row["mfu"]))
        what = f"{row['positions']:,} positions: ours / transformers + peft alone"
        rows.append(Goal("mfu", what, ">= 1", row["ours_to_plain"]))
    return rows


def show(name: str, result: Result) -> None:
    """Print the table of a section."""
    print(_TABLES[name](result), flush=True)


def _flops_table(found: Result) -> str:
    rows = [
        [r["what"], f"{r['by_hand'] / 1e9:.3f}", f"{r['by_torch'] / 1e9:.3f}", f"{r['ratio']:.4f}"]
        for r in found["rows"]
    ]
    return table("FLOPs, small model", ["", "GFLOP by hand", "by torch", "ratio"], rows)


def _online_table(found: Result) -> str:
    rows = [
        [
            r["variant"],
            f"{r['flops'] / 1e12:.3f}",
            f"{r['step_s']:.3f}",
            f"{r['ratio']:.2f}",
            f"{r['predicted']:.2f}",
            f"{r['speedup']:.2f}",
            f"{r['speedup_predicted']:.2f}",
            f"{r['speedup'] / r['speedup_predicted']:.2f}",
        ]
        for r in found["rows"]
    ]
    heads = ["", "TFLOP", "step s", "step / cached", "predicted"]
    heads += ["speed-up over nothing cached", "predicted", "measured / predicted"]
    title = f"Step of one clip, {found['positions']:.0f} positions"
    text = table(title, heads, rows)
    parts = ", ".join(f"{s} {n / 1e9:.0f}" for s, n in found["encoder_flops"].items())
    text += f"\n\nGFLOP: language model and adapters {found['step_flops'] / 1e9:.0f}, {parts}."
    if "decode_s" in found:
        text += f" Decoding a clip: {found['decode_s']:.3f} s. Losses of online and cached tokens differ "
        text += f"by {found['loss_difference']:.1e}."
    return text


def _data_table(found: Result) -> str:
    rows = [
        [
            r["budget"],
            f"{r['step_s']:.3f}",
            f"{100 * r['wait']:.2f} ({100 * r['wait_max']:.2f})",
            f"{100 * r['wait_memory']:.2f}",
            f"{r['disk_to_memory']:.3f}",
            number(middle(x["mb_read"] for x in r["runs"]["disk"])),
        ]
        for r in found["rows"]
    ]
    heads = ["step", "s", "wait % (worst run)", "wait %, memory", "disk / memory", "MB read"]
    return table(f"Data, {found['n_workers']} workers, {found['n_steps']} steps", heads, rows)


def _packing_table(found: Result) -> str:
    rows = [
        ["packed", f"{found['packed_samples_per_s']:.3f}", "100"],
        ["padded", f"{found['padded_samples_per_s']:.3f}", f"{100 * found['real_padded']:.1f}"],
    ]
    title = f"Packing, batches of {found['n_clips']} clips, stage-2 mix"
    text = table(title, ["", "samples/s", "real tokens %"], rows)
    lengths = found["text"]
    text += f"\n\nPacked / padded: {found['ratio']:.3f}; the removed padding predicts "
    text += f"{found['predicted']:.3f}. Tokens: prompt {lengths['tail']:.0f}, answers "
    text += f"{lengths['answer_min']} to {lengths['answer_max']}, {lengths['tokens_per_word']:.2f} a word."
    rows = [
        [
            f"{r['budget']:,}",
            f"{100 * r['used']:.2f}",
            f"{100 * r['used_min']:.2f}",
            f"{100 * r['real']:.1f}",
        ]
        for r in found["budgets"]
    ]
    return text + "\n" + table("Token budgets", ["budget", "used %", "least %", "real %"], rows)


def _shared_table(found: Result) -> str:
    rows = [
        [
            r["mix"],
            number(r["positions"], 5),
            f"{r['shared_pairs_per_s']:.3f}",
            f"{r['separate_pairs_per_s']:.3f}",
            f"{r['ratio']:.3f}",
            f"{r['predicted']:.3f}",
            f"{r['predicted_by_flops']:.3f}",
        ]
        for r in found["rows"]
    ]
    heads = ["mix", "positions", "shared pairs/s", "separate pairs/s", "ratio"]
    heads += ["tokens predict", "FLOPs predict"]
    return table("Three questions about a clip", heads, rows)


def _mfu_table(found: Result) -> str:
    rows = []
    for r in found["rows"]:
        if "failed" in r:
            rows.append([f"{r['positions']:,}", r["failed"], *[""] * 6])
            continue
        rows.append(
            [
                f"{r['positions']:,}",
                f"{r['tflop']:.3f}",
                f"{r['seconds']:.3f}",
                number(r["tflops"]),
                number(r["matmul_tflops"]),
                f"{100 * r['mfu']:.1f}",
                f"{100 * r['plain_mfu']:.1f}",
                f"{r['ours_to_plain']:.3f}",
            ]
        )
    heads = ["positions", "TFLOP", "s", "TFLOP/s", "matmul TFLOP/s", "MFU %", "plain MFU %"]
    return table("Forward and backward", [*heads, "ours / plain"], rows)


def _memory_table(found: Result) -> str:
    rows = []
    for r in found["rows"]:
        how = "checkpointed" if r["checkpointed"] else "plain"
        if "failed" in r:
            rows.append([how, r["failed"], "", "", ""])
            continue
        sizes = [f"{r['peak_gib']:.2f}", f"{r['weights_gib']:.2f}"]
        rows.append([how, *sizes, str(r["positions"]), f"{r['step_s']:.2f}"])
    heads = ["activations", "peak GiB", "weights GiB", "positions", "step s"]
    return table("Memory, one clip", heads, rows)


def _execution_table(found: Result) -> str:
    rows = []
    for r in found["rows"]:
        if "failed" in r:
            rows.append([r["budget"], r["how"], r["failed"], *[""] * 8])
            continue
        rows.append(
            [
                r["budget"],
                r["how"],
                f"{r['step_s']:.3f}",
                f"{r['samples_per_s']:.2f}",
                f"{r['tflops']:.0f}",
                f"{r['matmul_tflops']:.0f}",
                f"{100 * r['mfu']:.1f}",
                f"{r['peak_gib']:.1f}",
                f"{r['hours_1']:.1f}",
                f"{r['hours_4']:.1f}",
                f"{r['warm_up_s']:.0f}",
            ]
        )
    heads = ["step", "execution", "s", "samples/s", "TFLOP/s", "matmul TFLOP/s", "MFU %"]
    heads += ["peak GiB", "h, 1 GPU", "h, 4 GPUs", "first two steps s"]
    text = table("Optimizer steps from memory", heads, rows)
    return (
        text
        + f"\n\nHours are those of {found['n_samples']:,} samples; 4 GPUs: a quarter, if it were linear."
    )


_TABLES: dict[str, Callable[[Result], str]] = {
    "flops": _flops_table,
    "online": _online_table,
    "data": _data_table,
    "packing": _packing_table,
    "shared": _shared_table,
    "mfu": _mfu_table,
    "memory": _memory_table,
    "execution": _execution_table,
}

# ---------------------------------------------------------------- chart


def plot(found: Mapping[str, Result], path: Path) -> bool:
    """Save a chart of what was measured; False if no section has one."""
    from matplotlib.figure import Figure

    drawn = {
        "online": _plot_online,
        "packing": _plot_ratios,
        "mfu": _plot_mfu,
        "execution": _plot_execution,
    }
    parts = [name for name in drawn if name in found or (name == "packing" and "shared" in found)]
    if not parts:
        return False
    heights = [0.9 + 0.34 * _n_bars(found, name) for name in parts]
    figure = Figure(figsize=(10, sum(heights) + 0.4 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, name in zip(panels, parts, strict=True):
        drawn[name](panel, found)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
        panel.title.set_fontsize(10.5)
    figure.savefig(path, dpi=150)
    return True


def _n_bars(found: Mapping[str, Result], name: str) -> int:
    if name == "online":
        return len(found["online"]["rows"])
    if name == "packing":
        return 2 * len(_ratios(found))
    if name == "mfu":
        return 2 * len(found["mfu"]["rows"])
    return len([row for row in found["execution"]["rows"] if "samples_per_s" in row])


def _plot_online(panel: Any, found: Mapping[str, Result]) -> None:
    """Draw step times, the part of the language model apart."""
    rows = found["online"]["rows"]
    names = [row["variant"] for row in rows]
    times = [row["step_s"] for row in rows]
    cached = next(row["step_s"] for row in rows if row["variant"] == "all cached")
    rest = [max(0.0, t - cached) for t in times]
    panel.barh(names, [cached] * len(rows), color=ACCENT, height=0.66, label="cached step")
    panel.barh(
        names, rest, left=cached, color=GREY, height=0.66, label="decoding and encoders in the loop"
    )
    for place, (row, seconds) in enumerate(zip(rows, times, strict=True)):
        text = f" {seconds:.3g} s"
        if row["variant"] != "all cached":
            text += f"   {row['ratio']:.2f} x cached; FLOPs say {row['predicted']:.2f} x"
        panel.annotate(text, (seconds, place), va="center", fontsize=9)
    panel.set_xlim(0, max(times) * 1.75)
    panel.invert_yaxis()
    panel.set(xlabel="seconds per step (one clip)", title="A step, by what is cached")
    panel.legend(fontsize=8, frameon=False, loc="lower right")


def _ratios(found: Mapping[str, Result]) -> list[tuple[str, float, float]]:
    rows = []
    if "packing" in found:
        one = found["packing"]
        rows.append(
            (f"packed / padded rows\n({one['n_clips']} clips)", one["ratio"], one["predicted"])
        )
    for mix in found.get("shared", {}).get("rows", ()):
        label = f"3 questions, shared prefix /\nseparate ({mix['mix']})"
        rows.append((label, mix["ratio"], mix["predicted"]))
    return rows


def _plot_ratios(panel: Any, found: Mapping[str, Result]) -> None:
    """Draw how many times as fast, measured and predicted."""
    rows = _ratios(found)
    for place, (_, measured, predicted) in enumerate(rows):
        for offset, value, colour, label in (
            (-0.2, measured, ACCENT, "measured"),
            (0.2, predicted, PALE, "what the positions predict"),
        ):
            panel.barh(
                place + offset,
                value,
                color=colour,
                height=0.36,
                label=label if place == 0 else None,
            )
            panel.annotate(f" {value:.2f}", (value, place + offset), va="center", fontsize=9)
    panel.set_yticks(range(len(rows)), [row[0] for row in rows], fontsize=9)
    panel.invert_yaxis()
    panel.axvline(1, color="#555555", linewidth=0.8)
    panel.set_xlim(0, max(max(m, p) for _, m, p in rows) * 1.45)
    panel.set(xlabel="times as many samples per second", title="Packing and shared prefixes")
    panel.legend(fontsize=8, frameon=False, loc="upper right")


def _plot_mfu(panel: Any, found: Mapping[str, Result]) -> None:
    """Draw the share of a matrix product's speed."""
    rows = found["mfu"]["rows"]
    for place, row in enumerate(rows):
        for offset, key, colour, label in (
            (-0.2, "mfu", ACCENT, "emocache, packed"),
            (0.2, "plain_mfu", GREY, "transformers + peft alone"),
        ):
            if row.get(key) is None:
                continue
            panel.barh(
                place + offset,
                row[key],
                color=colour,
                height=0.36,
                label=label if place == 0 else None,
            )
            panel.annotate(f" {row[key]:.2f}", (row[key], place + offset), va="center", fontsize=9)
    panel.set_yticks(range(len(rows)), [f"{row['positions']:,} positions" for row in rows])
    panel.invert_yaxis()
    panel.axvline(0.75, color="#555555", linestyle="--", linewidth=0.9, label="goal")
    panel.set_xlim(0, 1.35)
    panel.set(
        xlabel="model FLOP/s / FLOP/s of a large matrix product",
        title="Forward and backward through the frozen language model with LoRA",
    )
    panel.legend(fontsize=8, frameon=False, loc="center right")


def _plot_execution(panel: Any, found: Mapping[str, Result]) -> None:
    """Draw samples per second by way of execution."""
    rows = [row for row in found["execution"]["rows"] if "samples_per_s" in row]
    labels = [f"{row['budget']}, {row['how']}" for row in rows]
    rates = [row["samples_per_s"] for row in rows]
    panel.barh(labels, rates, color=ACCENT, height=0.66)
    for place, row in enumerate(rows):
        text = (
            f" {row['samples_per_s']:.3g}/s, {row['tflops']:.0f} TFLOP/s, {row['peak_gib']:.0f} GiB"
        )
        panel.annotate(text, (row["samples_per_s"], place), va="center", fontsize=9)
    panel.set_xlim(0, max(rates) * 1.45)
    panel.invert_yaxis()
    panel.set(xlabel="samples per second", title="Ways of execution")
