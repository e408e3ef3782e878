"""Where things stand in a store, and the shapes of its arrays. Arithmetic only, no I/O.

::

    STORE/store.json                        marks the folder; format version, compression
    STORE/tokens.zarr/                      a plain Zarr v3 hierarchy, for anyone to read
        <stream>-<spec_id>/tokens           (clip, token, channel) or (clip, frame, patch, channel)
                           valid_len        (clip,) int32, valid entries of the second axis
                           status           (clip,) int8: 0 ok, 1 absent, 2 failed, -1 never written
                           clip             (clip, 32) uint8, SHA-256 of the media file
                           frame_index      (clip, frame) int32, video and image
                           frame_pts_s      (clip, frame) float64, video and image
                           token_scale      (clip, token...) float32, int8 specs
                           channel_exponent (clip, channel) int8, int8 specs
    STORE/commits/<spec_id>/<unit_id>.json  create-once, written last: what is committed
    STORE/claims/<spec_id>/<shard>          create-once: which attempt owns which shard
    STORE/snapshots/<spec_id>/*.arrow       derived: the commit records as one table, for a quick open
    STORE/probes/<spec_id>.json             the encoder's answer to a fixed input
    STORE/jobs/<job_id>/<generation>/       how extraction shared its work; no reader needs it

A unit of at most `CLIPS_PER_SHARD` clips is one shard, written once by the one attempt that claimed
its number. Shards whose attempt never committed are garbage that no reader looks at.

Paths are keys: relative to the store, with `/`, on a disk and in a bucket alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cache.encoders import AUDIO_FRAMES_PER_S
from cache.spec import TokenSpec

FORMAT_NAME = "emocache-store"
FORMAT_VERSION = 1

CLIPS_PER_SHARD = 32
"""92 MB a shard for the largest stream of the paper (1025 x 1408 float16); see docs/store.md."""

Compression = Literal["none", "zstd"]
"""Of token chunks; `zstd` is Blosc with zstd and byte shuffle, lossless."""

MARKER = "store.json"
"""The file that makes a folder a store."""
ZARR = "tokens.zarr"
"""Root of the Zarr hierarchy."""
JOBS = "jobs"
"""Folder of the extraction jobs: see `extract.jobs.job`."""
OWN_NAMES = frozenset({MARKER, ZARR, JOBS, "commits", "claims", "probes", "snapshots"})
"""Everything that a store's folder holds."""


def group(spec: TokenSpec) -> str:
    """Return the key of a spec's Zarr group."""
    return f"{ZARR}/{spec.stream}-{spec.spec_id}"


def commits(spec_id: str) -> str:
    """Return the key of the folder of a spec's commit records."""
    return f"commits/{spec_id}"


def claims(spec_id: str) -> str:
    """Return the key of the folder of a spec's shard claims."""
    return f"claims/{spec_id}"


def snapshots(spec_id: str) -> str:
    """Return the key of the folder of a spec's snapshots."""
    return f"snapshots/{spec_id}"


def probe(spec_id: str) -> str:
    """Return the key of the encoder's recorded answer to the fixed input."""
    return f"probes/{spec_id}.json"


def jobs(job_id: str) -> str:
    """Return the key of the folder of an extraction job's generations."""
    return f"{JOBS}/{job_id}"


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
    is_derived: bool = False
    """True if the commit records hold the same, so that it can be built again."""
    compression: Compression = "none"

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


STORED_DTYPES = {
    "float16": "float16",
    "float32": "float32",
    "bfloat16": "uint16",  # the bits: Zarr has no bfloat16 that every library knows
    "int8": "int8",
}
"""dtype of a spec -> dtype of the Zarr array `tokens`."""


def arrays(spec: TokenSpec, compression: Compression = "none") -> list[ArrayPlan]:
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
    stored = STORED_DTYPES[spec.dtype]
    plans = [
        ArrayPlan(
            "tokens", shape, stored, chunk_tail, 0, ("clip", *names),
            is_sharded=True, compression=compression,
        ),
        ArrayPlan("valid_len", (), "int32", (), -1, ("clip",), is_derived=True),
        ArrayPlan("status", (), "int8", (), -1, ("clip",), is_derived=True),
        ArrayPlan("clip", (32,), "uint8", (32,), 0, ("clip", "sha256_byte"), is_derived=True),
    ]  # fmt: skip
    if spec.frames is not None:
        n = spec.frames.n_frames
        # The axis of the tokens only where they stand for one frame each.
        same = spec.stream == "video" and shape[0] == n
        axis = "frame" if same else "chosen_frame"
        plans += [
            ArrayPlan("frame_index", (n,), "int32", (n,), -1, ("clip", axis)),
            ArrayPlan("frame_pts_s", (n,), "float64", (n,), float("nan"), ("clip", axis)),
        ]
    if spec.dtype == "int8":
        scales, channels = shape[:-1], shape[-1:]
        plans += [
            ArrayPlan("token_scale", scales, "float32", scales, 0, ("clip", *names[:-1])),
            ArrayPlan("channel_exponent", channels, "int8", channels, 0, ("clip", "channel")),
        ]
    return plans


def group_attributes(spec: TokenSpec) -> dict[str, Any]:
    """Return what a stranger needs to understand a spec's group."""
    values = {
        "bfloat16": ". The numbers are bfloat16: their bits are the upper half of a float32's",
        "int8": ". The values are tokens * token_scale[..., None] * 2 ** (channel_exponent / 4)",
    }
    return {
        "emocache": {
            "format_version": FORMAT_VERSION,
            "spec_id": spec.spec_id,
            "spec": spec.model_dump(mode="json"),
            "clips_per_shard": CLIPS_PER_SHARD,
            "status_codes": {"ok": 0, "absent": 1, "failed": 2, "never written": -1},
            "how_to_read": "row r of every array is one clip; its tokens are "
            f"tokens[r, :valid_len[r]] where status[r] == 0{values.get(spec.dtype, '')}",
        }
    }
