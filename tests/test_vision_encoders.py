"""CLIP, MAE and VideoMAE: the conformance suite, and equality with other code for the same weights."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, VideoMAEModel, ViTMAEModel
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from cache.encoders import NAMED_ENCODERS, ClipEncoder, MaeEncoder, VideoMaeEncoder
from cache.errors import CheckpointError, SpecMismatchError
from extract.encoders import clip, mae, videomae
from extract.encoders.base import PictureEncoder, VideoEncoder
from extract.encoders.clip import FrozenClip
from extract.encoders.mae import FrozenMae
from extract.encoders.videomae import FrozenVideoMae, sine_table
from extract.encoders.weights import Tensors
from tests.conformance import EncoderConformance, Subject

WIDTH, DEPTH, HEADS, MLP = 48, 3, 4, 80
SIZES: dict[str, Any] = {"width": WIDTH, "depth": DEPTH, "n_heads": HEADS, "mlp_width": MLP}
CLIP = ClipEncoder(**SIZES, patch_px=14)
MAE = MaeEncoder(**SIZES, patch_px=14)
VIDEO = VideoMaeEncoder(**SIZES, patch_px=8, n_frames=6, tubelet=2)


def _randoms(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Random weights that half precision holds exactly; LayerNorms are not left at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = 0.2 * torch.randn(shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values += 1
        tensors[name] = values.half().float()
    return tensors


def _shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.state_dict().items()}


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _write_folder(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return folder


def _change(folder: Path, to: Path, tensors: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """Copy a folder with other tensors and other settings."""
    old = json.loads((folder / "config.json").read_bytes())
    return _write_folder(to, {**old, **config}, tensors(load_file(folder / "model.safetensors")))


def _same(tensors: Tensors) -> Tensors:
    return tensors


def _without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda t: {n: v for n, v in t.items() if not any(part in n for part in parts)}


def _load(cls: Any, folder: Path, **settings: Any) -> Any:
    """The library's own model of a folder, all of whose tensors were in it."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, info = cls.from_pretrained(folder, output_loading_info=True, **settings)
    assert not info["missing_keys"]
    return model.eval()


# transformers' published names of a ViT block -> timm's, without q, k and v.
BLOCK = {
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def _published_blocks(state: Tensors) -> Tensors:
    """Blocks of timm's or VideoMAE's layout in the layout of published transformers folders."""
    renamed: Tensors = {}
    for i in range(DEPTH):
        ours, theirs = f"blocks.{i}", f"encoder.layer.{i}"
        for new, old in BLOCK.items():
            for kind in ("weight", "bias"):
                renamed[f"{theirs}.{new}.{kind}"] = state[f"{ours}.{old}.{kind}"]
        qkv = state[f"{ours}.attn.qkv.weight"].split(WIDTH)
        for name, tensor in zip(("query", "key", "value"), qkv, strict=True):
            renamed[f"{theirs}.attention.attention.{name}.weight"] = tensor
        if f"{ours}.attn.qkv.bias" in state:
            biases = state[f"{ours}.attn.qkv.bias"].split(WIDTH)
            for name, tensor in zip(("query", "key", "value"), biases, strict=True):
                renamed[f"{theirs}.attention.attention.{name}.bias"] = tensor
        else:
            for part in "qv":
                renamed[f"{theirs}.attention.attention.{part}_bias"] = state[
                    f"{ours}.attn.{part}_bias"
                ]
    return renamed


# CLIP


def _clip_folder(folder: Path, activation: str = "quick_gelu") -> Path:
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": 56,
        "patch_size": 14,
        "hidden_act": activation,
        "model_type": "clip_vision_model",
    }
    text = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.load_state_dict(_randoms(_shapes(model)))
    model.save_pretrained(folder)
    # Published files hold this buffer too, and it is no weight.
    ids = {"vision_model.embeddings.position_ids": torch.arange(17).unsqueeze(0)}
    return _change(folder, folder, lambda t: t | ids)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip_vision_folder(clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vision tower alone, as transformers 5 writes it: without a prefix."""
    folder = tmp_path_factory.mktemp("clip_vision")
    prefix = "vision_model."
    tensors = load_file(clip_folder / "model.safetensors")
    vision = json.loads((clip_folder / "config.json").read_bytes())["vision_config"]
    return _write_folder(
        folder,
        {**vision, "model_type": "clip_vision_model"},
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)},
    )


# MAE


@pytest.fixture(scope="module")
def mae_model() -> VisionTransformer:
    model = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=MLP / WIDTH,
        num_classes=0,
        global_pool="",
    )
    model.load_state_dict(_randoms(_shapes(model)))
    return model.eval()


@pytest.fixture(scope="module")
def mae_pth(mae_model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Facebook's layout with the decoder, half precision, and the options its trainer saves."""
    state = {name: tensor.half() for name, tensor in mae_model.state_dict().items()}
    state |= {
        "mask_token": torch.ones(1, 1, 16),
        "decoder_pos_embed": torch.ones(1, 17, 16),
        "decoder_embed.weight": torch.ones(16, WIDTH),
        "decoder_blocks.0.attn.qkv.weight": torch.ones(48, 16),
        "decoder_norm.weight": torch.ones(16),
    }
    path = tmp_path_factory.mktemp("mae") / "mae_visualize.pth"
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(mask_ratio=0.75)}, path)
    return path


@pytest.fixture(scope="module")
def mae_folder(mae_model: VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as the folder of a ViTMAEForPreTraining, renamed by hand."""
    state = mae_model.state_dict()
    tensors = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": state["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
        **_published_blocks(state),
    }
    config = {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": 56,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-12,
        "mask_ratio": 0.75,
    }
    decoder = {
        "decoder.mask_token": torch.ones(1, 1, 16),
        "decoder.decoder_norm.weight": torch.ones(16),
        "decoder.decoder_layers.0.layernorm_before.weight": torch.ones(16),
    }
    folder = tmp_path_factory.mktemp("mae_hf")
    return _write_folder(folder, config, {f"vit.{n}": t for n, t in tensors.items()} | decoder)


# VideoMAE


@pytest.fixture(scope="module")
def video_state() -> Tensors:
    """An encoder's tensors under the authors' names."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (WIDTH, 3, 2, 8, 8),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        shapes |= {
            f"blocks.{i}.norm1.weight": (WIDTH,),
            f"blocks.{i}.norm1.bias": (WIDTH,),
            f"blocks.{i}.attn.q_bias": (WIDTH,),
            f"blocks.{i}.attn.v_bias": (WIDTH,),
            f"blocks.{i}.attn.qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{i}.attn.proj.weight": (WIDTH, WIDTH),
            f"blocks.{i}.attn.proj.bias": (WIDTH,),
            f"blocks.{i}.norm2.weight": (WIDTH,),
            f"blocks.{i}.norm2.bias": (WIDTH,),
            f"blocks.{i}.mlp.fc1.weight": (MLP, WIDTH),
            f"blocks.{i}.mlp.fc1.bias": (MLP,),
            f"blocks.{i}.mlp.fc2.weight": (WIDTH, MLP),
            f"blocks.{i}.mlp.fc2.bias": (WIDTH,),
        }
    return _randoms(shapes, seed=1)


VIDEO_CONFIG = {
    "architectures": ["VideoMAEForPreTraining"],
    "model_type": "videomae",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "num_frames": 6,
    "tubelet_size": 2,
    "hidden_act": "gelu",
    "qkv_bias": True,
    "layer_norm_eps": 1e-12,
    "use_mean_pooling": False,
}
V2_CONFIG = {
    "model_type": "VideoMAEv2_Base",
    "architectures": ["VideoMAEv2_Base"],
    "auto_map": {"AutoModel": "modeling_videomaev2.VideoMAEv2"},
    "model_config": {
        "img_size": 32,
        "patch_size": 8,
        "in_chans": 3,
        "num_classes": 0,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": MLP / WIDTH,
        "qkv_bias": True,
        "qk_scale": None,
        "layer_norm_eps": 1e-6,
        "init_values": 0.0,
        "use_learnable_pos_emb": False,
        "tubelet_size": 2,
        "use_mean_pooling": True,
        "num_frames": 6,
        "cos_attn": False,
    },
}


def _write_video(format_: str, state: Tensors, folder: Path) -> Path:
    """Write an encoder in one of the formats in which VideoMAE is published."""
    finetuned = {n.replace("norm.", "fc_norm.") if n.startswith("norm.") else n: t
                 for n, t in state.items()}  # fmt: skip
    if format_ == "pretrained.pth":
        tensors = {f"encoder.{n}": t.half() for n, t in state.items()} | {
            "mask_token": torch.ones(1, 1, 16),
            "encoder_to_decoder.weight": torch.ones(16, WIDTH),
            "decoder.blocks.0.norm1.weight": torch.ones(16),
        }
        torch.save({"model": tensors, "args": argparse.Namespace()}, folder / format_)
        return folder / format_
    if format_ == "finetuned.pth":
        tensors = finetuned | {"head.weight": torch.ones(5, WIDTH), "head.bias": torch.ones(5)}
        torch.save({"module": tensors}, folder / format_)
        return folder / format_
    if format_ == "v2-folder":
        (folder / "modeling_videomaev2.py").write_text("raise SystemExit('remote code was run')")
        return _write_folder(folder, V2_CONFIG, {f"model.{n}": t for n, t in finetuned.items()})
    tensors = _published_blocks(state)
    for kind in ("weight", "bias"):
        tensors[f"embeddings.patch_embeddings.projection.{kind}"] = state[
            f"patch_embed.proj.{kind}"
        ]
    norm = {kind: state[f"norm.{kind}"] for kind in ("weight", "bias")}
    if format_ == "classifier-folder":
        tensors = {f"videomae.{n}": t for n, t in tensors.items()}
        tensors |= {f"fc_norm.{kind}": t for kind, t in norm.items()}
        tensors |= {"classifier.weight": torch.ones(2, WIDTH), "classifier.bias": torch.ones(2)}
        return _write_folder(folder, {**VIDEO_CONFIG, "use_mean_pooling": True}, tensors)
    assert format_ == "folder"
    tensors |= {f"layernorm.{kind}": t for kind, t in norm.items()}
    tensors = {f"videomae.{n}": t for n, t in tensors.items()}
    tensors |= {"mask_token": torch.ones(1, 1, 16), "decoder.norm.weight": torch.ones(16)}
    return _write_folder(folder, VIDEO_CONFIG, tensors)


VIDEO_FORMATS = ("folder", "classifier-folder", "pretrained.pth", "finetuned.pth", "v2-folder")


@pytest.fixture(scope="module")
def videos(video_state: Tensors, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: _write_video(name, video_state, tmp_path_factory.mktemp("videomae"))
        for name in VIDEO_FORMATS
    }


# What every encoder promises


def _run_pictures(encoder: PictureEncoder, seeds: Sequence[int]) -> list[np.ndarray]:
    return list(encoder.encode(torch.stack([_noise(3, 56, 56, seed=seed) for seed in seeds])))


def _run_frames(encoder: VideoEncoder, seeds: Sequence[int]) -> list[np.ndarray]:
    return list(encoder.encode(torch.stack([_noise(6, 3, 32, 32, seed=seed) for seed in seeds])))


@pytest.fixture(scope="module", params=["clip", "clip-cut", "mae", "mae-folder", "videomae"])
def subject(
    request: pytest.FixtureRequest,
    clip_folder: Path,
    mae_pth: Path,
    mae_folder: Path,
    videos: dict[str, Path],
) -> Subject:
    cut = CLIP.model_copy(update={"depth": 2})
    subjects = {
        "clip": Subject(
            lambda precision: FrozenClip.load(CLIP, clip_folder, precision=precision), _run_pictures
        ),
        "clip-cut": Subject(
            lambda precision: FrozenClip.load(cut, clip_folder, precision=precision), _run_pictures
        ),
        "mae": Subject(
            lambda precision: FrozenMae.load(MAE, mae_pth, precision=precision), _run_pictures
        ),
        "mae-folder": Subject(
            lambda precision: FrozenMae.load(MAE, mae_folder, precision=precision), _run_pictures
        ),
        "videomae": Subject(
            lambda precision: FrozenVideoMae.load(VIDEO, videos["folder"], precision=precision),
            _run_frames,
        ),
    }
    return subjects[request.param]


class TestConformance(EncoderConformance):
    def test_attention_is_fused(self, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
        calls, fused = [], F.scaled_dot_product_attention

        def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(args)
            return fused(*args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
        subject.encode([0])
        assert len(calls) == subject.encoder.spec.depth


# Equality with other code


def _block(t: torch.Tensor, w: Tensors, i: int, eps: float) -> torch.Tensor:
    """A pre-norm block by hand, from timm's or VideoMAE's names."""
    b, n_tokens = f"blocks.{i}", t.shape[1]
    h = F.layer_norm(t, (WIDTH,), w[f"{b}.norm1.weight"], w[f"{b}.norm1.bias"], eps)
    bias = torch.cat([w[f"{b}.attn.q_bias"], torch.zeros(WIDTH), w[f"{b}.attn.v_bias"]])
    qkv = F.linear(h, w[f"{b}.attn.qkv.weight"], bias)
    q, k, v = qkv.reshape(len(t), n_tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
    mixed = (attention @ v).transpose(1, 2).reshape(len(t), n_tokens, WIDTH)
    t = t + F.linear(mixed, w[f"{b}.attn.proj.weight"], w[f"{b}.attn.proj.bias"])
    h = F.layer_norm(t, (WIDTH,), w[f"{b}.norm2.weight"], w[f"{b}.norm2.bias"], eps)
    h = F.gelu(F.linear(h, w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"]))
    return t + F.linear(h, w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])


def _close(got: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=1e-4)


class TestClip:
    def test_equals_transformers_own_forward(self, clip_folder: Path) -> None:
        model = _load(CLIPVisionModel, clip_folder)
        x = _noise(2, 3, 56, 56)
        with torch.no_grad():
            theirs = model(x, output_hidden_states=True)
        _close(FrozenClip.load(CLIP, clip_folder).encode(x), theirs.last_hidden_state)
        for depth in (1, 2):
            encoder = FrozenClip.load(CLIP.model_copy(update={"depth": depth}), clip_folder)
            _close(encoder.encode(x), theirs.hidden_states[depth])
        normed = FrozenClip.load(CLIP.model_copy(update={"norm": "checkpoint"}), clip_folder)
        tokens = normed.encode(x)
        assert tokens.shape == (2, 17, WIDTH)
        _close(tokens[:, 0], theirs.pooler_output)  # CLIP's own use of the norm
        tensors = load_file(clip_folder / "model.safetensors")
        scale, shift = (tensors[f"vision_model.post_layernorm.{k}"] for k in ("weight", "bias"))
        _close(tokens, F.layer_norm(theirs.last_hidden_state, (WIDTH,), scale, shift, 1e-5))

    @pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
    def test_another_size_equals_a_hand_written_forward(
        self, tmp_path: Path, activation: str
    ) -> None:
        """The position table grows bicubically from 4x4 to 8x8."""
        folder = _clip_folder(tmp_path, activation)
        prefix = "vision_model."
        tensors = load_file(folder / "model.safetensors")
        w = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        x = _noise(1, 3, 112, 112)

        def norm(name: str, t: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(t, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

        def linear(name: str, t: torch.Tensor) -> torch.Tensor:
            return F.linear(t, w[f"{name}.weight"], w[f"{name}.bias"])

        patches = F.conv2d(x, w["embeddings.patch_embedding.weight"], stride=14)
        cls = w["embeddings.class_embedding"].reshape(1, 1, WIDTH)
        table = w["embeddings.position_embedding.weight"]
        grid = table[1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
        t = torch.cat([cls, patches.flatten(2).transpose(1, 2)], 1)
        t = t + torch.cat([table[None, :1], grid.flatten(2).transpose(1, 2)], 1)
        t = norm("pre_layrnorm", t)
        for i in range(DEPTH):
            b = f"encoder.layers.{i}"
            h = norm(f"{b}.layer_norm1", t)
            q, k, v = (
                linear(f"{b}.self_attn.{part}_proj", h).reshape(1, 65, HEADS, -1).transpose(1, 2)
                for part in "qkv"
            )
            attention = (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)).softmax(-1)
            mixed = (attention @ v).transpose(1, 2).reshape(1, 65, WIDTH)
            t = t + linear(f"{b}.self_attn.out_proj", mixed)
            h = linear(f"{b}.mlp.fc1", norm(f"{b}.layer_norm2", t))
            h = F.gelu(h) if activation == "gelu" else h * torch.sigmoid(1.702 * h)
            t = t + linear(f"{b}.mlp.fc2", h)
        spec = CLIP.model_copy(update={"activation": activation})
        _close(FrozenClip.load(spec, folder).encode(x), t)

    def test_the_digest_is_of_the_tower_alone(
        self, clip_folder: Path, clip_vision_folder: Path, tmp_path: Path
    ) -> None:
        whole = FrozenClip.load(CLIP, clip_folder)
        assert whole.spec == FrozenClip.load(CLIP, clip_vision_folder).spec
        older = _change(
            clip_vision_folder, tmp_path, lambda t: {f"vision_model.{n}": v for n, v in t.items()}
        )
        tower = FrozenClip.load(CLIP, older)
        assert whole.spec == tower.spec
        x = _noise(1, 3, 56, 56)
        np.testing.assert_array_equal(whole.encode(x), tower.encode(x))

    def test_unused_weights_are_not_in_the_digest(self, clip_folder: Path, tmp_path: Path) -> None:
        def shift(part: str) -> Callable[[Tensors], Tensors]:
            return lambda t: {n: v + 1 if part in n else v for n, v in t.items()}

        before = FrozenClip.load(CLIP, clip_folder).spec
        for part, changes in (("post_layernorm", False), ("text_model", False), ("layers.2", True)):
            after = FrozenClip.load(CLIP, _change(clip_folder, tmp_path / part, shift(part))).spec
            assert (after.weights_sha256 != before.weights_sha256) is changes, part

    def test_clip_large_has_its_published_parameters(self) -> None:
        spec = ClipEncoder(**NAMED_ENCODERS["clip-large"])
        with torch.device("meta"):
            module = clip.build(spec, 224)
        assert sum(p.numel() for p in module.parameters()) == 303_179_776


class TestMae:
    def test_equals_timms_own_forward(self, mae_model: VisionTransformer, mae_pth: Path) -> None:
        x = _noise(2, 3, 56, 56)
        with torch.no_grad():
            expected = mae_model.forward_features(x)
            inner = mae_model.forward_intermediates(
                x, norm=False, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
            )
        _close(FrozenMae.load(MAE, mae_pth).encode(x), expected)
        for depth in (1, 2, 3):
            spec = MAE.model_copy(update={"depth": depth, "norm": "none"})
            patches, cls = inner[depth - 1]
            _close(FrozenMae.load(spec, mae_pth).encode(x), torch.cat([cls, patches], 1))

    def test_equals_transformers_forward_without_masking(self, mae_folder: Path) -> None:
        x = _noise(2, 3, 56, 56)
        ordered = torch.arange(16.0).expand(2, 16)
        tokens = FrozenMae.load(MAE, mae_folder).encode(x)
        assert tokens.shape == (2, 17, WIDTH)
        with torch.no_grad():
            masked = _load(ViTMAEModel, mae_folder)(x).last_hidden_state
            assert masked.shape == (2, 5, WIDTH), "the library drops 12 of 16 patches"
            whole = _load(ViTMAEModel, mae_folder, mask_ratio=0.0)
            expected = whole(x, noise=ordered).last_hidden_state
            shuffled = whole(x, noise=ordered.flip(1)).last_hidden_state
        _close(tokens, expected)
        assert not np.allclose(tokens, shuffled.numpy(), atol=0.1), "the library's order is noise"

    def test_is_the_same_from_every_format(
        self, mae_model: VisionTransformer, mae_pth: Path, mae_folder: Path, tmp_path: Path
    ) -> None:
        save_file(mae_model.state_dict(), tmp_path / "timm.safetensors")
        torch.save({"model": mae_model.state_dict()}, tmp_path / "mae_pretrain.pth")
        newer = {  # as transformers 5 names its modules
            "encoder.layer.": "layers.",
            "attention.attention.query": "attention.q_proj",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
            "attention.output.dense": "attention.o_proj",
            "intermediate.dense": "mlp.fc1",
            ".output.dense": ".mlp.fc2",
            "vit.": "",
        }

        def rename(tensors: Tensors) -> Tensors:
            for old, new in newer.items():
                tensors = {n.replace(old, new): t for n, t in tensors.items()}
            return {n: t for n, t in tensors.items() if not n.startswith("decoder")}

        paths = [
            mae_folder,
            tmp_path / "timm.safetensors",
            tmp_path / "mae_pretrain.pth",
            _change(mae_folder, tmp_path / "newer", rename, architectures=["ViTMAEModel"]),
        ]
        x, first = _noise(1, 3, 56, 56), FrozenMae.load(MAE, mae_pth)
        for path in paths:
            other = FrozenMae.load(MAE, path)
            assert other.spec == first.spec
            np.testing.assert_array_equal(other.encode(x), first.encode(x))

    def test_another_size_equals_timm_with_a_table_resized_by_timm(
        self, mae_model: VisionTransformer, mae_pth: Path
    ) -> None:
        x = _noise(1, 3, 112, 112)
        table = mae_model.pos_embed.detach()
        grid = table[:, 1:].reshape(1, 4, 4, WIDTH).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
        larger = VisionTransformer(
            img_size=112,
            patch_size=14,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            mlp_ratio=MLP / WIDTH,
            num_classes=0,
            global_pool="",
        )
        resized = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        larger.load_state_dict({**mae_model.state_dict(), "pos_embed": resized})
        with torch.no_grad():
            expected = larger.eval().forward_features(x)
        _close(FrozenMae.load(MAE, mae_pth).encode(x), expected)

    def test_mae_large_has_timms_architecture(self) -> None:
        with torch.device("meta"):
            theirs: Any = timm.create_model("vit_large_patch16_224", num_classes=0, global_pool="")
            ours: Any = mae.build(MaeEncoder(**NAMED_ENCODERS["mae-large"]), 224)
        assert _shapes(ours) == _shapes(theirs)
        assert ours.norm.eps == theirs.norm.eps

    def test_every_mlp_width_is_built_exactly(self) -> None:
        """28 * (244 / 28) is 243.99... in floating point."""
        spec = MaeEncoder(width=28, depth=1, n_heads=4, mlp_width=244, patch_px=14)
        assert _shapes(mae.build(spec, 14))["blocks.0.mlp.fc1.weight"] == (244, 28)


class TestVideoMae:
    @staticmethod
    def by_hand(w: Tensors, x: torch.Tensor, depth: int = DEPTH) -> torch.Tensor:
        """Tokens (B, T * P, D) before the final norm."""
        patches = F.conv3d(
            x.transpose(1, 2), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], (2, 8, 8)
        )
        t = patches.flatten(2).transpose(1, 2)
        t = t + get_sinusoid_encoding_table(t.shape[1], WIDTH)
        for i in range(depth):
            t = _block(t, w, i, 1e-6)
        return t

    @pytest.mark.parametrize("format_", VIDEO_FORMATS)
    def test_equals_a_hand_written_forward(
        self, videos: dict[str, Path], video_state: Tensors, format_: str
    ) -> None:
        x, w = _noise(2, 6, 3, 32, 32), video_state
        bare = self.by_hand(w, x)
        normed = F.layer_norm(bare, (WIDTH,), w["norm.weight"], w["norm.bias"], 1e-6)
        tokens = FrozenVideoMae.load(VIDEO, videos[format_]).encode(x)
        assert tokens.shape == (2, 3, 16, WIDTH)
        _close(tokens, normed.reshape(2, 3, 16, WIDTH))
        for depth in (DEPTH, 2):
            spec = VIDEO.model_copy(update={"norm": "none", "depth": depth})
            cut = FrozenVideoMae.load(spec, videos[format_])
            _close(cut.encode(x), self.by_hand(w, x, depth).reshape(2, 3, 16, WIDTH))

    @pytest.mark.parametrize("norm", ["checkpoint", "none"])
    def test_equals_transformers_own_forward(self, videos: dict[str, Path], norm: str) -> None:
        format_ = "folder" if norm == "checkpoint" else "classifier-folder"
        model = _load(VideoMAEModel, videos[format_])
        x = _noise(2, 6, 3, 32, 32)
        with torch.no_grad():
            expected = model(x).last_hidden_state
        spec = VIDEO.model_copy(update={"norm": norm})
        tokens = FrozenVideoMae.load(spec, videos[format_]).encode(x)
        _close(tokens.reshape(2, 48, WIDTH), expected)

    def test_another_size_has_the_table_that_transformers_computes(
        self, videos: dict[str, Path]
    ) -> None:
        model = _load(VideoMAEModel, videos["folder"], image_size=48)
        x = _noise(1, 6, 3, 48, 48)
        with torch.no_grad():
            expected = model(x).last_hidden_state
        tokens = FrozenVideoMae.load(VIDEO, videos["folder"]).encode(x)
        _close(tokens.reshape(1, 3 * 36, WIDTH), expected)

    def test_formats_share_a_digest(self, videos: dict[str, Path]) -> None:
        specs = [FrozenVideoMae.load(VIDEO, path).spec for path in videos.values()]
        assert all(spec == specs[0] for spec in specs)
        bare = VIDEO.model_copy(update={"norm": "none"})
        bares = [FrozenVideoMae.load(bare, path).spec for path in videos.values()]
        assert all(spec == bares[0] for spec in bares)
        assert bares[0].weights_sha256 != specs[0].weights_sha256

    def test_tokens_are_ordered_by_tubelet_then_raster(
        self, video_state: Tensors, tmp_path: Path
    ) -> None:
        """With blocks that add nothing, a token depends on its own patch alone."""
        idle = {
            name: torch.zeros_like(t) if "attn.proj" in name or "mlp.fc2" in name else t
            for name, t in video_state.items()
        }
        encoder = FrozenVideoMae.load(VIDEO, _write_video("finetuned.pth", idle, tmp_path))
        x = _noise(1, 6, 3, 32, 32)
        before = encoder.encode(x)[0]
        for step, row, column, frame in ((0, 0, 1, 0), (1, 2, 0, 3), (2, 3, 1, 4)):
            changed = x.clone()
            changed[0, frame, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
            differs = (encoder.encode(changed)[0] != before).any(-1)
            assert np.argwhere(differs).tolist() == [[step, 4 * row + column]]

    @pytest.mark.parametrize(("n", "width"), [(48, WIDTH), (300, 1408), (7, 5)])
    def test_sine_table_is_transformers(self, n: int, width: int) -> None:
        expected = get_sinusoid_encoding_table(n, width)
        torch.testing.assert_close(sine_table(n, width), expected, rtol=0, atol=1e-7)

    @pytest.mark.parametrize(
        ("name", "d", "m", "p", "n_blocks"),
        [("videomae-large", 1024, 4096, 16, 24), ("videomae2-giant", 1408, 6144, 14, 40)],
    )
    def test_real_sizes_by_hand(self, name: str, d: int, m: int, p: int, n_blocks: int) -> None:
        """Also against timm's image transformer of the same name, whose blocks are of the same sizes."""
        spec = VideoMaeEncoder(**NAMED_ENCODERS[name])
        with torch.device("meta"):
            module = videomae.build(spec)
            theirs: Any = timm.create_model(f"vit_{name.split('-')[1]}_patch{p}_224")
        shapes = _shapes(module)
        attention = 3 * d * d + 2 * d + d * d + d  # qkv; biases of q and v; the output
        block = attention + (d * m + m) + (m * d + d) + 4 * d
        patches = d * 3 * 2 * p * p + d
        n_parameters = sum(math.prod(shape) for shape in shapes.values())
        assert n_parameters == patches + n_blocks * block + 2 * d
        assert spec.depth == len(theirs.blocks)
        assert spec.n_heads == theirs.blocks[0].attn.num_heads
        first = "encoder.layer.0.intermediate.dense.weight"
        assert shapes[first] == tuple(theirs.blocks[0].mlp.fc1.weight.shape)

    def test_a_sine_table_in_the_file_is_accepted(
        self, video_state: Tensors, tmp_path: Path
    ) -> None:
        torch.save({**video_state, "pos_embed": sine_table(48, WIDTH)}, tmp_path / "with.pth")
        torch.save(video_state, tmp_path / "without.pth")
        loaded = [FrozenVideoMae.load(VIDEO, tmp_path / f"{n}.pth") for n in ("with", "without")]
        assert loaded[0].spec == loaded[1].spec

    @pytest.mark.parametrize("shape", [(1, 5, 3, 32, 32), (6, 3, 32, 32), (1, 6, 3, 30, 30)])
    def test_frames_of_a_wrong_shape(self, videos: dict[str, Path], shape: tuple[int, ...]) -> None:
        encoder = FrozenVideoMae.load(VIDEO, videos["folder"])
        with pytest.raises(SpecMismatchError, match=r"frames of shape|pictures of 30x30 px"):
            encoder.encode(torch.zeros(shape))


class TestBadCheckpoints:
    def test_another_architecture_lists_all_that_differs(
        self, clip_folder: Path, mae_pth: Path, mae_folder: Path, videos: dict[str, Path]
    ) -> None:
        larger = {"width": 64, "depth": 6, "mlp_width": 96, "patch_px": 16}
        message = (
            r"width is 48, the spec says 64; mlp_width is 80, the spec says 96; "
            r"patch_px is \d+, the spec says 16; .*depth is 3, the spec says 6"
        )
        with pytest.raises(CheckpointError, match=message):
            FrozenClip.load(CLIP.model_copy(update=larger), clip_folder)
        for path in (mae_pth, mae_folder):
            with pytest.raises(CheckpointError, match=message):
                FrozenMae.load(MAE.model_copy(update=larger), path)
        wrong = VIDEO.model_copy(update={**larger, "tubelet": 1})
        for path in videos.values():
            with pytest.raises(CheckpointError, match=r"tubelet is 2, the spec says 1"):
                FrozenVideoMae.load(wrong, path)
            with pytest.raises(CheckpointError, match=r"depth is 3, the spec says 6"):
                FrozenVideoMae.load(wrong, path)

    def test_what_only_config_json_knows(
        self, clip_folder: Path, mae_folder: Path, videos: dict[str, Path]
    ) -> None:
        heads = {"n_heads": 6}
        with pytest.raises(CheckpointError, match=r"n_heads is 4, the spec says 6"):
            FrozenClip.load(CLIP.model_copy(update=heads), clip_folder)
        with pytest.raises(
            CheckpointError, match=r"activation is 'quick_gelu', the spec says 'gelu'"
        ):
            FrozenClip.load(CLIP.model_copy(update={"activation": "gelu"}), clip_folder)
        with pytest.raises(CheckpointError, match=r"n_heads is 4, the spec says 6"):
            FrozenMae.load(MAE.model_copy(update=heads), mae_folder)
        for format_ in ("folder", "v2-folder"):
            with pytest.raises(CheckpointError, match=r"n_heads is 4, the spec says 6"):
                FrozenVideoMae.load(VIDEO.model_copy(update=heads), videos[format_])
            with pytest.raises(CheckpointError, match=r"n_frames is 6, the spec says 8"):
                FrozenVideoMae.load(VIDEO.model_copy(update={"n_frames": 8}), videos[format_])

    @pytest.mark.parametrize(
        ("setting", "value"),
        [("hidden_act", "relu"), ("qkv_bias", False), ("layer_norm_eps", 1e-3)],
    )
    def test_settings_that_are_not_supported(
        self,
        mae_folder: Path,
        videos: dict[str, Path],
        tmp_path: Path,
        setting: str,
        value: object,
    ) -> None:
        message = rf"another network: {setting} is {value!r}, supported: "
        other = _change(mae_folder, tmp_path / "mae", _same, **{setting: value})
        with pytest.raises(CheckpointError, match=message):
            FrozenMae.load(MAE, other)
        other = _change(videos["folder"], tmp_path / "video", _same, **{setting: value})
        with pytest.raises(CheckpointError, match=message):
            FrozenVideoMae.load(VIDEO, other)

    def test_v2_settings_that_are_not_supported(
        self, videos: dict[str, Path], tmp_path: Path
    ) -> None:
        sizes = {**V2_CONFIG["model_config"], "cos_attn": True}  # type: ignore[dict-item]
        other = _change(videos["v2-folder"], tmp_path / "cos", _same, model_config=sizes)
        with pytest.raises(CheckpointError, match=r"cos_attn is True, supported: False"):
            FrozenVideoMae.load(VIDEO, other)
        other = _change(videos["v2-folder"], tmp_path / "none", _same, model_config=None)
        with pytest.raises(CheckpointError, match=r"lacks model_config with num_frames and"):
            FrozenVideoMae.load(VIDEO, other)

    def test_another_norm_epsilon_of_clip(self, clip_vision_folder: Path, tmp_path: Path) -> None:
        other = _change(clip_vision_folder, tmp_path, _same, layer_norm_eps=1e-6)
        with pytest.raises(CheckpointError, match=r"layer_norm_eps is 1e-06, supported: 1e-05"):
            FrozenClip.load(CLIP, other)

    def test_missing_tensors_are_counted(
        self, clip_folder: Path, mae_folder: Path, video_state: Tensors, tmp_path: Path
    ) -> None:
        part = _change(clip_folder, tmp_path / "clip", _without("vision_model.encoder.layers.1."))
        with pytest.raises(
            CheckpointError, match=r"16 of 53 tensors are missing, first: encoder\.layers\.1\."
        ):
            FrozenClip.load(CLIP, part)
        part = _change(mae_folder, tmp_path / "mae", _without("vit.encoder.layer.1."))
        with pytest.raises(
            CheckpointError, match=r"12 of 42 tensors are missing, first: blocks\.1"
        ):
            FrozenMae.load(MAE, part)
        part = _change(mae_folder, tmp_path / "k", _without("layer.1.attention.attention.key"))
        with pytest.raises(
            CheckpointError, match=r"2 of 42 tensors are missing, first: .*attn\.qkv"
        ):
            FrozenMae.load(MAE, part)
        torch.save(_without("blocks.1.")(video_state), tmp_path / "part.pth")
        with pytest.raises(
            CheckpointError, match=r"13 of 43 tensors are missing, first: blocks\.1"
        ):
            FrozenVideoMae.load(VIDEO, tmp_path / "part.pth")

    def test_other_shapes(
        self, clip_folder: Path, mae_pth: Path, video_state: Tensors, tmp_path: Path
    ) -> None:
        def narrow(name: str) -> Callable[[Tensors], Tensors]:
            return lambda t: {n: v[:-1] if n.endswith(name) else v for n, v in t.items()}

        message = r"1 tensors have another shape than the spec says, first: .*1"
        other = _change(
            clip_folder, tmp_path / "clip", narrow("vision_model.encoder.layers.1.mlp.fc2.bias")
        )
        with pytest.raises(CheckpointError, match=message):
            FrozenClip.load(CLIP, other)
        state = torch.load(mae_pth, weights_only=False)["model"]
        torch.save(narrow("s.1.attn.qkv.weight")(state), tmp_path / "mae.pth")
        with pytest.raises(CheckpointError, match=message):
            FrozenMae.load(MAE, tmp_path / "mae.pth")
        torch.save(narrow("s.1.attn.qkv.weight")(video_state), tmp_path / "video.pth")
        with pytest.raises(CheckpointError, match=message):
            FrozenVideoMae.load(VIDEO, tmp_path / "video.pth")

    def test_unexpected_tensors(
        self, clip_folder: Path, mae_pth: Path, video_state: Tensors, tmp_path: Path
    ) -> None:
        """Scales that the module would leave out, in blocks that run and in later ones."""
        name = "vision_model.encoder.layers.1.scale"
        other = _change(clip_folder, tmp_path / "clip", lambda t: t | {name: torch.ones(1)})
        with pytest.raises(
            CheckpointError, match=r"1 unexpected tensors, first: .*layers\.1\.scale"
        ):
            FrozenClip.load(CLIP, other)
        FrozenClip.load(CLIP.model_copy(update={"depth": 1}), other)
        for kind in ("gamma_1", "attn.scale"):
            name = f"blocks.1.{kind}"
            state = torch.load(mae_pth, weights_only=False)["model"] | {name: torch.ones(WIDTH)}
            torch.save(state, tmp_path / "mae.pth")
            torch.save(video_state | {name: torch.ones(WIDTH)}, tmp_path / "video.pth")
            with pytest.raises(CheckpointError, match=rf"1 unexpected tensors, first: {name}"):
                FrozenMae.load(MAE, tmp_path / "mae.pth")
            with pytest.raises(CheckpointError, match=rf"1 unexpected tensors, first: {name}"):
                FrozenVideoMae.load(VIDEO, tmp_path / "video.pth")
            cut = {"depth": 1, "norm": "none"}
            FrozenMae.load(MAE.model_copy(update=cut), tmp_path / "mae.pth")
            FrozenVideoMae.load(VIDEO.model_copy(update=cut), tmp_path / "video.pth")

    def test_the_final_norm_belongs_to_the_last_block(
        self, clip_folder: Path, mae_pth: Path, videos: dict[str, Path]
    ) -> None:
        cut = {"depth": 2, "norm": "checkpoint"}
        message = r"has 3 blocks .* the spec runs 2 .* Set norm to 'none', or depth to 3"
        with pytest.raises(CheckpointError, match=message):
            FrozenClip.load(CLIP.model_copy(update=cut), clip_folder)
        with pytest.raises(CheckpointError, match=message):
            FrozenMae.load(MAE.model_copy(update=cut), mae_pth)
        for path in videos.values():
            with pytest.raises(CheckpointError, match=message):
                FrozenVideoMae.load(VIDEO.model_copy(update=cut), path)

    def test_no_final_norm(
        self, mae_model: VisionTransformer, videos: dict[str, Path], tmp_path: Path
    ) -> None:
        state = mae_model.state_dict()
        del state["norm.weight"], state["norm.bias"]
        torch.save({"model": state}, tmp_path / "mae.pth")
        with pytest.raises(CheckpointError, match=r"has no final norm .* Set norm to 'none'"):
            FrozenMae.load(MAE, tmp_path / "mae.pth")
        bare = _change(videos["folder"], tmp_path / "bare", _without("videomae.layernorm."))
        with pytest.raises(CheckpointError, match=r"has no final norm .* Set norm to 'none'"):
            FrozenVideoMae.load(VIDEO, bare)
        FrozenVideoMae.load(VIDEO.model_copy(update={"norm": "none"}), bare)

    def test_a_learnt_position_table(self, video_state: Tensors, tmp_path: Path) -> None:
        table = sine_table(48, WIDTH) + 0.05 * _noise(1, 48, WIDTH)
        torch.save({**video_state, "pos_embed": table}, tmp_path / "learnt.pth")
        with pytest.raises(CheckpointError, match=r"pos_embed is a learnt position table"):
            FrozenVideoMae.load(VIDEO, tmp_path / "learnt.pth")

    def test_a_position_table_that_is_no_square(
        self, clip_folder: Path, mae_model: VisionTransformer, tmp_path: Path
    ) -> None:
        name = "vision_model.embeddings.position_embedding.weight"
        other = _change(clip_folder, tmp_path / "clip", lambda t: t | {name: t[name][:-1].clone()})
        with pytest.raises(CheckpointError, match=r"has 15 patches, not a square grid"):
            FrozenClip.load(CLIP, other)
        state = mae_model.state_dict()
        torch.save({**state, "pos_embed": state["pos_embed"][:, :-1]}, tmp_path / "mae.pth")
        with pytest.raises(CheckpointError, match=r"has 15 patches, not a square grid"):
            FrozenMae.load(MAE, tmp_path / "mae.pth")

    def test_folders_of_other_models(
        self, clip_folder: Path, mae_folder: Path, videos: dict[str, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(
            CheckpointError,
            match=r"model_type is 'vit_mae', expected 'clip' or 'clip_vision_model'",
        ):
            FrozenClip.load(CLIP, mae_folder)
        with pytest.raises(CheckpointError, match=r"model_type is 'videomae', expected 'vit_mae'"):
            FrozenMae.load(MAE, videos["folder"])
        with pytest.raises(CheckpointError, match=r"model_type is 'clip', expected 'videomae'"):
            FrozenVideoMae.load(VIDEO, clip_folder)
        towerless = _change(clip_folder, tmp_path / "text", _same, vision_config=None)
        with pytest.raises(CheckpointError, match=r"config\.json has no vision_config"):
            FrozenClip.load(CLIP, towerless)

    def test_files_of_other_models(
        self, mae_pth: Path, videos: dict[str, Path], tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match=r"not a folder\. Give the transformers folder"):
            FrozenClip.load(CLIP, mae_pth)
        with pytest.raises(CheckpointError, match=r"not a folder\. Give the transformers folder"):
            FrozenClip.load(CLIP, tmp_path / "nowhere")
        with pytest.raises(
            CheckpointError, match=r"expected 5 axes and 2, so not the VideoMAE encoder"
        ):
            FrozenVideoMae.load(VIDEO, mae_pth)
        with pytest.raises(CheckpointError, match=r"expected 4 axes and 2, so not the MAE encoder"):
            FrozenMae.load(MAE, videos["finetuned.pth"])
        torch.save({"model": {"conv1.weight": torch.ones(2)}}, tmp_path / "other.pth")
        torch.save([torch.ones(2)], tmp_path / "list.pth")
        for name, message in (
            ("other", r"no tensor 'patch_embed\.proj\.weight', so not an? \w+ checkpoint"),
            ("list", r"holds a list, not named tensors"),
            ("none", r"no such checkpoint file"),
        ):
            with pytest.raises(CheckpointError, match=message):
                FrozenMae.load(MAE, tmp_path / f"{name}.pth")
            with pytest.raises(CheckpointError, match=message):
                FrozenVideoMae.load(VIDEO, tmp_path / f"{name}.pth")

    def test_code_beside_the_weights_is_still_refused(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (Path.touch, (str(tmp_path / "ran"),))

        options = argparse.Namespace(hook=Evil())
        torch.save({"model": {}, "args": options}, tmp_path / "evil.pth")
        with pytest.raises(CheckpointError, match=r"not a readable checkpoint of tensors"):
            FrozenMae.load(MAE, tmp_path / "evil.pth")
        assert not (tmp_path / "ran").exists()

    def test_pictures_of_a_wrong_size(self, clip_folder: Path, mae_pth: Path) -> None:
        for encoder in (FrozenClip.load(CLIP, clip_folder), FrozenMae.load(MAE, mae_pth)):
            for shape in ((1, 3, 50, 50), (1, 3, 56, 70)):
                with pytest.raises(SpecMismatchError, match=r"pictures of \d+x\d+ px"):
                    encoder.encode(torch.zeros(shape))
