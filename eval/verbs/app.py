"""`emocache app`: a page on this machine that takes a clip and shows what a trained run makes of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import SchemaError
from eval.verbs.console import DONE, err, out, verb
from eval.verbs.predict import encoder_checkpoints
from eval.verbs.run_options import (
    DeviceOption,
    EncoderWeightsOption,
    FacesOption,
    SettingsOption,
    TranscribeOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from cache.manifest import Header
    from eval.live.answer import LiveModel
    from eval.live.page import Example
    from eval.live.uploads import PageLimits
    from extract.annotate.evidence.transcribe import Transcriber

_N_EXAMPLES = 3


@verb
def app_command(
    run: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; with another one the network can reach the page."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 7860,
    max_mb: Annotated[
        float, typer.Option("--max-mb", min=0.001, help="Largest clip, in 10^6 bytes.")
    ] = 50.0,
    max_duration_s: Annotated[
        float, typer.Option(min=0.1, help="Longest clip, in seconds.")
    ] = 60.0,
    concurrency: Annotated[
        int, typer.Option(min=1, help="Clips that are looked at or asked about at once.")
    ] = 1,
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Questions that may wait; more are sent away.")
    ] = 8,
    transcribe: TranscribeOption = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Emotions to offer, for a run without labels."),
    ] = None,
    example: Annotated[
        list[Path] | None,
        typer.Option(
            help="Clip to offer on the page; a run of the demo brings its own. Repeatable."
        ),
    ] = None,
    faces: FacesOption = None,
    encoder_weights: EncoderWeightsOption = None,
    settings: SettingsOption = None,
    weights: WeightsOption = "final",
    device: DeviceOption = "cpu",
) -> int:
    """Open a page for clips of your own: frames, sound, label bars, the explanation as it is written."""
    from eval.live.answer import LiveModel
    from eval.live.app import AppServer
    from eval.live.uploads import PageLimits
    from eval.verbs.arguments import check_device, one_of_these

    check_device(device)
    limits = PageLimits(
        max_bytes=round(max_mb * 1e6),
        max_duration_s=max_duration_s,
        concurrency=concurrency,
        max_waiting=max_waiting,
    )
    given = _examples(example or [])
    with ExitStack() as stack:
        model = stack.enter_context(
            LiveModel.load(
                run,
                device=device,
                weights=one_of_these("--weights", weights, ("final", "best")),
                encoder_weights=encoder_checkpoints(encoder_weights or ()),
                overrides=settings or (),
                header=None if labels is None else _header(labels),
                transcriber=None if transcribe is None else _transcriber(transcribe, device),
                n_decoders=concurrency,
                faces=faces,
            )
        )
        is_demo = bool(model.trained.preset.bundled_weights)
        server = stack.enter_context(
            AppServer(
                model,
                limits,
                host=host,
                port=port,
                transcribe=transcribe is not None,
                examples=_generated if is_demo and not given else given,
                about=_about(model, device),
            )
        )
        for line in _opening_lines(limits, model):
            err.print(line, highlight=False, markup=False, soft_wrap=True)
        if not server.is_local:
            err.print(
                "[yellow]remark:[/] others on the network can reach this page, send clips and ask; it is "
                "not encrypted, and no password is asked for."
            )
        out.print(server.url, highlight=False, markup=False, soft_wrap=True)
        out.file.flush()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass
    err.print("closed; all clips are deleted", highlight=False)
    return DONE


def _opening_lines(limits: PageLimits, model: LiveModel) -> list[str]:
    return [
        f"run {model.trained.info.run_id} of preset {model.trained.preset.name}; tasks: "
        f"{', '.join(model.trained_tasks or model.tasks)}",
        f"takes clips of at most {limits.max_bytes / 1e6:g} MB and {limits.max_duration_s:g} s, "
        f"{limits.concurrency} at once, {limits.max_waiting} waiting; Ctrl-C ends it",
    ]


def _about(model: LiveModel, device: str) -> str:
    """Return what the page says of the run; no path of this machine."""
    trained = model.trained
    return f"preset {trained.preset.name} · run {trained.info.run_id} · {device}"


def _header(labels: str) -> Header:
    """Return the emotions that a user gives as those of a run that has none of its own."""
    from cache.labels import LabelSpace
    from cache.manifest import Header
    from eval.live.replies import checked_labels

    space = LabelSpace(name="emotion", labels=checked_labels(labels.split(",")))
    return Header(media_root=".", label_spaces={"emotion": space})


def _transcriber(checkpoint: Path, device: str) -> Transcriber:
    from extract.annotate.evidence.transcribe import Transcriber

    return Transcriber.load(checkpoint, device=device)


def _examples(paths: list[Path]) -> list[Example]:
    from eval.live.page import Example

    for path in paths:
        if not path.is_file():
            raise SchemaError(
                f"--example {path}: there is no such file. Give a clip, or leave it out."
            )
    return [Example(path.stem, path.resolve()) for path in paths]


def _generated(folder: Path) -> list[Example]:
    """Make clips as the demo's are, of another seed."""
    from eval.live.page import Example
    from extract.corpora.demo import write_demo_corpus

    write_demo_corpus(folder, n_clips=_N_EXAMPLES, seed=7)
    paths = sorted((folder / "media").glob("*.mp4"))
    return [Example(f"generated clip {at}", path) for at, path in enumerate(paths, 1)]
