"""One stage of the curriculum: its steps, its checkpoints, its numbers."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from cache.errors import DivergedError, StoppedError
from train.batches.loading import LoadedStep, Loader, to_device
from train.checkpoint import (
    Best,
    TrainState,
    Window,
    new_folder,
    prune,
    prune_best,
    read_moments,
    save_checkpoint,
    trained_tensors,
    write_trained,
)
from train.config import OptimConfig, Preset, StageConfig
from train.data import model_arguments
from train.model import EmotionLlama
from train.packing import Planner
from train.running.card import write_card
from train.running.interrupt import Interrupt
from train.running.monitor import Doctor, Monitor, StepLosses
from train.running.parallel import Processes, fill, whole
from train.running.validation import Validation

logger = logging.getLogger(__name__)

OnStep = Callable[[str, int, int, dict[str, float]], None]
"""Called as (stage, step, n_steps, latest logged numbers) after every optimizer step."""


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
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


def learning_rates(optim: OptimConfig, n_steps: int) -> Callable[[int], float]:
    """Return the learning rate by the number of steps that are done: warm-up, then one cosine."""
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        dummy, optim.warmup_steps, n_steps, min_lr=optim.lr_min
    )
    factor = schedule.lr_lambdas[0]
    return lambda step: optim.lr * float(factor(step))


def step_seed(*parts: str | int) -> int:
    """Return the seed of a step's random numbers (dropout): resuming needs no saved state of them."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


@dataclass
class _Pending:
    """A step whose loss is still being computed."""

    step: int
    learning_rate: float
    local_loss: Tensor
    uids: tuple[str, ...]
    tasks: tuple[str, ...]
    answer_losses: Tensor


@dataclass
class _Speed:
    """Counts since the last logged step."""

    since: float = field(default_factory=time.perf_counter)
    n_clips: int = 0
    n_positions: int = 0
    wait_s: float = 0.0

    def numbers(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.since, 1e-9)
        return {
            "samples_per_s": self.n_clips / seconds,
            "tokens_per_s": self.n_positions / seconds,
            "data_wait": self.wait_s / seconds,
        }


class StageTrainer:
    """Trains one stage from where it stands."""

    def __init__(
        self,
        preset: Preset,
        stage: StageConfig,
        model: EmotionLlama,
        wrapped: nn.Module,
        processes: Processes,
        loader_of: Callable[[Planner], Loader],
        planner_of: Callable[[TrainState], Planner],
        validation: Validation | None,
        folder: Path,
        state: TrainState,
        *,
        vocabulary: int,
        monitor: Monitor | None,
        on_step: OnStep | None,
    ) -> None:
        """Prepare the optimizer and, if the stage was begun before, its moments.

        Args:
            preset: The resolved configuration.
            stage: Which stage.
            model: The model, with the weights to go on from.
            wrapped: The same, tied to the other processes.
            processes: Who takes part.
            loader_of: Makes a loader of a plan.
            planner_of: Makes the plan that a state continues.
            validation: What to validate on; None validates nothing.
            folder: Folder of the stage.
            state: Where it stands.
            vocabulary: Tokens of the language model.
            monitor: Writes numbers; None in all processes but the first.
            on_step: Progress.
        """
        self._preset, self._stage, self._model, self._wrapped = preset, stage, model, wrapped
        self._processes, self._loader_of, self._planner_of = processes, loader_of, planner_of
        self._validation, self._folder = validation, folder
        self._monitor, self._on_step = monitor, on_step
        self._state = state
        self._trainable = model.trainable()
        self._rate = learning_rates(stage.optim, stage.n_steps)
        self._optimizer = make_optimizer(model, stage.optim)
        self._names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
        if state.step:
            self._restore_moments(read_moments(folder / f"checkpoint-{state.step}"))
        self._doctor = Doctor(folder, vocabulary)
        self._pending: deque[_Pending] = deque()
        self._speed = _Speed()
        self._latest: dict[str, float] = dict(state.latest)
        # A GPU is not waited for: its loss is looked at one step later.
        self._lag = 1 if processes.device.type == "cuda" else 0

    def run(self, interrupt: Interrupt) -> TrainState:
        """Train to the end of the stage.

        Raises:
            StoppedError: A signal asked to stop; the state is saved.
            DivergedError: The loss is not finite, or absurd; the last checkpoint is kept.
        """
        execution = self._preset.execution
        n_steps = self._stage.n_steps
        loader = self._loader_of(self._planner_of(self._state))
        self._wrapped.train()
        self._speed = _Speed()
        for loaded in loader.steps(n_steps - self._state.step):
            self._train_on(loaded)
            step = self._state.step
            if self._on_step is not None:
                self._on_step(self._stage.name, step, n_steps, self._latest)
            is_last = step == n_steps
            every = execution.validate_every_steps
            if self._validation is not None and (is_last or (every and step % every == 0)):
                self._validate()
            (stop,) = self._processes.any_of(interrupt.requested)
            if is_last or stop or step % execution.save_every_steps == 0:
                self._save()
            if stop and not is_last:
                raise StoppedError(
                    f"stopped at step {step} of {n_steps} in {self._stage.name}; the state is saved. "
                    "Run the same command again to continue."
                )
        return self._state

    def _train_on(self, loaded: LoadedStep) -> None:
        step, optim = self._state.step + 1, self._stage.optim
        torch.manual_seed(
            step_seed(self._preset.seed, self._stage.name, step, self._processes.rank)
        )
        rate = self._rate(step - 1)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        by_answer = optim.loss_average == "sample"
        total = loaded.step.n_answers if by_answer else loaded.step.n_answer_tokens
        losses, answer_losses = [], []
        for number, batch in enumerate(loaded.batches):
            is_last = number == len(loaded.batches) - 1
            with self._processes.accumulating(self._wrapped, is_last=is_last):
                on_device = to_device(batch, self._processes.device)
                found = self._wrapped(**model_arguments(on_device))
                # Gradients are averaged over processes; the loss is a mean over all their samples.
                (found["loss_sum"] * (self._processes.n / total)).backward()
            losses.append(found["loss_sum"].detach())
            answer_losses.append(found["answer_loss"])
        self._pending.append(
            _Pending(
                step,
                rate,
                torch.stack(losses).sum() / total,
                tuple(uid for batch in loaded.batches for uid in batch["uids"]),
                tuple(task for batch in loaded.batches for task in batch["tasks"]),
                torch.cat(answer_losses),
            )
        )
        n_clips = sum(len(pack) for pack in loaded.step.packs)
        self._speed.n_clips += n_clips
        self._speed.n_positions += loaded.step.n_positions
        self._speed.wait_s += loaded.wait_s
        if not self._lag:
            self._settle()  # before a loss that is not a number can reach the weights
        if optim.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), optim.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._state = self._state.model_copy(
            update={
                "step": step,
                "plan": loaded.step.after,
                "n_clips": self._state.n_clips + n_clips,
                "n_positions": self._state.n_positions + loaded.step.n_positions,
            }
        )
        while len(self._pending) > self._lag:
            self._settle()

    def _settle(self) -> None:
        """Look at the loss of the oldest step that was not looked at yet.

        Raises:
            DivergedError: It is not finite, or has been absurd for a while.
        """
        pending = self._pending.popleft()
        loss = float(self._processes.sum_of(pending.local_loss.double()))
        losses = StepLosses(
            pending.step,
            loss,
            pending.learning_rate,
            pending.uids,
            pending.tasks,
            tuple(pending.answer_losses.tolist()),
        )
        (is_ill,) = self._processes.any_of(self._doctor.is_ill(losses))
        if is_ill:
            saved = self._folder / f"checkpoint-{self._last_saved()}"
            raise self._doctor.diagnose(
                losses, self._processes.rank, saved if saved.is_dir() else None
            )
        window = self._state.window
        window = Window(n_steps=window.n_steps + 1, loss_sum=window.loss_sum + loss)
        if pending.step == 1 or pending.step % self._preset.execution.log_every_steps == 0:
            self._latest = {
                "loss": window.loss_sum / window.n_steps,
                "learning_rate": pending.learning_rate,
                **self._speed.numbers(),
            }
            if self._monitor is not None:
                self._monitor.write(pending.step, self._latest)
            window, self._speed = Window(), _Speed()
        self._state = self._state.model_copy(update={"window": window})

    def _settle_all(self) -> None:
        while self._pending:
            self._settle()

    def _last_saved(self) -> int:
        steps = [p.name.rpartition("-")[2] for p in self._folder.glob("checkpoint-*")]
        return max((int(s) for s in steps if s.isdigit()), default=0)

    def _validate(self) -> None:
        assert self._validation is not None
        self._settle_all()
        started = time.perf_counter()
        numbers = self._validation.run(self._wrapped, self._processes)
        self._speed.since += time.perf_counter() - started  # no training went on
        step = self._state.step
        self._latest = {**self._latest, **numbers}
        if self._monitor is not None:
            self._monitor.write(step, numbers)
        metric = self._preset.execution.best_metric
        value = numbers[f"val_{metric}"]
        best = self._state.best
        if not math.isfinite(value):
            return  # the next step's loss tells; state.json could not hold it
        if best is not None and (value >= best.value if metric == "loss" else value <= best.value):
            return
        self._state = self._state.model_copy(update={"best": Best(step=step, value=value)})
        trained = self._trained()
        if self._processes.is_first:
            self._write_finished(self._folder / f"best-{step}", trained, numbers)
            prune_best(self._folder)
        self._processes.wait()

    def write_final(self) -> None:
        """Write the trained parts of the finished stage; all processes must call."""
        trained = trained_tensors(self._model)
        if self._processes.is_first:
            self._write_finished(self._folder / "final", trained, self._latest)
            prune(self._folder, self._preset.execution.keep_last)
        self._processes.wait()

    def _write_finished(
        self,
        folder: Path,
        trained: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
        numbers: Mapping[str, float],
    ) -> None:
        with new_folder(folder) as aside:
            write_trained(aside, *trained, self._model.llm.peft_config["default"])
            write_card(
                aside,
                self._preset,
                self._stage,
                step=self._state.step,
                n_clips=self._state.n_clips,
                trainable=self._trainable,
                numbers=numbers,
            )

    def _save(self) -> None:
        """Write a checkpoint; all processes must call."""
        self._settle_all()
        trained, moments = self._trained(), self._moments()
        self._state = self._state.model_copy(update={"latest": self._latest})
        if self._processes.is_first:
            folder = self._folder / f"checkpoint-{self._state.step}"
            config = self._model.llm.peft_config["default"]
            save_checkpoint(folder, self._state, trained, moments, config)
            prune(self._folder, self._preset.execution.keep_last)
        self._processes.wait()

    def _trained(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what is to be kept; all processes must call.

        Raises:
            DivergedError: A weight is not finite: a gradient was not, though the loss still is.
        """
        parts, lora = trained_tensors(self._model)
        bad = [n for n, t in {**parts, **lora}.items() if not bool(torch.isfinite(t).all())]
        if bad:
            raise DivergedError(
                f"step {self._state.step} of {self._stage.name}: {len(bad)} trained tensors are no longer "
                f"finite, first: {', '.join(bad[:5])}. They are not saved; the last checkpoint stands. "
                "Lower the learning rate (stages.N.optim.lr) or set stages.N.optim.grad_clip=1.0."
            )
        return parts, lora

    def _parameters(self) -> Sequence[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _moments(self) -> dict[str, Tensor]:
        found = {}
        for parameter in self._parameters():
            for key, value in self._optimizer.state[parameter].items():
                name = f"{key}/{self._names[id(parameter)]}"
                found[name] = whole(value).cpu().contiguous()
        return found

    def _restore_moments(self, moments: Mapping[str, Tensor]) -> None:
        for parameter in self._parameters():
            name = self._names[id(parameter)]
            state = self._optimizer.state[parameter]
            state["step"] = moments[f"step/{name}"].clone()
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(parameter)
                fill(state[key], moments[f"{key}/{name}"])
