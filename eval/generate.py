"""A trained run and cached tokens to replies."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.clip import Record
from cache.errors import CheckpointError
from cache.store import TokenStore
from eval.parse import parse_reply
from eval.predictions import Prediction
from train.checkpoint import RunInfo, load_trained, read_run
from train.config import Preset, configure
from train.data import Item, Renderer, ViewReader, collate
from train.model import EmotionLlama, build


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, loaded."""

    preset: Preset
    info: RunInfo
    model: EmotionLlama
    tokenizer: Any


def load_run(run: Path, device: str = "cpu", overrides: Sequence[str] = ()) -> TrainedRun:
    """Load the model of a run's last finished stage.

    Args:
        run: A folder that `train` finished.
        device: Torch device.
        overrides: `key=value` settings that differ from the run's, for example `data.failed=drop`.

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
    model, tokenizer = build(preset)
    load_trained(model, run / info.finished[-1] / "final")
    return TrainedRun(preset, info, model.eval().to(device), tokenizer)


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
        task: `emotion` or `think`.
        masked: Streams that the model does not get.
        max_new_tokens: Longest reply; the reference uses 200.
        batch_size: Records per batch.
        on_batch: Called with the number of records done.

    Yields:
        One prediction per record, in order.
    """
    reader = ViewReader(store, trained.preset)
    labels = trained.info.label_space
    renderer = Renderer(trained.preset, trained.tokenizer, labels)
    spec_ids = {str(stream): spec.spec_id for stream, spec in reader.specs.items()}
    device = next(trained.model.parameters()).device
    for start in range(0, len(records), batch_size):
        pack = records[start : start + batch_size]
        batch = collate(
            [
                Item(
                    reader.read(record, masked),
                    renderer.prompt(record, task, 0, with_answer=False),
                )
                for record in pack
            ]
        )
        replies = trained.model.reply(
            tokens={name: t.to(device) for name, t in batch["tokens"].items()},
            masks={name: t.to(device) for name, t in batch["masks"].items()},
            head_ids=batch["head_ids"].to(device),
            text_ids=batch["text_ids"].to(device),
            text_mask=batch["text_mask"].to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=int(trained.tokenizer.eos_token_id),
        )
        for record, ids in zip(pack, replies, strict=True):
            reply = str(trained.tokenizer.decode(ids, skip_special_tokens=True)).strip()
            parsed = parse_reply(reply, labels.labels, labels.aliases)
            yield Prediction(
                uid=record.uid,
                task=task,
                masked=tuple(masked),
                reply=reply,
                label=parsed.label,
                parse=parsed.how,
                truth=record.label,
                run=trained.info.run_id,
                spec_ids=spec_ids,
            )
        if on_batch is not None:
            on_batch(len(pack))
