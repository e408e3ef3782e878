"""The predictions file: one reply of a model per line, with its truth and where it came from.

This is the seam between the model and everything that scores, reports or compares. The schema is
documented with an example in `docs/predictions.md`; a test reads that example.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

import crc32c
from pydantic import Field, ValidationError, field_validator, model_validator

from cache.errors import PredictionError
from cache.files import write_aside
from cache.schema import Model, describe
from eval.parse import ParseHow

Name = Annotated[str, Field(min_length=1)]
Key = tuple[str, str, tuple[str, ...], str]
"""Uid, task, masked streams, benchmark."""
_CRC = re.compile(rb',"crc32c":"([0-9a-f]{8})"\}\s*$')


class ClipFacts(Model):
    """What is known of the clip that a reply is about."""

    language: str | None = None
    """Spoken language."""
    duration_s: float | None = None
    subtitle: str | None = None
    """What the prompt quoted."""
    absent: tuple[str, ...] = ()
    """Streams without tokens: the clip has none, or extraction failed."""
    media: str | None = None
    """Path of the file below the media root."""


class Prediction(Model):
    """One reply of one model for one clip, task and set of masked streams."""

    schema_version: Literal[1, 2, 3, 4] = 4
    """Version of this schema; version 1 knew one label per reply, version 2 no benchmark, version 3 no
    `other` way of reading. A reader refuses any other."""
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
    """Input to the spec_id of the tokens that the model read."""
    pool_id: Name | None = None
    """Which instruction templates were asked with, see docs/prompts.md; None: not known."""
    renderer_version: int | None = None
    """Which version of the prompt renderer asked; None: not known."""

    benchmark: Name | None = None
    """Id of the set of MMEVerse-Bench that the reply counts for; None: it was asked for no benchmark."""
    split: Name | None = None
    """Of the record."""
    likelihoods: dict[Name, float] | None = None
    """Offered label -> its probability among all that were offered, by the likelihood of label and end
    of turn, not by the reply; None: not computed."""
    n_tokens: int | None = Field(default=None, ge=0)
    """Length of the reply in tokens of the run's own tokenizer, without its end; None: not known."""
    about: ClipFacts | None = None
    """What reports show and slice by; None: not known."""

    @field_validator("masked")
    @classmethod
    def _sort_masked(cls, masked: tuple[str, ...]) -> tuple[str, ...]:
        """Bring the masked streams into one order, so that equal sets are equal values."""
        if len(set(masked)) != len(masked):
            raise ValueError(f"a stream is listed twice in {list(masked)}; list each once")
        return tuple(sorted(masked))

    @field_validator("likelihoods")
    @classmethod
    def _sum_to_one(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        """Refuse what is no distribution."""
        if given is not None:
            total = math.fsum(given.values())
            if not given or min(given.values()) < 0 or not math.isclose(total, 1, abs_tol=1e-4):
                raise ValueError(
                    f"likelihoods must be at least 0 and sum to 1, got {len(given)} with sum {total:.6g}"
                )
        return given

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
    def key(self) -> Key:
        """What may occur once in a file: uid, task, masked streams, benchmark."""
        return self.uid, self.task, self.masked, self.benchmark or ""


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
    seen: dict[Key, int] = {}
    with write_aside(path) as aside, aside.open("wb") as file:
        for number, prediction in enumerate(predictions, start=1):
            _refuse_duplicate(prediction, seen, path, number)
            file.write(line_of(prediction))
    return len(seen)


def line_of(prediction: Prediction) -> bytes:
    """Return a prediction as a line of the file: JSON, a checksum as its last field, a line end.

    The CRC-32C is that of the JSON without the field.
    """
    text = prediction.model_dump_json().encode()
    return b'%s,"crc32c":"%08x"}\n' % (text[:-1], crc32c.crc32c(text))


def read_line(line: bytes, where: str) -> Prediction:
    """Read a line, and check its checksum if it has one.

    Args:
        line: With or without the line end.
        where: File and line number, for messages.

    Raises:
        PredictionError: The line does not decode, or is not as it was written.
    """
    found = _CRC.search(line)
    if found is not None:
        line = line[: found.start()] + b"}"
        stated, counted = found[1].decode(), f"{crc32c.crc32c(line):08x}"
        if stated != counted:
            raise PredictionError(
                f"{where}: damaged, or changed by hand: the checksum of the line is {counted}, stated is "
                f"{stated}. Restore the file; of a line that you changed on purpose, drop the field "
                "'crc32c'."
            )
    try:
        return Prediction.model_validate_json(line)
    except ValidationError as error:
        raise PredictionError(
            f"{where}: {describe(Prediction, error)}. The schema is in docs/predictions.md."
        ) from error


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
    seen: dict[Key, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prediction = read_line(line, f"{path}, line {number}")
        _refuse_duplicate(prediction, seen, path, number)
        predictions.append(prediction)
    return predictions


def _refuse_duplicate(
    prediction: Prediction,
    seen: dict[Key, int],
    path: Path,
    number: int,
) -> None:
    """Note the line of a prediction; raise if its key was seen before."""
    first = seen.setdefault(prediction.key, number)
    if first != number:
        masked = ", ".join(prediction.masked) or "nothing"
        raise PredictionError(
            f"{path}, line {number}: uid {prediction.uid!r}, task {prediction.task!r}, masked "
            f"{masked}{_of_benchmark(prediction)}: already on line {first}; keep one of the two."
        )


def _of_benchmark(prediction: Prediction) -> str:
    return f", benchmark {prediction.benchmark}" if prediction.benchmark else ""
