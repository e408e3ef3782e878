"""Published checkpoints: a network written by hand from the reference facts, saved as upstream does."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from cache.errors import CheckpointError
from train.adapters import ModalAdapters
from train.config import Preset, configure
from train.fusion import ConvAttention
from train.presets import demo, v2
from train.published.checkpoints import import_published, recognise, translate
from train.published.files import read_published

AUDIO, CLS, VIDEO, JOINED = 64, 96, 96, 384
"""Channels of the demo preset's audio, CLS and video tokens, and of four joined patches."""
HIDDEN, WIDTH, OUT, BLOCKS, RANK, ALPHA = 12, 6, 10, 4, 3, 5
LLM, LAYERS, TEXT = 32, 2, 50
TOKENS, PATCHES, BATCH = 16, 9, 2

Trained = dict[str, Tensor]

# --- the reference, by hand from sections 1 to 4 --------------------------------------------------


def _mlp(d_in: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d_in, HIDDEN),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Linear(HIDDEN, WIDTH),
        nn.ReLU(),
        nn.Dropout(0.1),
    )


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv_block(x)
        return x + y * torch.sigmoid(y)


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_blocks = nn.ModuleList(_Block() for _ in range(BLOCKS))


class _ConvPro(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feats_prep = nn.ModuleList([_mlp(AUDIO), _mlp(CLS), _mlp(VIDEO)])
        self.attention_mlp = _mlp(3 * WIDTH)
        self.fc_att = nn.Linear(WIDTH, 3)
        self.conv_entry = nn.Conv1d(3 * WIDTH, WIDTH, 1)
        self.conv_module = _Blocks()
        self.fc_final = nn.Linear(WIDTH, OUT)

    def forward(self, audio: Tensor, cls: Tensor, video: Tensor) -> Tensor:
        streams = [audio, cls[:, None].repeat(1, TOKENS, 1), video]
        a, i, v = (prep(x) for prep, x in zip(self.feats_prep, streams, strict=True))
        joined = torch.cat([a, i, v], dim=2)
        weights = self.fc_att(self.attention_mlp(joined))
        attended = weights[..., :1] * a + weights[..., 1:2] * i + weights[..., 2:] * v
        x = self.conv_entry(joined.transpose(1, 2))
        for block in self.conv_module.conv_blocks:
            x = block(x)
        fused: Tensor = self.fc_final(attended + x.transpose(1, 2))
        return fused


class _LoraLinear(nn.Module):
    """`x W^T + alpha / r x A^T B^T`, under peft's names of either age."""

    def __init__(self, base: nn.Linear, names: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        a, b = nn.Linear(LLM, RANK, bias=False), nn.Linear(RANK, LLM, bias=False)
        self.a, self.b = [a], [b]  # in lists, which register nothing a second time
        self.lora_A: nn.Module = a if names == "old" else nn.ModuleDict({"default": a})
        self.lora_B: nn.Module = b if names == "old" else nn.ModuleDict({"default": b})

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a[0].weight, self.b[0].weight
        return x @ self.weight.T + (ALPHA / RANK) * ((x @ a.T) @ b.T)


class _Wrapped(nn.Module):
    def __init__(self, **inner: nn.Module) -> None:
        super().__init__()
        for name, module in inner.items():
            self.add_module(name, module)


class _Reference(nn.Module):
    """Emotion-LLaMAv2; attributes are named so that `named_parameters` gives the upstream keys."""

    def __init__(self, base: LlamaForCausalLM, names: str) -> None:
        super().__init__()
        llm = _llm()
        llm.load_state_dict(base.state_dict())
        llm.requires_grad_(False)
        for layer in llm.model.layers:
            for name in ("q_proj", "v_proj"):
                linear = getattr(layer.self_attn, name)
                setattr(layer.self_attn, name, _LoraLinear(linear, names))
        self.llama_model = _Wrapped(base_model=_Wrapped(model=llm))
        self.llama_proj = nn.Linear(JOINED, LLM)
        self.llama_proj_video = nn.Linear(VIDEO, LLM)
        self.llama_proj_audio = nn.Linear(AUDIO, LLM)
        self.llama_proj_fusion = nn.Linear(OUT, LLM)
        self.conv_pro_module = _ConvPro()

    def prefix(self, audio: Tensor, cls: Tensor, patches: Tensor, video: Tensor) -> Tensor:
        return torch.cat(
            [
                self.llama_proj_fusion(self.conv_pro_module(audio, cls, video)),
                self.llama_proj(patches),
                self.llama_proj_video(video),
                self.llama_proj_audio(audio),
            ],
            dim=1,
        )

    def trained(self) -> Trained:
        return {k: p.detach().clone() for k, p in self.named_parameters() if p.requires_grad}


def _llm() -> LlamaForCausalLM:
    llm: Any = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=LLM,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            vocab_size=TEXT,
            max_position_embeddings=128,
        )
    )
    return cast(LlamaForCausalLM, llm.eval())


def _save(state: Trained, path: Path, **config: object) -> Path:
    """Write what upstream's trainer writes: an optimizer's state and a configuration beside it."""
    stand_in = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(stand_in.parameters())
    stand_in(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "model": state,
            "optimizer": optimizer.state_dict(),
            "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3},
            "config": {"model": {"arch": "made up", "lora_r": RANK, **config}, "run": {"seed": 42}},
            "epoch": 9,
        },
        path,
    )
    return path


# --- ours -----------------------------------------------------------------------------------------


def _preset(*overrides: str) -> Preset:
    return configure(
        demo(),
        [
            f"model.fusion.hidden_width={HIDDEN}",
            f"model.fusion.width={WIDTH}",
            f"model.fusion.out_width={OUT}",
            f"model.fusion.n_blocks={BLOCKS}",
            f"model.lora.r={RANK}",
            f"model.lora.alpha={ALPHA}",
            *overrides,
        ],
    )


class _Ours:
    def __init__(self, preset: Preset, llm: LlamaForCausalLM) -> None:
        widths: dict[str, int] = {s: shape[1] for s, shape in preset.view_shapes().items()}
        cls_width = preset.tokens.image.encoder.width
        fusion = preset.model.fusion
        self.preset = preset
        self.fusion = ConvAttention(fusion, widths["audio"], cls_width, widths["video"]).eval()
        adapters = {"fusion": fusion.out_width, **widths}
        self.adapters = ModalAdapters(adapters, llm.config.hidden_size).eval()
        lora = preset.model.lora
        self.llm: Any = get_peft_model(
            llm,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=list(lora.targets),
                task_type="CAUSAL_LM",
            ),
        ).eval()

    def parts(self) -> Trained:
        trained = {f"fusion.{k}": v for k, v in self.fusion.state_dict().items()}
        return trained | {f"adapters.{k}": v for k, v in self.adapters.state_dict().items()}

    def lora(self) -> Trained:
        return dict(get_peft_model_state_dict(self.llm, save_embedding_layers=False))

    def read(self, path: Path) -> Any:
        return import_published(path, self.preset, self.parts(), self.lora())

    def load(self, parts: Trained, lora: Trained) -> None:
        for name, module in (("fusion.", self.fusion), ("adapters.", self.adapters)):
            module.load_state_dict(
                {k.removeprefix(name): v for k, v in parts.items() if k.startswith(name)}
            )
        result: Any = set_peft_model_state_dict(self.llm, lora)
        assert not result.unexpected_keys

    def prefix(self, audio: Tensor, cls: Tensor, patches: Tensor, video: Tensor) -> Tensor:
        valid = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        fused, _ = self.fusion(audio, cls, video, valid, valid[:, 0], valid)
        blocks = {"fusion": fused, "image": patches, "video": video, "audio": audio}
        return torch.cat([self.adapters(name, x) for name, x in blocks.items()], dim=1)


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return _llm()


@pytest.fixture
def reference(base: LlamaForCausalLM) -> _Reference:
    return _Reference(base, "old").eval()


@pytest.fixture
def ours(base: LlamaForCausalLM, reference: _Reference) -> _Ours:
    return _Ours(_preset(), base)


@pytest.fixture
def published(reference: _Reference, tmp_path: Path) -> Path:
    return _save(reference.trained(), tmp_path / "checkpoint_9.pth", lora_alpha=ALPHA)


def _v1(state: Trained) -> Trained:
    """Turn a v2 state into Emotion-LLaMA's (section 9): its own streams instead of v2's."""
    kept = {k: v for k, v in state.items() if k.startswith(("llama_proj.", "llama_model."))}
    for name in ("feats_llama_proj1", "feats_llama_proj2", "feats_llama_proj3"):
        kept |= {f"{name}.weight": torch.randn(LLM, 1024), f"{name}.bias": torch.randn(LLM)}
    kept |= {"cls_tk_llama_proj.weight": torch.randn(LLM, CLS), "head_of_old.0.bias": torch.ones(2)}
    return kept


def _minigpt(state: Trained) -> Trained:
    return {k: v for k, v in state.items() if k.startswith(("llama_proj.", "llama_model."))}


# --- equal numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["old", "new"])
def test_prefix_and_logits_equal_the_reference(
    base: LlamaForCausalLM, names: str, tmp_path: Path
) -> None:
    reference = _Reference(base, names).eval()
    state = reference.trained()
    lora_key = "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B"
    assert f"{lora_key}.weight" in state or f"{lora_key}.default.weight" in state
    # What the release holds, beside the blocks: 3 MLPs, the attention's, four maps, four adapters.
    assert len(state) == 2 * (2 * 3 + 2 + 3 + BLOCKS + 4) + LAYERS * 2 * 2
    path = _save(state, tmp_path / "checkpoint_9.pth", lora_alpha=ALPHA)
    generator = torch.Generator().manual_seed(1)
    shapes = ((TOKENS, AUDIO), (CLS,), (PATCHES, JOINED), (TOKENS, VIDEO))
    tokens = [torch.randn(BATCH, *shape, generator=generator) for shape in shapes]
    text = torch.randint(TEXT, (BATCH, 7), generator=generator)

    ours = _Ours(_preset(), base)
    untrained = ours.prefix(*tokens)
    parts, lora, report = ours.read(path)
    ours.load(parts, lora)

    expected, got = reference.prefix(*tokens), ours.prefix(*tokens)
    assert got.shape == (BATCH, 3 * TOKENS + PATCHES, LLM)
    assert (untrained - expected).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    llm: Any = reference.get_submodule("llama_model.base_model.model")
    embedded = llm.get_input_embeddings()(text)
    with torch.no_grad():
        sequence = torch.cat([embedded[:, :3], expected, embedded[:, 3:]], dim=1)
        wanted = llm(inputs_embeds=sequence).logits
        sequence = torch.cat([embedded[:, :3], got, embedded[:, 3:]], dim=1)
        torch.testing.assert_close(
            ours.llm(inputs_embeds=sequence).logits, wanted, rtol=1e-5, atol=1e-6
        )
        with ours.llm.disable_adapter():
            assert (ours.llm(inputs_embeds=sequence).logits - wanted).abs().max() > 1e-3

    assert report.kind == "emotion-llama-v2"
    assert (report.unused, report.missing) == ({}, ())
    assert set(report.used) == set(state)
    assert set(report.used.values()) == set(ours.parts()) | set(ours.lora())
    assert (report.lora_rank, report.lora_targets) == (RANK, ("q_proj", "v_proj"))
    assert (report.n_used, report.n_fresh) == (sum(v.numel() for v in state.values()), 0)


def test_all_of_v2s_trained_parameters_are_in_the_upstream_layout() -> None:
    """Keys and shapes by hand from sections 2 and 3, at full size on the meta device."""

    def linear(name: str, d_in: int, d_out: int, *kernel: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (d_out, d_in, *kernel), f"{name}.bias": (d_out,)}

    pro = "conv_pro_module"
    table: dict[str, tuple[int, ...]] = {}
    mlps = {f"feats_prep.{i}": d for i, d in enumerate((1280, 1408, 1408))}
    for name, d in {**mlps, "attention_mlp": 384}.items():
        table |= linear(f"{pro}.{name}.0", d, 512) | linear(f"{pro}.{name}.3", 512, 128)
    table |= linear(f"{pro}.fc_att", 128, 3) | linear(f"{pro}.conv_entry", 384, 128, 1)
    for i in range(4):
        table |= linear(f"{pro}.conv_module.conv_blocks.{i}.conv_block.0", 128, 128, 3)
    table |= linear(f"{pro}.fc_final", 128, 256)
    for name, d in {"": 5632, "_video": 1408, "_audio": 1280, "_fusion": 256}.items():
        table |= linear(f"llama_proj{name}", d, 4096)
    for i in range(32):
        for target in ("q_proj", "v_proj"):
            at = f"llama_model.base_model.model.model.layers.{i}.self_attn.{target}"
            table |= {f"{at}.lora_A.weight": (64, 4096), f"{at}.lora_B.weight": (4096, 64)}
    state = {name: torch.empty(shape, device="meta") for name, shape in table.items()}
    assert sum(tensor.numel() for tensor in state.values()) == 71_536_387

    assert recognise(state) == "emotion-llama-v2"
    parts, lora, unused = translate(state)
    with torch.device("meta"):
        ours = _Ours(v2(), LlamaForCausalLM(LlamaConfig()))
    for got, wanted in ((parts, ours.parts()), (lora, ours.lora())):
        assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in wanted.items()}
    assert sum(tensor.numel() for tensor in (*parts.values(), *lora.values())) == 71_536_387
    assert unused == []


# --- forms of a file ------------------------------------------------------------------------------


def test_every_form_of_a_file_reads_alike(reference: _Reference, tmp_path: Path) -> None:
    state = reference.trained()
    wrapped = {"model": state}
    torch.save(wrapped, tmp_path / "model_only.pth")
    torch.save(state, tmp_path / "bare.pt")
    torch.save(wrapped, tmp_path / "before_torch_1_6.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "safetensors_by_content.bin")
    paths = [*tmp_path.iterdir(), _save(state, tmp_path / "whole.pth")]
    assert len(paths) == 6
    for path in paths:
        found = read_published(path)
        assert found.keys() == state.keys(), path
        assert all(torch.equal(found[key], state[key]) for key in state), path


def test_half_precision_becomes_float32(reference: _Reference) -> None:
    parts, lora, _ = translate({k: v.half() for k, v in reference.trained().items()})
    assert {v.dtype for v in (*parts.values(), *lora.values())} == {torch.float32}


def test_results_do_not_depend_on_the_file_or_the_model(ours: _Ours, published: Path) -> None:
    parts, lora, _ = ours.read(published)
    before = {k: v.clone() for k, v in (parts | lora).items()}
    with published.open("r+b") as file:  # in place: a mapping would see it
        file.write(bytes(published.stat().st_size))
    with torch.no_grad():
        for parameter in (*ours.fusion.parameters(), *ours.adapters.parameters()):
            parameter.zero_()
    assert all(torch.equal(v, before[k]) for k, v in (parts | lora).items())
    save_file(parts, published.with_suffix(".safetensors"))


# --- predecessors ---------------------------------------------------------------------------------

FRESH = {"fusion", "adapters.maps.fusion", "adapters.maps.video", "adapters.maps.audio"}


@pytest.mark.parametrize(
    ("reduce", "kind", "n_unused"),
    [(_v1, "emotion-llama", 8), (_minigpt, "minigpt-v2", 0)],
)
def test_predecessors_warm_start_image_adapter_and_lora(
    reduce: Callable[[Trained], Trained],
    kind: str,
    n_unused: int,
    reference: _Reference,
    ours: _Ours,
    tmp_path: Path,
) -> None:
    state = reduce(reference.trained())
    fresh = {k: v.clone() for k, v in ours.parts().items()}
    parts, lora, report = ours.read(_save(state, tmp_path / "old.pth", lora_alpha=ALPHA))
    assert recognise(state) == report.kind == kind
    assert torch.equal(parts["adapters.maps.image.weight"], state["llama_proj.weight"])
    for key, tensor in lora.items():
        assert torch.equal(tensor, state[f"llama_model.{key}"])
    assert set(report.missing) == {k for k in fresh if k.startswith(tuple(FRESH))}
    assert all(torch.equal(parts[k], fresh[k]) for k in report.missing)
    assert parts.keys() == fresh.keys()
    assert set(report.used) == {k for k in state if k.startswith(("llama_proj", "llama_model"))}
    assert len(report.unused) == n_unused
    assert report.used.keys() | report.unused.keys() == state.keys()
    assert report.n_fresh == sum(fresh[k].numel() for k in report.missing)
    if kind == "emotion-llama":
        assert "no counterpart" in report.unused["feats_llama_proj3.weight"]
        assert "CLS token" in report.unused["cls_tk_llama_proj.weight"]
        assert "no counterpart" in report.unused["head_of_old.0.bias"]


def test_report_is_a_short_summary_by_component(
    reference: _Reference, ours: _Ours, tmp_path: Path
) -> None:
    path = _save(_v1(reference.trained()), tmp_path / "old.pth", llama_model="/x/Llama-2-7b-chat")
    n_lora = LAYERS * 2 * 2 * LLM * RANK
    n_image = LLM * JOINED + LLM
    n_all = sum(v.numel() for v in (*ours.parts().values(), *ours.lora().values()))
    assert ours.read(path)[2].lines() == [
        f"emotion-llama: 10 of 18 tensors used; {n_lora + n_image:,} of {n_all:,} trained "
        "parameters come from the file",
        "from the file: adapter.image (2 tensors), lora (8 tensors; r=3 on q_proj, v_proj)",
        "fresh: adapter.audio (2 tensors), adapter.fusion (2 tensors), adapter.video (2 tensors), "
        "fusion (30 tensors)",
        "unused: feats_llama_proj1, feats_llama_proj2, feats_llama_proj3 (6 tensors): no "
        "counterpart: Emotion-LLaMA's streams of one 1024-wide vector each",
        "unused: cls_tk_llama_proj (1 tensor): no counterpart: here the CLS token enters the "
        "fusion",
        "unused: head_of_old (1 tensor): no counterpart in Emotion-LLaMAv2",
        "note: the file does not state LoRA's alpha; the preset has 5/3",
        "note: trained on the language model /x/Llama-2-7b-chat; here it is emocache/tiny",
    ]


def test_an_encoders_weights_are_unused_with_a_warning(
    reference: _Reference, ours: _Ours, tmp_path: Path
) -> None:
    extra = {"ln_vision.weight": torch.ones(4), "visual_encoder.pos_embed": torch.ones(4)}
    report = ours.read(_save(reference.trained() | extra, tmp_path / "a.pth"))[2]
    assert set(report.unused) == set(extra)
    assert any("ln_vision.weight" in note and "differ" in note for note in report.notes)


def test_parts_that_the_model_lacks_are_unused(reference: _Reference, tmp_path: Path) -> None:
    """A model without value LoRA and without the attention branch takes the rest."""
    preset = _preset("model.lora.targets=[q_proj]", "model.fusion.kind=conv")
    ours = _Ours(preset, _llm())
    kept = {k: v for k, v in ours.parts().items() if "attn" not in k}
    path = _save(reference.trained(), tmp_path / "a.pth")
    parts, lora, report = import_published(path, preset, kept, ours.lora())
    assert parts.keys() == kept.keys()
    assert all("q_proj" in key for key in lora)
    reasons = {key.split(".")[1]: reason for key, reason in report.unused.items()}
    assert reasons == {
        "attention_mlp": "model.fusion.kind=conv has no such part",
        "fc_att": "model.fusion.kind=conv has no such part",
        "base_model": "model.lora.targets has no v_proj",
    }
    assert any("trained with model.fusion.kind=conv-attention" in note for note in report.notes)


def test_a_softmax_gate_is_noted(base: LlamaForCausalLM, published: Path) -> None:
    report = _Ours(_preset("model.fusion.gate=softmax"), base).read(published)[2]
    assert any("model.fusion.gate=linear" in note for note in report.notes)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "advice"),
    [
        ("model.lora.r=2", r"would fit: model\.lora\.r=3\."),
        ("model.fusion.hidden_width=8", r"would fit: model\.fusion\.hidden_width=12\."),
        ("model.fusion.width=8", r"would fit: model\.fusion\.width=6\."),
        ("model.fusion.out_width=8", r"would fit: model\.fusion\.out_width=10\."),
        ("model.fusion.n_blocks=2", r"4 tensors too many.* model\.fusion\.n_blocks=4\."),
        ("model.fusion.n_blocks=5", r"2 tensors missing.* model\.fusion\.n_blocks=4\."),
        ("views.image.join=2", r"\(32, 384\) instead of \(32, 192\).* views\.image\.join=4\."),
        ("model.lora.alpha=7", r"alpha 5, the preset has 7.*Set model\.lora\.alpha=5"),
        ("tokens.audio.encoder.width=32", r"wants audio tokens of 64 channels, .* have 32"),
    ],
)
def test_another_shape_is_refused_with_the_override_that_fits(
    override: str, advice: str, base: LlamaForCausalLM, published: Path
) -> None:
    ours = _Ours(_preset(override), base)
    with pytest.raises(CheckpointError, match=advice) as refusal:
        ours.read(published)
    assert str(published) in str(refusal.value)


def test_many_wrong_shapes_show_five_and_a_count(base: LlamaForCausalLM, published: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        _Ours(_preset("model.fusion.width=8"), base).read(published)
    # Second layers of the streams' MLPs, the attention's MLP, gate, entry, blocks, merge.
    n_wrong = 3 * 2 + 3 + 1 + 2 + BLOCKS * 2 + 1
    assert f"{n_wrong} tensors of another shape" in str(refusal.value)
    assert str(refusal.value).count("instead of") == 5


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"hidden_size": 64}, r"width 32, emocache/tiny has 64: .*model\.llm\.path="),
        ({"num_hidden_layers": 3}, r"of 2 layers, emocache/tiny has 3: .*model\.llm\.path="),
        ({"num_hidden_layers": 1}, r"of 2 layers, emocache/tiny has 1: .*model\.llm\.path="),
    ],
)
def test_another_language_model_is_refused(
    change: dict[str, int], advice: str, published: Path
) -> None:
    llm = LlamaForCausalLM(LlamaConfig.from_dict(_llm().config.to_dict() | change))
    with pytest.raises(CheckpointError, match=advice):
        _Ours(_preset(), llm).read(published)


def test_half_a_part_is_refused(reference: _Reference, ours: _Ours, tmp_path: Path) -> None:
    state = reference.trained()
    del state["llama_proj_video.bias"]
    with pytest.raises(CheckpointError, match=r"1 tensor missing.*maps\.video\.bias.*incomplete"):
        ours.read(_save(state, tmp_path / "a.pth"))
    # A whole part may be missing, but of a component that is partly there the report tells.
    state = {k: v for k, v in reference.trained().items() if "fc_final" not in k}
    report = ours.read(_save(state, tmp_path / "a.pth"))[2]
    assert report.missing == ("fusion.merge.bias", "fusion.merge.weight")
    assert "fusion is only in part in the file: 28 of 30 tensors" in report.notes


def test_non_finite_numbers_are_refused(reference: _Reference, ours: _Ours, tmp_path: Path) -> None:
    state = reference.trained()
    state["llama_proj.bias"][3] = torch.nan
    with pytest.raises(CheckpointError, match=r"1 tensor with NaN.*adapters\.maps\.image\.bias"):
        ours.read(_save(state, tmp_path / "a.pth"))


def test_a_parameter_given_twice_is_refused(reference: _Reference) -> None:
    state = reference.trained()
    key = next(key for key in state if "lora_A" in key)
    state[key.replace("lora_A", "lora_A.default")] = state[key]
    with pytest.raises(
        CheckpointError, match=r"given twice, first: .*lora_A\.weight and .*default"
    ):
        translate(state)


def test_unknown_keys_are_refused_with_five_and_a_count() -> None:
    state = {f"encoder.{i}.weight": torch.ones(1) for i in range(8)}
    with pytest.raises(CheckpointError, match=r"8 keys, first: encoder\.0\.weight, .*4\.weight\."):
        recognise(state)


class _Code:
    """Pickles as a call that creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.fault("checkpoint with code in its pickle")
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "created by the checkpoint"
    content = {"model": {"llama_proj.weight": torch.ones(1), "x": _Code(victim)}}
    torch.save(content, tmp_path / "zip.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model": _Code(victim)}))
    for name in ("zip.pth", "old.pth"):
        with pytest.raises(CheckpointError, match=r"refused, .*needs \w+\.open; .*no code was run"):
            read_published(tmp_path / name)
    with pytest.raises(CheckpointError):
        read_published(tmp_path / "plain.pth")
    assert not victim.exists()
    # The trap works: ordinary unpickling springs it.
    pickle.loads((tmp_path / "plain.pth").read_bytes())["model"].close()
    assert victim.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", None, "cannot be read"),
        ("a.pth", b"", "not a checkpoint, it begins with b''"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1", "not a checkpoint"),
        ("a.pth", b"<!doctype html>", "not a web page"),
        ("a.safetensors", b"\x10\0\0\0\0\0\0\0{", "damaged"),
        ("a.pth", {"model": {}}, "no state dict"),
        ("a.pth", [torch.ones(1)], "no state dict, but list"),
        ("a.pth", torch.ones(1), "no state dict, but Tensor"),
        ("a.pth", {"model": {"a": torch.ones(1), "b": 3}}, "1 of 2 entries are no tensors"),
        ("a.pth", {"state_dict": {"a": torch.ones(1)}}, "no tensors, first: state_dict"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    name: str, content: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read_published(path)
    assert str(path) in str(refusal.value)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_published(tmp_path)


@pytest.mark.fault("damaged published checkpoint")
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    reference: _Reference, tmp_path: Path
) -> None:
    zipped = _save(reference.trained(), tmp_path / "a.pth")
    content = torch.load(zipped, weights_only=True)
    legacy = tmp_path / "b.pth"
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    draw = random.Random(0)
    for path in (zipped, legacy):
        whole = path.read_bytes()
        for cut in (draw.randrange(len(whole)) for _ in range(40)):
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError):
                read_published(path)
        # The pickle stands at the beginning; among tensors a changed byte is only another number.
        for _ in range(200):
            changed = bytearray(whole)
            for _ in range(3):
                changed[draw.randrange(4000)] = draw.randrange(256)
            path.write_bytes(changed)
            with suppress(CheckpointError):
                assert all(isinstance(v, Tensor) for v in read_published(path).values())
