"""The errors of emocache: each is an `EmocacheError` and, where one fits, a builtin error too.

Every message says what was wrong, what we got, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EmocacheError(Exception):
    """Base of every error that a user can cause; the command line prints it as one line."""


class SchemaError(EmocacheError, ValueError):
    """A configuration, a manifest line or metadata does not decode."""


class ManifestError(EmocacheError, ValueError):
    """A corpus contradicts itself: duplicate uid, unknown label, path outside the media root."""


class CacheMissError(EmocacheError, LookupError):
    """The store holds no committed tokens for this clip and spec."""


class SpecMismatchError(EmocacheError, ValueError):
    """A store, run or checkpoint was made with another spec; the message lists what differs."""


class StoreError(EmocacheError):
    """A store cannot be opened or written: foreign folder, newer format, read-only, full disk."""


class CorruptTokensError(EmocacheError):
    """Stored tokens fail a check: checksum, shape, non-finite values."""


class MediaError(EmocacheError):
    """A media file or one of its streams cannot be decoded; extraction records it as `failed`."""


class CheckpointError(EmocacheError, ValueError):
    """A checkpoint does not fit: missing or unexpected keys, unknown layout, foreign spec."""


class PredictionError(EmocacheError, ValueError):
    """A predictions file does not fit its task: missing, duplicate or incomplete rows."""


class StoppedError(EmocacheError):
    """The user stopped the work; its state is saved and the same command continues it."""


class DivergedError(EmocacheError):
    """Training went astray, a loss that is not a number for example; the last checkpoint is good."""


class TrackerError(EmocacheError):
    """A service that is told of a training refuses."""


class ExtractionStopped(EmocacheError):
    """Extraction cannot go on: most clips of late failed alike, or no decoder process starts."""


class EncoderError(EmocacheError):
    """An encoder's device failed in mid-run; the process cannot be trusted with more work."""


class MissingDependencyError(EmocacheError, ImportError):
    """A part of the project was used whose extra is not installed."""


def near_miss(got: str, allowed: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(got, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""
