"""Parts of benchmarks/extract.py, so that it can be relied on when it is run: no timing here."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cache.manifest import write_manifest
from cache.spec import TokenSpec
from extract.encoders.bank import EncoderBank, EncoderInput
from extract.index import index_folder
from tests.media import write_clip

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
KINDS = ("whisper", "hubert", "eva image", "eva video", "clip", "mae", "videomae")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """The script as a module; its folder is importable, as when it runs."""
    found = importlib.util.spec_from_file_location("benchmark", BENCHMARKS / "extract.py")
    assert found is not None
    assert found.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        module = importlib.util.module_from_spec(found)
        patch.setitem(sys.modules, "benchmark", module)  # dataclasses look their module up
        found.loader.exec_module(module)
        yield module


def _input(spec: TokenSpec) -> EncoderInput:
    rng = np.random.default_rng(0)
    if spec.frames is None:
        return EncoderInput(rng.standard_normal(16_000).astype(np.float32))
    assert spec.pixels is not None
    n, side = spec.frames.n_frames, spec.pixels.size_px
    return EncoderInput(rng.integers(0, 256, (n, side, side, 3), np.uint8), tuple(range(n)))


@pytest.mark.parametrize("kind", KINDS)
def test_made_up_checkpoints_go_through_the_loaders_of_real_ones(
    benchmark: ModuleType, kind: str, tmp_path: Path
) -> None:
    specs = benchmark.of_one_width(32, 2)
    assert tuple(specs) == KINDS
    encoder = specs[kind].encoder
    path = benchmark.write_checkpoint(encoder, tmp_path)
    bank = EncoderBank([specs[kind]], {encoder.kind: path})
    (spec,) = bank.specs
    (tokens,) = bank.encode(spec, [_input(spec)])
    assert isinstance(tokens, np.ndarray)
    assert tokens.shape[1:] == spec.max_shape[1:]
    assert np.isfinite(tokens).all()
    assert tokens.std() > 0


def test_the_smallest_batch_that_is_nearly_the_fastest_is_recommended(
    benchmark: ModuleType,
) -> None:
    speeds = {"a": (1000, {1: 50.0, 2: 99.0, 4: 100.0}), "b": (4000, {1: 10.0, 2: 9.0, 4: 5.0})}
    rows = [
        {"kind": kind, "tokens_per_clip": tokens, "size": size, "clips_per_s": speed}
        for kind, (tokens, sizes) in speeds.items()
        for size, speed in sizes.items()
    ]
    found = benchmark.by_tokens(rows)
    # 2048 tokens: 2 clips of a, 1 of b. 4096: 4 of a, 1 of b, the best of both. 8192: 2 of b.
    assert found["near_best"][1024] == pytest.approx((0.5 * 1.0) ** 0.5)
    assert found["near_best"][2048] == pytest.approx((0.99 * 1.0) ** 0.5)
    assert found["near_best"][4096] == pytest.approx(1.0)
    assert found["near_best"][8192] == pytest.approx((1.0 * 0.9) ** 0.5)
    assert found["recommended"] == 2048


def test_costs_are_what_the_cluster_model_reads(benchmark: ModuleType) -> None:
    alone = {
        "decode_s": {"x/1": 0.5, "x/2": 1.5},
        "streams": {"x/1": ("sound", "sight"), "x/2": ("sound",)},
        "encode_s": {"sound": 2.0, "sight": 3.0},
    }
    stream = {"name": "audio", "bytes_per_clip": 10, "n_arrays": 4, "batch_clips": 2}
    found = {
        "overhead": {
            "alone": alone, "networks": "small", "stores": [stream],
            "timeline": {"start_s": 7.0},
        }
    }  # fmt: skip
    document = benchmark.costs_document(found, {"cpu": "a core"})
    from cluster_model import Costs

    costs = Costs.model_validate_json(document)
    # One core decodes and encodes: 0.5 + 2 + 3 of the first clip, 1.5 + 2 of the second.
    assert costs.encode.samples_s == (5.5, 3.5)
    assert costs.clip_s == 4.5
    assert costs.start_s == 7.0
    with pytest.raises(RuntimeError, match="needs the section overhead"):
        benchmark.costs_document({}, {"cpu": "a core"})


def test_the_parts_of_a_command_add_up_to_its_time(benchmark: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "media").mkdir()
    for seed in range(2):
        write_clip(tmp_path / "media" / f"{seed}.mp4", seed=seed)
    manifest, _ = index_folder(tmp_path / "media", tmp_path / "m.parquet")
    write_manifest(tmp_path / "m.parquet", manifest)
    image = benchmark.of_one_width(32, 2)["clip"]
    weights = {"clip": benchmark.write_checkpoint(image.encoder, tmp_path)}
    subject = benchmark.Subject(tmp_path / "m.parquet", (image,), weights)
    began_s = time.time()
    benchmark.extract_here(subject, subject.specs, manifest.records, tmp_path / "store")
    ran = benchmark.Ran(began_s, time.time(), 0, 0.0, "")
    found = benchmark.timeline(tmp_path / "store", ran)
    shares = found["shares_s"]
    assert found["n_worked"] == 2
    assert sum(shares.values()) == pytest.approx(ran.wall_s)
    assert all(seconds >= 0 for seconds in shares.values())
    assert shares["image clip 32x2"] > 0
    (stored,) = benchmark.stored(tmp_path / "store", subject)
    assert stored["bytes_per_clip"] >= 257 * 32 * 2  # tokens of float16, CLS and 16 x 16 patches
