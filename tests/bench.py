"""A synthetic MMEVerse-Bench: the published counts, the documented class counts, made-up clips.

All 29,694 records share a few clips, so a store of them is small; each is asked about as a record of
its own all the same.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.clip import Clip, Record, Subtitle
from cache.commit import ClipTokens
from cache.manifest import Header, Manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.benchmarks import Benchmark, benchmarks
from extract.corpora.registry import corpus_row
from tests.conftest import key_of, make_clip

CLIPS = tuple(f"bench{i}" for i in range(6))
MODES = {"mer2023": "test1", "mer2024": "other", "iemocap": "Session5", "bold": "val"}
"""`mode` in the released files, where it is not the split."""

# How often each truth occurs, where it is documented; else labels take turns.
_COUNTS: dict[str, dict[str, int]] = {
    "mer2023": {"angry": 105, "happy": 93, "neutral": 88, "worried": 57, "sad": 50, "surprise": 18},
    "mer2024": {
        "sad": 317, "happy": 246, "neutral": 201, "angry": 163, "worried": 159, "surprise": 83,
    },
    "meld-e": {
        "neutral": 1256, "joy": 402, "anger": 345, "surprise": 281, "sad": 208, "disgust": 68,
        "fear": 50,
    },
}  # fmt: skip
_VAL = {"caer": 0.4, "e3": 0.5, "mc-eiu": 0.3}
"""Share of the validation split among the items that test and validation make up."""


def truths_of(name: str) -> list[tuple[str, ...]]:
    """Return the truth of every item of a set, as many as were published."""
    row = benchmarks()[name]
    if name in _COUNTS:
        flat = [label for label, n in _COUNTS[name].items() for _ in range(n)]
        random.Random(name).shuffle(flat)
        return [(label,) for label in flat]
    if row.field in ("emotion", "sentiment", "intent"):
        space = corpus_row(row.corpus).spaces[row.field].labels
        known = [*row.options, *(["neutral"] if "neutral" in space else [])]
        return [
            (label,) for label in itertools.islice(itertools.cycle(dict.fromkeys(known)), row.n)
        ]
    chance = random.Random(name)
    sizes = (2, 2) if name == "mafw-m" else (1, 3)
    return [tuple(sorted(chance.sample(row.options, chance.randint(*sizes)))) for _ in range(row.n)]


def records_of(every: int = 1) -> Iterator[Record]:
    """Yield the records of all sets, or every n-th of them.

    MELD's test clips have an emotion and a polarity, MC-EIU's an emotion and an intent, and of MAFW's
    the first have several labels too: a clip with two questions is one record.
    """
    for corpus in dict.fromkeys(row.corpus for row in benchmarks().values()):
        rows = [row for row in benchmarks().values() if row.corpus == corpus]
        fields: dict[int, dict[str, Any]] = {}
        for row in rows:
            for i, truth in enumerate(truths_of(row.id)):
                found = fields.setdefault(i, {"benchmarks": []})
                found["benchmarks"].append(row.id)
                one = row.field in ("emotion", "sentiment", "intent")
                found[row.field] = truth[0] if one else truth
        for i, found in fields.items():
            if i % every == 0:
                yield _record(corpus, i, len(fields), found)


def _record(corpus: str, i: int, n: int, found: Mapping[str, Any]) -> Record:
    is_val = corpus == "bold" or (
        "meld-e" not in found["benchmarks"] if corpus == "meld" else i < _VAL.get(corpus, 0) * n
    )
    name = CLIPS[i % len(CLIPS)]
    return Record(
        uid=f"{corpus}/{i:05d}",
        media=f"{corpus}/{i:05d}.mp4",
        clip=Clip(sha256=key_of(name), n_bytes=1, duration_s=1.0 + i % 12),
        split="val" if is_val else "test",
        language="zh" if corpus.startswith(("mer", "sims", "ov", "mc")) else "en",
        subtitles=(Subtitle(text=f"Line {i} is spoken."),) if i % 5 else (),
        **{k: tuple(v) if k == "benchmarks" else v for k, v in found.items()},
    )


def bench_header() -> Header:
    """Return the header of a manifest of all corpora."""
    spaces = {
        f"{row.corpus}/{row.field}": corpus_row(row.corpus).spaces[row.field]
        for row in benchmarks().values()
    }
    return Header(media_root=".", label_spaces=spaces)


def bench_manifest(every: int = 1) -> Manifest:
    """Return the whole bench, or every n-th record of each corpus."""
    return Manifest(header=bench_header(), records=tuple(records_of(every)))


def write_bench_store(folder: Path, specs: Mapping[str, TokenSpec]) -> TokenStore:
    """Write the tokens of the clips that all records share; one clip is silent."""
    store = TokenStore.open_or_create(folder)
    for spec in specs.values():
        clips: list[ClipTokens] = [
            make_clip(spec, name, n_audio=30 + 20 * i) for i, name in enumerate(CLIPS)
        ]
        store.commit(spec, clips, {"torch": "0"})
    return store


def released_rows(
    row: Benchmark, replies: Sequence[str] | None = None, records: Sequence[Record] | None = None
) -> list[dict[str, str]]:
    """Return the lines of a predictions file as the released scripts write it; perfect by default."""
    chosen = [r for r in records or records_of() if row.id in r.benchmarks]
    found = []
    for i, record in enumerate(chosen):
        truth = ", ".join(record.labels_of(row.field))
        found.append(
            {
                "video_id": record.uid.partition("/")[2],
                "answer": truth,
                "response": truth if replies is None else replies[i],
                "mode": MODES.get(row.id, record.split or ""),
            }
        )
    return found


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path
