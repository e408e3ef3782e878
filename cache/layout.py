"""Where things stand in a store, and the shapes of its arrays. Arithmetic only, no I/O.

::

    STORE/store.json                        marks the folder; format version
    STORE/tokens.zarr/                      a plain Zarr v3 hierarchy, for anyone to read
        <stream>-<spec_id>/tokens           (clip, token, channel) or (clip, frame, patch, channel)
                           valid_len        (clip,) int32, valid entries of the second axis
                           status           (clip,) int8: 0 ok, 1 absent, 2 failed, -1 never written
                           clip             (clip, 32) uint8, SHA-256 of the media file
                           frame_index      (clip, frame) int32, video and image
                           frame_pts_s      (clip, frame) float64, video and image
    STORE/commits/<spec_id>/<unit_id>.json  create-once, written last: what is committed
    STORE/claims/<spec_id>/<shard>          create-once: which attempt owns which shard
    STORE/probes/<spec_id>.json             the encoder's answer to a fixed input

A unit of at most `CLIPS_PER_SHARD` clips is one shard, written once by the one attempt that claimed
its number. Shards whose attempt never committed are garbage that no reader looks at.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.spec import AUDIO_FRAMES_PER_S, TokenSpec

FORMAT_NAME = "emocache-store"
FORMAT_VERSION = 1

CLIPS_PER_SHARD = 32
"""92 MB a shard for the largest stream of the paper (1025 x 1408 float16); see docs/store.md."""


@dataclass(frozen=True)
class Layout:
    """The paths of a store."""

    root: Path

    @property
    def marker(self) -> Path:
        """The file that makes the folder a store."""
        return self.root / "store.json"

    @property
    def zarr(self) -> Path:
        """Root of the Zarr hierarchy."""
        return self.root / "tokens.zarr"

    @property
    def own_names(self) -> frozenset[str]:
        """Everything that a store's folder holds."""
        return frozenset({self.marker.name, self.zarr.name, "commits", "claims", "probes"})

    def group_name(self, spec: TokenSpec) -> str:
        """Name of a spec's group in the Zarr hierarchy."""
        return f"{spec.stream}-{spec.spec_id}"

    def group(self, spec: TokenSpec) -> Path:
        """Folder of a spec's Zarr group."""
        return self.zarr / self.group_name(spec)

    def commits(self, spec_id: str) -> Path:
        """Folder of a spec's commit records."""
        return self.root / "commits" / spec_id

    def claims(self, spec_id: str) -> Path:
        """Folder of a spec's shard claims."""
        return self.root / "claims" / spec_id

    def probe(self, spec_id: str) -> Path:
        """The encoder's recorded answer to the fixed input."""
        return self.root / "probes" / f"{spec_id}.json"


@dataclass(frozen=True)
class ArrayPlan:
    """One Zarr array of a spec's group, per clip; the clip axis comes first."""

    name: str
    tail: tuple[int, ...]
    dtype: str
    chunk_tail: tuple[int, ...]
    fill: float | int
    dimensions: tuple[str, ...]
    is_sharded: bool = False

    @property
    def chunk(self) -> tuple[int, ...]:
        """Zarr chunk: one clip (or a stretch of its tokens) where sharded, else a whole unit."""
        return (1 if self.is_sharded else CLIPS_PER_SHARD, *self.chunk_tail)

    @property
    def shard(self) -> tuple[int, ...] | None:
        """Zarr shard: a unit of clips; None for the small arrays."""
        return (CLIPS_PER_SHARD, *self.tail) if self.is_sharded else None

    def chunk_file(self, shard: int) -> str:
        """File of one unit's part of the array, relative to the array's folder."""
        return "/".join(["c", str(shard), *["0"] * len(self.tail)])


def arrays(spec: TokenSpec) -> list[ArrayPlan]:
    """Return the arrays of a spec's group, tokens first."""
    shape = spec.max_shape
    if spec.stream == "audio":
        # Ragged: a clip's tokens are stretches of one second; those past its end are not stored.
        step = AUDIO_FRAMES_PER_S if shape[0] % AUDIO_FRAMES_PER_S == 0 else shape[0]
        chunk_tail: tuple[int, ...] = (step, shape[1])
        names: tuple[str, ...] = ("token", "channel")
    else:
        chunk_tail = shape
        names = ("token", "channel") if spec.stream == "image" else ("frame", "patch", "channel")
    plans = [
        ArrayPlan("tokens", shape, spec.dtype, chunk_tail, 0, ("clip", *names), is_sharded=True),
        ArrayPlan("valid_len", (), "int32", (), -1, ("clip",)),
        ArrayPlan("status", (), "int8", (), -1, ("clip",)),
        ArrayPlan("clip", (32,), "uint8", (32,), 0, ("clip", "sha256_byte")),
    ]
    if spec.frames is not None:
        n = spec.frames.n_frames
        axis = "frame" if spec.stream == "video" else "chosen_frame"
        plans += [
            ArrayPlan("frame_index", (n,), "int32", (n,), -1, ("clip", axis)),
            ArrayPlan("frame_pts_s", (n,), "float64", (n,), float("nan"), ("clip", axis)),
        ]
    return plans


def group_attributes(spec: TokenSpec) -> dict[str, Any]:
    """Return what a stranger needs to understand a spec's group."""
    return {
        "emocache": {
            "format_version": FORMAT_VERSION,
            "spec_id": spec.spec_id,
            "spec": spec.model_dump(mode="json"),
            "clips_per_shard": CLIPS_PER_SHARD,
            "status_codes": {"ok": 0, "absent": 1, "failed": 2, "never written": -1},
            "how_to_read": "row r of every array is one clip; its tokens are "
            "tokens[r, :valid_len[r]] where status[r] == 0",
        }
    }
