"""Questions of many clips at once to several endpoints, under one budget.

`extract.annotate.endpoints.endpoint` asks a row of questions of one endpoint. Annotation has questions
that depend on answers of other endpoints, for many clips side by side: an `Asker` takes each when it
comes, and gives a future. What is spent counts together, over all endpoints of this process and, as far
as they have told, over all workers of the job.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Collection, Iterable
from concurrent.futures import Future

from cache.errors import StoppedError
from extract.annotate.endpoints.answers import Answer
from extract.annotate.endpoints.budget import Budget, BudgetError, Caps, Reservation
from extract.annotate.endpoints.endpoint import REFRESH_S, EndpointClient, Failure
from extract.annotate.endpoints.questions import Question, QuestionError
from extract.annotate.endpoints.sending import Finished

_POLL_S = 0.05
"""How often a request that does not fit looks whether another endpoint left room."""


class Purse:
    """What may be spent together, and what was spent elsewhere."""

    def __init__(self, caps: Caps) -> None:
        """Start with nothing spent."""
        self.caps = caps
        self.lock = threading.Lock()
        self.parts: list[Budget] = []
        """One per endpoint of this process."""
        self.requests_elsewhere = 0
        self.tokens_elsewhere = 0
        """By other workers of the job, as far as they have told."""

    @property
    def requests(self) -> int:
        """Requests that were sent, or are about to be."""
        return self.requests_elsewhere + sum(part.requests for part in self.parts)

    @property
    def tokens(self) -> int:
        """Tokens that are used up."""
        return self.tokens_elsewhere + sum(part.tokens for part in self.parts)

    @property
    def in_flight(self) -> int:
        """Requests whose cost is not known yet."""
        return sum(part.in_flight for part in self.parts)

    def problem(self, need: int) -> str | None:
        """Return why another request of so many tokens does not fit; None if it does."""
        caps = self.caps
        if caps.requests is not None and self.requests + 1 > caps.requests:
            return (
                f"the budget of {caps.requests:,} requests is used up. Every answer so far is kept. Raise "
                "budget.requests and run again; it goes on where it stopped."
            )
        reserved = sum(part.reserved_tokens for part in self.parts)
        if caps.tokens is not None and self.tokens + reserved + need > caps.tokens:
            return (
                f"the budget of {caps.tokens:,} tokens does not hold another request: {self.tokens:,} are "
                f"used and the next may take up to {need:,}. Every answer so far is kept. Raise "
                "budget.tokens and run again; it goes on where it stopped."
            )
        return None


class _Part(Budget):
    """The budget of one endpoint: its own caps, and those of the purse."""

    def __init__(self, caps: Caps, purse: Purse) -> None:
        super().__init__(caps)
        self._purse = purse
        purse.parts.append(self)

    async def reserve(self, tokens: int) -> Reservation:
        """See `Budget.reserve`; another endpoint's request may be what leaves room."""
        while True:
            with self._purse.lock:
                problem = self._purse.problem(round(tokens * self._scale))
                if problem is None:
                    reserved = await super().reserve(tokens) if self._fits(tokens) else None
                    if reserved is not None:
                        return reserved
                elif not self._purse.in_flight:
                    raise BudgetError(problem)
            if problem is None:  # it is our own caps that do not hold it
                return await super().reserve(tokens)
            await asyncio.sleep(_POLL_S)

    def _fits(self, tokens: int) -> bool:
        """True if `Budget.reserve` would return at once, without a wait under the lock."""
        return self._problem(round(tokens * self._scale)) is None


class Asker:
    """Takes questions for one endpoint at any time, and gives futures; used from one thread.

    An answer that is known costs nothing; equal questions in flight are asked once.
    """

    def __init__(
        self,
        client: EndpointClient,
        purse: Purse,
        retry: Collection[str] = (),
        since_s: float = 0.0,
    ) -> None:
        """Ask nothing yet.

        Args:
            client: The endpoint.
            purse: What may be spent.
            retry: Outcomes of earlier answers to ask again.
            since_s: Answers that came later, in Unix time, are not earlier ones.
        """
        self._client = client
        self._purse = purse
        self._retry = frozenset(retry)
        self._since_s = since_s
        self._pending: dict[str, list[tuple[Question, Future[Answer | Failure]]]] = {}
        self._lock = threading.Lock()
        self._done: queue.SimpleQueue[list[Finished] | BaseException | None] = queue.SimpleQueue()
        self._reader: threading.Thread | None = None
        self._looked_s = time.monotonic()
        self._error: BaseException | None = None
        self._is_stopped = False

    @property
    def client(self) -> EndpointClient:
        """The endpoint."""
        return self._client

    @property
    def n_pending(self) -> int:
        """Questions whose answer is not there yet."""
        return len(self._pending)

    def ask(self, question: Question) -> Future[Answer | Failure]:
        """Ask a question.

        The future raises what ended the run: `EndpointError` of an endpoint that is of no use,
        `BudgetError`, `AnswersError`; and `StoppedError` if `stop` came before it was sent.
        """
        future: Future[Answer | Failure] = Future()
        tally = self._client.tally.of(question.role)
        tally.questions += 1
        with self._lock:
            if question.key in self._pending:
                tally.shared += 1
                self._pending[question.key].append((question, future))
                return future
        known = self._known(question)
        if known is not None:
            tally.cached += 1
            self._client.count(question, known)
            future.set_result(known)
            return future
        if self._error is not None or self._is_stopped:
            future.set_exception(self._error or StoppedError("stopped"))
            return future
        try:
            messages = question.messages()
        except (QuestionError, OSError) as error:
            failure = Failure("media", str(error), 0)
            self._client.count(question, failure)
            future.set_result(failure)
            return future
        sender = self._client.sender()
        if self._reader is None:
            sender.budget = _Part(self._client.options.caps, self._purse)
            sender.begin(self._done)  # type: ignore[arg-type]  # ours takes None too
            self._reader = threading.Thread(target=self._read, name="answers", daemon=True)
            self._reader.start()
        with self._lock:
            self._pending[question.key] = [(question, future)]
        sender.submit(question, messages)
        return future

    def stop(self, grace_s: float | None = None) -> None:
        """Send nothing more; what is in flight gets some time to finish and is kept.

        Questions that are not answered then are refused with `StoppedError`.

        Args:
            grace_s: How much time; None: the endpoint's `stop_s`.
        """
        self._is_stopped = True
        if self._reader is not None:
            grace_s = self._client.options.stop_s if grace_s is None else grace_s
            self._client.sender().stop_and_wait(grace_s)
            self._done.put(None)
            self._reader.join()
        self._refuse(self._error or StoppedError("stopped"))

    def _known(self, question: Question) -> Answer | None:
        answers = self._client.answers
        if answers is None:
            return None
        if time.monotonic() - self._looked_s > REFRESH_S:
            answers.refresh()
            self._looked_s = time.monotonic()
        known = answers.get(question.key)
        if known is not None and known.outcome in self._retry and known.time_s < self._since_s:
            return None
        return known

    def _read(self) -> None:
        """Hand over what comes back, in a thread of its own."""
        while True:
            batch = self._done.get()
            if batch is None:
                return
            if isinstance(batch, BaseException):
                self._error = batch
                self._refuse(batch)
                return
            for finished in batch:
                answer = finished.answer or Failure(
                    finished.kind, finished.reason, finished.attempts
                )
                with self._lock:
                    waiting = self._pending.pop(finished.key, [])
                for question, future in waiting:
                    self._client.count(question, answer)
                    if not future.cancelled():
                        future.set_result(answer)

    def _refuse(self, error: BaseException) -> None:
        with self._lock:
            waiting = [item for items in self._pending.values() for item in items]
            self._pending.clear()
        for _, future in waiting:
            if not future.done():
                future.set_exception(error)


def spent(askers: Iterable[Asker]) -> dict[str, float]:
    """Return what was used up, by role and measure: `audio_tone requests` -> 12."""
    found: dict[str, float] = {}
    for asker in askers:
        for role in asker.client.report().roles:
            for measure in ("requests", "tokens_in", "tokens_out"):
                found[f"{role.role} {measure}"] = float(getattr(role, measure))
    return found
