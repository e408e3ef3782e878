"""Which sample comes when: a pure function of the seed, so that a resumed run sees the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cache.clip import Record
from cache.errors import ManifestError
from train.prompt import Task


@dataclass(frozen=True)
class Sample:
    """One draw: a record, what to ask about it, and in which pass over the data."""

    record: Record
    task: Task
    epoch: int
    """Pass over the records of this task; instructions and option order change with it."""


class Mixture:
    """A fixed sequence of samples.

    Tasks are drawn by their shares; within a task every record comes once before any comes twice,
    in a new order each pass.
    """

    def __init__(
        self, records: Sequence[Record], tasks: Mapping[Task, float], n_samples: int, seed: int
    ) -> None:
        """Lay out the sequence.

        Args:
            records: What may be drawn.
            tasks: Task -> share.
            n_samples: Length of the sequence.
            seed: Equal seeds give equal sequences.

        Raises:
            ManifestError: No record can serve a task that has a share.
        """
        rng = np.random.default_rng(seed)
        names = [task for task, share in tasks.items() if share > 0]
        shares = np.array([tasks[task] for task in names])
        drawn = rng.choice(len(names), size=n_samples, p=shares / shares.sum())
        self._names = names
        self._pools = [_eligible(records, task) for task in names]
        self._task = drawn.astype(np.int16)
        self._record = np.zeros(n_samples, np.int64)
        self._epoch = np.zeros(n_samples, np.int64)
        for number, pool in enumerate(self._pools):
            places = np.flatnonzero(drawn == number)
            n_passes = -(-len(places) // len(pool))
            order = [rng.permutation(len(pool)) for _ in range(n_passes)]
            if order:
                self._record[places] = np.concatenate(order)[: len(places)]
            self._epoch[places] = np.arange(len(places)) // len(pool)

    def __len__(self) -> int:
        return len(self._task)

    def __getitem__(self, place: int) -> Sample:
        number = int(self._task[place])
        record = self._pools[number][int(self._record[place])]
        return Sample(record, self._names[number], int(self._epoch[place]))


def _eligible(records: Sequence[Record], task: Task) -> list[Record]:
    pool = [r for r in records if r.label is not None and (task != "think" or r.description)]
    if not pool:
        needs = "a label and a description" if task == "think" else "a label"
        raise ManifestError(
            f"task '{task}' needs records with {needs}, and none of the {len(records)} has that. "
            f"Index with a --labels table that holds them, or set the task's share to 0."
        )
    return pool
