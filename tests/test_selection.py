"""Merging, filtering, sampling and deduplicating manifests."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cache.clip import Clip, Description, Peak, Record, Subtitle
from cache.columns import read_columns
from cache.errors import ManifestError, SchemaError
from cache.labels import LabelSpace
from cache.lookup import any_uid, find_record
from cache.manifest import CorpusNote, Header, media_root, read_manifest
from cache.selection import (
    deduplicate,
    filter_manifest,
    merge_manifests,
    sample_manifest,
)
from tests.small_corpora import EMOTIONS, header, record, write


def uids(path: Path) -> list[str]:
    return [r.uid for r in read_manifest(path).records]


# Merge


def test_merged_media_are_the_same_files(tmp_path: Path) -> None:
    first = write(tmp_path / "x" / "a.parquet", [record("a/1"), record("a/2")])
    second = write(tmp_path / "y" / "deep" / "b.parquet", [record("b/1")])
    files = {}
    for path in (first, second):
        manifest = read_manifest(path)
        for one in manifest.records:
            file = media_root(manifest, path) / one.media
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(one.uid)
            files[one.uid] = file
    out = tmp_path / "elsewhere" / "m.parquet"
    found = merge_manifests([first, second], out)
    assert found.n_records == {first: 2, second: 1}
    merged = read_manifest(out)
    assert [r.uid for r in merged.records] == ["a/1", "a/2", "b/1"]
    for one in merged.records:
        file = media_root(merged, out) / one.media
        assert file.read_text() == one.uid
        assert file.samefile(files[one.uid])
    # It can move together with what it names.
    assert not Path(merged.header.media_root).is_absolute()


def test_merging_keeps_the_label_space_of_each_corpus(tmp_path: Path) -> None:
    bare = Header(
        media_root="media",
        label_spaces={"emotion": LabelSpace(name="emotion", labels=("joy", "grief"))},
        scales={"a/vad": (-1, 1)},
        corpora={"a": CorpusNote(title="A", licence="free")},
    )
    first = write(tmp_path / "a.parquet", [record("a/1", emotion="joy")], bare)
    second = write(tmp_path / "b.parquet", [record("b/1", emotion="happy")])
    merge_manifests([first, second], tmp_path / "m.parquet")
    found = read_manifest(tmp_path / "m.parquet").header
    # A space without a corpus would be that of b, too.
    assert {key: space.labels for key, space in found.label_spaces.items()} == {
        "a/emotion": ("joy", "grief"),
        "b/emotion": EMOTIONS,
    }
    assert found.scales == {"a/vad": (-1, 1)}
    assert found.corpora["a"].licence == "free"


@pytest.mark.fault("manifests that contradict each other")
def test_differing_label_spaces_are_refused_with_the_difference(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", [record("a/1")], header("a", emotion=("joy", "rage")))
    second = write(tmp_path / "b.parquet", [record("a/2")], header("a", emotion=("joy", "awe")))
    with pytest.raises(ManifestError, match="only the first has rage; only the second has awe"):
        merge_manifests([first, second], tmp_path / "m.parquet")
    other = write(tmp_path / "c.parquet", [record("a/3")], header("a", emotion=("rage", "joy")))
    with pytest.raises(ManifestError, match="order is joy, rage in the first and rage, joy"):
        merge_manifests([first, other], tmp_path / "m.parquet")
    assert not (tmp_path / "m.parquet").exists()


@pytest.mark.fault("manifests that contradict each other")
def test_differing_scales_are_refused(tmp_path: Path) -> None:
    heads = [
        header("a").model_copy(update={"scales": {"a/sentiment_score": scale}})
        for scale in ((-1.0, 1.0), (-3.0, 3.0))
    ]
    paths = [write(tmp_path / f"{i}.parquet", [record(f"a/{i}")], h) for i, h in enumerate(heads)]
    with pytest.raises(ManifestError, match="-1 to 1 and -3 to 3"):
        merge_manifests(paths, tmp_path / "m.parquet")


@pytest.mark.fault("manifests that contradict each other")
def test_a_uid_in_two_manifests_is_refused_with_both_and_nothing_replaced(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", [record("a/1"), record("a/2")])
    second = write(tmp_path / "b.parquet", [record("a/2"), record("a/3")])
    out = write(tmp_path / "m.parquet", [record("old/1")])
    with pytest.raises(ManifestError, match=r"1 uids .*'a/2' in .*a\.parquet and .*b\.parquet"):
        merge_manifests([first, second], out)
    assert uids(out) == ["old/1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet", "m.parquet"]


@pytest.mark.fault("damaged record")
def test_a_damaged_record_in_the_middle_replaces_nothing(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write(tmp_path / "m.parquet", [record(f"a/{i}") for i in range(9000)])
    other = write(tmp_path / "o.parquet", [record("b/1")])
    before = other.read_bytes()
    table = pq.read_table(path)
    media = table["media"].to_pylist()
    media[8000] = "../outside.mp4"
    place = table.schema.get_field_index("media")
    table = table.set_column(place, table.schema.field(place), pa.array(media))
    pq.write_table(table, path, row_group_size=4096)
    works: list[Any] = [
        lambda: merge_manifests([other, path], other),
        lambda: filter_manifest(path, other, ["split=train"]),
        lambda: sample_manifest(path, other, 9000),
        lambda: deduplicate(path, other),
    ]
    for work in works:
        with pytest.raises(SchemaError, match=r"row 8000 .*inside the media root"):
            work()
        assert other.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.parquet", "o.parquet"]


# Filter


def corpus_of_ten(tmp_path: Path) -> Path:
    head = header("a", "b", emotion=EMOTIONS, emotion_multi=EMOTIONS)
    records = [
        record("a/0", "train", emotion="happy", duration_s=1.0, has_audio=True),
        record("a/1", "train", emotion="sad", duration_s=30.0, has_audio=False),
        record("a/2", "test", emotion="neutral", duration_s=30.5, benchmarks=("x", "y")),
        record("a/3", "test", duration_s=2.0, benchmarks=("y",), speaker="Ann"),
        record("a/4", None, clip=None, emotion="sad"),
        record("b/5", "val", emotion="happy", emotion_multi=("happy", "sad"), valence=-0.5),
        record("b/6", "val", emotion_multi=("neutral",), split_axes={"fold": "1"}),
        record("b/7", "train", subtitles=(Subtitle(text="Well, Hello!", language="en"),)),
        record("b/8", "train", action_units={"AU12": 1.5}, peak=Peak(index=3)),
        record(
            "b/9", "train", descriptions=(Description(kind="audio_tone", text="low", model="m"),)
        ),
    ]
    return write(tmp_path / "ten.parquet", records, head)


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["split=train"], [0, 1, 7, 8, 9]),
        (["split!=train"], [2, 3, 4, 5, 6]),
        (["split=val,test"], [2, 3, 5, 6]),
        (["split="], [4]),
        (["split!="], [0, 1, 2, 3, 5, 6, 7, 8, 9]),
        (["emotion!=neutral"], [0, 1, 3, 4, 5, 6, 7, 8, 9]),
        (["emotion=happy,sad"], [0, 1, 4, 5]),
        (["emotion=happy,"], [0, 3, 5, 6, 7, 8, 9]),
        (["corpus = b"], [5, 6, 7, 8, 9]),
        (["duration_s<30"], [0, 3]),
        (["duration_s<=30"], [0, 1, 3]),
        (["duration_s>30"], [2]),
        (["duration_s!=30"], [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        (["has_audio=true"], [0]),
        (["has_audio=false"], [1]),
        (["has_audio!=false"], [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        (["has_clip=no"], [4]),
        (["benchmarks~y"], [2, 3]),
        (["benchmarks~x,z"], [2]),
        (["benchmarks!~y"], [0, 1, 4, 5, 6, 7, 8, 9]),
        (["benchmarks="], [0, 1, 4, 5, 6, 7, 8, 9]),
        (["emotion_multi~sad,neutral"], [5, 6]),
        (["valence>-1", "valence<0"], [5]),
        (["split_axes.fold=1"], [6]),
        (["subtitle~hello"], [7]),
        (['subtitle="Well, Hello!"'], [7]),
        (["subtitle_language~en"], [7]),
        (["action_units.AU12>=1.5"], [8]),
        (["peak_index=3"], [8]),
        (["description~audio_tone"], [9]),
        (["description_model~m", "split=train"], [9]),
        (["speaker=Ann"], [3]),
        (["uid~/1"], [1]),
    ],
)
def test_conditions(where: list[str], kept: list[int], tmp_path: Path) -> None:
    path = corpus_of_ten(tmp_path)
    found = filter_manifest(path, tmp_path / "out.parquet", where)
    assert [int(uid[-1]) for uid in uids(tmp_path / "out.parquet")] == kept
    assert (found.n_kept, found.n_dropped) == (len(kept), 10 - len(kept))


def test_each_condition_is_counted_by_itself(tmp_path: Path) -> None:
    path = corpus_of_ten(tmp_path)
    found = filter_manifest(path, tmp_path / "o.parquet", ["split=train", "corpus=a,c"])
    assert found.failed == {"split=train": 5, "corpus=a,c": 5}
    assert (found.n_kept, found.n_dropped) == (2, 8)
    assert found.remarks == ("no record has corpus 'c'",)


@pytest.mark.fault("mistyped argument")
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("splitt=train", r"unknown field 'splitt'\. Did you mean 'split'\?"),
        ("split", "is no condition"),
        ("split<3", "'split' is a text, which has no <"),
        ("duration_s~3", "'duration_s' is a number, which has no ~"),
        ("duration_s<long", "'long' is no number"),
        ("duration_s<nan", "'nan' is no number"),
        ("duration_s<1,2", "< takes one number"),
        ("has_audio=maybe", "'maybe' is neither true nor false"),
        ("benchmarks=x", "is a list; ask what it holds: benchmarks~x"),
        ("emotion=hapy", "holds 'hapy'. Did you mean 'happy'?"),
        ("split_axes.=1", "unknown field"),
    ],
)
def test_conditions_that_make_no_sense(where: str, message: str, tmp_path: Path) -> None:
    path = corpus_of_ten(tmp_path)
    with pytest.raises(SchemaError, match=message.replace("?", r"\?").replace(r"\\?", r"\?")):
        filter_manifest(path, tmp_path / "out.parquet", [where])
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.fault("mistyped argument")
def test_a_filter_that_keeps_nothing_writes_nothing_and_says_why(tmp_path: Path) -> None:
    path = corpus_of_ten(tmp_path)
    with pytest.raises(ManifestError, match=r"10 do not meet 'split=tran'.*Did you mean 'train'"):
        filter_manifest(path, tmp_path / "out.parquet", ["split=tran"])
    assert not (tmp_path / "out.parquet").exists()


def test_a_filtered_manifest_finds_its_media_from_another_folder(tmp_path: Path) -> None:
    path = corpus_of_ten(tmp_path)
    out = tmp_path / "sub" / "out.parquet"
    filter_manifest(path, out, ["split=test"])
    assert media_root(read_manifest(out), out) == (tmp_path / "media").resolve()
    filter_manifest(path, path, ["split=test"])  # in place
    assert uids(path) == ["a/2", "a/3"]


# Sample


def many(n: int) -> list[Record]:
    return [
        record(
            f"{'abc'[i % 3]}/{i}",
            ("train", "test")[i % 2],
            emotion=(*EMOTIONS, None)[i % 4],
        )
        for i in range(n)
    ]


def test_a_sample_does_not_depend_on_the_order(tmp_path: Path) -> None:
    records = many(200)
    shuffled = random.Random(3).sample(records, len(records))
    found = []
    for name, part in (("one", records), ("two", shuffled)):
        path = write(tmp_path / f"{name}.parquet", part, header("a", "b", "c"))
        sample_manifest(path, tmp_path / f"{name}-s.parquet", 40)
        found.append(uids(tmp_path / f"{name}-s.parquet"))
    assert len(found[0]) == 40
    assert set(found[0]) == set(found[1])
    # Each stands in the order of its source.
    assert found[0] == [r.uid for r in records if r.uid in set(found[0])]
    assert found[1] == [r.uid for r in shuffled if r.uid in set(found[0])]
    # A larger sample holds the smaller one; another seed gives another one.
    sample_manifest(tmp_path / "one.parquet", tmp_path / "l.parquet", 80)
    assert set(found[0]) < set(uids(tmp_path / "l.parquet"))
    sample_manifest(tmp_path / "one.parquet", tmp_path / "o.parquet", 40, seed=1)
    assert set(found[0]) != set(uids(tmp_path / "o.parquet"))


def test_samples_by_group(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", many(60), header("a", "b", "c"))
    found = sample_manifest(path, tmp_path / "s.parquet", 4, ["corpus", "split"])
    assert found.n_kept == 24
    assert found.groups == {(c, s): (4, 10) for c in "abc" for s in ("train", "test")}
    groups = [(r.corpus, r.split) for r in read_manifest(tmp_path / "s.parquet").records]
    assert {group: groups.count(group) for group in groups} == dict.fromkeys(found.groups, 4)
    found = sample_manifest(path, tmp_path / "s.parquet", 20, ["emotion"])
    assert found.groups == {(name,): (15, 15) for name in ("happy", "neutral", "no emotion", "sad")}


# Deduplicate


def test_a_train_copy_of_a_held_out_clip_never_stays(tmp_path: Path) -> None:
    records = [
        record("a/train", "train", "same", emotion="happy", benchmarks=("x",)),
        record("b/test", "test", "same"),
        record("b/val", "val", "same"),
        record("b/none", None, "same"),
        record("a/alone", "train"),
        record("a/unseen", "train", clip=None),
        record("b/unseen", "train", clip=None),
    ]
    path = write(tmp_path / "m.parquet", records)
    found = deduplicate(path, tmp_path / "d.parquet")
    assert uids(tmp_path / "d.parquet") == ["b/test", "b/val", "a/alone", "a/unseen", "b/unseen"]
    assert found == (
        5, 2, 1, {"the clip is held out in another record": 2}, 1, 0, 1, 2,
    )  # fmt: skip
    found = deduplicate(path, tmp_path / "d.parquet", across_splits=True)
    assert uids(tmp_path / "d.parquet") == ["b/test", "a/alone", "a/unseen", "b/unseen"]
    assert (found.n_kept, found.n_dropped, found.n_left) == (4, 3, 0)


@pytest.mark.parametrize("turned", [False, True])
def test_which_of_several_copies_stays(turned: bool, tmp_path: Path) -> None:
    text = Description(kind="audio_tone", text="low")
    head = header("a", emotion=EMOTIONS, sentiment=("positive",))
    records = [
        record("a/1", clip="most labels", emotion="sad"),
        record("a/2", clip="most labels", emotion="happy", sentiment="positive"),
        record("a/3", clip="benchmark first", emotion="sad", sentiment="positive"),
        record("a/4", clip="benchmark first", benchmarks=("x",)),
        record("a/5", clip="more texts", emotion="sad"),
        record("a/6", clip="more texts", emotion="sad", descriptions=(text,)),
        record("a/7", clip="equal"),
        record("a/8", clip="equal"),
    ]
    path = write(tmp_path / "m.parquet", records[::-1] if turned else records, head)
    found = deduplicate(path, tmp_path / "d.parquet")
    assert sorted(uids(tmp_path / "d.parquet")) == ["a/2", "a/4", "a/6", "a/7"]
    assert found.reasons == {"another record of the clip stays in the same split": 4}
    assert found.n_contradicting == 1  # sad and happy of "most labels"


# Columns and lookup


def test_columns_say_what_the_records_say(tmp_path: Path) -> None:
    path = corpus_of_ten(tmp_path)
    records = read_manifest(path).records
    names = [
        "uid", "clip.duration_s", "clip.sha256", "split", "benchmarks", "emotion_multi", "peak.index",
        "descriptions.kind", "descriptions.model", "subtitles.language",
    ]  # fmt: skip
    found = read_columns(path, names).to_pylist()
    expected: list[dict[str, Any]] = [
        {
            "uid": r.uid,
            "clip.duration_s": r.clip and r.clip.duration_s,
            "clip.sha256": r.clip and r.clip.sha256,
            "split": r.split,
            "benchmarks": list(r.benchmarks),
            "emotion_multi": list(r.emotion_multi),
            "peak.index": r.peak_index,
            "descriptions.kind": [d.kind for d in r.descriptions],
            "descriptions.model": [d.model for d in r.descriptions],
            "subtitles.language": [s.language for s in r.subtitles],
        }
        for r in records
    ]
    assert found == expected


def test_columns_of_a_table_that_somebody_else_wrote(tmp_path: Path) -> None:
    """Only uid and media must be there; other columns may be missing, null, or typed otherwise."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    head = json.dumps({"schema_version": 2, "media_root": "."}).encode()
    table = pa.table(
        {
            "uid": pa.array(["a/1", "a/2"], pa.large_string()),
            "media": ["1.mp4", "2.mp4"],
            "split": pa.array(["train", None]).dictionary_encode(),
            "benchmarks": pa.array([["x", "y"], None], pa.list_(pa.string())),
        }
    ).replace_schema_metadata({b"emocache": head})
    pq.write_table(table, tmp_path / "m.parquet")
    found = read_columns(
        tmp_path / "m.parquet", ["split", "benchmarks", "clip.sha256", "descriptions.kind"]
    )
    assert found.to_pylist() == [
        {
            "split": "train",
            "benchmarks": ["x", "y"],
            "clip.sha256": None,
            "descriptions.kind": None,
        },
        {"split": None, "benchmarks": None, "clip.sha256": None, "descriptions.kind": None},
    ]


def test_a_record_is_found_by_its_uid(tmp_path: Path) -> None:
    path = write(tmp_path / "m.parquet", many(60), header("a", "b", "c"))
    for one in read_manifest(path).records[::7]:
        assert find_record(path, one.uid) == one
    assert any_uid(path, 0) in {r.uid for r in many(60)}
    assert len({any_uid(path, seed) for seed in range(20)}) > 5


@pytest.mark.fault("mistyped argument")
@pytest.mark.parametrize(
    "wrong", ["meld/dia1_ut0", "meld/dla1_utt0", "med/dia1_utt0", "mel/dia1_utt0"]
)
def test_a_wrong_uid_names_the_near_miss(wrong: str, tmp_path: Path) -> None:
    names = [f"meld/dia{i}_utt0" for i in range(500)] + [f"zz/{i}" for i in range(500)]
    path = write(tmp_path / "m.parquet", map(record, names))
    with pytest.raises(ManifestError, match=r"among 1,000\. Did you mean 'meld/dia1_utt0'\?"):
        find_record(path, wrong)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_records(tmp_path: Path) -> None:
    """A child merges, filters and deduplicates 30,000 records with long texts: 60 MB of text."""
    from cache.manifest import ManifestWriter

    texts = tuple(Description(kind="audio_tone", text=f"{k}" * 1000) for k in range(2))
    for part in "ab":
        with ManifestWriter(tmp_path / f"{part}.parquet", Header(media_root=".")) as writer:
            for i in range(15_000):
                clip = Clip(sha256=f"{i:064x}", n_bytes=1)
                own = (texts[0], texts[1].model_copy(update={"text": f"{part}{i} " * 200}))
                writer.write(Record(uid=f"{part}/{i}", media=f"{i}", clip=clip, descriptions=own))
    code = f"""
from pathlib import Path
from cache.selection import deduplicate, filter_manifest, merge_manifests
here = Path({str(tmp_path)!r})
def peak_kib():  # not getrusage: a child starts with the peak of its parent there
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak_kib()
merge_manifests([here / "a.parquet", here / "b.parquet"], here / "m.parquet")
filter_manifest(here / "m.parquet", here / "f.parquet", ["corpus=a,b"])
found = deduplicate(here / "f.parquet", here / "d.parquet")
assert found.n_kept == 15_000, found
print(peak_kib() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert int(done.stdout) < 250 * 1024  # KiB; the records would take a multiple of it
