"""Where an extraction or an annotation runs: in this process, in processes of this machine, on a cluster.

Every engine does the same: it starts worker loops (`extract.workers.loop.work`) and watches over
them. Which clips a loop takes is settled between the loops, through leases in the store. So engines
can be mixed, changed in mid-run and killed, and losing a worker costs the batch that it had in hand.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import MissingDependencyError, SchemaError
from cache.schema import decode_json
from extract.config import LoopConfig, n_cores
from extract.engines.options import (
    BATCH_KINDS,
    MARGIN_S,
    TICK_S,
    EngineOptions,
    EngineState,
    log_note,
)

if TYPE_CHECKING:
    from extract.jobs.job import Job

_UNIT_S = 60.0
"""Guess for the time of a unit while none is done."""


def job_script(options: EngineOptions, config: LoopConfig) -> str:
    """Return the job script that would be submitted for one worker. Nothing is started.

    Raises:
        SchemaError: The engine has no job scripts, or the options do not fit it.
    """
    if options.kind not in BATCH_KINDS:
        raise SchemaError(
            f"--engine {options.kind} submits no jobs. Engines that do: {', '.join(sorted(BATCH_KINDS))}"
        )
    _need_dask(options)
    from extract.engines import job_scripts

    return job_scripts.job_script(_with_logs(options, config), config.session)


def run_engine(
    options: EngineOptions,
    config: LoopConfig,
    job: Job,
    on_tick: Callable[[EngineState], None] = lambda state: None,
) -> EngineState:
    """Work on a job until all its units are done.

    Ctrl-C or SIGTERM asks the workers of this session to commit what they have and end; the second
    ends them at once. Workers of other sessions are left alone.

    Args:
        options: Where, and with how many workers.
        config: What each worker is told.
        job: The job.
        on_tick: Called about once a second; for `inline` by another thread.

    Returns:
        The last state.

    Raises:
        SchemaError: The options cannot work; nothing was started.
        ExtractionStopped: No workers come, or they fail again and again.
        EmocacheError: A worker's own error that concerns all of them.
        KeyboardInterrupt: Ctrl-C for the second time.
    """
    options = _with_logs(options, config)
    _need_dask(options)
    walltime_s = _walltime_s(options)
    _check(options, config, job, walltime_s)
    config = _for_workers(options, config, walltime_s)
    if options.kind == "inline":
        return _run_inline(options, config, on_tick)
    from extract.engines.supervisor import supervise

    return supervise(options, config, job, on_tick)


# ---------------------------------------------------------------------------- before the start


def _with_logs(options: EngineOptions, config: LoopConfig) -> EngineOptions:
    if options.log_dir is None and config.log_dir is not None:
        return options.model_copy(update={"log_dir": Path(config.log_dir)})
    return options


def _need_dask(options: EngineOptions) -> None:
    if options.kind == "inline":
        return
    libraries = ["distributed", "cryptography"]
    libraries += ["dask_jobqueue"] if options.kind in BATCH_KINDS else []
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"--engine {options.kind} needs {', '.join(missing)}: pip install 'emocache[extract]'. "
            "Without them there are --engine inline and job arrays of `emocache extract-worker`."
        )


def _walltime_s(options: EngineOptions) -> float | None:
    if options.kind not in BATCH_KINDS:
        return None
    from extract.engines.job_scripts import walltime_of

    return walltime_of(options)


def _check(options: EngineOptions, config: LoopConfig, job: Job, walltime_s: float | None) -> None:
    """Refuse what cannot work before anything waits in a queue for it."""
    on_gpu = config.device.startswith("cuda")
    if options.gpus_per_worker and not on_gpu:
        raise SchemaError(
            f"--gpus-per-worker {options.gpus_per_worker}, but the workers run on {config.device}. Give "
            "--device cuda, or no GPUs."
        )
    if options.kind in ("inline", "local") and on_gpu:
        import torch

        n_gpus = torch.cuda.device_count()
        wanted = max(1, options.workers * options.gpus_per_worker)
        if n_gpus < wanted:
            raise SchemaError(
                f"--device {config.device}: {options.workers} workers want {wanted} GPUs, torch sees "
                f"{n_gpus} on this machine. Give fewer --workers, or --device cpu."
            )
    if walltime_s is None:
        return
    times_s = [r.ended_s - r.started_s for r in job.receipts() if not r.partial]
    unit_s = statistics.median(times_s) if times_s else _UNIT_S
    if walltime_s < MARGIN_S + unit_s:
        basis = f"as the {len(times_s)} done ones did" if times_s else "at a guess"
        raise SchemaError(
            f"a walltime of {walltime_s:.0f} s is too short: a unit takes {unit_s:.0f} s, {basis}, and "
            f"workers end {MARGIN_S:.0f} s ahead of it. Give --walltime {_minutes(MARGIN_S + unit_s)}m or "
            "more, or smaller units (--unit-clips)."
        )


def _minutes(seconds: float) -> int:
    return int(-(-seconds // 60))


def _for_workers(
    options: EngineOptions, config: LoopConfig, walltime_s: float | None
) -> LoopConfig:
    changes: dict[str, Any] = {"engine": options.kind}
    if options.log_dir is not None:
        changes["log_dir"] = str(options.log_dir)
    if walltime_s is not None and config.drain_after_s is None:
        changes["drain_after_s"] = walltime_s - MARGIN_S
    if config.n_threads is None and options.kind not in ("inline", "dask"):
        # A worker sees all cores of its machine, though they are not all for it.
        is_local = options.kind == "local"
        n = max(1, n_cores() // options.workers) if is_local else options.cpus_per_worker
        changes["n_threads"] = max(1, n - config.n_decoders)
    return config.model_copy(update=changes)


# ---------------------------------------------------------------------------- inline


def _run_inline(
    options: EngineOptions, config: LoopConfig, on_tick: Callable[[EngineState], None]
) -> EngineState:
    from extract.jobs.session import WorkerState
    from extract.workers import loop

    log = log_note(options, config.session)
    state = EngineState("inline", 1, 1, notes=(log,) if log else ())
    ended = threading.Event()

    def tick() -> None:
        on_tick(state)
        while not ended.wait(TICK_S):
            on_tick(state)

    ticker = threading.Thread(target=tick, name="engine-tick", daemon=True)
    ticker.start()
    try:
        answer = loop.work(config.model_dump_json())
    finally:
        ended.set()
        ticker.join()
    end = decode_json(WorkerState, answer, "the worker's answer")
    return EngineState("inline", 0, 1, notes=state.notes, is_stopping=end.end_reason is not None)
