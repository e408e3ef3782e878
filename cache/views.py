"""Token views: what the trainer asks for, derived from stored tokens on load.

One stored tensor serves many views, so an ablation over token counts encodes nothing. Means are
taken in float64 and returned as float32. Where a view differs from extracting that many tokens
in the first place, its `definition` says so, and reports quote it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cache.encoders import AUDIO_FRAMES_PER_S, WhisperEncoder
from cache.errors import SpecMismatchError
from cache.schema import Model
from cache.spec import TokenSpec

Tokens = npt.NDArray[Any]
"""Stored tokens: float16, float32, or the bfloat16 of `ml_dtypes`."""
Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def adaptive_pool(tokens: Tokens, n_out: int, out: Float32 | None = None) -> Float32:
    """Average the first axis into `n_out` bins, as torch's adaptive average pooling does.

    Bin i covers `floor(i T / n)` to `ceil((i + 1) T / n)`; neighbours share a frame where T is not
    a multiple of n.

    Args:
        tokens: (T, ...) with T >= 1.
        n_out: Number of bins.
        out: Where to write, (n_out, ...) float32; None allocates.

    Returns:
        (n_out, ...) float32: `out`, if given.

    Raises:
        SpecMismatchError: `out` has another shape or dtype.
    """
    n_in = tokens.shape[0]
    out = _output((n_out, *tokens.shape[1:]), out)
    if n_in == n_out:
        np.copyto(out, tokens)
        return out
    # One addition per bin. It widens float16 to float64 as fast as to float32, so exact sums cost
    # nothing; prefix sums over all frames take ten times as long.
    total = np.empty(tokens.shape[1:])
    for i in range(n_out):
        start, end = i * n_in // n_out, -((-(i + 1) * n_in) // n_out)
        np.add.reduce(tokens[start:end], axis=0, dtype=np.float64, out=total)
        np.divide(total, end - start, out=out[i], casting="same_kind")
    return out


class AudioView(Model):
    """Audio tokens pooled over time: paper section 5.1."""

    n_tokens: int = Field(gt=0)

    def apply(self, tokens: Tokens, out: Float32 | None = None) -> tuple[Float32, Mask]:
        """Pool the valid frames to `n_tokens`.

        A clip with fewer valid frames than that is not stretched: its frames are kept as they are,
        zero-padded and masked.

        Args:
            tokens: (T, D), only valid frames, T >= 1.
            out: Where to write, (n_tokens, D) float32, for example a row of a batch; None allocates.

        Returns:
            (n_tokens, D) float32, `out` if given, and a mask (n_tokens,), True where a token is
            valid.

        Raises:
            SpecMismatchError: `out` has another shape or dtype.
        """
        n_valid = min(len(tokens), self.n_tokens)
        out = _output((self.n_tokens, tokens.shape[1]), out)
        adaptive_pool(tokens, n_valid, out[:n_valid])
        out[n_valid:] = 0
        return out, np.arange(self.n_tokens) < n_valid

    def shape(self, spec: TokenSpec) -> tuple[int, int]:
        """Return (tokens, channels) of this view of clips stored under `spec`."""
        return self.n_tokens, spec.encoder.width

    def definition(self, spec: TokenSpec) -> str:
        """Return in one sentence, for reports, what this view takes from clips stored under `spec`."""
        n_stored = spec.max_shape[0]
        if spec.utterance and self.n_tokens == 1:
            return "the stored mean over time"
        padded = isinstance(spec.encoder, WhisperEncoder) and spec.encoder.padded
        if padded and self.n_tokens < n_stored:
            return (
                f"all {n_stored} frames of the zero-padded window, silence behind the clip included, by "
                f"adaptive mean to {_count(self.n_tokens, 'token')}"
            )
        if self.n_tokens >= n_stored:
            return (
                f"every valid frame as stored ({AUDIO_FRAMES_PER_S} per second, at most {n_stored}), "
                f"zero-padded to {self.n_tokens} tokens and masked"
            )
        return (
            f"the valid frames ({AUDIO_FRAMES_PER_S} per second, at most {n_stored}) by adaptive mean "
            f"to {_count(self.n_tokens, 'token')}; fewer frames are kept as stored, zero-padded and "
            "masked"
        )


class VideoView(Model):
    """Video tokens pooled to frames x grid x grid, time-major, then row, then column."""

    n_frames: int = Field(gt=0)
    grid: int = Field(gt=0)

    def apply(self, tokens: Tokens, out: Float32 | None = None) -> tuple[Float32, Mask]:
        """Choose frames and pool each to `grid x grid`.

        Args:
            tokens: (F, P, D) with P a square number; the frames of `frames_used(F)` are taken.
            out: Where to write, (n_frames * grid * grid, D) float32; None allocates.

        Returns:
            (n_frames * grid * grid, D) float32, `out` if given, and a mask of that length, all
            True.

        Raises:
            SpecMismatchError: `out` has another shape or dtype.
        """
        n_stored, n_patches, width = tokens.shape
        side = round(n_patches**0.5)
        out = _output((self.n_frames * self.grid**2, width), out)
        if self.n_frames != n_stored:
            tokens = tokens[list(self.frames_used(n_stored))]
        if self.grid == side:
            np.copyto(out, tokens.reshape(out.shape))
            return out, np.ones(len(out), np.bool_)
        square = tokens.reshape(self.n_frames, side, side, width)
        rows = adaptive_pool(np.moveaxis(square, 1, 0), self.grid)
        cells = adaptive_pool(np.moveaxis(rows, 2, 0), self.grid)  # (column, row, F, D)
        np.copyto(out, cells.transpose(2, 1, 0, 3).reshape(out.shape))
        return out, np.ones(len(out), np.bool_)

    def frames_used(self, n_stored: int) -> tuple[int, ...]:
        """Return which stored frames the view takes, counted from 0.

        Fewer frames than stored means segment centres of the stored ones: of 16 frames, 4 are
        numbers 2, 6, 10 and 14. These are the frames that extracting 4 would have chosen only if
        the number stored is an odd multiple of the number wanted, see `definition`.
        """
        return tuple(segment_centres(n_stored, self.n_frames).tolist())

    def shape(self, spec: TokenSpec) -> tuple[int, int]:
        """Return (tokens, channels) of this view; refuse what the stored tokens cannot serve.

        Raises:
            SpecMismatchError: More frames, or a finer grid, than are stored.
        """
        n_stored, n_patches, width = spec.max_shape
        side = round(n_patches**0.5)
        if self.n_frames > n_stored or self.grid > side:
            raise SpecMismatchError(
                f"the video view asks for {self.n_frames} frames of {self.grid}x{self.grid}, the "
                f"store holds {n_stored} of {side}x{side}. Ask for less, or extract with "
                f"tokens.video.frames.n_frames={self.n_frames} tokens.video.grid={self.grid}."
            )
        return self.n_frames * self.grid**2, width

    def definition(self, spec: TokenSpec) -> str:
        """Return in one sentence, for reports, what this view takes from clips stored under `spec`.

        It says where the numbers are not those of an extraction that stores just these tokens: the
        frames are others, or the cells do not cover the same patches.

        Raises:
            SpecMismatchError: More frames, or a finer grid, than are stored.
        """
        self.shape(spec)
        if spec.utterance:
            return f"the stored mean over time{'' if spec.cls_only else ' and patches'}"
        return f"{self._frames_in_words(spec)}, {self._grid_in_words(spec)}"

    def _frames_in_words(self, spec: TokenSpec) -> str:
        n_stored = spec.max_shape[0]
        if self.n_frames == n_stored:
            return "the one stored frame" if n_stored == 1 else f"all {n_stored} stored frames"
        used = self.frames_used(n_stored)
        # Centre i of the clip lies at (2 i + 1) / 2n of its frames, stored frame j likewise.
        at_centre = all(
            (2 * j + 1) * self.n_frames == (2 * i + 1) * n_stored for i, j in enumerate(used)
        )
        centres = "middle" if self.n_frames == 1 else f"{self.n_frames} segment centres"
        seen = f"{'' if at_centre else 'not '}the {centres} of the clip"
        if spec.frames is not None and spec.frames.kind == "window":
            seen = "a window of consecutive frames, not the whole clip"
        return (
            f"{'frame' if self.n_frames == 1 else 'frames'} {', '.join(map(str, used))} of the "
            f"{n_stored} stored, counted from 0 ({seen})"
        )

    def _grid_in_words(self, spec: TokenSpec) -> str:
        side, n_patches = round(spec.max_shape[1] ** 0.5), spec.patches_per_side
        size = f"{self.grid}x{self.grid}"
        if self.grid == side:
            return f"{size} as stored"
        if side % self.grid == 0:
            cell = side // self.grid
            text = f"{size} by mean of {cell}x{cell} stored cells each"
        else:
            text = f"{size} by adaptive mean of the {side}x{side} stored, neighbours sharing stored cells"
        if side == n_patches or (side % self.grid == 0 and n_patches % side == 0):
            return text
        return f"{text} (not the mean of the encoder's {n_patches}x{n_patches} patches)"


class ImageView(Model):
    """Patch tokens of the global frame, `join` consecutive raster-order patches in one token."""

    join: int = Field(gt=0)

    def apply(self, tokens: Tokens, out: Float32 | None = None) -> tuple[Float32, Mask]:
        """Join patches: a reshape, no arithmetic.

        Args:
            tokens: (1 + P, D), CLS first.
            out: Where to write, (P / join, join * D) float32; None allocates.

        Returns:
            (P / join, join * D) float32, `out` if given, and a mask of that length, all True.

        Raises:
            SpecMismatchError: `out` has another shape or dtype.
        """
        n_patches, width = len(tokens) - 1, tokens.shape[1]
        out = _output((n_patches // self.join, self.join * width), out)
        np.copyto(out, tokens[1:].reshape(out.shape))
        return out, np.ones(len(out), np.bool_)

    def cls(self, tokens: Tokens) -> Float32:
        """Return the CLS token, (D,) float32: the global context of the pre-fusion."""
        cls: Float32 = tokens[0].astype(np.float32)
        return cls

    def shape(self, spec: TokenSpec) -> tuple[int, int]:
        """Return (tokens, channels) of this view.

        Raises:
            SpecMismatchError: The stored patches do not divide into groups of `join`.
        """
        n_stored, width = spec.max_shape
        if (n_stored - 1) % self.join:
            raise SpecMismatchError(
                f"the image view joins {self.join} patches, but the store holds {n_stored - 1} a "
                "clip, which is not a multiple. Choose another views.image.join."
            )
        return (n_stored - 1) // self.join, self.join * width

    def definition(self, spec: TokenSpec) -> str:
        """Return in one sentence, for reports, what this view takes from clips stored under `spec`.

        Raises:
            SpecMismatchError: The stored patches do not divide into groups of `join`.
        """
        n_tokens, width = self.shape(spec)
        if not n_tokens:
            return "the CLS token alone"
        patches = f"the {n_tokens * self.join} stored patches in raster order"
        if self.join == 1:
            return f"{patches}, one token of {width} channels each, CLS apart"
        return (
            f"{patches}, {self.join} joined in each of {_count(n_tokens, 'token')} of {width} channels "
            "(a reshape), CLS apart"
        )


def segment_centres(n_available: int, n_wanted: int) -> npt.NDArray[np.intp]:
    """Return the centres of `n_wanted` equal segments of `n_available` items."""
    index = (2 * np.arange(n_wanted) + 1) * n_available // (2 * n_wanted)
    return index.astype(np.intp)


def _output(shape: tuple[int, ...], out: Float32 | None) -> Float32:
    """Return `out` after a check of its shape and dtype, or a new array."""
    if out is None:
        return np.empty(shape, np.float32)
    if out.shape != shape or out.dtype != np.float32:
        raise SpecMismatchError(
            f"out is {out.shape} {out.dtype}, the view of these tokens is {shape} float32. "
            "Allocate what the view's shape() says."
        )
    return out


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
