"""What a report shows of one scored set beyond its score: labels one by one, and what was taken for what.

Counted from the items of a `Scored` as its metric compared them. The rules of `eval.metrics` hold: a reply
without a label lowers the recall of its true label and enters no precision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

from eval.scoring.calibration import Calibration, calibration
from eval.scoring.result import Item, Scored

MAX_LABELS: Final = 40
"""Labels told apart; of more, those of the benchmark and the most frequent true ones."""
OTHER: Final = "other"
"""The row of true labels beyond these."""
SEVERAL: Final = "several"
"""The column of replies that name more than one of the labels."""
NONE: Final = "none"
"""The column of replies that name none of them: empty, off the list, in other words."""

MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "tag": "an offered label, inside an answer tag",
        "exact": "an offered label, without a tag",
        "alias": "another word for an offered label",
        "other": "no offered label: counted as neutral",
        "off_list": "no offered label",
        "empty": "no text",
    }
)
"""How a reply was read -> what that means."""
READINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "raw": "the whole reply, as it stands",
        "tag": "the content of the answer tag, or the whole reply if it has none",
        "label": "the label that is read in the reply",
        "last-word": "the last word, or neutral if it is no offered label",
    }
)
"""How much of a reply is compared, in words."""


class LabelScores(NamedTuple):
    """How well one label was recognised among the scored items."""

    label: str
    precision: float
    """A fraction; 0 if it was never predicted."""
    recall: float
    """A fraction; 0 if it is never true."""
    f1: float
    n_true: int
    n_predicted: int


class ConfusionRow(NamedTuple):
    """What the items of one true label were taken for."""

    label: str
    is_scored: bool
    """False: the score leaves these items out, as it does neutral truths in some metrics."""
    counts: tuple[int, ...]
    """Items per column."""

    @property
    def n(self) -> int:
        """Items of this label."""
        return sum(self.counts)


class Confusion(NamedTuple):
    """True labels against predicted ones."""

    columns: tuple[str, ...]
    """Labels, then `several` if any reply names several, then `none`."""
    rows: tuple[ConfusionRow, ...]
    n_labels: int
    """How many of the columns are labels."""


class MeanLikelihoods(NamedTuple):
    """What probability the offered labels get, by true label."""

    columns: tuple[str, ...]
    """Offered labels."""
    rows: tuple[tuple[str, int, tuple[float, ...]], ...]
    """True label, its items with likelihoods, mean probability per column."""


def shown_labels(scored: Scored) -> tuple[str, ...]:
    """Return the labels to tell apart: those offered, in their order, then others that are true."""
    offered = scored.benchmark.options
    true = Counter(label for item in scored.items for label in item.truth)
    others = sorted((x for x in true if x not in offered), key=lambda x: (-true[x], x))
    return (*offered, *sorted(others[: max(0, MAX_LABELS - len(offered))]))


def label_scores(scored: Scored) -> tuple[LabelScores, ...]:
    """Return precision, recall and F1 of each label over the scored items; empty for open words."""
    if scored.benchmark.metric == "wheel-f":
        return ()
    true, predicted, both = Counter[str](), Counter[str](), Counter[str]()
    for item in _scored_items(scored):
        true.update(set(item.truth))
        predicted.update(set(item.predicted))
        both.update(set(item.truth) & set(item.predicted))
    return tuple(
        LabelScores(
            label,
            _share(both[label], predicted[label]),
            _share(both[label], true[label]),
            _share(2 * both[label], true[label] + predicted[label]),
            true[label],
            predicted[label],
        )
        for label in shown_labels(scored)
        if true[label] or predicted[label]
    )


def confusion(scored: Scored) -> Confusion | None:
    """Return the confusion matrix of all offered items; None where items have several true labels.

    Items that the score leaves out have rows of their own, marked so.
    """
    if any(len(item.truth) > 1 for item in scored.items) or _is_open(scored):
        return None
    labels = shown_labels(scored)
    known = set(labels)
    counts: Counter[tuple[str, bool, str]] = Counter()
    for item, is_scored in zip(scored.items, scored.tally.scored.tolist(), strict=True):
        if item.truth:
            truth = item.truth[0] if item.truth[0] in known else OTHER
            counts[truth, is_scored, _taken_for(item, known)] += 1
    has_several = any(column == SEVERAL for _, _, column in counts)
    columns = (*labels, *([SEVERAL] if has_several else []), NONE)
    rows = [
        ConfusionRow(truth, is_scored, tuple(counts[truth, is_scored, c] for c in columns))
        for is_scored in (True, False)
        for truth in (*labels, OTHER)
    ]
    used = tuple(row for row in rows if row.n)
    return Confusion(columns, used, len(labels)) if used else None


def mean_likelihoods(scored: Scored) -> MeanLikelihoods | None:
    """Return mean likelihoods over all offered items of one true label; None if there are none.

    Items whose likelihoods are of other labels than the benchmark offers are left out.
    """
    offered = scored.benchmark.options
    sums: dict[str, list[float]] = {}
    n: Counter[str] = Counter()
    for item in scored.items:
        given = None if item.prediction is None else item.prediction.likelihoods
        if given is None or len(item.truth) != 1 or set(given) != set(offered):
            continue
        total = sums.setdefault(item.truth[0], [0.0] * len(offered))
        for at, label in enumerate(offered):
            total[at] += given[label]
        n[item.truth[0]] += 1
    if not sums:
        return None
    rows = [
        (label, n[label], tuple(x / n[label] for x in sums[label]))
        for label in shown_labels(scored)
        if label in sums
    ]
    return MeanLikelihoods(offered, tuple(rows))


def calibration_of(scored: Scored) -> Calibration | None:
    """Return how well likelihoods fit the truth, over all offered items; None if there are none."""
    pairs = [
        (item.prediction, item.truth[0])
        for item in scored.items
        if item.prediction is not None and item.prediction.likelihoods is not None
        if len(item.truth) == 1 and item.truth[0] in item.prediction.likelihoods
    ]
    if not pairs:
        return None
    return calibration([p for p, _ in pairs], truths=[truth for _, truth in pairs])


def _is_open(scored: Scored) -> bool:
    return scored.benchmark.metric in ("wheel-f", "map")


def _taken_for(item: Item, known: set[str]) -> str:
    """Return the column of a reply."""
    named = {label for label in item.predicted if label in known}
    return NONE if not named else next(iter(named)) if len(named) == 1 else SEVERAL


def _scored_items(scored: Scored) -> Sequence[Item]:
    chosen = scored.tally.scored.tolist()
    return [item for item, is_scored in zip(scored.items, chosen, strict=True) if is_scored]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
