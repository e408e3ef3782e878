"""`emocache index` as users run it: corpora, mapping files, the examples of the documentation."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import emocache
from cache.manifest import Manifest, read_manifest
from extract.corpora.registry import corpus_ids, corpus_row
from tests.media import write_clip

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "corpora_own.md"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "200"}
COMMAND = [sys.executable, "-c", "import emocache; emocache.run()"]

MAPPING = """
id: mine
layouts:
  csv:
    about: a test
    sources: [{files: [t.csv]}]
    fields: {id: "{name}", emotion: "{emo}", subtitles: [{text: "{said}"}]}
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = emocache.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, " ".join(captured.err.split())


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "my.yaml").write_text(MAPPING)
    (folder / "t.csv").write_text("name,emo,said\na,Joy,Hello.\nb,sad,\nc,joy,Bye.\n")
    return folder


# The page


def blocks() -> list[tuple[str | None, str, str]]:
    """Return (file, language, text) of each fenced block; the file if the line before names one."""
    found = re.findall(
        r"(?:^`([^`\n]+)`[^\n]*:\n\n)?^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S
    )
    return [(name or None, language, text) for name, language, text in found]


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all files that the page shows."""
    monkeypatch.chdir(tmp_path)
    for name, _, text in blocks():
        if name is None:
            continue
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for number, line in enumerate((tmp_path / "faces.txt").read_text().split()):
        (tmp_path / line).parent.mkdir(parents=True, exist_ok=True)
        write_clip(tmp_path / line, seed=number)
    return tmp_path


def commands() -> dict[str, list[str]]:
    lines = [
        line for _, language, text in blocks() if language == "console" for line in text.split("\n")
    ]
    given = [line.removeprefix("$ emocache ").split() for line in lines if line]
    return {arguments[arguments.index("--mapping") + 1]: arguments for arguments in given}


def shown(page: Path, name: str, capsys: pytest.CaptureFixture[str]) -> Manifest:
    """Run an example's command, as a preview and in earnest."""
    arguments = commands()[name]
    out = page / arguments[arguments.index("--out") + 1]
    code, text, problems = run(capsys, *arguments, "--preview")
    assert (code, problems) == (0, "")
    assert "preview: nothing was written" in text
    assert not out.exists()
    code, text, problems = run(capsys, *arguments)
    assert (code, problems) == (0, "")
    found = read_manifest(out)
    assert f"{len(found)} records in {out.name}" in text
    return found


def test_every_mapping_of_the_page_has_its_command() -> None:
    names = {name for name, language, _ in blocks() if language == "yaml"}
    assert names == set(commands())
    assert len(names) == 4


def test_the_example_of_csv(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(page, "calls.yaml", capsys)
    assert [(r.uid, r.emotion, r.split, r.valence) for r in found.records] == [
        ("calls/c001", "fear", "train", -0.5),
        ("calls/c002", "happy", "train", 0.75),
        ("calls/c003", "sad", "train", -0.25),
        ("calls/c004", None, "test", None),
        ("calls/c005", "happy", "test", 1.0),
    ]
    assert found.records[2].subtitle("en") == 'She said "no".\nJust like that.'
    assert found.header.corpora["calls"].licence == "ours, not to be passed on"


def test_the_example_of_json(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(page, "chat.yaml", capsys)
    assert [(r.uid, r.split, r.speaker, r.emotion_multi) for r in found.records] == [
        ("chat/7_1", "train", "Ann", ("joy", "surprise")),
        ("chat/7_2", "train", "Bob", ("surprise",)),
        ("chat/8_1", "test", "Ann", ()),
    ]
    assert [r.subtitle("zh") for r in found.records] == ["你赢了", "我赢了吗", None]
    assert found.records[0].subtitles[1].origin == "translation"


def test_the_example_of_hugging_face(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    subprocess.run([sys.executable, "make_reviews.py"], cwd=page, check=True, capture_output=True)
    found = shown(page, "reviews.yaml", capsys)
    assert [(r.uid, r.split, r.sentiment) for r in found.records] == [
        ("reviews/a", "train", "negative"),
        ("reviews/b", "train", "positive"),
        ("reviews/c", "test", "neutral"),
    ]


def test_the_example_of_a_folder_per_label(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = shown(page, "faces.yaml", capsys)
    assert [(r.uid, r.split, r.emotion, r.speaker) for r in found.records] == [
        ("faces/s03_0001", "test", "happy", "s03"),
        ("faces/s01_0001", "train", "happy", "s01"),
        ("faces/s01_0002", "train", "sad", "s01"),
        ("faces/s02_0001", "train", "sad", "s02"),
    ]
    assert all(r.seen_clip.has_video for r in found.records)
    assert found.records[0].media == "test/happy/s03_0001.mp4"


# The verb


def test_the_corpora_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = run(capsys, "index", "--list")
    assert code == 0
    assert corpus_ids(), "there are rows"
    for name in corpus_ids():
        assert re.search(rf"^ *{re.escape(name)} ", text, re.M)
    assert corpus_row("meld").title in text


def test_a_preview_shows_records_labels_splits_and_what_is_empty(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text, _ = run(capsys, "index", "--mapping", "my.yaml", data, "--preview")
    assert code == 0
    assert re.search(r"uid +mine/a +mine/b +mine/c", text)
    assert re.search(r"joy +2 +█+", text)
    assert re.search(r"sad +1 +█+", text)
    assert "splits: none 3" in text
    assert "filled in some records only: subtitles 2" in text
    assert sorted(p.name for p in data.parent.iterdir()) == ["data", "my.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("index mled data --out m.parquet", "no corpus 'mled'. Did you mean 'meld'?"),
        ("index meld --out m.parquet", "'meld' is a corpus: give the folder of its files, too"),
        ("index meld data --out m.parquet", "no layout of meld fits"),
        ("index --out m.parquet", "give a folder, or a corpus and its folder (got nothing)"),
        ("index a b c --out m.parquet", "give a folder, or a corpus and its folder (got a b c)"),
        ("index --mapping my.yaml --out m.parquet", "--mapping takes one folder (got none)"),
        ("index --mapping no.yaml data --out m.parquet", "no.yaml: cannot be read"),
        ("index --mapping my.yaml data", "nowhere to write. Give --out"),
        (
            "index --mapping my.yaml data --out m.parquet --labels t.csv",
            "--labels: only for a folder",
        ),
        ("index data --media data --out m.parquet", "--media: only for a corpus or --mapping"),
        ("index --mapping my.yaml data --out m.parquet --on-unknown dorp", "Did you mean 'drop'?"),
        ("index --mapping my.yaml data --out m.parquet --on-missing kep", "Did you mean 'keep'?"),
        ("index --mapping my.yaml data --out m.parquet --map-label joy", "'joy' is not OLD=NEW"),
        ("index --mapping my.yaml data --out m.parquet --media none", "none: does not exist"),
        (
            "index --mapping my.yaml data --out m.parquet --media data",
            "3 of 3 records have no media",
        ),
        ("index --mapping my.yaml data --out m.parquet --layout x", "mine has no layout 'x'"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(
    data: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    code, _, problems = run(capsys, *arguments.split())
    assert code == 2
    assert message in problems
    assert "Traceback" not in problems
    assert sorted(p.name for p in data.parent.iterdir()) == ["data", "my.yaml"]


def test_a_folder_may_be_called_like_a_corpus(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / "meld").mkdir()
    write_clip(data.parent / "meld" / "a.mp4")
    code, _, problems = run(capsys, "index", "meld", "--out", "m.parquet")
    assert code == 2
    assert "if you mean the folder of that name, write ./meld" in problems
    code, text, _ = run(capsys, "index", "./meld", "--out", "m.parquet")
    assert code == 0
    assert "1 records" in text
    assert read_manifest(data.parent / "m.parquet").records[0].uid == "meld/a"


def test_labels_are_dropped_or_mapped_and_told(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / "my.yaml").write_text(MAPPING + "spaces: {emotion: {labels: [joy, calm]}}\n")
    given = ("index", "--mapping", "my.yaml", data, "--out", "m.parquet")
    code, _, problems = run(capsys, *given)
    assert code == 2
    assert "t.csv, line 3: label 'sad' is not in the label space 'mine/emotion'" in problems
    code, text, _ = run(capsys, *given, "--on-unknown", "drop")
    assert code == 1
    assert "1 rows left out for labels outside their space" in text
    assert len(read_manifest(data.parent / "m.parquet")) == 2
    code, _, _ = run(capsys, *given, "--map-label", "SAD=calm")
    assert code == 0
    labels = [r.emotion for r in read_manifest(data.parent / "m.parquet").records]
    assert labels == ["joy", "calm", "joy"]


def test_media_may_come_later(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    media = data.parent / "media"
    media.mkdir()
    write_clip(media / "a.mp4", seed=1)
    (media / "b.mp4").write_text("no media")
    given = ("index", "--mapping", "my.yaml", data, "--out", "m.parquet")
    code, text, _ = run(capsys, *given)
    assert code == 0
    assert "labels only, no clips: give --media DIR" in text
    found = read_manifest(data.parent / "m.parquet")
    assert all(r.clip is None for r in found.records)
    code, text, _ = run(capsys, *given, "--media", media, "--on-missing", "keep")
    assert code == 1
    assert "1 records without a media file: t.csv, line 4: c" in text
    assert re.search(r"not readable as media, .* b\.mp4", " ".join(text.split()).replace("/", " "))
    found = read_manifest(data.parent / "m.parquet")
    assert [r.clip is None for r in found.records] == [False, False, True]
    write_clip(media / "b.mp4", seed=2)
    write_clip(media / "c.mp4", seed=3)
    code, _, _ = run(capsys, *given, "--media", media)
    assert code == 0
    found = read_manifest(data.parent / "m.parquet")
    assert all(r.seen_clip.has_video for r in found.records)


def test_real_meld(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT.parent / "shared" / "annotations" / "meld"
    if not folder.is_dir():
        pytest.skip("needs the real files in ../shared/annotations/meld")
    out = tmp_path / "m.parquet"
    code, text, _ = run(capsys, "index", "meld", folder, "--out", out)
    assert code == 0
    assert "splits: train 9,989, val 1,109, test 2,610" in text
    found = read_manifest(out)
    assert Counter(r.emotion for r in found.select("train")).most_common(3)[0] == ("neutral", 4710)


@pytest.mark.fault("Ctrl-C while a manifest is written")
def test_ctrl_c_leaves_the_old_manifest(data: Path) -> None:
    out = data.parent / "m.parquet"
    given = [*COMMAND, "index", "--mapping", "my.yaml", str(data), "--out", str(out)]
    subprocess.run(given, env=ENVIRONMENT, check=True, capture_output=True)
    before = out.read_bytes()
    rows = "".join(f"r{i},joy,Hello.\n" for i in range(200_000))
    (data / "t.csv").write_text("name,emo,said\n" + rows)
    process = subprocess.Popen(
        given, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    until_s = time.monotonic() + 60
    while not list(data.parent.glob(".m.parquet*")):
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < until_s
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, problems = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"interrupted" in problems
    assert b"Traceback" not in problems
    assert out.read_bytes() == before
    assert not list(data.parent.glob(".m.parquet*")), "nothing is left beside it"


@pytest.mark.fault("Ctrl-C while media are read")
def test_ctrl_c_keeps_what_was_read(data: Path) -> None:
    media, home = data.parent / "media", data.parent / "home"
    media.mkdir()
    write_clip(media / "r0.mp4")
    clip = (media / "r0.mp4").read_bytes()
    n = 2500
    for i in range(n):
        # Other bytes behind the end of the container: other clips.
        (media / f"r{i}.mp4").write_bytes(clip + i.to_bytes(4, "big"))
        os.utime(media / f"r{i}.mp4", (1_000_000_000, 1_000_000_000))
    (data / "t.csv").write_text("name,emo,said\n" + "".join(f"r{i},joy,Hi.\n" for i in range(n)))
    given = [*COMMAND, "index", "--mapping", "my.yaml", str(data), "--out", "m.parquet"]
    given += ["--media", str(media)]
    environment = {**ENVIRONMENT, "XDG_CACHE_HOME": str(home)}
    started = time.monotonic()
    process = subprocess.Popen(
        given, env=environment, cwd=data.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    handles = Path(f"/proc/{process.pid}/fd")
    if not handles.is_dir():
        process.kill()
        process.communicate()
        pytest.skip("needs /proc to see when media are read")

    def reads_media() -> bool:
        with contextlib.suppress(OSError):  # closed meanwhile
            return any(os.readlink(handle).endswith(".mp4") for handle in handles.iterdir())
        return False

    while not reads_media():
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < started + 60
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, problems = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in problems
    assert not (data.parent / "m.parquet").exists()
    again = subprocess.run(given, env=environment, cwd=data.parent, check=True, capture_output=True)
    told = re.search(rb"media: 2,500 files, ([\d,]+) of them unchanged", again.stdout)
    assert told is not None
    assert int(told[1].replace(b",", b"")) > 0
