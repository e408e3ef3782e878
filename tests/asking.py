"""What the tests of asking share with the processes that die in them; few imports, as each starts anew."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.manifest import Manifest, read_manifest
from cache.store import TokenStore
from eval.asking import journal
from eval.asking.ask import ask_benchmarks
from eval.generate import TrainedRun, load_run

SETS = ("meld-e", "meld-s", "mafw", "mafw-m", "iemocap", "ov-merd", "sims")
N_TOKENS = 6


def ask(
    trained: TrainedRun,
    bench: tuple[Manifest, TokenStore],
    out: Path,
    names: Sequence[str] = SETS,
    **more: Any,
) -> Path | None:
    """Ask about some sets, with short replies in small batches."""
    options = {"max_new_tokens": N_TOKENS, "batch_size": 4, **more}
    return ask_benchmarks(trained, bench[1], bench[0], names, out, **options)


def ask_and_die(
    run: Path, bench: Path, store: str, out: Path, at: int, shard: tuple[int, int]
) -> None:
    """Ask in this process, which dies when so many bytes were written, in the middle of a write."""
    real = os.write
    written = 0

    def write(descriptor: int, data: memoryview) -> int:
        nonlocal written
        n = real(descriptor, data[: max(0, at - written)])
        written += n
        if written >= at:
            os.kill(os.getpid(), 9)
        return n

    journal.os.write = write  # type: ignore[assignment]
    manifest = read_manifest(bench)
    trained = load_run(run, header=manifest.header)
    ask(trained, (manifest, TokenStore.open(store)), out, likelihoods=True, shard=shard)
