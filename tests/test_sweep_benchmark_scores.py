"""Scores of a sweep on sets of MMEVerse-Bench, from tokens to the table, against scikit-learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score

import emocache
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from eval.predictions import Prediction, read_predictions
from eval.scoring.score import score_file
from tests.bench import bench_manifest, write_bench_store
from tests.wheel_tables import write_wheels

SWEEP = """\
name: bench
title: On sets of the bench
preset: demo
baseline: base
set:
  bundled_weights: {}
  data.corpora: [sims-v2]
  data.val_split: null
  stages.0.tasks: {recognition: 1.0}
  stages.0.n_steps: 30
  stages.0.optim.warmup_steps: 2
  stages.0.optim.batch_size: 4
  stages.1: null
  execution.n_workers: 0
scores:
  - {name: polarity, heading: Polarity, kind: benchmark, sets: [mosi, mosei]}
  - {name: several, heading: Several, kind: benchmark, sets: [caer, mosi, mer2024]}
rows:
  - {name: base}
  - {name: deaf, set: {tokens.audio: null, model.fusion.kind: none}}
"""
SETS = ("mosi", "mosei", "caer", "mer2024")
"""All that the columns average; mosi stands in both."""


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheels(tmp_path_factory.mktemp("tables") / "wheels")


@pytest.fixture(scope="module")
def out(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec], wheels: Path
) -> Path:
    """The folder of the sweep, run to its end on a part of the bench; those of CH-SIMS v2 are trained on."""
    root = tmp_path_factory.mktemp("bench")
    bench = bench_manifest(every=40)
    records = tuple(
        record.model_copy(update={"split": "train"})
        if record.corpus in ("dfew", "sims-v2")
        else record
        for record in bench.records
    )
    write_manifest(root / "bench.parquet", Manifest(header=bench.header, records=records))
    write_bench_store(root / "tokens", specs)
    (root / "bench.yaml").write_text(SWEEP)
    assert run_in(root, root / "out", wheels) == 0
    return root / "out"


def run_in(root: Path, out: Path, wheels: Path, *more: str) -> int:
    arguments = ["sweep", root / "bench.yaml", "--manifest", root / "bench.parquet", "--store",
                 root / "tokens", "--out", out, "--wheels", wheels, "--device", "cpu", *more]  # fmt: skip
    return emocache.main([str(one) for one in arguments])


def result_of(out: Path, row: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "trials" / f"{row}@42" / "result.json").read_text())
    return found


def replies_of(out: Path, row: str, name: str) -> list[Prediction]:
    place = out / result_of(out, row)["predictions"]["several"] / "predictions.jsonl"
    return [p for p in read_predictions(place) if p.benchmark == name]


def weighted_f1(replies: list[Prediction]) -> float:
    """Of a polarity set: clips whose truth is neutral do not count (reference, section 4)."""
    pairs = [(p.truth, p.reply.strip().lower()) for p in replies if p.truth != "neutral"]
    truths = [truth for truth, _ in pairs]
    said = [reply for _, reply in pairs]
    return float(
        f1_score(
            truths, said, labels=sorted({*map(str, truths)}), average="weighted", zero_division=0
        )
    )


def test_a_set_that_two_columns_average_is_asked_once(out: Path) -> None:
    for row in ("base", "deaf"):
        places = result_of(out, row)["predictions"]
        assert places["polarity"] == places["several"]
        (folder,) = (out / "trials" / f"{row}@42").glob("benchmark-*")
        found = read_predictions(folder / "predictions.jsonl")
        keys = [(p.uid, p.benchmark) for p in found]
        assert len(keys) == len({*keys})
        assert {p.benchmark for p in found} == {*SETS}


@pytest.mark.parametrize("row", ["base", "deaf"])
def test_scores_are_the_means_over_their_sets(out: Path, row: str, wheels: Path) -> None:
    scores = result_of(out, row)["scores"]
    assert min(scores.values()) > 0, "a model that is never right would test nothing here"
    polarity = {name: weighted_f1(replies_of(out, row, name)) for name in ("mosi", "mosei")}
    assert scores["polarity"] == pytest.approx(sum(polarity.values()) / 2)
    caer = replies_of(out, row, "caer")
    right = accuracy_score([p.truth for p in caer], [p.reply.strip().lower() for p in caer])
    place = out / result_of(out, row)["predictions"]["several"] / "predictions.jsonl"
    hits = score_file(place, task="mer2024", wheels=wheels).result.score
    assert scores["several"] == pytest.approx((right + polarity["mosi"] + hits) / 3)


def test_the_table_compares_the_rows_on_the_same_clips(out: Path) -> None:
    table = json.loads((out / "table.json").read_text())
    rows = {row["name"]: row for row in table["rows"]}
    for name in ("polarity", "several"):
        change = rows["deaf"]["changes"][name]
        means = [rows[row]["scores"][name]["mean"] for row in ("deaf", "base")]
        assert change["difference"] == pytest.approx(means[0] - means[1])
        assert change["n_items"] == rows["base"]["scores"][name]["n_items"]


def test_a_later_column_asks_the_sets_that_no_other_has(
    out: Path, tmp_path: Path, wheels: Path
) -> None:
    later = tmp_path / "out"
    shutil.copytree(out, later)
    for name in ("bench.parquet", "tokens"):
        (tmp_path / name).symlink_to(out.parent / name)
    third = "  - {name: later, heading: Later, kind: benchmark, sets: [meld-e, caer]}\n"
    (tmp_path / "bench.yaml").write_text(SWEEP.replace("rows:\n", third + "rows:\n"))
    assert run_in(tmp_path, later, wheels, "--extend", "--rows", "base") == 0
    before, now = result_of(out, "base"), result_of(later, "base")
    for field in ("scores", "predictions"):
        assert now[field] == {**before[field], "later": now[field]["later"]}
    asked = [
        {p.benchmark for p in read_predictions(folder / "predictions.jsonl")}
        for folder in (later / "trials" / "base@42").glob("benchmark-*")
        if (folder / "asked.json").exists()
    ]
    assert sorted(map(sorted, asked)) == [sorted(SETS), ["meld-e"]]
    place = later / now["predictions"]["later"] / "predictions.jsonl"
    caer = score_file(place, task="caer", wheels=wheels).result.score
    meld = score_file(place, task="meld-e", wheels=wheels).result.score
    assert now["scores"]["later"] == pytest.approx((caer + meld) / 2)
    assert caer == pytest.approx(
        accuracy_score(
            [p.truth for p in replies_of(out, "base", "caer")],
            [p.reply.strip().lower() for p in replies_of(out, "base", "caer")],
        )
    )
