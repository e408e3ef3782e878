"""Clip: a piece of media known by its bytes. Record: what one corpus says about a clip."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import Field, field_validator

from cache.errors import ManifestError
from cache.schema import Model
from cache.spec import TokenSpec

SHA256_PATTERN = r"^[0-9a-f]{64}$"


class Clip(Model):
    """A piece of media. The same bytes in two corpora are one clip, encoded once."""

    sha256: str = Field(pattern=SHA256_PATTERN)
    """Digest of the file's bytes."""
    n_bytes: int = Field(ge=0)
    duration_s: float | None = None
    """As the container says; None where it does not. For humans and plans, never for sampling."""
    has_video: bool | None = None
    """None if the container could not be opened."""
    has_audio: bool | None = None
    has_image: bool | None = None
    """True for whatever has a picture: a video or a still image."""


class Record(Model):
    """What one corpus says about a clip."""

    uid: str = Field(min_length=1)
    """`<corpus>/<source id>`, unique in a manifest. Never part of a prompt."""
    media: str = Field(min_length=1)
    """Path of the media file relative to the media root, with forward slashes."""
    clip: Clip
    split: str | None = None
    """`train`, `val` or `test` by custom; None if the source gives none."""
    subtitle: str | None = None
    """What is said in the clip."""
    label: str | None = None
    """Native name in the manifest's label space."""
    description: str | None = None
    """The multimodal explanation that reasoning is trained on."""
    audio_description: str | None = None
    """What is heard: the tone of voice, above all."""
    image_description: str | None = None
    """What is seen in one frame, the peak or the middle one."""
    peak_index: int | None = Field(default=None, ge=0)
    """Frame of strongest expression, counted in decoded frames."""

    @field_validator("media")
    @classmethod
    def _inside_the_root(cls, value: str) -> str:
        # Plain text: a path object for each of 130,000 records takes longer than all other checks.
        if value.startswith("/") or ".." in value.split("/") or "\\" in value or "\0" in value:
            raise ValueError("must be a relative path inside the media root")
        return value

    def token_key(self, spec: TokenSpec) -> str:
        """Return the key of this record's tokens in a store: 64 hexadecimal digits.

        It is the clip's digest, except under a spec that encodes the record's own peak frame: then
        the frame is part of the key, so that two corpora may disagree on it.
        """
        if not spec.uses_record():
            return self.clip.sha256
        return hashlib.sha256(f"{self.clip.sha256}:peak={self.peak_index}".encode()).hexdigest()


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
