"""One request to an OpenAI-compatible endpoint, and what its failure means.

The official library sends it, with its own retries off: when to try again is decided here, where it is
counted. Nothing here keeps, logs or shows the key of the endpoint.
"""

from __future__ import annotations

import logging
import os
import re
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from cache.errors import EmocacheError, MissingDependencyError, near_miss
from cache.schema import Model
from extract.annotate.endpoints.budget import Caps, TokenRates
from extract.annotate.endpoints.questions import Question, schema_request
from extract.annotate.endpoints.replies import BrokenReplyError, Reply, read_reply
from extract.annotate.endpoints.schedule import RetryPolicy, exhausted_wait_s, told_wait_s

if TYPE_CHECKING:
    import openai

logger = logging.getLogger(__name__)

NO_KEY = "none"
"""Name of the variable where an endpoint needs no key."""
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
_UNSENT = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol"})
_NAME = re.compile(r"[^A-Za-z0-9_-]")


class EndpointError(EmocacheError):
    """An endpoint cannot be used; what it answered so far is kept."""


class EndpointDownError(EndpointError):
    """It does not answer, or answered nothing but errors of late."""


class UnauthorisedError(EndpointError):
    """It does not take the key, or there is none."""


class UnknownModelError(EndpointError):
    """It does not know the model, or the address is not that of an API."""


class OutOfQuotaError(EndpointError):
    """The account behind the key is used up."""


class TryAgainError(Exception):
    """A request failed in a way that may pass.

    Args:
        reason: For the report, in a word or two.
        words: What the server or the network said.
        told_s: How long the server asks to wait.
        used: Tokens that it cost; None if nobody knows.
        sent: False if it never reached the server.
        outage: Whether it speaks of a server that is down rather than busy.
    """

    def __init__(
        self,
        reason: str,
        words: str,
        *,
        told_s: float | None = None,
        used: int | None = 0,
        sent: bool = True,
        outage: bool = True,
    ) -> None:
        super().__init__(words)
        self.reason = reason
        self.words = words
        self.told_s = told_s
        self.used = used
        self.sent = sent
        self.outage = outage


class AdaptedError(Exception):
    """The server refused a parameter that can be done without; send again at once."""


class RejectedError(Exception):
    """The server refuses this question; the next may be welcome.

    Args:
        words: What it said.
        filtered: A content filter refused it, which is an answer.
    """

    def __init__(self, words: str, *, filtered: bool = False) -> None:
        super().__init__(words)
        self.words = words
        self.filtered = filtered


class EndpointOptions(Model):
    """Where questions are sent, and how."""

    base_url: str
    """Of the API, up to and including the version: `http://127.0.0.1:8000/v1`."""

    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; "none" for servers that need none."""

    in_flight: int = Field(default=8, ge=1, le=1000)
    """Requests at one time; the library opens no more connections than 1,000."""

    deadline_s: float = Field(default=300.0, gt=0)
    """For one request, from sending to the whole answer."""

    requests_per_minute: int | None = Field(default=None, ge=1)
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens in and out; a request counts with its longest answer until it is there."""

    retry: RetryPolicy = RetryPolicy()
    caps: Caps = Caps()
    rates: TokenRates = TokenRates()
    repairs: int = Field(default=0, ge=0, le=3)
    """How often a model is asked to correct an answer that does not fit its schema."""

    stop_s: float = Field(default=5.0, ge=0)
    """How long requests in flight may take to finish when a run is stopped."""

    send_schema: bool = True
    """Give the server the schema (`response_format`); False asks for it in words."""

    @field_validator("base_url")
    @classmethod
    def _web_address(cls, url: str) -> str:
        parts = urllib.parse.urlsplit(url)
        if parts.username or parts.password or parts.query or parts.fragment:
            # The address is shown in messages: a secret in it would be too.
            raise ValueError(
                "a base URL has no user, password, query or fragment; the key comes from the "
                "environment variable that api_key_env names"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("a base URL begins with http:// or https:// and names a host")
        return url.rstrip("/")


def api_key(options: EndpointOptions, environ: Mapping[str, str] | None = None) -> str:
    """Return the key of an endpoint.

    Raises:
        UnauthorisedError: The variable is not set, or holds what no header can.
    """
    name = options.api_key_env
    if name == NO_KEY:
        return NO_KEY
    found = (os.environ if environ is None else environ).get(name, "").strip()
    if not found:
        raise UnauthorisedError(
            f"no key for {options.base_url}: the environment variable {name} is not set. Set it, name "
            f"another one by api_key_env, or '{NO_KEY}' for a server that needs no key."
        )
    if not found.isascii() or not found.isprintable() or " " in found:
        raise UnauthorisedError(
            f"the environment variable {name} holds no key: a key has printable ASCII characters only, "
            "and no blanks."
        )
    return found


class Transport:
    """Sends questions; used from one event loop.

    Args:
        options: Where and how.
        key: Of the endpoint.

    Raises:
        MissingDependencyError: The openai library is not installed.
    """

    def __init__(self, options: EndpointOptions, key: str) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingDependencyError(
                "asking a model needs the openai library: pip install 'emocache[annotate]'"
            ) from error
        self.options = options
        self.notes: list[str] = []
        """What the endpoint does not take, told once."""
        self._key = key
        self._openai = openai
        self._in_words: set[str] = set()  # models that take no schema
        self._new_limit: set[str] = set()  # models that want max_completion_tokens
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=options.base_url,
            max_retries=0,
            timeout=options.deadline_s,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def unenforced(self, question: Question) -> bool:
        """Whether the question's schema is asked for in words."""
        return question.answer_schema is not None and (
            not self.options.send_schema or question.model in self._in_words
        )

    async def send(
        self, question: Question, messages: list[dict[str, Any]]
    ) -> tuple[Reply, Mapping[str, str]]:
        """Send a question and return the reply and its headers.

        Raises:
            TryAgainError: It may be answered later.
            AdaptedError: It may be answered at once, without what the server refused.
            RejectedError: The server will not answer this question.
            EndpointError: It will answer no question.
        """
        openai, body = self._openai, self._body(question, messages)
        try:
            raw = await self._client.chat.completions.with_raw_response.create(**body)
        except openai.APIStatusError as error:
            raise await self._meaning(error, question, body) from None
        except openai.APITimeoutError as error:
            sent = type(error.__cause__).__name__ not in _UNSENT
            raise TryAgainError("timeout", "timed out", used=None, sent=sent) from None
        except openai.APIConnectionError as error:
            sent = type(error.__cause__).__name__ not in _UNSENT
            words = self._clean(str(error.__cause__ or error)) or type(error.__cause__).__name__
            raise TryAgainError("connection", words, used=None, sent=sent) from None
        try:
            return read_reply(raw.http_response.content, question.schema_text()), raw.headers
        except BrokenReplyError as error:
            words = self._clean(str(error))
            raise TryAgainError("broken reply", words, used=None) from None

    async def model_names(self) -> list[str]:
        """Return the models that the endpoint lists; empty if it does not say."""
        try:
            listed = await self._client.models.list()
            return [model.id for model in listed.data]
        except (self._openai.OpenAIError, ValueError, TypeError, AttributeError):
            return []

    def _body(self, question: Question, messages: list[dict[str, Any]]) -> dict[str, Any]:
        sampling, model = question.sampling, question.model
        limit = "max_completion_tokens" if model in self._new_limit else "max_tokens"
        body: dict[str, Any] = {"model": model, "messages": messages, limit: sampling.max_tokens}
        if sampling.temperature is not None:
            body["temperature"] = sampling.temperature
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if question.answer_schema is not None:
            if self.unenforced(question):
                body["messages"] = _with_words(messages, schema_request(question.answer_schema))
            else:
                name = _NAME.sub("_", question.role)[:64]
                schema = {"name": name, "schema": question.answer_schema, "strict": True}
                body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    async def _meaning(
        self, error: openai.APIStatusError, question: Question, body: Mapping[str, Any]
    ) -> Exception:
        """Return what a status says about the next request."""
        status, code = error.status_code, str(error.code or "")
        words = self._words(error)
        said = f"{self.options.base_url} said {status}" + (f": {words}" if words else "")
        at = f"for model '{question.model}'"
        if status == 402 or code in ("insufficient_quota", "billing_hard_limit_reached"):
            return OutOfQuotaError(
                f"{said} {at}. The account is out of quota; every answer so far is kept. Top it up, or "
                "name another endpoint, and run again."
            )
        if status in (401, 403):
            name = self.options.api_key_env
            key = "no key was sent" if name == NO_KEY else f"the key came from {name}"
            return UnauthorisedError(
                f"{said} {at}; {key}. Name the variable that holds a valid key by api_key_env; every "
                "answer so far is kept."
            )
        if status == 404:
            names = await self.model_names()
            listed = (
                f"It lists {names[:10]}.{near_miss(question.model, names)}"
                if names
                else (
                    "It lists no models: check that the base URL ends with the version, as in /v1."
                )
            )
            return UnknownModelError(f"{said} {at}. {listed}")
        if status in _AGAIN:
            headers = error.response.headers
            told = told_wait_s(headers)
            if told is None and status == 429:
                told = exhausted_wait_s(headers)
            return TryAgainError(
                str(status), words or f"status {status}", told_s=told, outage=status != 429
            )
        if status in (400, 415, 422, 501) and self._adapt(words, body):
            return AdaptedError()
        if status >= 500:
            return TryAgainError(str(status), words or f"status {status}")
        filtered = "content_filter" in (code, error.type) or "content management policy" in words
        return RejectedError(f"status {status}: {words}", filtered=filtered)

    def _adapt(self, words: str, body: Mapping[str, Any]) -> bool:
        """Do without what a server refuses; return whether that changes the request.

        With many in flight, several are refused for the same thing: each is sent again.
        """
        model, low = str(body["model"]), words.lower()
        about_schema = any(w in low for w in ("response_format", "json_schema", "guided", "schema"))
        if about_schema and "response_format" in body:
            if model not in self._in_words:
                self._in_words.add(model)
                self._note(
                    f"model '{model}' takes no response_format; schemas are asked for in words"
                )
            return True
        unknown = any(w in low for w in ("max_completion_tokens", "unsupported", "not supported"))
        if "max_tokens" in low and unknown and "max_tokens" in body:
            if model not in self._new_limit:
                self._new_limit.add(model)
                self._note(f"model '{model}' takes max_completion_tokens instead of max_tokens")
            return True
        return False

    def _note(self, text: str) -> None:
        self.notes.append(f"{self.options.base_url}: {text}")
        logger.warning("%s: %s", self.options.base_url, text)

    def _words(self, error: openai.APIStatusError) -> str:
        body = error.body
        found = (
            body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
        )
        return self._clean(str(found or ""))

    def _clean(self, text: str) -> str:
        """Return foreign text on one line, short, and without the key."""
        if self._key != NO_KEY:
            text = text.replace(self._key, "[key]")
        # Servers also repeat keys in part: sk-ab***yz
        text = re.sub(r"\bsk-[^\s'\",]+", "[key]", text)
        return " ".join(text.split())[:300]


def _with_words(messages: list[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """Return the messages with words added to the first of the user."""
    found = list(messages)
    for i, message in enumerate(found):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                content = f"{content}\n\n{words}"
            else:
                content = [*content, {"type": "text", "text": words}]
            found[i] = {**message, "content": content}
            break
    return found
