"""What reuse saves in a whole ablation table: the paper's Table 11 with a shared store and without.

    python benchmarks/sweep.py --work DIR [--only measured,predicted,shipped] [--sweep table11]
        [--clips DIR] [--json F] [--plot F.svg] [--quick]

- measured: the sweep at demo scale, on this machine. With reuse: one plan, one store. Without: every run
  encodes what it reads into a store of its own. Then every run is trained once; training is the same in
  both. CPU seconds of all processes count beside wall seconds, since other work may share the machine.
- predicted: the same rows at full size on 129,218 clips, by the sweep's own planner. Operations by formula
  (`extract.costs`, `train.estimates.costs`); CPU seconds per clip from full-width networks of two depths,
  random weights, one thread: blocks are alike, so that the rest is a straight line. One whole network says
  how straight. Decoding is measured on real clips, where there are some.
- shipped: every shipped sweep at full size, counted: encodings with reuse and without. Where rows name
  corpora, these are taken to be of one size.

Scoring is in none. Tables go to stdout as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # ahead of this folder, in which `train` is another file
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sweep_report import measured_tables, predicted_tables, shipped_table  # noqa: E402
from train_report import Result, machine, say  # noqa: E402

from cache.clip import Clip, Record, Subtitle  # noqa: E402
from cache.commit import Status  # noqa: E402
from cache.encoders import SAMPLE_RATE_HZ, Encoder, SoundEncoder  # noqa: E402
from cache.labels import LabelSpace  # noqa: E402
from cache.manifest import Header, Manifest, read_manifest, write_manifest  # noqa: E402
from cache.recipes import label_of  # noqa: E402
from cache.spec import TokenSpec  # noqa: E402
from cache.store import TokenStore  # noqa: E402
from eval.sweep.file import read_sweep, shipped  # noqa: E402
from eval.sweep.planning.costs import Encoding, reuse_costs, training_costs  # noqa: E402
from eval.sweep.planning.plan import SweepPlan, plan_sweep  # noqa: E402
from eval.sweep.planning.reuse_plot import reuse_figure  # noqa: E402
from eval.sweep.rows import rows_of, trials_of  # noqa: E402
from eval.sweep.scale import Material, demo_material, scores_at  # noqa: E402
from eval.sweep.schema import SweepFile, Trial  # noqa: E402
from extract.calibrate import calibrate  # noqa: E402
from extract.config import WorkerConfig  # noqa: E402
from extract.costs import clip_flops  # noqa: E402
from extract.encoders.bank import EncoderBank, EncoderInput  # noqa: E402
from extract.index import index_folder  # noqa: E402
from extract.plan import make_plan  # noqa: E402
from extract.run import extract  # noqa: E402
from extract.sources import open_source  # noqa: E402
from extract.tiny.made_up import of_one_width, write_checkpoint  # noqa: E402
from train.config import Preset  # noqa: E402
from train.llm.backbone import llm_path  # noqa: E402
from train.loop import train  # noqa: E402
from train.presets import demo  # noqa: E402

N_PAPER_CLIPS = 129_218
"""Sum of the paper's Table 1."""
N_PAPER_GPUS = 4
"""Processes of the released training, each with one clip in a step (reference facts, section 6)."""
DURATION_S = 4.0
"""Assumed length of a clip: HuBERT's cost depends on it, Whisper's does not."""
DEPTHS = (1, 3)
"""Blocks of the networks that are timed."""
CHECKED = "clip-large"
"""The network that is timed as a whole, to see how straight the line is."""


# ---------------------------------------------------------------------------- time


@dataclass
class Taken:
    """What some work took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process and of those that it started and that have ended."""


@contextmanager
def timed(taken: Taken) -> Iterator[None]:
    """Add what a block takes."""
    began_s, cpu_s = time.perf_counter(), _cpu_s()
    yield
    taken.wall_s += time.perf_counter() - began_s
    taken.cpu_s += _cpu_s() - cpu_s


def _cpu_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


# ---------------------------------------------------------------------------- measured


def measured(sweep: SweepFile, work: Path, *, quick: bool) -> Result:
    """Encode a sweep at demo scale with reuse and without, then train its runs."""
    rows = rows_of(sweep)[: 4 if quick else None]
    trials = trials_of(sweep, rows, "demo")
    say("making the demo corpus and the checkpoints")
    material = demo_material(work, sweep, trials)
    manifest = read_manifest(material.manifest)
    options: dict[str, Any] = {
        "scores": scores_at(sweep, "demo"), "weights": material.weights, "faces": str(material.faces)
    }  # fmt: skip
    plan_sweep(trials, manifest, None, **options)  # digests of the weights are known from here on
    shared, planning = Taken(), Taken()
    say("encoding with reuse")
    store = TokenStore.open_or_create(work / "store")
    with timed(planning):
        plan = plan_sweep(trials, manifest, store, where=work / "store", **options)
        plan.check()
    for part in plan.extractions:
        with timed(shared):
            bank = EncoderBank(part.plan.specs, part.weights)
            _extract(part.plan, part.records, bank, store, material)
    alone, n_alone, same, n_compared = Taken(), 0, True, 0
    for number_, run in enumerate(plan.runs):
        say(f"encoding without reuse, run {number_ + 1} of {len(plan.runs)}")
        folder = work / "alone"
        own = TokenStore.open_or_create(folder)
        records = [plan.records[place] for place in run.rows]
        with timed(alone):
            checkpoints = {spec.spec_id: plan.checkpoints[spec.spec_id] for spec in run.specs}
            bank = EncoderBank(run.specs, checkpoints)
            _extract(make_plan(records, bank.specs, own), records, bank, own, material)
        n_alone += _n_stored(own)
        for spec in run.specs:
            equal, n = _same_tokens(spec, records, own, store)
            same, n_compared = same and equal, n_compared + n
        shutil.rmtree(folder)
    training = Taken()
    for number_, row in enumerate(row for row in plan.rows if row.shares_run_with is None):
        say(f"training run {number_ + 1} of {len(plan.runs)}: {row.name}")
        with timed(training):
            train(row.preset, manifest, material.manifest, store, work / "runs" / row.name)
    costs = reuse_costs(plan)
    return {
        "sweep": sweep.name, "n_rows": len(plan.rows), "n_runs": len(plan.runs),
        "n_clips": len({record.sha256 for record in plan.records}),
        "n_specs": len(plan.encoded),
        "n_encodings": {"alone": n_alone, "together": _n_stored(store)},
        "planned": {"alone": costs.alone.n_encodings, "together": costs.together.n_encodings},
        "gflop": {"alone": costs.alone.flops / 1e9, "together": costs.together.flops / 1e9},
        "planning": vars(planning), "alone": vars(alone), "together": vars(shared),
        "training": vars(training), "same_tokens": same, "n_compared": n_compared,
    }  # fmt: skip


def _extract(
    plan: Any, records: Any, bank: EncoderBank, store: TokenStore, material: Material
) -> None:
    cropped = any(spec.crop is not None for spec in plan.specs)
    faces = {"faces": str(material.faces)} if cropped else {}
    extract(plan, records, bank, store, material.media, **faces)


def _n_stored(store: TokenStore) -> int:
    return sum(store.index(spec).counts()[Status.OK] for spec in store.specs.values())


def _same_tokens(
    spec: TokenSpec, records: Sequence[Record], own: TokenStore, shared: TokenStore
) -> tuple[bool, int]:
    """Return whether two stores hold the same bits of a spec's clips, and how many were compared."""
    if spec.spec_id not in shared.specs:
        return True, 0  # served by a richer one
    keys = {record.token_key(spec) for record in records}
    held = [key for key in keys if own.index(spec).get(key) is not None]
    ok = [key for key in held if own.index(spec).get(key).status is Status.OK]  # type: ignore[union-attr]
    pairs = ((own.read(spec, key).tokens, shared.read(spec, key).tokens) for key in ok)
    return all(np.array_equal(a, b) for a, b in pairs), len(ok)


# ---------------------------------------------------------------------------- predicted


def predicted(sweep: SweepFile, work: Path, clips: Path | None, *, quick: bool) -> Result:
    """Count and reckon the same sweep at full size on as many clips as the paper has."""
    n_clips = 500 if quick else N_PAPER_CLIPS
    manifest = paper_manifest(n_clips)
    trials = [_with_llama(trial, work) for trial in trials_of(sweep, rows_of(sweep), "full")]
    say(f"planning {len(trials)} trials on {n_clips:,} clips")
    taken = Taken()
    with timed(taken):
        plan = plan_sweep(trials, manifest, None)
        costs = reuse_costs(plan)
    say("laying out the training of every run")
    training = sum(
        N_PAPER_GPUS * cost.n_seeds * cost.flops for cost in training_costs(plan, manifest)
    )
    draws = N_PAPER_GPUS * sum(
        stage.n_steps * stage.optim.batch_size
        for row in plan.rows
        if row.shares_run_with is None
        for stage in row.preset.stages
    )
    encoders = _clip_seconds(plan, work, quick=quick)
    online = sum(
        N_PAPER_GPUS * stage.n_steps * stage.optim.batch_size * clip_flops(spec, DURATION_S)
        for row in plan.rows
        if row.shares_run_with is None
        for stage in row.preset.stages
        for spec in row.preset.tokens.all()
    )
    return {
        "n_clips": n_clips, "n_runs": len(plan.runs), "n_specs": len(plan.encoded),
        "duration_s": DURATION_S, "planning": vars(taken),
        "ways": {
            name: {**vars(found), "cpu_s": _seconds(name, plan, encoders)}
            for name, found in _ways(costs)
        },
        "encoders": encoders, "depths": DEPTHS, "checked": _check(work, quick=quick),
        "training_flops": training, "n_draws": draws, "online_flops": online,
        "decode_cpu_s": _decode_s(clips, work),
    }  # fmt: skip


def _ways(costs: Any) -> list[tuple[str, Encoding]]:
    return [(name, getattr(costs, name)) for name in ("alone", "equal", "together")]


def paper_manifest(n_clips: int, corpora: Sequence[str] = ("clips",)) -> Manifest:
    """Return records of so many clips of each corpus, to train on, with subtitles of eleven words."""
    text = "I told you that we would not be there before noon"
    records = tuple(
        Record(
            uid=f"{corpus}/{i}", media=f"{corpus}/{i}.mp4", split="train",
            emotion=("happy", "sad")[i % 2], subtitles=(Subtitle(text=text),),
            clip=Clip(sha256=f"{n * n_clips + i:064x}", n_bytes=1, duration_s=DURATION_S),
        )
        for n, corpus in enumerate(corpora)
        for i in range(n_clips)
    )  # fmt: skip
    space = LabelSpace(name="emotion", labels=("happy", "sad"))
    return Manifest(header=Header(media_root=".", label_spaces={"emotion": space}), records=records)


def _with_llama(trial: Trial, work: Path) -> Trial:
    """Return a trial on LLaMA-2-7B's shapes with the bundled tokenizer: neither weights nor a hub."""
    from transformers import LlamaConfig

    folder = work / "llama"
    if not folder.exists():
        LlamaConfig().save_pretrained(folder)  # the defaults are LLaMA-2-7B's
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(llm_path(demo().model.llm)) / name, folder / name)
    llm = trial.preset.model.llm.model_copy(update={"path": str(folder)})
    model = trial.preset.model.model_copy(update={"llm": llm})
    preset: Preset = trial.preset.model_copy(update={"model": model})
    return Trial(trial.row, trial.seed, preset, trial.stage)


def _input_of(spec: TokenSpec) -> str:
    """Return what decides what a clip costs: the network and what it sees."""
    fields = spec.model_copy(
        update={"grid": None, "cls_only": False, "utterance": False, "crop": None}
    )
    return f"{fields.encoder!r} {fields.pixels!r} {fields.frames!r}"


def _clip_seconds(plan: SweepPlan, work: Path, *, quick: bool) -> dict[str, Result]:
    """Return what a clip takes under each network: operations, and CPU seconds of one thread."""
    found: dict[str, Result] = {}
    for spec in plan.encoded:
        key = _input_of(spec)
        if key in found:
            continue
        say(f"timing {label_of(spec)}")
        found[key] = {
            "label": label_of(spec),
            "tflop": clip_flops(spec, DURATION_S) / 1e12,
            "cpu_s": None if quick else _line(spec, work),
        }
    return found


def _n_blocks(encoder: Encoder) -> int:
    return encoder.n_layers if isinstance(encoder, SoundEncoder) else encoder.depth


def _line(spec: TokenSpec, work: Path) -> float:
    """Return the CPU seconds of a clip with all blocks, from networks of two depths."""
    first, second = (_clip_s(spec, n, work) for n in DEPTHS)
    per_block = (second - first) / (DEPTHS[1] - DEPTHS[0])
    return first + (_n_blocks(spec.encoder) - DEPTHS[0]) * per_block


def _clip_s(spec: TokenSpec, n_blocks: int, work: Path) -> float:
    """Return the CPU seconds in which one thread encodes a clip; the less of two, behind a first one."""
    name = "n_layers" if isinstance(spec.encoder, SoundEncoder) else "depth"
    encoder = spec.encoder.model_copy(update={name: n_blocks})
    path = write_checkpoint(encoder, work / "weights")
    cut = spec.model_copy(update={"encoder": encoder})
    bank = EncoderBank([cut], {"given": path}, names=["given"])
    rng = np.random.default_rng(0)
    if spec.stream == "audio":
        given = EncoderInput(
            rng.standard_normal(round(DURATION_S * SAMPLE_RATE_HZ)).astype(np.float32)
        )
    else:
        assert spec.frames is not None
        assert spec.pixels is not None
        n, side = spec.frames.n_frames, spec.pixels.size_px
        given = EncoderInput(rng.integers(0, 256, (n, side, side, 3), np.uint8), tuple(range(n)))
    seconds = []
    for _ in range(3):
        began_s = time.process_time()
        bank.encode(bank.specs[0], [given])
        seconds.append(time.process_time() - began_s)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return min(seconds[1:])


def _check(work: Path, *, quick: bool) -> Result | None:
    """Compare the line with one whole network."""
    if quick:
        return None
    from cache.recipes import token_specs

    (spec,) = token_specs(f"{CHECKED}:image")
    say(f"timing {label_of(spec)} as a whole")
    whole = _clip_s(spec, _n_blocks(spec.encoder), work)
    return {"label": label_of(spec), "whole_s": whole, "line_s": _line(spec, work)}


def _seconds(way: str, plan: SweepPlan, encoders: Mapping[str, Result]) -> float | None:
    """Return the CPU seconds of encoding in one of the ways; all clips are alike and have all streams."""
    per_clip = {key: one["cpu_s"] for key, one in encoders.items()}
    if None in per_clip.values():
        return None
    n = len(plan.records)
    if way == "alone":
        specs = [spec for run in plan.runs for spec in run.specs]
    elif way == "equal":
        specs = [wanted.spec for wanted in plan.wanted]
    else:
        specs = list(plan.encoded)
    return float(n * sum(per_clip[_input_of(spec)] for spec in specs))


def _decode_s(clips: Path | None, work: Path) -> float | None:
    """Return the CPU seconds of decoding a real clip for the paper's three streams."""
    if clips is None or not clips.is_dir():
        return None
    say(f"decoding the clips of {clips}")
    path = work / "clips.parquet"
    manifest, _ = index_folder(clips, path)
    write_manifest(path, manifest)
    chosen = [of_one_width(16, 2)[name] for name in ("whisper", "eva video", "eva image")]
    weights = {
        spec.encoder.kind: write_checkpoint(spec.encoder, work / "weights") for spec in chosen
    }
    bank = EncoderBank(chosen, weights)
    plan = make_plan(manifest.records, bank.specs, None)
    config = WorkerConfig(
        store="", manifest=str(path), media_root=str(clips), specs=bank.specs, weights={},
        job_id="none", generation=0, session="none",
    )  # fmt: skip
    return calibrate(plan, bank, open_source(str(clips)), config, 100).decode_cpu_s


# ---------------------------------------------------------------------------- shipped


def shipped_sweeps() -> Result:
    """Count the encodings of every shipped sweep at full size, per clip of a corpus."""
    rows = []
    for name in shipped():
        sweep = read_sweep(name)
        trials = trials_of(sweep, rows_of(sweep), "full")
        named = {corpus for trial in trials for corpus in trial.preset.data.corpora or ()}
        plan = plan_sweep(trials, paper_manifest(10, sorted(named) or ("clips",)), None)
        costs = reuse_costs(plan)
        rows.append(
            {
                "sweep": name, "n_rows": len(plan.rows), "n_runs": len(plan.runs),
                "n_specs": len(plan.wanted), "n_encoded": len(plan.encoded),
                **{way: vars(found) for way, found in _ways(costs)},
            }
        )  # fmt: skip
    return {"rows": rows}


# ---------------------------------------------------------------------------- all of it


def save_plot(sweep: SweepFile, path: Path) -> None:
    """Save the plot of reuse at full size, on as many clips as the paper has."""
    from matplotlib import rc_context

    from eval.figures import PAPER, settings_of

    trials = trials_of(sweep, rows_of(sweep), "full")
    plan = plan_sweep(trials, paper_manifest(N_PAPER_CLIPS), None)
    with rc_context({**settings_of(PAPER, "sweep"), "svg.fonttype": "path"}):
        figure = reuse_figure(plan)(PAPER)
        figure.savefig(path, dpi=150, facecolor=PAPER.ground, metadata={"Date": None})


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="empty folder for corpora and stores"
    )
    parser.add_argument("--sweep", default="table11")
    parser.add_argument("--only", default="measured,predicted,shipped")
    parser.add_argument("--clips", type=Path, default=ROOT.parent / "shared" / "clips")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--quick", action="store_true", help="shows that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.work.mkdir(parents=True, exist_ok=True)
    sweep, only = read_sweep(arguments.sweep), arguments.only.split(",")
    found: Result = {"machine": machine("cpu")}
    if "measured" in only:
        found["measured"] = measured(sweep, arguments.work / "demo", quick=arguments.quick)
        print(measured_tables(found["measured"]))
    if "predicted" in only:
        found["predicted"] = predicted(
            sweep, arguments.work, arguments.clips, quick=arguments.quick
        )
        print(predicted_tables(found["predicted"]))
    if "shipped" in only:
        found["shipped"] = shipped_sweeps()
        print(shipped_table(found["shipped"]))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1, default=str) + "\n")
    if arguments.plot is not None:
        save_plot(sweep, arguments.plot)


if __name__ == "__main__":
    main()
