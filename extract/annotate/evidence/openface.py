"""OpenFace 2.x: reading the tables that it writes, and running its program over a clip.

    FeatureExtraction -f VIDEO -out_dir FOLDER -of NAME -aus      ->      FOLDER/NAME.csv

Behind what every table has (`extract.openface_tables`) stand `AU01_r` ... (intensity, 0 to 5) and
`AU01_c` ... (presence). Tables with more columns, as OpenFace writes without `-aus`, read the same.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import ValidationError

from cache.errors import EmocacheError, MissingDependencyError, SchemaError
from cache.schema import describe
from extract.annotate.evidence.action_units import AuTable, FrameUnits
from extract.failures import Failure, FailureKind
from extract.openface_tables import ReadRow, TableRow, read_face

PROGRAM = "FeatureExtraction"
DEADLINE_S = 600.0
"""OpenFace takes some 50 ms per frame on a slow core; a clip of a minute has 1,800 frames."""
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


def read_openface_csv(path: Path, *, min_confidence: float = 0.0) -> AuTable:
    """Read the action units of a table of OpenFace's; see `extract.openface_tables.read_face`.

    OpenFace counts frames from 1, an `AuTable` from 0.

    Args:
        path: The CSV file.
        min_confidence: 0 to 1; 0 leaves the decision to OpenFace's own `success`.

    Returns:
        Units of the face that counts in most frames. Without frames, if no face was found in any.

    Raises:
        SchemaError: Not such a table, a damaged one, or one without any frame.
    """
    found = read_face(path, _missing, _reader, flag="-aus", min_confidence=min_confidence)
    return AuTable(
        frames=found.frames, n_frames=found.n_frames, face=found.face, n_faces=found.n_faces
    )


def _missing(names: Sequence[str]) -> Sequence[str]:
    return () if any(_INTENSITY.fullmatch(name) for name in names) else ("AU01_r",)


def _reader(place: dict[str, int]) -> ReadRow[FrameUnits]:
    intensities = {m[1]: name for name in place if (m := _INTENSITY.fullmatch(name))}
    presences = {m[1]: name for name in place if (m := _PRESENCE.fullmatch(name))}

    def read(row: TableRow) -> FrameUnits:
        try:
            return FrameUnits(
                index=row.index,
                pts_s=row.number("timestamp"),
                intensities={unit: row.number(name) for unit, name in intensities.items()},
                present=tuple(u for u, name in presences.items() if row.number(name) >= 0.5)
                if presences
                else None,
                confidence=row.confidence,
            )
        except ValidationError as error:
            raise SchemaError(f"{row.where}: {describe(FrameUnits, error)}") from None

    return read


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
