"""What a judge's reply says: a rating, marks, steps or words; and why it says none.

All readings take time linear in the length of the reply, and none of them guesses: a reply without a
number has none.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple

LOWEST, HIGHEST = 1.0, 10.0
"""The scale that EMER's judge is asked for; 0 is kept too, as the paper's table begins there."""

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_OPEN = re.compile(r"<score>", re.IGNORECASE | re.ASCII)
_CLOSE = re.compile(r"</score>", re.IGNORECASE | re.ASCII)
_PLAIN_MARK = re.compile(r": ([0-9])/1(?![0-9])")
_ANY_MARK = re.compile(r":[^\S\n]*([0-9]{1,9})[^\S\n]*/[^\S\n]*([0-9]{1,9})")
_NUMBERED = re.compile(
    r"(?:[*_#\s-]*(?:step\s*)?([0-9]{1,3})\s*[.):\uff0e\u3001](?![0-9])[*_]*)\s*(.*)", re.IGNORECASE
)
_MARKUP = "*_`\"'"
_NOTHING = frozenset({"none", "n/a", "na", "nothing", "no emotion"})
_ANSWER = re.compile(r"<answer>", re.IGNORECASE)
_TAGS = re.compile(r"</?(?:think|answer)>", re.IGNORECASE)


class Rating(NamedTuple):
    """What `rating_of` read."""

    value: float | None
    how: Literal["field", "first", "no number", "out of range"]
    """`field`: the number after the requested field; `first`: the first number of the reply."""


def rating_of(reply: str, field: str) -> Rating:
    """Read a rating: the number after the requested field, else the first number of the reply.

    The first number anywhere is what the authors' code takes. A number above 10 is no rating.

    Args:
        reply: The judge's answer.
        field: What it was asked to write in front of the number, for example `Score`.
    """
    found = _field(field).search(reply)
    how: Literal["field", "first"] = "field"
    text = found[1] if found is not None else None
    if text is None:
        first = _NUMBER.search(reply)
        if first is None:
            return Rating(None, "no number")
        how, text = "first", first[0]
    value = float(text)
    return Rating(value, how) if value <= HIGHEST else Rating(None, "out of range")


def marks_of(reply: str, *, plain: bool) -> tuple[float, ...]:
    """Read the marks of steps between the first pair of score tags, which must stand on one line.

    Args:
        reply: The judge's answer.
        plain: Take only one digit over 1 behind a colon and one blank, as the released scoring of tasks
            with one label does; False takes any fraction behind a colon, as that of the others and of
            the overall figure does. Over 0 is 0; above 1 stays above 1.

    Returns:
        The marks in order; empty if there is none.
    """
    tagged = _tagged(reply)
    if plain:
        return tuple(float(digit) for digit in _PLAIN_MARK.findall(tagged))
    return tuple(
        int(over) / int(under) if int(under) else 0.0 for over, under in _ANY_MARK.findall(tagged)
    )


def steps_of(text: str) -> tuple[str, ...]:
    """Read the numbered steps of the step agent; text without numbers is one step.

    Lines without a number belong to the step before them; what stands before the first number, a
    heading for example, is dropped.
    """
    steps: list[str] = []
    last = 0
    for line in text.splitlines():
        numbered = _NUMBERED.match(line)
        if numbered is not None and int(numbered[1]) > last:
            last = int(numbered[1])
            steps.append(numbered[2])
        elif steps:
            steps[-1] += " " + line
    found = tuple(step for step in (" ".join(s.split()).strip(_MARKUP) for s in steps) if step)
    whole = " ".join(text.split())
    return found or ((whole,) if whole else ())


def words_of(text: str) -> str:
    """Return condensed emotion words on one line; empty if the judge found none."""
    line = " ".join(text.split()).strip(_MARKUP + " .")
    return "" if line.casefold() in _NOTHING else line


def without_tags(reply: str) -> str:
    """Return a reply on one line, with `Answer:` in place of the answer tag behind a reasoning."""
    before, *behind = _ANSWER.split(reply, maxsplit=1)
    reasoned = _TAGS.sub("", before).strip()
    text = (f"{before} Answer: " if behind and reasoned else before) + "".join(behind)
    return " ".join(_TAGS.sub(" ", text).split())


def _tagged(reply: str) -> str:
    """Return what stands between the first pair of score tags that is whole on one line."""
    for line in reply.split("\n"):
        opened = _OPEN.search(line)
        closed = None if opened is None else _CLOSE.search(line, opened.end())
        if opened is not None and closed is not None:
            return line[opened.end() : closed.start()]
    return ""


@lru_cache(maxsize=32)
def _field(name: str) -> re.Pattern[str]:
    """Return what finds a number behind a field: `Score: 7`, `"score" = 7`, `**Score** (1-10): 7`.

    A range such as `Score: 1-10` is no number.
    """
    return re.compile(
        rf"\b{re.escape(name)}\b[\s*_\"'`\u2018\u2019\u201c\u201d]{{0,8}}(?:\([^()\n]{{0,40}}\)[\s*_\"'`]{{0,8}})?"
        rf"(?:[:=\uff1a]|\bis\b|\bof\b)[\s*_\"'`\u2018\u2019\u201c\u201d]{{0,8}}([0-9]+(?:\.[0-9]+)?)"
        r"(?![0-9.]*\s*(?:-|\u2013|to\b)\s*[0-9])",
        re.IGNORECASE,
    )
