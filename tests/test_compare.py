"""Runs against one another: what is compared, by which numbers, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from typer.testing import CliRunner

from cache.errors import PredictionError
from emocache import app, main
from eval.benchmarks import benchmarks
from eval.judging.results import (
    EmerClip,
    EmerScore,
    Judge,
    MixedJudgesError,
    MmeSample,
    MmeScore,
    Repeated,
)
from eval.parse import parse_labels, parse_reply
from eval.predictions import ClipFacts, Prediction, write_predictions
from eval.results.compare import compare
from eval.results.comparison import Comparison
from eval.results.judged_sides import is_judged, read_judged_run
from eval.results.sides import ComparedRun, Run, Side, find_predictions, read_run, unique_names
from eval.scoring.intervals import holm
from eval.scoring.result import Item
from eval.scoring.rules import accuracy

DFEW = benchmarks()["dfew"]
QUICK = ["--samples", "100", "--swaps", "200"]


def prediction(
    uid: str, truth: str | None, reply: str, *, task: str = "emotion", masked: Sequence[str] = (),
    benchmark: str | None = "dfew", split: str | None = "test", run: str = "a",
) -> Prediction:  # fmt: skip
    parsed = parse_reply(reply, DFEW.options)
    return Prediction(
        uid=uid, task=task, masked=tuple(masked), reply=reply, label=parsed.label, parse=parsed.how,
        truth=truth, run=run, spec_ids={"audio": f"whisper-{run}"}, benchmark=benchmark, split=split,
        about=ClipFacts(subtitle="Hello there."),
    )  # fmt: skip


def write(folder: Path, predictions: Sequence[Prediction]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / "predictions.jsonl", predictions)
    return folder


def pair(
    tmp_path: Path, truths: Sequence[str], first: Sequence[str], second: Sequence[str]
) -> list[Path]:
    return [
        write(
            tmp_path / name,
            [
                prediction(f"dfew/{i:03d}", truth, reply, run=name)
                for i, (truth, reply) in enumerate(zip(truths, replies, strict=True))
            ],
        )
        for name, replies in (("base", first), ("tuned", second))
    ]


def compared(paths: Sequence[Path], **given: object) -> Comparison:
    names = unique_names(paths)
    runs = [
        read_run(p, name=name, **given)  # type: ignore[arg-type]
        for p, name in zip(paths, names, strict=True)
    ]
    return compare(runs, n_samples=200, n_swaps=500)


TRUTHS = ["happy"] * 12 + ["sad"] * 8
BASE = ["happy"] * 6 + ["sad"] * 6 + ["sad"] * 4 + ["happy"] * 4
TUNED = ["happy"] * 11 + ["sad"] * 1 + ["sad"] * 3 + ["angry"] * 5
"""Right on 5 happy items more, and on 1 sad item less."""


def test_a_pair_of_runs_by_hand(tmp_path: Path) -> None:
    found = compared(pair(tmp_path, TRUTHS, BASE, TUNED))
    assert [run.name for run in found.runs] == ["base", "tuned"]
    (dfew,) = found.sets
    assert (dfew.id, dfew.title, dfew.metric, dfew.unit) == ("dfew", "DFEW", "accuracy", "percent")
    assert [score.score for score in dfew.scores] == [10 / 20, 14 / 20]
    assert all(s.interval.low < s.score < s.interval.high for s in dfew.scores)
    (difference,) = dfew.differences
    assert difference.test.difference == pytest.approx(4 / 20)
    assert (difference.test.n_better, difference.test.n_worse) == (5, 1)
    assert difference.mcnemar is not None
    # 5 against 1: two tails of six coins.
    assert difference.mcnemar.p_value == pytest.approx(2 * (1 + 6) / 2**6)
    assert difference.p_value == difference.p_holm == difference.mcnemar.p_value
    assert not difference.is_clear
    assert [(p.name, p.scores) for p in dfew.parts] == [
        ("happy", (6 / 12, 11 / 12)), ("sad", (4 / 8, 3 / 8)),
    ]  # fmt: skip
    assert difference.better_ids == tuple(f"dfew/{i:03d}" for i in range(6, 11))
    assert difference.worse_ids == ("dfew/015",)
    change = difference.better[0]
    assert (change.id, change.truth, change.predicted) == (
        "dfew/006", ("happy",), (("sad",), ("happy",)),
    )  # fmt: skip
    assert (change.subtitle, change.gain) == ("Hello there.", pytest.approx(1 / 20))
    assert found.findings == ()
    assert found.protocol == "paper"


def test_a_run_against_itself(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, TRUTHS, BASE, TUNED)
    found = compared([base, base])
    assert [run.name for run in found.runs] == ["base", "base (2)"]
    (difference,) = found.sets[0].differences
    test = difference.test
    assert (test.difference, test.low, test.high, difference.p_value) == (0, 0, 0, 1)
    assert difference.better == difference.worse == ()


def test_several_runs_are_compared_with_the_first(tmp_path: Path) -> None:
    paths = pair(tmp_path, TRUTHS, BASE, TUNED)
    perfect = [prediction(f"dfew/{i:03d}", t, t) for i, t in enumerate(TRUTHS)]
    paths.append(write(tmp_path / "perfect", perfect))
    found = compared(paths)
    (dfew,) = found.sets
    assert [d.run for d in dfew.differences] == ["tuned", "perfect"]
    raw = [d.p_value for d in dfew.differences]
    assert raw[1] == pytest.approx(2 / 2**10)  # ten items, all of them better
    assert [d.p_holm for d in dfew.differences] == holm(raw) == [raw[0], 2 * raw[1]]
    assert found.n_tests == 2
    assert dfew.differences[1].is_clear


def test_only_common_items_are_compared_and_it_is_said(tmp_path: Path) -> None:
    """Among the others are classes that the other run has not: they change no score."""
    truths = [*TRUTHS, "fear", "fear", "disgust"]
    base, tuned = pair(
        tmp_path, truths, [*BASE, "fear", "fear", "sad"], [*TUNED, "fear", "sad", "sad"]
    )
    more = [prediction(f"dfew/{i:03d}", t, "neutral") for i, t in enumerate(truths)][:18]
    write(tmp_path / "less", [*more, prediction("dfew/999", "surprise", "surprise")])
    found = compared([base, tmp_path / "less", tuned])
    (dfew,) = found.sets
    assert (dfew.n_common, dfew.n_scored) == (18, 18)
    assert [score.score for score in dfew.scores] == [10 / 18, 0, 14 / 18]
    assert [score.n_only for score in dfew.scores] == [5, 1, 5]
    assert [score.own_score for score in dfew.scores] == [12 / 23, 1 / 19, 15 / 23]
    assert [part.name for part in dfew.parts] == ["happy", "sad"]
    assert found.findings == (
        "dfew: compared on the 18 items that all runs have, without 5 of base, 1 of less, 5 of tuned",
    )
    # The same numbers as from files that hold nothing else.
    alone = pair(tmp_path / "alone", truths[:18], BASE[:18], TUNED[:18])
    (exact,) = compared(alone).sets
    assert exact.differences[0].test == dfew.differences[1].test


def test_scores_are_those_of_scikit_learn(tmp_path: Path) -> None:
    """Also of a metric that is no mean over items, on the items that both runs have."""
    rng = np.random.default_rng(0)
    labels = ["positive", "negative", "neutral"]
    truths = rng.choice(labels, 60).tolist()
    said = [rng.choice(labels, 60).tolist() for _ in range(2)]
    folders = []
    for name, replies, end in zip("ab", said, (60, 50), strict=True):
        rows = [
            {"video_id": f"v{i}", "answer": t, "response": r, "mode": "test"}
            for i, (t, r) in enumerate(zip(truths, replies, strict=True))
        ][:end]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(path)
    (mosi,) = compared(folders, task="mosi").sets
    kept = [i for i in range(50) if truths[i] != "neutral"]
    assert mosi.n_scored == len(kept)
    for score, replies in zip(mosi.scores, said, strict=True):
        expected = f1_score(
            [truths[i] for i in kept], [replies[i] for i in kept],
            labels=["negative", "positive"], average="weighted",
        )  # fmt: skip
        assert score.score == pytest.approx(expected)
    assert mosi.differences[0].mcnemar is None  # an F is not a share of right items
    assert mosi.differences[0].p_value == mosi.differences[0].test.p_value


def test_both_formats_name_the_same_clips(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path, TRUTHS, BASE, TUNED)
    rows = [
        {"video_id": f"{i:03d}", "answer": t, "response": r, "mode": "test"}
        for i, (t, r) in enumerate(zip(TRUTHS, TUNED, strict=True))
    ]
    released = tmp_path / "released.jsonl"
    released.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (dfew,) = compared([ours, released], task="dfew").sets
    assert [score.score for score in dfew.scores] == [10 / 20, 14 / 20]
    assert dfew.n_common == 20
    with pytest.raises(PredictionError, match=r"does not tell which set it is of\. Name it"):
        read_run(released)


def test_replies_to_no_benchmark(tmp_path: Path) -> None:
    """What `emocache evaluate` leaves: a reasoning run and one that names labels, also masked."""

    def run(name: str, task: str, replies: Sequence[str]) -> Path:
        found = [
            prediction(f"calls/{i}", "happy", r, task=task, benchmark=None, masked=masked)
            for masked in ((), ("audio",))
            for i, r in enumerate(replies if not masked else ["sad"] * len(replies))
        ]
        found.append(prediction("calls/9", None, "happy", task=task, benchmark=None))
        found.append(
            prediction("calls/1", None, "The voice trembles.", task="reason", benchmark=None)
        )
        return write(tmp_path / name / "eval-test", found)

    a = run("a", "emotion", ["happy", "sad", "sad"])
    b = run("b", "think", ["<think>Smile.</think><answer>happy</answer>", "happy", "sad"])
    found = compared([a.parent, b.parent])  # the folders of the runs
    assert [run.name for run in found.runs] == ["a", "b"]
    whole, masked = found.sets
    assert (whole.id, masked.id) == ("calls: emotion", "calls: emotion, without audio")
    assert [score.score for score in whole.scores] == [1 / 3, 2 / 3]
    assert (whole.n_common, whole.n_scored) == (4, 3)
    assert [score.score for score in masked.scores] == [0, 0]
    assert found.protocol is None
    assert found.findings == (
        "not compared, since they name no label of a list: 1 of a's 8 replies",
        "not compared, since they name no label of a list: 1 of b's 8 replies",
    )


def test_several_labels_count_as_a_set(tmp_path: Path) -> None:
    def one(i: int, reply: str) -> Prediction:
        parsed = parse_labels(reply, DFEW.options)
        return Prediction(
            uid=f"calls/{i}", task="multi-label", reply=reply, label=None, labels=parsed.labels,
            unread=parsed.unread, parse=parsed.how, truth=None, truths=("sad", "angry"), run="r",
            spec_ids={},
        )  # fmt: skip

    a = write(tmp_path / "a", [one(0, "sad, angry"), one(1, "sad"), one(2, "angry, sad, gloomy")])
    b = write(tmp_path / "b", [one(0, "angry, sad"), one(1, "angry, sad"), one(2, "none")])
    (found,) = compared([a, b]).sets
    assert found.id == "calls: emotion_multi"
    assert [score.score for score in found.scores] == [1 / 3, 2 / 3]


def test_a_task_asked_twice_in_one_file_is_two_sets(tmp_path: Path) -> None:
    rows = [prediction("dfew/1", "sad", "sad"), prediction("dfew/1", "sad", "sad", task="think")]
    run = read_run(write(tmp_path / "a", rows))
    assert list(run.sides) == ["dfew (emotion)", "dfew (think)"]
    assert [side.title for side in run.sides.values()] == ["DFEW (emotion)", "DFEW (think)"]


def _run(name: str, sides: dict[str, Side]) -> Run:
    return Run(ComparedRun(name=name, path=name, file=name, n=1, facts={}), sides)


def _side(right: Sequence[bool], **rules: str) -> Side:
    truths = ["yes"] * len(right)
    said = ["yes" if r else "no" for r in right]
    items = tuple(
        Item(str(i), None, (t,), s, (s,), "exact")
        for i, (t, s) in enumerate(zip(truths, said, strict=True))
    )
    return Side("A set", "accuracy", "x", items, accuracy(truths, said), True, rules)


def test_averages_over_sets() -> None:
    rng = np.random.default_rng(1)
    runs = [
        _run(name, {b: _side((rng.random(40) < share).tolist()) for b in benchmarks()})
        for name, share in (("a", 0.5), ("b", 0.7))
    ]
    found = compare(runs, n_samples=300, n_swaps=500)
    nine, eighteen = found.averages
    assert (nine.id, eighteen.id, len(found.sets)) == ("avg-9", "avg-18", 18)
    for average, ids in ((nine, list(benchmarks())[:9]), (eighteen, list(benchmarks()))):
        of = {one.id: one for one in found.sets}
        for number in range(2):
            mean = np.mean([of[i].scores[number].score for i in ids])
            assert average.scores[number].score == pytest.approx(mean)
        difference = average.differences[0]
        assert difference.test.difference == pytest.approx(
            average.scores[1].score - average.scores[0].score
        )
        assert difference.p_holm is None
    # Eighteen sets of 40 items: surer than any one of them.
    assert eighteen.differences[0].p_value <= 2 / 500
    without = [_run(r.facts.name, {k: v for k, v in r.sides.items() if k != "mosi"}) for r in runs]
    assert compare(without, n_samples=100, n_swaps=100).averages == ()


def test_examples_spread_over_truths() -> None:
    truths = ["a"] * 30 + ["b"] * 3 + ["c"] * 3
    items = [Item(str(i), None, (t,), "", (), "empty") for i, t in enumerate(truths)]
    right = [Item(str(i), None, (t,), t, (t,), "exact") for i, t in enumerate(truths)]
    sides = []
    for own in (items, right):
        said = [" ".join(item.predicted) or None for item in own]
        sides.append(Side("A set", "accuracy", "x", tuple(own), accuracy(truths, said), True, {}))
    runs = [_run(name, {"set": side}) for name, side in zip("ab", sides, strict=True)]
    (found,) = compare(runs, n_samples=100, n_swaps=100, n_examples=5).sets
    assert [change.truth[0] for change in found.differences[0].better] == ["a", "b", "c", "a", "b"]
    assert len(found.differences[0].better_ids) == 36


def test_other_truths_are_refused(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, TRUTHS, BASE, TUNED)
    other = [prediction(f"dfew/{i:03d}", "fear" if i < 2 else t, t) for i, t in enumerate(TRUTHS)]
    with pytest.raises(
        PredictionError,
        match=r"base and other disagree about the truth of 2 of 20 items: 'dfew/000' 'happy' and 'fear'",
    ):
        compared([base, write(tmp_path / "other", other)])


def test_other_rules_are_refused() -> None:
    runs = [
        _run("a", {"dfew": _side([True], protocol="paper", reading="tag")}),
        _run("b", {"dfew": _side([True], protocol="released", reading="tag")}),
    ]
    with pytest.raises(PredictionError, match="different rules: protocol 'paper' and 'released'"):
        compare(runs)


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    base, _ = pair(tmp_path, TRUTHS, BASE, TUNED)
    foreign = write(tmp_path / "foreign", [prediction("dfew/x", "sad", "sad")])
    with pytest.raises(
        PredictionError, match=r"no item is in all runs: base has 20, such as '000'"
    ):
        compared([base, foreign])
    mafw = write(tmp_path / "mafw", [prediction("mafw/x", "sadness", "sadness", benchmark="mafw")])
    with pytest.raises(
        PredictionError, match="no set is in all runs: base has dfew; mafw has mafw"
    ):
        compared([base, mafw])
    with pytest.raises(PredictionError, match="1 run given, at least two"):
        compared([base])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match="no such file or folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(PredictionError, match=r"no predictions\.jsonl in it"):
        read_run(tmp_path)
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "predictions-1-of-2.jsonl").touch()
    with pytest.raises(PredictionError, match=r"not finished: predictions-1-of-2\.jsonl"):
        read_run(parts)
    one = write(tmp_path / "eval-a", [prediction("dfew/1", "sad", "sad")])
    assert find_predictions(tmp_path) == one / "predictions.jsonl"
    write(tmp_path / "eval-b", [prediction("dfew/1", None, "sad", benchmark=None)])
    with pytest.raises(PredictionError, match=r"several evaluations: eval-a, eval-b\. Name one"):
        read_run(tmp_path)
    with pytest.raises(PredictionError, match="none of its 1 replies can be scored"):
        read_run(tmp_path / "eval-b")
    with pytest.raises(PredictionError, match="of one set: name it with --task"):
        read_run(one, truths=tmp_path / "truths.csv")


def test_names_tell_paths_apart(tmp_path: Path) -> None:
    for name in ("a/eval", "b/eval"):
        write(tmp_path / name, [prediction("dfew/1", "sad", "sad")])
    files = [tmp_path / name / "eval" / "predictions.jsonl" for name in "ab"]
    assert unique_names(files) == ["a", "b"]
    assert unique_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert unique_names([Path("x/full.jsonl"), Path("x/less.jsonl")]) == [
        "full.jsonl",
        "less.jsonl",
    ]
    assert unique_names([tmp_path / "a" / "eval", tmp_path / "a"]) == ["a/eval", "a"]


JUDGE = Judge(
    model="gpt-4o", versions=("gpt-4o-2024-11-20",), prompts=("clue abc",), temperature=0.0
)


def emer(
    path: Path, ratings: Sequence[float | None], judge: Judge = JUDGE, references: str = "r"
) -> Path:
    clips = tuple(
        EmerClip(id=str(i), clue=(r, None if r is None else r + 1), label=(3.0, 3.0),
                 true_words=(None, None), words=(None, None))
        for i, r in enumerate(ratings)
    )  # fmt: skip
    told = [r + 0.5 for r in ratings if r is not None]
    mean = Repeated(mean=sum(told) / len(told), by_repeat=(), spread=None, standard_error=None,
                    clip_error=None, n=len(told))  # fmt: skip
    score = EmerScore(name=path.stem, judge=judge, repeats=2, clue=mean, label=mean,
                      offered=len(ratings), clips=clips, references=references)  # fmt: skip
    path.mkdir(parents=True)
    (path / "emer.json").write_text(score.model_dump_json())
    return path


def test_ratings_of_a_judge(tmp_path: Path) -> None:
    a = emer(tmp_path / "a", [5.0, 6.0, 7.0, None])
    b = emer(tmp_path / "b", [6.0, 8.0, 7.0, 9.0])
    found = compare([read_judged_run(path, path.name) for path in (a, b)], n_samples=100)
    clue, label = found.sets
    assert (clue.id, clue.unit, clue.n_common) == ("emer: clue", "rating", 3)
    assert [score.score for score in clue.scores] == [6.5, 7.5]
    assert clue.scores[1].own_score == 8.0
    assert (clue.differences[0].test.n_better, clue.differences[0].test.n_worse) == (2, 0)
    assert clue.differences[0].mcnemar is None
    assert label.differences[0].test.difference == 0
    assert found.findings == (
        "emer: clue: compared on the 3 items that all runs have, without 1 of b",
    )
    assert "a: 1 clips without a rating are left out" in clue.notes
    newer = JUDGE.model_copy(update={"versions": ("gpt-4o-2025-01-01",)})
    c = emer(tmp_path / "c", [6.0, 8.0, 7.0, 9.0], newer)
    with pytest.raises(MixedJudgesError, match="different judges"):
        compare([read_judged_run(path, path.name) for path in (a, c)])
    d = emer(tmp_path / "d", [6.0, 8.0], references="other")
    with pytest.raises(PredictionError, match="different rules: references 'r' and 'other'"):
        compare([read_judged_run(path, path.name) for path in (a, d)])


def test_what_is_a_result_of_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = emer(tmp_path / "a", [5.0, 6.0]), emer(tmp_path / "b", [6.0, 8.0])
    assert is_judged(a)
    assert is_judged(a / "emer.json")
    rows = [{"video_id": "1", "answer": "sad", "response": "sad", "mode": "test"}]
    predictions = tmp_path / "list.json"  # the released format, as one list
    predictions.write_text(json.dumps(rows))
    assert not is_judged(predictions)
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    assert not is_judged(damaged)
    assert not is_judged(write(a, [prediction("dfew/1", "sad", "sad")]))
    assert main(["compare", str(a / "emer.json"), str(b), *QUICK, "--names", "a,b", "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert [one["id"] for one in sets] == ["emer: clue", "emer: label"]
    lexical = {"kind": "lexical", "name": "x", "precision": 1, "recall": 1, "f1": 1, "lcs_f1": 1,
               "offered": 1, "scored": 1}  # fmt: skip
    (tmp_path / "lexical.json").write_text(json.dumps(lexical))
    assert main(["compare", str(tmp_path / "lexical.json"), str(b)]) == 2
    assert "not kept clip by clip" in capsys.readouterr().err


def test_marks_of_mme_emotion(tmp_path: Path) -> None:
    mean = Repeated(mean=None, by_repeat=(), spread=None, standard_error=None, clip_error=None, n=0)

    def run(name: str, marks: Sequence[Sequence[float]]) -> Run:
        samples = tuple(
            MmeSample(
                id=str(i), task="sentiment", truth=("sad",), steps=(), marks=(tuple(m),), n_tokens=1
            )
            for i, m in enumerate(marks)
        )
        score = MmeScore(name=name, judge=JUDGE, repeats=1, rec=mean, rea=mean, cot=mean, alpha=0.5,
                         steps=None, tokens=None, token_unit="words", offered=2, tasks={},
                         samples=samples)  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(score.model_dump_json())
        return read_judged_run(path, name)

    found = compare([run("a", [[1, 0, 1], [0]]), run("b", [[1, 1, 1], [1]])], n_samples=100)
    scores = {one.id: [s.score for s in one.scores] for one in found.sets}
    # The last mark is recognition, the mean of those before it reasoning, 0 where there are none.
    assert scores == {
        "mme-emotion: rec": [0.5, 1.0], "mme-emotion: rea": [0.25, 0.5], "mme-emotion: cot": [0.375, 0.75],
    }  # fmt: skip


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in pair(tmp_path, TRUTHS, BASE, TUNED)]
    shown = CliRunner().invoke(app, ["compare", *paths, *QUICK], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    assert "50.00" in shown.output
    assert "70.00" in shown.output
    assert "+20.00" in shown.output
    assert "5/1" in shown.output
    # One set: nothing to correct for.
    assert "Holm" not in shown.output
    capsys.readouterr()
    assert main(["compare", *paths, *QUICK, "--json", "--out", str(tmp_path / "out")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert Comparison.model_validate(document).sets[0].scores[1].score == 0.7
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written == document
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "compare-1.png", "compare.html", "compare.json", "compare.md",
    ]  # fmt: skip


def test_the_command_tells_what_it_leaves_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, _ = pair(tmp_path, TRUTHS, BASE, TUNED)
    less = write(tmp_path / "less", [prediction("dfew/000", "happy", "sad")])
    assert main(["compare", str(base), str(less), *QUICK]) == 1
    told = capsys.readouterr().err
    assert "compared on the 1 item that all runs have, without 19 of base" in told
    assert main(["compare", str(base), str(less), *QUICK, "--names", "one"]) == 2
    assert "2 runs need 2 different names" in capsys.readouterr().err
    assert main(["compare", str(base), str(less), "--protocol", "papr"]) == 2
    assert "Did you mean 'paper'?" in capsys.readouterr().err
    assert main(["compare", str(base), *QUICK]) == 2
    assert "at least two are needed" in capsys.readouterr().err


def test_names_of_the_users_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in pair(tmp_path, TRUTHS, BASE, TUNED)]
    assert main(["compare", *paths, *QUICK, "--json", "--names", "stage 1,stage 2"]) == 0
    assert [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]] == [
        "stage 1",
        "stage 2",
    ]


def test_comparing_needs_no_torch(tmp_path: Path) -> None:
    paths = [str(path) for path in pair(tmp_path, TRUTHS, BASE, TUNED)]
    code = (
        "import sys; from emocache import main; main(sys.argv[1:]);"
        "sys.exit(sorted({'torch', 'transformers', 'gradio', 'av'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, "compare", *paths, *QUICK, "--json"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip


def test_equal_input_gives_equal_numbers(tmp_path: Path) -> None:
    paths = pair(tmp_path, TRUTHS, BASE, TUNED)
    first = compared(paths)
    backwards = [
        write(tmp_path / "again" / path.name, list(reversed(_read(path)))) for path in paths
    ]
    again = compared(backwards)
    for a, b in zip(first.sets, again.sets, strict=True):
        assert a.scores == b.scores
        assert a.differences[0].test == b.differences[0].test
    right = [p.label == p.truth for p in _read(paths[1])]
    assert first.sets[0].scores[1].score == accuracy_score([True] * 20, right)


def _read(folder: Path) -> list[Prediction]:
    from eval.predictions import read_predictions

    return read_predictions(folder / "predictions.jsonl")
