"""`ClipInputs` from one process to another: a JSON document, then the arrays as they lie in memory.

The reader does not trust the writer: hostile media are decoded there. Nothing is unpickled, and every
size is checked before memory is taken for it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any, BinaryIO, Literal, Protocol

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cache.errors import SchemaError
from cache.schema import Model, describe
from extract.inputs import ClipInputs, InputRequest, StreamInput

MAX_DOCUMENT_BYTES = 16 * 2**20
"""Largest JSON document that is read from another process."""
MAX_ARRAYS_BYTES = 2 * 2**30
"""Most bytes of arrays that are read for one clip."""

_DOCUMENT = struct.Struct("<4sI")
_MAGIC = b"EMOD"
_FACTS = TypeAdapter(dict[str, Any])


class Readable(Protocol):
    """What is read from: a binary file, or a pipe that somebody watches."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read some bytes; return how many, 0 at the end."""


class _ArrayHeader(Model):
    dtype: Literal["float32", "uint8"]
    shape: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1, max_length=4)

    @property
    def stored(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def n_bytes(self) -> int:
        n_bytes = self.stored.itemsize
        for side in self.shape:  # whole numbers of Python: a hostile shape cannot overflow
            n_bytes *= side
        return n_bytes


class _Header(Model):
    """The document ahead of the arrays."""

    model_config = ConfigDict(allow_inf_nan=False)

    streams: tuple[StreamInput, ...]
    arrays: tuple[_ArrayHeader, ...]
    audio_duration_s: float | None
    decode_cpu_s: float
    decoder: str | None
    facts: dict[str, Any]


def write_document(file: BinaryIO, document: bytes) -> None:
    """Write a JSON document behind its magic and its length."""
    file.write(_DOCUMENT.pack(_MAGIC, len(document)))
    file.write(document)


def read_document(file: Readable) -> bytes:
    """Read a document that `write_document` wrote; what it says is not checked.

    Raises:
        SchemaError: No document stands here, or it is larger than `MAX_DOCUMENT_BYTES`.
        EOFError: The file ends too early.
    """
    head = bytearray(_DOCUMENT.size)
    _read_exactly(file, memoryview(head))
    magic, n_bytes = _DOCUMENT.unpack(head)
    if magic != _MAGIC:
        raise SchemaError(f"the answer starts with {bytes(head)!r}, {_MAGIC!r} is needed")
    if n_bytes > MAX_DOCUMENT_BYTES:
        raise SchemaError(
            f"the answer's document has {n_bytes} bytes, at most {MAX_DOCUMENT_BYTES} are allowed"
        )
    document = bytearray(n_bytes)
    _read_exactly(file, memoryview(document))
    return bytes(document)


def read_facts(file: Readable) -> dict[str, Any]:
    """Read a document of facts about a container; errors as in `read_document`."""
    try:
        return _FACTS.validate_json(read_document(file))
    except ValidationError as error:
        raise SchemaError("the facts of the container do not decode") from error


def write_inputs(file: BinaryIO, inputs: ClipInputs) -> None:
    """Write a clip's inputs: a JSON document, then the arrays' little-endian bytes."""
    arrays = [np.ascontiguousarray(array, array.dtype.newbyteorder("<")) for array in inputs.arrays]
    header = _Header(
        streams=tuple(inputs.streams),
        arrays=tuple(_ArrayHeader(dtype=a.dtype.name, shape=a.shape) for a in arrays),
        audio_duration_s=inputs.audio_duration_s,
        decode_cpu_s=inputs.decode_cpu_s,
        decoder=inputs.decoder,
        facts=inputs.facts,
    )
    write_document(file, header.model_dump_json().encode())
    for array in arrays:
        file.write(array.data.cast("B"))


def read_inputs(file: Readable, requests: Sequence[InputRequest]) -> ClipInputs:
    """Read what `write_inputs` wrote. The writer is not trusted: a decoder may have gone wild in it.

    Args:
        file: Where the answer stands.
        requests: What was asked for; the answer must fit.

    Raises:
        SchemaError: It is no answer, one beyond the bounds, or one to other requests.
        EOFError: The file ends too early.
    """
    try:
        header = _Header.model_validate_json(read_document(file))
    except ValidationError as error:
        raise SchemaError(f"the answer does not decode: {describe(_Header, error)}") from None
    _check_answer(header, requests)
    arrays = []
    for described in header.arrays:
        array = np.empty(described.shape, described.stored)
        _read_exactly(file, array.data.cast("B"))
        arrays.append(array)
    return ClipInputs(
        list(header.streams),
        arrays,
        header.audio_duration_s,
        header.decode_cpu_s,
        header.decoder,
        header.facts,
    )


def _read_exactly(file: Readable, buffer: memoryview) -> None:
    done = 0
    while done < len(buffer):
        n_bytes = file.readinto(buffer[done:])
        if not n_bytes:
            raise EOFError(f"the answer breaks off: {len(buffer) - done} more bytes are needed")
        done += n_bytes


def _check_answer(header: _Header, requests: Sequence[InputRequest]) -> None:
    n_bytes = sum(array.n_bytes for array in header.arrays)
    if n_bytes > MAX_ARRAYS_BYTES:
        raise SchemaError(
            f"the answer's arrays have {n_bytes} bytes, at most {MAX_ARRAYS_BYTES} are allowed"
        )
    if len(header.streams) != len(requests):
        raise SchemaError(f"{len(requests)} streams were requested, {len(header.streams)} answered")
    for number, (stream, request) in enumerate(zip(header.streams, requests, strict=True)):
        if not _fits(stream, request, header.arrays):
            raise SchemaError(
                f"stream {number} of the answer contradicts itself, its arrays "
                f"({', '.join(f'{a.dtype} {a.shape}' for a in header.arrays)}) or its request"
            )


def _fits(stream: StreamInput, request: InputRequest, arrays: Sequence[_ArrayHeader]) -> bool:
    """True if an answer is one to this request, and whole."""
    if stream.status != "ok":
        wants_failure = stream.status == "failed"
        return stream.array is None and (stream.failure is not None) == wants_failure
    if stream.failure is not None or stream.array is None or not 0 <= stream.array < len(arrays):
        return False
    array = arrays[stream.array]
    if request.stream == "audio":
        return array.dtype == "float32" and len(array.shape) == 1
    n_rows = len(set(stream.index))
    return (
        array.dtype == "uint8"
        and array.shape == (n_rows, request.size_px, request.size_px, 3)
        and len(stream.index) == len(stream.pts_s) == len(stream.pick) == request.n_frames
        and min(stream.index) >= 0
        and set(stream.pick) == set(range(n_rows))
    )
