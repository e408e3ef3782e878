"""`emocache extract ...`: encode what a store lacks, and look at the jobs that do it."""

from __future__ import annotations

import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from cache.errors import SchemaError, near_miss
from eval.verbs.console import DONE, FINDINGS, out, verb
from eval.verbs.extract_options import RunOptions, WorkerOptions, WorkOptions, takes
from eval.verbs.extract_run import (
    check_done,
    is_remote,
    nothing_to_do,
    print_plan,
    run_job,
    sum_up,
    write_report,
)
from eval.verbs.extract_work import (
    check_here,
    check_inputs,
    config_of,
    drain_after_s_of,
    engine_options,
    n_decoders_of,
    open_job_of,
    prepare,
)
from eval.verbs.worker_lines import WorkerLines

if TYPE_CHECKING:
    from extract.jobs.job import Job
    from extract.summary import Progress

VERBS = ("status", "failures", "report")
"""Looking on, looking into, looking back; everything else is an extraction."""

_RUN = "run"
"""Name of the hidden verb that extracts; nobody types it."""


class _Extract(TyperGroup):
    """A group whose first word may also be a preset: then it extracts."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the verbs in the order of their purpose."""
        return [*VERBS, _RUN]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the hidden verb in front of whatever is no verb; refuse a misspelt one."""
        if not args or args[0] not in VERBS:
            if args:
                _refuse_misspelt(ctx, args[0])
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


class _Run(TyperCommand):
    """The hidden verb, which calls itself `emocache extract` in its help and errors."""

    def make_context(
        self, info_name: Any, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Stand in the place of the group."""
        name, above = (parent.info_name, parent.parent) if parent is not None else (info_name, None)
        return super().make_context(name, args, parent=above, **extra)


def _refuse_misspelt(ctx: Any, word: str) -> None:
    """Refuse a word that is nearer to a verb than to a preset."""
    if word.startswith("-") or "=" in word:
        return
    from train.presets import PRESETS

    if word in PRESETS:
        return
    nearest = near_miss(word, [*VERBS, *PRESETS])
    if any(f"'{name}'" in nearest for name in VERBS):
        ctx.fail(f"No such command or preset '{word}'.{nearest}")


extract_app = typer.Typer(
    cls=_Extract, help="Decode and encode every clip that the store does not hold yet."
)

StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL (s3://...).")]
JobOption = Annotated[
    str | None,
    typer.Option("--job", metavar="ID", help="First digits of a job; default: the newest."),
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        min=0.0, metavar="X", help="Price of one worker's hour, to state what 1000 clips cost."
    ),
]


@extract_app.command(
    _RUN,
    cls=_Run,
    hidden=True,
    epilog="Beside presets, the first word may be a verb: `emocache extract status STORE` tells how far "
    "a job is, `emocache extract failures STORE` which clips failed and why, `emocache extract report "
    "STORE` writes its report. Each has its own `--help`.",
)
@verb
@takes(WorkOptions, RunOptions)
def extract_command(work: WorkOptions, run: RunOptions) -> int:
    """Decode and encode every clip that the store does not hold yet; run again to continue."""
    engine = engine_options(run, work.device)
    prepared = prepare(work)
    if run.plan or run.dry_run:
        print_plan(prepared, work, run, engine)
        return DONE
    if not prepared.plan.units:
        return nothing_to_do(prepared.plan, work.store)
    return run_job(prepared, work, run, engine)


@verb
@takes(WorkOptions, WorkerOptions)
def extract_worker_command(work: WorkOptions, own: WorkerOptions) -> int:
    """Be one worker of an extraction: for job arrays, in any number, started and ended at any time."""
    from extract.workers.worker import work as work_on

    drain_after_s = drain_after_s_of(own.walltime)
    prepared = prepare(work)
    if not prepared.plan.units:
        return nothing_to_do(prepared.plan, work.store)
    check_here(work.device)
    check_inputs(prepared)
    store, job = open_job_of(prepared, work)
    config = config_of(
        prepared, work, store, job,
        engine="worker",
        n_decoders=work.decoders or n_decoders_of(work.device, 1),
        log_dir=None if own.log_dir is None else str(own.log_dir.resolve()),
        drain_after_s=drain_after_s,
    )  # fmt: skip
    rank = int(os.environ.get("SLURM_LOCALID", "0"))
    with WorkerLines(job, "extracting", "clips") as lines:
        work_on(config.model_dump_json(), rank, records=prepared.records, on_clip=lines.advance)
    mine = sum_up(job, store, config.session, work.store)
    check_done(job)
    return FINDINGS if mine.failures else DONE


# ---------------------------------------------------------------------------- looking at jobs


def _jobs(store: str) -> list[Job]:
    from cache.store import TokenStore
    from extract.jobs.job import Job

    return Job.latest(TokenStore.open(store).storage)


def _chosen(store: str, job_id: str | None, *, prefer_unfinished: bool) -> Job | None:
    """Return the job that a user means; None if the store has none.

    Raises:
        SchemaError: No job has this id.
    """
    jobs = _jobs(store)
    if job_id is not None:
        fitting = [job for job in jobs if job.job_id.startswith(job_id)]
        if not fitting:
            known = ", ".join(dict.fromkeys(job.job_id for job in jobs)) or "none"
            raise SchemaError(f"--job {job_id}: no such job in {store}. Known: {known}")
        return fitting[0]
    if prefer_unfinished:
        return next((job for job in jobs if job.undone()), jobs[0] if jobs else None)
    return jobs[0] if jobs else None


@extract_app.command("status")
@verb
def extract_status(
    store: StoreArgument,
    job_id: JobOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on looking until the job is done.")
    ] = False,
) -> int:
    """Say how far a job is and how its workers are; from any machine that reaches the store."""
    from eval.progress import Surroundings, job_panel
    from eval.tables import worker_table
    from extract.summary import Watch

    if watch and as_json:
        raise SchemaError("--watch goes on and --json ends; give one of them.")
    job = _chosen(store, job_id, prefer_unfinished=True)
    if job is None:
        out.print(f"{store}: no extraction was begun here", highlight=False, soft_wrap=True)
        return DONE
    watching = Watch(job)
    if watch:
        return _look_on(watching)
    found = watching.look(time.monotonic())
    if as_json:
        out.file.write(found.model_dump_json(indent=2) + "\n")
        return DONE
    verdict = "done" if found.n_units_done == found.n_units else "not done"
    out.print(f"job {found.job_id}, begun {found.created}: {verdict}", highlight=False)
    out.print(job_panel(found, Surroundings(tail=_tail_of(found))))
    if found.workers:
        out.print(worker_table(found.workers, time.time()))
    return DONE


def _tail_of(found: Progress) -> str | None:
    """Return the command that follows the logs of the workers that are at work."""
    folders = dict.fromkeys(str(Path(w.log).parent) for w in found.alive if w.log is not None)
    if not folders:
        return None
    return " ".join(["tail -F", *(f"{shlex.quote(folder)}/*.log" for folder in folders)])


def _look_on(watching: Any) -> int:
    from eval.progress import Surroundings, job_view

    job = watching.job
    try:
        with job_view(
            out, watching, Surroundings(), is_remote=is_remote(job.storage), in_background=False
        ) as view:
            view.run(lambda found: found.n_units_done == found.n_units)
    except KeyboardInterrupt:  # ends the looking, not the job
        return DONE
    return DONE


@extract_app.command("failures")
@verb
def extract_failures(
    store: StoreArgument,
    kind: Annotated[
        str | None, typer.Option("--class", metavar="CLASS", help="Only this class of failures.")
    ] = None,
    manifest: Annotated[
        Path | None, typer.Option("--manifest", help="To name clips by their uid.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print what decoders said last, too.")
    ] = False,
) -> int:
    """List the clips of a store that failed, by class, with all that is known of each."""
    from cache.manifest import read_manifest
    from cache.store import TokenStore
    from eval.tables import failure_lines, failure_table
    from eval.verbs.arguments import choice
    from extract.failures import KINDS
    from extract.summary import FailureList, find_failures

    if kind is not None:
        choice(kind, KINDS, "--class")
    records = None if manifest is None else read_manifest(manifest).records
    opened = TokenStore.open(store)
    found = [f for f in find_failures(opened, records) if kind in (None, f.kind)]
    if as_json:
        out.file.write(FailureList(failures=tuple(found)).model_dump_json(indent=2) + "\n")
        return FINDINGS if found else DONE
    if not found:
        out.print(
            f"no clip of {store} failed{f' with class {kind}' if kind else ''}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return DONE
    out.print(failure_table(found))
    for line in failure_lines(found, limit=None if kind or verbose else 20, verbose=verbose):
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    kinds = " ".join(f"--retry {name}" for name in dict.fromkeys(f.kind for f in found))
    out.print(
        f"to try them again: emocache extract PRESET --manifest M --store {store} {kinds}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    return FINDINGS


@extract_app.command("report")
@verb
def extract_report(
    store: StoreArgument,
    out_dir: Annotated[
        Path, typer.Option("--out", help="Folder of report.html and report.json.")
    ] = Path("extraction-report"),
    job_id: JobOption = None,
    price_per_hour: PriceOption = None,
) -> int:
    """Write the report of a job: throughput, stages, failures, workers, cost."""
    from extract.summary import summarise

    job = _chosen(store, job_id, prefer_unfinished=False)
    if job is None:
        raise SchemaError(f"{store}: no extraction was begun here, so there is nothing to report.")
    write_report(summarise(job, price_per_hour=price_per_hour), store, out_dir)
    return DONE
