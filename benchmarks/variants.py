"""Two ablations of the paper in small: the order of learning, and the variants of pre-fusion.

    python benchmarks/variants.py --out DIR [--seeds 1 2 3] [--steps 40] [--n-clips 480] [--jobs 2]

Every variant is trained on the demo corpus once per seed, from one store, and scored on the split
`test`; DIR gets `variants.md`, `variants.json` and `variants.svg`. What an earlier call made is
continued: the corpus, the store, and each run in the folder of its own. The demo corpus with all of
its clips and steps is solved by all variants, so training gets few clips, some with wrong labels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Literal, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cache.clip import Description, Record  # noqa: E402
from cache.files import write_aside, write_text_aside  # noqa: E402
from cache.manifest import Manifest, media_root, read_manifest, write_manifest  # noqa: E402
from cache.schema import Model  # noqa: E402
from extract.corpora.demo import EMOTIONS, describe  # noqa: E402
from train.config import FusionKind, Preset, configure  # noqa: E402
from train.presets import preset  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEEDS = (1, 2, 3)
STEPS = 40
"""Per stage of the curriculum; the demo takes 90."""
N_TRAIN = 120
"""Clips to train on, as many of each emotion; the demo corpus of 480 clips has 318."""
WRONG_LABELS = 0.2
"""Share of them whose label and description are those of another emotion."""

FONT_TYPE: Literal["path", "none"] = "path"
"""The figure stands alone, so its letters are drawn; `none` leaves them text."""

Metric = Literal["accuracy", "weighted_f1", "think_accuracy", "final_loss", "seconds"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    group: str
    name: str
    preset: str
    fusion: FusionKind

    def settings(self, seed: int, steps: int) -> Preset:
        """Return what is trained.

        Args:
            seed: Of weights, order and dropout.
            steps: Optimizer steps of a stage of the curriculum; other presets keep their proportion.
        """
        usual = preset("demo").stages[0].n_steps
        stages = preset(self.preset).stages
        return configure(
            preset(self.preset),
            [
                f"seed={seed}",
                f"model.fusion.kind={self.fusion}",
                *(f"stages.{i}.n_steps={s.n_steps * steps // usual}" for i, s in enumerate(stages)),
            ],
        )

    def folder(self, out: Path, seed: int, steps: int) -> Path:
        """Return the folder of a run; variants that are the same training share it."""
        return out / "runs" / f"{self.preset}-{self.fusion}-{steps}-steps-seed-{seed}"


ORDERS = {
    "demo": "curriculum: perception, then cognition",
    "demo-single-joint": "single joint training",
    "demo-perception-only": "perception only",
}
"""Preset -> its name in the table."""


def variants() -> tuple[Variant, ...]:
    """Return every row: the orders of learning, then each kind of pre-fusion."""
    usual = preset("demo").model.fusion.kind
    orders = (Variant("Order of learning", says, name, usual) for name, says in ORDERS.items())
    kinds = (Variant("Pre-fusion", kind, "demo", kind) for kind in get_args(FusionKind))
    return (*orders, *kinds)


# ------------------------------------------------------------------------ what is trained on


def harder(manifest: Manifest, n_train: int = N_TRAIN, wrong: float = WRONG_LABELS) -> Manifest:
    """Return the corpus with few training clips, some of them labelled wrongly; the rest as it is.

    Which clips is decided by their uids alone, so every variant and seed learns from the same.

    Args:
        manifest: The demo corpus.
        n_train: Training clips that remain, as many of each emotion.
        wrong: Share of them that get the label and description of another emotion.
    """
    labels = list(EMOTIONS)
    trained: dict[str, Record] = {}
    for label in labels:
        own = [r for r in manifest.select("train") if r.emotion == label]
        own = sorted(own, key=lambda r: hashlib.sha256(r.uid.encode()).digest())
        own = own[: n_train // len(labels)]
        others = [other for other in labels if other != label]
        for i, record in enumerate(own):
            if i < round(wrong * len(own)):
                other = others[i % len(others)]
                text = Description(kind="multimodal", text=describe(other))
                record = record.model_copy(update={"emotion": other, "descriptions": (text,)})
            trained[record.uid] = record
    records = tuple(
        trained.get(r.uid, r) for r in manifest.records if r.split != "train" or r.uid in trained
    )
    return Manifest(header=manifest.header, records=records)


def prepare(out: Path, n_clips: int) -> None:
    """Make the corpus, its store and the harder manifest, as far as they are not there yet."""
    from cache.store import TokenStore
    from extract import tiny
    from extract.corpora.demo import write_demo_corpus
    from extract.encoders.bank import EncoderBank
    from extract.index import index_folder
    from extract.plan import make_plan
    from extract.run import extract

    out.mkdir(parents=True, exist_ok=True)
    print(f"{n_clips} clips: making what is missing", flush=True)
    labels = write_demo_corpus(out / "corpus", n_clips=n_clips)
    path = out / "corpus.parquet"
    manifest, _ = index_folder(
        labels.parent / "media",
        path,
        labels_csv=labels,
        label_space=tuple(EMOTIONS),
        corpus="demo",
    )
    write_manifest(path, manifest)
    write_manifest(out / "harder.parquet", harder(manifest))
    store, usual = TokenStore.open_or_create(out / "store"), preset("demo")
    weights = {k: Path(tiny.__file__).parent / name for k, name in usual.bundled_weights.items()}
    bank = EncoderBank(usual.tokens.all(), weights)
    plan = make_plan(manifest.records, bank.specs, store)
    print(f"encoding {plan.n_missing} of {plan.n_clips} clips", flush=True)
    extract(plan, manifest.records, bank, store, media_root(manifest, path))


# ------------------------------------------------------------------------ one run


class Result(Model):
    """What came of one variant and seed. Scores are fractions."""

    variant: str
    seed: int
    accuracy: float
    """Six-way, of the task that asks for the emotion."""
    weighted_f1: float
    think_accuracy: float
    """Of the task that asks for reasoning before the emotion."""
    final_loss: float
    """Mean over the last logged steps, nats per answer token."""
    fusion_parameters: int
    """Trained in the pre-fusion module itself."""
    n_steps: int
    """Optimizer steps of all stages."""
    seconds: float
    """Of training alone."""


def run_one(variant: Variant, seed: int, steps: int, out: Path, n_threads: int) -> Result:
    """Train and score one variant with one seed, or read what is there of it."""
    import torch

    from cache.store import TokenStore
    from eval.evaluate import evaluate
    from eval.metrics import SingleLabelScores
    from eval.report.history import read_history
    from train.loop import train

    torch.set_num_threads(n_threads)
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)  # peft's
    settings, folder = variant.settings(seed, steps), variant.folder(out, seed, steps)
    path = out / "harder.parquet"
    manifest, store = read_manifest(path), TokenStore.open(out / "store")
    info = train(settings, manifest, path, store, folder).info
    scores = {}
    for task, max_new_tokens in (("emotion", 16), ("think", 160)):
        file = folder / f"eval-test-{task}" / "scores.json"
        if not file.is_file():
            evaluate(
                folder,
                manifest,
                store,
                split="test",
                task=task,
                batch_size=54,
                max_new_tokens=max_new_tokens,
            )
        found = json.loads(file.read_text(encoding="utf-8"))
        scores[task] = SingleLabelScores.model_validate(found["all streams"])
    losses = [row.loss for row in read_history(folder / "metrics.jsonl") if row.loss is not None]
    return Result(
        variant=variant.name,
        seed=seed,
        accuracy=scores["emotion"].accuracy,
        weighted_f1=scores["emotion"].weighted_f1,
        think_accuracy=scores["think"].accuracy,
        final_loss=losses[-1],
        fusion_parameters=info.trainable.get("fusion", 0),
        n_steps=sum(stage.n_steps for stage in settings.stages),
        seconds=sum(info.seconds.values()),
    )


def run_all(
    rows: Sequence[Variant], seeds: Sequence[int], steps: int, out: Path, n_jobs: int
) -> list[Result]:
    """Run every variant with every seed, `n_jobs` at a time; runs that variants share, once."""
    n_threads = max(1, (os.cpu_count() or 1) // n_jobs)
    wanted = [(row, seed) for seed in seeds for row in rows]
    jobs = {row.folder(out, seed, steps): (row, seed) for row, seed in reversed(wanted)}
    found: dict[Path, Result] = {}
    with ProcessPoolExecutor(n_jobs, get_context("spawn")) as pool:
        futures = {
            pool.submit(run_one, row, seed, steps, out, n_threads): folder
            for folder, (row, seed) in reversed(jobs.items())
        }
        for future in as_completed(futures):
            folder = futures[future]
            try:
                found[folder] = result = future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # else all others would still run
                raise
            print(
                f"{len(found):>3} of {len(jobs)}  {folder.name:<52} accuracy "
                f"{result.accuracy:.3f}, think {result.think_accuracy:.3f}, {result.seconds:.0f} s",
                flush=True,
            )
    return [
        found[row.folder(out, seed, steps)].model_copy(update={"variant": row.name})
        for row, seed in wanted
    ]


# ------------------------------------------------------------------------ what is written


class Summary(Model):
    """A number over the seeds."""

    mean: float
    std: float | None
    """Of a sample, that is with n - 1 below the line; None of a single seed."""
    values: tuple[float, ...]
    """By seed, in the order of the seeds."""


class Row(Model):
    """One variant, over its seeds."""

    group: str
    variant: str
    n_steps: int
    fusion_parameters: int
    trained_on_think: bool
    """False: it was never asked for reasoning before it was scored on it."""
    metrics: dict[Metric, Summary]


def summarize(values: Sequence[float]) -> Summary:
    """Return mean and standard deviation."""
    std = stdev(values) if len(values) > 1 else None
    return Summary(mean=fmean(values), std=std, values=tuple(values))


def summarize_all(rows: Sequence[Variant], results: Sequence[Result]) -> list[Row]:
    """Return a row per variant, in order."""
    found = []
    for variant in rows:
        own = [result for result in results if result.variant == variant.name]
        stages = preset(variant.preset).stages
        found.append(
            Row(
                group=variant.group,
                variant=variant.name,
                n_steps=own[0].n_steps,
                fusion_parameters=own[0].fusion_parameters,
                trained_on_think=any("think" in stage.tasks for stage in stages),
                metrics={name: summarize([getattr(r, name) for r in own]) for name in METRICS},
            )
        )
    return found


def shown(summary: Summary, form: str = ".2f", scale: float = 1) -> str:
    """Return `mean ± std`."""
    text = f"{scale * summary.mean:{form}}"
    return text if summary.std is None else f"{text} ± {scale * summary.std:{form}}"


def table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown: scores in percent."""
    lines = [
        "| variant | accuracy, % | weighted F1, % | think, % | last loss | steps "
        "| fusion parameters | training, s |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    group = None
    for row in rows:
        if row.group != group:
            lines.append(f"| **{row.group}** | | | | | | | |")
            group = row.group
        m = row.metrics
        think = shown(m["think_accuracy"], scale=100)
        cells = (
            row.variant,
            shown(m["accuracy"], scale=100),
            shown(m["weighted_f1"], scale=100),
            think if row.trained_on_think else f"({think})",
            shown(m["final_loss"], ".3f"),
            f"{row.n_steps}",
            f"{row.fusion_parameters:,}",
            shown(m["seconds"], ".0f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(rows: Sequence[Row], seeds: Sequence[int], manifest: Manifest, steps: int) -> str:
    """Return the whole Markdown page."""
    n_train, n_test = (manifest.splits.get(split, 0) for split in ("train", "test"))
    over = f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    return f"""# Variants on the demo corpus

This shows that the machinery compares variants: presets, overrides, seeds, one store for all. It is **no
claim about the paper**: drawn faces, synthetic voices and a language model of under a million parameters
cannot tell which variant is better on people. Differences below the standard deviation are chance, and
a standard deviation of {len(seeds)} values is itself uncertain.

Mean ± standard deviation over {over}; {n_train} training clips, {100 * WRONG_LABELS:g} % of them with
the label and description of another emotion, {steps} optimizer steps per stage of the curriculum; scored on
{n_test} test clips with true labels. One test clip is {100 / n_test:.2f} points;
chance is {100 / len(EMOTIONS):.2f} %.

![Accuracy by variant: a point per seed, a bar at the mean](variants.svg)

{table(rows)}

- *think*: accuracy of the emotion that is named after reasoning; in brackets where training never asked for
  reasoning.
- *last loss*: training loss per answer token at the end, in nats. Reasoning has many words that are easy to
  foresee, so it compares only variants whose last stage has the same tasks.
- Single joint training takes as many steps as both stages of the curriculum, perception only half of them.
- The curriculum and `{preset("demo").model.fusion.kind}` are the same runs.
- *training*: wall time of the processes that finished the stages, with other runs at their side.
"""


def draw(rows: Sequence[Row], path: Path) -> None:
    """Save the figure: for both tasks a point per seed and a bar at the mean, by variant."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from eval.figures import PAPER, settings_of

    with rc_context({**settings_of(PAPER, "variants"), "svg.fonttype": FONT_TYPE}):
        places, heads = _places(rows)
        figure = Figure(figsize=(10, 0.8 + 0.34 * max(places)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        _panel(panels[0], rows, places, "accuracy", "emotion: accuracy, %")
        _panel(panels[1], rows, places, "think_accuracy", "think: accuracy, %")
        panels[0].set_yticks(places, [row.variant for row in rows])
        panels[0].set_ylim(max(places) + 0.7, -0.6)
        for place, head in heads.items():
            panels[0].annotate(
                head,
                (0, place),
                xycoords=("axes fraction", "data"),
                xytext=(-3.5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                color=PAPER.muted,
                annotation_clip=False,
            )
        for axes in panels:
            axes.grid(axis="x", color=PAPER.rule, lw=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(color=PAPER.rule)
            axes.tick_params(axis="y", length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color(PAPER.rule)
        with write_aside(path) as aside:
            figure.savefig(aside, format="svg", facecolor=PAPER.ground, metadata={"Date": None})


def _places(rows: Sequence[Row]) -> tuple[list[int], Mapping[int, str]]:
    """Return the line of each variant, and of the head above each group, from the top."""
    places: list[int] = []
    heads: dict[int, str] = {}
    line = 0
    for i, row in enumerate(rows):
        if i == 0 or row.group != rows[i - 1].group:
            heads[line] = row.group
            line += 1
        places.append(line)
        line += 1
    return places, heads


def _panel(
    axes: Axes, rows: Sequence[Row], places: Sequence[int], metric: Metric, label: str
) -> None:
    from eval.figures import PAPER

    for row, place in zip(rows, places, strict=True):
        summary = row.metrics[metric]
        if metric == "think_accuracy" and not row.trained_on_think:
            # It would push all others into a corner.
            axes.annotate(
                f"{100 * summary.mean:.1f}, never trained on reasoning",
                (0.02, place),
                xycoords=("axes fraction", "data"),
                va="center",
                color=PAPER.muted,
                fontsize=9,
                bbox={"facecolor": PAPER.ground, "lw": 0, "pad": 2},
            )
            continue
        values = [100 * value for value in summary.values]
        axes.plot([100 * summary.mean] * 2, [place - 0.3, place + 0.3], color=PAPER.warn, lw=2.2)
        axes.plot(values, [place] * len(values), "o", color=PAPER.accent, ms=6, alpha=0.65, mew=0)
    axes.margins(x=0.08)
    axes.set_xlabel(label)


def write(
    out: Path, rows: Sequence[Row], seeds: Sequence[int], manifest: Manifest, steps: int
) -> None:
    """Write the page, its numbers and its figure."""
    found = {
        "seeds": list(seeds),
        "steps": steps,
        "n_train": manifest.splits.get("train", 0),
        "n_test": manifest.splits.get("test", 0),
        "wrong_labels": WRONG_LABELS,
        "rows": [row.model_dump(mode="json") for row in rows],
    }
    write_text_aside(out / "variants.json", json.dumps(found, indent=2) + "\n")
    write_text_aside(out / "variants.md", page(rows, seeds, manifest, steps))
    draw(rows, out / "variants.svg")


def main() -> None:
    """Make the corpus, train and score every variant, write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of everything it makes")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument(
        "--steps", type=int, default=STEPS, help="per stage of the curriculum (%(default)s)"
    )
    parser.add_argument("--n-clips", type=int, default=480, help="of the corpus (%(default)s)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (%(default)s)"
    )
    arguments = parser.parse_args()
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.steps, arguments.jobs) < 1:
        parser.error("give each seed once, and at least one step and one job")
    out, rows = arguments.out, variants()
    prepare(out, arguments.n_clips)
    results = run_all(rows, arguments.seeds, arguments.steps, out, arguments.jobs)
    manifest = read_manifest(out / "harder.parquet")
    summary = summarize_all(rows, results)
    write(out, summary, arguments.seeds, manifest, arguments.steps)
    print(table(summary))
    print(out / "variants.md")


if __name__ == "__main__":
    main()
