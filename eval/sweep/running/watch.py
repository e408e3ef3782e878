"""Looking at a sweep: how far each row is, what runs, how long it will take.

All of it is read from the sweep's folder, so the process that leads a sweep and one that only looks on,
on any machine, see the same.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cache.errors import EmocacheError
from cache.schema import decode_json
from eval.progress import human_time
from eval.sweep.running.at_work import TOKENS, AtWork, is_held, leader, read_at_work
from eval.sweep.running.tokens import waiting_rows
from eval.sweep.schema import ScoreColumn, TrialResult
from eval.sweep.state import STEPS, Begun, BegunTrial, Step, is_settled, read_result, run_folder
from train.running.run import RunInfo

logger = logging.getLogger(__name__)

State = Literal["open", "at work", "done", "failed"]

_EVERY_S = 1.0
_LINE_EVERY_S = 30.0
_STYLES: Mapping[State, str] = {"open": "dim", "at work": "cyan", "done": "", "failed": "red"}
_HEADINGS: Mapping[Step, str] = {"extract": "tokens", "train": "training", "score": "scores"}


@dataclass(frozen=True)
class StepLook:
    """How a step of a trial is."""

    state: State
    text: str = ""


@dataclass(frozen=True)
class TrialLook:
    """How a trial is."""

    trial: BegunTrial
    steps: Mapping[Step, StepLook]
    result: TrialResult | None
    """Once it is settled."""

    @property
    def state(self) -> State:
        """Of the trial as a whole."""
        if self.result is not None:
            return "failed" if self.result.status == "failed" else "done"
        at_work = any(step.state == "at work" for step in self.steps.values())
        return "at work" if at_work else "open"


@dataclass(frozen=True)
class Look:
    """How a sweep is at one moment."""

    trials: tuple[TrialLook, ...]
    at_work: Mapping[str, AtWork]
    """Run key, or `tokens` -> what its process does."""
    leader: str | None
    """Who leads; None: nobody."""
    left_s: float | None
    """About how long the rest takes; None: nothing to go by."""

    def count(self) -> Counter[State]:
        """Count the trials by their state."""
        return Counter(trial.state for trial in self.trials)


def look_at(out: Path, begun: Begun, names: Collection[str] | None = None) -> Look:
    """Look at a sweep once.

    Args:
        out: Its folder.
        begun: What it was begun as.
        names: Trials to look at; None: all.

    Raises:
        SchemaError: A file of the sweep is damaged.
    """
    chosen = [trial for trial in begun.trials if names is None or trial.name in names]
    said = {key: one for key, one in read_at_work(out).items() if is_held(out, key)}
    infos = {key: _info(out, key) for key in dict.fromkeys(trial.run_key for trial in chosen)}
    is_led = leader(out)
    tokens = said.get(TOKENS)
    waiting = waiting_rows(out) if tokens is not None else ()
    trials = []
    for trial in chosen:
        result = read_result(out, trial.name)
        settled = result if is_settled(result, begun.sweep.scores) else None
        steps = (
            _settled_steps(settled, begun.sweep.scores)
            if settled is not None
            else _open_steps(
                trial,
                said.get(trial.run_key),
                infos[trial.run_key],
                tokens if trial.row in waiting else None,
                are_tokens_ready=tokens is None and (is_led is not None or trial.run_key in said),
            )
        )
        trials.append(TrialLook(trial, steps, settled))
    return Look(tuple(trials), said, is_led, _left_s(trials, said, infos))


def _info(out: Path, run_key: str) -> RunInfo | None:
    path = run_folder(out, run_key) / "run.json"
    try:
        return decode_json(RunInfo, path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def _settled_steps(result: TrialResult, scores: Sequence[ScoreColumn]) -> dict[Step, StepLook]:
    if result.status == "ok":
        values = " ".join(f"{100 * result.scores[column.name]:.1f}" for column in scores)
        trained = "" if result.train_s is None else human_time(result.train_s)
        return {
            "extract": StepLook("done", "ready"),
            "train": StepLook("done", trained or "done"),
            "score": StepLook("done", values),
        }
    at = STEPS.index(result.failed_step or "train")
    return {
        step: StepLook("done", "ready" if step == "extract" else "done")
        if number < at
        else StepLook("failed", "failed")
        if number == at
        else StepLook("open")
        for number, step in enumerate(STEPS)
    }


def _open_steps(
    trial: BegunTrial,
    said: AtWork | None,
    info: RunInfo | None,
    tokens: AtWork | None,
    *,
    are_tokens_ready: bool,
) -> dict[Step, StepLook]:
    steps: dict[Step, StepLook] = {step: StepLook("open") for step in STEPS}
    if tokens is not None:
        return {**steps, "extract": StepLook("at work", _share(tokens, "encoding"))}
    if are_tokens_ready or info is not None:
        steps["extract"] = StepLook("done", "ready")
    if said is not None and said.step == "train":
        words = [_share(said, said.stage) if said.stage else "starting", said.note]
        steps["train"] = StepLook("at work", " ".join(word for word in words if word))
    elif _is_trained(trial, info):
        assert info is not None
        steps["train"] = StepLook("done", human_time(sum(info.seconds.values())))
        if said is not None and said.trial == trial.name:
            steps["score"] = StepLook("at work", f"{said.n_done} replies")
    elif info is not None:
        steps["train"] = StepLook("open", "begun")
    return steps


def _share(said: AtWork, what: str) -> str:
    return f"{what} {said.n_done / said.n_total:.0%}" if said.n_total else what


def _is_trained(trial: BegunTrial, info: RunInfo | None) -> bool:
    return info is not None and {s.name for s in trial.preset.stages} <= {*info.finished}


def _left_s(
    trials: Sequence[TrialLook], said: Mapping[str, AtWork], infos: Mapping[str, RunInfo | None]
) -> float | None:
    """Estimate how long the rest takes: by the steps that took their time so far, in this sweep."""
    tokens = said.get(TOKENS)
    encode_s = 0.0
    if tokens is not None:
        each_s = _each_s(tokens)
        if each_s is None:
            return None
        encode_s = (tokens.n_total - tokens.n_done) * each_s
    n_steps, train_s = 0, 0.0
    for trial in {one.trial.run_key: one.trial for one in trials}.values():
        info, now = infos[trial.run_key], said.get(trial.run_key)
        if info is not None and _is_trained(trial, info):
            n_steps += _n_steps(trial)
            train_s += sum(info.seconds.values())
        elif now is not None and now.step == "train" and (each_s := _each_s(now)) is not None:
            n_steps += now.n_done - now.n_before
            train_s += (now.n_done - now.n_before) * each_s
    left = {one.trial.run_key: one.trial for one in trials if one.result is None}
    n_left = 0
    for key, trial in left.items():
        now = said.get(key)
        if not _is_trained(trial, infos[key]):
            n_left += _n_steps(trial) - (now.n_done if now is not None else 0)
    if n_left and not n_steps:
        return None
    scored = [
        one.result.score_s
        for one in trials
        if one.result is not None and one.result.score_s is not None
    ]
    n_open = sum(one.result is None for one in trials)
    score_s = n_open * sum(scored) / len(scored) if scored else 0.0
    busy = max(1, sum(key != TOKENS for key in said))
    return encode_s + ((n_left * train_s / n_steps if n_left else 0.0) + score_s) / busy


def _n_steps(trial: BegunTrial) -> int:
    return sum(stage.n_steps for stage in trial.preset.stages)


def _each_s(said: AtWork) -> float | None:
    """Return the time of one of the things that a process counts."""
    n = said.n_done - said.n_before
    return (time.time() - said.started) / n if n > 0 else None


# ---------------------------------------------------------------------------- how it is shown


def panel(begun: Begun, look: Look, n_lines: int | None = None) -> Group:
    """Return a view of a sweep: a bar, and a line per trial.

    Args:
        begun: What it was begun as.
        look: How it is.
        n_lines: Most lines of trials; of more, those that are at work or failed come first.
    """
    counts = look.count()
    n_settled = counts["done"] + counts["failed"]
    head = Table.grid(padding=(0, 2))
    head.add_row(
        ProgressBar(total=max(1, len(look.trials)), completed=n_settled, width=24),
        Text(f"{n_settled} of {len(look.trials)} trials", style="bold"),
        Text(f"{counts['failed']} failed" if counts["failed"] else "", style="red"),
        Text(_how_long(look), style="dim"),
    )
    shown = _chosen(look.trials, n_lines)
    several = len({one.trial.seed for one in look.trials}) > 1
    lines = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for heading in ("row", *(["seed"] if several else []), *_HEADINGS.values()):
        lines.add_column(heading, no_wrap=True, overflow="ellipsis")
    for one in shown:
        cells = [Text(one.trial.row, style="bold" if one.state == "at work" else "")]
        if several:
            cells.append(Text(str(one.trial.seed)))
        for step in STEPS:
            found = one.steps[step]
            cells.append(Text(found.text or "·", style=_STYLES[found.state]))
        lines.add_row(*cells)
    parts: list[RenderableType] = [
        Text(f"{begun.sweep.title} ({begun.scale} scale)", style="bold"),
        head,
        lines,
    ]
    if len(shown) < len(look.trials):
        parts.append(Text(f"and {len(look.trials) - len(shown)} more", style="dim"))
    for one in look.trials:
        if one.result is not None and one.result.status == "failed":
            parts.append(Text(f"{one.trial.name}: {one.result.reason}", style="red"))
    return Group(*parts)


def line(look: Look) -> str:
    """Return the state of a sweep in one line, for a log."""
    counts = look.count()
    names = {one.trial.run_key: one.trial.name for one in look.trials if one.result is None}
    doing = [
        f"{said.trial or names.get(key, key)}: {_share(said, said.stage or said.step)}"
        for key, said in look.at_work.items()
    ]
    parts = [f"{counts['done']} of {len(look.trials)} trials done", f"{counts['failed']} failed"]
    return "; ".join([", ".join(parts), *doing, *([_how_long(look)] if _how_long(look) else [])])


def _how_long(look: Look) -> str:
    return f"about {human_time(look.left_s)} left" if look.left_s else ""


def _chosen(trials: Sequence[TrialLook], n_lines: int | None) -> list[TrialLook]:
    """Return as many trials as fit, in their order."""
    if n_lines is None or len(trials) <= n_lines:
        return [*trials]
    ranks: Mapping[State, int] = {"at work": 0, "failed": 1, "open": 2, "done": 3}
    by_rank = sorted(range(len(trials)), key=lambda number: ranks[trials[number].state])
    return [trials[number] for number in sorted(by_rank[: max(1, n_lines)])]


class SweepView:
    """Looks at a sweep every second, and shows what it saw; on no terminal, a line now and then."""

    def __init__(
        self, console: Console, out: Path, begun: Begun, names: Collection[str], live: Live | None
    ) -> None:
        """Show nothing yet; use `sweep_view`."""
        self._console, self._out, self._begun, self._names = console, out, begun, names
        self._live = live
        self._looked_s = self._spoke_s = time.monotonic()
        found = look_at(out, begun, names)
        self._told = {one.trial.name for one in found.trials if one.result is not None}

    def tick(self) -> None:
        """Look again, if it is time to."""
        now_s = time.monotonic()
        if now_s - self._looked_s < _EVERY_S:
            return
        self._looked_s = now_s
        try:
            found = look_at(self._out, self._begun, self._names)
        except EmocacheError as error:  # the work itself goes on, and may not notice
            logger.debug("the live view could not look: %s", error)
            return
        if self._live is not None:
            n_lines = max(3, self._console.height - 6)
            self._live.update(panel(self._begun, found, n_lines), refresh=True)
            return
        self.tell(found)
        if now_s - self._spoke_s >= _LINE_EVERY_S:
            self._spoke_s = now_s
            logger.info("%s", line(found))

    def tell(self, found: Look) -> None:
        """Say of each trial once what it came to."""
        for one in found.trials:
            if one.result is None or one.trial.name in self._told:
                continue
            self._told.add(one.trial.name)
            if one.result.status == "failed":
                step = one.result.failed_step
                logger.warning("%s failed (%s): %s", one.trial.name, step, one.result.reason)
            else:
                scores = ", ".join(f"{k} {100 * v:.1f}" for k, v in one.result.scores.items())
                logger.info("%s: %s", one.trial.name, scores)


@contextmanager
def sweep_view(
    console: Console, out: Path, begun: Begun, names: Collection[str]
) -> Iterator[Callable[[], None]]:
    """Show some trials of a sweep while it runs; yields what is to be called now and then."""
    if not console.is_terminal:
        view = SweepView(console, out, begun, names, None)
        yield view.tick
        view.tell(look_at(out, begun, names))
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        view = SweepView(console, out, begun, names, live)
        live.update(panel(begun, look_at(out, begun, names), max(3, console.height - 6)))
        yield view.tick
