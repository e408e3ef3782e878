"""The loop of a worker, whatever its work is: chosen by the `work` of its configuration."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.clip import Record
from cache.errors import ManifestError, SchemaError
from cache.manifest import read_manifest
from cache.schema import decode
from extract.config import LoopConfig
from extract.jobs.job import Job

_LOOPS: dict[str, tuple[str, str, str]] = {
    "tokens": ("extract.config", "WorkerConfig", "extract.workers.worker"),
    "annotation": ("extract.annotate.config", "AnnotationConfig", "extract.annotate.worker"),
}
"""Work -> where its configuration is, the class, and where its function `work` is. By name: a worker
of one kind need not load the libraries of the other."""


def read_config(config_json: str) -> LoopConfig:
    """Return a worker's configuration as the class that its work has.

    Raises:
        SchemaError: It is no configuration, or of unknown work.
    """
    where = "the worker's configuration"
    try:
        data = json.loads(config_json)
    except ValueError as error:
        raise SchemaError(f"{where}: not a JSON document ({error})") from None
    module, name, _ = _of(data)
    model: type[LoopConfig] = getattr(importlib.import_module(module), name)
    return decode(model, data, where)


def work(config_json: str, rank: int = 0) -> str:
    """Work on a job until all its units are done, or until something asks to end.

    Args:
        config_json: A `LoopConfig` of some kind.
        rank: Number of this worker on its machine.

    Returns:
        The worker's last `WorkerState` as JSON.
    """
    *_, module = _of(json.loads(config_json))
    answer: str = importlib.import_module(module).work(config_json, rank)
    return answer


def planned_records(
    config: LoopConfig, job: Job, given: Sequence[Record] | None = None
) -> Sequence[Record]:
    """Return the records that a job was planned on.

    Args:
        config: Names their manifest.
        job: The job.
        given: Those of a caller that has them at hand.

    Raises:
        ManifestError: The manifest has changed since.
    """
    records = read_manifest(Path(config.manifest)).records if given is None else given
    if len(records) != job.plan.n_records:
        raise ManifestError(
            f"{config.manifest}: holds {len(records)} records, the job was planned on "
            f"{job.plan.n_records}. The manifest changed; run the same command again."
        )
    return records


def _of(data: Any) -> tuple[str, str, str]:
    kind = data.get("work", "tokens") if isinstance(data, dict) else None
    if kind not in _LOOPS:
        raise SchemaError(f"unknown work {kind!r} of a worker. Allowed: {', '.join(_LOOPS)}")
    return _LOOPS[kind]
