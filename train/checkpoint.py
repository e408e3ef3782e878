"""What a run keeps: the trained parts as safetensors, LoRA as peft writes it, and who made them.

::

    RUN/config.json        the resolved preset, with the spec of every stream
    RUN/run.json           run id, manifest and store, library versions, finished stages
    RUN/metrics.jsonl      one JSON object per logged step
    RUN/tensorboard/       the same for TensorBoard
    RUN/<stage>/final/     fusion_adapters.safetensors, lora/
    RUN/<stage>/checkpoint-N/   the same, with optimizer, schedule and random states, to resume
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cache.errors import CheckpointError
from cache.files import write_text_aside
from cache.labels import LabelSpace
from cache.schema import Model, decode_json
from train.config import Preset
from train.model import EmotionLlama

PARTS_FILE = "fusion_adapters.safetensors"
LORA_FOLDER = "lora"


class RunInfo(Model):
    """Who made a run, from what."""

    schema_version: int = 1
    run_id: str
    created: str
    """UTC, ISO 8601."""
    manifest: str
    store: str
    records_sha256: str
    """Digest of the training records: uid, clip, label, subtitle, description of each."""
    label_space: LabelSpace
    versions: dict[str, str]
    """Library -> version."""
    trainable: dict[str, int]
    """Component -> trained parameters."""
    finished: tuple[str, ...] = ()
    """Stages that are complete, in order."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> training time of the process that finished it."""


def save_trained(model: EmotionLlama, folder: Path) -> None:
    """Write the trained parts: everything that `load_trained` needs beside the frozen LLM."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(("fusion.", "adapters."))
    }
    save_file(parts, folder / PARTS_FILE, metadata={"format": "pt"})
    model.llm.save_pretrained(str(folder / LORA_FOLDER), save_embedding_layers=False)


def load_trained(model: EmotionLlama, folder: Path) -> None:
    """Load trained parts into a model of the same shape.

    Raises:
        CheckpointError: Missing files, missing or unexpected keys, other shapes; the first five
            keys and a count.
    """
    parts = _read(folder / PARTS_FILE)
    wanted = {k: v for k, v in model.state_dict().items() if k.startswith(("fusion.", "adapters."))}
    _compare(parts, wanted, folder / PARTS_FILE)
    model.load_state_dict(parts, strict=False)
    lora_file = folder / LORA_FOLDER / "adapter_model.safetensors"
    lora = _read(lora_file)
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    _compare(lora, get_peft_model_state_dict(model.llm, save_embedding_layers=False), lora_file)
    set_peft_model_state_dict(model.llm, lora)


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


def _compare(found: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
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


def write_run(run: Path, preset: Preset, info: RunInfo) -> None:
    """Write config.json and run.json, each whole or not at all."""
    run.mkdir(parents=True, exist_ok=True)
    write_text_aside(run / "config.json", preset.model_dump_json(indent=2) + "\n")
    write_text_aside(run / "run.json", info.model_dump_json(indent=2) + "\n")


def read_run(run: Path) -> tuple[Preset, RunInfo]:
    """Read a run's configuration.

    Raises:
        CheckpointError: Not a run.
        SchemaError: Damaged files.
    """
    if not (run / "run.json").is_file() or not (run / "config.json").is_file():
        raise CheckpointError(
            f"{run}: not a run (needs config.json and run.json). Create one with: "
            f"emocache train PRESET --manifest ... --store ... --out {run}"
        )
    preset = decode_json(Preset, (run / "config.json").read_bytes(), str(run / "config.json"))
    info = decode_json(RunInfo, (run / "run.json").read_bytes(), str(run / "run.json"))
    return preset, info
