"""Subtitles for clips that have none: speech recognition by openai-whisper's own model.

    transcriber = Transcriber.load(Path("large-v3.pt"), device="cuda")
    found = transcriber.transcribe(waveform, language=record.language)
    found.subtitle          # None where nobody speaks

Sound comes from `extract.decode` (by way of `extract.annotate.evidence.media`); no ffmpeg program is needed.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from cache.clip import Subtitle
from cache.errors import CheckpointError, MissingDependencyError, SchemaError, near_miss
from cache.schema import Model

if TYPE_CHECKING:
    from extract.encoders.base import Waveform


_DIMS = (
    "n_mels",
    "n_audio_ctx",
    "n_audio_state",
    "n_audio_head",
    "n_audio_layer",
    "n_vocab",
    "n_text_ctx",
    "n_text_state",
    "n_text_head",
    "n_text_layer",
)


_LEAST_VOCAB = 51_864
"""Tokens of whisper's English vocabulary; the multilingual ones are larger."""


class TranscribeOptions(Model):
    """How speech is recognised. The defaults are whisper's own, apart from the first."""

    silence_dbfs: float = Field(default=-70.0, le=0.0)
    """Sound that never gets louder is silence and not given to the model, which would invent words."""
    temperatures: tuple[float, ...] = Field(default=(0.0, 0.2, 0.4, 0.6, 0.8, 1.0), min_length=1)
    """0 takes the likeliest words; the next ones are tried where the result looks bad."""
    beam_size: int | None = Field(default=None, gt=0)
    """Candidates kept at temperature 0; None keeps one."""
    no_speech_threshold: float | None = Field(default=0.6, ge=0.0, le=1.0)
    """A window is silent if its probability of no speech is higher and `logprob_threshold` is missed."""
    logprob_threshold: float | None = -1.0
    """Mean log-probability per token below which a window is tried again."""
    compression_ratio_threshold: float | None = Field(default=2.4, gt=0)
    """A window whose text compresses better repeats itself, and is tried again."""
    condition_on_previous_text: bool = True
    """Whether a window sees the text of the one before."""
    initial_prompt: str | None = None
    """Text that is given ahead: names that occur, for example."""
    seed: int = Field(default=0, ge=0)
    """For temperatures above 0; every clip starts from it, whichever came before."""

    @model_validator(mode="after")
    def _temperatures_ascend(self) -> TranscribeOptions:
        if self.temperatures[0] < 0 or any(b <= a for a, b in pairwise(self.temperatures)):
            raise ValueError("temperatures must ascend, from 0 on")
        return self


@dataclass(frozen=True)
class Window:
    """What the model says of up to 30 s of sound."""

    no_speech_prob: float
    """Probability that nobody speaks."""
    avg_logprob: float
    """Mean log-probability per token of its text."""
    compression_ratio: float
    """Of the text; repetitions compress well."""
    temperature: float
    """At which the text was taken."""


@dataclass(frozen=True)
class Transcript:
    """What was recognised in one clip."""

    subtitle: Subtitle | None
    """None if nobody speaks."""
    language: str | None
    """Given or detected; None of silence that the model never heard."""
    windows: tuple[Window, ...] = ()
    """In order; none of silence that the model never heard."""

    @property
    def no_speech_prob(self) -> float | None:
        """Lowest of the windows: somebody may speak in one alone."""
        return min((w.no_speech_prob for w in self.windows), default=None)

    @property
    def avg_logprob(self) -> float | None:
        """Mean of the windows."""
        if not self.windows:
            return None
        return math.fsum(w.avg_logprob for w in self.windows) / len(self.windows)


class Transcriber:
    """A loaded Whisper model. One clip at a time: further threads wait."""

    def __init__(
        self,
        model: Any,
        name: str,
        options: TranscribeOptions | None = None,
    ) -> None:
        """Wrap whisper's model; use `load`."""
        self.name = name
        self.options = options or TranscribeOptions()
        self._model = model
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        device: str = "cpu",
        name: str | None = None,
        options: TranscribeOptions | None = None,
    ) -> Transcriber:
        """Load a checkpoint in openai-whisper's own format, without running code from it.

        Args:
            path: Its `.pt` file.
            device: Torch device; the model runs in float16 on a GPU, in float32 elsewhere.
            name: What the model is called in `Subtitle.origin`; None: `whisper-` and the file's name.
            options: How speech is recognised.

        Raises:
            CheckpointError: Not such a file, or one whose tensors do not fit its own sizes.
            MissingDependencyError: openai-whisper is not installed.
        """
        _require_whisper()
        from whisper.model import ModelDimensions, Whisper

        from extract.encoders import weights

        if path.is_dir():
            raise CheckpointError(
                f"{path}: a folder; speech recognition needs openai-whisper's own .pt file."
            )
        checkpoint = weights.read_file(path)
        dims = _dims_of(checkpoint, path)
        try:
            model = Whisper(ModelDimensions(**dims))
        except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
            raise CheckpointError(f"{path}: no Whisper has the sizes {dims} ({error}).") from None
        tensors = weights.take(checkpoint["model_state_dict"], model.state_dict(), path)
        weights.check_shapes(tensors, model, path)
        model.load_state_dict(tensors)
        stem = path.stem
        called = name or (stem if stem.startswith("whisper") else f"whisper-{stem}")
        return cls(model.to(device).eval(), called, options)

    @property
    def origin(self) -> str:
        """`Subtitle.origin` of what it recognises."""
        return f"asr:{self.name}"

    def transcribe(self, waveform: Waveform, language: str | None = None) -> Transcript:
        """Recognise the speech of a clip of any length.

        Args:
            waveform: (N,) float32, mono at 16 kHz.
            language: Two-letter code or English name; None lets the model detect it from the first 30 s.

        Raises:
            SchemaError: Whisper does not know the language, or this model knows English alone.
            ValueError: The waveform is no (N,) float32.
        """
        if waveform.ndim != 1 or waveform.dtype != np.float32:
            raise ValueError(
                f"waveform of shape {waveform.shape} and dtype {waveform.dtype}; needs (N,) float32, as "
                "extract.decode gives"
            )
        code = self._code_of(language)
        if _is_silent(waveform, self.options.silence_dbfs):
            return Transcript(None, code)
        with self._lock:
            return self._transcribe(waveform, code)

    def _transcribe(self, waveform: Waveform, language: str | None) -> Transcript:
        import torch
        import whisper

        options, device = self.options, self._model.device
        heard = _Listener(self._model, options.temperatures[0])
        on_gpu = device.type == "cuda"
        with torch.random.fork_rng([device] if on_gpu else []):
            torch.manual_seed(options.seed)
            result = whisper.transcribe(
                heard,
                waveform,
                verbose=None,
                temperature=options.temperatures,
                compression_ratio_threshold=options.compression_ratio_threshold,
                logprob_threshold=options.logprob_threshold,
                no_speech_threshold=options.no_speech_threshold,
                condition_on_previous_text=options.condition_on_previous_text,
                initial_prompt=options.initial_prompt,
                language=language,
                beam_size=options.beam_size,
                fp16=on_gpu,
            )
        spoken = " ".join(result["text"].split())
        # Whisper writes "..." or a note where it hears music or noise: nobody speaks there.
        subtitle = None
        if any(character.isalnum() for character in spoken):
            subtitle = Subtitle(text=spoken, language=result["language"], origin=self.origin)
        return Transcript(subtitle, result["language"], tuple(heard.windows))

    def _code_of(self, language: str | None) -> str | None:
        """Return whisper's code of a language."""
        from whisper.tokenizer import LANGUAGES, TO_LANGUAGE_CODE

        if language is None:
            return None
        name = language.strip().lower()
        code = str(TO_LANGUAGE_CODE.get(name, name))
        if code not in LANGUAGES:
            names = [*LANGUAGES, *TO_LANGUAGE_CODE]
            raise SchemaError(
                f"whisper knows no language {language!r}: allowed are codes such as en, zh and de, or "
                f"English names.{near_miss(code, names)}"
            )
        if not self._model.is_multilingual and code != "en":
            raise SchemaError(
                f"{self.name} knows English alone, but the language is {language!r}. Use a multilingual "
                "checkpoint (one without .en in its name)."
            )
        return code


class _Listener:
    """Whisper's model, with a record of what it says of each window.

    `whisper.transcribe` throws that away where it finds no speech.
    """

    def __init__(self, model: Any, first_temperature: float) -> None:
        self._model = model
        self._first = first_temperature
        self.windows: list[Window] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def decode(self, mel: Any, options: Any) -> Any:
        """Decode one window; a further temperature takes the place of the one before."""
        result = self._model.decode(mel, options)
        window = Window(
            float(result.no_speech_prob),
            float(result.avg_logprob),
            float(result.compression_ratio),
            float(options.temperature),
        )
        if options.temperature == self._first:
            self.windows.append(window)
        else:
            self.windows[-1] = window
        return result


def _is_silent(waveform: Waveform, silence_dbfs: float) -> bool:
    loudest = float(np.abs(waveform).max(initial=0.0))
    return loudest <= math.pow(10.0, silence_dbfs / 20.0)


def _dims_of(checkpoint: Any, path: Path) -> dict[str, int]:
    if (
        not isinstance(checkpoint, dict)
        or not isinstance(checkpoint.get("dims"), dict)
        or not isinstance(checkpoint.get("model_state_dict"), dict)
    ):
        raise CheckpointError(
            f"{path}: not an openai-whisper checkpoint (needs 'dims' and 'model_state_dict'). Give a "
            "whisper .pt file."
        )
    dims = checkpoint["dims"]
    wrong = [n for n in _DIMS if not isinstance(dims.get(n), int) or dims[n] < 1]
    if wrong:
        raise CheckpointError(
            f"{path}: 'dims' has no usable {', '.join(wrong)}; positive whole numbers are needed. The "
            "file is incomplete."
        )
    if dims["n_vocab"] < _LEAST_VOCAB:
        raise CheckpointError(
            f"{path}: knows {dims['n_vocab']} tokens, and whisper's vocabularies have {_LEAST_VOCAB} and "
            "more: an encoder without words of its own cannot write down speech. Give a whole whisper model."
        )
    return {name: dims[name] for name in _DIMS}


def _require_whisper() -> None:
    try:
        import whisper  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"speech recognition needs the package openai-whisper ({error}). Install it with: pip "
            "install 'emocache[annotate]'"
        ) from error
