"""When to send: rate limits, waits after a refusal, and when to stop trying.

Decisions only; the clock is a parameter and nothing here touches the network.
"""

from __future__ import annotations

import random
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from pydantic import Field

from cache.schema import Model

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class RetryPolicy(Model):
    """How often a request is tried, and how long to wait before."""

    attempts: int = Field(default=6, ge=1)
    """Requests at most for one question, the first included; being told to slow down does not count
    while the server says for how long."""

    base_s: float = Field(default=0.5, ge=0)
    """Longest wait before the second try; it doubles with each further one."""

    longest_s: float = Field(default=60.0, ge=0)
    """No wait of our own is longer."""

    longest_told_s: float = Field(default=600.0, ge=0)
    """If the server asks for a longer wait than this, the question fails instead."""

    told_attempts: int = Field(default=50, ge=1)
    """How often a server may ask one question to wait."""

    stop_after: int | None = Field(default=None, ge=1)
    """Failures in a row, over all questions, after which the run stops. None: twice the number in
    flight, at least 8."""

    patience_s: float = Field(default=60.0, ge=0)
    """A server that has answered before gets so long to come back, however many requests fail."""

    def wait_s(self, n_failed: int, draw: Callable[[], float] = random.random) -> float:
        """Return how long to wait after the n-th failure: full jitter, so that clients spread."""
        return min(self.longest_s, self.base_s * 2.0 ** min(n_failed - 1, 60)) * draw()


class Streak:
    """Counts failures in a row, and says when to stop trying.

    Args:
        stop_after: So many failures in a row end the run.
        patience_s: And so long since the first of them, if there was an answer before.
    """

    def __init__(
        self, stop_after: int, patience_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stop_after = stop_after
        self.patience_s = patience_s
        self.n_failed = 0
        self.answered = False
        self._clock = clock
        self._since = 0.0

    def good(self) -> None:
        """Note an answer."""
        self.answered, self.n_failed = True, 0

    def bad(self) -> bool:
        """Note a failure; return whether to stop."""
        if not self.n_failed:
            self._since = self._clock()
        self.n_failed += 1
        if self.n_failed < self.stop_after:
            return False
        return not self.answered or self._clock() - self._since >= self.patience_s


class RateWindow:
    """At most so many units in any window of time; used from one event loop.

    Args:
        limit: Units in a window: requests, or tokens.
        window_s: Its length.
        clock: For tests.
    """

    def __init__(
        self, limit: int, window_s: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limit = limit
        self.window_s = window_s
        self._clock = clock
        self._log: deque[list[float]] = deque()  # [time, units]; settling changes the units
        self._sum = 0.0

    def try_take(self, units: int) -> tuple[float, list[float] | None]:
        """Take units now, if they fit.

        What is larger than a whole window goes alone, or it would wait for ever.

        Returns:
            Seconds until it is worth asking again and None, or 0 and the entry for `settle`.
        """
        now = self._clock()
        while self._log and self._log[0][0] <= now - self.window_s:
            self._sum -= self._log.popleft()[1]
        if self._log and self._sum + units > self.limit:
            return max(self._log[0][0] + self.window_s - now, 0.001), None
        entry = [now, float(units)]
        self._log.append(entry)
        self._sum += units
        return 0.0, entry

    def settle(self, entry: list[float], units: int) -> None:
        """Correct what was taken by what was used."""
        if self._log and entry[0] >= self._log[0][0]:
            self._sum += units - entry[1]
        entry[1] = float(units)


def told_wait_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return how long a refusing server asks to wait; None if it does not say.

    Understood are `retry-after-ms`, and `Retry-After` in seconds or as a date.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    told = headers.get("retry-after")
    seconds = _number(told)
    if seconds is not None:
        return seconds
    if told:
        try:
            when = parsedate_to_datetime(told)
        except ValueError:
            return None
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return max((when - (now or datetime.now(UTC))).total_seconds(), 0.0)
    return None


def exhausted_wait_s(headers: Mapping[str, str]) -> float | None:
    """Return how long a server that answered has nothing left, by its rate-limit headers."""
    waits = [
        duration_s(headers.get(f"x-ratelimit-reset-{what}"))
        for what in ("requests", "tokens")
        if _number(headers.get(f"x-ratelimit-remaining-{what}")) == 0
    ]
    return max((w for w in waits if w is not None), default=None)


def duration_s(text: str | None) -> float | None:
    """Return the seconds of "6m0s", "120ms", "1.5" and the like; None if it is no duration."""
    if text is None:
        return None
    parts = _DURATION.findall(text)
    if parts and "".join(n + unit for n, unit in parts) == text:
        return sum(float(n) * _UNITS_S[unit] for n, unit in parts)
    return _number(text)


def _number(text: str | None) -> float | None:
    try:
        found = float(text or "")
    except ValueError:
        return None
    return found if 0 <= found < float("inf") else None
