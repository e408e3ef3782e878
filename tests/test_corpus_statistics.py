"""Statistics of manifests, against pandas, the task table and counting by hand."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cache.clip import Description, Peak, Record, Subtitle
from cache.labels import LABEL_FIELDS
from cache.manifest import Header, ManifestWriter
from eval.corpora.plots import FAMILIES, draw_corpus
from eval.corpora.report import write_corpus_report
from eval.corpora.statistics import CorpusStatistics, Histogram, measure_corpus, total
from extract.annotate.evidence.action_units import load_units, unit_frequencies
from extract.corpora.registry import corpus_ids, corpus_row
from tests.small_corpora import header, record, write
from train.text.tasks import TASK_TABLE, available_tasks

CREATED = "2026-01-02T03:04:05+00:00"


def by_hand(tmp_path: Path) -> Path:
    """Eight records of two corpora."""
    head = header(
        "a", "b", emotion=("happy", "sad", "shy"), sentiment=("positive", "negative"),
        emotion_multi=("happy", "sad"),
    )  # fmt: skip
    said = (
        Subtitle(text="hello", language="en"),
        Subtitle(text="nihao", language="zh", origin="translation"),
    )
    records = [
        record("a/1", "train", emotion="happy", duration_s=1.0, parent="d1", speaker="s1", subtitles=said),
        record("a/2", "train", emotion="sad", duration_s=3.0, parent="d1", speaker="s2"),
        record("a/3", "test", emotion="happy", duration_s=8.0, has_video=False, benchmarks=("x",)),
        record("a/4", None, clip=None, language="en"),
        record(
            "b/1", "test", "a/3", emotion="happy", sentiment="positive", has_audio=False, parent="d1",
            benchmarks=("x", "y"), action_units={"AU06": 2.0, "AU12": 1.0, "AU04": 0.99},
            peak=Peak(index=1), sentiment_score=0.5,
        ),
        record(
            "b/2", "dev", emotion="sad", sentiment="negative", emotion_multi=("happy", "sad"),
            action_units={"AU12": 0.5, "AU04": 3.0}, valence=1.0,
        ),
        record(
            "b/3", "dev", sentiment="negative", emotion_multi=("sad",),
            subtitles=(Subtitle(text="x", origin="asr:w"),),
            descriptions=(
                Description(kind="multimodal", text="t", target="sentiment", model="m", version="1"),
                Description(kind="audio_tone", text="t"),
                Description(kind="audio_tone", text="u"),
            ),
        ),
        record("b/4", "dev", action_units={"AU45": 5.0}),
    ]  # fmt: skip
    return write(tmp_path / "hand.parquet", records, head)


def test_counts_by_hand(tmp_path: Path) -> None:
    found = measure_corpus(by_hand(tmp_path))
    assert found.name == "hand.parquet"
    a, b, both = found.corpora["a"], found.corpora["b"], found.together
    assert (a.n_records, b.n_records, both.n_records) == (4, 4, 8)
    assert list(both.splits.items()) == [("train", 2), ("test", 2), ("dev", 3), ("no split", 1)]
    assert (a.n_clips, b.n_clips, both.n_clips) == (3, 4, 6)  # b/1 is a/3
    assert (a.n_parents, b.n_parents, both.n_parents) == (1, 1, 2)  # d1 of b is another one
    assert (a.n_speakers, b.n_speakers) == (2, 0)
    assert a.durations is not None
    assert a.durations.n == 3
    assert a.durations.hours * 3600 == pytest.approx(12.0)
    assert a.durations.mean_s == 4.0
    assert a.durations.median_s == 3.0
    assert a.durations.quantiles_s[0] == 1.0
    assert a.durations.quantiles_s[-1] == 8.0
    assert b.durations is None
    assert (a.n_unseen, a.n_without_video, a.n_without_audio) == (1, 1, 0)
    assert (b.n_unseen, b.n_without_video, b.n_without_audio) == (0, 0, 1)
    assert (a.n_without_subtitle, b.n_without_subtitle) == (3, 3)
    assert (a.n_without_label, b.n_without_label) == (1, 1)
    assert (both.n_with_score, both.n_with_dimensions, both.n_with_peak) == (1, 1, 1)
    assert both.n_with_units == 3
    assert (a.languages, b.languages) == ({"en": 1}, {})
    assert a.subtitles == {"en, official": 1, "zh, translation": 1}
    assert b.subtitles == {"?, asr:w": 1}
    assert found.labels == {
        "emotion": {
            "a": {"happy": {"train": 1, "test": 1}, "sad": {"train": 1}, "shy": {}},
            "b": {"happy": {"test": 1}, "sad": {"dev": 1}, "shy": {}},
        },
        "emotion_multi": {"b": {"happy": {"dev": 1}, "sad": {"dev": 2}}},
        "sentiment": {"b": {"positive": {"test": 1}, "negative": {"dev": 2}}},
    }
    assert list(found.labels["emotion"]["a"]) == ["happy", "sad", "shy"]
    assert [tuple(d.model_dump().values()) for d in found.descriptions] == [
        ("audio_tone", None, None, None, 2),
        ("multimodal", "sentiment", "m", "1", 1),
    ]
    assert found.benchmarks == {"x": 2, "y": 1}
    units = found.action_units
    assert units is not None
    assert units.present_from == load_units().present_from == 1.0
    assert units.units == {"AU04": 1, "AU06": 1, "AU12": 1, "AU45": 1}
    assert units.n_records == 3
    assert units.n_of_emotion == {"happy": 1, "sad": 1}
    assert units.by_emotion == {"happy": {"AU06": 1, "AU12": 1}, "sad": {"AU04": 1}}
    assert b.tasks == {
        "emotion": 2, "sentiment": 3, "multi-label": 2, "think-sentiment": 1, "reason": 1, "audio": 1,
    }  # fmt: skip
    # Round trip of what is written beside the page.
    assert CorpusStatistics.model_validate_json(found.model_dump_json()) == found


def random_records(n: int, seed: int) -> tuple[Header, list[Record]]:
    """Records with everything that a record may have, present or not by chance."""
    rng = random.Random(seed)
    head = header(
        "a", "b", "c", emotion=tuple("pqrs"), emotion_multi=tuple("pqrs"), sentiment=("up", "down"),
        intent=("go", "stay"), emotion_ov=("one", "two"),
    )  # fmt: skip

    def maybe(*values: str) -> str | None:
        return rng.choice((None, *values))

    kinds = ("visual_expression", "visual_objective", "audio_tone", "multimodal")
    records = []
    for i in range(n):
        descriptions = []
        for _ in range(rng.randrange(4)):
            kind = rng.choice(kinds)
            target = rng.choice((None, *LABEL_FIELDS)) if kind == "multimodal" else None
            descriptions.append(
                Description(kind=kind, text="t", target=target, model=maybe("m1", "m2"))
            )
        records.append(
            record(
                f"{rng.choice('abc')}/{i}",
                maybe("train", "test"),
                rng.choice((None, "", "twice")),
                duration_s=rng.choice((None, rng.lognormvariate(1, 1))),
                has_video=rng.choice((None, True, False)),
                has_audio=rng.choice((None, True, False)),
                emotion=maybe(*"pqrs"),
                emotion_multi=tuple(rng.sample("pqrs", rng.randrange(3))),
                emotion_ov=tuple(rng.sample(("one", "two"), rng.randrange(3))),
                sentiment=maybe("up", "down"),
                intent=maybe("go", "stay"),
                parent=maybe("x", "y"),
                language=maybe("en", "zh"),
                benchmarks=tuple(rng.sample(("b1", "b2"), rng.randrange(3))),
                subtitles=tuple(
                    Subtitle(text="t", language=maybe("en"), origin=o)
                    for o in rng.sample(("official", "asr:w"), rng.randrange(3))
                ),
                action_units={
                    u: round(5 * rng.random(), 2)
                    for u in rng.sample(("AU01", "AU06", "AU12", "AU45"), rng.randrange(5))
                },
                descriptions=tuple(descriptions),
            )
        )
    return head, records


@pytest.mark.parametrize("seed", range(3))
def test_counts_agree_with_pandas_and_with_the_task_table(seed: int, tmp_path: Path) -> None:
    import pandas as pd

    head, records = random_records(5000, seed)  # more than a row group
    path = write(tmp_path / "m.parquet", records, head)
    found = measure_corpus(path)
    frame = pd.DataFrame(
        {
            "corpus": [r.corpus for r in records],
            "split": [r.split or "no split" for r in records],
            "emotion": [r.emotion for r in records],
            "multi": [r.emotion_multi for r in records],
            "seconds": [r.clip and r.clip.duration_s for r in records],
            "sha": [r.clip and r.clip.sha256 for r in records],
            "parent": [r.parent for r in records],
            "has_audio": [r.clip and r.clip.has_audio for r in records],
            "tasks": [available_tasks(r) for r in records],
            "benchmarks": [r.benchmarks for r in records],
        }
    )
    for corpus, part in frame.groupby("corpus"):
        one = found.corpora[str(corpus)]
        assert one.splits == part["split"].value_counts().to_dict()
        assert one.n_clips == part["sha"].nunique()
        assert one.n_parents == part["parent"].nunique()
        assert one.n_without_audio == int((part["has_audio"] == False).sum())  # noqa: E712
        assert one.n_unseen == int(part["sha"].isna().sum())
        assert one.tasks == part["tasks"].explode().value_counts().to_dict()
        assert one.durations is not None
        seconds = part["seconds"].dropna().astype(float)
        assert one.durations.n == len(seconds)
        np.testing.assert_allclose(
            one.durations.quantiles_s, seconds.quantile([0, 0.05, 0.25, 0.5, 0.75, 0.95, 1])
        )
        for field, name in (("emotion", "emotion"), ("emotion_multi", "multi")):
            counted = part.explode(name).groupby([name, "split"]).size()
            labels = found.labels[field][str(corpus)]  # type: ignore[index]
            assert {(k, s): n for k, v in labels.items() for s, n in v.items()} == counted.to_dict()
    assert found.benchmarks == frame["benchmarks"].explode().value_counts().to_dict()
    tasks = Counter(task for r in records for task in available_tasks(r))
    assert found.together.tasks == tasks
    assert set(tasks) == set(TASK_TABLE)  # every task of the table was in play
    units = unit_frequencies([r.action_units for r in records if r.action_units])
    assert found.action_units is not None
    assert found.action_units.units == {unit: one.n for unit, one in units.items()}
    assert found.durations is not None
    assert sum(found.durations.counts) == frame["seconds"].notna().sum()
    assert found.durations.n_beyond == (frame["seconds"] > found.durations.edges[-1]).sum()


def test_real_meld_has_its_histogram(tmp_path: Path) -> None:
    """Counted by csv from the files, split by split."""
    import csv

    from extract.index import index_corpus
    from extract.index import write as write_indexed

    folder = Path(__file__).resolve().parents[2] / "shared" / "annotations" / "meld"
    if not folder.is_dir():
        pytest.skip("needs the real annotation files in ../shared/annotations")
    indexed = index_corpus(corpus_row("meld"), folder, tmp_path / "m.parquet")
    write_indexed(tmp_path / "m.parquet", indexed)
    found = measure_corpus(tmp_path / "m.parquet")
    for native, split in (("train", "train"), ("dev", "val"), ("test", "test")):
        with (folder / f"{native}_sent_emo.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        counted = Counter("sad" if r["Emotion"] == "sadness" else r["Emotion"] for r in rows)
        assert {k: v[split] for k, v in found.labels["emotion"]["meld"].items()} == counted
        assert found.together.splits[split] == len(rows)
    assert found.benchmarks == {"meld-s": 3719, "meld-e": 2610}


def test_an_empty_manifest_and_one_without_anything(tmp_path: Path) -> None:
    with ManifestWriter(tmp_path / "e.parquet", Header(media_root=".")):
        pass
    found = measure_corpus(tmp_path / "e.parquet")
    assert found.together.n_records == 0
    assert found.corpora == {}
    bare = write(tmp_path / "b.parquet", [record("a/1", None, clip=None)])
    found = measure_corpus(bare)
    assert (found.labels, found.descriptions, found.action_units) == ({}, (), None)
    assert list(draw_corpus(found)) == ["splits"]
    write_corpus_report(found, tmp_path / "out", CREATED)


@pytest.mark.parametrize("longest", [0.05, 3.0, 40.0, 900.0])
def test_bins_of_durations_are_round_and_lose_nothing(longest: float, tmp_path: Path) -> None:
    values = np.linspace(longest / 500, longest, 500)
    path = write(
        tmp_path / "m.parquet",
        [record(f"a/{i}", duration_s=float(v)) for i, v in enumerate(values)],
    )
    found = measure_corpus(path).durations
    assert found is not None
    assert sum(found.counts) == 500
    assert found.n_beyond == (values > found.edges[-1]).sum() <= 6
    assert 20 <= len(found.counts) <= 60
    width = found.edges[1]
    assert f"{width:.0e}"[0] in "125" or str(width).strip("0.").startswith("25")


def test_every_emotion_of_the_rows_has_a_family_or_is_known_not_to() -> None:
    kin = {label for _, labels in FAMILIES.values() for label in labels}
    rest = {
        label
        for name in corpus_ids()
        for field, space in corpus_row(name).spaces.items()
        for label in space.labels
        if field == "emotion" and label not in kin
    }
    assert rest == {
        "sarcastic", "shy", "frustration", "contempt", "disappointment", "helplessness", "boredom",
        "peaceful", "powerful", "doubt",
    }  # fmt: skip


def test_the_page_says_what_was_counted_and_needs_nothing_else(tmp_path: Path) -> None:
    found = measure_corpus(by_hand(tmp_path))
    html, markdown = write_corpus_report(found, tmp_path / "out", CREATED)
    page, text = html.read_text(), markdown.read_text()
    assert not re.search(r"(src|href)=\"(?!#)", page)
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert "<script" not in page
    names = set(draw_corpus(found))
    assert names == {
        "splits", "labels-emotion", "labels-emotion_multi", "labels-sentiment", "families", "durations",
        "action-units", "action-units-by-emotion", "benchmarks",
    }  # fmt: skip
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"corpus.html", "corpus.md", "corpus.json"} | {
        f"corpus-{name}.{suffix}" for name in names for suffix in ("png", "svg")
    }
    assert set(re.findall(r"\]\((.*?)\)", text)) == {f"corpus-{name}.png" for name in names}
    assert page.count("<figure>") == len(names)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))  # figures do not take each other's clip paths
    for row in (
        "| a | 4 | 2 | 1 |",
        "| shy | \N{EN DASH} |",
        "| multimodal | sentiment | m 1 | 1 |",
    ):
        assert row in text
    saved = (tmp_path / "out" / "corpus.json").read_text()
    assert CorpusStatistics.model_validate_json(saved) == found
    # Equal data, equal files.
    write_corpus_report(found, tmp_path / "again", CREATED)
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_an_svg_file_stands_alone(tmp_path: Path) -> None:
    import xml.etree.ElementTree as ElementTree

    write_corpus_report(measure_corpus(by_hand(tmp_path)), tmp_path / "out", CREATED)
    for path in (tmp_path / "out").glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in path.read_text()
        assert "currentColor" not in path.read_text()


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('$x|y')</script>"
    records = [record("a/1", evil, speaker=evil, language=evil, benchmarks=(evil,))]
    path = write(tmp_path / "m.parquet", records)
    html, markdown = write_corpus_report(measure_corpus(path), tmp_path / "out", CREATED)
    for page in (html.read_text(), markdown.read_text()):
        assert "<script" not in page
        assert "alert(" in page
    assert not re.search(r"(?<!\\)\|y", markdown.read_text())


def test_a_figure_shows_the_numbers(tmp_path: Path) -> None:
    """The SVG has real text: shares of each corpus, read back from the drawing."""
    found = measure_corpus(by_hand(tmp_path))
    svg = draw_corpus(found)["labels-emotion"].svg
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert [t for t in texts if t.startswith(("a ", "b "))] == ["a  n = 3", "b  n = 2"]
    counts = {k: total(v) for k, v in found.labels["emotion"]["a"].items()}
    assert counts == {"happy": 2, "sad": 1, "shy": 0}
    assert [t for t in texts if re.fullmatch(r"\d+\.\d", t)] == [
        "66.7",
        "33.3",
        "0.0",
        "50.0",
        "50.0",
        "0.0",
    ]
    histogram = draw_corpus(found)["durations"].svg
    assert "median 3.00 s" in histogram
    assert isinstance(found.durations, Histogram)
