"""Running a sweep: what runs once, what fails alone, what goes on where it was killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.spec import TokenSpec
from eval.predictions import read_predictions
from eval.sweep.running.at_work import Telling, holding, leading, read_at_work
from eval.sweep.running.run import Crew
from eval.sweep.running.watch import look_at
from eval.sweep.state import RESULT_FILE, read_begun, read_result, run_folder, trial_folder
from tests.sweeps import SWEEP, Small
from tests.training import make_corpus, tensors_of
from train.running.run import read_run


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]
) -> tuple[Path, Path]:
    """A manifest and a store of made-up tokens."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), specs)


@pytest.fixture
def small(tmp_path: Path, corpus: tuple[Path, Path]) -> Small:
    return Small(tmp_path, corpus)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: tuple[Path, Path]) -> Small:
    """The small sweep, run to its end."""
    found = Small(tmp_path_factory.mktemp("finished"), corpus)
    assert found.run() == 0
    return found


@pytest.fixture
def copy(finished: Small, tmp_path: Path, corpus: tuple[Path, Path]) -> Small:
    """A finished sweep to change."""
    found = Small(tmp_path, corpus)
    shutil.copytree(finished.out, found.out)
    return found


def start_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test fail that starts a process."""

    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(Crew, "_begin", refuse)


def results(out: Path) -> dict[str, Any]:
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(out.glob(f"trials/*/{RESULT_FILE}"))
    }


# ---------------------------------------------------------------------------- to the end


def test_rows_that_differ_in_their_stage_share_a_run(finished: Small) -> None:
    found = results(finished.out)
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(
        ("base@42", "first-stage@42", "no-audio@42"), "ok"
    )
    assert found["base@42"]["run_key"] == found["first-stage@42"]["run_key"]
    assert len(list((finished.out / "runs").iterdir())) == 2
    assert set(found["base@42"]["spec_ids"]) == {"audio", "video", "image"}
    assert set(found["no-audio@42"]["spec_ids"]) == {"video", "image"}


def test_a_run_trains_the_rows_preset(finished: Small) -> None:
    trial = read_begun(finished.out).trials[2]
    preset, info = read_run(run_folder(finished.out, trial.run_key))
    assert preset.tokens.audio is None
    assert preset.model_dump(exclude={"name", "tokens"}) == trial.preset.model_dump(
        exclude={"name", "tokens"}
    )
    assert info.finished == ("stage1", "stage2")
    stored = read_result(finished.out, trial.name)
    assert stored is not None
    assert stored.n_trainable == sum(info.trainable.values())


def test_a_rows_scores_are_those_of_its_stage(finished: Small) -> None:
    """The predictions of a row with a stage are what its stage's weights say, asked by another way."""
    from cache.manifest import read_manifest
    from cache.store import TokenStore
    from eval.generate import generate, load_run

    manifest = read_manifest(finished.manifest)
    run = run_folder(finished.out, results(finished.out)["first-stage@42"]["run_key"])
    trained = load_run(run, header=manifest.header, stage="stage1")
    store = TokenStore.open(str(finished.store))
    records = [record for record in manifest.select("val") if record.uid]
    wanted = [p.reply for p in generate(trained, store, records, max_new_tokens=20)]
    path = trial_folder(finished.out, "first-stage@42") / "val-emotion" / "predictions.jsonl"
    found = [p.reply for p in read_predictions(path)]
    assert [a[: len(b)] for a, b in zip(found, wanted, strict=True)] == wanted


def test_the_score_of_a_trial_is_that_of_its_predictions(finished: Small) -> None:
    from sklearn.metrics import f1_score

    for one in results(finished.out).values():
        found = read_predictions(finished.out / one["predictions"]["f1"])
        assert len(found) == 4
        expected = f1_score(
            [p.truth for p in found], [p.label or "none" for p in found],
            average="weighted", labels=["happy", "sad"], zero_division=0,
        )  # fmt: skip
        assert one["scores"]["f1"] == pytest.approx(expected)


def test_a_second_run_does_nothing_and_prints_the_same_table(
    copy: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start_nothing(monkeypatch)
    before = (copy.out / "table.json").read_text()
    assert copy.run() == 0
    assert (copy.out / "table.json").read_text() == before
    assert "no-audio" in capsys.readouterr().out


def test_the_table_and_the_logs_are_there(finished: Small) -> None:
    for name in ("table.html", "table.md", "table.tex", "table.csv"):
        assert "no-audio" in (finished.out / name).read_text()
    log = (trial_folder(finished.out, "base@42") / "log.txt").read_text()
    assert "trained 5 steps" in log
    assert "base@42: {'f1':" in log


def test_only_the_rows_that_are_asked_for_run(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[Any] = []
    monkeypatch.setattr(Crew, "train", lambda self, given: orders.extend(given))
    assert small.run("--rows", "no-*") == 130  # nothing was trained, so something is left
    assert [trial.row for order in orders for trial in order.trials] == ["no-audio"]
    assert [trial.row for trial in read_begun(small.out).trials] == [
        "base", "first-stage", "no-audio",
    ]  # fmt: skip


@pytest.mark.slow
def test_several_processes_train_as_one_does(finished: Small, copy: Small) -> None:
    shutil.rmtree(copy.out)
    assert copy.run("--jobs", "2") == 0
    for run in (finished.out / "runs").iterdir():
        one = tensors_of(run / "stage2" / "final")
        other = tensors_of(copy.out / "runs" / run.name / "stage2" / "final")
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (copy.out / "table.json").read_bytes() == (finished.out / "table.json").read_bytes()


# ---------------------------------------------------------------------------- failures


def when(condition: Callable[[], object], act: Callable[[], object]) -> threading.Thread:
    """Do something as soon as something is the case."""

    def look() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if condition():
                act()
                return
            time.sleep(0.002)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    return thread


@pytest.mark.fault("kill -9 of a row's process")
def test_a_row_whose_process_is_killed_fails_alone(copy: Small) -> None:
    key = results(copy.out)["no-audio@42"]["run_key"]
    shutil.rmtree(copy.out / "trials")
    shutil.rmtree(copy.out / "runs" / key)

    def kill() -> None:
        os.kill(read_at_work(copy.out)[key].pid, signal.SIGKILL)

    thread = when(lambda: key in read_at_work(copy.out), kill)
    assert copy.run() == 1
    thread.join()
    found = results(copy.out)
    assert {name: one["status"] for name, one in found.items()} == {
        "base@42": "ok", "first-stage@42": "ok", "no-audio@42": "failed",
    }  # fmt: skip
    assert found["no-audio@42"]["failed_step"] == "train"
    assert "SIGKILL" in found["no-audio@42"]["reason"]
    assert "SIGKILL" in (copy.out / "table.md").read_text()
    assert (trial_folder(copy.out, "no-audio@42") / "log.txt").exists()


def test_a_failed_row_is_tried_again_when_that_is_asked_for(
    copy: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trial_folder(copy.out, "first-stage@42") / RESULT_FILE
    good = path.read_text()
    failure = {"status": "failed", "failed_step": "score", "reason": "it rained"}
    bad = {**json.loads(good), **failure, "scores": {}, "predictions": {}}
    path.write_text(json.dumps(bad))
    with monkeypatch.context() as patched:
        start_nothing(patched)
        assert copy.run() == 1
    assert "--retry-failed" in capsys.readouterr().err
    assert copy.run("--retry-failed") == 0
    again, before = json.loads(path.read_text()), json.loads(good)
    assert again["scores"] == before["scores"]


def test_an_error_of_training_is_the_rows_result(copy: Small) -> None:
    diverging = (
        "  - {name: hot, set: {stages.0.optim.lr: 1.0e+30, stages.0.optim.warmup_steps: 0}}\n"
    )
    copy.write(SWEEP + diverging)
    assert copy.run("--extend") == 1
    hot = results(copy.out)["hot@42"]
    assert hot["status"] == "failed"
    assert hot["failed_step"] == "train"
    assert "loss" in hot["reason"]
    assert hot["reason"] in (trial_folder(copy.out, "hot@42") / "log.txt").read_text()
    assert read_result(copy.out, "base@42") is not None


def test_an_error_of_scoring_leaves_the_other_rows_of_the_run(copy: Small) -> None:
    key = results(copy.out)["base@42"]["run_key"]
    for row in ("base", "first-stage"):
        shutil.rmtree(trial_folder(copy.out, f"{row}@42"))
    for file in (copy.out / "runs" / key / "stage2" / "final").glob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert copy.run() == 1
    found = results(copy.out)
    assert found["base@42"]["failed_step"] == "score"
    assert found["first-stage@42"]["status"] == "ok"


# ---------------------------------------------------------------------------- two processes


def test_a_second_process_is_refused(copy: Small, capsys: pytest.CaptureFixture[str]) -> None:
    with leading(copy.out):
        assert copy.run() == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"process {os.getpid()} on" in said
    assert "--status" in said


@pytest.mark.slow
def test_a_run_that_another_process_has_is_waited_for(copy: Small) -> None:
    """As it is left by a leader that was killed, or trained by a task of an array."""
    key = results(copy.out)["no-audio@42"]["run_key"]
    folder = trial_folder(copy.out, "no-audio@42")
    kept = copy.out.parent / "kept"
    folder.rename(kept)
    release = threading.Event()

    def other() -> None:
        with holding(copy.out, key):
            release.wait(60)
            kept.rename(folder)  # what it came to is there before its lock is gone

    thread = threading.Thread(target=other)
    thread.start()
    # The lock of a thread is one of another open file, so our own processes meet it.
    threading.Timer(1.5, release.set).start()
    assert copy.run() == 0
    thread.join()
    lines = (copy.out / "at-work" / f"{key}.log").read_text().count("trains run")
    assert lines == 1, "nothing was trained or scored a second time"


# ---------------------------------------------------------------------------- killed


def is_at_work(out: Path, n_results: int) -> bool:
    """True while a process of a sweep with so many results or more is at work."""
    return bool(read_at_work(out)) and len(results(out)) >= n_results


def wait_for(condition: Callable[[], object], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.fault("kill -9 of a sweep")
@pytest.mark.parametrize("seed", [1, 2])
def test_a_sweep_that_is_killed_three_times_gives_the_same_table(
    small: Small, finished: Small, seed: int
) -> None:
    """At moments drawn at random, anywhere from its start on: only the leader, its children follow."""
    rng = random.Random(seed)
    for number in range(3):
        process = small.start()
        if number:  # not only in its first moments: once its processes are at work, or one is done
            n_wanted = len(results(small.out)) + rng.randrange(2)
            while process.poll() is None and not is_at_work(small.out, n_wanted):
                time.sleep(0.005)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.communicate()
    last = small.start()
    said, _ = last.communicate(timeout=120)
    assert last.returncode == 0, said
    assert (small.out / "table.json").read_bytes() == (finished.out / "table.json").read_bytes()
    for run in (finished.out / "runs").iterdir():
        one = tensors_of(run / "stage2" / "final")
        other = tensors_of(small.out / "runs" / run.name / "stage2" / "final")
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C in a sweep")
def test_ctrl_c_stops_a_sweep_that_goes_on_later(small: Small, finished: Small) -> None:
    small.write(SWEEP.replace("stages.0.n_steps: 3", "stages.0.n_steps: 500"))
    process = small.start()
    wait_for(lambda: any(one.n_done > 2 for one in read_at_work(small.out).values()))
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "3 of 3 trials left" in " ".join(said.split())
    (checkpoint, *_) = small.out.glob("runs/*/stage1/checkpoint-*/state.json")
    assert checkpoint.exists()
    found = look_at(small.out, read_begun(small.out))
    assert found.leader is None
    assert not found.at_work


@pytest.mark.slow
@pytest.mark.fault("kill -9 of a sweep")
def test_children_end_with_their_leader(small: Small) -> None:
    small.write(SWEEP.replace("stages.0.n_steps: 3", "stages.0.n_steps: 5000"))
    process = small.start()
    wait_for(lambda: any(one.n_done > 2 for one in read_at_work(small.out).values()))
    (said,) = read_at_work(small.out).values()
    process.kill()
    process.communicate()
    wait_for(lambda: not Path(f"/proc/{said.pid}").exists(), 30)


# ---------------------------------------------------------------------------- looking on


def test_looking_on_shows_what_runs_and_what_is_left(
    copy: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(trial_folder(copy.out, "no-audio@42"))
    begun = read_begun(copy.out)
    trial = begun.trials[2]
    shutil.rmtree(run_folder(copy.out, trial.run_key))
    with leading(copy.out), holding(copy.out, trial.run_key):
        telling = Telling(copy.out, trial.run_key)
        telling.begin("train", n_total=5)
        telling.progress(stage="stage1", n_done=2, note="loss 0.5", now=True)
        found = look_at(copy.out, begun)
        assert found.count() == {"done": 2, "at work": 1}
        assert found.trials[2].steps["train"].text == "stage1 40% loss 0.5"
        assert found.trials[2].steps["extract"].state == "done"
        assert found.left_s is not None
        assert copy.run("--status") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"running: process {os.getpid()}" in said
    assert "stage1 40%" in said
    assert "2 of 3 trials" in said
    # What a dead process said last is not what is going on.
    assert look_at(copy.out, begun).count() == {"done": 2, "open": 1}
