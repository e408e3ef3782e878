"""Scored benchmarks made up for the tests of reports: no model, no files, real tallies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from eval.benchmarks import Benchmark, Protocol, benchmark, benchmarks
from eval.predictions import ClipFacts, Prediction
from eval.scoring import rules
from eval.scoring.result import BenchmarkScore, Counts, Example, Item, Scored
from eval.scoring.tally import Tally

KIN = {
    "happy": "joyful", "happiness": "joyful", "joy": "joyful", "joyful": "joyful", "excited": "joyful",
    "pleasant": "joyful", "delighted": "joyful", "sad": "sad", "sadness": "sad", "angry": "mad",
    "anger": "mad", "dissatisfied": "mad", "accusation": "mad", "surprise": "powerful",
    "surprised": "powerful", "worried": "scared", "worry": "scared", "fear": "scared",
    "nervous": "scared", "disgust": "disgusted", "concern": "scared", "relaxed": "peaceful",
}  # fmt: skip
"""Word -> group; the same on each of two wheels, but for `surprise`, which the second lacks."""


class TwoWheels:
    """A word table in place of the real ones."""

    names = ("wheel1", "wheel2")

    def groups(self, words: Sequence[str], number: int) -> frozenset[str]:
        """Return the groups of words on a wheel."""
        known = {KIN[word] for word in words if word in KIN}
        return frozenset(known - {"powerful"} if number == 2 else known)


def tally_of(row: Benchmark, items: Sequence[Item]) -> Tally:
    """Return the tally of a set's metric."""
    single = [item.truth[0] for item in items]
    first = [item.predicted[0] if item.predicted else None for item in items]
    many = [item.predicted for item in items]
    if row.metric == "hit-rate":
        return rules.hit_rate(single, many, TwoWheels())
    if row.metric == "wheel-f":
        return rules.wheel_f([item.truth for item in items], many, TwoWheels())
    if row.metric == "waf":
        return rules.waf(single, first)
    if row.metric == "map":
        return rules.mean_average_precision([item.truth for item in items], many)
    return rules.accuracy(single, first)


def scored_of(
    task: str,
    items: Sequence[Item],
    *,
    protocol: Protocol = "paper",
    notes: Sequence[str] = (),
    examples: Sequence[Example] = (),
) -> Scored:
    """Score items by hand, as `eval.scoring.score` does with files."""
    row = benchmark(task)
    tally = tally_of(row, items)
    n = int(tally.scored.sum())
    reasons = {"neutral truth, not scored": len(items) - n} if n < len(items) else {}
    parts = {name: value for name, value in tally.parts(tally.sums).items() if value == value}
    result = BenchmarkScore(
        task=task,
        protocol=protocol,
        metric=row.metric,
        reading="tag" if protocol == "paper" else "raw",
        score=tally.total,
        parts=parts,
        part_counts={name: n for name in parts},
        extras={"uar": 0.5} if row.metric == "accuracy" else {},
        counts=Counts(
            offered=len(items), scored=n, skipped=len(items) - n, reasons=reasons, published=row.n
        ),
        replies=dict(Counter(item.how for item in items)),
        examples=tuple(examples),
        other_protocols={"unibench": tally.total + 0.0123} if row.metric == "waf" else {},
        notes=tuple(notes),
    )
    return Scored(benchmark=row, result=result, items=tuple(items), tally=tally)


def item(name: str, truth: Iterable[str], predicted: Iterable[str], how: str = "tag") -> Item:
    """Return an item whose reply is its labels in a tag."""
    labels = tuple(predicted)
    reply = f"<answer>{', '.join(labels)}</answer>" if labels else "I cannot tell"
    return Item(name, None, tuple(truth), reply, labels, how if labels else "off_list")


def made_up(
    skill: float = 0.7, *, fraction: float = 1.0, seed: int = 0, tasks: Iterable[str] = ()
) -> dict[str, Scored]:
    """Return all sets, or some, with the published counts or a fraction of them.

    Args:
        skill: How often a reply is right.
        fraction: Of the published counts.
        seed: Gives other replies, and the same truths.
        tasks: Ids; none: all.
    """
    found: dict[str, Scored] = {}
    for number, task in enumerate(tasks or benchmarks()):
        row = benchmark(task)
        truths = np.random.default_rng([number, 0])
        replies = np.random.default_rng([number, 1, seed])
        labels = sorted({*row.options, *(["neutral"] if row.metric == "hit-rate" else [])})
        weights = truths.dirichlet([1.5] * len(labels))
        items = []
        for i in range(max(4, round(row.n * fraction))):
            n = 1 + int(truths.integers(3)) if row.metric in ("map", "wheel-f") else 1
            truth = tuple(map(str, truths.choice(labels, n, replace=False, p=weights)))
            items.append(_answered(row, i, truth, labels, skill, replies))
        examples = [
            Example(id=x.id, truth=", ".join(x.truth), reply=x.reply, how=x.how)
            for x in items
            if not x.predicted
        ][:5]
        found[task] = scored_of(task, items, examples=examples)
    return found


def _answered(
    row: Benchmark,
    number: int,
    truth: tuple[str, ...],
    labels: Sequence[str],
    skill: float,
    rng: np.random.Generator,
) -> Item:
    uid = f"{row.corpus}/clip_{number:05}"
    chance = rng.random()
    predicted: tuple[str, ...] = truth if chance < skill else (str(rng.choice(labels)),)
    how = "alias" if chance < 0.02 else "tag"
    reply = f"The voice trembles, and the brows are drawn. <answer>{', '.join(predicted)}</answer>"
    if chance > 0.99:
        predicted, how = (), "empty" if chance > 0.997 else "off_list"
        reply = "" if how == "empty" else "Hard to say: the person <looks> away | and leaves."
    single = len(truth) == 1
    about = ClipFacts(
        language="zh" if rng.random() < 0.4 else "en",
        duration_s=float(rng.gamma(2, 2)),
        subtitle="I did not expect that.",
        absent=("audio",) if rng.random() < 0.06 else (),
    )
    likelihoods = None
    if row.metric == "accuracy":
        weights = rng.gamma(0.4, size=len(row.options))
        weights[row.options.index(predicted[0] if predicted else truth[0])] += 2
        likelihoods = dict(zip(row.options, (weights / weights.sum()).tolist(), strict=True))
    prediction = Prediction(
        uid=uid,
        task=row.task,
        reply=reply,
        label=predicted[0] if single and predicted else None,
        labels=() if single else predicted,
        parse=how,  # type: ignore[arg-type]
        truth=truth[0] if single else None,
        truths=() if single else truth,
        run="made",
        spec_ids={},
        benchmark=row.id,
        likelihoods=likelihoods,
        about=about,
    )
    return Item(uid, None, truth, reply, predicted, how, prediction)
