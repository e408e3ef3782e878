"""What a run says of itself: rows, trackers' settings, and signs of trouble."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from cache.errors import MissingDependencyError
from train.running.monitor import Doctor, Monitor, StepLosses, check_trackers, flat


def test_settings_are_flattened_under_dotted_names() -> None:
    nested = {"a": 1, "b": {"c": None, "d": {"e": "x"}}, "f": [{"g": 2}, 3], "h": ()}
    assert flat(nested) == {"a": 1, "b.c": None, "b.d.e": "x", "f.0.g": 2, "f.1": 3}


def test_rows_of_steps_that_run_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [{"stage": s, "step": i, "loss": 1.0} for s in ("one", "two") for i in range(1, 6)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"stage": "two", "st')
    monitor = Monitor(tmp_path, "two", 3, {})
    monitor.write(4, {"loss": 0.5})
    monitor.close()
    left = [json.loads(line) for line in path.read_text().splitlines()]
    assert left == [*rows[:8], {"stage": "two", "step": 4, "loss": 0.5}]
    assert list((tmp_path / "tensorboard" / "two").glob("events.*"))


def test_a_service_that_is_not_installed_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.running.monitor.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"--track wandb.*pip install wandb"):
        check_trackers(["wandb"])
    check_trackers([])


def losses(step: int, *each: float) -> StepLosses:
    uids = tuple(f"made/{i}" for i in range(len(each)))
    loss = sum(each) / len(each)
    return StepLosses(step, loss, 1e-3, uids, ("emotion",) * len(each), each)


def test_one_bad_step_is_no_illness_and_twenty_are(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path, vocabulary=100)
    absurd = 2 * math.log(100) + 1
    assert not any(doctor.is_ill(losses(i, 1.0, 2.0)) for i in range(19))
    assert not doctor.is_ill(losses(19, absurd, absurd)), "one spike among good steps"
    ill = [doctor.is_ill(losses(20 + i, absurd, absurd)) for i in range(20)]
    assert ill[-1]
    assert not ill[0]


def test_a_loss_that_is_not_a_number_names_its_sample(tmp_path: Path) -> None:
    doctor = Doctor(tmp_path / "stage1", vocabulary=100)
    bad = losses(7, 1.0, math.nan, 2.0)
    assert doctor.is_ill(bad)
    error = doctor.diagnose(bad, rank=1, checkpoint=tmp_path / "stage1" / "checkpoint-5")
    assert "step 7 of stage1: of 1 of 3 answers, first: made/1 (emotion)" in str(error)
    assert "checkpoint-5, is kept" in str(error)
    found = json.loads((tmp_path / "stage1" / "diverged-7-process-1.json").read_text())
    assert [answer["loss"] for answer in found["answers"]] == [1.0, "nan", 2.0]
    assert "No checkpoint was written yet" in str(doctor.diagnose(bad, 0, None))
