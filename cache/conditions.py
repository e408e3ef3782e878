"""Conditions on records as a user types them: `split=train`, `duration_s<30`, `benchmarks~meld-e`.

::

    CONDITION = FIELD OPERATOR VALUE[,VALUE...]

`=` and `!=` compare texts (several values: one of them; no value: there is none), `<`, `<=`, `>` and `>=`
numbers; `~` and `!~` look into lists (holds one of the values) and texts (contains one of them, in any
case). A record without the value passes `!=` and `!~`, and no other condition.
"""

from __future__ import annotations

import csv
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cache.clip import Record
from cache.errors import SchemaError, near_miss
from cache.labels import LABEL_FIELDS
from cache.manifest import Header

Kind = Literal["text", "texts", "number", "flag"]
_PATTERN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\s*(!=|!~|<=|>=|=|<|>|~)(.*)", re.DOTALL)
_OPERATORS: dict[Kind, tuple[str, ...]] = {
    "text": ("=", "!=", "~", "!~"),
    "texts": ("~", "!~", "=", "!="),
    "number": ("=", "!=", "<", "<=", ">", ">="),
    "flag": ("=", "!="),
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True)
class Field:
    """Something of a record that a condition may be about."""

    kind: Kind
    get: Callable[[Record], Any]
    """None, or an empty collection, where a record has no such thing."""


def _of_clip(name: str) -> Callable[[Record], Any]:
    return lambda record: None if record.clip is None else getattr(record.clip, name)


FIELDS: dict[str, Field] = {
    **{
        name: Field("text", operator.attrgetter(name))
        for name in (
            "uid", "corpus", "media", "split", "split_native", "parent", "speaker", "person", "language",
            "emotion", "sentiment", "intent",
        )
    },
    "subtitle": Field("text", lambda record: record.subtitle()),
    **{
        name: Field("texts", operator.attrgetter(name))
        for name in ("emotion_multi", "emotion_ov", "benchmarks")
    },
    "subtitle_language": Field("texts", lambda r: [s.language for s in r.subtitles if s.language]),
    "subtitle_origin": Field("texts", lambda r: [s.origin for s in r.subtitles]),
    "description": Field("texts", lambda r: [d.kind for d in r.descriptions]),
    "description_target": Field("texts", lambda r: [d.target for d in r.descriptions if d.target]),
    "description_model": Field("texts", lambda r: [d.model for d in r.descriptions if d.model]),
    **{
        name: Field("number", operator.attrgetter(name))
        for name in ("sentiment_score", "valence", "arousal", "dominance", "peak_index")
    },
    **{
        name: Field("number", _of_clip(name))
        for name in ("duration_s", "n_bytes", "width_px", "height_px", "n_frames", "sample_rate_hz")
    },
    **{name: Field("flag", _of_clip(name)) for name in ("has_video", "has_audio", "has_image")},
    "has_clip": Field("flag", lambda record: record.clip is not None),
    "has_subtitle": Field("flag", lambda record: bool(record.subtitles)),
    "has_peak": Field("flag", lambda record: record.peak is not None),
}  # fmt: skip
"""Name -> field; `split_axes.NAME` and `action_units.NAME` are more."""


@dataclass(frozen=True)
class Condition:
    """One condition."""

    text: str
    """As the user typed it."""
    field: str
    operator: str
    values: tuple[Any, ...]
    """Texts, numbers or flags, by the kind of the field; None means that there is no value."""
    kind: Kind
    get: Callable[[Record], Any]

    def holds(self, record: Record) -> bool:
        """Return whether a record passes."""
        found, negated = self.get(record), self.operator.startswith("!")
        return self._matches(found) is not negated

    def _matches(self, found: Any) -> bool:
        if self.operator in _COMPARE:
            return found is not None and _COMPARE[self.operator](found, self.values[0])
        if self.kind == "texts":
            return any(value in found for value in self.values) or (
                None in self.values and not found
            )
        if self.operator.endswith("~"):
            folded = (found or "").lower()
            return any(value is not None and value.lower() in folded for value in self.values)
        return found in self.values or (found == "" and None in self.values)

    @property
    def compares_names(self) -> bool:
        """Whether a value that never occurs is likely a slip of the pen."""
        return (self.kind == "text" and self.operator in ("=", "!=")) or self.kind == "texts"

    def seen(self, record: Record) -> Collection[str]:
        """Return the names of a record that the values are compared with."""
        found = self.get(record)
        return found if self.kind == "texts" else () if found is None else (found,)


def parse_conditions(texts: Iterable[str], header: Header) -> tuple[Condition, ...]:
    """Return conditions as typed.

    Args:
        texts: One condition each.
        header: Of the manifest: a label that none of its closed spaces holds is refused.

    Raises:
        SchemaError: Not a condition, an unknown field or label (with a near miss), an operator that the
            field does not have, or a value that is no number.
    """
    return tuple(_parse(text, header) for text in texts)


def _parse(text: str, header: Header) -> Condition:
    found = _PATTERN.fullmatch(text)
    if found is None:
        raise SchemaError(
            f"--where {text!r} is no condition. Write FIELD OPERATOR VALUE, for example split=train, "
            "duration_s<30, corpus=meld,iemocap or benchmarks~meld-e; put it into quotes."
        )
    name, operator_, given = found[1], found[2], found[3].strip()
    field = _field(name, text)
    allowed = _OPERATORS[field.kind]
    if operator_ not in allowed:
        raise SchemaError(
            f"--where {text!r}: '{name}' is {_KINDS[field.kind]}, which has no {operator_}. "
            f"Allowed: {' '.join(allowed)}"
        )
    values = tuple(_value(field.kind, part, text) for part in _parts(given))
    if operator_ in _COMPARE and (len(values) != 1 or values[0] is None):
        raise SchemaError(f"--where {text!r}: {operator_} takes one number (got {given!r}).")
    if field.kind == "texts" and operator_ in ("=", "!=") and values != (None,):
        raise SchemaError(
            f"--where {text!r}: '{name}' is a list; ask what it holds: "
            f"{name}{'!~' if operator_ == '!=' else '~'}{given}"
        )
    if name in LABEL_FIELDS:
        _check_labels(name, values, operator_, header, text)
    return Condition(text, name, operator_, values, field.kind, field.get)


_KINDS: dict[Kind, str] = {
    "text": "a text", "texts": "a list", "number": "a number", "flag": "true or false",
}  # fmt: skip


def _field(name: str, text: str) -> Field:
    head, dot, part = name.partition(".")
    if dot and part and head == "split_axes":
        return Field("text", lambda record: record.split_axes.get(part))
    if dot and part and head == "action_units":
        return Field("number", lambda record: record.action_units.get(part))
    if name not in FIELDS:
        raise SchemaError(
            f"--where {text!r}: unknown field '{name}'.{near_miss(name, FIELDS)} Allowed: "
            f"{', '.join(FIELDS)}, split_axes.NAME, action_units.NAME"
        )
    return FIELDS[name]


def _parts(given: str) -> list[str]:
    """Split at commas that stand outside double quotes."""
    return next(csv.reader([given], skipinitialspace=True), [""]) or [""]


def _value(kind: Kind, part: str, text: str) -> Any:
    part = part.strip()
    if not part:
        return None
    if kind == "flag":
        if part.lower() not in _FLAGS:
            raise SchemaError(f"--where {text!r}: {part!r} is neither true nor false.")
        return _FLAGS[part.lower()]
    if kind == "number":
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise SchemaError(f"--where {text!r}: {part!r} is no number.")
        return number
    return part


def _check_labels(
    name: str, values: tuple[Any, ...], operator_: str, header: Header, text: str
) -> None:
    spaces = [space for key, space in header.label_spaces.items() if key.split("/")[-1] == name]
    if not spaces or any(space.open for space in spaces):
        return
    known = dict.fromkeys(label for space in spaces for label in space.labels)
    for value in values:
        is_part = operator_.endswith("~") and name not in ("emotion_multi", "emotion_ov")
        if value is not None and value not in known and not is_part:
            raise SchemaError(
                f"--where {text!r}: no label space of '{name}' in this manifest holds {value!r}."
                f"{near_miss(value, known)} They hold: {', '.join(known)}"
            )
