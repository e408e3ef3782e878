"""Pictures to encoder input: the resize and normalisation that the encoders were trained with.

`resize` runs where clips are decoded and needs no torch; `normalise` runs where the encoder is. The
resize is Pillow's, because torchvision's transforms on Pillow images are what the reference used:
Pillow's filters are antialiased and round to whole 8-bit levels, a tensor resize is not the same
picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import torch

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
    return normalise(resize(frames, size_px, interpolation), mean, std)


def resize(frames: Sequence[np.ndarray], size_px: int, interpolation: Interpolation) -> np.ndarray:
    """Resize frames to a square, ignoring their aspect.

    Args:
        frames: B pictures, each (H, W, 3) uint8 RGB; sizes may differ.
        size_px: edge of the square output, in pixels.
        interpolation: the antialiased Pillow filter.

    Returns:
        (B, size_px, size_px, 3) uint8 RGB, contiguous.

    Raises:
        ValueError: if there is no frame, a frame is not (H, W, 3) uint8, the filter is unknown or
            the size is below 1.
    """
    if interpolation not in _FILTERS:
        raise ValueError(
            f"unknown interpolation {interpolation!r}: allowed are {', '.join(_FILTERS)}."
        )
    if size_px < 1:
        raise ValueError(f"size_px is {size_px}: at least 1 is needed; take it from the TokenSpec.")
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
    return batch


def normalise(
    batch_uint8: np.ndarray | torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Scale resized pictures to 0..1 and normalise them per channel.

    Args:
        batch_uint8: (B, S, S, 3) uint8 RGB, as `resize` gives.
        mean: per-channel mean, of values in 0..1.
        std: per-channel standard deviation, of values in 0..1.
        device: where to compute; None is where the batch is. The bytes are what travels there, a
            quarter of the result; from pinned memory they travel without blocking.

    Returns:
        (B, 3, S, S) float32 on that device, contiguous.

    Raises:
        ValueError: if the batch is not (B, S, S, 3) uint8 or a standard deviation is not positive.
    """
    import torch  # here, so that processes which only decode start quickly and stay small

    if min(std) <= 0:
        raise ValueError(f"std is {std}: every value must be above 0; take it from the TokenSpec.")
    batch = torch.from_numpy(batch_uint8) if isinstance(batch_uint8, np.ndarray) else batch_uint8
    if batch.ndim != 4 or batch.shape[3] != 3 or batch.dtype != torch.uint8:
        raise ValueError(
            f"the batch has shape {tuple(batch.shape)} and dtype {batch.dtype}: (B, S, S, 3) uint8 "
            "RGB is needed, as resize gives."
        )
    batch = batch.to(device, non_blocking=True)
    scaled = batch.permute(0, 3, 1, 2).to(torch.float32)  # (B, 3, S, S)
    centre = torch.tensor(mean, dtype=torch.float32, device=batch.device).view(1, 3, 1, 1)
    spread = torch.tensor(std, dtype=torch.float32, device=batch.device).view(1, 3, 1, 1)
    # By a tensor: CUDA would multiply by the inverse of a plain 255, which rounds differently.
    levels = torch.full_like(spread, 255)
    return scaled.div_(levels).sub_(centre).div_(spread).contiguous()
