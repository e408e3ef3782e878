"""From the text of a reply to what is compared: explicit steps, the same for every item.

The published scorers compare text as it stands. So a reply with reasoning is first reduced to its
answer, as a step of its own that a result names (`Reading`); then the scorer's own rules apply.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Final, NamedTuple

from eval.benchmarks import benchmark
from eval.parse import OTHER_LABEL, answer_of, parse_labels, parse_last_word, parse_reply
from eval.scoring.result import Reading
from extract.corpora.registry import corpus_row

_WORD_ENDS: Final = re.compile("[,'\"]")
_LABEL_ENDS: Final = re.compile("[,;]")
MISSING: Final = "missing"
"""How a reply reads that is not there."""


class Read(NamedTuple):
    """What a reply says."""

    predicted: tuple[str, ...]
    """Labels as they are compared: one, several, or none."""
    how: str
    """How the reply reads against the offered labels; see `eval.parse`."""


def plain(text: str) -> str:
    """Return a text trimmed and in lower case, as single labels are compared."""
    return text.strip().lower()


def words_of(text: str) -> tuple[str, ...]:
    """Take a text apart as hit rate and OV-MERD+ do: at commas and straight quotes, nothing else.

    The scorer wraps the text in brackets and takes one pair off again, so a list in brackets keeps its
    own: unquoted, its first and last word keep a bracket and are no known words.
    """
    return tuple(word.lower() for piece in _WORD_ENDS.split(text) if (word := piece.strip()))


def labels_of(text: str) -> tuple[str, ...]:
    """Take a text apart as mAP does: at commas and semicolons; each label once."""
    pieces = (plain(piece) for piece in _LABEL_ENDS.split(text))
    return tuple(dict.fromkeys(piece for piece in pieces if piece))


@lru_cache(maxsize=1 << 16)
def read_reply(reply: str, task: str, reading: Reading) -> Read:
    """Return what of a reply is compared, and how it reads against the offered labels.

    Args:
        reply: As the model wrote it.
        task: Id of the benchmark.
        reading: How much of the reply is compared; `last-word` of one label only.
    """
    row, aliases = benchmark(task), _aliases(task)
    if reading == "last-word":
        word = parse_last_word(reply, row.options)
        return Read((word.label or OTHER_LABEL,), "other" if word.label is None else word.how)
    if row.metric in ("accuracy", "waf"):
        parsed = parse_reply(reply, row.options, aliases)
        if reading == "label":
            text = parsed.label or parsed.text
        else:
            text = plain(_content(reply, reading))
        return Read((text,) if text else (), parsed.how)
    is_open = row.metric == "wheel-f"
    found = parse_labels(reply, row.options, aliases, is_open=is_open)
    if reading != "label":
        content = _content(reply, reading)
        return Read(labels_of(content) if row.metric == "map" else words_of(content), found.how)
    # A word that is not offered may still be in the group of the truth.
    others = found.unread if row.metric == "hit-rate" else ()
    return Read((*found.labels, *others), found.how)


def _content(reply: str, reading: Reading) -> str:
    return reply if reading == "raw" else answer_of(reply)[0]


@cache
def _aliases(task: str) -> Mapping[str, str]:
    """Return other spellings of the offered labels, as the corpus knows them."""
    row = benchmark(task)
    known = corpus_row(row.corpus).spaces[row.field].aliases
    return {
        alias: label
        for alias, label in known.items()
        if label in row.options and alias not in row.options
    }
