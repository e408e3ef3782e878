"""Waveform to Whisper's log-mel spectrogram, and how many encoder frames hear the clip."""

from __future__ import annotations

import numpy as np
import torch

from cache.encoders import AUDIO_FRAMES_PER_S, SAMPLE_RATE_HZ
from cache.errors import MediaError
from extract.encoders.base import Waveform

SAMPLES_PER_FRAME, _rest = divmod(SAMPLE_RATE_HZ, AUDIO_FRAMES_PER_S)
assert _rest == 0, "an encoder frame is a whole number of samples"


def valid_audio_frames(n_samples: int, n_context: int) -> int:
    """Return how many encoder frames hear a waveform: ceil of 50 per second, at most the window."""
    return min(n_context, -(-n_samples // SAMPLES_PER_FRAME))


def log_mel(waveform: Waveform, *, n_mels: int, n_context: int) -> torch.Tensor:
    """Return the log-mel spectrogram of a window, by openai-whisper's own code.

    Args:
        waveform: (N,) float32 mono at 16 kHz; zero-padded or cut to the window.
        n_mels: 80, or 128 for large-v3.
        n_context: Encoder frames of a window.

    Returns:
        (n_mels, 2 * n_context) float32.

    Raises:
        MediaError: The waveform is empty or not one-dimensional.
    """
    from whisper.audio import log_mel_spectrogram, pad_or_trim

    if waveform.ndim != 1 or len(waveform) == 0:
        raise MediaError(f"waveform of shape {waveform.shape}; needs (N,) mono samples, N >= 1")
    window = pad_or_trim(
        torch.from_numpy(np.ascontiguousarray(waveform)), n_context * SAMPLES_PER_FRAME
    )
    mel: torch.Tensor = log_mel_spectrogram(window, n_mels=n_mels)
    return mel
