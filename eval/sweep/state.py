"""The folder of a sweep: what was begun, what each trial came to.

::

    OUT/sweep.json                 what was begun: the file, the scale, the corpus, every trial's preset
    OUT/runs/KEY/                  a training, see `train.running.run`
    OUT/trials/ROW@SEED/           result.json, log.txt, predictions
    OUT/at-work/                   who does what, see `eval.sweep.running.at_work`

Each file is whole or not there. A trial is done when its result.json has every score, a training when
`train` says so, an extraction when the store lacks nothing: so a sweep that was killed anywhere goes on
from what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cache.errors import SchemaError, SpecMismatchError, StoreError
from cache.files import write_aside, write_text_aside
from cache.schema import Model, decode_json
from cache.spec import TokenSpec, differences
from eval.sweep.schema import Row, Scale, ScoreColumn, SweepFile, Trial, TrialResult
from train.config import Input, Preset

SWEEP_FILE = "sweep.json"
DEMO_SUFFIX = "-demo"
"""Of the default folder at demo scale."""
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"

AT_WORK, LOCK_FILE = "at-work", ".lock"
_RUNS, _TRIALS = "runs", "trials"
_OWN = frozenset({_RUNS, _TRIALS, AT_WORK, LOCK_FILE, "demo", "store"})
"""Names that may be there before sweep.json is."""
_N_TOLD = 6
"""Differences that a refusal names."""

Step = Literal["extract", "train", "score"]
STEPS: tuple[Step, ...] = ("extract", "train", "score")


class BegunTrial(Model):
    """A trial, and all that its numbers depend on."""

    row: str
    seed: int
    stage: str | None
    """Behind which it is scored; None: the last."""
    run_key: str
    preset: Preset

    @property
    def name(self) -> str:
        """The row with its seed: folder of its scores."""
        return f"{self.row}@{self.seed}"


class Begun(Model):
    """What a sweep was begun as: OUT/sweep.json."""

    schema_version: Literal[1] = 1
    file: str
    """Path of the sweep file, or the name of a shipped one."""
    text: str
    """Its content."""
    scale: Scale
    manifest: str | None
    """None at demo scale, whose corpus the sweep makes itself."""
    manifest_sha256: str | None
    store: str
    """Where the tokens are; another store with the same tokens gives the same numbers."""
    sweep: SweepFile
    """The file, decoded, with the score columns of its scale."""
    rows: tuple[Row, ...]
    trials: tuple[BegunTrial, ...]


# ---------------------------------------------------------------------------- where things are


def run_folder(out: Path, run_key: str) -> Path:
    """Return the folder of a training."""
    return out / _RUNS / run_key


def trial_folder(out: Path, trial: str) -> Path:
    """Return the folder of a trial's scores, by its name."""
    return out / _TRIALS / trial


def work_file(out: Path, key: str, ending: str) -> Path:
    """Return a file about who works on a run or on the tokens: `json`, `order.json`, `lock`, `log`."""
    return out / AT_WORK / f"{key}.{ending}"


# ---------------------------------------------------------------------------- what was begun


def read_begun(out: Path) -> Begun:
    """Read what was begun in a folder.

    Raises:
        SchemaError: No sweep was, or its file is damaged.
    """
    path = out / SWEEP_FILE
    if not path.is_file():
        demo = out.with_name(out.name + DEMO_SUFFIX)
        hint = (
            f"At demo scale one was, in {demo}: give --scale demo."
            if (demo / SWEEP_FILE).is_file()
            else "Start one with: emocache sweep FILE --out FOLDER, or give the folder of one that was."
        )
        raise SchemaError(f"{out}: no sweep was begun here (there is no {SWEEP_FILE}). {hint}")
    return decode_json(Begun, path.read_bytes(), str(path))


def check_begun(out: Path, wanted: Begun, *, extend: bool = False) -> Begun | None:
    """Refuse what contradicts the sweep that was begun in a folder; write nothing.

    Args:
        out: The folder of the sweep.
        wanted: What it is asked to be now.
        extend: Allow rows, seeds and scores that it did not have.

    Returns:
        What it was begun as; None: nothing is there yet.

    Raises:
        SchemaError: Another sweep, scale, corpus or setting; rows that are gone; or, without
            `extend`, new ones.
        StoreError: The folder holds something else.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise StoreError(f"{out}: is a file. Give a folder with --out.")
    if not (out / SWEEP_FILE).exists():
        foreign = sorted(path.name for path in out.iterdir() if path.name not in _OWN)
        if foreign:
            raise StoreError(
                f"{out}: holds other files ({', '.join(foreign[:3])}), and no sweep. Give a new or empty "
                "folder with --out."
            )
        return None
    known = read_begun(out)
    _refuse_contradiction(out, known, wanted)
    new = _additions(known, wanted)
    if new and not extend:
        raise SchemaError(
            f"{out}: {wanted.file} changed after this sweep began: {_few(new)}. Give --extend to add "
            "that to what is there, or another --out for a new sweep."
        )
    return known


def begin(out: Path, wanted: Begun, *, extend: bool = False) -> Begun:
    """Write down what a sweep is, or refuse what contradicts the one that was begun here.

    What changes no number, such as titles, notes and published figures, is taken over at once. Call it
    while `leading`; arguments and errors as of `check_begun`.
    """
    known = check_begun(out, wanted, extend=extend)
    if known is None or known.model_dump() != wanted.model_dump():
        write_text_aside(out / SWEEP_FILE, wanted.model_dump_json(indent=1) + "\n")
    return wanted


def _refuse_contradiction(out: Path, known: Begun, wanted: Begun) -> None:
    """Refuse what would put numbers of two kinds into one table.

    Raises:
        SchemaError: Names the differences.
    """
    told: list[str] = []
    if known.scale != wanted.scale:
        told.append(f"scale: {known.scale} there, {wanted.scale} now")
    elif known.manifest_sha256 != wanted.manifest_sha256:
        told.append(f"the manifest {wanted.manifest} is not the one that the sweep began with")
    if known.sweep.name != wanted.sweep.name:
        told.append(f"name: {known.sweep.name} there, {wanted.sweep.name} now")
    else:
        told += _changed_scores(_scored(out, known), wanted.sweep.scores)
        told += _changed_trials(known.trials, wanted.trials)
    if told:
        raise SchemaError(
            f"{out}: another sweep was begun here ({_few(told)}). Undo the change, or give another --out. "
            "To leave rows out of this start, name the others with --rows."
        )


def _scored(out: Path, known: Begun) -> list[ScoreColumn]:
    """Return the columns that some trial has a score of; what failed in all may be changed and dropped."""
    names = {name for one in results_of(out, known.trials).values() for name in one.scores}
    return [column for column in known.sweep.scores if column.name in names]


def _changed_scores(known: Sequence[ScoreColumn], wanted: Sequence[ScoreColumn]) -> Iterator[str]:
    now = {column.name: column for column in wanted}
    for column in known:
        other = now.get(column.name)
        if other is None:
            yield f"score {column.name} is gone"
            continue
        for field, (was, is_now) in differences(column, other).items():
            if field != "heading":
                yield f"score {column.name}, {field}: {was!r} there, {is_now!r} now"


def _changed_trials(known: Sequence[BegunTrial], wanted: Sequence[BegunTrial]) -> Iterator[str]:
    now = {trial.name: trial for trial in wanted}
    rows = {trial.row for trial in wanted}
    changes: dict[str, list[str]] = {}
    for trial in known:
        other = now.get(trial.name)
        if other is None:
            gone = (
                f"seed {trial.seed} of row {trial.row}" if trial.row in rows else f"row {trial.row}"
            )
            yield f"{gone} is gone"
        elif other.run_key != trial.run_key or other.stage != trial.stage:
            for change in _changed_settings(trial, other):
                changes.setdefault(change, []).append(trial.row)
    for change, names in changes.items():
        own = list(dict.fromkeys(names))
        more = f" and {len(own) - 1} more" if len(own) > 1 else ""
        yield f"row {own[0]}{more}, {change}"


def _changed_settings(known: BegunTrial, wanted: BegunTrial) -> Iterator[str]:
    """Say which settings of a trial changed, but for its preset's name and how it is computed."""
    if known.stage != wanted.stage:
        yield f"stage: {known.stage!r} there, {wanted.stage!r} now"
    left_out = {"name", "execution"}
    yield from _walk(
        "",
        known.preset.model_dump(mode="json", exclude=left_out),
        wanted.preset.model_dump(mode="json", exclude=left_out),
    )


def _walk(path: str, was: Any, now: Any) -> Iterator[str]:
    """Say where two documents differ, as overrides name it."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _walk(f"{path}.{key}" if path else key, was.get(key), now.get(key))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for number, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from _walk(f"{path}.{number}", one, other)
    elif was != now:
        yield f"{path}: {_short(was)} there, {_short(now)} now"


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _additions(known: Begun, wanted: Begun) -> list[str]:
    """Say what a sweep is asked for beyond what it was begun as."""
    names = {trial.name for trial in known.trials}
    rows = {trial.row for trial in known.trials}
    columns = {column.name for column in known.sweep.scores}
    new = [trial for trial in wanted.trials if trial.name not in names]
    said = [
        f"seed {trial.seed} of row {trial.row} is new"
        if trial.row in rows
        else f"row {trial.row} is new"
        for trial in new
    ]
    said += [f"score {c.name} is new" for c in wanted.sweep.scores if c.name not in columns]
    return list(dict.fromkeys(said))


def _few(told: Sequence[str]) -> str:
    rest = len(told) - _N_TOLD
    return "; ".join(told[:_N_TOLD]) + (f"; and {rest} more" if rest > 0 else "")


# ---------------------------------------------------------------------------- what trials came to


def read_result(out: Path, trial: str) -> TrialResult | None:
    """Read what a trial came to; None if it came to nothing yet.

    Raises:
        SchemaError: The file is damaged.
    """
    path = trial_folder(out, trial) / RESULT_FILE
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return decode_json(TrialResult, data, str(path))


def write_result(out: Path, result: TrialResult) -> None:
    """Write what a trial came to."""
    folder = trial_folder(out, f"{result.row}@{result.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text_aside(folder / RESULT_FILE, result.model_dump_json(indent=2) + "\n")


def results_of(out: Path, trials: Sequence[BegunTrial]) -> dict[str, TrialResult]:
    """Read the results that are there: trial -> result."""
    found = {trial.name: read_result(out, trial.name) for trial in trials}
    return {name: result for name, result in found.items() if result is not None}


def is_settled(result: TrialResult | None, scores: Sequence[ScoreColumn]) -> bool:
    """True of a trial that failed, or has every score that is asked for."""
    if result is None:
        return False
    return result.status == "failed" or has_all(result, scores)


def has_all(result: TrialResult, scores: Sequence[ScoreColumn]) -> bool:
    """True of a trial that has every score that is asked for."""
    return all(column.name in result.scores for column in scores)


def fail(out: Path, trials: Sequence[BegunTrial], step: Step, reason: str) -> None:
    """Write that trials failed, and why, in one line; the scores that they have stay."""
    for trial in trials:
        known = read_result(out, trial.name) or TrialResult(
            row=trial.row, seed=trial.seed, run_key=trial.run_key, status="failed"
        )
        failure = {"status": "failed", "failed_step": step, "reason": " ".join(reason.split())}
        write_result(out, known.model_copy(update=failure))


def forget_failures(out: Path, trials: Sequence[BegunTrial]) -> None:
    """Make trials that failed open again: of their results, nothing but the scores is kept."""
    for trial in trials:
        result = read_result(out, trial.name)
        if result is None or result.status != "failed":
            continue
        if result.scores:
            write_result(out, result.model_copy(update=_NO_FAILURE))
        else:
            (trial_folder(out, trial.name) / RESULT_FILE).unlink()


_NO_FAILURE: Mapping[str, Any] = {"status": "ok", "failed_step": None, "reason": None}


def check_weights(out: Path, begun: Sequence[BegunTrial], planned: Sequence[Trial]) -> None:
    """Refuse tokens of other weights than those that the scores in a folder are of.

    Presets leave digests of weights open, so a trial's settings do not tell: what a finished training
    read is compared with what the plan of this start gives to trials that read the same encoder.

    Args:
        out: The folder of the sweep.
        begun: All trials of the sweep.
        planned: Those that are to be computed, with the digests that are known.

    Raises:
        SpecMismatchError: Names the rows, the input and both specs.
    """
    now: dict[tuple[Any, ...], dict[str, tuple[str, TokenSpec]]] = {}
    presets = {trial.name: trial.preset for trial in begun}
    for trial in planned:
        filled = trial.preset.tokens.by_input()
        for name, key in _open_encoders(presets[trial.name]).items():
            digest = filled[name].encoder.weights_sha256
            if digest is not None:
                now.setdefault(key, {}).setdefault(digest, (trial.row, filled[name]))
    for known in begun:
        result = read_result(out, known.name)
        read = _read_by(out, known) if result is not None and result.scores else {}
        for name, key in _open_encoders(known.preset).items():
            there, found = read.get(name), now.get(key, {})
            if there is None or not found or there.encoder.weights_sha256 in found:
                continue
            row, spec = next(iter(found.values()))
            raise SpecMismatchError(
                f"{out}: row {known.row} has scores on {name} tokens of spec {there.spec_id}, and row {row} "
                f"would now read those of spec {spec.spec_id}, which are of other weights of the encoder "
                f"({_digest(there)} there, {_digest(spec)} now). Give the --store and --encoder-weights "
                "that the sweep began with, or another --out for these."
            )


def _open_encoders(preset: Preset) -> dict[Input, tuple[Any, ...]]:
    """Return what decides the weights of each input whose digest the preset leaves open."""
    return {
        name: (spec.stream, spec.encoder, preset.bundled_weights.get(spec.encoder.kind))
        for name, spec in preset.tokens.by_input().items()
        if not spec.is_resolved
    }


def _read_by(out: Path, trial: BegunTrial) -> dict[Input, TokenSpec]:
    """Return the stored specs that a trial's training read; empty where its folder is gone."""
    from train.running.run import read_run

    run = run_folder(out, trial.run_key)
    return read_run(run)[0].tokens.by_input() if (run / "run.json").is_file() else {}


def _digest(spec: TokenSpec) -> str:
    return f"{spec.encoder.weights_sha256}"[:12]


def copy_log(out: Path, run_key: str, trial: str) -> None:
    """Begin a trial's log with what the training that it shares said."""
    log = work_file(out, run_key, "log")
    folder = trial_folder(out, trial)
    folder.mkdir(parents=True, exist_ok=True)
    with write_aside(folder / LOG_FILE, durable=False) as aside:
        aside.write_bytes(log.read_bytes() if log.exists() else b"")
