"""Zarr v3 shards by byte range: written clip after clip, read with one call per clip.

The format is that of Zarr's `sharding_indexed` codec with inner codecs `bytes` (little endian) and
`crc32c`, index at the end: the chunks, each followed by its CRC-32C; then, for every chunk of the
shard in C order, its offset and length as two uint64 (both 2**64 - 1 if there is none); then the
CRC-32C of this index. zarr-python takes milliseconds per clip for what is one `pread`, so the hot
path parses the index itself; `TokenStore` falls back to zarr-python for any other layout.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Protocol

import crc32c as crc32c_library
import numpy as np
import numpy.typing as npt
from numcodecs import Blosc

from cache.errors import CorruptTokensError
from cache.layout import CLIPS_PER_SHARD, ArrayPlan, Compression
from cache.storage import Bytes, LocalStorage, Storage

Access = Literal["read", "map", "direct"]
"""By `pread`; mapped into memory; past the page cache."""
Values = npt.NDArray[Any]
Raw = npt.NDArray[np.uint8]

_CRC_BYTES = 4
_EMPTY = np.uint64(2**64 - 1)
"""Offset and length of a chunk that is not stored."""
_ALIGNMENT_BYTES = 64
"""Clips start at multiples of a cache line; Zarr allows gaps."""
_BLOCK_BYTES = 1 << 18
"""Summed and copied at a time: fits the second-level cache of a core."""
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux: pages that are never written need no memory set aside. In Python's `mmap` from 3.13 on."""
_SECTOR_BYTES = 4096
"""Direct reading starts and ends at multiples of this."""
_own = threading.local()
"""Each thread's buffer for direct reading."""
_BUFFERS = 512
"""Of one `preadv`; systems take at least 1024."""


def crc32c(values: Values) -> int:
    """Return the CRC-32C of an array's little-endian bytes."""
    little = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return crc32c_library.crc32c(little.reshape(-1).view(np.uint8).data)


def chunks_per_clip(plan: ArrayPlan) -> int:
    """Return into how many chunks a clip is cut, all along its first axis."""
    assert plan.tail[1:] == plan.chunk_tail[1:], "chunks cut the first axis of a clip only"
    count, rest = divmod(plan.tail[0], plan.chunk_tail[0])
    assert rest == 0, "chunks divide the axis"
    return count


_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC = {"name": "crc32c"}
_CODEC_CHAINS: dict[Compression, list[str]] = {
    "none": ["bytes", "crc32c"],
    "zstd": ["bytes", "blosc", "crc32c"],
}


def blosc(item_bytes: int) -> Blosc:
    """Return the compressor of `zstd` stores: measured choices, see docs/store.md."""
    return Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, typesize=item_bytes)


def can_read(metadata: dict[str, Any], plan: ArrayPlan) -> Compression | None:
    """Return the compression if an array's zarr.json describes a layout that this module reads."""
    codecs = metadata.get("codecs") or [{}]
    sharding = codecs[0].get("configuration", {})
    inner = sharding.get("codecs", [])
    fits = (
        len(codecs) == 1
        and codecs[0].get("name") == "sharding_indexed"
        and sharding.get("chunk_shape") == list(plan.chunk)
        and sharding.get("index_codecs") == [_BYTES, _CRC]
        and sharding.get("index_location") == "end"
        and inner[:1] == [_BYTES]
        and metadata.get("data_type") == plan.dtype
        and metadata.get("shape", [])[1:] == list(plan.tail)
        and metadata.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape")
        == [CLIPS_PER_SHARD, *plan.tail]
        and metadata.get("chunk_key_encoding", {}).get("name") == "default"
    )
    names = [codec.get("name") for codec in inner]
    chains = [key for key, chain in _CODEC_CHAINS.items() if chain == names]
    return chains[0] if fits and chains else None


def encode_shard(
    plan: ArrayPlan, clips: Iterable[Values | None], checksums: list[int | None] | None = None
) -> Iterator[Bytes]:
    """Yield a shard's bytes, piece by piece; at most one clip is held beside the input.

    Args:
        plan: The `tokens` array.
        clips: Up to `CLIPS_PER_SHARD` arrays of at most `plan.tail` in the stored dtype; None for a
            clip without tokens.
        checksums: Where to put the CRC-32C of each clip's tokens, which most often is its chunk's.
    """
    per_clip, step = chunks_per_clip(plan), plan.chunk_tail[0]
    dtype = np.dtype(plan.dtype).newbyteorder("<")
    index = np.full((CLIPS_PER_SHARD * per_clip, 2), _EMPTY, "<u8")
    position = 0
    for row, clip in enumerate(clips):
        if clip is None:
            if checksums is not None:
                checksums.append(None)
            continue
        gap = -position % _ALIGNMENT_BYTES
        position += gap
        yield bytes(gap)
        clip_checksum = 0
        for number, start in enumerate(range(0, len(clip), step)):
            piece = np.ascontiguousarray(clip[start : start + step], dtype)
            is_whole = len(piece) == step and plan.compression == "none"
            if checksums is not None and not (is_whole and len(clip) == step):
                raw = piece.reshape(-1).view(np.uint8).data
                clip_checksum = crc32c_library.crc32c(raw, clip_checksum)
            if len(piece) < step:
                piece = np.concatenate(
                    [piece, np.zeros((step - len(piece), *piece.shape[1:]), dtype)]
                )
            data: Bytes = piece.reshape(-1).view(np.uint8).data
            if plan.compression != "none":
                data = blosc(dtype.itemsize).encode(piece)
            index[row * per_clip + number] = position, len(data) + _CRC_BYTES
            position += len(data) + _CRC_BYTES
            yield data
            checksum = crc32c_library.crc32c(data)
            if is_whole and len(clip) == step:
                clip_checksum = checksum
            yield checksum.to_bytes(_CRC_BYTES, "little")
        if checksums is not None:
            checksums.append(clip_checksum)
    yield index.reshape(-1).view(np.uint8).data
    yield crc32c(index).to_bytes(_CRC_BYTES, "little")


def encode_chunk(plan: ArrayPlan, values: Values) -> bytes:
    """Return the file of an unsharded array's chunk: one unit's rows and their CRC-32C."""
    data = np.ascontiguousarray(values, np.dtype(plan.dtype).newbyteorder("<"))
    return data.tobytes() + crc32c(data).to_bytes(_CRC_BYTES, "little")


def decode_chunk(plan: ArrayPlan, data: bytes) -> Values:
    """Return the rows of `encode_chunk`'s file.

    Raises:
        CorruptTokensError: Of another size, or its checksum differs.
    """
    dtype = np.dtype(plan.dtype).newbyteorder("<")
    shape = (CLIPS_PER_SHARD, *plan.tail)
    body, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if len(body) != int(np.prod(shape)) * dtype.itemsize:
        raise CorruptTokensError(f"array {plan.name} holds {len(data)} bytes for a unit")
    if crc32c_library.crc32c(body) != int.from_bytes(crc, "little"):
        raise CorruptTokensError(f"array {plan.name} fails its checksum")
    return np.frombuffer(body, dtype).reshape(shape)


class _Source(Protocol):
    """The bytes of one file."""

    size: int

    def read(self, start: int, n_bytes: int) -> Bytes:
        """Read a stretch; shorter where the file ends."""

    def gather(
        self, start: int, out: Raw, chunk_bytes: int, *, check: bool, in_blocks: bool
    ) -> int | None:
        """Fill `out` from chunks that stand one after the other, a checksum between each two.

        Returns:
            The CRC-32C of `out`, if it is to be checked.

        Raises:
            CorruptTokensError: The file ends before.
        """

    def will_need(self, start: int, n_bytes: int) -> None:
        """Tell the system what will be read soon."""


class _File:
    """An open file, by `pread`: works everywhere, positions are not shared by threads or forks."""

    def __init__(self, storage: LocalStorage, key: str) -> None:
        self._descriptor = os.open(storage.path(key), os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def read(self, start: int, n_bytes: int) -> Bytes:
        return os.pread(self._descriptor, n_bytes, start)

    def gather(
        self, start: int, out: Raw, chunk_bytes: int, *, check: bool, in_blocks: bool
    ) -> int | None:
        checksum = np.empty(_CRC_BYTES, np.uint8)
        pieces = [out[i : i + chunk_bytes] for i in range(0, out.nbytes, chunk_bytes)]
        buffers = [part for piece in pieces for part in (piece, checksum)][:-1]
        for first in range(0, len(buffers), _BUFFERS):
            group = buffers[first : first + _BUFFERS]
            n_bytes = sum(part.nbytes for part in group)
            if os.preadv(self._descriptor, [part.data for part in group], start) != n_bytes:
                raise CorruptTokensError("the shard is shorter than its index says")
            start += n_bytes
        return crc32c_library.crc32c(out.data) if check else None

    def will_need(self, start: int, n_bytes: int) -> None:
        os.posix_fadvise(self._descriptor, start, n_bytes, os.POSIX_FADV_WILLNEED)


class _Mapped:
    """A file in memory: no copy, for local disks. A file cut short meanwhile kills the process."""

    def __init__(self, storage: LocalStorage, key: str) -> None:
        descriptor = os.open(storage.path(key), os.O_RDONLY)
        try:
            self.size = os.fstat(descriptor).st_size
            if not self.size:
                raise CorruptTokensError(f"{key}: truncated to 0 bytes, shorter than its index")
            # Private and writable: nothing writes, but torch takes no read-only arrays without a word.
            self._map = mmap.mmap(
                descriptor,
                self.size,
                mmap.MAP_PRIVATE | _MAP_NORESERVE,
                mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(descriptor)
        self._bytes: Raw = np.frombuffer(self._map, np.uint8)
        # Read-ahead is asked for clip by clip; the kernel's own guess would fetch neighbours.
        self._map.madvise(mmap.MADV_RANDOM)

    def read(self, start: int, n_bytes: int) -> Bytes:
        return self._bytes[start : start + n_bytes].data

    def gather(
        self, start: int, out: Raw, chunk_bytes: int, *, check: bool, in_blocks: bool
    ) -> int | None:
        return _copy_chunks(self._bytes[start:], out, chunk_bytes, check, in_blocks)

    def will_need(self, start: int, n_bytes: int) -> None:
        first = start - start % mmap.PAGESIZE
        self._map.madvise(mmap.MADV_WILLNEED, first, start + n_bytes - first)


class _Direct(_File):
    """An open file, past the system's page cache: for a store larger than memory.

    What is read once an epoch only displaces itself there, and filling the cache page by page halves
    the speed of a quick disk.
    """

    def __init__(self, storage: LocalStorage, key: str) -> None:
        super().__init__(storage, key)
        try:
            self._direct = os.open(storage.path(key), os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system that cannot: the cache is used after all
            self._direct = os.dup(self._descriptor)

    def __del__(self) -> None:
        super().__del__()
        descriptor = getattr(self, "_direct", None)
        if descriptor is not None:
            os.close(descriptor)

    def gather(
        self, start: int, out: Raw, chunk_bytes: int, *, check: bool, in_blocks: bool
    ) -> int | None:
        total = out.nbytes + (out.nbytes - 1) // chunk_bytes * _CRC_BYTES
        first = start - start % _SECTOR_BYTES
        size = -(-(start + total - first) // _SECTOR_BYTES) * _SECTOR_BYTES
        buffer: mmap.mmap | None = getattr(_own, "buffer", None)
        if buffer is None or len(buffer) < size:
            # Aligned as direct reading needs it, and of this process alone also after a fork.
            buffer = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            _own.buffer = buffer
        if os.preadv(self._direct, [memoryview(buffer)[:size]], first) < start + total - first:
            raise CorruptTokensError("the shard is shorter than its index says")
        data: Raw = np.frombuffer(buffer, np.uint8)[start - first :]
        return _copy_chunks(data, out, chunk_bytes, check, in_blocks)

    def will_need(self, start: int, n_bytes: int) -> None:
        """Nothing: the cache is not used."""


class _Remote:
    """An object, by range requests."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key = storage, key
        self.size = storage.size(key)

    def read(self, start: int, n_bytes: int) -> Bytes:
        return self._storage.read_range(self._key, start, n_bytes)

    def gather(
        self, start: int, out: Raw, chunk_bytes: int, *, check: bool, in_blocks: bool
    ) -> int | None:
        n_bytes = out.nbytes + (out.nbytes - 1) // chunk_bytes * _CRC_BYTES
        data = np.frombuffer(self.read(start, n_bytes), np.uint8)
        if data.nbytes != n_bytes:
            raise CorruptTokensError("the shard is shorter than its index says")
        return _copy_chunks(data, out, chunk_bytes, check, in_blocks)

    def will_need(self, start: int, n_bytes: int) -> None:
        """Nothing to ask for: the threads of `TokenReader` fetch ahead."""


def _copy_chunks(
    source: Raw, out: Raw, chunk_bytes: int, check: bool, in_blocks: bool
) -> int | None:
    """Fill `out` from chunks that stand in `source` with a checksum between each two.

    Returns:
        The CRC-32C of `out`, if it is to be checked.
    """
    if check and in_blocks:
        return _sum_and_copy(source, out, chunk_bytes)
    step = chunk_bytes + _CRC_BYTES
    n_whole = out.nbytes // chunk_bytes
    rest = out[n_whole * chunk_bytes :]
    if not rest.nbytes:  # the last chunk's checksum may not be there
        n_whole, rest = n_whole - 1, out[(n_whole - 1) * chunk_bytes :]
    if n_whole:
        rows = source[: n_whole * step].reshape(n_whole, step)[:, :chunk_bytes]
        np.copyto(out[: n_whole * chunk_bytes].reshape(n_whole, chunk_bytes), rows)
    np.copyto(rest, source[n_whole * step : n_whole * step + rest.nbytes])
    return crc32c_library.crc32c(out.data) if check else None


def _sum_and_copy(source: Raw, out: Raw, chunk_bytes: int) -> int:
    """Do both in turns: what was just summed is copied from the core's own cache."""
    checksum = 0
    for number, done in enumerate(range(0, out.nbytes, chunk_bytes)):
        end = min(done + chunk_bytes, out.nbytes)
        for at in range(done, end, _BLOCK_BYTES):
            target = out[at : min(at + _BLOCK_BYTES, end)]
            first = at + number * _CRC_BYTES
            block = source[first : first + target.nbytes]
            checksum = crc32c_library.crc32c(block.data, checksum)
            np.copyto(target, block)
    return checksum


_SOURCES: dict[Access, type[_File] | type[_Mapped]] = {
    "read": _File,
    "map": _Mapped,
    "direct": _Direct,
}


class Shard:
    """One committed shard, open for reading."""

    def __init__(
        self, storage: Storage, key: str, plan: ArrayPlan, *, access: Access = "read"
    ) -> None:
        """Open a shard and read its index.

        Args:
            storage: Where the store is.
            key: The shard's file.
            plan: The `tokens` array.
            access: How a local file is read.

        Raises:
            OSError: The file is gone.
            CorruptTokensError: It is too short, or its index fails its checksum.
        """
        self._plan = plan
        self._step = plan.chunk_tail[0]
        self._dtype = np.dtype(plan.dtype).newbyteorder("<")
        self._chunk_bytes = int(np.prod(plan.chunk_tail)) * self._dtype.itemsize
        self._token_bytes = self._chunk_bytes // self._step
        self._source: _Source
        if isinstance(storage, LocalStorage):
            self._source = _SOURCES[access](storage, key)
        else:
            self._source = _Remote(storage, key)
        per_clip = chunks_per_clip(plan)
        n_bytes, size = CLIPS_PER_SHARD * per_clip * 16, self._source.size
        if size < n_bytes + _CRC_BYTES:
            raise CorruptTokensError(f"{key}: truncated to {size} bytes, shorter than its index")
        raw = bytes(self._source.read(size - n_bytes - _CRC_BYTES, n_bytes + _CRC_BYTES))
        index = np.frombuffer(raw, "<u8", count=n_bytes // 8).reshape(-1, 2)
        if crc32c(index) != int.from_bytes(raw[n_bytes:], "little"):
            raise CorruptTokensError(f"{key}: the shard's index fails its checksum")
        index = index.astype(np.int64)  # -1, -1 where there is no chunk
        if (index.sum(axis=1) > size).any():
            raise CorruptTokensError(f"{key}: the shard is shorter than its index says")
        self._chunks_of = [
            [(start, length) for start, length in clip if start >= 0]
            for clip in index.reshape(CLIPS_PER_SHARD, per_clip, 2).tolist()
        ]
        self._starts = [self._start(chunks) for chunks in self._chunks_of]

    def _start(self, chunks: list[tuple[int, int]]) -> int:
        """Return where a clip starts if its chunks are whole and back to back, as we write them."""
        wanted = self._chunk_bytes + _CRC_BYTES
        first = chunks[0][0] if chunks else -1
        plain = self._plan.compression == "none" and sys.byteorder == "little"
        in_order = all(chunk == (first + i * wanted, wanted) for i, chunk in enumerate(chunks))
        return first if plain and in_order else -1

    def span(self, place: int, valid_len: int) -> tuple[int, int]:
        """Return start and length in bytes of what holds a clip's valid tokens."""
        if self._starts[place] >= 0:
            n_chunks = -(-valid_len // self._step)
            return self._starts[place], n_chunks * (self._chunk_bytes + _CRC_BYTES)
        chunks = self.chunks(place, valid_len)
        start = min(start for start, _ in chunks)
        return start, max(start + length for start, length in chunks) - start

    def will_need(self, place: int, valid_len: int) -> None:
        """Tell the system that a clip will be read soon."""
        self._source.will_need(*self.span(place, valid_len))

    def read(self, place: int, valid_len: int) -> Values:
        """Read a clip's valid tokens; the caller compares their checksum.

        Args:
            place: Number of the clip in the shard.
            valid_len: Entries of the first axis.

        Raises:
            CorruptTokensError: The index does not hold them, or the file is shorter than it says.
        """
        tokens = np.empty((valid_len, *self._plan.tail[1:]), self._plan.dtype)
        self.read_into(tokens, place)
        return tokens

    def read_into(
        self, out: Values, place: int, *, check: bool = False, in_blocks: bool = True
    ) -> int | None:
        """Read as many of a clip's tokens as `out` holds, into `out`.

        Args:
            out: Contiguous, (valid_len, ...) of the stored dtype.
            place: Number of the clip in the shard.
            check: Compute the CRC-32C of `out` on the way.
            in_blocks: Sum and copy in turns, which is quicker in a thread of its own; among threads
                that wait for one another's interpreter lock, few long calls are.

        Returns:
            The checksum if asked for.

        Raises:
            CorruptTokensError: The index does not hold them, or the file is shorter than it says.
        """
        target: Raw = out.reshape(-1).view(np.uint8)
        if self._starts[place] >= 0 and len(out) <= self._step * len(self._chunks_of[place]):
            return self._source.gather(
                self._starts[place], target, self._chunk_bytes, check=check, in_blocks=in_blocks
            )
        done = 0
        for data in self._pieces(place, len(out)):
            target[done : done + len(data)] = np.frombuffer(data, np.uint8)
            done += len(data)
        checksum = crc32c_library.crc32c(target.data) if check else None
        if sys.byteorder == "big":
            out.byteswap(inplace=True)
        return checksum

    def peek(self, place: int, valid_len: int) -> Values | None:
        """Return a clip's valid tokens without copying, if the file is mapped and they are one chunk.

        The array is read-only and keeps the file open.
        """
        if not isinstance(self._source, _Mapped) or self._plan.compression != "none":
            return None
        if valid_len > self._step or sys.byteorder == "big":
            return None
        ((start, _),) = self.chunks(place, valid_len)
        data = self._source.read(start, valid_len * self._token_bytes)
        return np.frombuffer(data, self._dtype).reshape(valid_len, *self._plan.tail[1:])

    def chunks(self, place: int, valid_len: int) -> list[tuple[int, int]]:
        """Return start and length of the chunks that hold a clip's valid tokens."""
        count = -(-valid_len // self._step)
        chunks = self._chunks_of[place][:count]
        if self._plan.compression == "none":
            fits = all(length == self._chunk_bytes + _CRC_BYTES for _, length in chunks)
        else:
            fits = all(length > _CRC_BYTES for _, length in chunks)
        if len(chunks) != count or not fits:
            raise CorruptTokensError("the shard's index lacks a chunk of the clip")
        return chunks

    def _pieces(self, place: int, valid_len: int) -> Iterator[Bytes]:
        """Yield the bytes of a clip's valid tokens, whatever the order and size of its chunks."""
        left = valid_len * self._token_bytes
        for start, length in self.chunks(place, valid_len):
            data = memoryview(self._source.read(start, length - _CRC_BYTES))
            if len(data) != length - _CRC_BYTES:
                raise CorruptTokensError("the shard is shorter than its index says")
            if self._plan.compression != "none":
                data = memoryview(_decompress(data, self._chunk_bytes))
            yield data[:left]
            left -= self._chunk_bytes


def _decompress(data: memoryview, n_bytes: int) -> bytes:
    """Undo Blosc; the header's own size is compared first, so that a bad one allocates nothing."""
    stated = int.from_bytes(data[4:8], "little")
    if len(data) < 16 or stated != n_bytes:
        raise CorruptTokensError(f"a compressed chunk states {stated} bytes instead of {n_bytes}")
    try:
        return bytes(Blosc().decode(data))
    except RuntimeError as error:
        raise CorruptTokensError(f"a compressed chunk cannot be unpacked ({error})") from None
