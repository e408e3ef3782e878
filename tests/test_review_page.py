"""The review page in a real Chromium, against the real server process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from sklearn.metrics import cohen_kappa_score

from cache.clip import Clip, Description, Peak, Record, Subtitle, file_sha256
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, write_manifest
from extract.annotate.people.agreement import agreement
from extract.annotate.people.review import ASPECTS, Rating, read_ratings
from extract.corpora.demo import write_demo_corpus
from extract.media import probe
from tests.browser import chromium
from tests.media import sine, write

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = (
    "import typer; from eval.verbs.review import review_command\n"
    "app = typer.Typer(); app.command()(review_command); app()"
)
HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"'`&lt;"
WAIT_MS = 20_000
_LOOPBACK_ONLY = ["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(_LOOPBACK_ONLY) as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test if a script fails or the policy had to stop something."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    complaints: list[str] = []
    found = context.new_page()
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on(
        "console", lambda said: complaints.append(said.text) if "Policy" in said.text else None
    )
    found.on("dialog", lambda dialog: complaints.append(dialog.message))
    yield found
    context.close()
    assert complaints == []


class Served:
    """The server process of one rater. A context manager."""

    def __init__(self, manifest: Path, ratings: Path, rater: str, *options: str) -> None:
        command = [sys.executable, "-c", COMMAND, str(manifest), "--out", str(ratings)]
        self.process = subprocess.Popen(
            [*command, "--rater", rater, *options],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def clip_of(path: Path) -> Clip:
    facts = probe(path)
    return Clip(
        sha256=file_sha256(path),
        n_bytes=path.stat().st_size,
        duration_s=facts.duration_s,
        has_video=facts.has_video and not facts.is_image,
        has_audio=facts.has_audio,
        has_image=facts.has_video,
    )


def record_of(path: Path, root: Path, *, uid: str = "", text: str = "They frown.") -> Record:
    clip = clip_of(path)
    described = [
        Description(kind="visual_objective", text="A person in front of a wall."),
        Description(kind="multimodal", text=text, target="emotion"),
    ]
    if clip.has_audio:
        described.append(Description(kind="audio_tone", text="A low voice."))
    return Record(
        uid=uid or f"c/{path.name}",
        media=path.relative_to(root).as_posix(),
        clip=clip,
        emotion="sad",
        subtitles=(Subtitle(text="The train leaves.", language="en"),),
        peak=Peak(index=6) if clip.has_video else None,
        descriptions=tuple(described),
    )


def write_records(root: Path, records: Sequence[Record]) -> Path:
    space = LabelSpace(name="emotions", labels=("happy", "sad"))
    header = Header(media_root=".", label_spaces={"emotion": space})
    path = root / "m.parquet"
    write_manifest(path, Manifest(header=header, records=tuple(records)))
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of five generated clips; one is an .avi, which Chromium does not play."""
    root = tmp_path_factory.mktemp("review")
    write_demo_corpus(root, n_clips=4)
    avi = write(
        root / "media" / "old.avi", video="mpeg4", audio="mp3", sound=sine(300, 2, 44100, 2), n=50
    )
    paths = [*sorted((root / "media").glob("*.mp4")), avi]
    return write_records(root, [record_of(path, root) for path in paths])


def opened(page: Page, served: Served) -> None:
    page.goto(served.url)
    page.wait_for_selector("#work:not([hidden]) #aspects .aspect, #done:not([hidden])")


def uid(page: Page) -> str:
    return page.inner_text("#uid")


def wait_rated(page: Page, n: int, of: int) -> None:
    page.wait_for_function(
        "text => document.getElementById('count').textContent === text", arg=f"{n} of {of} rated"
    )


def wait_other(page: Page, before: str) -> None:
    page.wait_for_function(
        "before => document.getElementById('uid').textContent !== before", arg=before
    )


def verdicts(k: int, n: int) -> list[str]:
    """Return verdicts that differ between raters and items."""
    return ["reject" if (3 * k + 2 * at + n) % 4 == 0 else "accept" for at in range(5)]


def ratings_of(path: Path) -> dict[str, dict[str, Rating]]:
    found: dict[str, dict[str, Rating]] = {}
    for rating in read_ratings(path):
        found.setdefault(rating.rater, {})[rating.uid] = rating
    return found


# ---------------------------------------------------------------------------- rating


@pytest.mark.fault("kill -9 of the review server")
def test_two_raters_by_mouse_and_keyboard_and_kappa(
    page: Page, corpus: Path, tmp_path: Path
) -> None:
    ratings = tmp_path / "r.jsonl"
    meant: dict[str, dict[str, list[str]]] = {"ann": {}, "bob": {}}

    def by_mouse(k: int) -> None:
        here = uid(page)
        meant["ann"][here] = verdicts(k, 1)
        buttons = page.locator("#aspects .aspect")
        for at, verdict in enumerate(meant["ann"][here]):
            buttons.nth(at).locator(f"button.{verdict}").click()
        page.click("#save")
        wait_rated(page, k + 1, 5)

    with Served(corpus, ratings, "ann") as served:
        opened(page, served)
        by_mouse(0)
        by_mouse(1)
        third = uid(page)
        page.reload()  # in the middle
        page.wait_for_selector("#aspects .aspect")
        assert uid(page) == third
        wait_rated(page, 2, 5)
        served.kill()
    with Served(corpus, ratings, "ann") as served:
        opened(page, served)
        assert uid(page) == third
        for k in (2, 3, 4):
            by_mouse(k)
        page.wait_for_selector("#done:not([hidden])")
        assert str(ratings) in page.inner_text("#done")

    with Served(corpus, ratings, "bob") as served:
        opened(page, served)
        for k in range(5):
            here = uid(page)
            meant["bob"][here] = verdicts(k, 3)
            for verdict in meant["bob"][here]:
                page.keyboard.press(verdict[0])
            if k == 2:  # what was said can be changed before it is saved
                for _ in range(5):
                    page.keyboard.press("ArrowUp")
                page.keyboard.press("r")
                meant["bob"][here][0] = "reject"
            page.keyboard.press("c")
            page.keyboard.type("a remark, r and a are letters here")
            page.keyboard.press("Escape")
            page.keyboard.press("Enter")
            wait_rated(page, k + 1, 5)

    found = ratings_of(ratings)
    assert len(ratings.read_text().splitlines()) == 10
    assert list(meant["ann"]) == list(meant["bob"])  # the same items in the same order
    for rater, items in meant.items():
        for item, values in items.items():
            assert found[rater][item].aspects == dict(zip(ASPECTS, values, strict=True))
    assert {r.comment for r in found["bob"].values()} == {"a remark, r and a are letters here"}
    (pair,) = agreement(read_ratings(ratings)).pairs
    first = [value for values in meant["ann"].values() for value in values]
    second = [value for values in meant["bob"].values() for value in values]
    assert pair.all_aspects.n == 25
    assert pair.all_aspects.kappa == pytest.approx(cohen_kappa_score(first, second), abs=1e-12)
    for at, aspect in enumerate(ASPECTS):
        columns = [[values[at] for values in meant[rater].values()] for rater in ("ann", "bob")]
        if len({*columns[0], *columns[1]}) > 1:
            expected = cohen_kappa_score(*columns)
            assert pair.by_aspect[aspect].kappa == pytest.approx(expected, abs=1e-12)


def test_scores_are_asked_for_on_the_graded_scale(page: Page, corpus: Path, tmp_path: Path) -> None:
    ratings = tmp_path / "r.jsonl"
    with Served(corpus, ratings, "ann", "--scale", "graded", "--n", "2") as served:
        opened(page, served)
        first = uid(page)
        page.keyboard.press("Shift+A")
        page.keyboard.press("Enter")
        assert page.inner_text("#status") == "Still to judge: the score"
        page.keyboard.press("4")
        page.keyboard.press("Enter")
        wait_rated(page, 1, 2)
        page.click("#scores button:nth-child(1)")
        page.keyboard.press("a")
        page.keyboard.press("Enter")
        assert page.inner_text("#status").startswith("Still to judge: Audio clues, Text clues")
        page.click("#all")
        page.click("#save")
        page.wait_for_selector("#done:not([hidden])")
        # Going back shows what was said, and another word of it is another line.
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(
            "uid => document.getElementById('uid').textContent === uid", arg=first
        )
        assert page.get_attribute("#scores button:nth-child(5)", "aria-pressed") == "true"
        page.keyboard.press("2")
        page.keyboard.press("Enter")
        page.wait_for_selector("#done:not([hidden])")
    lines = list(read_ratings(ratings))
    assert [rating.score for rating in lines] == [4, 0, 2]
    assert ratings_of(ratings)["ann"][first].score == 2


@pytest.mark.fault("kill -9 of the review server")
def test_what_could_not_be_saved_is_said_and_not_lost(
    page: Page, corpus: Path, tmp_path: Path
) -> None:
    ratings = tmp_path / "r.jsonl"
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = str(probe_socket.getsockname()[1])
    with Served(corpus, ratings, "ann", "--port", port) as served:
        opened(page, served)
        page.keyboard.press("r")
        page.keyboard.press("Shift+A")
        served.kill()
        page.keyboard.press("Enter")
        page.wait_for_selector("#status.bad")
        assert "Not saved: The server does not answer" in page.inner_text("#status")
    assert not ratings.exists()
    with Served(corpus, ratings, "ann", "--port", port) as served:
        opened(page, served)
        assert page.locator("#aspects button[aria-pressed=true]").count() == 5
        page.keyboard.press("Enter")
        wait_rated(page, 1, 5)
    (rating,) = read_ratings(ratings)
    assert list(rating.aspects.values()) == ["reject", *["accept"] * 4]


# ---------------------------------------------------------------------------- what is shown


def test_hostile_text_stays_text(page: Page, tmp_path: Path) -> None:
    path = write(tmp_path / "clip.mp4", n=10)
    record = record_of(path, tmp_path, uid=f"c/{HOSTILE}", text=f"They frown. {HOSTILE}")
    hostile = record.model_copy(
        update={
            "subtitles": (Subtitle(text=HOSTILE, language="<b>en</b>", origin="<i>x</i>"),),
            "descriptions": (
                *record.descriptions,
                Description(kind="visual_expression", text="</p></section><h1>Out</h1>"),
            ),
        }
    )
    manifest = write_records(tmp_path, [hostile])
    with Served(manifest, tmp_path / "r.jsonl", HOSTILE[:80]) as served:
        opened(page, served)
        page.wait_for_selector("#strip button")
        assert page.evaluate("window.hacked") is None
        assert page.title() == "Review of annotations"
        assert page.text_content("#text") == f"They frown. {HOSTILE}"
        assert page.text_content("#uid") == f"c/{HOSTILE}"
        texts = page.locator("#clues p").all_text_contents()
        assert HOSTILE in texts
        assert "</p></section><h1>Out</h1>" in texts
        assert page.locator("h1").count() == 1
        assert page.locator("img[src='x'], #clues b, #clues i").count() == 0
        page.keyboard.press("Shift+A")
        page.keyboard.press("Enter")
        page.wait_for_selector("#done:not([hidden])")
        assert page.evaluate("window.hacked") is None
    assert next(iter(read_ratings(tmp_path / "r.jsonl"))).uid == f"c/{HOSTILE}"


def test_a_video_plays_and_goes_to_its_peak(page: Page, corpus: Path, tmp_path: Path) -> None:
    with Served(corpus, tmp_path / "r.jsonl", "ann") as served:
        opened(page, served)
        while not uid(page).endswith(".mp4"):
            before = uid(page)
            page.keyboard.press("ArrowRight")
            wait_other(page, before)
        page.wait_for_selector("#strip button.peak")
        page.wait_for_function("() => document.getElementById('video').readyState >= 2")
        assert page.evaluate("document.getElementById('video').videoWidth") > 0
        assert page.is_hidden("#audio")
        page.keyboard.press("p")
        page.wait_for_function("() => document.getElementById('video').currentTime > 0.3")
        # Frame 6 of a clip with 15 frames a second.
        assert page.evaluate("document.getElementById('video').currentTime") == pytest.approx(0.4)
        assert page.text_content("#about-media") == "◆ Peak: frame 6 at 0.40 s"
        page.evaluate("document.getElementById('video').muted = true")
        page.keyboard.press("Space")
        page.wait_for_function("() => document.getElementById('video').currentTime > 0.6")


def shown_of(page: Page) -> dict[str, Any]:
    """Wait until the clip is there in some way, and return how."""
    page.wait_for_function(
        """() => {
          const [video, still, audio] = ['video', 'still', 'audio'].map(id => document.getElementById(id));
          const strip = document.querySelectorAll('#strip img').length > 0;
          if (!video.hidden) return video.readyState >= 2 && video.videoWidth > 0 && strip;
          if (!still.hidden) return still.complete && still.naturalWidth > 0 && strip;
          return !audio.hidden && audio.readyState >= 2;
        }"""
    )
    return page.evaluate(
        """() => Object.fromEntries(['video', 'still', 'audio'].map(id =>
             [id, !document.getElementById(id).hidden]))"""
    )


def test_a_file_that_the_browser_cannot_play_comes_as_frames_and_sound(
    page: Page, corpus: Path, tmp_path: Path
) -> None:
    with Served(corpus, tmp_path / "r.jsonl", "ann") as served:
        opened(page, served)
        while not uid(page).endswith(".avi"):
            before = uid(page)
            page.keyboard.press("ArrowRight")
            wait_other(page, before)
        page.wait_for_selector("#audio:not([hidden])")
        assert shown_of(page) == {"video": False, "still": True, "audio": True}
        assert "cannot play the file" in page.inner_text("#about-media")
        assert page.get_attribute("#still", "src").endswith("/frames/6.jpg")  # type: ignore[union-attr]
        page.wait_for_function("() => document.getElementById('audio').readyState >= 2")
        page.click("#strip button:last-child")
        page.wait_for_function("() => document.getElementById('audio').currentTime > 1")


def test_real_clips_are_shown_each_in_its_way(
    page: Page, shared_clips: Path, tmp_path: Path
) -> None:
    ways = {
        "friday.mp4": "video",
        "portrait.MOV": "video",
        "asl_sorry.mkv": "video",
        "no_duration.webm": "video",
        "grid_bbaf2n.mpg": "still+audio",
        "grid_sbia1a.avi": "still+audio",
        "emodb_03a07Wc.wav": "audio",
        "jfk.flac": "audio",
        "astronaut.png": "still",
    }
    for name in ways:
        shutil.copy(shared_clips / name, tmp_path / name)
    manifest = write_records(tmp_path, [record_of(tmp_path / name, tmp_path) for name in ways])
    found = {}
    with Served(manifest, tmp_path / "r.jsonl", "ann") as served:
        opened(page, served)
        for _ in ways:
            here = uid(page)
            name = here.partition("/")[2]
            if ways[name] == "still+audio":
                page.wait_for_selector("#audio:not([hidden])")
            found[name] = "+".join(way for way, shown in shown_of(page).items() if shown)
            if len(found) < len(ways):
                page.keyboard.press("ArrowRight")
                wait_other(page, here)
    assert found == ways


@pytest.mark.parametrize(("width", "height"), [(1440, 900), (390, 844)])
def test_the_page_fits_its_window(
    page: Page, corpus: Path, tmp_path: Path, width: int, height: int
) -> None:
    page.set_viewport_size({"width": width, "height": height})
    with Served(corpus, tmp_path / "r.jsonl", "ann", "--scale", "graded") as served:
        opened(page, served)
        page.wait_for_selector("#strip button")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = {name: page.locator(name).bounding_box() for name in ("#stage", "#clues", "#right")}
        assert all(box is not None and box["width"] > 0.3 * width - 50 for box in boxes.values())
        if width > 1000:  # everything that is clicked is in sight without scrolling
            save = page.locator("#save").bounding_box()
            assert save is not None
            assert save["y"] + save["height"] < height
