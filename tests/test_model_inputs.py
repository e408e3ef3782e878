"""Models of any inputs: which tensors are read, where they stand, and that nothing else changes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cache.clip import Clip, Record
from cache.errors import CacheMissError, CheckpointError, ManifestError, SchemaError
from cache.manifest import Manifest, read_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.generate import check_masked, generate, load_run
from tests.training import make_corpus
from train.batches.reading import ViewReader, Views, usable
from train.checkpoint import last_checkpoint
from train.config import FUSED, FusionConfig, FusionKind, Preset, configure
from train.data import Group, Question, Renderer, collate, model_arguments, prefix_masks
from train.estimates.estimate import estimate, lines
from train.fusion import PreFusion, fused_mask, make_fusion
from train.llm.attention import attention_of
from train.loop import train
from train.mixture import Ask, Mixture, can_answer
from train.model import EmotionLlama, build
from train.packing import Grouper
from train.presets import demo
from train.prompt import PromptTokens
from train.text.tasks import TASK_TABLE

NO_FUSION = "model.fusion.kind=none"
SHORT = [
    "stages.0.n_steps=2", "stages.1.n_steps=2", "stages.0.optim.batch_size=2",
    "stages.1.optim.batch_size=2", "execution.log_every_steps=1", "execution.n_workers=0",
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def kinds(specs: dict[str, TokenSpec]) -> dict[str, TokenSpec]:
    """The demo's specs, a second one of the video stream, and the CLS token alone."""
    face = specs["video"].model_copy(update={"utterance": True, "grid": None})
    return {**specs, "local": face, "cls": specs["image"].model_copy(update={"cls_only": True})}


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, TokenSpec]
) -> tuple[Manifest, Path, TokenStore]:
    """Fourteen made-up clips; number 3 has no audio, number 5 no picture."""
    path, store = make_corpus(tmp_path_factory.mktemp("corpus"), kinds)
    return read_manifest(path), path, TokenStore.open(store)


@pytest.fixture(scope="module")
def rows(kinds: dict[str, TokenSpec]) -> dict[str, list[str]]:
    """Settings that leave inputs out or add some: name of the row -> overrides of the demo preset."""
    local = [
        f"tokens.local={kinds['local'].canonical_json()}",
        "views.local={n_frames: 1, grid: 1}",
    ]
    cls = f"tokens.image={kinds['cls'].canonical_json()}"
    without = {name: f"tokens.{name}=null" for name in FUSED}
    return {
        "audio": [without["video"], without["image"], NO_FUSION],
        "image": [without["video"], without["audio"], NO_FUSION],
        "video": [without["image"], without["audio"], NO_FUSION],
        "audio+image": [without["video"]],
        "audio+video": [without["image"]],
        "image+video": [without["audio"]],
        "image+video, queries": [without["audio"], "model.fusion.kind=q-former"],
        "audio+video, one token": [without["image"], "model.fusion.kind=affectgpt-attention"],
        "fusion alone": ["prefix=[[fusion]]"],
        "fused CLS token": [cls],
        "CLS token": [cls, without["audio"], without["video"], NO_FUSION, "prefix=[[cls]]"],
        "all": [*local, "prefix=[[fusion, image, local, video, audio, cls]]"],
        "local": [*local, *without.values(), NO_FUSION, "prefix=[[local]]"],
    }  # fmt: skip


LAYOUTS = {
    "audio": {"audio": 16},
    "image": {"image": 36},
    "video": {"video": 16},
    "audio+image": {"fusion": 16, "image": 36, "audio": 16},
    "audio+video": {"fusion": 16, "video": 16, "audio": 16},
    "image+video": {"fusion": 16, "image": 36, "video": 16},
    "image+video, queries": {"fusion": 32, "image": 36, "video": 16},
    "audio+video, one token": {"fusion": 1, "video": 16, "audio": 16},
    "fusion alone": {"fusion": 16},
    "fused CLS token": {"fusion": 16, "video": 16, "audio": 16},
    "CLS token": {"cls": 1},
    "all": {"fusion": 16, "image": 36, "local": 1, "video": 16, "audio": 16, "cls": 1},
    "local": {"local": 1},
}
"""Row -> blocks of its prefix: 16 audio tokens, 4 frames of 2 x 2, (168 / 14)^2 / 4 image tokens."""


# --------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("row", LAYOUTS)
def test_the_prefix_has_the_blocks_of_what_is_read(row: str, rows: dict[str, list[str]]) -> None:
    layout = configure(demo(), rows[row]).layout()
    assert dict(layout.blocks) == LAYOUTS[row]
    assert list(layout.names) == list(LAYOUTS[row]), "in the order of the prefix"
    assert layout.groups == (slice(0, layout.total),)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["tokens={}"], "a model without any input; give at least one of audio, video, image, local"),
        (["views.audio=null"], "tokens.audio is given without views.audio"),
        (["tokens.audio=null", "tokens.image=null"], r"fuses at least two.*reads \['video'\].*none"),
        (["prefix=[[fusion, image, video]]", NO_FUSION], "prefix has no place for audio, though tok"),
        (["prefix=[[image, video, audio]]"], "prefix has no place for fusion; add it, or set"),
        (["prefix=[[fusion, image, image]]"], "prefix names image twice"),
        (["prefix=[[image], [fusion]]"], "style=code has 1 splice point, but prefix has 2 groups"),
        (["prompt.style=v1"], "style=v1 has 2 splice points, but prefix has 1 groups"),
    ],
)  # fmt: skip
def test_a_model_that_makes_no_sense_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        configure(demo(), settings)


def test_a_spec_of_another_stream_is_refused(kinds: dict[str, TokenSpec]) -> None:
    with pytest.raises(
        SchemaError, match=r"tokens.local is a spec of stream 'image', it needs 'vid"
    ):
        configure(demo(), [f"tokens.local={kinds['image'].canonical_json()}"])


def test_an_image_without_patches_needs_the_cls_block(kinds: dict[str, TokenSpec]) -> None:
    alone = ["tokens.audio=null", "tokens.video=null", NO_FUSION]
    preset = configure(demo(), [f"tokens.image={kinds['cls'].canonical_json()}", *alone])
    with pytest.raises(SchemaError, match=r"nothing of a clip enters the sequence.*put `cls` into"):
        preset.layout()


def test_specs_are_named_once_however_many_inputs_take_them(kinds: dict[str, TokenSpec]) -> None:
    video = kinds["video"].canonical_json()
    same = [f"tokens.local={video}", f"tokens.video={video}", "views.local={n_frames: 1, grid: 1}"]
    preset = configure(demo(), [*same, "prefix=[[fusion, image, video, audio, local]]"])
    assert list(preset.tokens.by_input()) == ["audio", "video", "image", "local"]
    assert [spec.stream for spec in preset.tokens.all()] == ["audio", "video", "image"]
    assert preset.hidden_inputs(("video",)) == ("video", "local")
    assert preset.hidden_inputs(("image", "audio")) == ("audio", "image")
    assert dict(preset.layout().blocks)["local"] == 1
    assert dict(preset.layout().blocks)["video"] == 16


def test_subtitles_have_a_language_by_corpus() -> None:
    prompt = configure(
        demo(),
        ["prompt.subtitle_language={tv: en}", "prompt.eval_subtitle_language={tv: zh, web: de}"],
    ).prompt
    assert [prompt.language(c) for c in ("tv", "web", "radio")] == ["en", None, None]
    asked = [prompt.language(c, asking=True) for c in ("tv", "web", "radio")]
    assert asked == ["zh", "de", None]
    one = configure(demo(), ["prompt.subtitle_language=en"]).prompt
    assert one.language("tv") == one.language("web", asking=True) == "en"


# --------------------------------------------------------------------------- reading and packing


def grouper_of(preset: Preset, manifest: Manifest, reader: ViewReader) -> Grouper:
    _, tokenizer = build(preset)
    return Grouper(preset, reader, Renderer(preset, tokenizer, manifest.header), None)


@pytest.mark.parametrize("row", LAYOUTS)
@pytest.mark.parametrize("mask", [True, False])
def test_valid_tokens_are_counted_as_they_are_laid_out(
    row: str, mask: bool, rows: dict[str, list[str]], corpus: tuple[Manifest, Path, TokenStore]
) -> None:
    """Of every clip, whatever is hidden: counted before anything is read, and found in the batch."""
    manifest, _, store = corpus
    preset = configure(demo(), [*rows[row], f"data.mask_missing={str(mask).lower()}"])
    reader = ViewReader(store, preset)
    grouper = grouper_of(preset, manifest, reader)
    records = usable(manifest.records, reader, preset.data)
    hides = [h for n in range(4) for h in itertools.combinations(("audio", "video", "image"), n)]
    counts = set()
    for record in records:
        groups = [grouper.group(record, [Ask("emotion", 0)], h, with_answer=True) for h in hides]
        views = reader.read([record] * len(hides), hides)
        batch = collate(preset, groups, views)
        found = prefix_masks(preset, batch["masks"]).sum(dim=1).tolist()
        assert [group.n_prefix for group in groups] == found, (record.uid, hides)
        assert len(batch["order"]) == sum(group.n_positions for group in groups)
        counts |= {*found}
        for name, tokens in views.tokens.items():
            if name != "image_cls":
                assert not tokens[~views.masks[name].expand(tokens.shape[:2])].any(), name
    if mask:
        assert {0, preset.layout().total} <= counts
    else:
        assert counts == {preset.layout().total}


def test_what_the_model_does_not_read_is_never_looked_for(
    corpus: tuple[Manifest, Path, TokenStore], rows: dict[str, list[str]]
) -> None:
    manifest, _, store = corpus
    preset = configure(demo(), rows["audio"])
    reader = ViewReader(store, preset)
    assert reader.streams == ("audio",)
    silent, blind = manifest.records[3], manifest.records[5]
    assert reader.streams_of(silent) == ()
    assert reader.streams_of(blind) == ("audio",)
    kept = {r.uid for r in usable(manifest.records, reader, preset.data)}
    assert kept == {r.uid for r in manifest.records} - {silent.uid}
    assert set(reader.read([blind], [("image",)]).tokens) == {"audio"}
    refusing = preset.data.model_copy(update={"absent": "refuse"})
    with pytest.raises(CacheMissError, match="made/3: audio is absent"):
        usable([silent], reader, refusing)
    assert usable([blind], reader, refusing) == [blind]


def test_two_inputs_of_a_stream_are_read_apart_and_hidden_together(
    corpus: tuple[Manifest, Path, TokenStore], rows: dict[str, list[str]]
) -> None:
    manifest, _, store = corpus
    preset = configure(demo(), rows["all"])
    reader = ViewReader(store, preset)
    record = manifest.records[2]
    seen = reader.read([record])
    assert seen.tokens["local"].shape == (1, 1, 96)
    assert seen.tokens["video"].shape == (1, 16, 96)
    resolved = reader.resolved
    assert resolved.local is not None
    entry = store.entry(resolved.local, record.token_key(resolved.local))
    stored = store.clip_tokens(resolved.local, entry).tokens
    np.testing.assert_array_equal(seen.tokens["local"][0], np.asarray(stored, np.float32)[0])
    hidden = reader.read([record], [("video",)])
    assert not hidden.masks["local"].any()
    assert not hidden.masks["video"].any()
    assert not hidden.tokens["local"].any()
    assert hidden.masks["image"].all()


def test_a_cls_token_alone_knows_whether_it_is_there(
    corpus: tuple[Manifest, Path, TokenStore], rows: dict[str, list[str]]
) -> None:
    manifest, _, store = corpus
    reader = ViewReader(store, configure(demo(), rows["CLS token"]))
    views = reader.read([manifest.records[2], manifest.records[5], manifest.records[2]])
    assert views.tokens["image"].shape[1] == 0
    assert views.masks["image"].tolist() == [[True], [False], [True]]
    assert views.tokens["image_cls"].any(dim=1).tolist() == [True, False, True]
    hidden = reader.read([manifest.records[2]], [("image",)])
    assert not hidden.masks["image"].any()
    assert not hidden.tokens["image_cls"].any()


# --------------------------------------------------------------------------- fusion of two streams


def tiny_fusion(kind: str, widths: tuple[int | None, ...], **more: Any) -> PreFusion:
    torch.manual_seed(0)
    config = FusionConfig.model_validate(
        {
            "kind": kind,
            "hidden_width": 6,
            "width": 4,
            "n_blocks": 2,
            "out_width": 3,
            "dropout": 0.0,
            "n_queries": 5,
            "n_layers": 2,
            "n_heads": 2,
            **more,
        }
    )
    found = make_fusion(config, *widths)
    assert found is not None
    return found.double().eval()


def without_stream(name: str, whole: Tensor, at: int, width: int) -> Tensor:
    """Return a parameter of three streams without what only the stream at a place would meet."""
    rows, columns = torch.arange(len(whole)), slice(at * width, (at + 1) * width)
    if name in ("attn_mlp.0.weight", "conv_in.weight"):
        return torch.cat([whole[:, : columns.start], whole[:, columns.stop :]], dim=1)
    if name.startswith("attn_gate") or name == "stream_embeddings":
        return whole[rows != at]
    return whole


@pytest.mark.parametrize("kind", [kind for kind in get_args(FusionKind) if kind != "none"])
@pytest.mark.parametrize("gate", ["linear", "softmax"])
@pytest.mark.parametrize("left_out", FUSED)
def test_two_streams_are_three_of_which_one_is_masked(kind: str, gate: str, left_out: str) -> None:
    """A masked stream says nothing, so leaving its weights out must change no number."""
    at = FUSED.index(left_out)
    three = tiny_fusion(kind, (3, 4, 2), gate=gate)
    two = tiny_fusion(
        kind, tuple(None if i == at else w for i, w in enumerate((3, 4, 2))), gate=gate
    )
    state = three.state_dict()
    assert two.streams == tuple(name for name in FUSED if name != left_out)
    two.load_state_dict({n: without_stream(n, state[n], at, 4) for n in two.state_dict()})
    g = torch.Generator().manual_seed(1)
    tokens: list[Tensor | None] = [
        torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((5, 6, 3), (5, 4), (5, 6, 2))
    ]  # fmt: skip
    masks: list[Tensor | None] = [torch.rand(5, 6, generator=g) > 0.4 for _ in range(3)]
    masks[1] = torch.tensor([True, True, False, False, False])
    for mask in (masks[0], masks[2]):
        assert mask is not None
        mask[3] = False  # nothing but the picture, which is masked too
    gone = masks[at]
    assert gone is not None
    silent = [*masks[:at], torch.zeros_like(gone), *masks[at + 1 :]]
    expected, valid = three(*tokens, *silent)
    tokens[at] = masks[at] = None
    found, mask = two(*tokens, *masks)
    torch.testing.assert_close(found, expected)
    assert torch.equal(mask, valid)
    config = FusionConfig(
        kind=kind, hidden_width=6, width=4, n_blocks=2, out_width=3, dropout=0, n_queries=5
    )  # type: ignore[arg-type]
    assert torch.equal(fused_mask(config, *masks), valid)
    assert sum(p.numel() for p in two.parameters()) < sum(p.numel() for p in three.parameters())


@pytest.mark.parametrize("n_tokens", [None, 2, 9])
def test_audio_alone_beside_the_picture_keeps_its_number_of_tokens(n_tokens: int | None) -> None:
    two = tiny_fusion("conv-attention", (3, 4, None), n_tokens=n_tokens)
    valid = torch.ones(2, 6, dtype=torch.bool)
    found, mask = two(
        torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64), None,
        valid, valid[:, 0], None,
    )  # fmt: skip
    assert found.shape == (2, n_tokens or 6, 3)
    assert mask.all()


# --------------------------------------------------------------------------- several splice points


def two_groups(rows: dict[str, list[str]]) -> Preset:
    """A prefix in two groups; the style decides the text, which the tests make up."""
    groups = "prefix=[[image], [local, video, audio, cls]]"
    return configure(demo(), [*rows["all"], groups, NO_FUSION, "prompt.style=v1"])


def made_up(preset: Preset, n: int) -> Views:
    g = torch.Generator().manual_seed(3)
    shapes = preset.view_shapes()
    tokens = {k: torch.randn(n, *s, generator=g, dtype=torch.float64) for k, s in shapes.items()}
    tokens["image_cls"] = torch.randn(n, 96, generator=g, dtype=torch.float64)
    return Views(tokens, {k: torch.ones(n, s[0], dtype=torch.bool) for k, s in shapes.items()})


def tiny_model(preset: Preset) -> EmotionLlama:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, max_position_embeddings=512,
    )  # fmt: skip
    model = EmotionLlama(preset, LlamaForCausalLM(config)).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def questions(i: int, *lengths: tuple[int, int]) -> Group:
    """A clip with questions of (tail, answer) tokens behind a head of 3 and a text of 4 in between."""
    g = torch.Generator().manual_seed(i)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 50, (n,), generator=g).tolist())

    prompts = [PromptTokens((1, 7, 8), ids(t), ids(a), ((9, 11, 13, 12),)) for t, a in lengths]
    clip = Clip(sha256=f"{i:064x}", n_bytes=1)
    record = Record(uid=f"made/{i}", media=f"{i}.mp4", clip=clip)
    return Group(record, tuple(Question("emotion", p) for p in prompts))


def test_text_stands_between_the_groups_of_the_prefix(rows: dict[str, list[str]]) -> None:
    preset = two_groups(rows)
    assert preset.layout().groups == (slice(0, 36), slice(36, 36 + 1 + 16 + 16 + 1))
    views = made_up(preset, 2)
    views.masks["video"][1] = False
    views.masks["image"][1] = False  # and with it the CLS token
    groups = [
        replace(questions(0, (5, 2), (3, 4)), n_prefix=70),
        replace(questions(1, (6, 1)), n_prefix=17),
    ]
    batch = collate(preset, groups, views)
    order, n_text = batch["order"].tolist(), len(batch["text_ids"])
    assert len(order) == sum(group.n_positions for group in groups)
    shown = [int(batch["text_ids"][i]) if i < n_text else i - n_text for i in order]
    assert shown[:3] == [1, 7, 8]
    assert shown[3:39] == list(range(36)), "the picture"
    assert shown[39:43] == [9, 11, 13, 12]
    assert shown[43:77] == list(range(36, 70)), "local, video, audio, CLS"
    second = batch["segments"].rows[-1][0]
    assert second == 77 + 7 + 7
    kept = [70 + 36, *(70 + 53 + i for i in range(16))]  # local and audio of the second clip
    assert shown[second : second + 7] == [1, 7, 8, 9, 11, 13, 12]
    assert shown[second + 7 : second + 24] == kept
    assert batch["position_ids"].tolist()[:77] == list(range(77))
    assert batch["position_ids"].tolist()[77:91] == [*range(77, 84), *range(77, 84)]


def test_the_loss_of_two_groups_by_hand(rows: dict[str, list[str]]) -> None:
    preset = two_groups(rows)
    model, views, group = tiny_model(preset), made_up(preset, 1), questions(0, (5, 3))
    found = model(**model_arguments(collate(preset, [group], views)))
    prompt, table = group.questions[0].prompt, model.llm.get_input_embeddings()
    maps = model.adapters.maps
    tokens = {**views.tokens, "cls": views.tokens["image_cls"][:, None]}
    sequence = torch.cat(
        [
            table(torch.tensor(prompt.head_ids)),
            maps["image"](tokens["image"])[0],
            table(torch.tensor(prompt.between_ids[0])),
            *(maps[name](tokens[name])[0] for name in ("local", "video", "audio", "cls")),
            table(torch.tensor([*prompt.tail_ids, *prompt.answer_ids])),
        ]
    )
    with attention_of(model.llm.get_base_model(), "eager"):
        scores = model.llm(inputs_embeds=sequence[None]).logits[0].log_softmax(-1)
    terms = [-scores[len(sequence) - 4 + i, token] for i, token in enumerate(prompt.answer_ids)]
    torch.testing.assert_close(found["loss_sum"], torch.stack(terms).mean())


def test_layouts_of_two_groups_give_equal_losses(rows: dict[str, list[str]]) -> None:
    preset = two_groups(rows)
    model, views = tiny_model(preset), made_up(preset, 3)
    views.masks["audio"][1] = False
    groups = [questions(0, (9, 4), (5, 2)), questions(1, (3, 3)), questions(2, (6, 1))]
    packed = model(**model_arguments(collate(preset, groups, views)))["answer_loss"]
    model.set_execution(preset.execution.model_copy(update={"attention": "padded"}))
    padded = model(**model_arguments(collate(preset, groups, views)))["answer_loss"]
    torch.testing.assert_close(packed, padded)


# --------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


SLOW = ("video", "audio+video", "audio+video, one token", "fused CLS token", "local")
"""Rows that differ little from others."""


@pytest.mark.parametrize(
    "row", [pytest.param(row, marks=[pytest.mark.slow] * (row in SLOW)) for row in LAYOUTS]
)
def test_every_row_trains_and_answers(
    row: str, rows: dict[str, list[str]], corpus: tuple[Manifest, Path, TokenStore], runs: Path
) -> None:
    manifest, path, store = corpus
    preset = configure(demo(), [*rows[row], *SHORT])
    run = runs / row.replace(" ", "-")
    train(preset, manifest, path, store, run)
    trained = load_run(run)
    blocks = set(LAYOUTS[row])
    assert set(trained.info.trainable) == {f"adapter.{name}" for name in blocks} | {"lora"} | (
        {"fusion"} & blocks
    )
    fresh, _ = build(preset)
    before = {n: p for n, p in fresh.named_parameters() if p.requires_grad}
    for name, parameter in trained.model.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), f"{name} never learned"
    read = {name: spec.spec_id for name, spec in trained.preset.tokens.by_input().items()}
    found = last_checkpoint(run / "stage1")
    assert found is not None
    assert found[1].spec_ids == read
    card = (run / "stage2/final/README.md").read_text()
    assert all(f"| {name} | " in card and f"`{spec_id}`" in card for name, spec_id in read.items())
    reader = ViewReader(store, preset)
    asked = usable(manifest.select("val"), reader, preset.data)[:2]
    predictions = list(generate(trained, store, asked, max_new_tokens=2, likelihoods=True))
    assert [p.spec_ids for p in predictions] == [read, read]
    for prediction in predictions:
        assert sum((prediction.likelihoods or {}).values()) == pytest.approx(1)


def test_costs_of_a_model_of_one_stream(
    rows: dict[str, list[str]], corpus: tuple[Manifest, Path, TokenStore]
) -> None:
    manifest, _, store = corpus
    found = {
        row: estimate(
            configure(demo(), [*rows[row], *SHORT, "data.memory_bytes=0", "execution.n_ahead=1"]),
            manifest,
            store,
            device=torch.device("cpu"),
            flops_per_s=1e9,
        )
        for row in ("audio", "image", "CLS token")
    }
    # One batch of two clips is held ahead: float32 of 16 x 64, of 36 x 384 and the CLS token, of it alone.
    sizes = {row: one.host_bytes for row, one in found.items()}
    assert sizes == {
        "audio": 2 * 4 * 16 * 64, "image": 2 * 4 * (36 * 384 + 96), "CLS token": 2 * 4 * 96
    }  # fmt: skip
    lora, adapter = found["audio"].trainable["lora"], found["audio"].trainable["adapter.audio"]
    assert adapter == (64 + 1) * 128
    assert found["audio"].n_trainable == lora + adapter
    assert found["image"].total_s > found["audio"].total_s > found["CLS token"].total_s
    assert any("adapter.audio" in line for line in lines(found["audio"]))


def test_a_run_is_loaded_as_it_is_behind_a_stage(
    corpus: tuple[Manifest, Path, TokenStore], runs: Path
) -> None:
    manifest, path, store = corpus
    run = runs / "staged"
    train(configure(demo(), SHORT), manifest, path, store, run)

    def held(**more: Any) -> Tensor:
        weights: Tensor = load_run(run, **more).model.adapters.maps["audio"].weight
        return weights

    for stage in ("stage1", "stage2"):
        parts = load_file(run / stage / "final/fusion_adapters.safetensors")
        assert torch.equal(held(stage=stage), parts["adapters.maps.audio.weight"])
    assert torch.equal(held(), held(stage="stage2"))
    assert not torch.equal(held(), held(stage="stage1"))
    with pytest.raises(
        CheckpointError, match=r"no stage 'stag1' is finished\. Did you mean 'stage1'"
    ):
        load_run(run, stage="stag1")


def test_masking_what_a_run_does_not_read_is_refused(rows: dict[str, list[str]]) -> None:
    heard = configure(demo(), rows["audio"])
    check_masked(heard, ())
    check_masked(heard, ("audio", "video"))
    with pytest.raises(
        SchemaError, match=r"the run reads no image and no video.*It reads: audio\."
    ):
        check_masked(heard, ("image", "video"))


def test_tasks_of_one_stream_need_a_model_that_reads_it(
    rows: dict[str, list[str]], corpus: tuple[Manifest, Path, TokenStore]
) -> None:
    """A task that sees the sound alone can be asked of no clip if the model reads pictures alone."""
    manifest, _, store = corpus
    assert TASK_TABLE["image"].hides == ("audio", "video")
    record = manifest.records[1].model_copy(
        update={
            "descriptions": Record.model_validate(
                {
                    "uid": "a/b",
                    "media": "b.mp4",
                    "descriptions": [
                        {"kind": "audio_tone", "text": "Low."},
                        {"kind": "visual_objective", "text": "A."},
                    ],
                }
            ).descriptions
        }
    )
    answered = {
        row: [t for t in ("audio", "image") if can_answer(record, t, reader.streams_of)]  # type: ignore[arg-type]
        for row, reader in _readers(rows, store)
    }
    assert answered == {"audio": ["audio"], "image": ["image"], "audio+image": ["audio", "image"]}
    stage = configure(demo(), ["stages.0.tasks={audio: 1}"]).stages[0]
    (reader,) = (reader for row, reader in _readers(rows, store) if row == "image")
    with pytest.raises(
        ManifestError, match=r"task 'audio' is shown audio alone.*of none of the 1 rec"
    ):
        Mixture([record], stage, 0, reader.streams_of)


def _readers(rows: dict[str, list[str]], store: TokenStore) -> Iterator[tuple[str, ViewReader]]:
    for row in ("audio", "image", "audio+image"):
        yield row, ViewReader(store, configure(demo(), rows[row]))
