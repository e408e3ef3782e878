"""A sweep that gains scores: what is done stays, only what is missing is computed, nothing mixes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache.spec import TokenSpec
from eval.sweep.running.at_work import Telling
from eval.sweep.running.trial import _Asked
from eval.sweep.schema import ScoreColumn, TrialResult
from eval.sweep.state import (
    SWEEP_FILE,
    fail,
    forget_failures,
    read_begun,
    read_result,
    trial_folder,
    write_result,
)
from tests.sweep_results import reply
from tests.sweeps import SWEEP, Small
from tests.training import make_corpus

F1 = "  - {name: f1, heading: F1, kind: split, split: val}\n"
ACC = "  - {name: acc, heading: Accuracy, kind: split, split: val, metric: accuracy}\n"
TRAIN = "  - {name: train-f1, heading: Train F1, kind: split, split: train}\n"


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]
) -> tuple[Path, Path]:
    return make_corpus(tmp_path_factory.mktemp("corpus"), specs)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: tuple[Path, Path]) -> Small:
    found = Small(tmp_path_factory.mktemp("finished"), corpus)
    assert found.run() == 0
    return found


@pytest.fixture
def copy(finished: Small, tmp_path: Path, corpus: tuple[Path, Path]) -> Small:
    """A finished sweep to change."""
    found = Small(tmp_path, corpus)
    shutil.copytree(finished.out, found.out)
    return found


def with_scores(small: Small, *columns: str) -> None:
    small.write(SWEEP.replace(F1, "".join(columns)))


def result(small: Small, row: str = "base") -> TrialResult:
    found = read_result(small.out, f"{row}@42")
    assert found is not None
    return found


def said(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return " ".join((found.out + " " + found.err).split())


# ---------------------------------------------------------------------------- a score that fails


def test_a_score_that_cannot_be_computed_leaves_the_others(copy: Small) -> None:
    before = result(copy)
    (run,) = (copy.out / "runs" / before.run_key,)
    kept = {file: file.read_bytes() for file in (run / "stage2" / "final").glob("*.safetensors")}
    for file in kept:
        file.write_bytes(b"damaged")
    with_scores(copy, F1, TRAIN)
    assert copy.run("--extend") == 1
    failed = result(copy)
    assert (failed.status, failed.failed_step) == ("failed", "score")
    for field in ("scores", "predictions", "n_trainable", "spec_ids", "train_s", "score_s"):
        assert getattr(failed, field) == getattr(before, field), field
    assert {*result(copy, "first-stage").scores} == {"f1", "train-f1"}

    asked = copy.out / before.predictions["f1"]
    first_asked = asked.stat().st_mtime_ns
    for file, data in kept.items():
        file.write_bytes(data)
    assert copy.run("--retry-failed") == 0
    mended = result(copy)
    assert (mended.status, mended.failed_step, mended.reason) == ("ok", None, None)
    assert {*mended.scores} == {"f1", "train-f1"}
    assert mended.scores["f1"] == before.scores["f1"]
    assert asked.stat().st_mtime_ns == first_asked, "what was there is not asked again"


def failed_extension(copy: Small) -> None:
    """Leave the sweep as it is behind an extension by a score that failed in every trial."""
    with_scores(copy, F1, TRAIN)
    begun = read_begun(copy.out)
    column = ScoreColumn(name="train-f1", heading="Train F1", kind="split", split="train")
    scores = (*begun.sweep.scores, column)
    wider = begun.model_copy(update={"sweep": begun.sweep.model_copy(update={"scores": scores})})
    (copy.out / SWEEP_FILE).write_text(wider.model_dump_json())
    fail(copy.out, begun.trials, "score", "it rained")


def test_a_score_that_no_trial_has_can_be_taken_out_again(copy: Small) -> None:
    before = result(copy)
    failed_extension(copy)
    copy.write(SWEEP)
    assert copy.run() == 0
    assert result(copy) == before
    assert [column.name for column in read_begun(copy.out).sweep.scores] == ["f1"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("split: val}", "split: train}", "score f1, split: 'val' there, 'train' now"),
        ("name: f1,", "name: f2,", "score f1 is gone"),
    ],
)
def test_a_score_that_some_trial_has_stays(
    copy: Small, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    copy.write(SWEEP.replace(old, new))
    for more in ((), ("--extend",)):
        assert copy.run(*more) == 2
        assert words in said(capsys)


def test_trials_that_failed_with_scores_are_open_again_with_them(copy: Small) -> None:
    failed_extension(copy)
    before = result(copy)
    trials = read_begun(copy.out).trials
    forget_failures(copy.out, trials)
    assert result(copy) == before.model_copy(
        update={"status": "ok", "failed_step": None, "reason": None}
    )
    write_result(copy.out, before.model_copy(update={"scores": {}, "predictions": {}}))
    forget_failures(copy.out, trials)
    assert read_result(copy.out, "base@42") is None


# ---------------------------------------------------------------------------- only what is missing


def test_only_the_scores_that_are_missing_are_computed(copy: Small) -> None:
    """Replies that are there are read again for another metric; others are asked for."""
    before = result(copy)
    asked = copy.out / before.predictions["f1"]
    first_asked = asked.stat().st_mtime_ns
    with_scores(copy, F1, ACC, TRAIN)
    assert copy.run("--extend") == 0
    now = result(copy)
    assert {*now.scores} == {"f1", "acc", "train-f1"}
    assert now.predictions["acc"] == now.predictions["f1"] != now.predictions["train-f1"]
    assert asked.stat().st_mtime_ns == first_asked
    assert now.scores["f1"] == before.scores["f1"]


def test_a_set_is_asked_once_over_all_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column over sets of which some were asked before reads old and new replies together."""
    from eval.predictions import read_predictions, write_predictions

    asked: list[tuple[str, ...]] = []

    def ask(
        trained: object,
        store: object,
        manifest: object,
        sets: tuple[str, ...],
        folder: Path,
        **_: Any,
    ) -> None:
        asked.append(tuple(sets))
        folder.mkdir(parents=True)
        write_predictions(
            folder / "predictions.jsonl",
            [reply(i, "happy", "happy", benchmark=name) for name in sets for i in range(2)],
        )

    monkeypatch.setattr("eval.asking.ask.ask_benchmarks", ask)

    def column(name: str, *sets: str) -> ScoreColumn:
        return ScoreColumn(name=name, heading=name, kind="benchmark", sets=sets)

    first, second = column("first", "a", "b"), column("second", "b", "c")
    third = column("third", "a")
    order: Any = type("Order", (), {"batch_size": 1, "scale": "full"})()
    telling: Any = Telling(tmp_path, "key")

    def places(earlier: dict[ScoreColumn, Path], *missing: ScoreColumn) -> list[Path]:
        one = _Asked(order, None, None, None, tmp_path / "trial", telling, missing, earlier)  # type: ignore[arg-type]
        return [one.replies(each) for each in missing]

    (old,) = places({}, first)
    new, same = places({first: old}, second, third)
    assert asked == [("a", "b"), ("c",)]
    assert same == old
    found = read_predictions(new / "predictions.jsonl")
    assert [(p.benchmark, p.uid[-1]) for p in found] == [
        ("b", "0"), ("b", "1"), ("c", "0"), ("c", "1"),
    ]  # fmt: skip
    assert places({first: old, second: new}, third) == [old]
    assert len(asked) == 2


# ---------------------------------------------------------------------------- tokens of other weights


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]) -> Path:
    """A store of the same clips by audio weights of another digest."""
    others = {**specs, "audio": specs["audio"].with_weights("cd" * 32)}
    return make_corpus(tmp_path_factory.mktemp("other"), others)[1]


def test_tokens_of_other_weights_do_not_enter_the_table(
    copy: Small, other_store: Path, specs: dict[str, TokenSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    copy.write(SWEEP + "  - {name: dry, set: {model.fusion.kind: none}}\n")
    before = (copy.out / SWEEP_FILE).read_bytes()
    copy.store = other_store
    for more in ((), ("--dry-run",)):
        assert copy.run("--extend", "--rows", "dry", *more) == 2
        text = said(capsys)
        assert "row base has scores on audio tokens of spec" in text
        for digest in ("ab", "cd"):
            assert specs["audio"].with_weights(digest * 32).spec_id in text
        assert "--encoder-weights" in text
        assert "another --out" in text
    assert (copy.out / SWEEP_FILE).read_bytes() == before
    assert not trial_folder(copy.out, "dry@42").exists()


def test_another_store_is_fine_for_rows_that_read_the_same_tokens(
    copy: Small, other_store: Path
) -> None:
    shutil.rmtree(trial_folder(copy.out, "no-audio@42"))
    copy.store = other_store
    assert copy.run("--rows", "no-audio") == 0
    stored = json.loads((copy.out / SWEEP_FILE).read_text())["store"]
    assert stored == str(other_store.resolve())


def test_a_run_that_was_trained_again_on_other_tokens_adds_no_score(
    copy: Small, other_store: Path
) -> None:
    before = result(copy)
    shutil.rmtree(copy.out / "runs" / before.run_key)
    with_scores(copy, F1, TRAIN)
    copy.store = other_store
    assert copy.run("--extend", "--rows", "base") == 1
    now = result(copy)
    assert (now.status, now.scores, now.spec_ids) == ("failed", before.scores, before.spec_ids)
    assert "Remove the folder" in str(now.reason)
