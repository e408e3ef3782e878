"""Conversations for other trainers say what training says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache.clip import Clip, Description, Record, Subtitle
from cache.errors import ManifestError, SchemaError
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, iter_records, read_header, write_manifest
from tests.conftest import key_of
from train.config import configure
from train.data import Renderer
from train.mixture import Ask
from train.presets import demo, v2
from train.prompt import RENDERER_VERSION
from train.text.export import export_conversations, preview
from train.text.instructions import load_instructions
from train.text.tasks import available_tasks

HEADER = Header(
    media_root="media",
    label_spaces={
        "tv/emotion": LabelSpace(name="tv/emotion", labels=("joy", "anger", "neutral")),
        "web/emotion": LabelSpace(name="web/emotion", labels=("happy", "sad")),
        "sentiment": LabelSpace(name="sentiment", labels=("positive", "negative")),
        "emotion_multi": LabelSpace(name="multi", labels=("fear", "surprise")),
    },
)


class Letters:
    """A tokenizer whose ids are code points."""

    bos_token_id = 1
    eos_token_id = 2

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, Any]:
        assert add_special_tokens is False
        return {"input_ids": list(map(ord, text))}


def records(n: int = 12) -> tuple[Record, ...]:
    return tuple(
        Record(
            uid=f"{('tv', 'web')[i % 2]}/{i}",
            media=f"part {i % 3}/clip_{i}.mp4",
            clip=Clip(sha256=key_of(str(i)), n_bytes=1, has_video=True, has_image=True),
            split="train" if i < 8 else "test",
            emotion=(("joy", "anger", "neutral")[i % 3], ("happy", "sad")[i % 3 % 2])[i % 2],
            sentiment="positive" if i % 4 else None,
            emotion_multi=("surprise", "fear") if i % 5 == 0 else (),
            person="The man" if i % 3 else None,
            subtitles=(Subtitle(text=f"Rain <video> 雨 {i} </Vid>"),) if i % 2 else (),
            descriptions=(
                Description(kind="multimodal", text=f"A long story {i}."),
                Description(kind="audio_tone", text="One."),
                Description(kind="audio_tone", text="Two."),
            )
            * (i % 3 > 0),
        )
        for i in range(n)
    )


MANIFEST = Manifest(header=HEADER, records=records())


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("seed", "epoch"), [(None, 0), (7, 0), (7, 3)])
def test_conversations_are_what_training_renders(
    tmp_path: Path, seed: int | None, epoch: int
) -> None:
    n = export_conversations(MANIFEST, tmp_path / "a.jsonl", preset=demo(), seed=seed, epoch=epoch)
    rows = lines(tmp_path / "a.jsonl")
    asked = [(r, task) for r in MANIFEST.records for task in available_tasks(r)]
    assert len(rows) == n == len(asked)
    chosen = demo() if seed is None else configure(demo(), [f"seed={seed}"])
    renderer = Renderer(chosen, Letters(), HEADER)
    for row, (record, task) in zip(rows, asked, strict=True):
        prompt = renderer.question(record, Ask(task, epoch), with_answer=True).prompt
        human, gpt = row["conversations"]
        assert (human["from"], gpt["from"]) == ("human", "gpt")
        tag, question = human["value"].split("\n", 1)
        assert tag == "<video>"
        assert "".join(map(chr, prompt.tail_ids)) == f"</Vid> {question} [/INST]"
        assert "".join(map(chr, prompt.answer_ids)) == f"{gpt['value']}\x02"
        assert row["id"] == f"{record.uid}#{task}"
        assert row["video"] == record.media
        assert row["metadata"] == {
            "corpus": record.corpus,
            "task": task,
            "pool_id": load_instructions().pool_id,
            "renderer_version": RENDERER_VERSION,
        }
    texts = [row["conversations"][0]["value"] for row in rows]
    assert all(text.count("<video>") == 1 for text in texts), "a subtitle cannot add media"
    assert not any("Vid" in text or "INST" in text for text in texts)
    assert any("The man says: Rain 雨 1. [" in text for text in texts)


def test_sharegpt_has_media_in_lists(tmp_path: Path) -> None:
    export_conversations(MANIFEST, tmp_path / "a.jsonl", preset=demo())
    export_conversations(MANIFEST, tmp_path / "b.jsonl", preset=demo(), style="sharegpt")
    for llava, share in zip(lines(tmp_path / "a.jsonl"), lines(tmp_path / "b.jsonl"), strict=True):
        assert share == {
            "conversations": llava["conversations"],
            "videos": [llava["video"]],
            "metadata": llava["metadata"],
        }


def test_the_files_load_as_tables(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs emocache[hub]")
    for style in ("llava", "sharegpt"):
        file = tmp_path / f"{style}.jsonl"
        n = export_conversations(MANIFEST, file, preset=demo(), style=style)  # type: ignore[arg-type]
        table = datasets.load_dataset(
            "json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert len(table) == n
        assert table[0]["conversations"][1]["from"] == "gpt"


@pytest.mark.parametrize(
    ("media", "clip", "tag", "key"),
    [
        ("a.mp4", None, "<video>", "video"),
        ("a.PNG", None, "<image>", "image"),
        ("a.wav", None, "<audio>", "audio"),
        ("a.bin", {"has_video": False, "has_image": True}, "<image>", "image"),
        ("a.mp4", {"has_video": False, "has_image": False, "has_audio": True}, "<audio>", "audio"),
    ],
)
def test_the_kind_of_media(
    tmp_path: Path, media: str, clip: dict[str, bool] | None, tag: str, key: str
) -> None:
    seen = None if clip is None else Clip(sha256=key_of("a"), n_bytes=1, **clip)
    one = [Record(uid="tv/1", media=media, clip=seen, emotion="joy")]
    export_conversations(one, tmp_path / "a", header=HEADER)
    export_conversations(one, tmp_path / "b", header=HEADER, style="sharegpt")
    (llava,), (share,) = lines(tmp_path / "a"), lines(tmp_path / "b")
    assert llava["conversations"][0]["value"].startswith(f"{tag}\n[emotion] ")
    assert (llava[key], share[f"{key}s"]) == (media, [media])


def test_records_may_be_streamed_chosen_and_asked_some_tasks(tmp_path: Path) -> None:
    file = tmp_path / "m.parquet"
    write_manifest(file, MANIFEST)
    n = export_conversations(
        iter_records(file), tmp_path / "new" / "a.jsonl", header=read_header(file),
        tasks=["recognition", "audio"], split="test",
    )  # fmt: skip
    rows = lines(tmp_path / "new" / "a.jsonl")
    tasks = {(row["id"].partition("#")[0], row["metadata"]["task"]) for row in rows}
    assert len(tasks) == n
    wanted = ("emotion", "sentiment", "multi-label", "audio")
    assert tasks == {
        (r.uid, task)
        for r in MANIFEST.select("test")
        for task in available_tasks(r)
        if task in wanted
    }


def test_nothing_is_written_of_what_cannot_be_exported(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    out.write_text("old")

    def failing() -> Iterator[Record]:
        yield records()[0]
        yield Record(
            uid="tv/empty",
            media="a.mp4",
            descriptions=(Description(kind="audio_tone", text="<s>"),),
        )

    with pytest.raises(SchemaError, match=r"tv/empty, task 'audio': an answer to 'audio' needs"):
        export_conversations(failing(), out, header=HEADER)
    with pytest.raises(ManifestError, match="no record of split 'tset' can answer any task"):
        export_conversations(MANIFEST, out, split="tset")
    with pytest.raises(ManifestError, match="no record can answer intent or image"):
        export_conversations(MANIFEST, out, tasks=["intent", "image"])
    with pytest.raises(ManifestError, match="need the header"):
        export_conversations(records(), out)
    with pytest.raises(SchemaError, match=r"unknown style 'lava'.*Did you mean 'llava'"):
        export_conversations(MANIFEST, out, style="lava")  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="unknown task 'emotoin'"):
        export_conversations(MANIFEST, out, tasks=["emotoin"])  # type: ignore[list-item]
    assert out.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_preview_shows_what_a_record_is_asked() -> None:
    record = MANIFEST.records[5]
    shown = preview(record, HEADER, v2())
    assert [row.task for row in shown] == list(available_tasks(record))
    by_task = {row.task: row for row in shown}
    start = (
        r"\[INST\] <Vid> \{64 fusion, 256 image, 64 video, 64 audio\} </Vid> "
        r"The man says: Rain 雨 5\. "
    )
    assert re.fullmatch(
        rf"{start}\[emotion\] .*(happy, sad|sad, happy).* \[/INST\]", by_task["emotion"].prompt
    )
    assert by_task["emotion"].answer == "happy"
    assert re.fullmatch(rf"{start}\[think\] .* \[/INST\]", by_task["think-sentiment"].prompt)
    assert by_task["think-multi-label"].answer == (
        "<think>A long story 5.</think><answer>fear, surprise</answer>"
    )
    bare = Header(media_root=".")
    with pytest.raises(ManifestError, match="no label space for 'emotion' of corpus 'web'"):
        preview(record, bare, v2())
