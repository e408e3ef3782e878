"""Token views: what the trainer asks for, derived from stored tokens on load.

One stored tensor serves many views, so an ablation over token counts encodes nothing. Pooling is
done in float64 prefix sums and returned as float32.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cache.errors import SpecMismatchError
from cache.schema import Model
from cache.spec import TokenSpec

Tokens = npt.NDArray[np.float16] | npt.NDArray[np.float32]
Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def adaptive_pool(tokens: Tokens, n_out: int) -> Float32:
    """Average the first axis into `n_out` bins, as torch's adaptive average pooling does.

    Bin i covers `floor(i T / n)` to `ceil((i + 1) T / n)`; neighbours share a frame where T is not
    a multiple of n.

    Args:
        tokens: (T, ...) with T >= 1.
        n_out: Number of bins.

    Returns:
        (n_out, ...) float32.
    """
    n_in = tokens.shape[0]
    index = np.arange(n_out)
    start = index * n_in // n_out
    end = -((-(index + 1) * n_in) // n_out)
    sums = np.zeros((n_in + 1, *tokens.shape[1:]))
    np.cumsum(tokens, axis=0, dtype=np.float64, out=sums[1:])
    counts = (end - start).reshape(-1, *([1] * (tokens.ndim - 1)))
    pooled: Float32 = ((sums[end] - sums[start]) / counts).astype(np.float32)
    return pooled


class AudioView(Model):
    """Audio tokens pooled over time: paper section 5.1."""

    n_tokens: int = Field(gt=0)

    def apply(self, tokens: Tokens) -> tuple[Float32, Mask]:
        """Pool the valid frames to `n_tokens`.

        A clip with fewer valid frames than that is not stretched: its frames are kept as they are,
        zero-padded and masked.

        Args:
            tokens: (T, D), only valid frames, T >= 1.

        Returns:
            (n_tokens, D) float32 and a mask (n_tokens,), True where a token is valid.
        """
        n_valid = min(len(tokens), self.n_tokens)
        out = np.zeros((self.n_tokens, tokens.shape[1]), np.float32)
        out[:n_valid] = adaptive_pool(tokens, n_valid)
        return out, np.arange(self.n_tokens) < n_valid

    def shape(self, spec: TokenSpec) -> tuple[int, int]:
        """Return (tokens, channels) of this view of clips stored under `spec`."""
        return self.n_tokens, spec.encoder.width


class VideoView(Model):
    """Video tokens pooled to frames x grid x grid, time-major, then row, then column."""

    n_frames: int = Field(gt=0)
    grid: int = Field(gt=0)

    def apply(self, tokens: Tokens) -> tuple[Float32, Mask]:
        """Choose frames and pool each to `grid x grid`.

        Fewer frames than stored means segment centres of the stored ones: of 16 frames, 4 are
        numbers 2, 6, 10 and 14.

        Args:
            tokens: (F, P, D) with P a square number.

        Returns:
            (n_frames * grid * grid, D) float32 and a mask of that length, all True.
        """
        n_stored, n_patches, width = tokens.shape
        side = round(n_patches**0.5)
        chosen = tokens[segment_centres(n_stored, self.n_frames)]
        square = chosen.reshape(self.n_frames, side, side, width)
        rows = adaptive_pool(np.moveaxis(square, 1, 0), self.grid)
        cells = adaptive_pool(np.moveaxis(rows, 2, 0), self.grid)  # (column, row, F, D)
        out: Float32 = np.ascontiguousarray(cells.transpose(2, 1, 0, 3)).reshape(-1, width)
        return out, np.ones(len(out), np.bool_)

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


class ImageView(Model):
    """Patch tokens of the global frame, `join` consecutive raster-order patches in one token."""

    join: int = Field(gt=0)

    def apply(self, tokens: Tokens) -> tuple[Float32, Mask]:
        """Join patches.

        Args:
            tokens: (1 + P, D), CLS first.

        Returns:
            (P / join, join * D) float32 and a mask of that length, all True.
        """
        n_patches, width = len(tokens) - 1, tokens.shape[1]
        out = tokens[1:].astype(np.float32).reshape(n_patches // self.join, self.join * width)
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


def segment_centres(n_available: int, n_wanted: int) -> npt.NDArray[np.intp]:
    """Return the centres of `n_wanted` equal segments of `n_available` items."""
    index = (2 * np.arange(n_wanted) + 1) * n_available // (2 * n_wanted)
    return index.astype(np.intp)
