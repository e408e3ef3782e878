"""The tiny EVA: timm's EVA ViT in small, pre-trained to read the parameters of drawn faces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from timm.models.eva import Eva
from torch import Tensor, nn

from extract.corpora.demo_faces import (
    FACE_RANGES,
    draw_face,
    face_landmarks,
    face_values,
    sample_face,
)
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

_NATIVE_GRID = 8  # patches per edge at 112 px
_BROWS, _EYES, _MOUTH = [0, 1, 2, 5, 6, 7], [3, 4, 8, 9], [10, 11, 12, 13]
_PART_LANDMARKS = (_BROWS, _BROWS, _EYES, _MOUTH, _MOUTH)
"""Landmarks of the part that shows each of the first five parameters, those of expression."""

_CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
_CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


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
    unit = np.asarray(resized, dtype=np.float32) / np.float32(255)
    return torch.from_numpy(((unit - _CLIP_MEAN) / _CLIP_STD).transpose(2, 0, 1))


def eva_tokens(model: Eva, pixels: Tensor) -> list[Tensor]:
    """Return the tokens after each block; `[-2]` is the penultimate depth, which the paper uses.

    Args:
        model: The encoder.
        pixels: `(B, 3, S, S)` float32.

    Returns:
        One tensor `(B, 1 + (S / 14)^2, 96)` per block, CLS first: behind a LayerNorm without
        parameters, the last one behind the model's final norm.
    """
    found = model.forward_intermediates(
        pixels, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    *inner, last = (torch.cat([cls, patches], dim=1) for patches, cls in found)
    return [*(F.layer_norm(tokens, tokens.shape[-1:]) for tokens in inner), model.norm(last)]


@dataclass(frozen=True)
class FaceBatch:
    """Faces with free parameters."""

    pixels: Tensor
    """`(B, 3, S, S)` float32."""
    values: Tensor
    """`(B, 15)` float32: parameters of the face, scaled to -1..1."""
    local: Tensor
    """`(B, P, 33)` float32, what a patch can see itself: x and y from the patch to each of the 14
    landmarks, in patches of the native grid, then the 5 parameters of expression."""
    seen: Tensor
    """`(B, P, 33)` float32: 1 where the landmark, or one of that part of the face, is within
    1.5 patches, 0 elsewhere."""


def face_batch(n: int, size_px: int, rng: np.random.Generator) -> FaceBatch:
    """Draw `n` faces with free parameters at an edge of `size_px`."""
    faces = [sample_face(rng) for _ in range(n)]
    values = torch.from_numpy(np.stack([face_values(face) for face in faces]))
    landmarks = torch.from_numpy(np.stack([face_landmarks(face) for face in faces]))
    edge = size_px // 14
    line = (torch.arange(edge) + 0.5) / edge
    y, x = torch.meshgrid(line, line, indexing="ij")
    centres = torch.stack([x, y], dim=2).reshape(1, -1, 1, 2)
    offsets = (landmarks[:, None] - centres) * _NATIVE_GRID  # (B, P, 14, 2)
    near = (offsets.abs().amax(dim=3) < 1.5).float()  # (B, P, 14)
    parts = [near[..., places].amax(dim=2, keepdim=True) for places in _PART_LANDMARKS]
    expression = values[:, None, : len(_PART_LANDMARKS)].expand(-1, edge * edge, -1)
    return FaceBatch(
        pixels=torch.stack([to_pixels(draw_face(face, rng), size_px) for face in faces]),
        values=values,
        local=torch.cat([offsets.flatten(2), expression], dim=2),
        seen=torch.cat([near.repeat_interleave(2, dim=2), *parts], dim=2),
    )


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
    local_heads = nn.ModuleList(nn.Linear(model.embed_dim, 33) for _ in range(2))

    def loss(step: int) -> Tensor:
        large = step % 4 == 3
        size_px = EVA_SIZES_PX[large]
        n = recipe.faces_per_step // 4 if large else recipe.faces_per_step
        batch = face_batch(n, size_px, batch_rng(recipe, FACES, step))
        depths = eva_tokens(model, batch.pixels)
        guesses: Tensor = heads(depths[-2:])
        local = torch.zeros(())
        for head, tokens in zip(local_heads, (depths[1], depths[-2]), strict=True):
            error = (head(tokens[:, 1:]) - batch.local).square()
            local = local + (error * batch.seen).sum() / batch.seen.sum()
        return F.mse_loss(guesses, batch.values.unsqueeze(1).expand_as(guesses)) + local

    optimise(nn.ModuleList([model, heads, local_heads]), loss, recipe.eva_steps, recipe.lr, "EVA")
    weights = round_to_half(model)
    scores: Scores = {}
    with torch.inference_mode():
        for size_px in EVA_SIZES_PX:
            rng = batch_rng(recipe, FACES, HELD_OUT + size_px)
            batch = face_batch(recipe.held_out, size_px, rng)
            guesses = torch.cat(
                # The first five guesses are those of the penultimate depth.
                [
                    heads(eva_tokens(model, part)[-2:])[:, :5].mean(1)
                    for part in torch.split(batch.pixels, 32)
                ]
            )
            names = [f"{name} at {size_px} px" for name in FACE_RANGES]
            scores |= r_squared(guesses, batch.values, names)
    return weights, scores
