"""Readers of special formats: what they take, and what they refuse, each with one clear error."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cache.errors import ManifestError, MissingDependencyError
from extract.corpora.readers import READERS
from extract.corpora.readers.cells import MAX_LIST_CHARS, listed
from extract.corpora.readers.faces import BOLD_CATEGORIES
from extract.corpora.registry import corpus_row
from extract.corpora.values import Row
from extract.index import index_corpus
from tests.tree_files import csd

Read = Callable[..., list[Row]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Return a function that writes a file (or takes one) and reads it."""

    def call(reader: str, name: str, data: str | bytes | None = None, **options: Any) -> list[Row]:
        path = tmp_path / name
        if data is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        return list(READERS[reader](path, tmp_path, options))

    return call


def test_every_reader_refuses_an_option_that_it_does_not_know(read: Read) -> None:
    for name in READERS:
        suffix = "csd" if name == "csd-segments" else "npz" if name == "npz" else "csv"
        with pytest.raises(ManifestError, match="no option 'colums'"):
            read(name, f"x.{suffix}", "a,b\n1,2\n", colums="a")


# IEMOCAP

LINE = "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]\n"


def test_iemocap_evaluation(read: Read) -> None:
    where, row = read(
        "iemocap-evaluation", "a/Ses01F_impro01.txt", f"% head\n\n{LINE}C-E2:\tNeutral;\t()\n"
    )[0]
    assert where == "a/Ses01F_impro01.txt, line 3"
    assert row == {
        "utterance": "Ses01F_impro01_F000", "emotion": "neu", "valence": "2.5000",
        "activation": "2.5000", "dominance": "2.5000", "start_s": "6.2901", "end_s": "8.2357",
        "dialogue": "Ses01F_impro01", "session": "1", "gender": "F", "speaker": "Ses01_F",
    }  # fmt: skip


@pytest.mark.fault("damaged annotation file")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("% only a head\n", "no line `\\[start - end\\]"),
        ("[6.29 - 8.23]\tSes01F_impro01_F000\tneu\n", "line 1: .* is no line of an evaluation"),
        (LINE.replace("2.5000,", "2,5000,", 1), "is no line of an evaluation"),
        (LINE.replace("Ses01F_impro01_F000", "dia0_utt0"), "no name of an IEMOCAP utterance"),
        (LINE.replace("neu", "n\0u"), "line 1: holds NUL bytes"),
    ],
)
def test_iemocap_evaluation_that_is_damaged(read: Read, text: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read("iemocap-evaluation", "e.txt", text)


def test_iemocap_transcription(read: Read) -> None:
    rows = read(
        "iemocap-transcription", "t.txt",
        "Ses05F_script03_1_F033 [241.6700-243.4048]: You knew: nothing.\nF: (laughs)\n",
    )  # fmt: skip
    assert [row for _, row in rows] == [
        {"utterance": "Ses05F_script03_1_F033", "text": "You knew: nothing."}
    ]
    with pytest.raises(ManifestError, match="no line `utterance"):
        read("iemocap-transcription", "t.txt", "F: (laughs)\n")


# Computational sequences


def test_csd_after_the_sdk_s_align(read: Read, tmp_path: Path) -> None:
    csd(tmp_path / "l.csd", "All Labels", {
        "vid[0]": (np.float32([[1.0]]), [[0.0, 1.0]]),
        "vid[7]": (np.float32([[np.nan]]), [[1.0, 2.0]]),
    })  # fmt: skip
    rows = [row for _, row in read("csd-segments", "l.csd", columns=["score"], first="1")]
    assert [(r["video"], r["index"], r["number"], r["score"]) for r in rows] == [
        ("vid", "0", "1", "1.0"),
        ("vid", "7", "8", ""),
    ]


def test_csd_with_variable_length_words(read: Read, tmp_path: Path) -> None:
    csd(tmp_path / "l.csd", "Labels", {"vid": (np.float32([[1.0], [2.0]]), [[0, 1], [1, 2]])})
    with h5py.File(tmp_path / "w.csd", "w") as file:
        group = file.create_group("words/data/vid")
        group.create_dataset("features", data=[["a"], ["sp"], ["ö"]], dtype=h5py.string_dtype())
        group.create_dataset("intervals", data=[[0.0, 0.5], [0.5, 1.2], [1.2, 1.4]])
    rows = [row for _, row in read("csd-segments", "l.csd", words="w.csd")]
    assert [r["text"] for r in rows] == ["a", "ö"]
    assert [r["at"] for r in rows] == ["vid@0.00", "vid@1.00"]


def _no_root(file: h5py.File) -> None:
    file.create_group("a")
    file.create_group("b")


def _no_data(file: h5py.File) -> None:
    file.create_group("All Labels/dta")


def _no_features(file: h5py.File) -> None:
    file.create_dataset("r/data/vid/intervals", data=[[0.0, 1.0]])


def _external_link(file: h5py.File) -> None:
    file.create_group("r")["data"] = h5py.ExternalLink("/etc/passwd", "/x")


def _soft_link(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [[0.0, 1.0]]
    file["r/data/vid/features"] = h5py.SoftLink("/r/data/vid/intervals")


def _external_storage(file: h5py.File) -> None:
    file.create_dataset("r/data/vid/features", (1, 1), "f4", external=[("/etc/passwd", 0, 4)])
    file["r/data/vid/intervals"] = [[0.0, 1.0]]


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((1, 1), "f4")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "x", (1, 1))
    file.create_virtual_dataset("r/data/vid/features", layout)
    file["r/data/vid/intervals"] = [[0.0, 1.0]]


def _references(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [[0.0, 1.0]]
    file.create_dataset("r/data/vid/features", (1, 1), h5py.ref_dtype)


def _ragged(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [[0.0, 1.0]]
    file.create_dataset("r/data/vid/features", (1, 1), h5py.vlen_dtype(np.float32))


def _huge(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [[0.0, 1.0]]
    file.create_dataset("r/data/vid/features", (2**40, 1), "f8", chunks=(1024, 1))


def _texts(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [[0.0, 1.0]]
    file["r/data/vid/features"] = np.array([[b"good"]], "S8")


def _wide(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [[0.0, 1.0]]
    file["r/data/vid/features"] = np.zeros((1, 74), np.float32)


def _group_for_a_dataset(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [[0.0, 1.0]]
    file.create_group("r/data/vid/features")


def _odd_intervals(file: h5py.File) -> None:
    file["r/data/vid/intervals"] = [0.0, 1.0]
    file["r/data/vid/features"] = np.zeros((1, 1), np.float32)


@pytest.mark.fault("hostile or damaged .csd")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_root, "2 groups at the root \\(a, b\\)"),
        (_no_data, "no group 'data' in 'All Labels' \\(found: dta\\)"),
        (_no_features, "vid: no 'features' \\(found: intervals\\)"),
        (_external_link, "'data' is a link that leads elsewhere \\(ExternalLink\\)"),
        (_soft_link, "'features' is a link that leads elsewhere \\(SoftLink\\)"),
        (_external_storage, "'features' is kept outside the file"),
        (_virtual, "'features' is kept outside the file"),
        (_references, "'features' holds objects"),
        (_ragged, "'features' holds objects"),
        (_huge, "claims \\d+ bytes"),
        (_texts, "'features' holds .*, where numbers are expected"),
        (_wide, "features of shape \\(1, 74\\) .* expected 1 values each"),
        (_group_for_a_dataset, "'features' is a Group, not a Dataset"),
        (_odd_intervals, "'intervals' has shape \\(2,\\)"),
    ],
)
def test_csd_that_holds_something_else(
    read: Read, tmp_path: Path, make: Callable[[h5py.File], None], message: str
) -> None:
    with h5py.File(tmp_path / "x.csd", "w") as file:
        make(file)
    with pytest.raises(ManifestError, match=message):
        read("csd-segments", "x.csd", columns=["score"])


@pytest.mark.fault("truncated .csd")
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_csd_that_is_cut_off(read: Read, tmp_path: Path, keep: float) -> None:
    data = {f"video{i}": (np.zeros((50, 1), np.float32), np.zeros((50, 2))) for i in range(20)}
    csd(tmp_path / "x.csd", "Labels", data)
    whole = (tmp_path / "x.csd").read_bytes()
    with pytest.raises(ManifestError, match=r"x\.csd.*(cannot be read as HDF5|get it again)"):
        read("csd-segments", "x.csd", whole[: int(keep * len(whole))])


@pytest.mark.fault("damaged .csd")
def test_csd_with_a_flipped_block_is_an_error_or_the_same(read: Read, tmp_path: Path) -> None:
    csd(tmp_path / "x.csd", "Labels", {"v": (np.ones((4, 1), np.float32), np.ones((4, 2)))})
    whole = (tmp_path / "x.csd").read_bytes()
    n_refused = 0
    for start in range(0, len(whole), 97):
        broken = bytearray(whole)
        broken[start : start + 8] = b"\xff" * len(broken[start : start + 8])
        try:
            # A damaged number is still a number; anything else must be the one error.
            assert len(read("csd-segments", "x.csd", bytes(broken))) in (0, 4)
        except ManifestError:
            n_refused += 1
    assert n_refused > 5


def test_missing_csd_is_named(read: Read) -> None:
    with pytest.raises(ManifestError, match=r"none\.csd: cannot be read as HDF5"):
        read("csd-segments", "none.csd")


@pytest.mark.fault("missing dependency")
def test_csd_without_h5py(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"pip install 'emocache\[exchange\]'"):
        read("csd-segments", "x.csd", b"x")


@pytest.mark.fault("wrong file among a corpus's files")
def test_index_tells_of_a_csd_without_its_group(tmp_path: Path) -> None:
    (tmp_path / "cmu_mosi_std_folds.py").write_text("standard_train_fold = ['v']\n")
    with h5py.File(tmp_path / "CMU_MOSI_Opinion_Labels.csd", "w") as file:
        file.create_group("Labels/nothing")
    with pytest.raises(ManifestError, match=r"CMU_MOSI_Opinion_Labels\.csd: no group 'data'"):
        index_corpus(corpus_row("mosi"), tmp_path, tmp_path / "m.parquet")


# Folds and transcripts


def test_folds_are_read_without_running_the_file(read: Read, tmp_path: Path) -> None:
    rows = read(
        "mmsdk-folds", "f.py",
        "open('ran', 'w')\nstandard_train_fold = ['a',\n 'b']\nstandard_valid_fold = ('c',)\n"
        "standard_test_fold = []\nother = [1]\n",
    )  # fmt: skip
    assert rows == [
        ("f.py, line 2", {"video": "a", "fold": "train"}),
        ("f.py, line 3", {"video": "b", "fold": "train"}),
        ("f.py, line 4", {"video": "c", "fold": "valid"}),
    ]
    assert not Path("ran").exists()
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault("hostile Python source")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("standard_train_fold = [exit(3)]", "line 1: an entry that is no text"),
        ("standard_train_fold = __import__('os').listdir('/')", "no list standard_train_fold"),
        ("standard_train_fold = [", "not a Python source"),
        ("x = 1", "no list standard_train_fold"),
        ("a = " + "(" * 100_000, "not a Python source"),
        ("standard_train_fold = ['a\0']", "not a Python source"),
    ],
    ids=["call", "call outside", "cut off", "other file", "nested", "nul"],
)
def test_folds_that_are_none(read: Read, source: str, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read("mmsdk-folds", "f.py", source)


def test_transcripts_of_another_form(read: Read) -> None:
    with pytest.raises(ManifestError, match=r"line 2: .*video___clip___start"):
        read("mosei-transcript", "t.txt", "v___0___0.0___1.0___Hi.\nv___1___x___1.0___Hi.\n")
    with pytest.raises(ManifestError, match="number_DELIM_text"):
        read("mosi-transcript", "v.annotprocessed", "ONE_DELIM_HI\n")


# Faces and bodies


@pytest.mark.parametrize(
    ("reader", "name", "text", "message"),
    [
        ("dfew", "set_1.csv", "video_name,label\nabc,1\n", "'abc' is not the number of a clip"),
        ("dfew", "set_1.csv", "name,label\n1,1\n", "'' is not the number of a clip"),
        ("mafw", "set_1/train.txt", "00001.mp4\n", "'00001.mp4' is not a clip and its label"),
        ("mafw", "set_1/train.txt", "00001 anger\n", "is not a clip and its label"),
        ("bold", "train.csv", "a.mp4,0,0,9\n", "fewer values than the header"),
        ("bold", "train.csv", ",".join(["a.mp4", "0", "0", "9", *["x"] * 33]), "rates from 0 to 1"),
    ],
)
@pytest.mark.fault("damaged annotation file")
def test_labels_of_another_form(
    read: Read, reader: str, name: str, text: str, message: str
) -> None:
    with pytest.raises(ManifestError, match=message):
        read(reader, name, text)


def test_bold_takes_labels_from_a_threshold_on(read: Read) -> None:
    rates = [f"{i / 26:.3f}" for i in range(26)]
    line = ",".join(["001/abc.mp4/0001.mp4", "2.0", "0", "9", *rates, *"1111111"])
    for threshold, first in {"0.5": 13, "0.25": 7, "1": 26}.items():
        _, row = read("bold", "train.csv", line, threshold=threshold)[0]
        assert row["labels"] == ";".join(BOLD_CATEGORIES[first:])
    assert row["person"] == "2"
    with pytest.raises(ManifestError, match="option threshold: 'half'"):
        read("bold", "train.csv", line, threshold="half")


# Cells


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("['Monica Geller', 'Phoebe Buffay']", ("Monica Geller", "Phoebe Buffay")),
        ('["Joey\'s Co-Star"]', ("Joey's Co-Star",)),
        ("[happy, at ease]", ("happy", "at ease")),
        ("(happy, sad)", ("happy", "sad")),
        ("('happy')", ("happy",)),
        ("happy、sad", ("happy", "sad")),
        ("happy", ("happy",)),
        ("[]", ()),
        ("", ()),
    ],
)
def test_lists_in_cells(text: str, items: tuple[str, ...]) -> None:
    assert listed(text, "x") == items


@pytest.mark.fault("hostile literal")
@pytest.mark.parametrize(
    "text",
    [
        "['a', __import__('os').system('true')]",
        "['a', 1]",
        "['a'",
        "['a', ['b']]",
        "['" + "a" * MAX_LIST_CHARS + "']",
        "['a'" + "+'a'" * 2000 + "]",
    ],
    ids=["call", "number", "open", "nested", "long", "deep"],
)
def test_cells_that_are_no_lists_of_texts(text: str) -> None:
    if text == "['a'":  # no list, so words: nothing is guessed, and nothing is lost
        assert listed(text, "x") == ("['a",)
        return
    with pytest.raises(ManifestError, match="list"):
        listed(text, "x")


def test_cells_taken_apart(read: Read) -> None:
    rows = read(
        "cells", "t.csv", "id,names,n\ndia_1_utt_2_ch,\"['A', 'B']\",7\nodd,C,x\n",
        lists="names", pad={"n": "3"}, parts={"id": r"(?P<dia>dia_\d+)_utt_\d+_(?P<tongue>\w\w)"},
        values={"tongue": {"ch": "zh"}},
    )  # fmt: skip
    assert [row for _, row in rows] == [
        {"id": "dia_1_utt_2_ch", "names": "A;B", "n": "007", "dia": "dia_1", "tongue": "zh"},
        {"id": "odd", "names": "C", "n": "x", "dia": "", "tongue": ""},
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lists": ["nmaes"]}, "no column 'nmaes'.* Did you mean 'names'"),
        ({"pad": {"id": "x"}}, "option pad: 'x'"),
        ({"pad": "id"}, "option pad: a str, not a mapping"),
        ({"parts": {"id": "(?P<a>["}}, "not a regular expression"),
        ({"parts": {"id": "a"}}, "no named group"),
        ({"values": {"idd": {}}}, "no column 'idd'"),
    ],
)
def test_cells_with_wrong_options(read: Read, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        read("cells", "t.csv", "id,names\n1,a\n", **options)


def test_a_long_id_is_not_taken_apart(read: Read) -> None:
    text = "id\n" + "a" * 100_000 + "\n"
    _, row = read("cells", "t.csv", text, parts={"id": "(?P<x>(a+)+)b"})[0]
    assert row["x"] == ""


# Acted corpora, archives


@pytest.mark.parametrize(
    ("reader", "name", "text"),
    [
        ("crema-d", "f.csv", "Filename\n1001_IEO_NEU\n"),
        ("crema-d-votes", "f.csv", "FileName,VoiceVote,FaceVote\nx,A,A\n"),
        ("emodb", "wav/readme.wav", ""),
        ("emobox", "e.jsonl", json.dumps({"wav": "a/b.wav", "emo": "anger"})),
        ("emobox", "e.jsonl", json.dumps({"emo": "anger"})),
    ],
)
def test_names_of_another_corpus(read: Read, reader: str, name: str, text: str) -> None:
    with pytest.raises(ManifestError, match=r"no file name of|no column 'MultiModalVote'"):
        read(reader, name, text)


def test_npz_of_plain_arrays(read: Read, tmp_path: Path) -> None:
    np.savez(tmp_path / "l.npz", name=np.array(["a", "b"]), label=np.array([b"x", b"y"]), n=[1, 2])
    rows = read("npz", "l.npz")
    assert rows[1] == ("l.npz, row 1", {"name": "b", "label": "y", "n": "2"})


@pytest.mark.fault("pickled labels")
def test_npz_of_objects_is_refused_and_nothing_runs(read: Read, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    np.savez(tmp_path / "l.npz", train_corpus=np.array({"a": Evil()}, dtype=object))
    with pytest.raises(ManifestError, match=r"'train_corpus' holds Python objects.*write a CSV"):
        read("npz", "l.npz")
    assert not (tmp_path / "ran").exists()


@pytest.mark.fault("damaged archive")
def test_npz_that_is_none(read: Read, tmp_path: Path) -> None:
    for data in (b"", b"PK\3\4 cut off", b"no archive"):
        with pytest.raises(ManifestError, match=r"l\.npz: not a readable \.npz archive"):
            read("npz", "l.npz", data)
    np.savez(tmp_path / "l.npz", name=["a"], features=np.zeros((1, 4)))
    with pytest.raises(ManifestError, match="has 2 axes"):
        read("npz", "l.npz")
    np.savez(tmp_path / "l.npz", name=["a"], label=["x", "y"])
    with pytest.raises(ManifestError, match="different lengths"):
        read("npz", "l.npz")
