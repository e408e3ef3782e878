"""What a worker is told: one JSON document that crosses processes, hosts and engines."""

from __future__ import annotations

import os
from typing import Literal, get_args

from pydantic import Field

from cache.schema import Model
from cache.spec import TokenSpec

Precision = Literal["float32", "float16", "bfloat16"]
"""What matrix products are computed in; sums, norms and the residual stream stay float32 in all."""
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

CPU_BATCH_TOKENS = 2048
"""Tokens of a batch on a CPU, where a small batch stays in the caches (docs/extraction_speed.md)."""
GPU_BATCH_TOKENS = 32_768
"""Tokens of a batch on a GPU: 21 clips of 30 s sound, or 8 clips of 16 frames."""


Work = Literal["tokens", "annotation"]
"""What a job makes: tokens of a store, or descriptions of a manifest's records."""


class LoopConfig(Model):
    """What every worker loop is told, whatever its work is; paths are absolute."""

    work: Work
    store: str
    """Where the job is: a token store, or the work folder of an annotation."""
    manifest: str
    media_root: str
    """Folder, or URL that fsspec understands."""
    job_id: str
    generation: int
    session: str
    """One start of `emocache extract` or `emocache annotate`; a request to stop reaches its workers
    alone."""
    engine: str = "inline"
    device: str = "cpu"
    n_decoders: int = Field(default=1, gt=0)
    """Processes or threads that work on media."""
    n_threads: int | None = Field(default=None, gt=0)
    """Threads of the encoders on a CPU; None: the cores that the decoders leave."""
    heartbeat_s: float = Field(default=10.0, gt=0)
    lease_timeout_s: float = Field(default=120.0, gt=0)
    """Age of the last heartbeat at which a worker counts as dead."""
    drain_after_s: float | None = Field(default=None, gt=0)
    """Time after its start at which a worker finishes up, ahead of its walltime."""
    max_failure_share: float = Field(default=0.5, gt=0, le=1)
    """Share of failed clips among the latest at which the run stops."""
    log_dir: str | None = None

    @property
    def threads(self) -> int:
        """Threads of the encoders on a CPU."""
        return self.n_threads or max(1, n_cores() - self.n_decoders)


class WorkerConfig(LoopConfig):
    """Everything that a worker that encodes needs.

    Nothing here changes a stored number but for rounding (`device`, `precision`, `batch_tokens`), and for
    the boxes of faces, which are data as the media are.
    """

    work: Literal["tokens"] = "tokens"
    specs: tuple[TokenSpec, ...]
    """Resolved."""
    weights: dict[str, str]
    """spec_id -> checkpoint."""
    precision: Precision = "float32"
    compile: bool = False
    single_committer: bool = False

    deadline_s: float = Field(default=120.0, gt=0)
    """Longest time for decoding one clip."""
    memory_bytes: int = Field(default=2 << 30, gt=0)
    """Most memory that decoding one clip may take."""
    recycle_after: int = Field(default=200, gt=0)
    """Clips after which a decoder process is replaced: libraries leak."""
    attempts: int = Field(default=2, gt=0)
    """Times that a clip may crash, hang or exhaust its decoder before it is taken for the cause."""
    picture_decoder: Literal["auto", "pyav"] = "auto"
    batch_tokens: int | None = Field(default=None, gt=0)
    """Most encoder tokens in one batch; None: a default for the device."""
    faces: str | None = None
    """Where faces are, for specs that crop them: a folder of OpenFace's tables, or `module:attribute` of a
    detector (`extract.faces`)."""
    decoder_command: tuple[str, ...] | None = None
    """Program of the decoder processes; None: the one of this Python."""

    @property
    def tokens_per_batch(self) -> int:
        """Most encoder tokens in one batch."""
        if self.batch_tokens is not None:
            return self.batch_tokens
        return CPU_BATCH_TOKENS if self.device == "cpu" else GPU_BATCH_TOKENS


def n_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
