"""HDF5 and .npy: round trips, kills, strangers who read, and files that are not ours."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import h5py
import ml_dtypes
import numpy as np
import pytest

from cache import hdf5
from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import (
    CacheMissError,
    CorruptTokensError,
    EmocacheError,
    ManifestError,
    SchemaError,
    StoreError,
)
from cache.hdf5 import export_hdf5, import_hdf5, inspect_hdf5
from cache.npy import export_npy, import_npy, safe_name, unknown_origin
from cache.quantize import Quantized
from cache.spec import TokenSpec
from cache.store import TokenStore
from cache.writer import UnitWriter
from tests.conftest import key_of, make_clip

Specs = dict[str, TokenSpec]
PROVENANCE = {"torch": "0", "device": "cpu"}
DTYPES = ["float16", "bfloat16", "float32", "int8"]
DOCS = Path(__file__).parents[1] / "docs" / "exchange.md"


def clip_of(spec: TokenSpec, name: str, n_audio: int = 120) -> ClipTokens:
    """Return a made-up clip; floats for an int8 spec, which the store quantises."""
    of_floats = spec.model_copy(update={"dtype": "float32"}) if spec.dtype == "int8" else spec
    return replace(make_clip(of_floats, name, n_audio), remark=f"gap in {name}", truncated=True)


def fill(store: TokenStore, spec: TokenSpec, names: str = "abc") -> None:
    """Commit a unit with tokens, one absent and one failed clip; then another unit."""
    clips = [clip_of(spec, name, 40 + i) for i, name in enumerate(names)]
    clips.append(ClipTokens(key_of("none"), Status.ABSENT))
    clips.append(ClipTokens(key_of("bad"), Status.FAILED, reason="no key frame: \n ünreadable"))
    store.commit(spec, clips, PROVENANCE)
    store.commit(spec, [clip_of(spec, "later")], {"torch": "1"})


def content(store: TokenStore, spec: TokenSpec) -> dict[str, Any]:
    """Return all that a store knows of a spec's clips, bytes included."""
    found = {}
    committed = {e.key: e for c in store.commits(spec) for e in c.clips}
    for entry in store.index(spec):
        facts = committed[entry.key].model_dump(exclude={"row"})
        if entry.status is Status.OK:
            stored, _ = store.read_stored(spec, entry.key)
            parts = [stored]
            if isinstance(stored, Quantized):
                parts = [stored.values, stored.token_scale, stored.channel_exponent]
            facts["bytes"] = [(p.dtype.str, p.shape, p.tobytes()) for p in parts]
            facts["frames"] = store.frame_times(spec, entry.row)
        found[entry.key] = facts
    return found


@pytest.fixture
def source(tmp_path: Path, specs: Specs) -> TokenStore:
    """A store of all three streams."""
    store = TokenStore.open_or_create(tmp_path / "source")
    for spec in specs.values():
        fill(store, spec)
    return store


@pytest.fixture
def exported(tmp_path: Path, source: TokenStore) -> Path:
    path = tmp_path / "tokens.h5"
    export_hdf5(source, path)
    return path


@pytest.fixture
def target(tmp_path: Path) -> TokenStore:
    return TokenStore.open_or_create(tmp_path / "target")


class TestHdf5RoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("stream", ["audio", "video", "image"])
    def test_nothing_is_lost(
        self, tmp_path: Path, specs: Specs, target: TokenStore, stream: str, dtype: str
    ) -> None:
        spec = specs[stream].model_copy(update={"dtype": dtype})
        store = TokenStore.open_or_create(tmp_path / "s")
        fill(store, spec)
        path = tmp_path / "tokens.h5"
        report = export_hdf5(store, path)
        assert (report.n_clips, report.n_written, report.n_kept) == (6, 4, 0)
        assert report.n_bytes == path.stat().st_size
        assert [p.name for p in tmp_path.glob(".*")] + [*tmp_path.glob("*.partial")] == []
        assert inspect_hdf5(path) == [
            (spec, {Status.OK: 4, Status.ABSENT: 1, Status.FAILED: 1}),
        ]
        calls: list[int] = []
        found = import_hdf5(path, target, lambda: calls.append(1))
        assert found.imported == {Status.OK: 4, Status.ABSENT: 1, Status.FAILED: 1}
        assert (found.n_known, found.n_different, found.damaged, len(calls)) == (0, 0, [], 6)
        fresh = TokenStore.open(target.root)
        assert content(fresh, spec) == content(store, spec)
        assert content(fresh, spec)[key_of("bad")]["reason"] == "no key frame: \n ünreadable"
        assert content(fresh, spec)[key_of("a")]["remark"] == "gap in a"

    def test_provenance_is_kept_over_two_exports(
        self, tmp_path: Path, specs: Specs, source: TokenStore, exported: Path, target: TokenStore
    ) -> None:
        import_hdf5(exported, target)
        export_hdf5(target, tmp_path / "again.h5")
        third = TokenStore.open_or_create(tmp_path / "third")
        import_hdf5(tmp_path / "again.h5", third)
        spec = specs["audio"]
        made = {c.unit_id: c for c in source.commits(spec)}
        for commit in third.commits(spec):
            first = made[commit.provenance["exported_unit"]]
            assert commit.provenance == {
                **first.provenance,
                "exported_unit": first.unit_id,
                "exported_created": first.created,
                "imported_from": "again.h5",
            }

    def test_some_specs_only(self, tmp_path: Path, specs: Specs, source: TokenStore) -> None:
        path = tmp_path / "some.h5"
        export_hdf5(source, path, [specs["video"]])
        assert [spec for spec, _ in inspect_hdf5(path)] == [specs["video"]]
        other = specs["video"].with_weights("cd" * 32)
        with pytest.raises(CacheMissError, match=rf"holds no tokens of spec {other.spec_id}"):
            export_hdf5(source, tmp_path / "other.h5", [other])
        with pytest.raises(CacheMissError, match=r"nothing to export. Stored: nothing"):
            export_hdf5(TokenStore.open_or_create(tmp_path / "empty"), tmp_path / "other.h5")
        assert not (tmp_path / "other.h5").exists()

    def test_a_spec_without_a_single_ok_clip(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        store = TokenStore.open_or_create(tmp_path / "s")
        store.commit(specs["image"], [ClipTokens(key_of("x"), Status.ABSENT)], PROVENANCE)
        export_hdf5(store, tmp_path / "t.h5")
        assert import_hdf5(tmp_path / "t.h5", target).imported == {Status.ABSENT: 1}

    def test_a_spec_of_which_nothing_is_committed_yet(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        store = TokenStore.open_or_create(tmp_path / "s")
        UnitWriter(store.storage, specs["image"])._ensure_group()
        export_hdf5(store, tmp_path / "t.h5")
        assert inspect_hdf5(tmp_path / "t.h5") == [(specs["image"], {})]
        assert import_hdf5(tmp_path / "t.h5", target).imported == {}

    def test_a_retry_counts_and_the_failure_before_it_does_not(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        spec, store = specs["image"], TokenStore.open_or_create(tmp_path / "s")
        failed = ClipTokens(key_of("a"), Status.FAILED, reason="disk")
        store.commit(spec, [failed], PROVENANCE)
        store.commit(
            spec, [clip_of(spec, "a")], PROVENANCE, [*store.index(spec).failed_in(key_of("a"))]
        )
        assert export_hdf5(store, tmp_path / "t.h5").n_clips == 1
        target.commit(spec, [failed], PROVENANCE)
        assert import_hdf5(tmp_path / "t.h5", target).imported == {Status.OK: 1}
        assert target.entry(spec, key_of("a")).status is Status.OK

    def test_a_store_that_has_half_of_it(
        self, tmp_path: Path, specs: Specs, source: TokenStore, exported: Path, target: TokenStore
    ) -> None:
        spec = specs["video"]
        other = clip_of(spec, "other bytes")
        target.commit(spec, [clip_of(spec, "a"), replace(other, key=key_of("b"))], PROVENANCE)
        mine = content(target, spec)
        report = import_hdf5(exported, target)
        assert (report.n_known, report.n_different) == (2, 1)
        assert sum(report.imported.values()) == 16
        wanted = {**content(source, spec), **mine}
        assert content(TokenStore.open(target.root), spec) == wanted
        again = import_hdf5(exported, TokenStore.open(target.root))
        assert (again.n_known, again.n_different, again.imported) == (18, 1, {})


def test_without_h5py_the_extra_is_named() -> None:
    script = """
import sys
sys.modules["h5py"] = None
try:
    import cache.hdf5
except ImportError as error:
    print(error)
"""
    assert "pip install 'emocache[exchange]'" in run_script(script, Path(__file__).parents[1])


class TestHdf5Export:
    def test_the_same_content_is_nothing_to_do(self, source: TokenStore, exported: Path) -> None:
        before = exported.read_bytes()
        report = export_hdf5(TokenStore.open(source.root), exported)
        assert report.nothing_to_do
        assert (report.n_written, report.n_clips) == (0, 18)
        assert exported.read_bytes() == before

    def test_other_content_is_left_alone(
        self, specs: Specs, source: TokenStore, exported: Path
    ) -> None:
        before = exported.read_bytes()
        source.commit(specs["image"], [clip_of(specs["image"], "new")], PROVENANCE)
        with pytest.raises(StoreError, match=r"export of other clips than the store holds"):
            export_hdf5(source, exported)
        assert exported.read_bytes() == before

    @pytest.mark.parametrize("name", ["tokens.h5", "tokens.h5.partial"])
    @pytest.mark.parametrize("kind", ["text", "hdf5", "folder"])
    def test_files_of_others_are_left_alone(
        self, tmp_path: Path, source: TokenStore, name: str, kind: str
    ) -> None:
        path = tmp_path / name
        if kind == "folder":
            path.mkdir()
        elif kind == "text":
            path.write_text("my thesis")
        else:
            with h5py.File(path, "w") as file:
                file["data"] = [1, 2]
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(StoreError, match=r"not an HDF5 file|not one of emocache"):
            export_hdf5(source, tmp_path / "tokens.h5")
        assert before is None or path.read_bytes() == before
        assert {p.name for p in tmp_path.iterdir()} == {"source", name}

    def test_a_second_export_at_the_same_time_is_refused(
        self, tmp_path: Path, source: TokenStore
    ) -> None:
        script = f"""
from pathlib import Path
from cache.errors import StoreError
from cache.hdf5 import export_hdf5
from cache.store import TokenStore
try:
    export_hdf5(TokenStore.open({source.root!r}), Path({str(tmp_path / "t.h5")!r}))
except StoreError as error:
    print(error)
"""
        said: list[str] = []

        def start_another() -> None:
            if not said:  # another process: HDF5 opens a file once per process
                said.append(run_script(script, Path(__file__).parents[1]))

        export_hdf5(source, tmp_path / "t.h5", on_clip=start_another)
        assert "t.h5.partial: another export is writing it" in said[0]
        assert len(inspect_hdf5(tmp_path / "t.h5")) == 3

    def test_a_damaged_clip_stops_it_by_name(
        self, tmp_path: Path, specs: Specs, source: TokenStore
    ) -> None:
        group = tmp_path / "source" / "tokens.zarr" / f"image-{specs['image'].spec_id}"
        shard = group / "tokens" / "c" / "0" / "0" / "0"
        damaged = bytearray(shard.read_bytes())
        damaged[100] ^= 1
        shard.write_bytes(damaged)
        with pytest.raises(CorruptTokensError, match=r"damaged image tokens, row 0"):
            export_hdf5(TokenStore.open(source.root), tmp_path / "t.h5")
        assert not (tmp_path / "t.h5").exists()

    def test_a_disk_that_refuses_can_be_continued(self, tmp_path: Path, source: TokenStore) -> None:
        path = tmp_path / "t.h5"

        def limited() -> None:
            n_clips = 0

            def limit() -> None:
                nonlocal n_clips
                n_clips += 1
                if n_clips == 3:  # as a quota: nothing beyond the first part of the file
                    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            try:
                export_hdf5(TokenStore.open(source.root), path, on_clip=limit)
            except StoreError as error:
                os._exit(7 if re.search(r"cannot be written \(File too large\)", str(error)) else 8)
            os._exit(9)

        assert in_child(limited) == 7
        assert not path.exists()
        report = export_hdf5(source, path)
        assert report.n_kept + report.n_written == 12
        assert report.n_kept >= 1


def in_child(work: Callable[[], None]) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def die_at(owner: Any, name: str, call: int) -> None:
    """Replace a function by one that kills the process when it is entered for the n-th time."""
    real, n_calls = getattr(owner, name), 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        if n_calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, dying)


class TestKills:
    @pytest.mark.parametrize(
        ("owner", "name", "call", "n_done"),
        [
            (hdf5, "_lay_out", 1, 0),
            (hdf5, "_add_group", 1, 0),
            (hdf5, "_add_group", 3, 0),
            (hdf5, "fsync_file", 1, 0),
            (os, "link", 1, 0),
            (hdf5, "_fill", 1, 0),
            (hdf5, "_write", 1, 0),
            (hdf5, "_write", 2, 1),
            (hdf5, "_place", 7, 4),  # between two datasets of one clip
            (hdf5, "_write", 7, 6),
            (hdf5, "_write", 12, 11),
            (hdf5, "fsync_file", 2, 12),
            (os, "link", 2, 12),
        ],
        ids=lambda value: getattr(value, "__name__", str(value)),
    )
    def test_an_export_continues(
        self, tmp_path: Path, source: TokenStore, target: TokenStore, owner: Any, name: str, call: int,
        n_done: int,
    ) -> None:  # fmt: skip
        path = tmp_path / "tokens.h5"

        def export() -> None:
            die_at(owner, name, call)
            export_hdf5(TokenStore.open(source.root), path)

        assert in_child(export) == -signal.SIGKILL
        assert not path.exists()
        report = export_hdf5(source, path)
        assert report.restarted is None
        assert report.n_kept + report.n_written == 12
        assert n_done - 3 <= report.n_kept <= n_done  # at most a unit's clips are not flushed yet
        import_hdf5(path, target)
        for spec in source.specs.values():
            assert content(target, spec) == content(source, spec)

    def test_killed_between_its_two_names(self, tmp_path: Path, source: TokenStore) -> None:
        path = tmp_path / "tokens.h5"

        def export() -> None:
            real = os.link

            def link(a: Path, b: Path) -> None:
                real(a, b)
                if Path(b) == path:
                    os.kill(os.getpid(), signal.SIGKILL)

            os.link = link  # type: ignore[assignment]
            export_hdf5(TokenStore.open(source.root), path)

        assert in_child(export) == -signal.SIGKILL
        assert export_hdf5(source, path).nothing_to_do
        assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []

    def test_an_export_of_a_store_that_changed_starts_again(
        self, tmp_path: Path, specs: Specs, source: TokenStore
    ) -> None:
        path = tmp_path / "tokens.h5"

        def export() -> None:
            die_at(hdf5, "_write", 5)
            export_hdf5(TokenStore.open(source.root), path)

        assert in_child(export) == -signal.SIGKILL
        source.commit(specs["audio"], [clip_of(specs["audio"], "new")], PROVENANCE)
        report = export_hdf5(source, path)
        assert (
            report.restarted == "the store holds other clips than when the interrupted export began"
        )
        assert (report.n_written, report.n_kept) == (13, 0)

    def test_what_was_written_is_verified(self, tmp_path: Path, source: TokenStore) -> None:
        path, partial = tmp_path / "tokens.h5", tmp_path / "tokens.h5.partial"

        def export() -> None:
            die_at(hdf5, "fsync_file", 2)
            export_hdf5(TokenStore.open(source.root), path)

        assert in_child(export) == -signal.SIGKILL
        with h5py.File(partial, "r+", libver=("v108", "v108")) as file:
            image = next(file[name] for name in file if name.startswith("image-"))
            image["tokens"][3, 5] += 1
            image["frame_pts_s"][1] = 99
        report = export_hdf5(source, path)
        assert (report.n_kept, report.n_written) == (10, 2)
        # The index of what is left may be damaged too; then nothing of it is of use.
        path.rename(partial)
        with h5py.File(partial, "r+", libver=("v108", "v108")) as file:
            next(iter(file.values()))["crc32c"][0] = 1
        report = export_hdf5(source, path)
        assert report.restarted is not None
        assert "fails its checksum" in report.restarted
        assert report.n_written == 12

    @pytest.mark.parametrize("n_clips", [1, 6, 17])
    def test_an_import_continues(
        self, source: TokenStore, exported: Path, target: TokenStore, n_clips: int
    ) -> None:
        def run() -> None:
            calls = [0]

            def stop() -> None:
                calls[0] += 1
                if calls[0] == n_clips:
                    os.kill(os.getpid(), signal.SIGKILL)

            import_hdf5(exported, TokenStore.open(target.root), stop)

        assert in_child(run) == -signal.SIGKILL
        again = TokenStore.open(target.root)
        report = import_hdf5(exported, again)
        assert report.n_known >= min(n_clips, 6)
        assert report.n_different == 0
        for spec in source.specs.values():
            assert content(again, spec) == content(source, spec)


class TestStrangers:
    def test_the_examples_of_the_documentation(
        self, tmp_path: Path, specs: Specs, source: TokenStore, exported: Path
    ) -> None:
        export_npy(source, specs["image"], tmp_path / "npy")
        hdf5_example, npy_example = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
        first = run_script(hdf5_example, tmp_path).splitlines()
        name = f"audio-{specs['audio'].spec_id}"
        assert name in first[0]
        keys = [key_of(c) for c in ("a", "b", "c", "later")]
        assert first[1].split()[0] in keys
        assert first[1].split()[-1] == "float16"
        assert f"{key_of('bad')} failed: no key frame: " in first[3]
        shown = run_script(npy_example, tmp_path)
        assert f"{key_of('none')} absent None" in shown
        assert f"{key_of('a')} {specs['image'].max_shape}" in shown

    def test_bytes_and_checksums_by_other_libraries(
        self, specs: Specs, source: TokenStore, exported: Path
    ) -> None:
        with h5py.File(exported) as file:
            assert file.attrs["format"] == b"emocache-hdf5"
            for spec in specs.values():
                group = file[f"{spec.stream}-{spec.spec_id}"]
                assert TokenSpec.model_validate_json(group.attrs["spec"]) == spec
                assert json.loads(group.attrs["spec"]) == json.loads(spec.canonical_json())
                rows = {key: i for i, key in enumerate(group["clip"][:].astype(str).tolist())}
                for name in "abc":
                    row = rows[key_of(name)]
                    start = group["offset"][row]
                    tokens = group["tokens"][start : start + group["valid_len"][row]]
                    clip = clip_of(spec, name, 40 + "abc".index(name))
                    assert isinstance(clip.tokens, np.ndarray)
                    assert tokens.tobytes() == clip.tokens.tobytes()
                    assert group["crc32c"][row] == google_crc32c.value(tokens.tobytes())
                    if spec.frames:
                        assert group["frame_pts_s"][row].tolist() == list(clip.frame_pts_s)
                for name in ("none", "bad"):
                    assert group["valid_len"][rows[key_of(name)]] == 0

    def test_int8_by_the_documented_arithmetic(self, tmp_path: Path, specs: Specs) -> None:
        spec = specs["video"].model_copy(update={"dtype": "int8"})
        store = TokenStore.open_or_create(tmp_path / "s")
        fill(store, spec)
        export_hdf5(store, tmp_path / "t.h5")
        with h5py.File(tmp_path / "t.h5") as file:
            group = file[f"video-{spec.spec_id}"]
            row = group["clip"][:].astype(str).tolist().index(key_of("b"))
            start, length = group["offset"][row], group["valid_len"][row]
            values = group["tokens"][start : start + length].astype(np.float64)
            values *= group["token_scale"][start : start + length][..., None]
            values *= 2.0 ** (group["channel_exponent"][row] / 4)
        wanted = clip_of(spec, "b").tokens
        assert isinstance(wanted, np.ndarray)
        assert np.linalg.norm(values - wanted) < 0.02 * np.linalg.norm(wanted)
        np.testing.assert_allclose(values, store.read(spec, key_of("b")).tokens, rtol=1e-6)

    def test_bfloat16_by_its_bits(self, tmp_path: Path, specs: Specs) -> None:
        spec = specs["audio"].model_copy(update={"dtype": "bfloat16"})
        store = TokenStore.open_or_create(tmp_path / "s")
        fill(store, spec)
        export_hdf5(store, tmp_path / "t.h5")
        with h5py.File(tmp_path / "t.h5") as file:
            group = file[f"audio-{spec.spec_id}"]
            assert group["tokens"].attrs["torch_dtype"] == b"bfloat16"
            row = group["clip"][:].astype(str).tolist().index(key_of("a"))
            start, length = group["offset"][row], group["valid_len"][row]
            bits = group["tokens"][start : start + length]
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        wanted = clip_of(spec, "a", 40).tokens
        assert isinstance(wanted, np.ndarray)
        assert (values == wanted.astype(np.float32)).all()


def run_script(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=folder, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout


def audio_of(file: h5py.File) -> h5py.Group:
    return next(file[name] for name in file if name.startswith("audio-"))


def swap(name: str, **kwargs: Any) -> Callable[[h5py.File], None]:
    """Return an edit that replaces a dataset of the audio group."""

    def edit(file: h5py.File) -> None:
        group = audio_of(file)
        shape = group[name].shape
        del group[name]
        group.create_dataset(name, **{"shape": shape, **kwargs})

    return edit


def put(name: str, link: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        group = audio_of(file)
        if name in group:
            del group[name]
        group[name] = link

    return edit


def external_data(file: h5py.File) -> None:
    group = audio_of(file)
    shape = group["tokens"].shape
    del group["tokens"]
    group.create_dataset("tokens", shape, "<f2", external="/etc/passwd")


def virtual_data(file: h5py.File) -> None:
    group = audio_of(file)
    shape = group["tokens"].shape
    del group["tokens"]
    made = h5py.VirtualLayout(shape, "<f2")
    made[:] = h5py.VirtualSource("/etc/passwd", "x", shape)
    group.create_virtual_dataset("tokens", made)


def reseal(group: h5py.Group) -> None:
    """Give an edited index its right checksum, as whoever means harm would."""
    names = ["clip", "status", "valid_len", "offset", "crc32c", "truncated", "unit", "units"]
    data = b"".join(group[name][...].tobytes() for name in names)
    group.attrs["index_crc32c"] = np.int64(google_crc32c.value(data))


def index(name: str, row: int, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        audio_of(file)[name][row] = value
        reseal(audio_of(file))

    return edit


def units(text: bytes) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        group = audio_of(file)
        del group["units"]
        group["units"] = np.frombuffer(text, np.uint8)
        reseal(group)

    return edit


def spec_text(change: Callable[[dict[str, Any]], None] | bytes) -> Callable[[h5py.File], None]:
    """Return an edit that puts another spec in, under its own right spec_id where it has one."""

    def edit(file: h5py.File) -> None:
        group = audio_of(file)
        if isinstance(change, bytes):
            group.attrs["spec"] = np.bytes_(change)
            return
        data = json.loads(group.attrs["spec"])
        change(data)
        spec = TokenSpec.model_validate(data)
        group.attrs["spec"] = np.bytes_(json.dumps(data).encode())
        group.attrs["spec_id"] = np.bytes_(spec.spec_id.encode())
        file.move(group.name, f"audio-{spec.spec_id}")

    return edit


def attribute(name: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        audio_of(file).attrs[name] = value

    return edit


def root(name: str, value: Any) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        file.attrs[name] = value

    return edit


HOSTILE: dict[str, tuple[Callable[[h5py.File], None], str]] = {
    "external link": (put("tokens", h5py.ExternalLink("/etc/passwd", "/x")), r"\(ExternalLink\)"),
    "soft link": (put("tokens", h5py.SoftLink("/nowhere")), r"\(SoftLink\)"),
    "unrelated link": (put("extra", h5py.ExternalLink("x.h5", "/")), r"'extra' is a link"),
    "link at the root": (
        lambda f: f.__setitem__("more", h5py.ExternalLink("x.h5", "/")), r"'more' is a link"),
    "group for a dataset": (lambda f: (audio_of(f).move("tokens", "t"),
                                       audio_of(f).create_group("tokens"))[0], r"'tokens' is a Group"),
    "external data": (external_data, r"chunked, compressed or kept outside the file"),
    "virtual data": (virtual_data, r"chunked, compressed or kept outside the file"),
    "compressed": (swap("tokens", dtype="<f2", compression="gzip"), r"chunked, compressed"),
    "huge shape": (swap("clip", shape=(2**50,), dtype="S64"), r"claims \d+ bytes in a file of \d+"),
    "unallocated": (swap("status", dtype="i1"), r"has no place in it"),
    "huge units": (swap("units", shape=(2**60,), dtype="u1"), r"claims \d+ bytes"),
    "objects": (swap("clip", dtype=h5py.string_dtype()), r"'clip' holds object"),
    "references": (swap("unit", dtype=h5py.ref_dtype), r"'unit' holds object"),
    "wrong dtype": (swap("offset", dtype="<f8"), r"'offset' holds float64 instead of int64"),
    "big-endian": (swap("crc32c", dtype=">u4"), r"'crc32c' holds >u4"),
    "other width": (swap("tokens", shape=(7, 3), dtype="<f2"), r"'tokens' has shape \(7, 3\)"),
    "a scalar": (swap("status", shape=(), dtype="i1"), r"'status' has shape \(\)"),
    "no dataset": (lambda f: audio_of(f).__delitem__("valid_len"), r"no dataset 'valid_len'"),
    "no spec": (lambda f: audio_of(f).attrs.__delitem__("spec"), r"no attribute 'spec'"),
    "spec of objects": (attribute("spec", "text"), r"attribute 'spec' of type object"),
    "spec an array": (attribute("spec", np.zeros(5)), r"attribute 'spec' of type float64"),
    "spec damaged": (spec_text(b"{"), r"Invalid JSON"),
    "spec nested": (spec_text(b"[" * 5000), r"Invalid JSON"),
    "spec too long a number": (spec_text(b'{"grid": ' + b"9" * 9000 + b"}"), r"group 'audio-"),
    "another spec": (attribute("spec_id", np.bytes_(b"0" * 16)), r"does not hash to its spec_id '0+'"),
    "spec renamed": (lambda f: f.move(audio_of(f).name, "audio-0"), r"does not hash to its spec_id"),
    "spec of clips too large": (
        spec_text(lambda s: s["encoder"].update(n_context=10**12)), r"the spec allows clips of"),
    "index edited": (lambda f: audio_of(f)["status"].__setitem__(0, 1), r"index fails its checksum"),
    "no hex": (index("clip", 0, b"../" * 21 + b"x"), r"not 64 hexadecimal digits"),
    "twice": (index("clip", slice(0, 2), b"ab" * 32), r"one clip twice"),
    "status 7": (index("status", 0, 7), r"a status that does not exist"),
    "valid_len": (index("valid_len", 0, 2000), r"a valid_len that does not fit|'tokens' has shape"),
    "negative": (index("valid_len", 0, -5), r"a valid_len that does not fit|'tokens' has shape"),
    "overlap": (index("offset", 1, 0), r"clips that overlap"),
    "no such unit": (index("unit", 5, 9), r"a unit that does not exist"),
    "units no JSON": (units(b"nothing\n" * 2), r"line 0 of units: .*Invalid JSON"),
    "units of objects": (
        units(b'{"unit_id": "../x", "created": "", "provenance": {}}\n' * 2), r"'unit_id'"),
    "newer": (root("format_version", 2), r"format version 2, this emocache reads up to 1"),
    "other format": (root("format", np.bytes_(b"other")), r"not one of emocache"),
}  # fmt: skip


class TestHostileFiles:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_refused_in_one_line_and_nothing_changed(
        self, exported: Path, target: TokenStore, name: str
    ) -> None:
        edit, message = HOSTILE[name]
        with h5py.File(exported, "r+") as file:
            edit(file)
        before = snapshot(Path(target.root))
        for work in (inspect_hdf5, lambda path: import_hdf5(path, target)):
            with pytest.raises(EmocacheError, match=message) as caught:
                work(exported)
            assert "\n" not in str(caught.value)
            assert str(exported) in str(caught.value)
        assert snapshot(Path(target.root)) == before

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, r"no such file"),
            (b"", r"not an HDF5 file"),
            (b"thesis" * 1000, r"not an HDF5 file"),
            (b"\x89HDF\r\n\x1a\n" + bytes(5000), r"cannot be opened as HDF5"),
        ],
    )
    def test_no_hdf5(
        self, tmp_path: Path, target: TokenStore, data: bytes | None, message: str
    ) -> None:
        if data is not None:
            (tmp_path / "x.h5").write_bytes(data)
        with pytest.raises(StoreError, match=message):
            import_hdf5(tmp_path / "x.h5", target)
        assert not target.specs

    def test_an_unfinished_export(self, tmp_path: Path, exported: Path, target: TokenStore) -> None:
        exported.rename(tmp_path / "t.h5.partial")
        with pytest.raises(StoreError, match=r"an export that was interrupted"):
            import_hdf5(tmp_path / "t.h5.partial", target)

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.999])
    def test_truncated(self, exported: Path, target: TokenStore, share: float) -> None:
        whole = exported.read_bytes()
        exported.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(StoreError, match=r"cannot be opened as HDF5 \(.*truncated"):
            import_hdf5(exported, target)
        assert not target.specs

    def test_a_flipped_byte_is_never_committed(
        self, tmp_path: Path, specs: Specs, source: TokenStore, exported: Path
    ) -> None:
        """Anywhere: refused, or left out, or without meaning; never other content."""
        whole = exported.read_bytes()
        wanted = {spec: content(source, spec) for spec in specs.values()}
        for place in range(0, len(whole), len(whole) // 40):
            damaged = bytearray(whole)
            damaged[place] ^= 0x10
            exported.write_bytes(damaged)
            shutil.rmtree(tmp_path / "new", ignore_errors=True)
            store = TokenStore.open_or_create(tmp_path / "new")
            try:
                import_hdf5(exported, store)
            except EmocacheError:
                assert not store.specs
            for spec in store.specs.values():
                assert content(store, spec).items() <= wanted[spec].items(), place

    def test_a_damaged_clip_is_left_out_and_named(
        self, specs: Specs, source: TokenStore, exported: Path, target: TokenStore
    ) -> None:
        with h5py.File(exported, "r+", libver=("v108", "v108")) as file:
            image = next(file[name] for name in file if name.startswith("image-"))
            row = image["clip"][:].astype(str).tolist().index(key_of("b"))
            image["tokens"][image["offset"][row] + 3, 5] += 1
            video = next(file[name] for name in file if name.startswith("video-"))
            row = video["clip"][:].astype(str).tolist().index(key_of("a"))
            video["frame_index"][row, 2] = 77
        report = import_hdf5(exported, target)
        assert report.damaged == [
            f"image of {key_of('b')[:16]}: the tokens fail their checksum",
            f"video of {key_of('a')[:16]}: what stands beside the tokens fails its checksum",
        ]
        assert sum(report.imported.values()) == 16
        lacking = {"audio": set(), "image": {key_of("b")}, "video": {key_of("a")}}
        for spec in specs.values():
            wanted = content(source, spec)
            assert content(target, spec) == {
                key: facts for key, facts in wanted.items() if key not in lacking[spec.stream]
            }


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -------------------------------------------------------------------- .npy


def record(name: str, uid: str | None = None, media: str | None = None) -> Record:
    return Record(
        uid=uid or f"demo/{name}",
        media=media or f"clips/{name}.mp4",
        clip=Clip(sha256=key_of(name), n_bytes=1),
    )


def save(folder: Path, name: str, array: np.ndarray) -> Path:
    path = folder / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def tokens_of(spec: TokenSpec, name: str) -> np.ndarray:
    found = clip_of(spec, name).tokens
    assert isinstance(found, np.ndarray)
    return found


class TestNpyExport:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("stream", ["audio", "video", "image"])
    def test_files_and_description(
        self, tmp_path: Path, specs: Specs, stream: str, dtype: str
    ) -> None:
        spec = specs[stream].model_copy(update={"dtype": dtype})
        store = TokenStore.open_or_create(tmp_path / "s")
        fill(store, spec)
        folder = tmp_path / "npy"
        report = export_npy(store, spec, folder)
        assert (report.n_written, report.n_kept) == (4, 0)
        assert report.without_file == {"absent": 1, "failed": 1}
        described = json.loads((folder / "emocache.json").read_text())
        assert described["format"] == "emocache-npy"
        assert described["complete"] is True
        assert described["spec"] == spec.model_dump(mode="json")
        rows = {row["clip"]: row for row in described["clips"]}
        assert "file" not in rows[key_of("none")]
        assert rows[key_of("bad")]["reason"] == "no key frame: \n ünreadable"
        for row in rows.values():
            if row["status"] != "ok":
                continue
            array = np.load(folder / row["file"], allow_pickle=False)
            stored = store.read(spec, row["clip"])
            assert array.dtype == described["dtype"]
            assert (array == stored.tokens.astype(array.dtype)).all()
            assert row["valid_len"] == len(array)
            assert row["crc32c"] == google_crc32c.value(array.tobytes())
            assert row["stored_crc32c"] == stored.entry.crc32c
            made = described["units"][row["unit"]]["provenance"]
            assert made == ({"torch": "1"} if row["clip"] == key_of("later") else PROVENANCE)
        assert len(list(folder.glob("*.npy"))) == 4

    def test_files_are_named_by_uid(self, tmp_path: Path, specs: Specs, source: TokenStore) -> None:
        folder = tmp_path / "npy"
        records = [
            record("a", "demo/a"),
            record("b", "../../etc/b"),
            record("c", "demo/" + "名" * 90),
            record("bad"),
            record("never"),
        ]
        report = export_npy(source, specs["audio"], folder, records)
        assert report.without_file == {"failed": 1, "missing": 1}
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            ["%2E.%2F..%2Fetc%2Fb.npy", "demo%2Fa.npy", f"{key_of('c')}.npy", "emocache.json"]
        )

    def test_running_again_keeps_repairs_and_adds(
        self, tmp_path: Path, specs: Specs, source: TokenStore
    ) -> None:
        spec, folder = specs["image"], tmp_path / "npy"
        export_npy(source, spec, folder)
        assert export_npy(source, spec, folder).nothing_to_do
        (folder / f"{key_of('a')}.npy").write_bytes(b"half of it")
        source.commit(spec, [clip_of(spec, "new")], PROVENANCE)
        calls: list[int] = []
        report = export_npy(source, spec, folder, on_clip=lambda: calls.append(1))
        assert (report.n_written, report.n_kept, len(calls)) == (2, 3, 7)
        assert (
            np.load(folder / f"{key_of('a')}.npy") == source.read(spec, key_of("a")).tokens
        ).all()

    def test_a_kill_leaves_it_marked_incomplete(
        self, tmp_path: Path, specs: Specs, source: TokenStore
    ) -> None:
        spec, folder = specs["image"], tmp_path / "npy"

        def run() -> None:
            die_at(np, "save", 3)
            export_npy(TokenStore.open(source.root), spec, folder)

        assert in_child(run) == -signal.SIGKILL
        assert json.loads((folder / "emocache.json").read_text())["complete"] is False
        report = export_npy(source, spec, folder)
        assert (report.n_kept, report.n_written) == (2, 2)

    def test_folders_of_others(self, tmp_path: Path, specs: Specs, source: TokenStore) -> None:
        export_npy(source, specs["image"], tmp_path / "npy")
        before = snapshot(tmp_path / "npy")
        with pytest.raises(StoreError, match=r"holds an export of spec .* Give another folder"):
            export_npy(source, specs["audio"], tmp_path / "npy")
        assert snapshot(tmp_path / "npy") == before
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("mine")
        with pytest.raises(StoreError, match=r"holds 'thesis.txt'"):
            export_npy(source, specs["audio"], tmp_path / "mine")
        with pytest.raises(StoreError, match=r"is a file"):
            export_npy(source, specs["audio"], tmp_path / "mine" / "thesis.txt")
        (tmp_path / "mine" / "emocache.json").write_text("{}")
        with pytest.raises(SchemaError, match=r"emocache.json: missing field"):
            export_npy(source, specs["audio"], tmp_path / "mine")
        with pytest.raises(CacheMissError, match=r"holds no tokens of spec"):
            export_npy(source, specs["audio"].with_weights("cd" * 32), tmp_path / "x")


class TestNpyImport:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    @pytest.mark.parametrize("stream", ["audio", "video", "image"])
    def test_round_trip(
        self, tmp_path: Path, specs: Specs, target: TokenStore, stream: str, dtype: str
    ) -> None:
        spec = specs[stream].model_copy(update={"dtype": dtype})
        store = TokenStore.open_or_create(tmp_path / "s")
        fill(store, spec)
        records = [record(name) for name in ("a", "b", "c", "later", "none", "bad")]
        export_npy(store, spec, tmp_path / "npy", records)
        calls: list[int] = []
        report = import_npy(
            tmp_path / "npy", target, spec, records, {"who": "lab"}, name="lab 2023",
            on_clip=lambda: calls.append(1),
        )  # fmt: skip
        assert report.imported == {Status.OK: 4}
        assert (report.n_without_file, report.failures, len(calls)) == (2, {}, 4)
        for entry in target.index(report.spec):
            original = store.read(spec, entry.key)
            assert entry.crc32c == original.entry.crc32c
            found = target.read(report.spec, entry.key)
            assert found.tokens.tobytes() == original.tokens.tobytes()
            index, times = target.frame_times(report.spec, entry.row)
            assert set(index) <= {-1}
            assert np.isnan(times).all()
        (commit,) = target.commits(report.spec)
        assert commit.provenance == {
            "who": "lab",
            "origin": "unknown",
            "declared_name": "lab 2023",
            "imported_from": "npy",
        }
        # What came in can go out again, unknown frame times included.
        export_hdf5(target, tmp_path / "t.h5")
        other = TokenStore.open_or_create(tmp_path / "other")
        assert import_hdf5(tmp_path / "t.h5", other).imported == {Status.OK: 4}
        export_npy(target, report.spec, tmp_path / "npy again")

    def test_the_mark_cannot_be_taken_for_an_extraction(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        spec = specs["image"]
        marked = unknown_origin(spec, "lab")
        assert marked.spec_id != spec.spec_id
        assert marked == unknown_origin(spec.with_weights("ef" * 32), "lab")
        assert marked != unknown_origin(spec, "lab 2")
        digest = subprocess.run(
            ["sha256sum"], input=b"origin unknown: lab", capture_output=True, check=True
        ).stdout.split()[0]
        assert marked.encoder.weights_sha256 == digest.decode()
        save(tmp_path / "f", "a", tokens_of(spec, "a"))
        import_npy(tmp_path / "f", target, spec, [record("a")], {}, name="lab")
        assert target.sources(spec) == []
        assert target.sources(marked) == [marked]
        with pytest.raises(SchemaError, match=r"needs a name"):
            unknown_origin(spec, " ")

    @pytest.mark.parametrize(
        "name", ["demo/a", "demo%2Fa", "a", "clips/a", "clip a", "film", key_of("a")]
    )
    def test_what_a_file_may_be_called(
        self, tmp_path: Path, specs: Specs, target: TokenStore, name: str
    ) -> None:
        media = {"clips/a": "clips/a.mp4", "film": "deep/er/film.avi"}.get(name, "x.y/clip a.mp4")
        save(tmp_path / "f", name, tokens_of(specs["video"], "a"))
        records = [record("a", media=media), record("b", "other/b", "y/b.mp4")]
        report = import_npy(tmp_path / "f", target, specs["video"], records, {}, name="n")
        assert [entry.key for entry in target.index(report.spec)] == [key_of("a")]
        assert report.n_without_file == 1

    def test_an_exact_uid_goes_before_a_source_id(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        save(tmp_path / "f", "x", tokens_of(specs["video"], "a"))
        records = [record("a", "x"), record("b", "demo/x")]
        report = import_npy(tmp_path / "f", target, specs["video"], records, {}, name="n")
        assert [entry.key for entry in target.index(report.spec)] == [key_of("a")]

    def test_unknown_and_ambiguous_names(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        spec, folder = specs["video"], tmp_path / "f"
        save(folder, "a", tokens_of(spec, "a"))
        for i in range(7):
            save(folder, f"stranger{i}", tokens_of(spec, "a"))
        records = [record("a"), record("b")]
        message = r"7 of 8 files name no record: stranger0.npy, .*stranger4.npy and 2 more\."
        with pytest.raises(ManifestError, match=message):
            import_npy(folder, target, spec, records, {}, name="n")
        for path in folder.glob("stranger*"):
            path.unlink()
        records = [record("a", "one/a"), record("b", "two/a")]
        with pytest.raises(ManifestError, match=r"1 of 1 files name several clips: a.npy"):
            import_npy(folder, target, spec, records, {}, name="n")
        with pytest.raises(ManifestError, match=r"no .npy files there"):
            import_npy(tmp_path / "none", target, spec, records, {}, name="n")
        assert not target.specs

    def test_two_records_of_one_clip(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        spec, folder = specs["video"], tmp_path / "f"
        save(folder, "one/a", tokens_of(spec, "a"))
        save(folder, "two/a", tokens_of(spec, "b"))
        records = [record("a", "one/a"), record("a", "two/a")]
        with pytest.raises(ManifestError, match=r"one/a.npy and two/a.npy belong to one clip and"):
            import_npy(folder, target, spec, records, {}, name="n")
        save(folder, "two/a", tokens_of(spec, "a"))
        report = import_npy(folder, target, spec, records, {}, name="n")
        assert report.imported == {Status.OK: 1}

    def test_zeros_and_nan_are_failures(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        spec, folder = specs["audio"], tmp_path / "f"
        good = tokens_of(spec, "a")
        save(folder, "a", good)
        save(folder, "b", np.zeros_like(good))
        bad = good.copy()
        bad[3, 3] = np.nan
        save(folder, "c", bad)
        records = [record(name) for name in "abc"]
        report = import_npy(folder, target, spec, records, {}, name="n")
        assert report.imported == {Status.OK: 1, Status.FAILED: 2}
        assert report.failures == {
            "b.npy": "all zeros in the imported file",
            "c.npy": "NaN or infinity in the imported file",
        }
        with pytest.raises(CacheMissError, match=r"failed \(all zeros in the imported file\)"):
            target.read(report.spec, key_of("b"))
        again = import_npy(folder, target, spec, records, {}, name="n")
        assert (again.imported, again.n_known, len(again.failures)) == ({}, 3, 2)
        save(folder, "b", tokens_of(spec, "b"))  # somebody repaired the file
        third = import_npy(folder, target, spec, records, {}, name="n")
        assert (third.imported, third.n_known) == ({Status.OK: 1}, 2)
        assert target.entry(report.spec, key_of("b")).status is Status.OK

    @pytest.mark.parametrize(
        ("stream", "shape", "dtype", "message"),
        [
            ("audio", (64, 120), "float16", r"shape \(64, 120\), wanted up to \(\d+, 64\)"),
            ("audio", (1, 120, 64), "float16", r"shape \(1, 120, 64\)"),
            ("audio", (0, 64), "float16", r"a.npy \("),
            ("video", (64, 96), "float16", r"shape \(64, 96\), wanted \(16, 4, 96\)"),
            ("video", (4, 16, 96), "float16", r"shape \(4, 16, 96\)"),
            ("video", (16, 4, 96), "float32", r"float32, wanted float16"),
            ("video", (16, 4, 96), "float64", r"float64, wanted float16"),
            ("video", (16, 4, 96), "int8", r"int8, wanted float16"),
            ("video", (16, 4, 96), ">f2", r">f2, wanted float16"),
            ("video", (), "float16", r"shape \(\)"),
        ],
    )
    def test_another_layout_is_refused_not_guessed(
        self, tmp_path: Path, specs: Specs, target: TokenStore, stream: str,
        shape: tuple[int, ...], dtype: str, message: str,
    ) -> None:  # fmt: skip
        assert specs[stream].max_shape[-1] == {"audio": 64, "video": 96}[stream]
        save(tmp_path / "f", "a", np.ones(shape, dtype))
        save(tmp_path / "f", "b", tokens_of(specs[stream], "b"))
        records = [record("a"), record("b")]
        with pytest.raises(CorruptTokensError, match=message):
            import_npy(tmp_path / "f", target, specs[stream], records, {}, name="n")
        assert not target.specs

    @pytest.mark.parametrize("kind", ["objects", "pickle", "npz", "text", "empty", "short"])
    def test_files_that_are_no_plain_array(
        self, tmp_path: Path, specs: Specs, target: TokenStore, kind: str
    ) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "exploded"),)

        folder, spec = tmp_path / "f", specs["video"]
        path = save(folder, "a", tokens_of(spec, "a"))
        if kind == "objects":
            np.save(path, np.array([Bomb()], object), allow_pickle=True)
        elif kind == "pickle":
            path.write_bytes(pickle.dumps(Bomb()))
        elif kind == "npz":
            with path.open("wb") as file:
                np.savez(file, a=tokens_of(spec, "a"))
        else:
            whole = path.read_bytes()
            path.write_bytes({"text": b"thesis", "empty": b"", "short": whole[:-10]}[kind])
        with pytest.raises(CorruptTokensError, match=r"1 files are not video tokens .*a.npy \("):
            import_npy(folder, target, spec, [record("a")], {}, name="n")
        assert not (tmp_path / "exploded").exists()
        assert not target.specs

    def test_dtypes_that_files_cannot_have(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        spec = specs["video"].model_copy(update={"dtype": "bfloat16"})
        fine = tokens_of(specs["video"], "a").astype(np.float32)
        assert (fine.astype(ml_dtypes.bfloat16).astype(np.float32) != fine).any()
        save(tmp_path / "f", "a", fine)
        with pytest.raises(CorruptTokensError, match=r"a.npy: its numbers are not bfloat16"):
            import_npy(tmp_path / "f", target, spec, [record("a")], {}, name="n")
        spec = specs["video"].model_copy(update={"dtype": "int8"})
        with pytest.raises(SchemaError, match=r"'int8' cannot be declared"):
            import_npy(tmp_path / "f", target, spec, [record("a")], {}, name="n")
        assert not target.specs

    def test_a_kill_between_units_is_continued(
        self, tmp_path: Path, specs: Specs, target: TokenStore
    ) -> None:
        spec, folder = specs["video"], tmp_path / "f"
        names = [f"clip{i}" for i in range(70)]
        for name in names:
            save(folder, name, tokens_of(spec, name))
        records = [record(name) for name in names]

        def run() -> None:
            die_at(TokenStore, "commit", 3)
            store = TokenStore.open(target.root)
            import_npy(folder, store, spec, records, {}, name="n")

        assert in_child(run) == -signal.SIGKILL
        report = import_npy(folder, TokenStore.open(target.root), spec, records, {}, name="n")
        assert (report.n_known, report.imported) == (64, {Status.OK: 6})


@pytest.mark.parametrize("uid", ["demo/a", "a b/ü", "..", ".hidden/x", "50%/x", "a\\b:c*?\n"])
def test_safe_names_are_one_component_and_reversible(tmp_path: Path, uid: str) -> None:
    from urllib.parse import unquote

    name = safe_name(uid)
    assert unquote(name) == uid
    (tmp_path / name).write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_names_stay_apart() -> None:
    names: Sequence[str] = ["a/b", "a%2Fb", "a_b", "a%252Fb"]
    assert len({safe_name(name) for name in names}) == len(names)
