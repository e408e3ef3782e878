"""The encoder of VideoMAE or VideoMAE v2, run without masking, by transformers' VideoMAEModel.

Both versions have one architecture. Their checkpoints come as transformers folders (MCG-NJU/...), as
the authors' `.pth` files, and for v2 as folders that hold the authors' tensors beside code of their
own (OpenGVLab/...), which is never run. The digest is over the authors' names for all of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.encoders import VideoMaeEncoder
from cache.errors import CheckpointError, SpecMismatchError
from extract.config import Precision
from extract.encoders import vit, weights
from extract.encoders.base import Tokens, freeze, mixed

_WHAT = "VideoMAE encoder"
_PATCH = "patch_embed.proj.weight"
_EPS = 1e-6
"""Of the authors' norms."""
# `pos_embed` is checked, not loaded; the others belong to a head or to pre-training.
_UNUSED = r"norm\.|fc_norm\.|head\.|decoder\.|encoder_to_decoder\.|mask_token$|pos_embed$"

# The settings of every published model; transformers' configs say eps 1e-12, which gives the same
# tokens to within rounding.
_SETTINGS = {
    "hidden_act": ("gelu",),
    "qkv_bias": (True,),
    "qv_bias": (True,),
    "num_channels": (3,),
    "layer_norm_eps": (_EPS, 1e-12),
}
_V2_SETTINGS = {
    "qkv_bias": (True,),
    "qk_scale": (None,),
    "in_chans": (3,),
    "layer_norm_eps": (_EPS,),
    "init_values": (0, None),
    "use_learnable_pos_emb": (False,),
    "cos_attn": (False,),
}


class FrozenVideoMae:
    """A frozen VideoMAE encoder that takes any picture size which is a multiple of its patch.

    At another size than it was trained for, its sine table of positions is computed anew, row by row,
    as the authors' and the library's code does.
    """

    def __init__(
        self, module: torch.nn.Module, spec: VideoMaeEncoder, device: str, precision: Precision
    ) -> None:
        """Wrap a loaded module; use `load`."""
        self.spec = spec
        self._module: Any = module
        self._device = device
        self._precision: Precision = precision
        self._tables: dict[int, torch.Tensor] = {}
        freeze(module, device, precision)

    @classmethod
    def load(
        cls,
        spec: VideoMaeEncoder,
        path: Path,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> FrozenVideoMae:
        """Load real weights.

        Args:
            spec: Wanted architecture, depth and norm; its weights digest may be open. Fewer blocks than
                the checkpoint has need norm `none`.
            path: The authors' `.pth`, or a folder of VideoMAE or VideoMAE v2.
            device: Torch device.
            precision: Of matrix products.

        Raises:
            CheckpointError: Another architecture, missing or unknown tensors, no final norm, or a
                learnt position table.
        """
        if path.is_dir():
            found, facts = _read_folder(path)
        else:
            given = weights.unwrap(weights.read_file(path), path)
            found, facts = weights.below(given, _PATCH, path, "a VideoMAE"), {}
        vit.check_architecture(found, spec, _WHAT, path, more=facts)
        _check_positions(found, path)
        if spec.norm == "checkpoint":
            if "norm.weight" not in found and "fc_norm.weight" not in found:
                raise CheckpointError(
                    f"{path}: has no final norm (norm.weight or fc_norm.weight). Set norm to 'none' in "
                    "the encoder's spec."
                )
            if "norm.weight" not in found:
                found = {re.sub(r"^fc_norm\.", "norm.", n): t for n, t in found.items()}
        with torch.device("meta"):
            module = build(spec)
        own = {name: vit.timm_name(name) for name in module.state_dict()}
        expected = vit.fuse_qkv({own[n]: t for n, t in module.state_dict().items()})
        used = weights.take(found, expected, path)
        vit.refuse_unexpected(found, used, spec.depth, path, unused=_UNUSED)
        weights.check_shapes(used, expected, path)
        parts = vit.split_qkv(used)
        weights.fill(module, {name: parts[canonical] for name, canonical in own.items()})
        resolved = spec.model_copy(update={"weights_sha256": weights.digest(used)})
        return cls(module, resolved, device, precision)

    @torch.inference_mode()
    def encode(self, pixels: torch.Tensor) -> Tokens:
        """Encode clips; see `VideoEncoder.encode`."""
        side = vit.patches_per_side(pixels, self.spec.patch_px)
        if pixels.ndim != 5 or pixels.shape[1] != self.spec.n_frames:
            raise SpecMismatchError(
                f"frames of shape {tuple(pixels.shape)}; the encoder takes (clips, "
                f"{self.spec.n_frames}, 3, side, side)"
            )
        n_steps = self.spec.n_frames // self.spec.tubelet
        body = self._module
        with mixed(self._device, self._precision):
            frames = pixels.to(self._device, non_blocking=True).transpose(1, 2)  # (B, 3, F, S, S)
            x = body.embeddings.patch_embeddings.projection(frames)  # (B, D, F / t, side, side)
            x = x.flatten(2).transpose(1, 2)  # (B, F / t * P, D)
            x = x + self._positions(n_steps * side * side)
            for block in body.encoder.layer:
                x = block(x)
            if body.layernorm is not None:
                x = body.layernorm(x)
        tokens: Tokens = x.float().cpu().numpy()
        return tokens.reshape(len(tokens), n_steps, side * side, self.spec.width)

    def _positions(self, n: int) -> torch.Tensor:
        if n not in self._tables:
            self._tables[n] = sine_table(n, self.spec.width).to(self._device)
        return self._tables[n]


def sine_table(n: int, width: int) -> torch.Tensor:
    """Return the fixed position table of VideoMAE, (1, n, width) float32.

    A row depends on its number alone: a position is counted through the frames, then the rows, then
    the columns of patches.
    """
    channel = np.arange(width)
    angle = np.arange(n)[:, None] / np.power(10000, 2 * (channel // 2) / width)
    table = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle))
    return torch.from_numpy(table.astype(np.float32)).unsqueeze(0)


def build(spec: VideoMaeEncoder) -> torch.nn.Module:
    """Build transformers' module without weights.

    Its own position table has a single row: `sine_table` serves every picture size.
    """
    from transformers import VideoMAEConfig, VideoMAEModel

    settings: dict[str, Any] = {
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.n_heads,
        "image_size": spec.patch_px,
        "patch_size": spec.patch_px,
        "num_frames": spec.tubelet,
        "tubelet_size": spec.tubelet,
        "layer_norm_eps": _EPS,
        "use_mean_pooling": spec.norm == "none",  # then there is no final norm
        "attn_implementation": "sdpa",
    }
    return VideoMAEModel(VideoMAEConfig(**settings))


def _read_folder(folder: Path) -> tuple[weights.Tensors, dict[str, Any]]:
    """Return a folder's tensors under the authors' names, and facts for `check_architecture`."""
    config, tensors = weights.read_folder(folder)
    model_type = str(config.get("model_type"))
    if model_type.lower().startswith("videomaev2"):
        return _read_v2_folder(config, tensors, folder)
    weights.check_model_type(config, ["videomae", "VideoMAEv2_Base"], folder)
    weights.check_settings(config, _SETTINGS, folder)
    anchor = "embeddings.patch_embeddings.projection.weight"
    part = weights.below(tensors, anchor, folder, "a VideoMAE")
    # A classifier's norm stands beside the encoder, not in it.
    part |= {name: tensor for name, tensor in tensors.items() if name.startswith("fc_norm.")}
    found = vit.fuse_qkv({vit.timm_name(name): tensor for name, tensor in part.items()})
    # The configuration class's defaults; a folder may leave out what is equal to them.
    n_frames, n_heads = config.get("num_frames", 16), config.get("num_attention_heads", 12)
    return found, {"n_frames": n_frames, "n_heads": n_heads}


def _read_v2_folder(
    config: dict[str, Any], tensors: weights.Tensors, folder: Path
) -> tuple[weights.Tensors, dict[str, Any]]:
    sizes = config.get("model_config")
    names = {"n_frames": "num_frames", "n_heads": "num_heads"}
    if not isinstance(sizes, dict) or not set(names.values()) <= sizes.keys():
        raise CheckpointError(
            f"{folder}: config.json lacks model_config with {' and '.join(names.values())}; the file is "
            "incomplete."
        )
    weights.check_settings(sizes, _V2_SETTINGS, folder)
    found = weights.below(tensors, _PATCH, folder, "a VideoMAE")
    return found, {ours: sizes[theirs] for ours, theirs in names.items()}


def _check_positions(found: weights.Tensors, where: Path) -> None:
    """Refuse a position table that is not the sine table, which is computed and not loaded."""
    table = found.get("pos_embed")
    if table is None:
        return
    if table.ndim != 3 or not torch.allclose(
        table.float(), sine_table(table.shape[1], table.shape[2]), atol=1e-3
    ):
        raise CheckpointError(
            f"{where}: pos_embed is a learnt position table; VideoMAE's is computed from sines. Give "
            "the checkpoint of a model without use_learnable_pos_emb."
        )
