"""Encoders with random weights, as files in the formats in which upstream projects publish them.

Speed does not depend on the weights, so that none need to be downloaded to measure it. The files go
through the same loaders as real ones.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.encoders import (
    NAMED_ENCODERS,
    ClipEncoder,
    Encoder,
    EvaEncoder,
    HubertEncoder,
    MaeEncoder,
    SoundEncoder,
    VideoMaeEncoder,
    WhisperEncoder,
)
from cache.spec import Frames, Pixels, TokenSpec

if TYPE_CHECKING:
    import torch

NATIVE_PX = 224
"""Picture size that the position tables are made for."""


@dataclass(frozen=True)
class Networks:
    """The networks of the three streams."""

    name: str
    whisper: WhisperEncoder
    eva: EvaEncoder

    def specs(self) -> tuple[TokenSpec, ...]:
        """Return the paper's three streams with these networks."""
        from train.presets import v2

        tokens, by_stream = v2().tokens, self.by_stream()
        return tuple(
            spec.model_copy(update={"encoder": by_stream[spec.stream]}) for spec in tokens.all()
        )

    def settings(self) -> list[str]:
        """Return the same for the command line."""
        return [
            f"tokens.{x}.encoder={net.model_dump_json()}" for x, net in self.by_stream().items()
        ]

    def by_stream(self) -> dict[str, Encoder]:
        """Return the network of each stream."""
        return {"audio": self.whisper, "video": self.eva, "image": self.eva}


TINY = Networks(
    "Whisper 64x2, EVA 96x2",
    WhisperEncoder(width=64, n_layers=2, n_heads=4, n_mels=80),
    EvaEncoder(width=96, depth=2, n_heads=4, mlp_width=384),
)
MIDDLE = Networks(
    "Whisper base (512x6), EVA 384x12",
    WhisperEncoder.model_validate(NAMED_ENCODERS["whisper-base"]),
    EvaEncoder(width=384, depth=12, n_heads=6, mlp_width=1536),
)
FULL = Networks(
    "Whisper-large-v3 (1280x32), EVA ViT-g (1408x39)",
    WhisperEncoder.model_validate(NAMED_ENCODERS["whisper-large-v3"]),
    EvaEncoder.model_validate(NAMED_ENCODERS["eva-g"]),
)


def of_one_width(width: int, n_heads: int) -> dict[str, TokenSpec]:
    """Return a spec for each kind of encoder, all of one width and two blocks.

    Blocks are alike: more of them would only take longer.
    """
    sound: dict[str, Any] = {"width": width, "n_layers": 2, "n_heads": n_heads}
    sight: dict[str, Any] = {"width": width, "depth": 2, "n_heads": n_heads, "mlp_width": 4 * width}
    middle, uniform = Frames(kind="middle"), Frames(kind="uniform", n_frames=16)

    def heard(encoder: Encoder) -> TokenSpec:
        return TokenSpec(stream="audio", encoder=encoder, sample_rate_hz=16_000)

    def image(encoder: Encoder, size_px: int) -> TokenSpec:
        pixels = Pixels(size_px=size_px)
        return TokenSpec(stream="image", encoder=encoder, frames=middle, pixels=pixels)

    def video(encoder: Encoder) -> TokenSpec:
        pixels = Pixels(size_px=224)
        return TokenSpec(stream="video", encoder=encoder, frames=uniform, pixels=pixels, grid=2)

    return {
        "whisper": heard(WhisperEncoder(**sound, n_mels=80)),
        "hubert": heard(HubertEncoder(**sound, mlp_width=4 * width)),
        "eva image": image(EvaEncoder(**sight), 448),
        "eva video": video(EvaEncoder(**sight)),
        "clip": image(ClipEncoder(**sight), 224),
        "mae": image(MaeEncoder(**sight), 224),
        "videomae": video(VideoMaeEncoder(**sight)),
    }


def checkpoint_path(encoder: Encoder, folder: Path) -> Path:
    """Return where the checkpoint of an encoder is, by its kind and size."""
    n_blocks = encoder.n_layers if isinstance(encoder, SoundEncoder) else encoder.depth
    ending = {"whisper": ".pt", "eva": ".pth", "mae": ".pth"}.get(encoder.kind, "")
    return folder / f"{encoder.kind}-{encoder.width}x{n_blocks}{ending}"


def write_checkpoint(
    encoder: Encoder,
    folder: Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Write random weights of an encoder once; what is there already is kept.

    Args:
        encoder: Architecture.
        folder: Where checkpoints are; this one gets a name by its kind and size.
        device: Where the random numbers are drawn: a billion of them take a CPU a while.
        dtype: Of the file.

    Returns:
        A `.pt` file as openai-whisper's, a `.pth` file as EVA's and MAE's, or a transformers folder.
    """
    import torch

    path = checkpoint_path(encoder, folder)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.device(device):
        module = _module(encoder)
    module.to("cpu", getattr(torch, dtype))
    aside = folder / f"unfinished-{path.name}"
    if path.suffix:
        torch.save(_document(encoder, module.state_dict()), aside)
    else:
        shutil.rmtree(aside, ignore_errors=True)
        saved: Any = module
        saved.save_pretrained(aside)
    aside.rename(path)
    return path


def _module(encoder: Encoder) -> torch.nn.Module:
    """Return the library's own network, as it initialises it."""
    if isinstance(encoder, WhisperEncoder):
        import torch
        from whisper.model import AudioEncoder

        sizes = (
            encoder.n_mels,
            encoder.n_context,
            encoder.width,
            encoder.n_heads,
            encoder.n_layers,
        )
        module: Any = AudioEncoder(*sizes)
        torch.nn.init.normal_(module.positional_embedding, std=0.02)
    elif isinstance(encoder, HubertEncoder):
        module = _hubert(encoder)
    elif isinstance(encoder, EvaEncoder):
        from timm.models.eva import Eva

        module = Eva(**_timm(encoder))
    elif isinstance(encoder, MaeEncoder):
        from timm.models.vision_transformer import VisionTransformer

        module = VisionTransformer(**_timm(encoder))
    elif isinstance(encoder, ClipEncoder):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        module = CLIPVisionModel(
            CLIPVisionConfig(**_transformers(encoder), hidden_act="quick_gelu")
        )
    else:
        module = _videomae(encoder)
    built: torch.nn.Module = module
    return built


def _hubert(encoder: HubertEncoder) -> torch.nn.Module:
    from transformers import HubertConfig, HubertModel

    first = encoder.norm_first
    config = HubertConfig(
        hidden_size=encoder.width,
        num_hidden_layers=encoder.n_layers,
        num_attention_heads=encoder.n_heads,
        intermediate_size=encoder.mlp_width,
        feat_extract_norm="layer" if first else "group",
        do_stable_layer_norm=first,
        conv_bias=first,
    )
    return HubertModel(config)


def _videomae(encoder: VideoMaeEncoder) -> torch.nn.Module:
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        **_transformers(encoder),
        num_frames=encoder.n_frames,
        tubelet_size=encoder.tubelet,
        use_mean_pooling=False,
    )
    return VideoMAEModel(config)


def _timm(encoder: EvaEncoder | MaeEncoder) -> dict[str, Any]:
    return {
        "img_size": NATIVE_PX // encoder.patch_px * encoder.patch_px,
        "patch_size": encoder.patch_px,
        "embed_dim": encoder.width,
        "depth": encoder.depth,
        "num_heads": encoder.n_heads,
        "mlp_ratio": (encoder.mlp_width + 0.5) / encoder.width,  # timm rounds the product down
        "num_classes": 0,
        "global_pool": "",
    }


def _transformers(encoder: ClipEncoder | VideoMaeEncoder) -> dict[str, Any]:
    return {
        "hidden_size": encoder.width,
        "intermediate_size": encoder.mlp_width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.n_heads,
        "image_size": NATIVE_PX // encoder.patch_px * encoder.patch_px,
        "patch_size": encoder.patch_px,
    }


def _document(encoder: Encoder, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what a file of this kind of encoder holds."""
    if not isinstance(encoder, WhisperEncoder):
        return {"model": state} if isinstance(encoder, MaeEncoder) else state
    dims = {
        "n_mels": encoder.n_mels,
        "n_audio_ctx": encoder.n_context,
        "n_audio_state": encoder.width,
        "n_audio_head": encoder.n_heads,
        "n_audio_layer": encoder.n_layers,
    }
    return {"dims": dims, "model_state_dict": {f"encoder.{n}": t for n, t in state.items()}}
