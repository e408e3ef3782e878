"""Our store against zarr-python on the same shards, in one run: ratios, not absolute figures.

    python benchmarks/store.py [--clips 96] [--repeats 5]

Clips as preset v2 stores them (audio 200 frames, video 16 x 4, image 1025 tokens; float16 noise).
Commit: one unit of 32 clips with claim, small arrays, fsync, read-back and commit record, against
zarr-python assigning the same block and none of that. Read: all clips in random order, warm page
cache; ours compares each clip's checksum.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache.commit import ClipTokens, Status
from cache.layout import CLIPS_PER_SHARD, arrays
from cache.spec import TokenSpec
from cache.store import TokenStore
from cache.writer import create_array
from train.presets import v2

AUDIO_FRAMES = 200


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def make_unit(spec: TokenSpec, number: int, rng: np.random.Generator) -> list[ClipTokens]:
    """Return a unit of clips with random tokens."""
    shape = (AUDIO_FRAMES, spec.max_shape[1]) if spec.stream == "audio" else spec.max_shape
    n_frames = spec.frames.n_frames if spec.frames else 0
    return [
        ClipTokens(
            f"{number * CLIPS_PER_SHARD + i:064x}",
            Status.OK,
            rng.standard_normal(shape, np.float32).astype(np.float16),
            frame_index=tuple(range(n_frames)),
            frame_pts_s=tuple(i / 25 for i in range(n_frames)),
        )
        for i in range(CLIPS_PER_SHARD)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=96, help="rounded up to whole units")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    root = Path(tempfile.mkdtemp(prefix="emocache-benchmark-"))
    try:
        print(f"{'stream':<8}{'work':<8}{'ours':>14}{'zarr-python':>14}{'ratio':>8}")
        for spec in (s.with_weights("00" * 32) for s in v2().tokens.all()):
            measure(spec, root / spec.stream, arguments.clips, arguments.repeats, rng)
    finally:
        shutil.rmtree(root)


def measure(
    spec: TokenSpec, root: Path, n_clips: int, repeats: int, rng: np.random.Generator
) -> None:
    """Print one stream's two rows: medians of interleaved repeats."""
    store = TokenStore.open_or_create(root / "store")
    plan = arrays(spec)[0]
    n_units = -(-n_clips // CLIPS_PER_SHARD)
    plain = zarr.create_group(root / "plain", zarr_format=3)
    create_array(plain, plan)
    plain[plan.name].resize((max(n_units, repeats) * CLIPS_PER_SHARD, *plan.tail))
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(max(n_units, repeats)):
        clips = make_unit(spec, number, rng)
        block = np.zeros((CLIPS_PER_SHARD, *plan.tail), np.float16)
        for row, clip in enumerate(clips):
            block[row, : len(clip.tokens)] = clip.tokens
        rows = slice(number * CLIPS_PER_SHARD, (number + 1) * CLIPS_PER_SHARD)
        ours.append(seconds(lambda c=clips: store.commit(spec, c, {})))
        theirs.append(seconds(lambda r=rows, b=block: plain[plan.name].__setitem__(r, b)))
    report(spec, "commit", ours, theirs, CLIPS_PER_SHARD)
    entries = list(store.index(spec).entries.values())[:n_clips]
    ours, theirs = [], []
    for _ in range(repeats):
        order = rng.permutation(len(entries))
        ours.append(seconds(lambda o=order: [store.read(spec, entries[i].key) for i in o]))
        theirs.append(seconds(lambda o=order: [store.read_with_zarr(spec, entries[i]) for i in o]))
    report(spec, "read", ours, theirs, len(entries))


def report(spec: TokenSpec, what: str, ours: list[float], theirs: list[float], n: int) -> None:
    """Print clips per second and the median of the paired ratios."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    rates = [n / statistics.median(x) for x in (ours, theirs)]
    print(f"{spec.stream:<8}{what:<8}{rates[0]:>12.0f}/s{rates[1]:>12.0f}/s{ratio:>7.1f}x")


if __name__ == "__main__":
    main()
