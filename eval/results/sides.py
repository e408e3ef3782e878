"""What a run brings to a comparison: per set its items, how they count, and what made them.

Replies that were asked for a benchmark are scored by the rules of that benchmark. All others, from
`emocache evaluate` on any corpus, count as right or wrong: the label that was read, or all labels of a
task with several and nothing else, against the truth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from cache.errors import PredictionError
from cache.labels import LabelField
from cache.schema import Model
from eval.benchmarks import METRICS, Protocol
from eval.judging.results import Judged
from eval.predictions import Prediction
from eval.scoring.result import Item, Scored
from eval.scoring.rules import accuracy
from eval.scoring.sources import PREDICTIONS, read_source
from eval.scoring.tally import Tally
from train.text.tasks import TASK_TABLE

Unit = Literal["percent", "rating"]
"""How scores are shown: fractions as percent; ratings of a judge as they are."""
_NOT_KNOWN: Final = "not known"


class ComparedRun(Model):
    """One side of a comparison."""

    name: str
    """The shortest part of its path that tells it from the others, or what the user calls it."""
    path: str
    file: str
    """Name and digest of the predictions."""
    n: int
    """Replies in the file."""
    facts: dict[str, str]
    """What made the replies: run, prompts, tokens; as far as the file tells."""
    n_unlisted: int = 0
    """Replies that name no label of a list, so that nothing here can compare them."""


@dataclass(frozen=True)
class Side:
    """One run on one set."""

    title: str
    metric: str
    """In words."""
    corpus: str
    items: tuple[Item, ...]
    """In the order of the tally's rows."""
    tally: Tally
    is_exact: bool
    """Each item is right or wrong, and the score is the share of right ones."""
    rules: Mapping[str, str]
    """By what it was scored; runs with other rules do not compare."""
    notes: tuple[str, ...] = ()
    unit: Unit = "percent"


@dataclass(frozen=True)
class Run:
    """One side of a comparison with its sets."""

    facts: ComparedRun
    sides: Mapping[str, Side]
    """Name of a set -> its items. Names are benchmark ids, or `corpus: label field`; both may be
    followed by what was masked."""
    judged: tuple[Judged, ...] = ()
    """Where the sides are ratings: the results that they come from."""


def read_run(
    path: Path,
    *,
    name: str | None = None,
    task: str | None = None,
    protocol: Protocol = "paper",
    reading: str | None = None,
    truths: Path | None = None,
    wheels: Path | None = None,
    splits: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> Run:
    """Read the predictions of a run, and score every set in them.

    Args:
        path: A predictions file of either format, an evaluation's or a benchmark's folder, or the folder
            of a run with one of these.
        name: What to call it; default the name of its path.
        task: Id of the benchmark; needed for the released format, and to score replies that were asked
            for no benchmark by the rules of one.
        protocol: See `eval.scoring.score`, as the arguments below.
        reading: How much of a reply is compared.
        truths: File with true labels; needs `task`.
        wheels: Folder of the emotion wheels.
        splits: Which values of the split count.
        allow_missing: Truths without a reply count as wrong.

    Raises:
        PredictionError: No file, several, or one that cannot be scored.
    """
    from eval.scoring.score import score_file, score_predictions

    file = find_predictions(path)
    source = read_source(file)
    predictions = [row.prediction for row in source.rows if row.prediction is not None]
    facts = ComparedRun(
        name=name or unique_names([path])[0],
        path=str(path),
        file=source.file or file.name,
        n=len(source.rows),
        facts=_facts(predictions),
        n_unlisted=sum(not _is_listed(one) for one in predictions) if task is None else 0,
    )
    if truths is not None and task is None:
        raise PredictionError(
            f"{truths}: whose truths are these? A file of truths is of one set: name it with --task."
        )
    if source.kind == "released" and task is None:
        raise PredictionError(
            f"{file}: the released format does not tell which set it is of. Name it with --task, for "
            "example --task dfew."
        )
    if task is not None:
        scored = score_file(
            file, task, protocol=protocol, reading=reading, truths=truths, wheels=wheels,
            splits=splits, allow_missing=allow_missing,
        )  # fmt: skip
        return Run(facts, {task: _of_benchmark(scored)})
    sides: dict[str, Side] = {}
    for set_name, group in _groups(predictions).items():
        asked = group[0].benchmark
        if asked is not None:
            scored = score_predictions(
                group, asked, protocol=protocol, reading=reading, wheels=wheels,
                splits=splits,
            )  # fmt: skip
            sides[set_name] = _named(_of_benchmark(scored), asked, set_name)
        elif (side := _of_labels(group)) is not None:
            sides[set_name] = side
    if not sides:
        raise PredictionError(
            f"{file}: none of its {len(predictions)} replies can be scored: they are to tasks that name no "
            "label of a list, or have no truth. Replies with reasoning only are rated by `emocache judge`."
        )
    return Run(facts, sides)


def find_predictions(path: Path) -> Path:
    """Return the predictions file that a path means.

    Raises:
        PredictionError: There is none, or a folder holds several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise PredictionError(
            f"{path}: no such file or folder. Give a predictions.jsonl, or the folder of an evaluation, a "
            "benchmark or a run."
        )
    if (path / PREDICTIONS).is_file():
        return path / PREDICTIONS
    below = sorted(path.glob(f"*/{PREDICTIONS}"))
    if len(below) == 1:
        return below[0]
    if below:
        raise PredictionError(
            f"{path}: several evaluations: {', '.join(found.parent.name for found in below)}. Name one, "
            f"for example {below[0].parent}."
        )
    if parts := sorted(path.glob("predictions-*-of-*.jsonl")):
        raise PredictionError(
            f"{path}: a benchmark that is not finished: {', '.join(found.name for found in parts)}, and no "
            f"{PREDICTIONS} of all. Run the missing parts of `emocache benchmark`."
        )
    raise PredictionError(
        f"{path}: no {PREDICTIONS} in it or one folder below. `emocache evaluate` and `emocache benchmark` "
        "write one."
    )


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name per path: what is left without the folders that all share."""
    parts = [_telling_parts(path) for path in paths]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    if len(parts) == 1:
        parts = [parts[0][-1:]]
    names = ["/".join(p) for p in parts]
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return found


def _telling_parts(path: Path) -> list[str]:
    parts = [part for part in path.absolute().parts if part != path.anchor]
    if parts and parts[-1] == PREDICTIONS and len(parts) > 1:
        parts.pop()
    elif path.is_file():
        parts[-1] = path.stem
    return parts or [str(path)]


def _facts(predictions: Sequence[Prediction]) -> dict[str, str]:
    """Return what made the replies, several values joined."""
    found: dict[str, dict[str, None]] = {"run": {}, "tasks": {}, "prompts": {}, "renderer": {}}
    tokens: dict[str, dict[str, None]] = {}
    for one in predictions:
        found["run"][one.run] = None
        found["tasks"][one.task] = None
        found["prompts"][one.pool_id or _NOT_KNOWN] = None
        found["renderer"][
            _NOT_KNOWN if one.renderer_version is None else str(one.renderer_version)
        ] = None
        for stream, spec_id in one.spec_ids.items():
            tokens.setdefault(f"{stream} tokens", {})[spec_id] = None
    return {name: ", ".join(values) for name, values in {**found, **tokens}.items() if values}


def _field(task: str) -> LabelField | None:
    """Return which label a reply to a task names; None: free text."""
    return next((row.label for name, row in TASK_TABLE.items() if name == task), None)


def _is_listed(one: Prediction) -> bool:
    """True if the reply names labels of a list: free text needs a judge, open words the wheels."""
    return one.benchmark is not None or _field(one.task) not in (None, "emotion_ov")


def _groups(predictions: Iterable[Prediction]) -> dict[str, list[Prediction]]:
    """Divide replies into sets: by benchmark, or corpus and label field; and by what was masked."""
    rough: dict[tuple[str, tuple[str, ...]], dict[str, list[Prediction]]] = {}
    for one in predictions:
        if not _is_listed(one):
            continue
        name = one.benchmark or f"{one.uid.partition('/')[0]}: {_field(one.task)}"
        rough.setdefault((name, one.masked), {}).setdefault(one.task, []).append(one)
    found: dict[str, list[Prediction]] = {}
    for (name, masked), by_task in rough.items():
        without = f", without {' + '.join(masked)}" if masked else ""
        for task, group in by_task.items():
            # A run that reasons and one that does not may be compared, unless one file has both.
            asked = f" ({task})" if len(by_task) > 1 else ""
            found[f"{name}{asked}{without}"] = group
    return found


def _of_benchmark(scored: Scored) -> Side:
    return Side(
        title=scored.benchmark.title,
        metric=METRICS[scored.benchmark.metric],
        corpus=scored.benchmark.corpus,
        items=scored.items,
        tally=scored.tally,
        is_exact=scored.benchmark.metric == "accuracy",
        rules={
            "protocol": scored.result.protocol,
            "reading": scored.result.reading,
            "wheel tables": scored.result.wheels.digest if scored.result.wheels else "none",
        },
        notes=scored.result.notes,
    )


def _named(side: Side, asked: str, name: str) -> Side:
    """Return a side whose title says what its name says beyond the benchmark."""
    return replace(side, title=side.title + name.removeprefix(asked))


def _of_labels(group: Sequence[Prediction]) -> Side | None:
    """Return replies that were asked for no benchmark; None if no truth is known."""
    several = _field(group[0].task) == "emotion_multi"
    items = tuple(item_of(one, several) for one in group)
    truths = [", ".join(sorted(item.truth)) or None for item in items]
    if not any(truths):
        return None
    tally = accuracy(truths, [", ".join(sorted(item.predicted)) or None for item in items])
    return Side(
        title=_title(group[0]),
        metric="exact sets: all true labels and nothing else" if several else "accuracy",
        corpus=group[0].uid.partition("/")[0],
        items=items,
        tally=tally,
        is_exact=True,
        rules={},
    )


def _title(one: Prediction) -> str:
    without = f", without {' + '.join(one.masked)}" if one.masked else ""
    return f"{one.uid.partition('/')[0]}, {one.task}{without}"


def item_of(one: Prediction, several: bool) -> Item:
    """Return a reply that was asked for no benchmark as an item; `several`: to a task with several labels."""
    truth = one.truths if several else (() if one.truth is None else (one.truth,))
    # Words that are no label are part of the answer: with any, a set is not right.
    named = (*one.labels, *one.unread) if several else (() if one.label is None else (one.label,))
    return Item(
        id=one.uid,
        mode=one.split,
        truth=truth,
        reply=one.reply,
        predicted=named,
        how=one.parse,
        prediction=one,
    )
