"""The store: read back, open format, exactly-once, faults caused on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import zarr

from cache import layout
from cache.commit import ClipTokens, Status, unit_ids
from cache.errors import (
    CacheMissError,
    CorruptTokensError,
    SchemaError,
    SpecMismatchError,
    StoreError,
)
from cache.layout import CLIPS_PER_SHARD
from cache.spec import TokenSpec
from cache.store import TokenStore
from cache.writer import is_storable
from tests.conftest import key_of, make_clip
from tests.processes import clean_context

Specs = dict[str, TokenSpec]
PROVENANCE = {"torch": "0"}


def unit(spec: TokenSpec, names: str) -> list[ClipTokens]:
    return [make_clip(spec, name, n_audio=40 + i) for i, name in enumerate(names)]


@pytest.mark.parametrize("stream", ["audio", "video", "image"])
def test_what_is_committed_reads_back_byte_equal(tmp_path: Path, specs: Specs, stream: str) -> None:
    spec, store = specs[stream], TokenStore.open_or_create(tmp_path / "s")
    clips = unit(spec, "abc")
    store.commit(spec, clips, PROVENANCE)
    for reader in (store, TokenStore.open(tmp_path / "s")):
        for clip in clips:
            stored = reader.read(spec, clip.key)
            assert clip.tokens is not None
            assert stored.tokens.tobytes() == clip.tokens.tobytes()
            assert stored.tokens.dtype == np.float16
            index, times = reader.frame_times(spec, stored.entry.row)
            assert tuple(index) == clip.frame_index
            assert tuple(times) == clip.frame_pts_s


def test_a_stranger_reads_it_with_plain_zarr(tmp_path: Path, specs: Specs) -> None:
    spec, store = specs["audio"], TokenStore.open_or_create(tmp_path / "s")
    clips = unit(spec, "abc")
    store.commit(spec, clips, PROVENANCE)
    script = f"""
import zarr
group = zarr.open_group({str(tmp_path / "s" / "tokens.zarr")!r}, mode="r")
name, = group.keys()
audio = group[name]
row = [bytes(digest).hex() for digest in audio["clip"][:]].index({clips[1].key!r})
assert audio["status"][row] == 0
tokens = audio["tokens"][row, : audio["valid_len"][row]]
print(tokens.shape, tokens.dtype, tokens.tobytes().hex())
assert audio.attrs["emocache"]["spec"]["stream"] == "audio"
"""
    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    ).stdout  # fmt: skip
    assert clips[1].tokens is not None
    assert shown.split()[-1] == clips[1].tokens.tobytes().hex()


def test_status_is_a_field_and_absent_or_failed_never_read_as_zeros(
    tmp_path: Path, specs: Specs
) -> None:
    spec, store = specs["video"], TokenStore.open_or_create(tmp_path / "s")
    store.commit(
        spec,
        [
            make_clip(spec, "ok"),
            ClipTokens(key_of("none"), Status.ABSENT),
            ClipTokens(key_of("bad"), Status.FAILED, reason="no key frame"),
        ],
        PROVENANCE,
    )
    with pytest.raises(CacheMissError, match=r"video stream is absent"):
        store.read(spec, key_of("none"))
    with pytest.raises(
        CacheMissError, match=r"demo/7: the video stream is failed \(no key frame\)"
    ):
        store.read(spec, key_of("bad"), uid="demo/7")
    with pytest.raises(CacheMissError, match=r"no committed video tokens .*emocache extract"):
        store.read(spec, key_of("never"))
    group = zarr.open_group(tmp_path / "s" / layout.group(spec), mode="r")
    assert group["status"][:4].tolist() == [0, 1, 2, -1]  # type: ignore[index, union-attr]


def test_the_same_unit_twice_is_one_commit(tmp_path: Path, specs: Specs) -> None:
    spec = specs["image"]
    first, second = (TokenStore.open_or_create(tmp_path / "s") for _ in range(2))
    a = first.commit(spec, unit(spec, "ab"), PROVENANCE)
    b = second.commit(spec, unit(spec, "ab"), {"torch": "other"})
    assert a == b
    assert len(unit_ids(first.storage, spec.spec_id)) == 1


def test_a_retry_replaces_a_failure_and_nothing_else(tmp_path: Path, specs: Specs) -> None:
    spec, store = specs["image"], TokenStore.open_or_create(tmp_path / "s")
    failed = ClipTokens(key_of("a"), Status.FAILED, reason="disk")
    store.commit(spec, [failed, make_clip(spec, "b")], PROVENANCE)
    after = store.index(spec).failed_in(key_of("a"))
    store.commit(spec, [make_clip(spec, "a")], PROVENANCE, after)
    for opened in (store, TokenStore.open(tmp_path / "s")):
        assert opened.entry(spec, key_of("a")).status is Status.OK
        assert opened.entry(spec, key_of("b")).row == 1


def test_specs_are_resolved_or_the_differences_are_named(tmp_path: Path, specs: Specs) -> None:
    spec, store = specs["image"], TokenStore.open_or_create(tmp_path / "s")
    with pytest.raises(CacheMissError, match=r"holds no image tokens"):
        store.resolve(spec)
    store.commit(spec, unit(spec, "a"), PROVENANCE)
    open_spec = spec.model_copy(
        update={"encoder": spec.encoder.model_copy(update={"weights_sha256": None})}
    )
    assert store.resolve(open_spec) == spec
    other = spec.model_copy(update={"decode_policy": 2})
    with pytest.raises(SpecMismatchError, match=r"decode_policy: 2 wanted, 1 stored"):
        store.resolve(other)
    store.commit(spec.with_weights("cd" * 32), unit(spec, "a"), PROVENANCE)
    with pytest.raises(SpecMismatchError, match=r"2 stored image specs fit, of different weights"):
        store.resolve(open_spec)


def test_the_golden_probe_catches_other_numbers(tmp_path: Path, specs: Specs) -> None:
    store = TokenStore.open_or_create(tmp_path / "s")
    store.check_probe(specs["audio"], [1.0, -0.5])
    store.check_probe(specs["audio"], [1.001, -0.501])
    with pytest.raises(SpecMismatchError, match=r"answers the fixed input differently"):
        store.check_probe(specs["audio"], [1.0, -0.4])
    with pytest.raises(SpecMismatchError, match=r"answers the fixed input differently"):
        store.check_probe(specs["audio"], [float("nan"), -0.5])


class TestRefusals:
    def test_a_foreign_folder_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(StoreError, match=r"not empty and not an emocache store"):
            TokenStore.open_or_create(tmp_path)
        with pytest.raises(StoreError, match=r"not an emocache store"):
            TokenStore.open(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_missing_store(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"no such store"):
            TokenStore.open(tmp_path / "none")

    def test_a_newer_format(self, tmp_path: Path) -> None:
        TokenStore.open_or_create(tmp_path / "s")
        (tmp_path / "s" / layout.MARKER).write_text('{"format": "emocache-store", "version": 2}')
        with pytest.raises(StoreError, match=r"store format 2, this version reads up to 1"):
            TokenStore.open(tmp_path / "s")

    def test_edited_metadata(self, tmp_path: Path, specs: Specs) -> None:
        spec, store = specs["image"], TokenStore.open_or_create(tmp_path / "s")
        store.commit(spec, unit(spec, "a"), PROVENANCE)
        path = tmp_path / "s" / layout.group(spec) / "zarr.json"
        path.write_text(path.read_text().replace('"depth": 4', '"depth": 5'))
        with pytest.raises(StoreError, match=r"does not hash to its spec_id"):
            _ = TokenStore.open(tmp_path / "s").specs

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (np.zeros((16, 4, 95), np.float16), "tokens of shape"),
            (np.zeros((15, 4, 96), np.float16), "tokens of shape"),
            (np.full((16, 4, 96), np.nan, np.float16), "NaN or infinity"),
            (np.full((16, 4, 96), 1e6, np.float32), "NaN or infinity as float16"),
        ],
    )
    def test_wrong_tokens(
        self, tmp_path: Path, specs: Specs, tokens: np.ndarray, message: str
    ) -> None:
        spec, store = specs["video"], TokenStore.open_or_create(tmp_path / "s")
        bad = ClipTokens(key_of("x"), Status.OK, tokens)
        with pytest.raises(CorruptTokensError, match=message):
            store.commit(spec, [make_clip(spec, "a"), bad], PROVENANCE)
        assert not len(store.index(spec))

    def test_too_many_clips(self, tmp_path: Path, specs: Specs) -> None:
        store = TokenStore.open_or_create(tmp_path / "s")
        clips = [ClipTokens(key_of(str(i)), Status.ABSENT) for i in range(CLIPS_PER_SHARD + 1)]
        with pytest.raises(StoreError, match=r"1 to 32 distinct clips"):
            store.commit(specs["video"], clips, PROVENANCE)


def test_a_damaged_commit_record_is_named(tmp_path: Path, specs: Specs) -> None:
    spec, store = specs["video"], TokenStore.open_or_create(tmp_path / "s")
    store.commit(spec, unit(spec, "a"), PROVENANCE)
    (path,) = (tmp_path / "s" / layout.commits(spec.spec_id)).glob("*.json")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(SchemaError, match=r"\.json: not a JSON document"):
        TokenStore.open(tmp_path / "s").index(spec)


def test_shape_metadata_that_lost_a_race_hides_nothing(tmp_path: Path, specs: Specs) -> None:
    spec, store = specs["video"], TokenStore.open_or_create(tmp_path / "s")
    store.commit(spec, unit(spec, "ab"), PROVENANCE)
    store.commit(spec, unit(spec, "cd"), PROVENANCE)
    path = tmp_path / "s" / layout.group(spec) / "tokens" / "zarr.json"
    metadata = json.loads(path.read_bytes())
    metadata["shape"][0] = CLIPS_PER_SHARD  # as a killed writer with an older view leaves it
    path.write_text(json.dumps(metadata))
    assert TokenStore.open(tmp_path / "s").read(spec, key_of("d")).tokens.shape == (16, 4, 96)
    TokenStore.open(tmp_path / "s").commit(spec, unit(spec, "e"), PROVENANCE)
    assert json.loads(path.read_bytes())["shape"][0] >= 3 * CLIPS_PER_SHARD


def test_a_store_written_by_hand_is_read(tmp_path: Path, specs: Specs) -> None:
    """The seam from the other side: zarr and json alone, as docs/store.md says."""
    spec, root = specs["audio"], tmp_path / "s"
    (root / "commits" / spec.spec_id).mkdir(parents=True)
    (root / "store.json").write_text('{"format": "emocache-store", "version": 1}')
    group = zarr.open_group(root / "tokens.zarr", mode="w", zarr_format=3).create_group(
        f"audio-{spec.spec_id}",
        attributes={
            "emocache": {"spec_id": spec.spec_id, "spec": json.loads(spec.model_dump_json())}
        },
    )
    tokens = np.arange(3 * 64, dtype="<f2").reshape(3, 64)
    array = group.create_array("tokens", shape=(2, 1500, 64), chunks=(1, 1500, 64), dtype="f2")
    array[1, :3] = tokens
    (root / "commits" / spec.spec_id / "u1.json").write_text(
        json.dumps(
            {
                "schema_version": 1,
                "unit_id": "u1",
                "spec_id": spec.spec_id,
                "shard": 0,
                "created": "2026-11-20T12:00:00+00:00",
                "provenance": {"torch": "2.15.0"},
                "n_bytes": 4096,
                "clips": [
                    {"key": key_of("b"), "row": 0, "status": "failed", "valid_len": 0,
                     "reason": "by hand"},
                    {"key": key_of("a"), "row": 1, "status": "ok", "valid_len": 3,
                     "crc32c": google_crc32c.value(tokens.tobytes())},
                ],
            }
        )
    )  # fmt: skip
    store = TokenStore.open(root)
    assert list(store.specs.values()) == [spec]
    np.testing.assert_array_equal(store.read(spec, key_of("a")).tokens, tokens)
    assert store.entry(spec, key_of("b")).reason == "by hand"


def _create(root: Path, barrier: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    TokenStore.open_or_create(root)


def test_workers_that_create_a_store_at_once_all_succeed(tmp_path: Path) -> None:
    context = clean_context()
    for attempt in range(10):
        barrier = context.Barrier(4)
        workers = [
            context.Process(target=_create, args=(tmp_path / str(attempt), barrier))
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
            assert worker.exitcode == 0
        assert TokenStore.open(tmp_path / str(attempt)).specs == {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_storable_is_what_numpy_calls_finite(specs: Specs, dtype: str) -> None:
    spec = specs["audio"].model_copy(update={"dtype": dtype})
    stored = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for value in (0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, -np.nan,
                  float(ml_dtypes.finfo(stored).max), float(ml_dtypes.finfo(stored).min)):  # fmt: skip
        tokens = np.ones((3, 4), stored)
        tokens[1, 2] = value
        assert is_storable(tokens, spec) == np.isfinite(value), value
    assert not is_storable(np.full((1, 1), 1e39), spec)
