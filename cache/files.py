"""Writing files so that a kill leaves the old file or the new one, never a part."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_aside(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes the name `path`.

    The temporary name is unique to this attempt, so that two writers never share it. If the block
    raises, nothing remains.

    Args:
        path: The file to be.
        durable: False leaves the disk its time: a power cut may lose the file.
    """
    aside = _aside(path)
    try:
        yield aside
        if durable:
            fsync_file(aside)
        aside.replace(path)
        if durable:
            fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text_aside(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; an existing file is replaced."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def create_once(path: Path, data: bytes, *, durable: bool = True) -> bool:
    """Create a file with `data` unless it exists; return whether this call created it.

    The content is complete and synced before the name appears (`link` fails if the name exists,
    also between machines on NFS), so a reader sees the whole file or none.
    """
    aside = _aside(path)
    try:
        with aside.open("xb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            # NFS may do the link, lose its answer, and refuse the repeated request.
            if aside.stat().st_nlink < 2:
                return False
        if durable:
            fsync_folder(path.parent)
        return True
    finally:
        aside.unlink(missing_ok=True)


def fsync_file(path: Path) -> None:
    """Force a file's data to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Force a folder's entries to the disk, so that a new name survives a power cut."""
    fsync_file(path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
