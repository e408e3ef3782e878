"""A clip's file to what its encoders take in: decoded once, resized, with a status per request.

    inputs = prepare_inputs(path, sha256, media, [request_of(spec, record) for spec in specs])

Nothing here needs torch, so that a process which only decodes starts quickly and stays small.
`extract.wire` carries the result from that process to another one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from cache.clip import Record, file_sha256
from cache.encoders import SoundEncoder
from cache.errors import MediaError
from cache.schema import Model
from cache.spec import FaceCrop, Stream, TokenSpec
from extract.decode import Decoded, DecodeLimits, FrameChoice, FrameRequest, decode
from extract.faces import FaceFinder, FacesFailed, FacesOfClip, FromNobody
from extract.failures import Failure
from extract.preprocess import Interpolation, resize
from extract.sampling import FrameKind, window_draw

logger = logging.getLogger(__name__)

_BEYOND_WINDOW_S = 1.0
"""Sound that is kept beyond an encoder's window: networks round their windows up."""


class InputRequest(Model):
    """What one spec needs of one record's file."""

    stream: Stream
    frames: FrameKind | None = None
    """Video and image only, as are the six below."""
    n_frames: int = Field(default=1, gt=0)
    peak_index: int | None = None
    """The record's own frame, for the rule `peak` alone."""
    draw: int | None = Field(default=None, ge=0)
    """From `window_draw`, for the rule `window` alone."""
    crop: FaceCrop | None = None
    """Cut a square around the face out of each frame first."""
    size_px: int | None = Field(default=None, gt=0)
    """Height and width to resize to."""
    interpolation: Interpolation | None = None
    window_s: float | None = Field(default=None, gt=0)
    """Audio only: how much the encoder hears from the start; None for all there is."""

    @model_validator(mode="after")
    def _fits_its_stream(self) -> InputRequest:
        needed = (self.frames, self.size_px, self.interpolation)
        if self.stream == "audio" and any(value is not None for value in (*needed, self.crop)):
            raise ValueError("stream 'audio' has no frames, size_px, interpolation or crop")
        if self.stream != "audio" and self.window_s is not None:
            raise ValueError(f"stream '{self.stream}' has no window_s")
        if self.stream != "audio" and None in needed:
            raise ValueError(f"stream '{self.stream}' needs frames, size_px and interpolation")
        return self


def request_of(spec: TokenSpec, record: Record) -> InputRequest:
    """Return what a spec needs of a record's file. Equal requests need the same input."""
    if spec.frames is None or spec.pixels is None:
        assert isinstance(spec.encoder, SoundEncoder)
        return InputRequest(stream=spec.stream, window_s=spec.encoder.window_s)
    return InputRequest(
        stream=spec.stream,
        frames=spec.frames.kind,
        n_frames=spec.frames.n_frames,
        peak_index=record.peak_index if spec.uses_record() else None,
        draw=window_draw(spec.frames.seed, record.sha256) if spec.frames.kind == "window" else None,
        crop=spec.crop,
        size_px=spec.pixels.size_px,
        interpolation=spec.pixels.interpolation,
    )


@dataclass(frozen=True)
class StreamInput:
    """The answer to one `InputRequest`."""

    status: Literal["ok", "absent", "failed"]
    failure: Failure | None = None
    """Why it failed; None otherwise."""
    remark: str | None = None
    """Of an ok stream damage that decoding passed over; of an absent one why it is, if there is more to
    say than that the clip has no such stream."""
    array: int | None = None
    """Number in `ClipInputs.arrays`; None unless the status is ok."""
    index: tuple[int, ...] = ()
    """Which decoded frames were chosen, non-decreasing; a short clip repeats some."""
    pts_s: tuple[float, ...] = ()
    """Their presentation times in seconds."""
    pick: tuple[int, ...] = ()
    """The row of each chosen frame in the array, which holds every frame once."""


@dataclass
class ClipInputs:
    """All that the encoders need of one clip."""

    streams: list[StreamInput]
    """One per request, in the order of the requests."""
    arrays: list[np.ndarray] = field(default_factory=list)
    """Waveforms (N,) float32, mono at 16 kHz, and pictures (B, S, S, 3) uint8 RGB. Equal requests
    share one array."""
    audio_duration_s: float | None = None
    """Decoded length of the whole sound, also where the waveform holds less."""
    decode_cpu_s: float = 0.0
    """CPU time that this process took meanwhile, all its threads together."""
    decoder: str | None = None
    """What gave the pictures: `decord`, `pyav` or `pillow`."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the container states of itself: the fields of `MediaFacts` that are known."""

    @property
    def failure(self) -> Failure | None:
        """Why a stream failed: the first that did."""
        return next((s.failure for s in self.streams if s.failure is not None), None)


def prepare_inputs(
    path: str | Path,
    sha256: str,
    media: str,
    requests: Sequence[InputRequest],
    limits: DecodeLimits | None = None,
    picture_decoder: Literal["auto", "pyav"] = "auto",
    faces: FaceFinder | None = None,
) -> ClipInputs:
    """Check a file's digest, decode it once, and crop and resize the frames that are asked for.

    Nothing that a file holds makes it raise: what cannot be decoded is `failed`, with the reason.

    Args:
        path: The file.
        sha256: Digest of the bytes that were indexed.
        media: The record's media path, which messages name in place of `path`.
        requests: What is needed, one per spec.
        limits: Bounds on size and length; None: the defaults, and no more sound than is needed.
        picture_decoder: See `extract.decode.decode`.
        faces: Says where the face is, for requests with a crop.
    """
    started_s = time.process_time()
    path = Path(path)
    try:
        if file_sha256(path) == sha256:
            decoded = decode(
                path,
                want_audio=any(request.stream == "audio" for request in requests),
                frame_choices=[
                    FrameRequest(request.frames, request.n_frames, request.peak_index, request.draw)
                    for request in requests
                    if request.frames is not None
                ],
                limits=limits or _limits_of(requests),
                picture_decoder=picture_decoder,
            )
            inputs = _inputs_of(
                decoded,
                requests,
                FacesOfClip(faces or FromNobody()),
                lambda text: _named(text, path, media),
            )
        else:
            message = (
                f"{media} is not the file that was indexed (its digest differs). "
                "Index the folder again, or restore the file."
            )
            inputs = all_failed(requests, Failure("changed", message))
    except MediaError as error:
        message = _named(str(error), path, media)
        inputs = all_failed(requests, Failure("undecodable", message))
    except FileNotFoundError:
        message = (
            f"{media}: there is no such file. Check the media root, or index the folder again."
        )
        inputs = all_failed(requests, Failure("missing", message))
    except OSError as error:
        message = _named(f"{media} cannot be read: {error.strerror or error}", path, media)
        inputs = all_failed(requests, Failure("unreadable", message))
    except MemoryError:
        message = f"{media}: decoding it needs more memory than this process may take."
        inputs = all_failed(requests, Failure("memory", message))
    except Exception as error:  # the per-clip boundary: recorded, never swallowed
        logger.warning("%s: unexpected %s", media, type(error).__name__, exc_info=True)
        message = _named(f"{type(error).__name__}: {error}", path, media)
        inputs = all_failed(requests, Failure("unexpected", message))
    inputs.decode_cpu_s = time.process_time() - started_s
    return inputs


def _limits_of(requests: Sequence[InputRequest]) -> DecodeLimits:
    """Return the default limits, with no more sound than the requests need."""
    windows = [request.window_s for request in requests if request.stream == "audio"]
    needed_s = [window_s + _BEYOND_WINDOW_S for window_s in windows if window_s is not None]
    if len(needed_s) < max(1, len(windows)):  # no sound is wanted, or all of it
        return DecodeLimits()
    return DecodeLimits(max_audio_s=min(max(needed_s), DecodeLimits.max_audio_s))


def all_failed(requests: Sequence[InputRequest], failure: Failure) -> ClipInputs:
    """Return the inputs of a clip of which every request failed alike."""
    return ClipInputs([StreamInput("failed", failure)] * len(requests))


def _named(text: str, path: Path, media: str) -> str:
    """Name the record's media path in a message, wherever the file lay; undecodable names as `?`."""
    return text.replace(str(path), media).encode("utf-8", "replace").decode()


class _Arrays:
    """The arrays of one clip, each made once however many requests need it."""

    def __init__(self) -> None:
        self.made: list[np.ndarray] = []
        self._numbers: dict[Hashable, int] = {}

    def number_of(self, need: Hashable, make: Callable[[], np.ndarray]) -> int:
        """Return the number of the array that meets a need; `make` is called for the first."""
        if need not in self._numbers:
            self.made.append(make())
            self._numbers[need] = len(self.made) - 1
        return self._numbers[need]


def _inputs_of(
    decoded: Decoded,
    requests: Sequence[InputRequest],
    faces: FacesOfClip,
    named: Callable[[str], str],
) -> ClipInputs:
    arrays = _Arrays()
    choices = iter(decoded.choices)  # one per request that has frames; none unless pictures are ok
    streams = []
    for request in requests:
        choice = next(choices, None) if request.frames is not None else None
        streams.append(_stream_input(request, decoded, choice, arrays, faces, named))
    return ClipInputs(
        streams,
        arrays.made,
        audio_duration_s=decoded.audio.duration_s if decoded.audio is not None else None,
        decoder=decoded.decoder,
        facts={name: fact for name, fact in asdict(decoded.facts).items() if fact is not None},
    )


def _stream_input(
    request: InputRequest,
    decoded: Decoded,
    choice: FrameChoice | None,
    arrays: _Arrays,
    faces: FacesOfClip,
    named: Callable[[str], str],
) -> StreamInput:
    is_audio = request.stream == "audio"
    outcome = decoded.audio_outcome if is_audio else decoded.video_outcome
    assert outcome is not None, "every stream that is requested is asked for"
    if outcome.status == "absent":
        return StreamInput("absent")
    if request.stream == "video" and decoded.facts.is_image:
        return StreamInput("absent")  # a still picture has nothing temporal to show
    said = named(outcome.reason) if outcome.reason else None
    if outcome.status == "failed":
        return StreamInput("failed", Failure("undecodable", said or "could not be decoded"))
    if is_audio:
        track = decoded.audio
        assert track is not None
        array = arrays.number_of("waveform", lambda: track.waveform)
        return StreamInput("ok", remark=said, array=array)
    assert choice is not None
    if choice.failure is not None:
        return StreamInput("failed", Failure("undecodable", choice.failure))
    return _picture_input(request, decoded, choice, arrays, faces, said)


def _picture_input(
    request: InputRequest,
    decoded: Decoded,
    choice: FrameChoice,
    arrays: _Arrays,
    faces: FacesOfClip,
    remark: str | None,
) -> StreamInput:
    size_px, interpolation, crop = request.size_px, request.interpolation, request.crop
    assert size_px is not None
    assert interpolation is not None
    distinct = tuple(sorted(set(choice.indices)))
    pictures = [decoded.frames[i] for i in distinct]
    if crop is not None:
        try:
            track = faces.track(decoded.frames, distinct, decoded.n_frames)
            if not track.indices:
                looked = "frame" if track.n_frames == 1 else f"{track.n_frames} frames"
                return StreamInput(
                    "absent", remark=f"no face in the {looked} that {crop.by} looked at"
                )
            squares = track.squares(decoded.frames, distinct, crop.margin)
        except FacesFailed as error:
            return StreamInput("failed", Failure("faces", str(error)))
        pictures = [square.cut(frame) for square, frame in zip(squares, pictures, strict=True)]
    array = arrays.number_of(
        (size_px, interpolation, distinct, crop),
        lambda: resize(pictures, size_px, interpolation),
    )
    pick = tuple(distinct.index(i) for i in choice.indices)
    return StreamInput("ok", None, remark, array, choice.indices, choice.pts_s, pick)
