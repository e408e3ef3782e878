"""Algorithm 1, record by record: what is asked with what, what is kept, and what nobody makes up."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import math
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from cache.clip import Description, Peak, Record, Subtitle
from cache.commit import Status
from cache.errors import ManifestError, SchemaError
from cache.manifest import read_manifest
from cache.schema import Model
from extract.annotate import steps
from extract.annotate.evidence.transcribe import Transcript
from extract.annotate.job import plan_annotation
from extract.annotate.journal import Journal
from extract.annotate.pipeline import write_annotated
from extract.annotate.presets import PRESETS, Preset, configure
from extract.annotate.results import (
    RecordResult,
    StepResult,
    annotated,
    is_wanted,
    result_key,
)
from extract.annotate.wording import Wordings
from extract.failures import Failure
from tests.annotating import (
    MODELS,
    UNITS,
    Corpus,
    Counting,
    annotate,
    clip_of,
    command,
    demo_corpus,
    header_of,
    intensities_of,
    preset_of,
    results_of,
    settings_of,
    write_table,
)
from tests.chat_server import ChatServer, chat_server, media_of, text_of
from tests.media import write, write_wav


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(MODELS) as running:
        yield running


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Twelve generated clips; nobody changes them."""
    return demo_corpus(tmp_path_factory.mktemp("demo"))


def asked(server: ChatServer, model: str) -> list[dict[str, Any]]:
    """Return the requests to a model."""
    return [body for _, body, _ in server.requests if body["model"] == model]


# ---------------------------------------------------------------------------- the whole of it


def test_every_step_is_taken_for_every_record(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    found = annotate(demo, preset_of(server, demo), tmp_path / "work")
    results = results_of(found)
    assert set(results) == {record.uid for record in demo.records}
    for record in demo.records:
        new = annotated(record, results[record.uid])
        kinds = [(d.kind, d.target) for d in new.descriptions]
        assert kinds == [
            ("visual_expression", None),
            ("visual_objective", None),
            ("audio_tone", None),
            ("multimodal", "emotion"),
        ]
        assert all(d.text and d.model and d.prompt_id for d in new.descriptions)
        assert [d.version for d in new.descriptions] == [None, "vl-0001", "al-0001", "chat-0001"]
        assert new.descriptions[3].text.endswith(f"which fits {record.emotion}.")
        assert new.subtitles == record.subtitles
        assert new.emotion == record.emotion
    assert Counter(body["model"] for _, body, _ in server.requests) == dict.fromkeys(MODELS, 12)
    assert max(server.asked.values()) == 1


def test_the_peak_is_the_first_frame_with_the_highest_sum(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    found = annotate(demo, preset_of(server, demo), tmp_path / "work", limit=3)
    for number, record in enumerate(demo.records[:3]):
        frames = [
            {unit: float(f"{value:.2f}") for unit, value in units.items()}
            for units in intensities_of(number)
        ]
        sums = [math.fsum(units.values()) for units in frames]
        best = sums.index(max(sums))
        result = results_of(found)[record.uid]
        assert result.peak is not None
        assert (result.peak.index, result.peak.method) == (best, "openface-au-sum")
        assert result.peak.score == pytest.approx(max(sums))
        assert result.peak.pts_s == pytest.approx(best / 15)
        assert result.action_units == pytest.approx(frames[best])


def test_the_model_sees_the_peak_frame_and_hears_all_of_the_sound(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    found = annotate(demo, preset_of(server, demo), tmp_path / "work", limit=1)
    [record], [result] = demo.records[:1], results_of(found).values()
    [seen], [heard] = asked(server, "vl"), asked(server, "al")
    assert media_of(seen) == ["image_url"]
    assert media_of(heard) == ["input_audio"]
    url = seen["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    with av.open(str(demo.root / record.media)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        seconds = float(container.streams.audio[0].duration * container.streams.audio[0].time_base)
    assert result.peak is not None
    differences = [np.abs(np.asarray(sent).astype(int) - frame).mean() for frame in frames]
    assert int(np.argmin(differences)) == result.peak.index
    sound = base64.b64decode(heard["messages"][0]["content"][0]["input_audio"]["data"])
    assert (len(sound) - 44) / 2 / 16_000 == pytest.approx(seconds, abs=0.1)


def test_clues_and_label_reach_the_chat_model_and_ids_reach_nobody(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    found = annotate(demo, preset_of(server, demo), tmp_path / "work", limit=2)
    prompts = [text_of(body) for body in asked(server, "chat")]
    for record in demo.records[:2]:
        result = results_of(found)[record.uid]
        clues = [step.text for step in result.steps if step.step != "multimodal"]
        [prompt] = [p for p in prompts if all(str(clue) in p for clue in clues)]
        assert f"<label>{record.emotion}</label>" in prompt
        assert record.subtitle() in prompt
    for _, body, _ in server.requests:
        text = json.dumps([text_of(body), body["model"]])
        assert "clip_00" not in text
        assert "demo" not in text
        assert "media/" not in text
    for body in (*asked(server, "vl"), *asked(server, "al")):
        assert not any(record.emotion in text_of(body) for record in demo.records[:2])


def test_each_label_guides_a_description_of_its_own(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    record = demo.records[0].model_copy(
        update={
            "sentiment": "negative",
            "intent": "asking",
            "emotion_multi": ("sad", "angry"),
            "person": "Ann",
        }
    )
    corpus = Corpus(demo.root, (record,), demo.header)
    found = annotate(corpus, preset_of(server, demo), tmp_path / "work")
    [result] = results_of(found).values()
    assert [step.target for step in result.of("multimodal")] == [
        "emotion", "sentiment", "intent", "emotion_multi",
    ]  # fmt: skip
    guides = [
        text_of(b).split("\n<label>")[1].partition("</label>")[0] for b in asked(server, "chat")
    ]
    assert sorted(guides) == sorted([str(record.emotion), "negative", "asking", "sad, angry"])
    assert all('"Ann"' in text_of(body) for body in asked(server, "chat"))
    # The clues are asked for once, whatever is made of them.
    assert (len(asked(server, "vl")), len(asked(server, "al"))) == (1, 1)


# ---------------------------------------------------------------------------- what is not there


def media_corpus(root: Path, **media: Any) -> Corpus:
    """Write a corpus of some files: name -> record fields."""
    records = []
    for name, fields in media.items():
        path = root / f"{name}{fields.pop('ending', '.mp4')}"
        record = Record(uid=f"own/{name}", media=path.name, split="train", **fields)
        records.append(record.model_copy(update={"clip": clip_of(path)}))
    return Corpus(root, tuple(records), header_of(emotion=("sad", "happy"))).write()


def test_a_stream_that_is_not_there_is_absent_and_nothing_is_made_up(
    server: ChatServer, tmp_path: Path
) -> None:
    write(tmp_path / "silent.mp4", n=20)
    write_wav(tmp_path / "dark.wav", np.full(8000, 900), 16_000)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "still.png")
    corpus = media_corpus(
        tmp_path,
        silent={"emotion": "sad"},
        dark={"emotion": "sad", "ending": ".wav"},
        still={"emotion": "happy", "ending": ".png"},
    )
    results = results_of(annotate(corpus, preset_of(server), tmp_path / "work"))
    status = {
        uid: {step.step: step.status for step in result.steps} for uid, result in results.items()
    }
    ok, absent = Status.OK, Status.ABSENT
    seen = {"visual_objective": ok, "audio_tone": absent, "multimodal": ok}
    assert status["own/silent"] == seen
    assert status["own/still"] == seen
    assert status["own/dark"] == {"visual_objective": absent, "audio_tone": ok, "multimodal": ok}
    for body in asked(server, "chat"):
        inside = text_of(body).partition("</label>")[2].partition("Rules:")[0]
        assert ("<audio_tone>" in inside) != ("<visual_objective>" in inside)
        assert "<subtitle>" not in inside
        assert "<visual_expression>" not in inside


def test_a_face_that_is_not_found_leaves_the_middle_frame(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    table = tmp_path / "units" / "clip_0000.csv"
    write_table(table, 0)
    head, *rows = table.read_text().splitlines()
    unsuccessful = [", ".join([*r.split(", ")[:4], "0", *r.split(", ")[5:]]) for r in rows]
    table.write_text("\n".join([head, *unsuccessful]) + "\n")
    record = demo.records[0]
    corpus = Corpus(demo.root, (record,), demo.header)
    preset = preset_of(server, demo, f"detector.folder={table.parent}")
    [result] = results_of(annotate(corpus, preset, tmp_path / "work")).values()
    [face] = result.of("visual_expression")
    assert (face.status, face.reason) == (Status.ABSENT, steps.NO_FACE)
    assert (result.peak, result.action_units) == (None, {})
    assert result.of("visual_objective")[0].status is Status.OK
    assert annotated(record, result).peak is None


def test_a_record_without_a_label_gets_clues_and_no_description(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    record = demo.records[0].model_copy(update={"emotion": None})
    corpus = Corpus(demo.root, (record,), demo.header)
    [result] = results_of(annotate(corpus, preset_of(server, demo), tmp_path / "work")).values()
    [description] = result.of("multimodal")
    assert (description.status, description.reason) == (Status.ABSENT, steps.NO_LABEL)
    assert result.of("audio_tone")[0].status is Status.OK
    assert not asked(server, "chat")


@pytest.mark.fault("media missing, changed and damaged")
def test_bad_media_fail_alone_with_their_kind(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    corpus = demo_corpus(tmp_path / "demo", 4)
    paths = [corpus.root / record.media for record in corpus.records]
    paths[0].unlink()
    paths[1].write_bytes(b"no clip at all" * 99)
    damaged = b"\0" * 5000
    paths[2].write_bytes(damaged)
    records = list(corpus.records)
    clip = records[2].seen_clip
    digest = hashlib.sha256(damaged).hexdigest()
    records[2] = records[2].model_copy(update={"clip": clip.model_copy(update={"sha256": digest})})
    corpus = Corpus(corpus.root, tuple(records), corpus.header)
    results = list(
        results_of(annotate(corpus, preset_of(server, corpus), tmp_path / "work")).values()
    )
    for result, kind in zip(results, ("missing", "changed", "undecodable"), strict=False):
        assert {step.kind for step in result.failures} == {kind}
        failed = {step.step for step in result.failures}
        assert failed == {"visual_objective", "audio_tone"}
        # The table of action units and the subtitle are there all the same.
        assert result.of("multimodal")[0].status is Status.OK
    assert not results[3].failures


def test_what_is_needed_must_not_fail(demo: Corpus, server: ChatServer, tmp_path: Path) -> None:
    server.fail("refusal", match="one frame of a video")
    preset = preset_of(server, demo, "need=[visual_objective]")
    [result] = results_of(annotate(demo, preset, tmp_path / "work", limit=1)).values()
    [description] = result.of("multimodal")
    assert description.status is Status.FAILED
    assert description.reason == "refused: needs visual_objective, which failed"
    assert not asked(server, "chat")


@pytest.mark.fault("an error that nobody foresaw")
def test_what_nobody_foresaw_fails_one_record(
    demo: Corpus, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = steps.describe_face

    def sometimes(units: Any, uid: str, table: Any) -> str:
        if uid == "demo/clip_0001":
            raise ZeroDivisionError("by nothing")
        return describe(units, uid, table)

    monkeypatch.setattr(steps, "describe_face", sometimes)
    results = results_of(annotate(demo, preset_of(server, demo), tmp_path / "work", limit=3))
    [failure] = results["demo/clip_0001"].failures
    assert failure.reason == "unexpected: ZeroDivisionError: by nothing"
    assert not results["demo/clip_0000"].failures


def test_media_behind_a_url_are_fetched(demo: Corpus, server: ChatServer, tmp_path: Path) -> None:
    gone = demo.records[0].model_copy(update={"uid": "demo/gone", "media": "media/gone.mp4"})
    corpus = Corpus(demo.root, (*demo.records[:2], gone), demo.header)
    found = annotate(corpus, preset_of(server), tmp_path / "work", media_root=f"file://{demo.root}")
    first, second, third = results_of(found).values()
    assert not first.failures
    assert not second.failures
    assert {step.kind for step in third.failures} == {"missing"}
    # The same clip as the first: what is known by its content is not asked for again, what is not
    # cannot be.
    assert len(asked(server, "vl")) == 2


# ---------------------------------------------------------------------------- faults of models


FAULTS = {
    "refusal": "refused", "spoken refusal": "refused", "filtered": "refused",
    "empty": "empty", "wrong schema": "invalid", "prose": "invalid", "length": "truncated",
    "content filter": "refused", "too long": "unanswered",
}  # fmt: skip


@pytest.mark.fault("a model that answers badly")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_answer_is_a_failed_step_with_its_kind(
    fault: Any, demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.fail(fault, match="Merge the clues")
    found = annotate(
        demo, preset_of(server, demo, "consolidate.repairs=0"), tmp_path / "w", limit=1
    )
    [result] = results_of(found).values()
    [description] = result.failures
    assert (description.step, description.kind) == ("multimodal", FAULTS[fault])
    assert result.of("audio_tone")[0].status is Status.OK
    again = annotate(
        demo, preset_of(server, demo, "consolidate.repairs=0"), tmp_path / "w", limit=1
    )
    assert not again.plan.todo


@pytest.mark.fault("an endpoint that fails for a while")
@pytest.mark.parametrize(
    "fault", ["429", "500", "503", "cut", "cut body", "bad json", "no choices"]
)
def test_a_failure_that_passes_leaves_no_trace(
    fault: Any, demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.fail(fault, every=3, times=8)
    results = results_of(annotate(demo, preset_of(server, demo), tmp_path / "work", limit=6))
    assert len(results) == 6
    assert not any(result.failures for result in results.values())
    said = Counter(what for *_, what in server.requests)
    assert said == {"ok": 18, fault: 8}


def test_a_schema_that_is_missed_once_is_asked_for_again(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    server.fail("wrong schema", match="Merge the clues", times=1)
    found = annotate(
        demo, preset_of(server, demo, "consolidate.repairs=1"), tmp_path / "w", limit=1
    )
    [result] = results_of(found).values()
    [description] = result.of("multimodal")
    assert (description.status, description.requests) == (Status.OK, 2)


# ---------------------------------------------------------------------------- the other presets


def test_merr_coarse_asks_no_chat_model_and_takes_its_labels_from_action_units(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    tables = tmp_path / "units"
    for record in demo.records[:2]:
        path = tables / f"{Path(record.media).stem}.csv"
        write_table(path, 0)
    text = (tables / "clip_0001.csv").read_text().splitlines()
    still = [text[0]] + [
        ", ".join([*line.split(", ")[:5], *(["0.10"] * len(UNITS)), *(["0"] * len(UNITS))])
        for line in text[1:]
    ]
    (tables / "clip_0001.csv").write_text("\n".join(still) + "\n")
    records = tuple(r.model_copy(update={"emotion": None}) for r in demo.records[:2])
    corpus = Corpus(demo.root, records, demo.header)
    preset = preset_of(server, demo, f"detector.folder={tables}", name="merr-coarse")
    first, second = results_of(annotate(corpus, preset, tmp_path / "work")).values()
    assert not asked(server, "chat")
    [made] = first.of("multimodal")
    assert (made.model, made.target, made.requests) == ("template", None, 0)
    assert made.text is not None
    assert first.pseudo_labels
    assert made.text.endswith(f"the person appears to feel {first.pseudo_labels[0]}.")
    for step in first.steps[:-1]:
        assert str(step.text) in made.text
    assert str(records[0].subtitle()) in made.text
    # A face at rest hints at nothing; the clues are put together without a label.
    [made] = second.of("multimodal")
    assert second.pseudo_labels == ()
    assert "appears to feel" not in str(made.text)


def test_an_emotion_is_adopted_where_the_label_space_has_it(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    records = tuple(r.model_copy(update={"emotion": None}) for r in demo.records[:2])
    labelled = demo.records[2].model_copy(update={"emotion": "fearful"})
    corpus = Corpus(demo.root, (*records, labelled), demo.header)
    preset = preset_of(server, demo, "unlabelled=adopt", name="merr-coarse")
    found = annotate(corpus, preset, tmp_path / "work")
    results = results_of(found)
    hints = [results[record.uid].pseudo_labels for record in records]
    assert all(hints)
    write_annotated(tmp_path / "o.parquet", demo.header, demo.root, found)
    new = read_manifest(tmp_path / "o.parquet").records
    space = demo.header.label_spaces["emotion"]
    assert [r.emotion for r in new[:2]] == [space.find(hint[0]) for hint in hints]
    assert any(record.emotion for record in new[:2])
    assert new[2].emotion == "fearful"


def test_tables_that_were_made_anew_are_read_anew_by_another_run(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    corpus = Corpus(demo.root, demo.records[:1], demo.header)
    peaks = set()
    for number in (0, 1):
        tables = tmp_path / f"units-{number}"
        write_table(tables / "clip_0000.csv", number)
        preset = preset_of(server, demo, f"detector.folder={tables}")
        [result] = results_of(annotate(corpus, preset, tmp_path / "work")).values()
        assert result.peak is not None
        peaks.add(result.peak.index)
    assert len(peaks) == 2


def test_merr_fine_has_the_template_refined(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    coarse = annotate(demo, preset_of(server, demo, name="merr-coarse"), tmp_path / "work", limit=1)
    n = server.n_requests
    fine = annotate(demo, preset_of(server, demo, name="merr-fine"), tmp_path / "work", limit=1)
    # The clues were answered for the coarse set; only the refinement is asked for.
    assert server.n_requests == n + 1
    [before], [after] = results_of(coarse).values(), results_of(fine).values()
    draft = " ".join(str(before.of("multimodal")[0].text).split())
    [body] = asked(server, "chat")
    assert f"<draft>{draft}</draft>" in text_of(body)
    assert after.of("multimodal")[0].model == "chat"


# ---------------------------------------------------------------------------- detectors and speech


def test_a_users_detector_runs_once_per_clip_whatever_else_changes(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    Counting.n_calls = 0
    own = "detector.kind=tests.annotating:Counting"
    found = annotate(demo, preset_of(server, None, own), tmp_path / "work", limit=3)
    assert Counting.n_calls == 3
    for result in results_of(found).values():
        assert result.peak == Peak(index=3, pts_s=0.2, method="counting-au-sum", score=2.0)
    other = preset_of(server, None, own, "audio_tone.max_tokens=99")
    annotate(demo, other, tmp_path / "work", limit=3)
    assert Counting.n_calls == 3


@pytest.mark.slow
@pytest.mark.fault("a detector that kills its process")
def test_a_clip_that_kills_its_workers_is_given_up(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    argv = [
        "annotate", str(demo.manifest), "--work", "w", "--out", "o.parquet", "--limit", "3",
        *settings_of(server, None, "detector.kind=tests.annotating:Dying"),
    ]  # fmt: skip
    codes = []
    while not codes or (codes[-1] == -signal.SIGKILL and len(codes) < 8):
        process = command(*argv, cwd=tmp_path)
        told, _ = process.communicate(timeout=60)
        codes.append(process.returncode)
    assert codes[-1] == 1, told
    assert len(codes) > 3
    preset = preset_of(server, None, "detector.kind=tests.annotating:Dying")
    results = results_of(annotate(demo, preset, tmp_path / "w", limit=3))
    [given_up] = results["demo/clip_0001"].failures
    assert (given_up.step, given_up.kind) == ("visual_expression", "crash")
    assert not results["demo/clip_0000"].failures
    assert max(server.asked.values()) == 1


def test_openface_itself_is_run_on_each_clip(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    program = tmp_path / "FeatureExtraction"
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, shutil, sys\n"
        "given = dict(zip(sys.argv[1:], sys.argv[2:]))\n"
        f"table = pathlib.Path({str(demo.tables)!r}) / (pathlib.Path(given['-f']).stem + '.csv')\n"
        "shutil.copy(table, pathlib.Path(given['-out_dir']) / (given['-of'] + '.csv'))\n"
    )
    program.chmod(0o755)
    ran = preset_of(server, None, "detector.kind=openface", f"detector.program={program}")
    read = preset_of(server, demo)
    first = results_of(annotate(demo, ran, tmp_path / "ran", limit=2))
    second = results_of(annotate(demo, read, tmp_path / "read", limit=2))
    for uid, result in first.items():
        assert result.peak is not None
        assert (result.peak, result.action_units) == (second[uid].peak, second[uid].action_units)


class _Ears:
    """Stands in for Whisper, which the tests of speech recognition load."""

    n_heard = 0

    def transcribe(self, waveform: Any, language: str | None) -> Transcript:
        type(self).n_heard += 1
        assert waveform.ndim == 1
        if language == "none":
            return Transcript(None, "en")
        return Transcript(Subtitle(text="Good morning.", language="en", origin="asr:ears"), "en")


def test_what_is_said_is_written_down_where_the_record_does_not_tell(
    demo: Corpus, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "load_transcriber", lambda options: _Ears())
    _Ears.n_heard = 0
    records = [r.model_copy(update={"subtitles": ()}) for r in demo.records[:2]]
    records[1] = records[1].model_copy(update={"language": "none"})
    corpus = Corpus(demo.root, (*records, demo.records[2]), demo.header)
    preset = preset_of(server, demo, "speech={checkpoint: ears.pt}")
    results = results_of(annotate(corpus, preset, tmp_path / "work"))
    heard, silent, known = results.values()
    assert heard.spoken == Subtitle(text="Good morning.", language="en", origin="asr:ears")
    assert annotated(records[0], heard).subtitles == (heard.spoken,)
    assert silent.of("subtitle")[0].reason == steps.NOBODY_SPEAKS
    assert (silent.spoken, known.spoken, known.of("subtitle")) == (None, None, ())
    assert sum("Good morning." in text_of(body) for body in asked(server, "chat")) == 1
    # Known from then on, also where something else changes.
    annotate(corpus, preset.model_copy(update={"targets": ("sentiment",)}), tmp_path / "work")
    assert _Ears.n_heard == 2


# ---------------------------------------------------------------------------- settings and plans


def test_every_preset_has_its_prompts_and_survives_a_round_trip() -> None:
    assert len(PRESETS) == 3
    digests = set()
    for name in PRESETS:
        preset = configure(name)
        assert preset.name == name
        assert Preset.model_validate_json(preset.model_dump_json()) == preset
        wordings = Wordings(preset)
        assert wordings.ids
        digests.add(preset.digest(wordings.ids))
    assert len(digests) == 3


def test_the_digest_of_settings_changes_with_what_changes_a_text_and_with_nothing_else() -> None:
    preset = configure("mmeverse")
    ids = Wordings(preset).ids
    same = [
        "visual_objective.base_url=http://elsewhere:1/v1", "consolidate.in_flight=99",
        "consolidate.api_key_env=OTHER", "budget.requests=7", "detector.program=/x/y",
        "consolidate.price={tokens_in: 1, tokens_out: 2}", "audio_tone.requests_per_minute=5",
    ]  # fmt: skip
    for setting in same:
        assert configure("mmeverse", [setting]).digest(ids) == preset.digest(ids), setting
    other = [
        "visual_objective.model=x", "consolidate.temperature=0.5", "audio_tone.max_tokens=9",
        "media.longest_side_px=99", "detector.min_confidence=0.5", "units.without=[AU45]",
        "targets=[emotion]", "detector.folder=x", "need=[audio_tone]", "unlabelled=pseudo",
        "speech={checkpoint: a.pt}",
    ]  # fmt: skip
    found = {configure("mmeverse", [setting]).digest(ids) for setting in other}
    assert len(found | {preset.digest(ids), preset.digest([*ids, "more"])}) == len(other) + 2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("visual_objectve.model=x", "Did you mean 'visual_objective'"),
        ("consolidate.modell=x", "Did you mean 'model'"),
        ("detector.kind=openfase", "Did you mean 'openface'"),
        ("detector.kind=openface-csv", "needs detector.folder"),
        ("unlabelled=pseud", "Did you mean 'pseudo'"),
        ("consolidate.base_url=http://user:secret@host/v1", "has no user, password"),
        ("targets=[emotio]", "Did you mean 'emotion'"),
    ],
)
def test_a_misspelt_setting_names_the_near_miss(setting: str, says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        configure("mmeverse", [setting])


def test_own_prompt_files_take_the_place_of_shipped_ones(
    demo: Corpus, server: ChatServer, tmp_path: Path
) -> None:
    folder = tmp_path / "prompts"
    folder.mkdir()
    own = "name: mine\nrole: audio_tone\ntext: How does {{ person }} sound?\nmax_tokens: 7\n"
    (folder / "audio-tone.yaml").write_text(own)
    preset = preset_of(server, demo, f"prompts={folder}")
    [result] = results_of(annotate(demo, preset, tmp_path / "work", limit=1)).values()
    [body] = asked(server, "al")
    assert text_of(body) == "How does the person sound?"
    assert body["max_tokens"] == 7
    assert str(result.of("audio_tone")[0].prompt_id).startswith("mine@")
    (folder / "audio-tome.yaml").write_text(own)
    with pytest.raises(SchemaError, match=r"Did you mean 'audio-tone\.yaml'"):
        Wordings(preset)


def test_a_plan_counts_what_it_leaves_out_and_keeps_a_clips_records_together(
    demo: Corpus, tmp_path: Path
) -> None:
    twins = tuple(
        record.model_copy(update={"uid": f"twin/{n}"}) for n, record in enumerate(demo.records)
    )
    records = (*demo.records, *twins)
    results: Journal[RecordResult] = Journal(tmp_path, RecordResult)
    plan = plan_annotation(records, "s", ("emotion",), results, unit_clips=5)
    assert sorted(plan.todo) == list(range(24))
    for unit in plan.units:
        assert len(unit) <= 5
        assert {row % 12 for row in unit if row < 12} == {row % 12 for row in unit if row >= 12}
    plan = plan_annotation(records, "s", ("emotion",), results, splits=["train"], limit=3)
    n_train = sum(record.split == "train" for record in records)
    assert plan.left_out == {"not in split train": 24 - n_train, "beyond the first 3": n_train - 3}
    with pytest.raises(ManifestError, match="never looked at"):
        plan_annotation([records[0].model_copy(update={"clip": None})], "s", (), results)


def test_a_result_is_known_by_what_decides_it(demo: Corpus) -> None:
    record = demo.records[0]
    changes: list[dict[str, Any]] = [
        {}, {"person": "Ann"}, {"language": "de"}, {"emotion": "sad"}, {"subtitles": ()},
        {"uid": "demo/x"}, {"peak": Peak(index=1)}, {"action_units": {"AU12": 1.0}},
    ]  # fmt: skip
    keys = {result_key(record.model_copy(update=change), "s", ("emotion",)) for change in changes}
    keys.add(result_key(record, "t", ("emotion",)))
    assert len(keys) == len(changes) + 1 - (record.emotion == "sad")
    other = record.model_copy(update={"split": "val", "intent": "asking", "speaker": "x"})
    assert result_key(other, "s", ("emotion",)) == result_key(record, "s", ("emotion",))


def result_of(*steps_: StepResult, **fields: Any) -> RecordResult:
    return RecordResult(uid="a/b", media="b.mp4", sha256="0" * 64, steps=steps_, **fields)


def test_new_descriptions_take_the_place_of_old_ones_of_their_kind_alone() -> None:
    record = Record(
        uid="a/b",
        media="b.mp4",
        peak=Peak(index=9),
        action_units={"AU01": 1.0},
        descriptions=(
            Description(kind="multimodal", text="old"),
            Description(kind="audio_tone", text="old tone"),
        ),
    )
    new = annotated(
        record,
        result_of(
            StepResult(
                step="multimodal", target="emotion", status=Status.OK, text="new", model="m"
            ),
            StepResult(step="audio_tone", status=Status.FAILED, reason="refused: no"),
            StepResult(step="visual_objective", status=Status.ABSENT, reason="none"),
        ),
    )
    assert new.described("multimodal") == ("new",)
    assert new.described("audio_tone") == ("old tone",)
    assert new.described("visual_objective") == ()
    assert (new.peak, new.action_units) == (Peak(index=9), {"AU01": 1.0})


def test_only_what_failed_in_a_way_that_is_asked_for_is_tried_again() -> None:
    failed = result_of(
        StepResult(step="audio_tone", status=Status.FAILED, reason="refused: no"), time_s=100.0
    )
    assert is_wanted(None, ())
    assert not is_wanted(failed, ())
    assert not is_wanted(failed, ("missing",))
    assert is_wanted(failed, ("missing", "refused"))
    assert is_wanted(failed, ("refused",), since_s=101.0)
    assert not is_wanted(failed, ("refused",), since_s=100.0)


# ---------------------------------------------------------------------------- the journal


class Note(Model):
    text: str


KEYS = [f"{n:064x}" for n in range(4)]


@pytest.mark.fault("a torn or damaged line")
def test_a_journal_gives_back_the_newest_of_each_key_and_passes_over_damage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Journal(tmp_path, Note), Journal(tmp_path, Note)
    one.put(KEYS[0], Note(text='a \u00e9 "quoted" ,"checksum":"00000000"}'))
    two.put(KEYS[1], Note(text="b"))
    one.put(KEYS[1], Note(text="newer"))
    one.put(KEYS[2], Note(text="c"))
    two.refresh()
    one.refresh()
    for journal in (one, two, Journal(tmp_path, Note)):
        assert len(journal) == 3
        assert journal.get(KEYS[0]) == Note(text='a \u00e9 "quoted" ,"checksum":"00000000"}')
        assert journal.get(KEYS[1]) == Note(text="newer")
        assert journal.get(KEYS[3]) is None
    [segment] = [p for p in tmp_path.iterdir() if b'"c"' in p.read_bytes()]
    whole = segment.read_bytes()
    for end in range(len(whole) - 1, len(whole) - 30, -1):
        segment.write_bytes(whole[:end])
        assert KEYS[2] not in Journal(tmp_path, Note)
    segment.write_bytes(whole.replace(b'"c"', b'"x"'))
    with caplog.at_level(logging.WARNING):
        damaged = Journal(tmp_path, Note)
    assert KEYS[2] not in damaged
    assert damaged.get(KEYS[1]) == Note(text="newer")
    assert len(damaged.damaged) == 1
    assert str(segment) in caplog.text


def test_failures_that_may_pass_wait_for_a_success() -> None:
    kinds = ("missing", "unanswered", "refused", "undecodable")
    found = [
        steps.may_pass(
            result_of(StepResult(step="audio_tone", status=Status.FAILED, reason=f"{k}: x"))
        )
        for k in kinds
    ]
    assert found == [True, True, False, False]
    assert not steps.may_pass(result_of())
    assert Failure("missing", "x").reason == "missing: x"
