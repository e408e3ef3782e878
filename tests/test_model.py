"""The assembled model: the paper's numbers on the meta device, and equal losses whatever the layout."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cache.clip import Clip, Record
from train.adapters import ModalAdapters
from train.batches.reading import Views
from train.config import ExecutionConfig, FusionKind, Preset, configure
from train.data import Group, PrefixBatch, Question, collate, model_arguments
from train.fusion import ConvAttention
from train.llm.attention import attention_of
from train.model import EmotionLlama
from train.presets import PRESETS, demo, v2
from train.prompt import PromptTokens


@pytest.fixture(scope="module")
def v2_on_meta() -> EmotionLlama:
    # LlamaConfig's defaults are LLaMA-2-7B's sizes; 6,738,415,616 is Meta's published count.
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig())
        assert sum(p.numel() for p in llm.parameters()) == 6_738_415_616
        return EmotionLlama(v2(), llm)


def test_v2_trains_the_papers_parameters(v2_on_meta: EmotionLlama) -> None:
    assert v2_on_meta.trainable() == {
        "fusion": 2_838_275,
        "adapter.fusion": 1_052_672,
        "adapter.image": 23_072_768,
        "adapter.video": 5_771_264,
        "adapter.audio": 5_246_976,
        "lora": 33_554_432,
    }
    assert sum(v2_on_meta.trainable().values()) == 71_536_387
    n_trainable = sum(p.numel() for p in v2_on_meta.parameters() if p.requires_grad)
    assert n_trainable == 71_536_387


def test_parts_of_conv_attention_have_the_reference_sizes() -> None:
    with torch.device("meta"):
        fusion = ConvAttention(v2().model.fusion, 1280, 1408, 1408)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    assert count(fusion.prep["audio"]) == 721_536
    assert count(fusion.prep["image"]) == count(fusion.prep["video"]) == 787_072
    assert count(fusion.attn_mlp) + count(fusion.attn_gate) == 262_784 + 387
    assert count(fusion.conv_in) + count(fusion.conv_blocks) == 49_280 + 4 * 49_280
    assert count(fusion.merge) == 33_024


def test_v2_prefix_is_448_tokens_in_the_papers_order(v2_on_meta: EmotionLlama) -> None:
    layout = v2_on_meta.layout
    assert layout.blocks == (("fusion", 64), ("image", 256), ("video", 64), ("audio", 64))
    assert layout.total == 448


def test_a_batch_of_v2_has_the_documented_shapes_on_meta(v2_on_meta: EmotionLlama) -> None:
    with torch.device("meta"):
        tokens = {
            "audio": torch.empty(2, 64, 1280),
            "video": torch.empty(2, 64, 1408),
            "image": torch.empty(2, 256, 5632),
            "image_cls": torch.empty(2, 1408),
        }
        masks = {
            name: torch.ones(2, n, dtype=torch.bool)
            for name, n in (("audio", 64), ("video", 64), ("image", 256))
        }
        assert v2_on_meta.prefix(tokens, masks).shape == (2, 448, 4096)


def tiny_llm(vocab_size: int = 50) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocab_size,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config)


def _tiny(preset: Preset, llm: Any = None) -> EmotionLlama:
    """A small model in double precision, whose LoRA does something."""
    model = EmotionLlama(preset, llm or tiny_llm()).double().eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(noise * 0.1)
    return model


def _views(preset: Preset, n: int, seed: int = 1) -> Views:
    generator = torch.Generator().manual_seed(seed)
    shapes = preset.view_shapes()
    wide = torch.float64
    tokens = {
        s: torch.randn(n, *shape, generator=generator, dtype=wide) for s, shape in shapes.items()
    }
    width = preset.tokens.image.encoder.width
    tokens["image_cls"] = torch.randn(n, width, generator=generator, dtype=wide)
    masks = {s: torch.ones(n, shape[0], dtype=torch.bool) for s, shape in shapes.items()}
    return Views(tokens, masks)


def _record(i: int) -> Record:
    return Record(uid=f"made/{i}", media=f"{i}.mp4", clip=Clip(sha256=f"{i:064x}", n_bytes=1))


def _group(i: int, *lengths: tuple[int, int], seed: int = 0) -> Group:
    """A clip with questions of (tail, answer) tokens."""
    generator = torch.Generator().manual_seed(100 * seed + i)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 50, (n,), generator=generator).tolist())

    questions = tuple(
        Question("emotion", PromptTokens((1, 7, 8), ids(t), ids(a))) for t, a in lengths
    )
    return Group(_record(i), questions)


def _loss(model: EmotionLlama, batch: PrefixBatch) -> dict[str, torch.Tensor]:
    return model(**model_arguments(batch))


def _rows(views: Views, *places: int) -> Views:
    return Views(
        {k: v[list(places)] for k, v in views.tokens.items()},
        {k: v[list(places)] for k, v in views.masks.items()},
    )


def test_loss_is_the_mean_over_answers_by_hand() -> None:
    """One clip: the plain language model on the whole sequence, cross entropy by hand."""
    preset = demo()
    model = _tiny(preset)
    views, group = _views(preset, 1), _group(0, (5, 3))
    prompt = group.questions[0].prompt
    batch = collate(preset, [group], views)
    found = _loss(model, batch)
    table = model.llm.get_input_embeddings()
    text = torch.tensor([*prompt.tail_ids, *prompt.answer_ids])
    parts = [table(torch.tensor(prompt.head_ids)), model.prefix(views.tokens, views.masks)[0]]
    sequence = torch.cat([*parts, table(text)]).unsqueeze(0)
    with attention_of(model.llm.get_base_model(), "eager"):
        scores = model.llm(inputs_embeds=sequence).logits[0].log_softmax(-1)
    first = sequence.shape[1] - 3
    terms = [-scores[first + i - 1, token] for i, token in enumerate(prompt.answer_ids)]
    torch.testing.assert_close(found["loss_sum"], torch.stack(terms).mean())
    torch.testing.assert_close(
        found["answer_loss"], torch.stack(terms).mean().reshape(1), check_dtype=False
    )
    best = sum(
        int(scores[first + i - 1].argmax()) == token for i, token in enumerate(prompt.answer_ids)
    )
    assert float(found["answer_correct"]) == pytest.approx(best / 3)


def _gradients(model: EmotionLlama) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _masked_views(preset: Preset) -> Views:
    """Three clips: whole; no audio; nothing but four audio tokens."""
    views = _views(preset, 3)
    views.masks["audio"][1] = False
    views.masks["audio"][2, 4:] = False
    views.masks["image"][2] = views.masks["video"][2] = False
    for stream, mask in views.masks.items():
        views.tokens[stream] *= mask.unsqueeze(-1)
    views.tokens["image_cls"][2] = 0
    return views


@pytest.mark.parametrize("kind", get_args(FusionKind))
@pytest.mark.parametrize("average", ["sample", "token"])
def test_packed_equals_padded_equals_one_by_one(
    kind: str, average: Literal["sample", "token"]
) -> None:
    preset = configure(demo(), [f"model.fusion.kind={kind}"])
    model = _tiny(preset)
    views = _masked_views(preset)
    groups = [_group(0, (9, 4)), _group(1, (3, 11)), _group(2, (6, 1))]
    n = {"sample": 3, "token": 16}[average]
    results = []
    for attention in ("packed", "padded"):
        model.set_execution(ExecutionConfig(attention=attention))  # type: ignore[arg-type]
        found = _loss(model, collate(preset, groups, views, average))
        (found["loss_sum"] / n).backward()
        results.append((found["loss_sum"].detach() / n, found["answer_loss"], _gradients(model)))
    model.set_execution(ExecutionConfig())
    total, answers = torch.zeros((), dtype=torch.float64), []
    for place, group in enumerate(groups):
        found = _loss(model, collate(preset, [group], _rows(views, place), average))
        (found["loss_sum"] / n).backward()
        total += found["loss_sum"].detach() / n
        answers.append(found["answer_loss"])
    results.append((total, torch.cat(answers), _gradients(model)))
    for loss, each, gradients in results[1:]:
        torch.testing.assert_close(loss, results[0][0])
        torch.testing.assert_close(each, results[0][1])
        assert gradients.keys() == results[0][2].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, results[0][2][name], msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_a_shared_prefix_equals_separate_sequences(attention: Literal["packed", "padded"]) -> None:
    preset = demo()
    model = _tiny(preset)
    model.set_execution(ExecutionConfig(attention=attention))
    views = _masked_views(preset)
    shared = [_group(0, (9, 4), (5, 2), (7, 8)), _group(1, (3, 3)), _group(2, (6, 1), (4, 5))]
    found = _loss(model, collate(preset, shared, views))
    found["loss_sum"].backward()
    together = _gradients(model)
    apart, places = [], []
    for place, group in enumerate(shared):
        for question in group.questions:
            apart.append(Group(group.record, (question,)))
            places.append(place)
    batch = collate(preset, apart, _rows(views, *places))
    assert len(batch["order"]) > len(collate(preset, shared, views)["order"])
    alone = _loss(model, batch)
    torch.testing.assert_close(alone["answer_loss"], found["answer_loss"])
    alone["loss_sum"].backward()
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(gradient, together[name], msg=lambda m, n=name: f"{n}: {m}")


def test_questions_of_a_clip_do_not_see_each_other() -> None:
    preset = demo()
    model = _tiny(preset)
    views = _views(preset, 1)
    group = _group(0, (9, 4), (5, 2))
    other = _group(0, (9, 4), seed=1).questions[0]
    first = _loss(model, collate(preset, [group], views))["answer_loss"]
    changed = Group(group.record, (other, group.questions[1]))
    second = _loss(model, collate(preset, [changed], views))["answer_loss"]
    assert first[0] != second[0]
    assert first[1] == second[1]


def test_clips_of_a_pack_do_not_see_each_other() -> None:
    preset = demo()
    model = _tiny(preset)
    views, groups = _views(preset, 2), [_group(0, (9, 4)), _group(1, (5, 2))]
    first = _loss(model, collate(preset, groups, views))["answer_loss"]
    for stream in views.tokens:
        views.tokens[stream][0] += 1.0
    second = _loss(model, collate(preset, groups, views))["answer_loss"]
    assert first[0] != second[0]
    assert first[1] == second[1]


@pytest.mark.parametrize("kind", get_args(FusionKind))
def test_a_masked_modality_equals_an_absent_one(kind: str) -> None:
    """Whatever a masked stream holds, the loss is that of a clip which never had it."""
    preset = configure(demo(), [f"model.fusion.kind={kind}"])
    model = _tiny(preset)
    for stream in ("audio", "video", "image"):
        views = _views(preset, 2)
        views.masks[stream][:] = False
        views.tokens[stream][0] = 0
        if stream == "image":
            views.tokens["image_cls"][0] = 0
        for other in set(views.tokens) - {stream, "image_cls"}:
            views.tokens[other][1] = views.tokens[other][0]
        if stream != "image":
            views.tokens["image_cls"][1] = views.tokens["image_cls"][0]
        group = _group(0, (9, 4))
        found = _loss(model, collate(preset, [group, group], views))["answer_loss"]
        torch.testing.assert_close(found[0], found[1])
        # And its tokens are no positions at all.
        whole = collate(preset, [group], _views(preset, 1))
        masked = collate(preset, [group], _rows(views, 0))
        n_tokens = preset.view_shapes()[stream][0]  # type: ignore[index]
        assert len(whole["order"]) - len(masked["order"]) == n_tokens


def test_zeros_are_attended_to_only_if_the_released_code_is_asked_for() -> None:
    preset = configure(demo(), ["data.mask_missing=false"])
    views = _masked_views(preset)
    groups = [_group(i, (5, 2)) for i in range(3)]
    n = len(collate(preset, groups, views)["order"])
    assert n == 3 * (3 + preset.layout().total + 7)
    assert n > len(collate(demo(), groups, views)["order"])


def _replies(model: EmotionLlama, batch: PrefixBatch, n: int) -> list[list[int]]:
    names = ("tokens", "masks", "text_ids", "order", "segments")
    return model.reply(**{k: batch[k] for k in names}, max_new_tokens=n, stop_ids=(2,))


def test_batched_replies_equal_single_ones() -> None:
    preset = demo()
    model = _tiny(preset)
    views = _masked_views(preset)
    groups = [_group(0, (9, 0)), _group(1, (3, 0), (8, 0)), _group(2, (6, 0))]
    together = _replies(model, collate(preset, groups, views), 6)
    alone = [
        _replies(model, collate(preset, [Group(g.record, (q,))], _rows(views, i)), 6)[0]
        for i, g in enumerate(groups)
        for q in g.questions
    ]
    assert together == alone
    assert len({tuple(reply) for reply in alone}) > 1


def test_replies_are_the_greedy_choice_of_the_training_forward() -> None:
    """Generation and training agree on masks and positions: the likeliest next token, step by step."""
    preset = demo()
    model = _tiny(preset)
    views = _masked_views(preset)
    groups = [_group(i, (5 + i, 0)) for i in range(3)]
    replies = _replies(model, collate(preset, groups, views), 5)
    for place, (group, reply) in enumerate(zip(groups, replies, strict=True)):
        prompt, said = group.questions[0].prompt, ()
        for expected in [*reply, *([2] if len(reply) < 5 else [])]:
            losses = []
            for token in range(50):
                answer = PromptTokens(prompt.head_ids, prompt.tail_ids + said, (token,))
                asked = Group(group.record, (Question("emotion", answer),))
                batch = collate(preset, [asked], _rows(views, place))
                with torch.no_grad():
                    losses.append(float(_loss(model, batch)["loss_sum"]))
            assert int(np.argmin(losses)) == expected
            said = (*said, expected)


def test_only_the_trained_parts_get_gradients() -> None:
    preset = demo()
    model = EmotionLlama(preset, tiny_llm()).double()
    batch = collate(preset, [_group(0, (5, 3))], _views(preset, 1))
    _loss(model, batch)["loss_sum"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # LoRA's B starts at zero, so A has no gradient in the first step.
            assert parameter.grad.abs().sum() > 0 or "lora_A" in name, name
        else:
            assert parameter.grad is None, name


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # of torch.compile
@pytest.mark.parametrize(
    "option", ["checkpoint_activations", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_execution_options_change_no_number(option: str) -> None:
    preset = demo()
    batch = collate(preset, [_group(0, (5, 3)), _group(1, (8, 2), (3, 2))], _views(preset, 2))
    results = []
    for execution in (ExecutionConfig(), ExecutionConfig.model_validate({option: True})):
        model = _tiny(preset)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.set_execution(execution)
        loss = _loss(model, batch)["loss_sum"]
        loss.backward()
        results.append((loss.detach(), _gradients(model)))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name])


def test_half_precision_models_train_float32_parts() -> None:
    preset = configure(demo(), ["model.llm.dtype=bfloat16"])
    views = _views(preset, 2)
    views = Views({k: v.float() for k, v in views.tokens.items()}, views.masks)
    batch = collate(preset, [_group(0, (5, 3)), _group(1, (8, 2))], views)
    model = EmotionLlama(preset, tiny_llm().bfloat16()).eval()
    loss = _loss(model, batch)["loss_sum"]
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.grad.dtype for p in trained if p.grad is not None} == {torch.float32}
    whole = EmotionLlama(demo(), tiny_llm()).eval()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(_loss(whole, batch)["loss_sum"], loss, rtol=0.02, atol=0.02)


def test_lora_count_equals_pefts_own() -> None:
    model = _tiny(demo())
    assert model.trainable()["lora"] == model.llm.get_nb_trainable_parameters()[0]


def test_adapters_are_one_linear_map_per_block() -> None:
    adapters = ModalAdapters({"audio": 3, "video": 5}, llm_width=4)
    x = torch.randn(2, 6, 5)
    linear = adapters.maps["video"]
    expected = torch.einsum("btd,hd->bth", x, linear.weight) + linear.bias
    torch.testing.assert_close(adapters("video", x), expected)


def test_every_preset_builds_and_round_trips() -> None:
    assert len(PRESETS) == 8
    for make in PRESETS.values():
        preset = make()
        assert Preset.model_validate_json(preset.model_dump_json()) == preset
        assert preset.layout().total > 0
        assert configure(preset) == preset
