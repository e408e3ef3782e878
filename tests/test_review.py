"""Human verification: the sample, the file of ratings, and what follows from them."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score
from typer.testing import CliRunner

from cache.clip import Description, Record, Subtitle
from cache.errors import SchemaError
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, write_manifest
from eval.verbs.review import agreement_command, review_command
from extract.annotate.people.agreement import agreement, cohen_kappa
from extract.annotate.people.review import (
    ASPECTS,
    Rating,
    RatingsFile,
    Sampling,
    current_items,
    draw_sample,
    latest,
    read_ratings,
    review_item,
)

LABELS = ("happy", "sad", "angry", "neutral")
REPOSITORY = Path(__file__).resolve().parents[1]


def record_of(corpus: str, number: int, label: str, text: str = "They smile.") -> Record:
    return Record(
        uid=f"{corpus}/{number:04d}",
        media=f"{corpus}/{number:04d}.mp4",
        emotion=label,
        subtitles=(Subtitle(text="Hello there.", language="en"),),
        descriptions=(
            Description(kind="visual_objective", text="A person."),
            Description(kind="audio_tone", text="A low voice."),
            Description(kind="multimodal", text=text, target="emotion"),
        ),
    )


def records_of(corpus: str = "c", **counts: int) -> list[Record]:
    labels = [label for label, n in counts.items() for _ in range(n)]
    return [record_of(corpus, number, label) for number, label in enumerate(labels)]


def rating_of(record: Record, rater: str = "ann", **changes: object) -> Rating:
    item = review_item(record)
    assert item is not None
    aspects = {aspect: "accept" for aspect in item.aspects}
    fields = {
        "rater": rater,
        "uid": item.uid,
        "digest": item.digest,
        "target": item.target,
        "label": item.label,
        "aspects": aspects,
        **changes,
    }
    return Rating.model_validate(fields)


def sampled_labels(records: list[Record], sampling: Sampling) -> Counter[str]:
    return Counter(record.emotion or "" for record, _ in draw_sample(records, sampling).items)


# ---------------------------------------------------------------------------- the sample


def test_a_sample_is_spread_over_labels_as_they_occur() -> None:
    records = records_of(happy=500, sad=300, angry=190, neutral=10)
    # By hand: 50 seats are 25, 15, 9.5 and 0.5; the tenth half goes to the larger label, and the
    # rarest label keeps one seat.
    assert sampled_labels(records, Sampling()) == {
        "happy": 24, "sad": 15, "angry": 10, "neutral": 1
    }  # fmt: skip


def test_a_sample_has_as_many_of_every_corpus() -> None:
    records = [*records_of("big", happy=400, sad=400), *records_of("small", sad=30, angry=3)]
    sample = draw_sample(records, Sampling(per_corpus=20))
    assert Counter(item.corpus for _, item in sample.items) == {"big": 20, "small": 20}
    # Less than asked for is taken whole.
    sample = draw_sample(records, Sampling(per_corpus=50))
    assert Counter(item.corpus for _, item in sample.items) == {"big": 50, "small": 33}
    assert sum(stratum.n_sampled for stratum in sample.strata) == 83
    assert sum(stratum.n_records for stratum in sample.strata) == 833


def test_a_sample_may_have_as_many_of_every_label() -> None:
    records = records_of(happy=100, sad=40, angry=7)
    sampling = Sampling(per_corpus=None, per_label=20)
    assert sampled_labels(records, sampling) == {"happy": 20, "sad": 20, "angry": 7}


def test_more_labels_than_seats_leave_the_rarest_out() -> None:
    records = records_of(happy=10, sad=8, angry=1, neutral=1)
    assert sampled_labels(records, Sampling(per_corpus=2)) == {"happy": 1, "sad": 1}


def test_a_sample_depends_on_seed_and_uids_alone() -> None:
    records = records_of(happy=100, sad=100)
    uids = [record.uid for record, _ in draw_sample(records, Sampling(per_corpus=20)).items]
    shuffled = records.copy()
    random.Random(3).shuffle(shuffled)
    again = draw_sample(iter(shuffled), Sampling(per_corpus=20))
    assert [record.uid for record, _ in again.items] == uids
    other = draw_sample(records, Sampling(per_corpus=20, seed=1))
    assert {record.uid for record, _ in other.items} != set(uids)
    larger = draw_sample(records, Sampling(per_corpus=40))
    assert set(uids) <= {record.uid for record, _ in larger.items}
    # The order is no sorted one: labels and numbers are mixed.
    assert uids != sorted(uids)


def test_every_record_is_as_likely() -> None:
    records = records_of(happy=40)
    counts: Counter[str] = Counter()
    for seed in range(400):
        sample = draw_sample(records, Sampling(per_corpus=10, seed=seed))
        counts.update(record.uid for record, _ in sample.items)
    # Binomial with n = 400 and p = 1/4: mean 100, standard deviation 8.7.
    assert len(counts) == 40
    assert all(60 < n < 140 for n in counts.values())


def test_records_without_a_description_are_counted_and_left_out() -> None:
    bare = Record(uid="c/bare", media="bare.mp4", emotion="sad")
    sample = draw_sample([bare, *records_of(happy=3)], Sampling())
    assert len(sample.items) == 3
    assert sample.n_undescribed == 1
    with pytest.raises(SchemaError, match="none of 1 records has a multimodal description"):
        draw_sample([bare], Sampling())
    with pytest.raises(SchemaError, match="that explains intent"):
        draw_sample(records_of(happy=3), Sampling(target="intent"))
    with pytest.raises(SchemaError, match="Did you mean 'meld'"):
        draw_sample(records_of("meld", happy=3), Sampling(corpora=("mled",)))


def test_an_item_shows_the_description_of_the_target() -> None:
    record = record_of("c", 1, "sad").model_copy(
        update={
            "sentiment": "negative",
            "descriptions": (
                Description(kind="multimodal", text="Of the emotion.", target="emotion"),
                Description(kind="multimodal", text="Of the polarity.", target="sentiment"),
            ),
        }
    )
    first, second = review_item(record), review_item(record, "sentiment")
    assert first is not None
    assert second is not None
    assert (first.description, first.label) == ("Of the emotion.", "sad")
    assert (second.description, second.label) == ("Of the polarity.", "negative")
    assert first.digest != second.digest
    # No clue of face, scene or voice, so there is nothing of the kind to judge.
    assert first.aspects == ("text", "reasoning", "label")
    assert review_item(record, "intent") is None


def test_a_digest_stands_for_the_texts_that_are_judged() -> None:
    record = record_of("c", 1, "sad")
    digest = review_item(record).digest  # type: ignore[union-attr]
    changes = {
        "emotion": "happy",
        "subtitles": (Subtitle(text="Something else."),),
        "descriptions": record_of("c", 1, "sad", text="They frown.").descriptions,
    }
    for name, value in changes.items():
        other = review_item(record.model_copy(update={name: value}))
        assert other is not None
        assert other.digest != digest, name
    same = review_item(record.model_copy(update={"split": "test", "speaker": "Joey"}))
    assert same is not None
    assert same.digest == digest


# ---------------------------------------------------------------------------- the file


def test_the_last_rating_of_an_item_counts(tmp_path: Path) -> None:
    record = records_of(happy=1)[0]
    file = RatingsFile(tmp_path / "r.jsonl")
    file.append(rating_of(record))
    file.append(rating_of(record, aspects={"label": "reject"}))
    file.append(rating_of(record, "bob"))
    assert len(file.path.read_text().splitlines()) == 3
    said = list(RatingsFile(file.path).of("ann").values())
    assert [rating.aspects for rating in said] == [{"label": "reject"}]
    assert len(latest(read_ratings(file.path))) == 2


def test_a_rating_of_another_text_is_of_another_item(tmp_path: Path) -> None:
    old, new = record_of("c", 1, "sad"), record_of("c", 1, "sad", text="They frown.")
    file = RatingsFile(tmp_path / "r.jsonl")
    file.append(rating_of(old))
    item = review_item(new)
    assert item is not None
    assert (item.uid, item.digest) not in file.of("ann")
    file.append(rating_of(new))
    assert len(file.of("ann")) == 2
    assert current_items([new], list(read_ratings(file.path))) == {(item.uid, item.digest)}


@pytest.mark.fault("torn last line")
@pytest.mark.parametrize("n_bytes", [1, 20, 40, 150, 311])
def test_a_torn_last_line_costs_itself_alone(
    tmp_path: Path, n_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = records_of(happy=2)
    file = RatingsFile(tmp_path / "r.jsonl")
    file.append(rating_of(first))
    whole = file.path.read_bytes()
    line = rating_of(second).model_dump_json().encode()
    file.path.write_bytes(whole + line[:n_bytes])
    assert len(list(read_ratings(file.path))) == 1
    assert "torn" in caplog.text
    RatingsFile(file.path).append(rating_of(second))
    assert file.path.read_bytes() == whole + line + b"\n"


@pytest.mark.fault("torn last line")
def test_a_whole_line_without_its_end_is_kept(tmp_path: Path) -> None:
    first, second = records_of(happy=2)
    path = tmp_path / "r.jsonl"
    path.write_text(rating_of(first).model_dump_json())
    RatingsFile(path).append(rating_of(second))
    assert [rating.uid for rating in read_ratings(path)] == [first.uid, second.uid]


@pytest.mark.fault("full disk")
def test_a_rating_that_does_not_fit_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = records_of(happy=2)
    file = RatingsFile(tmp_path / "r.jsonl")
    file.append(rating_of(first))
    whole = file.path.read_bytes()
    real = os.write

    def half(descriptor: int, data: bytes) -> int:
        real(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        file.append(rating_of(second))
    assert file.path.read_bytes() == whole


def test_many_writers_share_a_file(tmp_path: Path) -> None:
    records = records_of(happy=20)
    path = tmp_path / "r.jsonl"

    def write(rater: str) -> None:
        own = RatingsFile(path)
        for record in records:
            own.append(rating_of(record, rater))

    threads = [threading.Thread(target=write, args=(f"r{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(r.rater for r in read_ratings(path)) == {f"r{k}": 20 for k in range(4)}


def test_a_file_of_another_kind_is_never_written_to(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("uid,label\nc/1,happy\n")
    with pytest.raises(SchemaError, match=r"labels.csv, line 1: .*one JSON object a line"):
        RatingsFile(path)
    path.write_text('{"rater": "ann"')  # torn, but not one of ours
    with pytest.raises(SchemaError, match="line 1"):
        RatingsFile(path)
    with pytest.raises(SchemaError, match="there is no folder"):
        RatingsFile(tmp_path / "none" / "r.jsonl")
    with pytest.raises(SchemaError, match="no such file of ratings"):
        list(read_ratings(tmp_path / "none.jsonl"))


# ---------------------------------------------------------------------------- kappa


def test_kappa_of_the_textbook() -> None:
    # Two readers, 50 applications: 20 both yes, 15 both no, 5 only the first, 10 only the second.
    # po = 0.7, pe = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.4.
    first = ["yes"] * 20 + ["yes"] * 5 + ["no"] * 10 + ["no"] * 15
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)


def test_kappa_is_undefined_of_one_constant_value() -> None:
    assert cohen_kappa(["accept"] * 9, ["accept"] * 9) is None
    assert cohen_kappa([], []) is None
    assert cohen_kappa([3, 3], [3, 3], "linear") is None
    # Two different constants: pe = 0, no agreement at all.
    assert cohen_kappa(["accept"] * 9, ["reject"] * 9) == 0.0
    with pytest.raises(ValueError, match="2 values of one rater, 1 of the other"):
        cohen_kappa([1, 2], [1])
    with pytest.raises(ValueError, match="needs numbers"):
        cohen_kappa(["a"], ["b"], "quadratic")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60))
def test_kappa_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    for weights in (None, "linear", "quadratic"):
        with warnings.catch_warnings(), np.errstate(invalid="ignore"):
            warnings.simplefilter("ignore")
            theirs = cohen_kappa_score(first, second, labels=range(6), weights=weights)
        ours = cohen_kappa(first, second, weights)
        if np.isnan(theirs):
            assert ours is None
        else:
            assert ours == pytest.approx(theirs, abs=1e-12)


_VERDICTS = st.sampled_from(["accept", "reject"])
_SAID = st.dictionaries(st.sampled_from(ASPECTS), _VERDICTS, min_size=1)
_RATERS = st.fixed_dictionaries(
    {}, optional={name: st.tuples(_SAID, st.integers(0, 5)) for name in ("ann", "bob", "cy")}
)


@given(st.lists(_RATERS, min_size=1, max_size=25))
def test_agreement_of_any_ratings_is_scikit_learns(items: list[dict[str, tuple]]) -> None:
    records = records_of(happy=len(items) // 2, sad=len(items) - len(items) // 2)
    ratings = [
        rating_of(record, rater, aspects=said, score=score)
        for record, of in zip(records, items, strict=True)
        for rater, (said, score) in of.items()
    ]
    found = agreement(ratings)
    for rate in found.overall.rates:
        values = [r.aspects[rate.aspect] for r in ratings if rate.aspect in r.aspects]
        assert rate.n_missing == len(ratings) - len(values)
        expected = np.mean([value == "accept" for value in values]) if values else None
        assert rate.share == (None if expected is None else pytest.approx(expected))
    names = sorted({rating.rater for rating in ratings})
    assert len(found.pairs) == len(names) * (len(names) - 1) // 2
    for pair in found.pairs:
        both = [of for of in items if pair.first in of and pair.second in of]
        assert pair.n_items == len(both)
        assert pair.n_only_first == sum(pair.first in of for of in items) - len(both)
        values = [
            (of[pair.first][0][aspect], of[pair.second][0][aspect])
            for of in both
            for aspect in ASPECTS
            if aspect in of[pair.first][0] and aspect in of[pair.second][0]
        ]
        assert pair.all_aspects.n == len(values)
        if values and len({value for pair_ in values for value in pair_}) > 1:
            theirs = cohen_kappa_score(*zip(*values, strict=True))
            assert pair.all_aspects.kappa == pytest.approx(theirs, abs=1e-12)
        else:
            assert pair.all_aspects.kappa is None


def test_agreement_of_a_small_study() -> None:
    records = [*records_of("a", happy=2), *records_of("b", sad=2)]
    all_five = {aspect: "accept" for aspect in ASPECTS}
    ratings = [
        rating_of(records[0], "ann", score=5),
        rating_of(records[0], "bob", score=4),
        rating_of(records[1], "ann", score=2, aspects=all_five | {"label": "reject"}),
        rating_of(records[1], "bob", score=3),
        rating_of(records[2], "ann", score=1, aspects={"label": "accept"}, not_shown=("audio",)),
        rating_of(records[2], "ann", score=3),  # thought better of
        rating_of(records[3], "bob", score=5),
    ]
    found = agreement(ratings)
    assert (found.n_ratings, found.n_items) == (6, 4)
    rates = {rate.aspect: rate for rate in found.overall.rates}
    assert rates["label"].share == pytest.approx(5 / 6)
    assert rates["visual"].share == 1.0
    assert [group.corpus for group in found.corpora] == ["a", "b"]
    ann, bob = found.raters
    assert (ann.n_items, ann.n_missing, ann.n_changed) == (3, 1, 1)
    assert (bob.n_items, bob.n_missing, bob.n_changed) == (3, 1, 0)
    # Table 9: a mean per label and rater, and the mean of these over the labels.
    assert {row.label: row.by_rater for row in found.scores} == {
        "happy": {"ann": 3.5, "bob": 3.5},
        "sad": {"ann": 3.0, "bob": 5.0},
    }
    assert (ann.mean_score, bob.mean_score) == (3.25, 4.25)
    (pair,) = found.pairs
    assert (pair.n_items, pair.n_only_first, pair.n_only_second) == (2, 1, 1)
    # Ten pairs of verdicts, nine equal; ann rejects one, bob none: po = 0.9, pe = 0.9.
    assert pair.all_aspects.kappa == pytest.approx(0.0)
    assert pair.by_aspect["visual"].kappa is None
    assert {pair.corpus: pair.n_items for pair in found.corpus_pairs} == {"a": 2, "b": 0}


def test_numbers_count_as_accepted_from_where_the_user_says() -> None:
    records = records_of(happy=2)
    ratings = [
        rating_of(record, rater, aspects={"label": value})
        for record, pair in zip(records, [(5, 4), (1, 2)], strict=True)
        for rater, value in zip(("ann", "bob"), pair, strict=True)
    ]
    label = {rate.aspect: rate for rate in agreement(ratings).overall.rates}["label"]
    assert (label.share, label.n_other) == (None, 4)
    label = {rate.aspect: rate for rate in agreement(ratings, None, 3).overall.rates}["label"]
    assert (label.share, label.n_other) == (0.5, 0)


def test_ratings_of_texts_that_are_gone_can_be_left_out() -> None:
    old, new = record_of("c", 1, "sad"), record_of("c", 1, "sad", text="They frown.")
    ratings = [rating_of(old), rating_of(new), rating_of(old, "bob")]
    assert agreement(ratings).n_reworded == 1
    found = agreement(ratings, current_items([new], ratings))
    assert (found.n_outdated, found.n_ratings, found.n_reworded) == (2, 1, 0)


# ---------------------------------------------------------------------------- the verbs

APP = typer.Typer()
APP.command("review")(review_command)
APP.command("agreement")(agreement_command)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "m.parquet"
    space = LabelSpace(name="emotions", labels=LABELS)
    records = (*records_of("a", happy=3), *records_of("b", sad=3))
    header = Header(media_root=".", label_spaces={"emotion": space})
    write_manifest(path, Manifest(header=header, records=records))
    return path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "3", "--per-label", "2"], "give one of them"),
        (["--scale", "gradd"], "Did you mean 'graded'"),
        (["--target", "emotions"], "Did you mean 'emotion'"),
        (["--corpus", "x"], "no record is of corpus 'x'"),
        (["--media-root", "nowhere"], "is no folder on this machine"),
        (["--rater", "  "], "a name of 1 to 80"),
        (["--host", "203.0.113.7"], "cannot listen on --host 203.0.113.7"),
    ],
)
def test_review_refuses(
    manifest: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    base = ["review", str(manifest), "--out", str(tmp_path / "r.jsonl"), "--rater", "ann"]
    result = CliRunner().invoke(APP, [*base, *arguments])
    assert result.exit_code == 2
    assert message in result.output + capsys.readouterr().err
    assert not (tmp_path / "r.jsonl").exists()


def test_agreement_says_it_in_tables_and_as_json(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    records = [*records_of("a", happy=3), *records_of("b", sad=3)]
    paths = [tmp_path / "ann.jsonl", tmp_path / "[b]ob.jsonl"]
    for path, rater in zip(paths, ("ann", "[bold]bob"), strict=True):
        file = RatingsFile(path)
        for number, record in enumerate(records):
            verdict = "reject" if number == 2 and rater == "ann" else "accept"
            file.append(
                rating_of(
                    record, rater, score=number % 6, aspects={"label": verdict, "text": "accept"}
                )
            )
    command = [sys.executable, "-c", _COMMAND, "agreement", *map(str, paths)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "160"}
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for words in ("[bold]bob", "inferred label", "91.67", "Mean scores", "verdicts are missing"):
        assert words in told.stdout
    asked = subprocess.run(
        [*command, "--json", "--manifest", str(manifest)],
        capture_output=True, text=True, env=environment, check=True,
    )  # fmt: skip
    found = json.loads(asked.stdout)
    assert found["n_items"] == 6
    assert found["n_outdated"] == 0
    assert found["pairs"][0]["score_quadratic"] == 1.0


_COMMAND = (
    "import typer; from eval.verbs.review import review_command, agreement_command\n"
    "app = typer.Typer(); app.command('review')(review_command)\n"
    "app.command('agreement')(agreement_command); app()"
)


def test_ctrl_c_ends_a_review_and_says_how_far_it_is(manifest: Path, tmp_path: Path) -> None:
    ratings = tmp_path / "r.jsonl"
    RatingsFile(ratings).append(rating_of(records_of("a", happy=3)[0]))
    command = [sys.executable, "-c", _COMMAND, "review", str(manifest)]
    with subprocess.Popen(
        [*command, "--out", str(ratings), "--rater", "ann"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("http://127.0.0.1:")
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(20) == 0
    assert "1 of 6 items rated by ann" in said
