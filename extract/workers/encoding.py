"""The encoding stage of a worker: decoded clips in, results out, in batches across clips."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cache.commit import ClipTokens, Status
from cache.spec import TokenSpec
from extract.encoders.bank import EncoderBank, EncoderInput
from extract.failures import FailureRate
from extract.inputs import ClipInputs, StreamInput
from extract.jobs.session import WorkerSession
from extract.workers.results import encoded, encoder_input, is_cut, unencoded
from extract.workers.unit import Batch, Clock, UnitWork

logger = logging.getLogger(__name__)

Settle = Callable[[UnitWork, TokenSpec, int, ClipTokens], None]
"""Takes a clip's result: the unit, the spec, the clip's position in the unit, the result."""


@dataclass
class _Waiting:
    """The clips of a batch that have come so far."""

    n_arrived: int = 0
    inputs: dict[int, tuple[EncoderInput, StreamInput, bool]] = field(default_factory=dict)
    """Position -> what is encoded, how it was chosen, and whether it was cut."""


class EncodingStage:
    """Collects the clips of each batch, and runs the encoder once the last has come."""

    def __init__(
        self,
        bank: EncoderBank,
        labels: Mapping[str, str],
        session: WorkerSession,
        rate: FailureRate,
        clock: Clock,
        settle: Settle,
    ) -> None:
        """Start with nothing waiting.

        Args:
            bank: The encoders.
            labels: spec_id -> label.
            session: Told which clips are in the encoder, before it runs.
            rate: Told how each clip ended.
            clock: Told where the time went.
            settle: Takes the results.
        """
        self._bank, self._labels, self._session = bank, labels, session
        self._rate, self._clock, self._settle = rate, clock, settle
        self._waiting: dict[Batch, _Waiting] = {}
        self.n_clips = 0
        self.n_failed = 0

    def take(self, unit: UnitWork, position: int, inputs: ClipInputs) -> None:
        """Take a decoded clip, and encode the batches that it completes.

        Raises:
            ExtractionStopped: Most clips of late failed.
            EncoderError: The device failed.
        """
        record = unit.records[position]
        failure = inputs.failure
        if failure is not None:
            logger.info("%s: %s", record.uid, failure.reason)
        self._rate.add(None if failure is None else failure.kind, record.media)
        self.n_clips += 1
        self.n_failed += failure is not None
        unit.progress.n_clips += 1
        for clock in (unit.progress.seconds, self._clock):
            clock.decode_cpu_s += inputs.decode_cpu_s
        for spec, stream in zip(unit.specs_of(position), inputs.streams, strict=True):
            batch = unit.batch_of(spec, position)
            waiting = self._waiting.setdefault(batch, _Waiting())
            waiting.n_arrived += 1
            clip = unencoded(spec, record, stream)
            if clip is not None:
                self._settle(unit, spec, position, clip)
            else:
                given = encoder_input(inputs, stream)
                waiting.inputs[position] = (given, stream, is_cut(spec, inputs))
            if waiting.n_arrived == len(batch.positions):
                del self._waiting[batch]
                self._encode(unit, spec, waiting)

    def _encode(self, unit: UnitWork, spec: TokenSpec, waiting: _Waiting) -> None:
        positions = sorted(waiting.inputs)
        if not positions:
            return
        clips = tuple(unit.records[p].sha256 for p in positions)
        # Written before the encoder runs: should this process die, its successor knows with what.
        self._session.beat(encoding=clips, encoding_alone=len(clips) == 1)
        began_s = time.monotonic()
        found = self._bank.encode(spec, [waiting.inputs[p][0] for p in positions])
        took_s = time.monotonic() - began_s
        for clock in (unit.progress.seconds, self._clock):
            clock.encode_s[self._labels[spec.spec_id]] += took_s
        for position, tokens in zip(positions, found, strict=True):
            _, stream, cut = waiting.inputs[position]
            clip = encoded(spec, unit.records[position], stream, tokens, is_cut=cut)
            self.n_failed += clip.status is Status.FAILED
            self._settle(unit, spec, position, clip)
        self._session.update(
            encoding=(),
            n_clips=self.n_clips,
            n_failed=self.n_failed,
            seconds=self._clock.told(),
            gpu_busy=self._gpu_busy(),
        )

    def _gpu_busy(self) -> float | None:
        """Return the share of this worker's life in which its GPU encoded; None without one."""
        worker = self._session.state
        if not worker.device.startswith("cuda"):
            return None
        lived_s = time.time() - worker.started_s
        return min(1.0, sum(self._clock.encode_s.values()) / lived_s) if lived_s > 0 else None
