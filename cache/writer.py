"""Writing one unit of clips: claimed, written, synced, read back, and only then committed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from cache.commit import ClipTokens, Commit, Entry, Status, read_commit, unit_id, write_commit
from cache.errors import CorruptTokensError, StoreError
from cache.files import create_once, fsync_file, fsync_folder, write_aside
from cache.layout import CLIPS_PER_SHARD, ArrayPlan, Layout, arrays, group_attributes
from cache.shards import Floats, Shard, crc32c, write_shard
from cache.spec import TokenSpec


class UnitWriter:
    """Commits units of one spec to a store.

    The steps: claim a shard number (create-once), lengthen the arrays, write the shard and its small
    arrays, sync, read back and compare, create the commit record. A kill before the last step
    leaves garbage that no reader looks at. If another worker committed the same unit meanwhile,
    this attempt's files are removed.
    """

    def __init__(self, layout: Layout, spec: TokenSpec) -> None:
        """Write clips of a resolved `spec` to the store at `layout`."""
        self.layout = layout
        self.spec = spec

    def commit(
        self, clips: Sequence[ClipTokens], provenance: Mapping[str, str], after: Iterable[str]
    ) -> Commit:
        """Commit one unit; see `TokenStore.commit`."""
        spec = self.spec
        _check_unit(spec, clips)
        identity = unit_id(spec.spec_id, (c.key for c in clips), after)
        commits = self.layout.commits(spec.spec_id)
        known = commits / f"{identity}.json"
        if known.is_file():
            return read_commit(known)
        shard: int | None = None
        try:
            self._ensure_group()
            shard = self._claim()
            self._grow()
            entries = self._write_shard(shard, clips)
            commit = Commit(
                unit_id=identity,
                spec_id=spec.spec_id,
                shard=shard,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                provenance=dict(provenance),
                n_bytes=sum(p.stat().st_size for p in self._shard_files(shard)),
                clips=tuple(entries),
            )
            won = write_commit(commits, commit)
        except OSError as error:
            if shard is not None:
                self._discard(shard)
            raise StoreError(
                f"{self.layout.root}: cannot write ({error.strerror or error}). Nothing of this unit "
                "became visible; free space or fix the permissions and run the same command again."
            ) from error
        if not won:
            self._discard(shard)
            return read_commit(known)
        return commit

    def _ensure_group(self) -> None:
        """Create the spec's group with empty arrays: whole, by renaming a finished folder."""
        final = self.layout.group(self.spec)
        if final.is_dir():
            return
        aside = self.layout.root / f".{final.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial"
        try:
            group = zarr.create_group(aside, zarr_format=3, attributes=group_attributes(self.spec))
            for plan in arrays(self.spec):
                create_array(group, plan)
            with contextlib.suppress(OSError):  # another worker was first: the folder is not empty
                aside.rename(final)
            if not final.is_dir():
                raise StoreError(f"{final}: cannot be created; check the folder's permissions.")
            fsync_folder(final.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _claim(self) -> int:
        """Take the next free shard number for this attempt alone."""
        folder = self.layout.claims(self.spec.spec_id)
        folder.mkdir(parents=True, exist_ok=True)
        shard = self._n_claimed()
        while not create_once(folder / f"{shard:08d}", f"pid {os.getpid()}\n".encode()):
            shard += 1
        return shard

    def _n_claimed(self) -> int:
        names = [
            p.name for p in self.layout.claims(self.spec.spec_id).iterdir() if p.name.isdigit()
        ]
        return max(map(int, names), default=-1) + 1

    def _grow(self) -> None:
        """Make every array long enough for all claimed shards.

        Array metadata is replaced as a whole, so two growing writers may overwrite one another.
        Each therefore writes the length that all *claims* need and looks again afterwards: whoever
        writes last leaves the greatest.
        """
        while True:
            wanted = self._n_claimed() * CLIPS_PER_SHARD
            short = False
            for plan in arrays(self.spec):
                path = self.layout.group(self.spec) / plan.name / "zarr.json"
                metadata = json.loads(path.read_bytes())
                if metadata["shape"][0] < wanted:
                    short = True
                    metadata["shape"][0] = wanted
                    with write_aside(path) as aside:
                        aside.write_text(json.dumps(metadata, indent=2))
            if not short:
                return

    def _write_shard(self, shard: int, clips: Sequence[ClipTokens]) -> list[Entry]:
        tokens_plan, *small_plans = arrays(self.spec)
        start = shard * CLIPS_PER_SHARD
        rows = slice(start, start + CLIPS_PER_SHARD)
        small = {p.name: np.full((CLIPS_PER_SHARD, *p.tail), p.fill, p.dtype) for p in small_plans}
        stored = [
            None if c.tokens is None else c.tokens.astype(self.spec.dtype, copy=False)
            for c in clips
        ]
        entries = []
        for offset, (clip, tokens) in enumerate(zip(clips, stored, strict=True)):
            valid_len, checksum = 0, None
            if tokens is not None:
                valid_len, checksum = len(tokens), crc32c(tokens)
                if self.spec.frames is not None:
                    small["frame_index"][offset] = clip.frame_index
                    small["frame_pts_s"][offset] = clip.frame_pts_s
            small["valid_len"][offset] = valid_len
            small["status"][offset] = clip.status.code
            small["clip"][offset] = np.frombuffer(bytes.fromhex(clip.key), np.uint8)
            entries.append(
                Entry(
                    key=clip.key,
                    row=start + offset,
                    status=clip.status,
                    valid_len=valid_len,
                    crc32c=checksum,
                    reason=clip.reason,
                    remark=clip.remark,
                    truncated=clip.truncated,
                )
            )
        group = self.layout.group(self.spec)
        path = group / tokens_plan.name / tokens_plan.chunk_file(shard)
        write_shard(path, tokens_plan, stored)
        for name, values in small.items():
            zarr.open_array(group / name, mode="r+", zarr_format=3)[rows] = values
        for file in self._shard_files(shard):
            fsync_file(file)
            fsync_folder(file.parent)
        self._read_back(path, tokens_plan, entries)
        return entries

    def _read_back(self, path: Path, plan: ArrayPlan, entries: Sequence[Entry]) -> None:
        """Compare what stands on the disk with what was meant, clip by clip."""
        shard = Shard(path, plan)
        for place, entry in enumerate(entries):
            if entry.crc32c is None:
                continue
            if crc32c(shard.read(place, entry.valid_len)) != entry.crc32c:
                raise CorruptTokensError(
                    f"{path}: reads back differently from what was written; nothing was committed. "
                    "Check the disk and run the command again."
                )

    def _shard_files(self, shard: int) -> list[Path]:
        """Files of one unit that exist (an all-fill part of an array has none)."""
        group = self.layout.group(self.spec)
        files = [group / plan.name / plan.chunk_file(shard) for plan in arrays(self.spec)]
        return [f for f in files if f.is_file()]

    def _discard(self, shard: int) -> None:
        for path in self._shard_files(shard):
            path.unlink(missing_ok=True)


def create_array(group: zarr.Group, plan: ArrayPlan) -> None:
    """Create an empty array of a spec's group, as the plan says."""
    group.create_array(
        plan.name,
        shape=(0, *plan.tail),
        dtype=plan.dtype,
        chunks=plan.chunk,
        shards=plan.shard,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        fill_value=plan.fill,
        dimension_names=plan.dimensions,
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
        shape = clip.tokens.shape
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


def is_storable(tokens: Floats, spec: TokenSpec) -> bool:
    """True if every value is finite in the spec's stored dtype."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(tokens.astype(spec.dtype, copy=False)).all())
