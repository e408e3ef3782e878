"""Where a store's files stand: a folder, or a bucket of an object store.

The store needs few operations, each whole or not at all; everything above this module speaks in
keys, relative and separated by `/`. Every failure is an `OSError`.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cache.files import create_once, write_aside

if TYPE_CHECKING:
    from zarr.abc.store import Store as ZarrStore

Bytes = bytes | memoryview

_PARTIAL = ".partial"


class Storage(Protocol):
    """Files by key. Implemented by `LocalStorage` and `cache.object_storage.ObjectStorage`."""

    @property
    def url(self) -> str:
        """The place, for messages: a path or a URL."""

    def read(self, key: str) -> bytes:
        """Read a whole file; FileNotFoundError if there is none."""

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes:
        """Read a part of a file; shorter where the file ends."""

    def size(self, key: str) -> int:
        """Return a file's size in bytes; FileNotFoundError if there is none."""

    def modified_s(self, key: str) -> float:
        """Return when a file was written, by the storage's own clock; FileNotFoundError if none."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder, unordered; none if it does not exist.

        Temporary files of writers are never among them.
        """

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders in a folder, unordered."""

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """Create a file unless it exists, whole; return whether this call did.

        Args:
            key: The file.
            data: Its content.
            durable: False for what a power cut may lose.
        """

    def replace(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """Write a file, whole or not at all, over an existing one.

        Args:
            key: The file.
            data: Its content.
            durable: False for what can be derived again: a power cut may lose it.
        """

    def write(self, key: str, parts: Iterable[Bytes]) -> int:
        """Write a large new file part by part, whole and durable or not at all; return its size."""

    def delete(self, key: str) -> None:
        """Remove a file; a missing one is fine."""

    def zarr_store(self, folder: str, *, read_only: bool = True) -> ZarrStore:
        """Return a folder as zarr-python's own kind of store."""


class LocalStorage:
    """A folder of a local or network file system that has atomic rename and hard links."""

    def __init__(self, root: Path) -> None:
        """Use `root`, which need not exist yet."""
        self.root = root

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.root)!r})"

    @property
    def url(self) -> str:
        """The folder's path."""
        return str(self.root)

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.root / key

    def read(self, key: str) -> bytes:
        """See `Storage.read`."""
        return self.path(key).read_bytes()

    def read_range(self, key: str, start: int, n_bytes: int) -> bytes:
        """See `Storage.read_range`."""
        with self.path(key).open("rb") as file:
            return os.pread(file.fileno(), n_bytes, start)

    def size(self, key: str) -> int:
        """See `Storage.size`."""
        return self.path(key).stat().st_size

    def modified_s(self, key: str) -> float:
        """See `Storage.modified_s`."""
        return self.path(key).stat().st_mtime

    def names(self, folder: str) -> list[str]:
        """See `Storage.names`."""
        return self._list(folder, want_folders=False)

    def folders(self, folder: str) -> list[str]:
        """See `Storage.folders`."""
        return self._list(folder, want_folders=True)

    def _list(self, folder: str, *, want_folders: bool) -> list[str]:
        try:
            with os.scandir(self.path(folder)) as entries:
                return [
                    e.name
                    for e in entries
                    if e.is_dir() is want_folders and not e.name.endswith(_PARTIAL)
                ]
        except FileNotFoundError:
            return []

    def create(self, key: str, data: bytes, *, durable: bool = True) -> bool:
        """See `Storage.create`."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return create_once(path, data, durable=durable)

    def replace(self, key: str, data: bytes, *, durable: bool = True) -> None:
        """See `Storage.replace`."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path, durable=durable) as aside:
            aside.write_bytes(data)

    def write(self, key: str, parts: Iterable[Bytes]) -> int:
        """See `Storage.write`."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_aside(path) as aside, aside.open("wb", buffering=0) as file:
            for part in parts:
                _write_all(file.fileno(), part)
            return file.tell()

    def delete(self, key: str) -> None:
        """See `Storage.delete`."""
        self.path(key).unlink(missing_ok=True)

    def partial_files(self) -> list[str]:
        """Return the keys of temporary files: of running writers, or left by killed ones."""
        return sorted(
            path.relative_to(self.root).as_posix()
            for path in self.root.rglob(f"*{_PARTIAL}")
            if path.is_file()
        )

    def prune(self, folder: str) -> None:
        """Remove the empty folders below and including `folder`."""
        for path, _, _ in os.walk(self.path(folder), topdown=False):
            with contextlib.suppress(OSError):  # not empty
                Path(path).rmdir()

    def zarr_store(self, folder: str, *, read_only: bool = True) -> ZarrStore:
        """See `Storage.zarr_store`."""
        from zarr.storage import LocalStore

        return LocalStore(self.path(folder), read_only=read_only)


def _write_all(descriptor: int, part: Bytes) -> None:
    """Write every byte: the system may take fewer at a time."""
    rest = memoryview(part).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def exists(storage: Storage, key: str) -> bool:
    """True if there is such a file."""
    try:
        storage.size(key)
    except FileNotFoundError:
        return False
    return True


def walk(storage: Storage, folder: str) -> Iterator[str]:
    """Yield the keys of all files below a folder."""
    for name in sorted(storage.names(folder)):
        yield f"{folder}/{name}"
    for name in sorted(storage.folders(folder)):
        yield from walk(storage, f"{folder}/{name}")


_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p"}


def on_network(path: Path) -> bool:
    """True if a folder is on a network or user-space file system, as far as the system tells."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # not Linux
    best, kind = "", ""
    resolved = str(path.resolve())
    for line in mounts.splitlines():
        _, where, found, *_ = line.split(" ")
        where = where.replace("\\040", " ")
        inside = resolved == where or resolved.startswith(where.rstrip("/") + "/")
        if inside and len(where) >= len(best):
            best, kind = where, found
    return kind in _NETWORK or kind.startswith("fuse")


def is_quick(storage: Storage) -> bool:
    """True for a disk of this machine: requests take no time to speak of."""
    return isinstance(storage, LocalStorage) and not on_network(storage.root)


def free_memory_bytes() -> float:
    """Return the memory that this machine could still give; infinity if the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf  # not Linux
    fields = dict(line.split(":", 1) for line in lines)
    return 1024.0 * int(fields["MemAvailable"].split()[0])
