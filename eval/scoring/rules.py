"""The metrics as pure functions: what each item adds, and the score of the sums.

Sections and formulas follow the scorers that were released with the paper. Labels come in as they are
compared; what of a reply is compared is decided before, in `eval.scoring.texts`. Scores are fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cache.errors import PredictionError
from eval.scoring.tally import Floats, Tally

Words = Sequence[str]


class Grouping(Protocol):
    """What the wheel metrics need of the tables; `eval.scoring.wheels.Wheels` is one."""

    @property
    def names(self) -> tuple[str, ...]:
        """`wheel1`, `wheel2`, ..."""

    def groups(self, words: Words, number: int, /) -> frozenset[str]:
        """Return the groups of some words on a wheel, from 1."""


def hit_rate(truths: Sequence[str | None], predicted: Sequence[Words], wheels: Grouping) -> Tally:
    """Hit rate: per wheel the share of items whose true group is among the predicted groups.

    An item is scored on a wheel that groups its truth. The score is the plain mean over the wheels; a
    wheel that scores no item is left out.

    Args:
        truths: One word each; None: unknown, never scored.
        predicted: The words of each reply; more of them cost nothing.
        wheels: The tables.
    """
    n, n_wheels = _length(truths, predicted), len(wheels.names)
    values = np.zeros((n, 2, n_wheels))
    for number in range(1, n_wheels + 1):
        for row, (truth, words) in enumerate(zip(truths, predicted, strict=True)):
            true = wheels.groups((truth,), number) if truth is not None else frozenset()
            if true:
                values[row, :, number - 1] = len(true & wheels.groups(words, number)), 1

    def per_wheel(sums: Floats) -> Floats:
        return _ratio(sums[..., :n_wheels], sums[..., n_wheels:])

    return Tally(
        columns=tuple(f"{kind} {name}" for kind in ("hits", "scored") for name in wheels.names),
        values=values.reshape(n, 2 * n_wheels),
        score=lambda sums: _mean(per_wheel(sums)),
        parts=_named(wheels.names, per_wheel),
        scored=values[:, 1].sum(axis=1) > 0,
    )


def wheel_f(truths: Sequence[Words], predicted: Sequence[Words], wheels: Grouping) -> Tally:
    """F-score of open vocabularies: per wheel the F of mean precision and mean recall over groups.

    An item is scored on a wheel that groups any of its true words. Precision and recall are 0 if no
    predicted word has a group; F is 0 if both means are. The score is the mean over the wheels.

    Args:
        truths: The true words of each item; none: never scored.
        predicted: The words of each reply.
        wheels: The tables.
    """
    n, n_wheels = _length(truths, predicted), len(wheels.names)
    values = np.zeros((n, 3, n_wheels))
    for number in range(1, n_wheels + 1):
        for row, (true_words, words) in enumerate(zip(truths, predicted, strict=True)):
            true, said = wheels.groups(true_words, number), wheels.groups(words, number)
            if true:
                shared = len(true & said)
                precision = shared / len(said) if said else 0.0
                values[row, :, number - 1] = precision, shared / len(true), 1

    def means(sums: Floats) -> tuple[Floats, Floats]:
        scored = sums[..., 2 * n_wheels :]
        return _ratio(sums[..., :n_wheels], scored), _ratio(
            sums[..., n_wheels : 2 * n_wheels], scored
        )

    def per_wheel(sums: Floats) -> Floats:
        precision, recall = means(sums)
        # No item: both are NaN, and so stays F. Both 0: F is 0.
        both = precision + recall
        return np.where(both == 0, 0.0, _ratio(2 * precision * recall, both))

    kinds = ("precision", "recall", "scored")
    return Tally(
        columns=tuple(f"{kind} {name}" for kind in kinds for name in wheels.names),
        values=values.reshape(n, 3 * n_wheels),
        score=lambda sums: _mean(per_wheel(sums)),
        parts=_named(wheels.names, per_wheel),
        scored=values[:, 2].sum(axis=1) > 0,
    )


def waf(
    truths: Sequence[str | None],
    predicted: Sequence[str | None],
    *,
    dropped: Sequence[str] = ("neutral",),
) -> Tally:
    """Weighted average F1 of sentiment, without neutral truths.

    A reply that is no true class is simply wrong: it lowers recall, and enters no precision.

    Args:
        truths: None: unknown, never scored.
        predicted: None: no text.
        dropped: Truths that are not scored.
    """
    return weighted_f1([None if t in dropped else t for t in truths], predicted)


def sign_f1(truths: Sequence[str | None], predicted: Sequence[str | None]) -> Tally:
    """MER-UniBench's own sentiment rule: weighted F1 of two booleans, above 0 or not.

    Truths that are neutral are dropped. A reply that is neutral, or that cannot be read, is "not
    positive", hence right for a negative truth.

    Args:
        truths: `positive`, `negative`, `neutral`; None: unknown, never scored.
        predicted: `positive`, a number, or anything else, which is not positive.

    Raises:
        PredictionError: Another truth.
    """
    for truth in truths:
        if truth not in ("positive", "negative", "neutral", None):
            raise PredictionError(
                f"truth {truth!r} has no sign. Allowed: positive, negative, neutral, or a number."
            )
    return weighted_f1(
        [None if truth == "neutral" else truth for truth in truths],
        ["positive" if _is_positive(text) else "negative" for text in predicted],
    )


def accuracy(truths: Sequence[str | None], predicted: Sequence[str | None]) -> Tally:
    """Share of items whose reply equals the truth; the same as WAR. Parts: the recall per class.

    Args:
        truths: None: unknown, never scored.
        predicted: None: no text, hence wrong.
    """
    return _single(truths, predicted, lambda tp, _said, true: _ratio(tp.sum(-1), true.sum(-1)))


def uar(truths: Sequence[str | None], predicted: Sequence[str | None]) -> Tally:
    """Unweighted mean of the recall of the classes that occur in the truth; arguments as accuracy."""
    return _single(truths, predicted, lambda tp, _said, true: _mean(_ratio(tp, true)))


def weighted_f1(truths: Sequence[str | None], predicted: Sequence[str | None]) -> Tally:
    """F1 of each true class, weighted by its share. Parts: F1 per class; arguments as accuracy."""

    def score(tp: Floats, said: Floats, true: Floats) -> Floats:
        # A class that a sample lacks has no weight.
        return _ratio((_f1(tp, said, true) * true).sum(-1), true.sum(-1))

    return _single(truths, predicted, score, _f1_of_present)


def macro_f1(truths: Sequence[str | None], predicted: Sequence[str | None]) -> Tally:
    """Mean F1 of the classes that occur in the truth. Parts: F1 per class; arguments as accuracy."""
    return _single(truths, predicted, lambda *sums: _mean(_f1_of_present(*sums)), _f1_of_present)


def mean_average_precision(truths: Sequence[Words | None], predicted: Sequence[Words]) -> Tally:
    """Mean average precision of 0/1 indicators, over the labels that occur in any truth.

    With prevalence π, precision p (0 if never predicted) and recall r of a label, its average
    precision is r·p + (1 - r)·π: there are no confidences to rank by. Unknown labels are ignored.

    Args:
        truths: The true labels of each item, maybe none; None: unknown, never scored.
        predicted: The labels of each reply.
    """

    def per_class(tp: Floats, said: Floats, true: Floats, n: Floats) -> Floats:
        recall = _ratio(tp, true)  # NaN for a label that a sample lacks
        precision = np.nan_to_num(_ratio(tp, said))
        return recall * precision + (1 - recall) * _ratio(true, np.broadcast_to(n, true.shape))

    return _several(truths, predicted, lambda *sums: _mean(per_class(*sums)), per_class)


def micro_f1(truths: Sequence[Words | None], predicted: Sequence[Words]) -> Tally:
    """F1 over all pairs of item and label; arguments as mean_average_precision. Parts: F1 per label."""

    def score(tp: Floats, said: Floats, true: Floats, n: Floats) -> Floats:
        found = _f1(tp.sum(-1), said.sum(-1), true.sum(-1))
        return np.where(n[..., 0] > 0, found, np.nan)

    return _several(
        truths, predicted, score, lambda tp, said, true, _n: _f1_of_present(tp, said, true)
    )


def sample_f1(truths: Sequence[Words | None], predicted: Sequence[Words]) -> Tally:
    """Mean F1 of each item's sets, 0 if both are empty; arguments as mean_average_precision."""

    def of_item(true: frozenset[str], said: frozenset[str]) -> float:
        return 2 * len(true & said) / (len(true) + len(said)) if true or said else 0.0

    return _per_item("f1", truths, predicted, of_item)


def jaccard(truths: Sequence[Words | None], predicted: Sequence[Words]) -> Tally:
    """Mean Jaccard index of each item's sets, the union enlarged by 1e-6; arguments as before."""

    def of_item(true: frozenset[str], said: frozenset[str]) -> float:
        return len(true & said) / (len(true | said) + 1e-6)

    return _per_item("jaccard", truths, predicted, of_item)


def _single(
    truths: Sequence[str | None],
    predicted: Sequence[str | None],
    score: Callable[[Floats, Floats, Floats], Floats],
    per_class: Callable[[Floats, Floats, Floats], Floats] = lambda tp, _said, true: _ratio(
        tp, true
    ),
) -> Tally:
    """Count, per true class: right, predicted, true."""
    n = _length(truths, predicted)
    classes = sorted({truth for truth in truths if truth is not None})
    place = {label: at for at, label in enumerate(classes)}
    k = len(classes)
    values = np.zeros((n, 3, k))
    scored = np.array([truth is not None for truth in truths], dtype=bool)
    for row, (truth, said) in enumerate(zip(truths, predicted, strict=True)):
        if truth is None:
            continue
        values[row, 2, place[truth]] = 1
        if said is not None and said in place:
            values[row, 1, place[said]] = 1
            values[row, 0, place[said]] = said == truth

    def split(sums: Floats) -> tuple[Floats, Floats, Floats]:
        return sums[..., :k], sums[..., k : 2 * k], sums[..., 2 * k :]

    return Tally(
        columns=_columns(classes),
        values=values.reshape(n, 3 * k),
        score=lambda sums: score(*split(sums)),
        parts=_named(classes, lambda sums: per_class(*split(sums))),
        scored=scored,
    )


def _several(
    truths: Sequence[Words | None],
    predicted: Sequence[Words],
    score: Callable[[Floats, Floats, Floats, Floats], Floats],
    per_class: Callable[[Floats, Floats, Floats, Floats], Floats],
) -> Tally:
    """Count, per label that occurs in a truth: right, predicted, true; and the items."""
    n = _length(truths, predicted)
    classes = _labels_of(truths)
    place = {label: at for at, label in enumerate(classes)}
    k = len(classes)
    values = np.zeros((n, 3 * k + 1))
    for row, (truth, words) in enumerate(zip(truths, predicted, strict=True)):
        if truth is None:
            continue
        true = [place[label] for label in set(truth)]
        said = [place[label] for label in set(words) if label in place]
        values[row, [2 * k + at for at in true]] = 1
        values[row, [k + at for at in said]] = 1
        values[row, [at for at in said if at in true]] = 1
        values[row, 3 * k] = 1

    def split(sums: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        return sums[..., :k], sums[..., k : 2 * k], sums[..., 2 * k : 3 * k], sums[..., 3 * k :]

    return Tally(
        columns=(*_columns(classes), "items"),
        values=values,
        score=lambda sums: score(*split(sums)),
        parts=_named(classes, lambda sums: per_class(*split(sums))),
        scored=values[:, 3 * k] > 0,
    )


def _per_item(
    name: str,
    truths: Sequence[Words | None],
    predicted: Sequence[Words],
    of_item: Callable[[frozenset[str], frozenset[str]], float],
) -> Tally:
    """Average a number per item; labels that no truth has are ignored."""
    known = frozenset(_labels_of(truths))
    values = np.zeros((_length(truths, predicted), 2))
    for row, (truth, words) in enumerate(zip(truths, predicted, strict=True)):
        if truth is not None:
            values[row] = of_item(frozenset(truth), known & frozenset(words)), 1
    return Tally(
        columns=(name, "items"),
        values=values,
        score=lambda sums: _ratio(sums[..., 0], sums[..., 1]),
        parts=lambda _sums: {},
        scored=values[:, 1] > 0,
    )


def _length(truths: Sequence[object], predicted: Sequence[object]) -> int:
    if len(truths) != len(predicted):
        raise PredictionError(
            f"cannot score: {len(truths)} truths and {len(predicted)} replies; pass one of each per item."
        )
    return len(truths)


def _labels_of(truths: Sequence[Words | None]) -> list[str]:
    return sorted({label for truth in truths if truth is not None for label in truth})


def _columns(classes: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{kind} {label}" for kind in ("right", "said", "true") for label in classes)


def _named(
    names: Sequence[str], values: Callable[[Floats], Floats]
) -> Callable[[Floats], dict[str, float]]:
    """Return parts by name; NaN where undefined."""
    return lambda sums: dict(zip(names, values(sums).tolist(), strict=True))


def _ratio(above: Floats, below: Floats) -> Floats:
    """Divide; NaN where the divisor is 0 or NaN."""
    out = np.full(np.broadcast_shapes(np.shape(above), np.shape(below)), np.nan)
    return np.asarray(np.divide(above, below, out=out, where=np.asarray(below) > 0))


def _mean(values: Floats) -> Floats:
    """Mean over the last axis of what is defined; NaN where nothing is."""
    defined: npt.NDArray[np.bool_] = ~np.isnan(values)
    return _ratio(
        np.where(defined, values, 0.0).sum(-1), np.asarray(defined.sum(-1), dtype=np.float64)
    )


def _f1(tp: Floats, said: Floats, true: Floats) -> Floats:
    """2 TP / (predicted + true), 0 where undefined."""
    return np.nan_to_num(_ratio(2 * tp, said + true))


def _f1_of_present(tp: Floats, said: Floats, true: Floats) -> Floats:
    """F1, NaN for a class that the truth lacks."""
    return np.where(true > 0, _f1(tp, said, true), np.nan)


def _is_positive(text: str | None) -> bool:
    if text is None:
        return False
    try:
        number = float(text)
    except ValueError:
        return text == "positive"
    return math.isfinite(number) and number > 0
