"""`emocache annotate review`, `agreement` and `quality`: what people and filters say of annotations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache.errors import SchemaError, near_miss
from eval.verbs.console import DONE, FINDINGS, err, out, verb

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eval.review.session import ReviewSession
    from extract.annotate.people.quality import Filter
    from extract.annotate.people.review import Rating, Sample, Sampling, Scale

ManifestArgument = Annotated[
    Path, typer.Argument(metavar="MANIFEST", help="Annotated records.", show_default=False)
]


@verb
def review_command(
    manifest: ManifestArgument,
    out_file: Annotated[
        Path,
        typer.Option(
            "--out", metavar="RATINGS", help="File of ratings (.jsonl); it is only appended to."
        ),
    ],
    rater: Annotated[str, typer.Option(help="Who rates; the same name goes on.")],
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, metavar="N", help="Records per corpus.  [default: 50]"),
    ] = None,
    per_label: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Records per label of each corpus, in place of --n."),
    ] = None,
    scale: Annotated[
        str, typer.Option(help="binary: accept or reject. graded: also a score from 0 to 5.")
    ] = "binary",
    target: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Only descriptions of this label field: emotion, ..."),
    ] = None,
    corpus: Annotated[
        list[str] | None, typer.Option(help="Only records of this corpus. Repeatable.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the sample; raters are compared on the same one.")
    ] = 0,
    media_root: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the media, if not where they were indexed."),
    ] = None,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; with another one the network can reach the page."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 0,
) -> int:
    """Rate annotations in a browser: clip, clues and description side by side. Ctrl-C ends it."""
    from cache.manifest import iter_records, read_header
    from eval.review.server import ReviewServer
    from eval.review.session import ReviewSession
    from extract.annotate.people.review import RatingsFile, draw_sample

    sampling = _sampling(n, per_label, target, corpus or [], seed)
    chosen_scale = _scale(scale)
    name = rater.strip()
    if not 0 < len(name) <= 80:
        raise SchemaError(f"--rater {rater!r}: a name of 1 to 80 characters is needed.")
    root = media_root or manifest.parent / read_header(manifest).media_root
    if not root.is_dir():
        raise SchemaError(
            f"the media root {root} is no folder on this machine. Give the folder that the manifest's "
            "media paths start from with --media-root."
        )
    _check_ratings_path(out_file, manifest)
    sample = draw_sample(iter_records(manifest), sampling)
    session = ReviewSession(
        sample, root.resolve(), RatingsFile(out_file), rater=name, scale=chosen_scale
    )
    server = ReviewServer(session, host, port)
    try:
        for line in _opening_lines(sample, session):
            err.print(line, highlight=False, markup=False, soft_wrap=True)
        if not server.is_local:
            err.print(
                "[yellow]remark:[/] others on the network can reach this page; it is not encrypted, and "
                "whoever has the URL can rate."
            )
        out.print(server.url, highlight=False, markup=False, soft_wrap=True)
        out.file.flush()
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        session.close()
    err.print(
        f"{session.n_rated:,} of {len(session):,} items rated by {name} in {out_file}; the same command "
        "goes on",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    return DONE


def _sampling(
    n: int | None, per_label: int | None, target: str | None, corpora: list[str], seed: int
) -> Sampling:
    from cache.labels import LABEL_FIELDS
    from extract.annotate.people.review import PER_CORPUS, Sampling

    if n is not None and per_label is not None:
        raise SchemaError("--n counts per corpus and --per-label per label; give one of them.")
    if target is not None and target not in LABEL_FIELDS:
        raise SchemaError(
            f"--target {target}: no such label field.{near_miss(target, LABEL_FIELDS)} Allowed: "
            f"{', '.join(LABEL_FIELDS)}"
        )
    return Sampling(
        per_corpus=None if per_label is not None else n or PER_CORPUS,
        per_label=per_label,
        seed=seed,
        target=target,
        corpora=tuple(corpora),
    )


def _scale(name: str) -> Scale:
    from extract.annotate.people.review import SCALES

    if name not in SCALES:
        raise SchemaError(
            f"--scale {name}: no such scale.{near_miss(name, SCALES)} Allowed: {', '.join(SCALES)}"
        )
    return name


def _check_ratings_path(path: Path, manifest: Path) -> None:
    if path.is_dir():
        raise SchemaError(f"--out {path}: is a folder. Give a file (.jsonl).")
    if path.resolve() == manifest.resolve():
        raise SchemaError(f"--out {path}: is the manifest. Give a file of its own (.jsonl).")


def _opening_lines(sample: Sample, session: ReviewSession) -> list[str]:
    corpora: dict[str, tuple[int, int, int]] = {}
    for s in sample.strata:
        n, of, labels = corpora.get(s.corpus, (0, 0, 0))
        corpora[s.corpus] = n + s.n_sampled, of + s.n_records, labels + (s.n_sampled > 0)
    lines = [
        f"{corpus}: {n:,} of {of:,} described records, {labels} labels"
        for corpus, (n, of, labels) in corpora.items()
    ]
    if sample.n_undescribed:
        lines.append(f"{sample.n_undescribed:,} records have no description and are left out")
    lines.append(
        f"{session.n_rated:,} of {len(session):,} items are rated by {session.rater}; open this page, "
        "and end with Ctrl-C:"
    )
    return lines


@verb
def agreement_command(
    ratings: Annotated[
        list[Path], typer.Argument(metavar="RATINGS...", help="Files of ratings (.jsonl).")
    ],
    manifest: Annotated[
        Path | None,
        typer.Option(
            help="Leave out ratings of texts that this manifest no longer has.", metavar="MANIFEST"
        ),
    ] = None,
    accept_from: Annotated[
        int | None,
        typer.Option(metavar="N", help="In files with numbers: from N on an aspect is accepted."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Say how often raters accept, how well they agree (Cohen's kappa), and their mean scores."""
    from eval.review.view import agreement_lines, agreement_tables
    from extract.annotate.people.agreement import agreement
    from extract.annotate.people.review import read_ratings

    given: Sequence[Rating] = [rating for path in ratings for rating in read_ratings(path)]
    if not given:
        raise SchemaError(f"no rating in {', '.join(map(str, ratings))}.")
    current = None
    if manifest is not None:
        from cache.manifest import iter_records
        from extract.annotate.people.review import current_items

        current = current_items(iter_records(manifest), given)
    found = agreement(given, current, accept_from)
    if as_json:
        out.file.write(found.model_dump_json(indent=2) + "\n")
        return DONE
    for table in agreement_tables(found):
        out.print(table)
    for line in agreement_lines(found):
        out.print(line, highlight=False, markup=False, soft_wrap=True)
    return DONE


@verb
def quality_command(
    manifest: ManifestArgument,
    out_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="CLEANED",
            help="Manifest to write (.parquet): every record, without the flagged descriptions.",
        ),
    ] = None,
    keep_flagged: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILTER",
            help="Report what this filter flags, but do not drop it. Repeatable; all drops nothing.",
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Whose lengths count: mmeverse, merr-coarse or merr-fine.")
    ] = "mmeverse",
    language: Annotated[
        str, typer.Option(help="Of the descriptions: en, zh, de, ...; any checks none.")
    ] = "en",
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of your own prompt files, if you used them."),
    ] = None,
    max_shared: Annotated[
        int | None,
        typer.Option(
            min=2, metavar="N", help="The same text for N records is flagged.  [default: 5]"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> int:
    """Flag descriptions that are too short, off-language, against their label, copied, repeated, ..."""
    from cache.manifest import ManifestWriter, iter_records, read_header, relative_root
    from cache.place import is_url
    from eval.review.view import quality_example_lines, quality_table
    from extract.annotate.people.quality import (
        QualityFilters,
        cleaned,
        examine,
        n_dropped,
        options_of,
    )

    keep = _filters(keep_flagged or [])
    changes: dict[str, Any] = {"language": None if language == "any" else language}
    if max_shared is not None:
        changes["max_shared"] = max_shared
    options = options_of(preset, **changes)
    if out_file is not None:
        if out_file.is_dir():
            raise SchemaError(f"--out {out_file}: is a folder. Give a file (.parquet).")
        if out_file.resolve() == manifest.resolve():
            raise SchemaError(f"--out {out_file}: is the manifest that is read. Give another file.")
    header = read_header(manifest)
    filters = QualityFilters(header, options, _prompt_texts(prompts))
    report, flags = examine(iter_records(manifest), filters)
    if as_json:
        out.file.write(report.model_dump_json(indent=2) + "\n")
    else:
        out.print(quality_table(report))
        for line in quality_example_lines(report):
            out.print(line, highlight=False, markup=False, soft_wrap=True)
    if out_file is not None:
        root = (manifest.parent / header.media_root).resolve()
        moved = header.model_copy(
            update={"media_root": relative_root(root, out_file)}
            if not is_url(header.media_root)
            else {}
        )
        with ManifestWriter(out_file, moved) as writer:
            for record in cleaned(iter_records(manifest), flags, keep):
                writer.write(record)
        n = n_dropped(flags, keep)
        err.print(
            f"{out_file}: {report.n_records:,} records, {report.n_descriptions - n:,} descriptions; "
            f"{n:,} flagged ones dropped, {report.n_flagged - n:,} flagged ones kept",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
    return FINDINGS if report.n_flagged else DONE


def _filters(names: list[str]) -> frozenset[Filter]:
    from extract.annotate.people.quality import FILTERS

    asked = [part.strip() for name in names for part in name.split(",")]
    for name in asked:
        if name not in (*FILTERS, "all"):
            raise SchemaError(
                f"--keep-flagged {name}: no such filter.{near_miss(name, FILTERS)} Allowed: all, "
                f"{', '.join(FILTERS)}"
            )
    return frozenset(name for name in FILTERS if name in asked or "all" in asked)


def _prompt_texts(folder: Path | None) -> list[str]:
    """Return the texts that models were asked with; templates, which make descriptions, are none."""
    from extract.annotate.prompts import load_prompt, prompt_names

    names: list[str | Path] = list(prompt_names())
    if folder is not None:
        if not folder.is_dir():
            raise SchemaError(
                f"--prompts {folder}: no such folder. Give one of prompt files (.yaml)."
            )
        names += sorted(folder.glob("*.y*ml"))
    prompts = [load_prompt(name) for name in names]
    texts = [
        text
        for prompt in prompts
        if prompt.role != "template"
        for text in (prompt.file.text, prompt.file.system)
        if text
    ]
    return list(dict.fromkeys(texts))
