"""What a sweep costs: encoding with reuse and without, training, and what reuse saves.

Encoding and training are counted in floating-point operations, by formulas over the shapes of the
networks (`extract.costs`, `train.estimates.costs`); no token is read and no network run. Three ways to
encode are compared, all for the same rows and starting from nothing:

- *alone*: every run encodes what it reads into a store of its own. Seeds of a row are one run, and so are
  rows that differ in their stage alone.
- *equal*: rows share a store, but only tokens of exactly the spec that they ask for.
- *together*: rows share a store, and read richer tokens through their views.

What is *left* is the last, less what the store holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache.clip import Record
from cache.errors import CheckpointError, ManifestError
from cache.manifest import Manifest
from cache.spec import Stream, TokenSpec
from eval.sweep.planning.plan import Reads, SweepPlan, reduced
from extract.costs import clip_flops, hears_length
from extract.plan import bytes_counter

if TYPE_CHECKING:
    import torch

    from train.config import Preset

N_STEPS = 4
"""Steps of each stage that are laid out to estimate its cost."""
N_RECORDS = 4096
"""Most training records that they are drawn from, spread over all."""

_HAS: dict[Stream, str] = {"audio": "has_audio", "video": "has_video", "image": "has_image"}


@dataclass(frozen=True)
class Encoding:
    """What it takes to encode some clips under some specs."""

    n_decodings: int
    """Clips that are opened, each once per run of an extraction."""
    n_encodings: int
    """Clips times specs, without streams that a container denies."""
    flops: float
    n_bytes: int
    """Of tokens to be stored."""

    def __add__(self, other: Encoding) -> Encoding:
        return Encoding(
            self.n_decodings + other.n_decodings,
            self.n_encodings + other.n_encodings,
            self.flops + other.flops,
            self.n_bytes + other.n_bytes,
        )


NOTHING = Encoding(0, 0, 0.0, 0)


@dataclass(frozen=True)
class ReuseCosts:
    """The ways to encode what a sweep reads, and what is left of it."""

    alone: Encoding
    equal: Encoding
    together: Encoding
    left: Encoding

    @property
    def ratio(self) -> float | None:
        """Operations of encoding without reuse to those with it; None if nothing is encoded."""
        return self.alone.flops / self.together.flops if self.together.flops else None


class EncodingCounter:
    """Adds up encodings over the records of a plan; equal sums are made once."""

    def __init__(self, records: Sequence[Record]) -> None:
        """Count over the records of a manifest."""
        self._records = records
        self._known: dict[tuple[TokenSpec, tuple[int, ...]], Encoding] = {}
        self._clips: dict[tuple[int, ...], list[Record]] = {}

    def of(self, reads: Iterable[Reads]) -> Encoding:
        """Return what it takes to encode each of some sets of records under its specs."""
        return sum((self._of_one(one) for one in reads), NOTHING)

    def _of_one(self, reads: Reads) -> Encoding:
        places = reads.rows
        n_decodings = len(self._distinct(places)) if reads.specs else 0
        total = Encoding(n_decodings, 0, 0.0, 0)
        return sum((self.of_spec(spec, places) for spec in reads.specs), total)

    def _distinct(self, places: tuple[int, ...]) -> list[Record]:
        """Return a record of each clip."""
        if places not in self._clips:
            chosen = [self._records[place] for place in places]
            self._clips[places] = list({record.sha256: record for record in chosen}.values())
        return self._clips[places]

    def of_spec(self, spec: TokenSpec, places: tuple[int, ...]) -> Encoding:
        """Return what it takes to encode records under one spec, decoding apart."""
        key = spec, places
        if key not in self._known:
            clips = self._distinct(places)
            if (
                spec.uses_record()
            ):  # a clip may be encoded twice, for records that disagree on its peak
                chosen = [self._records[place] for place in places]
                clips = list({record.token_key(spec): record for record in chosen}.values())
            there = [
                record
                for record in clips
                if getattr(record.seen_clip, _HAS[spec.stream]) is not False
            ]
            durations = [r.seen_clip.duration_s for r in there] if hears_length(spec) else []
            flops = sum(clip_flops(spec, duration_s) for duration_s in durations)
            self._known[key] = Encoding(
                0,
                len(there),
                flops if durations else len(there) * clip_flops(spec),
                sum(map(bytes_counter(spec), there)),
            )
        return self._known[key]


def reuse_costs(plan: SweepPlan) -> ReuseCosts:
    """Count what the rows of a plan take to encode, with reuse and without."""
    counter = EncodingCounter(plan.records)
    left = NOTHING
    for part in plan.extractions:
        rows: dict[tuple[TokenSpec, ...], list[int]] = {}
        for unit in part.plan.units:
            rows.setdefault(unit.specs, []).extend(unit.rows)
        reads = [Reads(specs, tuple(places)) for specs, places in rows.items()]
        left += EncodingCounter(part.records).of(reads)
    return ReuseCosts(
        alone=counter.of(plan.runs),
        equal=counter.of(_shared(plan.runs, {})),
        together=counter.of(_shared(plan.runs, {w.spec: w.source for w in plan.wanted})),
        left=left,
    )


def _shared(runs: Iterable[Reads], sources: dict[TokenSpec, TokenSpec]) -> tuple[Reads, ...]:
    """Return what runs encode in a common store: each spec once, for all records that need it.

    Specs of equal sets of records are encoded in one pass, as the plan does it.
    """
    needed: dict[TokenSpec, set[int]] = {}
    for run in runs:
        for spec in run.specs:
            needed.setdefault(sources.get(spec, spec), set()).update(run.rows)
    by_places: dict[frozenset[int], list[TokenSpec]] = {}
    for spec, places in needed.items():
        by_places.setdefault(frozenset(places), []).append(spec)
    return tuple(Reads(tuple(specs), tuple(sorted(places))) for places, specs in by_places.items())


@dataclass(frozen=True)
class RowEncodings:
    """What a row adds, if rows are done in the order of the table."""

    row: str
    alone: Encoding
    """Without reuse; nothing for a row that shares the run of an earlier one."""
    new: Encoding
    """With it: what no row before has encoded. A spec that a later row needs richer is encoded richer
    where it is first needed."""


def row_encodings(plan: SweepPlan) -> tuple[RowEncodings, ...]:
    """Return what each row adds to the encodings of a sweep, from nothing: for the plot of reuse."""
    counter = EncodingCounter(plan.records)
    places = {row.name: row.places for row in plan.rows}
    seen: dict[TokenSpec, set[int]] = {}
    found = []
    for row in plan.rows:
        own = tuple(dict.fromkeys(wanted.spec for wanted in row.inputs.values()))
        alone = NOTHING
        if row.shares_run_with is None:
            specs = tuple(dict.fromkeys(reduced(own).values()))
            alone = counter.of([Reads(specs, places[row.name])])
        new = NOTHING
        opened: set[int] = set()
        for source in dict.fromkeys(w.source for w in row.inputs.values()):
            fresh = set(places[row.name]) - seen.setdefault(source, set())
            seen[source] |= fresh
            opened |= fresh
            new += counter.of_spec(source, tuple(sorted(fresh)))
        n_decodings = len({plan.records[place].sha256 for place in opened})
        found.append(RowEncodings(row.name, alone, new + Encoding(n_decodings, 0, 0.0, 0)))
    return tuple(found)


# ---------------------------------------------------------------------------- training


@dataclass(frozen=True)
class TrainingCost:
    """What the run of a row would train, as far as it can be known."""

    row: str
    n_seeds: int
    n_prefix: int
    """Tokens of the prefix."""
    n_steps: int
    """Optimizer steps of all stages."""
    n_trainable: int
    flops: float
    """Of one seed, all steps."""
    unknown: str | None = None
    """Why the last two are not known: the language model is not at hand."""


def training_costs(plan: SweepPlan, manifest: Manifest) -> tuple[TrainingCost, ...]:
    """Count what each distinct run would train: shapes alone, no token and no weight is read.

    Some steps of each stage are laid out by the run's own planner, from records of its training split.

    Raises:
        ManifestError: A row's task finds no record to train on.
        SchemaError: LoRA names no layer of the model, or a sample does not fit its context.
    """
    seeds: dict[str, set[int]] = {}
    for trial in plan.trials:
        seeds.setdefault(trial.row, set()).add(trial.seed)
    unknown: dict[str, str] = {}
    found = []
    for row in plan.rows:
        if row.shares_run_with is not None:
            continue
        path, records = row.preset.model.llm.path, [manifest.records[p] for p in row.train_places]
        n_trainable, flops = 0, 0.0
        if (
            path not in unknown
        ):  # looked for in vain once: a hub that cannot be reached takes a while
            try:
                n_trainable, flops = _trained(row.preset, records, manifest)
            except CheckpointError as error:
                unknown[path] = str(error)
        found.append(
            TrainingCost(
                row=row.name,
                n_seeds=len(seeds[row.name]),
                n_prefix=row.preset.layout().total,
                n_steps=sum(stage.n_steps for stage in row.preset.stages),
                n_trainable=n_trainable,
                flops=flops,
                unknown=unknown.get(path),
            )
        )
    return tuple(found)


def _trained(preset: Preset, records: Sequence[Record], manifest: Manifest) -> tuple[int, float]:
    """Return how many parameters a run trains, and the operations of all its steps."""
    import torch

    from train.llm.backbone import empty_llm
    from train.model import EmotionLlama

    with torch.device("meta"):
        model = EmotionLlama(preset, empty_llm(preset.model.llm))
    return sum(model.trainable().values()), _flops(preset, model, records, manifest)


def _flops(
    preset: Preset, model: torch.nn.Module, records: Sequence[Record], manifest: Manifest
) -> float:
    """Return the operations of all stages: the mean of some laid-out packs, times their number."""
    import torch

    from train.batches.foreseen import Foreseen
    from train.data import Renderer
    from train.estimates.costs import Costs, Work
    from train.llm.backbone import load_tokenizer
    from train.mixture import Mixture
    from train.model import EmotionLlama
    from train.packing import Grouper, Planner

    assert isinstance(model, EmotionLlama)
    reader = Foreseen(preset)
    renderer = Renderer(preset, load_tokenizer(preset.model.llm), manifest.header)
    grouper = Grouper(preset, reader, renderer, None)
    costs = Costs(preset, model, torch.device("cpu"))
    padded = preset.execution.attention == "padded"

    def usable(chosen: Sequence[Record]) -> list[Record]:
        return [record for record in chosen if reader.streams_of(record)]

    some = usable(records[:: max(1, math.ceil(len(records) / N_RECORDS))])
    total = 0.0
    for number, stage in enumerate(preset.stages):
        seed = preset.seed + number
        try:
            mixture = Mixture(some, stage, seed, reader.streams_of)
        except ManifestError:  # some have nothing for a rare task, or all have not: then it says so
            mixture = Mixture(usable(records), stage, seed, reader.streams_of)
        planner = Planner(mixture, grouper.groups, stage.optim)
        steps = [planner.next_step() for _ in range(min(N_STEPS, stage.n_steps))]
        works = [Work.of(pack, padded=padded) for step in steps for pack in step.packs]
        total += stage.n_steps * sum(costs.flops(work).total for work in works) / len(steps)
    return total


def reckoned_speed(device: str = "auto") -> float | None:
    """Return the operations per second to reckon with, measured in less than a second.

    A share, as `train.estimates.estimate` assumes it, of the speed of a large matrix product: in float32
    on a CPU, in bfloat16 on a GPU.

    Args:
        device: `cpu`, `cuda`, `cuda:N`; `auto` takes a GPU where there is one.

    Returns:
        The speed; None for a device that is not on this machine.
    """
    import torch

    from train.estimates.estimate import EFFICIENCY, measure_flops_per_s

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cpu" and not torch.cuda.is_available():
        return None
    chosen = torch.device(device)
    dtype = torch.float32 if chosen.type == "cpu" else torch.bfloat16
    return EFFICIENCY[chosen.type] * measure_flops_per_s(chosen, dtype)
