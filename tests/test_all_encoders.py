"""The real clips with every kind of encoder in one pass, on two Slurm workers of which one is killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.commit import Status
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from emocache import main
from extract.encoders.bank import EncoderBank
from extract.index import index_folder
from extract.jobs.job import Job
from extract.jobs.session import WorkerState
from extract.plan import make_plan
from extract.run import extract
from extract.tiny.made_up import of_one_width, write_checkpoint
from tests.slurm import Slurm, slurm, slurm_server, wait_until

__all__ = ["slurm", "slurm_server"]

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wanted() -> dict[str, TokenSpec]:
    """One spec for each kind of encoder, and the predecessor's mean over an utterance."""
    specs = {name.replace(" ", "-"): spec for name, spec in of_one_width(32, 4).items()}
    specs["hubert-utt"] = specs["hubert"].model_copy(update={"utterance": True})
    specs["mae-video-utt"] = specs["eva-video"].model_copy(
        update={"encoder": specs["mae"].encoder, "grid": None, "utterance": True}
    )
    return specs


@pytest.fixture(scope="module")
def weights(
    wanted: dict[str, TokenSpec], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {spec.encoder.kind: write_checkpoint(spec.encoder, folder) for spec in wanted.values()}


@pytest.fixture(scope="module")
def corpus(shared_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    path = tmp_path_factory.mktemp("corpus") / "clips.parquet"
    manifest, _ = index_folder(shared_clips, path)
    write_manifest(path, manifest)
    return manifest, path


def test_every_encoder_in_one_pass_on_two_workers_one_of_them_killed(
    slurm: Slurm,
    wanted: dict[str, TokenSpec],
    weights: dict[str, Path],
    corpus: tuple[Manifest, Path],
    shared_clips: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    manifest, manifest_path = corpus
    specs_file = tmp_path / "specs.json"
    specs_file.write_text(json.dumps({n: s.model_dump(mode="json") for n, s in wanted.items()}))
    given = " ".join(f"--encoder-weights {kind}={path}" for kind, path in weights.items())
    script = f"""#!/bin/bash
#SBATCH --output={tmp_path}/job-%j.out
export PYTHONPATH={REPOSITORY} OMP_NUM_THREADS=1
exec {sys.executable} -m emocache extract-worker --specs {specs_file} {given} \\
  --manifest {manifest_path} --store {tmp_path}/s --unit-clips 2 --lease-timeout 30s
"""
    TokenStore.open_or_create(tmp_path / "s")
    first, second = slurm.submit(script), slurm.submit(script)

    def workers() -> list[WorkerState]:
        jobs = Job.latest(TokenStore.open(tmp_path / "s").storage)
        return [state for state, _ in jobs[0].workers()] if jobs else []

    def both_are_at_work() -> bool:
        return sum(state.n_units > 0 and not state.ended for state in workers()) == 2

    wait_until(both_are_at_work, "both workers have done a unit")
    os.kill(workers()[0].pid, signal.SIGKILL)
    wait_until(
        lambda: {slurm.states()[job] for job in (first, second)}.isdisjoint({"RUNNING", "PENDING"}),
        "both jobs have ended",
        600,
    )
    said = "\n".join(path.read_text() for path in tmp_path.glob("job-*.out"))
    assert sorted(slurm.states()[job] for job in (first, second)) == ["COMPLETED", "FAILED"], said

    store = TokenStore.open(tmp_path / "s")
    bank = EncoderBank(tuple(wanted.values()), weights)
    calm = TokenStore.open_or_create(tmp_path / "calm")
    plan = make_plan(manifest.records, bank.specs, calm, unit_clips=2)
    extract(plan, manifest.records, bank, calm, shared_clips, n_threads=1)
    assert len(bank.specs) == len(wanted)
    for spec in bank.specs:
        keys = [entry.key for commit in store.commits(spec) for entry in commit.clips]
        assert len(keys) == len(set(keys)) == len({r.token_key(spec) for r in manifest.records})
        for entry in calm.index(spec):
            again = store.index(spec).get(entry.key)
            assert again is not None
            assert (again.status, again.crc32c) == (entry.status, entry.crc32c)
            assert entry.status is not Status.FAILED
    out = tmp_path / "report"
    assert main(["extract", "report", str(tmp_path / "s"), "--out", str(out)]) == 0
    found = json.loads((out / "report.json").read_text())
    assert found["n_units_done"] == found["n_units"] == 13
    assert sorted(worker["outcome"] for worker in found["workers"]) == ["ended", "vanished"]
    record_property("faults", ("kill -9 of a worker, every encoder in one pass", 1))
