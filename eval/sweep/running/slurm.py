"""Train and score the runs of a sweep as a Slurm job array, a task per run.

::

    OUT/.array.json              the job, and which run each of its tasks has
    OUT/at-work/array-ID_N.log   what Slurm's script of a task said; a run's own log is beside it

Tasks do what `trial` does, and see each other through the sweep's folder, which must be on a
file system that all machines share. The process that submitted them only looks on: without it they go on,
and the same command looks on again.
"""

from __future__ import annotations

import logging
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cache.errors import ExtractionStopped, StoppedError
from cache.files import write_text_aside
from cache.schema import Model, decode_json
from eval.sweep.planning.plan import SweepPlan
from eval.sweep.running.at_work import Order, read_at_work, write_order
from eval.sweep.running.run import (
    Crew,
    Start,
    encode,
    note_death,
    open_trials,
    orders_of,
    parts_of,
    tokens_order,
)
from eval.sweep.running.tokens import worker_options
from eval.sweep.running.trial import AGAIN
from eval.sweep.state import BegunTrial, work_file
from extract.engines.options import MARGIN_S, EngineOptions
from train.running.interrupt import Interrupt

logger = logging.getLogger(__name__)

_ARRAY = "array"
_ANSWER_S = 30.0
"""Longest wait for Slurm's commands."""
_POLL_S = 5.0
_N_SILENT = 3
"""So many times in a row may Slurm not know a task that has not ended, before it counts as lost."""
_N_ASKED, _ASK_AGAIN_S = 6, 10.0
"""How often, and how far apart, Slurm is asked for an earlier array before we give up."""
_STOPPED = (130, 138, 143)
"""Exit codes of a task whose machine Slurm wants back: by us, by SIGUSR1, by SIGTERM."""


class Array(Model):
    """A job array that was submitted: OUT/.array.json."""

    schema_version: int = 1
    job: str
    run_keys: tuple[str, ...]
    """Of the tasks, in their order."""


def lead_array(
    start: Start, plan: SweepPlan, trials: Sequence[BegunTrial], on_tick: Callable[[], None]
) -> None:
    """Do all that some trials lack: encode, submit an array, and look on until it is done.

    Raises:
        StoppedError: Ctrl-C or a signal; what was submitted goes on.
        ExtractionStopped: Nothing can be encoded, or Slurm does not take the jobs or does not answer.
    """
    with Interrupt() as interrupt:
        encode(start, plan, trials, Crew(start, interrupt, on_tick))
        array = _running(start.out, interrupt)
        if array is not None:
            logger.info("looking on at Slurm job %s, which was submitted before", array.job)
            _look_on(start, array, trials, interrupt, on_tick)
        if not interrupt.requested and (left := open_trials(start, trials)):
            array = submit(start, orders_of(start, plan, left))
            logger.info("submitted Slurm job %s, %d tasks", array.job, len(array.run_keys))
            _look_on(start, array, trials, interrupt, on_tick)
    left = open_trials(start, trials)
    if left:
        goes_on = f" Slurm job {array.job} goes on: scancel {array.job} ends it." if array else ""
        raise StoppedError(
            f"stopped with {len(left)} of {len(trials)} trials left.{goes_on} Run the same command to "
            "look on, or to continue."
        )


def submit(start: Start, orders: Sequence[Order]) -> Array:
    """Submit a task for each order, and write down which it is.

    Raises:
        ExtractionStopped: Slurm refuses.
    """
    script = array_script(start, orders)
    for order in orders:
        write_order(order)
    if shutil.which("sbatch") is None:
        raise ExtractionStopped(
            "--engine slurm submits jobs with `sbatch`, which is not on this machine. Run this on a "
            "machine from which you can submit jobs."
        )
    work_file(start.out, _ARRAY, "json").parent.mkdir(parents=True, exist_ok=True)
    answer = subprocess.run(
        ["sbatch", "--parsable"],
        input=script, capture_output=True, text=True, timeout=_ANSWER_S, check=False,
    )  # fmt: skip
    if answer.returncode:
        said = " ".join(answer.stderr.split()) or f"code {answer.returncode}"
        raise ExtractionStopped(f"Slurm refuses the job array: {said}")
    job = answer.stdout.strip().partition(";")[0]
    array = Array(job=job, run_keys=tuple(order.run_key for order in orders))
    write_text_aside(_array_file(start.out), array.model_dump_json(indent=1) + "\n")
    return array


def worker_script(start: Start, plan: SweepPlan) -> str:
    """Return the script of the jobs that would encode; nothing is submitted.

    Raises:
        SchemaError: The options do not fit Slurm.
        MissingDependencyError: Dask is not installed.
    """
    from extract.engines.start import job_script

    part, *_ = parts_of(start, plan)
    engine, config = worker_options(tokens_order(start, [part]), part, "JOB", 0)
    return job_script(engine, config.model_copy(update={"session": "SESSION"}))


def array_script(start: Start, orders: Sequence[Order]) -> str:
    """Return the script of the array.

    Raises:
        SchemaError: The options do not fit Slurm.
        MissingDependencyError: dask-jobqueue, which writes the script's head, is not installed.
    """
    options, out = start.engine, start.out.resolve()
    files = " ".join(
        shlex.quote(str(work_file(out, order.run_key, "order.json"))) for order in orders
    )
    at_once = f"%{start.jobs}" if start.jobs else ""
    log = work_file(out, f"{_ARRAY}-%A_%a", "log")
    # Slurm takes quotes as a shell does, and fills in what stands behind a percent sign.
    output = f"{str(log.parent).replace('%', '%%')}/{log.name}"
    lines = [
        "#!/usr/bin/env bash",
        _head(options),
        f"#SBATCH --array=0-{len(orders) - 1}{at_once}",
        f'#SBATCH --output="{output}"',
        "#SBATCH --open-mode=append",
        # Reaches the step ahead of its end: a training saves its state behind the step that it is at.
        *([f"#SBATCH --signal=USR1@{MARGIN_S:.0f}"] if options.walltime_s else []),
        "",
        f"export OMP_NUM_THREADS={options.cpus_per_worker}",
        f"export MKL_NUM_THREADS={options.cpus_per_worker}",
        *options.prologue,
        f"orders=({files})",
        f"code={AGAIN}",
        f"while [ $code = {AGAIN} ]; do",
        f"    srun {shlex.quote(sys.executable)} -m eval.sweep.running.trial "
        '"${orders[$SLURM_ARRAY_TASK_ID]}"',
        "    code=$?",
        "done",
        f"case $code in {'|'.join(map(str, _STOPPED))})",
        '    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" ;;',
        "esac",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def _head(options: EngineOptions) -> str:
    """Return the directives that are those of extraction's jobs too."""
    import dask.config

    from extract.engines.job_scripts import dask_settings, job_class, job_options

    bare = options.model_copy(update={"log_dir": None})
    with dask.config.set(dask_settings(options.worker_ttl_s)):
        given = job_options(bare) | {"log_directory": None, "job_name": "emocache-sweep"}
        job = job_class("slurm")("tls://SCHEDULER:PORT", name="emocache-sweep", **given)
        return str(job.job_header)


# ---------------------------------------------------------------------------- looking on


def _array_file(out: Path) -> Path:
    return out / f".{_ARRAY}.json"


def _running(out: Path, interrupt: Interrupt) -> Array | None:
    """Return the array that was submitted last, if Slurm still has a task of it.

    Raises:
        ExtractionStopped: Slurm does not say: another array would do the same work at the same time.
    """
    path = _array_file(out)
    if not path.exists():
        return None
    array = decode_json(Array, path.read_bytes(), str(path))
    for n in range(_N_ASKED):
        queue = _queue(array.job)
        if queue is not None:
            return array if queue else None
        logger.warning("squeue does not answer (%d of %d)", n + 1, _N_ASKED)
        until_s = time.monotonic() + _ASK_AGAIN_S
        while time.monotonic() < until_s and not interrupt.requested:
            time.sleep(0.2)
        if interrupt.requested:
            return None  # and nothing will be submitted
    raise ExtractionStopped(
        f"squeue does not say whether tasks of Slurm job {array.job}, which was submitted before, are left, "
        "so nothing was submitted: two arrays would do the same work. Run the same command when Slurm "
        f"answers, or delete {path} if the job is gone."
    )


def _look_on(
    start: Start,
    array: Array,
    trials: Sequence[BegunTrial],
    interrupt: Interrupt,
    on_tick: Callable[[], None],
) -> None:
    """Wait until no task of an array is left, and see to what those that died have left."""
    n_silent = 0
    polled_s = 0.0
    while not interrupt.requested:
        on_tick()
        if time.monotonic() - polled_s < _POLL_S:
            time.sleep(0.2)
            continue
        polled_s = time.monotonic()
        left = [t for t in open_trials(start, trials) if t.run_key in array.run_keys]
        if not left:
            return
        queue = _queue(array.job)
        if queue is None:
            continue
        # A file system may show a result later than Slurm the end of its task.
        n_silent = 0 if queue else n_silent + 1
        if n_silent >= _N_SILENT:
            _note_deaths(start, array, left)
            return


def _note_deaths(start: Start, array: Array, left: Sequence[BegunTrial]) -> None:
    said = read_at_work(start.out)
    for number, key in enumerate(array.run_keys):
        own = [trial for trial in left if trial.run_key == key]
        if not own:
            continue
        path = work_file(start.out, key, "order.json")
        order = decode_json(Order, path.read_bytes(), str(path))
        log = work_file(start.out, f"{_ARRAY}-{array.job}_{number}", "log")
        words = _last_line(log)
        why = f"task {number} of Slurm job {array.job} ended without a result{words}"
        note_death(start.out, order, own, said.get(key), why)


def _last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return f": {lines[-1]}" if lines else f"; its output would be in {log}"


def _queue(job: str) -> dict[str, str] | None:
    """Return task -> state of those that Slurm has not ended; None if it does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={job}"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return {} if "nvalid job id" in answer.stderr else None
    lines = [line.split() for line in answer.stdout.splitlines()]
    return {words[0]: words[1] for words in lines if len(words) == 2}
