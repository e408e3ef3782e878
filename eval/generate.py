"""A trained run and cached tokens to replies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache.clip import Record
from cache.errors import CheckpointError
from cache.manifest import Header
from cache.spec import STREAMS
from cache.store import TokenStore
from eval.parse import ParseHow, parse_labels, parse_reply
from eval.predictions import Prediction
from train.backbone import context_length
from train.checkpoint import best_folder, load_trained
from train.config import Preset, configure
from train.data import Renderer, collate
from train.loading import to_device
from train.mixture import Ask
from train.model import EmotionLlama, build
from train.packing import Grouper
from train.prompt import RENDERER_VERSION
from train.reading import ViewReader
from train.run import RunInfo, read_run
from train.tasks import SEVERAL_LABELS, TASK_TABLE, Task, check_task
from train.wording import Wording


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded."""

    preset: Preset
    info: RunInfo
    model: EmotionLlama
    tokenizer: Any
    header: Header
    """Holds what it names: the label spaces of the run, and those that the run lacks of the manifest that it
    is asked about."""


def load_run(
    run: Path,
    device: str = "cpu",
    overrides: Sequence[str] = (),
    weights: Literal["final", "best"] = "final",
    header: Header | None = None,
) -> TrainedRun:
    """Load the model of a run's last finished stage.

    Args:
        run: A folder that `train` finished.
        device: Torch device.
        overrides: `key=value` settings that differ from the run's, for example `data.failed=drop`.
        weights: Those at the end of the stage, or those of its best validation.
        header: Of the manifest that the run will be asked about, for label spaces that the run does not
            bring: of other corpora, or all of an imported checkpoint.

    Raises:
        SchemaError: An unknown setting.
        CheckpointError: Not a run, no finished stage, or a checkpoint that does not fit.
    """
    preset, info = read_run(run)
    preset = configure(preset, overrides)
    if not info.finished:
        raise CheckpointError(
            f"{run}: no stage is finished yet. Continue it with the same `emocache train` command."
        )
    spaces = {**({} if header is None else header.label_spaces), **info.label_spaces}
    if not spaces:
        raise CheckpointError(
            f"{run}: an imported checkpoint without labels of its own, and the manifest has none. Index "
            "with --labels, so that there is something to name."
        )
    stage = run / info.finished[-1]
    folder = stage / "final" if weights == "final" else best_folder(stage)
    if folder is None:
        raise CheckpointError(
            f"{stage}: it never validated, so there is no best. Use the final weights, or train with "
            "records in data.val_split."
        )
    model, tokenizer = build(preset)
    load_trained(model, folder)
    return TrainedRun(
        preset,
        info,
        model.eval().to(device),
        tokenizer,
        Header(media_root=".", label_spaces=spaces),
    )


def generate(
    trained: TrainedRun,
    store: TokenStore,
    records: Sequence[Record],
    *,
    task: str = "emotion",
    masked: Collection[str] = (),
    max_new_tokens: int = 200,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> Iterator[Prediction]:
    """Ask the model about every record, greedily, in batches.

    Args:
        trained: The model.
        store: Tokens of the specs that the run was trained on.
        records: Whom to ask about; none may be without tokens.
        task: One of `TASKS`.
        masked: Streams that the model does not get.
        max_new_tokens: Longest reply; the reference uses 200.
        batch_size: Records per batch.
        on_batch: Called with the number of records done.

    Yields:
        One prediction per record, in order.
    """
    reader = ViewReader(store, trained.preset)
    renderer = Renderer(trained.preset, trained.tokenizer, trained.header)
    wording, pool_id = renderer.wording, renderer.wording.pools.pool_id
    limit = context_length(trained.model.llm.get_base_model())
    grouper = Grouper(trained.preset, reader, renderer, limit)
    ask = Ask(check_task(task), 0)
    hidden = tuple(s for s in STREAMS if s in masked or s in TASK_TABLE[ask.task].hides)
    spec_ids = {str(stream): spec.spec_id for stream, spec in reader.specs.items()}
    device = next(trained.model.parameters()).device
    for start in range(0, len(records), batch_size):
        pack = records[start : start + batch_size]
        groups = [grouper.group(record, [ask], hidden, with_answer=False) for record in pack]
        views = reader.read(pack, [hidden] * len(pack))
        batch = to_device(collate(trained.preset, groups, views), device)
        replies = trained.model.reply(
            tokens=batch["tokens"],
            masks=batch["masks"],
            text_ids=batch["text_ids"],
            order=batch["order"],
            segments=batch["segments"],
            max_new_tokens=max_new_tokens,
            stop_ids=renderer.turns.stop_ids,
        )
        for record, ids in zip(pack, replies, strict=True):
            reply = str(trained.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            yield Prediction(
                uid=record.uid,
                task=task,
                masked=tuple(masked),
                reply=reply,
                **_read(reply, record, ask.task, wording),
                run=trained.info.run_id,
                spec_ids=spec_ids,
                pool_id=pool_id,
                renderer_version=RENDERER_VERSION,
            )
        if on_batch is not None:
            on_batch(len(pack))


def _read(reply: str, record: Record, task: Task, wording: Wording) -> dict[str, Any]:
    """Return the fields of a prediction that hold what was named and what is true."""
    field = TASK_TABLE[task].label
    if field is None:  # a description is text and names nothing
        how: ParseHow = "off_list" if reply else "empty"
        return {"label": None, "parse": how, "truth": None}
    truths = record.labels_of(field)
    space = wording.space(record, field)
    if field not in SEVERAL_LABELS:
        one = parse_reply(reply, space.labels, space.aliases)
        return {"label": one.label, "parse": one.how, "truth": next(iter(truths), None)}
    found = parse_labels(reply, space.labels, space.aliases, is_open=space.open)
    return {
        "label": None,
        "labels": found.labels,
        "unread": found.unread,
        "parse": found.how,
        "truth": None,
        "truths": truths,
    }
