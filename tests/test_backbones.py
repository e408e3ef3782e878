"""Other language models than LLaMA-2: Qwen2, Mistral and Gemma types, grouped heads, windows, caps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from cache.errors import CheckpointError, MissingDependencyError, SchemaError
from cache.manifest import read_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.generate import generate, load_run
from tests.test_model import _gradients, _group, _loss, _masked_views, _replies, _rows
from tests.training import make_corpus
from train.config import ExecutionConfig, LlmConfig, LoraConfig, Preset, configure
from train.data import Group, Renderer, collate
from train.llm.backbone import (
    context_length,
    decoder_layers,
    linear_names,
    llm_path,
    load_llm,
    load_tokenizer,
    with_lora,
)
from train.loop import train
from train.mixture import Ask
from train.model import EmotionLlama
from train.presets import demo

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BACKBONES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "gemma": GemmaConfig(**SIZES),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=256),
    "phi3": Phi3Config(**SIZES, partial_rotary_factor=1.0),
}


def model_of(config: PretrainedConfig, preset: Preset) -> EmotionLlama:
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config)
    model = EmotionLlama(preset, llm).double().eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def preset_for(name: str) -> Preset:
    targets = '["qkv_proj"]' if name == "phi3" else '["q_proj","v_proj"]'
    return configure(demo(), [f"model.lora.targets={targets}"])


@pytest.mark.parametrize("name", BACKBONES)
def test_packed_equals_padded_with_any_backbone(name: str) -> None:
    preset = preset_for(name)
    model = model_of(BACKBONES[name], preset)
    views = _masked_views(preset)
    groups = [_group(0, (9, 4)), _group(1, (3, 11), (6, 2)), _group(2, (6, 1))]
    results = []
    attention: Literal["packed", "padded"]
    for attention in ("packed", "padded"):
        model.set_execution(ExecutionConfig(attention=attention))
        found = _loss(model, collate(preset, groups, views))
        found["loss_sum"].backward()
        results.append((found["answer_loss"], _gradients(model)))
    torch.testing.assert_close(*(each for each, _ in results))
    for key, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][key], msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_answers_in_batches_as_alone(name: str) -> None:
    preset = preset_for(name)
    model = model_of(BACKBONES[name], preset)
    views = _masked_views(preset)
    groups = [_group(0, (9, 0)), _group(1, (3, 0)), _group(2, (6, 0))]
    together = _replies(model, collate(preset, groups, views), 5)
    alone = [
        _replies(model, collate(preset, [Group(g.record, g.questions)], _rows(views, i)), 5)[0]
        for i, g in enumerate(groups)
    ]
    assert together == alone


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SIZES, sliding_window=64), r"sees 64 positions only.*attention=padded"),
        (Gemma2Config(**SIZES, sliding_window=512), r"caps its products.*attention=padded"),
    ],
)
def test_attention_that_packing_cannot_do_is_refused_and_padding_does_it(
    config: PretrainedConfig, message: str
) -> None:
    preset = demo()
    model = model_of(config, preset)
    views, groups = _masked_views(preset), [_group(i, (9, 4)) for i in range(3)]
    batch = collate(preset, groups, views)
    with pytest.raises(SchemaError, match=message):
        _loss(model, batch)
    model.set_execution(ExecutionConfig(attention="padded"))
    together = _loss(model, batch)["answer_loss"]
    alone = [
        _loss(model, collate(preset, [g], _rows(views, i)))["answer_loss"][0]
        for i, g in enumerate(groups)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


def test_lora_goes_where_it_is_told() -> None:
    llm = AutoModelForCausalLM.from_config(BACKBONES["qwen2"])
    names = linear_names(llm)
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=3, alpha=6, dropout=0.25, targets=("k_proj", "down_proj"))
    wrapped = with_lora(llm, lora)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert {n.split(".")[-4] for n in trained} == {"k_proj", "down_proj"}
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * ((32 + 16) + (48 + 32))
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.25)


def test_an_unknown_lora_target_is_refused_with_the_candidates() -> None:
    llm = AutoModelForCausalLM.from_config(BACKBONES["llama"])
    lora = LoraConfig(r=3, alpha=6, dropout=0, targets=("q_prj",))
    with pytest.raises(
        SchemaError, match=r"'q_prj'.*Did you mean 'q_proj'.*Candidates: q_proj, k_pr"
    ):
        with_lora(llm, lora)


def test_a_folder_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    config = LlmConfig(path=str(tmp_path), dtype="float32")
    for load in (load_llm, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"cannot be loaded.*model.llm.path=FOLDER"):
            load(config)


def test_quantizing_needs_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = LlmConfig(path="emocache/tiny", dtype="bfloat16", quantize="4bit")
    with pytest.raises(MissingDependencyError, match="pip install bitsandbytes"):
        load_llm(config)


def test_a_model_of_another_architecture_trains_end_to_end(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    """Qwen2 with a ChatML template and without BOS: from a folder through the whole loop to replies."""
    folder = tmp_path / "qwen"
    tokenizer = AutoTokenizer.from_pretrained(llm_path(demo().model.llm))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).save_pretrained(folder)
    manifest_path, store_path = make_corpus(tmp_path, specs)
    manifest, store = read_manifest(manifest_path), TokenStore.open(str(store_path))
    preset = configure(
        demo(),
        [f"model.llm.path={folder}", "stages.0.n_steps=3", "stages.1.n_steps=2",
         "stages.0.optim.batch_size=2", "stages.1.optim.batch_size=2"],
    )  # fmt: skip
    train(preset, manifest, manifest_path, store, tmp_path / "run")
    trained = load_run(tmp_path / "run")
    found = list(generate(trained, store, manifest.records[:2], max_new_tokens=4))
    assert [p.uid for p in found] == [r.uid for r in manifest.records[:2]]
    renderer = Renderer(preset, tokenizer, trained.header)
    prompt = renderer.question(manifest.records[0], Ask("emotion", 0), with_answer=True).prompt
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert prompt.head_ids[0] == start
    assert tokenizer.bos_token_id not in prompt.head_ids
    assert prompt.answer_ids[-1] == end
    assert renderer.turns.stop_ids == (end,)


def test_contexts_and_layers_are_found() -> None:
    for config in BACKBONES.values():
        llm = AutoModelForCausalLM.from_config(config)
        assert context_length(llm) == 512
        assert len(decoder_layers(llm)) == 2
