"""Zarr v3 shards by byte range: written clip after clip, read with one call per clip.

The format is that of Zarr's `sharding_indexed` codec with inner codecs `bytes` (little endian) and
`crc32c`, index at the end: the chunks, each followed by its CRC-32C; then, for every chunk of the
shard in C order, its offset and length as two uint64 (both 2**64 - 1 if there is none); then the
CRC-32C of this index. zarr-python takes milliseconds per clip for what is one `pread`, so the hot
path parses the index itself; `TokenStore` falls back to zarr-python for any other layout.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from cache.errors import CorruptTokensError
from cache.files import write_aside
from cache.layout import CLIPS_PER_SHARD, ArrayPlan

Floats = npt.NDArray[np.floating[Any]]

_CRC_BYTES = 4
_EMPTY = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not stored."""


def crc32c(values: npt.NDArray[Any]) -> int:
    """Return the CRC-32C of an array's little-endian bytes."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return int(google_crc32c.value(little.reshape(-1).view(np.uint8)))


def chunks_per_clip(plan: ArrayPlan) -> int:
    """Return into how many chunks a clip is cut, all along its first axis."""
    assert plan.tail[1:] == plan.chunk_tail[1:], "chunks cut the first axis of a clip only"
    count, rest = divmod(plan.tail[0], plan.chunk_tail[0])
    assert rest == 0, "chunks divide the axis"
    return count


def can_read(metadata: dict[str, Any], plan: ArrayPlan) -> bool:
    """True if an array's zarr.json describes exactly the layout that this module reads."""
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(plan.chunk),
            "codecs": _CODECS,
            "index_codecs": _CODECS,
            "index_location": "end",
        },
    }
    return (
        metadata.get("codecs") == [sharding]
        and metadata.get("data_type") == plan.dtype
        and metadata.get("shape", [])[1:] == list(plan.tail)
        and metadata.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape")
        == [CLIPS_PER_SHARD, *plan.tail]
        and metadata.get("chunk_key_encoding", {}).get("name") == "default"
    )


_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def write_shard(path: Path, plan: ArrayPlan, clips: Sequence[Floats | None]) -> None:
    """Write one shard, whole or not at all; at most one clip is held beside the input.

    Args:
        path: The shard's file; its folder is created.
        plan: The `tokens` array.
        clips: Up to `CLIPS_PER_SHARD` arrays of at most `plan.tail`; None for a clip without tokens.
    """
    per_clip, step = chunks_per_clip(plan), plan.chunk_tail[0]
    dtype = np.dtype(plan.dtype).newbyteorder("<")
    index = np.full((CLIPS_PER_SHARD * per_clip, 2), _EMPTY, "<u8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside, aside.open("wb") as file:
        for row, clip in enumerate(clips):
            if clip is None:
                continue
            for number, start in enumerate(range(0, len(clip), step)):
                chunk = np.zeros(plan.chunk_tail, dtype)
                piece = clip[start : start + step]
                chunk[: len(piece)] = piece
                index[row * per_clip + number] = file.tell(), chunk.nbytes + _CRC_BYTES
                file.write(chunk.data)
                file.write(crc32c(chunk).to_bytes(_CRC_BYTES, "little"))
        file.write(index.data)
        file.write(crc32c(index).to_bytes(_CRC_BYTES, "little"))


class Shard:
    """One committed shard, open for reading. Positions are not shared, so threads and forks may."""

    def __init__(self, path: Path, plan: ArrayPlan) -> None:
        """Open a shard and read its index.

        Raises:
            OSError: The file is gone.
            CorruptTokensError: It is too short, or its index fails its checksum.
        """
        self._plan = plan
        self._per_clip = chunks_per_clip(plan)
        self._file = os.open(path, os.O_RDONLY)
        n_bytes = CLIPS_PER_SHARD * self._per_clip * 16
        size = os.fstat(self._file).st_size
        raw = os.pread(self._file, n_bytes + _CRC_BYTES, max(0, size - n_bytes - _CRC_BYTES))
        if len(raw) != n_bytes + _CRC_BYTES:
            raise CorruptTokensError(f"{path}: truncated to {size} bytes, shorter than its index")
        self._index = np.frombuffer(raw, "<u8", count=n_bytes // 8).reshape(-1, 2)
        if crc32c(self._index) != int.from_bytes(raw[n_bytes:], "little"):
            raise CorruptTokensError(f"{path}: the shard's index fails its checksum")

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            os.close(file)

    def read(self, place: int, valid_len: int) -> Floats:
        """Read a clip's valid tokens; the caller compares their checksum.

        Args:
            place: Number of the clip in the shard.
            valid_len: Entries of the first axis.

        Raises:
            CorruptTokensError: The index does not hold them, or the file is shorter than it says.
        """
        step, tail = self._plan.chunk_tail[0], self._plan.chunk_tail
        dtype = np.dtype(self._plan.dtype).newbyteorder("<")
        n_chunks = -(-valid_len // step)
        first = place * self._per_clip
        entries = self._index[first : first + n_chunks]
        n_bytes = int(np.prod(tail)) * dtype.itemsize
        if (entries[:, 1] != n_bytes + _CRC_BYTES).any():
            raise CorruptTokensError("the shard's index lacks a chunk of the clip")
        offsets = entries[:, 0].astype(np.int64)
        start, end = int(offsets.min()), int(offsets.max()) + n_bytes
        if end - start == n_chunks * (n_bytes + _CRC_BYTES) - _CRC_BYTES:
            raw = os.pread(self._file, end - start, start)  # written by us: one stretch
            parts = [raw[int(o) - start : int(o) - start + n_bytes] for o in offsets]
        else:
            parts = [os.pread(self._file, n_bytes, int(o)) for o in offsets]
        if any(len(part) != n_bytes for part in parts):
            raise CorruptTokensError("the shard is shorter than its index says")
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        tokens = np.frombuffer(whole, dtype).reshape(n_chunks * step, *tail[1:])
        return tokens[:valid_len].astype(self._plan.dtype, copy=False)
