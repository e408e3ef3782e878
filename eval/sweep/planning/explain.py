"""A plan of a sweep in words and tables: what `--dry-run` and `--explain` print.

Tables are rich's, lines plain text within a given width; nothing is printed here.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cache.commit import Status
from cache.recipes import label_of
from cache.spec import TokenSpec, differences
from eval.formats import human_size
from eval.progress import human_time
from eval.sweep.planning.costs import Encoding, ReuseCosts, TrainingCost
from eval.sweep.planning.plan import RowPlan, SweepPlan, Wanted
from extract.plan import NEVER, OTHER_SPEC, RETRY
from train.config import Input

WIDTH = 96
"""Columns of lines, unless told otherwise."""

_REASONS = {
    NEVER: "never encoded",
    OTHER_SPEC: "encoded under other specs only",
    RETRY: "failed before, to be tried again",
}
_DIGEST = re.compile(r"[0-9a-f]{64}")


def plan_table(plan: SweepPlan) -> Table:
    """Return the union of the rows' tokens: how many clips are stored, how many must be encoded."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    numbers = ("rows", "clips", "stored", "to encode", "to write")
    for name in ("tokens", *numbers):
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    n_bytes = _bytes_by_spec(plan)
    for wanted in plan.wanted:
        left = "as richer" if wanted.is_served and wanted.n_missing else f"{wanted.n_missing:,}"
        stored = f"{wanted.known.total():,}"
        if wanted.richer.total():
            stored += f" ({wanted.richer.total():,} richer)"
        table.add_row(
            wanted.label,
            str(len(wanted.rows)),
            f"{wanted.n_clips:,}",
            stored,
            left,
            human_size(n_bytes.get(wanted.spec, 0)),
        )
    return table


def _bytes_by_spec(plan: SweepPlan) -> dict[TokenSpec, int]:
    found: dict[TokenSpec, int] = {}
    for part in plan.extractions:
        for spec, label in zip(part.plan.specs, part.plan.labels, strict=True):
            found[spec] = found.get(spec, 0) + part.plan.n_bytes[label]
    return found


def plan_lines(
    plan: SweepPlan,
    costs: ReuseCosts,
    training: Sequence[TrainingCost] = (),
    *,
    flops_per_s: float | None = None,
    width: int = WIDTH,
) -> list[str]:
    """Return what a sweep costs, what reuse saves, and what a reader should know.

    Args:
        plan: From `plan_sweep`.
        costs: From `reuse_costs`.
        training: From `training_costs`; none says nothing of training.
        flops_per_s: Speed that is reckoned with, to say times; None says none.
        width: Columns.
    """
    lines = [*_encoding_lines(costs, flops_per_s), *_training_lines(training, flops_per_s)]
    room = "not known" if plan.free_bytes is None else f"{human_size(plan.free_bytes)} free"
    lines.append(("disk", f"{human_size(plan.n_bytes)} of tokens to write; {room}"))
    if flops_per_s is not None:
        text = f"{flop(flops_per_s)}/s; no decoding, reading, scoring or start of a process"
        lines.append(("reckoned with", text))
    lines += [("remark", text) for text in plan.remarks]
    return [line for name, text in lines for line in _entry(name, text, width)]


def _encoding_lines(costs: ReuseCosts, speed: float | None) -> list[tuple[str, str]]:
    alone, equal, together = costs.alone, costs.equal, costs.together
    found = [("without reuse", f"{_encoding(alone, speed)}: every run encodes what it reads")]
    if costs.ratio is not None:
        saved = f"{costs.ratio:.2f} times less arithmetic"
        found.append(("with reuse", f"{_encoding(together, speed)}: {saved}"))
    if equal.n_encodings > together.n_encodings:
        n_views = equal.n_encodings - together.n_encodings
        found.append(
            ("of which views", f"{n_views:,} encodings less, because richer tokens serve them")
        )
    left = costs.left
    if not left.n_encodings:
        found.append(("left to encode", "nothing: all tokens are stored"))
    else:
        found.append(("left to encode", _encoding(left, speed)))
    return found


def _encoding(found: Encoding, speed: float | None) -> str:
    time = f", {human_time(found.flops / speed)}" if speed is not None else ""
    return (
        f"{found.n_encodings:,} encodings of clips, {flop(found.flops)}{time}, "
        f"{human_size(found.n_bytes)}"
    )


def _training_lines(training: Sequence[TrainingCost], speed: float | None) -> list[tuple[str, str]]:
    if not training:
        return []
    n_runs = sum(cost.n_seeds for cost in training)
    known = [cost for cost in training if cost.unknown is None]
    if not known:
        why = training[0].unknown
        return [("training", f"{n_runs} run{'s' * (n_runs != 1)}; arithmetic not known: {why}")]
    total = sum(cost.n_seeds * cost.flops for cost in known)
    time = f", {human_time(total / speed)}" if speed is not None else ""
    steps = _range([cost.n_steps for cost in known])
    return [
        (
            "training",
            f"{n_runs} run{'s' * (n_runs != 1)} of {steps} steps, {flop(total)}{time}; "
            f"{_range([cost.n_trainable for cost in known])} trained parameters behind prefixes of "
            f"{_range([cost.n_prefix for cost in known])} tokens",
        )
    ]


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def flop(n: float) -> str:
    """Return a number of operations in the unit that fits it: `12.6 TFLOP`."""
    for prefix, size in (("Z", 1e21), ("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9)):
        if n >= size:
            return f"{n / size:.3g} {prefix}FLOP"
    return f"{n / 1e6:.3g} MFLOP"


# ---------------------------------------------------------------------------- row by row


def explain_lines(
    plan: SweepPlan, rows: Iterable[str] | None = None, *, width: int = WIDTH
) -> list[str]:
    """Return for each row which stored tokens it uses, through which view, and why any must be encoded.

    Args:
        plan: From `plan_sweep`.
        rows: Names; None explains all.
        width: Columns.
    """
    chosen = {row.name for row in plan.rows} if rows is None else set(rows)
    lines = []
    for row in plan.rows:
        if row.name not in chosen:
            continue
        shared = f" (the run of {row.shares_run_with})" if row.shares_run_with else ""
        lines.append(f"{row.name}{shared}")
        for name, wanted in row.inputs.items():
            texts = [_source_of(row, wanted), _view_of(row, name, wanted)]
            if wanted.n_missing and row.name == wanted.rows[0]:
                texts.append(f"why: {_why(plan, row, wanted)}")
            lines += _block(name, texts, width)
    return lines


def _source_of(row: RowPlan, wanted: Wanted) -> str:
    """Say where an input's tokens are, or that they will be encoded."""
    spec = wanted.spec.spec_id if wanted.spec.is_resolved else "weights open"
    parts = []
    if own := wanted.known.total() - wanted.richer.total():
        parts.append(f"{own:,} stored")
    for spec_id, n in wanted.richer.items():
        parts.append(f"{n:,} stored under the richer spec {spec_id}")
    statuses = [(s.value, wanted.known[s]) for s in (Status.ABSENT, Status.FAILED)]
    without = ", ".join(f"{n:,} {name}" for name, n in statuses if n)
    if parts and without:
        parts[-1] += f" ({without})"
    if wanted.n_missing:
        parts.append(_to_encode(row, wanted))
    return f"{wanted.label} ({spec}), {wanted.n_clips:,} clips: {', '.join(parts) or 'none'}"


def _to_encode(row: RowPlan, wanted: Wanted) -> str:
    text = f"{wanted.n_missing:,} to encode"
    if row.name != wanted.rows[0]:
        return f"{text}, the same as for {wanted.rows[0]}"
    n = len(wanted.rows)
    return f"{text}, once for {n} rows" if n > 1 else text


def _view_of(row: RowPlan, name: Input, wanted: Wanted) -> str:
    view: Any = getattr(row.preset.views, name)
    return f"view: {view.definition(wanted.source)}"


def _why(plan: SweepPlan, row: RowPlan, wanted: Wanted) -> str:
    """Say why an input's tokens must be encoded: what is stored or planned, and how it differs."""
    reasons = ", ".join(f"{_REASONS.get(r, r)} ({n:,})" for r, n in wanted.misses.items())
    if wanted.is_served:
        other = next(w for w in plan.wanted if w.spec == wanted.encoded)
        text = _differences(wanted.spec, wanted.encoded, "here", "there")
        return (
            f"{reasons}; read from the richer {other.label} that row {other.rows[0]} needs ({text}), so "
            "nothing is encoded for it alone"
        )
    same_stream = [s for s in plan.stored if s.stream == wanted.spec.stream]
    stored = [s for s in same_stream if not s.serves(wanted.spec)]
    if stored:
        nearest = min(stored, key=lambda s: _distance(wanted.spec, s))
        text = _differences(wanted.spec, nearest, "wanted", "stored")
        return f"{reasons}; nearest in the store is {label_of(nearest)} {nearest.spec_id}: {text}"
    above = [w for w in _above(plan, row) if w.spec.stream == wanted.spec.stream]
    if not above:
        return reasons
    near = min(above, key=lambda w: _distance(wanted.spec, w.spec))
    text = _differences(wanted.spec, near.spec, "here", "there")
    return f"{reasons}; nearest of the rows above is {near.label} of {near.rows[0]}: {text}"


def _above(plan: SweepPlan, row: RowPlan) -> list[Wanted]:
    """Return what the rows above one read."""
    names = [other.name for other in plan.rows]
    above = plan.rows[: names.index(row.name)]
    return [wanted for other in above for wanted in other.inputs.values()]


def _fields(wanted: TokenSpec, other: TokenSpec) -> dict[str, tuple[Any, Any]]:
    """Return in what two specs differ; open weights differ from none."""
    found = differences(wanted, other)
    if not (wanted.is_resolved and other.is_resolved):
        found.pop("encoder.weights_sha256", None)
    return found


def _distance(wanted: TokenSpec, other: TokenSpec) -> tuple[bool, int]:
    """Order specs by how near they are: those of the same network first."""
    return _is_other_network(wanted, other), len(_fields(wanted, other))


def _is_other_network(wanted: TokenSpec, other: TokenSpec) -> bool:
    return any(
        path.startswith("encoder.") and path != "encoder.weights_sha256"
        for path in _fields(wanted, other)
    )


def _differences(wanted: TokenSpec, other: TokenSpec, here: str, there: str) -> str:
    """Say in what two specs differ; of another network nothing more."""
    if _is_other_network(wanted, other):
        return "another network"
    return "; ".join(
        f"{path} {_short(mine)} {here}, {_short(theirs)} {there}"
        for path, (mine, theirs) in _fields(wanted, other).items()
    )


def _short(value: Any) -> str:
    return _DIGEST.sub(lambda found: f"{found[0][:8]}…", str(value))


def _entry(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, width, initial_indent=f"{name:<16}", subsequent_indent=" " * 16,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _block(name: str, texts: Sequence[str], width: int) -> list[str]:
    lines = []
    for number, text in enumerate(texts):
        first = f"  {name if not number else '':<7}"
        lines += textwrap.wrap(
            text, width, initial_indent=first, subsequent_indent=" " * 11,
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return lines
