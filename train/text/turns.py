"""A chat model's turns: what stands around a sample, and the token that ends an answer.

Read off the tokenizer's own chat template, so that any chat model sees the form it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from cache.errors import SchemaError
from train.text.tasks import unknown

Chat = Literal["auto", "llama-2"]
LLAMA_2 = ("[INST] ", " [/INST]")
"""What stands before and after a sample with LLaMA-2."""
_OWN_TAGS = {
    f"<{slash}{name}>"
    for name in ("Vid", "think", "answer", "video", "feature")
    for slash in ("", "/")
}
# What a chat template must reproduce: all that our own text is made of.
_USER = '<Vid></Vid> It\'s "A & b". [think] {labels} <think></think><answer></answer> 7.'
_ASSISTANT = "Emocache's answer 7."
# Some templates write today's date; tomorrow's prompt must be the same. 26 July 2024 is LLaMA-3's.
_FIXED_DATE = {
    "%Y": "2024", "%y": "24", "%m": "07", "%B": "July", "%b": "Jul", "%d": "26", "%A": "Friday",
    "%a": "Fri", "%H": "12", "%I": "12", "%p": "PM", "%M": "00", "%S": "00",
}  # fmt: skip
_STRFTIME = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f' | replace("{code}", "{value}")' for code, value in _FIXED_DATE.items())
    + ' }}{% endmacro %}{{ "" }}'
)


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
class Turns:
    """What a chat model expects around a sample: the user's turn, the begin of its own.

    Bound to the tokenizer it was made of; see `turns_of`.
    """

    before: str
    """Template text in front of the sample, without BOS."""

    after: str
    """Template text between the sample and the answer."""

    end_ids: tuple[int, ...]
    """Supervised behind the answer: the token that ends the model's turn."""

    stop_ids: tuple[int, ...]
    """Where generation must stop: the end of the turn, and EOS."""

    bos_id: int | None
    """Put in front of everything; None for models without BOS."""

    special: Mapping[int, str] = field(hash=False, repr=False)
    """Id -> token that only the template may write."""


def turns_of(tokenizer: Any, chat: Chat = "auto") -> Turns:
    """Return the turns that surround every sample of a run.

    Args:
        tokenizer: Of the language model, from transformers.
        chat: `auto` takes the tokenizer's chat template, if it has one; else, and with `llama-2`,
            the turns are `[INST] ... [/INST]` with BOS and EOS, where the tokenizer has them.

    Raises:
        SchemaError: The tokenizer has no token to end an answer, or its template refuses a single
            question, changes it, or starts the reasoning by itself.
    """
    if chat not in get_args(Chat):
        raise unknown("prompt.chat", chat, get_args(Chat))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, after = LLAMA_2
    ending = ""
    if chat == "auto" and getattr(tokenizer, "chat_template", None):
        question = {"role": "user", "content": _USER}
        before, after = _around(_USER, [question], tokenizer, add_generation_prompt=True)
        if after.rstrip().endswith("<think>"):
            raise _unfit("opens a <think> in front of every answer")
        answer = {"role": "assistant", "content": _ASSISTANT}
        ending = _around(_ASSISTANT, [question, answer], tokenizer, add_generation_prompt=False)[1]
        bos_token = getattr(tokenizer, "bos_token", None)
        if bos is not None and bos_token and before.lstrip().startswith(bos_token):
            before = before.lstrip().removeprefix(bos_token)
        elif list(tokenizer("x", add_special_tokens=True)["input_ids"])[:1] != [bos]:
            bos = None
    special = _special_tokens(tokenizer, f"{before} {after} {ending}")
    end = next((i for i in encode(tokenizer, ending) if i in special), eos)
    if end is None:
        raise SchemaError(
            "the tokenizer needs EOS to end an answer, got None and no chat template that ends a "
            "turn by a special token. Set eos_token in its tokenizer_config.json."
        )
    return Turns(
        before=before,
        after=after,
        end_ids=(int(end),),
        stop_ids=tuple(dict.fromkeys(int(i) for i in (end, eos) if i is not None)),
        bos_id=None if bos is None else int(bos),
        special=special,
    )


def encode(tokenizer: TextTokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of a text, with no special token in front or behind."""
    return tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"])


def _around(
    content: str, messages: list[dict[str, str]], tokenizer: Any, *, add_generation_prompt: bool
) -> tuple[str, str]:
    """Return what the tokenizer's chat template writes before and after the content."""
    from jinja2 import TemplateError  # transformers renders with it

    try:
        template = str(tokenizer.get_chat_template())
        if "strftime_now" in template:
            template = _STRFTIME + template
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise _unfit(f"refuses {[m['role'] for m in messages]}: {error}") from None
    parts = str(text).split(content)
    if len(parts) != 2:
        wrong = f"writes it {len(parts) - 1} times" if len(parts) > 2 else "changes it"
        raise _unfit(f"does not keep the text of a turn: given {content!r} once, it {wrong}")
    return parts[0], parts[1]


def _special_tokens(tokenizer: Any, template: str) -> dict[int, str]:
    """Return id -> token that foreign text may not hold.

    They are the tokenizer's special tokens and those added ones that the template text uses, except
    the unknown one, into which any rare character turns, and the tags that a reply is made of.
    """
    added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", {}))
    used = set(encode(tokenizer, template))
    found = {i: str(t) for i, t in added.items() if t.special or (i in used and str(t).strip())}
    known = getattr(tokenizer, "all_special_ids", ()), getattr(tokenizer, "all_special_tokens", ())
    found.update(zip(*known, strict=True))
    unknown = getattr(tokenizer, "unk_token_id", None)
    found = {i: token for i, token in found.items() if i != unknown and token not in _OWN_TAGS}
    for name in ("bos", "eos"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            found[int(i)] = str(getattr(tokenizer, f"{name}_token", name.upper()))
    return found


def _unfit(why: str) -> SchemaError:
    return SchemaError(
        f"the tokenizer's chat template {why}. A prompt needs a template that takes one question "
        "and one answer and leaves their text as it is. Set prompt.chat=llama-2 to surround samples "
        "by [INST] ... [/INST] instead."
    )
