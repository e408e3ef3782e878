"""Sweeps whose trials are done, made up for the tests of tables and pages: real files, no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from eval.predictions import Prediction, write_predictions
from eval.sweep.schema import Row, Scale, ScoreColumn, SweepFile, SweepRow, TrialResult
from eval.sweep.state import Begun, BegunTrial, begin, fail, write_result
from eval.sweep.tables.statistics import score_of, side_of
from train.config import Preset, configure
from train.presets import preset

LABELS = ("angry", "happy", "neutral", "sad")
ACCURACY = ScoreColumn(
    name="acc", heading="Accuracy", kind="split", split="test", task="emotion", metric="accuracy"
)
F1 = ScoreColumn(name="f1", heading="Weighted F1", kind="split", split="test", task="emotion")


def reply(number: int, truth: str, label: str | None, **more: object) -> Prediction:
    """Return a reply about clip `number`."""
    return Prediction.model_validate(
        {
            "uid": f"demo/clip_{number:04}",
            "task": "emotion",
            "reply": label or "",
            "label": label,
            "parse": "exact" if label else "empty",
            "truth": truth,
            "run": "run",
            "spec_ids": {},
            "split": "test",
            **more,
        }
    )


def replies(skill: float, n: int = 200, seed: int = 0) -> list[Prediction]:
    """Return replies that are right in about `skill` of the clips; truths do not depend on the seed."""
    truths = np.random.default_rng(0).choice(LABELS, n)
    rng = np.random.default_rng([1, seed])
    return [
        reply(i, str(truth), str(truth) if rng.random() < skill else str(rng.choice(LABELS)))
        for i, truth in enumerate(truths)
    ]


def sweep_of(rows: Sequence[SweepRow], **more: object) -> SweepFile:
    """Return a sweep file over some rows."""
    fields = {
        "name": "made-up",
        "title": "A made-up sweep",
        "preset": "v2-perception-only",
        "columns": ["Row"],
        "scores": [ACCURACY],
        "rows": rows,
        **more,
    }
    return SweepFile.model_validate(fields)


def rows_of(sweep: SweepFile) -> tuple[Row, ...]:
    """Return the rows of a sweep without a grid."""
    return tuple(
        Row(
            name=row.name,
            cells=row.cells or (row.name,),
            group=row.group,
            settings=dict(row.set),
            stage=row.stage,
            published=row.published,
            seeds=row.seeds or sweep.seeds,
            note=row.note,
            number=number,
        )
        for number, row in enumerate(sweep.rows)
    )


def preset_of(row: Row, seed: int) -> Preset:
    """Return a row's preset: settings that are single numbers or words."""
    overrides = [f"{path}={value}" for path, value in row.settings.items()]
    return configure(preset("v2-perception-only"), [*overrides, f"seed={seed}"])


def write_sweep(
    out: Path,
    sweep: SweepFile,
    done: Mapping[str, Mapping[int, Sequence[Prediction] | str]],
    *,
    scale: Scale = "full",
) -> Path:
    """Write the folder of a sweep.

    Args:
        out: The folder.
        sweep: What was begun.
        done: Row -> seed -> its replies, or why it failed; what is not there is open.
        scale: Of the sweep.
    """
    rows = rows_of(sweep)
    trials = tuple(
        BegunTrial(
            row=row.name,
            seed=seed,
            stage=row.stage,
            run_key=f"{row.name}-{seed}",
            preset=preset_of(row, seed),
        )
        for row in rows
        for seed in row.seeds
    )
    out.mkdir(parents=True, exist_ok=True)
    begun = Begun(
        file="made-up.yaml",
        text="name: made-up\n",
        scale=scale,
        manifest="corpus.parquet",
        manifest_sha256=None,
        store="store",
        sweep=sweep,
        rows=rows,
        trials=trials,
    )
    begin(out, begun)
    for trial in trials:
        came_to = done.get(trial.row, {}).get(trial.seed)
        if came_to is None:
            continue
        if isinstance(came_to, str):
            fail(out, [trial], "train", came_to)
            continue
        folder = out / "trials" / trial.name
        folder.mkdir(parents=True)
        write_predictions(folder / "predictions.jsonl", came_to)
        write_result(
            out,
            TrialResult(
                row=trial.row,
                seed=trial.seed,
                run_key=trial.run_key,
                status="ok",
                scores={c.name: score_of({"test": side_of(came_to, c)}) for c in sweep.scores},
                predictions={
                    c.name: f"trials/{trial.name}/predictions.jsonl" for c in sweep.scores
                },
                n_trainable=71_536_387,
                spec_ids={"audio": "audio-0123456789ab"},
                train_s=12.5,
                score_s=3.0,
            ),
        )
    return out
