"""Made-up checkpoints: of any kind and size, through the loaders of real ones, the same for a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cache.encoders import (
    ClipEncoder,
    Encoder,
    EvaEncoder,
    HubertEncoder,
    MaeEncoder,
    VideoMaeEncoder,
    WhisperEncoder,
)
from cache.errors import CheckpointError
from cache.recipes import token_specs
from cache.spec import TokenSpec
from extract.encoders.bank import EncoderBank
from extract.tiny.made_up import checkpoint_path, of_one_width, write_checkpoint

ODD: dict[str, Encoder] = {
    "whisper, 128 mel bins, a short window": WhisperEncoder(
        width=24, n_layers=3, n_heads=3, n_mels=128, n_context=100, layer=1, padded=True
    ),
    "hubert as base, not normalised": HubertEncoder(
        width=32, n_layers=2, n_heads=4, mlp_width=40, norm_first=False, normalize=False
    ),
    "eva with its own norm": EvaEncoder(
        width=36, depth=3, n_heads=3, mlp_width=50, norm="checkpoint"
    ),
    "clip with gelu": ClipEncoder(
        width=32, depth=2, n_heads=4, mlp_width=48, patch_px=28, activation="gelu"
    ),
    "mae without norm": MaeEncoder(width=32, depth=2, n_heads=4, mlp_width=48, norm="none"),
    "videomae of 8 frames": VideoMaeEncoder(
        width=32, depth=2, n_heads=4, mlp_width=48, patch_px=14, n_frames=8
    ),
}


def spec_of(encoder: Encoder) -> TokenSpec:
    """Return some spec with this encoder."""
    like = {spec.encoder.kind: spec for spec in of_one_width(32, 4).values()}[encoder.kind]
    frames = like.frames
    if isinstance(encoder, VideoMaeEncoder) and frames is not None:
        frames = frames.model_copy(update={"n_frames": encoder.n_frames})
    return TokenSpec.model_validate(
        like.model_copy(update={"encoder": encoder, "frames": frames}).model_dump()
    )


@pytest.mark.parametrize("name", ODD)
def test_any_size_goes_through_the_loader_of_real_checkpoints(name: str, tmp_path: Path) -> None:
    spec = spec_of(ODD[name])
    bank = EncoderBank([spec], {spec.encoder.kind: write_checkpoint(spec.encoder, tmp_path)})
    (resolved,) = bank.specs
    answer = np.array(bank.probe(resolved))
    assert np.isfinite(answer).all()
    assert answer.std() > 0


@pytest.mark.parametrize("kind", ["whisper", "hubert", "eva image", "clip", "mae", "videomae"])
def test_seeds_decide_the_weights(kind: str, tmp_path: Path) -> None:
    spec = of_one_width(32, 4)[kind]
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    paths = [
        write_checkpoint(spec.encoder, tmp_path / folder, seed=seed)
        for folder, seed in (("a", 0), ("b", 0), ("a", 1))
    ]
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random state is kept"
    first, again, other = (
        EncoderBank([spec], {spec.encoder.kind: path}).specs[0].encoder.weights_sha256
        for path in paths
    )
    assert first == again != other
    assert paths[0].name == paths[1].name != paths[2].name


def test_a_checkpoint_is_written_once_and_named_by_what_it_holds(tmp_path: Path) -> None:
    eva = ODD["eva with its own norm"]
    path = write_checkpoint(eva, tmp_path)
    stamp = path.stat().st_mtime_ns
    used_otherwise = eva.model_copy(update={"norm": "none", "weights_sha256": "ab" * 32})
    assert write_checkpoint(used_otherwise, tmp_path) == path
    assert path.stat().st_mtime_ns == stamp
    wider = eva.model_copy(update={"mlp_width": 60})
    assert checkpoint_path(wider, tmp_path) != path
    assert [found.name for found in tmp_path.iterdir()] == [path.name], "nothing else is left"


def test_networks_of_one_size_and_several_names_can_differ(tmp_path: Path) -> None:
    """As `hubert-large` and `chinese-hubert-large` do: equal specs until their weights are known."""
    (named,) = token_specs("hubert-large")
    small = named.model_copy(update={"encoder": of_one_width(32, 4)["hubert"].encoder})
    paths = {name: write_checkpoint(small.encoder, tmp_path, seed=n) for n, name in enumerate("ab")}
    bank = EncoderBank([small, small], paths, names=["a", "b"])
    assert len(bank.specs) == 2


def test_hubert_folders_say_whether_they_normalise(tmp_path: Path) -> None:
    spec = spec_of(ODD["hubert as base, not normalised"])
    path = write_checkpoint(spec.encoder, tmp_path)
    other = spec.encoder.model_copy(update={"normalize": True})
    with pytest.raises(CheckpointError, match="do_normalize is false"):
        EncoderBank([spec.model_copy(update={"encoder": other})], {"hubert": path})
