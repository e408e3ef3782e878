"""Decoding, on media made here and on the real clips in ../shared/clips where they are present.

Made pictures carry their own number as black and white blocks (`tests.media`), so that a wrong
frame shows without trusting any decoder.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cache.errors import MediaError
from extract.decode import Decoded, DecodeLimits, FrameRequest, decode, probe
from extract.media import Orientation
from extract.pictures import read_in_sequence
from tests.media import sine, stamp_of, stamped, write, write_wav

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
UNIFORM = FrameRequest("uniform", 16)
MIDDLE = FrameRequest("middle")


def everything(path: Path, **options: Any) -> Decoded:
    return decode(path, want_audio=True, frame_choices=[UNIFORM, MIDDLE], **options)


def smash(path: Path, kind: str) -> None:
    """Overwrite every packet of one kind of stream, leaving the container whole."""
    with av.open(str(path)) as container:
        at = [(p.pos, p.size) for p in container.demux() if p.size and p.stream.type == kind]
    data = bytearray(path.read_bytes())
    for position, size in at:
        assert position is not None
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)


# ---- pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec", "options", "decoder", "why"),
    [
        ("closed.mp4", "libx264", {"g": "20"}, "decord", "agrees"),
        ("closed.mkv", "libx264", {"g": "20"}, "decord", "agrees"),
        ("vp8.webm", "libvpx", {"g": "20", "deadline": "realtime"}, "decord", "agrees"),
        ("vp9.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime"}, "decord", "agrees"),
        ("open.mp4", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=20"}, "pyav", "IDR"),
        ("open.mkv", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=20"}, "pyav", "IDR"),
        ("refresh.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=20"}, "pyav", "IDR"),
        ("laced.mp4", "libx264", {"x264-params": "interlaced=1"}, "pyav", "interlaced"),
        ("mpeg4.mp4", "mpeg4", {"bf": "2", "g": "20", "b": "2M"}, "pyav", "codec mpeg4"),
        ("mpeg4.avi", "mpeg4", {"g": "20", "b": "2M"}, "pyav", "container avi"),
        ("mpeg2.mkv", "mpeg2video", {"bf": "2", "g": "15", "b": "2M"}, "pyav", "codec mpeg2"),
        ("mpeg1.mpg", "mpeg1video", {"bf": "2", "g": "15", "b": "2M"}, "pyav", "container mpeg"),
        ("stream.ts", "libx264", {"g": "20"}, "pyav", "container mpegts"),
    ],
)
def test_every_frame_is_the_frame_asked_for(
    tmp_path: Path, name: str, codec: str, options: dict[str, str], decoder: str, why: str
) -> None:
    pytest.importorskip("decord", reason="decord is not installed")
    path = write(tmp_path / name, video=codec, options=options)
    decoded = decode(path, want_audio=False, frame_choices=[UNIFORM, FrameRequest("uniform", 60)])
    assert decoded.video_outcome is not None
    assert decoded.video_outcome.status == "ok", decoded.video_outcome
    assert decoded.n_frames == 60
    assert {i: stamp_of(f) for i, f in decoded.frames.items()} == {i: i for i in range(60)}
    assert decoded.choices[0].indices[:3] == (1, 5, 9)
    times = np.array(decoded.choices[1].pts_s)
    assert np.abs(np.diff(times) - 0.04).max() < 0.0011  # Matroska counts in milliseconds.
    assert decoded.decoder == decoder
    assert why in str(decoded.decoder_reason)


def test_count_times_and_late_start(tmp_path: Path) -> None:
    path = write(tmp_path / "late.mp4", n=30, first_pts=25)
    decoded = everything(path)
    assert decoded.audio_outcome is not None
    assert decoded.audio_outcome.status == "absent"
    assert decoded.audio is None
    assert decoded.n_frames == 30
    assert decoded.choices[1].indices == (15,)
    assert decoded.choices[1].pts_s == pytest.approx((1.0 + 15 * 0.04,), abs=1e-3)
    assert set(decoded.frames) == set(decoded.choices[0].indices) | {15}
    assert decoded.frames[15].shape == (64, 96, 3)
    assert decoded.frames[15].dtype == np.uint8


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_pictures_are_as_displayed(tmp_path: Path, degrees: int, hflip: bool) -> None:
    path = write(tmp_path / "turned.mp4", n=5, rotation=(degrees, hflip))
    stored = stamped(2)
    expected = np.rot90(stored, degrees // 90)
    expected = expected[:, ::-1] if hflip else expected
    decoded = everything(path)
    picture = decoded.frames[2]
    assert picture.shape == expected.shape
    assert np.abs(picture.astype(int) - expected).mean() < 12  # Lossy, but the right way up.
    facts = probe(path)
    assert facts == decoded.facts
    assert (facts.height_px, facts.width_px) == expected.shape[:2]
    assert facts.mirrored == hflip
    assert facts.rotation_deg % 360 == degrees
    assert decoded.decoder != "decord" or not hflip


def test_orientations_are_consistent() -> None:
    picture, both = stamped(5), (False, True)
    for turn in (Orientation(t, x, y) for t in both for x in both for y in both):
        expected = np.rot90(picture, turn.rotation_deg // 90)
        expected = expected[:, ::-1] if turn.mirrored else expected
        assert np.array_equal(turn.apply(picture), expected), turn


def test_without_decord_pyav_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.mp4")
    before = everything(path)
    asked = everything(path, picture_decoder="pyav")
    assert (asked.decoder, asked.decoder_reason) == ("pyav", "the caller asked for it")
    monkeypatch.setitem(sys.modules, "decord", None)
    after = everything(path)
    assert asked.choices == after.choices
    assert after.decoder == "pyav"
    assert "cannot be imported" in str(after.decoder_reason)
    assert after.choices == before.choices
    assert all(np.array_equal(after.frames[i], before.frames[i]) for i in before.frames)


class _Batch(np.ndarray):
    def asnumpy(self) -> np.ndarray:
        return np.asarray(self)


def fake_decord(lie: str, pictures: dict[int, np.ndarray]) -> Any:
    """A decord that answers from the given pictures, but lies in one respect."""

    class Failure(Exception):
        pass

    class Reader:
        def __init__(self, path: str, num_threads: int) -> None:
            if lie == "fails":
                raise Failure("[18:45:44] /build/video_reader.cc:270: broken metadata")

        def __len__(self) -> int:
            return len(pictures) + (lie == "counts")

        def get_frame_timestamp(self, which: range) -> np.ndarray:
            times = np.arange(len(which), dtype=np.float32) * 0.04
            if lie == "times":
                times[0] = -1.8e17
            return np.stack([times, times + 0.04], -1)

        def get_batch(self, which: list[int]) -> _Batch:
            assert which[0] == 0
            shown = [pictures[min(i + (lie == "neighbour"), len(pictures) - 1)] for i in which]
            return np.stack(shown)[:, :: 2 if lie == "size" else 1].view(_Batch)

    return types.SimpleNamespace(
        VideoReader=Reader,
        logging=types.SimpleNamespace(set_level=lambda level: None, QUIET=0),
        DECORDError=Failure,
        DECORDLimitReachedError=Failure,
    )


@pytest.mark.parametrize(
    ("lie", "decoder", "words"),
    [
        ("none", "decord", "agrees"),
        ("fails", "pyav", "decord failed (Failure: broken metadata)"),
        ("counts", "pyav", "decord counts 61 pictures, the packets 60"),
        ("times", "pyav", "time stamps are off"),
        ("neighbour", "pyav", "first picture differs"),
        ("size", "pyav", "decord shows"),
    ],
)
def test_decord_is_not_believed_blindly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: str, decoder: str, words: str
) -> None:
    path = write(tmp_path / "a.mp4")
    truth = read_in_sequence(path, 0, set(range(60)), DecodeLimits()).frames
    monkeypatch.setitem(sys.modules, "decord", fake_decord(lie, truth))
    decoded = everything(path)
    assert decoded.decoder == decoder
    assert words in str(decoded.decoder_reason)
    assert {i: stamp_of(f) for i, f in decoded.frames.items()} == {i: i for i in decoded.frames}


def test_one_bad_request_does_not_lose_the_others(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", n=20)
    requests = [FrameRequest("peak", peak_index=20), FrameRequest("peak", peak_index=19), MIDDLE]
    decoded = decode(path, want_audio=False, frame_choices=requests)
    assert [c.indices for c in decoded.choices] == [(), (19,), (10,)]
    assert "0 to 19 are allowed" in str(decoded.choices[0].failure)
    assert sorted(decoded.frames) == [10, 19]
    assert decoded.audio_outcome is None


# ---- sound ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "audio", "tolerance"),
    [("a.wav", None, 0.001), ("a.mp4", "aac", 0.02), ("a.flac", "flac", 0.001)],
)
def test_a_known_sine_is_resampled(
    tmp_path: Path, name: str, audio: str | None, tolerance: float
) -> None:
    sound = sine(440.0, 2.0, 44100, 2)
    if name == "a.wav":
        path = write_wav(tmp_path / name, np.round(sound.T * 32767), 44100)
    elif name == "a.flac":
        if "flac" not in av.codecs_available:
            pytest.skip("this build of PyAV has no flac encoder")
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream("flac", rate=44100)
            stream.layout, stream.format = "stereo", "s16"
            block = np.ascontiguousarray(np.round(sound.T * 32767).astype(np.int16).reshape(1, -1))
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="stereo")
            frame.sample_rate, frame.pts = 44100, 0
            frame.time_base = Fraction(1, 44100)
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    else:
        path = write(tmp_path / name, n=50, audio=audio, sound=sound)
    track = everything(path).audio
    assert track is not None
    assert track.waveform.dtype == np.float32
    # AAC comes in blocks of 1024 samples, the last one padded by the encoder.
    block_s = 1024 / 44100 if audio == "aac" else 0.0
    assert 2.0 <= track.duration_s <= 2.0 + block_s
    assert track.waveform.shape == (round(track.duration_s * 16000),)
    assert track.start_s == pytest.approx(0.0, abs=0.03)
    assert not track.truncated
    middle = track.waveform[8000:24000]  # 1 s, away from the edges: one bin is 1 Hz.
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(middle.size)))
    assert int(spectrum.argmax()) == 440
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, rel=tolerance)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left = np.round(sine(440.0, 1.0, 16000, 1)[0] * 32767)
    track = everything(write_wav(tmp_path / "a.wav", np.stack([left, left], -1), 16000)).audio
    half = everything(write_wav(tmp_path / "b.wav", np.stack([left, 0 * left], -1), 16000)).audio
    assert track is not None
    assert half is not None
    assert np.abs(track.waveform - left / 32768).max() < 1e-4
    assert np.abs(half.waveform - left / 65536).max() < 1e-4


def test_samples_at_16_khz_are_not_touched(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-32768, 32768, 5000)
    track = everything(write_wav(tmp_path / "a.wav", samples, 16000)).audio
    assert track is not None
    assert np.array_equal(track.waveform, (samples / 32768).astype(np.float32))


def test_limit_keeps_the_start_and_reports_the_true_length(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).integers(-9000, 9000, 48000 * 3)
    path = write_wav(tmp_path / "a.wav", samples, 48000)
    whole = everything(path).audio
    cut = everything(path, limits=DecodeLimits(max_audio_s=1.0)).audio
    assert whole is not None
    assert cut is not None
    assert cut.waveform.shape == (16000,)
    assert np.array_equal(cut.waveform, whole.waveform[:16000])
    assert cut.duration_s == whole.duration_s == pytest.approx(3.0)
    assert cut.truncated
    assert not whole.truncated


# ---- what goes wrong --------------------------------------------------------------------------


def test_one_bad_stream_does_not_lose_the_other(tmp_path: Path) -> None:
    sound = sine(440.0, 2.0, 44100, 2)
    mute = write(tmp_path / "mute.mp4", n=50, audio="aac", sound=sound)
    smash(mute, "audio")
    decoded = everything(mute)
    assert decoded.audio is None
    assert decoded.audio_outcome is not None
    assert decoded.audio_outcome.status == "failed"
    assert "no samples that decode" in str(decoded.audio_outcome.reason)
    assert decoded.audio_outcome.n_damaged > 0
    assert decoded.n_frames == 50

    blind = write(tmp_path / "blind.mp4", n=50, audio="aac", sound=sound)
    smash(blind, "video")
    decoded = everything(blind)
    assert decoded.audio is not None
    assert decoded.audio.duration_s == pytest.approx(2.0, abs=0.03)
    assert decoded.video_outcome is not None
    assert decoded.video_outcome.status == "failed"
    assert "no picture decodes" in str(decoded.video_outcome.reason)
    assert (decoded.frames, decoded.choices, decoded.n_frames) == ({}, [], 0)


def test_a_sound_stream_without_samples_failed(tmp_path: Path) -> None:
    decoded = everything(write_wav(tmp_path / "a.wav", np.zeros(0, np.int16), 16000))
    assert decoded.audio is None
    assert decoded.audio_outcome is not None
    assert decoded.audio_outcome.status == "failed"
    assert decoded.video_outcome is not None
    assert decoded.video_outcome.status == "absent"


def test_cover_art_is_no_video(tmp_path: Path) -> None:
    if "libmp3lame" not in av.codecs_available:
        pytest.skip("this build of PyAV has no mp3 encoder")
    cover, path = tmp_path / "cover.png", tmp_path / "a.mp3"
    Image.fromarray(stamped(1)).save(cover)
    write(path, video=None, audio="libmp3lame", sound=sine(440.0, 1.0, 44100, 2))
    body = b"\0image/png\0\3\0" + cover.read_bytes()
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes(len(frame) >> shift & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\3\0\0" + size + frame + path.read_bytes())
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1  # The cover is there, as an attached picture.
    decoded = everything(path)
    assert not decoded.facts.has_video
    assert decoded.video_outcome is not None
    assert decoded.video_outcome.status == "absent"
    assert decoded.audio is not None


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"hello world\n" * 200, "cannot be opened as media"),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n", "cannot be opened"),
        ("list.mp4", b"ffconcat version 1.0\nfile other.mp4\n", "cannot be opened"),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "starts like a png picture"),
        ("header.flac", b"fLaC" + b"\xff" * 3000, "cannot be opened"),
    ],
)
def test_files_that_do_not_open(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    write(tmp_path / "other.mp4", n=5)
    (tmp_path / name).write_bytes(content)
    for read in (probe, everything):
        with pytest.raises(MediaError, match=words) as caught:
            read(tmp_path / name)
        assert name in str(caught.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="a folder or device"):
        everything(tmp_path)
    with pytest.raises(MediaError, match="there is nothing at this path"):
        everything(tmp_path / "missing.mp4")
    with pytest.raises(MediaError, match=r"nothing at this path|cannot be read"):
        everything(tmp_path / "nul\0.mp4")
    odd = write(tmp_path / "http:%03d.mp4", n=5)
    assert everything(odd).n_frames == 5


def test_truncated_files(tmp_path: Path) -> None:
    sound = sine(440.0, 2.0, 44100, 2)
    whole = write(tmp_path / "whole.mp4", n=50, audio="aac", sound=sound).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])  # The index (moov) was at the end.
    with pytest.raises(MediaError, match=r"cut\.mp4: cannot be opened"):
        everything(cut)
    options = {"g": "15", "b": "2M"}
    for name, codec in (("a.mpg", "mpeg1video"), ("a.mkv", "mpeg4")):
        path = write(tmp_path / name, video=codec, options=options, n=60)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        decoded = everything(path)
        assert 10 < decoded.n_frames < 50
        assert decoded.choices[1].indices == (decoded.n_frames // 2,)
        assert max(decoded.choices[0].indices) < decoded.n_frames
        clean = [i for i in decoded.frames if i < decoded.n_frames - 3]
        assert [stamp_of(decoded.frames[i]) for i in clean] == clean


def test_indices_follow_the_decoded_count(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", video="mpeg4", options={"g": "1", "b": "4M"}, n=60)
    with av.open(str(path)) as container:
        at = [(p.pos, p.size) for p in container.demux() if p.size]
    data = bytearray(path.read_bytes())
    for position, size in at[40:50]:
        assert position is not None
        data[position + 8 : position + size] = b"\xff" * (size - 8)
    path.write_bytes(data)
    decoded = everything(path)
    outcome = decoded.video_outcome
    assert outcome is not None
    assert outcome.status == "ok"
    assert outcome.n_damaged > 0
    truth = read_in_sequence(path, 0, set(range(60)), DecodeLimits())
    assert decoded.n_frames == len(truth.pts_s)
    assert decoded.choices[1].indices == (decoded.n_frames // 2,)
    assert all(np.array_equal(decoded.frames[i], truth.frames[i]) for i in decoded.frames)


def test_limits_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", n=20, audio="aac", sound=sine(440.0, 1.0, 44100, 2))
    for limits, words in (
        (DecodeLimits(max_picture_px=6143), "96 x 64 pixels, at most 6143"),
        (DecodeLimits(max_frames=19), "20 pictures or more, at most 19"),
    ):
        decoded = everything(path, limits=limits)
        assert decoded.video_outcome is not None
        assert decoded.video_outcome.status == "failed"
        assert words in str(decoded.video_outcome.reason)
        assert not decoded.frames
        assert decoded.audio is not None
    picture = tmp_path / "a.png"
    Image.fromarray(stamped(1)).save(picture)
    outcome = everything(picture, limits=DecodeLimits(max_picture_px=6143)).video_outcome
    assert outcome is not None
    assert "96 x 64 pixels" in str(outcome.reason)


# ---- picture files ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "jpg"])
def test_a_picture_is_a_clip_of_one_frame(tmp_path: Path, suffix: str) -> None:
    named = tmp_path / f"a.{suffix}"
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(stamped(7)).save(named, **options)
    path = named.rename(tmp_path / "a.mp4")  # The name does not matter, the bytes do.
    decoded = everything(path)
    assert decoded.facts.is_image
    assert decoded.audio_outcome is not None
    assert decoded.audio_outcome.status == "absent"
    assert [c.indices for c in decoded.choices] == [(0,) * 16, (0,)]
    assert (decoded.n_frames, decoded.decoder) == (1, "pillow")
    assert stamp_of(decoded.frames[0]) == 7
    if suffix != "jpg":
        assert np.array_equal(decoded.frames[0], stamped(7))


@pytest.mark.parametrize("tag", range(1, 9))
def test_exif_orientation(tmp_path: Path, tag: int) -> None:
    picture = Image.fromarray(stamped(3))
    exif = picture.getexif()
    exif[0x0112] = tag
    picture.save(tmp_path / "a.png", exif=exif)
    decoded = everything(tmp_path / "a.png")
    facts, shown = decoded.facts, decoded.frames[0]
    expected = np.rot90(stamped(3), facts.rotation_deg // 90)
    assert np.array_equal(shown, expected[:, ::-1] if facts.mirrored else expected)
    assert shown.shape[:2] == (facts.height_px, facts.width_px)
    turns = {1: 0, 3: 180, 6: -90, 8: 90}
    assert facts.mirrored == (tag not in turns)
    assert facts.rotation_deg == turns.get(tag, facts.rotation_deg)


def test_broken_pictures_failed(tmp_path: Path) -> None:
    Image.fromarray(stamped(3)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.full((5, 5), 40000, np.uint16)).save(tmp_path / "deep.png")
    for name, words in (("a.png", "does not decode"), ("deep.png", "is not 8-bit")):
        decoded = everything(tmp_path / name)
        assert decoded.video_outcome is not None
        assert decoded.video_outcome.status == "failed"
        assert words in str(decoded.video_outcome.reason)
        assert not decoded.frames


# ---- the real clips ---------------------------------------------------------------------------


def facts_of_clips() -> list[dict[str, Any]]:
    table = CLIPS / "clips.jsonl"
    if not table.is_file():
        return []
    return [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]


@functools.cache
def decoded_clip(file: str) -> Decoded:
    return everything(CLIPS / file)


real = pytest.mark.skipif(
    not facts_of_clips(), reason="no shared/clips folder beside the project: no real clips"
)
each_clip = pytest.mark.parametrize(
    "fact", facts_of_clips() or [{"id": "none"}], ids=lambda fact: fact["id"]
)

TRUSTED = {
    "friday",
    "friday_14f",
    "work_intro",
    "tears_long",
    "awesome",
    "asl_sorry",
    "portrait",
    "carphone",
}
"""Clips whose pictures come from decord; those of the others come from PyAV."""


@real
@each_clip
def test_clip_against_measured_facts(fact: dict[str, Any]) -> None:
    decoded = decoded_clip(fact["file"])
    facts, video, sound = decoded.facts, decoded.video_outcome, decoded.audio_outcome
    assert video is not None
    assert sound is not None
    streams = fact.get("streams", [])
    videos = [s for s in streams if s["type"] == "video"]
    sounds = [s for s in streams if s["type"] == "audio"]
    assert facts.is_image == (fact["kind"] == "image")
    assert facts.has_audio == bool(sounds)
    assert facts.has_video == bool(videos) or facts.is_image
    assert probe(CLIPS / fact["file"]) == facts
    assert sound.status == ("ok" if sounds else "absent")
    assert video.status == ("ok" if videos or facts.is_image else "absent")
    assert not sound.n_damaged + video.n_damaged
    if facts.is_image:
        assert decoded.frames[0].shape == (fact["height"], fact["width"], 3)
    if videos:
        truth = videos[0]
        assert facts.video_index == truth["index"]
        assert decoded.n_frames == truth["frames"]
        ends = [FrameRequest("peak", peak_index=i) for i in (0, truth["frames"] - 1)]
        first, last = decode(CLIPS / fact["file"], want_audio=False, frame_choices=ends).choices
        assert first.pts_s == pytest.approx((truth["first_pts_s"],), abs=1e-3)
        # The last of the 75 pictures of grid_sbia1a.avi carries no time in the file (B-frames in
        # AVI), so its fact is the time of the one before; see docs/decoding.md.
        late_s = 0.02 if fact["id"] == "grid_sbia1a" else 0.0
        assert last.pts_s == pytest.approx((truth["last_pts_s"] + late_s,), abs=1e-3)
        trusted = fact["id"] in TRUSTED and importlib.util.find_spec("decord")
        assert decoded.decoder == ("decord" if trusted else "pyav")
        shape = (truth["height"], truth["width"], 3)
        if truth["rotation"]:
            shape = (shape[1], shape[0], 3)
        assert {frame.shape for frame in decoded.frames.values()} == {shape}
        assert (facts.height_px, facts.width_px) == shape[:2]
        assert facts.rotation_deg == truth["rotation"]
    if sounds:
        assert decoded.audio is not None
        assert decoded.audio.stream_index == sounds[0]["index"]
        assert decoded.audio.duration_s == pytest.approx(sounds[0]["decoded_s"], abs=0.05)
        assert abs(decoded.audio.waveform.size - decoded.audio.duration_s * 16000) <= 1
        assert decoded.audio.start_s == pytest.approx(sounds[0]["start_s"] or 0.0, abs=0.005)
        level_db = 20 * np.log10(np.sqrt(np.mean(decoded.audio.waveform**2)) + 1e-12)
        # Channels are averaged and high frequencies lost, so the level can only fall.
        assert level_db < sounds[0]["mean_db"] + 0.5


@real
@pytest.mark.parametrize("clip", sorted(TRUSTED))
def test_decord_shows_the_picture_that_pyav_shows(clip: str) -> None:
    pytest.importorskip("decord", reason="decord is not installed")
    file = next(fact["file"] for fact in facts_of_clips() if fact["id"] == clip)
    decoded = decoded_clip(file)
    near = {j for i in decoded.frames for j in (i - 1, i, i + 1)}
    index = decoded.facts.video_index
    assert index is not None
    truth = read_in_sequence(CLIPS / file, index, near, DecodeLimits())
    assert len(truth.pts_s) == decoded.n_frames
    for i, frame in decoded.frames.items():
        off = {
            j: float(np.abs(frame.astype(np.int16) - truth.frames[j].astype(np.int16)).mean())
            for j in (i - 1, i, i + 1)
            if j in truth.frames
        }
        assert off[i] < 0.1
        # Still scenes repeat a picture exactly; where neighbours differ, ours is the nearest.
        assert off[i] <= min(off.values())
    for choice in decoded.choices:
        assert choice.pts_s == pytest.approx([truth.pts_s[i] for i in choice.indices], abs=1e-6)


@real
def test_particular_clips() -> None:
    short = decoded_clip("friday_14f.mp4")
    assert short.choices[0].indices == (0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13)
    assert len(short.frames) == 14
    assert decoded_clip("portrait.MOV").frames[31].shape == (568, 320, 3)
    assert "2 video streams" in str(decoded_clip("nasa_13013.mp4").decoder_reason)
    assert "edit list" in str(decoded_clip("work_carlo.mp4").decoder_reason)
    silent = decoded_clip("no_duration.webm")
    assert silent.facts.duration_s is None
    assert silent.audio is not None  # Digital silence is data, not a failure.


@real
def test_a_damaged_real_clip_still_gives_both_streams(tmp_path: Path) -> None:
    data = bytearray((CLIPS / "friday.mp4").read_bytes())
    data[200_000:260_000] = bytes(60_000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    decoded = everything(path)
    for outcome in (decoded.audio_outcome, decoded.video_outcome):
        assert outcome is not None
        assert outcome.status == "ok"
        assert outcome.n_damaged > 0
        assert outcome.reason
    assert 100 < decoded.n_frames < 185
    assert decoded.choices[1].indices == (decoded.n_frames // 2,)
