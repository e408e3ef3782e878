"""Do probabilities of labels mean what they say? Of closed-set likelihoods, not of free replies.

`Prediction.likelihoods` is the probability of each offered label among all that were offered. Here it
is held against the truth: a label given 0.8 should be right in eight of ten cases. How often its
likeliest label is the one that the free reply names is told beside it, since the two are different ways
of asking one model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from pydantic import Field

from cache.errors import PredictionError
from cache.schema import Model
from eval.predictions import Prediction

N_BINS: Final = 10
_SMALLEST: Final = float(np.finfo(np.float64).eps)
"""Stands for a probability of 0, whose logarithm is not finite."""


class Bin(Model):
    """Items whose likeliest label has a probability in one range: above `low`, up to `high`."""

    low: float
    high: float
    n: int
    probability: float | None
    """Mean probability of the likeliest labels; None of an empty bin."""
    accuracy: float | None
    """Share of likeliest labels that are true; None of an empty bin."""


class Calibration(Model):
    """How well likelihoods fit the truth. All measures are over the same `n` items."""

    n: int = Field(ge=1)
    """Items with likelihoods and one true label that was offered."""
    n_without: int
    """Items left out: no likelihoods."""
    n_no_truth: int
    """Items left out: the truth is not known, or there are several."""
    n_unlisted: int
    """Items left out: the truth was not among the offered labels."""
    accuracy: float
    """Share of items whose likeliest label is true."""
    agreement: float
    """Share of items whose free reply names the likeliest label; a reply without label does not."""
    mean_probability: float
    """Of the likeliest label; above `accuracy`: the model is surer than it should be."""
    ece: float
    """Expected calibration error: mean over items of |accuracy - probability| of their bin."""
    brier: float
    """Mean over items of the sum over labels of (probability - truth)^2: 0 best, 2 worst."""
    nll: float
    """Mean negative logarithm of the true label's probability, in nats."""
    n_zero: int
    """Items whose true label has probability 0; they enter `nll` with 2.2e-16."""
    bins: tuple[Bin, ...]
    """Of equal width, rising."""


def calibration(
    predictions: Sequence[Prediction],
    *,
    n_bins: int = N_BINS,
    truths: Sequence[str | None] | None = None,
) -> Calibration:
    """Hold likelihoods against the truth.

    Labels are compared trimmed and in lower case. Of equally likely labels the first that was offered
    counts as the likeliest.

    Args:
        predictions: Any; those without likelihoods or without one true label are counted, and left out.
        n_bins: Of the reliability diagram and of the calibration error, of equal width from 0 to 1.
        truths: One per prediction, where they come from elsewhere; None: not known.

    Raises:
        PredictionError: No item is left, or truths and predictions differ in number.
    """
    if truths is None:
        truths = [p.truth for p in predictions]
    if len(truths) != len(predictions):
        raise PredictionError(
            f"calibration: {len(truths)} truths for {len(predictions)} predictions; pass one of each."
        )
    n_without = n_no_truth = n_unlisted = 0
    top, at_truth, squares = [], [], []
    right, agreed = [], []
    for prediction, truth in zip(predictions, truths, strict=True):
        if prediction.likelihoods is None:
            n_without += 1
            continue
        if truth is None:
            n_no_truth += 1
            continue
        given = {_plain(label): p for label, p in prediction.likelihoods.items()}
        true = _plain(truth)
        if true not in given:
            n_unlisted += 1
            continue
        likeliest = max(given, key=lambda label: given[label])
        top.append(given[likeliest])
        at_truth.append(given[true])
        squares.append(math.fsum((p - (label == true)) ** 2 for label, p in given.items()))
        right.append(likeliest == true)
        agreed.append(prediction.label is not None and _plain(prediction.label) == likeliest)
    if not top:
        raise PredictionError(
            f"calibration: none of {len(predictions)} predictions can be used: {n_without} have no "
            f"likelihoods, {n_no_truth} not one true label, of {n_unlisted} the truth was not offered. Ask "
            "with --likelihoods."
        )
    chances = np.array(top)
    hits = np.array(right, dtype=np.float64)
    bins = _bins(chances, hits, n_bins)
    known = np.maximum(at_truth, _SMALLEST)
    return Calibration(
        n=len(top),
        n_without=n_without,
        n_no_truth=n_no_truth,
        n_unlisted=n_unlisted,
        accuracy=float(hits.mean()),
        agreement=sum(agreed) / len(agreed),
        mean_probability=float(chances.mean()),
        ece=math.fsum(
            b.n / len(top) * abs(b.accuracy - b.probability)
            for b in bins
            if b.accuracy is not None and b.probability is not None
        ),
        brier=math.fsum(squares) / len(squares),
        nll=float(-np.log(known).mean()),
        n_zero=at_truth.count(0.0),
        bins=bins,
    )


def _bins(chances: np.ndarray, hits: np.ndarray, n_bins: int) -> tuple[Bin, ...]:
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    # A probability of 0 cannot be the largest of several, so the first bin may leave it out.
    places = np.searchsorted(edges[1:-1], chances, side="left")
    found = []
    for i in range(n_bins):
        inside = places == i
        n = int(inside.sum())
        found.append(
            Bin(
                low=float(edges[i]),
                high=float(edges[i + 1]),
                n=n,
                probability=float(chances[inside].mean()) if n else None,
                accuracy=float(hits[inside].mean()) if n else None,
            )
        )
    return tuple(found)


def _plain(label: str) -> str:
    return label.strip().lower()
