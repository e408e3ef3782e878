"""`emocache predict`: a trained run, asked about media files that no store knows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from cache.errors import MediaError, PredictionError, SchemaError, StoppedError
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.run_options import (
    DeviceOption,
    EncoderWeightsOption,
    FacesOption,
    SettingsOption,
    StageOption,
    TranscribeOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from cache.manifest import Header
    from cache.spec import Stream
    from eval.live.answer import LiveModel
    from eval.live.clip import SeenClip
    from eval.live.files import ClipFile
    from eval.live.replies import LiveReply
    from extract.annotate.evidence.transcribe import Transcriber

_BAR_WIDTH = 24
_MOST_BARS = 12
_DEFAULT_MAX_S = 120.0


@verb
def predict_command(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Video, sound or picture files, or folders of them.",
            show_default=False,
        ),
    ],
    run: Annotated[Path, typer.Option("--run", help="Folder of a finished run.")],
    task: Annotated[
        str,
        typer.Option(
            help="emotion, sentiment, intent, multi-label, open-vocabulary; think, think-sentiment, ... "
            "for reasoning too; reason, audio, image for a description."
        ),
    ] = "emotion",
    subtitle: Annotated[str | None, typer.Option(help="What is said, of a single clip.")] = None,
    transcribe: TranscribeOption = None,
    language: Annotated[
        str | None, typer.Option(help="Spoken language: en, zh, ...; default: it is detected.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="A,B,C", help="Labels to offer in place of those of the run."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Whose labels to offer, of a run on several corpora.")
    ] = None,
    mask: Annotated[
        list[str] | None,
        typer.Option(help="Do not show the model: audio, video, image or picture. Repeatable."),
    ] = None,
    likelihoods: Annotated[
        bool,
        typer.Option("--likelihoods", help="Show how likely each label is among those offered."),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 200,
    max_duration_s: Annotated[
        float, typer.Option(min=0.1, help="Longest clip, in seconds.")
    ] = _DEFAULT_MAX_S,
    peak_index: Annotated[
        int | None,
        typer.Option(min=0, help="Frame of strongest expression, for runs that encode it."),
    ] = None,
    faces: FacesOption = None,
    encoder_weights: EncoderWeightsOption = None,
    settings: SettingsOption = None,
    weights: WeightsOption = "final",
    stage: StageOption = None,
    device: DeviceOption = "cpu",
    precision: Annotated[
        str,
        typer.Option(
            help="Of the encoders, as in the extraction of the run's tokens: float32, float16, bfloat16."
        ),
    ] = "float32",
    out_file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Predictions file (.jsonl) to write."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document in place of text.")
    ] = False,
) -> int:
    """Ask a trained run about media files: decode, encode, fuse, answer; no store is needed."""
    from eval.live.files import find_clips
    from eval.verbs.arguments import check_device, one_of_these
    from extract.config import PRECISIONS
    from train.text.tasks import TASKS

    one_of_these("--task", task, TASKS)
    hidden = _streams(mask or ())
    offered = None if labels is None else [label.strip() for label in labels.split(",")]
    files, remarks = find_clips(paths)
    if subtitle is not None and len(files) > 1:
        raise SchemaError(
            f"--subtitle is what is said in one clip, and there are {len(files)}. Ask about one at a time, "
            "or index them with a table of subtitles (docs/corpora.md)."
        )
    if subtitle is not None and transcribe is not None:
        raise SchemaError("give either --subtitle or --transcribe, not both.")
    check_device(device)
    for remark in remarks:
        err.print(remark, markup=False, highlight=False, soft_wrap=True)
    from eval.live.answer import LiveModel

    with ExitStack() as stack:
        write = stack.enter_context(_writer(out_file))
        live = stack.enter_context(
            LiveModel.load(
                run,
                device=device,
                weights=one_of_these("--weights", weights, ("final", "best")),
                stage=stage,
                encoder_weights=encoder_checkpoints(encoder_weights or ()),
                overrides=settings or (),
                header=_header(task, offered),
                precision=one_of_these("--precision", precision, PRECISIONS),
                transcriber=None if transcribe is None else _transcriber(transcribe, device),
                faces=faces,
            )
        )
        if offered is None:
            live.space(task, corpus)  # a missing choice is told once, not of every clip
        _warn_of_task(live, task)
        found: list[dict[str, Any]] = []
        n_failed = 0
        for file in _shown(files):
            try:
                seen = live.look(
                    file.path,
                    name=file.name,
                    corpus=corpus,
                    subtitle=subtitle,
                    subtitle_language=language,
                    transcribe=transcribe is not None,
                    peak_index=peak_index,
                    max_duration_s=max_duration_s,
                )
                reply = live.ask(
                    seen,
                    task,
                    options=offered,
                    masked=hidden,
                    max_new_tokens=max_new_tokens,
                    likelihoods=likelihoods,
                )
            except KeyboardInterrupt:
                raise StoppedError(_stopped(len(found), len(files), out_file)) from None
            except (MediaError, SchemaError) as error:
                n_failed += 1
                said = str(error).removeprefix(f"{file.path.name}: ")
                found.append({"file": _text(file.path), "error": said})
                said = f"{_text(file.path)}: {said}"
                err.print(said, markup=False, highlight=False, soft_wrap=True)
                continue
            write(reply)
            found.append(_document(file, seen, reply))
            if not as_json:
                _print_reply(file, seen, reply)
        if as_json:
            whole = {"run": live.trained.info.run_id, "task": task, "clips": found}
            out.file.write(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    if len(files) > 1:
        err.print(f"answered {len(files) - n_failed} of {len(files)} clips", highlight=False)
    return FINDINGS if n_failed else DONE


def encoder_checkpoints(given: Sequence[str]) -> dict[str, Path]:
    """Return checkpoints by what they are for, of NAME=PATH."""
    found = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not (name and equals and path):
            raise SchemaError(
                f"--encoder-weights {item!r} is not NAME=PATH. Example: --encoder-weights "
                "eva=weights/eva_vit_g.pth"
            )
        found[name] = Path(path)
    return found


def _streams(masks: Sequence[str]) -> tuple[Stream, ...]:
    """Return the streams that `--mask` hides."""
    if not masks:
        return ()
    from cache.spec import STREAMS
    from eval.evaluate import mask_streams

    hidden = {stream for name in masks for stream in mask_streams(name)}
    return tuple(stream for stream in STREAMS if stream in hidden)


def _header(task: str, offered: Sequence[str] | None) -> Header | None:
    """Return the labels that a user gives as those of a run that has none of its own."""
    from cache.labels import LabelSpace
    from cache.manifest import Header
    from eval.live.replies import checked_labels
    from train.text.tasks import TASK_TABLE, check_task

    field = TASK_TABLE[check_task(task)].label
    if offered is None or field is None:
        return None
    space = LabelSpace(name=field, labels=checked_labels(offered), open=field == "emotion_ov")
    return Header(media_root=".", label_spaces={field: space})


def _transcriber(checkpoint: Path, device: str) -> Transcriber:
    from extract.annotate.evidence.transcribe import Transcriber

    return Transcriber.load(checkpoint, device=device)


def _warn_of_task(live: LiveModel, task: str) -> None:
    if task not in live.trained_tasks:
        known = ", ".join(live.trained_tasks) or "none that can be asked"
        err.print(
            f"the run was never trained on task '{task}', so its replies mean little (it was on: {known})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _shown(files: Sequence[ClipFile]) -> Iterator[ClipFile]:
    """Yield the files, with a bar if there are several."""
    from eval.progress import progress_bar

    if len(files) == 1:
        yield files[0]
        return
    with progress_bar(err, "asking", len(files), "clips") as bar:
        for file in files:
            yield file
            bar.advance()


@contextmanager
def _writer(path: Path | None) -> Iterator[Callable[[LiveReply], None]]:
    """Yield what adds a reply to a new predictions file at once: after a stop, it holds all so far.

    Raises:
        PredictionError: There is a file already.
    """
    from eval.predictions import line_of

    if path is None:
        yield lambda reply: None
        return
    try:
        file = path.open("xb", buffering=0)
    except FileExistsError:
        raise PredictionError(
            f"--out {path}: there is such a file already. Give another name, or remove it."
        ) from None

    def write(reply: LiveReply) -> None:
        file.write(line_of(reply.prediction))

    with file:
        yield write
    err.print(f"replies: {path}", markup=False, highlight=False, soft_wrap=True)


def _stopped(n_done: int, n: int, out_file: Path | None) -> str:
    where = "" if out_file is None else f" The replies so far are in {out_file}."
    return f"stopped after {n_done} of {n} clips.{where} Name the others, with another --out, to go on."


def _text(path: Path) -> str:
    """Return a path as text that can be printed, whatever bytes it is made of."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _document(file: ClipFile, seen: SeenClip, reply: LiveReply) -> dict[str, Any]:
    """Return what `--json` says of a clip."""
    prediction = reply.prediction
    return {
        "file": _text(file.path),
        "uid": prediction.uid,
        "label": reply.label,
        "labels": list(reply.labels),
        "reply": reply.reply,
        "reasoning": reply.reasoning,
        "parse": prediction.parse,
        "offered": list(reply.options),
        "likelihoods": prediction.likelihoods,
        "n_tokens": prediction.n_tokens,
        "duration_s": seen.duration_s,
        "subtitle": None if prediction.about is None else prediction.about.subtitle,
        "streams": {stream: clip.status.value for stream, clip in seen.streams.items()},
        "masked": list(prediction.masked),
        "remarks": list(seen.remarks),
        "error": None,
    }


def _print_reply(file: ClipFile, seen: SeenClip, reply: LiveReply) -> None:
    """Print a clip, what was read in the reply, the reply itself if it is more, and what to know."""
    what = Text(_text(file.path))
    if seen.duration_s is not None:
        what.append(f" ({seen.duration_s:.1f} s)", style="dim")
    if reply.options:
        said = ", ".join(reply.labels) or (
            "no label: the reply is empty" if not reply.reply else "no label of the list"
        )
        what.append(": ").append(said, style="bold" if reply.labels else "yellow")
    out.print(what, highlight=False, soft_wrap=True)
    if reply.reasoning is not None:
        out.print(Text(f"  {reply.reasoning}"), highlight=False, soft_wrap=True)
    if reply.reply and (not reply.labels or not reply.options):
        out.print(Text(f"  {reply.reply}"), highlight=False, soft_wrap=True)
    for line in bars(reply.likelihoods or {}):
        out.print(Text(f"  {line}"), highlight=False, soft_wrap=True)
    for remark in seen.remarks:
        out.print(Text(f"  {remark}", style="dim"), highlight=False, soft_wrap=True)


def bars(likelihoods: Mapping[str, float]) -> list[str]:
    """Return a line with a bar for each label, the likeliest first; of many, the first twelve."""
    from eval.formats import percent

    ranked = sorted(likelihoods.items(), key=lambda item: -item[1])
    width = max((len(label) for label, _ in ranked[:_MOST_BARS]), default=0)
    lines = [
        f"{label:<{width}} {percent(share):>6} % {'█' * round(_BAR_WIDTH * share)}".rstrip()
        for label, share in ranked[:_MOST_BARS]
    ]
    if len(ranked) > _MOST_BARS:
        rest = sum(share for _, share in ranked[_MOST_BARS:])
        lines.append(f"{percent(rest)} % for {len(ranked) - _MOST_BARS} more labels")
    return lines
