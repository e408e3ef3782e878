"""A question to a model: everything that decides its answer, and the key under which that is kept.

The key is a digest of the model's name, the rendered text, the media by content, the sampling and the
schema of the answer. Where the endpoint is and with which key it is paid are no part of it: an answer
bought once is found again from any host and behind any address.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import Field

from cache.errors import EmocacheError, SchemaError, near_miss
from cache.schema import Model, canonical_json

MediaType = Literal["image/jpeg", "image/png", "audio/wav", "audio/mpeg"]
MEDIA_TYPES: dict[str, str] = {
    "image/jpeg": "jpeg",
    "image/png": "png",
    "audio/wav": "wav",
    "audio/mpeg": "mp3",
}
"""Media that can be sent, with the name of the format in an `input_audio` part."""
_KEY_VERSION = 1


class QuestionError(EmocacheError, ValueError):
    """A question cannot be sent as it is; the others can."""


class Sampling(Model):
    """How the model chooses words."""

    temperature: float | None = Field(default=0.0, ge=0.0, le=2.0)
    """0 takes the likeliest word; None leaves it to the server, as some reasoning models demand."""

    max_tokens: int = Field(default=512, ge=1)
    """Longest answer, in tokens of the model; a longer one is recorded as truncated."""

    seed: int | None = 0
    """Given to the server, which may ignore it; None does not send one."""


@dataclass(frozen=True)
class MediaPart:
    """A picture or a sound of a question, by content.

    Args:
        mime: One of `MEDIA_TYPES`.
        sha256: Digest of the bytes, lower-case hexadecimal.
        load: Gives the bytes; called only if the question has to be sent. They must have the digest.
        seconds: Length of a sound, for estimates; no part of the key.
    """

    mime: str
    sha256: str
    load: Callable[[], bytes] = field(compare=False, repr=False)
    seconds: float | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        """Refuse media that no endpoint takes."""
        if self.mime not in MEDIA_TYPES:
            raise SchemaError(
                f"cannot send media of type '{self.mime}'; allowed are {list(MEDIA_TYPES)}."
                f"{near_miss(self.mime, MEDIA_TYPES)}"
            )

    @classmethod
    def of(cls, mime: str, data: bytes, seconds: float | None = None) -> MediaPart:
        """Return a part of bytes that are at hand."""
        return cls(mime, hashlib.sha256(data).hexdigest(), lambda: data, seconds)

    @property
    def is_image(self) -> bool:
        """Whether it is a picture."""
        return self.mime.startswith("image/")

    def message_part(self) -> dict[str, Any]:
        """Return the part of a chat message that carries the bytes.

        Raises:
            QuestionError: The bytes do not have the stated digest.
        """
        data = self.load()
        if (found := hashlib.sha256(data).hexdigest()) != self.sha256:
            raise QuestionError(
                f"the {self.mime} of a question has the digest {found[:12]}…, stated was "
                f"{self.sha256[:12]}…: the media changed since it was looked at. Index it anew."
            )
        text = base64.b64encode(data).decode("ascii")
        if self.is_image:
            return {"type": "image_url", "image_url": {"url": f"data:{self.mime};base64,{text}"}}
        return {
            "type": "input_audio",
            "input_audio": {"data": text, "format": MEDIA_TYPES[self.mime]},
        }


@dataclass(frozen=True)
class Question:
    """One request to a chat model.

    Args:
        role: What it is asked for: "visual_objective", "audio_tone", "consolidate", or any other name.
        model: Name of the model, as the endpoint knows it.
        prompt_id: Name and digest of the prompt file.
        text: The rendered prompt.
        media: Pictures and sounds; they come before the text in the message.
        system: The rendered system prompt, if any.
        sampling: How the model chooses words.
        answer_schema: JSON schema that the answer must fit; None takes any text.
        tag: Whatever the asker wants to find again beside the answer; no part of the key.

    Raises:
        SchemaError: Empty role, model or text, or text that is no Unicode (a lone surrogate).
    """

    role: str
    model: str
    prompt_id: str
    text: str
    media: tuple[MediaPart, ...] = ()
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    answer_schema: Mapping[str, Any] | None = None
    tag: Any = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what no server could answer."""
        for name in ("role", "model", "text"):
            if not getattr(self, name).strip():
                raise SchemaError(f"a question needs a {name}, got an empty one.")
        try:
            (self.text + (self.system or "")).encode()
        except UnicodeEncodeError as error:
            raise SchemaError(
                f"the text of a question with prompt {self.prompt_id} is no Unicode ({error.reason} "
                f"at {error.start}); the subtitle or clue in it was read with a wrong encoding."
            ) from None

    @cached_property
    def key(self) -> str:
        """SHA-256 of everything that decides the answer, as 64 hexadecimal digits."""
        told = {
            "version": _KEY_VERSION,
            "role": self.role,
            "model": self.model,
            "prompt_id": self.prompt_id,
            "system": self.system,
            "text": self.text,
            "media": [[part.mime, part.sha256] for part in self.media],
            "sampling": self.sampling.model_dump(),
            "answer_schema": self.answer_schema,
        }
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    def messages(self) -> list[dict[str, Any]]:
        """Return the chat messages; this loads the media.

        Raises:
            QuestionError: Media without its stated digest.
        """
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": self.system})
        parts = [part.message_part() for part in self.media]
        # A list of parts only where there is need: some text-only servers take nothing but a string.
        content = [*parts, {"type": "text", "text": self.text}] if parts else self.text
        return [*found, {"role": "user", "content": content}]

    def schema_text(self) -> str | None:
        """Return the answer's schema as canonical JSON."""
        return None if self.answer_schema is None else canonical_json(self.answer_schema)


def schema_request(schema: Mapping[str, Any]) -> str:
    """Return the words that ask for a schema where a server does not take one."""
    return (
        "Answer with one JSON object and nothing else. It must fit this JSON schema: "
        f"{json.dumps(schema, ensure_ascii=False, sort_keys=True)}"
    )
