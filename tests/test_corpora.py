"""The rows of the corpora: every layout of every one is read from a small copy of it, exactly."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import emocache
from cache.manifest import read_manifest
from extract.corpora import registry
from extract.corpora.readers import READERS
from extract.corpora.row import Cell, CorpusRow, Join, Source
from extract.corpora.templates import columns_of
from extract.index import index_corpus
from tests.corpus_trees import TREES, Tree, as_data
from tests.tree_files import put_media

DOCS = Path(__file__).parents[1] / "docs" / "corpora.md"
PAPER = Path(__file__).parents[2] / "shared" / "papers" / "emotion-llama-v2-mmeverse.md"

BENCHMARKS = (
    "mer2023", "mer2024", "meld-e", "iemocap", "mosi", "mosei", "sims", "sims-v2", "ov-merd",
    "caer", "e3", "dfew", "mafw", "mafw-m", "bold", "meld-s", "mc-eiu", "mc-eiu-i",
)  # fmt: skip
REQUIRED = (
    "mer2023", "mer2024", "meld", "iemocap", "caer", "e3", "dfew", "mafw", "mc-eiu", "mosi", "mosei",
    "sims", "sims-v2", "bold", "ov-merd", "emer", "merr-coarse", "merr-fine", "mer-caption-plus",
    "emorynlp", "crema-d", "emodb",
)  # fmt: skip
ROWS = {name: registry.corpus_row(name) for name in registry.corpus_ids()}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
trees = pytest.mark.parametrize("tree", TREES, ids=[t.name for t in TREES])


def _sources(row: CorpusRow) -> list[Source]:
    return [s for layout in row.layouts.values() for s in (*layout.sources, *layout.joins)]


# Round trips


def test_every_layout_of_every_row_has_a_tree() -> None:
    have = {(tree.corpus, tree.layout) for tree in TREES}
    assert have == {(name, layout) for name, row in ROWS.items() for layout in row.layouts}
    assert len({tree.name for tree in TREES}) == len(TREES)
    assert set(REQUIRED) <= set(ROWS)


@trees
def test_a_tree_gives_exactly_its_records(tree: Tree, tmp_path: Path) -> None:
    folder = tmp_path / "data set"
    folder.mkdir()
    expected = tree.make(folder)
    put_media(folder, expected)

    asked = None if tree.is_chosen else tree.layout
    found = index_corpus(
        ROWS[tree.corpus], folder, tmp_path / "m.parquet", media=folder, layout=asked
    )

    # HDF5 groups come in alphabetical order, files of a pattern too.
    records = sorted(found.records, key=lambda r: r.uid)
    assert found.report.layout == tree.layout
    assert [as_data(record) for record in records] == sorted(expected, key=lambda r: r["uid"])
    # The media were opened, and hold what their suffix says.
    for record in records:
        assert record.clip is not None
        assert record.clip.has_video is not record.media.endswith(".wav")
    assert not found.report.suspicious
    assert not found.report.left_out
    assert found.header.media_root == "data set"
    assert found.header.corpora[tree.corpus].licence


@trees
def test_labels_are_read_without_media(tree: Tree, tmp_path: Path) -> None:
    # With the media beside it would be the dataset's own file names that are read (CAER, EmoDB).
    expected = tree.make(tmp_path)
    if ROWS[tree.corpus].layouts[tree.layout].sources[0].reader in ("paths", "emodb"):
        put_media(tmp_path, expected)

    found = index_corpus(ROWS[tree.corpus], tmp_path, tmp_path / "m.parquet", layout=tree.layout)

    records = sorted(found.records, key=lambda r: r.uid)
    for record, wanted in zip(records, sorted(expected, key=lambda r: r["uid"]), strict=True):
        assert record.clip is None
        assert {**as_data(record), "media": ""} == {**wanted, "media": ""}


@pytest.mark.parametrize(
    "tree", [t for t in TREES if not t.variant], ids=[t.name for t in TREES if not t.variant]
)
def test_the_command_writes_the_same_records(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tree.make(tmp_path)
    put_media(tmp_path, expected)
    out = tmp_path / "m.parquet"
    command = ["index", tree.corpus, tmp_path, "--media", tmp_path, "--out", out]
    asked = [] if tree.is_chosen else ["--layout", tree.layout]

    code = emocache.main([str(a) for a in (*command, *asked)])

    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    manifest = read_manifest(out)
    records = sorted(manifest.records, key=lambda r: r.uid)
    assert [as_data(record) for record in records] == sorted(expected, key=lambda r: r["uid"])
    row = ROWS[tree.corpus]
    for field, space in row.spaces.items():
        assert manifest.header.space(tree.corpus, field) == space
    assert {k.partition("/")[2]: v for k, v in manifest.header.scales.items()} == row.scales


def test_the_command_lists_every_corpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert emocache.main(["index", "--list"]) == 0
    shown = capsys.readouterr().out.split()
    assert set(ROWS) <= set(shown)


def test_every_label_field_and_benchmark_occurs_in_the_trees(tmp_path: Path) -> None:
    seen: set[str] = set()
    for number, tree in enumerate(TREES):
        folder = tmp_path / str(number)
        folder.mkdir()
        for record in tree.make(folder):
            seen.update(record)
            seen.update(record.get("benchmarks", ()))
    assert {*BENCHMARKS, "emotion", "emotion_multi", "emotion_ov", "sentiment", "intent", "peak",
            "sentiment_score", "valence", "arousal", "dominance", "person", "parent", "speaker",
            "split_axes", "descriptions"} <= seen  # fmt: skip


# Leaks


@rows
def test_ids_are_no_source_of_labels_or_splits(row: CorpusRow) -> None:
    for name, layout in row.layouts.items():
        fields = layout.fields
        ids = set(columns_of(fields.id))
        told = {
            "split": fields.split,
            "emotion": fields.emotion,
            "emotion_multi": fields.emotion_multi,
            "emotion_ov": fields.emotion_ov,
            "sentiment": fields.sentiment,
            "intent": fields.intent,
        }
        columns = {
            field: set(columns_of(cell.text))
            for field, cell in told.items()
            if isinstance(cell, Cell)
        }
        # What is taken out of an id by an expression is never a label nor a split.
        for source in layout.sources:
            for column, expression in source.options.get("parts", {}).items():
                if column in ids:
                    groups = set(re.compile(expression).groupindex)
                    assert not groups & set().union(*columns.values()), (name, groups)
        # An id that holds one of them says so.
        for field, used in columns.items():
            what = "split" if field == "split" else "label"
            if used & ids:
                assert what in layout.ids_hold, f"{row.id}, {name}: {what} in the id"


@pytest.mark.parametrize(
    ("corpus", "what"), [("caer", {"split", "label"}), ("meld", {"split"}), ("crema-d", {"label"})]
)
def test_ids_that_hold_a_secret_say_so(corpus: str, what: set[str]) -> None:
    for layout in ROWS[corpus].layouts.values():
        assert set(layout.ids_hold) == what


# Counts


def test_table_1_and_table_2_add_up() -> None:
    table_1 = {name: row.expected.mmeverse for name, row in ROWS.items() if row.expected.mmeverse}
    assert len(table_1) == 12
    assert sum(table_1.values()) == 129_218
    table_2 = Counter[str]()
    for row in ROWS.values():
        table_2.update(row.expected.benchmarks)
    assert set(table_2) == set(BENCHMARKS)
    assert sum(table_2.values()) == 36_133


@pytest.mark.skipif(not PAPER.is_file(), reason="needs the paper in ../shared/papers")
def test_counts_are_those_that_the_paper_prints() -> None:
    text = PAPER.read_text(encoding="utf-8")
    printed_1 = re.findall(r"^([\w\- ]+) \[\d+\]\t(\d+)\t", text, re.MULTILINE)
    names = {"CH-SIMS v2": "sims-v2", "CMU-MOSI": "mosi", "CMU-MOSEI": "mosei"}
    table_1 = {names.get(name, name.lower()): int(n) for name, n in printed_1}
    assert table_1 == {n: r.expected.mmeverse for n, r in ROWS.items() if r.expected.mmeverse}
    printed_2 = re.findall(r"^[✓✗]\t([\w\-+ ]+) \[\d+\]\t.*\t(\d+)$", text, re.MULTILINE)
    names |= {"CH-SIMS": "sims", "OV-MERD+": "ov-merd"}
    table_2 = {names.get(name, name.lower()): int(n) for name, n in printed_2}
    assert len(table_2) == 18
    assert table_2 == {k: v for row in ROWS.values() for k, v in row.expected.benchmarks.items()}


def test_each_benchmark_is_served_by_one_row() -> None:
    served = [rule.id for row in ROWS.values() for rule in row.benchmarks]
    assert sorted(served) == sorted(BENCHMARKS)
    for row in ROWS.values():
        assert {rule.id for rule in row.benchmarks} == set(row.expected.benchmarks)
        for rule in row.benchmarks:
            assert rule.needs in row.spaces
            known = {s for layout in row.layouts.values() for s in layout.splits.values()}
            known |= {
                s
                for layout in row.layouts.values()
                for by in layout.split_by.values()
                for s in by.values()
            }
            assert set(rule.splits) <= known
            assert set(rule.labels) <= set(row.spaces[rule.needs].labels)


@rows
def test_expected_counts_agree_with_each_other(row: CorpusRow) -> None:
    expected, total = row.expected, sum(row.expected.splits.values())
    for field, counts in expected.labels.items():
        assert set(counts) == set(row.spaces[field].labels)
        if total and field != "emotion_multi":
            assert sum(counts.values()) == total
    for rule in row.benchmarks:
        if rule.splits and set(rule.splits) <= set(expected.splits) and not rule.labels:
            counted = sum(expected.splits[s] for s in rule.splits)
            # Of MAFW's test clips only those that mix emotions are in mafw-m.
            if rule.needs == "emotion_multi":
                assert expected.benchmarks[rule.id] < counted
            else:
                assert expected.benchmarks[rule.id] == counted
    if expected.mmeverse and total and row.id not in ("meld", "mafw"):
        assert expected.mmeverse == total


def test_the_sums_in_known_deviations_are_right() -> None:
    number, n_sums = r"(?<!\w)\d[\d,]*", 0
    for row in ROWS.values():
        for note in row.expected.known:
            terms = rf"{number}(?: \+ {number})+"
            sums = re.findall(rf"({terms}) (?:=|are) ({number})", note)
            sums += [(b, a) for a, b in re.findall(rf"({number})[^.;()+]* \(({terms})\)", note)]
            for added, total in sums:
                n_sums += 1
                values = [int(t.replace(",", "")) for t in added.split(" + ")]
                assert sum(values) == int(total.replace(",", "")), (row.id, note)
    assert n_sums >= 8
    assert 13_798 - (9_989 + 1_109 + 2_610) == 90 == 129_218 - 129_128


# What the rows say


@rows
def test_a_row_says_where_it_comes_from(row: CorpusRow) -> None:
    assert row.title
    assert row.about.endswith(".")
    assert row.licence.endswith(".")
    for layout in row.layouts.values():
        assert layout.about
        fields = layout.fields
        labels = (fields.emotion, fields.emotion_multi, fields.emotion_ov, fields.sentiment)
        assert any((*labels, fields.sentiment_score, fields.descriptions))
    for note in row.expected.known:
        assert note.endswith(".")
        assert "\n" not in note


@rows
def test_a_row_uses_readers_and_fields_that_there_are(row: CorpusRow) -> None:
    for source in _sources(row):
        assert registry.reader(source.reader)
        for pattern in source.files:
            assert not pattern.startswith("/")
        if isinstance(source, Join):
            assert source.prefix, (
                f"{row.id}: joined columns need a prefix, or they hide typing errors"
            )
    for field in ("emotion", "emotion_multi", "sentiment", "intent"):
        named = any(getattr(layout.fields, field) for layout in row.layouts.values())
        assert named == (field in row.spaces)


def test_every_reader_is_used_or_for_users() -> None:
    used = {source.reader for row in ROWS.values() for source in _sources(row)}
    assert set(READERS) - used == {"npz"}


def test_label_sets_are_those_of_the_prompts() -> None:
    def labels(corpus: str, field: str = "emotion") -> str:
        return " ".join(ROWS[corpus].spaces[field].labels)  # type: ignore[index]

    assert labels("mer2023") == labels("mer2024") == "happy sad neutral angry worried surprise"
    assert labels("meld") == "anger disgust fear joy neutral sad surprise"
    assert labels("caer") == labels("mc-eiu") == "anger disgust fear happy neutral sad surprise"
    assert labels("iemocap") == (
        "anger happiness disgust surprise fear sadness excited neutral frustration"
    )
    assert labels("e3") == "angry disgusted happy sad sarcastic scared shy surprised"
    assert labels("dfew") == "angry disgust fear happy neutral sad surprise"
    assert labels("mc-eiu", "intent") == (
        "acknowledging agreeing consoling encouraging neutral questioning suggesting wishing"
    )
    assert (
        labels("mafw", "emotion_multi")
        == labels("mafw")
        == (
            "anger anxiety contempt disappointment disgust fear happiness helplessness neutral sadness "
            "surprise"
        )
    )
    assert len(ROWS["bold"].spaces["emotion_multi"].labels) == 26
    assert len(ROWS["ov-merd"].spaces["emotion_ov"].labels) == 19
    assert ROWS["ov-merd"].spaces["emotion_ov"].open


@pytest.mark.parametrize(
    ("corpus", "written", "label"),
    [
        ("meld", "Sadness", "sad"),
        ("dfew", "anger", "angry"),
        ("e3", "ANGER", "angry"),
        ("iemocap", "Exc", "excited"),
        ("emodb", "boredem", "boredom"),
        ("crema-d", "HAP", "happy"),
        ("caer", "Surprise", "surprise"),
    ],
)
def test_other_spellings_mean_a_label(corpus: str, written: str, label: str) -> None:
    assert ROWS[corpus].spaces["emotion"].find(written) == label


# Documentation


@rows
def test_documentation_has_a_section_and_the_command(row: CorpusRow) -> None:
    text = DOCS.read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    found = [s for s in sections if s.splitlines()[0] == f"{row.title} (`{row.id}`)"]
    assert len(found) == 1, f"docs/corpora.md: one section '## {row.title} (`{row.id}`)'"
    section = " ".join(found[0].split())
    assert f"emocache index {row.id} DIR --media DIR --out {row.id}.parquet" in section
    for name in row.layouts:
        assert f"`{name}`" in section, f"docs/corpora.md, {row.id}: layout {name} is not described"
    for name, count in row.expected.splits.items():
        assert f"{name} {count:,}" in section, f"docs/corpora.md, {row.id}: {name} {count:,}"
    if row.expected.mmeverse:
        assert f"{row.expected.mmeverse:,}" in section
    for name, count in row.expected.benchmarks.items():
        assert f"`{name}` {count:,}" in section
    # The deviations are told there too, word by word.
    for note in row.expected.known:
        assert note in section, f"docs/corpora.md, {row.id}: {note}"
