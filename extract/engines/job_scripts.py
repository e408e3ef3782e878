"""Job scripts of batch systems, and the settings of Dask that reach the workers through them.

dask-jobqueue writes the scripts; here our options become its own, system by system. What a user has
configured for dask-jobqueue in Dask's files holds where no option says otherwise.
"""

from __future__ import annotations

import importlib
import shlex
import sys
from typing import Any

import dask.config
from dask.utils import format_bytes

from cache.errors import MissingDependencyError, SchemaError
from extract.engines.loops import JOB_STARTED
from extract.engines.options import BATCH_KINDS, MARGIN_S, EngineOptions

NAME = "emocache"
"""Of the jobs, as the queue shows them."""

_JOB_CLASSES = {
    "slurm": "SLURMJob",
    "pbs": "PBSJob",
    "sge": "SGEJob",
    "lsf": "LSFJob",
    "oar": "OARJob",
    "htcondor": "HTCondorJob",
}
_HAS_ACCOUNT = {
    "slurm": "account",
    "pbs": "account",
    "sge": "project",
    "lsf": "project",
    "oar": "project",
}
_GPU_BY_HAND = {"sge": "-l gpu=1", "oar": "-p gpu_count>0"}
"""Batch systems whose name for a GPU is each site's own, with an example."""


def job_script(options: EngineOptions, session: str = "SESSION") -> str:
    """Return the text that would be submitted for one worker, but for address and keys of the scheduler.

    Raises:
        SchemaError: The options do not fit the batch system.
    """
    with dask.config.set(dask_settings(options.worker_ttl_s)):
        job = job_class(options.kind)(
            "tls://SCHEDULER:PORT", name=f"{NAME}-{session}-0", **job_options(options)
        )
        return str(job.job_script())


def walltime_of(options: EngineOptions) -> float | None:
    """Return the walltime of each job: as given, else as the user's dask-jobqueue is configured."""
    if options.walltime_s is not None or options.kind not in BATCH_KINDS:
        return options.walltime_s
    text = dask.config.get(f"jobqueue.{options.kind}.walltime", None)
    return None if text is None else _walltime_s(options.kind, str(text))


def dask_settings(worker_ttl_s: float = 120.0) -> dict[str, Any]:
    """Return the settings of Dask that extraction relies on, for its scheduler and its workers."""
    return {
        # A task dies with each preempted machine; Dask's default gives up after three.
        "distributed.scheduler.allowed-failures": 1000,
        # Tasks queued on a worker that dies are blamed for it: queue none.
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.scheduler.worker-ttl": f"{worker_ttl_s:g}s",
        "distributed.scheduler.no-workers-timeout": None,
        "distributed.scheduler.work-stealing": False,
        # Decoders, and data loaders, are children of the worker.
        "distributed.worker.daemon": False,
        # Encoders keep gigabytes that Dask can neither spill nor free; limits are the batch system's.
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        # It looks at every thread's stack a hundred times a second.
        "distributed.worker.profile.enabled": False,
    }


def dask_environment(worker_ttl_s: float = 120.0) -> dict[str, str]:
    """Return the same settings as environment variables, for workers that start on other machines."""
    return {
        "DASK_" + key.upper().replace("-", "_").replace(".", "__"): str(value)
        for key, value in dask_settings(worker_ttl_s).items()
    }


def job_class(kind: str) -> Any:
    """Return dask-jobqueue's class of a batch system's jobs."""
    try:
        module = importlib.import_module(f"dask_jobqueue.{kind}")
    except ImportError as error:
        raise MissingDependencyError(
            f"--engine {kind} needs dask-jobqueue ({error}). pip install 'emocache[extract]'"
        ) from None
    return getattr(module, _JOB_CLASSES[kind])


def job_options(options: EngineOptions) -> dict[str, Any]:
    """Return what dask-jobqueue's job class of this kind takes."""
    kind = options.kind
    walltime_s = walltime_of(options)
    chosen: dict[str, Any] = dask.config.get(f"jobqueue.{kind}", {})
    job: dict[str, Any] = {
        "cores": 1,  # of Dask's: one loop
        "processes": 1,
        "memory": format_bytes(options.memory_bytes or 4 << 30).replace(" ", ""),
        "nanny": True,
        "job_name": NAME,
        "python": shlex.quote(sys.executable),
        "log_directory": str(options.log_dir) if options.log_dir else chosen.get("log-directory"),
        "worker_extra_args": [
            *(chosen.get("worker-extra-args") or []),
            "--no-dashboard",
            "--dashboard-address 127.0.0.1:0",
            *_lifetime(walltime_s),
        ],
        "job_script_prologue": [
            *_prologue(options),
            *(chosen.get("job-script-prologue") or []),
            *options.prologue,
        ],
    }
    if options.queue is not None:
        if kind == "htcondor":
            raise SchemaError(
                "--queue: HTCondor has no queues. Use --job-extra 'requirements = ...'."
            )
        job["queue"] = options.queue
    if options.account is not None and kind in _HAS_ACCOUNT:
        job[_HAS_ACCOUNT[kind]] = options.account
    if walltime_s is not None and kind != "htcondor":
        job["walltime"] = _walltime_text(kind, walltime_s)
    if kind == "htcondor":
        extra = {**(chosen.get("job-extra-directives") or {}), **_condor(options)}
        job |= {"disk": chosen.get("disk") or "1GB", "job_extra_directives": extra}
        if not options.memory_bytes:
            job["job_directives_skip"] = ["RequestMemory"]
        return job
    resources, directives = _resources(options)
    job |= resources
    given = [*(chosen.get("job-extra-directives") or []), *options.job_extra]
    job["job_extra_directives"] = [*directives, *given]
    return job


def _resources(options: EngineOptions) -> tuple[dict[str, Any], list[str]]:
    """Return how a kind asks for CPUs, memory and GPUs: keyword arguments, and further directives."""
    kind, n_cpus, n_gpus = options.kind, options.cpus_per_worker, options.gpus_per_worker
    memory = options.memory_bytes
    has_gpu = any("gpu" in extra or "gres" in extra for extra in options.job_extra)
    if n_gpus and not has_gpu and kind in _GPU_BY_HAND:
        raise SchemaError(
            f"--gpus-per-worker {n_gpus}: {kind.upper()} names GPUs differently on each cluster. Say it "
            f"with --job-extra, for example --job-extra '{_GPU_BY_HAND[kind]}'."
        )
    ask_gpu = n_gpus > 0 and not has_gpu
    if kind == "slurm":
        skip = [] if memory else ["--mem="]
        gpus = [f"--gres=gpu:{n_gpus}"] if ask_gpu else []
        return {"job_cpu": n_cpus, "job_directives_skip": skip}, ["--requeue", *gpus]
    if kind == "pbs":
        parts = [f"select=1:ncpus={n_cpus}"]
        parts += [f"mem={-(-memory // 2**20)}mb"] if memory else []
        parts += [f"ngpus={n_gpus}"] if ask_gpu else []
        return {"resource_spec": ":".join(parts)}, ["-r y"]
    if kind == "lsf":
        skip = [] if memory else ["#BSUB -M"]
        gpus = [f'-gpu "num={n_gpus}"'] if ask_gpu else []
        return {"ncpus": n_cpus, "job_directives_skip": skip}, ["-r", *gpus]
    if kind == "sge":
        if n_cpus > 1 and not any("-pe" in extra for extra in options.job_extra):
            raise SchemaError(
                f"--cpus-per-worker {n_cpus}: Grid Engine asks for cores through a parallel environment, "
                "whose name is your cluster's own. Say it with --job-extra, for example "
                f"--job-extra '-pe smp {n_cpus}'."
            )
        return {}, ["-r y"]
    no_memory = {} if memory else {"memory_per_core_property_name": "not_applicable"}
    return {"resource_spec": f"/nodes=1/core={n_cpus}", **no_memory}, []


def _condor(options: EngineOptions) -> dict[str, Any]:
    extra: dict[str, Any] = {"RequestCpus": options.cpus_per_worker}
    if options.gpus_per_worker:
        extra["request_gpus"] = options.gpus_per_worker
    if options.account is not None:
        extra["accounting_group"] = options.account
    for item in options.job_extra:
        name, is_setting, value = (part.strip() for part in item.partition("="))
        if not is_setting:
            raise SchemaError(f"--job-extra {item!r}: HTCondor takes NAME = VALUE.")
        extra[name] = value
    return extra


def _prologue(options: EngineOptions) -> list[str]:
    threads = str(options.cpus_per_worker)
    variables = dask_environment(options.worker_ttl_s)
    # Dask would set these to 1 in its workers; what stands in the environment counts.
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    variables |= dict.fromkeys(names, threads)
    return [
        f"export {JOB_STARTED}=`date +%s`",  # HTCondor would take $(date) for a macro of its own
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
    ]


def _lifetime(walltime_s: float | None) -> list[str]:
    """Return the arguments that end a worker ahead of its walltime, not all workers at once."""
    if walltime_s is None:
        return []
    lifetime_s = max(1.0, walltime_s - MARGIN_S)
    stagger_s = min(30.0, lifetime_s / 10)
    return ["--lifetime", f"{lifetime_s:.0f}s", "--lifetime-stagger", f"{stagger_s:.0f}s"]


def _walltime_text(kind: str, walltime_s: float) -> str:
    minutes, seconds = divmod(int(walltime_s), 60)
    hours, minutes = divmod(minutes, 60)
    if kind == "lsf":  # knows no seconds
        return f"{hours:02d}:{minutes:02d}"
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}"


def _walltime_s(kind: str, text: str) -> float:
    """Return a batch system's notation in seconds: [DAYS-]HH:MM:SS, in LSF HH:MM."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":") + (["00"] if kind == "lsf" else [])
    if len(parts) != 3 or not all(part.isdigit() for part in [*parts, *([days] if days else [])]):
        raise SchemaError(
            f"jobqueue.{kind}.walltime is {text!r} in your configuration of dask-jobqueue, which is not "
            "HH:MM:SS. Give --walltime."
        )
    hours, minutes, seconds = (int(part) for part in parts)
    return float(((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
