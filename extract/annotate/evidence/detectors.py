"""Who finds action units in a clip: OpenFace's program, tables that it wrote, or a user's own detector.

detector = load_detector("my_module:MyDetector")
found = detect(detector, record, path)            # never raises for one bad clip
if found.table is not None:
    peak = peak_frame(found.table)
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from cache.clip import Record
from cache.errors import EmocacheError, SchemaError, near_miss
from extract.annotate.evidence.action_units import AuTable
from extract.annotate.evidence.openface import (
    DEADLINE_S,
    OpenFaceFailed,
    find_openface,
    read_openface_csv,
    run_openface,
)
from extract.failures import Failure
from extract.openface_tables import find_table, shared_table, table_names

logger = logging.getLogger(__name__)

METHOD = "openface-au-sum"
"""`Peak.method` of peaks that were found with OpenFace's intensities."""


@dataclass(frozen=True)
class Detection:
    """What a detector found in one clip."""

    status: Literal["ok", "absent", "failed"]
    """`absent`: the clip has no pictures. A video without a face is `ok`, with a table of no frames."""
    table: AuTable | None = None
    """Only of an `ok` one."""
    failure: Failure | None = None
    """Only of a `failed` one."""
    exit_signal: str | None = None
    """Name of the signal that ended the detector's process."""
    output_tail: str = ""
    """Last words of the detector's process."""

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        if (self.status == "ok") != (self.table is not None) or (self.status == "failed") != (
            self.failure is not None
        ):
            raise ValueError(
                f"a detection with status {self.status!r} has table={self.table is not None} and "
                f"failure={self.failure is not None}; 'ok' needs a table, 'failed' a failure"
            )


@runtime_checkable
class FaceDetector(Protocol):
    """Finds the action units of the face in a clip.

    Write one for another tool: a class with these two members, whose instances may be called from
    several threads at once.
    """

    @property
    def method(self) -> str:
        """How peaks are found with it, for `Peak.method`: tool and rule, such as `mytool-au-sum`."""

    def detect(self, record: Record, path: Path) -> Detection:
        """Return the units of each frame.

        Args:
            record: What is known of the clip. `record.clip` is None if nobody looked at the media yet.
            path: Its media file.

        Returns:
            A table with frames counted from 0 as they are decoded and intensities from 0 to 5. Frames
            without a face are left out. What is wrong with this clip alone is a `failed` detection.

        Raises:
            EmocacheError: No clip can be done, because the tool is not installed for example.
        """


def detect(detector: FaceDetector, record: Record, path: Path) -> Detection:
    """Ask a detector, and turn what nobody foresaw into a failure of this clip.

    Raises:
        EmocacheError: The detector says that it cannot go on.
    """
    if record.clip is not None and not has_pictures(record):
        return Detection("absent")
    try:
        found = detector.detect(record, path)
    except EmocacheError:
        raise
    except Exception as error:  # the per-clip boundary: recorded, never swallowed
        logger.warning("%s: unexpected %s", record.uid, type(error).__name__, exc_info=True)
        message = f"{record.media}: {type(error).__name__}: {error}"
        return Detection("failed", failure=Failure("unexpected", message))
    if not isinstance(found, Detection):
        raise SchemaError(
            f"the detector {type(detector).__name__} returned {type(found).__name__}, a Detection is "
            "needed (extract.annotate.evidence.detectors)."
        )
    return found


def has_pictures(record: Record) -> bool:
    """Return whether a record's clip has pictures, as far as anybody knows; True if unknown."""
    if record.clip is None:
        return True
    known = (record.clip.has_video, record.clip.has_image)
    return any(known) or None in known


@dataclass(frozen=True)
class OpenFaceBinary:
    """Runs OpenFace's `FeatureExtraction`, or another of its programs with the same arguments."""

    program: Path
    min_confidence: float = 0.0
    """Frames of less do not count; 0 leaves it to OpenFace's own `success`."""
    deadline_s: float = DEADLINE_S
    extra_args: tuple[str, ...] = ()

    @classmethod
    def find(cls, program: str | Path | None = None, **options: Any) -> OpenFaceBinary:
        """Return it for a path, or for a name on PATH.

        Raises:
            MissingDependencyError: There is no such program.
        """
        return cls(find_openface(program), **options)

    @property
    def method(self) -> str:
        """How peaks are found with it."""
        return METHOD

    def detect(self, record: Record, path: Path) -> Detection:
        """Run it over a clip; see `FaceDetector.detect`."""
        if not has_pictures(record):
            return Detection("absent")
        try:
            table = run_openface(
                self.program,
                path,
                min_confidence=self.min_confidence,
                deadline_s=self.deadline_s,
                extra_args=self.extra_args,
            )
        except OpenFaceFailed as error:
            if error.failure.kind == "undecodable" and record.clip is None and _is_sound(path):
                return Detection("absent")
            message = error.failure.message.replace(str(path), record.media)
            failure = Failure(error.failure.kind, message)
            return Detection("failed", None, failure, error.exit_signal, error.output_tail)
        return Detection("ok", table)


def _is_sound(path: Path) -> bool:
    """Return whether a file that OpenFace did not open is a sound file, by a decoder process."""
    from extract.annotate.evidence.media import has_only_sound

    return has_only_sound(path)


@dataclass(frozen=True)
class OpenFaceCsv:
    """Reads tables that OpenFace wrote elsewhere: a folder of CSV files.

    A record's table is `<source id>.csv`, `<media path without its ending>.csv` or
    `<media file name without its ending>.csv`; the first that is there. The source id is the uid without
    its corpus.
    """

    folder: Path
    min_confidence: float = 0.0
    _media_of: dict[Path, str] = field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse a path that is no folder."""
        if not self.folder.is_dir():
            raise SchemaError(
                f"{self.folder}: no such folder. Give the folder that holds OpenFace's CSV files."
            )

    @property
    def method(self) -> str:
        """How peaks are found with it."""
        return METHOD

    def detect(self, record: Record, path: Path) -> Detection:
        """Read a clip's table; see `FaceDetector.detect`.

        Raises:
            SchemaError: Two media files would take the same table.
        """
        if not has_pictures(record):
            return Detection("absent")
        found = find_table(self.folder, record)
        if found is None:
            names = ", ".join(table_names(record))
            message = f"{record.uid}: there is no table in {self.folder}; looked for {names}"
            return Detection("failed", failure=Failure("missing", message))
        self._claim(found, record)
        try:
            return Detection("ok", read_openface_csv(found, min_confidence=self.min_confidence))
        except SchemaError as error:
            return Detection("failed", failure=Failure("undecodable", str(error)))

    def _claim(self, table: Path, record: Record) -> None:
        """Remember whose table it is: two clips of the same file name must not share one."""
        with self._lock:
            other = self._media_of.setdefault(table, record.media)
        if other != record.media:
            raise shared_table(table, record, other)


def load_detector(name: str, options: Sequence[str] = ()) -> FaceDetector:
    """Return a user's own detector.

    Args:
        name: `module:attribute`; a detector, or what returns one when it is called.
        options: Arguments for that call.

    Raises:
        SchemaError: No such module or attribute, or it is no detector.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise SchemaError(
            f"detector {name!r} is not module:attribute. Example: my_package.faces:MyDetector"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise SchemaError(
            f"detector {name!r}: the module does not import ({error}). Install it, or add its folder to "
            "PYTHONPATH."
        ) from error
    try:
        found = getattr(module, attribute)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        raise SchemaError(
            f"detector {name!r}: {module_name} has no {attribute!r}.{near_miss(attribute, public)}"
        ) from None
    # A class has the members, too, but is no detector yet.
    if isinstance(found, type) or not isinstance(found, FaceDetector):
        if not callable(found):
            raise SchemaError(_no_detector(name, found))
        found = found(*options)
    elif options:
        raise SchemaError(f"detector {name!r} is made already and takes no options; got {options}.")
    if not isinstance(found, FaceDetector) or not isinstance(found.method, str):
        raise SchemaError(_no_detector(name, found))
    return found


def _no_detector(name: str, found: object) -> str:
    return (
        f"detector {name!r} is a {type(found).__name__}; a detector has a text `method` and a function "
        "`detect(record, path)` (extract.annotate.evidence.detectors.FaceDetector)."
    )
