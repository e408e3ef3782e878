"""Every shipped sweep at demo scale, all rows, from clips to the table; fewer steps change no row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import emocache
from cache.commit import Status
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.sweep.file import read_sweep, shipped
from eval.sweep.rows import rows_of, trials_of
from eval.sweep.scale import N_CLIPS

N_STEPS = 3

ENCODED = {
    "figure3a": {"audio": 1, "image": 1, "video": 1},
    "figure3b": {"audio": 1, "image": 1, "video": 1},
    "figure3c": {"audio": 1, "image": 1, "video": 1},
    "released": {"audio": 2, "image": 2, "video": 4},
    "table7": {"audio": 1, "image": 1, "video": 1},
    "table8": {"audio": 1, "image": 1, "video": 1},
    "table9": {"audio": 1, "image": 1, "video": 1},
    "table10": {"audio": 1, "image": 1, "video": 1},
    "table11": {"audio": 2, "image": 3, "video": 6},
    "v1-data-ratio": {"audio": 1, "image": 1, "video": 2},
    "v1-encoders": {"audio": 1, "image": 1, "video": 2},
    "v1-instructions": {"audio": 1, "image": 1, "video": 2},
    "v1-learning-rate": {"audio": 1, "image": 1, "video": 2},
}
"""Token tensors of each stream that all rows together need: counted by hand from the tables. Table 11 has
Whisper and HuBERT; EVA, MAE and CLIP on the image; VideoMAE, VideoMAE v2, EVA and CLIP on the video, and the
predecessor's two on faces."""
N_RUNS = {"table8": 2, "table10": 2, "v1-instructions": 2}
"""Where rows share a training; elsewhere each row has its own, with each of its seeds."""


def _quickened(name: str, folder: Path) -> Path:
    """Write a shipped sweep with few steps per stage; return the file."""
    fields: dict[str, Any] = yaml.safe_load(shipped()[name].read_text(encoding="utf-8"))
    sweep = read_sweep(name)
    n_stages = min(len(t.preset.stages) for t in trials_of(sweep, rows_of(sweep), "demo"))
    quick = {f"stages.{number}.n_steps": N_STEPS for number in range(n_stages)}
    fields["demo"] = {**fields.get("demo", {}), **quick}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path


def _encoded(store: TokenStore) -> Counter[str]:
    """Count specs by stream, each of which must hold every clip once, and nothing that failed."""
    found: Counter[str] = Counter()
    for spec in store.specs.values():
        _check_complete(store, spec)
        found[spec.stream] += 1
    return found


def _check_complete(store: TokenStore, spec: TokenSpec) -> None:
    statuses = store.index(spec).counts()
    assert statuses.total() == N_CLIPS
    assert not statuses[Status.FAILED]


def test_the_expectations_cover_what_ships() -> None:
    assert set(ENCODED) == set(shipped())


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ENCODED))
def test_it_goes_through_and_encodes_each_thing_once(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", str(_quickened(name, tmp_path)), "--scale", "demo", "--out", str(out)]
    assert emocache.main([*arguments, "--jobs", "1"]) == 0
    table = json.loads((out / "table.json").read_text())
    rows = table["rows"]
    assert len(rows) == len({row["name"] for row in rows})
    for row in rows:
        assert row["scores"], row["name"]
        assert all(0 <= score["mean"] <= 1 for score in row["scores"].values()), row["name"]
    results = [json.loads(path.read_text()) for path in out.glob("trials/*/result.json")]
    assert {result["status"] for result in results} == {"ok"}
    n_trials = sum(len(row["seeds"]) for row in rows)
    assert len(results) == n_trials
    assert len({result["run_key"] for result in results}) == N_RUNS.get(name, n_trials)
    assert _encoded(TokenStore.open(str(out / "store"))) == ENCODED[name]
    before = (out / "table.json").read_bytes()
    assert emocache.main(arguments) == 0
    assert (out / "table.json").read_bytes() == before
