"""Ratings of a judge as sides of a comparison: a file that `emocache judge` wrote, clip by clip."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from cache.errors import PredictionError
from eval.judging.results import EmerScore, Judged, LexicalScore, MmeScore, read_judged
from eval.results.sides import ComparedRun, Run, Side, Unit
from eval.scoring.result import Item
from eval.scoring.sources import PREDICTIONS
from eval.scoring.tally import Floats, Tally

KINDS: Final = ("emer", "mme-emotion")
"""Names of the files in a folder of ratings, without `.json`."""


def is_judged(path: Path) -> bool:
    """True for a result of `emocache judge`, and for a folder that holds some and no predictions."""
    if path.is_dir():
        return any(_files(path)) and not (path / PREDICTIONS).exists()
    if path.suffix != ".json" or not path.is_file():
        return False
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return False  # not JSON as a whole; whoever reads predictions says what is wrong
    return isinstance(found, dict) and "kind" in found


def read_judged_run(path: Path, name: str) -> Run:
    """Read ratings as a run; each score of Table 5 or 6 is a set.

    Args:
        path: A result of `emocache judge emer` or `mme-emotion`, or the folder of such results.
        name: What to call the run.

    Raises:
        PredictionError: No such result, or no clip in it is rated.
    """
    files = _files(path) if path.is_dir() else [path]
    results = []
    for file in files:
        found = read_judged(file)
        if isinstance(found, LexicalScore):
            raise PredictionError(
                f"{file}: a lexical overlap, which is not kept clip by clip. Compare what a judge rated: "
                f"{' or '.join(f'{kind}.json' for kind in KINDS)}."
            )
        results.append(found)
    sides = {side_name: side for one in results for side_name, side in _sides(one).items()}
    if not sides:
        raise PredictionError(f"{path}: no clip is rated, so there is nothing to compare.")
    digests = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    told = [f"{file.name} sha256:{digest}" for file, digest in zip(files, digests, strict=True)]
    facts = {
        f"{one.kind} {what}": value
        for one in results
        for what, value in (
            ("run", one.run or "not known"),
            ("replies", one.file or "not known"),
            ("judge", f"{one.judge.model} ({one.judge.version})"),
            ("prompts", ", ".join(one.judge.prompts)),
            ("repeats", str(one.repeats)),
        )
    }
    return Run(
        ComparedRun(
            name=name,
            path=str(path),
            file=", ".join(told),
            n=sum(one.offered for one in results),
            facts=facts,
        ),
        sides,
        tuple(results),
    )


def _files(folder: Path) -> list[Path]:
    return [path for kind in KINDS if (path := folder / f"{kind}.json").is_file()]


def _sides(one: Judged) -> dict[str, Side]:
    """Return a side per score that has a rated clip."""
    rules = {"references": one.references or "not known"}
    found: dict[str, Side | None]
    if isinstance(one, EmerScore):
        found = {
            f"emer: {what}": _side(
                f"EMER, {what} overlap", "mean rating, 1 to 10", "rating", rules,
                {clip.id: (getattr(clip, what), ()) for clip in one.clips},
            )
            for what in ("clue", "label")
        }  # fmt: skip
    else:
        found = _mme_sides(one, {**rules, "alpha": str(one.alpha)})
    return {name: side for name, side in found.items() if side is not None}


def _mme_sides(one: MmeScore, rules: Mapping[str, str]) -> dict[str, Side | None]:
    from eval.judging.mme import chain_of_thought, reasoning, recognition

    def both(marks: Sequence[float]) -> float:
        return chain_of_thought(marks, one.alpha)

    scores: dict[str, tuple[str, Callable[[Sequence[float]], float]]] = {
        "rec": ("recognition score", recognition),
        "rea": ("reasoning score", reasoning),
        "cot": ("chain-of-thought score", both),
    }
    return {
        f"mme-emotion: {short}": _side(
            f"MME-Emotion, {title}", "mean over samples", "percent", rules,
            {
                sample.id: (
                    [None if marks is None else score(marks) for marks in sample.marks],
                    sample.truth,
                )
                for sample in one.samples
            },
        )
        for short, (title, score) in scores.items()
    }  # fmt: skip


def _side(
    title: str,
    metric: str,
    unit: Unit,
    rules: Mapping[str, str],
    rated: Mapping[str, tuple[Sequence[float | None], tuple[str, ...]]],
) -> Side | None:
    """Return a side of the clips that are rated, each by the mean of its repeats."""
    items, means = [], []
    for name, (ratings, truth) in rated.items():
        told = [rating for rating in ratings if rating is not None]
        if told:
            value = float(np.mean(told))
            shown = f"{value:.2f}"
            items.append(Item(name, None, truth, shown, (shown,), "rated"))
            means.append(value)
    if not items:
        return None
    n_unrated = len(rated) - len(items)
    return Side(
        title=title,
        metric=metric,
        corpus="",
        items=tuple(items),
        tally=Tally(
            columns=("ratings", "clips"),
            values=np.stack([means, np.ones(len(means))], axis=1),
            score=_mean,
            parts=lambda _sums: {},
            scored=np.ones(len(means), dtype=bool),
        ),
        is_exact=False,
        rules=rules,
        notes=(f"{n_unrated} clips without a rating are left out",) if n_unrated else (),
        unit=unit,
    )


def _mean(sums: Floats) -> Floats:
    found: Floats = sums[..., 0] / sums[..., 1]
    return found
