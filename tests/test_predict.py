"""A run asked about raw files: what the cached path says of the same clip, to the letter and the bit."""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import emocache
from cache.clip import Record, Subtitle
from cache.errors import CheckpointError, MediaError, SchemaError
from cache.labels import LabelSpace
from cache.manifest import Header
from eval.generate import generate
from eval.live.answer import LiveModel, ReplyStream
from eval.live.replies import checked_labels, settled
from eval.predictions import Prediction, read_predictions
from extract import tiny
from extract.annotate.evidence.transcribe import Transcriber
from tests.raw_clips import Made, make_run
from tests.test_transcribe import hears_nothing, save, says
from train.batches.reading import ViewReader
from train.data import Group, collate, model_arguments
from train.mixture import Ask

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file.*tiktoken:ResourceWarning"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_weights: dict[str, Path]) -> Made:
    return make_run(tmp_path_factory.mktemp("predict"), tiny_weights)


@pytest.fixture(scope="module")
def live(made: Made) -> Iterator[LiveModel]:
    with LiveModel.load(made.run) as loaded:
        yield loaded


NAMES = ("c0", "c1", "c2", "silent", "sound", "still")


def cached(live: LiveModel, made: Made, record: Record, **options: Any) -> Prediction:
    """Return what the path through the store says of a record."""
    [found] = generate(live.trained, made.store, [record], **options)
    # The record knows what a raw file does not tell.
    return found.model_copy(update={"truth": None, "split": None})


# ---- the same numbers as the cached path ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tokens_and_replies_equal_those_of_the_cached_path(
    live: LiveModel, made: Made, name: str
) -> None:
    record = made.record(name)
    seen = live.look(made.media / record.media, subtitle=record.subtitle())
    stored = ViewReader(made.store, live.trained.preset).read([record])
    for stream, tokens in stored.tokens.items():
        assert torch.equal(seen.views.tokens[stream], tokens), stream
    for stream, mask in stored.masks.items():
        assert torch.equal(seen.views.masks[stream], mask), stream
    for task in ("emotion", "think", "reason"):
        reply = live.ask(seen, task, max_new_tokens=40)
        assert reply.prediction == cached(live, made, record, task=task, max_new_tokens=40)
        assert reply.reply
    assert live.ask(seen).label in ("happy", "sad")


def test_masks_and_tasks_that_hide_equal_those_of_the_cached_path(
    live: LiveModel, made: Made
) -> None:
    record = made.record("c0")
    seen = live.look(made.media / record.media, subtitle=record.subtitle())
    replies = set()
    for task, masked in (("emotion", ("audio",)), ("think", ("image", "video")), ("audio", ())):
        reply = live.ask(seen, task, masked=masked, max_new_tokens=20)
        expected = cached(live, made, record, task=task, masked=masked, max_new_tokens=20)
        assert reply.prediction == expected
        replies.add(live.ask(seen, task, masked=masked, max_new_tokens=20).reply)
    assert seen.views.masks["audio"].any()


@pytest.mark.parametrize("task", ["emotion", "think"])
def test_likelihoods_equal_those_of_the_cached_path(live: LiveModel, made: Made, task: str) -> None:
    record = made.record("c1")
    seen = live.look(made.media / record.media, subtitle=record.subtitle())
    reply = live.ask(seen, task, likelihoods=True, max_new_tokens=20)
    expected = cached(live, made, record, task=task, likelihoods=True, max_new_tokens=20)
    assert reply.likelihoods == pytest.approx(expected.likelihoods, abs=1e-6)
    assert reply.prediction.model_copy(update={"likelihoods": None}) == expected.model_copy(
        update={"likelihoods": None}
    )
    assert live.likelihoods(seen, task) == pytest.approx(expected.likelihoods, abs=1e-6)
    assert live.likelihoods(seen, "reason") is None


def test_likelihoods_are_those_of_the_training_loss(live: LiveModel, made: Made) -> None:
    """The loss of an answer, which training computes in its own way, is its mean log-likelihood."""
    record = made.record("c2")
    seen = live.look(made.media / record.media)
    options = ("happy", "sad", "very surprised")
    renderer = live._renderer
    questions = tuple(
        renderer.question(
            record.model_copy(update={"emotion": option}),
            Ask("emotion", 0, options), with_answer=True, vary=False,
        )
        for option in options
    )  # fmt: skip
    batch = collate(live.trained.preset, [Group(record, questions)], seen.views)
    with torch.inference_mode():
        losses = live.trained.model(**model_arguments(batch))["answer_loss"].tolist()
    sizes = [len(q.prompt.answer_ids) for q in questions]
    weights = [math.exp(-loss * n) for loss, n in zip(losses, sizes, strict=True)]
    expected = {o: w / sum(weights) for o, w in zip(options, weights, strict=True)}
    assert live.likelihoods(seen, options=options) == pytest.approx(expected, rel=1e-4)
    assert live.ask(seen, options=options, likelihoods=True).likelihoods == pytest.approx(
        expected, rel=1e-4
    )


# ---- replies as they are written ------------------------------------------------------------------


def test_a_stream_is_the_reply_piece_by_piece(live: LiveModel, made: Made) -> None:
    seen = live.look(made.media / "c0.mp4")
    whole = live.ask(seen, "think", max_new_tokens=60)
    stream = live.stream(seen, "think", max_new_tokens=60)
    assert stream.reply is None
    pieces = list(stream)
    assert len(pieces) > 3
    assert all(pieces)
    assert "".join(pieces) == whole.reply
    assert stream.reply == whole
    assert next(stream, None) is None


def test_a_stream_that_is_closed_lets_others_ask(live: LiveModel, made: Made) -> None:
    seen = live.look(made.media / "c0.mp4")
    stream = live.stream(seen, "think")
    next(stream)
    answered = threading.Event()
    waiting = threading.Thread(target=lambda: (live.ask(seen), answered.set()))
    waiting.start()
    assert not answered.wait(0.3)  # one at a time
    stream.close()
    assert answered.wait(20)
    waiting.join()
    assert list(stream) == []
    assert stream.reply is None


def test_text_that_may_still_change_is_held_back() -> None:
    assert settled("a b ") == "a b"
    assert settled("caf\ufffd") == "caf"
    assert settled("") == ""
    ended = []
    stream = ReplyStream(iter(["a"]), lambda: ended.append(1))  # type: ignore[arg-type, return-value]
    assert list(stream) == ["a"]
    stream.close()
    assert ended == [1]


def test_threads_get_the_same_replies(live: LiveModel, made: Made) -> None:
    paths = [made.media / f"c{i}.mp4" for i in range(4)]
    expected = [live.ask(live.look(path), "think", max_new_tokens=30).prediction for path in paths]
    found: dict[int, Prediction] = {}

    def ask(i: int) -> None:
        found[i] = live.ask(live.look(paths[i]), "think", max_new_tokens=30).prediction

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == expected


# ---- labels, corpora, tasks -----------------------------------------------------------------------


def test_what_can_be_asked(live: LiveModel) -> None:
    assert live.corpora == ("made",)
    assert live.tasks == ("emotion", "think", "reason", "audio", "image")
    assert live.trained_tasks == ("emotion", "think")
    space = live.space("think")
    assert space is not None
    assert set(space.labels) == {"happy", "sad"}
    assert live.space("reason") is None
    assert live.corpus_of() == "made"


def test_other_labels_are_offered_and_read(live: LiveModel, made: Made) -> None:
    seen = live.look(made.media / "c0.mp4")
    asked = live.ask(seen, options=[" Bored", "HAPPY", "very  sad"], likelihoods=True)
    assert asked.options == ("bored", "happy", "very sad")
    assert asked.likelihoods is not None
    assert tuple(asked.likelihoods) == asked.options
    assert math.fsum(asked.likelihoods.values()) == pytest.approx(1)
    assert asked.label in (None, *asked.options)
    with pytest.raises(SchemaError, match="no labels for 'sentiment'"):
        live.ask(seen, "sentiment")
    assert live.ask(seen, "sentiment", options=["good", "bad"]).options == ("good", "bad")


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([], "no label is in the list"),
        (["happy", ""], "'' is no label"),
        (["happy", "Happy "], "twice"),
        (["happy, sad"], "is no label"),
        (["<answer>"], "is no label"),
    ],
)
def test_labels_that_are_none_are_refused(labels: list[str], why: str) -> None:
    with pytest.raises(SchemaError, match=why):
        checked_labels(labels)


def several(live: LiveModel) -> LiveModel:
    """Return the same model with labels of several corpora."""
    spaces = {
        "one/emotion": LabelSpace(name="one", labels=("happy", "sad"), aliases={"sadness": "sad"}),
        "two/emotion": LabelSpace(name="two", labels=("angry", "happy")),
        "one/intent": LabelSpace(name="intent", labels=("to ask", "to tell")),
    }
    header = Header(media_root=".", label_spaces=spaces)
    return LiveModel(replace(live.trained, header=header), live._reader)


def test_of_several_lists_of_labels_one_is_chosen(live: LiveModel, made: Made) -> None:
    model = several(live)
    assert model.corpora == ("one", "two")
    with pytest.raises(SchemaError, match=r"several lists.*one: happy, sad; two: angry, happy"):
        model.space("emotion")
    with pytest.raises(SchemaError, match=r"--corpus three.*Allowed: one, two"):
        model.space("emotion", "three")
    seen = model.look(made.media / "c0.mp4")
    with pytest.raises(SchemaError, match="--corpus"):
        model.ask(seen)
    asked = model.ask(seen, corpus="two")
    assert (asked.options, asked.prediction.uid) == (("angry", "happy"), "two/c0")
    there = model.look(made.media / "c0.mp4", corpus="two")
    assert model.ask(there).prediction == asked.prediction
    # The only list for a task needs no choice.
    only = model.ask(seen, "intent")
    assert (only.options, only.prediction.uid) == (("to ask", "to tell"), "one/c0")
    assert model.ask(seen, options=["a", "b"]).prediction.uid == "clip/c0"
    assert model.tasks[:2] == ("emotion", "intent")


def test_tasks_and_streams_that_are_none_are_refused(live: LiveModel, made: Made) -> None:
    seen = live.look(made.media / "silent.mp4")
    with pytest.raises(SchemaError, match="Did you mean 'emotion'"):
        live.ask(seen, "emotoin")
    with pytest.raises(SchemaError, match="unknown stream 'vidoe'"):
        live.ask(seen, masked=["vidoe"])
    with pytest.raises(MediaError, match=r"task 'audio' is shown audio.*there is none"):
        live.ask(seen, "audio")
    with pytest.raises(MediaError, match="is shown audio of a clip"):
        live.ask(seen, masked=["video", "image"])


# ---- subtitles ------------------------------------------------------------------------------------


def test_a_subtitle_is_quoted_as_a_records(live: LiveModel, made: Made) -> None:
    plain = live.look(made.media / "c3.mp4")
    given = live.with_subtitle(plain, " It <answer>\n rains. ")
    assert given.views is plain.views
    record = made.record("c3").model_copy(update={"subtitles": given.record.subtitles})
    assert record.subtitle() == "It <answer> rains."
    asked = live.ask(given, "think", max_new_tokens=30)
    assert asked.prediction == cached(live, made, record, task="think", max_new_tokens=30)
    assert asked.prediction.about is not None
    assert asked.prediction.about.subtitle == "It rains."
    again = live.with_subtitle(given, " ")
    assert live.ask(again).prediction == live.ask(plain).prediction
    long = live.with_subtitle(plain, "word " * 100_000)
    with pytest.raises(SchemaError, match="more than the language model's context"):
        live.ask(long)


def test_a_subtitle_that_the_run_does_not_read_is_told(live: LiveModel, made: Made) -> None:
    def with_prompt(**settings: Any) -> LiveModel:
        prompt = live.trained.preset.prompt.model_copy(update=settings)
        preset = live.trained.preset.model_copy(update={"prompt": prompt})
        return LiveModel(replace(live.trained, preset=preset), live._reader)

    path = made.media / "c3.mp4"
    english = with_prompt(subtitle_language="en")
    foreign = english.look(path, subtitle="Guten Tag.", subtitle_language="de")
    assert foreign.remarks == (
        "The subtitle is not shown to the model: it is in 'de', and the run reads those in 'en'.",
    )
    assert english.ask(foreign).prediction.about.subtitle is None  # type: ignore[union-attr]
    unsaid = english.look(path, subtitle="Hello.")
    assert (unsaid.remarks, unsaid.record.subtitle("en")) == ((), "Hello.")
    without = with_prompt(use_subtitle=False).look(path, subtitle="Hello.")
    assert without.remarks == (
        "The subtitle is not shown to the model: the run was trained without.",
    )


def test_speech_is_written_down_where_that_is_asked_for(
    live: LiveModel, made: Made, tmp_path: Path
) -> None:
    heard = Transcriber.load(save(says(" Hello there."), tmp_path / "mine.pt"))
    model = LiveModel(live.trained, live._reader, heard)
    assert model.can_transcribe
    seen = model.look(made.media / "c3.mp4", transcribe=True)
    assert seen.record.subtitles == (
        Subtitle(text="Hello there.", language="en", origin="asr:whisper-mine"),
    )
    assert seen.remarks == ('The subtitle was recognised by whisper-mine: "Hello there."',)
    given = model.look(made.media / "c3.mp4", subtitle="Go away.", transcribe=True)
    assert given.record.subtitle() == "Go away."
    silent = model.look(made.media / "silent.mp4", transcribe=True)
    assert silent.record.subtitles == ()
    deaf = Transcriber.load(save(hears_nothing(), tmp_path / "deaf.pt"))
    unheard = LiveModel(live.trained, live._reader, deaf)
    seen = unheard.look(made.media / "c3.mp4", transcribe=True)
    assert seen.remarks == ("The subtitle is missing: no speech was recognised.",)
    assert not live.can_transcribe
    with pytest.raises(SchemaError, match="--transcribe"):
        live.look(made.media / "c3.mp4", transcribe=True)


# ---- loading --------------------------------------------------------------------------------------


def test_other_encoder_weights_than_the_runs_are_refused(
    made: Made, tiny_weights: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_weights["eva"])
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other weights than the"):
        LiveModel.load(made.run, encoder_weights={"eva": tmp_path / "other.safetensors"})
    with pytest.raises(SchemaError, match="unknown name"):
        LiveModel.load(made.run, encoder_weights={"ava": tmp_path / "other.safetensors"})
    with pytest.raises(CheckpointError, match="not a run"):
        LiveModel.load(tmp_path)


# ---- the command line -----------------------------------------------------------------------------


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Return what calls `emocache predict` and tells its exit code, stdout and stderr."""
    for console in (emocache.out, emocache.err):
        monkeypatch.setattr(console, "_width", 300)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = emocache.main(["predict", *map(str, arguments)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def test_a_folder_is_answered_clip_by_clip(
    command: Callable[..., tuple[int, str, str]], made: Made, live: LiveModel, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in ("c0.mp4", "c1.mp4", "sound.wav"):
        (folder / name).symlink_to(made.media / name)  # leads out of the folder
        (folder / f"my {name}").write_bytes((made.media / name).read_bytes())
    (folder / "broken.mp4").write_text("no film")
    out = tmp_path / "replies.jsonl"
    code, shown, said = command(folder, "--run", made.run, "--out", out, "--likelihoods")
    assert code == 1
    assert "broken.mp4: cannot be opened as media" in said
    assert "answered 3 of 4 clips" in said
    assert "c0.mp4 leads out of the folder" in said
    found = read_predictions(out)
    assert [p.uid for p in found] == ["made/my c0", "made/my c1", "made/my sound"]
    for prediction in found:
        seen = live.look(folder / str(prediction.about.media))  # type: ignore[union-attr]
        assert live.ask(seen, likelihoods=True).prediction == prediction
        assert prediction.likelihoods is not None
        best = max(prediction.likelihoods, key=prediction.likelihoods.__getitem__)
        assert f"  {best}" in shown
    assert shown.count("█") > 20
    assert "There is no picture" in shown
    code, _, said = command(folder, "--run", made.run, "--out", out)
    assert (code, "there is such a file already" in said) == (2, True)
    assert read_predictions(out) == found


def test_json_is_one_document(
    command: Callable[..., tuple[int, str, str]], made: Made, live: LiveModel, tmp_path: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    clip = Path(os.fsdecode(bytes(tmp_path) + b"/not-\xff-text.mp4"))
    clip.write_bytes((made.media / "c1.mp4").read_bytes())
    code, shown, said = command(
        clip, tmp_path / "empty.mp4", "--run", made.run, "--task", "think", "--json",
        "--set", "data.failed=mask", "--mask", "picture",
    )  # fmt: skip
    assert code == 1
    document = json.loads(shown)
    good, bad = document["clips"]
    expected = live.ask(live.look(clip), "think", masked=("video", "image"))
    assert (document["task"], document["run"]) == ("think", live.trained.info.run_id)
    assert (good["reply"], good["label"]) == (expected.reply, expected.label)
    assert good["reasoning"] == expected.reasoning
    assert good["reply"].startswith("<think>" + good["reasoning"])
    assert good["streams"] == {"audio": "ok", "video": "ok", "image": "ok"}
    assert good["file"].endswith("/not-\\xff-text.mp4")
    assert good["duration_s"] == pytest.approx(1.0, abs=0.1)
    assert (good["masked"], good["error"]) == (["image", "video"], None)
    assert set(bad) == {"file", "error"}
    assert "empty (0 bytes)" in bad["error"]
    assert "empty.mp4: " in said


def test_one_clip_with_what_is_said_in_it(
    command: Callable[..., tuple[int, str, str]], made: Made, live: LiveModel, tmp_path: Path
) -> None:
    clip = made.media / "c0.mp4"
    told = command(clip, "--run", made.run, "--subtitle", "It is raining.", "--json")
    seen = live.look(clip, subtitle="It is raining.")
    assert json.loads(told[1])["clips"][0]["reply"] == live.ask(seen).reply
    assert json.loads(told[1])["clips"][0]["subtitle"] == "It is raining."
    save(says(" Hello there."), tmp_path / "mine.pt")
    heard = command(clip, "--run", made.run, "--transcribe", tmp_path / "mine.pt", "--json")
    assert json.loads(heard[1])["clips"][0]["subtitle"] == "Hello there."
    assert (told[0], heard[0]) == (0, 0)


def test_what_is_read_in_a_reply_is_shown(
    command: Callable[..., tuple[int, str, str]], made: Made
) -> None:
    code, shown, said = command(made.media / "c0.mp4", "--run", made.run, "--task", "reason")
    assert code == 0
    assert len(shown.splitlines()) == 2
    assert "never trained on task 'reason'" in said
    code, shown, _ = command(
        made.media / "c0.mp4", "--run", made.run, "--labels", "xylophone,zither", "--likelihoods"
    )
    assert code == 0
    assert "no label of the list" in shown
    assert "zither" in shown


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--task", "emotoin"], "Did you mean 'emotion'?"),
        (["--mask", "vidoe"], "Did you mean 'video'?"),
        (["--labels", "happy,happy"], "a label stands twice"),
        (["--corpus", "mode"], "Did you mean 'made'?"),
        (["--task", "intent"], "Give them with --labels"),
        (["--set", "data.filed=mask"], "failed"),
        (["--encoder-weights", "eva"], "is not NAME=PATH"),
        (["--weights", "last"], "--weights last: unknown"),
        (["--device", "gpu"], "unknown device"),
        (["--subtitle", "a", "--transcribe", "b.pt"], "not both"),
        (["--transcribe", "gone.pt"], "gone.pt"),
        (
            ["--transcribe", tiny.__file__.replace("__init__.py", "whisper_tiny.pt")],
            "an encoder without words",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(
    command: Callable[..., tuple[int, str, str]], made: Made, arguments: list[str], why: str
) -> None:
    code, shown, said = command(made.media / "c0.mp4", "--run", made.run, *arguments)
    assert (code, shown) == (2, "")
    assert why in said
    assert said.startswith("emocache: ")
    assert len(said.splitlines()) == 1


def test_a_subtitle_is_of_one_clip(
    command: Callable[..., tuple[int, str, str]], made: Made
) -> None:
    code, _, said = command(made.media, "--run", made.run, "--subtitle", "Hello.")
    assert code == 2
    assert "in one clip, and there are 7" in said


def test_ctrl_c_keeps_what_was_answered(
    command: Callable[..., tuple[int, str, str]],
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look = LiveModel.look

    def interrupted(self: LiveModel, path: Path, **options: Any) -> Any:
        if path.name == "c1.mp4":
            raise KeyboardInterrupt
        return look(self, path, **options)

    monkeypatch.setattr(LiveModel, "look", interrupted)
    out = tmp_path / "replies.jsonl"
    code, _, said = command(made.media, "--run", made.run, "--out", out)
    assert code == 130
    assert f"stopped after 1 of 7 clips. The replies so far are in {out}" in said
    assert [p.uid for p in read_predictions(out)] == ["made/c0"]


def test_an_imported_run_brings_no_labels(
    command: Callable[..., tuple[int, str, str]], made: Made, tmp_path: Path
) -> None:
    run = tmp_path / "imported"
    shutil.copytree(made.run, run)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "label_spaces": {}}))
    clip = made.media / "c0.mp4"
    assert command(clip, "--run", run)[0] == 2
    code, shown, _ = command(clip, "--run", run, "--labels", "happy,sad", "--json")
    assert code == 0
    [found] = json.loads(shown)["clips"]
    assert (found["uid"], found["offered"]) == ("clip/c0", ["happy", "sad"])
