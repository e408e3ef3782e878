"""Training on a GPU: flash attention against plain attention, the loop, resume, a diagnosis one step late."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cache.errors import DivergedError, StoppedError
from cache.manifest import read_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.generate import generate, load_run
from tests.training import make_corpus, rows_of, tensors_of
from train.config import Preset, configure
from train.llm.attention import Segments, _by_segment, _has_flash, packed_attention
from train.loop import train
from train.presets import demo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

SEGMENTS = Segments(((0, 40, 0, 0), (40, 97, 40, 40), (97, 110, 40, 97), (110, 131, 40, 97)))


@pytest.mark.parametrize("key_heads", [8, 2])
def test_flash_equals_plain_attention(key_heads: int) -> None:
    torch.manual_seed(0)
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    q = torch.randn(1, 8, 131, 64, **shape, requires_grad=True)  # type: ignore[arg-type]
    k = torch.randn(1, key_heads, 131, 64, **shape, requires_grad=True)  # type: ignore[arg-type]
    v = torch.randn(1, key_heads, 131, 64, **shape, requires_grad=True)  # type: ignore[arg-type]
    assert _has_flash(q), "this torch has no variable-length attention"
    weight = torch.randn(1, 131, 8, 64, device="cuda")
    results = []
    for by in ("flash", "segments", "mask"):
        if by == "flash":
            out, _ = packed_attention(torch.nn.Identity(), q, k, v, None, segments=SEGMENTS)
        elif by == "segments":
            out = _by_segment(q, k, v, SEGMENTS, None, 0.0)
        else:
            mask = torch.zeros(131, 131, dtype=torch.bool, device="cuda")
            for start, end, first, stop in SEGMENTS.rows:
                mask[start:end, first:stop] = True
                mask[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
            out = scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, enable_gqa=True
            ).transpose(1, 2)
        gradients = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
        results.append((out.float(), *(g.float() for g in gradients)))
    for result in results[:2]:
        for got, expected in zip(result, results[2], strict=True):
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.05)


def preset_of(*more: str, dtype: str = "bfloat16") -> Preset:
    return configure(
        demo(),
        [f"model.llm.dtype={dtype}", "stages.0.n_steps=6", "stages.1.n_steps=4",
         "stages.0.optim.batch_size=2", "stages.1.optim.batch_size=2",
         "execution.log_every_steps=1", "execution.save_every_steps=2", *more],
    )  # fmt: skip


@pytest.mark.parametrize(
    "execution", ["n_workers=2", "checkpoint_activations=true", "compile=true"]
)
def test_the_loop_runs_and_stays_near_the_cpu(
    tmp_path: Path, specs: dict[str, TokenSpec], execution: str
) -> None:
    manifest_path, store_path = make_corpus(tmp_path, specs)
    manifest, store = read_manifest(manifest_path), TokenStore.open(str(store_path))
    losses = []
    still = ("model.lora.dropout=0", "model.fusion.dropout=0")
    for device, dtype in (("cuda", "bfloat16"), ("cpu", "float32")):
        run = tmp_path / device
        chosen = preset_of(f"execution.{execution}", *still, dtype=dtype)
        train(chosen, manifest, manifest_path, store, run, device=device)
        losses.append([row["loss"] for row in rows_of(run) if "loss" in row])
    assert len(losses[0]) == 10
    for gpu, cpu in zip(*losses, strict=True):
        assert gpu == pytest.approx(cpu, rel=0.1, abs=0.1)
    found = list(
        generate(load_run(tmp_path / "cuda", "cuda"), store, manifest.records[:3], max_new_tokens=4)
    )
    assert len(found) == 3


def test_a_stopped_run_continues(tmp_path: Path, specs: dict[str, TokenSpec]) -> None:
    manifest_path, store_path = make_corpus(tmp_path, specs)
    manifest, store = read_manifest(manifest_path), TokenStore.open(str(store_path))
    deterministic = torch.are_deterministic_algorithms_enabled()

    class Killed(Exception):
        pass

    def kill(stage: str, step: int, n_steps: int, latest: dict[str, float]) -> None:
        if step == 5:
            raise Killed

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(preset_of(), manifest, manifest_path, store, whole, device="cuda")
    with pytest.raises((Killed, StoppedError)):
        train(preset_of(), manifest, manifest_path, store, cut, kill, device="cuda")
    train(preset_of(), manifest, manifest_path, store, cut, device="cuda")
    for stage in ("stage1", "stage2"):
        one, other = (tensors_of(run / stage / "final") for run in (whole, cut))
        for name, tensor in one.items():
            # Sums on a GPU have no fixed order, so near, not equal.
            torch.testing.assert_close(tensor, other[name], rtol=0.05, atol=5e-3)
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_a_loss_that_is_not_a_number_is_found_one_step_late_and_not_saved(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    manifest_path, store_path = make_corpus(tmp_path, specs)
    manifest, store = read_manifest(manifest_path), TokenStore.open(str(store_path))
    wild = preset_of(
        "stages.0.optim.lr=1e30", "stages.0.optim.warmup_steps=0", "stages.0.n_steps=20"
    )
    with pytest.raises(DivergedError, match="the loss became"):
        train(wild, manifest, manifest_path, store, tmp_path / "run", device="cuda")
    for folder in (tmp_path / "run" / "stage1").glob("checkpoint-*"):
        # What was saved came from steps whose losses were looked at.
        assert all(bool(torch.isfinite(t).all()) for t in tensors_of(folder).values())
