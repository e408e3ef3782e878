"""TokenSpec: every choice that changes a stored number, its canonical JSON and its `spec_id`.

Paths, devices, batch sizes, worker counts and hosts never stand here: they do not change a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cache.errors import SpecMismatchError
from cache.schema import Model, canonical_json

Stream = Literal["audio", "video", "image"]
STREAMS: tuple[Stream, ...] = ("audio", "video", "image")

SAMPLE_RATE_HZ = 16_000
"""Whisper's sample rate."""
AUDIO_FRAMES_PER_S = 50
"""Whisper encoder frames per second: a hop of 160 samples, halved by the second convolution."""

DECODE_POLICY = 1
"""Version of the rules in `extract/decode.py` (which stream, which frame). Raise it when they change."""


class WhisperEncoder(Model):
    """The encoder half of a Whisper model; output after its final LayerNorm."""

    kind: Literal["whisper"] = "whisper"
    width: int = Field(gt=0)
    """Channels of an output token."""
    n_layers: int = Field(gt=0)
    """Transformer blocks of the encoder."""
    n_heads: int = Field(gt=0)
    n_mels: int = Field(gt=0)
    """Mel bins of the input: 128 for large-v3, 80 for the others."""
    n_context: int = Field(default=1500, gt=0)
    """Output frames of one window: 1500 at 50 per second is 30 s."""
    weights_sha256: str | None = None
    """Digest of the encoder's tensors (`extract.encoders.weights`); None while not yet known."""

    @property
    def window_s(self) -> float:
        """Length of one window in seconds."""
        return self.n_context / AUDIO_FRAMES_PER_S


class EvaEncoder(Model):
    """An EVA vision transformer, cut after `depth` blocks."""

    kind: Literal["eva"] = "eva"
    width: int = Field(gt=0)
    """Channels of an output token."""
    depth: int = Field(gt=0)
    """Blocks that run. The checkpoint may hold more: the paper uses 39 of 40."""
    n_heads: int = Field(gt=0)
    mlp_width: int = Field(gt=0)
    patch_px: int = Field(default=14, gt=0)
    norm: Literal["affine_free", "checkpoint", "none"] = "affine_free"
    """After the last block: LayerNorm without learnt scale (eps 1e-5), the checkpoint's own, or none."""
    weights_sha256: str | None = None
    """Digest of the tensors that are used; None while not yet known."""


Encoder = Annotated[WhisperEncoder | EvaEncoder, Field(discriminator="kind")]


def _whisper(width: int, n_layers: int, n_heads: int, n_mels: int = 80) -> dict[str, Any]:
    return {
        "kind": "whisper",
        "width": width,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_mels": n_mels,
    }


NAMED_ENCODERS: dict[str, dict[str, Any]] = {
    "whisper-tiny": _whisper(384, 4, 6),
    "whisper-base": _whisper(512, 6, 8),
    "whisper-small": _whisper(768, 12, 12),
    "whisper-medium": _whisper(1024, 24, 16),
    "whisper-large": _whisper(1280, 32, 20),
    "whisper-large-v2": _whisper(1280, 32, 20),
    "whisper-large-v3": _whisper(1280, 32, 20, n_mels=128),
    "eva-g": {"kind": "eva", "width": 1408, "depth": 39, "n_heads": 16, "mlp_width": 6144},
}
"""Encoders that a configuration may give by name: `tokens.audio.encoder=whisper-small`."""


class Frames(Model):
    """Which frames of a clip are encoded."""

    kind: Literal["middle", "first", "peak", "uniform"]
    """`uniform`: centres of `n_frames` equal segments; `peak`: the frame that the record names."""
    n_frames: int = Field(default=1, gt=0)

    @model_validator(mode="after")
    def _one_unless_uniform(self) -> Frames:
        if self.kind != "uniform" and self.n_frames != 1:
            raise ValueError(f"frames '{self.kind}' picks one frame; n_frames must be 1")
        return self


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

    Stored shape of a clip: audio `(T, D)`, T = valid encoder frames; video `(F, P, D)`; image
    `(1 + P, D)` with the CLS token first.
    """

    schema_version: Literal[1] = 1
    stream: Stream
    encoder: Encoder
    frames: Frames | None = None
    """Video and image only."""
    pixels: Pixels | None = None
    """Video and image only."""
    grid: int | None = None
    """Video only: patches are mean-pooled to `grid x grid` before storing; None keeps all of them."""
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
        if self.stream == "audio":
            if not isinstance(self.encoder, WhisperEncoder):
                raise ValueError(
                    f"stream 'audio' needs a whisper encoder, not '{self.encoder.kind}'"
                )
            if self.frames or self.pixels or self.grid:
                raise ValueError("stream 'audio' has no frames, pixels or grid")
            if self.sample_rate_hz != SAMPLE_RATE_HZ:
                raise ValueError(f"sample_rate_hz must be {SAMPLE_RATE_HZ} for whisper")
            return self
        if not isinstance(self.encoder, EvaEncoder):
            raise ValueError(
                f"stream '{self.stream}' needs an eva encoder, not '{self.encoder.kind}'"
            )
        if self.frames is None or self.pixels is None:
            raise ValueError(f"stream '{self.stream}' needs frames and pixels")
        if self.sample_rate_hz is not None:
            raise ValueError(f"stream '{self.stream}' has no sample_rate_hz")
        if self.stream == "image" and self.grid is not None:
            raise ValueError("grid pools the video stream; the image stream keeps its patches")
        if self.stream == "image" and self.frames.n_frames != 1:
            raise ValueError("the image stream holds one frame")
        if self.pixels.size_px % self.encoder.patch_px:
            raise ValueError(
                f"size_px {self.pixels.size_px} is not a multiple of patch_px {self.encoder.patch_px}"
            )
        if self.grid is not None and not 0 < self.grid <= self.patches_per_side:
            raise ValueError(f"grid {self.grid} must be 1 to {self.patches_per_side}")
        return self

    @property
    def patches_per_side(self) -> int:
        """Side of the encoder's patch grid before pooling."""
        assert isinstance(self.encoder, EvaEncoder)
        assert self.pixels is not None
        return self.pixels.size_px // self.encoder.patch_px

    @property
    def max_shape(self) -> tuple[int, ...]:
        """Shape of a clip's stored tokens; the first axis is an upper bound for audio."""
        encoder = self.encoder
        if isinstance(encoder, WhisperEncoder):
            return (encoder.n_context, encoder.width)
        assert self.frames is not None
        if self.stream == "image":
            return (1 + self.patches_per_side**2, encoder.width)
        side = self.grid or self.patches_per_side
        return (self.frames.n_frames, side * side, encoder.width)

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
        """Return the text that is hashed; equal specs give equal text."""
        return canonical_json(self.model_dump(mode="json"))

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
