"""What training keeps: the trained parts as safetensors, LoRA as peft writes it, and where it stood.

::

    fusion_adapters.safetensors   pre-fusion and modal adapters
    lora/                         a peft adapter folder
    README.md                     model card, of final/ and best-N/
    optimizer.safetensors         AdamW's moments, by parameter       } of checkpoint-N/ only
    state.json                    step, plan, sums, digests of files  }

A folder is written aside, synced and renamed, so under its name it is whole or not there. Nothing
in it is a pickle. Random numbers need no place: those of a step derive from seed, stage and step.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache.clip import file_sha256
from cache.errors import CheckpointError
from cache.files import fsync_file, fsync_folder
from cache.schema import Model
from train.model import EmotionLlama
from train.packing import PlanState
from train.running.parallel import fill, whole

PARTS_FILE = "fusion_adapters.safetensors"
LORA_FOLDER = "lora"
LORA_FILE = f"{LORA_FOLDER}/adapter_model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


class Window(Model):
    """Sums since the last logged step, so that a continued run logs what an unbroken one would."""

    n_steps: int = 0
    loss_sum: float = 0.0
    """Of the steps' losses."""


class Best(Model):
    """The best validation so far."""

    step: int
    value: float


class TrainState(Model):
    """Where a stage stands behind a step."""

    schema_version: int = 1
    stage: str
    step: int = Field(ge=0)
    plan: PlanState
    window: Window = Window()
    best: Best | None = None
    latest: dict[str, float] = Field(default_factory=dict)
    """Numbers as they were last logged, for the model card."""
    n_clips: int = 0
    """Clips trained on in this stage."""
    n_positions: int = 0
    """Positions that the language model computed in this stage."""
    spec_ids: dict[str, str] = Field(default_factory=dict)
    """Input -> spec of the tokens."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Of the process that wrote it."""
    files: dict[str, str] = Field(default_factory=dict)
    """File -> SHA-256."""


def trained_tensors(model: EmotionLlama) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return pre-fusion and adapters by our names, and LoRA by peft's; all processes must call."""
    from peft import get_peft_model_state_dict

    parts = {
        name: whole(tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(("fusion.", "adapters."))
    }
    found = get_peft_model_state_dict(model.llm, save_embedding_layers=False)
    return parts, {name: whole(tensor).cpu().contiguous() for name, tensor in found.items()}


def write_trained(
    folder: Path, parts: Mapping[str, Tensor], lora: Mapping[str, Tensor], peft_config: Any
) -> None:
    """Write trained tensors into a folder that exists."""
    save_file(dict(parts), folder / PARTS_FILE, metadata={"format": "pt"})
    (folder / LORA_FOLDER).mkdir(exist_ok=True)
    save_file(dict(lora), folder / LORA_FILE, metadata={"format": "pt"})
    inference = peft_config.inference_mode
    peft_config.inference_mode = True
    try:
        peft_config.save_pretrained(str(folder / LORA_FOLDER))
    finally:
        peft_config.inference_mode = inference


def save_trained(model: EmotionLlama, folder: Path) -> None:
    """Write the trained parts: everything that `load_trained` needs beside the frozen LLM."""
    parts, lora = trained_tensors(model)
    with new_folder(folder) as aside:
        write_trained(aside, parts, lora, model.llm.peft_config["default"])


def load_trained(model: EmotionLlama, folder: Path) -> None:
    """Load trained parts into a model of the same shape.

    Raises:
        CheckpointError: Missing files, missing or unexpected keys, other shapes; the first five
            keys and a count.
    """
    parts = _read(folder / PARTS_FILE)
    wanted = {k: v for k, v in model.state_dict().items() if k.startswith(("fusion.", "adapters."))}
    compare(parts, wanted, folder / PARTS_FILE)
    lora_file = folder / LORA_FILE
    lora = _read(lora_file)
    from peft import get_peft_model_state_dict

    # peft's own names leave the adapter's name out; the tensors are those of the model.
    wanted_lora = get_peft_model_state_dict(model.llm, save_embedding_layers=False)
    compare(lora, wanted_lora, lora_file)
    for name, tensor in parts.items():
        fill(wanted[name], tensor)
    for name, tensor in lora.items():
        fill(wanted_lora[name], tensor)


def trained_folder(path: Path) -> Path:
    """Return the folder of trained parts that a path means: itself, or a run's last stage.

    Raises:
        CheckpointError: There is none.
    """
    from train.running.run import read_run

    if (path / PARTS_FILE).is_file():
        return path
    _, info = read_run(path)
    if not info.finished:
        raise CheckpointError(
            f"{path}: no stage is finished yet. Continue it with the same `emocache train` command."
        )
    return path / info.finished[-1] / "final"


def save_checkpoint(
    folder: Path,
    state: TrainState,
    trained: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    moments: Mapping[str, Tensor],
    peft_config: Any,
) -> None:
    """Write all that is needed to continue behind a step, whole or not at all."""
    with new_folder(folder) as aside:
        write_trained(aside, *trained, peft_config)
        save_file(dict(moments), aside / OPTIMIZER_FILE)
        files = {
            p.relative_to(aside).as_posix(): file_sha256(p)
            for p in sorted(aside.rglob("*"))
            if p.is_file()
        }
        text = state.model_copy(update={"files": files}).model_dump_json(indent=2)
        (aside / STATE_FILE).write_text(text + "\n", encoding="utf-8")


def last_checkpoint(stage: Path) -> tuple[Path, TrainState] | None:
    """Return a stage's newest whole checkpoint.

    Raises:
        CheckpointError: The newest one is damaged: its digests tell. It is never passed over in
            silence, since the user should know of such a disk.
    """
    found = [p for p in stage.glob("checkpoint-*") if (p / STATE_FILE).is_file()]
    if not found:
        return None
    newest = max(found, key=_step_of)
    try:
        state = TrainState.model_validate_json((newest / STATE_FILE).read_bytes())
        wrong = [name for name, sha in state.files.items() if file_sha256(newest / name) != sha]
    except (ValidationError, OSError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(f"{newest}: damaged ({first}). {_CURE}") from None
    if wrong:
        raise CheckpointError(
            f"{newest}: damaged, {', '.join(wrong)} no longer has the digest that it was written with. "
            f"{_CURE}"
        )
    return newest, state


_CURE = "Delete this folder, and the run continues from the checkpoint before it."


def read_moments(folder: Path) -> dict[str, Tensor]:
    """Return the optimizer's moments of a checkpoint."""
    return _read(folder / OPTIMIZER_FILE)


def best_folder(stage: Path) -> Path | None:
    """Return the folder of a stage's best validation; None if it never validated."""
    found = [p for p in stage.glob("best-*") if (p / PARTS_FILE).is_file()]
    return max(found, key=_step_of) if found else None


def prune_best(stage: Path) -> None:
    """Delete all but the newest best: it was written because it is better."""
    newest = best_folder(stage)
    for old in stage.glob("best-*"):
        if old != newest:
            shutil.rmtree(old, ignore_errors=True)


def prune(stage: Path, keep_last: int) -> None:
    """Delete old checkpoints, and what killed processes left unfinished."""
    found = sorted((p for p in stage.glob("checkpoint-*") if p.is_dir()), key=_step_of)
    for old in found[:-keep_last]:
        # Without its state it no longer counts as a checkpoint, should a kill come in between.
        (old / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)
    for leftover in stage.glob(".*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success it is synced and takes the name of `folder`.

    Raises:
        CheckpointError: The disk is full, or does not let itself be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.partial")
    aside.mkdir()
    try:
        yield aside
        # safetensors writes for the owner alone; a run is as open as the folder that it is in.
        mode = aside.stat().st_mode & 0o666
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
            fsync_file(path)
        fsync_folder(aside)
        _replace(aside, folder)
        fsync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}). What was saved before stands: make room or mend "
            "the permissions, and run the same command again."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(aside: Path, folder: Path) -> None:
    """Give a folder its name; an older one of that name is moved out of the way first."""
    old = aside.with_name(aside.name.replace(".partial", ".old.partial"))
    if folder.exists():
        folder.replace(old)
    aside.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _step_of(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _read(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint file. Train the run again, or give a folder that "
            "`emocache train` finished."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: damaged ({error}). Restore it or train again.") from None


def compare(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse tensors of other names or shapes.

    Raises:
        CheckpointError: The first five keys of each kind, and a count.
    """
    missing = sorted(wanted.keys() - found.keys())
    unexpected = sorted(found.keys() - wanted.keys())
    wrong = [
        f"{k} {tuple(found[k].shape)} instead of {tuple(wanted[k].shape)}"
        for k in sorted(wanted.keys() & found.keys())
        if found[k].shape != wanted[k].shape
    ]
    problems = [
        f"{len(items)} {what}, first: {', '.join(items[:5])}"
        for what, items in (
            ("keys missing", missing),
            ("keys unexpected", unexpected),
            ("tensors of another shape", wrong),
        )
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{path}: does not fit the configuration: {'; '.join(problems)}. "
            "Load it with the config.json of the run that wrote it."
        )
