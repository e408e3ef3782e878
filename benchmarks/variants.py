"""Training schemes and pre-fusion variants side by side on the demo corpus, over several seeds.

    python benchmarks/variants.py --out runs/variants            # about 15 minutes on two idle cores

The clips are generated and the networks tiny: what this shows is that every variant trains, scores and
repeats by the same machinery. It says nothing about which of them is better on real data.
Runs that exist are continued, so an interrupted table goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, get_args

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cache.manifest import Manifest, read_manifest  # noqa: E402
from cache.store import TokenStore  # noqa: E402
from train.config import FusionKind, Preset, configure  # noqa: E402
from train.presets import preset as preset_of  # noqa: E402

SCHEMES = ("demo-perception-only", "demo-single-joint", "demo")
"""Table 10 of the paper: perception alone, both together from the start, perception to cognition."""
MEASURES = ("accuracy", "accuracy_without_audio", "accuracy_of_think", "loss", "fusion_parameters")


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    group: str
    name: str
    preset: str
    overrides: tuple[str, ...] = ()


def variants() -> list[Variant]:
    """Return the rows: schemes with the paper's fusion, then every fusion with the curriculum."""
    schemes = [Variant("scheme", name.removeprefix("demo-"), name) for name in SCHEMES]
    schemes[-1] = Variant("scheme", "curriculum", "demo")
    fusions = [
        Variant("pre-fusion", kind, "demo", (f"model.fusion.kind={kind}",))
        for kind in get_args(FusionKind)
    ]
    return [*schemes, *fusions]


def shortened(variant: Variant, seed: int, n_steps: int) -> Preset:
    """Return a variant's configuration with `n_steps` for each stage of the curriculum."""
    made = configure(preset_of(variant.preset), [*variant.overrides, f"seed={seed}"])
    is_joint = variant.preset.endswith("single-joint")
    per_stage = 2 * n_steps if is_joint else n_steps  # as long as both stages of the curriculum
    stages = tuple(s.model_copy(update={"n_steps": per_stage}) for s in made.stages)
    return made.model_copy(update={"stages": stages})


def measure(
    preset: Preset, manifest: Manifest, manifest_path: Path, store: TokenStore, run: Path
) -> dict[str, float]:
    """Train and score one configuration, unless its result is there already."""
    from eval.evaluate import evaluate
    from train.loop import train

    result = run / "variant.json"
    if result.is_file():
        found: dict[str, float] = json.loads(result.read_text())
        return found
    trained = train(preset, manifest, manifest_path, store, run, device="cpu")
    scores = evaluate(run, manifest, store, split="test", masks=["audio"], max_new_tokens=8)
    thought = evaluate(run, manifest, store, split="test", task="think", max_new_tokens=80)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {
        "accuracy": scores.rows[0].scores.accuracy,
        "accuracy_without_audio": scores.rows[1].scores.accuracy,
        "accuracy_of_think": thought.rows[0].scores.accuracy,
        "loss": [row["loss"] for row in rows if "loss" in row][-1],
        "fusion_parameters": trained.info.trainable.get("fusion", 0),
    }
    result.write_text(json.dumps(found) + "\n")
    return found


def summary(results: Sequence[Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and sample standard deviation of each measure over the seeds."""
    return {
        name: (
            mean(r[name] for r in results),
            stdev(r[name] for r in results) if len(results) > 1 else 0.0,
        )
        for name in MEASURES
    }


def table(rows: Iterable[tuple[Variant, Mapping[str, tuple[float, float]]]], n_seeds: int) -> str:
    """Return the table in Markdown; scores in percent."""
    lines = [
        "| group | variant | accuracy % | without audio % | think accuracy % | last loss | fusion "
        "parameters |",
        "|---|---|---|---|---|---|---|",
    ]

    def percent(value: tuple[float, float]) -> str:
        return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"

    for variant, found in rows:
        scores = [percent(found[name]) for name in MEASURES[:3]]
        loss, spread = found["loss"]
        lines.append(
            f"| {variant.group} | {variant.name} | {' | '.join(scores)} | {loss:.3f} ± {spread:.3f} | "
            f"{found['fusion_parameters'][0]:,.0f} |"
        )
    lines.append(f"\nMean and standard deviation over {n_seeds} seeds.")
    return "\n".join(lines) + "\n"


def draw(results: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Draw the accuracies: a dot per seed, a bar at the mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.42 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(results)[::-1]
    for axis, name, title in zip(
        axes, ("accuracy", "accuracy_of_think"), ("recognition", "think, then answer"), strict=True
    ):
        for place, variant in enumerate(names):
            values = [100 * r[name] for r in results[variant]]
            axis.plot(values, [place] * len(values), "o", color="#0072b2", alpha=0.6, markersize=5)
            middle = mean(values)
            axis.plot([middle, middle], [place - 0.3, place + 0.3], color="#d55e00", linewidth=2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("accuracy on the test split, %")
        axis.set_yticks(range(len(names)), names)
        axis.grid(axis="x", color="#d5dae1", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Make the corpus, run every variant with every seed, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "variants")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=20, help="of each stage")
    arguments = parser.parse_args()
    from eval.demo import demo

    console = Console(stderr=True)
    folder = arguments.out / "demo"
    if not (folder / "corpus.parquet").is_file():
        demo(
            folder,
            console,
            console,
            n_clips=480,
            overrides=["stages.0.n_steps=2", "stages.1.n_steps=2"],
        )
    manifest_path = folder / "corpus.parquet"
    manifest, store = read_manifest(manifest_path), TokenStore.open(folder / "store")
    results: dict[Variant, list[dict[str, float]]] = {}
    for seed in arguments.seeds:
        for variant in variants():
            preset = shortened(variant, seed, arguments.steps)
            run = arguments.out / f"{variant.preset}-{preset.model.fusion.kind}-{seed}"
            found = measure(preset, manifest, manifest_path, store, run)
            results.setdefault(variant, []).append(found)
            console.print(f"{variant.group} {variant.name}, seed {seed}: {found}", highlight=False)
    text = table(((v, summary(r)) for v, r in results.items()), len(arguments.seeds))
    (arguments.out / "variants.md").write_text(text)
    raw: dict[str, Any] = {f"{v.group}/{v.name}": r for v, r in results.items()}
    (arguments.out / "variants.json").write_text(json.dumps(raw, indent=2) + "\n")
    draw({f"{v.name}": r for v, r in results.items()}, arguments.out / "variants.svg")
    draw({f"{v.name}": r for v, r in results.items()}, arguments.out / "variants.png")
    print(text)


if __name__ == "__main__":
    main()
