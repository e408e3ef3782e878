"""One media file to waveform and frames: `decode` is the only reader of media in emocache.

    decoded = decode(path, want_audio=True, frame_choices=[FrameRequest("uniform", 16)])

One pass over the packets gives the waveform and the table of presentation times; the pictures then
come from decord or PyAV (extract/pictures.py). A stream that fails does not take the other one
with it, and nothing is ever replaced by zeros. docs/decoding.md has the measured cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

import numpy as np
from av.audio.stream import AudioStream
from av.packet import Packet
from av.video.stream import VideoStream

from cache.errors import MediaError, SchemaError
from extract.media import (
    PICTURE_ERRORS,
    DecodeLimits,
    FirstPicture,
    MediaFacts,
    examine,
    open_media,
    open_picture,
    packets_of,
    picture_rgb,
    probe,
    words,
)
from extract.pictures import (
    PacketTable,
    SequentialRead,
    decord_refusal,
    read_in_sequence,
    read_with_decord,
    too_large,
    too_long,
)
from extract.sampling import FrameKind, frame_indices
from extract.sound import AudioTrack, SoundReader

__all__ = [
    "AudioTrack",
    "DecodeLimits",
    "Decoded",
    "FrameChoice",
    "FrameRequest",
    "MediaFacts",
    "StreamOutcome",
    "decode",
    "probe",
]


@dataclass(frozen=True)
class FrameRequest:
    """Which frames one token stream wants; see `extract.sampling.frame_indices`."""

    kind: FrameKind
    n_frames: int = 1
    peak_index: int | None = None
    draw: int | None = None


@dataclass(frozen=True)
class FrameChoice:
    """The answer to one `FrameRequest`."""

    indices: tuple[int, ...] = ()
    """Keys into `Decoded.frames`, non-decreasing; empty if the request could not be met."""
    pts_s: tuple[float, ...] = ()
    """Presentation time of each index, in seconds on the container's clock."""
    failure: str | None = None
    """Why this request alone could not be met, e.g. a peak index outside the clip."""


@dataclass(frozen=True)
class StreamOutcome:
    """How one stream of a file ended: ok, absent (the file has none) or failed."""

    status: Literal["ok", "absent", "failed"]
    reason: str | None = None
    """Why it failed; for an `ok` stream a remark on damage that was passed over, or None."""
    n_damaged: int = 0
    """Packets or pictures that did not decode as stored; above 0 an `ok` stream has gaps."""


@dataclass
class Decoded:
    """What `decode` found in a file. An outcome of None means that the stream was not asked for."""

    facts: MediaFacts
    audio: AudioTrack | None = None
    audio_outcome: StreamOutcome | None = None
    frames: dict[int, np.ndarray] = field(default_factory=dict)
    """The chosen frames by index, each (H, W, 3) uint8 RGB as displayed."""
    choices: list[FrameChoice] = field(default_factory=list)
    """One per request, in the order of the requests; empty unless the pictures are ok."""
    video_outcome: StreamOutcome | None = None
    n_frames: int = 0
    """Pictures that the clip really has; every index counts among these."""
    decoder: Literal["decord", "pyav", "pillow"] | None = None
    """Which decoder gave the pictures."""
    decoder_reason: str | None = None
    """Why it was that one."""


def decode(
    path: str | Path,
    *,
    want_audio: bool,
    frame_choices: Sequence[FrameRequest],
    limits: DecodeLimits | None = None,
    picture_decoder: Literal["auto", "pyav"] = "auto",
) -> Decoded:
    """Decode the sound and the chosen frames of one file.

    Args:
        path: a sound, video or picture file.
        want_audio: whether to decode the first sound stream.
        frame_choices: the frames wanted, one request per token stream; empty for none.
        limits: bounds on size and length; the defaults if None.
        picture_decoder: `auto` uses decord where it can be trusted; `pyav` never does, so that
            damage the decoder meets anywhere in the video is counted. Undamaged files give the
            same pictures either way.

    Returns:
        Waveform, frames and one outcome per stream asked for.

    Raises:
        MediaError: if the file cannot be opened at all.
    """
    path, limits = Path(path), limits or DecodeLimits()
    facts, first = examine(path, limits)
    decoded = Decoded(facts)
    if want_audio and not facts.has_audio:
        decoded.audio_outcome = StreamOutcome("absent")
    if frame_choices and not facts.has_video:
        decoded.video_outcome = StreamOutcome("absent")
    want_audio = want_audio and facts.has_audio
    want_frames = bool(frame_choices) and facts.has_video
    if facts.is_image:
        if want_frames:
            _decode_picture(path, decoded, frame_choices, limits)
        return decoded
    if not want_audio and not want_frames:
        return decoded
    table = _scan(path, decoded, want_audio, want_frames, limits)
    if table is not None:
        try:
            _decode_pictures(
                path, decoded, frame_choices, table, first, limits, picture_decoder == "pyav"
            )
        except MediaError as error:
            decoded.frames, decoded.choices, decoded.n_frames = {}, [], 0
            decoded.decoder = decoded.decoder_reason = None
            decoded.video_outcome = StreamOutcome("failed", f"{path}: video: {error}")
    return decoded


def _scan(
    path: Path, decoded: Decoded, want_audio: bool, want_frames: bool, limits: DecodeLimits
) -> PacketTable | None:
    """Read all packets once: fill in the sound, return the table of pictures if wanted."""
    facts, complaints = decoded.facts, list[str]()
    waveform: SoundReader | None = None
    table: PacketTable | None = None
    with open_media(path) as container:
        streams: list[VideoStream | AudioStream] = []
        if want_audio:
            audio = container.streams[cast(int, facts.audio_index)]
            assert isinstance(audio, AudioStream)
            if facts.audio_codec is None:
                decoded.audio_outcome = StreamOutcome(
                    "failed", f"{path}: audio: no decoder for this codec; transcode the sound"
                )
            else:
                waveform = SoundReader(audio, limits)
                streams.append(audio)
        if want_frames:
            video = container.streams[cast(int, facts.video_index)]
            assert isinstance(video, VideoStream)
            if facts.video_codec is None:
                decoded.video_outcome = StreamOutcome(
                    "failed", f"{path}: video: no decoder for this codec; transcode the video"
                )
            else:
                table = PacketTable(video)
                streams.append(video)
        for packet in packets_of(container, streams, complaints) if streams else ():
            if packet.stream_index == facts.audio_index and waveform is not None:
                waveform.add(cast("Packet[AudioStream]", packet))
            elif packet.stream_index == facts.video_index and table is not None:
                table.add(cast("Packet[VideoStream]", packet))
    if waveform is not None:
        waveform.complaints += complaints
        decoded.audio, said = waveform.close()
        if decoded.audio is None:
            said = f"{path}: audio stream {facts.audio_index}: {said}"
        status: Literal["ok", "failed"] = "ok" if decoded.audio is not None else "failed"
        decoded.audio_outcome = StreamOutcome(status, said, waveform.n_damaged)
    if table is not None:
        table.close(complaints)
    return table


def _decode_pictures(
    path: Path,
    decoded: Decoded,
    requests: Sequence[FrameRequest],
    table: PacketTable,
    first: FirstPicture | None,
    limits: DecodeLimits,
    only_pyav: bool,
) -> None:
    """Fill in frames and choices from decord or PyAV; MediaError if no picture decodes."""
    facts = decoded.facts
    if (facts.width_px or 0) * (facts.height_px or 0) > limits.max_picture_px:
        raise MediaError(too_large(facts.width_px or 0, facts.height_px or 0, limits))
    if len(table) > limits.max_frames:
        raise MediaError(too_long(len(table), limits))
    choices = _choose(requests, table.pts_s)
    wanted = {index for choice in choices for index in choice.indices}
    refusal = "the caller asked for it" if only_pyav else decord_refusal(facts, table, first)
    if refusal is None and first is not None:
        try:
            decoded.frames = read_with_decord(path, sorted(wanted), table.pts_s, first)
        except MediaError as error:
            refusal = str(error)
        else:
            decoded.choices, decoded.n_frames = choices, len(table)
            decoded.decoder, decoded.decoder_reason = "decord", "agrees with the packet table"
            decoded.video_outcome = StreamOutcome("ok")
            return
    read = _read_true_count(path, decoded, requests, wanted, limits)
    if not read.pts_s:
        raise MediaError(f"no picture decodes ({read.remark or 'the stream is empty'})")
    decoded.frames, decoded.n_frames = read.frames, len(read.pts_s)
    decoded.choices = _choose(requests, read.pts_s)
    decoded.decoder, decoded.decoder_reason = "pyav", refusal
    remark = read.remark
    if len(read.pts_s) != len(table):
        counts = f"{len(table)} pictures promised, {len(read.pts_s)} decoded"
        remark = f"{counts}; {remark}" if remark else counts
    decoded.video_outcome = StreamOutcome("ok", remark, read.n_damaged)


def _read_true_count(
    path: Path,
    decoded: Decoded,
    requests: Sequence[FrameRequest],
    wanted: set[int],
    limits: DecodeLimits,
) -> SequentialRead:
    """Decode in sequence; again if the packets promised another count than there is."""
    stream_index = cast(int, decoded.facts.video_index)
    read = read_in_sequence(path, stream_index, wanted, limits)
    choices = _choose(requests, read.pts_s)
    true_wanted = {index for choice in choices for index in choice.indices}
    if true_wanted <= set(read.frames):
        read.frames = {index: read.frames[index] for index in sorted(true_wanted)}
        return read
    return read_in_sequence(path, stream_index, true_wanted, limits)


def _choose(requests: Sequence[FrameRequest], pts_s: Sequence[float]) -> list[FrameChoice]:
    """Answer every request for a clip whose pictures have these times; a misfit fails alone."""
    if not pts_s:
        return []
    choices = []
    for request in requests:
        try:
            indices = frame_indices(
                request.kind, len(pts_s), request.n_frames, request.peak_index, request.draw
            )
        except SchemaError as error:
            choices.append(FrameChoice(failure=str(error)))
        else:
            choices.append(FrameChoice(tuple(indices), tuple(pts_s[i] for i in indices)))
    return choices


def _decode_picture(
    path: Path, decoded: Decoded, requests: Sequence[FrameRequest], limits: DecodeLimits
) -> None:
    """Fill in the one frame of a picture file."""
    with open_picture(path, decoded.facts.container) as picture:
        if picture.width * picture.height > limits.max_picture_px:
            reason = too_large(picture.width, picture.height, limits)
            decoded.video_outcome = StreamOutcome("failed", f"{path}: picture: {reason}")
            return
        try:
            rgb = picture_rgb(picture)
        except PICTURE_ERRORS as error:
            reason = f"{path}: picture: does not decode ({words(error)})"
            decoded.video_outcome = StreamOutcome("failed", reason)
            return
    decoded.choices = _choose(requests, [0.0])
    decoded.n_frames = 1
    decoded.frames = {0: rgb}
    decoded.decoder, decoded.decoder_reason = "pillow", "a picture file"
    decoded.video_outcome = StreamOutcome("ok")
