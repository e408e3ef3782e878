"""Estimates and reports of an annotation, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from extract.annotate.endpoints.costs import Assumptions, Price, RoleWork, Tally, estimate

EXACT = Assumptions(
    bytes_per_token=4.0,
    image_tokens=1000.0,
    audio_tokens_per_s=25.0,
    template_tokens=0.0,
    request_s=3.0,
    in_flight=10,
    retried_share=0.0,
)


def test_an_estimate_by_hand() -> None:
    work = [
        RoleWork(
            role="visual_objective",
            n_clips=1000,
            n_cached=200,
            prompt_bytes=800,
            images=1,
            answer_tokens=100,
            price=Price(tokens_in=2.0, tokens_out=10.0),
        ),
        RoleWork(role="audio_tone", n_clips=400, prompt_bytes=400, audio_s=4, answer_tokens=50),
    ]
    found = estimate(work, EXACT)
    visual, audio = found.roles
    # 800 requests of 800 / 4 + 1000 tokens; 800 x 3 s with 10 in flight are 240 s
    assert (visual.requests, visual.tokens_in, visual.tokens_out) == (800, 960_000, 80_000)
    assert visual.hours == pytest.approx(240 / 3600)
    assert visual.cost == pytest.approx(0.96 * 2 + 0.08 * 10)
    # 400 requests of 400 / 4 + 4 x 25 tokens
    assert (audio.requests, audio.tokens_in, audio.tokens_out) == (400, 80_000, 20_000)
    assert audio.cost is None
    assert (found.requests, found.tokens_in, found.tokens_out) == (1200, 1_040_000, 100_000)
    assert found.cost is None  # one role has no price
    assert found.hours == pytest.approx(360 / 3600)
    assert found.bound_by == "in flight"
    assert estimate(work[:1], EXACT).cost == pytest.approx(2.72)


def test_rate_limits_set_the_time_where_they_are_slower() -> None:
    work = [RoleWork(role="consolidate", n_clips=600, prompt_bytes=4000, answer_tokens=200)]
    free = estimate(work, EXACT)
    assert free.hours == pytest.approx(180 / 3600)
    by_requests = estimate(work, EXACT, requests_per_minute=60)
    assert (by_requests.hours, by_requests.bound_by) == (
        pytest.approx(600 / 3600),
        "requests per minute",
    )
    by_tokens = estimate(work, EXACT, requests_per_minute=60, tokens_per_minute=36_000)
    assert by_tokens.hours == pytest.approx(20 / 60)  # 600 x 1200 tokens
    assert by_tokens.bound_by == "tokens per minute"
    retried = EXACT.model_copy(update={"retried_share": 0.5})
    assert estimate(work, retried).requests == 900
    assert estimate([], EXACT).requests == 0
    done = RoleWork(role="x", n_clips=5, n_cached=9, prompt_bytes=1)
    assert estimate([done], EXACT).requests == 0


def test_a_report_adds_up() -> None:
    tally = Tally()
    for role, n in (("b", 3), ("a", 2)):
        counts = tally.of(role)
        counts.questions = counts.requests = n
        counts.tokens_in, counts.tokens_out = 1000 * n, 100 * n
        counts.outcomes["ok"] = n
    tally.retried["429"] += 2
    report = tally.report({"a": Price(tokens_in=1.0, tokens_out=2.0)}, uncounted=1)
    assert [role.role for role in report.roles] == ["a", "b"]
    assert (report.questions, report.requests, report.outcomes) == (5, 5, {"ok": 5})
    assert (report.tokens_in, report.tokens_out, report.uncounted) == (5000, 500, 1)
    assert report.retried == {"429": 2}
    assert report.roles[0].cost == pytest.approx(0.0024)
    assert report.cost is None
    both = tally.report({name: Price(tokens_in=1.0, tokens_out=2.0) for name in "ab"})
    assert both.cost == pytest.approx(0.006)
    assert type(report).model_validate(report.model_dump()) == report
