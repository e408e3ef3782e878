"""Shards by byte range against zarr-python, in both directions."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec

from cache import layout
from cache.errors import CorruptTokensError
from cache.layout import CLIPS_PER_SHARD, ArrayPlan, arrays
from cache.shards import Access, Shard, can_read, crc32c, encode_shard
from cache.spec import TokenSpec
from cache.storage import LocalStorage
from cache.store import TokenStore
from tests.conftest import key_of, make_clip

PLAN = ArrayPlan(
    "tokens", (12, 3), "float16", (4, 3), 0, ("clip", "token", "channel"), is_sharded=True
)


def zarr_array(folder: Path, plan: ArrayPlan, n_shards: int = 1) -> zarr.Array:
    return zarr.create_array(
        folder,
        shape=(n_shards * CLIPS_PER_SHARD, *plan.tail),
        dtype=plan.dtype,
        chunks=plan.chunk,
        shards=plan.shard,
        serializer=BytesCodec(),
        compressors=[Crc32cCodec()],
        fill_value=plan.fill,
        zarr_format=3,
    )


def write(path: Path, plan: ArrayPlan, clips: list[np.ndarray | None]) -> None:
    LocalStorage(path.parent).write(path.name, encode_shard(plan, clips))


def open_shard(path: Path, plan: ArrayPlan, *, access: Access = "read") -> Shard:
    return Shard(LocalStorage(path.parent), path.name, plan, access=access)


lengths = st.lists(st.none() | st.integers(1, 12), min_size=1, max_size=CLIPS_PER_SHARD)


@given(lengths)
def test_zarr_reads_what_we_write_and_we_read_what_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, n_tokens: list[int | None]
) -> None:
    root = tmp_path_factory.mktemp("shards")
    rng = np.random.default_rng(len(n_tokens))
    clips = [
        None if n is None else rng.standard_normal((n, 3)).astype(np.float16) for n in n_tokens
    ]
    ours, theirs = zarr_array(root / "ours", PLAN), zarr_array(root / "theirs", PLAN)
    write(root / "ours" / PLAN.chunk_file(0), PLAN, clips)
    block = np.zeros((CLIPS_PER_SHARD, *PLAN.tail), np.float16)
    for row, clip in enumerate(clips):
        if clip is not None:
            block[row, : len(clip)] = clip
    theirs[:] = block
    np.testing.assert_array_equal(np.asarray(ours[:]), block)
    if all(clip is None for clip in clips):
        return  # zarr writes no shard at all then
    shards = [open_shard(root / name / PLAN.chunk_file(0), PLAN) for name in ("ours", "theirs")]
    for row, clip in enumerate(clips):
        if clip is not None:
            for shard in shards:
                assert shard.read(row, len(clip)).tobytes() == clip.tobytes()


@pytest.mark.parametrize("stream", ["audio", "video", "image"])
def test_the_fast_path_and_zarr_give_identical_bytes(
    tmp_path: Path, specs: dict[str, TokenSpec], stream: str
) -> None:
    spec, store = specs[stream], TokenStore.open_or_create(tmp_path / "s")
    for unit in range(3):
        clips = [make_clip(spec, f"{unit}-{i}", n_audio=1 + 47 * i) for i in range(20)]
        store.commit(spec, clips, {})
    metadata = json.loads(
        (tmp_path / "s" / layout.group(spec) / "tokens" / "zarr.json").read_bytes()
    )
    assert can_read(metadata, arrays(spec)[0]), "the hot path is the one under test"
    for entry in store.index(spec):
        fast, slow = store.read(spec, entry.key).tokens, store.read_with_zarr(spec, entry)
        assert fast.tobytes() == slow.tobytes()
        assert (fast.shape, fast.dtype) == (slow.shape, slow.dtype)


@pytest.mark.parametrize(
    "change",
    [
        {"data_type": "float32"},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
        {"shape": [32, 12, 4]},
    ],
)
def test_other_layouts_are_left_to_zarr(tmp_path: Path, change: dict[str, object]) -> None:
    zarr_array(tmp_path / "a", PLAN)
    metadata = json.loads((tmp_path / "a" / "zarr.json").read_bytes())
    assert can_read(metadata, PLAN)
    assert not can_read(metadata | change, PLAN)


def test_crc32c_is_castagnolis() -> None:
    assert crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283  # RFC 3720, appendix B.4
    values = np.arange(10, dtype=">f4")
    assert crc32c(values) == google_crc32c.value(values.astype("<f4").tobytes())


def test_damage_to_a_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    write(path, PLAN, [np.ones((5, 3), np.float16)])
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(CorruptTokensError, match=r"truncated to 100 bytes"):
        open_shard(path, PLAN)
    path.write_bytes(whole[:-2] + b"xx")
    with pytest.raises(CorruptTokensError, match=r"index fails its checksum"):
        open_shard(path, PLAN)
    path.write_bytes(whole[10:])  # the beginning is lost, the index is whole: the caller's checksum
    assert crc32c(open_shard(path, PLAN).read(0, 5)) != crc32c(np.ones((5, 3), np.float16))
    path.write_bytes(whole)
    with pytest.raises(CorruptTokensError, match=r"lacks a chunk"):
        open_shard(path, PLAN).read(1, 5)


def _sum_all(store: TokenStore, spec: TokenSpec, keys: list[str]) -> float:
    return sum(float(store.read(spec, key).tokens.astype(np.float64).sum()) for key in keys)


def test_threads_forks_and_spawned_workers_read_the_same(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    spec, store = specs["video"], TokenStore.open_or_create(tmp_path / "s")
    store.commit(spec, [make_clip(spec, str(i)) for i in range(30)], {})
    keys = [key_of(str(i)) for i in range(30)]
    expected = _sum_all(store, spec, keys)  # also opens the shard before any fork
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: _sum_all(store, spec, keys), range(8))) == {expected}
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as workers:
            found = workers.starmap(_sum_all, [(store, spec, keys)] * 2)
        assert found == [expected] * 2
    assert pickle.loads(pickle.dumps(store)).root == store.root


def test_only_some_shards_stay_open(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache.store._max_open_shards", lambda: 2)
    spec, store = specs["video"], TokenStore.open_or_create(tmp_path / "s")
    for i in range(5):
        store.commit(spec, [make_clip(spec, str(i))], {})
    for i in [0, 1, 2, 3, 4, 0]:
        clip = make_clip(spec, str(i))
        assert clip.tokens is not None
        assert store.read(spec, clip.key).tokens.tobytes() == clip.tokens.tobytes()
        assert len(store._shards) <= 2


def test_what_is_absent_or_past_the_end_of_a_clip_takes_no_space(tmp_path: Path) -> None:
    index_bytes = CLIPS_PER_SHARD * 3 * 16 + 4
    write(tmp_path / "none", PLAN, [None] * 3)
    assert (tmp_path / "none").stat().st_size == index_bytes
    write(tmp_path / "one", PLAN, [None, np.ones((5, 3), np.float16)])  # two chunks of three
    assert (tmp_path / "one").stat().st_size == 2 * (4 * 3 * 2 + 4) + index_bytes
