"""The whole path at the paper's true sizes, once, on a CPU: do both halves fit, one after the other?

    python benchmarks/full_size.py [--clips DIR] [--work DIR]

Phase 1 builds the Whisper-large-v3 encoder and EVA ViT-g with random weights and encodes two real
clips into a store under preset v2. Phase 2, in a process of its own, builds LLaMA-2-7B's dimensions
in bfloat16 with LoRA and takes one training step from that store. Time and peak memory of each
phase are printed and written to WORK/full_size.json. That the two halves never meet in memory is
the point of the design.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from cache.spec import TokenSpec
    from extract.encoders.base import Encoder

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEFAULT_CLIPS = ROOT.parent / "shared" / "clips"
CLIPS = ("friday.mp4", "grid_bbaf2n.mpg")


class Phases:
    """Times named phases and reads the process's peak memory after each."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | str]] = []

    def run(self, name: str, work: Callable[[], T]) -> T:
        """Do `work`, print and remember its cost, return its result."""
        start = time.monotonic()
        result = work()
        seconds = time.monotonic() - start
        # ru_maxrss is in KiB on Linux and grows only; it is this process's peak so far.
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        self.rows.append(
            {"phase": name, "seconds": round(seconds, 1), "peak_gib": round(peak_gib, 2)}
        )
        print(f"{name:<46}{seconds:9.1f} s   peak {peak_gib:6.2f} GiB", flush=True)
        return result


def extraction(clips: Path, work: Path, results: Path) -> None:
    """Phase 1: random encoders of the true sizes, two clips, one store."""
    import torch

    from cache.manifest import write_manifest
    from cache.store import TokenStore
    from extract.encoders import bank, weights
    from extract.encoders.base import freeze
    from extract.encoders.eva import FrozenEva
    from extract.encoders.whisper import FrozenWhisper, _openai_module
    from extract.index import index_folder
    from extract.plan import make_plan
    from extract.run import extract
    from train.presets import v2

    torch.manual_seed(0)
    phases = Phases()
    tokens = v2().tokens

    def build_whisper() -> FrozenWhisper:
        module = _openai_module(tokens.audio.encoder)
        # Its position table is the only part that the constructor fills; the rest is torch's init.
        digest = weights.digest(module.state_dict())
        spec = tokens.audio.encoder.model_copy(update={"weights_sha256": digest})
        return FrozenWhisper(module, spec, "cpu", "float32")

    def build_eva() -> FrozenEva:
        encoder = FrozenEva(tokens.image.encoder, native_px=224)
        digest = weights.digest(encoder._body.state_dict())
        encoder.spec = encoder.spec.model_copy(update={"weights_sha256": digest})
        freeze(encoder, "cpu", "float32")
        return encoder

    whisper = phases.run("build Whisper-large-v3 encoder (float32)", build_whisper)
    eva = phases.run("build EVA ViT-g, 39 blocks (float32)", build_eva)

    class RandomBank(bank.EncoderBank):
        """The bank of real checkpoints, with modules handed in instead of loaded."""

        def __init__(self) -> None:
            self._device, self._precision, self._compile = "cpu", "float32", False
            digests = {"audio": whisper.spec.weights_sha256, "video": eva.spec.weights_sha256}
            self.specs = tuple(
                s.with_weights(digests.get(s.stream, eva.spec.weights_sha256) or "")
                for s in tokens.all()
            )
            self._paths = {spec.spec_id: Path("random-init") for spec in self.specs}

        def encoder(self, spec: TokenSpec) -> Encoder:
            return whisper if spec.stream == "audio" else eva

    media = work / "media"
    media.mkdir(parents=True)
    for name in CLIPS:
        shutil.copy(clips / name, media / name)
    table = work / "labels.csv"
    # Made-up labels: this measures cost and says nothing about the people in the clips.
    rows = [f"{name},label{i},train,A description of clip {i}." for i, name in enumerate(CLIPS)]
    table.write_text("file,label,split,description\n" + "\n".join(rows) + "\n")
    manifest, _ = index_folder(media, work / "corpus.parquet", labels_csv=table, corpus="real")
    write_manifest(work / "corpus.parquet", manifest)
    store = TokenStore.open_or_create(work / "store")
    encoders = RandomBank()
    plan = make_plan(manifest.records, encoders.specs, store)
    report = phases.run(
        "golden probe, decode, encode, commit 2 clips",
        lambda: extract(plan, manifest.records, encoders, store, media, deadline_s=600),
    )
    assert report is not None
    assert not report.failures, report.failures
    results.write_text(json.dumps({"phases": phases.rows, "store_bytes": report.n_bytes}))


def training(work: Path, results: Path) -> None:
    """Phase 2: the 7B language model, one step of preset v2 from the store."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import train.loop as loop
    from cache.manifest import read_manifest
    from cache.store import TokenStore
    from train.config import configure
    from train.llm.backbone import llm_path
    from train.model import EmotionLlama
    from train.presets import demo, v2

    assert not {"whisper", "timm", "decord", "av"} & sys.modules.keys(), "the halves have met"
    phases = Phases()
    preset = configure(v2(), ["stages.0.n_steps=1", "execution.log_every_steps=1"])
    manifest = read_manifest(work / "corpus.parquet")
    store = TokenStore.open(work / "store")

    def build_llm() -> LlamaForCausalLM:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(LlamaConfig())  # the defaults are LLaMA-2-7B's sizes
        finally:
            torch.set_default_dtype(torch.float32)

    llm = phases.run("build LLaMA-2-7B dimensions (bfloat16)", build_llm)
    model = phases.run("add LoRA, adapters, Conv-Attention", lambda: EmotionLlama(preset, llm))
    n_trainable = sum(model.trainable().values())
    # Any tokenizer will do for the cost of a step; the real one comes with the real weights.
    tokenizer = AutoTokenizer.from_pretrained(llm_path(demo().model.llm))
    loop.build = lambda preset: (model, tokenizer)
    short = preset.model_copy(update={"stages": preset.stages[:1]})
    phases.run(
        f"one step of training: {model.layout.total} prefix tokens and the text",
        lambda: loop.train(
            short, manifest, work / "corpus.parquet", store, work / "run", device="cpu"
        ),
    )
    metrics = [json.loads(x) for x in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    found = {"phases": phases.rows, "trainable": n_trainable, "loss": metrics[-1]["loss"]}
    results.write_text(json.dumps(found))


def main() -> None:
    """Run both phases, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=Path, default=DEFAULT_CLIPS, help=f"folder of {CLIPS}")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "full_size")
    arguments = parser.parse_args()
    missing = [name for name in CLIPS if not (arguments.clips / name).is_file()]
    if missing:
        parser.error(f"{arguments.clips} lacks {', '.join(missing)}; give --clips DIR")
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    found: dict[str, object] = {"machine": platform.processor() or platform.machine()}
    for name, work, inputs in (
        ("extraction", extraction, (arguments.clips, arguments.work)),
        ("training", training, (arguments.work,)),
    ):
        results = arguments.work / f"{name}.json"
        print(f"--- {name}", flush=True)
        process = context.Process(target=work, args=(*inputs, results))
        process.start()
        process.join()
        if process.exitcode != 0:
            sys.exit(f"{name} ended with exit code {process.exitcode}")
        found[name] = json.loads(results.read_text())
    (arguments.work / "full_size.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k == "machine"}))


if __name__ == "__main__":
    main()
