"""The wording of questions: instruction templates by task, and the order of the options in them.

Every choice is a hash of seed, uid and pass: the same on any machine, in any process.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from cache.errors import SchemaError, near_miss
from train.tasks import TASK_NEEDS, TASKS, Task, check_task

INSTRUCTIONS_FILE = Path(__file__).with_name("instructions.json")
LABELS_SLOT = "{labels}"
"""Where a template lists the options."""
NEUTRAL = "neutral"
# Tags that carry structure: ours, those of a reply, the usual special tokens of chat models.
STRUCTURE = (
    r"INST|Vid|VideoHere|SYS|s|pad|unk|bos|eos|mask|cls|sep|unused\d+|(?:start|end)_of_\w+"
    r"|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|IMG\w*|gMASK|sop"
)
PIPED = r"<[|\uff5c][^<>|\uff5c\s]*[|\uff5c]?>|<[^<>|\uff5c\s]*[|\uff5c]>"  # <|x|>, <|x>, <x|>
STRUCTURE_TAG = re.compile(rf"[<\[]/?(?:{STRUCTURE})[>\]]|{PIPED}", re.IGNORECASE)


class InstructionPools(BaseModel):
    """The instruction templates of each task.

    Templates of `emotion` and `think` list the options in a `{labels}` slot; the others have none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    emotion: tuple[str, ...]
    """Recognition: the reply is one label."""

    think: tuple[str, ...]
    """Recognition and reasoning: `<think>` holds the reasoning, `<answer>` the label."""

    reason: tuple[str, ...] = ()
    """Reasoning: the reply is free text."""

    audio: tuple[str, ...] = ()
    """Description of what is heard."""

    image: tuple[str, ...] = ()
    """Description of what is seen in one frame."""

    # For messages only; two pools are equal wherever they were read.
    _file: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Compare the templates."""
        if not isinstance(other, InstructionPools):
            return NotImplemented
        return all(self._pool(task) == other._pool(task) for task in TASKS)

    def __hash__(self) -> int:
        """Hash the templates."""
        return hash(tuple(map(self._pool, TASKS)))

    @field_validator("*")
    @classmethod
    def _usable(cls, pool: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        n_slots = int("label" in TASK_NEEDS[check_task(str(info.field_name))])
        if not pool and n_slots:
            raise ValueError("the pool is empty; at least one template is needed")
        for i, template in enumerate(pool):
            if template.count(LABELS_SLOT) != n_slots:
                need = "needs one" if n_slots else "lists no options and may have no"
                raise ValueError(f"template {i} {need} {LABELS_SLOT} slot, got {template!r}")
            if found := STRUCTURE_TAG.search(template):
                raise ValueError(f"template {i} holds {found[0]!r}, which the renderer places")
        return pool

    def of(self, task: str) -> tuple[str, ...]:
        """Return the templates of a task; raises SchemaError if there are none."""
        checked = check_task(task)
        pool = self._pool(checked)
        if not pool:
            where = "" if self._file is None else f" '{self._file}'"
            raise SchemaError(
                f"the instructions{where} have no pool '{checked}'; they have "
                f"{[each for each in TASKS if self._pool(each)]}. Add a list of templates under "
                f'"{checked}", or leave the task out.'
            )
        return pool

    def _pool(self, task: Task) -> tuple[str, ...]:
        pool: tuple[str, ...] = getattr(self, task)
        return pool


def load_instructions(path: Path | str | None = None) -> InstructionPools:
    """Read instruction pools from a JSON object `{task: [template, ...]}`.

    Args:
        path: A user's file; None reads the shipped one: ten templates for `emotion`, five for each
            other task. A user's file may leave out `reason`, `audio` and `image`.

    Raises:
        SchemaError: The file is missing or no JSON, a task is unknown, repeated or missing, a
            pool is empty, or a template lacks its `{labels}` slot or may not have one.
    """
    file = INSTRUCTIONS_FILE if path is None else Path(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        pools = InstructionPools.model_validate_json(json.dumps(raw))
    except OSError as error:
        raise SchemaError(f"cannot read the instructions '{file}': {error.strerror}.") from error
    except ValidationError as error:
        # An unknown task first: its near miss explains why the right one is missing.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        where = ".".join(map(str, first["loc"])) or "top level"
        hint = f"{first['msg']}."
        if first["type"] == "extra_forbidden":
            hint = f"unknown task; allowed are {list(TASKS)}.{near_miss(where, TASKS)}"
        raise SchemaError(f"instructions '{file}', {where}: {hint}") from error
    except ValueError as error:  # no JSON, no UTF-8, or a repeated key
        raise SchemaError(f"instructions '{file}' do not decode: {error}.") from error
    pools._file = file
    return pools


def choose_instruction(
    task: str, seed: int, uid: str, epoch: int, pools: InstructionPools | None = None
) -> str:
    """Return the template of a sample: the same arguments give the same one on any machine.

    Args:
        task: One of `TASKS`.
        seed: Seed of the run.
        uid: Record id; it only feeds the hash.
        epoch: Pass over the data, so that a clip meets other wordings later.
        pools: Templates to choose from; None means the shipped ones.

    Raises:
        SchemaError: Unknown task, or one for which the pools hold nothing.
    """
    pool = (_shipped() if pools is None else pools).of(task)
    return pool[_draw("instruction", task, seed, uid, epoch) % len(pool)]


def option_order(
    labels: Sequence[str], seed: int, uid: str, epoch: int, *, shuffle: bool
) -> tuple[str, ...]:
    """Return all labels in the order in which the instruction lists them.

    Give the full native list: one that depends on the true label (`option_list`) leaks it.

    Args:
        labels: The native names in native order.
        seed: Seed of the run.
        uid: Record id; it only feeds the hash.
        epoch: Pass over the data.
        shuffle: True in training; False, for evaluation, keeps the native order.
    """
    if not shuffle:
        return tuple(labels)
    rank = [_draw("options", seed, uid, epoch, i) for i in range(len(labels))]
    return tuple(labels[i] for i in sorted(range(len(labels)), key=rank.__getitem__))


def option_list(
    labels: Sequence[str],
    true_label: str | None,
    seed: int,
    uid: str,
    epoch: int,
    *,
    neutral_free_share: float,
) -> tuple[str, ...]:
    """Return the labels as the released code lists them: often without neutral, if another is true.

    A list without neutral tells the model that neutral is wrong; it is here to reproduce the
    released code (`prompt.option_list=label_conditional`), in training only.

    Args:
        labels: The native names, in any order, which is kept.
        true_label: Of the record, in any case; None, or neutral, keeps the full list.
        seed: Seed of the run.
        uid: Record id; it only feeds the hash.
        epoch: Pass over the data.
        neutral_free_share: Share of the samples with another true label that lose neutral.
    """
    other = true_label is not None and true_label.lower() != NEUTRAL
    if other and _draw("neutral", seed, uid, epoch) < neutral_free_share * 2**64:
        return tuple(label for label in labels if label.lower() != NEUTRAL)
    return tuple(labels)


def _draw(*parts: str | int) -> int:
    """Return a hash of the parts, uniform in [0, 2**64); Python's own hash differs per process."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


@cache
def _shipped() -> InstructionPools:
    return load_instructions()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; a repeated key, of which JSON keeps the last, is refused."""
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"'{key}' occurs twice")
    return dict(pairs)
