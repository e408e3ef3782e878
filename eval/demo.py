"""The main job from end to end on a generated corpus; what `make demo` runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cache.manifest import media_root, write_manifest
from cache.store import TokenStore
from eval.evaluate import Evaluation, evaluate
from eval.progress import progress_bar
from eval.report.page import score_table
from extract import tiny
from extract.corpora.demo import EMOTIONS, write_demo_corpus
from extract.encoders.bank import EncoderBank
from extract.index import index_folder
from extract.plan import make_plan
from extract.run import extract
from train.config import configure
from train.loop import train
from train.presets import demo as demo_preset

N_EXAMPLES = 12
"""Clips that the report shows one by one: two of each emotion."""
ABOUT = (
    "The clips are generated: a drawn face and a synthetic voice, each of which carries one half of the "
    "emotion. Two emotions share each look (surprised and fearful, angry and sad, happy and neutral) and two "
    "share each sound (happy and surprised, sad and neutral, angry and fearful), so that with one of the two "
    "masked nothing better than half of the clips can be expected; subtitles are drawn regardless of the "
    "emotion. The numbers show that the whole path works, and say nothing about real emotions.",
)
"""What the report says of the data."""


def demo(
    folder: Path,
    out: Console,
    err: Console,
    *,
    n_clips: int,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """Make a corpus, extract, train both stages, evaluate with and without each modality.

    Every step continues what an earlier call left: a second call encodes and trains nothing.

    Args:
        folder: Everything goes below it.
        out: Where results are printed.
        err: Where progress is shown.
        n_clips: Size of the corpus.
        overrides: `key=value` settings of the preset.
    """
    started = time.monotonic()
    preset = configure(demo_preset(), overrides)
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar(err, "generating clips", n_clips, "clips") as bar:
        labels = write_demo_corpus(folder / "corpus", n_clips=n_clips, on_clip=bar.advance)
    manifest_path = folder / "corpus.parquet"
    with progress_bar(err, "indexing", n_clips, "files") as bar:
        manifest, _ = index_folder(
            labels.parent / "media",
            manifest_path,
            labels_csv=labels,
            label_space=tuple(EMOTIONS),
            corpus="demo",
            on_file=lambda _: bar.advance(),
        )
    write_manifest(manifest_path, manifest)
    store = TokenStore.open_or_create(folder / "store")
    weights = {k: Path(tiny.__file__).parent / name for k, name in preset.bundled_weights.items()}
    bank = EncoderBank(preset.tokens.all(), weights)
    plan = make_plan(manifest.records, bank.specs, store)
    with progress_bar(err, "extracting", plan.n_missing, "clips") as bar:
        root = media_root(manifest, manifest_path)
        extract(plan, manifest.records, bank, store, root, on_clip=bar.advance)
    out.print(
        f"extracted {plan.n_missing} of {plan.n_clips} clips; "
        f"{plan.n_clips - plan.n_missing} were in the store already",
        highlight=False,
    )
    run = folder / "run"
    n_steps = sum(stage.n_steps for stage in preset.stages)
    with progress_bar(err, "training", n_steps, "steps") as bar:
        train(
            preset,
            manifest,
            manifest_path,
            store,
            run,
            on_step=lambda stage, step, n, latest: bar.advance(
                1, f"{stage} loss {latest['loss']:.3f}" if latest else stage
            ),
        )
    n_test = len(manifest.select("test"))
    n_replies = 3 * (n_test + min(N_EXAMPLES, n_test))
    with progress_bar(err, "evaluating", n_replies, "replies") as bar:
        result = evaluate(
            run,
            manifest,
            store,
            split="test",
            masks=("audio", "picture"),
            max_new_tokens=16,
            batch_size=32,
            likelihoods=True,
            n_examples=N_EXAMPLES,
            reasoning_tokens=100,
            media=root,
            about_data=ABOUT,
            on_batch=bar.advance,
        )
    out.print(score_table(result.rows))
    out.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
    for name, path in (("store", store.root), ("run", run), ("report", result.report_html)):
        out.print(f"{name:<7}{path}", highlight=False, soft_wrap=True)
    return result
