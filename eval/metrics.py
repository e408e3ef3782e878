"""Scores of tasks that name labels, as pure functions of truths and predicted labels.

All scores are fractions; only the report turns them into percent. A reply without a label is
wrong: it lowers the recall of its true class and is never a prediction of some class, so it enters
no precision. The rules follow the benchmark's own scorer: accuracy is the published number (WAR is
the same thing); UAR is added because the literature on these corpora reports it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from cache.errors import MissingDependencyError, PredictionError, near_miss
from cache.schema import Model
from eval.parse import ParseHow


class ClassScores(Model):
    """How well one class was recognised."""

    label: str
    precision: float
    """Right among the predictions of this class; 0 when it was never predicted."""
    recall: float
    """Right among the clips that truly are of this class; 0 when there are none."""
    f1: float
    """2 TP / (predicted + true); 0 when both are 0."""
    support: int
    """Clips that truly are of this class."""


class SingleLabelScores(Model):
    """The scores of one set of replies to a single-label task."""

    labels: tuple[str, ...]
    """The label space, in its own order."""
    accuracy: float
    """Right among scored; equals WAR, the recall weighted by support."""
    weighted_f1: float
    """Mean of the per-class F1, weighted by support."""
    uar: float
    """Unweighted mean of the recall of the classes that occur in the truth."""
    n_offered: int
    """Replies handed in."""
    n_scored: int
    """Replies whose clip has a true label; the others enter no score."""
    n_off_list: int
    """Scored replies without a label; empty ones are not among them if `n_empty` is known."""
    n_empty: int | None
    """Scored replies without any text; None: the caller did not say how replies were parsed."""
    per_class: tuple[ClassScores, ...]
    """One entry per label, in the order of `labels`."""
    confusion: list[list[int]]
    """Counts, (n_labels, n_labels + 1): rows truth, columns prediction; last column: no label."""


class MultiLabelScores(Model):
    """The scores of one set of replies to a task that asks for several labels."""

    labels: tuple[str, ...]
    """The label space, in its own order."""
    accuracy: float
    """Replies that name the true labels, all of them and nothing else."""
    micro_f1: float
    """F1 over all (clip, label) pairs together."""
    macro_f1: float
    """Mean of the per-label F1 over the labels that occur in the truth."""
    weighted_f1: float
    """Mean of the per-label F1, weighted by support."""
    uar: float
    """Unweighted mean of the recall of the labels that occur in the truth."""
    n_offered: int
    """Replies handed in."""
    n_scored: int
    """Replies whose clip has true labels; the others enter no score."""
    n_off_list: int
    """Scored replies with some text but no label."""
    n_empty: int
    """Scored replies without any text."""
    n_partly: int
    """Scored replies with labels and with words that are none."""
    commonest: tuple[str, ...]
    """The most frequent set of true labels, in the space's order; of equally frequent ones the first."""
    commonest_share: float
    """What always answering it would reach in `accuracy`."""
    per_class: tuple[ClassScores, ...]
    """One entry per label, in the order of `labels`."""


def score_multi_label(
    truths: Sequence[Sequence[str]],
    predicted_labels: Sequence[Sequence[str]],
    labels: Sequence[str],
    parses: Sequence[ParseHow],
    unread: Sequence[Sequence[str]],
) -> MultiLabelScores:
    """Score the replies to a task that asks for several labels.

    Args:
        truths: The true labels per clip; empty: unknown, the reply is counted but not scored.
        predicted_labels: The parsed labels per clip.
        labels: The label space in the order of the report.
        parses: How each reply was parsed.
        unread: The words of each reply that are no label; with any, its set is not right.

    Raises:
        PredictionError: Nothing to score, unequal lengths, or a label outside `labels`.
    """
    n = {len(truths), len(predicted_labels), len(parses), len(unread)}
    if len(n) > 1:
        raise PredictionError(
            f"cannot score: lengths {sorted(n)} differ; pass one of each per clip."
        )
    _check_inside(labels, (("true", truths), ("predicted", predicted_labels)))
    rows = [row for row, truth in enumerate(truths) if truth]
    if not rows:
        raise PredictionError(
            f"cannot score: none of {len(truths)} replies has a true label; "
            "at least one is needed. Check the task and the split."
        )
    try:
        from sklearn.metrics import precision_recall_fscore_support
    except ImportError as error:
        raise MissingDependencyError(
            "Scoring needs scikit-learn: pip install 'emocache[eval]'"
        ) from error
    true = [[int(label in truths[row]) for label in labels] for row in rows]
    predicted = [[int(label in predicted_labels[row]) for label in labels] for row in rows]

    def scores(average: str | None) -> Any:
        return precision_recall_fscore_support(true, predicted, average=average, zero_division=0)

    precision, recall, f1, support = scores(None)
    occur = [i for i, n_true in enumerate(support) if n_true]
    sets = Counter(tuple(label for label in labels if label in truths[row]) for row in rows)
    commonest, n_commonest = sets.most_common(1)[0]
    right = [a == b and not unread[row] for a, b, row in zip(true, predicted, rows, strict=True)]
    return MultiLabelScores(
        labels=tuple(labels),
        accuracy=sum(right) / len(rows),
        micro_f1=float(scores("micro")[2]),
        macro_f1=sum(float(f1[i]) for i in occur) / len(occur),
        weighted_f1=float(scores("weighted")[2]),
        uar=sum(float(recall[i]) for i in occur) / len(occur),
        n_offered=len(truths),
        n_scored=len(rows),
        n_off_list=sum(parses[row] == "off_list" for row in rows),
        n_empty=sum(parses[row] == "empty" for row in rows),
        n_partly=sum(bool(predicted_labels[row]) and bool(unread[row]) for row in rows),
        commonest=commonest,
        commonest_share=n_commonest / len(rows),
        per_class=_per_class(labels, precision, recall, f1, support),
    )


def score_single_label(
    truths: Sequence[str | None],
    predicted_labels: Sequence[str | None],
    labels: Sequence[str],
    parses: Sequence[ParseHow] | None = None,
) -> SingleLabelScores:
    """Score the replies to a single-label task.

    Args:
        truths: The true label per clip; None: unknown, the reply is counted but not scored.
        predicted_labels: The parsed label per clip; None: the reply held no label, hence wrong.
        labels: The label space in the order of the report, including true labels that were not
            offered to the model.
        parses: How each reply was parsed; tells empty replies from off-list ones.

    Raises:
        PredictionError: Nothing to score, unequal lengths, or a label outside `labels`.
    """
    _check(truths, predicted_labels, labels, parses)
    try:
        from sklearn.metrics import (
            confusion_matrix,
            precision_recall_fscore_support,
            recall_score,
        )
    except ImportError as error:
        raise MissingDependencyError(
            "Scoring needs scikit-learn: pip install 'emocache[eval]'"
        ) from error
    n_labels = len(labels)
    no_label = n_labels  # an index beyond the labels: in no class's precision, wrong for all
    index = {label: position for position, label in enumerate(labels)}
    rows = [position for position, truth in enumerate(truths) if truth is not None]
    true = [index[truth] for truth in truths if truth is not None]
    predicted = [
        no_label if (label := predicted_labels[row]) is None else index[label] for row in rows
    ]
    classes = list(range(n_labels))
    precision, recall, f1, support = precision_recall_fscore_support(
        true, predicted, labels=classes, average=None, zero_division=0
    )
    _, _, weighted_f1, _ = precision_recall_fscore_support(
        true, predicted, labels=classes, average="weighted", zero_division=0
    )
    uar = recall_score(true, predicted, labels=sorted(set(true)), average="macro", zero_division=0)
    table = confusion_matrix(true, predicted, labels=[*classes, no_label])
    confusion = [[int(count) for count in row] for row in table[:n_labels]]
    n_without = predicted.count(no_label)
    n_empty = None if parses is None else sum(parses[row] == "empty" for row in rows)
    return SingleLabelScores(
        labels=tuple(labels),
        accuracy=sum(a == b for a, b in zip(true, predicted, strict=True)) / len(true),
        weighted_f1=float(weighted_f1),
        uar=float(uar),
        n_offered=len(truths),
        n_scored=len(true),
        n_off_list=n_without - (n_empty or 0),
        n_empty=n_empty,
        per_class=_per_class(labels, precision, recall, f1, support),
        confusion=confusion,
    )


def _per_class(
    labels: Sequence[str], precision: Any, recall: Any, f1: Any, support: Any
) -> tuple[ClassScores, ...]:
    """Return what scikit-learn gives per class, (n_labels,) each."""
    return tuple(
        ClassScores(
            label=label,
            precision=float(precision[i]),
            recall=float(recall[i]),
            f1=float(f1[i]),
            support=int(support[i]),
        )
        for i, label in enumerate(labels)
    )


def _check(
    truths: Sequence[str | None],
    predicted_labels: Sequence[str | None],
    labels: Sequence[str],
    parses: Sequence[ParseHow] | None,
) -> None:
    """Refuse what cannot be scored."""
    n_parses = len(truths) if parses is None else len(parses)
    if not len(truths) == len(predicted_labels) == n_parses:
        raise PredictionError(
            f"cannot score: {len(truths)} truths, {len(predicted_labels)} predicted labels and "
            f"{n_parses} parses; pass one of each per clip."
        )
    if all(truth is None for truth in truths):
        raise PredictionError(
            f"cannot score: none of {len(truths)} replies has a true label; "
            "at least one is needed. Check the task and the split."
        )
    given = (("true", truths), ("predicted", predicted_labels))
    _check_inside(
        labels, [(kind, [[] if x is None else [x] for x in found]) for kind, found in given]
    )
    for position, how in enumerate(parses or ()):
        if (how in ("off_list", "empty")) != (predicted_labels[position] is None):
            raise PredictionError(
                f"cannot score: position {position} has predicted label "
                f"{predicted_labels[position]!r} but was parsed as {how!r}; a label is None "
                "exactly when the reply is off_list or empty."
            )


def _check_inside(
    labels: Sequence[str], given: Iterable[tuple[str, Sequence[Sequence[str]]]]
) -> None:
    """Refuse a label that is listed twice, and true or predicted ones that are not listed."""
    double = [label for label, count in Counter(labels).items() if count > 1]
    if double:
        raise PredictionError(f"cannot score: label {double[0]!r} is listed twice; list it once.")
    for kind, found in given:
        for position, names in enumerate(found):
            for label in names:
                if label not in labels:
                    raise PredictionError(
                        f"cannot score: {kind} label {label!r} (position {position}) is not in the "
                        f"label space {', '.join(labels)}; add it or correct its spelling."
                        f"{near_miss(label, labels)}"
                    )
