"""TokenSpec: every choice that changes a stored number, its canonical JSON and its `spec_id`.

Paths, devices, batch sizes, worker counts and hosts never stand here: they do not change a number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cache.encoders import (
    AUDIO_FRAMES_PER_S,
    NAMED_ENCODERS,
    SAMPLE_RATE_HZ,
    Encoder,
    SoundEncoder,
    VideoMaeEncoder,
    VisionEncoder,
    WhisperEncoder,
)
from cache.errors import SpecMismatchError
from cache.schema import Model, canonical_json

Stream = Literal["audio", "video", "image"]
STREAMS: tuple[Stream, ...] = ("audio", "video", "image")

WINDOW_SEED = 42
"""Default seed of `Frames.kind="window"`."""

DECODE_POLICY = 1
"""Version of the rules in `extract/decode.py` (which stream, which frame). Raise it when they change."""


class Frames(Model):
    """Which frames of a clip are encoded."""

    kind: Literal["middle", "first", "peak", "uniform", "window"]
    """`uniform`: centres of `n_frames` equal segments; `peak`: the frame that the record names; `window`:
    `n_frames` consecutive frames at an offset that `seed` and the clip's digest decide, as the released
    code draws them from a shared stream (docs/extraction.md)."""
    n_frames: int = Field(default=1, gt=0)
    seed: int = Field(default=WINDOW_SEED, ge=0)
    """`window` only: of the offset."""

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Frames:
        if self.kind not in ("uniform", "window") and self.n_frames != 1:
            raise ValueError(f"frames '{self.kind}' picks one frame; n_frames must be 1")
        if self.kind != "window" and self.seed != WINDOW_SEED:
            raise ValueError(f"frames '{self.kind}' draws nothing; seed is for 'window' alone")
        return self


class FaceCrop(Model):
    """Which part of each frame is encoded: a square around the face.

    Where the face is comes from outside, as the peak frame does: from OpenFace's tables or from a
    detector of one's own, given to an extraction with `--faces`. Boxes are no part of the spec; who
    finds them is, so other boxes need another name.
    """

    by: str = Field(default="openface", min_length=1)
    """Name of what finds the faces: `openface`, or a detector's own name."""
    margin: float = Field(default=0.2, ge=0, le=2, allow_inf_nan=False)
    """Added on each side of the face's box, as a share of its longer edge."""


_PRECISE_ENOUGH_FOR = {
    "float32": {"float32", "float16", "bfloat16", "int8"},
    "float16": {"float16", "int8"},
    "bfloat16": {"bfloat16", "int8"},
    "int8": {"int8"},
}

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Pixels(Model):
    """How a picture becomes the encoder's input: resized ignoring aspect, scaled, normalised."""

    size_px: int = Field(gt=0)
    """Height and width."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    """Per channel, of values in 0..1. Default: CLIP's."""
    std: tuple[float, float, float] = CLIP_STD


class TokenSpec(Model):
    """Every choice that changes a stored number of one stream.

    Stored shape of a clip: audio `(T, D)`, T = valid encoder frames; video `(F, P, D)`, F = frames, or
    tubelets of frames for a network that sees them together; image `(1 + P, D)` with the CLS token
    first.
    """

    schema_version: Literal[1] = 1
    stream: Stream
    encoder: Encoder
    frames: Frames | None = None
    """Video and image only."""
    pixels: Pixels | None = None
    """Video and image only."""
    crop: FaceCrop | None = None
    """Video and image only: encode the face alone; None encodes whole frames."""
    grid: int | None = None
    """Video only: patches are mean-pooled to `grid x grid` before storing; None keeps all of them."""
    cls_only: bool = False
    """Store the CLS token alone: `(1, D)` of an image, `(F, 1, D)` of a video."""
    utterance: bool = False
    """Store the mean over time (and patches) alone: `(1, D)`, of a video `(1, 1, D)`. The "UTT" mode of
    the field's toolkits, which the paper's predecessor uses."""
    sample_rate_hz: int | None = None
    """Audio only."""
    dtype: Literal["float16", "bfloat16", "float32", "int8"] = "float16"
    """Stored dtype; `int8` with a scale per channel and per token (`cache.quantize`)."""
    decode_policy: int = DECODE_POLICY

    @field_validator("encoder", mode="before")
    @classmethod
    def _named_encoder(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in NAMED_ENCODERS:
                raise ValueError(f"unknown encoder; allowed: {', '.join(NAMED_ENCODERS)}")
            return NAMED_ENCODERS[value]
        return value

    @model_validator(mode="after")
    def _fits_its_stream(self) -> TokenSpec:
        takes, kind = self.encoder.takes, self.encoder.kind
        fitting = {"audio": ("sound",), "video": ("pictures", "frames"), "image": ("pictures",)}
        if takes not in fitting[self.stream]:
            raise ValueError(
                f"stream '{self.stream}': a {kind} encoder does not fit, it takes {takes}"
            )
        if self.stream == "audio":
            if self.frames or self.pixels or self.crop or self.grid or self.cls_only:
                raise ValueError("stream 'audio' has no frames, pixels, crop, grid or CLS token")
            if self.sample_rate_hz != SAMPLE_RATE_HZ:
                raise ValueError(f"sample_rate_hz must be {SAMPLE_RATE_HZ} for {kind}")
            return self
        if self.frames is None or self.pixels is None:
            raise ValueError(f"stream '{self.stream}' needs frames and pixels")
        if self.sample_rate_hz is not None:
            raise ValueError(f"stream '{self.stream}' has no sample_rate_hz")
        if self.stream == "image" and self.grid is not None:
            raise ValueError("grid pools the video stream; the image stream keeps its patches")
        if self.stream == "image" and self.frames.n_frames != 1:
            raise ValueError("the image stream holds one frame")
        if self.grid is not None and (self.cls_only or self.utterance):
            raise ValueError("grid pools patches; with cls_only or utterance none are stored")
        assert isinstance(self.encoder, VisionEncoder)
        self._check_patches(self.encoder.patch_px, self.pixels.size_px)
        if isinstance(self.encoder, VideoMaeEncoder):
            self._check_frames(self.encoder, self.frames)
        return self

    def _check_patches(self, patch_px: int, size_px: int) -> None:
        if size_px % patch_px:
            raise ValueError(f"size_px {size_px} is not a multiple of patch_px {patch_px}")
        if self.grid is not None and not 0 < self.grid <= self.patches_per_side:
            raise ValueError(f"grid {self.grid} must be 1 to {self.patches_per_side}")

    def _check_frames(self, encoder: VideoMaeEncoder, frames: Frames) -> None:
        if frames.n_frames != encoder.n_frames:
            raise ValueError(
                f"frames.n_frames is {frames.n_frames}; this network sees {encoder.n_frames} together"
            )
        if self.cls_only:
            raise ValueError(
                "a videomae network has no CLS token; use utterance for one token a clip"
            )

    @property
    def patches_per_side(self) -> int:
        """Side of the encoder's patch grid before pooling."""
        assert isinstance(self.encoder, VisionEncoder)
        assert self.pixels is not None
        return self.pixels.size_px // self.encoder.patch_px

    @property
    def n_steps(self) -> int:
        """Entries of a video's first axis as the encoder gives them: frames, or tubelets of frames."""
        assert self.frames is not None
        if isinstance(self.encoder, VideoMaeEncoder):
            return self.frames.n_frames // self.encoder.tubelet
        return self.frames.n_frames

    @property
    def max_shape(self) -> tuple[int, ...]:
        """Shape of a clip's stored tokens; the first axis is an upper bound for audio."""
        encoder = self.encoder
        if self.utterance:
            return (1, 1, encoder.width) if self.stream == "video" else (1, encoder.width)
        if isinstance(encoder, SoundEncoder):
            return (encoder.n_context, encoder.width)
        if self.stream == "image":
            return (1 if self.cls_only else 1 + self.patches_per_side**2, encoder.width)
        side = 1 if self.cls_only else self.grid or self.patches_per_side
        return (self.n_steps, side * side, encoder.width)

    def audio_tokens(self, duration_s: float) -> int:
        """Return how many tokens a sound of this length has, as far as a container's word for it goes."""
        encoder, most = self.encoder, self.max_shape[0]
        if isinstance(encoder, WhisperEncoder) and encoder.padded:
            return most
        return min(most, math.ceil(duration_s * AUDIO_FRAMES_PER_S))

    @property
    def is_resolved(self) -> bool:
        """True once the weights digest is known."""
        return self.encoder.weights_sha256 is not None

    @cached_property
    def spec_id(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the canonical JSON.

        Raises:
            SpecMismatchError: The weights digest is not known yet.
        """
        if not self.is_resolved:
            raise SpecMismatchError(
                f"the {self.stream} spec names no weights, so it has no spec_id. "
                "Give the checkpoint with --encoder-weights, or a store that holds such tokens."
            )
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:16]

    def canonical_json(self) -> str:
        """Return the text that is hashed; equal specs give equal text.

        Fields that came after the first stores were written are left out while they say nothing new,
        so that those stores keep their spec_ids.
        """
        fields = self.model_dump(mode="json")
        for name in ("cls_only", "utterance"):
            if not fields[name]:
                del fields[name]
        if fields["crop"] is None:
            del fields["crop"]
        if fields["frames"] is not None and fields["frames"]["seed"] == WINDOW_SEED:
            del fields["frames"]["seed"]
        if fields["encoder"].get("layer") is None:
            fields["encoder"].pop("layer", None)
        if not fields["encoder"].get("padded"):
            fields["encoder"].pop("padded", None)
        return canonical_json(fields)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy, which has a `spec_id` of its own."""
        copied = super().model_copy(update=update, deep=deep)
        copied.__dict__.pop("spec_id", None)
        return copied

    def with_weights(self, weights_sha256: str) -> TokenSpec:
        """Return this spec for the weights with this digest."""
        return self.model_copy(
            update={"encoder": self.encoder.model_copy(update={"weights_sha256": weights_sha256})}
        )

    def accepts(self, stored: TokenSpec) -> bool:
        """True if `stored` is this spec, where an unknown weights digest here accepts any."""
        if self.is_resolved or not stored.is_resolved:
            return self == stored
        assert stored.encoder.weights_sha256 is not None
        return self.with_weights(stored.encoder.weights_sha256) == stored

    def serves(self, wanted: TokenSpec) -> bool:
        """True if tokens stored under this spec hold all that `wanted` would store.

        The same choices, apart from a finer video grid that `wanted`'s cells divide, and a dtype of
        no less precision. Fewer frames are not served: `n` uniform frames are other frames than `n`
        of the stored ones.
        """
        if wanted.stream != self.stream or wanted.dtype not in _PRECISE_ENOUGH_FOR[self.dtype]:
            return False
        if wanted.grid != self.grid:
            side = self.patches_per_side
            stored = self.grid or side
            # Cells of cells are the cells themselves only if every one is of the same size.
            if wanted.grid is None or side % stored or stored % wanted.grid:
                return False
        same = self.model_copy(update={"grid": wanted.grid, "dtype": wanted.dtype})
        return wanted.accepts(same)

    def uses_record(self) -> bool:
        """True if the tokens depend on the record (its peak frame), not on the clip alone."""
        return self.frames is not None and self.frames.kind == "peak"


def differences(a: Model, b: Model) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two models differ: dotted path -> (value in a, value in b)."""
    return dict(_walk("", a.model_dump(mode="json"), b.model_dump(mode="json")))


def _walk(path: str, a: Any, b: Any) -> list[tuple[str, tuple[Any, Any]]]:
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted(a.keys() | b.keys()):
            found += _walk(f"{path}.{key}" if path else key, a.get(key), b.get(key))
        return found
    return [] if a == b else [(path, (a, b))]


def describe_differences(found: dict[str, tuple[Any, Any]]) -> str:
    """One line: `encoder.depth: 39 here, 40 in the store; ...`."""
    return "; ".join(f"{path}: {a!r} wanted, {b!r} stored" for path, (a, b) in found.items())
