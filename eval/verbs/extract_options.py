"""The options of `emocache extract` and `emocache extract-worker`, each written down once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_WORK = "Before the work"
_WORKER = "Every worker"
_ENGINE = "Where it runs"
_REPORT = "The report"


@dataclass(frozen=True, kw_only=True)
class WorkOptions:
    """What is encoded, from where to where, and how a worker does it."""

    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PRESET|KEY=VALUE",
            help="Presets (v2, demo), one or several, and settings, e.g. tokens.video.grid=4",
        ),
    ] = None
    manifest: Annotated[Path, typer.Option("--manifest", help="Manifest from `emocache index`.")]
    store: Annotated[
        str, typer.Option("--store", help="Folder or URL (s3://...) of the token store.")
    ]
    encoders: Annotated[
        list[str] | None,
        typer.Option(
            "--encoders",
            metavar="NAME[,NAME...]",
            help="More encoders, besides or instead of a preset's, e.g. hubert-large,clip-large.",
        ),
    ] = None
    specs_file: Annotated[
        Path | None,
        typer.Option("--specs", help="YAML or JSON file of token specs of your own, by name."),
    ] = None
    encoder_weights: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PATH, repeatable; NAME is an encoder, its kind, or a stream."),
    ] = None
    with_file: Annotated[
        Path | None,
        typer.Option("--with", help="YAML or JSON file of settings, under KEY=VALUE."),
    ] = None
    media_root: Annotated[
        str | None,
        typer.Option(help="Folder or URL where the media are now, if not where they were indexed."),
    ] = None
    faces: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]DIR|MODULE:NAME",
            help="Where faces are, for tokens of faces: a folder of OpenFace's tables, or a detector.",
        ),
    ] = None
    retry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="Try clips again that failed so: missing, crash, ... Repeatable, or with commas.",
        ),
    ] = None
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try every failed clip again.")
    ] = False
    compression: Annotated[
        str, typer.Option(help="Of a new store: none (the fast one) or zstd (archives).")
    ] = "none"
    single_committer: Annotated[
        bool,
        typer.Option(
            "--single-committer",
            help="Write to a bucket that ignores create-once; you see to it that one process does.",
        ),
    ] = False
    unit_clips: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Clips that a worker takes at a time, and commits."),
    ] = 32

    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N", rich_help_panel=_WORKER)] = (
        "cpu"
    )
    precision: Annotated[
        str,
        typer.Option(
            help="Of the encoders' matrix products: float32, bfloat16 or float16.",
            rich_help_panel=_WORKER,
        ),
    ] = "float32"
    compile_encoders: Annotated[
        bool,
        typer.Option("--compile", help="Compile the encoders with torch.", rich_help_panel=_WORKER),
    ] = False
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Most tokens in one batch of an encoder; default by the device.",
            rich_help_panel=_WORKER,
        ),
    ] = None
    decoders: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Decoder processes; default: 1 beside a CPU encoder, else all cores but one.",
            rich_help_panel=_WORKER,
        ),
    ] = None
    clip_deadline: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Longest time for decoding one clip.",
            rich_help_panel=_WORKER,
        ),
    ] = "120s"
    clip_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Most memory for decoding one clip.",
            rich_help_panel=_WORKER,
        ),
    ] = "2GiB"
    max_failure_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Stop when more than this share of the last 64 clips failed; 1 never stops.",
            rich_help_panel=_WORKER,
        ),
    ] = 0.5
    lease_timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Silence after which a worker counts as dead and its clips go to others.",
            rich_help_panel=_WORKER,
        ),
    ] = "120s"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is said before."""

    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Only say what would be encoded, and how long it would take.",
            rich_help_panel=_WORK,
        ),
    ] = False
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="As --plan, and show the job script that would be submitted.",
            rich_help_panel=_WORK,
        ),
    ] = False
    calibrate: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Clips that are encoded first to estimate the time, without storing them; of "
            "--plan by default 24, 0 for none.",
            rich_help_panel=_WORK,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EngineFlags:
    """Where the workers run."""

    engine: Annotated[
        str,
        typer.Option(
            help="inline (in this process), local, dask, slurm, pbs, sge, lsf, oar or htcondor.",
            rich_help_panel=_ENGINE,
        ),
    ] = "inline"
    workers: Annotated[
        int, typer.Option(metavar="N", help="Workers at most.", rich_help_panel=_ENGINE)
    ] = 1
    min_workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Workers to keep while there is little left; default: as many as --workers.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Of engine dask: a running scheduler, e.g. tcp://host:8786",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    walltime: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Of one cluster job: 4h, 90m, 1:30:00. Workers finish up ahead of it.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    gpus_per_worker: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Default: 1 if --device is cuda, else 0.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    cpus_per_worker: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Cores of one worker, its decoders included.",
            rich_help_panel=_ENGINE,
        ),
    ] = 1
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of one worker, its decoders included, e.g. 16GB",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    queue: Annotated[
        str | None,
        typer.Option(help="Queue or partition of the cluster.", rich_help_panel=_ENGINE),
    ] = None
    account: Annotated[
        str | None,
        typer.Option(help="Account that the cluster charges.", rich_help_panel=_ENGINE),
    ] = None
    job_extra: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LINE",
            help="More directives of the job script, e.g. --constraint=a100. Repeatable.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    prologue: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LINE",
            help="Shell lines before the worker starts, e.g. 'module load cuda'. Repeatable.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    start_timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="How long to wait for the first worker.",
            rich_help_panel=_ENGINE,
        ),
    ] = "10m"
    log_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the workers' logs.", rich_help_panel=_ENGINE),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(EngineFlags, PlanOptions):
    """Where the workers run, and what is said before and after."""

    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="DIR",
            help="Where report.html and report.json go; default: beside the job in a local store.",
            rich_help_panel=_REPORT,
        ),
    ] = None
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="X",
            help="Price of one worker's hour, to state what 1000 clips cost.",
            rich_help_panel=_REPORT,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What only `emocache extract-worker` takes."""

    walltime: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Of the job that this worker runs in, from now on; it finishes up ahead of it.",
        ),
    ] = None
    log_dir: Annotated[
        Path | None, typer.Option(help="Folder of the workers' logs; default: only this terminal.")
    ] = None


def takes(*groups: type[Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Let a handler take dataclasses of options, and the command line every field of them.

    Args:
        groups: Dataclasses whose fields are annotated as typer wants them; the handler gets one
            instance of each, in this order.
    """

    def decorate(handler: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(handler)
        def with_fields(**given: Any) -> int:
            return handler(
                *(group(**{f.name: given[f.name] for f in fields(group)}) for group in groups)
            )

        parameters = []
        for group in groups:
            hints = get_type_hints(group, include_extras=True)
            parameters += [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.default is MISSING else field.default,
                    annotation=hints[field.name],
                )
                for field in fields(group)
            ]
        del with_fields.__wrapped__
        with_fields.__annotations__ = {}
        with_fields.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return with_fields

    return decorate
