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
from train.text.tasks import TASK_TABLE, TASKS, Task, check_task, unknown

INSTRUCTIONS_FILE = Path(__file__).with_name("instructions.json")
V1 = "emocache/v1"
"""Name of the pools of the predecessor, Emotion-LLaMA: one template for emotion, five for reason."""
BUNDLED = {V1: INSTRUCTIONS_FILE.with_name("instructions_v1.json")}
"""Pools that are known by name."""
LABELS_SLOT = "{labels}"
"""Where a template lists the options."""
NEUTRAL = "neutral"
MAX_EXAMPLES = 20
"""Words that a template for an open vocabulary lists at most; a corpus may use hundreds."""
# Tags that carry structure: ours, those of a reply, the usual special tokens of chat models.
STRUCTURE = (
    r"INST|Vid|VideoHere|SYS|s|pad|unk|bos|eos|mask|cls|sep|unused\d+|(?:start|end)_of_\w+"
    r"|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_\w+|IMG\w*|gMASK|sop"
)
V1_STRUCTURE = "video|feature|FeatureHere"
"""Of the predecessor's prompts."""
PIPED = r"<[|\uff5c][^<>|\uff5c\s]*[|\uff5c]?>|<[^<>|\uff5c\s]*[|\uff5c]>"  # <|x|>, <|x>, <x|>
STRUCTURE_TAG = re.compile(
    rf"[<\[]/?(?:{STRUCTURE})[>\]]|</?(?:{V1_STRUCTURE})>|{PIPED}", re.IGNORECASE
)


class InstructionPools(BaseModel):
    """The instruction templates of each task; a task may have none.

    Templates of tasks that choose among labels list the options in a `{labels}` slot; those of
    `open-vocabulary` may list examples there; the others have none.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=True,
    )

    emotion: tuple[str, ...] = ()
    """Recognition: the reply is one label."""

    sentiment: tuple[str, ...] = ()
    """Recognition of the polarity."""

    intent: tuple[str, ...] = ()
    """Recognition of the communicative intent."""

    multi_label: tuple[str, ...] = ()
    """Recognition: the reply is one label or several, with commas between them."""

    open_vocabulary: tuple[str, ...] = ()
    """The reply is words of the model's own, with commas between them."""

    think: tuple[str, ...] = ()
    """Recognition and reasoning: `<think>` holds the reasoning, `<answer>` the label."""

    think_sentiment: tuple[str, ...] = ()
    """The same about the polarity."""

    think_intent: tuple[str, ...] = ()
    """The same about the intent."""

    think_multi_label: tuple[str, ...] = ()
    """The same with one emotion or several."""

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
        task = check_task(str(info.field_name).replace("_", "-"))
        allowed = _n_slots(task)
        for i, template in enumerate(pool):
            if template.count(LABELS_SLOT) not in allowed:
                need = {
                    (1,): "needs one",
                    (0,): "lists no options and may have no",
                    (0, 1): "may have at most one",
                }[allowed]
                raise ValueError(f"template {i} {need} {LABELS_SLOT} slot, got {template!r}")
            if found := STRUCTURE_TAG.search(template):
                raise ValueError(f"template {i} holds {found[0]!r}, which the renderer places")
        return pool

    @property
    def pool_id(self) -> str:
        """Digest of all templates: 12 hexadecimal digits that name this wording."""
        pools = {task: self._pool(task) for task in TASKS if self._pool(task)}
        return hashlib.sha256(json.dumps(pools, sort_keys=True).encode()).hexdigest()[:12]

    def has(self, task: Task) -> bool:
        """Return whether there are templates for a task."""
        return bool(self._pool(task))

    def of(self, task: str) -> tuple[str, ...]:
        """Return the templates of a task; raises SchemaError if there are none."""
        checked = check_task(task)
        pool = self._pool(checked)
        if not pool:
            named = next((name for name, file in BUNDLED.items() if file == self._file), self._file)
            where = "" if named is None else f" '{named}'"
            raise SchemaError(
                f"the instructions{where} have no pool '{checked}'; they have "
                f"{[each for each in TASKS if self._pool(each)]}. Add a list of templates under "
                f'"{checked}", or leave the task out.'
            )
        return pool

    def _pool(self, task: Task) -> tuple[str, ...]:
        pool: tuple[str, ...] = getattr(self, task.replace("-", "_"))
        return pool


def load_instructions(path: Path | str | None = None) -> InstructionPools:
    """Read instruction pools from a JSON object `{task: [template, ...]}`.

    Args:
        path: A user's file, or a name of `BUNDLED`; None reads the shipped one: ten templates for each
            label task, five for each task with a description. Others may leave out tasks.

    Raises:
        SchemaError: An unknown name, the file is missing or no JSON, a task is unknown or repeated, a
            pool is empty, or a template lacks its `{labels}` slot or may not have one.
    """
    file = INSTRUCTIONS_FILE if path is None else BUNDLED.get(str(path), Path(path))
    if str(path).startswith("emocache/") and not file.exists():
        raise unknown("instructions", str(path), BUNDLED)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        _refuse_empty(raw)
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
    task: str,
    seed: int,
    uid: str,
    epoch: int,
    pools: InstructionPools | None = None,
    *,
    examples: bool = True,
) -> str:
    """Return the template of a sample: the same arguments give the same one on any machine.

    Args:
        task: One of `TASKS`.
        seed: Seed of the run.
        uid: Record id; it only feeds the hash.
        epoch: Pass over the data, so that a clip meets other wordings later.
        pools: Templates to choose from; None means the shipped ones.
        examples: False leaves out templates of `open-vocabulary` that list example words.

    Raises:
        SchemaError: Unknown task, or one for which the pools hold nothing.
    """
    pool = (_shipped() if pools is None else pools).of(task)
    if not examples and len(_n_slots(check_task(task))) > 1:
        pool = tuple(template for template in pool if LABELS_SLOT not in template)
        if not pool:
            raise SchemaError(
                f"every template of '{task}' lists example words in a {LABELS_SLOT} slot, and there are "
                "none to list. Add a template without the slot."
            )
    return pool[draw("instruction", task, seed, uid, epoch) % len(pool)]


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
    rank = [draw("options", seed, uid, epoch, i) for i in range(len(labels))]
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
        true_label: Of the record, in any case; None, or neutral, keeps the full list. Of several
            labels give neutral, if it is among them.
        seed: Seed of the run.
        uid: Record id; it only feeds the hash.
        epoch: Pass over the data.
        neutral_free_share: Share of the samples with another true label that lose neutral.
    """
    other = true_label is not None and true_label.lower() != NEUTRAL
    if other and draw("neutral", seed, uid, epoch) < neutral_free_share * 2**64:
        return tuple(label for label in labels if label.lower() != NEUTRAL)
    return tuple(labels)


def draw(*parts: str | int) -> int:
    """Return a hash of the parts, uniform in [0, 2**64); Python's own hash differs per process."""
    text = json.dumps(parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def choose_text(texts: Sequence[str], seed: int, uid: str, epoch: int) -> str | None:
    """Return one of the descriptions that fit a task, another one in a later pass; None of none."""
    return texts[draw("description", seed, uid, epoch) % len(texts)] if texts else None


def choose_task(tasks: Sequence[Task], seed: int, uid: str, epoch: int) -> Task:
    """Return one of the tasks of a family that a record can answer, another one in a later pass."""
    return tasks[draw("task", seed, uid, epoch) % len(tasks)]


def _n_slots(task: Task) -> tuple[int, ...]:
    """Return how many `{labels}` slots a template may have."""
    if task == "open-vocabulary":
        return (0, 1)
    return (0,) if TASK_TABLE[task].label is None else (1,)


def _refuse_empty(raw: Any) -> None:
    """Refuse a pool that a file names without a template."""
    for task, pool in raw.items() if isinstance(raw, dict) else ():
        if pool == []:
            raise ValueError(f"{task}: the pool is empty; add a template, or leave the task out")


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
