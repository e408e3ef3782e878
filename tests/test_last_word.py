"""Emotion-LLaMA's way to read a label: the last word, and neutral for whatever was not offered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import emocache
from cache.clip import Clip, Record
from cache.errors import PredictionError, SchemaError
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.evaluate import evaluate
from eval.parse import parse_last_word
from eval.predictions import read_predictions
from eval.scoring.score import score_all, score_file
from eval.scoring.texts import read_reply
from tests.conftest import key_of, make_clip
from tests.predecessor import small
from tests.scoring_rows import rows_of, score, write
from tests.training import described, header_of
from train.checkpoint import trained_tensors
from train.model import build
from train.published.importing import import_run

LABELS = ("neutral", "angry", "happy", "Sad")


def upstream(reply: str, offered: tuple[str, ...]) -> str:
    """Do what section 9 of the reference facts says of the scorer, to a reply without outer blanks."""
    word = reply.split(" ")[-1]
    return word if word in offered else "neutral"


@pytest.mark.parametrize(
    ("reply", "label", "how"),
    [
        ("happy", "happy", "exact"),
        (" the emotion is happy\n", "happy", "exact"),
        ("it is sad", "Sad", "exact"),
        ("neutral", "neutral", "exact"),
        ("happy.", "neutral", "other"),
        ("Happy", "neutral", "other"),
        ("happy, angry", "angry", "exact"),
        ("not happy", "happy", "exact"),
        ("a\nhappy", "neutral", "other"),
        ("<answer>happy</answer>", "neutral", "other"),
        ("", "neutral", "other"),
    ],
)
def test_the_last_word_or_neutral(reply: str, label: str, how: str) -> None:
    assert parse_last_word(reply, LABELS)[:2] == (label, how)


@given(st.lists(st.sampled_from(["happy", "angry", "glad", "neutral", "happy.", "x"]), min_size=1))
def test_it_is_what_the_scorer_did(words: list[str]) -> None:
    offered = ("neutral", "angry", "happy")
    reply = " ".join(words)
    assert parse_last_word(reply, offered).label == upstream(reply, offered)
    said = read_reply(reply, "mer2023", "last-word")
    assert said.predicted == (upstream(reply, offered),)


def test_without_neutral_other_words_are_off_the_list() -> None:
    assert parse_last_word("glad", ("happy", "sad")) == (None, "off_list", "glad")
    assert parse_last_word(" ", ("happy", "sad")) == (None, "empty", "")


def test_scores_count_by_the_last_word(tmp_path: Path) -> None:
    pairs = [
        ("happy", "he is happy"), ("happy", "happy."), ("neutral", "I cannot tell"),
        ("neutral", ""), ("sad", "happily sad"), ("angry", "neutral"),
    ]  # fmt: skip
    found = score(tmp_path, rows_of(pairs), "dfew", reading="last-word")
    assert found.score == pytest.approx(4 / 6)
    assert found.parts == pytest.approx({"happy": 1 / 2, "neutral": 1, "sad": 1, "angry": 0})
    assert (found.reading, found.replies) == ("last-word", {"exact": 3, "other": 3})
    assert [example.reply for example in found.examples] == ["happy.", "I cannot tell", ""]
    assert score(tmp_path, rows_of(pairs), "dfew").score == 0


def test_sets_of_several_labels_have_no_last_word(tmp_path: Path) -> None:
    told = "name several labels, of which the reading last-word keeps one. Give --reading tag"
    path = write(tmp_path / "predictions.jsonl", rows_of([("anger; fear", "anger, fear")]))
    for task in ("mafw-m", "bold"):
        with pytest.raises(PredictionError, match=told):
            score_file(path, task, reading="last-word")
    with pytest.raises(SchemaError, match=r"'last_word'.*mean 'last-word'"):
        score_file(path, "dfew", reading="last_word")


@pytest.fixture
def corpus(tmp_path: Path, specs: dict[str, TokenSpec]) -> tuple[Path, Manifest, TokenStore]:
    """An imported Emotion-LLaMA of random weights, and clips to ask it about."""
    import torch

    torch.manual_seed(5)
    model, _ = build(small())
    parts, lora = trained_tensors(model)
    names = {"image": "llama_proj", "cls": "cls_tk_llama_proj"}
    names |= {n: f"feats_llama_proj{i}" for i, n in enumerate(("local", "video", "audio"), 1)}
    state = {f"llama_model.{key}": tensor for key, tensor in lora.items()}
    for key, tensor in parts.items():
        _, _, block, last = key.split(".")
        state[f"{names[block]}.{last}"] = tensor
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    import_run(tmp_path / "checkpoint.pth", small(), tmp_path / "run")
    store = TokenStore.open_or_create(tmp_path / "store")
    for spec in specs.values():
        clips = [make_clip(spec, f"clip{i}") for i in range(4)]
        store.commit(spec, clips, {"torch": "0"})
    records = tuple(
        Record(
            uid=f"made/{i}", media=f"{i}.mp4", clip=Clip(sha256=key_of(f"clip{i}"), n_bytes=1),
            split="test", emotion=("so happy", "neutral")[i % 2], descriptions=described("Low."),
        )
        for i in range(4)
    )  # fmt: skip
    manifest = Manifest(header=header_of(("so happy", "neutral")), records=records)
    write_manifest(tmp_path / "m.parquet", manifest)
    return tmp_path / "run", manifest, store


def test_an_evaluation_may_read_by_the_last_word(
    corpus: tuple[Path, Manifest, TokenStore], capsys: pytest.CaptureFixture[str]
) -> None:
    run, manifest, store = corpus
    found = evaluate(
        run, manifest, store, split="test", reading="last-word", max_new_tokens=9, masks=["audio"],
        reasoning_tokens=3,
    )  # fmt: skip
    predictions = read_predictions(found.predictions)
    assert len(predictions) == 8
    for one in predictions:
        assert one.label == upstream(one.reply, ("so happy", "neutral"))
    # A label of two words is none by its last one, so nobody is happy here.
    assert {one.label for one in predictions} == {"neutral"}
    assert "other" in {one.parse for one in predictions}
    whole = [one for one in predictions if not one.masked]
    right = sum(one.label == one.truth for one in whole) / len(whole)
    assert found.rows[0].scores.accuracy == right
    # Its pools have no joint task: the examples are explained by reason.
    explained = read_predictions(found.predictions.with_name("examples.jsonl"))
    assert {one.task for one in explained} == {"reason"}
    page = found.report_html.read_text(encoding="utf-8")
    assert "the reply counts as neutral" in page
    assert "no label: counted as neutral" in page
    assert "asks for reasoning alone" in page
    with pytest.raises(SchemaError, match="those to 'think' are more"):
        evaluate(run, manifest, store, split="test", task="think", reading="last-word")

    folder = run.parent
    command = ["evaluate", run, "--manifest", folder / "m.parquet", "--store", store.root]
    asked = [*map(str, command), "--max-new-tokens", "1", "--reading", "last_word"]
    assert emocache.main(asked) == 2
    assert "Did you mean 'last-word'?" in " ".join(capsys.readouterr().err.split())


def test_a_benchmark_of_several_sets_scores_what_the_reading_fits(
    corpus: tuple[Path, Manifest, TokenStore], tmp_path: Path
) -> None:
    run, manifest, store = corpus
    found = evaluate(run, manifest, store, split="test", max_new_tokens=1, n_examples=0)
    lines = [json.loads(line) for line in found.predictions.read_text().splitlines()]
    for line, (name, truth) in zip(
        lines, [("dfew", "happy"), ("dfew", "neutral"), ("mafw-m", None), ("mafw-m", None)],
        strict=True,
    ):  # fmt: skip
        del line["crc32c"]
        line |= {"benchmark": name, "reply": "so happy", "label": None, "parse": "off_list"}
        line |= {"truth": truth, "truths": [] if truth else ["anger"]}
    path = write(tmp_path / "replies.jsonl", lines)
    unscored: dict[str, str] = {}
    scored = score_all(path, reading="last-word", unscored=unscored)
    assert (list(scored), list(unscored)) == (["dfew"], ["mafw-m"])
    assert scored["dfew"].result.score == 0.5
