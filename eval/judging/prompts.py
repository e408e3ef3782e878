"""The wording of what judges are asked: own prompt files, replaceable, known by name and digest.

A file is what `extract.annotate.prompts` describes, with roles of its own:

    name: my-clue
    role: emer-clue             # see SLOTS
    about: One line for people.
    text: |
      Compare <a>{{ reference }}</a> and <b>{{ description }}</b>. ... Score: the number
    field: Score                # of ratings: what stands in front of the number
    max_tokens: 400

A folder given with `--prompts` holds files named like the shipped ones (`emer-clue.yaml`); what it lacks
is taken from these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from cache.errors import SchemaError, near_miss
from cache.schema import Model, decode
from extract.annotate.endpoints.questions import MediaPart, Question, Sampling
from extract.annotate.templates import Templates, inert, prompt_fields, prompt_id

FOLDER = Path(__file__).with_name("prompts")

Role = Literal[
    "emer-clue", "emer-words", "emer-label",
    "mme-steps", "mme-judge", "mme-judge-grade", "mme-judge-several",
]  # fmt: skip
ROLES: tuple[Role, ...] = get_args(Role)
EMER_ROLES: tuple[Role, ...] = ROLES[:3]
MME_ROLES: tuple[Role, ...] = ROLES[3:]

Slot = str | Sequence[str] | int
_EVIDENCE = ("what", "clue", "n_frames", "steps")
SLOTS: dict[Role, tuple[str, ...]] = {
    "emer-clue": ("reference", "description"),
    "emer-words": ("description",),
    "emer-label": ("true_words", "words"),
    "mme-steps": ("reply",),
    "mme-judge": (*_EVIDENCE, "truth"),
    "mme-judge-grade": (*_EVIDENCE, "truth"),
    "mme-judge-several": (*_EVIDENCE, "truths"),
}
"""What a prompt of each role may be filled with; `steps` and `truths` are lists, `n_frames` a number."""
_OPTIONAL = ("what", "n_frames")
_RATES: tuple[Role, ...] = ("emer-clue", "emer-label")


class JudgePromptFile(Model):
    """What a prompt file of a judge holds."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    role: Role
    about: str = ""
    """For people; no part of the id."""
    text: str = Field(min_length=1)
    """The template."""
    system: str | None = None
    """Template of the system prompt."""
    max_tokens: int = Field(default=400, ge=1)
    """Longest answer."""
    field: str | None = Field(default=None, min_length=1)
    """What the answer writes in front of its rating, as in `Score: 7`."""

    @model_validator(mode="after")
    def _rates_or_not(self) -> JudgePromptFile:
        if (self.role in _RATES) != (self.field is not None):
            raise ValueError(
                f"role '{self.role}' needs `field`, what stands in front of the rating (Score)"
                if self.role in _RATES
                else f"role '{self.role}' rates nothing and has no `field`"
            )
        return self


class JudgePrompt:
    """A prompt file that was read and checked.

    Args:
        file: What it holds.
        where: Its path, for messages.

    Raises:
        SchemaError: A template does not compile, has an unknown slot, or lacks one it needs.
    """

    def __init__(self, file: JudgePromptFile, where: str) -> None:
        self.file = file
        self.where = where
        allowed = SLOTS[file.role]
        self._templates = Templates(file.text, file.system, file.role, allowed, where)
        found = self._templates.slots
        if missing := [s for s in allowed if s not in found and s not in _OPTIONAL]:
            raise SchemaError(
                f"{where}: a prompt of role '{file.role}' needs the slots {missing}, which it does not "
                "use: the judge would not see them. Write {{ "
                + missing[0]
                + " }} where it belongs."
            )

    def __repr__(self) -> str:
        """Name it by its id."""
        return f"JudgePrompt({self.id!r})"

    @property
    def role(self) -> Role:
        """What is asked for."""
        return self.file.role

    @cached_property
    def id(self) -> str:
        """Name and digest of everything in the file but `about`."""
        return prompt_id(self.file.name, self.file)

    def render(self, slots: Mapping[str, Slot]) -> tuple[str, str | None]:
        """Fill the slots and return the text and the system prompt.

        Args:
            slots: All slots of the role; foreign text is made inert, on one line.

        Raises:
            SchemaError: A slot is missing, or unknown.
        """
        allowed = SLOTS[self.role]
        if set(slots) != set(allowed):
            raise SchemaError(
                f"prompt {self.id}: role '{self.role}' is filled with {list(allowed)}, got "
                f"{sorted(slots)}."
            )
        return self._templates.fill({name: _inert(value) for name, value in slots.items()})

    def question(
        self,
        model: str,
        slots: Mapping[str, Slot],
        media: tuple[MediaPart, ...] = (),
        *,
        temperature: float | None = 0.0,
        seed: int | None = 0,
        tag: Any = None,
    ) -> Question:
        """Return the question that asks a model this prompt; see `render`."""
        text, system = self.render(slots)
        return Question(
            role=self.role,
            model=model,
            prompt_id=self.id,
            text=text,
            media=media,
            system=system,
            sampling=Sampling(temperature=temperature, seed=seed, max_tokens=self.file.max_tokens),
            tag=tag,
        )


def judge_prompts(folder: Path | None, roles: Iterable[Role]) -> dict[Role, JudgePrompt]:
    """Return the prompts of roles: those of a folder, and the shipped ones for the rest.

    Args:
        folder: Of own files; None: the shipped ones.
        roles: Which are needed.

    Raises:
        SchemaError: No such folder, a file in it that is no prompt of its name's role, or one whose name
            no role has.
    """
    wanted = tuple(roles)
    if folder is None:
        return {role: _read(FOLDER / f"{role}.yaml", role) for role in wanted}
    if not folder.is_dir():
        raise SchemaError(
            f"--prompts {folder}: no such folder. Give one with prompt files: "
            f"{', '.join(f'{role}.yaml' for role in wanted)}."
        )
    own = {path.stem: path for path in sorted(folder.glob("*.y*ml"))}
    for stem, path in own.items():
        # A misspelt name must not mean that the shipped wording is used without a word.
        if stem not in ROLES:
            raise SchemaError(
                f"{path}: no prompt of a judge has this name.{near_miss(stem, ROLES)} Allowed: "
                f"{', '.join(ROLES)}."
            )
    return {role: _read(own.get(role, FOLDER / f"{role}.yaml"), role) for role in wanted}


def _read(path: Path, role: Role) -> JudgePrompt:
    where = f"prompt '{path}'"
    file = decode(JudgePromptFile, prompt_fields(path, JudgePromptFile), where)
    if file.role != role:
        raise SchemaError(
            f"{where}: has role '{file.role}'; a file of this name needs role '{role}'."
        )
    return JudgePrompt(file, where)


def _inert(value: Slot) -> str | int | list[str]:
    if isinstance(value, int):
        return value
    return inert(value) if isinstance(value, str) else [inert(text) for text in value]
