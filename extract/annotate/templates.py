"""What prompt files of all kinds share: templates in a sandbox, inert foreign text, an id by content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cache.errors import MissingDependencyError, SchemaError, near_miss
from cache.schema import Model, canonical_json

# What opens or closes a tag or a special token of a chat model: `<x`, `</`, `< /`, `<|`, `<!`, `|>`;
# the last character of a text may do so together with what the template has after it.
_OPENS = re.compile(r"<(?=[A-Za-z|!?\uff5c]|\s*/|\s*\Z)")
_CLOSES = re.compile(r"(?<=[|\uff5c])>")
_TURNS = re.compile(r"\[/?INST\]|<</?SYS>>", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200b-\u200f\u202a-\u202e\u2060-\u2069]+")
_ANGLES = ("\u2039", "\u203a")


class Templates:
    """The text and the system prompt of a prompt file, compiled.

    Args:
        text: Jinja2 template.
        system: Another; None: there is none.
        role: What is asked for, for messages.
        allowed: Slots that a prompt of this role may use.
        where: The file, for messages.

    Raises:
        SchemaError: A template does not compile, or has an unknown slot.
    """

    def __init__(
        self, text: str, system: str | None, role: str, allowed: Sequence[str], where: str
    ) -> None:
        compiled = {
            part: _compile(source, f"{where}, {part}")
            for part, source in (("text", text), ("system", system))
            if source is not None
        }
        self._templates = {part: template for part, (template, _) in compiled.items()}
        self.slots: frozenset[str] = frozenset().union(*(slots for _, slots in compiled.values()))
        """Those that are used."""
        for slot in sorted(self.slots - set(allowed)):
            raise SchemaError(
                f"{where}: unknown slot '{slot}'.{near_miss(slot, allowed)} A prompt of role '{role}' may "
                f"use {list(allowed)}."
            )

    def fill(self, slots: Mapping[str, Any]) -> tuple[str, str | None]:
        """Return the text and the system prompt, tidied; foreign text must be inert by then."""
        made = {part: _tidy(t.render(slots)) for part, t in self._templates.items()}
        return made["text"], made.get("system")


def prompt_id(name: str, file: Model) -> str:
    """Return a prompt's name and a digest of everything in its file but `about`."""
    told = canonical_json(file.model_dump(exclude={"about"}))
    return f"{name}@{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def prompt_fields(path: Path, model: type[Model]) -> dict[str, Any]:
    """Return what a prompt file says, not yet checked.

    Args:
        path: The file.
        model: What it should hold, for the message.

    Raises:
        SchemaError: It cannot be read, is no YAML in UTF-8, or holds no mapping.
    """
    where = f"prompt '{path}'"
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SchemaError(f"cannot read the {where}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise SchemaError(f"{where}: no YAML in UTF-8 ({told}).") from None
    if not isinstance(data, dict):
        raise SchemaError(
            f"{where}: a mapping with {list(model.model_fields)} is needed, got {type(data).__name__}."
        )
    return data


def inert(text: str) -> str:
    """Return foreign text that cannot leave its place in a prompt.

    It is put on one line; invisible characters and the turn marks of chat formats go; an angle bracket
    that could begin or end a tag or a special token is replaced by a typographic one.
    """
    text = _TURNS.sub(" ", _CONTROL.sub(" ", text))
    text = _CLOSES.sub(_ANGLES[1], _OPENS.sub(_ANGLES[0], text))
    return " ".join(text.split())


def _compile(source: str, where: str) -> tuple[Any, frozenset[str]]:
    """Return a template and the names of its slots; it reaches no files, other templates or Python."""
    try:
        import jinja2
        from jinja2 import meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise MissingDependencyError(
            "prompt files need jinja2: pip install 'emocache[annotate]'"
        ) from error
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    # Nothing of Jinja2's own: a slot named like one of its functions would go unnoticed.
    environment.globals.clear()
    try:
        slots = meta.find_undeclared_variables(environment.parse(source))
        if any(True for _ in meta.find_referenced_templates(environment.parse(source))):
            raise SchemaError(f"{where}: a prompt cannot include, import or extend another file.")
        return environment.from_string(source), frozenset(slots)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        at = f" in line {line}" if line else ""
        raise SchemaError(f"{where}: no Jinja2 template{at}: {error}.") from None


def _tidy(text: str) -> str:
    """Return the text without blanks at line ends, and with at most one blank line in a row."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip()
