"""Options that several verbs about a trained run share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DeviceOption = Annotated[str, typer.Option(help="cpu, cuda or cuda:N")]
WeightsOption = Annotated[str, typer.Option(help="final, or best: those of the best validation.")]
StageOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Behind this stage of the run; default: the last finished one."
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Differs from the run, e.g. data.failed=mask."),
]
EncoderWeightsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder-weights", metavar="NAME=PATH", help="Checkpoint of an encoder. Repeatable."
    ),
]
TranscribeOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write down what is heard, with this openai-whisper checkpoint (.pt)."
    ),
]
FacesOption = Annotated[
    str | None,
    typer.Option(
        metavar="[NAME=]DIR|MODULE:NAME",
        help="Where faces are, for a run on faces: a folder of OpenFace's tables, or a detector.",
    ),
]
ProtocolOption = Annotated[str, typer.Option(help="paper, released or unibench.")]
WheelsOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the emotion wheel tables; default: EMOCACHE_WHEELS."),
]
JudgedOption = Annotated[
    list[Path] | None,
    typer.Option(help="Result of `emocache judge` to lay out in the report too. Repeatable."),
]
