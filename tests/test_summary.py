"""The numbers of a job: from receipts and heartbeats that stand in a store, against hand calculation."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.schema import decode_json
from cache.spec import TokenSpec
from cache.storage import LocalStorage
from cache.store import TokenStore
from extract.failures import Evidence
from extract.jobs.job import Job, PlanDocument, PlannedUnit, Receipt, ReceiptFailure
from extract.jobs.lease import receipt_key
from extract.jobs.session import (
    StageSeconds,
    WorkerState,
    encode,
    host_identity,
    process_started,
    worker_key,
)
from extract.plan import unique_labels
from extract.summary import JobSummary, Throughput, Watch, _throughput, find_failures, summarise
from tests.conftest import key_of

Specs = dict[str, TokenSpec]
START_S = 1_700_000_000.0


@pytest.fixture
def job(tmp_path: Path, specs: Specs) -> Job:
    """Four units of ten clips, the last one of five."""
    return job_of(LocalStorage(tmp_path / "store"), specs)


def job_of(storage: LocalStorage, specs: Specs) -> Job:
    units = tuple(
        PlannedUnit(rows=tuple(range(10 * n, 10 * n + (5 if n == 3 else 10))), specs=(0, 1))
        for n in range(4)
    )
    plan = PlanDocument(
        created="2026-11-21T00:00:00+00:00",
        specs=(specs["audio"], specs["video"]),
        n_records=40,
        units=units,
        unit_clips=10,
    )
    return Job.open_or_create(storage, plan, "0123456789abcdef")


def put_worker(job: Job, name: str, start: float, end: float, **changes: Any) -> WorkerState:
    fields = {
        "worker_id": name, "session": "s1", "engine": "local", "host": "node", "device": "cpu",
        "host_identity": "elsewhere", "pid": 1, "pid_started": 1, "ended": True,
        "started_s": START_S + start, "updated_s": START_S + end,
    }  # fmt: skip
    state = WorkerState(**{**fields, **changes})
    job.storage.replace(worker_key(job.root, name), encode(state))
    return state


def put_receipt(
    job: Job, unit: int, name: str, start: float, end: float, n: int, **changes: Any
) -> Receipt:
    fields = {
        "unit": unit, "worker_id": name, "session": "s1", "engine": "local", "device": "cpu",
        "started_s": START_S + start, "ended_s": START_S + end, "n_clips": n,
    }  # fmt: skip
    receipt = Receipt(**{**fields, **changes})
    part = f".part-{name}-000" if receipt.partial else ""
    assert job.storage.create(receipt_key(job.root, unit, part), encode(receipt))
    return receipt


def failure(uid: str, kind: str, stream: str = "audio") -> dict[str, str]:
    return {
        "uid": uid, "key": key_of(uid), "stream": stream, "kind": kind, "reason": f"{kind}: {uid}",
    }  # fmt: skip


def test_the_numbers_of_a_job_add_up(job: Job, specs: Specs) -> None:
    audio, video = unique_labels((specs["audio"], specs["video"]))
    put_worker(
        job, "a", 0, 100,
        n_clips=20, seconds=StageSeconds(encode_s={audio: 30, video: 40}, decode_wait_s=5),
    )  # fmt: skip
    put_worker(job, "b", 50, 150, session="s2", engine="slurm", seconds={"encode_s": {audio: 7}})
    put_worker(job, "c", 400, 440, session="s2", engine="slurm", end_reason="SIGTERM")
    seconds = StageSeconds(write_s=2)
    both = (failure("x/1", "crash"), failure("x/1", "crash", "video"), failure("x/2", "missing"))
    ok, failed = Status.OK, Status.FAILED
    put_receipt(
        job, 0, "a", 0, 50, 10,
        counts={video: {ok: 8, failed: 2}, audio: {ok: 10}}, failures=both, n_bytes=100,
        seconds=seconds,
    )  # fmt: skip
    put_receipt(job, 1, "a", 50, 100, 10, counts={audio: {ok: 10}}, n_bytes=1, seconds=seconds)
    put_receipt(
        job, 2, "b", 60, 150, 7,
        session="s2", counts={audio: {ok: 7}}, truncated=("x/9", "x/9"), n_bytes=10,
    )  # fmt: skip
    whole = summarise(job, price_per_hour=3.0)
    assert (whole.n_units, whole.n_units_done, whole.n_planned, whole.n_clips) == (4, 3, 35, 27)
    assert not whole.is_done
    assert whole.counts == {audio: {ok: 27}, video: {ok: 8, failed: 2}}
    assert list(whole.counts) == [audio, video], "in the order of the plan"
    assert whole.n_failed == 2, "one clip failed in two streams"
    assert whole.failed_by_kind == {"crash": 1, "missing": 1}
    assert (whole.n_bytes, whole.truncated) == (111, ("x/9",))
    assert whole.engines == ("local", "slurm")
    assert (whole.started_s, whole.ended_s) == (START_S, START_S + 440)
    assert whole.worker_s == 100 + 100 + 40
    assert whole.active_s == 150 + 40, "from 0 to 150 and from 400 to 440"
    assert whole.clips_per_s == pytest.approx(27 / 190)
    assert whole.seconds.encode_s == {audio: 37, video: 40}
    assert whole.seconds.write_s == 4, "receipts alone tell"
    assert whole.worker_hours_per_1000 == pytest.approx(240 / 3600 / 27 * 1000)
    assert whole.price_per_1000 == pytest.approx(3 * 240 / 3600 / 27 * 1000)
    assert [w.worker_id for w in whole.workers] == ["a", "b", "c"]
    again = decode_json(JobSummary, whole.model_dump_json(), "the summary")
    assert again == whole

    second = summarise(job, session="s2")
    assert (second.n_clips, second.n_bytes, second.n_failed) == (7, 10, 0)
    assert [w.worker_id for w in second.workers] == ["b", "c"]
    assert second.price_per_1000 is None


def test_a_job_that_nobody_works_on_has_no_numbers_and_no_division_by_zero(job: Job) -> None:
    found = summarise(job, price_per_hour=1.0)
    assert (found.n_clips, found.clips_per_s, found.active_s) == (0, 0.0, 0.0)
    assert found.started_s is found.throughput is found.worker_hours_per_1000 is None
    assert found.price_per_1000 is None


def test_a_clip_that_two_workers_shared_counts_once(job: Job) -> None:
    put_receipt(job, 0, "a", 0, 10, 6, partial=True)
    for unit, n in ((0, 10), (1, 10), (2, 10), (3, 5)):
        put_receipt(job, unit, "b", 10, 20, n)
    assert summarise(job).n_clips == 35
    assert Watch(job).look(0.0).n_clips == 35


def test_a_killed_worker_is_told_from_a_living_and_an_ended_one(job: Job) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    here = {
        "host_identity": host_identity(), "pid": child.pid,
        "pid_started": process_started(child.pid), "ended": False, "unit": 2,
    }  # fmt: skip
    put_worker(job, "victim", 0, 10, **here)
    put_worker(job, "done", 0, 10, unit=1)
    outcomes = {w.worker_id: (w.outcome, w.unit) for w in summarise(job).workers}
    assert outcomes == {"victim": ("working", 2), "done": ("ended", None)}
    child.kill()
    child.wait()
    found = summarise(job)
    assert {w.worker_id: w.outcome for w in found.workers} == {
        "victim": "vanished", "done": "ended",
    }  # fmt: skip
    assert found.n_vanished == 1


def test_a_worker_elsewhere_has_vanished_when_it_is_silent_for_too_long(job: Job) -> None:
    put_worker(job, "quiet", 0, 10, ended=False)
    assert Watch(job, lease_timeout_s=60).look(0.0).workers[0].outcome == "working"
    time.sleep(0.3)
    assert Watch(job, lease_timeout_s=0.1).look(0.0).workers[0].outcome == "vanished"
    assert summarise(job, lease_timeout_s=0.1).n_vanished == 1


spans = st.tuples(
    st.floats(0, 5000), st.floats(0, 800), st.integers(0, 64), st.booleans()
)  # start, length, clips, whether the clock stood still


@given(st.lists(spans, min_size=1, max_size=40))
def test_the_throughput_curve_holds_every_clip_and_no_more(
    found: list[tuple[float, float, int, bool]],
) -> None:
    receipts = [
        Receipt(
            unit=n, worker_id="a", session="s", engine="local", device="cpu", n_clips=clips,
            started_s=start, ended_s=start if stood_still else start + length,
        )
        for n, (start, length, clips, stood_still) in enumerate(found)
    ]  # fmt: skip
    curve = _throughput(receipts)
    total = sum(receipt.n_clips for receipt in receipts)
    if not total:
        assert curve is None
        return
    assert isinstance(curve, Throughput)
    assert sum(curve.clips_per_s) * curve.step_s == pytest.approx(total, rel=1e-6)
    assert 1 <= len(curve.clips_per_s) <= 121
    assert min(curve.clips_per_s) >= 0


def test_throughput_is_where_the_work_was(job: Job) -> None:
    put_receipt(job, 0, "a", 0, 100, 10)
    put_receipt(job, 1, "b", 50, 100, 10)
    put_receipt(job, 2, "a", 200, 240, 4)
    curve = summarise(job).throughput
    assert curve is not None
    at = {t: curve.clips_per_s[int(t / curve.step_s)] for t in (10, 70, 150, 220)}
    assert at == pytest.approx({10: 0.1, 70: 0.1 + 0.2, 150: 0.0, 220: 0.1})


def test_watching_tells_rate_and_time_left(job: Job) -> None:
    put_worker(job, "a", 0, 100, ended=False, n_clips=0, host_identity="elsewhere")
    watch = Watch(job, window_s=60, lease_timeout_s=600)
    first = watch.look(1000.0)
    assert (first.n_clips, first.clips_per_s, first.left_s) == (0, 0.0, None)
    put_receipt(job, 0, "a", 0, 20, 10)
    # Ten clips are in a receipt, two more in the unit that is being worked on.
    put_worker(job, "a", 0, 100, ended=False, n_clips=12, n_failed=1)
    second = watch.look(1020.0)
    assert (second.n_clips, second.n_units_done) == (12, 1)
    assert second.clips_per_s == pytest.approx(12 / 20)
    assert second.left_s == pytest.approx((35 - 12) / (12 / 20))
    assert second.n_failed == 1, "not yet in a receipt"
    for now_s in (1060.0, 1100.0, 1140.0):
        third = watch.look(now_s)
    assert third.clips_per_s == 0, "nothing happened in the last minute"
    assert third.left_s is None
    assert decode_json(type(third), third.model_dump_json(), "the state") == third


def test_the_first_look_knows_a_rate_from_the_lives_of_workers(job: Job) -> None:
    put_worker(job, "a", 0, 100, ended=False, n_clips=20)
    put_worker(job, "b", 0, 50, ended=True, n_clips=100)
    assert Watch(job, lease_timeout_s=600).look(5.0).clips_per_s == pytest.approx(0.2)


def test_clips_in_the_hands_of_a_dead_worker_do_not_count_as_done(job: Job) -> None:
    put_worker(job, "a", 0, 100, ended=True, n_clips=8)
    put_receipt(job, 0, "a", 0, 10, 3, partial=True, failures=(failure("x/1", "hang"),))
    found = Watch(job).look(0.0)
    assert (found.n_clips, found.n_units_done) == (3, 0)
    assert found.failed_by_kind == {"hang": 1}
    assert found.alive == ()


def test_failed_clips_are_found_with_all_that_is_known_of_them(
    tmp_path: Path, specs: Specs
) -> None:
    store = TokenStore.open_or_create(tmp_path / "store")
    reasons = {
        "x/1": "crash: the decoder died",
        "x/2": "missing: not there",
        "x/3": "too old a text",
    }
    for stream in ("audio", "video"):
        clips = [
            ClipTokens(key_of(uid), Status.FAILED, reason=reason)
            for uid, reason in reasons.items()
            if (stream, uid) != ("video", "x/2")
        ]
        clips.append(ClipTokens(key_of("x/4"), Status.ABSENT))
        store.commit(specs[stream], clips, {})
    assert isinstance(store.storage, LocalStorage)
    job = job_of(store.storage, specs)
    facts = ReceiptFailure(**failure("x/2", "missing"))
    put_receipt(job, 0, "a", 0, 1, 10, failures=(facts,))
    seen = Evidence(
        key=key_of("x/1"), uid="x/1", media="1.mp4", kind="crash", message="the decoder died",
        attempts=2, exit_signal="SIGSEGV", stderr_tail="boom", host="node", worker_id="a",
        time="2026-11-21T00:00:00+00:00",
    )  # fmt: skip
    job.write_evidence(seen)

    found = {clip.key: clip for clip in find_failures(store)}
    assert set(found) == {key_of(uid) for uid in reasons}
    crash = found[key_of("x/1")]
    assert (crash.kind, crash.uid, crash.media, crash.evidence) == ("crash", "x/1", "1.mp4", seen)
    stored = tuple(store.specs.values())
    labels = dict(zip((s.stream for s in stored), unique_labels(stored), strict=True))
    assert crash.specs == (labels["audio"], labels["video"])
    missing = found[key_of("x/2")]
    assert (missing.kind, missing.uid, missing.evidence) == ("missing", "x/2", None)
    assert missing.specs == (labels["audio"],)
    assert (found[key_of("x/3")].kind, found[key_of("x/3")].uid) == ("undecodable", None)

    records = [
        Record(uid=f"named/{n}", media=f"{n}.mp4", clip=Clip(sha256=key_of(f"x/{n}"), n_bytes=1))
        for n in (3, 4)
    ]
    (only,) = find_failures(store, records)
    assert (only.uid, only.media) == ("named/3", "3.mp4"), "the manifest names and limits"


def test_evidence_of_another_kind_of_failure_is_not_shown_as_this_one(
    tmp_path: Path, specs: Specs
) -> None:
    store = TokenStore.open_or_create(tmp_path / "store")
    key = key_of("x/1")
    store.commit(specs["audio"], [ClipTokens(key, Status.FAILED, reason="numeric: NaN")], {})
    assert isinstance(store.storage, LocalStorage)
    job_of(store.storage, specs).write_evidence(
        Evidence(
            key=key, uid="x/1", media="1.mp4", kind="hang", message="slow", attempts=2, host="n",
            worker_id="a", time="2026-11-21T00:00:00+00:00",
        )
    )  # fmt: skip
    (found,) = find_failures(store)
    assert (found.kind, found.uid, found.evidence) == ("numeric", "x/1", None)
