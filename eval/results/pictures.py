"""What a page shows of a clip: a strip of small frames, its waveform, the clip itself if it is small.

Everything becomes text of the page (data URIs, path data of an SVG), so that a page stays one file.
Files are decoded by `extract.decode` in processes of their own: a hostile one costs itself alone.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from cache.clip import file_sha256
from cache.schema import Model

if TYPE_CHECKING:  # whoever lays a page out need not load decoders
    from extract.decode_pool import Prepared
    from extract.inputs import ClipInputs, StreamInput

WAVE_WIDTH: Final = 240
"""Width of a waveform's box in units of its path; one unit is one bar."""
WAVE_HEIGHT: Final = 40
_JPEG_QUALITY: Final = 80
_LONGEST_SOUND_S: Final = 600.0
_PLAYABLE_CODECS: Final = frozenset(
    {"h264", "vp8", "vp9", "av1", "aac", "mp3", "opus", "vorbis", "flac"}
)
"""What current browsers decode. Raw sound (`pcm_...`) is playable too."""
_TYPES: Final[dict[str, tuple[Literal["video", "audio"], str]]] = {
    ".mp4": ("video", "video/mp4"), ".m4v": ("video", "video/mp4"), ".webm": ("video", "video/webm"),
    ".wav": ("audio", "audio/wav"), ".mp3": ("audio", "audio/mpeg"), ".m4a": ("audio", "audio/mp4"),
    ".ogg": ("audio", "audio/ogg"), ".opus": ("audio", "audio/ogg"), ".flac": ("audio", "audio/flac"),
}  # fmt: skip
"""Ending -> how it is played, and its type; of others no browser can be sure."""


@dataclass(frozen=True)
class ClipFile:
    """Where a clip's file is."""

    path: Path
    media: str
    """Its path below the media root, which messages name."""
    sha256: str | None = None
    """Digest that was indexed; None: whatever is there now is shown."""


class Frame(Model):
    """One frame of a strip."""

    src: str
    """Data URI of a JPEG file."""
    pts_s: float
    """Its presentation time."""
    width_px: int
    height_px: int


class ClipPictures(Model):
    """What there is to see and to hear of a clip."""

    frames: tuple[Frame, ...] = ()
    """In order of time."""
    waveform: str | None = None
    """Path data in a box of `WAVE_WIDTH` by `WAVE_HEIGHT`, silence in the middle; None without sound."""
    duration_s: float | None = None
    """Of the sound, or what the container states."""
    clip: str | None = None
    """Data URI of the file, where it is small and a browser can play it."""
    kind: Literal["video", "audio"] | None = None
    """How `clip` is played."""
    problems: tuple[str, ...] = ()
    """Why pictures or sound are not there."""

    @property
    def n_bytes(self) -> int:
        """Length of all pictures, path data and the clip as they stand in a page."""
        texts = (*(frame.src for frame in self.frames), self.waveform or "", self.clip or "")
        return sum(map(len, texts))


def read_pictures(
    files: Mapping[str, ClipFile],
    *,
    n_frames: int = 5,
    longest_px: int = 176,
    max_clip_bytes: int = 300_000,
    n_decoders: int = 2,
    on_clip: Callable[[int], None] | None = None,
) -> dict[str, ClipPictures]:
    """Decode clips and make them small enough for a page.

    Nothing that a file holds makes it raise: what cannot be shown is said in `problems`.

    Args:
        files: Any name -> file.
        n_frames: Frames of a strip, spread evenly; a shorter clip has fewer.
        longest_px: A larger frame is shrunk to it.
        max_clip_bytes: Larger files are not put into the page.
        n_decoders: Processes that decode at once.
        on_clip: Called with 1 behind each clip.

    Returns:
        One entry per name.
    """
    from extract.decode_pool import DecodeJob, DecodePool
    from extract.inputs import InputRequest

    requests = (
        InputRequest(
            stream="video", frames="uniform", n_frames=n_frames, size_px=longest_px,
            interpolation="bicubic",
        ),
        InputRequest(stream="image", frames="middle", size_px=longest_px, interpolation="bicubic"),
        InputRequest(stream="audio", window_s=_LONGEST_SOUND_S),
    )  # fmt: skip
    found: dict[str, ClipPictures] = {}
    with DecodePool(n_decoders) as pool:
        waiting: dict[str, Any] = {}
        for name, file in files.items():
            try:
                digest = file.sha256 or file_sha256(file.path)
            except OSError as error:
                said = f"{file.media} cannot be read ({error.strerror or error})"
                waiting[name] = ClipPictures(problems=(said,))
                continue
            waiting[name] = pool.submit(DecodeJob(file.path, digest, file.media, requests))
        for name, answer in waiting.items():
            found[name] = (
                answer
                if isinstance(answer, ClipPictures)
                else _pictures(answer.result(), files[name], longest_px, max_clip_bytes)
            )
            if on_clip is not None:
                on_clip(1)
    return found


def _pictures(
    prepared: Prepared, file: ClipFile, longest_px: int, max_clip_bytes: int
) -> ClipPictures:
    from extract.decode_pool import DecodeFailure

    if isinstance(prepared, DecodeFailure):
        return ClipPictures(problems=(prepared.failure.reason,))
    video, image, audio = prepared.streams
    shown = video if video.array is not None else image  # a still picture has no video
    sound = None if audio.array is None else prepared.arrays[audio.array]
    duration_s = prepared.audio_duration_s or prepared.facts.get("duration_s")
    problems = dict.fromkeys(s.failure.reason for s in prepared.streams if s.failure is not None)
    kind, uri = (None, None) if problems else _playable(file, prepared.facts, max_clip_bytes)
    return ClipPictures(
        frames=_frames(shown, prepared, longest_px),
        waveform=None if sound is None else waveform_path(sound),
        duration_s=duration_s,
        clip=uri,
        kind=kind,
        problems=tuple(problems),
    )


def _frames(shown: StreamInput, inputs: ClipInputs, longest_px: int) -> tuple[Frame, ...]:
    if shown.array is None:
        return ()
    from extract.annotate.evidence.media import jpeg_bytes, with_aspect

    squares = inputs.arrays[shown.array]  # (B, S, S, 3)
    size = inputs.facts.get("width_px"), inputs.facts.get("height_px")
    found: dict[int, Frame] = {}
    for index, pts_s, row in zip(shown.index, shown.pts_s, shown.pick, strict=True):
        if index not in found:
            picture = with_aspect(squares[row], size, longest_px)
            src = data_uri("image/jpeg", jpeg_bytes(picture, _JPEG_QUALITY))
            found[index] = Frame(
                src=src,
                pts_s=round(pts_s, 3),
                width_px=picture.width,
                height_px=picture.height,
            )
    return tuple(found.values())


def _playable(
    file: ClipFile, facts: Mapping[str, Any], max_bytes: int
) -> tuple[Literal["video", "audio"] | None, str | None]:
    """Return how a file is played and its data URI; nothing of a large file or an old codec."""
    kind, media_type = _TYPES.get(file.path.suffix.lower(), (None, ""))
    codecs = [facts[name] for name in ("video_codec", "audio_codec") if facts.get(name)]
    known = all(c in _PLAYABLE_CODECS or c.startswith("pcm_") for c in codecs)
    if kind is None or not codecs or not known or file.path.stat().st_size > max_bytes:
        return None, None
    return kind, data_uri(media_type, file.path.read_bytes())


def data_uri(media_type: str, data: bytes) -> str:
    """Return bytes as an address that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def waveform_path(waveform: npt.NDArray[np.float32]) -> str:
    """Return the outline of a waveform as SVG path data: the loudest sample of each bar, both ways.

    The loudest bar fills the height, so that quiet clips can be told from silent ones.

    Args:
        waveform: (N,) samples, full scale 1.0.
    """
    n_bars = min(WAVE_WIDTH, max(1, len(waveform)))
    edges = np.linspace(0, len(waveform), n_bars + 1).astype(int)
    peaks = np.array([np.abs(waveform[a:b]).max(initial=0.0) for a, b in pairwise(edges)])
    loudest = float(peaks.max(initial=0.0))
    # Below 16-bit resolution there is nothing to hear, and noise must not fill the height.
    heights = peaks / loudest if loudest > 2**-15 else np.zeros(n_bars)
    middle, width = WAVE_HEIGHT / 2, WAVE_WIDTH / n_bars
    outline = np.round(np.maximum(heights * (middle - 1), 0.4), 1)
    xs = np.round((np.arange(n_bars) + 0.5) * width, 1)
    up = [f"{x:g} {middle - h:g}" for x, h in zip(xs, outline, strict=True)]
    down = [f"{x:g} {middle + h:g}" for x, h in zip(xs, outline, strict=True)][::-1]
    return f"M{'L'.join([*up, *down])}Z"
