"""Token views: against torch, against direct extraction, into given memory, and in words."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import SpecMismatchError
from cache.spec import Frames, TokenSpec
from cache.views import AudioView, ImageView, VideoView, adaptive_pool
from extract.sampling import frame_indices
from train.presets import v2

DTYPES: list[Any] = [np.float16, np.float32, ml_dtypes.bfloat16]
F16_ROUNDING = 2.0**-11
"""Half a unit in the last place of a float16, relative."""


def offset_noise(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.float32]:
    """Return noise around large channel means: what a careless sum loses digits on."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal(shape) + 40 * rng.standard_normal(shape[-1])
    return noise.astype(np.float32)


def torch_pool(tokens: npt.NDArray[Any], n_out: int) -> npt.NDArray[np.float64]:
    """Pool (T, D) over time by torch, in float64."""
    columns = torch.from_numpy(tokens.astype(np.float64)).T
    pooled: npt.NDArray[np.float64] = torch.nn.functional.adaptive_avg_pool1d(
        columns, n_out
    ).T.numpy()
    return pooled


def torch_grid(patches: npt.NDArray[Any], grid: int) -> npt.NDArray[np.float64]:
    """Pool (F, P, D) to (F * grid * grid, D) by torch, in float64."""
    n_frames, n_patches, width = patches.shape
    side = round(n_patches**0.5)
    square = torch.from_numpy(patches.astype(np.float64)).reshape(n_frames, side, side, width)
    pooled = torch.nn.functional.adaptive_avg_pool2d(square.permute(0, 3, 1, 2), grid)
    out: npt.NDArray[np.float64] = pooled.permute(0, 2, 3, 1).reshape(-1, width).numpy()
    return out


def video_spec(n_frames: int = 16, grid: int | None = None) -> TokenSpec:
    spec = v2().tokens.video
    assert spec.frames is not None
    frames = spec.frames.model_copy(update={"n_frames": n_frames})
    return spec.model_copy(update={"frames": frames, "grid": grid})


# -- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_out", [1, 8, 64, 256, 700, 1499, 1500])
def test_audio_pooling_is_exact_to_float32(dtype: Any, n_out: int) -> None:
    tokens = offset_noise((1500, 6)).astype(dtype)
    pooled, mask = AudioView(n_tokens=n_out).apply(tokens)
    assert pooled.dtype == np.float32
    assert mask.all()
    np.testing.assert_allclose(pooled, torch_pool(tokens, n_out), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", [1, 2, 3, 4, 8, 11, 16])
def test_video_pooling_is_torchs(dtype: Any, grid: int) -> None:
    tokens = offset_noise((3, 256, 5)).astype(dtype)
    pooled, _ = VideoView(n_frames=3, grid=grid).apply(tokens)
    # Rows, then columns, with a float32 between: two roundings.
    np.testing.assert_allclose(pooled, torch_grid(tokens, grid), rtol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_image_tokens_are_copied_exactly(dtype: Any) -> None:
    tokens = offset_noise((1 + 36, 4)).astype(dtype)
    joined, _ = ImageView(join=4).apply(tokens)
    assert joined.dtype == np.float32
    assert joined.tolist() == tokens[1:].astype(np.float64).reshape(9, 16).tolist()
    assert ImageView(join=4).cls(tokens).tolist() == tokens[0].astype(np.float64).tolist()


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3))
def test_pooling_keeps_bounds_and_constants(n_in: int, n_out: int, width: int) -> None:
    tokens = offset_noise((n_in, width), seed=n_in * 61 + n_out)
    pooled = adaptive_pool(tokens, n_out)
    assert (pooled <= tokens.max(axis=0)).all()
    assert (pooled >= tokens.min(axis=0)).all()
    same = np.broadcast_to(tokens[:1], tokens.shape)
    np.testing.assert_array_equal(
        adaptive_pool(same, n_out), np.broadcast_to(tokens[:1], pooled.shape)
    )


# -- where a view equals a direct extraction by definition -----------------------------------------


@pytest.mark.parametrize(("stored", "wanted"), [(16, 8), (16, 2), (16, 1), (8, 4), (4, 2), (2, 1)])
def test_a_grid_of_a_stored_grid_is_that_of_the_patches(stored: int, wanted: int) -> None:
    """Up to the float16 rounding of what is stored: means of cells of equal size."""
    patches = offset_noise((2, 256, 7))
    kept = torch_grid(patches, stored).reshape(2, stored**2, 7).astype(np.float16)
    view, _ = VideoView(n_frames=2, grid=wanted).apply(kept)
    direct = torch_grid(patches, wanted)
    limit = F16_ROUNDING * np.abs(kept).max() * 1.01
    np.testing.assert_allclose(view, direct, rtol=0, atol=limit)


def test_a_grid_that_does_not_divide_the_stored_one_differs() -> None:
    """3x3 of a stored 4x4 is no mean of the 16x16 patches, and its definition says so."""
    patches = offset_noise((2, 256, 7))
    kept = torch_grid(patches, 4).reshape(2, 16, 7).astype(np.float32)
    view, _ = VideoView(n_frames=2, grid=3).apply(kept)
    assert np.abs(view - torch_grid(patches, 3)).max() > 0.01
    text = VideoView(n_frames=2, grid=3).definition(video_spec(2, grid=4))
    assert "not the mean of the encoder's 16x16 patches" in text


@pytest.mark.parametrize("n_tokens", [8, 64, 100, 750, 1500])
def test_audio_tokens_of_stored_frames_are_those_of_the_encoders(n_tokens: int) -> None:
    encoded = offset_noise((1500, 6))
    view, _ = AudioView(n_tokens=n_tokens).apply(encoded.astype(np.float16))
    limit = F16_ROUNDING * np.abs(encoded).max() * 1.01
    np.testing.assert_allclose(view, torch_pool(encoded, n_tokens), rtol=0, atol=limit)


def test_256_joined_tokens_of_1024_patches_are_a_reshape() -> None:
    tokens = offset_noise((1025, 5)).astype(np.float16)
    joined, _ = ImageView(join=4).apply(tokens)
    assert joined.shape == (256, 20)
    for place in (0, 1, 255):
        four = [tokens[1 + 4 * place + i] for i in range(4)]
        assert joined[place].tolist() == np.concatenate(four).tolist()


# -- which frames ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_stored", "n_wanted", "used"),
    [
        (16, 4, (2, 6, 10, 14)),
        (16, 1, (8,)),
        (16, 16, tuple(range(16))),
        (15, 5, (1, 4, 7, 10, 13)),
    ],
)
def test_frames_used_are_those_applied(n_stored: int, n_wanted: int, used: tuple[int, ...]) -> None:
    view = VideoView(n_frames=n_wanted, grid=1)
    assert view.frames_used(n_stored) == used
    numbered = np.arange(n_stored, dtype=np.float16).reshape(n_stored, 1, 1)
    assert view.apply(numbered)[0].ravel().tolist() == list(used)


@pytest.mark.parametrize("n_stored", [6, 9, 15, 16])
@pytest.mark.parametrize("n_wanted", [1, 2, 3, 4, 5])
def test_the_definition_tells_whether_extraction_takes_these_frames(
    n_stored: int, n_wanted: int
) -> None:
    """Against the sampling of the extraction, over clips of many lengths."""
    view = VideoView(n_frames=n_wanted, grid=2)
    same = all(
        [frame_indices("uniform", n, n_stored)[i] for i in view.frames_used(n_stored)]
        == frame_indices("uniform", n, n_wanted)
        for n in range(1, 400)
    )
    text = view.definition(video_spec(n_stored, grid=2))
    assert ("(not the " in text) == (not same)


# -- in words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_frames", "grid", "stored", "text"),
    [
        (16, 2, (16, 2), "all 16 stored frames, 2x2 as stored"),
        (
            4,
            2,
            (16, None),
            "frames 2, 6, 10, 14 of the 16 stored, counted from 0 (not the 4 segment centres of the "
            "clip), 2x2 by mean of 8x8 stored cells each",
        ),
        (
            1,
            1,
            (15, 2),
            "frame 7 of the 15 stored, counted from 0 (the middle of the clip), 1x1 by mean of 2x2 "
            "stored cells each",
        ),
        (
            16,
            3,
            (16, None),
            "all 16 stored frames, 3x3 by adaptive mean of the 16x16 stored, neighbours sharing "
            "stored cells",
        ),
        (
            1,
            3,
            (1, 6),
            "the one stored frame, 3x3 by mean of 2x2 stored cells each (not the mean of the "
            "encoder's 16x16 patches)",
        ),
    ],
)
def test_video_definitions(
    n_frames: int, grid: int, stored: tuple[int, int | None], text: str
) -> None:
    view = VideoView(n_frames=n_frames, grid=grid)
    assert view.definition(video_spec(*stored)) == text


def test_audio_definitions() -> None:
    spec = v2().tokens.audio
    assert AudioView(n_tokens=1500).definition(spec) == (
        "every valid frame as stored (50 per second, at most 1500), zero-padded to 1500 tokens and "
        "masked"
    )
    assert AudioView(n_tokens=64).definition(spec) == (
        "the valid frames (50 per second, at most 1500) by adaptive mean to 64 tokens; fewer frames "
        "are kept as stored, zero-padded and masked"
    )


def test_definitions_of_the_released_codes_choices() -> None:
    audio = v2().tokens.audio
    padded = audio.model_copy(update={"encoder": audio.encoder.model_copy(update={"padded": True})})
    assert AudioView(n_tokens=64).definition(padded) == (
        "all 1500 frames of the zero-padded window, silence behind the clip included, by adaptive mean "
        "to 64 tokens"
    )
    window = video_spec(16, 2).model_copy(update={"frames": Frames(kind="window", n_frames=16)})
    assert (
        VideoView(n_frames=16, grid=2).definition(window) == "all 16 stored frames, 2x2 as stored"
    )
    assert VideoView(n_frames=2, grid=2).definition(window) == (
        "frames 4, 12 of the 16 stored, counted from 0 (a window of consecutive frames, not the whole "
        "clip), 2x2 as stored"
    )


def test_image_definitions() -> None:
    spec = v2().tokens.image
    assert ImageView(join=4).definition(spec) == (
        "the 1024 stored patches in raster order, 4 joined in each of 256 tokens of 5632 channels "
        "(a reshape), CLS apart"
    )
    assert ImageView(join=1).definition(spec) == (
        "the 1024 stored patches in raster order, one token of 1408 channels each, CLS apart"
    )


def test_a_view_that_the_store_cannot_serve_has_no_definition() -> None:
    with pytest.raises(SpecMismatchError, match=r"asks for 16 frames of 4x4"):
        VideoView(n_frames=16, grid=4).definition(v2().tokens.video)
    with pytest.raises(SpecMismatchError, match=r"not a multiple"):
        ImageView(join=3).definition(v2().tokens.image)


# -- into given memory -----------------------------------------------------------------------------

APPLIED: list[tuple[Any, tuple[int, ...]]] = [
    (AudioView(n_tokens=6), (40, 3)),
    (AudioView(n_tokens=6), (4, 3)),
    (VideoView(n_frames=2, grid=2), (4, 16, 3)),
    (VideoView(n_frames=2, grid=3), (2, 16, 3)),
    (VideoView(n_frames=4, grid=4), (4, 16, 3)),
    (ImageView(join=2), (9, 3)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("view", "shape"), APPLIED)
def test_a_view_writes_into_its_row_of_a_batch(
    view: Any, shape: tuple[int, ...], dtype: Any
) -> None:
    """Nothing beside the row, no stale number in it, and the input as it was."""
    tokens = offset_noise(shape).astype(dtype)
    before = tokens.copy()
    alone, mask = view.apply(tokens)
    batch = np.full((3, *alone.shape), 7, np.float32)
    row = batch[1]
    written, same_mask = view.apply(tokens, row)
    assert written is row
    np.testing.assert_array_equal(batch[1], alone)
    assert (batch[[0, 2]] == 7).all()
    assert mask.tolist() == same_mask.tolist()
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize(("view", "shape"), APPLIED)
def test_memory_may_be_strided_and_tokens_read_only(view: Any, shape: tuple[int, ...]) -> None:
    tokens = offset_noise((*shape[:-1], 2 * shape[-1])).astype(np.float16)[..., ::2]
    tokens.flags.writeable = False
    alone, _ = view.apply(np.ascontiguousarray(tokens))
    wide = np.zeros((len(alone), 2 * alone.shape[1]), np.float32)
    view.apply(tokens, wide[:, ::2])
    np.testing.assert_array_equal(wide[:, ::2], alone)
    assert not wide[:, 1::2].any()


@pytest.mark.parametrize(("view", "shape"), APPLIED)
def test_memory_of_another_shape_or_dtype_is_refused(view: Any, shape: tuple[int, ...]) -> None:
    tokens = np.ones(shape, np.float16)
    right = view.apply(tokens)[0].shape
    for wrong in (
        np.empty(right, np.float16),
        np.empty((right[0] + 1, right[1]), np.float32),
        np.empty((1, *right), np.float32),
    ):
        with pytest.raises(SpecMismatchError, match=r"out is .*, the view of these tokens is"):
            view.apply(tokens, wrong)


def test_the_shape_for_memory_is_what_the_view_fills() -> None:
    """A batch allocated from the specs fits what is applied to stored clips."""
    tokens, views = v2().tokens, v2().views
    for stream in ("audio", "video", "image"):
        spec, view = getattr(tokens, stream), getattr(views, stream)
        stored = np.zeros(spec.max_shape, spec.dtype)
        assert view.apply(stored)[0].shape == view.shape(spec)
