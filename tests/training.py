"""What the training tests share: a small corpus, and processes that start in no time and can die.

The processes come from multiprocessing's fork server, which imports the libraries once: unlike a
fork of pytest's own process it has no threads and has computed nothing.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import emocache
from cache.clip import Clip, Description, Record, Subtitle
from cache.commit import ClipTokens, Status
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from tests.conftest import key_of, make_clip
from tests.processes import clean_context

N_RECORDS = 14
"""Clip 3 has no audio, clip 5 no picture; from 10 on they are for validation."""
FIRST_VAL = 10


def said(text: str, language: str | None = None) -> tuple[Subtitle, ...]:
    """Return the subtitles of a record that has one."""
    return (Subtitle(text=text, language=language),)


def described(text: str, audio: str | None = None) -> tuple[Description, ...]:
    """Return the descriptions of a record: a multimodal one, and perhaps one of the voice."""
    found = (Description(kind="multimodal", text=text),)
    return found if audio is None else (*found, Description(kind="audio_tone", text=audio))


def header_of(labels: Sequence[str]) -> Header:
    """Return the header of a manifest whose records all have emotions of one space."""
    space = LabelSpace(name="emotion", labels=tuple(labels))
    return Header(media_root=".", label_spaces={"emotion": space})


def make_corpus(root: Path, specs: Mapping[str, TokenSpec]) -> tuple[Path, Path]:
    """Write a store and a manifest of made-up clips; return the manifest's file and the store."""
    store = TokenStore.open_or_create(root / "store")
    for spec in specs.values():
        clips = []
        for i in range(N_RECORDS):
            absent = i == 3 if spec.stream == "audio" else i == 5
            made = ClipTokens(key_of(f"clip{i}"), Status.ABSENT)
            clips.append(made if absent else make_clip(spec, f"clip{i}", n_audio=9 + 40 * i))
        store.commit(spec, clips, {"torch": "0"})
    records = tuple(
        Record(
            uid=f"made/{i}",
            media=f"{i}.mp4",
            clip=Clip(sha256=key_of(f"clip{i}"), n_bytes=1),
            split="train" if i < FIRST_VAL else "val",
            subtitles=said("It is raining.") if i % 2 else (),
            emotion=("happy", "sad")[i % 2],
            descriptions=described("The voice is low.") if i % 3 else (),
        )
        for i in range(N_RECORDS)
    )
    manifest = Manifest(header=header_of(("happy", "sad")), records=records)
    write_manifest(root / "m.parquet", manifest)
    return root / "m.parquet", root / "store"


def start(
    function: Callable[..., None], *args: Any, log: Path, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start a function in a process of its own, whose output goes to a file."""
    process = clean_context().Process(target=_begin, args=(function, args, log, dict(env or {})))
    process.daemon = True  # none outlives pytest
    process.start()
    return process


def _begin(
    function: Callable[..., None], args: tuple[Any, ...], log: Path, env: dict[str, str]
) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.stdout.flush()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.dump_traceback_later(40)  # says in the log where it hangs
    function(*args)


def end(*processes: ForkServerProcess, timeout_s: float = 120) -> list[int | None]:
    """Wait for processes; one that hangs is killed, and its exit code is then None."""
    deadline = time.monotonic() + timeout_s
    codes = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def free_port() -> int:
    """Return a port that nothing listens on, below those that systems give to connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def rows_of(run: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a run's metrics; a process may be writing another."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


TIMES = {"samples_per_s", "tokens_per_s", "data_wait"}


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows_of(run)]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder of trained parts or of a checkpoint."""
    return {
        f"{file.relative_to(folder)}:{name}": tensor
        for file in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def checkpoints_of(stage: Path) -> list[int]:
    """Return the steps of a stage's checkpoints, oldest first."""
    return sorted(
        int(p.parent.name.rpartition("-")[2]) for p in stage.glob("checkpoint-*/state.json")
    )


def train_arguments(
    manifest: Path, store: Path, run: Path, overrides: Sequence[str] = ()
) -> list[str]:
    """Return the command line of a training."""
    return [
        "train", "demo", "--manifest", str(manifest), "--store", str(store), "--out", str(run),
        *overrides,
    ]  # fmt: skip


def command_line(arguments: Sequence[str]) -> None:
    """Be the command `emocache`; for `start`."""
    sys.exit(emocache.main(arguments))


def dying_command_line(arguments: Sequence[str], folder: Path, nth: int) -> None:
    """The same, but killed as by a power cut before the n-th step that it takes in a folder."""
    before_each_step(folder, lambda number: os.kill(os.getpid(), 9) if number == nth else None)
    command_line(arguments)


def before_each_step(folder: Path, act: Callable[[int], None]) -> None:
    """Call `act(number)` before whatever this process does to the files of a folder, for good.

    Steps are those that Python's audit events tell of: opening (to write or to sync), creating a
    folder, renaming, removing.
    """
    n_steps = 0
    acting = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal n_steps, acting
        if acting or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            return
        # Relative paths come from rmtree, which goes by descriptors.
        if os.path.isabs(str(args[0])) and not str(args[0]).startswith(str(folder)):
            return
        if event == "open" and not os.path.isabs(str(args[0])):
            return
        acting = True
        act(n_steps)
        n_steps += 1
        acting = False

    sys.addaudithook(hook)
