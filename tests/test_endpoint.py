"""Asking an endpoint: in flight, retried, capped, stopped, kept; against a real server on loopback."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache.errors import SchemaError
from extract.annotate.endpoints.answers import Answer, AnswerCache
from extract.annotate.endpoints.budget import Budget, BudgetError, Caps, TokenRates
from extract.annotate.endpoints.endpoint import EndpointClient, Failure
from extract.annotate.endpoints.questions import MediaPart, Question, Sampling
from extract.annotate.endpoints.schedule import (
    RateWindow,
    RetryPolicy,
    Streak,
    duration_s,
    exhausted_wait_s,
    told_wait_s,
)
from extract.annotate.endpoints.transport import (
    EndpointDownError,
    EndpointError,
    EndpointOptions,
    OutOfQuotaError,
    UnauthorisedError,
    UnknownModelError,
)
from tests.chat_server import ChatServer, Kind, chat_server, content_key, default_answer

SCHEMA = {
    "type": "object",
    "properties": {"description": {"type": "string"}},
    "required": ["description"],
    "additionalProperties": False,
}
ROOT = Path(__file__).resolve().parents[1]
QUICK = RetryPolicy(base_s=0.02, patience_s=0.0, attempts=4)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as running:
        yield running


def asking(i: int | str, **changes: Any) -> Question:
    fields: dict[str, Any] = {
        "role": "consolidate",
        "model": "tiny",
        "prompt_id": "p@1",
        "text": f"What does clip {i}. show?",
        "sampling": Sampling(max_tokens=64),
    }
    return Question(**fields | changes)


def client_of(
    server: ChatServer | str, answers: AnswerCache | None = None, **changes: Any
) -> EndpointClient:
    url = server if isinstance(server, str) else server.base_url
    fields = {"base_url": url, "api_key_env": "none", "retry": QUICK, "in_flight": 4, "stop_s": 2.0}
    return EndpointClient(EndpointOptions(**fields | changes), answers)


def answer_of(client: EndpointClient, question: Question, **options: Any) -> Answer:
    answer = client.ask(question, **options)
    assert isinstance(answer, Answer), answer
    return answer


def test_a_picture_and_a_sound_arrive_as_the_api_has_them(server: ChatServer) -> None:
    media = (MediaPart.of("image/jpeg", b"\xff\xd8 jpeg"), MediaPart.of("audio/wav", b"RIFF", 1.0))
    question = asking(1, media=media, system="Be brief.", answer_schema=SCHEMA)
    with client_of(server) as client:
        answer = answer_of(client, question)
    ((_, body, _),) = server.requests
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,/9gganBlZw=="}},
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
                {"type": "text", "text": question.text},
            ],
        },
    ]
    assert body["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "consolidate", "schema": SCHEMA, "strict": True},
    }
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0.0, 0, 64)
    assert answer.value() == json.loads(default_answer(body))
    assert answer.model == "tiny-0001"
    assert answer.prompt_tokens == len(b"Be brief.\n" + question.text.encode()) // 4 + 2 * 85
    assert answer.completion_tokens == len(answer.text.split())


def test_n_requests_are_in_flight_and_few_are_drawn_ahead(server: ChatServer) -> None:
    server.latency_s = 0.05
    drawn, most_ahead, seen = 0, 0, 0

    def questions() -> Iterator[Question]:
        nonlocal drawn, most_ahead
        for i in range(80):
            drawn += 1
            most_ahead = max(most_ahead, drawn - seen)
            yield asking(i)

    with client_of(server, in_flight=8) as client:
        start = time.monotonic()
        for _, answer in client.ask_all(questions()):
            assert answer.ok
            seen += 1
        took = time.monotonic() - start
        assert client.report().peak_in_flight == 8
    assert seen == 80
    assert server.peak == 8
    assert most_ahead <= 2 * 8 + 1
    assert took < 80 * 0.05 / 2


def test_equal_questions_are_asked_once_and_a_second_run_asks_nothing(
    server: ChatServer, tmp_path: Path
) -> None:
    server.latency_s = 0.02
    questions = [asking(i % 10, tag=i) for i in range(40)]
    with client_of(server, AnswerCache(tmp_path)) as client:
        first = list(client.ask_all(questions))
        report = client.report()
    assert sorted(q.tag for q, _ in first) == list(range(40))
    assert server.n_requests == 10
    assert report.shared + report.cached == 30
    assert (report.questions, report.requests, report.outcomes) == (40, 10, {"ok": 40})
    with client_of("http://127.0.0.1:9/v1", AnswerCache(tmp_path)) as client:  # no one listens
        again = list(client.ask_all(questions))
        assert client.report().requests == 0
    assert {q.tag: a for q, a in again} == {q.tag: a for q, a in first}


PASSING: list[tuple[Kind, str]] = [
    ("429", "429"),
    ("500", "500"),
    ("503", "503"),
    ("cut", "connection"),
    ("cut body", "connection"),
    ("bad json", "broken reply"),
    ("no choices", "broken reply"),
    ("slow", "timeout"),
]


@pytest.mark.fault("endpoint fails for a while")
@pytest.mark.parametrize(("kind", "reason"), PASSING)
def test_what_passes_is_tried_again_and_counted(
    server: ChatServer, tmp_path: Path, kind: Kind, reason: str
) -> None:
    server.fail(kind, match="clip 3.", times=2, delay_s=1.0)
    with client_of(server, AnswerCache(tmp_path), deadline_s=0.25) as client:
        answers = {q.text: a for q, a in client.ask_all(asking(i) for i in range(8))}
        report = client.report()
    assert all(a.ok for a in answers.values())
    hit = answers[asking(3).text]
    assert isinstance(hit, Answer)
    assert hit.attempts == 3
    assert report.retried == {reason: 2}
    assert report.requests == server.n_requests == 10
    assert not report.failures


@pytest.mark.fault("endpoint fails for one question")
def test_a_question_that_fails_for_good_is_told_and_asked_again_next_time(
    server: ChatServer, tmp_path: Path
) -> None:
    server.fail("500", match="clip 3.")
    with client_of(server, AnswerCache(tmp_path)) as client:
        found = {q.text: a for q, a in client.ask_all(asking(i) for i in range(8))}
        assert client.report().failures == {"500": 1}
    failed = found[asking(3).text]
    assert isinstance(failed, Failure)
    assert (failed.kind, failed.attempts) == ("500", QUICK.attempts)
    server.calm()
    with client_of(server, AnswerCache(tmp_path)) as client:
        assert all(a.ok for _, a in client.ask_all(asking(i) for i in range(8)))
        assert client.report().requests == 1


@pytest.mark.fault("429 with Retry-After")
def test_retry_after_holds_for_all_requests(server: ChatServer) -> None:
    server.fail("429", times=1, retry_after_s=0.5)
    with client_of(server, in_flight=1) as client:
        assert all(a.ok for _, a in client.ask_all(asking(i) for i in range(3)))
    times = [moment for moment, _, _ in server.requests]
    assert times[1] - times[0] >= 0.5
    assert times[3] - times[1] < 0.5


def test_headers_that_say_nothing_is_left_are_heeded(server: ChatServer) -> None:
    server.fail("remaining", times=1, retry_after_s=0.5)
    with client_of(server, in_flight=1) as client:
        list(client.ask_all(asking(i) for i in range(2)))
    times = [moment for moment, _, _ in server.requests]
    assert times[1] - times[0] >= 0.45


OUTCOMES: list[tuple[Kind, str]] = [
    ("refusal", "refused"),
    ("spoken refusal", "refused"),
    ("filtered", "refused"),
    ("content filter", "refused"),
    ("empty", "empty"),
    ("length", "truncated"),
    ("wrong schema", "invalid"),
    ("prose", "invalid"),
]


@pytest.mark.fault("answer of no use")
@pytest.mark.parametrize(("kind", "outcome"), OUTCOMES)
def test_answers_of_no_use_are_recorded_and_asked_again_only_on_demand(
    server: ChatServer, tmp_path: Path, kind: Kind, outcome: str
) -> None:
    question = asking(1, answer_schema=SCHEMA)
    server.fail(kind)
    with client_of(server, AnswerCache(tmp_path)) as client:
        first = answer_of(client, question)
        assert first.outcome == outcome
        assert first.reason
        assert not first.ok
        assert answer_of(client, question) == first
        assert server.n_requests == 1
        assert answer_of(client, question, retry=["all"]).outcome == outcome
        assert server.n_requests == 2
    server.calm()
    other = "empty" if outcome != "empty" else "refused"
    with client_of(server, AnswerCache(tmp_path)) as client:
        assert answer_of(client, question, retry=[other]).outcome == outcome
        assert answer_of(client, question, retry=[outcome]).ok
        assert answer_of(client, question, retry=["all"]).ok
        assert client.report().requests == 1
        with pytest.raises(SchemaError, match="Did you mean 'refused'"):
            client.ask(question, retry=["refuse"])


@pytest.mark.fault("wrong schema")
def test_a_model_may_correct_an_answer_that_does_not_fit(server: ChatServer) -> None:
    server.fail("prose", times=1)
    with client_of(server, repairs=1) as client:
        answer = answer_of(client, asking(1, answer_schema=SCHEMA))
        report = client.report()
    assert answer.ok
    assert answer.repaired
    assert (answer.attempts, report.repairs, report.requests) == (2, 1, 2)
    second = server.requests[1][1]["messages"]
    assert [m["role"] for m in second] == ["user", "assistant", "user"]
    assert "no JSON" in second[2]["content"]
    assert report.tokens_in == answer.prompt_tokens


@pytest.mark.fault("parameter refused")
def test_a_server_without_response_format_is_asked_in_words(
    server: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail("no response_format")
    server.fail("no max_tokens")
    server.latency_s = 0.02
    questions = [
        asking(i, answer_schema=SCHEMA, text=f"Clip {i}: JSON, please.") for i in range(20)
    ]
    server.answer = lambda body: '```json\n{"description": "She smiles."}\n```'
    with caplog.at_level(logging.WARNING), client_of(server) as client:
        answers = [a for _, a in client.ask_all(questions)]
        report = client.report()
    assert all(isinstance(a, Answer) and a.ok and a.unenforced for a in answers)
    last = server.requests[-1][1]
    assert "response_format" not in last
    assert last["messages"][0]["content"].endswith(json.dumps(SCHEMA, sort_keys=True))
    assert len(report.notes) == 1
    assert sum("response_format" in r.message for r in caplog.records) == 1
    assert report.requests <= 20 + 4  # only those in flight at the time were sent twice
    assert not report.retried


def test_a_server_that_wants_max_completion_tokens_gets_it(server: ChatServer) -> None:
    server.fail("no max_tokens")
    with client_of(server) as client:
        assert answer_of(client, asking(1)).ok
    assert server.requests[-1][1]["max_completion_tokens"] == 64
    assert "max_tokens" not in server.requests[-1][1]


ENDING: list[tuple[Kind, type[EndpointError], str]] = [
    ("401", UnauthorisedError, "api_key_env"),
    ("403", UnauthorisedError, "api_key_env"),
    ("404", UnknownModelError, r"lists \['tiny'\]"),
    ("quota", OutOfQuotaError, "out of quota"),
]


@pytest.mark.fault("endpoint refuses for good")
@pytest.mark.parametrize(("kind", "error", "words"), ENDING)
def test_what_will_not_pass_ends_the_run_and_keeps_what_was_answered(
    server: ChatServer, tmp_path: Path, kind: Kind, error: type[EndpointError], words: str
) -> None:
    fault = server.fail("500", match="nothing has this text")
    seen: list[str] = []

    def work() -> None:
        with client_of(server, AnswerCache(tmp_path)) as client:
            for question, answer in client.ask_all(asking(i) for i in range(1000)):
                assert answer.ok
                seen.append(question.key)
                if len(seen) == 10:
                    fault.match, fault.kind = "", kind

    with pytest.raises(error, match=words) as raised:
        work()
    assert server.base_url in str(raised.value)
    assert "'tiny'" in str(raised.value)
    assert len(seen) >= 10
    assert server.n_requests < 60
    kept = AnswerCache(tmp_path)
    assert all(key in kept for key in seen)


def test_an_unknown_model_is_named_with_its_near_miss(server: ChatServer) -> None:
    with client_of(server) as client, pytest.raises(UnknownModelError, match="Did you mean 'tiny'"):
        client.ask(asking(1, model="tyni"))


@pytest.mark.fault("nothing listens")
def test_an_endpoint_that_is_down_ends_the_run_soon() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    with client_of(url, retry=RetryPolicy(base_s=0.05)) as client:
        with pytest.raises(EndpointDownError, match="does not answer") as raised:
            list(client.ask_all(asking(i) for i in range(1000)))
        assert client.report().requests == 0  # none was sent
    assert url in str(raised.value)
    assert time.monotonic() - start < 5


@pytest.mark.fault("endpoint goes down in mid-run")
def test_failures_in_a_row_end_the_run_instead_of_burning_through_the_corpus(
    server: ChatServer, tmp_path: Path
) -> None:
    fault = server.fail("503", match="nothing has this text")

    def work() -> None:
        with client_of(server, AnswerCache(tmp_path)) as client:
            for n_seen, _ in enumerate(client.ask_all(asking(i) for i in range(1000))):
                if n_seen == 9:
                    fault.match = ""

    with pytest.raises(EndpointDownError):
        work()
    assert server.n_requests < 60
    assert len(AnswerCache(tmp_path)) >= 10


@pytest.mark.fault("endpoint is busy for ever")
def test_refusals_without_end_end_the_run_too(server: ChatServer) -> None:
    server.fail("429")
    quick = RetryPolicy(base_s=0.001, attempts=2)
    with client_of(server, retry=quick) as client, pytest.raises(EndpointError, match="Rate limit"):
        list(client.ask_all(asking(i) for i in range(1000)))
    assert server.n_requests < 40


@pytest.mark.fault("endpoint takes none of the questions")
def test_a_server_that_takes_no_question_ends_the_run(server: ChatServer) -> None:
    server.fail("too long", match="clip 3.")
    with client_of(server) as client:
        found = {q.text: a for q, a in client.ask_all(asking(i) for i in range(20))}
    failed = found.pop(asking(3).text)
    assert isinstance(failed, Failure)
    assert "too long" in failed.reason
    assert all(a.ok for a in found.values())
    server.fail("bad request")
    with client_of(server) as client, pytest.raises(EndpointError, match="bad request"):
        list(client.ask_all(asking(i) for i in range(1000)))
    assert server.n_requests < 60


@pytest.mark.parametrize("secret", ["sk-very-secret-0123456789", "another/kind.of+secret="])
def test_the_key_is_sent_and_shown_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("MY_KEY", f" {secret}\n")
    with chat_server(api_key=secret) as server, caplog.at_level(logging.DEBUG):
        with client_of(server, AnswerCache(tmp_path), api_key_env="MY_KEY") as client:
            assert answer_of(client, asking(1)).ok
            server.fail("echo key")
            with pytest.raises(UnauthorisedError) as raised:
                client.ask(asking(2))
            shown = (
                f"{raised.value} {raised.value!r} {client!r} {client.options!r} {client.report()!r}"
            )
        assert "MY_KEY" in str(raised.value)
        assert "[key]" in str(raised.value)
    kept = b"".join(p.read_bytes() for p in tmp_path.iterdir()).decode()
    for text in (shown, kept, caplog.text):
        assert secret not in text
    monkeypatch.setenv("MY_KEY", f"{secret}\x07")
    with pytest.raises(UnauthorisedError, match="printable") as refused:
        client_of("http://127.0.0.1:9/v1", api_key_env="MY_KEY")
    assert secret not in str(refused.value)
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(UnauthorisedError, match="MY_KEY is not set"):
        client_of("http://127.0.0.1:9/v1", api_key_env="MY_KEY")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "http://user:pass@host/v1",
        "http://host/v1?key=abc",
        "http://host/v1#x",
    ],
)
def test_base_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValidationError, match="base URL"):
        EndpointOptions(base_url=url)


def test_a_cap_on_requests_is_met_exactly_and_the_next_run_goes_on(
    server: ChatServer, tmp_path: Path
) -> None:
    server.latency_s = 0.01
    server.fail("500", every=5)
    for run in range(1, 4):
        seen = []
        with client_of(
            server, AnswerCache(tmp_path), in_flight=8, caps=Caps(requests=20)
        ) as client:
            with pytest.raises(BudgetError, match="cap of 20 requests"):
                seen += [a.ok for _, a in client.ask_all(asking(i) for i in range(100))]
            assert client.report().requests == 20
        assert server.n_requests == 20 * run
        assert len(AnswerCache(tmp_path)) == 16 * run  # every fifth request failed
    assert max(Counter(server.asked).values()) <= 3


def test_a_cap_on_tokens_holds_with_many_in_flight(server: ChatServer, tmp_path: Path) -> None:
    server.latency_s = 0.01
    cap = 4000
    with client_of(server, AnswerCache(tmp_path), in_flight=16, caps=Caps(tokens=cap)) as client:
        with pytest.raises(BudgetError, match="cap of 4,000 tokens"):
            list(client.ask_all(asking(i) for i in range(1000)))
        report = client.report()
    told = [
        len(body["messages"][0]["content"].encode()) // 4 + len(default_answer(body).split())
        for _, body, _ in server.requests
    ]
    assert sum(told) == report.tokens_in + report.tokens_out <= cap
    # It waits for what is in flight rather than give up early: no worst case was left over.
    assert cap - sum(told) < TokenRates().worst(asking(999)) + max(told)
    assert len(AnswerCache(tmp_path)) == len(told)


def test_what_a_budget_paid_for_is_waited_for(server: ChatServer, tmp_path: Path) -> None:
    server.latency_s = 0.3
    with client_of(server, AnswerCache(tmp_path), caps=Caps(requests=6), stop_s=0.0) as client:
        with pytest.raises(BudgetError):
            list(client.ask_all(asking(i) for i in range(50)))
    assert len(AnswerCache(tmp_path)) == server.n_requests == 6


@pytest.mark.fault("usage missing")
def test_requests_that_nobody_counted_are_charged_in_full(server: ChatServer) -> None:
    server.fail("no usage", times=1)
    server.fail("cut", times=1)
    with client_of(server, in_flight=1, caps=Caps(tokens=100_000)) as client:
        list(client.ask_all(asking(i) for i in range(3)))
        report = client.report()
        assert client.sender().budget.tokens == (
            report.tokens_in + report.tokens_out + 2 * TokenRates().worst(asking(1))
        )
    assert report.uncounted == 2


@pytest.mark.fault("server counts more than was stated")
def test_a_server_that_counts_more_than_stated_is_believed(server: ChatServer) -> None:
    budget = Budget(Caps(tokens=1000))

    async def spend() -> None:
        first = await budget.reserve(100)
        budget.settle(first, 300)
        second = await budget.reserve(100)
        assert second.tokens == 300
        assert budget.overrun_tokens == 200
        budget.settle(second, None, sent=False)
        assert (budget.requests, budget.tokens) == (1, 300)
        with pytest.raises(BudgetError):  # 300 are used: 3 x 300 more do not fit
            await budget.reserve(300)

    import asyncio

    asyncio.run(spend())


def test_requests_per_minute_hold(server: ChatServer) -> None:
    with client_of(server, requests_per_minute=5) as client:
        answers = client.ask_all(asking(i) for i in range(50))
        for _ in range(5):
            assert next(answers)[1].ok
        time.sleep(0.3)
        assert server.n_requests == 5
        answers.close()  # type: ignore[attr-defined]
        assert client.report().requests == 5


def test_tokens_per_minute_hold_and_are_corrected_by_what_was_used(server: ChatServer) -> None:
    rates = TokenRates(template_tokens=0)
    expected = rates.expected(asking(10))
    # Room for two as expected; an answer takes less than the most it may, so that more fit in the end.
    limit = 2 * expected
    with client_of(server, in_flight=1, tokens_per_minute=limit, rates=rates) as client:
        answers = client.ask_all(asking(i) for i in range(10, 60))
        used = []
        while sum(used) + expected <= limit:
            answer = next(answers)[1]
            assert isinstance(answer, Answer)
            assert answer.prompt_tokens is not None
            assert answer.completion_tokens is not None
            used.append(answer.prompt_tokens + answer.completion_tokens)
        time.sleep(0.2)
        assert server.n_requests == len(used) > 2
        answers.close()  # type: ignore[attr-defined]


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 30), st.integers(0, 30)), max_size=60),
)
def test_no_window_of_time_holds_more_than_its_limit(
    limit: int, asked: list[tuple[float, int, int]]
) -> None:
    now = 0.0
    window = RateWindow(limit, 10.0, clock=lambda: now)
    taken: list[list[float]] = []
    for pause, units, used in asked:
        now += pause
        while True:
            wait_s, entry = window.try_take(units)
            if entry is not None:
                break
            assert wait_s > 0
            now += wait_s
        used = min(used, units)
        window.settle(entry, used)
        taken.append([now, used])
        recent = [n for moment, n in taken if moment > now - 10.0]
        assert sum(recent) <= limit or len(recent) == 1 or sum(recent[:-1]) == 0


def test_waits_that_servers_ask_for() -> None:
    from datetime import UTC, datetime

    now = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
    assert told_wait_s({"retry-after": "3"}) == 3.0
    assert told_wait_s({"retry-after-ms": "250", "retry-after": "3"}) == 0.25
    assert told_wait_s({"retry-after": "Sun, 01 Mar 2026 12:00:07 GMT"}, now) == 7.0
    assert told_wait_s({"retry-after": "Sun, 01 Mar 2026 11:00:00 GMT"}, now) == 0.0
    assert told_wait_s({"retry-after": "soon"}) is None
    assert told_wait_s({"retry-after": "-1"}) is None
    assert told_wait_s({}) is None
    assert [duration_s(t) for t in ("6m0s", "120ms", "1.5", "1h2m", "x", None, "6m0")] == [
        360.0,
        0.12,
        1.5,
        3720.0,
        None,
        None,
        None,
    ]
    left = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "2s"}
    assert exhausted_wait_s(left) == 2.0
    assert exhausted_wait_s(left | {"x-ratelimit-remaining-requests": "1"}) is None


def test_backoff_doubles_up_to_its_limit_with_full_jitter() -> None:
    policy = RetryPolicy(base_s=0.5, longest_s=3.0)
    assert [policy.wait_s(n, lambda: 1.0) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert policy.wait_s(400, lambda: 0.0) == 0.0


def test_a_server_that_has_answered_gets_time_to_come_back() -> None:
    now = 0.0
    streak = Streak(3, 60.0, clock=lambda: now)
    assert [streak.bad() for _ in range(3)] == [False, False, True]
    streak.good()
    assert [streak.bad() for _ in range(5)] == [False] * 5
    now = 60.0
    assert streak.bad()


def test_questions_may_depend_on_answers(server: ChatServer) -> None:
    ready = [asking(f"{i} first") for i in range(6)]

    def questions() -> Iterator[Question | None]:
        n_given = 0
        while n_given < 12:
            if ready:
                n_given += 1
                yield ready.pop()
            else:
                yield None

    seen = Counter[str]()
    with client_of(server) as client:
        for question, answer in client.ask_all(questions()):
            assert isinstance(answer, Answer)
            stage = "second" if "second" in question.text else "first"
            seen[stage] += 1
            if stage == "first":
                ready.append(asking(f"{question.text} second: {answer.text}"))
    assert seen == {"first": 6, "second": 6}
    with client_of(server) as client, pytest.raises(RuntimeError, match="none is on its way"):
        list(client.ask_all([None]))


def test_an_answer_is_kept_before_anybody_sees_it(server: ChatServer, tmp_path: Path) -> None:
    with client_of(server, AnswerCache(tmp_path)) as client:
        for question, answer in client.ask_all(asking(i) for i in range(40)):
            assert AnswerCache(tmp_path).get(question.key) == answer


def test_leaving_early_stops_and_the_client_can_be_used_again(
    server: ChatServer, tmp_path: Path
) -> None:
    server.latency_s = 0.05
    answers = AnswerCache(tmp_path)
    with client_of(server, answers) as client:
        for n_seen, _ in enumerate(client.ask_all(asking(i) for i in range(1000))):
            if n_seen == 5:
                break
        n_sent = server.n_requests
        assert server.in_flight == 0  # what was on its way has ended when the loop is left
        time.sleep(0.2)
        assert server.n_requests == n_sent < 30
        assert len(answers) == n_sent  # those in flight were kept
        assert answer_of(client, asking("other")).ok
    with client_of(server) as client:
        running = client.ask_all(asking(i) for i in range(10))
        next(running)
        with pytest.raises(RuntimeError, match="one run"):
            client.ask(asking(1))
        running.close()  # type: ignore[attr-defined]
    assert "emocache-endpoint" not in {t.name for t in threading.enumerate()}


def test_an_error_of_the_asker_passes_through_and_keeps_what_was_asked(
    server: ChatServer, tmp_path: Path
) -> None:
    def questions() -> Iterator[Question]:
        yield from (asking(i) for i in range(3))
        raise ZeroDivisionError

    with client_of(server, AnswerCache(tmp_path)) as client:
        with pytest.raises(ZeroDivisionError):
            list(client.ask_all(questions()))
    assert len(AnswerCache(tmp_path)) == server.n_requests == 3


@pytest.mark.fault("media changed or gone")
def test_media_that_changed_or_vanished_fail_alone(server: ChatServer) -> None:
    def gone() -> bytes:
        raise FileNotFoundError("clip.wav")

    media: list[Callable[[], bytes]] = [lambda: b"other bytes", gone]
    questions = [
        asking(i, media=(MediaPart("audio/wav", "0" * 64, m),)) for i, m in enumerate(media)
    ]
    with client_of(server) as client:
        found = {q.text: a for q, a in client.ask_all([*questions, asking(5)])}
        assert client.report().failures == {"media": 2}
    assert found[asking(5).text].ok
    first = found[questions[0].text]
    assert isinstance(first, Failure)
    assert "changed" in first.reason
    assert server.n_requests == 1


@pytest.mark.fault("disk full")
def test_answers_that_cannot_be_kept_end_the_run(
    server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from extract.annotate.endpoints.answers import AnswersError

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with client_of(server, AnswerCache(tmp_path / "a")) as client:
        with pytest.raises(AnswersError, match="No space left"):
            list(client.ask_all(asking(i) for i in range(500)))
    assert server.n_requests < 100


_ASKER = """
import signal
import sys
from extract.annotate.endpoints.answers import AnswerCache
from extract.annotate.endpoints.endpoint import EndpointClient
from extract.annotate.endpoints.questions import Question
from extract.annotate.endpoints.transport import EndpointOptions
url, folder, stop_s, n = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
options = EndpointOptions(base_url=url, api_key_env="none", in_flight=8, stop_s=float(stop_s))
questions = (Question("r", "tiny", "p@1", f"What does clip {i}. show?") for i in range(int(n)))
with EndpointClient(options, AnswerCache(folder)) as client:
    for question, answer in client.ask_all(questions):
        print(question.key, flush=True)
"""


def start_asker(
    server: ChatServer, folder: Path, stop_s: float = 2.0, n: int = 400
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _ASKER, server.base_url, str(folder), str(stop_s), str(n)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_keys(process: subprocess.Popen[str], n: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(n)]


@pytest.mark.fault("kill -9 of an asking process")
def test_a_kill_loses_no_answer_that_was_seen(server: ChatServer, tmp_path: Path) -> None:
    server.latency_s = 0.01
    seen: list[str] = []
    for n_first in (40, 90):
        process = start_asker(server, tmp_path)
        with process:
            seen += read_keys(process, n_first)
            process.kill()
            assert process.stdout is not None
            seen += [line.strip() for line in process.stdout if len(line) == 65]
    kept = AnswerCache(tmp_path)
    assert all(kept.get(key) is not None for key in seen)
    with start_asker(server, tmp_path) as process:
        rest, _ = process.communicate(timeout=60)
    assert len(rest.split()) == 400
    # Only what was in flight at a kill was asked twice.
    assert server.n_requests <= 400 + 2 * 8
    assert len(server.asked) == 400


@pytest.mark.fault("Ctrl-C in mid-run")
def test_ctrl_c_keeps_what_is_in_flight_or_gives_it_up_in_time(
    server: ChatServer, tmp_path: Path
) -> None:
    server.latency_s = 0.05
    process = start_asker(server, tmp_path, n=10_000)
    with process:
        read_keys(process, 20)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert "KeyboardInterrupt" in errors
    assert len(AnswerCache(tmp_path)) == server.n_requests  # all in flight were let finish
    server.fail("slow", delay_s=30.0)
    with start_asker(server, tmp_path, stop_s=0.5, n=10_000) as process:
        assert process.stdout is not None
        read_keys(process, 20)
        deadline = time.monotonic() + 10
        while server.in_flight < 8 and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert time.monotonic() - start < 5


def test_processes_share_a_cache(server: ChatServer, tmp_path: Path) -> None:
    server.latency_s = 0.01
    with contextlib.ExitStack() as stack:
        askers = [stack.enter_context(start_asker(server, tmp_path)) for _ in range(2)]
        counts = [len(p.communicate(timeout=60)[0].split()) for p in askers]
    assert counts == [400, 400]
    assert len(AnswerCache(tmp_path)) == 400
    n_before = server.n_requests
    with start_asker(server, tmp_path) as process:
        assert len(process.communicate(timeout=60)[0].split()) == 400
    assert server.n_requests == n_before


def test_the_server_counts_by_content(server: ChatServer) -> None:
    with client_of(server) as client:
        client.ask(asking(1))
        client.ask(asking(1))
    body = server.requests[0][1]
    assert server.asked[content_key(body)] == 2  # without a cache nothing is remembered
