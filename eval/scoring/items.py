"""Which rows of a file count for a set, what is true of each, and what becomes of all the others.

Nothing is left out without a word: every row that was handed in, and every truth without a row, ends
as an item or under a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from cache.errors import PredictionError, near_miss
from eval.benchmarks import WHEEL_METRICS, Benchmark, Protocol
from eval.predictions import Prediction
from eval.scoring.result import Item, Reading
from eval.scoring.sources import CLEANED, ID, REPLY, TRUTH, Row, Source
from eval.scoring.texts import MISSING, plain, read_reply
from eval.scoring.truths import Truth, Truths, true_labels
from train.text.tasks import TASK_TABLE

EVERY_SPLIT = "all"
"""Instead of the names of splits: no row is left out for its split."""
_SHOWN = 5

Key = tuple[str | None, str]
"""Mode and id."""


@dataclass
class Collected:
    """The items of a set."""

    items: list[Item] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    """Why rows are no items -> how many."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wanted:
    """What is to be scored, and how."""

    row: Benchmark
    protocol: Protocol
    reading: Reading
    truths: Truths | None
    splits: Sequence[str] | None
    """Modes that count instead of the benchmark's own; EVERY_SPLIT alone: all."""
    allow_missing: bool
    is_scored: Callable[[str], bool]
    """Whether a truth is scored at all, so that a reply is needed."""


def collect_items(source: Source, wanted: Wanted) -> Collected:
    """Return the items of a set.

    Raises:
        PredictionError: A row has no reply or no truth, an id is repeated (unless the protocol knows
            what to do) or has no prediction, or nothing is left.
    """
    found = Collected()
    rows = _of_set(source, wanted.row, found) if source.kind == "ours" else list(source.rows)
    rows = _of_modes(source, rows, wanted, found)
    ids = _ids(rows, wanted, found)
    replies = _replies(rows, wanted.row, found)
    kept = _once(rows, ids, wanted, found)
    truths = _truths(source, [rows[at] for at in kept], [ids[at] for at in kept], wanted, found)
    remarks: Counter[str] = Counter()
    for at, truth in zip(kept, truths.found, strict=True):
        if truth is None:
            continue
        remarks.update([truth.remark] if truth.remark else [])
        read = read_reply(replies[at], wanted.row.id, wanted.reading)
        row = rows[at]
        found.items.append(
            Item(ids[at], row.mode, truth.labels, replies[at], *read, prediction=row.prediction)
        )
    _add_missing(truths.missing, wanted, found, remarks)
    _tell_remarks(remarks, wanted.row, found)
    if not found.items:
        raise PredictionError(
            f"{source.name}: no item of {wanted.row.id} is left to score; left out: "
            f"{_counted(found.reasons)}."
        )
    return found


def _of_set(source: Source, row: Benchmark, found: Collected) -> list[Row]:
    """Return our own rows that are for a benchmark."""
    pairs = [(one, one.prediction) for one in source.rows if one.prediction is not None]
    named = {prediction.benchmark for _, prediction in pairs if prediction.benchmark}
    if named:
        fitting = [(one, p) for one, p in pairs if p.benchmark == row.id]
    else:
        fitting = [(one, p) for one, p in pairs if fits(p, row)]
    if not fitting:
        kinds = sorted({f"{p.uid.partition('/')[0]} ({p.task})" for _, p in pairs})
        held = f"replies for {', '.join(sorted(named))}" if named else f"corpora {', '.join(kinds)}"
        raise PredictionError(
            f"{source.name}: no reply for {row.id} (corpus {row.corpus}, task {row.task}); the file holds "
            f"{held}. Give another --task or file."
        )
    masks = {p.masked for _, p in fitting}
    if () in masks:
        whole = [one for one, p in fitting if not p.masked]
        if len(whole) < len(fitting):
            found.notes.append(
                f"{len(fitting) - len(whole)} replies with masked streams are left out"
            )
        return whole
    if len(masks) > 1:
        told = "; ".join(", ".join(mask) for mask in sorted(masks))
        raise PredictionError(
            f"{source.name}: all replies for {row.id} have masked streams, of several kinds ({told}). Give a "
            "file with one kind."
        )
    found.notes.append(f"all replies are without {', '.join(next(iter(masks)))}")
    return [one for one, _ in fitting]


def fits(prediction: Prediction, row: Benchmark) -> bool:
    """Return whether a reply that names no benchmark may count for one, by corpus and task."""
    task = next((kind for name, kind in TASK_TABLE.items() if name == prediction.task), None)
    return (
        prediction.uid.partition("/")[0] == row.corpus
        and task is not None
        and task.label == row.field
    )


def _modes_wanted(kind: str, wanted: Wanted) -> tuple[str, ...]:
    """Return the modes that count; empty: all."""
    if wanted.splits:
        return () if list(wanted.splits) == [EVERY_SPLIT] else tuple(wanted.splits)
    if kind == "released":
        return wanted.row.modes_of(wanted.protocol)
    # Our rows say which benchmark they are for; the released script scores fewer of some.
    modes = wanted.row.modes.released
    return modes if wanted.protocol == "released" and modes is not None else ()


def _of_modes(source: Source, rows: Sequence[Row], wanted: Wanted, found: Collected) -> list[Row]:
    modes = _modes_wanted(source.kind, wanted)
    if not modes:
        return list(rows)
    without = [one for one in rows if one.mode is None]
    if len(without) == len(rows):
        if wanted.splits:
            raise PredictionError(
                f"{source.name}: --split {', '.join(modes)}: the rows have no field 'mode'. Give no --split."
            )
        found.notes.append("the rows have no mode: all count")
        return list(rows)
    if without:
        raise PredictionError(
            f"{without[0].where}: no 'mode', which other rows have; {wanted.row.id} scores rows with mode "
            f"{' or '.join(modes)}. Complete the row, or give --split {EVERY_SPLIT}."
        )
    kept = [one for one in rows if one.mode in modes]
    held = Counter(str(one.mode) for one in rows)
    if not kept:
        raise PredictionError(
            f"{source.name}: no row has a mode that {wanted.row.id} scores by protocol {wanted.protocol} "
            f"({', '.join(modes)}); found {_counted(held)}.{near_miss(modes[0], held)} Give another file, "
            "or the modes to score with --split."
        )
    found.reasons.update({f"mode {mode}": n for mode, n in held.items() if mode not in modes})
    return kept


def _ids(rows: Sequence[Row], wanted: Wanted, found: Collected) -> list[str]:
    is_needed = wanted.truths is not None or wanted.row.metric in WHEEL_METRICS
    if is_needed or any(ID in one.fields for one in rows):
        return [one.id() for one in rows]
    # The scorers of these sets read no ids.
    found.notes.append("the rows have no ids: lines stand for them, so repeated clips go unseen")
    return [f"line {one.number}" for one in rows]


def _replies(rows: Sequence[Row], row: Benchmark, found: Collected) -> list[str]:
    if row.metric not in ("accuracy", "waf"):
        return [one.text((REPLY,)) for one in rows]
    cleaned = sum(CLEANED in one.fields for one in rows)
    if cleaned:
        found.notes.append(
            f"{CLEANED} is compared instead of {REPLY} in {cleaned} rows that have it"
        )
    return [one.text((CLEANED, REPLY)) for one in rows]


def _once(rows: Sequence[Row], ids: Sequence[str], wanted: Wanted, found: Collected) -> list[int]:
    """Return the places of the rows that count, where ids repeat."""
    places: dict[Key, int] = {}
    repeated: list[str] = []
    for at, (row, uid) in enumerate(zip(rows, ids, strict=True)):
        key = row.mode, uid
        first = places.setdefault(key, at)
        if first == at:
            continue
        if wanted.protocol != "released":
            raise PredictionError(
                f"{row.where}: id {uid!r} is already in {rows[first].where}; keep one of the two rows."
            )
        repeated.append(uid)
        places[key] = at
    if not repeated:
        return list(range(len(rows)))
    if wanted.row.metric in WHEEL_METRICS:
        found.notes.append(f"repeated ids, the last row counts: {_some(repeated)}")
        found.reasons["a later row has the same id"] += len(repeated)
        return sorted(places.values())
    found.notes.append(f"repeated ids, every row counts: {_some(repeated)}")
    return list(range(len(rows)))


@dataclass(frozen=True)
class _Told:
    found: list[Truth | None]
    """Of each row; None: the truths file does not have it."""
    missing: dict[Key, Truth]
    """Truths without a row."""


def _truths(
    source: Source, rows: Sequence[Row], ids: Sequence[str], wanted: Wanted, found: Collected
) -> _Told:
    if wanted.truths is not None:
        return _from_file(wanted.truths, source, rows, ids, wanted, found)
    if source.kind == "ours":
        return _Told([_own_truth(one, wanted) for one in rows], {})
    without = [one for one in rows if one.fields.get(TRUTH) is None]
    if without:
        n = f"{len(without)} of {len(rows)} rows"
        raise PredictionError(
            f"{without[0].where}: no truth: field '{TRUTH}' is missing or null (in {n}). Add it, or give "
            "the true labels with --truths FILE (csv, jsonl or npz)."
        )
    return _Told(
        [true_labels(one.fields[TRUTH], wanted.row, wanted.protocol, one.where) for one in rows], {}
    )


def _own_truth(one: Row, wanted: Wanted) -> Truth:
    prediction = one.prediction
    assert prediction is not None
    if prediction.truths:
        value: object = list(prediction.truths)
        if wanted.row.metric not in ("wheel-f", "map") and len(prediction.truths) == 1:
            value = prediction.truths[0]
    elif prediction.truth is not None:
        value = prediction.truth
    else:
        return Truth(())
    return true_labels(value, wanted.row, wanted.protocol, one.where)


def _from_file(
    truths: Truths,
    source: Source,
    rows: Sequence[Row],
    ids: Sequence[str],
    wanted: Wanted,
    found: Collected,
) -> _Told:
    """Match rows with the truths of a file by mode and id, or by id where one side has no modes."""
    modes = _modes_wanted("released", wanted)
    known = truths.rows
    if modes and truths.has_modes:
        known = {key: one for key, one in known.items() if key[0] in modes}
        if not known:
            held = Counter(str(mode) for mode, _ in truths.rows)
            raise PredictionError(
                f"{truths.name}: no truth has a mode that is scored ({', '.join(modes)}); found "
                f"{_counted(held)}. Leave out the column of modes, or give --split."
            )
    by_id: dict[str, list[Key]] = {}
    for key in known:
        by_id.setdefault(key[1], []).append(key)
    told: list[Truth | None] = []
    extra: list[str] = []
    used: dict[Key, Row] = {}
    n_differ = 0
    for one, uid in zip(rows, ids, strict=True):
        matched = _key(one, uid, known, by_id, truths)
        if matched is None:
            extra.append(uid)
            told.append(None)
            continue
        first = used.setdefault(matched, one)
        if first is not one and first.mode != one.mode:
            raise PredictionError(
                f"{one.where}: id {uid!r} also stands in {first.where} with another mode, and {truths.name} "
                "does not tell them apart. Give it a column 'mode'."
            )
        value, own = truths.value(known[matched]), one.fields.get(TRUTH)
        n_differ += isinstance(own, str) and isinstance(value, str) and plain(own) != plain(value)
        told.append(true_labels(value, wanted.row, wanted.protocol, known[matched].where))
    if extra:
        found.reasons["id not in the truths file"] += len(extra)
        found.notes.append(f"not in {truths.name}, hence not scored: {_some(extra)}")
    if n_differ:
        found.notes.append(
            f"{n_differ} rows of {source.name} state another truth than {truths.name}, which counts"
        )
    missing = {
        key: true_labels(truths.value(one), wanted.row, wanted.protocol, one.where)
        for key, one in known.items()
        if key not in used
    }
    return _Told(told, missing)


def _key(
    one: Row, uid: str, known: Iterable[Key], by_id: dict[str, list[Key]], truths: Truths
) -> Key | None:
    """Return the truth of a row; of our own rows, `<corpus>/<source id>`, either name may be known."""
    names = (uid, uid.partition("/")[2]) if one.prediction is not None else (uid,)
    for name in names:
        if truths.has_modes and (one.mode, name) in known:
            return one.mode, name
        keys = by_id.get(name, [])
        # Modes of a benchmark and splits of our records are different words.
        if truths.has_modes and one.mode is not None and one.prediction is None:
            continue
        if len(keys) > 1:
            raise PredictionError(
                f"{truths.name}: id {name!r} has several modes ({', '.join(str(k[0]) for k in keys)}), and "
                f"{one.where} has none of them. Give one mode with --split."
            )
        if keys:
            return keys[0]
    return None


def _add_missing(
    missing: dict[Key, Truth], wanted: Wanted, found: Collected, remarks: Counter[str]
) -> None:
    """Refuse truths without a reply, or take them as wrong; what is never scored needs no reply."""
    is_hit_rate = wanted.row.metric == "hit-rate"
    needed = [
        key
        for key, truth in missing.items()
        if not (is_hit_rate and not any(map(wanted.is_scored, truth.labels)))
    ]
    if needed and not wanted.allow_missing:
        raise PredictionError(
            f"{wanted.row.id}: no prediction for {len(needed)} of the true ids: "
            f"{_some([uid for _, uid in needed])}. Predict them, or count them as wrong with "
            "--allow-missing."
        )
    if needed:
        found.notes.append(f"no prediction, counted as wrong: {_some([uid for _, uid in needed])}")
    if len(missing) > len(needed):
        found.notes.append(
            f"{len(missing) - len(needed)} truths that no wheel knows have no prediction; they are not "
            "scored anyway"
        )
    for (mode, uid), truth in missing.items():
        remarks.update([truth.remark] if truth.remark else [])
        found.items.append(Item(uid, mode, truth.labels, "", (), MISSING))


def _tell_remarks(remarks: Counter[str], row: Benchmark, found: Collected) -> None:
    if n := remarks["trimmed"]:
        found.notes.append(f"{n} truths were trimmed or put into lower case")
    if n := remarks["sign"]:
        found.notes.append(f"{n} truths are numbers, taken by their sign")
    if n := remarks["merged"]:
        told = ", ".join(f"{a} as {b}" for a, b in row.merged.items())
        found.notes.append(f"{n} truths count under another name ({told})")


def _some(ids: Sequence[str]) -> str:
    shown = ", ".join(ids[:_SHOWN])
    return f"{len(ids)} ({shown}{', ...' if len(ids) > _SHOWN else ''})"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} ({n})" for name, n in counts.most_common()) or "nothing"
