"""The encoder of a masked autoencoder, run without masking, by timm.

From the authors' files (`mae_pretrain_vit_large.pth`, with or without the decoder), from timm's, or
from a transformers folder of ViTMAE. The names and digest are those of timm for all of them.
transformers' own ViTMAEModel is not used: unless told otherwise it drops 75 % of the patches and
shuffles the rest, in a new random order at every call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cache.encoders import MaeEncoder
from cache.errors import CheckpointError
from extract.config import Precision
from extract.encoders import vit, weights
from extract.encoders.base import Tokens, freeze, mixed

_WHAT = "MAE encoder"
_UNUSED = r"norm\.|fc_norm\.|head\.|decoder_|mask_token$"
# The settings of every published model. The authors' and timm's norms have eps 1e-6; the folders'
# configs say 1e-12, which gives the same tokens to within rounding.
_SETTINGS = {
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "num_channels": (3,),
    "layer_norm_eps": (1e-6, 1e-12),
}


class FrozenMae:
    """A frozen MAE encoder that takes any picture size which is a multiple of its patch."""

    def __init__(
        self, module: torch.nn.Module, spec: MaeEncoder, device: str, precision: Precision
    ) -> None:
        """Wrap a loaded module; use `load`."""
        self.spec = spec
        self._module: Any = module
        self._device = device
        self._precision: Precision = precision
        freeze(module, device, precision)

    @classmethod
    def load(
        cls,
        spec: MaeEncoder,
        path: Path,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> FrozenMae:
        """Load real weights.

        Args:
            spec: Wanted architecture, depth and norm; its weights digest may be open. Fewer blocks than
                the checkpoint has need norm `none`.
            path: The authors' `.pth`, timm's `.safetensors`, or a transformers folder.
            device: Torch device.
            precision: Of matrix products.

        Raises:
            CheckpointError: Another architecture, missing or unknown tensors, no final norm.
        """
        if path.is_dir():
            found, facts = _read_folder(path)
        else:
            given = weights.unwrap(weights.read_file(path), path)
            found = weights.below(given, "patch_embed.proj.weight", path, "an MAE")
            facts = {}
        vit.check_architecture(found, spec, _WHAT, path, more=facts)
        table = weights.take(found, ["pos_embed"], path)["pos_embed"]
        n_patches = table.shape[1] - 1 if table.ndim == 3 else 0
        side = vit.native_side(n_patches, "pos_embed", path)
        if spec.norm == "checkpoint" and "norm.weight" not in found:
            raise CheckpointError(
                f"{path}: has no final norm (norm.weight). Set norm to 'none' in the encoder's spec."
            )
        module = build(spec, side * spec.patch_px)
        used = weights.take(found, module.state_dict(), path)
        vit.refuse_unexpected(found, used, spec.depth, path, unused=_UNUSED)
        weights.check_shapes(used, module, path)
        weights.fill(module, used)
        resolved = spec.model_copy(update={"weights_sha256": weights.digest(used)})
        return cls(module, resolved, device, precision)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode pictures; see `PictureEncoder.encode`."""
        side = vit.patches_per_side(pixels, self.spec.patch_px)
        body = self._module
        with mixed(self._device, self._precision):
            x = body.patch_embed(pixels.to(self._device, non_blocking=True))  # (B, P, D)
            x = torch.cat([body.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + P, D)
            x = x + vit.resized_positions(body.pos_embed, side)
            for block in body.blocks:
                x = block(x)
            x = body.norm(x)
        tokens: Tokens = x.float().cpu().numpy()
        return tokens


def build(spec: MaeEncoder, native_px: int) -> torch.nn.Module:
    """Build timm's vision transformer without weights.

    Args:
        spec: Architecture, depth and norm.
        native_px: Picture size that the checkpoint's position table was made for.
    """
    from timm.models.vision_transformer import VisionTransformer

    module: Any = VisionTransformer(
        img_size=native_px,
        patch_size=spec.patch_px,
        embed_dim=spec.width,
        depth=spec.depth,
        num_heads=spec.n_heads,
        # timm rounds the product with the width down.
        mlp_ratio=(spec.mlp_width + 0.5) / spec.width,
        num_classes=0,
        global_pool="",
        weight_init="skip",
    )
    module.patch_embed.strict_img_size = False
    module.blocks = torch.nn.ModuleList(module.blocks)  # run one by one, as EVA's
    if spec.norm == "none":
        module.norm = torch.nn.Identity()
    built: torch.nn.Module = module
    return built


def _read_folder(folder: Path) -> tuple[weights.Tensors, dict[str, Any]]:
    """Return a ViTMAE folder's tensors under timm's names, and facts for `check_architecture`."""
    config, tensors = weights.read_folder(folder)
    weights.check_model_type(config, ["vit_mae"], folder)
    weights.check_settings(config, _SETTINGS, folder)
    anchor = "embeddings.patch_embeddings.projection.weight"
    part = weights.below(tensors, anchor, folder, "a ViTMAE")
    found = vit.fuse_qkv({vit.timm_name(name): tensor for name, tensor in part.items()})
    # The configuration class's default; a folder may leave out what is equal to it.
    return found, {"n_heads": config.get("num_attention_heads", 12)}
