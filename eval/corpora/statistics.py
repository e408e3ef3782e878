"""What a manifest holds, in numbers: counted over Arrow columns, not over records.

`CorpusStatistics` is plain data; tables, plots and pages are made of it elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from cache.columns import corpus_of, read_columns
from cache.labels import LABEL_FIELDS, LabelField
from cache.manifest import Header, read_header
from cache.schema import Model
from train.text.tasks import TASK_TABLE, Task

NO_SPLIT = "no split"
SPLITS = ("train", "val", "test")
"""The customary splits, in the order in which they are shown."""
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
N_BINS = 60
"""Bins of the histogram of durations, of which the last holds all that is longer."""
TOP_UNITS = 5
"""Action units shown for each emotion, as in the predecessor's figure."""

_COLUMNS = (
    "uid", "clip.sha256", "clip.duration_s", "clip.has_video", "clip.has_audio", "split", "benchmarks",
    "parent", "speaker", "language", "subtitles.language", "subtitles.origin", *LABEL_FIELDS,
    "sentiment_score", "valence", "peak.index", "action_units", "descriptions.kind",
    "descriptions.target", "descriptions.model", "descriptions.version",
)  # fmt: skip


class Durations(Model):
    """How long clips are, in seconds."""

    n: int
    """Clips whose container states it."""
    hours: float
    mean_s: float
    quantiles_s: tuple[float, ...]
    """At `QUANTILES`: shortest, 5 %, 25 %, median, 75 %, 95 %, longest."""

    @property
    def median_s(self) -> float:
        """Half of the clips are shorter."""
        return self.quantiles_s[3]


class Histogram(Model):
    """Counts between edges; the last bin holds all that is longer, too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    n_beyond: int
    """Of the last bin: longer than its edge."""


class CorpusCounts(Model):
    """What one corpus, or all together, hold."""

    n_records: int
    splits: dict[str, int]
    """In the order train, val, test, others, `no split`."""
    n_clips: int
    """Different clips, by their bytes."""
    n_parents: int
    """Different dialogues, sessions or source videos."""
    n_speakers: int
    durations: Durations | None
    n_unseen: int
    """Records whose media nobody looked at."""
    n_without_video: int
    """Of those whose media were looked at."""
    n_without_audio: int
    n_without_subtitle: int
    n_without_label: int
    n_with_score: int
    """Records with a score of sentiment."""
    n_with_dimensions: int
    """Records with valence."""
    n_with_peak: int
    n_with_units: int
    """Records with action units."""
    tasks: dict[Task, int]
    """Records that can answer each task of training; tasks that none can are left out."""
    languages: dict[str, int]
    """Spoken; records that do not say are left out."""
    subtitles: dict[str, int]
    """`en, official` -> subtitles."""


class DescriptionCounts(Model):
    """Descriptions of one kind, target and model."""

    kind: str
    target: str | None
    model: str | None
    version: str | None
    n: int


class UnitCounts(Model):
    """How often action units are present at the peak frame."""

    present_from: float
    """Intensity from which a unit counts as present."""
    n_records: int
    """Records with action units."""
    units: dict[str, int]
    """Unit -> records in which it is present; all units that any record names."""
    by_emotion: dict[str, dict[str, int]]
    """Emotion -> the five most frequent units."""
    n_of_emotion: dict[str, int]
    """Emotion -> records with action units."""


class CorpusStatistics(Model):
    """What a manifest holds."""

    name: str
    """Of the manifest's file."""
    together: CorpusCounts
    corpora: dict[str, CorpusCounts]
    labels: dict[LabelField, dict[str, dict[str, dict[str, int]]]] = Field(default_factory=dict)
    """Field -> corpus -> label -> split -> records. Labels of a closed space all occur, in its order;
    those of an open one by frequency."""
    descriptions: tuple[DescriptionCounts, ...] = ()
    benchmarks: dict[str, int] = Field(default_factory=dict)
    """Benchmark -> records that it scores."""
    durations: Histogram | None = None
    """Over records."""
    action_units: UnitCounts | None = None


def measure_corpus(path: Path, present_from: float | None = None) -> CorpusStatistics:
    """Count what a manifest holds.

    Args:
        path: The manifest.
        present_from: Intensity from which an action unit counts as present; None: that of the project's
            table of units.

    Raises:
        ManifestError: Not a manifest.
    """
    from extract.annotate.evidence.action_units import load_units

    header, table = read_header(path), read_columns(path, _COLUMNS)
    columns = {name: _whole(table[name]) for name in _COLUMNS}
    columns["corpus"] = corpus_of(columns["uid"])
    columns["split"] = pc.fill_null(columns["split"], NO_SPLIT)
    data = _Data(columns, _answerable(columns))
    corpora = [str(name) for name in sorted(pc.unique(columns["corpus"]).to_pylist())]
    names = np.asarray(columns["corpus"].dictionary_encode().indices)
    values = columns["corpus"].dictionary_encode().dictionary.to_pylist()
    rows = {name: np.flatnonzero(names == values.index(name)) for name in corpora}
    least = load_units().present_from if present_from is None else present_from
    return CorpusStatistics(
        name=path.name,
        together=_counts(data, np.arange(len(table))),
        corpora={name: _counts(data, rows[name]) for name in corpora},
        labels=_labels(columns, header),
        descriptions=_descriptions(columns),
        benchmarks=_sorted(pc.value_counts(pc.list_flatten(columns["benchmarks"]))),
        durations=_histogram(columns["clip.duration_s"]),
        action_units=_action_units(columns, least),
    )


def total(by_split: Mapping[str, int]) -> int:
    """Return the records of all splits."""
    return sum(by_split.values())


class _Data:
    """Columns, and for each task which rows can answer it."""

    def __init__(self, columns: Mapping[str, Any], tasks: Mapping[Task, NDArray[np.bool_]]) -> None:
        self.columns, self.tasks = columns, tasks
        self.labelled = np.zeros(len(columns["uid"]), bool)
        for field in LABEL_FIELDS:
            self.labelled |= _filled(columns[field])
        self.subtitled = _filled(columns["subtitles.origin"])
        self.with_units = _filled(columns["action_units"])
        self.seen = _filled(columns["clip.sha256"])


def _whole(column: pa.ChunkedArray) -> Any:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _filled(column: Any) -> NDArray[np.bool_]:
    """Return where a column has a value, or a list at least one."""
    if pa.types.is_list(column.type):
        return np.asarray(pc.fill_null(pc.list_value_length(column), 0)) > 0
    return np.asarray(column.is_valid())


def _answerable(columns: Mapping[str, Any]) -> dict[Task, NDArray[np.bool_]]:
    """Return, for each task, which records can answer it, by the rules of the task table."""
    parents = np.asarray(pc.list_parent_indices(columns["descriptions.kind"]))
    kinds = pc.list_flatten(columns["descriptions.kind"])
    targets = pc.list_flatten(columns["descriptions.target"])
    found: dict[Task, NDArray[np.bool_]] = {}
    for task, row in TASK_TABLE.items():
        can = np.ones(len(columns["uid"]), bool)
        if row.label is not None:
            can &= _filled(columns[row.label])
        if row.description is not None:
            fits = pc.equal(kinds, row.description)
            if row.label is not None:
                own = pc.fill_null(pc.equal(targets, row.label), True)  # None explains any label
                fits = pc.and_(fits, own)
            described = np.zeros(len(can), bool)
            described[parents[np.asarray(fits)]] = True
            can &= described
        found[task] = can
    return found


def _counts(data: _Data, rows: NDArray[np.int64]) -> CorpusCounts:
    columns, taken = data.columns, pa.array(rows)

    def of(name: str) -> Any:
        return columns[name].take(taken)

    def n_false(name: str) -> int:
        n: int = pc.sum(pc.equal(of(name), False)).as_py() or 0
        return n

    splits = _counted(of("split"))
    languages = pc.list_flatten(of("subtitles.language"))
    origins = pc.list_flatten(of("subtitles.origin"))
    texts = pc.binary_join_element_wise(pc.fill_null(languages, "?"), origins, ", ")
    tasks = {task: int(can[rows].sum()) for task, can in data.tasks.items()}
    others = sorted(name for name in splits if name not in (*SPLITS, NO_SPLIT))
    order = [name for name in (*SPLITS, *others, NO_SPLIT) if name in splits]
    return CorpusCounts(
        n_records=len(rows),
        splits={name: splits[name] for name in order},
        n_clips=pc.count_distinct(of("clip.sha256")).as_py(),
        n_parents=_n_pairs(of("corpus"), of("parent")),
        n_speakers=_n_pairs(of("corpus"), of("speaker")),
        durations=_durations(of("clip.duration_s")),
        n_unseen=int((~data.seen[rows]).sum()),
        n_without_video=n_false("clip.has_video"),
        n_without_audio=n_false("clip.has_audio"),
        n_without_subtitle=int((~data.subtitled[rows]).sum()),
        n_without_label=int((~data.labelled[rows]).sum()),
        n_with_score=len(rows) - of("sentiment_score").null_count,
        n_with_dimensions=len(rows) - of("valence").null_count,
        n_with_peak=len(rows) - of("peak.index").null_count,
        n_with_units=int(data.with_units[rows].sum()),
        tasks={task: n for task, n in tasks.items() if n},
        languages=_sorted(pc.value_counts(of("language"))),
        subtitles=_sorted(pc.value_counts(texts)),
    )


def _n_pairs(corpora: Any, names: Any) -> int:
    """Count different names; the same name in two corpora is two."""
    n: int = pc.count_distinct(pc.binary_join_element_wise(corpora, names, "\n")).as_py()
    return n


def _durations(column: Any) -> Durations | None:
    values = np.asarray(pc.drop_null(column))
    if not len(values):
        return None
    return Durations(
        n=len(values),
        hours=float(values.sum()) / 3600,
        mean_s=float(values.mean()),
        quantiles_s=tuple(float(x) for x in np.quantile(values, QUANTILES)),
    )


def _histogram(column: Any) -> Histogram | None:
    values = np.asarray(pc.drop_null(column))
    if not len(values):
        return None
    # A few long clips must not press all others into one bin. Bins are round numbers of seconds.
    highest = max(float(np.quantile(values, 0.99)), 1e-3)
    steps = [base * 10.0**power for power in range(-4, 6) for base in (1, 2, 2.5, 5)]
    width = next(step for step in steps if step * N_BINS >= highest)
    n_bins = int(highest // width) + 1
    edges = width * np.arange(n_bins + 1)
    counts, _ = np.histogram(np.minimum(values, edges[-1]), edges)
    return Histogram(
        edges=tuple(float(edge) for edge in edges),
        counts=tuple(int(n) for n in counts),
        n_beyond=int((values > edges[-1]).sum()),
    )


def _labels(
    columns: Mapping[str, Any], header: Header
) -> dict[LabelField, dict[str, dict[str, dict[str, int]]]]:
    found: dict[LabelField, dict[str, dict[str, dict[str, int]]]] = {}
    for field in LABEL_FIELDS:
        column = columns[field]
        if pa.types.is_list(column.type):
            parents = pc.list_parent_indices(column)
            parts = [
                pc.list_flatten(column),
                *(columns[n].take(parents) for n in ("corpus", "split")),
            ]
        else:
            parts = [column, columns["corpus"], columns["split"]]
        grouped = _grouped(("label", "corpus", "split"), parts)
        by_corpus: dict[str, dict[str, dict[str, int]]] = {}
        for label, corpus, split, n in sorted(grouped, key=lambda row: str(row[1])):
            if label is not None:
                by_corpus.setdefault(corpus, {}).setdefault(label, {})[split] = n
        if by_corpus:
            found[field] = {
                corpus: _in_order(labels, corpus, field, header)
                for corpus, labels in by_corpus.items()
            }
    return found


def _in_order(
    labels: Mapping[str, dict[str, int]], corpus: str, field: LabelField, header: Header
) -> dict[str, dict[str, int]]:
    space = header.space(corpus, field)
    if space is None or space.open:
        return {
            label: labels[label] for label in sorted(labels, key=lambda x: (-total(labels[x]), x))
        }
    strange = sorted(label for label in labels if label not in space.known)
    return {label: labels.get(label, {}) for label in (*space.labels, *strange)}


def _descriptions(columns: Mapping[str, Any]) -> tuple[DescriptionCounts, ...]:
    names = ("kind", "target", "model", "version")
    grouped = _grouped(names, [pc.list_flatten(columns[f"descriptions.{name}"]) for name in names])
    counts = [
        DescriptionCounts(kind=kind, target=target, model=model, version=version, n=n)
        for kind, target, model, version, n in grouped
    ]
    return tuple(sorted(counts, key=lambda c: (c.kind, c.target or "", -c.n, c.model or "")))


def _action_units(columns: Mapping[str, Any], present_from: float) -> UnitCounts | None:
    column = columns["action_units"]
    parents, pairs = pc.list_parent_indices(column), pc.list_flatten(column)
    if not len(pairs):
        return None
    units = pc.struct_field(pairs, "unit")
    present = pc.greater_equal(pc.struct_field(pairs, "intensity"), present_from)
    emotions = columns["emotion"].take(parents)
    by_unit = _counted(units.filter(present))
    grouped = _grouped(("emotion", "unit"), [emotions.filter(present), units.filter(present)])
    by_emotion: dict[str, dict[str, int]] = {}
    for emotion, unit, n in grouped:
        if emotion is not None:
            by_emotion.setdefault(emotion, {})[unit] = n
    with_units = pa.array(_filled(column))
    n_of_emotion = _sorted(pc.value_counts(columns["emotion"].filter(with_units)))
    return UnitCounts(
        present_from=present_from,
        n_records=pc.sum(with_units).as_py(),
        units={unit: by_unit.get(unit, 0) for unit in sorted(pc.unique(units).to_pylist())},
        by_emotion={
            emotion: dict(
                sorted(by_emotion.get(emotion, {}).items(), key=lambda x: (-x[1], x[0]))[:TOP_UNITS]
            )
            for emotion in n_of_emotion
        },
        n_of_emotion=n_of_emotion,
    )


def _grouped(names: Sequence[str], columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return each combination of values that occurs, with its count behind it."""
    counted = pa.table(list(columns), names=list(names)).group_by(list(names))
    found = counted.aggregate([([], "count_all")]).select([*names, "count_all"])
    return list(zip(*(column.to_pylist() for column in found.columns), strict=True))


def _counted(column: Any) -> Counter[str]:
    return Counter(_sorted(pc.value_counts(column)))


def _sorted(counts: Any) -> dict[str, int]:
    """Return what `value_counts` gave without nulls, the most frequent first."""
    pairs = zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True)
    return dict(sorted(((k, n) for k, n in pairs if k is not None), key=lambda x: (-x[1], x[0])))
