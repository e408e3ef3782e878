"""Emotion-LLaMA's published checkpoint: written by hand from the reference facts, as upstream saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cache.errors import CheckpointError
from cache.labels import LabelSpace
from cache.manifest import Header
from eval.generate import load_run
from tests.predecessor import ALPHA, small
from train.adapters import ModalAdapters
from train.checkpoint import trained_tensors
from train.model import EmotionLlama, build
from train.presets import v1, v2
from train.published.checkpoints import import_published, recognise, translate, vector_blocks
from train.published.importing import import_run

Trained = dict[str, Tensor]

JOINED, CLS, LOCAL, VIDEO, AUDIO = 384, 96, 96, 96, 64
"""Channels of four joined patches, the CLS token, and the demo preset's streams as one vector each."""


class Reference(nn.Module):
    """The trained parts beside LoRA; attributes are named so that the state dict has upstream's keys."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.llama_proj = nn.Linear(JOINED, width)
        self.feats_llama_proj1 = nn.Linear(LOCAL, width)
        self.feats_llama_proj2 = nn.Linear(VIDEO, width)
        self.feats_llama_proj3 = nn.Linear(AUDIO, width)
        self.cls_tk_llama_proj = nn.Linear(CLS, width)
        # Seven inputs, attention over them, six classes; no loss reaches it.
        self.attention = nn.ModuleDict({"fc_out": nn.Linear(8, 6), "fc_att": nn.Linear(8, 7)})

    def prefix(
        self, patches: Tensor, cls: Tensor, local: Tensor, video: Tensor, audio: Tensor
    ) -> Tensor:
        """Patches, then local, temporal and audio vector (the order of the feature tensor), then CLS."""
        vectors = [
            self.feats_llama_proj1(local),
            self.feats_llama_proj2(video),
            self.feats_llama_proj3(audio),
        ]
        stacked = torch.stack(vectors, dim=1)
        return torch.cat([self.llama_proj(patches), stacked, self.cls_tk_llama_proj(cls)], dim=1)


@pytest.fixture(scope="module")
def model() -> EmotionLlama:
    torch.manual_seed(1)
    return build(small())[0].eval()


def lora_of(model: EmotionLlama) -> Trained:
    """Return random LoRA matrices under the keys of peft 0.2."""
    found = {}
    for name, tensor in trained_tensors(model)[1].items():
        found[f"llama_model.{name}"] = torch.randn(tensor.shape)
    return found


@pytest.fixture(scope="module")
def published(
    model: EmotionLlama, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reference, Trained, Path]:
    torch.manual_seed(2)
    reference = Reference(model.llm.get_input_embeddings().embedding_dim).eval()
    state = {**reference.state_dict(), **lora_of(model)}
    path = tmp_path_factory.mktemp("published") / "checkpoint_29.pth"
    torch.save({"model": state, "config": {"model": {"lora_alpha": ALPHA}}, "epoch": 29}, path)
    return reference, state, path


def test_prefix_equals_the_reference(
    model: EmotionLlama, published: tuple[Reference, Trained, Path]
) -> None:
    reference, state, path = published
    wanted, wanted_lora = trained_tensors(model)
    parts, lora, report = import_published(path, small(), wanted, wanted_lora)
    assert recognise(state) == report.kind == "emotion-llama"
    assert report.missing == ()
    assert parts.keys() == wanted.keys()
    assert {f"llama_model.{key}" for key in lora} == {k for k in state if k.startswith("llama_m")}
    assert all(torch.equal(lora[key], state[f"llama_model.{key}"]) for key in lora)
    assert set(report.unused) == {k for k in state if k.startswith("attention.")}
    assert set(report.unused.values()) == {
        "a classifier of Emotion-LLaMA that no loss ever reached"
    }
    assert report.used["feats_llama_proj1.weight"] == "adapters.maps.local.weight"
    assert any(
        "adapter.audio (2 tensors), adapter.cls (2 tensors), adapter.image" in line
        for line in report.lines()
    )

    generator = torch.Generator().manual_seed(3)
    shapes = {"image": (9, JOINED), "local": (1, LOCAL), "video": (1, VIDEO), "audio": (1, AUDIO)}
    tokens = {n: torch.randn(2, *s, generator=generator) for n, s in shapes.items()}
    tokens["image_cls"] = torch.randn(2, CLS, generator=generator)
    masks = {n: torch.ones(2, s[0], dtype=torch.bool) for n, s in shapes.items()}
    ours = model.adapters
    before = model.prefix(tokens, masks)
    ours.load_state_dict({k.removeprefix("adapters."): v for k, v in parts.items()})
    with torch.no_grad():
        got = model.prefix(tokens, masks)
        expected = reference.prefix(
            tokens["image"],
            tokens["image_cls"].unsqueeze(1),
            tokens["local"][:, 0],
            tokens["video"][:, 0],
            tokens["audio"][:, 0],
        )
    assert got.shape == expected.shape
    assert (before - expected).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_an_imported_run_can_be_asked(
    published: tuple[Reference, Trained, Path], tmp_path: Path
) -> None:
    reference, _, path = published
    report = import_run(path, small(), tmp_path / "run")
    assert report.n_fresh == 0
    spaces = {"emotion": LabelSpace(name="emotion", labels=("happy", "sad"))}
    trained = load_run(tmp_path / "run", header=Header(media_root=".", label_spaces=spaces))
    assert trained.preset.prompt.style == "v1"
    maps: Any = trained.model.adapters.maps
    assert torch.equal(maps["local"].weight, reference.feats_llama_proj1.weight)
    assert torch.equal(maps["audio"].weight, reference.feats_llama_proj3.weight)
    assert torch.equal(maps["cls"].bias, reference.cls_tk_llama_proj.bias)


def test_all_of_v1s_trained_parameters_are_in_the_upstream_layout() -> None:
    """Keys and shapes by hand from section 9, at full size on the meta device."""

    def linear(name: str, d_in: int, d_out: int = 4096) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (d_out, d_in), f"{name}.bias": (d_out,)}

    table = linear("llama_proj", 5632) | linear("cls_tk_llama_proj", 1408)
    for number in (1, 2, 3):
        table |= linear(f"feats_llama_proj{number}", 1024)
    for i in range(32):
        for target in ("q_proj", "v_proj"):
            at = f"llama_model.base_model.model.model.layers.{i}.self_attn.{target}"
            table |= {f"{at}.lora_A.weight": (64, 4096), f"{at}.lora_B.weight": (4096, 64)}
    # The classifier: an MLP for each of seven inputs, one over all, and two linear layers.
    head = {}
    mlps = {f"feats_prep.{i}": d for i, d in enumerate((1024,) * 3 + (4096,) * 4)}
    for name, d in {**mlps, "attention_mlp": 7 * 128}.items():
        head |= linear(f"attention.{name}.0", d, 256) | linear(f"attention.{name}.3", 256, 128)
    head |= linear("attention.fc_att", 128, 7) | linear("attention.fc_out", 128, 6)
    state = {n: torch.empty(s, device="meta") for n, s in {**table, **head}.items()}
    assert sum(state[name].numel() for name in head) == 5_477_005
    assert sum(state[name].numel() for name in table) == 74_993_664

    preset = v1()
    assert recognise(state) == "emotion-llama"
    assert vector_blocks(preset) == {"local", "video", "audio", "cls"}
    parts, lora, unused = translate(state, vector_blocks(preset))
    assert set(unused) == set(head)
    with torch.device("meta"):
        model = EmotionLlama(preset, LlamaForCausalLM(LlamaConfig()))
    ours = {f"adapters.{k}": v.shape for k, v in model.adapters.state_dict().items()}
    assert {k: v.shape for k, v in parts.items()} == ours
    wanted = get_peft_model_state_dict(model.llm, save_embedding_layers=False)
    assert {k: v.shape for k, v in lora.items()} == {k: v.shape for k, v in wanted.items()}
    assert sum(tensor.numel() for tensor in (*parts.values(), *lora.values())) == 74_993_664


def test_a_v2_model_takes_what_both_have() -> None:
    """The adapters of single vectors are no adapters of v2's 64 tokens."""
    assert vector_blocks(v2()) == frozenset()
    names = ("feats_llama_proj1", "feats_llama_proj2", "feats_llama_proj3", "cls_tk_llama_proj")
    state = {f"{name}.weight": torch.zeros(2, 1024) for name in ("llama_proj", *names)}
    parts, _, unused = translate(state, vector_blocks(v2()))
    assert list(parts) == ["adapters.maps.image.weight"]
    assert unused == [f"{name}.weight" for name in names]


def test_a_part_of_v1_takes_the_adapters_that_it_has(
    published: tuple[Reference, Trained, Path],
) -> None:
    """A row of the predecessor's encoder table: HuBERT and VideoMAE, without the picture."""
    _, state, path = published
    preset = small("tokens.image=null", "tokens.local=null")
    adapters = ModalAdapters({"video": VIDEO, "audio": AUDIO}, state["llama_proj.bias"].numel())
    wanted = {f"adapters.{k}": v for k, v in adapters.state_dict().items()}
    parts, _, report = import_published(path, preset, wanted, {})
    assert torch.equal(parts["adapters.maps.video.weight"], state["feats_llama_proj2.weight"])
    assert torch.equal(parts["adapters.maps.audio.bias"], state["feats_llama_proj3.bias"])
    assert report.unused["llama_proj.bias"] == "this model's prefix has no image"
    assert "vector each" in report.unused["feats_llama_proj1.weight"]
    assert report.unused["cls_tk_llama_proj.bias"].endswith("prefix has no CLS token")


def test_another_encoder_is_refused(
    model: EmotionLlama, published: tuple[Reference, Trained, Path]
) -> None:
    _, _, path = published
    wanted, lora = trained_tensors(model)
    width = wanted["adapters.maps.local.weight"].shape[0]
    wanted = {**wanted, "adapters.maps.local.weight": torch.zeros(width, 80)}
    told = "It wants local tokens of 96 channels, the preset's have 80: take a preset"
    with pytest.raises(CheckpointError, match=told):
        import_published(path, small(), wanted, lora)
