"""How long a corpus takes to become a manifest, and the memory of it.

    python benchmarks/corpus.py index [--records 130000] [--media 130000] [--work DIR]
    python benchmarks/corpus.py manifest [--records 130000] [--work DIR]

`index`: a dataset in the layout of MELD is made: three CSV files, with as many utterances as the twelve
corpora of MMEVerse have together, and a small sound file for some of them. Each command then runs as a
user would run it, in a process of its own; time includes its start, memory is its peak.

`manifest`: records that say all that a record can (two subtitles, 17 action units, four descriptions of some
60 words) are written, read one by one, read as a whole, and looked through by `annotate quality`, each in a
process of its own, too.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cache.clip import DESCRIPTION_KINDS, Clip, Description, Peak, Record, Subtitle
from cache.labels import LabelSpace
from cache.manifest import Header, ManifestWriter, iter_records, read_manifest

__all__ = ("iter_records", "read_manifest", "write_records")

ROOT = Path(__file__).resolve().parents[1]
EMOTIONS = ("neutral", "surprise", "fear", "sadness", "joy", "disgust", "anger")
SENTIMENTS = ("positive", "neutral", "negative")
COLUMNS = (
    "Sr No.", "Utterance", "Speaker", "Emotion", "Sentiment", "Dialogue_ID", "Utterance_ID", "Season",
    "Episode", "StartTime", "EndTime",
)  # fmt: skip
SHARES = {"train": 0.73, "dev": 0.08, "test": 0.19}
MEDIA_FOLDERS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "test_splits"}
PER_DIALOGUE = 10
_WORDS = (
    "well you know I really think that we should go there, maybe tomorrow; or never? no".split()
)

MAPPING = """\
id: bench
language: en
spaces:
  emotion: {{labels: [{emotions}]}}
  sentiment: {{labels: [{sentiments}]}}
layouts:
  csv:
    about: made by a benchmark
    sources:
{sources}
    splits: {{train: train, dev: val, test: test}}
    fields:
      id: "{{split}}_dia{{Dialogue_ID}}_utt{{Utterance_ID}}"
      media: "{{folder}}/dia{{Dialogue_ID}}_utt{{Utterance_ID}}"
      split: "{{split}}"
      parent: "{{split}}_dia{{Dialogue_ID}}"
      speaker: "{{Speaker}}"
      subtitles: [{{text: "{{Utterance}}"}}]
      emotion: "{{Emotion}}"
      sentiment: "{{Sentiment}}"
"""


@dataclass(frozen=True)
class Run:
    """What one command took."""

    what: str
    seconds: float
    peak_mib: float
    n_files: int = 0


def write_dataset(folder: Path, n_records: int) -> Path:
    """Write the tables and a mapping file; return the latter."""
    rng = random.Random(0)
    lines = []
    for split, share in SHARES.items():
        with (folder / f"{split}_sent_emo.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for number in range(round(share * n_records)):
                writer.writerow(_utterance(number, rng))
        lines.append(
            f"      - {{files: [{split}_sent_emo.csv], set: {{split: {split}, "
            f"folder: {MEDIA_FOLDERS[split]}}}}}"
        )
    mapping = folder / "mapping.yaml"
    mapping.write_text(
        MAPPING.format(
            emotions=", ".join(EMOTIONS), sentiments=", ".join(SENTIMENTS), sources="\n".join(lines)
        ),
        encoding="utf-8",
    )
    return mapping


def _utterance(number: int, rng: random.Random) -> list[object]:
    dialogue, utterance = divmod(number, PER_DIALOGUE)
    text = " ".join(rng.choices(_WORDS, k=rng.randint(1, 25)))
    return [
        number, text, f"Speaker {rng.randint(1, 300)}", rng.choice(EMOTIONS), rng.choice(SENTIMENTS),
        dialogue, utterance, 1, number % 24, "0:36:59,425", "0:37:02,100",
    ]  # fmt: skip


def write_media(folder: Path, n_records: int) -> int:
    """Write a small WAV file for every record, each with other bytes; return how many."""
    n_samples = 160
    head = b"".join(
        (
            b"RIFF", (36 + 2 * n_samples).to_bytes(4, "little"), b"WAVEfmt ",
            (16).to_bytes(4, "little"), (1).to_bytes(2, "little"), (1).to_bytes(2, "little"),
            (16_000).to_bytes(4, "little"), (32_000).to_bytes(4, "little"),
            (2).to_bytes(2, "little"), (16).to_bytes(2, "little"),
            b"data", (2 * n_samples).to_bytes(4, "little"),
        )
    )  # fmt: skip
    rng = random.Random(1)
    n = 0
    for split, share in SHARES.items():
        (folder / MEDIA_FOLDERS[split]).mkdir(parents=True)
        for number in range(round(share * n_records)):
            dialogue, utterance = divmod(number, PER_DIALOGUE)
            path = folder / MEDIA_FOLDERS[split] / f"dia{dialogue}_utt{utterance}.wav"
            path.write_bytes(head + rng.randbytes(2 * n_samples))
            # What changed a moment ago may change again unnoticed, so it would not be remembered.
            os.utime(path, (1_700_000_000, 1_700_000_000))
            n += 1
    return n


def run(what: str, *arguments: object, home: Path, n_files: int = 0) -> Run:
    """Run `emocache` and measure it.

    Raises:
        SystemExit: It failed.
    """
    code = "import emocache; emocache.run()"
    # 1: it found something worth telling, which is no failure.
    return run_code(what, code, *arguments, home=home, n_files=n_files, allowed=(0, 1))


def run_code(
    what: str,
    code: str,
    *arguments: object,
    home: Path,
    n_files: int = 0,
    allowed: tuple[int, ...] = (0,),
) -> Run:
    """Run Python code and measure it.

    Raises:
        SystemExit: Its exit code is not allowed.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    log = home / "output.txt"
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "XDG_CACHE_HOME": str(home)},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in allowed:
        sys.exit(f"{what}: exit code {process.returncode}\n{log.read_text()}")
    return Run(what, time.perf_counter() - started, usage.ru_maxrss / 1024, n_files)


@contextmanager
def folder_of(work: Path | None) -> Iterator[Path]:
    """Give a folder that is removed at the end."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield Path(folder)


def index(n_records: int, n_media: int, work: Path | None) -> list[Run]:
    """Index a dataset without media, with media, and with media that were read before."""
    runs = []
    with folder_of(work) as folder:
        data, media = folder / "data", folder / "media"
        data.mkdir()
        out = ("--out", folder / "m.parquet")
        mapping = write_dataset(data, n_records)
        what = f"{n_records:,} records from CSV"
        runs.append(run(what, "index", "--mapping", mapping, data, *out, home=folder))
        if n_media:
            mapping = write_dataset(data, n_media)
            n_files = write_media(media, n_media)
            for state in ("read for the first time", "remembered"):
                given = ("index", "--mapping", mapping, data, "--media", media, *out)
                what = f"{n_media:,} records with media, {state}"
                runs.append(run(what, *given, home=folder, n_files=n_files))
    return runs


def write_records(path: Path, n_records: int) -> None:
    """Write a manifest of full records, each with other texts."""
    rng = random.Random(2)
    words = [f"{a}{b}" for a in ("bright", "low", "quick", "calm") for b in ("brow", "tone", "eye")]
    spaces = {"bench/emotion": LabelSpace(name="bench/emotion", labels=EMOTIONS)}
    units = {f"AU{unit:02d}": unit / 10 for unit in range(1, 18)}
    with ManifestWriter(path, Header(media_root=".", label_spaces=spaces)) as writer:
        for number in range(n_records):
            said = " ".join(rng.choices(_WORDS, k=12))
            writer.write(
                Record(
                    uid=f"bench/{number}",
                    media=f"{number}.mp4",
                    clip=Clip(sha256=f"{number:064x}", n_bytes=number, duration_s=3.0),
                    split="train",
                    subtitles=(Subtitle(text=said, language="en"), Subtitle(text=said[::-1])),
                    emotion=rng.choice(EMOTIONS),
                    peak=Peak(index=10, score=7.5),
                    action_units=units,
                    descriptions=tuple(
                        Description(
                            kind=kind,
                            text=f"The {' the '.join(rng.choices(words, k=30))} of {number}.",
                            model="made up",
                            prompt_id="none",
                        )
                        for kind in DESCRIPTION_KINDS
                    ),
                )
            )


def manifest(n_records: int, work: Path | None) -> list[Run]:
    """Write, stream, load and examine a manifest of full records."""
    with folder_of(work) as folder:
        path = folder / "m.parquet"
        parts = {
            "written": f"write_records(Path({str(path)!r}), {n_records})",
            "read one by one, validated": f"sum(1 for _ in iter_records(Path({str(path)!r})))",
            "read as a whole": f"read_manifest(Path({str(path)!r}))",
        }
        runs = [
            run_code(
                f"{n_records:,} full records {what}",
                f"from pathlib import Path; from benchmarks.corpus import *; {code}",
                home=folder,
            )
            for what, code in parts.items()
        ]
        what = f"{4 * n_records:,} descriptions by annotate quality"
        return [*runs, run(what, "annotate", "quality", path, home=folder)]


def table(runs: list[Run]) -> Table:
    """Return what the commands took."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("what", "seconds", "peak memory", "files"):
        found.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
    for one in runs:
        found.add_row(
            one.what,
            f"{one.seconds:.1f}",
            f"{one.peak_mib:,.0f} MiB",
            f"{one.n_files:,}" if one.n_files else "-",
        )
    return found


def main() -> None:
    """Run a benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("index", help="a dataset to a manifest")
    one.add_argument(
        "--media", type=int, default=130_000, help="records with a media file; 0: none"
    )
    two = parts.add_parser("manifest", help="a manifest written, read and examined")
    for part in (one, two):
        part.add_argument("--records", type=int, default=130_000)
        part.add_argument(
            "--work", type=Path, help="where files are made; default a temporary folder"
        )
    given = parser.parse_args()
    if given.part == "index":
        runs = index(given.records, given.media, given.work)
    else:
        runs = manifest(given.records, given.work)
    Console(width=100).print(table(runs))


if __name__ == "__main__":
    main()
