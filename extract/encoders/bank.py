"""All encoders that some specs need: weights resolved first, modules loaded when work is there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache.clip import Record
from cache.commit import ClipTokens, Status
from cache.errors import CheckpointError, SchemaError, near_miss
from cache.files import write_text_aside
from cache.spec import SAMPLE_RATE_HZ, TokenSpec, WhisperEncoder
from cache.views import VideoView
from extract.decode import Decoded, FrameChoice
from extract.encoders.base import AudioEncoder, PictureEncoder
from extract.encoders.eva import FrozenEva
from extract.encoders.whisper import FrozenWhisper
from extract.preprocess import pixels

Encoder = AudioEncoder | PictureEncoder


class EncoderBank:
    """Encoders by spec. Streams of the same encoder and weights share one module."""

    def __init__(
        self, specs: Sequence[TokenSpec], weights: Mapping[str, Path], device: str = "cpu"
    ) -> None:
        """Find each spec's checkpoint and resolve its weights digest.

        Args:
            specs: Wanted specs, one per stream; their digests may be open.
            weights: Stream or encoder kind -> checkpoint.
            device: Torch device.

        Raises:
            SchemaError: A checkpoint for something unknown.
            CheckpointError: A stream without a checkpoint, or one that does not fit.
        """
        self._device = device
        self._loaded: dict[tuple[str, str], Encoder] = {}
        self._paths: dict[str, Path] = {}
        known = sorted({s.stream for s in specs} | {s.encoder.kind for s in specs})
        for name in weights:
            if name not in known:
                raise SchemaError(
                    f"--encoder-weights {name}=...: unknown name.{near_miss(name, known)} "
                    f"Allowed: {', '.join(known)}"
                )
        resolved = []
        for spec in specs:
            path = weights.get(spec.stream, weights.get(spec.encoder.kind))
            if path is None:
                raise CheckpointError(
                    f"no checkpoint for the {spec.stream} stream. Give one with "
                    f"--encoder-weights {spec.encoder.kind}=PATH"
                )
            self._paths[spec.stream] = path.resolve()
            resolved.append(self._resolve(spec))
        self.specs = tuple(resolved)
        """The specs with their weights digests."""

    def _resolve(self, spec: TokenSpec) -> TokenSpec:
        path = self._paths[spec.stream]
        memo = _DigestMemo(path, spec)
        digest = memo.read()
        if digest is None:
            digest = self._load(spec).spec.weights_sha256
            assert digest is not None
            memo.write(digest)
        wanted = spec.encoder.weights_sha256
        if wanted not in (None, digest):
            raise CheckpointError(
                f"{path}: other weights than the {spec.stream} spec names "
                f"(sha256 {digest[:16]}… found, {str(wanted)[:16]}… wanted)"
            )
        return spec.with_weights(digest)

    def _load(self, spec: TokenSpec) -> Encoder:
        path = self._paths[spec.stream]
        open_spec = spec.encoder.model_copy(update={"weights_sha256": None})
        key = (str(path), open_spec.model_dump_json())
        if key not in self._loaded:
            if isinstance(open_spec, WhisperEncoder):
                self._loaded[key] = FrozenWhisper.load(open_spec, path, self._device)
            else:
                self._loaded[key] = FrozenEva.load(open_spec, path, self._device)
        return self._loaded[key]

    def probe(self, spec: TokenSpec) -> list[float]:
        """Return the encoder's answer to a fixed input: 16 channel means of its tokens."""
        encoder = self._load(spec)
        if isinstance(encoder, FrozenWhisper):
            time_s = np.arange(SAMPLE_RATE_HZ, dtype=np.float32) / SAMPLE_RATE_HZ
            sweep = 0.5 * np.sin(2 * np.pi * (200 + 400 * time_s) * time_s)
            tokens = encoder.encode([sweep.astype(np.float32)])[0]
        else:
            assert spec.pixels is not None
            ramp = np.linspace(0, 255, 64, dtype=np.uint8)
            picture = np.stack(
                [
                    np.tile(ramp, (64, 1)),
                    np.tile(ramp[:, None], (1, 64)),
                    np.full((64, 64), 128, np.uint8),
                ],
                -1,
            )
            assert isinstance(encoder, FrozenEva)
            tokens = encoder.encode(self._pixels(spec, [picture]))[0]
        means = tokens.mean(axis=0)
        chosen = np.linspace(0, len(means) - 1, 16).astype(int)
        return [float(v) for v in means[chosen]]

    @staticmethod
    def _pixels(spec: TokenSpec, frames: Sequence[np.ndarray]) -> torch.Tensor:
        assert spec.pixels is not None
        p = spec.pixels
        return pixels(frames, p.size_px, p.interpolation, p.mean, p.std)

    def encode(
        self, spec: TokenSpec, record: Record, decoded: Decoded, choice: FrameChoice | None
    ) -> ClipTokens:
        """Encode one stream of a decoded clip.

        Args:
            spec: One of `specs`.
            record: Whose clip it is.
            decoded: The clip.
            choice: The frames of this spec; None for audio.
        """
        key = record.token_key(spec)
        if spec.stream == "audio":
            outcome = decoded.audio_outcome
        else:
            outcome = decoded.video_outcome
        if outcome is None or outcome.status == "absent":
            return ClipTokens(key, Status.ABSENT)
        if spec.stream == "video" and decoded.facts.is_image:
            return ClipTokens(key, Status.ABSENT)
        if outcome.status == "failed":
            return ClipTokens(key, Status.FAILED, reason=outcome.reason or "could not be decoded")
        encoder = self._load(spec)
        if isinstance(encoder, FrozenWhisper):
            assert decoded.audio is not None
            tokens = encoder.encode([decoded.audio.waveform])[0]
            truncated = decoded.audio.duration_s > encoder.spec.window_s
            return ClipTokens(key, Status.OK, tokens, remark=outcome.reason, truncated=truncated)
        assert isinstance(encoder, FrozenEva)
        assert choice is not None
        if choice.failure is not None:
            return ClipTokens(key, Status.FAILED, reason=choice.failure)
        distinct = sorted(set(choice.indices))
        encoded = encoder.encode(self._pixels(spec, [decoded.frames[i] for i in distinct]))
        tokens = encoded[[distinct.index(i) for i in choice.indices]]  # (F, 1 + P, D)
        if spec.stream == "image":
            stored = tokens[0]
        elif spec.grid is None:
            stored = tokens[:, 1:]
        else:
            n_frames = len(choice.indices)
            pooled, _ = VideoView(n_frames=n_frames, grid=spec.grid).apply(tokens[:, 1:])
            stored = pooled.reshape(n_frames, spec.grid**2, -1)
        return ClipTokens(
            key,
            Status.OK,
            stored,
            remark=outcome.reason,
            frame_index=choice.indices,
            frame_pts_s=choice.pts_s,
        )

    def provenance(self, spec: TokenSpec) -> dict[str, str]:
        """Return who makes the tokens of a spec: library versions, checkpoint name, device."""
        names = ["emocache", "torch", "numpy", "av", "decord"]
        names += (
            ["openai-whisper", "transformers"] if spec.stream == "audio" else ["timm", "pillow"]
        )
        return {
            **{name: _version(name) for name in names},
            "checkpoint": self._paths[spec.stream].name,
            "device": self._device,
        }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


class _DigestMemo:
    """Remembers a checkpoint's digest by path, size and time of change.

    A second run then need not read gigabytes to learn that there is nothing to do. Losing the memo
    costs time only.
    """

    def __init__(self, path: Path, spec: TokenSpec) -> None:
        self._file = _cache_home() / "emocache" / "weights.json"
        encoder = spec.encoder.model_copy(update={"weights_sha256": None})
        stamps = []
        files = sorted(path.glob("*")) if path.is_dir() else [path] if path.exists() else []
        for file in files:
            stat = file.stat()
            stamps.append(f"{file}:{stat.st_size}:{stat.st_mtime_ns}")
        self._key = encoder.model_dump_json() + "|" + "|".join(stamps) if stamps else None

    def _read_all(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def read(self) -> str | None:
        found = self._read_all().get(self._key or "")
        return found if isinstance(found, str) else None

    def write(self, digest: str) -> None:
        if self._key is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text_aside(self._file, json.dumps({**self._read_all(), self._key: digest}))
        except OSError:  # a read-only home: the next run reads the checkpoint again
            return


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
