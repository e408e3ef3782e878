"""Clip: a piece of media known by its bytes. Record: what one corpus says about a clip."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, field_validator, model_validator

from cache.errors import ManifestError
from cache.labels import LABEL_FIELDS, LabelField
from cache.schema import Model
from cache.spec import TokenSpec

SHA256_PATTERN = r"^[0-9a-f]{64}$"

DescriptionKind = Literal["visual_expression", "visual_objective", "audio_tone", "multimodal"]
"""What a description is about: the clues of the paper's section 3.2 (C_ved, C_vod, C_atd, C_md)."""
DESCRIPTION_KINDS: tuple[DescriptionKind, ...] = get_args(DescriptionKind)


class Clip(Model):
    """A piece of media. The same bytes in two corpora are one clip, encoded once.

    All but digest and size is what the container states: for people and plans, never for sampling.
    """

    sha256: str = Field(pattern=SHA256_PATTERN)
    """Digest of the file's bytes."""
    n_bytes: int = Field(ge=0)
    duration_s: float | None = None
    """None where the container does not say."""
    has_video: bool | None = None
    """None if the container could not be opened."""
    has_audio: bool | None = None
    has_image: bool | None = None
    """True for whatever has a picture: a video or a still image."""
    container: str | None = None
    """Name of the demuxer, for example `matroska,webm`."""
    video_codec: str | None = None
    audio_codec: str | None = None
    width_px: int | None = None
    height_px: int | None = None
    n_frames: int | None = None
    sample_rate_hz: int | None = None


class Subtitle(Model):
    """What is said in a clip, in one language."""

    text: str = Field(min_length=1)
    language: str | None = None
    """`en`, `zh`, ...; None if the source does not say."""
    origin: str = "official"
    """`official`, `translation`, or `asr:<model>`."""


class Peak(Model):
    """The frame of strongest expression."""

    index: int = Field(ge=0)
    """Counted in decoded frames."""
    pts_s: float | None = None
    """Its presentation time."""
    method: str | None = None
    """How it was found, for example `openface-au-sum`; None of one that came with the corpus."""
    score: float | None = None
    """What made it the peak: the sum of action unit intensities with `openface-au-sum`."""


class Description(Model):
    """A text about a clip, and where it came from."""

    kind: DescriptionKind
    text: str = Field(min_length=1)
    target: LabelField | None = None
    """The label that guided a multimodal description, and that it explains; None: whichever."""
    model: str | None = None
    """Who wrote it; None of one that came with the corpus."""
    version: str | None = None
    prompt_id: str | None = None

    @model_validator(mode="after")
    def _guided(self) -> Description:
        if self.target is not None and self.kind != "multimodal":
            raise ValueError(f"a description of kind '{self.kind}' has no target")
        return self


class Record(Model):
    """What one corpus says about a clip."""

    uid: str = Field(min_length=1)
    """`<corpus>/<source id>`, unique in a manifest. Never part of a prompt."""
    media: str = Field(min_length=1)
    """Path of the media file relative to the media root, with forward slashes."""
    clip: Clip | None = None
    """None until the media were looked at: labels can be read, checked and counted without them."""
    split: str | None = None
    """`train`, `val` or `test` by custom; None if the source gives none."""
    split_native: str | None = None
    """The split as the source writes it."""
    split_axes: dict[str, str] = Field(default_factory=dict)
    """Other partitions of the source, as it writes them: session, fold, another challenge's split."""
    benchmarks: tuple[str, ...] = ()
    """Ids of the benchmarks that score this record."""
    parent: str | None = None
    """Dialogue, session or source video that the clip was cut from."""
    speaker: str | None = None
    """Who speaks, as the source names them. Never part of a prompt."""
    person: str | None = None
    """How a prompt calls who speaks; None: "the person"."""
    language: str | None = None
    """Spoken language."""
    subtitles: tuple[Subtitle, ...] = ()
    """At most one per language and origin; the first is the corpus's own choice."""
    emotion: str | None = None
    """A name of the label space, as are the next four."""
    emotion_multi: tuple[str, ...] = ()
    emotion_ov: tuple[str, ...] = ()
    """Open vocabulary: any words, in lower case."""
    sentiment: str | None = None
    """Polarity."""
    intent: str | None = None
    sentiment_score: float | None = None
    """In the range of the manifest's scale, [-3, 3] for example; so are the next three."""
    valence: float | None = None
    arousal: float | None = None
    dominance: float | None = None
    peak: Peak | None = None
    action_units: dict[str, float] = Field(default_factory=dict)
    """`AU12` -> intensity, 0 to 5, at the peak frame."""
    descriptions: tuple[Description, ...] = ()

    @field_validator("media")
    @classmethod
    def _inside_the_root(cls, value: str) -> str:
        # Plain text: a path object for each of 130,000 records takes longer than all other checks.
        if value.startswith("/") or ".." in value.split("/") or "\\" in value or "\0" in value:
            raise ValueError("must be a relative path inside the media root")
        return value

    @property
    def corpus(self) -> str:
        """First part of the uid."""
        return self.uid.partition("/")[0]

    @property
    def seen_clip(self) -> Clip:
        """The clip; raises ManifestError if nobody looked at the media yet."""
        if self.clip is None:
            raise ManifestError(
                f"{self.uid}: its media file was never looked at, so it has no clip. Index it again with "
                "the media: emocache index ... --media DIR"
            )
        return self.clip

    @property
    def sha256(self) -> str:
        """Digest of the clip; raises ManifestError if nobody looked at the media yet."""
        return self.seen_clip.sha256

    @property
    def peak_index(self) -> int | None:
        """Frame of strongest expression, counted in decoded frames."""
        return None if self.peak is None else self.peak.index

    def subtitle(self, language: str | None = None) -> str | None:
        """Return what is said: in a language, or the first text that there is; None without."""
        for found in self.subtitles:
            if language is None or found.language == language:
                return found.text
        return None

    def labels_of(self, field: LabelField) -> tuple[str, ...]:
        """Return the labels in a field; none, one or several."""
        value: str | tuple[str, ...] | None = getattr(self, field)
        if isinstance(value, tuple):
            return value
        return () if value is None else (value,)

    def described(self, kind: DescriptionKind, target: LabelField | None = None) -> tuple[str, ...]:
        """Return the descriptions of a kind.

        Args:
            kind: What they are about.
            target: Leaves out those that explain another label.
        """
        return tuple(
            d.text
            for d in self.descriptions
            if d.kind == kind and (target is None or d.target in (None, target))
        )

    def token_key(self, spec: TokenSpec) -> str:
        """Return the key of this record's tokens in a store: 64 hexadecimal digits.

        It is the clip's digest, except under a spec that encodes the record's own peak frame: then
        the frame is part of the key, so that two corpora may disagree on it.

        Raises:
            ManifestError: The media were never looked at.
        """
        if not spec.uses_record():
            return self.sha256
        return hashlib.sha256(f"{self.sha256}:peak={self.peak_index}".encode()).hexdigest()


def has_label(record: Record) -> bool:
    """Return whether a record has a label of any kind."""
    return any(record.labels_of(field) for field in LABEL_FIELDS)


def media_path(media_root: Path, record: Record) -> Path:
    """Return the real path of a record's media file.

    Raises:
        ManifestError: The path leaves the media root, through a link for example.
    """
    root = media_root.resolve()
    path = (root / record.media).resolve()
    if not path.is_relative_to(root):
        raise ManifestError(
            f"{record.uid}: media path {record.media!r} leaves the media root {root}. "
            "Copy the file below the root, or index the folder that holds it."
        )
    return path


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
