"""Score a run on a split, under one or several conditions, and write predictions and reports.

Records are scored within the label space that their prompts listed. Where a manifest has corpora with
spaces of their own, each space has scores and a report for itself.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cache.clip import Record
from cache.commit import Status
from cache.errors import ManifestError, MissingDependencyError, SchemaError, near_miss
from cache.files import write_text_aside
from cache.labels import LabelField, LabelSpace
from cache.manifest import Manifest
from cache.spec import STREAMS
from cache.store import TokenStore
from eval.generate import TrainedRun, generate, load_run
from eval.metrics import (
    MultiLabelScores,
    SingleLabelScores,
    score_multi_label,
    score_single_label,
)
from eval.predictions import Prediction, write_predictions
from eval.report import (
    Fact,
    HistoryRow,
    OffListReply,
    Parsing,
    ReportData,
    ScoreRow,
    StoreRow,
    write_report,
)
from train.checkpoint import best_folder
from train.reading import ViewReader, usable
from train.tasks import SEVERAL_LABELS, TASK_TABLE, check_task

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
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Generate, parse, score, report.

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
        out: Output folder; default `RUN/eval-SPLIT-TASK`, with `-best` behind it for those weights.
        overrides: `key=value` settings that differ from the run's, for example `data.failed=drop`.
        weights: Those at the end of the run's last finished stage, or those of its best validation.
        on_batch: Called with the number of replies done.

    Raises:
        SchemaError: Unknown task or mask.
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
    _check_libraries()
    conditions = [("all streams", ()), *((f"{name} masked", mask_streams(name)) for name in masks)]
    trained = load_run(run, device, overrides, weights, manifest.header)
    reader = ViewReader(store, trained.preset)
    chosen = manifest.select(split)
    records = [r for r in usable(chosen, reader, trained.preset.data) if r.labels_of(field)]
    if not records:
        raise ManifestError(
            f"split {split!r}: none of its {len(chosen)} records has a label in '{field}' and tokens to score"
        )
    groups = _by_space(records, field, trained)
    predictions: list[Prediction] = []
    rows: list[list[ScoreRow]] = [[] for _ in groups]
    started = time.monotonic()
    for name, streams in conditions:
        found = list(
            generate(
                trained,
                store,
                records,
                task=task,
                masked=streams,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_batch=on_batch,
            )
        )
        predictions += found
        for number, group in enumerate(groups):
            own = [p for p in found if p.uid in group.uids]
            shown = f"{group.name}: {name}" if len(groups) > 1 else name
            rows[number].append(ScoreRow(name=shown, scores=_score(own, group.space, field)))
    clips_per_s = len(predictions) / (time.monotonic() - started)
    out = out or run / f"eval-{split}-{task}{'-best' if weights == 'best' else ''}"
    out.mkdir(parents=True, exist_ok=True)
    write_predictions(out / "predictions.jsonl", predictions)
    every_row = tuple(row for of_group in rows for row in of_group)
    scores = {row.name: row.scores.model_dump(mode="json") for row in every_row}
    write_text_aside(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    folders = _folders([group.name for group in groups])
    written = []
    for group, own_rows in zip(groups, rows, strict=True):
        of_group = f", {group.name}" if len(groups) > 1 else ""
        data = ReportData(
            title=f"{trained.preset.name}: {task} on split {split}{of_group}",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            preset=trained.preset.name,
            run_path=str(run),
            weights=_weights(run, trained, weights),
            store_path=str(store.root),
            rows=tuple(own_rows),
            history=read_history(run / "metrics.jsonl"),
            throughput=_throughput(trained, clips_per_s),
            store=_store_rows(store, reader),
            parsing=_parsing([p for p in predictions if p.uid in group.uids]),
            provenance=_provenance(trained, reader, str(predictions[0].pool_id)),
            notes=_notes(len(group.uids), len(chosen) - len(records), split),
        )
        written.append(write_report(data, out / folders[group.name] if len(groups) > 1 else out))
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


@dataclass(frozen=True)
class _Group:
    """Records that are scored together: their prompts listed the labels of one space."""

    space: LabelSpace
    name: str
    """Their corpora."""
    uids: frozenset[str]


def _folders(names: Sequence[str]) -> dict[str, str]:
    """Return a folder for each name: the name without what a file system may not like."""
    found: dict[str, str] = {}
    for name in names:
        folder = re.sub(r"[^\w-]+", "-", name).strip("-") or "other"
        found[name] = folder if folder not in found.values() else f"{folder}-{len(found) + 1}"
    return found


def _by_space(
    records: Sequence[Record], field: LabelField, trained: TrainedRun
) -> tuple[_Group, ...]:
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
        _Group(
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


def _score(
    predictions: Sequence[Prediction], space: LabelSpace, field: LabelField
) -> SingleLabelScores | MultiLabelScores:
    parses = [p.parse for p in predictions]
    if field in SEVERAL_LABELS:
        return score_multi_label(
            [p.truths for p in predictions],
            [p.labels for p in predictions],
            space.labels,
            parses,
            [p.unread for p in predictions],
        )
    return score_single_label(
        [p.truth for p in predictions], [p.label for p in predictions], space.labels, parses
    )


def read_history(path: Path) -> tuple[HistoryRow, ...]:
    """Read a run's metrics.jsonl: one row per step, of training, validation or both.

    A step has a line for each of the two. Nothing is there of a run that logged nothing, and the
    unfinished last line of a killed process is left out.
    """
    if not path.is_file():
        return ()
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row or "val_loss" in row:
            steps.setdefault((row["stage"], row["step"]), {}).update(row)
    return tuple(
        HistoryRow(
            stage=stage,
            step=step,
            loss=row.get("loss"),
            learning_rate=row.get("learning_rate"),
            clips_per_s=row.get("samples_per_s"),
            tokens_per_s=row.get("tokens_per_s"),
            data_wait=row.get("data_wait"),
            val_loss=row.get("val_loss"),
            val_token_accuracy=row.get("val_token_accuracy"),
        )
        for (stage, step), row in steps.items()
    )


def _weights(run: Path, trained: TrainedRun, weights: Literal["final", "best"]) -> str:
    """Say which weights were scored; the step counts within the stage, as the folder's name does."""
    stage = trained.info.finished[-1]
    if weights == "final":
        return f"final, at the end of {stage}"
    folder = best_folder(run / stage)
    assert folder is not None  # they were loaded
    metric = trained.preset.execution.best_metric.replace("_", " ")
    return f"best validation {metric}: {stage}/{folder.name}"


def _throughput(trained: TrainedRun, clips_per_s: float) -> tuple[Fact, ...]:
    facts = [Fact(name="generation", value=clips_per_s, unit="replies/s")]
    for stage in trained.preset.stages:
        seconds = trained.info.seconds.get(stage.name)
        if seconds:
            n = stage.n_steps * stage.optim.batch_size * stage.optim.accumulate
            if stage.optim.max_tokens is None:  # else as many clips as fit
                facts.append(
                    Fact(name=f"training, {stage.name}", value=n / seconds, unit="clips/s")
                )
            facts.append(Fact(name=f"duration, {stage.name}", value=seconds, unit="s"))
    return tuple(facts)


def _store_rows(store: TokenStore, reader: ViewReader) -> tuple[StoreRow, ...]:
    rows = []
    for stream in STREAMS:
        spec = reader.specs[stream]
        index = store.index(spec)
        counts = index.counts()
        rows.append(
            StoreRow(
                stream=stream,
                spec_id=spec.spec_id,
                n_ok=counts[Status.OK],
                n_absent=counts[Status.ABSENT],
                n_failed=counts[Status.FAILED],
                size_bytes=index.n_bytes,
            )
        )
    return tuple(rows)


def _parsing(predictions: Sequence[Prediction]) -> Parsing:
    bad = [p for p in predictions if p.parse == "off_list"]
    return Parsing(
        counts=dict(Counter(p.parse for p in predictions)),
        examples=tuple(
            OffListReply(uid=p.uid, truth=p.truth or ", ".join(p.truths) or None, reply=p.reply)
            for p in bad[:5]
        ),
    )


def _provenance(trained: TrainedRun, reader: ViewReader, pool_id: str) -> dict[str, str]:
    return {
        "run": trained.info.run_id,
        "seed": str(trained.preset.seed),
        "instructions": pool_id,
        "language model": trained.preset.model.llm.path,
        "trained parameters": f"{sum(trained.info.trainable.values()):,}",
        **{f"{stream} spec": spec.spec_id for stream, spec in reader.specs.items()},
        **{
            f"{stream} view": getattr(trained.preset.views, stream).definition(spec)
            for stream, spec in reader.specs.items()
        },
        **trained.info.versions,
    }


def _notes(n_scored: int, n_left_out: int, split: str) -> tuple[str, ...]:
    notes = [f"{n_scored} records of split {split!r} are scored under every condition."]
    if n_left_out:
        notes.append(
            f"{n_left_out} records of the split are left out: no label, or no tokens by the choice "
            "of data.absent and data.failed."
        )
    return tuple(notes)
