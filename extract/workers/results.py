"""From what decoding and an encoder gave to what the store keeps of a clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cache.clip import Record
from cache.commit import ClipTokens, Status
from cache.encoders import SoundEncoder
from cache.spec import TokenSpec
from cache.writer import is_storable
from extract.encoders.bank import EncoderBank, EncoderInput
from extract.faces import FaceSource, finder_of
from extract.failures import Failure
from extract.inputs import ClipInputs, StreamInput, prepare_inputs, request_of


def failed(spec: TokenSpec, record: Record, failure: Failure) -> ClipTokens:
    """Return what is kept of a clip that has no tokens."""
    return ClipTokens(record.token_key(spec), Status.FAILED, reason=failure.reason)


def unencoded(spec: TokenSpec, record: Record, stream: StreamInput) -> ClipTokens | None:
    """Return what is kept of a stream that is absent or failed; None if it is to be encoded."""
    if stream.failure is not None:
        return failed(spec, record, stream.failure)
    if stream.status == "absent":
        return ClipTokens(record.token_key(spec), Status.ABSENT, reason=stream.remark)
    return None


def encoder_input(inputs: ClipInputs, stream: StreamInput) -> EncoderInput:
    """Return what the encoder gets of a stream that is ok."""
    assert stream.array is not None
    return EncoderInput(inputs.arrays[stream.array], stream.pick)


def encoded(
    spec: TokenSpec,
    record: Record,
    stream: StreamInput,
    tokens: npt.NDArray[np.float32] | Failure,
    *,
    is_cut: bool,
) -> ClipTokens:
    """Return what is kept of an encoder's answer; NaN and infinity are a failure."""
    if isinstance(tokens, Failure):
        return failed(spec, record, tokens)
    if not is_storable(tokens, spec):
        why = f"the {spec.stream} encoder gave NaN or infinity as {spec.dtype}"
        return failed(spec, record, Failure("numeric", why))
    return ClipTokens(
        record.token_key(spec),
        Status.OK,
        tokens,
        remark=stream.remark,
        truncated=is_cut,
        frame_index=stream.index,
        frame_pts_s=stream.pts_s,
    )


def is_cut(spec: TokenSpec, inputs: ClipInputs) -> bool:
    """True if a clip's sound is longer than what its encoder hears."""
    encoder, duration_s = spec.encoder, inputs.audio_duration_s
    if not isinstance(encoder, SoundEncoder) or duration_s is None:
        return False
    return duration_s > encoder.window_s


def encode_clip(
    record: Record,
    path: Path,
    specs: Sequence[TokenSpec],
    bank: EncoderBank,
    faces: FaceSource | None = None,
) -> list[ClipTokens]:
    """Decode one clip here and now, and encode it under each spec.

    For looking at single clips. Extraction decodes in processes of their own, and in batches.

    Args:
        record: Whose clip it is.
        path: Its media file.
        specs: Some of the bank's.
        bank: The encoders.
        faces: Where faces are, for specs that crop them.
    """
    requests = [request_of(spec, record) for spec in specs]
    finder = None if faces is None else finder_of(faces.of(record))
    inputs = prepare_inputs(path, record.sha256, record.media, requests, faces=finder)
    return encode_inputs(record, inputs, specs, bank)


def encode_inputs(
    record: Record, inputs: ClipInputs, specs: Sequence[TokenSpec], bank: EncoderBank
) -> list[ClipTokens]:
    """Encode one decoded clip under each spec.

    Args:
        record: Whose clip it is.
        inputs: Answers to `request_of` each spec, in their order; more behind them are not looked at.
        specs: Some of the bank's.
        bank: The encoders.
    """
    clips = []
    for spec, stream in zip(specs, inputs.streams, strict=False):
        clip = unencoded(spec, record, stream)
        if clip is None:
            (tokens,) = bank.encode(spec, [encoder_input(inputs, stream)])
            clip = encoded(spec, record, stream, tokens, is_cut=is_cut(spec, inputs))
        clips.append(clip)
    return clips
