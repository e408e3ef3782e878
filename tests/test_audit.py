"""Damage caused on purpose: `verify` names it with a cure, `doctor` rebuilds what is derived."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import google_crc32c
import ml_dtypes
import numpy as np
import pytest
import zarr

from cache import layout
from cache.audit import DoctorReport, VerifyReport, doctor, doctor_open, verify
from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import EmocacheError, StoreError
from cache.layout import CLIPS_PER_SHARD
from cache.manifest import Manifest
from cache.spec import TokenSpec
from cache.storage import LocalStorage
from cache.store import TokenStore
from extract.encoders.bank import EncoderBank
from extract.index import index_folder
from extract.plan import make_plan
from extract.recheck import recheck
from extract.run import extract
from tests.conftest import key_of, make_clip
from tests.media import write_clip
from tests.object_store import environment, make_bucket, moto_server
from tests.processes import clean_context

Specs = dict[str, TokenSpec]
PROVENANCE = {"torch": "0"}
UNITS = ("ab", "cde")


def unit(spec: TokenSpec, names: str) -> list[ClipTokens]:
    return [make_clip(spec, name, n_audio=40 + 30 * i) for i, name in enumerate(names)]


def build(root: Path, *specs: TokenSpec, **options: str) -> Path:
    """Make a store of two units per spec, with snapshot and probe."""
    store = TokenStore.open_or_create(root, **options)  # type: ignore[arg-type]
    for spec in specs:
        for names in UNITS:
            store.commit(spec, unit(spec, names), PROVENANCE)
        store.write_snapshot(spec)
        store.check_probe(spec, [0.5, -1.0])
    store.close()
    return root


def assert_reads_byte_equal(root: Path, *specs: TokenSpec) -> None:
    store = TokenStore.open(root)
    for spec in specs:
        for clip in (clip for names in UNITS for clip in unit(spec, names)):
            assert clip.tokens is not None
            assert store.read(spec, clip.key).tokens.tobytes() == clip.tokens.tobytes()


def listing(root: Path) -> dict[str, tuple[int, int]]:
    return {
        path.relative_to(root).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
    }


def content(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def summary(report: VerifyReport) -> list[tuple[str, str]]:
    return [(finding.severity, finding.what) for finding in report.findings]


def examined(root: Path, records: list[Record] | None = None) -> VerifyReport:
    return verify(doctor_open(root), records)


def treated(root: Path, specs: tuple[TokenSpec, ...] = ()) -> DoctorReport:
    return doctor(doctor_open(root), specs=specs)


# ------------------------------------------------------------------------------ ways of damage


def flip(path: Path, place: int | float = 0.5) -> None:
    """Flip the lowest bit of a byte, given as an index or as a share of the length."""
    data = bytearray(path.read_bytes())
    at = int(place * len(data)) if isinstance(place, float) else place
    data[at] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def edit(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def forge(path: Path, change: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    """Edit a commit record of the time before these had checksums."""
    edit(path, lambda document: (document.pop("checksum"), change(document)))


def group(root: Path, spec: TokenSpec) -> Path:
    return root / layout.group(spec)


def chunk(root: Path, spec: TokenSpec, array: str, number: int = 0) -> Path:
    (plan,) = (plan for plan in layout.arrays(spec) if plan.name == array)
    return group(root, spec) / array / plan.chunk_file(number)


def record(root: Path, spec: TokenSpec, shard: int = 0) -> Path:
    for path in (root / layout.commits(spec.spec_id)).glob("*.json"):
        if json.loads(path.read_bytes()).get("shard", 0) == shard:
            return path
    raise AssertionError("no such unit")


def snapshot(root: Path, spec: TokenSpec) -> Path:
    (path,) = (root / layout.snapshots(spec.spec_id)).iterdir()
    return path


Damage = Callable[[Path, TokenSpec], object]
DERIVED: dict[str, Damage] = {
    "store.json lost": lambda r, s: (r / "store.json").unlink(),
    "store.json cut": lambda r, s: truncate(r / "store.json"),
    "store.json flipped": lambda r, s: flip(r / "store.json", 3),
    "root zarr.json lost": lambda r, s: (r / "tokens.zarr" / "zarr.json").unlink(),
    "root zarr.json cut": lambda r, s: truncate(r / "tokens.zarr" / "zarr.json"),
    "root zarr.json flipped": lambda r, s: flip(r / "tokens.zarr" / "zarr.json", 5),
    "tokens/zarr.json lost": lambda r, s: (group(r, s) / "tokens" / "zarr.json").unlink(),
    "tokens/zarr.json cut": lambda r, s: truncate(group(r, s) / "tokens" / "zarr.json"),
    "tokens/zarr.json other dtype": lambda r, s: edit(
        group(r, s) / "tokens" / "zarr.json", lambda d: d.update(data_type="float32")
    ),
    "tokens/zarr.json without codecs": lambda r, s: edit(
        group(r, s) / "tokens" / "zarr.json", lambda d: d.pop("codecs")
    ),
    "status/zarr.json lost": lambda r, s: (group(r, s) / "status" / "zarr.json").unlink(),
    "clip/zarr.json other fill": lambda r, s: edit(
        group(r, s) / "clip" / "zarr.json", lambda d: d.update(fill_value=7)
    ),
    "length that lost a race": lambda r, s: edit(
        group(r, s) / "valid_len" / "zarr.json", lambda d: d["shape"].__setitem__(0, 32)
    ),
    "group attribute lost": lambda r, s: edit(
        group(r, s) / "zarr.json", lambda d: d["attributes"]["emocache"].pop("spec_id")
    ),
    "group made an array": lambda r, s: edit(
        group(r, s) / "zarr.json", lambda d: d.update(node_type="array")
    ),
    "valid_len lost": lambda r, s: chunk(r, s, "valid_len").unlink(),
    "valid_len cut": lambda r, s: truncate(chunk(r, s, "valid_len")),
    "status flipped": lambda r, s: flip(chunk(r, s, "status"), 0),
    "clip flipped": lambda r, s: flip(chunk(r, s, "clip"), 40),
    "clip never reached the disk": lambda r, s: chunk(r, s, "clip", 1).write_bytes(b""),
    "status edited by hand": lambda r, s: zarr.open_group(group(r, s), mode="r+")[  # type: ignore[index]
        "status"
    ].__setitem__(0, 2),
    "claims lost": lambda r, s: shutil.rmtree(r / "claims"),
    "snapshot cut": lambda r, s: truncate(snapshot(r, s)),
    "snapshot empty": lambda r, s: snapshot(r, s).write_bytes(b""),
    "snapshot flipped": lambda r, s: flip(snapshot(r, s)),
}  # fmt: skip
DAMAGE: dict[str, tuple[Damage, str]] = {
    "shard flipped": (lambda r, s: flip(chunk(r, s, "tokens"), 0.3), r"Restore .*/tokens/c/0/"),
    "shard index flipped": (lambda r, s: flip(chunk(r, s, "tokens"), -20), r"Restore .*/tokens/c/0/"),
    "shard cut": (lambda r, s: truncate(chunk(r, s, "tokens")), r"Restore .*/tokens/c/0/"),
    "shard empty": (lambda r, s: chunk(r, s, "tokens").write_bytes(b""), r"Restore .*/tokens/c/0/"),
    "shard lost": (lambda r, s: chunk(r, s, "tokens").unlink(), r"Restore .*/tokens/c/0/"),
    "frame_pts_s flipped": (lambda r, s: flip(chunk(r, s, "frame_pts_s")), r"Restore .*/frame_pts_s/c/0"),
    "frame_index lost": (lambda r, s: chunk(r, s, "frame_index").unlink(), r"Restore .*/frame_index/c/0"),
    "record cut": (lambda r, s: truncate(record(r, s)), r"Restore .*/commits/.*\.json"),
    "record flipped": (lambda r, s: flip(record(r, s), 1), r"Restore .*/commits/.*\.json"),
    "record lost": (lambda r, s: record(r, s).unlink(), r"Restore .*/commits/"),
    "record edited": (
        lambda r, s: edit(record(r, s), lambda d: d["clips"][1].update(key="0" * 64)),
        r"Restore .*/commits/.*\.json"),
    "record renamed": (lambda r, s: record(r, s).rename(record(r, s).with_name("other.json")),
                       r"Restore .*/commits/.*\.json"),
    "record of another checksum": (
        lambda r, s: forge(record(r, s), lambda d: d["clips"][1].update(crc32c=5)),
        r"Restore .*/commits/.*\.json"),
    "record of another length": (
        lambda r, s: forge(record(r, s), lambda d: d["clips"][1].update(valid_len=15)),
        r"Restore .*/commits/.*\.json"),
    "record of another row": (
        lambda r, s: forge(record(r, s), lambda d: d["clips"][1].update(row=40)),
        r"Restore .*/commits/.*\.json"),
    "record of another clip": (
        lambda r, s: forge(record(r, s), lambda d: d["clips"][1].update(key="0" * 64)),
        r"Compare both with a copy"),
    "probe cut": (lambda r, s: truncate(r / layout.probe(s.spec_id)), r"Restore .*or remove it"),
    "group zarr.json lost": (lambda r, s: (group(r, s) / "zarr.json").unlink(),
                             r"Restore .*/zarr\.json .*preset"),
    "group zarr.json flipped": (
        lambda r, s: edit(group(r, s) / "zarr.json",
                          lambda d: d["attributes"]["emocache"]["spec"].update(grid=3)),
        r"Restore .*/zarr\.json .*preset"),
    "tokens.zarr not copied": (lambda r, s: shutil.rmtree(group(r, s)), r"not complete: copy tokens\.zarr"),
    "shards not copied": (lambda r, s: shutil.rmtree(group(r, s) / "tokens" / "c"),
                          r"not complete: copy tokens\.zarr"),
}  # fmt: skip


NEEDS_READING = {
    "shard flipped", "shard index flipped", "shard cut", "shard empty", "frame_pts_s flipped",
    "frame_index lost", "record of another checksum",
}  # fmt: skip
"""What `doctor` does not see, since it reads no tokens."""


@pytest.fixture
def root(tmp_path: Path, specs: Specs) -> Path:
    return build(tmp_path / "s", specs["video"])


# ------------------------------------------------------------------------------ verify


def test_a_sound_store_has_no_findings(tmp_path: Path, specs: Specs) -> None:
    root = build(tmp_path / "s", *specs.values())
    calls: list[None] = []
    report = verify(TokenStore.open(root), on_clip=lambda: calls.append(None))
    assert summary(report) == []
    assert report.is_whole
    assert (report.n_specs, report.n_units, report.n_clips, len(calls)) == (3, 6, 15, 15)
    wanted = 0
    for spec in specs.values():
        for clip in (clip for names in UNITS for clip in unit(spec, names)):
            assert clip.tokens is not None
            n = clip.tokens.nbytes
            second = 50 * 64 * 2  # audio is stored in stretches of 50 tokens, each with a checksum
            wanted += -(-n // second) * (second + 4) if spec.stream == "audio" else n + 4
    assert report.n_bytes == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_other_dtypes_and_compression(
    tmp_path: Path, specs: Specs, dtype: str, compression: str
) -> None:
    spec = specs["audio"].model_copy(update={"dtype": dtype})
    made = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, np.float32)
    store = TokenStore.open_or_create(tmp_path / "s", compression=compression)  # type: ignore[arg-type]
    clips = [replace(c, tokens=c.tokens.astype(made)) for c in unit(specs["audio"], "abc")]  # type: ignore[union-attr]
    store.commit(spec, clips, PROVENANCE)
    assert summary(examined(tmp_path / "s")) == []
    flip(chunk(tmp_path / "s", spec, "tokens"), 0.4)
    (finding,) = examined(tmp_path / "s").findings
    assert finding.severity == "damage"


def test_scales_belong_to_the_tokens(tmp_path: Path, specs: Specs) -> None:
    spec = specs["video"].model_copy(update={"dtype": "int8"})
    clips = [replace(clip, tokens=clip.tokens.astype(np.float32)) for clip in unit(specs["video"], "ab")]  # type: ignore[union-attr]  # fmt: skip
    TokenStore.open_or_create(tmp_path / "s").commit(spec, clips, PROVENANCE)
    flip(chunk(tmp_path / "s", spec, "token_scale"), 9)
    (finding,) = examined(tmp_path / "s").findings
    assert (finding.severity, "token_scale" in finding.cure) == ("damage", True)


@pytest.mark.parametrize("name", DERIVED)
def test_what_is_derived_is_named_repaired_and_then_whole(
    root: Path, specs: Specs, name: str
) -> None:
    spec = specs["video"]
    before = content(root)
    DERIVED[name](root, spec)
    report = examined(root)
    assert {finding.severity for finding in report.findings} == {"derived"}, summary(report)
    assert all(f"doctor {root}" in finding.cure for finding in report.findings)
    assert report.n_clips == 5, "tokens are read all the same"

    damaged = content(root)
    forecast = doctor(doctor_open(root), dry_run=True)
    assert content(root) == damaged
    done = treated(root)
    assert (done.repaired, done.remaining) == (forecast.repaired, [])
    assert done.repaired == report.findings

    assert summary(verify(TokenStore.open(root))) == []
    assert_reads_byte_equal(root, spec)
    after = content(root)
    assert after.keys() == before.keys()
    same = {key for key in before if not key.endswith("zarr.json") and not key.startswith("claims")}
    same -= {layout.MARKER}
    assert all(after[key] == before[key] for key in same)
    n_files = listing(root)
    assert treated(root) == DoctorReport()
    assert listing(root) == n_files, "a second run writes nothing"


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_with_its_cure_and_not_repaired(
    root: Path, specs: Specs, name: str
) -> None:
    cause, cure = DAMAGE[name]
    cause(root, specs["video"])
    report = examined(root)
    found = [finding for finding in report.findings if finding.severity == "damage"]
    # Beside the damage itself, a snapshot or an array may contradict it.
    assert {f.severity for f in report.findings} <= {"damage", "derived"}, summary(report)
    assert any(re.search(cure, finding.cure) for finding in found), summary(report)
    assert all(str(root) in finding.what for finding in found)
    assert not report.is_whole
    before = content(root)
    done = treated(root)
    assert done.repaired == []
    assert content(root) == before
    if name not in NEEDS_READING:
        assert done.remaining == report.findings


def test_damage_in_one_place_does_not_hide_the_rest(tmp_path: Path, specs: Specs) -> None:
    root = build(tmp_path / "s", *specs.values())
    truncate(record(root, specs["audio"]))
    chunk(root, specs["video"], "tokens").unlink()
    flip(chunk(root, specs["video"], "tokens", 1), 100)
    (group(root, specs["image"]) / "zarr.json").unlink()
    report = examined(root)
    assert report.count("damage") == 4, summary(report)
    assert {finding.spec_id for finding in report.findings} == {s.spec_id for s in specs.values()}
    assert report.n_clips == 3 + 3


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_any_flipped_bit_of_a_shard_is_found(
    tmp_path: Path, specs: Specs, compression: str
) -> None:
    """Values, checksums, index and the padding of a sound's last second; gaps hold nothing."""
    spec = specs["audio"]
    root = build(tmp_path / "s", spec, compression=compression)
    shard = chunk(root, spec, "tokens")
    whole = shard.read_bytes()
    n_index = CLIPS_PER_SHARD * 30 * 16 + 4
    index = np.frombuffer(whole[-n_index:-4], "<u8").reshape(-1, 2)
    used = np.zeros(len(whole), np.bool_)
    used[-n_index:] = True
    for start, length in index[index[:, 0] != 2**64 - 1].tolist():
        used[start : start + length] = True
    places = np.flatnonzero(used)
    for at in [*places[:: len(places) // 40].tolist(), len(whole) - 1]:
        flip(shard, at)
        assert examined(root).count("damage") == 1, at
        shard.write_bytes(whole)
    assert examined(root).is_whole


WAYS: dict[str, Callable[[Path], object]] = {
    "lost": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": truncate,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "first bit": lambda path: flip(path, 0),
    "early bit": lambda path: flip(path, 0.2),
    "middle bit": lambda path: flip(path, 0.5),
    "late bit": lambda path: flip(path, 0.9),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_file_damaged_in_every_way(tmp_path: Path, specs: Specs, way: str) -> None:
    """No damage stops the inspection; what it and the doctor leave without a finding reads right."""
    spec = specs["audio"]
    sound = build(tmp_path / "s", spec)
    for name in content(sound):
        root = tmp_path / "copy"
        shutil.copytree(sound, root)
        WAYS[way](root / name)
        found = examined(root)
        assert all(finding.cure for finding in found.findings)
        done = treated(root)
        assert treated(root).repaired == [], (name, "the second run has nothing to do")
        after = examined(root)
        repairable = {finding.what for finding in done.repaired}
        assert not repairable & {finding.what for finding in after.findings}, name
        if after.is_whole:
            assert_reads_byte_equal(root, spec)
        else:
            assert found.count("damage"), (name, summary(after))
        shutil.rmtree(root)


def test_a_truncated_shard_says_by_how_much(root: Path, specs: Specs) -> None:
    path = chunk(root, specs["video"], "tokens")
    n_bytes = path.stat().st_size
    truncate(path)
    (finding,) = examined(root).findings
    assert f"truncated to {n_bytes // 2} bytes of {n_bytes}; it holds 2 clips" in finding.what


def test_tokens_that_are_not_finite(
    tmp_path: Path, specs: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specs["video"]
    monkeypatch.setattr("cache.writer.is_storable", lambda *_: True)
    bad = np.zeros(spec.max_shape, np.float16)
    bad[3, 2, 1] = np.inf
    clips = [make_clip(spec, "a"), ClipTokens(key_of("b"), Status.OK, bad, frame_index=(0,) * 16)]
    clips[1] = replace(clips[1], frame_pts_s=(0.0,) * 16)
    TokenStore.open_or_create(tmp_path / "s").commit(spec, clips, PROVENANCE)
    (finding,) = examined(tmp_path / "s").findings
    assert "NaN or infinity: 1 of 2 clips" in finding.what
    assert "Encode these clips again" in finding.cure


def test_leftovers_of_killed_writers_are_garbage(root: Path, specs: Specs) -> None:
    spec = specs["video"]
    store = TokenStore.open(root)
    store.commit(spec, unit(spec, "f"), PROVENANCE)
    record(root, spec, shard=2).unlink()  # killed before the record
    (group(root, spec) / "tokens" / ".x.1-abc.partial").write_bytes(b"half")
    shutil.rmtree(root / layout.snapshots(spec.spec_id))
    report = examined(root)
    assert [finding.severity for finding in report.findings] == ["garbage", "garbage"]
    assert all(f"store gc {root}" in finding.cure for finding in report.findings)
    assert report.is_whole
    assert treated(root).repaired == []


def test_a_copy_that_lacks_the_records_is_not_called_garbage(root: Path, specs: Specs) -> None:
    shutil.rmtree(root / "commits")
    shutil.rmtree(root / "claims")
    shutil.rmtree(root / "snapshots")
    (finding,) = examined(root).findings
    assert (finding.severity, "copy commits/ and claims/ again" in finding.cure) == (
        "missing",
        True,
    )


def test_claims_without_records_ask_whether_it_is_a_copy(root: Path, specs: Specs) -> None:
    shutil.rmtree(root / "commits")
    shutil.rmtree(root / "snapshots")
    (finding,) = examined(root).findings
    assert "If this store is a copy, make sure first that all of commits/ was" in finding.what


def test_replaced_units_are_not_read_and_their_shards_are_garbage(root: Path, specs: Specs) -> None:
    spec, store = specs["video"], TokenStore.open(root)
    old = [commit.unit_id for commit in store.commits(spec)]
    store.commit(spec, unit(spec, "ab") + unit(spec, "cde"), PROVENANCE, old, old)
    flip(chunk(root, spec, "tokens", 0))
    report = examined(root)
    assert [finding.severity for finding in report.findings] == ["garbage"]
    assert (report.n_units, report.n_clips) == (1, 5)
    store.write_snapshot(spec)
    for number in (0, 1):
        record(root, spec, number).unlink()
        for plan in layout.arrays(spec):
            chunk(root, spec, plan.name, number).unlink()
    report = examined(root)
    assert [finding.severity for finding in report.findings] == ["derived"]
    assert "out of date" in report.findings[0].what
    assert len(treated(root).repaired) == 1
    assert summary(examined(root)) == []
    assert_reads_byte_equal(root, spec)


def test_verify_writes_nothing_even_where_it_could(
    root: Path, specs: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specs["video"]
    for damage in ("valid_len cut", "snapshot flipped", "claims lost", "root zarr.json lost"):
        DERIVED[damage](root, spec)
    before = listing(root)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("verify must not write")

    for name in ("create", "replace", "write", "delete"):
        monkeypatch.setattr(LocalStorage, name, refuse)
    for path in [root, *root.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)  # as on a read-only mount
    try:
        assert examined(root).count("derived") == 4
        assert listing(root) == before
    finally:
        for path in [root, *root.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


def test_a_stranger_s_layout_is_read_and_left_alone(tmp_path: Path, specs: Specs) -> None:
    """A store made with zarr and json alone: other chunks, no small arrays, no claims."""
    spec, root = specs["audio"], tmp_path / "s"
    (root / "commits" / spec.spec_id).mkdir(parents=True)
    (root / "store.json").write_text('{"format": "emocache-store", "version": 1}')
    where = zarr.open_group(root / "tokens.zarr", mode="w", zarr_format=3).create_group(
        f"audio-{spec.spec_id}",
        attributes={
            "emocache": {"spec_id": spec.spec_id, "spec": json.loads(spec.model_dump_json())}
        },
    )
    tokens = np.arange(3 * 64, dtype="<f2").reshape(3, 64)
    array = where.create_array("tokens", shape=(2, 1500, 64), chunks=(1, 1500, 64), dtype="f2")
    array[1, :3] = tokens
    entry = {"key": key_of("a"), "row": 1, "status": "ok", "valid_len": 3,
             "crc32c": google_crc32c.value(tokens.tobytes())}  # fmt: skip
    document = {"unit_id": "u1", "spec_id": spec.spec_id, "shard": 0, "created": "2026-11-20",
                "provenance": {}, "n_bytes": 1, "clips": [entry]}  # fmt: skip
    path = root / "commits" / spec.spec_id / "u1.json"
    path.write_text(json.dumps(document))
    metadata = (root / layout.group(spec) / "tokens" / "zarr.json").read_bytes()

    report = examined(root)
    assert [f.severity for f in report.findings] == ["derived"], summary(report)
    assert "not claimed" in report.findings[0].what
    assert report.n_clips == 1
    assert len(treated(root).repaired) == 1
    assert (root / layout.group(spec) / "tokens" / "zarr.json").read_bytes() == metadata
    assert summary(examined(root)) == []
    path.write_text(path.read_text().replace('"valid_len": 3', '"valid_len": 2'))
    (finding,) = examined(root).findings
    assert (finding.severity, "CRC-32C" in finding.what) == ("damage", True)


# ------------------------------------------------------------------------------ the manifest


def make_record(name: str, **facts: object) -> Record:
    clip = Clip.model_validate({"sha256": key_of(name), "n_bytes": 1, **facts})
    return Record(uid=f"c/{name}", media=f"{name}.mp4", clip=clip)


def test_clips_of_the_manifest_that_are_not_there(root: Path, specs: Specs) -> None:
    records = [make_record(name) for name in "abcxyz"]
    (finding,) = examined(root, records).findings
    assert finding.severity == "missing"
    assert "3 of 6 clips of the manifest have no video tokens" in finding.what
    assert "emocache extract" in finding.cure


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"duration_s": 2.0, "has_audio": True}, None),
        ({"duration_s": 1.95, "has_audio": True}, None),
        ({"duration_s": 1.0, "has_audio": True}, "more audio tokens"),
        ({"duration_s": 9.0, "has_audio": True}, "fewer audio tokens"),
        ({"duration_s": 9.0, "has_audio": True, "has_video": True}, None),
        ({"has_audio": False}, "the manifest says that there is no such stream"),
        ({}, None),
    ],
)
def test_lengths_against_the_manifest(
    tmp_path: Path, specs: Specs, facts: dict[str, object], expected: str | None
) -> None:
    """100 tokens are two seconds, and 1500 are the window."""
    spec, store = specs["audio"], TokenStore.open_or_create(tmp_path / "s")
    store.commit(spec, [make_clip(spec, "a", n_audio=100)], PROVENANCE)
    found = examined(tmp_path / "s", [make_record("a", **facts)]).findings
    assert [expected is not None and expected in f.what for f in found] == [True] * bool(expected)


def test_a_long_clip_fills_the_window(tmp_path: Path, specs: Specs) -> None:
    spec, store = specs["audio"], TokenStore.open_or_create(tmp_path / "s")
    store.commit(spec, [make_clip(spec, "a", n_audio=1500)], PROVENANCE)
    assert examined(tmp_path / "s", [make_record("a", duration_s=95.0)]).is_whole


def test_a_stream_that_is_absent_against_the_manifest(tmp_path: Path, specs: Specs) -> None:
    spec, store = specs["video"], TokenStore.open_or_create(tmp_path / "s")
    clips = [ClipTokens(key_of(n), Status.ABSENT) for n in "ab"]
    store.commit(spec, clips, PROVENANCE)
    records = [make_record("a", has_video=True), make_record("b", has_video=False)]
    (finding,) = examined(tmp_path / "s", records).findings
    assert "(c/a)" in finding.what
    assert "verify --deep" in finding.cure


# ------------------------------------------------------------------------------ doctor


def test_a_lost_spec_is_known_again_among_candidates(tmp_path: Path, specs: Specs) -> None:
    """Also without weights, where another spec of the store has the same."""
    root = build(tmp_path / "s", specs["video"], specs["image"])
    path = group(root, specs["video"]) / "zarr.json"
    before = path.read_bytes()
    wanted = specs["video"].model_copy(
        update={"encoder": specs["video"].encoder.model_copy(update={"weights_sha256": None})}
    )
    for candidate in (specs["video"], wanted):
        truncate(path)
        other = specs["video"].model_copy(update={"grid": 3})
        done = treated(root, (other, specs["audio"], candidate))
        assert len(done.repaired) == 1
        assert path.read_bytes() == before
        assert examined(root).is_whole
    truncate(path)
    (finding,) = treated(root, (other,)).remaining
    assert "the spec of 2 committed units" in finding.what


def test_many_repairs_at_once(tmp_path: Path, specs: Specs) -> None:
    root = build(tmp_path / "s", specs["video"])
    for name, damage in DERIVED.items():
        if name.endswith("lost"):
            damage(root, specs["video"])
    (group(root, specs["video"]) / "zarr.json").write_bytes(b"{}")
    done = treated(root, (specs["video"],))
    assert done.remaining == []
    assert len(done.repaired) > 5
    assert summary(verify(TokenStore.open(root))) == []
    assert_reads_byte_equal(root, specs["video"])
    assert treated(root) == DoctorReport()


def test_lost_claims_no_longer_lead_a_writer_onto_committed_shards(
    root: Path, specs: Specs
) -> None:
    spec = specs["video"]
    shutil.rmtree(root / "claims")
    treated(root)
    TokenStore.open(root).commit(spec, unit(spec, "new"), PROVENANCE)
    assert_reads_byte_equal(root, spec)
    assert examined(root).is_whole


def test_a_good_snapshot_outlives_a_damaged_record(root: Path, specs: Specs) -> None:
    """It may be all that is left of the record: the doctor does not replace it by a poorer one."""
    spec = specs["video"]
    truncate(record(root, spec))
    kept = snapshot(root, spec)
    (root / layout.snapshots(spec.spec_id) / "00000009-00000000.arrow").write_bytes(b"no")
    done = treated(root)
    assert done.repaired == []
    assert {finding.severity for finding in done.remaining} == {"damage", "derived"}
    assert kept.exists()


def test_a_record_that_contradicts_a_whole_array_is_not_believed(root: Path, specs: Specs) -> None:
    """Neither the record's name nor the tokens confirm the record: the arrays stay as they are."""
    spec = specs["video"]
    before = chunk(root, spec, "valid_len").read_bytes(), chunk(root, spec, "clip").read_bytes()
    forge(record(root, spec), lambda d: d["clips"][0].update(crc32c=7, key="f" * 64))
    flip(snapshot(root, spec))
    done = treated(root)
    assert any("nothing else confirms" in finding.what for finding in done.remaining)
    after = chunk(root, spec, "valid_len").read_bytes(), chunk(root, spec, "clip").read_bytes()
    assert after == before


N_BESIDE = 60


def _commit_many(root: Path, spec: TokenSpec) -> None:
    store = TokenStore.open(root)
    for number in range(N_BESIDE):
        store.commit(spec, unit(spec, chr(0x200 + number)), PROVENANCE)
        if number % 10 == 5:
            store.write_snapshot(spec)


def test_doctor_beside_a_writer_loses_nothing(root: Path, specs: Specs) -> None:
    """Damage is done and repaired again and again while another process commits."""
    spec, storage = specs["video"], LocalStorage(root)
    short = json.loads((group(root, spec) / "status" / "zarr.json").read_bytes())
    short["shape"][0] = CLIPS_PER_SHARD
    writer = clean_context().Process(target=_commit_many, args=(root, spec))
    writer.start()
    n_rounds = 0
    while writer.is_alive():
        storage.replace(f"{layout.group(spec)}/status/zarr.json", json.dumps(short).encode())
        storage.replace(f"{layout.snapshots(spec.spec_id)}/00000099-00000000.arrow", b"no")
        chunk(root, spec, "clip").unlink()
        done = treated(root)
        # The writer may have lengthened the array before the doctor looked.
        assert {"snapshots", "clip"} <= {
            word for f in done.repaired for word in ("snapshots", "clip") if word in f.what
        }
        assert done.remaining == [] or {f.severity for f in done.remaining} == {"garbage"}
        n_rounds += 1
    writer.join()
    assert writer.exitcode == 0
    assert n_rounds >= 3, "the doctor was at work beside the writer"
    treated(root)
    report = examined(root)
    assert {f.severity for f in report.findings} <= {"garbage"}, summary(report)
    assert report.n_units == len(UNITS) + N_BESIDE
    assert_reads_byte_equal(root, spec)
    store = TokenStore.open(root)
    for clip in (c for number in range(N_BESIDE) for c in unit(spec, chr(0x200 + number))):
        assert clip.tokens is not None
        assert store.read(spec, clip.key).tokens.tobytes() == clip.tokens.tobytes()


# ------------------------------------------------------------------------------ opening


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("also_metadata", [False, True])
def test_the_marker_is_written_again_with_the_right_compression(
    tmp_path: Path, specs: Specs, compression: str, also_metadata: bool
) -> None:
    spec = specs["video"]
    root = build(tmp_path / "s", spec, compression=compression)
    before = json.loads((root / "store.json").read_bytes())
    (root / "store.json").write_text("{")
    if also_metadata:
        (group(root, spec) / "tokens" / "zarr.json").unlink()
    with pytest.raises(EmocacheError, match=r"not a JSON document"):
        TokenStore.open(root)
    assert doctor(doctor_open(root)).remaining == []
    assert json.loads((root / "store.json").read_bytes()) == before
    assert_reads_byte_equal(root, spec)
    assert examined(root).is_whole


def test_what_is_no_store_stays_none(tmp_path: Path, specs: Specs) -> None:
    with pytest.raises(StoreError, match=r"no such store"):
        doctor_open(tmp_path / "none")
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"not an emocache store"):
        doctor_open(tmp_path)
    root = build(tmp_path / "s", specs["video"])
    (root / "store.json").unlink()
    edit(
        group(root, specs["video"]) / "zarr.json",
        lambda d: d["attributes"]["emocache"].update(format_version=99),
    )
    with pytest.raises(StoreError, match=r"store format 99.*Update emocache"):
        doctor_open(root)
    assert not (root / "store.json").exists()


# ------------------------------------------------------------------------------ encoding again


@pytest.fixture(scope="module")
def extracted(
    tmp_path_factory: pytest.TempPathFactory, bank: EncoderBank
) -> tuple[Path, Manifest, Path]:
    folder = tmp_path_factory.mktemp("media")
    for seed in range(3):
        write_clip(folder / f"clip{seed}.mp4", seed=seed)
    manifest, _ = index_folder(folder, folder / "m.parquet")
    root = tmp_path_factory.mktemp("store") / "s"
    store = TokenStore.open_or_create(root)
    plan = make_plan(manifest.records, bank.specs, store)
    extract(plan, manifest.records, bank, store, folder)
    return folder, manifest, root


def test_extracted_clips_agree_with_their_manifest(
    extracted: tuple[Path, Manifest, Path],
) -> None:
    _, manifest, root = extracted
    report = examined(root, list(manifest.records))
    assert summary(report) == []
    assert report.n_clips == 9


def test_encoding_again_gives_the_same(
    extracted: tuple[Path, Manifest, Path], bank: EncoderBank
) -> None:
    folder, manifest, root = extracted
    store = TokenStore.open(root)
    found = recheck(store, manifest.records, bank, folder, 2, seed=1)
    assert [(r.passed, r.reason) for r in found] == [(True, None)] * 6
    assert len({r.uid for r in found}) == 2
    assert {r.stream for r in found} == {"audio", "video", "image"}
    assert all(r.relative_l2 is not None and r.relative_l2 <= 1e-3 for r in found)
    again = recheck(store, manifest.records[::-1], bank, folder, 2, seed=1)
    assert [r.uid for r in again] == [r.uid for r in found]
    everything = recheck(store, manifest.records, bank, folder, 99)
    assert {r.uid for r in everything} == {record.uid for record in manifest.records}


def test_wrong_tokens_and_changed_files_do_not_pass(
    extracted: tuple[Path, Manifest, Path], bank: EncoderBank, tmp_path: Path
) -> None:
    folder, manifest, root = extracted
    source, store = TokenStore.open(root), TokenStore.open_or_create(tmp_path / "s")
    a, b, c = manifest.records
    audio = bank.specs[0]
    swapped = source.read(audio, b.clip.sha256).tokens
    clips = [source.clip_tokens(audio, source.entry(audio, r.clip.sha256)) for r in (a, c)]
    store.commit(audio, [replace(clips[0], tokens=swapped), clips[1]], PROVENANCE)
    found = {r.uid: r for r in recheck(store, manifest.records, bank, folder, 3)}
    assert found.keys() == {a.uid, c.uid}, "only what is stored is compared"
    assert found[c.uid].passed
    assert not found[a.uid].passed
    # By hand: both clips' tokens were read back above.
    right = source.read(audio, a.clip.sha256).tokens.astype(np.float64)
    wrong = swapped.astype(np.float64)
    expected = np.linalg.norm(right - wrong) / np.linalg.norm(wrong)
    assert found[a.uid].relative_l2 == pytest.approx(expected, rel=1e-2)
    assert found[a.uid].max_abs == pytest.approx(np.abs(right - wrong).max(), rel=1e-2)

    shutil.copytree(folder, tmp_path / "media")
    (tmp_path / "media" / c.media).write_bytes(b"something else")
    (other,) = recheck(store, [c], bank, tmp_path / "media", 1)
    assert not other.passed
    assert "not the file that was indexed" in (other.reason or "")


def test_nothing_to_encode_again(
    extracted: tuple[Path, Manifest, Path], bank: EncoderBank, tmp_path: Path, specs: Specs
) -> None:
    folder, manifest, root = extracted
    with pytest.raises(StoreError, match=r"none of the 1 records has tokens"):
        recheck(TokenStore.open(root), [make_record("unknown")], bank, folder, 1)
    foreign = TokenStore.open(build(tmp_path / "s", specs["audio"]))
    with pytest.raises(ValueError, match=r"no audio tokens of the wanted spec"):
        recheck(foreign, manifest.records, bank, folder, 1)


# ------------------------------------------------------------------------------ a bucket


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    with moto_server() as address:
        yield address


def test_a_bucket_is_verified_and_repaired(
    endpoint: str, specs: Specs, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = specs["video"]
    make_bucket(endpoint, "audit")
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    store = TokenStore.open_or_create("s3://audit/store")
    for names in UNITS:
        store.commit(spec, unit(spec, names), PROVENANCE)
    store.write_snapshot(spec)
    assert summary(verify(store)) == []
    group_key = layout.group(spec)
    (old,) = store.storage.names(layout.snapshots(spec.spec_id))
    for key in ("store.json", f"{group_key}/status/c/0", f"{group_key}/clip/zarr.json"):
        store.storage.delete(key)
    store.storage.replace(f"{layout.snapshots(spec.spec_id)}/{old}", b"no")
    found = verify(doctor_open("s3://audit/store"))
    assert [f.severity for f in found.findings] == ["derived"] * 4, summary(found)
    assert doctor(doctor_open("s3://audit/store")).repaired == found.findings
    again = verify(TokenStore.open("s3://audit/store"))
    assert (summary(again), again.n_clips) == ([], 5)
    store.storage.delete(f"{group_key}/tokens/c/1/0/0/0")
    (finding,) = verify(store).findings
    assert (finding.severity, "3 clips" in finding.what) == ("damage", True)
