"""Train the stages of a preset from cached tokens, resumable at every checkpoint.

The loop is transformers' Trainer (accelerate below it). Three things are ours: which sample comes
when (`train.mixture`, a pure function of the seed), what a checkpoint holds (`train.checkpoint`,
the trained parts only), and that Ctrl-C saves before it stops.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cache.clip import Record
from cache.errors import CheckpointError, ManifestError, SpecMismatchError, StoppedError
from cache.manifest import Manifest
from cache.spec import describe_differences, differences
from cache.store import TokenStore
from train.checkpoint import RunInfo, load_trained, read_run, save_trained, write_run
from train.config import OptimConfig, Preset, StageConfig
from train.data import Renderer, TrainDataset, ViewReader, collate, usable
from train.mixture import Mixture
from train.model import EmotionLlama, build

logger = logging.getLogger(__name__)

OnStep = Callable[[str, int, int, dict[str, float]], None]
"""Called as (stage, step, n_steps, latest logged numbers) after every optimizer step."""


@dataclass(frozen=True)
class TrainResult:
    """What a call of `train` did."""

    run: Path
    info: RunInfo
    n_steps: int
    """Optimizer steps that this call ran; 0 if the run was complete already."""


def train(
    preset: Preset,
    manifest: Manifest,
    manifest_path: Path,
    store: TokenStore,
    run: Path,
    on_step: OnStep | None = None,
) -> TrainResult:
    """Train every stage that is not finished yet.

    Args:
        preset: The resolved configuration.
        manifest: Records with labels.
        manifest_path: For the run's provenance.
        store: Committed tokens of every stream.
        run: Folder of outputs; an existing one of the same configuration is continued.
        on_step: Progress.

    Raises:
        CheckpointError: The folder holds a run of another configuration.
        SpecMismatchError: The store does not hold what the preset asks for.
        CacheMissError: Clips of the training split were never extracted.
        StoppedError: Ctrl-C; the state is saved.
    """
    space = manifest.header.label_space
    if space is None:
        raise ManifestError(
            f"{manifest_path}: no labels, so there is nothing to train on. "
            "Index with a table: emocache index DIR --out FILE --labels labels.csv"
        )
    reader = ViewReader(store, preset)
    preset = preset.model_copy(update={"tokens": reader.resolved})
    records = usable(manifest.select(preset.data.train_split), reader, preset.data)
    records_sha256 = _digest(records)
    previous = _continue(run, preset, records_sha256)
    if previous is not None and len(previous.finished) == len(preset.stages):
        return TrainResult(run, previous, 0)
    model, tokenizer = build(preset)
    renderer = Renderer(preset, tokenizer, space)
    info = previous or RunInfo(
        run_id=uuid.uuid4().hex[:12],
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        manifest=str(manifest_path),
        store=store.root,
        records_sha256=records_sha256,
        label_space=space,
        versions=versions(),
        trainable=model.trainable(),
    )
    write_run(run, preset, info)
    n_steps = 0
    for number, stage in enumerate(preset.stages):
        if stage.name in info.finished:
            load_trained(model, run / stage.name / "final")
            continue
        n_samples = stage.n_steps * stage.optim.batch_size * stage.optim.accumulate
        mixture = Mixture(records, stage.tasks, n_samples, seed=preset.seed + number)
        dataset = TrainDataset(mixture, reader, renderer)
        started = time.monotonic()
        n_steps += train_stage(preset, stage, model, dataset, run, on_step)
        save_trained(model, run / stage.name / "final")
        info = info.model_copy(
            update={
                "finished": (*info.finished, stage.name),
                "seconds": {**info.seconds, stage.name: time.monotonic() - started},
            }
        )
        write_run(run, preset, info)
    return TrainResult(run, info, n_steps)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide numbers."""
    names = ("emocache", "torch", "transformers", "peft", "accelerate", "numpy", "zarr")
    return {name: metadata.version(name) for name in names}


def _digest(records: Sequence[Record]) -> str:
    """Return the SHA-256 of the training records: other records would be another run."""
    sha = hashlib.sha256()
    for record in records:
        sha.update(record.model_dump_json().encode())
    return sha.hexdigest()


def _continue(run: Path, preset: Preset, records_sha256: str) -> RunInfo | None:
    """Return what an existing run has finished; refuse another configuration or other records."""
    if not run.exists() or not any(run.iterdir()):
        return None
    known, info = read_run(run)
    fields = differences(preset, known)
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


def train_stage(
    preset: Preset,
    stage: StageConfig,
    model: EmotionLlama,
    dataset: TrainDataset,
    run: Path,
    on_step: OnStep | None = None,
) -> int:
    """Train one stage, from its last checkpoint if there is one.

    Returns:
        Optimizer steps that this call ran.

    Raises:
        StoppedError: Ctrl-C; the state is saved.
    """
    folder = run / stage.name
    optim = stage.optim
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.n_steps,
        per_device_train_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.accumulate,
        max_grad_norm=optim.grad_clip or 0.0,
        train_sampling_strategy="sequential",  # the mixture is the order
        logging_steps=preset.log_every_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_steps=preset.save_every_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        seed=preset.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    optimizer = make_optimizer(model, optim)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, optim.warmup_steps, stage.n_steps, min_lr=optim.lr_min
    )
    recorder = _Recorder(stage, run, on_step)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=cast(Any, collate),
        optimizers=(optimizer, schedule),
        callbacks=[recorder],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    last = _last_checkpoint(folder)
    with recorder.listening():
        trainer.train(resume_from_checkpoint=last)
    if recorder.interrupted:
        raise StoppedError(
            f"stopped at step {trainer.state.global_step} of {stage.n_steps} in {stage.name}; the "
            "state is saved. Run the same command again to continue."
        )
    return recorder.n_steps


def _last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint of a stage that was written to its end."""
    # Trainer writes trainer_state.json last; a folder without it was being written when killed.
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return str(max(found, key=lambda p: int(p.name.rpartition("-")[2]))) if found else None


def make_optimizer(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; only matrices decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.betas,
    )


class _Trainer(Trainer):
    """Trainer whose checkpoints hold the trained parts only."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        save_trained(self._plain_model(), Path(output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(self._plain_model(), Path(resume_from_checkpoint))

    def _plain_model(self) -> EmotionLlama:
        plain = self.accelerator.unwrap_model(self.model)
        assert isinstance(plain, EmotionLlama)
        return plain


class _Recorder(TrainerCallback):
    """Writes metrics, reports progress, and turns Ctrl-C into save-and-stop."""

    def __init__(self, stage: StageConfig, run: Path, on_step: OnStep | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.interrupted = False
        self.n_steps = 0
        self._stage = stage
        self._metrics = run / "metrics.jsonl"
        self._board: Any = SummaryWriter(run / "tensorboard" / stage.name)
        self._on_step = on_step
        self._latest: dict[str, float] = {}
        self._since = time.monotonic()
        self._logged_step = 0

    def listening(self) -> _Listening:
        return _Listening(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._since, self._logged_step = time.monotonic(), state.global_step
        _drop_later_metrics(self._metrics, self._stage.name, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.n_steps += 1
        if self._on_step is not None:
            self._on_step(self._stage.name, state.global_step, self._stage.n_steps, self._latest)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in (logs or {}):
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise SpecMismatchError(
                f"the loss became {loss} at step {state.global_step} of {self._stage.name}. Lower "
                f"the learning rate (stages.N.optim.lr, now {self._stage.optim.lr}) or set "
                "stages.N.optim.grad_clip=1.0; the last checkpoint is good."
            )
        now = time.monotonic()
        steps = state.global_step - self._logged_step
        samples = steps * self._stage.optim.batch_size * self._stage.optim.accumulate
        self._latest = {
            "loss": loss,
            "learning_rate": float(logs["learning_rate"]),
            "samples_per_s": samples / max(now - self._since, 1e-9),
        }
        self._since, self._logged_step = now, state.global_step
        row = {"stage": self._stage.name, "step": state.global_step, **self._latest}
        with self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in self._latest.items():
            self._board.add_scalar(name, value, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._board.close()


class _Listening:
    """Ctrl-C once: save and stop after this step. Twice: stop at once."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._before: Any = None

    def __enter__(self) -> None:
        try:
            self._before = signal.signal(signal.SIGINT, self._on_signal)
        except ValueError:  # not in the main thread, where signals cannot arrive either
            self._before = None

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._recorder.interrupted:
            raise KeyboardInterrupt
        self._recorder.interrupted = True
        logger.warning("stopping after this step; press Ctrl-C again to stop at once")


def _drop_later_metrics(path: Path, stage: str, step: int) -> None:
    """Remove lines of steps that a resumed stage is going to run again."""
    if not path.is_file():
        return
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = []
    for line in rows:
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed process
            continue
        if row.get("stage") != stage or int(row.get("step", 0)) <= step:
            kept.append(line)
    if kept != rows:
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
