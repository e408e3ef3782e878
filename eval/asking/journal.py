"""Predictions as they come: lines appended a batch at a time, of which a killed process loses none.

A journal is a predictions file of which each line has its checksum. It is written by one process; a
batch is one write, synced to the disk. What a power cut left in half, or a disk changed, is set aside in
a file beside it, with all that follows kept, and is asked again.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from cache.errors import PredictionError
from cache.files import fsync_folder, write_aside
from eval.predictions import Key, Prediction, line_of, read_line

logger = logging.getLogger(__name__)


class Journal:
    """A predictions file that one process appends to; use as a context manager."""

    def __init__(self, path: Path, wanted: Collection[Key]) -> None:
        """Open nothing yet.

        Args:
            path: The file; the folder must exist.
            wanted: Keys of the plan; a line with another is none of ours.
        """
        self.path, self._wanted = path, frozenset(wanted)
        self._file = self._lock = -1
        self.lines: dict[Key, bytes] = {}
        """What was answered: key -> line."""

    def __enter__(self) -> Self:
        """Take the file for this process, and read what was answered.

        Raises:
            PredictionError: Another process has it, or it cannot be read or written.
        """
        try:
            self._lock = os.open(
                self.path.with_name(f".{self.path.name}.lock"), os.O_CREAT | os.O_RDWR, 0o644
            )
            self._lock_for_us()
            self._mend()
            is_new = not self.path.exists()
            self._file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
            if is_new:
                fsync_folder(self.path.parent)
        except OSError as error:
            self._close()
            raise self._error("opened", error) from error
        except PredictionError:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Add predictions that are not there yet: one write, on the disk when this returns.

        Raises:
            PredictionError: The disk is full, for example; what was written before stays.
        """
        fresh = {p.key: line_of(p) for p in predictions if p.key not in self.lines}
        rest = memoryview(b"".join(fresh.values()))
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            raise self._error("written", error) from error
        self.lines.update(fresh)

    def _lock_for_us(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PredictionError(
                f"{self.path}: another process is asking and writes here. Wait for it, or give another "
                "--out or --shard."
            ) from None

    def _mend(self) -> None:
        """Read the file; move what is not as it was written to a file beside it."""
        self.lines, damaged = read_journal(self.path, self._wanted)
        if not damaged:
            return
        aside = self.path.with_name(f"{self.path.name}.damaged")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for line in damaged)
            file.flush()
            os.fsync(file.fileno())
        with write_aside(self.path) as whole:
            whole.write_bytes(b"".join(self.lines.values()))
        logger.warning(
            "%s: %d lines were cut or damaged; they are in %s, and what they said is asked again",
            self.path,
            len(damaged),
            aside.name,
        )

    def _close(self) -> None:
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)  # gives the lock up
        self._file = self._lock = -1

    def _error(self, what: str, error: OSError) -> PredictionError:
        return PredictionError(
            f"{self.path}: cannot be {what} ({error.strerror or error}). What was written before stays; "
            "make room or mend the disk, and run the same command again."
        )


def read_journal(path: Path, wanted: Collection[Key]) -> tuple[dict[Key, bytes], list[bytes]]:
    """Read a journal that may be cut or damaged.

    Args:
        path: The file; it may be missing.
        wanted: Keys of the plan.

    Returns:
        Key -> line, with its end, of all lines that are as they were written, and the other ones.

    Raises:
        OSError: The file cannot be read.
    """
    if not path.exists():
        return {}, []
    *whole, cut = path.read_bytes().split(b"\n")
    found: dict[Key, bytes] = {}
    damaged = [cut] if cut else []
    for line in whole:
        prediction = _intact(line)
        if prediction is None or prediction.key not in wanted:
            damaged.append(line)
        else:
            found.setdefault(prediction.key, line + b"\n")
    return found, damaged


def in_order(lines: Mapping[Key, bytes], order: Iterable[Key]) -> bytes:
    """Return the lines of a predictions file in a given order."""
    return b"".join(lines[key] for key in order)


def _intact(line: bytes) -> Prediction | None:
    """Return the prediction of a line that is byte for byte what we write; None of any other."""
    try:
        prediction = read_line(line, "")
    except PredictionError:
        return None
    return prediction if line_of(prediction) == line + b"\n" else None
