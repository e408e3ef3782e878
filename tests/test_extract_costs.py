"""Operations of encoding a clip, against torch's own count of the networks that run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from cache.encoders import NAMED_ENCODERS, SAMPLE_RATE_HZ, WhisperEncoder
from cache.spec import Frames, Pixels, TokenSpec
from extract.costs import clip_flops
from extract.encoders.bank import EncoderBank, EncoderInput
from extract.tiny.made_up import of_one_width, write_checkpoint

SPECS = of_one_width(16, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made-up")


def counted(spec: TokenSpec, folder: Path, duration_s: float) -> int:
    """Return what torch counts when one clip is encoded."""
    bank = EncoderBank([spec], {"given": write_checkpoint(spec.encoder, folder)}, names=["given"])
    rng = np.random.default_rng(0)
    if spec.stream == "audio":
        n = round(duration_s * SAMPLE_RATE_HZ)
        given = EncoderInput(rng.standard_normal(n).astype(np.float32))
    else:
        assert spec.frames is not None
        assert spec.pixels is not None
        n, side = spec.frames.n_frames, spec.pixels.size_px
        given = EncoderInput(rng.integers(0, 256, (n, side, side, 3), np.uint8), tuple(range(n)))
    bank.encode(
        bank.specs[0], [given]
    )  # loaded, and its positions resized, before anything is counted
    with FlopCounterMode(display=False) as counter:
        bank.encode(bank.specs[0], [given])
    return counter.get_total_flops()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_clip_takes_what_torch_counts(name: str, folder: Path) -> None:
    spec, n_counted = SPECS[name], counted(SPECS[name], folder, 2.0)
    if isinstance(
        spec.encoder, WhisperEncoder
    ):  # the mel filters, which are no part of the network
        n_counted -= 2 * spec.encoder.n_mels * 201 * 2 * spec.encoder.n_context
    assert clip_flops(spec, 2.0) == pytest.approx(n_counted, rel=1e-3)


def test_whisper_computes_its_whole_window_and_hubert_what_is_heard() -> None:
    assert clip_flops(SPECS["whisper"], 2.0) == clip_flops(SPECS["whisper"])
    assert clip_flops(SPECS["hubert"], 2.0) < clip_flops(SPECS["hubert"]) / 15
    assert clip_flops(SPECS["hubert"], 60.0) == clip_flops(SPECS["hubert"])


def test_what_is_stored_of_the_output_changes_nothing() -> None:
    spec = SPECS["eva video"]
    for update in ({"grid": None}, {"grid": None, "cls_only": True}, {"dtype": "float32"}):
        assert clip_flops(spec.model_copy(update=update)) == clip_flops(spec)


def test_the_papers_encoders_take_what_was_reckoned_by_hand() -> None:
    """8.2 TFLOP for sixteen frames of EVA and 2.1 for one at 448 px; Whisper 1.9, and 0.37 for attention."""
    eva = NAMED_ENCODERS["eva-g"]
    frames = Frames(kind="uniform", n_frames=16)
    video = TokenSpec(
        stream="video", encoder=eva, frames=frames, pixels=Pixels(size_px=224), grid=2
    )
    image = TokenSpec(
        stream="image", encoder=eva, frames=Frames(kind="middle"), pixels=Pixels(size_px=448)
    )
    audio = TokenSpec(
        stream="audio",
        encoder=NAMED_ENCODERS["whisper-large-v3"],
        sample_rate_hz=SAMPLE_RATE_HZ,
    )
    found = [clip_flops(spec) / 1e12 for spec in (video, image, audio)]
    assert found == pytest.approx([8.2, 2.1, 2.27], rel=0.1)
