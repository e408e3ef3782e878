"""Examples of a report: how they are chosen, what is shown of a clip, filters that need no script."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache.clip import file_sha256
from eval.pages import page_environment
from eval.predictions import ClipFacts, Prediction
from eval.report.page import write_report
from eval.results.examples import (
    OUTCOMES,
    Choice,
    ExampleBrowser,
    Outcome,
    card_of,
    card_of_item,
    choice_of,
    choose_examples,
    make_browser,
    outcome_of,
    outcome_of_prediction,
    split_reply,
)
from eval.results.pictures import (
    WAVE_HEIGHT,
    WAVE_WIDTH,
    ClipFile,
    read_pictures,
    waveform_path,
)
from eval.scoring.result import Item
from tests.browser import chromium
from tests.media import stamp_of, write, write_clip, write_wav
from tests.test_report import report_data

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"'`&lt;"


def prediction(
    uid: str, truth: str | None = "sad", reply: str = "sad", **changes: object
) -> Prediction:
    known = reply if reply in ("sad", "happy", "angry") else None
    fields: dict[str, object] = {
        "uid": uid, "task": "emotion", "reply": reply, "label": known, "truth": truth,
        "parse": "exact" if known else "off_list" if reply else "empty", "run": "r", "spec_ids": {},
    }  # fmt: skip
    return Prediction.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("reply", "reasoning", "answer"),
    [
        ("sad", None, "sad"),
        ("<think>A low voice.</think><answer>sad</answer>", "A low voice.", "sad"),
        ("A low voice. <ANSWER> sad </Answer> So be it.", "A low voice.   So be it.", "sad"),
        ("<answer>sad</answer><answer>happy</answer>", "<answer>sad</answer>", "happy"),
        ("<think>Cut off <answer>sa", "Cut off", "sa"),
        ("<think>No tag.</think> sad", "No tag.", "sad"),
        ("<think>never closed", None, "<think>never closed"),
        ("", None, ""),
    ],
)  # fmt: skip
def test_a_reply_is_split_into_reasoning_and_answer(
    reply: str, reasoning: str | None, answer: str
) -> None:
    assert split_reply(reply) == (reasoning, answer)


def test_outcomes_compare_labels_as_sets() -> None:
    assert outcome_of(["a", "b"], ["b", "a"], "tag") == "right"
    assert outcome_of(["a", "b"], ["a"], "tag") == "partly right"
    assert outcome_of(["a"], ["a", "b"], "tag") == "partly right"
    assert outcome_of(["a"], ["b"], "alias") == "wrong"
    assert outcome_of(["a"], [], "off_list") == "off list"
    assert outcome_of(["a"], [], "empty") == "empty"
    partly = prediction(
        "c/1", None, "sad, gloomy", truths=("sad",), labels=("sad",), label=None, unread=("gloomy",),
        parse="exact",
    )  # fmt: skip
    assert outcome_of_prediction(partly) == "partly right"


CHOICES = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(OUTCOMES)), max_size=40).map(
    lambda pairs: [Choice(str(i), label, outcome) for i, (label, outcome) in enumerate(pairs)]
)


def identity(choice: Choice) -> Choice:
    return choice


@given(CHOICES, st.integers(0, 50), st.randoms())
def test_examples_are_a_spread(choices: list[Choice], n: int, random: Random) -> None:
    chosen = choose_examples(choices, n, identity)
    assert len(chosen) == min(n, len(choices))
    assert len({c.id for c in chosen}) == len(chosen)
    # Chosen in turn: no outcome has two more than another that still had one to give ...
    total = Counter(c.outcome for c in choices)
    found = Counter(c.outcome for c in chosen)
    for rich in found:
        for poor in total:
            assert found[rich] <= found[poor] + 1 or found[poor] == total[poor]
        # ... and no class of an outcome two more than another.
        of_class = Counter(c.label for c in choices if c.outcome == rich)
        taken = Counter(c.label for c in chosen if c.outcome == rich)
        for label in taken:
            for other in of_class:
                assert taken[label] <= taken[other] + 1 or taken[other] == of_class[other]
    shuffled = list(choices)
    random.shuffle(shuffled)
    assert choose_examples(shuffled, n, identity) == chosen


def test_another_seed_gives_other_examples() -> None:
    choices = [Choice(str(i), "a", "right") for i in range(100)]
    drawn = [tuple(choose_examples(choices, 5, identity, seed=seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_card_says_what_is_known() -> None:
    about = ClipFacts(language="zh", duration_s=2.46, subtitle="Hi.", absent=("audio",))
    first = prediction("meld/a", likelihoods={"happy": 0.25, "sad": 0.75}, about=about)
    masked = prediction("meld/a", reply="happy", masked=("image", "video"))
    other = prediction("meld/a", reply="happy", masked=("audio",), task="think")
    card = card_of(first, [masked, other])
    assert (card.group, card.subtitle) == ("meld", "Hi.")
    assert card.facts == ("2.5 s", "Chinese", "no sound")
    assert [reply.asked for reply in card.replies] == [
        "emotion", "emotion, picture masked", "think, audio masked",
    ]  # fmt: skip
    assert [reply.outcome for reply in card.replies] == ["right", "wrong", "wrong"]
    assert card.bar_rows == (("happy", False, (0.25,)), ("sad", True, (0.75,)))


def test_a_scored_item_of_a_foreign_file_becomes_a_card() -> None:
    item = Item("x", "m", ("joy",), "It is <answer>happy</answer>", ("happy",), "tag")
    card = card_of_item(item, "OV-MERD", "right")
    assert (card.reply.outcome, card.reply.reasoning, card.group) == ("right", "It is", "OV-MERD")
    assert card_of_item(item, "OV-MERD").reply.outcome == "wrong"
    assert card.reply.asked == "m", "a foreign file tells which part of the set, and no more"


def test_a_scored_item_of_ours_says_what_was_asked_and_not_its_split() -> None:
    asked = prediction("meld/a", task="think", split="test", masked=("audio",))
    item = Item("meld/a", "test", ("sad",), "sad", ("sad",), "exact", asked)
    assert card_of_item(item, "MELD").reply.asked == "think, audio masked"


def heights_of(path: str) -> list[tuple[float, float]]:
    """Return the points of a waveform's outline."""
    assert re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)*Z", path)
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_the_outline_follows_the_loudest_samples() -> None:
    sound = np.zeros(WAVE_WIDTH * 100, np.float32)
    sound[100 * 60 + 50] = -0.5  # bar 60
    sound[100 * 180 + 1] = 0.25  # bar 180
    points = heights_of(waveform_path(sound))
    upper = points[: len(points) // 2]
    assert len(upper) == WAVE_WIDTH
    reach = [WAVE_HEIGHT / 2 - y for _, y in upper]
    assert reach[60] == pytest.approx(WAVE_HEIGHT / 2 - 1)  # the loudest fills the height
    assert reach[180] == pytest.approx(reach[60] / 2, abs=0.06)
    assert max(r for bar, r in enumerate(reach) if bar not in (60, 180)) < 1
    assert all(0 <= x <= WAVE_WIDTH and 0 <= y <= WAVE_HEIGHT for x, y in points)


@pytest.mark.parametrize("n", [0, 1, 7, WAVE_WIDTH + 1])
def test_short_and_silent_sounds_are_a_line(n: int) -> None:
    points = heights_of(waveform_path(np.full(n, 1e-6, np.float32)))
    assert all(abs(y - WAVE_HEIGHT / 2) < 1 for _, y in points)


def decoded(uri: str) -> np.ndarray:
    kind, _, data = uri.partition(";base64,")
    assert kind == "data:image/jpeg"
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def test_frames_are_those_of_the_clip(tmp_path: Path) -> None:
    clip = write(tmp_path / "a.mp4", n=60)
    sound = write_wav(
        tmp_path / "b.wav", (8000 * np.sin(np.arange(16000) / 9)).astype("<i2"), 16000
    )
    Image.fromarray(np.full((30, 60, 3), 200, np.uint8)).save(tmp_path / "c.png")
    files = {
        "clip": ClipFile(clip, "a.mp4", file_sha256(clip)),
        "sound": ClipFile(sound, "b.wav"),
        "still": ClipFile(tmp_path / "c.png", "c.png"),
    }
    found = read_pictures(files, n_frames=5)
    frames = found["clip"].frames
    assert [stamp_of(decoded(frame.src)) for frame in frames] == [6, 18, 30, 42, 54]
    assert [frame.pts_s for frame in frames] == [0.24, 0.72, 1.2, 1.68, 2.16]
    assert {(frame.width_px, frame.height_px) for frame in frames} == {(96, 64)}
    assert (found["clip"].waveform, found["clip"].kind) == (None, "video")
    assert found["clip"].clip is not None
    assert base64.b64decode(found["clip"].clip.partition(",")[2]) == clip.read_bytes()
    assert (found["sound"].frames, found["sound"].kind) == ((), "audio")
    assert found["sound"].duration_s == pytest.approx(1.0)
    assert found["sound"].waveform is not None
    assert [(f.width_px, f.height_px) for f in found["still"].frames] == [(60, 30)]
    assert found["still"].clip is None


def test_what_cannot_be_shown_is_said(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    (tmp_path / "text.mp4").write_text("no media")
    (tmp_path / "empty.mp4").touch()
    found = read_pictures(
        {
            "gone": ClipFile(tmp_path / "gone.mp4", "gone.mp4"),
            "text": ClipFile(tmp_path / "text.mp4", "text.mp4"),
            "empty": ClipFile(tmp_path / "empty.mp4", "empty.mp4"),
            "changed": ClipFile(clip, "a.mp4", "0" * 64),
            "large": ClipFile(clip, "a.mp4"),
        },
        max_clip_bytes=10,
    )
    for name in ("gone", "text", "empty", "changed"):
        assert found[name].frames == ()
        assert found[name].clip is None
        assert found[name].problems, name
        assert str(tmp_path) not in found[name].problems[0]
    assert "gone.mp4" in found["gone"].problems[0]
    assert (found["large"].clip, found["large"].problems) == (None, ())
    assert len(found["large"].frames) == 5


@pytest.mark.parametrize("budget", [0, 20_000, 60_000, 10**9])
def test_pictures_stay_within_a_budget(tmp_path: Path, budget: int) -> None:
    files, cards = {}, []
    for seed in range(3):
        clip = write_clip(tmp_path / f"{seed}.mp4", seed)
        files[f"c/{seed}"] = ClipFile(clip, clip.name)
        cards.append(card_of(prediction(f"c/{seed}")))
    found = make_browser(cards, {"right": 3}, files=files, budget_bytes=budget)
    assert found.media_bytes <= budget
    assert [card.id for card in found.cards] == ["c/0", "c/1", "c/2"]
    if budget == 10**9:
        assert all(card.pictures and card.pictures.clip for card in found.cards)
        assert found.notes == ("All 3 clips.",)
    else:
        assert any("cannot be played here" in note for note in found.notes)
    if budget == 0:
        assert all(card.pictures and "limit" in card.pictures.problems[0] for card in found.cards)


def test_without_files_nothing_is_decoded() -> None:
    cards = [card_of(prediction("c/1"))]
    found = make_browser(cards, {"right": 8, "off list": 2})
    assert found.cards[0].pictures is None
    assert found.notes == (
        "1 of 10 clips, drawn for variety over outcomes and classes, so not in the proportions of the "
        "whole: 8 right, 2 off list.",
    )


def page_of(browser: ExampleBrowser) -> str:
    """Return a page that holds nothing but a browser, under the policy of a report."""
    template = page_environment("A test").from_string(
        """<!DOCTYPE html><html><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:">
{% import "_examples.html.j2" as examples %}
<style>:root { --ground: #fff; --panel: #eee; --ink: #111; --muted: #666; --rule: #ccc; --accent: #07b;
--warn: #d50; } {{ examples.style(browser, "ex") }}</style></head>
<body>{{ examples.cards(browser, "ex") }}</body></html>"""
    )
    return template.render(browser=browser)


def browser_of(n: int, tmp_path: Path | None = None) -> ExampleBrowser:
    """Return n examples per outcome and class, of two corpora; with a clip for the first of them."""
    replies = {"right": "sad", "wrong": "happy", "off list": HOSTILE, "empty": ""}
    cards, files = [], {}
    for i in range(n):
        for truth in ("sad", "angry"):
            for outcome, reply in replies.items():
                uid = f"{('meld', 'e3')[i % 2]}/{truth}-{outcome}-{i}"
                text = truth if outcome == "right" else reply
                about = ClipFacts(subtitle=HOSTILE, duration_s=1.0, language=HOSTILE)
                first = prediction(
                    uid, truth, text, about=about, likelihoods={"sad": 0.5, "happy": 0.5}
                )
                think = f"<think>{HOSTILE}</think><answer>sad</answer>"
                other = prediction(uid, truth, think, label="sad", parse="tag", task="think")
                cards.append(card_of(first, [other]))
    if tmp_path is not None:
        clip = write_clip(tmp_path / "a.mp4", seconds=1.0)
        files[cards[0].id] = ClipFile(clip, "a.mp4")
    counts: Counter[Outcome] = Counter(card.reply.outcome for card in cards)
    return make_browser(cards, counts, files=files)


def test_the_component_escapes_and_loads_nothing(tmp_path: Path) -> None:
    text = page_of(browser_of(1, tmp_path))
    assert "<script" not in text
    assert not re.search(r"<[^>]*\son\w+=", text)
    sources = re.findall(r'(?:src|poster|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"@import|url\(", text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


def visible(page: Page) -> list[str]:
    return [
        c.locator("header code").inner_text() for c in page.locator(".card").all() if c.is_visible()
    ]


def test_filters_work_without_a_script(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page_of(browser_of(2, tmp_path)), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False, viewport={"width": 390, "height": 800})
    requests: list[str] = []
    page = context.new_page()
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    assert len(visible(page)) == 16
    for kind, choice, kept in (
        ("outcome", "wrong", lambda uid: "-wrong-" in uid),
        ("label", "angry", lambda uid: "angry-wrong-" in uid),
        ("group", "e3", lambda uid: uid == "e3/angry-wrong-1"),
    ):
        page.locator(f".by-{kind} label", has_text=re.compile(f"^{choice}$")).click()
        assert visible(page)
        assert all(kept(uid) for uid in visible(page))
    assert visible(page) == ["e3/angry-wrong-1"]
    for kind in ("outcome", "label", "group"):
        page.locator(f".by-{kind} label", has_text=re.compile("^all$")).click()
    assert len(visible(page)) == 16
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_clips_play_and_nothing_overflows(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page_of(browser_of(1, tmp_path)), encoding="utf-8")
    complaints: list[str] = []
    for width in (360, 1200):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text))
        page.goto(path.as_uri())
        wide: Sequence[str] = page.evaluate(
            "[...document.querySelectorAll('body, .card *')].filter(e => "
            "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert wide == []
        assert page.evaluate("window.hacked") is None
        page.locator(".play summary").first.click()
        duration = page.evaluate(
            "new Promise((done, fail) => { const v = document.querySelector('video'); v.preload = 'auto';"
            " v.onloadedmetadata = () => done(v.duration); v.onerror = () => done(v.error.message);"
            " v.load(); })"
        )
        if isinstance(duration, str):
            pytest.skip(f"this Chromium has no H.264: {duration}")
        assert duration == pytest.approx(1.0, abs=0.15)
        page.close()
    assert complaints == []


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1200, "light")])
def test_a_whole_report_in_a_browser(
    browser: Browser, tmp_path: Path, width: int, scheme: Literal["dark", "light"]
) -> None:
    data = report_data(examples=browser_of(1, tmp_path))
    html, _ = write_report(data, tmp_path)
    assert html.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.on("console", lambda said: complaints.append(said.text))
    page.goto(html.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.compatMode") == "CSS1Compat"
    pictures = page.evaluate("[...document.images].map(i => i.naturalWidth)")
    assert len(pictures) == 5
    assert min(pictures) > 0
    figures = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)"
    )
    assert len(figures) == 3
    assert min(figures) > 100
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 27)" if scheme == "dark" else "rgb(255, 255, 255)")
    page.close()
    assert complaints == []


def test_choice_of_a_prediction() -> None:
    several = prediction("c/1", None, "sad", label=None, labels=("sad",), truths=("sad", "angry"))
    assert choice_of(several) == Choice("c/1", "sad, angry", "partly right")
