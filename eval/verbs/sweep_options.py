"""The options of `emocache sweep`, each written down once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from eval.verbs.run_options import EncoderWeightsOption, FacesOption, WheelsOption

_CORPUS = "Corpus and tokens"
_LOOK = "Only look"
_HOW = "How it runs"


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """What is swept, on what, and how."""

    file: Annotated[
        str | None,
        typer.Argument(
            metavar="[SWEEP]",
            help="A YAML file, or the name of a shipped one (table11); without one, these are listed.",
        ),
    ] = None
    out_dir: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the sweep; the same one continues it. Default: sweeps/NAME, or sweeps/NAME-demo.",
        ),
    ] = None
    rows: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[,NAME...]", help="Only these rows; patterns such as 'clip*'."),
    ] = None
    scale: Annotated[
        str,
        typer.Option(
            help="full, or demo: every network tiny, on generated clips; shows that all rows go through."
        ),
    ] = "full"
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Add rows, seeds or scores that the file has gained since."),
    ] = False
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try trials again that failed.")
    ] = False

    manifest: Annotated[
        Path | None,
        typer.Option(help="Manifest from `emocache index`.", rich_help_panel=_CORPUS),
    ] = None
    store: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL of the token store; at demo scale by default one of the sweep's own.",
            rich_help_panel=_CORPUS,
        ),
    ] = None
    media_root: Annotated[
        str | None,
        typer.Option(
            help="Folder or URL where the media are now, if not where they were indexed.",
            rich_help_panel=_CORPUS,
        ),
    ] = None
    encoder_weights: EncoderWeightsOption = None
    faces: FacesOption = None
    wheels: WheelsOption = None

    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Say what would be encoded and trained, what it costs, and what reuse saves.",
            rich_help_panel=_LOOK,
        ),
    ] = False
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Say of each row which stored tokens it uses, through which view, and why any must be "
            "encoded.",
            rich_help_panel=_LOOK,
        ),
    ] = False
    status: Annotated[
        bool,
        typer.Option("--status", help="Say how far a sweep is.", rich_help_panel=_LOOK),
    ] = False
    print_script: Annotated[
        bool,
        typer.Option(
            "--print-script",
            help="Print the job scripts that --engine slurm would submit.",
            rich_help_panel=_LOOK,
        ),
    ] = False

    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Trainings side by side; of --engine slurm, tasks at once. Default: one, at demo scale one "
            "per core up to 4, of an array all.",
            rich_help_panel=_HOW,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            help="cpu, cuda or cuda:N; auto takes a GPU where there is one.", rich_help_panel=_HOW
        ),
    ] = "auto"
    precision: Annotated[
        str,
        typer.Option(help="Of the encoders: float32, bfloat16 or float16.", rich_help_panel=_HOW),
    ] = "float32"
    decoders: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Decoder processes of an extraction worker; default: by the device.",
            rich_help_panel=_HOW,
        ),
    ] = None
