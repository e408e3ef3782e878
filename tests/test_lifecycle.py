"""Garbage collection, compaction and copies: what they remove, what they keep, what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache import layout
from cache.audit import doctor, verify
from cache.commit import ClipTokens, Status, unit_ids
from cache.errors import CorruptTokensError, StoreError
from cache.lifecycle import collect_garbage, compact, merge_provenance, sync
from cache.spec import TokenSpec
from cache.storage import LocalStorage
from cache.store import TokenStore
from tests.conftest import key_of, make_clip
from tests.faults import PROVENANCE, assert_holds, store_of, unit

Specs = dict[str, TokenSpec]


def files_in(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


class TestGarbage:
    def test_a_dry_run_changes_nothing_and_names_what_a_real_one_removes(
        self, tmp_path: Path, specs: Specs
    ) -> None:
        spec, root = specs["video"], tmp_path / "s"
        store = store_of(root, spec, "ab", "cd")
        compact(store, spec)
        before = files_in(root)
        found = collect_garbage(store)
        assert files_in(root) == before
        named = {key for keys in found.files.values() for key in keys}
        assert named <= before
        assert found.n_bytes == sum((root / key).stat().st_size for key in named)
        removed = collect_garbage(store, delete=True)
        assert {key for keys in removed.files.values() for key in keys} >= named
        assert not named & files_in(root)
        assert_holds(root, spec, "ab", "cd")
        assert collect_garbage(TokenStore.open(root), delete=True).n_files == 0
        assert not [
            p for p in (root / layout.ZARR).rglob("*") if p.is_dir() and not any(p.iterdir())
        ]

    def test_specs_that_serve_no_kept_preset_go_and_the_others_stay(
        self, tmp_path: Path, specs: Specs
    ) -> None:
        root, video = tmp_path / "s", specs["video"]
        rich = video.model_copy(update={"grid": None})
        other = video.model_copy(update={"decode_policy": 7})
        store = TokenStore.open_or_create(root)
        for spec in (rich, other, specs["image"]):
            store.commit(spec, unit(spec, "ab"), PROVENANCE)
            store.check_probe(spec, [1.0, 2.0])
            store.write_snapshot(spec)
        unresolved = video.model_copy(
            update={"encoder": video.encoder.model_copy(update={"weights_sha256": None})}
        )
        keep = [unresolved]  # as a preset names it: without weights, and served by the richer one
        found = collect_garbage(store, keep)
        assert {why.split()[2].rstrip(",") for why in found.files} == {
            other.spec_id, specs["image"].spec_id,
        }  # fmt: skip
        collect_garbage(store, keep, delete=True)
        assert set(TokenStore.open(root).specs) == {rich.spec_id}
        assert_holds(root, rich, "ab")
        left = {name for name in files_in(root) if other.spec_id in name}
        assert left == {f"claims/{other.spec_id}/00000000"}  # its number is never used again
        store = TokenStore.open(root)
        store.commit(other, unit(other, "ab"), PROVENANCE)  # it comes back as if it were new
        assert_holds(root, other, "ab")
        assert store.entry(other, key_of("a")).row == layout.CLIPS_PER_SHARD

    def test_jobs_are_left_alone_and_are_no_strangers(self, tmp_path: Path, specs: Specs) -> None:
        spec, root = specs["video"], tmp_path / "s"
        jobs = LocalStorage(root)
        files = {
            f"{layout.jobs('0123456789abcdef')}/0000/{name}"
            for name in ("plan.json", "leases/000000.000", "receipts/000000.json", "workers/w.json")
        }
        for key in files:
            jobs.create(key, b"{}")
        store = store_of(root, spec, "ab")  # a folder with nothing but jobs becomes a store
        assert collect_garbage(store, [], delete=True, abandon_after_s=-1).n_files
        assert files <= files_in(root)
        store = store_of(root, spec, "ab")
        assert collect_garbage(store, delete=True, abandon_after_s=-1).n_files == 0
        assert verify(store).findings == []
        report = doctor(store)
        assert (report.repaired, report.remaining) == ([], [])
        target = TokenStore.open_or_create(tmp_path / "copy")
        assert sync(store, target).n_clips == 2
        assert not (tmp_path / "copy" / layout.JOBS).exists()
        # The record that a killed worker left in the making.
        torn = f"{layout.jobs('0123456789abcdef')}/0000/workers/.w.json.1-a.partial"
        jobs.path(torn).write_bytes(b"{")
        assert collect_garbage(store, delete=True).n_files == 0, "it may be alive"
        collect_garbage(store, delete=True, abandon_after_s=-1)
        assert not jobs.path(torn).exists()

    def test_a_copy_without_claims_loses_nothing_to_the_next_writer(
        self, tmp_path: Path, specs: Specs
    ) -> None:
        spec, root = specs["video"], tmp_path / "s"
        store_of(root, spec, "ab", "cd")
        for claim in (root / layout.claims(spec.spec_id)).iterdir():
            claim.unlink()
        store_of(root, spec, "ef")
        assert_holds(root, spec, "ab", "cd", "ef")


class TestCompaction:
    def test_small_units_become_full_shards(self, tmp_path: Path, specs: Specs) -> None:
        for spec in (specs["audio"], specs["video"].model_copy(update={"dtype": "int8"}),
                     specs["image"].model_copy(update={"dtype": "bfloat16"})):  # fmt: skip
            root = tmp_path / spec.stream
            store = TokenStore.open_or_create(root)
            clips = [make_clip(specs[spec.stream], f"c{i}", n_audio=3 + i) for i in range(40)]
            for i in range(40):
                store.commit(spec, [clips[i]], {"torch": str(i % 2), "run": "x"})
            before = {c.key: store.read(spec, c.key) for c in clips}
            times = {c.key: store.frame_times(spec, before[c.key].entry.row) for c in clips}
            done = compact(store, spec)
            assert (done.n_units_before, done.n_units_after) == (40, 2)
            for opened in (store, TokenStore.open(root)):
                assert opened.index(spec).n_units == 2
                for key, old in before.items():
                    new = opened.read(spec, key)
                    assert new.tokens.tobytes() == old.tokens.tobytes()
                    assert new.entry.crc32c == old.entry.crc32c
                    assert opened.frame_times(spec, new.entry.row) == times[key]
            provenance = {c.provenance["torch"] for c in store.commits(spec)}
            assert provenance == {"0 | 1"}
            # One of the two is full; joining a single unit with nothing is no work.
            assert compact(TokenStore.open(root), spec).n_units_before == 0

    def test_what_a_retry_superseded_is_left_behind_and_failures_are_kept(
        self, tmp_path: Path, specs: Specs
    ) -> None:
        spec, root = specs["video"], tmp_path / "s"
        store = TokenStore.open_or_create(root)
        failed = [ClipTokens(key_of(n), Status.FAILED, reason=f"no {n}") for n in "ab"]
        odd = ClipTokens(key_of("d"), Status.ABSENT)
        store.commit(spec, [*failed, make_clip(spec, "c"), odd], PROVENANCE)
        after = store.index(spec).failed_in(key_of("a"))
        store.commit(spec, [make_clip(spec, "a")], PROVENANCE, after)
        compact(store, spec)
        (commit,) = store.commits(spec)
        assert [(e.key, e.status) for e in sorted(commit.clips, key=lambda e: e.status)] == [
            (key_of("d"), Status.ABSENT), (key_of("b"), Status.FAILED),
            *((e.key, Status.OK) for e in commit.clips if e.status is Status.OK),
        ]  # fmt: skip
        assert store.entry(spec, key_of("b")).reason == "no b"
        collect_garbage(store, delete=True)
        opened = TokenStore.open(root)
        # The failure can still be tried again, and then counts no more.
        opened.commit(
            spec, [make_clip(spec, "b")], PROVENANCE, opened.index(spec).failed_in(key_of("b"))
        )
        assert TokenStore.open(root).entry(spec, key_of("b")).status is Status.OK

    def test_damage_stops_it_and_the_old_units_stay(self, tmp_path: Path, specs: Specs) -> None:
        spec, root = specs["video"], tmp_path / "s"
        store = store_of(root, spec, "ab", "cd")
        path = root / layout.group(spec) / "tokens" / "c" / "0" / "0" / "0" / "0"
        data = bytearray(path.read_bytes())
        data[300] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptTokensError, match=r"CRC-32C differs"):
            compact(store, spec)
        assert TokenStore.open(root).index(spec).n_units == 2

    def test_provenance_of_a_joined_unit_names_all(self) -> None:
        parts = [{"torch": "2.1", "device": "cpu"}, {"torch": "2.2"}, {"torch": "2.1"}]
        assert merge_provenance(parts) == {"torch": "2.1 | 2.2", "device": "cpu"}


class TestSync:
    def test_a_copy_is_whole_incremental_and_may_be_compressed(
        self, tmp_path: Path, specs: Specs
    ) -> None:
        source = TokenStore.open_or_create(tmp_path / "a")
        for spec in specs.values():
            source.commit(spec, unit(spec, "ab"), PROVENANCE)
            source.check_probe(spec, [0.5])
        target = TokenStore.open_or_create(tmp_path / "b", compression="zstd")
        done = sync(source, target)
        assert (done.n_clips, done.n_known) == (6, 0)
        video = specs["video"]
        source.commit(video, unit(video, "cd"), PROVENANCE)
        done = sync(TokenStore.open(tmp_path / "a"), TokenStore.open(tmp_path / "b"))
        assert (done.n_clips, done.n_known) == (2, 6)
        assert_holds(tmp_path / "b", video, "ab", "cd")
        assert_holds(tmp_path / "b", specs["audio"], "ab")
        assert TokenStore.open(tmp_path / "b").compression == "zstd"
        with pytest.raises(Exception, match=r"answers the fixed input differently"):
            TokenStore.open(tmp_path / "b").check_probe(video, [5.0])  # the probe came along

    def test_a_failure_there_gives_way_to_tokens_from_here(
        self, tmp_path: Path, specs: Specs
    ) -> None:
        spec = specs["video"]
        source = store_of(tmp_path / "a", spec, "ab")
        target = TokenStore.open_or_create(tmp_path / "b")
        target.commit(spec, [ClipTokens(key_of("a"), Status.FAILED, reason="disk")], PROVENANCE)
        assert sync(source, target).n_clips == 2
        assert_holds(tmp_path / "b", spec, "ab")
        backwards = sync(TokenStore.open(tmp_path / "b"), TokenStore.open(tmp_path / "a"))
        assert backwards.n_clips == 0

    def test_damage_is_not_copied(self, tmp_path: Path, specs: Specs) -> None:
        spec = specs["video"]
        source = store_of(tmp_path / "a", spec, "ab")
        path = tmp_path / "a" / layout.group(spec) / "tokens" / "c" / "0" / "0" / "0" / "0"
        data = bytearray(path.read_bytes())
        data[300] ^= 1
        path.write_bytes(data)
        target = TokenStore.open_or_create(tmp_path / "b")
        with pytest.raises(CorruptTokensError, match=r"CRC-32C differs"):
            sync(source, target)
        assert not unit_ids(target.storage, spec.spec_id)


class TestOtherLibraries:
    """The open format, by libraries that know nothing of this project."""

    @pytest.mark.parametrize("compression", ["none", "zstd"])
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
    def test_tensorstore_reads_the_same_bytes(
        self, tmp_path: Path, specs: Specs, dtype: str, compression: str
    ) -> None:
        tensorstore = pytest.importorskip("tensorstore")
        store = TokenStore.open_or_create(tmp_path / "s", compression=compression)  # type: ignore[arg-type]
        for stream, base in specs.items():
            spec = base.model_copy(update={"dtype": dtype})
            clips = [make_clip(base, f"c{i}", n_audio=20 + 40 * i) for i in range(4)]
            store.commit(spec, clips, {})
            where = str(tmp_path / "s" / layout.group(spec) / "tokens") + "/"
            array = tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": where}}
            ).result()
            for clip in clips:
                stored, entry = store.read_stored(spec, clip.key)
                raw = stored if isinstance(stored, np.ndarray) else stored.values
                theirs = array[entry.row, : entry.valid_len].read().result()
                assert theirs.tobytes() == raw.tobytes(), stream

    def test_xarray_and_dask_open_a_group(self, tmp_path: Path, specs: Specs) -> None:
        xarray = pytest.importorskip("xarray")
        dask_array = pytest.importorskip("dask.array")
        import zarr

        store = TokenStore.open_or_create(tmp_path / "s")
        for spec in specs.values():
            clips = unit(spec, "abc")
            store.commit(spec, clips, {})
            path = tmp_path / "s" / layout.group(spec)
            dataset = xarray.open_zarr(path, consolidated=False)
            row = store.entry(spec, key_of("b")).row
            n_valid = int(dataset.valid_len[row])
            assert isinstance(clips[1].tokens, np.ndarray)
            wanted = clips[1].tokens.tobytes()
            assert dataset.tokens[row, :n_valid].values.tobytes() == wanted
            assert dataset.attrs["emocache"]["spec_id"] == spec.spec_id
            lazy = dask_array.from_zarr(zarr.open_array(path / "tokens", mode="r"))
            assert lazy[row, :n_valid].compute().tobytes() == wanted


def test_a_store_in_a_place_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(StoreError, match=r"is a file; give a folder"):
        TokenStore.open_or_create(tmp_path / "f")
    with pytest.raises(StoreError, match=r"not an emocache store"):
        TokenStore.open(tmp_path / "f")
    with pytest.raises(StoreError, match=r"without file://"):
        TokenStore.open(f"file://{tmp_path}")
    with pytest.raises(StoreError, match=r"a store of kind 'ftp' is not known"):
        TokenStore.open("ftp://host/store")
