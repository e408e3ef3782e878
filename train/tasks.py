"""What may be asked about a clip: the tasks, what each needs of a record, and what it may not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

from cache.errors import SchemaError, near_miss
from cache.spec import Stream

Task = Literal["emotion", "think", "reason", "audio", "image"]
TASKS: tuple[Task, ...] = get_args(Task)
TASK_NEEDS: dict[Task, tuple[str, ...]] = {
    "emotion": ("label",),
    "think": ("label", "description"),
    "reason": ("description",),
    "audio": ("audio_description",),
    "image": ("image_description",),
}
"""Fields of a record that the answer of a task is made of."""
TASK_HIDES: dict[Task, tuple[Stream, ...]] = {
    "audio": ("image", "video"),
    "image": ("audio", "video"),
}
"""Streams that a task may not see, as in the released code; the others see all."""


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
