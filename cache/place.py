"""A place, as a user writes it: a path, or a URL of a bucket."""

from __future__ import annotations

import re
from pathlib import Path

from cache.errors import StoreError
from cache.storage import LocalStorage, Storage

_URL = re.compile(r"^[a-z][a-z0-9+.-]+://")


def is_url(where: str | Path) -> bool:
    """True for a URL, False for a path."""
    return not isinstance(where, Path) and _URL.match(where) is not None


def open_storage(where: str | Path) -> Storage:
    """Return the storage of a path or URL (`s3://bucket/prefix`).

    Raises:
        StoreError: A URL of a kind that is not known.
        MissingDependencyError: A URL, and the extra `remote` is not installed.
    """
    text = str(where)
    if not is_url(where):
        return LocalStorage(Path(where))
    if text.startswith("file://"):
        raise StoreError(f"{text}: give a local store as a path, without file://")
    from cache.object_storage import ObjectStorage

    return ObjectStorage(text)
