"""The vision tower of CLIP, by transformers, from a transformers folder.

The folder is that of a whole CLIP model (`openai/clip-vit-large-patch14`) or of its vision tower.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cache.encoders import ClipEncoder
from cache.errors import CheckpointError
from extract.config import Precision
from extract.encoders import vit, weights
from extract.encoders.base import Tokens, freeze, mixed

_WHAT = "CLIP vision tower"
_PATCH = "embeddings.patch_embedding.weight"
_POSITIONS = "embeddings.position_embedding.weight"
_BLOCKS = "encoder.layers."
_UNUSED = r"post_layernorm\.|embeddings\.position_ids$"
_SETTINGS = {"num_channels": (3,), "layer_norm_eps": (1e-5,)}


class FrozenClip:
    """A frozen CLIP vision tower that takes any picture size which is a multiple of its patch."""

    def __init__(
        self, module: torch.nn.Module, spec: ClipEncoder, device: str, precision: Precision
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
        spec: ClipEncoder,
        path: Path,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> FrozenClip:
        """Load real weights.

        Args:
            spec: Wanted architecture, depth and norm; its weights digest may be open. Fewer blocks than
                the checkpoint has need norm `none`.
            path: Folder of a CLIP model or of its vision tower.
            device: Torch device.
            precision: Of matrix products.

        Raises:
            CheckpointError: Another architecture or activation, missing or unknown tensors.
        """
        if not path.is_dir():
            raise CheckpointError(
                f"{path}: not a folder. Give the transformers folder of a CLIP model: config.json and "
                "weights."
            )
        config, tensors = weights.read_folder(path)
        vision = _vision_config(config, path)
        weights.check_settings(vision, _SETTINGS, path)
        found = weights.below(tensors, _PATCH, path, "a CLIP")
        facts = {
            # The configuration class's defaults; a folder may leave out what is equal to them.
            "n_heads": vision.get("num_attention_heads", 12),
            "activation": vision.get("hidden_act", "quick_gelu"),
        }
        vit.check_architecture(
            found,
            spec,
            _WHAT,
            path,
            patch=_PATCH,
            mlp=f"{_BLOCKS}0.mlp.fc1.weight",
            blocks=_BLOCKS,
            more=facts,
        )
        table = weights.take(found, [_POSITIONS], path)[_POSITIONS]
        side = vit.native_side(len(table) - 1, _POSITIONS, path)
        module = build(spec, side * spec.patch_px)
        own = {name.removeprefix("vision_model."): name for name in module.state_dict()}
        with_norm = spec.norm == "checkpoint"
        wanted = [n for n in own if with_norm or not n.startswith("post_layernorm.")]
        used = weights.take(found, wanted, path)
        vit.refuse_unexpected(found, used, spec.depth, path, unused=_UNUSED, blocks=_BLOCKS)
        weights.check_shapes({own[name]: tensor for name, tensor in used.items()}, module, path)
        module.load_state_dict({own[n]: t.float() for n, t in used.items()}, strict=False)
        resolved = spec.model_copy(update={"weights_sha256": weights.digest(used)})
        return cls(module, resolved, device, precision)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode pictures; see `PictureEncoder.encode`."""
        vit.patches_per_side(pixels, self.spec.patch_px)
        with mixed(self._device, self._precision):
            # Resizes the position table bicubically where the picture's size is not the native one.
            output = self._module(
                pixel_values=pixels.to(self._device, non_blocking=True),
                interpolate_pos_encoding=True,
            )
            x = output.last_hidden_state  # (B, 1 + P, D)
            if self.spec.norm == "checkpoint":
                x = getattr(self._module, "vision_model", self._module).post_layernorm(x)
        tokens: Tokens = x.float().cpu().numpy()
        return tokens


def build(spec: ClipEncoder, native_px: int) -> torch.nn.Module:
    """Build transformers' module without weights.

    Args:
        spec: Architecture and depth.
        native_px: Picture size that the checkpoint's position table was made for.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModel

    settings: dict[str, Any] = {
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.n_heads,
        "image_size": native_px,
        "patch_size": spec.patch_px,
        "hidden_act": spec.activation,
        "attn_implementation": "sdpa",
    }
    return CLIPVisionModel(CLIPVisionConfig(**settings))


def _vision_config(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    weights.check_model_type(config, ["clip", "clip_vision_model"], folder)
    vision = config if config["model_type"] == "clip_vision_model" else config.get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(
            f"{folder}: config.json has no vision_config. Give the folder of a whole CLIP model, or of "
            "its vision tower."
        )
    return vision
