"""`emocache sweep` on the command line: what it lists and prints, and what it refuses before it starts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import get_args

import pytest

import emocache
from cache.manifest import read_manifest
from cache.spec import TokenSpec
from eval.sweep.file import shipped
from eval.sweep.running.run import Crew
from eval.sweep.schema import Scale
from eval.sweep.state import SWEEP_FILE, begin, read_begun
from tests.sweeps import ROOT, SWEEP, Small
from tests.training import make_corpus


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]
) -> tuple[Path, Path]:
    """A manifest and a store of made-up tokens."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), specs)


@pytest.fixture
def small(tmp_path: Path, corpus: tuple[Path, Path]) -> Small:
    return Small(tmp_path, corpus)


@pytest.fixture(autouse=True)
def _starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here starts a process."""

    def refuse(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(Crew, "_begin", refuse)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return " ".join((found.out + " " + found.err).split())


def begun(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin the sweep, and train nothing."""
    with monkeypatch.context() as patched:
        patched.setattr(Crew, "train", lambda self, orders: None)
        assert small.run() == 130
    assert (small.out / SWEEP_FILE).exists()


def test_without_a_file_the_shipped_ones_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert emocache.main(["sweep"]) == 0
    text = said(capsys)
    assert all(name in text for name in shipped())


def test_a_sweep_is_read_and_refused_without_torch(tmp_path: Path) -> None:
    """Nobody waits seconds to be told of a typo."""
    code = (
        "import sys, emocache\n"
        "assert emocache.main(['sweep', 'table1l', '--scale', 'demo']) == 2\n"
        "assert emocache.main(['sweep']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Did you mean 'table11'?" in done.stderr


def test_the_file_of_the_manual_is_one() -> None:
    """Read, resolved and at both scales."""
    from eval.sweep.file import parse_sweep
    from eval.sweep.rows import rows_of, run_key, trials_of

    page = (ROOT / "docs" / "sweeps.md").read_text()
    found = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert found is not None
    sweep = parse_sweep(found[1], "sweeps.md")
    for scale in get_args(Scale):
        trials = trials_of(sweep, rows_of(sweep), scale)
        assert len({run_key(trial) for trial in trials}) == len(trials) == 12
    assert trials[-1].preset.tokens.audio is None


# ---------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "tokens.audio: null",
            "tokens.adio: null",
            r"small\.yaml:18: unknown key 'tokens\.adio'.*Did you mean 'audio'\?",
        ),
        ("{name: first-stage,", "{name: base,", r"small\.yaml:17: a second row 'base'"),
        ("baseline: base", "baseline: bass", r"small\.yaml:4: no row 'bass'.*'base'"),
        (
            "stage: stage1",
            "stage: stage3",
            r"small\.yaml:17: .*no stage 'stage3'\. Did you mean 'stage2'",
        ),
        ("preset: demo", "preset: dem", r"small\.yaml:3: unknown preset 'dem'.*'demo'"),
        (
            "split: val}",
            "split: val, task: emoton}",
            r"small\.yaml:14: score 'f1' is of task 'emoton'.*Did you mean 'emotion'\?",
        ),
        ("split: val}", "split: vall}", r"no record is in split 'vall'.*Did you mean 'val'\?"),
        (
            "tokens.audio: null",
            "data.corpora: [maed]",
            r"row 'no-audio': no record .* is of corpus 'maed'.*Did you mean 'made'\?",
        ),
    ],
)
def test_a_mistake_in_the_file_is_said_before_anything_starts(
    small: Small, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    assert old in SWEEP
    small.write(SWEEP.replace(old, new))
    assert small.run() == 2
    assert re.search(words, said(capsys))
    assert not small.out.exists(), "what was refused leaves no trace"


def test_a_row_that_needs_a_stream_that_the_corpus_lacks_is_refused(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    found = read_manifest(small.manifest).records
    small.with_records(
        [
            r.model_copy(update={"clip": r.seen_clip.model_copy(update={"has_audio": False})})
            for r in found
        ]
    )
    assert small.run() == 2
    text = said(capsys)
    assert "row 'base' reads audio tokens, but no record of corpus made has sound" in text
    assert small.run("--rows", "no-audio", "--dry-run") == 0


def test_tokens_that_do_not_fit_the_disk_are_refused(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small.write(SWEEP.replace("  bundled_weights: {}\n", ""))  # the store has others' tokens
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    assert small.run() == 2
    assert "Make room" in said(capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "no-adio"], "--rows no-adio: no such row. Did you mean 'no-audio'?"),
        (["--scale", "dem"], "--scale dem: unknown. Did you mean 'demo'?"),
        (["--engine", "pbs"], "--engine pbs: unknown."),
        (["--device", "gpu"], "--device gpu: unknown device."),
        (["--engine", "slurm", "--device", "auto"], "Give --device cuda or --device cpu"),
        (["--print-script"], "Give --engine slurm"),
        (["--precision", "float8"], "--precision float8: unknown."),
        (["--encoder-weights", "eva"], "'eva' is not NAME=PATH"),
        (["--encoder-weights", "evva=x"], "unknown name. Did you mean 'eva'?"),
        (["--scale", "demo"], "--manifest, --media-root and --faces are for --scale full"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    small: Small, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert small.run(*more) == 2
    assert words in said(capsys)
    assert not small.out.exists()


def test_what_is_missing_is_asked_for(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert emocache.main(["sweep", str(small.file), "--out", str(small.out)]) == 2
    assert "--manifest and --store are missing" in said(capsys)
    assert emocache.main(["sweep", str(small.out)]) == 2
    assert "cannot be read" in said(capsys)
    assert emocache.main(["sweep", "--status"]) == 2
    assert "of which sweep?" in said(capsys)
    assert emocache.main(["sweep", str(small.file), "--status", "--out", str(small.out)]) == 2
    assert "no sweep was begun here" in said(capsys)
    at_demo_scale = small.out.with_name(f"{small.out.name}-demo")
    at_demo_scale.mkdir()
    (at_demo_scale / "sweep.json").touch()
    assert emocache.main(["sweep", str(small.file), "--status", "--out", str(small.out)]) == 2
    assert "give --scale demo" in said(capsys)


def test_a_folder_of_something_else_is_refused(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    small.out.mkdir()
    (small.out / "thesis.tex").write_text("mine")
    assert small.run() == 2
    assert "holds other files (thesis.tex)" in said(capsys)
    assert small.run(out=small.file) == 2
    assert "is a file" in said(capsys)
    assert [path.name for path in small.out.iterdir()] == ["thesis.tex"]


# ---------------------------------------------------------------------------- a file that changed


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "stages.0.n_steps: 3",
            "stages.0.n_steps: 4",
            "row base and 2 more, stages.0.n_steps: 3 there, 4 now",
        ),
        ("tokens.audio: null", "tokens.video: null", "row no-audio, tokens.audio"),
        ("stage: stage1", "stage: stage2", "row first-stage, stage: 'stage1' there, 'stage2' now"),
        ("  - {name: first-stage, stage: stage1}\n", "", "row first-stage is gone"),
        ("name: small", "name: large", "name: small there, large now"),
    ],
)
def test_a_changed_file_is_refused(
    small: Small,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    words: str,
) -> None:
    begun(small, monkeypatch)
    before = (small.out / SWEEP_FILE).read_bytes()
    assert old in SWEEP
    small.write(SWEEP.replace(old, new))
    for more in ((), ("--extend",)):
        assert small.run(*more) == 2
        text = said(capsys)
        assert "another sweep was begun here" in text
        assert words in text
    assert (small.out / SWEEP_FILE).read_bytes() == before


@pytest.mark.parametrize(
    ("addition", "words"),
    [
        ("  - {name: dry, set: {model.fusion.kind: none}}\n", "row dry is new"),
        ("seeds: [42, 43]\n", "seed 43 of row base is new"),
    ],
)
def test_additions_need_the_word(
    small: Small,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    addition: str,
    words: str,
) -> None:
    begun(small, monkeypatch)
    capsys.readouterr()
    small.write(SWEEP + addition)
    assert small.run() == 2
    text = said(capsys)
    assert words in text
    assert "--extend" in text
    with monkeypatch.context() as patched:
        patched.setattr(Crew, "train", lambda self, orders: None)
        assert small.run("--extend") == 130
    assert len(read_begun(small.out).trials) > 3


def test_words_and_published_figures_are_taken_over(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(small, monkeypatch)
    small.write(
        SWEEP.replace("A small sweep", "A better title").replace(
            "{name: base}", "{name: base, note: as ever, published: {f1: 50.5}}"
        )
    )
    begun(small, monkeypatch)
    assert read_begun(small.out).sweep.title == "A better title"
    assert read_begun(small.out).rows[0].published == {"f1": 50.5}


def test_another_corpus_is_another_sweep(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(small, monkeypatch)
    small.with_records(read_manifest(small.manifest).records[1:])
    assert small.run() == 2
    assert "is not the one that the sweep began with" in said(capsys)


def test_what_was_begun_survives_the_disk(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(small, monkeypatch)
    first = read_begun(small.out)
    begin(small.out, first)
    assert read_begun(small.out) == first
    assert first.text == SWEEP
    assert [trial.name for trial in first.trials] == ["base@42", "first-stage@42", "no-audio@42"]
    assert first.trials[0].run_key == first.trials[1].run_key != first.trials[2].run_key


# ---------------------------------------------------------------------------- only look


def test_a_dry_run_writes_nothing(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    assert small.run("--dry-run", "--explain") == 0
    text = said(capsys)
    assert "nothing: all tokens are stored" in text
    assert "2 runs of 5 steps" in text
    assert "first-stage (the run of base)" in text
    assert not small.out.exists()


def test_the_job_array_has_a_task_per_run(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--engine", "slurm", "--walltime", "4h", "--cpus-per-worker", "3", "--memory", "8GB",
        "--queue", "gpu", "--account", "ours", "--jobs", "4", "--prologue", "module load cuda",
    ]  # fmt: skip
    assert small.run("--print-script", *options) == 0
    script = capsys.readouterr().out
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=0-1%4" in lines
    for directive in ("-p gpu", "-A ours", "--cpus-per-task=3", "-t 04:00:00", "--signal=USR1@120"):
        assert f"#SBATCH {directive}" in lines
    assert any(line.startswith("#SBATCH --mem=8") for line in lines)
    assert "module load cuda" in script
    assert "-m eval.sweep.running.trial" in script
    done = subprocess.run(
        ["bash", "-n"], input=script.partition("\n")[2], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert not small.out.exists()
