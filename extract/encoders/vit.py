"""What the vision transformers here share: input checks, position tables, tensor names, sizes.

Names of blocks' tensors are timm's (`blocks.0.attn.qkv.weight`), which the authors of MAE, VideoMAE
and EVA use too; a transformers folder of MAE or VideoMAE has q, k and v apart and other names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cache.encoders import VisionEncoder
from cache.errors import CheckpointError, SpecMismatchError
from extract.encoders.weights import Tensors, check_sizes, take


def patches_per_side(pixels: torch.Tensor, patch_px: int) -> int:
    """Return the side of the patch grid of pictures (..., S, S).

    Raises:
        SpecMismatchError: Not squares of a multiple of the patch.
    """
    height, width = pixels.shape[-2:]
    if height != width or height == 0 or height % patch_px:
        raise SpecMismatchError(
            f"pictures of {height}x{width} px; the encoder takes squares of a multiple of "
            f"{patch_px} px"
        )
    return int(height // patch_px)


def native_side(n_patches: int, name: str, where: Path) -> int:
    """Return the side of the patch grid that a position table was made for.

    Raises:
        CheckpointError: Not a square grid.
    """
    side = math.isqrt(max(n_patches, 0))
    if side == 0 or side * side != n_patches:
        raise CheckpointError(f"{where}: {name} has {n_patches} patches, not a square grid")
    return side


def resized_positions(table: torch.Tensor, side: int) -> torch.Tensor:
    """Resize a position table bicubically, as BLIP-2 does; the CLS row stays.

    Args:
        table: (1, 1 + P, D), P a square number, CLS first.
        side: Patches per side of the result.

    Returns:
        (1, 1 + side * side, D); `table` itself if it has that side.
    """
    native = math.isqrt(table.shape[1] - 1)
    if side == native:
        return table
    grid = table[:, 1:].reshape(1, native, native, -1)
    grid = F.interpolate(
        grid.permute(0, 3, 1, 2), size=(side, side), mode="bicubic", align_corners=False
    )
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


# transformers' ViT names -> timm's, in this order; both the names in published files and the
# modules' own of transformers 5. q, k and v stay apart until `fuse_qkv`.
_RENAME = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."),
        (r"^(?:encoder\.layer|layers)\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.attention\.([qv])_bias$", r".attn.\1.bias"),
        (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
)


def timm_name(name: str) -> str:
    """Return timm's name for a tensor of a transformers ViT; q, k and v are `attn.q.weight` and so on."""
    for pattern, new in _RENAME:
        name = pattern.sub(new, name)
    return name


def fuse_qkv(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Join `attn.q`, `attn.k` and `attn.v` of each block to `attn.qkv`, as timm has them.

    Where k has no bias (VideoMAE, EVA), the biases become `attn.q_bias` and `attn.v_bias`. Of a block
    without all three parts, the parts stay as they are.
    """
    fused = dict(tensors)
    for name in tensors:
        if not name.endswith(".attn.q.weight"):
            continue
        block = name.removesuffix("q.weight")
        if f"{block}k.bias" in fused:
            kinds = ["weight", "bias"]
        else:
            kinds = ["weight"]
            for part in "qv":
                if f"{block}{part}.bias" in fused:
                    fused[f"{block}{part}_bias"] = fused.pop(f"{block}{part}.bias")
        for kind in kinds:
            parts = [f"{block}{part}.{kind}" for part in "qkv"]
            if all(part in fused for part in parts):
                fused[f"{block}qkv.{kind}"] = torch.cat([fused.pop(part) for part in parts])
    return fused


def split_qkv(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Undo `fuse_qkv`."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        fused = re.fullmatch(r"(.*\.attn\.)qkv\.(weight|bias)", name)
        bias = re.fullmatch(r"(.*\.attn\.[qv])_bias", name)
        if fused:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{fused[1]}{part}.{fused[2]}"] = piece
        elif bias:
            split[f"{bias[1]}.bias"] = tensor
        else:
            split[name] = tensor
    return split


def check_architecture(
    tensors: Mapping[str, torch.Tensor],
    spec: VisionEncoder,
    what: str,
    where: Path,
    *,
    patch: str = "patch_embed.proj.weight",
    mlp: str = "blocks.0.mlp.fc1.weight",
    blocks: str = "blocks.",
    more: Mapping[str, Any],
) -> None:
    """Compare the sizes that a checkpoint's tensors show, and `more`, with the spec.

    The checkpoint may hold more blocks than `spec.depth`, but not together with its final norm: that
    was trained behind the last block, and behind another one its scale and shift fit nothing.

    Args:
        tensors: Of the encoder, without prefix.
        spec: Wanted.
        what: The encoder's name, for messages.
        where: For messages.
        patch: Name of the patch convolution's weight: (D, 3, p, p), or (D, 3, t, p, p).
        mlp: Name of the first weight (mlp_width, D) of the first block's MLP.
        blocks: What names of blocks' tensors begin with, before the number.
        more: Further facts of the checkpoint, under the spec's names.

    Raises:
        CheckpointError: Something differs; all of it is listed.
    """
    kernel, first = take(tensors, [patch, mlp], where).values()
    n_axes = 5 if spec.takes == "frames" else 4
    if kernel.ndim != n_axes or first.ndim != 2:
        raise CheckpointError(
            f"{where}: {patch} has shape {tuple(kernel.shape)} and {mlp} {tuple(first.shape)}; expected "
            f"{n_axes} axes and 2, so not the {what} of the spec. Give another checkpoint."
        )
    found = {
        "width": kernel.shape[0],
        "mlp_width": first.shape[0],
        "patch_px": kernel.shape[-1],
        **({"tubelet": kernel.shape[2]} if n_axes == 5 else {}),
        **more,
    }
    numbers = [re.match(rf"{re.escape(blocks)}(\d+)\.", name) for name in tensors]
    n_blocks = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    if spec.depth > n_blocks:
        found["depth"] = n_blocks
    check_sizes(found, spec, what, where)
    if spec.norm == "checkpoint" and spec.depth < n_blocks:
        raise CheckpointError(
            f"{where}: has {n_blocks} blocks and a final norm made for the last of them; the spec runs "
            f"{spec.depth} with norm 'checkpoint'. Set norm to 'none', or depth to {n_blocks}."
        )


def refuse_unexpected(
    tensors: Mapping[str, torch.Tensor],
    used: Mapping[str, torch.Tensor],
    depth: int,
    where: Path,
    *,
    unused: str,
    blocks: str = "blocks.",
) -> None:
    """Refuse tensors that are neither used nor known to be of no use.

    A scale or a bias that the module has no place for would otherwise be left out in silence.

    Args:
        tensors: Of the encoder, without prefix.
        used: Those that are used.
        depth: Blocks that run; tensors of later ones are of no use.
        where: For the message.
        unused: Pattern of names that are of no use, matched from the beginning.
        blocks: What names of blocks' tensors begin with, before the number.

    Raises:
        CheckpointError: The first five are listed.
    """

    def is_known(name: str) -> bool:
        block = re.match(rf"{re.escape(blocks)}(\d+)\.", name)
        return int(block[1]) >= depth if block else re.match(unused, name) is not None

    unknown = [name for name in tensors if name not in used and not is_known(name)]
    if unknown:
        raise CheckpointError(
            f"{where}: {len(unknown)} unexpected tensors, first: {', '.join(unknown[:5])}. This is "
            "not the plain network of the spec."
        )
