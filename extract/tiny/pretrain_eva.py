"""The tiny EVA: timm's EVA ViT in small, pre-trained to read the parameters of drawn faces."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from timm.models.eva import Eva
from torch import Tensor, nn

from extract.corpora.demo_faces import FACE_RANGES, draw_face, face_values, sample_face
from extract.tiny.optimise import (
    FACES,
    HELD_OUT,
    Recipe,
    Scores,
    Weights,
    batch_rng,
    optimise,
    r_squared,
    round_to_half,
)

EVA_SIZES_PX = (112, 168)
"""Edges the tiny EVA is trained for: its native grid of 8 x 8 patches, and 12 x 12."""

_CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
_CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def build_eva() -> Eva:
    """Return an untrained tiny EVA: the modules of timm's `eva_giant_patch14_224`, but small."""
    return Eva(
        img_size=EVA_SIZES_PX[0],
        patch_size=14,
        embed_dim=96,
        depth=5,
        num_heads=4,
        mlp_ratio=4,
        num_classes=0,
        global_pool="token",  # with "avg" timm leaves out the final norm
        dynamic_img_size=True,
    )


def to_pixels(frame: NDArray[np.uint8], size_px: int) -> Tensor:
    """Resize and normalise a frame as the image processor of EVA does.

    Args:
        frame: `(H, W, 3)` uint8 RGB.
        size_px: Edge of the result.

    Returns:
        `(3, size_px, size_px)` float32.
    """
    resized = Image.fromarray(frame).resize((size_px, size_px), Image.Resampling.BICUBIC)
    unit = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
    return (unit - _CLIP_MEAN) / _CLIP_STD


def eva_tokens(model: Eva, pixels: Tensor) -> list[Tensor]:
    """Return the tokens of the penultimate depth and of the last one.

    Args:
        model: The encoder.
        pixels: `(B, 3, S, S)` float32.

    Returns:
        Two tensors `(B, 1 + (S / 14)^2, 96)`, CLS first: after all blocks but one and a
        LayerNorm without parameters, and after all blocks and the final norm.
    """
    depth = len(model.blocks)
    found = model.forward_intermediates(
        pixels,
        indices=[depth - 2, depth - 1],
        return_prefix_tokens=True,
        output_fmt="NLC",
        intermediates_only=True,
    )
    inner, last = (torch.cat([cls, patches], dim=1) for patches, cls in found)
    return [F.layer_norm(inner, inner.shape[-1:]), model.norm(last)]


def face_batch(n: int, size_px: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw faces with free parameters: pixels `(n, 3, S, S)` and targets `(n, 15)`, float32."""
    pixels, targets = [], []
    for _ in range(n):
        face = sample_face(rng)
        pixels.append(to_pixels(draw_face(face, rng), size_px))
        targets.append(face_values(face))
    return torch.stack(pixels), torch.from_numpy(np.stack(targets))


class FaceHeads(nn.Module):
    """Linear regressions of the face from CLS and from the 2 x 2 pooled patches, two depths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cls = nn.ModuleList(nn.Linear(width, len(FACE_RANGES)) for _ in range(2))
        self.patch = nn.ModuleList(nn.Linear(width, len(FACE_RANGES)) for _ in range(2))

    def forward(self, depths: list[Tensor]) -> Tensor:
        """Return `(B, 10, 15)`: per depth one guess from CLS and four from the quadrants."""
        guesses: list[Tensor] = []
        for tokens, cls, patch in zip(depths, self.cls, self.patch, strict=True):
            edge = math.isqrt(tokens.shape[1] - 1)
            grid = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, edge, edge)
            quadrants = F.adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)  # (B, 4, D)
            guesses += [cls(tokens[:, :1]), patch(quadrants)]
        return torch.cat(guesses, dim=1)


def _initialise(model: Eva) -> None:
    """Replace timm's initial weights, whose scale of 0.02 suits wide models and stalls this one."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    for name in ("pos_embed", "cls_token"):
        nn.init.normal_(model.get_parameter(name), std=0.3)


def pretrain_eva(recipe: Recipe) -> tuple[Weights, Scores]:
    """Train the tiny EVA.

    Args:
        recipe: How.

    Returns:
        float16 weights in the key layout of `eva_vit_g.pth`, and R^2 of each parameter of the
        face, guessed from the penultimate depth of those weights at 112 and 168 px.
    """
    torch.manual_seed(recipe.seed)
    model = build_eva()
    _initialise(model)
    heads = FaceHeads(model.embed_dim)

    def loss(step: int) -> Tensor:
        large = step % 4 == 3
        size_px = EVA_SIZES_PX[large]
        n = recipe.faces_per_step // 4 if large else recipe.faces_per_step
        pixels, targets = face_batch(n, size_px, batch_rng(recipe, FACES, step))
        guesses: Tensor = heads(eva_tokens(model, pixels))
        return F.mse_loss(guesses, targets.unsqueeze(1).expand_as(guesses))

    optimise(nn.ModuleList([model, heads]), loss, recipe.eva_steps, recipe.lr, "EVA")
    weights = round_to_half(model)
    scores: Scores = {}
    with torch.inference_mode():
        for size_px in EVA_SIZES_PX:
            rng = batch_rng(recipe, FACES, HELD_OUT + size_px)
            pixels, targets = face_batch(recipe.held_out, size_px, rng)
            guesses = heads(eva_tokens(model, pixels))[:, :5].mean(dim=1)  # penultimate depth
            scores |= r_squared(guesses, targets, [f"{n}@{size_px}px" for n in FACE_RANGES])
    return weights, scores
