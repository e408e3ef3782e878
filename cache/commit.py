"""Commit records: the create-once JSON documents that make a unit's clips visible."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cache.clip import SHA256_PATTERN
from cache.files import create_once
from cache.schema import Model, decode_json


class Status(StrEnum):
    """What a store knows of one clip under one spec. Zeros never mean any of these."""

    OK = "ok"
    ABSENT = "absent"
    """The clip has no such stream."""
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
    tokens: npt.NDArray[np.floating[Any]] | None = None
    """Audio (T, D), video (F, P, D), image (1 + P, D); None unless the status is ok."""
    reason: str | None = None
    """Why it failed; None otherwise."""
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
    """Why the stream failed."""
    remark: str | None = None
    """Damage that decoding passed over."""
    truncated: bool = False
    """Only the beginning was encoded."""


class Commit(Model):
    """One unit's commit: written last, created once."""

    schema_version: Literal[1] = 1
    unit_id: str
    spec_id: str
    shard: int = Field(ge=0)
    created: str
    """UTC, ISO 8601. For people; nothing is decided by a clock."""
    provenance: dict[str, str]
    """Library versions and device that made the tokens."""
    n_bytes: int = Field(ge=0)
    """Size of the unit's files."""
    clips: tuple[Entry, ...]

    def count(self, status: Status) -> int:
        """Number of clips with this status."""
        return sum(entry.status is status for entry in self.clips)


class Index:
    """All committed entries of one spec.

    A clip may stand in several units: two runs that overlapped, or a retry. The first unit that
    holds it with a final status counts; `failed` counts only while nothing better is known.
    """

    def __init__(self, commits: Iterable[Commit] = ()) -> None:
        """Index commits in the given order."""
        self.commits: list[Commit] = []
        self.entries: dict[str, Entry] = {}
        """Token key -> the entry that counts."""
        self.superseded: dict[str, set[str]] = {}
        """Token key -> ids of the units that recorded it as failed."""
        for commit in commits:
            self.add(commit)

    def add(self, commit: Commit) -> None:
        """Take in one more commit."""
        self.commits.append(commit)
        for entry in commit.clips:
            if entry.status is Status.FAILED:
                self.superseded.setdefault(entry.key, set()).add(commit.unit_id)
            known = self.entries.get(entry.key)
            if known is None or (
                known.status is Status.FAILED and entry.status is not Status.FAILED
            ):
                self.entries[entry.key] = entry


def unit_id(spec_id: str, keys: Iterable[str], after: Iterable[str] = ()) -> str:
    """Return the identity of a unit: the same work has the same id on every worker.

    Args:
        spec_id: What the clips are encoded under.
        keys: Token keys of the unit.
        after: Units that recorded some of these clips as failed and that this one retries.
    """
    parts = [spec_id, *sorted(keys), *sorted(after)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def write_commit(folder: Path, commit: Commit) -> bool:
    """Create a commit record; return False if the unit is committed already."""
    folder.mkdir(parents=True, exist_ok=True)
    data = commit.model_dump_json(exclude_none=True).encode()
    return create_once(folder / f"{commit.unit_id}.json", data)


def read_commit(path: Path) -> Commit:
    """Read one commit record.

    Raises:
        SchemaError: The file is damaged or of another format.
    """
    return decode_json(Commit, path.read_bytes(), str(path))


def read_index(folder: Path) -> Index:
    """Read every commit record of a spec, in the order of their names."""
    if not folder.is_dir():
        return Index()
    return Index(read_commit(path) for path in sorted(folder.glob("*.json")))
