"""The base of every configuration and record model, and the error that names what did not decode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from cache.errors import SchemaError, near_miss


class Model(BaseModel):
    """A frozen model that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


M = TypeVar("M", bound=BaseModel)


def decode(model: type[M], data: Any, where: str) -> M:
    """Validate `data` as a `model`.

    Args:
        model: The pydantic model to build.
        data: Plain data, as read from JSON or YAML.
        where: What the data is, for the error message (a path, a command-line argument).

    Raises:
        SchemaError: One line naming the dotted path, the value, what is allowed and a near miss.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SchemaError(f"{where}: {describe(model, error)}") from None


def decode_json(model: type[M], text: str | bytes, where: str) -> M:
    """Validate a JSON document as a `model`; see `decode` for the errors."""
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SchemaError(
            f"{where}: not a JSON document ({error}). The file may be damaged or of another kind; "
            "restore or remove it."
        ) from None
    return decode(model, data, where)


def describe(model: type[BaseModel], error: ValidationError) -> str:
    """Put a pydantic error into one line: dotted path, value, what is allowed, near miss."""
    return "; ".join(text for _, text in located(model, error))


def located(
    model: type[BaseModel], error: ValidationError
) -> list[tuple[tuple[int | str, ...], str]]:
    """Return each fault of a pydantic error: where it is, and what `describe` says of it."""
    parts = []
    for item in error.errors(include_url=False):
        path = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            allowed = sorted(_field_names(model, item["loc"][:-1]))
            name = str(item["loc"][-1])
            text = (
                f"unknown field '{path}'.{near_miss(name, allowed)} Allowed: {', '.join(allowed)}"
            )
        elif item["type"] == "missing":
            text = f"missing field '{path}'"
        else:
            got = item.get("input")
            hint = ""
            if item["type"] == "literal_error" and isinstance(got, str):
                expected = str(item.get("ctx", {}).get("expected", ""))
                hint = near_miss(
                    got, [e.strip("'") for e in expected.replace(" or ", ", ").split(", ")]
                )
            message = item["msg"].removeprefix("Value error, ")
            text = f"'{path}': {message} (got {_short(got)}){hint}" if path else message
        parts.append((item["loc"], text))
    return parts


def _short(value: Any, limit: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _field_names(model: type[BaseModel], loc: Iterable[int | str]) -> set[str]:
    """Names of the fields that are allowed at `loc` inside `model` (best effort)."""
    candidates: list[type[BaseModel]] = [model]
    for part in loc:
        following: list[type[BaseModel]] = []
        for candidate in candidates:
            field = candidate.model_fields.get(str(part))
            if field is not None:
                following.extend(_models_in(field.annotation))
        # An index, a dictionary key or a union tag does not change the model.
        candidates = following or candidates
    return {name for c in candidates for name in c.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list, dict, Mapping) or get_args(
        annotation
    ):
        return [m for arg in get_args(annotation) for m in _models_in(arg)]
    return []


def canonical_json(data: Any) -> str:
    """Return JSON with sorted keys and no white space: equal data, equal text.

    Floats are written by `repr`, so a value survives a round trip. NaN is refused.
    """
    return json.dumps(
        data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    )
