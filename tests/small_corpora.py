"""Manifests that tests build by hand, with few words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache.clip import Clip, Record
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, write_manifest

EMOTIONS = ("happy", "sad", "neutral")


def digest(content: str) -> str:
    """Return the digest that a media file with this content has."""
    return hashlib.sha256(content.encode()).hexdigest()


def record(uid: str, split: str | None = "train", clip: str | None = "", **fields: Any) -> Record:
    """Return a record; `clip` is the content of its media file, "" one of its own, None unknown."""
    facts = {k: fields.pop(k) for k in ("duration_s", "has_video", "has_audio") if k in fields}
    seen = None
    if clip is not None:
        seen = Clip(sha256=digest(clip or uid), n_bytes=10, **facts)
    name = uid.partition("/")[2]
    return Record(uid=uid, media=f"{name}.mp4", clip=seen, split=split, **fields)


def header(*corpora: str, **spaces: tuple[str, ...]) -> Header:
    """Return a header in which these corpora have the same label spaces; emotions unless given."""
    fields = spaces or {"emotion": EMOTIONS}
    return Header(
        media_root="media",
        label_spaces={
            f"{corpus}/{field}": LabelSpace(name=f"{corpus}/{field}", labels=labels)
            for corpus in corpora
            for field, labels in fields.items()
        },
    )


def write(path: Path, records: Iterable[Record], head: Header | None = None) -> Path:
    """Write a manifest of these records, with one label space for emotions unless given."""
    found = tuple(records)
    head = head or header(*sorted({r.corpus for r in found}))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(path, Manifest(header=head, records=found))
    return path
