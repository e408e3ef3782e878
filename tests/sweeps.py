"""What the tests of running sweeps share: a small sweep on made-up tokens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import emocache
from cache.clip import Record
from cache.manifest import Manifest, read_manifest, write_manifest

ROOT = Path(__file__).resolve().parents[1]

SWEEP = """\
name: small
title: A small sweep
preset: demo
baseline: base
set:
  bundled_weights: {}
  stages.0.n_steps: 3
  stages.1.n_steps: 2
  stages.0.optim.batch_size: 2
  stages.1.optim.batch_size: 2
  execution.save_every_steps: 1
  execution.n_workers: 0
scores:
  - {name: f1, heading: F1, kind: split, split: val}
rows:
  - {name: base}
  - {name: first-stage, stage: stage1}
  - {name: no-audio, set: {tokens.audio: null}}
"""
"""Three trials of two runs."""


class Small:
    """A corpus with its tokens, and a sweep on it."""

    def __init__(self, root: Path, corpus: tuple[Path, Path]) -> None:
        """Write the sweep file; a corpus is a manifest and a store, see `make_corpus`."""
        self.manifest, self.store = corpus
        self.file, self.out = root / "small.yaml", root / "out"
        self.write(SWEEP)

    def write(self, text: str) -> None:
        """Change the sweep file."""
        self.file.write_text(text)

    def with_records(self, records: Sequence[Record]) -> None:
        """Use a manifest of other records."""
        header = read_manifest(self.manifest).header
        self.manifest = self.file.with_name("changed.parquet")
        write_manifest(self.manifest, Manifest(header=header, records=tuple(records)))

    def arguments(self, *more: str, out: Path | None = None) -> list[str]:
        """Return the command line of the sweep."""
        return [
            "sweep", str(self.file), "--manifest", str(self.manifest), "--store", str(self.store),
            "--out", str(out or self.out), "--device", "cpu", *more,
        ]  # fmt: skip

    def run(self, *more: str, out: Path | None = None) -> int:
        """Run it in this process, which starts others; return the exit code."""
        return emocache.main(self.arguments(*more, out=out))

    def start(self, *more: str, out: Path | None = None) -> subprocess.Popen[str]:
        """Start it as a command of its own."""
        return start_command(self.arguments(*more, out=out))


def start_command(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start `emocache` with some arguments."""
    return subprocess.Popen(
        [sys.executable, "-m", "emocache", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
