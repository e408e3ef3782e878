"""One raw clip to runs that read some of its streams: decoded, shown, asked about as any other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from cache.errors import MediaError, SchemaError
from cache.manifest import read_manifest
from cache.store import TokenStore
from eval.live.answer import LiveModel
from eval.live.clip import ClipReader
from eval.live.looks import seen_panel
from extract.encoders.bank import EncoderBank
from tests.media import sine, write, write_clip, write_wav
from tests.training import make_corpus
from train.batches.reading import ViewReader
from train.config import Preset, configure
from train.loop import train
from train.presets import demo

NO_FUSION = "model.fusion.kind=none"

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def only(*inputs: str) -> Preset:
    """Return the demo preset with some of its inputs."""
    gone = [f"tokens.{name}=null" for name in ("audio", "video", "image") if name not in inputs]
    return configure(demo(), [*gone, *([NO_FUSION] if len(inputs) < 2 else [])])


def with_local() -> Preset:
    """Return the demo preset with a second tensor of the video stream: consecutive frames, pooled."""
    video = demo().tokens.video
    assert video is not None
    assert video.frames is not None
    frames = video.frames.model_copy(update={"kind": "window"})
    spec = video.model_copy(update={"utterance": True, "grid": None, "frames": frames})
    return configure(
        demo(),
        [
            f"tokens.local={spec.canonical_json()}",
            "views.local={n_frames: 1, grid: 1}",
            "prefix=[[fusion, image, local, video, audio]]",
        ],
    )


def bank_of(preset: Preset, weights: dict[str, Path]) -> EncoderBank:
    kinds = {spec.encoder.kind for spec in preset.tokens.all()}
    return EncoderBank(preset.tokens.all(), {k: p for k, p in weights.items() if k in kinds})


@pytest.mark.parametrize("inputs", [("audio",), ("audio", "image"), "local"])
def test_the_views_are_those_of_a_store(
    inputs: Sequence[str], tiny_weights: dict[str, Path], tmp_path: Path
) -> None:
    preset = with_local() if inputs == "local" else only(*inputs)
    path = write(tmp_path / "a.mp4", n=40, audio="aac", sound=sine(200, 1.6, 44100, 2))
    with ClipReader(preset, bank_of(preset, tiny_weights)) as reader:
        seen = reader.read(path, corpus="made")
        names = tuple(preset.tokens.by_input())
        assert tuple(seen.streams) == tuple(reader.specs) == names
        store = TokenStore.open_or_create(tmp_path / "store")
        for name, spec in reader.specs.items():
            store.commit(spec, [seen.streams[name]], {})
    found = ViewReader(store, preset).read([seen.record])
    assert found.tokens.keys() == seen.views.tokens.keys()
    for name, tokens in found.tokens.items():
        assert tokens.any()
        assert torch.equal(seen.views.tokens[name], tokens), name
    for name, mask in found.masks.items():
        assert torch.equal(seen.views.masks[name], mask), name
    assert seen.remarks == ()
    assert seen.absent == ()
    # Frames are those of the first encoder of pictures; the sound can be shown and transcribed always.
    shown = next((name for name in ("video", "local", "image") if name in names), None)
    expected = seen.streams[shown].frame_index if shown else ()  # type: ignore[index]
    assert [frame.index for frame in seen.frames] == sorted({*expected})
    assert seen.waveform is not None
    assert (seen.heard_s is not None) == ("audio" in names)
    panel = seen_panel(seen)
    assert panel.count("<li class=") == len(names)
    assert ("Video, second encoder" in panel) == (inputs == "local")


def test_what_a_run_does_not_read_is_not_missed(
    tiny_weights: dict[str, Path], tmp_path: Path
) -> None:
    tone = (20000 * sine(220, 1.0, 16000, 1)[0]).astype(np.int16)
    heard, silent = write_wav(tmp_path / "a.wav", tone, 16000), write(tmp_path / "b.mp4", n=20)
    with ClipReader(only("audio"), bank_of(only("audio"), tiny_weights)) as reader:
        seen = reader.read(heard, corpus="made")
        assert (seen.absent, seen.remarks, seen.frames) == ((), (), ())
        with pytest.raises(MediaError, match=r"nothing to see or to hear"):
            reader.read(silent, corpus="made")
    with ClipReader(only("video"), bank_of(only("video"), tiny_weights)) as reader:
        assert reader.read(silent, corpus="made").remarks == ()
        with pytest.raises(MediaError, match=r"nothing to see or to hear"):
            reader.read(heard, corpus="made")
    both = only("audio", "video")
    with ClipReader(both, bank_of(both, tiny_weights)) as reader:
        seen = reader.read(heard, corpus="made")
        assert seen.absent == ("video",)
        assert seen.remarks == ("There is no moving picture: the model answers from the rest.",)


def test_a_run_of_one_stream_answers_about_a_file(
    tiny_weights: dict[str, Path], tmp_path: Path
) -> None:
    preset = configure(only("audio"), ["stages.0.n_steps=1", "stages.1.n_steps=1"])
    bank = bank_of(preset, tiny_weights)
    manifest, store = make_corpus(tmp_path, {"audio": bank.specs[0]})
    train(preset, read_manifest(manifest), manifest, TokenStore.open(store), tmp_path / "run")
    path = write_clip(tmp_path / "a.mp4")
    with LiveModel.load(tmp_path / "run", stage="stage1") as live:
        seen = live.look(path)
        reply = live.ask(seen, max_new_tokens=3, likelihoods=True)
        assert reply.prediction.spec_ids == {"audio": bank.specs[0].spec_id}
        assert sum((reply.prediction.likelihoods or {}).values()) == pytest.approx(1)
        with pytest.raises(SchemaError, match=r"reads no video, so there is nothing to mask"):
            live.ask(seen, masked=("video",))
        with pytest.raises(MediaError, match="is shown nothing of a clip"):
            live.ask(seen, masked=("audio",))
