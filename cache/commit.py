"""Commit records: the create-once JSON documents that make a unit's clips visible."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import crc32c
import numpy.typing as npt
from pydantic import Field, ValidationError

from cache.clip import SHA256_PATTERN
from cache.errors import SchemaError
from cache.layout import commits
from cache.quantize import Quantized
from cache.schema import Model, decode_json
from cache.storage import Storage

_CHECKSUM = re.compile(rb',"checksum":"([0-9a-f]{8})"}$')
"""Last field of a record: CRC-32C of its bytes without this field. Written by hand, it may be left out."""


class Status(StrEnum):
    """What a store knows of one clip under one spec. Zeros never mean any of these."""

    OK = "ok"
    ABSENT = "absent"
    """The clip has no such stream, or nothing in it of what the spec encodes: a face."""
    FAILED = "failed"
    """The stream is there but could not be encoded; the entry holds the reason."""

    @property
    def code(self) -> int:
        """The number in the Zarr array `status`."""
        return {"ok": 0, "absent": 1, "failed": 2}[self.value]


@dataclass(frozen=True)
class ClipTokens:
    """One encoder's output for one clip, ready to be committed."""

    key: str
    """Token key of the record: 64 hexadecimal digits."""
    status: Status
    tokens: npt.NDArray[Any] | Quantized | None = None
    """Audio (T, D), video (F, P, D), image (1 + P, D), floats or, for an int8 spec, quantised already;
    None unless the status is ok."""
    reason: str | None = None
    """Why it failed; why it is absent, if there is more to say than that the clip has no such stream."""
    remark: str | None = None
    """Damage in the media that decoding passed over although the stream is ok."""
    truncated: bool = False
    """The clip is longer than the encoder's window; only its beginning was encoded."""
    frame_index: tuple[int, ...] = ()
    """Which decoded frames were encoded (video, image)."""
    frame_pts_s: tuple[float, ...] = ()
    """Their presentation times in seconds."""


class Entry(Model):
    """What a commit record says of one clip."""

    key: str = Field(pattern=SHA256_PATTERN)
    row: int = Field(ge=0)
    """Row in every array of the spec's group."""
    status: Status
    valid_len: int = Field(ge=0)
    """Valid entries of the token axis; 0 unless the status is ok."""
    crc32c: int | None = None
    """CRC-32C of the valid tokens' little-endian bytes; None unless the status is ok."""
    reason: str | None = None
    """Why the stream failed, or why it is absent although the clip has it."""
    remark: str | None = None
    """Damage that decoding passed over."""
    truncated: bool = False
    """Only the beginning was encoded."""


class Commit(Model):
    """One unit's commit: written last, created once."""

    schema_version: Literal[1] = 1
    unit_id: str = Field(pattern=r"^[A-Za-z0-9_-]{1,24}$")
    spec_id: str
    shard: int = Field(ge=0)
    created: str
    """UTC, ISO 8601. For people; nothing is decided by a clock."""
    provenance: dict[str, str]
    """Library versions and device that made the tokens."""
    n_bytes: int = Field(ge=0)
    """Size of the unit's files."""
    clips: tuple[Entry, ...]
    replaces: tuple[str, ...] = ()
    """Units whose clips this one took over (compaction): they no longer count."""
    abandoned: bool = False
    """Garbage collection closed this unit, whose writer was taken for dead: it holds no clips and
    can no longer be committed, so that what its writer left can be removed safely."""

    def count(self, status: Status) -> int:
        """Number of clips with this status."""
        return sum(entry.status is status for entry in self.clips)


def unit_id(spec_id: str, keys: Iterable[str], after: Iterable[str] = ()) -> str:
    """Return the identity of a unit: the same work has the same id on every worker.

    Args:
        spec_id: What the clips are encoded under.
        keys: Token keys of the unit.
        after: Units that recorded some of these clips as failed and that this one retries.
    """
    parts = [spec_id, *sorted(keys), *sorted(after)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def commit_key(spec_id: str, identity: str) -> str:
    """Return the key of a unit's commit record."""
    return f"{commits(spec_id)}/{identity}.json"


def write_commit(storage: Storage, commit: Commit) -> bool:
    """Create a commit record; return False if the unit is committed already."""
    data = commit.model_dump_json(exclude_defaults=True).encode()
    data = data[:-1] + b',"checksum":"%08x"}' % crc32c.crc32c(data)
    return storage.create(commit_key(commit.spec_id, commit.unit_id), data)


def read_commit(storage: Storage, spec_id: str, identity: str) -> Commit:
    """Read one commit record.

    Raises:
        FileNotFoundError: There is none.
        SchemaError: The file is damaged or of another format.
    """
    key = commit_key(spec_id, identity)
    data = storage.read(key)
    stated = _CHECKSUM.search(data)
    if stated is not None:
        data = data[: stated.start()] + b"}"
        if int(stated[1], 16) != crc32c.crc32c(data):
            raise SchemaError(
                f"{storage.url}/{key}: the commit record fails its checksum. Restore the file from a "
                "copy of the store."
            )
    try:
        found = Commit.model_validate_json(data)
    except ValidationError:
        found = decode_json(Commit, data, f"{storage.url}/{key}")  # the same, with a better message
    if found.unit_id != identity or found.spec_id != spec_id:
        raise SchemaError(
            f"{storage.url}/{key}: is the record of unit {found.unit_id} under {found.spec_id}. "
            "The file was renamed or moved; restore it from a copy of the store."
        )
    return found


def unit_ids(storage: Storage, spec_id: str) -> list[str]:
    """Return the ids of all committed or abandoned units of a spec, sorted."""
    names = storage.names(commits(spec_id))
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))
