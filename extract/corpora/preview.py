"""What a mapping makes of a dataset, for the eyes: first records, labels, splits, what stayed empty."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cache.clip import Clip, Description, Peak, Record, Subtitle
from cache.labels import LABEL_FIELDS
from extract.corpora.findings import SHOWN

if TYPE_CHECKING:
    from extract.index import Indexed, IndexReport

N_RECORDS = 3
_MOST_LABELS = 30
_BAR = 24
_CELL_CHARS = 48


def preview(found: Indexed) -> Group:
    """Return the first records as a table, then the summary."""
    first = list(islice(found.records, N_RECORDS))
    return Group(record_table(first), summary(found))


def record_table(records: Sequence[Record]) -> Table:
    """Return records as a table: a column per record, a row per field that one of them has."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("field", style="dim", no_wrap=True)
    for number, _ in enumerate(records, 1):
        table.add_column(f"record {number}", overflow="fold", ratio=1)
    for name in Record.model_fields:
        cells = [_cell(getattr(record, name)) for record in records]
        if any(cells):
            table.add_row(name, *(Text(cell or "-") for cell in cells))
    return table


def _cell(value: Any) -> str:
    if value is None or value in ((), {}):
        return ""
    if isinstance(value, dict):
        text = ", ".join(f"{k} {v}" for k, v in value.items())
    elif isinstance(value, tuple):
        text = "; ".join(map(_cell, value))
    elif isinstance(value, Subtitle):
        text = f"{value.language}: {value.text}" if value.language else value.text
    elif isinstance(value, Description):
        text = f"{value.kind}: {value.text}"
    elif isinstance(value, Peak):
        text = f"frame {value.index}"
    elif isinstance(value, Clip):
        seconds = "" if value.duration_s is None else f", {value.duration_s:.2f} s"
        text = f"{value.n_bytes:,} bytes{seconds}"
    else:
        text = str(value)
    return text if len(text) <= _CELL_CHARS else text[: _CELL_CHARS - 1] + "…"


def summary(found: Indexed) -> Group:
    """Return how many records there are, their splits and labels, and what stayed empty."""
    return Group(*_parts(found))


def _parts(found: Indexed) -> Iterator[RenderableType]:
    report = found.report
    yield Text(
        f"layout '{report.layout}': {report.n_rows:,} rows read, {len(found.records):,} records"
    )
    for name in LABEL_FIELDS:
        if counts := report.labels.get(name):
            space = found.header.space(report.corpus, name)
            order: Iterable[str] = counts
            if space is not None and not space.open:
                order = space.labels
            elif space is not None:
                order = [label for label, _ in counts.most_common()]
            yield _histogram(name, [(label, counts[label]) for label in order])
    for line in lines(report):
        yield Text(line)


def _histogram(name: str, counts: Sequence[tuple[str, int]]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(name, no_wrap=True)
    table.add_column("records", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = max((n for _, n in counts), default=1) or 1
    for label, n in counts[:_MOST_LABELS]:
        table.add_row(Text(label), f"{n:,}", Text("█" * round(_BAR * n / most), style="cyan"))
    if len(counts) > _MOST_LABELS:
        rest = sum(n for _, n in counts[_MOST_LABELS:])
        table.add_row(Text(f"{len(counts) - _MOST_LABELS} more", style="dim"), f"{rest:,}", "")
    return table


def lines(report: IndexReport) -> Iterator[str]:
    """Yield what there is to say beside the records, in words."""
    splits = ", ".join(f"{name or 'none'} {n:,}" for name, n in report.splits.items())
    yield f"splits: {splits}"
    if report.empty:
        yield f"mapped, but empty in every record: {', '.join(report.empty)}"
    partly = [
        f"{name} {report.filled[name]:,}"
        for name in report.mapped
        if 0 < report.filled[name] < report.n_records
    ]
    if partly:
        yield f"filled in some records only: {', '.join(partly)}"
    if report.n_elsewhere:
        yield f"{report.n_elsewhere:,} rows left out by the layout's `where`"
    for files, missed in report.without_partner.items():
        if missed.n:
            yield f"{missed.n:,} rows found nothing in {files}: {missed}"
    if report.n_dropped:
        yield f"{report.n_dropped:,} rows left out for labels outside their space:"
        for unknown in report.unknown.values():
            yield f"  {unknown}"
    if report.n_missing:
        yield f"{report.n_missing:,} records without a media file: {report.missing}"
    if report.looked_at_media:
        yield f"media: {report.n_files:,} files, {report.n_remembered:,} of them unchanged, not read again"
    for kind, found in (
        ("left out", report.left_out),
        ("not readable as media, extraction will mark it failed", report.suspicious),
    ):
        yield from (f"{kind}: {line}" for line in found[:SHOWN])
        if len(found) > SHOWN:
            yield f"{kind}: {len(found) - SHOWN:,} more"
    yield from report.notes
    if not report.looked_at_media:
        yield "labels only, no clips: give --media DIR to find the media files"
