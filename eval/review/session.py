"""A rater at work: what is asked, what was said, and the files behind it; no word about HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from cache.clip import Record, file_sha256, media_path
from cache.errors import ManifestError, SchemaError
from cache.schema import Model, decode_json
from eval.review.media import Strip, StripReader
from extract.annotate.people.review import (
    ASPECTS,
    MAX_SCORE,
    Aspect,
    Rating,
    RatingsFile,
    ReviewItem,
    Sample,
    Scale,
    Verdict,
)

_TYPES = {
    ".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm",
    ".mkv": "video/x-matroska", ".avi": "video/x-msvideo", ".mpg": "video/mpeg",
    ".mpeg": "video/mpeg", ".wav": "audio/wav", ".mp3": "audio/mpeg", ".flac": "audio/flac",
    ".ogg": "audio/ogg", ".opus": "audio/ogg", ".m4a": "audio/mp4", ".aac": "audio/aac",
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp",
    ".gif": "image/gif", ".bmp": "image/bmp",
}  # fmt: skip
"""Ending -> type. Browsers find out the container themselves, but refuse video/quicktime by its name."""
_OTHER = "application/octet-stream"


class Said(Model):
    """What the page sends when a rater decided."""

    number: int = Field(ge=0)
    """Of the item."""
    digest: str
    """Of the texts that the page showed."""
    aspects: dict[Aspect, Verdict]
    score: Annotated[int, Field(strict=True, ge=0, le=MAX_SCORE)] | None = None
    comment: str = Field(default="", max_length=4000)


@dataclass(frozen=True)
class FoundMedia:
    """The file of a record, or why it cannot be shown."""

    path: Path | None
    sha256: str = ""
    problem: str | None = None


class ReviewSession:
    """One rater and one sample. May be shared by threads."""

    def __init__(
        self,
        sample: Sample,
        media_root: Path,
        ratings: RatingsFile,
        *,
        rater: str,
        scale: Scale = "binary",
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Take up what the rater said before.

        Args:
            sample: What is looked at.
            media_root: Folder of the clips; nothing outside is ever read.
            ratings: Where decisions go.
            rater: Who looks.
            scale: Whether a score is asked for, too.
            now: The clock.

        Raises:
            SchemaError: The ratings file holds something else.
        """
        self.sample, self.rater, self.scale = sample, rater, scale
        self._media_root, self._ratings, self._now = media_root, ratings, now
        self._lock = threading.Lock()
        self._said = ratings.of(rater)
        self._media: dict[int, FoundMedia] = {}
        self._strips = StripReader()

    def __len__(self) -> int:
        """Return how many items there are."""
        return len(self.sample.items)

    @property
    def n_rated(self) -> int:
        """Items of the sample that this rater decided."""
        return sum(self._rating_of(item) is not None for _, item in self.sample.items)

    def close(self) -> None:
        """End the process that decodes."""
        self._strips.close()

    def overview(self) -> dict[str, Any]:
        """Return what the page needs at its start."""
        return {
            "rater": self.rater,
            "scale": self.scale,
            "max_score": MAX_SCORE,
            "ratings": str(self._ratings.path),
            "rated": [self._rating_of(item) is not None for _, item in self.sample.items],
        }

    def item(self, number: int) -> dict[str, Any]:
        """Return all that the page shows of an item, as plain data; raises IndexError."""
        record, item = self._at(number)
        rating = self._rating_of(item)
        media = self.media(number)
        return {
            "number": number,
            **item.model_dump(mode="json", exclude={"media"}),
            "aspects": item.aspects,
            "kind": _kind_of(record),
            "problem": media.problem,
            "peak": None if record.peak is None else record.peak.model_dump(mode="json"),
            "rating": None if rating is None else rating.model_dump(mode="json"),
        }

    def rate(self, body: bytes) -> dict[str, Any]:
        """Take a decision; it is on the disk when this returns.

        Raises:
            SchemaError: It does not decode, is incomplete, or is about other texts than there are.
            OSError: It cannot be written.
        """
        said = decode_json(Said, body, "rating")
        if said.number >= len(self):
            raise SchemaError(f"there is no item {said.number}; the last is {len(self) - 1}.")
        _, item = self._at(said.number)
        if said.digest != item.digest:
            raise SchemaError("the page shows other texts than the manifest has; load it again.")
        missing = [aspect for aspect in item.aspects if aspect not in said.aspects]
        surplus = [aspect for aspect in said.aspects if aspect not in item.aspects]
        if missing or surplus:
            raise SchemaError(
                f"this item needs a verdict on {', '.join(item.aspects)}: missing {missing or 'none'}, "
                f"too many {surplus or 'none'}."
            )
        if (said.score is None) != (self.scale == "binary"):
            needs = "no score" if self.scale == "binary" else f"a score from 0 to {MAX_SCORE}"
            raise SchemaError(f"the {self.scale} scale needs {needs}.")
        rating = Rating(
            rater=self.rater,
            uid=item.uid,
            digest=item.digest,
            target=item.target,
            label=item.label,
            aspects=dict(said.aspects),
            not_shown=tuple(aspect for aspect in ASPECTS if aspect not in item.aspects),
            score=said.score,
            comment=said.comment.strip(),
            time=self._now().isoformat(timespec="seconds"),
        )
        with self._lock:
            self._ratings.append(rating)
            self._said[rating.item] = rating
        return {"n_rated": self.n_rated, "n": len(self)}

    def media(self, number: int) -> FoundMedia:
        """Return the file of an item, checked against the digest that was annotated.

        Only what the sample names below the media root is ever returned. Raises IndexError.
        """
        record, _ = self._at(number)
        found = self._media.get(number)
        if found is None or found.path is None:  # a missing file may have come since
            found = self._find(record)
            self._media[number] = found
        return found

    def strip(self, number: int) -> Strip:
        """Return frames and sound of an item; raises IndexError."""
        record, _ = self._at(number)
        media = self.media(number)
        if media.path is None:
            return Strip(problems=(media.problem or "there is no file",))
        return self._strips.read(record, media.path, media.sha256)

    def _at(self, number: int) -> tuple[Record, ReviewItem]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.sample.items[number]

    def _rating_of(self, item: ReviewItem) -> Rating | None:
        return self._said.get((item.uid, item.digest))

    def _find(self, record: Record) -> FoundMedia:
        try:
            path = media_path(self._media_root, record)
            n_bytes = path.stat().st_size
            if not path.is_file():
                return FoundMedia(None, problem=f"{record.media} is not a file.")
            if record.clip is not None and n_bytes != record.clip.n_bytes:
                return FoundMedia(None, problem=_changed(record))
            digest = file_sha256(path)
        except FileNotFoundError:
            message = f"{record.media} is not there. Check --media-root."
            return FoundMedia(None, problem=message)
        except ManifestError as error:
            return FoundMedia(None, problem=str(error))
        except OSError as error:
            return FoundMedia(None, problem=f"{record.media}: {error.strerror or error}")
        if record.clip is not None and digest != record.clip.sha256:
            return FoundMedia(None, problem=_changed(record))
        return FoundMedia(path, digest)


def _changed(record: Record) -> str:
    return f"{record.media} is not the file that was annotated (its content differs)."


def media_type(path: Path) -> str:
    """Return the type under which a file is sent; never one that a browser would run."""
    return _TYPES.get(path.suffix.lower(), _OTHER)


def _kind_of(record: Record) -> str:
    """Return `video`, `audio` or `image`, by the clip or else by the file's name."""
    clip = record.clip
    if clip is not None and clip.has_video is not None:
        return "video" if clip.has_video else "image" if clip.has_image else "audio"
    kind = media_type(Path(record.media)).partition("/")[0]
    return kind if kind in ("audio", "image") else "video"
