"""Scoring of predictions: readings, protocols, what random, constant and perfect replies score."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from cache.errors import PredictionError
from eval.benchmarks import PROTOCOLS, WHEEL_METRICS, averages, benchmark, benchmarks
from eval.predictions import write_predictions
from eval.scoring.result import BenchmarkScore
from eval.scoring.score import score_all, score_file, score_predictions
from eval.scoring.texts import labels_of, read_reply, words_of
from eval.scoring.wheels import Wheels
from tests.scoring_rows import KNOWN, own, rows_of, score, truths_for, write
from tests.wheel_tables import write_wheels


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return Wheels.load(write_wheels(tmp_path_factory.mktemp("tables") / "wheels"))


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("happy", ("happy",)),
        ("HAPPY ", ("happy",)),
        ("happy, sad", ("happy", "sad")),
        ("happy,happy", ("happy", "happy")),
        ("", ()),
        ("  ", ()),
        ('"\'"', ()),
        (" , ,", ()),
        ("happy; sad", ("happy; sad",)),
        ("happy/sad", ("happy/sad",)),
        ("happy and sad", ("happy and sad",)),
        ("happy，sad", ("happy，sad",)),  # noqa: RUF001
        ("happy.", ("happy.",)),
        ("<answer>happy</answer>", ("<answer>happy</answer>",)),
        ("[happy, sad, angry]", ("[happy", "sad", "angry]")),
        ("[happy]", ("[happy]",)),
        ("['happy', \"sad\"]", ("[", "happy", "sad", "]")),
        ("can't say", ("can", "t say")),
        ("the person's happy", ("the person", "s happy")),
        ("“happy”", ("“happy”",)),
        ("happy\nsad", ("happy\nsad",)),
    ],
)
def test_a_reply_is_taken_apart_as_the_released_scorer_does(
    reply: str, words: tuple[str, ...]
) -> None:
    assert words_of(reply) == words
    assert read_reply(reply, "mer2023", "raw").predicted == words


def test_an_unquoted_list_in_brackets_loses_its_first_and_last_word(
    tmp_path: Path, wheels: Wheels
) -> None:
    rows = rows_of([("happy", "[happy, sad]"), ("sad", "[happy, sad, x]"), ("sad", "['sad']")])
    assert score(tmp_path, rows, "meld-e", wheels=wheels).score == pytest.approx(2 / 3)


def test_labels_of_map_are_taken_apart_at_commas_and_semicolons() -> None:
    assert labels_of(" Anger; fear,ANGER ,; doubt/confusion") == (
        "anger",
        "fear",
        "doubt/confusion",
    )
    assert labels_of("") == ()


def test_readings_differ_in_how_much_of_a_reply_is_compared() -> None:
    reply = "<think>He smiles, not sad.</think> <answer>Happy.</answer>"
    assert read_reply(reply, "dfew", "raw").predicted == (reply.lower(),)
    assert read_reply(reply, "dfew", "tag").predicted == ("happy.",)
    assert read_reply(reply, "dfew", "label").predicted == ("happy",)
    assert read_reply("<answer>Happiness</answer>", "dfew", "label") == (("happy",), "alias")
    # Several: words that are not offered stay, where the wheels may know them.
    assert read_reply('<answer>Joy, "mirth".</answer>', "meld-e", "label").predicted == (
        "joy",
        "mirth",
    )
    assert read_reply("<answer>Anger; mirth.</answer>", "mafw-m", "label").predicted == ("anger",)
    assert read_reply("Mirth; joy.", "ov-merd", "label").predicted == ("mirth", "joy")
    assert read_reply("", "dfew", "tag") == ((), "empty")


def test_paper_reduces_a_reply_to_its_answer_and_released_does_not(tmp_path: Path) -> None:
    rows = rows_of([("happy", "<think>a</think><answer>happy</answer>"), ("sad", "sad")])
    paper = score(tmp_path, rows, "dfew")
    assert (paper.score, paper.reading) == (1, "tag")
    assert paper.other_protocols == {"released": 0.5}
    released = score(tmp_path, rows, "dfew", protocol="released")
    assert (released.score, released.reading) == (0.5, "raw")
    assert released.other_protocols == {"paper": 1, "unibench": 1}
    assert score(tmp_path, rows, "dfew", protocol="released", reading="tag").score == 1


def test_accuracy_is_exact_but_for_case_and_outer_blanks(tmp_path: Path) -> None:
    pairs = [
        ("happy", " HAPPY\n"), ("happy", "happiness"), ("happy", "happy."), ("neutral", "neutral"),
        ("sad", ""), ("sad", "sad"), ("angry", "happy"), ("angry", "anger"),
    ]  # fmt: skip
    found = score(tmp_path, rows_of(pairs), "dfew")
    assert found.score == pytest.approx(3 / 8)
    assert found.parts == pytest.approx({"happy": 1 / 3, "neutral": 1, "sad": 1 / 2, "angry": 0})
    assert found.part_counts == {"happy": 3, "neutral": 1, "sad": 2, "angry": 2}
    assert found.extras["war"] == found.score
    assert found.extras["uar"] == pytest.approx((1 / 3 + 1 + 1 / 2 + 0) / 4)
    assert found.replies == {"exact": 5, "alias": 2, "empty": 1}
    # The label reading forgives the stop and knows the corpus's aliases: 3 + 2 + anger
    assert score(tmp_path, rows_of(pairs), "dfew", reading="label").score == pytest.approx(6 / 8)


def test_a_capitalised_truth_never_matches_in_released_and_is_lowered_in_paper(
    tmp_path: Path,
) -> None:
    rows = rows_of([("Happy", "happy"), (" sad", "sad"), ("angry", "angry")])
    released = score(tmp_path, rows, "dfew", protocol="released")
    assert released.score == pytest.approx(1 / 3)
    assert any("2 truths are not in trimmed lower case" in note for note in released.notes)
    paper = score(tmp_path, rows, "dfew")
    assert paper.score == 1
    assert any("2 truths were trimmed or put into lower case" in note for note in paper.notes)
    assert paper.other_protocols == {"released": pytest.approx(1 / 3)}


def test_new_response_counts_for_sentiment_and_accuracy_alone(
    tmp_path: Path, wheels: Wheels
) -> None:
    for task, first, second, expected in (
        ("dfew", "happy", "sad", 1),
        ("mosi", "positive", "negative", 1),
        ("meld-e", "happy", "sad", 0),
        ("ov-merd", "happy", "sad", 0),
        ("bold", "happiness", "sadness", 0.5),
    ):
        rows = rows_of([(first, second), (second, first)])
        for row in rows:
            row["new_response"] = row["answer"]
        for protocol in PROTOCOLS:
            found = score(tmp_path, rows, task, protocol=protocol, wheels=wheels)
            assert found.score == expected, (task, protocol)
            assert any("new_response" in note for note in found.notes) == (expected == 1)
    # One row has it, one has not.
    mixed = rows_of([("happy", "sad"), ("sad", "sad")])
    mixed[0]["new_response"] = "happy"
    assert score(tmp_path, mixed, "dfew").score == 1


def test_rows_of_other_modes_are_told_not_scored(tmp_path: Path) -> None:
    rows = rows_of([("happy", "happy"), ("sad", "sad"), ("sad", "x"), ("sad", "x")])
    for row, mode in zip(rows, ("test", "val", "train", "dev"), strict=True):
        row["mode"] = mode
    # CAER: test and val by the paper's counts, test alone in the released script.
    paper = score(tmp_path, rows, "caer")
    assert (paper.counts.scored, paper.counts.offered, paper.counts.published) == (3, 4, 3953)
    assert paper.counts.reasons == {"mode train": 1}
    released = score(tmp_path, rows, "caer", protocol="released")
    assert (released.score, released.counts.scored, released.counts.skipped) == (1, 1, 3)
    assert score(tmp_path, rows, "caer", splits=["train", "val"]).score == 0.5
    assert score(tmp_path, rows, "caer", splits=["all"]).counts.scored == 4
    # Of our own rows the split tells the same.
    lines = [
        own(f"caer/{split}", "sad", truth="sad", benchmark="caer", split=split)
        for split in ("test", "val")
    ]
    assert score_predictions(lines, "caer").result.counts.scored == 2
    mine = score_predictions(lines, "caer", protocol="released").result.counts
    assert (mine.scored, mine.reasons) == (1, {"mode val": 1})
    # No filter where the released scorer has none.
    assert score(tmp_path, rows_of([("fear", "fear")], "val"), "bold").counts.scored == 1


@pytest.mark.parametrize(
    ("task", "mode"), [("mer2023", "test1"), ("mer2024", "other"), ("iemocap", "Session5")]
)
def test_hit_rate_takes_the_mode_that_the_set_is_tagged_with(
    tmp_path: Path, wheels: Wheels, task: str, mode: str
) -> None:
    rows = [
        *rows_of([("happy", "joy")], mode),
        {"video_id": "x", "answer": "sad", "response": "joy", "mode": "train"},
    ]
    found = score(tmp_path, rows, task, wheels=wheels)
    assert (found.score, found.counts.reasons) == (1, {"mode train": 1})


def test_a_mode_that_is_nowhere_is_refused_with_those_that_are(tmp_path: Path) -> None:
    rows = rows_of([("happy", "happy")], "tset")
    with pytest.raises(
        PredictionError,
        match=r"that dfew scores by protocol paper \(test\); found tset \(1\)",
    ):
        score(tmp_path, rows, "dfew")
    rows = [*rows_of([("happy", "happy")]), {"video_id": "x", "answer": "sad", "response": "sad"}]
    with pytest.raises(PredictionError, match=r"line 2: no 'mode', which other rows have"):
        score(tmp_path, rows, "dfew")
    without = rows_of([("happy", "happy")], None)
    assert "the rows have no mode: all count" in score(tmp_path, without, "dfew").notes
    with pytest.raises(PredictionError, match=r"--split dev: the rows have no field 'mode'"):
        score(tmp_path, without, "dfew", splits=["dev"])


def test_repeated_ids_are_refused_with_both_lines_or_read_as_released(
    tmp_path: Path, wheels: Wheels
) -> None:
    rows = rows_of([("happy", "sad"), ("sad", "sad"), ("happy", "happy")])
    rows[2]["video_id"] = "v0"
    for task in ("dfew", "meld-e", "bold", "mosi", "ov-merd"):
        with pytest.raises(PredictionError, match=r"line 3: id 'v0' is already in .*line 1"):
            score(tmp_path, rows, task, wheels=wheels)
    last = score(tmp_path, rows, "meld-e", protocol="released", wheels=wheels)
    assert (last.score, last.counts.offered, last.counts.scored) == (1, 3, 2)
    assert last.counts.reasons == {"a later row has the same id": 1}
    assert any("the last row counts: 1 (v0)" in note for note in last.notes)
    every = score(tmp_path, rows, "dfew", protocol="released")
    assert (every.score, every.counts.scored) == (pytest.approx(2 / 3), 3)
    assert any("every row counts: 1 (v0)" in note for note in every.notes)
    # The same id in two parts of a set is two clips, as in MELD.
    rows[2]["mode"] = "dev"
    assert score(tmp_path, rows, "meld-s", splits=["test", "dev"]).counts.scored == 3


def test_neutral_truths_are_not_scored_where_the_rules_say_so(
    tmp_path: Path, wheels: Wheels
) -> None:
    rows = rows_of([("neutral", "neutral"), ("happy", "joyful"), ("Neutral ", "happy")])
    hit = score(tmp_path, rows, "meld-e", wheels=wheels)
    assert (hit.score, hit.counts.offered, hit.counts.scored) == (1, 3, 1)
    assert hit.counts.reasons == {"truth on no wheel: neutral": 2}
    rows = rows_of([("neutral", "neutral"), ("positive", "Positive "), ("NEUTRAL", "positive")])
    for protocol in PROTOCOLS:
        waf = score(tmp_path, rows, "sims", protocol=protocol)
        assert (waf.score, waf.counts.reasons) == (1, {"neutral truth": 2})
    # An ordinary class in MELD-s and everywhere else.
    rows = rows_of([("neutral", "neutral"), ("positive", "neutral")])
    assert score(tmp_path, rows, "meld-s").parts == {"neutral": 1, "positive": 0}


def test_sentiment_by_the_scorer_and_by_mer_unibench(tmp_path: Path) -> None:
    pairs = [
        ("negative", "neutral"),
        ("negative", "hm"),
        ("positive", "positive"),
        ("neutral", "x"),
    ]
    paper = score(tmp_path, rows_of(pairs), "mosi")
    assert paper.score == pytest.approx(1 / 3)
    assert paper.parts == {"negative": 0, "positive": 1}
    assert paper.other_protocols == {"unibench": 1}
    assert paper.extras["accuracy"] == pytest.approx(1 / 3)
    unibench = score(tmp_path, rows_of(pairs), "mosi", protocol="unibench")
    assert unibench.score == 1
    assert unibench.other_protocols == {
        "paper": pytest.approx(1 / 3),
        "released": pytest.approx(1 / 3),
    }
    # Elsewhere it is the paper's rule, and says so.
    other = score(tmp_path, rows_of([("happy", "happy")]), "dfew", protocol="unibench")
    assert any("scored as by paper" in note for note in other.notes)


def test_sentiment_is_compared_as_a_whole(tmp_path: Path) -> None:
    pairs = [("negative", "negative"), ("positive", "positive, surely"), ("positive", "Positive\n")]
    found = score(tmp_path, rows_of(pairs), "sims")
    # Positive: 1 of 2 found, 1 said: F1 2/3, weight 2/3.
    assert found.score == pytest.approx(2 / 3 * 2 / 3 + 1 / 3)


def test_numeric_sentiment_is_taken_by_its_sign(tmp_path: Path) -> None:
    rows = rows_of([(1.5, "positive"), (-0.2, "negative"), ("0.0", "x"), ("-3", "positive")])
    found = score(tmp_path, rows, "mosei")
    assert found.counts.reasons == {"neutral truth": 1}
    assert found.part_counts == {"negative": 2, "positive": 1}
    assert found.extras["accuracy"] == pytest.approx(2 / 3)
    assert any("4 truths are numbers" in note for note in found.notes)
    with pytest.raises(PredictionError, match=r"line 1: the truth '3' is a number.*angry, disgust"):
        score(tmp_path, rows_of([("3", "happy")]), "dfew")


def test_open_vocabulary_truths_are_lists_in_text_or_in_json(
    tmp_path: Path, wheels: Wheels
) -> None:
    for truth in (
        "happy, sad",
        "['happy', 'sad']",
        "[happy, sad]",
        ["happy", "sad"],
        '"happy","sad"',
    ):
        found = score_file(
            write(tmp_path / "p.jsonl", rows_of([(truth, "joy"), ("", "joy"), ("odd", "joy")])),
            "ov-merd",
            wheels=wheels,
        )
        assert found.items[0].truth == ("happy", "sad")
        assert found.result.score == pytest.approx(2 * 1 * 0.5 / 1.5)
        assert found.result.extras == {"precision": 1, "recall": 0.5}
        assert found.result.counts.reasons == {
            "no truth is known": 1,
            "no true word is on a wheel": 1,
        }


def test_map_keeps_rows_without_a_true_label_and_ignores_unknown_ones(tmp_path: Path) -> None:
    rows = rows_of([("fear; anger", "anger, mirth"), ("", "fear"), ("anger", "")], None)
    found = score(tmp_path, rows, "mafw-m")
    assert found.counts.scored == 3
    # anger: prevalence 2/3, precision 1, recall 1/2. fear: prevalence 1/3, precision 0, recall 0.
    assert found.parts == pytest.approx({"anger": 0.5 + 0.5 * 2 / 3, "fear": 1 / 3})
    assert found.extras["floor"] == pytest.approx(0.5)
    # Items: 2/3 (1 of 2 true), 0, 0; Jaccard 1/2, 0, 0
    assert found.extras["sample_f1"] == pytest.approx((2 / 3) / 3)
    assert found.extras["jaccard"] == pytest.approx(0.5 / 3, abs=1e-5)
    assert found.extras["micro_f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert any("no confidences" in note for note in found.notes)


def test_excited_counts_as_happiness_in_iemocap(tmp_path: Path, wheels: Wheels) -> None:
    rows = rows_of([("excited", "happiness"), ("sadness", "sadness")], "Session5")
    found = score(tmp_path, rows, "iemocap", wheels=wheels)
    assert found.score == 1
    assert any("excited as happiness" in note for note in found.notes)
    # The scorer reads truths that are merged already; its wheels do not know this word here.
    released = score(tmp_path, rows, "iemocap", wheels=wheels, protocol="released")
    assert released.counts.reasons == {"truth on no wheel: excited": 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("task", benchmarks())
def test_perfect_replies_score_1_in_every_set_and_protocol(
    tmp_path: Path, wheels: Wheels, task: str, protocol: str
) -> None:
    row = benchmark(task)
    truths = truths_for(row, 60, random.Random(task))
    mode = (row.modes.paper or ("test",))[0]
    rows = rows_of([(truth, truth) for truth in truths], mode)
    found = score(tmp_path, rows, task, protocol=protocol, wheels=wheels)
    assert found.score == pytest.approx(1)
    assert set(found.parts.values()) == {1}
    assert found.other_protocols == {}
    assert found.counts.offered == 60
    n_neutral = truths.count("neutral") if row.metric == "waf" else 0
    assert found.counts.skipped == n_neutral
    assert (found.wheels is not None) == (row.metric in WHEEL_METRICS)


@pytest.mark.parametrize("task", benchmarks())
def test_constant_and_random_replies_score_what_is_expected(
    tmp_path: Path, wheels: Wheels, task: str
) -> None:
    row, rng, n = benchmark(task), random.Random(task), 2000
    truths = truths_for(row, n, rng)
    names = {"hit-rate": KNOWN, "wheel-f": KNOWN}.get(row.metric, row.options)
    first, k = names[0], len(names)
    mode = (row.modes.paper or ("test",))[0]

    def scored(replies: Iterable[str]) -> float:
        rows = rows_of(list(zip(truths, replies, strict=True)), mode)
        return score(tmp_path, rows, task, wheels=wheels).score

    shares = {name: count / n for name, count in Counter(truths).items()}
    constant, guessed = scored([first] * n), scored(rng.choices(names, k=n))
    if row.metric in ("accuracy", "hit-rate"):
        assert constant == pytest.approx(shares[first])
        assert guessed == pytest.approx(1 / k, abs=0.03)
    elif row.metric == "waf":
        kept = {name: share / (1 - shares.get("neutral", 0)) for name, share in shares.items()}
        share = kept[first]
        assert constant == pytest.approx(share * 2 * share / (1 + share))
        # Each kept class with share s, said one time in k: F1 = 2s/k / (s + 1/k).
        expected = sum(
            s * (2 * s / k) / (s + 1 / k) for name, s in kept.items() if name != "neutral"
        )
        assert guessed == pytest.approx(expected, abs=0.03)
    elif row.metric == "map":
        split = [set(labels_of(truth)) for truth in truths]
        prevalence = [sum(name in truth for truth in split) / n for name in row.options]
        share = prevalence[0]
        # The first is always said: recall 1, precision its prevalence; no other one is: the same.
        assert constant == pytest.approx(sum(prevalence) / k)
        assert guessed == pytest.approx(sum(prevalence) / k, abs=0.02)
    else:
        split = [set(words_of(truth)) for truth in truths]
        p = sum(first in truth for truth in split) / n
        r = sum((first in truth) / len(truth) for truth in split) / n
        assert constant == pytest.approx(2 * p * r / (p + r))
        # One word of three: right with |T|/3, and then it is 1/|T| of the truth.
        p, r = sum(len(truth) / 3 for truth in split) / n, 1 / 3
        assert guessed == pytest.approx(2 * p * r / (p + r), abs=0.03)
    # Every label at once costs hit rate nothing.
    if row.metric == "hit-rate":
        assert scored([", ".join(names)] * n) == 1


def test_a_score_is_plain_json(tmp_path: Path, wheels: Wheels) -> None:
    rows = rows_of([("happy", "joy"), ("happy", "what, else"), ("sad", "")])
    found = score(tmp_path, rows, "meld-e", wheels=wheels)
    again = BenchmarkScore.model_validate_json(found.model_dump_json())
    assert again == found
    assert found.score == pytest.approx(1 / 3)
    assert [(e.id, e.how) for e in found.examples] == [("v1", "off_list"), ("v2", "empty")]
    assert found.wheels is not None
    assert len(found.wheels.digest) == 16


@pytest.mark.parametrize("task", benchmarks())
def test_counts_add_up(tmp_path: Path, wheels: Wheels, task: str) -> None:
    rng = random.Random(task)
    row = benchmark(task)
    truths = truths_for(row, 50, rng)
    rows = rows_of([(t, rng.choice([str(t), "", "x"])) for t in truths], "test")
    for one in rows:
        one["mode"] = rng.choice([*(row.modes.paper or ("test",)), "train"])
    for protocol in PROTOCOLS:
        counts = score(tmp_path, rows, task, wheels=wheels, protocol=protocol).counts
        assert counts.offered == 50 == counts.scored + counts.skipped
        assert counts.skipped == sum(counts.reasons.values())
        assert counts.published == row.n


@pytest.mark.slow
def test_the_whole_bench_with_its_published_counts_is_scored_in_seconds(
    tmp_path: Path, wheels: Wheels
) -> None:
    rng = random.Random(4)
    lines = []
    for row in benchmarks().values():
        for number, truth in enumerate(truths_for(row, row.n, rng)):
            several = labels_of(truth) if row.metric in ("map", "wheel-f") else ()
            lines.append(
                own(
                    f"{row.corpus}/{row.id}-{number}", f"<think>{number}</think><answer>{truth}</answer>",
                    task=row.task, benchmark=row.id, split="test", truths=several,
                    truth=None if row.metric in ("map", "wheel-f") else truth,
                )
            )  # fmt: skip
    path = tmp_path / "predictions.jsonl"
    assert write_predictions(path, lines) == 36_133
    start = time.process_time()
    scored = score_all(path, wheels=wheels)
    assert time.process_time() - start < 20
    assert averages({name: one.result.score for name, one in scored.items()}) == {
        "avg-9": pytest.approx(1),
        "avg-18": pytest.approx(1),
    }
    assert sum(one.result.counts.offered for one in scored.values()) == 36_133
