"""Mapping files: rows to records, what is checked on the way, and real datasets brought by a mapping."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import Description, Record, Subtitle
from cache.errors import ManifestError, SchemaError
from cache.manifest import read_manifest
from cache.schema import decode
from extract.corpora import media as media_module
from extract.corpora.registry import load_row
from extract.corpora.row import CorpusRow
from extract.corpora.templates import columns_of, compile_template, parse
from extract.index import Indexed, index_corpus, write
from tests.media import write_clip

SHARED = Path(__file__).resolve().parents[2] / "shared"

# Templates

NAME = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1).map(
    str.strip
).filter(bool)  # fmt: skip
PART = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), NAME.map(lambda n: ("column", n))
)


@given(st.lists(PART, max_size=6), st.data())
def test_a_template_says_what_its_parts_say(parts: list[Any], data: st.DataObject) -> None:
    """Against the definition: texts with doubled braces as they are, columns by their value."""
    template = "".join(
        f"{{{p[1]}}}" if isinstance(p, tuple) else p.replace("{", "{{").replace("}", "}}")
        for p in parts
    )
    names = list(dict.fromkeys(p[1] for p in parts if isinstance(p, tuple)))
    row = {name: data.draw(st.text(max_size=5)) for name in names}
    expected = "".join(row[p[1]] if isinstance(p, tuple) else p for p in parts)
    if any(not row[name] for name in names):
        expected = ""
    assert columns_of(template) == tuple(names)
    assert compile_template(template, names, "test")(row) == expected


@pytest.mark.parametrize("template", ["{", "a}", "{a}}", "x{}y", "{ }"])
def test_a_lone_brace_is_refused(template: str) -> None:
    with pytest.raises(ManifestError, match="template"):
        parse(template)


def test_of_several_templates_the_first_that_is_not_empty_counts() -> None:
    render = compile_template(("{a}{b}", "{c}", "none"), ["a", "b", "c"], "test")
    assert render({"a": "1", "b": "2", "c": "3"}) == "12"
    assert render({"a": "1", "b": "", "c": "3"}) == "3"
    assert render({"a": "", "b": "", "c": ""}) == "none"
    assert compile_template(("{x}", "{c}"), ["c"], "test")({"c": "3"}) == "3"
    with pytest.raises(ManifestError, match=r"none of the columns 'x', 'y' is there\. Found: c"):
        compile_template(("{x}", "{y}"), ["c"], "test")


# Mapping files


def test_plain_values_of_a_mapping_file_are_text(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(
        """
id: mine
spaces: {emotion: {labels: [no, yes, on]}}
layouts:
  files:
    about: a test
    sources: [{files: [a.csv], options: {header: false}}]
    joins: [{files: [b.csv], on: "{key}", equals: "{id}"}]
    fields:
      id: "{id}"
      emotion: {text: "{e}", values: {0: no, 1: yes, 1.0: on}}
      language: ~
""",
        encoding="utf-8-sig",
    )
    row = load_row(path)
    fields = row.layouts["files"].fields
    assert row.spaces["emotion"].labels == ("no", "yes", "on")
    assert row.spaces["emotion"].name == "mine/emotion"
    assert fields.emotion is not None
    assert fields.emotion.values == {"0": "no", "1": "yes", "1.0": "on"}
    assert row.layouts["files"].joins[0].on == "{key}"
    assert fields.language is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id: a\nid: b\n", r"m\.yaml, line 2, column 1: not YAML: the key 'id' stands twice"),
        ("id: {a\n", r"line 2, column 1: not YAML"),
        ("- id\n", r"holds a list, not a mapping"),
        ("id: Mine\nlayouts: {}\n", r"'id'"),
        ("id: a\nlayuots: {}\n", r"unknown field 'layuots'\. Did you mean 'layouts'"),
        (
            "id: a\nlayouts: {x: {about: b, sources: [{files: [c]}], fields: {id: x, emotoin: y}}}\n",
            r"unknown field 'layouts\.x\.fields\.emotoin'\. Did you mean 'emotion'",
        ),
    ],
)
def test_a_wrong_mapping_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SchemaError, match=message):
        load_row(path)
    with pytest.raises(SchemaError, match="cannot be read"):
        load_row(tmp_path / "none.yaml")


# Records

TABLE = """\
name,split,text,emo,pol,score,val,peak,AU12_r,day,said
a1,tr,Hello.,Joy,positive,2.5,0.5,12,1.5,mon,She smiles.
a2,dev,,SAD,negative,-1,-0.25,,,tue,
a3,te,Well.,happiness,neutral,0,,,0,mon,He nods.
"""


def layout(**changes: Any) -> dict[str, Any]:
    """Return a layout of the table with some fields changed; None takes one out."""
    fields: dict[str, Any] = {
        "id": "{name}",
        "split": "{split}",
        "split_axes": {"day": "{day}"},
        "parent": "{day}",
        "subtitles": [{"text": "{text}"}],
        "emotion": "{emo}",
        "sentiment": "{pol}",
        "sentiment_score": "{score}",
        "valence": "{val}",
        "peak_index": "{peak}",
        "action_units": {"AU12": "{AU12_r}"},
        "descriptions": [{"kind": "multimodal", "text": "{said}", "target": "emotion"}],
    }
    fields |= changes.pop("fields", {})
    return {
        "about": "a test",
        "sources": [{"files": ["t.csv"]}],
        "splits": {"tr": "train", "dev": "val", "te": "test"},
        "fields": {k: v for k, v in fields.items() if v is not None},
        **changes,
    }


def corpus(found: dict[str, Any] | None = None, **changes: Any) -> CorpusRow:
    data = {
        "id": "mine",
        "language": "en",
        "licence": "mine alone",
        "spaces": {"emotion": {"labels": ["sad", "joy"], "aliases": {"happiness": "joy"}}},
        "scales": {"sentiment_score": [-3, 3], "vad": [-1, 1]},
        "layouts": {"csv": found or layout()},
        **changes,
    }
    return decode(CorpusRow, data, "test")


def index(tmp_path: Path, row: CorpusRow, text: str = TABLE, **options: Any) -> Indexed:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    return index_corpus(row, tmp_path, tmp_path / "m.parquet", **options)


def test_every_field_is_filled(tmp_path: Path) -> None:
    row = corpus(benchmarks=[{"id": "sims", "splits": ["test"], "axes": {"day": ["mon"]}}])
    found = index(tmp_path, row)
    first, second, third = found.records
    assert first == Record(
        uid="mine/a1",
        media="a1",
        split="train",
        split_native="tr",
        split_axes={"day": "mon"},
        parent="mon",
        subtitles=(Subtitle(text="Hello.", language="en"),),
        emotion="joy",
        sentiment="positive",
        sentiment_score=2.5,
        valence=0.5,
        peak={"index": 12},  # type: ignore[arg-type]
        action_units={"AU12": 1.5},
        descriptions=(Description(kind="multimodal", text="She smiles.", target="emotion"),),
    )
    assert (second.emotion, second.subtitles, second.peak, second.action_units) == (
        "sad", (), None, {},
    )  # fmt: skip
    assert (third.emotion, third.action_units, third.valence) == ("joy", {"AU12": 0.0}, None)
    assert [r.benchmarks for r in found.records] == [(), (), ("sims",)]
    header = found.header
    assert header.label_spaces["mine/emotion"].labels == ("sad", "joy")
    assert header.label_spaces["mine/sentiment"].labels == ("negative", "neutral", "positive")
    assert header.scales == {"mine/sentiment_score": (-3, 3), "mine/vad": (-1, 1)}
    assert header.corpora["mine"].licence == "mine alone"
    write(tmp_path / "m.parquet", found)
    assert read_manifest(tmp_path / "m.parquet").records == tuple(found.records)


@pytest.mark.parametrize(
    ("row", "text", "message"),
    [
        (
            corpus(layout(fields={"emotion": "{emotion}"})), TABLE,
            r"t\.csv, emotion: no column 'emotion'\. Did you mean 'emo'\? Found: name, split, text",
        ),
        (corpus(), TABLE.replace("dev", "vald"), r"line 3: split 'vald' is unknown.*Known: tr, dev, te"),
        (corpus(), TABLE.replace("a3", "a1"), r"line 4: duplicate uid 'mine/a1', .* by t\.csv, line 2"),
        (corpus(), TABLE.replace("a2", ""), r"line 3: no id"),
        (corpus(), TABLE.replace("2.5", "2,5").replace("2,5", '"2,5"'),
         r"line 2: 'sentiment_score' must be a number \(got '2,5'\)\. Write the decimals behind a point"),
        (corpus(), TABLE.replace("2.5", "1_0"), r"must be a number \(got '1_0'\)"),
        (corpus(), TABLE.replace("2.5", "nan"), r"must be a number \(got 'nan'\)"),
        (corpus(), TABLE.replace("2.5", "3.5"), r"'sentiment_score' is 3\.5, outside the scale from -3"),
        (corpus(), TABLE.replace(",0.5,", ",1.5,"), r"'valence' is 1\.5, outside the scale from -1 to 1"),
        (corpus(), TABLE.replace(",12,", ",12.5,"), r"'peak_index' must be a whole number"),
        (corpus(layout(fields={"id": "{name"})), TABLE, r"template '\{name': a single '\{'"),
        (corpus(layout(fields={"media": "../{name}.mp4"})), TABLE, r"relative path inside"),
        (corpus(layout(where={"day": ["sun"]})), TABLE,
         r"no record came out\. Tried layout 'csv': read 3 rows; 3 are left out by `where` \(day: sun\)"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_by_place(
    tmp_path: Path, row: CorpusRow, text: str, message: str
) -> None:
    with pytest.raises((ManifestError, SchemaError), match=message):
        list(index(tmp_path, row, text).records)


def test_a_mapping_that_maps_nothing_is_refused(tmp_path: Path) -> None:
    nothing = layout(
        fields=dict.fromkeys(
            ("subtitles", "emotion", "sentiment", "sentiment_score", "valence", "action_units",
             "descriptions")
        )
    )  # fmt: skip
    with pytest.raises(
        ManifestError, match=r"maps nothing: neither a label nor a subtitle.*It names"
    ):
        index(tmp_path, corpus(nothing))
    empty = {**nothing, "fields": {"id": "{name}", "emotion": {"text": "{emo}", "drop": ["x"]}}}
    with pytest.raises(
        ManifestError,
        match=r"maps nothing: none of 2 records.*read 2 rows; empty in all: emotion; columns found: name",
    ):
        index(tmp_path, corpus({**empty, "splits": {}}), "name,emo\na,x\nb,x\n")


def test_numbers_are_told_all_at_once(tmp_path: Path) -> None:
    text = "name,score\n" + "".join(f"a{i},x{i}\n" for i in range(25))
    row = corpus(layout(fields={"score": None}), layouts={
        "csv": {**layout(), "fields": {"id": "{name}", "sentiment_score": "{score}"}}
    })  # fmt: skip
    with pytest.raises(ManifestError) as refused:
        index(tmp_path, row, text)
    assert len(re.findall("must be a number", str(refused.value))) == 10
    assert "and 15 more" in str(refused.value)


# Labels outside the space

UNKNOWN = "name,split,text,emo\n" + "".join(
    f"a{i},tr,Hello.,{label}\n"
    for i, label in enumerate(["joy", "Jou", "calm", "Jou", *(f"w{n}" for n in range(12)), "sad"])
)
BRIEF: dict[str, Any] = {
    "id": "{name}", "split": "{split}", "emotion": "{emo}", "subtitles": [{"text": "{text}"}],
}  # fmt: skip


def test_labels_outside_the_space_are_refused_with_ten_and_a_count(tmp_path: Path) -> None:
    row = corpus({**layout(), "fields": BRIEF})
    with pytest.raises(ManifestError) as refused:
        index(tmp_path, row, UNKNOWN)
    text = str(refused.value)
    assert "t.csv, line 3 and 1 more: label 'Jou' is not in the label space 'mine/emotion'" in text
    assert "Did you mean 'joy'?" in text
    assert text.count("is not in the label space") == 10
    assert "(14 labels in all.) Allowed: sad, joy." in text
    assert "--on-unknown drop" in text


def test_labels_outside_the_space_are_dropped_or_mapped(tmp_path: Path) -> None:
    row = corpus({**layout(), "fields": BRIEF})
    found = index(tmp_path, row, UNKNOWN, on_unknown="drop")
    assert [r.uid for r in found.records] == ["mine/a0", "mine/a16"]
    assert found.report.n_dropped == 15
    assert not found.report.is_clean
    assert sum(found.report.unknown["emotion"].counts.values()) == 15

    few = "name,split,text,emo\na,tr,Hello.,Jou\nb,tr,Hello.,calm\n"
    mapped = index(tmp_path, row, few, on_unknown="map", label_map={"jou": "Joy", "CALM": "sad"})
    assert [r.emotion for r in mapped.records] == ["joy", "sad"]
    assert mapped.report.is_clean
    with pytest.raises(ManifestError, match=r"label 'calm' is not in the label space"):
        index(tmp_path, row, few, on_unknown="map", label_map={"jou": "joy"})
    with pytest.raises(ManifestError, match=r"--map-label calm=sda: 'sda'.*Did you mean 'sad'"):
        index(tmp_path, row, few, label_map={"calm": "sda"})
    with pytest.raises(ManifestError, match=r"--on-unknown map needs to know"):
        index(tmp_path, row, few, on_unknown="map")


def test_several_labels_and_open_words(tmp_path: Path) -> None:
    row = corpus(
        {
            **layout(),
            "fields": {
                "id": "{name}",
                "emotion_multi": {
                    "text": "{m}",
                    "separator": ";",
                    "values": {"0": "sad", "1": "joy"},
                },
                "emotion_ov": {"text": "{words}", "separator": ",", "drop": ["none"]},
            },
        },
        spaces={"emotion_multi": {"labels": ["sad", "joy"]}},
    )
    text = 'name,m,words\na,0; 1;0,"Moved, proud"\nb,1,none\n'
    found = index(tmp_path, row, text)
    a, b = found.records
    assert (a.emotion_multi, a.emotion_ov) == (("sad", "joy"), ("moved", "proud"))
    assert (b.emotion_multi, b.emotion_ov) == (("joy",), ())
    space = found.header.label_spaces["mine/emotion_ov"]
    assert (space.open, space.labels) == (True, ("moved", "proud"))
    one = corpus({**layout(), "fields": {**BRIEF, "emotion": {"text": "{emo}", "separator": ";"}}})
    with pytest.raises(ManifestError, match=r"emotion holds one label, so it takes no separator"):
        index(tmp_path, one, UNKNOWN)


def test_polarity_may_follow_from_the_score(tmp_path: Path) -> None:
    found = index(
        tmp_path,
        corpus({**layout(fields={"sentiment": None}), "sentiment_from_score": True}),
    )
    assert [r.sentiment for r in found.records] == ["positive", "negative", "neutral"]


def test_splits_may_follow_from_another_partition(tmp_path: Path) -> None:
    by_day = layout(fields={"split": None}, split_by={"day": {"mon": "train", "tue": "test"}})
    found = index(tmp_path, corpus(by_day))
    assert [(r.split, r.split_native) for r in found.records] == [
        ("train", None), ("test", None), ("train", None),
    ]  # fmt: skip
    by_day["split_by"] = {"day": {"mon": "train"}}
    with pytest.raises(ManifestError, match=r"line 3: day 'tue' belongs to no split.*Known: mon"):
        index(tmp_path, corpus(by_day))


# Files of a layout


def test_joined_files_complete_rows(tmp_path: Path) -> None:
    joined = {
        **layout(fields={"subtitles": [{"text": "{zh_text}", "language": "zh"}]}),
        "joins": [{"files": ["zh.csv"], "on": "{id}", "equals": "{name}", "prefix": "zh_"}],
    }
    (tmp_path / "zh.csv").write_text("id,text\na1,你好\na3,好\n", encoding="utf-8")
    found = index(tmp_path, corpus(joined))
    assert [r.subtitle("zh") for r in found.records] == ["你好", None, "好"]
    missed = found.report.without_partner["zh.csv"]
    assert (missed.n, missed.first) == (1, ["t.csv, line 3 (key 'a2')"])
    (tmp_path / "zh.csv").write_text("id,text\na1,你好\na3,好\na1,您好\n", encoding="utf-8")
    with pytest.raises(
        ManifestError,
        match=r"zh\.csv, line 4: the key 'a1' stands twice .* first in zh\.csv, line 2",
    ):
        index(tmp_path, corpus(joined))
    (tmp_path / "zh.csv").unlink()
    with pytest.raises(
        ManifestError, match=r"no layout of mine fits.*'csv' \(a test\) misses zh\.csv"
    ):
        index(tmp_path, corpus(joined))
    joined["joins"][0]["optional"] = True
    assert [r.subtitle() for r in index(tmp_path, corpus(joined)).records] == [None, None, None]


def test_the_first_layout_whose_files_are_all_there_is_taken(tmp_path: Path) -> None:
    row = corpus(
        layouts={
            "two": {**layout(), "sources": [{"files": ["t.csv", "more_of_it.csv"]}]},
            "one": layout(),
        }
    )
    assert index(tmp_path, row).report.layout == "one"
    (tmp_path / "more_of_it.csv").write_text(TABLE.replace("\na", "\nb"))
    found = index(tmp_path, row)
    assert (found.report.layout, len(found.records)) == ("two", 6)
    assert index(tmp_path, row, layout="one").report.layout == "one"
    with pytest.raises(SchemaError, match=r"mine has no layout 'onne'\. Did you mean 'one'"):
        index(tmp_path, row, layout="onne")
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "t.csv").write_text(TABLE)
    with pytest.raises(
        ManifestError,
        match=r"no layout of mine fits\. 'two' \(a test\) misses t\.csv, more_of_it\.csv; 'one' .*"
        r"inner has the first: give that folder",
    ):
        index_corpus(row, tmp_path / "outer", tmp_path / "m.parquet")


def test_columns_that_only_some_files_have(tmp_path: Path) -> None:
    source: dict[str, Any] = {"files": ["t*.csv"], "set": {"split": "te"}}
    (tmp_path / "t2.csv").write_text("name,text\nb1,Hi.\n")
    found = {**layout(), "sources": [source], "fields": BRIEF}
    with pytest.raises(ManifestError, match=r"t2\.csv, emotion: no column 'emo'"):
        index(tmp_path, corpus(found))
    source["may_lack"] = ["emo"]
    assert [r.emotion for r in index(tmp_path, corpus(found)).records] == [
        "joy",
        "sad",
        "joy",
        None,
    ]
    assert {r.split for r in index(tmp_path, corpus(found)).records} == {"test"}, "`set` wins"


def test_a_misspelt_one_of_several_columns_is_told(tmp_path: Path) -> None:
    found = index(tmp_path, corpus(layout(fields={"emotion": ["{emo}", "{emotion}"]})))
    assert found.report.notes == [
        "named by the mapping as one of several, but in no file: 'emotion' Did you mean 'emo'?"
    ]
    assert index(tmp_path, corpus()).report.notes == []


@pytest.mark.parametrize("pattern", ["**.csv", "a/**", "a/b**/c.csv", "***/c.csv"])
def test_what_is_no_pattern_is_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(
        ManifestError, match=rf"'{re.escape(pattern)}' is not a pattern \('\*\*' stands"
    ):
        index(tmp_path, corpus({**layout(), "sources": [{"files": [pattern]}]}))


@pytest.mark.parametrize("pattern", ["../t.csv", "/etc/passwd", "a\\t.csv"])
def test_no_path_leaves_the_folder(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ManifestError, match=r"leads out of the dataset's folder"):
        index(tmp_path, corpus({**layout(), "sources": [{"files": [pattern]}]}))


def test_no_link_leaves_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text(TABLE)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "t.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(ManifestError, match=r"t\.csv: a link that leaves the dataset's folder"):
        index_corpus(corpus(), folder, tmp_path / "m.parquet")


# Media


@pytest.fixture
def media(tmp_path: Path) -> Path:
    root = tmp_path / "media"
    (root / "deep").mkdir(parents=True)
    write_clip(root / "a1.mp4", seed=1)
    write_clip(root / "deep" / "a2.MP4", seed=2)
    (root / "a3.mp4").write_bytes((root / "a1.mp4").read_bytes())
    for path in root.rglob("*.*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    return root


def test_media_are_found_by_id_and_read_once(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = index(tmp_path, corpus(), media=media)
    records = list(found.records)
    assert [r.media for r in records] == ["a1.mp4", "deep/a2.MP4", "a3.mp4"]
    clip = records[0].clip
    assert clip is not None
    assert clip == records[2].clip
    assert clip.container is not None
    assert "mp4" in clip.container
    assert (clip.video_codec, clip.width_px, clip.has_audio) == ("h264", 96, True)
    assert found.header.media_root == "media"
    assert (found.report.n_files, found.report.n_remembered) == (3, 0)

    read: list[Path] = []
    real = media_module.file_sha256
    monkeypatch.setattr(media_module, "file_sha256", lambda p: read.append(p) or real(p))
    again = index(tmp_path, corpus(), media=media)
    assert list(again.records) == records
    assert (again.report.n_remembered, read) == (3, [])
    (media / "a1.mp4").write_bytes((media / "deep" / "a2.MP4").read_bytes())
    changed = list(index(tmp_path, corpus(), media=media).records)
    assert [p.name for p in read] == ["a1.mp4"]
    assert changed[0].clip == records[1].clip


@pytest.mark.fault("damaged digest memo")
def test_a_damaged_memo_costs_time_only(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    records = list(index(tmp_path, corpus(), media=media).records)
    (memo,) = (tmp_path / "cache" / "emocache" / "media").iterdir()
    for damaged in (b"", b"[]", b'{"a1.mp4": [1]}', memo.read_bytes().replace(b"sha256", b"sha")):
        memo.write_bytes(damaged)
        assert list(index(tmp_path, corpus(), media=media).records) == records


def test_missing_media(tmp_path: Path, media: Path) -> None:
    (media / "deep" / "a2.MP4").unlink()
    with pytest.raises(
        ManifestError,
        match=r"1 of 3 records have no media file\. t\.csv, line 3: a2\. The folder has 2 media files",
    ):
        index(tmp_path, corpus(), media=media)
    dropped = index(tmp_path, corpus(), media=media, on_missing="drop")
    assert [r.uid for r in dropped.records] == ["mine/a1", "mine/a3"]
    kept = index(tmp_path, corpus(), media=media, on_missing="keep")
    assert [r.clip is None for r in kept.records] == [False, True, False]
    for found in (dropped, kept):
        assert found.report.n_missing == 1
        assert not found.report.is_clean
        assert len(found.records) == found.report.n_records
    with pytest.raises(ManifestError, match=r"3 of 3 records"):
        index(
            tmp_path,
            corpus(layout(fields={"media": "none/{name}"})),
            media=media,
            on_missing="drop",
        )


def test_media_templates_are_tried_in_order(tmp_path: Path, media: Path) -> None:
    row = corpus(layout(fields={"media": ["{id}.avi", "deep/{name}", "{name}.mp4"]}))
    found = [r.media for r in index(tmp_path, row, media=media).records]
    assert found == ["a1.mp4", "deep/a2.MP4", "a3.mp4"]
    write_clip(media / "deep" / "a1.mp4", seed=3)
    with pytest.raises(
        ManifestError,
        match=r"line 2: 2 media files for 'a1': a1\.mp4, deep/a1\.mp4\. Give the mapping",
    ):
        index(tmp_path, corpus(), media=media)
    (media / "deep" / "a1.mp4").rename(media / "a1.wav")
    first = next(iter(index(tmp_path, corpus(), media=media).records))
    assert first.media == "a1.mp4", "a video rather than its sound"


def test_links_out_of_the_media_root_are_not_followed(tmp_path: Path, media: Path) -> None:
    (media / "a1.mp4").rename(tmp_path / "a1.mp4")
    (media / "a1.mp4").symlink_to(tmp_path / "a1.mp4")
    with pytest.raises(
        ManifestError, match=r"1 of 3 records.*1 links leave the folder .*: a1\.mp4"
    ):
        index(tmp_path, corpus(), media=media)


# Real annotations, brought by mapping files


def annotations(name: str) -> Path:
    folder = SHARED / "annotations" / name
    if not folder.is_dir():
        pytest.skip(f"needs the real files in ../shared/annotations/{name}")
    return folder


def mapped(tmp_path: Path, text: str, folder: Path) -> Indexed:
    path = tmp_path / "mapping.yaml"
    path.write_text(text, encoding="utf-8")
    return index_corpus(load_row(path), folder, tmp_path / "m.parquet")


def test_cped_with_its_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    text = """
id: cped
language: zh
layouts:
  csv:
    about: valid_split.csv of the repository
    sources: [{files: [valid_split.csv], set: {split: valid}}]
    splits: {train: train, valid: val, test: test}
    fields:
      id: "{Utterance_ID}"
      split: "{split}"
      split_axes: {series: "{TV_ID}"}
      parent: "{Dialogue_ID}"
      speaker: "{Speaker}"
      subtitles: [{text: "{Utterance}"}]
      emotion: "{Emotion}"
      sentiment: "{Sentiment}"
      intent: "{DA}"
"""
    found = mapped(tmp_path, text, annotations("cped"))
    records = list(found.records)
    assert len(records) == 11_137
    assert Counter(r.emotion for r in records) == {
        "neutral": 3126, "negative-other": 1702, "anger": 1608, "depress": 1446,
        "positive-other": 792, "worried": 661, "relaxed": 517, "happy": 370, "astonished": 313,
        "sadness": 274, "disgust": 198, "fear": 117, "grateful": 13,
    }  # fmt: skip
    assert records[0].subtitle("zh") == "怎么了"
    assert records[0].uid == "cped/32_000_000"
    assert all(r.intent and r.sentiment and r.parent and r.subtitles for r in records)


def test_mustard_is_an_object_of_objects(tmp_path: Path) -> None:
    text = """
id: mustard
language: en
layouts:
  json:
    about: sarcasm_data.json of the repository
    sources: [{files: [sarcasm_data.json], options: {key: id}}]
    fields:
      id: "{id}"
      split_axes: {show: "{show}"}
      speaker: "{speaker}"
      subtitles: [{text: "{utterance}"}]
      intent: {text: "{sarcasm}", values: {"true": sarcastic, "false": sincere}}
"""
    records = list(mapped(tmp_path, text, annotations("mustard")).records)
    assert Counter(r.intent for r in records) == {"sarcastic": 345, "sincere": 345}
    assert Counter(r.split_axes["show"] for r in records) == {
        "FRIENDS": 356, "BBT": 280, "GOLDENGIRLS": 40, "SARCASMOHOLICS": 14,
    }  # fmt: skip


def test_ecf_is_a_list_of_conversations(tmp_path: Path) -> None:
    text = """
id: ecf
language: en
layouts:
  json:
    about: Subtask_2_test.json of SemEval-2024
    sources: [{files: [Subtask_2_test.json], options: {records: conversation}, set: {split: test}}]
    fields:
      id: "{conversation_ID}_{utterance_ID}"
      media: "{video_name}"
      split: "{split}"
      parent: "{conversation_ID}"
      speaker: "{speaker}"
      subtitles: [{text: "{text}"}]
      emotion: "{emotion}"
"""
    records = list(mapped(tmp_path, text, annotations("ecf")).records)
    assert (len(records), len({r.parent for r in records})) == (3101, 341)
    assert {r.emotion for r in records} <= {
        "neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear",
    }  # fmt: skip
    assert all(r.media.endswith(".mp4") and r.split == "test" for r in records)


def test_rows_are_yaml_that_any_reader_reads() -> None:
    """What the loader of text reads is what YAML reads, but for types of plain values."""
    from extract.corpora.registry import ROWS

    for path in sorted(ROWS.glob("*.yaml")):
        assert set(yaml.safe_load(path.read_text())) <= set(CorpusRow.model_fields), path
