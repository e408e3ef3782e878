"""Extraction on a real Slurm: cancelled, requeued, out of walltime, nodes lost; no byte is lost or changed.

Slurm, its nodes and the workers run on this machine (`tests/slurm.py`); decoding is slowed down, so
that each fault strikes in the middle of a unit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from extract.encoders.bank import EncoderBank
from extract.engines.options import EngineOptions, EngineState
from extract.engines.start import run_engine
from extract.index import index_folder
from extract.jobs.job import Job
from extract.jobs.session import WorkerState
from extract.plan import make_plan, open_job
from extract.run import extract, worker_config
from tests.media import write_clip
from tests.slurm import Slurm, slurm, slurm_server, wait_until

__all__ = ["slurm", "slurm_server"]

pytestmark = [pytest.mark.slurm, pytest.mark.cluster]

REPOSITORY = Path(__file__).resolve().parents[1]
N_CLIPS = 12
UNIT_CLIPS = 2

SLOWLY = """\
import os, sys, time
if "extract.decode_worker" in sys.orig_argv:
    from extract import inputs
    prepare = inputs.prepare_inputs
    def slowly(*args, **more):
        time.sleep(float(os.environ["DECODING_TAKES_S"]))
        return prepare(*args, **more)
    inputs.prepare_inputs = slowly
"""
"""A `sitecustomize` that makes decoders take their time, and lets everything else alone."""


@dataclass
class Corpus:
    """Clips, and what a calm run in this process makes of them."""

    folder: Path
    manifest: Manifest
    manifest_path: Path
    bank: EncoderBank
    expected: dict[tuple[str, str], bytes] = field(default_factory=dict)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, bank: EncoderBank) -> Corpus:
    folder = tmp_path_factory.mktemp("media")
    for seed in range(N_CLIPS):
        write_clip(folder / f"{seed:02d}.mp4", seed=seed, seconds=0.4)
    path = folder / "m.parquet"
    manifest, _ = index_folder(folder, path)
    write_manifest(path, manifest)
    calm = TokenStore.open_or_create(tmp_path_factory.mktemp("calm") / "s")
    plan = make_plan(manifest.records, bank.specs, calm, unit_clips=UNIT_CLIPS)
    extract(plan, manifest.records, bank, calm, folder, n_threads=1)
    expected = contents(calm, bank.specs)
    assert len(expected) == 3 * N_CLIPS
    return Corpus(folder, manifest, path, bank, expected)


def contents(store: TokenStore, specs: Sequence[TokenSpec]) -> dict[tuple[str, str], bytes]:
    """Return all tokens: every clip committed once, none failed."""
    store.refresh()
    found = {}
    for spec in specs:
        keys = [entry.key for commit in store.commits(spec) for entry in commit.clips]
        assert max(Counter(keys).values(), default=1) == 1, "no clip is committed twice"
        for entry in store.index(spec):
            assert entry.status.value == "ok", entry.reason
            found[spec.spec_id, entry.key] = store.read(spec, entry.key).tokens.tobytes()
    return found


class Run:
    """One store, and the ways in which jobs work on it."""

    def __init__(self, root: Path, corpus: Corpus, slurm: Slurm) -> None:
        self.root, self.corpus, self.slurm = root, corpus, slurm
        self.store = TokenStore.open_or_create(root / "s")
        (root / "slow").mkdir()
        (root / "slow" / "sitecustomize.py").write_text(SLOWLY)

    def environment(self, decoding_s: float) -> dict[str, str]:
        return {
            "PYTHONPATH": f"{self.root / 'slow'}:{REPOSITORY}",
            "DECODING_TAKES_S": str(decoding_s),
            "OMP_NUM_THREADS": "1",
        }

    def worker_script(self, decoding_s: float) -> str:
        """Return a batch script that is one `emocache extract-worker`, on one core."""
        exports = "\n".join(f"export {n}={v}" for n, v in self.environment(decoding_s).items())
        cores = " ".join(str(core) for core in sorted(os.sched_getaffinity(0)))
        return f"""#!/bin/bash
#SBATCH --requeue --output={self.root}/job-%j.out --open-mode=append
{exports}
cores=({cores})
exec taskset -c ${{cores[SLURM_JOB_ID % ${{#cores[@]}}]}} {sys.executable} -m emocache \\
  extract-worker demo --manifest {self.corpus.manifest_path} --store {self.root}/s \\
  --unit-clips {UNIT_CLIPS} --lease-timeout 20s --log-dir {self.root}/logs
"""

    @property
    def job(self) -> Job:
        [job] = Job.latest(self.store.storage)
        return job

    def workers(self) -> list[WorkerState]:
        """Return the states of all workers that there ever were."""
        jobs = Job.latest(self.store.storage)
        return [state for job in jobs for state, _ in job.workers(lease_timeout_s=20)]

    def n_at_work(self) -> int:
        """Return how many workers hold a unit."""
        return sum(not state.ended and state.unit is not None for state in self.workers())

    def output(self) -> str:
        """Return what the jobs printed, for messages."""
        return "\n".join(path.read_text() for path in sorted(self.root.glob("job-*.out")))

    def assert_complete(self) -> None:
        assert self.job.undone() == [], self.output()
        assert contents(self.store, self.corpus.bank.specs) == self.corpus.expected


@pytest.fixture
def run(tmp_path: Path, corpus: Corpus, slurm: Slurm) -> Run:
    return Run(tmp_path, corpus, slurm)


def ends(slurm: Slurm, *jobs: str) -> Callable[[], bool]:
    """Return a condition: these jobs are over."""
    over = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL"}
    return lambda: {slurm.states().get(job) for job in jobs} <= over


def run_time_s(detail: dict[str, str]) -> int:
    """Return how long a job has run."""
    hours, minutes, seconds = (int(part) for part in detail["RunTime"].split(":"))
    return 60 * (60 * hours + minutes) + seconds


@pytest.mark.fault("Slurm: scancel in mid-unit")
def test_the_engine_replaces_a_cancelled_job(
    run: Run, slurm: Slurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--engine slurm`: the job gives its unit back on SIGTERM, and another one comes in its place."""
    for name, value in run.environment(decoding_s=2.5).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT", "3s")
    import dask.config

    dask.config.refresh()
    corpus = run.corpus
    plan = make_plan(corpus.manifest.records, corpus.bank.specs, run.store, unit_clips=UNIT_CLIPS)
    job = open_job(run.store, corpus.manifest.records, plan)
    config = worker_config(
        job, corpus.bank, run.store, manifest=corpus.manifest_path, media_root=corpus.folder,
        session="s1", n_threads=1, heartbeat_s=1.0, lease_timeout_s=20.0,
    )  # fmt: skip
    cancelled: list[str] = []
    states: list[EngineState] = []

    def on_tick(state: EngineState) -> None:
        states.append(state)
        if not cancelled and run.n_at_work() == 2:
            cancelled.extend(slurm.running()[:1])
            slurm.run("scancel", cancelled[0])

    options = EngineOptions(
        kind="slurm", workers=2, walltime_s=1200, queue="cpu", log_dir=run.root / "logs"
    )
    end = run_engine(options, config, job, on_tick)
    run.assert_complete()
    assert not end.is_stopping
    assert max(state.n_workers for state in states) == 2
    assert len(slurm.states()) >= 3, "the cancelled job was replaced"
    reasons = [state.end_reason for state in run.workers()]
    assert "its Dask worker closes" in reasons, "the cancelled one gave its unit back"
    wait_until(lambda: not slurm.running(), "no job is left")
    names = [path.name for path in (run.root / "logs").iterdir()]
    assert sum(name.startswith("s1-") for name in names) >= 2
    assert any(name.endswith(".err") for name in names)


@pytest.mark.fault("Slurm: requeue")
@pytest.mark.fault("Slurm: node down")
def test_an_array_survives_requeueing_and_the_loss_of_a_node(run: Run, slurm: Slurm) -> None:
    array = slurm.submit(run.worker_script(decoding_s=4.0), "--array=0-1")
    tasks = f"{array}_0", f"{array}_1"
    wait_until(lambda: run.n_at_work() == 2, "both tasks work")
    slurm.run("scontrol", "requeue", tasks[0])
    wait_until(lambda: slurm.detail(tasks[0])["Restarts"] == "1", "the task is requeued")
    wait_until(lambda: slurm.detail(tasks[0])["JobState"] == "RUNNING", "the task runs again")
    assert run.job.undone(), "the faults came in time"
    node = slurm.detail(tasks[1])["NodeList"]
    slurm.lose(node)
    wait_until(lambda: slurm.detail(tasks[1])["Restarts"] == "1", "the task left the lost node")
    slurm.bring_back(node)
    wait_until(ends(slurm, *tasks), "both tasks are over")
    assert {slurm.states()[task] for task in tasks} == {"COMPLETED"}, run.output()
    run.assert_complete()
    assert "SIGTERM" in [state.end_reason for state in run.workers()]


@pytest.mark.fault("Slurm: walltime signal, two jobs on one store")
def test_two_jobs_on_one_store_end_ahead_of_their_walltime_and_a_third_goes_on(
    run: Run, slurm: Slurm
) -> None:
    script = run.worker_script(decoding_s=10.0)
    jobs = [slurm.submit(script, "--time=60", "--signal=B:USR1@70") for _ in range(2)]
    wait_until(lambda: run.n_at_work() == 2, "both jobs work")
    for job in jobs:  # now that they do: the signal is due some seconds later
        limit = -(-(run_time_s(slurm.detail(job)) + 75) // 60)
        slurm.run("scontrol", "update", f"jobid={job}", f"timelimit={limit}")
    wait_until(ends(slurm, *jobs), "both jobs are over")
    assert "TIMEOUT" not in {slurm.states()[job] for job in jobs}
    assert [state.end_reason for state in run.workers()] == ["SIGUSR1"] * 2, run.output()
    left = run.job.undone()
    assert left
    partial = contents(run.store, run.corpus.bank.specs)
    assert 0 < len(partial) < 3 * N_CLIPS
    assert partial.items() <= run.corpus.expected.items()
    last = slurm.submit(run.worker_script(decoding_s=0.0))
    wait_until(ends(slurm, last), "the last job is over")
    assert slurm.states()[last] == "COMPLETED", run.output()
    run.assert_complete()


@pytest.mark.fault("Slurm: kill -9 of the engine")
def test_jobs_end_by_themselves_when_the_engine_is_killed(run: Run, slurm: Slurm) -> None:
    """The command line with `--engine slurm`, on a login node that goes down."""
    command = [
        sys.executable, "-m", "emocache", "extract", "demo",
        "--manifest", str(run.corpus.manifest_path), "--store", str(run.root / "s"),
        "--unit-clips", str(UNIT_CLIPS), "--engine", "slurm", "--workers", "2",
        "--walltime", "20m", "--log-dir", str(run.root / "logs"), "--lease-timeout", "20s",
    ]  # fmt: skip
    with (run.root / "job-engine.out").open("wb") as log:
        engine = subprocess.Popen(
            command, env={**slurm.environment, **run.environment(3.0)}, stdout=log, stderr=log
        )
        try:
            wait_until(lambda: run.n_at_work() == 2 or engine.poll() is not None, "both jobs work")
            assert engine.poll() is None, run.output()
        finally:
            engine.send_signal(signal.SIGKILL)
            engine.wait()
    wait_until(lambda: not slurm.running(), "the jobs end without the engine")
    assert run.job.undone()
    again = subprocess.run(
        [*command[:-8], "--engine", "local", "--workers", "2", "--lease-timeout", "20s"],
        env={**slurm.environment, **run.environment(0.0)}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "Traceback" not in again.stderr
    run.assert_complete()
