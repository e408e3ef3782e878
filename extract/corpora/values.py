"""Nested values of JSON and Arrow as flat text."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from cache.errors import ManifestError

Row = tuple[str, dict[str, str]]
"""Its place, for people, and its columns."""

logger = logging.getLogger(__name__)

_KINDS = {str: "text", bool: "true/false", int: "numbers", float: "numbers", list: "lists"}


class Flat:
    """Turns objects into rows of text, and remembers what kinds of values each column held."""

    def __init__(self, name: str, separator: str) -> None:
        """Start with no row.

        Args:
            name: Of the file, for messages.
            separator: Between the items of a list.
        """
        self._name, self._separator = name, separator
        self._kinds: dict[str, dict[str, str]] = {}
        self.n_rows = 0

    def row(self, found: Mapping[str, Any], where: str) -> dict[str, str]:
        """Return an object as a row: dotted columns, lists joined, nothing for null and NaN.

        Raises:
            ManifestError: A column holds an object here and a plain value elsewhere.
        """
        self.n_rows += 1
        row: dict[str, str] = {}
        self._put(row, "", found, where)
        return row

    def _put(self, row: dict[str, str], prefix: str, found: Mapping[str, Any], where: str) -> None:
        for key, value in found.items():
            name = f"{prefix}{key}".strip()
            kind = type(value)
            if kind is str:
                row[name] = value.strip()
            elif value is None:
                row[name] = ""
                continue
            elif kind is dict:
                self._note(name, "objects", where)
                self._put(row, f"{name}.", value, where)
                continue
            elif kind is list:
                row[name] = self._separator.join(_text(item) for item in value)
            else:
                row[name] = _text(value)
            if not row[name]:
                continue
            known = self._kinds.get(name)
            if known is None or _KINDS.get(kind, "text") not in known:
                self._note(name, _KINDS.get(kind, "text"), where)

    def _note(self, name: str, kind: str, where: str) -> None:
        kinds = self._kinds.setdefault(name, {})
        if kind not in kinds:
            kinds[kind] = where
            if "objects" in kinds and len(kinds) > 1:
                places = "; ".join(f"{k} in {place}" for k, place in kinds.items())
                raise ManifestError(
                    f"{where}: column {name!r} holds objects and plain values ({places}). A column must "
                    "be one or the other; correct the file."
                )

    def tell(self) -> None:
        """Log the columns that held several kinds of values, all of which became text."""
        for name, kinds in self._kinds.items():
            if len(kinds) > 1:
                places = "; ".join(f"{kind} first in {place}" for kind, place in kinds.items())
                logger.warning(
                    "%s: column %r holds values of several kinds (%s); all are taken as text",
                    self._name, name, places,
                )  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.strip()
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return "" if math.isnan(value) else repr(value)
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
