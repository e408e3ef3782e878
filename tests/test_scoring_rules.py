"""The metrics: against scikit-learn, against values by hand, and by their properties."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    recall_score,
)

from cache.errors import PredictionError
from eval.scoring import rules
from eval.scoring.tally import Tally
from eval.scoring.wheels import Wheels
from tests.wheel_tables import write_wheels

CLASSES = ("angry", "happy", "neutral", "sad")
SAID = (*CLASSES, "happy.", "other")
singles = st.lists(
    st.tuples(st.sampled_from(CLASSES), st.one_of(st.none(), st.sampled_from(SAID))),
    min_size=1,
    max_size=40,
)
sets = st.lists(
    st.tuples(
        st.lists(st.sampled_from(CLASSES), unique=True),
        st.lists(st.sampled_from(SAID), unique=True),
    ),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return Wheels.load(write_wheels(tmp_path_factory.mktemp("tables") / "wheels"))


@settings(max_examples=50)
@given(singles)
def test_single_labels_score_as_in_scikit_learn(pairs: list[tuple[str, str | None]]) -> None:
    truths, said = [t for t, _ in pairs], [p for _, p in pairs]
    texts = [p or "" for p in said]
    present = sorted(set(truths))
    assert rules.accuracy(truths, said).total == pytest.approx(accuracy_score(truths, texts))
    # Weights are the shares of the true classes; labels that only replies have weigh nothing.
    expected = f1_score(truths, texts, average="weighted", zero_division=0)
    assert rules.weighted_f1(truths, said).total == pytest.approx(expected)
    expected = f1_score(truths, texts, labels=present, average="macro", zero_division=0)
    assert rules.macro_f1(truths, said).total == pytest.approx(expected)
    expected = recall_score(truths, texts, labels=present, average="macro", zero_division=0)
    assert rules.uar(truths, said).total == pytest.approx(expected)
    tally = rules.accuracy(truths, said)
    recalls = recall_score(truths, texts, labels=present, average=None, zero_division=0)
    assert list(tally.parts(tally.sums)) == present
    assert list(tally.parts(tally.sums).values()) == pytest.approx(recalls)


def test_uar_is_scikit_learns_balanced_accuracy() -> None:
    rng = random.Random(0)
    truths = rng.choices(CLASSES, k=300)
    said = [t if rng.random() < 0.5 else rng.choice(CLASSES) for t in truths]
    assert rules.uar(truths, said).total == pytest.approx(balanced_accuracy_score(truths, said))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["positive", "negative", "neutral"]),
            st.one_of(st.none(), st.sampled_from(["positive", "negative", "neutral", "mixed"])),
        ),
        max_size=40,
    )
)
def test_sentiment_scores_as_in_scikit_learn_by_both_rules(
    pairs: list[tuple[str, str | None]],
) -> None:
    kept = [(truth, said or "") for truth, said in pairs if truth != "neutral"]
    truths, said = [t for t, _ in pairs], [p for _, p in pairs]
    ours, theirs = rules.waf(truths, said), rules.sign_f1(truths, said)
    assert int(ours.scored.sum()) == int(theirs.scored.sum()) == len(kept)
    if not kept:
        assert math.isnan(ours.total)
        assert math.isnan(theirs.total)
        return
    expected = f1_score(
        [t for t, _ in kept], [p for _, p in kept], average="weighted", zero_division=0
    )
    assert ours.total == pytest.approx(expected)
    expected = f1_score(
        [t == "positive" for t, _ in kept],
        [p == "positive" for _, p in kept],
        average="weighted",
        zero_division=0,
    )
    assert theirs.total == pytest.approx(expected)


def test_a_neutral_reply_is_wrong_by_the_scorer_and_right_for_a_negative_by_mer_unibench() -> None:
    truths, said = ["negative", "positive", "neutral"], ["neutral", "positive", "positive"]
    # Negative: recall 0, F1 0; positive: F1 1, for the neutral truth's reply is not there.
    assert rules.waf(truths, said).total == pytest.approx(0.5)
    assert rules.sign_f1(truths, said).total == 1
    # And the other way round: an unreadable reply to a positive truth spoils the negative class too.
    truths, said = ["negative", "positive"], ["negative", "hm"]
    assert rules.waf(truths, said).total == pytest.approx(0.5)
    assert rules.sign_f1(truths, said).total == pytest.approx((2 / 3) / 2)


def test_numbers_are_read_by_their_sign_in_mer_unibenchs_rule() -> None:
    assert rules.sign_f1(["positive", "negative"], ["0.4", "-2"]).total == 1
    assert rules.sign_f1(["positive", "negative"], ["0", "nan"]).total == pytest.approx(1 / 3)
    with pytest.raises(PredictionError, match=r"'mixed' has no sign.*positive, negative, neutral"):
        rules.sign_f1(["mixed"], ["positive"])


@settings(max_examples=50)
@given(sets)
def test_several_labels_score_as_in_scikit_learn(pairs: list[tuple[list[str], list[str]]]) -> None:
    truths, said = [t for t, _ in pairs], [p for _, p in pairs]
    classes = sorted({label for truth in truths for label in truth})
    tally = rules.mean_average_precision(truths, said)
    if not classes:
        assert math.isnan(tally.total)
        return
    true = np.array([[c in truth for c in classes] for truth in truths], dtype=int)
    found = np.array([[c in words for c in classes] for words in said], dtype=int)
    each = [average_precision_score(true[:, k], found[:, k]) for k in range(len(classes))]
    assert tally.parts(tally.sums) == pytest.approx(dict(zip(classes, each, strict=True)))
    assert tally.total == pytest.approx(np.mean(each))
    if len(classes) > 1:  # scikit-learn takes one column for a task of two classes
        expected = f1_score(true, found, average="micro", zero_division=0)
        assert rules.micro_f1(truths, said).total == pytest.approx(expected)
        expected = f1_score(true, found, average="samples", zero_division=0)
        assert rules.sample_f1(truths, said).total == pytest.approx(expected)
    both, either = (true & found).sum(1), (true | found).sum(1)
    assert rules.jaccard(truths, said).total == pytest.approx(np.mean(both / (either + 1e-6)))


def test_no_labels_and_all_labels_score_the_mean_prevalence() -> None:
    rng = random.Random(1)
    truths = [tuple(c for c in CLASSES if rng.random() < 0.3) for _ in range(200)]
    floor = np.mean([sum(c in t for t in truths) / len(truths) for c in CLASSES])
    nothing = rules.mean_average_precision(truths, [()] * len(truths))
    everything = rules.mean_average_precision(truths, [CLASSES] * len(truths))
    assert nothing.total == pytest.approx(floor)
    assert everything.total == pytest.approx(floor)
    assert rules.mean_average_precision(truths, truths).total == pytest.approx(1)


def test_hit_rate_is_the_plain_mean_of_the_wheels_over_what_each_scores(wheels: Wheels) -> None:
    # Wheel 2 has no group for "terrified"; no wheel has one for "neutral".
    truths = ["happiness", "sad", "terrified", "neutral", None]
    said = [("joy", "sad"), ("furious",), ("shy", "terrified"), ("neutral",), ("happy",)]
    tally = rules.hit_rate(truths, said, wheels)
    assert tally.scored.tolist() == [True, True, False, False, False]
    # "terrified" is no known form, so it is scored nowhere; see the next test for "scared".
    assert tally.parts(tally.sums) == dict.fromkeys(wheels.names, 0.5)
    assert tally.total == 0.5


def test_wheels_that_drop_different_items_weigh_the_same(tmp_path: Path) -> None:
    rows = (("Happy", "Glad", "Joyous"), ("Sad", "Low", "Blue"))
    only_sad = (("Sad", "Low", "Blue"),)
    wheels = Wheels.load(write_wheels(tmp_path / "wheels", (rows, only_sad)))
    truths, said = ["happy", "happy", "sad"], [("happy",), ("happy",), ("happy",)]
    tally = rules.hit_rate(truths, said, wheels)
    # Wheel 1: 2 of 3; wheel 2 knows only the sad one: 0 of 1. Not 2 of 4.
    assert tally.parts(tally.sums) == pytest.approx({"wheel1": 2 / 3, "wheel2": 0})
    assert tally.total == pytest.approx(1 / 3)
    # A sample without the sad one leaves wheel 2 out, as a set without it would.
    assert tally.of(np.array([True, True, False])) == 1
    only_happy = rules.hit_rate(truths[:2], said[:2], wheels)
    assert math.isnan(only_happy.parts(only_happy.sums)["wheel2"])
    assert only_happy.total == 1


def test_more_predicted_words_cost_nothing_in_hit_rate(wheels: Wheels) -> None:
    truths = ["happy", "sad", "angry"]
    everything = [("happy", "sad", "angry", "unheard-of")] * 3
    assert rules.hit_rate(truths, everything, wheels).total == 1
    assert rules.hit_rate(truths, [("unheard-of",), (), ("sad",)], wheels).total == 0


def test_wheel_f_is_the_f_of_mean_precision_and_mean_recall(wheels: Wheels) -> None:
    truths = [("happy", "joy", "sad"), ("angry",), ("neutral",), ()]
    said = [("happiness",), ("sad", "fury", "furious", "what"), ("happy",), ("happy",)]
    # Item 1: T = {happy, sad}, P = {happy}: precision 1, recall 1/2.
    # Item 2: T = {angry}, P = {sad, angry}: precision 1/2, recall 1. The others are not scored.
    tally = rules.wheel_f(truths, said, wheels)
    assert tally.scored.tolist() == [True, True, False, False]
    assert tally.total == pytest.approx(2 * 0.75 * 0.75 / 1.5)
    # The mean of the items' own F would be 2/3.
    assert tally.total != pytest.approx(2 / 3)


def test_wheel_f_of_nothing_right_is_zero_not_undefined(wheels: Wheels) -> None:
    tally = rules.wheel_f([("happy",), ("sad",)], [(), ("angry",)], wheels)
    assert tally.total == 0
    assert math.isnan(rules.wheel_f([("neutral",)], [("happy",)], wheels).total)


@pytest.mark.parametrize("n", [0, 1])
def test_without_a_scored_item_there_is_no_score(n: int, wheels: Wheels) -> None:
    for tally in (
        rules.hit_rate([None] * n, [("happy",)] * n, wheels),
        rules.wheel_f([()] * n, [("happy",)] * n, wheels),
        rules.accuracy([None] * n, ["happy"] * n),
        rules.uar([None] * n, ["happy"] * n),
        rules.waf(["neutral"] * n, ["happy"] * n),
        rules.mean_average_precision([None] * n, [("happy",)] * n),
        rules.micro_f1([None] * n, [("happy",)] * n),
        rules.sample_f1([None] * n, [("happy",)] * n),
        rules.jaccard([None] * n, [("happy",)] * n),
    ):
        assert math.isnan(tally.total)
        assert not tally.scored.any()


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(PredictionError, match="2 truths and 1 replies"):
        rules.accuracy(["happy", "sad"], ["happy"])


@given(singles, st.integers(0, 2**32 - 1))
def test_a_score_of_some_items_is_the_score_of_a_set_of_them(
    pairs: list[tuple[str, str | None]], seed: int
) -> None:
    # What the intervals rest on: sums of rows are all that a metric needs.
    truths, said = [t for t, _ in pairs], [p for _, p in pairs]
    weights = np.random.default_rng(seed).integers(0, 3, (5, len(pairs)))
    for metric in (rules.accuracy, rules.uar, rules.weighted_f1, rules.macro_f1, rules.waf):
        tally: Tally = metric(truths, said)
        drawn = tally.score(weights @ tally.values)
        for row, score in zip(weights, drawn, strict=True):
            again = metric(list(np.repeat(truths, row)), _repeated(said, row))
            assert score == pytest.approx(again.total, nan_ok=True)


@given(sets, st.integers(0, 2**32 - 1))
def test_the_same_of_several_labels(pairs: list[tuple[list[str], list[str]]], seed: int) -> None:
    truths, said = [t for t, _ in pairs], [p for _, p in pairs]
    weights = np.random.default_rng(seed).integers(0, 3, (5, len(pairs)))
    tally = rules.mean_average_precision(truths, said)
    drawn = tally.score(weights @ tally.values)
    for row, score in zip(weights, drawn, strict=True):
        again = rules.mean_average_precision(_repeated(truths, row), _repeated(said, row))
        assert score == pytest.approx(again.total, nan_ok=True)


def test_the_same_of_the_wheels(wheels: Wheels) -> None:
    rng = random.Random(3)
    words = ("happy", "joy", "gloomy", "fury", "scared", "neutral", "what")
    truths = rng.choices(words, k=30)
    said = [tuple(rng.choices(words, k=rng.randint(0, 3))) for _ in truths]
    weights = np.random.default_rng(3).integers(0, 2, (4, 5, 30))
    hits = rules.hit_rate(truths, said, wheels)
    overlap = rules.wheel_f([(truth, "sad") for truth in truths], said, wheels)
    drawn = hits.score(weights @ hits.values), overlap.score(weights @ overlap.values)
    assert drawn[0].shape == drawn[1].shape == (4, 5)
    for place in np.ndindex(4, 5):
        some, replies = _repeated(truths, weights[place]), _repeated(said, weights[place])
        assert drawn[0][place] == pytest.approx(rules.hit_rate(some, replies, wheels).total)
        pairs = [(truth, "sad") for truth in some]
        assert drawn[1][place] == pytest.approx(rules.wheel_f(pairs, replies, wheels).total)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["happy", "sad", "angry", "neutral"]),
            st.lists(st.sampled_from(["joy", "gloomy", "fury", "scared", "what"])),
        ),
        max_size=20,
    )
)
def test_hit_rate_and_wheel_f_stay_between_0_and_1_and_ignore_the_order(
    wheels: Wheels, pairs: list[tuple[str, list[str]]]
) -> None:
    truths, said = [t for t, _ in pairs], [p for _, p in pairs]
    turned = [list(reversed(words)) for words in said]
    doubled = [words + words for words in said]
    for score in (
        lambda words: rules.hit_rate(truths, words, wheels).total,
        lambda words: rules.wheel_f([(t,) for t in truths], words, wheels).total,
    ):
        found = score(said)
        assert math.isnan(found) or 0 <= found <= 1
        assert score(turned) == pytest.approx(found, nan_ok=True)
        assert score(doubled) == pytest.approx(found, nan_ok=True)


@pytest.mark.parametrize("classes", [("positive", "negative"), CLASSES])
def test_constant_and_random_answers_score_what_is_expected_of_them(
    classes: Sequence[str],
) -> None:
    rng = random.Random(2)
    truths = rng.choices(classes, weights=range(1, len(classes) + 1), k=20_000)
    share = Counter(truths)[classes[0]] / len(truths)
    constant = [classes[0]] * len(truths)
    assert rules.accuracy(truths, constant).total == pytest.approx(share)
    assert rules.uar(truths, constant).total == pytest.approx(1 / len(classes))
    # One class is always said: its F1 is 2s/(1+s), all others are 0.
    assert rules.weighted_f1(truths, constant).total == pytest.approx(
        share * 2 * share / (1 + share)
    )
    guessed = rng.choices(classes, k=len(truths))
    # Uniform guessing: right one time in k, whatever the truth.
    assert rules.accuracy(truths, guessed).total == pytest.approx(1 / len(classes), abs=0.01)
    assert rules.uar(truths, guessed).total == pytest.approx(1 / len(classes), abs=0.02)


def _repeated(values: Sequence[object], times: Sequence[int]) -> list:  # type: ignore[type-arg]
    return [value for value, n in zip(values, times, strict=True) for _ in range(n)]
