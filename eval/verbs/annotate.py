"""`emocache annotate ...`: describe clips with models behind endpoints, and look at what came of it.

Sub-commands with modules of their own are added at the end; a first word that is no sub-command is a
manifest.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from cache.errors import EmocacheError, ManifestError, SchemaError, near_miss
from eval.verbs.annotate_looks import failures_command, jobs_of, show_command, status_command
from eval.verbs.annotate_options import AnnotateOptions, OutcomeOptions, retry_kinds_of
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.extract_options import EngineFlags, WorkerOptions, takes
from eval.verbs.extract_run import check_done
from eval.verbs.review import agreement_command, quality_command, review_command
from eval.verbs.worker_lines import WorkerLines

if TYPE_CHECKING:
    from cache.manifest import Header
    from cache.storage import LocalStorage
    from eval.progress import JobView
    from extract.annotate.config import AnnotationConfig
    from extract.annotate.pipeline import Annotation
    from extract.annotate.presets import Preset
    from extract.annotate.report import AnnotationReport
    from extract.engines.options import EngineOptions, EngineState
    from extract.failures import AnyKind
    from extract.jobs.job import Job

logger = logging.getLogger(__name__)

_RUN = "run"
"""Name of the hidden verb that annotates; nobody types it."""
_ON_THIS_MACHINE = ("inline", "local")
REPORT = "report.json"


class _Annotate(TyperGroup):
    """A group whose first word may also be a manifest: then it annotates."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the hidden verb in front of whatever is no verb; refuse a misspelt one."""
        verbs = [name for name in self.commands if name != _RUN]
        if not args:
            args = ["--help"]
        elif args[0] not in verbs and args[0] != "--help":
            nearest = near_miss(args[0], verbs)
            if nearest and not args[0].startswith("-") and not Path(args[0]).exists():
                ctx.fail(f"No such command or manifest '{args[0]}'.{nearest}")
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


class _Run(TyperCommand):
    """The hidden verb, which calls itself `emocache annotate` in its help and errors."""

    def make_context(
        self, info_name: Any, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Stand in the place of the group."""
        name, above = (parent.info_name, parent.parent) if parent is not None else (info_name, None)
        return super().make_context(name, args, parent=above, **extra)


annotate_app = typer.Typer(
    cls=_Annotate,
    help="Describe clips: action units, vision, audio and chat models (Algorithm 1). "
    "`emocache annotate MANIFEST --out FILE --work DIR`; `emocache annotate MANIFEST --help` tells the "
    "options.",
)


@annotate_app.command(
    _RUN,
    cls=_Run,
    hidden=True,
    epilog="Beside a manifest, the first word may be a verb: `emocache annotate status WORK` tells how far "
    "it is, `emocache annotate failures WORK` what failed and why, `emocache annotate show` the settings.",
)
@verb
@takes(AnnotateOptions, OutcomeOptions, EngineFlags)
def annotate_command(asked: AnnotateOptions, outcome: OutcomeOptions, run: EngineFlags) -> int:
    """Describe the clips of a manifest, and write it anew; run again to continue."""
    from eval.verbs.extract_work import engine_options

    engine = engine_options(run, "cpu")
    prepared = _prepare(asked)
    if outcome.estimate:
        return _say_estimate(prepared, outcome)
    _check_out(asked, outcome)
    if prepared.found.plan.todo and not outcome.partial:
        _run(prepared, asked, run, engine)
    return _finish(prepared, outcome)


@verb
@takes(AnnotateOptions, WorkerOptions)
def annotate_worker_command(asked: AnnotateOptions, own: WorkerOptions) -> int:
    """Be one worker of an annotation: for job arrays, in any number, started and ended at any time."""
    from eval.verbs.extract_work import drain_after_s_of
    from extract.annotate.worker import work

    drain_after_s = drain_after_s_of(own.walltime)
    prepared = _prepare(asked)
    if not prepared.found.plan.todo:
        out.print("nothing to do: all records are annotated", highlight=False)
        return DONE
    _check_keys(prepared.preset)
    _check_media(prepared)
    job = _open_job(prepared, asked)
    config = _config(
        prepared, asked, job,
        engine="worker",
        n_decoders=asked.decoders or _n_cores(),
        log_dir=None if own.log_dir is None else str(own.log_dir.resolve()),
        drain_after_s=drain_after_s,
    )  # fmt: skip
    with WorkerLines(job, "annotating", "records") as lines:
        work(config.model_dump_json(), records=prepared.found.records, on_clip=lines.advance)
    check_done(job, kept="Every answer")
    out.print("all units are done; `emocache annotate` writes the manifest", highlight=False)
    return DONE


# ---------------------------------------------------------------------------- before the work


@dataclass(frozen=True)
class _Prepared:
    """What is known before anything is written."""

    manifest: Path
    header: Header
    media_root: str
    preset: Preset
    storage: LocalStorage
    found: Annotation
    retry: tuple[AnyKind, ...]


def _prepare(asked: AnnotateOptions) -> _Prepared:
    """Check what was asked for, and compare the manifest with the work folder; write nothing."""
    from cache.manifest import media_root as root_of
    from cache.manifest import read_manifest
    from cache.place import is_url
    from extract.annotate.pipeline import prepare, work_storage
    from extract.annotate.presets import configure

    _worker_fields(asked)  # so that a value that does not fit is refused before anything is read
    preset = _absolute(configure(asked.preset, asked.words or [], asked.with_file))
    retry = retry_kinds_of(asked.retry_failed or [])
    storage = work_storage(asked.work)
    manifest = read_manifest(asked.manifest)
    for split in asked.split or []:
        manifest.select(split)  # names the near miss
    found = prepare(
        manifest.records, preset, storage.root,
        splits=asked.split or (), limit=asked.limit, retry=retry, unit_clips=asked.unit_clips,
    )  # fmt: skip
    if asked.media_root is None:
        root = str(root_of(manifest, asked.manifest))
    else:
        is_remote = is_url(asked.media_root)
        root = asked.media_root if is_remote else str(Path(asked.media_root).resolve())
    return _Prepared(asked.manifest.resolve(), manifest.header, root, preset, storage, found, retry)


def _absolute(preset: Preset) -> Preset:
    """Return a preset that means the same files from any folder."""
    changes: dict[str, Any] = {}
    if preset.prompts is not None:
        changes["prompts"] = preset.prompts.resolve()
    if preset.units.table is not None:
        changes["units"] = preset.units.model_copy(update={"table": preset.units.table.resolve()})
    if preset.speech is not None:
        checkpoint = preset.speech.checkpoint.resolve()
        changes["speech"] = preset.speech.model_copy(update={"checkpoint": checkpoint})
    detector = preset.detector
    if detector.folder is not None:
        detector = detector.model_copy(update={"folder": detector.folder.resolve()})
    if detector.program is not None and "/" in detector.program:
        program = str(Path(detector.program).resolve())
        detector = detector.model_copy(update={"program": program})
    return preset.model_copy(update={**changes, "detector": detector})


def _worker_fields(asked: AnnotateOptions) -> dict[str, Any]:
    """Return the fields of a worker's configuration that the user decides."""
    from eval.verbs.arguments import duration_s, size_bytes
    from extract.jobs.session import HEARTBEAT_S

    lease_timeout_s = duration_s(asked.lease_timeout, "--lease-timeout")
    if not 0 < asked.max_failure_share <= 1:
        raise SchemaError(
            f"--max-failure-share {asked.max_failure_share:g}: must be above 0 and at most 1 (never stop)."
        )
    return {
        "deadline_s": duration_s(asked.clip_deadline, "--clip-deadline"),
        "memory_bytes": size_bytes(asked.clip_memory, "--clip-memory"),
        "heartbeat_s": min(HEARTBEAT_S, lease_timeout_s / 4),
        "lease_timeout_s": lease_timeout_s,
        "max_failure_share": asked.max_failure_share,
    }


def _check_out(asked: AnnotateOptions, outcome: OutcomeOptions) -> None:
    if outcome.out_file is None:
        raise SchemaError(
            "--out FILE is missing: the manifest to write. (--estimate writes nothing, and needs none.)"
        )
    if outcome.out_file.resolve() == asked.manifest.resolve():
        raise SchemaError(
            f"--out {outcome.out_file}: is the manifest that is annotated. Give another file: the work "
            "folder belongs to the first."
        )
    if outcome.out_file.is_dir():
        raise SchemaError(f"--out {outcome.out_file}: is a folder. Give a file (.parquet).")


def _check_keys(preset: Preset) -> None:
    """Refuse to begin without the key of an endpoint."""
    from extract.annotate.endpoints.transport import api_key

    for options in preset.roles.values():
        api_key(options.endpoint)


def _check_media(prepared: _Prepared) -> None:
    """Refuse to fail every clip of a corpus whose media are elsewhere."""
    from extract.sources import check_media, open_source

    source = open_source(prepared.media_root)
    todo = [prepared.found.records[row] for row in prepared.found.plan.todo]
    found = check_media(source, todo)
    if not found.n_missing:
        return
    text = (
        f"{found.n_missing:,} of {found.n_checked:,} media files checked are not below {source.root}, "
        f"first: {found.first}."
    )
    if 2 * found.n_missing > found.n_checked:
        raise ManifestError(
            f"{text} Give the folder that the manifest's media paths start from with --media-root."
        )
    logger.warning("%s They will be recorded as failed (missing).", text)


def _say_estimate(prepared: _Prepared, outcome: OutcomeOptions) -> int:
    from eval.verbs.annotate_view import estimate_lines, estimate_table
    from extract.annotate.report import estimate_annotation

    annotation = prepared.found
    found = estimate_annotation(
        annotation.records,
        annotation.plan,
        prepared.preset,
        annotation.wordings,
        annotation.results,
    )
    if outcome.as_json:
        out.file.write(found.model_dump_json(indent=2) + "\n")
        return DONE
    out.print(estimate_table(found))
    for line in estimate_lines(found, prepared.preset):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.print("nothing was asked or written", highlight=False)
    return DONE


def _n_cores() -> int:
    from extract.config import n_cores

    return n_cores()


# ---------------------------------------------------------------------------- the work


def _open_job(prepared: _Prepared, asked: AnnotateOptions) -> Job:
    from extract.annotate.job import open_job
    from extract.annotate.pipeline import Asked, note_asked

    prepared.storage.root.mkdir(parents=True, exist_ok=True)
    note_asked(
        prepared.storage,
        Asked(
            manifest=str(prepared.manifest),
            preset=prepared.preset,
            splits=tuple(asked.split or ()),
            limit=asked.limit,
            settings=prepared.found.settings,
        ),
    )
    return open_job(prepared.storage, len(prepared.found.records), prepared.found.plan)


def _config(
    prepared: _Prepared, asked: AnnotateOptions, job: Job, **options: Any
) -> AnnotationConfig:
    """Return what the workers are told."""
    from extract.annotate.config import AnnotationConfig
    from extract.run import new_session

    return AnnotationConfig(
        store=str(prepared.storage.root),
        manifest=str(prepared.manifest),
        media_root=prepared.media_root,
        job_id=job.job_id,
        generation=job.generation,
        session=new_session(),
        preset=prepared.preset,
        settings=prepared.found.settings,
        **_worker_fields(asked),
        **options,
    )


def _run(
    prepared: _Prepared, asked: AnnotateOptions, run: EngineFlags, engine: EngineOptions
) -> None:
    """Queue the work, and show how it goes until it is done.

    Raises:
        EmocacheError: An endpoint that is down or refuses, a budget that is used up.
        StoppedError: Units are left.
    """
    from eval.progress import Surroundings
    from eval.verbs.annotate_view import annotation_view
    from extract.engines.start import run_engine
    from extract.summary import Watch

    if engine.kind in _ON_THIS_MACHINE:
        _check_keys(prepared.preset)
        _check_detector(prepared.preset)
    _check_media(prepared)
    job = _open_job(prepared, asked)
    log_dir = _log_dir(run, engine, prepared.storage, job)
    engine = engine.model_copy(update={"log_dir": log_dir})
    n_here = engine.workers if engine.kind in _ON_THIS_MACHINE else 1
    cores = _n_cores() if engine.kind in _ON_THIS_MACHINE else engine.cpus_per_worker
    config = _config(
        prepared, asked, job,
        engine=engine.kind,
        n_decoders=asked.decoders or max(1, cores // n_here),
        log_dir=None if log_dir is None else str(log_dir),
    )  # fmt: skip
    if job.joined:
        err.print(f"continuing job {job.job_id}, begun {job.plan.created}", highlight=False)
    tail = None if log_dir is None else f"tail -F {shlex.quote(str(log_dir))}/*.log"
    plan = prepared.found.plan
    around = Surroundings(
        n_hits=len(plan.keys) - len(plan.todo), n_wanted=engine.workers, tail=tail
    )
    watch = Watch(job, lease_timeout_s=config.lease_timeout_s)
    try:
        with annotation_view(err, watch, around, prepared.preset) as view:
            run_engine(engine, config, job, lambda state: _show_engine(view, state))
    except (EmocacheError, KeyboardInterrupt):
        _say_so_far(prepared)
        raise
    check_done(job, kept="Every answer")


def _check_detector(preset: Preset) -> None:
    """Refuse to begin without the program, folder or module that finds action units."""
    from extract.annotate.tools import make_detector

    make_detector(preset.detector)


def _log_dir(
    run: EngineFlags, engine: EngineOptions, storage: LocalStorage, job: Job
) -> Path | None:
    """Return where workers write their logs; None for one that writes to this terminal."""
    if run.log_dir is not None:
        return run.log_dir.resolve()
    return None if engine.kind == "inline" else storage.path(job.root) / "logs"


def _show_engine(view: JobView, state: EngineState) -> None:
    # Where the logs are stands in the view already.
    notes = tuple(note for note in state.notes if not note.startswith("logs:"))
    view.show(n_wanted=state.n_wanted, dashboard=state.dashboard_link, notes=notes)


def _say_so_far(prepared: _Prepared) -> None:
    results = prepared.found.results
    results.refresh()
    keys = prepared.found.plan.keys.values()
    n = sum(key in results for key in keys)
    err.print(f"{n:,} of {len(keys):,} records are annotated so far", highlight=False)


# ---------------------------------------------------------------------------- after the work


def _finish(prepared: _Prepared, outcome: OutcomeOptions) -> int:
    """Write the manifest and the report, and say what came of it."""
    from cache.place import is_url
    from eval.verbs.annotate_view import cost_table, step_table
    from extract.annotate.pipeline import write_annotated

    assert outcome.out_file is not None
    found = prepared.found
    found.results.refresh()
    report = _report(prepared)
    media_root = None if is_url(prepared.media_root) else Path(prepared.media_root)
    n = write_annotated(outcome.out_file, prepared.header, media_root, found)
    if prepared.storage.root.is_dir():
        prepared.storage.replace(REPORT, report.model_dump_json(indent=2).encode())
    if outcome.as_json:
        out.file.write(report.model_dump_json(indent=2) + "\n")
    else:
        out.print(step_table(report))
        out.print(cost_table(report))
        for line in _closing_lines(report, n, outcome.out_file):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    return FINDINGS if report.failures or report.n_waiting else DONE


def _report(prepared: _Prepared) -> AnnotationReport:
    from extract.annotate.report import report_annotation

    found = prepared.found
    usage: dict[str, float] = {}
    for job in jobs_of(prepared.storage):
        for state, _ in job.workers():
            for name, value in state.usage.items():
                usage[name] = usage.get(name, 0.0) + value
    return report_annotation(
        len(found.records), found.plan, prepared.preset, found.settings, found.wordings.ids,
        found.results, usage,
    )  # fmt: skip


def _closing_lines(report: AnnotationReport, n: int, where: Path) -> list[str]:
    text = f"{report.n_records:,} records in {where}: {n:,} annotated"
    n_partly = report.n_annotated - report.n_whole
    if n_partly:
        text += f", {n_partly:,} of them with failed steps"
    left_out = dict(report.left_out)
    if report.n_waiting:
        left_out = {"not yet": report.n_waiting, **left_out}
    if left_out:
        text += "; not annotated: " + ", ".join(f"{k:,} {why}" for why, k in left_out.items())
    lines = [text]
    sent = sum(value for name, value in report.usage.items() if name.endswith(" requests"))
    lines.append(
        f"{sent:,.0f} requests were sent from this work folder so far; the report is its {REPORT}"
    )
    if report.failures:
        kinds = " ".join(
            f"--retry-failed {k}" for k in dict.fromkeys(f.kind for f in report.failures)
        )
        lines.append(f"what failed: emocache annotate failures WORK; to try it again, add {kinds}")
    return lines


annotate_app.command("status")(status_command)
annotate_app.command("failures")(failures_command)
annotate_app.command("show")(show_command)
annotate_app.command("review")(review_command)
annotate_app.command("agreement")(agreement_command)
annotate_app.command("quality")(quality_command)
