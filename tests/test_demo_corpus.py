"""The demo corpus: valid media, determinism, resume, balance, and no stream that tells alone."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from cache.errors import SchemaError
from extract.corpora import demo
from extract.corpora.demo import (
    COLUMNS,
    EMOTIONS,
    FPS,
    SUBTITLES,
    describe,
    make_frames,
    make_samples,
    plan_demo,
    write_demo_corpus,
)
from extract.corpora.demo_faces import (
    FACE_RANGES,
    LOOKS,
    draw_face,
    face_values,
    moving_faces,
    sample_face,
)
from extract.corpora.demo_sounds import (
    SAMPLE_RATE_HZ,
    SOUNDS,
    VOICE_RANGES,
    sample_voice,
    synthesise,
    voice_values,
)
from train.tiny import world

N_CLIPS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_corpus(tmp_path_factory.mktemp("demo"), n_clips=N_CLIPS, seed=3)


def test_labels_csv_lists_every_clip(corpus: Path) -> None:
    with corpus.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS == ("file", "label", "subtitle", "split", "description")
    assert len(rows) == N_CLIPS
    for row in rows:
        assert (corpus.parent / "media" / row["file"]).is_file()
        assert row["label"] not in row["file"]
        assert row["subtitle"] in SUBTITLES
        assert row["description"] == describe(row["label"])
    assert Counter(row["label"] for row in rows) == dict.fromkeys(EMOTIONS, 2)


def test_clips_are_h264_and_aac_of_two_to_four_seconds(corpus: Path) -> None:
    paths = sorted((corpus.parent / "media").iterdir())
    assert [path.name for path in paths] == [f"clip_{i:04d}.mp4" for i in range(N_CLIPS)]
    for path, row in zip(paths, plan_demo(N_CLIPS, 3), strict=True):
        with av.open(str(path)) as container:
            video, audio = container.streams.video[0], container.streams.audio[0]
            assert (video.codec_context.name, audio.codec_context.name) == ("h264", "aac")
            assert (video.width, video.height, audio.codec_context.sample_rate) == (160, 160, 16000)
            n_frames = sum(1 for _ in container.decode(video=0))
        with av.open(str(path)) as container:
            n_samples = sum(frame.samples for frame in container.decode(audio=0))
        assert n_frames == row.n_frames
        assert 2 <= n_frames / FPS <= 4
        assert n_samples / SAMPLE_RATE_HZ == pytest.approx(n_frames / FPS, abs=0.15)


def test_the_file_holds_what_was_drawn(corpus: Path) -> None:
    row = plan_demo(N_CLIPS, 3)[5]
    with av.open(str(corpus.parent / "media" / row.file)) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    drawn = np.stack(list(make_frames(row, 3)))
    assert np.abs(np.stack(decoded).astype(int) - drawn).mean() < 8  # of 255: codec losses


def test_a_second_call_changes_nothing(corpus: Path) -> None:
    files = [corpus, *(corpus.parent / "media").iterdir()]
    before = {path: path.stat().st_mtime_ns for path in files}
    ticks: list[int] = []
    again = write_demo_corpus(
        corpus.parent, n_clips=N_CLIPS, seed=3, on_clip=lambda: ticks.append(1)
    )
    assert again == corpus
    assert len(ticks) == N_CLIPS
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert set(corpus.parent.iterdir()) == {
        corpus,
        corpus.parent / "media",
        corpus.parent / "demo.json",
    }


def test_an_interrupted_run_is_continued_with_the_same_bytes(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        write_demo_corpus(tmp_path, n_clips=3, on_clip=stop)
    assert not (tmp_path / "labels.csv").exists()
    lost = tmp_path / "media" / "clip_0000.mp4"
    first = lost.read_bytes()
    lost.unlink()
    write_demo_corpus(tmp_path, n_clips=3)
    assert lost.read_bytes() == first
    assert len(list((tmp_path / "media").iterdir())) == 3


def test_a_folder_with_another_corpus_is_refused(corpus: Path) -> None:
    with pytest.raises(SchemaError, match=r"already holds another demo corpus.*'seed': 3"):
        write_demo_corpus(corpus.parent, n_clips=N_CLIPS, seed=4)
    with pytest.raises(SchemaError, match="cannot have 0 clips"):
        plan_demo(0, 0)


def test_a_seed_gives_the_same_clips_and_another_seed_others() -> None:
    assert plan_demo(18, 1) == plan_demo(18, 1) != plan_demo(18, 2)
    row = plan_demo(18, 1)[4]
    once, twice, other = (np.stack(list(make_frames(row, seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(once, twice)
    assert (once != other).any()
    np.testing.assert_array_equal(make_samples(row, 1), make_samples(row, 1))
    assert (make_samples(row, 1) != make_samples(row, 2)).any()


@pytest.mark.parametrize("n_clips", [12, 18, 60, 480])
def test_splits_are_balanced_over_emotions(n_clips: int) -> None:
    rows = plan_demo(n_clips, 0)
    counts = Counter((row.label, row.split) for row in rows)
    n_train = round(n_clips / 6 * 2 / 3)
    assert {counts[label, "train"] for label in EMOTIONS} == {n_train}
    assert {counts[label, "test"] for label in EMOTIONS} == {n_clips // 6 - n_train}


def test_subtitle_and_length_do_not_depend_on_the_emotion() -> None:
    rows = plan_demo(6000, 0)
    for label in EMOTIONS:
        mine = [row for row in rows if row.label == label]
        share = Counter(row.subtitle for row in mine)
        assert max(share.values()) < 1.5 * len(mine) / len(SUBTITLES)
        assert np.mean([row.n_frames for row in mine]) == pytest.approx(45, abs=1)


def test_each_look_and_each_sound_belongs_to_two_emotions() -> None:
    assert Counter(cue.look for cue in EMOTIONS.values()) == dict.fromkeys(LOOKS, 2)
    assert Counter(cue.sound for cue in EMOTIONS.values()) == dict.fromkeys(SOUNDS, 2)
    assert len(set(EMOTIONS.values())) == 6


def test_within_a_pair_one_stream_is_the_very_same() -> None:
    """Swapping the label for its twin must leave the shared stream untouched, bit for bit."""
    row = plan_demo(18, 0)[0]
    for label, cue in EMOTIONS.items():
        mine = type(row)(row.index, label, row.split, row.subtitle, n_frames=30)
        for twin_label, twin_cue in EMOTIONS.items():
            twin = type(row)(row.index, twin_label, row.split, row.subtitle, n_frames=30)
            frames = zip(make_frames(mine, 0), make_frames(twin, 0), strict=True)
            same_picture = all((a == b).all() for a, b in frames)
            same_sound = bool((make_samples(mine, 0) == make_samples(twin, 0)).all())
            assert same_picture == (cue.look == twin_cue.look)
            assert same_sound == (cue.sound == twin_cue.sound)


def test_descriptions_follow_the_template() -> None:
    assert describe("fearful") == (
        "The eyes are wide, the brows are raised and the mouth is open. "
        "The voice is loud, rough and fast, with hard irregular beats. "
        "Together these cues point to fearful."
    )


def test_narrowed_ranges_stay_inside_the_full_ones() -> None:
    for narrowed, full in ((LOOKS, FACE_RANGES), (SOUNDS, VOICE_RANGES)):
        for ranges in narrowed.values():
            for name, (low, high) in ranges.items():
                assert full[name][0] <= low < high <= full[name][1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert np.abs(face_values(sample_face(rng, LOOKS["drawn"]))).max() <= 1
        assert np.abs(voice_values(sample_voice(rng, SOUNDS["rough"]))).max() <= 1


def test_drawn_frames_and_their_motion() -> None:
    rng = np.random.default_rng(0)
    face = sample_face(rng)
    assert draw_face(face, size_px=96).shape == (96, 96, 3)
    assert draw_face(face).dtype == np.uint8
    moved = moving_faces(face, 45, FPS, rng)
    assert max(abs(m.head_x - face.head_x) for m in moved) <= 0.012
    assert {m.brow_height for m in moved} == {face.brow_height}


def test_loudness_and_pitch_are_as_asked() -> None:
    rng = np.random.default_rng(0)
    voice = sample_voice(rng, {"pitch": (8, 8.001), "melody": (0, 0), "pitch_slope": (0, 0)})
    sound = synthesise(voice, 3.0, rng)
    assert sound.samples.shape == sound.pitch.shape == sound.envelope.shape == (48000,)
    rms = np.sqrt(np.mean(sound.samples[sound.envelope > 0.3] ** 2))
    assert 20 * np.log10(rms) == pytest.approx(voice.loudness_db, abs=1)
    assert 2 ** sound.pitch.mean() == pytest.approx(256, rel=0.01)


def test_the_corpus_and_the_tiny_language_model_speak_of_the_same_world() -> None:
    """`extract` and `train` may not import each other; this ties their two copies together."""
    assert [cue.sentence for cue in world.LOOKS] == list(demo.LOOK_SENTENCES.values())
    assert [cue.sentence for cue in world.SOUNDS] == list(demo.SOUND_SENTENCES.values())
    looks, sounds = list(demo.LOOK_SENTENCES), list(demo.SOUND_SENTENCES)
    assert {
        label: (looks.index(cue.look), sounds.index(cue.sound))
        for label, cue in demo.EMOTIONS.items()
    } == world.EMOTIONS
