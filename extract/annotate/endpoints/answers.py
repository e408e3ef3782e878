"""What models answered, kept by the key of the question, so that no answer is paid for twice.

A folder of append-only segments, one per process that writes: JSON lines, each with a checksum. Any
number of processes on any number of hosts write, each to a segment of its own, and read each other's.
A line is on the disk before the answer is given to anybody, so a kill at any instant loses none that
was seen. A torn last line is one that nobody saw; it is passed over. A line that is damaged is
reported, and its question counts as unanswered.

    answers.json                        which format this is
    20260301T101500-host-4242-1f.jsonl  segments
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
from pydantic import Field

from cache.errors import EmocacheError, SchemaError, near_miss
from cache.files import create_once, fsync_folder
from cache.schema import Model, decode_json
from extract.annotate.endpoints.replies import Outcome, parse_answer

logger = logging.getLogger(__name__)

MARK = "answers.json"
FORMAT = {"format": "emocache answers", "version": 1}
_SEGMENT = re.compile(r"[0-9]{8}T[0-9]{6}-.+\.jsonl")
_HEAD = re.compile(rb'\{"key":"([0-9a-f]{64})","outcome":"([a-z]+)",')
_TAIL = re.compile(rb',"checksum":"([0-9a-f]{8})"\}\Z')
# An index entry is one integer, rank | segment | offset: 400,000 answers fit into some 60 MB.
_OFFSET_BITS = 44
_SEGMENT_BITS = 20
_OK_BIT = 1 << (_OFFSET_BITS + _SEGMENT_BITS)
_KEY_BYTES = 16  # of 32; the whole key is compared when a line is read
_READ_BYTES = 4096
_MAX_OPEN = 64


class AnswersError(EmocacheError):
    """A folder of answers cannot be used: foreign, newer, or not writable."""


class Answer(Model):
    """What a model said to a question, and how it came about."""

    key: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the question."""

    outcome: Outcome
    role: str
    prompt_id: str
    asked_model: str
    """The name in the question."""

    text: str
    """The answer without thinking aloud; of a refusal, the refusal."""

    reason: str | None = None
    """Why it is not ok."""

    finish_reason: str | None = None
    model: str | None = None
    """The model that answered, as the server named it."""

    prompt_tokens: int | None = None
    """As counted by the server, over all requests that led to the answer."""

    completion_tokens: int | None = None
    attempts: int = 1
    """Requests that it took, failed ones and repairs among them."""

    repaired: bool = False
    """The first answer did not fit its schema and the model was asked to correct it."""

    unenforced: bool = False
    """The server did not take the schema, so the prompt asked for it in words."""

    elapsed_s: float = 0.0
    """From the first request to the answer, waits included."""

    time_s: float = 0.0
    """When it came, in Unix time."""

    @property
    def ok(self) -> bool:
        """Whether it can be used."""
        return self.outcome is Outcome.OK

    def value(self) -> Any:
        """Return the JSON of an answer with a schema; raises ValueError if it is none."""
        return parse_answer(self.text)


@dataclass(frozen=True)
class DamagedLine:
    """A line that fails its checksum."""

    segment: Path
    offset: int
    """In bytes, where the line begins."""
    problem: str

    def __str__(self) -> str:
        """Put it into one line."""
        return f"'{self.segment}', byte {self.offset}: {self.problem}"


class AnswerCache:
    """A folder of answers; safe to use from several threads, and after a fork.

    Args:
        folder: Where the answers are kept; it is made when the first one comes.

    Raises:
        AnswersError: The path is no folder, or one of something else or of a newer version.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.damaged: list[DamagedLine] = []
        """What was passed over so far."""
        self._lock = threading.RLock()
        self._index: dict[bytes, int] = {}
        self._segments: list[Path] = []
        self._read_to: list[int] = []
        self._known: dict[str, int] = {}
        self._open: OrderedDict[int, int] = OrderedDict()
        self._own: int | None = None
        self._own_pid = 0
        self._own_file: int | None = None
        self._unsynced: list[tuple[bytes, bool, int, int]] = []
        self._check_mark()
        self.refresh()

    def __repr__(self) -> str:
        """Name the folder."""
        return f"AnswerCache({str(self.folder)!r}, {len(self._index)} answers)"

    def __len__(self) -> int:
        """Return how many questions have an answer of some outcome."""
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        """Return whether a question was answered, with whatever outcome."""
        return bytes.fromhex(key)[:_KEY_BYTES] in self._index

    def get(self, key: str) -> Answer | None:
        """Return the answer to a question, or None.

        An answer whose line was damaged since it was indexed is reported and counts as none.
        """
        short = bytes.fromhex(key)[:_KEY_BYTES]
        with self._lock:
            entry = self._index.get(short)
            if entry is None:
                return None
            segment = entry >> _OFFSET_BITS & ((1 << _SEGMENT_BITS) - 1)
            offset = entry & ((1 << _OFFSET_BITS) - 1)
            try:
                line = self._line_at(segment, offset)
                answer = _decode(line)
            except (OSError, SchemaError) as error:
                del self._index[short]
                self._report(segment, offset, str(error))
                return None
        return answer if answer.key == key else None

    def usable(
        self, key: str, retry: Collection[str] = (), since_s: float = float("inf")
    ) -> Answer | None:
        """Return an answer unless it is to be asked for again.

        Args:
            key: Of the question.
            retry: Outcomes to ask again.
            since_s: Answers that came since then, in Unix time, were asked again already.
        """
        answer = self.get(key)
        again = answer is not None and answer.outcome in retry and answer.time_s < since_s
        return None if again else answer

    def put(self, answers: Iterable[Answer]) -> None:
        """Write answers; they are on the disk when this returns.

        Raises:
            AnswersError: They cannot be written; none of them counts as answered.
        """
        self.append(answers)
        self.sync()

    def append(self, answers: Iterable[Answer]) -> None:
        """Hand answers to the operating system: they outlive this process, but not yet a power cut.

        They count as answered only after `sync`.

        Raises:
            AnswersError: They cannot be written; none of them is.
        """
        coded = [(answer, _encode(answer)) for answer in answers]
        if not coded:
            return
        with self._lock:
            try:
                segment = self._own_segment()
                start = self._write(segment, b"".join(line for _, line in coded))
            except OSError as error:
                raise self._unwritable(error) from error
            for answer, line in coded:
                self._unsynced.append((bytes.fromhex(answer.key), answer.ok, segment, start))
                start += len(line)
            self._read_to[segment] = start

    def sync(self) -> None:
        """Force what was appended to the disk; one sync serves all of it.

        Raises:
            AnswersError: The disk refuses; what was not synced does not count as answered.
        """
        with self._lock:
            lines, self._unsynced = self._unsynced, []
            if not lines or self._own_file is None:
                return
            descriptor = os.dup(self._own_file)
        try:
            # Without the lock, so that others go on writing meanwhile.
            os.fsync(descriptor)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            os.close(descriptor)
        with self._lock:
            for line in lines:
                self._enter(*line)

    def refresh(self) -> int:
        """Take in what other processes wrote since; return how many lines came."""
        n_lines = 0
        with self._lock:
            try:
                names = sorted(n for n in os.listdir(self.folder) if _SEGMENT.fullmatch(n))
            except FileNotFoundError:
                return 0
            for name in names:
                if name not in self._known:
                    self._add(self.folder / name)
                segment = self._known[name]
                if segment != self._own or self._own_pid != os.getpid():
                    n_lines += self._scan(segment)
        return n_lines

    def __iter__(self) -> Iterator[Answer]:
        """Yield the answer that counts of each question."""
        with self._lock:
            entries = list(self._index.values())
        for entry in entries:
            segment = entry >> _OFFSET_BITS & ((1 << _SEGMENT_BITS) - 1)
            with self._lock:
                line = self._line_at(segment, entry & ((1 << _OFFSET_BITS) - 1))
            try:
                yield _decode(line)
            except SchemaError as error:
                self._report(segment, entry & ((1 << _OFFSET_BITS) - 1), str(error))

    def outcomes(self) -> Counter[tuple[str, str]]:
        """Count answers by role and outcome; this reads them all."""
        return Counter((answer.role, answer.outcome.value) for answer in self)

    def close(self) -> None:
        """Close the files; using the cache again opens them again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])
            if self._own_file is not None:
                os.close(self._own_file)
                self._own_file = None

    def _check_mark(self) -> None:
        mark = self.folder / MARK
        if self.folder.exists() and not self.folder.is_dir():
            raise AnswersError(f"'{self.folder}' is a file; answers are kept in a folder.")
        try:
            stated = json.loads(mark.read_text(encoding="utf-8"))
        except FileNotFoundError:
            # Another process may be making the folder: names with a dot are files half made.
            names = os.listdir(self.folder) if self.folder.is_dir() else []
            if mark.exists():
                self._check_mark()
            elif any(not name.startswith(".") for name in names):
                raise AnswersError(
                    f"'{self.folder}' is a folder of something else: it has no {MARK}. Name an empty "
                    "or a new folder for the answers."
                ) from None
            return
        except (ValueError, OSError) as error:
            raise AnswersError(f"cannot read '{mark}': {error}. Restore it: {FORMAT}.") from None
        if stated != FORMAT:
            raise AnswersError(
                f"'{mark}' says {stated}, this version of emocache reads {FORMAT}; use the version "
                "that wrote it, or another folder."
            )

    def _own_segment(self) -> int:
        """Return the segment that this process writes, made on the first call."""
        if self._own is None or self._own_pid != os.getpid():
            self.folder.mkdir(parents=True, exist_ok=True)
            create_once(self.folder / MARK, (json.dumps(FORMAT) + "\n").encode())
            host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40]
            moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            name = f"{moment}-{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
            if self._own_file is not None:  # the parent's, before a fork
                os.close(self._own_file)
            flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
            self._own_file = os.open(self.folder / name, flags, 0o644)
            fsync_folder(self.folder)
            self._own, self._own_pid = self._add(self.folder / name), os.getpid()
            self._unsynced = []
        return self._own

    def _write(self, segment: int, data: bytes) -> int:
        """Write lines at the end of the own segment; return where they begin."""
        if self._own_file is None:
            self._own_file = os.open(self._segments[segment], os.O_WRONLY)
        start = self._read_to[segment]
        try:
            # At the offset that we know, not at the end: what a failed write left is written over.
            done = 0
            while done < len(data):
                done += os.pwrite(self._own_file, data[done:], start + done)
        except OSError:
            os.ftruncate(self._own_file, start)
            raise
        return start

    def _unwritable(self, error: OSError) -> AnswersError:
        return AnswersError(
            f"cannot write to '{self.folder}': {error.strerror or error}. Answers that were written "
            "before are kept; make room or choose another folder and run again."
        )

    def _add(self, path: Path) -> int:
        if len(self._segments) >= 1 << _SEGMENT_BITS:
            raise AnswersError(f"'{self.folder}' has over a million segments; merge them.")
        self._segments.append(path)
        self._read_to.append(0)
        self._known[path.name] = len(self._segments) - 1
        return len(self._segments) - 1

    def _scan(self, segment: int) -> int:
        """Enter the lines of a segment that were not there before."""
        path, offset, n_lines = self._segments[segment], self._read_to[segment], 0
        try:
            if path.stat().st_size <= offset:
                return 0
            with path.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # torn, or being written; it is read once it is whole
                    head = _HEAD.match(line)
                    if head is None or not _intact(line):
                        self._report(segment, offset, "the line fails its checksum")
                    else:
                        key = bytes.fromhex(head[1].decode())
                        self._enter(key, head[2] == b"ok", segment, offset)
                    offset += len(line)
                    n_lines += 1
        except OSError as error:
            raise AnswersError(f"cannot read '{path}': {error.strerror or error}.") from error
        self._read_to[segment] = offset
        return n_lines

    def _enter(self, key: bytes, ok: bool, segment: int, offset: int) -> None:
        """Index a line: an answer that is ok stays, of others the last one counts."""
        short = key[:_KEY_BYTES]
        if not self._index.get(short, 0) & _OK_BIT:
            rank = _OK_BIT if ok else 0
            self._index[short] = rank | segment << _OFFSET_BITS | offset

    def _line_at(self, segment: int, offset: int) -> bytes:
        descriptor = self._open.pop(segment, None)
        if descriptor is None:
            descriptor = os.open(self._segments[segment], os.O_RDONLY)
        self._open[segment] = descriptor  # the last used at the end
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        found = os.pread(descriptor, _READ_BYTES, offset)
        while b"\n" not in found:
            more = os.pread(descriptor, 16 * _READ_BYTES, offset + len(found))
            if not more:
                break
            found += more
        return found.partition(b"\n")[0] + b"\n"

    def _report(self, segment: int, offset: int, problem: str) -> None:
        line = DamagedLine(self._segments[segment], offset, problem)
        self.damaged.append(line)
        logger.warning("damaged answer in %s; its question will be asked again", line)


def retried_outcomes(retry: Iterable[str]) -> frozenset[str]:
    """Return the outcomes that are asked again, from what a user named.

    Args:
        retry: Outcomes; "all" stands for every one but ok.

    Raises:
        SchemaError: An unknown outcome.
    """
    allowed = [o.value for o in Outcome if o is not Outcome.OK]
    found: set[str] = set()
    for name in retry:
        if name not in [*allowed, "all"]:
            raise SchemaError(
                f"cannot retry '{name}'; allowed are {[*allowed, 'all']}.{near_miss(name, allowed)}"
            )
        found |= set(allowed) if name == "all" else {name}
    return frozenset(found)


def _encode(answer: Answer) -> bytes:
    fields = answer.model_dump(mode="json")
    # Key and outcome first: a scan needs no more of a line.
    ordered = {"key": fields.pop("key"), "outcome": fields.pop("outcome"), **fields}
    data = json.dumps(ordered, separators=(",", ":"), ensure_ascii=True).encode()
    return b'%s,"checksum":"%08x"}\n' % (data[:-1], crc32c.crc32c(data))


def _intact(line: bytes) -> bool:
    body = line.rstrip(b"\n")
    stated = _TAIL.search(body)
    return stated is not None and int(stated[1], 16) == crc32c.crc32c(body[: stated.start()] + b"}")


def _decode(line: bytes) -> Answer:
    if not _intact(line):
        raise SchemaError("the line fails its checksum")
    fields = json.loads(line)
    del fields["checksum"]
    return decode_json(Answer, json.dumps(fields), "an answer")
