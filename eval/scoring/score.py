"""Scoring a predictions file: one set under one protocol, with everything a reader must know.

Three protocols, where readings of the benchmark differ. `paper`: published counts and rules, a reply
reduced to its answer tag. `released`: what the scorers released with the paper do. `unibench`: the
sentiment rule of MER-UniBench's own scorer. A result states its own and, where they differ, the others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from cache.errors import EmocacheError, PredictionError, SchemaError, near_miss
from eval.benchmarks import (
    PROTOCOLS,
    WHEEL_METRICS,
    Benchmark,
    Protocol,
    benchmark,
    benchmarks,
    check_protocol,
)
from eval.predictions import Prediction
from eval.scoring import rules
from eval.scoring.items import Collected, Wanted, collect_items, fits
from eval.scoring.result import BenchmarkScore, Counts, Example, Item, Reading, Scored
from eval.scoring.sources import Row, Source, own_rows, read_source
from eval.scoring.tally import Tally
from eval.scoring.texts import plain
from eval.scoring.truths import read_truths
from eval.scoring.wheels import Wheels, wheels_folder


class NothingToScoreError(PredictionError):
    """No item of a set has a truth that counts, or a reading that fits."""


READINGS: tuple[Reading, ...] = get_args(Reading)
_READING_OF: Mapping[Protocol, Reading] = {"paper": "tag", "released": "raw", "unibench": "tag"}
_N_EXAMPLES = 5
"""Of each way in which a reply is hard to read."""
_EXAMPLE_CHARS = 500


def score_file(
    path: Path,
    task: str,
    *,
    protocol: str = "paper",
    reading: str | None = None,
    truths: Path | None = None,
    wheels: Path | Wheels | None = None,
    splits: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> Scored:
    """Score the replies of a file for one set.

    Args:
        path: Predictions, in the released format or ours; of a folder its predictions.jsonl.
        task: Id of the benchmark.
        protocol: paper, released or unibench.
        reading: raw, tag, label or last-word; None: that of the protocol.
        truths: File of true labels; None: those of the predictions file.
        wheels: Folder of the wheel tables, or the tables; None: the folder of EMOCACHE_WHEELS.
        splits: Modes that count instead of the benchmark's own; `all`: every row.
        allow_missing: Count truths without a prediction as wrong, instead of refusing them.

    Raises:
        PredictionError: The file does not fit; line and field are named.
        SchemaError: An unknown benchmark, protocol or reading; wheel tables that are not there.
    """
    row, checked, how = benchmark(task), check_protocol(protocol), _check_reading(reading)
    source = read_source(path)
    return _score(source, row, checked, how, truths, wheels, splits, allow_missing)


def score_predictions(
    predictions: Sequence[Prediction],
    task: str,
    *,
    protocol: str = "paper",
    reading: str | None = None,
    truths: Path | None = None,
    wheels: Path | Wheels | None = None,
    splits: Sequence[str] | None = None,
    allow_missing: bool = False,
) -> Scored:
    """Score predictions that are at hand; arguments and errors as of `score_file`."""
    row, checked, how = benchmark(task), check_protocol(protocol), _check_reading(reading)
    source = Source("predictions", "ours", own_rows(predictions, "predictions"))
    return _score(source, row, checked, how, truths, wheels, splits, allow_missing)


def score_all(
    path: Path,
    *,
    protocol: str = "paper",
    reading: str | None = None,
    wheels: Path | Wheels | None = None,
    splits: Sequence[str] | None = None,
    unscored: dict[str, str] | None = None,
) -> dict[str, Scored]:
    """Score every set that a file of our own format has replies for, in the order of Table 4.

    Args:
        path: Predictions; other arguments as of `score_file`.
        protocol: paper, released or unibench.
        reading: raw, tag, label or last-word; None: that of the protocol.
        wheels: The tables, or their folder.
        splits: Modes that count instead of each benchmark's own.
        unscored: Gets the sets of which no item can be scored -> why; None: such a set is refused.

    Raises:
        NothingToScoreError: Of a set, or of all of them, no item can be scored.
        PredictionError: The file is of the released format, which does not name its set, or no reply is
            for a benchmark.
        SchemaError: As of `score_file`.
    """
    checked, how = check_protocol(protocol), _check_reading(reading)
    source = read_source(path)
    if source.kind == "released":
        raise PredictionError(
            f"{source.name}: rows of the released format do not say which set they are of. Give it with "
            f"--task: {', '.join(benchmarks())}."
        )
    by_name: dict[str, list[Row]] = {}
    for one in source.rows:
        if one.prediction is not None and one.prediction.benchmark is not None:
            by_name.setdefault(one.prediction.benchmark, []).append(one)
    if not by_name:
        for row in benchmarks().values():
            rows = [one for one in source.rows if one.prediction and fits(one.prediction, row)]
            if rows:
                by_name[row.id] = rows
    if not by_name:
        raise PredictionError(f"{source.name}: no reply is for a set of MMEVerse-Bench.")
    for name in sorted(by_name):
        benchmark(name)
    found: dict[str, Scored] = {}
    problem: NothingToScoreError | None = None
    for row in benchmarks().values():
        if row.id in by_name:
            own = replace(source, rows=tuple(by_name[row.id]))
            try:
                found[row.id] = _score(
                    own, row, checked, how, None, wheels, splits, allow_missing=False
                )
            except NothingToScoreError as error:
                if unscored is None:
                    raise
                problem, unscored[row.id] = error, str(error)
    if not found and problem is not None:
        raise problem
    return found


def _score(
    source: Source,
    row: Benchmark,
    protocol: Protocol,
    reading: Reading | None,
    truths: Path | None,
    wheels: Path | Wheels | None,
    splits: Sequence[str] | None,
    allow_missing: bool,
) -> Scored:
    """Score one set under the protocol asked for, and see what the others give."""
    if reading == "last-word" and row.metric in ("map", "wheel-f"):
        raise NothingToScoreError(
            f"{source.name}: replies for {row.id} name several labels, of which the reading last-word keeps "
            "one. Give --reading tag."
        )
    tables: Wheels | None = None
    if row.metric in WHEEL_METRICS:
        tables = wheels if isinstance(wheels, Wheels) else Wheels.load(wheels_folder(wheels))
    true = read_truths(truths, row) if truths is not None else None

    def under(name: Protocol, how: Reading | None) -> Scored:
        wanted = Wanted(
            row, name, how or _READING_OF[name], true, splits, allow_missing, _is_scored(tables)
        )
        return _score_items(source, wanted, tables)

    scored = under(protocol, reading)
    others: dict[str, float] = {}
    notes: list[str] = []
    for name in PROTOCOLS:
        if name == protocol or (row.metric != "waf" and {name, protocol} == {"paper", "unibench"}):
            continue
        try:
            score = under(name, None).result.score
        except EmocacheError as error:
            notes.append(f"protocol {name} has no score: {error}")
        else:
            if abs(score - scored.result.score) > 1e-12:
                others[name] = score
    result = scored.result.model_copy(
        update={"other_protocols": others, "notes": (*scored.result.notes, *notes)}
    )
    return Scored(row, result, scored.items, scored.tally)


def _score_items(source: Source, wanted: Wanted, tables: Wheels | None) -> Scored:
    row, protocol = wanted.row, wanted.protocol
    found = collect_items(source, wanted)
    items = found.items
    tally = _tally(items, row, protocol, tables)
    score = tally.total
    reasons = Counter(found.reasons)
    for item, is_scored in zip(items, tally.scored.tolist(), strict=True):
        if not is_scored:
            reasons[_why_not(item, row)] += 1
    if math.isnan(score):
        told = ", ".join(f"{why} ({n})" for why, n in reasons.most_common())
        raise NothingToScoreError(
            f"{source.name}: nothing to score for {row.id}: none of {len(items)} items has a truth that "
            f"counts ({told}). Check the truths and the task."
        )
    parts = {name: part for name, part in tally.parts(tally.sums).items() if not math.isnan(part)}
    n_skipped = sum(reasons.values())
    n_scored = int(tally.scored.sum())
    runs = {item.prediction.run for item in items if item.prediction is not None}
    result = BenchmarkScore(
        task=row.id,
        protocol=protocol,
        metric=row.metric,
        reading=wanted.reading,
        score=score,
        parts=parts,
        part_counts=_part_counts(tally, parts, row),
        extras=_extras(items, row, tally),
        counts=Counts(
            offered=n_scored + n_skipped,
            scored=n_scored,
            skipped=n_skipped,
            reasons=dict(reasons),
            published=row.n,
        ),
        replies=dict(Counter(item.how for item in items)),
        examples=_examples(items),
        notes=tuple(_notes(found, wanted, tables, parts, runs)),
        wheels=tables.tables if tables is not None else None,
        run=next(iter(runs)) if len(runs) == 1 else None,
        file=source.file,
    )
    return Scored(row, result, tuple(items), tally)


def _tally(
    items: Sequence[Item], row: Benchmark, protocol: Protocol, tables: Wheels | None
) -> Tally:
    predicted = [item.predicted for item in items]
    if row.metric == "map":
        # A file of our own tells an unknown truth from an empty one: it is then not scored.
        truths = [None if _is_unknown(item) else item.truth for item in items]
        return rules.mean_average_precision(truths, predicted)
    if row.metric == "wheel-f":
        assert tables is not None
        return rules.wheel_f([item.truth for item in items], predicted, tables)
    single, said = _singles(items)
    if row.metric == "hit-rate":
        assert tables is not None
        return rules.hit_rate(single, predicted, tables)
    if row.metric == "accuracy":
        return rules.accuracy(single, said)
    return rules.sign_f1(single, said) if protocol == "unibench" else rules.waf(single, said)


def _extras(items: Sequence[Item], row: Benchmark, tally: Tally) -> dict[str, float]:
    """Return what is printed beside the metric."""
    single, said = _singles(items)
    more: dict[str, Tally] = {}
    if row.metric == "wheel-f":
        sums = dict(zip(tally.columns, tally.sums.tolist(), strict=True))
        wheels = [
            name.removeprefix("scored ")
            for name, n in sums.items()
            if name.startswith("scored ") and n
        ]
        return {
            kind: sum(sums[f"{kind} {name}"] / sums[f"scored {name}"] for name in wheels)
            / len(wheels)
            for kind in ("precision", "recall")
        }
    if row.metric == "accuracy":
        more = {
            "war": tally,  # recall weighted by support is accuracy under another name
            "uar": rules.uar(single, said),
            "weighted_f1": rules.weighted_f1(single, said),
            "macro_f1": rules.macro_f1(single, said),
        }
    elif row.metric == "waf":
        kept = [truth if truth != "neutral" else None for truth in single]
        more = {"accuracy": rules.accuracy(kept, said), "uar": rules.uar(kept, said)}
    elif row.metric == "map":
        truths = [None if _is_unknown(item) else item.truth for item in items]
        predicted = [item.predicted for item in items]
        more = {
            "micro_f1": rules.micro_f1(truths, predicted),
            "sample_f1": rules.sample_f1(truths, predicted),
            "jaccard": rules.jaccard(truths, predicted),
            # What no labels at all, or all of them, would score: the mean prevalence.
            "floor": rules.mean_average_precision(truths, [()] * len(truths)),
        }
    return {name: one.total for name, one in more.items()}


def _singles(items: Sequence[Item]) -> tuple[list[str | None], list[str | None]]:
    return (
        [item.truth[0] if item.truth else None for item in items],
        [item.predicted[0] if item.predicted else None for item in items],
    )


def _is_unknown(item: Item) -> bool:
    one = item.prediction
    return not item.truth and one is not None and one.truth is None and not one.truths


def _is_scored(tables: Wheels | None) -> Callable[[str], bool]:
    return lambda word: tables is None or any(tables.everywhere(word))


def _why_not(item: Item, row: Benchmark) -> str:
    if not item.truth:
        return "no truth is known"
    if row.metric == "hit-rate":
        return f"truth on no wheel: {item.truth[0]}"
    return "no true word is on a wheel" if row.metric == "wheel-f" else f"{item.truth[0]} truth"


def _part_counts(tally: Tally, parts: Mapping[str, float], row: Benchmark) -> dict[str, int]:
    """Return the scored items of each wheel, or the true ones of each class."""
    kind = "scored" if row.metric in WHEEL_METRICS else "true"
    sums = dict(zip(tally.columns, tally.sums.tolist(), strict=True))
    return {name: round(sums[f"{kind} {name}"]) for name in parts}


def _examples(items: Sequence[Item]) -> tuple[Example, ...]:
    """Choose replies that were hard to read: different ones, in the order of the file."""
    seen: dict[str, set[str]] = {}
    found = []
    for item in items:
        if item.how in ("off_list", "empty", "alias", "other"):
            replies = seen.setdefault(item.how, set())
            if item.reply not in replies and len(replies) < _N_EXAMPLES:
                replies.add(item.reply)
                reply = item.reply
                if len(reply) > _EXAMPLE_CHARS:
                    reply = reply[: _EXAMPLE_CHARS - 1] + "…"
                truth = ", ".join(item.truth)
                found.append(Example(id=item.id, truth=truth, reply=reply, how=item.how))
    return tuple(found)


def _notes(
    found: Collected,
    wanted: Wanted,
    tables: Wheels | None,
    parts: Mapping[str, float],
    runs: set[str],
) -> list[str]:
    row, items, notes = wanted.row, found.items, list(found.notes)
    if len(items) != row.n:
        notes.append(f"{len(items):,} items are of this set, Table 2 counts {row.n:,}")
    if row.note:
        notes.append(row.note)
    if tables is not None:
        notes += tables.remarks()
        for name in tables.names:
            if name not in parts:
                notes.append(f"{name} scores no item and is left out of the mean")
    if row.metric == "map":
        notes.append("mAP of 0/1 indicators: the replies hold no confidences")
    if wanted.protocol == "unibench" and row.metric != "waf":
        notes.append("unibench has no rule of its own for this set: scored as by paper")
    if row.metric in ("accuracy", "waf"):
        notes += _about_truths(items, wanted)
    if len(runs) > 1:
        notes.append(f"replies of {len(runs)} runs: {', '.join(sorted(runs))}")
    return notes


def _about_truths(items: Sequence[Item], wanted: Wanted) -> list[str]:
    held = Counter(item.truth[0] for item in items if item.truth)
    never = {truth: n for truth, n in held.items() if truth != plain(truth)}
    others = [t for t in held if t not in wanted.row.options and t not in never and t != "neutral"]
    notes = []
    if never:
        notes.append(
            f"{sum(never.values())} truths are not in trimmed lower case, so no reply can match them under "
            f"this protocol: {', '.join(sorted(never)[:5])}"
        )
    if others:
        told = ", ".join(f"{truth} ({held[truth]})" for truth in sorted(others)[:10])
        notes.append(f"truths that are not offered to the model: {told}")
    return notes


def _check_reading(name: str | None) -> Reading | None:
    if name is None:
        return None
    for known in READINGS:
        if name == known:
            return known
    raise SchemaError(
        f"unknown reading '{name}'.{near_miss(name, READINGS)} Allowed: {', '.join(READINGS)}."
    )
