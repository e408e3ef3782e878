"""Kinds of failure as a store keeps them, and the brake on an extraction in which most clips fail."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from cache.errors import EmocacheError, ExtractionStopped
from cache.schema import decode_json
from extract.failures import TRANSIENT, Evidence, Failure, FailureKind, FailureRate, kind_of

KINDS: tuple[FailureKind, ...] = get_args(FailureKind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_reason_tells_its_kind(kind: FailureKind) -> None:
    failure = Failure(kind, "a/b.mp4: hang: memory: crash")
    assert failure.reason == f"{kind}: a/b.mp4: hang: memory: crash"
    assert kind_of(failure.reason) == kind


@pytest.mark.parametrize(
    "reason",
    [
        None,
        "",
        "hang",
        "hang:no blank",
        " hang: a blank first",
        "x/hang.mp4: cannot be opened as media",
        "unexpected TypeError: from before there were kinds",
        "nonsense: x",
    ],
)
def test_other_reasons_are_undecodable(reason: str | None) -> None:
    assert kind_of(reason) == "undecodable"


def test_what_may_pass() -> None:
    assert set(KINDS) - TRANSIENT == {"changed", "undecodable", "numeric", "unexpected"}


def test_evidence_survives_json() -> None:
    evidence = Evidence(
        key="ab" * 32,
        uid="c/1",
        media="c/1.mp4",
        kind="crash",
        message="it died",
        attempts=2,
        exit_signal="SIGSEGV",
        stderr_tail="Fatal Python error",
        facts={"container": "wav", "streams": [{"type": "audio"}]},
        host="node1",
        worker_id="node1-7-ab",
        time="2024-01-01T00:00:00Z",
    )
    assert decode_json(Evidence, evidence.model_dump_json(), "evidence") == evidence


def feed(rate: FailureRate, *kinds: Any) -> None:
    for number, kind in enumerate(kinds):
        rate.add(kind, f"clips/{number}.mp4")


def test_a_folder_that_is_not_there_stops_after_32_clips() -> None:
    rate = FailureRate()
    feed(rate, *["missing"] * 31)
    with pytest.raises(
        ExtractionStopped,
        match=r"^32 of the last 32 media files are not there, for example clips/0\.mp4\. "
        r"Is the disk mounted\?.*--media-root",
    ):
        rate.add("missing", "clips/31.mp4")
    assert issubclass(ExtractionStopped, EmocacheError)


def test_half_is_borne_and_one_more_is_not() -> None:
    rate = FailureRate()
    feed(rate, *[None, "undecodable"] * 200)
    with pytest.raises(ExtractionStopped, match=r"^33 of the last 64 media files do not decode"):
        rate.add("undecodable")


def test_only_the_latest_clips_count() -> None:
    rate = FailureRate()
    for _ in range(10):  # 310 failures in all, never 32 among 64
        feed(rate, *["hang"] * 31, *[None] * 33)


def test_a_long_good_run_does_not_excuse_what_follows() -> None:
    rate = FailureRate()
    feed(rate, *[None] * 10_000, *["crash"] * 32)
    with pytest.raises(ExtractionStopped, match=r"^33 of the last 64.*killed the process"):
        rate.add("crash")


def test_the_prevailing_kind_is_named() -> None:
    rate = FailureRate()
    with pytest.raises(
        ExtractionStopped,
        match=r"^20 of the last 32 media files cannot be read, for example clips/12\.mp4; "
        r"12 more failed in other ways\. Check the disk",
    ):
        feed(rate, *["hang"] * 12, *["unreadable"] * 20)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_cure(kind: FailureKind) -> None:
    rate = FailureRate(window=4, least=2)
    with pytest.raises(ExtractionStopped, match=r"^2 of the last 2 .*\. .*[.?] Then run the same"):
        feed(rate, kind, kind)


def test_the_share_is_the_users_to_choose() -> None:
    feed(FailureRate(1.0), *["undecodable"] * 500)
    with pytest.raises(ExtractionStopped, match=r"^7 of the last 64"):
        feed(FailureRate(0.1, least=1), *[None] * 60, *["undecodable"] * 10)
