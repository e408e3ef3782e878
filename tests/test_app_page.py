"""`emocache app` in a real Chromium, against the real server process."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from cache.labels import LabelSpace
from eval.live.answer import LiveModel
from extract.corpora.demo import write_demo_corpus
from tests.app_fakes import HOSTILE, THOUGHT, Served
from tests.browser import chromium
from train.checkpoint import save_trained
from train.model import build
from train.presets import demo
from train.running.run import RunInfo, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WAIT_MS = 30_000
LABELS = ("happy", "sad", "neutral")
_CHROMIUM = [
    "--no-sandbox", "--disable-gpu", "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    pytest.importorskip("gradio")
    with chromium(_CHROMIUM) as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test if a script fails, the policy stops something, or it asks another host."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    complaints: list[str] = []
    hosts: set[str] = set()
    found = context.new_page()
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("dialog", lambda dialog: complaints.append(dialog.message))
    found.on(
        "console", lambda said: complaints.append(said.text) if "Policy" in said.text else None
    )
    found.on("websocket", lambda socket: complaints.append(socket.url))
    context.on("request", lambda request: hosts.add(urlsplit(request.url).hostname or ""))
    yield found
    context.close()
    assert complaints == []
    assert hosts - {""} == {"127.0.0.1"}  # data: and blob: have none


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a generated clip."""
    root = tmp_path_factory.mktemp("clips")
    write_demo_corpus(root, n_clips=1)
    return root / "media"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the demo's shape that learned nothing: what it says does not matter here."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    preset = demo()
    model, _ = build(preset)
    info = RunInfo(
        run_id="0123456789ab", created="2026-01-01T00:00:00+00:00", manifest="m.parquet", store="s",
        records_sha256="0" * 64, label_spaces={"emotion": LabelSpace(name="emotion", labels=LABELS)},
        versions={}, trainable={}, finished=(preset.stages[0].name,),
    )  # fmt: skip
    write_run(folder, preset, info)
    save_trained(model, folder / preset.stages[0].name / "final")
    return folder


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def fake(browser: Browser, clips: Path, temporary: Path) -> Iterator[Served]:
    """The page of a pretended model, with small limits."""
    (clip,) = clips.iterdir()
    with Served("-m", "tests.app_fakes", clip, TMPDIR=str(temporary)) as served:
        yield served
        assert served.end(signal.SIGTERM) == 0
        assert "NETWORK" not in served.told, "the server asked another machine"
        assert list(temporary.glob("emocache-app-*")) == []


def opened(page: Page, served: Served) -> None:
    page.goto(served.url)
    page.wait_for_selector(".ec-drop:not([hidden])")


def give(page: Page, name: str, content: bytes, kind: str = "video/mp4") -> None:
    page.set_input_files(".ec-file", {"name": name, "mimeType": kind, "buffer": content})


def remove(page: Page) -> None:
    page.click(".ec-remove")
    page.wait_for_selector("#seen :text('Give a clip first')")


def kept(folder: Path) -> list[str]:
    """Return the files of visitors below a folder for temporary files."""
    found = [path for path in folder.glob("emocache-app-*/**/*") if path.is_file()]
    return [str(path) for path in found if path.name != "lock" and "examples" not in path.parts]


def ask(page: Page) -> str:
    """Ask, wait for the whole answer, and return what is shown."""
    # An answer that stands there from before is marked, so that it is not taken for the new one.
    page.evaluate("for (const old of document.querySelectorAll('#answer *')) old.dataset.old = 1")
    page.click("#ask")
    page.wait_for_selector(
        "#answer .ec-answer:not(.is-writing, [data-old]), #answer .ec-problem:not([data-old])"
    )
    return page.inner_text("#answer")


@pytest.mark.slow
def test_a_real_clip_is_looked_at_and_asked_about(
    page: Page, run: Path, clips: Path, tmp_path: Path
) -> None:
    (generated,) = clips.iterdir()
    real = Path(__file__).resolve().parents[2] / "shared" / "clips" / "friday.mp4"
    clip = real if real.is_file() else generated
    with LiveModel.load(run) as model:
        seen = model.look(clip, name="upload", subtitle="Hildy! How are you?")
        expected = model.ask(seen, "think", likelihoods=True, max_new_tokens=40)
    command = ("-m", "emocache", "app", "--run", run, "--port", "0")
    with Served(*command, TMPDIR=str(tmp_path)) as served:
        opened(page, served)
        assert "preset demo · run 0123456789ab" in page.inner_text(".ec-head")
        page.set_input_files(".ec-file", clip)
        page.wait_for_selector("#seen .ec-seen")
        assert page.locator("#seen .ec-strip img").count() == 16
        assert page.locator("#seen .ec-wave path").count() == 1
        streams = page.locator("#seen .ec-streams li").all_inner_texts()
        assert streams == ["Sound heard", "Video seen", "Picture seen"]
        page.wait_for_function("() => document.querySelector('.ec-video').readyState >= 2")
        assert kept(tmp_path) == [], "the file goes as soon as the model looked"
        page.fill("#subtitle textarea", "Hildy! How are you?")
        page.click("#task label:has-text('Explanation and emotion')")
        page.click("#more button")
        page.fill("#length input[type=number]", "40")
        page.keyboard.press("Tab")
        shown = ask(page)
        assert f"{expected.prediction.n_tokens} token" in shown
        whole = page.locator("#answer .ec-raw pre")
        written = whole if whole.count() else page.locator("#answer .ec-text")
        assert (written.text_content() or "").strip() == expected.reply.strip()
        bars = page.locator("#answer .ec-bars > div")
        assert expected.prediction.likelihoods is not None
        ordered = sorted(expected.prediction.likelihoods.items(), key=lambda item: -item[1])
        assert [bars.nth(at).inner_text().split("\n") for at in range(3)] == [
            [label, f"{100 * share:.1f} %"] for label, share in ordered
        ]
        if expected.labels:
            assert page.inner_text("#answer .ec-label") == ", ".join(expected.labels)
        # Other labels, without giving the clip anew.
        page.fill("#labels textarea", "calm, upset")
        ask(page)
        names = page.locator("#answer .ec-bars [role=rowheader]").all_inner_texts()
        assert sorted(names) == ["calm", "upset"]
        # Ctrl-C while the page stands open: nothing is left.
        assert served.end(signal.SIGINT) == 0
        assert "closed; all clips are deleted" in served.told
        assert [p for p in tmp_path.iterdir() if p.name.startswith("emocache-")] == []
        assert "Traceback" not in served.told
        assert "ERROR" not in served.told


def test_an_explanation_is_shown_as_it_is_written_and_can_be_stopped(
    page: Page, fake: Served, temporary: Path
) -> None:
    opened(page, fake)
    assert page.is_disabled("#ask")
    give(page, "a.mp4", b"slow clip")
    page.wait_for_selector("#seen .ec-seen")
    page.click("#ask")
    page.wait_for_selector("#answer .is-writing .ec-text:has-text('word3')")
    before = page.inner_text("#answer .ec-text")
    page.wait_for_function(
        "n => document.querySelector('#answer .ec-text').innerText.length > n", arg=len(before)
    )
    assert page.locator("#answer .ec-bars > div").count() == 3
    assert page.is_disabled("#ask")
    page.click("#stop")
    page.wait_for_selector("#answer .is-stopped")
    assert page.is_enabled("#ask")
    # The model is free at once: another clip is answered whole.
    remove(page)
    give(page, "b.mp4", b"quick clip")
    page.wait_for_selector("#seen .ec-seen")
    assert THOUGHT in ask(page)
    assert page.inner_text("#answer .ec-label") == "happy"
    # A clip that is removed takes its answer with it.
    remove(page)
    give(page, "c.mp4", b"slow clip")
    page.wait_for_selector("#seen .ec-seen")
    page.click("#ask")
    page.wait_for_selector("#answer .is-writing .ec-text:has-text('word3')")
    remove(page)
    page.wait_for_function("() => !document.querySelector('#answer').innerText.trim()")
    page.wait_for_timeout(300)
    assert page.inner_text("#answer").strip() == ""
    assert kept(temporary) == []


def test_what_cannot_be_taken_is_said_and_deleted(
    page: Page, fake: Served, temporary: Path
) -> None:
    opened(page, fake)
    for content, words in (
        (b"", "The file is empty (0 bytes)."),
        (b"x" * 100_001, "The clip is larger than 100 KB, the most that this page takes."),
        (b"broken file", "This file cannot be read as a video, a sound or a picture."),
        (b"long file", "The clip lasts 2:00:00 (h:min:s), more than the 60 s that are allowed."),
        (b"crash", "Something went wrong that is not your clip's fault."),
    ):
        give(page, f"../../{HOSTILE}.mp4", content)
        page.wait_for_selector(f".ec-problem:not([hidden]):has-text({json.dumps(words)})")
        everything = page.content()
        assert str(temporary) not in everything
        assert "Traceback" not in everything
        assert page.is_disabled("#ask")
        assert kept(temporary) == []
    assert page.evaluate("window.hacked") is None


def test_hostile_text_stays_text(page: Page, fake: Served) -> None:
    opened(page, fake)
    assert HOSTILE in page.inner_text(".ec-head")
    assert page.inner_text(".ec-examples button") == HOSTILE
    give(page, f"{HOSTILE}.mp4", b"hostile clip")
    page.wait_for_selector("#seen .ec-seen")
    assert HOSTILE in page.inner_text("#clip .ec-about")
    page.fill("#subtitle textarea", HOSTILE)
    page.click("#more button")
    page.fill("#labels textarea", "<b>x</b>, <img src=y onerror='window.hacked=3'>")
    shown = ask(page)
    assert HOSTILE in shown
    assert "<b>x</b>" in shown
    assert page.locator("img[src='x'], img[src='y'], .ec-label b").count() == 0
    assert page.evaluate("window.hacked") is None


@pytest.mark.slow
def test_a_recording_is_a_clip(page: Page, fake: Served, temporary: Path) -> None:
    opened(page, fake)
    page.click(".ec-record")
    page.wait_for_selector(".ec-stop:not([hidden])")
    page.wait_for_function("() => document.querySelector('.ec-video').videoWidth > 0")
    assert "of 60 s" in page.inner_text(".ec-about")
    page.click(".ec-stop")
    page.wait_for_selector("#clip [data-state=ready], #clip .ec-problem:not([hidden])")
    # The pretended model reads words, so it only matters that the bytes came and went.
    page.wait_for_selector("#seen .ec-seen, #seen .ec-problem, #clip .ec-problem:not([hidden])")
    assert kept(temporary) == []


@pytest.mark.slow
def test_the_example_is_given_as_any_clip(page: Page, fake: Served) -> None:
    opened(page, fake)
    page.click(".ec-examples button")
    page.wait_for_selector("#clip [data-state=ready]")
    page.wait_for_function("() => document.querySelector('.ec-video').videoWidth > 0")


@pytest.mark.slow
def test_who_waits_is_told_and_who_is_too_many_is_sent_away(browser: Browser, fake: Served) -> None:
    pages = [browser.new_page() for _ in range(3)]
    try:
        for one in pages:
            opened(one, fake)
            give(one, "a.mp4", b"slow clip")
            one.wait_for_selector("#seen .ec-seen")
        pages[0].click("#ask")
        pages[0].wait_for_selector("#answer .is-writing .ec-text")
        pages[1].click("#ask")
        pages[1].wait_for_selector("#answer :text('Waiting: 1 ahead of you.')")
        pages[2].click("#ask")
        pages[2].wait_for_selector("#answer .ec-problem:has-text('This page is busy')")
        assert pages[2].is_enabled("#ask")
        # The first one closes the page: its answer ends, and the next one has its turn.
        pages[0].close()
        pages[1].wait_for_selector("#answer .is-writing .ec-text")
        pages[1].click("#stop")
        pages[1].wait_for_selector("#answer .is-stopped")
    finally:
        for one in pages:
            if not one.is_closed():
                one.close()


@pytest.mark.slow
def test_it_can_be_read_in_the_dark_and_on_a_phone(browser: Browser, fake: Served) -> None:
    for scheme, width in (("dark", 1280), ("light", 375)):
        context = browser.new_context(
            viewport={"width": width, "height": 800},
            color_scheme=scheme,  # type: ignore[arg-type]
        )
        page = context.new_page()
        opened(page, fake)
        give(page, "a.mp4", b"quick clip")
        page.wait_for_selector("#seen .ec-seen")
        ask(page)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"scrolls sideways at {width}"
        for part in (".ec-head h1", "#answer .ec-text", "#answer .ec-note", ".ec-foot"):
            assert contrast(page, part) >= 4.5, f"{part} in {scheme}"
        context.close()


def contrast(page: Page, selector: str) -> float:
    """Return the contrast of an element's text against the page, by the formula of WCAG 2.1."""
    inks: list[list[float]] = page.evaluate(
        """selector => [getComputedStyle(document.querySelector(selector)).color,
          getComputedStyle(document.body).backgroundColor].map(text => text.match(/[\\d.]+/g).map(Number))""",
        selector,
    )

    def luminance(ink: list[float]) -> float:
        parts = [c / 255 for c in ink[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(luminance(ink) for ink in inks)
    return (high + 0.05) / (low + 0.05)
