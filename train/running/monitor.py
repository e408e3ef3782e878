"""What a run says of itself: metrics.jsonl, TensorBoard and other trackers, and signs of trouble."""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cache.errors import DivergedError, MissingDependencyError, TrackerError
from cache.files import write_text_aside

logger = logging.getLogger(__name__)

Tracker = Literal["wandb", "mlflow"]
TRACKERS: tuple[Tracker, ...] = ("wandb", "mlflow")
"""Services that may be told beside TensorBoard."""

_PATIENCE_STEPS = 20
"""Steps whose mean loss decides whether a run has diverged."""


class Monitor:
    """Writes a stage's numbers. Only the first process has one."""

    def __init__(
        self,
        run: Path,
        stage: str,
        step: int,
        config: Mapping[str, Any],
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Continue the files of a stage behind `step`; later lines are going to be written again.

        Args:
            run: Folder of the run.
            stage: Name of the stage.
            step: Optimizer steps that are done.
            config: The resolved settings, for the trackers.
            trackers: Further services.

        Raises:
            MissingDependencyError: A service's library is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._stage = stage
        self._path = run / "metrics.jsonl"
        _drop_later(self._path, stage, step)
        self._board: Any = SummaryWriter(run / "tensorboard" / stage, purge_step=step + 1)
        self._others = [_tracker(name, run, stage, config) for name in trackers]

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Write one row."""
        row = {"stage": self._stage, "step": step, **numbers}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        for tracker in self._others:
            named = {f"{self._stage}/{name}": value for name, value in numbers.items()}
            tracker.log(named, step=step)

    def close(self) -> None:
        """Finish the files."""
        self._board.close()
        for tracker in self._others:
            tracker.finish()


def _drop_later(path: Path, stage: str, step: int) -> None:
    """Remove rows of steps that a continued stage is going to run again."""
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
        write_text_aside(path, "".join(f"{line}\n" for line in kept))


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a service whose library is not installed, before anything runs.

    Raises:
        MissingDependencyError: Names the library.
    """
    for name in names:
        if find_spec(name) is None:
            raise MissingDependencyError(
                f"--track {name}: {name} is not installed. pip install {name}, or leave the option out: "
                "metrics.jsonl and TensorBoard are always written."
            )


def _tracker(name: Tracker, run: Path, stage: str, config: Mapping[str, Any]) -> Any:
    """Return accelerate's tracker of a service, which knows how to talk to it.

    Raises:
        TrackerError: The service refuses, in its own words.
    """
    from accelerate import PartialState
    from accelerate.tracking import MLflowTracker, WandBTracker

    PartialState()
    where, own = {
        "wandb": ("wandb.errors", "Error"),
        "mlflow": ("mlflow.exceptions", "MlflowException"),
    }[name]
    refused: type[Exception] = getattr(import_module(where), own)
    tracker: Any
    try:
        if name == "wandb":
            called = f"{run.name}-{stage}"
            tracker = WandBTracker(run.name, dir=str(run), group=run.name, name=called)
        else:
            tracker = MLflowTracker(run.name, run_name=f"{run.name}-{stage}")
        tracker.start()
        tracker.store_init_configuration(flat(config))
    except (refused, OSError) as error:
        raise TrackerError(
            f"--track {name}: {str(error).splitlines()[0]} Mend it, or leave the option out: the run goes "
            "on where it stands."
        ) from None
    return tracker


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted names, as services take them."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{name}.")
        elif isinstance(value, list | tuple):
            found |= flat({str(i): item for i, item in enumerate(value)}, f"{name}.")
        else:
            found[name] = value
    return found


@dataclass(frozen=True)
class StepLosses:
    """What one process knows of the losses of a step."""

    step: int
    loss: float
    """Mean over the step, as it is logged."""
    learning_rate: float
    uids: tuple[str, ...]
    """Of this process's answers."""
    tasks: tuple[str, ...]
    answer_losses: tuple[float, ...]


class Doctor:
    """Notices that training goes astray, and says which samples were there."""

    def __init__(self, stage: Path, vocabulary: int) -> None:
        """Watch a stage.

        Args:
            stage: Folder of the stage, where a diagnosis is left.
            vocabulary: Tokens of the language model: guessing costs ln(vocabulary) nats a token.
        """
        self._stage = stage
        self._worst = 2 * math.log(vocabulary)
        self._recent: deque[float] = deque(maxlen=_PATIENCE_STEPS)

    def is_ill(self, losses: StepLosses) -> bool:
        """Return whether this process sees a loss that is not finite, or one that stays absurd.

        Absurd is a mean over the last steps of more than twice what guessing among all tokens costs.
        """
        if not all(map(math.isfinite, (losses.loss, *losses.answer_losses))):
            return True
        self._recent.append(losses.loss)
        mean = sum(self._recent) / len(self._recent)
        return len(self._recent) == _PATIENCE_STEPS and mean > self._worst

    def diagnose(self, losses: StepLosses, rank: int, checkpoint: Path | None) -> DivergedError:
        """Write down what is known of an ill step, and return the error to raise."""
        bad = [
            (uid, task, loss)
            for uid, task, loss in zip(losses.uids, losses.tasks, losses.answer_losses, strict=True)
            if not math.isfinite(loss) or loss > self._worst
        ]
        path = self._stage / f"diverged-{losses.step}-process-{rank}.json"
        found = {
            "step": losses.step,
            "loss": _finite_or_text(losses.loss),
            "learning_rate": losses.learning_rate,
            "answers": [
                {"uid": uid, "task": task, "loss": _finite_or_text(loss)}
                for uid, task, loss in zip(
                    losses.uids, losses.tasks, losses.answer_losses, strict=True
                )
            ],
        }
        self._stage.mkdir(parents=True, exist_ok=True)
        write_text_aside(path, json.dumps(found, indent=2) + "\n")
        named = ", ".join(f"{uid} ({task})" for uid, task, _ in bad[:5])
        whose = (
            f"of {len(bad)} of {len(losses.uids)} answers, first: {named}"
            if bad
            else "of no one answer"
        )
        kept = (
            f"The last checkpoint, {checkpoint.name}, is kept: the same command goes on from there"
            if checkpoint
            else "No checkpoint was written yet"
        )
        return DivergedError(
            f"the loss became {losses.loss:.4g} at step {losses.step} of {self._stage.name}: {whose} "
            f"({path.name} lists the batch). {kept}. Lower the learning rate "
            f"(stages.N.optim.lr, now {losses.learning_rate:.3g}), set "
            "stages.N.optim.grad_clip=1.0, or look at these samples."
        )


def _finite_or_text(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
