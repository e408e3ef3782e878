"""How long it takes to count, plot, check, filter and merge a manifest of the size of MMEVerse.

    python benchmarks/corpus_stats.py [--scale 1.0] [--work DIR] [--keep]

A manifest is made with the twelve corpora of Table 1 in their sizes, their label spaces, made-up labels,
subtitles, durations, action units and descriptions. Each command then runs as a user would run it, in a
process of its own; time includes its start, memory is its peak.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # ahead of this folder, in which `extract` is a benchmark

from cache.clip import Clip, Description, Peak, Record, Subtitle  # noqa: E402
from cache.labels import LabelField  # noqa: E402
from cache.manifest import CorpusNote, Header, ManifestWriter  # noqa: E402
from extract.corpora.registry import corpus_ids, corpus_row  # noqa: E402
from extract.corpora.row import CorpusRow  # noqa: E402

UNITS = (
    "01",
    "02",
    "04",
    "05",
    "06",
    "07",
    "09",
    "10",
    "12",
    "14",
    "15",
    "17",
    "20",
    "23",
    "25",
    "26",
    "45",
)
"""Those that OpenFace gives an intensity for."""
SMILES = ("happy", "joy", "happiness", "excited", "positive")
_WORDS = "well you know I really think that we should go there maybe tomorrow or never no".split()


def write_mmeverse(path: Path, scale: float = 1.0, seed: int = 0) -> int:
    """Write a made-up manifest in the proportions of Table 1; return its records."""
    rows = [row for row in map(corpus_row, corpus_ids()) if row.expected.mmeverse]
    header = Header(
        media_root="media",
        label_spaces={f"{row.id}/{f}": space for row in rows for f, space in row.spaces.items()},
        scales={f"{row.id}/{name}": scale_ for row in rows for name, scale_ in row.scales.items()},
        corpora={row.id: CorpusNote(title=row.title, licence=row.licence) for row in rows},
    )
    rng = random.Random(seed)
    with ManifestWriter(path, header) as writer:
        for row in rows:
            for number in range(round((row.expected.mmeverse or 0) * scale)):
                writer.write(_record(row, number, rng))
        return len(writer)


def _record(row: CorpusRow, number: int, rng: random.Random) -> Record:
    split = rng.choices(("train", "val", "test"), (0.75, 0.08, 0.17))[0]
    labels = {field: _labels(row, field, rng) for field in row.spaces}
    emotion = next(iter(labels.get("emotion", ())), None)
    uid = f"{row.id}/{number:06d}"
    duration_s = round(rng.lognormvariate(1.1, 0.6), 2)
    smiles = emotion in SMILES
    targets: list[LabelField] = [field for field in ("emotion", "sentiment") if field in row.spaces]
    return Record(
        uid=uid,
        media=f"{row.id}/{number:06d}.mp4",
        clip=Clip(
            sha256=hashlib.sha256(uid.encode()).hexdigest(),
            n_bytes=100_000,
            duration_s=duration_s,
            has_video=True,
            has_audio=rng.random() > 0.02,
            has_image=True,
        ),
        split=split,
        benchmarks=tuple(
            rule.id
            for rule in row.benchmarks
            if split in (rule.splits or (split,)) and (rule.needs is None or labels.get(rule.needs))
        ),
        parent=f"{split}_{number // 10}",
        speaker=f"{split}_{number % 40}",
        language=row.language,
        subtitles=(
            Subtitle(text=" ".join(rng.choices(_WORDS, k=12)), language=row.language or "en"),
        ),
        emotion=emotion,
        emotion_multi=labels.get("emotion_multi", ()),
        sentiment=next(iter(labels.get("sentiment", ())), None),
        intent=next(iter(labels.get("intent", ())), None),
        peak=Peak(index=rng.randrange(60), method="openface-au-sum"),
        action_units={
            f"AU{unit}": round(
                min(5.0, rng.expovariate(0.5 if smiles and unit in ("06", "12") else 1.3)), 2
            )
            for unit in UNITS
        },
        descriptions=(
            Description(kind="visual_expression", text="The brows are raised. " * 4),
            Description(kind="visual_objective", text="A room with two people. " * 6, model="vlm"),
            Description(kind="audio_tone", text="The voice is low. " * 5, model="alm"),
            *(
                Description(kind="multimodal", text="The person. " * 25, target=field, model="llm")
                for field in targets
            ),
        ),
    )


def _labels(row: CorpusRow, field: LabelField, rng: random.Random) -> tuple[str, ...]:
    labels = row.spaces[field].labels
    # Another distribution for each corpus, skewed as real ones are.
    weights = [1 / (1 + (7 * i + len(row.id)) % len(labels)) for i in range(len(labels))]
    n = rng.randint(1, 3) if field.startswith("emotion_") else 1
    return tuple(dict.fromkeys(rng.choices(labels, weights, k=n)))


def run(home: Path, *arguments: object) -> tuple[float, float]:
    """Run `emocache` and return seconds and MiB at most; exit code 1 means findings.

    Raises:
        SystemExit: It failed.
    """
    command = [sys.executable, "-c", "import emocache; emocache.run()", *map(str, arguments)]
    log = home / "output.txt"
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=os.environ
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 1):
        sys.exit(f"{arguments}: exit code {process.returncode}\n{log.read_text()}")
    return time.perf_counter() - started, usage.ru_maxrss / 1024


@contextmanager
def folder_of(work: Path | None, keep: bool) -> Iterator[Path]:
    """Give a folder, which is removed at the end unless it shall be kept."""
    if keep and work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(dir=work) as folder:
        yield Path(folder)


def main() -> None:
    """Run the commands and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--scale", type=float, default=1.0, help="1: as many records as Table 1")
    parser.add_argument("--work", type=Path, help="where files go; default a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave the files in --work")
    given = parser.parse_args()
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("what", "seconds", "peak memory"):
        found.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
    with folder_of(given.work, given.keep) as folder:
        path = folder / "m.parquet"
        n = write_mmeverse(path, given.scale)
        part, rest = folder / "part.parquet", folder / "rest.parquet"
        commands: dict[str, tuple[object, ...]] = {
            "stats, tables only": ("corpus", "stats", path),
            "stats with page and plots": ("corpus", "stats", path, "--out", folder / "stats"),
            "check": ("corpus", "check", path),
            "filter": ("corpus", "filter", path, "--where", "corpus=meld,mosei", "--out", part),
            "filter, the rest": (
                "corpus", "filter", path, "--where", "corpus!=meld,mosei", "--out", rest,
            ),
            "merge": ("corpus", "merge", part, rest, "--out", folder / "merged.parquet"),
            "sample": ("corpus", "sample", path, "--n", 1000, "--out", folder / "sample.parquet"),
            "dedupe": ("corpus", "dedupe", path, "--out", folder / "unique.parquet"),
            "show": ("corpus", "show", path, "--random"),
        }  # fmt: skip
        for what, arguments in commands.items():
            seconds, mib = run(folder, *arguments)
            found.add_row(what, f"{seconds:.1f}", f"{mib:,.0f} MiB")
    console = Console(width=100)
    console.print(f"{n:,} records", highlight=False)
    console.print(found)


if __name__ == "__main__":
    main()
