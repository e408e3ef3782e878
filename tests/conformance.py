"""What every encoder promises (`extract.encoders.base`), as a suite that each test file subclasses.

Write a fixture `subject` that gives a `Subject`, perhaps parametrised over checkpoint formats, and
`class TestConformance(EncoderConformance)` beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from extract.encoders.base import AudioEncoder, PictureEncoder, Precision, VideoEncoder

HALF_TOLERANCE = 0.03
"""Root mean square error of bfloat16 tokens, relative to that of the float32 tokens."""


@dataclass(frozen=True)
class Subject:
    """An encoder under test."""

    load: Callable[[Precision], Any]
    """Loads the real small checkpoint on the CPU."""
    run: Callable[[Any, Sequence[int]], list[np.ndarray]]
    """`run(encoder, seeds)`: one made-up input per seed (other seeds, other inputs; sound also of
    other lengths), all in one batch; the tokens of each."""

    @cached_property
    def encoder(self) -> Any:
        return self.load("float32")

    def encode(self, seeds: Sequence[int]) -> list[np.ndarray]:
        return self.run(self.encoder, seeds)


def modules_of(encoder: object) -> list[torch.nn.Module]:
    """The encoder itself if it is a module, or the modules that it holds."""
    if isinstance(encoder, torch.nn.Module):
        return [encoder]
    return [value for value in vars(encoder).values() if isinstance(value, torch.nn.Module)]


class EncoderConformance:
    def test_protocol(self, subject: Subject) -> None:
        protocols = {"sound": AudioEncoder, "pictures": PictureEncoder, "frames": VideoEncoder}
        assert isinstance(subject.encoder, protocols[subject.encoder.spec.takes])

    def test_shape_dtype_and_finite(self, subject: Subject) -> None:
        spec = subject.encoder.spec
        n_axes = {"sound": 2, "pictures": 2, "frames": 3}[spec.takes]
        for tokens in subject.encode([0, 1]):
            assert tokens.dtype == np.float32
            assert tokens.ndim == n_axes, f"shape {tokens.shape}"
            assert tokens.shape[-1] == spec.width, f"shape {tokens.shape}"
            assert min(tokens.shape) > 0, f"shape {tokens.shape}"
            assert np.isfinite(tokens).all()

    def test_deterministic(self, subject: Subject) -> None:
        first, again = subject.encode([3]), subject.encode([3])
        np.testing.assert_array_equal(first[0], again[0])
        other = subject.encode([4])[0]
        same = other.shape == first[0].shape and np.allclose(other, first[0], atol=1e-3)
        assert not same, "another input gives the same tokens"

    def test_batch_of_one_equals_batch_of_many(self, subject: Subject) -> None:
        together = subject.encode([0, 1, 2])
        assert len(together) == 3
        for seed in range(3):
            alone = subject.encode([seed])[0]
            np.testing.assert_allclose(alone, together[seed], rtol=1e-4, atol=1e-4)

    def test_frozen(self, subject: Subject) -> None:
        modules = modules_of(subject.encoder)
        assert modules
        for module in modules:
            assert not any(part.training for part in module.modules())
            assert not any(p.requires_grad for p in module.parameters())

    def test_knows_its_weights(self, subject: Subject) -> None:
        assert len(subject.encoder.spec.weights_sha256) == 64

    def test_half_precision_is_close(self, subject: Subject) -> None:
        half = subject.load("bfloat16")
        assert half.spec == subject.encoder.spec, "precision is no choice of the spec"
        for expected, tokens in zip(subject.encode([0]), subject.run(half, [0]), strict=True):
            assert tokens.dtype == np.float32
            assert tokens.shape == expected.shape
            error = np.sqrt(np.mean((tokens - expected) ** 2) / np.mean(expected**2))
            assert 0 < error < HALF_TOLERANCE, f"relative error {error:.2g}"
