"""OpenFace's tables, its program (a stand-in with the same command line), and detectors of a user's."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import Clip, Record
from cache.errors import MissingDependencyError, SchemaError
from extract.annotate.evidence.action_units import AuTable, FrameUnits, peak_frame
from extract.annotate.evidence.detectors import (
    Detection,
    FaceDetector,
    OpenFaceBinary,
    OpenFaceCsv,
    detect,
    load_detector,
)
from extract.annotate.evidence.openface import (
    OpenFaceFailed,
    find_openface,
    read_openface_csv,
    run_openface,
)
from extract.failures import FailureKind
from tests.media import write_clip, write_wav

# As FeatureExtraction 2.x writes it with -aus: 17 intensities, 18 presences, a blank after each comma.
HEADER = (
    "frame, face_id, timestamp, confidence, success, AU01_r, AU02_r, AU04_r, AU05_r, AU06_r, AU07_r, "
    "AU09_r, AU10_r, AU12_r, AU14_r, AU15_r, AU17_r, AU20_r, AU23_r, AU25_r, AU26_r, AU45_r, AU01_c, "
    "AU02_c, AU04_c, AU05_c, AU06_c, AU07_c, AU09_c, AU10_c, AU12_c, AU14_c, AU15_c, AU17_c, AU20_c, "
    "AU23_c, AU25_c, AU26_c, AU28_c, AU45_c"
)
THREE_FRAMES = f"""{HEADER}
1, 0, 0.000, 0.98, 1, 0.10, 0.00, 0.00, 0.00, 0.50, 0.00, 0.00, 0.00, 1.25, 0.00, 0.00, 0.00, 0.00, \
0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 1.00, 0.00, 0.00, 0.00, 1.00, 0.00, 0.00, 0.00, 0.00, \
0.00, 0.00, 0.00, 0.00, 0.00
2, 0, 0.040, 0.03, 0, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, 5.00, \
5.00, 5.00, 5.00, 5.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, 1.00, \
1.00, 1.00, 1.00, 1.00, 1.00
3, 0, 0.080, 0.88, 1, 0.00, 0.00, 0.30, 0.00, 0.00, 0.00, 0.00, 0.00, 2.75, 0.00, 0.00, 0.00, 0.00, \
0.00, 0.25, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 1.00, 0.00, 0.00, 0.00, 0.00, \
0.00, 0.00, 0.00, 1.00, 0.00
"""


def write_table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def short(
    path: Path, *rows: str, header: str = "frame, face_id, timestamp, confidence, success"
) -> Path:
    """Write a table with one intensity and one presence."""
    return write_table(path, "\n".join([f"{header}, AU12_r, AU12_c", *rows]) + "\n")


# ---- tables ---------------------------------------------------------------------------------------


def test_a_table_as_openface_writes_it(tmp_path: Path) -> None:
    table = read_openface_csv(write_table(tmp_path / "a.csv", THREE_FRAMES))
    assert (table.n_frames, table.face, table.n_faces) == (3, 0, 1)
    first, last = table.frames  # the one between has no success
    assert first.index == 0
    assert last.index == 2
    assert (first.pts_s, last.pts_s) == (0.0, 0.08)
    assert (first.confidence, last.confidence) == (0.98, 0.88)
    assert len(first.intensities) == 17
    assert "AU28" not in first.intensities
    assert {u: v for u, v in first.intensities.items() if v} == {
        "AU01": 0.1, "AU06": 0.5, "AU12": 1.25,
    }  # fmt: skip
    assert first.present == ("AU06", "AU12")
    assert last.present == ("AU12", "AU28")
    peak = peak_frame(table)
    assert peak is not None
    assert peak.peak("m").model_dump() == {
        "index": 2, "pts_s": 0.08, "method": "m", "score": pytest.approx(3.3),
    }  # fmt: skip


def test_a_table_without_blanks_and_with_a_mark_of_its_encoding(tmp_path: Path) -> None:
    spaced = read_openface_csv(write_table(tmp_path / "a.csv", THREE_FRAMES))
    dense = write_table(tmp_path / "b.csv", "\ufeff" + THREE_FRAMES.replace(", ", ",") + "\n\n")
    assert read_openface_csv(dense) == spaced


def test_more_columns_and_another_order_read_the_same(tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "a.csv",
        "AU12_c, gaze_0_x, success, AU12_r, x_0, confidence, timestamp, frame\n"
        "1.00, -nan, 1, 2.50, 311.2, 0.9, 0.5, 4\n",
    )
    assert read_openface_csv(path) == AuTable(
        frames=(
            FrameUnits(
                index=3, pts_s=0.5, intensities={"AU12": 2.5}, present=("AU12",), confidence=0.9
            ),
        ),
        n_frames=4,
        face=0,
        n_faces=1,
    )


def test_frames_of_low_confidence_do_not_count(tmp_path: Path) -> None:
    path = short(
        tmp_path / "a.csv", "1,0,0,0.5,1,5.0,1", "2,0,0.04,0.8,1,1.0,1", "3,0,0.1,0.79,1,3,1"
    )
    for least, indices in ((0.0, [0, 1, 2]), (0.8, [1]), (0.9, [])):
        table = read_openface_csv(path, min_confidence=least)
        assert [frame.index for frame in table.frames] == indices
        assert table.n_frames == 3


def test_a_video_without_a_face_is_a_table_without_frames(tmp_path: Path) -> None:
    # What cannot be measured may be no number then.
    path = short(tmp_path / "a.csv", "1,0,0,0.0,0,-nan,0", "2,0,0.04,0.0,0,-nan,0")
    table = read_openface_csv(path)
    assert table == AuTable(frames=(), n_frames=2, face=None, n_faces=0)
    assert peak_frame(table) is None


@pytest.mark.parametrize(
    ("rows", "face", "indices"),
    [
        # Face 1 is seen in more frames, though face 0 is surer.
        (("1,0,0,0.99,1,1,1", "1,1,0,0.7,1,2,1", "2,1,0.04,0.7,1,2,1"), 1, [0, 1]),
        # Frames without success do not count for it.
        (("1,0,0,0.9,1,1,1", "1,1,0,0.9,0,2,1", "2,1,0.04,0.9,0,2,1"), 0, [0]),
        # Equally often seen: the mean confidence decides.
        (("1,0,0,0.8,1,1,1", "1,1,0,0.9,1,2,1"), 1, [0]),
        # Equal in that, too: the lowest number, not the first row.
        (("1,3,0,0.9,1,1,1", "1,2,0,0.9,1,2,1"), 2, [0]),
    ],
)
def test_one_face_of_several_is_chosen(
    tmp_path: Path, rows: Sequence[str], face: int, indices: list[int]
) -> None:
    table = read_openface_csv(short(tmp_path / "a.csv", *rows))
    assert table.face == face
    assert [frame.index for frame in table.frames] == indices


@given(st.data())
def test_the_chosen_face_beats_every_other(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    seen = data.draw(
        st.lists(
            st.lists(st.sampled_from([None, 0.25, 0.5, 1.0]), min_size=3, max_size=3),
            min_size=1,
            max_size=4,
        )
    )
    rows = [
        f"{n + 1}, {face}, 0.0, {confidences[n] or 0}, {int(confidences[n] is not None)}, 1.0, 0"
        for n in range(3)
        for face, confidences in enumerate(seen)
    ]
    path = short(tmp_path_factory.getbasetemp() / "faces.csv", *rows)
    table = read_openface_csv(path)
    ranks = []
    for confidences in seen:
        counted = [c for c in confidences if c is not None]
        ranks.append((len(counted), sum(counted) / len(counted) if counted else 0.0))
    assert table.n_faces == sum(n > 0 for n, _ in ranks)
    if max(ranks)[0]:
        assert table.face == ranks.index(max(ranks))
        assert len(table.frames) == max(ranks)[0]
    else:
        assert table.face is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "column 'frame' and 3 more is missing"),
        ("frame, timestamp, confidence, AU12_r\n", "column 'success' is missing"),
        (
            "frames, timestamp, confidence, success, AU12_r\n",
            "'frame' is missing.*mean 'frames'",
        ),
        ("frame, timestamp, confidence, success, AU12_c\n", "'AU01_r' is missing.*mean 'AU12_c'"),
        ("face, confidence, AU01_r\n0, 0.9, 1.0\n", "'frame' and 2 more is missing"),
        (f"{HEADER}, AU01_r\n", "'AU01_r' is there twice"),
        (f"{HEADER}\n", "holds no frames.*run it again"),
        (THREE_FRAMES[:-60], "line 4: .* cells, the header has 40.*cut off"),
        (THREE_FRAMES.replace("2.75", "2,75"), "line 4: 41 cells, the header has 40"),
        (THREE_FRAMES.replace("1.25", "high"), "line 2: AU12_r is 'high', a number is needed"),
        (THREE_FRAMES.replace("1.25", "nan"), "line 2: AU12_r is 'nan', a number"),
        (THREE_FRAMES.replace("1.25", "7.00"), r"line 2: 'intensities.AU12'.*7\.0"),
        (
            THREE_FRAMES.replace("\n3, 0", "\n0, 0"),
            "line 4: frame is '0', a whole number from 1 on",
        ),
        (THREE_FRAMES.replace("\n3, 0", "\n2.5, 0"), "line 4: frame is '2.5', a whole number"),
        (THREE_FRAMES.replace("\n3, 0", "\n2, 0"), "line 4: frame 2 of face 0 comes after frame 2"),
        (THREE_FRAMES.replace("0.98", "1.98"), "line 2: 'confidence'"),
        ("\0\0\0", "missing|not a CSV"),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = write_table(tmp_path / "a.csv", text)
    with pytest.raises(SchemaError, match=problem) as caught:
        read_openface_csv(path)
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x80frame")
    with pytest.raises(SchemaError, match="not a CSV file"):
        read_openface_csv(tmp_path / "a.csv")
    with pytest.raises(SchemaError, match="cannot be read"):
        read_openface_csv(tmp_path / "none.csv")


def test_a_table_cut_anywhere_is_refused_or_gives_whole_frames(tmp_path: Path) -> None:
    whole = read_openface_csv(write_table(tmp_path / "whole.csv", THREE_FRAMES))
    n_refused = 0
    for length in range(len(THREE_FRAMES)):
        path = write_table(tmp_path / "cut.csv", THREE_FRAMES[:length])
        try:
            table = read_openface_csv(path)
        except SchemaError:
            n_refused += 1
            continue
        # The last cells are presences: a cut inside the very last one cannot be told from a whole row.
        assert [f.intensities for f in table.frames] == [
            f.intensities for f in whole.frames[: len(table.frames)]
        ]
    assert n_refused > len(THREE_FRAMES) - 30


# ---- the program ----------------------------------------------------------------------------------

STAND_IN = '''
"""Does what the first word of the clip's name says, with OpenFace's command line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

arguments = sys.argv[1:]
given = dict(zip(arguments[:6:2], arguments[1:6:2]))
assert list(given) == ["-f", "-out_dir", "-of"], arguments
assert arguments[6] == "-aus", arguments
clip, folder, name = Path(given["-f"]), Path(given["-out_dir"]), given["-of"]
word = clip.name.partition("-")[0].partition(".")[0]
print("Reading the landmark detector/tracker from: model/main_ceclm_general.txt", flush=True)
table = """@TABLE@"""

if word == "segv":
    os.kill(os.getpid(), signal.SIGSEGV)
elif word == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif word == "exit":
    print("ERROR: Could not load the landmark detector", file=sys.stderr)
    sys.exit(1)
elif word in ("hang", "orphan"):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    clip.with_suffix(".pid").write_text(str(child.pid))
    if word == "hang":
        time.sleep(60)
elif word == "nothing":
    print("Failed to open the video file at location: " + str(clip))
    sys.exit(0)
elif word == "cut":
    table = table[:-100]
elif word == "empty":
    table = ""
elif word == "chatter":
    for _ in range(3000):
        os.write(1, b"x" * 500 + b"\\n")
elif word == "threads":
    clip.with_suffix(".threads").write_text(os.environ["OPENBLAS_NUM_THREADS"] + os.getcwd())
(folder / (name + ".csv")).write_text(table)
'''


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program with OpenFace's command line."""
    program = tmp_path_factory.mktemp("openface") / "FeatureExtraction"
    program.write_text(f"#!{sys.executable} -S\n{STAND_IN.replace('@TABLE@', THREE_FRAMES)}")
    program.chmod(0o755)
    return program


def clip_called(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(b"a video")
    return path


def test_the_program_is_run_and_its_table_read(stand_in: Path, tmp_path: Path) -> None:
    table = run_openface(stand_in, clip_called(tmp_path, "fine clip.mp4"))
    assert table == read_openface_csv(write_table(tmp_path / "a.csv", THREE_FRAMES))
    sure = run_openface(stand_in, tmp_path / "fine clip.mp4", min_confidence=0.9)
    assert [frame.index for frame in sure.frames] == [0]


def test_the_program_runs_in_a_folder_of_its_own_with_one_thread(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    run_openface(stand_in, clip_called(tmp_path, "threads.mp4"))
    said = (tmp_path / "threads.threads").read_text()
    assert said.startswith("1")
    assert not Path(said[1:]).exists()  # and it is removed
    assert Path(said[1:]).name.startswith("emocache-openface-")


def test_a_program_that_says_much_does_not_wait_for_us(stand_in: Path, tmp_path: Path) -> None:
    assert run_openface(stand_in, clip_called(tmp_path, "chatter.mp4"), deadline_s=30).n_frames == 3


@pytest.mark.fault("OpenFace fails on a clip")
@pytest.mark.parametrize(
    ("name", "kind", "problem", "signal_name"),
    [
        ("segv-1.mp4", "crash", "died of SIGSEGV", "SIGSEGV"),
        ("killed-1.mp4", "memory", "killed by the system", "SIGKILL"),
        ("exit-1.mp4", "crash", r"exit code 1 \(it said: ERROR: Could not load", None),
        ("nothing-1.mp4", "undecodable", r"wrote no table.*Failed to open the video", None),
        ("cut-1.mp4", "crash", "ended well but its table, line 4: .* cells", None),
        ("empty-1.mp4", "crash", "ended well but its table: column 'frame'", None),
    ],
)
def test_what_goes_wrong_has_a_kind(
    stand_in: Path,
    tmp_path: Path,
    name: str,
    kind: FailureKind,
    problem: str,
    signal_name: str | None,
) -> None:
    with pytest.raises(OpenFaceFailed, match=problem) as caught:
        run_openface(stand_in, clip_called(tmp_path, name))
    assert caught.value.failure.kind == kind
    assert caught.value.exit_signal == signal_name
    assert name in caught.value.failure.message
    assert "landmark detector" in caught.value.output_tail


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def await_end(pid: int) -> None:
    until = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < until, "the helper process lives on"
        time.sleep(0.02)


@pytest.mark.fault("OpenFace hangs")
def test_a_program_that_hangs_is_killed_with_its_helpers(stand_in: Path, tmp_path: Path) -> None:
    started_s = time.monotonic()
    with pytest.raises(OpenFaceFailed, match=r"took longer than 1\.5 s") as caught:
        run_openface(stand_in, clip_called(tmp_path, "hang.mp4"), deadline_s=1.5)
    assert caught.value.failure.kind == "hang"
    assert "landmark detector" in caught.value.output_tail
    assert time.monotonic() - started_s < 10
    await_end(int((tmp_path / "hang.pid").read_text()))


@pytest.mark.fault("Ctrl-C while OpenFace runs")
def test_an_interrupt_leaves_no_process_behind(stand_in: Path, tmp_path: Path) -> None:
    path, started = clip_called(tmp_path, "hang.mp4"), tmp_path / "hang.pid"

    def interrupt(*_: object) -> None:
        if not (started.exists() and started.read_text()):  # not yet
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            return
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            run_openface(stand_in, path, deadline_s=60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    await_end(int(started.read_text()))


@pytest.mark.fault("OpenFace leaves a helper behind")
def test_a_helper_that_is_left_behind_ends_too(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extract.annotate.evidence.openface._END_S", 0.3)
    assert run_openface(stand_in, clip_called(tmp_path, "orphan.mp4")).n_frames == 3
    await_end(int((tmp_path / "orphan.pid").read_text()))


def test_a_clip_that_cannot_be_read_is_told_as_such(stand_in: Path, tmp_path: Path) -> None:
    with pytest.raises(OpenFaceFailed, match="no such file") as caught:
        run_openface(stand_in, tmp_path / "none.mp4")
    assert caught.value.failure.kind == "missing"
    with pytest.raises(OpenFaceFailed, match="cannot be read") as caught:
        run_openface(stand_in, tmp_path)
    assert caught.value.failure.kind == "unreadable"


def test_a_program_that_does_not_start(tmp_path: Path) -> None:
    program = tmp_path / "broken"
    program.write_text("#!/nonexistent/interpreter\n")
    program.chmod(0o755)
    with pytest.raises(OpenFaceFailed, match="does not start") as caught:
        run_openface(program, clip_called(tmp_path, "fine.mp4"))
    assert caught.value.failure.kind == "crash"


def test_the_program_is_found_by_path_or_on_path(
    stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_openface(stand_in) == stand_in
    monkeypatch.setenv("PATH", str(stand_in.parent))
    assert find_openface() == stand_in
    assert find_openface("FeatureExtraction") == stand_in
    assert OpenFaceBinary.find(min_confidence=0.5) == OpenFaceBinary(stand_in, 0.5)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"'FeatureExtraction' is not on PATH. Build"):
        find_openface()
    with pytest.raises(MissingDependencyError, match="is not there"):
        find_openface(tmp_path / "none")
    (tmp_path / "plain").write_text("")
    with pytest.raises(MissingDependencyError, match="no program that this user may run"):
        find_openface(tmp_path / "plain")


# ---- detectors ------------------------------------------------------------------------------------


def record_of(media: str, uid: str = "", **clip: Any) -> Record:
    found = Clip(sha256="0" * 64, n_bytes=1, **clip) if clip else None
    return Record(uid=uid or f"corpus/{media}", media=media, clip=found)


def test_both_detectors_keep_the_protocol(stand_in: Path, tmp_path: Path) -> None:
    for detector in (OpenFaceBinary(stand_in), OpenFaceCsv(tmp_path)):
        assert isinstance(detector, FaceDetector)
        assert detector.method == "openface-au-sum"


def test_the_program_as_a_detector(stand_in: Path, tmp_path: Path) -> None:
    detector = OpenFaceBinary(stand_in)
    found = detect(detector, record_of("sub/fine.mp4"), clip_called(tmp_path, "fine.mp4"))
    assert found.status == "ok"
    assert found.table is not None
    assert found.table.n_frames == 3
    path = clip_called(tmp_path, "segv.mp4")
    found = detect(detector, record_of("sub/segv.mp4"), path)
    assert found.failure is not None
    assert found.failure.reason == "crash: sub/segv.mp4: OpenFace died of SIGSEGV"
    assert found.exit_signal == "SIGSEGV"


def test_sound_alone_is_absent(stand_in: Path, tmp_path: Path) -> None:
    # Known from the index: the program, which would crash, is not started.
    known = record_of("segv.wav", has_video=False, has_image=False, has_audio=True)
    for detector in (OpenFaceBinary(stand_in), OpenFaceCsv(tmp_path)):
        assert detector.detect(known, clip_called(tmp_path, "segv.wav")) == Detection("absent")
        assert detect(detector, known, tmp_path / "none") == Detection("absent")
    # Not known: the program finds no video, and a look at the file says why.
    sound = write_wav(tmp_path / "nothing.wav", np.arange(4000, dtype=np.int16), 16000)
    assert OpenFaceBinary(stand_in).detect(record_of("nothing.wav"), sound) == Detection("absent")
    video = write_clip(tmp_path / "nothing.mp4", seconds=0.4)
    found = OpenFaceBinary(stand_in).detect(record_of("nothing.mp4"), video)
    assert found.failure is not None
    assert found.failure.kind == "undecodable"
    junk = clip_called(tmp_path, "nothing.bin")
    assert OpenFaceBinary(stand_in).detect(record_of("nothing.bin"), junk).status == "failed"


@pytest.mark.parametrize("name", ["train/dia0_utt1.csv", "media/train/d0u1.v2.csv", "d0u1.v2.csv"])
def test_tables_go_by_source_id_or_by_media(tmp_path: Path, name: str) -> None:
    record = record_of("media/train/d0u1.v2.mp4", "meld/train/dia0_utt1")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_table(tmp_path / name, THREE_FRAMES)
    found = OpenFaceCsv(tmp_path).detect(record, Path("unused"))
    assert found.table is not None
    assert found.table.n_frames == 3


def test_the_source_id_comes_first(tmp_path: Path) -> None:
    write_table(tmp_path / "one.csv", THREE_FRAMES)
    short(tmp_path / "two.csv", "1,0,0,0.9,1,1,1")
    found = OpenFaceCsv(tmp_path).detect(record_of("two.mp4", "c/one"), Path("unused"))
    assert found.table is not None
    assert found.table.n_frames == 3


def test_a_record_without_a_table_fails(tmp_path: Path) -> None:
    found = OpenFaceCsv(tmp_path).detect(record_of("a/b.mp4", "c/x"), Path("unused"))
    assert found.failure is not None
    assert found.failure.kind == "missing"
    assert found.failure.message.endswith("looked for x.csv, a/b.csv, b.csv")
    write_table(tmp_path / "x.csv", "frame")
    found = OpenFaceCsv(tmp_path).detect(record_of("a/b.mp4", "c/x"), Path("unused"))
    assert found.failure is not None
    assert found.failure.kind == "undecodable"
    with pytest.raises(SchemaError, match="no such folder"):
        OpenFaceCsv(tmp_path / "none")


def test_tables_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    inside = tmp_path / "tables"
    inside.mkdir()
    write_table(tmp_path / "secret.csv", THREE_FRAMES)
    found = OpenFaceCsv(inside).detect(record_of("a.mp4", "c/../secret"), Path("unused"))
    assert found.status == "failed"
    (inside / "a.csv").symlink_to(tmp_path / "secret.csv")
    found = OpenFaceCsv(inside).detect(record_of("a.mp4", "c/a"), Path("unused"))
    assert found.status == "failed"


def test_two_clips_never_share_a_table(tmp_path: Path) -> None:
    write_table(tmp_path / "dia0_utt0.csv", THREE_FRAMES)
    detector = OpenFaceCsv(tmp_path)
    for uid in ("meld/train-1", "other/train-1"):  # one clip in two corpora may
        assert detector.detect(record_of("train/dia0_utt0.mp4", uid), Path("x")).status == "ok"
    with pytest.raises(SchemaError, match=r"'train/dia0_utt0.mp4' and of 'dev/dia0_utt0.mp4'"):
        detector.detect(record_of("dev/dia0_utt0.mp4", "meld/dev-1"), Path("x"))


USERS_MODULE = '''
from extract.annotate.evidence.action_units import AuTable, FrameUnits
from extract.annotate.evidence.detectors import Detection


class Smiles:
    """Finds a smile everywhere."""

    def __init__(self, strength="1.5"):
        self.strength = float(strength)

    @property
    def method(self):
        return "smiles-au-sum"

    def detect(self, record, path):
        if record.media == "bad.mp4":
            raise ZeroDivisionError("no face, no division")
        if record.media == "odd.mp4":
            return {"AU12": 1}
        return Detection("ok", AuTable(frames=(
            FrameUnits(index=4, intensities={"AU12": self.strength}),
        )))


READY = Smiles("2.5")
NUMBER = 7


def nothing():
    return object()
'''


@pytest.fixture
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of a user's, with detectors."""
    name = f"users_faces_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(USERS_MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return name


@pytest.mark.parametrize(
    ("attribute", "options", "strength"),
    [("Smiles", (), 1.5), ("Smiles", ("3.5",), 3.5), ("READY", (), 2.5)],
)
def test_a_users_own_detector(
    users_module: str, attribute: str, options: Sequence[str], strength: float
) -> None:
    detector = load_detector(f"{users_module}:{attribute}", options)
    found = detect(detector, record_of("a.mp4"), Path("a.mp4"))
    assert found.table is not None
    peak = peak_frame(found.table)
    assert peak is not None
    assert (peak.index, peak.score, detector.method) == (4, strength, "smiles-au-sum")


@pytest.mark.fault("a user's face detector fails on a clip")
def test_a_detector_that_fails_costs_one_clip(users_module: str) -> None:
    detector = load_detector(f"{users_module}:Smiles")
    found = detect(detector, record_of("bad.mp4"), Path("bad.mp4"))
    assert found.failure is not None
    assert found.failure.reason == ("unexpected: bad.mp4: ZeroDivisionError: no face, no division")
    mute = record_of("bad.mp4", has_video=False, has_image=False, has_audio=True)
    assert detect(detector, mute, Path("bad.mp4")) == Detection("absent")  # it is not asked
    with pytest.raises(SchemaError, match="returned dict, a Detection is needed"):
        detect(detector, record_of("odd.mp4"), Path("odd.mp4"))


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("Smiles", (), "is not module:attribute"),
        ("{}:", (), "is not module:attribute"),
        ("no_such_module_here:Smiles", (), "the module does not import"),
        ("{}:Smile", (), "has no 'Smile'.*mean 'Smiles'"),
        ("{}:NUMBER", (), "is a int; a detector has"),
        ("{}:nothing", (), "is a object; a detector has"),
        ("{}:READY", ("1",), "takes no options"),
    ],
)
def test_what_is_no_detector_is_refused(
    users_module: str, name: str, options: Sequence[str], problem: str
) -> None:
    with pytest.raises(SchemaError, match=problem):
        load_detector(name.format(users_module), options)


def test_a_detection_does_not_contradict_itself() -> None:
    with pytest.raises(ValueError, match="'ok' needs a table"):
        Detection("ok")
    with pytest.raises(ValueError, match="'failed' a failure"):
        Detection("failed", AuTable(frames=()))
