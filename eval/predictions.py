"""The predictions file: one reply of a model per line, with its truth and where it came from.

This is the seam between the model and everything that scores, reports or compares. The schema is
documented with an example in `docs/predictions.md`; a test reads that example.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from cache.errors import PredictionError
from cache.files import write_aside
from cache.schema import Model, describe
from eval.parse import ParseHow

Name = Annotated[str, Field(min_length=1)]


class Prediction(Model):
    """One reply of one model for one clip, task and set of masked streams."""

    schema_version: Literal[1, 2] = 2
    """Version of this schema; version 1 knew one label per reply. A reader refuses any other."""
    uid: Name
    """The record, `<corpus>/<source id>`."""
    task: Name
    """What was asked: `emotion` (name it), `think` (explain it, then name it), ..."""
    masked: tuple[Name, ...] = ()
    """Streams that the model did not get, sorted, each once; empty: it got all the clip has."""
    reply: str
    """The text that the model wrote, unchanged."""
    label: Name | None
    """The label read from the reply, as the label space spells it; None: no label was read, or the
    task asks for several."""
    labels: tuple[Name, ...] = ()
    """The labels read from the reply to a task that asks for several, in the label space's order."""
    unread: tuple[Name, ...] = ()
    """Pieces of such a reply that are no label: it is then not right as a whole."""
    parse: ParseHow
    """How the label was read, or why there is none; see `eval.parse.ParsedReply.how`."""
    truth: Name | None
    """The true label; None: the corpus does not tell, or the task asks for several."""
    truths: tuple[Name, ...] = ()
    """The true labels of a task that asks for several; empty: the corpus does not tell."""
    run: Name
    """Id of the run that wrote the reply."""
    spec_ids: dict[Name, Name]
    """Stream to the spec_id of the tokens that the model read."""
    pool_id: Name | None = None
    """Which instruction templates were asked with, see docs/prompts.md; None: not known."""
    renderer_version: int | None = None
    """Which version of the prompt renderer asked; None: not known."""

    @field_validator("masked")
    @classmethod
    def _sort_masked(cls, masked: tuple[str, ...]) -> tuple[str, ...]:
        """Bring the masked streams into one order, so that equal sets are equal values."""
        if len(set(masked)) != len(masked):
            raise ValueError(f"a stream is listed twice in {list(masked)}; list each once")
        return tuple(sorted(masked))

    @model_validator(mode="after")
    def _check_label(self) -> Self:
        """Refuse a label without a way that it was read, and the other way round."""
        if self.label is not None and self.labels:
            raise ValueError(
                f"label is {self.label!r} and labels are {list(self.labels)}; a reply holds one label "
                "or is to a task with several"
            )
        nothing = self.label is None and not self.labels
        if nothing != (self.parse in ("off_list", "empty")):
            raise ValueError(
                f"label is {self.label!r} but parse is {self.parse!r}; label is null, and labels are "
                "empty, exactly when parse is 'off_list' or 'empty'"
            )
        return self

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """What may occur once in a file: uid, task, masked streams."""
        return self.uid, self.task, self.masked


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> int:
    """Write predictions as JSON lines: aside, synced, then renamed, so never half a file.

    Args:
        path: The file; an older one is replaced. The folder must exist.
        predictions: Taken one at a time, so a generator may still be producing replies.

    Returns:
        How many lines were written.

    Raises:
        PredictionError: Two predictions share uid, task and masked streams; nothing is replaced.
    """
    seen: dict[tuple[str, str, tuple[str, ...]], int] = {}
    with write_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for number, prediction in enumerate(predictions, start=1):
            _refuse_duplicate(prediction, seen, path, number)
            file.write(prediction.model_dump_json() + "\n")
    return len(seen)


def read_predictions(path: Path) -> list[Prediction]:
    """Read and check a predictions file; blank lines are skipped.

    Raises:
        PredictionError: The file is missing, a line does not decode (file, line and field are
            named), or two lines share uid, task and masked streams.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # not splitlines: a reply may hold U+2028
    except OSError as error:
        raise PredictionError(
            f"{path}: cannot read predictions ({error.strerror}); pass a predictions.jsonl that "
            "an evaluation wrote."
        ) from error
    predictions: list[Prediction] = []
    seen: dict[tuple[str, str, tuple[str, ...]], int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prediction = Prediction.model_validate_json(line)
        except ValidationError as error:
            raise PredictionError(
                f"{path}, line {number}: {describe(Prediction, error)}. "
                "The schema is in docs/predictions.md."
            ) from error
        _refuse_duplicate(prediction, seen, path, number)
        predictions.append(prediction)
    return predictions


def _refuse_duplicate(
    prediction: Prediction,
    seen: dict[tuple[str, str, tuple[str, ...]], int],
    path: Path,
    number: int,
) -> None:
    """Note the line of a prediction; raise if its key was seen before."""
    first = seen.setdefault(prediction.key, number)
    if first != number:
        masked = ", ".join(prediction.masked) or "nothing"
        raise PredictionError(
            f"{path}, line {number}: uid {prediction.uid!r}, task {prediction.task!r}, masked "
            f"{masked}: already on line {first}; keep one of the two."
        )
