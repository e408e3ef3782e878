"""Tables of `sweep.py`, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from train_report import Result, number, table


def measured_tables(found: Result) -> str:
    """Return what was measured, as Markdown."""
    alone, together, training = found["alone"], found["together"], found["training"]
    rows = [
        ["encodings of clips", *_both(found["n_encodings"], "{:,}")],
        ["GFLOP, counted", *_both(found["gflop"], "{:,.0f}")],
        ["encoding, CPU s", *_three(alone["cpu_s"], together["cpu_s"])],
        ["encoding, wall s", *_three(alone["wall_s"], together["wall_s"])],
        [
            f"encoding and training {found['n_runs']} runs, CPU s",
            *_three(alone["cpu_s"] + training["cpu_s"], together["cpu_s"] + training["cpu_s"]),
        ],
        [
            "the same, wall s",
            *_three(alone["wall_s"] + training["wall_s"], together["wall_s"] + training["wall_s"]),
        ],
    ]
    title = (
        f"Measured: {found['sweep']} at demo scale, {found['n_rows']} rows, {found['n_clips']} clips, "
        f"{found['n_specs']} specs"
    )
    text = table(title, ["", "without reuse", "with reuse", "ratio"], rows)
    same = "the same bits" if found["same_tokens"] else "DIFFERENT numbers"
    return (
        f"{text}\n\nPlanning took {found['planning']['wall_s']:.2f} s. Both ways store {same} "
        f"({found['n_compared']:,} encodings compared)."
    )


def _both(pair: Mapping[str, float], form: str) -> list[str]:
    a, b = pair["alone"], pair["together"]
    return [form.format(a), form.format(b), f"{a / b:.2f}"]


def _three(a: float, b: float) -> list[str]:
    return [f"{a:,.1f}", f"{b:,.1f}", f"{a / b:.2f}"]


def predicted_tables(found: Result) -> str:
    """Return what was reckoned, as Markdown."""
    heads = ["network", "TFLOP a clip", "CPU s a clip, one thread", "GFLOP/s"]
    per_clip = table(
        "A clip under each network, full size",
        heads,
        [
            [
                one["label"], f"{one['tflop']:.3f}", number(one["cpu_s"]),
                number(None if one["cpu_s"] is None else 1e3 * one["tflop"] / one["cpu_s"]),
            ]
            for one in found["encoders"].values()
        ],
    )  # fmt: skip
    base = found["ways"]["together"]
    names = {
        "alone": "every run its own", "equal": "equal specs shared", "together": "shared, with views"
    }  # fmt: skip
    ways = table(
        f"Predicted: {found['n_runs']} runs, {found['n_clips']:,} clips",
        ["", "encodings", "passes over clips", "EFLOP", "CPU days, one thread", "TB", "ratio", "CPU ratio"],
        [
            [
                names[way], f"{one['n_encodings']:,}", f"{one['n_decodings'] / found['n_clips']:.0f}",
                f"{one['flops'] / 1e18:.2f}",
                number(None if one["cpu_s"] is None else one["cpu_s"] / 86400),
                f"{one['n_bytes'] / 1e12:.2f}",
                f"{one['flops'] / base['flops']:.2f}",
                "" if one["cpu_s"] is None else f"{one['cpu_s'] / base['cpu_s']:.2f}",
            ]
            for way, one in found["ways"].items()
        ],
    )  # fmt: skip
    lines = [per_clip, ways, ""]
    if found["checked"] is not None:
        one, (first, second) = found["checked"], found["depths"]
        lines.append(
            f"The line through {first} and {second} blocks gives {one['line_s']:.2f} s for "
            f"{one['label']}, the whole network takes {one['whole_s']:.2f} s."
        )
    if found["decode_cpu_s"] is not None:
        lines.append(f"Decoding a real clip takes {found['decode_cpu_s']:.2f} CPU s.")
    training, alone = found["training_flops"], found["ways"]["alone"]["flops"]
    lines += [
        f"Training all runs: {training / 1e18:.1f} EFLOP ({found['n_draws']:,} clips drawn). The whole "
        f"table without scoring: {(alone + training) / 1e18:.1f} EFLOP without reuse, "
        f"{(base['flops'] + training) / 1e18:.1f} with it, ratio "
        f"{(alone + training) / (base['flops'] + training):.2f}.",
        f"All encoders in the training loop, where the released code has its image encoder: "
        f"{found['online_flops'] / 1e18:.1f} EFLOP of encoding, "
        f"{(found['online_flops'] + training) / (base['flops'] + training):.2f} times the whole.",
        f"Planning and counting took {found['planning']['wall_s']:.1f} s.",
    ]
    return "\n".join(lines)


def shipped_table(found: Result) -> str:
    """Return the counts of all shipped sweeps, as Markdown."""
    heads = ["sweep", "rows", "runs", "specs asked for", "encoded"]
    rows = [
        [
            one["sweep"], *(str(one[key]) for key in ("n_rows", "n_runs", "n_specs", "n_encoded")),
            *(f"{one[way]['flops'] / one['together']['flops']:.2f}" for way in ("alone", "equal")),
        ]
        for one in found["rows"]
    ]  # fmt: skip
    title = "Shipped sweeps at full size: operations of encoding next to those with reuse"
    return table(title, [*heads, "every run its own", "equal specs shared"], rows)
