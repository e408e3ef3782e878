"""Batches of tokens, quickly: threads that copy from mapped shards into memory that is used again.

A batch of the paper's tokens is 30 MB. Worker processes would hand it over through shared memory,
page fault by page fault, and lose to one thread; two threads in the same process gain
(docs/store.md has the figures). `TokenReader.batches` is therefore the way to read; `TokenDataset`
is for programs that are built around a DataLoader.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cache.clip import Record
from cache.commit import Status
from cache.errors import CorruptTokensError
from cache.layout import CLIPS_PER_SHARD
from cache.quantize import Quantized, dequantize
from cache.shards import Access, Values, crc32c
from cache.spec import Stream, TokenSpec
from cache.storage import LocalStorage, free_memory_bytes, on_network
from cache.store import TokenStore
from cache.views import AudioView, ImageView, VideoView

View = AudioView | VideoView | ImageView
Missing = Literal["refuse", "mask"]

_ANNOUNCED = 4
"""Batches, beyond those that are read ahead, which the disk is told of."""
_WORTH_A_THREAD_BYTES = 4 << 20
"""Batches below this are read in the caller's thread."""
_OK = Status.OK.code
_STATUS = {status.code: status for status in Status}
_NUMPY: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
}
"""What a batch is filled as; bfloat16 as its bits, which torch then sees as bfloat16."""


@dataclass(frozen=True, eq=False)
class StreamBatch:
    """One stream of a batch of B clips."""

    tokens: Tensor
    """As stored: (B, T, D) audio, zero-padded to the longest; (B, F, P, D) video; (B, 1 + P, D)
    image; in the stored dtype. With a view: (B, T, D) float32. Zeros where there are no tokens."""
    valid_len: Tensor
    """(B,) int64: valid entries of the second axis; 0 where there are no tokens."""
    status: tuple[Status, ...]
    mask: Tensor
    """(B, T) bool: True where the second axis is valid."""
    cls: Tensor | None = None
    """Image views only: (B, D) float32, the CLS token."""
    token_scale: Tensor | None = None
    """int8 without a view: (B, T, ...) float32; see `cache.quantize.dequantize_torch`."""
    channel_exponent: Tensor | None = None
    """int8 without a view: (B, D) int8."""


Batch = dict[Stream, StreamBatch]


@dataclass(frozen=True)
class _Part:
    """One stream of a batch, found in the store but not yet read."""

    spec: TokenSpec
    clips: Sequence[Record | str]
    keys: Sequence[str]
    places: Sequence[tuple[int, int]]
    """(Shard, place in it)."""
    valid_len: Sequence[int]
    crc32c: Sequence[int]
    status: Sequence[int]

    @property
    def n_bytes(self) -> int:
        """Bytes of the stored tokens."""
        itemsize = _NUMPY[self.spec.dtype].itemsize
        return sum(self.valid_len) * math.prod(self.spec.max_shape[1:]) * itemsize


@dataclass
class _Half:
    """One stream of a batch in the making."""

    tokens: npt.NDArray[Any]
    tensor: Tensor
    """The same memory."""
    mask: npt.NDArray[np.bool_] | None = None
    """Of a view."""
    cls: npt.NDArray[np.float32] | None = None
    scales: npt.NDArray[np.float32] | None = None
    exponents: npt.NDArray[np.int8] | None = None

    def others(self) -> tuple[npt.NDArray[Any] | None, ...]:
        """Return `StreamBatch`'s last fields."""
        return self.cls, self.scales, self.exponents


class TokenReader:
    """Reads batches of clips, any of a store's streams, as stored or through views.

    Memory is used again once the tensors of a batch are gone, so keep no batch that is not needed;
    one that is kept stays as it is. Works under forked and spawned workers.
    """

    def __init__(
        self,
        store: TokenStore,
        specs: Mapping[Stream, TokenSpec],
        views: Mapping[Stream, View] | None = None,
        *,
        n_threads: int | None = None,
        n_ahead: int | None = None,
        missing: Missing = "refuse",
        check: bool = True,
        pin_memory: bool = False,
        access: Access | None = None,
    ) -> None:
        """Read `specs` of a store.

        Args:
            store: An open store.
            specs: Stream -> a stored spec (`TokenStore.resolve`).
            views: Stream -> what to make of its tokens; those without one come as stored.
            n_threads: Threads of `batches`; default 2, or 16 for a bucket.
            n_ahead: Batches that are read ahead; default 3, or 16 for a bucket. The disk is told of more.
            missing: Refuse a clip that is absent, failed or not committed, or mask the absent and
                failed ones (what was never committed is refused in any case).
            check: Compare every clip's CRC-32C.
            pin_memory: Page-locked memory from torch's own pool, for asynchronous copies to a GPU;
                without a GPU this does nothing.
            access: How local shards are read. `map` copies from mapped files: quick, but one that someone
                truncates meanwhile kills the process, and network file systems map slowly. `read` works
                everywhere. `direct` goes past the page cache: for a store that memory cannot hold.
                Default: `read` on a network; else `direct` if the specs take more than half of the
                memory that is free; else `map`.

        Raises:
            SpecMismatchError: A view that the stored tokens cannot serve.
        """
        self.store = store
        self.specs = dict(specs)
        self.views = dict(views or {})
        self.missing: Missing = missing
        self.check = check
        self.pin_memory = pin_memory and torch.cuda.is_available()
        is_local = isinstance(store.storage, LocalStorage)
        self.n_threads = n_threads or (2 if is_local else 16)
        self.n_ahead = n_ahead or (3 if is_local else 16)
        self.access: Access = access or self._best_access()
        self._shapes = {s: self.views[s].shape(self.specs[s]) for s in self.views}
        self._pool = _Pool(self.n_ahead + 2)

    def _best_access(self) -> Access:
        storage = self.store.storage
        if not isinstance(storage, LocalStorage) or on_network(storage.root):
            return "read"
        n_bytes = sum(self.store.index(spec).n_bytes for spec in self.specs.values())
        return "direct" if n_bytes > free_memory_bytes() / 2 else "map"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pool = _Pool(self.n_ahead + 2)

    def read(self, clips: Sequence[Record | str]) -> Batch:
        """Read one batch now.

        Args:
            clips: Records, or token keys (the SHA-256 of the clip, unless the spec takes a record's
                peak frame).

        Raises:
            CacheMissError: A clip has no tokens, see `missing`.
            CorruptTokensError: Stored bytes fail their checksum.
        """
        parts = self._locate(clips)
        self._will_need(parts)
        return self._read(parts)

    def batches(self, order: Iterable[Sequence[Record | str]]) -> Iterator[Batch]:
        """Yield batch after batch, read ahead by threads; the disk is told of those after them.

        Args:
            order: The clips of each batch; may be endless.

        Raises:
            CacheMissError: A clip has no tokens, see `missing`.
            CorruptTokensError: Stored bytes fail their checksum.
        """
        located = (self._locate(clips) for clips in order)
        first = next(located, None)
        if first is None:
            return
        upcoming = itertools.chain([first], located)
        is_local = isinstance(self.store.storage, LocalStorage)
        if is_local and sum(part.n_bytes for part in first) < _WORTH_A_THREAD_BYTES:
            yield from self._batches_here(upcoming)
        else:
            yield from self._batches_by_threads(upcoming)

    def _batches_here(self, upcoming: Iterator[list[_Part]]) -> Iterator[Batch]:
        """Read small batches in the caller's thread: handing them over would take longer."""
        announced: deque[list[_Part]] = deque()
        while True:
            for parts in itertools.islice(upcoming, _ANNOUNCED + self.n_ahead - len(announced)):
                self._will_need(parts)
                announced.append(parts)
            if not announced:
                return
            yield self._read(announced.popleft())

    def _batches_by_threads(self, upcoming: Iterator[list[_Part]]) -> Iterator[Batch]:
        announced: deque[list[_Part]] = deque()
        reading: deque[Future[Batch]] = deque()
        pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="emocache-read")
        try:
            while True:
                room = _ANNOUNCED + self.n_ahead - len(announced) - len(reading)
                for parts in itertools.islice(upcoming, room):
                    announced.append(parts)
                    pool.submit(self._will_need, parts)
                while announced and len(reading) < self.n_ahead:
                    reading.append(pool.submit(self._read, announced.popleft(), in_blocks=False))
                if not reading:
                    return
                yield reading.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _locate(self, clips: Sequence[Record | str]) -> list[_Part]:
        """Find a batch in the store.

        Raises:
            CacheMissError: A clip has no tokens, see `missing`.
        """
        parts = []
        for spec in self.specs.values():
            keys = [c.token_key(spec) if isinstance(c, Record) else c for c in clips]
            found = self.store.index(spec).locate(keys)
            status = found.status.tolist()
            if any(code != _OK for code in status):
                self._refuse(spec, clips, keys, status)
            parts.append(
                _Part(
                    spec,
                    clips,
                    keys,
                    [divmod(row, CLIPS_PER_SHARD) for row in found.row.tolist()],
                    found.valid_len.tolist(),
                    found.crc32c.tolist(),
                    status,
                )
            )
        return parts

    def _will_need(self, parts: list[_Part]) -> None:
        """Ask the system to fetch clips from the disk; errors are left to the reading."""
        if not isinstance(self.store.storage, LocalStorage):
            return
        for part in parts:
            if self.store.plan(part.spec) is None:
                continue
            try:
                for (number, at), n_valid in zip(part.places, part.valid_len, strict=True):
                    if n_valid:
                        shard = self.store.shard(part.spec, number, access=self.access)
                        shard.will_need(at, n_valid)
            except (OSError, CorruptTokensError):
                return  # `_read` meets the same, and names it

    def _read(self, parts: list[_Part], *, in_blocks: bool = True) -> Batch:
        batch: Batch = {}
        for part in parts:
            half = self._begin(part)
            # Among threads that fill a batch each, torch's own threads would be too many.
            if not (in_blocks and self._stack(part, half)):
                for place in range(len(part.keys)):
                    self._fill(part, half, place, in_blocks=in_blocks)
            batch[part.spec.stream] = self._finish(part, half)
        return batch

    def _stack(self, part: _Part, half: _Half) -> bool:
        """Copy a whole batch of mapped clips at once, if it is that simple; return whether it was.

        torch copies with all its threads and takes Python's lock once. Whatever is unusual, damage
        for example, is left to `_fill`, clip by clip.
        """
        spec = part.spec
        is_plain = spec.stream not in self.views and spec.dtype != "int8" and spec.stream != "audio"
        plan = self.store.plan(spec)
        if not is_plain or self.access != "map" or plan is None or plan.compression != "none":
            return False
        sources = []
        try:
            for (number, at), n_valid in zip(part.places, part.valid_len, strict=True):
                shard = self.store.shard(spec, number, access="map")
                found = shard.peek(at, n_valid) if n_valid == len(half.tokens[0]) else None
                if found is None:
                    return False
                sources.append(torch.from_numpy(found.view(half.tokens.dtype)))
        except (OSError, CorruptTokensError):
            return False
        torch.stack(sources, out=half.tensor)
        return not self.check or all(
            crc32c(clip) == checksum
            for clip, checksum in zip(half.tokens, part.crc32c, strict=True)
        )

    def _begin(self, part: _Part) -> _Half:
        """Take memory for one stream of a batch."""
        spec, n_clips = part.spec, len(part.keys)
        if spec.stream in self.views:
            shape = self._shapes[spec.stream]
            tokens, tensor = self._take((n_clips, *shape), np.dtype(np.float32))
            mask = np.zeros((n_clips, shape[0]), np.bool_)
            cls = None
            if isinstance(self.views[spec.stream], ImageView):
                cls = np.zeros((n_clips, spec.encoder.width), np.float32)
            return _Half(tokens, tensor, mask=mask, cls=cls)
        tail = spec.max_shape
        n_tokens = max([1, *part.valid_len]) if spec.stream == "audio" else tail[0]
        tokens, tensor = self._take((n_clips, n_tokens, *tail[1:]), _NUMPY[spec.dtype])
        half = _Half(tokens, tensor)
        if spec.dtype == "int8":
            half.scales = np.zeros((n_clips, n_tokens, *tail[1:-1]), np.float32)
            half.exponents = np.zeros((n_clips, tail[-1]), np.int8)
        return half

    def _fill(self, part: _Part, half: _Half, place: int, *, in_blocks: bool) -> None:
        """Read one clip of one stream to its place."""
        n_valid, view = part.valid_len[place], self.views.get(part.spec.stream)
        out = half.tokens[place]
        if not n_valid:
            out[:] = 0
            return
        if view is not None:
            assert half.mask is not None
            stored = self._read_floats(part, place)
            _, half.mask[place] = view.apply(stored, out=out)
            if half.cls is not None and isinstance(view, ImageView):
                half.cls[place] = view.cls(stored)
            return
        if n_valid < len(out):
            out[n_valid:] = 0
            out = out[:n_valid]
        quantized = self._read_clip(part, place, out, in_blocks=in_blocks)
        if quantized is not None and half.scales is not None and half.exponents is not None:
            half.scales[place, :n_valid] = quantized.token_scale
            half.exponents[place] = quantized.channel_exponent

    def _finish(self, part: _Part, half: _Half) -> StreamBatch:
        status = tuple(_STATUS[code] for code in part.status)
        if half.mask is not None:
            valid_len = torch.from_numpy(half.mask.sum(axis=1))
            mask = torch.from_numpy(half.mask)
        else:
            valid_len = torch.tensor(part.valid_len)
            mask = torch.arange(half.tensor.shape[1]) < valid_len[:, None]
        is_bfloat16 = part.spec.dtype == "bfloat16" and half.mask is None
        return StreamBatch(
            half.tensor.view(torch.bfloat16) if is_bfloat16 else half.tensor,
            valid_len,
            status,
            mask,
            *(None if a is None else torch.from_numpy(a) for a in half.others()),
        )

    def _read_floats(self, part: _Part, place: int) -> Values:
        """Read a clip's tokens to compute with; not copied where that can be."""
        spec, n_valid = part.spec, part.valid_len[place]
        stored: Values | None = None
        if self.access == "map" and spec.dtype != "int8" and self.store.plan(spec) is not None:
            number, at = part.places[place]
            try:
                stored = self.store.shard(spec, number, access="map").peek(at, n_valid)
            except (OSError, CorruptTokensError):
                stored = None  # the path below tells what is wrong
        if stored is not None and self.check and crc32c(stored) != part.crc32c[place]:
            stored = None
        if stored is None:
            buffer = np.empty((n_valid, *spec.max_shape[1:]), _NUMPY[spec.dtype])
            quantized = self._read_clip(part, place, buffer, in_blocks=True)
            if quantized is not None:
                return dequantize(quantized)
            stored = buffer
        return stored.view(ml_dtypes.bfloat16) if spec.dtype == "bfloat16" else stored

    def _read_clip(
        self, part: _Part, place: int, out: Values, *, in_blocks: bool
    ) -> Quantized | None:
        """Read one clip's stored tokens into `out`; return them with their scales if int8.

        Whatever goes wrong on the quick path is left to `TokenStore.read_stored`, which looks again
        and names it.
        """
        spec = part.spec
        if self.store.plan(spec) is not None:
            number, at = part.places[place]
            try:
                shard = self.store.shard(spec, number, access=self.access)
                checksum = shard.read_into(out, at, check=self.check, in_blocks=in_blocks)
                if checksum is None or checksum == part.crc32c[place]:
                    if spec.dtype != "int8":
                        return None
                    entry = self.store.entry(spec, part.keys[place])
                    return Quantized(out, *self.store.scales(spec, entry))
            except (OSError, CorruptTokensError):
                pass
        clip = part.clips[place]
        uid = clip.uid if isinstance(clip, Record) else None
        stored, _ = self.store.read_stored(spec, part.keys[place], uid)
        out[:] = (stored.values if isinstance(stored, Quantized) else stored).view(out.dtype)
        return stored if isinstance(stored, Quantized) else None

    def _refuse(
        self,
        spec: TokenSpec,
        clips: Sequence[Record | str],
        keys: Sequence[str],
        status: Sequence[int],
    ) -> None:
        """Raise for the first clip that may not be masked."""
        for clip, key, code in zip(clips, keys, status, strict=True):
            uid = clip.uid if isinstance(clip, Record) else None
            if code not in _STATUS:
                self.store.entry(spec, key, uid)
            elif code != _OK and self.missing == "refuse":
                self.store.ok_entry(spec, key, uid)

    def _take(
        self, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> tuple[npt.NDArray[Any], Tensor]:
        """Return memory for a batch, as an array to fill and as the tensor to hand out."""
        if not self.pin_memory:
            return self._pool.take(shape, dtype)
        # torch's pinned pool waits for copies to the GPU that are under way before it reuses memory.
        example = torch.from_numpy(np.empty(0, dtype))
        tensor = torch.empty(shape, dtype=example.dtype, pin_memory=True)
        return tensor.numpy(), tensor


class _Pool:
    """Memory of batches, used again when the tensors on it are gone.

    Fresh memory costs a page fault for every 4 KiB, about as much as filling it.
    """

    def __init__(self, n_kept: int) -> None:
        self._n_kept = n_kept
        self._free: dict[npt.DTypeLike, list[npt.NDArray[np.uint8]]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[npt.NDArray[Any], Tensor]:
        n_bytes = int(np.prod(shape)) * dtype.itemsize
        kept = self._free.setdefault((shape[1:] if len(shape) > 3 else shape[2:], dtype), [])
        raw = None
        while kept and raw is None:
            with contextlib.suppress(IndexError):  # another thread took the last one
                raw = kept.pop()  # the one that was used last: it may still be in the CPU's cache
            if raw is not None and raw.nbytes < n_bytes:
                raw = None  # too small: a larger one takes its place
        if raw is None:
            raw = np.empty(n_bytes + n_bytes // 4, np.uint8)
        array = raw[:n_bytes].view(dtype).reshape(shape)
        # The tensor keeps `array`, and nothing else does: when it is gone, so are all its views.
        weakref.finalize(array, self._put_back, kept, raw).atexit = False
        return array, torch.from_numpy(array)

    def _put_back(self, kept: list[npt.NDArray[np.uint8]], raw: npt.NDArray[np.uint8]) -> None:
        if len(kept) < self._n_kept:
            kept.append(raw)


class TokenDataset(Dataset[Batch]):
    """A map-style dataset of clips, for a DataLoader; `collate` joins its items.

    `TokenReader.batches` is quicker than a DataLoader with workers, see the top of this module.
    """

    def __init__(self, reader: TokenReader, clips: Sequence[Record | str]) -> None:
        """Read `clips` one by one through a reader."""
        self.reader = reader
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, place: int) -> Batch:
        """Return a batch of one clip."""
        return self.reader.read([self.clips[place]])

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """Return a batch at once: what DataLoader asks for if it finds this."""
        return self.reader.read([self.clips[place] for place in places])

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """Give to DataLoader as `collate_fn`: batches come whole."""
        return batch
