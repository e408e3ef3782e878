"""Presets of what was published: the predecessor, and the released code row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cache.clip import Clip, Description, Record
from cache.commit import ClipTokens, Status
from cache.encoders import NAMED_ENCODERS, EvaEncoder
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, write_manifest
from cache.recipes import token_specs
from cache.spec import TokenSpec, differences
from cache.store import TokenStore
from eval.generate import generate, load_run
from tests.conftest import key_of, make_clip
from train.batches.reading import ViewReader
from train.config import Preset, configure
from train.data import Renderer, collate
from train.loop import train
from train.mixture import Ask
from train.model import EmotionLlama, build
from train.packing import Grouper
from train.presets import v1, v2, v2_released
from train.running.stage import learning_rates
from train.scaling import at_demo_scale

NINE = ("neutral", "angry", "happy", "sad", "worried", "surprise", "fear", "contempt", "doubt")
"""Labels of the predecessor (reference facts, section 9)."""

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


# --------------------------------------------------------------------------- v1


def test_v1_trains_the_predecessors_parameters() -> None:
    with torch.device("meta"):
        model = EmotionLlama(v1(), LlamaForCausalLM(LlamaConfig()))
    pooled = (1024 + 1) * 4096
    assert model.trainable() == {
        "adapter.audio": pooled,
        "adapter.video": pooled,
        "adapter.image": 23_072_768,
        "adapter.local": pooled,
        "adapter.cls": 5_771_264,
        "lora": 33_554_432,
    }
    assert 3 * pooled == 12_595_200
    assert sum(model.trainable().values()) == 74_993_664
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 74_993_664


def test_v1_reads_what_section_9_of_the_facts_says() -> None:
    tokens = v1().tokens
    assert tokens.image is not None
    assert v2().tokens.image is not None
    assert differences(v2().tokens.image, tokens.image) == {"frames.kind": ("middle", "first")}
    by_name = token_specs(
        "chinese-hubert-large+utt,mae-large:video+face+utt,videomae-large+face+utt"
    )
    assert (tokens.audio, tokens.local, tokens.video) == by_name
    assert tokens.audio == by_name[0]
    assert all(spec.max_shape[-1] == 1024 for spec in by_name)
    layout = v1().layout()
    assert layout.blocks == (("image", 256), ("local", 1), ("video", 1), ("audio", 1), ("cls", 1))
    assert layout.groups == (slice(0, 256), slice(256, 260))


def test_views_of_pooled_tokens_say_what_they_are() -> None:
    tokens, views = v1().tokens, v1().views
    said = {n: getattr(views, n).definition(spec) for n, spec in tokens.by_input().items()}
    assert said["audio"] == "the stored mean over time"
    assert said["video"] == said["local"] == "the stored mean over time and patches"
    assert tokens.image is not None
    assert views.image is not None
    alone = tokens.image.model_copy(update={"cls_only": True})
    assert views.image.definition(alone) == "the CLS token alone"


def test_v1_learns_in_the_steps_and_at_the_rates_of_the_paper() -> None:
    first, second = v1().stages
    assert first.n_steps + second.n_steps == 300_000
    assert first.tasks == {"emotion": 0.5, "reason": 0.5}
    assert second.tasks == {"reason": 1.0}
    assert (*first.corpora, *second.corpora) == ("merr-coarse", "merr-fine")
    rate = learning_rates(first.optim, first.n_steps)
    assert rate(1000) == pytest.approx(1e-5)
    assert rate(first.n_steps) == pytest.approx(1e-6)
    constant = learning_rates(second.optim, second.n_steps)
    assert {constant(step) for step in range(0, second.n_steps + 1, 7500)} == {1e-6}
    assert v1().model.lora == v2().model.lora
    assert v1().model.llm == v2().model.llm


def test_v1_may_have_what_v2_has() -> None:
    """A preset, not a fork: each of its choices can be set back, down to v2 itself."""
    later = v2()
    data = v1().model_dump()
    data |= {
        field: getattr(later, field) for field in ("name", "tokens", "views", "prefix", "prompt")
    }
    data |= {"model": later.model, "stages": later.stages}
    assert Preset.model_validate(data) == later
    fused = configure(
        v1(),
        [
            "model.fusion.kind=conv-attention",
            "prefix=[[fusion, image], [local, video, audio, cls]]",
        ],
    )
    assert dict(fused.layout().blocks)["fusion"] == 64


@pytest.fixture(scope="module")
def merr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Preset, Manifest, Path, TokenStore]:
    """The predecessor at demo scale with a few made-up clips of both its corpora; clip 2 has no sound."""
    root = tmp_path_factory.mktemp("merr")
    preset = configure(
        at_demo_scale(v1()),
        [
            "stages.0.n_steps=3",
            "stages.1.n_steps=2",
            "stages.0.optim.batch_size=2",
            "stages.1.optim.batch_size=2",
            "data.val_split=train",
            "execution.n_workers=0",
        ],
    )
    store = TokenStore.open_or_create(root / "store")
    for i, spec in enumerate(preset.tokens.all()):
        stored = spec.with_weights(f"{i}a" * 32)
        clips = [_clip(stored, n) for n in range(6) if not (n == 2 and spec.stream == "audio")]
        store.commit(stored, clips, {"torch": "0"})
        if spec.stream == "audio":
            store.commit(stored, [ClipTokens(key_of("clip2"), Status.ABSENT)], {"torch": "0"})
    records = tuple(_record(corpus, n) for corpus in ("merr-coarse", "merr-fine") for n in range(6))
    space = LabelSpace(name="emotion", labels=NINE)
    manifest = Manifest(
        header=Header(media_root=".", label_spaces={"emotion": space}), records=records
    )
    write_manifest(root / "m.parquet", manifest)
    return preset, manifest, root / "m.parquet", store


def _clip(spec: TokenSpec, n: int) -> ClipTokens:
    return make_clip(spec, f"clip{n}", n_audio=1)


def _record(corpus: str, n: int) -> Record:
    said = [Description(kind="multimodal", text=f"Coarse words {n}.", version="coarse")]
    if corpus == "merr-fine":
        said.append(Description(kind="multimodal", text=f"Refined words {n}.", version="fine"))
    return Record(
        uid=f"{corpus}/{n}",
        media=f"{n}.mp4",
        clip=Clip(sha256=key_of(f"clip{n}"), n_bytes=1),
        split="train",
        emotion=NINE[n],
        descriptions=tuple(said),
    )


def test_v1_trains_and_answers_end_to_end(
    merr: tuple[Preset, Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    preset, manifest, path, store = merr
    result = train(preset, manifest, path, store, tmp_path / "run")
    assert result.n_steps == 5
    assert set(result.info.trainable) == {
        *(f"adapter.{name}" for name in ("audio", "video", "image", "local", "cls")), "lora"
    }  # fmt: skip
    for stage in ("stage1", "stage2"):
        trained = load_run(tmp_path / "run", stage=stage)
        for task in ("emotion", "reason"):
            replies = list(
                generate(trained, store, manifest.records[:3], task=task, max_new_tokens=3)
            )
            assert [r.uid for r in replies] == [r.uid for r in manifest.records[:3]]
            assert set(replies[0].spec_ids) == {"audio", "video", "image", "local"}
            assert [r.about.absent for r in replies if r.about] == [(), (), ("audio",)]


def test_v1_sees_its_two_groups_where_its_tags_are(
    merr: tuple[Preset, Manifest, Path, TokenStore],
) -> None:
    preset, manifest, _, store = merr
    _, tokenizer = build(preset)
    reader = ViewReader(store, preset)
    grouper = Grouper(preset, reader, Renderer(preset, tokenizer, manifest.header), None)
    records = manifest.records[1:3]
    groups = [grouper.group(r, [Ask("emotion", 0)], with_answer=True) for r in records]
    batch = collate(preset, groups, reader.read(records))
    n_text, n_image = len(batch["text_ids"]), preset.layout().groups[0].stop
    shown = ""
    for place in batch["order"].tolist():
        token = (place - n_text) % preset.layout().total
        shown += (
            tokenizer.convert_ids_to_tokens(int(batch["text_ids"][place]))
            if place < n_text
            else ("#" if token < n_image else "lvac"[token - n_image])
        )
    plain = shown.replace("▁", " ").replace("Ġ", " ")
    first, second = plain.split(tokenizer.bos_token)[1:]
    # Each text is tokenized by itself, and LLaMA's tokenizer begins it with a blank.
    assert f"<video>{'#' * n_image} </video> <feature>lvac </feature> [emo" in first
    assert f"<video>{'#' * n_image} </video> <feature>lvc </feature> [emo" in second, (
        "without sound"
    )


# --------------------------------------------------------------------------- v2-released


def test_the_released_code_takes_other_tokens() -> None:
    """Reference facts, section 8, rows 1, 2, 3 and 5; nothing else of a spec differs."""
    paper, released = v2().tokens, v2_released().tokens
    found = {
        name: differences(spec, released.by_input()[name])
        for name, spec in paper.by_input().items()
    }
    assert found == {
        "audio": {"encoder.padded": (False, True)},
        "video": {
            "encoder.depth": (39, 40),
            "encoder.norm": ("affine_free", "checkpoint"),
            "frames.kind": ("uniform", "window"),
            "pixels.interpolation": ("bicubic", "bilinear"),
            # timm's and torchvision's ImageNet statistics against CLIP's.
            "pixels.mean": ([0.48145466, 0.4578275, 0.40821073], [0.485, 0.456, 0.406]),
            "pixels.std": ([0.26862954, 0.26130258, 0.27577711], [0.229, 0.224, 0.225]),
        },
        "image": {"frames.kind": ("middle", "peak")},
    }  # fmt: skip
    assert EvaEncoder.model_validate(NAMED_ENCODERS["eva-g"]).depth == 39
    assert v2_released().layout() == v2().layout()


def test_the_released_code_asks_otherwise_than_it_trains() -> None:
    """Rows 7, 14, 16, 17 and 18."""
    prompt, data = v2_released().prompt, v2_released().data
    changed = differences(v2().prompt, prompt)
    assert set(changed) == {
        "option_list", "answer_norm", "eval_bos", "subtitle_language", "eval_subtitle_language"
    }  # fmt: skip
    assert (prompt.option_list, prompt.answer_norm) == ("label_conditional", "blip")
    assert (v2().prompt.eval_bos, prompt.eval_bos) == (1, 2)
    asked = {
        corpus: (prompt.language(corpus), prompt.language(corpus, asking=True))
        for corpus in ("mer2023", "mer2024", "meld", "sims-v2")
    }
    others = dict.fromkeys(("mer2024", "meld", "sims-v2"), (None, None))
    assert asked == {"mer2023": ("en", "zh"), **others}
    assert set(differences(v2().data, data)) == {"mask_missing", "failed"}
    assert (data.mask_missing, data.failed) == (False, "mask")


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        (1, ["tokens.image.frames.kind=peak"]),
        (2, ["tokens.video.frames.kind=window"]),
        (
            3,
            [
                "tokens.video.encoder.depth=40", "tokens.video.encoder.norm=checkpoint",
                "tokens.video.pixels.interpolation=bilinear",
                "tokens.video.pixels.mean=[0.485, 0.456, 0.406]",
                "tokens.video.pixels.std=[0.229, 0.224, 0.225]",
            ],
        ),
        (5, ["tokens.audio.encoder.padded=true"]),
        (7, ["data.mask_missing=false", "data.failed=mask"]),
        (14, ["prompt.option_list=label_conditional"]),
        (16, ["prompt.eval_bos=2"]),
        (17, ["prompt.answer_norm=blip"]),
        (
            18,
            ["prompt.subtitle_language={mer2023: en}", "prompt.eval_subtitle_language={mer2023: zh}"],
        ),
    ],
)  # fmt: skip
def test_each_row_can_be_asked_for_alone(row: int, settings: list[str]) -> None:
    """Alone against v2 each row takes exactly its part of what the preset changes."""
    alone = differences(v2(), configure(v2(), settings))
    together = differences(v2(), v2_released())
    assert alone
    assert alone.items() <= together.items(), row
    assert len(alone) == len(settings), "and each of its settings says something"


def test_the_rows_together_are_the_preset() -> None:
    rows = [
        "tokens.image.frames.kind=peak", "tokens.video.frames.kind=window",
        "tokens.video.encoder.depth=40", "tokens.video.encoder.norm=checkpoint",
        "tokens.video.pixels.interpolation=bilinear", "tokens.video.pixels.mean=[0.485, 0.456, 0.406]",
        "tokens.video.pixels.std=[0.229, 0.224, 0.225]", "tokens.audio.encoder.padded=true",
        "data.mask_missing=false", "data.failed=mask", "prompt.option_list=label_conditional",
        "prompt.eval_bos=2", "prompt.answer_norm=blip", "prompt.subtitle_language={mer2023: en}",
        "prompt.eval_subtitle_language={mer2023: zh}",
    ]  # fmt: skip
    built = configure(v2(), rows)
    # Row 8 is the stages, with the tables of corpora and tasks that tests/test_tasks.py checks.
    assert (
        built.model_copy(update={"name": "v2-released", "stages": v2_released().stages})
        == v2_released()
    )
