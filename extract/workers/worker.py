"""One worker: claims units, has their clips decoded, encodes them batch by batch, commits.

Every engine runs this same loop: in the front's own process, in Dask workers, in the tasks of a job
array. Workers know of one another only through the job in the store.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cache.clip import Record
from cache.commit import Status
from cache.errors import EmocacheError
from cache.schema import decode_json
from cache.spec import TokenSpec
from cache.storage import is_quick
from cache.store import TokenStore
from extract.config import WorkerConfig
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool, Prepared
from extract.encoders.bank import EncoderBank
from extract.faces import open_faces_for
from extract.failures import Failure, FailureRate, kind_of
from extract.inputs import InputRequest, all_failed, request_of
from extract.jobs import blame
from extract.jobs.job import Job
from extract.jobs.session import WorkerSession, WorkerState
from extract.plan import unique_labels
from extract.sources import MediaSource, open_source
from extract.workers.commits import Committer
from extract.workers.drain import Drain, after, on_signals, registered
from extract.workers.encoding import EncodingStage
from extract.workers.ledger import Ledger
from extract.workers.log import log_file, log_path
from extract.workers.loop import planned_records
from extract.workers.unit import Clock, UnitWork

Requests = tuple[InputRequest, ...]
logger = logging.getLogger(__name__)

_IDLE_S = 2.0
"""Pause between two looks for a unit, while others hold all that are left."""
_POLL_S = 0.1
_AHEAD = 4
"""Decoded clips that wait for the encoders, beside those that are being decoded."""


def work(
    config_json: str,
    rank: int = 0,
    *,
    records: Sequence[Record] | None = None,
    bank: EncoderBank | None = None,
    on_clip: Callable[[], None] | None = None,
) -> str:
    """Work on a job until all its units are done, or until something asks to end.

    Args:
        config_json: A `WorkerConfig`.
        rank: Number of this worker on its machine, which chooses among several GPUs.
        records: The manifest's, for a caller that has them at hand.
        bank: Encoders on the right device, for a caller that has them at hand.
        on_clip: Called for each decoded clip.

    Returns:
        The worker's last `WorkerState` as JSON.

    Raises:
        EmocacheError: The work cannot go on: a full disk, a wrong checkpoint, most clips failing.
            Everything committed stays.
    """
    config = decode_json(WorkerConfig, config_json.encode(), "the worker's configuration")
    drain = Drain()
    with registered(drain), on_signals(drain), after(drain, config.drain_after_s):
        return _Worker(config, rank, drain, records, bank, on_clip).run().model_dump_json()


@dataclass
class _Ahead:
    """A clip whose decoding was asked for."""

    unit: UnitWork
    position: int
    future: Future[Prepared]


class _Worker:
    """What `work` does, and what it has in hand."""

    def __init__(
        self,
        config: WorkerConfig,
        rank: int,
        drain: Drain,
        records: Sequence[Record] | None,
        bank: EncoderBank | None,
        on_clip: Callable[[], None] | None,
    ) -> None:
        self._config = config
        self._drain = drain
        self._given_records, self._given_bank = records, bank
        self._on_clip = on_clip
        self._device = _device(config.device, rank)
        self._store = TokenStore.open(config.store)
        self._job = Job.open(self._store.storage, config.job_id, config.generation)
        self._clock = Clock()
        self._ahead: deque[_Ahead] = deque()
        self._feeding: Iterator[tuple[UnitWork, int]] = iter(())

    def run(self) -> WorkerState:
        config, log = self._config, log_path(self._config)
        session = WorkerSession(
            self._store.storage, self._job.root,
            session=config.session, engine=config.engine, device=self._device, log=log,
            heartbeat_s=config.heartbeat_s, lease_timeout_s=config.lease_timeout_s,
        )  # fmt: skip
        with log_file(log), session:
            logger.info("worker %s starts on %s", session.worker_id, self._device)
            self._session = session
            self._records = planned_records(config, self._job, self._given_records)
            self._source: MediaSource = open_source(config.media_root)
            self._faces = open_faces_for(config.specs, config.faces)
            bank = self._load_encoders()
            with ExitStack() as stack:
                self._pool = stack.enter_context(self._decoders())
                self._fetchers = stack.enter_context(
                    ThreadPoolExecutor(self._n_ahead, thread_name_prefix="fetch")
                )
                self._committer = stack.enter_context(
                    Committer(TokenStore.open(config.store), self._clock)
                )
                stack.callback(self._pool.close)
                self._set_up_stages(bank)
                self._loop()
            session.close(self._drain.reason)
            logger.info(
                "worker %s ends: %s", session.worker_id, self._drain.reason or "no work is left"
            )
            return session.state

    # ---------------------------------------------------------------- setting up

    def _load_encoders(self) -> EncoderBank:
        import torch

        if self._device == "cpu":
            torch.set_num_threads(self._config.threads)
        bank = self._given_bank
        if bank is None:
            weights = {spec_id: Path(path) for spec_id, path in self._config.weights.items()}
            bank = EncoderBank(
                self._config.specs, weights, self._device, self._config.precision,
                compile_blocks=self._config.compile,
            )  # fmt: skip
        for spec in self._config.specs:
            self._store.check_probe(spec, bank.probe(spec))
        return bank

    def _decoders(self) -> DecodePool:
        config = self._config
        return DecodePool(
            config.n_decoders,
            deadline_s=config.deadline_s,
            memory_bytes=config.memory_bytes,
            recycle_after=config.recycle_after,
            attempts=config.attempts,
            command=config.decoder_command,
            detector=None if self._faces is None else self._faces.detector,
        )

    def _set_up_stages(self, bank: EncoderBank) -> None:
        planned = self._job.plan.specs
        by_spec = zip(planned, unique_labels(planned), strict=True)
        labels = {spec.spec_id: label for spec, label in by_spec}
        self._ledger = Ledger(
            self._job, self._store, self._committer, self._session, bank, labels,
            faces=None if self._faces is None else self._faces.title,
        )  # fmt: skip
        rate = FailureRate(self._config.max_failure_share)
        self._stage = EncodingStage(
            bank, labels, self._session, rate, self._clock, self._ledger.settle
        )

    @property
    def _n_ahead(self) -> int:
        return self._config.n_decoders + _AHEAD

    # ---------------------------------------------------------------- the loop

    def _loop(self) -> None:
        try:
            while not self._should_end():
                self._committer.check()
                self._fill()
                if self._ahead:
                    self._take_next()
                elif not self._wait_for_units():
                    break
            if self._should_end():
                self._pool.close(wait=False)
                self._ledger.give_up(self._drain.reason)
            self._committer.flush()
        except EmocacheError as error:
            self._ledger.hand_back(f"{type(error).__name__}")
            raise

    def _should_end(self) -> bool:
        if self._session.should_stop.is_set():
            self._drain.request("told to stop")
        return self._drain.is_set()

    def _wait_for_units(self) -> bool:
        """Wait a little while others hold all units that are left; False if none is."""
        self._ledger.trust()
        self._committer.flush()
        if not self._job.undone():
            return False
        began_s = time.monotonic()
        self._drain.wait(min(_IDLE_S, self._config.heartbeat_s))
        self._clock.idle_s += time.monotonic() - began_s
        return True

    def _take_next(self) -> None:
        """Take the next decoded clip, and encode the batches that it completes."""
        following = self._ahead[0]
        unit, position = following.unit, following.position
        began_s = time.monotonic()
        prepared = self._result(following.future)
        waited_s = time.monotonic() - began_s
        for clock in (unit.progress.seconds, self._clock):
            clock.decode_wait_s += waited_s
        if prepared is None:
            return
        self._ahead.popleft()
        if isinstance(prepared, DecodeFailure):
            self._note_evidence(unit.records[position], prepared)
            prepared = all_failed(self._requests(unit, position), prepared.failure)
        elif (failure := prepared.failure) is not None:
            found = DecodeFailure(failure, 1, facts=prepared.facts)
            self._note_evidence(unit.records[position], found)
        self._session.update(decoding=self._pool.in_flight())
        self._stage.take(unit, position, prepared)
        if self._on_clip is not None:
            self._on_clip()

    def _result(self, future: Future[Prepared]) -> Prepared | None:
        """Wait for a clip; None if the worker should end first."""
        while not self._should_end():
            try:
                return future.result(timeout=_POLL_S)
            except TimeoutError:
                self._committer.check()
            except CancelledError:
                return None
        return None

    # ---------------------------------------------------------------- units

    def _fill(self) -> None:
        """Have clips decoded ahead, of the next unit too: the encoders need not wait at its start."""
        while len(self._ahead) < self._n_ahead and not self._should_end():
            following = next(self._feeding, None)
            if following is not None:
                unit, position = following
                self._ahead.append(_Ahead(unit, position, self._decode(unit, position)))
                continue
            claimed = self._claim()
            if claimed is None:
                return
            self._feeding = ((claimed, position) for position in claimed.positions)

    def _claim(self) -> UnitWork | None:
        """Take a unit and look what it still lacks: it may be partly committed."""
        held = [unit.claim.unit for unit in self._ledger.units]
        claim = self._job.claim(self._session, exclude=held)
        if claim is None:
            return None
        records = [self._records[row] for row in claim.rows]
        if claim.attempt or is_quick(self._store.storage):
            # Only a unit that somebody held before can be committed in part. That others commit the
            # same clips for another job is looked up where it costs little; else they stand there twice.
            for spec in claim.specs:
                self._store.catch_up(spec)
        missing = {spec.spec_id: self._missing(spec, records) for spec in claim.specs}
        suspects = blame.suspects(self._job, claim, records)
        unit = UnitWork(claim, records, missing, self._config.tokens_per_batch, suspects.alone)
        logger.info("unit %d: %d clips to decode", claim.unit, len(unit.positions))
        self._session.update(unit=claim.unit)
        self._ledger.add(unit)
        for position in unit.positions:
            if records[position].sha256 in suspects.guilty:
                self._quarantine(unit, position)
        return unit

    def _missing(self, spec: TokenSpec, records: Sequence[Record]) -> set[str]:
        """Return the keys of records without tokens, or whose failure is to be tried again."""
        index, retry = self._store.index(spec), self._job.plan.retry
        sources = self._store.sources(spec)
        missing = set()
        for record in records:
            key = record.token_key(spec)
            found = self._store.find(sources, key)
            entry = found[1] if found is not None else index.get(key)
            if entry is None or (
                entry.status is Status.FAILED and retry and kind_of(entry.reason) in retry
            ):
                missing.add(key)
        return missing

    def _quarantine(self, unit: UnitWork, position: int) -> None:
        found = blame.quarantine(unit.records[position])
        self._note_evidence(unit.records[position], found)
        self._stage.take(unit, position, all_failed(self._requests(unit, position), found.failure))

    def _note_evidence(self, record: Record, found: DecodeFailure) -> None:
        self._job.write_evidence(blame.evidence(record, found, self._session.state))

    # ---------------------------------------------------------------- decoding

    @staticmethod
    def _requests(unit: UnitWork, position: int) -> Requests:
        record = unit.records[position]
        return tuple(request_of(spec, record) for spec in unit.specs_of(position))

    def _decode(self, unit: UnitWork, position: int) -> Future[Prepared]:
        record, requests = unit.records[position], self._requests(unit, position)
        if self._source.is_remote:
            return self._fetchers.submit(self._fetch_and_decode, record, requests)
        with self._source.fetch(record) as path:
            return self._submit(record, path, requests)

    def _submit(self, record: Record, path: Path, requests: Requests) -> Future[Prepared]:
        decoder = self._config.picture_decoder
        crops = any(request.crop is not None for request in requests)
        faces = self._faces.of(record) if crops and self._faces is not None else None
        job = DecodeJob(path, record.sha256, record.media, requests, decoder, faces)
        return self._pool.submit(job)

    def _fetch_and_decode(self, record: Record, requests: Requests) -> Prepared:
        began_s = time.monotonic()
        try:
            with self._source.fetch(record) as path:
                self._clock.fetch_s += time.monotonic() - began_s
                return self._submit(record, path, requests).result()
        except FileNotFoundError:
            why = f"{record.media}: there is no such file below {self._source.root}"
            return all_failed(requests, Failure("missing", why))
        except OSError as error:
            why = f"{record.media} cannot be fetched: {error}"
            return all_failed(requests, Failure("unreadable", why))


def _device(name: str, rank: int) -> str:
    """Return this worker's own device: of several GPUs, the one of its rank."""
    if name != "cuda":
        return name
    import torch

    return f"cuda:{rank % max(1, torch.cuda.device_count())}"
