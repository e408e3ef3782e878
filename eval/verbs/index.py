"""`emocache index ...`: a folder, a known corpus or a user's own dataset to a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from cache.errors import SchemaError, near_miss
from eval.verbs.console import DONE, FINDINGS, err, out, verb

if TYPE_CHECKING:
    from collections.abc import Callable

    from extract.corpora.row import CorpusRow

T = TypeVar("T", bound=str)


@verb
def index_command(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CORPUS] DIR",
            help="A folder of media files; or a corpus (--list) and its dataset's folder.",
        ),
    ] = None,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Manifest to write (.parquet).")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Table with file or uid, and label, sentiment, intent, subtitle, split, description."
        ),
    ] = None,
    label_space: Annotated[
        str, typer.Option(help="Allowed labels in native order, comma-separated.")
    ] = "",
    corpus: Annotated[
        str | None, typer.Option(help="First part of every uid; default the folder's name.")
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(help="Your own dataset: a YAML file that says what its columns mean."),
    ] = None,
    media: Annotated[
        Path | None,
        typer.Option(help="Folder of a dataset's media files; without it, labels only."),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="How the dataset lies on disk; default: it is found.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Of subtitles to which the mapping gives none: en, zh, ...")
    ] = None,
    on_unknown: Annotated[
        str, typer.Option(help="Labels outside the space: error, drop the record, or map.")
    ] = "error",
    map_label: Annotated[
        list[str] | None,
        typer.Option(metavar="OLD=NEW", help="Take another label; may be given several times."),
    ] = None,
    on_missing: Annotated[
        str, typer.Option(help="Records without a media file: error, drop, or keep without media.")
    ] = "error",
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Show what a mapping makes of a dataset; write nothing."),
    ] = False,
    list_corpora: Annotated[
        bool, typer.Option("--list", help="List the known corpora, and end.")
    ] = False,
) -> int:
    """Make a manifest of a folder of media files, a known corpus, or your own dataset."""
    if list_corpora:
        return _list()
    given = list(what or ())
    row, folder = _meant(given, mapping)
    _only(row is None, {"--labels": labels, "--label-space": label_space, "--corpus": corpus})
    _only(
        row is not None,
        {
            "--media": media,
            "--layout": layout,
            "--language": language,
            "--map-label": map_label,
            "--preview": preview,
            "--on-unknown": on_unknown != "error",
            "--on-missing": on_missing != "error",
        },
    )
    if out_file is None and not preview:
        raise SchemaError("nowhere to write. Give --out FILE.parquet, or --preview with a mapping.")
    if row is None:
        assert out_file is not None
        return _index_folder(folder, out_file, labels, label_space, corpus)

    from extract.corpora.preview import preview as shown
    from extract.corpora.preview import summary
    from extract.index import index_corpus, write

    with _bars() as (on_files, on_file):
        found = index_corpus(
            row,
            folder,
            out_file or folder / "preview.parquet",
            layout=layout,
            media=media,
            on_unknown=_one_of("--on-unknown", on_unknown, ("error", "drop", "map")),
            label_map=_label_map(map_label or ()),
            on_missing=_one_of("--on-missing", on_missing, ("error", "drop", "keep")),
            language=language,
            on_files=on_files,
            on_file=on_file,
        )
    code = DONE if found.report.is_clean else FINDINGS
    if preview:
        out.print(shown(found))
        out.print("preview: nothing was written", highlight=False)
        return code
    assert out_file is not None
    write(out_file, found)
    out.print(summary(found))
    out.print(f"{len(found.records):,} records in {out_file}", highlight=False, soft_wrap=True)
    return code


def _meant(given: Sequence[str], mapping: Path | None) -> tuple[CorpusRow | None, Path]:
    """Return the corpus that the arguments mean, if any, and the folder."""
    from extract.corpora.registry import corpus_ids, corpus_row, load_row

    if mapping is not None:
        if len(given) != 1:
            raise SchemaError(
                f"--mapping takes one folder (got {' '.join(given) or 'none'}). "
                "emocache index --mapping my.yaml DIR --out FILE"
            )
        return load_row(mapping), Path(given[0])
    if len(given) == 2:
        return corpus_row(given[0]), Path(given[1])
    if len(given) != 1:
        raise SchemaError(
            f"give a folder, or a corpus and its folder (got {' '.join(given) or 'nothing'}). "
            "emocache index DIR --out FILE; emocache index CORPUS DIR --out FILE; the corpora are "
            "shown by emocache index --list"
        )
    name = given[0]
    if name in corpus_ids():
        folder = f"; if you mean the folder of that name, write ./{name}"
        raise SchemaError(
            f"{name!r} is a corpus: give the folder of its files, too: emocache index {name} DIR --out "
            f"FILE{folder if Path(name).is_dir() else ''}"
        )
    return None, Path(name)


def _only(is_so: bool, options: dict[str, object]) -> None:
    """Refuse options of the other kind of indexing."""
    found = [name for name, value in options.items() if value and not is_so]
    if found:
        kind = "a folder of media files" if "--labels" in options else "a corpus or --mapping"
        raise SchemaError(f"{', '.join(found)}: only for {kind}. See emocache index --help")


def _one_of(option: str, value: str, allowed: tuple[T, ...]) -> T:
    for name in allowed:
        if name == value:
            return name
    raise SchemaError(
        f"{option} {value!r} is unknown.{near_miss(value, allowed)} Allowed: {', '.join(allowed)}."
    )


def _label_map(given: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in given:
        old, equals, new = (part.strip() for part in item.partition("="))
        if not (old and equals and new):
            raise SchemaError(f"--map-label {item!r} is not OLD=NEW. For example joy=happy.")
        found[old] = new
    return found


@contextmanager
def _bars() -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Give two functions: one opens a progress bar when the number of files is known, one advances it."""
    from eval.progress import Bar, progress_bar

    with ExitStack() as stack:
        bars: list[Bar] = []

        def on_files(n: int) -> None:
            bars.append(stack.enter_context(progress_bar(err, "reading media", n, "files")))

        yield on_files, lambda n: bars[-1].advance(n)


def _index_folder(
    folder: Path, out_file: Path, labels: Path | None, label_space: str, corpus: str | None
) -> int:
    from cache.labels import LABEL_FIELDS
    from cache.manifest import write_manifest
    from extract.index import index_folder

    with _bars() as (on_files, on_file):
        manifest, report = index_folder(
            folder,
            out_file,
            labels_csv=labels,
            label_space=[label for label in label_space.split(",") if label.strip()],
            corpus=corpus,
            on_files=on_files,
            on_file=on_file,
        )
    write_manifest(out_file, manifest)
    for line in report.suspicious:
        err.print(f"not readable as media, extraction will mark it failed: {line}", markup=False)
    for line in report.left_out:
        err.print(f"left out: {line}", markup=False)
    splits = ", ".join(f"{name or 'no split'} {n}" for name, n in manifest.splits.items())
    out.print(f"{len(manifest)} records ({splits}) in {out_file}", highlight=False)
    for field in LABEL_FIELDS:
        space = manifest.header.space(report.corpus, field)
        if space is not None:
            name = "labels" if field == "emotion" else field
            out.print(f"{name}: {', '.join(space.labels)}", highlight=False)
    return DONE if report.is_clean else FINDINGS


def _list() -> int:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from extract.corpora.registry import corpus_ids, corpus_row

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("corpus", "title", "layouts", "licence"):
        table.add_column(name, no_wrap=name == "corpus", overflow="fold")
    for name in corpus_ids():
        row = corpus_row(name)
        table.add_row(name, row.title, ", ".join(row.layouts), row.licence)
    out.print(table)
    return DONE
