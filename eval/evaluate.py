"""Score a run on a split, under one or several conditions, and write predictions and reports.

Records are scored within the label space that their prompts listed. Where a manifest has corpora with
spaces of their own, each space has scores and a report for itself.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from cache.clip import Record
from cache.errors import ManifestError, MissingDependencyError, SchemaError, near_miss
from cache.files import write_text_aside
from cache.labels import LabelField, LabelSpace
from cache.manifest import Manifest
from cache.store import TokenStore
from eval.generate import TrainedRun, check_masked, generate, load_run
from eval.parse import LabelReading, parse_last_word
from eval.predictions import Prediction, write_predictions
from eval.report.data import ReportData, ScoreRow
from eval.report.gather import (
    Group,
    examples_of,
    explaining_task,
    method_of,
    notes_of,
    prompt_of,
    provenance_of,
    score_group,
    store_rows,
    throughput_of,
    weights_of,
)
from eval.report.history import read_history
from eval.report.page import write_report
from eval.results.examples import choice_of, choose_examples
from train.batches.reading import ViewReader, usable
from train.text.tasks import SEVERAL_LABELS, TASK_TABLE, check_task

N_EXAMPLES = 24
"""Clips that a report shows one by one."""

MASKS: dict[str, tuple[str, ...]] = {
    "audio": ("audio",),
    "video": ("video",),
    "image": ("image",),
    "picture": ("image", "video"),
}
"""What `--mask` may name; a picture is what both visual streams see."""

SCORED = tuple(task for task, row in TASK_TABLE.items() if row.label not in (None, "emotion_ov"))
"""Tasks that can be evaluated: any words are a reply to `open-vocabulary`, so none can be off the list."""


@dataclass(frozen=True)
class Evaluation:
    """Where an evaluation left its files, and its scores."""

    predictions: Path
    scores: Path
    report_html: Path
    report_md: Path
    """Of the first label space, as `report_html`."""
    rows: tuple[ScoreRow, ...]
    """The first is without masks. With several label spaces, each name starts with the corpora."""
    clips_per_s: float
    reports: tuple[Path, ...]
    """The HTML report of each label space."""


def evaluate(
    run: Path,
    manifest: Manifest,
    store: TokenStore,
    *,
    split: str,
    task: str = "emotion",
    masks: Sequence[str] = (),
    batch_size: int = 16,
    max_new_tokens: int = 200,
    device: str = "cpu",
    out: Path | None = None,
    overrides: Sequence[str] = (),
    weights: Literal["final", "best"] = "final",
    stage: str | None = None,
    likelihoods: bool = False,
    reading: LabelReading = "label",
    n_examples: int = N_EXAMPLES,
    reasoning_tokens: int = 0,
    media: Path | None = None,
    about_data: Sequence[str] = (),
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Generate, parse, score, report.

    Writes predictions.jsonl, scores.json, statistics.json (intervals, tests, calibration, slices) and the
    report.

    Args:
        run: A folder that `train` finished.
        manifest: Records with labels.
        store: Committed tokens.
        split: Which records.
        task: One of `SCORED`: names a label, with reasoning before it or without.
        masks: Further conditions, each with the named streams hidden; see `MASKS`.
        batch_size: Records per batch.
        max_new_tokens: Longest reply.
        device: Torch device.
        out: Output folder; default `RUN/eval-SPLIT-TASK`, with the stage and `-best` behind it where they
            are asked for.
        overrides: `key=value` settings that differ from the run's, for example `data.failed=drop`.
        weights: Those at the end of a stage, or those of its best validation.
        stage: Which of the run's finished stages; None takes the last.
        likelihoods: Compute the probability of every offered label beside each reply.
        reading: How a label is read in a reply: `label` by the steps of `eval.parse`, `last-word` as
            Emotion-LLaMA's scorer does, which is for tasks whose reply is one label.
        n_examples: Clips that a report shows one by one; 0: none.
        reasoning_tokens: Where the task asks for no reasoning, ask for it about the clips of the examples
            too, under every condition, in replies of this length at most: by the joint task of the label,
            or by `reason` where the run's instructions have only that. They are written to
            `examples.jsonl` and enter no score. 0: do not.
        media: The media root, so that examples have pictures; None: they have none.
        about_data: What the report says of the data, a paragraph each.
        on_batch: Called with the number of replies done.

    Raises:
        SchemaError: Unknown task or mask, a mask that hides nothing that the run reads, or a reading that
            does not fit the task.
        ManifestError: No labelled record in the split.
        CheckpointError: Not a finished run, or `best` of a stage that never validated.
        MissingDependencyError: scikit-learn, matplotlib or jinja2 is not installed.
    """
    field = TASK_TABLE[check_task(task)].label
    if field is None or task not in SCORED:
        raise SchemaError(
            f"task '{task}' names no label of a list, so it has no score here. "
            f"Use one of: {', '.join(SCORED)}."
        )
    if reading == "last-word" and (field in SEVERAL_LABELS or TASK_TABLE[check_task(task)].joint):
        raise SchemaError(
            f"the reading last-word is for replies that are one label, those to '{task}' are more. Use "
            "the reading label."
        )
    _check_libraries()
    conditions = [("all streams", ()), *((f"{name} masked", mask_streams(name)) for name in masks)]
    trained = load_run(run, device, overrides, weights, manifest.header, stage)
    for _, streams in conditions:
        check_masked(trained.preset, streams)
    reader = ViewReader(store, trained.preset)
    chosen = manifest.select(split)
    records = [r for r in usable(chosen, reader, trained.preset.data) if r.labels_of(field)]
    if not records:
        raise ManifestError(
            f"split {split!r}: none of its {len(chosen)} records has a label in '{field}' and tokens to score"
        )
    groups = _by_space(records, field, trained)

    def ask(
        about: Sequence[Record], task: str, masked: Sequence[str], longest: int, closed: bool
    ) -> list[Prediction]:
        return list(
            generate(
                trained,
                store,
                about,
                task=task,
                masked=masked,
                max_new_tokens=longest,
                batch_size=batch_size,
                likelihoods=closed,
                on_batch=on_batch,
            )
        )

    started = time.monotonic()
    replies = {
        name: ask(records, task, streams, max_new_tokens, likelihoods)
        for name, streams in conditions
    }
    if reading == "last-word":
        spaces = {uid: group.space for group in groups for uid in group.uids}
        replies = {
            name: [by_last_word(p, spaces[p.uid]) for p in found] for name, found in replies.items()
        }
    n_replies = len(records) * len(conditions)
    clips_per_s = n_replies / (time.monotonic() - started)
    predictions = [p for found in replies.values() for p in found]
    behind = f"{'' if stage is None else f'-{stage}'}{'-best' if weights == 'best' else ''}"
    out = out or run / f"eval-{split}-{task}{behind}"
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / "predictions.jsonl", predictions)
    scored = [score_group(replies, group, field, several=len(groups) > 1) for group in groups]
    every_row = tuple(row for of_group in scored for row in of_group.rows)
    scores = {row.name: row.scores.model_dump(mode="json") for row in every_row}
    write_text_aside(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    others = {
        row.name: row.model_dump(mode="json", exclude={"name", "scores"}) for row in every_row
    }
    write_text_aside(out / "statistics.json", json.dumps(others, indent=2) + "\n")
    by_uid = {record.uid: record for record in records}
    asked_too: list[Prediction] = []
    folders = _folders([group.name for group in groups])
    written = []
    for found in scored:
        shown = choose_examples(found.first, n_examples, choice_of)
        joint = explaining_task(task, trained) if reasoning_tokens else None
        reasons: list[Prediction] = []
        if joint is not None and shown:
            clips = [by_uid[p.uid] for p in shown]
            for _, streams in conditions:
                reasons += ask(clips, joint, streams, reasoning_tokens, False)
        asked_too += reasons
        of_group = f", {found.group.name}" if len(groups) > 1 else ""
        data = ReportData(
            title=f"{trained.preset.name}: {task} on split {split}{of_group}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            preset=trained.preset.name,
            run_path=str(run),
            weights=weights_of(run, trained, weights),
            store_path=str(store.root),
            rows=found.rows,
            about=tuple(about_data),
            method=method_of(trained, found, max_new_tokens, reading),
            prompt=prompt_of(trained, by_uid[found.first[0].uid], task),
            likelihoods=found.likelihoods,
            examples=examples_of(found, shown, reasons, by_uid, media) if shown else None,
            history=read_history(run / "metrics.jsonl"),
            throughput=throughput_of(trained, clips_per_s),
            store=store_rows(store, reader),
            parsing=found.parsing,
            provenance=provenance_of(trained, reader, str(predictions[0].pool_id)),
            notes=notes_of(found, len(chosen) - len(records), split),
        )
        folder = out / folders[found.group.name] if len(groups) > 1 else out
        written.append(write_report(data, folder))
    if asked_too:
        write_predictions(out / "examples.jsonl", asked_too)
    html, markdown = written[0]
    return Evaluation(
        predictions=out / "predictions.jsonl",
        scores=out / "scores.json",
        report_html=html,
        report_md=markdown,
        rows=every_row,
        clips_per_s=clips_per_s,
        reports=tuple(page for page, _ in written),
    )


def by_last_word(prediction: Prediction, space: LabelSpace) -> Prediction:
    """Return a prediction with its reply read again."""
    read = parse_last_word(prediction.reply, space.labels)
    return prediction.model_copy(update={"label": read.label, "parse": read.how})


def _folders(names: Sequence[str]) -> dict[str, str]:
    """Return a folder for each name: the name without what a file system may not like."""
    found: dict[str, str] = {}
    for name in names:
        folder = re.sub(r"[^\w-]+", "-", name).strip("-") or "other"
        found[name] = folder if folder not in found.values() else f"{folder}-{len(found) + 1}"
    return found


def _by_space(
    records: Sequence[Record], field: LabelField, trained: TrainedRun
) -> tuple[Group, ...]:
    """Group records by their label space, in the order of their first records.

    Raises:
        ManifestError: A record without a space, or with a label outside: the run was trained on others.
    """
    spaces: list[LabelSpace] = []
    groups: list[list[Record]] = []
    for record in records:
        space = trained.header.space(record.corpus, field)
        if space is None:
            raise ManifestError(
                f"{record.uid}: neither the run nor the manifest has a label space for '{field}' of "
                f"corpus '{record.corpus}'. Index the corpus again with its labels."
            )
        for label in record.labels_of(field):
            if not space.holds(label):
                raise ManifestError(
                    f"{record.uid}: {space.refusal(label)} These are the labels that the run was trained "
                    "to name; index the corpus with them, and others as aliases."
                )
        if space not in spaces:
            spaces.append(space)
            groups.append([])
        groups[spaces.index(space)].append(record)
    return tuple(
        Group(
            space,
            ", ".join(dict.fromkeys(r.corpus for r in group)),
            frozenset(r.uid for r in group),
        )
        for space, group in zip(spaces, groups, strict=True)
    )


def _check_libraries() -> None:
    """Refuse before the model runs for an hour, not after."""
    missing = [n for n in ("sklearn", "matplotlib", "jinja2") if find_spec(n) is None]
    if missing:
        raise MissingDependencyError(
            f"scores and reports need {', '.join(missing)}: pip install 'emocache[eval]'"
        )


def mask_streams(name: str) -> tuple[str, ...]:
    """Return the streams that a mask hides; raises SchemaError for an unknown one."""
    if name not in MASKS:
        raise SchemaError(
            f"unknown mask '{name}'.{near_miss(name, MASKS)} Allowed: {', '.join(MASKS)}"
        )
    return MASKS[name]
