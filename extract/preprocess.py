"""Pictures to encoder input: the resize and normalisation that the encoders were trained with.

The resize runs in Pillow, because torchvision's transforms on Pillow images are what the reference
used: Pillow's filters are antialiased and round to whole 8-bit levels, a tensor resize is not the
same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image

Interpolation = Literal["bicubic", "bilinear"]

_FILTERS: dict[str, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


def pixels(
    frames: Sequence[np.ndarray],
    size_px: int,
    interpolation: Interpolation,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> torch.Tensor:
    """Resize frames to a square, ignoring their aspect, and normalise them per channel.

    The numbers are those of torchvision's `Resize((size, size))`, `ToTensor()` and
    `Normalize(mean, std)` on Pillow images.

    Args:
        frames: B pictures, each (H, W, 3) uint8 RGB; sizes may differ.
        size_px: edge of the square output, in pixels.
        interpolation: the antialiased Pillow filter.
        mean: per-channel mean, of values in 0..1.
        std: per-channel standard deviation, of values in 0..1.

    Returns:
        (B, 3, size_px, size_px) float32, contiguous.

    Raises:
        ValueError: if there is no frame, a frame is not (H, W, 3) uint8, the filter is unknown,
            the size is below 1 or a standard deviation is not positive.
    """
    if interpolation not in _FILTERS:
        raise ValueError(
            f"unknown interpolation {interpolation!r}: allowed are {', '.join(_FILTERS)}."
        )
    if size_px < 1 or min(std) <= 0:
        raise ValueError(
            f"size_px is {size_px} and std is {std}: size_px must be at least 1 and every std "
            "above 0; take both from the TokenSpec."
        )
    if not frames:
        raise ValueError(
            "no frames to prepare: give at least one; a clip without pictures is `absent` "
            "and is never encoded."
        )
    batch = np.empty((len(frames), size_px, size_px, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):
        if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
            raise ValueError(
                f"frame {i} has shape {frame.shape} and dtype {frame.dtype}: (H, W, 3) uint8 RGB "
                "is needed, as extract.decode gives."
            )
        picture = Image.fromarray(np.ascontiguousarray(frame))
        batch[i] = np.asarray(picture.resize((size_px, size_px), _FILTERS[interpolation]))
    scaled = torch.from_numpy(batch).permute(0, 3, 1, 2).to(torch.float32).div_(255)  # (B,3,S,S)
    centre = torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1)
    return scaled.sub_(centre).div_(spread).contiguous()
