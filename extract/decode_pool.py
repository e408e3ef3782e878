"""Decoding in processes of their own: a file that kills its decoder costs this file alone.

    with DecodePool(n_children=4) as pool:
        future = pool.submit(DecodeJob(path, sha256, media, requests))

A decoder that dies, exceeds its deadline or takes too much memory is replaced by a fresh one, and its
clip is tried again. Every child belongs to one thread of the pool, which watches it and lives as long
as the pool: the kernel kills the child when that thread ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias, TypeVar

from cache.errors import ExtractionStopped, SchemaError
from extract.decode_worker import DecodeJob, job_line, memory_of
from extract.failures import Failure, FailureKind
from extract.inputs import ClipInputs
from extract.wire import read_document, read_facts, read_inputs

__all__ = ["DecodeFailure", "DecodeJob", "DecodePool", "Prepared"]

logger = logging.getLogger(__name__)

DEADLINE_S = 120.0
MEMORY_BYTES = 2 * 2**30
RECYCLE_AFTER = 200

_ROOT = Path(__file__).resolve().parents[1]
# -P: a folder named `cache` or `av.py` where the user stands must not take the place of ours.
_COMMAND = (sys.executable, "-P", "-m", "extract.decode_worker")
_START_S = 120.0
"""Time to start a decoder: a cluster's file system may be slow to give Python its modules."""
_START_ATTEMPTS = 3
_END_S = 5.0
"""Time that a killed or finished decoder has to be gone."""
_POLL_S = 0.05
_LONGEST_PAUSE_S = 1.0
"""More than this between two looks means that we stood still: that time is not the child's."""
_DUMP_AT = 0.75
"""Part of the deadline after which the child writes to stderr where it is."""
_PIPE_BYTES = 2**20
_TAIL_BYTES = 4096

T = TypeVar("T")


@dataclass(frozen=True)
class DecodeFailure:
    """A clip that killed, blocked or overfilled every decoder it was given to."""

    failure: Failure
    attempts: int
    exit_signal: str | None = None
    """Name of the signal that ended the last decoder, unless it was we who sent it."""
    stderr_tail: str = ""
    """That decoder's last words, at most 4 KiB."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the container states, if the last decoder came that far."""


Prepared: TypeAlias = ClipInputs | DecodeFailure


class _AttemptFailed(Exception):
    """What became of one attempt; its decoder is of no more use."""

    def __init__(self, kind: FailureKind, message: str, exit_signal: str | None = None) -> None:
        super().__init__(message)
        self.kind: FailureKind = kind
        self.exit_signal = exit_signal


class DecodePool:
    """Decoder processes behind a queue. They start when there is work for them."""

    def __init__(
        self,
        n_children: int,
        *,
        deadline_s: float = DEADLINE_S,
        memory_bytes: int = MEMORY_BYTES,
        recycle_after: int = RECYCLE_AFTER,
        attempts: int = 2,
        command: Sequence[str] | None = None,
        detector: str | None = None,
    ) -> None:
        """Make a pool; no process is started yet.

        Args:
            n_children: Decoders that run at once.
            deadline_s: Longest time for one clip.
            memory_bytes: Most resident memory of a decoder, beyond what it takes when fresh.
            recycle_after: Clips after which a decoder is replaced, whatever its libraries leak.
            attempts: How often a clip is tried before it has failed; each decoder that it ended is
                replaced by a fresh one.
            command: The program to start in place of `extract.decode_worker`.
            detector: `module:attribute` of the `BoxDetector` that each decoder loads.
        """
        self._deadline_s = deadline_s
        self._memory_bytes = memory_bytes
        self._recycle_after = recycle_after
        self._attempts = attempts
        self._command = tuple(command or _COMMAND)
        self._detector = () if detector is None else (detector,)
        self._threads = ThreadPoolExecutor(n_children, thread_name_prefix="decode")
        self._lock = threading.Lock()
        self._closing = False
        # Both by the thread that owns the child.
        self._children: dict[int, _Child] = {}
        self._decoding: dict[int, str] = {}

    def submit(self, job: DecodeJob) -> Future[Prepared]:
        """Decode a clip when its turn comes.

        The future raises `ExtractionStopped` if no decoder starts on this machine, and
        `CancelledError` if the pool is closed before the clip is done.
        """
        return self._threads.submit(self._run, job)

    def in_flight(self) -> tuple[str, ...]:
        """Return the media paths that are being decoded now."""
        with self._lock:
            return tuple(self._decoding.values())

    def close(self, *, wait: bool = True) -> None:
        """Kill all decoders at once and give up what is not done.

        Args:
            wait: Whether to return only when every process and thread is gone.
        """
        with self._lock:
            self._closing = True
            for child in self._children.values():
                child.kill()
        if wait:
            self._finish()
        else:
            threading.Thread(target=self._finish, name="decode-close", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _finish(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        with self._lock:
            for child in self._children.values():
                child.end()

    # ---- in the threads of the pool -----------------------------------------------------------

    def _run(self, job: DecodeJob) -> Prepared:
        me = threading.get_ident()
        with self._lock:
            self._decoding[me] = job.media
        try:
            return self._try_often(job)
        finally:
            with self._lock:
                del self._decoding[me]

    def _try_often(self, job: DecodeJob) -> Prepared:
        attempt = 0
        while True:
            attempt += 1
            child = self._my_child()
            is_last = attempt >= self._attempts
            try:
                # Facts take time, and are needed of a clip that fails for good only.
                inputs = child.decode(job, self._deadline_s, state_facts=is_last)
            except _AttemptFailed as error:
                tail = child.end()
                self._give_up_if_closing()
                logger.warning("%s: attempt %d: %s", job.media, attempt, error)
                if is_last:
                    failure = Failure(error.kind, f"{job.media}: {error}")
                    return DecodeFailure(failure, attempt, error.exit_signal, tail, child.facts)
            except BaseException:
                child.end()  # its answer was not read to the end: the next clip must not find it
                raise
            else:
                if child.n_clips >= self._recycle_after:
                    child.end()
                return inputs

    def _my_child(self) -> _Child:
        """Return this thread's decoder, a fresh one if the last has ended."""
        child = self._children.get(threading.get_ident())
        if child is not None:
            if child.is_alive():
                return child
            child.end()
        for attempt in range(1, _START_ATTEMPTS + 1):
            try:
                return self._start()
            except OSError as error:
                self._give_up_if_closing()
                logger.warning("attempt %d to start a decoder: %s", attempt, error)
                said = str(error)
        raise ExtractionStopped(
            f"no decoder process starts with `{' '.join(self._command)}` ({said}). Check the "
            "installation, and that this machine has memory and processes to spare."
        )

    def _start(self) -> _Child:
        with self._lock:  # `close` kills the children there are; none may come after it
            self._give_up_if_closing()
            child = _Child(self._command, self._memory_bytes, self._detector)
            self._children[threading.get_ident()] = child
        try:
            child.await_ready()
        except _AttemptFailed as error:
            tail = child.end()
            raise ChildProcessError(f"{error}: {tail}" if tail else str(error)) from error
        return child

    def _give_up_if_closing(self) -> None:
        if self._closing:
            raise CancelledError


class _Child:
    """One decoder process, the pipes to it, and the watch over it. One thread uses it."""

    def __init__(self, command: Sequence[str], memory_bytes: int, detector: Sequence[str]) -> None:
        """Start the process; OSError if the machine refuses."""
        self._process = subprocess.Popen(
            [*command, str(os.getpid()), str(memory_bytes), *detector],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=_environment(),
            start_new_session=True,  # Ctrl-C in the terminal is for us to handle
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        self._stderr = self._process.stderr
        self._poll = select.poll()
        for pipe in (self._stdout, self._stderr):
            os.set_blocking(pipe.fileno(), False)
            self._poll.register(pipe, select.POLLIN)
        # A user may own a limited number of large pipes, and not every system has them.
        with suppress(OSError, AttributeError):
            fcntl.fcntl(self._stdout, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._tail = b""
        self._memory_bytes = memory_bytes
        self._fresh_bytes: int | None = None
        self.n_clips = 0
        self.facts: dict[str, Any] = {}

    def await_ready(self) -> None:
        """Wait until the process has loaded its libraries.

        Raises:
            _AttemptFailed: It ended or took too long.
        """
        self._begin("to start", _START_S)
        self._receive(lambda: read_document(self))
        _, self._fresh_bytes = memory_of(self._process.pid)

    def decode(self, job: DecodeJob, deadline_s: float, *, state_facts: bool) -> ClipInputs:
        """Have a clip decoded.

        Raises:
            _AttemptFailed: The process died, was too slow or too large, or answered nonsense. It is
                of no more use.
        """
        self.n_clips += 1
        self.facts = {}
        self._tail = b""
        self._begin("to decode", deadline_s)
        line = job_line(job, state_facts=state_facts, dump_after_s=_DUMP_AT * deadline_s)
        inputs = self._receive(lambda: self._ask(line, job))
        for failure in {stream.failure for stream in inputs.streams if stream.failure}:
            if failure.kind == "memory":  # other clips may have filled this process
                raise _AttemptFailed("memory", self._too_much_memory())
            if failure.kind == "unexpected":
                self._drain()
                logger.warning("%s: %s\n%s", job.media, failure.reason, self._last_words())
        return inputs

    def is_alive(self) -> bool:
        """True until the process has ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the process; any thread may do so."""
        self._process.kill()

    def end(self) -> str:
        """Kill the process if it lives, release its pipes, return its last words."""
        if not self._stdout.closed:
            self.kill()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:  # the kernel waits for a disk on its behalf
                logger.warning("decoder process %d does not end", self._process.pid)
            self._drain()
            for pipe in (self._stdin, self._stdout, self._stderr):
                pipe.close()
        return self._last_words()

    def readinto(self, buffer: memoryview) -> int:
        """Read what there is of the answer, and watch over the process while there is nothing.

        Returns:
            Number of bytes; 0 if the process has ended.

        Raises:
            _AttemptFailed: It exceeds its deadline or its memory.
        """
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll(1000 * _POLL_S)}
            if self._stderr.fileno() in ready:
                self._drain()
            self._check_limits()
            if self._stdout.fileno() in ready or not self.is_alive():
                try:
                    return os.readv(self._stdout.fileno(), [buffer])
                except BlockingIOError:  # it has ended, but something else holds its pipe
                    return 0

    def _ask(self, line: bytes, job: DecodeJob) -> ClipInputs:
        self._stdin.write(line)
        self.facts = read_facts(self)
        return read_inputs(self, job.requests)

    def _receive(self, read: Callable[[], T]) -> T:
        """Read from the process; what goes wrong is told as what became of the process."""
        try:
            return read()
        except (EOFError, BrokenPipeError):
            raise self._death() from None
        except SchemaError as error:
            raise _AttemptFailed(
                "crash", f"the decoder process gave a wrong answer: {error}"
            ) from error

    def _death(self) -> _AttemptFailed:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return _AttemptFailed(
                "crash", "the decoder process stopped in the middle of its answer"
            )
        if code >= 0:
            return _AttemptFailed("crash", f"the decoder process ended with exit code {code}")
        name = _signal_name(-code)
        if -code == signal.SIGKILL:  # not by us: our own kills are told when they are decided
            message = "the decoder process was killed by the system, probably for lack of memory"
            return _AttemptFailed("memory", message, name)
        return _AttemptFailed("crash", f"the decoder process died of {name}", name)

    def _begin(self, work: str, deadline_s: float) -> None:
        self._work, self._deadline_s = work, deadline_s
        self._spent_s, self._looked_s = 0.0, time.monotonic()

    def _check_limits(self) -> None:
        now_s = time.monotonic()
        self._spent_s += min(now_s - self._looked_s, _LONGEST_PAUSE_S)
        self._looked_s = now_s
        if self._spent_s > self._deadline_s:
            raise _AttemptFailed("hang", f"it took longer than {self._deadline_s:g} s {self._work}")
        _, resident_bytes = memory_of(self._process.pid)
        if (
            self._fresh_bytes is not None
            and resident_bytes > self._fresh_bytes + self._memory_bytes
        ):
            raise _AttemptFailed("memory", self._too_much_memory())

    def _too_much_memory(self) -> str:
        return f"it took more than {self._memory_bytes / 2**20:.0f} MiB of memory to decode"

    def _drain(self) -> None:
        """Take what the process wrote to stderr, so that it never waits for us; keep the end."""
        try:
            written = os.read(self._stderr.fileno(), _PIPE_BYTES)
        except BlockingIOError:
            return
        self._tail = (self._tail + written)[-_TAIL_BYTES:]
        if not written:  # closed: there is nothing more to wait for
            with suppress(KeyError):
                self._poll.unregister(self._stderr)

    def _last_words(self) -> str:
        return self._tail.decode("utf-8", "replace").strip()


def _environment() -> dict[str, str]:
    """Return the environment of a child: our modules, and one thread per native library."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    paths = filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))
    return {**os.environ, **dict.fromkeys(threads, "1"), "PYTHONPATH": os.pathsep.join(paths)}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
