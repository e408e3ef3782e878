"""The history of a training, from its log to curves and to a row per stage."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from cache.schema import Model
from eval.plots import Curve


class HistoryRow(Model):
    """What was logged behind one training step: of training, of validation, or of both."""

    stage: str
    step: int = Field(ge=0)
    """Optimizer steps since the start of the run or of the stage; where a stage counts from the
    start again, the report adds the steps of the stages before."""
    loss: float | None = None
    """Mean cross-entropy per answer token, nats; None where only validation was logged."""
    learning_rate: float | None = None
    """None exactly where `loss` is."""
    tokens_per_s: float | None = None
    clips_per_s: float | None = None
    data_wait: float | None = None
    """Share of the time since the row before that training waited for data."""
    val_loss: float | None = None
    """The same loss on records that are never trained on; None where nothing was validated."""
    val_token_accuracy: float | None = None
    """Share of the answer tokens that were the likeliest, each given the true ones before it."""

    @model_validator(mode="after")
    def _some_loss(self) -> HistoryRow:
        if (self.loss is None) != (self.learning_rate is None):
            raise ValueError("loss and learning_rate are of one step: give both or neither")
        if self.loss is None and self.val_loss is None:
            raise ValueError("a row of a history needs loss or val_loss")
        return self


class StageSummary(NamedTuple):
    """One stage of the training in one table row."""

    stage: str
    last_step: int
    """Optimizer steps since the start of the first stage."""
    first_loss: float | None
    last_loss: float | None
    n_bad: int
    """Logged losses, of training or of validation, that are not finite."""
    clips_per_s: float | None
    """Median of what was logged, as the two below."""
    tokens_per_s: float | None
    data_wait: float | None
    """A share."""
    best_val_loss: float | None
    """The lowest; None if nothing was validated."""
    best_step: int | None
    """Where that was, counted as `last_step`."""
    best_token_accuracy: float | None
    """What was right there; a share."""


def read_history(path: Path) -> tuple[HistoryRow, ...]:
    """Read a run's metrics.jsonl: one row per step, of training, validation or both.

    A step has a line for each of the two. Nothing is there of a run that logged nothing, and the
    unfinished last line of a killed process is left out.
    """
    if not path.is_file():
        return ()
    steps: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if "loss" in row or "val_loss" in row:
            steps.setdefault((row["stage"], row["step"]), {}).update(row)
    return tuple(
        HistoryRow(
            stage=stage,
            step=step,
            loss=row.get("loss"),
            learning_rate=row.get("learning_rate"),
            clips_per_s=row.get("samples_per_s"),
            tokens_per_s=row.get("tokens_per_s"),
            data_wait=row.get("data_wait"),
            val_loss=row.get("val_loss"),
            val_token_accuracy=row.get("val_token_accuracy"),
        )
        for (stage, step), row in steps.items()
    )


def training_curves(history: Iterable[HistoryRow]) -> list[Curve]:
    """Split a history by stage, on one axis of steps that rises through all stages."""
    curves: list[Curve] = []
    rows: dict[str, list[HistoryRow]] = {}
    for row in history:
        rows.setdefault(row.stage, []).append(row)
    end = 0
    for stage, part in rows.items():
        offset = end if part[0].step <= end else 0
        end = part[-1].step + offset
        trained = [row for row in part if row.loss is not None and row.learning_rate is not None]
        validated = [row for row in part if row.val_loss is not None]
        waits = [math.nan if row.data_wait is None else row.data_wait for row in trained]
        curves.append(
            Curve(
                stage,
                [row.step + offset for row in trained],
                [row.loss for row in trained if row.loss is not None],
                [row.learning_rate for row in trained if row.learning_rate is not None],
                [row.step + offset for row in validated],
                [row.val_loss for row in validated if row.val_loss is not None],
                [] if all(map(math.isnan, waits)) else waits,
            )
        )
    return curves


def summarize_stages(history: Sequence[HistoryRow], curves: Sequence[Curve]) -> list[StageSummary]:
    """Return one row per stage, in the order of training."""
    summaries = []
    for curve in curves:
        rows = [row for row in history if row.stage == curve.stage]
        validated = [row for row in rows if row.val_loss is not None]
        finite = [
            (loss, step, row.val_token_accuracy)
            for loss, step, row in zip(curve.val_losses, curve.val_steps, validated, strict=True)
            if math.isfinite(loss)
        ]
        best = min(finite, key=lambda entry: entry[0], default=(None, None, None))
        summaries.append(
            StageSummary(
                stage=curve.stage,
                last_step=curve.last_step,
                first_loss=next(iter(curve.losses), None),
                last_loss=next(reversed(curve.losses), None),
                n_bad=sum(not math.isfinite(x) for x in (*curve.losses, *curve.val_losses)),
                clips_per_s=_median(row.clips_per_s for row in rows),
                tokens_per_s=_median(row.tokens_per_s for row in rows),
                data_wait=_median(row.data_wait for row in rows),
                best_val_loss=best[0],
                best_step=best[1],
                best_token_accuracy=best[2],
            )
        )
    return summaries


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def describe_curves(curves: Sequence[Curve]) -> dict[str, str]:
    """Return what the figure of the training shows, and what its table means, by name in the template."""
    validated = any(curve.val_steps for curve in curves)
    timed = any(curve.waits for curve in curves)
    shown = ["Loss in training and validation" if validated else "Loss", "learning rate"]
    if timed:
        shown.append("share of the time that training waited for data")
    about = ["Steps count from the start of the first stage."]
    if validated:
        about.append(
            "Validation is on records that are never trained on; tokens right: of the true answers, "
            "each given those before it, at the step of the best loss."
        )
    rates = "Speeds and waiting" if timed else "Speeds"
    about.append(f"{rates} are medians of what was logged; tokens include those of the prefix.")
    return {
        "shown_history": f"{', '.join(shown[:-1])} and {shown[-1]}",
        "about_history": " ".join(about),
    }
