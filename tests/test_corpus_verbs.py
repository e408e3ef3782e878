"""`emocache corpus ...` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache.clip import Description, Peak, Subtitle
from cache.manifest import read_header, read_manifest
from eval.corpora.view import asked_of
from eval.verbs import console
from eval.verbs.corpus import VERBS, corpus_app
from extract.corpora.registry import corpus_ids, corpus_row
from tests.small_corpora import digest, header, record, write
from train.config import configure
from train.presets import v2


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (console.out, console.err):
        monkeypatch.setattr(one, "_width", 200)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        corpus_app(args=[str(a) for a in arguments], prog_name="emocache corpus")
    shown = capsys.readouterr()
    code = stop.value.code
    assert isinstance(code, int)
    return code, shown.out, shown.err


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two corpora: one like MELD, one of a user's own with open words."""
    head = header("meld", emotion=("joy", "sad", "neutral"), sentiment=("positive", "negative"))
    own = header("own", intent=("ask", "tell"), emotion_multi=("joy", "awe"))
    words = header("own", emotion_ov=("glad", "sour")).label_spaces["own/emotion_ov"]
    spaces = {**head.label_spaces, **own.label_spaces}
    spaces["own/emotion_ov"] = words.model_copy(update={"open": True})
    head = head.model_copy(
        update={
            "label_spaces": spaces,
            "scales": {"own/vad": (1.0, 5.0), "own/sentiment_score": (-3, 3)},
        }
    )
    records = [
        record(
            f"meld/{split}_{i}", split, emotion=("joy", "sad", "neutral")[i % 3], sentiment="positive",
            duration_s=2.5, has_video=True, has_audio=True, parent=f"{split}{i}", speaker="Joey",
            benchmarks=("meld-s",) if split != "train" else (), split_native={"val": "dev"}.get(split, split),
            subtitles=(Subtitle(text=f"Line {i} of {split}.", language="en"),),
        )
        for split in ("train", "val", "test")
        for i in range(6)
    ]  # fmt: skip
    rich = record(
        "own/rich", "train", intent="ask", emotion_multi=("joy", "awe"), emotion_ov=("glad", "odd"),
        valence=2.0, sentiment_score=-1.5, person="The woman", language="zh", split_axes={"fold": "3"},
        subtitles=(
            Subtitle(text="ni hao", language="zh"),
            Subtitle(text="hello", language="en", origin="translation"),
        ),
        peak=Peak(index=7, pts_s=0.28, method="openface-au-sum", score=6.25),
        action_units={"AU04": 0.5, "AU12": 3.0},
        descriptions=(
            Description(kind="multimodal", text="She is glad since.", target="emotion_multi", model="llm",
                        version="2", prompt_id="p1"),
            Description(kind="audio_tone", text="A low voice."),
        ),
    )  # fmt: skip
    return write(tmp_path / "m.parquet", [*records, rich], head)


def test_help_shows_the_verbs_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    code, shown, _ = run(capsys, "--help")
    assert code == 0
    places = [shown.index(f"│ {verb} ") for verb in VERBS]
    assert places == sorted(places)


def test_ls_lists_every_row_or_what_is_inside(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(capsys, "ls")
    assert code == 0
    lines = {line.split()[0]: line for line in shown.splitlines() if line.strip()}
    assert set(corpus_ids()) <= set(lines)
    assert "13,798   meld-e 2,610, meld-s 3,719" in lines["meld"]
    assert corpus_row("emodb").title in lines["emodb"]
    code, shown, _ = run(capsys, "ls", manifest)
    rows = [line.split()[:3] for line in shown.splitlines()]
    assert ["meld", "train", "6"] in rows
    assert any(row[:2] == ["val", "6"] for row in rows)
    assert ["own", "train", "1"] in rows
    assert "19 records" in shown


def test_show_tells_everything_of_a_record(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(capsys, "show", manifest, "own/rich")
    assert code == 0
    text = " ".join(shown.split())
    for part in (
        "own/rich", digest("own/rich"), "intent ask (of own/intent: ask, tell)",
        "emotion_multi joy, awe (of own/emotion_multi: joy, awe)",
        "emotion_ov glad, odd (of own/emotion_ov: glad, sour; or any word)",
        "valence 2 (from 1 to 5)", "sentiment_score -1.5 (from -3 to 3)", "person in prompts The woman",
        "spoken language zh", "fold 3", "zh, official: ni hao", "en, translation: hello",
        "frame 7 at 0.280 s, score 6.25, by openface-au-sum", "AU12 3.00, AU04 0.50",
        "multimodal, explains emotion_multi, llm 2, prompt p1: She is glad since.",
        "audio_tone, came with the corpus: A low voice.",
    ):  # fmt: skip
        assert part in text, part
    code, shown, _ = run(capsys, "show", manifest, "meld/val_1")
    assert "val (source: dev)" in " ".join(shown.split())
    code, shown, _ = run(capsys, "show", manifest, "own/rich", "--json")
    found = read_manifest(manifest).records[-1]
    assert type(found).model_validate_json(shown) == found


def test_show_renders_what_training_asks(
    manifest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(capsys, "show", manifest, "meld/train_1", "--render", "v2", "seed=7")
    assert code == 0
    text = " ".join(shown.split())
    assert "as v2 asks it, seed 7, first pass" in text
    assert "[emotion]" in text
    assert "[sentiment]" in text
    assert "Line 1 of train." in text
    assert "answer sad" in text


def test_the_options_and_the_template_are_those_of_the_prompt(manifest: Path) -> None:
    from train.text.instructions import LABELS_SLOT, load_instructions

    head = read_header(manifest)
    pools = load_instructions(None)
    orders = set()
    n_listed = 0
    for seed in range(6):
        preset = configure(v2(), [f"seed={seed}"], None)
        for one in read_manifest(manifest).records[::3]:
            for asked in asked_of(one, head, preset):
                pool_id, task, number = asked.template_id.split("/")
                template = pools.of(task)[int(number)]
                assert pool_id == pools.pool_id
                assert asked.n_templates == len(pools.of(task))
                assert bool(asked.options) == (LABELS_SLOT in template)
                n_listed += bool(asked.options)
                text = template.replace(LABELS_SLOT, ", ".join(asked.options))
                assert text in asked.preview.prompt, asked
                if task == "emotion":
                    assert sorted(asked.options) == ["joy", "neutral", "sad"]
                    orders.add(asked.options)
    assert len(orders) > 3
    assert n_listed > 20


def test_show_any_record(manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    uids = {r.uid for r in read_manifest(manifest).records}
    shown = {run(capsys, "show", manifest, "--random", "--seed", s)[1].split()[0] for s in range(9)}
    assert shown <= uids
    assert len(shown) > 2


@pytest.mark.fault("mistyped argument")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "M", "own/rch"), "Did you mean 'own/rich'?"),
        (("show", "M"), "no record is named"),
        (("show", "M", "own/rich", "seed=1"), "Add --render v2"),
        (("show", "M", "own/rich", "--render", "v3"), "Did you mean 'v2'?"),
        (("show", "M", "own/rich", "--render", "v2", "--json"), "--json shows the record alone"),
        (("show", "missing.parquet", "own/rich"), "no such manifest file"),
        (("stats", "missing.parquet"), "no such manifest file"),
        (("check", "missing.parquet"), "no such manifest file"),
        (("merge", "M", "--out", "O"), "two manifests or more"),
        (("merge", "M", "M", "--out", "O"), "named twice"),
        (("filter", "M", "--where", "emotin=joy", "--out", "O"), "Did you mean 'emotion'?"),
        (("sample", "M", "--n", "1", "--per", "emotin", "--out", "O"), "Did you mean 'emotion'?"),
        (("export", "M", "--style", "lava", "--out", "O"), "Did you mean 'llava'?"),
        (("export", "M", "--style", "llava", "--task", "reasn", "--out", "O"), "'reason'?"),
        (("export", "M", "--style", "llava", "--split", "tst", "--out", "O"), "nothing to export"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    arguments: tuple[str, ...],
    message: str,
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"M": str(manifest), "O": str(tmp_path / "out")}
    code, shown, said = run(capsys, *(places.get(a, a) for a in arguments))
    assert (code, shown) == (2, "")
    assert message in said
    assert said.startswith("emocache: ")
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.parquet"]


def test_stats_as_tables_as_json_and_as_page(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(capsys, "stats", manifest)
    assert code == 0
    for part in ("meld", "joy", "33.3%", "multi-label", "zh, official 1", "AU12 100%", "meld-s"):
        assert part in shown
    code, shown, _ = run(capsys, "stats", manifest, "--json")
    assert json.loads(shown)["together"]["n_records"] == 19
    code, shown, _ = run(capsys, "stats", manifest, "--out", tmp_path / "stats")
    assert code == 0
    assert (tmp_path / "stats" / "corpus.html").is_file()
    assert str(tmp_path / "stats" / "corpus.md") in shown


def test_check_exits_1_with_findings_and_0_without(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(capsys, "check", manifest, "--no-counts")
    assert code == 0
    assert "0 findings about splits" in shown
    code, shown, _ = run(capsys, "check", manifest)
    assert code == 1  # eighteen records are not MELD
    assert "unexplained" in shown
    assert "129,218" in shown
    assert "36,133" in shown
    code, shown, _ = run(capsys, "check", manifest, "--json")
    assert code == 1
    assert {c["what"] for c in json.loads(shown)["counts"]} >= {"Table 1", "benchmark meld-e"}


@pytest.mark.fault("a clip in two splits")
def test_check_shows_a_planted_clip_and_dedupe_takes_it_out(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planted = record("plant/1", "train", "meld/test_0")
    other = write(tmp_path / "p.parquet", [planted])
    both, clean = tmp_path / "both.parquet", tmp_path / "clean.parquet"
    code, shown, _ = run(capsys, "merge", manifest, other, "--out", both)
    assert code == 0
    assert "20 records in" in shown
    code, shown, _ = run(capsys, "check", both, "--no-counts")
    assert code == 1
    assert "the same clip, byte for byte, in test (meld) and train (plant)" in shown
    assert "test: meld/test_0, train: plant/1" in shown
    code, shown, _ = run(capsys, "dedupe", both, "--out", clean)
    assert code == 0
    assert "1 records dropped: the clip is held out in another record" in shown
    assert run(capsys, "check", clean, "--no-counts")[0] == 0
    assert "plant/1" not in {r.uid for r in read_manifest(clean).records}


def test_check_takes_a_users_own_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.parquet", [record("mine/1", "train", emotion="happy")])
    mapping = tmp_path / "mine.yaml"
    mapping.write_text(
        "id: mine\nlayouts: {x: {about: x, sources: [{files: [x.csv]}], fields: {id: '{n}'}}}\n"
        "expected: {splits: {train: 2}, labels: {emotion: {happy: 1}}}\n"
    )
    code, shown, _ = run(capsys, "check", path)
    assert code == 0
    assert "no row is known" in shown
    code, shown, _ = run(capsys, "check", path, "--mapping", mapping, "--all")
    assert code == 1
    rows = [line.split() for line in shown.splitlines()]
    assert ["mine", "split", "train", "2", "1", "-1", "unexplained"] in rows
    assert ["mine", "emotion", "happy", "1", "1", "-", "as", "expected"] in rows


def test_filter_and_sample_tell_what_they_did(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.parquet"
    code, shown, said = run(
        capsys, "filter", manifest, "--where", "corpus=meld,mled", "--where", "split!=test", "--out", out
    )  # fmt: skip
    assert code == 0
    assert "1 records do not meet corpus=meld,mled" in shown
    assert "6 records do not meet split!=test" in shown
    assert "12 records kept, 7 dropped" in shown
    assert "no record has corpus 'mled' (Did you mean 'meld'?)" in said
    code, shown, _ = run(
        capsys, "sample", manifest, "--n", 2, "--per", "corpus", "--per", "split", "--out", out
    )
    assert code == 0
    assert "meld, test: 2 of 6" in shown
    assert "own, train: 1 of 1 (all there are)" in shown
    assert len(read_manifest(out)) == 7


@pytest.mark.parametrize("style", ["llava", "sharegpt"])
def test_export_writes_conversations(
    style: str, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.jsonl"
    given = ("--task", "emotion", "--task", "reason", "--split", "train", "--seed", 3)
    code, shown, _ = run(capsys, "export", manifest, "--out", out, "--style", style, *given)
    assert code == 0
    assert "7 conversations" in shown  # six emotions of meld, and one reason of own
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["metadata"]["task"] for row in rows] == ["emotion"] * 6 + ["reason"]
    assert rows[1]["conversations"][1] == {"from": "gpt", "value": "sad"}
    assert ("id" in rows[0]) == (style == "llava")
