"""Predictions and truths as files: formats, bad input, and what becomes of every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import PredictionError, SchemaError
from eval.benchmarks import PROTOCOLS
from eval.predictions import write_predictions
from eval.scoring.score import score_all, score_file, score_predictions
from eval.scoring.wheels import Wheels
from tests.scoring_rows import own, rows_of, score, write
from tests.wheel_tables import write_wheels


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return Wheels.load(write_wheels(tmp_path_factory.mktemp("tables") / "wheels"))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "npz", "tsv"])
def test_truths_come_from_a_file_of_their_own(tmp_path: Path, kind: str) -> None:
    rows = rows_of([("sad", "happy"), ("sad", "sad"), ("sad", "sad")])
    for row in rows:
        del row["answer"]
    ids, labels = ["v0", "v1", "v2"], ["Happy", "sad", "angry"]
    path = tmp_path / f"truths.{kind}"
    if kind == "npz":
        np.savez(path, names=np.array(ids), labels=np.array(labels))
    elif kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        lines = [mark.join(pair) for pair in (("name", "label"), *zip(ids, labels, strict=True))]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    else:
        objects = [{"id": i, "emotion": e} for i, e in zip(ids, labels, strict=True)]
        text = json.dumps(objects) if kind == "json" else "\n".join(map(json.dumps, objects))
        path.write_text(text, encoding="utf-8")
    found = score(tmp_path, rows, "dfew", truths=path)
    assert found.score == pytest.approx(2 / 3)
    assert found.parts == {"angry": 0, "happy": 1, "sad": 1}


def test_a_truths_file_wins_over_answers_and_tells_the_difference(tmp_path: Path) -> None:
    truths = write(tmp_path / "t.jsonl", [{"uid": "v0", "answer": "happy"}])
    found = score(tmp_path, rows_of([("sad", "happy")]), "dfew", truths=truths)
    assert found.score == 1
    assert any("1 rows of" in note and "which counts" in note for note in found.notes)


def test_the_column_of_the_tasks_own_field_is_taken(tmp_path: Path, wheels: Wheels) -> None:
    truths = tmp_path / "t.csv"
    truths.write_text("uid,Emotion,Sentiment,Label\nv0,happy,positive,7\n", encoding="utf-8")
    rows = rows_of([("", "positive")])
    assert score(tmp_path, rows, "meld-s", truths=truths).score == 1
    rows = rows_of([("", "joy")])
    assert score(tmp_path, rows, "meld-e", truths=truths, wheels=wheels).score == 1


def test_words_that_look_like_missing_values_stay_words(tmp_path: Path) -> None:
    truths = tmp_path / "t.csv"
    truths.write_text("name,label\nnan,null\nNA,none\n", encoding="utf-8")
    rows = [
        {"video_id": "nan", "response": "null", "mode": "test"},
        {"video_id": "NA", "response": "None", "mode": "test"},
    ]
    assert score(tmp_path, rows, "dfew", truths=truths).score == 1


def test_missing_ids_are_refused_or_count_as_wrong_when_that_is_asked_for(
    tmp_path: Path, wheels: Wheels
) -> None:
    truths = write(tmp_path / "t.jsonl", [{"id": f"v{i}", "answer": "happy"} for i in range(4)])
    rows = rows_of([("happy", "happy")] * 2)
    for task in ("dfew", "meld-e", "ov-merd"):
        for protocol in PROTOCOLS:
            options = {"truths": truths, "wheels": wheels, "protocol": protocol}
            with pytest.raises(
                PredictionError, match=rf"{task}: no prediction for 2 .*\(v2, v3\).*--allow"
            ):
                score(tmp_path, rows, task, **options)
            found = score(tmp_path, rows, task, allow_missing=True, **options)
            assert found.counts.scored == found.counts.offered == 4
            assert found.replies["missing"] == 2
            assert any("counted as wrong: 2 (v2, v3)" in note for note in found.notes)
            if task == "ov-merd":  # precision and recall 1/2
                assert found.score == pytest.approx(0.5)
            else:
                assert found.score == 0.5


def test_a_missing_reply_to_a_truth_that_no_wheel_knows_is_not_looked_up(
    tmp_path: Path, wheels: Wheels
) -> None:
    truths = write(
        tmp_path / "t.jsonl",
        [{"id": "v0", "answer": "happy"}, {"id": "v1", "answer": "neutral"}],
    )
    rows = rows_of([("happy", "happy")])
    found = score(tmp_path, rows, "meld-e", truths=truths, wheels=wheels)
    assert (found.score, found.counts.offered, found.counts.scored) == (1, 2, 1)
    assert found.counts.reasons == {"truth on no wheel: neutral": 1}
    # An open vocabulary looks every truth up.
    with pytest.raises(PredictionError, match=r"no prediction for 1 .*\(v1\)"):
        score(tmp_path, rows, "ov-merd", truths=truths, wheels=wheels)


def test_extra_ids_are_counted_and_told_and_not_scored(tmp_path: Path) -> None:
    truths = write(tmp_path / "t.jsonl", [{"id": "v0", "answer": "happy"}])
    found = score(tmp_path, rows_of([("x", "happy"), ("x", "sad")]), "dfew", truths=truths)
    assert (found.score, found.counts.scored, found.counts.skipped) == (1, 1, 1)
    assert found.counts.reasons == {"id not in the truths file": 1}
    assert any("1 (v1)" in note for note in found.notes)


def test_truths_with_modes_tell_equal_ids_apart(tmp_path: Path) -> None:
    truths = tmp_path / "t.csv"
    truths.write_text(
        "name,split,sentiment\nd1,test,positive\nd1,dev,negative\nd1,train,neutral\n",
        encoding="utf-8",
    )
    rows = [
        {"video_id": "d1", "response": "positive", "mode": "test"},
        {"video_id": "d1", "response": "negative", "mode": "dev"},
    ]
    found = score(tmp_path, rows, "meld-s", truths=truths)
    assert (found.score, found.counts.offered) == (1, 2)
    # The rows do not tell which of them is which.
    with pytest.raises(PredictionError, match=r"id 'd1' has several modes"):
        score(tmp_path, [{"video_id": "d1", "response": "positive"}], "meld-s", truths=truths)
    # The truths do not.
    truths.write_text("name,sentiment\nd1,positive\n", encoding="utf-8")
    with pytest.raises(
        PredictionError, match=r"line 2: id 'd1' also stands in .*line 1 with another"
    ):
        score(tmp_path, rows, "meld-s", truths=truths)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no truths; the file is empty"),
        ("x,y,z\n1,2,3\n", r"no column or field of ids \(got x, y, z\)"),
        ("name,y,z\n1,2,3\n", r"no column or field of labels \(got y, z\)"),
        ("name,label\nv0,happy\nv0,happy\n", r"line 3: id 'v0' is already on line 2"),
        ("name,label\nv0,\n", r"line 2: the truth is blank"),
        ("name,label\n,happy\n", r"line 2: the id is ''"),
        ("name,label\nv0,4\n", r"the truth '4' is a number"),
        ("name,label\nv0\n", r"fewer values than the header"),
    ],
)
def test_bad_truths_are_refused_by_their_line(tmp_path: Path, text: str, message: str) -> None:
    truths = tmp_path / "t.csv"
    truths.write_text(text, encoding="utf-8")
    with pytest.raises(PredictionError, match=message):
        score(tmp_path, rows_of([("happy", "happy")]), "dfew", truths=truths)


def test_pickled_truths_are_refused_with_the_line_that_converts_them(tmp_path: Path) -> None:
    truths = tmp_path / "label.npz"
    np.savez(truths, test1_corpus=np.array({"v0": {"emo": "happy"}}, dtype=object))
    with pytest.raises(PredictionError, match=r"holds Python objects.*np\.savez\('truths\.npz'"):
        score(tmp_path, rows_of([("happy", "happy")]), "dfew", truths=truths)
    truths.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(PredictionError, match=r"not a readable .npz archive"):
        score(tmp_path, rows_of([("happy", "happy")]), "dfew", truths=truths)
    with pytest.raises(PredictionError, match=r"cannot be read"):
        score(tmp_path, rows_of([("happy", "happy")]), "dfew", truths=tmp_path / "nowhere.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": ...}, r"line 2: the row has no reply: no field 'response' or 'new_response'"),
        ({"response": None}, r"line 2: field 'response' is null, not text"),
        ({"response": ["sad"]}, r"field 'response' is \[\"sad\"\], not text"),
        ({"new_response": None}, r"field 'new_response' is null"),
        (
            {"answer": ...},
            r"line 2: no truth: field 'answer' is missing or null \(in 1 of 2 rows\)",
        ),
        ({"answer": None}, r"line 2: no truth: .*--truths"),
        ({"answer": ""}, r"line 2: the truth is blank"),
        ({"answer": ["sad"]}, r"line 2: the truth is \['sad'\], not text"),
        ({"video_id": ...}, r"line 2: field 'video_id' is missing"),
        ({"video_id": ""}, r"field 'video_id' is \"\""),
        ({"video_id": True}, r"field 'video_id' is true"),
    ],
)
def test_bad_rows_are_refused_by_line_and_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    good, row = rows_of([("happy", "happy"), ("sad", "sad")])
    bad = {name: value for name, value in (row | change).items() if value is not ...}
    with pytest.raises(PredictionError, match=message):
        score(tmp_path, [good, bad], "dfew")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"[]", "the file is empty"),
        (b'{"video_id": "a", "resp', r"line 1: not JSON.*cut off"),
        (b"\x93NUMPY\xff", "line 1: not text in UTF-8"),
        (b'{"a": 1}\n', r"line 1: fields a are of no predictions file.*video_id, answer, response"),
        (b"video_id,response\n", "line 1: not JSON"),
        (b'{"video_id": ' + b"1" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"video_id": "a", "response": "x"}\n["video_id"]', "line 2: a list, not an object"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(data)
    with pytest.raises(PredictionError, match=message):
        score_file(path, "dfew")


def test_a_predictions_file_may_be_a_list_a_table_or_in_a_folder(tmp_path: Path) -> None:
    rows = rows_of([("happy", "happy"), ("sad", "x, y")])
    (tmp_path / "p.json").write_text(json.dumps(rows, indent=1))
    assert score_file(tmp_path / "p.json", "dfew").result.score == 0.5
    (tmp_path / "p.csv").write_text(
        'video_id,answer,response,new_response,mode\nv0,happy,x,happy,test\nv1,sad,"sad",,test\n'
    )
    # A blank cell of new_response is a field that the row lacks.
    assert score_file(tmp_path / "p.csv", "dfew").result.score == 1
    write(tmp_path / "predictions.jsonl", rows)
    assert score_file(tmp_path, "dfew").result.score == 0.5
    with pytest.raises(PredictionError, match=r"predictions\.jsonl: cannot be read"):
        score_file(tmp_path / "nowhere" / "predictions.jsonl", "dfew")


def test_lines_end_at_line_ends_alone_and_halves_of_pairs_do_no_harm(tmp_path: Path) -> None:
    rows = rows_of([("happy", "a\u2028b"), ("sad", "\ud83d"), ("sad", "sad\x85")])
    found = score(tmp_path, rows, "dfew")
    assert found.score == pytest.approx(1 / 3)
    assert "\ufffd" in found.model_dump_json()


def test_ids_may_be_left_out_where_the_scorers_read_none(tmp_path: Path, wheels: Wheels) -> None:
    rows = [{"answer": "fear", "response": "fear"}, {"answer": "anger", "response": "fear"}]
    found = score(tmp_path, rows, "bold")
    assert found.counts.scored == 2
    assert any("lines stand for them" in note for note in found.notes)
    with pytest.raises(PredictionError, match=r"line 1: field 'video_id' is missing"):
        score(tmp_path, rows, "meld-e", wheels=wheels)


def test_nothing_to_score_is_an_error(tmp_path: Path, wheels: Wheels) -> None:
    rows = rows_of([("neutral", "neutral")])
    with pytest.raises(PredictionError, match=r"nothing to score for meld-e.*neutral \(1\)"):
        score(tmp_path, rows, "meld-e", wheels=wheels)
    with pytest.raises(PredictionError, match=r"nothing to score for mosi.*neutral truth \(1\)"):
        score(tmp_path, rows, "mosi")


def test_unknown_names_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMOCACHE_WHEELS", raising=False)
    rows = rows_of([("happy", "happy")])
    with pytest.raises(SchemaError, match=r"unknown benchmark 'dfww'.*'dfew'"):
        score(tmp_path, rows, "dfww")
    with pytest.raises(SchemaError, match=r"unknown protocol 'release'.*'released'"):
        score(tmp_path, rows, "dfew", protocol="release")
    with pytest.raises(SchemaError, match=r"unknown reading 'tags'.*raw, tag, label"):
        score(tmp_path, rows, "dfew", reading="tags")
    with pytest.raises(SchemaError, match=r"need the emotion wheel tables"):
        score(tmp_path, rows, "meld-e")


def test_our_own_format_is_scored_by_the_benchmark_that_its_lines_name(
    tmp_path: Path, wheels: Wheels
) -> None:
    lines = [
        own("meld/a", "joy", benchmark="meld-e", truth="happy", split="test"),
        own("meld/a", "positive", benchmark="meld-s", task="sentiment", truth="positive"),
        own("meld/b", "sad", benchmark="meld-e", truth="neutral", split="test"),
        own("meld/c", "x", benchmark="meld-e", split="test"),
        own(
            "mafw/a",
            "anger; fear",
            benchmark="mafw-m",
            task="multi-label",
            truths=("fear", "anger"),
        ),
        own("mafw/b", "anger", benchmark="mafw-m", task="multi-label"),
    ]
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, lines)
    scored = score_all(path, wheels=wheels)
    assert list(scored) == ["meld-e", "mafw-m", "meld-s"]
    hit = scored["meld-e"]
    assert hit.result.score == 1
    assert hit.result.counts.reasons == {"truth on no wheel: neutral": 1, "no truth is known": 1}
    assert hit.result.run == "run-1"
    assert hit.result.file is not None
    assert hit.result.file.startswith("predictions.jsonl sha256:")
    assert [item.id for item in hit.items] == ["meld/a", "meld/b", "meld/c"]
    assert hit.items[0].prediction == lines[0]
    assert hit.tally.scored.tolist() == [True, False, False]
    assert scored["mafw-m"].result.counts.reasons == {"no truth is known": 1}
    assert scored["mafw-m"].result.score == 1
    assert score_predictions(lines, "meld-s").result.score == 1
    with pytest.raises(
        PredictionError, match=r"no reply for dfew .*replies for mafw-m, meld-e, meld-s"
    ):
        score_file(path, "dfew")


def test_without_a_benchmark_corpus_and_task_tell_what_a_reply_is_for(tmp_path: Path) -> None:
    lines = [
        own("dfew/a", "<think>x</think><answer>happy</answer>", task="think", truth="happy"),
        own("dfew/b", "sad", task="think", truth="angry"),
        own("dfew/b", "positive", task="sentiment", truth="positive"),
        own("caer/b", "sad", truth="sad"),
    ]
    found = score_predictions(lines, "dfew").result
    assert (found.score, found.counts.offered) == (0.5, 2)
    with pytest.raises(
        PredictionError, match=r"no reply for mafw .*corpora caer \(emotion\), dfew"
    ):
        score_predictions(lines, "mafw")
    # The same clip asked twice: which reply counts?
    twice = [*lines, own("dfew/b", "angry", truth="angry")]
    with pytest.raises(
        PredictionError, match=r"task 'emotion': id 'dfew/b' is already in .*'think'"
    ):
        score_predictions(twice, "dfew")


def test_replies_without_some_streams_are_left_out_unless_there_are_no_others() -> None:
    whole = [own("dfew/a", "happy", truth="happy")]
    masked = [own("dfew/a", "sad", truth="happy", masked=["audio"])]
    both = score_predictions([*whole, *masked], "dfew").result
    assert both.score == 1
    assert any("1 replies with masked streams are left out" in note for note in both.notes)
    alone = score_predictions(masked, "dfew").result
    assert alone.score == 0
    assert any("all replies are without audio" in note for note in alone.notes)
    other = own("dfew/a", "sad", truth="happy", masked=["video"])
    with pytest.raises(PredictionError, match=r"several kinds"):
        score_predictions([*masked, other], "dfew")


def test_our_own_lines_take_truths_by_uid_or_source_id(tmp_path: Path) -> None:
    lines = [own("dfew/a", "happy"), own("dfew/b", "sad")]
    for ids in (("a", "b"), ("dfew/a", "dfew/b")):
        rows = [{"id": i, "label": t} for i, t in zip(ids, ("happy", "sad"), strict=True)]
        truths = write(tmp_path / "t.jsonl", rows)
        assert score_predictions(lines, "dfew", truths=truths).result.score == 1


def test_a_damaged_line_of_our_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, [own("dfew/a", "happy", truth="happy", benchmark="dfew")])
    path.write_bytes(path.read_bytes().replace(b"happy", b"angry"))
    with pytest.raises(PredictionError, match=r"line 1: damaged"):
        score_file(path, "dfew")


def test_all_needs_lines_that_name_their_set(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", rows_of([("happy", "happy")]))
    with pytest.raises(PredictionError, match=r"do not say which set they are of.*mer2023"):
        score_all(path)
    write_predictions(path, [own("emer/a", "x", task="reason")])
    with pytest.raises(PredictionError, match=r"no reply is for a set of MMEVerse-Bench"):
        score_all(path)
    write_predictions(path, [own("dfew/a", "x", benchmark="dfeww", truth="sad")])
    with pytest.raises(SchemaError, match=r"unknown benchmark 'dfeww'"):
        score_all(path)
