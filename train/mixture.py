"""Which clip comes when, and what is asked about it: a pure function of the seed and the place.

The sequence has no end and can be entered at any place, so a resumed run, or another number of
processes, sees the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cache.clip import Record
from cache.errors import ManifestError, near_miss
from cache.spec import STREAMS, Stream
from train.config import StageConfig, stage_tasks
from train.text.instructions import choose_task
from train.text.tasks import FAMILIES, TASK_TABLE, Asked, Task, tasks_of

StreamsOf = Callable[[Record], Collection[Stream]]
"""Which streams of a record have tokens."""

_BLOCK = 1024
"""Draws made at once; counts are kept at the borders of blocks."""


@dataclass(frozen=True)
class Ask:
    """One question about a clip."""

    task: Task
    epoch: int
    """Pass over the records; wording and option order change with it."""
    options: tuple[str, ...] | None = None
    """Labels to offer, in lower case and in this order, whatever the space of the record's corpus holds,
    as a benchmark fixes them; None: those of the space."""


@dataclass(frozen=True)
class Sample:
    """One draw: a record and the questions about it."""

    place: int
    record: Record
    asks: tuple[Ask, ...]
    hidden: tuple[Stream, ...] = ()
    """Streams that modality dropout masks."""


@dataclass(frozen=True)
class _Cell:
    """The records of one corpus that one task, or one of a family, can be asked about."""

    corpus: str
    asked: Asked
    records: tuple[Record, ...]
    weight: float


class Mixture:
    """An endless sequence of samples.

    A (corpus, task) pair is drawn by its share. Within it every record comes once before any comes
    twice, in a new order each pass. Further questions about a drawn clip follow the shares of the
    tasks that its record can answer. A family counts as one task here; which of its tasks is asked
    depends on seed, record and pass.
    """

    def __init__(
        self,
        records: Sequence[Record],
        stage: StageConfig,
        seed: int,
        streams_of: StreamsOf | None = None,
    ) -> None:
        """Lay out the shares.

        Args:
            records: What may be drawn.
            stage: Tasks, corpora, pairs per clip, modality dropout.
            seed: Equal seeds give equal sequences.
            streams_of: Keeps a task that sees one stream from records without it; None: all have all.

        Raises:
            ManifestError: A task that has a share finds no record, or a corpus none.
        """
        self._stage, self._seed = stage, seed
        self._streams_of: StreamsOf = streams_of or (lambda record: STREAMS)
        self._cells = self._lay_out(records)
        weights = np.array([cell.weight for cell in self._cells])
        self._p = weights / weights.sum()
        self._before = [np.zeros(len(self._cells), np.int64)]
        self._drawn = lru_cache(maxsize=8)(self._draw_block)
        self._order = lru_cache(maxsize=4 * len(self._cells))(self._draw_order)

    def __getitem__(self, place: int) -> Sample:
        block, at = divmod(place, _BLOCK)
        while len(self._before) <= block:
            last = self._drawn(len(self._before) - 1)
            counts = np.bincount(last, minlength=len(self._cells))
            self._before.append(self._before[-1] + counts)
        drawn = self._drawn(block)
        number = int(drawn[at])
        cell = self._cells[number]
        nth = int(self._before[block][number]) + int(np.count_nonzero(drawn[:at] == number))
        epoch, nth = divmod(nth, len(cell.records))
        record = cell.records[int(self._order(number, epoch)[nth])]
        rng = np.random.default_rng([self._seed, 2, place])
        asks = self._asks(cell, record, epoch, rng)
        return Sample(place, record, asks, self._hidden(rng))

    def _draw_block(self, block: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self._seed, 0, block])
        return rng.choice(len(self._cells), size=_BLOCK, p=self._p)

    def _draw_order(self, cell: int, epoch: int) -> npt.NDArray[np.int64]:
        rng = np.random.default_rng([self._seed, 1, cell, epoch])
        return rng.permutation(len(self._cells[cell].records))

    def _asks(
        self, cell: _Cell, record: Record, epoch: int, rng: np.random.Generator
    ) -> tuple[Ask, ...]:
        n = self._stage.pairs_per_clip
        if n == 1:
            return (self._ask(cell.asked, record, epoch),)
        shares = {
            asked: share
            for asked, share in stage_tasks(self._stage, cell.corpus).items()
            if self._answerable(record, asked)
        }
        p = np.array(list(shares.values()))
        more = rng.choice(len(shares), size=n - 1, p=p / p.sum())
        names = [cell.asked, *(list(shares)[i] for i in more)]
        # Another epoch is another wording and another order of options.
        return tuple(self._ask(asked, record, n * epoch + i) for i, asked in enumerate(names))

    def _ask(self, asked: Asked, record: Record, epoch: int) -> Ask:
        tasks = self._answerable(record, asked)
        if asked not in FAMILIES:
            return Ask(tasks[0], epoch)
        return Ask(choose_task(tasks, self._seed, record.uid, epoch), epoch)

    def _answerable(self, record: Record, asked: Asked) -> tuple[Task, ...]:
        """Return the tasks that a name stands for with this record."""
        return tuple(t for t in tasks_of(asked) if can_answer(record, t, self._streams_of))

    def _hidden(self, rng: np.random.Generator) -> tuple[Stream, ...]:
        shares = self._stage.modality_dropout
        if not shares:
            return ()
        drawn = rng.random(len(shares))
        return tuple(s for s, x in zip(shares, drawn, strict=True) if x < shares[s])

    def _lay_out(self, records: Sequence[Record]) -> list[_Cell]:
        stage = self._stage
        names = {corpus: c.weight for corpus, c in stage.corpora.items() if c.weight > 0} or {
            "": 1.0
        }
        cells = []
        for corpus, weight in names.items():
            own = [r for r in records if not corpus or r.corpus == corpus]
            if not own:
                known = sorted({r.corpus for r in records})
                raise ManifestError(
                    f"stage '{stage.name}': no training record is of corpus '{corpus}'."
                    f"{near_miss(corpus, known)} The manifest has: {', '.join(known) or 'none'}."
                )
            tasks = stage_tasks(stage, corpus)
            total = sum(tasks.values())
            for asked, share in tasks.items():
                pool = tuple(r for r in own if self._answerable(r, asked))
                if not pool:
                    where = f" of corpus '{corpus}'" if corpus else ""
                    if any(TASK_TABLE[task].answerable(r) for task in tasks_of(asked) for r in own):
                        hides = TASK_TABLE[tasks_of(asked)[0]].hides
                        shown = " and ".join(s for s in STREAMS if s not in hides)
                        raise ManifestError(
                            f"task '{asked}' is shown {shown} alone, and the model reads such tokens of "
                            f"none of the {len(own)} records{where}. Set the task's share to 0, or give "
                            "the model that input."
                        )
                    raise ManifestError(
                        f"task '{asked}' needs records with {_needs(asked)}, and none of the "
                        f"{len(own)}{where} has that. Index with a table that holds them, or "
                        "set the task's share to 0."
                    )
                cells.append(_Cell(corpus, asked, pool, weight * share / total))
        return cells


def can_answer(record: Record, task: Task, streams_of: StreamsOf) -> bool:
    """Return whether a record has what a task needs, and a stream that the task may see."""
    row = TASK_TABLE[task]
    if not row.answerable(record):
        return False
    return not row.hides or any(s not in row.hides for s in streams_of(record))


def _needs(asked: Asked) -> str:
    """Say what the records of a task, or of any task of a family, must have."""
    return ", or ".join(TASK_TABLE[task].needs() for task in tasks_of(asked))
