"""What a media file holds: opening it safely, choosing its streams, its facts.

Rules used everywhere: the video stream is the first in container order that is not an attached
picture (cover art), the audio stream is the first audio stream; a picture file is a clip of one
frame without sound. Pictures are recognised by their first bytes, never by the file's name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, cast

import av
import av.container
import numpy as np
from av.audio.stream import AudioStream
from av.error import FFmpegError
from av.packet import Packet
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageOps

from cache.errors import MediaError

CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,asf,gif,ogg,wav,w64,mp3,flac,aac,"
    "aiff,amr,au,caf"
)
"""Containers that are opened. Play lists (hls, concat) are left out: they name other files."""

PICTURE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises on damaged or oversized pictures."""

_FIRST_PICTURE_PACKETS = 250
"""Video packets tried for a first picture; far more than any encoder's delay."""


@dataclass(frozen=True)
class DecodeLimits:
    """Bounds on what one file may cost; a file beyond them is refused, never shrunk silently."""

    max_picture_px: int = 40_000_000
    """Pixels of one picture; 8K video has 33 million."""
    max_frames: int = 1_000_000
    """Pictures of one video stream; 1,000,000 are more than 9 hours at 30 per second."""
    max_audio_s: float = 3600.0
    """Seconds of waveform kept from the start. The rest is measured, not kept."""


@dataclass(frozen=True)
class MediaFacts:
    """What a file says about itself; cheap to read. Decoding may correct `n_frames`."""

    container: str
    """Name of the demuxer, e.g. `mov,mp4,m4a,3gp,3g2,mj2`; for pictures Pillow's, e.g. `png`."""
    is_image: bool
    has_video: bool
    """True for pictures too; cover art does not count."""
    has_audio: bool
    duration_s: float | None = None
    """As the container states it, None if it does not; a hint, not a measurement."""
    video_index: int | None = None
    """Container index of the chosen video stream."""
    audio_index: int | None = None
    n_video_streams: int = 0
    """Video streams of any kind, attached pictures included."""
    n_audio_streams: int = 0
    video_codec: str | None = None
    audio_codec: str | None = None
    width_px: int | None = None
    """As displayed, after rotation; pixels are taken as square."""
    height_px: int | None = None
    n_frames: int | None = None
    """As the header states it, edit lists ignored; None if it does not."""
    rotation_deg: int = 0
    """Counter-clockwise turn that brings the stored picture upright: 0, 90, 180 or -90."""
    mirrored: bool = False
    """The picture is also flipped left to right, after the turn."""
    sample_rate_hz: int | None = None
    n_channels: int | None = None


class Orientation(NamedTuple):
    """How a stored picture is turned for display, as one of the eight axis swaps and flips."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """Turn a stored picture (H, W, 3) into the displayed one, contiguous."""
        if self.transpose:
            picture = picture.swapaxes(0, 1)
        rows = slice(None, None, -1) if self.flip_y else slice(None)
        columns = slice(None, None, -1) if self.flip_x else slice(None)
        return np.ascontiguousarray(picture[rows, columns])

    @property
    def mirrored(self) -> bool:
        """True if no rotation alone gives this orientation."""
        return (self.transpose + self.flip_x + self.flip_y) % 2 == 1

    @property
    def rotation_deg(self) -> int:
        """Counter-clockwise turn before the left-right flip, if any: 0, 90, 180 or -90."""
        if not self.transpose:
            return 180 if self.flip_y else 0
        return 90 if self.flip_y else -90


@dataclass(frozen=True)
class FirstPicture:
    """The first picture of a video as PyAV decodes it: the yardstick for other decoders."""

    rgb: np.ndarray
    """(H, W, 3) uint8, as displayed."""
    orientation: Orientation
    interlaced: bool
    bits: int
    """Bits per component of the stored picture."""


def words(error: BaseException) -> str:
    """Return the decoder's own words on one line."""
    # decord puts the clock and its build folder before each message.
    text = re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", str(error))
    text = " ".join(text.split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def open_media(path: Path) -> av.container.InputContainer:
    """Open a sound or video file with PyAV, play lists and network addresses excluded.

    Raises:
        MediaError: if the file cannot be opened as one of `CONTAINERS`.
    """
    try:
        # "file:" keeps a colon in a name from being read as a protocol.
        return av.open(
            f"file:{path.absolute()}",
            metadata_errors="replace",
            options={"format_whitelist": CONTAINERS, "protocol_whitelist": "file"},
        )
    except (FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{path}: cannot be opened as media ({words(error)}). Allowed are png, jpeg, webp and "
            f"bmp pictures and the containers {CONTAINERS}. Check that the file is complete, "
            "re-mux it, or leave the clip out."
        ) from error


def picture_format(path: Path) -> str | None:
    """Return `png`, `jpeg`, `webp` or `bmp` if the first bytes say so, else None.

    Raises:
        MediaError: if the path is not a readable, non-empty file.
    """
    try:
        if not path.is_file():
            found = "a folder or device" if path.exists() else "nothing"
            raise MediaError(
                f"{path}: there is {found} at this path; a media file is needed. "
                "Check the media root and the manifest."
            )
        with path.open("rb") as file:
            head = file.read(16)
    except (OSError, ValueError) as error:
        raise MediaError(
            f"{path}: cannot be read ({words(error)}). Check the path and its permissions."
        ) from error
    if not head:
        raise MediaError(
            f"{path}: the file is empty (0 bytes); a media file is needed. Copy it again."
        )
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    # BMP's two letters are weak evidence: its four reserved bytes must be zero as well.
    if head[:2] == b"BM" and head[6:10] == b"\0\0\0\0":
        return "bmp"
    return None


@contextmanager
def open_picture(path: Path, kind: str) -> Iterator[Image.Image]:
    """Open a picture file with Pillow as the given format; pixels are not decoded yet.

    Raises:
        MediaError: if the header does not decode.
    """
    try:
        picture = Image.open(path, formats=[kind.upper()])
    except PICTURE_ERRORS as error:
        raise MediaError(
            f"{path}: starts like a {kind} picture but does not open ({words(error)}). "
            "A complete png, jpeg, webp or bmp file is needed; replace it or leave the clip out."
        ) from error
    with picture:
        yield picture


def probe(path: str | Path, limits: DecodeLimits | None = None) -> MediaFacts:
    """Read what a file says about itself, decoding at most its first picture.

    Raises:
        MediaError: if the file cannot be opened.
    """
    return examine(Path(path), limits or DecodeLimits())[0]


def examine(path: Path, limits: DecodeLimits) -> tuple[MediaFacts, FirstPicture | None]:
    """Return the facts of a file and, for a video, its first picture if one can be decoded.

    Raises:
        MediaError: if the file cannot be opened.
    """
    kind = picture_format(path)
    if kind is not None:
        with open_picture(path, kind) as picture:
            return _picture_facts(picture, kind), None
    with open_media(path) as container:
        video, audio = pick_video(container), pick_audio(container)
        first = None
        width = height = None
        if video is not None and video.codec_context is not None:
            width, height = video.codec_context.width, video.codec_context.height
            if 0 < width * height <= limits.max_picture_px:
                first = _first_picture(container, video, limits)
        if first is not None:
            height, width = first.rgb.shape[:2]
        turn = first.orientation if first else Orientation()
        facts = MediaFacts(
            container=container.format.name,
            is_image=False,
            has_video=video is not None,
            has_audio=audio is not None,
            duration_s=container.duration / av.time_base if container.duration else None,
            video_index=video.index if video else None,
            audio_index=audio.index if audio else None,
            n_video_streams=len(container.streams.video),
            n_audio_streams=len(container.streams.audio),
            video_codec=video.codec_context.name if video and video.codec_context else None,
            audio_codec=audio.codec_context.name if audio and audio.codec_context else None,
            width_px=width or None,
            height_px=height or None,
            n_frames=(video.frames or None) if video else None,
            rotation_deg=turn.rotation_deg,
            mirrored=turn.mirrored,
            sample_rate_hz=(audio.sample_rate or None) if audio and audio.codec_context else None,
            n_channels=(audio.channels or None) if audio and audio.codec_context else None,
        )
    return facts, first


def pick_video(container: av.container.InputContainer) -> VideoStream | None:
    """Return the first video stream in container order that is not an attached picture."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def pick_audio(container: av.container.InputContainer) -> AudioStream | None:
    """Return the first audio stream in container order."""
    return container.streams.audio[0] if container.streams.audio else None


def packets_of(
    container: av.container.InputContainer,
    streams: Sequence[VideoStream | AudioStream],
    complaints: list[str],
) -> Iterator[Packet[VideoStream] | Packet[AudioStream]]:
    """Yield packets in container order up to the end, or to where the container breaks off.

    A break is no exception here, since what came before it is good: it is told in `complaints`.
    """
    try:
        for packet in container.demux(*streams):
            yield cast("Packet[VideoStream] | Packet[AudioStream]", packet)
    except FFmpegError as error:
        complaints.append(f"the container breaks off ({words(error)})")


def orientation_of(frame: VideoFrame) -> Orientation:
    """Read a decoded frame's display matrix, snapped to the nearest of the eight orientations."""
    for data in cast(Iterator[SideData], iter(frame.side_data)):
        if data.type.name == "DISPLAYMATRIX" and data.buffer_size >= 36:
            a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
            # x' = a x + c y and y' = b x + d y, in 16.16 fixed point, y pointing down.
            if abs(a) + abs(d) >= abs(b) + abs(c):
                return Orientation(False, flip_x=a < 0, flip_y=d < 0)
            return Orientation(True, flip_x=c < 0, flip_y=b < 0)
    return Orientation()


def to_rgb(frame: VideoFrame) -> np.ndarray:
    """Convert a decoded frame to its displayed picture, (H, W, 3) uint8 RGB."""
    return orientation_of(frame).apply(frame.to_ndarray(format="rgb24"))


def _first_picture(
    container: av.container.InputContainer, video: VideoStream, limits: DecodeLimits
) -> FirstPicture | None:
    video.codec_context.thread_count = 1
    for packet in islice(packets_of(container, [video], []), _FIRST_PICTURE_PACKETS):
        try:
            frames = cast(list[VideoFrame], packet.decode())
        except (FFmpegError, ValueError):
            continue  # A damaged packet; the next one may decode.
        for frame in frames:
            if frame.width * frame.height > limits.max_picture_px:
                return None
            return FirstPicture(
                rgb=to_rgb(frame),
                orientation=orientation_of(frame),
                interlaced=frame.interlaced_frame,
                bits=max(part.bits for part in frame.format.components),
            )
    return None


def _picture_facts(picture: Image.Image, kind: str) -> MediaFacts:
    try:
        # Tag 0x0112 is EXIF's orientation, 1 to 8; 1 is upright.
        tag = cast(int, picture.getexif().get(0x0112, 1))
    except PICTURE_ERRORS:
        tag = 1
    turn = {
        2: Orientation(flip_x=True),
        3: Orientation(flip_x=True, flip_y=True),
        4: Orientation(flip_y=True),
        5: Orientation(transpose=True),
        6: Orientation(transpose=True, flip_x=True),
        7: Orientation(transpose=True, flip_x=True, flip_y=True),
        8: Orientation(transpose=True, flip_y=True),
    }.get(tag, Orientation())
    width, height = picture.size[::-1] if turn.transpose else picture.size
    return MediaFacts(
        container=kind,
        is_image=True,
        has_video=True,
        has_audio=False,
        n_video_streams=1,
        video_codec=kind,
        width_px=width,
        height_px=height,
        n_frames=1,
        rotation_deg=turn.rotation_deg,
        mirrored=turn.mirrored,
    )


def picture_rgb(picture: Image.Image) -> np.ndarray:
    """Decode an opened picture file as displayed, (H, W, 3) uint8 RGB; alpha is dropped.

    Raises:
        ValueError: for pixels that are not 8-bit.
    """
    if picture.mode in ("F", "I") or picture.mode.startswith("I;"):
        raise ValueError(
            f"pixel mode {picture.mode!r} is not 8-bit; save the picture as 8-bit grey or RGB"
        )
    return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
