"""Instruction samples as JSON lines for other trainers, and previews for people.

The text is that of training: same template, options, labels and description for a seed and a pass, with the
subtitle clause and the task's identifier, but without our `<Vid>` tags and without a chat template, which
the other trainer brings. A record is asked each task that it can answer, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

from cache.clip import Record
from cache.errors import ManifestError, SchemaError
from cache.files import write_aside
from cache.manifest import Header, Manifest
from train.config import Preset
from train.mixture import Ask
from train.presets import v2
from train.prompt import RENDERER_VERSION, RenderedPrompt
from train.text.tasks import Asked, Task, available_tasks, tasks_of, unknown
from train.text.turns import LLAMA_2
from train.text.wording import Wording

ExportStyle = Literal["llava", "sharegpt"]
EXPORT_STYLES: tuple[ExportStyle, ...] = get_args(ExportStyle)
Medium = Literal["video", "image", "audio"]
_SUFFIXES: Mapping[str, Medium] = {
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus", ".aac"), "audio"),
}  # fmt: skip
"""What a file is that nobody looked at; all others are videos."""


class Preview(NamedTuple):
    """How one task is asked about a record in training."""

    task: Task
    prompt: str
    """With LLaMA-2's turns; the prefix tokens are named, since they are no text."""
    answer: str


def export_conversations(
    records: Manifest | Iterable[Record],
    path: Path,
    *,
    header: Header | None = None,
    style: ExportStyle = "llava",
    preset: Preset | None = None,
    tasks: Sequence[Asked] | None = None,
    split: str | None = None,
    seed: int | None = None,
    epoch: int = 0,
) -> int:
    """Write the questions and answers of a training as JSON lines, one conversation each.

    Args:
        records: A manifest, or records one by one, for example of `cache.manifest.iter_records`.
        path: The file; an older one is replaced, once all is written.
        header: Of the records, for their label spaces; a manifest has its own.
        style: `llava`: id, video (or image, or audio), conversations, metadata. `sharegpt`, which
            LLaMA-Factory reads: conversations, videos (or images, or audios), metadata.
        preset: Prompt settings and seed; None takes those of `v2`.
        tasks: Tasks and families to ask; None asks all that the instructions have templates for.
        split: Leaves out records of other splits.
        seed: Another than the preset's.
        epoch: Pass: other passes have other wordings and orders of options.

    Returns:
        Conversations written.

    Raises:
        ManifestError: No record can be asked anything, or one has no label space.
        SchemaError: An unknown style or task, or a record that cannot be rendered; nothing is replaced.
    """
    if style not in EXPORT_STYLES:
        raise unknown("style", style, EXPORT_STYLES)
    if isinstance(records, Manifest):
        header, records = records.header, records.records
    if header is None:
        raise ManifestError("records one by one need the header of their manifest: header=...")
    chosen = v2() if preset is None else preset
    if seed is not None:
        chosen = chosen.model_copy(update={"seed": seed})
    asked = None if tasks is None else {task for name in tasks for task in tasks_of(name)}
    wording = Wording(chosen, header)
    pool_id = wording.pools.pool_id
    make = _llava if style == "llava" else _sharegpt
    n = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            if split is not None and record.split != split:
                continue
            for task, prompt in _samples(record, wording, asked, epoch):
                row = make(record, task, prompt)
                row["metadata"] = {
                    "corpus": record.corpus,
                    "task": task,
                    "pool_id": pool_id,
                    "renderer_version": RENDERER_VERSION,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                n += 1
        if not n:
            of_split = "" if split is None else f" of split {split!r}"
            of_tasks = "any task" if tasks is None else " or ".join(tasks)
            raise ManifestError(
                f"nothing to export: no record{of_split} can answer {of_tasks}. Nothing was written."
            )
    return n


def preview(record: Record, header: Header, preset: Preset) -> list[Preview]:
    """Return how each task that a record can answer is asked in the first pass of a training.

    Tasks without templates in the preset's instructions are left out.

    Raises:
        ManifestError: The record's corpus has no label space for a task.
        SchemaError: Damaged instructions, or an answer that cannot be rendered.
    """
    layout = preset.layout()
    return [
        Preview(task, prompt.shown(layout), prompt.answer or "")
        for task, prompt in _samples(record, Wording(preset, header), None, 0)
    ]


def _samples(
    record: Record, wording: Wording, tasks: set[Task] | None, epoch: int
) -> Iterator[tuple[Task, RenderedPrompt]]:
    """Yield what is asked about a record."""
    for task in available_tasks(record):
        if wording.pools.has(task) if tasks is None else task in tasks:
            try:
                yield task, wording.render(record, Ask(task, epoch), with_answer=True)
            except SchemaError as error:
                raise SchemaError(f"{record.uid}, task '{task}': {error}") from None


def _question(prompt: RenderedPrompt) -> str:
    """Return the text behind our tags: subtitle clause, identifier, instruction."""
    return prompt.tail.partition("> ")[2].removesuffix(LLAMA_2[1])


def _medium(record: Record) -> Medium:
    clip = record.clip
    if clip is None or clip.has_image is None:
        return _SUFFIXES.get(PurePosixPath(record.media).suffix.lower(), "video")
    if clip.has_video:
        return "video"
    return "image" if clip.has_image else "audio"


def _turns(record: Record, prompt: RenderedPrompt) -> list[dict[str, str]]:
    return [
        {"from": "human", "value": f"<{_medium(record)}>\n{_question(prompt)}"},
        {"from": "gpt", "value": prompt.answer or ""},
    ]


def _llava(record: Record, task: Task, prompt: RenderedPrompt) -> dict[str, Any]:
    return {
        "id": f"{record.uid}#{task}",
        _medium(record): record.media,
        "conversations": _turns(record, prompt),
    }


def _sharegpt(record: Record, task: Task, prompt: RenderedPrompt) -> dict[str, Any]:
    return {"conversations": _turns(record, prompt), f"{_medium(record)}s": [record.media]}
