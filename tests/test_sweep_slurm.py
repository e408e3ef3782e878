"""A sweep as a job array of a real Slurm on this machine (`tests/slurm.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.spec import TokenSpec
from eval.sweep.running.at_work import read_at_work
from eval.sweep.state import RESULT_FILE
from tests.slurm import Slurm, slurm, slurm_server, wait_until
from tests.sweeps import ROOT, SWEEP, Small
from tests.training import make_corpus, rows_of

__all__ = ["slurm", "slurm_server"]

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]

ARRAY = ("--engine", "slurm", "--queue", "cpu", "--prologue", f"export PYTHONPATH={ROOT}")


@pytest.fixture
def small(tmp_path: Path, specs: dict[str, TokenSpec]) -> Small:
    return Small(tmp_path, make_corpus(tmp_path, specs))


def statuses(out: Path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["status"]
        for path in sorted(out.glob(f"trials/*/{RESULT_FILE}"))
    }


def test_an_array_gives_the_table_that_one_process_gives(slurm: Slurm, small: Small) -> None:
    here = small.file.with_name("here")
    assert small.run(out=here) == 0
    assert small.run(*ARRAY, "--walltime", "1h") == 0
    assert set(statuses(small.out).values()) == {"ok"}
    assert len([job for job in slurm.states() if "_" in job]) >= 2, "a task for each run"
    assert (small.out / "table.json").read_bytes() == (here / "table.json").read_bytes()


def test_tasks_go_on_without_whoever_submitted_them_and_are_not_submitted_twice(
    slurm: Slurm, small: Small
) -> None:
    small.write(SWEEP.replace("stages.0.n_steps: 3", "stages.0.n_steps: 150"))
    process = small.start(*ARRAY)
    wait_until(lambda: len(read_at_work(small.out)) == 2, "both tasks are at work")
    jobs = set(slurm.states())
    process.kill()
    process.communicate()
    assert slurm.running(), "the tasks go on"
    assert small.run(*ARRAY) == 0
    assert set(slurm.states()) == jobs
    assert set(statuses(small.out).values()) == {"ok"}


def test_a_task_that_is_asked_to_stop_saves_is_requeued_and_goes_on(
    slurm: Slurm, small: Small
) -> None:
    small.write(
        SWEEP.replace("stages.0.n_steps: 3", "stages.0.n_steps: 60").replace(
            "save_every_steps: 1", "save_every_steps: 1000"
        )
    )
    process = small.start(*ARRAY, "--rows", "base")
    wait_until(lambda: any(one.n_done > 3 for one in read_at_work(small.out).values()), "steps")
    (task,) = slurm.running()
    slurm.run("scancel", "--signal=USR1", task)  # what --signal does in time
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert int(slurm.detail(task)["Restarts"]) == 1
    (run,) = (small.out / "runs").iterdir()
    steps = [row["step"] for row in rows_of(run) if "loss" in row and row["stage"] == "stage1"]
    assert steps == sorted(set(steps)), "no step was done twice"


@pytest.mark.fault("loss of an array's task")
def test_a_task_that_dies_fails_its_rows_and_no_others(slurm: Slurm, small: Small) -> None:
    small.write(
        SWEEP.replace("stages.0.n_steps: 3", "stages.0.n_steps: 3000").replace(
            "  - {name: no-audio",
            "  - {name: quick, set: {stages.0.n_steps: 2}}\n  - {name: no-audio",
        )
    )
    process = small.start(*ARRAY, "--rows", "base,quick")
    wait_until(
        lambda: any(
            one.n_done > 3 and one.n_total > 3000 for one in read_at_work(small.out).values()
        ),
        "the long one is at work",
    )
    (key,) = (k for k, one in read_at_work(small.out).items() if one.n_total > 3000)
    array = json.loads((small.out / ".array.json").read_text())
    job = array["job"]
    slurm.run("scancel", "--signal=KILL", "--full", f"{job}_{array['run_keys'].index(key)}")
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 1, said
    assert statuses(small.out) == {"base@42": "failed", "quick@42": "ok"}
    assert f"of Slurm job {job}" in (small.out / "table.md").read_text()
