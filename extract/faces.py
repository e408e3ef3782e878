"""Faces: where they are in a clip's frames, the square around one, and who says so.

    source = face_source(specs, "tables/")            # or "my_module:MyDetector"
    order = source.of(record)                         # what a decoder is told of one clip
    track = finder_of(order).find(frames, n_frames)   # FaceTrack; FacesFailed says why not

Boxes come from tables that OpenFace wrote, or from a detector of one's own that sees the chosen frames.
Both are read where clips are decoded, so that a broken table or detector costs its clip alone.
"""

from __future__ import annotations

import importlib
import logging
import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from cache.clip import Record
from cache.errors import EmocacheError, SchemaError, near_miss
from cache.schema import Model
from cache.spec import TokenSpec
from extract.openface_tables import (
    ReadRow,
    TableRow,
    find_table,
    read_face,
    shared_table,
    table_names,
)

logger = logging.getLogger(__name__)

Picture = npt.NDArray[np.uint8]
"""A frame, (H, W, 3) uint8 RGB as displayed."""

OPENFACE = "openface"
"""`FaceCrop.by` of boxes around OpenFace's landmarks, where its tables are given no name of their own."""
_N_LANDMARKS = 68
_X, _Y = ([f"{axis}_{n}" for n in range(_N_LANDMARKS)] for axis in "xy")


class FacesFailed(EmocacheError):
    """Nobody can say where the face of one clip is."""


class FaceBox(NamedTuple):
    """A rectangle around a face, in pixels of the displayed picture."""

    left: float
    top: float
    right: float
    bottom: float


class Square(NamedTuple):
    """A square part of a picture, in whole pixels."""

    left: int
    top: int
    side: int

    def cut(self, picture: Picture) -> Picture:
        """Return this part of a picture, (side, side, 3)."""
        return picture[self.top : self.top + self.side, self.left : self.left + self.side]


def square_around(box: FaceBox, margin: float, width_px: int, height_px: int) -> Square | None:
    """Return the square that is encoded: around the middle of a box, wholly within the picture.

    Its side is the box's longer edge and the margin on both sides of it, at most the picture's shorter
    edge. Where it would reach beyond the picture it is moved, not cut: the face keeps its aspect.

    Args:
        box: Around the face.
        margin: Share of the box's longer edge, see `FaceCrop.margin`.
        width_px: Of the picture.
        height_px: Of the picture.

    Returns:
        The square; None if the box lies outside the picture.
    """
    if box.right <= 0 or box.bottom <= 0 or box.left >= width_px or box.top >= height_px:
        return None
    wanted = max(box.right - box.left, box.bottom - box.top) * (1 + 2 * margin)
    side = max(1, min(_rounded(wanted), width_px, height_px))
    left = _rounded((box.left + box.right - side) / 2)
    top = _rounded((box.top + box.bottom - side) / 2)
    return Square(min(max(left, 0), width_px - side), min(max(top, 0), height_px - side), side)


def _rounded(value: float) -> int:
    return math.floor(value + 0.5)


@dataclass(frozen=True)
class FaceTrack:
    """The boxes of one face over a clip."""

    indices: tuple[int, ...]
    """Frames in which it was found, ascending; empty if it was found in none."""
    boxes: tuple[FaceBox, ...]
    """Of these frames."""
    n_frames: int
    """Frames that were looked at."""

    def nearest(self, index: int) -> FaceBox:
        """Return the box of a frame, or of the nearest one that has a face; of two, the earlier's."""
        at = bisect_left(self.indices, index)
        beside = [place for place in (at - 1, at) if 0 <= place < len(self.indices)]
        return self.boxes[min(beside, key=lambda place: abs(self.indices[place] - index))]

    def squares(
        self, frames: Mapping[int, Picture], indices: Iterable[int], margin: float
    ) -> list[Square]:
        """Return which part of each of some frames is encoded.

        Raises:
            FacesFailed: A box lies outside its picture.
        """
        found = []
        for index in indices:
            height_px, width_px = frames[index].shape[:2]
            square = square_around(self.nearest(index), margin, width_px, height_px)
            if square is None:
                box = ", ".join(f"{edge:.0f}" for edge in self.nearest(index))
                raise FacesFailed(
                    f"the face of frame {index} is at ({box}), outside the picture of {width_px} x "
                    f"{height_px} pixels; were the boxes found in another copy of the clip?"
                )
            found.append(square)
        return found


# ---- who finds faces --------------------------------------------------------------------------------


class FaceFinder(Protocol):
    """Says where the face of one clip is."""

    def find(self, frames: Mapping[int, Picture], n_frames: int) -> FaceTrack:
        """Return the track of the face.

        Args:
            frames: The frames that are to be cropped, by index.
            n_frames: Frames that the clip has.

        Raises:
            FacesFailed: It cannot be said; the text is the reason.
        """


@runtime_checkable
class BoxDetector(Protocol):
    """Finds one face in each of some pictures.

    Write one for another tool than OpenFace: a class with these two members, made without arguments. It
    runs in the processes that decode clips, one clip after the other.
    """

    @property
    def name(self) -> str:
        """What `FaceCrop.by` calls it. Give another version that finds other boxes another name."""

    def boxes(self, frames: Sequence[Picture]) -> Sequence[Sequence[float] | None]:
        """Return the box of the face in each picture.

        Args:
            frames: Chosen frames of one clip in their order, each (H, W, 3) uint8 RGB as displayed.

        Returns:
            For each picture left, top, right and bottom of the face in pixels, or None without a face.
            Of several faces the one that matters: the same person in all frames.
        """


class FaceOrder(Model):
    """What a decoder is told of one clip's faces."""

    table: str | None = None
    """Path of the clip's table of OpenFace's."""
    detector: str | None = None
    """`module:attribute` of a `BoxDetector`."""
    problem: str | None = None
    """Why there is neither."""


@dataclass(frozen=True)
class FromTable:
    """Boxes around OpenFace's landmarks, from the clip's own table."""

    table: Path

    def find(self, frames: Mapping[int, Picture], n_frames: int) -> FaceTrack:
        """See `FaceFinder.find`; the table speaks of all frames."""
        try:
            return read_track(self.table)
        except SchemaError as error:
            raise FacesFailed(str(error).replace(str(self.table), self.table.name)) from None


@dataclass(frozen=True)
class FromDetector:
    """Boxes by a detector, in the chosen frames alone."""

    detector: BoxDetector

    def find(self, frames: Mapping[int, Picture], n_frames: int) -> FaceTrack:
        """See `FaceFinder.find`."""
        indices = sorted(frames)
        name = type(self.detector).__name__
        try:
            found = list(self.detector.boxes([frames[index] for index in indices]))
        except MemoryError:
            raise
        except Exception as error:  # the per-clip boundary: recorded, never swallowed
            logger.warning("%s: unexpected %s", name, type(error).__name__, exc_info=True)
            raise FacesFailed(f"the detector {name}: {type(error).__name__}: {error}") from error
        if len(found) != len(indices):
            raise FacesFailed(
                f"the detector {name} gave {len(found)} boxes for {len(indices)} frames"
            )
        known = {
            i: _box(box, name) for i, box in zip(indices, found, strict=True) if box is not None
        }
        return FaceTrack(tuple(known), tuple(known.values()), len(indices))


@dataclass(frozen=True)
class FromNobody:
    """Boxes that nobody gave."""

    problem: str = (
        "nothing says where the face is: give --faces DIR (OpenFace's tables) or a detector"
    )

    def find(self, frames: Mapping[int, Picture], n_frames: int) -> FaceTrack:
        """See `FaceFinder.find`; always fails."""
        raise FacesFailed(self.problem)


def finder_of(order: FaceOrder | None, detector: BoxDetector | None = None) -> FaceFinder:
    """Return what finds the faces of one clip.

    Args:
        order: From `FaceSource.of`; None if nobody said where faces are.
        detector: The order's, if it is loaded already.
    """
    if order is None:
        return FromNobody()
    if order.table is not None:
        return FromTable(Path(order.table))
    if order.detector is not None:
        return FromDetector(detector or load_box_detector(order.detector))
    return FromNobody(order.problem or FromNobody.problem)


def _box(given: Sequence[float], name: str) -> FaceBox:
    try:
        box = FaceBox(*(float(edge) for edge in given))
    except (TypeError, ValueError):
        box = FaceBox(math.nan, 0, 0, 0)
    if not all(map(math.isfinite, box)) or box.right <= box.left or box.bottom <= box.top:
        raise FacesFailed(
            f"the detector {name} gave the box {given!r}; a box is left < right and top < bottom, in pixels"
        )
    return box


def read_track(table: Path) -> FaceTrack:
    """Return the boxes around OpenFace's 68 landmarks, of the face that counts in most frames.

    Raises:
        SchemaError: Not a table of OpenFace's with landmarks, or a damaged one.
    """
    found = read_face(table, _missing, _reader, flag="-2Dfp")
    return FaceTrack(
        tuple(index for index, _ in found.frames),
        tuple(box for _, box in found.frames),
        found.n_frames,
    )


def _missing(names: Sequence[str]) -> Sequence[str]:
    known = set(names)
    return [name for name in (*_X, *_Y) if name not in known]


def _reader(place: dict[str, int]) -> ReadRow[tuple[int, FaceBox]]:
    def read(row: TableRow) -> tuple[int, FaceBox]:
        xs, ys = [row.number(name) for name in _X], [row.number(name) for name in _Y]
        box = FaceBox(min(xs), min(ys), max(xs), max(ys))
        if box.right <= box.left or box.bottom <= box.top:
            raise SchemaError(
                f"{row.where}: the landmarks of the face are all on one line. The table is damaged; run "
                "OpenFace again for this clip."
            )
        return row.index, box

    return read


# ---- what an extraction is told ---------------------------------------------------------------------


@dataclass(frozen=True)
class FaceSource:
    """Where the faces of all clips come from: a folder of OpenFace's tables, or a detector."""

    name: str
    """What `FaceCrop.by` calls it."""
    folder: Path | None = None
    detector: str | None = None

    @property
    def given(self) -> str:
        """The same for the command line and for workers."""
        if self.folder is None:
            return str(self.detector)
        return str(self.folder) if self.name == OPENFACE else f"{self.name}={self.folder}"

    @property
    def title(self) -> str:
        """What the store keeps of it."""
        return self.folder.name if self.folder is not None else str(self.detector)

    def of(self, record: Record) -> FaceOrder:
        """Return what a decoder is told of a record's clip."""
        if self.folder is None:
            return FaceOrder(detector=self.detector)
        table = find_table(self.folder, record)
        if table is not None:
            return FaceOrder(table=str(table))
        names = ", ".join(table_names(record))
        return FaceOrder(
            problem=f"there is no table of its face in the folder {self.folder.name}; looked for {names}"
        )


def open_faces(given: str, *, load: bool = False) -> FaceSource:
    """Return where faces come from.

    Args:
        given: A folder of OpenFace's tables, `name=folder` of tables beside others, or `module:attribute`
            of a detector.
        load: Whether to load a detector, to learn its name; else it goes by what was given.

    Raises:
        SchemaError: No such folder, or no such detector.
    """
    folder = Path(given)
    if folder.is_dir():
        return FaceSource(OPENFACE, folder=folder.resolve())
    name, equals, named = given.partition("=")
    if equals and name and Path(named).is_dir():
        return FaceSource(name, folder=Path(named).resolve())
    module, colon, attribute = given.partition(":")
    if not colon or not module or not attribute or "/" in given:
        raise SchemaError(
            f"--faces {given}: no such folder. Give the folder of OpenFace's tables (one CSV file per clip, "
            "written with -2Dfp), NAME=DIR for tables with a name of their own, or a detector as "
            "module:attribute."
        )
    return FaceSource(load_box_detector(given).name if load else given, detector=given)


def face_source(specs: Iterable[TokenSpec], given: str | None) -> FaceSource | None:
    """Return where the faces come from that some specs crop; None if none of them does.

    Raises:
        SchemaError: Specs crop faces and nothing says where they are, or another finder than theirs does.
    """
    wanted = sorted({spec.crop.by for spec in specs if spec.crop is not None})
    if not wanted:
        return None
    if given is None:
        raise SchemaError(
            f"some tokens are of faces found by {' and '.join(map(repr, wanted))}, and nothing says where "
            "they are. Give --faces DIR, the folder of OpenFace's tables (one CSV file per clip, written "
            "with -2Dfp), or --faces MODULE:NAME, a detector of your own."
        )
    source = open_faces(given, load=True)
    if wanted != [source.name]:
        raise SchemaError(
            f"--faces {given}: gives faces found by {source.name!r}, the specs want those found by "
            f"{' and '.join(map(repr, wanted))}. Set crop.by of the specs to {source.name!r}, or give the "
            "source that they name (NAME=DIR names a folder of tables); several sources need an extraction "
            "each."
        )
    return source


def open_faces_for(specs: Iterable[TokenSpec], given: str | None) -> FaceSource | None:
    """Return where a worker's faces come from, checked before it was started; None if it needs none."""
    if given is None or all(spec.crop is None for spec in specs):
        return None
    return open_faces(given)


@dataclass(frozen=True)
class MissingTables:
    """How many of some records have no table."""

    n_records: int
    n_missing: int
    first: str | None
    """uid of one that has none."""


def check_tables(source: FaceSource, records: Collection[Record]) -> MissingTables:
    """Look whether each record has a table of its own, before any work is queued.

    Raises:
        SchemaError: Two clips would take the same table.
    """
    if source.folder is None:
        return MissingTables(len(records), 0, None)
    first_of: dict[Path, Record] = {}
    missing = []
    for record in records:
        table = find_table(source.folder, record)
        if table is None:
            missing.append(record.uid)
        elif (other := first_of.setdefault(table, record)).sha256 != record.sha256:
            raise shared_table(table, record, other.media)
    return MissingTables(len(records), len(missing), missing[0] if missing else None)


def load_box_detector(name: str) -> BoxDetector:
    """Return a user's own detector.

    Args:
        name: `module:attribute`; a detector, or a class or function that gives one without arguments.

    Raises:
        SchemaError: No such module or attribute, or it is no detector.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SchemaError(
            f"--faces {name}: the module does not import ({error}). Install it, or add its folder to "
            "PYTHONPATH."
        ) from error
    try:
        found: Any = getattr(module, attribute)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise SchemaError(
            f"--faces {name}: {module_name} has no {attribute!r}.{near_miss(attribute, public)}"
        ) from None
    # A class has the members, too, but is no detector yet.
    if callable(found) and (isinstance(found, type) or not isinstance(found, BoxDetector)):
        found = found()
    if not isinstance(found, BoxDetector) or not isinstance(found.name, str) or not found.name:
        raise SchemaError(
            f"--faces {name}: a {type(found).__name__} is no detector; one has a text `name` and a function "
            "`boxes(frames)` (extract.faces.BoxDetector)."
        )
    return found


@dataclass
class FacesOfClip:
    """Looks the face of one clip up once, however many specs crop it."""

    finder: FaceFinder
    _found: dict[tuple[int, ...], FaceTrack | FacesFailed] = field(default_factory=dict)

    def track(
        self, frames: Mapping[int, Picture], indices: tuple[int, ...], n_frames: int
    ) -> FaceTrack:
        """Return the track for some frames: what is found for them depends on no other spec's.

        Raises:
            FacesFailed: It cannot be said.
        """
        if indices not in self._found:
            try:
                chosen = {index: frames[index] for index in indices}
                self._found[indices] = self.finder.find(chosen, n_frames)
            except FacesFailed as error:
                self._found[indices] = error
        found = self._found[indices]
        if isinstance(found, FacesFailed):
            raise found
        return found
