"""What encoding a clip takes: floating-point operations, counted from the shapes of the networks.

A multiplication and its addition count as two. Counted are matrix products, convolutions and attention,
which are nearly all of it; norms, activations and resampling are not. `tests/test_extract_costs.py`
compares the counts with torch's own counter.
"""

from __future__ import annotations

import math

from cache.encoders import (
    SAMPLE_RATE_HZ,
    HubertEncoder,
    SoundEncoder,
    VideoMaeEncoder,
    VisionEncoder,
    WhisperEncoder,
)
from cache.spec import TokenSpec

_HUBERT_KERNELS = (10, 3, 3, 3, 3, 2, 2)
_HUBERT_STRIDES = (5, 2, 2, 2, 2, 2, 2)
_HUBERT_CHANNELS = 512
"""Convolutions before HuBERT's transformer: 320 samples become one frame."""
_HUBERT_POSITIONS = (128, 16)
"""Kernel and groups of the convolution that gives positions."""


def clip_flops(spec: TokenSpec, duration_s: float | None = None) -> float:
    """Return the operations of encoding one clip under a spec.

    What is stored of the output (grid, CLS token, mean) changes nothing of it, nor does a crop. Pictures
    are taken to be distinct, as those of a clip with fewer frames than `frames.n_frames` are not.

    Args:
        spec: Which network, on which input.
        duration_s: Length of the sound; None: a whole window. Whisper always computes its whole window.
    """
    encoder = spec.encoder
    if isinstance(encoder, WhisperEncoder):
        return _whisper(encoder)
    if isinstance(encoder, HubertEncoder):
        window_s = encoder.window_s
        return _hubert(encoder, min(window_s, window_s if duration_s is None else duration_s))
    assert isinstance(encoder, VisionEncoder)
    assert spec.frames is not None
    n_patches = spec.patches_per_side**2
    if isinstance(encoder, VideoMaeEncoder):
        n_tubelets = encoder.n_frames // encoder.tubelet
        return _vit(encoder, n_tubelets * n_patches, 3 * encoder.tubelet, has_cls=False)
    return spec.frames.n_frames * _vit(encoder, n_patches, 3, has_cls=True)


def hears_length(spec: TokenSpec) -> bool:
    """True if the operations of a clip depend on its length."""
    return isinstance(spec.encoder, HubertEncoder)


def _block(n: int, width: int, mlp_width: int) -> float:
    """One transformer block on n tokens: q, k, v, o; two layers of the MLP; Q K^T and P V."""
    weights = 4 * width**2 + 2 * width * mlp_width
    return 2.0 * n * weights + 2.0 * 2 * n**2 * width


def _vit(encoder: VisionEncoder, n_patches: int, channels: int, *, has_cls: bool) -> float:
    """Blocks on all patches of a picture, or of a clip, and the embedding of the patches."""
    embedding = 2.0 * n_patches * channels * encoder.patch_px**2 * encoder.width
    n_tokens = n_patches + has_cls
    return encoder.depth * _block(n_tokens, encoder.width, encoder.mlp_width) + embedding


def _n_blocks(encoder: SoundEncoder) -> int:
    """Blocks that run: those behind an earlier hidden state are not loaded."""
    return encoder.n_layers if encoder.layer is None else encoder.layer


def _whisper(encoder: WhisperEncoder) -> float:
    n, width = encoder.n_context, encoder.width
    stem = 2.0 * 2 * n * 3 * encoder.n_mels * width  # on two mel frames per token
    stem += 2.0 * n * 3 * width**2
    return _n_blocks(encoder) * _block(n, width, 4 * width) + stem


def _hubert(encoder: HubertEncoder, duration_s: float) -> float:
    n = math.floor(duration_s * SAMPLE_RATE_HZ)
    total, channels = 0.0, 1
    for kernel, stride in zip(_HUBERT_KERNELS, _HUBERT_STRIDES, strict=True):
        n = max(0, (n - kernel) // stride + 1)
        total += 2.0 * n * kernel * channels * _HUBERT_CHANNELS
        channels = _HUBERT_CHANNELS
    width = encoder.width
    total += 2.0 * n * channels * width  # projection
    kernel, groups = _HUBERT_POSITIONS
    # Padded by half a kernel on each side, of which the library cuts the last frame off again.
    total += 2.0 * (n + 1) * kernel * width**2 / groups
    return total + _n_blocks(encoder) * _block(n, width, encoder.mlp_width)
