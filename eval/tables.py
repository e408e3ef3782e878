"""Tables for the terminal: what a store holds, what an extraction did, what is known of a clip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from cache.commit import Status, read_commit
from cache.lifecycle import Garbage
from cache.spec import Stream, TokenSpec
from cache.store import TokenStore
from eval.report import human_size
from extract.plan import NEVER, OTHER_SPEC, RETRY, Plan

if TYPE_CHECKING:
    from cache.inspection import Finding
    from cache.statistics import TokenStatistics
    from extract.recheck import Recheck

_STATUSES = (Status.OK, Status.ABSENT, Status.FAILED)
_SHORT_DTYPE = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "int8": "int8"}


def _table(*columns: str, numbers: Collection[str] = ()) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=True)
    return table


def status_table(counts: Mapping[Stream, Counter[Status]]) -> Table:
    """Return clips by stream and status."""
    numbers = [status.value for status in _STATUSES]
    table = _table("stream", *numbers, numbers=numbers)
    for stream, found in counts.items():
        table.add_row(stream, *(f"{found[status]:,}" for status in _STATUSES))
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
    """Return hits, misses by reason and bytes to write, by stream."""
    reasons = [
        r for r in (NEVER, OTHER_SPEC, RETRY) if any(counts[r] for counts in plan.misses.values())
    ]
    numbers = ("in the store", *reasons, "to write")
    table = _table("stream", *numbers, numbers=numbers)
    for stream, known in plan.known.items():
        counts = plan.misses[stream]
        size = f"≈ {human_size(plan.n_bytes[stream])}" if plan.n_bytes[stream] else "-"
        table.add_row(
            stream, f"{known.total():,}", *(f"{counts[reason]:,}" for reason in reasons), size
        )
    return table


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
