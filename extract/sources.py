"""Where media are: a folder, or any URL that fsspec understands; each clip is fetched as a local file."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from cache.clip import Record, media_path
from cache.errors import ManifestError, MissingDependencyError
from cache.place import is_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class MediaSource(Protocol):
    """Gives the file of a record."""

    @property
    def root(self) -> str:
        """Folder or URL that the records' media paths are relative to."""

    @property
    def is_remote(self) -> bool:
        """True if fetching a clip takes a download."""

    def fetch(self, record: Record) -> AbstractContextManager[Path]:
        """Return a context in which the record's file stands on this machine's disk.

        Raises:
            ManifestError: The media path leaves the root.
            OSError: The file cannot be fetched; FileNotFoundError if there is none.
        """

    def has(self, record: Record) -> bool:
        """True if there is such a file."""


@dataclass(frozen=True)
class LocalMedia:
    """Media in a folder."""

    folder: Path
    is_remote: bool = False

    @property
    def root(self) -> str:
        """See `MediaSource.root`."""
        return str(self.folder)

    @contextmanager
    def fetch(self, record: Record) -> Iterator[Path]:
        """See `MediaSource.fetch`."""
        yield media_path(self.folder, record)

    def has(self, record: Record) -> bool:
        """See `MediaSource.has`."""
        return media_path(self.folder, record).is_file()


class RemoteMedia:
    """Media behind a URL; a clip is downloaded when it is needed and removed afterwards."""

    is_remote = True

    def __init__(self, url: str) -> None:
        """Use a URL such as `s3://bucket/corpus` or `https://host/corpus`.

        Raises:
            ManifestError: The protocol is not known.
            MissingDependencyError: The library for it is not installed.
        """
        self.root = url.rstrip("/")
        self._files, self._base = _file_system(self.root)

    @contextmanager
    def fetch(self, record: Record) -> Iterator[Path]:
        """See `MediaSource.fetch`."""
        # The name's ending alone is kept: decoders look at it, and the rest is the other side's word.
        ending = PurePosixPath(record.media).suffix[:16]
        with tempfile.TemporaryDirectory(prefix="emocache-media-") as folder:
            path = Path(folder) / f"clip{ending}"
            self._files.get_file(f"{self._base}/{record.media}", str(path))
            yield path

    def has(self, record: Record) -> bool:
        """See `MediaSource.has`."""
        return bool(self._files.exists(f"{self._base}/{record.media}"))


def open_source(media_root: str | Path) -> MediaSource:
    """Return the media below a folder or URL."""
    if is_url(media_root):
        return RemoteMedia(str(media_root))
    return LocalMedia(Path(media_root))


def _file_system(url: str) -> tuple[AbstractFileSystem, str]:
    import fsspec

    protocol = url.partition("://")[0]
    if protocol in ("s3", "s3a", "gs", "az"):  # the library that stores use too
        try:
            from obstore.fsspec import register
        except ImportError:
            raise MissingDependencyError(
                f"{url}: media in a bucket need the extra `remote`: pip install 'emocache[remote]'"
            ) from None
        register(protocol)
    try:
        files, base = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ManifestError(
            f"{url}: cannot be opened ({error}). Give a folder, or a URL that fsspec knows."
        ) from None
    return files, str(base).rstrip("/")


@dataclass(frozen=True)
class MissingMedia:
    """How many of some records' files are not there."""

    n_checked: int
    n_missing: int
    first: str | None
    """Media path of one that is missing."""


def check_media(
    source: MediaSource, records: Sequence[Record], n_sample: int = 1000, seed: int = 0
) -> MissingMedia:
    """Look whether a sample of the media is there, before any work is queued."""
    sample = records
    if len(records) > n_sample:
        sample = random.Random(seed).sample(list(records), n_sample)
    missing = [record.media for record in sample if not source.has(record)]
    return MissingMedia(len(sample), len(missing), missing[0] if missing else None)
