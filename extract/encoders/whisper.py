"""Whisper's encoder by openai-whisper (`.pt`) or by transformers (a folder).

Both give the tokens after the final LayerNorm, or an earlier hidden state (`layer`), 50 per second.
The field's toolkits often store *decoder* states under Whisper's name; these are the encoder's.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.encoders import WhisperEncoder
from cache.errors import CheckpointError
from extract.config import Precision
from extract.encoders import weights
from extract.encoders.base import Tokens, Waveform, freeze, mixed
from extract.mel import log_mel, valid_audio_frames

logger = logging.getLogger(__name__)

# transformers' names -> openai-whisper's, which are the canonical ones of the digest.
_RENAME = (
    ("embed_positions.weight", "positional_embedding"),
    ("layers.", "blocks."),
    ("self_attn.q_proj", "attn.query"),
    ("self_attn.k_proj", "attn.key"),
    ("self_attn.v_proj", "attn.value"),
    ("self_attn.out_proj", "attn.out"),
    ("self_attn_layer_norm", "attn_ln"),
    ("final_layer_norm", "mlp_ln"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
)


class FrozenWhisper:
    """A frozen Whisper encoder."""

    def __init__(
        self, module: torch.nn.Module, spec: WhisperEncoder, device: str, precision: Precision
    ) -> None:
        """Wrap a loaded module; use `load`."""
        self.spec = spec
        self._module = module
        self._device = device
        self._precision: Precision = precision
        freeze(module, device, precision)
        # openai-whisper's module takes its residual stream's dtype from the last convolution; it stays
        # float32 here (`freeze`), as transformers' does by itself.
        module.get_submodule("conv2").register_forward_hook(lambda _m, _args, out: out.float())

    @classmethod
    def load(
        cls,
        spec: WhisperEncoder,
        path: Path,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> FrozenWhisper:
        """Load real weights.

        Args:
            spec: Wanted architecture; its weights digest may be open.
            path: openai-whisper's `.pt` file, or a transformers folder.
            device: Torch device.
            precision: Of matrix products.

        Raises:
            CheckpointError: Another architecture, missing tensors, or other weights than the spec's.
        """
        if path.is_dir():
            config, tensors = weights.read_folder(path)
            found = _dims_of_folder(config, path)
            prefix = (
                "model.encoder." if any(k.startswith("model.") for k in tensors) else "encoder."
            )
            tensors = {
                _canonical(k.removeprefix(prefix)): v for k, v in tensors.items() if prefix in k
            }
        else:
            checkpoint = weights.read_file(path)
            found = _dims_of_file(checkpoint, path)
            tensors = {
                k.removeprefix("encoder."): v
                for k, v in checkpoint["model_state_dict"].items()
                if k.startswith("encoder.")
            }
        wrong = [
            f"{name} is {value}, the spec says {getattr(spec, name)}"
            for name, value in found.items()
            if value != getattr(spec, name)
        ]
        if wrong:
            raise CheckpointError(
                f"{path}: not the Whisper of the spec: {'; '.join(wrong)}. Set "
                "tokens.audio.encoder to the checkpoint's size, for example whisper-small."
            )
        module = _transformers_module(spec) if path.is_dir() else _openai_module(spec)
        own = {_canonical(name): name for name in module.state_dict()}
        used = weights.take(tensors, own, path)
        state = {own[name]: tensor.float() for name, tensor in used.items()}
        weights.check_shapes(state, module, path)
        module.load_state_dict(state)
        resolved = spec.model_copy(update={"weights_sha256": weights.digest(used)})
        return cls(module, resolved, device, precision)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Waveform]) -> list[Tokens]:
        """Encode waveforms; see `AudioEncoder.encode`.

        A waveform longer than the window is cut to it; the caller flags that.
        """
        mel = torch.stack(
            [log_mel(w, n_mels=self.spec.n_mels, n_context=self.spec.n_context) for w in waveforms]
        )
        with mixed(self._device, self._precision):
            output: Any = self._module(mel.to(self._device, non_blocking=True))
        hidden = output if isinstance(output, torch.Tensor) else output.last_hidden_state
        tokens = hidden.float().cpu().numpy()  # (B, n_context, D)
        if self.spec.padded:
            return [np.ascontiguousarray(t) for t in tokens]
        return [
            np.ascontiguousarray(t[: valid_audio_frames(len(w), self.spec.n_context)])
            for t, w in zip(tokens, waveforms, strict=True)
        ]


def _canonical(name: str) -> str:
    for old, new in _RENAME:
        name = name.replace(old, new)
    # The encoder's own final norm: `layer_norm` in transformers, `ln_post` in openai-whisper.
    return name.replace("layer_norm", "ln_post") if name.startswith("layer_norm") else name


_FILE_DIMS = {
    "n_mels": "n_mels",
    "n_context": "n_audio_ctx",
    "width": "n_audio_state",
    "n_heads": "n_audio_head",
    "n_layers": "n_audio_layer",
}
_FOLDER_DIMS = {
    "n_mels": "num_mel_bins",
    "n_context": "max_source_positions",
    "width": "d_model",
    "n_heads": "encoder_attention_heads",
    "n_layers": "encoder_layers",
}


def _dims_of_file(checkpoint: Any, path: Path) -> dict[str, int]:
    if not isinstance(checkpoint, dict) or not {"dims", "model_state_dict"} <= checkpoint.keys():
        raise CheckpointError(
            f"{path}: not an openai-whisper checkpoint (needs 'dims' and 'model_state_dict'). "
            "Give a whisper .pt file or a transformers folder."
        )
    return _dims(checkpoint["dims"], _FILE_DIMS, f"{path}: 'dims'")


def _dims_of_folder(config: dict[str, Any], path: Path) -> dict[str, int]:
    if config.get("model_type") != "whisper":
        raise CheckpointError(
            f"{path}: model_type is {config.get('model_type')!r}, expected 'whisper'. "
            "Give the folder of a Whisper model."
        )
    return _dims(config, _FOLDER_DIMS, f"{path}: config.json")


def _dims(found: Any, names: dict[str, str], where: str) -> dict[str, int]:
    """Return the encoder's sizes under our names."""
    missing = [theirs for theirs in names.values() if theirs not in found]
    if missing:
        raise CheckpointError(f"{where} lacks {', '.join(missing)}; the file is incomplete.")
    return {ours: int(found[theirs]) for ours, theirs in names.items()}


def _n_blocks(spec: WhisperEncoder) -> int:
    """Return how many blocks run; only their tensors are read."""
    return spec.n_layers if spec.layer is None else spec.layer


def _openai_module(spec: WhisperEncoder) -> torch.nn.Module:
    from whisper.model import AudioEncoder

    module: Any = AudioEncoder(
        spec.n_mels, spec.n_context, spec.width, spec.n_heads, _n_blocks(spec)
    )
    if spec.layer is not None:
        module.ln_post = torch.nn.Identity()
    return module  # type: ignore[no-any-return]


def _transformers_module(spec: WhisperEncoder) -> torch.nn.Module:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Module

    config = WhisperConfig(
        num_mel_bins=spec.n_mels,
        max_source_positions=spec.n_context,
        d_model=spec.width,
        encoder_attention_heads=spec.n_heads,
        encoder_layers=_n_blocks(spec),
        encoder_ffn_dim=4 * spec.width,
    )
    module: Any = Module(config)
    if spec.layer is not None:
        module.layer_norm = torch.nn.Identity()
    return module  # type: ignore[no-any-return]
