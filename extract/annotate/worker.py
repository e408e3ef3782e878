"""One worker of an annotation: claims units, annotates their records side by side, writes results.

It is a worker like any other (`extract.workers.worker`): it shares a job through the work folder, may be
killed at any moment, and ends in order when it is asked to. An answer is on the disk before anything is
made of it; a result is there before its unit is signed off.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from cache.clip import Record
from cache.commit import Status
from cache.errors import EmocacheError, SchemaError, StoreError
from cache.schema import decode_json
from cache.storage import LocalStorage
from extract.annotate.asking import Asker, Purse, spent
from extract.annotate.config import ANSWERS, CLUES, RESULTS, AnnotationConfig
from extract.annotate.endpoints.answers import AnswerCache, retried_outcomes
from extract.annotate.endpoints.endpoint import EndpointClient
from extract.annotate.evidence.action_units import load_units
from extract.annotate.evidence.media import MediaReader
from extract.annotate.job import created_s
from extract.annotate.journal import Journal
from extract.annotate.results import RecordResult, Results, failed, is_wanted, result_key
from extract.annotate.steps import Annotator, may_pass
from extract.annotate.tools import Clues, Tools, make_detector
from extract.annotate.wording import Wordings
from extract.decode_pool import DecodeFailure
from extract.failures import ANSWER_KINDS, Failure, FailureRate
from extract.jobs import blame
from extract.jobs.job import Job, Receipt, ReceiptFailure
from extract.jobs.lease import Claim
from extract.jobs.session import StageSeconds, WorkerSession, WorkerState
from extract.sources import open_source
from extract.workers.drain import Drain, after, on_signals, registered
from extract.workers.log import log_file, log_path
from extract.workers.loop import planned_records

logger = logging.getLogger(__name__)

_POLL_S = 0.1
_IDLE_S = 2.0
"""Pause between two looks for a unit, while others hold all that are left."""
_USAGE_EVERY_S = 5.0
"""Between two looks at what other workers used up."""


def work(
    config_json: str,
    rank: int = 0,
    *,
    records: Sequence[Record] | None = None,
    on_clip: Callable[[], None] | None = None,
) -> str:
    """Work on an annotation until all its units are done, or until something asks to end.

    Args:
        config_json: An `AnnotationConfig`.
        rank: Number of this worker on its machine; all are alike.
        records: The manifest's, for a caller that has them at hand.
        on_clip: Called for each annotated record.

    Returns:
        The worker's last `WorkerState` as JSON.

    Raises:
        EmocacheError: The work cannot go on: an endpoint that is down or refuses, a budget that is used
            up, most records failing. Everything answered stays.
    """
    config = decode_json(AnnotationConfig, config_json, "the worker's configuration")
    drain = Drain()
    with registered(drain), on_signals(drain), after(drain, config.drain_after_s):
        return _Worker(config, drain, records, on_clip).run().model_dump_json()


@dataclass
class _Unit:
    """A claimed unit, and what was done of it."""

    claim: Claim
    waiting: set[int]
    """Rows whose result is not written yet."""
    started_s: float = field(default_factory=time.time)
    n_clips: int = 0
    counts: defaultdict[str, Counter[Status]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[ReceiptFailure] = field(default_factory=list)

    def note(self, row: int, result: RecordResult) -> None:
        """Note a written result."""
        self.waiting.discard(row)
        self.n_clips += 1
        for step in result.steps:
            self.counts[step.label][step.status] += 1
            if step.kind is not None:
                self.failures.append(
                    ReceiptFailure(
                        uid=result.uid,
                        key=result.sha256,
                        stream=step.label,
                        kind=step.kind,
                        reason=step.reason or "",
                    )
                )


class _Worker:
    """What `work` does, and what it has in hand."""

    def __init__(
        self,
        config: AnnotationConfig,
        drain: Drain,
        records: Sequence[Record] | None,
        on_clip: Callable[[], None] | None,
    ) -> None:
        self._config, self._drain = config, drain
        self._given_records, self._on_clip = records, on_clip
        self._work = Path(config.store)
        self._job = Job.open(LocalStorage(self._work), config.job_id, config.generation)
        self._since_s = created_s(self._job)
        self._units: list[_Unit] = []
        self._todo: list[tuple[_Unit, int]] = []
        self._running: dict[asyncio.Task[RecordResult], tuple[_Unit, int]] = {}
        self._held: list[tuple[_Unit, int, RecordResult]] = []
        """Failed results that wait until it is clear that media and endpoints are there at all."""
        self._rate = FailureRate(config.max_failure_share)
        self._purse = Purse(config.preset.budget)
        self._askers: list[Asker] = []
        self._looked_s = self._counted_s = 0.0
        self._n_units = self._n_clips = self._n_failed = 0
        self._idle_s = 0.0
        self._dangerous = threading.Lock()
        self._in_danger: list[str] = []

    def run(self) -> WorkerState:
        config, log = self._config, log_path(self._config)
        session = WorkerSession(
            self._job.storage, self._job.root,
            session=config.session, engine=config.engine, device=config.device, log=log,
            heartbeat_s=config.heartbeat_s, lease_timeout_s=config.lease_timeout_s,
        )  # fmt: skip
        for chatty in ("httpx", "httpx2", "openai"):  # a line for each request
            logging.getLogger(chatty).setLevel(logging.WARNING)
        with log_file(log), session:
            logger.info("worker %s starts", session.worker_id)
            self._session = session
            self._records = planned_records(config, self._job, self._given_records)
            with ExitStack() as stack:
                self._tools = self._set_up(stack)
                self._annotator = Annotator(self._tools)
                try:
                    asyncio.run(self._main())
                except KeyboardInterrupt:  # for the second time: nobody waits for answers any more
                    for asker in self._askers:
                        asker.stop(0.0)
                    raise
                finally:
                    self._tell()
            session.close(self._drain.reason)
            logger.info(
                "worker %s ends: %s", session.worker_id, self._drain.reason or "no work is left"
            )
            return session.state

    # ---------------------------------------------------------------- setting up

    def _set_up(self, stack: ExitStack) -> Tools:
        config, preset = self._config, self._config.preset
        wordings = Wordings(preset)
        if preset.digest(wordings.ids) != config.settings:
            raise SchemaError(
                "this worker reads other prompts or tables than the job was begun with. Are the files of "
                "prompts= and units.table= the same on all machines? Run the same command again."
            )
        self._answers = answers = AnswerCache(self._work / ANSWERS)
        stack.callback(answers.close)
        self._results: Results = Journal(self._work / RESULTS, RecordResult)
        self._clues = Journal(self._work / CLUES, Clues)
        retry = self._job.plan.retry
        outcomes = retried_outcomes(
            kind for kind in retry if kind in ANSWER_KINDS and kind != "unanswered"
        )
        askers = {
            role: Asker(
                stack.enter_context(EndpointClient(options.endpoint, answers)),
                self._purse,
                outcomes,
                self._since_s,
            )
            for role, options in preset.roles.items()
        }
        self._askers = list(askers.values())
        detecting = ThreadPoolExecutor(config.n_decoders, thread_name_prefix="detect")
        speaking = ThreadPoolExecutor(1, thread_name_prefix="speech")
        reader = MediaReader(
            preset.media,
            n_decoders=config.n_decoders,
            deadline_s=config.deadline_s,
            memory_bytes=config.memory_bytes,
            attempts=config.attempts,
        )
        stack.callback(detecting.shutdown, wait=False, cancel_futures=True)
        stack.callback(speaking.shutdown, wait=False, cancel_futures=True)
        stack.callback(reader.close)
        return Tools(
            preset=preset,
            wordings=wordings,
            source=open_source(config.media_root),
            clues=self._clues,
            askers=askers,
            reader=reader,
            detecting=detecting,
            speaking=speaking,
            detector=make_detector(preset.detector),
            units=load_units(preset.units.table),
            on_evidence=self._note_evidence,
            on_danger=self._note_danger,
        )

    # ---------------------------------------------------------------- the loop

    async def _main(self) -> None:
        try:
            await self._loop()
        except EmocacheError as error:
            await self._end(type(error).__name__)
            raise
        if self._should_end():
            await self._end(self._drain.reason)

    async def _loop(self) -> None:
        while not self._should_end():
            await self._tend()
            await self._fill()
            if self._running:
                done, _ = await asyncio.wait(
                    self._running, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    await self._take(task)
            elif not await self._wait_for_units():
                return

    def _should_end(self) -> bool:
        if self._session.should_stop.is_set():
            self._drain.request("told to stop")
        return self._drain.is_set()

    async def _fill(self) -> None:
        """Start records until enough are open, of the next unit too."""
        while len(self._running) < self._config.clips_at_once and not self._should_end():
            if not self._todo and not await self._claim():
                return
            if self._todo:
                unit, row = self._todo.pop(0)
                task = asyncio.create_task(self._annotate(self._records[row]))
                self._running[task] = (unit, row)

    async def _annotate(self, record: Record) -> RecordResult:
        try:
            return await self._annotator.annotate(record)
        except EmocacheError:
            raise
        except Exception as error:  # the per-record boundary: recorded, never swallowed
            logger.exception("%s: unexpected", record.uid)
            why = Failure("unexpected", f"{type(error).__name__}: {error}")
            return RecordResult(
                uid=record.uid,
                media=record.media,
                sha256=record.sha256,
                steps=(failed("multimodal", why),),
                time_s=time.time(),
            )

    async def _wait_for_units(self) -> bool:
        """Wait a little while others hold all units that are left; False if none is."""
        await self._trust()
        if not await asyncio.to_thread(self._job.undone):
            return False
        began_s = time.monotonic()
        pause_s = min(_IDLE_S, self._config.heartbeat_s)
        while time.monotonic() - began_s < pause_s and not self._should_end():
            await asyncio.sleep(_POLL_S)
        self._idle_s += time.monotonic() - began_s
        return True

    async def _claim(self) -> bool:
        """Take a unit; False if none is free now."""
        if self._running and time.monotonic() - self._looked_s < _IDLE_S:
            return False  # nothing was free a moment ago
        held = [unit.claim.unit for unit in self._units]
        claim = await asyncio.to_thread(self._job.claim, self._session, exclude=held)
        if claim is None:
            self._looked_s = time.monotonic()
            return False
        await asyncio.to_thread(self._results.refresh)
        await asyncio.to_thread(self._clues.refresh)
        # A unit may come from a worker that died: what it was answered a moment ago is not asked again.
        await asyncio.to_thread(self._answers.refresh)
        records = [self._records[row] for row in claim.rows]
        suspects = await asyncio.to_thread(blame.suspects, self._job, claim, records)
        self._tools.guilty |= suspects.guilty
        rows = [row for row in claim.rows if self._is_wanted(row)]
        unit = _Unit(claim, set(rows))
        self._units.append(unit)
        self._todo += [(unit, row) for row in rows]
        logger.info("unit %d: %d records to annotate", claim.unit, len(rows))
        self._session.update(unit=claim.unit)
        if not rows:
            await self._sign_off(unit)
        return True

    def _key(self, row: int) -> str:
        config = self._config
        return result_key(self._records[row], config.settings, config.preset.targets)

    def _is_wanted(self, row: int) -> bool:
        return is_wanted(self._results.get(self._key(row)), self._job.plan.retry, self._since_s)

    # ---------------------------------------------------------------- results

    async def _take(self, task: asyncio.Task[RecordResult]) -> None:
        """Take in the result of a record.

        Raises:
            EmocacheError: What keeps every record from being annotated.
        """
        unit, row = self._running.pop(task)
        result = task.result()
        self._n_clips += 1
        self._n_failed += bool(result.failures)
        for step in result.failures:
            logger.info("%s, %s: %s", result.uid, step.label, step.reason)
        kind = result.failures[0].kind if result.failures else None
        if may_pass(result):
            self._held.append((unit, row, result))
        else:
            await self._trust()
            await self._write(unit, row, result)
        if self._on_clip is not None:
            self._on_clip()
        self._rate.add(kind, result.media)

    async def _trust(self) -> None:
        """Write the failures that were held back."""
        held, self._held = self._held, []
        for unit, row, result in held:
            await self._write(unit, row, result)

    async def _write(self, unit: _Unit, row: int, result: RecordResult) -> None:
        await asyncio.to_thread(self._results.put, self._key(row), result)
        unit.note(row, result)
        if not unit.waiting:
            await self._sign_off(unit)

    async def _sign_off(self, unit: _Unit) -> None:
        self._units.remove(unit)
        await asyncio.to_thread(self._clues.sync)
        await asyncio.to_thread(self._results.sync)
        await asyncio.to_thread(self._job.finish, unit.claim, self._receipt(unit))
        self._n_units += 1
        logger.info("unit %d is done", unit.claim.unit)

    def _receipt(self, unit: _Unit) -> Receipt:
        worker = self._session.state
        return Receipt(
            unit=unit.claim.unit,
            worker_id=worker.worker_id,
            session=worker.session,
            engine=worker.engine,
            device=worker.device,
            started_s=unit.started_s,
            ended_s=time.time(),
            n_clips=unit.n_clips,
            counts={label: dict(counts) for label, counts in unit.counts.items()},
            failures=tuple(unit.failures),
        )

    def _note_evidence(self, record: Record, found: DecodeFailure) -> None:
        self._job.write_evidence(blame.evidence(record, found, self._session.state))

    def _note_danger(self, record: Record, begins: bool) -> None:
        """Write down what this process may die with, before it begins."""
        with self._dangerous:
            (self._in_danger.append if begins else self._in_danger.remove)(record.sha256)
            clips = tuple(dict.fromkeys(self._in_danger))
            tell = self._session.beat if begins else self._session.update
            tell(encoding=clips, encoding_alone=len(clips) == 1)

    # ---------------------------------------------------------------- telling and ending

    async def _tend(self) -> None:
        """Tell how far this worker is, and hear what the others used up."""
        if time.monotonic() - self._counted_s < min(_USAGE_EVERY_S, self._config.heartbeat_s):
            return
        self._counted_s = time.monotonic()
        self._tell()
        caps = self._config.preset.budget
        if caps.requests is None and caps.tokens is None:
            return
        workers = await asyncio.to_thread(self._job.workers)
        others = [state for state, _ in workers if state.worker_id != self._session.worker_id]
        requests = tokens = 0.0
        for state in others:
            for name, value in state.usage.items():
                if name.endswith(" requests"):
                    requests += value
                else:
                    tokens += value
        self._purse.requests_elsewhere = round(requests)
        self._purse.tokens_elsewhere = round(tokens)

    def _tell(self) -> None:
        self._session.update(
            n_units=self._n_units,
            n_clips=self._n_clips,
            n_failed=self._n_failed,
            usage=spent(self._askers),
            seconds=StageSeconds(
                encode_s=self._annotator.seconds,
                idle_s=self._idle_s,
            ),
        )

    async def _end(self, reason: str | None) -> None:
        """Let requests in flight finish, write what is whole, and give the units back."""
        # In threads that nobody has to wait for: the second Ctrl-C ends at once.
        stopping = [threading.Thread(target=a.stop, daemon=True) for a in self._askers]
        for thread in stopping:
            thread.start()
        while any(thread.is_alive() for thread in stopping):
            await asyncio.sleep(_POLL_S)
        tasks = dict(self._running)
        if tasks:
            await asyncio.wait(tasks, timeout=_POLL_S)
        for task, (unit, row) in tasks.items():
            if not task.done():
                task.cancel()
            elif not task.cancelled() and task.exception() is None:
                result = task.result()
                if not may_pass(result):
                    await self._write(unit, row, result)
                    self._n_clips += 1
        await asyncio.gather(*tasks, return_exceptions=True)
        self._running.clear()
        await asyncio.to_thread(self._clues.sync)
        await asyncio.to_thread(self._results.sync)
        for unit in self._units:
            receipt = self._receipt(unit) if unit.n_clips else None
            try:
                await asyncio.to_thread(self._job.release, unit.claim, receipt)
                logger.info("unit %d is given back: %s", unit.claim.unit, reason)
            except StoreError as error:  # others find it free once they see that this worker ended
                logger.warning("unit %d cannot be given back: %s", unit.claim.unit, error)
        self._units.clear()
