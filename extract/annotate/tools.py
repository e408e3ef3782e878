"""What annotating takes: settings, prompts, endpoints, detector, decoders; made once per worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cache.clip import Record, Subtitle
from cache.schema import Model
from extract.annotate.asking import Asker
from extract.annotate.evidence.action_units import FrameUnits, UnitTable, load_units
from extract.annotate.evidence.detectors import (
    FaceDetector,
    OpenFaceBinary,
    OpenFaceCsv,
    load_detector,
)
from extract.annotate.evidence.media import MediaReader
from extract.annotate.journal import Journal
from extract.annotate.presets import DetectorOptions, Preset, Role, SpeechOptions
from extract.annotate.wording import Wordings
from extract.decode_pool import DecodeFailure
from extract.sources import MediaSource

if TYPE_CHECKING:
    from extract.annotate.evidence.transcribe import Transcriber

OnEvidence = Callable[[Record, DecodeFailure], None]


class FaceClue(Model):
    """What a detector found in a clip, kept so that it need not run again."""

    status: Literal["ok", "absent"]
    reason: str | None = None
    frame: FrameUnits | None = None
    """The peak."""
    present: tuple[str, ...] = ()
    score: float = 0.0
    method: str = ""


class SpeechClue(Model):
    """What was said in a clip, kept so that it need not be recognised again."""

    subtitle: Subtitle | None = None


class Clues(Model):
    """A line of the journal of clues."""

    face: FaceClue | None = None
    speech: SpeechClue | None = None


@dataclass
class Tools:
    """What annotating takes; made once per worker."""

    preset: Preset
    wordings: Wordings
    source: MediaSource
    clues: Journal[Clues]
    askers: Mapping[Role, Asker]
    reader: MediaReader
    detecting: Executor
    """Threads in which detectors run."""
    speaking: Executor
    """The one thread in which speech is recognised."""
    detector: FaceDetector | None = None
    units: UnitTable = field(default_factory=load_units)
    on_evidence: OnEvidence = lambda record, found: None
    on_danger: Callable[[Record, bool], None] = lambda record, begins: None
    """Called around what may end this very process."""
    guilty: set[str] = field(default_factory=set)
    """SHA-256 of clips with which workers died again and again."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Step -> time that all clips together spent in it, waits included."""


def make_detector(options: DetectorOptions) -> FaceDetector | None:
    """Return the detector of a preset; None where records' own units are used.

    Raises:
        MissingDependencyError: OpenFace is not installed.
        SchemaError: There is no such folder, or no such detector.
    """
    if options.kind == "none":
        return None
    if options.kind == "openface":
        return OpenFaceBinary.find(
            options.program,
            min_confidence=options.min_confidence,
            deadline_s=options.deadline_s,
            extra_args=options.options,
        )
    if options.kind == "openface-csv":
        assert options.folder is not None
        return OpenFaceCsv(options.folder, min_confidence=options.min_confidence)
    return load_detector(options.kind, options.options)


def load_transcriber(options: SpeechOptions) -> Transcriber:
    """Return the model that writes down what is said.

    Raises:
        CheckpointError: The checkpoint is not one.
        MissingDependencyError: openai-whisper is not installed.
    """
    from extract.annotate.evidence.transcribe import TranscribeOptions, Transcriber

    return Transcriber.load(
        options.checkpoint,
        device=options.device,
        name=options.name,
        options=TranscribeOptions(
            **options.model_dump(include=set(TranscribeOptions.model_fields))
        ),
    )
