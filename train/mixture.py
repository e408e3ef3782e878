"""Which clip comes when, and what is asked about it: a pure function of the seed and the place.

The sequence has no end and can be entered at any place, so a resumed run, or another number of
processes, sees the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cache.clip import Record
from cache.errors import ManifestError, near_miss
from cache.spec import STREAMS, Stream
from train.config import StageConfig
from train.tasks import TASK_HIDES, TASK_NEEDS, Task

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
    """The records of one corpus that one task can be asked about."""

    corpus: str
    task: Task
    records: tuple[Record, ...]
    weight: float


class Mixture:
    """An endless sequence of samples.

    A (corpus, task) pair is drawn by its share. Within it every record comes once before any comes
    twice, in a new order each pass. Further questions about a drawn clip follow the shares of the
    tasks that its record can answer.
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
            return (Ask(cell.task, epoch),)
        shares = {
            t: s
            for t, s in _tasks(self._stage, cell.corpus).items()
            if can_answer(record, t, self._streams_of)
        }
        p = np.array(list(shares.values()))
        more = rng.choice(len(shares), size=n - 1, p=p / p.sum())
        tasks = [cell.task, *(list(shares)[i] for i in more)]
        # Another epoch is another wording and another order of options.
        return tuple(Ask(task, n * epoch + i) for i, task in enumerate(tasks))

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
            own = [r for r in records if not corpus or corpus_of(r) == corpus]
            if not own:
                known = sorted({corpus_of(r) for r in records})
                raise ManifestError(
                    f"stage '{stage.name}': no training record is of corpus '{corpus}'."
                    f"{near_miss(corpus, known)} The manifest has: {', '.join(known) or 'none'}."
                )
            tasks = _tasks(stage, corpus)
            total = sum(tasks.values())
            for task, share in tasks.items():
                pool = tuple(r for r in own if can_answer(r, task, self._streams_of))
                if not pool:
                    needs = " and ".join(f"a{'n' * (n[0] in 'aei')} {n}" for n in TASK_NEEDS[task])
                    where = f" of corpus '{corpus}'" if corpus else ""
                    raise ManifestError(
                        f"task '{task}' needs records with {needs}, and none of the {len(own)}{where} has "
                        "that. Index with a --labels table that holds them, or set the task's share to 0."
                    )
                cells.append(_Cell(corpus, task, pool, weight * share / total))
        return cells


def corpus_of(record: Record) -> str:
    """Return the first part of a record's uid."""
    return record.uid.partition("/")[0]


def can_answer(record: Record, task: Task, streams_of: StreamsOf) -> bool:
    """Return whether a record has what a task needs, and a stream that the task may see."""
    if not all(getattr(record, name) for name in TASK_NEEDS[task]):
        return False
    hidden = TASK_HIDES.get(task, ())
    return not hidden or any(s not in hidden for s in streams_of(record))


def _tasks(stage: StageConfig, corpus: str) -> Mapping[Task, float]:
    """Return the tasks that have a share in a corpus."""
    own = stage.corpora[corpus].tasks if corpus in stage.corpora else None
    return {task: share for task, share in (own or stage.tasks).items() if share > 0}
