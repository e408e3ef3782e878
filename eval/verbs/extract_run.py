"""The work of `emocache extract`: what it would do, doing it, and what was done."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import (
    EmocacheError,
    ManifestError,
    MissingDependencyError,
    SchemaError,
    StoppedError,
)
from eval.verbs.console import DONE, FINDINGS, err, out
from eval.verbs.extract_options import RunOptions, WorkOptions
from eval.verbs.extract_work import (
    ON_THIS_MACHINE,
    Prepared,
    check_here,
    check_inputs,
    config_of,
    config_without_job,
    n_decoders_for,
    open_job_of,
)

if TYPE_CHECKING:
    from cache.storage import Storage
    from cache.store import TokenStore
    from eval.progress import JobView
    from extract.calibrate import Calibration
    from extract.engines.options import EngineOptions, EngineState
    from extract.jobs.job import Job
    from extract.plan import Plan
    from extract.sources import MediaSource
    from extract.summary import JobSummary

_CALIBRATION_CLIPS = 24


# ---------------------------------------------------------------------------- plans


def print_plan(
    prepared: Prepared, work: WorkOptions, run: RunOptions, engine: EngineOptions
) -> None:
    """Say what would be encoded, in which time, and which jobs would be submitted."""
    from eval.tables import plan_table, unit_note

    plan = prepared.plan
    out.print(plan_table(plan))
    for label, served in plan.served.items():
        for spec_id, n in served.items():
            out.print(f"{label}: {n:,} clips come from the richer spec {spec_id}", highlight=False)
    calibration = None
    if plan.units:
        source = check_inputs(prepared)
        n_clips = _CALIBRATION_CLIPS if run.calibrate is None else run.calibrate
        if n_clips:
            calibration = _calibrate(prepared, work, engine, source, n_clips)
    for line in unit_note(plan, calibration, engine.walltime_s):
        out.print(line, highlight=False, soft_wrap=True)
    if run.dry_run:
        _print_script(prepared, work, engine)
    out.print("nothing was queued or written", highlight=False)


def _calibrate(
    prepared: Prepared,
    work: WorkOptions,
    engine: EngineOptions,
    source: MediaSource,
    n_clips: int,
) -> Calibration | None:
    """Encode some clips without storing them, and print how long all of them take."""
    from eval.tables import calibration_lines
    from extract.calibrate import calibrate
    from extract.encoders.bank import EncoderBank

    try:
        check_here(work.device)
    except SchemaError:
        if engine.kind in ON_THIS_MACHINE:
            raise
        err.print(
            f"no estimate of the time: --device {work.device} is not on this machine. Run the same with "
            "--plan on a machine like the workers'.",
            soft_wrap=True,
        )
        return None
    config = config_without_job(prepared, work, engine)
    asked = prepared.wanted
    bank = EncoderBank(
        asked.specs, asked.weights, config.device, config.precision,
        names=asked.names, compile_blocks=config.compile,
    )  # fmt: skip
    try:
        with err.status(f"encoding {n_clips} clips to estimate the time"):
            found = calibrate(prepared.plan, bank, source, config, n_clips)
    except ManifestError as error:  # clips that failed before may fail again; the plan stands
        err.print(f"no estimate of the time: {error}", markup=False, soft_wrap=True)
        return None
    for line in calibration_lines(found, prepared.plan, engine.workers, config.n_decoders):
        out.print(line, highlight=False, soft_wrap=True)
    return found


def _print_script(prepared: Prepared, work: WorkOptions, engine: EngineOptions) -> None:
    from extract.engines.start import job_script

    if engine.kind in (*ON_THIS_MACHINE, "dask"):
        out.print(f"engine {engine.kind} submits no job script", highlight=False)
        return
    script = job_script(engine, config_without_job(prepared, work, engine))
    out.print(f"up to {engine.workers} jobs would be submitted with this script:", highlight=False)
    out.file.write(script.rstrip("\n") + "\n")


# ---------------------------------------------------------------------------- the work


def run_job(prepared: Prepared, work: WorkOptions, run: RunOptions, engine: EngineOptions) -> int:
    """Queue the work, show how it goes, and say what was done."""
    from eval.progress import Surroundings, job_view
    from extract.engines.start import run_engine
    from extract.summary import Watch, summarise

    if engine.kind in ON_THIS_MACHINE:
        check_here(work.device)
    source = check_inputs(prepared)
    if run.calibrate:
        _calibrate(prepared, work, engine, source, run.calibrate)
    store, job = open_job_of(prepared, work)
    log_dir = _log_dir(run, engine, store, job)
    engine = engine.model_copy(update={"log_dir": log_dir})
    config = config_of(
        prepared, work, store, job,
        engine=engine.kind,
        n_decoders=work.decoders or n_decoders_for(work, engine),
        log_dir=None if log_dir is None else str(log_dir),
    )  # fmt: skip
    n_hits = prepared.plan.n_clips - prepared.plan.n_missing
    if job.joined:
        err.print(f"continuing job {job.job_id}, begun {job.plan.created}", highlight=False)
    tail = None
    if log_dir is not None:
        tail = f"tail -F {shlex.quote(str(log_dir))}/*.log"
        err.print(f"the workers' logs: {tail}", highlight=False, markup=False, soft_wrap=True)
    watch = Watch(job, lease_timeout_s=config.lease_timeout_s)
    around = Surroundings(n_hits=n_hits, n_wanted=engine.workers, tail=tail)
    try:
        with job_view(err, watch, around, is_remote=is_remote(store.storage)) as view:
            run_engine(engine, config, job, lambda state: _show_engine(view, state))
    except (EmocacheError, KeyboardInterrupt):
        done = summarise(job, session=config.session)
        if done.counts:
            _print_done(done, work.store)
        raise
    sum_up(job, store, config.session, work.store)
    whole = summarise(job, price_per_hour=run.price_per_hour)
    folder = run.report or _job_folder(store, job)
    if folder is not None:
        write_report(whole, store.root, folder)
    check_done(job)
    return FINDINGS if whole.failures or _n_failed(prepared.plan) else DONE


def _n_failed(plan: Plan) -> int:
    from cache.commit import Status

    return sum(counts[Status.FAILED] for counts in plan.known.values())


def _show_engine(view: JobView, state: EngineState) -> None:
    # Where the logs are stands in the view already.
    notes = tuple(note for note in state.notes if not note.startswith("logs:"))
    view.show(n_wanted=state.n_wanted, dashboard=state.dashboard_link, notes=notes)


def is_remote(storage: Storage) -> bool:
    """True if looking into a store's place costs requests over a network."""
    from cache.storage import LocalStorage

    return not isinstance(storage, LocalStorage)


def _job_folder(store: TokenStore, job: Job) -> Path | None:
    """Return the folder of a job in a local store."""
    from cache.storage import LocalStorage

    storage = store.storage
    return storage.path(job.root).resolve() if isinstance(storage, LocalStorage) else None


def _log_dir(run: RunOptions, engine: EngineOptions, store: TokenStore, job: Job) -> Path | None:
    """Return where workers write their logs; None for one that writes to this terminal."""
    if run.log_dir is not None:
        return run.log_dir.resolve()
    if engine.kind == "inline":
        return None
    folder = _job_folder(store, job)
    return folder / "logs" if folder is not None else Path("emocache-logs", job.job_id).resolve()


# ---------------------------------------------------------------------------- after the work


def nothing_to_do(plan: Plan, store: str) -> int:
    """Say that every clip is in the store; return the exit code."""
    from eval.tables import status_table

    out.print(
        f"nothing to do: all {plan.n_clips} clips are in {store}", highlight=False, soft_wrap=True
    )
    out.print(status_table(plan.known))
    return FINDINGS if _n_failed(plan) else DONE


def sum_up(job: Job, store: TokenStore, session: str, where: str) -> JobSummary:
    """Say what a session did, and return it."""
    from extract.summary import summarise

    mine = summarise(job, session=session)
    _print_done(mine, where)
    if not job.undone():
        for spec in job.plan.specs:
            store.write_snapshot(spec)  # so that the next reader opens the store quickly
    return mine


def check_done(job: Job, kept: str = "What was committed") -> None:
    """Say that there is work left, if there is.

    Args:
        job: Of an extraction or an annotation.
        kept: What it keeps of the work that is done.

    Raises:
        StoppedError: Units are left.
    """
    left = job.undone()
    if left:
        raise StoppedError(
            f"stopped with {len(left):,} of {len(job.plan.units):,} units left. {kept} stays; run the same "
            "command to continue."
        )


def _print_done(done: JobSummary, where: str) -> None:
    from eval.formats import human_size
    from eval.tables import status_table

    if done.counts:
        out.print(status_table({label: Counter(n) for label, n in done.counts.items()}))
    text = f"{done.n_units_done:,} of {done.n_units:,} units done, {human_size(done.n_bytes)} written to"
    out.print(f"{text} {where}", highlight=False, soft_wrap=True)
    if done.truncated:
        out.print(
            f"{len(done.truncated)} clips are longer than the audio encoder's window, only their "
            f"beginning was encoded: {', '.join(done.truncated[:5])}",
            highlight=False,
            soft_wrap=True,
        )
    for uid, stream, remark in done.remarks[:5]:
        err.print(f"damage passed over, {stream} of {uid}: {remark}", markup=False, soft_wrap=True)
    if len(done.remarks) > 5:
        err.print(f"damage passed over in {len(done.remarks) - 5} more streams", markup=False)
    streams: dict[str, list[str]] = {}
    clips: dict[str, set[str]] = {}
    for failure in done.failures:
        streams.setdefault(failure.reason, []).append(failure.stream)
        clips.setdefault(failure.reason, set()).add(failure.uid)
    by_reason = Counter({reason: len(uids) for reason, uids in clips.items()})
    for reason, n in by_reason.most_common(10):
        under = ", ".join(dict.fromkeys(streams[reason]))
        err.print(
            f"failed, {under}, {n} clip{'s' * (n > 1)}: {reason}", markup=False, soft_wrap=True
        )
    if len(by_reason) > 10:
        err.print(
            f"failed for {len(by_reason) - 10} more reasons: emocache extract failures {where}",
            markup=False,
            soft_wrap=True,
        )


def write_report(summary: JobSummary, where: str, folder: Path) -> None:
    """Write the report of an extraction, and say where it is; without its page where jinja2 lacks."""
    from eval.extraction_report import REPORT_JSON, write_extraction_report

    try:
        shown, _ = write_extraction_report(summary, where, folder)
    except MissingDependencyError as error:
        err.print(str(error), markup=False, soft_wrap=True)
        shown = folder / REPORT_JSON
    out.print(str(shown), highlight=False, soft_wrap=True)
