"""All encoders that some specs need: weights resolved first, modules loaded when work is there.

Importing this module imports no encoder library: a run that finds nothing to do ends before torch is
loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from cache.encoders import NAMED_ENCODERS, SAMPLE_RATE_HZ, VideoMaeEncoder
from cache.errors import CheckpointError, EncoderError, MediaError, SchemaError, near_miss
from cache.spec import TokenSpec
from cache.views import VideoView
from extract.config import Precision
from extract.failures import Failure
from extract.memo import Memo

if TYPE_CHECKING:
    from extract.encoders.base import AudioEncoder, Encoder, PictureEncoder, Tokens, VideoEncoder

logger = logging.getLogger(__name__)

_CLASSES = {
    "whisper": "whisper:FrozenWhisper",
    "hubert": "hubert:FrozenHubert",
    "eva": "eva:FrozenEva",
    "clip": "clip:FrozenClip",
    "mae": "mae:FrozenMae",
    "videomae": "videomae:FrozenVideoMae",
}
"""Kind of encoder -> the class that runs it, in this package."""

_LIBRARIES = {
    "whisper": ("openai-whisper", "transformers"),
    "hubert": ("transformers",),
    "eva": ("timm", "pillow"),
    "clip": ("transformers", "pillow"),
    "mae": ("timm", "pillow"),
    "videomae": ("transformers", "pillow"),
}
"""Kind of encoder -> libraries whose versions may change its numbers."""


@dataclass(frozen=True)
class EncoderInput:
    """What an encoder gets of one clip."""

    values: npt.NDArray[Any]
    """A waveform (N,) float32, or the distinct pictures (n, S, S, 3) uint8."""
    pick: tuple[int, ...] = ()
    """Row of `values` for each chosen frame; () for a waveform."""


class EncoderBank:
    """Encoders by spec. Specs of the same encoder and weights share one module."""

    def __init__(
        self,
        specs: Sequence[TokenSpec],
        weights: Mapping[str, Path],
        device: str = "cpu",
        precision: Precision = "float32",
        *,
        names: Sequence[str | None] | None = None,
        compile_blocks: bool = False,
    ) -> None:
        """Find each spec's checkpoint and resolve its weights digest.

        Args:
            specs: Wanted specs; their digests may be open.
            weights: Name of an encoder (`hubert-large`), stream, kind (`hubert`) or spec_id -> checkpoint;
                the first of these that is given counts.
            device: Torch device.
            precision: Of matrix products.
            names: The encoder's name for each spec, where networks of equal sizes differ in their
                weights.
            compile_blocks: Let torch compile the networks' blocks.

        Raises:
            SchemaError: A checkpoint for something unknown.
            CheckpointError: A spec without a checkpoint, or one that does not fit.
        """
        self._device = device
        self._precision: Precision = precision
        self._compile = compile_blocks
        self._loaded: dict[tuple[str, str], Encoder] = {}
        self._paths: dict[str, Path] = {}
        """spec_id -> checkpoint."""
        given = list(names) if names is not None else [None] * len(specs)
        keys = [checkpoint_names(spec, name) for spec, name in zip(specs, given, strict=True)]
        known = sorted({key for some in keys for key in some})
        for name in weights:
            if name not in known:
                raise SchemaError(
                    f"--encoder-weights {name}=...: unknown name.{near_miss(name, known)} "
                    f"Allowed: {', '.join(known)}"
                )
        resolved = {}
        for spec, some in zip(specs, keys, strict=True):
            path = next((weights[key] for key in some if key in weights), None)
            if path is None:
                raise CheckpointError(
                    f"no checkpoint for the {spec.stream} stream ({some[0]}). Give one with "
                    f"--encoder-weights {spec.encoder.kind}=PATH"
                )
            found = self._resolve(spec, path.resolve())
            resolved[found.spec_id] = found
            self._paths[found.spec_id] = path.resolve()
        self.specs = tuple(resolved.values())
        """The specs with their weights digests, each once."""

    def path(self, spec: TokenSpec) -> Path:
        """Return the checkpoint of one of `specs`."""
        return self._paths[spec.spec_id]

    def _resolve(self, spec: TokenSpec, path: Path) -> TokenSpec:
        # A second run then need not read gigabytes to learn that there is nothing to do.
        memo, key = Memo("weights.json"), _memo_key(path, spec)
        digest = memo.get(key) if key is not None else None
        if not isinstance(digest, str):
            digest = self._load(spec, path).spec.weights_sha256
            assert digest is not None
            if key is not None:
                memo.put(key, digest)
                memo.save()
        wanted = spec.encoder.weights_sha256
        if wanted not in (None, digest):
            raise CheckpointError(
                f"{path}: other weights than the {spec.stream} spec names "
                f"(sha256 {digest[:16]}… found, {str(wanted)[:16]}… wanted)"
            )
        return spec.with_weights(digest)

    def _load(self, spec: TokenSpec, path: Path) -> Encoder:
        open_spec = spec.encoder.model_copy(update={"weights_sha256": None})
        key = (str(path), open_spec.model_dump_json())
        if key not in self._loaded:
            module, _, name = _CLASSES[open_spec.kind].partition(":")
            frozen = getattr(import_module(f"extract.encoders.{module}"), name)
            encoder = cast("Encoder", frozen.load(open_spec, path, self._device, self._precision))
            if self._compile:
                _compile_blocks(encoder)
            self._loaded[key] = encoder
        return self._loaded[key]

    def encoder(self, spec: TokenSpec) -> Encoder:
        """Return the loaded encoder of one of `specs`."""
        return self._load(spec, self._paths[spec.spec_id])

    def probe(self, spec: TokenSpec) -> list[float]:
        """Return the encoder's answer to a fixed input: 16 channel means of its tokens."""
        if spec.stream == "audio":
            time_s = np.arange(SAMPLE_RATE_HZ, dtype=np.float32) / SAMPLE_RATE_HZ
            sweep = 0.5 * np.sin(2 * np.pi * (200 + 400 * time_s) * time_s)
            given = EncoderInput(sweep.astype(np.float32))
        else:
            given = self._probe_pictures(spec)
        tokens = self._forward(spec, [given])[0].reshape(-1, spec.encoder.width)
        means = tokens.mean(axis=0)
        chosen = np.linspace(0, len(means) - 1, 16).astype(int)
        return [float(v) for v in means[chosen]]

    @staticmethod
    def _probe_pictures(spec: TokenSpec) -> EncoderInput:
        from extract.preprocess import resize

        assert spec.pixels is not None
        ramp = np.linspace(0, 255, 64, dtype=np.uint8)
        flat = np.full((64, 64), 128, np.uint8)
        picture = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), flat], -1)
        n_frames = spec.encoder.n_frames if isinstance(spec.encoder, VideoMaeEncoder) else 1
        # A different picture in every frame: the order of the frames is part of the answer.
        frames = [np.roll(picture, 4 * i, axis=1) for i in range(n_frames)]
        resized = resize(frames, spec.pixels.size_px, spec.pixels.interpolation)
        return EncoderInput(resized, tuple(range(n_frames)))

    def encode(self, spec: TokenSpec, given: Sequence[EncoderInput]) -> list[Tokens | Failure]:
        """Encode the clips of a batch.

        If memory runs out, the batch is halved until it fits.

        Args:
            spec: One of `specs`.
            given: One for each clip.

        Returns:
            For each clip its tokens as they are stored, float32: audio (T, D), video (F, P, D), image
            (1 + P, D), less where `spec` stores less; or why it cannot be encoded.

        Raises:
            EncoderError: The device failed; this process cannot go on.
        """
        try:
            return [self._stored(spec, tokens) for tokens in self._forward(spec, given)]
        except MediaError as error:
            if len(given) == 1:
                return [Failure("undecodable", str(error))]
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise EncoderError(
                    f"the {spec.stream} encoder failed on {self._device} ({_first_line(error)}). A device in "
                    "a bad state gives wrong numbers, so this worker ends; run the same command to go on."
                ) from error
            if len(given) == 1:
                where = f"the {spec.stream} encoder ran out of memory on {self._device}"
                return [Failure("memory", f"{where}, with this clip alone")]
            logger.warning(
                "out of memory on %s: a batch of %d clips is halved", self._device, len(given)
            )
        _free_memory(self._device)
        half = len(given) // 2
        return [*self.encode(spec, given[:half]), *self.encode(spec, given[half:])]

    def _forward(self, spec: TokenSpec, given: Sequence[EncoderInput]) -> list[Tokens]:
        """Run the network on a batch; per clip audio (T, D), else (frames, tokens, D)."""
        encoder = self.encoder(spec)
        takes = spec.encoder.takes
        if takes == "sound":
            return cast("AudioEncoder", encoder).encode([one.values for one in given])
        if takes == "frames":
            clips = np.stack([one.values[list(one.pick)] for one in given])  # (B, F, S, S, 3)
            flat = self._pixels(spec, clips.reshape(-1, *clips.shape[2:]))
            pixels = flat.reshape(*clips.shape[:2], *flat.shape[1:])
            return list(cast("VideoEncoder", encoder).encode(pixels))
        pictures = self._pixels(spec, np.concatenate([one.values for one in given]))
        tokens = cast("PictureEncoder", encoder).encode(pictures)
        ends = np.cumsum([len(one.values) for one in given])
        parts = np.split(tokens, ends[:-1])
        return [part[list(one.pick)] for part, one in zip(parts, given, strict=True)]

    def _pixels(self, spec: TokenSpec, pictures: npt.NDArray[Any]) -> Any:
        from extract.preprocess import normalise

        assert spec.pixels is not None
        return normalise(pictures, spec.pixels.mean, spec.pixels.std, device=self._device)

    @staticmethod
    def _stored(spec: TokenSpec, tokens: Tokens) -> Tokens:
        """Reduce an encoder's output to what the spec stores."""
        if spec.stream == "audio":
            return _mean(tokens, (0,)).reshape(1, -1) if spec.utterance else tokens
        has_cls = spec.encoder.takes == "pictures"
        if spec.cls_only:
            tokens = tokens[:, :1]
        elif has_cls and spec.stream == "video":
            tokens = tokens[:, 1:]
        if spec.utterance:
            if has_cls and not spec.cls_only and spec.stream == "image":
                tokens = tokens[:, 1:]
            return _mean(tokens, (0, 1)).reshape(spec.max_shape)
        if spec.stream == "image":
            one: Tokens = tokens[0]
            return one
        if spec.grid is None:
            return tokens
        pooled, _ = VideoView(n_frames=len(tokens), grid=spec.grid).apply(tokens)
        stored: Tokens = pooled.reshape(spec.max_shape)
        return stored

    def provenance(self, spec: TokenSpec) -> dict[str, str]:
        """Return who makes the tokens of a spec: library versions, checkpoint name, device."""
        names = ["emocache", "torch", "numpy", "av", "decord", *_LIBRARIES[spec.encoder.kind]]
        return {
            **{name: _version(name) for name in names},
            "checkpoint": self._paths[spec.spec_id].name,
            "device": self._device,
            "precision": self._precision,
        }


def checkpoint_names(spec: TokenSpec, name: str | None) -> list[str]:
    """Return the names under which a spec's checkpoint may be given, the most specific first."""
    sizes = spec.encoder.model_dump(exclude={"weights_sha256", "layer", "norm", "padded"})
    same_sizes = [
        known
        for known, fields in NAMED_ENCODERS.items()
        if all(sizes.get(field) == value for field, value in fields.items())
    ]
    spec_ids = [spec.spec_id] if spec.is_resolved else []
    names = [name] if name is not None else same_sizes
    return [*spec_ids, *names, spec.stream, spec.encoder.kind]


def _mean(tokens: Tokens, axes: tuple[int, ...]) -> Tokens:
    mean: Tokens = tokens.mean(axis=axes, dtype=np.float64).astype(np.float32)
    return mean


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate" in str(
        error
    )


def _free_memory(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.empty_cache()


def _compile_blocks(encoder: Encoder) -> None:
    """Compile the transformer blocks, in place: they are equal, so one compilation serves all."""
    import torch

    roots = [part for part in vars(encoder).values() if isinstance(part, torch.nn.Module)]
    if isinstance(encoder, torch.nn.Module):
        roots.append(encoder)
    stacks = {
        id(part): part
        for root in roots
        for part in root.modules()
        if isinstance(part, torch.nn.ModuleList)
    }
    for block in max(stacks.values(), key=len, default=torch.nn.ModuleList()):
        block.compile(dynamic=True)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _memo_key(path: Path, spec: TokenSpec) -> str | None:
    """Return what a checkpoint's digest depends on: the network, and its files as they are now."""
    files = sorted(path.glob("*")) if path.is_dir() else [path] if path.exists() else []
    stats = [(file, file.stat()) for file in files]
    stamps = [f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats]
    encoder = spec.encoder.model_copy(update={"weights_sha256": None})
    return "|".join([encoder.model_dump_json(), *stamps]) if stamps else None
