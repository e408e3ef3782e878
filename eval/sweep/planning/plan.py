"""What a sweep needs that is not there yet: the union of its rows' tokens, compared with the store.

Decides, and writes nothing::

    plan = plan_sweep(trials, manifest, store, scores=file.scores, weights=weights, where=store_folder)
    plan.check()                      # raises what stands in the way, before anything is started
    for part in plan.extractions:     # none: everything is stored
        bank = EncoderBank(part.plan.specs, part.weights, device, precision)
        extract(part.plan, part.records, bank, store, media_root)
    for trial in plan.trials:         # as given, with the digests of their encoders' weights
        train(trial.preset, ...)

A spec that another one of the union serves (`TokenSpec.serves`) is not encoded: its rows read the richer
tokens through their views, as they do where the store holds such. `explain` puts a plan in words and
tables, `costs` says what it costs and what reuse saves. No encoder is run here, and torch is loaded only
where a checkpoint is seen for the first time and its digest must be computed.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from cache.clip import Record
from cache.commit import Status
from cache.errors import (
    EmocacheError,
    SchemaError,
    StoreError,
)
from cache.manifest import Manifest
from cache.place import is_url
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.formats import human_size
from eval.sweep.planning.checkpoints import Checkpoints, missing_checkpoints
from eval.sweep.planning.reading import Reading
from eval.sweep.schema import ScoreColumn, Trial
from extract.faces import check_tables, face_source
from extract.failures import FailureKind
from extract.plan import UNIT_CLIPS, Plan, make_plan, unique_labels
from train.config import Input, Preset


@dataclass(frozen=True)
class Wanted:
    """Tokens that some rows read, and where they come from."""

    spec: TokenSpec
    """As the rows want it; its weights are open where no checkpoint is given."""
    source: TokenSpec
    """What is encoded for it where nothing is stored: itself, or a richer spec of another row."""
    encoded: TokenSpec
    """What is encoded for the clips that are missing: `source`, unless that is stored for all of its own
    records, and would be encoded for the other row's alone."""
    label: str
    """What people call it; unique within a plan."""
    rows: tuple[str, ...]
    n_clips: int
    """Distinct clips that the rows read."""
    known: Counter[Status] = field(default_factory=Counter)
    """How many of them the store knows, by status."""
    richer: Counter[str] = field(default_factory=Counter)
    """How many of the known come from a richer spec of the store, by its spec_id."""
    misses: Counter[str] = field(default_factory=Counter)
    """How many are not stored, by reason; `encoded` is encoded for them."""

    @property
    def n_missing(self) -> int:
        """Clips that must be encoded under `encoded`."""
        return self.misses.total()

    @property
    def is_served(self) -> bool:
        """True if another row's richer tokens are encoded instead."""
        return self.encoded != self.spec


@dataclass(frozen=True)
class RowPlan:
    """What a row reads."""

    name: str
    preset: Preset
    """Of its first seed, with the digests of the weights."""
    inputs: dict[Input, Wanted]
    places: tuple[int, ...]
    """Records of the manifest that it trains on, validates with, or is scored on, with any seed."""
    train_places: tuple[int, ...]
    """Those that its first seed trains on."""
    shares_run_with: str | None = None
    """An earlier row whose preset is the same: one run serves both."""


@dataclass(frozen=True)
class Reads:
    """What one run reads of a corpus: a set of records under some specs."""

    specs: tuple[TokenSpec, ...]
    """Those that must be encoded if nothing is stored."""
    rows: tuple[int, ...]
    """Which records of the manifest."""


@dataclass(frozen=True)
class Extraction:
    """Work that is left, for `extract.run.extract` or a job."""

    records: tuple[Record, ...]
    plan: Plan
    """On these records; `plan.specs` are resolved once `SweepPlan.check` passes."""
    weights: dict[str, Path]
    """spec_id -> checkpoint, as `EncoderBank` takes it."""


@dataclass(frozen=True)
class SweepPlan:
    """Everything that is known of a sweep before it starts."""

    trials: tuple[Trial, ...]
    """As given, with weights digests filled in where a checkpoint or the store tells them."""
    rows: tuple[RowPlan, ...]
    wanted: tuple[Wanted, ...]
    """The union of the rows' specs, each once."""
    extractions: tuple[Extraction, ...]
    """Sets of records with what they lack; one unless rows read different records."""
    runs: tuple[Reads, ...]
    """What each distinct run would encode by itself, seeds of a row being one: the cost without reuse."""
    records: tuple[Record, ...]
    """The manifest's."""
    stored: tuple[TokenSpec, ...]
    """Specs of the store."""
    checkpoints: dict[str, Path]
    """spec_id -> checkpoint, of all specs that have one."""
    free_bytes: int | None
    """Room where the store is; None: not known, as of a bucket."""
    problems: tuple[EmocacheError, ...]
    """What stands in the way, the weightiest first."""
    remarks: tuple[str, ...]
    """What a reader should know, and what stands in nobody's way."""

    @property
    def encoded(self) -> tuple[TokenSpec, ...]:
        """Specs that the rows need encoded, stored or not: the union without what others serve."""
        return tuple(dict.fromkeys(wanted.source for wanted in self.wanted))

    @property
    def n_bytes(self) -> int:
        """Bytes of tokens that the store will gain."""
        return sum(sum(part.plan.n_bytes.values()) for part in self.extractions)

    @property
    def n_missing(self) -> int:
        """Encodings that are left: clips times specs."""
        return sum(
            misses.total() for part in self.extractions for misses in part.plan.misses.values()
        )

    def check(self) -> None:
        """Raise what stands in the way; several problems of a plan are said together.

        Raises:
            ManifestError: A row needs a stream, corpus, split or benchmark that the manifest lacks.
            CheckpointError: Clips must be encoded, and a checkpoint is not given.
            SpecMismatchError: The store holds tokens of several weights, and none is named.
            SchemaError: Faces are to be cropped, and nothing says where they are.
            StoreError: Too little room for the planned tokens.
        """
        if not self.problems:
            return
        first = self.problems[0]
        if len(self.problems) == 1:
            raise first
        raise type(first)(" Besides: ".join(map(str, self.problems)))


def plan_sweep(
    trials: Sequence[Trial],
    manifest: Manifest,
    store: TokenStore | None,
    *,
    scores: Sequence[ScoreColumn] = (),
    weights: Mapping[str, Path] | None = None,
    where: str | Path | None = None,
    faces: str | None = None,
    retry: Collection[FailureKind] = (),
    unit_clips: int = UNIT_CLIPS,
) -> SweepPlan:
    """Compare what the rows read with what is stored.

    Args:
        trials: Rows with seeds, resolved and at their scale.
        manifest: Records to train on and to be scored on.
        store: Where tokens are, or will be; None for a store that does not exist yet.
        scores: Columns of the table: the records that they score need tokens as well.
        weights: Checkpoints by the names that `EncoderBank` takes (an encoder's name, a stream, a kind, a
            spec_id), or by the canonical JSON of a spec. Bundled ones of presets count where none of
            these is given.
        where: Folder or URL of the store, whose free room is looked at; None looks at none.
        faces: Where faces are, as `extract.faces.face_source` takes it; of use to specs that crop.
        retry: Kinds of failure that count as missing.
        unit_clips: Most clips of a unit of extraction.

    Raises:
        SchemaError: No trial, or a checkpoint for something unknown.
        CheckpointError: A checkpoint that does not fit its spec.
        ManifestError: Media of a record were never looked at.
    """
    if not trials:
        raise SchemaError("a sweep without rows has nothing to plan; select at least one row")
    checkpoints = Checkpoints(weights or {}, store)
    checkpoints.check_names(trials)
    filled = tuple(checkpoints.fill(trial) for trial in trials)
    reading = Reading(manifest, scores)
    problems: list[EmocacheError] = [*checkpoints.problems, *reading.problems]
    by_row: dict[str, Trial] = {}
    read: dict[str, set[int]] = {}
    for trial in filled:
        by_row.setdefault(trial.row, trial)
        read.setdefault(trial.row, set()).update(reading.places(trial.preset))
    places = {row: tuple(sorted(found)) for row, found in read.items()}
    remarks: list[str] = []
    for row, trial in by_row.items():
        found, said = reading.lacks(row, trial.preset)
        problems += found
        remarks += said
    planner = partial(make_plan, store=store, retry=retry, unit_clips=unit_clips)
    presets = {row: trial.preset for row, trial in by_row.items()}
    union = _Union(presets, places, planner, manifest.records)
    wanted, extractions = union.wanted, union.extractions(checkpoints.paths)
    problems += missing_checkpoints((part.plan, part.weights) for part in extractions)
    problems += _faces_missing(extractions, faces)
    free = free_bytes(where) if where is not None else None
    plan = SweepPlan(
        trials=filled,
        rows=_row_plans(by_row, wanted, places, reading),
        wanted=tuple(wanted.values()),
        extractions=extractions,
        runs=_runs(by_row, places),
        records=manifest.records,
        stored=tuple(store.specs.values()) if store is not None else (),
        checkpoints=checkpoints.paths,
        free_bytes=free,
        problems=(),
        remarks=tuple(remarks),
    )
    if free is not None and plan.n_bytes > free:
        problems.append(
            StoreError(
                f"{where}: the planned tokens take {human_size(plan.n_bytes)}, and {human_size(free)} "
                "are free. Make room, give another --store, select fewer rows with --rows, or store "
                "less (a smaller tokens.video.grid, dtype int8)."
            )
        )
    return replace(plan, problems=tuple(problems))


def _faces_missing(extractions: Iterable[Extraction], faces: str | None) -> list[EmocacheError]:
    """Say what stands in the way of cropping faces."""
    for part in extractions:
        if any(spec.crop is not None for spec in part.plan.specs):
            try:
                source = face_source(part.plan.specs, faces)
                if source is not None:
                    check_tables(source, part.records)
            except EmocacheError as error:
                return [error]
    return []


def free_bytes(where: str | Path) -> int | None:
    """Return the room of the file system that a folder is on, or will be; None for a URL."""
    if is_url(where):
        return None
    folder = Path(where).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# ---------------------------------------------------------------------------- the union


class _Union:
    """The specs of all rows, which of them are encoded, and what the store has of them."""

    def __init__(
        self,
        presets: Mapping[str, Preset],
        places: Mapping[str, tuple[int, ...]],
        planner: Callable[[Sequence[Record], Sequence[TokenSpec]], Plan],
        records: Sequence[Record],
    ) -> None:
        self._planner, self._records = planner, records
        self._places: dict[TokenSpec, set[int]] = {}
        self._rows: dict[TokenSpec, list[str]] = {}
        for row, preset in presets.items():
            for spec in preset.tokens.all():
                self._places.setdefault(spec, set()).update(places[row])
                self._rows.setdefault(spec, []).append(row)
        self._plans: dict[tuple[tuple[int, ...], tuple[TokenSpec, ...]], Plan] = {}
        self.wanted = self._compare(tuple(self._places))
        """Every spec, also those that others serve."""

    def _compare(self, specs: tuple[TokenSpec, ...]) -> dict[TokenSpec, Wanted]:
        labels = dict(zip(specs, unique_labels(specs), strict=True))
        sources = reduced(specs)
        found = {}
        for places, group in _by_places(self._places).items():
            plan = self._plan(places, group)
            for spec, label in zip(group, plan.labels, strict=True):
                known, misses = plan.known[label], plan.misses[label]
                found[spec] = Wanted(
                    spec=spec,
                    source=sources[spec],
                    encoded=spec,
                    label=labels[spec],
                    rows=tuple(self._rows[spec]),
                    n_clips=known.total() + misses.total(),
                    known=known,
                    richer=plan.served[label],
                    misses=misses,
                )
        left = reduced([spec for spec in specs if found[spec].n_missing])
        return {spec: replace(found[spec], encoded=left.get(spec, spec)) for spec in specs}

    def _plan(self, places: tuple[int, ...], specs: Sequence[TokenSpec]) -> Plan:
        """Compare some records with the store; the same question is asked once."""
        key = places, tuple(specs)
        if key not in self._plans:
            self._plans[key] = self._planner([self._records[place] for place in places], specs)
        return self._plans[key]

    def extractions(self, paths: Mapping[str, Path]) -> tuple[Extraction, ...]:
        """Return what is left to encode; `paths` are checkpoints by spec_id."""
        needed: dict[TokenSpec, set[int]] = {}
        for spec, wanted in self.wanted.items():
            if wanted.n_missing:
                needed.setdefault(wanted.encoded, set()).update(self._places[spec])
        found = []
        for places, specs in _by_places(needed).items():
            plan = self._plan(places, specs)
            lacking = [
                spec
                for spec, label in zip(specs, plan.labels, strict=True)
                if plan.misses[label].total()
            ]
            if not lacking:
                continue
            if len(lacking) < len(specs):
                plan = self._plan(places, lacking)
            weights = {
                spec.spec_id: paths[spec.spec_id]
                for spec in lacking
                if spec.is_resolved and spec.spec_id in paths
            }
            found.append(Extraction(tuple(self._records[p] for p in places), plan, weights))
        return tuple(found)


def _by_places(
    needed: Mapping[TokenSpec, set[int]],
) -> dict[tuple[int, ...], list[TokenSpec]]:
    """Return specs by the set of records that need them."""
    found: dict[frozenset[int], list[TokenSpec]] = {}
    for spec, places in needed.items():
        found.setdefault(frozenset(places), []).append(spec)
    return {tuple(sorted(places)): specs for places, specs in found.items()}


def reduced(specs: Sequence[TokenSpec]) -> dict[TokenSpec, TokenSpec]:
    """Return which of some specs must be encoded for each of them: itself, or the richest that serves it.

    Serving is transitive, so what serves the richest is served by it in turn and equal to it.
    """
    found = {}
    for spec in specs:
        richest = spec
        for other in specs:
            if other != richest and other.serves(richest) and not richest.serves(other):
                richest = other
        found[spec] = richest
    return found


# ---------------------------------------------------------------------------- rows and runs


def _row_plans(
    by_row: Mapping[str, Trial],
    wanted: Mapping[TokenSpec, Wanted],
    places: Mapping[str, tuple[int, ...]],
    reading: Reading,
) -> tuple[RowPlan, ...]:
    first_with: dict[str, str] = {}
    found = []
    for row, trial in by_row.items():
        preset = trial.preset
        first = first_with.setdefault(_run_of(preset), row)
        found.append(
            RowPlan(
                name=row,
                preset=preset,
                inputs={name: wanted[spec] for name, spec in preset.tokens.by_input().items()},
                places=places[row],
                train_places=reading.train_places(preset),
                shares_run_with=first if first != row else None,
            )
        )
    return tuple(found)


def _runs(by_row: Mapping[str, Trial], places: Mapping[str, tuple[int, ...]]) -> tuple[Reads, ...]:
    found: dict[str, Reads] = {}
    for row, trial in by_row.items():
        specs = tuple(dict.fromkeys(reduced(trial.preset.tokens.all()).values()))
        found.setdefault(_run_of(trial.preset), Reads(specs, places[row]))
    return tuple(found.values())


def _run_of(preset: Preset) -> str:
    """Return what tells runs apart, but for their seeds: rows that differ in `stage` alone share one."""
    return preset.model_dump_json(exclude={"name", "execution", "seed"})
