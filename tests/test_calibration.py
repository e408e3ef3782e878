"""Likelihoods against the truth, checked by scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from cache.errors import PredictionError
from eval.predictions import Prediction
from eval.scoring.calibration import calibration

LABELS = ("angry", "happy", "neutral", "sad")


def _prediction(
    likelihoods: dict[str, float] | None, truth: str | None, label: str | None = "happy"
) -> Prediction:
    return Prediction(
        uid="m/1", task="emotion", reply="", label=label, parse="exact" if label else "empty",
        truth=truth, run="r", spec_ids={}, likelihoods=likelihoods,
    )  # fmt: skip


@pytest.fixture(scope="module")
def answered() -> tuple[np.ndarray, list[str], list[Prediction]]:
    """Return probabilities (n, 4), truths and the predictions of a model that is too sure."""
    rng = np.random.default_rng(0)
    honest = rng.dirichlet([0.7] * 4, size=500)
    truths = [LABELS[rng.choice(4, p=row)] for row in honest]
    sharp = honest**2 / (honest**2).sum(axis=1, keepdims=True)
    predictions = [
        _prediction(dict(zip(LABELS, row.tolist(), strict=True)), truth, LABELS[rng.integers(4)])
        for row, truth in zip(sharp, truths, strict=True)
    ]
    return sharp, truths, predictions


def test_measures_are_those_of_scikit_learn(
    answered: tuple[np.ndarray, list[str], list[Prediction]],
) -> None:
    chances, truths, predictions = answered
    found = calibration(predictions)
    likeliest = [LABELS[i] for i in chances.argmax(axis=1)]
    assert found.n == 500
    assert found.accuracy == pytest.approx(accuracy_score(truths, likeliest))
    assert found.nll == pytest.approx(log_loss(truths, chances, labels=LABELS))
    per_label = [
        brier_score_loss([t == label for t in truths], chances[:, i])
        for i, label in enumerate(LABELS)
    ]
    assert found.brier == pytest.approx(sum(per_label))
    agreed = accuracy_score([p.label for p in predictions], likeliest)
    assert found.agreement == pytest.approx(agreed)


@pytest.mark.parametrize("n_bins", [1, 5, 10, 15])
def test_bins_are_those_of_scikit_learn(
    n_bins: int, answered: tuple[np.ndarray, list[str], list[Prediction]]
) -> None:
    chances, truths, predictions = answered
    found = calibration(predictions, n_bins=n_bins)
    right = chances.argmax(axis=1) == [LABELS.index(t) for t in truths]
    accuracy, probability = calibration_curve(right, chances.max(axis=1), n_bins=n_bins)
    full = [b for b in found.bins if b.n]
    assert len(found.bins) == n_bins
    assert sum(b.n for b in full) == 500
    assert [b.accuracy for b in full] == pytest.approx(accuracy)
    assert [b.probability for b in full] == pytest.approx(probability)
    weights = np.array([b.n for b in full]) / 500
    assert found.ece == pytest.approx((weights * np.abs(accuracy - probability)).sum())
    assert found.mean_probability > found.accuracy  # it was made too sure


def test_by_hand() -> None:
    found = calibration(
        [
            _prediction({"happy": 0.9, "sad": 0.1}, "Happy ", "happy"),
            _prediction({"happy": 0.6, "sad": 0.4}, "sad", "sad"),
            _prediction({"happy": 0.5, "sad": 0.5}, "happy", None),  # a tie: the first offered
            _prediction({"happy": 1.0, "sad": 0.0}, "sad", "happy"),
        ]
    )
    assert (found.n, found.accuracy, found.agreement) == (4, 0.5, 0.5)
    assert found.brier == pytest.approx((0.02 + 0.72 + 0.5 + 2) / 4)
    # Bins of the likeliest labels: 0.5 right, 0.6 wrong, 0.9 right, 1.0 wrong.
    assert found.ece == pytest.approx((0.5 + 0.6 + 0.1 + 1.0) / 4)
    assert found.n_zero == 1
    assert found.nll == pytest.approx(-np.log([0.9, 0.4, 0.5, 2.0**-52]).mean())


def test_what_is_left_out_is_counted() -> None:
    good = _prediction({"happy": 0.9, "sad": 0.1}, "happy")
    found = calibration(
        [good, _prediction(None, "happy"), _prediction({"happy": 1.0}, None),
         _prediction({"happy": 1.0}, "wishing")]
    )  # fmt: skip
    assert (found.n, found.n_without, found.n_no_truth, found.n_unlisted) == (1, 1, 1, 1)
    with pytest.raises(PredictionError, match=r"none of 1 predictions .* 1 have no likelihoods"):
        calibration([_prediction(None, "happy")])


def test_truths_from_elsewhere() -> None:
    good = _prediction({"happy": 0.9, "sad": 0.1}, "happy")
    assert calibration([good], truths=["sad"]).accuracy == 0
    with pytest.raises(PredictionError, match="2 truths for 1 predictions"):
        calibration([good], truths=["sad", "sad"])


def test_honest_probabilities_are_calibrated() -> None:
    rng = np.random.default_rng(1)
    honest = rng.dirichlet([0.7] * 4, size=4000)
    predictions = [
        _prediction(dict(zip(LABELS, row.tolist(), strict=True)), LABELS[rng.choice(4, p=row)])
        for row in honest
    ]
    found = calibration(predictions)
    assert found.ece < 0.03
    assert found.accuracy == pytest.approx(found.mean_probability, abs=0.03)
