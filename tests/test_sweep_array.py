"""What a sweep asks Slurm and tells it, by a stand-in for squeue; `test_sweep_slurm.py` has a real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cache.errors import ExtractionStopped
from cache.spec import TokenSpec
from eval.sweep.running import slurm
from eval.sweep.running.slurm import Array
from tests.sweeps import Small
from tests.training import make_corpus
from train.running.interrupt import Interrupt

DOWN = 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1'
ARRAY = Array(job="17", run_keys=("a", "b"))


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep whose array was submitted, and an empty folder of programs in front of all others."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "_ASK_AGAIN_S", 0.0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".array.json").write_text(ARRAY.model_dump_json())
    return tmp_path / "out"


def squeue(out: Path, *answers: str) -> None:
    """Answer as told, each time the next one, and the last one for ever."""
    lines = ["#!/bin/sh", f"n=$(cat {out}/n 2>/dev/null || echo 0)", f"echo $((n + 1)) > {out}/n"]
    lines += [f"if [ $n = {n} ]; then {said}; exit; fi" for n, said in enumerate(answers[:-1])]
    program = out.parent / "bin" / "squeue"
    program.write_text("\n".join([*lines, answers[-1]]) + "\n")
    program.chmod(0o755)


@pytest.mark.fault("sweep: squeue does not answer")
def test_an_array_is_not_given_up_because_slurm_is_silent_for_a_while(submitted: Path) -> None:
    squeue(submitted, DOWN, DOWN, "echo 17_1 RUNNING")
    assert slurm._running(submitted, Interrupt()) == ARRAY


@pytest.mark.fault("sweep: squeue does not answer")
def test_while_slurm_is_silent_nothing_more_is_submitted(submitted: Path) -> None:
    squeue(submitted, DOWN)
    with pytest.raises(
        ExtractionStopped, match="squeue does not say whether tasks of Slurm job 17"
    ):
        slurm._running(submitted, Interrupt())
    assert (submitted / "n").read_text().strip() == str(slurm._N_ASKED)


@pytest.mark.parametrize("said", ["true", 'echo "Invalid job id specified" >&2; exit 1'])
def test_an_array_that_ended_is_none(submitted: Path, said: str) -> None:
    squeue(submitted, said)
    assert slurm._running(submitted, Interrupt()) is None


def test_who_is_interrupted_asks_no_longer(submitted: Path) -> None:
    squeue(submitted, DOWN)
    interrupt = Interrupt()
    interrupt.requested = True
    assert slurm._running(submitted, interrupt) is None


def test_slurm_is_told_the_folder_of_the_logs_to_the_letter(
    tmp_path: Path, specs: dict[str, TokenSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    small = Small(tmp_path, make_corpus(tmp_path, specs))
    out = tmp_path / "lr at 100%d, é"
    assert small.run("--print-script", "--engine", "slurm", "--queue", "cpu", out=out) == 0
    (told,) = re.findall(r"^#SBATCH --output=(.*)$", capsys.readouterr().out, re.MULTILINE)
    assert told == f'"{tmp_path}/lr at 100%%d, é/at-work/array-%A_%a.log"'
