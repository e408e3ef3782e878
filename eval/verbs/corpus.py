"""`emocache corpus ...`: look into manifests, check them, and make others out of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from typer.core import TyperGroup

from cache.errors import SchemaError
from eval.verbs.console import DONE, FINDINGS, err, out, verb

if TYPE_CHECKING:
    from cache.clip import Record
    from cache.selection import OnRecord, Per
    from train.text.export import ExportStyle
    from train.text.tasks import Asked

VERBS = ("ls", "show", "stats", "check", "merge", "filter", "sample", "dedupe", "export")
"""Looking, checking, choosing, handing over; `emocache corpus --help` shows them so."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: object) -> list[str]:
        """Return the verbs in the order of their purpose."""
        return sorted(self.commands, key=VERBS.index)


corpus_app = typer.Typer(
    cls=_InOrder,
    no_args_is_help=True,
    help="Look into manifests, check them for leaks and counts, and make others out of them.",
)

ManifestArgument = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="From `emocache index`.", show_default=False)
]
OutOption = Annotated[Path, typer.Option("--out", help="Manifest to write (.parquet).")]


@corpus_app.command("ls")
@verb
def corpus_ls(
    manifest: Annotated[
        Path | None,
        typer.Argument(metavar="[MANIFEST]", help="Without one, the known corpora are listed."),
    ] = None,
) -> int:
    """List the known corpora, or what a manifest holds: a line per corpus and split."""
    from eval.corpora.tables import contents_table, known_corpora

    if manifest is None:
        out.print(known_corpora())
        return DONE
    from eval.corpora.statistics import measure_corpus

    found = measure_corpus(manifest)
    out.print(contents_table(found))
    out.print(f"{found.together.n_records:,} records", highlight=False)
    return DONE


@corpus_app.command("show")
@verb
def corpus_show(
    manifest: ManifestArgument,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[UID] [KEY=VALUE]...",
            help="The record, unless --random; and settings of --render, e.g. seed=1.",
        ),
    ] = None,
    render: Annotated[
        str | None,
        typer.Option(metavar="PRESET", help="Show also how training asks about it, e.g. v2."),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Any record, chosen by --seed.")] = False,
    seed: Annotated[int, typer.Option(help="Of --random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The record as JSON.")] = False,
) -> int:
    """Show everything known of a record, and how training asks about it."""
    from cache.lookup import any_uid, find_record
    from cache.manifest import read_header
    from eval.corpora.view import asked_of, asked_view, record_view

    given = list(words or ())
    if random:
        uid = any_uid(manifest, seed)
    elif given:
        uid = given.pop(0)
    else:
        raise SchemaError("no record is named. Give a uid (CORPUS/ID), or --random for any record.")
    if given and render is None:
        raise SchemaError(
            f"{given[0]!r}: settings are of a preset, and none is named. Add --render v2."
        )
    if as_json and render is not None:
        raise SchemaError("--json shows the record alone; leave out --render, or --json.")
    header, record = read_header(manifest), find_record(manifest, uid)
    if as_json:
        _print_json(record.model_dump_json(exclude_defaults=True))
        return DONE
    views = [record_view(record, header)]
    if render is not None:
        from eval.verbs.arguments import configure

        chosen = configure(render, given)
        views.append(asked_view(asked_of(record, header, chosen), render, chosen.seed))
    for view in views:
        out.print(view)
    return DONE


@corpus_app.command("stats")
@verb
def corpus_stats(
    manifest: ManifestArgument,
    out_dir: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write a page (HTML, Markdown) and figures."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The numbers as JSON.")] = False,
) -> int:
    """Count corpora, splits, tasks, labels, durations, languages, action units; plot them with --out."""
    from eval.corpora.statistics import measure_corpus
    from eval.corpora.tables import statistics_tables

    found = measure_corpus(manifest)
    if as_json:
        _print_json(found.model_dump_json())
    else:
        for table in statistics_tables(found):
            out.print(table)
    if out_dir is not None:
        from datetime import UTC, datetime

        from eval.corpora.report import write_corpus_report

        paths = write_corpus_report(found, out_dir, datetime.now(UTC).isoformat(timespec="seconds"))
        for path in paths:
            (err if as_json else out).print(str(path), highlight=False, soft_wrap=True)
    return DONE


@corpus_app.command("check")
@verb
def corpus_check(
    manifest: ManifestArgument,
    mapping: Annotated[
        list[Path] | None,
        typer.Option(help="Your own corpus's mapping file, for its expected counts. Repeatable."),
    ] = None,
    counts: Annotated[
        bool,
        typer.Option("--counts/--no-counts", help="Compare counts; a selection never meets them."),
    ] = True,
    every: Annotated[
        bool, typer.Option("--all", help="Show also the counts that are as expected.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All findings as JSON.")] = False,
) -> int:
    """Look for leaks between splits, and compare counts with the sources and the paper.

    Exit code 1: something needs an explanation.
    """
    from eval.corpora.tables import check_tables
    from extract.corpora.check import check_manifest
    from extract.corpora.registry import load_row

    rows = {row.id: row for row in map(load_row, mapping or ())}
    with _watched("checking", [manifest]) as on_record:
        found = check_manifest(manifest, rows, with_counts=counts, on_record=on_record)
    if as_json:
        _print_json(found.model_dump_json())
        return DONE if found.is_clean else FINDINGS
    for table in check_tables(found, every_count=every):
        out.print(table)
    n_equal = len(found.counts) - len(found.deviations)
    n_bad = sum(count.status == "unexplained" for count in found.counts)
    lines = [*found.facts]
    if found.counts:
        lines.append(
            f"{n_equal:,} of {len(found.counts):,} counts are as expected, "
            f"{len(found.deviations) - n_bad:,} differ for a known reason, {n_bad:,} unexplained"
        )
    n_findings = sum(finding.severity == "finding" for finding in found.findings)
    lines.append(
        f"{found.n_records:,} records of {', '.join(found.corpora)}: all valid, "
        f"{n_findings:,} finding{'s' * (n_findings != 1)} about splits"
    )
    for line in lines:
        _say(line)
    return DONE if found.is_clean else FINDINGS


@corpus_app.command("merge")
@verb
def corpus_merge(
    manifests: Annotated[
        list[Path], typer.Argument(metavar="MANIFEST MANIFEST...", show_default=False)
    ],
    out_file: OutOption,
) -> int:
    """Make one manifest of several; each corpus keeps its label spaces."""
    from cache.selection import merge_manifests

    if len(manifests) < 2:
        raise SchemaError(f"give two manifests or more to merge (got {len(manifests)}).")
    if len({path.resolve() for path in manifests}) < len(manifests):
        raise SchemaError("a manifest is named twice; a uid names one record.")
    with _watched("merging", manifests) as on_record:
        found = merge_manifests(manifests, out_file, on_record)
    for path, n in found.n_records.items():
        _say(f"{n:,} records of {path}")
    _say(f"{sum(found.n_records.values()):,} records in {out_file}; media below {found.media_root}")
    return DONE


@corpus_app.command("filter")
@verb
def corpus_filter(
    manifest: ManifestArgument,
    where: Annotated[
        list[str],
        typer.Option(
            help="FIELD OPERATOR VALUE in quotes: 'split=train', 'emotion!=neutral', 'duration_s<30', "
            "'corpus=meld,iemocap', 'benchmarks~meld-e'. Repeatable: all must hold."
        ),
    ],
    out_file: OutOption,
) -> int:
    """Write the records that meet all conditions."""
    from cache.selection import filter_manifest

    with _watched("filtering", [manifest]) as on_record:
        found = filter_manifest(manifest, out_file, where, on_record)
    for text, n in found.failed.items():
        _say(f"{n:,} records do not meet {text}")
    for remark in found.remarks:
        err.print(remark, style="yellow", markup=False, highlight=False, soft_wrap=True)
    _say(f"{found.n_kept:,} records kept, {found.n_dropped:,} dropped; in {out_file}")
    return DONE


@corpus_app.command("sample")
@verb
def corpus_sample(
    manifest: ManifestArgument,
    n: Annotated[int, typer.Option("--n", min=1, help="Records; with --per, of each group.")],
    out_file: OutOption,
    per: Annotated[
        list[str] | None,
        typer.Option(help="corpus, emotion or split. Repeatable: groups of both."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another one gives another sample.")] = 0,
) -> int:
    """Write some records, chosen by a hash of seed and uid: the same ones whatever their order."""
    from cache.selection import PER, sample_manifest
    from eval.verbs.arguments import choice

    chosen = cast("list[Per]", [choice(name, PER, "--per") for name in per or ()])
    with _watched("sampling", [manifest]) as on_record:
        found = sample_manifest(manifest, out_file, n, chosen, seed, on_record)
    if chosen:
        for group, (n_taken, n_all) in found.groups.items():
            fewer = " (all there are)" if n_taken == n_all else ""
            _say(f"{', '.join(group)}: {n_taken:,} of {n_all:,}{fewer}")
    _say(f"{found.n_kept:,} records in {out_file}")
    return DONE


@corpus_app.command("dedupe")
@verb
def corpus_dedupe(
    manifest: ManifestArgument,
    out_file: OutOption,
    across_splits: Annotated[
        bool,
        typer.Option("--across-splits", help="One record per clip: of test, else val, else train."),
    ] = False,
) -> int:
    """Leave one record per clip and split, and none in train of a clip that val or test has.

    Of several in a split, that with the most benchmarks stays, then that with the most labels.
    """
    from cache.selection import deduplicate

    with _watched("deduplicating", [manifest]) as on_record:
        found = deduplicate(manifest, out_file, across_splits=across_splits, on_record=on_record)
    _say(f"{found.n_copied:,} clips stood in several records")
    for reason, n in sorted(found.reasons.items()):
        _say(f"{n:,} records dropped: {reason}")
    remarks = {
        "dropped records were scored by a benchmark, which has fewer items now": found.n_benchmark,
        "clips have different labels in records of one corpus": found.n_contradicting,
        "clips still stand in two splits; --across-splits leaves one record of each": found.n_left,
        "records have no clip, so copies among them are not known; index them with --media": (
            found.n_without_clip
        ),
    }
    for remark, n in remarks.items():
        if n:
            err.print(
                f"{n:,} {remark}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
    _say(f"{found.n_kept:,} records kept, {found.n_dropped:,} dropped; in {out_file}")
    return DONE


@corpus_app.command("export")
@verb
def corpus_export(
    manifest: ManifestArgument,
    out_file: Annotated[Path, typer.Option("--out", help="JSON lines to write (.jsonl).")],
    style: Annotated[str, typer.Option(help="llava or sharegpt.")],
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task or family, e.g. emotion, joint. Repeatable; default all."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Only records of this split.")] = None,
    preset: Annotated[str, typer.Option(help="Whose prompt settings and seed.")] = "v2",
    seed: Annotated[int | None, typer.Option(help="Another than the preset's.")] = None,
) -> int:
    """Write questions and answers of training as conversations, for other trainers."""
    from cache.manifest import iter_records, read_header
    from eval.verbs.arguments import choice, configure
    from train.text.export import EXPORT_STYLES, export_conversations
    from train.text.tasks import FAMILIES, TASKS

    tasks = [choice(name, (*TASKS, *FAMILIES), "--task") for name in task or ()]
    with _watched("exporting", [manifest]) as on_record:
        n = export_conversations(
            _told(iter_records(manifest), on_record),
            out_file,
            header=read_header(manifest),
            style=cast("ExportStyle", choice(style, EXPORT_STYLES, "--style")),
            preset=configure(preset, None),
            tasks=cast("list[Asked]", tasks) or None,
            split=split,
            seed=seed,
        )
    _say(f"{n:,} conversations in {out_file}")
    return DONE


@contextmanager
def _watched(what: str, manifests: Sequence[Path]) -> Iterator[OnRecord]:
    """Show progress over the records of some manifests."""
    from cache.manifest import count_records
    from eval.progress import progress_bar

    total = sum(count_records(path) for path in manifests)
    with progress_bar(err, what, total, "records") as bar:
        yield bar.advance


def _told(records: Iterable[Record], on_record: OnRecord) -> Iterator[Record]:
    for record in records:
        yield record
        on_record()


def _say(line: str) -> None:
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _print_json(text: str) -> None:
    if out.is_terminal:
        out.print_json(text)
    else:
        out.file.write(text + "\n")
