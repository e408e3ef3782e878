"""One worker of a job: who it is, its heartbeats, and how others tell whether it is alive.

A worker keeps one small file in the store, `workers/<worker_id>.json`, which a thread writes again
every few seconds. Whether its heartbeats stopped is judged by the storage's own clock: the time of
the worker's last heartbeat is compared with the time of one that the judge has just written. Clocks
of different machines are never compared.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import Field, ValidationError

from cache.errors import EmocacheError, SchemaError, StoreError
from cache.schema import Model, decode_json
from cache.storage import Storage, exists

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
LEASE_TIMEOUT_S = 120.0
"""A worker without a heartbeat for so long is taken for dead. A guess is enough: units are committed
exactly once, whoever encodes them. Longer than the minute for which an NFS client may show old files."""
_MISSED_HEARTBEATS = 3
"""A lease must outlast at least so many heartbeats, or living workers would be taken for dead."""

_CREATIONS = 10
"""Times that garbage collection may remove a file in the making before that is an error."""

SESSION_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Names of sessions, which are names of files too."""

M = TypeVar("M", bound=Model)
Note = Callable[[str], None]
"""Takes one line about a file that was passed over."""


class StageSeconds(Model):
    """Where the time of a worker or of a unit went, in seconds."""

    decode_cpu_s: float = 0.0
    decode_wait_s: float = 0.0
    """The encoders waited for decoding."""
    encode_s: dict[str, float] = Field(default_factory=dict)
    """By spec label, or by step of an annotation."""
    write_s: float = 0.0
    fetch_s: float = 0.0
    """Remote media."""
    idle_s: float = 0.0


class WorkerState(Model):
    """What a worker says of itself at every heartbeat. Its times are for people only."""

    worker_id: str
    session: str = Field(pattern=SESSION_PATTERN)
    """The run that started it; its workers are stopped together."""
    engine: str
    host: str
    host_identity: str
    """See `host_identity`."""
    pid: int
    pid_started: int | None
    """See `process_started`."""
    device: str
    log: str | None = None
    """Where its log stands."""
    started_s: float
    """Unix time by the worker's clock, like `updated_s`."""
    updated_s: float
    ended: bool = False
    end_reason: str | None = None
    """Why it ended before its work was done; None if it did not."""
    unit: int | None = None
    n_units: int = 0
    n_clips: int = 0
    n_failed: int = 0
    seconds: StageSeconds = StageSeconds()
    encoding: tuple[str, ...] = ()
    """Keys of the clips that are in the encoder: suspects, should the worker die."""
    encoding_alone: bool = False
    """Each of them is encoded in a batch of its own."""
    decoding: tuple[str, ...] = ()
    gpu_busy: float | None = None
    """Share of time, 0 to 1."""
    usage: dict[str, float] = Field(default_factory=dict)
    """What it used up of endpoints, by role and measure."""
    note: str | None = None


# ---------------------------------------------------------------------------- documents


def encode(document: Model) -> bytes:
    """Return a document as the JSON that is stored."""
    return document.model_dump_json().encode()


def create_document(storage: Storage, key: str, document: Model, *, durable: bool = True) -> bool:
    """Create a JSON document unless there is one; return whether this call did.

    Args:
        storage: The store's.
        key: The file.
        document: Its content.
        durable: False for what a power cut may lose.
    """
    for _ in range(_CREATIONS):
        with contextlib.suppress(FileNotFoundError):  # in the making, it was taken for garbage
            return storage.create(key, encode(document), durable=durable)
    return storage.create(key, encode(document), durable=durable)


def read_document(storage: Storage, key: str, model: type[M]) -> M:
    """Read a JSON document.

    Raises:
        FileNotFoundError: There is none.
        SchemaError: It is damaged or of another kind.
    """
    data = storage.read(key)
    try:
        return model.model_validate_json(data)
    except ValidationError:
        return decode_json(model, data, f"{storage.url}/{key}")  # the same, with a better message


def read_or_note(storage: Storage, key: str, model: type[M], note: Note) -> M | None:
    """Read a JSON document; one that is gone is None, one that cannot be read is None and noted."""
    try:
        return read_document(storage, key, model)
    except FileNotFoundError:
        return None
    except SchemaError as error:
        note(f"passed over: {error}")
    except OSError as error:  # NFS: replaced by another machine while it was read
        note(f"passed over: {storage.url}/{key}: cannot be read ({error.strerror or error})")
    return None


@contextlib.contextmanager
def storage_errors(storage: Storage, action: str) -> Iterator[None]:
    """Name the store in errors of the storage.

    Args:
        storage: Where the job is.
        action: What was tried, as a past participle: `read`, `written`.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{storage.url}: the job's files cannot be {action} ({error.strerror or error}). Everything "
            "committed stays; free space or mend the storage, and run the same command again."
        ) from error


# ---------------------------------------------------------------------------- processes


def host_identity() -> str:
    """Return what two processes have in common if each can see whether the other is alive.

    That are the host, its boot, the namespace of process ids (containers) and the user, because
    `/proc` may hide other users' processes. Where there is no `/proc` it is unique, so that only
    heartbeats tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return f"unknown:{uuid.uuid4().hex}"
    return f"{socket.gethostname()}:{boot}:{namespace}:{os.getuid()}"


def process_started(pid: int) -> int | None:
    """Return when a process of this host started, in clock ticks since boot.

    None if there is none, or if it is dead and only waits to be reaped. Process ids are used again;
    an id together with its start is not.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    state, started = fields[0], int(fields[19])
    return None if state in "ZX" else started


# ---------------------------------------------------------------------------- how others see a worker


def worker_key(root: str, worker_id: str) -> str:
    """Return the key of a worker's file."""
    return f"{root}/workers/{worker_id}.json"


def stop_key(root: str, session: str) -> str:
    """Return the key whose existence asks a session's workers to stop.

    Raises:
        SchemaError: No session can have this name.
    """
    if not re.fullmatch(SESSION_PATTERN, session):
        raise SchemaError(
            f"{session!r} is not the name of a session. Names are letters, digits and . _ -, as "
            "`emocache extract status` shows them."
        )
    return f"{root}/stops/{session}"


@dataclass(frozen=True)
class Sighting:
    """What a worker's file tells of it."""

    state: WorkerState | None
    """None if the file cannot be read."""
    seen_s: float
    """Its last heartbeat, by the storage's clock."""
    has_vanished: bool = False
    """Its process ran on this host and is no more."""

    @property
    def has_ended(self) -> bool:
        """True if it said so."""
        return self.state is not None and self.state.ended

    @property
    def is_gone(self) -> bool:
        """True if no clock is needed to tell that it is dead."""
        return self.has_ended or self.has_vanished

    def is_dead(self, now_s: float | None, lease_timeout_s: float) -> bool:
        """True if the worker is gone, or was silent for too long.

        Args:
            now_s: The time by the storage's clock; None if it is not known: then silence says nothing.
            lease_timeout_s: How long is too long.
        """
        return self.is_gone or (now_s is not None and now_s - self.seen_s > lease_timeout_s)


def look_at(storage: Storage, root: str, worker_id: str, note: Note) -> Sighting | None:
    """Look at a worker's file; None if there is none."""
    key = worker_key(root, worker_id)
    try:
        seen_s = storage.modified_s(key)
    except FileNotFoundError:
        return None
    state = read_or_note(storage, key, WorkerState, note)
    if state is None or state.ended or not _has_vanished(state):
        return Sighting(state, seen_s)
    # Its last word may have come after the first look: it counts.
    last = read_or_note(storage, key, WorkerState, note) or state
    return Sighting(last, seen_s, has_vanished=True)


def _has_vanished(state: WorkerState) -> bool:
    """True if the worker's process ran on this host and is no more."""
    if state.host_identity != host_identity():
        return False
    return process_started(state.pid) != state.pid_started


# ---------------------------------------------------------------------------- how a worker sees itself


class WorkerSession:
    """This worker's identity in a job, and its heartbeats. A context manager.

    Its state is in the store before it can claim anything. On leaving, or by `close`, the state says
    that the worker ended, and what it still holds is free.
    """

    def __init__(
        self,
        storage: Storage,
        root: str,
        *,
        session: str,
        engine: str,
        device: str,
        log: str | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        lease_timeout_s: float = LEASE_TIMEOUT_S,
    ) -> None:
        """Describe a worker of the job at `root` (`Job.root`); nothing is written yet.

        Args:
            storage: The store's.
            root: Key of the job's folder.
            session: The run that this worker belongs to.
            engine: What started it.
            device: Where it encodes.
            log: Where its log stands, for people.
            heartbeat_s: Time between two heartbeats.
            lease_timeout_s: Silence after which this worker takes another for dead.

        Raises:
            SchemaError: The timeout is too short for the heartbeats, or `session` is no name.
        """
        if lease_timeout_s < _MISSED_HEARTBEATS * heartbeat_s:
            raise SchemaError(
                f"a lease timeout of {lease_timeout_s} s is too short for heartbeats every {heartbeat_s} "
                f"s: living workers would be taken for dead. Give at least "
                f"{_MISSED_HEARTBEATS * heartbeat_s} s."
            )
        self.storage, self.root = storage, root
        self.heartbeat_s, self.lease_timeout_s = heartbeat_s, lease_timeout_s
        self.should_stop = threading.Event()
        """Set when somebody asks this session to stop; may be waited for."""
        self._stop_key = stop_key(root, session)
        self._state = _first_state(session, engine, device, log)
        self._key = worker_key(root, self.worker_id)
        self._changing, self._writing = threading.Lock(), threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._failing: set[str] = set()
        self._written_s = time.monotonic()
        self._interrupted_s: float | None = None

    @property
    def worker_id(self) -> str:
        """Unique to this worker; part of file names."""
        return self._state.worker_id

    @property
    def state(self) -> WorkerState:
        """What the next heartbeat will say."""
        return self._state

    @property
    def lost(self) -> bool:
        """True once heartbeats could not be written for longer than the lease timeout.

        Then others may have taken over what this worker holds: ask `Job.holds` before a commit. It
        stays True.
        """
        silent_s = time.monotonic() - self._written_s
        return self._interrupted_s is not None or silent_s > self.lease_timeout_s

    def start(self) -> Self:
        """Write the first heartbeat and begin with the others.

        Raises:
            StoreError: The storage cannot be written.
        """
        self._written_s = time.monotonic()
        with storage_errors(self.storage, "written"):
            self._write()
            self._look_for_stop()
        self._thread.start()
        return self

    def close(self, end_reason: str | None = None) -> None:
        """End the heartbeats and say so. Later calls do nothing.

        Args:
            end_reason: Why, if there was work left.
        """
        if self._closing.is_set():
            return
        self._closing.set()
        self._thread.join()
        self.beat(ended=True, end_reason=end_reason, encoding=(), decoding=())

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(None if kind is None else f"{kind.__name__}: {error}")

    def update(self, **changes: Any) -> None:
        """Change fields of the state; the next heartbeat tells them.

        Raises:
            ValidationError: There is no such field.
        """
        with self._changing:
            self._state = WorkerState(**{**dict(self._state), **changes})

    def beat(self, **changes: Any) -> None:
        """Change fields of the state, and tell them at once.

        A failure of the storage is logged, not raised: the next heartbeat tries again.
        """
        self.update(**changes)
        self._tolerate("heartbeat", self._write)

    def storage_now_s(self) -> float | None:
        """Return the time by the storage's clock, from a heartbeat written just now.

        None after an interruption of our own heartbeats: others were perhaps cut off from the storage
        as we were, and get one lease timeout to be heard again.
        """
        self.beat()
        since = self._interrupted_s
        if since is not None and time.monotonic() - since < self.lease_timeout_s:
            return None
        return self.storage.modified_s(self._key)

    def _run(self) -> None:
        while not self._closing.wait(self.heartbeat_s):
            self._tolerate("heartbeat", self._write)
            self._tolerate("look for a stop request", self._look_for_stop)

    def _tolerate(self, what: str, act: Callable[[], None]) -> None:
        """Do something; log the first of several failures in a row."""
        try:
            act()
        except (OSError, EmocacheError) as error:
            if what not in self._failing:
                logger.warning(
                    "%s: worker %s: %s failed (%s); it works on and tries again every %g s",
                    self.storage.url, self.worker_id, what, error, self.heartbeat_s,
                )  # fmt: skip
            self._failing.add(what)
        else:
            self._failing.discard(what)

    def _write(self) -> None:
        with self._writing:
            began_s = time.monotonic()
            self.update(updated_s=time.time())
            self.storage.replace(self._key, encode(self._state), durable=False)
            ended_s = time.monotonic()
            if ended_s - self._written_s > self.lease_timeout_s:
                self._interrupted_s = ended_s
            self._written_s = began_s

    def _look_for_stop(self) -> None:
        if not self.should_stop.is_set() and exists(self.storage, self._stop_key):
            self.should_stop.set()


def _first_state(session: str, engine: str, device: str, log: str | None) -> WorkerState:
    host, pid, now_s = socket.gethostname(), os.getpid(), time.time()
    return WorkerState(
        worker_id=f"{re.sub(r'[^A-Za-z0-9]+', '-', host)[:40]}-{pid}-{uuid.uuid4().hex[:8]}",
        session=session,
        engine=engine,
        host=host,
        host_identity=host_identity(),
        pid=pid,
        pid_started=process_started(pid),
        device=device,
        log=log,
        started_s=now_s,
        updated_s=now_s,
    )
