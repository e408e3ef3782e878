"""What the model said of a clip, and what was read in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cache.errors import SchemaError
from eval.predictions import Prediction
from train.prompt import SEPARATOR, neutralise

_THOUGHT = re.compile(r"\s*<think>(.*?)(?:</think>|<answer>|\Z)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class LiveReply:
    """What the model said of a clip."""

    prediction: Prediction
    """Reply, what was read in it, and where it came from; it has no truth."""
    options: tuple[str, ...]
    """Labels that were offered; empty of a task without."""

    @property
    def reply(self) -> str:
        """The text, unchanged."""
        return self.prediction.reply

    @property
    def label(self) -> str | None:
        """The label that was read in it."""
        return self.prediction.label

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that were read in it, whether the task asks for one or several."""
        return self.prediction.labels or (() if self.label is None else (self.label,))

    @property
    def likelihoods(self) -> Mapping[str, float] | None:
        """Offered label -> probability; None: not computed."""
        return self.prediction.likelihoods

    @property
    def reasoning(self) -> str | None:
        """What stands in front of the answer: of a joint task the thought, else None."""
        found = _THOUGHT.match(self.reply)
        return found[1].strip() if found is not None else None


class ReplyStream(Iterator[str]):
    """A reply as it is written: pieces of text that together are the reply.

    Close one that is not read to its end; until then nobody else is answered.
    """

    def __init__(self, pieces: Iterator[str], finish: Callable[[], LiveReply]) -> None:
        """Wrap a generator; use `LiveModel.stream`."""
        self._pieces, self._finish = pieces, finish
        self._is_closed = False
        self.reply: LiveReply | None = None
        """What was said, once it is complete; None of a reply that was stopped."""

    def __next__(self) -> str:
        """Return the next piece."""
        try:
            return next(self._pieces)
        except StopIteration:
            if self.reply is None and not self._is_closed:
                self.reply = self._finish()
            raise

    def close(self) -> None:
        """Stop writing, if there is more to come."""
        self._is_closed = True
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()


def checked_labels(given: Sequence[str]) -> tuple[str, ...]:
    """Return labels that a user gives, in lower case.

    Raises:
        SchemaError: No label, a blank one, one twice, or one that cannot stand in a list.
    """
    labels = tuple(" ".join(label.split()).lower() for label in given)
    for label in labels:
        if not neutralise(label) or SEPARATOR.strip() in label:
            raise SchemaError(
                f"--labels: {label!r} is no label. Give words with commas between them, for example "
                "happy,sad,neutral."
            )
    if not labels or len(set(labels)) != len(labels):
        said = "a label stands twice in" if labels else "no label is in"
        raise SchemaError(f"--labels: {said} the list. Give each label once.")
    return labels


def settled(text: str) -> str:
    """Return what of a text stays as it is whatever comes: no part of a character, no blank at its end."""
    return text.rstrip("\ufffd").rstrip()
