"""`benchmarks/sweep.py` from end to end, at a size that shows that it runs and no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def run(work: Path, *arguments: str) -> tuple[str, dict[str, object]]:
    """Run the benchmark; return its tables and what it saved."""
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "sweep.py"),
        "--work",
        str(work),
        "--quick",
    ]
    done = subprocess.run(
        [*command, "--json", str(work / "found.json"), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, object] = json.loads((work / "found.json").read_text())
    return done.stdout, found


def test_full_size_is_counted(tmp_path: Path) -> None:
    plot = tmp_path / "reuse.svg"
    text, found = run(tmp_path, "--only", "predicted,shipped", "--plot", str(plot))
    assert "Predicted: 20 runs, 500 clips" in text
    predicted = found["predicted"]
    assert isinstance(predicted, dict)
    ways = predicted["ways"]
    # 9 rows of one input, 6 of two, 3 + 1 of three and the predecessor's of four; 11 distinct ones.
    assert ways["alone"]["n_encodings"] == 500 * (9 + 6 * 2 + 4 * 3 + 4)
    assert ways["together"]["n_encodings"] == 500 * 11
    assert "| table9 " in text
    assert plot.read_text().count("<svg") == 1


def test_both_ways_store_the_same_bits(tmp_path: Path) -> None:
    text, found = run(tmp_path, "--only", "measured", "--sweep", "figure3a")
    measured = found["measured"]
    assert isinstance(measured, dict)
    assert measured["same_tokens"]
    assert measured["n_encodings"] == {"alone": 4 * 3 * 108, "together": 3 * 108}
    assert measured["planned"] == measured["n_encodings"]
    assert "Both ways store the same bits" in text
