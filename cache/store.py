"""The token store: open, commit a unit once, read what is committed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.core.array import Array

from cache.commit import ClipTokens, Commit, Entry, Index, Status, read_index
from cache.errors import CacheMissError, CorruptTokensError, SpecMismatchError, StoreError
from cache.files import create_once
from cache.layout import CLIPS_PER_SHARD, FORMAT_NAME, FORMAT_VERSION, Layout, arrays
from cache.schema import Model, decode, decode_json
from cache.shards import Floats, Shard, can_read, crc32c
from cache.spec import TokenSpec, describe_differences, differences
from cache.writer import UnitWriter

_PROBE_TOLERANCE = 2e-2
"""Largest relative difference of the golden probe: half precision and other devices pass, another
weight, layer or normalisation does not (those differ by far more than a tenth)."""

_OPEN_SHARDS = 256
"""Shards that stay open, each with a file and 16 bytes of index per chunk."""

ZarrArray = Array[Any]


@dataclass(frozen=True)
class StoredTokens:
    """A clip's tokens as read: audio (T, D), video (F, P, D) or image (1 + P, D)."""

    tokens: Floats
    entry: Entry


class _Marker(Model):
    format: Literal["emocache-store"]
    version: int


class TokenStore:
    """A folder of committed tokens; see `cache.layout` for what stands where.

    Readers see committed data only. A store may be read while others write to it; `refresh` shows
    what was committed since.
    """

    def __init__(self, root: Path) -> None:
        """Use `TokenStore.open` or `TokenStore.open_or_create`."""
        self.layout = Layout(root)
        self._indexes: dict[str, Index] = {}
        self._arrays: dict[tuple[str, str], ZarrArray] = {}
        self._shards: dict[tuple[str, int], Shard] = {}
        self._is_plain: dict[str, bool] = {}

    def __repr__(self) -> str:
        return f"TokenStore({str(self.layout.root)!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Leave open arrays and files behind: a spawned worker opens its own."""
        return {
            "layout": self.layout,
            "_indexes": self._indexes,
            "_arrays": {},
            "_shards": {},
            "_is_plain": {},
        }

    @classmethod
    def open(cls, root: Path) -> TokenStore:
        """Open an existing store.

        Raises:
            StoreError: No such folder, not a store, or written by a newer version.
        """
        marker = Layout(root).marker
        if not root.exists():
            raise StoreError(
                f"{root}: no such store. Create it with: emocache extract PRESET --store {root} ..."
            )
        if not marker.is_file():
            raise StoreError(
                f"{root}: not an emocache store (no {marker.name} in it). Give the folder that "
                "`emocache extract --store` wrote; nothing was changed."
            )
        found = decode_json(_Marker, marker.read_bytes(), str(marker))
        if found.version > FORMAT_VERSION:
            raise StoreError(
                f"{root}: store format {found.version}, this version reads up to {FORMAT_VERSION}. "
                "Update emocache; nothing was changed."
            )
        return cls(root)

    @classmethod
    def open_or_create(cls, root: Path) -> TokenStore:
        """Open a store, creating it in an empty or new folder.

        Raises:
            StoreError: The folder holds something else, or cannot be written.
        """
        layout = Layout(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            if not layout.marker.is_file():
                # Another worker may be creating the store right now: its names are ours too.
                names = (p.name for p in root.iterdir() if not p.name.endswith(".partial"))
                strangers = sorted(set(names) - layout.own_names)
                if strangers:
                    raise StoreError(
                        f"{root}: not empty and not an emocache store (holds {strangers[0]!r}). "
                        "Give a new or empty folder; nothing was changed."
                    )
                # Not by zarr: two workers that create the store at once must both succeed.
                layout.zarr.mkdir(exist_ok=True)
                root_group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
                create_once(layout.zarr / "zarr.json", json.dumps(root_group).encode())
                marker = {"format": FORMAT_NAME, "version": FORMAT_VERSION}
                create_once(layout.marker, json.dumps(marker).encode())
        except (NotADirectoryError, FileExistsError):
            raise StoreError(f"{root}: is a file; give a folder for the store.") from None
        except PermissionError as error:
            raise StoreError(f"{root}: cannot be written ({error.strerror}).") from None
        return cls.open(root)

    # ---------------------------------------------------------------- what is in it

    @cached_property
    def specs(self) -> dict[str, TokenSpec]:
        """The stored specs by spec_id."""
        found: dict[str, TokenSpec] = {}
        for path in sorted(self.layout.zarr.glob("*-*/zarr.json")):
            attributes = json.loads(path.read_bytes()).get("attributes", {}).get("emocache")
            if not isinstance(attributes, dict) or "spec" not in attributes:
                continue
            spec = decode(TokenSpec, attributes["spec"], str(path))
            if spec.spec_id != attributes.get("spec_id"):
                raise StoreError(
                    f"{path}: the spec does not hash to its spec_id {attributes.get('spec_id')!r}. "
                    "The metadata was edited or damaged; restore the file from a copy."
                )
            found[spec.spec_id] = spec
        return found

    def close(self) -> None:
        """Close every file; the store may still be used and opens them again."""
        self._shards.clear()
        self._arrays.clear()

    def refresh(self) -> None:
        """Forget what was read; later calls see what others have committed since."""
        self._indexes.clear()
        self.close()
        self.__dict__.pop("specs", None)

    def index(self, spec: TokenSpec) -> Index:
        """Return all committed entries of a spec (read once, see `refresh`)."""
        if spec.spec_id not in self._indexes:
            self._indexes[spec.spec_id] = read_index(self.layout.commits(spec.spec_id))
        return self._indexes[spec.spec_id]

    def resolve(self, wanted: TokenSpec) -> TokenSpec:
        """Return the stored spec that `wanted` means.

        A wanted spec may leave the weights digest open; then one stored spec must fit.

        Raises:
            CacheMissError: The store holds no tokens of this stream at all.
            SpecMismatchError: Only tokens of other specs (the differing fields are listed), or
                several that fit.
        """
        same_stream = [s for s in self.specs.values() if s.stream == wanted.stream]
        fitting = [s for s in same_stream if wanted.accepts(s)]
        if len(fitting) == 1:
            return fitting[0]
        if len(fitting) > 1:
            digests = ", ".join(f"{s.encoder.weights_sha256}" for s in fitting)
            raise SpecMismatchError(
                f"{self.layout.root}: {len(fitting)} stored {wanted.stream} specs fit, of different "
                f"weights. Choose one with tokens.{wanted.stream}.encoder.weights_sha256=... "
                f"Stored: {digests}"
            )
        if not same_stream:
            raise CacheMissError(
                f"{self.layout.root}: holds no {wanted.stream} tokens. "
                "Write them with: emocache extract PRESET --manifest ... --store ..."
            )
        nearest = min(same_stream, key=lambda s: len(differences(wanted, s)))
        fields = differences(wanted, nearest)
        if not wanted.is_resolved:
            fields.pop("encoder.weights_sha256", None)
        raise SpecMismatchError(
            f"{self.layout.root}: no {wanted.stream} tokens of the wanted spec. "
            f"The nearest stored spec is {nearest.spec_id}: {describe_differences(fields)}. "
            "Extract with the wanted settings, or change the settings to the stored ones."
        )

    # ---------------------------------------------------------------- reading

    def entry(self, spec: TokenSpec, key: str, uid: str | None = None) -> Entry:
        """Return what is committed of a clip.

        Raises:
            CacheMissError: Nothing is.
        """
        found = self.index(spec).entries.get(key)
        if found is None:
            raise CacheMissError(
                f"{uid or key[:16]}: no committed {spec.stream} tokens under spec {spec.spec_id} in "
                f"{self.layout.root}. Create them with: emocache extract PRESET --manifest ... "
                f"--store {self.layout.root}"
            )
        return found

    def read(self, spec: TokenSpec, key: str, uid: str | None = None) -> StoredTokens:
        """Read a clip's valid tokens.

        Args:
            spec: A stored spec (`resolve`).
            key: `Record.token_key(spec)`.
            uid: Names the record in errors.

        Raises:
            CacheMissError: Nothing is committed, or the clip is absent or failed.
            CorruptTokensError: The stored bytes fail their checksum.
        """
        entry = self.entry(spec, key, uid)
        if entry.status is not Status.OK:
            raise CacheMissError(
                f"{uid or key[:16]}: the {spec.stream} stream is {entry.status.value}"
                f"{f' ({entry.reason})' if entry.reason else ''}, so there are no tokens. "
                "Mask the stream or leave the clip out."
            )
        try:
            tokens = self._read_tokens(spec, entry)
        except (ValueError, OSError, CorruptTokensError) as error:
            raise self._corrupt(spec, entry, uid, str(error)) from error
        if crc32c(tokens) != entry.crc32c:
            raise self._corrupt(spec, entry, uid, "CRC-32C differs from the commit record")
        return StoredTokens(tokens, entry)

    def _read_tokens(self, spec: TokenSpec, entry: Entry) -> Floats:
        """Read by byte range where the array has our layout, else through zarr-python."""
        plan = arrays(spec)[0]
        if spec.spec_id not in self._is_plain:
            metadata = (self.layout.group(spec) / plan.name / "zarr.json").read_bytes()
            self._is_plain[spec.spec_id] = can_read(json.loads(metadata), plan)
        if not self._is_plain[spec.spec_id]:
            return self.read_with_zarr(spec, entry)
        number, place = divmod(entry.row, CLIPS_PER_SHARD)
        shard = self._shards.pop((spec.spec_id, number), None)
        if shard is None:
            shard = Shard(self.layout.group(spec) / plan.name / plan.chunk_file(number), plan)
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.pop(next(iter(self._shards)))  # the one that was used longest ago
        self._shards[spec.spec_id, number] = shard
        return shard.read(place, entry.valid_len)

    def read_with_zarr(self, spec: TokenSpec, entry: Entry) -> Floats:
        """Read a clip's valid tokens through zarr-python: slower, for any layout."""
        array = self._array(spec, "tokens", rows=entry.row + 1)
        return np.asarray(array[entry.row, : entry.valid_len])

    def _corrupt(
        self, spec: TokenSpec, entry: Entry, uid: str | None, why: str
    ) -> CorruptTokensError:
        return CorruptTokensError(
            f"{uid or entry.key[:16]}: damaged {spec.stream} tokens, row {entry.row} of "
            f"{self.layout.group(spec)} ({why}). Restore that shard from a copy of the store."
        )

    def _array(self, spec: TokenSpec, name: str, rows: int = 0) -> ZarrArray:
        """Return an array for reading, at least `rows` long.

        Its metadata may be shorter than what is committed if the writer that extended it was
        killed (`_grow`); the commit record is the truth, so the length is corrected in memory.
        """
        known = self._arrays.get((spec.spec_id, name))
        if known is None or known.shape[0] < rows:
            known = zarr.open_array(self.layout.group(spec) / name, mode="r", zarr_format=3)
            if known.shape[0] < rows:
                metadata = replace(known.metadata, shape=(rows, *known.shape[1:]))
                known = ZarrArray(replace(known.async_array, metadata=metadata))
            self._arrays[spec.spec_id, name] = known
        return known

    def frame_times(self, spec: TokenSpec, row: int) -> tuple[list[int], list[float]]:
        """Return the frame indices and presentation times (s) of a row; empty for audio."""
        if spec.frames is None:
            return [], []
        index = np.asarray(self._array(spec, "frame_index", rows=row + 1)[row])
        times = np.asarray(self._array(spec, "frame_pts_s", rows=row + 1)[row])
        return index.tolist(), times.tolist()

    # ---------------------------------------------------------------- writing

    def commit(
        self,
        spec: TokenSpec,
        clips: Sequence[ClipTokens],
        provenance: Mapping[str, str],
        after: Iterable[str] = (),
    ) -> Commit:
        """Write a unit of clips and make it visible, all or nothing, once.

        If another worker committed the same unit meanwhile, its commit is returned.

        Args:
            spec: Must be resolved.
            clips: 1 to `CLIPS_PER_SHARD`, distinct keys.
            provenance: Library versions and device.
            after: Units that recorded some of these clips as failed (see `unit_id`).

        Raises:
            CorruptTokensError: Tokens of another shape, or with NaN or infinity: nothing is written.
            StoreError: The disk is full or cannot be written: nothing becomes visible.
        """
        commit = UnitWriter(self.layout, spec).commit(clips, provenance, after)
        self.__dict__.pop("specs", None)
        index = self._indexes.get(spec.spec_id)
        if index is not None and all(c.unit_id != commit.unit_id for c in index.commits):
            index.add(commit)
        return commit

    # ---------------------------------------------------------------- golden probe

    def check_probe(self, spec: TokenSpec, values: Sequence[float]) -> None:
        """Compare the encoder's answer to a fixed input with the one recorded first.

        This catches a library upgrade that changes numbers under the same spec.

        Args:
            spec: A resolved spec.
            values: The answer, a few numbers of order one.

        Raises:
            SpecMismatchError: The answers differ.
        """
        path = self.layout.probe(spec.spec_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        if create_once(path, json.dumps([float(v) for v in values]).encode()):
            return
        recorded = np.asarray(json.loads(path.read_bytes()), np.float64)
        got = np.asarray(values, np.float64)
        worst = math.inf
        if recorded.shape == got.shape:
            scale = max(1e-6, float(np.abs(recorded).max()))
            worst = float(np.abs(recorded - got).max()) / scale
        if not worst <= _PROBE_TOLERANCE:
            raise SpecMismatchError(
                f"{self.layout.root}: the {spec.stream} encoder answers the fixed input differently "
                f"from when spec {spec.spec_id} was first extracted (relative difference "
                f"{worst:.3g}, allowed {_PROBE_TOLERANCE}). A library or device changed its numbers. "
                "Restore the versions that `emocache store show` prints, or use a new store."
            )
