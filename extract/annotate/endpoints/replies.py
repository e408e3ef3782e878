"""From a server's reply to an answer with an outcome: refusals, blanks, cuts and wrong schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any

from cache.errors import SchemaError
from cache.schema import canonical_json

_THINKING = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_FENCE = re.compile(r"\A```(?:json)?\s*\n(.*?)\n?```\Z", re.DOTALL | re.IGNORECASE)
# How chat models decline in plain words. Only short answers that begin so count: a description may
# well quote somebody who is sorry.
_DECLINES = re.compile(
    r"\A(?:(?:i['\u2019]?\s?a?m|we['\u2019]?\s?a?re) (?:very |really |so )?sorry|sorry|i apologi[sz]e"
    r"|unfortunately)?[\s,.;:!\u2014-]*(?:but )?(?:as an ai\b[^.]{0,60}?)?[\s,]*"
    r"i(?:['\u2019]m| am)? (?:can(?:no|['\u2019])t|can not|unable to|not able to|won['\u2019]t"
    r"|will not|must decline)\b",
    re.IGNORECASE,
)
_DECLINES_ZH = re.compile(r"\A(?:很?抱歉|对不起)\W?\s*(?:但)?我(?:无法|不能)")
_LONGEST_REFUSAL = 400


class Outcome(StrEnum):
    """What became of a question that a model answered."""

    OK = "ok"
    REFUSED = "refused"
    """The model or a content filter declined."""
    EMPTY = "empty"
    """Nothing but white space came."""
    INVALID = "invalid"
    """The answer does not fit its schema."""
    TRUNCATED = "truncated"
    """It ended at the token limit."""


class BrokenReplyError(Exception):
    """A reply with status 200 that is no chat completion; worth another try."""


@dataclass(frozen=True)
class Reply:
    """What a server said, judged.

    Args:
        outcome: The judgement.
        text: The answer without thinking aloud; of a refusal, the refusal.
        reason: Why it is not ok.
        finish_reason: As the server said.
        model: The model that answered, as the server names it.
        prompt_tokens: As counted by the server; None if it did not say.
        completion_tokens: Likewise.
    """

    outcome: Outcome
    text: str
    reason: str | None
    finish_reason: str | None
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


def read_reply(raw: bytes, schema: str | None) -> Reply:
    """Judge the body of a chat completion.

    Args:
        raw: The body.
        schema: JSON schema of the answer, as canonical JSON.

    Raises:
        BrokenReplyError: No JSON, or no answer in it.
    """
    try:
        body = json.loads(raw)
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content"), message.get("refusal")
        finish = choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BrokenReplyError(f"no chat completion but {raw[:80]!r}") from None
    if isinstance(text, list):  # some servers answer in parts
        text = "".join(str(p.get("text", "")) for p in text if isinstance(p, dict))
    if not isinstance(text, str | None):
        raise BrokenReplyError(f"the content is {type(text).__name__}, not text")
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    answer = _THINKING.sub("", _whole(text or "")).strip()
    outcome, reason = judge(answer, refusal, finish, schema)
    return Reply(
        outcome=outcome,
        text=_whole(str(refusal)) if refusal else answer,
        reason=reason,
        finish_reason=_whole(str(finish)) if finish else None,
        model=_whole(str(body["model"])) if body.get("model") else None,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
    )


def judge(
    text: str, refusal: object, finish_reason: object, schema: str | None
) -> tuple[Outcome, str | None]:
    """Return the outcome of an answer and, unless it is ok, why."""
    if refusal:
        return Outcome.REFUSED, "the model declined"
    if finish_reason == "content_filter":
        return Outcome.REFUSED, "the server's content filter stopped the answer"
    if finish_reason == "length":
        return Outcome.TRUNCATED, "the answer ended at the token limit"
    if not text:
        return Outcome.EMPTY, "nothing but white space came"
    problem = None if schema is None else schema_problem(text, schema)
    if (schema is None or problem) and declines(text):
        return Outcome.REFUSED, "the model declined in words"
    if problem:
        return Outcome.INVALID, problem
    if schema is not None and _blank(parse_answer(text)):
        return Outcome.EMPTY, "the fields of the answer are blank"
    return Outcome.OK, None


def declines(text: str) -> bool:
    """Return whether a text as a whole is a refusal in words."""
    start = text.lstrip()
    return len(text) <= _LONGEST_REFUSAL and bool(
        _DECLINES.match(start) or _DECLINES_ZH.match(start)
    )


def parse_answer(text: str) -> Any:
    """Return the JSON of an answer, which may stand between code fences; raises ValueError."""
    fenced = _FENCE.match(text.strip())
    return json.loads(fenced[1] if fenced else text)


def schema_problem(text: str, schema: str) -> str | None:
    """Return in one line why a text does not fit a JSON schema, None if it does."""
    try:
        value = parse_answer(text)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    for found in _validator(schema).iter_errors(value):
        return f"{found.json_path}: {found.message}"[:300]
    return None


def check_schema(schema: Mapping[str, Any], where: str) -> None:
    """Refuse what is no JSON schema; raises SchemaError."""
    import jsonschema  # type: ignore[import-untyped]

    try:
        _validator(canonical_json(schema))
    except jsonschema.SchemaError as error:
        raise SchemaError(
            f"{where}: no JSON schema, at {error.json_path}: {error.message}"
        ) from None


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    import jsonschema

    made = jsonschema.Draft202012Validator(json.loads(schema))
    made.check_schema(made.schema)
    return made


def _blank(value: Any) -> bool:
    """Whether a JSON value holds text and all of it is white space."""
    if isinstance(value, str):
        return not value.strip()
    items = list(value.values() if isinstance(value, dict) else value) if value else []
    if not isinstance(value, dict | list):
        return False
    return all(map(_blank, items))


def _whole(text: str) -> str:
    """Return text without lone surrogates, which JSON may hold and UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 and value is not True else None
