"""Training under a real Slurm, by the script that docs/training_cluster.md gives."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from cache.spec import TokenSpec
from tests.slurm import Slurm, slurm, slurm_server, wait_until
from tests.training import checkpoints_of, free_port, make_corpus, rows_of, tensors_of
from train.running.run import read_run

__all__ = ["slurm", "slurm_server"]

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]

ROOT = Path(__file__).resolve().parents[1]
N_STEPS = 60


def script(tmp_path: Path, specs: dict[str, TokenSpec]) -> str:
    """Return the page's script, for two processes on two nodes of this machine and a small model."""
    page = (ROOT / "docs" / "training_cluster.md").read_text()
    found = re.search(r"```\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    assert found is not None
    text = found[1]
    manifest, store = make_corpus(tmp_path, specs)
    for old, new in (
        ("--ntasks-per-node=4 --gpus-per-node=4 --cpus-per-task=8", "--ntasks-per-node=1"),
        ("$(scontrol show hostnames \"$SLURM_JOB_NODELIST\" | head -n 1)", "127.0.0.1"),
        ("MASTER_PORT=29500", f"MASTER_PORT={free_port()} OMP_NUM_THREADS=1 PYTHONPATH={ROOT}"),
        ("emocache train v2", f"{sys.executable} -m emocache train demo"),
        ("corpus.parquet", str(manifest)),
        ("/scratch/tokens", str(store)),
        ("--out runs/a", f"--out {tmp_path}/run --device cpu"),
        ("model.llm.path=/scratch/Llama-2-7b-chat-hf",
         f"stages.0.n_steps={N_STEPS} stages.1.n_steps=3 stages.0.optim.batch_size=1 "
         "stages.1.optim.batch_size=1 execution.log_every_steps=1 execution.save_every_steps=1000"),
    ):  # fmt: skip
        assert old in text, f"the page's script no longer holds {old!r}"
        text = text.replace(old, new)
    return text


def test_a_signalled_job_saves_is_requeued_and_finishes(
    slurm: Slurm, tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    run = tmp_path / "run"
    job = slurm.submit(script(tmp_path, specs), f"--output={tmp_path}/log")
    wait_until(lambda: len(rows_of(run)) > 3, "a few steps are done")
    slurm.run("scancel", "--signal=USR1", job)  # what --signal=USR1@300 does in time
    wait_until(lambda: checkpoints_of(run / "stage1"), "the state is saved")
    (stopped_at,) = checkpoints_of(run / "stage1")
    assert stopped_at < N_STEPS
    wait_until(lambda: slurm.states()[job] == "COMPLETED", "the requeued job is done")
    assert int(slurm.detail(job)["Restarts"]) == 1
    log = (tmp_path / "log").read_text()
    assert f"stopped at step {stopped_at} of {N_STEPS}" in log
    assert f"trained {N_STEPS - stopped_at + 3} steps" in log
    _, info = read_run(run)
    assert info.finished == ("stage1", "stage2")
    losses = [row["step"] for row in rows_of(run) if "loss" in row and row["stage"] == "stage1"]
    assert losses == list(range(1, N_STEPS + 1)), "every step once"
    assert all(bool(torch.isfinite(t).all()) for t in tensors_of(run / "stage2" / "final").values())
