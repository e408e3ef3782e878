"""What a run would cost, before it is started, against counts by hand and by torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import CacheMissError, ManifestError
from cache.manifest import Header, Manifest
from cache.reader import TokenReader
from cache.spec import TokenSpec
from cache.store import TokenStore
from tests.conftest import key_of, make_clip
from tests.training import described, header_of
from train.batches.reading import ViewReader
from train.config import Preset, configure
from train.data import Group, PrefixBatch, Question, Renderer, collate, model_arguments
from train.estimates import costs, estimate
from train.estimates.costs import Costs, Memory, Work
from train.estimates.estimate import lines
from train.llm import backbone
from train.llm.backbone import empty_llm, llm_path
from train.mixture import Ask
from train.model import EmotionLlama, build
from train.packing import Grouper
from train.presets import demo, v2
from train.prompt import PromptTokens

# transformers 5 asks for another name of what train.model calls.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning",
    "ignore:.is_gradient_checkpointing:FutureWarning",
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
N_RECORDS = 6


def made_manifest() -> Manifest:
    records = tuple(
        Record(
            uid=f"made/{i}",
            media=f"{i}.mp4",
            clip=Clip(sha256=key_of(f"clip{i}"), n_bytes=1),
            split="train" if i < 5 else "val",
            emotion=("happy", "sad")[i % 2],
            descriptions=described("The voice is low."),
        )
        for i in range(N_RECORDS)
    )
    return Manifest(header=header_of(("happy", "sad")), records=records)


def made_store(root: Path, specs: Sequence[TokenSpec]) -> TokenStore:
    """Six clips; number 1 has no audio, number 2 has 9 audio tokens."""
    store = TokenStore.open_or_create(root)
    for spec in specs:
        clips = [
            ClipTokens(key_of(f"clip{i}"), Status.ABSENT)
            if spec.stream == "audio" and i == 1
            else make_clip(spec, f"clip{i}", n_audio=9 if i == 2 else 120)
            for i in range(N_RECORDS)
        ]
        store.commit(spec, clips, {"torch": "0"})
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]) -> TokenStore:
    return made_store(tmp_path_factory.mktemp("estimate") / "store", list(specs.values()))


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA-2-7B's config (the defaults of LlamaConfig) and the bundled tokenizer, no weights."""
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(llm_path(demo().model.llm)) / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def v2_on_meta(llama_folder: Path) -> EmotionLlama:
    return on_meta(v2_of(llama_folder))


def v2_of(llama_folder: Path, *more: str) -> Preset:
    return configure(v2(), [f"model.llm.path={llama_folder}", *more])


def on_meta(preset: Preset) -> EmotionLlama:
    with torch.device("meta"):
        return EmotionLlama(preset, empty_llm(preset.model.llm))


def group_of(n_prefix: int, *texts: tuple[int, int]) -> Group:
    """A group with a head of 2, and questions of (tail, answer) tokens."""
    prompts = [
        PromptTokens(head_ids=[1, 5], tail_ids=[6] * tail, answer_ids=[7] * answer)
        for tail, answer in texts
    ]
    questions = tuple(Question("emotion", prompt) for prompt in prompts)
    return Group(made_manifest().records[0], questions, (), n_prefix)


def demo_batch(preset: Preset, store: TokenStore, llm_tokenizer: Any) -> tuple[Work, PrefixBatch]:
    """A pack of four clips, one of them with three questions."""
    manifest, reader = made_manifest(), ViewReader(store, preset)
    renderer = Renderer(preset, llm_tokenizer, manifest.header)
    grouper = Grouper(preset, reader, renderer, None)
    asks = [[Ask("emotion", 0)]] * 3 + [[Ask("think", 0), Ask("emotion", 1), Ask("think", 2)]]
    pack = tuple(
        grouper.group(record, ask, with_answer=True)
        for record, ask in zip(manifest.records, asks, strict=False)
    )
    padded = preset.execution.attention == "padded"
    views = reader.read([group.record for group in pack])
    return Work.of(pack, padded=padded), collate(preset, pack, views)


# --------------------------------------------------------------------------- the paper's model


def test_v2_has_the_papers_parameters_without_any_weights(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights or tokens were read")

    preset = v2_of(llama_folder)
    store = made_store(tmp_path / "store", [s.with_weights("ab" * 32) for s in preset.tokens.all()])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for module in (backbone, __import__("train.model", fromlist=["model"])):
        monkeypatch.setattr(module, "load_llm", refuse)
    monkeypatch.setattr(TokenReader, "read", refuse)
    found = estimate.estimate(preset, made_manifest(), store, device=CUDA, flops_per_s=1e15)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    # Reference facts, section 3.
    assert found.trainable == {
        "fusion": 2_838_275,
        "adapter.fusion": 1_052_672,
        "adapter.image": 23_072_768,
        "adapter.video": 5_771_264,
        "adapter.audio": 5_246_976,
        "lora": 33_554_432,
    }
    assert found.n_trainable == 71_536_387
    assert found.n_frozen == 6_738_415_616
    assert (found.n_records, found.n_val_records) == (5, 1)
    text = lines(found)
    assert 12 <= len(text) <= 24
    shown = "\n".join(text)
    assert "71,536,387 parameters, 1.05% of all 6,809,952,003" in shown
    assert "frozen         6,738,415,616 parameters, bfloat16" in shown
    assert "stage2: 50,000 steps, 1e+04 passes over the records" in shown


def test_v2_costs_what_the_architecture_says(v2_on_meta: EmotionLlama, llama_folder: Path) -> None:
    """About 14 TFLOP a clip of 520 positions; 21 with activation checkpointing of whole layers.

    torch leaves out what it need not compute again: each layer's last matrix.
    """
    work = Work.of([group_of(448, (58, 12))], padded=False)
    assert work.n_positions == 520
    costs = Costs(v2_of(llama_folder), v2_on_meta, CUDA)
    found = costs.flops(work)
    assert found.total == pytest.approx(14e12, rel=0.02)
    again = v2_of(llama_folder, "execution.checkpoint_activations=true")
    spared = 2 * 520 * 32 * 4096 * 11008
    recomputed = Costs(again, v2_on_meta, CUDA).flops(work).total
    assert recomputed == pytest.approx(21e12 - spared, rel=0.02)
    # By hand, from LLaMA-2-7B's sizes: 32 layers of four 4096^2 and three 4096 * 11008.
    assert found.layers == 2 * 2 * 520 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.attention == 3.5 * 4 * 520**2 * 4096 / 2 * 32
    assert found.lora == 6 * 520 * 33_554_432
    assert found.logits == 2 * 2 * 12 * 4096 * 32_000
    adapters = 2 * 4096 * (256 * 5632 + 64 * 1408 + 64 * 1280) * 2
    assert adapters < found.prefix < 1.1 * adapters


def test_v2_takes_the_memory_of_its_parts(v2_on_meta: EmotionLlama, llama_folder: Path) -> None:
    work = Work.of([group_of(448, (58, 12))], padded=False)
    found = Costs(v2_of(llama_folder), v2_on_meta, CUDA).memory(work)
    assert found.frozen_bytes == 2 * 6_738_415_616
    assert found.trained_bytes == 18 * 71_536_387
    assert found.batch_bytes == 4 * (64 * 1280 + 64 * 1408 + 256 * 5632 + 1408)
    assert found.logits_bytes == 12 * 12 * 32_000
    # Per position and layer: two norms in float32; queries, keys, values, result; gate, up and two
    # products; LoRA's two inputs with masks; 33 layers, the last one for gradients.
    layer = 8 * 4096 + 8 * 4096 + 6 * 11008 + 2 * (3 * 4096 + 2 * 64) + 4 * 32
    assert found.activations_bytes == pytest.approx(520 * 33 * layer, rel=0.01)
    again = v2_of(llama_folder, "execution.checkpoint_activations=true")
    less = Costs(again, v2_on_meta, CUDA).memory(work)
    assert less.activations_bytes == pytest.approx(520 * (32 * 2 * 4096 + 2 * layer), rel=0.05)


def test_quantized_and_shared_weights_take_less(
    v2_on_meta: EmotionLlama, llama_folder: Path
) -> None:
    work = Work.of([group_of(448, (58, 12))], padded=False)

    def memory(*overrides: str, **others: Any) -> Memory:
        return Costs(v2_of(llama_folder, *overrides), v2_on_meta, CUDA).memory(work, **others)

    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 6_738_415_616 - linear  # embeddings, output, norms
    rows = 32 * (5 * 4096 + 2 * 11008)
    assert memory("model.llm.quantize=8bit").frozen_bytes == linear + 4 * rows + 2 * rest
    assert memory("model.llm.quantize=4bit").frozen_bytes == linear * 0.5625 + 2 * rest
    whole = memory()
    ddp = memory(n_processes=4)
    assert ddp.frozen_bytes == whole.frozen_bytes
    assert ddp.trained_bytes == (18 + 4) * 71_536_387
    fsdp = memory(n_processes=4, parallel="fsdp")
    assert fsdp.trained_bytes == whole.trained_bytes / 4
    # A quarter, two layers whole, and embeddings, output, adapters, pre-fusion whole.
    outside = 2 * (2 * 32_000 * 4096 + 4096) + 4 * (71_536_387 - 33_554_432)
    layer = (2 * (linear + 2 * 32 * 4096) + 4 * 33_554_432) / 32
    assert fsdp.frozen_bytes == 2 * 6_738_415_616 / 4 + outside + 2 * layer


# --------------------------------------------------------------------------- against torch


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("again", [False, True])
def test_arithmetic_is_what_torch_counts(store: TokenStore, attention: str, again: bool) -> None:
    preset = configure(
        demo(),
        [f"execution.attention={attention}", f"execution.checkpoint_activations={again}"],
    )
    model, tokenizer = build(preset)
    model.set_execution(preset.execution)
    work, batch = demo_batch(preset, store, tokenizer)
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**model_arguments(batch))["loss_sum"].backward()
    found = Costs(preset, on_meta(preset), CPU).flops(work)
    counted = counter.get_flop_counts()["Global"]
    attended = sum(n for name, n in counted.items() if "scaled_dot" in str(name))
    others = sum(counted.values()) - attended
    assert found.total - found.attention == pytest.approx(others, rel=0.02)
    # The counter multiplies all pairs, also those that causal attention skips.
    if attention == "padded":
        assert found.attention == pytest.approx(attended, rel=0.01)
    else:
        assert found.attention < attended < 2.05 * found.attention


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("again", [False, True])
def test_activations_are_what_torch_saves(store: TokenStore, dtype: str, again: bool) -> None:
    preset = configure(
        demo(), [f"model.llm.dtype={dtype}", f"execution.checkpoint_activations={again}"]
    )
    model, tokenizer = build(preset)
    model.set_execution(preset.execution)
    work, batch = demo_batch(preset, store, tokenizer)
    n_bytes = saved_bytes(model, batch)
    costs = Costs(preset, on_meta(preset), CPU)
    memory = costs.memory(work)
    layer = costs._saved_bytes / costs._n_layers
    in_flight = work.n_positions * layer * (2 if again else 1)
    # Of the logits one copy is saved, a third of what the backward pass holds.
    expected = memory.activations_bytes - in_flight + memory.logits_bytes / 3
    if not again:  # keys and values of the shared prefix, once more for each of three questions
        (prefix,) = {stop - first for _, _, first, stop in batch["segments"].rows} - {0}
        width, item = 2 * 128, expected_bytes_of(dtype)
        expected += 4 * 3 * prefix * width * item
    assert n_bytes == pytest.approx(expected, rel=0.1)


def expected_bytes_of(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2}[dtype]


def saved_bytes(model: nn.Module, batch: PrefixBatch) -> int:
    """Return the bytes that autograd keeps behind a forward pass, parameters and inputs aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in model.buffers()}
    own |= {t.untyped_storage().data_ptr() for t in batch["tokens"].values()}
    shapes = {s for p in model.parameters() for s in (tuple(p.shape), tuple(p.shape)[::-1])}
    seen: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Autocast's copies of weights are counted with the weights.
        is_weight = storage.data_ptr() in own or tuple(tensor.shape) in shapes
        if (tensor.is_floating_point() or tensor.dtype == torch.bool) and not is_weight:
            seen[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**model_arguments(batch))
    return sum(seen.values())


# --------------------------------------------------------------------------- steps


def test_a_pack_is_counted_as_it_is_computed() -> None:
    one, three = group_of(10, (4, 2)), group_of(8, (3, 1), (5, 2), (2, 2))
    packed = Work.of([one, three], padded=False)
    assert (packed.n_clips, packed.n_positions) == (2, 18 + 10 + 4 + 7 + 4)
    assert packed.n_logits == 2 + 1 + 2 + 2
    clip_and_questions = 10**2 / 2 + (4 + 7 + 4) * 10 + (4**2 + 7**2 + 4**2) / 2
    assert packed.n_pairs == 18**2 / 2 + clip_and_questions
    # Rows of 18, 14, 17 and 14; the first answer begins at 12 (18-2, 14-1, 17-2, 14-2: at 12).
    padded = Work.of([one, three], padded=True)
    assert padded.n_positions == 4 * 18
    assert padded.n_pairs == 4 * 18**2
    assert padded.n_logits == 4 * (18 - 11)


def test_steps_are_the_planners(store: TokenStore) -> None:
    preset = configure(
        demo(),
        ["stages.0.n_steps=4", "stages.0.optim.batch_size=5", "stages.1.n_steps=1000",
         "stages.1.optim.batch_size=2", "stages.1.optim.accumulate=3"],
    )  # fmt: skip
    found = estimate.estimate(
        preset, made_manifest(), store, n_processes=2, device=CPU, flops_per_s=1e9
    )
    first, second = found.stages
    assert (first.n_laid_out, second.n_laid_out) == (4, estimate.N_STEPS)
    # Two processes with five clips each see the five training records twice.
    assert first.clips == estimate.Spread(10, 10, 10)
    assert first.epochs == 4 * 10 / 5
    # Prefix 16 fusion + 36 image + 16 video + 16 audio; one clip without audio, one with 9 tokens.
    prefixes = 8 * (5 * (16 + 36 + 16) + 3 * 16 + 9)
    grouper = demo_grouper(preset, store)
    groups = [
        grouper.group(record, [Ask("emotion", epoch)], with_answer=True, vary=True)
        for record in made_manifest().records[:5]
        for epoch in range(8)
    ]
    texts = sum(g.n_positions - g.n_prefix for g in groups)
    assert first.positions.mean == (prefixes + texts) / 4
    assert first.answer_tokens.mean == sum(g.n_answer_tokens for g in groups) / 4
    assert first.positions.least <= first.positions.mean <= first.positions.most
    assert first.tasks == {"emotion": 1.0}
    assert second.clips.mean == 2 * 3 * 2
    assert second.epochs == pytest.approx(1000 * 12 / 5)
    assert set(second.tasks) == {"emotion", "think"}
    assert second.tasks["think"] == pytest.approx(0.5, abs=0.1)
    assert first.fill is None
    # Two processes side by side; on a CPU 0.7 of the speed is assumed.
    assert first.step_s == pytest.approx(first.flops.total / 2 / 0.7e9, rel=0.1)
    assert found.total_s == 4 * first.step_s + 1000 * second.step_s
    largest, mean = first.memory_most, first.memory
    assert largest.activations_bytes >= mean.activations_bytes > 0


def demo_grouper(preset: Preset, store: TokenStore) -> Grouper:
    header = made_manifest().header
    tokenizer = backbone.load_tokenizer(preset.model.llm)
    return Grouper(preset, ViewReader(store, preset), Renderer(preset, tokenizer, header), None)


def test_fill_is_the_share_of_the_budget(store: TokenStore) -> None:
    preset = configure(demo(), ["stages.0.optim.max_tokens=1000", "stages.0.pairs_per_clip=2"])
    stage = estimate.estimate(preset, made_manifest(), store, device=CPU, flops_per_s=1e9).stages[0]
    assert stage.fill == stage.positions.mean / 1000
    assert 0.95 < stage.fill <= 1
    assert stage.positions.most <= 1000


def test_what_a_run_would_refuse_is_refused(store: TokenStore) -> None:
    bare = made_manifest().model_copy(update={"header": Header(media_root=".")})
    with pytest.raises(ManifestError, match=r"no labels, so there is nothing to train on. Index"):
        estimate.estimate(demo(), bare, store, device=CPU)
    other = (
        made_manifest()
        .records[0]
        .model_copy(update={"uid": "made/new", "clip": Clip(sha256=key_of("new"), n_bytes=1)})
    )
    more = made_manifest()
    more = more.model_copy(update={"records": (*more.records, other)})
    with pytest.raises(CacheMissError, match=r"made/new: no committed audio tokens"):
        estimate.estimate(demo(), more, store, device=CPU)


def test_speed_is_measured_in_a_moment() -> None:
    found = estimate.measure_flops_per_s(CPU, torch.float32)
    assert 1e8 < found < 1e14


def test_experts_count_as_often_as_they_are_met() -> None:
    layer = nn.Module()
    layer.experts = nn.Parameter(torch.empty(8, 6, 4), requires_grad=False)
    layer.router = nn.Linear(4, 8, bias=False).requires_grad_(False)
    maps = costs._maps(layer, 2)
    assert sum(m.n_in * m.n_out * m.times for m in maps) == 2 * 6 * 4 + 4 * 8
