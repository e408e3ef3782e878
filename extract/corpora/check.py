"""Is a manifest what its corpora should be: leaks between splits, and counts against the paper.

Counts are compared with `CorpusRow.expected`: what the source documents, and Tables 1 and 2 of the
MMEVerse paper. A deviation is explained if a sentence of `expected.known` names both numbers.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cache.clip import Record, has_label
from cache.labels import LABEL_FIELDS, LabelField
from cache.manifest import iter_records
from cache.schema import Model
from extract.corpora.findings import SHOWN
from extract.corpora.leaks import Finding, Leaks
from extract.corpora.registry import corpus_ids, corpus_row
from extract.corpora.row import CorpusRow

CLIPS_IN_TEXT = 129_128
"""Clips of MMEVerse as the paper's text states them; Table 1 adds up to another number."""
ITEMS_IN_TEXT = 36_133
"""Size of MMEVerse-Bench as the paper's text states it."""
BENCHMARK_GROUPS: Mapping[str, tuple[str, ...]] = {
    "basic emotion": (
        "mer2023", "mer2024", "meld-e", "iemocap", "caer", "e3", "dfew", "mafw", "mc-eiu",
    ),
    "sentiment": ("mosi", "mosei", "sims", "sims-v2", "meld-s"),
    "multi-label": ("mafw-m", "bold"),
    "open vocabulary": ("ov-merd",),
    "intent": ("mc-eiu-i",),
}  # fmt: skip
"""The groups of Table 2, in its order."""
_IDS_TELL_FROM = 0.9
"""Share of a corpus's ids that hold the split or the label, from which it is told."""
_MIN_IDS = 20
_MIN_TELLING = 20
"""A smaller number in a sentence is likely to be about something else: "Table 2", "26 labels"."""
NO_SPLIT = "no split"


class Count(Model):
    """One expected count."""

    corpus: str
    what: str
    """`Table 1`, `split val`, `emotion anger`, `benchmark meld-e`."""
    expected: int
    found: int
    status: Literal["equal", "explained", "unexplained"]
    reason: str | None = None
    """Of one that is explained: why. Of one that is not: what is known of the expected number."""


class CheckReport(Model):
    """All that a check found."""

    n_records: int
    corpora: dict[str, int]
    """Corpus -> records."""
    findings: tuple[Finding, ...]
    counts: tuple[Count, ...]
    facts: tuple[str, ...]
    """What one should know of the paper's numbers, and how much of them is here."""

    @property
    def is_clean(self) -> bool:
        """True if there is nothing that needs an explanation."""
        return all(f.severity == "note" for f in self.findings) and all(
            c.status != "unexplained" for c in self.counts
        )

    @property
    def deviations(self) -> tuple[Count, ...]:
        """Counts that are not as expected."""
        return tuple(c for c in self.counts if c.status != "equal")


@dataclass
class _Tally:
    """What one corpus holds."""

    n: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    labels: dict[LabelField, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    benchmarks: Counter[str] = field(default_factory=Counter)
    without: dict[Literal["label", "subtitle", "media"], list[str]] = field(
        default_factory=lambda: defaultdict(list)
    )
    n_unreadable: int = 0
    ids_with: Counter[str] = field(default_factory=Counter)
    ids_of: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record) -> None:
        self.n += 1
        self.splits[record.split or NO_SPLIT] += 1
        self.benchmarks.update(record.benchmarks)
        for name in LABEL_FIELDS:
            self.labels[name].update(record.labels_of(name))
        if not has_label(record):
            self.without["label"].append(record.uid)
        if not record.subtitles:
            self.without["subtitle"].append(record.uid)
        if record.clip is None:
            self.without["media"].append(record.uid)
        elif record.clip.has_video is None and record.clip.has_audio is None:
            self.n_unreadable += 1
        own = record.uid.partition("/")[2].casefold()
        for what, names in (
            ("label", (record.emotion, record.sentiment, record.intent)),
            ("split", (record.split_native, record.split)),
        ):
            there = [name.casefold() for name in names if name]
            if there:
                self.ids_of[what] += 1
                self.ids_with[what] += any(_holds(own, name) for name in there)


def check_manifest(
    path: Path,
    rows: Mapping[str, CorpusRow] | None = None,
    *,
    with_counts: bool = True,
    on_record: Callable[[], object] | None = None,
) -> CheckReport:
    """Check a manifest, whose records are validated on the way.

    Args:
        path: The manifest; a part of MMEVerse is checked for what it has.
        rows: Corpora beside, or in place of, those that ship with the project.
        with_counts: False leaves out expected counts, which a selection never meets.
        on_record: Called after each record.

    Raises:
        ManifestError: Not a manifest, or an invalid record.
        SchemaError: An invalid record.
    """
    shipped = corpus_ids()

    def row_of(corpus: str) -> CorpusRow | None:
        if rows is not None and corpus in rows:
            return rows[corpus]
        return corpus_row(corpus) if corpus in shipped else None

    leaks, tallies = Leaks(), defaultdict[str, _Tally](_Tally)
    for record in iter_records(path):
        leaks.add(record)
        tallies[record.corpus].add(record)
        if on_record is not None:
            on_record()
    findings = [*leaks.findings(row_of)]
    counts: list[Count] = []
    for corpus, tally in sorted(tallies.items()):
        row = row_of(corpus)
        findings += _notes(corpus, tally, row)
        if row is not None and with_counts:
            counts += _counts(row, tally)
    corpora = {corpus: tally.n for corpus, tally in sorted(tallies.items())}
    return CheckReport(
        n_records=sum(corpora.values()),
        corpora=corpora,
        findings=tuple(sorted(findings, key=lambda found: found.severity)),
        counts=tuple(counts),
        facts=_facts(tallies) if with_counts else (),
    )


def paper_facts() -> tuple[str, ...]:
    """Return what the paper's numbers add up to, from the rows of its corpora."""
    rows = [corpus_row(name) for name in corpus_ids()]
    table_1 = {row.id: row.expected.mmeverse for row in rows if row.expected.mmeverse is not None}
    table_2 = {name: n for row in rows for name, n in row.expected.benchmarks.items()}
    total, meld = sum(table_1.values()), corpus_row("meld").expected
    splits = " + ".join(f"{n:,}" for n in meld.splits.values())
    n_meld, twice = (
        sum(meld.splits.values()),
        [row.title for row in rows if len(row.expected.benchmarks) > 1],
    )
    return (
        f"Table 1 sums to {total:,} over {len(table_1)} corpora, the paper's text says {CLIPS_IN_TEXT:,}: "
        f"{total - CLIPS_IN_TEXT} more. MELD is printed as {meld.mmeverse:,}, and its files hold {splits} = "
        f"{n_meld:,}, {(meld.mmeverse or 0) - n_meld} fewer.",
        f"Table 2 sums to {sum(table_2.values()):,} over {len(table_2)} benchmarks. These are evaluation "
        f"items, not clips: records of {', '.join(twice[:-1])} and {twice[-1]} serve two benchmarks each.",
    )


def _facts(tallies: Mapping[str, _Tally]) -> tuple[str, ...]:
    """Return what the paper's numbers add up to and how much of them is here; nothing without any."""
    rows = [corpus_row(name) for name in corpus_ids()]
    of_table = {r.id: r.expected.mmeverse for r in rows if r.expected.mmeverse is not None}
    here = [name for name in of_table if name in tallies]
    items = sum((tally.benchmarks for tally in tallies.values()), Counter[str]())
    known = {name for row in rows for name in row.expected.benchmarks}
    there = [name for name in items if name in known]
    if not here and not there:
        return ()
    facts = [*paper_facts()]
    if here:
        n = sum(tallies[name].n for name in here)
        expected = sum(of_table[name] for name in here)
        missing = [name for name in of_table if name not in tallies]
        rest = f"; without {', '.join(missing)}" if missing else ""
        facts.append(
            f"Here: {n:,} records of {len(here)} of the {len(of_table)} corpora, which Table 1 counts as "
            f"{expected:,}{rest}."
        )
    if there:
        facts.append(
            f"Here: {sum(items[name] for name in there):,} evaluation items of {len(there)} of the "
            f"{len(known)} benchmarks."
        )
    return tuple(facts)


def _notes(corpus: str, tally: _Tally, row: CorpusRow | None) -> Iterator[Finding]:
    """Yield what is not there, and what ids tell."""
    if row is None:
        yield Finding(
            kind="row",
            severity="note",
            what=f"{corpus}: no row is known, so its counts were not compared; give one with --mapping",
            n=tally.n,
        )
    told = {what for layout in row.layouts.values() for what in layout.ids_hold} if row else set()
    for what in ("label", "split"):
        n, n_all = tally.ids_with[what], tally.ids_of[what]
        if n_all and (what in told or (n_all >= _MIN_IDS and n >= _IDS_TELL_FROM * n_all)):
            yield Finding(
                kind="id",
                severity="note",
                what=f"{corpus}: ids hold the {what}; no id reaches a prompt, so do not show ids to a "
                "model yourself",
                n=n_all if what in told else n,
                reason="its row says so" if what in told else None,
            )
    for missing, uids in sorted(tally.without.items()):
        text = {
            "label": "records have no label",
            "subtitle": "records have no subtitle",
            "media": "records have no clip: their media were not looked at",
        }[missing]
        every = len(uids) == tally.n
        yield Finding(
            kind=missing,
            severity="note",
            what=f"{corpus}: {'all ' if every else ''}{text}",
            n=len(uids),
            examples=() if every else tuple(uids[:SHOWN]),
            reason=_sentence(row, len(uids)) if row and missing == "label" else None,
        )
    if tally.n_unreadable:
        yield Finding(
            kind="media",
            severity="note",
            what=f"{corpus}: media files could not be opened",
            n=tally.n_unreadable,
        )


def _counts(row: CorpusRow, tally: _Tally) -> Iterator[Count]:
    expected = row.expected
    if expected.mmeverse is not None:
        yield _count(row, "Table 1", expected.mmeverse, tally.n)
    if expected.splits:
        names = [*expected.splits, *(n for n in tally.splits if n not in expected.splits)]
        for split in names:
            if split != NO_SPLIT:
                yield _count(
                    row, f"split {split}", expected.splits.get(split, 0), tally.splits[split]
                )
    for name, histogram in expected.labels.items():
        found = tally.labels[name]
        for label in [*histogram, *(n for n in sorted(found) if n not in histogram)]:
            yield _count(row, f"{name} {label}", histogram.get(label, 0), found[label])
    for benchmark, n in expected.benchmarks.items():
        yield _count(row, f"benchmark {benchmark}", n, tally.benchmarks[benchmark], benchmark)


def _count(row: CorpusRow, what: str, expected: int, found: int, name: str = "") -> Count:
    reason: str | None = None
    status: Literal["equal", "explained", "unexplained"] = "equal"
    if expected != found:
        reason = _sentence(row, expected, found)
        status = "unexplained" if reason is None else "explained"
        if reason is None:
            reason = (_sentence(row, expected) if expected else None) or (
                _sentence(row, name) if name and name != row.id else None
            )
    return Count(
        corpus=row.id, what=what, expected=expected, found=found, status=status, reason=reason
    )


def _sentence(row: CorpusRow, *words: int | str) -> str | None:
    """Return the first of the known deviations that names all of these; small numbers mean nothing."""
    if any(isinstance(word, int) and word < _MIN_TELLING for word in words):
        return None
    for text in row.expected.known:
        if all(_names(text, f"{word:,}" if isinstance(word, int) else word) for word in words):
            return text
    return None


def _names(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w,.-]){re.escape(word)}(?!\w|[,.-]\w)", text) is not None


def _holds(own: str, name: str) -> bool:
    """Whether an id holds a name as a word: `test_Surprise_0083`, not `contest`."""
    at = own.find(name)
    while at >= 0:
        before, after = own[at - 1 : at], own[at + len(name) : at + len(name) + 1]
        if not before.isalpha() and not after.isalpha():
            return True
        at = own.find(name, at + 1)
    return False
