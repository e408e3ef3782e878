"""A small OpenAI-compatible server on loopback for tests, which also misbehaves on demand.

    with chat_server(models=("tiny",)) as server:
        server.base_url                                    # "http://127.0.0.1:PORT/v1"
        server.fail("429", times=2, retry_after_s=0.1)     # the next two chat requests
        server.fail("cut", match="frame 7")                # every request whose text holds "frame 7"
        server.n_requests, server.peak                     # chat requests so far; most at one time
        server.asked[content_key(body)]                    # requests by content
        server.requests                                    # (time, body, what was answered)

It speaks `POST /v1/chat/completions` and `GET /v1/models`. Answers are plain English sentences made
from a digest of the request: equal requests, equal answers. Where the request has a `json_schema`
response format, or its text asks for a JSON object with a "description", the answer is JSON of that
schema; a label in `<label>...</label>` in the text is named in it. `server.answer = f` replaces
that: `f(body) -> str`. An unknown model is answered with 404, a wrong key with 401 (`api_key=`).

Kinds of faults (`KINDS`): see `_misbehave`. They are tried in the order of `fail` calls; the first
that fits is used. `server.calm()` removes them all. As a process of its own (benchmarks):
`python -m tests.chat_server --latency 0.05` prints its base URL and ends with its standard input.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    "429",  # rate limit; Retry-After where `retry_after_s` is given
    "quota",  # 429 with code insufficient_quota
    "500",
    "503",
    "slow",  # the answer comes after `delay_s`
    "cut",  # the connection ends before the answer
    "cut body",  # the connection ends in the middle of the answer
    "bad json",  # 200, and a body that is no JSON
    "no choices",  # 200, JSON, and no answer in it
    "wrong schema",  # an answer that does not fit the schema
    "prose",  # text where JSON was asked for
    "refusal",  # the `refusal` field is set
    "spoken refusal",  # the text says so
    "filtered",  # finish_reason content_filter
    "empty",  # a blank answer
    "length",  # finish_reason length, and half an answer
    "401",
    "403",
    "404",
    "no usage",  # an answer without usage
    "remaining",  # an answer whose headers say that no request is left for `retry_after_s`
    "no response_format",  # 400 where the request has a response_format
    "no max_tokens",  # 400 where the request has max_tokens
    "content filter",  # 400, the prompt was filtered
    "too long",  # 400, context length exceeded
    "bad request",  # 400 of another kind
    "echo key",  # 401 whose message repeats the key that was sent
]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass
class Fault:
    """One thing that goes wrong."""

    kind: Kind
    match: str = ""
    """Text that the request must contain."""
    times: int | None = None
    """How often; None is always."""
    every: int = 1
    """Only every so many-th fitting request."""
    retry_after_s: float | None = None
    delay_s: float = 1.0
    n_fitting: int = 0
    n_done: int = 0


@dataclass
class ChatServer:
    """What the tests see of the server; written by its thread."""

    models: tuple[str, ...]
    api_key: str | None = None
    latency_s: float = 0.0
    port: int = 0
    n_requests: int = 0
    in_flight: int = 0
    peak: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[float, dict[str, Any], str]] = field(default_factory=list)
    keep_bodies: bool = True
    faults: list[Fault] = field(default_factory=list)
    answer: Callable[[dict[str, Any]], str] | None = None

    @property
    def base_url(self) -> str:
        """What a client needs."""
        return f"http://127.0.0.1:{self.port}/v1"

    def fail(self, kind: Kind, match: str = "", **options: Any) -> Fault:
        """Misbehave from now on; see `Fault` for the options."""
        assert kind in KINDS, f"unknown kind {kind!r}; known are {KINDS}"
        fault = Fault(kind, match, **options)
        self.faults.append(fault)
        return fault

    def calm(self) -> None:
        """Behave again."""
        self.faults.clear()

    def fault_for(self, text: str) -> Fault | None:
        """Return the fault that this request meets."""
        for fault in list(self.faults):
            if fault.match in text and (fault.times is None or fault.n_done < fault.times):
                fault.n_fitting += 1
                if fault.n_fitting % fault.every == 0:
                    fault.n_done += 1
                    return fault
        return None


@contextmanager
def chat_server(
    models: Sequence[str] = ("tiny",), *, api_key: str | None = None, latency_s: float = 0.0
) -> Iterator[ChatServer]:
    """Run a server in a thread of this process and yield it.

    Args:
        models: Names that it knows; others are answered with 404.
        api_key: The only key that it takes; None takes any.
        latency_s: Time until each answer.
    """
    server = ChatServer(tuple(models), api_key, latency_s)
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def main() -> None:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        listening = await _listen(server)
        ready.set()
        await ended.wait()
        listening.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="chat-server", daemon=True)
    thread.start()
    assert ready.wait(10), "the chat server did not start"
    try:
        yield server
    finally:
        stop[0]()
        thread.join(10)


def content_key(body: dict[str, Any]) -> str:
    """Return the digest of a request, by which `asked` counts."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def text_of(body: dict[str, Any]) -> str:
    """Return all text of a request's messages."""
    found = []
    for message in body.get("messages", []):
        content = message.get("content") or ""
        if isinstance(content, str):
            found.append(content)
        else:
            found += [part["text"] for part in content if part.get("type") == "text"]
    return "\n".join(found)


def media_of(body: dict[str, Any]) -> list[str]:
    """Return the kinds of the media parts of a request."""
    return [
        part["type"]
        for message in body.get("messages", [])
        if isinstance(message.get("content"), list)
        for part in message["content"]
        if part.get("type") != "text"
    ]


async def _listen(server: ChatServer) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while await _one_request(server, reader, writer):
                pass
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", server.port, backlog=1024)
    server.port = listening.sockets[0].getsockname()[1]
    return listening


async def _one_request(
    server: ChatServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    """Answer one request; return whether the connection goes on."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ", 2)
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:])}
    data = await reader.readexactly(int(headers.get("content-length", 0)))
    key = headers.get("authorization", "").removeprefix("Bearer ")
    if server.api_key is not None and key != server.api_key:
        return await _send(writer, *_error(401, "Incorrect API key", "invalid_api_key"))
    if (method, path) == ("GET", "/v1/models"):
        listed = [{"id": name, "object": "model", "owned_by": "tests"} for name in server.models]
        return await _send(writer, 200, {"object": "list", "data": listed})
    if (method, path) != ("POST", "/v1/chat/completions"):
        return await _send(writer, *_error(404, f"no such path {path}", None))
    body = json.loads(data)
    server.n_requests += 1
    server.in_flight += 1
    server.peak = max(server.peak, server.in_flight)
    if server.keep_bodies:
        server.asked[content_key(body)] += 1
    try:
        fault = server.fault_for(text_of(body))
        if server.keep_bodies:
            server.requests.append((time.monotonic(), body, fault.kind if fault else "ok"))
        if server.latency_s:
            await asyncio.sleep(server.latency_s)
        if fault is not None:
            return await _misbehave(server, fault, body, key, writer)
        return await _send(writer, *_good(server, body))
    finally:
        server.in_flight -= 1


def _good(server: ChatServer, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    if body.get("model") not in server.models:
        return _error(404, f"The model `{body.get('model')}` does not exist", "model_not_found")
    text = server.answer(body) if server.answer else default_answer(body)
    return 200, _completion(body, text)


async def _misbehave(
    server: ChatServer,
    fault: Fault,
    body: dict[str, Any],
    key: str,
    writer: asyncio.StreamWriter,
) -> bool:
    kind = fault.kind
    wait = {} if fault.retry_after_s is None else {"retry-after": f"{fault.retry_after_s:g}"}
    status, good = _good(server, body)
    choice = good["choices"][0] if status == 200 else {}
    if kind == "429":
        return await _send(writer, *_error(429, "Rate limit reached", "rate_limit_exceeded"), wait)
    if kind == "quota":
        return await _send(
            writer, *_error(429, "You exceeded your current quota", "insufficient_quota")
        )
    if kind in ("500", "503"):
        return await _send(writer, *_error(int(kind), "internal error", None), wait)
    if kind in ("401", "403", "404"):
        code = "model_not_found" if kind == "404" else None
        return await _send(writer, *_error(int(kind), "refused on demand", code))
    if kind == "echo key":
        return await _send(writer, *_error(401, f"Incorrect API key provided: {key}.", None))
    if kind == "slow":
        await asyncio.sleep(fault.delay_s)
        return await _send(writer, status, good)
    if kind == "cut":
        writer.transport.abort()
        return False
    if kind == "cut body":
        raw = json.dumps(good).encode()
        writer.write(_head(200, len(raw), {}) + raw[: len(raw) // 2])
        await writer.drain()
        return False
    if kind == "bad json":
        return await _send(writer, 200, "<html>gateway</html>")
    if kind == "no choices":
        return await _send(writer, 200, {"object": "chat.completion", "choices": []})
    if kind == "remaining":
        headers = {
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": f"{fault.retry_after_s or 0:g}s",
        }
        return await _send(writer, status, good, headers)
    if kind == "no usage":
        return await _send(writer, status, {k: v for k, v in good.items() if k != "usage"})
    if kind in ("content filter", "too long", "bad request"):
        codes = {"content filter": "content_filter", "too long": "context_length_exceeded"}
        return await _send(writer, *_error(400, f"refused: {kind}", codes.get(kind)))
    if kind in ("no response_format", "no max_tokens"):
        name = kind.removeprefix("no ")
        if name in body:
            text = f"Unsupported parameter: '{name}' is not supported with this model."
            return await _send(writer, *_error(400, text, "unsupported_parameter"))
        return await _send(writer, status, good)
    text = choice["message"]["content"]
    changes: dict[str, dict[str, Any]] = {
        "wrong schema": {"content": '{"summary": 3}'},
        "prose": {"content": "The person looks up and speaks in a low voice."},
        "refusal": {"content": None, "refusal": "I cannot describe this."},
        "spoken refusal": {"content": "I'm sorry, but I can't help with identifying people."},
        "filtered": {"content": ""},
        "empty": {"content": " \n"},
        "length": {"content": text[: len(text) // 2]},
    }
    choice["message"].update(changes[kind])
    choice["finish_reason"] = {"length": "length", "filtered": "content_filter"}.get(kind, "stop")
    return await _send(writer, 200, good)


def _error(status: int, text: str, code: str | None) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": text, "type": "test_error", "code": code, "param": None}}


def _completion(body: dict[str, Any], text: str) -> dict[str, Any]:
    n_in = len(text_of(body).encode()) // 4 + 85 * len(media_of(body))
    n_out = len(text.split())
    usage = {"prompt_tokens": n_in, "completion_tokens": n_out, "total_tokens": n_in + n_out}
    return {
        "id": "chatcmpl-test",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": f"{body.get('model')}-0001",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": "stop",
            }
        ],
        "usage": usage,
    }


_WHO = ("A young man", "A woman in a dark coat", "An older man", "The person", "A woman")
_WHERE = ("at a kitchen table", "in a bright office", "beside a window", "in a small hallway")
_FACE = ("the brows are drawn together", "the corners of the mouth rise", "the eyes are wide open")
_VOICE = ("low and even", "fast and rising", "quiet with long pauses", "loud and clipped")
_POSE = ("leans forward", "stands still with folded arms", "turns the head to the left")


def default_answer(body: dict[str, Any]) -> str:
    """Return the answer to a request: sentences made from its digest, as JSON where asked for."""
    digest = hashlib.sha256(content_key(body).encode()).digest()
    pick = [words[digest[i] % len(words)] for i, words in enumerate((_WHO, _WHERE, _FACE, _VOICE))]
    who, where, face, voice = pick
    pose = _POSE[digest[4] % len(_POSE)]
    asked, media = text_of(body), media_of(body)
    schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema")
    if schema is None and '"description"' in asked:
        schema = {"type": "object", "properties": {"description": {"type": "string"}}}
    if schema is None and "input_audio" in media:
        return f"The voice is {voice}, the rate changes little, and pauses are short."
    if schema is None:
        return f"{who} {pose} {where}, {face}, and nobody else is close to the camera."
    label = asked.rpartition("<label>")[2].partition("</label>")[0] if "<label>" in asked else ""
    text = f"{who} {pose} {where}; {face} and the voice is {voice}"
    text += f", which fits {label.strip()}." if label else "."
    return json.dumps(_instance(schema, text))


def _instance(schema: dict[str, Any], text: str) -> Any:
    """Return a value of a JSON schema, with `text` for every string."""
    kind = schema.get("type", "object")
    if "enum" in schema:
        return schema["enum"][0]
    if kind == "object":
        return {k: _instance(v, text) for k, v in schema.get("properties", {}).items()}
    if kind == "array":
        return [_instance(schema.get("items", {"type": "string"}), text)]
    return {"string": text, "integer": 1, "number": 1.0, "boolean": True}[kind]


_REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Slow Down"}


def _head(status: int, n_bytes: int, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}"]
    lines += ["content-type: application/json", f"content-length: {n_bytes}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _send(
    writer: asyncio.StreamWriter,
    status: int,
    body: dict[str, Any] | str,
    headers: dict[str, str] | None = None,
) -> bool:
    raw = (body if isinstance(body, str) else json.dumps(body)).encode()
    writer.write(_head(status, len(raw), headers or {}) + raw)
    await writer.drain()
    return True


def main() -> None:
    """Serve until standard input closes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--model", action="append", default=None)
    options = parser.parse_args()
    with chat_server(options.model or ("tiny",), latency_s=options.latency) as server:
        server.keep_bodies = False
        sys.stdout.write(server.base_url + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
