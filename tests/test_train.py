"""Cached tokens to a tuned model: batches, curriculum, exact resume, refusals."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache.clip import Clip, Record
from cache.commit import ClipTokens, Status
from cache.errors import (
    CacheMissError,
    CheckpointError,
    DivergedError,
    SchemaError,
    SpecMismatchError,
)
from cache.manifest import Manifest, write_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.generate import load_run
from tests.conftest import key_of, make_clip
from tests.training import described, header_of, numbers_of, said
from train.batches.reading import ViewReader, usable
from train.checkpoint import load_trained
from train.config import Preset, configure
from train.data import Renderer, collate, model_arguments
from train.llm.backbone import llm_path
from train.loop import train
from train.mixture import Ask, Mixture, Sample
from train.model import build
from train.packing import Grouper
from train.presets import demo, preset, v2
from train.running.stage import learning_rates, make_optimizer

ROOT = Path(__file__).resolve().parents[1]
N_RECORDS = 10
SHORT = [
    "stages.0.n_steps=4", "stages.1.n_steps=4", "stages.0.optim.batch_size=2",
    "stages.1.optim.batch_size=2", "stages.0.optim.warmup_steps=2", "stages.1.optim.warmup_steps=2",
    "execution.log_every_steps=1", "execution.save_every_steps=2",
]  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def records() -> tuple[Record, ...]:
    return tuple(
        Record(
            uid=f"made/{i}",
            media=f"{i}.mp4",
            clip=Clip(sha256=key_of(f"clip{i}"), n_bytes=1),
            split="train" if i < 8 else "test",
            subtitles=said("It is raining.") if i % 2 else (),
            emotion=("happy", "sad")[i % 2],
            descriptions=described("The voice is low.") if i % 3 else (),
        )
        for i in range(N_RECORDS)
    )


@pytest.fixture(scope="session")
def corpus(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TokenSpec]
) -> tuple[Manifest, Path, TokenStore]:
    """Ten made-up clips; number 3 has no audio, number 5 no picture."""
    root = tmp_path_factory.mktemp("corpus")
    store = TokenStore.open_or_create(root / "store")
    for spec in specs.values():
        clips = []
        for i in range(N_RECORDS):
            absent = i == 3 if spec.stream == "audio" else i == 5
            made = ClipTokens(key_of(f"clip{i}"), Status.ABSENT)
            clips.append(made if absent else make_clip(spec, f"clip{i}", n_audio=9 + 40 * i))
        store.commit(spec, clips, {"torch": "0"})
    manifest = Manifest(
        header=header_of(("happy", "sad")),
        records=records(),
    )
    path = root / "m.parquet"
    write_manifest(path, manifest)
    return manifest, path, store


def short(*more: str) -> Preset:
    return configure(demo(), [*SHORT, *more])


# --------------------------------------------------------------------------- batches


def grouper_of(preset: Preset, store: TokenStore, limit: int | None = None) -> Grouper:
    tokenizer = AutoTokenizer.from_pretrained(llm_path(preset.model.llm))
    header = header_of(("happy", "sad"))
    reader = ViewReader(store, preset)
    return Grouper(preset, reader, Renderer(preset, tokenizer, header), limit)


def test_answers_are_supervised_token_by_token(corpus: tuple[Manifest, Path, TokenStore]) -> None:
    manifest, _, store = corpus
    preset = demo()
    grouper, reader = grouper_of(preset, store), ViewReader(store, preset)
    tokenizer = AutoTokenizer.from_pretrained(llm_path(preset.model.llm))
    chosen = [manifest.records[1], manifest.records[2]]
    asks = [[Ask("emotion", 0)], [Ask("think", 0), Ask("emotion", 1)]]
    groups = [grouper.group(r, a, with_answer=True) for r, a in zip(chosen, asks, strict=True)]
    batch = collate(preset, groups, reader.read(chosen))
    n_text = len(batch["text_ids"])
    shown = [int(batch["text_ids"][i]) if i < n_text else None for i in batch["order"].tolist()]
    assert shown.count(tokenizer.bos_token_id) == 2, "one BOS a clip"
    assert sum(s is None for s in shown) == 2 * preset.layout().total
    # What is predicted at a position is what stands behind it, except EOS's end.
    for place, target in zip(batch["predict"].tolist(), batch["targets"].tolist(), strict=True):
        assert shown[place + 1] == target
    answers = [
        tokenizer.decode(batch["targets"][batch["answer_of"] == i]).strip() for i in range(3)
    ]
    assert answers == [
        "sad</s>", "<think>The voice is low.</think><answer>happy</answer></s>", "happy</s>",
    ]  # fmt: skip
    assert batch["uids"] == ("made/1", "made/2", "made/2")
    assert batch["tasks"] == ("emotion", "think", "emotion")
    sums = torch.zeros(3).index_add(0, batch["answer_of"], batch["weights"])
    torch.testing.assert_close(sums, torch.ones(3))
    everywhere = collate(preset, groups, reader.read(chosen), "token")
    assert set(everywhere["weights"].tolist()) == {1.0}
    # Positions count on from the prefix for each question.
    n_head = len(groups[0].questions[0].prompt.head_ids)
    first = n_head + preset.layout().total
    starts = [start for start, end, a, b in batch["segments"].rows if b > a]
    assert [int(batch["position_ids"][s]) for s in starts] == [first, first]
    assert groups[1].n_positions == sum(e - s for s, e, _, _ in batch["segments"].rows[1:])


def test_views_masks_and_short_audio_reach_the_batch(
    corpus: tuple[Manifest, Path, TokenStore],
) -> None:
    manifest, _, store = corpus
    reader = ViewReader(store, demo())
    chosen = [manifest.records[i] for i in (2, 3, 5, 0)]
    for _ in range(2):  # from the store, then from memory
        found = reader.read(chosen)
        assert found.masks["audio"].sum(dim=1).tolist() == [16, 0, 16, 9]  # 9 valid frames of 16
        assert found.masks["video"].any(dim=1).tolist() == [True, True, False, True]
        assert found.masks["image"].any(dim=1).tolist() == [True, True, False, True]
        assert not found.tokens["image_cls"][2].any()
    hidden = reader.read(chosen, [("image", "video"), (), (), ()])
    assert not hidden.masks["image"][0].any()
    assert not hidden.tokens["image_cls"][0].any()
    assert hidden.masks["audio"][0].all()
    assert torch.equal(reader.read(chosen).tokens["image"], found.tokens["image"]), "only a copy"
    counts = [reader.n_valid(r)["audio"] for r in chosen]
    assert counts == [16, 0, 16, 9]


def test_several_threads_read_the_same_numbers(corpus: tuple[Manifest, Path, TokenStore]) -> None:
    manifest, _, store = corpus
    preset = configure(demo(), ["data.memory_bytes=100000"])
    alone = [ViewReader(store, preset).read([r]) for r in manifest.records]
    reader = ViewReader(store, preset)
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = list(pool.map(lambda r: reader.read([r]), manifest.records))
            for one, other in zip(alone, found, strict=True):
                assert all(torch.equal(one.tokens[k], other.tokens[k]) for k in one.tokens)
                assert all(torch.equal(one.masks[k], other.masks[k]) for k in one.masks)


def test_prefix_positions_are_counted_without_reading(
    corpus: tuple[Manifest, Path, TokenStore],
) -> None:
    manifest, _, store = corpus
    for override in ("data.mask_missing=true", "data.mask_missing=false"):
        preset = configure(demo(), [override])
        grouper, reader = grouper_of(preset, store), ViewReader(store, preset)
        for record in manifest.records:
            for hidden in ((), ("image", "video"), ("audio",)):
                group = grouper.group(record, [Ask("emotion", 0)], hidden, with_answer=True)
                batch = collate(preset, [group], reader.read([record], [hidden]))
                assert len(batch["order"]) == group.n_positions


def test_the_choice_about_missing_streams_is_explicit(
    corpus: tuple[Manifest, Path, TokenStore], specs: dict[str, TokenSpec], tmp_path: Path
) -> None:
    manifest, _, store = corpus
    reader = ViewReader(store, demo())

    def kept(*overrides: str) -> list[str]:
        config = configure(demo(), overrides).data
        return [r.uid for r in usable(manifest.records, reader, config)]

    assert len(kept()) == N_RECORDS
    assert len(kept("data.absent=drop")) == N_RECORDS - 2
    with pytest.raises(
        CacheMissError, match=r"made/3: audio is absent, and data.absent is 'refuse'"
    ):
        kept("data.absent=refuse")
    broken = TokenStore.open_or_create(tmp_path / "s")
    for spec in specs.values():
        failed = ClipTokens(key_of("clip0"), Status.FAILED, reason="no key frame")
        broken.commit(spec, [failed], {})
    reader = ViewReader(broken, demo())
    with pytest.raises(CacheMissError, match=r"made/0: audio, video, image is failed"):
        usable(manifest.records[:1], reader, demo().data)
    masked = configure(demo(), ["data.failed=mask"]).data
    assert usable(manifest.records[:1], reader, masked) == [], "nothing left to look at"
    with pytest.raises(
        CacheMissError, match=r"made/1: no committed audio tokens.*emocache extract"
    ):
        usable(manifest.records[1:2], reader, demo().data)


def test_a_store_of_another_spec_is_refused_field_by_field(
    corpus: tuple[Manifest, Path, TokenStore],
) -> None:
    wanted = configure(demo(), ["tokens.image.pixels.interpolation=bilinear"])
    with pytest.raises(
        SpecMismatchError, match=r"pixels.interpolation: 'bilinear' wanted, 'bicubic'"
    ):
        ViewReader(corpus[2], wanted)


# --------------------------------------------------------------------------- curriculum


def test_v2_follows_the_papers_recipe() -> None:
    stages = v2().stages
    assert [s.n_steps for s in stages] == [50_000, 50_000]  # 100,000 in all, section 5.1
    assert stages[0].tasks == {"recognition": 1.0}  # labels only, section 4.5
    assert set(stages[1].tasks) == {"recognition", "joint"}
    for stage in stages:
        optim = stage.optim
        assert (optim.lr, optim.weight_decay, optim.warmup_steps) == (1e-4, 0.05, 1000)
    lora = v2().model.lora
    assert (lora.r, lora.alpha, lora.targets) == (64, 16, ("q_proj", "v_proj"))


def test_schedule_is_linear_warm_up_then_one_cosine() -> None:
    optim = v2().stages[0].optim
    rate = learning_rates(optim, 50_000)
    for step, expected in (
        (0, 0.0),
        (500, 5e-5),
        (1000, 1e-4),
        (25_500, 1e-6 + (1e-4 - 1e-6) * 0.5),
        (50_000, 1e-6),
    ):
        assert rate(step) == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert math.isclose(rate(13_250), 1e-6 + 99e-6 * (1 + math.cos(math.pi / 4)) / 2)


def test_only_matrices_decay() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decayed, kept = make_optimizer(module, v2().stages[0].optim).param_groups
    assert [p.ndim for p in decayed["params"]] == [2]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert len(kept["params"]) == 3


# --------------------------------------------------------------------------- runs


def trained_files(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for stage in ("stage1", "stage2"):
        final = run / stage / "final"
        for file in (
            final / "fusion_adapters.safetensors",
            final / "lora/adapter_model.safetensors",
        ):
            found |= {f"{stage}/{k}": v for k, v in load_file(file).items()}
    return found


@pytest.fixture(scope="session")
def uninterrupted(
    corpus: tuple[Manifest, Path, TokenStore], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    manifest, path, store = corpus
    run = tmp_path_factory.mktemp("runs") / "whole"
    seen: list[tuple[str, int]] = []
    result = train(
        short(), manifest, path, store, run, on_step=lambda s, i, n, latest: seen.append((s, i))
    )
    assert result.n_steps == 8
    assert seen == [("stage1", i) for i in range(1, 5)] + [("stage2", i) for i in range(1, 5)]
    return run


def test_a_run_keeps_what_it_promises(uninterrupted: Path, specs: dict[str, TokenSpec]) -> None:
    config = json.loads((uninterrupted / "config.json").read_text())
    assert config["tokens"]["audio"]["encoder"]["weights_sha256"] == "ab" * 32
    rows = [json.loads(x) for x in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in rows] == [
        (s, i) for s in ("stage1", "stage2") for i in range(1, 5)
    ]
    assert all(math.isfinite(r["loss"]) and r["samples_per_s"] > 0 for r in rows)
    assert list((uninterrupted / "tensorboard" / "stage1").glob("events.*"))
    files = [p for p in uninterrupted.rglob("*") if p.suffix in (".bin", ".pkl")]
    assert not files, "weights are safetensors"
    assert (uninterrupted / "stage1" / "checkpoint-4" / "fusion_adapters.safetensors").is_file()


def test_stage_two_starts_where_stage_one_ended(uninterrupted: Path) -> None:
    tensors = trained_files(uninterrupted)
    moved = [
        (tensors[f"stage2/{k}"] - tensors[f"stage1/{k}"]).norm() / tensors[f"stage1/{k}"].norm()
        for k in (name.removeprefix("stage1/") for name in tensors if name.startswith("stage1/"))
        if k.startswith("adapters.") and k.endswith("weight")
    ]
    assert all(0 < m < 0.5 for m in moved)


def test_peft_opens_the_lora(uninterrupted: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(llm_path(demo().model.llm))
    folder = uninterrupted / "stage2" / "final" / "lora"
    opened = PeftModel.from_pretrained(llm, folder)
    ours = load_run(uninterrupted).model.llm.state_dict()
    theirs = opened.state_dict()
    names = [n for n in theirs if "lora_" in n]
    assert len(names) == 16
    for name in names:
        torch.testing.assert_close(theirs[name], ours[name])


def test_resume_equals_an_uninterrupted_run_bit_for_bit(
    uninterrupted: Path, corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    """Stopped at a checkpoint in each stage, as a walltime does it."""
    manifest, path, store = corpus

    class Killed(Exception):
        pass

    def kill_at(stage: str, step: int):  # type: ignore[no-untyped-def]
        def on_step(s: str, i: int, n: int, latest: dict[str, float]) -> None:
            if (s, i) == (stage, step):
                raise Killed

        return on_step

    run = tmp_path / "run"
    for stage in ("stage1", "stage2"):
        with pytest.raises(Killed):
            train(short(), manifest, path, store, run, on_step=kill_at(stage, 4))
    result = train(short(), manifest, path, store, run)
    assert result.n_steps > 0
    whole, resumed = trained_files(uninterrupted), trained_files(run)
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
    for a, b in zip(
        (uninterrupted / "metrics.jsonl").read_text().splitlines(),
        (run / "metrics.jsonl").read_text().splitlines(),
        strict=True,
    ):
        assert json.loads(a)["loss"] == json.loads(b)["loss"]
    assert train(short(), manifest, path, store, run).n_steps == 0


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(
    corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    _, path, store = corpus
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "emocache", "train", "demo", "--manifest", str(path),
        "--store", store.root, "--out", str(run), *SHORT, "stages.0.n_steps=80",
        "execution.save_every_steps=1000",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "the state is saved. Run the same command again to continue." in shown
    assert "Traceback" not in shown
    (saved,) = (run / "stage1").glob("checkpoint-*")
    step = int(saved.name.rpartition("-")[2])
    assert step < 80
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == step
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"trained {80 - step + 4} steps" in again.stdout
    rows = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [*range(1, 81), *range(1, 5)]


def test_a_run_of_another_configuration_is_refused(
    uninterrupted: Path, corpus: tuple[Manifest, Path, TokenStore]
) -> None:
    manifest, path, store = corpus
    with pytest.raises(CheckpointError, match=r"another configuration .seed: 7 wanted, 42 stored"):
        train(short("seed=7"), manifest, path, store, uninterrupted)


def test_a_run_on_other_records_is_refused(
    uninterrupted: Path, corpus: tuple[Manifest, Path, TokenStore]
) -> None:
    manifest, path, store = corpus
    first = manifest.records[0].model_copy(update={"emotion": "sad"})
    other = manifest.model_copy(update={"records": (first, *manifest.records[1:])})
    more = manifest.model_copy(update={"header": header_of(("happy", "sad", "angry"))})
    for changed in (other, more):
        with pytest.raises(CheckpointError, match=r"was trained on other records"):
            train(short(), changed, path, store, uninterrupted)


def test_missing_keys_are_named(uninterrupted: Path, tmp_path: Path) -> None:
    model, _ = build(demo())
    source = uninterrupted / "stage1" / "final"
    (tmp_path / "lora").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / "lora" / name).write_bytes((source / "lora" / name).read_bytes())
    tensors = load_file(source / "fusion_adapters.safetensors")
    del tensors["adapters.maps.audio.weight"]
    tensors["adapters.maps.smell.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "fusion_adapters.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"1 keys missing, first: adapters.maps.audio.weight; 1 keys unexpected, .*smell",
    ):
        load_trained(model, tmp_path)
    (tmp_path / "fusion_adapters.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"damaged"):
        load_trained(model, tmp_path)
    (tmp_path / "fusion_adapters.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no such checkpoint file"):
        load_trained(model, tmp_path)


def test_a_diverged_loss_stops_by_name(
    corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    manifest, path, store = corpus
    wild = short("stages.0.optim.lr=1e30", "stages.0.optim.warmup_steps=0", "stages.0.n_steps=20")
    with pytest.raises(DivergedError, match=r"the loss became .* Lower the learning rate"):
        train(wild, manifest, path, store, tmp_path / "run")


def test_training_needs_no_decoder_and_no_encoder(
    corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    """A training-only install: our own packages but extract, and no encoder library at all."""
    _, path, store = corpus
    absent = (
        "decord",
        "whisper",
        "openai_whisper",
        "timm",
        "av",
        "torchvision",
        "emocache",
        "__editable",
    )
    site = tmp_path / "site"
    site.mkdir()
    for installed in Path(torch.__file__).parents[1].iterdir():
        name = installed.name.lower()
        if not any(name == a or name.startswith((f"{a}-", f"{a}.", f"{a}_")) for a in absent):
            (site / installed.name).symlink_to(installed)
    for ours in ("cache", "train", "eval", "emocache.py"):
        (site / ours).symlink_to(ROOT / ours)
    for info in Path(torch.__file__).parents[1].glob("emocache-*"):
        (site / info.name).symlink_to(info)
    script = f"""
import importlib.util, sys
sys.path.insert(0, {str(site)!r})
for name in ("decord", "whisper", "timm", "av", "torchvision", "extract"):
    assert importlib.util.find_spec(name) is None, name
import emocache
assert emocache.__file__.startswith({str(site)!r})
sys.exit(emocache.main(["train", "demo", "--manifest", {str(path)!r}, "--store",
    {store.root!r}, "--out", {str(tmp_path / "run")!r}, *{SHORT!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "stage2" / "final" / "lora").is_dir()


def test_the_train_extra_names_no_encoder_library() -> None:
    wanted = metadata.requires("emocache") or []
    in_train = {r.split(">")[0].strip() for r in wanted if 'extra == "train"' in r}
    assert {"torch", "transformers", "peft"} <= in_train
    assert not in_train & {"decord", "openai-whisper", "timm", "av"}


# --------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.n_stepz=5", r"stages.0 has no 'n_stepz'.*Did you mean 'n_steps'"),
        ("stages.2.n_steps=5", r"stages is a list of 2; use 0 to 1"),
        ("seed.x=5", r"seed is a single value"),
        ("n_steps", r"override 'n_steps' is not key=value"),
        ("seed=many", r"'seed'.*got 'many'"),
        (
            "views.audio.n_tokens=32",
            r"n_tokens is 32, but views.video gives 16.*model.fusion.n_tokens",
        ),
        ("stages.0.tasks.emotoin=1", r"'stages.0.tasks.emotoin.*\[key\]'|emotoin"),
        ("model.lora.dropout=1.5", r"'model.lora.dropout'.*got 1.5"),
        ("data.absent=maks", r"'data.absent'.*Did you mean 'mask'"),
    ],
)
def test_bad_overrides_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        configure(demo(), [override])


def test_precedence_is_preset_then_file_then_override(tmp_path: Path) -> None:
    path = tmp_path / "more.yaml"
    path.write_text("seed: 1\nexecution:\n  log_every_steps: 7\n")
    merged = configure(demo(), ["seed=2"], path)
    assert (merged.seed, merged.execution.log_every_steps) == (2, 7)
    path.write_text("sead: 1\n")
    with pytest.raises(SchemaError, match=r"unknown key 'sead'.*Did you mean 'seed'"):
        configure(demo(), [], path)
    assert configure(demo(), ["stages.0.optim.lr=1e-5"]).stages[0].optim.lr == 1e-5
    assert [stage.name for stage in configure(demo(), ["stages.1=null"]).stages] == ["stage1"]


def test_a_runs_own_configuration_is_accepted_back(uninterrupted: Path) -> None:
    again = configure(demo(), [], uninterrupted / "config.json")
    assert again == Preset.model_validate_json((uninterrupted / "config.json").read_text())


def test_an_unknown_preset_names_the_near_miss() -> None:
    with pytest.raises(SchemaError, match=r"unknown preset 'dmeo'\. Did you mean 'demo'\?"):
        preset("dmeo")


def test_prefix_positions_are_derived_from_the_views() -> None:
    layout = configure(demo(), ["views.audio.n_tokens=4", "views.video.n_frames=1"]).layout()
    assert layout.blocks == (("fusion", 4), ("image", 36), ("video", 4), ("audio", 4))
    assert np.arange(layout.total)[layout.slice("video")].tolist() == [40, 41, 42, 43]


# --------------------------------------------------------------------------- bad input


def test_a_store_without_a_stream_is_refused(
    corpus: tuple[Manifest, Path, TokenStore], specs: dict[str, TokenSpec], tmp_path: Path
) -> None:
    manifest, path, _ = corpus
    partial = TokenStore.open_or_create(tmp_path / "store")
    for stream in ("audio", "video"):
        clips = [make_clip(specs[stream], f"clip{i}") for i in range(N_RECORDS)]
        partial.commit(specs[stream], clips, {})
    with pytest.raises((CacheMissError, SpecMismatchError), match=r"image"):
        train(short(), manifest, path, partial, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_sequence_longer_than_the_context_is_refused_before_training(
    corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    manifest, path, store = corpus
    long = manifest.records[4].model_copy(update={"subtitles": said("word " * 2500)})
    records = (*manifest.records[:4], long, *manifest.records[5:])
    with pytest.raises(
        SchemaError, match=r"made/4: a sequence of \d+ positions .* context of 2048"
    ):
        train(
            short(), manifest.model_copy(update={"records": records}), path, store, tmp_path / "r"
        )
    assert not (tmp_path / "r").exists()


def test_long_reasoning_is_cut_and_fits(corpus: tuple[Manifest, Path, TokenStore]) -> None:
    manifest, _, store = corpus
    preset = configure(demo(), ["prompt.max_answer_tokens=40"])
    long = manifest.records[4].model_copy(update={"description": "word " * 2500})
    group = grouper_of(preset, store, 400).group(long, [Ask("think", 0)], with_answer=True)
    assert group.n_answer_tokens <= 40
    with pytest.raises(SchemaError, match=r"context of 100"):
        grouper_of(preset, store, 100).group(long, [Ask("think", 0)], with_answer=True)


def test_modality_dropout_leaves_a_stream(corpus: tuple[Manifest, Path, TokenStore]) -> None:
    manifest, _, store = corpus
    preset = configure(demo(), ["stages.0.modality_dropout={audio: 0.9, video: 0.9, image: 0.9}"])
    grouper, reader = grouper_of(preset, store), ViewReader(store, preset)
    mixture = Mixture(manifest.records, preset.stages[0], 0, reader.streams_of)
    hidden = set()
    for place in range(200):
        (group,) = grouper.groups(mixture[place])
        left = set(reader.streams_of(group.record)) - set(group.hidden)
        assert left, "one always stays"
        assert group.n_prefix > 0
        hidden.add(group.hidden)
    assert len(hidden) > 3


def test_questions_that_see_other_streams_get_a_prefix_of_their_own(
    corpus: tuple[Manifest, Path, TokenStore],
) -> None:
    manifest, _, store = corpus
    record = manifest.records[1].model_copy(
        update={"descriptions": described("The voice is low.", audio="A low voice.")}
    )
    asks = (Ask("emotion", 0), Ask("audio", 1), Ask("emotion", 2))
    groups = grouper_of(demo(), store).groups(Sample(0, record, asks))
    assert [(g.hidden, [q.task for q in g.questions]) for g in groups] == [
        ((), ["emotion", "emotion"]),
        (("video", "image"), ["audio"]),
    ]
    assert groups[1].n_prefix < groups[0].n_prefix


def test_settings_of_execution_may_change_and_others_may_not(
    uninterrupted: Path, corpus: tuple[Manifest, Path, TokenStore]
) -> None:
    manifest, path, store = corpus
    other = short("execution.attention=padded", "execution.n_workers=0")
    assert train(other, manifest, path, store, uninterrupted).n_steps == 0
    with pytest.raises(CheckpointError, match=r"stages.*loss_average|another configuration"):
        train(short("stages.0.optim.loss_average=token"), manifest, path, store, uninterrupted)


def test_workers_and_attention_change_no_number_that_matters(
    uninterrupted: Path, corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    manifest, path, store = corpus
    alone = short("execution.n_workers=0")
    train(alone, manifest, path, store, tmp_path / "alone")
    for name, tensor in trained_files(uninterrupted).items():
        assert torch.equal(tensor, trained_files(tmp_path / "alone")[name]), name


def test_a_budget_and_pairs_train_and_resume_bit_for_bit(
    corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    manifest, path, store = corpus
    packed = short(
        "stages.0.optim.max_tokens=700", "stages.1.optim.max_tokens=900", "stages.1.pairs_per_clip=3",
        "stages.1.optim.accumulate=2", "stages.0.modality_dropout={audio: 0.3}",
        "execution.save_every_steps=1", "execution.log_every_steps=3",
    )  # fmt: skip

    class Killed(Exception):
        pass

    def kill(stage: str, step: int, n: int, latest: dict[str, float]) -> None:
        if step == 3:
            raise Killed

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(packed, manifest, path, store, whole)
    for _ in range(2):
        with pytest.raises(Killed):
            train(packed, manifest, path, store, cut, kill)
    train(packed, manifest, path, store, cut)
    assert numbers_of(whole) == numbers_of(cut)
    one, other = trained_files(whole), trained_files(cut)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_best_follows_the_validation(
    corpus: tuple[Manifest, Path, TokenStore], tmp_path: Path
) -> None:
    manifest, path, store = corpus
    watched = short(
        "data.val_split=test", "execution.validate_every_steps=1", "execution.keep_last=1"
    )
    train(watched, manifest, path, store, tmp_path / "run")
    for stage in ("stage1", "stage2"):
        rows = [r for r in numbers_of(tmp_path / "run") if r["stage"] == stage and "val_loss" in r]
        assert [r["step"] for r in rows] == [1, 2, 3, 4]
        best = min(rows, key=lambda r: r["val_loss"])["step"]
        folder = tmp_path / "run" / stage
        assert [p.name for p in folder.glob("best-*")] == [f"best-{best}"]
        assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-4"]
        card = (folder / f"best-{best}" / "README.md").read_text()
        assert "base_model: emocache/tiny" in card
        assert "val loss" in card
    one = load_run(tmp_path / "run", weights="best")
    assert one.preset.name == "demo"


@pytest.mark.parametrize(
    ("override", "block", "n_tokens"),
    [
        ("views.audio.n_tokens=4", "audio", 4),
        ("views.audio.n_tokens=40", "audio", 40),
        ("views.video.n_frames=2", "video", 8),
        ("views.video.grid=1", "video", 4),
        ("views.image.join=12", "image", 12),
    ],
)
def test_figure_3_needs_one_store(
    corpus: tuple[Manifest, Path, TokenStore], override: str, block: str, n_tokens: int
) -> None:
    """Numbers of audio tokens, frames and visual tokens are views: nothing is extracted again."""
    manifest, _, store = corpus
    preset = configure(demo(), [override, "model.fusion.n_tokens=16"])
    blocks = dict(preset.layout().blocks)
    assert blocks == {"fusion": 16, "image": 36, "video": 16, "audio": 16} | {block: n_tokens}
    grouper, reader = grouper_of(preset, store), ViewReader(store, preset)
    chosen = manifest.records[1:6]  # one without audio, one without picture
    groups = [grouper.group(r, [Ask("emotion", 0)], with_answer=True) for r in chosen]
    batch = collate(preset, groups, reader.read(chosen))
    assert len(batch["order"]) == sum(g.n_positions for g in groups)
    model, _ = build(preset)
    loss = model(**model_arguments(batch))["loss_sum"]
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert model.fusion is not None
    assert all(p.grad is not None for p in model.fusion.parameters())


def test_the_other_schemes_are_the_same_machinery() -> None:
    perception, joint = preset("v2-perception-only"), preset("v2-single-joint")
    assert [s.n_steps for s in perception.stages] == [50_000]
    assert perception.stages[0] == v2().stages[0]
    (stage,) = joint.stages
    assert stage.n_steps == 100_000  # section 5.1: both stages together
    assert stage.tasks == v2().stages[1].tasks
    for other in (perception, joint):
        assert other.model_copy(update={"name": "v2", "stages": v2().stages}) == v2()


def test_v2_released_changes_what_the_released_code_does_otherwise() -> None:
    released = preset("v2-released")
    first, second = released.stages
    # Reference facts, section 5.1: twelve corpora; weights that differ between the stages.
    assert {n: c.weight for n, c in first.corpora.items()} == {
        "mer2023": 60, "caer": 135, "dfew": 135, "bold": 135, "mc-eiu": 120, "mafw": 105, "e3": 195,
        "iemocap": 120, "sims-v2": 60, "mosei": 240, "mosi": 45, "meld": 150,
    }  # fmt: skip
    assert second.corpora["mc-eiu"].weight == 150
    assert set(first.corpora["meld"].tasks or ()) == {"emotion", "sentiment", "audio", "image"}
    assert set(second.corpora["caer"].tasks or ()) == {"emotion", "reason", "think"}
    assert released.prompt.option_list == "label_conditional"
    assert released.prompt.answer_norm == "blip"
    assert not released.data.mask_missing
    same = {"name", "tokens", "stages", "prompt", "data"}
    for field in set(Preset.model_fields) - same:
        assert getattr(released, field) == getattr(v2(), field), field
