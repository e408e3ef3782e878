"""The tiny encoders: real layouts, small files, reproducible training, and competence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import whisper
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.eva import Eva

import extract.tiny
from extract.corpora.demo import EMOTIONS, make_frames, make_samples, plan_demo
from extract.tiny.optimise import Recipe
from extract.tiny.pretrain import EVA_FILE, WHISPER_FILE, main, write_eva, write_whisper
from extract.tiny.pretrain_eva import eva_tokens, pretrain_eva, to_pixels
from extract.tiny.pretrain_whisper import (
    WHISPER_DIMS,
    audio_tokens,
    pretrain_whisper,
    voice_batch,
)

FOLDER = Path(extract.tiny.__file__).parent
EVA_PATH, WHISPER_PATH = FOLDER / EVA_FILE, FOLDER / WHISPER_FILE
ONE_STEP = Recipe(
    seed=5,
    eva_steps=1,
    whisper_steps=1,
    whisper_full_steps=0,
    faces_per_step=4,
    voices_per_step=4,
    held_out=2,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def load_eva(img_size: int = 112) -> Eva:
    """Build a plain timm EVA by hand, not with the code under test, and load it strictly."""
    model = Eva(
        img_size=img_size,
        patch_size=14,
        embed_dim=96,
        depth=5,
        num_heads=4,
        mlp_ratio=4,
        num_classes=0,
        global_pool="token",
        dynamic_img_size=True,
    )
    model.load_state_dict(load_file(EVA_PATH), strict=True)
    return model.eval()


def test_eva_has_the_key_layout_of_eva_vit_g() -> None:
    weights = load_file(EVA_PATH)
    block = {
        *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
        *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    }
    assert set(weights) == {
        *("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
        *("norm.weight", "norm.bias"),
        *(f"blocks.{i}.{name}" for i in range(5) for name in block),
    }
    assert weights["pos_embed"].shape == (1, 65, 96)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert load_eva().forward_features(torch.zeros(1, 3, 112, 112)).shape == (1, 65, 96)


def test_whisper_loads_as_a_real_one() -> None:
    model = whisper.load_model(str(WHISPER_PATH), device="cpu")
    assert model.dims == WHISPER_DIMS
    mel = whisper.log_mel_spectrogram(np.zeros(480000, dtype=np.float32))
    with torch.inference_mode():
        assert model.embed_audio(mel[None]).shape == (1, 1500, 64)
        text = model.decoder(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 9, 64))
    assert text.isfinite().all()
    checkpoint = torch.load(WHISPER_PATH, weights_only=True)
    assert {t.dtype for t in checkpoint["model_state_dict"].values()} == {torch.float16}


def test_files_are_small_and_say_where_they_come_from() -> None:
    assert EVA_PATH.stat().st_size + WHISPER_PATH.stat().st_size < 2_000_000
    with safe_open(EVA_PATH, "pt") as file:
        eva_notes = file.metadata()
    notes = torch.load(WHISPER_PATH, weights_only=True)["provenance"]
    assert eva_notes == notes
    assert notes["script"] == "python -m extract.tiny.pretrain"
    assert {"seed", "torch", "timm", "numpy", "openai-whisper"} <= set(notes)


def test_pretraining_is_reproducible(tmp_path: Path) -> None:
    for pretrain in (pretrain_eva, pretrain_whisper):
        first, _ = pretrain(ONE_STEP)
        second, scores = pretrain(ONE_STEP)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(torch.isfinite(tensor).all() for tensor in first.values())
        assert all(score <= 1 for score in scores.values())
    written = load_file(write_eva(tmp_path / "eva", ONE_STEP))
    assert {n: t.shape for n, t in written.items()} == {
        n: t.shape for n, t in load_file(EVA_PATH).items()
    }
    write_whisper(tmp_path / "w.pt", ONE_STEP)
    assert whisper.load_model(str(tmp_path / "w.pt"), device="cpu").dims == WHISPER_DIMS


def test_the_command_needs_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--out" in capsys.readouterr().err


def test_a_short_context_is_the_start_of_a_long_one() -> None:
    short, full = (voice_batch(1, n_ctx, np.random.default_rng(0)) for n_ctx in (250, 1500))
    torch.testing.assert_close(short.mel, full.mel[..., :500])
    assert torch.equal(short.valid[0], full.valid[0, :250])
    model = whisper.load_model(str(WHISPER_PATH), device="cpu")
    with torch.inference_mode():
        ours, theirs = audio_tokens(model.encoder, full.mel), model.encoder(full.mel)
    torch.testing.assert_close(ours, theirs)


def _features(
    n_clips: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[str]]:
    """Encode generated clips: picture `(n, 192)`, sound `(n, 64)` and their labels."""
    eva = load_eva()
    model = whisper.load_model(str(WHISPER_PATH), device="cpu")
    rows = plan_demo(n_clips, seed)
    pictures, sounds = [], []
    with torch.inference_mode():
        for row in rows:
            frames = list(itertools.islice(make_frames(row, seed), 0, 16, 15))  # a second apart
            tokens = eva_tokens(eva, torch.stack([to_pixels(frame, 112) for frame in frames]))[-2]
            pictures.append(torch.cat([tokens[0, 0], tokens[:, 1:].mean(dim=(0, 1))]).numpy())
            samples = make_samples(row, seed)
            mel = whisper.log_mel_spectrogram(samples, padding=480000 - len(samples))
            heard = model.encoder(mel[None])[0, : -(-len(samples) // 320)]
            sounds.append(heard.mean(dim=0).numpy())
    return np.stack(pictures), np.stack(sounds), [row.label for row in rows]


@pytest.mark.slow
def test_both_streams_together_name_the_emotion_and_neither_alone_does() -> None:
    picture, sound, labels = _features(180, seed=77)
    n_train = 120

    def accuracy(features: NDArray[np.float32]) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        model.fit(features[:n_train], labels[:n_train])
        return float(model.score(features[n_train:], labels[n_train:]))

    assert len(set(labels)) == len(EMOTIONS)
    assert accuracy(np.concatenate([picture, sound], axis=1)) >= 0.9
    assert accuracy(picture) <= 0.68  # 0.5 and sampling error of 60 clips
    assert accuracy(sound) <= 0.68


def test_eva_stands_a_resized_position_table() -> None:
    """Guesses of the parameters at 168 px use the table resized from 8 x 8 to 12 x 12."""
    eva = load_eva()
    rows = plan_demo(60, 7)
    frames = [next(make_frames(row, 7)) for row in rows]
    with torch.inference_mode():
        near, far = (
            torch.cat([eva_tokens(eva, to_pixels(f, px)[None])[-2][:, 1:].mean(1) for f in frames])
            for px in (112, 168)
        )
    near, far = near - near.mean(0), far - far.mean(0)
    assert torch.nn.functional.cosine_similarity(near, far).median() > 0.8
