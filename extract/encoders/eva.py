"""EVA vision transformer by timm, from the BLIP-2 `eva_vit_g.pth` layout or timm's own.

The two layouts name their tensors alike. The paper takes 39 of 40 blocks and an affine-free
LayerNorm behind them; depth and norm are part of the spec.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cache.errors import CheckpointError, SpecMismatchError
from cache.spec import EvaEncoder
from extract.encoders import weights
from extract.encoders.base import Tokens

logger = logging.getLogger(__name__)

_AFFINE_FREE_EPS = 1e-5
"""Of the un-loaded `ln_vision` in the released code (reference facts, section 1.3)."""

# Parts of a full checkpoint that this depth and norm leave unused.
_UNUSED = re.compile(r"^(blocks\.\d+\.|norm\.|fc_norm\.|head\.|mask_token|ln_vision\.|rel_pos)")


class FrozenEva(torch.nn.Module):
    """A frozen EVA encoder that takes any picture size which is a multiple of its patch."""

    def __init__(self, spec: EvaEncoder, native_px: int) -> None:
        """Build the modules; use `load`.

        Args:
            spec: Architecture, depth and norm.
            native_px: Picture size that the checkpoint's position table was made for.
        """
        super().__init__()
        from timm.models.eva import Eva

        self.spec = spec
        self._native_side = native_px // spec.patch_px
        self._body: Any = Eva(
            img_size=native_px,
            patch_size=spec.patch_px,
            embed_dim=spec.width,
            depth=spec.depth,
            num_heads=spec.n_heads,
            mlp_ratio=spec.mlp_width / spec.width,
            num_classes=0,
            global_pool="",
        )
        self._body.patch_embed.strict_img_size = False
        if spec.norm == "none":
            self._body.norm = torch.nn.Identity()
        elif spec.norm == "affine_free":
            self._body.norm = torch.nn.LayerNorm(
                spec.width, eps=_AFFINE_FREE_EPS, elementwise_affine=False
            )

    @classmethod
    def load(cls, spec: EvaEncoder, path: Path, device: str = "cpu") -> FrozenEva:
        """Load real weights.

        Args:
            spec: Wanted architecture, depth and norm; its weights digest may be open.
            path: `.pth` or `.safetensors` in the BLIP-2 or timm layout.
            device: Torch device.

        Raises:
            CheckpointError: Missing or unknown tensors, or other shapes than the spec says.
        """
        found = weights.read_file(path)
        for wrapper in ("model", "module", "state_dict"):
            if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
                found = found[wrapper]
        if not isinstance(found, dict) or not isinstance(found.get("pos_embed"), torch.Tensor):
            raise CheckpointError(
                f"{path}: no tensor 'pos_embed', so not an EVA checkpoint. Give eva_vit_g.pth or a "
                "timm eva checkpoint."
            )
        n_positions = found["pos_embed"].shape[1] - 1
        side = round(n_positions**0.5)
        if side * side != n_positions:
            raise CheckpointError(f"{path}: pos_embed has {n_positions} patches, not a square grid")
        encoder = cls(spec, side * spec.patch_px)
        state = encoder._body.state_dict()
        used = weights.take(found, state, path)
        unknown = [k for k in found if k not in state and not _UNUSED.match(k)]
        if unknown:
            raise CheckpointError(
                f"{path}: {len(unknown)} unexpected tensors, first: {', '.join(unknown[:5])}. "
                "This is not the plain EVA of the spec."
            )
        if any(k.startswith("ln_vision.") for k in found):
            logger.warning("%s holds ln_vision weights; spec norm %r ignores them", path, spec.norm)
        weights.check_shapes(used, encoder._body, path)
        encoder._body.load_state_dict({k: v.float() for k, v in used.items()})
        encoder.spec = spec.model_copy(update={"weights_sha256": weights.digest(used)})
        weights.freeze(encoder, device)
        return encoder

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode pictures; see `PictureEncoder.encode`."""
        batch, _, height, width = pixels.shape
        if height != width or height % self.spec.patch_px:
            raise SpecMismatchError(
                f"pictures of {height}x{width} px; the encoder takes squares of a multiple of "
                f"{self.spec.patch_px} px"
            )
        body = self._body
        x = body.patch_embed(pixels.to(next(self.parameters()).device))  # (B, P, D)
        x = torch.cat([body.cls_token.expand(batch, -1, -1), x], dim=1)  # (B, 1 + P, D)
        x = x + self._positions(height // self.spec.patch_px)
        for block in body.blocks:
            x = block(x)
        tokens: Tokens = body.norm(x).float().cpu().numpy()
        return tokens

    def _positions(self, side: int) -> torch.Tensor:
        """Position table (1, 1 + side * side, D), resized bicubically as in BLIP-2."""
        table: torch.Tensor = self._body.pos_embed
        if side == self._native_side:
            return table
        grid = table[:, 1:].reshape(1, self._native_side, self._native_side, -1)
        grid = F.interpolate(
            grid.permute(0, 3, 1, 2), size=(side, side), mode="bicubic", align_corners=False
        )
        return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
