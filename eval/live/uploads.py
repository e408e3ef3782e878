"""The clips that people gave to the page: files for as long as nobody looked at them, then what was seen.

A file is written under a name of our own into a folder that only we can read, and is deleted as soon as the
model has looked at it, whatever came of that. What was seen stays in memory, so that more can be asked, until
the page is left, or nobody asked for a while. Whoever does not know the random id of a clip reaches nothing.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field

from cache.errors import EmocacheError, MediaError
from cache.schema import Model

if TYPE_CHECKING:
    from eval.live.clip import SeenClip

logger = logging.getLogger(__name__)

_PREFIX = "emocache-app-"
_LOCK = "lock"


class PageLimits(Model):
    """How much the page takes on."""

    max_bytes: int = Field(default=50_000_000, ge=1)
    """Of one clip."""
    max_duration_s: float = Field(default=60.0, gt=0)
    """Of one clip."""
    concurrency: int = Field(default=1, ge=1)
    """Clips that are looked at or asked about at once."""
    max_waiting: int = Field(default=8, ge=0)
    """Questions that may wait behind those."""
    max_clips: int = Field(default=32, ge=1)
    """Clips kept at once; beyond that, the one that nobody asked about for longest goes."""
    forget_after_s: float = Field(default=1800.0, gt=0)
    """A clip that nobody asked about for so long is forgotten."""
    look_within_s: float = Field(default=120.0, gt=0)
    """A file that nobody began to look at by then is deleted."""
    max_upload_s: float = Field(default=300.0, gt=0)
    """Longest time that one upload may take."""


class BusyError(EmocacheError):
    """The page has as much to do as it takes on."""


class TooLargeError(MediaError):
    """A clip has more bytes than the page takes."""


@dataclass
class Upload:
    """One clip that somebody gave."""

    id: str
    path: Path
    """Where the file is, or was."""
    seen: SeenClip | None = None
    """What the model saw; None until it looked."""
    busy: int = 0
    """How many jobs have it in hand; it is not forgotten meanwhile."""
    used: float = field(default_factory=time.monotonic)


class Uploads:
    """All clips of one page, in one folder that is removed at the end. A context manager.

    Folders that a killed page left behind are removed when the next one starts.

    Args:
        limits: How much is taken on.
        parent: Where the folder is made; None is the machine's folder for temporary files.
        clock: Seconds that only go forward; tests bring their own.
    """

    def __init__(
        self,
        limits: PageLimits,
        parent: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._guard = threading.Lock()
        self._held: dict[str, Upload] = {}
        self._n_arriving = 0
        where = Path(tempfile.gettempdir()) if parent is None else parent
        remove_left_behind(where)
        self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=where))  # mode 0700
        self._lock = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    # ---- coming ------------------------------------------------------------------------------

    async def receive(self, blocks: AsyncIterable[bytes], stated_bytes: int | None) -> str:
        """Write a clip down as it comes, and return its id.

        Args:
            blocks: The content of the file.
            stated_bytes: Its length as the sender says; more than the limit is refused at once.

        Raises:
            TooLargeError: It is larger than the limit.
            MediaError: It is empty, or was not sent whole or in time.
            BusyError: Too many clips are arriving.
        """
        if stated_bytes is not None and stated_bytes > self.limits.max_bytes:
            raise self._too_large()
        with self._arriving() as path:
            n_bytes = 0
            try:
                with path.open("xb") as file:
                    async with asyncio.timeout(self.limits.max_upload_s):
                        async for block in blocks:
                            n_bytes += len(block)
                            if n_bytes > self.limits.max_bytes:
                                raise self._too_large()
                            file.write(block)
            except TimeoutError:
                raise MediaError(
                    f"The clip did not arrive within {self.limits.max_upload_s:g} s. Try a shorter or "
                    "smaller one."
                ) from None
            if not n_bytes:
                raise MediaError("The file is empty (0 bytes). Choose one that holds a clip.")
            if stated_bytes is not None and n_bytes != stated_bytes:
                raise MediaError("The clip did not arrive whole. Send it again.")
            with self._guard:
                self._held[path.name] = Upload(path.name, path, used=self._clock())
        self.tidy()
        return path.name

    @contextmanager
    def _arriving(self) -> Iterator[Path]:
        with self._guard:
            if self._n_arriving > self.limits.max_waiting:
                raise BusyError("Too many clips are being sent at once. Try again in a minute.")
            self._n_arriving += 1
        path = self.folder / secrets.token_urlsafe(18)
        try:
            yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            with self._guard:
                self._n_arriving -= 1

    def _too_large(self) -> TooLargeError:
        return TooLargeError(
            f"The clip is larger than {self.limits.max_bytes / 1e6:g} MB, the most that this page takes. "
            "Cut it, or save it with a smaller picture."
        )

    # ---- in hand -----------------------------------------------------------------------------

    @contextmanager
    def in_hand(self, upload_id: str) -> Iterator[Upload]:
        """Give a clip to a job. Its file is deleted when the (last) job ends, however it ends.

        Raises:
            MediaError: There is no such clip (any more).
        """
        with self._guard:
            upload = self._held.get(upload_id)
            if upload is None:
                raise MediaError(
                    "This clip is not here any more: clips are forgotten when the page is left, or "
                    f"after {self.limits.forget_after_s / 60:g} minutes. Give it again."
                )
            upload.busy += 1
        try:
            yield upload
        finally:
            with self._guard:
                upload.busy -= 1
                upload.used = self._clock()
                if not upload.busy:  # else another job still needs the file
                    upload.path.unlink(missing_ok=True)
                    if upload.seen is None:
                        self._held.pop(upload_id, None)

    # ---- going -------------------------------------------------------------------------------

    def forget(self, upload_id: str) -> None:
        """Delete a clip and what was seen of it; an unknown id is nothing."""
        with self._guard:
            upload = self._held.pop(upload_id, None)
        # A job that has it in hand goes on with what it has, and deletes the file once more.
        if upload is not None:
            upload.path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Forget what nobody asked about for long, and what is beyond the number that is kept."""
        now = self._clock()
        with self._guard:
            idle = sorted((u for u in self._held.values() if not u.busy), key=lambda u: u.used)
            n_over = len(self._held) - self.limits.max_clips
            gone = [u for at, u in enumerate(idle) if at < n_over or now - u.used > self._kept_s(u)]
        for upload in gone:
            self.forget(upload.id)

    def _kept_s(self, upload: Upload) -> float:
        """Return how long an idle clip is kept: a file that nobody looks at only briefly."""
        limits = self.limits
        return limits.forget_after_s if upload.seen is not None else limits.look_within_s

    def __contains__(self, upload_id: str) -> bool:
        """Return whether a clip is kept."""
        with self._guard:
            return upload_id in self._held

    def __len__(self) -> int:
        """Return the number of clips that are kept."""
        with self._guard:
            return len(self._held)

    def close(self) -> None:
        """Delete everything."""
        with self._guard:
            self._held.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def remove_left_behind(parent: Path) -> int:
    """Remove upload folders of pages that are gone, and return how many there were.

    A page that lives holds a lock on its folder; the kernel lifts it when the process ends, even by kill -9.
    """
    n_removed = 0
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # somebody is just making or removing it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            n_removed += 1
        except BlockingIOError:  # its page lives
            continue
        finally:
            os.close(lock)
    if n_removed:
        logger.info("removed what killed pages had left (%d)", n_removed)
    return n_removed
