"""Writing one unit of clips: claimed, written, synced, read back, and only then committed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import ml_dtypes
import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from cache import layout
from cache.commit import (
    ClipTokens,
    Commit,
    Entry,
    Status,
    read_commit,
    unit_id,
    unit_ids,
    write_commit,
)
from cache.errors import CorruptTokensError, StoreError
from cache.index import read_index
from cache.layout import CLIPS_PER_SHARD, ArrayPlan, Compression
from cache.quantize import Quantized, quantize
from cache.shards import Access, Shard, Values, crc32c, encode_chunk, encode_shard
from cache.spec import TokenSpec
from cache.storage import Storage, is_quick

_INFINITY_BITS = {"float16": 0x7C00, "bfloat16": 0x7F80}
_GROWTH = 7
"""Shards by which arrays grow beyond what is claimed."""
_ATTEMPTS = 50
"""Times that a unit's files may be taken for garbage while they are written."""


class UnitWriter:
    """Commits units of one spec to a store.

    The steps: claim a shard number (create-once), lengthen the arrays, write the shard and its small
    arrays, sync, read back and compare, create the commit record. A kill before the last step
    leaves garbage that no reader looks at. If another worker committed the same unit meanwhile,
    this attempt's files are removed.
    """

    def __init__(
        self, storage: Storage, spec: TokenSpec, compression: Compression = "none"
    ) -> None:
        """Write clips of a resolved `spec`."""
        self.storage = storage
        self.spec = spec
        self.plans = layout.arrays(spec, compression)
        self._group = layout.group(spec)
        self._next_claim = 0
        self._is_ready = False

    def commit(
        self,
        clips: Sequence[ClipTokens],
        provenance: Mapping[str, str],
        after: Iterable[str] = (),
        replaces: Sequence[str] = (),
    ) -> Commit:
        """Commit one unit; see `TokenStore.commit`."""
        _check_unit(self.spec, clips)
        after = set(after)
        for _ in range(_ATTEMPTS):
            identity = unit_id(self.spec.spec_id, (c.key for c in clips), after)
            commit = self._known(identity) or self._attempt(
                identity, clips, provenance, tuple(replaces)
            )
            if commit is not None and not commit.abandoned:
                return commit
            # Garbage collection took this writer for dead: it closed the unit, or removed a file.
            if commit is not None:
                after.add(identity)
        raise StoreError(
            f"{self.storage.url}: files of this unit vanished {_ATTEMPTS} times while it was written. Is "
            "`emocache store gc` running with a short --abandoned-after-h, or something cleaning up? "
            "Run the same command again."
        )

    def _known(self, identity: str) -> Commit | None:
        try:
            return read_commit(self.storage, self.spec.spec_id, identity)
        except FileNotFoundError:
            return None

    def _attempt(
        self,
        identity: str,
        clips: Sequence[ClipTokens],
        provenance: Mapping[str, str],
        replaces: tuple[str, ...],
    ) -> Commit | None:
        """Write a unit once; None if files vanished and it should be tried again."""
        shard: int | None = None
        try:
            self._ensure_group()
            shard = self._claim(identity)
            self._grow(shard)
            entries, n_bytes = self._write_shard(shard, clips)
        except OSError as error:
            if shard is not None:
                self._discard(shard)
            if (known := self._known(identity)) is not None:
                return known  # closed meanwhile, and its files removed under our hands
            if isinstance(error, FileNotFoundError):
                return None
            raise self._cannot_write(error) from error
        commit = Commit(
            unit_id=identity,
            spec_id=self.spec.spec_id,
            shard=shard,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance=dict(provenance),
            n_bytes=n_bytes,
            clips=tuple(entries),
            replaces=replaces,
        )
        try:
            if write_commit(self.storage, commit):
                return commit
            known = self._known(identity)
        except OSError as error:
            # Failed, or done with the answer lost: only the record itself tells. While that cannot
            # be read either, the shard must stay; if it is garbage, `store gc` removes it.
            known = self._known(identity)
            if known is None and isinstance(error, FileNotFoundError):
                self._discard(shard)  # the record in the making was taken for garbage: not created
                return None
            if known is None:
                raise self._cannot_write(error) from error
        assert known is not None, "create-once was refused, so the record is there"
        if known.shard != shard or known.abandoned:
            self._discard(shard)
        return known

    def _cannot_write(self, error: OSError) -> StoreError:
        return StoreError(
            f"{self.storage.url}: cannot write ({error.strerror or error}). Nothing of this unit "
            "became visible; free space or fix the permissions and run the same command again."
        )

    def _ensure_group(self) -> None:
        """Create the spec's group with empty arrays; its own metadata last, which shows the group.

        Every worker writes the same bytes, so it does not matter whose come first.
        """
        if self._is_ready:
            return
        try:
            self.storage.size(f"{self._group}/zarr.json")
        except FileNotFoundError:
            for key, data in group_metadata(self.spec, self.plans).items():
                self.storage.create(f"{self._group}/{key}", data)
        self._is_ready = True

    def _claim(self, identity: str) -> int:
        """Take the next free shard number for this attempt alone."""
        folder = layout.claims(self.spec.spec_id)
        note = {
            "unit_id": identity,
            "attempt": uuid.uuid4().hex,  # so that no two attempts take one claim for their own
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        shard, n_refused = self._next_claim or self._n_claimed(), 0
        # Not synced: should a power cut lose the claim of a committed shard, `_n_claimed` notices.
        while not self.storage.create(
            f"{folder}/{shard:08d}", json.dumps(note).encode(), durable=False
        ):
            # Others took this number and, likely, those behind it: go past the last one. By a chance
            # distance, which grows, because others do so too; numbers that are left out cost nothing.
            n_refused += 1
            shard = max(shard + 1, self._n_claimed()) + random.randrange(2 ** min(n_refused - 1, 6))
        self._next_claim = shard + 1
        return shard

    def _n_claimed(self) -> int:
        names = self.storage.names(layout.claims(self.spec.spec_id))
        shards = {int(name) for name in names if name.isdigit()}
        if len(unit_ids(self.storage, self.spec.spec_id)) > len(shards):
            # A copy that left claims behind: committed shards must not be taken for free.
            shards |= read_index(self.storage, self.spec.spec_id).shards()
        return max(shards, default=-1) + 1

    def _grow(self, shard: int) -> None:
        """Make every array long enough for all claimed shards.

        Array metadata is replaced as a whole, so two growing writers may overwrite one another.
        Each therefore writes the length that all *claims* need and looks again afterwards: whoever
        writes last leaves the greatest. Arrays grow by some shards at a time, or by an eighth, so that
        few commits have to do this.
        """
        wanted = shard + 1
        while True:
            short = False
            for plan in self.plans:
                key = f"{self._group}/{plan.name}/zarr.json"
                try:
                    metadata = json.loads(self.storage.read(key))
                    n_rows = int(metadata["shape"][0])
                except (ValueError, KeyError, TypeError, IndexError) as error:
                    raise StoreError(
                        f"{self.storage.url}/{key}: damaged ({type(error).__name__}: {error}); nothing was "
                        "committed. `emocache store doctor` writes it again."
                    ) from None
                if n_rows < wanted * CLIPS_PER_SHARD:
                    if not short:
                        n_claimed = self._n_claimed()
                        wanted = max(wanted, n_claimed + max(_GROWTH, n_claimed // 8))
                    short = True
                    metadata["shape"][0] = wanted * CLIPS_PER_SHARD
                    self.storage.replace(key, json.dumps(metadata, indent=2).encode())
            if not short:
                return

    def _write_shard(self, shard: int, clips: Sequence[ClipTokens]) -> tuple[list[Entry], int]:
        tokens_plan, *small_plans = self.plans
        start = shard * CLIPS_PER_SHARD
        small = {p.name: np.full((CLIPS_PER_SHARD, *p.tail), p.fill, p.dtype) for p in small_plans}
        lengths: list[int] = []
        checksums: list[int | None] = []

        def stored() -> Iterable[Values | None]:
            # One clip at a time: no more than that is held beside the caller's.
            for place, clip in enumerate(clips):
                values = None
                if clip.tokens is not None:
                    values = self._stored(clip.tokens, {n: a[place] for n, a in small.items()})
                if values is not None and self.spec.frames is not None:
                    small["frame_index"][place] = clip.frame_index
                    small["frame_pts_s"][place] = clip.frame_pts_s
                lengths.append(0 if values is None else len(values))
                small["valid_len"][place] = lengths[-1]
                small["status"][place] = clip.status.code
                small["clip"][place] = np.frombuffer(bytes.fromhex(clip.key), np.uint8)
                yield values

        key = f"{self._group}/{tokens_plan.name}/{tokens_plan.chunk_file(shard)}"
        n_bytes = self.storage.write(key, encode_shard(tokens_plan, stored(), checksums))
        entries = [
            Entry(
                key=clip.key,
                row=start + place,
                status=clip.status,
                valid_len=lengths[place],
                crc32c=checksums[place],
                reason=clip.reason,
                remark=clip.remark,
                truncated=clip.truncated,
            )
            for place, clip in enumerate(clips)
        ]
        for plan in small_plans:
            data = encode_chunk(plan, small[plan.name])
            n_bytes += len(data)
            small_key = f"{self._group}/{plan.name}/{plan.chunk_file(shard)}"
            self.storage.replace(small_key, data, durable=not plan.is_derived)
        self._read_back(key, tokens_plan, entries)
        return entries, n_bytes

    def _stored(self, tokens: Values | Quantized, small: Mapping[str, Values]) -> Values:
        """Return a clip's tokens as they are stored; scales go to the small arrays."""
        if self.spec.dtype == "int8":
            found = tokens if isinstance(tokens, Quantized) else quantize(tokens)
            small["token_scale"][: len(found.values)] = found.token_scale
            small["channel_exponent"][:] = found.channel_exponent
            return found.values
        assert not isinstance(tokens, Quantized)
        if self.spec.dtype == "bfloat16":
            return tokens.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16)
        return tokens.astype(self.spec.dtype, copy=False)

    def _read_back(self, key: str, plan: ArrayPlan, entries: Sequence[Entry]) -> None:
        """Compare what stands in the storage with what was meant, clip by clip."""
        access: Access = "map" if is_quick(self.storage) else "read"
        shard = Shard(self.storage, key, plan, access=access)
        for place, entry in enumerate(entries):
            if entry.crc32c is None:
                continue
            found = shard.peek(place, entry.valid_len)
            if found is None:
                found = shard.read(place, entry.valid_len)
            if crc32c(found) != entry.crc32c:
                raise CorruptTokensError(
                    f"{self.storage.url}/{key}: reads back differently from what was written; nothing "
                    "was committed. Check the disk and run the command again."
                )

    def _discard(self, shard: int) -> None:
        """Remove an attempt's files; those that cannot be removed now are left to `store gc`."""
        for plan in self.plans:
            with contextlib.suppress(OSError):
                self.storage.delete(f"{self._group}/{plan.name}/{plan.chunk_file(shard)}")


def group_metadata(spec: TokenSpec, plans: Sequence[ArrayPlan]) -> dict[str, bytes]:
    """Return the metadata files of a spec's empty group, relative to it, the group's own last."""
    memory = MemoryStore()
    group = zarr.create_group(memory, zarr_format=3, attributes=layout.group_attributes(spec))
    for plan in plans:
        attributes = {"torch_dtype": "bfloat16"} if _is_bfloat16(spec, plan) else {}
        create_array(group, plan, attributes)
    keys = [f"{plan.name}/zarr.json" for plan in plans] + ["zarr.json"]
    found = {}
    for key in keys:
        data = sync(memory.get(key, default_buffer_prototype()))
        assert data is not None
        found[key] = data.to_bytes()
    return found


def _is_bfloat16(spec: TokenSpec, plan: ArrayPlan) -> bool:
    return spec.dtype == "bfloat16" and plan.name == "tokens"


def create_array(
    group: zarr.Group, plan: ArrayPlan, attributes: dict[str, Any] | None = None
) -> None:
    """Create an empty array of a spec's group, as the plan says."""
    blosc = BloscCodec(
        cname="zstd", clevel=1, shuffle="shuffle", typesize=np.dtype(plan.dtype).itemsize
    )
    group.create_array(
        plan.name,
        shape=(0, *plan.tail),
        dtype=plan.dtype,
        chunks=plan.chunk,
        shards=plan.shard,
        serializer=BytesCodec(),
        compressors=[*([blosc] if plan.compression == "zstd" else []), Crc32cCodec()],
        fill_value=plan.fill,
        dimension_names=plan.dimensions,
        attributes=attributes,
    )


def _check_unit(spec: TokenSpec, clips: Sequence[ClipTokens]) -> None:
    if not 0 < len(clips) <= CLIPS_PER_SHARD or len({c.key for c in clips}) != len(clips):
        raise StoreError(
            f"a unit holds 1 to {CLIPS_PER_SHARD} distinct clips, got {len(clips)} with "
            f"{len({c.key for c in clips})} keys"
        )
    wanted = spec.max_shape
    for clip in clips:
        if (clip.tokens is not None) != (clip.status is Status.OK):
            raise CorruptTokensError(f"{clip.key[:16]}: status {clip.status} and tokens disagree")
        if clip.tokens is None:
            continue
        tokens = clip.tokens
        shape = (tokens.values if isinstance(tokens, Quantized) else tokens).shape
        if isinstance(tokens, Quantized) and spec.dtype != "int8":
            raise CorruptTokensError(
                f"{clip.key[:16]}: quantised tokens for a spec of {spec.dtype}"
            )
        ragged = spec.stream == "audio"
        fits = shape[1:] == wanted[1:] and (
            0 < shape[0] <= wanted[0] if ragged else shape[0] == wanted[0]
        )
        if not fits:
            raise CorruptTokensError(
                f"{clip.key[:16]}: {spec.stream} tokens of shape {shape}, the spec says "
                f"{'up to ' if ragged else ''}{wanted}. The encoder does not fit the spec."
            )
        if not is_storable(clip.tokens, spec):
            raise CorruptTokensError(
                f"{clip.key[:16]}: {spec.stream} tokens hold NaN or infinity as {spec.dtype}. "
                "Nothing was written; check the encoder's precision."
            )


def is_storable(tokens: Values | Quantized, spec: TokenSpec) -> bool:
    """True if every value is finite in the spec's stored dtype."""
    if isinstance(tokens, Quantized):
        return bool(np.isfinite(tokens.token_scale).all())
    dtype = {"bfloat16": ml_dtypes.bfloat16, "int8": tokens.dtype}.get(spec.dtype, spec.dtype)
    with np.errstate(over="ignore"):
        stored = tokens.astype(dtype, copy=False)
    infinity = _INFINITY_BITS.get(stored.dtype.name)
    if infinity is None:
        return bool(np.isfinite(stored).all())
    # numpy takes 16-bit floats one at a time. Their bits rise with their magnitude, infinity and NaN
    # last, positive ones as signed numbers and negative ones as unsigned: two quick maxima.
    bits = np.ascontiguousarray(stored)
    return bool(
        bits.view(np.int16).max(initial=0) < infinity
        and bits.view(np.uint16).max(initial=0) < infinity + 0x8000
    )
