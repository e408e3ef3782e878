"""EMER and MME-Emotion with a judge on loopback: what is asked, what is scored, what goes wrong."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import emocache
from cache.errors import PredictionError
from eval.judging.emer import judge_emer
from eval.judging.mme import OUR_TOKENS, WORDS, judge_mme
from eval.judging.panel import JudgeOptions
from eval.judging.prompts import ROLES
from eval.judging.results import MixedJudgesError, one_judge, read_judged
from eval.judging.sources import read_samples
from eval.judging.tasks import MME_TASKS
from extract.annotate.endpoints.budget import BudgetError, Caps
from extract.annotate.endpoints.schedule import RetryPolicy
from extract.annotate.endpoints.transport import (
    EndpointDownError,
    EndpointOptions,
    UnknownModelError,
)
from tests.chat_server import ChatServer, Kind, chat_server, media_of, text_of
from tests.media import stamp_of, write, write_wav

QUICK = RetryPolicy(base_s=0.01, patience_s=0.0, attempts=2)


def judged(body: dict[str, Any]) -> str:
    """Answer as a judge that finds its ratings and marks written in the texts themselves.

    `rate 7` in a description is its clue rating, `words happy 4` gives the words `happy 4`, which are
    rated 4; the seed is added to every rating. A step that holds "wrong" is marked 0/1, a last one that
    holds `k of n` k/n.
    """
    text, seed = text_of(body), int(body["seed"])
    if "<words>" in text:
        words = text.partition("<words>")[2].partition("</words>")[0]
        return f"Score: {int(words.split()[-1]) + seed}\nReason: 3 of them agree."
    if "<reference>" in text:
        description = text.partition("<description>")[2].partition("</description>")[0]
        rated = re.search(r"rate (\d+)", description)
        return f"Score: {int(rated[1]) + seed}\nReason: fine." if rated else "No idea."
    if "<description>" in text:
        found = re.search(r"words (\w+ \d+)", text)
        return found[1] if found else "None"
    if "<reply>" in text:
        said = text.partition("<reply>")[2].partition("</reply>")[0]
        return "\n".join(f"{i}. {s}" for i, s in enumerate(said.split(". "), start=1))
    steps = re.findall(r"^\d+\. (.*)$", text.partition("<steps>")[2].partition("</steps>")[0], re.M)
    marks = []
    for i, step in enumerate(steps, start=1):
        share = re.search(r"(\d+) of (\d+)", step)
        mark = f"{share[1]}/{share[2]}" if share else f"{0 if 'wrong' in step else 1}/1"
        marks.append(f"Step {i}: {mark}")
    return f"Let me see. <score>{', '.join(marks)}</score>"


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(("judge", "agent")) as running:
        running.answer = judged
        yield running


def options_of(server: ChatServer | str, folder: Path, **changes: Any) -> JudgeOptions:
    url = server if isinstance(server, str) else server.base_url
    endpoint = {"base_url": url, "api_key_env": "none", "retry": QUICK, "in_flight": 4}
    endpoint |= changes.pop("endpoint", {})
    fields: dict[str, Any] = {"model": "judge", "answers": folder / "answers"}
    return JudgeOptions(endpoint=EndpointOptions(**endpoint), **fields | changes)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CLUES, LABELS = (7, 2, 5), (4, 8, 6)


@pytest.fixture
def emer(tmp_path: Path) -> tuple[Path, Path]:
    """Three clips with written-in ratings."""
    references = [{"id": f"clip{i}.", "description": f"Reference {i}."} for i in range(3)]
    replies = [
        {
            "id": f"clip{i}.",
            "reply": f"<think>Clip {i}. rate {c}</think><answer>words glad {w}</answer>",
        }
        for i, (c, w) in enumerate(zip(CLUES, LABELS, strict=True))
    ]
    return jsonl(tmp_path / "replies.jsonl", replies), jsonl(tmp_path / "refs.jsonl", references)


# ------------------------------------------------------------------------------------ EMER


def test_emer_is_the_mean_of_ratings(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    score = judge_emer(*emer, options_of(server, tmp_path), name="ours")
    assert score.clue.mean == pytest.approx(statistics.mean(CLUES))
    assert score.label.mean == pytest.approx(statistics.mean(LABELS))
    assert score.clue.clip_error == pytest.approx(statistics.stdev(CLUES) / math.sqrt(3))
    assert (score.clue.n, score.offered, score.unread, score.reasons) == (3, 3, (), {})
    assert [clip.words for clip in score.clips] == [(f"glad {w}",) for w in LABELS]
    assert [clip.true_words for clip in score.clips] == [("none",)] * 3
    # Who judged.
    assert (score.judge.model, score.judge.versions) == ("judge", ("judge-0001",))
    assert [p.partition("@")[0] for p in score.judge.prompts] == [
        "emer-clue", "emer-label", "emer-words"
    ]  # fmt: skip
    # One rating and two condensings and one rating per clip.
    assert server.n_requests == 4 * 3
    for _, body, _ in server.requests:
        assert (body["temperature"], body["seed"], body["model"]) == (0.0, 0, "judge")
        assert [m["role"] for m in body["messages"]] == ["system", "user"]
    clue = next(text_of(b) for _, b, _ in server.requests if "<reference>Reference 0" in text_of(b))
    assert "Clip 0. rate 7 Answer: words glad 4</description>" in clue


def test_repeats_have_a_mean_and_a_spread_of_their_own(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    score = judge_emer(*emer, options_of(server, tmp_path, repeats=3))
    mean = statistics.mean(CLUES)
    assert score.clue.by_repeat == pytest.approx((mean, mean + 1, mean + 2))
    assert score.clue.mean == pytest.approx(mean + 1)
    assert score.clue.spread == pytest.approx(1.0)
    assert score.clue.standard_error == pytest.approx(1 / math.sqrt(3))
    assert score.clips[0].clue == (7, 8, 9)
    assert {body["seed"] for _, body, _ in server.requests} == {0, 1, 2}
    assert server.n_requests == 3 * 4 * 3


def test_nothing_is_asked_twice_and_more_repeats_cost_only_themselves(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    first = judge_emer(*emer, options_of(server, tmp_path))
    # No one listens there: all must come from the answers.
    again = judge_emer(*emer, options_of("http://127.0.0.1:9/v1", tmp_path))
    assert again == first
    judge_emer(*emer, options_of(server, tmp_path, repeats=2))
    assert server.n_requests == 2 * 4 * 3
    # The reference's words are those of the first model, whatever a second one writes.
    other = jsonl(
        tmp_path / "other.jsonl",
        [{"id": f"clip{i}.", "reply": f"rate 3, words sad {i}"} for i in range(3)],
    )
    judge_emer(other, emer[1], options_of(server, tmp_path))
    assert server.n_requests == 2 * 4 * 3 + 3 * 3


@pytest.mark.fault("judge without a number")
def test_a_reply_without_a_number_is_counted_named_and_not_dropped(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    def answer(body: dict[str, Any]) -> str:
        text = text_of(body)
        if "<reference>Reference 1." in text:
            return "They agree very well."
        if "<reference>Reference 2." in text:
            return "6, since both are calm."
        return judged(body)

    server.answer = answer
    score = judge_emer(*emer, options_of(server, tmp_path))
    assert (score.clue.mean, score.clue.n, score.label.n, score.offered) == (6.5, 2, 3, 3)
    assert score.clips[1].clue == (None,)
    [unread] = score.unread
    assert (unread.id, unread.role, unread.reason, unread.answer) == (
        "clip1.", "emer-clue", "no number", "They agree very well."
    )  # fmt: skip
    assert score.reasons == {
        "emer-clue: no number": 1, "rating without its field, first number taken": 1
    }  # fmt: skip
    assert any("clip1." in note for note in score.notes)


USELESS: list[tuple[Kind, str]] = [
    ("refusal", "refused"),
    ("spoken refusal", "refused"),
    ("empty", "empty"),
    ("500", "no answer (500)"),
    ("bad request", "no answer (rejected)"),
]


@pytest.mark.fault("judge answers nothing of use")
@pytest.mark.parametrize(("kind", "reason"), USELESS)
def test_what_is_no_answer_is_told_and_may_be_asked_again(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path], kind: Kind, reason: str
) -> None:
    server.fail(kind, match="<reference>Reference 1.")
    options = options_of(server, tmp_path)
    score = judge_emer(*emer, options)
    assert score.clue.mean == pytest.approx((CLUES[0] + CLUES[2]) / 2)
    assert [(u.id, u.reason) for u in score.unread] == [("clip1.", reason)]
    server.calm()
    before = server.n_requests
    score = judge_emer(*emer, options.model_copy(update={"retry": ("all",)}))
    assert (score.clue.n, score.unread) == (3, ())
    assert server.n_requests == before + 1


@pytest.mark.fault("judge cuts its answers")
def test_a_cut_list_of_words_is_none_and_a_cut_reason_does_not_matter(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    server.fail("length", match="<reference>Reference 0.")  # "Score: 7\nReason"
    server.fail("length", match="<description>Reference 1.")
    score = judge_emer(*emer, options_of(server, tmp_path))
    assert score.clips[0].clue == (7,)
    assert score.clips[1].label == (None,)
    assert [(u.role, u.reason) for u in score.unread] == [("emer-words", "truncated")]


@pytest.mark.fault("judge is down")
def test_an_unreachable_judge_keeps_what_was_answered(server: ChatServer, tmp_path: Path) -> None:
    options = options_of(server, tmp_path, endpoint={"in_flight": 1})
    server.fail("503", match="<words>")  # down as soon as label overlap is rated
    many = [{"id": f"c{i}", "reply": f"rate 3 words sad {i % 9}"} for i in range(12)]
    references = [{"id": f"c{i}", "description": f"Reference {i}."} for i in range(12)]
    jsonl(tmp_path / "p", many)
    jsonl(tmp_path / "r", references)
    with pytest.raises(EndpointDownError, match="every answer so far is kept"):
        judge_emer(tmp_path / "p", tmp_path / "r", options)
    server.calm()
    before = server.n_requests
    score = judge_emer(tmp_path / "p", tmp_path / "r", options)
    # 12 clips share 9 sets of words, of which none was rated.
    assert server.n_requests - before == 9
    assert score.label.n == 12
    nobody = options_of("http://127.0.0.1:9/v1", tmp_path / "other")
    with pytest.raises(EndpointDownError, match=r"does not answer for model 'judge'"):
        judge_emer(tmp_path / "p", tmp_path / "r", nobody)


def test_caps_hold_and_the_next_run_goes_on(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    capped = options_of(server, tmp_path, endpoint={"caps": Caps(requests=5)})
    with pytest.raises(BudgetError, match="cap of 5 requests"):
        judge_emer(*emer, capped)
    assert server.n_requests == 5
    judge_emer(*emer, options_of(server, tmp_path))
    assert server.n_requests == 12


@pytest.mark.fault("judge changes its version")
def test_a_judge_that_changes_while_it_is_asked_fits_no_table(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests import chat_server as module

    whole, n = module._completion, 0

    def changing(body: dict[str, Any], text: str) -> dict[str, Any]:
        nonlocal n
        n += 1
        return whole(body, text) | {"model": f"judge-{1 + (n > 6)}"}

    monkeypatch.setattr(module, "_completion", changing)
    score = judge_emer(*emer, options_of(server, tmp_path))
    assert score.judge.versions == ("judge-1", "judge-2")
    assert any("Not fit for a table" in note for note in score.notes)
    with pytest.raises(MixedJudgesError, match="judge-1, judge-2"):
        one_judge([score])


def test_an_empty_description_is_judged_as_such(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    seen = []

    def answer(body: dict[str, Any]) -> str:
        text = text_of(body)
        if "(the model wrote nothing)" in text:
            seen.append("<reference>" in text)
            return "Score: 1" if seen[-1] else "none"
        return "Score: 1" if "<words>none" in text else judged(body)

    server.answer = answer
    rows = [json.loads(line) for line in emer[0].read_text().splitlines()]
    rows[2]["reply"] = " \n"
    score = judge_emer(jsonl(emer[0], rows), emer[1], options_of(server, tmp_path))
    assert sorted(seen) == [False, True]
    assert score.clips[2].clue == score.clips[2].label == (1,)
    assert score.reasons == {"empty reply": 1}


def test_own_prompts_ask_otherwise_and_are_another_judge(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path]
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "emer-clue.yaml").write_text(
        "name: mine\nrole: emer-clue\nfield: Overlap\ntext: 'A {{ reference }} B {{ description }}'\n"
    )
    server.answer = lambda body: (
        "Score: 2\nOverlap: 9" if text_of(body).startswith("A ") else judged(body)
    )
    own = judge_emer(*emer, options_of(server, tmp_path, prompts=tmp_path / "own"))
    assert own.clue.mean == 9
    server.answer = judged
    shipped = judge_emer(*emer, options_of(server, tmp_path))
    with pytest.raises(MixedJudgesError, match=r"prompts .*mine@"):
        one_judge([own, shipped])


# ------------------------------------------------------------------------------------ MME-Emotion

SAMPLES: list[dict[str, Any]] = [
    {"id": "a", "task": "er-wild", "label": "angry", "clue": "loud and fast"},
    {"id": "b", "task": "er-wild", "label": "sad"},
    {"id": "c", "task": "sa", "label": "positive"},
    {"id": "d", "task": "ml-er", "labels": ["sad", "worried", "angry"]},
    {"id": "e", "task": "fg-sa", "label": "strong positive"},
]
REPLIES: list[dict[str, Any]] = [
    {"id": "a", "reply": "<think>He shouts. He is wrong here</think><answer>angry</answer>"},
    {"id": "b", "reply": "wrong: happy"},
    {"id": "c", "reply": "She smiles. Warm voice. positive"},
    {"id": "d", "reply": "Tears. 2 of 3"},
    {"id": "e", "reply": "Good news. wrong: positive"},
]
MARKS = {"a": (1, 0), "b": (0,), "c": (1, 1, 1), "d": (1, 2 / 3), "e": (1, 0)}
"""By hand: "He is wrong here Answer: angry" is one step of the agent above, and the last."""


def mme_files(folder: Path, **changes: Any) -> tuple[Path, Path]:
    replies = [{**row, **changes} for row in REPLIES]
    return jsonl(folder / "replies.jsonl", replies), jsonl(folder / "samples.jsonl", SAMPLES)


def test_mme_emotion_by_hand(server: ChatServer, tmp_path: Path) -> None:
    score = judge_mme(*mme_files(tmp_path), options_of(server, tmp_path), step_model="agent")
    assert {s.id: s.marks[0] for s in score.samples} == {
        i: pytest.approx(m) for i, m in MARKS.items()
    }
    rec = [m[-1] for m in MARKS.values()]
    rea = [sum(m[:-1]) / (len(m) - 1) if len(m) > 1 else 0 for m in MARKS.values()]
    assert score.rec.mean == pytest.approx(statistics.mean(rec))
    assert score.rea.mean == pytest.approx(statistics.mean(rea))
    assert score.cot.mean == pytest.approx((score.rec.mean + score.rea.mean) / 2)
    assert score.steps == pytest.approx(statistics.mean(len(m) for m in MARKS.values()))
    assert score.token_unit == WORDS
    assert score.tokens == pytest.approx(statistics.mean(len(r["reply"].split()) for r in REPLIES))
    # Pooled over samples, not a mean of tasks.
    assert set(score.tasks) == {"er-wild", "sa", "ml-er", "fg-sa"}
    by_task = [t.rec for t in score.tasks.values() if t.rec is not None]
    assert score.rec.mean != pytest.approx(statistics.mean(by_task))
    assert (score.tasks["er-wild"].rec, score.tasks["er-wild"].rea) == (0, 0.5)
    assert score.tasks["ml-er"].rec == pytest.approx(2 / 3)
    assert (score.unread, score.reasons, score.offered, score.rec.n) == ((), {}, 5, 5)
    # Who was asked, and what.
    assert (score.judge.model, score.judge.step_model) == ("judge", "agent")
    assert (score.judge.versions, score.judge.step_versions) == (("judge-0001",), ("agent-0001",))
    assert score.judge.frames == 0
    assert len(score.judge.prompts) == 4
    assert server.n_requests == 2 * 5
    asked = {s["id"]: next(
        text_of(b) for _, b, _ in server.requests
        if b["model"] == "judge" and f"<truth>{s.get('label', 'worried')}</truth>" in text_of(b)
        and text_of(b).count("<truth>") == len(s.get("labels", [""]))
    ) for s in SAMPLES}  # fmt: skip
    assert "<clue>loud and fast</clue>" in asked["a"]
    assert "<clue>" not in asked["b"]
    assert "k/3" in asked["d"]
    assert "grade" in asked["e"]


def test_repeats_ask_the_judge_again_and_the_step_agent_once(
    server: ChatServer, tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> str:
        found = judged(body)
        return found.replace("1/1</score>", "0/1</score>") if body["seed"] else found

    server.answer = answer
    score = judge_mme(
        *mme_files(tmp_path), options_of(server, tmp_path, repeats=2), step_model="agent"
    )
    assert server.n_requests == 5 + 2 * 5
    first, second = score.rec.by_repeat
    assert first == pytest.approx(statistics.mean(m[-1] for m in MARKS.values()))
    # Only c's last mark was 1: it is lost in the second round.
    assert second == pytest.approx(first - 1 / 5)
    assert score.rec.mean == pytest.approx((first + second) / 2)
    assert score.rec.spread == pytest.approx(statistics.stdev([first, second]))


@pytest.mark.fault("judge without marks")
def test_samples_without_marks_are_skipped_and_counted(server: ChatServer, tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> str:
        text = text_of(body)
        if body["model"] == "judge" and "<truth>sad</truth>\n\n" in text:
            return "Step 1: 1/1"  # no tags
        if body["model"] == "judge" and "<truth>positive<" in text:
            return "<score>Step 1:1/1, Step 2:0/1</score>"  # not in the form of a plain task
        return judged(body)

    server.answer = answer
    server.fail("refusal", match="<reply>Tears")
    score = judge_mme(*mme_files(tmp_path), options_of(server, tmp_path), step_model="agent")
    assert (score.rec.n, score.offered) == (3, 5)
    assert score.rec.mean == pytest.approx((0 + 0 + 0) / 3)  # a, c and e
    assert {(u.id, u.role, u.reason) for u in score.unread} == {
        ("b", "mme-judge", "no mark"), ("d", "mme-steps", "refused")
    }  # fmt: skip
    assert score.tasks["sa"].scored == 0
    assert score.tasks["sa"].rec is None
    assert (score.tasks["er-wild"].offered, score.tasks["er-wild"].scored) == (2, 1)
    assert score.reasons == {
        "mme-judge: no mark": 1,
        "mme-steps: refused": 1,
        "not scored: no readable mark": 2,
        "marks not in the form of their task, read in the overall figure only": 1,
        "more or fewer marks than steps": 1,
    }


def test_tokens_are_the_runs_own_where_all_are_known(server: ChatServer, tmp_path: Path) -> None:
    options = options_of(server, tmp_path)
    score = judge_mme(*mme_files(tmp_path, n_tokens=11), options, step_model="agent")
    assert (score.tokens, score.token_unit) == (11, OUR_TOKENS)


def test_missing_samples_are_refused_or_told(server: ChatServer, tmp_path: Path) -> None:
    replies, samples = mme_files(tmp_path)
    jsonl(replies, REPLIES[:3])
    with pytest.raises(PredictionError, match="2 of 5 samples have no prediction"):
        judge_mme(replies, samples, options_of(server, tmp_path), step_model="agent")
    assert server.n_requests == 0
    score = judge_mme(
        replies, samples, options_of(server, tmp_path), step_model="agent", allow_missing=True
    )
    assert (score.offered, score.rec.n, score.reasons["no prediction"]) == (5, 3, 2)
    assert (score.tasks["ml-er"].offered, score.tasks["ml-er"].scored) == (1, 0)


def test_the_step_agent_may_be_elsewhere_and_caps_hold_over_both(
    server: ChatServer, tmp_path: Path
) -> None:
    with chat_server(("agent",)) as other:
        other.answer = judged
        elsewhere = EndpointOptions(
            base_url=other.base_url, api_key_env="none", retry=QUICK, caps=Caps(requests=8)
        )
        options = options_of(server, tmp_path, endpoint={"caps": Caps(requests=8)})
        with pytest.raises(BudgetError):
            judge_mme(*mme_files(tmp_path), options, step_model="agent", step_endpoint=elsewhere)
        assert (other.n_requests, server.n_requests) == (5, 3)
    with pytest.raises(UnknownModelError, match="'absent'"):
        judge_mme(*mme_files(tmp_path), options_of(server, tmp_path / "x"), step_model="absent")


def pictures(body: dict[str, Any]) -> list[Image.Image]:
    """Decode the pictures of a request."""
    parts = body["messages"][-1]["content"]
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(u.partition(",")[2]))) for u in urls]


def test_the_judge_sees_a_picture_a_second(server: ChatServer, tmp_path: Path) -> None:
    write(tmp_path / "short.mp4", n=60)  # 2.4 s at 25 per second
    write(tmp_path / "long.mp4", n=300)  # 12 s
    write_wav(tmp_path / "sound.wav", np.zeros(16000, np.int16), 16000)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    names = ("short.mp4", "long.mp4", "sound.wav", "broken.mp4")
    samples = [{"id": n, "task": "er-lab", "label": f"truth {n}", "media": n} for n in names]
    replies = [{"id": n, "reply": f"Step. {n}"} for n in names]
    files = jsonl(tmp_path / "replies.jsonl", replies), jsonl(tmp_path / "samples.jsonl", samples)
    score = judge_mme(*files, options_of(server, tmp_path), step_model="agent", n_decoders=2)
    seen = {
        name: pictures(body)
        for name in names
        for _, body, _ in server.requests
        if f"<truth>truth {name}</truth>" in text_of(body) and media_of(body)
    }
    # Centres of 3 equal parts of 60 frames, of 10 of 300.
    assert [stamp_of(np.asarray(p)) for p in seen["short.mp4"]] == [10, 30, 50]
    assert [stamp_of(np.asarray(p)) for p in seen["long.mp4"]] == [
        (15 + 30 * i) % 256 for i in range(10)
    ]
    assert seen["short.mp4"][0].size == (96, 64)
    assert set(seen) == {"short.mp4", "long.mp4"}
    assert {s.id: s.n_frames for s in score.samples} == {
        "short.mp4": 3, "long.mp4": 10, "sound.wav": 0, "broken.mp4": 0
    }  # fmt: skip
    told = {s.id: s.picture_problem for s in score.samples}
    assert told["sound.wav"] == "has no picture"
    assert told["broken.mp4"]
    assert score.reasons == {"no picture for the judge": 2}
    assert (score.judge.frames, score.rec.n) == (10, 4)
    # Decoding again gives the same bytes, so no answer is paid for twice.
    n = server.n_requests
    assert judge_mme(*files, options_of(server, tmp_path), step_model="agent") == score
    assert server.n_requests == n
    # Without pictures it is another judge.
    blind = judge_mme(*files, options_of(server, tmp_path), step_model="agent", frames=0)
    assert blind.judge.frames == 0
    with pytest.raises(MixedJudgesError, match="frames 10 and 0"):
        one_judge([score, blind])
    (tmp_path / "long.mp4").unlink()
    with pytest.raises(PredictionError, match=r"1 of 4 media files are not there.*long\.mp4"):
        judge_mme(*files, options_of(server, tmp_path), step_model="agent")


# ------------------------------------------------------------------------------------ command line


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = emocache.main(["judge", *argv])
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def flags(server: ChatServer) -> list[str]:
    return ["--endpoint", server.base_url, "--model", "judge"]


def test_emer_from_the_command_line(
    server: ChatServer, tmp_path: Path, emer: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["emer", str(emer[0]), "--references", str(emer[1]), *flags(server), "--repeats", "2"]
    code, out, _ = run(*given, "--json", "--name", "ours", capsys=capsys)
    assert code == 0
    told = json.loads(out)
    assert told["clue"]["mean"] == pytest.approx(statistics.mean(CLUES) + 0.5)
    assert told["judge"]["versions"] == ["judge-0001"]
    assert (told["name"], told["repeats"], told["clue"]["n"]) == ("ours", 2, 3)
    kept = read_judged(tmp_path / "judged" / "emer.json")
    assert kept.model_dump(mode="json") == told
    n = server.n_requests
    code, out, _ = run(*given, capsys=capsys)
    assert (code, server.n_requests) == (0, n)
    assert "5.17" in out
    assert "3 / 3" in out
    server.answer = lambda body: "no number here"
    code, _, err = run(*given, "--out", str(tmp_path / "other"), capsys=capsys)
    assert code == 1
    assert "6 x emer-clue: no number" in err


def test_mme_emotion_from_the_command_line(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies, samples = mme_files(tmp_path)
    given = ["mme-emotion", str(replies), "--samples", str(samples), *flags(server)]
    code, out, err = run(*given, "--step-model", "agent", "--alpha", "1", capsys=capsys)
    assert code == 0, err
    rec = 100 * statistics.mean(m[-1] for m in MARKS.values())
    assert out.count(f"{rec:.2f}") >= 2  # Rec-S, and CoT-S with alpha 1
    assert "The judge saw no pictures" in err
    assert (tmp_path / "judged" / "mme-emotion.json").is_file()
    code, _, err = run(*given, capsys=capsys)
    assert code == 2
    assert "gpt-4.1" in err


def test_lexical_from_the_command_line(
    tmp_path: Path, emer: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(
        "lexical", str(emer[0]), "--references", str(emer[1]), "--json", capsys=capsys
    )
    assert code == 0
    # "clip 0 rate 7 answer words glad 4" and "reference 0": one word of eight and of two.
    assert json.loads(out)["precision"] == pytest.approx(
        (1 / 8 + overlap_of("clip 1 rate 2 answer words glad 8", "reference 1")
         + overlap_of("clip 2 rate 5 answer words glad 6", "reference 2")) / 3
    )  # fmt: skip


def overlap_of(a: str, b: str) -> float:
    return len(set(a.split()) & set(b.split())) / len(a.split())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--temperature", "hot"], "neither a number"),
        (["--temperature", "3"], "temperature"),
        (["--retry", "refuse"], "Did you mean 'refused'"),
        (["--prompts", "absent"], "no such folder"),
        (["--endpoint", "127.0.0.1"], "begins with http"),
        (["--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set"),
        (["--endpoint", "https://api.example.invalid/v1"], "OPENAI_API_KEY is not set"),
        (["--model", "gpt"], "lists ['judge', 'agent']"),
        (["--references", "absent.jsonl"], "cannot be read"),
        (["--deadline", "soon"], "not a duration"),
    ],
)
def test_what_is_refused(
    server: ChatServer,
    emer: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    words: str,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    given = ["emer", str(emer[0]), "--references", str(emer[1]), *flags(server), *more]
    code, out, err = run(*given, capsys=capsys)
    assert (code, out) == (2, "")
    assert words in err


def test_the_reports_side_needs_no_endpoint_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, eval.judging.results; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'openai', 'jinja2', 'av')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_documented_samples_are_read(tmp_path: Path) -> None:
    text = (Path(emocache.__file__).parent / "docs" / "judging.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in re.findall(r"^    (\{.*\})$", text, re.M)]
    found = read_samples(jsonl(tmp_path / "s.jsonl", rows))
    assert [(s.id, s.kind.id, len(s.truths)) for s in found] == [
        ("a", "er-wild", 1),
        ("b", "ml-er", 2),
    ]
    assert all(f"`{task}`" in text for task in MME_TASKS)
    assert all(f"`{role}`" in text for role in ROLES)
