"""An annotation as a job: killed at any moment, shared, stopped, capped, and never asking twice."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import emocache
from cache.clip import Record
from cache.errors import EmocacheError, ExtractionStopped
from cache.manifest import read_manifest
from extract.annotate.asking import Purse, _Part
from extract.annotate.config import ANSWERS, RESULTS, AnnotationConfig
from extract.annotate.endpoints.answers import AnswerCache
from extract.annotate.endpoints.budget import BudgetError, Caps
from extract.annotate.endpoints.transport import (
    EndpointDownError,
    UnauthorisedError,
    UnknownModelError,
)
from extract.annotate.job import open_job
from extract.annotate.journal import Journal
from extract.annotate.pipeline import prepare, work_storage
from extract.annotate.results import RecordResult
from extract.annotate.worker import work
from extract.engines.options import EngineOptions
from extract.engines.start import run_engine
from extract.jobs.job import Job
from extract.workers import drain
from extract.workers.loop import read_config
from tests.annotating import (
    MODELS,
    REPOSITORY,
    Corpus,
    annotate,
    clip_of,
    command,
    demo_corpus,
    dying,
    preset_of,
    results_of,
    settings_of,
)
from tests.chat_server import ChatServer, chat_server
from tests.media import write_wav
from tests.slurm import Slurm, slurm, slurm_server

__all__ = ["slurm", "slurm_server"]

N = 12
IN_FLIGHT = 4
"""Of each of the three roles."""


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(MODELS, latency_s=0.02) as running:
        yield running


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Twelve generated clips; nobody changes them."""
    return demo_corpus(tmp_path_factory.mktemp("demo"), N)


@pytest.fixture(scope="session")
def calm(demo: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records as a run without faults annotates them."""
    folder = tmp_path_factory.mktemp("calm")
    with chat_server(MODELS) as running:
        assert emocache.main(arguments(demo, running, folder)) == 0
        assert running.n_requests == 3 * N
    return records_in(folder / "out.parquet")


def arguments(corpus: Corpus, server: ChatServer, folder: Path, *more: str) -> list[str]:
    """Return the command line that annotates a corpus."""
    return [
        "annotate", str(corpus.manifest), "--work", str(folder / "work"),
        "--out", str(folder / "out.parquet"), "--unit-clips", "4", "--decoders", "2",
        "--lease-timeout", "4s", *more, *settings_of(server, corpus),
    ]  # fmt: skip


def records_in(path: Path) -> list[dict[str, Any]]:
    return [record.model_dump() for record in read_manifest(path).records]


def answers_in(folder: Path) -> set[str]:
    """Return the keys of the questions whose answer is on the disk."""
    return {answer.key for answer in AnswerCache(folder / "work" / ANSWERS)}


def wait_until(holds: Callable[[], object], timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end_s, "it never came"
        time.sleep(0.002)


def wait_for_requests(server: ChatServer, n: int, process: subprocess.Popen[str]) -> None:
    """Wait until the server was asked so often, or the process that asks has ended."""
    wait_until(lambda: server.n_requests >= n or process.poll() is not None)


# ---------------------------------------------------------------------------- killed


@pytest.mark.fault("kill -9 of an annotation")
def test_a_killed_annotation_asks_nothing_twice_that_it_had_an_answer_to(
    demo: Corpus, server: ChatServer, tmp_path: Path, calm: list[dict[str, Any]]
) -> None:
    lost = 0
    for moment in (1, 10, 22):
        process = command(*arguments(demo, server, tmp_path), cwd=tmp_path)
        wait_for_requests(server, moment + lost, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        wait_until(lambda: server.in_flight == 0)
        kept = answers_in(tmp_path)
        # What the server was asked and is not on the disk was in flight; only that is asked again.
        in_flight = server.n_requests - len(kept) - lost
        assert 0 <= in_flight <= 3 * IN_FLIGHT
        lost += in_flight
    assert emocache.main(arguments(demo, server, tmp_path)) == 0
    assert len(answers_in(tmp_path)) == 3 * N
    assert server.n_requests == 3 * N + lost
    assert sum(n - 1 for n in server.asked.values()) == lost
    assert records_in(tmp_path / "out.parquet") == calm


@pytest.mark.fault("kill -9 of an annotation before a write")
@pytest.mark.parametrize(
    "nth",
    [
        *(30, 120),
        *(pytest.param(n, marks=pytest.mark.slow) for n in (*range(1, 260, 9), 500)),
    ],
)
def test_a_kill_between_any_two_writes_loses_nothing(
    nth: int, demo: Corpus, tmp_path: Path, calm: list[dict[str, Any]]
) -> None:
    with chat_server(MODELS) as running:
        argv = arguments(demo, running, tmp_path)
        process = dying(*argv, nth=nth, folder=tmp_path / "work", cwd=tmp_path)
        told, _ = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), told
        wait_until(lambda: running.in_flight == 0)
        kept, before = answers_in(tmp_path), running.n_requests
        assert emocache.main(argv) == 0
        assert running.n_requests == before + 3 * N - len(kept)
        assert records_in(tmp_path / "out.parquet") == calm


@pytest.mark.fault("a damaged and a torn result")
def test_a_damaged_result_is_made_again_without_a_request(
    demo: Corpus, server: ChatServer, tmp_path: Path, calm: list[dict[str, Any]]
) -> None:
    assert emocache.main(arguments(demo, server, tmp_path)) == 0
    [segment] = (tmp_path / "work" / RESULTS).glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    lines[3] = lines[3].replace(b"person", b"persom")
    segment.write_bytes(b"".join(lines)[:-40])
    assert emocache.main(arguments(demo, server, tmp_path)) == 0
    assert server.n_requests == 3 * N
    assert records_in(tmp_path / "out.parquet") == calm


def test_a_finished_annotation_makes_no_request(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    assert emocache.main(arguments(demo, server, tmp_path)) == 0
    first = (tmp_path / "out.parquet").read_bytes()
    assert emocache.main(arguments(demo, server, tmp_path)) == 0
    assert server.n_requests == 3 * N
    assert (tmp_path / "out.parquet").read_bytes() == first


# ---------------------------------------------------------------------------- stopped in order


@pytest.mark.fault("Ctrl-C, SIGTERM")
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_annotation_keeps_every_answer_and_asks_none_twice(
    number: signal.Signals, demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.latency_s = 0.2
    process = command(*arguments(demo, server, tmp_path), cwd=tmp_path)
    wait_for_requests(server, 7, process)
    process.send_signal(number)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert "run the same command to continue" in " ".join(told.split())
    n = server.n_requests
    assert 7 <= n < 3 * N
    assert len(answers_in(tmp_path)) == n
    server.latency_s = 0.0
    assert emocache.main(arguments(demo, server, tmp_path)) == 0
    assert server.n_requests == 3 * N
    assert max(server.asked.values()) == 1


@pytest.mark.fault("Ctrl-C twice")
def test_the_second_ctrl_c_waits_for_no_answer(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.latency_s = 40.0
    process = command(*arguments(demo, server, tmp_path), cwd=tmp_path)
    wait_until(lambda: server.in_flight >= 3 or process.poll() is not None)
    began_s = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began_s < 15


def test_a_walltime_ends_a_worker_in_order(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.latency_s = 0.4
    preset = preset_of(server, demo)
    annotate(demo, preset, tmp_path, drain_after_s=0.9)
    storage = work_storage(tmp_path)
    [job] = Job.latest(storage)
    [(state, is_alive)] = job.workers()
    assert (state.end_reason, is_alive) == ("the walltime is nearly over", False)
    assert 0 < len(job.undone())
    server.latency_s = 0.0
    annotate(demo, preset, tmp_path)
    assert not job.undone()
    assert server.n_requests == 3 * N


# ---------------------------------------------------------------------------- several workers


@pytest.mark.fault("one of two annotating workers is killed")
def test_two_workers_share_one_annotation_and_one_takes_over_from_the_other(
    demo: Corpus, server: ChatServer, tmp_path: Path, calm: list[dict[str, Any]]
) -> None:
    server.latency_s = 0.1
    settings = arguments(demo, server, tmp_path)
    settings.remove("annotate")
    at = settings.index("--out")
    argv = ["annotate-worker", *settings[:at], *settings[at + 2 :]]
    first, second = (command(*argv, cwd=tmp_path) for _ in range(2))
    try:
        storage = work_storage(tmp_path / "work")
        wait_until(lambda: any(len(j.workers()) == 2 for j in Job.latest(storage, lambda _: None)))
        wait_until(lambda: server.n_requests >= 10)
        first.kill()
        told, _ = second.communicate(timeout=90)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert second.returncode == 0, told
    lost = server.n_requests - 3 * N
    assert 0 <= lost <= 3 * IN_FLIGHT
    assert emocache.main(["annotate", *settings]) == 0
    assert server.n_requests == 3 * N + lost
    assert records_in(tmp_path / "out.parquet") == calm
    [job] = Job.latest(storage)
    assert {receipt.worker_id for receipt in job.receipts()} <= {
        s.worker_id for s, _ in job.workers()
    }


@pytest.mark.cluster
def test_an_engine_of_several_processes_annotates(
    demo: Corpus, server: ChatServer, tmp_path: Path, calm: list[dict[str, Any]]
) -> None:
    argv = arguments(demo, server, tmp_path, "--engine", "local", "--workers", "2")
    assert emocache.main(argv) == 0
    assert server.n_requests == 3 * N
    assert max(server.asked.values()) == 1
    assert records_in(tmp_path / "out.parquet") == calm


@pytest.mark.cluster
@pytest.mark.fault("an endpoint that is down, seen by an engine's workers")
def test_an_engine_tells_what_its_workers_met(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    preset = preset_of(server, demo, "audio_tone.model=other")
    found = prepare(demo.records, preset, tmp_path)
    job = open_job(work_storage(tmp_path), N, found.plan)
    config = AnnotationConfig(
        store=str(tmp_path), manifest=str(demo.manifest), media_root=str(demo.root),
        job_id=job.job_id, generation=job.generation, session="s", preset=preset,
        settings=found.settings,
    )  # fmt: skip
    with pytest.raises(EmocacheError, match="does not exist"):
        run_engine(EngineOptions(kind="local", workers=1), config, job)


@pytest.mark.slurm
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.fault("Slurm: scancel of an annotating task, and the batch engine after it")
def test_slurm_runs_a_worker_that_is_cancelled_and_then_the_engine(
    demo: Corpus, server: ChatServer, tmp_path: Path, slurm: Slurm, calm: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    server.latency_s = 1.0
    argv = arguments(demo, server, tmp_path)
    at = argv.index("--out")
    words = shlex.join(["annotate-worker", *argv[1:at], *argv[at + 2 :], "--walltime", "10m"])
    script = (
        f"#!/bin/bash\nexport PYTHONPATH={REPOSITORY}\nexec {sys.executable} -m emocache {words}\n"
    )
    job = slurm.submit(script, f"--output={tmp_path}/job-%j.out")
    wait_until(lambda: server.n_requests >= 5)
    slurm.run("scancel", job)
    wait_until(lambda: slurm.states().get(job) in (None, "CANCELLED", "FAILED", "COMPLETED"))
    wait_until(lambda: server.in_flight == 0)
    n = server.n_requests
    lost = n - len(answers_in(tmp_path))
    assert 5 <= n < 3 * N
    server.latency_s = 0.0
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    engine = [
        "--engine",
        "slurm",
        "--workers",
        "1",
        "--walltime",
        "10m",
        "--log-dir",
        str(tmp_path / "l"),
    ]
    assert emocache.main([*argv, *engine]) == 0
    assert server.n_requests == 3 * N + lost
    assert records_in(tmp_path / "out.parquet") == calm


def test_a_configuration_finds_its_class_by_its_work(demo: Corpus, server: ChatServer) -> None:
    config = AnnotationConfig(
        store="w", manifest="m", media_root="r", job_id="j", generation=0, session="s",
        preset=preset_of(server, demo), settings="x",
    )  # fmt: skip
    assert read_config(config.model_dump_json()) == config
    with pytest.raises(EmocacheError, match="unknown work 'annotations'"):
        read_config(json.dumps({"work": "annotations"}))


# ---------------------------------------------------------------------------- budgets and refusals


def test_a_budget_of_requests_holds_and_the_rest_is_done_with_a_larger_one(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    with pytest.raises(BudgetError, match="budget of 20 requests is used up"):
        annotate(demo, preset_of(server, demo, "budget.requests=20"), tmp_path / "work")
    assert server.n_requests == 20
    assert len(answers_in(tmp_path)) == 20
    # What was spent counts for the whole job, so the same command goes no further.
    with pytest.raises(BudgetError):
        annotate(demo, preset_of(server, demo, "budget.requests=20"), tmp_path / "work")
    assert server.n_requests == 20
    found = annotate(demo, preset_of(server, demo, f"budget.requests={3 * N}"), tmp_path / "work")
    assert server.n_requests == 3 * N
    assert len(results_of(found)) == N


@pytest.mark.fault("an endpoint that answers with 429 and 500, under a budget")
def test_a_budget_counts_requests_that_failed(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.fail("500", every=2)
    with pytest.raises(BudgetError):
        annotate(demo, preset_of(server, demo, "budget.requests=25"), tmp_path / "work")
    assert server.n_requests == 25


def test_a_budget_of_tokens_holds_over_all_endpoints(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    cap = 12_000
    with pytest.raises(BudgetError, match=r"budget of 12,000 tokens"):
        annotate(demo, preset_of(server, demo, f"budget.tokens={cap}"), tmp_path / "work")
    answers = list(AnswerCache(tmp_path / "work" / ANSWERS))
    used = sum((a.prompt_tokens or 0) + (a.completion_tokens or 0) for a in answers)
    assert answers
    assert used <= cap


def test_a_request_that_does_not_fit_waits_for_another_endpoints() -> None:
    purse = Purse(Caps(tokens=100))
    one, two = _Part(Caps(), purse), _Part(Caps(), purse)

    async def run() -> list[str]:
        said = []
        held = await one.reserve(80)

        async def other() -> None:
            reserved = await two.reserve(50)
            said.append("reserved")
            two.settle(reserved, 50)

        waiting = asyncio.create_task(other())
        await asyncio.sleep(0.2)
        said.append("waited")
        one.settle(held, 30)
        await waiting
        with pytest.raises(BudgetError):
            await one.reserve(21)
        purse.tokens_elsewhere = 20
        with pytest.raises(BudgetError):
            await two.reserve(1)
        return said

    assert asyncio.run(run()) == ["waited", "reserved"]


@pytest.mark.fault("an endpoint that is down, unauthorised or without the model")
@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("401", UnauthorisedError, "no key was sent"),
        ("404", UnknownModelError, "refused on demand"),
        ("500", EndpointDownError, "does not answer"),
    ],
)
def test_an_endpoint_of_no_use_ends_the_run_and_keeps_what_the_others_said(
    fault: Any, error: type[EmocacheError], says: str, demo: Corpus, server: ChatServer,
    tmp_path: Path,
) -> None:  # fmt: skip
    server.fail(fault, match="Listen to this recording")
    more = ("audio_tone.retry.attempts=2", "audio_tone.retry.stop_after=2")
    preset = preset_of(server, demo, *more)
    with pytest.raises(error, match=says):
        annotate(demo, preset, tmp_path / "work")
    good = sum(what == "ok" for *_, what in server.requests)
    assert len(answers_in(tmp_path)) == good
    server.calm()
    before = server.n_requests
    found = annotate(demo, preset, tmp_path / "work")
    assert len(results_of(found)) == N
    assert server.n_requests == before + 3 * N - good


@pytest.mark.fault("a media disk that is gone")
def test_a_run_in_which_most_fail_stops_and_records_none_of_it(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    media = tmp_path / "many" / "media"
    media.mkdir(parents=True)
    records = []
    for n in range(40):
        path = write_wav(media / f"{n}.wav", np.full(3200, 100 + n), 16_000)
        uid, clip = f"many/{n}", clip_of(path)
        records.append(Record(uid=uid, media=f"media/{n}.wav", clip=clip, emotion="sad"))
    corpus = Corpus(tmp_path / "many", tuple(records), demo.header).write()
    media.rename(corpus.root / "elsewhere")
    preset = preset_of(server)
    with pytest.raises(ExtractionStopped, match="Is the disk mounted"):
        annotate(corpus, preset, tmp_path / "work")
    assert len(Journal(tmp_path / "work" / RESULTS, RecordResult)) == 0
    (corpus.root / "elsewhere").rename(media)
    found = annotate(corpus, preset, tmp_path / "work")
    assert len(results_of(found)) == 40
    assert not any(result.failures for result in results_of(found).values())


# ---------------------------------------------------------------------------- again


def test_what_failed_is_tried_again_by_kind_and_only_that(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.fail("refusal", match="Listen to this recording", times=3)
    server.fail("empty", match="one frame of a video", times=2)
    preset = preset_of(server, demo)
    first = results_of(annotate(demo, preset, tmp_path / "work"))
    kinds = Counter(step.kind for result in first.values() for step in result.failures)
    assert kinds == {"refused": 3, "empty": 2}
    server.calm()
    assert not annotate(demo, preset, tmp_path / "work").plan.todo
    n = server.n_requests
    again = annotate(demo, preset, tmp_path / "work", retry=("missing",))
    assert (again.plan.todo, server.n_requests) == ((), n)
    results = results_of(annotate(demo, preset, tmp_path / "work", retry=("refused",)))
    left = Counter(step.kind for result in results.values() for step in result.failures)
    assert left == {"empty": 2}
    # Three tones, and the three descriptions whose clues are other ones now.
    assert server.n_requests == n + 6
    untouched = [uid for uid in first if not any(s.kind == "refused" for s in first[uid].failures)]
    assert all(results[uid] == first[uid] for uid in untouched)


@pytest.mark.fault("kill -9 of a retry")
def test_a_killed_retry_does_not_ask_again_what_failed_again(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.fail("refusal", match="Listen to this recording")
    preset = preset_of(server, demo)
    annotate(demo, preset, tmp_path / "work")
    n_tones = sum(body["model"] == "al" for _, body, _ in server.requests)
    assert n_tones == N
    time.sleep(0.01)
    found = prepare(demo.records, preset, tmp_path / "work", retry=("refused",), unit_clips=4)
    assert len(found.plan.todo) == N
    # The first half is asked again; then the worker ends, as one that is killed does.
    n_calls = 0

    def count() -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == N // 2:
            drain.drain_all("enough")

    job = open_job(work_storage(tmp_path / "work"), N, found.plan)
    config = AnnotationConfig(
        store=str(tmp_path / "work"), manifest=str(demo.manifest), media_root=str(demo.root),
        job_id=job.job_id, generation=job.generation, session="s", preset=preset,
        settings=found.settings, open_clips=4,
    )  # fmt: skip
    work(config.model_dump_json(), records=demo.records, on_clip=count)
    assert job.undone()
    annotate(demo, preset, tmp_path / "work", retry=("refused",))
    assert not job.undone()
    tones = sum(body["model"] == "al" for _, body, _ in server.requests)
    assert tones == 2 * N


def test_other_settings_ask_only_what_they_change(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    annotate(demo, preset_of(server, demo), tmp_path / "work")
    n = server.n_requests
    annotate(demo, preset_of(server, demo, "consolidate.temperature=0.3"), tmp_path / "work")
    assert server.n_requests == n + N
    corpus = Corpus(
        demo.root,
        tuple(r.model_copy(update={"emotion": "sad"}) for r in demo.records),
        demo.header,
    )
    n_sad = sum(record.emotion == "sad" for record in demo.records)
    annotate(corpus, preset_of(server, demo), tmp_path / "work")
    assert server.n_requests == n + N + N - n_sad


def test_many_requests_are_in_flight_over_the_units_of_one_worker(
    demo: Corpus, tmp_path: Path
) -> None:
    with chat_server(MODELS, latency_s=0.2) as running:
        annotate(demo, preset_of(running, demo), tmp_path / "work", unit_clips=1)
        assert running.peak == 3 * IN_FLIGHT


def test_no_key_is_written_anywhere(
    demo: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "sk-test-4711-do-not-write-me"
    monkeypatch.setenv("TEST_KEY", secret)
    with chat_server(MODELS, api_key=secret) as running:
        argv = arguments(
            demo, running, tmp_path, "--limit", "3", "--log-dir", str(tmp_path / "logs")
        )
        keys = [
            f"{role}.api_key_env=TEST_KEY"
            for role in ("visual_objective", "audio_tone", "consolidate")
        ]
        assert emocache.main([*argv, *keys]) == 0
        running.fail("echo key")
        assert emocache.main([*argv, *keys, "--limit", "5"]) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_a_worker_refuses_prompts_that_differ_from_the_jobs(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    preset = preset_of(server, demo)
    found = prepare(demo.records, preset, tmp_path)
    job = open_job(work_storage(tmp_path), N, found.plan)
    config = AnnotationConfig(
        store=str(tmp_path), manifest=str(demo.manifest), media_root=str(demo.root),
        job_id=job.job_id, generation=job.generation, session="s", preset=preset, settings="other",
    )  # fmt: skip
    with pytest.raises(EmocacheError, match="other prompts"):
        work(config.model_dump_json())
    assert server.n_requests == 0
