"""One record in readable form, and how training asks about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cache.clip import Clip, Record
from cache.labels import LABEL_FIELDS
from cache.manifest import Header
from eval.formats import human_size
from train.config import Preset
from train.mixture import Ask
from train.text.export import Preview, preview
from train.text.instructions import LABELS_SLOT, InstructionPools
from train.text.wording import Wording


class Asked(NamedTuple):
    """How one task is asked in the first pass of a training, and by which choices."""

    preview: Preview
    template_id: str
    """Digest of the pools, task and place in its pool: `1a2b3c4d/emotion/17`."""
    n_templates: int
    """Of the task's pool."""
    options: tuple[str, ...]
    """In the order in which the prompt lists them; none for tasks without a choice."""


def asked_of(record: Record, header: Header, preset: Preset) -> list[Asked]:
    """Return how training asks each task that a record can answer.

    Raises:
        ManifestError: The record's corpus has no label space for a task.
        SchemaError: Damaged instructions, or an answer that cannot be rendered.
    """
    wording = Wording(preset, header)
    found = []
    for one in preview(record, header, preset):
        template, options = wording.instruction(record, Ask(one.task, 0))
        listed = options if LABELS_SLOT in template else ()
        n_templates = len(wording.pools.of(one.task))
        found.append(Asked(one, _template_id(wording.pools, one, template), n_templates, listed))
    return found


def _template_id(pools: InstructionPools, one: Preview, template: str) -> str:
    return f"{pools.pool_id}/{one.task}/{pools.of(one.task).index(template)}"


def record_view(record: Record, header: Header) -> Group:
    """Return everything that is known of a record, in readable form."""
    note = header.corpora.get(record.corpus)
    corpus = record.corpus if note is None or not note.title else f"{record.corpus} ({note.title})"
    axes = ", ".join(f"{axis} {value}" for axis, value in record.split_axes.items())
    native = f" (source: {record.split_native})" if record.split_native else ""
    facts = {
        "corpus": corpus,
        "licence": None if note is None else note.licence,
        "split": f"{record.split or 'none'}{native}",
        "other partitions": axes,
        "benchmarks": ", ".join(record.benchmarks),
        "parent": record.parent,
        "speaker": record.speaker,
        "person in prompts": record.person,
        "spoken language": record.language,
    }
    parts: list[RenderableType] = [Text(record.uid, style="bold"), _grid(facts)]
    media = {"file": f"{record.media} (below {header.media_root})", **_clip_facts(record.clip)}
    parts += [_head("media"), _grid(media)]
    labels = dict(_labels(record, header))
    parts += [_head("labels"), _grid(labels) if labels else _indented(Text("none", "dim"))]
    if record.subtitles:
        parts.append(_head("subtitles"))
        for subtitle in record.subtitles:
            where = ", ".join(filter(None, (subtitle.language, subtitle.origin)))
            parts.append(_indented(_said(subtitle.text, where)))
    if record.peak is not None or record.action_units:
        parts += [_head("evidence"), _grid(dict(_evidence(record)))]
    if record.descriptions:
        parts.append(_head("descriptions"))
        for one in record.descriptions:
            who = " ".join(filter(None, (one.model, one.version))) or "came with the corpus"
            where = ", ".join(
                filter(
                    None,
                    (
                        one.kind,
                        one.target and f"explains {one.target}",
                        who,
                        one.prompt_id and f"prompt {one.prompt_id}",
                    ),
                )
            )
            parts.append(_indented(_said(one.text, where)))
    return Group(*parts)


def asked_view(found: list[Asked], preset_name: str, seed: int) -> Group:
    """Return prompts and answers as training renders them."""
    parts: list[RenderableType] = [_head(f"as {preset_name} asks it, seed {seed}, first pass")]
    for one in found:
        facts = {
            "template": f"{one.template_id} of {one.n_templates}",
            "options": ", ".join(one.options),
            "prompt": one.preview.prompt,
            "answer": one.preview.answer,
        }
        parts += [_indented(Text(one.preview.task, style="bold")), _grid(facts)]
    if not found:
        parts.append(_indented(Text("no task can be asked: the record has no labels and no texts")))
    return Group(*parts)


def _clip_facts(clip: Clip | None) -> dict[str, str | None]:
    if clip is None:
        return {"clip": "its media were not looked at"}
    streams = {"video": clip.has_video, "sound": clip.has_audio, "picture": clip.has_image}
    there = [name for name, has in streams.items() if has]
    size = f"{clip.width_px}x{clip.height_px} px" if clip.width_px else None
    rate = f"{clip.sample_rate_hz:,} Hz" if clip.sample_rate_hz else None
    n_frames = None if clip.n_frames is None else f"{clip.n_frames:,} frames"
    return {
        "SHA-256": clip.sha256,
        "size": human_size(clip.n_bytes),
        "duration": None if clip.duration_s is None else f"{clip.duration_s:.3f} s",
        "streams": ", ".join(there) or "unknown: the container could not be opened",
        "container": clip.container,
        "video": ", ".join(filter(None, (clip.video_codec, size, n_frames))),
        "sound": ", ".join(filter(None, (clip.audio_codec, rate))),
    }


def _labels(record: Record, header: Header) -> Iterator[tuple[str, str]]:
    for field in LABEL_FIELDS:
        labels = record.labels_of(field)
        if not labels:
            continue
        space = header.space(record.corpus, field)
        text = ", ".join(labels)
        if space is not None:
            rest = ", ".join(space.labels[:30]) + (", ..." if len(space.labels) > 30 else "")
            text += f"   (of {space.name}: {rest}{'; or any word' if space.open else ''})"
        yield field, text
    for name in ("sentiment_score", "valence", "arousal", "dominance"):
        value = getattr(record, name)
        if value is not None:
            key = f"{record.corpus}/{'vad' if name != 'sentiment_score' else name}"
            scale = header.scales.get(key)
            yield name, f"{value:g}" + (f"   (from {scale[0]:g} to {scale[1]:g})" if scale else "")


def _evidence(record: Record) -> Iterator[tuple[str, str]]:
    if record.peak is not None:
        peak = record.peak
        at = "" if peak.pts_s is None else f" at {peak.pts_s:.3f} s"
        score = "" if peak.score is None else f", score {peak.score:.3g}"
        how = f", by {peak.method}" if peak.method else ""
        yield "peak", f"frame {peak.index}{at}{score}{how}"
    if record.action_units:
        strongest = sorted(record.action_units.items(), key=lambda item: (-item[1], item[0]))
        yield "action units", ", ".join(f"{unit} {value:.2f}" for unit, value in strongest)


def _head(text: str) -> Text:
    return Text(f"\n{text}", style="bold cyan")


def _said(text: str, where: str) -> Text:
    return Text.assemble((f"{where}: ", "dim"), text)


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, 2))


def _grid(facts: Mapping[str, str | None]) -> Padding:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts.items():
        if value:
            grid.add_row(name, Text(value))
    return _indented(grid)
