"""Prompt files: the wording of what models are asked, replaceable and known by name and digest.

A prompt file is YAML:

    name: my-audio-tone
    role: audio_tone            # visual_objective | audio_tone | consolidate | template
    about: One line for people.
    text: |
      Describe how {{ person }} speaks. {% if language %}They speak {{ language }}.{% endif %}
    max_tokens: 200             # longest answer
    answer: description         # or text

`text` (and `system`, if any) are Jinja2 templates in a sandbox; they cannot reach files, other
templates or Python. What fills a slot is foreign text: it is never read as a template, stays on one
line, and cannot write a tag, so whatever stands between `<subtitle>` and `</subtitle>` stays there.
An id is the name and a digest of the file's content: another wording, another id, other answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field

from cache.errors import SchemaError, near_miss
from cache.schema import Model, canonical_json, decode
from extract.annotate.endpoints.questions import MediaPart, Question, Sampling
from extract.annotate.templates import Templates, inert, prompt_fields, prompt_id

PromptRole = Literal["visual_objective", "audio_tone", "consolidate", "template"]
Preset = Literal["mmeverse", "merr-fine", "merr-coarse"]
FOLDER = Path(__file__).with_name("prompts")

CLUES = ("visual_expression", "visual_objective", "audio_tone", "subtitle")
"""The clues of Algorithm 1, in the order in which the shipped prompts tell them."""
SLOTS: dict[str, tuple[str, ...]] = {
    "visual_objective": ("person",),
    "audio_tone": ("person", "language"),
    "consolidate": (*CLUES, "label", "person", "language", "draft"),
    "template": (*CLUES, "label", "person"),
}
"""What a prompt of each role may be filled with; `draft` is the description to be refined."""
NEEDED: dict[str, tuple[str, ...]] = {
    "visual_objective": (),
    "audio_tone": (),
    "consolidate": (*CLUES, "label"),
    "template": CLUES,
}
"""Slots that a prompt of a role must have, so that no clue is lost without a word."""
DEFAULT_PERSON = "the person"

DESCRIPTION_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"description": {"type": "string"}},
    "required": ["description"],
    "additionalProperties": False,
}
"""What a consolidation answers with."""

_TARGETS = {
    "emotion": "emotion",
    "emotion_multi": "labels",
    "emotion_ov": "labels",
    "sentiment": "sentiment",
    "intent": "intent",
}


class PromptFile(Model):
    """What a prompt file holds."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    """Lower case, digits, dots, dashes and underscores."""

    role: PromptRole
    """What is asked for; "template" is filled in without asking anybody."""

    about: str = ""
    """For people; no part of the id."""

    text: str = Field(min_length=1)
    """The template."""

    system: str | None = None
    """Template of the system prompt."""

    max_tokens: int = Field(default=400, ge=1)
    """Longest answer."""

    answer: Literal["text", "description"] = "text"
    """"description" asks for the JSON object {"description": ...}."""


class Prompt:
    """A prompt file that was read and checked.

    Args:
        file: What it holds.
        where: Its path, for messages.

    Raises:
        SchemaError: A template does not compile, has an unknown slot, or lacks one it needs.
    """

    def __init__(self, file: PromptFile, where: str) -> None:
        self.file = file
        self.where = where
        self._templates = Templates(file.text, file.system, file.role, SLOTS[file.role], where)
        self.slots = self._templates.slots
        if missing := [slot for slot in NEEDED[file.role] if slot not in self.slots]:
            raise SchemaError(
                f"{where}: a prompt of role '{file.role}' needs the slots {missing}, which it does not "
                "use; without them these clues would be left out unsaid. Write for example "
                f"{{% if {missing[0]} %}}... {{{{ {missing[0]} }}}} ...{{% endif %}}."
            )

    def __repr__(self) -> str:
        """Name it by its id."""
        return f"Prompt({self.id!r})"

    @property
    def name(self) -> str:
        """The name in the file."""
        return self.file.name

    @property
    def role(self) -> PromptRole:
        """What is asked for."""
        return self.file.role

    @cached_property
    def id(self) -> str:
        """Name and digest of everything in the file but `about`."""
        return prompt_id(self.name, self.file)

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """JSON schema of the answer; None for plain text."""
        return DESCRIPTION_SCHEMA if self.file.answer == "description" else None

    @property
    def fixed_bytes(self) -> int:
        """Length of the prompt with empty slots and of its schema, for estimates."""
        given = {"label": "label"} if "label" in SLOTS[self.role] else {}
        text, system = self.render(given)
        schema = canonical_json(self.answer_schema) if self.answer_schema else ""
        return len((text + (system or "") + schema).encode())

    def render(self, slots: Mapping[str, str | None]) -> tuple[str, str | None]:
        """Fill the slots and return the text and the system prompt.

        Args:
            slots: Foreign text by slot; a clue that is missing, None or blank is left out by the
                template. `person` is "the person" unless given.

        Raises:
            SchemaError: A slot that the role does not know, or a consolidation without a label.
        """
        allowed = SLOTS[self.role]
        for name in slots:
            if name not in allowed:
                raise SchemaError(
                    f"prompt {self.id} has no slot '{name}'.{near_miss(name, allowed)} Role "
                    f"'{self.role}' has {list(allowed)}."
                )
        filled = {name: inert(slots.get(name) or "") for name in allowed}
        if "person" in filled and not filled["person"]:
            filled["person"] = DEFAULT_PERSON
        if self.role == "consolidate" and not filled["label"]:
            raise SchemaError(
                f"prompt {self.id} needs a label, which guides the consolidation; the record has none of "
                "this target."
            )
        return self._templates.fill(filled)

    def question(
        self,
        model: str,
        slots: Mapping[str, str | None],
        media: tuple[MediaPart, ...] = (),
        *,
        sampling: Sampling | None = None,
        tag: Any = None,
    ) -> Question:
        """Return the question that asks a model this prompt.

        Args:
            model: As the endpoint knows it.
            slots: See `render`.
            media: Pictures and sounds.
            sampling: The file's `max_tokens`, temperature 0 and seed 0 if None.
            tag: Comes back with the answer.

        Raises:
            SchemaError: See `render`.
        """
        text, system = self.render(slots)
        return Question(
            role=self.role,
            model=model,
            prompt_id=self.id,
            text=text,
            media=media,
            system=system,
            sampling=sampling or Sampling(max_tokens=self.file.max_tokens),
            answer_schema=self.answer_schema,
            tag=tag,
        )


def load_prompt(name_or_path: str | Path) -> Prompt:
    """Read a prompt: a shipped one by name, or a file by path.

    Args:
        name_or_path: A shipped name (`prompt_names`), or a path that ends with .yaml or .yml.

    Raises:
        SchemaError: No such prompt, no YAML, an unknown field or slot, or a missing slot.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        if str(name_or_path) not in prompt_names():
            raise SchemaError(
                f"no prompt '{name_or_path}'.{near_miss(str(name_or_path), prompt_names())} Shipped are "
                f"{prompt_names()}; a file of your own ends with .yaml."
            )
        return _shipped(str(name_or_path))
    return _read(path)


@cache
def _shipped(name: str) -> Prompt:
    return _read(FOLDER / f"{name}.yaml")


def _read(path: Path) -> Prompt:
    where = f"prompt '{path}'"
    return Prompt(decode(PromptFile, prompt_fields(path, PromptFile), where), where)


def prompt_names() -> list[str]:
    """Return the names of the shipped prompts."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def prompt_name(preset: str, role: str, target: str = "emotion") -> str:
    """Return the shipped prompt that a preset uses.

    Args:
        preset: "mmeverse", "merr-fine" or "merr-coarse".
        role: "visual_objective", "audio_tone", or "consolidate"; the consolidation of MERR-Coarse is
            a template.
        target: The label field that guides a consolidation.

    Raises:
        SchemaError: Unknown preset, role or target.
    """
    for what, got, allowed in (
        ("preset", preset, get_args(Preset)),
        ("role", role, ("visual_objective", "audio_tone", "consolidate")),
        ("target", target, tuple(_TARGETS)),
    ):
        if got not in allowed:
            raise SchemaError(
                f"unknown {what} '{got}' of annotation.{near_miss(got, allowed)} Allowed: "
                f"{list(allowed)}."
            )
    if role != "consolidate":
        return role.replace("_", "-")
    return "merr-coarse" if preset == "merr-coarse" else f"{preset}-{_TARGETS[target]}"
