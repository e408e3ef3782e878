"""What endpoint models see and hear of a clip: the right frame, its aspect, the samples as they were."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import wave
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from cache.clip import Clip, Peak, Record, file_sha256
from extract.annotate.endpoints.questions import MediaPart
from extract.annotate.evidence.media import (
    MediaLimits,
    MediaReader,
    Sound,
    has_only_sound,
    wav_bytes,
)
from extract.decode import FrameRequest, decode
from extract.decode_pool import DecodePool
from tests.media import sine, stamp_of, write, write_clip, write_wav


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    """One decoder process for all tests."""
    with DecodePool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def reader(pool: DecodePool) -> MediaReader:
    return MediaReader(pool=pool)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 numbered pictures, 96 x 64, and 2.4 s of sound."""
    path = tmp_path_factory.mktemp("media") / "video.mp4"
    options = {"crf": "10"}
    return write(path, options=options, audio="aac", sound=sine(300, 2.4, 44100, 2))


def record_of(path: Path, *, peak: int | None = None, clip: Clip | None = None) -> Record:
    return Record(
        uid=f"corpus/{path.stem}",
        media=path.name,
        peak=None if peak is None else Peak(index=peak),
        clip=clip,
    )


def opened(jpeg: bytes | None) -> np.ndarray:
    assert jpeg is not None
    with Image.open(io.BytesIO(jpeg)) as picture:
        assert (picture.format, picture.mode) == ("JPEG", "RGB")
        return np.asarray(picture)


def samples_of(data: bytes) -> np.ndarray:
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


# ---- the frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize("peak", [0, 37, 59])
def test_the_picture_is_the_peak_frame(reader: MediaReader, video: Path, peak: int) -> None:
    picture = reader.read(record_of(video, peak=peak), video).picture
    assert picture.status == "ok"
    assert (picture.index, picture.is_peak) == (peak, True)
    assert picture.pts_s == pytest.approx(peak / 25, abs=1e-3)
    assert (picture.width_px, picture.height_px) == (96, 64)
    assert opened(picture.jpeg).shape == (64, 96, 3)
    assert stamp_of(opened(picture.jpeg)) == peak


def test_without_a_peak_it_is_the_middle_frame(
    reader: MediaReader, pool: DecodePool, video: Path
) -> None:
    picture = reader.read(record_of(video), video).picture
    assert (picture.index, picture.is_peak, stamp_of(opened(picture.jpeg))) == (30, False, 30)
    middle = MediaReader(MediaLimits(frame="middle"), pool=pool)
    assert middle.read(record_of(video, peak=7), video).picture == picture


def test_a_peak_outside_the_clip_fails_and_the_sound_does_not(
    reader: MediaReader, video: Path
) -> None:
    media = reader.read(record_of(video, peak=60), video)
    assert media.picture.status == "failed"
    assert media.picture.failure is not None
    assert media.picture.failure.kind == "undecodable"
    assert "60 frames, so 0 to 59 are allowed" in media.picture.failure.message
    assert media.picture.jpeg is None
    assert media.sound.status == "ok"


@pytest.mark.parametrize(("limit_px", "size"), [(96, (96, 64)), (48, (48, 32)), (31, (31, 21))])
def test_large_pictures_shrink_and_keep_their_aspect(
    pool: DecodePool, video: Path, limit_px: int, size: tuple[int, int]
) -> None:
    reader = MediaReader(MediaLimits(longest_side_px=limit_px), pool=pool)
    picture = reader.read(record_of(video, peak=3), video).picture
    assert (picture.width_px, picture.height_px) == size
    assert opened(picture.jpeg).shape == (size[1], size[0], 3)


def test_an_indexed_clip_and_one_that_is_not_give_the_same_picture(
    reader: MediaReader, video: Path
) -> None:
    clip = Clip(sha256=file_sha256(video), n_bytes=1, has_video=True, width_px=96, height_px=64)
    known = reader.read(record_of(video, peak=9, clip=clip), video)
    unknown = reader.read(record_of(video, peak=9), video)
    assert known.picture == unknown.picture
    assert known.sound.wav() == unknown.sound.wav()
    part = MediaPart.of("image/jpeg", known.picture.jpeg or b"")
    assert part.is_image


def test_still_pictures(reader: MediaReader, tmp_path: Path) -> None:
    path = tmp_path / "still.png"
    pixels = np.full((30, 50, 3), (200, 40, 90), np.uint8)
    Image.fromarray(pixels).save(path)
    media = reader.read(record_of(path), path)
    assert media.sound.status == "absent"
    assert (media.picture.index, media.picture.width_px, media.picture.height_px) == (0, 50, 30)
    assert np.abs(opened(media.picture.jpeg).astype(int) - pixels).max() <= 3


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("portrait.MOV", (320, 568)),
        ("friday.mp4", (640, 480)),
        ("carphone.mp4", (176, 144)),
        ("tears_long.webm", (800, 332)),
        ("face_no_surprise.jpg", (565, 1004)),
    ],
)
def test_real_pictures_lose_less_by_the_square_than_by_jpeg(
    reader: MediaReader, shared_clips: Path, name: str, size: tuple[int, int]
) -> None:
    path = shared_clips / name
    picture = reader.read(record_of(path), path).picture
    assert (picture.width_px, picture.height_px) == size
    frame = next(
        iter(decode(path, want_audio=False, frame_choices=[FrameRequest("middle")]).frames.values())
    )
    direct = io.BytesIO()
    Image.fromarray(frame).save(direct, "JPEG", quality=92, subsampling=0)
    assert picture.jpeg is not None
    loss = mean_square(opened(direct.getvalue()), frame)
    # Twice the error of the JPEG alone: the way there adds no more than that.
    assert mean_square(opened(picture.jpeg), frame) < 2 * loss


def mean_square(picture: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean((picture.astype(float) - other) ** 2))


# ---- the sound ------------------------------------------------------------------------------------


def test_16_bit_sound_comes_out_as_it_was(reader: MediaReader, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-(2**15), 2**15, 20_000).astype(np.int16)
    samples[:3] = (-(2**15), 2**15 - 1, 0)
    path = write_wav(tmp_path / "noise.wav", samples, 16000)
    media = reader.read(record_of(path), path)
    assert media.picture.status == "absent"
    assert (media.sound.status, media.sound.kept_s, media.sound.truncated) == ("ok", 1.25, False)
    assert np.array_equal(samples_of(media.sound.wav()), samples)


@pytest.mark.parametrize("name", ["emodb_03a07Wc.wav", "emodb_08a02Na.wav"])
def test_real_16_khz_sound_is_untouched(reader: MediaReader, shared_clips: Path, name: str) -> None:
    path = shared_clips / name
    with wave.open(str(path)) as file:
        original = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    assert np.array_equal(samples_of(reader.read(record_of(path), path).sound.wav()), original)


def test_long_sound_is_cut_and_flagged(pool: DecodePool, tmp_path: Path) -> None:
    samples = np.arange(48_000, dtype=np.int16)  # 3 s
    path = write_wav(tmp_path / "long.wav", samples, 16000)
    for limit_s, kept, truncated in (
        (2.5, 40_000, True),
        (3.0, 48_000, False),
        (None, 48_000, False),
    ):
        sound = MediaReader(MediaLimits(max_sound_s=limit_s), pool=pool).read(
            record_of(path), path
        ).sound  # fmt: skip
        assert np.array_equal(samples_of(sound.wav()), samples[:kept])
        assert (sound.duration_s, sound.truncated) == (3.0, truncated)
        assert sound.kept_s == kept / 16000


def test_real_sound_of_45_s(pool: DecodePool, shared_clips: Path) -> None:
    path = shared_clips / "commercial_mono.wav"
    sound = MediaReader(MediaLimits(max_sound_s=30.0), pool=pool).read(record_of(path), path).sound
    assert (sound.kept_s, sound.duration_s, sound.truncated) == (30.0, 45.3, True)
    assert len(sound.wav()) == 44 + 2 * 480_000


@given(st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=50))
def test_samples_round_to_the_nearest_and_clip(values: list[float]) -> None:
    written = samples_of(wav_bytes(np.array(values, np.float32)))
    for value, sample in zip(values, written.tolist(), strict=True):
        inside = min(max(32768 * value, -32768), 32767)
        assert abs(sample - inside) <= 0.5


def test_without_sound_there_is_no_wav() -> None:
    with pytest.raises(ValueError, match="its status is 'absent'"):
        Sound("absent").wav()


# ---- what goes wrong ------------------------------------------------------------------------------


def test_a_mute_video_has_no_sound(reader: MediaReader, tmp_path: Path) -> None:
    path = write(tmp_path / "mute.mp4", n=5)
    media = reader.read(record_of(path), path)
    assert (media.picture.status, media.sound.status) == ("ok", "absent")


def test_files_that_are_gone_changed_or_no_media(reader: MediaReader, tmp_path: Path) -> None:
    junk = tmp_path / "junk.mp4"
    junk.write_bytes(b"no media at all" * 100)
    found = {
        "missing": reader.read(record_of(tmp_path / "none.mp4"), tmp_path / "none.mp4"),
        "unreadable": reader.read(record_of(tmp_path / "x"), tmp_path),
        "undecodable": reader.read(record_of(junk), junk),
        "changed": reader.read(record_of(junk, clip=Clip(sha256="0" * 64, n_bytes=1)), junk),
    }
    for kind, media in found.items():
        for part in (media.picture, media.sound):
            assert part.status == "failed"
            assert part.failure is not None
            assert part.failure.kind == kind
            assert str(tmp_path) not in part.failure.message


DYING = """
import os, sys
import extract.inputs
from extract import decode_worker

decode = extract.inputs.decode

def faulty(path, **options):
    if path.stem == "deadly":
        print("I go", file=sys.stderr)
        os.abort()
    return decode(path, **options)

extract.inputs.decode = faulty
decode_worker.main()
"""


@pytest.mark.fault("a decoder dies of a clip that is annotated")
@pytest.mark.parametrize("indexed", [True, False])
def test_a_hostile_clip_costs_itself_alone(tmp_path: Path, video: Path, indexed: bool) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(DYING)
    deadly = write_clip(tmp_path / "deadly.mp4", seconds=0.2)
    clip = Clip(sha256=file_sha256(deadly), n_bytes=1) if indexed else None
    with MediaReader(command=(sys.executable, str(worker)), attempts=1) as reader:
        waiting = [
            reader.submit(record_of(path, clip=clip if path == deadly else None), path)
            for path in (video, deadly, video)
        ]
        first, second, third = (future.result() for future in waiting)
    assert first.picture.status == third.picture.status == "ok"
    assert second.picture.failure is not None
    assert second.picture.failure.kind == "crash"
    assert second.sound.failure == second.picture.failure
    assert second.evidence is not None
    assert second.evidence.exit_signal == "SIGABRT"
    assert "I go" in second.evidence.stderr_tail


@pytest.mark.fault("a reader is closed with clips in its queue")
def test_closing_gives_up_what_is_not_done(tmp_path: Path, video: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text("import time\ntime.sleep(60)\n")
    reader = MediaReader(command=(sys.executable, str(worker)))
    waiting = [reader.submit(record_of(video), video) for _ in range(3)]
    reader.close()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(timeout=20)


def test_a_lent_pool_is_not_closed(pool: DecodePool, video: Path) -> None:
    with MediaReader(pool=pool) as reader:
        assert reader.read(record_of(video), video).picture.status == "ok"
    assert MediaReader(pool=pool).read(record_of(video), video).picture.status == "ok"


def test_files_of_sound_alone_are_told(tmp_path: Path, video: Path) -> None:
    sound = write_wav(tmp_path / "a.wav", np.arange(4000, dtype=np.int16), 16000)
    (tmp_path / "junk").write_bytes(b"junk")
    assert has_only_sound(sound)
    assert not any(map(has_only_sound, (video, tmp_path / "junk", tmp_path / "none", tmp_path)))


@pytest.mark.parametrize(
    "limits", [{"longest_side_px": 8}, {"jpeg_quality": 100}, {"max_sound_s": 0}, {"frame": "last"}]
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MediaLimits(**limits)


def test_reading_media_needs_no_torch() -> None:
    code = "import extract.annotate.evidence.media, sys; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == 0
