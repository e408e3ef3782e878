"""The card of a stored spec: complete, right, and its snippets run."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cache.card import card, reason_class
from cache.commit import ClipTokens, Status
from cache.spec import FaceCrop, Frames, TokenSpec
from cache.store import TokenStore
from tests.conftest import key_of, make_clip

Specs = dict[str, TokenSpec]


def snippets(text: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
    )
    return done.stdout.strip()


@pytest.fixture
def store(tmp_path: Path, specs: Specs) -> TokenStore:
    store = TokenStore.open_or_create(tmp_path / "s", compression="zstd")
    for spec in specs.values():
        clips = [
            make_clip(spec, "a"),
            ClipTokens(key_of("b"), Status.ABSENT),
            ClipTokens(key_of("c"), Status.FAILED, reason="/data/c1.mp4: video: 7 packets lost"),
            ClipTokens(key_of("d"), Status.FAILED, reason="/other/d.avi: video: 12 packets lost"),
        ]
        store.commit(spec, clips, {"torch": "2.9.1", "device": "cpu"})
        store.commit(spec, [make_clip(spec, "e")], {"torch": "2.10.0", "device": "cuda"})
    return store


@pytest.mark.parametrize("stream", ["audio", "video", "image"])
def test_the_snippets_give_the_id_and_the_first_clip(
    store: TokenStore, specs: Specs, stream: str
) -> None:
    spec = specs[stream]
    identity, reading = snippets(card(store, spec))
    assert len(identity.strip().splitlines()) == 2
    assert run(identity, Path(store.root)) == spec.spec_id
    key, shape = run(reading, Path(store.root)).splitlines()
    assert key == key_of("a")
    assert shape == str(make_clip(spec, "a").tokens.shape)  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", ["audio", "video", "image"])
def test_the_json_is_the_spec(store: TokenStore, specs: Specs, stream: str) -> None:
    (text,) = snippets(card(store, specs[stream]), "json")
    assert TokenSpec.model_validate(json.loads(text)) == specs[stream]
    digest = hashlib.sha256(text.strip().encode()).hexdigest()
    assert digest.startswith(specs[stream].spec_id)


def test_every_choice_of_the_spec_is_shown(store: TokenStore, specs: Specs) -> None:
    video, audio = card(store, specs["video"]), card(store, specs["audio"])
    for row in [
        "| kind | eva |", "| width | 96 |", "| depth | 4 blocks |", f"`{'ab' * 32}`",
        "| frames | 16, the centres of as many equal segments |", "112 x 112 px",
        "| interpolation | bicubic |", "| mean | 0.48145466, 0.4578275, 0.40821073 |",
        "| std | 0.26862954, 0.26130258, 0.27577711 |", "| decode policy | 1 |",
        "16 x 4 x 96", "| dtype | float16 |", "8 x 8 patches averaged to 2 x 2",
        "| compression | zstd |", "| store format version | 1 |",
    ]:  # fmt: skip
        assert row in video, row
    for row in ["| kind | whisper |", "| layers | 2 |", "| mel bins | 80 |", "16000 Hz"]:
        assert row in audio, row
    assert "middle frame" in card(store, specs["image"])


def test_newer_choices_are_shown(store: TokenStore, specs: Specs) -> None:
    audio, video = specs["audio"], specs["video"]
    assert "only frames that hear the clip are kept" in card(store, audio)
    padded = audio.model_copy(update={"encoder": audio.encoder.model_copy(update={"padded": True})})
    window = Frames(kind="window", n_frames=16, seed=7)
    faces = video.model_copy(update={"frames": window, "crop": FaceCrop(margin=0.25)})
    for spec in (padded, faces):
        store.commit(spec, [ClipTokens(key_of("a"), Status.ABSENT)], {})
    assert "all frames of the zero-padded window are kept" in card(store, padded)
    text = card(store, faces)
    assert "| frames | 16 consecutive ones at an offset by the clip's digest and seed 7;" in text
    assert (
        "| part of a frame | the square around the face as openface found it, with 0.25 of" in text
    )


def test_counts_dates_reasons_and_versions(store: TokenStore, specs: Specs) -> None:
    text = card(store, specs["video"])
    dates = sorted(commit.created for commit in store.commits(specs["video"]))
    for row in [
        "| clips ok | 2 |", "| clips absent | 1 |", "| clips failed | 2 |", "| units | 2 |",
        "- 2 x FILE: video: N packets lost", f"| first commit | {dates[0]} |",
        f"| last commit | {dates[-1]} |", "| 1 | 4 | device cpu, torch 2.9.1 |",
        "| 1 | 1 | device cuda, torch 2.10.0 |",
    ]:  # fmt: skip
        assert row in text, row
    assert "Origin unknown" not in text


def test_an_unknown_origin_comes_first(store: TokenStore, specs: Specs) -> None:
    spec = specs["image"]
    provenance = {"origin": "unknown", "declared_name": "lab features 2023"}
    store.commit(spec, [make_clip(spec, "x"), make_clip(spec, "y")], provenance)
    text = card(store, spec)
    warning = text.index("**Origin unknown.** 1 of 3 units (2 clips)")
    assert warning < text.index("## Encoder")
    assert "lab features 2023" in text[warning : text.index("## Encoder")]


def test_an_empty_spec_and_cells_with_bars(tmp_path: Path, specs: Specs) -> None:
    store, spec = TokenStore.open_or_create(tmp_path / "s"), specs["audio"]
    store.commit(spec, [ClipTokens(key_of("a"), Status.ABSENT)], {"device": "a|b"})
    assert "| 1 | 1 | device a\\|b |" in card(store, spec)
    assert "Failed, by reason" not in card(store, spec)


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("clip 7.mp4 is not the file that was indexed", "FILE is not the file that was indexed"),
        ("/a b/c.mp4: audio: the stream holds no samples", "FILE: audio: the stream holds no samples"),
        ("the video encoder gave NaN or infinity as float16",) * 2,
        ("peak index 120 outside 88 frames", "peak index N outside N frames"),
    ],
)  # fmt: skip
def test_reasons_are_put_together(reason: str, expected: str) -> None:
    assert reason_class(reason) == expected
