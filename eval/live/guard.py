"""What stands before the page's server: who may ask, and for what.

Gradio brings routes that this page has no use for: some read files of the machine by path, some take files,
some fetch other addresses. None of them is reached: what is not listed here is not there.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from eval.origins import accepts_host, is_own_page

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_ROUTES = {
    "GET": re.compile(
        r"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/(?:assets|static)(?:/[\w.@-]+)+"
        r"|/gradio_api/(?:info/?|app_id/?|startup-events|queue/data|heartbeat/\w{1,64})"
        r"|/examples/\d{1,3}"
    ),
    "POST": re.compile(
        r"/clips|/clips/[\w-]{1,64}/forget|/gradio_api/(?:queue/join/?|cancel/?|reset/?)"
    ),
}
_ROUTES["HEAD"] = _ROUTES["GET"]
_MAX_QUESTION_BYTES = 256 * 1024
"""Of whatever is sent that is no clip."""
_POLICY = (
    # Gradio compiles its components' templates in the browser, hence unsafe-eval.
    "default-src 'none'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; base-uri 'self'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-origin",
    b"cross-origin-opener-policy": b"same-origin",
    b"permissions-policy": b"camera=(self), microphone=(self), geolocation=()",
}


class _Headers:
    """Headers of a request by their names in lower case."""

    def __init__(self, scope: Scope) -> None:
        self._found = {name.lower(): value for name, value in scope.get("headers", ())}

    def get(self, name: str, default: Any = None, /) -> Any:
        value = self._found.get(name.encode())
        return default if value is None else value.decode("latin-1")


class Guard:
    """Lets through what the page itself asks for, and puts our headers on every answer.

    Args:
        app: What answers.
        host: The address that is listened on.
    """

    def __init__(self, app: App, host: str) -> None:
        self._app = app
        self._host = host
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Tell all that is still being answered that its reader has gone."""
        self._ended.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the protocol is ASGI."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page has no web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _Headers(scope)
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _refuse(send, *refusal)
            return
        if scope["method"] == "POST" and scope["path"] != "/clips":
            body = await _read(receive)
            if body is None:
                await _refuse(send, 413, f"a question has at most {_MAX_QUESTION_BYTES:,} bytes")
                return
            if scope["path"].startswith("/gradio_api/") and not _is_plain(body):
                await _refuse(send, 422, "a question is made of texts and numbers")
                return
            receive = _replayed(body, receive)
        await self._app(scope, self._until_the_end(receive), _with_headers(send))

    def _until_the_end(self, receive: Receive) -> Receive:
        """Return a receiver that also hears of the end: pages that stand open would wait for ever."""

        async def hearing() -> Message:
            coming = asyncio.ensure_future(receive())
            ending = asyncio.ensure_future(self._ended.wait())
            try:
                await asyncio.wait({coming, ending}, return_when=asyncio.FIRST_COMPLETED)
                return coming.result() if coming.done() else {"type": "http.disconnect"}
            finally:
                coming.cancel()
                ending.cancel()

        return hearing

    def _refusal(self, scope: Scope, headers: _Headers) -> tuple[int, str] | None:
        """Return status and words for a request that is not answered."""
        if not accepts_host(self._host, headers.get("host")):
            return 421, "this host name is not served here"
        if not is_own_page(scope["method"], headers):
            return 403, "only the page itself may ask"
        routes = _ROUTES.get(scope["method"])
        if routes is None or ".." in scope["path"] or not routes.fullmatch(scope["path"]):
            return 404, "there is no such thing here"
        return None


async def _read(receive: Receive) -> bytes | None:
    """Return the whole body of a question; None if it is too long, or its sender has gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > _MAX_QUESTION_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _is_plain(body: bytes) -> bool:
    """Return whether a question is an object of texts, numbers and lists of them.

    What Gradio takes for a file, an object with a path or an address, it copies from this machine or fetches.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return False
    if not isinstance(found, dict):
        return False
    items = [
        item for value in found.values() for item in (value if isinstance(value, list) else [value])
    ]
    return all(item is None or isinstance(item, str | int | float) for item in items)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a receiver that gives a body that was read, and then what comes."""
    is_given = False

    async def replayed() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if name.lower() not in _HEADERS and not name.lower().startswith(b"access-control-")
            ]
            message = {**message, "headers": [*kept, *_HEADERS.items()]}
        await send(message)

    return sending


async def _refuse(send: Send, status: int, words: str) -> None:
    body = json.dumps({"error": words}).encode()
    headers = [
        (b"content-type", b"application/json; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # a body may be left unread
    ]
    await _with_headers(send)({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
