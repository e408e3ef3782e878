"""The headers of several manifests as one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from cache.errors import ManifestError
from cache.labels import LABEL_FIELDS, LabelSpace
from cache.manifest import CorpusNote, Header


def merge_headers(parts: Sequence[tuple[Path, Header, Collection[str]]], media_root: str) -> Header:
    """Return one header for all: each corpus keeps its label spaces and scales.

    Args:
        parts: Each manifest's path, header, and the corpora of its records.
        media_root: Of the new header.

    Raises:
        ManifestError: Two manifests disagree on a corpus; says in what.
    """
    spaces: dict[str, tuple[Path, LabelSpace]] = {}
    scales: dict[str, tuple[Path, tuple[float, float]]] = {}
    notes: dict[str, CorpusNote] = {}
    for path, header, corpora in parts:
        for key, space in _spaces(header, corpora):
            other, known = spaces.setdefault(key, (path, space))
            differences = list(_differences(known, space))
            if differences:
                raise ManifestError(
                    f"the label spaces '{key}' of {other} and {path} differ: {'; '.join(differences)}. "
                    "One corpus has one space for a field: index both with the same row or mapping, or "
                    "give one of them another corpus name. Nothing was written."
                )
        for key, scale in header.scales.items():
            other, range_ = scales.setdefault(key, (path, scale))
            if range_ != scale:
                raise ManifestError(
                    f"the scales '{key}' of {other} and {path} differ: {_range(range_)} and "
                    f"{_range(scale)}. Index one of them again. Nothing was written."
                )
        for corpus, note in header.corpora.items():
            notes[corpus] = _joined(notes[corpus], note) if corpus in notes else note
    return Header(
        media_root=media_root,
        label_spaces={key: space for key, (_, space) in spaces.items()},
        scales={key: scale for key, (_, scale) in scales.items()},
        corpora=notes,
    )


def _spaces(header: Header, corpora: Collection[str]) -> Iterator[tuple[str, LabelSpace]]:
    """Yield the spaces by corpus: one without a corpus would be that of the other manifests, too."""
    for key, space in header.label_spaces.items():
        if "/" in key:
            yield key, space
    for corpus in sorted(corpora):
        for field in LABEL_FIELDS:
            space_or_none = header.space(corpus, field)
            if space_or_none is not None and f"{corpus}/{field}" not in header.label_spaces:
                yield f"{corpus}/{field}", space_or_none


def _differences(first: LabelSpace, second: LabelSpace) -> Iterator[str]:
    """Yield what distinguishes two spaces, in words; their names do not count."""
    only = [label for label in first.labels if label not in second.labels]
    if only:
        yield f"only the first has {', '.join(only)}"
    only = [label for label in second.labels if label not in first.labels]
    if only:
        yield f"only the second has {', '.join(only)}"
    if set(first.labels) == set(second.labels) and first.labels != second.labels:
        orders = [", ".join(space.labels) for space in (first, second)]
        yield f"the order is {orders[0]} in the first and {orders[1]} in the second"
    aliases = [
        alias
        for alias in {**first.aliases, **second.aliases}
        if first.aliases.get(alias) != second.aliases.get(alias)
    ]
    if aliases:
        yield f"they read {_quoted(aliases)} differently"
    if first.open != second.open:
        yield f"only the {'first' if first.open else 'second'} takes other words"


def _joined(first: CorpusNote, second: CorpusNote) -> CorpusNote:
    sources = dict.fromkeys(note.source for note in (first, second) if note.source)
    return CorpusNote(
        title=first.title or second.title,
        licence=first.licence or second.licence,
        source="; ".join(sources) or None,
    )


def _range(scale: tuple[float, float]) -> str:
    return f"{scale[0]:g} to {scale[1]:g}"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
