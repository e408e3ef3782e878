"""The protocol of a frozen encoder, and what every one of them promises.

An encoder is built from real weights and knows its own spec, weights digest included. It is
deterministic, has no gradients, and a batch of one gives what a batch of many gives (within 1e-4
relative in float32, tested for every encoder by `tests/test_encoders.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from cache.encoders import HubertEncoder, VideoMaeEncoder, VisionEncoder, WhisperEncoder
from extract.config import Precision

Waveform = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.float32]

_HALVED = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@runtime_checkable
class AudioEncoder(Protocol):
    """Waveforms to tokens."""

    @property
    def spec(self) -> WhisperEncoder | HubertEncoder:
        """What it is, with the digest of its weights."""

    def encode(self, waveforms: Sequence[Waveform]) -> list[Tokens]:
        """Encode mono 16 kHz waveforms, each (N,) float32 in -1..1, N >= 1.

        Returns:
            Per waveform (T, D) float32, only frames that hear the clip and not its padding, unless the
            spec stores the padded window.

        Raises:
            MediaError: A waveform is empty, or too short for a single frame.
        """


@runtime_checkable
class PictureEncoder(Protocol):
    """Pictures to tokens."""

    @property
    def spec(self) -> VisionEncoder:
        """What it is, with the digest of its weights."""

    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode normalised pictures (B, 3, S, S) float32, S a multiple of the patch size.

        Returns:
            (B, 1 + P, D) float32, CLS first, patches in raster order.
        """


@runtime_checkable
class VideoEncoder(Protocol):
    """The frames of a clip together to tokens."""

    @property
    def spec(self) -> VideoMaeEncoder:
        """What it is, with the digest of its weights."""

    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode normalised frames (B, F, 3, S, S) float32, F as the spec says.

        Returns:
            (B, F / tubelet, P, D) float32, patches in raster order; there is no CLS token.
        """


Encoder = AudioEncoder | PictureEncoder | VideoEncoder


def freeze(module: torch.nn.Module, device: str, precision: Precision) -> None:
    """Put a module into inference mode on a device, without gradients.

    In half precision the weights of linear and convolution layers are converted once, and
    `mixed` runs the rest as the reference does: norms, biases of norms, position tables and the
    residual stream stay float32 (reference facts, section 1.3).
    """
    module.eval().requires_grad_(requires_grad=False)
    if precision != "float32":
        for part in module.modules():
            if isinstance(part, _HALVED):
                part.to(getattr(torch, precision))
    module.to(device)


@contextmanager
def mixed(device: str, precision: Precision) -> Iterator[None]:
    """Compute matrix products in `precision` inside this block; float32 changes nothing."""
    if precision == "float32":
        yield
        return
    with torch.autocast(torch.device(device).type, getattr(torch, precision)):
        yield
