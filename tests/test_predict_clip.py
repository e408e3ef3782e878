"""One raw clip without a model: the same views as a store gives, and a clear word for every bad file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import MediaError
from cache.spec import STREAMS, TokenSpec
from cache.store import TokenStore
from eval.live.clip import ClipReader, as_stored, hide, views_of
from eval.live.files import find_clips
from extract.encoders.bank import EncoderBank
from tests.conftest import key_of
from tests.media import sine, stamp_of, stamped, write, write_clip, write_wav
from train.batches.reading import ViewReader
from train.config import configure
from train.presets import demo


@pytest.fixture(scope="module")
def reader(tiny_weights: dict[str, Path]) -> Iterator[ClipReader]:
    preset = demo()
    with ClipReader(preset, EncoderBank(preset.tokens.all(), tiny_weights)) as made:
        yield made


def picture(path: Path) -> Path:
    from PIL import Image

    Image.fromarray(stamped(5)).save(path)
    return path


# ---- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16", "int8"])
def test_views_equal_those_that_a_store_gives_back(
    tmp_path: Path, specs: dict[str, TokenSpec], dtype: str
) -> None:
    preset = demo()
    store = TokenStore.open_or_create(tmp_path / "store")
    stored = {s: specs[s].model_copy(update={"dtype": dtype}) for s in STREAMS}
    record = Record(uid="made/0", media="0.mp4", clip=Clip(sha256=key_of("0"), n_bytes=1))
    rng = np.random.default_rng(3)
    streams = {}
    for stream, spec in stored.items():
        shape = (41, spec.max_shape[1]) if stream == "audio" else spec.max_shape
        n_frames = spec.frames.n_frames if spec.frames else 0
        clip = ClipTokens(
            record.sha256,
            Status.OK,
            (3 * rng.standard_normal(shape)).astype(np.float32),
            frame_index=tuple(range(n_frames)),
            frame_pts_s=tuple(i / 25 for i in range(n_frames)),
        )
        store.commit(spec, [clip], {})
        streams[stream] = as_stored(spec, clip)
    tokens = preset.tokens.model_copy(update=stored)
    from_store = ViewReader(store, preset.model_copy(update={"tokens": tokens})).read([record])
    made = views_of(preset, stored, streams)
    assert made.tokens.keys() == from_store.tokens.keys()
    for name, expected in from_store.tokens.items():
        assert expected.abs().sum() > 0
        assert torch.equal(made.tokens[name], expected), name
    for name, mask in from_store.masks.items():
        assert torch.equal(made.masks[name], mask), name


def test_streams_are_hidden_as_a_store_hides_them(reader: ClipReader, tmp_path: Path) -> None:
    seen = reader.read(write_clip(tmp_path / "a.mp4"), corpus="made")
    assert hide(seen.views, ()) is seen.views
    hidden = hide(seen.views, ("image",))
    for name, tensor in hidden.tokens.items():
        is_gone = name in ("image", "image_cls")
        assert torch.equal(tensor, torch.zeros_like(tensor)) == is_gone
        assert is_gone or torch.equal(tensor, seen.views.tokens[name])
    assert {name: bool(mask.any()) for name, mask in hidden.masks.items()} == {
        "audio": True, "video": True, "image": False,
    }  # fmt: skip
    assert seen.views.masks["image"].all()  # the clip itself stays as it was


# ---- what is shown --------------------------------------------------------------------------------


def test_the_frames_shown_are_those_that_were_encoded(reader: ClipReader, tmp_path: Path) -> None:
    sound = sine(200, 2.0, 44100, 2)
    path = write(tmp_path / "a.mp4", n=50, audio="aac", sound=sound)
    seen = reader.read(path, corpus="made")
    encoded = seen.streams["video"].frame_index
    assert len(encoded) == 16
    assert tuple(frame.index for frame in seen.frames) == encoded
    assert tuple(frame.pts_s for frame in seen.frames) == seen.streams["video"].frame_pts_s
    for frame in seen.frames:
        assert frame.rgb.dtype == np.uint8
        assert frame.rgb.shape == (64, 96, 3)  # its own aspect, not enlarged
        assert stamp_of(frame.rgb) == frame.index
    assert seen.waveform is not None
    assert len(seen.waveform) == pytest.approx(2.0 * 16000, rel=0.05)
    assert seen.duration_s == pytest.approx(2.0, abs=0.1)
    assert seen.heard_s == seen.duration_s
    assert seen.remarks == ()
    assert seen.absent == ()


def test_a_short_clip_shows_each_frame_once(reader: ClipReader, tmp_path: Path) -> None:
    seen = reader.read(write(tmp_path / "a.mp4", n=5), corpus="made")
    assert [frame.index for frame in seen.frames] == [0, 1, 2, 3, 4]
    assert len(seen.streams["video"].frame_index) == 16


def test_what_is_missing_is_masked_and_told(reader: ClipReader, tmp_path: Path) -> None:
    silent = reader.read(write(tmp_path / "silent.mp4", n=20), corpus="made")
    still = reader.read(picture(tmp_path / "still.png"), corpus="made")
    tone = (20000 * sine(220, 1.0, 16000, 1)[0]).astype(np.int16)
    heard = reader.read(write_wav(tmp_path / "heard.wav", tone, 16000), corpus="made")
    assert (silent.absent, still.absent, heard.absent) == (
        ("audio",), ("audio", "video"), ("video", "image"),
    )  # fmt: skip
    for seen in (silent, still, heard):
        for stream in STREAMS:
            assert bool(seen.views.masks[stream].any()) == (stream not in seen.absent)
            assert bool(seen.views.tokens[stream].any()) == (stream not in seen.absent)
    assert silent.remarks == ("There is no sound: the model answers from the rest.",)
    assert still.remarks[1] == "There is no moving picture: the model answers from the rest."
    assert heard.remarks == ("There is no picture: the model answers from the rest.",)
    assert (silent.waveform, still.duration_s, len(still.frames)) == (None, None, 1)
    assert heard.frames == ()


def test_sound_beyond_the_encoders_window_is_told(reader: ClipReader, tmp_path: Path) -> None:
    tone = (20000 * sine(220, 33.0, 8000, 1)[0]).astype(np.int16)
    seen = reader.read(write_wav(tmp_path / "long.wav", tone, 8000), corpus="made")
    assert seen.remarks[0] == "Only the first 30 s of the sound are heard."
    assert (seen.heard_s, seen.duration_s) == (30.0, pytest.approx(33.0))
    assert seen.waveform is not None
    assert len(seen.waveform) == pytest.approx(33.0 * 16000, abs=16)  # shown and transcribed whole


def test_the_record_is_the_one_that_indexing_makes(reader: ClipReader, tmp_path: Path) -> None:
    from extract.index import index_folder

    (tmp_path / "media").mkdir()
    write_clip(tmp_path / "media" / "a.mp4")
    picture(tmp_path / "media" / "b.png")
    manifest, _ = index_folder(tmp_path / "media", tmp_path / "m.parquet", corpus="made")
    for record in manifest.records:
        assert reader.read(tmp_path / "media" / record.media, corpus="made").record == record


def test_any_name_of_a_file_will_do(reader: ClipReader, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "a.mp4")
    for name in (
        b"back\\slash.mp4",
        b"new\nline.mp4",
        b"not-\xff-text.mp4",
        "\u202egnp.mp4".encode(),
    ):
        path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
        path.hardlink_to(clip)
        seen = reader.read(path, corpus="made")
        assert seen.record.uid.isprintable()
        assert seen.record.media.isprintable()
        assert "\\" not in seen.record.media
        seen.record.model_dump_json()


# ---- bad files ------------------------------------------------------------------------------------


def refused(reader: ClipReader, path: Path, **options: Any) -> str:
    with pytest.raises(MediaError) as caught:
        reader.read(path, corpus="made", **options)
    assert str(path.parent) not in str(caught.value)  # messages go to users of a page, too
    return str(caught.value)


def test_files_that_are_no_clips_are_refused(reader: ClipReader, tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a film")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    assert "empty (0 bytes)" in refused(reader, tmp_path / "empty.mp4")
    assert "text.mp4: cannot be opened as media" in refused(reader, tmp_path / "text.mp4")
    assert "a folder, not a media file" in refused(reader, tmp_path / "folder.mp4")
    assert "a pipe or a device" in refused(reader, tmp_path / "pipe.mp4")
    assert "no such file" in refused(reader, tmp_path / "gone.mp4")


def test_a_file_that_may_not_be_read_is_refused(
    reader: ClipReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("eval.live.clip.file_sha256", denied)
    said = refused(reader, write_clip(tmp_path / "a.mp4"))
    assert said == "a.mp4: cannot be read: Permission denied."


def sparse(path: Path, last_s: float, **options: Any) -> Path:
    """Write a video of two pictures, the second shown after `last_s` seconds."""
    with av.open(str(path), "w", **options) as container:
        stream: Any = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time_s in enumerate((0.0, last_s)):
            frame = av.VideoFrame.from_ndarray(stamped(number), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time_s), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_two_hour_video_is_refused_before_it_is_decoded(
    reader: ClipReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sparse(tmp_path / "film.mp4", 7200.0)
    jobs = []
    submit = reader._pool.submit
    monkeypatch.setattr(reader._pool, "submit", lambda job: jobs.append(job) or submit(job))
    said = refused(reader, path)
    assert "2:00:00 (h:min:s)" in said
    assert "more than the 120 s" in said
    assert "--max-duration-s" in said
    assert [job.requests for job in jobs] == [()]


def test_a_long_video_that_hides_its_length_is_refused(reader: ClipReader, tmp_path: Path) -> None:
    path = sparse(tmp_path / "live.mkv", 300.0, options={"live": "1"})
    with av.open(str(path)) as container:
        assert container.duration is None
    assert "more than the 120 s" in refused(reader, path)
    assert reader.read(path, corpus="made", max_duration_s=400.0).record.sha256


def test_a_limit_is_met_to_the_letter(reader: ClipReader, tmp_path: Path) -> None:
    tone = (20000 * sine(220, 2.0, 16000, 1)[0]).astype(np.int16)
    path = write_wav(tmp_path / "two.wav", tone, 16000)
    assert reader.read(path, corpus="made", max_duration_s=2.0).duration_s == 2.0
    assert "lasts 2.0 s, more than the 1.9 s" in refused(reader, path, max_duration_s=1.9)


def test_decoding_that_takes_too_long_is_refused(
    tiny_weights: dict[str, Path], tmp_path: Path
) -> None:
    preset = demo()
    bank = EncoderBank(preset.tokens.all(), tiny_weights)
    with ClipReader(preset, bank, deadline_s=1e-6) as hasty:
        assert "it took longer than 1e-06 s" in refused(hasty, write_clip(tmp_path / "a.mp4"))


@pytest.mark.parametrize("choice", ["drop", "refuse"])
def test_what_a_run_refuses_is_refused(
    tiny_weights: dict[str, Path], tmp_path: Path, choice: str
) -> None:
    preset = configure(demo(), [f"data.absent={choice}"])
    with ClipReader(preset, EncoderBank(preset.tokens.all(), tiny_weights)) as strict:
        said = refused(strict, write(tmp_path / "silent.mp4", n=5))
        assert "the audio stream is absent" in said
        assert f"data.absent is '{choice}'" in said
        assert "data.absent=mask" in said
        assert strict.read(write_clip(tmp_path / "a.mp4"), corpus="made").absent == ()


def test_a_failed_stream_is_refused_or_told(
    tiny_weights: dict[str, Path], reader: ClipReader, tmp_path: Path
) -> None:
    """A video that needs a peak frame which nobody names fails in one stream alone."""
    asked = ["tokens.image.frames.kind=peak"]
    path = write_clip(tmp_path / "a.mp4")
    for overrides in (asked, [*asked, "data.failed=mask"]):
        preset = configure(demo(), overrides)
        with ClipReader(preset, EncoderBank(preset.tokens.all(), tiny_weights)) as peaks:
            named = peaks.read(path, corpus="made", peak_index=3)
            assert named.streams["image"].frame_index == (3,)
            assert named.record.peak_index == 3
            if "data.failed=mask" in overrides:
                seen = peaks.read(path, corpus="made")
                assert seen.absent == ("image",)
                assert not seen.views.masks["image"].any()
                [remark] = seen.remarks
                assert remark.startswith(
                    "The image stream failed and is left out: frame rule 'peak'"
                )
            else:
                assert "data.failed is 'refuse'" in refused(peaks, path)


# ---- files and folders ----------------------------------------------------------------------------


def test_files_and_folders_become_clips_with_names_of_their_own(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    (one / "sub").mkdir(parents=True)
    two.mkdir()
    for file in ("one/a.mp4", "one/sub/b.mp4", "one/notes.txt", "one/.hidden.mp4", "two/a.mp4"):
        (tmp_path / file).touch()
    (tmp_path / "odd.bin").touch()
    files, remarks = find_clips([one])
    assert [(file.path, file.name) for file in files] == [
        (one / "a.mp4", "a"), (one / "sub" / "b.mp4", "sub/b"),
    ]  # fmt: skip
    [remark] = remarks
    assert "1 other file is not called like media" in remark
    # Named itself, a file is taken whatever it is called, and only once.
    files, remarks = find_clips([tmp_path / "odd.bin", one / "a.mp4", one / "a.mp4"])
    assert ([file.name for file in files], remarks) == (["odd", "a"], [])
    (one / "a.wav").touch()
    names = [file.name for file in find_clips([one, two])[0]]
    assert names[1:3] == ["a.wav", "sub/b"]
    assert names[0] != names[3]
    assert {name.rpartition("/")[2] for name in (names[0], names[3])} == {"a.mp4"}
    assert len(set(names)) == 4


def test_nothing_to_ask_about_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(MediaError, match="holds no file that is called like media"):
        find_clips([tmp_path])
    with pytest.raises(MediaError, match="no such file or folder"):
        find_clips([tmp_path / "gone.mp4"])
