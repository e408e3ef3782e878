"""Signals that end a run in good order: save behind this step, then stop."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what batch systems send at the end; what `sbatch --signal=USR1@300` sends ahead of it."""


class Interrupt:
    """Listens inside a `with` block. A second Ctrl-C stops at once."""

    def __init__(self) -> None:
        """Nothing was asked for yet."""
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in SIGNALS:
            try:
                self._before[number] = signal.signal(number, self._on_signal)
            except ValueError:  # not in the main thread, where signals cannot arrive either
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning(
            "%s: stopping after this step%s",
            name,
            "; press Ctrl-C again to stop at once" if number == signal.SIGINT else "",
        )
