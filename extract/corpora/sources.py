"""The files of a dataset: which layout they are, and their rows with those of joined files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from cache.errors import ManifestError, SchemaError, near_miss
from extract.corpora.findings import MappingReport, Places
from extract.corpora.reading import relative
from extract.corpora.registry import reader
from extract.corpora.row import Cell, CorpusRow, Join, Layout, Source, Template
from extract.corpora.templates import Render, columns_of, compile_template
from extract.corpora.values import Row

_FIRST_ROWS = 1000
"""Rows whose columns together are taken for those of the file; objects may leave some out."""

Found = tuple[tuple[str, ...], str, dict[str, str], str]
"""Columns of the file, place, row, file."""


def files_of(source: Source, folder: Path) -> dict[str, list[Path]]:
    """Return the files of each pattern of a source, sorted.

    Raises:
        ManifestError: A pattern or a link leads out of the dataset's folder.
    """
    return {pattern: list(_matching(pattern, folder)) for pattern in source.files}


def _matching(pattern: str, folder: Path, *, any_one: bool = False) -> list[Path]:
    parts = PurePosixPath(pattern).parts
    if ".." in parts or PurePosixPath(pattern).is_absolute() or "\\" in pattern:
        raise ManifestError(
            f"files: {pattern!r} leads out of the dataset's folder, or has backslashes. Patterns are "
            "relative to the folder, with forward slashes; give the folder that holds all files."
        )
    if not parts:
        return [folder]
    # Pythons differ in what they make of these: 3.13 takes both and 3.11 neither, say.
    if parts[-1] == "**" or any("**" in part and part != "**" for part in parts):
        raise _no_pattern(pattern, "'**' stands for folders, alone between slashes")
    try:
        files = (p for p in folder.glob(pattern) if not p.name.startswith("."))
        chosen = list(itertools.islice(files, 1)) if any_one else sorted(files)
    except ValueError as error:
        raise _no_pattern(pattern, str(error)) from None
    root = folder.resolve()
    for path in chosen:
        # Only a link can lead out of the folder.
        if _is_linked(path, folder) and not path.resolve().is_relative_to(root):
            raise ManifestError(
                f"{relative(path, folder)}: a link that leaves the dataset's folder {folder}. Copy the file "
                "into it, or give the folder that holds it."
            )
    return chosen


def _no_pattern(pattern: str, reason: str) -> ManifestError:
    return ManifestError(
        f"files: {pattern!r} is not a pattern ({reason}). For example a.csv, *.csv, */labels.txt, **/*.mp4."
    )


def _is_linked(path: Path, folder: Path) -> bool:
    while path != folder and path != path.parent:
        if path.is_symlink():
            return True
        path = path.parent
    return False


def find_layout(row: CorpusRow, folder: Path, wanted: str | None = None) -> str:
    """Return the layout that a folder has: the first whose files are all there.

    Raises:
        ManifestError: None fits, with what each of them misses; or there is no such folder.
        SchemaError: The corpus has no layout of the wanted name.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise ManifestError(f"{folder}: {kind}. Give the folder that holds the dataset's files.")
    if wanted is not None and wanted not in row.layouts:
        raise SchemaError(
            f"{row.id} has no layout {wanted!r}.{near_miss(wanted, row.layouts)} There are: "
            f"{', '.join(row.layouts)}."
        )
    missing: dict[str, list[str]] = {}
    for name, layout in row.layouts.items():
        if wanted is not None and name != wanted:
            continue
        missing[name] = [
            pattern
            for source in (*layout.sources, *layout.joins)
            if not source.optional
            for pattern in source.files
            if not _matching(pattern, folder, any_one=True)
        ]
        if not missing[name]:
            return name
    raise ManifestError(_nothing_fits(row, folder, missing))


def _nothing_fits(row: CorpusRow, folder: Path, missing: Mapping[str, list[str]]) -> str:
    names = [p.name for p in itertools.islice(folder.iterdir(), 2000)]
    parts = []
    for name, patterns in missing.items():
        hint = near_miss(patterns[0], names)
        more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
        parts.append(
            f"'{name}' ({row.layouts[name].about}) misses {', '.join(patterns[:3])}{more}{hint}"
        )
    text = f"{folder}: no layout of {row.id} fits. {'; '.join(parts)}."
    for patterns in missing.values():
        inner = next((p for p in folder.glob(f"*/{patterns[0]}")), None)
        if inner is not None:
            depth = len(PurePosixPath(patterns[0]).parts)
            return f"{text} {inner.parents[depth - 1]} has the first: give that folder."
    return f"{text} The folder has: {', '.join(sorted(names)[:8]) or 'nothing'}."


def rows_of(layout: Layout, folder: Path, report: MappingReport) -> Iterator[Found]:
    """Yield the rows of a layout's sources, completed by the joined files.

    Raises:
        ManifestError: A file that is not optional is missing, cannot be read, or lacks a column.
    """
    joins = [_Joined(join, folder, layout) for join in layout.joins]
    for joined in joins:
        report.without_partner[joined.name] = joined.missed
    for source in layout.sources:
        for pattern, files in files_of(source, folder).items():
            if not files and not source.optional:
                raise ManifestError(
                    f"{folder}: no file matches {pattern!r}. Give a complete copy, or mark the source "
                    "`optional: true`."
                )
            for file in files:
                yield from _rows_of_file(source, file, folder, joins, report)
    _tell_of_absent(layout, report)


def _tell_of_absent(layout: Layout, report: MappingReport) -> None:
    """Tell of columns that are named as one of several, and that no file has: perhaps misspelt."""
    absent = sorted(c for c in _needed(layout) if c not in report.columns and c != "id")
    if absent:
        hints = [near_miss(c, report.columns) for c in absent]
        named = ", ".join(f"{c!r}{hint}" for c, hint in zip(absent, hints, strict=True))
        report.notes.append(f"named by the mapping as one of several, but in no file: {named}")


def _rows_of_file(
    source: Source, file: Path, folder: Path, joins: list[_Joined], report: MappingReport
) -> Iterator[Found]:
    name = relative(file, folder)
    if len(report.read) < 100:
        report.read.append(name)
    columns, rows = _peeked(source, file, folder)
    complete = list(columns)
    keys: list[tuple[_Joined, Render]] = []
    for joined in joins:
        keys.append((joined, joined.key_of(complete, name)))
        complete += [c for c in joined.columns if c not in complete]
    own = dict.fromkeys(complete)
    report.columns.update(own)
    allowed = tuple(own)
    extra = source.set
    for where, row in rows:
        report.n_rows += 1
        if extra:
            row.update(extra)
        for joined, key in keys:
            joined.complete(row, key(row), where)
        yield allowed, where, row, name


def _peeked(source: Source, file: Path, folder: Path) -> tuple[list[str], Iterator[Row]]:
    """Return the columns of a file, from its first rows, and all its rows."""
    rows = iter(reader(source.reader)(file, folder, source.options))
    first = list(itertools.islice(rows, _FIRST_ROWS))
    columns: dict[str, None] = {}
    for _, row in first:
        columns.update(dict.fromkeys(row))
    columns.update(dict.fromkeys((*source.set, *source.may_lack)))
    return list(columns), itertools.chain(first, rows)


class _Joined:
    """The rows of joined files by their key; only the columns that the mapping may name are kept."""

    def __init__(self, join: Join, folder: Path, layout: Layout) -> None:
        """Read the files; raises a ManifestError for a key that stands twice with other values."""
        self._join = join
        self.name = ", ".join(join.files)
        self.missed = Places()
        self.columns: dict[str, None] = dict.fromkeys(join.prefix + c for c in join.may_lack)
        self._rows: dict[str, dict[str, str]] = {}
        self._needed = _needed(layout)
        places: dict[str, str] = {}
        for pattern, files in files_of(join, folder).items():
            if not files and not join.optional:
                raise ManifestError(
                    f"{folder}: no file matches {pattern!r}, which completes the rows. Give a complete "
                    "copy, or mark the join `optional: true`."
                )
            for file in files:
                self._read(file, folder, places)
        if join.optional and not self._rows:
            # Nobody knows which columns the files would have had: the mapping may name any of them.
            known = {c for s in layout.sources for c in (*s.set, *s.may_lack)}
            self.columns.update(
                dict.fromkeys(
                    c for c in sorted(self._needed) if c.startswith(join.prefix) and c not in known
                )
            )

    def _read(self, file: Path, folder: Path, places: dict[str, str]) -> None:
        join, name = self._join, relative(file, folder)
        columns, rows = _peeked(join, file, folder)
        key_of = compile_template(join.on, columns, f"{name}, on")
        self.columns.update(dict.fromkeys(join.prefix + c for c in columns))
        for where, row in rows:
            row.update(join.set)
            key = key_of(row)
            if not key:
                continue
            kept = {join.prefix + c: v for c, v in row.items() if join.prefix + c in self._needed}
            before = self._rows.setdefault(key, kept)
            first = places.setdefault(key, where)
            if before is not kept and before != kept:
                raise ManifestError(
                    f"{where}: the key {key!r} stands twice among the joined rows, first in {first}, with "
                    f"other values. Correct the file, or the join's `on` ({join.on!r})."
                )

    def key_of(self, columns: list[str], file: str) -> Render:
        """Return the function that gives a source's row its key."""
        return compile_template(self._join.equals, columns, f"{file}, equals")

    def complete(self, row: dict[str, str], key: str, where: str) -> None:
        """Add the joined columns to a row, except those that it has itself."""
        found = self._rows.get(key) if key else None
        if found is None:
            if self._rows:
                self.missed.add(f"{where} (key {key!r})")
            return
        for column, value in found.items():
            row.setdefault(column, value)


def _needed(layout: Layout) -> frozenset[str]:
    """Return every column that a layout names."""
    f = layout.fields
    found = set(layout.where)
    templates: list[Template] = [f.id, *f.media]
    templates += [t for t in (f.parent, f.speaker, f.person, f.language) if t is not None]
    templates += [*f.split_axes.values(), *f.action_units.values()]
    for rule in f.subtitles:
        templates += [rule.text, rule.language or ""]
    templates += [rule.text for rule in f.descriptions]
    templates += [join.equals for join in layout.joins]
    for name in type(f).model_fields:
        cell = getattr(f, name)
        if isinstance(cell, Cell):
            templates.append(cell.text)
    for template in templates:
        found.update(columns_of(template))
    return frozenset(found)
