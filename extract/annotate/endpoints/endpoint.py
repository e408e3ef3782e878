"""Asks many questions of an endpoint, so many at a time, and keeps every answer.

The caller's thread draws the questions, and with them makes the media; a thread of the client's own
does nothing but send and receive. An answer is written to the cache before the caller sees it.

    with EndpointClient(options, AnswerCache(folder)) as client:
        for question, answer in client.ask_all(questions):
            ...
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

from extract.annotate.endpoints.answers import Answer, AnswerCache, retried_outcomes
from extract.annotate.endpoints.costs import Price, RunReport, Tally
from extract.annotate.endpoints.questions import Question, QuestionError
from extract.annotate.endpoints.sending import Finished, Sender
from extract.annotate.endpoints.transport import EndpointOptions, api_key

REFRESH_S = 5.0
"""How often the cache is looked at for what other processes wrote."""


@dataclass(frozen=True)
class Failure:
    """A question without an answer; the next run asks it again.

    Args:
        kind: For counts, in a word or two.
        reason: What happened, in a line.
        attempts: Requests that were sent for it.
    """

    kind: str
    reason: str
    attempts: int

    ok = False


class EndpointClient:
    """Asks an endpoint; one run at a time. Its caps and rate limits hold over all its runs.

    Args:
        options: Where and how.
        answers: Where answers are kept and looked up; None keeps none.
        environ: Where the key is looked up; the process's environment if None.

    Raises:
        UnauthorisedError: The key's environment variable is not set.
    """

    def __init__(
        self,
        options: EndpointOptions,
        answers: AnswerCache | None = None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.options = options
        self.answers = answers
        self._key = api_key(options, environ)
        self._tally = Tally()
        self._sender: Sender | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._asking = threading.Lock()

    def __repr__(self) -> str:
        """Name the endpoint, and not its key."""
        return f"EndpointClient({self.options.base_url!r}, in_flight={self.options.in_flight})"

    def __enter__(self) -> EndpointClient:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()

    def ask(self, question: Question, retry: Iterable[str] = ()) -> Answer | Failure:
        """Return the answer to one question; see `ask_all`."""
        [(_, answer)] = self.ask_all([question], retry)
        return answer

    def ask_all(
        self, questions: Iterable[Question | None], retry: Iterable[str] = ()
    ) -> Iterator[tuple[Question, Answer | Failure]]:
        """Ask questions and yield each with its answer, in the order in which answers come.

        Questions are drawn in the caller's thread, a few ahead of those in flight; a None among them
        says that there is none before another answer was seen, so that questions may depend on
        answers. Equal questions in flight are asked once. A question that was answered before, with
        whatever outcome, costs no request unless `retry` names the outcome.

        Leaving the loop early stops the run: what is in flight gets `options.stop_s` to finish and is
        kept. So does Ctrl-C.

        Args:
            questions: Any iterable; it may be endless.
            retry: Outcomes of earlier answers to ask again, or "all".

        Raises:
            EndpointError: The endpoint is down, refuses the key, or does not know the model.
            BudgetError: The cap on requests or tokens is reached.
            AnswersError: Answers cannot be kept.
            SchemaError: An unknown outcome in `retry`.
        """
        again = retried_outcomes(retry)
        if not self._asking.acquire(blocking=False):
            raise RuntimeError(
                "one run of an EndpointClient at a time; ask all questions in one run"
            )
        run = _Run(self, again)
        began = time.monotonic()
        try:
            yield from run.answers(iter(questions))
        finally:
            try:
                run.stop()
            finally:
                self._tally.wall_s += time.monotonic() - began
                self._asking.release()

    def report(self, prices: Mapping[str, Price] | None = None) -> RunReport:
        """Return what was asked and spent so far.

        Args:
            prices: By role.
        """
        budget = self._sender.budget if self._sender else None
        return self._tally.report(
            prices,
            uncounted=budget.uncounted if budget else 0,
            overrun=budget.overrun_tokens if budget else 0,
        )

    def close(self) -> None:
        """End the client's thread; what is in flight gets `options.stop_s` to finish."""
        thread, loop, sender = self._thread, self._loop, self._sender
        if thread is None or loop is None or sender is None:
            return
        self._thread = None
        asyncio.run_coroutine_threadsafe(sender.close(), loop).result()
        asyncio.run_coroutine_threadsafe(loop.shutdown_default_executor(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        self._loop = None

    def sender(self) -> Sender:
        """Return what sends, started on the first call."""
        if self._thread is None:
            self._loop = loop = asyncio.new_event_loop()
            self._thread = threading.Thread(
                target=loop.run_forever, name="emocache-endpoint", daemon=True
            )
            self._thread.start()
            earlier = self._sender.budget if self._sender else None
            self._sender = Sender(self.options, self._key, self.answers, self._tally, loop, earlier)
        assert self._sender is not None
        return self._sender

    def count(self, question: Question, answer: Answer | Failure) -> None:
        """Note what became of a question."""
        tally = self._tally.of(question.role)
        if isinstance(answer, Answer):
            tally.outcomes[answer.outcome.value] += 1
        else:
            tally.failed += 1
            self._tally.failures[answer.kind] += 1

    @property
    def tally(self) -> Tally:
        """The counts so far."""
        return self._tally


class _Run:
    """One call of `ask_all`, in the caller's thread."""

    def __init__(self, client: EndpointClient, retry: frozenset[str]) -> None:
        self.client = client
        self.retry = retry
        self.done: queue.SimpleQueue[list[Finished] | BaseException] = queue.SimpleQueue()
        self.pending: dict[str, list[Question]] = {}
        self.sender: Sender | None = None
        self.stopped = False
        self._looked = time.monotonic()
        self.began_s = time.time()

    def answers(
        self, source: Iterator[Question | None]
    ) -> Iterator[tuple[Question, Answer | Failure]]:
        """Draw questions, hand them over and yield what comes back."""
        room = 2 * self.client.options.in_flight
        ready: deque[tuple[Question, Answer | Failure]] = deque()
        drained = False
        while True:
            blocked = False
            while not drained and not blocked and len(self.pending) < room:
                try:
                    question = next(source)
                except StopIteration:
                    drained = True
                    break
                if question is None:
                    blocked = True
                elif (answer := self._start(question)) is not None:
                    yield question, answer
                if not self.done.empty():
                    break  # let finished ones through between two that are drawn
            if not self.pending:
                if drained:
                    return
                if blocked:
                    raise RuntimeError("questions wait for an answer, and none is on its way")
                continue
            wait = drained or blocked or len(self.pending) >= room
            ready.extend(self._finished(wait))
            while ready:
                yield ready.popleft()

    def stop(self) -> None:
        """Let what is in flight finish within its time; nothing is sent any more."""
        if self.sender is None or self.stopped:
            return
        self.stopped = True
        try:
            self.sender.stop_and_wait(self.client.options.stop_s)
        except KeyboardInterrupt:
            self.sender.stop_and_wait(0.0)
            raise

    def _start(self, question: Question) -> Answer | Failure | None:
        """Answer a question from the cache, or send it on its way and return None."""
        tally = self.client.tally.of(question.role)
        tally.questions += 1
        if question.key in self.pending:
            tally.shared += 1
            self.pending[question.key].append(question)
            return None
        answers = self.client.answers
        if answers is not None:
            if time.monotonic() - self._looked > REFRESH_S:
                answers.refresh()
                self._looked = time.monotonic()
            known = answers.usable(question.key, self.retry, self.began_s)
            if known is not None:
                tally.cached += 1
                self.client.count(question, known)
                return known
        try:
            messages = question.messages()
        except (QuestionError, OSError) as error:
            failure = Failure("media", str(error), 0)
            self.client.count(question, failure)
            return failure
        if self.sender is None:
            self.sender = self.client.sender()
            self.sender.begin(self.done)
        self.pending[question.key] = [question]
        self.sender.submit(question, messages)
        return None

    def _finished(self, wait: bool) -> Iterator[tuple[Question, Answer | Failure]]:
        """Return what came back, at least one if told to wait."""
        while True:
            try:
                batch = self.done.get() if wait else self.done.get_nowait()
            except queue.Empty:
                return
            wait = False
            if isinstance(batch, BaseException):
                self.stopped = True
                raise batch
            for finished in batch:
                answer = (
                    finished.answer
                    if finished.answer is not None
                    else Failure(finished.kind, finished.reason, finished.attempts)
                )
                for question in self.pending.pop(finished.key):
                    self.client.count(question, answer)
                    yield question, answer
