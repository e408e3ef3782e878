"""A cap on requests and tokens that holds with any number of requests in flight.

Before a request is sent, its worst case is set aside; the server's own count settles it. A request
that does not fit waits while others are in flight, whose true cost is usually below what was set
aside; once nothing is in flight and it still does not fit, the budget is out.

The worst case of a text is one token per UTF-8 byte, which holds for every byte-level vocabulary; that
of a picture or of a second of sound is a stated assumption, raised as soon as a server counts more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from pydantic import Field

from cache.errors import EmocacheError
from cache.schema import Model
from extract.annotate.endpoints.questions import Question

BYTES_PER_TOKEN = 4.0
"""Of English text, on average; for expectations, never for the cap."""


class BudgetError(EmocacheError):
    """The cap on requests or tokens is reached; what was answered is kept."""


class Caps(Model):
    """What one run may use up. None is no cap."""

    requests: int | None = Field(default=None, ge=0)
    """Requests sent, whatever comes of them; retries and repairs count."""

    tokens: int | None = Field(default=None, ge=0)
    """Tokens in and out, as the server counts them."""


class TokenRates(Model):
    """How many tokens a question may take beside its text."""

    image_tokens: int = Field(default=2048, ge=0)
    """At most, per picture."""

    audio_tokens_per_s: float = Field(default=50.0, ge=0)
    """At most, per second of sound."""

    audio_s: float = Field(default=30.0, ge=0)
    """Length of a sound that does not state one."""

    template_tokens: int = Field(default=64, ge=0)
    """What a chat template adds to a request."""

    def worst(self, question: Question) -> int:
        """Return the most tokens that a question can take, answer included."""
        n_bytes = len(question.text.encode()) + len((question.system or "").encode())
        if (schema := question.schema_text()) is not None:
            n_bytes += len(schema.encode()) + 200  # it may have to be asked for in words
        return n_bytes + self.beside_text(question) + question.sampling.max_tokens

    def expected(self, question: Question) -> int:
        """Return about how many tokens a question takes, with the longest answer."""
        n_bytes = len(question.text.encode()) + len((question.system or "").encode())
        prompt = round(n_bytes / BYTES_PER_TOKEN) + self.beside_text(question)
        return prompt + question.sampling.max_tokens

    def beside_text(self, question: Question) -> int:
        """Return the tokens of media and chat template, at most."""
        n_tokens = float(self.template_tokens)
        for part in question.media:
            if part.is_image:
                n_tokens += self.image_tokens
            else:
                seconds = self.audio_s if part.seconds is None else part.seconds
                n_tokens += seconds * self.audio_tokens_per_s
        return round(n_tokens)


@dataclass
class Reservation:
    """What is set aside for one request."""

    stated: int
    """Tokens that the asker stated as the most."""
    tokens: int
    """Tokens that are set aside: more, once servers counted more than was stated."""
    settled: bool = False


class Budget:
    """Sets aside and settles; used from one event loop.

    Args:
        caps: What may be used up.
    """

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self.requests = 0
        """Sent, or set aside to be sent."""
        self.tokens = 0
        """Used up by settled requests."""
        self.reserved_tokens = 0
        self.in_flight = 0
        self.uncounted = 0
        """Requests that the server did not count, charged with what was set aside."""
        self.overrun_tokens = 0
        """Tokens that servers counted beyond what was set aside."""
        self._scale = 1.0
        self._waiting: list[asyncio.Future[None]] = []

    async def reserve(self, tokens: int) -> Reservation:
        """Set aside a request of at most so many tokens, waiting for others if need be.

        Raises:
            BudgetError: It does not fit, and nothing is in flight that could free something.
        """
        while True:
            need = round(tokens * self._scale)
            problem = self._problem(need)
            if problem is None:
                break
            if not self.in_flight:
                raise BudgetError(problem)
            freed = asyncio.get_running_loop().create_future()
            self._waiting.append(freed)
            await freed
        self.requests += 1
        self.in_flight += 1
        self.reserved_tokens += need
        return Reservation(tokens, need)

    def settle(self, reservation: Reservation, used: int | None, *, sent: bool = True) -> None:
        """Charge a request.

        Args:
            reservation: What was set aside; settling twice does nothing.
            used: Tokens that the server counted; 0 if it refused the request. None if nobody knows:
                everything that was set aside is charged.
            sent: False if the request never reached the server, which then costs nothing.
        """
        if reservation.settled:
            return
        reservation.settled = True
        self.in_flight -= 1
        self.reserved_tokens -= reservation.tokens
        if not sent:
            self.requests -= 1
            used = 0
        if used is None:
            self.uncounted += 1
            used = reservation.tokens
        if used > reservation.tokens:
            # The assumptions were too low: take more from now on.
            self.overrun_tokens += used - reservation.tokens
            self._scale = max(self._scale, used / max(reservation.stated, 1))
        self.tokens += used
        waiting, self._waiting = self._waiting, []
        for freed in waiting:
            if not freed.done():
                freed.set_result(None)

    def _problem(self, need: int) -> str | None:
        caps = self.caps
        if caps.requests is not None and self.requests + 1 > caps.requests:
            return (
                f"the cap of {caps.requests:,} requests is reached. Every answer so far is kept. "
                "Raise the cap and run again; it goes on where it stopped."
            )
        if caps.tokens is not None and self.tokens + self.reserved_tokens + need > caps.tokens:
            return (
                f"the cap of {caps.tokens:,} tokens does not hold another request: {self.tokens:,} "
                f"are used and the next may take up to {need:,}. Every answer so far is kept. Raise "
                "the cap, or lower max_tokens or the image and audio token assumptions, and run "
                "again; it goes on where it stopped."
            )
        return None
