"""One media file to what the model takes in, as extraction and the store would give it.

    with ClipReader(preset, bank) as reader:
        seen = reader.read(Path("clip.mp4"), corpus="mer2023")
        seen.views              # to the bit what `train.batches.reading.ViewReader` reads of a store

The file is decoded in a process of its own and encoded alone; tokens are rounded to the dtype in which
the store would keep them before views are taken. A store that encoded the clip among others may differ
by the rounding of a batch (`extract.config.WorkerConfig.batch_tokens`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from cache.clip import Clip, Peak, Record, Subtitle, file_sha256
from cache.commit import ClipTokens, Status
from cache.encoders import SoundEncoder
from cache.errors import MediaError
from cache.quantize import Quantized, dequantize, quantize
from cache.spec import STREAMS, Stream, TokenSpec
from cache.views import ImageView
from extract.annotate.evidence.media import with_aspect
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool
from extract.encoders.bank import EncoderBank
from extract.faces import FaceSource
from extract.inputs import ClipInputs, InputRequest, StreamInput, request_of
from extract.workers.results import encode_inputs
from train.batches.reading import Views
from train.config import STREAM_OF, Input, Preset

MAX_DURATION_S = 120.0
"""Default bound on a clip: emotion is asked of seconds, and whole films are taken by mistake."""
DEADLINE_S = 60.0
"""Default bound on decoding."""
_LONGEST_PX = 384
"""Of a frame that is shown."""
_LONGEST_SOUND_S = 600.0
"""Of the waveform that is kept to be shown and transcribed, whatever encoders hear."""
_SHOWN: tuple[Input, ...] = ("video", "local", "image")
"""Of the first of these that a run reads, the frames are shown."""
_NOUNS: Mapping[Stream, str] = {"audio": "sound", "video": "moving picture", "image": "picture"}


@dataclass(frozen=True, eq=False)
class SeenFrame:
    """A frame that an encoder saw."""

    index: int
    """Which decoded frame it is."""
    pts_s: float
    """Its presentation time."""
    rgb: npt.NDArray[np.uint8] = field(repr=False)
    """(H, W, 3), with the aspect of the clip, its longest side at most 384."""


@dataclass(frozen=True, eq=False)
class SeenClip:
    """A clip, decoded and encoded: all that is needed to ask about it any number of times."""

    name: str
    """What messages call it; second part of the record's uid."""
    path: Path
    record: Record
    streams: Mapping[Input, ClipTokens] = field(repr=False)
    """What a store would keep of each of the model's inputs: status, tokens in the stored dtype, reason."""
    views: Views = field(repr=False)
    """Of one clip; what is absent or failed is masked."""
    frames: tuple[SeenFrame, ...] = field(repr=False)
    """Those that the video encoder saw, each once, in order of time; of a still picture that one. Of a
    run without video that of the image encoder, without pictures none."""
    waveform: npt.NDArray[np.float32] | None = field(repr=False)
    """(N,) mono at 16 kHz, at most 10 minutes; None without sound."""
    duration_s: float | None
    """Decoded length of the sound, else what the container states; None of a still picture."""
    heard_s: float | None
    """How much of the sound the encoder takes in from the start; None without sound."""
    remarks: tuple[str, ...]
    """What the reader of a reply should know: what is missing, cut or damaged. Each is a sentence."""

    @property
    def absent(self) -> tuple[Stream, ...]:
        """Streams that the model reads and that have no tokens."""
        read = {STREAM_OF[name] for name in self.streams}
        there = {STREAM_OF[n] for n, clip in self.streams.items() if clip.status is Status.OK}
        return tuple(stream for stream in STREAMS if stream in read - there)


class ClipReader:
    """Decodes and encodes single clips. May be shared by threads; one clip is encoded at a time."""

    def __init__(
        self,
        preset: Preset,
        bank: EncoderBank,
        *,
        n_decoders: int = 1,
        deadline_s: float = DEADLINE_S,
        faces: FaceSource | None = None,
    ) -> None:
        """Make a reader; no process is started yet.

        Args:
            preset: Views, and what to do about absent and failed streams.
            bank: The encoders of the preset's specs.
            n_decoders: Clips that are decoded at once.
            deadline_s: Longest time for decoding one.
            faces: Where faces are, for specs that crop them; without it these fail.
        """
        self._preset, self._bank, self._faces = preset, bank, faces
        self.specs: dict[Input, TokenSpec] = {
            name: next(spec for spec in bank.specs if wanted.accepts(spec))
            for name, wanted in preset.tokens.by_input().items()
        }
        """Input -> spec, resolved."""
        self._pool = DecodePool(
            n_decoders,
            deadline_s=deadline_s,
            attempts=1,
            detector=None if faces is None else faces.detector,
        )
        self._lock = threading.Lock()

    def read(
        self,
        path: Path,
        *,
        corpus: str,
        name: str | None = None,
        subtitles: Sequence[Subtitle] = (),
        peak_index: int | None = None,
        max_duration_s: float = MAX_DURATION_S,
    ) -> SeenClip:
        """Decode a file, encode it, take the views.

        Args:
            path: A video, sound or picture file.
            corpus: First part of the record's uid: whose label spaces count.
            name: What to call the clip; None: the file's name without its ending, as indexing a folder
                does.
            subtitles: What is said.
            peak_index: Frame of strongest expression, for runs that encode it.
            max_duration_s: Longest clip.

        Raises:
            MediaError: There is no clip to ask about: no file, not media, too long, nothing to see or
                hear, or a stream that is absent or failed where the run's `data` says to refuse that.
                The message is one for users.
            EncoderError: The device failed.
        """
        name = _printable(path.stem if name is None else name)
        media = _printable(path.name)
        digest, n_bytes = _digest(path, media)
        record = Record(
            uid=f"{corpus}/{name}",
            media=media,
            clip=Clip(sha256=digest, n_bytes=n_bytes),
            subtitles=tuple(subtitles),
            peak=None if peak_index is None else Peak(index=peak_index),
        )
        inputs = self._decode(path, digest, record, max_duration_s)
        clip = _clip_of(digest, n_bytes, inputs.facts)
        record = record.model_copy(update={"clip": clip})
        specs = list(self.specs.values())
        with self._lock:
            clips = encode_inputs(record, inputs, specs, self._bank)
        streams = {
            name: as_stored(spec, clip)
            for (name, spec), clip in zip(self.specs.items(), clips, strict=True)
        }
        remarks = self._judge(media, streams)
        sound, *shown = inputs.streams[len(specs) :]
        waveform = None if sound.array is None else inputs.arrays[sound.array]
        duration_s = inputs.audio_duration_s or inputs.facts.get("duration_s")
        heard_s = None
        if waveform is not None and duration_s is not None and "audio" in self.specs:
            encoder = self.specs["audio"].encoder
            assert isinstance(encoder, SoundEncoder)
            heard_s = min(duration_s, encoder.window_s)
        return SeenClip(
            name,
            path,
            record,
            streams,
            views_of(self._preset, self.specs, streams),
            _frames(inputs, shown[0]) if shown else (),
            waveform,
            duration_s,
            heard_s,
            remarks,
        )

    def close(self) -> None:
        """End the decoder processes."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _decode(self, path: Path, digest: str, record: Record, max_duration_s: float) -> ClipInputs:
        """Decode what the encoders need, and what is shown."""
        media = record.media
        # The header first: of a film, nothing else need be read.
        facts = self._submit(DecodeJob(path, digest, media, ())).facts
        _refuse_long(media, facts.get("duration_s"), max_duration_s)
        requests = [request_of(spec, record) for spec in self.specs.values()]
        requests.append(
            InputRequest(stream="audio", window_s=min(max_duration_s, _LONGEST_SOUND_S))
        )
        shown = next((self.specs[name] for name in _SHOWN if name in self.specs), None)
        if shown is not None:
            requests.append(request_of(_whole_frames(shown), record))
        order = None if self._faces is None else self._faces.of(record)
        inputs = self._submit(DecodeJob(path, digest, media, tuple(requests), faces=order))
        # A container need not tell its length, nor the truth.
        last_pts_s = max((s.pts_s[-1] for s in inputs.streams if s.pts_s), default=0.0)
        _refuse_long(media, max(inputs.audio_duration_s or 0.0, last_pts_s), max_duration_s)
        return inputs

    def _submit(self, job: DecodeJob) -> ClipInputs:
        prepared = self._pool.submit(job).result()
        if isinstance(prepared, DecodeFailure):
            raise MediaError(f"{prepared.failure.message}. Nothing can be said about this clip.")
        return prepared

    def _judge(self, media: str, streams: Mapping[Input, ClipTokens]) -> tuple[str, ...]:
        """Return what to tell about a clip.

        Raises:
            MediaError: It is not to be asked about.
        """
        if all(clip.status is not Status.OK for clip in streams.values()):
            reasons = {clip.status: _reason(clip, media) for clip in streams.values()}
            why = reasons.get(Status.FAILED, "the file has neither")
            if len(reasons) == 1 and Status.FAILED in reasons:
                raise MediaError(f"{media}: {why}.")
            raise MediaError(f"{media}: nothing to see or to hear ({why}).")
        data = self._preset.data
        remarks = []
        for name, clip in streams.items():
            stream = STREAM_OF[name]
            noun = _NOUNS[stream]
            choice = data.absent if clip.status is Status.ABSENT else data.failed
            nothing = clip.reason or f"there is no {noun}"
            if clip.status is not Status.OK and choice != "mask":
                found = nothing if clip.status is Status.ABSENT else _reason(clip, media)
                raise MediaError(
                    f"{media}: the {stream} stream is {clip.status.value} ({found}), and the run's "
                    f"data.{clip.status.value} is '{choice}'. Answer from the rest with "
                    f"data.{clip.status.value}=mask."
                )
            if clip.status is Status.ABSENT:
                said = nothing[0].upper() + nothing[1:]
                remarks.append(f"{said}: the model answers from the rest.")
            elif clip.status is Status.FAILED:
                remarks.append(
                    f"The {stream} stream failed and is left out: {_reason(clip, media)}."
                )
            elif clip.truncated:
                encoder = self.specs[name].encoder
                assert isinstance(encoder, SoundEncoder)
                remarks.append(f"Only the first {encoder.window_s:g} s of the sound are heard.")
            if clip.remark is not None:
                where = "sound" if stream == "audio" else "pictures"
                remarks.append(f"Damage in the {where} was passed over: {clip.remark}.")
        pictures = {name: clip for name, clip in streams.items() if name != "audio"}
        if "image" in pictures and all(c.status is Status.ABSENT for c in pictures.values()):
            remarks = [text for text in remarks if _NOUNS["video"] not in text]
        return tuple(dict.fromkeys(remarks))


def _whole_frames(spec: TokenSpec) -> TokenSpec:
    """Return what asks for the frames of a spec as people see them, also of a still picture."""
    assert spec.pixels is not None
    pixels = spec.pixels.model_copy(update={"size_px": _LONGEST_PX, "interpolation": "bicubic"})
    return spec.model_copy(update={"stream": "image", "pixels": pixels, "crop": None})


def views_of(
    preset: Preset, specs: Mapping[Input, TokenSpec], streams: Mapping[Input, ClipTokens]
) -> Views:
    """Return the views of one clip.

    Args:
        preset: Which views.
        specs: Input -> what its tokens are.
        streams: Input -> the clip's tokens as stored.
    """
    tokens: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    for name, spec in specs.items():
        view = getattr(preset.views, name)
        stored = streams[name].tokens
        rows = np.zeros(view.shape(spec), np.float32)
        mask = np.zeros(len(rows), np.bool_)
        cls = np.zeros(spec.encoder.width, np.float32)
        if isinstance(stored, Quantized):
            stored = dequantize(stored)
        if stored is not None:
            _, mask = view.apply(stored, out=rows)
            if isinstance(view, ImageView):
                cls = view.cls(stored)
        if not len(rows):  # a CLS token alone
            mask = np.array([stored is not None])
        tokens[name] = torch.from_numpy(rows[None])
        masks[name] = torch.from_numpy(mask[None])
        if isinstance(view, ImageView):
            tokens["image_cls"] = torch.from_numpy(cls[None])
    return Views(tokens, masks)


def hide(views: Views, hidden: Collection[str]) -> Views:
    """Return the views of a clip with streams masked, as `ViewReader.read` masks them."""
    if not hidden:
        return views
    gone: set[str] = {name for name, stream in STREAM_OF.items() if stream in hidden}
    gone |= {"image_cls"} if "image" in hidden else set()
    return Views(
        {n: torch.zeros_like(t) if n in gone else t for n, t in views.tokens.items()},
        {n: torch.zeros_like(m) if n in gone else m for n, m in views.masks.items()},
    )


def as_stored(spec: TokenSpec, clip: ClipTokens) -> ClipTokens:
    """Return a clip with its tokens as they come back from a store that keeps `spec`."""
    if clip.tokens is None or isinstance(clip.tokens, Quantized):
        return clip
    tokens: npt.NDArray[Any] | Quantized
    if spec.dtype == "int8":
        tokens = quantize(clip.tokens)
    elif spec.dtype == "bfloat16":
        tokens = clip.tokens.astype(ml_dtypes.bfloat16)
    else:
        tokens = clip.tokens.astype(spec.dtype)
    return ClipTokens(**{**vars(clip), "tokens": tokens})


def _digest(path: Path, media: str) -> tuple[str, int]:
    """Return digest and size of a file that can be a clip."""
    try:
        if not path.exists():
            raise MediaError(f"{media}: there is no such file. Check the path.")
        if not path.is_file():  # to read from a pipe or a device may never end
            what = "a folder" if path.is_dir() else "a pipe or a device"
            raise MediaError(f"{media}: this is {what}, not a media file.")
        n_bytes = path.stat().st_size
        if not n_bytes:
            raise MediaError(f"{media}: the file is empty (0 bytes). Copy or upload it again.")
        return file_sha256(path), n_bytes
    except OSError as error:
        raise MediaError(f"{media}: cannot be read: {error.strerror or error}.") from error


def _refuse_long(media: str, duration_s: float | None, limit_s: float) -> None:
    if duration_s is not None and duration_s > limit_s:
        raise MediaError(
            f"{media}: lasts {_clock(duration_s)}, more than the {limit_s:g} s that are allowed. Cut out "
            "the part that you ask about, or raise --max-duration-s."
        )


def _clock(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} (h:min:s)"


def _clip_of(digest: str, n_bytes: int, facts: Mapping[str, Any]) -> Clip:
    """Return the clip of what its container states, as indexing would."""
    if not facts:
        return Clip(sha256=digest, n_bytes=n_bytes)
    names = (
        "duration_s", "has_audio", "container", "video_codec", "audio_codec", "width_px", "height_px",
        "n_frames", "sample_rate_hz",
    )  # fmt: skip
    return Clip(
        sha256=digest,
        n_bytes=n_bytes,
        has_video=facts["has_video"] and not facts["is_image"],
        has_image=facts["has_video"],
        **{name: facts.get(name) for name in names},
    )


def _frames(inputs: ClipInputs, shown: StreamInput) -> tuple[SeenFrame, ...]:
    if shown.array is None:
        return ()
    squares = inputs.arrays[shown.array]
    size = inputs.facts.get("width_px"), inputs.facts.get("height_px")
    found: dict[int, SeenFrame] = {}
    for number, time_s, row in zip(shown.index, shown.pts_s, shown.pick, strict=True):
        if number not in found:
            rgb = np.asarray(with_aspect(squares[row], size, _LONGEST_PX))
            found[number] = SeenFrame(number, time_s, rgb)
    return tuple(found.values())


def _reason(clip: ClipTokens, media: str) -> str:
    """Return why a stream failed, for a sentence: without its kind, the file's name and the last period."""
    said = (clip.reason or "").partition(": ")[2]
    return said.removeprefix(f"{media}: ").rstrip(".")


def _printable(name: str) -> str:
    """Return a file's name as a record may hold it: no bytes outside Unicode, no backslash."""
    text = name.encode("utf-8", "replace").decode()
    return "".join("_" if c == "\\" or not c.isprintable() else c for c in text) or "clip"
