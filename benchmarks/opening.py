"""How long a store of millions of clips takes to open, and the memory of its index.

    python benchmarks/opening.py [--clips 10000000] [--work DIR]

The commit records are made with their true names and number, but hold nothing: opening a store lists
them and reads its snapshot. Time and memory are those of a fresh process, after its imports.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cache import layout
from cache.index import Index, UnitTable, write_snapshot
from cache.layout import CLIPS_PER_SHARD
from cache.storage import LocalStorage
from cache.store import TokenStore
from train.presets import v2

SPEC = v2().tokens.audio.with_weights("00" * 32)


def write_store(root: Path, n_clips: int) -> None:
    """Write the snapshot and the names of the commit records of `n_clips` clips."""
    TokenStore.open_or_create(root)
    n_units = -(-n_clips // CLIPS_PER_SHARD)
    rng = np.random.default_rng(0)
    index = Index()
    for name, column in index.columns.items():
        index.columns[name] = rng.integers(0, np.iinfo(column.dtype).max, n_clips, column.dtype)
    index.columns["k0"].sort()
    index.columns["row"] = np.arange(n_clips, dtype=np.uint32)
    index.columns["flags"][:] = 0
    index.columns["valid_len"] %= 1500
    ids = sorted(hashlib.sha256(str(i).encode()).hexdigest()[:24] for i in range(n_units))
    shards = np.arange(n_units)
    index.units = UnitTable(
        np.array(ids, "S24"), shards, np.full(n_units, 10**8), np.ones(n_units, np.bool_)
    )
    write_snapshot(LocalStorage(root), SPEC.spec_id, index)
    folder = root / layout.commits(SPEC.spec_id)
    folder.mkdir(parents=True)
    for identity in ids:
        (folder / f"{identity}.json").touch()


def resident_bytes() -> dict[str, int]:
    """Return this process's memory: of its own, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: 1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")}


def measure(root: Path, n_clips: int) -> None:
    """Open the store and look up a thousand clips; print time and memory."""
    before, start = resident_bytes(), time.perf_counter()
    index = TokenStore.open(root).index(SPEC)
    opened_s = time.perf_counter() - start
    after = resident_bytes()
    assert len(index) == n_clips
    columns = index.columns
    places = np.random.default_rng(1).integers(0, n_clips, 1000)
    keys = [
        "".join(f"{int(columns[f'k{word}'][place]):016x}" for word in range(4)) for place in places
    ]
    start = time.perf_counter()
    assert (index.locate(keys).row == places).all()
    looked_up_s = time.perf_counter() - start
    own, mapped = (after[name] - before[name] for name in ("RssAnon", "RssFile"))
    print(
        f"{n_clips:,} clips: opened in {opened_s * 1000:.0f} ms, {looked_up_s * 1000:.1f} us a clip found"
    )
    print(
        f"memory: {own / 1e6:.0f} MB own and {mapped / 1e6:.0f} MB of the mapped snapshot, "
        f"{(own + mapped) / n_clips:.1f} bytes a clip"
    )


def main() -> None:
    """Write, then measure in fresh processes, three times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        root = Path(folder) / "store"
        context = multiprocessing.get_context("spawn")
        for work in (write_store, measure, measure, measure):
            child = context.Process(target=work, args=(root, arguments.clips))
            child.start()
            child.join()
            if child.exitcode:
                sys.exit(child.exitcode)


if __name__ == "__main__":
    main()
