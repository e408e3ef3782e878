"""Keeps so many requests in flight: the side of an `EndpointClient` that lives in its event loop.

Each of N workers takes the next question, sets its worst case aside in the budget, waits for the rate
limits, sends, tries again where that is worth it, and writes what came to the cache. A flusher forces
many answers to the disk with one sync, and only then hands them over.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cache.errors import EmocacheError
from extract.annotate.endpoints.answers import Answer, AnswerCache
from extract.annotate.endpoints.budget import Budget, Reservation
from extract.annotate.endpoints.costs import Tally
from extract.annotate.endpoints.questions import Question
from extract.annotate.endpoints.replies import Outcome, Reply
from extract.annotate.endpoints.schedule import RateWindow, Streak, exhausted_wait_s
from extract.annotate.endpoints.transport import (
    AdaptedError,
    EndpointDownError,
    EndpointError,
    EndpointOptions,
    RejectedError,
    Transport,
    TryAgainError,
)

_FLUSH_S = 0.002
"""Answers that come within this time share a sync; small beside any model's answer."""


@dataclass(frozen=True)
class Finished:
    """What became of a question: an answer, or why there is none."""

    key: str
    answer: Answer | None
    kind: str = ""
    reason: str = ""
    attempts: int = 0


@dataclass
class _Work:
    """A question on its way."""

    question: Question
    messages: list[dict[str, Any]]
    began: float = 0.0
    attempts: int = 0
    failed: int = 0
    told: int = 0
    repairs: int = 0
    tokens_in: int | None = None
    tokens_out: int | None = None


class Sender:
    """Sends questions from an event loop that runs in another thread.

    Args:
        options: Where and how.
        key: Of the endpoint.
        answers: Where answers are kept.
        tally: Counts.
        loop: Runs already.
        budget: Of an earlier sender of the same client.
    """

    def __init__(
        self,
        options: EndpointOptions,
        key: str,
        answers: AnswerCache | None,
        tally: Tally,
        loop: asyncio.AbstractEventLoop,
        budget: Budget | None = None,
    ) -> None:
        self.options = options
        self.budget = budget or Budget(options.caps)
        self._answers = answers
        self._tally = tally
        self._loop = loop
        self._transport = Transport(options, key)
        retry = options.retry
        stop_after = retry.stop_after or max(2 * options.in_flight, 8)
        self._streak = Streak(stop_after, retry.patience_s)
        self._unanswered = Streak(stop_after, 0.0)
        limits = ((options.requests_per_minute, 0), (options.tokens_per_minute, 1))
        self._windows = [(RateWindow(limit), which) for limit, which in limits if limit]
        self._no_sooner = 0.0
        self._todo: deque[_Work] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._workers: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Task[Any]] = set()
        self._finished: list[Finished] = []
        self._flusher: asyncio.Task[None] | None = None
        self._done: queue.SimpleQueue[list[Finished] | BaseException] = queue.SimpleQueue()
        self._stopping = False
        self._ending: asyncio.Task[None] | None = None

    def begin(self, done: queue.SimpleQueue[list[Finished] | BaseException]) -> None:
        """Start a run; called from the asker's thread, as are `submit` and `stop_and_wait`.

        Args:
            done: Takes lists of what is finished, and, as the last, what ended the run early.
        """

        async def start() -> None:
            self._done, self._stopping, self._ending = done, False, None
            self._streak.n_failed = self._unanswered.n_failed = 0
            for _ in range(self.options.in_flight):
                worker = self._loop.create_task(self._work())
                self._workers.add(worker)
                worker.add_done_callback(self._workers.discard)

        asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def submit(self, question: Question, messages: list[dict[str, Any]]) -> None:
        """Send a question as soon as there is room."""
        self._todo.append(_Work(question, messages))
        # A worker announces itself idle before it looks a last time; so one of both sees the other.
        if self._idle:
            self._loop.call_soon_threadsafe(self._wake)

    def stop_and_wait(self, grace_s: float) -> None:
        """End the run; what is in flight gets some time to finish and is kept."""
        asyncio.run_coroutine_threadsafe(self._end(grace_s), self._loop).result()

    async def close(self) -> None:
        """End the run and close the connections."""
        await self._end(self.options.stop_s)
        await self._transport.close()

    def _wake(self) -> None:
        while self._idle and self._todo:
            idle = self._idle.pop()
            if not idle.done():
                idle.set_result(None)
                return

    async def _work(self) -> None:
        while not self._stopping:
            try:
                work = self._todo.popleft()
            except IndexError:
                idle = self._loop.create_future()
                self._idle.append(idle)
                if self._todo:
                    self._idle.remove(idle)
                    continue
                with self._may_be_cancelled():
                    await idle
                continue
            if self._todo and self._idle:
                self._wake()
            try:
                self._finish(await self._answer(work))
            except EmocacheError as error:
                self._fail(error)
                return
            except asyncio.CancelledError:
                if self._stopping:
                    return
                raise
            except Exception as error:  # noqa: BLE001  the asker must not wait for ever
                self._fail(error)
                return

    async def _answer(self, work: _Work) -> Finished:
        """Ask until there is an answer, or a reason to give up."""
        work.began = time.monotonic()
        key = work.question.key
        while True:
            try:
                reply = await self._once(work)
            except AdaptedError:
                continue
            except RejectedError as error:
                if error.filtered:
                    return Finished(key, self._judged(work, _filtered(error.words)))
                return self._given_up(work, "rejected", error.words)
            except TryAgainError as error:
                wait_s = self._may_try_again(work, error)
                if wait_s is None:
                    return self._given_up(work, error.reason, error.words)
                self._tally.retried[error.reason] += 1
                with self._may_be_cancelled():
                    await asyncio.sleep(wait_s)
                continue
            self._streak.good()
            self._unanswered.good()
            if reply.outcome is Outcome.INVALID and work.repairs < self.options.repairs:
                self._ask_to_repair(work, reply)
                continue
            return Finished(key, self._judged(work, reply))

    def _given_up(self, work: _Work, kind: str, words: str) -> Finished:
        """Return a question without an answer; with many in a row, the fault is not theirs.

        Raises:
            EndpointError: Too many questions in a row got no answer.
        """
        if self._unanswered.bad():
            raise EndpointError(
                f"{self.options.base_url} left the last {self._unanswered.n_failed} questions for model "
                f"'{work.question.model}' without an answer; it said: {words}. Change what it does not "
                "take, or wait until it is less busy, and run again; every answer so far is kept."
            ) from None
        return Finished(work.question.key, None, kind, words, work.attempts)

    def _may_try_again(self, work: _Work, error: TryAgainError) -> float | None:
        """Return how long to wait before the next try; None to give up.

        Raises:
            EndpointDownError: Too many requests failed in a row.
        """
        policy = self.options.retry
        if error.outage and self._streak.bad():
            raise EndpointDownError(
                f"{self.options.base_url} does not answer for model '{work.question.model}': "
                f"{self._streak.n_failed} requests in a row failed, the last with: {error.words}. Check "
                "that the server runs and that the address is right; every answer so far is kept, and "
                "the same command goes on."
            )
        if error.told_s is not None:
            work.told += 1
            if error.told_s > policy.longest_told_s or work.told > policy.told_attempts:
                return None
            # It speaks for all of us.
            self._no_sooner = max(self._no_sooner, time.monotonic() + error.told_s)
            return policy.wait_s(1) * 0.1
        work.failed += 1
        return None if work.failed >= policy.attempts else policy.wait_s(work.failed)

    async def _once(self, work: _Work) -> Reply:
        """Send a question once; whatever happens, the budget is settled."""
        question = work.question
        rates = self.options.rates
        extra = sum(len(str(m["content"]).encode()) for m in work.messages[-2:]) * bool(
            work.repairs
        )
        with self._may_be_cancelled():
            reserved = await self.budget.reserve(rates.worst(question) + extra)
        used: int | None = 0
        sent = False
        entries: list[tuple[RateWindow, list[float], int]] = []
        try:
            with self._may_be_cancelled():
                entries = await self._clearance(rates.expected(question))
            sent, used = True, None
            reply = await self._send(work)
            used = _sum(reply.prompt_tokens, reply.completion_tokens)
            return reply
        except TryAgainError as error:
            sent, used = error.sent, error.used
            raise
        except (AdaptedError, RejectedError, EmocacheError):
            used = 0
            raise
        finally:
            self._settle(work, reserved, entries, used, sent)

    async def _send(self, work: _Work) -> Reply:
        tally = self._tally
        work.attempts += 1
        tally.in_flight += 1
        tally.peak_in_flight = max(tally.peak_in_flight, tally.in_flight)
        tally.repairs += bool(work.repairs)
        try:
            async with asyncio.timeout(self.options.deadline_s):
                reply, headers = await self._transport.send(work.question, work.messages)
        except TimeoutError:
            raise TryAgainError(
                "timeout", f"no answer within {self.options.deadline_s:g} s", used=None
            ) from None
        finally:
            tally.in_flight -= 1
            self._tally.notes = self._transport.notes
        wait_s = exhausted_wait_s(headers)
        if wait_s is not None and wait_s <= self.options.retry.longest_told_s:
            self._no_sooner = max(self._no_sooner, time.monotonic() + wait_s)
        return reply

    def _settle(
        self,
        work: _Work,
        reserved: Reservation,
        entries: list[tuple[RateWindow, list[float], int]],
        used: int | None,
        sent: bool,
    ) -> None:
        self.budget.settle(reserved, used, sent=sent)
        for window, entry, which in entries:
            if which and used is not None:
                window.settle(entry, used)
        if sent:
            self._tally.of(work.question.role).requests += 1

    async def _clearance(self, tokens: int) -> list[tuple[RateWindow, list[float], int]]:
        """Wait until the rate limits and the server allow a request; return what was taken."""
        taken: list[tuple[RateWindow, list[float], int]] = []
        while True:
            wait_s = self._no_sooner - time.monotonic()
            if wait_s <= 0:
                for window, which in self._windows[len(taken) :]:
                    wait_s, entry = window.try_take(tokens if which else 1)
                    if entry is None:
                        break
                    taken.append((window, entry, which))
                else:
                    return taken
            await asyncio.sleep(wait_s)

    def _ask_to_repair(self, work: _Work, reply: Reply) -> None:
        self._count(work, reply)
        work.repairs += 1
        n_asked = 1 + bool(work.question.system)
        work.messages = [
            *work.messages[:n_asked],
            {"role": "assistant", "content": reply.text},
            {
                "role": "user",
                "content": f"That answer does not fit the schema ({reply.reason}). Give the same answer "
                "again as one JSON object that fits it, and nothing else.",
            },
        ]

    def _judged(self, work: _Work, reply: Reply) -> Answer:
        self._count(work, reply)
        question = work.question
        return Answer(
            key=question.key,
            outcome=reply.outcome,
            role=question.role,
            prompt_id=question.prompt_id,
            asked_model=question.model,
            text=reply.text,
            reason=reply.reason,
            finish_reason=reply.finish_reason,
            model=reply.model,
            prompt_tokens=work.tokens_in,
            completion_tokens=work.tokens_out,
            attempts=work.attempts,
            repaired=work.repairs > 0,
            unenforced=self._transport.unenforced(question),
            elapsed_s=round(time.monotonic() - work.began, 4),
            time_s=round(time.time(), 3),
        )

    def _count(self, work: _Work, reply: Reply) -> None:
        tally = self._tally.of(work.question.role)
        tally.tokens_in += reply.prompt_tokens or 0
        tally.tokens_out += reply.completion_tokens or 0
        work.tokens_in = _sum(work.tokens_in, reply.prompt_tokens)
        work.tokens_out = _sum(work.tokens_out, reply.completion_tokens)

    def _finish(self, finished: Finished) -> None:
        """Keep an answer at once, so that a kill costs no more than what is in flight."""
        if self._answers is not None and finished.answer is not None:
            self._answers.append([finished.answer])
        self._finished.append(finished)
        if self._flusher is None:
            self._flusher = self._loop.create_task(self._flush())

    async def _flush(self) -> None:
        """Force what is finished to the disk, then hand it over."""
        try:
            while self._finished:
                if not self._stopping:
                    await asyncio.sleep(_FLUSH_S)
                batch, self._finished = self._finished, []
                if self._answers is not None:
                    await asyncio.to_thread(self._answers.sync)
                self._done.put(batch)
        except EmocacheError as error:
            self._fail(error)
        finally:
            self._flusher = None

    def _fail(self, error: BaseException) -> None:
        """End the run because of an error; it is told once everything else is."""
        if self._ending is not None or self._stopping:
            return
        self._stopping = True

        async def end() -> None:
            await self._end(self.options.stop_s)
            self._done.put(error)

        self._ending = self._loop.create_task(end())

    async def _end(self, grace_s: float) -> None:
        self._stopping = True
        self._todo.clear()
        for task in list(self._waiting):
            task.cancel()
        workers = set(self._workers)
        if workers:
            await asyncio.wait(workers, timeout=grace_s)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        self._idle.clear()
        while self._flusher is not None:
            await asyncio.wait([self._flusher])

    @contextmanager
    def _may_be_cancelled(self) -> Iterator[None]:
        """Mark a wait that is given up at once when the run ends."""
        task = asyncio.current_task()
        assert task is not None
        if self._stopping:
            raise asyncio.CancelledError
        self._waiting.add(task)
        try:
            yield
        finally:
            self._waiting.discard(task)


def _filtered(words: str) -> Reply:
    return Reply(
        Outcome.REFUSED, "", f"a content filter refused it: {words}", None, None, None, None
    )


def _sum(first: int | None, second: int | None) -> int | None:
    return None if first is None and second is None else (first or 0) + (second or 0)
