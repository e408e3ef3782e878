"""Tables for the terminal: what a store holds, what an extraction did, what is known of a clip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cache.commit import Status, read_commit
from cache.layout import CLIPS_PER_SHARD, arrays
from cache.lifecycle import Garbage
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.formats import human_size
from eval.progress import human_time
from extract.failures import TRANSIENT, AnyKind
from extract.plan import NEVER, OTHER_SPEC, RETRY, Plan

if TYPE_CHECKING:
    from cache.inspection import Finding
    from cache.statistics import TokenStatistics
    from extract.calibrate import Calibration
    from extract.recheck import Recheck
    from extract.summary import FailedClip, WorkerSummary

MEANINGS: dict[AnyKind, str] = {
    "missing": "there is no such file",
    "unreadable": "the file is there, but reading it fails",
    "changed": "the file holds other bytes than were indexed",
    "undecodable": "the decoder refuses the file or one of its streams",
    "crash": "the decoder process died",
    "hang": "decoding took longer than --clip-deadline",
    "memory": "decoding took more memory than --clip-memory",
    "faces": "no table or detector says where the face is",
    "numeric": "the encoder gave NaN or infinity",
    "unexpected": "an error that nobody foresaw",
}
"""Kind of a failure -> what it means, in a few words."""

_STATUSES = (Status.OK, Status.ABSENT, Status.FAILED)
_SHORT_DTYPE = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "int8": "int8"}


def _table(*columns: str, numbers: Collection[str] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def status_table(counts: Mapping[str, Counter[Status]]) -> Table:
    """Return clips by status, for each spec by its label."""
    numbers = [status.value for status in _STATUSES]
    table = _table("encoder", *numbers, numbers=numbers)
    for label, found in counts.items():
        table.add_row(label, *(f"{found[status]:,}" for status in _STATUSES))
    return table


def store_table(store: TokenStore) -> Table:
    """Return the specs of a store, with their clips and sizes."""
    numbers = ("ok", "absent", "failed", "size")
    table = _table("stream", "spec", "per clip", *numbers, numbers=numbers)
    for spec in sorted(store.specs.values(), key=lambda s: (s.stream, s.spec_id)):
        index = store.index(spec)
        counts = index.counts()
        table.add_row(
            spec.stream,
            spec.spec_id,
            shape_of(spec),
            *(f"{counts[status]:,}" for status in _STATUSES),
            human_size(index.n_bytes),
        )
    return table


def shape_of(spec: TokenSpec) -> str:
    """Return the stored shape of a clip in words, for example `16x4x1408 f16`."""
    upper = "≤" if spec.stream == "audio" else ""
    return f"{upper}{'x'.join(map(str, spec.max_shape))} {_SHORT_DTYPE[spec.dtype]}"


def clip_table(store: TokenStore, keys: Collection[str]) -> tuple[Table, list[str]]:
    """Return one clip's tokens and status under every spec, and a line on how each was made.

    The table is empty if no spec knows the clip.
    """
    table = _table("stream", "status", "tokens", "mean", "std", "frames", numbers=("mean", "std"))
    table.columns[2].no_wrap = False  # the reason of a failure may be long
    made = []
    for spec in sorted(store.specs.values(), key=lambda s: (s.stream, s.spec_id)):
        index = store.index(spec)
        for key in sorted(keys):
            entry = index.get(key)
            if entry is None:
                continue
            mean = std = frames = ""
            tokens = entry.reason or "-"
            if entry.status is Status.OK:
                values = store.read(spec, key).tokens.astype(np.float32)
                tokens = "x".join(map(str, values.shape)) + (" (cut)" if entry.truncated else "")
                mean, std = f"{values.mean():.3f}", f"{values.std():.3f}"
                indices, times = store.frame_times(spec, entry.row)
                if len(indices) == 1:
                    frames = f"{indices[0]} at {times[0]:.2f} s"
                elif indices:
                    frames = f"{indices[0]}-{indices[-1]}, {times[0]:.2f}-{times[-1]:.2f} s"
            table.add_row(spec.stream, entry.status.value, tokens, mean, std, frames)
            commit = read_commit(store.storage, spec.spec_id, index.unit_of(entry))
            versions = ", ".join(f"{k} {v}" for k, v in commit.provenance.items())
            remark = f", damage passed over: {entry.remark}" if entry.remark else ""
            made.append(f"{spec.stream}: spec {spec.spec_id}, {commit.created}, {versions}{remark}")
    return table, made


def plan_table(plan: Plan) -> Table:
    """Return hits by status, misses by reason and what will be written, for each spec by its label."""
    reasons = [
        r for r in (NEVER, OTHER_SPEC, RETRY) if any(counts[r] for counts in plan.misses.values())
    ]
    statuses = [s for s in _STATUSES if any(counts[s] for counts in plan.known.values())]
    hits = [f"{status.value} in the store" for status in statuses] or ["in the store"]
    richer = (
        ["from a richer spec"] if any(served.total() for served in plan.served.values()) else []
    )
    names = ("clips", *hits, *richer, *reasons, "to write", "objects", "units")
    n_objects, n_units = objects_to_write(plan), units_to_do(plan)
    rows = []
    for label, known in plan.known.items():
        missing = plan.misses[label]
        rows.append(
            (
                label,
                f"{known.total() + missing.total():,}",
                *([f"{known[status]:,}" for status in statuses] or ["0"]),
                *([f"{plan.served[label].total():,}"] if richer else []),
                *(f"{missing[reason]:,}" for reason in reasons),
                f"≈ {human_size(plan.n_bytes[label])}" if plan.n_bytes[label] else "-",
                f"{n_objects[label]:,}",
                f"{n_units[label]:,}",
            )
        )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, name in enumerate(("encoder", *names)):
        # Headings break into lines on a narrow terminal; what stands below them does not.
        widest = max((len(row[place]) for row in rows), default=1)
        table.add_column(
            name,
            justify="right" if place else "left",
            min_width=widest,
            no_wrap=widest >= len(name),
        )
    for row in rows:
        table.add_row(*row)
    if len(rows) > 1:
        size = human_size(sum(plan.n_bytes.values()))
        gap = [""] * (len(names) - 3)
        total = (f"≈ {size}", f"{sum(n_objects.values()):,}", f"{len(plan.units):,}")
        table.add_row("together", *gap, *total, style="bold")
    return table


def units_to_do(plan: Plan) -> dict[str, int]:
    """Return how many units a spec's clips are in, by its label."""
    label_of = dict(zip(plan.specs, plan.labels, strict=True))
    found = dict.fromkeys(plan.labels, 0)
    for unit in plan.units:
        for spec in unit.specs:
            found[label_of[spec]] += 1
    return found


def objects_to_write(plan: Plan) -> dict[str, int]:
    """Return how many files or objects a plan adds, by label: shards, small arrays, commit records.

    The claim of each shard is one of them.
    """
    label_of = dict(zip(plan.specs, plan.labels, strict=True))
    per_shard = {spec: len(arrays(spec)) + 2 for spec in plan.specs}
    found = dict.fromkeys(plan.labels, 0)
    for unit in plan.units:
        n_shards = -(-len(unit.records) // CLIPS_PER_SHARD)
        for spec in unit.specs:
            found[label_of[spec]] += n_shards * per_shard[spec]
    return found


def calibration_lines(found: Calibration, plan: Plan, n_workers: int, n_decoders: int) -> list[str]:
    """Return what an extraction is estimated to take, in words."""
    parts = [f"decoding {1000 * found.decode_cpu_s:.0f} ms of one core"]
    parts += [f"{label} {1000 * seconds:.0f} ms" for label, seconds in found.encode_s.items()]
    lines = [f"measured on {found.n_clips} clips, {found.device}, per clip: {', '.join(parts)}"]
    one = 3600 * found.hours(plan, 1, n_decoders)
    decoders = f"{n_decoders} decoder{'s' * (n_decoders > 1)}"
    text = f"estimated: {human_time(one)} for one worker with {decoders}"
    if n_workers > 1:
        text += f", {human_time(3600 * found.hours(plan, n_workers, n_decoders))} for {n_workers}"
    lines.append(f"{text}, without the start of the encoders and waiting in a queue")
    if found.decode_hours(plan) / n_decoders > found.encode_hours(plan):
        lines.append("decoding takes longer than encoding: more --decoders would help")
    return lines


def unit_note(
    plan: Plan, calibration: Calibration | None, walltime_s: float | None = None
) -> list[str]:
    """Return what there is to say of the size of a plan's units, in words."""
    if not plan.units:
        return [f"nothing to do: all {plan.n_clips:,} clips are there"]
    n_units = len(plan.units)
    lines = [
        f"{plan.n_missing:,} of {plan.n_clips:,} clips are to be encoded, in {n_units:,} "
        f"unit{'s' * (n_units > 1)} of up to {plan.unit_clips} clips (--unit-clips)"
    ]
    if calibration is not None:
        unit_s = calibration.unit_s(plan)
        lines.append(
            f"a unit takes a worker about {human_time(unit_s)}; of one that is killed, what it has not "
            "committed is encoded again"
        )
        if walltime_s is not None and unit_s > walltime_s / 2:
            lines.append(
                f"that is much of a walltime of {human_time(walltime_s)}: give a longer one, or smaller "
                "units"
            )
    return lines


def worker_table(workers: Sequence[WorkerSummary], now_s: float) -> Table:
    """Return how each worker of a job is.

    Args:
        workers: In the order to be shown.
        now_s: Unix time.
    """
    numbers = ("unit", "units", "clips", "clips/s")
    table = _table("worker", "device", *numbers, "state", numbers=numbers)
    table.columns[-1].no_wrap = False
    for worker in workers:
        if worker.outcome == "ended":
            state, style = f"ended: {worker.end_reason or 'no work was left'}", "dim"
        elif worker.outcome == "vanished":
            silent = human_time(max(0.0, now_s - worker.seen_s))
            state, style = f"vanished, silent for {silent}", "yellow"
        else:
            state, style = f"at work for {human_time(worker.lifetime_s)}", ""
        table.add_row(
            worker.worker_id,
            worker.device,
            "-" if worker.unit is None else f"{worker.unit}",
            f"{worker.n_units:,}",
            f"{worker.n_clips:,}",
            f"{worker.clips_per_s:.1f}",
            state,
            style=style,
        )
    return table


def failure_table(found: Sequence[FailedClip]) -> Table:
    """Return failed clips by kind, and what each kind means."""
    table = _table("class", "clips", "meaning", "may pass by itself", numbers=("clips",))
    table.columns[2].no_wrap = False
    for kind, n in Counter(clip.kind for clip in found).most_common():
        table.add_row(kind, f"{n:,}", MEANINGS[kind], "yes" if kind in TRANSIENT else "no")
    return table


def failure_lines(
    found: Sequence[FailedClip], *, limit: int | None = None, verbose: bool = False
) -> list[str]:
    """Return failed clips one by one, with what is known of each.

    Args:
        found: In the order to be shown.
        limit: Most clips of each kind; the rest is counted.
        verbose: Add what their decoder said last.
    """
    lines = []
    shown: Counter[str] = Counter()
    for clip in found:
        shown[clip.kind] += 1
        if limit is not None and shown[clip.kind] > limit:
            continue
        seen = clip.evidence
        facts = []
        if seen is not None:
            facts.append(f"{seen.attempts} attempt{'s' * (seen.attempts != 1)}")
            if seen.exit_signal:
                facts.append(seen.exit_signal)
        more = f" ({', '.join(facts)})" if facts else ""
        lines.append(f"{clip.uid or clip.key[:16]}, {', '.join(clip.specs)}: {clip.reason}{more}")
        if verbose and seen is not None:
            lines.append(f"    on {seen.host} at {seen.time}, {seen.media}")
            lines += [f"    | {line}" for line in seen.stderr_tail.splitlines()]
    for kind, n in shown.items():
        if limit is not None and n > limit:
            lines.append(f"and {n - limit:,} more of class {kind}: --class {kind}, or --json")
    return lines


def garbage_table(found: Garbage) -> Table:
    """Return what garbage collection found, by reason."""
    table = _table("why", "files", numbers=("files",))
    for why, files in found.files.items():
        table.add_row(why, f"{len(files):,}")
    table.add_row("together", f"{found.n_files:,}, {human_size(found.n_bytes)}", style="bold")
    return table


def finding_table(findings: Sequence[Finding], title: str | None = None) -> Table:
    """Return what an audit found, and the cure of each."""
    table = _table("severity", "what", "cure")
    table.title = title
    for column in table.columns[1:]:
        column.no_wrap = False
    for finding in findings:
        table.add_row(finding.severity, finding.what, finding.cure)
    return table


def recheck_table(results: Sequence[Recheck]) -> Table:
    """Return how clips that were encoded again compare with what is stored."""
    numbers = ("relative L2", "largest difference")
    table = _table("clip", "stream", *numbers, "verdict", numbers=numbers)
    for one in results:
        table.add_row(
            one.uid,
            one.stream,
            "-" if one.relative_l2 is None else f"{one.relative_l2:.2g}",
            "-" if one.max_abs is None else f"{one.max_abs:.2g}",
            "equal" if one.passed else one.reason or "differs",
        )
    return table


def preset_table() -> Table:
    """Return the named configurations: steps of their stages, tasks."""
    from train.presets import PRESETS

    table = _table("preset", "steps", "tasks")
    for name, make in PRESETS.items():
        preset = make()
        tasks = dict.fromkeys(
            task
            for stage in preset.stages
            for share in [stage.tasks, *(c.tasks or {} for c in stage.corpora.values())]
            for task in share
        )
        table.add_row(
            name,
            " + ".join(f"{stage.n_steps:,}" for stage in preset.stages),
            ", ".join(tasks),
        )
    return table


def statistics_table(found: Sequence[TokenStatistics]) -> Table:
    """Return the most telling numbers of each spec: medians, and the channels that stand out."""
    numbers = ("clips", "tokens", "norm", "outliers", "length", "zeros")
    table = _table("stream", "spec", *numbers, numbers=numbers)
    for one in found:
        outliers = f"{len(one.outlier_channels)}"
        if one.outlier_channels:
            outliers += f", up to {one.outlier_channels[0].factor:.0f}x"
        length = f"{one.valid_len.p50:g}"
        if one.duration_s is not None:
            length = f"{one.duration_s.p50:.1f} s"
        table.add_row(
            one.stream,
            one.spec_id,
            f"{one.n_clips:,}",
            f"{one.n_tokens:,}",
            f"{one.token_norm.p50:.1f}",
            outliers,
            length,
            f"{one.zero_share:.1%}",
        )
    return table
