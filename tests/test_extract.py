"""Clips to tokens: every file ends as ok, absent or failed; nothing is encoded twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cache.clip import Record
from cache.commit import Status
from cache.errors import CheckpointError, ManifestError, SchemaError
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from cache.views import VideoView
from extract.decode import FrameRequest, decode
from extract.encoders.bank import EncoderBank
from extract.failures import KINDS
from extract.index import index_folder
from extract.plan import make_plan
from extract.preprocess import pixels
from extract.run import extract
from extract.summary import JobSummary
from tests.media import sine, write, write_clip
from train.presets import demo


def do(
    manifest: Manifest,
    bank: EncoderBank,
    store: TokenStore,
    root: Path,
    *,
    retry_failed: bool = False,
) -> JobSummary | None:
    plan = make_plan(manifest.records, bank.specs, store, retry=KINDS if retry_failed else ())
    return extract(plan, manifest.records, bank, store, root)


def statuses(store: TokenStore, specs: Sequence[TokenSpec], record: Record) -> tuple[str, str, str]:
    a, v, i = (store.entry(s, record.token_key(s)).status.value for s in specs)
    return a, v, i


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("media")
    for seed in range(3):
        write_clip(root / f"clip{seed}.mp4", seed=seed)
    (root / "copy.mp4").write_bytes((root / "clip0.mp4").read_bytes())
    return root


@pytest.fixture(scope="module")
def extracted(
    folder: Path, bank: EncoderBank, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, TokenStore]:
    store = TokenStore.open_or_create(tmp_path_factory.mktemp("store") / "s")
    manifest, _ = index_folder(folder, folder / "m.parquet")
    do(manifest, bank, store, folder)
    return manifest, store


def test_tokens_are_what_the_encoders_say(
    folder: Path, bank: EncoderBank, extracted: tuple[Manifest, TokenStore]
) -> None:
    """The stored numbers against decode, preprocess and encoder called by hand, one by one."""
    manifest, store = extracted
    record = manifest.records[1]
    audio, video, image = bank.specs
    decoded = decode(
        folder / record.media,
        want_audio=True,
        frame_choices=[FrameRequest("uniform", 16), FrameRequest("middle")],
    )
    assert decoded.audio is not None
    whisper, eva = bank.encoder(audio), bank.encoder(video)
    heard = whisper.encode([decoded.audio.waveform])[0]  # type: ignore[list-item, arg-type]
    np.testing.assert_allclose(
        store.read(audio, record.clip.sha256).tokens, heard, atol=2e-3, rtol=2e-3
    )
    assert len(heard) == -(-len(decoded.audio.waveform) // 320)
    for spec, choice in ((video, decoded.choices[0]), (image, decoded.choices[1])):
        assert spec.pixels is not None
        p = spec.pixels
        frames = [decoded.frames[i] for i in choice.indices]
        seen = eva.encode(pixels(frames, p.size_px, p.interpolation, p.mean, p.std))  # type: ignore[arg-type]
        wanted = seen[0]
        if spec.stream == "video":
            wanted = VideoView(n_frames=16, grid=2).apply(seen[:, 1:])[0].reshape(16, 4, -1)
        stored = store.read(spec, record.clip.sha256)
        np.testing.assert_allclose(stored.tokens, wanted, atol=3e-3, rtol=3e-3)
        assert store.frame_times(spec, stored.entry.row)[0] == list(choice.indices)


def test_equal_bytes_are_encoded_once_and_a_second_run_does_nothing(
    folder: Path, bank: EncoderBank, extracted: tuple[Manifest, TokenStore]
) -> None:
    manifest, store = extracted
    for spec in bank.specs:
        assert len(store.index(spec)) == 3
    plan = make_plan(manifest.records, bank.specs, store)
    assert (plan.n_clips, plan.n_missing) == (3, 0)
    assert do(manifest, bank, store, folder) is None


def test_only_what_is_missing_is_encoded(
    folder: Path, bank: EncoderBank, extracted: tuple[Manifest, TokenStore], tmp_path: Path
) -> None:
    manifest, store = extracted
    write_clip(folder / "later.mp4", seed=9)
    try:
        grown, _ = index_folder(folder, folder / "m.parquet")
        plan = make_plan(grown.records, bank.specs, store)
        assert [r.media for unit in plan.units for r in unit.records] == ["later.mp4"]
    finally:
        (folder / "later.mp4").unlink()
    spec = demo().tokens.video
    assert spec.frames is not None
    other = spec.model_copy(update={"frames": spec.frames.model_copy(update={"n_frames": 8})})
    mixed = (bank.specs[0], other.with_weights(bank.specs[1].encoder.weights_sha256 or ""))
    plan = make_plan(manifest.records, mixed, store)
    assert {s.stream for unit in plan.units for s in unit.specs} == {"video"}


def test_the_middle_frame_is_the_middle_one(
    bank: EncoderBank, extracted: tuple[Manifest, TokenStore]
) -> None:
    manifest, store = extracted
    image = bank.specs[2]
    entry = store.entry(image, manifest.records[0].clip.sha256)
    assert store.frame_times(image, entry.row) == ([12], [pytest.approx(12 / 25)])  # of 25 frames


def test_bad_files_fail_by_name_and_the_rest_goes_on(tmp_path: Path, bank: EncoderBank) -> None:
    root = tmp_path / "media"
    root.mkdir()
    write_clip(root / "good.mp4")
    (root / "empty.mp4").write_bytes(b"")
    (root / "text.mp4").write_text("not media")
    whole = (root / "good.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    write_clip(root / "gone.mp4", seed=1)
    write_clip(root / "changed.mp4", seed=2)
    manifest, _ = index_folder(root, tmp_path / "m.parquet")
    (root / "gone.mp4").unlink()
    write_clip(root / "changed.mp4", seed=3)
    store = TokenStore.open_or_create(tmp_path / "s")
    report = do(manifest, bank, store, root)
    found = {r.media: statuses(store, bank.specs, r) for r in manifest.records}
    bad = ("failed",) * 3
    assert found == {
        "good.mp4": ("ok",) * 3,
        "empty.mp4": bad,
        "text.mp4": bad,
        "truncated.mp4": bad,
        "gone.mp4": bad,
        "changed.mp4": bad,
    }
    assert report is not None
    failures = {failure.uid: failure for failure in report.failures}
    assert failures["media/gone"].kind == "missing"
    assert failures["media/changed"].kind == "changed"
    assert "not the file that was indexed" in failures["media/changed"].reason
    assert len(report.failures) == 15
    assert report.n_failed == 5
    # A second run leaves failures alone; a retry tries them again and may succeed.
    assert do(manifest, bank, store, root) is None
    write_clip(root / "gone.mp4", seed=1)
    again = do(manifest, bank, store, root, retry_failed=True)
    assert again is not None
    assert sum(counts[Status.OK] for counts in again.counts.values()) == 3
    gone = next(r for r in manifest.records if r.media == "gone.mp4")
    assert statuses(TokenStore.open(tmp_path / "s"), bank.specs, gone) == ("ok",) * 3


def test_damage_that_decoding_passed_over_is_on_record(tmp_path: Path, bank: EncoderBank) -> None:
    root = tmp_path / "media"
    root.mkdir()
    sound = sine(300, 2.0, 44100, 2)
    whole = write(root / "x.mpg", video="mpeg1video", n=50, audio="mp2", sound=sound).read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 3000] = bytes(3000)
    (root / "x.mpg").write_bytes(damaged)
    manifest, _ = index_folder(root, tmp_path / "m.parquet")
    store = TokenStore.open_or_create(tmp_path / "s")
    report = do(manifest, bank, store, root)
    assert report is not None
    assert not report.failures
    assert report.remarks
    uid, stream, remark = report.remarks[0]
    spec = next(s for s in bank.specs if s.stream == stream)
    entry = TokenStore.open(tmp_path / "s").entry(spec, manifest.records[0].clip.sha256)
    assert (uid, entry.remark) == ("media/x", remark)
    assert entry.status is Status.OK


def test_a_path_that_leaves_the_root_stops_before_any_work(
    tmp_path: Path, folder: Path, bank: EncoderBank
) -> None:
    manifest, _ = index_folder(folder, tmp_path / "m.parquet")
    root = tmp_path / "root"
    root.mkdir()
    for record in manifest.records:
        (root / record.media).symlink_to(folder / record.media)
    store = TokenStore.open_or_create(tmp_path / "s")
    with pytest.raises(ManifestError, match=r"leaves the media root"):
        do(manifest, bank, store, root)
    assert not any(len(store.index(spec)) for spec in bank.specs)


def test_encoder_weights_are_checked_by_name(tiny_weights: dict[str, Path]) -> None:
    specs = demo().tokens.all()
    with pytest.raises(SchemaError, match=r"wisper=.*Did you mean 'whisper'"):
        EncoderBank(specs, {"wisper": tiny_weights["whisper"], "eva": tiny_weights["eva"]})
    with pytest.raises(CheckpointError, match=r"no checkpoint for the video stream.*eva=PATH"):
        EncoderBank(specs, {"whisper": tiny_weights["whisper"]})
    wrong = specs[0].with_weights("00" * 32)
    with pytest.raises(CheckpointError, match=r"other weights than the audio spec names"):
        EncoderBank([wrong], {"whisper": tiny_weights["whisper"]})


def test_the_digest_memo_saves_reading_and_follows_the_file(
    tiny_weights: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "w.pt"
    path.write_bytes(tiny_weights["whisper"].read_bytes())
    spec = demo().tokens.audio
    first = EncoderBank([spec], {"audio": path})
    again = EncoderBank([spec], {"audio": path})
    assert first.specs == again.specs
    assert first._loaded
    assert not again._loaded
    os.utime(path, ns=(1, 1))
    assert EncoderBank([spec], {"audio": path})._loaded


@pytest.fixture(scope="module")
def real(
    bank: EncoderBank, shared_clips: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Manifest, TokenStore, JobSummary]:
    root = tmp_path_factory.mktemp("real")
    store = TokenStore.open_or_create(root / "s")
    manifest, _ = index_folder(shared_clips, root / "m.parquet")
    report = do(manifest, bank, store, shared_clips)
    assert report is not None
    return manifest, store, report


def test_every_real_clip_ends_with_the_right_status(
    real: tuple[Manifest, TokenStore, JobSummary], bank: EncoderBank, shared_clips: Path
) -> None:
    manifest, store, report = real
    facts = [json.loads(x) for x in (shared_clips / "clips.jsonl").read_text().splitlines()]
    assert len(manifest) == len(facts) == 26
    assert not report.failures
    by_file = {r.media: r for r in manifest.records}
    for fact in facts:
        found = statuses(store, bank.specs, by_file[fact["file"]])
        kinds = {s["type"] for s in fact.get("streams", [])}
        wanted = {
            "video": ("ok" if "audio" in kinds else "absent", "ok", "ok"),
            "audio": ("ok", "absent", "absent"),
            "image": ("absent", "absent", "ok"),
        }[fact["kind"]]
        assert found == wanted, fact["file"]
    silent = {"asl_sorry.mkv", "carphone.mp4"}
    without_sound = {
        f["file"] for f in facts if f["kind"] == "video"
        and statuses(store, bank.specs, by_file[f["file"]])[0] == "absent"
    }  # fmt: skip
    assert without_sound == silent


def test_real_audio_is_as_long_as_it_should_be_and_long_files_are_flagged(
    real: tuple[Manifest, TokenStore, JobSummary], bank: EncoderBank, shared_clips: Path
) -> None:
    manifest, store, report = real
    flagged = {uid.rpartition("/")[2] for uid in report.truncated}
    assert flagged == {"tears_long", "commercial_mono", "voices_fire"}
    by_file = {r.media: r for r in manifest.records}
    for line in (shared_clips / "clips.jsonl").read_text().splitlines():
        fact = json.loads(line)
        sounds = [s for s in fact.get("streams", []) if s["type"] == "audio"]
        if not sounds:
            continue
        entry = store.entry(bank.specs[0], by_file[fact["file"]].clip.sha256)
        expected = min(1500, 50 * sounds[0]["decoded_s"])
        assert abs(entry.valid_len - expected) <= 3, fact["file"]
        assert entry.truncated == (sounds[0]["decoded_s"] > 30)


def test_real_frame_choices_count_true_frames(
    real: tuple[Manifest, TokenStore, JobSummary], bank: EncoderBank
) -> None:
    manifest, store, _ = real
    by_name = {Path(r.media).stem: r for r in manifest.records}
    video = bank.specs[1]

    def times(name: str) -> tuple[list[int], list[float]]:
        return store.frame_times(video, store.entry(video, by_name[name].clip.sha256).row)

    index, _ = times("friday_14f")
    assert index == [
        0,
        1,
        2,
        3,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
        10,
        11,
        12,
        13,
    ]  # by hand: (i + .5) 14 / 16
    index, pts = times("work_intro")  # the first picture is at 0.834 s
    assert index[0] == 6
    assert pts[0] == pytest.approx(0.834 + 6 * 1001 / 30000, abs=2e-3)
    assert times("nasa_13013")[0][-1] == 31 * 325 // 32  # the first video stream, not decord's
    assert times("work_carlo")[0][-1] == 31 * 211 // 32  # not 212


def test_ctrl_c_leaves_a_store_that_continues(
    tmp_path: Path, bank: EncoderBank, tiny_weights: dict[str, Path]
) -> None:
    root = tmp_path / "media"
    root.mkdir()
    for seed in range(70):
        write_clip(root / f"{seed:03d}.mp4", seed=seed, seconds=0.4)
    manifest, _ = index_folder(root, tmp_path / "m.parquet")
    write_manifest(tmp_path / "m.parquet", manifest)
    command = [
        sys.executable, "-m", "emocache", "extract", "demo",
        "--manifest", str(tmp_path / "m.parquet"), "--store", str(tmp_path / "s"),
    ]  # fmt: skip
    process = subprocess.Popen(
        ["nice", "-n", "19", *command],  # slower than this test: the signal comes in the middle
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).resolve().parents[1],
        # Who runs the tests in the background of a script has Ctrl-C ignored, and so have they.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    commits = tmp_path / "s" / "commits"
    deadline = time.monotonic() + 120
    while not list(commits.glob("*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "run the same command to continue" in shown
    assert "Traceback" not in shown
    store = TokenStore.open(tmp_path / "s")
    before = {spec.stream: len(store.index(spec)) for spec in bank.specs}
    assert 0 < before["audio"] < 70
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1]
    )
    assert finished.returncode == 0, finished.stderr
    store = TokenStore.open(tmp_path / "s")
    for spec in bank.specs:
        assert len(store.index(spec)) == 70
        keys = [e.key for c in store.commits(spec) for e in c.clips]
        assert len(keys) == len(set(keys)), "no clip was committed twice"
