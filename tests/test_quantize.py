"""int8 tokens: the error bound by arithmetic, the goals on heavy data and on real encoders' output."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cache.clip import Clip, Record, file_sha256
from cache.commit import Status
from cache.errors import CorruptTokensError
from cache.quantize import Quantized, dequantize, dequantize_torch, errors, quantize
from extract.encoders.bank import EncoderBank
from extract.workers.results import encode_clip

Float16 = npt.NDArray[np.float16]
PAPER_SHAPES = {"image": (1025, 1408), "video": (16, 4, 1408), "audio 30 s": (1500, 1280)}


def heavy(shape: tuple[int, ...], seed: int = 0) -> Float16:
    """Return tokens with a few channels 10 to 50 times larger and log-normal token norms."""
    rng = np.random.default_rng(seed)
    gain = np.ones(shape[-1])
    outliers = rng.choice(shape[-1], max(1, shape[-1] // 128), replace=False)
    gain[outliers] = rng.uniform(10, 50, len(outliers))
    scale = np.exp(rng.normal(0, 0.5, (*shape[:-1], 1)))
    return (rng.standard_normal(shape) * gain * scale).astype(np.float16)


def step(quantized: Quantized) -> npt.NDArray[np.float64]:
    """Return the step of every element, from the definition, in float64."""
    return quantized.token_scale[..., None].astype(np.float64) * 2.0 ** (
        quantized.channel_exponent.astype(np.float64) / 4
    )


@pytest.mark.parametrize("stream", PAPER_SHAPES)
def test_the_goals_hold_on_heavy_data_of_the_papers_shapes(stream: str) -> None:
    tokens = heavy(PAPER_SHAPES[stream])
    quantized = quantize(tokens)
    assert quantized.n_bytes <= 0.51 * tokens.nbytes
    everywhere, worst_channel = errors(tokens, dequantize(quantized))
    assert everywhere <= 0.01
    assert worst_channel <= 0.02


@pytest.mark.parametrize("n_frames", [8, 64, 250])
def test_audio_meets_the_error_goals_at_any_length(n_frames: int) -> None:
    """Size too, from 60 frames (1.2 s) on: below, the channels' exponents are more than 1 %."""
    tokens = heavy((n_frames, 1280))
    quantized = quantize(tokens)
    assert (quantized.n_bytes <= 0.51 * tokens.nbytes) == (n_frames >= 60)
    everywhere, worst_channel = errors(tokens, dequantize(quantized))
    assert everywhere <= 0.01
    assert worst_channel <= 0.02


def test_one_scale_per_token_alone_would_lose_the_ordinary_channels() -> None:
    """The reason for the channels' scales, computed without the code under test."""
    tokens = heavy((250, 1280)).astype(np.float64)
    scale = np.abs(tokens).max(axis=1, keepdims=True) / 127
    plain = np.rint(tokens / scale) * scale
    assert errors(tokens, plain)[1] > 0.1
    assert errors(tokens, dequantize(quantize(tokens.astype(np.float32))))[1] < 0.012


def test_one_clip_by_hand() -> None:
    """RMS of the channels: sqrt((16 + 16) / 2) = 4 = 2 ** (8 / 4), sqrt(0.0625) = 2 ** (-8 / 4).

    Divided by them, the tokens are (1, -1) and (-1, 1): scale 1 / 127, values 127 and -127.
    """
    quantized = quantize(np.array([[4, -0.25], [-4, 0.25]], np.float16))
    assert quantized.channel_exponent.tolist() == [8, -8]
    assert quantized.values.tolist() == [[127, -127], [-127, 127]]
    np.testing.assert_allclose(quantized.token_scale, [1 / 127, 1 / 127], rtol=1e-6)
    np.testing.assert_allclose(dequantize(quantized), [[4, -0.25], [-4, 0.25]], rtol=1e-6)
    assert (quantized.values.dtype, quantized.channel_exponent.dtype) == (np.int8, np.int8)
    assert quantized.token_scale.dtype == dequantize(quantized).dtype == np.float32
    assert quantized.n_bytes == 4 + 2 * 4 + 2


@given(
    arrays(
        np.float16,
        array_shapes(min_dims=2, max_dims=3, max_side=12),
        elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
    )
)
def test_every_element_is_within_half_a_step(tokens: Float16) -> None:
    """Any finite float16, subnormal and largest ones included."""
    quantized = quantize(tokens)
    assert quantized.values.shape == tokens.shape
    assert quantized.token_scale.shape == tokens.shape[:-1]
    assert np.abs(quantized.values.astype(int)).max() <= 127
    restored = dequantize(quantized)
    assert np.isfinite(restored).all()
    # Beside the half step, float32 arithmetic: three roundings of a value of at most 127 steps.
    allowed = step(quantized) * (0.5 + 127 * 4 * 2.0**-24)
    assert (np.abs(restored - tokens.astype(np.float64)) <= allowed).all()


@given(st.integers(-8, 8), st.integers(1, 5))
def test_a_power_of_two_changes_the_exponents_alone(octaves: int, n_tokens: int) -> None:
    """Only range, never precision, depends on the unit in which an encoder answers."""
    tokens = np.random.default_rng(n_tokens).standard_normal((n_tokens, 7)).astype(np.float32)
    one, other = quantize(tokens), quantize(tokens * np.float32(2.0**octaves))
    np.testing.assert_array_equal(other.values, one.values)
    np.testing.assert_array_equal(other.channel_exponent, one.channel_exponent + 4 * octaves)
    np.testing.assert_array_equal(other.token_scale, one.token_scale)


def test_zeros_stay_zeros() -> None:
    tokens = heavy((6, 32))
    tokens[2] = 0
    tokens[:, 5] = 0
    quantized = quantize(tokens)
    restored = dequantize(quantized)
    assert not restored[2].any()
    assert not restored[:, 5].any()
    assert quantized.token_scale[2] == 0
    assert quantized.channel_exponent[5] == 0
    silent = quantize(np.zeros((3, 4), np.float32))
    assert not dequantize(silent).any()
    assert errors(np.zeros((3, 4)), dequantize(silent)) == (0.0, 0.0)


def test_a_constant_channel_and_a_single_token_are_precise() -> None:
    tokens = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float16)
    tokens[:, 3] = 20
    assert errors(tokens, dequantize(quantize(tokens)))[1] < 0.01
    single = heavy((1, 1280))
    assert errors(single, dequantize(quantize(single)))[0] < 0.005


@pytest.mark.parametrize("size", [2.0**-24, 1e-6, 65504, 1e-25, 1e25])
def test_tiny_and_huge_numbers_keep_their_precision(size: float) -> None:
    dtype = np.float16 if 2.0**-25 < size < 1e5 else np.float32
    signs = np.random.default_rng(0).choice([-1, 1], (5, 9))
    tokens = (signs * size).astype(dtype)
    assert errors(tokens, dequantize(quantize(tokens)))[1] < 1e-3


def test_a_subnormal_step_never_turns_a_sign() -> None:
    """RMS 1024; divided by it, 157 units of the smallest float32: the step is one, and 157 > 127."""
    small = 157 * 2.0**-149 * 1024
    quantized = quantize(np.array([[2048], [small], [small], [-small]], np.float32))
    assert quantized.values.ravel().tolist() == [127, 127, 127, -127]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    tokens = heavy((3, 8))
    tokens[1, 2] = bad
    with pytest.raises(CorruptTokensError, match=r"hold values that are not finite"):
        quantize(tokens)


def test_errors_by_hand() -> None:
    """Channel 0: lost 1 of 3-4-5, so 1/5. Channel 1: exact. Both: 1 of sqrt(25 + 144) = 13."""
    tokens, restored = np.array([[3.0, 12], [4, 0]]), np.array([[3.0, 12], [5, 0]])
    assert errors(tokens, restored) == pytest.approx((1 / 13, 1 / 5))
    assert errors(np.array([[1.0, 0]]), np.array([[1.0, 1e-9]]))[1] == float("inf")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torch_gives_the_same_bits(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    clips = [quantize(heavy((16, 4, 96), seed)) for seed in range(3)]
    every = Quantized(  # each exponent there is, -128 too, which a foreign writer might use
        np.ones((1, 256), np.int8), np.ones(1, np.float32), np.arange(-128, 128, dtype=np.int8)
    )
    for clip in (*clips, every):
        parts = (clip.values, clip.token_scale, clip.channel_exponent)
        found = dequantize_torch(*(torch.from_numpy(p).to(device) for p in parts))
        assert found.dtype == torch.float32
        np.testing.assert_array_equal(found.cpu().numpy(), dequantize(clip))
    batch = dequantize_torch(
        torch.from_numpy(np.stack([c.values for c in clips])).to(device),
        torch.from_numpy(np.stack([c.token_scale for c in clips])).to(device),
        torch.from_numpy(np.stack([c.channel_exponent for c in clips])).to(device),
    )
    np.testing.assert_array_equal(batch.cpu().numpy(), np.stack([dequantize(c) for c in clips]))


def test_the_goals_hold_on_real_clips(bank: EncoderBank, shared_clips: Path) -> None:
    """Every stream of real media, by the bundled encoders; their 64 and 96 channels are narrow."""
    names = [
        "carphone.mp4",
        "jfk.flac",
        "astronaut.png",
        "emodb_03a07Wc.wav",
        "fsdd_0_george_0.wav",
    ]
    n_checked = 0
    for name, spec in itertools.product(names, bank.specs):
        tokens = real_tokens(bank, shared_clips / name, spec.stream)
        if tokens is None:
            continue
        n_checked += 1
        for dtype in (np.float16, np.float32):
            stored = tokens.astype(dtype)
            everywhere, worst_channel = errors(stored, dequantize(quantize(stored)))
            assert everywhere <= 0.01, (name, spec.stream)
            assert worst_channel <= 0.02, (name, spec.stream)
    assert n_checked == 6  # carphone: video and image; a picture; three of sound


def real_tokens(bank: EncoderBank, path: Path, stream: str) -> npt.NDArray[np.float32] | None:
    """Return what the bank says to a real clip, or None if the clip has no such stream."""
    spec = next(s for s in bank.specs if s.stream == stream)
    clip = Clip(sha256=file_sha256(path), n_bytes=1)
    record = Record(uid=f"x/{path.name}", media=path.name, clip=clip)
    (found,) = encode_clip(record, path, [spec], bank)
    if found.status is not Status.OK:
        return None
    assert found.tokens is not None
    return np.asarray(found.tokens, np.float32)
