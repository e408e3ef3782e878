"""Every encoder: the conformance suite, and equality with the upstream libraries' own forward."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import whisper
from timm.models.eva import Eva
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperModel,
)

from cache.encoders import NAMED_ENCODERS, EvaEncoder, HubertEncoder, WhisperEncoder
from cache.errors import CheckpointError, MediaError, SpecMismatchError
from cache.views import AudioView
from extract.encoders import hubert, weights
from extract.encoders.base import AudioEncoder, PictureEncoder
from extract.encoders.eva import FrozenEva
from extract.encoders.hubert import FrozenHubert, valid_frames
from extract.encoders.whisper import FrozenWhisper
from extract.mel import log_mel, valid_audio_frames
from tests.conformance import EncoderConformance, Subject

WHISPER = WhisperEncoder(width=32, n_layers=2, n_heads=4, n_mels=80, n_context=1500)
EVA = EvaEncoder(width=48, depth=3, n_heads=4, mlp_width=80, patch_px=14, norm="affine_free")
HUBERT_LARGE = HubertEncoder(width=32, n_layers=3, n_heads=4, mlp_width=64)
HUBERT_BASE = HUBERT_LARGE.model_copy(update={"norm_first": False, "normalize": False})
HUBERTS = {"large": HUBERT_LARGE, "base": HUBERT_BASE}


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


def _hubert_config(kind: str) -> HubertConfig:
    """The released large or base model's configuration, at the size of the spec."""
    large = kind == "large"
    return HubertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        feat_extract_norm="layer" if large else "group",
        do_stable_layer_norm=large,
        conv_bias=large,
        vocab_size=12,
    )


@pytest.fixture(scope="module")
def hubert_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small checkpoints of both kinds, written by transformers' own class."""
    folders = {}
    for kind, spec in HUBERTS.items():
        torch.manual_seed(0)
        model = HubertModel(_hubert_config(kind))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        folders[kind] = tmp_path_factory.mktemp(f"hubert_{kind}")
        model.save_pretrained(folders[kind])
        Wav2Vec2FeatureExtractor(
            do_normalize=spec.normalize, return_attention_mask=spec.norm_first
        ).save_pretrained(folders[kind])
    return folders


def _run_sound(encoder: AudioEncoder, seeds: Sequence[int]) -> list[np.ndarray]:
    return encoder.encode([_sound(1.0 + seed, seed) for seed in seeds])


def _run_pictures(encoder: PictureEncoder, seeds: Sequence[int]) -> list[np.ndarray]:
    pictures = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return list(encoder.encode(torch.stack(pictures)))


SUBJECTS = ("whisper", "whisper-transformers", "hubert-large", "hubert-base", "eva")


@pytest.fixture(scope="module", params=SUBJECTS)
def subject(
    request: pytest.FixtureRequest,
    whisper_pt: Path,
    whisper_folder: Path,
    hubert_folders: dict[str, Path],
    eva_pth: Path,
) -> Subject:
    subjects = {
        "whisper": Subject(
            lambda precision: FrozenWhisper.load(WHISPER, whisper_pt, precision=precision),
            _run_sound,
        ),
        "whisper-transformers": Subject(
            lambda precision: FrozenWhisper.load(WHISPER, whisper_folder, precision=precision),
            _run_sound,
        ),
        "hubert-large": Subject(
            lambda precision: FrozenHubert.load(
                HUBERT_LARGE, hubert_folders["large"], precision=precision
            ),
            _run_sound,
        ),
        "hubert-base": Subject(
            lambda precision: FrozenHubert.load(
                HUBERT_BASE, hubert_folders["base"], precision=precision
            ),
            _run_sound,
        ),
        "eva": Subject(
            lambda precision: FrozenEva.load(EVA, eva_pth, precision=precision), _run_pictures
        ),
    }
    return subjects[request.param]


class TestConformance(EncoderConformance):
    pass


@pytest.mark.parametrize("subject", SUBJECTS[:4], indirect=True)
def test_the_residual_stream_stays_float32_in_half_precision(subject: Subject) -> None:
    encoder = subject.load("bfloat16")
    seen = []
    for name, part in encoder._module.named_modules():
        if name in ("layers.1", "blocks.1", "encoder.layers.1"):
            part.register_forward_hook(
                lambda _m, args, out: seen.extend([args[0].dtype, out.dtype])
            )
    linear = next(m for m in encoder._module.modules() if isinstance(m, torch.nn.Linear))
    assert linear.weight.dtype == torch.bfloat16
    subject.run(encoder, [0])
    assert seen == [torch.float32, torch.float32]


def test_whisper_equals_openai_whispers_own_forward(whisper_pt: Path) -> None:
    model = whisper.load_model(str(whisper_pt), device="cpu")
    sound = _sound(2.0)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(torch.from_numpy(sound)), n_mels=80)
    with torch.no_grad():
        expected = model.encoder(mel.unsqueeze(0))[0]
    tokens = FrozenWhisper.load(WHISPER, whisper_pt).encode([sound])[0]
    assert tokens.shape == (100, 32)
    np.testing.assert_allclose(tokens, expected[:100].numpy(), rtol=1e-5, atol=1e-5)


def test_whisper_is_the_same_by_both_libraries(whisper_pt: Path, whisper_folder: Path) -> None:
    ours = FrozenWhisper.load(WHISPER, whisper_pt)
    theirs = FrozenWhisper.load(WHISPER, whisper_folder)
    assert type(ours._module).__module__.startswith("whisper.")
    assert type(theirs._module).__module__.startswith("transformers.")
    sounds = [_sound(0.3), _sound(4.1, 1)]
    for a, b in zip(ours.encode(sounds), theirs.encode(sounds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    assert ours.spec == theirs.spec, "the same weights in another format are the same spec"


@pytest.mark.parametrize("by", ["whisper_pt", "whisper_folder"])
def test_a_padded_window_is_all_that_whisper_gives(
    by: str, request: pytest.FixtureRequest, whisper_pt: Path
) -> None:
    padded = FrozenWhisper.load(
        WHISPER.model_copy(update={"padded": True}), request.getfixturevalue(by)
    )
    plain = FrozenWhisper.load(WHISPER, request.getfixturevalue(by))
    assert padded.spec.weights_sha256 == plain.spec.weights_sha256
    sounds = [_sound(0.3), _sound(4.1, 1), _sound(31.0, 2)]
    together = padded.encode(sounds)
    model = whisper.load_model(str(whisper_pt), device="cpu")
    for sound, tokens, heard in zip(sounds, together, plain.encode(sounds), strict=True):
        assert tokens.shape == (1500, 32)
        np.testing.assert_allclose(padded.encode([sound])[0], tokens, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(tokens[: len(heard)], heard)
        mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(torch.from_numpy(sound)), n_mels=80)
        with torch.no_grad():
            encoded = model.encoder(mel.unsqueeze(0))
        # The released code pools all 1500 frames of the padded window to 64.
        pooled = F.adaptive_avg_pool1d(encoded.transpose(1, 2), 64)[0].T
        view, mask = AudioView(n_tokens=64).apply(tokens)
        assert mask.all()
        np.testing.assert_allclose(view, pooled.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_whisper_layers_equal_the_libraries_hidden_states(
    whisper_pt: Path, whisper_folder: Path, layer: int
) -> None:
    sound = _sound(1.3)
    mel = whisper.log_mel_spectrogram(whisper.pad_or_trim(torch.from_numpy(sound)), n_mels=80)[None]
    theirs = WhisperModel.from_pretrained(whisper_folder).eval()
    openai = whisper.load_model(str(whisper_pt), device="cpu")
    inputs: list[torch.Tensor] = []
    openai.encoder.blocks[layer].register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    with torch.no_grad():
        hidden = theirs.encoder(mel, output_hidden_states=True).hidden_states
        openai.encoder(mel)
    spec = WHISPER.model_copy(update={"layer": layer})
    by_file = FrozenWhisper.load(spec, whisper_pt)
    by_folder = FrozenWhisper.load(spec, whisper_folder)
    assert by_file.spec == by_folder.spec
    for tokens in (by_file.encode([sound])[0], by_folder.encode([sound])[0]):
        assert tokens.shape == (65, 32)
        np.testing.assert_allclose(tokens, hidden[layer][0, :65], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(tokens, inputs[0][0, :65], rtol=1e-4, atol=1e-5)


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


def _hubert_by_transformers(
    folder: Path, sounds: list[np.ndarray], layer: int | None = None
) -> list[np.ndarray]:
    """HubertModel's own forward, behind its own feature extractor, one waveform at a time."""
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(folder)
    model = HubertModel.from_pretrained(folder).eval()
    tokens = []
    for sound in sounds:
        values = extractor(sound, sampling_rate=16_000, return_tensors="pt").input_values
        with torch.no_grad():
            output = model(values, output_hidden_states=True)
        hidden = output.last_hidden_state if layer is None else output.hidden_states[layer]
        tokens.append(hidden[0].numpy())
    return tokens


class TestHubert:
    @pytest.mark.parametrize("kind", HUBERTS)
    @pytest.mark.parametrize("layer", [None, 0, 2])
    def test_equals_transformers_own_forward(
        self, hubert_folders: dict[str, Path], kind: str, layer: int | None
    ) -> None:
        # Off zero and quiet, so that a forgotten or doubled normalisation shows.
        sounds = [0.05 + 0.1 * _sound(s, seed) for seed, s in enumerate((0.4, 1.01, 0.4, 0.0251))]
        expected = _hubert_by_transformers(hubert_folders[kind], sounds, layer)
        spec = HUBERTS[kind].model_copy(update={"layer": layer})
        together = FrozenHubert.load(spec, hubert_folders[kind]).encode(sounds)
        for tokens, theirs in zip(together, expected, strict=True):
            assert tokens.shape == theirs.shape
            np.testing.assert_allclose(tokens, theirs, rtol=1e-4, atol=1e-4)

    def test_a_padded_batch_equals_transformers_own_padded_batch(
        self, hubert_folders: dict[str, Path]
    ) -> None:
        folder, sounds = hubert_folders["large"], [_sound(0.5), _sound(1.2, 1)]
        batch = Wav2Vec2FeatureExtractor.from_pretrained(folder)(
            sounds, sampling_rate=16_000, padding=True, return_tensors="pt"
        )
        with torch.no_grad():
            expected = HubertModel.from_pretrained(folder).eval()(**batch).last_hidden_state
        got = FrozenHubert.load(HUBERT_LARGE, folder).encode(sounds)
        for tokens, theirs in zip(got, expected.numpy(), strict=True):
            np.testing.assert_allclose(tokens, theirs[: len(tokens)], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", HUBERTS)
    def test_every_format_of_the_same_weights_is_the_same_spec(
        self, hubert_folders: dict[str, Path], kind: str, tmp_path: Path
    ) -> None:
        model = HubertModel.from_pretrained(hubert_folders[kind])
        new, old = "parametrizations.weight.original", "weight_"
        state = {
            name.replace(f"{new}0", f"{old}g").replace(f"{new}1", f"{old}v"): tensor
            for name, tensor in model.state_dict().items()
        }
        assert sum(name.endswith((f"{old}g", f"{old}v")) for name in state) == 2
        model.save_pretrained(tmp_path / "split", max_shard_size="9MB")
        assert len(list((tmp_path / "split").glob("model-*-of-*.safetensors"))) >= 2
        head = HubertForCTC(_hubert_config(kind))
        head.hubert.load_state_dict(model.state_dict())
        head.save_pretrained(tmp_path / "head")
        (tmp_path / "new").mkdir()
        torch.save(model.state_dict(), tmp_path / "new" / "pytorch_model.bin")
        (tmp_path / "old").mkdir()
        torch.save(
            state, tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False
        )
        for name in ("new", "old"):
            shutil.copy(hubert_folders[kind] / "config.json", tmp_path / name)
        encoder = FrozenHubert.load(HUBERTS[kind], hubert_folders[kind])
        for name in ("split", "head", "new", "old"):
            other = FrozenHubert.load(HUBERTS[kind], tmp_path / name)
            assert other.spec == encoder.spec, name
            np.testing.assert_array_equal(
                other.encode([_sound(0.2)])[0], encoder.encode([_sound(0.2)])[0]
            )

    def test_other_weights_are_another_spec(
        self, hubert_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        model = HubertModel.from_pretrained(hubert_folders["large"])
        spec = FrozenHubert.load(HUBERT_LARGE, hubert_folders["large"]).spec
        with torch.no_grad():
            model.masked_spec_embed.add_(1)  # of training alone
        model.save_pretrained(tmp_path / "same")
        assert FrozenHubert.load(HUBERT_LARGE, tmp_path / "same").spec == spec
        with torch.no_grad():
            model.encoder.pos_conv_embed.conv.parametrizations.weight.original0.mul_(2)
        model.save_pretrained(tmp_path / "other")
        assert FrozenHubert.load(HUBERT_LARGE, tmp_path / "other").spec != spec

    def test_runs_by_scaled_dot_product_attention(self, hubert_folders: dict[str, Path]) -> None:
        module = FrozenHubert.load(HUBERT_LARGE, hubert_folders["large"])._module
        assert module.config._attn_implementation == "sdpa"

    def test_frames_are_transformers_own_count(self) -> None:
        model = HubertModel(_hubert_config("base"))
        for n_samples in (400, 719, 720, 16_000, 16_079, 16_080, 48_123, 479_999):
            theirs = int(model._get_feat_extract_output_lengths(torch.tensor(n_samples)))
            assert valid_frames(n_samples, 1500) == theirs
        assert [valid_frames(n, 1500) for n in (0, 399, 480_399, 480_400, 9_999_999)] == [
            0,
            0,
            1500,
            1500,
            1500,
        ]

    @pytest.mark.parametrize("kind", HUBERTS)
    def test_long_sound_is_cut_to_the_window(
        self, hubert_folders: dict[str, Path], kind: str
    ) -> None:
        sound = _sound(1.0)
        encoder = FrozenHubert.load(
            HUBERTS[kind].model_copy(update={"n_context": 10}), hubert_folders[kind]
        )
        (expected,) = _hubert_by_transformers(hubert_folders[kind], [sound[:3599]])
        assert expected.shape == (10, 32)
        for given in (sound, sound[:3600], sound[:3599]):
            np.testing.assert_allclose(encoder.encode([given])[0], expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", HUBERTS)
    def test_silence_is_finite(self, hubert_folders: dict[str, Path], kind: str) -> None:
        encoder = FrozenHubert.load(HUBERTS[kind], hubert_folders[kind])
        assert np.isfinite(encoder.encode([np.zeros(16_000, np.float32)])[0]).all()

    @pytest.mark.parametrize("shape", [(0,), (399,), (2, 800)])
    def test_too_short_or_not_mono(
        self, hubert_folders: dict[str, Path], shape: tuple[int, ...]
    ) -> None:
        encoder = FrozenHubert.load(HUBERT_LARGE, hubert_folders["large"])
        with pytest.raises(MediaError, match=r"N >= 400 \(25 ms at 16000 Hz\)"):
            encoder.encode([_sound(0.1), np.zeros(shape, np.float32)])

    def test_the_named_encoders_have_the_released_architectures(self) -> None:
        """Parameter counts of the releases, without allocating them."""
        # facebook/hubert-base-ls960 and hubert-large-ll60k: 94.4 M and 315.4 M (HuBERT paper: 95 M, 317 M)
        for name, millions in (("hubert-base", 94.4), ("hubert-large", 315.4)):
            spec = HubertEncoder.model_validate(NAMED_ENCODERS[name])
            with torch.device("meta"):
                module = hubert._module(spec)
            count = sum(p.numel() for p in module.parameters())
            assert count / 1e6 == pytest.approx(millions, abs=0.1)


class TestBadHubertFolders:
    @staticmethod
    def changed(folder: Path, new: Path, file: str, **changes: object) -> Path:
        shutil.copytree(folder, new)
        config = json.loads((new / file).read_bytes()) | changes
        (new / file).write_text(json.dumps(config))
        return new

    def test_fairseq_file(self, tmp_path: Path) -> None:
        path = tmp_path / "chinese-hubert-large-fairseq-ckpt.pt"
        torch.save({"args": None, "model": {}}, path)
        for given in (path, tmp_path):
            with pytest.raises(CheckpointError, match=r"convert a fairseq \.pt file"):
                FrozenHubert.load(HUBERT_LARGE, given)

    def test_another_model(self, whisper_folder: Path) -> None:
        with pytest.raises(CheckpointError, match=r"model_type is 'whisper', expected 'hubert'"):
            FrozenHubert.load(HUBERT_LARGE, whisper_folder)

    def test_other_sizes(self, hubert_folders: dict[str, Path]) -> None:
        wrong = HUBERT_LARGE.model_copy(update={"n_layers": 4, "mlp_width": 128})
        with pytest.raises(
            CheckpointError, match=r"n_layers is 3, the spec says 4; mlp_width is 64, .* 128"
        ):
            FrozenHubert.load(wrong, hubert_folders["large"])

    @pytest.mark.parametrize(("kind", "other"), [("large", "base"), ("base", "large")])
    def test_the_other_kind(self, hubert_folders: dict[str, Path], kind: str, other: str) -> None:
        with pytest.raises(CheckpointError, match=r"norm_first is (True|False), the spec says"):
            FrozenHubert.load(HUBERTS[other], hubert_folders[kind])

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("do_stable_layer_norm", False, r"a mixture .*do_stable_layer_norm False"),
            ("conv_bias", False, r"a mixture .*conv_bias False"),
            ("feat_extract_norm", "group", r"a mixture .*feat_extract_norm 'group'"),
            ("conv_stride", [5, 2, 2, 2, 2, 2, 1], r"conv_stride is \[5, 2, 2, 2, 2, 2, 1\]"),
            ("feat_proj_layer_norm", False, r"feat_proj_layer_norm is False"),
            ("conv_pos_batch_norm", True, r"conv_pos_batch_norm is True"),
            ("hidden_act", "relu", r"hidden_act is 'relu', supported: 'gelu'"),
        ],
    )
    def test_another_design(
        self,
        hubert_folders: dict[str, Path],
        tmp_path: Path,
        name: str,
        value: object,
        message: str,
    ) -> None:
        folder = self.changed(
            hubert_folders["large"], tmp_path / "changed", "config.json", **{name: value}
        )
        with pytest.raises(CheckpointError, match=message):
            FrozenHubert.load(HUBERT_LARGE, folder)

    def test_preprocessor_contradicts_the_spec(
        self, hubert_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        file = "preprocessor_config.json"
        folder = self.changed(hubert_folders["large"], tmp_path / "plain", file, do_normalize=False)
        with pytest.raises(CheckpointError, match=r"tokens\.audio\.encoder\.normalize=false"):
            FrozenHubert.load(HUBERT_LARGE, folder)
        plain = HUBERT_LARGE.model_copy(update={"normalize": False})
        assert FrozenHubert.load(plain, folder).spec.normalize is False
        (folder / file).unlink()
        FrozenHubert.load(HUBERT_LARGE, folder)  # without the file, the spec decides
        fast = self.changed(hubert_folders["large"], tmp_path / "fast", file, sampling_rate=48_000)
        with pytest.raises(CheckpointError, match=r"sound at 48000 Hz"):
            FrozenHubert.load(HUBERT_LARGE, fast)

    def test_missing_tensors(self, hubert_folders: dict[str, Path], tmp_path: Path) -> None:
        state = HubertModel.from_pretrained(hubert_folders["large"]).state_dict()
        for name in [n for n in state if n.startswith("encoder.layers.2.")]:
            del state[name]
        shutil.copy(hubert_folders["large"] / "config.json", tmp_path)
        torch.save(state, tmp_path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"16 of \d+ tensors are missing"):
            FrozenHubert.load(HUBERT_LARGE, tmp_path)
        # A layer that needs none of them is there.
        FrozenHubert.load(HUBERT_LARGE.model_copy(update={"layer": 2}), tmp_path)


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
