"""`emocache annotate status`, `failures` and `show`: what comes of an annotation, and its settings."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import SchemaError
from eval.verbs.annotate_options import retry_kinds_of
from eval.verbs.console import DONE, FINDINGS, out, verb

if TYPE_CHECKING:
    from cache.storage import LocalStorage
    from extract.annotate.pipeline import Annotation
    from extract.jobs.job import Job

_N_SHOWN = 20

WorkArgument = Annotated[str, typer.Argument(metavar="WORK", help="Work folder.")]


def jobs_of(storage: LocalStorage) -> list[Job]:
    """Return the jobs of a work folder, the newest first."""
    from extract.jobs.job import Job

    return [job for job in Job.latest(storage) if job.plan.work == "annotation"]


def _annotation_of(work: str) -> tuple[LocalStorage, Annotation]:
    """Return what was asked of a work folder last, and what is known of it."""
    from cache.manifest import read_manifest
    from extract.annotate.pipeline import prepare, read_asked, work_storage

    storage = work_storage(work)
    asked = read_asked(storage)
    records = read_manifest(Path(asked.manifest)).records
    found = prepare(records, asked.preset, storage.root, splits=asked.splits, limit=asked.limit)
    return storage, found


@verb
def status_command(
    work: WorkArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on looking until the job is done.")
    ] = False,
) -> int:
    """Say how far an annotation is and how its workers are; from any machine that sees the folder."""
    from eval.progress import Surroundings
    from eval.tables import worker_table
    from eval.verbs.annotate_view import annotation_panel, annotation_view
    from extract.annotate.pipeline import read_asked, work_storage
    from extract.summary import Watch

    if watch and as_json:
        raise SchemaError("--watch goes on and --json ends; give one of them.")
    storage = work_storage(work)
    preset = read_asked(storage).preset
    jobs = jobs_of(storage)
    if not jobs:
        out.print(f"{work}: no annotation was begun here", highlight=False, soft_wrap=True)
        return DONE
    job = next((job for job in jobs if job.undone()), jobs[0])
    watching = Watch(job)
    if watch:
        try:
            with annotation_view(
                out, watching, Surroundings(), preset, in_background=False
            ) as view:
                view.run(lambda found: found.n_units_done == found.n_units)
        except KeyboardInterrupt:  # ends the looking, not the job
            pass
        return DONE
    found = watching.look(time.monotonic())
    if as_json:
        out.file.write(found.model_dump_json(indent=2) + "\n")
        return DONE
    verdict = "done" if found.n_units_done == found.n_units else "not done"
    out.print(f"job {found.job_id}, begun {found.created}: {verdict}", highlight=False)
    out.print(annotation_panel(found, Surroundings(), preset))
    if found.workers:
        out.print(worker_table(found.workers, time.time()))
    return DONE


@verb
def failures_command(
    work: WorkArgument,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="Only this kind of failure.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print what decoders and detectors said last, too.")
    ] = False,
) -> int:
    """List the steps that failed, by kind, with all that is known of each."""
    from eval.verbs.annotate_view import failure_table
    from extract.annotate.pipeline import read_asked
    from extract.annotate.report import FailureList, report_annotation

    if kind is not None:
        retry_kinds_of([kind])
    storage, annotation = _annotation_of(work)
    report = report_annotation(
        len(annotation.records), annotation.plan, read_asked(storage).preset, annotation.settings,
        annotation.wordings.ids, annotation.results,
    )  # fmt: skip
    found = tuple(f for f in report.failures if kind in (None, "all", f.kind))
    if as_json:
        out.file.write(FailureList(failures=found).model_dump_json(indent=2) + "\n")
        return FINDINGS if found else DONE
    if not found:
        out.print(f"no step failed in {work}", highlight=False, soft_wrap=True)
        return DONE
    out.print(failure_table(found))
    shown = found if kind or verbose else found[:_N_SHOWN]
    said = (
        {e.uid: e for job in jobs_of(storage) for e in job.evidence().values()} if verbose else {}
    )
    for failure in shown:
        line = f"{failure.uid}, {failure.step}: {failure.reason}"
        out.print(line, markup=False, highlight=False, soft_wrap=True)
        evidence = said.get(failure.uid)
        if evidence is not None and evidence.stderr_tail:
            out.print(evidence.stderr_tail.rstrip(), markup=False, highlight=False, soft_wrap=True)
    if len(found) > len(shown):
        out.print(
            f"... and {len(found) - len(shown):,} more: --kind KIND, or --json", highlight=False
        )
    return FINDINGS


@verb
def show_command(
    preset: Annotated[
        str | None, typer.Argument(metavar="[PRESET]", help="Without one, all are listed.")
    ] = None,
    words: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    with_file: Annotated[
        Path | None, typer.Option("--with", help="YAML or JSON file of settings.")
    ] = None,
) -> int:
    """Print the settings of a preset, as `--with` accepts them."""
    from extract.annotate.presets import PRESETS, configure

    if preset is None:
        for name, make in PRESETS.items():
            first = (make.__doc__ or "").splitlines()[0]
            out.print(f"{name}: {first}", highlight=False, markup=False, soft_wrap=True)
        return DONE
    out.file.write(configure(preset, words or [], with_file).model_dump_json(indent=2) + "\n")
    return DONE
