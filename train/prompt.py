"""The one prompt renderer: training, evaluation and the demo all speak through this file.

A sequence is `BOS | head | prefix tokens | tail | answer | end`, where `head` and `tail` are text
around the splice point and the prefix tokens are embeddings that never become text. With LLaMA-2:

    <s> [INST] <Vid> {fusion, image, video, audio} </Vid> {subtitle clause}[{task}] {instruction}
    [/INST] {answer} </s>

The predecessor (`v1`) has two splice points, each with tags of its own:

    <s> [INST] <video> {image} </video> <feature> {local, video, audio, cls} </feature>
    {subtitle clause}[{task}] {instruction} [/INST] {answer} </s>

Another model's own chat template takes the place of `[INST]` and `[/INST]`, see `turns_of`. Our
tags are ordinary text; nothing is added to a vocabulary. Subtitles, names of persons and
descriptions are foreign text: control tags are taken out of them before they enter a prompt, and
only the chat template may write a special token. A uid only seeds choices and never reaches the
prompt; nor do speakers, parents and splits. Neither torch nor
transformers is needed here. docs/prompts.md tells the same in plain words.
"""

from __future__ import annotations

import bisect
import builtins
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from cache.errors import SchemaError, near_miss
from train.text.instructions import LABELS_SLOT, PIPED, STRUCTURE, V1_STRUCTURE
from train.text.tasks import SEVERAL_LABELS, TAGS, TASK_TABLE, Task, check_task, unknown
from train.text.turns import LLAMA_2, TextTokenizer, Turns, encode, turns_of

PromptStyle = Literal["code", "paper", "v1"]
AnswerNorm = Literal["keep", "blip"]
RENDERER_VERSION = 2
"""Raised whenever an equal record, instruction and order of options give another text."""
SEPARATOR = ", "
"""Between options, and between the labels of an answer."""
HEAD = "[INST] <Vid>"
"""The head with LLaMA-2's turns."""
FINE = "fine"
"""Version of the descriptions that a language model refined, as MERR-Fine has them."""
FINE_TAG = "reason_v2"
"""By which the predecessor's second stage asks for them."""
# What stands around and between the splice points of a style.
_SPLICES: dict[PromptStyle, tuple[str, ...]] = {
    "code": ("<Vid>", "</Vid> "),
    "paper": ("<Vid>", "</Vid> "),
    "v1": ("<video>", "</video> <feature>", "</feature> "),
}
# The wording of the released code, and of section 4.1 of the paper.
_SUBTITLE_SUBJECT: dict[PromptStyle, str] = {
    "code": "The person in video says",
    "paper": "The person in the video says",
    "v1": "The person in video says",
}
_NAMES = rf"{STRUCTURE}|think|answer|video|{'|'.join(TAGS)}"


def _tags(names: str) -> re.Pattern[str]:
    return re.compile(rf"[<\[]/?(?:{names})[>\]]|{PIPED}", re.IGNORECASE)


_CONTROL_TAG: dict[PromptStyle, re.Pattern[str]] = {
    "code": _tags(_NAMES),
    "paper": _tags(_NAMES),
    "v1": _tags(rf"{_NAMES}|{V1_STRUCTURE}|{FINE_TAG}"),
}
_CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_THINK_ANSWER = re.compile(r"(<think>)(.*)(</think><answer>.*</answer>)", re.DOTALL)
_BLIP_BLANKS = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
_BLIP_WORDS = 200


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
    starts: tuple[int, ...] = (0,)
    """Number of the block with which each splice point's group begins, ascending from 0."""

    def __post_init__(self) -> None:
        """Refuse repeated names, empty blocks and groups that do not tile them."""
        if self.starts[:1] != (0,) or [*self.starts, len(self.blocks)] != sorted(
            (*self.starts, len(self.blocks))
        ):
            raise SchemaError(
                f"groups of {len(self.blocks)} prefix blocks must begin with block 0 and ascend, got "
                f"{list(self.starts)}."
            )
        for i, (name, n_tokens) in enumerate(self.blocks):
            if name in self.names[:i]:
                raise SchemaError(f"prefix block '{name}' occurs twice in {list(self.names)}.")
            if n_tokens < 1:
                raise SchemaError(
                    f"prefix block '{name}' has {n_tokens} tokens; at least 1 is needed, "
                    "leave the block out to switch it off."
                )

    @classmethod
    def of_groups(cls, groups: Sequence[tuple[tuple[str, int], ...]]) -> PrefixLayout:
        """Return the layout of groups of blocks, one per splice point; a group may be empty."""
        starts: list[int] = []
        blocks: list[tuple[str, int]] = []
        for group in groups:
            starts.append(len(blocks))
            blocks += group
        return cls(tuple(blocks), tuple(starts))

    @property
    def groups(self) -> tuple[builtins.slice, ...]:
        """Positions within the prefix of each splice point's tokens."""
        ends = list(accumulate(sum(n for _, n in part) for part in self.parts))
        return tuple(map(builtins.slice, (0, *ends[:-1]), ends))

    @property
    def parts(self) -> tuple[tuple[tuple[str, int], ...], ...]:
        """The blocks of each splice point."""
        ends = (*self.starts[1:], len(self.blocks))
        return tuple(self.blocks[start:end] for start, end in zip(self.starts, ends, strict=True))

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


@dataclass(frozen=True)
class RenderedPrompt:
    """The text around the prefix tokens."""

    head: str
    """From the begin of the sequence to the first splice point."""

    tail: str
    """From the last splice point to the end of the instruction."""

    answer: str | None
    """What the model should reply, without its end; None at inference."""

    between: tuple[str, ...] = ()
    """From each splice point to the next one; empty with a single one."""

    free_text: bool = False
    """True if the whole answer is a description, of which a long one may lose its last words."""

    def shown(self, layout: PrefixLayout, phrase: str = "{}") -> str:
        """Return the prompt for people, with what each splice point takes in braces: `{64 fusion, ...}`.

        Args:
            layout: Of the prefix.
            phrase: What is said of the blocks.
        """
        taken = [", ".join(f"{n} {name}" for name, n in part) or "no" for part in layout.parts]
        texts = (*self.between, self.tail)
        placed = [f"{{{phrase.format(p)}}} {text}" for p, text in zip(taken, texts, strict=True)]
        return " ".join((self.head, *placed))


@dataclass(frozen=True)
class PromptTokens:
    """A rendered prompt as token ids; the prefix goes between head and tail."""

    head_ids: tuple[int, ...]
    """BOS, where the model has one, and the head."""

    tail_ids: tuple[int, ...]
    """The tail; a special token only where the chat template has one."""

    answer_ids: tuple[int, ...]
    """The answer and its end; empty at inference."""

    between_ids: tuple[tuple[int, ...], ...] = ()
    """What stands between the groups of the prefix, one less than there are groups. The same for every
    question of a run, as the head is."""


def neutralise(text: str, prompt_style: PromptStyle = "code") -> str:
    """Take the power out of foreign text: no control tags, no control characters, one line.

    Each of `[INST]`, `<Vid>`, `<think>`, `<answer>`, `[emotion]` and the other tasks, `<s>`,
    `<bos>`, `<start_of_turn>`, `<|...|>` and the like, and their closing forms, in any case, gives
    way to a blank. As no tag holds a blank, what is left cannot join up to a new one:
    `[IN[INST]ST]` becomes `[IN ST]`. Special tokens of a rare tokenizer are `tokenize`'s to refuse.

    Args:
        text: Subtitle, description, name.
        prompt_style: `v1` has tags of its own, such as `<feature>`.
    """
    return " ".join(_CONTROL_TAG[prompt_style].sub(" ", _CONTROL_CHARACTER.sub(" ", text)).split())


def subtitle_clause(
    text: str | None, prompt_style: PromptStyle = "code", person: str | None = None
) -> str:
    """Return the sentence that quotes the subtitle, with a space behind it.

    Missing text (None, or nothing left but blanks and tags) gives an empty clause: the sentence
    is left out, the model is never told that the person says nothing. The period is always added,
    as in the released code, also behind text that ends in one.

    Args:
        text: The subtitle; control tags are taken out.
        prompt_style: `code` and `v1` say "in video" as the released code, `paper` "in the video".
        person: Who says it, in place of "the person in video", for example "The woman with the red
            scarf"; control tags are taken out.
    """
    if prompt_style not in _SUBTITLE_SUBJECT:
        raise unknown("prompt_style", prompt_style, _SUBTITLE_SUBJECT)
    clean, who = (neutralise(given or "", prompt_style) for given in (text, person))
    subject = f"{who[0].upper()}{who[1:]} says" if who else _SUBTITLE_SUBJECT[prompt_style]
    return f"{subject}: {clean}. " if clean else ""


def render(
    task: str,
    instruction: str,
    labels: Sequence[str],
    *,
    subtitle: str | None = None,
    person: str | None = None,
    label: str | Sequence[str] | None = None,
    description: str | None = None,
    with_answer: bool | None = None,
    prompt_style: PromptStyle = "code",
    answer_norm: AnswerNorm = "keep",
    fine: bool = False,
    turns: Turns | None = None,
) -> RenderedPrompt:
    """Render one sample.

    Args:
        task: One of `TASKS`; what its answer is made of stands in `TASK_TABLE`.
        instruction: A template, see `choose_instruction`; with a `{labels}` slot for tasks that
            choose among labels, without for those that name none.
        labels: The options in the order to list them, see `option_order`; written in lower case.
            Of `open-vocabulary` they are examples. Unused by templates without options.
        subtitle: What the person says, or None.
        person: Who says it; None: "the person in video".
        label: The true label, one of `labels` in any case, or several of them in the order to name
            them. Of `open-vocabulary` any words.
        description: The text to supervise: the reasoning, or what is heard or seen.
        with_answer: True demands all that the answer is made of, False leaves the answer out; None
            leaves it out if there is no label, or no description where the task names no label.
        prompt_style: Tags, and wording of the subtitle clause.
        answer_norm: `keep`, or `blip` for the released code's: lower case, no punctuation, at most
            200 words of description.
        fine: Ask for a refined description, which `reason` in the style `v1` calls `[reason_v2]`.
        turns: Of the language model; None means LLaMA-2's.

    Raises:
        SchemaError: Unknown task, a template that does not fit the task, a label that is not an
            option, or an answer without what it needs (it would train an empty one).
    """
    checked = check_task(task)
    if answer_norm not in get_args(AnswerNorm):
        raise unknown("answer_norm", answer_norm, get_args(AnswerNorm))
    row = TASK_TABLE[checked]
    options = _options(checked, instruction, labels, prompt_style)
    names = (label,) if isinstance(label, str) else tuple(label or ())
    if with_answer is None:
        with_answer = bool(names) if row.label is not None else description is not None
    before, after = LLAMA_2 if turns is None else (turns.before, turns.after)
    clause = subtitle_clause(subtitle, prompt_style, person)
    asked = instruction.replace(LABELS_SLOT, SEPARATOR.join(options))
    opening, *between, closing = _SPLICES[prompt_style]
    tag = FINE_TAG if fine and prompt_style == "v1" and task == "reason" else row.tag
    answer = None
    if with_answer:
        answer = _answer(checked, names, description, options, answer_norm, prompt_style)
    return RenderedPrompt(
        head=f"{before}{opening}",
        tail=f"{closing}{clause}[{tag}] {asked}{after}",
        answer=answer,
        between=tuple(between),
        free_text=row.label is None,
    )


def tokenize(
    prompt: RenderedPrompt,
    tokenizer: TextTokenizer,
    *,
    max_answer_tokens: int,
    turns: Turns | None = None,
    n_bos: int = 1,
) -> PromptTokens:
    """Turn a rendered prompt into ids: BOS where there is one, special tokens from the template alone.

    An answer that is too long loses the last words of its description; the closing tags, the label
    and the end always stay.

    Args:
        prompt: See `render`.
        tokenizer: The language model's.
        max_answer_tokens: Upper bound on the answer ids, the end included.
        turns: Those that the prompt was rendered with; None means LLaMA-2's.
        n_bos: How often BOS stands in front, if the model has it; the released code asks behind two.

    Raises:
        SchemaError: The tokenizer lacks EOS, a special token hides in foreign text, the prompt has
            other turns, or the shortest form of the answer does not fit.
    """
    if turns is None:
        turns = turns_of(tokenizer, "llama-2")
    elif not (prompt.head.startswith(turns.before) and prompt.tail.endswith(turns.after)):
        raise SchemaError(
            f"the prompt '{prompt.head} ... {prompt.tail[-40:]}' was rendered with other turns than "
            f"{turns.before!r} ... {turns.after!r}; give render and tokenize the same ones."
        )
    special = turns.special

    def ids(text: str, template: str = "") -> tuple[int, ...]:
        """Encode text in which only the template's part may hold special tokens."""
        found = encode(tokenizer, text)
        hidden = [i for i in found if i in special]
        written = [i for i in encode(tokenizer, template) if i in special] if hidden else []
        if hidden != written:
            first = next(iter(Counter(hidden) - Counter(written)), hidden[0])
            raise SchemaError(
                f"the prompt text {text[:200]!r} holds a special token, {special[first]!r}, which "
                "only a chat template may write. Take it out of the record or of the instruction."
            )
        return found

    answer_ids: tuple[int, ...] = ()
    if prompt.answer is not None:
        limit = max_answer_tokens - len(turns.end_ids)
        answer_ids = (*_fit(prompt, prompt.answer, ids, limit), *turns.end_ids)
    bos = () if turns.bos_id is None else (turns.bos_id,) * n_bos
    head_ids = ids(prompt.head, turns.before)
    return PromptTokens(
        (*bos, *head_ids),
        ids(prompt.tail, turns.after),
        answer_ids,
        tuple(map(ids, prompt.between)),
    )


def _options(task: Task, instruction: str, labels: Sequence[str], style: PromptStyle) -> list[str]:
    """Return the options in lower case, after checking that the instruction and they fit the task."""
    row, n_slots = TASK_TABLE[task], instruction.count(LABELS_SLOT)
    is_open = task == "open-vocabulary"
    if row.label is None and n_slots:
        raise SchemaError(
            f"the task '{task}' lists no options, but its instruction has a {LABELS_SLOT} slot: "
            f"{instruction!r}. Take the slot out."
        )
    if row.label is None or (is_open and not n_slots):
        return []
    if n_slots != 1:
        raise SchemaError(f"the instruction needs one {LABELS_SLOT} slot, got {instruction!r}.")
    options = [option.lower() for option in labels]
    if not options or any(not option or neutralise(option, style) != option for option in options):
        raise SchemaError(f"labels must be plain words, at least one; got {list(labels)}.")
    if row.label in SEVERAL_LABELS:
        _refuse_separators(task, options)
    return options


def _refuse_separators(task: Task, labels: Sequence[str]) -> None:
    """Refuse labels of which a list could not be taken apart again."""
    for label in labels:
        if "," in label:
            raise SchemaError(
                f"label {label!r} holds a comma, which separates the labels of a '{task}' answer. Spell "
                "it another way in the label space, with this spelling as an alias."
            )


def _names(task: Task, given: Sequence[str], options: Sequence[str], style: PromptStyle) -> str:
    """Return the labels of an answer as text; the options are in lower case."""
    row = TASK_TABLE[task]
    names = [name.lower() for name in given]
    allowed = f"allowed are {list(options)}." if options else "any words are allowed."
    if not names or not all(names):
        raise SchemaError(
            f"an answer to '{task}' needs a label, got {list(given) or None}; {allowed} Leave out "
            "records without one."
        )
    if len(names) > 1 and row.label not in SEVERAL_LABELS:
        raise SchemaError(
            f"an answer to '{task}' names one label, got {names}; {allowed} Several labels are for "
            "'multi-label', 'think-multi-label' and 'open-vocabulary'."
        )
    if task == "open-vocabulary":
        names = [neutralise(name, style) for name in names]
        if not all(names):
            raise SchemaError(f"labels must be plain words; got {list(given)}.")
        _refuse_separators(task, names)
        return SEPARATOR.join(names)
    for name in names:
        if name not in options:
            raise SchemaError(
                f"label '{name}' is not an option; allowed are {list(options)}."
                f"{near_miss(name, options)}"
            )
    return SEPARATOR.join(names)


def _answer(
    task: Task,
    labels: Sequence[str],
    description: str | None,
    options: Sequence[str],
    norm: AnswerNorm,
    style: PromptStyle,
) -> str:
    """Return the text to supervise; the options are in lower case."""
    row = TASK_TABLE[task]
    names = "" if row.label is None else _names(task, labels, options, style)
    if row.description is None:
        return names
    text = neutralise(description or "", style)
    if norm == "blip":
        text = _blip(text)
    if not text.strip():
        raise SchemaError(
            f"an answer to '{task}' needs a description of kind '{row.description}', got "
            f"{description!r}; use another task for records without one."
        )
    return f"<think>{text}</think><answer>{names}</answer>" if row.joint else text.strip()


def _blip(text: str) -> str:
    """Normalise a description as the released code does.

    The released code does it to the answer as a whole, tags and label included: a `think` answer of
    more than 200 words loses its closing tags and its label. Here the description alone is cut. The
    blank that a last period leaves in front of `</think>` is kept.
    """
    clean = re.sub(r" {2,}", " ", text.lower().translate(_BLIP_BLANKS))
    words = clean.split()
    return " ".join(words[:_BLIP_WORDS]) if len(words) > _BLIP_WORDS else clean


def _fit(
    prompt: RenderedPrompt, answer: str, ids: Callable[[str], tuple[int, ...]], limit: int
) -> tuple[int, ...]:
    """Return the ids of the answer, its description cut to whole words if it exceeds the limit."""
    found = ids(answer)
    match = _THINK_ANSWER.fullmatch(answer)
    if len(found) > limit and (match or prompt.free_text):
        opening, text, closing = match.groups() if match else ("", answer, "")

        def kept(n_chars: int) -> tuple[int, ...]:
            return ids(f"{opening}{text[:n_chars].rstrip()}{closing}")

        n_chars = bisect.bisect_right(range(1, len(text)), limit, key=lambda n: len(kept(n)))
        if n_chars and text[n_chars] != " " and " " in text[:n_chars]:
            n_chars = text.rindex(" ", 0, n_chars)
        found = kept(n_chars) if n_chars else found
    if len(found) > limit:
        raise SchemaError(
            f"the answer takes {len(found) + 1} tokens with EOS and cannot be cut to "
            f"max_answer_tokens={limit + 1} with its label intact; raise the bound."
        )
    return found
