"""Questions and their keys, the judgement of replies, and the cache of answers under every damage."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import SchemaError
from extract.annotate.endpoints import answers as answers_file
from extract.annotate.endpoints.answers import MARK, Answer, AnswerCache, AnswersError
from extract.annotate.endpoints.questions import MediaPart, Question, QuestionError, Sampling
from extract.annotate.endpoints.replies import (
    BrokenReplyError,
    Outcome,
    check_schema,
    declines,
    judge,
    parse_answer,
    read_reply,
)
from tests.conftest import key_of
from tests.processes import run_apart

SCHEMA = {
    "type": "object",
    "properties": {"description": {"type": "string"}},
    "required": ["description"],
    "additionalProperties": False,
}
SCHEMA_TEXT = json.dumps(SCHEMA, sort_keys=True)


def made(name: str, outcome: Outcome = Outcome.OK, **changes: Any) -> Answer:
    fields = {
        "key": key_of(name),
        "outcome": outcome,
        "role": "consolidate",
        "prompt_id": "p@1",
        "asked_model": "tiny",
        "text": f"Answer to {name}.",
        "time_s": 1.0,
    }
    return Answer(**fields | changes)


def full() -> Question:
    return Question(
        "consolidate",
        "tiny",
        "p@1",
        "What is it?",
        (MediaPart.of("image/jpeg", b"jpeg", None),),
        "Be brief.",
        Sampling(),
        SCHEMA,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"role": "other"},
        {"model": "tiny2"},
        {"prompt_id": "p@2"},
        {"text": "What is it ?"},
        {"system": None},
        {"media": ()},
        {"media": (MediaPart.of("image/jpeg", b"jpeg2"),)},
        {"media": (MediaPart.of("image/png", b"jpeg"),)},
        {"sampling": Sampling(temperature=0.5)},
        {"sampling": Sampling(max_tokens=100)},
        {"sampling": Sampling(seed=None)},
        {"answer_schema": None},
        {"answer_schema": SCHEMA | {"title": "x"}},
    ],
)
def test_whatever_decides_an_answer_changes_the_key(changes: dict[str, Any]) -> None:
    assert dataclasses.replace(full(), **changes).key != full().key


def test_what_does_not_decide_it_does_not_change_the_key() -> None:
    assert dataclasses.replace(full(), tag="clip 7").key == full().key
    reordered = dict(reversed(SCHEMA.items()))
    assert dataclasses.replace(full(), answer_schema=reordered).key == full().key
    # By hand: this key must not change, or everything is paid for again.
    assert full().key == "08593941f280cc011d1f8a23573b77a95275d5c4167c6971c2f7af49dea1b1b2"


def test_a_question_that_cannot_be_sent() -> None:
    with pytest.raises(SchemaError, match="no Unicode"):
        dataclasses.replace(full(), text="a \ud800 b")
    with pytest.raises(SchemaError, match="needs a model"):
        dataclasses.replace(full(), model=" ")
    with pytest.raises(SchemaError, match="Did you mean 'image/jpeg'"):
        MediaPart.of("image/jpg", b"")
    part = MediaPart("image/jpeg", key_of("stated"), lambda: b"others")
    with pytest.raises(QuestionError, match="the media changed"):
        dataclasses.replace(full(), media=(part,)).messages()


@pytest.mark.parametrize(
    ("text", "refusal", "finish", "outcome"),
    [
        ('{"description": "x"}', None, "stop", Outcome.OK),
        ('```json\n{"description": "x"}\n```', None, "stop", Outcome.OK),
        ('{"description": "x"}', None, None, Outcome.OK),
        ('{"description": "x"}', "no", "stop", Outcome.REFUSED),
        ('{"description": "x"}', None, "content_filter", Outcome.REFUSED),
        ('{"description": "x"}', None, "length", Outcome.TRUNCATED),
        ("", None, "length", Outcome.TRUNCATED),
        ("", None, "stop", Outcome.EMPTY),
        ('{"description": " "}', None, "stop", Outcome.EMPTY),
        ('{"description": 3}', None, "stop", Outcome.INVALID),
        ('{"description": "x", "more": 1}', None, "stop", Outcome.INVALID),
        ('["x"]', None, "stop", Outcome.INVALID),
        ("{", None, "stop", Outcome.INVALID),
        ("[" * 100_000, None, "stop", Outcome.INVALID),
        ("I'm sorry, but I can't help with that.", None, "stop", Outcome.REFUSED),
    ],
)
def test_outcomes(text: str, refusal: str | None, finish: str | None, outcome: Outcome) -> None:
    found, reason = judge(text, refusal, finish, SCHEMA_TEXT)
    assert found is outcome
    assert (reason is None) == (outcome is Outcome.OK)


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't assist with that request.", True),
        ("I am sorry, I cannot identify people in images.", True),
        ("Sorry, I can\u2019t help with identifying the person.", True),
        ("I cannot describe this image.", True),
        ("I'm unable to process audio.", True),
        ("As an AI language model, I can't listen to recordings.", True),
        ("\u62b1\u6b49\uff0c\u6211\u65e0\u6cd5\u5e2e\u52a9\u3002", True),
        ("A man says he is sorry and looks down.", False),
        ('"I\'m sorry," says the woman, and her voice trembles.', False),
        ("I can see a man at a table.", False),
        ("Sorry words are spoken in a low voice.", False),
        ("The person cannot stop laughing.", False),
        ("I cannot see the face, but " + "the posture is upright and " * 20, False),
    ],
)
def test_refusals_in_words(text: str, refused: bool) -> None:
    assert declines(text) is refused
    assert (judge(text, None, "stop", None)[0] is Outcome.REFUSED) is refused


def test_replies_are_read_as_servers_send_them() -> None:
    def reply(message: Any, **more: Any) -> bytes:
        return json.dumps(
            {"choices": [{"message": message, "finish_reason": "stop"}]} | more
        ).encode()

    thinking = read_reply(reply({"content": "<think>Hm.\n</think>\n She nods. "}), None)
    assert (thinking.outcome, thinking.text) == (Outcome.OK, "She nods.")
    parts = read_reply(
        reply({"content": [{"type": "text", "text": "She"}, {"text": " nods."}]}), None
    )
    assert parts.text == "She nods."
    odd = read_reply(reply({"content": "x"}, usage={"prompt_tokens": "7"}, model=None), None)
    assert (odd.prompt_tokens, odd.completion_tokens, odd.model) == (None, None, None)
    refused = read_reply(reply({"content": None, "refusal": "No."}), None)
    assert (refused.outcome, refused.text) == (Outcome.REFUSED, "No.")
    for raw in (
        b"",
        b"\xff",
        b"[]",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        reply(None),
        reply({"content": 3}),
    ):
        with pytest.raises(BrokenReplyError):
            read_reply(raw, None)
    assert parse_answer(" [1] ") == [1]
    with pytest.raises(SchemaError, match="no JSON schema"):
        check_schema({"type": "objekt"}, "prompt 'x'")


def test_answers_come_back_as_they_were_put(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "deep" / "answers")
    odd = made("odd", text='Line\nbreak, \u4f60\u597d, "quotes", \U0001f600' + "x" * 20_000)
    everything = made(
        "all",
        Outcome.INVALID,
        reason="why",
        finish_reason="stop",
        model="m",
        prompt_tokens=3,
        completion_tokens=4,
        attempts=2,
        repaired=True,
        unenforced=True,
        elapsed_s=0.1,
    )
    cache.put([odd, everything])
    for each in (cache, AnswerCache(cache.folder)):
        assert each.get(odd.key) == odd
        assert each.get(everything.key) == everything
        assert {a.key for a in each} == {odd.key, everything.key}
        assert each.get(key_of("unknown")) is None
        assert key_of("unknown") not in each
        assert each.outcomes() == {("consolidate", "ok"): 1, ("consolidate", "invalid"): 1}
        assert not each.damaged
        each.close()


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(list(Outcome))), max_size=12))
def test_an_answer_that_is_ok_stays_and_else_the_last_counts(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, Outcome]]
) -> None:
    cache = AnswerCache(tmp_path_factory.mktemp("answers") / "a")
    expected: dict[str, Answer] = {}
    for i, (name, outcome) in enumerate(puts):
        answer = made(str(name), outcome, text=str(i))
        cache.put([answer])
        if not (answer.key in expected and expected[answer.key].ok):
            expected[answer.key] = answer
    for each in (cache, AnswerCache(cache.folder)):
        assert {a.key: a for a in each} == expected
        each.close()


def test_a_retried_outcome_is_asked_again_once(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    refused = made("a", Outcome.REFUSED, time_s=10.0)
    cache.put([refused])
    assert cache.usable(refused.key) == refused
    assert cache.usable(refused.key, {"empty"}) == refused
    assert cache.usable(refused.key, {"refused"}, since_s=11.0) is None
    assert cache.usable(refused.key, {"refused"}, since_s=9.0) == refused


def segment_of(folder: Path) -> Path:
    (found,) = folder.glob("*.jsonl")
    return found


@pytest.mark.fault("torn last line")
def test_a_segment_cut_anywhere_keeps_its_whole_lines(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "a")
    three = [made(name) for name in "abc"]
    cache.put(three)
    data = segment_of(cache.folder).read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == ord("\n")]
    segment = segment_of(cache.folder)
    for n_bytes in range(len(data)):
        segment.write_bytes(data[:n_bytes])
        cut = AnswerCache(cache.folder)
        whole = sum(end <= n_bytes for end in ends)
        assert [cut.get(a.key) for a in three] == [*three[:whole], *[None] * (3 - whole)]
        assert not cut.damaged
        cut.close()


@pytest.mark.fault("damaged line")
def test_a_damaged_byte_costs_its_own_answer_and_is_reported(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "a")
    three = [made(name) for name in "abc"]
    cache.put(three)
    segment = segment_of(cache.folder)
    data = segment.read_bytes()
    first, second = (i + 1 for i, byte in enumerate(data[:-1]) if byte == ord("\n"))
    for i in range(first, second, 3):
        segment.write_bytes(data[:i] + bytes([data[i] ^ 0x15]) + data[i + 1 :])
        hurt = AnswerCache(cache.folder)
        assert hurt.get(three[0].key) == three[0]
        assert hurt.get(three[1].key) is None
        assert hurt.damaged
        if i != second - 1:  # without its line end it takes the next one with it
            assert hurt.get(three[2].key) == three[2]
        hurt.close()
    assert str(segment) in str(hurt.damaged[0])
    # Damage after the index was made.
    segment.write_bytes(data)
    late = AnswerCache(cache.folder)
    segment.write_bytes(data.replace(b"Answer to ", b"Answer of "))
    assert late.get(three[0].key) is None
    assert len(late.damaged) == 1
    late.close()


def _write_many(folder: Path, start: int) -> None:
    cache = AnswerCache(folder)
    for i in range(start, start + 60):
        cache.put([made(str(i))])


def test_processes_write_side_by_side_and_see_each_other(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    watching = AnswerCache(folder)
    assert run_apart(*((_write_many, (folder, start)) for start in (0, 40, 80))) == [0, 0, 0]
    assert len(watching) == 0
    watching.refresh()
    assert len(watching) == 140
    assert len(list(folder.glob("*.jsonl"))) == 3
    for i in range(140):
        assert watching.get(key_of(str(i))) == made(str(i))
    assert not watching.damaged
    watching.close()


def test_a_forked_process_writes_a_segment_of_its_own(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path / "a")
    cache.put([made("parent")])
    child = multiprocessing.get_context("fork").Process(target=cache.put, args=([made("child")],))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    cache.put([made("parent again")])
    cache.refresh()
    assert len(list(cache.folder.glob("*.jsonl"))) == 2
    for each in (cache, AnswerCache(cache.folder)):
        assert {a.text.removeprefix("Answer to ") for a in each} == {
            "parent.",
            "child.",
            "parent again.",
        }
        each.close()


@pytest.mark.fault("disk full")
def test_a_failed_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = AnswerCache(tmp_path / "a")
    cache.put([made("before")])
    whole = os.pwrite

    def half(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return whole(descriptor, data[: len(data) - 50], offset)

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(AnswersError, match="No space left"):
        cache.put([made("lost")])
    assert key_of("lost") not in cache
    monkeypatch.undo()
    cache.put([made("after")])
    for each in (cache, AnswerCache(cache.folder)):
        assert {a.text for a in each} == {"Answer to before.", "Answer to after."}
        assert not each.damaged
        each.close()


def test_answers_are_on_the_disk_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    cache = AnswerCache(tmp_path)
    cache.put([made("first")])  # which makes the segment, with syncs of its own
    sync, enter = os.fsync, AnswerCache._enter
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd))[1])
    monkeypatch.setattr(AnswerCache, "_enter", lambda *a: (order.append("index"), enter(*a))[1])
    cache.put([made("a"), made("b")])
    assert order == ["sync", "index", "index"]


def test_folders_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(AnswersError, match="is a file"):
        AnswerCache(tmp_path / "file")
    with pytest.raises(AnswersError, match="folder of something else"):
        AnswerCache(tmp_path)
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / MARK).write_text('{"format": "emocache answers", "version": 2}')
    with pytest.raises(AnswersError, match="version that wrote it"):
        AnswerCache(newer)
    (newer / MARK).write_text("{")
    with pytest.raises(AnswersError, match="Restore it"):
        AnswerCache(newer)


def test_a_folder_that_another_process_is_making_or_died_making(tmp_path: Path) -> None:
    (tmp_path / f".{MARK}.7-abc.partial").write_text("{")
    cache = AnswerCache(tmp_path)
    cache.put([made("a")])
    assert cache.get(key_of("a")) == made("a")
    cache.close()


def test_a_folder_moves_as_a_whole(tmp_path: Path) -> None:
    AnswerCache(tmp_path / "a").put([made("a")])
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = AnswerCache(tmp_path / "b")
    assert moved.get(key_of("a")) == made("a")
    moved.close()


def test_the_index_of_400_000_answers_is_small(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.put(made(str(i)) for i in range(30_000))
    tracemalloc.start()
    try:
        again = AnswerCache(tmp_path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(again) == 30_000
    assert held / 30_000 * 400_000 < 100 * 2**20


def test_the_first_fields_of_a_line_are_those_that_a_scan_reads(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path)
    cache.put([made("a")])
    line = json.loads(segment_of(tmp_path).read_text())
    assert list(line)[:2] == ["key", "outcome"]
    assert list(line)[-1] == "checksum"
    assert line["text"] == "Answer to a."
    assert answers_file.FORMAT == json.loads((tmp_path / MARK).read_text())
