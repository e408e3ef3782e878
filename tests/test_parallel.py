"""Two processes train as one does: the same samples, gradients, losses, files; they stop together.

On CPUs, with gloo. What a GPU adds (NCCL, flash attention) is tests/test_train_gpu.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import emocache
from cache.errors import StoppedError
from cache.manifest import read_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from tests.training import (
    N_RECORDS,
    checkpoints_of,
    end,
    free_port,
    make_corpus,
    numbers_of,
    rows_of,
    start,
    tensors_of,
    train_arguments,
)
from train.config import configure
from train.loop import train
from train.model import EmotionLlama, build
from train.presets import demo
from train.running import stage as stage_module
from train.running.parallel import Parallel, Processes, fill, whole

SMALL = [
    "stages.0.optim.batch_size=2", "stages.1.optim.batch_size=2", "stages.0.optim.warmup_steps=2",
    "stages.1.optim.warmup_steps=2", "stages.0.n_steps=4", "stages.1.n_steps=4",
    "execution.log_every_steps=1", "execution.save_every_steps=2",
    "execution.validate_every_steps=2",
    # Dropout differs between processes; so would the runs.
    "model.lora.dropout=0", "model.fusion.dropout=0",
]  # fmt: skip
N_STEPS = 8
KINDS: tuple[Parallel, ...] = ("ddp", "fsdp")

Corpus = tuple[Path, Path]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]) -> Corpus:
    """Return the manifest's file and the store."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), specs)


def start_ranks(
    n: int, function: Callable[..., None], *args: Any, folder: Path, logs: str = "log"
) -> list[Any]:
    """Start a function in n processes as a launcher does; output goes to log-0, log-1, ..."""
    port = str(free_port())
    more = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
    return [
        start(
            function,
            *args,
            log=folder / f"{logs}-{rank}",
            env={**more, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(n)
    ]


def logs_of(folder: Path, logs: str = "log") -> str:
    return "\n".join(p.read_text() for p in sorted(folder.glob(f"{logs}-*")))


def run_ranks(n: int, function: Callable[..., None], *args: Any, folder: Path) -> None:
    codes = end(*start_ranks(n, function, *args, folder=folder))
    assert codes == [0] * n, logs_of(folder)


# ---------------------------------------------------------------------------- equal runs


def _train_and_tell(
    corpus: Corpus, run: Path, overrides: Sequence[str], parallel: Parallel, stop_at: int = 0
) -> None:
    """Train, and write down what this rank trained on, and the first step's gradients."""
    rank = int(os.environ["RANK"])
    seen: list[list[list[str]]] = [[]]
    gradients: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    real_move, real_step = stage_module.to_device, torch.optim.AdamW.step
    real_init = stage_module.StageTrainer.__init__

    def init(
        self: Any, preset: Any, stage: Any, model: EmotionLlama, *args: Any, **more: Any
    ) -> None:
        names.update({id(p): n for n, p in model.named_parameters()})
        real_init(self, preset, stage, model, *args, **more)

    def move(batch: Any, device: torch.device) -> Any:
        seen[-1] += [list(pair) for pair in zip(batch["uids"], batch["tasks"], strict=True)]
        return real_move(batch, device)

    def step(self: Any, *args: Any, **more: Any) -> Any:
        if len(seen) == 1:
            for group in self.param_groups:
                for p in group["params"]:
                    gradients[names[id(p)]] = whole(p.grad).clone()
        seen.append([])
        return real_step(self, *args, **more)

    stage_module.to_device = move
    stage_module.StageTrainer.__init__ = init  # type: ignore[method-assign]
    torch.optim.AdamW.step = step  # type: ignore[method-assign]
    manifest, store = corpus

    def on_step(stage: str, at: int, n: int, latest: dict[str, float]) -> None:
        if at == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with suppress(StoppedError):
        train(
            configure(demo(), list(overrides)), read_manifest(manifest), manifest,
            TokenStore.open(store), run, parallel=parallel, on_step=on_step,
        )  # fmt: skip
    told = run.with_name(f"{run.name}-told-{rank}")
    told.with_suffix(".json").write_text(json.dumps(seen[:-1]))
    if rank == 0:
        torch.save(gradients, told.with_suffix(".pt"))


def told_of(run: Path, rank: int) -> list[list[tuple[str, str]]]:
    """Return (uid, task) of what a rank trained on at each step."""
    found = json.loads(run.with_name(f"{run.name}-told-{rank}.json").read_text())
    return [[tuple(pair) for pair in step] for step in found]


def gradients_of(run: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(run.with_name(f"{run.name}-told-0.pt"))
    return found


def overrides_of(accumulate: int) -> list[str]:
    stages = (0, 1)
    return [
        *SMALL,
        *(f"stages.{i}.optim.accumulate={accumulate}" for i in stages),
        *(f"stages.{i}.optim.grad_clip=0.7" for i in stages),
    ]


@pytest.fixture(scope="module")
def alone(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return runs of one process, by the packs in a step."""
    folder = tmp_path_factory.mktemp("alone")
    for n in (2, 4):
        run_ranks(
            1, _train_and_tell, corpus, folder / f"run{n}", overrides_of(n), "ddp", folder=folder
        )
    return {n: folder / f"run{n}" for n in (2, 4)}


def assert_close_runs(
    run: Path, expected: Path, stages: Sequence[str] = ("stage1", "stage2")
) -> None:
    """Losses, validation and weights agree as far as sums in another order can."""
    ours, theirs = numbers_of(run), numbers_of(expected)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.pop("stage"), mine.keys()) == (other.pop("stage"), other.keys())
        assert mine == pytest.approx(other, rel=2e-4)
    for stage in stages:
        found, wanted = (tensors_of(root / stage / "final") for root in (run, expected))
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert found[name].shape == tensor.shape
            moved = float((found[name] - tensor).norm() / tensor.norm().clamp(min=1e-3))
            assert moved < 5e-3, (stage, name, moved)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parallel", KINDS)
def test_two_processes_train_as_one_that_accumulates(
    corpus: Corpus, alone: dict[int, Path], tmp_path: Path, parallel: Parallel, accumulate: int
) -> None:
    run, expected = tmp_path / "run", alone[2 * accumulate]
    run_ranks(2, _train_and_tell, corpus, run, overrides_of(accumulate), parallel, folder=tmp_path)
    for mine, other, both in zip(
        told_of(run, 0), told_of(run, 1), told_of(expected, 0), strict=True
    ):
        assert len(mine) == len(other) == 2 * accumulate
        # Pack by pack in turns.
        packs = [(mine, other)[i % 2][i // 2 * 2 :][:2] for i in range(2 * accumulate)]
        assert [pair for pack in packs for pair in pack] == both
    ours, theirs = gradients_of(run), gradients_of(expected)
    assert ours.keys() == theirs.keys()
    n_moving = 0
    for name, gradient in theirs.items():
        n_moving += bool(gradient.any())
        difference = float((ours[name] - gradient).norm())
        assert difference <= 2e-6 * float(gradient.norm()) + 1e-9, (name, difference)
    assert n_moving > 20
    assert_close_runs(run, expected)


@pytest.mark.parametrize("first", ["fsdp of two", pytest.param("one", marks=pytest.mark.slow)])
def test_a_checkpoint_goes_on_with_another_number_of_processes(
    corpus: Corpus, alone: dict[int, Path], tmp_path: Path, first: str
) -> None:
    """At the middle of stage 1: weights, moments, schedule and plan go over."""
    run = tmp_path / "run"
    ways = [(2, "fsdp", 1), (1, "ddp", 2)]
    (n, parallel, accumulate), (m, other, more) = ways if first != "one" else ways[::-1]
    args = (corpus, run, overrides_of(accumulate), parallel, 3)
    run_ranks(n, _train_and_tell, *args, folder=tmp_path)
    assert checkpoints_of(run / "stage1") == [2, 3]
    saved = run / "stage1" / "checkpoint-3"
    wanted = tensors_of(alone[2] / "stage1" / "checkpoint-4")
    assert {k: v.shape for k, v in tensors_of(saved).items()} == {
        k: v.shape for k, v in wanted.items()
    }, "a checkpoint holds whole tensors"
    if accumulate != more:
        _take_over(run, accumulate, more)
    run_ranks(m, _train_and_tell, corpus, run, overrides_of(more), other, folder=tmp_path)
    assert_close_runs(run, alone[2])


def _take_over(run: Path, accumulate: int, more: int) -> None:
    """Write other packs per process into the run's settings: `continued` compares them."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    for stage in config["stages"]:
        assert stage["optim"]["accumulate"] == accumulate
        stage["optim"]["accumulate"] = more
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("parallel", KINDS)
def test_half_precision_weights_of_the_language_model_train_too(
    corpus: Corpus, tmp_path: Path, parallel: Parallel
) -> None:
    """Frozen bfloat16 beside trained float32, in one sharded block; recomputed activations."""
    overrides = [
        *SMALL, "model.llm.dtype=bfloat16", "execution.checkpoint_activations=true",
        "stages.0.n_steps=2", "stages.1.n_steps=2",
    ]  # fmt: skip
    run_ranks(2, _train_and_tell, corpus, tmp_path / "two", overrides, parallel, folder=tmp_path)
    once = [*overrides, *(f"stages.{i}.optim.accumulate=2" for i in (0, 1))]
    run_ranks(1, _train_and_tell, corpus, tmp_path / "one", once, parallel, folder=tmp_path)
    for mine, other in zip(numbers_of(tmp_path / "two"), numbers_of(tmp_path / "one"), strict=True):
        name = "loss" if "loss" in other else "val_loss"
        assert mine[name] == pytest.approx(other[name], rel=0.02)
    final = tensors_of(tmp_path / "two" / "stage2" / "final")
    assert {t.dtype for t in final.values()} == {torch.float32}
    ours, theirs = gradients_of(tmp_path / "two"), gradients_of(tmp_path / "one")
    assert {g.dtype for g in ours.values()} == {torch.float32}
    for name, gradient in theirs.items():
        difference = float((ours[name] - gradient).norm())
        assert difference <= 0.05 * float(gradient.norm()) + 1e-9, name


# ---------------------------------------------------------------------------- they stop together


def _command_line(arguments: list[str], parallel: Parallel) -> None:
    sys.exit(emocache.main([*arguments, "--device", "cpu", "--parallel", parallel]))


@pytest.mark.fault("training: SIGTERM to one process of two")
@pytest.mark.parametrize(("parallel", "told"), [("ddp", 0), ("ddp", 1), ("fsdp", 1)])
def test_a_signal_to_one_process_stops_both_behind_the_same_step(
    corpus: Corpus, tmp_path: Path, parallel: Parallel, told: int
) -> None:
    run = tmp_path / "run"
    arguments = train_arguments(*corpus, run, [
        *SMALL, "stages.0.n_steps=500", "execution.save_every_steps=1000",
        "execution.validate_every_steps=null",
    ])  # fmt: skip
    ranks = start_ranks(2, _command_line, arguments, parallel, folder=tmp_path)
    while len(rows_of(run)) < 3 and all(rank.exitcode is None for rank in ranks):
        time.sleep(0.002)
    os.kill(ranks[told].pid, signal.SIGTERM)
    assert end(*ranks) == [130, 130], logs_of(tmp_path)
    last = rows_of(run)[-1]
    assert checkpoints_of(run / "stage1") == [last["step"]]
    assert 3 <= last["step"] < 500
    stops = [(tmp_path / f"log-{rank}").read_text() for rank in (0, 1)]
    assert all(f"stopped at step {last['step']} of 500" in " ".join(x.split()) for x in stops)
    assert not any("Traceback" in x for x in stops)


def _train_with_a_nan(corpus: Corpus, run: Path, parallel: Parallel) -> None:
    """One of rank 1's two answers at step 3 is not a number."""
    rank, n = int(os.environ["RANK"]), 0
    real = EmotionLlama.forward

    def forward(self: EmotionLlama, *args: Any, **more: Any) -> dict[str, Tensor]:
        nonlocal n
        n += self.training
        found = real(self, *args, **more)
        if self.training and n == 3 and rank == 1:
            found["loss_sum"] = found["loss_sum"] * math.nan
            found["answer_loss"][1] = math.nan
        return found

    EmotionLlama.forward = forward  # type: ignore[method-assign]
    _command_line(train_arguments(*corpus, run, SMALL), parallel)


@pytest.mark.fault("training: NaN in one process of two")
@pytest.mark.parametrize("parallel", KINDS)
def test_a_loss_that_is_not_a_number_in_one_process_stops_both_and_names_the_clip(
    corpus: Corpus, tmp_path: Path, parallel: Parallel
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(2, _train_with_a_nan, corpus, run, parallel, folder=tmp_path)
    codes = end(*ranks, timeout_s=60)
    assert codes == [2, 2], logs_of(tmp_path)
    innocent, guilty = (
        json.loads((run / "stage1" / f"diverged-3-process-{rank}.json").read_text())["answers"]
        for rank in (0, 1)
    )
    assert all(math.isfinite(answer["loss"]) for answer in innocent)
    assert [answer["loss"] for answer in guilty][1] == "nan"
    said = [" ".join((tmp_path / f"log-{rank}").read_text().split()) for rank in (0, 1)]
    assert not any("Traceback" in text for text in said)
    assert f"of 1 of 2 answers, first: {guilty[1]['uid']} (emotion)" in said[1]
    assert "of no one answer" in said[0]
    assert all("The last checkpoint, checkpoint-2, is kept" in text for text in said)
    assert checkpoints_of(run / "stage1") == [2]


@pytest.mark.fault("training: unreadable clip in one process of two")
def test_a_clip_that_one_process_cannot_read_ends_both_without_waiting(
    specs: dict[str, TokenSpec], tmp_path: Path
) -> None:
    corpus = make_corpus(tmp_path, specs)
    (shard,) = (
        path
        for path in (corpus[1]).rglob("*")
        if path.is_file() and path.stat().st_size > 100_000 and specs["image"].spec_id in str(path)
    )
    data = bytearray(shard.read_bytes())
    data[len(data) * 4 // N_RECORDS + 5000] ^= 1  # within some clip that is trained on
    shard.write_bytes(data)
    arguments = train_arguments(*corpus, tmp_path / "run", [*SMALL, "stages.0.n_steps=30"])
    started = time.monotonic()
    codes = end(*start_ranks(2, _command_line, arguments, "ddp", folder=tmp_path), timeout_s=60)
    assert None not in codes, logs_of(tmp_path)
    assert time.monotonic() - started < 30
    assert 2 in codes
    assert 0 not in codes
    shown = " ".join(logs_of(tmp_path).split())
    assert re.search(r"emocache: made/\d: damaged image tokens.*CRC-32C differs", shown), shown


# ---------------------------------------------------------------------------- the parts


def _agree(parallel: Parallel, said: Path) -> None:
    """Check in each of two processes what they agree on, and tensors that they share."""
    processes = Processes("cpu", parallel)
    rank = processes.rank
    assert (processes.n, processes.is_first) == (2, rank == 0)
    assert processes.any_of(False, rank == 0, rank == 1, True) == (False, True, True, True)
    assert processes.sum_of(torch.tensor([1.0, rank], dtype=torch.float64)).tolist() == [2.0, 1.0]
    assert processes.same({"from": rank}) == {"from": 0}
    preset = demo()
    model, _ = build(preset)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    processes.wrap(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    n_parts = sum(hasattr(p, "full_tensor") for p in after.values())
    assert n_parts == (len(after) if parallel == "fsdp" else 0)
    for name, parameter in after.items():
        assert torch.equal(whole(parameter), before[name]), name
        value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        fill(parameter, value)
        assert torch.equal(whole(parameter), value), name
        here = parameter.to_local() if n_parts else parameter  # type: ignore[operator]
        assert here.numel() <= value.numel()
    if n_parts:
        local = sum(p.to_local().numel() for p in after.values())  # type: ignore[operator]
        assert local < 0.51 * sum(p.numel() for p in before.values())
    processes.wait()
    processes.leave()
    said.with_name(f"{said.name}-{rank}").write_text(f"{n_parts}")


@pytest.mark.parametrize("parallel", KINDS)
def test_processes_agree_and_share_tensors(parallel: Parallel, tmp_path: Path) -> None:
    run_ranks(2, _agree, parallel, tmp_path / "said", folder=tmp_path)
    assert (tmp_path / "said-0").read_text() == (tmp_path / "said-1").read_text()


def test_one_process_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = Processes("cpu")
    assert (alone.n, alone.rank, alone.is_first) == (1, 0, True)
    assert alone.any_of(True, False) == (True, False)
    assert alone.sum_of(torch.tensor(3.0)).item() == 3.0
    assert alone.same("mine") == "mine"
    alone.wait()
    alone.leave()
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    fill(parameter, torch.tensor([1.0, 2.0]))
    assert whole(parameter).tolist() == [1.0, 2.0]
    assert parameter.dtype == torch.bfloat16
