"""Which prompt a preset uses for which role and target: the shipped ones, or a user's own of that name."""

from __future__ import annotations

from pathlib import Path

from cache.errors import SchemaError, near_miss
from cache.labels import LabelField
from extract.annotate.presets import Preset, Role
from extract.annotate.prompts import Prompt, load_prompt, prompt_name, prompt_names

DRAFT = "merr-coarse"
"""Template of the note that a prompt with the slot `draft` refines."""


class Wordings:
    """The prompts of a preset, read and checked before any clip is touched."""

    def __init__(self, preset: Preset) -> None:
        """Read the prompts.

        Raises:
            SchemaError: A prompt file is not one, or has another role than its name needs; the folder
                holds a file that no role of the preset uses.
        """
        self._folder = preset.prompts
        self._used: set[str] = set()
        self._roles = {role: self._load(prompt_name(preset.wording, role), role)
                       for role in preset.roles if role != "consolidate"}  # fmt: skip
        self._consolidate: dict[LabelField, Prompt] = {}
        self.template: Prompt | None = None
        """Of the clues, where no model consolidates, or where one refines what it makes."""
        if preset.consolidate is not None:
            for target in preset.targets:
                name = prompt_name(preset.wording, "consolidate", target)
                self._consolidate[target] = self._load(name, "consolidate")
        if any("draft" in prompt.slots for prompt in self._consolidate.values()) or (
            preset.consolidate is None
        ):
            self.template = self._load(DRAFT, "template")
        self._refuse_unused()

    @property
    def ids(self) -> tuple[str, ...]:
        """Names with digests of all that are used."""
        found = [*self._roles.values(), *self._consolidate.values()]
        found += [self.template] if self.template is not None else []
        return tuple(sorted({prompt.id for prompt in found}))

    def of(self, role: Role, target: LabelField | None = None) -> Prompt:
        """Return the prompt of a role; a consolidation that no label field guides takes emotion's."""
        if role == "consolidate":
            return self._consolidate.get(target or "emotion") or next(
                iter(self._consolidate.values())
            )
        return self._roles[role]

    def _load(self, name: str, role: str) -> Prompt:
        own = None if self._folder is None else self._own(self._folder, name)
        prompt = load_prompt(name) if own is None else load_prompt(own)
        if prompt.role != role:
            raise SchemaError(
                f"prompt '{prompt.where}' has role '{prompt.role}', a prompt called '{name}' has role "
                f"'{role}'."
            )
        return prompt

    def _own(self, folder: Path, name: str) -> Path | None:
        if not folder.is_dir():
            raise SchemaError(
                f"prompts={folder}: no such folder. Give one of prompt files (.yaml)."
            )
        for path in (folder / f"{name}.yaml", folder / f"{name}.yml"):
            if path.is_file():
                self._used.add(path.name)
                return path
        return None

    def _refuse_unused(self) -> None:
        """A misspelt file name must not mean that the shipped prompt is used without a word."""
        if self._folder is None:
            return
        names = [f"{name}.yaml" for name in prompt_names()]
        for path in sorted(self._folder.glob("*.y*ml")):
            if path.name not in self._used and path.with_suffix(".yaml").name not in names:
                raise SchemaError(
                    f"{path}: no prompt has this name.{near_miss(path.name, names)} Allowed: "
                    f"{', '.join(names)}"
                )
