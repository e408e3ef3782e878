"""`check_manifest`: every leak and every wrong count is caused on purpose, and found."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cache.clip import Record, Subtitle
from cache.errors import ManifestError
from cache.manifest import ManifestWriter
from extract.corpora.check import (
    BENCHMARK_GROUPS,
    CheckReport,
    check_manifest,
    paper_facts,
)
from extract.corpora.leaks import Finding
from extract.corpora.registry import corpus_ids, corpus_row
from extract.corpora.row import CorpusRow
from tests.small_corpora import EMOTIONS, header, record, write


def row(known: tuple[str, ...] = (), ids_hold: tuple[str, ...] = (), **expected: Any) -> CorpusRow:
    layout = {
        "about": "",
        "sources": [{"files": ["x"]}],
        "fields": {"id": "{x}"},
        "ids_hold": ids_hold,
    }
    return CorpusRow.model_validate(
        {"id": "mine", "layouts": {"one": layout}, "expected": {"known": known, **expected}}
    )


def sound(n: int = 30) -> list[Record]:
    """Records of one corpus with nothing to find: own dialogues and speakers in each split."""
    return [
        record(
            f"mine/{i}",
            split := ("train", "val", "test")[i % 3],
            emotion=EMOTIONS[i % 2],
            parent=f"{split}-{i // 6}",
            speaker=f"{split}-{i % 9}",
            subtitles=(Subtitle(text=f"What was said number {i}"),),
            duration_s=2.0,
            has_video=True,
            has_audio=True,
        )
        for i in range(n)
    ]


def check(tmp_path: Path, records: list[Record], *rows: CorpusRow, **more: Any) -> CheckReport:
    path = write(tmp_path / "m.parquet", records)
    return check_manifest(path, {one.id: one for one in rows or (row(),)}, **more)


def of(found: CheckReport, kind: str) -> list[Finding]:
    return [finding for finding in found.findings if finding.kind == kind]


def test_a_sound_corpus_has_no_findings(tmp_path: Path) -> None:
    found = check(tmp_path, sound())
    assert found.findings == ()
    assert found.is_clean
    assert (found.n_records, found.corpora) == (30, {"mine": 30})


@pytest.mark.fault("a clip in two splits")
def test_a_clip_planted_in_two_splits_is_found(tmp_path: Path) -> None:
    planted = [
        record("mine/planted", "test", "mine/0"),  # the bytes of record mine/0, of train
        record("mine/planted too", "val", "mine/3"),
        record("mine/harmless", "train", "mine/6"),  # both in train
        record("mine/without", None, "mine/9"),  # in no split
    ]
    found = check(tmp_path, sound() + planted)
    assert not found.is_clean
    first, second = of(found, "clip")
    assert [f.severity for f in (first, second)] == ["finding", "finding"]
    assert first.what.endswith("in test (mine) and train (mine)")
    assert (first.n, first.examples) == (1, ("test: mine/planted, train: mine/0",))
    assert second.examples == ("train: mine/3, val: mine/planted too",)
    assert of(found, "copy")[0].n == 4


@pytest.mark.fault("a clip in two splits")
def test_a_clip_planted_across_corpora_is_found_with_what_rows_know(tmp_path: Path) -> None:
    records = [
        record("mer2023/1", "test", "clip"),
        record("mer2024/1", "train", "clip"),
        record("mer2024/2", "test", "other"),
    ]
    found = check_manifest(write(tmp_path / "m.parquet", records), with_counts=False)
    (leak,) = of(found, "clip")
    assert leak.what.endswith("in test (mer2023) and train (mer2024)")
    assert leak.reason is not None
    assert "MER2024" in leak.reason or "MER2023" in leak.reason
    assert not found.is_clean  # known or not: one must not train on it


@pytest.mark.fault("a dialogue in two splits")
def test_a_dialogue_in_two_splits_is_found(tmp_path: Path) -> None:
    planted = [
        record("mine/planted", "test", parent="train-0"),
        record("other/1", "val", parent="train-0"),  # another corpus's dialogue of that name
    ]
    found = check(tmp_path, sound() + planted)
    (leak,) = of(found, "parent")
    assert (leak.severity, leak.n) == ("finding", 1)
    assert leak.examples == ("train-0: test: mine/planted, train: mine/0",)


@pytest.mark.fault("a speaker in two splits")
def test_a_speaker_in_two_splits_is_found_unless_it_is_by_design(tmp_path: Path) -> None:
    planted = record("mine/planted", "test", speaker="train-0")
    (leak,) = of(check(tmp_path, [*sound(), planted]), "speaker")
    assert (leak.severity, leak.reason) == ("finding", None)
    friends = [
        record(f"meld/{i}", split, speaker="Joey") for i, split in enumerate(("train", "test"))
    ]
    found = check(tmp_path, friends, with_counts=False)
    (note,) = of(found, "speaker")
    assert note.severity == "note"
    assert note.reason is not None
    assert "the split is by dialogue" in note.reason
    assert found.is_clean
    # A user's own row may say so, too.
    known = row(("A speaker may be ill.",))  # a remark about speakers explains nothing
    (leak,) = of(check(tmp_path, [*sound(), planted], known), "speaker")
    assert leak.severity == "finding"
    known = row(shared_speakers="Every speaker stands in all splits.")
    (note,) = of(check(tmp_path, [*sound(), planted], known), "speaker")
    assert (note.severity, note.reason) == ("note", "Every speaker stands in all splits.")


@pytest.mark.fault("a clip encoded twice")
def test_twins_are_a_hint(tmp_path: Path) -> None:
    def said(uid: str, split: str, text: str, duration_s: float) -> Record:
        return record(uid, split, subtitles=(Subtitle(text=text),), duration_s=duration_s)

    records = [
        said("mine/1", "train", "I never said that.", 2.001),
        said("mine/2", "test", "i never said that. ", 2.003),
        said("mine/3", "test", "I never said that.", 2.5),  # another length
        said("mine/4", "train", "Yeah.", 1.0),  # too short to mean anything
        said("mine/5", "test", "Yeah.", 1.0),
        said("mine/6", "train", "The same split, twice.", 1.0),
        said("mine/7", "train", "The same split, twice.", 1.0),
    ]
    found = check(tmp_path, records)
    (twin,) = of(found, "twin")
    assert (twin.severity, twin.n) == ("note", 1)
    assert twin.examples == ("test: mine/2, train: mine/1",)
    assert found.is_clean


def test_ids_that_tell_split_or_label_are_told(tmp_path: Path) -> None:
    records = [
        record(f"mine/{split}_{emotion.title()}_{i}", split, emotion=emotion)
        for i in range(10)
        for split in ("train", "test")
        for emotion in EMOTIONS
    ]
    assert [f.n for f in of(check(tmp_path, records), "id")] == [60, 60]
    # A name inside a word is none: "sad" in "crusader".
    hidden = [record(f"mine/crusader{i}", emotion="sad") for i in range(60)]
    assert of(check(tmp_path, hidden), "id") == []
    # What the row says is told whatever the ids look like.
    (told,) = of(check(tmp_path, hidden, row(ids_hold=("label",))), "id")
    assert (told.n, told.reason) == (60, "its row says so")


def test_what_is_missing_is_counted(tmp_path: Path) -> None:
    records = [
        record("mine/1", clip=None, emotion="sad", subtitles=(Subtitle(text="a"),)),
        record("mine/2", subtitles=(Subtitle(text="a"),)),
        record("mine/3", emotion="sad", has_video=True),
    ]
    found = check(tmp_path, records)
    assert {f.kind: (f.n, f.examples) for f in found.findings if f.examples} == {
        "label": (1, ("mine/2",)),
        "subtitle": (1, ("mine/3",)),
        "media": (1, ("mine/1",)),
    }
    assert [f.what for f in of(found, "media")][1:] == ["mine: media files could not be opened"]
    assert found.is_clean


def test_a_corpus_without_row_is_told(tmp_path: Path) -> None:
    found = check_manifest(write(tmp_path / "m.parquet", [record("own/1")]))
    (note,) = of(found, "row")
    assert "--mapping" in note.what
    assert found.counts == ()
    assert found.facts == ()  # the paper is nothing to a user's own corpus


@pytest.mark.fault("wrong counts")
def test_counts_are_compared_and_deviations_explained_if_they_are(tmp_path: Path) -> None:
    known = (
        "Of the 130 clips that the source counts, 30 are published.",
        "The 77 of bench are not published.",
    )
    expected = {
        "mmeverse": 130,
        "splits": {"train": 10, "val": 11},
        "labels": {"emotion": {"happy": 15, "sad": 14, "neutral": 0}},
        "benchmarks": {"bench": 77, "other": 0},
    }
    found = check(tmp_path, sound(), row(known, **expected))
    assert {c.what: (c.expected, c.found, c.status, c.reason) for c in found.counts} == {
        "Table 1": (130, 30, "explained", known[0]),
        "split train": (10, 10, "equal", None),
        "split val": (11, 10, "unexplained", None),
        "split test": (0, 10, "unexplained", None),
        "emotion happy": (15, 15, "equal", None),
        "emotion sad": (14, 15, "unexplained", None),
        "emotion neutral": (0, 0, "equal", None),
        # A sentence that names one of both numbers helps a reader, and explains nothing.
        "benchmark bench": (77, 0, "unexplained", known[1]),
        "benchmark other": (0, 0, "equal", None),
    }
    assert not found.is_clean
    assert check(tmp_path, sound(), row(known, mmeverse=130)).is_clean
    assert check(tmp_path, sound(), row(known, **expected), with_counts=False).is_clean


@pytest.mark.fault("wrong counts")
@pytest.mark.parametrize("n", [3, 103, 30])
def test_a_number_inside_another_one_explains_nothing(n: int, tmp_path: Path) -> None:
    known = "The 1,103 and the 13,003 and 1.30 and item-30 and 2 are other numbers than 130."
    one = row((known,), mmeverse=130)
    report = check(tmp_path, sound(n), one)
    assert [c.status for c in report.counts] == ["unexplained"]


@pytest.mark.fault("damaged record")
def test_an_invalid_record_is_refused_by_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write(tmp_path / "m.parquet", sound())
    table = pq.read_table(path)
    labels = table["emotion"].to_pylist()
    labels[7] = "bored"
    place = table.schema.get_field_index("emotion")
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(labels)), path)
    with pytest.raises(ManifestError, match=r"row 7 \(uid 'mine/7'\).*'bored' is not in"):
        check_manifest(path)


# The paper


def test_the_paper_adds_up_as_it_does() -> None:
    """Numbers of Table 1 and Table 2, typed from the paper, against the rows."""
    table_1 = {
        "mer2023": 3784, "meld": 13798, "iemocap": 10039, "caer": 13175, "e3": 16320, "dfew": 11697,
        "mafw": 10045, "mc-eiu": 10830, "mosi": 2199, "mosei": 22856, "sims-v2": 4403, "bold": 10072,
    }  # fmt: skip
    table_2 = {
        "mer2023": 411, "mer2024": 1169, "meld-e": 2610, "iemocap": 1241, "caer": 3953, "e3": 3288,
        "dfew": 2341, "mafw": 1839, "mc-eiu": 3249, "mosi": 686, "mosei": 4659, "sims": 457,
        "sims-v2": 1034, "meld-s": 3719, "mafw-m": 580, "bold": 1116, "ov-merd": 532, "mc-eiu-i": 3249,
    }  # fmt: skip
    rows = [corpus_row(name) for name in corpus_ids()]
    assert {r.id: r.expected.mmeverse for r in rows if r.expected.mmeverse} == table_1
    assert {b: n for r in rows for b, n in r.expected.benchmarks.items()} == table_2
    assert [b for names in BENCHMARK_GROUPS.values() for b in names] == list(table_2)
    assert sum(table_1.values()) == 129_218 == 129_128 + 90
    assert sum(table_2.values()) == 36_133
    first, second = paper_facts()
    assert first == (
        "Table 1 sums to 129,218 over 12 corpora, the paper's text says 129,128: 90 more. MELD is "
        "printed as 13,798, and its files hold 9,989 + 1,109 + 2,610 = 13,708, 90 fewer."
    )
    assert second.startswith("Table 2 sums to 36,133 over 18 benchmarks.")
    assert "records of MAFW, MC-EIU and MELD serve two benchmarks each" in second


def test_a_part_of_mmeverse_is_checked_for_what_it_has(tmp_path: Path) -> None:
    """Two complete corpora and one record of a third: only the third has unexplained counts."""
    sizes = {
        "mosi": {"train": 1284, "val": 229, "test": 686},
        "sims-v2": {"train": 2722, "val": 647, "test": 1034},
        "e3": {"test": 1},
    }
    path = tmp_path / "m.parquet"
    head = header("mosi", "sims-v2", sentiment=("positive", "neutral", "negative"))
    with ManifestWriter(path, head) as writer:
        for corpus, splits in sizes.items():
            for split, n in splits.items():
                for i in range(n):
                    benchmarks = (corpus,) if split == "test" else ()
                    uid = f"{corpus}/{split[:2]}{i}"
                    sentiment = None if corpus == "e3" else "positive"
                    writer.write(
                        record(uid, split, None, benchmarks=benchmarks, sentiment=sentiment)
                    )
    found = check_manifest(path)
    status = Counter((c.corpus, c.status) for c in found.counts)
    assert status == {("mosi", "equal"): 5, ("sims-v2", "equal"): 5, ("e3", "unexplained"): 2}
    assert found.facts[2].startswith(
        "Here: 6,603 records of 3 of the 12 corpora, which Table 1 counts as 22,922; without bold, "
    )
    assert found.facts[3] == "Here: 1,721 evaluation items of 3 of the 18 benchmarks."


def test_real_meld_is_as_its_row_says(shared_annotations: Path, tmp_path: Path) -> None:
    from extract.index import index_corpus, write

    found = index_corpus(corpus_row("meld"), shared_annotations / "meld", tmp_path / "m.parquet")
    write(tmp_path / "m.parquet", found)
    report = check_manifest(tmp_path / "m.parquet")
    assert report.is_clean
    assert len(report.counts) == 16
    (deviation,) = report.deviations
    assert (deviation.what, deviation.expected, deviation.found) == ("Table 1", 13_798, 13_708)
    assert deviation.status == "explained"
    assert deviation.reason is not None
    assert "9,989 + 1,109 + 2,610 = 13,708" in deviation.reason
    assert of(report, "parent") == []
    (speakers,) = of(report, "speaker")
    assert speakers.severity == "note"


@pytest.mark.fault("wrong counts")
def test_real_meld_that_lost_a_row_is_not(shared_annotations: Path, tmp_path: Path) -> None:
    from cache.selection import filter_manifest
    from extract.index import index_corpus, write

    found = index_corpus(corpus_row("meld"), shared_annotations / "meld", tmp_path / "m.parquet")
    write(tmp_path / "m.parquet", found)
    filter_manifest(tmp_path / "m.parquet", tmp_path / "f.parquet", ["uid!=meld/dev_dia0_utt0"])
    report = check_manifest(tmp_path / "f.parquet")
    assert not report.is_clean
    bad = {c.what: c.found - c.expected for c in report.counts if c.status == "unexplained"}
    assert bad["split val"] == -1
    assert bad["benchmark meld-s"] == -1
    assert bad["Table 1"] == -91  # one more than what is known
    assert sum(n for what, n in bad.items() if what.startswith("emotion ")) == -1


@pytest.fixture
def shared_annotations() -> Path:
    folder = Path(__file__).resolve().parents[2] / "shared" / "annotations"
    if not folder.is_dir():
        pytest.skip("needs the real annotation files in ../shared/annotations")
    return folder
