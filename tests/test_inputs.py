"""Files to encoder inputs, against decode and Pillow called by hand, and the way between processes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import extract.inputs
from cache.clip import Clip, Peak, Record, file_sha256
from cache.errors import SchemaError
from cache.spec import Frames, TokenSpec
from extract.decode import decode
from extract.failures import Failure
from extract.inputs import ClipInputs, InputRequest, StreamInput, prepare_inputs, request_of
from extract.wire import read_document, read_inputs, write_inputs
from tests.media import sine, stamp_of, stamped, write, write_clip, write_wav

AUDIO = InputRequest(stream="audio", window_s=30.0)


def video(n_frames: int = 16, size_px: int = 96) -> InputRequest:
    return InputRequest(
        stream="video",
        frames="uniform",
        n_frames=n_frames,
        size_px=size_px,
        interpolation="bicubic",
    )


def image(size_px: int = 96, **changes: Any) -> InputRequest:
    data = {"frames": "middle", "size_px": size_px, "interpolation": "bicubic", **changes}
    return InputRequest(stream="image", **data)


def prepare(path: Path, *requests: InputRequest) -> ClipInputs:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return prepare_inputs(path, digest, f"clips/{path.name}", requests)


def statuses(inputs: ClipInputs) -> list[str]:
    return [stream.status for stream in inputs.streams]


def failure(inputs: ClipInputs, number: int = 0) -> Failure:
    found = inputs.streams[number].failure
    assert found is not None
    return found


# ---- requests ---------------------------------------------------------------------------------


def test_requests_of_specs(specs: dict[str, TokenSpec]) -> None:
    record = Record(
        uid="c/1", media="1.mp4", clip=Clip(sha256="ab" * 32, n_bytes=1), peak=Peak(index=7)
    )
    assert request_of(specs["audio"], record) == AUDIO
    found = request_of(specs["video"], record)
    assert (found.frames, found.n_frames, found.peak_index) == ("uniform", 16, None)
    assert specs["video"].pixels is not None
    assert found.size_px == specs["video"].pixels.size_px
    frames = specs["image"].frames
    assert frames is not None
    peak = specs["image"].model_copy(update={"frames": frames.model_copy(update={"kind": "peak"})})
    assert request_of(peak, record).peak_index == 7
    for clip in ("cd", "ef"):  # what does not depend on the record is the same for all of them
        other = Record(uid="c/2", media="2.mp4", clip=Clip(sha256=clip * 32, n_bytes=1))
        assert request_of(specs["image"], other) == request_of(specs["image"], record)


def test_a_window_lies_where_seed_and_digest_say(
    specs: dict[str, TokenSpec], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.mp4", n=50)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    record = Record(uid="c/1", media="a.mp4", clip=Clip(sha256=digest, n_bytes=1))
    found = []
    for seed in (42, 1):
        frames = Frames(kind="window", n_frames=16, seed=seed)
        request = request_of(specs["video"].model_copy(update={"frames": frames}), record)
        assert not specs["video"].uses_record()
        (stream,) = prepare(path, request).streams
        assert stream.index == tuple(range(stream.index[0], stream.index[0] + 16))
        # The first 8 bytes of SHA-256 over seed and digest, as 34 starts leave of them.
        drawn = hashlib.sha256(f"{seed}:{digest}".encode()).hexdigest()[:16]
        assert stream.index[0] == int(drawn, 16) % 34
        found.append(stream.index[0])
    assert request_of(specs["video"], record).draw is None


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"stream": "audio", "crop": {}}, "stream 'audio' has no .* crop"),
        ({"stream": "audio", "size_px": 96}, "stream 'audio' has no"),
        ({"stream": "video", "frames": "uniform", "size_px": 96}, "stream 'video' needs"),
    ],
)
def test_requests_that_contradict_themselves(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InputRequest(**data)


# ---- what a file gives ------------------------------------------------------------------------


def test_every_stream_of_a_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", n=50, audio="aac", sound=sine(300, 2.0, 44100, 2))
    inputs = prepare(path, AUDIO, video(), image(48))
    assert statuses(inputs) == ["ok", "ok", "ok"]
    sound, moving, still = (inputs.arrays[stream.array or 0] for stream in inputs.streams)
    decoded = decode(path, want_audio=True, frame_choices=[])
    assert decoded.audio is not None
    assert np.array_equal(sound, decoded.audio.waveform)
    assert inputs.audio_duration_s == decoded.audio.duration_s
    by_hand = tuple(int((i + 0.5) * 50 / 16) for i in range(16))
    assert inputs.streams[1].index == by_hand
    assert inputs.streams[1].pts_s == pytest.approx([i / 25 for i in by_hand], abs=1e-3)
    assert inputs.streams[1].pick == tuple(range(16))
    # At 96 px the width is untouched, so the number that each picture carries can be read.
    assert [stamp_of(picture) for picture in moving] == list(by_hand)
    assert inputs.streams[2].index == (25,)
    assert still.shape == (1, 48, 48, 3)
    small = Image.fromarray(stamped(25)).resize((48, 48), Image.Resampling.BICUBIC)
    assert np.abs(still[0].astype(int) - np.asarray(small)).mean() < 12  # lossy, but this one
    assert inputs.facts["container"] == "mov,mp4,m4a,3gp,3g2,mj2"
    assert (inputs.facts["width_px"], inputs.facts["height_px"]) == (96, 64)
    assert inputs.facts["video_codec"] == "h264"
    json.dumps(inputs.facts)


def test_a_short_clip_repeats_frames_by_pick(tmp_path: Path) -> None:
    inputs = prepare(write(tmp_path / "a.mp4", n=5), video())
    (stream,) = inputs.streams
    pictures = inputs.arrays[stream.array or 0]
    assert len(pictures) == 5
    assert stream.index == tuple(int((i + 0.5) * 5 / 16) for i in range(16))
    assert [stamp_of(pictures[row]) for row in stream.pick] == list(stream.index)


def test_equal_needs_share_one_array(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", n=20, audio="aac", sound=sine(300, 0.8, 44100, 2))
    bilinear = video().model_copy(update={"interpolation": "bilinear"})
    requests = (AUDIO, video(), image(), AUDIO, video(), image(48), bilinear, video(8))
    inputs = prepare(path, *requests)
    assert [stream.array for stream in inputs.streams] == [0, 1, 2, 0, 1, 3, 4, 5]
    assert len(inputs.arrays) == 6
    # The same frame, chosen in other words.
    inputs = prepare(path, image(frames="peak", peak_index=10), image(frames="middle"))
    assert [stream.array for stream in inputs.streams] == [0, 0]


def test_a_picture_is_an_image_without_video_and_sound(tmp_path: Path) -> None:
    Image.fromarray(stamped(3)).save(tmp_path / "a.png")
    inputs = prepare(tmp_path / "a.png", AUDIO, video(), image())
    assert statuses(inputs) == ["absent", "absent", "ok"]
    assert stamp_of(inputs.arrays[0][0]) == 3
    assert inputs.decoder == "pillow"
    assert inputs.audio_duration_s is None


def test_what_a_file_lacks_is_absent(tmp_path: Path) -> None:
    sound = write_wav(tmp_path / "a.wav", np.arange(1600, dtype=np.int16), 16000)
    assert statuses(prepare(sound, image(), AUDIO, video())) == ["absent", "ok", "absent"]
    assert statuses(prepare(write(tmp_path / "a.mp4", n=5), AUDIO, image())) == ["absent", "ok"]


# ---- what goes wrong --------------------------------------------------------------------------


def test_a_peak_outside_the_clip_fails_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", n=20)
    outside = image(frames="peak", peak_index=20)
    inputs = prepare(path, outside, image(frames="peak", peak_index=19), video())
    assert statuses(inputs) == ["failed", "ok", "ok"]
    assert failure(inputs).kind == "undecodable"
    assert "0 to 19 are allowed" in failure(inputs).message
    assert stamp_of(inputs.arrays[0][0]) == 19


def test_a_damaged_stream_fails_alone(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", np.zeros(0, np.int16), 16000)
    inputs = prepare(path, AUDIO, video())
    assert statuses(inputs) == ["failed", "absent"]
    assert failure(inputs).kind == "undecodable"
    assert "no samples that decode" in failure(inputs).message
    assert not inputs.arrays


def test_damage_passed_over_is_remarked(tmp_path: Path) -> None:
    sound = sine(300, 2.0, 44100, 2)
    path = write(tmp_path / "x.mpg", video="mpeg1video", n=50, audio="mp2", sound=sound)
    assert not any(stream.remark for stream in prepare(path, AUDIO, video()).streams)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3000] = bytes(3000)
    path.write_bytes(data)
    inputs = prepare(path, AUDIO, video())
    assert statuses(inputs) == ["ok", "ok"]
    assert any(stream.remark for stream in inputs.streams)


def test_kinds_of_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_clip(tmp_path / "whole.mp4")
    (tmp_path / "text.mp4").write_bytes(b"hello world\n" * 200)
    (tmp_path / "folder.mp4").mkdir()
    found = {
        "missing": prepare_inputs(tmp_path / "none.mp4", "00" * 32, "m/none.mp4", [AUDIO, image()]),
        "unreadable": prepare_inputs(tmp_path / "folder.mp4", "00" * 32, "m/folder.mp4", [AUDIO]),
        "changed": prepare_inputs(whole, "00" * 32, "m/whole.mp4", [AUDIO]),
        "undecodable": prepare(tmp_path / "text.mp4", AUDIO),
    }

    def broken(error: Exception) -> ClipInputs:
        def raises(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(extract.inputs, "decode", raises)
        return prepare(whole, AUDIO)

    found["unexpected"] = broken(TypeError("no such thing"))
    found["memory"] = broken(MemoryError())
    for kind, inputs in found.items():
        assert set(statuses(inputs)) == {"failed"}, kind
        assert failure(inputs).kind == kind
        assert str(tmp_path) not in failure(inputs).message, "the same on every machine"
    assert "m/none.mp4: there is no such file" in failure(found["missing"]).message
    assert "m/folder.mp4 cannot be read" in failure(found["unreadable"]).message
    assert "its digest differs" in failure(found["changed"]).message
    assert "clips/text.mp4: cannot be opened" in failure(found["undecodable"]).message
    assert failure(found["unexpected"]).message == "TypeError: no such thing"
    assert len(found["missing"].streams) == 2


def test_a_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path / "a") + b"\xff.mp4"))
    path.write_bytes(b"hello world\n" * 200)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    inputs = prepare_inputs(path, digest, "a?.mp4", [AUDIO])
    assert failure(inputs).kind == "undecodable"
    file = io.BytesIO()
    write_inputs(file, inputs)
    file.seek(0)
    assert read_inputs(file, [AUDIO]) == inputs


def test_decoding_needs_no_torch() -> None:
    code = "import sys, extract.inputs, extract.decode_worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- between processes ------------------------------------------------------------------------

REQUESTS = (AUDIO, video(4, 8), image(8), image(8), video(2, 8))


@pytest.fixture
def answer() -> ClipInputs:
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 8, 8, 3), np.uint8)
    times = (0.0, 0.1, 1 / 3, 1 / 3)
    return ClipInputs(
        [
            StreamInput("ok", remark="a gap: ü", array=0),
            StreamInput("ok", None, None, 1, (0, 4, 9, 9), times, (0, 1, 2, 2)),
            StreamInput("ok", None, None, 2, (3,), (-0.5,), (0,)),
            StreamInput("failed", Failure("undecodable", "peak_index 9 is outside")),
            StreamInput("absent"),
        ],
        [rng.standard_normal(1000).astype(np.float32), pictures, pictures[:1]],
        12.5,
        0.25,
        "pyav",
        {"container": "avi", "sizes": [1, 2.5, None]},
    )


def written(inputs: ClipInputs) -> bytes:
    file = io.BytesIO()
    write_inputs(file, inputs)
    return file.getvalue()


class OneByOne(io.BytesIO):
    """A pipe that gives little at a time."""

    def readinto(self, buffer: Any, /) -> int:
        return super().readinto(memoryview(buffer)[:7])


@pytest.mark.parametrize("kind", [io.BytesIO, OneByOne])
def test_what_is_written_is_read(answer: ClipInputs, kind: type[io.BytesIO]) -> None:
    data = written(answer)
    file = kind(data + b"next")
    found = read_inputs(file, REQUESTS)
    assert file.read() == b"next"
    assert found.streams == answer.streams
    for read, sent in zip(found.arrays, answer.arrays, strict=True):
        assert read.dtype == sent.dtype
        assert np.array_equal(read, sent)
        assert read.flags.writeable  # torch warns of others
    assert (found.audio_duration_s, found.decode_cpu_s, found.decoder, found.facts) == (
        12.5,
        0.25,
        "pyav",
        {"container": "avi", "sizes": [1, 2.5, None]},
    )
    # The format, by hand: magic, length, document, then float32 and bytes as they are.
    magic, length = struct.unpack("<4sI", data[:8])
    assert magic == b"EMOD"
    header = json.loads(data[8 : 8 + length])
    assert header["arrays"][0] == {"dtype": "float32", "shape": [1000]}
    assert data[8 + length :] == answer.arrays[0].astype("<f4").tobytes() + b"".join(
        array.tobytes() for array in answer.arrays[1:]
    )


def test_an_answer_that_breaks_off(answer: ClipInputs) -> None:
    data = written(answer)
    for size in (0, 3, 8, 100, len(data) - 1):
        with pytest.raises(EOFError, match=r"more bytes are needed"):
            read_inputs(io.BytesIO(data[:size]), REQUESTS)


def changed(answer: ClipInputs, change: Callable[[Any], None]) -> io.BytesIO:
    data = written(answer)
    (length,) = struct.unpack("<I", data[4:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    document = json.dumps(header).encode()
    return io.BytesIO(data[:4] + struct.pack("<I", len(document)) + document + data[8 + length :])


def setting(*path: Any, to: Any) -> Callable[[Any], None]:
    def change(header: Any) -> None:
        for step in path[:-1]:
            header = header[step]
        header[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting("arrays", 0, "dtype", to="object"), r"arrays\.0\.dtype"),
        (setting("arrays", 0, "dtype", to="float64"), r"arrays\.0\.dtype"),
        (setting("arrays", 0, "shape", to=[-1]), r"greater than 0"),
        (setting("arrays", 0, "shape", to=[]), r"at least 1 item"),
        (setting("arrays", 0, "shape", to=[1] * 5), r"at most 4 items"),
        (setting("arrays", 0, "shape", to=[2**62, 2**62]), r"at most 2147483648 are allowed"),
        (setting("arrays", 0, "shape", to=[2**29 + 1]), r"at most 2147483648 are allowed"),
        (setting("arrays", 0, "shape", to=[10, 100]), r"stream 0 of the answer contradicts"),
        (setting("arrays", 1, "dtype", to="float32"), r"stream 1 of the answer contradicts"),
        (setting("arrays", 1, "shape", to=[3, 8, 4, 6]), r"stream 1 of the answer contradicts"),
        (setting("streams", to=[]), r"5 streams were requested, 0 answered"),
        (setting("streams", 0, "status", to="fine"), r"streams\.0\.status"),
        (setting("streams", 0, "array", to=3), r"stream 0 of the answer contradicts"),
        (setting("streams", 0, "array", to=-1), r"stream 0 of the answer contradicts"),
        (setting("streams", 0, "array", to=None), r"stream 0 of the answer contradicts"),
        (setting("streams", 0, "status", to="absent"), r"stream 0 of the answer contradicts"),
        (setting("streams", 1, "pick", to=[0, 1, 2, 3]), r"stream 1 of the answer contradicts"),
        (setting("streams", 1, "pick", to=[0, 1, 2, -1]), r"stream 1 of the answer contradicts"),
        (setting("streams", 1, "index", to=[-4, 4, 9, 9]), r"stream 1 of the answer contradicts"),
        (setting("streams", 1, "pts_s", to=[0.0]), r"stream 1 of the answer contradicts"),
        (setting("streams", 1, "pts_s", 0, to=float("nan")), r"finite number"),
        (setting("streams", 2, "array", to=1), r"stream 2 of the answer contradicts"),
        (setting("streams", 3, "failure", to=None), r"stream 3 of the answer contradicts"),
        (setting("streams", 3, "failure", "kind", to="boredom"), r"failure\.kind"),
        (setting("more", to=1), r"unknown field 'more'"),
    ],
)
def test_a_wild_answer_is_refused(
    answer: ClipInputs, change: Callable[[Any], None], words: str
) -> None:
    with pytest.raises(SchemaError, match=words):
        read_inputs(changed(answer, change), REQUESTS)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"Segmentation fault\n", r"starts with b'Segmenta'"),
        (b"EMOD" + struct.pack("<I", 2**31) + b"{}", r"2147483648 bytes, at most 16777216"),
        (b"EMOD" + struct.pack("<I", 9) + b"\xff" * 9, r"does not decode"),
        (b"EMOD" + struct.pack("<I", 100_000) + b"[" * 100_000, r"does not decode"),
    ],
)
def test_noise_is_refused(data: bytes, words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        read_inputs(io.BytesIO(data), REQUESTS)


def test_read_document_does_not_touch_what_follows() -> None:
    file = io.BytesIO(b"EMOD" + struct.pack("<I", 2) + b"{}" + b"rest")
    assert read_document(file) == b"{}"
    assert file.read() == b"rest"


def test_sound_beyond_the_window_is_measured_and_not_carried(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples = rng.integers(-9000, 9000, 5 * 16_000).astype(np.int16)
    path = write_wav(tmp_path / "long.wav", samples, 16_000)
    sha256 = file_sha256(path)
    (whole,) = prepare_inputs(path, sha256, "long.wav", [InputRequest(stream="audio")]).arrays
    short = prepare_inputs(path, sha256, "long.wav", [InputRequest(stream="audio", window_s=2)])
    assert len(whole) == 5 * 16_000
    np.testing.assert_array_equal(short.arrays[0], whole[: 3 * 16_000])  # and a second to spare
    assert short.audio_duration_s == 5.0
