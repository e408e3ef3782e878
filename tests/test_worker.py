"""One worker: batches, shards, draining, blame, retries, remote media."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import EncoderError, ExtractionStopped, ManifestError, MissingDependencyError
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from extract.calibrate import calibrate
from extract.config import WorkerConfig
from extract.encoders.bank import EncoderBank, EncoderInput
from extract.failures import Failure
from extract.index import index_folder
from extract.jobs.job import Job
from extract.jobs.lease import Claim
from extract.jobs.session import WorkerSession, WorkerState
from extract.plan import make_plan, open_job
from extract.run import extract, new_session, worker_config
from extract.sources import check_media, open_source
from extract.workers.drain import drain_all
from extract.workers.unit import UnitWork, tokens_per_clip
from extract.workers.worker import work
from tests.media import write_clip, write_wav

N_CLIPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    for seed in range(N_CLIPS):
        write_clip(root / f"{seed:02d}.mp4", seed=seed, seconds=0.4)
    return root


@pytest.fixture(scope="module")
def manifest(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    found, _ = index_folder(folder, tmp_path_factory.mktemp("manifest") / "m.parquet")
    return found


@pytest.fixture(scope="module")
def expected(
    manifest: Manifest,
    bank: EncoderBank,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, str], bytes]:
    """Tokens of a run without any fault: (spec_id, key) -> bytes."""
    store = TokenStore.open_or_create(tmp_path_factory.mktemp("calm") / "s")
    plan = make_plan(manifest.records, bank.specs, store, unit_clips=4)
    extract(plan, manifest.records, bank, store, folder)
    found = contents(store, bank.specs)
    assert len(found) == 3 * N_CLIPS
    return found


def contents(store: TokenStore, specs: Sequence[TokenSpec]) -> dict[tuple[str, str], bytes]:
    """Return all tokens; no clip may be committed twice."""
    store.refresh()
    found = {}
    for spec in specs:
        keys = [entry.key for commit in store.commits(spec) for entry in commit.clips]
        assert len(keys) == len(set(keys)), "no clip was committed twice"
        for entry in store.index(spec):
            if entry.status is Status.OK:
                found[spec.spec_id, entry.key] = store.read(spec, entry.key).tokens.tobytes()
    return found


class Prepared:
    """A planned job and how to work on it."""

    def __init__(
        self, manifest: Manifest, bank: EncoderBank, root: Path, folder: str | Path, **plan: Any
    ) -> None:
        self.manifest = manifest
        self.bank = bank
        self.folder = folder
        self.store = TokenStore.open_or_create(root / "s")
        self.plan = make_plan(manifest.records, bank.specs, self.store, unit_clips=4, **plan)
        self.job = open_job(self.store, manifest.records, self.plan)

    def config(self, **options: Any) -> WorkerConfig:
        return worker_config(
            self.job, self.bank, self.store,
            manifest="", media_root=self.folder, session=new_session(), **options,
        )  # fmt: skip

    def work(self, on_clip: Callable[[], None] | None = None, **options: Any) -> WorkerState:
        text = self.config(**options).model_dump_json()
        return WorkerState.model_validate_json(
            work(text, records=self.manifest.records, on_clip=on_clip)
        )

    def contents(self) -> dict[tuple[str, str], bytes]:
        return contents(self.store, self.bank.specs)


# ---------------------------------------------------------------- a unit, without any I/O


def unit_of(
    bank: EncoderBank, n: int, batch_tokens: int, missing: Sequence[int] | None = None, **more: Any
) -> UnitWork:
    records = [
        Record(uid=f"c/{i}", media=f"{i}.mp4", clip=Clip(sha256=f"{i:064x}", n_bytes=1))
        for i in range(n)
    ]
    specs = bank.specs[:1]
    claim = Claim(0, 0, "w", tuple(range(n)), specs)
    wanted = range(n) if missing is None else missing
    keys = {spec.spec_id: {records[i].token_key(spec) for i in wanted} for spec in specs}
    return UnitWork(claim, records, keys, batch_tokens, **more)


def test_batches_stand_at_fixed_places_whatever_is_missing(bank: EncoderBank) -> None:
    audio = bank.specs[0]
    size = 3 * tokens_per_clip(audio)
    whole = unit_of(bank, 10, size)
    assert [whole.batch_of(audio, p).positions for p in (0, 2, 3, 9)] == [
        (0, 1, 2), (0, 1, 2), (3, 4, 5), (9,),
    ]  # fmt: skip
    continued = unit_of(bank, 10, size, missing=range(3, 10))
    assert continued.positions == list(range(3, 10))
    for position in range(3, 10):
        assert (
            continued.batch_of(audio, position).positions
            == whole.batch_of(audio, position).positions
        )
    assert unit_of(bank, 2, 1).batch_of(audio, 1).positions == (1,), "a batch holds a clip at least"


def test_a_suspect_is_alone_and_the_others_stay_together(bank: EncoderBank) -> None:
    audio = bank.specs[0]
    unit = unit_of(bank, 4, 4 * tokens_per_clip(audio), suspects={f"{1:064x}"})
    assert unit.batch_of(audio, 1).positions == (1,)
    assert unit.batch_of(audio, 0).positions == (0, 2, 3)


def test_shards_are_complete_or_the_rest(bank: EncoderBank) -> None:
    audio = bank.specs[0]
    unit = unit_of(bank, 40, 1)

    def result(position: int) -> ClipTokens:
        key = unit.records[position].token_key(audio)
        return ClipTokens(key, Status.OK, np.ones((1, 64), np.float32))

    chunks = [unit.finish_clip(audio, p, result(p)) for p in (*range(1, 32), 35)]
    assert chunks == [None] * 32
    chunk = unit.finish_clip(audio, 0, result(0))
    assert chunk is not None
    assert chunk.positions == tuple(range(32))
    assert all(clip.tokens is not None for clip in chunk.clips)
    assert [rest.positions for rest in unit.rest()] == [(35,)]
    assert unit.rest() == [], "nothing is handed out twice"
    assert not unit.is_encoded


# ---------------------------------------------------------------- draining


def test_a_drained_worker_commits_what_is_encoded_and_the_next_goes_on(
    manifest: Manifest,
    bank: EncoderBank,
    folder: Path,
    tmp_path: Path,
    expected: dict[tuple[str, str], bytes],
) -> None:
    prepared = Prepared(manifest, bank, tmp_path, folder)
    n = 0

    def after_five() -> None:
        nonlocal n
        n += 1
        if n == 5:
            drain_all("the test says so")

    state = prepared.work(after_five, batch_tokens=1)
    assert state.ended
    assert state.end_reason == "the test says so"
    partly = prepared.contents()
    assert 0 < len(partly) < len(expected)
    assert any(receipt.partial for receipt in prepared.job.receipts())
    again = prepared.work(batch_tokens=1)
    assert again.end_reason is None
    assert prepared.job.undone() == []
    # One clip a batch here, several in the calm run: rounding may differ in the last bit.
    found = prepared.contents()
    assert found.keys() == expected.keys()
    for key, tokens in found.items():
        a, b = (np.frombuffer(x, np.float16).astype(np.float32) for x in (tokens, expected[key]))
        np.testing.assert_allclose(a, b, atol=2e-3, rtol=2e-3)


def test_a_stop_request_in_the_store_drains_a_worker(
    manifest: Manifest, bank: EncoderBank, folder: Path, tmp_path: Path
) -> None:
    prepared = Prepared(manifest, bank, tmp_path, folder)
    config = prepared.config(heartbeat_s=0.05, lease_timeout_s=5)
    prepared.job.request_stop(config.session)
    state = json.loads(work(config.model_dump_json(), records=manifest.records))
    assert state["end_reason"] == "told to stop"
    assert len(prepared.job.undone()) == 3


def test_a_walltime_drains_a_worker(
    manifest: Manifest, bank: EncoderBank, folder: Path, tmp_path: Path
) -> None:
    prepared = Prepared(manifest, bank, tmp_path, folder)
    state = prepared.work(lambda: time.sleep(0.3), drain_after_s=0.5)
    assert state.end_reason == "the walltime is nearly over"
    assert prepared.job.undone()


# ---------------------------------------------------------------- death of a worker

SCRIPT = """
import os, signal, sys
from pathlib import Path
from extract.encoders.bank import EncoderBank
from extract.workers.worker import work
encode, n = EncoderBank.encode, 0
def deadly(self, spec, given):
    global n
    n += 1
    if n == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, spec, given)
EncoderBank.encode = deadly
work(Path(sys.argv[1]).read_text())
"""


def die_in_encoder(prepared: Prepared, tmp_path: Path, at_batch: int, **options: Any) -> None:
    """Run a worker that is killed as it begins a batch."""
    write_manifest(tmp_path / "m.parquet", prepared.manifest)
    config = prepared.config(**options).model_copy(update={"manifest": str(tmp_path / "m.parquet")})
    (tmp_path / "config.json").write_text(config.model_dump_json())
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "config.json"), str(at_batch)],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == -signal.SIGKILL, found.stderr


@pytest.mark.fault("extraction: kill -9 in the encoder")
def test_a_killed_worker_costs_nothing_but_its_batch(
    manifest: Manifest,
    bank: EncoderBank,
    folder: Path,
    tmp_path: Path,
    expected: dict[tuple[str, str], bytes],
) -> None:
    prepared = Prepared(manifest, bank, tmp_path, folder)
    die_in_encoder(prepared, tmp_path, at_batch=4)
    prepared.work()
    assert prepared.contents() == expected, "byte for byte what a calm run gives"
    assert not any(receipt.failures for receipt in prepared.job.receipts())


@pytest.mark.fault("extraction: clip that kills every worker")
def test_a_clip_that_kills_every_worker_is_found_and_the_innocent_are_not_blamed(
    manifest: Manifest, bank: EncoderBank, folder: Path, tmp_path: Path
) -> None:
    """Workers die whenever one clip is in the encoder: twice in a batch, three times alone."""
    prepared = Prepared(manifest, bank, tmp_path, folder)
    guilty = prepared.manifest.records[1]
    unit = next(n for n, planned in enumerate(prepared.job.plan.units) if 1 in planned.rows)
    batch = [
        prepared.manifest.records[row].clip.sha256 for row in prepared.job.plan.units[unit].rows
    ]
    for number in range(5):
        alone = number >= 2
        session = WorkerSession(
            prepared.store.storage,
            prepared.job.root,
            session=f"s{number}",
            engine="inline",
            device="cpu",
        ).start()
        others = [n for n in range(len(prepared.job.plan.units)) if n != unit]
        claim = None
        while claim is None:
            claim = prepared.job.claim(session, exclude=others)
        if claim.predecessor is not None:
            prepared.job.strike(
                claim.predecessor.encoding,
                claim.predecessor.worker_id,
                alone=claim.predecessor.encoding_alone,
            )
        held = (guilty.clip.sha256,) if alone else tuple(batch)
        session.beat(encoding=held, encoding_alone=alone, pid=2**22 + number, pid_started=1)
        session._closing.set()  # its heartbeats end here, as by kill -9
        session._thread.join()
    prepared.work()
    failures = [f for receipt in prepared.job.receipts() for f in receipt.failures]
    assert {f.uid for f in failures} == {guilty.uid}
    assert {f.kind for f in failures} == {"crash"}
    assert len(prepared.contents()) == 3 * (N_CLIPS - 1)
    (evidence,) = prepared.job.evidence().values()
    assert evidence.uid == guilty.uid
    # The next plan leaves it alone, unless it is told to try that kind again.
    again = make_plan(manifest.records, bank.specs, prepared.store)
    assert not again.units
    retried = make_plan(manifest.records, bank.specs, prepared.store, retry=["crash"])
    assert [r.uid for u in retried.units for r in u.records] == [guilty.uid]
    extract(retried, manifest.records, bank, prepared.store, folder)
    assert len(prepared.store.index(bank.specs[0])) == N_CLIPS
    entry = prepared.store.entry(bank.specs[0], guilty.clip.sha256)
    assert entry.status is Status.OK


# ---------------------------------------------------------------- too many failures


@pytest.mark.fault("extraction: lost mount")
def test_a_lost_disk_stops_the_run_and_nothing_is_recorded_as_failed(
    bank: EncoderBank, tmp_path: Path
) -> None:
    root = tmp_path / "media"
    root.mkdir()
    for n in range(40):
        write_wav(root / f"{n}.wav", np.full(800, n, np.int16), 16000)
    manifest, _ = index_folder(root, tmp_path / "m.parquet")
    root.rename(tmp_path / "elsewhere")
    missing = check_media(open_source(root), manifest.records)
    assert (missing.n_checked, missing.n_missing) == (40, 40)
    store = TokenStore.open_or_create(tmp_path / "s")
    plan = make_plan(manifest.records, bank.specs, store)
    with pytest.raises(ExtractionStopped, match=r"media files are not there.*--media-root"):
        extract(plan, manifest.records, bank, store, root)
    store.refresh()
    assert not any(len(store.index(spec)) for spec in bank.specs)
    found = extract(plan, manifest.records, bank, store, tmp_path / "elsewhere")
    assert found is not None
    assert not found.failures
    assert len(store.index(bank.specs[0])) == 40


# ---------------------------------------------------------------- memory of the encoders


class Greedy:
    """An encoder that runs out of memory on more than two clips."""

    def __init__(self, inner: Any, error: BaseException) -> None:
        self.inner, self.error, self.sizes = inner, error, list[int]()

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        self.sizes.append(len(waveforms))
        if len(waveforms) > 2:
            raise self.error
        found: list[np.ndarray] = self.inner.encode(waveforms)
        return found


def test_out_of_memory_halves_the_batch_and_goes_on(
    bank: EncoderBank, tiny_weights: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    audio = bank.specs[0]
    given = [EncoderInput(np.full(3200 + 320 * n, 0.1, np.float32)) for n in range(5)]
    wanted = bank.encode(audio, given)
    greedy = Greedy(bank.encoder(audio), torch.OutOfMemoryError("CUDA out of memory"))
    mine = EncoderBank([audio], {"whisper": tiny_weights["whisper"]})
    monkeypatch.setattr(mine, "encoder", lambda spec: greedy)
    found = mine.encode(audio, given)
    assert greedy.sizes == [5, 2, 3, 1, 2]
    for a, b in zip(found, wanted, strict=True):
        assert isinstance(a, np.ndarray)
        assert isinstance(b, np.ndarray)
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    greedy.error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(EncoderError, match=r"illegal memory access.*this worker ends"):
        mine.encode(audio, given)

    def never(spec: TokenSpec, given: Sequence[EncoderInput]) -> list[np.ndarray]:
        raise MemoryError

    monkeypatch.setattr(mine, "_forward", never)
    (alone,) = mine.encode(audio, given[:1])
    assert isinstance(alone, Failure)
    assert alone.kind == "memory"


# ---------------------------------------------------------------- remote media


def test_remote_media_are_fetched_and_removed(
    manifest: Manifest,
    bank: EncoderBank,
    folder: Path,
    tmp_path: Path,
    expected: dict[tuple[str, str], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    files = fsspec.filesystem("memory")
    for path in folder.glob("*.mp4"):
        files.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    files.rm_file("/corpus/03.mp4")
    prepared = Prepared(manifest, bank, tmp_path, "memory://corpus")
    prepared.work()
    found = prepared.contents()
    lost = next(r for r in manifest.records if r.media == "03.mp4").clip.sha256
    assert found.keys() == {key for key in expected if key[1] != lost}
    failures = {f.reason for r in prepared.job.receipts() for f in r.failures}
    assert failures == {"missing: 03.mp4: there is no such file below memory://corpus"}
    assert not list(scratch.iterdir()), "fetched clips are removed"
    assert check_media(open_source("memory://corpus"), manifest.records).first == "03.mp4"
    files.rm("/corpus", recursive=True)


def test_a_media_url_that_nobody_knows_is_refused() -> None:
    with pytest.raises((ManifestError, MissingDependencyError), match=r"gopher://x"):
        open_source("gopher://x/y")


# ---------------------------------------------------------------- calibration


def test_calibration_measures_and_commits_nothing(
    manifest: Manifest, bank: EncoderBank, folder: Path, tmp_path: Path
) -> None:
    prepared = Prepared(manifest, bank, tmp_path, folder)
    found = calibrate(prepared.plan, bank, open_source(folder), prepared.config(), n_clips=4)
    assert found.n_clips == 4
    assert set(found.encode_s) == set(prepared.plan.labels)
    assert found.decode_cpu_s > 0
    assert all(seconds > 0 for seconds in found.encode_s.values())
    by_hand = N_CLIPS * sum(found.encode_s.values()) / 3600
    assert found.encode_hours(prepared.plan) == pytest.approx(by_hand)
    assert found.hours(prepared.plan, 4, 1000) == pytest.approx(by_hand / 4)
    assert prepared.contents() == {}
    assert Job.open(prepared.store.storage, prepared.job.job_id, prepared.job.generation).undone()


def test_two_workers_share_a_job(
    manifest: Manifest,
    bank: EncoderBank,
    folder: Path,
    tmp_path: Path,
    expected: dict[tuple[str, str], bytes],
) -> None:
    prepared = Prepared(manifest, bank, tmp_path, folder)
    text = prepared.config().model_dump_json()
    threads = [
        threading.Thread(target=work, args=(text,), kwargs={"records": manifest.records})
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prepared.contents() == expected
    receipts = prepared.job.receipts()
    assert sorted(receipt.unit for receipt in receipts) == [0, 1, 2]
    assert sum(receipt.n_clips for receipt in receipts) == N_CLIPS
