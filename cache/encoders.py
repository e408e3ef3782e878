"""The encoders that a TokenSpec can name: which network, how much of it runs, whose weights.

Everything that changes an output number stands here, and nothing else: no path, device or library. How
each is loaded and run is `extract.encoders`; a training machine needs only these descriptions.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cache.schema import Model

SAMPLE_RATE_HZ = 16_000
"""Sample rate of every audio encoder here."""
AUDIO_FRAMES_PER_S = 50
"""Frames per second of Whisper's and HuBERT's encoders: one per 320 samples."""

Takes = Literal["sound", "pictures", "frames"]
"""What a network sees: a waveform, pictures one by one, or the frames of a clip together."""


class _Encoder(Model):
    takes: ClassVar[Takes]

    width: int = Field(gt=0)
    """Channels of an output token."""
    n_heads: int = Field(gt=0)
    weights_sha256: str | None = None
    """Digest of the tensors that are used (`extract.encoders.weights`); None while not yet known."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.width % self.n_heads:
            raise ValueError(f"width {self.width} is not a multiple of n_heads {self.n_heads}")
        return self


class SoundEncoder(_Encoder):
    """What Whisper and HuBERT have in common: a waveform in, 50 tokens per second out."""

    takes: ClassVar[Takes] = "sound"

    n_layers: int = Field(gt=0)
    """Transformer blocks of the network."""
    layer: int | None = Field(default=None, ge=0)
    """None: the output behind the last block and its norm; k: the hidden state behind k blocks, as the
    library gives it (`hidden_states[k]`)."""
    n_context: int = Field(default=1500, gt=0)
    """Most output frames of a clip: 1500 at 50 per second is 30 s. Longer sound is cut, and flagged."""

    @model_validator(mode="after")
    def _layer_exists(self) -> SoundEncoder:
        if self.layer is not None and self.layer >= self.n_layers:
            raise ValueError(
                f"layer {self.layer}: give 0 to {self.n_layers - 1}, or null for the network's output"
            )
        return self

    @property
    def window_s(self) -> float:
        """Length in seconds of what is heard at most."""
        return self.n_context / AUDIO_FRAMES_PER_S


class WhisperEncoder(SoundEncoder):
    """The encoder half of a Whisper model, never its decoder's states."""

    kind: Literal["whisper"] = "whisper"
    n_mels: int = Field(gt=0)
    """Mel bins of the input: 128 for large-v3, 80 for the others."""
    padded: bool = False
    """True stores all `n_context` frames of the zero-padded window, as the released code pools them; False
    stores those that hear the clip."""


class HubertEncoder(SoundEncoder):
    """A HuBERT network on the waveform."""

    kind: Literal["hubert"] = "hubert"
    mlp_width: int = Field(gt=0)
    norm_first: bool = True
    """True: LayerNorm before each part of a block and in the feature encoder (large, chinese-large);
    False: behind, with a group norm in the feature encoder (base)."""
    normalize: bool = True
    """Bring each waveform to zero mean and unit variance first: `do_normalize` of the folder's
    preprocessor_config.json."""


class VisionEncoder(_Encoder):
    """What the vision transformers have in common."""

    takes: ClassVar[Takes] = "pictures"

    depth: int = Field(gt=0)
    """Blocks that run. The checkpoint may hold more: the paper uses 39 of EVA's 40."""
    mlp_width: int = Field(gt=0)
    patch_px: int = Field(gt=0)
    norm: Literal["affine_free", "checkpoint", "none"]
    """After the last block."""


class EvaEncoder(VisionEncoder):
    """An EVA vision transformer, cut after `depth` blocks."""

    kind: Literal["eva"] = "eva"
    patch_px: int = Field(default=14, gt=0)
    norm: Literal["affine_free", "checkpoint", "none"] = "affine_free"
    """After the last block: LayerNorm without learnt scale (eps 1e-5), the checkpoint's own, or none."""


class ClipEncoder(VisionEncoder):
    """The vision tower of a CLIP model."""

    kind: Literal["clip"] = "clip"
    patch_px: int = Field(default=14, gt=0)
    norm: Literal["checkpoint", "none"] = "none"
    """After the last block: none, as the library's `last_hidden_state`, or the checkpoint's
    `post_layernorm`, which CLIP itself applies to the CLS token alone."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"


class MaeEncoder(VisionEncoder):
    """The encoder of a masked autoencoder, run without masking."""

    kind: Literal["mae"] = "mae"
    patch_px: int = Field(default=16, gt=0)
    norm: Literal["checkpoint", "none"] = "checkpoint"


class VideoMaeEncoder(VisionEncoder):
    """The encoder of VideoMAE or VideoMAE v2, run without masking; it has no CLS token."""

    kind: Literal["videomae"] = "videomae"
    takes: ClassVar[Takes] = "frames"
    patch_px: int = Field(default=16, gt=0)
    n_frames: int = Field(default=16, gt=0)
    """Frames of one input."""
    tubelet: int = Field(default=2, gt=0)
    """Consecutive frames that one token covers."""
    norm: Literal["checkpoint", "none"] = "checkpoint"
    """After the last block: the checkpoint's own norm (`norm`, or `fc_norm` on every token), or none."""

    @model_validator(mode="after")
    def _whole_tubelets(self) -> VideoMaeEncoder:
        if self.n_frames % self.tubelet:
            raise ValueError(
                f"n_frames {self.n_frames} is not a multiple of tubelet {self.tubelet}"
            )
        return self


Encoder = Annotated[
    WhisperEncoder | HubertEncoder | EvaEncoder | ClipEncoder | MaeEncoder | VideoMaeEncoder,
    Field(discriminator="kind"),
]


def _whisper(width: int, n_layers: int, n_heads: int, n_mels: int = 80) -> dict[str, Any]:
    sizes = {"width": width, "n_layers": n_layers, "n_heads": n_heads, "n_mels": n_mels}
    return {"kind": "whisper", **sizes}


def _hubert(width: int, n_layers: int, n_heads: int, mlp_width: int) -> dict[str, Any]:
    sizes = {"width": width, "n_layers": n_layers, "n_heads": n_heads, "mlp_width": mlp_width}
    return {"kind": "hubert", **sizes}


def _vit(
    kind: str, width: int, depth: int, n_heads: int, mlp_width: int, patch_px: int
) -> dict[str, Any]:
    sizes = {"width": width, "depth": depth, "n_heads": n_heads, "mlp_width": mlp_width}
    return {"kind": kind, **sizes, "patch_px": patch_px}


NAMED_ENCODERS: dict[str, dict[str, Any]] = {
    "whisper-tiny": _whisper(384, 4, 6),
    "whisper-base": _whisper(512, 6, 8),
    "whisper-small": _whisper(768, 12, 12),
    "whisper-medium": _whisper(1024, 24, 16),
    "whisper-large": _whisper(1280, 32, 20),
    "whisper-large-v2": _whisper(1280, 32, 20),
    "whisper-large-v3": _whisper(1280, 32, 20, n_mels=128),
    # Trained without normalising, but transformers' folder says do_normalize, and users go by that.
    "hubert-base": {**_hubert(768, 12, 12, 3072), "norm_first": False},
    "hubert-large": _hubert(1024, 24, 16, 4096),
    "chinese-hubert-large": _hubert(1024, 24, 16, 4096),
    "eva-g": _vit("eva", 1408, 39, 16, 6144, 14),
    "clip-large": _vit("clip", 1024, 24, 16, 4096, 14),
    "mae-large": _vit("mae", 1024, 24, 16, 4096, 16),
    "videomae-base": _vit("videomae", 768, 12, 12, 3072, 16),
    "videomae-large": _vit("videomae", 1024, 24, 16, 4096, 16),
    "videomae2-base": _vit("videomae", 768, 12, 12, 3072, 16),
    "videomae2-large": _vit("videomae", 1024, 24, 16, 4096, 16),
    "videomae2-giant": _vit("videomae", 1408, 40, 16, 6144, 14),
}
"""Encoders that a configuration may give by name: `tokens.audio.encoder=whisper-small`. Names of equal
sizes differ in their weights alone."""
