"""Pre-trains the two tiny encoders of the demo: `python -m extract.tiny.pretrain --out DIR`.

A tiny EVA and a tiny Whisper, of the architectures and in the file layouts of the real ones, learn
to read the continuous parameters of generated faces and voices. They see free combinations of
those parameters and never an emotion, so towards the demo corpus they are what the real encoders
are towards a real one: competent, general and frozen. A run takes about seven minutes
on two free cores and is reproducible for a seed and the library versions noted in the files.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import timm
import torch
import whisper
from safetensors.torch import save_file

from cache.files import write_aside
from extract.tiny.optimise import Recipe, Scores
from extract.tiny.pretrain_eva import pretrain_eva
from extract.tiny.pretrain_whisper import WHISPER_DIMS, pretrain_whisper

logger = logging.getLogger(__name__)

EVA_FILE, WHISPER_FILE = "eva_tiny.safetensors", "whisper_tiny.pt"


def provenance(recipe: Recipe) -> dict[str, str]:
    """Return what a checkpoint says of its making, as text values."""
    versions = {"torch": str(torch.__version__), "timm": timm.__version__, "numpy": np.__version__}
    return {
        "script": "python -m extract.tiny.pretrain",
        "trained_on": "generated faces and voices with free parameters; no emotion labels",
        **{name: str(value) for name, value in asdict(recipe).items()},
        **versions,
        "openai-whisper": whisper.__version__,
    }


def write_checkpoints(out_dir: Path, recipe: Recipe) -> tuple[Path, Path]:
    """Train both encoders side by side and write their checkpoints.

    Each has a process and a single thread of its own: sums are then taken in one order on every
    machine, and two small trainings share two cores best this way.

    Args:
        out_dir: Folder of the checkpoints; made if missing.
        recipe: How to train.

    Returns:
        Paths of the EVA and of the Whisper checkpoint.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_set_up) as pool:
        eva = pool.submit(write_eva, out_dir / EVA_FILE, recipe)
        audio = pool.submit(write_whisper, out_dir / WHISPER_FILE, recipe)
        return eva.result(), audio.result()


def write_eva(path: Path, recipe: Recipe) -> Path:
    """Train the tiny EVA and write it as safetensors with its provenance as metadata."""
    weights, scores = pretrain_eva(recipe)
    _log_scores(scores)
    with write_aside(path) as aside:
        save_file(weights, aside, metadata=provenance(recipe))
    return path


def write_whisper(path: Path, recipe: Recipe) -> Path:
    """Train the tiny Whisper and write it as `whisper.load_model` reads it, plus provenance."""
    weights, scores = pretrain_whisper(recipe)
    _log_scores(scores)
    with write_aside(path) as aside:
        torch.save(
            {
                "dims": asdict(WHISPER_DIMS),
                "model_state_dict": weights,
                "provenance": provenance(recipe),
            },
            aside,
        )
    return path


def _log_scores(scores: Scores) -> None:
    for name, score in scores.items():
        logger.info("held-out R^2 %-24s %.3f", name, score)


def _set_up() -> None:
    """Prepare a process of its own: one thread, logging to stderr."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Pre-train the tiny encoders of the demo.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the two checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    _set_up()
    for path in write_checkpoints(options.out, Recipe(seed=options.seed)):
        logger.info("%s: %d bytes", path.name, path.stat().st_size)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
