"""Real annotation files of MELD, EmoryNLP, CREMA-D and EmoDB, counted once more without the project."""

from __future__ import annotations

import ast
import csv
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

import emocache
from cache.manifest import read_manifest
from extract.corpora.registry import corpus_row
from extract.index import Indexed, index_corpus
from tests.tree_files import tiny_sound, tiny_video

SHARED = Path(__file__).resolve().parents[2] / "shared" / "annotations"

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real annotations in ../shared/annotations"
)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Read a CSV with nothing but the csv module."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def indexed(corpus: str, folder: str | Path, tmp_path: Path, layout: str | None = None) -> Indexed:
    """Index real files without media."""
    where = SHARED / folder
    return index_corpus(corpus_row(corpus), where, tmp_path / "m.parquet", layout=layout)


def count(values: Iterable[str | None]) -> dict[str | None, int]:
    """Return how often each value occurs."""
    return dict(Counter(values))


# MELD

SADNESS = {"sadness": "sad"}


@pytest.mark.parametrize(
    ("corpus", "end", "sizes"),
    [("meld", "", (9989, 1109, 2610)), ("meld-dyadic", "_dya", (12840, 1462, 3400))],
)
def test_meld(corpus: str, end: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    found = indexed(corpus, "meld", tmp_path)
    by_split = {s: [r for r in found.records if r.split == s] for s in ("train", "val", "test")}
    assert tuple(len(records) for records in by_split.values()) == sizes
    for split, native in {"train": "train", "val": "dev", "test": "test"}.items():
        written = rows_of(SHARED / "meld" / f"{native}_sent_emo{end}.csv")
        records = by_split[split]
        assert {r.split_native for r in records} == {native}
        assert [r.emotion for r in records] == [
            SADNESS.get(w["Emotion"], w["Emotion"]) for w in written
        ]
        assert [r.sentiment for r in records] == [w["Sentiment"] for w in written]
        assert [r.speaker for r in records] == [w["Speaker"].strip() for w in written]
        assert [r.subtitle("en") for r in records] == [w["Utterance"].strip() for w in written]
    assert len({r.uid for r in found.records}) == sum(sizes)


def test_meld_has_the_documented_histograms(tmp_path: Path) -> None:
    found = list(indexed("meld", "meld", tmp_path).records)
    train = [r for r in found if r.split == "train"]
    assert count(r.emotion for r in train) == {
        "neutral": 4710, "joy": 1743, "surprise": 1205, "anger": 1109, "sad": 683, "disgust": 271,
        "fear": 268,
    }  # fmt: skip
    assert count(r.sentiment for r in train) == {
        "neutral": 4710,
        "negative": 2945,
        "positive": 2334,
    }
    test = [r for r in found if "meld-e" in r.benchmarks]
    assert count(r.emotion for r in test) == {
        "neutral": 1256, "joy": 402, "anger": 345, "surprise": 281, "sad": 208, "disgust": 68,
        "fear": 50,
    }  # fmt: skip
    assert len(test) == 2610
    assert sum("meld-s" in r.benchmarks for r in found) == 3719
    expected = corpus_row("meld").expected
    assert count(r.emotion for r in found) == expected.labels["emotion"]
    assert count(r.sentiment for r in found) == expected.labels["sentiment"]
    assert count(r.split for r in found) == expected.splits


def test_no_dialogue_of_meld_is_in_two_splits(tmp_path: Path) -> None:
    splits: dict[str | None, set[str | None]] = {}
    for record in indexed("meld", "meld", tmp_path).records:
        splits.setdefault(record.parent, set()).add(record.split)
    assert None not in splits
    assert max(map(len, splits.values())) == 1
    # 1,038 dialogues of train have utterances; number 60 has none.
    assert "train_dia60" not in splits
    assert sum("train" in found for found in splits.values()) == 1038


def test_dyadic_records_point_at_clips_of_meld(tmp_path: Path) -> None:
    clips = {r.media for r in indexed("meld", "meld", tmp_path).records}
    dyadic = list(indexed("meld-dyadic", "meld", tmp_path).records)
    assert {r.media for r in dyadic} <= clips
    assert len({r.media for r in dyadic}) == 13_400


def test_merbench_s_translation_completes_meld(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        shutil.copy(SHARED / "meld" / f"{name}_sent_emo.csv", tmp_path)
    shutil.copy(SHARED / "meld_merbench" / "transcription-engchi-polish.csv", tmp_path)
    found = list(indexed("meld", tmp_path, tmp_path).records)
    chinese = {
        r["name"]: r["chinese"] for r in rows_of(tmp_path / "transcription-engchi-polish.csv")
    }
    assert len(chinese) == 13_708
    for record in found:
        name = record.uid.removeprefix("meld/").replace("dev_", "val_")
        assert record.subtitle("zh") == chinese[name].strip()
        assert record.subtitle() == record.subtitle("en")


def test_command_indexes_meld(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "meld.parquet"
    code = emocache.main(["index", "meld", str(SHARED / "meld"), "--out", str(out)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "13,708 records" in shown
    manifest = read_manifest(out)
    assert count(r.split for r in manifest.records) == {"train": 9989, "val": 1109, "test": 2610}
    assert manifest.header.label_spaces["meld/emotion"].labels[-2:] == ("sad", "surprise")
    assert "GPL-3.0" in (manifest.header.corpora["meld"].licence or "")


def test_command_indexes_meld_with_media(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media = tmp_path / "media" / "dev_splits_complete"
    media.mkdir(parents=True)
    for name in ("dia0_utt0.mp4", "dia0_utt1.mp4", "dia0_utt999.mp4"):
        (media / name).write_bytes(tiny_video() + name.encode())
    command = ["index", "meld", str(SHARED / "meld"), "--media", str(media.parent)]
    out = tmp_path / "m.parquet"
    assert emocache.main([*command, "--out", str(out)]) == 2
    assert "13,706 of 13,708 records have no media file" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not out.exists()
    assert emocache.main([*command, "--on-missing", "drop", "--out", str(out)]) == 1
    records = read_manifest(out).records
    assert [r.uid for r in records] == ["meld/dev_dia0_utt0", "meld/dev_dia0_utt1"]
    assert records[0].seen_clip.has_video
    assert records[0].sha256 != records[1].sha256


# EmoryNLP


def test_emorynlp(tmp_path: Path) -> None:
    found = indexed("emorynlp", "emorynlp", tmp_path)
    assert count(r.split for r in found.records) == {"train": 7551, "val": 954, "test": 984}
    for split, native in {"train": "train", "val": "dev", "test": "test"}.items():
        written = rows_of(SHARED / "emorynlp" / f"emorynlp_{native}_final.csv")
        records = [r for r in found.records if r.split == split]
        assert [r.emotion for r in records] == [w["Emotion"].lower() for w in written]
        assert [r.subtitle() for r in records] == [w["Utterance"].strip() for w in written]
        assert [r.speaker for r in records] == [
            ";".join(ast.literal_eval(w["Speaker"])) for w in written
        ]
    assert (
        count(r.emotion for r in found.records) == corpus_row("emorynlp").expected.labels["emotion"]
    )


def test_both_layouts_of_emorynlp_name_the_same_utterance_alike(tmp_path: Path) -> None:
    csv_records = {r.uid: r for r in indexed("emorynlp", "emorynlp", tmp_path).records}
    json_records = list(indexed("emorynlp", "emorynlp", tmp_path, "json").records)
    assert count(r.split for r in json_records) == {"val": 1344, "test": 1328}
    entries = [
        utterance
        for name in ("dev", "tst")
        for episode in json.loads(
            (SHARED / "emorynlp" / f"emotion-detection-{name}.json").read_text(encoding="utf-8")
        )["episodes"]
        for scene in episode["scenes"]
        for utterance in scene["utterances"]
    ]
    assert [r.uid for r in json_records] == [f"emorynlp/{e['utterance_id']}" for e in entries]
    assert [r.emotion for r in json_records] == [e["emotion"].lower() for e in entries]
    both = [r for r in json_records if r.uid in csv_records]
    # The CSV files leave utterances out, and their splits are the same.
    assert len(both) == 954 + 984
    assert all(csv_records[r.uid].split == r.split for r in both)
    same = sum(csv_records[r.uid].emotion == r.emotion for r in both)
    assert same == len(both)


# CREMA-D


def test_crema_d(tmp_path: Path) -> None:
    found = list(indexed("crema-d", "crema_d", tmp_path).records)
    written = rows_of(SHARED / "crema_d" / "SentenceFilenames.csv")
    assert len(found) == len(written) == 7442
    codes = {
        "ANG": "anger",
        "DIS": "disgust",
        "FEA": "fear",
        "HAP": "happy",
        "NEU": "neutral",
        "SAD": "sad",
    }
    parts = [w["Filename"].split("_") for w in written]
    assert [r.emotion for r in found] == [codes[p[2]] for p in parts]
    assert [r.speaker for r in found] == [p[0] for p in parts]
    assert [r.split_axes["level"] for r in found] == [p[3] for p in parts]
    assert count(r.emotion for r in found) == {
        "anger": 1271, "disgust": 1271, "fear": 1271, "happy": 1271, "neutral": 1087, "sad": 1271,
    }  # fmt: skip
    actors = {w["ActorID"] for w in rows_of(SHARED / "crema_d" / "VideoDemographics.csv")}
    assert {r.speaker for r in found} == actors
    assert len(actors) == 91
    assert len({r.subtitle() for r in found} - {None}) == 12


def test_crema_d_as_it_was_perceived(tmp_path: Path) -> None:
    found = list(indexed("crema-d", "crema_d", tmp_path, "perceived").records)
    letters = {"A": "anger", "D": "disgust", "F": "fear", "H": "happy", "N": "neutral", "S": "sad"}
    votes = {
        w["FileName"]: w["MultiModalVote"] for w in rows_of(SHARED / "crema_d" / "summaryTable.csv")
    }
    for record in found:
        winners = [letters[v] for v in votes[record.uid.removeprefix("crema-d/")].split(":")]
        assert record.emotion_multi == tuple(winners)
        assert record.emotion == (winners[0] if len(winners) == 1 else None)
    ties = sum(r.emotion is None for r in found)
    assert ties == sum(":" in v for v in votes.values())
    note = next(n for n in corpus_row("crema-d").expected.known if "ties" in n)
    assert f"{ties} votes are ties" in note


# EmoDB


def test_emodb(tmp_path: Path) -> None:
    found = list(indexed("emodb", "emodb/emobox", tmp_path).records)
    lines = (SHARED / "emodb" / "emobox" / "emodb.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    assert len(found) == len(written) == 535
    assert Counter(w["emo"] for w in written)["boredem"] == 81
    assert count(r.emotion for r in found) == {
        "anger": 127, "boredom": 81, "neutral": 79, "happy": 71, "fear": 69, "sad": 62, "disgust": 46,
    }  # fmt: skip
    assert [r.uid for r in found] == [w["key"].replace("emodb-", "emodb/") for w in written]
    # The letter in the file's name says the same as EmoBox's label.
    letters = {"W": "anger", "L": "boredom", "E": "disgust", "A": "fear", "F": "happy", "T": "sad",
               "N": "neutral"}  # fmt: skip
    assert [r.emotion for r in found] == [letters[r.uid[-2]] for r in found]
    assert sum("fold" in r.split_axes for r in found) == 107
    assert len({r.speaker for r in found}) == 10
    assert len({r.subtitle("de") for r in found} - {None}) == 10


def test_emodb_in_emobox_s_fold(tmp_path: Path) -> None:
    found = list(indexed("emodb", "emodb/emobox", tmp_path, "emobox-fold-1").records)
    assert count(r.split for r in found) == {"train": 428, "test": 107}
    speakers = {s: {r.speaker for r in found if r.split == s} for s in ("train", "test")}
    # The fold mixes speakers, which its row says.
    assert speakers["train"] == speakers["test"]
    notes = " ".join(corpus_row("emodb").expected.known)
    assert "same ten speakers in train and test" in notes


def test_emodb_s_sound_files_are_read_by_their_names(tmp_path: Path) -> None:
    wav = tmp_path / "emodb" / "wav"
    wav.mkdir(parents=True)
    names = [line["wav"].rpartition("/")[2] for line in map(
        json.loads, (SHARED / "emodb/emobox/emodb.jsonl").read_text(encoding="utf-8").splitlines()
    )]  # fmt: skip
    for name in names:
        (wav / name).write_bytes(tiny_sound())
    found = list(indexed("emodb", wav.parent, tmp_path).records)
    boxed = {r.uid: r for r in indexed("emodb", "emodb/emobox", tmp_path).records}
    assert len(found) == 535
    assert {r.uid: r.emotion for r in found} == {uid: r.emotion for uid, r in boxed.items()}


def test_merbench_s_pickled_labels_are_refused() -> None:
    from cache.errors import ManifestError
    from extract.corpora.readers import READERS

    file = SHARED / "meld_merbench" / "label.npz"
    with pytest.raises(ManifestError, match=r"'train_corpus' holds Python objects.*original"):
        list(READERS["npz"](file, file.parent, {}))
