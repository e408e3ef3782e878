"""One record of a manifest, without reading the others."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.clip import Record
from cache.columns import read_columns
from cache.errors import ManifestError, near_miss
from cache.manifest import SCHEMA, iter_records, plain_row, read_header
from cache.schema import decode

_NEIGHBOURS = 200
"""Uids beside the one asked for that are looked at for a near miss; all 130,000 would take seconds."""


def find_record(path: Path, uid: str) -> Record:
    """Return a record by its uid.

    Raises:
        ManifestError: Not a manifest, or no such record, with a near miss.
        SchemaError: The record is not valid.
    """
    header = read_header(path)
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if "label" in names:  # of schema 1
            found = next((record for record in iter_records(path) if record.uid == uid), None)
            if found is not None:
                return found
        else:
            known = [name for name in SCHEMA.names if name in names]
            for group in range(file.num_row_groups):
                place = pc.index(file.read_row_group(group, columns=["uid"])["uid"], uid).as_py()
                if place >= 0:
                    row = file.read_row_group(group, columns=known).slice(place, 1).to_pylist()[0]
                    record = decode(Record, plain_row(row), f"{path} (uid {uid!r})")
                    try:
                        header.check(record)
                    except ValueError as error:
                        raise ManifestError(f"{path}: {error}") from None
                    return record
    uids = read_columns(path, ["uid"])["uid"].to_pylist()
    raise ManifestError(
        f"{path}: no record {uid!r} among {len(uids):,}.{near_miss(uid, _alike(uids, uid))} A uid is "
        f"CORPUS/ID; the corpora here are {', '.join(_corpora(uids)) or 'none'}."
    )


def any_uid(path: Path, seed: int) -> str:
    """Return the uid of a record that a seed chooses, whatever the order of the records.

    Raises:
        ManifestError: Not a manifest, or an empty one.
    """
    uids = read_columns(path, ["uid"])["uid"].to_pylist()
    if not uids:
        raise ManifestError(f"{path}: holds no records.")
    found: str = min(uids, key=lambda uid: hashlib.sha256(f"{seed}:{uid}".encode()).digest())
    return found


def _corpora(uids: Sequence[str]) -> list[str]:
    return sorted({uid.partition("/")[0] for uid in uids})


def _alike(uids: Sequence[str], uid: str) -> list[str]:
    """Return uids that begin alike, and those that end alike, so that any one slip is found."""
    found: dict[str, None] = {}
    for turn in (1, -1):
        ordered = sorted(name[::turn] for name in uids)
        place = bisect.bisect(ordered, uid[::turn])
        near = ordered[max(0, place - _NEIGHBOURS // 2) : place + _NEIGHBOURS // 2]
        found |= dict.fromkeys(name[::turn] for name in near)
    return list(found)
