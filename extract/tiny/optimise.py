"""What the pre-trainings of the two tiny encoders share: recipe, optimiser, closing check."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

FACES, VOICES = 11, 12
"""Streams of random numbers of the two trainings; the demo corpus uses others."""

HELD_OUT = 1 << 20
"""Number of the first held-out batch; no training run gets that far."""

Weights = dict[str, Tensor]
Scores = dict[str, float]
"""R^2 by name of the regressed parameter, on held-out inputs."""


@dataclass(frozen=True)
class Recipe:
    """How long to train, and on what."""

    seed: int = 0
    eva_steps: int = 2000
    """Optimizer steps of the tiny EVA; every fourth one at 168 px."""
    whisper_steps: int = 700
    """Optimizer steps of the tiny Whisper with 5 s of context."""
    whisper_full_steps: int = 80
    """Further steps with the 30 s of context that extraction uses, mostly padding."""
    faces_per_step: int = 32
    """Batch size of the tiny EVA; a quarter of it at 168 px."""
    voices_per_step: int = 32
    """Batch size of the tiny Whisper; a quarter of it with 30 s of context."""
    held_out: int = 256
    """Faces and voices of the closing check."""
    lr: float = 2e-3
    """Peak learning rate, after a warm-up over a tenth of the steps, then cosine to zero."""


def batch_rng(recipe: Recipe, stream: int, batch: int) -> np.random.Generator:
    """Return the generator of one batch, so that any batch can be made on its own."""
    return np.random.default_rng([recipe.seed, stream, batch])


def optimise(
    modules: nn.Module, loss: Callable[[int], Tensor], n_steps: int, lr: float, name: str
) -> None:
    """Minimise `loss(step)` with AdamW, a warm-up and a cosine."""
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01)
    for step in range(n_steps):
        warm = min(1.0, (step + 1) / max(1, n_steps // 10))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))
        optimizer.zero_grad()
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == n_steps - 1:
            logger.info("%s step %d of %d: loss %.4f", name, step, n_steps, value.item())


def round_to_half(model: nn.Module) -> Weights:
    """Round a model's weights to float16 in place, and return them as float16."""
    weights = {name: t.detach().to(torch.float16) for name, t in model.state_dict().items()}
    model.load_state_dict(weights)
    model.eval()
    return weights


def r_squared(guesses: Tensor, targets: Tensor, names: list[str]) -> Scores:
    """Return the explained share of the variance of each column."""
    rest = (guesses - targets).square().mean(dim=0)
    return dict(zip(names, (1 - rest / targets.var(dim=0, correction=0)).tolist(), strict=True))
