"""Tables that OpenFace 2.x writes, whatever is wanted of them: whose they are, and the face in them.

One row per frame, or with FaceLandmarkVidMulti one per frame and face: `frame` (from 1), `face_id`,
`timestamp`, `confidence`, `success`, then what OpenFace was asked for: action units (`-aus`), landmarks
in pixels (`-2Dfp`) and more. Who reads a table names the columns and says what a row becomes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Generic, TypeAlias, TypeVar

from cache.clip import Record
from cache.errors import SchemaError, near_miss

T = TypeVar("T")

_NEEDED = ("frame", "timestamp", "confidence", "success")


@dataclass(frozen=True)
class TableRow:
    """One face in one frame, where OpenFace found it."""

    index: int
    """Number of the frame, counted from 0; OpenFace counts from 1."""
    confidence: float
    """How sure it is of the face, 0 to 1."""
    cells: Sequence[str]
    place: dict[str, int]
    """Column -> number of its cell."""
    where: str
    """File and line, for messages."""

    def number(self, column: str) -> float:
        """Return what a cell holds; SchemaError unless it is a finite number."""
        return _number(self.cells[self.place[column]], column, self.where)


ReadRow: TypeAlias = Callable[[TableRow], T]
"""What a row becomes; SchemaError of a damaged one."""


@dataclass(frozen=True)
class FaceRows(Generic[T]):
    """The face of a table that counts in most frames."""

    frames: tuple[T, ...]
    """Of the frames in which it was found, in order."""
    n_frames: int
    """Frames that OpenFace looked at, with and without a face."""
    face: int | None
    """Its `face_id`; None if no face was found in any frame."""
    n_faces: int
    """Faces that there were to choose from."""


def read_face(
    path: Path,
    missing: Callable[[Sequence[str]], Sequence[str]],
    reader: Callable[[dict[str, int]], ReadRow[T]],
    *,
    flag: str,
    min_confidence: float = 0.0,
) -> FaceRows[T]:
    """Read a table, and choose one face of it.

    Frames without success, or with less confidence than asked for, do not count. Of several faces the
    one that counts in most frames is taken, of equals the one with the higher mean confidence, of those
    the one with the lowest number.

    Args:
        path: The CSV file.
        missing: Names of columns -> those that the reader needs and that are not among them.
        reader: Column -> number of its cell -> what makes something of a row.
        flag: Option of OpenFace's programs that writes these columns, for messages.
        min_confidence: 0 to 1; 0 leaves the decision to OpenFace's own `success`.

    Raises:
        SchemaError: Not such a table, a damaged one, or one without any frame.
    """
    faces: dict[int, _Face[T]] = {}
    n_frames = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True)
            place = _columns(next(rows, []), missing, flag, path)
            read = reader(place)
            for cells in rows:
                if cells:  # not the blank line that an editor may leave
                    where = f"{path}, line {rows.line_num}"
                    number = _add(cells, place, read, faces, min_confidence, where)
                    n_frames = max(n_frames, number)
    except OSError as error:
        raise SchemaError(
            f"{path}: the OpenFace table cannot be read ({error.strerror or error}). Check the path."
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise SchemaError(
            f"{path}: not a CSV file ({error}). Give a table that OpenFace 2.x wrote."
        ) from None
    if not n_frames:
        raise SchemaError(
            f"{path}: the table holds no frames, at least one row is needed. OpenFace was stopped, or "
            "the file was cut; run it again for this clip."
        )
    number, face = min(
        faces.items(), key=lambda item: (-item[1].rank[0], -item[1].rank[1], item[0])
    )
    return FaceRows(
        frames=tuple(face.frames),
        n_frames=n_frames,
        face=number if face.frames else None,
        n_faces=sum(bool(f.frames) for f in faces.values()),
    )


@dataclass
class _Face(Generic[T]):
    """One face while a table is read."""

    frames: list[T] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    latest: int = 0

    @property
    def rank(self) -> tuple[int, float]:
        """Frames in which it was found, then how sure OpenFace was of it."""
        n = len(self.confidences)
        return n, math.fsum(self.confidences) / n if n else 0.0


def _columns(
    header: Sequence[str],
    missing: Callable[[Sequence[str]], Sequence[str]],
    flag: str,
    path: Path,
) -> dict[str, int]:
    names = [name.strip() for name in header]
    place = {name: number for number, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for number, name in enumerate(names) if place[name] != number)
        raise SchemaError(f"{path}: column {twice!r} is there twice; the file was put together.")
    lacking = [name for name in _NEEDED if name not in place] or list(missing(names))
    if lacking:
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        found = f"{', '.join(names[:6])}, ..." if len(names) > 6 else ", ".join(names) or "nothing"
        raise SchemaError(
            f"{path}: column {lacking[0]!r}{others} is missing (found {found})."
            f"{near_miss(lacking[0], names)} "
            f"Give a table that OpenFace 2.x's FeatureExtraction wrote with {flag}."
        )
    return place


def _add(
    cells: Sequence[str],
    place: dict[str, int],
    read: ReadRow[T],
    faces: dict[int, _Face[T]],
    min_confidence: float,
    where: str,
) -> int:
    """Note one row; return the number of its frame, from 1."""
    if len(cells) != len(place):
        raise SchemaError(
            f"{where}: {len(cells)} cells, the header has {len(place)}. The table is cut off or damaged; "
            "run OpenFace again for this clip."
        )
    number = _whole(cells[place["frame"]], "frame", 1, where)
    face_id = _whole(cells[place["face_id"]], "face_id", 0, where) if "face_id" in place else 0
    face = faces.setdefault(face_id, _Face())
    if number <= face.latest:
        raise SchemaError(
            f"{where}: frame {number} of face {face_id} comes after frame {face.latest}; frames must be "
            "in order, each once. Was the table put together from several clips?"
        )
    face.latest = number
    confidence = _number(cells[place["confidence"]], "confidence", where)
    is_found = _whole(cells[place["success"]], "success", 0, where) == 1
    if is_found and confidence >= min_confidence:
        face.frames.append(read(TableRow(number - 1, confidence, cells, place, where)))
        face.confidences.append(confidence)
    return number


def _number(cell: str, column: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SchemaError(
            f"{where}: {column} is {cell.strip()[:40]!r}, a number is needed. The table is damaged; run "
            "OpenFace again for this clip."
        )
    return value


def _whole(cell: str, column: str, least: int, where: str) -> int:
    value = _number(cell, column, where)
    if value != int(value) or value < least:
        raise SchemaError(
            f"{where}: {column} is {cell.strip()[:40]!r}, a whole number from {least} on is needed."
        )
    return int(value)


# ---- whose table it is ------------------------------------------------------------------------------


def table_names(record: Record) -> list[str]:
    """Return the names that a record's table may have below a folder, the first that is there counts.

    `<source id>.csv`, `<media path without its ending>.csv`, `<media file name without its ending>.csv`;
    the source id is the uid without its corpus.
    """
    source_id = record.uid.partition("/")[2] or record.uid
    media = PurePosixPath(record.media)
    # Not with_suffix: a source id may hold a full stop.
    names = [f"{source_id}.csv", f"{media.with_suffix('')}.csv", f"{media.stem}.csv"]
    return list(dict.fromkeys(names))


def find_table(folder: Path, record: Record) -> Path | None:
    """Return a record's table below a folder; None without one."""
    for name in table_names(record):
        table = folder / name
        if table.is_file() and table.resolve().is_relative_to(folder.resolve()):
            return table
    return None


def shared_table(table: Path, record: Record, other_media: str) -> SchemaError:
    """Word the refusal of a table that two media files would take."""
    return SchemaError(
        f"{record.uid}: {table} is the table of {other_media!r} and of {record.media!r}. Name the "
        f"tables by source id ({table_names(record)[0]}) or in folders like the media."
    )
