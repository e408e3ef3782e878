"""Token specs by name: the usual choices of each encoder, refused names, labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.encoders import NAMED_ENCODERS, HubertEncoder, WhisperEncoder
from cache.errors import SchemaError
from cache.recipes import label_of, read_specs, token_specs
from cache.spec import CLIP_MEAN, CLIP_STD, FaceCrop, Frames, Pixels, TokenSpec
from train.presets import demo, v2

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP = {"mean": CLIP_MEAN, "std": CLIP_STD}


def _shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(spec.stream, spec.max_shape) for spec in token_specs(text)]


def test_the_paper_s_encoders_are_the_preset_s_own_tokens() -> None:
    tokens = v2().tokens
    assert token_specs("whisper-large-v3,eva-g") == (tokens.audio, tokens.video, tokens.image)
    digest = "cd" * 32
    for mine, paper in zip(token_specs("whisper-large-v3,eva-g"), tokens.all(), strict=True):
        assert mine.with_weights(digest).spec_id == paper.with_weights(digest).spec_id


@pytest.mark.parametrize("name", NAMED_ENCODERS)
def test_every_named_encoder_makes_valid_tokens(name: str) -> None:
    specs = token_specs(name)
    takes = specs[0].encoder.takes
    expected = {"sound": ["audio"], "pictures": ["video", "image"], "frames": ["video"]}[takes]
    assert [spec.stream for spec in specs] == expected
    for spec in specs:
        assert spec.encoder == type(spec.encoder).model_validate(NAMED_ENCODERS[name])
        assert not spec.is_resolved
        assert spec.dtype == "float16"
        assert (spec.stream != "video") or spec.frames == Frames(kind="uniform", n_frames=16)
        assert (spec.stream != "image") or spec.frames == Frames(kind="middle")


@pytest.mark.parametrize(
    ("text", "pixels"),
    [
        ("eva-g:video", Pixels(size_px=224, interpolation="bicubic", **CLIP)),
        ("eva-g:image", Pixels(size_px=448, interpolation="bicubic", **CLIP)),
        ("clip-large:video", Pixels(size_px=224, interpolation="bicubic", **CLIP)),
        ("clip-large:image", Pixels(size_px=224, interpolation="bicubic", **CLIP)),
        ("mae-large:video", Pixels(size_px=224, interpolation="bicubic", **IMAGENET)),
        ("mae-large:image", Pixels(size_px=224, interpolation="bicubic", **IMAGENET)),
        ("videomae-base", Pixels(size_px=224, interpolation="bilinear", **IMAGENET)),
        ("videomae2-giant", Pixels(size_px=224, interpolation="bilinear", **IMAGENET)),
    ],
)
def test_usual_pixels(text: str, pixels: Pixels) -> None:
    assert [spec.pixels for spec in token_specs(text)] == [pixels]


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("hubert-large", [("audio", (1500, 1024))]),
        ("eva-g:image", [("image", (1 + 32 * 32, 1408))]),
        ("eva-g:video", [("video", (16, 4, 1408))]),
        ("clip-large", [("video", (16, 4, 1024)), ("image", (1 + 16 * 16, 1024))]),
        ("clip-large+cls", [("video", (16, 1, 1024)), ("image", (1, 1024))]),
        ("clip-large:video+utt+cls", [("video", (1, 1, 1024))]),
        ("mae-large:image", [("image", (1 + 14 * 14, 1024))]),
        ("videomae-large", [("video", (8, 4, 1024))]),
        ("videomae2-giant", [("video", (8, 4, 1408))]),
        (
            # the predecessor's three features
            "mae-large:video+utt, videomae-large+utt, chinese-hubert-large+utt",
            [("video", (1, 1, 1024)), ("video", (1, 1, 1024)), ("audio", (1, 1024))],
        ),
    ],
)
def test_stored_shapes(text: str, shapes: list[tuple[str, tuple[int, ...]]]) -> None:
    assert _shapes(text) == shapes


def test_faces_reach_the_spec_and_its_label() -> None:
    # the predecessor's local and temporal features
    local, temporal = token_specs("mae-large:video+face+utt,videomae-large+utt+face")
    assert local.crop == temporal.crop == FaceCrop(by="openface", margin=0.2)
    assert (local.grid, local.utterance) == (None, True)
    assert [label_of(spec) for spec in (local, temporal)] == [
        "video mae-large+face+utt",
        "video videomae-large+face+utt",
    ]
    (still,) = token_specs("eva-g:image+face+cls")
    assert label_of(still) == "image eva-g+face+cls"
    whole = still.model_copy(update={"crop": None})
    assert (whole,) == token_specs("eva-g:image+cls")


def test_options_reach_the_spec() -> None:
    (spec,) = token_specs("clip-large:video+cls")
    assert (spec.cls_only, spec.utterance, spec.grid) == (True, False, None)
    (spec,) = token_specs("clip-large:video+cls+utt")
    assert (spec.cls_only, spec.utterance, spec.grid) == (True, True, None)
    assert token_specs("clip-large:video+utt+cls") == (spec,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "wisper-large-v3",
            r"unknown encoder 'wisper-large-v3'\. Did you mean 'whisper-large-v3'\?",
        ),
        ("hubert", r"unknown encoder 'hubert'\. .*Allowed: whisper-tiny, "),
        ("EVA-G", r"unknown encoder 'EVA-G'"),
        ("", r"without a name\. Write NAME\[:STREAM\]\[\+face\]\[\+cls\]\[\+utt\]"),
        ("eva-g,,clip-large", r"--encoders eva-g,,clip-large: an encoder without a name"),
        (":image", r"without a name"),
        ("eva-g:imag", r"makes no 'imag' tokens\. Did you mean 'image'\? Allowed: eva-g:video, "),
        ("eva-g:", r"makes no '' tokens"),
        ("whisper-small:video", r"makes no 'video' tokens\. Allowed: whisper-small:audio"),
        ("videomae-large:image", r"makes no 'image' tokens"),
        ("eva-g+uttt", r"unknown option '\+uttt'\. Did you mean 'utt'\? .*: \+face, \+cls, \+utt"),
        ("eva-g+fce", r"unknown option '\+fce'\. Did you mean 'face'\?"),
        ("hubert-large+face", r"'hubert-large' hears sound, so '\+face' does not fit"),
        ("mae-large:video+face,mae-large:video+face", r"mean the same video tokens"),
        ("eva-g+", r"unknown option '\+'"),
        ("hubert-large+cls", r"'hubert-large' has no CLS token"),
        ("videomae-large+cls", r"'videomae-large' has no CLS token"),
        ("eva-g,eva-g:image", r"'eva-g' and 'eva-g:image' mean the same image tokens"),
        ("hubert-large,chinese-hubert-large", r"only weights could tell them apart"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        token_specs(text)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("whisper-large-v3", "audio whisper-large-v3"),
        ("eva-g:video", "video eva-g"),
        ("clip-large:image", "image clip-large"),
        ("clip-large:video+cls", "video clip-large+cls"),
        ("mae-large:video+utt", "video mae-large+utt"),
        ("mae-large:video+cls+utt", "video mae-large+cls+utt"),
        ("hubert-base", "audio hubert-base"),
    ],
)
def test_labels_of_names(text: str, label: str) -> None:
    (spec,) = token_specs(text)
    assert label_of(spec) == label
    assert label_of(spec.with_weights("ab" * 32)) == label


def test_labels_of_names_with_equal_sizes_show_the_weights() -> None:
    (english,), (chinese,) = token_specs("hubert-large"), token_specs("chinese-hubert-large")
    assert label_of(english) == label_of(chinese) == "audio hubert-large"
    assert label_of(english.with_weights("ab" * 32)) == "audio hubert-large@abababab"
    assert label_of(chinese.with_weights("cd" * 32)) == "audio hubert-large@cdcdcdcd"


def test_labels_of_unnamed_encoders_show_their_sizes() -> None:
    labels = [label_of(spec.with_weights("ab" * 32)) for spec in demo().tokens.all()]
    assert labels == ["audio whisper 64x2", "video eva 96x4", "image eva 96x4"]


def test_labels_show_a_padded_window() -> None:
    (spec,) = token_specs("whisper-large-v3")
    padded = spec.model_copy(update={"encoder": spec.encoder.model_copy(update={"padded": True})})
    assert label_of(padded) == "audio whisper-large-v3 padded"


def test_labels_show_the_layer() -> None:
    (spec,) = token_specs("whisper-small+utt")
    assert isinstance(spec.encoder, WhisperEncoder)
    early = spec.model_copy(update={"encoder": spec.encoder.model_copy(update={"layer": 6})})
    assert label_of(early) == "audio whisper-small layer 6+utt"


def test_an_encoder_changed_in_another_way_has_no_name() -> None:
    encoder = HubertEncoder.model_validate({**NAMED_ENCODERS["hubert-base"], "n_context": 500})
    spec = TokenSpec(stream="audio", encoder=encoder, sample_rate_hz=16_000)
    assert label_of(spec) == "audio hubert 768x12"


def test_specs_of_a_file_keep_their_names_and_errors_name_the_field(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    sizes = "{kind: hubert, width: 32, n_layers: 2, n_heads: 4, mlp_width: 64}"
    one = f"stream: audio, sample_rate_hz: 16000, encoder: {sizes}"
    path.write_text(f"first: {{{one}}}\nsecond: {{{one}}}\n")
    found = read_specs(path)
    assert list(found) == ["first", "second"]
    assert found["first"] == found["second"], "only their weights differ"
    path.write_text(f"first: {{{one.replace('width: 32', 'width: 30')}}}\n")
    with pytest.raises(
        SchemaError, match=r"mine\.yaml, first.*width 30 is not a multiple of n_heads 4"
    ):
        read_specs(path)
    path.write_text("- a\n- b\n")
    with pytest.raises(SchemaError, match=r"needs names and their specs.*got list"):
        read_specs(path)
    with pytest.raises(SchemaError, match=r"none\.yaml: cannot be read"):
        read_specs(tmp_path / "none.yaml")
