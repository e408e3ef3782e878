"""What the stored tokens of one spec look like: norms, channels, lengths.

The numbers that decide how tokens may be stored and fed to a model: a channel tens of times larger
than the rest spoils int8 and slows training; many exact zeros, or a norm of zero, point at an
encoder that saw nothing. Memory stays the same however many clips are added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cache.encoders import AUDIO_FRAMES_PER_S
from cache.errors import CorruptTokensError
from cache.schema import Model
from cache.spec import Stream, TokenSpec

Tokens = npt.NDArray[Any]

OUTLIER_FACTOR = 6.0
"""A channel is an outlier if its RMS is above this many times the median channel's."""

# Token norms are counted in 256 bins per octave from 2**-32 to 2**32: 0.3 % wide, 128 KiB.
_OCTAVES = 32
_BINS_PER_OCTAVE = 256
_N_BINS = 2 * _OCTAVES * _BINS_PER_OCTAVE
_MOST_SHOWN = 64
"""Bins of a histogram in the result."""


class Histogram(Model):
    """Counts between neighbouring edges; the last bin holds its upper edge too."""

    edges: tuple[float, ...]
    """Rising, one more than counts."""
    counts: tuple[int, ...]


class Quantiles(Model):
    """Percentiles by nearest rank: the smallest value that so many per cent do not exceed."""

    p1: float
    p25: float
    p50: float
    p75: float
    p99: float


class OutlierChannel(Model):
    """A channel that is much larger than the others."""

    channel: int
    rms: float
    factor: float
    """Its RMS over that of the median channel."""


class TokenStatistics(Model):
    """Statistics over the stored tokens of one spec."""

    schema_version: Literal[1] = 1
    spec_id: str
    stream: Stream
    n_clips: int
    n_tokens: int
    """Vectors of D channels: frames of audio, patches of pictures, CLS tokens included."""
    minimum: float
    """The smallest element, sign included."""
    maximum: float
    zero_share: float
    """Share of elements that are exactly zero."""
    token_norm: Quantiles
    """L2 norms of tokens, to 0.3 %."""
    token_norms: Histogram
    """Of all tokens but those of norm zero, which `n_zero_tokens` counts."""
    n_zero_tokens: int
    channel_rms: tuple[float, ...]
    """(D,)."""
    median_channel_rms: float
    outlier_channels: tuple[OutlierChannel, ...]
    """Above 6 times the median, largest first; none if the median channel is zero."""
    valid_len: Quantiles
    """First axis of a clip's tokens: frames of audio or video, tokens of a picture."""
    valid_lens: tuple[tuple[int, int], ...]
    """Each length and the number of clips that have it, rising."""
    duration_s: Quantiles | None
    """Audio only: valid_len at 50 frames per second, so to 0.02 s, and at most the encoder's window."""
    durations_s: Histogram | None
    """Audio only, whole seconds."""


class StatisticsCollector:
    """Adds up clips, one at a time; `result` may be asked for at any point."""

    def __init__(self, spec: TokenSpec) -> None:
        """Start with no clips.

        Raises:
            SpecMismatchError: The spec names no weights yet, so nothing is stored under it.
        """
        self._spec_id, self._stream = spec.spec_id, spec.stream
        self._n_tokens = self._n_zero_tokens = self._n_zeros = 0
        self._channel_squares = np.zeros(spec.encoder.width)
        self._range = (np.inf, -np.inf)
        self._norm_range = (np.inf, -np.inf)
        self._norm_counts = np.zeros(_N_BINS, np.int64)
        self._lengths: Counter[int] = Counter()

    def add(self, tokens: Tokens) -> None:
        """Take in one clip's stored tokens.

        Args:
            tokens: (T, D) audio, (F, P, D) video or (1 + P, D) image; valid frames only.

        Raises:
            CorruptTokensError: No token, another width than the spec's, or a value that is not
                finite.
        """
        width = len(self._channel_squares)
        if not tokens.size or tokens.shape[-1] != width:
            raise CorruptTokensError(
                f"cannot take statistics of tokens of shape {tokens.shape}: the {self._stream} spec "
                f"stores at least one token of {width} channels. Read them under their own spec."
            )
        flat = tokens.reshape(-1, width).astype(np.float64)
        squares = np.square(flat)
        token_norm = np.sqrt(squares.sum(axis=1))
        if not np.isfinite(token_norm).all():
            raise CorruptTokensError(
                f"cannot take statistics of {self._stream} tokens that are not finite: the store "
                "takes none in, so they were damaged since. Verify the store."
            )
        self._channel_squares += squares.sum(axis=0)
        self._range = _wider(self._range, flat)
        self._n_zeros += flat.size - int(np.count_nonzero(flat))
        self._n_tokens += len(flat)
        self._lengths[len(tokens)] += 1
        self._add_norms(token_norm)

    def _add_norms(self, norms: npt.NDArray[np.float64]) -> None:
        self._norm_range = _wider(self._norm_range, norms)
        above = norms[norms > 0]
        self._n_zero_tokens += len(norms) - len(above)
        place = np.floor((np.log2(above) + _OCTAVES) * _BINS_PER_OCTAVE).astype(np.intp)
        np.add.at(self._norm_counts, np.clip(place, 0, _N_BINS - 1), 1)

    def result(self) -> TokenStatistics:
        """Return the statistics of all clips so far.

        Raises:
            CorruptTokensError: There was no clip.
        """
        if not self._n_tokens:
            raise CorruptTokensError(
                f"no {self._stream} clip to take statistics of: the store holds none with status "
                "'ok' under this spec. Extract some first."
            )
        rms = np.sqrt(self._channel_squares / self._n_tokens)
        median = float(np.median(rms))
        lengths = sorted(self._lengths.items())
        duration_s, durations_s = None, None
        if self._stream == "audio":
            seconds = [(length / AUDIO_FRAMES_PER_S, n) for length, n in lengths]
            duration_s, durations_s = _quantiles(seconds), _by_second(lengths)
        return TokenStatistics(
            spec_id=self._spec_id,
            stream=self._stream,
            n_clips=sum(self._lengths.values()),
            n_tokens=self._n_tokens,
            minimum=float(self._range[0]),
            maximum=float(self._range[1]),
            zero_share=self._n_zeros / (self._n_tokens * len(rms)),
            token_norm=self._norm_quantiles(),
            token_norms=self._norm_histogram(),
            n_zero_tokens=self._n_zero_tokens,
            channel_rms=tuple(rms.tolist()),
            median_channel_rms=median,
            outlier_channels=_outliers(rms, median),
            valid_len=_quantiles(lengths),
            valid_lens=tuple(lengths),
            duration_s=duration_s,
            durations_s=durations_s,
        )

    def _norm_quantiles(self) -> Quantiles:
        """Return quantiles at the middles of the bins, none outside what was seen."""
        filled = np.flatnonzero(self._norm_counts)
        middles = 2.0 ** ((filled + 0.5) / _BINS_PER_OCTAVE - _OCTAVES)
        middles = np.clip(middles, *self._norm_range)
        counted = list(zip(middles.tolist(), self._norm_counts[filled].tolist(), strict=True))
        if self._n_zero_tokens:
            counted.insert(0, (0.0, self._n_zero_tokens))
        return _quantiles(counted)

    def _norm_histogram(self) -> Histogram:
        """Return the counts between the smallest and the largest norm, in at most 64 bins."""
        filled = np.flatnonzero(self._norm_counts)
        if not len(filled):
            return Histogram(edges=(), counts=())
        first, last = int(filled[0]), int(filled[-1]) + 1
        width = -(-(last - first) // _MOST_SHOWN)
        starts = np.arange(first, last, width)
        counts = np.add.reduceat(self._norm_counts[:last], starts)
        edges = 2.0 ** (np.append(starts, starts[-1] + width) / _BINS_PER_OCTAVE - _OCTAVES)
        return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def collect(spec: TokenSpec, clips: Iterable[Tokens]) -> TokenStatistics:
    """Return the statistics of some clips' stored tokens.

    Args:
        spec: What they are stored under.
        clips: Tokens of one clip after the other; read once, never held.

    Raises:
        SpecMismatchError: The spec names no weights.
        CorruptTokensError: No clip, or one that does not fit; see `StatisticsCollector.add`.
    """
    collector = StatisticsCollector(spec)
    for tokens in clips:
        collector.add(tokens)
    return collector.result()


def _wider(known: tuple[float, float], values: npt.NDArray[np.float64]) -> tuple[float, float]:
    return min(known[0], float(values.min())), max(known[1], float(values.max()))


def _outliers(rms: npt.NDArray[np.float64], median: float) -> tuple[OutlierChannel, ...]:
    if median == 0:
        return ()
    largest_first = np.argsort(-rms, kind="stable")
    return tuple(
        OutlierChannel(channel=int(c), rms=float(rms[c]), factor=float(rms[c] / median))
        for c in largest_first
        if rms[c] > OUTLIER_FACTOR * median
    )


def _quantiles(counted: Sequence[tuple[float, int]]) -> Quantiles:
    """Return the quantiles of rising values, each with its count."""
    values, counts = zip(*counted, strict=True)
    up_to = np.cumsum(counts)
    # Whole numbers: the p-th percentile is the value whose rank is ceil(p n / 100).
    ranks = [-(-p * int(up_to[-1]) // 100) for p in (1, 25, 50, 75, 99)]
    found = [float(values[int(np.searchsorted(up_to, rank))]) for rank in ranks]
    return Quantiles(p1=found[0], p25=found[1], p50=found[2], p75=found[3], p99=found[4])


def _by_second(lengths: Sequence[tuple[int, int]]) -> Histogram:
    """Count clips per whole second; one of exactly the last full second falls into the last bin."""
    n_seconds = -(-lengths[-1][0] // AUDIO_FRAMES_PER_S)
    counts = [0] * n_seconds
    for length, n in lengths:
        counts[min(length // AUDIO_FRAMES_PER_S, n_seconds - 1)] += n
    return Histogram(edges=tuple(float(s) for s in range(n_seconds + 1)), counts=tuple(counts))
