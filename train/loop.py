"""Train the stages of a preset from cached tokens, resumable behind any step.

::

    mixture -> groups -> packs -> loader (threads) -> model -> loss -> AdamW -> checkpoint
    (which    (rendered  (which   (reads views,      (trained parts and
    sample)   questions) share)    lays them out)     the frozen LLM)

What is trained on at a step, and every random number, follows from the configuration and the step
alone: a run that was stopped, killed or moved continues as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from cache.clip import Record
from cache.errors import ManifestError, SchemaError
from cache.manifest import Header, Manifest
from cache.store import TokenStore
from train.batches.loading import Loader
from train.batches.reading import ViewReader
from train.batches.records import records_to_train_on, records_to_validate_on
from train.checkpoint import TrainState, last_checkpoint, load_trained, trained_folder
from train.config import Preset, StageConfig, stage_tasks, tasks_asked
from train.data import Renderer
from train.llm.backbone import context_length
from train.mixture import Ask, Mixture, can_answer
from train.model import EmotionLlama, build
from train.packing import Grouper, Planner, PlanState
from train.running.interrupt import Interrupt
from train.running.monitor import Monitor, Tracker, check_trackers
from train.running.parallel import Parallel, Processes
from train.running.run import RunInfo, continued, versions, write_run
from train.running.stage import OnStep, StageTrainer
from train.running.validation import Validation
from train.text.tasks import TASK_TABLE, Task, tasks_of
from train.text.wording import Wording

logger = logging.getLogger(__name__)


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
    *,
    device: str | None = "cpu",
    parallel: Parallel = "ddp",
    trackers: Sequence[Tracker] = (),
) -> TrainResult:
    """Train every stage that is not finished yet.

    Args:
        preset: The resolved configuration.
        manifest: Records with labels.
        manifest_path: For the run's provenance.
        store: Committed tokens of every stream.
        run: Folder of outputs; an existing one of the same configuration is continued.
        on_step: Progress.
        device: Torch device; None takes a GPU where there is one.
        parallel: How several processes share the model, see `train.running.parallel`.
        trackers: Services that are told beside TensorBoard.

    Raises:
        CheckpointError: The folder holds a run of another configuration, or a damaged checkpoint.
        SpecMismatchError: The store does not hold what the preset asks for.
        CacheMissError: Clips of the training split were never extracted.
        ManifestError: No labels, or no record for a task of the mixture.
        StoppedError: Ctrl-C or a signal; the state is saved.
        DivergedError: The loss is not finite or absurd.
    """
    check_trackers(trackers)
    if preset.model.llm.dtype == "float16":
        raise SchemaError(
            "model.llm.dtype=float16 cannot be trained: small gradients vanish without loss scaling. "
            "Use bfloat16, or float32."
        )
    processes = Processes(device, parallel)
    try:
        job = _Job(preset, manifest, manifest_path, store, run, processes)
        return job.run_stages(on_step, trackers)
    finally:
        processes.leave()


class _Job:
    """A run with everything that its stages share."""

    def __init__(
        self,
        preset: Preset,
        manifest: Manifest,
        manifest_path: Path,
        store: TokenStore,
        run: Path,
        processes: Processes,
    ) -> None:
        check_labels(manifest, preset, str(manifest_path))
        self._header = manifest.header
        self._reader = ViewReader(store, preset, pin_memory=processes.device.type == "cuda")
        self._preset = preset.model_copy(update={"tokens": self._reader.resolved})
        self._run, self._processes = run, processes
        self._records = records_to_train_on(manifest, preset, self._reader)
        self._val_records = records_to_validate_on(manifest, preset, self._reader)
        records_sha256 = _digest(self._records, manifest.header)
        self._previous = continued(run, self._preset, records_sha256)
        # What cannot be drawn or worded is refused before the model is loaded.
        wording = Wording(preset, manifest.header)
        wording.check(self._records + self._val_records, run_tasks(preset))
        self._mixtures = [
            Mixture(self._records, stage, preset.seed + number, self._reader.streams_of)
            for number, stage in enumerate(preset.stages)
        ]
        processes.wait()  # nobody writes before everybody looked
        self.info = processes.same(
            self._previous
            or RunInfo(
                run_id=uuid.uuid4().hex[:12],
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                manifest=str(manifest_path),
                store=store.root,
                records_sha256=records_sha256,
                label_spaces=self._header.label_spaces,
                versions=versions(),
                trainable={},
            )
        )

    def run_stages(self, on_step: OnStep | None, trackers: Sequence[Tracker]) -> TrainResult:
        """Train what is left; see `train`."""
        preset, info = self._preset, self.info
        left = [stage for stage in preset.stages if stage.name not in info.finished]
        if not left:
            return TrainResult(self._run, info, 0)
        _warn_of_other_code(info)
        model, tokenizer = build(preset)
        begun = last_checkpoint(self._run / left[0].name)
        if begun is not None:
            load_trained(model, begun[0])
        elif info.finished:
            load_trained(model, self._run / info.finished[-1] / "final")
        elif preset.init is not None:
            load_trained(model, trained_folder(Path(preset.init)))
        trainable = model.trainable()
        vocabulary = int(model.llm.get_input_embeddings().num_embeddings)
        limit = context_length(model.llm.get_base_model())
        model.set_execution(preset.execution)
        renderer = Renderer(preset, tokenizer, self._header)
        grouper = Grouper(preset, self._reader, renderer, limit)
        check_lengths(self._records + self._val_records, preset, grouper, self._reader, limit)
        for stage in left:  # what cannot be packed is refused before a file is written
            self._planner(stage, grouper, PlanState()).next_step()
        wrapped = self._processes.wrap(model)
        self._write(info := info.model_copy(update={"trainable": trainable}))
        n_steps = 0
        with Interrupt() as interrupt:
            for stage in left:
                started = time.monotonic()
                state = begun[1] if begun is not None else self._fresh(stage)
                begun = None
                done = self._train_stage(
                    stage, model, wrapped, grouper, state, vocabulary, interrupt, on_step, trackers
                )
                n_steps += done
                info = info.model_copy(
                    update={
                        "finished": (*info.finished, stage.name),
                        "seconds": {**info.seconds, stage.name: time.monotonic() - started},
                    }
                )
                self._write(info)
        return TrainResult(self._run, info, n_steps)

    def _train_stage(
        self,
        stage: StageConfig,
        model: EmotionLlama,
        wrapped: nn.Module,
        grouper: Grouper,
        state: TrainState,
        vocabulary: int,
        interrupt: Interrupt,
        on_step: OnStep | None,
        trackers: Sequence[Tracker],
    ) -> int:
        """Train one stage to its end; return the steps that this took."""
        preset, processes = self._preset, self._processes
        validation = None
        if self._val_records:
            found = Validation(self._val_records, stage, preset, self._reader, grouper)
            validation = found if len(found) else None
        monitor = None
        if processes.is_first:
            settings: dict[str, Any] = preset.model_dump(mode="json")
            monitor = Monitor(self._run, stage.name, state.step, settings, trackers)
        trainer = StageTrainer(
            preset,
            stage,
            model,
            wrapped,
            processes,
            lambda planner: Loader(
                planner,
                self._reader,
                preset,
                loss_average=stage.optim.loss_average,
                rank=processes.rank,
                n_processes=processes.n,
            ),
            lambda at: self._planner(stage, grouper, at.plan),
            validation,
            self._run / stage.name,
            state,
            vocabulary=vocabulary,
            monitor=monitor,
            on_step=on_step if processes.is_first else None,
        )
        try:
            after = trainer.run(interrupt)
            trainer.write_final()
        finally:
            if monitor is not None:
                monitor.close()
        return after.step - state.step

    def _planner(self, stage: StageConfig, grouper: Grouper, at: PlanState) -> Planner:
        mixture = self._mixtures[self._preset.stages.index(stage)]
        return Planner(mixture, grouper.groups, stage.optim, self._processes.n, at)

    def _fresh(self, stage: StageConfig) -> TrainState:
        specs = {name: spec.spec_id for name, spec in self._preset.tokens.by_input().items()}
        return TrainState(
            stage=stage.name, step=0, plan=PlanState(), spec_ids=specs, versions=versions()
        )

    def _write(self, info: RunInfo) -> None:
        if self._processes.is_first:
            write_run(self._run, self._preset, info)
        self._processes.wait()


def run_tasks(preset: Preset) -> tuple[Task, ...]:
    """Return every task that a run may ask, in training or in validation."""
    asked = [task for stage in preset.stages for task in tasks_asked(stage)]
    validated = [t for s in preset.stages for name in stage_tasks(s) for t in tasks_of(name)]
    return tuple(dict.fromkeys([*asked, *validated]))


def check_labels(manifest: Manifest, preset: Preset, where: str) -> None:
    """Refuse a manifest without labels, if the run asks for any.

    Raises:
        ManifestError: It has none.
    """
    if manifest.header.label_spaces:
        return
    if any(TASK_TABLE[task].label is not None for task in run_tasks(preset)):
        raise ManifestError(
            f"{where}: no labels, so there is nothing to train on. "
            "Index with a table: emocache index DIR --out FILE --labels labels.csv"
        )


def _digest(records: Sequence[Record], header: Header) -> str:
    """Return the SHA-256 of the training records and their label spaces: others are another run."""
    sha = hashlib.sha256()
    for key, space in sorted(header.label_spaces.items()):
        sha.update(key.encode() + space.model_dump_json().encode())
    for record in records:
        sha.update(record.model_dump_json().encode())
    return sha.hexdigest()


def _warn_of_other_code(info: RunInfo) -> None:
    """Say so if a run continues under other versions: its numbers may then differ a little."""
    now = versions()
    other = [f"{n} {now.get(n)} (was {v})" for n, v in info.versions.items() if now.get(n) != v]
    if other:
        logger.warning(
            "this run was begun with other versions: %s. It continues, but not bit for bit.",
            ", ".join(other),
        )


def check_lengths(
    records: Sequence[Record],
    preset: Preset,
    grouper: Grouper,
    reader: ViewReader,
    limit: int | None,
) -> None:
    """Render, before anything is trained, the records whose text might not fit into the context.

    Raises:
        SchemaError: One does not.
    """
    if limit is None:
        return
    # No token is shorter than a byte, and instructions stay well below this.
    room = limit - preset.layout().total - 1000
    tasks = sorted(run_tasks(preset))
    for record in records:
        subtitle = record.subtitle(preset.prompt.language(record.corpus)) or ""
        longest = max((len(d.text.encode()) for d in record.descriptions), default=0)
        if len(subtitle.encode()) + longest <= room:
            continue
        # Which of several descriptions is drawn depends on the pass: each is tried alone.
        for text in record.descriptions or (None,):
            alone = record.model_copy(update={"descriptions": () if text is None else (text,)})
            for task in tasks:
                if can_answer(alone, task, reader.streams_of):
                    grouper.group(alone, [Ask(task, 0)], with_answer=True)
