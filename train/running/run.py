"""The folder of a run: who made it, from what, with which settings.

::

    RUN/config.json        the resolved preset, with the spec of every stream
    RUN/run.json           run id, manifest and store, library versions, finished stages
    RUN/metrics.jsonl      one JSON object per logged step and per validation
    RUN/tensorboard/       the same for TensorBoard
    RUN/<stage>/final/     the trained parts, see `train.checkpoint`
    RUN/<stage>/best-N/    the same, of the best validation, behind step N
    RUN/<stage>/checkpoint-N/   the same, with all that is needed to continue behind step N
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from cache.errors import CheckpointError
from cache.files import write_text_aside
from cache.labels import LabelSpace
from cache.schema import Model, decode_json
from cache.spec import describe_differences, differences
from train.config import Preset

_PACKAGES = ("cache", "train")
"""Whose code decides what a training step computes."""


class RunInfo(Model):
    """Who made a run, from what."""

    schema_version: int = 2
    run_id: str
    created: str
    """UTC, ISO 8601."""
    manifest: str
    store: str
    records_sha256: str
    """Digest of the training records, all fields of each, and of the label spaces."""
    label_spaces: dict[str, LabelSpace]
    """Those of the manifest, by `<corpus>/<field>` or `<field>`. Empty of an imported checkpoint:
    whoever evaluates it brings the labels."""
    versions: dict[str, str]
    """Library -> version; `code` is a digest of this project's own."""
    trainable: dict[str, int]
    """Component -> trained parameters."""
    finished: tuple[str, ...] = ()
    """Stages that are complete, in order."""
    seconds: dict[str, float] = Field(default_factory=dict)
    """Stage -> training time of the process that finished it."""

    @model_validator(mode="before")
    @classmethod
    def _of_schema_1(cls, data: Any) -> Any:
        """Take a run.json from before corpora had label spaces of their own."""
        if not isinstance(data, dict) or "label_space" not in data:
            return data
        space = data["label_space"]
        rest = {name: value for name, value in data.items() if name != "label_space"}
        return {**rest, "schema_version": 2, "label_spaces": {"emotion": space} if space else {}}


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


def continued(run: Path, preset: Preset, records_sha256: str) -> RunInfo | None:
    """Return what an existing run has finished; None of a new one, or one that saved nothing.

    Raises:
        CheckpointError: The folder holds something else, a run of another configuration (lists the
            fields; `execution` and `optim.accumulate` may differ), or one on other records.
    """
    if not run.exists() or _is_unborn(run):
        return None
    known, info = read_run(run)
    if not info.finished and not any(run.glob("*/checkpoint-*/state.json")):
        return None  # it ended before anything was saved, so there is nothing to lose
    fields = differences(preset, _with_free_settings_of(preset, known))
    if fields:
        raise CheckpointError(
            f"{run}: holds a run of another configuration ({describe_differences(fields)}). "
            "Give another --out, or the settings of that run."
        )
    if info.records_sha256 != records_sha256:
        raise CheckpointError(
            f"{run}: was trained on other records (manifest {info.manifest}, or the clips that the "
            "store could serve). Give another --out, or that manifest and store."
        )
    return info


def _with_free_settings_of(preset: Preset, known: Preset) -> Preset:
    """Return a known configuration with those settings of another that may change on the way.

    `accumulate` is among them since with another number of processes it keeps a step what it was.
    """
    stages = known.stages
    if [s.name for s in stages] == [s.name for s in preset.stages]:
        stages = tuple(
            old.model_copy(
                update={"optim": old.optim.model_copy(update={"accumulate": new.optim.accumulate})}
            )
            for old, new in zip(known.stages, preset.stages, strict=True)
        )
    return known.model_copy(update={"execution": preset.execution, "stages": stages})


def _is_unborn(run: Path) -> bool:
    """True of an empty folder, and of one whose run was killed before run.json was there."""
    return all(p.name == "config.json" or p.name.endswith(".partial") for p in run.iterdir())


def versions() -> dict[str, str]:
    """Return the versions of the code that decides numbers."""
    names = ("emocache", "torch", "transformers", "peft", "numpy", "zarr")
    return {**{name: metadata.version(name) for name in names}, "code": code_digest()}


def code_digest() -> str:
    """Return the first digits of a digest over this project's code for cache and training."""
    sha = hashlib.sha256()
    root = Path(__file__).resolve().parents[2]
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            sha.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return sha.hexdigest()[:16]
