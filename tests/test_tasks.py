"""Tasks and families: what a record can answer, what a mixture asks, and what is refused before training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from cache.clip import Clip, Description, Record, Subtitle
from cache.commit import ClipTokens, Status
from cache.errors import ManifestError, SchemaError
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.evaluate import SCORED, evaluate
from eval.generate import load_run
from eval.metrics import MultiLabelScores
from eval.predictions import read_predictions
from tests.conftest import key_of, make_clip
from tests.training import described, header_of, rows_of
from train.config import CorpusShare, OptimConfig, Preset, StageConfig, configure, tasks_asked
from train.data import Renderer
from train.llm.backbone import load_tokenizer
from train.loop import run_tasks, train
from train.mixture import Mixture
from train.presets import demo, preset
from train.running.run import read_run
from train.text.tasks import FAMILIES, TASK_TABLE, TASKS, available_tasks, tasks_of
from train.text.wording import Wording

GOLDEN = "18d4e4f05ca4c0cde78ae86e42a7ff644708c9a1d29029fb5b840ac702ee6f7d"
OPTIM = OptimConfig(lr=1e-3, lr_min=0, warmup_steps=0, weight_decay=0, batch_size=3)
EMOTIONS = LabelSpace(name="tv/emotion", labels=("joy", "anger", "neutral"))
POLARITY = LabelSpace(
    name="tv/sentiment", labels=("positive", "neutral", "negative"), aliases={"pos": "positive"}
)
OTHER_POLARITY = LabelSpace(name="web/sentiment", labels=("negative", "positive"))
INTENTS = LabelSpace(name="tv/intent", labels=("asking", "telling"))
SEVERAL = LabelSpace(name="tv/emotion_multi", labels=("fear", "surprise", "sadness"))
WORDS = LabelSpace(name="tv/emotion_ov", labels=("torn", "calm"), open=True)
HEADER = Header(
    media_root=".",
    label_spaces={
        "tv/emotion": EMOTIONS,
        "tv/sentiment": POLARITY,
        "tv/intent": INTENTS,
        "tv/emotion_multi": SEVERAL,
        "tv/emotion_ov": WORDS,
        "web/sentiment": OTHER_POLARITY,
    },
)


def record(name: str = "0", corpus: str = "tv", **fields: object) -> Record:
    clip = Clip(sha256=key_of(f"{corpus}{name}"), n_bytes=1)
    made = {"uid": f"{corpus}/{name}", "media": f"{name}.mp4", "clip": clip, **fields}
    return Record.model_validate(made)


def text(target: str | None, kind: str = "multimodal") -> Description:
    return Description.model_validate({"kind": kind, "text": f"For {target}.", "target": target})


def stage(tasks: dict[str, float], **more: object) -> StageConfig:
    made = {"name": "s", "tasks": tasks, "n_steps": 10, "optim": OPTIM, **more}
    return StageConfig.model_validate(made)


# --------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("fields", "tasks"),
    [
        ({}, ()),
        ({"emotion": "joy"}, ("emotion",)),
        ({"sentiment": "neutral", "intent": "asking"}, ("sentiment", "intent")),
        ({"emotion_multi": ["fear"]}, ("multi-label",)),
        ({"emotion_ov": ["torn", "far away"]}, ("open-vocabulary",)),
        ({"descriptions": [text(None)]}, ("reason",)),
        ({"descriptions": [text("intent")]}, ("reason",)),
        ({"emotion": "joy", "descriptions": [text("intent")]}, ("emotion", "reason")),
        ({"emotion": "joy", "descriptions": [text(None)]}, ("emotion", "think", "reason")),
        (
            {"emotion": "joy", "intent": "asking", "descriptions": [text("intent")]},
            ("emotion", "intent", "think-intent", "reason"),
        ),
        (
            {"sentiment": "neutral", "emotion_multi": ["fear"], "descriptions": [text(None)]},
            ("sentiment", "multi-label", "think-sentiment", "think-multi-label", "reason"),
        ),
        ({"descriptions": [text(None, "audio_tone"), text(None, "visual_objective")]}, ("audio", "image")),
        ({"emotion": "joy", "descriptions": [text(None, "visual_expression")]}, ("emotion",)),
    ],
)  # fmt: skip
def test_the_tasks_that_a_record_can_answer(
    fields: dict[str, object], tasks: tuple[str, ...]
) -> None:
    assert available_tasks(record(**fields)) == tasks


def test_families_and_tags() -> None:
    recognition = ("emotion", "sentiment", "intent", "multi-label", "open-vocabulary")
    joint = ("think", "think-sentiment", "think-intent", "think-multi-label")
    assert (tasks_of("recognition"), tasks_of("joint"), tasks_of("audio")) == (
        recognition, joint, ("audio",),
    )  # fmt: skip
    assert FAMILIES == ("recognition", "joint")
    tags = {task: row.tag for task, row in TASK_TABLE.items()}
    assert tags == {task: "think" if task in joint else task for task in TASKS}
    hidden = {task: row.hides for task, row in TASK_TABLE.items() if row.hides}
    assert hidden == {"audio": ("image", "video"), "image": ("audio", "video")}
    with pytest.raises(SchemaError, match="unknown task 'joined'"):
        tasks_of("joined")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recognition"):
        stage({"recognitoin": 1.0})


# --------------------------------------------------------------------------- mixtures


def several(n: int = 12) -> tuple[Record, ...]:
    """Records with emotion and sentiment; every third has an intent in place of the emotion."""
    return tuple(
        record(
            str(i),
            emotion="joy" if i % 3 else None,
            intent=None if i % 3 else "asking",
            sentiment="neutral",
            descriptions=[text("sentiment")] if i % 2 else [],
        )
        for i in range(n)
    )


def test_a_family_stands_for_what_a_record_can_answer() -> None:
    both = stage({"recognition": 0.5, "joint": 0.5}, modality_dropout={"audio": 0.3})
    first, second = Mixture(several(), both, seed=3), Mixture(several(), both, seed=3)
    forwards = [first[i] for i in range(3000)]
    assert [second[i] for i in range(2999, -1, -1)][::-1] == forwards, "entered anywhere"
    drawn: Counter[tuple[bool, str]] = Counter()
    for sample in forwards:
        (ask,) = sample.asks
        assert ask.task in available_tasks(sample.record)
        drawn[sample.record.intent is None, ask.task] += 1
    assert set(drawn) == {
        (True, "emotion"), (True, "sentiment"), (True, "think-sentiment"),
        (False, "intent"), (False, "sentiment"), (False, "think-sentiment"),
    }  # fmt: skip
    share = sum(n for (_, task), n in drawn.items() if task == "think-sentiment") / 3000
    assert share == pytest.approx(0.5, abs=0.04)
    # By halves, though no more than by a hash: 1000 draws.
    assert drawn[True, "emotion"] / drawn[True, "sentiment"] == pytest.approx(1, abs=0.2)


def test_a_record_meets_every_task_of_a_family_in_later_passes() -> None:
    only = Mixture((record(emotion="joy", sentiment="neutral"),), stage({"recognition": 1}), seed=0)
    asked = [only[i].asks[0] for i in range(60)]
    assert [ask.epoch for ask in asked] == list(range(60))
    assert 20 < sum(ask.task == "emotion" for ask in asked) < 40
    other = Mixture(
        (record(emotion="joy", sentiment="neutral"),), stage({"recognition": 1}), seed=1
    )
    assert [other[i].asks[0].task for i in range(60)] != [ask.task for ask in asked]


def test_a_family_of_one_task_draws_as_the_task_does() -> None:
    alike = tuple(
        record(str(i), emotion="joy", descriptions=[text(None)] if i % 2 else []) for i in range(9)
    )
    families = Mixture(alike, stage({"recognition": 0.4, "joint": 0.6}), seed=5)
    tasks = Mixture(alike, stage({"emotion": 0.4, "think": 0.6}), seed=5)
    assert [families[i] for i in range(500)] == [tasks[i] for i in range(500)]


def test_pairs_of_a_clip_may_be_of_a_family() -> None:
    mixture = Mixture(several(), stage({"recognition": 1, "joint": 1}, pairs_per_clip=3), seed=5)
    seen = set()
    for i in range(300):
        sample = mixture[i]
        assert len({ask.epoch for ask in sample.asks}) == 3
        assert {ask.task for ask in sample.asks} <= set(available_tasks(sample.record))
        seen.update(ask.task for ask in sample.asks)
    assert seen == {"emotion", "sentiment", "intent", "think-sentiment"}


def test_a_family_that_nobody_can_answer_is_refused() -> None:
    with pytest.raises(
        ManifestError,
        match=r"task 'joint' needs records with a label in 'emotion' and a description of kind "
        r"'multimodal' of 'emotion' or of no label, or a label in 'sentiment' .*none of the 1 has",
    ):
        Mixture((record(emotion="joy"),), stage({"joint": 1}), seed=0)


def test_the_demo_presets_give_the_samples_of_earlier_versions() -> None:
    # The digest was made by the code before tasks had a table, on records with the same contents.
    texts = {
        "multimodal": "The voice is low",
        "audio_tone": "A low voice",
        "visual_objective": "A smile",
    }
    lacking = {"multimodal": 3, "audio_tone": 5, "visual_objective": 7}

    def made(i: int) -> Record:
        found = [
            Description.model_validate({"kind": kind, "text": f"{said} {i}."})
            for kind, said in texts.items()
            if i % lacking[kind]
        ]
        return Record(
            uid=f"made/{i}", media=f"{i}.mp4", clip=Clip(sha256=f"{i:064x}", n_bytes=1),
            emotion=("happy", "sad", "neutral")[i % 3], descriptions=tuple(found),
            subtitles=(Subtitle(text=f"It is raining {i}."),) if i % 2 else (),
        )  # fmt: skip

    records = [made(i) for i in range(60)]
    tokenizer = load_tokenizer(demo().model.llm)
    settings: list[list[str]] = [
        [],
        ["stages.0.pairs_per_clip=3", "stages.1.pairs_per_clip=2",
         "prompt.option_list=label_conditional", "prompt.answer_norm=blip"],
        ["stages.1.tasks.audio=0.4", "stages.1.tasks.image=0.2", "stages.1.tasks.reason=1",
         "prompt.style=paper", "stages.1.modality_dropout={audio: 0.3}"],
    ]  # fmt: skip
    rows = []
    for changes in settings:
        chosen = configure(demo(), changes)
        renderer = Renderer(chosen, tokenizer, header_of(("happy", "sad", "neutral")))
        for number, of_stage in enumerate(chosen.stages):
            mixture = Mixture(records, of_stage, chosen.seed + number)
            for place in range(0, 700, 7):
                sample = mixture[place]
                for ask in sample.asks:
                    asked = renderer.question(sample.record, ask, with_answer=True).prompt
                    scored = renderer.question(
                        sample.record, ask, with_answer=False, vary=False
                    ).prompt
                    rows.append(
                        [sample.record.uid, ask.task, ask.epoch, list(sample.hidden),
                         list(asked.head_ids), list(asked.tail_ids), list(asked.answer_ids),
                         list(scored.tail_ids)]
                    )  # fmt: skip
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert (len(rows), digest) == (900, GOLDEN)


def test_presets_ask_what_the_paper_and_the_released_code_ask() -> None:
    first, second = preset("v2").stages
    assert (first.tasks, second.tasks) == ({"recognition": 1}, {"recognition": 0.5, "joint": 0.5})
    assert preset("v2-single-joint").stages[0].tasks == second.tasks
    small = preset("demo").stages
    assert [s.tasks for s in small] == [{"emotion": 1}, {"emotion": 0.5, "think": 0.5}]
    # Reference facts, section 5.2; equal weights, but for the intents of stage 2.
    usual = {"emotion": 1, "audio": 1, "image": 1}, {"emotion": 1, "reason": 1, "think": 1}
    polarity = (
        {"sentiment": 1, "audio": 1, "image": 1},
        {"sentiment": 1, "reason": 1, "think-sentiment": 1},
    )
    pools: dict[str, tuple[dict[str, float], dict[str, float]]] = {
        **dict.fromkeys(("mer2023", "caer", "dfew", "e3", "iemocap"), usual),
        **dict.fromkeys(("mosi", "mosei", "sims-v2"), polarity),
        "meld": (
            {"emotion": 1, "sentiment": 1, "audio": 1, "image": 1},
            {"emotion": 1, "sentiment": 1, "reason": 1, "think": 0.5, "think-sentiment": 0.5},
        ),
        "mc-eiu": (
            {"emotion": 1, "intent": 1, "audio": 1, "image": 1},
            {"emotion": 1, "intent": 2, "reason": 1, "think-intent": 1},
        ),
        "mafw": (
            {"emotion": 1, "multi-label": 1, "audio": 1, "image": 1},
            {"emotion": 1, "multi-label": 1, "reason": 1, "think": 1, "think-multi-label": 1},
        ),
        "bold": (
            {"multi-label": 1, "audio": 1, "image": 1},
            {"multi-label": 1, "reason": 1, "think-multi-label": 1},
        ),
    }
    released = preset("v2-released").stages
    for number, of_stage in enumerate(released):
        assert {name: c.tasks for name, c in of_stage.corpora.items()} == {
            name: both[number] for name, both in pools.items()
        }
    assert [s.corpora["mc-eiu"].weight for s in released] == [120, 150]
    assert tasks_asked(released[1]) == (
        "emotion", "reason", "think", "multi-label", "think-multi-label", "intent", "think-intent",
        "sentiment", "think-sentiment",
    )  # fmt: skip
    mixed = stage({"audio": 1}, corpora={"tv": CorpusShare(weight=1), "no": CorpusShare(weight=0)})
    assert tasks_asked(mixed) == ("audio",)


# --------------------------------------------------------------------------- refusals before training


def asking(*changes: str) -> Preset:
    return configure(demo(), changes)


def test_a_task_without_a_label_space_is_refused() -> None:
    bare = Header(media_root=".", label_spaces={"tv/emotion": EMOTIONS, "web/intent": INTENTS})
    with pytest.raises(
        ManifestError,
        match=r"tv/0: there is no label space for 'intent' of corpus 'tv'.*Known: tv/emotion, web/int",
    ):
        Wording(demo(), bare).check([record(emotion="joy", intent="asking")], TASKS)
    Wording(demo(), bare).check([record(emotion="joy", intent="asking")], ("emotion",))


def test_words_that_no_list_can_hold_are_refused() -> None:
    wording = Wording(demo(), HEADER)
    wording.check([record(emotion_ov=["a bit sad"])], TASKS)
    for word in ("sad, tired", "<s>"):
        with pytest.raises(SchemaError, match=rf"tv/0: '{word}' in 'emotion_ov' cannot be named"):
            wording.check([record(emotion_ov=["calm", word])], TASKS)
    comma = LabelSpace(name="x", labels=("a, b", "c"))
    spaces = Header(media_root=".", label_spaces={"emotion_multi": comma})
    with pytest.raises(SchemaError, match=r"label 'a, b' holds a comma.*as an alias"):
        Wording(demo(), spaces).check([record(emotion_multi=["c"])], TASKS)


def test_a_missing_pool_is_refused_before_training(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"emotion": ["Which? {labels}"], "think": ["Why? {labels}"]}))
    records = [record(emotion="joy", sentiment="neutral")]
    wording = Wording(asking(f"prompt.instructions={mine}"), HEADER)
    wording.check(records, run_tasks(demo()))
    with pytest.raises(SchemaError, match=r"mine\.json' have no pool 'sentiment'; they have"):
        wording.check(records, run_tasks(asking("stages.0.tasks={recognition: 1}")))


# --------------------------------------------------------------------------- from training to scores


def corpus() -> tuple[Record, ...]:
    """Twelve clips of `tv` with all labels, six of `web` with a polarity of another space."""
    of_tv = [
        record(
            str(i),
            split="train" if i < 8 else "val" if i < 10 else "test",
            emotion=EMOTIONS.labels[i % 3],
            sentiment=POLARITY.labels[i % 3],
            intent=INTENTS.labels[i % 2],
            emotion_multi=SEVERAL.labels[i % 3 :],
            emotion_ov=("torn", "far away")[: 1 + i % 2],
            descriptions=[*described("Low."), text("intent"), text("emotion_multi")],
        )
        for i in range(12)
    ]
    of_web = [
        record(
            str(i), "web", split="train" if i < 4 else "test",
            sentiment=OTHER_POLARITY.labels[i % 2], person="The man",
        )
        for i in range(6)
    ]  # fmt: skip
    return (*of_tv, *of_web)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]
) -> tuple[Path, Manifest, TokenStore]:
    """A run of both families on two corpora, six steps in all."""
    root = tmp_path_factory.mktemp("families")
    manifest = Manifest(header=HEADER, records=corpus())
    store = TokenStore.open_or_create(root / "store")
    for spec in specs.values():
        keys = [r.uid.replace("/", "") for r in manifest.records]
        clips: Sequence[ClipTokens] = [make_clip(spec, key) for key in keys]
        assert all(clip.status is Status.OK for clip in clips)
        store.commit(spec, clips, {"torch": "0"})
    write_manifest(root / "m.parquet", manifest)
    chosen = asking(
        "stages.0.tasks={recognition: 1.0}", "stages.1.tasks={recognition: 0.5, joint: 0.5}",
        "stages.0.n_steps=3", "stages.1.n_steps=3", "stages.0.optim.batch_size=4",
        "stages.1.optim.max_tokens=900", "stages.1.pairs_per_clip=2",
        "execution.log_every_steps=1",
    )  # fmt: skip
    train(chosen, manifest, root / "m.parquet", store, root / "run")
    return root / "run", manifest, store


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def test_a_run_of_families_validates_every_task(
    trained: tuple[Path, Manifest, TokenStore],
) -> None:
    run, manifest, _ = trained
    assert read_run(run)[1].label_spaces == manifest.header.label_spaces
    validated = {
        stage: {key.removeprefix("val_loss_") for key in row if key.startswith("val_loss_")}
        for row in rows_of(run)
        for stage in [row["stage"]]
        if "val_loss" in row
    }
    recognition, joint = set(tasks_of("recognition")), set(tasks_of("joint"))
    assert validated == {"stage1": recognition, "stage2": recognition | joint}


@pytest.mark.parametrize("task", ["intent", "multi-label", "think-multi-label"])
def test_a_label_task_is_scored(trained: tuple[Path, Manifest, TokenStore], task: str) -> None:
    run, manifest, store = trained
    found = evaluate(run, manifest, store, split="test", task=task, max_new_tokens=4)
    assert found.report_html.parent == run / f"eval-test-{task}"
    (row,) = found.rows
    field = TASK_TABLE[task].label  # type: ignore[index]
    assert field is not None
    assert row.scores.labels == HEADER.label_spaces[f"tv/{field}"].labels
    assert row.scores.n_scored == 2
    page = found.report_html.read_text(encoding="utf-8")
    for made in read_predictions(found.predictions):
        (truth,) = (r for r in manifest.records if r.uid == made.uid)
        assert (made.truth, *made.truths) == (
            (None, *truth.emotion_multi) if field == "emotion_multi" else (truth.intent,)
        )
        assert made.renderer_version == 2
        assert made.pool_id == Wording(demo(), HEADER).pools.pool_id
        assert made.pool_id in page
    assert isinstance(row.scores, MultiLabelScores) == (field == "emotion_multi")
    assert ("Exact sets" in page) == (field == "emotion_multi")
    assert ("Confusion matrix" in page) == (field != "emotion_multi")


def test_corpora_are_scored_within_their_own_spaces(
    trained: tuple[Path, Manifest, TokenStore],
) -> None:
    run, manifest, store = trained
    found = evaluate(
        run, manifest, store, split="test", task="sentiment", masks=["audio"], max_new_tokens=2
    )
    names = [(row.name, row.scores.labels, row.scores.n_scored) for row in found.rows]
    assert names == [
        ("tv: all streams", POLARITY.labels, 2),
        ("tv: audio masked", POLARITY.labels, 2),
        ("web: all streams", OTHER_POLARITY.labels, 2),
        ("web: audio masked", OTHER_POLARITY.labels, 2),
    ]
    folder = run / "eval-test-sentiment"
    assert found.reports == (folder / "tv" / "report.html", folder / "web" / "report.html")
    assert found.report_html == found.reports[0]
    assert "sentiment on split test, web" in found.reports[1].read_text(encoding="utf-8")
    assert set(json.loads(found.scores.read_text())) == {name for name, _, _ in names}
    assert len(read_predictions(found.predictions)) == 8


def test_what_has_no_list_of_labels_is_not_scored(
    trained: tuple[Path, Manifest, TokenStore],
) -> None:
    run, manifest, store = trained
    assert len(SCORED) == 8
    for task in ("open-vocabulary", "reason", "audio", "image"):
        with pytest.raises(SchemaError, match=f"task '{task}' names no label of a list.*think-int"):
            evaluate(run, manifest, store, split="test", task=task)
    bare = [r.model_copy(update={"sentiment": None}) for r in manifest.records]
    only = Manifest(header=HEADER, records=tuple(r for r in bare if r.corpus == "tv"))
    with pytest.raises(ManifestError, match="none of its 2 records has a label in 'sentiment'"):
        evaluate(run, only, store, split="test", task="sentiment")

    more = LabelSpace(name="tv/intent", labels=("asking", "telling", "joking"))
    other = Manifest(
        header=HEADER.model_copy(
            update={"label_spaces": HEADER.label_spaces | {"tv/intent": more}}
        ),
        records=tuple(
            r.model_copy(update={"intent": "joking"}) for r in manifest.records if r.corpus == "tv"
        ),
    )
    with pytest.raises(ManifestError, match=r"tv/10: label 'joking' is not.*the run was trained"):
        evaluate(run, other, store, split="test", task="intent")


def test_a_run_meets_the_spaces_of_other_corpora(
    trained: tuple[Path, Manifest, TokenStore],
) -> None:
    run, _, _ = trained
    spaces = {"new/intent": INTENTS, "tv/intent": OTHER_POLARITY}
    header = load_run(run, header=Header(media_root=".", label_spaces=spaces)).header
    assert header.space("new", "intent") == INTENTS
    assert header.space("tv", "intent") == INTENTS, "what the run was trained to name"
    assert header.space("web", "sentiment") == OTHER_POLARITY


def test_runs_of_the_first_schema_are_read(trained: tuple[Path, Manifest, TokenStore]) -> None:
    run, _, _ = trained
    file = run / "run.json"
    now = file.read_text()
    old = json.loads(now)
    del old["label_spaces"]
    old |= {"schema_version": 1, "label_space": EMOTIONS.model_dump(mode="json")}
    try:
        for space, known in ((old["label_space"], {"emotion": EMOTIONS}), (None, {})):
            file.write_text(json.dumps(old | {"label_space": space}))
            info = read_run(run)[1]
            assert (info.schema_version, info.label_spaces) == (2, known)
    finally:
        file.write_text(now)
