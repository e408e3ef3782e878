"""The one prompt renderer: training, evaluation and the demo all speak through this file.

A sequence is `BOS | head | prefix tokens | tail | answer | EOS`, where `head` and `tail` are text
around the splice point and the prefix tokens are embeddings that never become text:

    <s> [INST] <Vid> {fusion, image, video, audio} </Vid> {subtitle clause}[{task}] {instruction}
    [/INST] {answer} </s>

The tags are ordinary text; nothing is added to a vocabulary. Subtitles and descriptions are
foreign text, so control tags are taken out of them before they enter a prompt. A uid only seeds
choices and never reaches the prompt. Neither torch nor transformers is needed here.
"""

from __future__ import annotations

import bisect
import builtins
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from cache.errors import SchemaError, near_miss

Task = Literal["emotion", "think"]
PromptStyle = Literal["code", "paper"]

TASKS: tuple[Task, ...] = get_args(Task)
INSTRUCTIONS_FILE = Path(__file__).with_name("instructions.json")
LABELS_SLOT = "{labels}"
HEAD = "[INST] <Vid>"

# The wording of the released code, and of section 4.1 of the paper.
_SUBTITLE_SUBJECT: dict[PromptStyle, str] = {
    "code": "The person in video says",
    "paper": "The person in the video says",
}

# Tags that carry structure: those of the template, those of a reply, the usual special tokens.
_STRUCTURE = "INST|Vid|VideoHere|SYS|s|pad|unk|bos|eos"
_STRUCTURE_TAG = re.compile(rf"[<\[]/?(?:{_STRUCTURE})[>\]]|<\|[^<>|\s]*\|>", re.IGNORECASE)
_CONTROL_TAG = re.compile(
    rf"[<\[]/?(?:{_STRUCTURE}|think|answer|{'|'.join(TASKS)})[>\]]|<\|[^<>|\s]*\|>", re.IGNORECASE
)
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_THINK_ANSWER = re.compile(r"<think>(.*)</think>(<answer>.*</answer>)", re.DOTALL)


class TextTokenizer(Protocol):
    """What the renderer needs of a tokenizer; every Hugging Face tokenizer has it."""

    @property
    def bos_token_id(self) -> Any:
        """Id of the begin-of-sequence token."""

    @property
    def eos_token_id(self) -> Any:
        """Id of the end-of-sequence token."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return a mapping whose `input_ids` is a list of ids."""


@dataclass(frozen=True)
class PrefixLayout:
    """Where each block of prefix tokens sits; every slice is derived from the counts.

    Args:
        blocks: `(name, n_tokens)` in the order in which they enter the sequence; the paper has
            fusion, image, video, audio.

    Raises:
        SchemaError: A name occurs twice or a block has no token.
    """

    blocks: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        """Refuse repeated names and empty blocks."""
        for i, (name, n_tokens) in enumerate(self.blocks):
            if name in self.names[:i]:
                raise SchemaError(f"prefix block '{name}' occurs twice in {list(self.names)}.")
            if n_tokens < 1:
                raise SchemaError(
                    f"prefix block '{name}' has {n_tokens} tokens; at least 1 is needed, "
                    "leave the block out to switch it off."
                )

    @property
    def names(self) -> tuple[str, ...]:
        """Block names in sequence order."""
        return tuple(name for name, _ in self.blocks)

    @property
    def total(self) -> int:
        """Number of prefix tokens."""
        return sum(n_tokens for _, n_tokens in self.blocks)

    def slice(self, name: str) -> builtins.slice:
        """Return the positions of a block within the prefix."""
        if name not in self.names:
            raise SchemaError(
                f"no prefix block '{name}'; this layout has {list(self.names)}."
                f"{near_miss(name, self.names)}"
            )
        at = self.names.index(name)
        start = sum(n_tokens for _, n_tokens in self.blocks[:at])
        return slice(start, start + self.blocks[at][1])


class InstructionPools(BaseModel):
    """The instruction templates of each task; every one has a `{labels}` slot."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    emotion: tuple[str, ...]
    """Recognition: the reply is one label."""

    think: tuple[str, ...]
    """Recognition and reasoning: `<think>` holds the reasoning, `<answer>` the label."""

    @field_validator("emotion", "think")
    @classmethod
    def _usable(cls, pool: tuple[str, ...]) -> tuple[str, ...]:
        if not pool:
            raise ValueError("the pool is empty; at least one template is needed")
        for i, template in enumerate(pool):
            if template.count(LABELS_SLOT) != 1:
                raise ValueError(f"template {i} needs one {LABELS_SLOT} slot, got {template!r}")
            if found := _STRUCTURE_TAG.search(template):
                raise ValueError(f"template {i} holds {found[0]!r}, which the renderer places")
        return pool

    def of(self, task: str) -> tuple[str, ...]:
        """Return the templates of a task."""
        pool: tuple[str, ...] = getattr(self, check_task(task))
        return pool


@dataclass(frozen=True)
class RenderedPrompt:
    """The text around the prefix tokens."""

    head: str
    """From the begin of the sequence to the splice point."""

    tail: str
    """From the splice point to the end of the instruction."""

    answer: str | None
    """What the model should reply, without EOS; None at inference."""


@dataclass(frozen=True)
class PromptTokens:
    """A rendered prompt as token ids; the prefix goes between head and tail."""

    head_ids: tuple[int, ...]
    """BOS and the head."""

    tail_ids: tuple[int, ...]
    """The tail, no special token."""

    answer_ids: tuple[int, ...]
    """The answer and EOS; empty at inference."""


def check_task(task: str) -> Task:
    """Return the task, or raise a SchemaError that lists the known ones."""
    for known in TASKS:
        if task == known:
            return known
    raise SchemaError(f"unknown task '{task}'; allowed are {list(TASKS)}.{near_miss(task, TASKS)}")


def load_instructions(path: Path | str | None = None) -> InstructionPools:
    """Read instruction pools from a JSON object `{task: [template, ...]}`.

    Args:
        path: A user's file; None reads the shipped ten recognition and five reasoning templates.

    Raises:
        SchemaError: The file is missing or no JSON, a task is unknown, repeated or missing, a
            pool is empty, or a template has no `{labels}` slot.
    """
    file = INSTRUCTIONS_FILE if path is None else Path(path)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
        return InstructionPools.model_validate_json(json.dumps(raw))
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


def choose_instruction(
    task: str, seed: int, uid: str, epoch: int, pools: InstructionPools | None = None
) -> str:
    """Return the template of a sample: the same arguments give the same one on any machine.

    Args:
        task: `emotion` or `think`.
        seed: Seed of the run.
        uid: Record id; it only feeds the hash.
        epoch: Pass over the data, so that a clip meets other wordings later.
        pools: Templates to choose from; None means the shipped ones.
    """
    pool = (_shipped() if pools is None else pools).of(task)
    return pool[_draw("instruction", task, seed, uid, epoch) % len(pool)]


def option_order(
    labels: Sequence[str], seed: int, uid: str, epoch: int, *, shuffle: bool
) -> tuple[str, ...]:
    """Return all labels in the order in which the instruction lists them.

    The list is always the full native one: a list that depended on the true label would leak it.

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


def neutralise(text: str) -> str:
    """Take the power out of foreign text: no control tags, no control characters, one line.

    Each of `[INST]`, `<Vid>`, `<think>`, `<answer>`, `[emotion]`, `[think]`, `<s>`, `<|...|>` and
    their closing forms, in any case, gives way to a blank. As no tag holds a blank, what is left
    cannot join up to a new one: `[IN[INST]ST]` becomes `[IN ST]`.
    """
    return " ".join(_CONTROL_TAG.sub(" ", _CONTROL_CHARACTER.sub(" ", text)).split())


def subtitle_clause(text: str | None, prompt_style: PromptStyle = "code") -> str:
    """Return the sentence that quotes the subtitle, with a space behind it.

    Missing text (None, or nothing left but blanks and tags) gives an empty clause: the sentence
    is left out, the model is never told that the person says nothing. The period is always added,
    as in the released code, also behind text that ends in one.

    Args:
        text: The subtitle; control tags are taken out.
        prompt_style: `code` says "in video" as the released code, `paper` "in the video".
    """
    if prompt_style not in _SUBTITLE_SUBJECT:
        raise SchemaError(
            f"unknown prompt_style '{prompt_style}'; allowed are {list(_SUBTITLE_SUBJECT)}."
            f"{near_miss(prompt_style, _SUBTITLE_SUBJECT)}"
        )
    clean = neutralise(text or "")
    return f"{_SUBTITLE_SUBJECT[prompt_style]}: {clean}. " if clean else ""


def render(
    task: str,
    instruction: str,
    labels: Sequence[str],
    *,
    subtitle: str | None = None,
    label: str | None = None,
    description: str | None = None,
    prompt_style: PromptStyle = "code",
) -> RenderedPrompt:
    """Render one sample.

    Args:
        task: `emotion` (the answer is the label) or `think` (description, then label).
        instruction: A template with a `{labels}` slot, see `choose_instruction`.
        labels: The options in the order to list them, see `option_order`; written in lower case.
        subtitle: What the person says, or None.
        label: The true label, one of `labels` in any case; None at inference.
        description: The reasoning to supervise; needed for a `think` answer, else unused.
        prompt_style: Wording of the subtitle clause.

    Raises:
        SchemaError: Unknown task, a template without slot, a label that is not an option, or a
            `think` answer without description (it would train an empty `<think></think>`).
    """
    checked = check_task(task)
    if instruction.count(LABELS_SLOT) != 1:
        raise SchemaError(f"the instruction needs one {LABELS_SLOT} slot, got {instruction!r}.")
    options = [option.lower() for option in labels]
    if not options or any(not option or neutralise(option) != option for option in options):
        raise SchemaError(f"labels must be plain words, at least one; got {list(labels)}.")
    asked = instruction.replace(LABELS_SLOT, ", ".join(options))
    clause = subtitle_clause(subtitle, prompt_style)
    tail = f"</Vid> {clause}[{checked}] {asked} [/INST]"
    answer = None if label is None else _answer(checked, label.lower(), options, description)
    return RenderedPrompt(head=HEAD, tail=tail, answer=answer)


def tokenize(
    prompt: RenderedPrompt, tokenizer: TextTokenizer, *, max_answer_tokens: int
) -> PromptTokens:
    """Turn a rendered prompt into ids: exactly one BOS, segments without special tokens.

    An answer that is too long loses the last words of its reasoning; the closing tags, the label
    and EOS always stay.

    Args:
        prompt: See `render`.
        tokenizer: Any tokenizer with BOS and EOS.
        max_answer_tokens: Upper bound on the answer ids, EOS included.

    Raises:
        SchemaError: The tokenizer lacks BOS or EOS, a special token hides in the text, or the
            shortest form of the answer does not fit.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise SchemaError(f"the tokenizer needs BOS and EOS, got ids {bos} and {eos}.")

    def ids(text: str) -> tuple[int, ...]:
        found = tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])
        if bos in found or eos in found:
            raise SchemaError(f"the prompt text {text!r} holds a special token; remove it.")
        return found

    answer_ids: tuple[int, ...] = ()
    if prompt.answer is not None:
        answer_ids = (*_fit(prompt.answer, ids, max_answer_tokens - 1), int(eos))
    return PromptTokens((int(bos), *ids(prompt.head)), ids(prompt.tail), answer_ids)


def _answer(task: Task, label: str, options: Sequence[str], description: str | None) -> str:
    """Return the text to supervise; label and options are in lower case."""
    if label not in options:
        raise SchemaError(
            f"label '{label}' is not an option; allowed are {list(options)}."
            f"{near_miss(label, options)}"
        )
    if task == "emotion":
        return label
    reasoning = neutralise(description or "")
    if not reasoning:
        raise SchemaError(
            f"a 'think' answer needs a description, got {description!r}; "
            "use the task 'emotion' for records without one."
        )
    return f"<think>{reasoning}</think><answer>{label}</answer>"


def _fit(answer: str, ids: Callable[[str], tuple[int, ...]], limit: int) -> tuple[int, ...]:
    """Return the ids of the answer, its reasoning cut to whole words if it exceeds the limit."""
    found = ids(answer)
    match = _THINK_ANSWER.fullmatch(answer)
    if len(found) > limit and match:
        reasoning, label = match[1], match[2]

        def kept(n_chars: int) -> tuple[int, ...]:
            return ids(f"<think>{reasoning[:n_chars].rstrip()}</think>{label}")

        n_chars = bisect.bisect_right(range(1, len(reasoning)), limit, key=lambda n: len(kept(n)))
        if n_chars and reasoning[n_chars] != " " and " " in reasoning[:n_chars]:
            n_chars = reasoning.rindex(" ", 0, n_chars)
        found = kept(n_chars) if n_chars else found
    if len(found) > limit:
        raise SchemaError(
            f"the answer takes {len(found) + 1} tokens with EOS and cannot be cut to "
            f"max_answer_tokens={limit + 1} with its label intact; raise the bound."
        )
    return found


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
