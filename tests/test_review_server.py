"""The review page over HTTP: who is let in, what is sent, and what is never sent."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cache.clip import Clip, Description, Record, Subtitle, file_sha256
from cache.errors import SchemaError
from eval.review.server import ReviewServer, byte_range
from eval.review.session import ReviewSession
from extract.annotate.people.review import RatingsFile, Sampling, draw_sample, read_ratings
from tests.media import sine, write_clip, write_wav

HOSTILE = "</script><script>alert(1)</script>"


def described(uid: str, media: str, clip: Clip | None = None) -> Record:
    return Record(
        uid=uid,
        media=media,
        clip=clip,
        emotion="sad",
        subtitles=(Subtitle(text=f"Hello {HOSTILE}", language="en"),),
        descriptions=(
            Description(kind="visual_objective", text="A person."),
            Description(kind="audio_tone", text="A low voice."),
            Description(kind="multimodal", text=f"They frown. {HOSTILE}", target="emotion"),
        ),
    )


def clip_of(path: Path) -> Clip:
    return Clip(sha256=file_sha256(path), n_bytes=path.stat().st_size, has_video=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with a clip, a sound, a link that leaves it, and a file that changed."""
    folder = tmp_path / "media"
    folder.mkdir()
    write_clip(folder / "clip.mp4")
    write_wav(folder / "sound.wav", (sine(300, 1, 16000, 1)[0] * 2**15).astype("int16"), 16000)
    (folder / "text.html").write_text("<script>alert(1)</script>")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.mp4").symlink_to(tmp_path / "secret.txt")
    (folder / "folder.mp4").mkdir()
    return folder


@pytest.fixture
def server(root: Path, tmp_path: Path) -> Iterator[ReviewServer]:
    clip = clip_of(root / "clip.mp4")
    records = [
        described("c/clip", "clip.mp4", clip),
        described("c/sound", "sound.wav"),
        described("c/link", "link.mp4"),
        described("c/missing", "missing.mp4"),
        described("c/changed", "clip.mp4", clip.model_copy(update={"sha256": "0" * 64})),
        described("c/folder", "folder.mp4"),
        described("c/html", "text.html"),
    ]
    sample = draw_sample(records, Sampling())
    session = ReviewSession(sample, root, RatingsFile(tmp_path / "r.jsonl"), rater="ann")
    with ReviewServer(session) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield found
        found.shutdown()
        thread.join()
    session.close()


def number_of(server: ReviewServer, uid: str) -> int:
    return [item.uid for _, item in server.session.sample.items].index(uid)


class Answer:
    def __init__(self, got: http.client.HTTPResponse) -> None:
        self.status, self.headers, self.body = got.status, got.headers, got.read()

    @property
    def told(self) -> dict:
        return json.loads(self.body)


def ask(
    server: ReviewServer,
    path: str,
    method: str = "GET",
    *,
    token: str | None = None,
    body: bytes | None = None,
    **headers: str,
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        where = f"/{server.token if token is None else token}/{path}"
        connection.request(method, where, body=body, headers=named)
        return Answer(connection.getresponse())
    finally:
        connection.close()


def decision(server: ReviewServer, uid: str, **changes: object) -> bytes:
    number = number_of(server, uid)
    item = ask(server, f"items/{number}").told
    said = {
        "number": number,
        "digest": item["digest"],
        "aspects": dict.fromkeys(item["aspects"], "accept"),
        **changes,
    }
    return json.dumps(said).encode()


def rate(server: ReviewServer, body: bytes, **headers: str) -> Answer:
    given = {"Content_Type": "application/json"} | headers
    return ask(server, "ratings", "POST", body=body, **given)


# ---------------------------------------------------------------------------- who is let in


def test_nothing_without_the_token(server: ReviewServer) -> None:
    assert len(server.token) >= 32
    for token in ("", "wrong", server.token[:-1], server.token + "x", "ä" * 32):
        path = "/".join(("", *([token.encode().decode("latin-1")] if token else []), "session"))
        with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1"))
            assert raw.recv(4096).split(b" ")[1] == b"404"
    assert ask(server, "session").status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),  # a tunnel has a port of its own
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("10.0.0.1", 421),
        ("[", 421),
        ("", 421),
    ],
)
def test_a_rebound_name_is_refused(server: ReviewServer, host: str, status: int) -> None:
    assert ask(server, "session", Host=host).status == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 403),
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_another_origin_cannot_write(
    server: ReviewServer, headers: dict[str, str], status: int
) -> None:
    answer = rate(server, decision(server, "c/clip"), **headers)
    assert answer.status == status
    path = server.session._ratings.path
    assert path.exists() == (status == 200)


def test_another_origin_reads_nothing_but_a_link_opens_the_page(server: ReviewServer) -> None:
    assert ask(server, "session", Sec_Fetch_Site="cross-site").status == 403
    assert ask(server, "", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200
    answer = ask(server, "session", "OPTIONS")
    assert answer.status == 501  # no preflight is ever granted
    assert "Access-Control-Allow-Origin" not in ask(server, "session").headers


def test_what_a_form_can_send_is_no_rating(server: ReviewServer) -> None:
    body = decision(server, "c/clip")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert rate(server, body, Content_Type=kind).status == 415


@pytest.mark.parametrize("part", ["", "session", "review.js", "review.css", "items/0", "nothing"])
def test_every_answer_says_what_a_browser_may_do_with_it(server: ReviewServer, part: str) -> None:
    headers = ask(server, part).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


def test_the_page_itself_holds_no_text_of_the_manifest(server: ReviewServer) -> None:
    page = ask(server, "").body
    assert b"frown" not in page
    assert re.search(rb"<script(?! src=)|\son\w+=|style=", page) is None
    item = ask(server, f"items/{number_of(server, 'c/clip')}")
    assert item.headers["Content-Type"].startswith("application/json")
    assert item.told["description"] == f"They frown. {HOSTILE}"


# ---------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "path",
    [
        "../../etc/passwd",
        "items/0/../../../etc/passwd",
        "items/0/media/../../secret.txt",
        "items/%2e%2e/media",
        "items/..%2f..%2fsecret.txt",
        "review_server.py",
        "templates/report.html.j2",
        "items/99/media",
        "items/-1/media",
        "items/999999999999/media",
        "items/0/frames/../../../x.jpg",
        "//etc/passwd",
    ],
)
def test_no_path_of_a_request_reaches_the_disk(server: ReviewServer, path: str) -> None:
    answer = ask(server, path)
    assert answer.status == 404
    assert b"secret" not in answer.body.replace(path.encode(), b"")


@pytest.mark.parametrize(
    ("uid", "words"),
    [
        ("c/link", "leaves the media root"),
        ("c/missing", "is not there"),
        ("c/changed", "is not the file that was annotated"),
        ("c/folder", "is not a file"),
    ],
)
def test_a_file_that_cannot_be_shown_says_why(server: ReviewServer, uid: str, words: str) -> None:
    number = number_of(server, uid)
    assert words in ask(server, f"items/{number}").told["problem"]
    for part in ("media", "sound.wav", "frames/0.jpg"):
        assert ask(server, f"items/{number}/{part}").status == 404
    assert words in ask(server, f"items/{number}/strip").told["problems"][0]


def test_a_file_of_another_kind_is_nothing_to_run(server: ReviewServer) -> None:
    answer = ask(server, f"items/{number_of(server, 'c/html')}/media")
    assert answer.headers["Content-Type"] == "application/octet-stream"


@pytest.mark.parametrize(
    ("asked", "status", "first", "last"),
    [
        (None, 200, 0, None),
        ("bytes=0-", 206, 0, None),
        ("bytes=10-19", 206, 10, 19),
        ("bytes=10-99999999", 206, 10, None),
        ("bytes=-7", 206, -7, None),
        ("bytes=0-0", 206, 0, 0),
        ("bytes=5-2", 200, 0, None),
        ("bytes=0-1,4-5", 200, 0, None),
        ("lines=0-1", 200, 0, None),
        ("bytes=99999999-", 416, None, None),
        ("bytes=-0", 416, None, None),
    ],
)
def test_a_video_is_sent_in_parts(
    server: ReviewServer, root: Path, asked: str | None, status: int, first: int, last: int | None
) -> None:
    data = (root / "clip.mp4").read_bytes()
    path = f"items/{number_of(server, 'c/clip')}/media"
    headers = {} if asked is None else {"Range": asked}
    answer = ask(server, path, **headers)
    assert answer.status == status
    if status == 416:
        assert answer.headers["Content-Range"] == f"bytes */{len(data)}"
        return
    assert answer.body == data[first : None if last is None else last + 1]
    assert answer.headers["Content-Type"] == "video/mp4"
    if status == 206:
        start, end, size = re.findall(r"\d+", answer.headers["Content-Range"])
        assert data[int(start) : int(end) + 1] == answer.body
        assert int(size) == len(data)
    head = ask(server, path, "HEAD", **headers)
    assert (head.status, head.body) == (status, b"")
    assert head.headers["Content-Length"] == str(len(answer.body))


def test_byte_ranges_of_an_empty_file() -> None:
    assert byte_range("bytes=0-", 0) == "unsatisfiable"
    assert byte_range("bytes=-5", 0) == "unsatisfiable"
    assert byte_range("bytes=-", 10) is None


def test_frames_and_sound_come_from_the_decoder(server: ReviewServer) -> None:
    number = number_of(server, "c/clip")
    strip = ask(server, f"items/{number}/strip").told
    assert strip["sound"]
    assert not strip["problems"]
    # 12 uniform frames of 25, and the middle one: the record has no peak.
    times = [frame["pts_s"] for frame in strip["frames"]]
    assert times == sorted(times)
    assert 12 <= len(times) <= 13
    frame = ask(server, f"items/{number}/frames/{strip['frames'][3]['index']}.jpg")
    assert frame.body.startswith(b"\xff\xd8")
    assert ask(server, f"items/{number}/frames/999.jpg").status == 404
    sound = ask(server, f"items/{number}/sound.wav", Range="bytes=0-3")
    assert (sound.status, sound.body) == (206, b"RIFF")


# ---------------------------------------------------------------------------- ratings


def test_a_rating_is_on_the_disk_before_the_answer(server: ReviewServer, tmp_path: Path) -> None:
    body = decision(server, "c/clip", comment="  fine ")
    assert rate(server, body).told == {"n_rated": 1, "n": 7}
    (rating,) = read_ratings(tmp_path / "r.jsonl")
    assert (rating.rater, rating.uid, rating.comment) == ("ann", "c/clip", "fine")
    assert set(rating.aspects.values()) == {"accept"}
    assert (rating.target, rating.label, rating.score) == ("emotion", "sad", None)
    item = ask(server, f"items/{number_of(server, 'c/clip')}").told
    assert item["rating"]["comment"] == "fine"
    assert ask(server, "session").told["rated"].count(True) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": "0" * 64}, "other texts"),
        ({"number": 99}, "no item 99"),
        ({"aspects": {"label": "accept"}}, "missing"),
        ({"aspects": {"label": "maybe"}}, "aspects.label"),
        ({"aspects": {"smell": "accept"}}, "smell"),
        ({"score": 3}, "no score"),
        ({"score": "3"}, "score"),
        ({"comment": "x" * 5000}, "comment"),
        ({"rater": "bob"}, "unknown field"),
    ],
)
def test_a_rating_that_does_not_fit_is_refused(
    server: ReviewServer, changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    answer = rate(server, decision(server, "c/clip", **changes))
    assert answer.status == 400
    assert words in answer.told["error"]
    assert not (tmp_path / "r.jsonl").exists()


def test_a_body_that_is_no_rating_is_refused(server: ReviewServer) -> None:
    assert rate(server, b"{").status == 400
    assert rate(server, b"x" * 70_000).status == 413
    assert rate(server, b"{}", Content_Length="-1").status == 413
    assert ask(server, "items/0", "POST", body=b"{}").status == 404


@pytest.mark.fault("full disk")
def test_a_full_disk_is_told_and_nothing_counts(
    server: ReviewServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = decision(server, "c/clip")

    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        answer = rate(server, body)
    assert answer.status == 507
    assert "No space left" in answer.told["error"]
    assert server.session.n_rated == 0
    assert rate(server, body).status == 200


@pytest.mark.fault("connection cut")
def test_a_cut_connection_ends_itself_alone(server: ReviewServer) -> None:
    for sent in (
        b"",
        b"GET /",
        b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n1",
    ):
        with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
            raw.sendall(sent)
    assert ask(server, "session").status == 200


def test_a_port_that_is_taken_is_refused(server: ReviewServer) -> None:
    with pytest.raises(SchemaError, match=r"cannot listen on --host 127\.0\.0\.1 --port"):
        ReviewServer(server.session, port=server.server_port)


def test_the_url_opens_the_page(server: ReviewServer) -> None:
    parts = urlsplit(server.url)
    assert (parts.hostname, parts.port) == ("127.0.0.1", server.server_port)
    assert parts.path == f"/{server.token}/"
    assert server.is_local


def test_a_server_for_others_takes_addresses_but_no_foreign_names(server: ReviewServer) -> None:
    with ReviewServer(server.session, host="0.0.0.0") as other:
        assert not other.is_local
        assert other.accepts_host("192.0.2.7:8000")
        assert other.accepts_host(f"{socket.gethostname()}:80")
        assert not other.accepts_host("evil.example")
