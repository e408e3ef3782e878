"""What the annotation tests share: a small corpus with tables of action units, and how to annotate it."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emocache
from cache.clip import Clip, Record, Subtitle, file_sha256
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, write_manifest
from extract.annotate.config import AnnotationConfig
from extract.annotate.evidence.action_units import AuTable, FrameUnits
from extract.annotate.evidence.detectors import Detection
from extract.annotate.job import open_job
from extract.annotate.pipeline import Annotation, prepare, work_storage
from extract.annotate.presets import Preset, configure
from extract.annotate.results import RecordResult
from extract.annotate.worker import work
from extract.corpora.demo import EMOTIONS, write_demo_corpus
from extract.media import probe
from tests.chat_server import ChatServer

MODELS = ("vl", "al", "chat")
REPOSITORY = Path(__file__).resolve().parents[1]
UNITS = ("AU01", "AU02", "AU04", "AU05", "AU06", "AU12", "AU15", "AU25", "AU26")


@dataclass(frozen=True)
class Corpus:
    """A manifest on disk."""

    root: Path
    records: tuple[Record, ...]
    header: Header

    @property
    def manifest(self) -> Path:
        """Its file."""
        return self.root / "m.parquet"

    @property
    def tables(self) -> Path:
        """Folder of OpenFace tables."""
        return self.root / "units"

    def write(self) -> Corpus:
        """Write the manifest."""
        write_manifest(self.manifest, Manifest(header=self.header, records=self.records))
        return self


def header_of(**spaces: Sequence[str]) -> Header:
    made = {name: LabelSpace(name=name, labels=tuple(labels)) for name, labels in spaces.items()}
    return Header(media_root=".", label_spaces=made)


def clip_of(path: Path) -> Clip:
    """Look at a media file, as `emocache index` does."""
    facts = probe(path)
    return Clip(
        sha256=file_sha256(path),
        n_bytes=path.stat().st_size,
        duration_s=facts.duration_s,
        has_video=facts.has_video and not facts.is_image,
        has_audio=facts.has_audio,
        has_image=facts.has_video,
        width_px=facts.width_px,
        height_px=facts.height_px,
        n_frames=facts.n_frames,
    )


def demo_corpus(root: Path, n_clips: int = 12, *, with_tables: bool = True) -> Corpus:
    """Write generated clips, a table of action units for each, and their manifest."""
    labels = write_demo_corpus(root, n_clips=n_clips)
    records = []
    with labels.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            media = f"media/{row['file']}"
            records.append(
                Record(
                    uid=f"demo/{Path(media).stem}",
                    media=media,
                    clip=clip_of(root / media),
                    split="test" if number % 3 == 2 else "train",
                    emotion=row["label"],
                    subtitles=(Subtitle(text=row["subtitle"], language="en"),),
                )
            )
            if with_tables:
                write_table(root / "units" / f"{Path(media).stem}.csv", number)
    return Corpus(root, tuple(records), header_of(emotion=EMOTIONS)).write()


def intensities_of(number: int, n_frames: int = 20) -> list[dict[str, float]]:
    """Return made-up intensities of each frame, other ones for another number."""
    return [
        {unit: ((frame * 7 + number * 3 + at * 5) % 11) / 2.2 for at, unit in enumerate(UNITS)}
        for frame in range(n_frames)
    ]


def write_table(path: Path, number: int) -> None:
    """Write a table as OpenFace does, with a wrong idea of when a frame is shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [f"{unit}_r" for unit in UNITS] + [f"{unit}_c" for unit in UNITS]
    lines = [", ".join(["frame", "face_id", "timestamp", "confidence", "success", *names])]
    for index, found in enumerate(intensities_of(number)):
        cells = [str(index + 1), "0", f"{index / 10:.3f}", "0.98", "1"]
        cells += [f"{found[unit]:.2f}" for unit in UNITS]
        cells += [str(int(found[unit] >= 1)) for unit in UNITS]
        lines.append(", ".join(cells))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings_of(server: ChatServer, corpus: Corpus | None = None, *more: str) -> list[str]:
    """Return the settings with which the server is asked, as KEY=VALUE."""
    found = []
    for role, model in zip(("visual_objective", "audio_tone", "consolidate"), MODELS, strict=True):
        found += [
            f"{role}.base_url={server.base_url}",
            f"{role}.model={model}",
            f"{role}.api_key_env=none",
            f"{role}.in_flight=4",
            f"{role}.retry.base_s=0.01",
        ]
    if corpus is None:
        found.append("detector.kind=none")
    else:
        found += ["detector.kind=openface-csv", f"detector.folder={corpus.tables}"]
    return [*found, *more]


def preset_of(
    server: ChatServer, corpus: Corpus | None = None, *more: str, name: str = "mmeverse"
) -> Preset:
    settings = settings_of(server, corpus, *more)
    if name == "merr-coarse":
        settings = [item for item in settings if not item.startswith("consolidate.")]
    return configure(name, settings)


def annotate(
    corpus: Corpus, preset: Preset, folder: Path, *, unit_clips: int = 4, **options: Any
) -> Annotation:
    """Annotate in this process, and return what is known then."""
    plan_options = {k: options.pop(k) for k in ("splits", "limit", "retry") if k in options}
    found = prepare(corpus.records, preset, folder, unit_clips=unit_clips, **plan_options)
    if found.plan.todo:
        job = open_job(work_storage(folder), len(corpus.records), found.plan)
        config = AnnotationConfig(
            store=str(folder),
            manifest=str(corpus.manifest),
            media_root=options.pop("media_root", str(corpus.root)),
            job_id=job.job_id,
            generation=job.generation,
            session="test",
            preset=preset,
            settings=found.settings,
            n_decoders=2,
            **options,
        )
        try:
            work(config.model_dump_json(), records=corpus.records)
        finally:
            found.results.refresh()
    return found


def results_of(found: Annotation) -> dict[str, RecordResult]:
    """Return the results by uid."""
    results = [found.results.get(key) for key in found.plan.keys.values()]
    return {result.uid: result for result in results if result is not None}


def command(
    *arguments: str, cwd: Path, program: Sequence[str] = ("emocache",)
) -> subprocess.Popen[str]:
    """Start the command line in a process of its own.

    Args:
        arguments: Its arguments.
        cwd: Where it runs.
        program: The module that is run, and what comes ahead of the arguments.
    """
    return subprocess.Popen(
        [sys.executable, "-m", *program, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def dying(*arguments: str, nth: int, folder: Path, cwd: Path) -> subprocess.Popen[str]:
    """Start the command line, killed as by a power cut before the n-th file operation in a folder."""
    return command(*arguments, cwd=cwd, program=("tests.annotating", str(nth), str(folder)))


def main(nth: int, folder: str, arguments: Sequence[str]) -> int:
    """Be the command line, and die; for `dying`."""
    n_steps = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal n_steps
        if event not in ("open", "os.rename", "os.link", "os.mkdir", "os.remove"):
            return
        if isinstance(args[0], str) and args[0].startswith(folder):
            n_steps += 1
            if n_steps == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return emocache.main(arguments)


class Counting:
    """A detector of a user's own."""

    method = "counting-au-sum"
    n_calls = 0

    def detect(self, record: Record, path: Path) -> Detection:
        """Find the same face in every clip."""
        type(self).n_calls += 1
        frames = (FrameUnits(index=3, intensities={"AU12": 2.0}),)
        return Detection("ok", AuTable(frames=frames))


class Dying:
    """A detector that takes its process along."""

    method = "dying"

    def detect(self, record: Record, path: Path) -> Detection:
        """Die with one clip."""
        if record.uid == "demo/clip_0001":
            os.kill(os.getpid(), signal.SIGKILL)
        return Detection("ok", AuTable(frames=()))


def copy_of(corpus: Corpus, root: Path) -> Corpus:
    """Return a copy that a test may damage."""
    shutil.copytree(corpus.root, root)
    return Corpus(root, corpus.records, corpus.header)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
