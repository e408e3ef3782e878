"""What is found while rows become records: what is wrong, what was left out, what there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cache.errors import near_miss
from cache.labels import LABEL_FIELDS, LabelField, LabelSpace

SHOWN = 10
"""Places that are told; the rest is counted."""


class Places:
    """Places of one kind: the first ten, and a count."""

    def __init__(self) -> None:
        """Start with none."""
        self.n = 0
        self.first: list[str] = []

    def add(self, line: str) -> None:
        """Count one more."""
        self.n += 1
        if self.n <= SHOWN:
            self.first.append(line)

    def __str__(self) -> str:
        more = f"; and {self.n - SHOWN:,} more" if self.n > SHOWN else ""
        return "; ".join(self.first) + more


@dataclass
class UnknownLabels:
    """Labels of one field that its space does not hold."""

    space: LabelSpace
    counts: Counter[str] = field(default_factory=Counter)
    where: dict[str, str] = field(default_factory=dict)
    """Label -> its first place."""

    def add(self, label: str, where: str) -> None:
        """Count a label."""
        self.counts[label] += 1
        self.where.setdefault(label, where)

    def __str__(self) -> str:
        parts = []
        for label in list(self.counts)[:SHOWN]:
            n = self.counts[label]
            more = "" if n == 1 else f" and {n - 1:,} more"
            hint = near_miss(label.strip().lower(), self.space.labels)
            parts.append(
                f"{self.where[label]}{more}: label {label!r} is not in the label space "
                f"'{self.space.name}'.{hint}"
            )
        n_labels = len(self.counts)
        rest = f" ({n_labels} labels in all.)" if n_labels > SHOWN else ""
        return f"{' '.join(parts)}{rest} Allowed: {', '.join(self.space.labels)}."


@dataclass
class MappingReport:
    """What reading and mapping found beside the records."""

    corpus: str = ""
    layout: str = ""
    n_rows: int = 0
    """Rows that were read, without those of joined files."""
    n_records: int = 0
    n_elsewhere: int = 0
    """Rows that the layout's `where` leaves out."""
    n_dropped: int = 0
    """Rows left out for a label outside the space."""
    unknown: dict[LabelField, UnknownLabels] = field(default_factory=dict)
    without_partner: dict[str, Places] = field(default_factory=dict)
    """Joined files -> rows that found nothing in them."""
    labels: dict[LabelField, Counter[str]] = field(default_factory=dict)
    splits: Counter[str | None] = field(default_factory=Counter)
    filled: Counter[str] = field(default_factory=Counter)
    """Field -> records in which it is not empty."""
    mapped: tuple[str, ...] = ()
    """Fields that the mapping names."""
    columns: dict[str, None] = field(default_factory=dict)
    """Columns of all files, in order."""
    read: list[str] = field(default_factory=list)
    """Files, relative to the dataset's folder; the first hundred."""
    notes: list[str] = field(default_factory=list)

    def count(self, fields: Mapping[str, Any]) -> None:
        """Count a record by its fields."""
        self.n_records += 1
        self.splits[fields.get("split")] += 1
        self.filled.update(fields.keys())
        for name in LABEL_FIELDS:
            value = fields.get(name)
            if value:
                counts = self.labels.setdefault(name, Counter())
                counts.update((value,) if isinstance(value, str) else value)

    def recount(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Count anew, after records were left out."""
        self.n_records, self.splits, self.filled, self.labels = 0, Counter(), Counter(), {}
        for fields in records:
            self.count(fields)

    @property
    def empty(self) -> tuple[str, ...]:
        """Fields that the mapping names, and that no record has."""
        return tuple(name for name in self.mapped if not self.filled[name])
