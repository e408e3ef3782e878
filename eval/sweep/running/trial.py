"""A run of a sweep in a process of its own: train it, then score the trials that share it.

::

    python -m eval.sweep.running.trial OUT/at-work/KEY.order.json

What is finished is not done again, so the same order may be given any number of times. What fails is
written down as the result of its trials; a process that dies without a word leaves that to its starter.
"""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import (
    EmocacheError,
    ManifestError,
    PredictionError,
    SpecMismatchError,
    StoppedError,
)
from cache.schema import decode_json
from eval.sweep.running.at_work import Order, Telling, end_with, holding, log_plainly, speak_to
from eval.sweep.schema import ScoreColumn, TrialResult
from eval.sweep.state import (
    LOG_FILE,
    BegunTrial,
    Step,
    copy_log,
    fail,
    is_settled,
    read_result,
    run_folder,
    trial_folder,
    work_file,
    write_result,
)

if TYPE_CHECKING:
    from cache.manifest import Manifest
    from cache.store import TokenStore
    from eval.generate import TrainedRun
    from train.running.run import RunInfo

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.jsonl"
DONE, FAILED, AGAIN, STOPPED = 0, 1, 75, 130
"""Exit codes: nothing is left; the extraction failed; start me again for the trials that are left; a
signal came."""

_LONGEST = {"full": 200, "demo": 24}
"""Tokens of a reply at most: as in the reference; enough for a label of the tiny model."""
_LONGEST_JOINT = 100
"""The same at demo scale where reasoning comes before the label."""


def main(argv: Sequence[str]) -> int:
    """Do what an order says; return the exit code."""
    path = Path(argv[0])
    return run_order(decode_json(Order, path.read_bytes(), str(path)))


def child(order_file: str, alive: Connection) -> None:
    """Be a process of `eval.sweep.running.run`; for multiprocessing.

    Args:
        order_file: What to do.
        alive: Is closed when the starter ends, however it ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the starter's, who tells us
    threading.Thread(target=end_with, args=(alive,), daemon=True).start()
    sys.exit(main([order_file]))


def run_order(order: Order) -> int:
    """Train and score what is left of an order; return the exit code."""
    out = Path(order.out)
    with holding(out, order.run_key):
        left = [t for t in order.trials if not is_settled(read_result(out, t.name), order.scores)]
        if not left:
            return DONE
        telling = Telling(out, order.run_key)
        telling.begin("train", n_total=sum(stage.n_steps for stage in order.preset.stages))
        speak_to(work_file(out, order.run_key, "log"))
        log_plainly()
        names = ", ".join(trial.name for trial in left)
        logger.info("process %d trains run %s for %s", os.getpid(), order.run_key, names)
        try:
            code = _train_and_score(order, left, telling)
        except StoppedError as stop:
            logger.info("stopped: %s", stop)
            return STOPPED
        telling.end()
        return code


def _train_and_score(order: Order, left: Sequence[BegunTrial], telling: Telling) -> int:
    from cache.manifest import read_manifest
    from cache.store import TokenStore

    out = Path(order.out)
    with _recorded(out, left, "train") as training:
        device = _device(order)
        manifest = read_manifest(Path(order.manifest))
        store = TokenStore.open(order.store)
        info = _train(order, manifest, store, device, telling)
    if training.failed:
        for trial in left:
            copy_log(out, order.run_key, trial.name)
        return DONE
    for number, trial in enumerate(left):
        telling.begin("score", trial=trial.name)
        copy_log(out, order.run_key, trial.name)
        speak_to(trial_folder(out, trial.name) / LOG_FILE)
        with _recorded(out, [trial], "score") as scoring:
            result = _score(order, trial, info, manifest, store, device, telling)
            logger.info("%s: %s", trial.name, result.scores)
        speak_to(work_file(out, order.run_key, "log"))
        if scoring.is_bug and number + 1 < len(left):
            return AGAIN
    return DONE


class _Outcome:
    """How a step ended."""

    failed = False
    is_bug = False
    """By an error that nobody foresaw: this process may be of no more use."""


@contextmanager
def _recorded(out: Path, trials: Sequence[BegunTrial], step: Step) -> Iterator[_Outcome]:
    """Write an error inside this block down as the result of some trials."""
    outcome = _Outcome()
    try:
        yield outcome
    except StoppedError:
        raise
    except EmocacheError as error:
        outcome.failed = True
        logger.error("%s", error)
        fail(out, trials, step, str(error))
    except Exception as error:  # the boundary of a row: the others go on
        outcome.failed = outcome.is_bug = True
        logger.exception("%s failed", step)
        told = str(error).strip().splitlines()
        fail(out, trials, step, f"{type(error).__name__}: {told[0] if told else 'no message'}")


def _train(
    order: Order, manifest: Manifest, store: TokenStore, device: str, telling: Telling
) -> RunInfo:
    """Train a run to its end, if it is not there yet."""
    from train.running.run import read_run

    run = run_folder(Path(order.out), order.run_key)
    if is_trained(run, order):
        return read_run(run)[1]
    from train.loop import train

    before = dict.fromkeys((stage.name for stage in order.preset.stages), 0)
    total = {stage.name: stage.n_steps for stage in order.preset.stages}
    seen: dict[str, int] = {}
    if (run / "run.json").is_file():
        seen = {name: total[name] for name in read_run(run)[1].finished if name in total}
    n_before = [sum(seen.values())]

    def on_step(stage: str, step: int, n_steps: int, latest: dict[str, float]) -> None:
        if stage not in seen and before[stage] == 0:
            n_before[0] += step - 1  # of a continued stage, what was done before
        before[stage] = seen[stage] = step
        telling.progress(
            stage=stage,
            n_done=sum(seen.values()),
            n_before=n_before[0],
            note=f"loss {latest['loss']:.3f}" if "loss" in latest else "",
        )

    done = train(order.preset, manifest, Path(order.manifest), store, run, on_step, device=device)
    logger.info("trained %d steps", done.n_steps)
    return done.info


def is_trained(run: Path, order: Order) -> bool:
    """True if all stages of a run are finished."""
    from train.running.run import read_run

    if not (run / "run.json").is_file():
        return False
    _, info = read_run(run)
    return {stage.name for stage in order.preset.stages} <= {*info.finished}


# ---------------------------------------------------------------------------- scores


def _score(
    order: Order,
    trial: BegunTrial,
    info: RunInfo,
    manifest: Manifest,
    store: TokenStore,
    device: str,
    telling: Telling,
) -> TrialResult:
    """Ask the model of a trial, and score what it says."""
    from eval.generate import load_run
    from eval.sweep.tables.statistics import read_sides, score_of

    out, folder = Path(order.out), trial_folder(Path(order.out), trial.name)
    started = time.monotonic()
    run = run_folder(out, order.run_key)
    trained = load_run(run, device, header=manifest.header, stage=trial.stage)
    spec_ids = {name: spec.spec_id for name, spec in trained.preset.tokens.by_input().items()}
    result = read_result(out, trial.name) or TrialResult(
        row=trial.row, seed=trial.seed, run_key=order.run_key, status="ok"
    )
    if result.scores and result.spec_ids != spec_ids:  # its run was removed, and trained again
        raise SpecMismatchError(
            f"{folder}: has scores of a training on tokens {result.spec_ids}, and the run is now trained on "
            f"{spec_ids}. Remove the folder to have the row scored anew."
        )
    result = result.model_copy(
        update={
            "n_trainable": sum(info.trainable.values()),
            "spec_ids": spec_ids,
            "train_s": sum(info.seconds.values()),
        }
    )
    before_s = result.score_s or 0.0
    missing = [column for column in order.scores if column.name not in result.scores]
    earlier = {
        column: out / result.predictions[column.name]
        for column in order.scores
        if column.name in result.scores and column.name in result.predictions
    }
    asked = _Asked(order, trained, manifest, store, folder, telling, missing, earlier)
    wheels = None if order.wheels is None else Path(order.wheels)
    faults: list[EmocacheError] = []
    for column in missing:
        try:
            place = asked.replies(column)
            score = score_of(read_sides(place, column, wheels=wheels))
        except StoppedError:
            raise
        except EmocacheError as error:  # the other columns can be scored
            logger.error("score %s: %s", column.name, error)
            faults.append(error)
            continue
        result = result.model_copy(
            update={
                "scores": {**result.scores, column.name: score},
                "predictions": {**result.predictions, column.name: str(place.relative_to(out))},
                "score_s": before_s + time.monotonic() - started,
            }
        )
        write_result(out, result)  # what fails or is killed from here on does not undo it
    if faults:
        raise type(faults[0])(" Besides: ".join(dict.fromkeys(map(str, faults))))
    return result


class _Asked:
    """Asks the model of a trial; columns that need the same replies share them."""

    def __init__(
        self,
        order: Order,
        trained: TrainedRun,
        manifest: Manifest,
        store: TokenStore,
        folder: Path,
        telling: Telling,
        missing: Sequence[ScoreColumn],
        earlier: Mapping[ScoreColumn, Path],
    ) -> None:
        """Ask nothing yet.

        Args:
            order: What is to be done.
            trained: The model.
            manifest: Whom to ask about.
            store: Their tokens.
            folder: Of the trial.
            telling: How far it is.
            missing: Columns that will be asked for.
            earlier: Finished columns -> where their replies are.
        """
        self._order, self._trained = order, trained
        self._manifest, self._store = manifest, store
        self._folder, self._telling = folder, telling
        self._n_done = 0
        self._written = {
            place for column, place in earlier.items() if column.kind == "split" and place.exists()
        }
        self._benchmarks = [column for column in missing if column.kind == "benchmark"]
        self._folders = list(
            dict.fromkeys(p for column, p in earlier.items() if column.kind == "benchmark")
        )
        """Of finished columns."""
        self._places: dict[str, Path] = {}
        """Set -> the folder that holds its replies, once all are asked."""

    def replies(self, column: ScoreColumn) -> Path:
        """Return the predictions that a column scores: a file, or the folder of a benchmark."""
        if column.kind == "benchmark":
            return self._benchmark(column)
        reading = "" if column.reading == "label" else f"-{column.reading}"
        path = self._folder / f"{column.split}-{column.task}{reading}" / PREDICTIONS_FILE
        if path not in self._written:
            self._split(column, path)
            self._written.add(path)
        return path

    def _split(self, column: ScoreColumn, path: Path) -> None:
        from eval.evaluate import by_last_word
        from eval.generate import generate
        from eval.predictions import write_predictions
        from train.batches.reading import ViewReader, usable
        from train.text.tasks import TASK_TABLE, check_task
        from train.text.wording import Wording

        task = TASK_TABLE[check_task(column.task)]
        assert task.label is not None, "columns are checked when a sweep file is read"
        chosen = self._manifest.select(column.split)
        reader = ViewReader(self._store, self._trained.preset)
        records = [
            record
            for record in usable(chosen, reader, self._trained.preset.data)
            if record.labels_of(task.label)
        ]
        if not records:
            raise ManifestError(
                f"split {column.split!r}: none of its {len(chosen)} records has a label in "
                f"'{task.label}' and tokens to score"
            )
        longest = _LONGEST[self._order.scale]
        found = list(
            generate(
                self._trained,
                self._store,
                records,
                task=column.task,
                max_new_tokens=max(longest, _LONGEST_JOINT) if task.joint else longest,
                batch_size=self._order.batch_size,
                on_batch=self._count,
            )
        )
        if column.reading == "last-word":
            wording = Wording(self._trained.preset, self._manifest.header)
            spaces = {record.uid: wording.space(record, task.label) for record in records}
            found = [by_last_word(p, spaces[p.uid]) for p in found]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_predictions(path, found)

    def _benchmark(self, column: ScoreColumn) -> Path:
        from eval.predictions import read_predictions, write_predictions

        if not self._places:
            self._places = self._ask_sets()
        folders = dict.fromkeys(self._places[name] for name in column.sets)
        if len(folders) == 1:
            return next(iter(folders))
        # Scores are read from one folder: replies of several starts are put together for that.
        joined = self._folder / f"benchmark-{_digest(column.sets)}-joined"
        found = {folder: read_predictions(folder / PREDICTIONS_FILE) for folder in folders}
        joined.mkdir(parents=True, exist_ok=True)
        write_predictions(
            joined / PREDICTIONS_FILE,
            (p for name in column.sets for p in found[self._places[name]] if p.benchmark == name),
        )
        return joined

    def _ask_sets(self) -> dict[str, Path]:
        """Ask all sets that no finished column has; return where the replies of each set are."""
        from eval.asking.ask import ask_benchmarks
        from eval.predictions import read_predictions

        places: dict[str, Path] = {}
        for folder in self._folders:
            try:
                found = read_predictions(folder / PREDICTIONS_FILE)
            except PredictionError as error:  # they are asked again
                logger.warning("%s", error)
                continue
            for prediction in found:
                if prediction.benchmark is not None:
                    places.setdefault(prediction.benchmark, folder)
        # Asked together, a set that several columns average is asked once, and questions about one clip
        # share its prefix. `ask_benchmarks` goes on where it was killed.
        wanted = dict.fromkeys(name for column in self._benchmarks for name in column.sets)
        sets = tuple(name for name in wanted if name not in places)
        if sets:
            folder = self._folder / f"benchmark-{_digest(sets)}"
            ask_benchmarks(
                self._trained,
                self._store,
                self._manifest,
                sets,
                folder,
                batch_size=self._order.batch_size,
                max_new_tokens=_LONGEST[self._order.scale],
                on_replies=self._count,
            )
            places.update(dict.fromkeys(sets, folder))
        return places

    def _count(self, n: int) -> None:
        self._n_done += n
        self._telling.progress(n_done=self._n_done)


def _digest(sets: Sequence[str]) -> str:
    return hashlib.sha256(",".join(sets).encode()).hexdigest()[:8]


# ---------------------------------------------------------------------------- this process


def _device(order: Order) -> str:
    """Return where a run is computed: of several GPUs, each process of a machine takes its own."""
    import torch

    from train.running.parallel import choose_device

    if order.n_threads is not None:
        torch.set_num_threads(order.n_threads)
    device = choose_device(order.device)
    if device.type == "cuda" and order.device in ("auto", "cuda"):
        return f"cuda:{order.slot % torch.cuda.device_count()}"
    return str(device)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
