"""The protocol of a frozen encoder, and what every one of them promises.

An encoder is built from real weights and knows its own spec, weights digest included. It is
deterministic, has no gradients, and a batch of one gives what a batch of many gives (within 1e-4
relative, tested for every encoder by `tests/test_encoders.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from cache.spec import EvaEncoder, WhisperEncoder

Waveform = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.float32]


@runtime_checkable
class AudioEncoder(Protocol):
    """Waveforms to tokens."""

    spec: WhisperEncoder

    def encode(self, waveforms: Sequence[Waveform]) -> list[Tokens]:
        """Encode mono 16 kHz waveforms, each (N,) float32 in -1..1, N >= 1.

        Returns:
            Per waveform (T, D) float32, only frames that hear the clip and not its padding.
        """


@runtime_checkable
class PictureEncoder(Protocol):
    """Pictures to tokens."""

    spec: EvaEncoder

    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode normalised pictures (B, 3, S, S) float32, S a multiple of the patch size.

        Returns:
            (B, 1 + P, D) float32, CLS first, patches in raster order.
        """
