"""Every encoder: the conformance suite, and equality with the upstream libraries' own forward."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import whisper
from timm.models.eva import Eva
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from cache.errors import CheckpointError, MediaError, SpecMismatchError
from cache.spec import EvaEncoder, WhisperEncoder
from extract.encoders import weights
from extract.encoders.base import AudioEncoder, PictureEncoder
from extract.encoders.eva import FrozenEva
from extract.encoders.whisper import FrozenWhisper
from extract.mel import log_mel, valid_audio_frames

WHISPER = WhisperEncoder(width=32, n_layers=2, n_heads=4, n_mels=80, n_context=1500)
EVA = EvaEncoder(width=48, depth=3, n_heads=4, mlp_width=80, patch_px=14, norm="affine_free")


def _sound(seconds: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.1 * rng.standard_normal(round(16_000 * seconds))).astype(np.float32)


@pytest.fixture(scope="module")
def whisper_pt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in openai-whisper's own format, written by its own model class."""
    torch.manual_seed(0)
    dims = whisper.model.ModelDimensions(
        n_mels=80,
        n_audio_ctx=1500,
        n_audio_state=32,
        n_audio_head=4,
        n_audio_layer=2,
        n_vocab=20,
        n_text_ctx=8,
        n_text_state=32,
        n_text_head=4,
        n_text_layer=1,
    )
    model = whisper.model.Whisper(dims)
    for parameter in model.parameters():  # LayerNorms at 1 and 0 would hide a swapped name
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("whisper") / "model.pt"
    torch.save({"dims": dims.__dict__, "model_state_dict": model.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def whisper_folder(whisper_pt: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a transformers folder, renamed by hand."""
    config = WhisperConfig(
        vocab_size=20,
        num_mel_bins=80,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=128,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = WhisperModel(config)
    theirs = torch.load(whisper_pt, weights_only=True)["model_state_dict"]
    state = model.state_dict()
    pairs = {"conv1": "conv1", "conv2": "conv2", "layer_norm": "ln_post"}
    for i in range(2):
        a, b = f"layers.{i}", f"blocks.{i}"
        pairs |= {
            f"{a}.self_attn.q_proj": f"{b}.attn.query",
            f"{a}.self_attn.k_proj": f"{b}.attn.key",
            f"{a}.self_attn.v_proj": f"{b}.attn.value",
            f"{a}.self_attn.out_proj": f"{b}.attn.out",
            f"{a}.self_attn_layer_norm": f"{b}.attn_ln",
            f"{a}.fc1": f"{b}.mlp.0",
            f"{a}.fc2": f"{b}.mlp.2",
            f"{a}.final_layer_norm": f"{b}.mlp_ln",
        }
    for ours, other in pairs.items():
        for kind in ("weight", "bias"):
            if f"encoder.{ours}.{kind}" in state:
                state[f"encoder.{ours}.{kind}"] = theirs[f"encoder.{other}.{kind}"]
    state["encoder.embed_positions.weight"] = theirs["encoder.positional_embedding"]
    model.load_state_dict(state)
    folder = tmp_path_factory.mktemp("whisper_hf")
    model.save_pretrained(folder)
    return folder


def _randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def eva_model() -> Eva:
    """Timm's own EVA with one more block than the spec uses, as the real checkpoint has."""
    model = Eva(
        img_size=56,
        patch_size=14,
        embed_dim=48,
        depth=4,
        num_heads=4,
        mlp_ratio=80 / 48,
        num_classes=0,
        global_pool="",
    )
    _randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def eva_pth(eva_model: Eva, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BLIP-2 layout: plain names in half precision, all blocks, norm and head."""
    state = {k: v.half() for k, v in eva_model.state_dict().items()}
    state["head.weight"] = torch.zeros(10, 48)
    path = tmp_path_factory.mktemp("eva") / "eva_vit_g.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def encoders(whisper_pt: Path, whisper_folder: Path, eva_pth: Path) -> dict[str, object]:
    return {
        "whisper": FrozenWhisper.load(WHISPER, whisper_pt),
        "whisper-transformers": FrozenWhisper.load(WHISPER, whisper_folder),
        "eva": FrozenEva.load(EVA, eva_pth),
    }


NAMES = ("whisper", "whisper-transformers", "eva")


class TestConformance:
    """What every encoder promises."""

    @staticmethod
    def run(encoder: object, seeds: list[int]) -> list[np.ndarray]:
        if isinstance(encoder, FrozenWhisper):
            assert isinstance(encoder, AudioEncoder)
            return encoder.encode([_sound(1.0 + s, s) for s in seeds])
        assert isinstance(encoder, FrozenEva)
        assert isinstance(encoder, PictureEncoder)
        pictures = [
            torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(s)) for s in seeds
        ]
        return list(encoder.encode(torch.stack(pictures)))

    @pytest.mark.parametrize("name", NAMES)
    def test_shape_dtype_and_finite(self, encoders: dict[str, object], name: str) -> None:
        for tokens in self.run(encoders[name], [0, 1]):
            assert tokens.dtype == np.float32
            assert tokens.shape[-1] == encoders[name].spec.width  # type: ignore[attr-defined]
            assert np.isfinite(tokens).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_deterministic(self, encoders: dict[str, object], name: str) -> None:
        first, again = self.run(encoders[name], [3]), self.run(encoders[name], [3])
        np.testing.assert_array_equal(first[0], again[0])

    @pytest.mark.parametrize("name", NAMES)
    def test_batch_of_one_equals_batch_of_many(
        self, encoders: dict[str, object], name: str
    ) -> None:
        together = self.run(encoders[name], [0, 1, 2])
        for seed in range(3):
            alone = self.run(encoders[name], [seed])[0]
            np.testing.assert_allclose(alone, together[seed], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", NAMES)
    def test_frozen(self, encoders: dict[str, object], name: str) -> None:
        encoder = encoders[name]
        module = encoder._module if isinstance(encoder, FrozenWhisper) else encoder
        assert isinstance(module, torch.nn.Module)
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())

    @pytest.mark.parametrize("name", NAMES)
    def test_knows_its_weights(self, encoders: dict[str, object], name: str) -> None:
        assert len(encoders[name].spec.weights_sha256) == 64  # type: ignore[attr-defined]


def test_whisper_equals_openai_whispers_own_forward(whisper_pt: Path) -> None:
    model = whisper.load_model(str(whisper_pt), device="cpu")
    sound = _sound(2.0)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(torch.from_numpy(sound)), n_mels=80)
    with torch.no_grad():
        expected = model.encoder(mel.unsqueeze(0))[0]
    tokens = FrozenWhisper.load(WHISPER, whisper_pt).encode([sound])[0]
    assert tokens.shape == (100, 32)
    np.testing.assert_allclose(tokens, expected[:100].numpy(), rtol=1e-5, atol=1e-5)


def test_whisper_is_the_same_by_both_libraries(encoders: dict[str, object]) -> None:
    ours, theirs = encoders["whisper"], encoders["whisper-transformers"]
    assert isinstance(ours, FrozenWhisper)
    assert isinstance(theirs, FrozenWhisper)
    assert type(ours._module).__module__.startswith("whisper.")
    assert type(theirs._module).__module__.startswith("transformers.")
    sounds = [_sound(0.3), _sound(4.1, 1)]
    for a, b in zip(ours.encode(sounds), theirs.encode(sounds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert ours.spec == theirs.spec, "the same weights in another format are the same spec"


def test_log_mel_equals_transformers_own() -> None:
    for n_mels in (80, 128):
        extractor = WhisperFeatureExtractor(feature_size=n_mels)
        sound = _sound(3.3)
        expected = extractor(sound, sampling_rate=16_000, return_tensors="np").input_features[0]
        got = log_mel(sound, n_mels=n_mels, n_context=1500)
        assert got.shape == (n_mels, 3000)
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-4)


def test_log_mel_refuses_an_empty_waveform() -> None:
    with pytest.raises(MediaError, match=r"waveform of shape \(0,\)"):
        log_mel(np.zeros(0, np.float32), n_mels=80, n_context=1500)


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [(0.02, 1), (0.298, 15), (1.0, 50), (1.28, 64), (2.0001, 101), (30.0, 1500), (48.1, 1500)],
)
def test_valid_audio_frames_by_hand(seconds: float, frames: int) -> None:
    n_samples = math.ceil(16_000 * seconds)
    assert valid_audio_frames(n_samples, 1500) == frames


def test_eva_equals_timms_own_forward_at_full_depth(eva_model: Eva, tmp_path: Path) -> None:
    path = tmp_path / "timm.pth"
    torch.save(eva_model.state_dict(), path)
    encoder = FrozenEva.load(EVA.model_copy(update={"depth": 4, "norm": "checkpoint"}), path)
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = eva_model.forward_features(x)
    np.testing.assert_allclose(encoder.encode(x), expected.numpy(), rtol=1e-5, atol=1e-5)


def test_blip2_import_equals_a_hand_written_forward(eva_pth: Path) -> None:
    """39 of 40 blocks become 3 of 4; the position table grows bicubically from 4x4 to 8x8."""
    w = {k: v.float() for k, v in torch.load(eva_pth, weights_only=True).items()}
    x = torch.randn(1, 3, 112, 112)

    def norm(name: str, t: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(t, (48,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    patches = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    t = torch.cat([w["cls_token"], patches.flatten(2).transpose(1, 2)], 1)
    grid = w["pos_embed"][:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    t = t + torch.cat([w["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], 1)
    for i in range(3):
        b = f"blocks.{i}"
        bias = torch.cat([w[f"{b}.attn.q_bias"], torch.zeros(48), w[f"{b}.attn.v_bias"]])
        qkv = F.linear(norm(f"{b}.norm1", t), w[f"{b}.attn.qkv.weight"], bias)
        q, k, v = qkv.reshape(1, 65, 3, 4, 12).permute(2, 0, 3, 1, 4)
        attention = ((q * 12**-0.5) @ k.transpose(-1, -2)).softmax(-1)
        mixed = (attention @ v).transpose(1, 2).reshape(1, 65, 48)
        t = t + F.linear(mixed, w[f"{b}.attn.proj.weight"], w[f"{b}.attn.proj.bias"])
        h = F.gelu(
            F.linear(norm(f"{b}.norm2", t), w[f"{b}.mlp.fc1.weight"], w[f"{b}.mlp.fc1.bias"])
        )
        t = t + F.linear(h, w[f"{b}.mlp.fc2.weight"], w[f"{b}.mlp.fc2.bias"])
    plain = F.layer_norm(t, (48,), eps=1e-5)
    np.testing.assert_allclose(
        FrozenEva.load(EVA, eva_pth).encode(x), plain.numpy(), rtol=1e-4, atol=1e-4
    )
    bare = FrozenEva.load(EVA.model_copy(update={"norm": "none"}), eva_pth).encode(x)
    np.testing.assert_allclose(bare, t.numpy(), rtol=1e-4, atol=1e-4)


def test_the_real_eva_has_timms_architecture() -> None:
    """EVA ViT-g as timm names it, against the spec's numbers, without allocating it."""
    with torch.device("meta"):
        theirs = timm.create_model("eva_giant_patch14_224", num_classes=0, global_pool="")
        spec = EvaEncoder(width=1408, depth=40, n_heads=16, mlp_width=6144, norm="checkpoint")
        ours = FrozenEva(spec, 224)
    theirs_shapes = {k: tuple(v.shape) for k, v in theirs.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in ours._body.state_dict().items()} == theirs_shapes
    # reference facts, section 1.3: parameters of 40 blocks with final norm
    assert sum(p.numel() for p in ours.parameters()) == 1_011_146_112


def test_the_digest_ignores_the_file_format_and_half_precision(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 4).half(), "a": torch.randn(5).half()}
    same = weights.digest({k: v.float() for k, v in reversed(tensors.items())})
    assert weights.digest(tensors) == same
    changed = {**tensors, "a": tensors["a"].clone()}
    changed["a"][0] += 0.5
    assert weights.digest(changed) != same
    assert weights.digest({"c" if k == "a" else k: v for k, v in tensors.items()}) != same


class TestBadCheckpoints:
    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no such checkpoint file"):
            FrozenEva.load(EVA, tmp_path / "none.pth")

    def test_missing_keys_are_counted(self, eva_pth: Path, tmp_path: Path) -> None:
        state = torch.load(eva_pth, weights_only=True)
        for key in [k for k in state if k.startswith("blocks.1.")]:
            del state[key]
        torch.save(state, tmp_path / "part.pth")
        with pytest.raises(
            CheckpointError, match=r"13 of \d+ tensors are missing, first: blocks\.1"
        ):
            FrozenEva.load(EVA, tmp_path / "part.pth")

    def test_other_shapes(self, eva_pth: Path) -> None:
        with pytest.raises(CheckpointError, match=r"another shape than the spec says"):
            FrozenEva.load(EVA.model_copy(update={"mlp_width": 96}), eva_pth)

    def test_unexpected_keys(self, eva_pth: Path, tmp_path: Path) -> None:
        state = torch.load(eva_pth, weights_only=True) | {"blocks.0.gamma": torch.ones(3)}
        state |= {"rope.freqs": torch.ones(3)}
        torch.save(state, tmp_path / "more.pth")
        with pytest.raises(CheckpointError, match=r"unexpected tensors, first: .*rope\.freqs"):
            FrozenEva.load(EVA, tmp_path / "more.pth")

    def test_another_whisper_size(self, whisper_pt: Path) -> None:
        wrong = WHISPER.model_copy(update={"n_layers": 4})
        with pytest.raises(CheckpointError, match=r"n_layers is 2, the spec says 4"):
            FrozenWhisper.load(wrong, whisper_pt)

    def test_not_a_whisper(self, eva_pth: Path) -> None:
        with pytest.raises(CheckpointError, match=r"not an openai-whisper checkpoint"):
            FrozenWhisper.load(WHISPER, eva_pth)

    def test_a_pickle_with_code_is_refused_and_not_run(self, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return (print, (str((tmp_path / "ran").touch()),))

        path = tmp_path / "evil.pth"
        torch.save({"pos_embed": Evil()}, path)
        (tmp_path / "ran").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=r"not a readable checkpoint of tensors"):
            FrozenEva.load(EVA, path)
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_damaged_files(self, tmp_path: Path, content: bytes, suffix: str) -> None:
        path = tmp_path / f"damaged{suffix}"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"not a readable checkpoint"):
            FrozenEva.load(EVA, path)

    def test_pictures_of_a_wrong_size(self, eva_pth: Path) -> None:
        with pytest.raises(SpecMismatchError, match=r"pictures of 50x50 px"):
            FrozenEva.load(EVA, eva_pth).encode(torch.zeros(1, 3, 50, 50))
