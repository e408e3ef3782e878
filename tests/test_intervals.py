"""Bootstrap intervals, paired tests and slices, against scipy, enumeration and known distributions."""

from __future__ import annotations

from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cache.errors import PredictionError, SchemaError
from eval.predictions import ClipFacts, Prediction
from eval.scoring.intervals import (
    gain,
    holm,
    interval,
    mcnemar,
    mean_interval,
    paired,
    paired_mean,
)
from eval.scoring.slices import UNKNOWN, quantile_edges, slices
from eval.scoring.tally import Floats, Tally


def _ratio(sums: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def hits(right: object, scored: object = None) -> Tally:
    """Return the tally of an accuracy: right, and counted."""
    ones = np.asarray(right, dtype=np.float64)
    counted = np.ones(len(ones), bool) if scored is None else np.asarray(scored, dtype=bool)
    values = np.stack([ones * counted, counted.astype(np.float64)], axis=1)
    return Tally(("right", "counted"), values, _ratio, lambda sums: {}, counted)


def _f_score(sums: Floats) -> Floats:
    true_positive, predicted, actual = sums[..., 0], sums[..., 1], sums[..., 2]
    return np.asarray(2 * true_positive / np.maximum(predicted + actual, 1))


def f_score(truth: np.ndarray, predicted: np.ndarray) -> Tally:
    """Return the tally of F1 of one class: a score that is no mean over items."""
    columns = [truth & predicted, predicted, truth]
    values = np.stack(columns, axis=1).astype(np.float64)
    everything = np.ones(len(truth), bool)
    return Tally(("both", "predicted", "true"), values, _f_score, lambda sums: {}, everything)


def test_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(5)
    right = rng.random(400) < 0.7
    ours = interval(hits(right), n=20_000)
    theirs = stats.bootstrap(
        (right.astype(float),), np.mean, n_resamples=20_000, method="percentile", rng=rng
    ).confidence_interval
    assert ours.low == pytest.approx(theirs.low, abs=0.005)
    assert ours.high == pytest.approx(theirs.high, abs=0.005)
    assert (ours.level, ours.n) == (0.95, 20_000)


def test_interval_of_an_accuracy_is_binomial() -> None:
    ours = interval(hits([True] * 30 + [False] * 20), n=50_000, level=0.9)
    exact = stats.binom(50, 0.6)
    assert ours.low == pytest.approx(exact.ppf(0.05) / 50, abs=0.021)  # one item
    assert ours.high == pytest.approx(exact.ppf(0.95) / 50, abs=0.021)


def test_interval_of_an_f_score_is_that_of_scipy() -> None:
    rng = np.random.default_rng(7)
    truth = rng.random(300) < 0.4
    predicted = np.where(rng.random(300) < 0.8, truth, ~truth)

    def f1(t: np.ndarray, p: np.ndarray, axis: int) -> np.ndarray:
        both = (t * p).sum(axis)
        return np.asarray(2 * both / (t.sum(axis) + p.sum(axis)))

    theirs = stats.bootstrap(
        (truth.astype(float), predicted.astype(float)), f1, paired=True, vectorized=True,
        n_resamples=10_000, method="percentile", rng=rng,
    ).confidence_interval  # fmt: skip
    ours = interval(f_score(truth, predicted), n=10_000)
    assert ours.low == pytest.approx(theirs.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.high, abs=0.006)


def test_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(300):
        found = interval(hits(rng.random(200) < 0.6), n=400)
        covered += found.low <= 0.6 <= found.high
    # 95 % of 300 is 285; four standard deviations of the count are 15.
    assert 270 <= covered <= 299


@settings(deadline=None, max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_interval_depends_on_the_items_not_on_their_order(
    right: list[bool], shuffle: object
) -> None:
    found = interval(hits(right), n=50)
    shuffled = list(right)
    shuffle.shuffle(shuffled)  # type: ignore[attr-defined]
    assert interval(hits(shuffled), n=50) == found
    assert 0 <= found.low <= found.high <= 1
    assert interval(hits(right), n=50, seed=1).n == 50


def test_interval_leaves_out_what_is_not_scored() -> None:
    right = [True, False, True, True, False, True]
    longer = interval(hits([*right, *[False] * 50], [*[True] * 6, *[False] * 50]))
    assert longer == interval(hits(right))
    with pytest.raises(PredictionError, match="no item is scored"):
        interval(hits([True], [False]))


def test_samples_without_a_score_do_not_count() -> None:
    def only_rare(sums: Floats) -> Floats:
        return np.where(sums[..., 0] > 0, 0.5, np.nan)

    values = np.array([[1.0], *[[0.0]] * 9])
    tally = Tally(("rare",), values, only_rare, lambda sums: {}, np.ones(10, bool))
    found = interval(tally, n=2000)
    assert (found.low, found.high) == (0.5, 0.5)
    # A sample holds the rare item with 1 - 0.9^10.
    assert found.n / 2000 == pytest.approx(1 - 0.9**10, abs=0.04)
    nowhere = Tally(("rare",), values * 0, only_rare, lambda sums: {}, np.ones(10, bool))
    with pytest.raises(PredictionError, match="undefined in every bootstrap sample"):
        interval(nowhere)


def test_mean_of_sets_is_surer_than_each() -> None:
    rng = np.random.default_rng(3)
    sets = [hits(rng.random(200) < 0.5) for _ in range(9)]
    widths = [(found := interval(one, n=4000)).high - found.low for one in sets]
    mean = mean_interval(sets, n=4000)
    # Independent sets: the standard error of the mean of nine is a third of that of one.
    assert mean.high - mean.low == pytest.approx(np.mean(widths) / 3, rel=0.08)
    assert mean.low < np.mean([one.total for one in sets]) < mean.high
    assert mean_interval(sets[:1], n=100) == interval(sets[0], n=100)


def _exact_p(a: Tally, b: Tally) -> float:
    """Return the two-sided p value over all 2^n ways to swap."""
    observed = abs(float(b.score(b.sums) - a.score(a.sums)))
    as_large = 0
    for swap in product([False, True], repeat=len(a.values)):
        chosen = np.array(swap)[:, None]
        first = np.where(chosen, b.values, a.values).sum(axis=0)
        second = np.where(chosen, a.values, b.values).sum(axis=0)
        as_large += abs(float(b.score(second) - a.score(first))) >= observed - 1e-12
    return float(as_large / 2 ** len(a.values))


@pytest.mark.parametrize("seed", range(4))
def test_p_value_is_that_of_all_swaps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.random(10) < 0.5
    runs = [np.where(rng.random(10) < share, truth, ~truth) for share in (0.4, 0.9)]
    for a, b in (
        (hits(runs[0] == truth), hits(runs[1] == truth)),
        (f_score(truth, runs[0]), f_score(truth, runs[1])),
    ):
        found = paired(a, b, n=100, n_swaps=20_000)
        assert found.p_value == pytest.approx(_exact_p(a, b), abs=0.015)
        assert found.difference == pytest.approx(b.total - a.total)


def test_p_value_is_that_of_scipy() -> None:
    rng = np.random.default_rng(2)
    a = rng.random(150) < 0.6
    b = np.where(rng.random(150) < 0.8, a, rng.random(150) < 0.8)
    theirs = stats.permutation_test(
        (b.astype(float), a.astype(float)), lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples", vectorized=True, n_resamples=20_000, rng=rng,
    )  # fmt: skip
    ours = paired(hits(a), hits(b), n_swaps=20_000)
    assert ours.p_value == pytest.approx(theirs.pvalue, abs=0.012)
    exact = mcnemar(a, b)
    assert ours.p_value == pytest.approx(exact.p_value, abs=0.012)
    assert (ours.n_better, ours.n_worse) == (exact.n_only_second, exact.n_only_first)


def test_difference_has_the_interval_of_the_paired_items() -> None:
    rng = np.random.default_rng(8)
    a = rng.random(500) < 0.6
    b = np.where(rng.random(500) < 0.9, a, ~a)
    theirs = stats.bootstrap(
        (b.astype(float) - a.astype(float),),
        np.mean,
        n_resamples=9999,
        method="percentile",
        rng=rng,
    ).confidence_interval
    ours = paired(hits(a), hits(b), n=10_000)
    assert ours.low == pytest.approx(theirs.low, abs=0.005)
    assert ours.high == pytest.approx(theirs.high, abs=0.005)
    assert ours.n_items == 500


def test_equal_runs_do_not_differ() -> None:
    tally = hits([True, False, True])
    found = paired(tally, tally)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert (found.n_better, found.n_worse) == (0, 0)


def test_false_alarms_are_as_rare_as_the_level() -> None:
    rng = np.random.default_rng(4)
    alarms = 0
    for _ in range(300):
        a, b = (hits(rng.random(60) < 0.5) for _ in range(2))
        alarms += paired(a, b, n=10, n_swaps=400).p_value <= 0.05
    # Discrete, so at most 15 are expected; 30 is four standard deviations more.
    assert alarms <= 30


def test_gain_says_on_which_items_a_run_is_better() -> None:
    truth = np.array([True, True, False, False, True])
    first = np.array([True, False, True, False, False])
    second = np.array([False, True, False, False, False])
    gains = gain(f_score(truth, first), f_score(truth, second))
    # F1 is 2/5; without the hit 0; with the missed one 4/6; without the false alarm 2/4.
    assert gains == pytest.approx([-2 / 5, 4 / 6 - 2 / 5, 1 / 2 - 2 / 5, 0, 0])
    found = paired(f_score(truth, first), f_score(truth, second), n=10)
    assert (found.n_better, found.n_worse) == (2, 1)


def test_only_the_same_items_are_compared() -> None:
    with pytest.raises(PredictionError, match=r"3 items .* and 2 items .* same items"):
        paired(hits([True] * 3), hits([True] * 2))
    other = f_score(np.array([True]), np.array([True]))
    with pytest.raises(PredictionError, match=r"right, counted .* both, predicted, true"):
        paired(hits([True]), other)


def test_mean_of_pairs() -> None:
    rng = np.random.default_rng(6)
    pairs = [(hits(rng.random(80) < 0.5), hits(rng.random(80) < 0.65)) for _ in range(6)]
    found = paired_mean(pairs, n=2000)
    assert found.difference == pytest.approx(np.mean([b.total - a.total for a, b in pairs]))
    assert found.n_items == 480
    assert found.low < found.difference < found.high
    each = [paired(a, b).p_value for a, b in pairs]
    assert found.p_value < min(each)  # six weak findings in one direction


def test_mcnemar_by_hand() -> None:
    a = np.array([True] * 9 + [False] * 1 + [True] * 5)
    b = np.array([False] * 9 + [True] * 1 + [True] * 5)
    found = mcnemar(a, b)
    # 9 against 1: both tails of ten coins, (1 + 10) * 2 / 2^10.
    assert (found.n_only_first, found.n_only_second) == (9, 1)
    assert found.p_value == pytest.approx(2 * sum(comb(10, i) for i in (0, 1)) / 2**10)
    assert mcnemar(a, a).p_value == 1
    with pytest.raises(PredictionError, match="15 items with 3"):
        mcnemar(a, b[:3])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.slow
def test_all_sets_in_seconds() -> None:
    """As many items as the eighteen sets have, sums as wide as the widest."""
    import time

    rng = np.random.default_rng(0)
    start = time.process_time()
    for n, k in [*[(2500, 21)] * 13, (4659, 9), (1116, 78), (580, 33), (532, 15), (36_133, 21)]:
        values = (rng.random((n, k)) < 0.2).astype(float)
        tally = Tally(
            tuple(map(str, range(k))), values, lambda s: s[..., 0] / s.sum(-1), lambda s: {},
            np.ones(n, bool),
        )  # fmt: skip
        interval(tally)
    assert time.process_time() - start < 20


def _prediction(uid: str, **about: object) -> Prediction:
    masked = about.pop("masked", ())
    facts = ClipFacts.model_validate(about) if about else None
    return Prediction(
        uid=uid, task="emotion", masked=masked, reply="happy", label="happy", parse="exact",  # type: ignore[arg-type]
        truth="happy", run="r", spec_ids={}, about=facts,
    )  # fmt: skip


def test_slices_hold_every_item_once() -> None:
    predictions = [
        _prediction("meld/1", language="en", duration_s=1.5),
        _prediction("meld/2", language="en", duration_s=2.0),
        _prediction("sims/3", language="zh", duration_s=4.9, absent=("audio",)),
        _prediction("sims/4", language="zh", duration_s=11.0, masked=("audio", "video")),
        _prediction("sims/5"),
        None,
    ]
    right = [True, False, True, True, False, True]
    tally = hits(right, [True, True, True, True, True, False])
    found = slices(tally, predictions, n=20)
    named = {by: [(s.name, s.n_offered, s.n) for s in parts] for by, parts in found.items()}
    assert named == {
        "corpus": [("meld", 2, 2), ("sims", 3, 3), (UNKNOWN, 1, 0)],
        "language": [("en", 2, 2), ("zh", 2, 2), (UNKNOWN, 2, 1)],
        "duration": [
            ("under 2 s", 1, 1), ("2 to 5 s", 2, 2), ("from 10 s", 1, 1), (UNKNOWN, 2, 1),
        ],
        "missing": [
            ("nothing missing", 2, 2), ("without audio", 1, 1), ("without audio + video", 1, 1),
            (UNKNOWN, 2, 1),
        ],
    }  # fmt: skip
    meld, sims, unknown = found["corpus"]
    assert (meld.score, sims.score, unknown.score) == (0.5, pytest.approx(2 / 3), None)
    assert unknown.interval is None
    assert meld.interval == interval(hits(right[:2]), n=20)


def test_a_division_into_one_slice_is_left_out() -> None:
    predictions = [_prediction("meld/1", language="en"), _prediction("meld/2", language="en")]
    assert slices(hits([True, False]), predictions) == {}


def test_slices_by_own_borders() -> None:
    predictions = [_prediction(f"m/{i}", duration_s=float(i)) for i in range(1, 9)]
    assert quantile_edges(predictions, 4) == (2.75, 4.5, 6.25)
    found = slices(hits([True] * 8), predictions, by=["duration"], edges_s=(2.75, 4.5, 6.25), n=5)
    assert [(s.name, s.n) for s in found["duration"]] == [
        ("under 2.75 s", 2), ("2.75 to 4.5 s", 2), ("4.5 to 6.25 s", 2), ("from 6.25 s", 2),
    ]  # fmt: skip
    assert quantile_edges([None, _prediction("m/1")]) == ()
    assert quantile_edges([_prediction("m/1", duration_s=3.0)] * 5) == ()
    with pytest.raises(SchemaError, match="do not rise"):
        slices(hits([True] * 8), predictions, edges_s=(5.0, 2.0))
    with pytest.raises(SchemaError, match="1 predictions for 8 items"):
        slices(hits([True] * 8), predictions[:1])
