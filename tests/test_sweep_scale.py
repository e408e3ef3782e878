"""What a sweep at demo scale runs on: clips dealt out to corpora, faces, weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from cache.clip import Clip, Description, Record, Subtitle
from cache.errors import SchemaError
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, media_root, read_manifest
from eval.benchmarks import benchmarks
from eval.sweep import scale
from eval.sweep.file import parse_sweep, read_sweep
from eval.sweep.rows import rows_of, trials_of
from eval.sweep.scale import deal, demo_material, scores_at
from eval.sweep.schema import SweepFile, Trial
from extract.corpora.demo import EMOTIONS, describe, plan_demo, write_demo_corpus
from extract.openface_tables import find_table
from train.config import stage_tasks
from train.scaling import bundled_file
from train.text.tasks import available_tasks, tasks_of

MMEVERSE = (
    "mer2023 meld iemocap caer e3 dfew mafw mc-eiu mosi mosei sims-v2 bold".split()
)  # paper, Table 1


TWO_CORPORA = """
name: two
title: Two
preset: v2-perception-only
scores: [{name: f1, heading: F1, kind: split}]
rows:
  - {name: coarse, set: {data.corpora: [merr-coarse]}}
  - {name: fine, set: {data.corpora: [merr-fine]}}
"""


def _trials(sweep: SweepFile) -> tuple[Trial, ...]:
    return trials_of(sweep, rows_of(sweep), "demo")


def _planned(n_clips: int) -> Manifest:
    """The demo corpus's records, without a clip drawn."""
    records = tuple(
        Record(
            uid=f"demo/{row.file[:-4]}",
            media=row.file,
            clip=Clip(sha256=f"{row.index:064x}", n_bytes=1, n_frames=row.n_frames),
            split=row.split,
            emotion=row.label,
            subtitles=(Subtitle(text=row.subtitle),),
            descriptions=(Description(kind="multimodal", text=describe(row.label)),),
        )
        for row in plan_demo(n_clips, seed=0)
    )
    spaces = {"demo/emotion": LabelSpace(name="demo/emotion", labels=tuple(EMOTIONS))}
    return Manifest(header=Header(media_root=".", label_spaces=spaces), records=records)


@pytest.fixture(scope="module")
def plain() -> Manifest:
    """36 clips."""
    return _planned(36)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus of 12 clips, which all tests of this module share."""
    folder = tmp_path_factory.mktemp("demo")
    write_demo_corpus(folder, n_clips=12)
    return folder


@pytest.fixture
def out(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a sweep whose clips are those of the corpus."""
    monkeypatch.setattr(scale, "N_CLIPS", 12)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "corpus").symlink_to(corpus)
    return tmp_path


# Dealing


def test_every_corpus_gets_its_share_of_each_emotion_and_split(plain: Manifest) -> None:
    dealt = deal(plain, {"a": 0.5, "b": 0.5})
    counts = Counter((r.emotion, r.split, r.corpus) for r in dealt.records)
    # Of six clips of an emotion four are for training.
    assert counts == {
        (emotion, split, corpus): n
        for emotion in EMOTIONS
        for split, n in (("train", 2), ("test", 1))
        for corpus in "ab"
    }


def test_unequal_shares_are_kept_to_within_a_clip(plain: Manifest) -> None:
    shares = {"large": 3.0, "middle": 2.0, "small": 1.0}
    counts = Counter(r.corpus for r in deal(plain, shares).records)
    assert all(abs(counts[name] - 36 * share / 6) <= 1 for name, share in shares.items())


def test_a_dealt_record_is_the_same_clip_with_the_same_truth(plain: Manifest) -> None:
    dealt = {r.media: r for r in deal(plain, {"mer2023": 1.0, "meld": 1.0}).records}
    assert set(dealt) == {r.media for r in plain.records}
    for record in plain.records:
        other = dealt[record.media]
        assert (other.clip, other.emotion, other.split) == (
            record.clip,
            record.emotion,
            record.split,
        )
        assert other.uid.partition("/")[2] == record.uid.partition("/")[2]
        assert [s.language for s in other.subtitles] == ["en", "zh"]
        assert other.subtitles[0].text == record.subtitles[0].text
        assert other.peak is not None
        assert other.clip is not None
        assert 0 <= other.peak.index < (other.clip.n_frames or 0)


def test_records_have_the_labels_that_their_corpus_is_known_for(plain: Manifest) -> None:
    dealt = deal(plain, dict.fromkeys(MMEVERSE, 1.0))
    for record in dealt.records:
        for row in benchmarks().values():
            if row.corpus == record.corpus:
                assert record.labels_of(row.field), (record.uid, row.field)
                assert dealt.header.space(record.corpus, row.field)


def test_a_name_says_nothing_of_the_label(plain: Manifest) -> None:
    for record in deal(plain, {"merr-fine": 1.0}).records:
        assert record.emotion is not None
        assert record.emotion not in record.uid
        assert record.emotion not in record.subtitles[0].text


def test_the_finer_descriptions_of_merr_fine_are_marked(plain: Manifest) -> None:
    for record in deal(plain, {"merr-fine": 1.0}).records:
        texts = [d for d in record.descriptions if d.kind == "multimodal"]
        assert [text.version for text in texts] == ["fine", "coarse"]


def test_more_corpora_than_clips_are_refused(plain: Manifest) -> None:
    with pytest.raises(
        SchemaError, match=r"36 clips are too few for 40 corpora: .* none to train on"
    ):
        deal(plain, {f"c{i}": 1.0 for i in range(40)})


def test_what_a_set_of_corpora_gets_is_split_among_its_members() -> None:
    counts = Counter(
        r.corpus for r in deal(_planned(108), scale._shares(_trials(read_sweep("table7")))).records
    )
    assert set(counts) == {"merr-coarse", "merr-fine", "mer-caption-plus", *MMEVERSE}
    assert [counts[c] for c in ("merr-coarse", "merr-fine", "mer-caption-plus")] == [27, 27, 27]
    assert {counts[corpus] for corpus in MMEVERSE} <= {2, 3}


@pytest.mark.parametrize("name", ["table7", "released", "v1-instructions", "table11"])
def test_every_row_finds_records_that_can_answer_what_it_asks(name: str) -> None:
    trials = _trials(read_sweep(name))
    dealt = deal(_planned(scale.N_CLIPS), scale._shares(trials))
    for trial in trials:
        data = trial.preset.data
        train = [
            record
            for record in dealt.records
            if record.split == "train" and (data.corpora is None or record.corpus in data.corpora)
        ]
        assert {r.corpus for r in train} >= set(data.corpora or ())
        for stage in trial.preset.stages:
            for corpus in stage.corpora or [None]:
                own = [record for record in train if corpus in (None, record.corpus)]
                for asked in stage_tasks(stage, corpus):
                    tasks = set(tasks_of(asked))
                    assert any(tasks & set(available_tasks(r)) for r in own), (trial.row, corpus)


# Material


def test_material_is_made_once(out: Path) -> None:
    sweep = parse_sweep(TWO_CORPORA, "two.yaml")
    seen: list[int] = []
    made = demo_material(out, sweep, _trials(sweep), on_clip=lambda: seen.append(1))
    assert len(seen) == 12
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert demo_material(out, sweep, _trials(sweep)) == made
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    manifest = read_manifest(made.manifest)
    assert media_root(manifest, made.manifest) == made.media.resolve()
    assert Counter(r.corpus for r in manifest.records) == {"merr-coarse": 6, "merr-fine": 6}
    assert all(find_table(made.faces, record) is not None for record in manifest.records)


def test_bundled_weights_are_used_where_there_are_any(out: Path) -> None:
    sweep = read_sweep("table9")
    trials = _trials(sweep)
    made = demo_material(out, sweep, trials)
    specs = {spec.canonical_json(): spec for trial in trials for spec in trial.preset.tokens.all()}
    assert {key: path.name for key, path in made.weights.items()} == {
        key: bundled_file(spec.encoder) for key, spec in specs.items()
    }
    assert {r.corpus for r in read_manifest(made.manifest).records} == {"demo"}
    assert not (out / "demo" / "weights").exists()


@pytest.mark.slow
def test_other_weights_are_made_up_and_each_network_has_its_own(out: Path) -> None:
    sweep = read_sweep("table11")
    trials = _trials(sweep)
    made = demo_material(out, sweep, trials)
    specs = {spec.canonical_json(): spec for trial in trials for spec in trial.preset.tokens.all()}
    assert set(made.weights) == set(specs)
    paths = {specs[key].encoder.model_dump_json(): path for key, path in made.weights.items()}
    assert len(set(paths.values())) == len(paths) == 7
    assert all(path.exists() for path in paths.values())


def test_clips_that_were_dealt_to_other_corpora_are_not_dealt_again(out: Path) -> None:
    sweep = parse_sweep(TWO_CORPORA, "two.yaml")
    demo_material(out, sweep, _trials(sweep))
    other = read_sweep("table9")
    with pytest.raises(
        SchemaError, match=r"dealt out to other corpora than the rows of sweep 'table9'"
    ):
        demo_material(out, other, _trials(other))


def test_benchmarks_become_the_test_split_of_the_demo_corpus() -> None:
    sweep = read_sweep("table9")
    assert scores_at(sweep, "full") == sweep.scores
    small = scores_at(sweep, "demo")
    assert [(s.name, s.heading) for s in small] == [(s.name, s.heading) for s in sweep.scores]
    assert {(s.kind, s.split, s.task, s.metric, s.sets) for s in small} == {
        ("split", "test", "emotion", "weighted_f1", ())
    }
    text = (
        "{name: a, title: A, preset: v2, scores: [{name: f, heading: F, kind: split, split: val, "
        "task: sentiment, metric: uar}], grid: {seed: [1]}}"
    )
    own = parse_sweep(text, "a.yaml")
    assert scores_at(own, "demo") == own.scores
