"""Cells and rules of a mapping as functions of a row."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from cache.labels import LABEL_FIELDS
from extract.corpora.row import BenchmarkRule, Cell, FieldMap
from extract.corpora.templates import Render, columns_of, compile_template

NUMBERS = ("sentiment_score", "valence", "arousal", "dominance")
"""Fields of a record that hold numbers."""
TELLING = (
    *LABEL_FIELDS, *NUMBERS, "subtitles", "descriptions", "action_units",
)  # fmt: skip
"""A mapping must fill one of these at least."""


def named_fields(fields: FieldMap) -> tuple[str, ...]:
    """Return the record's fields that a mapping names."""
    names = []
    for name in FieldMap.model_fields:
        if name not in ("id", "media") and getattr(fields, name):
            names.append("peak" if name == "peak_index" else name)
    return tuple(names)


def fitting(templates: tuple[str, ...], columns: Collection[str], file: str) -> list[str]:
    """Return the templates whose columns the file has; raises if none fits."""
    found = [t for t in templates if all(c in columns for c in columns_of(t))]
    if templates and not found:
        compile_template(templates, columns, f"{file}, media")
    return found


def one_value(cell: Cell, text: Callable[[Any, str], Render], name: str) -> Render:
    """Return a function of a row to one value as the cell says."""
    render, values, drop = text(cell.text, name), cell.values, frozenset(cell.drop)
    if not values and not drop:
        return render

    def one(row: Mapping[str, str]) -> str:
        value = render(row)
        return "" if value in drop else values.get(value, value)

    return one


def several_values(
    cell: Cell, text: Callable[[Any, str], Render], name: str
) -> Callable[[Mapping[str, str]], list[str]]:
    """Return a function of a row to the values of a cell."""
    render, values, drop = text(cell.text, name), cell.values, frozenset(cell.drop)
    separator = cell.separator

    def several(row: Mapping[str, str]) -> list[str]:
        whole = render(row)
        if not whole:
            return []
        parts = [whole] if separator is None else [p.strip() for p in whole.split(separator)]
        found = [values.get(p, p) for p in parts if p and p not in drop]
        return [value for value in found if value]

    return several


def said_in(
    row: Mapping[str, str],
    rules: list[tuple[Render, Render | None, str]],
    language: str | None,
) -> list[dict[str, Any]]:
    """Return the subtitles of a row: at most one per language and origin, the first."""
    said: list[dict[str, Any]] = []
    seen = set()
    for render, tongue, origin in rules:
        text = render(row)
        if not text:
            continue
        key = (language if tongue is None else tongue(row) or None, origin)
        if key not in seen:
            seen.add(key)
            said.append({"text": text, "language": key[0], "origin": origin})
    return said


def benchmarks_of(rules: tuple[BenchmarkRule, ...], found: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the benchmarks that score a record, by its fields."""
    axes = found.get("split_axes", {})
    return tuple(
        dict.fromkeys(
            rule.id
            for rule in rules
            if (not rule.splits or found.get("split") in rule.splits)
            and all(axes.get(axis) in values for axis, values in rule.axes.items())
            and (rule.needs is None or found.get(rule.needs))
            and (not rule.labels or _one_of(found.get(rule.needs or ""), rule.labels))
        )
    )


def _one_of(value: str | Sequence[str] | None, labels: tuple[str, ...]) -> bool:
    """Return whether a field holds one of the labels."""
    values = (value,) if isinstance(value, str) else value or ()
    return any(label in labels for label in values)


def clean_path(path: str) -> str:
    """Return a path as a manifest has it: forward slashes, no `./`."""
    if "\\" in path:
        path = path.replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    return path
