"""Why a clip failed: the kinds, how they stand in the store, and when there are too many to go on."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import Field

from cache.errors import ExtractionStopped
from cache.schema import Model

FailureKind = Literal[
    "missing",
    "unreadable",
    "changed",
    "undecodable",
    "crash",
    "hang",
    "memory",
    "faces",
    "numeric",
    "unexpected",
]
"""What went wrong with one stream of a clip.

- `missing`: there is no such file.
- `unreadable`: the file is there, but reading it fails.
- `changed`: the file holds other bytes than were indexed.
- `undecodable`: the decoder refuses the file, one of its streams, or the frame that was asked for.
- `crash`: the decoder process died.
- `hang`: decoding took longer than its deadline.
- `memory`: decoding took more memory than it may.
- `faces`: nobody can say where the face is, of tokens of faces: a missing or damaged table, say.
- `numeric`: the encoder gave NaN or infinity.
- `unexpected`: an exception that nobody foresaw.
"""

KINDS: tuple[FailureKind, ...] = get_args(FailureKind)

AnswerKind = Literal["refused", "empty", "invalid", "truncated", "unanswered"]
"""What went wrong with a model's answer, in annotation.

- `refused`: the model, or a content filter, declined.
- `empty`: nothing but white space came.
- `invalid`: the answer does not fit its schema, a repeated request included.
- `truncated`: it ended at the token limit.
- `unanswered`: the endpoint gave no answer to this question, however often it was asked.
"""

ANSWER_KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)

AnyKind = FailureKind | AnswerKind
"""Why a stream has no tokens, or why a step of an annotation has no text."""

TRANSIENT: frozenset[FailureKind] = frozenset(
    {"missing", "unreadable", "hang", "memory", "crash", "faces"}
)
"""Kinds that may pass: another machine, another day, and the clip is encoded."""


@dataclass(frozen=True)
class Failure:
    """Why one stream of a clip, or all of them, have no tokens."""

    kind: FailureKind
    message: str
    """One line for people, without the kind."""

    @property
    def reason(self) -> str:
        """The text that a store keeps: `kind: message`."""
        return f"{self.kind}: {self.message}"


def kind_of(reason: str | None) -> FailureKind:
    """Return the kind of a stored reason; `undecodable` for texts from before there were kinds."""
    text = reason or ""
    return next((kind for kind in KINDS if text.startswith(f"{kind}: ")), "undecodable")


class Evidence(Model):
    """What is known of a failed clip, for the one who has to find out why."""

    key: str
    """Token key of the record."""
    uid: str
    media: str
    kind: AnyKind
    message: str
    attempts: int
    """How often decoding was tried."""
    exit_signal: str | None = None
    """Name of the signal that ended the decoder process, for example `SIGSEGV`."""
    stderr_tail: str = ""
    """The last words of the decoder process, and of the libraries in it."""
    facts: dict[str, Any] = Field(default_factory=dict)
    """What the container states of itself."""
    host: str
    worker_id: str
    time: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class _Diagnosis:
    """How a run of failures of one kind is told to the user."""

    found: str
    """Goes on from a number of media files."""
    cure: str


_DIAGNOSES: dict[AnyKind, _Diagnosis] = {
    "missing": _Diagnosis(
        "are not there",
        "Is the disk mounted? Give the folder that the manifest's media paths start from with "
        "--media-root.",
    ),
    "unreadable": _Diagnosis(
        "cannot be read",
        "Check the disk or the network mount, and that this user may read the files.",
    ),
    "changed": _Diagnosis(
        "are not the files that were indexed",
        "Does --media-root name the right folder? Else index it again with `emocache index`.",
    ),
    "undecodable": _Diagnosis(
        "do not decode",
        "Play one of them: if it plays elsewhere, the installed PyAV or decord does not fit it; if "
        "it does not, copy the media again.",
    ),
    "crash": _Diagnosis(
        "killed the process that decoded them",
        "The installed PyAV or decord may not fit this machine: try the versions in "
        "constraints.txt.",
    ),
    "hang": _Diagnosis(
        "took longer to decode than the deadline allows",
        "Is the disk or the network mount slow, or the machine overloaded? Use fewer decoders, or "
        "a longer deadline.",
    ),
    "memory": _Diagnosis(
        "need more memory to decode than there is",
        "Use fewer decoders, ask the cluster for more memory, or allow a decoder more.",
    ),
    "faces": _Diagnosis(
        "have no face that anybody can point to",
        "Does --faces name the folder of OpenFace's tables, one CSV file per clip, written with -2Dfp?",
    ),
    "numeric": _Diagnosis(
        "became NaN or infinity in the encoder",
        "Check the encoder's weights, and encode in float32.",
    ),
    "unexpected": _Diagnosis(
        "failed in a way that nobody foresaw",
        "The log names the exceptions; this is likely an error of the installation or of emocache.",
    ),
    "refused": _Diagnosis(
        "were refused by the model or its content filter",
        "Use another model, or other words in the prompts.",
    ),
    "empty": _Diagnosis(
        "got blank answers",
        "Does the model fit its role? Try it by hand with one clip.",
    ),
    "invalid": _Diagnosis(
        "got answers that do not fit the schema",
        "Use a model or server that can answer in JSON of a given schema.",
    ),
    "truncated": _Diagnosis(
        "got answers that were cut at the token limit",
        "Raise the role's max_tokens, or ask for shorter answers in the prompts.",
    ),
    "unanswered": _Diagnosis(
        "got no answer from the endpoint",
        "Is the server overloaded, or the request too long for the model?",
    ),
}


class FailureRate:
    """Watches the latest clips, and stops an extraction in which most of them fail.

    A disk that is not mounted fails every clip: better to stop than to record a corpus as failed.
    """

    def __init__(self, max_share: float = 0.5, *, window: int = 64, least: int = 32) -> None:
        """Start with nothing seen.

        Args:
            max_share: Share of failed clips that is still borne; 1.0 never stops.
            window: How many of the latest clips are looked at.
            least: Fewer failures than this never stop it.
        """
        self._max_share = max_share
        self._least = least
        self._latest: deque[tuple[AnyKind, str] | None] = deque(maxlen=window)

    def add(self, kind: AnyKind | None, media: str = "") -> None:
        """Note how the next clip ended.

        Args:
            kind: Why it failed; None if it did not.
            media: The clip's media path, to be named as the example.

        Raises:
            ExtractionStopped: Too many of the latest clips failed; the text names the kind that
                prevails, an example and the cure.
        """
        self._latest.append(None if kind is None else (kind, media))
        failed = [clip for clip in self._latest if clip is not None]
        if len(failed) >= self._least and len(failed) > self._max_share * len(self._latest):
            raise ExtractionStopped(self._diagnose(failed))

    def _diagnose(self, failed: list[tuple[AnyKind, str]]) -> str:
        [(kind, n)] = Counter(kind for kind, _ in failed).most_common(1)
        example = next((media for found, media in failed if found == kind and media), "")
        diagnosis = _DIAGNOSES[kind]
        text = f"{n} of the last {len(self._latest)} media files {diagnosis.found}"
        if example:
            text += f", for example {example}"
        if len(failed) > n:
            text += f"; {len(failed) - n} more failed in other ways"
        return f"{text}. {diagnosis.cure} Then run the same command again: what is committed stays."
