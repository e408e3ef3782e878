"""Batches, prepared ahead by threads, so that the model never waits for the store.

Threads, not processes: a batch of the paper's tokens is 7 MB a clip, which a process would hand over
page fault by page fault, while the store's reader copies without holding Python's lock. One thread
plans (renders and tokenizes, in order); the others read tokens and lay out batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from train.batches.reading import ViewReader
from train.config import Preset
from train.data import PrefixBatch, collate
from train.packing import Pack, Planner, Step


@dataclass(frozen=True)
class LoadedStep:
    """A step with this process's batches."""

    step: Step
    batches: tuple[PrefixBatch, ...]
    wait_s: float
    """How long the caller waited for it."""


class Loader:
    """The steps of a plan, each with the batches of one process."""

    def __init__(
        self,
        planner: Planner,
        reader: ViewReader,
        preset: Preset,
        *,
        loss_average: Literal["sample", "token"],
        rank: int = 0,
        n_processes: int = 1,
    ) -> None:
        """Read for process `rank` of `n_processes`; `preset.execution` says how far ahead."""
        self._planner, self._reader, self._preset = planner, reader, preset
        self._loss_average: Literal["sample", "token"] = loss_average
        self._rank, self._n = rank, n_processes

    def build(self, pack: Pack) -> PrefixBatch:
        """Read and lay out one pack."""
        views = self._reader.read([g.record for g in pack], [g.hidden for g in pack])
        return collate(self._preset, pack, views, self._loss_average)

    def steps(self, n_steps: int) -> Iterator[LoadedStep]:
        """Yield the next steps.

        Raises:
            CorruptTokensError: Stored tokens are damaged or not finite.
            SchemaError: A sample that does not fit.
        """
        if not self._preset.execution.n_workers:
            for _ in range(n_steps):
                started = time.perf_counter()
                step = self._planner.next_step()
                batches = tuple(map(self.build, self._mine(step)))
                yield LoadedStep(step, batches, time.perf_counter() - started)
            return
        yield from self._steps_ahead(n_steps)

    def _mine(self, step: Step) -> tuple[Pack, ...]:
        return step.packs[self._rank :: self._n]

    def _steps_ahead(self, n_steps: int) -> Iterator[LoadedStep]:
        execution = self._preset.execution
        ahead: deque[Future[tuple[Step, list[Future[PrefixBatch]]]]] = deque()
        n_asked = 0
        with (
            ThreadPoolExecutor(1, "emocache-plan") as planning,
            ThreadPoolExecutor(execution.n_workers, "emocache-load") as building,
        ):

            def prepare() -> tuple[Step, list[Future[PrefixBatch]]]:
                step = self._planner.next_step()
                return step, [building.submit(self.build, pack) for pack in self._mine(step)]

            try:
                for _ in range(n_steps):
                    while n_asked < n_steps and len(ahead) < execution.n_ahead:
                        ahead.append(planning.submit(prepare))
                        n_asked += 1
                    started = time.perf_counter()
                    step, futures = ahead.popleft().result()
                    batches = tuple(future.result() for future in futures)
                    yield LoadedStep(step, batches, time.perf_counter() - started)
            finally:
                planning.shutdown(cancel_futures=True)
                building.shutdown(cancel_futures=True)


def to_device(batch: PrefixBatch, device: torch.device) -> PrefixBatch:
    """Return a batch on a device; from page-locked memory the copy does not wait."""

    def moved(value: object) -> object:
        if isinstance(value, torch.Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, dict):
            return {name: moved(item) for name, item in value.items()}
        return value

    return {name: moved(value) for name, value in batch.items()}  # type: ignore[return-value]
