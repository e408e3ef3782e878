"""Faults in the middle of training, each caused on purpose: kills, signals, full and bad disks, NaN.

The invariant each time: what stands under a checkpoint's name is whole, the newest never goes back,
and the same command goes on to the very weights and numbers of a run that nothing happened to.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import emocache
from cache.clip import file_sha256
from cache.commit import ClipTokens
from cache.errors import CheckpointError, CorruptTokensError, DivergedError
from cache.manifest import read_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from tests.conftest import key_of, make_clip
from tests.training import (
    before_each_step,
    checkpoints_of,
    command_line,
    dying_command_line,
    end,
    make_corpus,
    numbers_of,
    rows_of,
    start,
    tensors_of,
    train_arguments,
)
from train.checkpoint import STATE_FILE, TrainState, last_checkpoint
from train.config import configure
from train.loop import TrainResult, train
from train.model import EmotionLlama
from train.presets import demo
from train.running.run import read_run

STAGES = ("stage1", "stage2")
SMALL = [
    "stages.0.optim.batch_size=2", "stages.1.optim.batch_size=2", "stages.0.optim.warmup_steps=2",
    "stages.1.optim.warmup_steps=2", "execution.log_every_steps=1",
]  # fmt: skip
LONG = [
    *SMALL, "stages.0.n_steps=12", "stages.1.n_steps=12", "execution.save_every_steps=2",
    "execution.validate_every_steps=3",
]  # fmt: skip
SHORT = [
    *SMALL, "stages.0.n_steps=2", "stages.1.n_steps=2", "execution.save_every_steps=1",
    "execution.validate_every_steps=1",
]  # fmt: skip
N_ROUNDS = 20

Corpus = tuple[Path, Path]
Survived = Callable[..., None]

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Survived:
    """Count faults that were caused, for the table at the end of the run."""

    def count(kind: str, n: int = 1) -> None:
        record_property("faults", (f"training: {kind}", n))

    return count


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]) -> Corpus:
    """Return the manifest's file and the store."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), specs)


def calm_run(corpus: Corpus, run: Path, overrides: Sequence[str]) -> Path:
    process = start(command_line, train_arguments(*corpus, run, overrides), log=run.parent / "log")
    assert end(process) == [0], (run.parent / "log").read_text()
    return run


@pytest.fixture(scope="module")
def calm(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that nothing happens to."""
    return calm_run(corpus, tmp_path_factory.mktemp("calm") / "run", LONG)


def train_here(corpus: Corpus, run: Path, overrides: Sequence[str], **more: Any) -> TrainResult:
    manifest, store = corpus
    chosen = configure(demo(), list(overrides))
    return train(chosen, read_manifest(manifest), manifest, TokenStore.open(store), run, **more)


def assert_whole(run: Path) -> dict[str, int]:
    """Check every checkpoint's digests; return the newest step of each stage that has one."""
    newest = {}
    for stage in STAGES:
        for step in checkpoints_of(run / stage):
            folder = run / stage / f"checkpoint-{step}"
            state = TrainState.model_validate_json((folder / STATE_FILE).read_bytes())
            assert state.step == step
            assert len(state.files) == 4
            assert state.files == {name: file_sha256(folder / name) for name in state.files}
        last = last_checkpoint(run / stage)
        if last is not None:
            newest[stage] = last[1].step
    return newest


def assert_equal_runs(run: Path, expected: Path) -> None:
    """The same weights, of `final`, of `best` and of the last checkpoint, and the same numbers."""
    assert numbers_of(run) == numbers_of(expected)
    for stage in STAGES:
        ours, theirs = (_folders_that_stay(root / stage) for root in (run, expected))
        assert ours.keys() == theirs.keys()
        for name, folder in theirs.items():
            found, wanted = tensors_of(ours[name]), tensors_of(folder)
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], wanted[key]) for key in wanted), (stage, name)


def _folders_that_stay(stage: Path) -> dict[str, Path]:
    """Return the folders of a finished stage; of checkpoints the last, since a signal makes more."""
    last = f"checkpoint-{checkpoints_of(stage)[-1]}"
    folders = [p for p in stage.iterdir() if p.is_dir() and p.name[0] != "."]
    return {p.name: p for p in folders if p.name == last or not p.name.startswith("checkpoint-")}


def is_finished(run: Path) -> bool:
    return (run / "run.json").is_file() and read_run(run)[1].finished == STAGES


# ---------------------------------------------------------------------------- kills and signals


@pytest.mark.slow
def test_killed_at_random_moments_a_run_loses_nothing(
    corpus: Corpus, calm: Path, tmp_path: Path, survived: Survived
) -> None:
    """SIGKILL and SIGTERM or SIGUSR1 in turns; a run that finishes is compared, and another begun."""
    rng = random.Random(20)
    ways = ["kill -9 at any time", "SIGTERM", "kill -9 while it writes", "SIGUSR1"]
    n_faults = n_runs = 0
    log = tmp_path / "log"
    run, newest = tmp_path / "run0", {}  # type: tuple[Path, dict[str, int]]
    while n_faults < N_ROUNDS or not is_finished(run):
        way = ways[n_faults % 4] if n_faults < N_ROUNDS else "nothing"
        log.write_text("")
        arguments = train_arguments(*corpus, run, LONG)
        if way == "kill -9 while it writes":
            nth = rng.randrange(200)
            process = start(dying_command_line, arguments, run, nth, log=log)
        else:
            process = start(command_line, arguments, log=log)
        if way == "kill -9 at any time":
            time.sleep(rng.uniform(0.3, 1.2))
            process.kill()
        elif way.startswith("SIG"):
            before = _stamp(run)
            while _stamp(run) == before and process.exitcode is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.2))
            with suppress(ProcessLookupError):  # it may have finished meanwhile
                os.kill(process.pid or 0, getattr(signal, way))
        (code,) = end(process)
        now = assert_whole(run)
        assert all(now.get(stage, 0) >= step for stage, step in newest.items()), (way, newest, now)
        newest = now
        if code == 0:
            assert is_finished(run)
        elif way.startswith("SIG"):
            assert code == 130, log.read_text()
            assert "the state is saved. Run the same command again to continue." in log.read_text()
            assert "Traceback" not in log.read_text()
            last = rows_of(run)[-1]
            assert newest[last["stage"]] == last["step"]
        else:
            assert code == -signal.SIGKILL, log.read_text()
        if code != 0:
            survived(way)
            n_faults += 1
        if is_finished(run):
            assert_equal_runs(run, calm)
            n_runs += 1
            if n_faults < N_ROUNDS:
                run, newest = tmp_path / f"run{n_runs}", {}
    assert n_runs


def _stamp(run: Path) -> tuple[int, int]:
    """Return what changes once this process, which then listens to signals, writes numbers."""
    try:
        found = (run / "metrics.jsonl").stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_ino, found.st_size


def _copy_before_each_step(arguments: list[str], run: Path, copies: Path) -> None:
    """Keep what a kill before each step that a training takes in its folder would leave."""

    def keep(source: str, target: str) -> None:
        appended = Path(source).name == "metrics.jsonl" or "events.out" in source
        (shutil.copyfile if appended else os.link)(source, target)

    def act(number: int) -> None:
        if run.exists():
            shutil.copytree(run, copies / f"{number:04d}", copy_function=keep)

    before_each_step(run, act)
    command_line(arguments)


def _train_all(corpus: Corpus, runs: list[Path], overrides: list[str]) -> None:
    refused = [r for r in runs if emocache.main(train_arguments(*corpus, r, overrides))]
    sys.exit(f"refused: {[run.name for run in refused]}" if refused else 0)


@pytest.fixture(scope="module")
def copies(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """Return a calm run, and what a kill before each of its steps would have left."""
    root = tmp_path_factory.mktemp("copies")
    run, folder = root / "run", root / "copies"
    folder.mkdir()
    arguments = train_arguments(*corpus, run, SHORT)
    (code,) = end(start(_copy_before_each_step, arguments, run, folder, log=root / "log"))
    assert code == 0, (root / "log").read_text()
    return run, sorted(folder.iterdir())


@pytest.mark.slow
def test_a_kill_before_any_step_in_the_files_loses_nothing(
    corpus: Corpus, copies: tuple[Path, list[Path]], tmp_path: Path, survived: Survived
) -> None:
    run, left = copies
    assert len(left) > 150
    assert any(list(c.glob("stage1/.checkpoint-2.*.partial/optimizer.safetensors")) for c in left)
    newest = [assert_whole(copy) for copy in left]
    for before, after in pairwise(newest):
        assert all(after[stage] >= step for stage, step in before.items())
    assert newest[-1] == {"stage1": 2, "stage2": 2}
    survived("kill -9 before each step in the files", len(left))
    # Continuing is checked for some, in one process.
    some = [copy for copy in left if (copy / "run.json").is_file()][4::13]
    again = [shutil.copytree(copy, tmp_path / copy.name) for copy in some]
    (code,) = end(start(_train_all, corpus, again, SHORT, log=tmp_path / "log2"), timeout_s=600)
    assert code == 0, (tmp_path / "log2").read_text()
    for copy in again:
        assert_equal_runs(copy, run)
        for stage in STAGES:
            leftovers = [p.name for p in (copy / stage).glob(".*.partial")]
            assert not leftovers, f"{copy.name}: left for ever"


def test_a_run_that_was_killed_at_its_very_start_begins_again(
    corpus: Corpus, copies: tuple[Path, list[Path]], tmp_path: Path, survived: Survived
) -> None:
    """Before run.json, its first file that counts, was there."""
    run, left = copies
    none_yet = [copy for copy in left if not (copy / "run.json").is_file()]
    begun = [shutil.copytree(copy, tmp_path / copy.name) for copy in none_yet]
    assert begun
    (code,) = end(start(_train_all, corpus, begun, SHORT, log=tmp_path / "log"))
    assert code == 0, (tmp_path / "log").read_text()
    for copy in begun:
        assert_equal_runs(copy, run)
    survived("kill -9 before a run has its first files", len(begun))


def test_the_card_has_its_numbers_though_a_kill_came_before_it(
    corpus: Corpus, copies: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """Behind the last checkpoint of stage 1 no step is left, whose numbers the card could show."""
    run, left = copies
    at_end = next(c for c in left if (c / "stage1/checkpoint-2/state.json").is_file())
    shutil.copytree(at_end, tmp_path / "run")
    (code,) = end(start(_train_all, corpus, [tmp_path / "run"], SHORT, log=tmp_path / "log"))
    assert code == 0, (tmp_path / "log").read_text()
    cards = [(root / "stage1/final/README.md").read_text() for root in (tmp_path / "run", run)]
    assert cards[0] == cards[1]


# ---------------------------------------------------------------------------- disks


def _on_a_small_disk(arguments: list[str], run: Path, size: str, outside: Path) -> None:
    """Train on a tmpfs that no one else sees, then again on a larger one; keep copies of both."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        sys.exit(77)
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run)]
    for command in (["mount", "--make-rprivate", "/"], mount):
        if subprocess.run(command, capture_output=True).returncode:
            sys.exit(77)
    codes = [emocache.main(arguments)]
    shutil.copytree(run, outside / "full")
    subprocess.run(["mount", "-o", "remount,size=200m", str(run)], check=True)
    codes.append(emocache.main(arguments))
    shutil.copytree(run, outside / "again")
    (outside / "codes").write_text(json.dumps(codes))


@pytest.mark.parametrize("size", ["4300k", "5900k"], ids=["first", "later"])
def test_a_full_disk_keeps_the_checkpoint_before_and_says_so_in_one_line(
    corpus: Corpus, calm: Path, tmp_path: Path, size: str, survived: Survived
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(
        _on_a_small_disk, train_arguments(*corpus, run, LONG), run, size, tmp_path, log=log
    )
    (code,) = end(process)
    if code == 77:
        pytest.skip("this machine does not allow mounting a tmpfs (needs root)")
    shown = log.read_text()
    assert code == 0, shown
    assert json.loads((tmp_path / "codes").read_text()) == [2, 0], shown
    assert "Traceback" not in shown
    (line,) = [x for x in shown.splitlines() if "No space left on device" in x]
    assert line.startswith("emocache: ")
    saved = assert_whole(tmp_path / "full")
    assert saved, "an earlier checkpoint stands"
    assert not list((tmp_path / "full").rglob(".checkpoint-*.partial"))
    assert_equal_runs(tmp_path / "again", calm)
    survived("full disk during a checkpoint")


class Enough(Exception):
    """Ends a training behind a step."""


def stopped_at(stage: str, step: int) -> Callable[..., None]:
    def on_step(at_stage: str, at: int, n_steps: int, latest: dict[str, float]) -> None:
        if (at_stage, at) == (stage, step):
            raise Enough

    return on_step


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.safetensors",
        "fusion_adapters.safetensors",
        "lora/adapter_model.safetensors",
        "lora/adapter_config.json",
    ],
)
def test_a_flipped_byte_in_the_newest_checkpoint_is_refused_by_name(
    corpus: Corpus, calm: Path, tmp_path: Path, name: str, survived: Survived
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Enough):
        train_here(corpus, run, LONG, on_step=stopped_at("stage1", 7))
    assert checkpoints_of(run / "stage1") == [4, 6]
    damaged = run / "stage1" / "checkpoint-6" / name
    data = bytearray(damaged.read_bytes())
    data[len(data) * 2 // 3] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"checkpoint-6: damaged, {name} .*Delete this fol"):
        train_here(corpus, run, LONG)
    shutil.rmtree(damaged.parents[name.count("/")])  # the cure
    assert train_here(corpus, run, LONG).n_steps == 8 + 12
    assert_equal_runs(run, calm)
    survived(f"flipped byte in {name}")


@pytest.mark.parametrize("left", [0, 0.5])
def test_a_damaged_state_is_refused_by_name(
    corpus: Corpus, tmp_path: Path, left: float, survived: Survived
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Enough):
        train_here(corpus, run, LONG, on_step=stopped_at("stage1", 3))
    path = run / "stage1" / "checkpoint-2" / STATE_FILE
    data = path.read_bytes()
    path.write_bytes(data[: int(left * len(data))])
    with pytest.raises(CheckpointError, match=r"checkpoint-2: damaged .*Delete this folder") as got:
        train_here(corpus, run, LONG)
    assert "\n" not in str(got.value)
    survived("truncated state.json")


# ---------------------------------------------------------------------------- NaN


def poisoned_at(monkeypatch: pytest.MonkeyPatch, uid_calls: int, where: str) -> None:
    """Make the n-th forward pass of a training, or its gradients, not a number."""
    real, n = EmotionLlama.forward, 0

    def forward(self: EmotionLlama, *args: Any, **more: Any) -> dict[str, torch.Tensor]:
        nonlocal n
        found = real(self, *args, **more)
        if self.training:
            n += 1
        if self.training and n == uid_calls:
            if where == "loss":
                found["loss_sum"] = found["loss_sum"] * math.nan
                found["answer_loss"][1:] = math.nan
            else:
                found["loss_sum"].register_hook(lambda gradient: gradient * math.nan)
        return found

    monkeypatch.setattr(EmotionLlama, "forward", forward)


def test_a_loss_that_is_not_a_number_stops_before_it_reaches_the_weights(
    corpus: Corpus,
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    survived: Survived,
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        poisoned_at(patched, 7, "loss")
        with pytest.raises(DivergedError, match=r"loss became nan at step 7 of stage1") as got:
            train_here(corpus, run, LONG)
    assert "\n" not in str(got.value)
    assert "of 1 of 2 answers, first: made/" in str(got.value)
    assert "checkpoint-6" in str(got.value)
    assert "Lower the learning rate (stages.N.optim.lr, now" in str(got.value)
    diagnosis = json.loads((run / "stage1" / "diverged-7-process-0.json").read_text())
    assert [a["loss"] for a in diagnosis["answers"]][1] == "nan"
    assert all(a["uid"] in str(got.value) for a in diagnosis["answers"][1:])
    assert assert_whole(run) == {"stage1": 6}
    assert [row["step"] for row in rows_of(run)][-1] == 6
    assert train_here(corpus, run, LONG).n_steps == 6 + 12, "the same settings go on from there"
    assert_equal_runs(run, calm)
    survived("loss that is not a number")


def test_gradients_that_are_not_numbers_never_reach_a_checkpoint(
    corpus: Corpus,
    calm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    survived: Survived,
) -> None:
    """The loss of that step is fine; that of the next is not, but a checkpoint lies between."""
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        poisoned_at(patched, 6, "gradient")
        with pytest.raises(DivergedError):
            train_here(corpus, run, LONG)
    newest = run / "stage1" / f"checkpoint-{assert_whole(run)['stage1']}"
    assert all(t.isfinite().all() for t in tensors_of(newest).values()), newest.name
    train_here(corpus, run, LONG)
    assert_equal_runs(run, calm)
    survived("gradients that are not numbers")


def test_an_absurd_learning_rate_ends_in_one_line(
    corpus: Corpus, tmp_path: Path, survived: Survived
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    wild = [*LONG, "stages.0.optim.lr=1e30", "execution.save_every_steps=1"]
    (code,) = end(start(command_line, train_arguments(*corpus, run, wild), log=log))
    shown = log.read_text()
    assert code == 2, shown
    assert "Traceback" not in shown
    (line,) = [x for x in shown.splitlines() if "the loss became" in x]
    assert line.startswith("emocache: ")
    (diagnosis,) = (run / "stage1").glob("diverged-*-process-0.json")
    assert all(a["uid"].startswith("made/") for a in json.loads(diagnosis.read_text())["answers"])
    assert diagnosis.name in line
    assert f"checkpoint-{assert_whole(run)['stage1']}" in line
    survived("absurd learning rate")


@pytest.mark.parametrize(
    ("stream", "token"),
    [("audio", 2), ("video", 2), ("image", 7), ("image", 0)],
    ids=["audio", "video", "image", "image CLS"],
)
@pytest.mark.parametrize("n_workers", [0, 2])
def test_tokens_that_are_not_numbers_are_named(
    specs: dict[str, TokenSpec],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stream: str,
    token: int,
    n_workers: int,
    survived: Survived,
) -> None:
    def bad(spec: TokenSpec, name: str, n_audio: int = 120) -> ClipTokens:
        made = make_clip(spec, name, n_audio)
        if spec.stream == stream and made.key == key_of("clip4"):
            assert isinstance(made.tokens, np.ndarray)
            made.tokens[..., token, 5] = math.nan  # of a video, in every frame
        return made

    with monkeypatch.context() as patched:
        patched.setattr("tests.training.make_clip", bad)
        patched.setattr("cache.writer._check_unit", lambda *_: None)  # as another writer may
        corpus = make_corpus(tmp_path, specs)
    with pytest.raises(
        CorruptTokensError, match=rf"made/4: \d+ of \d+ numbers of its {stream} tokens are not fi"
    ):
        train_here(corpus, tmp_path / "run", [*LONG, f"execution.n_workers={n_workers}"])
    survived(f"NaN among stored {stream} tokens")
