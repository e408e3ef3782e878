"""The page `emocache app` without a browser: its uploads, its line, its guard, its words."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

import emocache
from cache.errors import MediaError, SchemaError
from eval.live import looks
from eval.live.app import AppServer
from eval.live.clip import SeenClip
from eval.live.guard import Guard
from eval.live.jobs import JobLine, Say, Waiting
from eval.live.page import Page
from eval.live.uploads import (
    BusyError,
    PageLimits,
    TooLargeError,
    Uploads,
    remove_left_behind,
)
from tests.app_fakes import HOSTILE, LABELS, REPOSITORY, THOUGHT, FakeModel

SMALL = PageLimits(max_bytes=100, max_waiting=2, max_clips=3)


async def blocks(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def give(uploads: Uploads, *parts: bytes, stated: int | None = None) -> str:
    return asyncio.run(uploads.receive(blocks(*parts), stated))


def files(uploads: Uploads) -> list[Path]:
    return [path for path in uploads.folder.iterdir() if path.name != "lock"]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def uploads(tmp_path: Path, clock: Clock) -> Any:
    with Uploads(SMALL, tmp_path, clock) as found:
        yield found


# ---------------------------------------------------------------------------- uploads


def test_a_clip_comes_under_a_name_of_ours_that_only_we_can_read(uploads: Uploads) -> None:
    first, second = give(uploads, b"ab", b"cd"), give(uploads, b"abcd", stated=4)
    assert first != second
    assert len(first) >= 20
    assert [path.read_bytes() for path in files(uploads)] == [b"abcd"] * 2
    assert stat.S_IMODE(uploads.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("parts", "stated", "error", "words"),
    [
        ([], None, MediaError, "empty .0 bytes."),
        ([b""], 0, MediaError, "empty .0 bytes."),
        ([b"x" * 60, b"x" * 60], None, TooLargeError, "larger than 0.0001 MB"),
        ([b"x"], 101, TooLargeError, "larger than"),
        ([b"abc"], 7, MediaError, "did not arrive whole"),
    ],
)
def test_what_is_no_clip_is_refused_and_leaves_no_file(
    uploads: Uploads, parts: list[bytes], stated: int | None, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        give(uploads, *parts, stated=stated)
    assert files(uploads) == []
    assert len(uploads) == 0


def test_a_sender_that_goes_away_or_dawdles_leaves_no_file(
    uploads: Uploads, tmp_path: Path
) -> None:
    async def gone() -> AsyncIterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    async def slow() -> AsyncIterator[bytes]:
        yield b"a"
        await asyncio.sleep(60)
        yield b"b"

    with pytest.raises(ConnectionResetError):
        asyncio.run(uploads.receive(gone(), None))
    assert files(uploads) == []
    with Uploads(PageLimits(max_upload_s=0.02), tmp_path) as hasty:
        with pytest.raises(MediaError, match=r"did not arrive within 0\.02 s"):
            asyncio.run(hasty.receive(slow(), None))
        assert files(hasty) == []


def test_so_many_may_send_at_once(uploads: Uploads) -> None:
    async def at_once() -> list[Any]:
        begun = asyncio.Event()

        async def waiting() -> AsyncIterator[bytes]:
            yield b"a"
            await begun.wait()

        sending = [asyncio.create_task(uploads.receive(waiting(), None)) for _ in range(4)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        begun.set()
        return await asyncio.gather(*sending, return_exceptions=True)

    found = asyncio.run(at_once())
    assert sum(isinstance(one, BusyError) for one in found) == 1
    assert sum(isinstance(one, str) for one in found) == 3


def test_the_file_goes_after_a_job_and_what_was_seen_stays(uploads: Uploads) -> None:
    clip = give(uploads, b"abc")
    with uploads.in_hand(clip) as upload:
        assert upload.path.read_bytes() == b"abc"
        upload.seen = "tokens"  # type: ignore[assignment]
    assert files(uploads) == []
    with uploads.in_hand(clip) as upload:
        assert upload.seen == "tokens"
    uploads.forget(clip)
    uploads.forget(clip)
    with pytest.raises(MediaError, match="not here any more"), uploads.in_hand(clip):
        pass


def test_the_file_goes_after_an_error_too_and_the_clip_with_it(uploads: Uploads) -> None:
    clip = give(uploads, b"abc")
    with pytest.raises(RuntimeError), uploads.in_hand(clip):
        raise RuntimeError
    assert files(uploads) == []
    with pytest.raises(MediaError), uploads.in_hand(clip):
        pass


def test_a_job_does_not_take_the_file_from_another(uploads: Uploads) -> None:
    clip = give(uploads, b"abc")
    with uploads.in_hand(clip) as upload:
        with pytest.raises(RuntimeError), uploads.in_hand(clip):
            raise RuntimeError
        assert upload.path.exists()
    assert files(uploads) == []


def test_nobody_reaches_a_file_by_a_path(uploads: Uploads) -> None:
    (uploads.folder.parent / "other").write_text("not yours")
    for name in ("../other", "/etc/passwd", "lock", ""):
        uploads.forget(name)
        with pytest.raises(MediaError), uploads.in_hand(name):
            pass
    assert (uploads.folder.parent / "other").exists()
    assert (uploads.folder / "lock").exists()


def test_what_nobody_asks_about_is_forgotten(uploads: Uploads, clock: Clock) -> None:
    looked, unlooked = give(uploads, b"a"), give(uploads, b"b")
    with uploads.in_hand(looked) as upload:
        upload.seen = "tokens"  # type: ignore[assignment]
    clock.now = SMALL.look_within_s + 1
    uploads.tidy()
    assert files(uploads) == []
    with pytest.raises(MediaError), uploads.in_hand(unlooked):
        pass
    clock.now += SMALL.forget_after_s - 1
    with uploads.in_hand(looked):
        clock.now += SMALL.forget_after_s + 1
        uploads.tidy()  # in hand: stays
    assert len(uploads) == 1
    clock.now += SMALL.forget_after_s + 1
    uploads.tidy()
    assert len(uploads) == 0


def test_the_oldest_make_room(uploads: Uploads, clock: Clock) -> None:
    given = []
    for at in range(5):
        clock.now = at
        given.append(give(uploads, b"a"))
    assert len(uploads) == SMALL.max_clips
    assert sorted(path.name for path in files(uploads)) == sorted(given[2:])


def test_all_is_gone_at_the_end(tmp_path: Path) -> None:
    with Uploads(SMALL, tmp_path) as found:
        give(found, b"abc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("kill -9 of the page")
def test_what_a_killed_page_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys, time\n"
        "from eval.live.uploads import PageLimits, Uploads\n"
        "async def one():\n    yield b'somebody'\n"
        "found = Uploads(PageLimits(), pathlib.Path(sys.argv[1]))\n"
        "asyncio.run(found.receive(one(), None))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    page = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )  # fmt: skip
    assert page.stdout is not None
    assert page.stdout.readline() == "ready\n"
    (left,) = tmp_path.iterdir()
    assert len(list(left.iterdir())) == 2
    assert remove_left_behind(tmp_path) == 0, "its page lives"
    page.kill()
    page.communicate()
    assert left.exists()
    (tmp_path / "emocache-app-x").symlink_to(left)
    (tmp_path / "other").mkdir()
    with Uploads(SMALL, tmp_path) as found:
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
            [found.folder.name, "emocache-app-x", "other"]
        )


# ---------------------------------------------------------------------------- the line


async def followed(line: JobLine, work: Callable[[Say], Any]) -> list[Any]:
    return [told async for told in line.submit(work).follow()]


def test_a_job_says_how_far_it_is_and_what_came_of_it() -> None:
    def work(say: Say) -> str:
        say("half")
        time.sleep(0.05)
        return "whole"

    async def test() -> None:
        line = JobLine(1, 1)
        told = [one for one in await followed(line, work) if not isinstance(one, Waiting)]
        assert told == ["half", "whole"]
        with pytest.raises(ZeroDivisionError):
            await followed(line, lambda say: 1 // 0)
        assert (await followed(line, work))[-1] == "whole", "an error takes no place in the line"
        line.close()

    asyncio.run(test())


def test_so_many_run_so_many_wait_and_no_more() -> None:
    running, most = 0, 0
    guard, go = threading.Lock(), threading.Event()

    def work(say: Say) -> int:
        nonlocal running, most
        with guard:
            running += 1
            most = max(most, running)
        go.wait(20)
        with guard:
            running -= 1
        return 1

    async def test() -> None:
        line = JobLine(2, 3)
        jobs = [asyncio.create_task(followed(line, work)) for _ in range(5)]
        await asyncio.sleep(0.1)
        with pytest.raises(BusyError, match="5 questions are being answered or wait already"):
            line.submit(work)
        go.set()
        told = await asyncio.gather(*jobs)
        assert [one[-1] for one in told] == [1] * 5
        assert max(w.n_ahead for one in told for w in one if isinstance(w, Waiting)) == 4
        line.submit(work)
        line.close()

    asyncio.run(test())
    assert most == 2


def test_a_job_that_nobody_follows_stops_or_never_begins() -> None:
    began: list[str] = []
    ended = threading.Event()

    def work(say: Say) -> None:
        began.append("first")
        try:
            for at in range(2000):
                say(at)
                time.sleep(0.01)
        finally:
            ended.set()

    async def test() -> None:
        line = JobLine(1, 2)
        first = line.submit(work).follow()
        assert await anext(first) is not None
        second = line.submit(lambda say: began.append("second")).follow()
        assert isinstance(await anext(second), Waiting)
        await second.aclose()
        async for told in first:
            if told == 3 or (isinstance(told, int) and told > 3):
                break
        await first.aclose()
        assert await asyncio.to_thread(ended.wait, 10)
        assert (await followed(line, lambda say: "free"))[-1] == "free"
        line.close()

    asyncio.run(test())
    assert began == ["first"]


# ---------------------------------------------------------------------------- the guard


async def _answers(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"access-control-allow-origin", b"*"), (b"x-own", b"1")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": f"{message['type']} {len(body)}".encode()})


def asked(
    method: str,
    path: str,
    *parts: bytes,
    **headers: str,
) -> tuple[int, dict[str, str], bytes]:
    """Return status, headers and body of one request to a guard on a loopback address."""
    given = {"host": "127.0.0.1:7860", **{k.replace("_", "-"): v for k, v in headers.items()}}
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }
    waiting = [
        {"type": "http.request", "body": part, "more_body": at < len(parts) - 1}
        for at, part in enumerate(parts or (b"",))
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(_answers, "127.0.0.1")(scope, receive, send))
    start, *rest = sent
    told = {name.decode(): value.decode() for name, value in start["headers"]}
    return start["status"], told, b"".join(m["body"] for m in rest)


PASSING = """
GET /
HEAD /
GET /config
GET /theme.css
GET /assets/index-a_b.js
GET /static/js/iframeResizer.contentWindow.min.js
GET /gradio_api/queue/data
POST /gradio_api/queue/join
GET /gradio_api/heartbeat/abc123
POST /clips
POST /clips/a-B_3/forget
GET /examples/0
"""


@pytest.mark.parametrize("request_line", PASSING.split("\n")[1:-1])
def test_what_the_page_asks_for_passes_with_our_headers(request_line: str) -> None:
    method, path = request_line.split()
    question = [b"{}"] if path.startswith("/gradio_api") and method == "POST" else []
    status, headers, _ = asked(method, path, *question)
    assert status == 200
    assert headers["x-own"] == "1"
    assert "access-control-allow-origin" not in headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "http" not in headers["content-security-policy"].replace("https:", "http:")
    assert headers["x-content-type-options"] == "nosniff"


NOT_THERE = """
GET /gradio_api/file=/etc/passwd
GET /file=/etc/passwd
POST /gradio_api/upload
GET /gradio_api/proxy=http://example.org/
POST /gradio_api/run/look
GET /monitoring
POST /gradio_api/call/look
POST /gradio_api/process_recording
GET /gradio_api/vibe-code
POST /gradio_api/vibe-edit
POST /login
GET /gradio_api/stream/a/1/2/playlist.m3u8
GET /assets/../../secret
GET /static//etc/passwd
GET /assets//etc/passwd
GET /static/
GET /static/..%2f
GET /clips
GET /clips/abc
PUT /clips
DELETE /clips/abc
OPTIONS /clips
GET /examples/../x
POST /clips/../forget
GET /docs
GET /gradio_api/openapi.json
POST /gradio_api/component_server
"""


@pytest.mark.parametrize("request_line", NOT_THERE.split("\n")[1:-1])
def test_what_the_page_has_no_use_for_is_not_there(request_line: str) -> None:
    method, path = request_line.split()
    status, headers, body = asked(method, path)
    assert status == 404
    assert body == b'{"error": "there is no such thing here"}'
    assert "content-security-policy" in headers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:7860"}, 421),
        ({"host": ""}, 421),
        ({"host": "localhost:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:1234"}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 403),
        ({"sec_fetch_site": "same-origin"}, 200),
    ],
)
def test_other_origins_and_names_are_refused(headers: dict[str, str], status: int) -> None:
    assert asked("POST", "/clips", **headers)[0] == status


def test_a_visit_from_elsewhere_opens_the_page_only() -> None:
    visit = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert asked("GET", "/", **visit)[0] == 200
    assert asked("GET", "/", sec_fetch_site="cross-site")[0] == 403


def test_questions_are_short() -> None:
    join = "/gradio_api/queue/join"
    whole = json.dumps({"data": ["x" * 1000, 3, None], "fn_index": 0}).encode()
    assert asked("POST", join, whole[:500], whole[500:])[2] == f"http.request {len(whole)}".encode()
    status, _, body = asked("POST", join, *[b"x" * 100_000] * 3)
    assert (status, body) == (413, b'{"error": "a question has at most 262,144 bytes"}')
    assert asked("POST", "/clips", *[b"x" * 100_000] * 3)[2] == b"http.request 300000"


@pytest.mark.parametrize(
    "question",
    [
        {"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}], "fn_index": 0},
        {"data": [["/etc/passwd", {"path": "/etc/passwd"}]], "fn_index": 0},
        {"data": [{"url": "http://example.org/"}], "fn_index": 0},
        {"data": {"path": "/etc/passwd"}, "fn_index": 0},
        {"event_data": {"path": "/etc/passwd"}, "fn_index": 0},
        ["/etc/passwd"],
        None,
    ],
)
def test_a_question_names_no_file_and_no_address(question: Any) -> None:
    body = json.dumps(question).encode()
    assert asked("POST", "/gradio_api/queue/join", body)[0] == 422
    assert asked("POST", "/gradio_api/cancel", body)[0] == 422


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000])
def test_a_question_that_is_none(body: bytes) -> None:
    assert asked("POST", "/gradio_api/queue/join", body)[0] == 422


def test_what_is_still_answered_at_the_end_hears_of_it() -> None:
    async def endless(scope: Any, receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])
        heard.append((await receive())["type"])

    async def receive() -> Any:
        if not heard:
            return {"type": "http.request", "body": b""}
        return await asyncio.Event().wait()

    async def test() -> None:
        guard = Guard(endless, "127.0.0.1")
        headers = [(b"host", b"127.0.0.1")]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
        answering = asyncio.create_task(guard(scope, receive, receive))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        assert not answering.done()
        guard.end()
        await asyncio.wait_for(answering, 5)

    heard: list[str] = []
    asyncio.run(test())
    assert heard == ["http.request", "http.disconnect"]


def test_there_are_no_web_sockets() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(_answers, "127.0.0.1")({"type": "websocket"}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---------------------------------------------------------------------------- what is shown


@pytest.fixture
def seen(tmp_path: Path) -> Callable[[str], SeenClip]:
    """Return what looks at a clip that holds a word."""

    def look(word: str) -> SeenClip:
        path = tmp_path / "clip"
        path.write_text(word)
        return FakeModel().look(path, transcribe=False)

    return look


def test_text_stays_text(seen: Callable[[str], SeenClip]) -> None:
    shown = [looks.seen_panel(seen("hostile")), looks.told(HOSTILE), looks.escaped(HOSTILE)]
    shown.append(
        looks.answer_panel("think", wants_label=True, text=HOSTILE, likelihoods={HOSTILE: 1.0})
    )
    for part in shown:
        assert "<script" not in part
        assert "<img src=x" not in part
    assert "&lt;script&gt;" in shown[0]


@pytest.mark.parametrize(
    ("reply", "wants_label", "shown"),
    [
        ("", True, ""),
        ("happy", True, "happy"),
        ("<answer>happy</answer>", True, ""),
        ("<think>They frown.</think><answer>sad</answer>", True, "They frown."),
        ("<think>They frown.</thi", True, "They frown."),
        ("<think>They frown. 1 < 2", True, "They frown. 1 < 2"),
        ("<think>They frown.<answer>sad", True, "They frown."),
        ("<think>", True, ""),
        ("A low voice. ", False, "A low voice."),
    ],
)
def test_the_explanation_is_shown_without_its_tags(
    reply: str, wants_label: bool, shown: str
) -> None:
    html = looks.answer_panel("think", wants_label=wants_label, text=reply)
    assert (f'<p class="ec-text">{looks.escaped(shown)}</p>' in html) == bool(shown)
    assert ("ec-text" in html) == bool(shown)


def test_bars_are_shares_in_order_and_the_named_one_stands_out(
    seen: Callable[[str], SeenClip],
) -> None:
    stream = FakeModel().stream(seen("any"), "think")
    assert "".join(stream)
    html = looks.answer_panel(
        "think",
        wants_label=True,
        likelihoods={"sad": 0.25, "happy": 0.75, "angry": 0.0},
        reply=stream.reply,
        took_s=1.25,
    )
    places = [html.index(f">{label}</span>") for label in ("happy", "sad", "angry")]
    assert places == sorted(places)
    assert "width:75.00%" in html
    assert "75.0 %" in html
    assert html.count('class="is-named"') == 1
    assert "Label likelihoods" in html
    assert "12 tokens · 1.2 s" in html
    assert '<p class="ec-label">happy</p>' in html
    assert looks.escaped(THOUGHT) in html


# ---------------------------------------------------------------------------- looking and asking


class FakeGradio:
    """What the handlers use of Gradio."""

    @staticmethod
    def update(**changed: Any) -> dict[str, Any]:
        return changed

    @staticmethod
    def skip() -> str:
        return "same"


class Asked:
    """A page on a pretended model, without Gradio or a server."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.model = FakeModel()
        self.uploads = Uploads(PageLimits(**limits), folder)
        self.line = JobLine(self.uploads.limits.concurrency, self.uploads.limits.max_waiting)
        self.page = Page(self.model, self.uploads, self.line, False, (), "")  # type: ignore[arg-type]
        self.page._gradio = FakeGradio

    async def give(self, content: bytes) -> str:
        return await self.uploads.receive(blocks(content), None)

    async def look(self, clip: str, subtitle: str = "") -> list[Any]:
        return [told async for told in self.page.look(clip, subtitle, None)]

    async def ask(self, clip: str, **changed: Any) -> list[Any]:
        given = {"subtitle": "", "corpus": None, "task": "think", "labels": "", "length": 200}
        return [told async for told in self.page.ask(clip, **{**given, **changed})]


@pytest.fixture
def page(tmp_path: Path) -> Any:
    found = Asked(tmp_path)
    yield found
    found.line.close()
    found.uploads.close()


def test_a_clip_is_looked_at_once_and_asked_about_often(page: Asked) -> None:
    async def test() -> None:
        clip = await page.give(b"any clip")
        told = await page.look(clip, " Hello. ")
        assert "What the model saw" in told[-1][0]
        assert told[-1][3] == {"interactive": True}
        assert files(page.uploads) == []
        for subtitle in ("Hello.", "Bye."):
            answers = await page.ask(clip, subtitle=subtitle, labels="glad,  very sad,\nodd")
            assert THOUGHT in answers[-1][0]
            assert answers[-1][1] == {"interactive": True}
            assert "is-writing" not in answers[-1][0]
            assert any("is-writing" in one[0] for one in answers[1:-1])

    asyncio.run(test())
    (looked,) = page.model.looked
    assert looked["name"] == "upload"
    assert looked["subtitle"] == "Hello."
    assert looked["max_duration_s"] == 60
    assert [one["subtitle"] for one in page.model.asked] == [["Hello."], ["Bye."]]
    assert page.model.asked[0]["options"] == ["glad", "very sad", "odd"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"broken", "This file cannot be read as a video, a sound or a picture."),
        (b"long", "The clip lasts 2:00:00 (h:min:s), more than the 60 s that are allowed."),
        (b"crash", "Something went wrong that is not your clip&#39;s fault."),
    ],
)
def test_what_goes_wrong_is_said_in_our_words_without_a_path(
    page: Asked, content: bytes, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> str:
        clip = await page.give(content)
        told = await page.look(clip)
        assert told[-1][3] == {"interactive": False}
        assert files(page.uploads) == []
        assert len(page.uploads) == 0
        assert clip not in told[-1][0]
        return str(told[-1][0])

    shown = asyncio.run(test())
    assert words in shown
    assert str(page.uploads.folder) not in shown
    assert "--max-duration-s" not in shown
    assert 'role="alert"' in shown
    logged = [one for one in caplog.records if one.levelname == "ERROR"]
    assert bool(logged) == (content == b"crash")


def test_remarks_hold_no_path_either(page: Asked) -> None:
    async def test() -> str:
        return str((await page.look(await page.give(b"any")))[-1][0])

    shown = asyncio.run(test())
    assert "Seen from the clip." in shown
    assert str(page.uploads.folder) not in shown


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("happy", "1 labels are written; 2 to 64"),
        (", ".join(f"l{i}" for i in range(65)), "65 labels are written"),
        ("happy, Happy", "is written twice"),
        (f"happy, {'x' * 65}", "has 65 characters; at most 64"),
    ],
)
def test_labels_that_cannot_be_offered(page: Asked, labels: str, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        page.page._options("emotion", None, labels)


def test_labels_of_the_run_are_not_sent_as_others(page: Asked) -> None:
    assert page.page._options("emotion", None, ", ".join(LABELS)) is None
    assert page.page._options("emotion", None, " ") is None
    assert page.page._options("reason", None, "happy") is None
    assert page.page._options("emotion", None, "b,, a") == ["b", "a"]


def test_labels_that_the_user_wrote_stay_where_they_fit(page: Asked) -> None:
    run = ", ".join(LABELS)
    fitting = page.page.fitting_labels
    assert fitting("think", None, "calm, upset", run) == ({"visible": True}, run)
    assert fitting("reason", None, "calm, upset", run) == ({"visible": False}, run)
    assert fitting("think", None, "", run) == ({"value": run, "visible": True}, run)
    other = fitting("emotion", None, "positive, negative", "positive, negative")
    assert other == ({"value": run, "visible": True}, run)


def test_the_length_of_a_reply_is_bounded(page: Asked) -> None:
    async def test() -> None:
        clip = await page.give(b"any")
        await page.look(clip)
        await page.ask(clip, length=10**9)
        await page.ask(clip, length=-3)

    asyncio.run(test())
    assert [one["max_new_tokens"] for one in page.model.asked] == [512, 1]


def test_what_is_said_is_written_down_where_nobody_tells(page: Asked) -> None:
    page.page._transcribe = True

    async def test() -> None:
        told = await page.look(await page.give(b"speech of somebody"))
        assert told[-1][2] == {"value": "Words that were heard."}
        told = await page.look(await page.give(b"speech of somebody"), "My own words.")
        assert told[-1][2] == "same"

    asyncio.run(test())
    assert [one["transcribe"] for one in page.model.looked] == [True, False]


def test_an_unknown_clip_and_one_nobody_looked_at(page: Asked) -> None:
    async def test() -> None:
        assert "not here any more" in (await page.ask("no-such"))[-1][0]
        assert "Give a clip first" in (await page.look(""))[-1][0]
        clip = await page.give(b"any")
        assert THOUGHT in (await page.ask(clip))[-1][0]
        assert "What the model saw" in (await page.look(clip))[-1][0]
        assert files(page.uploads) == []

    asyncio.run(test())
    assert len(page.model.looked) == 1


def test_an_answer_that_nobody_waits_for_is_stopped(page: Asked) -> None:
    async def test() -> None:
        clip = await page.give(b"slow")
        await page.look(clip)
        answer = page.page.ask(clip, "", None, "think", "", 200)
        async for told in answer:
            if "word3" in told[0]:
                break
        await answer.aclose()
        until = time.monotonic() + 10
        while not page.model.closed and time.monotonic() < until:
            await asyncio.sleep(0.02)
        assert page.model.closed == 1

    asyncio.run(test())


async def shown_of(page: Asked, clip: str, until: str, then: Callable[[], None]) -> list[Any]:
    """Ask about a clip, do something once a word is shown, and return all that was."""
    shown = []
    async for told in page.page.ask(clip, "", None, "think", "", 200):
        shown.append(told)
        if until in told[0]:
            then()
            until = "nothing more"
    return shown


def test_stop_leaves_what_is_written_and_remove_takes_it_away(page: Asked) -> None:
    async def test() -> None:
        clip = await page.give(b"slow")
        await page.look(clip)
        shown = await shown_of(page, clip, "word3", lambda: page.page.stop(clip))
        assert "word3" in shown[-1][0]
        assert "is-stopped" in shown[-1][0]
        assert "is-writing" not in shown[-1][0]
        assert shown[-1][1:] == ({"interactive": True}, {"interactive": False})
        shown = await shown_of(page, clip, "word3", lambda: page.page.forget(clip))
        assert shown[-1] == ("", "same", {"interactive": False})
        page.page.stop(clip)  # nothing runs any more

    asyncio.run(test())
    assert page.page._jobs == {}


def test_who_waits_can_stop_too(page: Asked) -> None:
    async def test() -> None:
        first, second = await page.give(b"slow"), await page.give(b"any")
        await page.look(first)
        await page.look(second)
        answer = page.page.ask(first, "", None, "think", "", 200)
        async for told in answer:
            if "word1" in told[0]:
                break
        shown = await shown_of(page, second, "Waiting: 1 ahead", lambda: page.page.stop(second))
        assert "Stopped." in shown[-1][0]
        await answer.aclose()

    asyncio.run(test())
    assert len(page.model.asked) == 1, "the second one never began"


def test_a_full_line_sends_clips_away_and_deletes_them(tmp_path: Path) -> None:
    page = Asked(tmp_path, max_waiting=0)

    async def test() -> None:
        slow = await page.give(b"slow")
        await page.look(slow)
        answer = page.page.ask(slow, "", None, "think", "", 200)
        async for told in answer:
            if "word1" in told[0]:
                break
        other = await page.give(b"any")
        assert "This page is busy" in (await page.look(other))[-1][0]
        assert files(page.uploads) == []
        await answer.aclose()

    asyncio.run(test())
    page.line.close()
    page.uploads.close()


# ---------------------------------------------------------------------------- the verb


def verb(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    code = emocache.main(["app", *map(str, words)])
    told = capsys.readouterr()
    assert told.out == ""
    return code, " ".join(told.err.split())


def test_a_run_that_is_none_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, told = verb(capsys, "--run", tmp_path)
    assert code == 2
    assert str(tmp_path) in told.replace(" ", "")


def test_an_example_that_is_none_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, told = verb(capsys, "--run", tmp_path, "--example", tmp_path / "x.mp4")
    assert code == 2
    assert "there is no such file" in told


def test_a_port_in_use_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model: Any = FakeModel()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SchemaError, match=f"cannot listen on --host 127.0.0.1 --port {port}"):
            AppServer(model, SMALL, port=port)
    with pytest.raises(SchemaError, match="cannot listen on --host nowhere-at-all"):
        AppServer(model, SMALL, host="nowhere-at-all")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_gradio_is_imported_for_help() -> None:
    program = (
        "import sys, emocache\n"
        "code = emocache.main(['app', '--help'])\n"
        "assert not {'gradio', 'torch'} & sys.modules.keys()\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--max-duration-s" in done.stdout
