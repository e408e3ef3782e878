"""EVA vision transformer by timm, from the BLIP-2 `eva_vit_g.pth` layout or timm's own.

The two layouts name their tensors alike. The paper takes 39 of 40 blocks and an affine-free
LayerNorm behind them; depth and norm are part of the spec.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from cache.encoders import EvaEncoder
from cache.errors import CheckpointError
from extract.config import Precision
from extract.encoders import vit, weights
from extract.encoders.base import Tokens, freeze, mixed

logger = logging.getLogger(__name__)

_AFFINE_FREE_EPS = 1e-5
"""Of the un-loaded `ln_vision` in the released code (reference facts, section 1.3)."""

# Parts of a full checkpoint that this depth and norm leave unused.
_UNUSED = r"norm\.|fc_norm\.|head\.|mask_token|ln_vision\.|rel_pos"


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
        self._device = "cpu"
        self._precision: Precision = "float32"
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
    def load(
        cls,
        spec: EvaEncoder,
        path: Path,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> FrozenEva:
        """Load real weights.

        Args:
            spec: Wanted architecture, depth and norm; its weights digest may be open.
            path: `.pth` or `.safetensors` in the BLIP-2 or timm layout.
            device: Torch device.
            precision: Of matrix products.

        Raises:
            CheckpointError: Missing or unknown tensors, or other shapes than the spec says.
        """
        found = weights.unwrap(weights.read_file(path), path)
        if not isinstance(found.get("pos_embed"), torch.Tensor):
            raise CheckpointError(
                f"{path}: no tensor 'pos_embed', so not an EVA checkpoint. Give eva_vit_g.pth or a "
                "timm eva checkpoint."
            )
        side = vit.native_side(found["pos_embed"].shape[1] - 1, "pos_embed", path)
        encoder = cls(spec, side * spec.patch_px)
        state = encoder._body.state_dict()
        used = weights.take(found, state, path)
        vit.refuse_unexpected(found, used, spec.depth, path, unused=_UNUSED)
        if any(k.startswith("ln_vision.") for k in found):
            logger.warning("%s holds ln_vision weights; spec norm %r ignores them", path, spec.norm)
        weights.check_shapes(used, encoder._body, path)
        encoder._body.load_state_dict({k: v.float() for k, v in used.items()})
        encoder.spec = spec.model_copy(update={"weights_sha256": weights.digest(used)})
        encoder._device, encoder._precision = device, precision
        freeze(encoder, device, precision)
        return encoder

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode pictures; see `PictureEncoder.encode`."""
        side = vit.patches_per_side(pixels, self.spec.patch_px)
        body = self._body
        with mixed(self._device, self._precision):
            x = body.patch_embed(pixels.to(self._device, non_blocking=True))  # (B, P, D)
            x = torch.cat([body.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P, D)
            x = x + vit.resized_positions(body.pos_embed, side)
            for block in body.blocks:
                x = block(x)
            x = body.norm(x)
        tokens: Tokens = x.float().cpu().numpy()
        return tokens
