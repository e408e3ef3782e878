"""Files of small datasets, and the records that must come of them, as plain data."""

from __future__ import annotations

import csv
import functools
import io
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import numpy as np

from tests.media import write

Records = list[dict[str, Any]]


@functools.cache
def tiny_video() -> bytes:
    """Return the bytes of a real video of two pictures."""
    with TemporaryDirectory() as folder:
        return write(Path(folder) / "v.mp4", n=2).read_bytes()


@functools.cache
def tiny_sound() -> bytes:
    """Return the bytes of a real sound file of 10 ms."""
    memory = io.BytesIO()
    with wave.open(memory, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(320))
    return memory.getvalue()


def put(folder: Path, name: str, data: str | bytes) -> None:
    """Write a file below the folder."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)


def put_media(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the media file of each record."""
    for record in records:
        is_sound = record["media"].endswith(".wav")
        put(folder, record["media"], tiny_sound() if is_sound else tiny_video())


def table(rows: Sequence[Sequence[object]], delimiter: str = ",") -> str:
    """Return a CSV of rows, the first of which is the header."""
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()


def csd(path: Path, root: str, data: Mapping[str, tuple[Any, Any]]) -> None:
    """Write a computational sequence as the SDK does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        group = file.create_group(root)
        for video, (features, intervals) in data.items():
            inner = group.create_group(f"data/{video}")
            inner.create_dataset("features", data=np.asarray(features), compression="gzip")
            inner.create_dataset("intervals", data=np.asarray(intervals, np.float32))
        for key, value in {"root name": root, "version": "1.0"}.items():
            inner = group.create_dataset(f"metadata/{key}", (1,), dtype=h5py.string_dtype())
            inner[0] = json.dumps(value)


def data_of(
    uid: str, media: str, split: str | None, native: str | None, **rest: Any
) -> dict[str, Any]:
    found = {"uid": uid, "media": media, "split": split, "split_native": native, **rest}
    return {key: value for key, value in found.items() if value is not None}
