"""Label spaces: ordered native names and their aliases."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, get_args

from pydantic import Field, model_validator

from cache.errors import ManifestError, near_miss
from cache.schema import Model

LabelField = Literal["emotion", "emotion_multi", "emotion_ov", "sentiment", "intent"]
"""Fields of a record that hold names of a label space: one emotion, several, any words, polarity, intent."""
LABEL_FIELDS: tuple[LabelField, ...] = get_args(LabelField)


class LabelSpace(Model):
    """The ordered label names of a task, as the corpus spells them (lower case)."""

    name: str
    """What the space labels, for example `meld/emotion`."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Native names in native order; prompts list them in this order."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other spellings that mean one of `labels`, for example `sadness` -> `sad`."""
    open: bool = False
    """Other words are labels too; `labels` are examples."""

    @model_validator(mode="after")
    def _consistent(self) -> LabelSpace:
        for label in self.labels:
            if label != label.strip().lower() or not label:
                raise ValueError(f"label {label!r} must be lower case without outer spaces")
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("a label stands twice in the label space")
        for alias, label in self.aliases.items():
            if label not in self.labels:
                raise ValueError(f"alias {alias!r} means {label!r}, which is not a label")
        return self

    @cached_property
    def known(self) -> frozenset[str]:
        """The labels, to look them up."""
        return frozenset(self.labels)

    def holds(self, label: str) -> bool:
        """Return whether a record may have this label: a native name, or any word of an open space."""
        return label in self.known or (self.open and label == label.strip().lower() != "")

    def find(self, label: str) -> str | None:
        """Return the native name of a label, resolving case and aliases; None outside the space."""
        folded = label.strip().lower()
        folded = self.aliases.get(folded, folded)
        return folded if self.holds(folded) else None

    def canonical(self, label: str, where: str) -> str:
        """Return the native name of `label`, resolving case and aliases.

        Args:
            label: As written in the source.
            where: Row and file, for the error message.

        Raises:
            ManifestError: The label is outside the space.
        """
        found = self.find(label)
        if found is None:
            raise ManifestError(f"{where}: {self.refusal(label)}")
        return found

    def refusal(self, label: str) -> str:
        """Say that a label is outside the space, and what is allowed."""
        return (
            f"label {label!r} is not in the label space '{self.name}'."
            f"{near_miss(label.strip().lower(), self.labels)} Allowed: {', '.join(self.labels)}."
        )
