"""Faces: the square around one by hand and by its properties, tables, detectors, and what is stored."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import emocache
from cache.audit import verify
from cache.clip import Clip, Record, file_sha256
from cache.commit import Status
from cache.encoders import MaeEncoder
from cache.errors import ExtractionStopped, MediaError, SchemaError
from cache.manifest import read_manifest
from cache.spec import FaceCrop, Frames, Pixels, TokenSpec
from cache.store import TokenStore
from eval.live.clip import ClipReader
from extract.calibrate import calibrate
from extract.config import WorkerConfig
from extract.corpora.demo import (
    FPS,
    drawn_faces,
    make_frames,
    plan_demo,
    write_demo_corpus,
    write_demo_faces,
)
from extract.corpora.demo_faces import FRAME_PX, face_landmarks, openface_landmarks, sample_face
from extract.decode import FrameRequest, decode
from extract.decode_pool import DecodeFailure, DecodeJob, DecodePool
from extract.encoders.bank import EncoderBank, EncoderInput
from extract.faces import (
    FaceBox,
    FaceFinder,
    FaceOrder,
    FaceTrack,
    FromDetector,
    FromTable,
    Picture,
    check_tables,
    face_source,
    finder_of,
    open_faces,
    read_track,
    square_around,
)
from extract.failures import kind_of
from extract.inputs import ClipInputs, InputRequest, prepare_inputs
from extract.plan import make_plan
from extract.recheck import recheck
from extract.run import extract
from extract.sources import open_source
from extract.tiny.made_up import write_checkpoint
from tests.media import write, write_wav
from train.config import Preset, configure
from train.presets import demo

# ---- the square -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "margin", "expected"),
    [
        # 40 x 60 around (50, 60): side 60, from 20 and 30.
        (FaceBox(30, 30, 70, 90), 0.0, (20, 30, 60)),
        # 60 * 1.4 = 84: from 8 and 18.
        (FaceBox(30, 30, 70, 90), 0.2, (8, 18, 84)),
        # The square would begin at -2: it is moved, and keeps its side.
        (FaceBox(0, 30, 40, 74), 0.0, (0, 30, 44)),
        (FaceBox(150, 80, 200, 120), 0.1, (140, 60, 60)),
        # Larger than the picture: the whole height, around the middle of the face.
        (FaceBox(40, -20, 140, 140), 0.0, (30, 0, 120)),
    ],
)
def test_squares_by_hand(box: FaceBox, margin: float, expected: tuple[int, int, int]) -> None:
    assert square_around(box, margin, width_px=200, height_px=120) == expected


@pytest.mark.parametrize("box", [(-9, 5, 0, 9), (200, 5, 210, 9), (5, -9, 9, -1), (5, 120, 9, 130)])
def test_a_box_outside_the_picture_has_no_square(box: tuple[float, ...]) -> None:
    assert square_around(FaceBox(*box), 0.2, width_px=200, height_px=120) is None


@given(
    width=st.integers(1, 400), height=st.integers(1, 400),
    x=st.floats(-200, 600), y=st.floats(-200, 600),
    w=st.floats(0.1, 500), h=st.floats(0.1, 500), margin=st.floats(0, 2),
)  # fmt: skip
def test_a_square_lies_within_its_picture_and_holds_the_face(
    width: int, height: int, x: float, y: float, w: float, h: float, margin: float
) -> None:
    box = FaceBox(x, y, x + w, y + h)
    square = square_around(box, margin, width, height)
    overlaps = x < width and y < height and x + w > 0 and y + h > 0
    assert (square is not None) == overlaps
    if square is None:
        return
    assert 0 <= square.left <= width - square.side
    assert 0 <= square.top <= height - square.side
    wanted = max(w, h) * (1 + 2 * margin)
    assert abs(square.side - min(wanted, width, height)) <= 1
    # Where the square is as large as wanted, all of the face that the picture shows is in it.
    if square.side >= wanted:
        assert square.left <= max(x, 0) + 1
        assert square.top <= max(y, 0) + 1
        assert square.left + square.side >= min(x + w, width) - 1
        assert square.top + square.side >= min(y + h, height) - 1
    picture = np.zeros((height, width, 3), np.uint8)
    assert square.cut(picture).shape == (square.side, square.side, 3)


@given(
    indices=st.lists(st.integers(0, 300), min_size=1, unique=True).map(sorted),
    index=st.integers(0, 300),
)
def test_a_frame_without_a_face_takes_the_nearest_box(indices: list[int], index: int) -> None:
    boxes = tuple(FaceBox(i, i, i + 1, i + 1) for i in indices)
    track = FaceTrack(tuple(indices), boxes, 301)
    # min takes the first of equals: the earlier frame.
    assert track.nearest(index).left == min(indices, key=lambda i: abs(i - index))


# ---- OpenFace's tables ------------------------------------------------------------------------------

AXES = [f"{axis}_{n}" for axis in "xy" for n in range(68)]


def table_of(
    path: Path, boxes: Sequence[tuple[float, float, float, float] | None], face_id: int = 0
) -> Path:
    """Write a table as FeatureExtraction -2Dfp does, one face whose landmarks fill each box."""
    lines = [", ".join(["frame", "face_id", "timestamp", "confidence", "success", *AXES])]
    for number, box in enumerate(boxes):
        cells = [str(number + 1), str(face_id), f"{number / 25:.3f}"]
        cells += ["0.98", "1"] if box else ["0.02", "0"]
        left, top, right, bottom = box or (0, 0, 0, 0)
        share = np.linspace(0, 1, 68)
        cells += [f"{value:.1f}" for value in left + share * (right - left)]
        cells += [f"{value:.1f}" for value in top + share[::-1] * (bottom - top)]
        lines.append(", ".join(cells))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def test_the_box_is_around_all_landmarks_where_a_face_was_found(tmp_path: Path) -> None:
    table = table_of(tmp_path / "t.csv", [None, (10, 20, 50, 80), None, (12, 20, 52, 80)])
    track = read_track(table)
    assert track == FaceTrack((1, 3), (FaceBox(10, 20, 50, 80), FaceBox(12, 20, 52, 80)), 4)


def test_of_two_faces_the_one_that_is_there_longer(tmp_path: Path) -> None:
    a = table_of(tmp_path / "a.csv", [(1, 1, 9, 9), None, None]).read_text()
    b = table_of(tmp_path / "b.csv", [(20, 20, 30, 30), (21, 20, 31, 30), None], face_id=1)
    both = tmp_path / "both.csv"
    both.write_text(a + "".join(b.read_text().splitlines(keepends=True)[1:]))
    assert read_track(both).indices == (0, 1)
    assert read_track(both).boxes[0] == (20, 20, 30, 30)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda text: text.replace("x_67", "x_68"), r"'x_67' is missing.*wrote with -2Dfp"),
        (lambda text: text.replace("success", "sucess"), r"'success' is missing.*mean 'sucess'"),
        (lambda text: text[:-40], r"line \d: \d+ cells, the header has 141"),
        (lambda text: text.replace(" 20.0,", " nan,"), r"y_\d+ is 'nan'"),
        (lambda text: text.splitlines()[0] + "\n", "holds no frames"),
    ],
)
def test_damaged_tables(tmp_path: Path, change: object, problem: str) -> None:
    table = table_of(tmp_path / "t.csv", [(10, 20, 50, 20.1)] * 3)
    table.write_text(change(table.read_text()))  # type: ignore[operator]
    with pytest.raises(SchemaError, match=problem):
        read_track(table)


def test_landmarks_on_one_line_are_no_face(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="on one line"):
        read_track(table_of(tmp_path / "t.csv", [(10, 20, 10, 80)]))


# ---- from a file to cut pictures --------------------------------------------------------------------


TIGHT = FaceCrop(margin=0.1)


def request(crop: FaceCrop | None = TIGHT, n_frames: int = 4, size_px: int = 32) -> InputRequest:
    return InputRequest(
        stream="video", frames="uniform", n_frames=n_frames, size_px=size_px,
        interpolation="bilinear", crop=crop,
    )  # fmt: skip


AUDIO = InputRequest(stream="audio", window_s=30.0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pictures of 96 x 64."""
    return write(tmp_path_factory.mktemp("clip") / "clip.mp4", n=20)


def prepare(path: Path, faces: FaceFinder | None, *requests: InputRequest) -> ClipInputs:
    return prepare_inputs(path, file_sha256(path), f"m/{path.name}", requests, faces=faces)


def cut_by_pillow(path: Path, boxes: dict[int, tuple[int, int, int, int]]) -> np.ndarray:
    """Four uniform frames of twenty, cut and resized by Pillow alone."""
    found = decode(path, want_audio=False, frame_choices=[FrameRequest("uniform", 4)])
    pictures = [
        Image.fromarray(found.frames[i]).crop(box).resize((32, 32), Image.Resampling.BILINEAR)
        for i, box in boxes.items()
    ]
    return np.stack([np.asarray(picture) for picture in pictures])


def test_frames_are_cut_to_the_face_then_resized(clip: Path, tmp_path: Path) -> None:
    # 20 pixels and 0.1 on each side: 24. Frame 7 has no face: the nearest with one is 6.
    boxes = [(10 + i, 20, 30 + i, 40) if i != 7 else None for i in range(20)]
    table = table_of(tmp_path / "t.csv", boxes)
    inputs = prepare(clip, FromTable(table), request(), request(None))
    cut, whole = inputs.streams
    assert cut.index == whole.index == (2, 7, 12, 17)
    expected = cut_by_pillow(
        clip,
        {i: (8 + j, 18, 32 + j, 42) for i, j in ((2, 2), (7, 6), (12, 12), (17, 17))},
    )
    assert cut.array is not None
    np.testing.assert_array_equal(inputs.arrays[cut.array], expected)
    assert whole.array != cut.array


def test_equal_crops_share_their_pictures_others_do_not(clip: Path, tmp_path: Path) -> None:
    finder = FromTable(table_of(tmp_path / "t.csv", [(10, 20, 30, 40)] * 20))
    wider = request(FaceCrop(margin=0.5))
    inputs = prepare(clip, finder, request(), request(), wider)
    assert [stream.array for stream in inputs.streams] == [0, 0, 1]


def test_a_clip_without_any_face_is_absent_and_says_why(clip: Path, tmp_path: Path) -> None:
    finder = FromTable(table_of(tmp_path / "t.csv", [None] * 20))
    faces, whole = prepare(clip, finder, request(), request(None)).streams
    assert (faces.status, faces.failure) == ("absent", None)
    assert faces.remark == "no face in the 20 frames that openface looked at"
    assert whole.status == "ok"


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (None, "nothing says where the face is: give --faces DIR"),
        (FaceOrder(problem="no table, looked for a.csv"), "no table, looked for a.csv"),
        (FaceOrder(table="none.csv"), "none.csv: the OpenFace table cannot be read"),
    ],
)
def test_no_boxes_fail_the_face_alone(clip: Path, order: FaceOrder | None, words: str) -> None:
    faces, whole = prepare(clip, finder_of(order), request(), request(None)).streams
    assert faces.failure is not None
    assert faces.failure.kind == "faces"
    assert words in faces.failure.message
    assert kind_of(faces.failure.reason) == "faces"
    assert whole.status == "ok"


def test_boxes_of_another_picture_fail(clip: Path, tmp_path: Path) -> None:
    finder = FromTable(table_of(tmp_path / "t.csv", [(300, 20, 340, 60)] * 20))
    (faces,) = prepare(clip, finder, request()).streams
    assert faces.failure is not None
    assert "frame 2 is at (300, 20, 340, 60), outside the picture of 96 x 64" in (
        faces.failure.message
    )


def test_sound_and_whole_frames_need_no_faces(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "s.wav", np.zeros(1600, np.int16), 16_000)
    audio, faces = prepare(path, None, AUDIO, request()).streams
    assert (audio.status, faces.status, faces.remark) == ("ok", "absent", None)


# ---- a detector of one's own ------------------------------------------------------------------------

DETECTOR = '''
import os
import numpy as np

class Brightest:
    """Finds the box of the pixels above 200 in all channels; a dark picture has no face."""
    name = "brightest"
    def boxes(self, frames):
        return [self._box(frame) for frame in frames]
    def _box(self, frame):
        y, x = (frame.min(-1) > 200).nonzero()
        return (x.min(), y.min(), x.max() + 1, y.max() + 1) if len(x) else None

class Fails(Brightest):
    def boxes(self, frames):
        raise RuntimeError("out of coffee")

class Short(Brightest):
    def boxes(self, frames):
        return []

class Odd(Brightest):
    def boxes(self, frames):
        return [(9, 9, 3, 3)] * len(frames)

class Dies(Brightest):
    def boxes(self, frames):
        os.abort()

class Nameless:
    def boxes(self, frames):
        return []

ready = Brightest()
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with detectors, importable here and in child processes."""
    (tmp_path / "faces_of_ours.py").write_text(DETECTOR)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "faces_of_ours", raising=False)
    return "faces_of_ours"


def test_a_detector_sees_the_chosen_frames_in_their_order(clip: Path) -> None:
    seen: list[list[Picture]] = []

    class Notes:
        name = "notes"

        def boxes(self, frames: Sequence[Picture]) -> Sequence[Sequence[float] | None]:
            seen.append(list(frames))
            return [None, (10, 20, 30, 40), None, (50, 20, 70, 40)]

    inputs = prepare(clip, FromDetector(Notes()), request(), request(None))
    stream = inputs.streams[0]
    assert stream.array is not None
    found = decode(clip, want_audio=False, frame_choices=[FrameRequest("uniform", 4)])
    assert len(seen) == 1
    for shown, index in zip(seen[0], (2, 7, 12, 17), strict=True):
        np.testing.assert_array_equal(shown, found.frames[index])
    first, second = (8, 18, 32, 42), (48, 18, 72, 42)
    # Frame 12 lies as far from 7 as from 17: the earlier one's box.
    expected = cut_by_pillow(clip, {2: first, 7: first, 12: first, 17: second})
    np.testing.assert_array_equal(inputs.arrays[stream.array], expected)


def test_what_is_cut_for_one_spec_does_not_depend_on_another(clip: Path) -> None:
    """Boxes of frames that another spec wants, too, would make tokens depend on their company."""

    class OnlyFirst:
        name = "only-first"

        def boxes(self, frames: Sequence[Picture]) -> Sequence[Sequence[float] | None]:
            return [(len(frames), 0, 40, 40), *[None] * (len(frames) - 1)]

    four, two = request(), request(n_frames=2)
    together = prepare(clip, FromDetector(OnlyFirst()), four, two)
    for number, one in enumerate((four, two)):
        alone = prepare(clip, FromDetector(OnlyFirst()), one)
        array = together.streams[number].array
        assert array is not None
        np.testing.assert_array_equal(together.arrays[array], alone.arrays[0])


@pytest.mark.fault("a user's detector of boxes fails on a clip")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Fails", "the detector Fails: RuntimeError: out of coffee"),
        ("Short", "gave 0 boxes for 4 frames"),
        ("Odd", "gave the box (9, 9, 3, 3); a box is left < right"),
    ],
)
def test_a_detector_that_fails_costs_the_faces_of_this_clip(
    clip: Path, module: str, name: str, words: str
) -> None:
    finder = finder_of(FaceOrder(detector=f"{module}:{name}"))
    faces, whole = prepare(clip, finder, request(), request(None)).streams
    assert faces.failure is not None
    assert faces.failure.kind == "faces"
    assert words in faces.failure.message
    assert whole.status == "ok"


def test_tables_and_detectors_work_in_decoder_processes(
    clip: Path, tmp_path: Path, module: str
) -> None:
    table = table_of(tmp_path / "t.csv", [(10, 20, 30, 40)] * 20)
    digest, requests = file_sha256(clip), (request(), request(None))
    with DecodePool(1, detector=f"{module}:Brightest") as pool:
        for order in (FaceOrder(table=str(table)), FaceOrder(detector=f"{module}:Brightest")):
            job = DecodeJob(clip, digest, "m/clip.mp4", requests, faces=order)
            there = pool.submit(job).result()
            here = prepare(clip, finder_of(order), *requests)
            assert isinstance(there, ClipInputs)
            assert there.streams == here.streams
            assert [s.status for s in there.streams] == ["ok", "ok"]
            for one, other in zip(there.arrays, here.arrays, strict=True):
                np.testing.assert_array_equal(one, other)


@pytest.mark.fault("a user's detector of boxes kills its process")
def test_a_detector_that_kills_its_process_costs_this_clip(clip: Path, module: str) -> None:
    job = DecodeJob(
        clip, file_sha256(clip), "m/clip.mp4", (request(),),
        faces=FaceOrder(detector=f"{module}:Dies"),
    )  # fmt: skip
    with DecodePool(1, detector=f"{module}:Dies", attempts=1) as pool:
        found = pool.submit(job).result()
    assert isinstance(found, DecodeFailure)
    assert (found.failure.kind, found.exit_signal) == ("crash", "SIGABRT")


@pytest.mark.slow
def test_a_detector_that_does_not_load_stops_the_run(clip: Path) -> None:
    job = DecodeJob(clip, file_sha256(clip), "m/clip.mp4", (request(),))
    with (
        DecodePool(1, detector="no_such_module:Finder") as pool,
        pytest.raises(ExtractionStopped, match="no_such_module"),
    ):
        pool.submit(job).result()


# ---- what an extraction is told ---------------------------------------------------------------------

MAE = MaeEncoder(width=32, depth=1, n_heads=4, mlp_width=64)
WHOLE = TokenSpec(
    stream="video", encoder=MAE, frames=Frames(kind="uniform", n_frames=4),
    pixels=Pixels(size_px=32), utterance=True,
)  # fmt: skip
FACES = WHOLE.model_copy(update={"crop": FaceCrop()})


def test_where_faces_come_from_must_fit_the_specs(tmp_path: Path, module: str) -> None:
    assert face_source([WHOLE], None) is None
    assert face_source([WHOLE], "no/such/folder") is None
    source = face_source([WHOLE, FACES], str(tmp_path))
    assert source is not None
    assert (source.name, source.given) == ("openface", str(tmp_path.resolve()))
    newer = FACES.model_copy(update={"crop": FaceCrop(by="openface-2.2")})
    named = face_source([newer], f"openface-2.2={tmp_path}")
    assert named is not None
    assert (named.name, named.title) == ("openface-2.2", tmp_path.name)
    assert open_faces(named.given) == named, "workers are told the same"
    theirs = FACES.model_copy(update={"crop": FaceCrop(by="brightest")})
    found = face_source([theirs], f"{module}:Brightest")
    assert found is not None
    assert found.of(record("c/1", "1.mp4")) == FaceOrder(detector=f"{module}:Brightest")
    assert face_source([theirs], f"{module}:ready") is not None
    for specs, told, words in (
        ([FACES], None, "found by 'openface', and nothing says where they are. Give --faces DIR"),
        ([FACES], f"{module}:Brightest", r"gives faces found by 'brightest', .* by 'openface'"),
        ([FACES, theirs], str(tmp_path), "several sources need an extraction each"),
        (
            [newer],
            str(tmp_path),
            r"found by 'openface', .* by 'openface-2.2'.*NAME=DIR names a folder",
        ),
        ([FACES], f"openface-2.2={tmp_path}", r"found by 'openface-2.2', .* by 'openface'"),
        ([newer], "openface-2.2=no/such", "no such folder"),
        ([FACES], "no/such/folder", "no such folder. Give the folder of OpenFace's tables"),
        ([FACES], f"{module}:Brihgtest", "has no 'Brihgtest'. Did you mean 'Brightest'"),
        ([FACES], "no_such_module:X", "the module does not import"),
        ([FACES], f"{module}:Nameless", "a Nameless is no detector"),
        ([FACES], f"{module}:np", "is no detector; one has a text `name`"),
    ):
        with pytest.raises(SchemaError, match=words):
            face_source(specs, told)


def record(uid: str, media: str, digest: str = "ab") -> Record:
    return Record(uid=uid, media=media, clip=Clip(sha256=digest * 32, n_bytes=1))


def test_tables_are_found_by_source_id_path_or_name_and_belong_to_one_clip(tmp_path: Path) -> None:
    for name in ("one.csv", "train/two.csv", "three.csv"):
        table_of(tmp_path / name, [None])
    source = open_faces(str(tmp_path))
    by_id, by_path = record("c/one", "x/1.mp4"), record("c/2", "train/two.mp4", "cd")
    by_name, without = record("c/3", "deep/three.avi", "ef"), record("c/4", "four.mp4", "01")
    told = [source.of(one) for one in (by_id, by_path, by_name, without)]
    names = [None if one.table is None else Path(one.table).name for one in told]
    assert names == ["one.csv", "two.csv", "three.csv", None]
    assert told[3].problem is not None
    assert told[3].problem.endswith("looked for 4.csv, four.csv")
    found = check_tables(source, [by_id, by_path, by_name, without])
    assert (found.n_records, found.n_missing, found.first) == (4, 1, "c/4")
    same_bytes = record("d/9", "other/three.mp4", "ef")
    assert check_tables(source, [by_name, same_bytes]).n_missing == 0
    with pytest.raises(SchemaError, match=r"the table of 'deep/three\.avi' and of 'b/three\.mp4'"):
        check_tables(source, [by_name, record("d/8", "b/three.mp4", "23")])


def test_a_table_outside_the_folder_is_nobodys(tmp_path: Path) -> None:
    table_of(tmp_path / "secret.csv", [None])
    (tmp_path / "tables").mkdir()
    source = open_faces(str(tmp_path / "tables"))
    assert source.of(record("c/../secret", "x.mp4")).table is None


# ---- the demo corpus and whole extractions ----------------------------------------------------------


def test_drawn_faces_have_their_landmarks_where_they_are_drawn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        face = sample_face(rng)
        points, known = openface_landmarks(face), face_landmarks(face)
        assert points.shape == (68, 2)
        # Inner end, middle and outer end of the left and right brow, corners of the mouth, lips.
        by_name = {21: 0, 19: 1, 17: 2, 22: 5, 24: 6, 26: 7, 48: 10, 54: 11, 51: 12, 57: 13}
        for ours, theirs in by_name.items():
            np.testing.assert_allclose(points[ours], known[theirs], atol=1e-6)
        upright = openface_landmarks(replace(face, tilt=0.0))
        eyes = upright[36:48].mean(axis=0)[1]
        assert upright[17:27].mean(axis=0)[1] < eyes < upright[30][1] < upright[48][1]
        assert upright[48][1] < upright[8][1], "the chin is lowest"
        centre = np.array([0.5 + face.head_x, 0.5 + face.head_y])
        chin = (upright[8] - centre) / face.head_scale
        np.testing.assert_allclose(chin, [0, 1], atol=1e-6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo_corpus(folder, n_clips=4)
    write_demo_faces(folder)
    media = folder / "media"
    given = ["--labels", str(folder / "labels.csv"), "--out", str(folder / "m.parquet")]
    assert emocache.main(["index", str(media), *given]) == 0
    return folder


def test_demo_tables_cover_each_frame_of_each_clip_and_stay(corpus: Path) -> None:
    rows = plan_demo(4, 0)
    for row in rows:
        track = read_track(corpus / "faces" / row.file.replace(".mp4", ".csv"))
        assert track.indices == tuple(range(row.n_frames))
        widths = [box.right - box.left for box in track.boxes]
        assert 0.4 * FRAME_PX < min(widths) <= max(widths) < 0.8 * FRAME_PX
    table = corpus / "faces" / "clip_0000.csv"
    assert table.read_text().splitlines()[2].startswith(f"2, 0, {1 / FPS:.3f}, 0.98, 1, ")
    table.write_text("kept")
    write_demo_faces(corpus)
    assert table.read_text() == "kept"
    table.unlink()
    write_demo_faces(corpus)
    assert read_track(table).n_frames == rows[0].n_frames


def test_demo_tables_need_a_demo_corpus(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="holds no demo corpus"):
        write_demo_faces(tmp_path)
    (tmp_path / "demo.json").write_text('{"generator": 0, "n_clips": 3, "seed": 0}')
    with pytest.raises(SchemaError, match="generator 0, this one is 1"):
        write_demo_faces(tmp_path)


@pytest.fixture(scope="module")
def mae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(MAE, tmp_path_factory.mktemp("mae"))


def test_stored_face_tokens_are_those_of_the_cut_pictures(
    corpus: Path, mae: Path, tmp_path: Path
) -> None:
    """The whole command against cropping by Pillow and the encoder by hand."""
    specs = tmp_path / "specs.json"
    told = {"face": FACES.model_dump(mode="json"), "whole": WHOLE.model_dump(mode="json")}
    specs.write_text(json.dumps(told))
    given = ["extract", "--specs", str(specs), "--manifest", str(corpus / "m.parquet")]
    given += ["--store", str(tmp_path / "s"), "--encoder-weights", f"mae={mae}"]
    assert emocache.main([*given, "--faces", str(corpus / "faces")]) == 0
    bank = EncoderBank([FACES, WHOLE], {"mae": mae})
    store = TokenStore.open(tmp_path / "s")
    records = read_manifest(corpus / "m.parquet").records
    assert len(records) == 4
    faces, whole = bank.specs
    (commit, *_) = store.commits(faces)
    assert commit.provenance["faces"] == "faces"
    assert all("faces" not in commit.provenance for commit in store.commits(whole))
    for one in records[:2]:
        stored = store.read(faces, one.sha256).tokens
        assert not np.allclose(stored, store.read(whole, one.sha256).tokens, atol=1e-2)
        path = corpus / "media" / Path(one.media).name
        found = decode(path, want_audio=False, frame_choices=[FrameRequest("uniform", 4)])
        track = read_track(corpus / "faces" / f"{path.stem}.csv")
        cut = []
        for index in found.choices[0].indices:
            left, top, right, bottom = track.boxes[index]
            side = int(max(right - left, bottom - top) * 1.4 + 0.5)
            x, y = ((a + b) / 2 - side / 2 for a, b in ((left, right), (top, bottom)))
            x, y = (min(max(int(np.floor(v + 0.5)), 0), FRAME_PX - side) for v in (x, y))
            picture = Image.fromarray(found.frames[index]).crop((x, y, x + side, y + side))
            cut.append(np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)))
        (expected,) = bank.encode(faces, [EncoderInput(np.stack(cut), tuple(range(4)))])
        np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=2e-3)


def test_a_picture_of_the_crop_shows_the_face_of_the_drawn_clip() -> None:
    """By colour: little of the wall is left in a tight crop."""
    row = plan_demo(6, 0)[0]
    frame = next(make_frames(row, 0)).astype(int)
    corner = frame[:6, :6].reshape(-1, 3).mean(axis=0)
    points = (
        openface_landmarks(drawn_faces(row, np.random.default_rng([0, row.index, 1]))[0]) * FRAME_PX
    )
    box = FaceBox(*points.min(axis=0), *points.max(axis=0))
    square = square_around(box, 0.0, FRAME_PX, FRAME_PX)
    assert square is not None

    def background(picture: np.ndarray) -> float:
        return float((np.abs(picture - corner).max(axis=-1) < 40).mean())

    assert background(frame) > 0.2
    assert background(square.cut(frame)) < 0.5 * background(frame)


def test_face_tokens_without_tables_are_refused_before_anything_is_written(
    corpus: Path, mae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    specs = tmp_path / "specs.json"
    specs.write_text(json.dumps({"face": FACES.model_dump(mode="json")}))
    given = ["extract", "--specs", str(specs), "--manifest", str(corpus / "m.parquet")]
    given += ["--store", str(tmp_path / "s"), "--encoder-weights", f"mae={mae}"]
    assert emocache.main(given) == 2
    assert "nothing says where they are" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "few").mkdir()
    first = corpus / "faces" / "clip_0000.csv"
    (tmp_path / "few" / first.name).write_text(first.read_text())
    assert emocache.main([*given, "--faces", str(tmp_path / "few")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "3 of 4 clips have no table of their face" in said
    assert not (tmp_path / "s").exists()


def test_missing_tables_fail_and_are_retried_when_they_came(
    corpus: Path, mae: Path, tmp_path: Path
) -> None:
    bank = EncoderBank([FACES], {"mae": mae})
    manifest = read_manifest(corpus / "m.parquet")
    (spec,) = bank.specs
    folder = tmp_path / "faces"
    folder.mkdir()
    for table in sorted((corpus / "faces").glob("*.csv"))[1:]:
        (folder / table.name).write_text(table.read_text())
    nobody = table_of(folder / "clip_0003.csv", [None] * 40)
    store = TokenStore.open_or_create(tmp_path / "s")
    plan = make_plan(manifest.records, bank.specs, store)
    extract(plan, manifest.records, bank, store, corpus / "media", faces=str(folder))
    entries = {Path(r.media).stem: store.entry(spec, r.sha256) for r in manifest.records}
    assert entries["clip_0000"].status is Status.FAILED
    assert kind_of(entries["clip_0000"].reason) == "faces"
    assert entries["clip_0003"].status is Status.ABSENT
    assert entries["clip_0003"].reason == "no face in the 40 frames that openface looked at"
    assert entries["clip_0001"].status is entries["clip_0002"].status is Status.OK
    assert nobody.exists()
    assert verify(store, manifest.records).is_whole, "a clip without a face contradicts no manifest"
    (folder / "clip_0000.csv").write_text((corpus / "faces" / "clip_0000.csv").read_text())
    again = make_plan(manifest.records, bank.specs, store, retry=["faces"])
    assert again.n_missing == 1
    extract(again, manifest.records, bank, store, corpus / "media", faces=str(folder))
    first = next(r for r in manifest.records if Path(r.media).stem == "clip_0000")
    assert store.entry(spec, first.sha256).status is Status.OK


@pytest.fixture(scope="module")
def choices(corpus: Path, tiny_weights: dict[str, Path]) -> tuple[Preset, EncoderBank]:
    """The demo with all that an extraction may choose beyond it: faces, a window, a padded sound."""
    settings = [
        "tokens.video.crop={margin: 0.3}",
        "tokens.video.frames.kind=window",
        "tokens.audio.encoder.padded=true",
    ]
    preset = configure(demo(), settings)
    return preset, EncoderBank(preset.tokens.all(), tiny_weights)


def test_a_raw_clip_is_seen_as_extraction_sees_it_and_can_be_checked(
    corpus: Path, choices: tuple[Preset, EncoderBank], tmp_path: Path
) -> None:
    preset, bank = choices
    manifest = read_manifest(corpus / "m.parquet")
    records, faces = manifest.records[:1], str(corpus / "faces")
    store = TokenStore.open_or_create(tmp_path / "s")
    plan = make_plan(records, bank.specs, store)
    extract(plan, records, bank, store, corpus / "media", faces=faces, batch_tokens=1)
    source = face_source(bank.specs, faces)
    path = corpus / "media" / Path(records[0].media).name
    with ClipReader(preset, bank, faces=source) as reader:
        seen = reader.read(path, corpus="demo")
    blind = configure(preset, ["data.failed=mask"])
    with ClipReader(blind, bank) as reader:
        unseen = reader.read(path, corpus="demo")
    with ClipReader(preset, bank) as reader, pytest.raises(MediaError, match="give --faces DIR"):
        reader.read(path, corpus="demo")
    empty = tmp_path / "empty"
    table_of(empty / f"{path.stem}.csv", [None] * 9)
    with ClipReader(preset, bank, faces=open_faces(str(empty))) as reader:
        faceless = reader.read(path, corpus="demo")
    for name, spec in reader.specs.items():
        stored = store.read(spec, records[0].sha256).tokens
        live = seen.streams[name].tokens
        assert live is not None
        np.testing.assert_array_equal(live, stored)
    assert seen.streams["audio"].tokens is not None
    assert len(seen.streams["audio"].tokens) == 1500
    assert unseen.streams["video"].status is Status.FAILED
    assert any("give --faces DIR" in remark for remark in unseen.remarks)
    assert faceless.remarks == (
        "No face in the 9 frames that openface looked at: the model answers from the rest.",
    )
    again = recheck(store, records, bank, corpus / "media", 1, faces=source)
    assert [one.passed for one in again] == [True, True, True]
    assert verify(store, records).is_whole


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("given", ["tables", "detector"])
def test_faces_reach_the_workers_of_other_processes(
    corpus: Path, mae: Path, tmp_path: Path, module: str, given: str
) -> None:
    by, faces = "openface", str(corpus / "faces")
    if given == "detector":
        by, faces = "brightest", f"{module}:Brightest"
    spec = FACES.model_copy(update={"crop": FaceCrop(by=by)})
    specs = tmp_path / "specs.json"
    specs.write_text(json.dumps({"face": spec.model_dump(mode="json")}))
    found = []
    for engine in ("inline", "local"):
        store = tmp_path / engine
        words = ["extract", "--specs", str(specs), "--manifest", str(corpus / "m.parquet")]
        words += ["--store", str(store), "--encoder-weights", f"mae={mae}", "--faces", faces]
        words += ["--engine", engine, "--workers", "1" if engine == "inline" else "2"]
        assert emocache.main([*words, "--unit-clips", "2"]) == 0
        opened = TokenStore.open(store)
        (resolved,) = opened.specs.values()
        entries = sorted(opened.index(resolved), key=lambda entry: entry.key)
        assert len(entries) == 4
        assert any(entry.status is Status.OK for entry in entries)
        found.append(
            [
                opened.read(resolved, e.key).tokens.tolist() if e.status is Status.OK else e.reason
                for e in entries
            ]
        )
    assert found[0] == found[1]


def test_a_plan_estimates_and_sizes_what_is_chosen(
    corpus: Path, choices: tuple[Preset, EncoderBank], tmp_path: Path
) -> None:
    _, bank = choices
    records = read_manifest(corpus / "m.parquet").records
    plan = make_plan(records, bank.specs, None)
    sound = next(
        label for spec, label in zip(plan.specs, plan.labels, strict=True) if spec.stream == "audio"
    )
    assert plan.n_bytes[sound] == 4 * 1500 * 64 * 2  # whole windows of float16, 64 wide
    config = WorkerConfig(
        store=str(tmp_path), manifest="", media_root="", specs=bank.specs, weights={}, job_id="J",
        generation=0, session="S", faces=str(corpus / "faces"),
    )  # fmt: skip
    found = calibrate(plan, bank, open_source(corpus / "media"), config, 2)
    assert len(found.encode_s) == 3, "faces are found, so they are timed, too"
