"""Made-up checkpoints: encoders with random weights, as files in the formats that upstream publishes.

For what needs an encoder's shapes and speed but nothing that it learnt: benchmarks, and sweeps at demo
scale. The files go through the same loaders as real ones.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.encoders import (
    SAMPLE_RATE_HZ,
    ClipEncoder,
    Encoder,
    EvaEncoder,
    HubertEncoder,
    MaeEncoder,
    SoundEncoder,
    VideoMaeEncoder,
    WhisperEncoder,
)
from cache.files import write_aside
from cache.schema import canonical_json
from cache.spec import Frames, Pixels, TokenSpec

if TYPE_CHECKING:
    import torch

NATIVE_PX = 224
"""Picture size that the position tables are made for."""

_NOT_IN_THE_FILE = {"weights_sha256", "layer", "norm", "padded", "normalize"}
"""Fields of an encoder that say how a checkpoint is used, not what it holds."""


def of_one_width(width: int, n_heads: int) -> dict[str, TokenSpec]:
    """Return a spec for each kind of encoder, all of one width and two blocks.

    Blocks are alike: more of them would only take longer.
    """
    sound: dict[str, Any] = {"width": width, "n_layers": 2, "n_heads": n_heads}
    sight: dict[str, Any] = {"width": width, "depth": 2, "n_heads": n_heads, "mlp_width": 4 * width}
    middle, uniform = Frames(kind="middle"), Frames(kind="uniform", n_frames=16)

    def heard(encoder: Encoder) -> TokenSpec:
        return TokenSpec(stream="audio", encoder=encoder, sample_rate_hz=SAMPLE_RATE_HZ)

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


def checkpoint_path(encoder: Encoder, folder: Path, seed: int = 0) -> Path:
    """Return where the checkpoint of an encoder is, by all that decides what it holds."""
    architecture = encoder.model_dump(mode="json", exclude=_NOT_IN_THE_FILE)
    text = canonical_json({**architecture, "seed": seed})
    n_blocks = encoder.n_layers if isinstance(encoder, SoundEncoder) else encoder.depth
    ending = {"whisper": ".pt", "eva": ".pth", "mae": ".pth"}.get(encoder.kind, "")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return folder / f"{encoder.kind}-{encoder.width}x{n_blocks}-{digest}{ending}"


def write_checkpoint(
    encoder: Encoder,
    folder: Path,
    *,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
) -> Path:
    """Write random weights of an encoder once; what is there already is kept.

    Args:
        encoder: Architecture; any kind and size.
        folder: Where checkpoints are; this one gets a name of its own.
        seed: Of the random numbers: equal seeds give equal weights on a CPU, others other ones, so that
            networks of equal sizes can differ.
        device: Where the random numbers are drawn: a billion of them take a CPU a while.
        dtype: Of the file.

    Returns:
        A `.pt` file as openai-whisper's, a `.pth` file as EVA's and MAE's, or a transformers folder.
    """
    import torch

    path = checkpoint_path(encoder, folder, seed)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    devices = [] if device == "cpu" else [torch.device(device)]
    with torch.random.fork_rng(devices), torch.device(device):
        torch.manual_seed(seed)
        module = _module(encoder)
    module.to("cpu", getattr(torch, dtype))
    if path.suffix:
        with write_aside(path) as aside:
            torch.save(_document(encoder, module.state_dict()), aside)
    else:
        _save_folder(encoder, module, path)
    return path


def _save_folder(encoder: Encoder, module: Any, path: Path) -> None:
    """Save a transformers folder, whole or not at all."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # of one file
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        module.save_pretrained(aside)
        if isinstance(encoder, HubertEncoder):
            told = {"do_normalize": encoder.normalize, "sampling_rate": SAMPLE_RATE_HZ}
            (aside / "preprocessor_config.json").write_text(json.dumps(told), encoding="utf-8")
        aside.chmod(0o755)  # mkdtemp's are for one user alone
        aside.rename(path)
    except OSError:
        if not path.is_dir():  # else another process was quicker, with the same weights
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _module(encoder: Encoder) -> torch.nn.Module:
    """Return the library's own network, as it initialises it."""
    if isinstance(encoder, WhisperEncoder):
        from whisper.model import AudioEncoder

        sizes = (
            encoder.n_mels,
            encoder.n_context,
            encoder.width,
            encoder.n_heads,
            encoder.n_layers,
        )
        module: Any = AudioEncoder(*sizes)
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

        sizes_and_more = {**_transformers(encoder), "hidden_act": encoder.activation}
        module = CLIPVisionModel(CLIPVisionConfig(**sizes_and_more))
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
