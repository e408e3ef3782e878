"""The whole bench: eighteen sets, from cached tokens by a model to scores and a page."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import emocache
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from eval.benchmarks import PROTOCOLS, benchmarks
from eval.predictions import Prediction, read_predictions, write_predictions
from tests.bench import (
    bench_manifest,
    records_of,
    released_rows,
    write_bench_store,
    write_rows,
)
from tests.wheel_tables import write_wheels
from train.config import configure
from train.loop import train
from train.presets import demo

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheels(tmp_path_factory.mktemp("tables") / "wheels")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]) -> Path:
    """A folder with a manifest of a part of the bench, its tokens, and a run of four steps."""
    root = tmp_path_factory.mktemp("bench")
    manifest = bench_manifest(every=200)
    write_manifest(root / "bench.parquet", manifest)
    store = write_bench_store(root / "tokens", specs)
    learnt = tuple(r.model_copy(update={"split": "train"}) for r in manifest.records[:40])
    chosen = configure(
        demo(),
        ["stages.0.tasks={recognition: 1.0}", "stages.1.tasks={recognition: 1.0}",
         "stages.0.n_steps=2", "stages.1.n_steps=2", "stages.0.optim.batch_size=2",
         "stages.1.optim.batch_size=2", "execution.log_every_steps=1"],
    )  # fmt: skip
    of_run = Manifest(header=manifest.header, records=learnt)
    write_manifest(root / "train.parquet", of_run)
    train(chosen, of_run, root / "train.parquet", store, root / "run")
    return root


def command(*arguments: object) -> int:
    return emocache.main([str(argument) for argument in arguments])


def ask(root: Path, wheels: Path, *more: object) -> int:
    return command(
        "benchmark", root / "run", "--manifest", root / "bench.parquet", "--store", root / "tokens",
        "--wheels", wheels, "--max-new-tokens", 4, *more,
    )  # fmt: skip


def test_a_run_is_asked_about_all_sets_and_laid_out(
    trained: Path, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all"
    # Two items a set are few: of MER2023 both are neutral, which no wheel scores.
    assert ask(trained, wheels, "--out", out, "--sample", 2, "--likelihoods") == 1
    shown = capsys.readouterr().out
    found = read_predictions(out / "predictions.jsonl")
    for name, row in benchmarks().items():
        own = [p for p in found if p.benchmark == name]
        assert len(own) == 2, name
        assert {p.task for p in own} == {row.task}
        if row.metric != "wheel-f" and row.field != "emotion_multi":
            assert all(set(p.likelihoods or {}) == set(row.options) for p in own), name
    scores = json.loads((out / "scores.json").read_text())
    assert {*scores["tasks"], *scores["unscored"]} == set(benchmarks())
    assert "truth on no wheel: neutral (2)" in scores["unscored"]["mer2023"]
    assert scores["averages"] == {}, "no average over some of the sets"
    for name, result in scores["tasks"].items():
        assert result["counts"]["offered"] == 2
        assert f"{benchmarks()[name].n:,}" in shown, "the published count stands beside it"
    page = (out / "benchmark.html").read_text(encoding="utf-8")
    assert "Emotion-LLaMAv2 (Stage 2)" in page
    assert page.count("<!DOCTYPE html>") + page.count("<!doctype html>") == 1


def test_two_parts_give_the_file_of_one(trained: Path, wheels: Path, tmp_path: Path) -> None:
    """A part that is not the last says so and scores nothing."""
    chosen = ["--task", "meld-e", "--task", "meld-s", "--task", "mc-eiu", "--batch-size", 3]
    assert ask(trained, wheels, "--out", tmp_path / "one", *chosen) == 0
    for part in range(2):
        assert not (tmp_path / "two" / "benchmark.html").exists()
        assert ask(trained, wheels, "--out", tmp_path / "two", *chosen, "--shard", f"{part}/2") == 0
    one, two = (read_predictions(tmp_path / n / "predictions.jsonl") for n in ("one", "two"))
    assert one == two
    assert (tmp_path / "two" / "benchmark.html").is_file(), "the last part scores"


def test_what_cannot_be_asked_is_refused_before_the_model_is_loaded(
    trained: Path, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("EMOCACHE_WHEELS", raising=False)
    base = ["benchmark", trained / "nowhere", "--manifest", trained / "bench.parquet",
            "--store", trained / "tokens"]  # fmt: skip
    cases = {
        ("--task", "dfww"): "Did you mean 'dfew'",
        ("--protocol", "papr"): "unknown protocol 'papr'",
        ("--shard", "4/4"): "not I/N with I from 0 to N-1",
        (): "need the emotion wheel tables",
        ("--device", "gpu"): "unknown device",
    }
    for more, said in cases.items():
        assert command(*base, *more) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    without = Manifest(
        header=bench_manifest(5000).header,
        records=tuple(r for r in bench_manifest(5000).records if r.corpus != "dfew"),
    )
    write_manifest(tmp_path / "m.parquet", without)
    assert command(*base[:3], tmp_path / "m.parquet", *base[4:], "--task", "dfew") == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "no record of the manifest counts for it" in shown
    assert "emocache index dfew" in shown


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_perfect_replies_score_one_hundred_everywhere(
    protocol: str, wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = list(records_of(every=20))
    for name, row in benchmarks().items():
        file = write_rows(tmp_path / f"{name}.jsonl", released_rows(row, records=records))
        code = command(
            "score", file, "--task", name, "--protocol", protocol, "--wheels", wheels, "--json"
        )
        assert code == 0
        found = json.loads(capsys.readouterr().out)
        assert found["score"] == 1.0, name
        assert found["counts"]["published"] == row.n
        scored, skipped = found["counts"]["scored"], found["counts"]["skipped"]
        assert (
            scored + skipped
            == found["counts"]["offered"]
            == sum(found["counts"]["reasons"].values()) + scored
        )


def perfect(every: int, *, wrong: float = 0.0) -> list[Prediction]:
    """Return replies to a part of the bench, of which a share names another label."""
    chance, found = random.Random(0), []
    for record in records_of(every):
        for name in record.benchmarks:
            row = benchmarks()[name]
            truths = record.labels_of(row.field)
            said = truths
            if chance.random() < wrong:
                said = (next(o for o in row.options if o not in truths),)
            several = row.field in ("emotion_multi", "emotion_ov")
            found.append(
                Prediction(
                    uid=record.uid, task=row.task, benchmark=name, split=record.split,
                    reply=", ".join(said), label=None if several else said[0],
                    labels=said if several else (), parse="exact",
                    truth=None if several else truths[0], truths=truths if several else (),
                    run="made", spec_ids={"audio": "a"},
                )
            )  # fmt: skip
    return found


@pytest.mark.slow
def test_the_whole_bench_of_36_133_items_is_scored_and_laid_out(
    wheels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write_predictions(tmp_path / "p.jsonl", perfect(1)) == 36_133
    code = command("score", tmp_path / "p.jsonl", "--task", "all", "--wheels", wheels, "--json",
                   "--report", tmp_path / "report")  # fmt: skip
    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["averages"] == {"avg-9": 1.0, "avg-18": 1.0}
    for name, result in document["tasks"].items():
        assert result["counts"]["offered"] == benchmarks()[name].n
    assert (tmp_path / "report" / "benchmark.html").stat().st_size < 15e6


def test_a_judged_result_is_laid_out_beside_the_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [r for r in records_of(every=300) if r.corpus == "dfew"]
    file = write_rows(tmp_path / "p.jsonl", released_rows(benchmarks()["dfew"], records=rows))
    told = [{"id": r.uid.partition("/")[2], "description": f"She is {r.emotion}."} for r in rows]
    references = write_rows(tmp_path / "r.jsonl", told)
    assert command("score", file, "--task", "dfew", "--judged", references) == 2
    assert "Give its folder too: --report DIR" in " ".join(capsys.readouterr().err.split())
    replies = [{"id": row["id"], "reply": row["description"]} for row in told]
    said = write_rows(tmp_path / "said.jsonl", replies)
    out = tmp_path / "judged"
    assert command("judge", "lexical", said, "--references", references, "--out", out) == 0
    report = tmp_path / "report"
    code = command(
        "score", file, "--task", "dfew", "--report", report, "--judged", out / "lexical.json"
    )
    assert code == 0
    assert "exical overlap" in (report / "benchmark.html").read_text(encoding="utf-8")
    assert command("score", file, "--task", "dfew", "--report", report, "--judged", file) == 2
