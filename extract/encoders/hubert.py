"""HuBERT by transformers, from a transformers folder.

Of every waveform the frames that hear it are kept: one per 320 samples behind the first 400. Padding
to the longest of a batch is masked in the large models, which were trained so. The base model has a
norm over the whole time axis in its feature encoder, which padding would change: its waveforms run in
batches of equal lengths.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.encoders import SAMPLE_RATE_HZ, HubertEncoder
from cache.errors import CheckpointError, MediaError
from extract.config import Precision
from extract.encoders import weights
from extract.encoders.base import Tokens, Waveform, freeze, mixed
from extract.mel import SAMPLES_PER_FRAME

FIRST_FRAME_SAMPLES = 400
"""Samples that one frame hears."""

_SIZES = {
    "width": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
}

# Equal in every HuBERT of the spec; other values make another network.
_FIXED = (
    "conv_dim",
    "conv_kernel",
    "conv_stride",
    "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
    "conv_pos_batch_norm",
    "feat_proj_layer_norm",
    "feat_extract_activation",
    "hidden_act",
    "layer_norm_eps",
    "adapter_attn_dim",
)

# Newer files' names of the positional convolution's weight norm -> older ones', which are canonical.
_RENAME = (
    (".parametrizations.weight.original0", ".weight_g"),
    (".parametrizations.weight.original1", ".weight_v"),
)


def valid_frames(n_samples: int, n_context: int) -> int:
    """Return how many frames lie wholly within a waveform, at most the window."""
    if n_samples < FIRST_FRAME_SAMPLES:
        return 0
    return min(n_context, (n_samples - FIRST_FRAME_SAMPLES) // SAMPLES_PER_FRAME + 1)


class FrozenHubert:
    """A frozen HuBERT network."""

    def __init__(
        self, module: torch.nn.Module, spec: HubertEncoder, device: str, precision: Precision
    ) -> None:
        """Wrap a loaded module; use `load`."""
        self.spec = spec
        self._module: Any = module
        self._device = device
        self._precision: Precision = precision
        # Positions stay float32, as tables of positions do. Besides, torch 2.15 on some CPUs gives wrong
        # numbers for this convolution in bfloat16.
        encoder: Any = module.get_submodule("encoder")
        positions, encoder.pos_conv_embed = _OutsideMixed(encoder.pos_conv_embed), None
        freeze(module, device, precision)
        freeze(positions, device, "float32")
        encoder.pos_conv_embed = positions
        # Half-precision convolutions begin the residual stream, which stays float32 (`freeze`).
        module.get_submodule("feature_projection").register_forward_hook(
            lambda _m, _args, out: out.float()
        )

    @classmethod
    def load(
        cls,
        spec: HubertEncoder,
        path: Path,
        device: str = "cpu",
        precision: Precision = "float32",
    ) -> FrozenHubert:
        """Load real weights.

        Args:
            spec: Wanted architecture; its weights digest may be open.
            path: A transformers folder of a HubertModel, or of a model with a head on it.
            device: Torch device.
            precision: Of matrix products.

        Raises:
            CheckpointError: Another format, architecture or normalisation than the spec's, or missing
                tensors.
        """
        if not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path}: not a transformers folder with config.json. HuBERT is read from such a "
                "folder alone; convert a fairseq .pt file with transformers' script "
                "convert_hubert_original_pytorch_checkpoint_to_pytorch.py, or take the converted "
                "release, for example facebook/hubert-large-ll60k."
            )
        config, tensors = weights.read_folder(path)
        _check_config(config, spec, path)
        _check_preprocessor(spec, path)
        found = weights.below(tensors, "feature_projection.projection.weight", path, "a HuBERT")
        tensors = {_canonical(name): tensor for name, tensor in found.items()}
        module = _module(spec)
        own = {_canonical(name): name for name in module.state_dict()}
        used = weights.take(tensors, own, path)
        state = {own[name]: tensor.float() for name, tensor in used.items()}
        weights.check_shapes(state, module, path)
        module.load_state_dict(state)
        # The norm of the weight is taken once, in float32, and not at every call.
        torch.nn.utils.parametrize.remove_parametrizations(
            module.get_submodule("encoder.pos_conv_embed.conv"), "weight"
        )
        resolved = spec.model_copy(update={"weights_sha256": weights.digest(used)})
        return cls(module, resolved, device, precision)

    @torch.inference_mode()
    def encode(self, waveforms: Sequence[Waveform]) -> list[Tokens]:
        """Encode waveforms; see `AudioEncoder.encode`.

        A waveform longer than the window is cut to it; the caller flags that.
        """
        heard = [self._prepare(w) for w in waveforms]
        if self.spec.norm_first:
            batches = [list(range(len(heard)))]
        else:
            by_length: dict[int, list[int]] = {}
            for i, waveform in enumerate(heard):
                by_length.setdefault(len(waveform), []).append(i)
            batches = list(by_length.values())
        tokens: dict[int, Tokens] = {}
        for batch in batches:
            tokens |= zip(batch, self._encode_batch([heard[i] for i in batch]), strict=True)
        return [tokens[i] for i in range(len(heard))]

    def _prepare(self, waveform: Waveform) -> Waveform:
        """Return what of a waveform is heard, normalised if the spec says so."""
        if waveform.ndim != 1 or len(waveform) < FIRST_FRAME_SAMPLES:
            raise MediaError(
                f"waveform of shape {waveform.shape}; HuBERT needs (N,) mono samples, N >= "
                f"{FIRST_FRAME_SAMPLES} ({1000 * FIRST_FRAME_SAMPLES / SAMPLE_RATE_HZ:g} ms at "
                f"{SAMPLE_RATE_HZ} Hz), for its first frame"
            )
        # The longest waveform that gives no more than n_context frames.
        window = FIRST_FRAME_SAMPLES + SAMPLES_PER_FRAME * self.spec.n_context - 1
        heard = np.ascontiguousarray(waveform[:window], dtype=np.float32)
        if self.spec.normalize:
            heard = (heard - heard.mean()) / np.sqrt(heard.var() + 1e-7)
        return heard

    def _encode_batch(self, waveforms: Sequence[Waveform]) -> list[Tokens]:
        padded = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(w) for w in waveforms], batch_first=True
        )
        n_valid = [valid_frames(len(w), self.spec.n_context) for w in waveforms]
        mask = None
        if min(n_valid) < max(n_valid):
            steps = torch.arange(max(n_valid))
            mask = (steps < torch.tensor(n_valid)[:, None]).to(self._device)  # (B, T)
        module = self._module
        with mixed(self._device, self._precision):
            hidden = module.feature_extractor(padded.to(self._device, non_blocking=True))
            hidden = module.feature_projection(hidden.transpose(1, 2))  # (B, T, D)
            hidden = module.encoder(hidden, attention_mask=mask).last_hidden_state
        tokens = hidden.float().cpu().numpy()
        return [np.ascontiguousarray(t[:n]) for t, n in zip(tokens, n_valid, strict=True)]


class _OutsideMixed(torch.nn.Module):
    """Runs a module in float32 inside `mixed`."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return self.inner(hidden)


def _canonical(name: str) -> str:
    for new, old in _RENAME:
        name = name.replace(new, old)
    return name


def _variant(norm_first: bool) -> dict[str, Any]:
    """Return what transformers' configuration says of either kind of network."""
    return {
        "feat_extract_norm": "layer" if norm_first else "group",
        "do_stable_layer_norm": norm_first,
        "conv_bias": norm_first,
    }


def _check_config(config: dict[str, Any], spec: HubertEncoder, path: Path) -> None:
    """Compare a folder's config.json with the spec; an absent entry has transformers' default."""
    from transformers import HubertConfig

    weights.check_model_type(config, ("hubert",), path)
    # Through JSON, as a file would say it: lists, not tuples.
    defaults: dict[str, Any] = json.loads(json.dumps(HubertConfig().to_dict()))
    weights.check_settings(config, {name: (defaults.get(name),) for name in _FIXED}, path)
    config = defaults | config
    variant = {name: config[name] for name in _variant(norm_first=True)}
    if variant not in (_variant(norm_first=True), _variant(norm_first=False)):
        raise CheckpointError(
            f"{path}: config.json describes a mixture of the base and the large HuBERT: "
            f"{', '.join(f'{name} {value!r}' for name, value in variant.items())}. Supported: "
            f"{_variant(norm_first=True)} (large) and {_variant(norm_first=False)} (base)."
        )
    sizes = {ours: config[theirs] for ours, theirs in _SIZES.items()}
    sizes["norm_first"] = variant == _variant(norm_first=True)
    weights.check_sizes(sizes, spec, "HuBERT", path)


def _check_preprocessor(spec: HubertEncoder, folder: Path) -> None:
    """Compare preprocessor_config.json, where there is one, with the spec."""
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    # Both defaults are those of transformers' Wav2Vec2FeatureExtractor.
    rate_hz = found.get("sampling_rate", SAMPLE_RATE_HZ)
    if rate_hz != SAMPLE_RATE_HZ:
        raise CheckpointError(
            f"{path}: made for sound at {rate_hz} Hz; only {SAMPLE_RATE_HZ} Hz is supported."
        )
    normalize = bool(found.get("do_normalize", True))
    if normalize != spec.normalize:
        raise CheckpointError(
            f"{path}: do_normalize is {str(normalize).lower()}, the spec says normalize "
            f"{str(spec.normalize).lower()}. Set tokens.audio.encoder.normalize="
            f"{str(normalize).lower()}, as this checkpoint was made for."
        )


def _module(spec: HubertEncoder) -> torch.nn.Module:
    """Return the network as far as the spec runs it, with random weights."""
    from transformers import HubertConfig, HubertModel

    settings: dict[str, Any] = {
        **{theirs: getattr(spec, ours) for ours, theirs in _SIZES.items()},
        **_variant(spec.norm_first),
        "attn_implementation": "sdpa",
        "mask_time_prob": 0.0,  # masking is for training; no masked_spec_embed is wanted
        "mask_feature_prob": 0.0,
    }
    if spec.layer is not None:  # only the blocks that run are read
        settings["num_hidden_layers"] = spec.layer
    module: Any = HubertModel(HubertConfig(**settings))
    if spec.layer is not None and spec.norm_first:  # the base model's norm stands before its blocks
        module.encoder.layer_norm = torch.nn.Identity()
    return module  # type: ignore[no-any-return]
