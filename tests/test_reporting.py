"""From replies to what a report says, against scikit-learn, closed forms and hand calculations."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score

from cache.clip import Clip, Record
from cache.labels import LabelSpace
from eval.formats import p_value, signed_points, span
from eval.metrics import score_single_label
from eval.predictions import ClipFacts, Prediction
from eval.report.data import ReportData, ScoreRow
from eval.report.gather import Group, ScoredGroup, examples_of, explaining_task, score_group
from eval.report.page import write_report
from eval.results.examples import choice_of, choose_examples
from eval.scoring.intervals import Interval
from tests.conftest import key_of
from tests.media import write_clip
from tests.test_report import EVIL, Page
from train.config import Preset
from train.presets import v1, v2
from train.text.tasks import TASK_TABLE

LABELS = ("happy", "sad", EVIL)


def replies_of(
    labels: Sequence[str | None], truths: Sequence[str], *masked: str
) -> list[Prediction]:
    found = []
    for i, (label, truth) in enumerate(zip(labels, truths, strict=True)):
        likely = label or "happy"
        found.append(
            Prediction(
                uid=f"made/{i}", task="emotion", masked=masked, reply=label or "gloomy", label=label,
                parse="exact" if label else "off_list", truth=truth, run="r", spec_ids={},
                likelihoods={x: 0.8 if x == likely else 0.1 for x in LABELS},
                about=ClipFacts(
                    duration_s=1 + i / 10, language="en", absent=("audio",) if i % 3 == 0 else ()
                ),
            )
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def scored() -> ScoredGroup:
    rng = random.Random(4)
    truths = [rng.choice(LABELS) for _ in range(60)]
    masked = [rng.choice((*LABELS, None)) for _ in truths]
    conditions = {
        "all streams": replies_of(truths, truths),
        "audio masked": replies_of(masked, truths, "audio"),
    }
    elsewhere = [p.model_copy(update={"uid": f"other/{p.uid}"}) for p in conditions["all streams"]]
    group = Group(
        LabelSpace(name="emotion", labels=LABELS),
        "made",
        frozenset(p.uid for p in conditions["all streams"]),
    )
    given = {name: [*found, *elsewhere] for name, found in conditions.items()}
    return score_group(given, group, "emotion", several=False)


def test_scores_have_the_intervals_of_their_own_metrics(scored: ScoredGroup) -> None:
    full, masked = scored.rows
    assert (full.name, masked.name) == ("all streams", "audio masked")
    found = scored.replies["audio masked"]
    assert len(found) == 60, "another group's replies are not scored"
    truths, labels = [p.truth for p in found], [p.label or "none" for p in found]
    for name, value in (
        ("accuracy", accuracy_score(truths, labels)),
        ("weighted_f1", f1_score(truths, labels, labels=LABELS, average="weighted", zero_division=0)),
        ("uar", recall_score(truths, labels, labels=LABELS, average="macro", zero_division=0)),
    ):  # fmt: skip
        assert getattr(masked.scores, name) == pytest.approx(value)
        interval = masked.intervals[name]
        assert interval.low < value < interval.high
        # About 1.96 standard errors each way; of a share of 60 that is at most 0.13.
        assert 0.08 < interval.high - interval.low < 0.27
    assert full.change is None
    assert masked.change is not None
    assert masked.change.difference == pytest.approx(masked.scores.accuracy - 1)
    assert masked.change.n_worse == sum(a != b for a, b in zip(truths, labels, strict=True))
    assert masked.change.p_value < 0.001


def test_where_all_are_right_the_interval_is_the_binomial_one(scored: ScoredGroup) -> None:
    interval = scored.rows[0].intervals["accuracy"]
    # Clopper and Pearson for n of n: the lower end p has p^n = 0.025.
    assert (interval.low**60, interval.high) == (pytest.approx(0.025), 1.0)
    assert set(scored.rows[0].intervals) == {"accuracy"}
    for part in scored.rows[0].slices["missing"]:
        assert part.interval is not None
        assert part.interval.low**part.n == pytest.approx(0.025)
    nothing = {"all streams": replies_of(["sad"] * 20, ["happy"] * 20)}
    group = Group(scored.group.space, "made", frozenset(f"made/{i}" for i in range(20)))
    wrong = score_group(nothing, group, "emotion", several=False).rows[0].intervals["accuracy"]
    assert (wrong.low, (1 - wrong.high) ** 20) == (0.0, pytest.approx(0.025))


def test_slices_are_by_the_clip_and_not_by_the_mask(scored: ScoredGroup) -> None:
    for row in scored.rows:
        assert set(row.slices) == {"duration", "missing"}, "all are of one corpus and language"
        assert [part.name for part in row.slices["missing"]] == ["nothing missing", "without audio"]
        assert [part.n for part in row.slices["missing"]] == [40, 20]
        # From 1 to 6.9 s: 10 below 2, 30 below 5.
        assert [part.n for part in row.slices["duration"]] == [10, 30, 20]
    found = [
        p for p in scored.replies["audio masked"] if "audio" in (p.about or ClipFacts()).absent
    ]
    right = sum(p.label == p.truth for p in found)
    assert scored.rows[1].slices["missing"][1].score == pytest.approx(right / 20)


def test_clips_of_like_length_are_divided_by_quarters() -> None:
    found = replies_of(["sad"] * 8, ["sad"] * 8)
    short = [
        p.model_copy(update={"about": ClipFacts(duration_s=3 + i / 10)})
        for i, p in enumerate(found)
    ]
    group = Group(
        LabelSpace(name="emotion", labels=LABELS), "made", frozenset(p.uid for p in found)
    )
    row = score_group({"all streams": short}, group, "emotion", several=False).rows[0]
    assert [part.n for part in row.slices["duration"]] == [2, 2, 2, 2]


def test_likelihoods_are_averaged_by_true_label(scored: ScoredGroup) -> None:
    assert [panel.truth for panel in scored.likelihoods] == list(LABELS)
    assert sum(panel.n for panel in scored.likelihoods) == 60
    for panel in scored.likelihoods:
        assert panel.means["all streams"][panel.truth] == pytest.approx(0.8)
        own = [p for p in scored.replies["audio masked"] if p.truth == panel.truth]
        named_sad = sum(p.label == "sad" for p in own) / len(own)
        assert panel.means["audio masked"]["sad"] == pytest.approx(0.1 + 0.7 * named_sad)
    calibrated = scored.rows[0].calibration
    assert calibrated is not None
    assert (calibrated.accuracy, calibrated.mean_probability) == (1.0, pytest.approx(0.8))
    assert calibrated.ece == pytest.approx(0.2)


def test_parsing_is_counted_by_condition(scored: ScoredGroup) -> None:
    n_off = sum(p.label is None for p in scored.replies["audio masked"])
    assert n_off > 0
    assert scored.parsing.conditions == {
        "all streams": {"exact": 60}, "audio masked": {"exact": 60 - n_off, "off_list": n_off},
    }  # fmt: skip
    assert scored.parsing.counts == {"exact": 120 - n_off, "off_list": n_off}


def test_sets_of_labels_are_right_as_a_whole() -> None:
    found = [
        Prediction(
            uid=f"made/{i}", task="multi-label", reply="x", label=None, labels=labels, unread=unread,
            parse="exact", truth=None, truths=("happy", "sad"), run="r", spec_ids={},
        )
        for i, (labels, unread) in enumerate(
            [(("happy", "sad"), ()), (("happy",), ()), (("happy", "sad"), ("gloomy",)), (("sad",), ())]
        )
    ]  # fmt: skip
    group = Group(
        LabelSpace(name="emotion_multi", labels=LABELS), "made", frozenset(p.uid for p in found)
    )
    result = score_group({"all streams": found}, group, "emotion_multi", several=True)
    (row,) = result.rows
    assert row.name == "made: all streams"
    assert row.scores.accuracy == 0.25
    assert set(row.intervals) == {"accuracy"}
    assert row.calibration is None
    assert result.likelihoods == ()


def run_of(preset: Preset) -> Any:
    """What `explaining_task` looks at of a run."""
    return SimpleNamespace(preset=preset)


def test_every_recognition_task_is_explained_by_its_joint_one() -> None:
    for task, row in TASK_TABLE.items():
        found = explaining_task(task, run_of(v2()))
        if row.joint:
            assert found is None
        elif row.label not in (None, "emotion_ov"):
            assert found is not None
            assert TASK_TABLE[found].joint
            assert TASK_TABLE[found].label == row.label


def test_the_predecessor_explains_by_its_task_of_reasoning() -> None:
    assert explaining_task("emotion", run_of(v1())) == "reason"


def record_of(uid: str, media: str) -> Record:
    return Record(uid=uid, media=media, clip=Clip(sha256=key_of(uid), n_bytes=1))


def test_examples_have_the_replies_of_all_conditions(scored: ScoredGroup, tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "media"
    outside.mkdir()
    root.mkdir()
    write_clip(outside / "secret.mp4")
    os.symlink(outside / "secret.mp4", root / "link.mp4")
    shown = choose_examples(scored.first, 3, choice_of)
    records = {p.uid: record_of(p.uid, "gone.mp4") for p in shown}
    linked = shown[0].uid
    records[linked] = record_of(linked, "link.mp4")
    reasons = [
        p.model_copy(update={"task": "think", "masked": masked})
        for masked in ((), ("audio",))
        for p in shown
    ]
    browser = examples_of(scored, shown, reasons, records, root)
    assert [card.id for card in browser.cards] == [p.uid for p in shown]
    for card in browser.cards:
        assert [reply.asked for reply in card.replies] == [
            "emotion", "think", "think, audio masked", "emotion, audio masked",
        ]  # fmt: skip
        assert card.pictures is None
    assert sum("no media file below the media root" in note for note in browser.notes) == 1
    assert any("made up" in note for note in browser.notes)
    assert examples_of(scored, shown, [], records, None).notes == browser.notes[:1]


@pytest.fixture(scope="module")
def written(scored: ScoredGroup, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    shown = choose_examples(scored.first, 4, choice_of)
    folder = tmp_path_factory.mktemp("report")
    data = ReportData(
        title="t", created="c", preset="p", run_path="r", store_path="s", rows=scored.rows,
        about=(EVIL,), method=(EVIL,), prompt=EVIL, likelihoods=scored.likelihoods,
        examples=examples_of(scored, shown, [], {}, None), parsing=scored.parsing,
    )  # fmt: skip
    html, markdown = write_report(data, folder)
    for name in re_linked(markdown.read_text(encoding="utf-8")):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    return html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")


def re_linked(markdown: str) -> list[str]:
    return [part.partition(")")[0] for part in markdown.split("](")[1:]]


def test_a_full_report_says_the_same_on_both_pages(
    written: tuple[str, str], scored: ScoredGroup
) -> None:
    html, markdown = written
    page = Page(html)
    assert "<script" not in html.lower()
    assert "<script" not in markdown.lower()
    assert page.text.count(EVIL) > 8
    assert page.tags.count("svg") == 5
    full, masked = scored.rows
    assert masked.change is not None
    for text in (
        span(full.intervals["accuracy"]),
        span(masked.intervals["uar"]),
        span(masked.change, signed=True),
        f"{100 * masked.change.difference:.2f}".replace("-", "\N{MINUS SIGN}"),
        span(masked.slices["missing"][1].interval or Interval(low=0, high=0, level=0, n=0)),
        "without audio",
    ):
        assert text in page.text, text
        assert text in markdown, text
    cells = ["audio masked", "60", f"{100 * masked.scores.accuracy:.2f}"]
    assert any(row[:2] == cells[:2] for row in page.rows), "the table of calibration"
    assert len(re_linked(markdown)) == 5


def test_figures_and_tables_are_numbered_in_order(written: tuple[str, str]) -> None:
    words = Page(written[0]).text.split()
    for kind in ("Figure", "Table"):
        numbers = [int(b[:-1]) for a, b in pairwise(words) if a == kind and b[:1].isdigit()]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) >= 4


def test_formats() -> None:
    interval = Interval(low=0.5, high=0.75, level=0.95, n=10)
    assert span(interval) == "(50.00 to 75.00)"
    assert span(interval, signed=True) == "(+50.00 to +75.00)"
    assert [signed_points(x) for x in (0.015, -0.015, 0.0, -1e-9)] == [
        "+1.50", "\N{MINUS SIGN}1.50", "±0.00", "±0.00",
    ]  # fmt: skip
    assert [p_value(p) for p in (0.0001, 0.0341, 1.0)] == ["< 0.001", "0.034", "1"]


def test_large_label_spaces_are_drawn_once(tmp_path: Path) -> None:
    labels = [f"label {i}" for i in range(40)]
    rows = [
        ScoreRow(name=f"condition {i}", scores=score_single_label(labels, labels, labels))
        for i in range(5)
    ]
    data = ReportData(
        title="t", created="c", preset="p", run_path="r", store_path="s", rows=tuple(rows)
    )
    page = Page(write_report(data, tmp_path)[0].read_text(encoding="utf-8"))
    assert page.text.count("Only the first condition is drawn.") == 1
    assert page.text.count("label 39") >= 2, "on the axis, and in the table"
    assert page.tags.count("svg") == 1, "bars of 40 labels would fill a page"
