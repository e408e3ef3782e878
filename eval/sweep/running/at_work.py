"""Who works on a sweep, and on what: orders, locks, and what each process says of itself.

::

    OUT/.lock                      held by the one process that leads
    OUT/at-work/KEY.order.json     what the process that trains and scores a run is told
    OUT/at-work/KEY.json           what it does just now; KEY.lock is held by it, KEY.log is its output
    OUT/at-work/tokens.*           the same of the extraction
"""

from __future__ import annotations

import faulthandler
import fcntl
import logging
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cache.errors import StoreError
from cache.files import write_aside, write_text_aside
from cache.schema import Model, decode_json
from eval.sweep.schema import Scale, ScoreColumn
from eval.sweep.state import (
    AT_WORK,
    LOCK_FILE,
    SWEEP_FILE,
    BegunTrial,
    Step,
    work_file,
)
from train.config import Preset

TOKENS = "tokens"
"""Name of the extraction among those at work."""

_GRACE_S = 60.0
"""Time for a last checkpoint when the starter of a process is gone."""
_LOOK_S = 1.0
"""Nobody who only looks who leads takes so long."""


class AtWork(Model):
    """What a process of a sweep does just now: OUT/at-work/KEY.json."""

    pid: int
    host: str
    step: Step
    trial: str | None = None
    """Which one is scored."""
    stage: str | None = None
    """Which one is trained."""
    n_done: int = 0
    """Clips, optimizer steps or replies, by the step."""
    n_total: int = 0
    note: str = ""
    started: float
    """Seconds since 1970, when the step began."""
    n_before: int = 0
    """Of `n_done`, those that an earlier process did."""


class Order(Model):
    """What the process that trains and scores a run is told: OUT/at-work/KEY.order.json."""

    schema_version: Literal[1] = 1
    out: str
    run_key: str
    preset: Preset
    """Resolved, with the digests of the encoders' weights."""
    trials: tuple[BegunTrial, ...]
    """Those that share the run."""
    scores: tuple[ScoreColumn, ...]
    manifest: str
    store: str
    scale: Scale = "full"
    device: str = "auto"
    slot: int = Field(default=0, ge=0)
    """Which of the processes that run side by side it is: they take turns in a machine's GPUs."""
    n_threads: int | None = Field(default=None, gt=0)
    """None: as the environment says."""
    batch_size: int = Field(default=16, gt=0)
    """Clips that are asked about at once."""
    wheels: str | None = None
    """Folder of the emotion wheel tables."""


def write_order(order: Order) -> Path:
    """Write what the process of a run is told; return the file."""
    path = work_file(Path(order.out), order.run_key, "order.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_aside(path, order.model_dump_json(indent=1) + "\n")
    return path


def read_at_work(out: Path) -> dict[str, AtWork]:
    """Return what the processes of a sweep said last, by run key; those that ended have no file."""
    found = {}
    for path in sorted((out / AT_WORK).glob("*.json")):
        if path.name.endswith(".order.json") or path.name.startswith("."):
            continue
        try:
            found[path.stem] = decode_json(AtWork, path.read_bytes(), str(path))
        except FileNotFoundError:  # it ended meanwhile
            continue
    return found


class Telling:
    """Tells those who look on what this process does.

    Unless it says that it ended, what it said last stays for whoever wonders why it died.
    """

    EVERY_S = 0.5
    """Shortest time between two writes of mere progress."""

    def __init__(self, out: Path, key: str) -> None:
        """Say nothing yet."""
        self._path = work_file(out, key, "json")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._state: AtWork | None = None
        self._said_s = 0.0

    def begin(self, step: Step, *, n_total: int = 0, trial: str | None = None) -> None:
        """Begin a step."""
        self._state = AtWork(
            pid=os.getpid(),
            host=socket.gethostname(),
            step=step,
            trial=trial,
            n_total=n_total,
            started=time.time(),
        )
        self._write()

    def progress(self, *, now: bool = False, **changes: Any) -> None:
        """Change fields of `AtWork`; written at most every `EVERY_S`, or `now`."""
        assert self._state is not None
        self._state = self._state.model_copy(update=changes)
        if now or time.monotonic() - self._said_s >= self.EVERY_S:
            self._write()

    def end(self) -> None:
        """Say that nothing is left to do."""
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        assert self._state is not None
        self._said_s = time.monotonic()
        with write_aside(self._path, durable=False) as aside:
            aside.write_text(self._state.model_dump_json(), encoding="utf-8")


def end_with(alive: Connection) -> None:
    """End this process in good order when its starter is gone; runs in a thread of its own.

    Args:
        alive: Whose other end the starter has, and nobody else.
    """
    with suppress(EOFError, OSError):
        alive.recv_bytes()
    os.kill(os.getpid(), signal.SIGTERM)  # a training saves its state
    time.sleep(_GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def speak_to(path: Path) -> None:
    """Send all that this process and its libraries say to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def log_plainly() -> None:
    """Log to standard error, for processes whose output is a file, without what nobody can act upon."""
    faulthandler.enable()
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    for noisy in ("httpx", "transformers", "absl"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


@contextmanager
def leading(out: Path) -> Iterator[None]:
    """Be the one process that leads a sweep.

    Raises:
        StoreError: Another one does.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file. Give a folder with --out.")
    descriptor = _take_lead(out)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        try:
            # It was refused: leave no trace, nor take that of another who came when the folder was removed.
            if not (out / SWEEP_FILE).exists() and _is_at(descriptor, out / LOCK_FILE):
                (out / LOCK_FILE).unlink()
                with suppress(OSError):
                    out.rmdir()
        finally:
            os.close(descriptor)  # gives the lock up


def _take_lead(out: Path) -> int:
    """Return the descriptor of the lock file, locked and in its place.

    Raises:
        StoreError: Another process has it for more than a second; who looks has it for a moment.
    """
    path, until_s = out / LOCK_FILE, time.monotonic() + _LOOK_S
    while True:
        out.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
        except FileNotFoundError:  # who was refused took the folder along just now
            if time.monotonic() > until_s:
                raise
            continue
        if not _lock(descriptor):
            if time.monotonic() > until_s:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise StoreError(
                    f"{out}: {holder} runs this sweep already. Look at it with: emocache sweep "
                    f"--status --out {out}. Or give another --out."
                )
            time.sleep(0.02)
        elif _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """True if an open file is still the one of a path: who led before may have deleted it."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def leader(out: Path) -> str | None:
    """Return who leads a sweep just now; None: nobody."""
    try:
        descriptor = os.open(out / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        return None if _lock(descriptor, fcntl.LOCK_SH) else _holder(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def holding(out: Path, key: str) -> Iterator[None]:
    """Be the one process that works on a run, on any machine; wait while another one does."""
    path = work_file(out, key, "lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_held(out: Path, key: str) -> bool:
    """True while some process works on a run."""
    try:
        descriptor = os.open(work_file(out, key, "lock"), os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        return not _lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take a lock if it can be had at once; those who only look share it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
