"""Specs: identity, refusal, round trip. Views: against torch and float64 means."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache.encoders import NAMED_ENCODERS
from cache.errors import SchemaError, SpecMismatchError
from cache.schema import decode
from cache.spec import FaceCrop, TokenSpec, describe_differences, differences
from cache.views import AudioView, ImageView, VideoView, adaptive_pool, segment_centres
from train.presets import demo, v2

# Written by hand, field by field, from docs/store.md: the seam between presets and the store.
AUDIO_JSON = """
{"schema_version": 1, "stream": "audio",
 "encoder": {"kind": "whisper", "width": 1280, "n_layers": 32, "n_heads": 20, "n_mels": 128,
             "n_context": 1500, "weights_sha256": "%s"},
 "frames": null, "pixels": null, "grid": null, "sample_rate_hz": 16000, "dtype": "float16",
 "decode_policy": 1}
""" % ("0" * 64)


def test_a_hand_written_spec_is_read_and_hashes_by_its_sorted_json() -> None:
    spec = decode(TokenSpec, json.loads(AUDIO_JSON), "by hand")
    assert spec == v2().tokens.audio.with_weights("0" * 64)
    text = json.dumps(json.loads(AUDIO_JSON), sort_keys=True, separators=(",", ":"))
    assert spec.spec_id == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize("spec", [*v2().tokens.all(), *demo().tokens.all()])
def test_every_spec_round_trips(spec: TokenSpec) -> None:
    assert TokenSpec.model_validate_json(spec.model_dump_json()) == spec


CHANGES: dict[str, dict[str, Any]] = {
    "encoder.depth": {"encoder": {"depth": 40}},
    "encoder.norm": {"encoder": {"norm": "checkpoint"}},
    "encoder.weights_sha256": {"encoder": {"weights_sha256": "1" * 64}},
    "frames.kind": {"frames": {"kind": "first"}},
    "pixels.size_px": {"pixels": {"size_px": 224}},
    "pixels.interpolation": {"pixels": {"interpolation": "bilinear"}},
    "pixels.mean": {"pixels": {"mean": [0.5, 0.5, 0.5]}},
    "dtype": {"dtype": "float32"},
    "decode_policy": {"decode_policy": 2},
}


@pytest.mark.parametrize("path", CHANGES)
def test_each_choice_changes_the_id_and_is_named(path: str) -> None:
    spec = v2().tokens.image.with_weights("0" * 64)
    data = spec.model_dump(mode="json")
    for key, value in CHANGES[path].items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    changed = decode(TokenSpec, data, "changed")
    assert changed.spec_id != spec.spec_id
    found = differences(spec, changed)
    assert list(found) == [path]
    assert path in describe_differences(found)
    assert not spec.accepts(changed)


NEWER: dict[str, tuple[str, dict[str, Any]]] = {
    "crop": ("video", {"crop": {}}),
    "crop.margin": ("video", {"crop": {"margin": 0.3}}),
    "frames.kind": ("video", {"frames": {"kind": "window"}}),
    "frames.seed": ("video", {"frames": {"kind": "window", "seed": 7}}),
    "encoder.padded": ("audio", {"encoder": {"padded": True}}),
}


@pytest.mark.parametrize("path", NEWER)
def test_newer_choices_change_the_id_and_stand_in_the_json_only_if_made(path: str) -> None:
    stream, changes = NEWER[path]
    spec = getattr(v2().tokens, stream).with_weights("0" * 64)
    told = json.loads(spec.canonical_json())
    assert not {"crop", "padded", "seed"} & (
        told.keys() | told["encoder"].keys() | (told["frames"] or {}).keys()
    )
    data = spec.model_dump(mode="json")
    for key, value in changes.items():
        data[key] = {**(data[key] or {}), **value}
    changed = decode(TokenSpec, data, "changed")
    assert changed.spec_id != spec.spec_id
    assert not spec.accepts(changed)
    assert not spec.serves(changed)
    assert not changed.serves(spec)
    assert decode(TokenSpec, json.loads(changed.canonical_json()), "again") == changed
    found = differences(spec, changed)
    assert path in found or path.partition(".")[0] in found


def test_crops_serve_equal_crops_alone() -> None:
    spec = v2().tokens.video.with_weights("0" * 64).model_copy(update={"crop": FaceCrop()})
    fine = spec.model_copy(update={"grid": 4})
    assert fine.serves(spec)
    for other in (FaceCrop(margin=0.1), FaceCrop(by="mine"), None):
        assert not fine.serves(spec.model_copy(update={"crop": other}))


def test_how_many_tokens_a_sound_has() -> None:
    audio = v2().tokens.audio
    assert [audio.audio_tokens(s) for s in (0.01, 3.0, 3.001, 40.0)] == [1, 150, 151, 1500]
    padded = audio.model_copy(update={"encoder": audio.encoder.model_copy(update={"padded": True})})
    assert padded.audio_tokens(3.0) == 1500
    assert padded.model_copy(update={"utterance": True}).audio_tokens(3.0) == 1


def test_open_weights_accept_any_digest_but_nothing_else() -> None:
    wanted = v2().tokens.image
    assert wanted.accepts(wanted.with_weights("0" * 64))
    assert not v2().tokens.video.accepts(wanted.with_weights("0" * 64))
    with pytest.raises(SpecMismatchError, match=r"names no weights"):
        _ = wanted.spec_id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strem": "audio"}, r"unknown field 'strem'.*Did you mean 'stream'"),
        ({"stream": "vidio"}, r"'stream'.*got 'vidio'.*Did you mean 'video'"),
        ({"encoder": "whisper-larg-v3"}, "unknown encoder"),
        ({"grid": 2}, "grid pools the video stream"),
        ({"sample_rate_hz": 8000}, "has no sample_rate_hz"),
        ({"pixels": {"size_px": 225}}, "not a multiple of patch_px"),
        ({"frames": {"kind": "middle", "n_frames": 2}}, "picks one frame"),
        ({"frames": {"kind": "uniform", "n_frames": 2}}, "holds one frame"),
        ({"frames": {"kind": "window", "n_frames": 2}}, "holds one frame"),
        ({"frames": {"kind": "middle", "seed": 7}}, "seed is for 'window' alone"),
        ({"crop": {"margin": -0.1}}, r"crop\.margin"),
        ({"crop": {"by": ""}}, r"crop\.by"),
    ],
)
def test_contradictions_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    data = {**v2().tokens.image.model_dump(mode="json"), **change}
    with pytest.raises(SchemaError, match=message):
        decode(TokenSpec, data, "test")


def test_named_encoders_are_whispers_own_sizes() -> None:
    whisper = pytest.importorskip("whisper")
    dims = {"tiny": (384, 4, 6), "large-v3": (1280, 32, 20)}  # openai-whisper's README and code
    for size, (width, layers, heads) in dims.items():
        found = NAMED_ENCODERS[f"whisper-{size}"]
        assert (found["width"], found["n_layers"], found["n_heads"]) == (width, layers, heads)
    assert {f"whisper-{s}" for s in ("tiny", "base", "small", "medium", "large-v3")} <= set(
        NAMED_ENCODERS
    )
    assert set(whisper.available_models()) >= {"tiny", "base", "small", "medium", "large-v3"}


@pytest.mark.parametrize(
    ("n_in", "n_out"), [(1, 1), (64, 64), (65, 64), (150, 64), (1500, 64), (7, 3)]
)
def test_adaptive_pool_equals_torchs(n_in: int, n_out: int) -> None:
    x = np.random.default_rng(0).standard_normal((n_in, 5)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x).T.double(), n_out).T
    np.testing.assert_allclose(adaptive_pool(x, n_out), expected.numpy(), rtol=1e-6, atol=1e-6)


@given(st.integers(1, 300), st.integers(1, 64))
def test_audio_view_equals_float64_means_and_pads_short_clips(n_in: int, n_out: int) -> None:
    x = np.random.default_rng(n_in).standard_normal((n_in, 3)).astype(np.float16)
    tokens, mask = AudioView(n_tokens=n_out).apply(x)
    assert tokens.shape == (n_out, 3)
    n_valid = min(n_in, n_out)
    assert mask.tolist() == [True] * n_valid + [False] * (n_out - n_valid)
    assert not tokens[n_valid:].any()
    for i in range(n_valid):
        window = x[i * n_in // n_valid : -(-(i + 1) * n_in // n_valid)].astype(np.float64)
        np.testing.assert_allclose(tokens[i], window.mean(0), rtol=1e-5, atol=1e-5)


def test_video_view_pools_quadrants_time_major() -> None:
    """16x16 patches whose value is 1000 frame + 10 row + column, so each mean is known."""
    frame, row, column = np.meshgrid(np.arange(16), np.arange(16), np.arange(16), indexing="ij")
    x = (100 * frame + row + column / 100).reshape(16, 256, 1).astype(np.float32)
    tokens, mask = VideoView(n_frames=16, grid=2).apply(x)
    assert tokens.shape == (64, 1)
    assert mask.all()
    for i in range(64):
        f, r, c = i // 4, (i % 4) // 2, i % 2  # token i = frame i // 4, quadrant i % 4
        assert tokens[i, 0] == pytest.approx(100 * f + 8 * r + 3.5 + (8 * c + 3.5) / 100, rel=1e-5)


def test_video_view_of_a_pooled_store_equals_that_of_a_full_one() -> None:
    x = np.random.default_rng(0).standard_normal((16, 256, 8)).astype(np.float32)
    pooled, _ = VideoView(n_frames=16, grid=4).apply(x)
    direct, _ = VideoView(n_frames=16, grid=2).apply(x)
    twice, _ = VideoView(n_frames=16, grid=2).apply(pooled.reshape(16, 16, 8))
    np.testing.assert_allclose(twice, direct, rtol=1e-4, atol=1e-6)


def test_fewer_frames_are_segment_centres() -> None:
    assert segment_centres(16, 4).tolist() == [2, 6, 10, 14]
    assert segment_centres(16, 16).tolist() == list(range(16))
    assert segment_centres(16, 1).tolist() == [8]


def test_image_view_joins_four_consecutive_patches() -> None:
    x = np.arange(1 + 16, dtype=np.float32)[:, None] * np.array([1, 100], np.float32)
    tokens, mask = ImageView(join=4).apply(x)
    assert tokens.shape == (4, 8)
    assert mask.all()
    assert tokens[1].tolist() == [5, 500, 6, 600, 7, 700, 8, 800]
    assert ImageView(join=4).cls(x).tolist() == [0, 0]


def test_a_view_that_the_store_cannot_serve_is_refused() -> None:
    spec = v2().tokens.video
    with pytest.raises(
        SpecMismatchError, match=r"asks for 16 frames of 4x4, the store holds 16 of 2x2"
    ):
        VideoView(n_frames=16, grid=4).shape(spec)
    with pytest.raises(SpecMismatchError, match=r"not a multiple"):
        ImageView(join=3).shape(v2().tokens.image)
