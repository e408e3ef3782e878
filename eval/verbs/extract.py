"""`emocache extract ...`: encode what a store lacks, and look at the jobs that do it."""

from __future__ import annotations

import logging
import os
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from cache.errors import (
    EmocacheError,
    ManifestError,
    MissingDependencyError,
    SchemaError,
    StoppedError,
    near_miss,
)
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.extract_options import EngineFlags, RunOptions, WorkerOptions, WorkOptions, takes
from eval.verbs.worker_lines import WorkerLines

if TYPE_CHECKING:
    from cache.clip import Record
    from cache.storage import Storage
    from cache.store import TokenStore
    from eval.progress import JobView
    from eval.verbs.arguments import Wanted
    from extract.calibrate import Calibration
    from extract.config import WorkerConfig
    from extract.encoders.bank import EncoderBank
    from extract.engines.options import EngineOptions, EngineState
    from extract.faces import FaceSource
    from extract.jobs.job import Job
    from extract.plan import Plan
    from extract.sources import MediaSource
    from extract.summary import JobSummary, Progress

logger = logging.getLogger(__name__)

VERBS = ("status", "failures", "report")
"""Looking on, looking into, looking back; everything else is an extraction."""

_RUN = "run"
"""Name of the hidden verb that extracts; nobody types it."""
_ON_THIS_MACHINE = ("inline", "local")
_CALIBRATION_CLIPS = 24


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
    prepared = _prepare(work)
    if run.plan or run.dry_run:
        _print_plan(prepared, work, run, engine)
        return DONE
    if not prepared.plan.units:
        return _nothing_to_do(prepared.plan, work.store)
    return _run(prepared, work, run, engine)


@verb
@takes(WorkOptions, WorkerOptions)
def extract_worker_command(work: WorkOptions, own: WorkerOptions) -> int:
    """Be one worker of an extraction: for job arrays, in any number, started and ended at any time."""
    from extract.workers.worker import work as work_on

    drain_after_s = drain_after_s_of(own.walltime)
    prepared = _prepare(work)
    if not prepared.plan.units:
        return _nothing_to_do(prepared.plan, work.store)
    _check_here(work.device)
    _check_inputs(prepared)
    store, job = _open_job(prepared, work)
    config = _config(
        prepared, work, store, job,
        engine="worker",
        n_decoders=work.decoders or _decoders(work.device, 1),
        log_dir=None if own.log_dir is None else str(own.log_dir.resolve()),
        drain_after_s=drain_after_s,
    )  # fmt: skip
    rank = int(os.environ.get("SLURM_LOCALID", "0"))
    with WorkerLines(job, "extracting", "clips") as lines:
        work_on(config.model_dump_json(), rank, records=prepared.records, on_clip=lines.advance)
    mine = _sum_up(job, store, config.session, work.store)
    _check_done(job)
    return FINDINGS if mine.failures else DONE


# ---------------------------------------------------------------------------- before the work


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is written."""

    wanted: Wanted
    manifest: Path
    records: tuple[Record, ...]
    bank: EncoderBank
    media_root: str
    plan: Plan
    faces: FaceSource | None
    """Where the faces are of which tokens are missing."""


def _prepare(work: WorkOptions) -> _Prepared:
    """Check what was asked for, and compare the manifest with the store; write nothing."""
    from cache.manifest import media_root as root_of
    from cache.manifest import read_manifest
    from cache.place import is_url
    from eval.verbs.arguments import check_device, choice, compression_of, retry_kinds, wanted
    from extract.config import PRECISIONS
    from extract.encoders.bank import EncoderBank
    from extract.faces import face_source
    from extract.plan import make_plan

    _worker_fields(work)  # so that a value that does not fit is refused before anything is read
    asked = wanted(
        work.words or [],
        work.encoders or [],
        work.encoder_weights or [],
        work.with_file,
        work.specs_file,
    )
    retry = retry_kinds(work.retry or [], every=work.retry_failed)
    check_device(work.device, is_here=False)
    choice(work.precision, PRECISIONS, "--precision")
    compression_of(work.compression)
    manifest = read_manifest(work.manifest)
    # Only to learn which weights they are; workers load their own, on their own device.
    bank = EncoderBank(asked.specs, asked.weights, names=asked.names)
    plan = make_plan(
        manifest.records, bank.specs, store_if_any(work.store),
        retry=retry, unit_clips=work.unit_clips,
    )  # fmt: skip
    if work.media_root is None:
        root = str(root_of(manifest, work.manifest))
    else:
        root = work.media_root if is_url(work.media_root) else str(Path(work.media_root).resolve())
    missing = [spec for unit in plan.units for spec in unit.specs]
    faces = face_source(missing, work.faces)
    if missing and faces is None and work.faces is not None:
        logger.warning("--faces %s is not used: no tokens of faces are to be encoded.", work.faces)
    return _Prepared(asked, work.manifest.resolve(), manifest.records, bank, root, plan, faces)


def store_if_any(where: str) -> TokenStore | None:
    """Open a store; None if there is nothing in its place yet.

    Raises:
        StoreError: Something else is there, or a store of a newer version.
    """
    from cache import layout
    from cache.place import open_storage
    from cache.storage import LocalStorage
    from cache.store import TokenStore

    storage = open_storage(where)
    if not isinstance(storage, LocalStorage) or storage.root.is_dir():
        names = {*storage.names(""), *storage.folders("")}
        if layout.MARKER not in names and names <= layout.OWN_NAMES:
            return None  # empty, or another process is creating it
    elif not storage.root.exists():
        return None
    return TokenStore.open(where)


def _check_here(device: str) -> None:
    from eval.verbs.arguments import check_device

    check_device(device)


def _check_inputs(prepared: _Prepared) -> MediaSource:
    """Refuse to fail every clip of a corpus whose media, or tables of faces, are elsewhere.

    Raises:
        ManifestError: More than half of a sample of the media, or of the tables, is not there.
        SchemaError: Two clips would take the same table.
    """
    from extract.sources import check_media, open_source

    source = open_source(prepared.media_root)
    todo = {row for unit in prepared.plan.units for row in unit.rows}
    found = check_media(source, [prepared.records[row] for row in sorted(todo)])
    if found.n_missing:
        text = (
            f"{found.n_missing:,} of {found.n_checked:,} media files checked are not below "
            f"{source.root}, first: {found.first}."
        )
        if 2 * found.n_missing > found.n_checked:
            raise ManifestError(
                f"{text} Give the folder that the manifest's media paths start from with --media-root."
            )
        logger.warning("%s They will be recorded as failed (missing).", text)
    _check_faces(prepared)
    return source


def _check_faces(prepared: _Prepared) -> None:
    from extract.faces import check_tables

    if prepared.faces is None:
        return
    todo = {
        row
        for unit in prepared.plan.units
        if any(spec.crop is not None for spec in unit.specs)
        for row in unit.rows
    }
    found = check_tables(prepared.faces, [prepared.records[row] for row in sorted(todo)])
    if found.n_missing:
        text = (
            f"{found.n_missing:,} of {found.n_records:,} clips have no table of their face in "
            f"{prepared.faces.given}, first: {found.first}."
        )
        if 2 * found.n_missing > found.n_records:
            raise ManifestError(
                f"{text} Give the folder of OpenFace's tables, one CSV file per clip, with --faces; "
                "docs/extraction.md says how they are named."
            )
        logger.warning("%s Their face tokens will be recorded as failed (faces).", text)


def engine_options(run: EngineFlags, device: str) -> EngineOptions:
    """Return where workers shall run.

    Raises:
        SchemaError: An unknown engine, or a value that does not fit.
    """
    from cache.schema import decode
    from eval.verbs.arguments import choice, duration_s, size_bytes
    from extract.engines.options import EngineKind, EngineOptions

    kinds = get_args(EngineKind)
    if run.workers < 1:
        raise SchemaError(f"--workers {run.workers}: an extraction needs at least one worker.")
    gpus = run.gpus_per_worker
    if gpus is None:
        gpus = 0 if device == "cpu" else 1
    given = {
        "kind": choice(run.engine, kinds, "--engine"),
        "workers": run.workers,
        "min_workers": run.min_workers,
        "scheduler": run.scheduler,
        "walltime_s": _duration(run.walltime, "--walltime"),
        "gpus_per_worker": gpus,
        "cpus_per_worker": run.cpus_per_worker,
        "memory_bytes": None if run.memory is None else size_bytes(run.memory, "--memory"),
        "queue": run.queue,
        "account": run.account,
        "job_extra": tuple(run.job_extra or ()),
        "prologue": tuple(run.prologue or ()),
        "start_timeout_s": duration_s(run.start_timeout, "--start-timeout"),
        "log_dir": run.log_dir,
    }
    return decode(EngineOptions, given, "the engine")


def _duration(text: str | None, option: str) -> float | None:
    from eval.verbs.arguments import duration_s

    return None if text is None else duration_s(text, option)


def _decoders(device: str, n_here: int, n_cores: int | None = None) -> int:
    """Return how many decoder processes a worker has by default.

    A GPU takes clips faster than one core decodes them; an encoder on a CPU needs the cores itself.

    Args:
        device: Where it encodes.
        n_here: Workers on one machine that share its cores.
        n_cores: Cores of one worker; None: its share of this machine's.
    """
    from extract.config import n_cores as cores_here

    if device == "cpu":
        return 1
    return max(1, (n_cores or cores_here() // n_here) - 1)


def drain_after_s_of(walltime: str | None) -> float | None:
    """Return when a worker begins to finish up, so that it ends within its walltime.

    Raises:
        SchemaError: There would be no time to work.
    """
    from extract.engines.options import MARGIN_S

    walltime_s = _duration(walltime, "--walltime")
    if walltime_s is None:
        return None
    if walltime_s <= MARGIN_S:
        raise SchemaError(
            f"--walltime {walltime}: is too short. A worker ends {MARGIN_S:.0f} s ahead of it, and needs "
            "time for a unit before that."
        )
    return walltime_s - MARGIN_S


def _config(
    prepared: _Prepared, work: WorkOptions, store: TokenStore, job: Job, **options: Any
) -> WorkerConfig:
    """Return what the workers are told."""
    from extract.run import new_session, worker_config

    return worker_config(
        job, prepared.bank, store,
        manifest=prepared.manifest, media_root=prepared.media_root, session=new_session(),
        faces=None if prepared.faces is None else prepared.faces.given,
        **_worker_fields(work), **options,
    )  # fmt: skip


def _worker_fields(work: WorkOptions) -> dict[str, Any]:
    """Return the fields of a worker's configuration that the user decides."""
    from eval.verbs.arguments import duration_s, size_bytes
    from extract.jobs.session import HEARTBEAT_S

    lease_timeout_s = duration_s(work.lease_timeout, "--lease-timeout")
    if not 0 < work.max_failure_share <= 1:
        raise SchemaError(
            f"--max-failure-share {work.max_failure_share:g}: must be above 0 and at most 1 (never stop)."
        )
    return {
        "device": work.device,
        "precision": work.precision,
        "compile": work.compile_encoders,
        "single_committer": work.single_committer,
        "deadline_s": duration_s(work.clip_deadline, "--clip-deadline"),
        "memory_bytes": size_bytes(work.clip_memory, "--clip-memory"),
        "batch_tokens": work.batch_tokens,
        "heartbeat_s": min(HEARTBEAT_S, lease_timeout_s / 4),
        "lease_timeout_s": lease_timeout_s,
        "max_failure_share": work.max_failure_share,
    }


def _open_job(prepared: _Prepared, work: WorkOptions) -> tuple[TokenStore, Job]:
    """Create the store if need be, and the job, or join the one that does the same work."""
    from cache.store import TokenStore
    from eval.verbs.arguments import compression_of
    from extract.plan import open_job

    store = TokenStore.open_or_create(
        work.store,
        compression=compression_of(work.compression),
        single_committer=work.single_committer,
    )
    return store, open_job(store, prepared.records, prepared.plan)


# ---------------------------------------------------------------------------- plans


def _print_plan(
    prepared: _Prepared, work: WorkOptions, run: RunOptions, engine: EngineOptions
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
        source = _check_inputs(prepared)
        n_clips = _CALIBRATION_CLIPS if run.calibrate is None else run.calibrate
        if n_clips:
            calibration = _calibrate(prepared, work, engine, source, n_clips)
    for line in unit_note(plan, calibration, engine.walltime_s):
        out.print(line, highlight=False, soft_wrap=True)
    if run.dry_run:
        _print_script(prepared, work, engine)
    out.print("nothing was queued or written", highlight=False)


def _calibrate(
    prepared: _Prepared,
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
        _check_here(work.device)
    except SchemaError:
        if engine.kind in _ON_THIS_MACHINE:
            raise
        err.print(
            f"no estimate of the time: --device {work.device} is not on this machine. Run the same with "
            "--plan on a machine like the workers'.",
            soft_wrap=True,
        )
        return None
    config = _config_without_job(prepared, work, engine)
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


def _config_without_job(
    prepared: _Prepared, work: WorkOptions, engine: EngineOptions
) -> WorkerConfig:
    """Return what workers would be told, were there a job."""
    from extract.config import WorkerConfig

    bank = prepared.bank
    return WorkerConfig(
        store=_absolute(work.store),
        manifest=str(prepared.manifest),
        media_root=prepared.media_root,
        specs=bank.specs,
        weights={spec.spec_id: str(bank.path(spec)) for spec in bank.specs},
        job_id="JOB",
        generation=0,
        session="SESSION",
        engine=engine.kind,
        n_decoders=work.decoders or _decoders_of(work, engine),
        faces=None if prepared.faces is None else prepared.faces.given,
        **_worker_fields(work),
    )


def _absolute(store: str) -> str:
    from cache.place import is_url

    return store if is_url(store) else str(Path(store).resolve())


def _decoders_of(work: WorkOptions, engine: EngineOptions) -> int:
    if engine.kind in _ON_THIS_MACHINE:
        return _decoders(work.device, engine.workers)
    return _decoders(work.device, 1, engine.cpus_per_worker)


def _print_script(prepared: _Prepared, work: WorkOptions, engine: EngineOptions) -> None:
    from extract.engines.start import job_script

    if engine.kind in (*_ON_THIS_MACHINE, "dask"):
        out.print(f"engine {engine.kind} submits no job script", highlight=False)
        return
    script = job_script(engine, _config_without_job(prepared, work, engine))
    out.print(f"up to {engine.workers} jobs would be submitted with this script:", highlight=False)
    out.file.write(script.rstrip("\n") + "\n")


# ---------------------------------------------------------------------------- the work


def _run(prepared: _Prepared, work: WorkOptions, run: RunOptions, engine: EngineOptions) -> int:
    """Queue the work, show how it goes, and say what was done."""
    from eval.progress import Surroundings, job_view
    from extract.engines.start import run_engine
    from extract.summary import Watch, summarise

    if engine.kind in _ON_THIS_MACHINE:
        _check_here(work.device)
    source = _check_inputs(prepared)
    if run.calibrate:
        _calibrate(prepared, work, engine, source, run.calibrate)
    store, job = _open_job(prepared, work)
    log_dir = _log_dir(run, engine, store, job)
    engine = engine.model_copy(update={"log_dir": log_dir})
    config = _config(
        prepared, work, store, job,
        engine=engine.kind,
        n_decoders=work.decoders or _decoders_of(work, engine),
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
        with job_view(err, watch, around, is_remote=_is_remote(store.storage)) as view:
            run_engine(engine, config, job, lambda state: _show_engine(view, state))
    except (EmocacheError, KeyboardInterrupt):
        done = summarise(job, session=config.session)
        if done.counts:
            _print_done(done, work.store)
        raise
    _sum_up(job, store, config.session, work.store)
    whole = summarise(job, price_per_hour=run.price_per_hour)
    folder = run.report or _job_folder(store, job)
    if folder is not None:
        _write_report(whole, store.root, folder)
    _check_done(job)
    return FINDINGS if whole.failures or _n_failed(prepared.plan) else DONE


def _n_failed(plan: Plan) -> int:
    from cache.commit import Status

    return sum(counts[Status.FAILED] for counts in plan.known.values())


def _show_engine(view: JobView, state: EngineState) -> None:
    # Where the logs are stands in the view already.
    notes = tuple(note for note in state.notes if not note.startswith("logs:"))
    view.show(n_wanted=state.n_wanted, dashboard=state.dashboard_link, notes=notes)


def _is_remote(storage: Storage) -> bool:
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


def _nothing_to_do(plan: Plan, store: str) -> int:
    from eval.tables import status_table

    out.print(
        f"nothing to do: all {plan.n_clips} clips are in {store}", highlight=False, soft_wrap=True
    )
    out.print(status_table(plan.known))
    return FINDINGS if _n_failed(plan) else DONE


def _sum_up(job: Job, store: TokenStore, session: str, where: str) -> JobSummary:
    """Say what a session did, and return it."""
    from extract.summary import summarise

    mine = summarise(job, session=session)
    _print_done(mine, where)
    if not job.undone():
        for spec in job.plan.specs:
            store.write_snapshot(spec)  # so that the next reader opens the store quickly
    return mine


def _check_done(job: Job) -> None:
    """Say that there is work left, if there is.

    Raises:
        StoppedError: Units are left.
    """
    left = job.undone()
    if left:
        raise StoppedError(
            f"stopped with {len(left):,} of {len(job.plan.units):,} units left. What was committed stays; "
            "run the same command to continue."
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


def _write_report(summary: JobSummary, where: str, folder: Path) -> None:
    from eval.extraction_report import REPORT_JSON, write_extraction_report

    try:
        shown, _ = write_extraction_report(summary, where, folder)
    except MissingDependencyError as error:
        err.print(str(error), markup=False, soft_wrap=True)
        shown = folder / REPORT_JSON
    out.print(str(shown), highlight=False, soft_wrap=True)


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
            out, watching, Surroundings(), is_remote=_is_remote(job.storage), in_background=False
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
    _write_report(summarise(job, price_per_hour=price_per_hour), store, out_dir)
    return DONE
