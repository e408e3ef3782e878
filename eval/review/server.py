"""The review page over HTTP, for one rater on this machine.

Whoever does not know the token in the URL gets nothing; a page of another origin that guesses the port
neither reads nor writes, and a name that is rebound to this machine is refused. Texts of the manifest
reach the browser as JSON alone and are set as text; the page itself holds none.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import re
import secrets
import socket
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from cache.errors import EmocacheError, SchemaError
from eval.origins import LOOPBACK, accepts_host, is_own_page
from eval.review.session import ReviewSession, media_type

logger = logging.getLogger(__name__)

_PAGE = {
    "": ("review.html", "text/html; charset=utf-8"),
    "review.js": ("review.js", "text/javascript; charset=utf-8"),
    "review.css": ("review.css", "text/css; charset=utf-8"),
}
_TEMPLATES = Path(__file__).parents[1] / "templates"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_ITEM = re.compile(r"items/(\d{1,9})(?:/(media|strip|sound\.wav|frames/(\d{1,9})\.jpg))?")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_MAX_BODY_BYTES = 64 * 1024
_BLOCK_BYTES = 256 * 1024


class ReviewServer(ThreadingHTTPServer):
    """Serves one session.

    Args:
        session: What is asked and said.
        host: Address to listen on.
        port: 0 takes a free one.
        token: What the URL must hold; None makes one up.

    Raises:
        SchemaError: The address cannot be listened on.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        session: ReviewSession,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
    ) -> None:
        self.session = session
        self.token = token or secrets.token_urlsafe(24)
        self._host = host
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            told = getattr(error, "strerror", None) or error
            raise SchemaError(
                f"cannot listen on --host {host} --port {port}: {told}. --port 0 takes a free port."
            ) from None

    def server_bind(self) -> None:
        """Bind without asking the name service who we are, which may take long."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where the page is."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        if host in ("0.0.0.0", "[::]"):
            host = socket.gethostname()
        return f"http://{host}:{self.server_port}/{self.token}/"

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return self._host in LOOPBACK

    def accepts_host(self, header: str | None) -> bool:
        """Return whether a request may name this host."""
        return accepts_host(self._host, header)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note what went wrong in one connection; others go on."""
        error = sys.exception()
        logger.warning("a request for the review page failed: %s", error, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: ReviewServer
    protocol_version = "HTTP/1.1"
    server_version = "emocache"
    sys_version = ""
    timeout = 60.0

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_HEAD(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        # Never the path: it holds the token.
        logger.debug("%s from %s", self.command, self.client_address[0])

    # ---- who asks ----------------------------------------------------------------------------

    def _answer(self, route: Callable[[str], None]) -> None:
        try:
            if not self.server.accepts_host(self.headers.get("Host")):
                self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "this host name is not served here")
                return
            token, slash, rest = urlsplit(self.path).path.removeprefix("/").partition("/")
            if not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
                self._refuse(
                    HTTPStatus.NOT_FOUND, "nothing here; open the whole URL that was printed"
                )
                return
            if not is_own_page(self.command, self.headers):
                self._refuse(HTTPStatus.FORBIDDEN, "only the review page itself may ask")
                return
            route(rest)
        except (ConnectionError, TimeoutError):  # the browser went on to something else
            self.close_connection = True
        except ValueError as error:  # a path that is no path
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))

    # ---- what is asked -----------------------------------------------------------------------

    def _get(self, what: str) -> None:
        session = self.server.session
        if what in _PAGE:
            name, kind = _PAGE[what]
            self._send((_TEMPLATES / name).read_bytes(), kind)
        elif what == "session":
            self._send_json(session.overview())
        elif (found := _ITEM.fullmatch(what)) and int(found[1]) < len(session):
            self._get_item(int(found[1]), found[2], found[3])
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such thing here")

    def _get_item(self, number: int, part: str | None, frame: str | None) -> None:
        session = self.server.session
        if part is None:
            self._send_json(session.item(number))
            return
        if part == "media":
            media = session.media(number)
            if media.path is None:
                self._refuse(HTTPStatus.NOT_FOUND, media.problem or "there is no file")
                return
            with media.path.open("rb") as file:
                self._send_file(file, media_type(media.path))
            return
        strip = session.strip(number)
        if part == "strip":
            frames = [
                {"index": f.index, "pts_s": f.pts_s, "is_peak": f.is_peak} for f in strip.frames
            ]
            told = {"frames": frames, "sound": strip.wav is not None, "problems": strip.problems}
            self._send_json(told)
            return
        wanted = next((f.jpeg for f in strip.frames if str(f.index) == frame), None)
        data = strip.wav if frame is None else wanted
        if data is None:
            self._refuse(HTTPStatus.NOT_FOUND, "the clip has none")
            return
        self._send_file(io.BytesIO(data), "audio/wav" if frame is None else "image/jpeg")

    def _post(self, what: str) -> None:
        if what != "ratings":
            self._refuse(HTTPStatus.NOT_FOUND, "ratings are sent to ratings")
            return
        if self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a rating is JSON")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY_BYTES:
            self._refuse(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {_MAX_BODY_BYTES:,} bytes, stated"
            )
            return
        body = self.rfile.read(int(length))
        try:
            self._send_json(self.server.session.rate(body))
        except EmocacheError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        except OSError as error:
            message = f"the ratings file cannot be written: {error.strerror or error}"
            logger.warning("%s", message)
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, message)

    # ---- how it is sent ----------------------------------------------------------------------

    def _begin(self, status: HTTPStatus, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, data: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._begin(status, {"Content-Type": kind, "Content-Length": str(len(data))})
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_json(self, told: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        data = json.dumps(told, ensure_ascii=True).encode()
        self._send(data, "application/json; charset=utf-8", status)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.close_connection = True  # a body may be left unread
        self._send_json({"error": message}, status)

    def _send_file(self, file: BinaryIO, kind: str) -> None:
        """Send a file, or the part of it that is asked for: video seeks by that."""
        size = file.seek(0, 2)
        asked = self.headers.get("Range")
        part = None if asked is None else byte_range(asked, size)
        if part == "unsatisfiable":
            self._begin(
                HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
                {"Content-Range": f"bytes */{size}", "Content-Length": "0"},
            )
            return
        first, last = part if isinstance(part, tuple) else (0, size - 1)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(last - first + 1),
            "Accept-Ranges": "bytes",
        }
        if part is not None:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._begin(HTTPStatus.OK if part is None else HTTPStatus.PARTIAL_CONTENT, headers)
        if self.command == "HEAD":
            return
        file.seek(first)
        left = last - first + 1
        while left > 0:
            block = file.read(min(left, _BLOCK_BYTES))
            if not block:  # it was cut meanwhile: what was promised cannot be kept
                self.close_connection = True
                return
            self.wfile.write(block)
            left -= len(block)


def byte_range(header: str, size: int) -> tuple[int, int] | str | None:
    """Read a Range header.

    Args:
        header: `bytes=0-99`, `bytes=100-` or `bytes=-100`.
        size: Of the whole, in bytes.

    Returns:
        First and last byte, both included; "unsatisfiable"; None for a header to be ignored (several
        ranges, other units), as HTTP allows.
    """
    found = _RANGE.fullmatch(header.strip())
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        n = min(int(found[2]), size)
        return (size - n, size - 1) if n else "unsatisfiable"
    first = int(found[1])
    last = min(int(found[2]), size - 1) if found[2] else size - 1
    if found[2] and int(found[2]) < first:
        return None
    return (first, last) if first < size else "unsatisfiable"
