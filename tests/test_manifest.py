"""The manifest: a seam that others read and write, so examples here are written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import (
    Clip,
    Description,
    Peak,
    Record,
    Subtitle,
    has_label,
    media_path,
)
from cache.errors import ManifestError, SchemaError
from cache.labels import LabelSpace
from cache.manifest import (
    SCHEMA,
    CorpusNote,
    Header,
    Manifest,
    ManifestWriter,
    count_records,
    iter_records,
    media_root,
    read_header,
    read_manifest,
    write_manifest,
)
from cache.schema import decode

EXAMPLE: dict[str, Any] = {
    "uid": "meld/test_dia0_utt0",
    "media": "output_repeated_splits_test/dia0_utt0.mp4",
    "clip": {
        "sha256": "0f" * 32,
        "n_bytes": 515198,
        "duration_s": 6.166,
        "has_video": True,
        "has_audio": True,
        "has_image": True,
    },
    "split": "test",
    "split_native": "test",
    "split_axes": [{"axis": "season", "value": "3"}],
    "benchmarks": ["meld-e", "meld-s"],
    "parent": "test_dia0",
    "speaker": "Mark",
    "language": "en",
    "subtitles": [
        {"text": "Why do all your mugs have numbers?", "language": "en", "origin": "official"},
        {"text": "为什么杯子上有数字吗", "language": "zh", "origin": "translation"},
    ],
    "emotion": "surprise",
    "emotion_multi": ["surprise", "joy"],
    "emotion_ov": ["puzzled"],
    "sentiment": "positive",
    "sentiment_score": 1.5,
    "valence": 0.25,
    "peak": {"index": 12, "pts_s": 0.5, "method": "openface-au-sum", "score": 7.25},
    "action_units": [{"unit": "AU05", "intensity": 2.5}, {"unit": "AU26", "intensity": 1.0}],
    "descriptions": [
        {"kind": "audio_tone", "text": "A puzzled voice that rises.", "model": "listener"},
        {
            "kind": "multimodal",
            "text": "Raised brows and a rising voice show surprise.",
            "target": "emotion",
            "model": "writer",
            "version": "2",
            "prompt_id": "consolidate-1",
        },
    ],
}
"""A row as pyarrow writes and reads it."""
SPACES: dict[str, Any] = {
    "meld/emotion": {
        "name": "meld/emotion",
        "labels": ["joy", "surprise"],
        "aliases": {"happy": "joy"},
    },
    "emotion_multi": {"name": "any", "labels": ["joy", "surprise"]},
    "meld/emotion_ov": {"name": "meld/emotion_ov", "labels": ["curious"], "open": True},
    "meld/sentiment": {"name": "meld/sentiment", "labels": ["positive", "negative"]},
}
RECORD = Record(
    uid="meld/test_dia0_utt0",
    media="output_repeated_splits_test/dia0_utt0.mp4",
    clip=Clip(
        sha256="0f" * 32,
        n_bytes=515198,
        duration_s=6.166,
        has_video=True,
        has_audio=True,
        has_image=True,
    ),
    split="test",
    split_native="test",
    split_axes={"season": "3"},
    benchmarks=("meld-e", "meld-s"),
    parent="test_dia0",
    speaker="Mark",
    language="en",
    subtitles=(
        Subtitle(text="Why do all your mugs have numbers?", language="en"),
        Subtitle(text="为什么杯子上有数字吗", language="zh", origin="translation"),
    ),
    emotion="surprise",
    emotion_multi=("surprise", "joy"),
    emotion_ov=("puzzled",),
    sentiment="positive",
    sentiment_score=1.5,
    valence=0.25,
    peak=Peak(index=12, pts_s=0.5, method="openface-au-sum", score=7.25),
    action_units={"AU05": 2.5, "AU26": 1.0},
    descriptions=(
        Description(kind="audio_tone", text="A puzzled voice that rises.", model="listener"),
        Description(
            kind="multimodal",
            text="Raised brows and a rising voice show surprise.",
            target="emotion",
            model="writer",
            version="2",
            prompt_id="consolidate-1",
        ),
    ),
)
HEADER = decode(
    Header,
    {"media_root": "media", "label_spaces": SPACES, "scales": {"meld/vad": (-1, 1)}},
    "header",
)


def written_by_hand(path: Path, *rows: dict[str, Any], **header: Any) -> Path:
    """Write rows with pyarrow alone, as docs/manifest.md says."""
    told = {"schema_version": 2, "media_root": "media", "label_spaces": SPACES} | header
    table = pa.Table.from_pylist(list(rows))
    pq.write_table(table.replace_schema_metadata({"emocache": json.dumps(told)}), path)
    return path


def test_a_hand_written_parquet_is_read(tmp_path: Path) -> None:
    path = written_by_hand(tmp_path / "m.parquet", EXAMPLE)
    manifest = read_manifest(path)
    assert manifest.records == (RECORD,)
    assert media_root(manifest, path) == (tmp_path / "media").resolve()
    space = manifest.header.space("meld", "emotion")
    assert space is not None
    assert space.canonical(" Happy", "here") == "joy"
    assert manifest.header.space("other", "emotion") is None
    assert manifest.header.space("other", "emotion_multi") is not None  # of every corpus


def test_what_is_written_is_as_documented(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.parquet", Manifest(header=HEADER, records=(RECORD,)))
    table = pq.read_table(tmp_path / "m.parquet")
    [row] = table.to_pylist()
    told = json.loads(table.schema.metadata[b"emocache"])
    assert (told["schema_version"], told["scales"]) == (2, {"meld/vad": [-1.0, 1.0]})
    for name, value in EXAMPLE.items():
        if isinstance(value, dict):
            assert row[name] == row[name] | value
        elif name != "descriptions":
            assert row[name] == value, name
    page = (Path(__file__).parents[1] / "docs" / "manifest.md").read_text(encoding="utf-8")
    missing = [name for name in SCHEMA.names if f"`{name}" not in page]
    assert not missing, f"docs/manifest.md says nothing of {missing}"


def test_only_uid_and_media_must_be_there(tmp_path: Path) -> None:
    path = written_by_hand(tmp_path / "m.parquet", {"uid": "a/1", "media": "x.mp4"})
    [record] = read_manifest(path).records
    assert record == Record(uid="a/1", media="x.mp4")
    assert not has_label(record)
    with pytest.raises(ManifestError, match=r"a/1: its media file was never looked at.*--media"):
        _ = record.sha256


LEGACY = {
    "uid": "meld/test_dia0_utt0",
    "media": "a.mp4",
    "clip": {
        "sha256": "0f" * 32,
        "n_bytes": 5,
        "duration_s": 6.166,
        "has_video": True,
        "has_audio": True,
        "has_image": True,
    },
    "split": "test",
    "subtitle": "Why?",
    "label": "surprise",
    "description": "It shows surprise.",
    "peak_index": 12,
    "audio_description": "A puzzled voice.",
    "image_description": None,
}


@pytest.mark.parametrize("n_left_out", [0, 1, 2])
def test_schema_1_still_reads(tmp_path: Path, n_left_out: int) -> None:
    later = ("image_description", "audio_description")[:n_left_out]
    header = {
        "schema_version": 1,
        "media_root": ".",
        "label_space": {"name": "emotion", "labels": ["joy", "surprise"], "aliases": {}},
    }
    table = pa.Table.from_pylist([{n: v for n, v in LEGACY.items() if n not in later}])
    path = tmp_path / "old.parquet"
    pq.write_table(table.replace_schema_metadata({"emocache": json.dumps(header)}), path)
    manifest = read_manifest(path)
    [record] = manifest.records
    assert (record.emotion, record.subtitle(), record.peak_index) == ("surprise", "Why?", 12)
    assert record.described("multimodal", "emotion") == ("It shows surprise.",)
    assert record.described("audio_tone") == (() if n_left_out == 2 else ("A puzzled voice.",))
    assert manifest.header.space("meld", "emotion") is not None
    write_manifest(tmp_path / "new.parquet", manifest)
    assert read_manifest(tmp_path / "new.parquet") == manifest


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = written_by_hand(tmp_path / "m.parquet", EXAMPLE, schema_version=3)
    with pytest.raises(SchemaError, match=r"header: 'schema_version'.*got 3"):
        read_header(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"emotion": "anger"}, r"row 0 .*label 'anger' is not in the label space 'meld/emotion'"),
        ({"intent": "asking"}, r"intent 'asking', but the manifest has no label space for it"),
        ({"emotion_ov": ["Loud"]}, r"label 'Loud' is not in the label space"),
        ({"media": "/etc/passwd"}, r"row 0 .*'media'.*must be a relative path inside"),
        ({"media": "../../x.mp4"}, r"must be a relative path"),
        ({"clip": EXAMPLE["clip"] | {"sha256": "zz"}}, r"'clip.sha256'"),
        ({"uid": ""}, r"'uid'"),
        ({"peak": {"index": -1}}, r"'peak.index'"),
        ({"descriptions": [{"kind": "audio", "text": "x"}]}, r"'descriptions.0.kind'.*audio_tone"),
        (
            {"descriptions": [{"kind": "audio_tone", "text": "x", "target": "intent"}]},
            r"a description of kind 'audio_tone' has no target",
        ),
    ],
)
def test_invalid_rows_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = written_by_hand(tmp_path / "m.parquet", EXAMPLE | change)
    with pytest.raises((SchemaError, ManifestError), match=message):
        read_manifest(path)


def test_what_is_not_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"no such manifest file"):
        read_manifest(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("text")
    with pytest.raises(ManifestError, match=r"not a readable Parquet file"):
        read_manifest(tmp_path / "text.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ManifestError, match=r"not an emocache manifest"):
        read_manifest(tmp_path / "other.parquet")
    path = written_by_hand(tmp_path / "few.parquet", {"uid": "a"})
    with pytest.raises(ManifestError, match=r"missing column media; found uid"):
        read_manifest(path)
    table = pa.Table.from_pylist([EXAMPLE]).replace_schema_metadata({"emocache": "{"})
    pq.write_table(table, tmp_path / "torn.parquet")
    with pytest.raises(ManifestError, match=r"torn.parquet, header: not a JSON document"):
        read_header(tmp_path / "torn.parquet")


def test_a_label_field_that_does_not_exist_is_refused() -> None:
    data = {"media_root": ".", "label_spaces": {"meld/emotoin": SPACES["meld/emotion"]}}
    with pytest.raises(SchemaError, match=r"'meld/emotoin' names no label field.*'emotion'"):
        decode(Header, data, "header")


def test_duplicate_uids_are_refused(tmp_path: Path) -> None:
    path = written_by_hand(tmp_path / "m.parquet", EXAMPLE, EXAMPLE)
    with pytest.raises(ManifestError, match=r"row 1 .*'meld/test_dia0_utt0'.*duplicate uid"):
        read_manifest(path)
    with pytest.raises(SchemaError, match=r"duplicate uid 'meld/test_dia0_utt0'"):
        decode(Manifest, {"header": HEADER, "records": [RECORD, RECORD]}, "test")


def _write(path: Path, records: list[Record]) -> None:
    with ManifestWriter(path, HEADER) as writer:
        for record in records:
            writer.write(record)


def test_the_writer_leaves_nothing_behind_an_error(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.parquet"
    write_manifest(path, Manifest(header=HEADER, records=(RECORD,)))
    before = path.read_bytes()
    for wrong, message in (
        (RECORD, r"duplicate uid"),
        (RECORD.model_copy(update={"uid": "meld/2", "emotion": "anger"}), r"'anger'"),
    ):
        with pytest.raises(ManifestError, match=message):
            _write(path, [RECORD, wrong])
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["m.parquet"]
    with pytest.raises(KeyboardInterrupt), ManifestWriter(path, HEADER):
        raise KeyboardInterrupt
    assert path.read_bytes() == before


def test_a_link_out_of_the_media_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "secret.mp4"
    root.mkdir()
    outside.write_bytes(b"secret")
    (root / "inside.mp4").symlink_to(outside)
    with pytest.raises(ManifestError, match=r"leaves the media root"):
        media_path(root, Record(uid="a/1", media="inside.mp4"))


def test_an_unknown_split_names_those_that_exist() -> None:
    manifest = Manifest(header=HEADER, records=(RECORD,))
    with pytest.raises(
        ManifestError, match=r"no record is in split 'tset'\. Did you mean 'test'\?"
    ):
        manifest.select("tset")


def test_texts_are_chosen_by_language_kind_and_target() -> None:
    assert RECORD.subtitle() == "Why do all your mugs have numbers?"
    assert RECORD.subtitle("zh") == "为什么杯子上有数字吗"
    assert RECORD.subtitle("de") is None
    assert RECORD.described("multimodal", "sentiment") == ()
    assert RECORD.described("multimodal", "emotion") == RECORD.described("multimodal")
    assert RECORD.labels_of("emotion_multi") == ("surprise", "joy")
    assert RECORD.labels_of("emotion") == ("surprise",)
    assert RECORD.labels_of("intent") == ()


_text = st.text(min_size=1, max_size=12)
_records = st.builds(
    Record,
    uid=_text.map(lambda t: f"meld/{t}"),
    media=st.sampled_from(["a.mp4", "b/c d.wav"]),
    clip=st.none() | st.just(RECORD.clip),
    split=st.none() | _text,
    split_axes=st.dictionaries(_text, _text, max_size=2),
    benchmarks=st.lists(_text, max_size=2).map(tuple),
    person=st.none() | _text,
    subtitles=st.lists(
        st.builds(Subtitle, text=_text, language=st.none() | _text, origin=_text), max_size=2
    ).map(tuple),
    emotion=st.sampled_from([None, "joy", "surprise"]),
    emotion_ov=st.lists(st.sampled_from(["curious", "odd"]), max_size=3).map(tuple),
    arousal=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    peak=st.none() | st.builds(Peak, index=st.integers(0, 2**40)),
    action_units=st.dictionaries(_text, st.floats(0, 5), max_size=3),
    descriptions=st.lists(
        st.builds(Description, kind=st.just("multimodal"), text=_text, target=st.just("intent")),
        max_size=2,
    ).map(tuple),
)


@given(st.lists(_records, max_size=4, unique_by=lambda r: r.uid))
def test_any_records_come_back(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.parquet"
    manifest = Manifest(
        header=HEADER.model_copy(update={"corpora": {"meld": CorpusNote(licence="ask")}}),
        records=tuple(records),
    )
    write_manifest(path, manifest)
    assert read_manifest(path) == manifest
    assert list(iter_records(path)) == records
    assert (count_records(path), read_header(path)) == (len(records), manifest.header)


def test_a_space_is_looked_up_whatever_the_case() -> None:
    space = LabelSpace(name="s", labels=("doubt/confusion", "joy"), aliases={"happy": "joy"})
    assert space.find("Doubt/Confusion ") == "doubt/confusion"
    assert space.find("HAPPY") == "joy"
    assert space.find("anger") is None
    assert not space.holds("happy")  # a record holds the native name
    anything = LabelSpace(name="o", labels=("joy",), open=True)
    assert anything.find("Bitter-sweet") == "bitter-sweet"
    assert anything.find("  ") is None
    with pytest.raises(ManifestError, match=r"x.csv: label 'joi'.*Did you mean 'joy'\?"):
        space.canonical("joi", "x.csv")


@pytest.mark.slow
def test_a_large_manifest_streams_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    with ManifestWriter(path, HEADER) as writer:
        for i in range(30_000):
            writer.write(RECORD.model_copy(update={"uid": f"meld/{i}"}))
    start = time.process_time()
    assert sum(1 for _ in iter_records(path)) == 30_000
    assert time.process_time() - start < 30  # generous: it guards against a quadratic check
    # In a process of its own, whose peak nothing else has raised; libraries alone take 150 MiB.
    script = (
        "import sys\nfrom pathlib import Path\nfrom cache.manifest import iter_records\n"
        "n = sum(1 for _ in iter_records(Path(sys.argv[1])))\n"
        # Not getrusage: a child starts with the peak of its parent there.
        "print(n, Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    n, peak_kib = map(int, done.stdout.split())
    assert n == 30_000
    assert peak_kib < 600 * 1024
