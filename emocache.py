"""emocache: the one command, a thin dispatcher. Heavy libraries are imported by the verb that needs them."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.logging import RichHandler
from typer.core import TyperGroup

from eval.verbs.annotate import annotate_app, annotate_worker_command
from eval.verbs.app import app_command
from eval.verbs.benchmark import benchmark_command
from eval.verbs.compare import compare_command
from eval.verbs.console import DONE, REFUSED, err, out, verb
from eval.verbs.corpus import corpus_app
from eval.verbs.extract import extract_app, extract_worker_command
from eval.verbs.index import index_command
from eval.verbs.judge import judge_app
from eval.verbs.predict import predict_command
from eval.verbs.run_options import DeviceOption, StageOption, WeightsOption
from eval.verbs.score import score_command
from eval.verbs.store import store_app
from eval.verbs.sweep import sweep_command
from eval.verbs.train import (
    ManifestOption,
    Overrides,
    StoreOption,
    WithOption,
    import_checkpoint_command,
    train_command,
)

logger = logging.getLogger("emocache")
VERBS = (
    "index", "corpus", "annotate", "annotate-worker", "extract", "extract-worker", "store", "train",
    "import-checkpoint", "show", "evaluate", "benchmark", "score", "judge", "compare", "sweep", "predict",
    "app", "demo",
)  # fmt: skip
"""In the order of the work; `emocache --help` shows them so."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order of the work, not of the alphabet."""
        return sorted(self.commands, key=VERBS.index)


app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Encode emotion clips once, then train and ablate from the cache.",
)
app.command("index")(index_command)
app.add_typer(corpus_app, name="corpus")
app.add_typer(extract_app, name="extract")
app.command("extract-worker")(extract_worker_command)
app.add_typer(annotate_app, name="annotate")
app.command("annotate-worker")(annotate_worker_command)
app.add_typer(store_app, name="store")
app.command("train")(train_command)
app.command("import-checkpoint")(import_checkpoint_command)
app.command("benchmark")(benchmark_command)
app.add_typer(judge_app, name="judge")
app.command("score")(score_command)
app.command("compare")(compare_command)
app.command("sweep")(sweep_command)
app.command("predict")(predict_command)
app.command("app")(app_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 findings, 2 refused, 130 stopped."""
    handler = RichHandler(console=err, show_time=False, show_path=False)
    handler.addFilter(_is_for_the_terminal)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    for noisy in ("httpx", "httpx2", "openai", "transformers", "numexpr", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # peft still asks transformers 5 by an old name; users can do nothing about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    # torch's waiting threads spin, which starves whoever shares the cores. Spinning briefly costs a
    # lone training of the demo on two cores a quarter of its speed (67 against 90 samples/s), and
    # gives two side by side four times more each (47 against 11).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(args=list(argv) if argv is not None else None, prog_name="emocache")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else REFUSED
    return DONE


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    """True unless a worker speaks of a unit: that is for log files; progress is shown otherwise."""
    return record.levelno >= logging.WARNING or not record.name.startswith("extract.")


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())


@app.command("show")
@verb
def show_command(
    preset: Annotated[
        str | None, typer.Argument(metavar="[PRESET]", help="Without one, all are listed.")
    ] = None,
    overrides: Overrides = None,
    with_file: WithOption = None,
) -> int:
    """Print the resolved configuration of a preset, as `--with` accepts it."""
    from eval.verbs.arguments import configure

    if preset is None:
        from eval.tables import preset_table

        out.print(preset_table())
        return DONE
    chosen = configure(preset, overrides, with_file)
    if out.is_terminal:
        out.print_json(chosen.model_dump_json())
    else:
        out.file.write(chosen.model_dump_json(indent=2) + "\n")
    return DONE


@app.command("evaluate")
@verb
def evaluate_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    manifest: ManifestOption,
    store: StoreOption,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="Which records to score.")] = "test",
    task: Annotated[
        str,
        typer.Option(
            help="emotion, sentiment, intent or multi-label; think, think-sentiment, ... for reasoning too."
        ),
    ] = "emotion",
    mask: Annotated[
        list[str] | None,
        typer.Option(help="Score also without: audio, video, image or picture. Repeatable."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 200,
    out_dir: Annotated[
        Path | None, typer.Option("--out", help="Default: RUN/eval-SPLIT-TASK.")
    ] = None,
    device: DeviceOption = "cpu",
    weights: WeightsOption = "final",
    stage: StageOption = None,
    likelihoods: Annotated[
        bool,
        typer.Option(
            "--likelihoods",
            help="Compute the probability of every offered label beside each reply.",
        ),
    ] = False,
    reading: Annotated[
        str,
        typer.Option(
            help="How a label is read in a reply: label (punctuation and aliases forgiven) or last-word "
            "(anything else is neutral, as Emotion-LLaMA's scorer does)."
        ),
    ] = "label",
    examples: Annotated[
        int, typer.Option(min=0, help="Clips that the report shows one by one.")
    ] = 24,
    reasoning: Annotated[
        bool, typer.Option("--reasoning", help="Ask about those clips for reasoning too.")
    ] = False,
) -> int:
    """Generate replies, score them, write predictions.jsonl and a report."""
    from cache.manifest import media_root, read_manifest
    from cache.store import TokenStore
    from eval.evaluate import evaluate
    from eval.progress import progress_bar
    from eval.report.page import score_table
    from eval.verbs.arguments import check_device, one_of_these

    records = read_manifest(manifest)
    check_device(device)
    n_records = len(records.select(split))
    n_replies = (n_records + (min(examples, n_records) if reasoning else 0)) * (1 + len(mask or []))
    with progress_bar(err, "evaluating", n_replies, "replies") as bar:
        result = evaluate(
            run_dir,
            records,
            TokenStore.open(store),
            split=split,
            task=task,
            masks=mask or [],
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            device=device,
            out=out_dir,
            overrides=overrides or [],
            weights=one_of_these("--weights", weights, ("final", "best")),
            stage=stage,
            likelihoods=likelihoods,
            reading=one_of_these("--reading", reading, ("label", "last-word")),
            n_examples=examples,
            reasoning_tokens=max_new_tokens if reasoning else 0,
            media=media_root(records, manifest),
            on_batch=bar.advance,
        )
    out.print(score_table(result.rows))
    for path in (result.predictions, *result.reports, result.report_md):
        out.print(str(path), highlight=False, soft_wrap=True)
    return DONE


@app.command("demo")
@verb
def demo_command(
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of everything it makes.")] = Path(
        "demo"
    ),
    n_clips: Annotated[int, typer.Option(min=12, help="Size of the generated corpus.")] = 480,
    overrides: Overrides = None,
) -> int:
    """Run the whole path on generated clips: media, tokens, two stages, scores, report."""
    from eval.demo import demo

    demo(out_dir, out, err, n_clips=n_clips, overrides=overrides or [])
    return DONE


if __name__ == "__main__":
    run()
