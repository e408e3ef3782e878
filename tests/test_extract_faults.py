"""Faults in the middle of an extraction on local workers: clips that kill, chance, a full disk.

The invariant of each: what is committed is complete but for the guilty clips, once, and byte-equal to
a calm run; the innocent are not blamed. Lost workers and schedulers: test_engines.py, test_slurm.py.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.manifest import Manifest, write_manifest
from cache.store import TokenStore
from extract.config import WorkerConfig
from extract.encoders.bank import EncoderBank
from extract.engines.options import EngineOptions
from extract.engines.start import run_engine
from extract.index import index_folder
from extract.jobs.job import Job
from extract.plan import make_plan, open_job
from extract.run import extract, worker_config
from extract.summary import summarise
from tests.media import write_clip

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).resolve().parents[1]
N_GOOD = 10
GUILTY = {"segv": "crash", "hang": "hang", "hog": "memory", "truncated": "undecodable"}
"""Name of a clip -> what becomes of it."""

DECODER = """\
import ctypes, os, random, sys, time
from extract import decode_worker
prepare = decode_worker.prepare_inputs
chance = float(sys.argv.pop(1))
def faulty(path, sha256, media, *args, **more):
    if chance and random.random() < chance:
        os.kill(os.getpid(), 9 if random.random() < 0.5 else 11)
    if media == "segv.mp4":
        ctypes.string_at(0)
    while media == "hang.mp4":
        time.sleep(1)
    hoard = []
    while media == "hog.mp4":
        hoard.append(bytearray(os.urandom(1 << 20)) * 16)
    return prepare(path, sha256, media, *args, **more)
decode_worker.prepare_inputs = faulty
decode_worker.main()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, Path]:
    """Return the folder, its manifest, and the manifest's file."""
    folder = tmp_path_factory.mktemp("media")
    names = [f"{n:02d}" for n in range(N_GOOD)] + list(GUILTY)
    for seed, name in enumerate(names):
        write_clip(folder / f"{name}.mp4", seed=seed, seconds=0.4)
    whole = (folder / "truncated.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    path = folder / "m.parquet"
    manifest, _ = index_folder(folder, path)
    write_manifest(path, manifest)
    return folder, manifest, path


@pytest.fixture(scope="module")
def expected(
    corpus: tuple[Path, Manifest, Path],
    bank: EncoderBank,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], int | None]:
    """Checksums of a calm run, one clip at a time: (spec_id, key) -> CRC-32C."""
    folder, manifest, _ = corpus
    store = TokenStore.open_or_create(tmp_path_factory.mktemp("calm") / "s")
    plan = make_plan(manifest.records, bank.specs, store)
    extract(plan, manifest.records, bank, store, folder, n_threads=1, batch_tokens=1)
    return checksums(store, bank)


def checksums(store: TokenStore, bank: EncoderBank) -> dict[tuple[str, str], int | None]:
    """Return the checksums of all tokens; no clip is committed twice."""
    store.refresh()
    found = {}
    for spec in bank.specs:
        keys = [entry.key for commit in store.commits(spec) for entry in commit.clips]
        assert len(keys) == len(set(keys)), "no clip is committed twice"
        for entry in store.index(spec):
            if entry.crc32c is not None:
                found[spec.spec_id, entry.key] = entry.crc32c
    return found


def run_local(
    corpus: tuple[Path, Manifest, Path], bank: EncoderBank, root: Path, chance: float, attempts: int
) -> tuple[TokenStore, Job]:
    """Extract on two local workers, whose decoders are faulty."""
    folder, manifest, path = corpus
    decoder = root / "faulty_decoder.py"
    decoder.write_text(DECODER)
    store = TokenStore.open_or_create(root / "s")
    plan = make_plan(manifest.records, bank.specs, store, unit_clips=3)
    job = open_job(store, manifest.records, plan)
    config: WorkerConfig = worker_config(
        job, bank, store, manifest=path, media_root=folder, session="s1",
        n_threads=1, batch_tokens=1, deadline_s=4.0, memory_bytes=300_000_000, attempts=attempts,
        decoder_command=(sys.executable, str(decoder), str(chance)),
    )  # fmt: skip
    run_engine(EngineOptions(kind="local", workers=2), config, job)
    assert job.undone() == []
    return store, job


def test_clips_that_kill_their_decoder_cost_themselves_alone(
    corpus: tuple[Path, Manifest, Path],
    bank: EncoderBank,
    expected: dict[tuple[str, str], int | None],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    store, job = run_local(corpus, bank, tmp_path, chance=0.0, attempts=2)
    found = summarise(job)
    blamed = {Path(failure.uid).name: failure.kind for failure in found.failures}
    assert blamed == GUILTY
    guilty = {r.clip.sha256 for r in corpus[1].records if Path(r.media).stem in GUILTY}
    innocent = {place: crc for place, crc in expected.items() if place[1] not in guilty}
    assert checksums(store, bank) == innocent
    assert len(innocent) == 3 * N_GOOD
    evidence = {Path(one.uid).name: one for one in job.evidence().values()}
    assert evidence["segv"].exit_signal == "SIGSEGV"
    assert "Segmentation fault" in evidence["segv"].stderr_tail
    assert evidence["segv"].attempts == evidence["hang"].attempts == evidence["hog"].attempts == 2
    assert evidence["hang"].facts["container"].startswith("mov")
    for name in GUILTY:
        record_property("faults", (f"extraction: clip that ends as {GUILTY[name]}", 1))


def test_decoders_that_die_by_chance_lose_no_clip(
    corpus: tuple[Path, Manifest, Path],
    bank: EncoderBank,
    expected: dict[tuple[str, str], int | None],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    folder, manifest, _ = corpus
    calm = [r for r in manifest.records if Path(r.media).stem not in GUILTY]
    only_good = (
        folder,
        Manifest(header=manifest.header, records=tuple(calm)),
        tmp_path / "m.parquet",
    )
    write_manifest(only_good[2], only_good[1])
    # 15 attempts at 0.3: a clip is unlucky once in 70 million runs.
    store, job = run_local(only_good, bank, tmp_path, chance=0.3, attempts=15)
    keys = {r.clip.sha256 for r in calm}
    assert checksums(store, bank) == {p: crc for p, crc in expected.items() if p[1] in keys}
    assert not summarise(job).failures
    record_property("faults", ("extraction: decoder that dies by chance", 1))


def run_on(disk: Path, size: str, *command: str) -> list[subprocess.CompletedProcess[str]]:
    """Run a command on a tmpfs of some size that no one else sees, then again on a larger one."""
    own = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    mount = f"mount -t tmpfs -o size={size} tmpfs {disk}"
    if (
        shutil.which("unshare") is None
        or subprocess.run([*own, mount], capture_output=True).returncode
    ):
        pytest.skip("this machine does not allow mounting a tmpfs (needs root and unshare)")
    script = f"""{mount}
"$0" "$@" > {disk}.1 2>&1; echo $? > {disk}.rc1
mount -o remount,size=200m {disk}
"$0" "$@" > {disk}.2 2>&1; echo $? > {disk}.rc2
cp -r {disk}/s {disk}.copy
"""
    subprocess.run(
        [*own, script, *command],
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [
        subprocess.CompletedProcess(
            command, int(Path(f"{disk}.rc{n}").read_text()), Path(f"{disk}.{n}").read_text()
        )
        for n in (1, 2)
    ]


def test_a_full_disk_stops_local_workers_and_they_go_on_once_there_is_space(
    corpus: tuple[Path, Manifest, Path],
    bank: EncoderBank,
    expected: dict[tuple[str, str], int | None],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    full, again = run_on(
        disk, "700k",
        sys.executable, "-m", "emocache", "extract", "demo", "--manifest", str(corpus[2]),
        "--store", str(disk / "s"), "--engine", "local", "--workers", "2", "--unit-clips", "2",
        "--batch-tokens", "1", "--log-dir", str(tmp_path / "logs"),
    )  # fmt: skip
    assert full.returncode == 2, full.stdout
    assert "No space left on device" in full.stdout
    assert "free space" in full.stdout
    assert "Traceback" not in full.stdout
    assert again.returncode == 1, again.stdout  # the truncated clip
    assert checksums(TokenStore.open(Path(f"{disk}.copy")), bank) == expected
    record_property("faults", ("extraction: full disk", 1))
