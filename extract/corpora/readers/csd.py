"""Computational sequences (.csd) of the CMU Multimodal SDK: HDF5 files that may be hostile.

::

    <root>/data/<video>/features    (N, D) numbers, or (N, 1) bytes for words
    <root>/data/<video>/intervals   (N, 2) start and end in seconds
    <root>/metadata/...             facts of the file, not needed here

After the SDK's `align` the groups are called `<video>[<segment>]` and have one row each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import EmocacheError, ManifestError, MissingDependencyError
from cache.shards import Values

MAX_BYTES = 64 * 2**20
"""Of one video's array: far above any label or transcript; a shape costs nothing to declare."""
MAX_TEXT_BYTES = 4096
"""Of one word."""


class ComputationalSequence:
    """An open .csd file."""

    def __init__(self, file: Any, name: str) -> None:
        """Check the root group; use `opened` instead.

        Args:
            file: The open h5py file.
            name: Of the file, for messages.

        Raises:
            ManifestError: No root group with `data` in it.
        """
        self.name = name
        roots = sorted(file)
        if len(roots) != 1:
            raise ManifestError(
                f"{name}: {len(roots)} groups at the root ({', '.join(roots[:5]) or 'none'}); a "
                "computational sequence has one, which holds data and metadata. Give a .csd of the CMU "
                "Multimodal SDK."
            )
        root = self._node(file, roots[0], "Group")
        if "data" not in root:
            raise ManifestError(
                f"{name}: no group 'data' in '{roots[0]}' (found: {', '.join(sorted(root)[:5]) or 'none'}"
                "). A computational sequence keeps <root>/data/<video>; give a .csd of the CMU Multimodal "
                "SDK."
            )
        self._data = self._node(root, "data", "Group")

    def videos(self) -> list[str]:
        """Return the names of the groups, in the file's order."""
        return list(self._data)

    def __contains__(self, video: str) -> bool:
        return video in self._data

    def intervals(self, video: str) -> Values:
        """Return `(N, 2) float64`: start and end of each segment, in seconds.

        Raises:
            ManifestError: They are missing, of another shape or kind, or not in this file.
        """
        found = self._array(video, "intervals", "fiu")
        if found.ndim != 2 or found.shape[1] != 2:
            raise self._bad(video, f"'intervals' has shape {found.shape}, not (segments, 2)")
        return np.asarray(found, np.float64)

    def numbers(self, video: str) -> Values:
        """Return `(N, D) float64`; raises ManifestError as `intervals` does."""
        found = self._array(video, "features", "fiu")
        if found.ndim != 2:
            raise self._bad(video, f"'features' has shape {found.shape}, not (segments, values)")
        return np.asarray(found, np.float64)

    def words(self, video: str) -> list[str]:
        """Return N words; raises ManifestError as `intervals` does, also where it holds numbers."""
        found = self._array(video, "features", "SO").reshape(-1).tolist()
        return [w.decode("utf-8", errors="replace") if isinstance(w, bytes) else w for w in found]

    def _array(self, video: str, name: str, kinds: str) -> Any:
        import h5py

        group = self._node(self._data, video, "Group")
        if name not in group:
            raise self._bad(video, f"no '{name}' (found: {', '.join(sorted(group)[:5]) or 'none'})")
        found = self._node(group, name, "Dataset", video)
        text = h5py.check_string_dtype(found.dtype)
        if found.dtype.kind == "O" and text is None:
            raise self._bad(
                video,
                f"'{name}' holds objects ({found.dtype}), which are never read: they may refer to "
                "anything",
            )
        if found.dtype.kind not in kinds:
            wanted = "numbers" if "f" in kinds else "texts"
            raise self._bad(video, f"'{name}' holds {found.dtype}, where {wanted} are expected")
        if found.is_virtual or found.external:
            raise self._bad(video, f"'{name}' is kept outside the file, in other files")
        if found.shape is None or found.nbytes > MAX_BYTES or found.dtype.itemsize > MAX_TEXT_BYTES:
            raise self._bad(
                video, f"'{name}' claims {found.nbytes} bytes, at most {MAX_BYTES} are read"
            )
        return found[()]

    def _node(self, parent: Any, name: str, kind: str, video: str = "") -> Any:
        """Open a group or dataset that stands in this file."""
        import h5py

        link = parent.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise self._bad(
                video or name, f"'{name}' is a link that leads elsewhere ({type(link).__name__})"
            )
        node = parent[name]
        if not isinstance(node, getattr(h5py, kind)):
            raise self._bad(video or name, f"'{name}' is a {type(node).__name__}, not a {kind}")
        return node

    def _bad(self, video: str, what: str) -> ManifestError:
        return ManifestError(
            f"{self.name}, {video}: {what}. Get the file again from the CMU Multimodal SDK."
        )


@contextmanager
def opened(file: Path, name: str) -> Iterator[ComputationalSequence]:
    """Open a computational sequence for reading.

    Args:
        file: The .csd.
        name: How messages call it.

    Raises:
        MissingDependencyError: h5py is not installed.
        ManifestError: No such file, not HDF5, damaged, or without the expected groups.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingDependencyError(
            f"{name}: .csd files are HDF5, which needs the package h5py ({error}). Install it with: "
            "pip install 'emocache[exchange]'"
        ) from error
    try:
        with h5py.File(file, "r", locking="best-effort") as found:
            yield ComputationalSequence(found, name)
    except EmocacheError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ManifestError(
            f"{name}: cannot be read as HDF5 ({first}). It is no .csd, damaged or cut off; get it again."
        ) from None
