"""The paper's numbers on the meta device, and Conv-Attention against its equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from train.adapters import ModalAdapters
from train.config import FusionConfig, Preset, configure
from train.fusion import ConvAttention
from train.model import EmotionLlama, positions
from train.presets import PRESETS, demo, v2


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
        prefix, mask = v2_on_meta.prefix(tokens, masks)
    assert prefix.shape == (2, 448, 4096)
    assert mask.shape == (2, 448)


def test_conv_attention_equals_a_loop_written_from_the_equations() -> None:
    torch.manual_seed(0)
    config = FusionConfig(hidden_width=7, width=5, n_blocks=3, out_width=4, dropout=0.3)
    fusion = ConvAttention(config, 6, 8, 9).double().eval()
    audio, cls, video = (
        torch.randn(2, 10, 6, dtype=torch.float64),
        torch.randn(2, 8, dtype=torch.float64),
        torch.randn(2, 10, 9, dtype=torch.float64),
    )
    ones = torch.ones(2, 10, dtype=torch.bool)
    got, _ = fusion(audio, cls, video, ones, torch.ones(2, dtype=torch.bool), ones)
    state = fusion.state_dict()

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return state[f"{name}.weight"] @ x + state[f"{name}.bias"]

    def mlp(name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(f"{name}.3", linear(f"{name}.0", x).clamp(min=0)).clamp(min=0)

    for b in range(2):
        f_d, f_attn = [], []
        for t in range(10):
            parts = [
                mlp("prep.audio", audio[b, t]),
                mlp("prep.image", cls[b]),
                mlp("prep.video", video[b, t]),
            ]
            f_d.append(torch.cat(parts))  # equation 2
            gate = linear("attn_gate", mlp("attn_mlp", f_d[-1]))
            f_attn.append(sum(gate[m] * parts[m] for m in range(3)))  # equation 3
        w_in = state["conv_in.weight"][:, :, 0]
        x = [w_in @ f_d[t] + state["conv_in.bias"] for t in range(10)]
        for k in range(3):  # equation 4
            w, bias = state[f"conv_blocks.{k}.conv.weight"], state[f"conv_blocks.{k}.conv.bias"]
            zero = torch.zeros(5, dtype=torch.float64)
            padded = [zero, *x, zero]
            conv = [sum(w[:, :, j] @ padded[t + j] for j in range(3)) + bias for t in range(10)]
            x = [x[t] + conv[t] * torch.sigmoid(conv[t]) for t in range(10)]
        expected = torch.stack([linear("merge", f_attn[t] + x[t]) for t in range(10)])
        torch.testing.assert_close(got[b], expected)


def test_an_absent_stream_cannot_speak_through_its_bias() -> None:
    torch.manual_seed(0)
    fusion = ConvAttention(demo().model.fusion, 6, 8, 9).eval()
    ones, none = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool)
    present, absent = torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool)
    cls, video = torch.randn(1, 8), torch.randn(1, 4, 9)
    results = []
    for _ in range(2):  # whatever the absent stream holds, and whatever its bias is
        audio = torch.randn(1, 4, 6)
        with torch.no_grad():
            for parameter in fusion.prep["audio"].parameters():
                parameter.add_(torch.randn_like(parameter))
        results.append(fusion(audio, cls, video, none, present, ones)[0])
    torch.testing.assert_close(results[0], results[1])
    _, mask = fusion(torch.randn(1, 4, 6), cls, video, none, absent, none)
    assert not mask.any()


def test_positions_skip_masked_tokens() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0]], dtype=torch.bool)
    assert positions(mask).tolist() == [[0, 1, 1, 1, 2, 3], [0, 0, 0, 1, 2, 2]]


def _tiny(preset: Preset) -> EmotionLlama:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=512,
    )
    return EmotionLlama(preset, LlamaForCausalLM(config)).eval()


def _batch(preset: Preset, n: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = preset.view_shapes()
    tokens = {s: torch.randn(n, *shape, generator=generator) for s, shape in shapes.items()}
    tokens["image_cls"] = torch.randn(n, preset.tokens.image.encoder.width, generator=generator)
    masks = {s: torch.ones(n, shape[0], dtype=torch.bool) for s, shape in shapes.items()}
    text = torch.randint(3, 50, (n, 9), generator=generator)
    return {
        "tokens": tokens,
        "masks": masks,
        "head_ids": torch.tensor([1, 7, 8]),
        "text_ids": text,
        "text_mask": torch.ones(n, 9, dtype=torch.bool),
    }


def test_loss_is_the_mean_over_supervised_positions_by_hand() -> None:
    preset = demo()
    model = _tiny(preset)
    batch = _batch(preset, 2)
    labels = torch.full((2, 9), -100)
    labels[0, 6:] = batch["text_ids"][0, 6:]
    labels[1, 4:7] = batch["text_ids"][1, 4:7]
    loss = model(**batch, labels=labels)["loss"]
    sequence, mask = model.embed(**batch)
    logits = model.llm(
        inputs_embeds=sequence, attention_mask=mask.long(), position_ids=positions(mask)
    ).logits.log_softmax(-1)
    n_before = 3 + preset.layout().total
    terms = [
        -logits[b, n_before + s - 1, labels[b, s]]
        for b in range(2)
        for s in range(9)
        if labels[b, s] != -100
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert len(terms) == 6


def test_padding_and_masked_streams_do_not_change_other_numbers() -> None:
    preset = demo()
    model = _tiny(preset)
    batch = _batch(preset, 2)
    batch["masks"]["audio"][1] = False
    labels = batch["text_ids"].clone()
    alone = model(
        tokens={k: v[:1] for k, v in batch["tokens"].items()},
        masks={k: v[:1] for k, v in batch["masks"].items()},
        head_ids=batch["head_ids"],
        text_ids=batch["text_ids"][:1],
        text_mask=batch["text_mask"][:1],
        labels=labels[:1],
    )["loss"]
    labels[1] = -100
    together = model(**batch, labels=labels)["loss"]
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    # What a masked stream holds is never seen. (The first text token is predicted at the last
    # prefix token itself; it belongs to the prompt and is never supervised.)
    labels = batch["text_ids"].clone()
    labels[:, 0] = -100
    before = model(**batch, labels=labels)["loss"]
    batch["tokens"]["audio"][1] += 100.0
    torch.testing.assert_close(model(**batch, labels=labels)["loss"], before)


def test_batched_replies_equal_single_ones() -> None:
    preset = demo()
    model = _tiny(preset)
    batch = _batch(preset, 3)
    batch["text_mask"][0, 5:] = False
    batch["text_mask"][2, 7:] = False
    batch["masks"]["video"][1] = False
    together = model.reply(**batch, max_new_tokens=6, eos_token_id=2)
    for row in range(3):
        n = int(batch["text_mask"][row].sum())
        alone = model.reply(
            tokens={k: v[row : row + 1] for k, v in batch["tokens"].items()},
            masks={k: v[row : row + 1] for k, v in batch["masks"].items()},
            head_ids=batch["head_ids"],
            text_ids=batch["text_ids"][row : row + 1, :n],
            text_mask=batch["text_mask"][row : row + 1, :n],
            max_new_tokens=6,
            eos_token_id=2,
        )
        assert alone[0] == together[row]


def test_replies_are_the_greedy_choice_of_the_training_forward() -> None:
    """Generation and training agree on masks and positions: the likeliest next token, step by step."""
    preset = demo()
    model = _tiny(preset)
    batch = _batch(preset, 2)
    batch["masks"]["audio"][1] = False
    batch["masks"]["image"][0, 5:] = False
    replies = model.reply(**batch, max_new_tokens=5, eos_token_id=2)
    for row in range(2):
        one = {
            "tokens": {k: v[row : row + 1] for k, v in batch["tokens"].items()},
            "masks": {k: v[row : row + 1] for k, v in batch["masks"].items()},
            "head_ids": batch["head_ids"],
        }
        text = batch["text_ids"][row : row + 1]
        for expected in replies[row]:
            mask = torch.ones_like(text, dtype=torch.bool)
            # The loss of every possible next token; the greedy one has the least.
            losses = []
            for token in range(50):
                longer = torch.cat([text, torch.tensor([[token]])], dim=1)
                labels = torch.full_like(longer, -100)
                labels[0, -1] = token
                more = torch.cat([mask, torch.ones(1, 1, dtype=torch.bool)], dim=1)
                with torch.no_grad():
                    loss = model(**one, text_ids=longer, text_mask=more, labels=labels)["loss"]
                losses.append(float(loss))
            assert int(np.argmin(losses)) == expected
            text = torch.cat([text, torch.tensor([[expected]])], dim=1)


def test_only_the_trained_parts_get_gradients() -> None:
    preset = demo()
    model = _tiny(preset)
    batch = _batch(preset, 2)
    model(**batch, labels=batch["text_ids"])["loss"].backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            # LoRA's B starts at zero, so A has no gradient in the first step.
            assert parameter.grad.abs().sum() > 0 or "lora_A" in name, name
        else:
            assert parameter.grad is None, name


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
    assert set(PRESETS) == {"v2", "demo"}
    for make in PRESETS.values():
        preset = make()
        assert Preset.model_validate_json(preset.model_dump_json()) == preset
        assert preset.layout().total > 0
        assert configure(preset) == preset
