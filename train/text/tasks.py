"""What may be asked about a clip: the tasks, what each needs of a record, and what it may not see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from cache.clip import DescriptionKind, Record
from cache.errors import SchemaError, near_miss
from cache.labels import LabelField
from cache.spec import Stream

Task = Literal[
    "emotion",
    "sentiment",
    "intent",
    "multi-label",
    "open-vocabulary",
    "think",
    "think-sentiment",
    "think-intent",
    "think-multi-label",
    "reason",
    "audio",
    "image",
]
TASKS: tuple[Task, ...] = get_args(Task)
Family = Literal["recognition", "joint"]
"""Tasks of one kind: recognition asks for a label, joint for reasoning and a label."""
FAMILIES: tuple[Family, ...] = get_args(Family)
Asked = Literal[Task, Family]
"""What a mixture may hold: a task, or a family, which stands for whichever of its tasks a record can
answer."""


@dataclass(frozen=True)
class TaskRow:
    """One task."""

    tag: str
    """Identifier in the prompt, between brackets."""
    label: LabelField | None = None
    """The label that the answer names; None: it names none."""
    description: DescriptionKind | None = None
    """The kind of text that the answer is made of; None: a label alone. A joint task takes those that
    explain its label, or whichever."""
    hides: tuple[Stream, ...] = ()
    """Streams that the task may not see, as in the released code."""
    family: Family | None = None

    @property
    def joint(self) -> bool:
        """True if the answer is reasoning with a label."""
        return self.label is not None and self.description is not None

    def texts(self, record: Record, version: str | None = None) -> tuple[str, ...]:
        """Return the descriptions of a record that the answer may be made of.

        Args:
            record: Whose.
            version: Leaves out those of other versions.
        """
        if self.description is None:
            return ()
        found = record.described(self.description, self.label)
        if version is None:
            return found
        of_version = {d.text for d in record.descriptions if d.version == version}
        return tuple(text for text in found if text in of_version)

    def answerable(self, record: Record) -> bool:
        """Return whether a record has what the answer is made of."""
        return (self.label is None or bool(record.labels_of(self.label))) and (
            self.description is None or bool(self.texts(record))
        )

    def needs(self) -> str:
        """Say what the answer is made of, for messages."""
        found = []
        if self.label is not None:
            found.append(f"a label in '{self.label}'")
        if self.description is not None:
            about = f" of '{self.label}' or of no label" if self.label is not None else ""
            found.append(f"a description of kind '{self.description}'{about}")
        return " and ".join(found)


def _recognition(tag: str, label: LabelField) -> TaskRow:
    return TaskRow(tag, label=label, family="recognition")


def _joint(label: LabelField) -> TaskRow:
    return TaskRow("think", label=label, description="multimodal", family="joint")


TASK_TABLE: Mapping[Task, TaskRow] = MappingProxyType(
    {
        "emotion": _recognition("emotion", "emotion"),
        "sentiment": _recognition("sentiment", "sentiment"),
        "intent": _recognition("intent", "intent"),
        "multi-label": _recognition("multi-label", "emotion_multi"),
        "open-vocabulary": _recognition("open-vocabulary", "emotion_ov"),
        "think": _joint("emotion"),
        "think-sentiment": _joint("sentiment"),
        "think-intent": _joint("intent"),
        "think-multi-label": _joint("emotion_multi"),
        "reason": TaskRow("reason", description="multimodal"),
        "audio": TaskRow("audio", description="audio_tone", hides=("image", "video")),
        "image": TaskRow("image", description="visual_objective", hides=("audio", "video")),
    }
)
TAGS: tuple[str, ...] = tuple(dict.fromkeys(row.tag for row in TASK_TABLE.values()))
"""Every identifier."""
SEVERAL_LABELS: tuple[LabelField, ...] = ("emotion_multi", "emotion_ov")
"""Fields that may hold more than one label."""


def available_tasks(record: Record) -> tuple[Task, ...]:
    """Return the tasks that a record can answer, in the order of the table."""
    return tuple(task for task, row in TASK_TABLE.items() if row.answerable(record))


def tasks_of(asked: Asked) -> tuple[Task, ...]:
    """Return the tasks that a name of a mixture stands for: itself, or those of the family."""
    if asked in FAMILIES:
        return tuple(task for task, row in TASK_TABLE.items() if row.family == asked)
    return (check_task(asked),)


def check_task(task: str) -> Task:
    """Return the task, or raise a SchemaError that lists the known ones."""
    for known in TASKS:
        if task == known:
            return known
    raise unknown("task", task, TASKS)


def unknown(what: str, got: str, allowed: Iterable[str]) -> SchemaError:
    """Return the error for a name that is none of the allowed ones."""
    names = list(allowed)
    return SchemaError(f"unknown {what} '{got}'; allowed are {names}.{near_miss(got, names)}")
