"""Decoders that die, hang, swell and babble: real processes, which a clip's name tells what to do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.clip import file_sha256
from cache.errors import ExtractionStopped
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool, Prepared
from extract.failures import FailureKind
from extract.inputs import ClipInputs, InputRequest, prepare_inputs
from tests.media import stamped, write_clip, write_wav

REQUESTS = (
    InputRequest(stream="audio"),
    InputRequest(
        stream="video", frames="uniform", n_frames=16, size_px=224, interpolation="bicubic"
    ),
    InputRequest(stream="image", frames="middle", size_px=448, interpolation="bilinear"),
)
MEMORY_BYTES = 150 * 2**20

FAULTY = '''
"""A decoder that does what the first word of a clip's name says."""

import ctypes
import io
import os
import re
import sys
import time

import extract.inputs
from extract import decode_worker

decode, write_inputs = extract.inputs.decode, decode_worker.write_inputs
word = ""


def faulty_decode(path, **options):
    global word
    word = path.stem.partition("-")[0]
    again = path.with_suffix(".tried").exists()
    path.with_suffix(".tried").write_text(str(os.getpid()))
    print("I work on", path.name, file=sys.stderr)
    if word == "segv" or (word == "once" and not again):
        ctypes.string_at(0)
    elif word == "abort":
        os.abort()
    elif word == "exit":
        os._exit(3)
    elif word == "hang":
        time.sleep(60)
    elif word == "slow":
        time.sleep(0.7)
    elif word == "spin":  # in C, and never without the interpreter's lock
        re.match("(a+)+$", "a" * 64 + "b")
    elif word == "hog":
        blocks = []
        while True:
            blocks.append(b"x" * 2**25)
            time.sleep(0.02)
    elif word == "greedy":
        bytearray(2**42)
    elif word == "bug":
        raise TypeError("no such thing")
    elif word == "chatter":
        print("a library says hello")
        os.write(1, b"x" * 300_000)
        os.write(2, b"y" * 300_000)
    return decode(path, **options)


def faulty_write(file, inputs):
    if word == "garbage":
        file.write(b"Segmentation fault?" * 500)
        file.flush()
        return
    whole = io.BytesIO()
    write_inputs(whole, inputs)
    data = whole.getvalue()
    if word in ("short", "stall"):
        file.write(data[: len(data) // 2])
        file.flush()
    if word == "short":
        os._exit(0)
    if word == "stall":
        time.sleep(60)
    file.write(data)


extract.inputs.decode, decode_worker.write_inputs = faulty_decode, faulty_write
decode_worker.main()
'''

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    program = tmp_path_factory.mktemp("faulty") / "program.py"
    program.write_text(FAULTY)
    return [sys.executable, str(program)]


def job_of(path: Path, requests: Sequence[InputRequest] = REQUESTS) -> DecodeJob:
    return DecodeJob(path, file_sha256(path), f"clips/{path.name}", tuple(requests))


def tone(path: Path) -> DecodeJob:
    """Make a clip of sound, other bytes for another name."""
    rng = np.random.default_rng(list(path.name.encode()))
    return job_of(write_wav(path, rng.integers(-9000, 9000, 16000).astype(np.int16), 16000))


def assert_same(found: Prepared, job: DecodeJob) -> None:
    direct = prepare_inputs(job.path, job.sha256, job.media, job.requests)
    assert isinstance(found, ClipInputs), found
    assert found.streams == direct.streams
    assert [(a.dtype, a.shape) for a in found.arrays] == [(a.dtype, a.shape) for a in direct.arrays]
    assert [a.tobytes() for a in found.arrays] == [a.tobytes() for a in direct.arrays]
    assert found.audio_duration_s == direct.audio_duration_s
    assert (found.decoder, found.facts) == (direct.decoder, direct.facts)


def lives(pid: int) -> bool:
    """True unless a process is gone, or waits for its parent to be told so."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def pid_at_work_on(job: DecodeJob) -> int:
    """Wait for a faulty decoder to begin a clip; return its process."""
    note = job.path.with_suffix(".tried")
    wait_for(lambda: note.exists() and bool(note.read_text()))
    return int(note.read_text())


# ---- every fault, side by side with good clips -------------------------------------------------

FAULTS = (
    "segv", "abort", "exit", "hang", "spin", "hog", "greedy",
    "garbage", "short", "stall", "once", "chatter", "bug",
)  # fmt: skip
GOOD = 12


@pytest.fixture(scope="module")
def results(
    faulty: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[DecodeJob, Prepared]]:
    folder = tmp_path_factory.mktemp("clips")
    names: list[str] = []
    for number in range(GOOD):
        names += [f"good-{number}.wav", *(f"{word}-1.wav" for word in FAULTS[number : number + 1])]
    names += [f"{word}-1.wav" for word in FAULTS[GOOD:]]
    jobs = [tone(folder / name) for name in names]
    picture = folder / "good-picture.png"
    Image.fromarray(stamped(5)).save(picture)
    jobs += [job_of(picture), job_of(write_clip(folder / "good-clip.mp4"))]
    pool = DecodePool(2, deadline_s=1.0, memory_bytes=MEMORY_BYTES, command=faulty)
    with pool:
        futures = [pool.submit(job) for job in jobs]
        prepared = [future.result(timeout=120) for future in futures]
        assert pool.in_flight() == ()
    return {job.path.stem: (job, found) for job, found in zip(jobs, prepared, strict=True)}


@pytest.mark.parametrize(
    ("word", "kind", "exit_signal", "message", "tail"),
    [
        ("segv", "crash", "SIGSEGV", "died of SIGSEGV", "Fatal Python error: Segmentation fault"),
        ("abort", "crash", "SIGABRT", "died of SIGABRT", "Fatal Python error: Aborted"),
        ("exit", "crash", None, "ended with exit code 3", "I work on exit-1.wav"),
        ("hang", "hang", None, "longer than 1 s to decode", "in faulty_decode"),
        ("spin", "hang", None, "longer than 1 s to decode", "in faulty_decode"),
        ("stall", "hang", None, "longer than 1 s to decode", "in faulty_write"),
        ("hog", "memory", None, "more than 150 MiB of memory", "I work on hog-1.wav"),
        ("greedy", "memory", None, "more than 150 MiB of memory", "I work on greedy-1.wav"),
        ("garbage", "crash", None, "wrong answer: the answer starts with b'Segmenta'", ""),
        ("short", "crash", None, "ended with exit code 0", "I work on short-1.wav"),
    ],
)
def test_a_fatal_file_costs_itself_alone(
    results: dict[str, tuple[DecodeJob, Prepared]],
    word: str,
    kind: FailureKind,
    exit_signal: str | None,
    message: str,
    tail: str,
) -> None:
    job, found = results[f"{word}-1"]
    assert isinstance(found, DecodeFailure)
    assert found.failure.kind == kind
    assert found.failure.message.startswith(f"clips/{word}-1.wav: ")
    assert message in found.failure.message
    assert found.exit_signal == exit_signal
    assert found.attempts == 2
    assert tail in found.stderr_tail
    assert found.facts == {
        "container": "wav",
        "n_bytes": job.path.stat().st_size,
        "streams": [{"type": "audio", "name": "pcm_s16le", "sample_rate": 16000, "channels": 1}],
    }


def test_the_clips_beside_them_are_not_touched(
    results: dict[str, tuple[DecodeJob, Prepared]],
) -> None:
    good = [name for name in results if name.startswith("good")]
    assert len(good) == GOOD + 2
    for name in good:
        job, found = results[name]
        assert_same(found, job)


def test_a_second_attempt_may_succeed(results: dict[str, tuple[DecodeJob, Prepared]]) -> None:
    job, found = results["once-1"]
    assert_same(found, job)


def test_libraries_may_print(results: dict[str, tuple[DecodeJob, Prepared]]) -> None:
    job, found = results["chatter-1"]
    assert_same(found, job)


def test_an_unforeseen_exception_is_recorded_and_logged(
    faulty: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with DecodePool(1, command=faulty) as pool:
        found = pool.submit(tone(tmp_path / "bug-1.wav")).result(timeout=60)
    assert isinstance(found, ClipInputs)
    assert found.streams[0].failure is not None
    assert found.streams[0].failure.reason == "unexpected: TypeError: no such thing"
    assert "Traceback" in caplog.text
    assert 'raise TypeError("no such thing")' in caplog.text


# ---- processes --------------------------------------------------------------------------------


def test_only_the_parent_or_a_kill_ends_a_decoder(faulty: list[str], tmp_path: Path) -> None:
    job = tone(tmp_path / "hang-1.wav")
    with DecodePool(1, attempts=1, command=faulty) as pool:
        future = pool.submit(job)
        pid = pid_at_work_on(job)
        assert pool.in_flight() == ("clips/hang-1.wav",)
        assert os.getsid(pid) == pid, "Ctrl-C in our terminal does not reach it"
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, number)
        time.sleep(0.2)
        assert lives(pid)
        os.kill(pid, signal.SIGKILL)
        found = future.result(timeout=10)
    assert isinstance(found, DecodeFailure)
    assert found.failure.kind == "memory"
    assert "killed by the system, probably for lack of memory" in found.failure.message
    assert (found.exit_signal, found.attempts) == ("SIGKILL", 1)


def test_a_decoder_that_died_while_idle_is_replaced(faulty: list[str], tmp_path: Path) -> None:
    first, second = tone(tmp_path / "good-1.wav"), tone(tmp_path / "good-2.wav")
    with DecodePool(1, attempts=1, command=faulty) as pool:
        assert_same(pool.submit(first).result(timeout=60), first)
        pid = pid_at_work_on(first)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not lives(pid))
        assert_same(pool.submit(second).result(timeout=60), second)
        assert pid_at_work_on(second) != pid


def test_decoders_are_recycled_and_leave_nothing(faulty: list[str], tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    jobs = [tone(tmp_path / f"good-{number}.wav") for number in range(6)]
    before = descriptors()
    with DecodePool(1, recycle_after=2, command=faulty) as pool:
        for job in jobs:
            assert_same(pool.submit(job).result(timeout=60), job)
        pids = [pid_at_work_on(job) for job in jobs]
        assert pids[0::2] == pids[1::2]
        assert len(set(pids)) == 3
        assert not any(lives(pid) for pid in pids)
        assert descriptors() == before
    with pytest.raises(ChildProcessError):  # no zombie is left, either
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("wait", [True, False])
def test_close_kills_at_once(faulty: list[str], tmp_path: Path, wait: bool) -> None:
    job, later = tone(tmp_path / "hang-1.wav"), tone(tmp_path / "good-1.wav")
    pool = DecodePool(1, command=faulty)
    future, queued = pool.submit(job), pool.submit(later)
    pid = pid_at_work_on(job)
    pool.close(wait=wait)
    with pytest.raises(CancelledError):
        future.result(timeout=5)
    with pytest.raises(CancelledError):
        queued.result(timeout=5)
    wait_for(lambda: not lives(pid), 5)
    assert not later.path.with_suffix(".tried").exists()
    with pytest.raises(RuntimeError, match=r"after shutdown"):
        pool.submit(job)
    pool.close()


PARENT = """
import sys
from pathlib import Path
from cache.clip import file_sha256
from extract.decode_pool import DecodeJob, DecodePool
from extract.inputs import InputRequest

path = Path(sys.argv[1])
job = DecodeJob(path, file_sha256(path), path.name, (InputRequest(stream="audio"),))
with DecodePool(1, deadline_s=float(sys.argv[2]), attempts=1, command=sys.argv[3:]) as pool:
    sys.stdout.write(repr(pool.submit(job).result()))
"""


def parent_of(job: DecodeJob, deadline_s: float, command: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, str(job.path), str(deadline_s), *command],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def test_a_killed_parent_takes_its_decoders_along(faulty: list[str], tmp_path: Path) -> None:
    job = tone(tmp_path / "hang-1.wav")
    with parent_of(job, 60, faulty) as parent:
        pid = pid_at_work_on(job)
        assert lives(pid)
        parent.kill()
        wait_for(lambda: not lives(pid), 5)


def test_time_in_which_the_parent_was_stopped_does_not_count(
    faulty: list[str], tmp_path: Path
) -> None:
    job = tone(tmp_path / "slow-1.wav")
    with parent_of(job, 2.0, faulty) as parent:
        pid_at_work_on(job)
        parent.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        parent.send_signal(signal.SIGCONT)
        shown, _ = parent.communicate(timeout=30)
    assert shown.startswith("ClipInputs("), shown


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-c", "import sys; sys.exit('no such library: av')"], "library: av"),
        (["/nonexistent/python"], "No such file or directory"),
        ([sys.executable, "-c", "print('hello world')"], "starts with b'hello wo"),
    ],
)
def test_no_decoder_starts(tmp_path: Path, command: list[str], words: str) -> None:
    with DecodePool(1, command=command) as pool:
        future = pool.submit(tone(tmp_path / "a.wav"))
        with pytest.raises(ExtractionStopped, match=words):
            future.result(timeout=60)


def test_what_lies_where_the_user_stands_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tone(tmp_path / "a.wav")
    for name in ("cache", "extract", "av"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not ours')")
    monkeypatch.chdir(tmp_path)
    with DecodePool(1) as pool:
        found = pool.submit(job).result(timeout=60)
    assert_same(found, job)
    assert isinstance(found, ClipInputs)
    assert 0 < found.decode_cpu_s < 10


def test_real_clips_come_back_as_they_are_decoded_here(shared_clips: Path) -> None:
    files = [
        path for path in sorted(shared_clips.iterdir()) if path.suffix not in (".md", ".jsonl")
    ]
    assert len(files) == 26
    jobs = [job_of(path) for path in files]
    with DecodePool(2) as pool:
        futures = [pool.submit(job) for job in jobs]
        for job, future in zip(jobs, futures, strict=True):
            assert_same(future.result(timeout=120), job)
