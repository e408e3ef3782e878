"""Manifests out of manifests: several merged, or one filtered, sampled or without copies.

Records pass through one by one, so that memory does not grow with what they hold. What is written is
written whole or not at all, and media paths stay right wherever the new manifest stands.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, get_args

import pyarrow.compute as pc

from cache.clip import Record
from cache.columns import corpus_of, read_columns
from cache.conditions import Condition, parse_conditions
from cache.errors import ManifestError, near_miss
from cache.headers import merge_headers
from cache.labels import LABEL_FIELDS
from cache.manifest import Header, ManifestWriter, iter_records, read_header, relative_root

OnRecord = Callable[[], object]
"""Called after each record that was read."""
Per = Literal["corpus", "emotion", "split"]
PER: tuple[Per, ...] = get_args(Per)
HELD_OUT = ("test", "val")
"""Splits that models are judged on, the strictest first."""
SHOWN = 10
"""Uids that an error names; the rest is counted."""
_MAX_SEEN = 10_000
"""Different values that are remembered to find a near miss among."""


class Merged(NamedTuple):
    """What was merged."""

    n_records: dict[Path, int]
    """Per manifest."""
    media_root: Path


class Filtered(NamedTuple):
    """What a filter did."""

    n_kept: int
    n_dropped: int
    failed: dict[str, int]
    """Condition -> records that do not meet it, whatever they do with the others."""
    remarks: tuple[str, ...]
    """Values that no record has."""


class Sampled(NamedTuple):
    """What a sample took."""

    n_kept: int
    groups: dict[tuple[str, ...], tuple[int, int]]
    """Group -> records taken, and records there are."""


class Deduplicated(NamedTuple):
    """What was done about clips that stand in several records."""

    n_kept: int
    n_dropped: int
    n_copied: int
    """Clips that stood in several records."""
    reasons: dict[str, int]
    """Why records went -> how many."""
    n_benchmark: int
    """Dropped records that a benchmark scores."""
    n_contradicting: int
    """Clips whose copies in one corpus have different labels."""
    n_left: int
    """Clips that still stand in several splits."""
    n_without_clip: int
    """Records whose media nobody looked at; they stay."""


def merge_manifests(paths: Sequence[Path], out: Path, on_record: OnRecord | None = None) -> Merged:
    """Write the records of several manifests as one.

    Label spaces become those of the corpora; media paths start at the lowest folder that holds every
    media root.

    Raises:
        ManifestError: Corpora of one name with different label spaces or scales, or a uid in two
            manifests; nothing is written.
    """
    headers = {path: read_header(path) for path in paths}
    uids = {path: read_columns(path, ["uid"])["uid"] for path in paths}
    _refuse_same_uids({path: column.to_pylist() for path, column in uids.items()})
    corpora = {path: set(pc.unique(corpus_of(column)).to_pylist()) for path, column in uids.items()}
    roots = {path: _root(headers[path], path) for path in paths}
    common = Path(os.path.commonpath([str(root) for root in roots.values()]))
    absolute = all(Path(header.media_root).is_absolute() for header in headers.values())
    header = merge_headers(
        [(path, headers[path], corpora[path]) for path in paths],
        str(common) if absolute else relative_root(common, out),
    )
    counts = {}
    with ManifestWriter(out, header) as writer:
        for path in paths:
            below = roots[path].relative_to(common)
            before = len(writer)
            for record in _watched(path, on_record):
                writer.write(_moved(record, below))
            counts[path] = len(writer) - before
    return Merged(counts, common)


def filter_manifest(
    path: Path, out: Path, where: Sequence[str], on_record: OnRecord | None = None
) -> Filtered:
    """Write the records that meet all conditions.

    Args:
        path: The manifest.
        out: Where the new one will stand; may be the same.
        where: See `cache.conditions`.
        on_record: For progress.

    Raises:
        SchemaError: Something that is no condition.
        ManifestError: No record meets them; nothing is written.
    """
    header = read_header(path)
    conditions = parse_conditions(where, header)
    failed = Counter({condition.text: 0 for condition in conditions})
    seen: dict[Condition, set[str]] = {c: set() for c in conditions if c.compares_names}
    n_dropped = 0
    with ManifestWriter(out, _at(header, path, out)) as writer:
        for record in _watched(path, on_record):
            broken = [c.text for c in conditions if not c.holds(record)]
            failed.update(broken)
            for condition, names in seen.items():
                if len(names) < _MAX_SEEN:
                    names.update(condition.seen(record))
            if broken:
                n_dropped += 1
            else:
                writer.write(record)
        remarks = tuple(_never_seen(seen))
        if not len(writer):
            each = "; ".join(f"{n:,} do not meet {text!r}" for text, n in failed.items())
            hints = "".join(f" {remark}." for remark in remarks)
            raise ManifestError(
                f"{path}: none of its {n_dropped:,} records meets all conditions ({each}).{hints} "
                "Nothing was written."
            )
        n_kept = len(writer)
    return Filtered(n_kept, n_dropped, dict(failed), remarks)


def sample_manifest(
    path: Path,
    out: Path,
    n: int,
    per: Sequence[Per] = (),
    seed: int = 0,
    on_record: OnRecord | None = None,
) -> Sampled:
    """Write `n` records that are chosen by a hash of seed and uid: whatever the order, the same.

    A larger sample of the same seed holds the smaller one.

    Args:
        path: The manifest.
        out: Where the new one will stand.
        n: Records of each group; a smaller group is taken whole.
        per: What makes a group; nothing: all records are one.
        seed: Another one gives another sample.
        on_record: For progress.

    Raises:
        ManifestError: The manifest is empty.
    """
    columns = read_columns(path, ["uid", "split", "emotion"])
    uids = columns["uid"].to_pylist()
    if not uids:
        raise ManifestError(f"{path}: holds no records, so there is nothing to choose from.")
    values = {
        "corpus": (uid.partition("/")[0] for uid in uids),
        "split": (value or "no split" for value in columns["split"].to_pylist()),
        "emotion": (value or "no emotion" for value in columns["emotion"].to_pylist()),
    }
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    names = zip(*(values[name] for name in per), strict=True) if per else iter([()] * len(uids))
    for uid, group in zip(uids, names, strict=True):
        groups[group].append(uid)
    chosen: set[str] = set()
    counts = {}
    for group, members in sorted(groups.items()):
        taken = heapq.nsmallest(n, members, key=lambda uid: _draw(seed, uid))
        chosen.update(taken)
        counts[group] = (len(taken), len(members))
    _write_chosen(path, out, lambda record: record.uid in chosen, on_record)
    return Sampled(len(chosen), counts)


def deduplicate(
    path: Path, out: Path, *, across_splits: bool = False, on_record: OnRecord | None = None
) -> Deduplicated:
    """Write a manifest without copies: clips of the same bytes.

    Of the records of one clip, one per split stays; where one of them is held out (test or val), all
    that are not go, so that nothing is trained on that is tested. Of several in a split, that with the
    most benchmarks stays, then that with the most labels, with the most descriptions, and with the first
    uid.

    Args:
        path: The manifest.
        out: Where the new one will stand.
        across_splits: One record per clip altogether: that of test, else of val, else another.
        on_record: For progress.
    """
    names = ["uid", "clip.sha256", "split", "benchmarks", *LABEL_FIELDS, "descriptions.kind"]
    columns = read_columns(path, names)
    digests = columns["clip.sha256"]
    counts = pc.value_counts(digests)
    several = counts.field(0).filter(
        pc.and_kleene(pc.greater(counts.field(1), 1), pc.is_valid(counts.field(0)))
    )
    copies: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in columns.filter(pc.is_in(digests, several)).to_pylist():
        copies[row["clip.sha256"]].append(row)
    dropped: dict[str, str] = {}
    n_left = 0
    for rows in copies.values():
        gone = dict(_to_drop(rows, across_splits))
        dropped |= gone
        n_left += len({row["split"] for row in rows if row["uid"] not in gone}) > 1
    _write_chosen(path, out, lambda record: record.uid not in dropped, on_record)
    rows_of = {row["uid"]: row for rows in copies.values() for row in rows}
    return Deduplicated(
        n_kept=len(columns) - len(dropped),
        n_dropped=len(dropped),
        n_copied=len(copies),
        reasons=dict(Counter(dropped.values())),
        n_benchmark=sum(bool(rows_of[uid]["benchmarks"]) for uid in dropped),
        n_contradicting=sum(_contradict(rows) for rows in copies.values()),
        n_left=n_left,
        n_without_clip=digests.null_count,
    )


def _refuse_same_uids(uids: dict[Path, list[str]]) -> None:
    first: dict[str, Path] = {}
    twice: list[str] = []
    for path, names in uids.items():
        for uid in names:
            other = first.setdefault(uid, path)
            if other is not path:
                twice.append(f"{uid!r} in {other} and {path}")
    if twice:
        more = f"; and {len(twice) - SHOWN:,} more" if len(twice) > SHOWN else ""
        raise ManifestError(
            f"{len(twice):,} uids stand in two manifests: {'; '.join(twice[:SHOWN])}{more}. A uid names one "
            "record: filter one of them, or index it under another corpus name. Nothing was written."
        )


def _root(header: Header, path: Path) -> Path:
    return (path.parent / header.media_root).resolve()


def _at(header: Header, path: Path, out: Path) -> Header:
    """Return the header as it must be where the new manifest stands."""
    if Path(header.media_root).is_absolute() or path.parent.resolve() == out.parent.resolve():
        return header
    return header.model_copy(update={"media_root": relative_root(_root(header, path), out)})


def _moved(record: Record, below: Path) -> Record:
    if below == Path():
        return record
    media = (PurePosixPath(below.as_posix()) / record.media).as_posix()
    return record.model_copy(update={"media": media})


def _watched(path: Path, on_record: OnRecord | None) -> Iterator[Record]:
    for record in iter_records(path):
        yield record
        if on_record is not None:
            on_record()


def _write_chosen(
    path: Path, out: Path, is_chosen: Callable[[Record], bool], on_record: OnRecord | None
) -> None:
    with ManifestWriter(out, _at(read_header(path), path, out)) as writer:
        for record in _watched(path, on_record):
            if is_chosen(record):
                writer.write(record)


def _never_seen(seen: dict[Condition, set[str]]) -> Iterator[str]:
    for condition, names in seen.items():
        if condition.operator.endswith("~") and condition.kind == "text":
            continue
        for value in condition.values:
            if value is not None and value not in names and len(names) < _MAX_SEEN:
                hint = near_miss(value, names)
                yield f"no record has {condition.field} {value!r}{hint and f' ({hint.strip()})'}"


def _draw(seed: int, uid: str) -> bytes:
    return hashlib.sha256(f"{seed}:{uid}".encode()).digest()


def _rank(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the order of copies is made of: the first stays."""
    split = row["split"]
    return (
        HELD_OUT.index(split) if split in HELD_OUT else len(HELD_OUT),
        -len(row["benchmarks"] or ()),
        -sum(bool(row[name]) for name in LABEL_FIELDS),
        -len(row["descriptions.kind"] or ()),
        row["uid"],
    )


def _to_drop(rows: Iterable[dict[str, Any]], across_splits: bool) -> Iterator[tuple[str, str]]:
    """Yield the uids of the copies that go, and why."""
    ordered = sorted(rows, key=_rank)
    held_out = ordered[0]["split"] in HELD_OUT
    stay: set[str | None] = set()
    for row in ordered:
        split = row["split"]
        if split in stay:
            yield row["uid"], "another record of the clip stays in the same split"
        elif held_out and split not in HELD_OUT:
            yield row["uid"], "the clip is held out in another record"
        elif across_splits and stay:
            yield row["uid"], "another record of the clip stays in another split"
        else:
            stay.add(split)


def _contradict(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether records of one corpus give one clip different labels."""
    for field in LABEL_FIELDS:
        found: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            if row[field]:
                value = row[field]
                text = value if isinstance(value, str) else "\n".join(sorted(value))
                found[row["uid"].partition("/")[0]].add(text)
        if any(len(values) > 1 for values in found.values()):
            return True
    return False
