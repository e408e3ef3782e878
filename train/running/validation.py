"""Teacher-forced validation: loss and token accuracy on records that are never trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import nn

from cache.clip import Record
from train.batches.loading import to_device
from train.batches.reading import ViewReader
from train.config import Preset, StageConfig, stage_tasks
from train.data import collate, model_arguments
from train.mixture import Ask, can_answer
from train.packing import Grouper, Pack
from train.running.parallel import Processes
from train.text.tasks import TASK_TABLE, Task, tasks_of


class Validation:
    """The validation of one stage: the same questions every time."""

    def __init__(
        self,
        records: Sequence[Record],
        stage: StageConfig,
        preset: Preset,
        reader: ViewReader,
        grouper: Grouper,
    ) -> None:
        """Render and pack the questions, one per record and task of the stage.

        Of a family every record answers all tasks that it can.

        Args:
            records: Of the validation split.
            stage: Whose tasks are asked.
            preset: Numbers of records and clips at a time.
            reader: Reads tokens.
            grouper: Renders questions.
        """
        self._preset, self._reader = preset, reader
        chosen = sorted(records, key=lambda r: hashlib.sha256(r.uid.encode()).digest())
        chosen = chosen[: preset.execution.max_val_records]
        asked = (tasks_of(name) for name in stage_tasks(stage))
        tasks: list[Task] = list(dict.fromkeys(task for of_name in asked for task in of_name))
        groups = [
            grouper.group(record, [Ask(task, 0)], TASK_TABLE[task].hides, with_answer=True)
            for record in chosen
            for task in tasks
            if can_answer(record, task, reader.streams_of)
        ]
        groups.sort(key=lambda g: g.n_positions)
        size = stage.optim.batch_size
        if stage.optim.max_tokens is not None and groups:
            size = max(1, stage.optim.max_tokens // groups[-1].n_positions)
        self._packs: list[Pack] = [tuple(groups[i : i + size]) for i in range(0, len(groups), size)]
        self._tasks = tasks

    def __len__(self) -> int:
        return sum(len(pack) for pack in self._packs)

    @torch.no_grad()
    def run(self, model: nn.Module, processes: Processes) -> dict[str, float]:
        """Return `val_loss` and `val_token_accuracy`, over all tasks and by task; all must call."""
        was_training = model.training
        model.eval()
        sums = torch.zeros(len(self._tasks), 3, dtype=torch.float64)  # answers, loss, accuracy
        # Every process runs as many forward passes, as sharded models must; surplus ones count 0.
        n_rounds = -(-len(self._packs) // processes.n)
        for i in range(n_rounds):
            number = i * processes.n + processes.rank
            pack = self._packs[min(number, len(self._packs) - 1)]
            views = self._reader.read([g.record for g in pack], [g.hidden for g in pack])
            batch = to_device(collate(self._preset, pack, views), processes.device)
            found = model(**model_arguments(batch))
            if number >= len(self._packs):
                continue
            losses, correct = found["answer_loss"].cpu(), found["answer_correct"].cpu()
            for task, loss, accuracy in zip(batch["tasks"], losses, correct, strict=True):
                row = self._tasks.index(task)  # type: ignore[arg-type]
                sums[row] += torch.tensor([1.0, float(loss), float(accuracy)], dtype=torch.float64)
        model.train(was_training)
        sums = processes.sum_of(sums)
        return self._numbers(sums)

    def _numbers(self, sums: torch.Tensor) -> dict[str, float]:
        def means(row: torch.Tensor, suffix: str) -> dict[str, float]:
            n, loss, accuracy = row.tolist()
            return {
                f"val_loss{suffix}": loss / n,
                f"val_token_accuracy{suffix}": accuracy / n,
            }

        found = means(sums.sum(dim=0), "")
        if len(self._tasks) > 1:
            for task, row in zip(self._tasks, sums, strict=True):
                if row[0]:
                    found |= means(row, f"_{task}")
        return found
