"""Faults, each caused on purpose. At the end pytest prints how many were tried and survived.

The invariant each time: everything committed reads back byte-equal, nothing uncommitted is visible,
and where that cannot be (the bytes are gone), an error of ours names what is damaged and the cure.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cache import files as files_module
from cache import layout
from cache import lifecycle as lifecycle_module
from cache import storage as storage_module
from cache import writer as writer_module
from cache.commit import read_commit, unit_ids
from cache.errors import CacheMissError, CorruptTokensError, SchemaError, StoreError
from cache.lifecycle import collect_garbage, compact
from cache.spec import TokenSpec
from cache.store import TokenStore
from tests.conftest import key_of
from tests.faults import (
    PROVENANCE,
    assert_holds,
    die,
    read_or_name,
    store_of,
    unit,
)
from tests.object_store import Fault, Kind, environment, faulty_proxy, make_bucket, moto_server
from tests.processes import run_apart
from train.presets import demo

Specs = dict[str, TokenSpec]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def survived(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """Count faults that were caused, for the table at the end of the run."""

    def count(kind: str, n: int = 1) -> None:
        record_property("faults", (kind, n))

    return count


Survived = Callable[..., None]

# ---------------------------------------------------------------------------- writers that die

# The steps of a commit, in order; the child is killed with SIGKILL as it enters each.
STEPS = [
    (writer_module.UnitWriter, "_ensure_group"),
    (writer_module, "group_metadata"),
    (writer_module.UnitWriter, "_claim"),
    (writer_module.UnitWriter, "_grow"),
    (writer_module.UnitWriter, "_write_shard"),
    (writer_module, "encode_shard"),
    (writer_module, "crc32c"),
    (storage_module, "_write_all"),
    (files_module, "fsync_file"),
    (Path, "replace"),
    (files_module, "fsync_folder"),
    (writer_module, "encode_chunk"),
    (storage_module.LocalStorage, "replace"),
    (writer_module.UnitWriter, "_read_back"),
    (writer_module, "write_commit"),
    (storage_module, "create_once"),
    (os, "link"),
]


def _commit_and_die(root: Path, spec: TokenSpec, step: int, nth: int) -> None:
    store = TokenStore.open(root)
    owner, name = STEPS[step]
    real, seen = getattr(owner, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        return die() if seen > nth else real(*args, **kwargs)

    setattr(owner, name, dying)
    store.commit(spec, unit(spec, "new"), PROVENANCE)


@pytest.mark.parametrize("step", range(len(STEPS)), ids=[name for _, name in STEPS])
def test_kill_9_at_every_step_loses_and_shows_nothing(
    tmp_path: Path, specs: Specs, step: int, survived: Survived
) -> None:
    """The n-th time that the step is entered, until the commit gets through."""
    spec, n_killed = specs["video"], 0
    for nth in range(40):
        root = tmp_path / str(nth)
        store_of(root, spec, "old") if nth % 2 else TokenStore.open_or_create(root)
        (code,) = run_apart((_commit_and_die, (root, spec, step, nth)))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        n_killed += 1
        old = ["old"] if nth % 2 else []
        if key_of("n") in TokenStore.open(root).index(spec):
            old.append("new")  # it was killed after the commit: then the commit stands, whole
        assert_holds(root, spec, *old)
        # The next worker simply does it, and garbage collection leaves what it did.
        store_of(root, spec, "new")
        assert_holds(root, spec, *dict.fromkeys([*old, "new"]))
        collect_garbage(TokenStore.open(root), delete=True, abandon_after_s=-1)
        assert_holds(root, spec, *dict.fromkeys([*old, "new"]))
        assert not list(root.rglob("*.partial"))
    assert n_killed
    survived("kill -9 of a writer", n_killed)


def _collect_and_die(root: Path, spec: TokenSpec, nth: int) -> None:
    real, seen = storage_module.LocalStorage.delete, 0

    def dying(*args: Any) -> None:
        nonlocal seen
        seen += 1
        return die() if seen > nth else real(*args)

    storage_module.LocalStorage.delete = dying  # type: ignore[method-assign]
    store = TokenStore.open(root)
    compact(store, spec)
    collect_garbage(store, delete=True, abandon_after_s=-1)


def test_kill_9_of_compaction_and_garbage_collection(
    tmp_path: Path, specs: Specs, survived: Survived
) -> None:
    spec, n_killed = specs["video"], 0
    for nth in range(60):
        root = tmp_path / str(nth)
        store_of(root, spec, "ab", "cd")
        (code,) = run_apart((_collect_and_die, (root, spec, nth)))
        assert_holds(root, spec, "ab", "cd")
        collect_garbage(TokenStore.open(root), delete=True, abandon_after_s=-1)
        assert_holds(root, spec, "ab", "cd")
        if code == 0:
            break
        n_killed += 1
    assert n_killed > 5
    survived("kill -9 of compaction or gc", n_killed)


# ---------------------------------------------------------------------------- many at once


def _commit_units(root: Path, spec: TokenSpec, names: list[str]) -> None:
    store = TokenStore.open_or_create(root)
    for name in names:
        store.commit(spec, unit(spec, name), PROVENANCE)


@pytest.mark.parametrize("n_writers", [2, 8])
def test_writers_at_once_lose_nothing_and_commit_each_unit_once(
    tmp_path: Path, specs: Specs, n_writers: int, survived: Survived
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    shared = ["ab", "cd", "ef"]
    own = [[chr(0x100 + 2 * i) + chr(0x101 + 2 * i)] for i in range(n_writers)]
    codes = run_apart(*((_commit_units, (root, spec, shared + names)) for names in own))
    assert codes == [0] * n_writers
    store = TokenStore.open(root)
    units = shared + [name for names in own for name in names]
    assert store.index(spec).n_units == len(units)
    assert_holds(root, spec, *units)
    shards = [commit.shard for commit in store.commits(spec)]
    assert len(set(shards)) == len(shards)
    survived("writers of one unit at once", n_writers)


def _compact_and_collect(root: Path, spec: TokenSpec, times: int) -> None:
    for _ in range(times):
        store = TokenStore.open(root)
        compact(store, spec)
        collect_garbage(store, delete=True, abandon_after_s=-1)


def _read_all(root: Path, spec: TokenSpec, names: str, times: int) -> None:
    store = TokenStore.open(root)
    for _ in range(times):
        for clip in unit(spec, names):
            assert clip.tokens is not None
            assert store.read(spec, clip.key).tokens.tobytes() == clip.tokens.tobytes()
        store.close()


@pytest.mark.parametrize("n_rounds", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_reading_writing_compacting_and_collecting_go_on_together(
    tmp_path: Path, specs: Specs, n_rounds: int, survived: Survived
) -> None:
    """Garbage collection that takes every writer for dead, all the time."""
    spec, root = specs["video"], tmp_path / "s"
    store_of(root, spec, *"abcd")
    late = [chr(0x300 + i) for i in range(4 * n_rounds)]
    codes = run_apart(
        (_compact_and_collect, (root, spec, n_rounds)),
        (_read_all, (root, spec, "a", 20 * n_rounds)),
        (_commit_units, (root, spec, late[::2])),
        (_commit_units, (root, spec, late[1::2])),
    )
    assert codes == [0, 0, 0, 0]
    assert_holds(root, spec, *"abcd", *late)
    survived("gc and compaction beside readers and writers", n_rounds)


def test_a_writer_that_was_taken_for_dead_writes_its_unit_again(
    tmp_path: Path, specs: Specs, monkeypatch: pytest.MonkeyPatch, survived: Survived
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store = store_of(root, spec, "ab")
    for step in ("_write_shard", "_read_back"):
        real = getattr(writer_module.UnitWriter, step)

        def collected_meanwhile(writer: Any, *args: Any, real: Any = real, step: str = step) -> Any:
            result = real(writer, *args) if step == "_write_shard" else None
            monkeypatch.undo()
            collect_garbage(TokenStore.open(root), delete=True, abandon_after_s=-1)
            return result if step == "_write_shard" else real(writer, *args)

        monkeypatch.setattr(writer_module.UnitWriter, step, collected_meanwhile)
        store.commit(spec, unit(spec, step[1]), PROVENANCE)
        survived("gc takes a living writer for dead")
    assert_holds(root, spec, "ab", "w", "r")
    # A young shard is spared.
    found = collect_garbage(TokenStore.open(root), delete=True)
    assert not any("never committed" in why for why in found.files)


# ---------------------------------------------------------------------------- a full disk

FULL_AT = ["claim", "shard", "shard index", "small array", "commit record"]


def _fill_up(disk: Path) -> None:
    """Leave not a byte."""
    descriptor = os.open(disk / "ballast", os.O_WRONLY | os.O_CREAT)
    block = bytes(1 << 16)
    while block:
        try:
            os.write(descriptor, block)
        except OSError:
            block = block[: len(block) // 2]
    os.close(descriptor)


def full_disk(disk: Path) -> int:
    """Fill a small disk at each step of a commit; run in a mount namespace of its own."""
    spec = demo().tokens.audio.with_weights("ab" * 32)
    committed = ["ab"]
    store = store_of(disk / "s", spec, "ab")

    def at(step: str, names: str) -> None:
        real_write, real_chunk = writer_module.encode_shard, writer_module.encode_chunk

        def shard(*args: Any) -> Iterator[Any]:
            pieces = list(real_write(*args))
            for place, piece in enumerate(pieces):
                if (step, place) in (("shard", 3), ("shard index", len(pieces) - 2)):
                    _fill_up(disk)
                yield piece

        def chunk(*args: Any) -> bytes:
            if step == "small array":
                _fill_up(disk)
            return real_chunk(*args)

        def commit(*args: Any) -> bool:
            if step == "commit record":
                _fill_up(disk)
            return real_commit(*args)

        real_commit = writer_module.write_commit
        if step == "claim":
            _fill_up(disk)
        writer_module.encode_shard, writer_module.encode_chunk = shard, chunk
        writer_module.write_commit = commit
        try:
            store.commit(spec, unit(spec, names), PROVENANCE)
        finally:
            writer_module.encode_shard, writer_module.encode_chunk = real_write, real_chunk
            writer_module.write_commit = real_commit

    for number, step in enumerate(FULL_AT):
        names = "".join(chr(0x400 + 6 * number + i) for i in range(6))
        with pytest.raises(StoreError, match=r"cannot write .*Nothing of this unit became visible"):
            at(step, names)
        assert_holds(disk / "s", spec, *committed)
        (disk / "ballast").unlink()
        store.commit(spec, unit(spec, names), PROVENANCE)  # with room again, it just works
        committed.append(names)
        assert_holds(disk / "s", spec, *committed)
    collect_garbage(store, delete=True, abandon_after_s=-1)
    assert_holds(disk / "s", spec, *committed)
    return len(FULL_AT)


def read_only(disk: Path) -> int:
    """Read from a store on a disk that cannot be written; in a mount namespace of its own."""
    spec = demo().tokens.video.with_weights("ab" * 32)
    store_of(disk / "s", spec, "ab")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert_holds(disk / "s", spec, "ab")
    store = TokenStore.open(disk / "s")
    with pytest.raises(StoreError, match=r"cannot write \(Read-only file system\)"):
        store.commit(spec, unit(spec, "cd"), PROVENANCE)
    with pytest.raises(StoreError, match=r"cannot be written .*nothing was removed"):
        collect_garbage(store, delete=True)
    collect_garbage(store)
    assert_holds(disk / "s", spec, "ab")
    return 2


def _on_a_small_disk(tmp_path: Path, function: str) -> int:
    """Run a function of this module on a tmpfs that no one else sees and that ends with it."""
    mount = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}"
    own = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*own, mount], capture_output=True).returncode
    ):
        pytest.skip("this machine does not allow mounting a tmpfs (needs root and unshare)")
    script = (
        f"import sys; from pathlib import Path; from tests.test_faults import {function}; "
        f"print('survived', {function}(Path(sys.argv[1])))"
    )
    done = subprocess.run(
        [*own, f'{mount} && exec "$0" "$@"', sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("survived ")[2])


def test_a_full_disk_commits_nothing_and_loses_nothing(tmp_path: Path, survived: Survived) -> None:
    survived("full disk, by step", _on_a_small_disk(tmp_path, "full_disk"))


def test_a_read_only_store_is_read_and_refuses_writing(tmp_path: Path, survived: Survived) -> None:
    survived("read-only disk", _on_a_small_disk(tmp_path, "read_only"))


# ---------------------------------------------------------------------------- damage


def _flip(path: Path, place: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def _damageable(root: Path, spec: TokenSpec) -> dict[str, Path]:
    group = root / layout.group(spec)
    (commit,) = (root / layout.commits(spec.spec_id)).glob("*.json")
    (snapshot,) = (root / layout.snapshots(spec.spec_id)).glob("*.arrow")
    (shard,) = (p for p in (group / "tokens" / "c").rglob("*") if p.is_file())
    return {
        "shard": shard,
        "frame_index": group / "frame_index" / "c" / "0" / "0",
        "array metadata": group / "tokens" / "zarr.json",
        "group metadata": group / "zarr.json",
        "commit record": commit,
        "snapshot": snapshot,
        "store.json": root / layout.MARKER,
    }


@pytest.mark.parametrize("stream", ["video", "audio"])
@pytest.mark.parametrize(
    "n_flips", [pytest.param(24, id="some"), pytest.param(1200, id="many", marks=pytest.mark.slow)]
)
def test_a_flipped_bit_anywhere_is_harmless_or_named(
    tmp_path: Path, specs: Specs, stream: str, n_flips: int, survived: Survived
) -> None:
    spec, root = specs[stream], tmp_path / "s"
    store = store_of(root, spec, "ab")
    store.write_snapshot(spec)
    clips = unit(spec, "ab")
    for name, path in _damageable(root, spec).items() if stream == "video" else []:
        whole, n_named = path.read_bytes(), 0
        places = sorted({i * len(whole) // n_flips for i in range(n_flips)} | {len(whole) - 1})
        for number, place in enumerate(places):
            _flip(path, place, number % 8)
            errors = read_or_name(root, spec, clips)
            n_named += bool(errors)
            for error in errors:
                text = str(error)
                assert any(w in text for w in ("estore", "doctor", "pdate emocache", "extract")), (
                    text
                )
            path.write_bytes(whole)
            survived(f"flipped bit, {name}")
        assert n_named or name in ("snapshot", "commit record", "store.json", "array metadata"), (
            name
        )
    if stream == "audio":
        _audio_flips(root, spec, n_flips, survived)
        _record_flips(root, spec, n_flips, survived)
    assert_holds(root, spec, "ab")


def _audio_flips(root: Path, spec: TokenSpec, n_flips: int, survived: Survived) -> None:
    """Every flip inside of a stored valid token is found, none goes unnoticed."""
    (path,) = (p for p in (root / layout.group(spec) / "tokens" / "c").rglob("*") if p.is_file())
    for i in range(n_flips):
        whole = path.read_bytes()
        _flip(path, i * 40 * spec.max_shape[1] * 2 // n_flips, i % 8)  # 40 tokens of clip "a"
        with pytest.raises(CorruptTokensError, match=r"CRC-32C differs .*Restore that shard"):
            TokenStore.open(root).read(spec, key_of("a"))
        path.write_bytes(whole)
        survived("flipped bit, shard")


def _record_flips(root: Path, spec: TokenSpec, n_flips: int, survived: Survived) -> None:
    """Every flip inside of a commit record is found where no snapshot stands in for it."""
    shutil.rmtree(root / layout.snapshots(spec.spec_id))
    (path,) = (root / layout.commits(spec.spec_id)).glob("*.json")
    whole = path.read_bytes()
    for i in range(n_flips):
        _flip(path, i * len(whole) // n_flips, i % 8)
        with pytest.raises(SchemaError):
            TokenStore.open(root).index(spec)
        path.write_bytes(whole)
        survived("flipped bit, commit record without snapshot")


def test_truncated_and_deleted_files_are_named(
    tmp_path: Path, specs: Specs, survived: Survived
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store = store_of(root, spec, "ab")
    store.write_snapshot(spec)
    clips = unit(spec, "ab")
    paths = _damageable(root, spec)
    (snapshot,) = (root / layout.snapshots(spec.spec_id)).iterdir()
    for name, path in [*paths.items(), ("commit record, no snapshot", paths["commit record"])]:
        if name == "commit record, no snapshot":
            snapshot.unlink()
        harmless = {"snapshot", "commit record"}  # each is in the other
        whole = path.read_bytes()
        for size in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            errors = read_or_name(root, spec, clips)
            assert len(errors) == 2 or name in harmless, (name, size)
            survived(f"truncated, {name}")
        path.unlink()
        errors = read_or_name(root, spec, clips)
        assert len(errors) == 2 or name == "snapshot", name  # a record that is gone counts as gone
        survived(f"deleted, {name}")
        path.write_bytes(whole)
    assert_holds(root, spec, "ab")


def test_a_mapped_shard_that_is_replaced_or_deleted_stays_readable(
    tmp_path: Path, specs: Specs, survived: Survived
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store = store_of(root, spec, "ab")
    shard = store.shard(spec, 0, access="map")
    shutil.rmtree(root)
    (clip, _) = unit(spec, "ab")
    assert clip.tokens is not None
    assert shard.read(0, 16).tobytes() == clip.tokens.tobytes()
    survived("store removed under a reader")


@pytest.mark.parametrize("kept", ["commits", layout.ZARR])
def test_a_half_copied_store_shows_nothing_wrong(
    tmp_path: Path, specs: Specs, kept: str, survived: Survived
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store_of(root, spec, "ab")
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(root / layout.MARKER, half)
    shutil.copytree(root / kept, half / kept)
    if kept == "commits":  # the arrays have not come yet
        shutil.copytree(root / layout.ZARR, half / layout.ZARR, ignore=lambda *_: ["c"])
        with pytest.raises(CorruptTokensError, match=r"its shard is gone.*from a copy"):
            TokenStore.open(half).read(spec, key_of("a"))
    else:
        with pytest.raises(CacheMissError, match=r"no committed video tokens .*emocache extract"):
            TokenStore.open(half).read(spec, key_of("a"))
    shutil.copytree(root, half, dirs_exist_ok=True)  # the copy goes on
    assert_holds(half, spec, "ab")
    survived("half-copied store")


def test_a_newer_format_is_left_alone(tmp_path: Path, specs: Specs, survived: Survived) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store_of(root, spec, "ab")
    marker = json.loads((root / layout.MARKER).read_bytes())
    (root / layout.MARKER).write_text(json.dumps(marker | {"version": 99}))
    before = sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*"))
    for open_it in (TokenStore.open, TokenStore.open_or_create):
        with pytest.raises(StoreError, match=r"store format 99, .*Update emocache"):
            open_it(root)
    assert sorted((p, p.stat().st_mtime_ns) for p in root.rglob("*")) == before
    survived("store of a newer format", 2)


def test_a_renamed_commit_record_is_named(tmp_path: Path, specs: Specs, survived: Survived) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store_of(root, spec, "ab")
    (path,) = (root / layout.commits(spec.spec_id)).glob("*.json")
    path.rename(path.with_name("other.json"))
    with pytest.raises(SchemaError, match=r"is the record of unit .*restore it"):
        TokenStore.open(root).index(spec)
    survived("renamed commit record")


# ---------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("jump", [timedelta(days=4000), timedelta(days=-4000)])
def test_a_clock_that_jumps_decides_nothing(
    tmp_path: Path,
    specs: Specs,
    monkeypatch: pytest.MonkeyPatch,
    jump: timedelta,
    survived: Survived,
) -> None:
    spec, root = specs["video"], tmp_path / "s"
    store = store_of(root, spec, "ab")
    (code,) = run_apart((_commit_and_die, (root, spec, len(STEPS) - 1, 1)))
    assert code == -signal.SIGKILL  # an uncommitted shard, seconds old

    class Jumped(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + jump

    for module in (writer_module, lifecycle_module):
        monkeypatch.setattr(module, "datetime", Jumped)
    store.commit(spec, unit(spec, "cd"), PROVENANCE)
    assert_holds(root, spec, "ab", "cd")
    found = collect_garbage(store, delete=True)
    assert not found.files
    assert found.n_spared == 1  # by the disk's clock its writer may still be alive
    assert abs(datetime.now(UTC) - _created(store, spec, "cd")) > timedelta(days=3000)
    survived("clock jump")


def _created(store: TokenStore, spec: TokenSpec, name: str) -> datetime:
    entry = store.entry(spec, key_of(name[0]))
    identity = store.index(spec).unit_of(entry)
    return datetime.fromisoformat(read_commit(store.storage, spec.spec_id, identity).created)


# ---------------------------------------------------------------------------- buckets


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with moto_server() as endpoint:
        yield endpoint


def _bucket(
    s3: str, name: str, monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None
) -> str:
    make_bucket(s3, name)
    for key, value in environment(endpoint or s3).items():
        monkeypatch.setenv(key, value)
    return f"s3://{name}/data/store"


@pytest.mark.parametrize(
    "kind",
    [
        "cut body",
        pytest.param("drop before", marks=pytest.mark.slow),
        pytest.param("drop after", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "every", [7, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_bucket_whose_connections_drop_loses_nothing(
    s3: str,
    specs: Specs,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    every: int,
    survived: Survived,
) -> None:
    spec = specs["video"]
    with faulty_proxy(s3) as proxy:
        url = _bucket(s3, f"{kind.replace(' ', '-')}-{every}", monkeypatch, proxy.endpoint)
        store = TokenStore.open_or_create(url)
        fault = proxy.add(Fault(kind, every=every))
        for names in ("ab", "cd"):
            store.commit(spec, unit(spec, names), PROVENANCE)
        store.write_snapshot(spec)
        assert_holds(url, spec, "ab", "cd")
        compact(store, spec)
        collect_garbage(store, delete=True, abandon_after_s=-1)
        proxy.faults.clear()
        assert_holds(url, spec, "ab", "cd")
        assert len(unit_ids(store.storage, spec.spec_id)) == 1
    assert fault.n_done > 3
    survived(f"bucket: {kind}", fault.n_done)


def test_a_bucket_that_ignores_preconditions_is_refused(
    s3: str, specs: Specs, monkeypatch: pytest.MonkeyPatch, caplog: Any, survived: Survived
) -> None:
    spec = specs["video"]
    with faulty_proxy(s3) as proxy:
        url = _bucket(s3, "ignorant", monkeypatch, proxy.endpoint)
        proxy.add(Fault("ignore preconditions"))
        with pytest.raises(StoreError, match=r"ignores create-once .*--single-committer"):
            TokenStore.open_or_create(url)
        store = TokenStore.open_or_create(url, single_committer=True)
        assert "exactly one process may write" in caplog.text
        store.commit(spec, unit(spec, "ab"), PROVENANCE)
        store.commit(spec, unit(spec, "ab"), PROVENANCE)
        assert_holds(url, spec, "ab")
    survived("bucket that ignores preconditions", 2)


def test_threads_that_commit_to_a_bucket_at_once(
    s3: str, specs: Specs, monkeypatch: pytest.MonkeyPatch, survived: Survived
) -> None:
    spec = specs["video"]
    url = _bucket(s3, "race", monkeypatch)
    TokenStore.open_or_create(url)
    errors: list[BaseException] = []

    def work(own: str) -> None:
        try:
            store = TokenStore.open(url)
            for names in ("ab", "cd", own):
                store.commit(spec, unit(spec, names), PROVENANCE)
        except BaseException as error:  # noqa: BLE001 - reported below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(chr(0x100 + i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert_holds(url, spec, "ab", "cd", *(chr(0x100 + i) for i in range(4)))
    survived("bucket: committers at once", 4)
