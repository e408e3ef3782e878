"""`emocache annotate ...` as a user types it: estimates, refusals, reports, real clips, training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import emocache
from cache.clip import Record, Subtitle
from cache.manifest import Manifest, read_manifest, write_manifest
from cache.schema import decode_json
from cache.storage import LocalStorage
from eval.progress import Surroundings
from eval.verbs import console
from eval.verbs.annotate import REPORT
from eval.verbs.annotate_view import annotation_line, annotation_panel, usage_of
from extract.annotate.config import AnnotationConfig
from extract.annotate.job import plan_annotation
from extract.annotate.journal import Journal
from extract.annotate.presets import configure
from extract.annotate.report import (
    AnnotationEstimate,
    AnnotationReport,
    FailureList,
    estimate_annotation,
)
from extract.annotate.results import RecordResult
from extract.annotate.wording import Wordings
from extract.engines.options import EngineOptions
from extract.engines.start import job_script
from extract.jobs.job import Job
from extract.summary import Progress, Watch
from tests.annotating import (
    MODELS,
    Corpus,
    clip_of,
    command,
    demo_corpus,
    header_of,
    settings_of,
)
from tests.chat_server import ChatServer, chat_server, media_of, text_of

N = 6


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for one in (console.out, console.err):
        monkeypatch.setattr(one, "_width", 220)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(MODELS) as running:
        yield running


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Six generated clips; nobody changes them."""
    return demo_corpus(tmp_path_factory.mktemp("demo"), N)


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command line; return its exit code, stdout, and stderr on one line."""
    code = emocache.main(argv)
    said = capsys.readouterr()
    return code, said.out, " ".join(said.err.split())


def arguments(corpus: Corpus, folder: Path) -> list[str]:
    return [
        "annotate", str(corpus.manifest), "--work", str(folder / "work"),
        "--out", str(folder / "out.parquet"),
    ]  # fmt: skip


# ---------------------------------------------------------------------------- before


def test_an_estimate_states_requests_tokens_hours_and_money_and_writes_nothing(
    demo: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prices = [f"{role}.price={{tokens_in: 2, tokens_out: 8}}"
              for role in ("visual_objective", "audio_tone", "consolidate")]  # fmt: skip
    argv = [*arguments(demo, tmp_path), "--estimate", "assumptions.retried_share=0", *prices]
    code, said, _ = run(*argv, "--json", capsys=capsys)
    assert code == 0
    found = decode_json(AnnotationEstimate, said, "the estimate")
    wordings = Wordings(configure("mmeverse"))
    by_role = {role.role: role for role in found.roles}
    assert [role.requests for role in found.roles] == [N, N, N]
    visual = by_role["visual_objective"]
    per_request = wordings.of("visual_objective").fixed_bytes / 4 + 1000 + 20
    assert visual.tokens_in == round(N * per_request)
    assert visual.tokens_out == N * 110
    assert visual.hours == pytest.approx(N * 3.0 / 32 / 3600)
    assert visual.cost == pytest.approx((visual.tokens_in * 2 + visual.tokens_out * 8) / 1e6)
    assert found.cost == pytest.approx(sum(role.cost or 0 for role in found.roles))
    seconds = sum(record.seen_clip.duration_s or 0 for record in demo.records)
    tone = by_role["audio_tone"]
    fixed = wordings.of("audio_tone").fixed_bytes / 4 + 20
    assert tone.tokens_in == pytest.approx(N * fixed + 25 * seconds, abs=2)
    assert found.detector_core_hours is not None
    assert not (tmp_path / "work").exists()
    code, said, _ = run(*argv, capsys=capsys)
    assert code == 0
    for word in ("visual_objective", "together", "core hours", "assumed: 3 s", "nothing was asked"):
        assert word in said


def test_the_estimate_for_130_000_clips_is_what_the_documentation_says() -> None:
    """docs/annotation.md states these numbers; should they change, so must it."""
    clip = {
        "sha256": "0" * 64,
        "n_bytes": 1,
        "duration_s": 4.0,
        "has_image": True,
        "has_audio": True,
    }
    subtitle = Subtitle(text="x" * 60)
    records = [
        Record.model_validate(
            {"uid": f"a/{n}", "media": f"{n}.mp4", "clip": clip, "emotion": "sad",
             "subtitles": [subtitle]}
        )
        for n in range(1300)
    ]  # fmt: skip
    preset = configure("mmeverse", ["assumptions.retried_share=0.02"])
    wordings = Wordings(preset)
    results: Journal[RecordResult] = Journal(Path("none"), RecordResult)
    plan = plan_annotation(records, "s", preset.targets, results)
    found = estimate_annotation(records, plan, preset, wordings)
    text = (Path(__file__).resolve().parents[1] / "docs" / "annotation.md").read_text("utf-8")
    for role in found.roles:
        row = (
            f"| {role.role} | {100 * role.requests / 1e3:,.0f} k | "
            f"{100 * role.tokens_in / 1e6:,.0f} M | {100 * role.tokens_out / 1e6:,.1f} M | "
            f"{100 * role.hours:.1f} h |"
        )
        assert row in text, row


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--preset", "mmevers"], "Did you mean 'mmeverse'"),
        (["visual_objectiv.model=x"], "Did you mean 'visual_objective'"),
        (["consolidate.modl=x"], "Did you mean 'model'"),
        (["--retry-failed", "refusd"], "Did you mean 'refused'"),
        (["--engine", "slrm"], "Did you mean 'slurm'"),
        (["--split", "trian"], "Did you mean 'train'"),
        (["--max-failure-share", "0"], "must be above 0"),
        (["--lease-timeout", "soon"], "not a duration"),
        (["detector.program=/nowhere/FeatureExtraction"], "is not there"),
        (["detector.kind=none", "prompts=/nowhere"], "no such folder"),
        (["detector.kind=none", "--media-root", "/nowhere"], "--media-root"),
        (
            ["detector.kind=none", "consolidate.api_key_env=NOT_SET_AT_ALL"],
            "NOT_SET_AT_ALL is not set",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_asked(
    change: list[str], says: str, demo: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    code, _, said = run(*arguments(demo, tmp_path), *change, capsys=capsys)
    assert code == 2
    assert says in said
    assert "Traceback" not in said
    assert not (tmp_path / "out.parquet").exists()


def test_places_that_cannot_be_are_refused(
    demo: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["annotate", str(demo.manifest), "--work", str(tmp_path / "w")]
    code, _, said = run(*given, capsys=capsys)
    assert (code, "--out FILE is missing" in said) == (2, True)
    code, _, said = run(*given, "--out", str(demo.manifest), capsys=capsys)
    assert (code, "is the manifest that is annotated" in said) == (2, True)
    code, _, said = run(*given, "--out", str(tmp_path), capsys=capsys)
    assert (code, "is a folder" in said) == (2, True)
    code, _, said = run(*given[:3], str(demo.manifest), "--out", str(tmp_path / "o"), capsys=capsys)
    assert (code, "is a file" in said) == (2, True)
    code, _, said = run(*given[:3], "s3://bucket/work", "--out", str(tmp_path / "o"), capsys=capsys)
    assert (code, "a work folder is on a disk" in said) == (2, True)
    code, _, said = run("annotate", "statu", str(tmp_path), capsys=capsys)
    assert (code, "Did you mean 'status'" in said) == (2, True)
    code, _, said = run("annotate", "status", str(tmp_path), capsys=capsys)
    assert (code, "no annotation was begun here" in said) == (2, True)
    code, _, said = run("annotate", str(tmp_path / "no.parquet"), "--work", "w", capsys=capsys)
    assert (code, "no such manifest" in said) == (2, True)


@pytest.mark.fault("an endpoint that is down, as the command line tells")
@pytest.mark.parametrize(("fault", "says"), [("quota", "out of quota"), ("404", "It lists ['vl'")])
def test_a_useless_endpoint_is_one_line_and_exit_code_2(
    fault: str, says: str, demo: Corpus, server: ChatServer, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server.fail(fault, match="Merge the clues")  # type: ignore[arg-type]
    argv = [*arguments(demo, tmp_path), *settings_of(server, demo)]
    code, _, said = run(*argv, capsys=capsys)
    assert code == 2
    assert says in said
    assert said.count("emocache: ") == 1
    server.calm()
    n = len(server.requests)
    good = sum(what == "ok" for *_, what in server.requests)
    assert run(*argv, capsys=capsys)[0] == 0
    assert server.n_requests == n + 3 * N - good


def test_nothing_listens_at_the_address(
    demo: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with chat_server(MODELS) as gone:
        settings = settings_of(gone, demo)
    patience = [f"{role}.retry.{what}" for role in ("visual_objective", "audio_tone", "consolidate")
                for what in ("stop_after=2", "base_s=0.01")]  # fmt: skip
    code, _, said = run(*arguments(demo, tmp_path), *settings, *patience, capsys=capsys)
    assert code == 2
    assert "Check that the server runs and that the address is right" in said


# ---------------------------------------------------------------------------- after


def test_all_records_are_in_the_new_manifest_and_those_left_out_are_counted(
    demo: Corpus, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*arguments(demo, tmp_path), *settings_of(server, demo), "--split", "train"]
    code, said, _ = run(*argv, "--limit", "3", capsys=capsys)
    assert code == 0
    n_test = sum(record.split == "test" for record in demo.records)
    n_more = N - n_test - 3
    assert f"{N} records in" in said
    assert "3 annotated" in said
    assert f"{n_test} not in split train" in said
    if n_more:
        assert f"{n_more} beyond the first 3" in said
    new = read_manifest(tmp_path / "out.parquet")
    assert [record.uid for record in new.records] == [record.uid for record in demo.records]
    assert new.header.label_spaces == demo.header.label_spaces
    root = (tmp_path / new.header.media_root).resolve()
    assert all((root / record.media).is_file() for record in new.records)
    done = [record for record in new.records if record.descriptions]
    assert len(done) == 3
    untouched = [record for record in new.records if not record.descriptions]
    assert untouched == [r for r in demo.records if r.uid in {u.uid for u in untouched}]
    report = decode_json(AnnotationReport, (tmp_path / "work" / REPORT).read_bytes(), REPORT)
    assert (report.n_records, report.n_annotated, report.n_whole) == (N, 3, 3)
    assert (report.requests, server.n_requests) == (9, 9)
    bodies = [body for _, body, _ in server.requests]
    assert report.tokens_in == sum(
        len(text_of(body).encode()) // 4 + 85 * len(media_of(body)) for body in bodies
    )
    # Everything that was asked for is in the report of the rest, too.
    code, said, _ = run(*argv, "--json", capsys=capsys)
    assert decode_json(AnnotationReport, said, "").n_annotated == N - n_test


def test_failures_are_listed_by_kind_and_the_exit_code_tells(
    demo: Corpus, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.fail("refusal", match="Listen to this recording", times=2)
    argv = [*arguments(demo, tmp_path), *settings_of(server, demo)]
    code, said, _ = run(*argv, capsys=capsys)
    assert code == 1
    assert "2 of them with failed steps" in said
    assert "--retry-failed refused" in said
    work = str(tmp_path / "work")
    code, said, _ = run("annotate", "failures", work, capsys=capsys)
    assert code == 1
    assert said.count("audio_tone: refused: the model declined") == 2
    code, said, _ = run("annotate", "failures", work, "--json", capsys=capsys)
    listed = decode_json(FailureList, said, "").failures
    assert [(f.step, f.kind) for f in listed] == [("audio_tone", "refused")] * 2
    assert run("annotate", "failures", work, "--kind", "missing", capsys=capsys)[0] == 0
    code, said, _ = run("annotate", "status", work, capsys=capsys)
    assert code == 0
    assert ": done" in said
    assert "2 (2 refused)" in said
    assert f"{N:,} requests" in said
    code, said, _ = run("annotate", "status", work, "--json", capsys=capsys)
    assert decode_json(Progress, said, "").n_clips == N
    assert run("annotate", "status", work, "--watch", capsys=capsys)[0] == 0
    code, _, _ = run(*argv, "--retry-failed", "refused", capsys=capsys)
    assert code == 0
    assert run("annotate", "failures", work, capsys=capsys)[0] == 0


def test_what_there_is_can_be_written_before_all_is_done(
    demo: Corpus, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*arguments(demo, tmp_path), *settings_of(server, demo)]
    code, _, said = run(*argv, "budget.requests=9", "consolidate.in_flight=1", capsys=capsys)
    assert code == 2
    assert "Raise budget.requests" in said
    code, said, _ = run(*argv, "consolidate.in_flight=1", "--partial", capsys=capsys)
    assert code == 1
    assert "not yet" in said
    assert server.n_requests == 9
    assert len(read_manifest(tmp_path / "out.parquet")) == N


def test_the_live_view_tells_requests_and_money(
    demo: Corpus, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    price = "consolidate.price={tokens_in: 1000, tokens_out: 0}"
    run(*arguments(demo, tmp_path), *settings_of(server, demo, price), capsys=capsys)
    [job] = Job.latest(LocalStorage(tmp_path / "work"))
    found = Watch(job).look(1.0)
    usage = usage_of(found)
    assert usage["consolidate requests"] == N
    around = Surroundings(n_hits=2, n_wanted=1, notes=("a note",))
    preset = configure("mmeverse", settings_of(server, demo, price))
    with console.out.capture() as shown:
        console.out.print(annotation_panel(found, around, preset))
    text = shown.get()
    for word in (f"{N} of {N} records", "2 records were annotated", f"{N} requests", "a note"):
        assert word in text
    assert f"{usage['consolidate tokens_in'] / 1000:,.2f}" in text
    line = annotation_line(found, around)
    assert line.startswith(f"annotating: {N} of {N} clips")
    assert line.endswith(f"{3 * N} requests")


def test_settings_are_shown_as_with_accepts_them(
    demo: Corpus, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = run("annotate", "show", capsys=capsys)
    assert code == 0
    assert [line.partition(":")[0] for line in said.splitlines()] == [
        "mmeverse",
        "merr-coarse",
        "merr-fine",
    ]
    _, said, _ = run("annotate", "show", "merr-fine", *settings_of(server, demo), capsys=capsys)
    (tmp_path / "mine.json").write_text(said)
    argv = [
        *arguments(demo, tmp_path),
        "--preset",
        "merr-fine",
        "--with",
        str(tmp_path / "mine.json"),
    ]
    assert run(*argv, capsys=capsys)[0] == 0
    assert server.n_requests == 3 * N


def test_a_batch_system_is_given_a_job_script(demo: Corpus, server: ChatServer) -> None:
    config = AnnotationConfig(
        store="w", manifest="m", media_root="r", job_id="j", generation=0, session="s",
        preset=configure("mmeverse"), settings="x",
    )  # fmt: skip
    options = EngineOptions(kind="slurm", workers=3, walltime_s=3600, cpus_per_worker=4)
    script = job_script(options, config)
    assert "--cpus-per-task=4" in script or "-c 4" in script


# ---------------------------------------------------------------------------- real clips, and training


REAL = {
    "friday.mp4": ("happy", "Hildy! How are you?"),
    "grid_bbaf2n.mpg": ("neutral", None),
    "grid_swiz3n.mpg": ("neutral", None),
    "portrait.MOV": ("sad", None),
    "emodb_03a04Fd.wav": ("happy", None),
    "jfk.flac": ("neutral", None),
    "face_no_surprise.jpg": ("neutral", None),
}


def real_corpus(clips: Path, root: Path) -> Corpus:
    """Return a manifest of real clips, some with sound or pictures alone."""
    records = []
    for name, (label, words) in REAL.items():
        records.append(
            Record(
                uid=f"real/{name}",
                media=name,
                clip=clip_of(clips / name),
                split="train",
                emotion=label,
                sentiment="positive" if label == "happy" else "negative",
                subtitles=() if words is None else (Subtitle(text=words, language="en"),),
            )
        )
    header = header_of(
        emotion=("happy", "sad", "neutral"), sentiment=("positive", "neutral", "negative")
    )
    corpus = Corpus(root, tuple(records), header)
    root.mkdir(parents=True, exist_ok=True)
    write_manifest(corpus.manifest, Manifest(header=header, records=corpus.records))
    return corpus


@pytest.mark.fault("kill -9 of an annotation of real clips")
def test_real_clips_are_annotated_killed_and_resumed(
    shared_clips: Path, server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = real_corpus(shared_clips, tmp_path / "corpus")
    argv = [
        *arguments(corpus, tmp_path), "--media-root", str(shared_clips), "--unit-clips", "2",
        *settings_of(server),
    ]  # fmt: skip
    server.latency_s = 0.1
    process = command(*argv, cwd=tmp_path)
    while server.n_requests < 6 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    while server.in_flight:
        time.sleep(0.005)
    n = server.n_requests
    code, _, _ = run(*argv, capsys=capsys)
    assert code == 0
    # Two descriptions each, and what there is to see and hear.
    pictures = sum(r.seen_clip.has_image is True for r in corpus.records)
    sounds = sum(r.seen_clip.has_audio is True for r in corpus.records)
    assert len(server.asked) == pictures + sounds + 2 * len(REAL)
    assert server.n_requests - len(server.asked) <= min(12, n)
    new = read_manifest(tmp_path / "out.parquet")
    for record in new.records:
        assert [d.target for d in record.descriptions if d.kind == "multimodal"] == [
            "emotion", "sentiment",
        ]  # fmt: skip
        clip = record.seen_clip
        assert bool(record.described("visual_objective")) is bool(clip.has_image)
        assert bool(record.described("audio_tone")) is bool(clip.has_audio)
    before = server.n_requests
    assert run(*argv, capsys=capsys)[0] == 0
    assert server.n_requests == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_annotated_records_train_the_second_stage(
    server: ChatServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = demo_corpus(tmp_path / "demo", 12)
    assert run(*arguments(corpus, tmp_path), *settings_of(server, corpus), capsys=capsys)[0] == 0
    new, store = str(tmp_path / "out.parquet"), str(tmp_path / "store")
    assert run("extract", "demo", "--manifest", new, "--store", store, capsys=capsys)[0] == 0
    short: Sequence[str] = [
        f"stages.{n}.{setting}"
        for n in (0, 1)
        for setting in ("n_steps=4", "optim.batch_size=4", "optim.warmup_steps=1")
    ]
    tasks = "stages.1.tasks={think: 1.0, reason: 1.0, audio: 1.0, image: 1.0}"
    out = tmp_path / "run"
    code, _, said = run(
        "train", "demo", "--manifest", new, "--store", store, "--out", str(out), *short, tasks,
        "execution.log_every_steps=1", capsys=capsys,
    )  # fmt: skip
    assert code == 0, said
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row.get("stage") == "stage2"]
    assert len(steps) == 4
    assert all(row["loss"] > 0 for row in steps)
