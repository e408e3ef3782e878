"""Tables for the terminal: what a manifest holds, and what a check of it found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from eval.corpora.report import FIELD_NAMES
from eval.corpora.statistics import SPLITS, CorpusCounts, CorpusStatistics, total

if TYPE_CHECKING:
    from extract.corpora.check import CheckReport, Count
    from extract.corpora.leaks import Finding

_MAX_OPEN: Final = 15
_NONE: Final = "-"


def _table(*columns: str, numbers_from: int = 1, title: str | None = None) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title, title_justify="left"
    )
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place >= numbers_from else "left", no_wrap=True)
    return table


def _n(value: int) -> str:
    return f"{value:,}" if value else _NONE


def _rows(stats: CorpusStatistics) -> Iterator[tuple[str, CorpusCounts, str]]:
    for name, row in stats.corpora.items():
        yield escape(name), row, ""
    if len(stats.corpora) > 1:
        yield "together", stats.together, "bold"


def statistics_tables(stats: CorpusStatistics) -> Iterator[Table]:
    """Yield what a manifest holds: splits, tasks, labels, durations, texts, units, benchmarks."""
    splits = list(stats.together.splits)
    table = _table("corpus", "records", *splits, "clips", "parents", "speakers")
    for name, row, style in _rows(stats):
        counts = [row.splits.get(split, 0) for split in splits]
        numbers = (row.n_records, *counts, row.n_clips, row.n_parents, row.n_speakers)
        table.add_row(name, *map(_n, numbers), style=style)
    yield table
    if stats.together.tasks:
        table = _table("corpus", "records that can answer each task", numbers_from=2)
        table.columns[1].no_wrap = False
        for name, row, style in _rows(stats):
            table.add_row(name, _list(row.tasks) or _NONE, style=style)
        yield table
    for field, corpora in stats.labels.items():
        yield _labels(FIELD_NAMES[field], corpora)
    if stats.together.durations is not None:
        yield _durations(stats)
    if any(row.subtitles or row.languages for row in stats.corpora.values()):
        table = _table("corpus", "spoken", "subtitles", numbers_from=3)
        for column in table.columns[1:]:
            column.no_wrap = False
        for name, row, style in _rows(stats):
            spoken, subtitles = _list(row.languages), _list(row.subtitles, "; ")
            table.add_row(name, spoken or _NONE, subtitles or _NONE, style=style)
        yield table
    table = _table("records without", "media", "video", "sound", "subtitle", "label")
    for name, row, style in _rows(stats):
        missing = (
            row.n_unseen, row.n_without_video, row.n_without_audio, row.n_without_subtitle,
            row.n_without_label,
        )  # fmt: skip
        table.add_row(name, *map(_n, missing), style=style)
    yield table
    if stats.descriptions:
        table = _table("description", "explains", "model", "texts", numbers_from=3)
        for one in stats.descriptions:
            model = " ".join(filter(None, (one.model, one.version))) or "of the corpus"
            table.add_row(one.kind, one.target or _NONE, escape(model), _n(one.n))
        yield table
    units = stats.action_units
    if units is not None:
        table = _table("emotion", "records", "most frequent action units", numbers_from=1)
        table.columns[2].justify = "left"
        table.columns[2].no_wrap = False
        most = dict(sorted(units.units.items(), key=lambda item: (-item[1], item[0]))[:5])
        for emotion, n, found in (
            *((e, units.n_of_emotion[e], u) for e, u in units.by_emotion.items()),
            ("all", units.n_records, most),
        ):
            shares = (f"{unit} {k / n:.0%}" for unit, k in found.items())
            table.add_row(escape(emotion), _n(n), ", ".join(shares))
        yield table
    if stats.benchmarks:
        table = _table("benchmark", "items")
        for name, n in stats.benchmarks.items():
            table.add_row(escape(name), _n(n))
        yield table


def _labels(title: str, corpora: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Table:
    table = _table("corpus", "label", "records", "share", "by split", numbers_from=2, title=title)
    table.columns[4].justify = "left"
    table.columns[4].no_wrap = False
    for corpus, labels in corpora.items():
        counts = {label: total(by_split) for label, by_split in labels.items()}
        everything = sum(counts.values())
        shown = list(labels)
        if len(shown) > 2 * _MAX_OPEN:
            shown = sorted(shown, key=lambda label: (-counts[label], label))[:_MAX_OPEN]
        for place, label in enumerate(shown):
            table.add_row(
                escape(corpus) if place == 0 else "",
                escape(label),
                _n(counts[label]),
                f"{counts[label] / everything:.1%}" if everything else _NONE,
                _list(_ordered(labels[label])),
            )
        if len(shown) < len(labels):
            rest = everything - sum(counts[label] for label in shown)
            table.add_row("", f"({len(labels) - len(shown):,} others)", _n(rest))
    return table


def _ordered(by_split: Mapping[str, int]) -> dict[str, int]:
    names = [name for name in SPLITS if name in by_split]
    return {name: by_split[name] for name in (*names, *sorted(set(by_split) - set(names)))}


def _list(counts: Mapping[Any, int], between: str = ", ") -> str:
    return escape(between.join(f"{name} {n:,}" for name, n in counts.items()))


def _durations(stats: CorpusStatistics) -> Table:
    names = ("hours", "mean", "shortest", "5 %", "median", "95 %", "longest")
    table = _table("seconds", *names)
    for name, row, style in _rows(stats):
        found = row.durations
        if found is None:
            table.add_row(name, *[_NONE] * 7, style=style)
            continue
        chosen = (found.mean_s, *(found.quantiles_s[i] for i in (0, 1, 3, 5, 6)))
        table.add_row(name, f"{found.hours:,.1f}", *(f"{x:.2f}" for x in chosen), style=style)
    return table


def check_tables(report: CheckReport, *, every_count: bool) -> Iterator[Table]:
    """Yield what a check found: findings with examples, and counts that deviate, or all."""
    if report.findings:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
        table.add_column("what", overflow="fold")
        for finding in report.findings:
            style = "yellow" if finding.severity == "finding" else ""
            table.add_row(finding.severity, _n(finding.n), escape(_words(finding)), style=style)
        yield table
    counts = report.counts if every_count else report.deviations
    if counts:
        table = _table("corpus", "count", "expected", "found", "difference", "why", numbers_from=2)
        table.columns[5].justify = "left"
        table.columns[5].no_wrap = False
        before = None
        for count in counts:
            style = "yellow" if count.status == "unexplained" else ""
            table.add_row(
                count.corpus,
                count.what,
                f"{count.expected:,}",
                f"{count.found:,}",
                f"{count.found - count.expected:+,}" if count.found != count.expected else _NONE,
                escape(_why(count, before)),
                style=style,
            )
            before = count
        yield table


def _words(finding: Finding) -> str:
    lines = [finding.what]
    if finding.reason:
        lines.append(f"  known: {finding.reason}")
    lines += [f"  {example}" for example in finding.examples[:3]]
    if len(finding.examples) > 3:
        lines.append(f"  and {finding.n - 3:,} more (--json has ten)")
    return "\n".join(lines)


def _why(count: Count, before: Count | None) -> str:
    """Say why a count deviates; what the line above says already is not said again."""
    if count.status == "equal":
        return "as expected"
    known, known_before = (
        None if one is None else (one.corpus, one.reason) for one in (count, before)
    )
    reason = "as above" if count.reason and known == known_before else count.reason
    if count.status == "explained":
        return reason or ""
    return f"unexplained. Known of this number: {reason}" if reason else "unexplained"


def known_corpora() -> Table:
    """Return the corpora that ship with the project, and what the paper counts of them."""
    from extract.corpora.registry import corpus_ids, corpus_row

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("corpus", no_wrap=True)
    table.add_column("title", no_wrap=True)
    table.add_column("Table 1", justify="right", no_wrap=True)
    table.add_column("benchmarks (Table 2)", overflow="fold")
    for name in corpus_ids():
        row = corpus_row(name)
        n = row.expected.mmeverse
        benchmarks = (f"{b} {k:,}" for b, k in row.expected.benchmarks.items())
        table.add_row(name, row.title, _NONE if n is None else f"{n:,}", ", ".join(benchmarks))
    return table


def contents_table(stats: CorpusStatistics) -> Table:
    """Return one line per corpus and split."""
    table = _table("corpus", "split", "records", "labels", "tasks", numbers_from=2)
    for column in table.columns[3:]:
        column.justify, column.no_wrap = "left", False
    for name, row in stats.corpora.items():
        for place, (split, n) in enumerate(row.splits.items()):
            fields = (field for field, corpora in stats.labels.items() if name in corpora)
            table.add_row(
                escape(name) if place == 0 else "",
                escape(split),
                _n(n),
                ", ".join(fields) if place == 0 else "",
                ", ".join(row.tasks) if place == 0 else "",
            )
    return table
