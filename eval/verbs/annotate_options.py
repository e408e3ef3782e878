"""The options of `emocache annotate` and `emocache annotate-worker`, each written down once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import SchemaError, near_miss

if TYPE_CHECKING:
    from extract.failures import AnyKind

_WORKER = "Every worker"


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions:
    """What is annotated, how, and how a worker does it."""

    manifest: Annotated[
        Path,
        typer.Argument(
            metavar="MANIFEST", help="Records, from `emocache index`.", show_default=False
        ),
    ]
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings on top of the preset, e.g. "
            "visual_objective.base_url=http://127.0.0.1:8000/v1",
        ),
    ] = None
    work: Annotated[
        str,
        typer.Option(
            "--work",
            metavar="DIR",
            help="Folder of answers, results and the state of the job; the same one continues.",
        ),
    ]
    preset: Annotated[str, typer.Option("--preset", help="mmeverse, merr-coarse or merr-fine.")] = (
        "mmeverse"
    )
    with_file: Annotated[
        Path | None,
        typer.Option("--with", help="YAML or JSON file of settings, under KEY=VALUE."),
    ] = None
    media_root: Annotated[
        str | None,
        typer.Option(help="Folder or URL where the media are now, if not where they were indexed."),
    ] = None
    split: Annotated[
        list[str] | None,
        typer.Option("--split", help="Only records of this split. Repeatable."),
    ] = None
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", min=1, metavar="N", help="At most so many records, the first ones."
        ),
    ] = None
    retry_failed: Annotated[
        list[str] | None,
        typer.Option(
            "--retry-failed",
            metavar="KIND",
            help="Try steps again that failed so: unanswered, refused, missing, ..., or all. "
            "Repeatable, or with commas.",
        ),
    ] = None
    unit_clips: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Records that a worker takes at a time."),
    ] = 16
    decoders: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes that decode media, and detectors at once; default: its cores.",
            rich_help_panel=_WORKER,
        ),
    ] = None
    clip_deadline: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="Longest time for decoding one clip.", rich_help_panel=_WORKER
        ),
    ] = "120s"
    clip_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="Most memory for decoding one clip.", rich_help_panel=_WORKER
        ),
    ] = "2GiB"
    max_failure_share: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Stop when more than this share of the last 64 records failed; 1 never stops.",
            rich_help_panel=_WORKER,
        ),
    ] = 0.5
    lease_timeout: Annotated[
        str,
        typer.Option(
            metavar="TIME",
            help="Silence after which a worker counts as dead and its records go to others.",
            rich_help_panel=_WORKER,
        ),
    ] = "120s"


@dataclass(frozen=True, kw_only=True)
class OutcomeOptions:
    """What comes of it."""

    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Manifest to write (.parquet): all records, with what was found.",
        ),
    ] = None
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Only say what it takes: requests, tokens, hours, money."),
    ] = False
    partial: Annotated[
        bool,
        typer.Option(
            "--partial", help="Ask nothing; write the manifest with what was found so far."
        ),
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the estimate or the report as JSON.")
    ] = False


def retry_kinds_of(names: Sequence[str]) -> tuple[AnyKind, ...]:
    """Return the kinds of failure that a user names; one text may name several, joined by commas.

    Raises:
        SchemaError: An unknown kind; names the near miss and all kinds.
    """
    from extract.annotate.results import ALL_KINDS

    asked = [part.strip() for name in names for part in name.split(",")]
    for name in asked:
        if name not in (*ALL_KINDS, "all"):
            raise SchemaError(
                f"--retry-failed {name}: no such kind of failure.{near_miss(name, ALL_KINDS)} Allowed: "
                f"all, {', '.join(ALL_KINDS)}"
            )
    return tuple(kind for kind in ALL_KINDS if kind in asked or "all" in asked)
