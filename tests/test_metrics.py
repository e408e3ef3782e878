from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import MissingDependencyError, PredictionError
from eval.metrics import SingleLabelScores, score_multi_label, score_single_label

LABELS = ["angry", "happy", "neutral", "sad"]

# Truth: 4 angry, 3 happy, 1 neutral, 0 sad. Two replies without a label, one of them empty.
TRUTHS = ["angry", "angry", "angry", "angry", "happy", "happy", "happy", "neutral"]
PREDICTED = ["angry", "angry", "happy", None, "happy", "sad", None, "angry"]
PARSES = ["tag", "tag", "exact", "off_list", "alias", "exact", "empty", "tag"]


def test_scores_against_values_by_hand() -> None:
    scores = score_single_label(TRUTHS, PREDICTED, LABELS, PARSES)  # type: ignore[arg-type]

    assert scores.confusion == [
        # angry happy neutral sad | off list
        [2, 1, 0, 0, 1],
        [0, 1, 0, 1, 1],
        [1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert scores.accuracy == pytest.approx(3 / 8)  # 2 angry + 1 happy of 8
    angry, happy, neutral, sad = scores.per_class
    # angry: 2 right, 3 predicted, 4 true
    assert (angry.precision, angry.recall) == pytest.approx((2 / 3, 2 / 4))
    assert angry.f1 == pytest.approx(2 * 2 / (3 + 4))
    # happy: 1 right, 2 predicted, 3 true
    assert (happy.precision, happy.recall) == pytest.approx((1 / 2, 1 / 3))
    assert happy.f1 == pytest.approx(2 * 1 / (2 + 3))
    # neutral: never predicted; sad: predicted once, never true
    assert (neutral.precision, neutral.recall, neutral.f1) == (0, 0, 0)
    assert (sad.precision, sad.recall, sad.f1) == (0, 0, 0)
    assert [entry.support for entry in scores.per_class] == [4, 3, 1, 0]
    # 4/8 x 4/7 + 3/8 x 2/5 + 1/8 x 0
    assert scores.weighted_f1 == pytest.approx(4 / 8 * 4 / 7 + 3 / 8 * 2 / 5)
    # over angry, happy and neutral: sad does not occur in the truth
    assert scores.uar == pytest.approx((2 / 4 + 1 / 3 + 0) / 3)
    assert (scores.n_offered, scores.n_scored) == (8, 8)
    assert (scores.n_off_list, scores.n_empty) == (1, 1)


def test_without_parses_empty_replies_are_not_told_apart() -> None:
    scores = score_single_label(TRUTHS, PREDICTED, LABELS)
    assert (scores.n_off_list, scores.n_empty) == (2, None)


def test_a_reply_without_a_label_lowers_recall_and_no_precision() -> None:
    # Two classes; the support-weighted F1 of a three-way exact match (section 7 of the rules):
    # positive: 1 right, 1 predicted, 2 true -> 2/3; negative: 1 right, 1 predicted, 1 true -> 1
    scores = score_single_label(
        ["positive", "positive", "negative"],
        ["positive", None, "negative"],
        ["positive", "negative"],
    )
    assert [entry.precision for entry in scores.per_class] == [1, 1]
    assert [entry.recall for entry in scores.per_class] == [1 / 2, 1]
    assert scores.weighted_f1 == pytest.approx(2 / 3 * 2 / 3 + 1 / 3 * 1)


def test_all_replies_off_list() -> None:
    scores = score_single_label(["angry", "sad"], [None, None], LABELS)
    assert (scores.accuracy, scores.weighted_f1, scores.uar) == (0, 0, 0)
    assert scores.n_off_list == 2


def test_a_clip_without_a_true_label_is_offered_but_not_scored() -> None:
    scores = score_single_label(
        ["angry", None, None], ["angry", "sad", None], LABELS, ["tag", "tag", "empty"]
    )
    assert (scores.n_offered, scores.n_scored, scores.n_off_list, scores.n_empty) == (3, 1, 0, 0)
    assert scores.accuracy == 1
    assert sum(map(sum, scores.confusion)) == 1


PAIRS = st.lists(
    st.tuples(st.sampled_from(LABELS), st.none() | st.sampled_from(LABELS)), min_size=1
)


def score(pairs: list[tuple[str, str | None]], labels: list[str]) -> SingleLabelScores:
    return score_single_label([t for t, _ in pairs], [p for _, p in pairs], labels)


@given(PAIRS)
def test_the_scores_follow_from_the_confusion_matrix(pairs: list[tuple[str, str | None]]) -> None:
    scores = score(pairs, LABELS)
    n = len(LABELS)
    total = sum(map(sum, scores.confusion))
    assert total == scores.n_scored == len(pairs)
    assert scores.accuracy == sum(scores.confusion[i][i] for i in range(n)) / total
    assert scores.n_off_list == sum(row[n] for row in scores.confusion)
    supports = [sum(row) for row in scores.confusion]
    assert [entry.support for entry in scores.per_class] == supports
    recalls = [scores.confusion[i][i] / supports[i] for i in range(n) if supports[i]]
    assert scores.uar == pytest.approx(sum(recalls) / len(recalls))
    predicted = [sum(row[i] for row in scores.confusion) for i in range(n)]
    f1 = [
        2 * scores.confusion[i][i] / (predicted[i] + supports[i]) if supports[i] else 0
        for i in range(n)
    ]
    weighted = sum(a * b for a, b in zip(f1, supports, strict=True)) / total
    assert scores.weighted_f1 == pytest.approx(weighted)


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_clips_and_labels_has_no_influence(
    pairs: list[tuple[str, str | None]], shuffler: random.Random
) -> None:
    scores = score(pairs, LABELS)
    shuffled_pairs, shuffled_labels = list(pairs), list(LABELS)
    shuffler.shuffle(shuffled_pairs)
    assert score(shuffled_pairs, LABELS) == scores
    shuffler.shuffle(shuffled_labels)
    other = score(shuffled_pairs, shuffled_labels)
    assert other.accuracy == scores.accuracy
    assert (other.weighted_f1, other.uar) == pytest.approx((scores.weighted_f1, scores.uar))
    assert {c.label: c for c in other.per_class} == {c.label: c for c in scores.per_class}


@given(st.lists(st.sampled_from(LABELS), min_size=1))
def test_perfect_replies_score_one(truths: list[str]) -> None:
    scores = score_single_label(truths, truths, LABELS)
    assert (scores.accuracy, scores.weighted_f1, scores.uar) == pytest.approx((1, 1, 1))
    assert scores.n_off_list == 0


def test_scores_survive_json() -> None:
    scores = score_single_label(TRUTHS, PREDICTED, LABELS)
    assert SingleLabelScores.model_validate_json(scores.model_dump_json()) == scores


@pytest.mark.parametrize(
    ("truths", "predicted", "labels", "parses", "message"),
    [
        ([], [], LABELS, None, "none of 0 replies has a true label"),
        ([None], ["sad"], LABELS, None, "none of 1 replies has a true label"),
        (["sad"], [], LABELS, None, "1 truths, 0 predicted labels"),
        (["sad"], ["sad"], LABELS, [], "and 0 parses"),
        (["Sad"], ["sad"], LABELS, None, "true label 'Sad'.*Did you mean 'sad'"),
        (["sad"], ["joy"], LABELS, None, "predicted label 'joy' .position 0. is not in the"),
        (["sad"], ["sad"], ["sad", "sad"], None, "label 'sad' is listed twice"),
        (["sad"], ["sad"], LABELS, ["empty"], "was parsed as 'empty'"),
        (["sad"], [None], LABELS, ["tag"], "was parsed as 'tag'"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    truths: list[str | None],
    predicted: list[str | None],
    labels: list[str],
    parses: list[str] | None,
    message: str,
) -> None:
    with pytest.raises(PredictionError, match=message):
        score_single_label(truths, predicted, labels, parses)  # type: ignore[arg-type]


def test_a_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'emocache\[eval\]'"):
        score_single_label(["sad"], ["sad"], LABELS)


def test_scores_of_several_labels_by_hand() -> None:
    # Truths and replies of five clips over a, b, c; the fourth has no truth, and enters nothing.
    truths = [("a",), ("a", "b"), ("b",), (), ("a",)]
    replies = [("a",), ("a",), ("b", "c"), ("c",), ("a",)]
    unread = [(), (), (), (), ("odd",)]
    found = score_multi_label(truths, replies, ("a", "b", "c"), ["exact"] * 5, unread)
    # Right sets: the first alone; the last names a word that is no label.
    assert found.accuracy == 1 / 4
    # a: 3 of 3, b: precision 1/1, recall 1/2, c: 0 of 1, never true.
    assert [(c.precision, c.recall, c.support) for c in found.per_class] == [
        (1, 1, 3), (1, 0.5, 2), (0, 0, 0),
    ]  # fmt: skip
    f1_b = 2 * 1 * 0.5 / 1.5
    assert found.macro_f1 == pytest.approx((1 + f1_b) / 2)
    assert found.weighted_f1 == pytest.approx((3 * 1 + 2 * f1_b) / 5)
    assert found.uar == pytest.approx((1 + 0.5) / 2)
    # All pairs: 4 right, 1 too many, 1 missing.
    assert found.micro_f1 == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))
    assert (found.n_offered, found.n_scored, found.n_partly) == (5, 4, 1)
    assert (found.commonest, found.commonest_share) == (("a",), 0.5)


def test_replies_of_several_labels_without_any_are_counted() -> None:
    found = score_multi_label(
        [("b", "a")] * 3,
        [(), (), ("a", "b")],
        ("a", "b"),
        ["off_list", "empty", "tag"],
        [("x",), (), ()],
    )
    assert (found.n_off_list, found.n_empty, found.n_partly) == (1, 1, 0)
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.commonest == ("a", "b"), "in the order of the space"


@pytest.mark.parametrize(
    ("truths", "replies", "message"),
    [
        ([("a",)], [("x",)], "predicted label 'x' .* not in the label space a, b"),
        ([("bb",)], [("a",)], "true label 'bb' .*Did you mean 'b'"),
        ([()], [("a",)], "none of 1 replies has a true label"),
        ([("a",), ("a",)], [("a",)], r"lengths \[1, 2\] differ"),
    ],
)
def test_several_labels_that_cannot_be_scored(
    truths: list[tuple[str, ...]], replies: list[tuple[str, ...]], message: str
) -> None:
    with pytest.raises(PredictionError, match=message):
        score_multi_label(truths, replies, ("a", "b"), ["exact"], [()])
