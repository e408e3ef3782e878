"""Pictures to encoder input, against torchvision on Pillow images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from extract.preprocess import Interpolation, normalise, pixels, resize

transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("interpolation", "size_px", "mean", "std"),
    [
        ("bicubic", 448, CLIP_MEAN, CLIP_STD),
        ("bilinear", 224, IMAGENET_MEAN, IMAGENET_STD),
        ("bicubic", 28, CLIP_MEAN, CLIP_STD),
    ],
)
def test_same_numbers_as_torchvision(
    interpolation: Interpolation,
    size_px: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> None:
    rng = np.random.default_rng(0)
    frames = [
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for height, width in ((180, 320), (568, 320), (31, 33), (448, 448))
    ]
    reference = transforms.Compose(
        [
            transforms.Resize(
                (size_px, size_px), getattr(transforms.InterpolationMode, interpolation.upper())
            ),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    expected = torch.stack([reference(Image.fromarray(frame)) for frame in frames])
    got = pixels(frames, size_px, interpolation, mean, std)
    assert got.shape == (4, 3, size_px, size_px)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert torch.equal(got, expected)


def test_by_hand_and_batch_of_one() -> None:
    grey = np.full((10, 20, 3), (255, 0, 51), dtype=np.uint8)
    got = pixels([grey[:, ::-1]], 4, "bilinear", (0.5, 0.5, 0.0), (0.5, 0.25, 0.1))
    # (1 - 0.5) / 0.5, (0 - 0.5) / 0.25, (0.2 - 0) / 0.1
    assert torch.allclose(got[0, :, 2, 1], torch.tensor([1.0, -2.0, 2.0]))
    both = pixels([grey, 255 - grey], 4, "bilinear", (0.5, 0.5, 0.0), (0.5, 0.25, 0.1))
    assert torch.equal(both[:1], got)


@pytest.mark.parametrize(
    ("frames", "size_px", "words"),
    [
        ([], 224, "no frames"),
        ([np.zeros((4, 4), np.uint8)], 224, r"\(H, W, 3\) uint8"),
        ([np.zeros((4, 4, 3), np.float32)], 224, "float32"),
        ([np.zeros((4, 4, 3), np.uint8)], 0, "size_px is 0"),
    ],
)
def test_refusals(frames: list[np.ndarray], size_px: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pixels(frames, size_px, "bicubic", CLIP_MEAN, CLIP_STD)
    with pytest.raises(ValueError, match="unknown interpolation"):
        pixels(frames, 224, "nearest", CLIP_MEAN, CLIP_STD)  # type: ignore[arg-type]


def test_the_two_halves_give_the_whole() -> None:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (40, 60, 3), dtype=np.uint8) for _ in range(3)]
    batch = resize(frames, 28, "bilinear")
    assert batch.shape == (3, 28, 28, 3)
    assert batch.dtype == np.uint8
    for picture, frame in zip(batch, frames, strict=True):
        expected = Image.fromarray(frame).resize((28, 28), Image.Resampling.BILINEAR)
        assert np.array_equal(picture, np.asarray(expected))
    whole = pixels(frames, 28, "bilinear", CLIP_MEAN, CLIP_STD)
    for given in (batch, torch.from_numpy(batch)):
        got = normalise(given, CLIP_MEAN, CLIP_STD, device="cpu")
        assert got.is_contiguous()
        assert torch.equal(got, whole)
    assert np.array_equal(batch, resize(frames, 28, "bilinear")), "the batch is not changed"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_normalises_to_the_same_bits() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    got = normalise(levels, CLIP_MEAN, CLIP_STD, device="cuda")
    assert got.is_cuda
    assert torch.equal(got.cpu(), normalise(levels, CLIP_MEAN, CLIP_STD))


@pytest.mark.parametrize(
    ("batch", "std", "words"),
    [
        (np.zeros((1, 4, 4, 3), np.uint8), (0.2, 0.0, 0.2), "every value must be above 0"),
        (np.zeros((1, 3, 4, 4), np.uint8), CLIP_STD, r"\(B, S, S, 3\) uint8"),
        (np.zeros((4, 4, 3), np.uint8), CLIP_STD, r"\(4, 4, 3\)"),
        (np.zeros((1, 4, 4, 3), np.float32), CLIP_STD, "float32"),
    ],
)
def test_refusals_of_batches(
    batch: np.ndarray, std: tuple[float, float, float], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        normalise(batch, CLIP_MEAN, std)
