"""A published checkpoint as a run: trained parts that training can start from and evaluation can load."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from pathlib import Path

from cache.errors import CheckpointError
from train.checkpoint import new_folder, trained_tensors, write_trained
from train.config import Preset
from train.model import build
from train.published.checkpoints import ImportReport, import_published
from train.running.run import RunInfo, versions, write_run

STAGE = "imported"
"""Name of the only stage of such a run."""


def import_run(file: Path, preset: Preset, run: Path) -> ImportReport:
    """Import a published checkpoint into a new run folder.

    What the file does not hold keeps its fresh initialisation, as the report says.

    Args:
        file: See `train.published.files.read_published`.
        preset: Whose shapes the weights must have; its language model is loaded.
        run: Folder to make.

    Raises:
        CheckpointError: Not such a checkpoint, one that does not fit, or a folder that is taken.
    """
    if run.exists() and any(run.iterdir()):
        raise CheckpointError(f"{run}: is not empty. Give another --out; nothing was written.")
    model, _ = build(preset)
    wanted, wanted_lora = trained_tensors(model)
    parts, lora, report = import_published(file, preset, wanted, wanted_lora)
    with new_folder(run / STAGE / "final") as aside:
        write_trained(aside, parts, lora, model.llm.peft_config["default"])
    info = RunInfo(
        run_id=uuid.uuid4().hex[:12],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        manifest="",
        store="",
        records_sha256="",
        label_spaces={},
        versions=versions() | {"imported from": f"{report.kind}, {file.name}"},
        trainable=model.trainable(),
        finished=(STAGE,),
    )
    write_run(run, preset, info)
    return report
