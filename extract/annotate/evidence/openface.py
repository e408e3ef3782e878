"""OpenFace 2.x: reading the tables that it writes, and running its program over a clip.

    FeatureExtraction -f VIDEO -out_dir FOLDER -of NAME -aus      ->      FOLDER/NAME.csv

One row per frame, or with FaceLandmarkVidMulti one per frame and face: `frame` (from 1), `face_id`,
`timestamp`, `confidence`, `success`, then `AU01_r` ... (intensity, 0 to 5) and `AU01_c` ... (presence).
Tables with more columns, as OpenFace writes without `-aus`, read the same.
"""

from __future__ import annotations

import csv
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from cache.errors import EmocacheError, MissingDependencyError, SchemaError, near_miss
from cache.schema import describe
from extract.annotate.evidence.action_units import AuTable, FrameUnits
from extract.failures import Failure, FailureKind

PROGRAM = "FeatureExtraction"
DEADLINE_S = 600.0
"""OpenFace takes some 50 ms per frame on a slow core; a clip of a minute has 1,800 frames."""
_NEEDED = ("frame", "timestamp", "confidence", "success")
_INTENSITY = re.compile(r"(AU[0-9]{2})_r")
_PRESENCE = re.compile(r"(AU[0-9]{2})_c")
_OUTPUT_NAME = "units"
_TAIL_BYTES = 4096
_END_S = 5.0
"""Time that a killed program has to be gone."""


class OpenFaceFailed(EmocacheError):
    """OpenFace gave no table for one clip."""

    def __init__(
        self, failure: Failure, exit_signal: str | None = None, output_tail: str = ""
    ) -> None:
        super().__init__(failure.reason)
        self.failure = failure
        self.exit_signal = exit_signal
        """Name of the signal that ended it, unless it was we who sent it."""
        self.output_tail = output_tail
        """Its last words on stdout and stderr together, at most 4 KiB."""


# ---- tables ---------------------------------------------------------------------------------------


@dataclass
class _Face:
    """One face while a table is read."""

    frames: list[FrameUnits] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    latest: int = 0

    @property
    def rank(self) -> tuple[int, float]:
        """Frames in which it was found, then how sure the detector was of it."""
        n = len(self.confidences)
        return n, math.fsum(self.confidences) / n if n else 0.0


@dataclass(frozen=True)
class _Columns:
    """Where the columns stand."""

    frame: int
    timestamp: int
    confidence: int
    success: int
    face_id: int | None
    intensities: dict[str, int]
    presences: dict[str, int]
    n: int


def read_openface_csv(path: Path, *, min_confidence: float = 0.0) -> AuTable:
    """Read a table of OpenFace's.

    Frames without success, or with less confidence than asked for, do not count. Of several faces the
    one that counts in most frames is taken, of equals the one with the higher mean confidence, of those
    the one with the lowest number. OpenFace counts frames from 1, an `AuTable` from 0.

    Args:
        path: The CSV file.
        min_confidence: 0 to 1; 0 leaves the decision to OpenFace's own `success`.

    Returns:
        Units of that face. Without frames, if no face was found in any.

    Raises:
        SchemaError: Not such a table, a damaged one, or one without any frame.
    """
    faces: dict[int, _Face] = {}
    n_frames = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, skipinitialspace=True)
            columns = _columns(next(rows, []), path)
            for row in rows:
                if row:  # not the blank line that an editor may leave
                    where = f"{path}, line {rows.line_num}"
                    n_frames = max(n_frames, _add(row, columns, faces, min_confidence, where))
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
    return AuTable(
        frames=tuple(face.frames),
        n_frames=n_frames,
        face=number if face.frames else None,
        n_faces=sum(bool(f.frames) for f in faces.values()),
    )


def _columns(header: Sequence[str], path: Path) -> _Columns:
    names = [name.strip() for name in header]
    place = {name: number for number, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for number, name in enumerate(names) if place[name] != number)
        raise SchemaError(f"{path}: column {twice!r} is there twice; the file was put together.")
    units = {m[1]: place[n] for n in names if (m := _INTENSITY.fullmatch(n))}
    missing = [name for name in _NEEDED if name not in place]
    if missing or not units:
        wanted = missing[0] if missing else "AU01_r"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        found = f"{', '.join(names[:6])}, ..." if len(names) > 6 else ", ".join(names) or "nothing"
        raise SchemaError(
            f"{path}: column {wanted!r}{others} is missing (found {found}).{near_miss(wanted, names)} "
            "Give a table that OpenFace 2.x's FeatureExtraction wrote with -aus."
        )
    return _Columns(
        frame=place["frame"],
        timestamp=place["timestamp"],
        confidence=place["confidence"],
        success=place["success"],
        face_id=place.get("face_id"),
        intensities=units,
        presences={m[1]: place[n] for n in names if (m := _PRESENCE.fullmatch(n))},
        n=len(names),
    )


def _add(
    row: Sequence[str],
    columns: _Columns,
    faces: dict[int, _Face],
    min_confidence: float,
    where: str,
) -> int:
    """Note one row; return the number of its frame, from 1."""
    if len(row) != columns.n:
        raise SchemaError(
            f"{where}: {len(row)} cells, the header has {columns.n}. The table is cut off or damaged; "
            "run OpenFace again for this clip."
        )
    number = _whole(row[columns.frame], "frame", 1, where)
    face_id = 0 if columns.face_id is None else _whole(row[columns.face_id], "face_id", 0, where)
    face = faces.setdefault(face_id, _Face())
    if number <= face.latest:
        raise SchemaError(
            f"{where}: frame {number} of face {face_id} comes after frame {face.latest}; frames must be "
            "in order, each once. Was the table put together from several clips?"
        )
    face.latest = number
    confidence = _number(row[columns.confidence], "confidence", where)
    if _whole(row[columns.success], "success", 0, where) != 1 or confidence < min_confidence:
        return number
    try:
        frame = FrameUnits(
            index=number - 1,
            pts_s=_number(row[columns.timestamp], "timestamp", where),
            intensities={
                unit: _number(row[at], f"{unit}_r", where)
                for unit, at in columns.intensities.items()
            },
            present=tuple(
                unit
                for unit, at in columns.presences.items()
                if _number(row[at], f"{unit}_c", where) >= 0.5
            )
            if columns.presences
            else None,
            confidence=confidence,
        )
    except ValidationError as error:
        raise SchemaError(f"{where}: {describe(FrameUnits, error)}") from None
    face.frames.append(frame)
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


# ---- the program ----------------------------------------------------------------------------------


def find_openface(program: str | Path | None = None) -> Path:
    """Return OpenFace's program.

    Args:
        program: Its path, or a name on PATH; None: `FeatureExtraction`.

    Raises:
        MissingDependencyError: There is none, or it may not be run.
    """
    wanted = str(program or PROGRAM)
    found = shutil.which(wanted)
    if found is None:
        is_path = os.sep in wanted
        if is_path and Path(wanted).is_file():
            problem = "is no program that this user may run"
        else:
            problem = "is not there" if is_path else "is not on PATH"
        raise MissingDependencyError(
            f"OpenFace's program {wanted!r} {problem}. Build OpenFace 2.x and give the path of its "
            f"{PROGRAM}, or run it elsewhere and give the folder of its CSV files."
        )
    return Path(found).absolute()


def run_openface(
    program: Path,
    media: Path,
    *,
    min_confidence: float = 0.0,
    deadline_s: float = DEADLINE_S,
    extra_args: Sequence[str] = (),
) -> AuTable:
    """Run OpenFace over one clip and read its table.

    It runs in a process group of its own, which is killed when the deadline passes or the caller is
    interrupted, and in a folder of its own, which is removed.

    Args:
        program: From `find_openface`.
        media: The clip.
        min_confidence: See `read_openface_csv`.
        deadline_s: Longest time for the clip.
        extra_args: More arguments, `-mloc FILE` for example.

    Raises:
        OpenFaceFailed: No table came of it: `missing` or `unreadable` (the clip), `hang`, `crash` (died,
            gave an exit code, or wrote a broken table), `memory` (killed by the system), `undecodable`
            (ended well without a table, as it does when no video opens).
    """
    _check_media(media)
    with tempfile.TemporaryDirectory(prefix="emocache-openface-") as folder:
        command = [str(program), "-f", str(media.absolute())]
        command += ["-out_dir", folder, "-of", _OUTPUT_NAME, "-aus", *extra_args]
        code, tail = _run(command, folder, deadline_s, media)
        if code != 0:
            raise _ended_badly(code, tail, media)
        table = Path(folder, f"{_OUTPUT_NAME}.csv")
        if not table.is_file():
            message = f"{media}: OpenFace ended well but wrote no table; it found no video to open"
            raise OpenFaceFailed(Failure("undecodable", _with(message, tail)), None, tail)
        try:
            return read_openface_csv(table, min_confidence=min_confidence)
        except SchemaError as error:
            said = str(error).replace(str(table), "its table")
            message = f"{media}: OpenFace ended well but {said}"
            raise OpenFaceFailed(Failure("crash", message), None, tail) from None


def _check_media(media: Path) -> None:
    """Look at the clip first: OpenFace's words about it cannot be told from its other ones."""
    try:
        with media.open("rb") as file:
            file.read(1)
    except FileNotFoundError:
        message = f"{media}: there is no such file. Check the media root."
        raise OpenFaceFailed(Failure("missing", message)) from None
    except OSError as error:
        message = f"{media}: cannot be read ({error.strerror or error})."
        raise OpenFaceFailed(Failure("unreadable", message)) from None


def _run(command: Sequence[str], folder: str, deadline_s: float, media: Path) -> tuple[int, str]:
    """Run a program to its end; return its exit code and last words."""
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        message = f"{media}: OpenFace does not start ({error.strerror or error})"
        raise OpenFaceFailed(Failure("crash", message)) from None
    assert process.stdout is not None
    tail = _Tail(process.stdout)
    try:
        code = process.wait(deadline_s)
        # A helper that it left behind holds the pipe; the group still exists then.
        if not tail.ended(_END_S):
            _kill_group(process)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        with suppress(subprocess.TimeoutExpired):  # the kernel may wait for a disk on its behalf
            process.wait(_END_S)
        tail.ended(_END_S)
        message = f"{media}: OpenFace took longer than {deadline_s:g} s"
        raise OpenFaceFailed(Failure("hang", message), None, tail.text) from None
    except BaseException:
        _kill_group(process)
        process.wait(_END_S)
        raise
    return code, tail.text


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class _Tail:
    """Takes what a program says, so that it never waits for us, and keeps the end."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe
        self._bytes = b""
        self._thread = threading.Thread(target=self._drain, name="openface-output", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        for block in _blocks(self._pipe):
            self._bytes = (self._bytes + block)[-_TAIL_BYTES:]
        self._pipe.close()

    def ended(self, within_s: float) -> bool:
        """Wait for the end of the output; False if it does not come."""
        self._thread.join(within_s)
        return not self._thread.is_alive()

    @property
    def text(self) -> str:
        return self._bytes.decode("utf-8", "replace").strip()


def _blocks(pipe: IO[bytes]) -> Iterator[bytes]:
    while block := os.read(pipe.fileno(), 2**16):
        yield block


def _ended_badly(code: int, tail: str, media: Path) -> OpenFaceFailed:
    if code > 0:
        message = _with(f"{media}: OpenFace ended with exit code {code}", tail)
        return OpenFaceFailed(Failure("crash", message), None, tail)
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal
        name = f"signal {-code}"
    kind: FailureKind = "crash"
    message = f"{media}: OpenFace died of {name}"
    if -code == signal.SIGKILL:  # our own kills are told when they are decided
        kind = "memory"
        message = f"{media}: OpenFace was killed by the system, probably for lack of memory"
    return OpenFaceFailed(Failure(kind, message), name, tail)


def _with(message: str, tail: str) -> str:
    """Add the last line that a program said."""
    lines = tail.splitlines()
    return f"{message} (it said: {lines[-1].strip()[:200]})" if lines else f"{message}."


def _environment() -> dict[str, str]:
    """Return the environment of OpenFace: one thread for linear algebra, as several clips run at once."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**threads, **os.environ}
