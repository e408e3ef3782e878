"""What ratings come to: shares accepted, agreement of raters, mean scores.

    report = agreement(ratings)
    report.overall.rates[0].share, report.pairs[0].all_aspects.kappa

Nothing is guessed: what somebody did not rate is counted as missing, enters no share, and a pair of raters
is compared on what both rated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Literal

from cache.schema import Model
from extract.annotate.people.review import ASPECTS, Aspect, Rating, latest

Weights = Literal["linear", "quadratic"]
_Item = tuple[str, str]
_Value = str | int


class AspectRate(Model):
    """How often an aspect was accepted, over all raters."""

    aspect: Aspect
    n_accepted: int
    n_rejected: int
    n_missing: int
    """Ratings that leave it out although there was something to judge."""
    n_not_shown: int
    """Ratings of clips that have nothing of the kind, no sound for example."""
    n_other: int
    """Values that are neither accept nor reject; they enter no share."""
    share: float | None
    """Accepted of those accepted or rejected; None if there are none."""


class Group(Model):
    """The shares of one corpus, or of all."""

    corpus: str | None
    """None: all corpora together."""
    n_items: int
    n_ratings: int
    """Raters times items: an item that two people rated counts twice."""
    rates: tuple[AspectRate, ...]


class Kappa(Model):
    """Cohen's kappa of two raters."""

    n: int
    """Values that both gave."""
    observed: float | None
    """Share of them that is equal; None without any."""
    expected: float | None
    """The share that two raters would reach who give these values by chance, as often as they did."""
    kappa: float | None
    """None: undefined, for nothing was rated by both, or both gave one and the same value throughout."""


class Pair(Model):
    """How two raters agree."""

    first: str
    second: str
    corpus: str | None
    """None: all corpora together."""
    n_items: int
    """That both rated."""
    n_only_first: int
    n_only_second: int
    all_aspects: Kappa
    """Over every aspect of every item, as one list of values."""
    by_aspect: dict[Aspect, Kappa]
    score: Kappa
    """Of the scores, which counts near misses as misses."""
    score_linear: float | None
    """Kappa of the scores with weights that grow with the distance."""
    score_quadratic: float | None
    """Kappa of the scores with weights that grow with its square."""


class RaterRow(Model):
    """What one rater did."""

    rater: str
    n_items: int
    n_missing: int
    """Items that others rated and this one did not."""
    n_changed: int
    """Ratings that a later one of the same item replaced."""
    first_time: str | None
    last_time: str | None
    mean_score: float | None
    """Mean over the labels of the mean score of each; None without scores."""


class LabelScores(Model):
    """The scores of the descriptions of one label."""

    label: str
    by_rater: dict[str, float]
    """Mean score; a rater who gave none is left out."""
    n: int
    mean: float


class Agreement(Model):
    """All that ratings say."""

    n_ratings: int
    n_items: int
    n_outdated: int
    """Ratings of texts that the manifest no longer has; they are left out. 0 if none was compared."""
    n_reworded: int
    """Records of which more than one version of the texts was rated; each version is an item."""
    raters: tuple[RaterRow, ...]
    overall: Group
    corpora: tuple[Group, ...]
    pairs: tuple[Pair, ...]
    corpus_pairs: tuple[Pair, ...]
    """The same, corpus by corpus; empty if there is only one."""
    scores: tuple[LabelScores, ...]


def cohen_kappa(
    first: Sequence[Hashable], second: Sequence[Hashable], weights: Weights | None = None
) -> float | None:
    """Return Cohen's kappa: (po - pe) / (1 - pe).

    po is the share of equal values, pe the sum over the values of the product of both raters' shares.

    Args:
        first: One rater's values, of any kind; numbers if weighted.
        second: The other's, in the same order.
        weights: Distances between numbers count in proportion, or by their square; None: equal or not.

    Returns:
        None if it is undefined: no values, or pe = 1, that is, one and the same value throughout.

    Raises:
        ValueError: The lists differ in length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values of one rater, {len(second)} of the other")
    n = len(first)
    if weights is None:
        # In whole numbers, so that pe = 1 is seen exactly.
        mine, theirs = Counter(first), Counter(second)
        equal = sum(a == b for a, b in zip(first, second, strict=True))
        by_chance = sum(mine[value] * theirs[value] for value in mine)
        rest = n * n - by_chance
        return None if rest == 0 else (equal * n - by_chance) / rest
    power = 1 if weights == "linear" else 2
    found = sum(_distance(a, b, power) for a, b in zip(first, second, strict=True))
    expected = sum(
        k * m * _distance(a, b, power)
        for a, k in Counter(first).items()
        for b, m in Counter(second).items()
    )
    return None if expected == 0 else 1 - found * n / expected


def _distance(a: Hashable, b: Hashable, power: int) -> float:
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)):
        raise ValueError(f"weighted kappa needs numbers, got {a!r} and {b!r}")
    return float(abs(a - b) ** power)


def agreement(
    ratings: Iterable[Rating],
    current: set[_Item] | None = None,
    accept_from: int | None = None,
) -> Agreement:
    """Return what ratings come to.

    Args:
        ratings: In the order in which they were given; the last of a rater about an item counts.
        current: Items (uid, digest) whose texts still stand; ratings of others are left out. None: all.
        accept_from: Numbers from here on count as accepted, lower ones as rejected; None: they count as
            neither. Kappa needs none of this.
    """
    given = list(ratings)
    kept = [rating for rating in given if current is None or rating.item in current]
    counting = latest(kept)
    found = list(counting.values())
    items = {rating.item for rating in found}
    by_rater: dict[str, dict[_Item, Rating]] = {}
    for rating in found:
        by_rater.setdefault(rating.rater, {})[rating.item] = rating
    corpora = sorted({rating.corpus for rating in found})
    changes = Counter(rating.rater for rating in kept)
    versions = Counter(uid for uid, _ in items)
    scores = _scores(found)
    return Agreement(
        n_ratings=len(found),
        n_items=len(items),
        n_outdated=len(given) - len(kept),
        n_reworded=sum(n > 1 for n in versions.values()),
        raters=tuple(
            _rater_row(name, list(own.values()), len(items), changes[name], scores)
            for name, own in sorted(by_rater.items())
        ),
        overall=_group(None, found, accept_from),
        corpora=tuple(
            _group(corpus, [r for r in found if r.corpus == corpus], accept_from)
            for corpus in corpora
        ),
        pairs=_pairs(by_rater, None),
        corpus_pairs=tuple(pair for c in corpora for pair in _pairs(by_rater, c))
        if len(corpora) > 1
        else (),
        scores=scores,
    )


def _rater_row(
    name: str, own: Sequence[Rating], n_items: int, n_given: int, scores: Sequence[LabelScores]
) -> RaterRow:
    times = sorted(rating.time for rating in own if rating.time)
    means = [row.by_rater[name] for row in scores if name in row.by_rater]
    return RaterRow(
        rater=name,
        n_items=len(own),
        n_missing=n_items - len(own),
        n_changed=n_given - len(own),
        first_time=times[0] if times else None,
        last_time=times[-1] if times else None,
        mean_score=fmean(means) if means else None,
    )


def _group(corpus: str | None, ratings: Sequence[Rating], accept_from: int | None) -> Group:
    return Group(
        corpus=corpus,
        n_items=len({rating.item for rating in ratings}),
        n_ratings=len(ratings),
        rates=tuple(_rate(aspect, ratings, accept_from) for aspect in ASPECTS),
    )


def _rate(aspect: Aspect, ratings: Sequence[Rating], accept_from: int | None) -> AspectRate:
    counts: Counter[str] = Counter()
    for rating in ratings:
        value = rating.aspects.get(aspect)
        if value is None:
            counts["not shown" if aspect in rating.not_shown else "missing"] += 1
        else:
            counts[_verdict(value, accept_from)] += 1
    judged = counts["accept"] + counts["reject"]
    return AspectRate(
        aspect=aspect,
        n_accepted=counts["accept"],
        n_rejected=counts["reject"],
        n_missing=counts["missing"],
        n_not_shown=counts["not shown"],
        n_other=counts["other"],
        share=counts["accept"] / judged if judged else None,
    )


def _verdict(value: _Value, accept_from: int | None) -> str:
    if isinstance(value, int):
        return "other" if accept_from is None else "accept" if value >= accept_from else "reject"
    return value if value in ("accept", "reject") else "other"


def _pairs(by_rater: dict[str, dict[_Item, Rating]], corpus: str | None) -> tuple[Pair, ...]:
    """Compare every two raters, on all items or on those of a corpus."""
    own = {
        name: {item: r for item, r in rated.items() if corpus is None or r.corpus == corpus}
        for name, rated in by_rater.items()
    }
    return tuple(
        _pair(first, second, corpus, own[first], own[second])
        for first, second in combinations(sorted(own), 2)
    )


def _pair(
    first: str, second: str, corpus: str | None, a: dict[_Item, Rating], b: dict[_Item, Rating]
) -> Pair:
    both = sorted(a.keys() & b.keys())
    values: dict[Aspect, list[tuple[_Value, _Value]]] = {aspect: [] for aspect in ASPECTS}
    scores: list[tuple[int, int]] = []
    for item in both:
        mine, theirs = a[item], b[item]
        for aspect in ASPECTS:
            if aspect in mine.aspects and aspect in theirs.aspects:
                values[aspect].append((mine.aspects[aspect], theirs.aspects[aspect]))
        if mine.score is not None and theirs.score is not None:
            scores.append((mine.score, theirs.score))
    left, right = [x for x, _ in scores], [y for _, y in scores]
    return Pair(
        first=first,
        second=second,
        corpus=corpus,
        n_items=len(both),
        n_only_first=len(a) - len(both),
        n_only_second=len(b) - len(both),
        all_aspects=_kappa([pair for pairs in values.values() for pair in pairs]),
        by_aspect={aspect: _kappa(pairs) for aspect, pairs in values.items()},
        score=_kappa(scores),
        score_linear=cohen_kappa(left, right, "linear"),
        score_quadratic=cohen_kappa(left, right, "quadratic"),
    )


def _kappa(pairs: Sequence[tuple[_Value, _Value]]) -> Kappa:
    if not pairs:
        return Kappa(n=0, observed=None, expected=None, kappa=None)
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    mine, theirs, n = Counter(first), Counter(second), len(pairs)
    return Kappa(
        n=n,
        observed=sum(a == b for a, b in pairs) / n,
        expected=sum(mine[value] * theirs[value] for value in mine) / n**2,
        kappa=cohen_kappa(first, second),
    )


def _scores(ratings: Iterable[Rating]) -> tuple[LabelScores, ...]:
    """Return the mean scores per label and rater."""
    given: dict[str, dict[str, list[int]]] = {}
    for rating in ratings:
        if rating.score is not None:
            label = rating.label or "(no label)"
            given.setdefault(label, {}).setdefault(rating.rater, []).append(rating.score)
    return tuple(
        LabelScores(
            label=label,
            by_rater={rater: fmean(scores) for rater, scores in sorted(raters.items())},
            n=sum(map(len, raters.values())),
            mean=fmean(score for scores in raters.values() for score in scores),
        )
        for label, raters in sorted(given.items())
    )
