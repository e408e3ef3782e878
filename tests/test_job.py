"""Jobs: many workers, one plan, nothing between them but the store; every fault caused on purpose."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Barrier
from typing import Any, TypeVar

import pytest
from pydantic import ValidationError

from cache.clip import Clip, Record, Subtitle
from cache.commit import Status
from cache.errors import SchemaError, StoreError
from cache.object_storage import ObjectStorage
from cache.spec import TokenSpec
from cache.storage import LocalStorage, Storage
from extract.failures import Evidence
from extract.jobs.job import (
    Job,
    PlanDocument,
    PlannedUnit,
    Receipt,
    ReceiptFailure,
    Strikes,
    job_id,
)
from extract.jobs.lease import Claim, Leases
from extract.jobs.session import WorkerSession, WorkerState, host_identity, process_started
from tests.object_store import environment, make_bucket, moto_server
from tests.processes import clean_context, run_apart

Specs = dict[str, TokenSpec]
T = TypeVar("T")
JOB_ID = "0123456789abcdef"
PATIENT_S = 60.0
"""A lease timeout that no test outlasts: what is claimed is claimed for another reason."""


def plan_of(specs: Specs, n_units: int = 3, **changes: Any) -> PlanDocument:
    units = tuple(PlannedUnit(rows=(2 * n, 2 * n + 1), specs=(0, 1)) for n in range(n_units))
    fields = {
        "created": "2026-11-21T00:00:00+00:00",
        "specs": (specs["audio"], specs["video"]),
        "n_records": 2 * n_units,
        "units": units,
        "unit_clips": 2,
    }
    return PlanDocument(**{**fields, **changes})


def job_of(storage: Storage, specs: Specs, n_units: int = 3) -> Job:
    return Job.open_or_create(storage, plan_of(specs, n_units), JOB_ID)


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "store")


@pytest.fixture
def job(local: LocalStorage, specs: Specs) -> Job:
    """Three units on a disk."""
    return job_of(local, specs)


def worker(
    job: Job, session: str = "run-1", heartbeat_s: float = 0.05, lease_timeout_s: float = PATIENT_S
) -> WorkerSession:
    return WorkerSession(
        job.storage, job.root, session=session, engine="inline", device="cpu",
        heartbeat_s=heartbeat_s, lease_timeout_s=lease_timeout_s,
    )  # fmt: skip


def claimed(job: Job, me: WorkerSession, **options: Any) -> Claim:
    claim = job.claim(me, **options)
    assert claim is not None
    return claim


def receipt_of(claim: Claim, **changes: Any) -> Receipt:
    fields = {
        "unit": claim.unit, "worker_id": claim.worker_id, "session": "run-1", "engine": "inline",
        "device": "cpu", "started_s": 1.0, "ended_s": 2.0, "n_clips": len(claim.rows),
    }  # fmt: skip
    return Receipt(**{**fields, **changes})


def wait_for(look: Callable[[], T | None], timeout_s: float = 30.0) -> T:
    """Look again and again until something is there."""
    end_s = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.01)
    return found


def hold_by_hand(job: Job, unit: int, worker_id: str = "other", **changes: Any) -> None:
    """Write the files of a worker that holds a unit; by default it is on another host."""
    lease = {"worker_id": worker_id, "created": "2026-11-21T00:00:00+00:00", "nonce": worker_id}
    assert job.storage.create(f"{job.root}/leases/{unit:06d}.000", json.dumps(lease).encode())
    state = {
        "worker_id": worker_id, "session": "run-0", "engine": "slurm", "host": "n7",
        "host_identity": "n7:boot:1:0", "pid": 1, "pid_started": 1, "device": "cuda:0",
        "started_s": 0.0, "updated_s": 0.0, "encoding": ["clip"],
    }  # fmt: skip
    data = json.dumps({**state, **changes}).encode()
    job.storage.replace(f"{job.root}/workers/{worker_id}.json", data)


def age(job: Job, key: str, by_s: float) -> None:
    """Make a file of a disk older."""
    path = Path(job.storage.url) / job.root / key
    written_s = path.stat().st_mtime - by_s
    os.utime(path, (written_s, written_s))


# ---------------------------------------------------------------------------- documents


def test_a_plan_of_130_000_clips_is_written_and_read_in_well_under_a_second(
    local: LocalStorage, specs: Specs
) -> None:
    n = 130_000
    packs = [tuple(range(start, min(start + 32, n))) for start in range(0, n, 32)]
    plan = plan_of(
        specs,
        n_records=n,
        units=tuple(PlannedUnit(rows=pack, specs=(0, 1)) for pack in packs),
        unit_clips=32,
    )
    start_s = time.process_time()  # other processes may keep this one waiting
    Job.open_or_create(local, plan, JOB_ID)
    (found,) = Job.latest(local)
    assert time.process_time() - start_s < 1
    assert found.plan == plan


@pytest.mark.parametrize(
    ("rows", "spec_numbers", "message"),
    [
        ((5, 6), (0,), "unit 0 names rows outside the 6 records"),
        ((-1,), (0,), "unit 0 names rows outside the 6 records"),
        ((0,), (2,), "unit 0 names specs outside the 2 specs"),
    ],
)
def test_a_plan_that_points_nowhere_is_refused(
    specs: Specs, rows: tuple[int, ...], spec_numbers: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        plan_of(specs, units=(PlannedUnit(rows=rows, specs=spec_numbers),))


def test_a_job_is_known_by_its_clips_specs_and_retries_and_by_nothing_else(specs: Specs) -> None:
    def record(name: str, **changes: Any) -> Record:
        clip = Clip(sha256=name * 64, n_bytes=1)
        return Record(**{"uid": f"x/{name}", "media": f"{name}.mp4", "clip": clip, **changes})

    records, two = [record("a"), record("b")], [specs["audio"], specs["video"]]
    identity = job_id(records, two)
    assert len(identity) == 16
    assert int(identity, 16)
    hello = (Subtitle(text="hello"),)
    same = [record("a", subtitles=hello, split="train"), record("b", emotion="joy")]
    assert job_id(same, two[::-1]) == identity
    assert job_id(records, two, ["hang", "crash"]) == job_id(records, two, ["crash", "hang"])
    others = [
        job_id(records[::-1], two),
        job_id(records[:1], two),
        job_id([record("a", media="moved.mp4"), record("b")], two),
        job_id(records, two[:1]),
        job_id(records, two, ["crash"]),
    ]
    assert len({identity, *others}) == 6


def test_a_claim_says_what_to_do(job: Job, specs: Specs) -> None:
    with worker(job) as me:
        claim = claimed(job, me)
        assert claim.rows == (2 * claim.unit, 2 * claim.unit + 1)
        assert claim.specs == (specs["audio"], specs["video"])
        assert (claim.attempt, claim.predecessor, claim.worker_id) == (0, None, me.worker_id)
        assert job.claim(me, exclude={0, 1, 2}) is None
        age(job, f"leases/{claim.unit:06d}.000", 1000)
        assert job.claim(me, exclude={0, 1, 2} - {claim.unit}) is None  # it is ours already


# ---------------------------------------------------------------------------- generations


def test_an_unfinished_generation_is_joined_and_after_the_last_unit_the_next_one_starts(
    local: LocalStorage, specs: Specs
) -> None:
    first = job_of(local, specs)
    assert not first.joined
    assert first.root == f"jobs/{JOB_ID}/0000"
    with worker(first) as me:
        for n_done in range(3):
            again = Job.open_or_create(local, plan_of(specs, 9, created="later"), JOB_ID)
            assert again.joined
            assert again.plan == first.plan
            assert (again.n_done(), len(again.undone())) == (n_done, 3 - n_done)
            claim = claimed(again, me)
            assert again.finish(claim, receipt_of(claim))
    second = Job.open_or_create(local, plan_of(specs, 1, created="2026-11-22"), JOB_ID)
    assert not second.joined
    assert (second.generation, second.undone()) == (1, [0])
    other = Job.open_or_create(local, plan_of(specs, 1, created="2026-11-23"), "f" * 16)
    assert [j.root for j in Job.latest(local)] == [other.root, second.root, first.root]
    assert Job.open(local, JOB_ID, 0).plan == first.plan
    with pytest.raises(StoreError, match=rf"no plan of job {JOB_ID}, generation 2"):
        Job.open(local, JOB_ID, 2)


def _open_at_once(root: Path, specs: Specs, barrier: Any, name: str, out: Path) -> None:
    found = []
    for number in range(20):
        barrier.wait()
        plan = plan_of(specs, created=name)
        job = Job.open_or_create(LocalStorage(root), plan, f"{number:016x}")
        found.append((job.plan.created, job.joined))
    (out / name).write_text(json.dumps(found))


def test_processes_that_create_a_generation_at_once_agree(tmp_path: Path, specs: Specs) -> None:
    barrier = clean_context().Barrier(2)
    names = ("one", "two")
    works = [(_open_at_once, (tmp_path / "s", specs, barrier, name, tmp_path)) for name in names]
    assert run_apart(*works) == [0, 0]
    one, two = (json.loads((tmp_path / name).read_text()) for name in names)
    for (plan_one, joined_one), (plan_two, joined_two) in zip(one, two, strict=True):
        assert plan_one == plan_two == ("one" if joined_two else "two")
        assert joined_one is not joined_two


def test_a_folder_without_a_plan_is_used(local: LocalStorage, specs: Specs) -> None:
    """A creator that was killed after it had made the folder."""
    local.path(f"jobs/{JOB_ID}/0000").mkdir(parents=True)
    assert Job.latest(local) == []
    assert job_of(local, specs).generation == 0


# ---------------------------------------------------------------------------- many at once


def _work_through(storage: Storage, out: Path) -> None:
    """Claim and finish until nothing is left; write down what was claimed."""
    (job,) = Job.latest(storage)
    claims = []
    with worker(job) as me:
        while (claim := job.claim(me)) is not None:
            claims.append((claim.unit, claim.attempt))
            assert job.holds(claim)
            assert job.finish(claim, receipt_of(claim))
    out.write_text(json.dumps(claims))


def test_processes_claim_every_unit_exactly_once(
    tmp_path: Path, local: LocalStorage, specs: Specs
) -> None:
    job = job_of(local, specs, 200)
    outs = [tmp_path / "one", tmp_path / "two"]
    assert run_apart(*((_work_through, (local, out)) for out in outs)) == [0, 0]
    parts = [json.loads(out.read_text()) for out in outs]
    assert sorted(parts[0] + parts[1]) == [[unit, 0] for unit in range(200)]
    assert all(parts), "one process did everything: nothing was tested"
    assert job.undone() == []
    assert {receipt.n_clips for receipt in job.receipts()} == {2}


@pytest.mark.parametrize("is_shared", [True, False])
def test_threads_claim_every_unit_exactly_once(
    local: LocalStorage, specs: Specs, is_shared: bool
) -> None:
    shared, barrier = job_of(local, specs, 100), Barrier(8)

    def run(_: int) -> list[int]:
        (job,) = [shared] if is_shared else Job.latest(local)
        units = []
        with worker(job) as me:
            barrier.wait()
            while (claim := job.claim(me)) is not None:
                assert job.finish(claim, receipt_of(claim))
                units.append(claim.unit)
        return units

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(run, range(8)))
    assert sorted(unit for part in parts for unit in part) == list(range(100))


class CountingStorage(LocalStorage):
    """Counts listings, and creations that were refused."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.n_listings = 0
        self.n_refused = 0

    def names(self, folder: str) -> list[str]:
        self.n_listings += 1
        return super().names(folder)

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        created = super().create(key, data, durable=durable)
        self.n_refused += not created
        return created


def test_claiming_lists_seldom_and_workers_start_at_different_places(
    tmp_path: Path, specs: Specs
) -> None:
    storage = CountingStorage(tmp_path / "s")
    job = job_of(storage, specs, 500)
    with worker(job) as me:
        storage.n_listings = 0
        for _ in range(40):
            claimed(job, me)
        assert storage.n_listings == 2  # leases and receipts, for all of them
        assert storage.n_refused == 0
        firsts = set()
        for _ in range(6):
            with worker(job) as other:
                firsts.add(claimed(Job.latest(storage)[0], other).unit)
        assert max(firsts) - min(firsts) > 6


# ---------------------------------------------------------------------------- giving back


def test_a_released_unit_is_free_at_once_and_keeps_its_partial_receipt(job: Job) -> None:
    (other,) = Job.latest(job.storage)
    with worker(job) as one, worker(other) as two:
        claims = [claimed(job, one) for _ in range(3)]
        assert other.claim(two) is None
        job.release(claims[1], receipt_of(claims[1], n_clips=1))
        taken = claimed(other, two)
        assert (taken.unit, taken.attempt, taken.predecessor) == (claims[1].unit, 1, None)
        assert other.claim(two) is None
        assert len(job.undone()) == 3
        other.release(taken)
        again = claimed(job, one)
        assert (again.unit, again.attempt) == (taken.unit, 2)
        assert job.finish(again, receipt_of(again, n_clips=1, partial=True))
        receipts = job.receipts()
        assert [(r.unit, r.n_clips, r.partial) for r in receipts] == [
            (taken.unit, 1, False), (taken.unit, 1, True),
        ]  # fmt: skip


def test_a_finished_unit_is_never_claimed_again(job: Job) -> None:
    with worker(job) as me:
        done = [claimed(job, me) for _ in range(3)]
        for claim in done:
            assert job.finish(claim, receipt_of(claim))
            assert not job.finish(claim, receipt_of(claim, n_clips=7))
    for fresh in Job.latest(job.storage):
        with worker(fresh, lease_timeout_s=0.2) as other:
            time.sleep(0.3)
            assert fresh.claim(other) is None
    assert len(job.storage.names(f"{job.root}/leases")) == 3
    assert {receipt.n_clips for receipt in job.receipts()} == {2}


def test_what_a_worker_holds_when_it_ends_is_free_at_once(job: Job) -> None:
    held = set[int]()

    def be_interrupted() -> None:
        with worker(job) as one:
            one.beat(encoding=("a", "b"))
            held.update(claimed(job, one).unit for _ in range(3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    with worker(job) as two:
        claims = [claimed(job, two) for _ in range(3)]
    assert {claim.unit for claim in claims} == held
    assert all(claim.predecessor is None for claim in claims), "it ended in order"
    (ended, _), *_ = job.workers()
    assert (ended.ended, ended.end_reason, ended.encoding) == (True, "KeyboardInterrupt: ", ())


# ---------------------------------------------------------------------------- holders that die


def _hold(root: Path, folder: Path) -> None:
    """Claim everything, encode, and tell when this worker has become unsure of it."""
    (job,) = Job.latest(LocalStorage(root))
    me = worker(job, lease_timeout_s=0.5).start()
    claims = [claimed(job, me) for _ in job.plan.units]
    me.beat(unit=claims[0].unit, encoding=("a", "b"), n_units=5)
    (folder / "ready").touch()
    while not me.lost:
        time.sleep(0.001)
    text = json.dumps([job.holds(claim) for claim in claims])
    (folder / "answer.partial").write_text(text)
    (folder / "answer.partial").rename(folder / "answer")
    time.sleep(PATIENT_S)


@contextmanager
def holding(job: Job, folder: Path) -> Iterator[BaseProcess]:
    """Run a process that holds all units."""
    process = clean_context().Process(target=_hold, args=(Path(job.storage.url), folder))
    process.start()
    try:
        wait_for((folder / "ready").exists)
        yield process
    finally:
        process.kill()
        process.join()


def test_the_units_of_a_killed_worker_of_this_host_are_free_at_once(
    tmp_path: Path, job: Job
) -> None:
    with holding(job, tmp_path) as process, worker(job) as me:
        assert job.claim(me) is None
        assert [alive for state, alive in job.workers() if state.worker_id != me.worker_id] == [
            True
        ]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        # Not reaped yet: `/proc` still lists it, as a zombie.
        claims = [wait_for(lambda: job.claim(me)) for _ in range(3)]
        assert {claim.unit for claim in claims} == {0, 1, 2}
        for claim in claims:
            assert claim.attempt == 1
            assert claim.predecessor is not None
            assert claim.predecessor.pid == process.pid
            assert claim.predecessor.encoding == ("a", "b")
            assert claim.predecessor.n_units == 5
        assert job.claim(me) is None
        dead = [state for state, alive in job.workers() if not alive]
        assert [state.pid for state in dead] == [process.pid]


def test_a_stopped_worker_is_dead_after_the_timeout_and_learns_of_it(
    tmp_path: Path, job: Job
) -> None:
    with holding(job, tmp_path) as process:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        with worker(job) as patient, worker(job, lease_timeout_s=0.5) as me:
            claims = [wait_for(lambda: job.claim(me)) for _ in range(3)]
            assert job.claim(patient) is None
            predecessor = claims[0].predecessor
            assert predecessor is not None
            assert predecessor.encoding == ("a", "b")
            silent_s = job.storage.modified_s(
                f"{job.root}/leases/{claims[0].unit:06d}.001"
            ) - job.storage.modified_s(f"{job.root}/workers/{predecessor.worker_id}.json")
            assert silent_s > 0.5
            os.kill(process.pid, signal.SIGCONT)
            wait_for((tmp_path / "answer").exists)
            assert json.loads((tmp_path / "answer").read_text()) == [False] * 3
            assert all(map(job.holds, claims))


def test_a_worker_on_another_host_is_judged_by_its_heartbeats_alone(job: Job) -> None:
    # Its process id is free here, and its clock is decades behind: neither means anything.
    hold_by_hand(job, 1, pid=2**22 + 1)
    with worker(job, lease_timeout_s=30) as me:
        for _ in range(2):
            assert claimed(job, me).unit != 1
        assert job.claim(me) is None
        age(job, "workers/other.json", 25)
        assert job.claim(me) is None
        age(job, "workers/other.json", 10)
        claim = claimed(job, me)
        assert claim.predecessor is not None
        assert (claim.unit, claim.predecessor.host) == (1, "n7")


def test_neither_a_clock_that_jumps_nor_a_wrong_one_matters(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_by_hand(job, 0, updated_s=4e9)
    hold_by_hand(job, 1, "another", started_s=-1.0)
    with worker(job, lease_timeout_s=30) as me:
        monkeypatch.setattr(time, "time", lambda: 5e9)
        assert claimed(job, me).unit == 2
        assert job.claim(me) is None
        assert [alive for _, alive in job.workers(lease_timeout_s=30)] == [True] * 3


def test_a_process_id_that_was_given_away_again_is_a_dead_worker(job: Job) -> None:
    mine = {"host_identity": host_identity(), "pid": os.getpid()}
    started = process_started(os.getpid())
    assert started is not None
    hold_by_hand(job, 0, "same", **mine, pid_started=started)
    hold_by_hand(job, 1, "older", **mine, pid_started=started - 1)
    with worker(job) as me:
        assert {claimed(job, me).unit, claimed(job, me).unit} == {1, 2}
        assert job.claim(me) is None
    assert {s.worker_id: alive for s, alive in job.workers()} == {
        "same": True, "older": False, me.worker_id: False,
    }  # fmt: skip


def test_free_units_come_before_those_of_the_dead(job: Job) -> None:
    """So that a unit that kills its workers does so last."""
    hold_by_hand(job, 1)
    age(job, "workers/other.json", 1000)
    with worker(job) as me:
        assert [claimed(job, me).unit for _ in range(3)][2] == 1


def test_a_unit_that_was_finished_while_its_holder_was_judged_is_not_claimed(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_by_hand(job, 0)
    age(job, "workers/other.json", 1000)
    real = Leases._orphans

    def finish_meanwhile(leases: Leases, *args: Any) -> Any:
        orphans = real(leases, *args)
        assert list(orphans) == [0]
        assert job.finish(held, receipt_of(held))
        return orphans

    held = Claim(unit=0, attempt=0, worker_id="other", rows=(0, 1), specs=job.plan.specs)
    monkeypatch.setattr(Leases, "_orphans", finish_meanwhile)
    with worker(job) as me:
        assert job.claim(me, exclude={1, 2}) is None
        assert job.undone() == [1, 2]


def test_a_late_finish_of_a_worker_that_was_taken_for_dead_counts_once(job: Job) -> None:
    hold_by_hand(job, 0)
    age(job, "workers/other.json", 1000)
    late = Claim(unit=0, attempt=0, worker_id="other", rows=(0, 1), specs=job.plan.specs)
    with worker(job) as me:
        claim = claimed(job, me, exclude={1, 2})
        assert not job.holds(late)
        assert job.finish(late, receipt_of(late))
        assert not job.finish(claim, receipt_of(claim))
        assert [receipt.worker_id for receipt in job.receipts()] == ["other"]


def _mask_its_name(folder: Path) -> None:
    Path("/proc/self/comm").write_text(") Z 1 (")
    (folder / "ready").touch()
    time.sleep(PATIENT_S)


def test_the_start_of_a_process_tells_it_from_every_other(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_mask_its_name, args=(tmp_path,))
    process.start()
    assert process.pid is not None
    wait_for((tmp_path / "ready").exists)
    mine, other = process_started(os.getpid()), process_started(process.pid)
    assert mine is not None
    assert other is not None
    assert other > mine
    process.kill()
    wait_for(lambda: process_started(process.pid or 0) is None)  # a zombie
    assert Path(f"/proc/{process.pid}").exists()
    process.join()
    assert process_started(process.pid) is None


def test_without_proc_only_heartbeats_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_identity() == host_identity()
    assert socket.gethostname() in host_identity()

    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert host_identity() != host_identity()


# ---------------------------------------------------------------------------- heartbeats


class UnreachableStorage(LocalStorage):
    """A disk that is away at times."""

    is_away = False

    def replace(self, key: str, data: bytes, *, durable: bool = True) -> None:
        if self.is_away:
            raise OSError(5, "Input/output error")
        super().replace(key, data, durable=durable)

    def size(self, key: str) -> int:
        if self.is_away:
            raise OSError(5, "Input/output error")
        return super().size(key)


def test_a_worker_outlives_a_storage_that_is_away_and_then_trusts_nothing(
    tmp_path: Path, specs: Specs, caplog: pytest.LogCaptureFixture
) -> None:
    storage = UnreachableStorage(tmp_path / "s")
    job = job_of(storage, specs)
    hold_by_hand(job, 0)
    with caplog.at_level(logging.WARNING), worker(job, lease_timeout_s=0.5) as me:
        storage.is_away = True
        me.beat(n_clips=7)  # does not raise
        wait_for(lambda: me.lost)
        messages = [record.message for record in caplog.records]
        assert len(messages) == 2, "each failure is told once"
        assert "heartbeat failed ([Errno 5] Input/output error)" in messages[0]
        assert "look for a stop request failed" in messages[1]
        storage.is_away = False
        seen_s = storage.modified_s(key := f"{job.root}/workers/{me.worker_id}.json")
        wait_for(lambda: storage.modified_s(key) > seen_s)
        assert json.loads(storage.read(key))["n_clips"] == 7
        assert me.lost, "it stays so: somebody may have taken over meanwhile"
        # The other's heartbeat is older than the timeout. But it may have been cut off, too.
        age(job, "workers/other.json", 0.5)
        assert claimed(job, me, exclude={2}).unit == 1
        wait_for(lambda: job.claim(me, exclude={2}))
        assert me._interrupted_s is not None
        assert time.monotonic() - me._interrupted_s > 0.5
        storage.is_away = True
        wait_for(lambda: len(caplog.records) == 4)  # a new failure is told again
        storage.is_away = False


def test_a_heartbeat_tells_what_changed_and_a_wrong_name_is_an_error(job: Job) -> None:
    key = ""
    with worker(job) as me:
        key = f"{job.root}/workers/{me.worker_id}.json"
        me.beat(unit=2, encoding=("x",), encoding_alone=True)
        found = WorkerState.model_validate_json(job.storage.read(key))
        assert (found.unit, found.encoding, found.encoding_alone) == (2, ("x",), True)
        assert (found.pid, found.host) == (os.getpid(), socket.gethostname())
        assert not me.lost
        me.update(n_clips=3)
        wait_for(lambda: json.loads(job.storage.read(key))["n_clips"] == 3)
        with pytest.raises(ValidationError, match="n_clip"):
            me.update(n_clip=4)
        me.close("walltime")
    me.close("again")
    found = WorkerState.model_validate_json(job.storage.read(key))
    assert (found.ended, found.end_reason, found.n_clips) == (True, "walltime", 3)


def test_a_worker_is_in_the_store_before_it_can_claim(job: Job) -> None:
    me = worker(job, heartbeat_s=20).start()
    assert job.storage.names(f"{job.root}/workers") == [f"{me.worker_id}.json"]
    me.close()


def test_a_first_heartbeat_that_fails_is_an_error(job: Job) -> None:
    me = worker(job)
    (Path(job.storage.url) / job.root / "workers").write_text("in the way")
    with pytest.raises(StoreError, match=r"the job's files cannot be written \("):
        me.start()


def test_a_timeout_shorter_than_three_heartbeats_is_refused(job: Job) -> None:
    with pytest.raises(SchemaError, match=r"timeout of 20 s .* heartbeats every 10 .* least 30"):
        worker(job, heartbeat_s=10, lease_timeout_s=20)


def test_a_request_to_stop_reaches_the_workers_of_its_session(job: Job) -> None:
    with worker(job, "run-1") as one, worker(job, "run-2") as two:
        (other,) = Job.latest(job.storage)
        other.request_stop("run-1")
        other.request_stop("run-1")
        assert one.should_stop.wait(30)
        assert not two.should_stop.wait(0.2)
        assert (job.stop_requested("run-1"), job.stop_requested("run-2")) == (True, False)
        with worker(job, "run-1", heartbeat_s=20) as late:
            assert late.should_stop.is_set()
        for name in ("", "..", "a/b", "x" * 65):
            with pytest.raises(SchemaError, match=r"is not the name of a session"):
                job.request_stop(name)


def test_files_in_the_making_that_are_taken_for_garbage_are_written_again(
    tmp_path: Path, specs: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def collected_meanwhile(source: Path, target: Path) -> None:
        calls.append(target.name)
        if len(calls) % 3:
            source.unlink()
        link(source, target)

    link = os.link
    monkeypatch.setattr(os, "link", collected_meanwhile)
    job = job_of(LocalStorage(tmp_path / "s"), specs)
    with worker(job) as me:
        claim = claimed(job, me)
        assert job.finish(claim, receipt_of(claim))
    assert len(calls) == 9  # the plan, a lease and a receipt, each at the third time


# ---------------------------------------------------------------------------- blame and evidence


def test_a_dead_worker_strikes_a_clip_once(job: Job) -> None:
    for _ in range(3):
        job.strike(["a", "b"], "w1", alone=False)
    job.strike(["a"], "w1.x", alone=False)
    job.strike(["a"], "w2", alone=True)
    assert job.strikes(["a", "b", "c"]) == {
        "a": Strikes(n_together=2, n_alone=1), "b": Strikes(n_together=1), "c": Strikes(),
    }  # fmt: skip
    job.storage.replace(f"{job.root}/strikes/b.w1", b"")  # damaged: the milder reading
    assert job.strikes(["b"]) == {"b": Strikes(n_together=1)}


def test_evidence_is_kept_and_replaced(job: Job) -> None:
    evidence = Evidence(
        key="a" * 64, uid="x/1", media="1.mp4", kind="crash", message="died", attempts=2,
        exit_signal="SIGSEGV", facts={"video": {"codec": "h264"}}, host="n7", worker_id="w1",
        time="2026-11-21T00:00:00+00:00",
    )  # fmt: skip
    job.write_evidence(evidence)
    newer = evidence.model_copy(update={"worker_id": "w2"})
    job.write_evidence(newer)
    job.write_evidence(evidence.model_copy(update={"key": "b" * 64}))
    job.storage.replace(f"{job.root}/evidence/{'c' * 64}.json", b"{")
    notes: list[str] = []
    assert job.evidence(["a" * 64], notes.append) == {"a" * 64: newer}
    assert not notes
    assert sorted(job.evidence(note=notes.append)) == ["a" * 64, "b" * 64]
    assert len(notes) == 1


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("damage", [b"", b'{"schema_version":1,"cre', b"[]", b'{"created":"x"}'])
def test_a_damaged_plan_is_named_with_its_cure(
    local: LocalStorage, job: Job, damage: bytes
) -> None:
    local.replace(f"{job.root}/plan.json", damage)
    with pytest.raises(SchemaError, match=rf"{job.root}/plan\.json.*remove the folder .*0000: wh"):
        Job.open_or_create(local, job.plan, JOB_ID)
    notes: list[str] = []
    assert Job.latest(local, notes.append) == []
    assert len(notes) == 1
    assert f"{job.root}/plan.json" in notes[0]


def test_a_plan_of_a_newer_version_is_refused(local: LocalStorage, job: Job) -> None:
    plan = {**job.plan.model_dump(mode="json"), "schema_version": 2, "colour": "blue"}
    local.replace(f"{job.root}/plan.json", json.dumps(plan).encode())
    with pytest.raises(
        SchemaError, match=r"plan of version 2, this version reads up to 1\. Update"
    ):
        Job.open_or_create(local, job.plan, JOB_ID)


@pytest.mark.parametrize("damage", [b"", b'{"worker_id":"oth', b"\xff"])
@pytest.mark.parametrize("what", ["lease", "state", "no state"])
def test_with_a_damaged_lease_or_worker_file_age_alone_decides(
    job: Job, what: str, damage: bytes
) -> None:
    hold_by_hand(job, 0)
    state, lease = "workers/other.json", "leases/000000.000"
    file = lease if what == "lease" else state
    job.storage.replace(f"{job.root}/{file}", damage)
    if what == "no state":
        job.storage.delete(f"{job.root}/{state}")
        file = lease
    with worker(job, lease_timeout_s=30) as me:
        assert job.claim(me, exclude={1, 2}) is None
        age(job, file, 31)
        claim = claimed(job, me, exclude={1, 2})
        assert (claim.attempt, claim.predecessor) == (1, None)


def test_status_passes_over_damaged_files_and_says_so(job: Job) -> None:
    storage, notes = job.storage, list[str]()
    with worker(job) as me:
        done = [claimed(job, me) for _ in range(2)]
        for claim in done:
            job.finish(claim, receipt_of(claim))
        storage.replace(f"{job.root}/receipts/{done[0].unit:06d}.json", b'{"unit":')
        storage.replace(f"{job.root}/workers/other.json", b"")
        for folder in ("receipts", "workers", "leases", "strikes", "evidence"):
            storage.replace(f"{job.root}/{folder}/.DS_Store", b"?")
        assert [r.unit for r in job.receipts(notes.append)] == [done[1].unit]
        assert [s.worker_id for s, _ in job.workers(note=notes.append)] == [me.worker_id]
        assert [note.split("/")[-1].split(":")[0] for note in notes] == [
            f"{done[0].unit:06d}.json", "other.json",
        ]  # fmt: skip
        # Its existence says that the unit is done, whatever can be read of it.
        assert len(job.undone()) == 1
        assert claimed(job, me).unit in job.undone()
        assert job.strikes(["a"]) == {"a": Strikes()}


def test_who_may_only_look_still_sees_who_is_silent(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_by_hand(job, 0, "silent")
    hold_by_hand(job, 1, "loud")
    age(job, "workers/silent.json", 100)

    def refuse(*_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalStorage, "create", refuse)
    found = {state.worker_id: alive for state, alive in job.workers(lease_timeout_s=30)}
    assert found == {"silent": False, "loud": True}
    assert job.undone() == [0, 1, 2]
    with pytest.raises(StoreError, match=r"cannot be written \(Permission denied\)"):
        job.request_stop("run-1")


def test_receipts_are_read_once_and_keep_what_was_told(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(job) as me:
        claim = claimed(job, me)
        failure = ReceiptFailure(
            uid="x/1", key="a" * 64, stream="audio", kind="hang", reason="too slow"
        )
        told = receipt_of(
            claim,
            counts={"whisper": {Status.OK: 1, Status.FAILED: 1}},
            failures=(failure,),
            remarks=(("x/2", "video", "a frame is damaged"),),
            truncated=("x/2",),
            n_bytes=17,
        )
        job.finish(claim, told)
        assert job.receipts() == [told]
        read: list[str] = []
        monkeypatch.setattr(LocalStorage, "read", lambda _, key: read.append(key))
        assert job.receipts() == [told]
        assert not read


# ---------------------------------------------------------------------------- in a bucket


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
    name = f"test-{uuid.uuid4().hex}"
    make_bucket(server, name)
    for variable in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in environment(server).items():
        monkeypatch.setenv(variable, value)
    return ObjectStorage(f"s3://{name}/store")


class TestBucket:
    def test_creators_and_claimers_race(self, bucket: ObjectStorage, specs: Specs) -> None:
        barrier = Barrier(8)

        def run(number: int) -> tuple[Job, list[int]]:
            storage = ObjectStorage(bucket.url)  # a client of its own, as a process has
            plan = plan_of(specs, 12, created=f"by {number}")
            barrier.wait()
            job = Job.open_or_create(storage, plan, JOB_ID)
            units = []
            with worker(job, heartbeat_s=1) as me:
                while (claim := job.claim(me)) is not None:
                    assert job.finish(claim, receipt_of(claim))
                    units.append(claim.unit)
            return job, units

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(run, range(8)))
        first = [job for job, _ in found if job.generation == 0]
        assert sum(not job.joined for job in first) == 1
        assert len({job.plan.created for job in first}) == 1
        units = [unit for job, units in found if job.generation == 0 for unit in units]
        assert sorted(units) == list(range(12))

    def test_release_takeover_finish_and_stop(self, bucket: ObjectStorage, specs: Specs) -> None:
        job = job_of(bucket, specs)
        mine = {"host_identity": host_identity(), "pid": os.getpid(), "pid_started": 1}
        hold_by_hand(job, 0, "gone", **mine)
        hold_by_hand(job, 1, "elsewhere")
        with worker(job, heartbeat_s=0.2) as one, worker(job, heartbeat_s=0.2) as two:
            released = claimed(job, one)
            assert released.unit == 2
            job.release(released, receipt_of(released, n_clips=0))
            again = claimed(job, two, exclude={0, 1})
            assert (again.unit, again.attempt, again.predecessor) == (2, 1, None)
            over = claimed(job, one)
            assert over.predecessor is not None
            assert (over.unit, over.predecessor.encoding) == (0, ("clip",))
            assert job.claim(one) is None
            assert job.finish(over, receipt_of(over))
            assert (job.holds(over), job.holds(released)) == (True, False)
            job.request_stop("run-1")
            assert one.should_stop.wait(30)
            job.strike(["a"], "gone", alone=True)
            assert job.strikes(["a"]) == {"a": Strikes(n_alone=1)}
            states = {state.worker_id: alive for state, alive in job.workers()}
            assert states == {
                "gone": False, "elsewhere": True, one.worker_id: True, two.worker_id: True,
            }  # fmt: skip
        (found,) = Job.latest(bucket)
        assert (found.n_done(), found.plan) == (1, job.plan)
        assert [(r.unit, r.partial) for r in found.receipts()] == [(0, False), (2, True)]

    def test_heartbeats_are_compared_by_the_bucket_s_clock(
        self, bucket: ObjectStorage, specs: Specs
    ) -> None:
        """Which knows whole seconds only."""
        job = job_of(bucket, specs, 1)
        hold_by_hand(job, 0)
        with worker(job, heartbeat_s=0.3, lease_timeout_s=1.5) as me:
            assert job.claim(me) is None
            assert wait_for(lambda: job.claim(me)).predecessor is not None
