"""Folders and label tables to manifests; the manifest as a seam."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache.clip import Clip, Record, media_path
from cache.errors import ManifestError, SchemaError
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, media_root, read_manifest, write_manifest
from cache.schema import decode
from extract.index import index_folder
from tests.media import write_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus") / "media"
    (root / "day1").mkdir(parents=True)
    write_clip(root / "a.mp4", seed=1)
    write_clip(root / "day1" / "b.mp4", seed=2)
    (root / "copy.mp4").write_bytes((root / "a.mp4").read_bytes())
    (root / "notes.txt").write_text("not media")
    return root


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_becomes_records_and_equal_bytes_are_one_clip(
    folder: Path, tmp_path: Path
) -> None:
    manifest, report = index_folder(folder, tmp_path / "c.parquet", corpus="mine")
    assert [r.uid for r in manifest.records] == ["mine/a", "mine/copy", "mine/day1/b"]
    a, copy, b = manifest.records
    assert a.clip == copy.clip
    assert a.clip.sha256 != b.clip.sha256
    assert a.clip.has_video
    assert a.clip.has_audio
    assert not report.left_out


def test_a_table_brings_labels_subtitles_and_splits(folder: Path, tmp_path: Path) -> None:
    labels = table(
        tmp_path,
        "file,label,subtitle,split,description,peak_index,audio_description,image_description\n"
        'a.mp4,Happy,"Well, yes.",train,She smiles.,3,A bright voice.,A broad smile.\n'
        "day1/b.mp4,sad,,test,,,,\n",
    )
    manifest, _ = index_folder(folder, tmp_path / "c.parquet", labels_csv=labels)
    a, b = manifest.records
    assert (a.label, a.subtitle, a.split, a.description, a.peak_index) == (
        "happy", "Well, yes.", "train", "She smiles.", 3,
    )  # fmt: skip
    assert (a.audio_description, a.image_description) == ("A bright voice.", "A broad smile.")
    assert (b.label, b.subtitle, b.description, b.peak_index) == ("sad", None, None, None)
    assert (b.audio_description, b.image_description) == (None, None)
    assert manifest.header.label_space is not None
    assert manifest.header.label_space.labels == ("happy", "sad")


def test_rows_may_name_clips_by_uid(folder: Path, tmp_path: Path) -> None:
    labels = table(tmp_path, "uid,label\nday1/b,sad\n")
    manifest, _ = index_folder(folder, tmp_path / "c.parquet", labels_csv=labels, corpus="x")
    assert (manifest.records[0].uid, manifest.records[0].media) == ("x/day1/b", "day1/b.mp4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fil,label\na.mp4,sad\n", r"unknown column 'fil'.*Did you mean 'file'"),
        ("label,split\nsad,train\n", r"missing column 'file'"),
        (
            "file,label\na.mp4,sda\n",
            r"line 2: label 'sda' .*Did you mean 'sad'.*Allowed: happy, sad",
        ),
        ("file,uid\na.mp4,x\ncopy.mp4,x\n", r"line 3: duplicate uid 'corpus/x'"),
        ("file,label\n../secret.mp4,sad\n", r"'\.\./secret.mp4' leaves the media root"),
        ("file,label\n/etc/passwd,sad\n", r"leaves the media root"),
        ("file,label\na.mp4,sad,extra\n", r"line 2: more values than the header"),
        ("file,label\na.mp4\n", r"line 2: fewer values than the header"),
        ("uid,label\ndya1/b,sad\n", r"no media file for uid 'dya1/b'.*Did you mean 'day1/b'"),
        ("file,label\n", r"no rows below the header"),
        ("file,label,peak_index\na.mp4,sad,soon\n", r"'peak_index'.*got 'soon'"),
    ],
)
def test_a_contradicting_table_is_refused_by_line(
    folder: Path, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises((ManifestError, SchemaError), match=message):
        index_folder(
            folder,
            tmp_path / "c.parquet",
            labels_csv=table(tmp_path, text),
            label_space=("happy", "sad"),
            corpus="corpus",
        )


def test_bad_files_are_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    write_clip(root / "good.mp4")
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("no media at all, but text")
    (root / "folder.mp4").mkdir()
    (root / "gone.mp4").symlink_to(root / "nowhere.mp4")
    manifest, report = index_folder(root, tmp_path / "c.parquet")
    assert {r.media for r in manifest.records} == {"good.mp4", "empty.mp4", "text.mp4"}
    assert len(report.suspicious) == 2
    assert any("is a folder" in line for line in report.left_out)
    assert any("cannot be read" in line for line in report.left_out)
    assert len(report.left_out) == 2


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"does not exist"):
        index_folder(tmp_path / "none", tmp_path / "c.parquet")
    with pytest.raises(ManifestError, match=r"holds no media files"):
        index_folder(tmp_path, tmp_path / "c.parquet")


# --- the manifest itself

EXAMPLE: dict[str, Any] = {
    "uid": "meld/test_dia0_utt0",
    "media": "video/test_dia0_utt0.mp4",
    "clip": {
        "sha256": "0f" * 32,
        "n_bytes": 515198,
        "duration_s": 6.166,
        "has_video": True,
        "has_audio": True,
        "has_image": True,
    },
    "split": "test",
    "subtitle": "Why do all you're coffee mugs have numbers on the bottom?",
    "label": "surprise",
    "description": None,
    "peak_index": 12,
    "audio_description": "A puzzled voice that rises.",
    "image_description": None,
}


def test_a_hand_written_parquet_is_read(tmp_path: Path) -> None:
    """As docs/manifest.md says, with pyarrow alone."""
    header = {
        "schema_version": 1,
        "media_root": "media",
        "label_space": {"name": "emotion", "labels": ["joy", "surprise"], "aliases": {}},
    }
    written = pa.Table.from_pylist([EXAMPLE]).replace_schema_metadata(
        {"emocache": json.dumps(header)}
    )
    pq.write_table(written, tmp_path / "m.parquet")
    manifest = read_manifest(tmp_path / "m.parquet")
    assert manifest.records[0] == decode(Record, EXAMPLE, "example")
    assert media_root(manifest, tmp_path / "m.parquet") == (tmp_path / "media").resolve()


@pytest.mark.parametrize("n_left_out", [1, 2])
def test_a_manifest_without_the_later_columns_reads_as_one_with_nulls(
    tmp_path: Path, n_left_out: int
) -> None:
    later = ("image_description", "audio_description")
    row = {name: value for name, value in EXAMPLE.items() if name not in later[:n_left_out]}
    header = {
        "schema_version": 1,
        "media_root": ".",
        "label_space": {"name": "emotion", "labels": ["joy", "surprise"], "aliases": {}},
    }
    written = pa.Table.from_pylist([row]).replace_schema_metadata({"emocache": json.dumps(header)})
    pq.write_table(written, tmp_path / "m.parquet")
    manifest = read_manifest(tmp_path / "m.parquet")
    nulls = dict.fromkeys(later[:n_left_out])
    assert manifest.records == (decode(Record, EXAMPLE | nulls, "example"),)
    write_manifest(tmp_path / "again.parquet", manifest)
    assert read_manifest(tmp_path / "again.parquet") == manifest
    assert set(later) <= set(pq.read_schema(tmp_path / "again.parquet").names)


def test_round_trip(tmp_path: Path) -> None:
    bare = Record(uid="a/1", media="x.mp4", clip=Clip(sha256="00" * 32, n_bytes=0))
    manifest = Manifest(
        header=Header(
            media_root="..", label_space=LabelSpace(name="emotion", labels=("joy", "surprise"))
        ),
        records=(decode(Record, EXAMPLE, "example"), bare),
    )
    write_manifest(tmp_path / "m.parquet", manifest)
    assert read_manifest(tmp_path / "m.parquet") == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "anger"}, r"label 'anger' is not in the label space.*Allowed: joy, surprise"),
        (
            {"media": "/etc/passwd"},
            r"row 0 .*'media'.*must be a relative path inside the media root",
        ),
        ({"media": "../../x.mp4"}, r"must be a relative path"),
        ({"clip": EXAMPLE["clip"] | {"sha256": "zz"}}, r"'clip.sha256'"),
        ({"uid": ""}, r"'uid'"),
    ],
)
def test_invalid_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    header = {
        "schema_version": 1,
        "media_root": ".",
        "label_space": {"name": "emotion", "labels": ["joy", "surprise"], "aliases": {}},
    }
    rows = pa.Table.from_pylist([EXAMPLE | change])
    pq.write_table(
        rows.replace_schema_metadata({"emocache": json.dumps(header)}), tmp_path / "m.parquet"
    )
    with pytest.raises(SchemaError, match=message):
        read_manifest(tmp_path / "m.parquet")


def test_what_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no such manifest file"):
        read_manifest(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ManifestError, match=r"not a readable Parquet file"):
        read_manifest(tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match=r"not an emocache manifest"):
        read_manifest(tmp_path / "other.parquet")
    header = json.dumps({"media_root": "."})
    few = pa.table({"uid": ["a"], "media": ["b"]}).replace_schema_metadata({"emocache": header})
    pq.write_table(few, tmp_path / "few.parquet")
    with pytest.raises(ManifestError, match=r"missing column clip, split"):
        read_manifest(tmp_path / "few.parquet")


def test_duplicate_uids_are_refused() -> None:
    record = decode(Record, EXAMPLE | {"label": None}, "example")
    with pytest.raises(SchemaError, match=r"duplicate uid 'meld/test_dia0_utt0'"):
        decode(Manifest, {"header": {"media_root": "."}, "records": [record, record]}, "test")


def test_a_link_out_of_the_media_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.mp4"
    root.mkdir()
    outside.write_bytes(b"secret")
    (root / "inside.mp4").symlink_to(outside)
    record = Record(uid="a/1", media="inside.mp4", clip=Clip(sha256="00" * 32, n_bytes=6))
    with pytest.raises(ManifestError, match=r"leaves the media root"):
        media_path(root, record)
    with pytest.raises(ManifestError, match=r"leaves the media root"):
        index_folder(root, tmp_path / "m.parquet")


def test_an_unknown_split_names_those_that_exist() -> None:
    record = decode(Record, EXAMPLE | {"label": None}, "example")
    manifest = Manifest(header=Header(media_root="."), records=(record,))
    with pytest.raises(
        ManifestError, match=r"no record is in split 'tset'\. Did you mean 'test'\?"
    ):
        manifest.select("tset")


def test_a_large_manifest_is_read_in_seconds(tmp_path: Path) -> None:
    clip = Clip(sha256="00" * 32, n_bytes=1)
    records = tuple(Record(uid=f"a/{i}", media=f"{i}.mp4", clip=clip) for i in range(20_000))
    write_manifest(tmp_path / "m.parquet", Manifest(header=Header(media_root="."), records=records))
    start = time.process_time()
    assert len(read_manifest(tmp_path / "m.parquet")) == 20_000
    assert time.process_time() - start < 20  # generous: it guards against a quadratic check


def test_the_media_root_is_stored_relative_to_the_manifest(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "c.parquet"
    manifest, _ = index_folder(folder, target)
    assert not os.path.isabs(manifest.header.media_root)
    write_manifest(target, manifest)
    assert media_root(read_manifest(target), target) == folder.resolve()
