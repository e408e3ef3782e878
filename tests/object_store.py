"""An S3 server for tests, and a proxy in front of it that fails in the ways of real ones."""

from __future__ import annotations

import http.client
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

# In a process of its own: its imports warn, its threads would be forked along with the test's, and
# it ends when the test process does, however that ends, because its standard input closes.
_MOTO = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def moto_server() -> Iterator[str]:
    """Run an S3 server on a free port and yield its endpoint; it keeps everything in memory."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:  # closes its input on leaving and waits for its end
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port.isdigit(), "moto's server did not start; see its message above"
        yield f"http://127.0.0.1:{port}"


def make_bucket(endpoint: str, name: str) -> None:
    """Create a bucket on a moto server, which asks for no signature."""
    where = urllib.parse.urlsplit(endpoint)
    connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=10)
    try:
        connection.request("PUT", f"/{name}")
        status = connection.getresponse().status
    finally:
        connection.close()
    assert status == 200, f"the bucket {name} was refused with {status}"


def environment(endpoint: str) -> dict[str, str]:
    """Return the variables that a client of the server needs; the credentials are made up."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }


Kind = Literal[
    "drop before",  # the connection ends before the request reaches the store
    "drop after",  # the store did as it was told, the answer is lost
    "late answer",  # the store did as it was told, the answer comes after `LATE_S`
    "cut body",  # the answer ends in the middle
    "ignore preconditions",  # the store knows no If-None-Match
    "wrong suffix",  # the last N bytes are asked for, the first N come
    "ignore range",  # the whole object comes instead of the range
    "unavailable",  # 503, in vain
    "forbidden",  # 403
    "conditions unknown",  # 501 to a request with If-None-Match
    "no such upload",  # a multipart upload is unknown: it was completed or removed
    "small pages",  # a listing comes in pages of three
]


LATE_S = 1.0


@dataclass
class Fault:
    """One thing that goes wrong, with every `every`-th request that fits, at most `times` times."""

    kind: Kind
    every: int = 1
    times: int | None = None
    methods: frozenset[str] = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})
    target: str = ""
    """Regular expression that the request's path and query must contain."""
    n_fitting: int = 0
    n_done: int = 0
    """How often it happened: a test must look, or it may have tested nothing."""

    def strikes(self, method: str, target: str) -> bool:
        """Count a request; return whether the fault happens to it."""
        if method not in self.methods or not re.search(self.target, target):
            return False
        self.n_fitting += 1
        if self.n_fitting % self.every or (self.times is not None and self.n_done >= self.times):
            return False
        self.n_done += 1
        return True


@dataclass
class FaultyProxy:
    """The proxy's state; change `faults` at any time."""

    endpoint: str
    upstream: str
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    """Method and target of every request, in the order of their arrival."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: Fault) -> Fault:
        """Switch a fault on."""
        with self.lock:
            self.faults.append(fault)
        return fault

    def choose(self, method: str, target: str) -> set[str]:
        """Return the kinds of fault that happen to a request."""
        with self.lock:
            self.requests.append(f"{method} {target}")
            return {fault.kind for fault in self.faults if fault.strikes(method, target)}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyProxy

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.open: set[socket.socket] = set()

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client went away
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.open.add(self.connection)

    def finish(self) -> None:
        self.server.open.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kinds = self.server.proxy.choose(self.command, self.path)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        if "drop before" in kinds:
            return self._hang_up()
        if "unavailable" in kinds:
            return self._answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
        if "forbidden" in kinds:
            return self._answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
        if "conditions unknown" in kinds and "if-none-match" in self.headers:
            return self._answer(501, {}, b"<Error><Code>NotImplemented</Code></Error>")
        if "no such upload" in kinds:
            return self._answer(404, {}, b"<Error><Code>NoSuchUpload</Code></Error>")
        status, answer_headers, answer = self._forward(headers, body, kinds)
        if "late answer" in kinds:
            time.sleep(LATE_S)
        if "drop after" in kinds:
            return self._hang_up()
        if "cut body" in kinds and len(answer) > 1:
            self._answer(status, answer_headers, answer, n_sent=len(answer) // 2)
            return self._hang_up()
        return self._answer(status, answer_headers, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _forward(
        self, headers: dict[str, str], body: bytes, kinds: set[str]
    ) -> tuple[int, dict[str, str], bytes]:
        """Ask the server; faults that change the question are made here."""
        dropped = set()
        if "ignore preconditions" in kinds:
            dropped.add("if-none-match")
        if "ignore range" in kinds:
            dropped.add("range")
        headers = {k: v for k, v in headers.items() if k.lower() not in dropped}
        suffix = re.fullmatch(r"bytes=-(\d+)", self.headers.get("Range", ""))
        if "wrong suffix" in kinds and suffix:
            headers = {k: v for k, v in headers.items() if k.lower() != "range"}
            headers["Range"] = f"bytes=0-{int(suffix[1]) - 1}"
        target = self.path
        if "small pages" in kinds and "list-type=2" in target:
            target += "&max-keys=3"
        where = urllib.parse.urlsplit(self.server.proxy.upstream)
        connection = http.client.HTTPConnection(str(where.hostname), where.port, timeout=10)
        try:
            connection.request(self.command, target, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, n_sent: int | None = None
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in {"connection", "content-length", "transfer-encoding"}:
                self.send_header(name, value)
        # The answer to HEAD has no body but states its length.
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:n_sent])

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def faulty_proxy(upstream: str) -> Iterator[FaultyProxy]:
    """Run a proxy in front of a server; without faults it changes nothing."""
    with _Server() as server:
        server.proxy = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}", upstream)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.proxy
        finally:
            server.shutdown()
            thread.join()
            for connection in list(server.open):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
