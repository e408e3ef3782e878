"""Documents by key, kept in append-only files: what was found out about clips and records.

A folder of segments, one per process that writes: JSON lines, each with a checksum. Any number of
processes write, each to a segment of its own, and read each other's. Of several documents of a key the
newest counts. A torn last line is one that was being written when its process died: it is passed over,
and what it said is found out again. A damaged line is reported, and its key counts as unknown.

    20260301T101500-host-4242-1f.jsonl
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import crc32c
from pydantic import ValidationError

from cache.errors import StoreError
from cache.schema import Model

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=Model)

_SEGMENT = re.compile(r"[0-9]{8}T[0-9]{6}-.+\.jsonl")
_LINE = re.compile(
    rb'\{"key":"([0-9a-f]{64})","time_s":([0-9.]+),"data":(.*),"checksum":"([0-9a-f]{8})"\}\n'
)


class _Place(NamedTuple):
    """Where the newest document of a key stands."""

    time_s: float
    segment: Path
    offset: int
    n_bytes: int


class Journal(Generic[M]):
    """A folder of documents of one model; may be shared by threads."""

    def __init__(self, folder: Path, model: type[M]) -> None:
        """Read what is there; the folder is made when something is written.

        Raises:
            StoreError: The folder cannot be read.
        """
        self.folder, self._model = folder, model
        self._lock = threading.RLock()
        self._index: dict[str, _Place] = {}
        self._read_to: dict[Path, int] = {}
        self._own: Path | None = None
        self.damaged: list[str] = []
        """Places of lines that were passed over."""
        self.refresh()

    def __len__(self) -> int:
        """Return how many keys have a document."""
        return len(self._index)

    def __contains__(self, key: str) -> bool:
        """Return whether a key has a document."""
        return key in self._index

    def __iter__(self) -> Iterator[str]:
        """Yield the keys."""
        return iter(tuple(self._index))

    def get(self, key: str) -> M | None:
        """Return the newest document of a key; None if there is none, or if its line is damaged."""
        with self._lock:
            place = self._index.get(key)
            if place is None:
                return None
            try:
                with place.segment.open("rb") as file:
                    line = os.pread(file.fileno(), place.n_bytes, place.offset)
            except OSError as error:
                raise self._error("read", error) from error
            match = _intact(line)
            if match is not None:
                try:
                    return self._model.model_validate_json(match[3])
                except ValidationError:
                    pass  # of another version
            self._report(place.segment, place.offset)
            del self._index[key]
            return None

    def put(self, key: str, document: M) -> None:
        """Append a document; `sync` brings it to the disk.

        Raises:
            StoreError: It cannot be written.
        """
        data = document.model_dump_json().encode()
        time_s = time.time()
        body = b'{"key":"%s","time_s":%.6f,"data":%s' % (key.encode(), time_s, data)
        line = b'%s,"checksum":"%08x"}\n' % (body, crc32c.crc32c(body))
        with self._lock:
            try:
                segment = self._own_segment()
                offset = self._read_to[segment]
                with segment.open("r+b", buffering=0) as file:
                    # Where we know the end to be: a failed write before may have left a part.
                    rest, at = memoryview(line), offset
                    while rest:
                        n = os.pwrite(file.fileno(), rest, at)
                        rest, at = rest[n:], at + n
            except OSError as error:
                raise self._error("written", error) from error
            self._read_to[segment] = offset + len(line)
            self._enter(key, _Place(time_s, segment, offset, len(line)))

    def sync(self) -> None:
        """Bring to the disk what this process wrote.

        Raises:
            StoreError: It cannot be written.
        """
        with self._lock:
            if self._own is None:
                return
            try:
                with self._own.open("r+b") as file:
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._error("written", error) from error

    def refresh(self) -> None:
        """Take in what other processes wrote since.

        Raises:
            StoreError: The folder cannot be read.
        """
        with self._lock:
            try:
                names = sorted(n for n in os.listdir(self.folder) if _SEGMENT.fullmatch(n))
            except FileNotFoundError:
                return
            except OSError as error:
                raise self._error("read", error) from error
            for name in names:
                if self.folder / name != self._own:
                    self._scan(self.folder / name)

    # ---------------------------------------------------------------- parts

    def _scan(self, segment: Path) -> None:
        offset = self._read_to.get(segment, 0)
        try:
            if segment.stat().st_size <= offset:
                return
            with segment.open("rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # torn, or being written: read once it is whole
                    match = _intact(line)
                    if match is None:
                        self._report(segment, offset)
                    else:
                        place = _Place(float(match[2]), segment, offset, len(line))
                        self._enter(match[1].decode(), place)
                    offset += len(line)
        except OSError as error:
            raise self._error("read", error) from error
        self._read_to[segment] = offset

    def _enter(self, key: str, place: _Place) -> None:
        known = self._index.get(key)
        if known is None or place.time_s >= known.time_s:
            self._index[key] = place

    def _own_segment(self) -> Path:
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:40]
            moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
            name = f"{moment}-{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}.jsonl"
            self._own = self.folder / name
            os.close(os.open(self._own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            self._read_to[self._own] = 0
        return self._own

    def _report(self, segment: Path, offset: int) -> None:
        place = f"{segment}, byte {offset}"
        self.damaged.append(place)
        logger.warning("%s: damaged; what it said will be found out again", place)

    def _error(self, what: str, error: OSError) -> StoreError:
        return StoreError(
            f"{self.folder}: cannot be {what} ({error.strerror or error}). What was written before stays; "
            "make room or mend the disk, and run the same command again."
        )


def _intact(line: bytes) -> re.Match[bytes] | None:
    match = _LINE.fullmatch(line)
    if match is None:
        return None
    body = line[: match.start(4) - len(b',"checksum":"')]
    return match if int(match[4], 16) == crc32c.crc32c(body) else None
