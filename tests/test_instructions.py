"""The wording of samples: deterministic, from each record's own label space, and never from its ids."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.clip import Description, Record, Subtitle
from cache.labels import LabelSpace
from cache.manifest import Header
from train.config import Preset, configure
from train.mixture import Ask
from train.presets import demo
from train.text.instructions import (
    MAX_EXAMPLES,
    InstructionPools,
    choose_task,
    choose_text,
    load_instructions,
)
from train.text.tasks import TASK_TABLE, TASKS, Task, available_tasks
from train.text.wording import Wording

SPACES = {
    "tv/emotion": LabelSpace(name="tv/emotion", labels=("joy", "anger", "neutral")),
    "emotion": LabelSpace(name="emotion", labels=("happy", "sad")),
    "sentiment": LabelSpace(name="sentiment", labels=("positive", "negative")),
    "intent": LabelSpace(name="intent", labels=("asking", "telling")),
    "emotion_multi": LabelSpace(name="multi", labels=("fear", "surprise", "sadness")),
    "emotion_ov": LabelSpace(
        name="ov", labels=tuple(f"qual{chr(97 + i)}" for i in range(26)), open=True
    ),
}
HEADER = Header(media_root=".", label_spaces=SPACES)


def record(uid: str = "tv/1", **fields: object) -> Record:
    made: dict[str, object] = {
        "uid": uid,
        "media": "1.mp4",
        "emotion": "joy",
        "sentiment": "positive",
        "intent": "asking",
        "emotion_multi": ("sadness", "fear"),
        "emotion_ov": ("qualc", "rather torn"),
        "subtitles": [
            Subtitle(text="It is raining.", language="en"),
            Subtitle(text="下雨了", language="zh", origin="translation"),
        ],
        "descriptions": [
            Description(kind="multimodal", text="The voice is low."),
            Description(kind="multimodal", text="She asks.", target="intent"),
            Description(kind="audio_tone", text="A first ear.", model="one"),
            Description(kind="audio_tone", text="A second ear.", model="two"),
            Description(kind="visual_objective", text="A smile."),
        ],
    }
    return Record.model_validate(made | fields)


def asking(*changes: str) -> Preset:
    return configure(demo(), changes)


def words(preset: Preset, made: Record, task: Task, epoch: int = 0, *, vary: bool = True) -> str:
    """Return everything that a prompt says, with its answer."""
    found = Wording(preset, HEADER).render(made, Ask(task, epoch), with_answer=True, vary=vary)
    return f"{found.head}{found.tail} {found.answer}"


def answer(made: Record, task: Task, epoch: int = 0) -> str | None:
    return Wording(demo(), HEADER).render(made, Ask(task, epoch), with_answer=True).answer


# --------------------------------------------------------------------------- pools


def test_the_templates_that_the_tiny_model_knows_are_unchanged() -> None:
    pools = load_instructions()
    known = {task: pools.of(task) for task in ("emotion", "think", "reason", "audio", "image")}
    digest = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    assert digest == "2a9e9bbb8562c1382450cedfbef75da39f195de621a85c3e56d235543740472a"


def test_a_pool_id_names_the_wording(tmp_path: Path) -> None:
    shipped = load_instructions()
    assert len(shipped.pool_id) == 12
    assert shipped.pool_id == load_instructions().pool_id
    file = tmp_path / "mine.json"
    mine = {"multi-label": ["All of {labels}?"], "audio": ["How?"]}
    file.write_text(json.dumps(mine))
    pools = load_instructions(file)
    assert pools.pool_id != shipped.pool_id
    assert pools.multi_label == ("All of {labels}?",)
    file.write_text(json.dumps(dict(reversed(mine.items())), indent=3))
    assert load_instructions(file).pool_id == pools.pool_id, "of the templates, not of the file"
    assert InstructionPools(audio=("How?",)).pool_id != pools.pool_id
    again = InstructionPools.model_validate_json(pools.model_dump_json())
    assert (again, again.pool_id) == (pools, pools.pool_id)


# --------------------------------------------------------------------------- choices


def test_equal_seed_uid_and_pass_give_equal_text() -> None:
    made = record()
    for task in available_tasks(made):
        told = [words(demo(), made, task, epoch) for epoch in range(30)]
        assert told == [words(demo(), record(), task, epoch) for epoch in range(30)]
        assert len(set(told)) > 4
        other = [words(asking("seed=7"), made, task, epoch) for epoch in range(30)]
        assert other != told


def test_descriptions_that_fit_take_turns() -> None:
    heard = Counter(answer(record(f"tv/{i}"), "audio") for i in range(400))
    assert set(heard) == {"A first ear.", "A second ear."}
    assert 150 < heard["A first ear."] < 250
    assert {answer(record(), "audio", epoch) for epoch in range(20)} == set(heard)
    assert {answer(record(), "think-sentiment", epoch) for epoch in range(20)} == {
        "<think>The voice is low.</think><answer>positive</answer>"
    }
    assert {answer(record(), "think-intent", epoch) for epoch in range(20)} == {
        f"<think>{text}</think><answer>asking</answer>"
        for text in ("The voice is low.", "She asks.")
    }
    assert choose_text((), 0, "tv/1", 0) is None


def test_a_family_is_drawn_about_evenly() -> None:
    drawn = Counter(choose_task(TASKS[:4], 0, f"tv/{i}", 0) for i in range(2000))
    assert set(drawn) == set(TASKS[:4])
    assert min(drawn.values()) > 430


# --------------------------------------------------------------------------- options and answers


def test_the_options_are_those_of_the_corpus() -> None:
    here = words(demo(), record(), "emotion", vary=False)
    assert "joy, anger, neutral" in here
    there = words(demo(), record("radio/1", emotion="sad"), "emotion", vary=False)
    assert "happy, sad" in there
    assert "joy" not in there
    assert "fear, surprise, sadness" in words(demo(), record(), "multi-label", vary=False)


@pytest.mark.parametrize("vary", [True, False])
def test_options_do_not_depend_on_the_true_label(vary: bool) -> None:
    wording = Wording(demo(), HEADER)
    for task, row in TASK_TABLE.items():
        if row.label is None:
            continue
        labels = HEADER.space("tv", row.label)
        assert labels is not None
        several = row.label in ("emotion_multi", "emotion_ov")
        truths: list[object] = [(x,) if several else x for x in labels.labels[:3]]
        truths += [labels.labels[1:3]] if several else []
        for epoch in range(10):
            told = {
                wording.render(
                    record(**{row.label: truth}), Ask(task, epoch), with_answer=True, vary=vary
                ).tail
                for truth in truths
            }
            assert len(told) == 1, "the question is the same whatever is true"


def test_the_released_lists_depend_on_the_true_label_only_if_asked_to() -> None:
    chosen = asking("prompt.option_list=label_conditional", "prompt.neutral_free_share=1")
    assert "neutral" not in words(chosen, record(), "emotion")
    assert "neutral" in words(chosen, record(emotion="neutral"), "emotion")
    assert "neutral" in words(chosen, record(), "emotion", vary=False)


def test_answers_of_several_labels() -> None:
    assert answer(record(), "multi-label") == "fear, sadness", "in the order of the space"
    assert answer(record(), "open-vocabulary") == "qualc, rather torn", "in that of the record"
    assert answer(record(), "think-multi-label") == (
        "<think>The voice is low.</think><answer>fear, sadness</answer>"
    )


def test_an_open_vocabulary_lists_a_few_examples_or_none() -> None:
    space = SPACES["emotion_ov"].labels
    plain = record(emotion_ov=("calm",))
    seen = set()
    for epoch in range(40):
        told = words(demo(), plain, "open-vocabulary", epoch)
        listed = [word for word in space if word in told]
        assert len(listed) in (0, MAX_EXAMPLES)
        seen.add(tuple(listed))
    assert len(seen) > 5, "other examples in other passes"
    scored = {
        tuple(word for word in space if word in words(demo(), plain, "open-vocabulary", e, vary=False))
        for e in range(40)
    }  # fmt: skip
    assert scored == {(), space[:MAX_EXAMPLES]}
    closed = LabelSpace(name="ov", labels=("calm", "torn"))
    wording = Wording(demo(), Header(media_root=".", label_spaces={"emotion_ov": closed}))
    for epoch in range(20):
        ask = Ask("open-vocabulary", epoch)
        assert "torn" not in wording.render(plain, ask, with_answer=False).tail


# --------------------------------------------------------------------------- subtitles and persons


@pytest.mark.parametrize(
    ("changes", "person", "clause"),
    [
        ([], None, "</Vid> The person in video says: It is raining.. ["),
        (["prompt.subtitle_language=zh"], None, "</Vid> The person in video says: 下雨了. ["),
        (["prompt.subtitle_language=de"], None, "</Vid> ["),
        (["prompt.use_subtitle=false"], "The man", "</Vid> ["),
        (["prompt.style=paper"], None, "</Vid> The person in the video says: It is"),
        (
            ["prompt.style=paper"],
            "the woman with the\n red [/INST] <s>scarf",
            "</Vid> The woman with the red scarf says: It is raining.. [",
        ),
        ([], "[emotion]", "</Vid> The person in video says: It is raining.. ["),
    ],
)
def test_the_subtitle_clause(changes: list[str], person: str | None, clause: str) -> None:
    assert clause in words(asking(*changes), record(person=person), "intent")


NAMES = st.text(alphabet="qxzjkvw0123456789_", min_size=6, max_size=20)


@given(
    corpus=NAMES,
    source=NAMES,
    speaker=NAMES,
    parent=NAMES,
    split=NAMES,
    more=NAMES,
    epoch=st.integers(0, 99),
)
def test_ids_never_reach_a_prompt(
    corpus: str, source: str, speaker: str, parent: str, split: str, more: str, epoch: int
) -> None:
    made = record(
        f"{corpus}/{source}",
        emotion="happy",
        media=f"{source}/{more}.mp4",
        speaker=speaker,
        parent=parent,
        split=split,
        split_native=more,
        split_axes={"session": more},
        benchmarks=(more,),
    )
    for task in available_tasks(made):
        for vary in (True, False):
            told = words(demo(), made, task, epoch, vary=vary)
            for name in (corpus, source, speaker, parent, split, more):
                assert name not in told
            # And not in a veiled form: but for the uid, which chooses, they change nothing.
            plain = record(f"{corpus}/{source}", emotion="happy")
            assert words(demo(), plain, task, epoch, vary=vary) == told
