"""Label spaces: ordered native names and their aliases."""

from __future__ import annotations

from pydantic import Field, model_validator

from cache.errors import ManifestError, near_miss
from cache.schema import Model


class LabelSpace(Model):
    """The ordered label names of a task, as the corpus spells them (lower case)."""

    name: str
    """What the space labels, for example `emotion`."""
    labels: tuple[str, ...] = Field(min_length=1)
    """Native names in native order; prompts list them in this order."""
    aliases: dict[str, str] = Field(default_factory=dict)
    """Other spellings that mean one of `labels`, for example `sadness` -> `sad`."""

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

    def canonical(self, label: str, where: str) -> str:
        """Return the native name of `label`, resolving case and aliases.

        Args:
            label: As written in the source.
            where: Row and file, for the error message.

        Raises:
            ManifestError: The label is outside the space.
        """
        folded = label.strip().lower()
        folded = self.aliases.get(folded, folded)
        if folded not in self.labels:
            raise ManifestError(
                f"{where}: label {label!r} is not in the label space '{self.name}'."
                f"{near_miss(folded, self.labels)} Allowed: {', '.join(self.labels)}."
            )
        return folded
