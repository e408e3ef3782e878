"""From the raw reply of a model to the labels of a label space: explicit steps, no guessing.

The steps, in order:

1. Take the content of the last complete `<answer>...</answer>`; without a complete one, all that
   follows an unclosed `<answer>`; without any tag, the whole reply.
2. Strip white space and quotes on both sides and sentence punctuation at the end.
3. Casefold, and compare with the labels, then with the aliases (both go through steps 2 and 3).

Whatever is left is off the list. That is a result to be counted, not an error, and never a reason
to search the text for the nearest label: "not happy" contains "happy".

Where several labels are asked for, what step 1 leaves is taken apart at commas, semicolons and line
ends, and steps 2 and 3 are done to each piece.

Emotion-LLaMA, the predecessor, read replies in another way, and published scores rest on it:
`parse_last_word` is there to compare with them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal, NamedTuple

from cache.errors import SchemaError, near_miss

ParseHow = Literal["tag", "exact", "alias", "other", "off_list", "empty"]
"""How a reply became a label, or why it did not; `other` by `parse_last_word` alone."""
LabelReading = Literal["label", "last-word"]
"""How one label is read: by the steps above, or by `parse_last_word`."""
OTHER_LABEL: Final = "neutral"
"""What `parse_last_word` takes any other word for."""

NO_ALIASES: Final[Mapping[str, str]] = MappingProxyType({})

_TAG: Final = re.compile(r"<(/?)answer>", re.IGNORECASE | re.ASCII)
_SEPARATOR: Final = re.compile("[,;\n\uff0c\uff1b\u3001]")
_QUOTES: Final = frozenset("\"'`´‘’‚“”„«»‹›「」『』")  # noqa: RUF001
_END_PUNCTUATION: Final = frozenset(".,;:!?…。，、；：！？")  # noqa: RUF001


class ParsedReply(NamedTuple):
    """What `parse_reply` read in a reply."""

    label: str | None
    """The label as the label space spells it; None exactly when `how` is off_list or empty."""
    how: ParseHow
    """`tag`: equal to a label, inside an answer tag; `exact`: equal to a label, without a tag;
    `alias`: equal to an alias, with or without a tag; `off_list`: neither; `empty`: no text."""
    text: str
    """The text that was compared: after all three steps, so stripped and casefolded."""


class ParsedLabels(NamedTuple):
    """What `parse_labels` read in a reply."""

    labels: tuple[str, ...]
    """The labels as the label space spells them, each once, in its order; of an open space other
    words behind them, casefolded, in the order of the reply. Empty exactly when `how` is off_list or
    empty."""
    how: ParseHow
    """As of one label; `alias` if any piece is one, `off_list` if no piece is a label."""
    unread: tuple[str, ...]
    """Pieces that are no label, stripped and casefolded, each once."""


def parse_reply(
    reply: str, labels: Sequence[str], aliases: Mapping[str, str] = NO_ALIASES
) -> ParsedReply:
    """Read one label from a reply.

    Takes time linear in the length of the reply, whatever the reply contains.

    Args:
        reply: The text that the model wrote, as it stands.
        labels: The label space, in its own spelling.
        aliases: Other words for a label: alias to label. A label always wins over an alias.

    Raises:
        SchemaError: The label space is ambiguous, or an alias leads to no label.
    """
    content, tagged = answer_of(reply)
    text = _normalize(content)
    if not text:
        return ParsedReply(None, "empty", text)
    by_text = _index(labels)
    targets = _alias_index(aliases, labels)
    if text in by_text:
        return ParsedReply(by_text[text], "tag" if tagged else "exact", text)
    if text in targets:
        return ParsedReply(targets[text], "alias", text)
    return ParsedReply(None, "off_list", text)


def parse_last_word(reply: str, labels: Sequence[str]) -> ParsedReply:
    """Read one label from a reply as Emotion-LLaMA's scorer does (reference facts, section 9).

    The last word, as blanks divide them, is the label if it is one as prompts list them, in lower case;
    nothing is stripped and no alias known, so `happy.` is none. Whatever is no label counts as neutral,
    an empty reply too (`how` is then `other`): a model that says nothing is right about neutral clips.

    Args:
        reply: The text that the model wrote, as it stands.
        labels: The label space, in its own spelling. Without a neutral one, other words are off the list.

    Raises:
        SchemaError: The label space is ambiguous.
    """
    by_text = _index(labels)
    word = reply.strip().split(" ")[-1]
    if word in by_text:
        return ParsedReply(by_text[word], "exact", word)
    if OTHER_LABEL in by_text:
        return ParsedReply(by_text[OTHER_LABEL], "other", word)
    return ParsedReply(None, "off_list" if word else "empty", word)


def parse_labels(
    reply: str,
    labels: Sequence[str],
    aliases: Mapping[str, str] = NO_ALIASES,
    *,
    is_open: bool = False,
) -> ParsedLabels:
    """Read any number of labels from a reply.

    Takes time linear in the length of the reply, whatever the reply contains.

    Args:
        reply: The text that the model wrote, as it stands.
        labels: The label space, in its own spelling.
        aliases: Other words for a label: alias to label. A label always wins over an alias.
        is_open: Other words are labels too.

    Raises:
        SchemaError: The label space is ambiguous, or an alias leads to no label.
    """
    content, tagged = answer_of(reply)
    pieces = dict.fromkeys(
        text for piece in _SEPARATOR.split(content) if (text := _normalize(piece))
    )
    if not pieces:
        return ParsedLabels((), "empty", ())
    by_text, targets = _index(labels), _alias_index(aliases, labels)
    named = {by_text[piece] for piece in pieces if piece in by_text}
    meant = {targets[piece] for piece in pieces if piece not in by_text and piece in targets}
    others = tuple(piece for piece in pieces if piece not in by_text and piece not in targets)
    found = tuple(label for label in labels if label in named | meant)
    if is_open:
        found, others = (*found, *others), ()
    if not found:
        return ParsedLabels((), "off_list", others)
    how: ParseHow = "alias" if meant else "tag" if tagged else "exact"
    return ParsedLabels(found, how, others)


def answer_of(reply: str) -> tuple[str, bool]:
    """Return the part of a reply that holds the answer (step 1), and whether a tag marked it."""
    complete: str | None = None
    start: int | None = None
    for tag in _TAG.finditer(reply):
        if not tag[1]:
            start = tag.end()  # a second opening tag starts over, so the innermost content wins
        elif start is not None:
            complete = reply[start : tag.start()]
            start = None
    if complete is not None:
        return complete, True
    if start is not None:
        return reply[start:], True
    return reply, False


def _normalize(text: str) -> str:
    """Strip white space, quotes and closing punctuation, and casefold."""
    start, end = 0, len(text)
    while end > start and (
        text[end - 1].isspace() or text[end - 1] in _QUOTES or text[end - 1] in _END_PUNCTUATION
    ):
        end -= 1
    while start < end and (text[start].isspace() or text[start] in _QUOTES):
        start += 1
    return text[start:end].casefold()


def _index(labels: Iterable[str]) -> dict[str, str]:
    """Map the normalized text of each label to the label; refuse an ambiguous space."""
    by_text: dict[str, str] = {}
    for label in labels:
        text = _normalize(label)
        if not text:
            raise SchemaError(f"labels: {label!r} has no letters left after stripping; rename it.")
        if text in by_text:
            raise SchemaError(
                f"labels: {by_text[text]!r} and {label!r} both read as {text!r}; keep one of them."
            )
        by_text[text] = label
    return by_text


def _alias_index(aliases: Mapping[str, str], labels: Sequence[str]) -> dict[str, str]:
    """Map the normalized text of each alias to its label; refuse a dangling or double alias."""
    targets: dict[str, str] = {}
    for alias, label in aliases.items():
        if label not in labels:
            raise SchemaError(
                f"aliases: {alias!r} leads to {label!r}, which is not a label; allowed: "
                f"{', '.join(labels)}.{near_miss(label, labels)}"
            )
        text = _normalize(alias)
        if targets.setdefault(text, label) != label:
            raise SchemaError(
                f"aliases: {text!r} leads to {targets[text]!r} and to {label!r}; keep one of them."
            )
    return targets
