"""Engines: every worker gets one loop, and lost workers, loops, schedulers and Ctrl-C lose nothing.

Most tests put a light loop in the place of the real one, which claims units and sleeps. One runs the
real worker through kills and compares every byte with a calm run.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.config
import pytest
from distributed import Client, Security
from pydantic import ValidationError

from cache import errors
from cache.errors import EmocacheError, ExtractionStopped, ManifestError, SchemaError
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.storage import LocalStorage
from cache.store import TokenStore
from extract.config import WorkerConfig, n_cores
from extract.encoders.bank import EncoderBank
from extract.engines import loops, supervisor
from extract.engines.clusters import LocalFleet
from extract.engines.job_scripts import dask_settings
from extract.engines.loops import JOB_STARTED, LoopEnd, run_loop, time_left_s
from extract.engines.options import EngineKind, EngineOptions, EngineState
from extract.engines.start import job_script, run_engine
from extract.index import index_folder
from extract.jobs.job import Job, PlanDocument, PlannedUnit, Receipt
from extract.plan import make_plan, open_job
from extract.run import extract, worker_config
from extract.workers import worker as worker_module
from tests.media import write_clip
from tests.slurm import wait_until

Loop = Callable[[str, float | None, bool], str]
pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[1]
JOB_ID = "0123456789abcdef"


# ---------------------------------------------------------------- a job of nothing but units


def new_job(root: Path, specs: dict[str, TokenSpec], n_units: int) -> Job:
    units = tuple(PlannedUnit(rows=(n,), specs=(0,)) for n in range(n_units))
    plan = PlanDocument(
        created="2026-11-21T00:00:00+00:00",
        specs=(specs["audio"],),
        n_records=n_units,
        units=units,
        unit_clips=1,
    )
    return Job.open_or_create(LocalStorage(root), plan, JOB_ID)


def config_of(job: Job, session: str = "s1", **changes: Any) -> WorkerConfig:
    fields: dict[str, Any] = {
        "store": job.storage.url,
        "manifest": "none",
        "media_root": "none",
        "specs": job.plan.specs,
        "weights": {},
        "job_id": job.job_id,
        "generation": job.generation,
        "session": session,
        "heartbeat_s": 0.5,
        "lease_timeout_s": 3.0,
    }
    return WorkerConfig(**{**fields, **changes})


def light_loop(
    unit_s: float,
    fail_on: dict[int, dict[str, Any]] | None = None,
    first_end: dict[str, Any] | None = None,
) -> Loop:
    """Return a loop that works on units by waiting, and notes `<unit>-<pid>` in `<store>/started`.

    Args:
        unit_s: How long a unit takes.
        fail_on: Unit -> fields of the `LoopEnd` with which its first holder ends.
        first_end: The same for whoever takes a unit first; which, chance decides.
    """
    fails = dict(fail_on or {})

    # An inner function travels to the workers as it is, without this module and its imports.
    def loop(config_json: str, walltime_s: float | None, rank_by_name: bool) -> str:
        import multiprocessing
        import os
        import time
        from contextlib import suppress
        from pathlib import Path

        import dask.config
        from distributed import get_worker

        from cache.storage import LocalStorage
        from extract.config import WorkerConfig
        from extract.engines.loops import LoopEnd, let_worker_drain
        from extract.jobs.job import Job, Receipt
        from extract.jobs.session import WorkerSession
        from extract.workers.drain import Drain, registered

        let_worker_drain()
        config = WorkerConfig.model_validate_json(config_json)
        job = Job.open(LocalStorage(Path(config.store)), config.job_id, config.generation)
        (Path(config.store) / "started").mkdir(exist_ok=True)
        drain = Drain()
        session = WorkerSession(
            job.storage, job.root, session=config.session, engine=config.engine, device="cpu",
            heartbeat_s=config.heartbeat_s, lease_timeout_s=config.lease_timeout_s,
        )  # fmt: skip
        facts = {
            "daemon": multiprocessing.current_process().daemon,
            "profile": dask.config.get("distributed.worker.profile.enabled"),
            "name": str(get_worker().name),
            "rank_by_name": rank_by_name,
            "n_threads": config.n_threads,
        }
        session.update(note=repr(facts))
        with registered(drain), session:
            while not drain.is_set() and not session.should_stop.is_set():
                claim = job.claim(session)
                if claim is None:
                    if not job.undone():
                        break
                    time.sleep(0.2)
                    continue
                mark = Path(config.store) / "started" / f"{claim.unit}-{os.getpid()}"
                mark.touch()
                session.beat(unit=claim.unit)
                end = fails.get(claim.unit) if claim.attempt == 0 else None
                if first_end is not None:
                    with suppress(FileExistsError):
                        (Path(config.store) / "first").touch(exist_ok=False)
                        end = first_end
                if end is not None:
                    job.release(claim)
                    return LoopEnd(**end).model_dump_json()
                end_s = time.monotonic() + unit_s
                while time.monotonic() < end_s and not drain.is_set():
                    time.sleep(0.05)
                if drain.is_set():
                    job.release(claim)
                    break
                job.finish(
                    claim,
                    Receipt(
                        unit=claim.unit, worker_id=session.worker_id, session=config.session,
                        engine=config.engine, device="cpu", started_s=0, ended_s=unit_s, n_clips=1,
                    ),
                )  # fmt: skip
            reason = drain.reason or ("told to stop" if session.should_stop.is_set() else None)
            session.close(reason)
        return LoopEnd(end_reason=reason).model_dump_json()

    return loop


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Look often, so that tests are short."""
    monkeypatch.setattr(supervisor, "TICK_S", 0.2)
    monkeypatch.setattr(supervisor, "_LOOK_EVERY_S", 0.5)
    monkeypatch.setattr(supervisor, "_REST_S", 0.5)
    monkeypatch.setattr(supervisor, "_CONNECT_S", 2.0)
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1s"}):
        yield


def started(job: Job) -> list[tuple[int, int]]:
    """Return (unit, pid) of every unit that a light loop began."""
    folder = Path(job.storage.url) / "started"
    names = os.listdir(folder) if folder.exists() else []
    return sorted((int(u), int(p)) for u, p in (name.split("-") for name in names))


def end_reasons(job: Job) -> list[str | None]:
    return [state.end_reason for state, _ in job.workers() if state.ended]


def children() -> list[str]:
    """Return the command lines of the processes that this one started and that live, at any depth."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            # Python keeps one process that cleans up after it.
            if fields[0] != "Z" and "resource_tracker" not in command:
                parents[int(entry.name)], commands[int(entry.name)] = int(fields[1]), command
    found, before = {os.getpid()}, 0
    while len(found) != before:
        before = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return [commands[pid] for pid in sorted(found - {os.getpid()})]


def assert_no_children(timeout_s: float = 60) -> None:
    wait_until(lambda: not children(), f"these end: {children()}", timeout_s)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "inline", "workers": 2}, r"--engine inline is one worker, got --workers 2"),
        ({"kind": "local", "min_workers": 3, "workers": 2}, r"--min-workers 3 exceeds --workers 2"),
        ({"kind": "dask"}, r"--engine dask needs --scheduler"),
        ({"kind": "slurm", "scheduler": "tcp://a:1"}, r"--engine slurm takes no --scheduler"),
        ({"kind": "local", "queue": "gpu"}, r"--engine local submits no jobs.*--queue"),
        ({"kind": "local", "walltime_s": 60}, r"--engine local submits no jobs.*--walltime"),
        ({"kind": "ssh"}, r"'inline', 'local', 'dask'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: Any, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EngineOptions(**options)


def test_a_walltime_too_short_for_a_unit_is_refused_before_anything_is_queued(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=4)
    config = config_of(job)
    monkeypatch.setenv("PATH", str(tmp_path))  # with no sbatch: nothing can be submitted

    def run(walltime_s: float) -> None:
        run_engine(EngineOptions(kind="slurm", walltime_s=walltime_s), config, job)

    with pytest.raises(
        SchemaError, match=r"170 s is too short: a unit takes 60 s, at a guess.*3m or more"
    ):
        run(170)
    with pytest.raises(ExtractionStopped, match=r"`sbatch`, which is not on this machine"):
        run(180)
    for unit, seconds in enumerate((200.0, 300.0, 1000.0)):
        receipt = Receipt(
            unit=unit, worker_id="w", session="s", engine="inline", device="cpu",
            started_s=5.0, ended_s=5.0 + seconds, n_clips=1,
        )  # fmt: skip
        job.storage.create(
            f"{job.root}/receipts/{unit:06d}.json", receipt.model_dump_json().encode()
        )
    with pytest.raises(SchemaError, match=r"419 s is too short: a unit takes 300 s, as the 3 done"):
        run(419)
    with pytest.raises(ExtractionStopped, match=r"sbatch"):
        run(420)


def test_gpus_that_are_not_there_are_refused(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    two_each = EngineOptions(kind="local", workers=3, gpus_per_worker=1)
    with pytest.raises(SchemaError, match=r"3 workers want 3 GPUs, torch sees 2"):
        run_engine(two_each, config_of(job, device="cuda"), job)
    with pytest.raises(SchemaError, match=r"--gpus-per-worker 1, but the workers run on cpu"):
        run_engine(two_each, config_of(job), job)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(SchemaError, match=r"1 workers want 1 GPUs, torch sees 0"):
        run_engine(EngineOptions(kind="inline"), config_of(job, device="cuda"), job)


# ---------------------------------------------------------------- job scripts


def script_of(
    tmp_path: Path, specs: dict[str, TokenSpec], kind: EngineKind = "slurm", **options: Any
) -> str:
    job = new_job(tmp_path / "s", specs, n_units=1)
    chosen = EngineOptions(kind=kind, log_dir=tmp_path / "logs", **options)
    return job_script(chosen, config_of(job, device="cuda"))


def directives(script: str, mark: str = "#SBATCH ") -> list[str]:
    return [line.removeprefix(mark) for line in script.splitlines() if line.startswith(mark)]


def test_a_slurm_script_asks_for_what_was_asked_for(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    script = script_of(
        tmp_path, specs, workers=4, walltime_s=4 * 3600, gpus_per_worker=1, cpus_per_worker=8,
        memory_bytes=64 * 2**30, queue="gpu", account="emo", job_extra=("--constraint=a100",),
        prologue=("module load cuda",),
    )  # fmt: skip
    assert set(directives(script)) == {
        "-J emocache",
        f"-e {tmp_path}/logs/emocache-%J.err",
        f"-o {tmp_path}/logs/emocache-%J.out",
        "-p gpu",
        "-A emo",
        "-n 1",
        "--cpus-per-task=8",
        "--mem=64G",
        "-t 04:00:00",
        "--requeue",
        "--gres=gpu:1",
        "--constraint=a100",
    }
    *_, command = script.strip().splitlines()
    words = shlex.split(command)
    assert words[:3] == [sys.executable, "-m", "distributed.cli.dask_worker"]
    values = dict(itertools.pairwise(words))
    assert values["--nthreads"] == "1"
    assert "--nanny" in words
    assert "--no-dashboard" in words
    lifetime_s = int(values["--lifetime"].removesuffix("s"))
    stagger_s = int(values["--lifetime-stagger"].removesuffix("s"))
    assert lifetime_s == 4 * 3600 - 120
    assert 0 < stagger_s < 60, "not all at once, and never behind the walltime"
    assert script.index("module load cuda") > script.index("export OMP_NUM_THREADS=8")
    assert script.index("module load cuda") < script.index(command)
    assert "Scheduler" not in [thread.name for thread in threading.enumerate()]


def test_a_script_without_memory_leaves_it_to_the_cluster(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    assert not [d for d in directives(script_of(tmp_path, specs)) if "--mem" in d]
    assert "-t 00:30:00" in directives(script_of(tmp_path, specs)), "dask-jobqueue's default"


@pytest.mark.parametrize(
    ("kind", "mark", "wanted"),
    [
        ("pbs", "#PBS ", ["-l select=1:ncpus=4:mem=2048mb:ngpus=1", "-l walltime=01:30:00", "-r y"]),
        ("lsf", "#BSUB ", ['-gpu "num=1"', "-n 4", "-W 01:30", "-r"]),
        ("htcondor", "", ["request_gpus = 1", "RequestCpus = 4"]),
    ],
)  # fmt: skip
def test_other_batch_systems_get_their_own_words(
    tmp_path: Path, specs: dict[str, TokenSpec], kind: Any, mark: str, wanted: Sequence[str]
) -> None:
    script = script_of(
        tmp_path, specs, kind, walltime_s=5400, gpus_per_worker=1, cpus_per_worker=4,
        memory_bytes=2**31,
    )  # fmt: skip
    lines = directives(script, mark) if mark else script.splitlines()
    assert set(wanted) <= set(lines)
    assert "DASK_DISTRIBUTED__WORKER__DAEMON=False" in script


@pytest.mark.parametrize(("kind", "words"), [("sge", "-l gpu=2"), ("oar", "-p gpu_count>1")])
def test_where_gpus_have_a_local_name_it_must_be_given(
    tmp_path: Path, specs: dict[str, TokenSpec], kind: Any, words: str
) -> None:
    with pytest.raises(SchemaError, match=rf"{kind.upper()} names GPUs differently.*--job-extra"):
        script_of(tmp_path, specs, kind, gpus_per_worker=2)
    assert words in script_of(tmp_path, specs, kind, gpus_per_worker=2, job_extra=(words,))


def test_an_engine_without_jobs_has_no_script(tmp_path: Path, specs: dict[str, TokenSpec]) -> None:
    job = new_job(tmp_path / "s", specs, n_units=1)
    with pytest.raises(SchemaError, match=r"--engine local submits no jobs.*slurm"):
        job_script(EngineOptions(kind="local"), config_of(job))


def test_the_settings_reach_the_workers_of_other_machines(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    """The script's exports, run by a shell, make a fresh Dask see every setting."""
    script = script_of(tmp_path, specs, worker_ttl_s=45.0)
    exports = [line for line in script.splitlines() if line.startswith("export ")]
    keys = list(dask_settings())
    ask = (
        "import dask.config, distributed, json, os; "
        f"print(json.dumps([dask.config.get(k) for k in {keys!r}] + [float(os.environ['{JOB_STARTED}'])]))"
    )
    command = "\n".join([*exports, f"exec {shlex.quote(sys.executable)} -c {shlex.quote(ask)}"])
    answer = subprocess.run(
        ["sh", "-ec", command], capture_output=True, text=True, check=True, timeout=120
    )
    *values, job_started_s = json.loads(answer.stdout)
    assert dict(zip(keys, values, strict=True)) == dask_settings(45.0)
    assert dask_settings(45.0)["distributed.scheduler.worker-ttl"] == "45s"
    assert abs(time.time() - job_started_s) < 120


# ---------------------------------------------------------------- inside a Dask worker


def our_errors() -> list[type[EmocacheError]]:
    found = [
        c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, EmocacheError)
    ]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("cls", our_errors())
def test_errors_of_ours_survive_the_network(
    cls: type[EmocacheError],
    tmp_path: Path,
    specs: dict[str, TokenSpec],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = "a.mp4: was wrong; got 3, allowed: 1, 2"

    def fail(config_json: str, rank: int = 0) -> str:
        raise cls(message)

    monkeypatch.setattr(worker_module, "work", fail)
    monkeypatch.setattr(loops, "let_worker_drain", lambda: None)
    job = new_job(tmp_path, specs, n_units=1)
    end = LoopEnd.model_validate_json(run_loop(config_of(job).model_dump_json(), None, False))
    assert end.must_stop is (cls is not errors.EncoderError), "one bad device is no reason to stop"
    error = end.as_error()
    assert type(error) is cls
    assert str(error) == message
    again = pickle.loads(pickle.dumps(cls(message)))
    assert (type(again), str(again)) == (cls, message)


def test_an_error_that_needs_other_arguments_survives_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Demanding(EmocacheError):
        def __init__(self, *, uid: str) -> None:
            super().__init__(f"clip {uid}")

    monkeypatch.setattr(errors, "Demanding", Demanding, raising=False)
    error = LoopEnd(error="Demanding", message="clip 7").as_error()
    assert (type(error), str(error)) == (Demanding, "clip 7")
    unknown = LoopEnd(error="OtherPackageError", message="boom").as_error()
    assert (type(unknown), str(unknown)) == (EmocacheError, "OtherPackageError: boom")


def test_a_worker_knows_when_its_job_ends_not_its_process(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nanny may have replaced the process in mid-job."""
    seen: list[float | None] = []

    def work(config_json: str, rank: int = 0) -> str:
        seen.append(WorkerConfig.model_validate_json(config_json).drain_after_s)
        raise errors.StoppedError("enough")

    monkeypatch.setattr(worker_module, "work", work)
    monkeypatch.setattr(loops, "let_worker_drain", lambda: None)
    config = config_of(new_job(tmp_path, specs, 1), drain_after_s=480.0).model_dump_json()
    monkeypatch.setenv(JOB_STARTED, str(time.time() - 400))
    run_loop(config, 600.0, False)
    assert seen[0] == pytest.approx(80, abs=20)
    monkeypatch.setenv(JOB_STARTED, str(time.time() - 481))
    end = LoopEnd.model_validate_json(run_loop(config, 600.0, False))
    assert end.expired
    assert len(seen) == 1, "a job at its end starts nothing"
    monkeypatch.delenv(JOB_STARTED)
    assert time_left_s(600.0, 480.0) is None


# ---------------------------------------------------------------- processes of this machine


@pytest.mark.fault("extraction: SIGTERM of a local worker")
@pytest.mark.usefixtures("quick")
def test_local_workers_share_the_units_and_a_terminated_one_gives_its_unit_back(
    tmp_path: Path,
    specs: dict[str, TokenSpec],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=10)
    monkeypatch.setattr(supervisor, "run_loop", light_loop(0.5))
    before = dict(os.environ)
    states: list[EngineState] = []
    terminated: list[int] = []

    def on_tick(state: EngineState) -> None:
        states.append(state)
        pids = [pid for _, pid in started(job)]
        if not terminated and len(set(pids)) == 2:
            terminated.append(pids[0])
            os.kill(pids[0], signal.SIGTERM)

    logs = tmp_path / "logs"
    end = run_engine(
        EngineOptions(kind="local", workers=2, log_dir=logs), config_of(job), job, on_tick
    )
    assert job.undone() == []
    assert not end.is_stopping
    assert f"logs: tail -F {logs}/s1-*.log" in end.notes
    assert {(s.kind, s.n_wanted) for s in states} == {("local", 2)}
    assert max(s.n_workers for s in states) == 2
    times = Counter(unit for unit, _ in started(job))
    assert set(times) == set(range(10))
    assert times.total() <= 11, "only the unit in the terminated worker's hands began twice"
    assert "its Dask worker closes" in end_reasons(job), "it gave its unit back itself"
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", ""), "the terminal belongs to the front"
    facts = [eval(state.note or "") for state, _ in job.workers()]
    assert {(f["daemon"], f["profile"], f["rank_by_name"]) for f in facts} == {(False, False, True)}
    assert {f["name"] for f in facts} == {"0", "1"}, "the number that chooses a GPU stays"
    assert {f["n_threads"] for f in facts} == {max(1, n_cores() // 2 - 1)}
    assert_no_children()


def test_nobody_else_may_talk_to_our_workers(tmp_path: Path) -> None:
    """Whoever can talk to a Dask scheduler can run anything as its user."""
    fleet = LocalFleet(EngineOptions(kind="local"))
    try:
        with fleet.connect(60) as client:
            address = client.scheduler.address
            assert client.submit(os.getpid).result(timeout=60) != os.getpid()
        assert address.startswith("tls://127.0.0.1:")
        stranger = Security.temporary()  # keys, but not ours
        with pytest.raises(OSError, match=r"certificate does not match"):
            Client(address, security=stranger, timeout=5)
        with pytest.raises(OSError, match=r"Timed out|closed"):
            Client(address.replace("tls://", "tcp://"), timeout=2)
    finally:
        fleet.close()


@pytest.mark.fault("extraction: Ctrl-C, once and twice")
@pytest.mark.usefixtures("quick")
def test_ctrl_c_drains_and_a_second_one_ends_it(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=50)
    monkeypatch.setattr(supervisor, "run_loop", light_loop(0.5))

    def once(state: EngineState) -> None:
        if job.n_done() >= 2 and not job.stop_requested("first"):
            os.kill(os.getpid(), signal.SIGINT)

    options = EngineOptions(kind="local", workers=2)
    handler = signal.getsignal(signal.SIGINT)
    state = run_engine(options, config_of(job, "first"), job, once)
    assert state.is_stopping
    assert any("once more ends it at once" in note for note in state.notes)
    done = job.n_done()
    assert 0 < done < 50
    assert end_reasons(job) == ["told to stop"] * 2
    assert signal.getsignal(signal.SIGINT) is handler

    def twice(state: EngineState) -> None:
        if len(started(job)) > done + 1:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run_engine(options, config_of(job, "second"), job, twice)
    assert job.stop_requested("second")
    assert_no_children()


@pytest.mark.usefixtures("quick")
def test_an_error_of_ours_ends_the_run(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = {"error": "StoreError", "message": "/store: no space left", "must_stop": True}
    # Each worker begins at a place of its own: wherever that is, such a unit is near.
    fails = dict.fromkeys(range(0, 200, 5), end)
    job = new_job(tmp_path / "s", specs, n_units=200)
    monkeypatch.setattr(supervisor, "run_loop", light_loop(0.1, fails))
    with pytest.raises(errors.StoreError, match=r"^/store: no space left$"):
        run_engine(EngineOptions(kind="local", workers=2), config_of(job), job)
    assert len(job.undone()) > 100
    assert job.stop_requested("s1")


@pytest.mark.usefixtures("quick")
def test_a_bad_device_does_not_end_the_run_and_all_is_watched_while_its_worker_starts_anew(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    end = {"error": "EncoderError", "message": "CUDA error: ECC"}
    job = new_job(tmp_path / "s", specs, n_units=30)
    monkeypatch.setattr(supervisor, "run_loop", light_loop(0.5, first_end=end))
    seen: list[int] = []
    options = EngineOptions(kind="local", workers=2)
    run_engine(options, config_of(job), job, lambda state: seen.append(state.n_workers))
    assert job.undone() == []
    assert len({pid for _, pid in started(job)}) == 3
    n_workers = [n for n, _ in itertools.groupby(seen[seen.index(2) :])]
    assert n_workers[:3] == [2, 1, 2], "nobody looked while the second worker was away"


@pytest.mark.usefixtures("quick")
def test_workers_that_always_fail_end_the_run(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=3)
    end = LoopEnd(error="EncoderError", message="CUDA error: ECC").model_dump_json()
    monkeypatch.setattr(supervisor, "run_loop", lambda *_: end)
    with pytest.raises(ExtractionStopped, match=r"4 workers failed and none ended well.*ECC"):
        run_engine(EngineOptions(kind="local", workers=1), config_of(job), job)


@pytest.mark.usefixtures("quick")
def test_a_worker_without_work_is_given_back_where_fewer_are_enough(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=3)
    # Two short units and a long one: at the end, one worker waits for the other.
    quick, slow = light_loop(0.1), light_loop(6.0)

    def loop(config_json: str, walltime_s: float | None, rank_by_name: bool) -> str:
        from distributed import get_worker

        chosen = slow if get_worker().name == 0 else quick
        return chosen(config_json, walltime_s, rank_by_name)

    monkeypatch.setattr(supervisor, "run_loop", loop)
    seen: list[tuple[int, int]] = []
    run_engine(
        EngineOptions(kind="local", workers=2, min_workers=1), config_of(job), job,
        lambda state: seen.append((state.n_workers, state.n_wanted)),
    )  # fmt: skip
    assert job.undone() == []
    assert (2, 2) in seen
    assert seen[-2] == (1, 1), "it went before the end"
    assert len(started(job)) == 3, "the busy one was left alone"


@pytest.mark.fault("extraction: walltime over")
@pytest.mark.usefixtures("quick")
def test_a_worker_whose_walltime_is_over_is_replaced(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=6)
    light, marks = light_loop(0.2), tmp_path / "expired"
    marks.mkdir()

    def loop(config_json: str, walltime_s: float | None, rank_by_name: bool) -> str:
        import os

        from distributed import get_worker

        from extract.engines.loops import LoopEnd

        name = get_worker().name
        if not any(n.startswith(f"{name}-") for n in os.listdir(marks)):
            (marks / f"{name}-{os.getpid()}").touch()
        if f"{name}-{os.getpid()}" in os.listdir(marks):
            return LoopEnd(expired=True).model_dump_json()
        return light(config_json, walltime_s, rank_by_name)

    monkeypatch.setattr(supervisor, "run_loop", loop)
    run_engine(EngineOptions(kind="local", workers=2), config_of(job), job)
    assert job.undone() == []
    expired = {int(name.partition("-")[2]) for name in os.listdir(marks)}
    assert len(expired) == 2
    assert expired.isdisjoint(pid for _, pid in started(job))


# ---------------------------------------------------------------- somebody else's cluster


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def dask_process(*arguments: str, modules: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run `dask scheduler` or `dask worker`, with modules of a folder; it ends with the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=modules,
        env={**os.environ, "PYTHONPATH": str(modules)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def scheduler_at(port: int) -> Any:
    return dask_process(
        "distributed.cli.dask_scheduler",
        "--host", "127.0.0.1", "--port", str(port), "--no-dashboard", modules=REPOSITORY,
    )  # fmt: skip


def worker_of(port: int, *more: str, modules: Path = REPOSITORY) -> Any:
    return dask_process(
        "distributed.cli.dask_worker", f"tcp://127.0.0.1:{port}", "--nthreads", "1",
        "--no-dashboard", *more, modules=modules,
    )  # fmt: skip


@pytest.mark.fault("extraction: Dask scheduler restarted")
@pytest.mark.usefixtures("quick")
def test_a_restarted_scheduler_is_found_again_and_lacking_workers_are_told_of(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_WATCH_S", 1.0)
    job = new_job(tmp_path / "s", specs, n_units=16)
    monkeypatch.setattr(supervisor, "run_loop", light_loop(0.5))
    port = free_port()
    options = EngineOptions(kind="dask", scheduler=f"tcp://127.0.0.1:{port}", workers=2)
    notes: list[tuple[str, ...]] = []
    ended: list[EngineState] = []

    def run() -> None:  # not in the main thread: engines must do without signals there
        ended.append(run_engine(options, config_of(job), job, lambda s: notes.append(s.notes)))

    runner = threading.Thread(target=run)
    runner.start()
    with scheduler_at(port), worker_of(port):
        wait_until(lambda: job.n_done() > 2, "the first units are done")
    before = job.n_done()
    assert before < 16
    wait_until(lambda: "does not answer" in str(notes[-1]), "the loss is noticed")
    with scheduler_at(port), worker_of(port, "--no-nanny"):
        wait_until(lambda: job.n_done() > before, "work goes on")
        assert "does not answer" not in str(notes[-1])
        wait_until(lambda: "1 of 2 workers for" in str(notes[-1]) or ended, "too few are noticed")
        runner.join(120)
    assert not runner.is_alive()
    assert ended
    assert job.undone() == []
    assert "its Dask worker closes" in end_reasons(job), "the lost worker gave its unit back"


@pytest.mark.usefixtures("quick")
def test_no_workers_and_no_scheduler_are_errors_after_a_while(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    job = new_job(tmp_path / "s", specs, n_units=1)
    port = free_port()
    options = EngineOptions(
        kind="dask", scheduler=f"tcp://127.0.0.1:{port}", workers=3, start_timeout_s=2
    )
    with pytest.raises(
        ExtractionStopped, match=r"the Dask scheduler does not answer .*, for \d+ s"
    ):
        run_engine(options, config_of(job), job)
    (tmp_path / "extract.py").touch()  # something else of that name
    with scheduler_at(port):
        wait_until(lambda: answers(port), "the scheduler listens")
        said = rf"no worker has started: asked for 3, .*dask worker tcp://127.0.0.1:{port}"
        with pytest.raises(ExtractionStopped, match=said):
            run_engine(options, config_of(job), job)
        with worker_of(port, modules=tmp_path), Client(f"tcp://127.0.0.1:{port}") as client:
            client.wait_for_workers(1, timeout=60)
            with pytest.raises(
                ExtractionStopped,
                match=r"no worker has started.*1 Dask workers cannot load emocache.*ModuleNotFoundError",
            ):
                run_engine(options, config_of(job), job)


# ---------------------------------------------------------------- a batch system that does not play


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Put programs named like Slurm's into the path; return the file in which scancel notes its work."""

    def install(sbatch: str, squeue: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir()
        cancelled = tmp_path / "cancelled"
        for name, body in (
            ("sbatch", sbatch),
            ("squeue", squeue),
            ("scancel", f'echo "$@" >> {cancelled}'),
        ):
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return cancelled

    return install


@pytest.mark.usefixtures("quick")
def test_jobs_that_never_start_are_cancelled_and_explained(
    tmp_path: Path, specs: dict[str, TokenSpec], fake_slurm: Callable[..., Path]
) -> None:
    cancelled = fake_slurm(
        sbatch=(
            f"exec 9> {tmp_path}/lock; flock 9; echo x >> {tmp_path}/n; "
            f'echo "Submitted batch job $(wc -l < {tmp_path}/n)"'
        ),
        squeue='echo "1 PENDING (Resources)"; echo "9 RUNNING (None)"',
    )
    job = new_job(tmp_path / "s", specs, n_units=4)
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "emocache-2.err").write_text("first\n/usr/bin/python: No module named distributed\n")
    options = EngineOptions(
        kind="slurm", workers=2, walltime_s=3600, start_timeout_s=4, log_dir=logs
    )
    with pytest.raises(ExtractionStopped) as caught:
        run_engine(options, config_of(job), job)
    said = str(caught.value)
    assert "asked for 2" in said
    assert "job 1 PENDING (Resources); job 2 is no longer in the queue" in said
    assert "No module named distributed" in said
    assert str(logs) in said
    assert {"1", "2"} <= set(cancelled.read_text().split())
    assert "9" not in cancelled.read_text().split(), "a job of somebody else's"
    assert not list(logs.glob(".dask-keys-*")), "keys do not outlive the run"


@pytest.mark.usefixtures("quick")
def test_a_refused_job_is_submitted_again_and_a_lasting_refusal_ends_the_run(
    tmp_path: Path, specs: dict[str, TokenSpec], fake_slurm: Callable[..., Path]
) -> None:
    fake_slurm(
        sbatch=f"echo x >> {tmp_path}/n; echo 'sbatch: error: invalid partition: gpuu' >&2; exit 1",
        squeue="exit 1",
    )
    job = new_job(tmp_path / "s", specs, n_units=4)
    options = EngineOptions(kind="slurm", workers=1, walltime_s=3600, queue="gpuu")
    with pytest.raises(
        ExtractionStopped, match=r"slurm refuses the jobs: sbatch: error: invalid partition: gpuu"
    ):
        run_engine(options, config_of(job), job)
    assert len((tmp_path / "n").read_text().split()) >= 3, "a busy controller gets another chance"


# ---------------------------------------------------------------- the real worker

SLOW_DECODER = """\
import sys, time
seconds = float(sys.argv.pop(1))
from extract import decode_worker
prepare = decode_worker.prepare_inputs
def slowly(*args, **more):
    time.sleep(seconds)
    return prepare(*args, **more)
decode_worker.prepare_inputs = slowly
decode_worker.main()
"""
"""A decoder that takes its time, so that faults strike in the middle of a unit."""


def slow_decoder(folder: Path, seconds: float) -> tuple[str, ...]:
    path = folder / "slow_decoder.py"
    path.write_text(SLOW_DECODER)
    return (sys.executable, str(path), str(seconds))


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


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Path]:
    """Return the folder, its manifest, and the manifest's file."""
    folder = tmp_path_factory.mktemp("media")
    for seed in range(12):
        write_clip(folder / f"{seed:02d}.mp4", seed=seed, seconds=0.4)
    path = folder / "m.parquet"
    manifest, _ = index_folder(folder, path)
    write_manifest(path, manifest)
    return folder, manifest, path


@pytest.mark.fault("extraction: kill -9 of a local worker")
@pytest.mark.fault("extraction: SIGSTOP of a local worker")
def test_killed_and_stopped_workers_lose_nothing_and_change_no_byte(
    tmp_path: Path, media: tuple[Path, Manifest, Path], bank: EncoderBank
) -> None:
    folder, manifest, path = media
    calm = TokenStore.open_or_create(tmp_path / "calm")
    plan = make_plan(manifest.records, bank.specs, calm, unit_clips=2)
    extract(plan, manifest.records, bank, calm, folder, n_threads=1)
    expected = contents(calm, bank.specs)
    assert len(expected) == 3 * 12

    store = TokenStore.open_or_create(tmp_path / "s")
    job = open_job(
        store, manifest.records, make_plan(manifest.records, bank.specs, store, unit_clips=2)
    )
    config = worker_config(
        job, bank, store, manifest=path, media_root=folder, session="s1", n_threads=1,
        heartbeat_s=0.5, lease_timeout_s=4.0, decoder_command=slow_decoder(tmp_path, 0.7),
    )  # fmt: skip
    struck: dict[str, int] = {}

    def on_tick(state: EngineState) -> None:
        alive = [s.pid for s, is_alive in job.workers() if is_alive and s.unit is not None]
        if "killed" not in struck and alive:
            struck["killed"] = alive[0]
            os.kill(alive[0], signal.SIGKILL)
        elif "stopped" not in struck and job.n_done() and alive:
            struck["stopped"] = alive[-1]
            os.kill(alive[-1], signal.SIGSTOP)

    options = EngineOptions(kind="local", workers=2, worker_ttl_s=5.0, log_dir=tmp_path / "logs")
    run_engine(options, config, job, on_tick)
    assert set(struck) == {"killed", "stopped"}
    assert job.undone() == []
    assert contents(store, bank.specs) == expected
    logs = [p.read_text() for p in (tmp_path / "logs").glob("s1-*.log")]
    assert sum("starts on cpu" in log for log in logs) >= 3, "each worker process logs to its file"
    assert_no_children()  # decoders neither


def test_inline_runs_here_and_its_errors_and_ticks_come_through(
    tmp_path: Path, media: tuple[Path, Manifest, Path], bank: EncoderBank
) -> None:
    folder, manifest, path = media
    store = TokenStore.open_or_create(tmp_path / "s")
    job = open_job(store, manifest.records, make_plan(manifest.records, bank.specs, store))
    config = worker_config(
        job, bank, store, manifest=path, media_root=folder, session="s1", n_threads=1
    )
    short, _ = index_folder(folder, tmp_path / "m.parquet")
    write_manifest(tmp_path / "m.parquet", Manifest(header=short.header, records=short.records[:3]))
    wrong = config.model_copy(update={"manifest": str(tmp_path / "m.parquet")})
    for kind in ("inline", "local"):
        with pytest.raises(ManifestError, match=r"holds 3 records, the job was planned on 12"):
            run_engine(EngineOptions(kind=kind), wrong, job)
    states: list[EngineState] = []
    end = run_engine(
        EngineOptions(), config.model_copy(update={"session": "s2"}), job, states.append
    )
    assert (end.kind, end.is_stopping) == ("inline", False)
    assert states
    assert job.undone() == []
    assert len(contents(store, bank.specs)) == 3 * 12
