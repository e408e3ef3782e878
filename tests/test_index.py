"""Folders of media files, with tables of labels, to manifests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cache.clip import Clip, Record, media_path
from cache.errors import ManifestError, SchemaError
from cache.manifest import media_root, read_manifest, write_manifest
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
    manifest, report = index_folder(folder, tmp_path / "c.parquet", labels_csv=labels, corpus="x")
    a, b = manifest.records
    assert (a.emotion, a.subtitle(), a.split, a.peak_index) == ("happy", "Well, yes.", "train", 3)
    assert a.described("multimodal") == ("She smiles.",)
    assert a.described("audio_tone") == ("A bright voice.",)
    assert a.described("visual_objective") == ("A broad smile.",)
    assert (b.emotion, b.subtitle(), b.peak_index, b.descriptions) == ("sad", None, None, ())
    space = manifest.header.space("x", "emotion")
    assert space is not None
    assert space.labels == ("happy", "sad")
    assert report.is_clean


def test_a_table_may_hold_several_kinds_of_labels(folder: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.tsv"
    labels.write_bytes(
        "file\temotion\tsentiment\tintent\r\na.mp4\tJoy\tpositive\tAgreeing\r\n"
        "day1/b.mp4\t\tnegative\t\r\n".encode("utf-16")
    )
    manifest, _ = index_folder(
        folder,
        tmp_path / "c.parquet",
        labels_csv=labels,
        label_space=("sad", "joy"),
        corpus="x",
    )
    a, b = manifest.records
    assert (a.emotion, a.sentiment, a.intent) == ("joy", "positive", "agreeing")
    assert (b.emotion, b.sentiment, b.intent) == (None, "negative", None)
    spaces = {key: space.labels for key, space in manifest.header.label_spaces.items()}
    assert spaces == {
        "x/emotion": ("sad", "joy"),
        "x/sentiment": ("negative", "positive"),
        "x/intent": ("agreeing",),
    }


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


def test_the_media_root_is_stored_relative_to_the_manifest(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "c.parquet"
    manifest, _ = index_folder(folder, target)
    assert not os.path.isabs(manifest.header.media_root)
    write_manifest(target, manifest)
    assert media_root(read_manifest(target), target) == folder.resolve()
