"""What an engine is told, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from cache.schema import Model

EngineKind = Literal["inline", "local", "dask", "slurm", "pbs", "sge", "lsf", "oar", "htcondor"]
BATCH_KINDS = frozenset({"slurm", "pbs", "sge", "lsf", "oar", "htcondor"})
"""Engines that submit jobs to a batch system."""

MARGIN_S = 120.0
"""Time before its walltime at which a worker takes no more clips and commits what it has."""
TICK_S = 1.0


class EngineOptions(Model):
    """What `emocache extract --engine` takes."""

    kind: EngineKind = "inline"
    workers: int = Field(default=1, ge=1)
    min_workers: int | None = Field(default=None, ge=1)
    """Fewer workers are enough when less work is left; None: always `workers`."""
    scheduler: str | None = None
    """Address of a running Dask scheduler, for kind `dask`."""
    walltime_s: float | None = Field(default=None, gt=0)
    """Of each job; None: what the user's dask-jobqueue is configured to."""
    gpus_per_worker: int = Field(default=0, ge=0)
    cpus_per_worker: int = Field(default=1, ge=1)
    memory_bytes: int | None = Field(default=None, gt=0)
    """Of each job; None: the batch system's default."""
    queue: str | None = None
    account: str | None = None
    job_extra: tuple[str, ...] = ()
    """Further directives of the job script, without `#SBATCH`."""
    prologue: tuple[str, ...] = ()
    """Lines of the job script ahead of the worker."""
    start_timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait for a first worker, and for a lost scheduler."""
    log_dir: Path | None = None
    worker_ttl_s: float = Field(default=120.0, gt=0)
    """Silence after which Dask takes a worker for lost."""

    @property
    def least_workers(self) -> int:
        """`min_workers`, or its default."""
        return self.workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.least_workers > self.workers:
            raise ValueError(f"--min-workers {self.min_workers} exceeds --workers {self.workers}")
        if (self.scheduler is None) == (self.kind == "dask"):
            need = "needs" if self.kind == "dask" else "takes no"
            raise ValueError(f"--engine {self.kind} {need} --scheduler ADDRESS")
        if self.kind == "inline" and self.workers > 1:
            raise ValueError(f"--engine inline is one worker, got --workers {self.workers}")
        if self.kind not in BATCH_KINDS:
            for name in ("queue", "account", "job_extra", "prologue", "walltime_s"):
                if getattr(self, name):
                    flag = name.removesuffix("_s").replace("_", "-")
                    raise ValueError(f"--engine {self.kind} submits no jobs, so takes no --{flag}")
        return self


@dataclass(frozen=True)
class EngineState:
    """How an engine is doing."""

    kind: EngineKind
    n_workers: int
    n_wanted: int
    dashboard_link: str | None = None
    notes: tuple[str, ...] = ()
    """Lines for the user: where logs are, what is amiss."""
    is_stopping: bool = False
    """Somebody asked to stop, and the work was or is not done."""


def log_note(options: EngineOptions, session: str) -> str | None:
    """Return the line that tells where logs are, if there are any."""
    if options.log_dir is None:
        return None
    files = "*" if options.kind in BATCH_KINDS else f"{session}-*.log"
    return f"logs: tail -F {options.log_dir}/{files}"
