"""What annotating a record gave: step by step, with reasons; and how it reaches the manifest.

A result is known by everything that decides it: the clip, what the record says that prompts use, and
the settings of the preset that change a text. Whatever else changes, it is not made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from typing import Literal, get_args

from pydantic import Field

from cache.clip import Description, DescriptionKind, Peak, Record, Subtitle, has_label
from cache.commit import Status
from cache.labels import LabelField, LabelSpace
from cache.schema import Model, canonical_json
from extract.annotate.journal import Journal
from extract.failures import ANSWER_KINDS, KINDS, AnyKind, Failure

Step = Literal["visual_expression", "visual_objective", "audio_tone", "subtitle", "multimodal"]
"""A part of Algorithm 1: the clues C_ved, C_vod, C_atd and C_ls, and the description C_md of them."""
STEPS: tuple[Step, ...] = get_args(Step)

_KEY_VERSION = 1
ALL_KINDS: tuple[AnyKind, ...] = (*KINDS, *ANSWER_KINDS)


class StepResult(Model):
    """How one step ended for one record."""

    step: Step
    target: LabelField | None = None
    """The label that guided a multimodal description."""
    status: Status
    """`absent`: there is nothing to make it from, no sound for example."""
    reason: str | None = None
    """Of a failure `kind: message`; why it is absent."""
    text: str | None = None
    model: str | None = None
    version: str | None = None
    """The model as the server named it."""
    prompt_id: str | None = None
    requests: int = 0
    """Requests that led to the answer, whenever they were sent."""
    tokens_in: int = 0
    tokens_out: int = 0

    @property
    def kind(self) -> AnyKind | None:
        """Kind of the failure; None if it did not fail."""
        return kind_of_step(self.reason) if self.status is Status.FAILED else None

    @property
    def label(self) -> str:
        """The step, and the target of a description: `multimodal (emotion)`."""
        return self.step if self.target is None else f"{self.step} ({self.target})"


class RecordResult(Model):
    """What annotating one record gave."""

    uid: str
    media: str
    sha256: str
    steps: tuple[StepResult, ...]
    peak: Peak | None = None
    action_units: dict[str, float] = Field(default_factory=dict)
    spoken: Subtitle | None = None
    """What speech recognition heard, where the record had no subtitle."""
    pseudo_labels: tuple[str, ...] = ()
    """Emotions that the action units hint at."""
    time_s: float = 0.0
    """When it was made, in Unix time."""

    @property
    def failures(self) -> tuple[StepResult, ...]:
        """The steps that failed."""
        return tuple(step for step in self.steps if step.status is Status.FAILED)

    def of(self, step: Step) -> tuple[StepResult, ...]:
        """Return the results of a step: one, or several descriptions, or none."""
        return tuple(found for found in self.steps if found.step == step)


Results = Journal[RecordResult]


def kind_of_step(reason: str | None) -> AnyKind:
    """Return the kind of a step's failure."""
    name = (reason or "").partition(":")[0]
    return next((kind for kind in ALL_KINDS if kind == name), "unexpected")


def failed(step: Step, failure: Failure, target: LabelField | None = None) -> StepResult:
    """Return the result of a step that failed before any model was asked."""
    return StepResult(step=step, target=target, status=Status.FAILED, reason=failure.reason)


def absent(step: Step, why: str, target: LabelField | None = None) -> StepResult:
    """Return the result of a step that has nothing to work on."""
    return StepResult(step=step, target=target, status=Status.ABSENT, reason=why)


def result_key(record: Record, settings: str, targets: Iterable[LabelField]) -> str:
    """Return what the result of a record is known by: 64 hexadecimal digits.

    Args:
        record: The record; its media were looked at.
        settings: Digest of what else decides its texts (`Preset.digest`).
        targets: Label fields that guide descriptions.

    Raises:
        ManifestError: The media were never looked at.
    """
    told = {
        "version": _KEY_VERSION,
        "settings": settings,
        "uid": record.uid,
        "clip": record.sha256,
        "person": record.person,
        "language": record.language,
        "subtitles": [subtitle.model_dump() for subtitle in record.subtitles],
        "labels": {field: record.labels_of(field) for field in targets},
        "peak": None if record.peak is None else record.peak.model_dump(),
        "action_units": record.action_units,
    }
    return hashlib.sha256(canonical_json(told).encode()).hexdigest()


def is_wanted(
    result: RecordResult | None, retry: Collection[AnyKind], since_s: float = float("inf")
) -> bool:
    """Return whether a record must be worked on: it has no result, or one that is to be tried again.

    Args:
        result: What is known.
        retry: Kinds of failures that are tried again.
        since_s: What was made later, in Unix time, was tried again already.
    """
    if result is None:
        return True
    return result.time_s < since_s and any(step.kind in retry for step in result.failures)


def annotated(record: Record, result: RecordResult, adopt_from: LabelSpace | None = None) -> Record:
    """Return a record with what annotating it gave.

    A new description takes the place of all that the record had of that kind; where none was made, the
    old ones stay. Likewise the peak and the action units.

    Args:
        record: The record.
        result: What it gave.
        adopt_from: Emotions that a record without label may get by its action units; None adopts none.
    """
    made = tuple(
        Description(
            kind=_description_kind(step.step),
            text=step.text,
            target=step.target,
            model=step.model,
            version=step.version,
            prompt_id=step.prompt_id,
        )
        for step in result.steps
        if step.status is Status.OK and step.step != "subtitle" and step.text
    )
    kinds = {description.kind for description in made}
    kept = tuple(d for d in record.descriptions if d.kind not in kinds)
    emotion = record.emotion
    if adopt_from is not None and not has_label(record) and result.pseudo_labels:
        emotion = adopt_from.find(result.pseudo_labels[0])
    return record.model_copy(
        update={
            "emotion": emotion,
            "peak": result.peak or record.peak,
            "action_units": result.action_units or record.action_units,
            "subtitles": (
                record.subtitles if result.spoken is None else (*record.subtitles, result.spoken)
            ),
            "descriptions": (*kept, *made),
        }
    )


def _description_kind(step: Step) -> DescriptionKind:
    assert step != "subtitle"
    return step
