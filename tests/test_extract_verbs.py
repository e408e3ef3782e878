"""`emocache extract ...` as a user types it: plans, refusals, interruptions, failures, status, reports."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import emocache
from cache import layout
from cache.commit import Status
from cache.errors import SchemaError
from cache.manifest import read_manifest
from cache.recipes import token_specs
from cache.schema import decode_json
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval import progress
from eval.extraction_report import nice_step, render_extraction_report, stages_of, timeline
from eval.progress import JobView, Surroundings, human_time, job_line, job_view
from eval.tables import MEANINGS, objects_to_write, plan_table, units_to_do
from eval.verbs import console, worker_lines
from eval.verbs.arguments import duration_s, retry_kinds, size_bytes, wanted, weights_of
from eval.verbs.extract import VERBS
from extract.failures import KINDS, Evidence
from extract.jobs.job import Job, ReceiptFailure
from extract.jobs.session import StageSeconds
from extract.plan import make_plan
from extract.summary import FailureList, JobSummary, Progress, Throughput, WorkerSummary
from tests.conftest import key_of
from tests.media import write_clip
from train.presets import PRESETS, demo, v2

N_CLIPS = 6
"""Good clips of the fixture; one more is broken."""


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (console.out, console.err):
        monkeypatch.setattr(one, "_width", 220)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with media, a manifest and an extracted store; tests copy what they change."""
    root = tmp_path_factory.mktemp("extract-verbs")
    (root / "clips").mkdir()
    for seed in range(N_CLIPS):
        write_clip(root / "clips" / f"c{seed}.mp4", seed=seed, seconds=0.4)
    (root / "clips" / "broken.mp4").write_text("no media")
    assert emocache.main(["index", str(root / "clips"), "--out", str(root / "m.parquet")]) == 1
    given = ["--manifest", str(root / "m.parquet"), "--store", str(root / "s")]
    assert emocache.main(["extract", "demo", *given]) == 1  # the broken one failed
    return root


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = emocache.main([str(a) for a in arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def tree(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "expected_s"),
    [
        ("90s", 90), ("15m", 900), ("15min", 900), ("4h", 14_400), ("1h30m", 5400), ("1.5h", 5400),
        ("2d", 172_800), ("1:30:00", 5400), ("04:00:05", 14_405), ("1-12:00:00", 129_600),
    ],
)  # fmt: skip
def test_durations(text: str, expected_s: float) -> None:
    assert duration_s(text, "--walltime") == expected_s


@pytest.mark.parametrize("text", ["90", "1:30", "4 hours", "h", "-4h", "4h-", "0s", "", "1:99:00"])
def test_what_is_no_duration_is_refused_with_the_option_and_examples(text: str) -> None:
    with pytest.raises(SchemaError, match=rf"^--walltime {re.escape(text)}: (not a|must be)"):
        duration_s(text, "--walltime")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16GB", 16 * 10**9), ("2GiB", 2**31), ("1.5 MiB", 3 * 2**19), ("512mb", 512 * 10**6), ("9B", 9)],
)  # fmt: skip
def test_sizes(text: str, expected: int) -> None:
    assert size_bytes(text, "--memory") == expected


@pytest.mark.parametrize("text", ["16", "16G", "GB", "-1GB", "0GB", "1,5GB", "16 GigaBytes"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SchemaError, match=r"^--memory "):
        size_bytes(text, "--memory")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.04, "0.0 s"), (9.9, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"), (18_600, "5 h 10 min"), (200_000, "2 d 8 h"),
    ],
)  # fmt: skip
def test_times_for_people(seconds: float, expected: str) -> None:
    assert human_time(seconds) == expected


def test_several_presets_and_encoders_are_wanted_together_equal_specs_once() -> None:
    both = wanted(["demo", "v2"])
    assert both.specs == (*demo().tokens.all(), *v2().tokens.all())
    assert wanted(["demo", "demo"]).specs == demo().tokens.all()
    named = wanted(["v2"], ["hubert-large,whisper-large-v3", "eva-g:image"])
    (hubert,) = token_specs("hubert-large")
    assert named.specs == (*v2().tokens.all(), hubert), "whisper-large-v3 and eva-g are v2's"
    assert dict(zip(named.specs, named.names, strict=True))[hubert] == "hubert-large"
    assert wanted(["v2", "tokens.video.grid=4"]).specs[1].grid == 4
    assert wanted([], ["clip-large"]).specs == token_specs("clip-large")


def test_bundled_weights_serve_their_own_preset_alone() -> None:
    found = wanted(["demo", "v2"])
    bundled = weights_of(demo(), ())
    names = dict(zip(found.specs, found.names, strict=True))
    for spec in demo().tokens.all():
        assert found.weights[str(names[spec])] == bundled[spec.encoder.kind]
    for spec in v2().tokens.all():
        keys = {names[spec], spec.stream, spec.encoder.kind}
        assert not keys & found.weights.keys(), "v2 has no checkpoint yet"
    given = wanted(["demo"], given_weights=["eva=my.pth"])
    assert given.weights["eva"] == Path("my.pth")
    assert [n for n in given.names if n is not None] == ["demo/whisper"]


@pytest.mark.parametrize(
    ("words", "encoders", "message"),
    [
        ([], [], "nothing to encode is named"),
        (["seed=1"], ["clip-large"], "settings change a preset"),
        (["demmo"], [], "Did you mean 'demo'"),
        (["demo"], ["clip-larg"], "Did you mean 'clip-large'"),
        (["demo", "tokens.video.gird=1"], [], "Did you mean 'grid'"),
        ([], ["clip-large", "clip-large"], "give each once"),
    ],
)
def test_what_cannot_be_wanted_is_refused(
    words: list[str], encoders: list[str], message: str
) -> None:
    with pytest.raises(SchemaError, match=f"(?i){message}"):
        wanted(words, encoders)


def test_classes_of_failures_to_retry() -> None:
    assert retry_kinds(["missing,crash", "hang"]) == ("missing", "crash", "hang")
    assert retry_kinds([], every=True) == KINDS
    assert retry_kinds([]) == ()
    with pytest.raises(SchemaError, match=r"Did you mean 'missing'\? Allowed: missing, "):
        retry_kinds(["mising"])


def test_every_class_of_failures_is_explained() -> None:
    assert set(MEANINGS) == set(KINDS)


# ---------------------------------------------------------------------------- one verb and its sub-verbs


def test_help_shows_how_to_extract_and_names_the_sub_verbs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, shown, _ = run(capsys, "extract", "--help")
    assert code == 0
    assert "Usage: emocache extract [OPTIONS]" in shown
    for text in ("--manifest", "--engine", "--retry", "--plan", "--walltime", *VERBS):
        assert text in shown
    code, shown, _ = run(capsys, "extract", "demo", "--help")
    assert "--engine" in shown
    for verb in VERBS:
        code, shown, _ = run(capsys, "extract", verb, "--help")
        assert code == 0
        assert f"Usage: emocache extract {verb} " in shown
    code, shown, _ = run(capsys, "extract-worker", "--help")
    assert "--manifest" in shown
    assert "--engine" not in shown


def test_no_preset_hides_a_sub_verb() -> None:
    assert not set(VERBS) & set(PRESETS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stauts", "s"], "Did you mean 'status'?"),
        (["failure", "s"], "Did you mean 'failures'?"),
        (["demmo", "--manifest", "m", "--store", "s"], "Did you mean 'demo'?"),
        (["demo"], "Missing option '--manifest'"),
        (["status"], "Missing argument 'STORE'"),
        (["status", "s", "--watch", "--json"], "give one of them"),
        (["status", "nowhere"], "no such store"),
        (["failures", "nowhere", "--class", "crahs"], "Did you mean 'crash'?"),
    ],
)
def test_misspelt_words_get_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown, problems = run(capsys, "extract", *words)
    assert code == 2
    assert message in shown + problems
    assert "Traceback" not in problems
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "slurmm"], "Did you mean 'slurm'?"),
        (["--engine", "local", "--workers", "0"], "--workers 0: an extraction needs at least one"),
        (["--workers", "2"], "--engine inline is one worker"),
        (["--engine", "dask"], "needs --scheduler"),
        (["--walltime", "4"], "--walltime 4: not a duration"),
        (["--walltime", "4h"], "takes no --walltime"),
        (["--memory", "lots"], "--memory lots: not a size"),
        (["--clip-deadline", "soon"], "--clip-deadline soon"),
        (["--lease-timeout", "0s"], "--lease-timeout 0s"),
        (["--max-failure-share", "0"], "--max-failure-share 0"),
        (["--precision", "fp16"], "Did you mean 'float16'?"),
        (["--retry", "crahs"], "Did you mean 'crash'?"),
        (["--compression", "lzma"], "Allowed: none, zstd"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--media-root", "elsewhere"], "Give the folder that the manifest's media paths start from"),
        (["--encoder-weights", "eva=missing.pth"], "no such checkpoint file"),
        (["--encoders", "hubert-large"], "no checkpoint for the audio stream (hubert-large)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_queued_or_made(
    options: list[str],
    message: str,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--manifest", made / "m.parquet", "--store", "new"]
    code, _, problems = run(capsys, "extract", "demo", *given, *options)
    assert code == 2
    assert message in problems
    assert len(problems.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_weights_of_another_architecture_are_refused(
    made: Path,
    tmp_path: Path,
    tiny_weights: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _, problems = run(
        capsys, "extract", "demo", "--manifest", made / "m.parquet", "--store", tmp_path / "new",
        "--encoder-weights", f"eva={tiny_weights['whisper']}",
    )  # fmt: skip
    assert code == 2
    assert str(tiny_weights["whisper"]) in problems
    assert not (tmp_path / "new").exists()


def test_a_store_of_another_format_or_kind_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer, other, file = tmp_path / "newer", tmp_path / "other", tmp_path / "file"
    shutil.copytree(made / "s", newer)
    marker = json.loads((newer / layout.MARKER).read_text())
    (newer / layout.MARKER).write_text(json.dumps(marker | {"version": 99}))
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    file.write_text("a file")
    before = tree(tmp_path)
    for store, message in ((newer, "store format 99"), (other, "not an"), (file, "not an")):
        for option in ([], ["--plan"]):
            code, _, problems = run(
                capsys, "extract", "demo", "--manifest", made / "m.parquet", "--store", store,
                *option,
            )  # fmt: skip
            assert code == 2
            assert message in problems
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------- plans


def test_a_plan_makes_nothing_and_counts_what_an_extraction_then_writes(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--manifest", made / "m.parquet", "--store", tmp_path / "s", "--unit-clips", 3]
    code, shown, _ = run(capsys, "extract", "demo", *given, "--plan", "--calibrate", 2)
    assert code == 0
    assert not list(tmp_path.iterdir()), "no store, no job"
    assert "not encoded yet" in shown
    assert "measured on" in shown
    assert re.search(r"estimated: \d.* for one worker with 1 decoder", shown)
    assert "7 of 7 clips are to be encoded, in 3 units of up to 3 clips" in shown
    assert "nothing was queued or written" in shown
    (row,) = re.findall(r"together +(≈ .+B) +(\d+) +(\d+)", shown)
    code, _, _ = run(capsys, "extract", "demo", *given)
    assert code == 1
    store = tmp_path / "s"
    files = [p for p in (store / layout.ZARR).glob("*/*/c/**/*") if p.is_file()]
    files += (store / "commits").glob("*/*")
    files += (store / "claims").glob("*/*")
    assert int(row[1]) == len(files)
    assert int(row[2]) == len(list(store.glob("jobs/*/*/receipts/*"))) == 3


def test_the_plan_of_a_finished_extraction_says_so(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--manifest", made / "m.parquet", "--store", made / "s", "--plan"]
    before = tree(made / "s")
    code, shown, _ = run(capsys, "extract", "demo", *given)
    assert code == 0
    assert "nothing to do: all 7 clips are there" in shown
    # A grid that divides the stored one is served by it: no unit, and the table says from where.
    code, shown, _ = run(capsys, "extract", "demo", *given, "tokens.video.grid=1")
    assert "from a richer spec" in shown
    assert "come from the richer spec" in shown
    # The broken clip cannot be decoded, so there is nothing to estimate from; the plan stands.
    code, shown, problems = run(capsys, "extract", "demo", *given, "--retry", "undecodable")
    assert code == 0
    assert "failed before, to be tried again" in shown
    assert "no estimate of the time" in problems
    assert tree(made / "s") == before


def test_the_numbers_of_a_plan_table_are_those_of_the_plan(made: Path) -> None:
    records = read_manifest(made / "m.parquet").records
    specs = [spec.with_weights("ab" * 32) for spec in demo().tokens.all()]
    plan = make_plan(records, specs, None, unit_clips=2)
    assert sum(objects_to_write(plan).values()) == plan.n_objects
    assert set(units_to_do(plan).values()) == {4}
    shown = StringIO()
    Console(file=shown, width=80).print(plan_table(plan))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in shown.getvalue(), "it fits a narrow terminal"
    assert "units" in shown.getvalue()


@pytest.mark.skipif(importlib.util.find_spec("dask_jobqueue") is None, reason="needs dask-jobqueue")
def test_a_dry_run_shows_the_job_script_and_submits_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--manifest", made / "m.parquet", "--store", tmp_path / "s", "--calibrate", 0]
    code, shown, _ = run(
        capsys, "extract", "demo", *given, "--dry-run", "--engine", "slurm", "--workers", 5,
        "--walltime", "4h", "--queue", "gpu-long", "--account", "emo", "--job-extra",
        "--constraint=a100", "--prologue", "module load cuda",
    )  # fmt: skip
    assert code == 0
    assert "up to 5 jobs would be submitted" in shown
    for line in (
        "#SBATCH -p gpu-long", "#SBATCH -A emo", "#SBATCH -t 04:00:00", "#SBATCH --constraint=a100",
        "module load cuda",
    ):  # fmt: skip
        assert line in shown.splitlines()
    assert "measured on" not in shown
    code, shown, _ = run(capsys, "extract", "demo", *given, "--dry-run")
    assert "engine inline submits no job script" in shown
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- work


def test_a_finished_extraction_is_known_without_loading_torch(made: Path) -> None:
    shown = subprocess.run(
        [
            sys.executable, "-X", "importtime", "-m", "emocache", "extract", "demo",
            "--manifest", made / "m.parquet", "--store", made / "s",
        ],
        capture_output=True, text=True, check=False, cwd=Path(emocache.__file__).parent,
    )  # fmt: skip
    assert "nothing to do: all 7 clips are in" in shown.stdout
    assert shown.returncode == 1, "one clip has failed"
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "zarr" in imported
    assert not imported & {"torch", "transformers", "av", "decord", "distributed", "matplotlib"}


def test_media_that_moved_are_refused_and_a_few_lost_ones_are_recorded_and_retried(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    media, store = tmp_path / "media", tmp_path / "s"
    shutil.copytree(made / "clips", media)
    (media / "broken.mp4").unlink()
    for seed in (0, 1, 2):
        (media / f"c{seed}.mp4").unlink()
    given = ["--manifest", made / "m.parquet", "--store", store, "--media-root", media]
    code, _, problems = run(capsys, "extract", "demo", *given)
    assert code == 2
    assert f"4 of 7 media files checked are not below {media}, first: " in problems
    assert "--media-root" in problems
    assert not store.exists()

    for seed in (0, 1):
        shutil.copy(made / "clips" / f"c{seed}.mp4", media)
    code, shown, problems = run(capsys, "extract", "demo", *given)
    assert code == 1
    assert "2 of 7 media files checked are not below" in problems, "a warning"
    assert "failed, audio, video, image, 1 clip: missing: " in problems
    code, shown, _ = run(
        capsys, "extract", "failures", store, "--manifest", made / "m.parquet", "--class", "missing"
    )
    assert code == 1
    assert "clips/c2, " in shown
    assert "--retry missing" in shown

    shutil.copy(made / "clips" / "c2.mp4", media)
    code, shown, _ = run(capsys, "extract", "demo", *given)
    assert "nothing to do" in shown, "failed clips are not tried again unless asked for"
    code, shown, problems = run(capsys, "extract", "demo", *given, "--retry", "missing")
    assert code == 1, "broken.mp4 is still not there"
    found = TokenStore.open(store)
    for spec in found.specs.values():
        assert found.index(spec).counts() == {Status.OK: 6, Status.FAILED: 1}
    shutil.copy(made / "clips" / "c0.mp4", media / "broken.mp4")
    code, _, problems = run(capsys, "extract", "demo", *given, "--retry-failed")
    assert code == 1
    assert "changed: broken.mp4" in problems


def test_an_interrupted_extraction_says_how_to_go_on_and_goes_on(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--manifest", made / "m.parquet", "--store", tmp_path / "s", "--unit-clips", 1]
    finish, n_finished = Job.finish, 0

    def finish_and_interrupt(self: Job, *arguments: Any) -> bool:
        nonlocal n_finished
        done = finish(self, *arguments)
        n_finished += 1
        if n_finished == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return done

    monkeypatch.setattr(Job, "finish", finish_and_interrupt)
    code, _, problems = run(capsys, "extract", "demo", *given)
    monkeypatch.undo()
    assert code == 130
    assert "run the same command to continue" in problems
    code, shown, _ = run(capsys, "extract", "status", tmp_path / "s")
    assert code == 0
    assert "not done" in shown
    assert "ended: SIGINT" in shown
    assert "run the same command again to continue" in shown
    left = int(re.findall(r"stopped with (\d+) of 7 units left", problems)[0])
    assert 1 <= left <= 5
    code, _, problems = run(capsys, "extract", "demo", *given)
    assert code == 1
    assert "continuing job" in problems
    code, shown, _ = run(capsys, "extract", "status", tmp_path / "s")
    assert ": done" in shown
    assert "7 of 7 clips" in shown
    old, new = TokenStore.open(made / "s"), TokenStore.open(tmp_path / "s")
    for spec in old.specs.values():
        assert {e.key for e in new.index(spec)} == {e.key for e in old.index(spec)}


def test_a_worker_of_a_job_array_does_what_is_left(
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(worker_lines, "LINE_EVERY_S", 0.01)
    given = ["--manifest", made / "m.parquet", "--store", tmp_path / "s"]
    code, _, problems = run(capsys, "extract-worker", "demo", *given, "--walltime", "90s")
    assert code == 2
    assert "--walltime 90s: is too short" in problems
    assert not (tmp_path / "s").exists()
    code, shown, problems = run(
        capsys, "extract-worker", "demo", *given, "--log-dir", tmp_path / "logs"
    )  # fmt: skip
    assert code == 1
    assert re.search(r"extracting: \d+ clips by this worker, .*of the job's 1 units", problems)
    assert "unit 0: " not in problems, "units are for the log"
    assert "1 of 1 units done" in shown
    (job,) = Job.latest(TokenStore.open(tmp_path / "s").storage)
    assert [r.engine for r in job.receipts()] == ["worker"]
    (log,) = (tmp_path / "logs").iterdir()
    assert "unit 0 is done" in log.read_text()
    code, shown, _ = run(capsys, "extract-worker", "demo", *given)
    assert "nothing to do" in shown


# ---------------------------------------------------------------------------- looking on


def test_status_as_json_is_the_state_of_the_newest_unfinished_job(
    made: Path, tmp_path: Path, specs: dict[str, TokenSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(capsys, "extract", "status", made / "s", "--json")
    assert code == 0
    state = decode_json(Progress, shown, "the state")
    assert (state.n_clips, state.n_planned, state.n_units_done) == (7, 7, 1)
    assert state.failed_by_kind == {"undecodable": 1}
    assert [w.outcome for w in state.workers] == ["ended"]
    code, _, problems = run(capsys, "extract", "status", made / "s", "--job", "ffff")
    assert code == 2
    assert f"Known: {state.job_id}" in problems
    code, shown, _ = run(capsys, "extract", "status", made / "s", "--job", state.job_id[:5])
    assert code == 0
    TokenStore.open_or_create(tmp_path / "empty")
    code, shown, _ = run(capsys, "extract", "status", tmp_path / "empty")
    assert code == 0
    assert "no extraction was begun here" in shown
    code, _, problems = run(capsys, "extract", "report", tmp_path / "empty")
    assert code == 2


def test_watching_ends_with_the_job(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(capsys, "extract", "status", made / "s", "--watch")
    assert code == 0


def summary_of(**changes: Any) -> JobSummary:
    """A job of three workers, of which one was killed."""
    seconds = StageSeconds(
        encode_s={"audio a": 100.0, "video b": 200.0}, decode_wait_s=50, decode_cpu_s=400, write_s=9
    )
    lives = [
        ("one", 0.0, 300.0, "ended", None),
        ("two", 10.0, 60.0, "vanished", None),
        ("three", 90.0, 300.0, "ended", "SIGTERM"),
    ]
    workers = tuple(
        WorkerSummary(
            worker_id=name, session="s", engine="slurm", host=f"node-{name}", device="cuda:0",
            log=None, started_s=1e9 + start, seen_s=1e9 + end, outcome=outcome, end_reason=reason,
            unit=None, n_units=2, n_clips=64, n_failed=0, seconds=StageSeconds(), gpu_busy=None,
        )
        for name, start, end, outcome, reason in lives
    )  # fmt: skip
    fields: dict[str, Any] = {
        "job_id": "0123456789abcdef", "generation": 0, "created": "2026-11-21T00:00:00+00:00",
        "engines": ("slurm",), "devices": ("cuda:0",), "n_units": 6, "n_units_done": 6,
        "n_planned": 192, "n_clips": 192, "counts": {"audio a": {Status.OK: 192}}, "n_failed": 0,
        "failed_by_kind": {}, "failures": (), "remarks": (), "truncated": (), "n_bytes": 10**9,
        "started_s": 1e9, "ended_s": 1e9 + 300, "seconds": seconds, "worker_s": 560.0,
        "active_s": 300.0, "workers": workers,
        "throughput": Throughput(start_s=1e9, step_s=30, clips_per_s=(0.5,) * 10),
    }  # fmt: skip
    return JobSummary(**{**fields, **changes})


class Page(HTMLParser):
    """What a page holds, and that its elements close in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def rects(self, style: str) -> list[dict[str, float]]:
        return [
            {k: float(v or 0) for k, v in attrs.items() if k in ("x", "y", "width", "height")}
            for tag, attrs in self.tags
            if tag == "rect" and attrs["class"] == style
        ]


def test_the_report_of_a_real_job(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, shown, _ = run(
        capsys, "extract", "report", made / "s", "--out", tmp_path / "r", "--price-per-hour", 2.5
    )
    assert code == 0
    assert shown.strip() == str(tmp_path / "r" / "report.html")
    found = decode_json(JobSummary, (tmp_path / "r" / "report.json").read_bytes(), "the report")
    assert (found.n_clips, found.n_failed, found.price_per_hour) == (7, 1, 2.5)
    page = Page((tmp_path / "r" / "report.html").read_text())
    assert page.links == []
    assert "clips/broken" in page.text
    # The same page stands beside the job already, without the price.
    (own,) = (made / "s").glob("jobs/*/*/report.html")
    assert "worker-hours" in Page(own.read_text()).text


def test_the_report_shows_when_each_worker_lived_and_how_it_ended() -> None:
    page = Page(render_extraction_report(summary_of(price_per_hour=3.0), "s3://bucket/tokens"))
    (ended,), (killed,), (stopped,) = (page.rects(s) for s in ("ended", "vanished", "stopped"))
    per_s = ended["width"] / 300
    assert killed["width"] == pytest.approx(50 * per_s, abs=0.2)
    assert killed["x"] - ended["x"] == pytest.approx(10 * per_s, abs=0.2)
    assert stopped["x"] + stopped["width"] == pytest.approx(ended["x"] + ended["width"], abs=0.2)
    assert "vanished (killed?)" in page.text
    assert "ended early: SIGTERM" in page.text
    assert "1 worker vanished without a word" in page.text
    assert "No clip failed." in page.text
    assert f"{560 / 3600 / 192 * 1000 * 3:.2f}" in page.text, "what 1000 clips cost"
    assert "not finished" not in page.text


def test_the_stages_of_a_report_are_all_the_time_there_was() -> None:
    stages = stages_of(summary_of())
    assert [(p.name, p.seconds) for p in stages.encoders] == [
        ("encoding, audio a", 100), ("encoding, video b", 200), ("waiting for decoding", 50),
        ("starting, loading, other", 560 - 350),
    ]  # fmt: skip
    assert [(p.name, p.seconds) for p in stages.beside] == [
        ("decoding, CPU time", 400), ("writing and committing", 9),
    ]  # fmt: skip
    for bar in (stages.encoders, stages.beside):
        for before, after in pairwise(bar):
            assert after.x == pytest.approx(before.x + before.width)
        for part in bar:
            assert part.width / part.seconds == pytest.approx(stages.encoders[0].width / 100)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_units_done": 4}, "2 of 6 units are left. Run the same command again"),
        ({"n_clips": 0, "workers": (), "throughput": None, "started_s": None, "ended_s": None,
          "worker_s": 0.0, "active_s": 0.0, "seconds": StageSeconds(), "counts": {}}, "No clip failed"),
        ({"truncated": ("x/1",)}, "longer than the audio encoder's window"),
        ({"remarks": (("x/1", "audio", "odd"),)}, "Decoding passed over damage in 1 streams"),
        ({"seconds": StageSeconds(encode_s={"a": 10.0}, decode_wait_s=30.0)}, "waited for decoding 75%"),
    ],
)  # fmt: skip
def test_a_report_says_what_a_reader_should_not_overlook(
    changes: dict[str, Any], words: str
) -> None:
    assert words in Page(render_extraction_report(summary_of(**changes), "s")).text


def test_a_report_escapes_what_comes_from_outside() -> None:
    hostile = "<script>alert('x')</script>"
    failure = ReceiptFailure(
        uid=hostile, key=key_of("x"), stream="audio", kind="crash", reason=f"crash: {hostile}"
    )
    text = render_extraction_report(
        summary_of(failures=(failure,), failed_by_kind={"crash": 1}, n_failed=1), hostile
    )
    assert "<script" not in text
    assert hostile in Page(text).text


def test_a_report_of_many_workers_stays_a_page() -> None:
    one = summary_of().workers[0]
    many = tuple(one.model_copy(update={"worker_id": f"w{n}"}) for n in range(500))
    summary = summary_of(workers=many)
    found = timeline(summary)
    assert found is not None
    assert (len(found.lanes), found.has_names) == (200, False)
    text = render_extraction_report(summary, "s")
    assert "The first 200 of 500 workers" in Page(text).text
    assert len(text) < 300_000


@given(st.floats(1e-6, 1e9), st.integers(1, 10))
def test_ticks_are_round_and_few(top: float, n: int) -> None:
    step = nice_step(top, n)
    assert step * n >= top * (1 - 1e-6)
    assert step <= 5 * top / n + 1e-12
    assert f"{step:.0e}"[0] in "125"


# ---------------------------------------------------------------------------- failures


def test_failures_tell_what_is_known_of_each_clip(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s"
    shutil.copytree(made / "s", store)
    (broken,) = (r for r in read_manifest(made / "m.parquet").records if "broken" in r.media)
    (job,) = Job.latest(TokenStore.open(store).storage)
    job.write_evidence(
        Evidence(
            key=broken.clip.sha256, uid=broken.uid, media=broken.media, kind="undecodable",
            message="no media", attempts=2, exit_signal="SIGSEGV", stderr_tail="moov atom not found",
            host="node07", worker_id="w", time="2026-11-21T00:00:00+00:00",
        )
    )  # fmt: skip
    code, shown, _ = run(capsys, "extract", "failures", store)
    assert code == 1
    assert "clips/broken, audio" in shown
    assert "(2 attempts, SIGSEGV)" in shown
    assert "moov atom" not in shown
    assert "--retry undecodable" in shown
    code, shown, _ = run(capsys, "extract", "failures", store, "--verbose")
    assert "    | moov atom not found" in shown
    assert "node07" in shown
    code, shown, _ = run(capsys, "extract", "failures", store, "--json")
    assert code == 1
    (clip,) = decode_json(FailureList, shown, "the list").failures
    assert clip.evidence is not None
    assert clip.evidence.stderr_tail == "moov atom not found"
    assert len(clip.specs) == 3
    code, shown, _ = run(capsys, "extract", "failures", store, "--class", "crash")
    assert code == 0
    assert "failed with class crash" in shown


# ---------------------------------------------------------------------------- the live view


class _Watched:
    """Stands for `Watch`: shows one state again and again."""

    def __init__(self, state: Progress) -> None:
        self.state, self.n_looks = state, 0

    def look(self, now_s: float) -> Progress:
        self.n_looks += 1
        return self.state


@pytest.fixture
def state() -> Progress:
    """A job in the middle, with one living and one killed worker."""
    first, second, _ = summary_of().workers
    return Progress(
        job_id="0123456789abcdef", generation=0, created="2026-11-21T00:00:00+00:00", n_units=6,
        n_units_done=2, n_planned=192, n_clips=80, n_failed=3,
        failed_by_kind={"crash": 2, "missing": 1}, clips_per_s=4.0, left_s=28.0,
        seconds=StageSeconds(encode_s={"video b": 12.0}, decode_wait_s=3.0),
        workers=(first.model_copy(update={"outcome": "working", "gpu_busy": 0.5}), second),
    )  # fmt: skip


def look_once(view: JobView) -> None:
    view.run(lambda _: True)


def test_on_a_terminal_everything_is_in_view(state: Progress) -> None:
    shown = StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120, color_system=None)
    watch: Any = _Watched(state)
    around = Surroundings(n_hits=40, n_wanted=2, tail="tail -F 'my logs'/*.log")
    with job_view(terminal, watch, around, is_remote=False, in_background=False) as view:
        view.show(n_wanted=2, dashboard="http://127.0.0.1:8787", notes=("1 of 2 workers",))
        look_once(view)
    text = shown.getvalue()
    for expected in (
        "80 of 192 clips", "unit 2 of 6", "4.0 clips/s", "28 s left", "40 clips were in the store",
        "3 (2 crash, 1 missing)", "video b 12 s", "waiting for decoding 3.0 s", "1 of 2 at work",
        "GPU 50% busy", "http://127.0.0.1:8787", "tail -F 'my logs'/*.log", "1 of 2 workers",
    ):  # fmt: skip
        assert expected in text


def test_without_a_terminal_there_is_a_line_now_and_then(
    state: Progress, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    watch: Any = _Watched(state)
    plain = Console(file=StringIO())
    with job_view(plain, watch, Surroundings(), is_remote=False, in_background=False) as view:
        look_once(view)
        assert not caplog.messages, "the first line comes after 30 seconds"
        monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
        look_once(view)
    assert caplog.messages == [
        "extracting: 80 of 192 clips, 4.0 a second, 3 (2 crash, 1 missing) failed, 1 worker at work, "
        "about 28 s left"
    ]
    assert "1 of 3 workers at work" in job_line(state, Surroundings(n_wanted=3))


def test_the_view_looks_in_the_background_and_bears_a_store_that_does_not_answer(
    state: Progress, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cache.errors import StoreError

    class Moody(_Watched):
        def look(self, now_s: float) -> Progress:
            super().look(now_s)
            if self.n_looks == 1:
                raise StoreError("the bucket is away")
            return self.state

    watch: Any = Moody(state)
    view = JobView(Console(file=StringIO()), watch, Surroundings(), every_s=0.01)
    with view.shown(in_background=True):
        _wait_until(lambda: view.latest is not None)
    assert watch.n_looks >= 2


def _wait_until(is_so: Callable[[], bool]) -> None:
    import time

    end_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.01)
