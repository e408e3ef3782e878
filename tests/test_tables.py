"""Files of rows: what a dataset's files may look like, and what is said of those that cannot be read."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import ManifestError, SchemaError
from extract.corpora.registry import reader
from extract.corpora.tables import read_path, read_table
from extract.corpora.values import Row

ROWS = [
    {"id": "1", "text": "Well, yes; or | no", "emotion": "joy"},
    {"id": "2", "text": 'two\nlines, "quoted"', "emotion": "sad"},
    {"id": "3", "text": "怎么了", "emotion": "fear"},
]


def written(path: Path, delimiter: str, encoding: str, newline: str) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter, lineterminator=newline)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def read(path: Path, **options: Any) -> list[Row]:
    return list(read_table(path, path.parent, options))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_any_delimiter_encoding_and_line_end_is_found(
    tmp_path: Path, delimiter: str, encoding: str, newline: str, suffix: str
) -> None:
    found = read(written(tmp_path / f"t{suffix}", delimiter, encoding, newline))
    assert [row for _, row in found] == ROWS
    assert [where.rpartition(" ")[2] for where, _ in found] == ["2", "3", "5"], "line of its start"


def test_another_encoding_is_named_and_taken(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", ",", "gb18030", "\r\n")
    with pytest.raises(ManifestError, match=r"t\.csv, line 5: not UTF-8.*encoding.*gb18030"):
        read(path)
    assert [row for _, row in read(path, encoding="gb18030")] == ROWS
    with pytest.raises(ManifestError, match=r"'gb18031' is no encoding.*Did you mean 'gb18030'"):
        read(path, encoding="gb18031")


def test_utf_16_without_its_mark_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("id,text\n1,a\n".encode("utf-16-le"))
    with pytest.raises(ManifestError, match=r"NUL characters.*encoding: utf-16-le"):
        read(path)
    assert read(path, encoding="utf-16-le")[0][1] == {"id": "1", "text": "a"}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("id,a\n1,b\n", {"delimiter": ";"}, r"one column.*'id,a'.*delimiter: comma"),
        ("id,a\n1,b\n", {"delimiter": "comma "}, r"not one character"),
        ("id,a\n1,b\n", {"delimeter": ","}, r"no option 'delimeter'.*Did you mean 'delimiter'"),
        ("id,a\n1,b\n\n2,b,c\n", {}, r"line 4: more values .*3 instead of 2"),
        ('id,a\n1,"b\nb"\n2\n', {}, r"line 4: fewer values .*1 instead of 2"),
        ('id,a\n1,"b\n2,c\n3,d\n', {}, r"line 2: not a well-formed table.*never closed"),
        ("id,a\n", {}, r"no rows below the header"),
        ("", {}, r"the file is empty"),
        ("id,a,id\n1,2,3\n", {}, r"line 1: column 'id' stands twice"),
        ("id,a\n1,\0b\n", {}, r"NUL"),
    ],
)
def test_a_damaged_table_is_refused_by_line(
    tmp_path: Path, text: str, options: dict[str, str], message: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(ManifestError, match=message):
        read(path, **options)


def test_one_column_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("text\nhello, you\nwell; yes\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"line 2: more values"):
        read(path)
    assert [row for _, row in read(path, quote="", delimiter="|")] == [
        {"text": "hello, you"},
        {"text": "well; yes"},
    ]


def test_columns_of_a_file_without_header_are_given(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a.wav,0.5\nb.wav,-1", encoding="utf-8")
    found = read(path, columns=["file", "value"])
    assert found[1] == ("t.csv, line 2", {"file": "b.wav", "value": "-1"})


def test_plain_quotes_and_an_unnamed_column(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('\ttext\n1\t5" and more\n', encoding="utf-8")
    assert read(path, quote="")[0][1] == {"column_1": "1", "text": '5" and more'}


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5), st.sampled_from(",;\t|"))
def test_whatever_csv_writes_comes_back_stripped(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[str, str]], delimiter: str
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("first", "second"), *values])
    found = [tuple(row.values()) for _, row in read(path, delimiter=delimiter)]
    assert found == [(a.strip(), b.strip()) for a, b in values]


# JSON


def dumped(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


def test_a_list_of_objects(tmp_path: Path) -> None:
    data = [
        {"id": 1, "au": {"AU12": 0.5, "AU6": None}, "words": ["a", "b"], "ok": True, "x": None},
        {"id": 2, "score": 1e-3},
    ]
    found = read(dumped(tmp_path / "t.json", data), separator="|")
    assert found[0][1] == {
        "id": "1", "au.AU12": "0.5", "au.AU6": "", "words": "a|b", "ok": "true", "x": "",
    }  # fmt: skip
    assert found[1] == ("t.json, entry 2", {"id": "2", "score": "0.001"})


def test_an_object_of_objects(tmp_path: Path) -> None:
    path = dumped(tmp_path / "t.json", {"1_60": {"text": "a"}, "1_70": {"text": "b"}})
    assert [row for _, row in read(path)] == [
        {"text": "a", "key": "1_60"},
        {"text": "b", "key": "1_70"},
    ]
    assert read(path, key="id")[0][1]["id"] == "1_60"


def test_a_dotted_path_walks_into_lists(tmp_path: Path) -> None:
    data = {
        "season": 1,
        "scenes": [
            {"scene": "a", "lines": [{"n": 1}, {"n": 2}]},
            {"scene": "b", "lines": [{"n": 3, "scene": "own"}]},
        ],
    }
    path = dumped(tmp_path / "t.json", data)
    with pytest.raises(
        ManifestError, match=r"Say where the list is with the option records: scenes"
    ):
        read(path)
    found = [row for _, row in read(path, records="scenes.lines")]
    assert found == [
        {"season": "1", "scene": "a", "n": "1"},
        {"season": "1", "scene": "a", "n": "2"},
        {"season": "1", "scene": "own", "n": "3"},
    ]
    with pytest.raises(ManifestError, match=r"no 'line' in an object.*Did you mean 'lines'"):
        read(path, records="scenes.line")


def test_an_object_a_line(tmp_path: Path) -> None:
    for name in ("t.jsonl", "t.json"):
        path = tmp_path / name
        path.write_text('{"id": 1}\n\n{"id": 2}\n', encoding="utf-8-sig")
        assert [where for where, _ in read(path)] == [f"{name}, line 1", f"{name}, line 3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"id": 1}\n{"id": 2', r"line 2: not JSON.*damaged or cut off"),
        ("t.jsonl", '{"id": 1}\n3\n', r"line 2: a int, not an object"),
        ("t.json", '[{"id": 1},\n{"id"', r"line 2, column .*: not JSON.*damaged or cut off"),
        ("t.json", '[{"id": 1}, 3]', r"entry 2: a int, not an object"),
        ("t.json", "[]", r"no rows"),
        ("t.jsonl", "", r"no rows"),
        ("t.json", "3", r"a int, not a list of objects"),
        ("t.json", '[{"a": {"b": 1}}, {"a": 2}]', r"entry 2: column 'a' holds objects and plain"),
        ("t.xml", "<a/>", r"knows no files of the kind '\.xml'"),
    ],
)
def test_damaged_json_is_refused_by_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=message):
        read(tmp_path / name)


def test_mixed_kinds_become_text_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = dumped(tmp_path / "t.json", [{"a": 1, "b": 1}, {"a": "one", "b": 2.5}, {"a": ["x"]}])
    with caplog.at_level(logging.WARNING):
        assert [row["a"] for _, row in read(path)] == ["1", "one", "x"]
    assert len(caplog.records) == 1
    told = caplog.records[0].getMessage()
    assert "column 'a'" in told
    assert "numbers first in t.json, entry 1; text first in t.json, entry 2" in told


# Parquet and Hugging Face datasets


def hub_features(**names: list[str]) -> bytes:
    features = {column: {"names": found, "_type": "ClassLabel"} for column, found in names.items()}
    return json.dumps({"info": {"features": features}}).encode()


def test_parquet_with_class_names_and_without_the_bytes(tmp_path: Path) -> None:
    audio = pa.array(
        [{"bytes": b"x" * 99, "path": "a.wav"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"id": [7], "label": [1], "score": [float("nan")], "audio": audio})
    table = table.replace_schema_metadata({b"huggingface": hub_features(label=["sad", "joy"])})
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train-00000-of-00001.parquet"
    pq.write_table(table, path)
    found = list(
        read_table(path, tmp_path, {"pattern": "data/{split}-{shard}-of-{shards}.parquet"})
    )
    assert found == [
        (
            "data/train-00000-of-00001.parquet, row 1",
            {"id": "7", "label": "joy", "score": "", "audio.path": "a.wav",
             "split": "train", "shard": "00000", "shards": "00001"},
        )
    ]  # fmt: skip


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": list(range(1000))}), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ManifestError, match=r"t\.parquet: not a readable Parquet file.*damaged"):
        read(path)
    table = pa.table({"label": [5]})
    pq.write_table(
        table.replace_schema_metadata({b"huggingface": hub_features(label=["sad"])}), path
    )
    with pytest.raises(
        ManifestError, match=r"row 1: column 'label' holds class 5, but there are 1"
    ):
        read(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data as `save_to_disk` writes it, and as the hub has it."""
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hf")
    features = datasets.Features(
        {
            "id": datasets.Value("string"),
            "emotion": datasets.ClassLabel(names=["sad", "joy"]),
            "several": datasets.Sequence(datasets.ClassLabel(names=["calm", "loud"])),
        }
    )
    parts = {
        name: datasets.Dataset.from_dict(
            {"id": [f"{name}{i}" for i in range(n)], "emotion": [i % 2 for i in range(n)],
             "several": [[0, 1][: i % 3] for i in range(n)]},
            features=features,
        )
        for name, n in (("train", 3), ("test", 2))
    }  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(root / "saved")
    (root / "hub" / "data").mkdir(parents=True)
    for name, part in parts.items():
        part.to_parquet(root / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("kind", ["saved", "hub"])
def test_hugging_face_datasets(saved: Path, kind: str) -> None:
    read_datasets = reader("huggingface")
    found = list(read_datasets(saved / kind, saved / kind, {}))
    assert [row for _, row in found] == [
        {"id": "train0", "emotion": "sad", "several": "", "split": "train"},
        {"id": "train1", "emotion": "joy", "several": "calm", "split": "train"},
        {"id": "train2", "emotion": "sad", "several": "calm; loud", "split": "train"},
        {"id": "test0", "emotion": "sad", "several": "", "split": "test"},
        {"id": "test1", "emotion": "joy", "several": "calm", "split": "test"},
    ]
    assert found[-1][0] == f"{kind}, test, row 2"
    only = list(read_datasets(saved / kind, saved / kind, {"split": "test"}))
    assert len(only) == 2
    with pytest.raises(ManifestError, match=r"no split 'tset'.*Did you mean 'test'"):
        list(read_datasets(saved / kind, saved / kind, {"split": "tset"}))


def test_embedded_media_are_not_read(tmp_path: Path) -> None:
    """Their bytes may be gigabytes, and decoding them needs further libraries."""
    datasets = pytest.importorskip("datasets")
    audio = [{"bytes": b"no sound at all", "path": "a.wav"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"id": ["1"], "audio": pa.array(audio, kind)})
    features = datasets.Features({"id": datasets.Value("string"), "audio": datasets.Audio()})
    info = json.dumps({"info": {"features": features.to_dict()}}).encode()
    (tmp_path / "hub").mkdir()
    pq.write_table(
        table.replace_schema_metadata({b"huggingface": info}), tmp_path / "hub" / "train.parquet"
    )
    memory = datasets.table.InMemoryTable(table.replace_schema_metadata({b"huggingface": info}))
    datasets.Dataset(memory, info=datasets.DatasetInfo(features=features)).save_to_disk(
        tmp_path / "saved"
    )
    for name in ("hub", "saved"):
        ((_, row),) = reader("huggingface")(tmp_path / name, tmp_path / name, {})
        assert (row["id"], row["audio.path"]) == ("1", "a.wav")
        assert "audio.bytes" not in row


def test_a_folder_that_is_no_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ManifestError, match=r"cannot read this folder"):
        list(reader("huggingface")(tmp_path, tmp_path, {}))


# Paths


def test_a_path_is_a_row(tmp_path: Path) -> None:
    file = tmp_path / "train" / "joy" / "spk1_a_b.avi"
    options = {"pattern": "{split}/{emotion}/{speaker}_{name}.*"}
    assert list(read_path(file, tmp_path, options)) == [
        (
            "train/joy/spk1_a_b.avi",
            {"path": "train/joy/spk1_a_b.avi", "stem": "spk1_a_b", "split": "train",
             "emotion": "joy", "speaker": "spk1", "name": "a_b"},
        )
    ]  # fmt: skip
    deep = {"pattern": "**/{emotion}/{name}.avi"}
    for place in ("joy/x.avi", "a/b/joy/x.avi"):
        ((_, row),) = read_path(tmp_path / place, tmp_path, deep)
        assert (row["emotion"], row["name"]) == ("joy", "x")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{emotion}/{name}.mp4", r"joy/x\.avi: does not match the pattern"),
        ("{a}/{a}.avi", r"a part stands twice: \{a\}"),
        ("{}/{a}.avi", r"a part has no name"),
    ],
)
def test_a_path_that_does_not_fit(tmp_path: Path, pattern: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        list(read_path(tmp_path / "joy" / "x.avi", tmp_path, {"pattern": pattern}))


def test_an_unknown_reader_has_a_near_miss() -> None:
    with pytest.raises(SchemaError, match=r"no reader 'tabel'\. Did you mean 'table'\?"):
        reader("tabel")
