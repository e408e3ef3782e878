"""Asking workers to end soon: by a signal, a request in the store, or the clock.

A worker that drains ends the batch in its encoder, commits what is encoded, gives its unit back, and
ends within seconds.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Sent by a cluster that takes the machine back, and ahead of a walltime."""

_POLL_S = 0.05

_active: set[Drain] = set()
_idle = threading.Condition()


class Drain:
    """A worker's reason to end; none while it may go on.

    A plain attribute and no `threading.Event`: a signal handler that sets one while the same thread
    is about to wait for it never returns.
    """

    def __init__(self) -> None:
        """Nothing speaks against going on yet."""
        self.reason: str | None = None

    def request(self, reason: str) -> None:
        """Ask the worker to end soon; the first reason counts."""
        self.reason = self.reason or reason

    def is_set(self) -> bool:
        """True once the worker should end."""
        return self.reason is not None

    def wait(self, timeout_s: float) -> bool:
        """Wait for a request; True if there is one."""
        end_s = time.monotonic() + timeout_s
        while not self.is_set() and time.monotonic() < end_s:
            time.sleep(_POLL_S)
        return self.is_set()


def drain_all(reason: str) -> None:
    """Ask every worker of this process to end."""
    with _idle:
        for drain in _active:
            drain.request(reason)


def idle(timeout_s: float) -> bool:
    """Wait until no worker of this process is at work; False if one still is."""
    with _idle:
        return _idle.wait_for(lambda: not _active, timeout_s)


@contextmanager
def registered(drain: Drain) -> Iterator[None]:
    """Let `drain_all` reach a worker."""
    with _idle:
        _active.add(drain)
    try:
        yield
    finally:
        with _idle:
            _active.discard(drain)
            _idle.notify_all()


@contextmanager
def on_signals(drain: Drain) -> Iterator[None]:
    """Drain on SIGTERM, SIGUSR1 and the first Ctrl-C; the second Ctrl-C interrupts.

    Signals reach the main thread alone: in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and drain.is_set():
            raise KeyboardInterrupt
        drain.request(signal.Signals(number).name)

    before: dict[signal.Signals, Any] = {}
    try:
        for caught in (*SIGNALS, signal.SIGINT):
            before[caught] = signal.signal(caught, handle)
        yield
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)


@contextmanager
def after(drain: Drain, timeout_s: float | None) -> Iterator[None]:
    """Drain when the time is up; None never does."""
    if timeout_s is None:
        yield
        return
    timer = threading.Timer(timeout_s, drain.request, ["the walltime is nearly over"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
