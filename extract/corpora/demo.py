"""The demo corpus: drawn faces and synthesised voices in six emotions, made on the spot.

Each emotion is one look of the face and one sound of the voice, and every look and every sound
belongs to two emotions. A model that uses one stream alone can therefore be right half of the
time at most; only both together name the emotion. Subtitles are neutral and say nothing.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from numpy.typing import NDArray

from cache.errors import SchemaError
from cache.files import create_once, write_aside, write_text_aside
from extract.corpora.demo_faces import (
    FRAME_PX,
    LOOKS,
    Face,
    action_units,
    draw_face,
    moving_faces,
    openface_landmarks,
    sample_face,
)
from extract.corpora.demo_sounds import SAMPLE_RATE_HZ, SOUNDS, sample_voice, synthesise

logger = logging.getLogger(__name__)

FPS = 15
"""Frames per second of the demo clips."""

MIN_S, MAX_S = 2, 4
"""Shortest and longest clip in seconds."""

_GENERATOR = 1  # raise when the same seed gives other clips, so that folders are not mixed


class Cue(NamedTuple):
    """What an emotion looks and sounds like: keys of `LOOKS` and of `SOUNDS`."""

    look: str
    sound: str


EMOTIONS: dict[str, Cue] = {
    "happy": Cue("level", "bright"),
    "surprised": Cue("wide", "bright"),
    "sad": Cue("drawn", "even"),
    "neutral": Cue("level", "even"),
    "angry": Cue("drawn", "rough"),
    "fearful": Cue("wide", "rough"),
}
"""The six emotions; no look and no sound determines one alone."""

LOOK_SENTENCES: dict[str, str] = {
    "wide": "The eyes are wide, the brows are raised and the mouth is open.",
    "drawn": "The brows are drawn down and the corners of the mouth are turned down.",
    "level": "The brows are level, the eyes are relaxed and the mouth is softly curved.",
}
SOUND_SENTENCES: dict[str, str] = {
    "bright": "The voice is high, bright and lively, with quick rising notes.",
    "even": "The voice is low, quiet and slow, with an even tone.",
    "rough": "The voice is loud, rough and fast, with hard irregular beats.",
}

SUBTITLES: tuple[str, ...] = (
    "The train leaves from platform four.",
    "I put the keys on the kitchen table.",
    "They moved the meeting to Tuesday.",
    "There is a letter for you in the hall.",
    "The shop on the corner opens at nine.",
    "She said the parcel would come today.",
    "We have two more boxes in the car.",
    "The lamp in the hallway is switched on.",
    "He is waiting outside the office.",
    "That is the second door on the left.",
    "The report has eleven pages.",
    "You left your coat on the chair.",
    "The bus stops behind the library.",
    "It will be about ten minutes.",
    "They painted the wall white last week.",
    "Somebody called while you were out.",
    "The window faces the garden.",
    "I will be there before noon.",
    "The number is written on the back.",
    "We are going to the station now.",
)
"""Neutral sentences; each clip draws one regardless of its emotion."""

COLUMNS = ("file", "label", "subtitle", "split", "description")
"""Columns of `labels.csv`, in this order."""


@dataclass(frozen=True)
class DemoRow:
    """One clip as planned: everything that can be said of it without drawing it."""

    index: int
    """Number in the corpus; names the file and seeds the clip."""
    label: str
    """Key of `EMOTIONS`."""
    split: str
    """`train` or `test`."""
    subtitle: str
    """One of `SUBTITLES`."""
    n_frames: int
    """Length in frames of 1/15 s."""

    @property
    def file(self) -> str:
        """Name of the media file; says nothing of the label."""
        return f"clip_{self.index:04d}.mp4"


def describe(label: str) -> str:
    """Return the sentences of an emotion: its look, its sound, its name."""
    cue = EMOTIONS[label]
    look, sound = LOOK_SENTENCES[cue.look], SOUND_SENTENCES[cue.sound]
    return f"{look} {sound} Together these cues point to {label}."


def plan_demo(n_clips: int, seed: int) -> list[DemoRow]:
    """Deal out emotions, splits, subtitles and lengths, without drawing anything.

    Emotions are as even as the number of clips allows and stand in shuffled order; of each, two
    thirds (rounded) are `train`. Subtitle and length are drawn regardless of the emotion.

    Args:
        n_clips: Number of clips, at least 1.
        seed: Seed of everything random.

    Returns:
        One row per clip, by index.

    Raises:
        SchemaError: The number of clips is not positive.
    """
    if n_clips < 1:
        raise SchemaError(
            f"The demo corpus cannot have {n_clips} clips: ask for at least 1; "
            f"a multiple of {3 * len(EMOTIONS)} divides evenly."
        )
    dealt = []
    for place, label in enumerate(EMOTIONS):
        n_label = len(range(place, n_clips, len(EMOTIONS)))
        n_train = round(n_label * 2 / 3)
        dealt += [(label, "train")] * n_train + [(label, "test")] * (n_label - n_train)
    rng = np.random.default_rng([seed, n_clips])
    order = rng.permutation(n_clips)
    return [
        DemoRow(
            index=index,
            label=dealt[place][0],
            split=dealt[place][1],
            subtitle=SUBTITLES[int(rng.integers(len(SUBTITLES)))],
            n_frames=int(rng.integers(MIN_S * FPS, MAX_S * FPS + 1)),
        )
        for index, place in enumerate(order)
    ]


def make_frames(row: DemoRow, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Draw the pictures of a clip one by one.

    Picture and sound come from random streams of their own, so that the two emotions that share a
    look draw their pictures from one and the same distribution; sounds likewise.

    Args:
        row: The clip.
        seed: Seed of the corpus.

    Yields:
        `row.n_frames` frames, `(160, 160, 3)` uint8 RGB.
    """
    rng = np.random.default_rng([seed, row.index, 1])
    for face in drawn_faces(row, rng):
        yield draw_face(face, rng)


def drawn_faces(row: DemoRow, rng: np.random.Generator) -> list[Face]:
    """Return the face of each frame of a clip; `rng` is that of its pictures, at its start."""
    face = sample_face(rng, LOOKS[EMOTIONS[row.label].look])
    return moving_faces(face, row.n_frames, FPS, rng)


def make_samples(row: DemoRow, seed: int) -> NDArray[np.float32]:
    """Synthesise the sound of a clip: `(N,)` float32 at 16 kHz, as long as its frames."""
    rng = np.random.default_rng([seed, row.index, 2])
    voice = sample_voice(rng, SOUNDS[EMOTIONS[row.label].sound])
    return synthesise(voice, row.n_frames / FPS, rng).samples


def write_demo_corpus(
    out_dir: Path,
    *,
    n_clips: int = 480,
    seed: int = 0,
    on_clip: Callable[[], None] | None = None,
) -> Path:
    """Write the demo corpus: `media/clip_0000.mp4` (H.264 + AAC) and so on, and `labels.csv`.

    A clip is written aside and renamed, so an interrupted run is continued by calling again;
    clips that are there are kept, and a second call changes nothing.

    Args:
        out_dir: Folder of the corpus; made if missing.
        n_clips: Number of clips.
        seed: Seed of everything random.
        on_clip: Called once per clip, written or kept, from the calling thread.

    Returns:
        Path of `labels.csv`, with the columns of `COLUMNS`; `file` is relative to `media/`.

    Raises:
        SchemaError: The number is not positive, or the folder holds another demo corpus.
    """
    rows = plan_demo(n_clips, seed)
    media_dir = out_dir / "media"
    media_dir.mkdir(parents=True, exist_ok=True)
    _claim(out_dir, {"generator": _GENERATOR, "n_clips": n_clips, "seed": seed})
    csv_path = out_dir / "labels.csv"

    def write(row: DemoRow) -> None:
        path = media_dir / row.file
        if not path.exists():
            _write_mp4(row, seed, path)

    # Two threads: the encoder works without the interpreter lock while the next clip is drawn.
    with ThreadPoolExecutor(max_workers=2) as pool:
        for _ in pool.map(write, rows):
            if on_clip is not None:
                on_clip()
    if not csv_path.exists():
        write_text_aside(csv_path, _labels_csv(rows))
    logger.debug("Demo corpus of %d clips (seed %d) in %s", n_clips, seed, out_dir)
    return csv_path


def write_demo_faces(out_dir: Path) -> Path:
    """Write tables of the drawn faces as OpenFace would: `faces/clip_0000.csv` and so on.

    Each has a row per frame with the landmarks in pixels and action units, by what was drawn and not by
    looking at it. Tables that are there are kept.

    Args:
        out_dir: Folder of a demo corpus from `write_demo_corpus`, of any number of clips.

    Returns:
        The folder of the tables, for `--faces` and for annotation's `detector.folder`.

    Raises:
        SchemaError: The folder holds no demo corpus, or one of another version of the generator.
    """
    try:
        held = json.loads((out_dir / "demo.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SchemaError(
            f"{out_dir} holds no demo corpus (there is no demo.json). Write it first."
        ) from None
    if held["generator"] != _GENERATOR:
        raise SchemaError(
            f"{out_dir} holds a demo corpus of generator {held['generator']}, this one is {_GENERATOR} and "
            "draws other faces. Write the corpus anew in another folder."
        )
    folder = out_dir / "faces"
    folder.mkdir(exist_ok=True)
    for row in plan_demo(held["n_clips"], held["seed"]):
        table = (folder / row.file).with_suffix(".csv")
        if not table.exists():
            write_text_aside(table, _faces_csv(row, held["seed"]))
    return folder


def _faces_csv(row: DemoRow, seed: int) -> str:
    """Return a clip's table of faces: OpenFace's columns, frames counted from 1."""
    faces = drawn_faces(row, np.random.default_rng([seed, row.index, 1]))
    units = list(action_units(faces[0]))
    names = ["frame", "face_id", "timestamp", "confidence", "success"]
    names += [f"{axis}_{n}" for axis in "xy" for n in range(68)]
    names += [f"{unit}_r" for unit in units] + [f"{unit}_c" for unit in units]
    lines = [", ".join(names)]
    for number, face in enumerate(faces):
        cells = [str(number + 1), "0", f"{number / FPS:.3f}", "0.98", "1"]
        cells += [f"{value:.1f}" for value in (FRAME_PX * openface_landmarks(face)).T.ravel()]
        strengths = action_units(face).values()
        cells += [f"{value:.2f}" for value in strengths]
        cells += [f"{value >= 1:.2f}" for value in strengths]
        lines.append(", ".join(cells))
    return "\n".join(lines) + "\n"


def _claim(out_dir: Path, settings: dict[str, int]) -> None:
    """Note in `demo.json` what this folder holds; refuse one that holds something else."""
    note = out_dir / "demo.json"
    if create_once(note, (json.dumps(settings, sort_keys=True) + "\n").encode()):
        return
    held = json.loads(note.read_text(encoding="utf-8"))
    if held != settings:
        raise SchemaError(
            f"{out_dir} already holds another demo corpus: found {held}, asked for {settings}. "
            "Choose another folder, or remove that one."
        )


def _labels_csv(rows: list[DemoRow]) -> str:
    """Return the table of labels as CSV text with a header."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([row.file, row.label, row.subtitle, row.split, describe(row.label)])
    return text.getvalue()


def _write_mp4(row: DemoRow, seed: int, path: Path) -> None:
    """Encode a clip as H.264 and AAC; the file appears whole or not at all."""
    samples = make_samples(row, seed)
    with write_aside(path) as aside, av.open(str(aside), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width = video.height = FRAME_PX
        video.pix_fmt = "yuv420p"
        # "ultrafast" is quick and, unlike the presets with macroblock-tree rate control, gave the
        # same bytes in each of 25 runs; more threads would make them depend on the machine.
        video.options = {"preset": "ultrafast", "crf": "26", "threads": "1"}
        audio = container.add_stream("aac", rate=SAMPLE_RATE_HZ, layout="mono")
        audio.bit_rate = 48_000
        for pixels in make_frames(row, seed):
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(samples[None, :], format="fltp", layout="mono")
        sound.sample_rate = SAMPLE_RATE_HZ
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))
