"""What stands in two splits: clips, dialogues, speakers, and clips that look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cache.clip import Record
from cache.schema import Model
from extract.corpora.findings import SHOWN
from extract.corpora.row import CorpusRow

_MIN_TWIN_CHARS = 12
"""A shorter subtitle ("Yeah.") is likely to be said twice."""


class Finding(Model):
    """Something about a corpus that a reader should know."""

    kind: Literal[
        "clip", "parent", "speaker", "twin", "copy", "id", "label", "subtitle", "media", "row"
    ]
    severity: Literal["finding", "note"]
    """A finding is wrong until somebody explains it; a note is worth knowing."""
    what: str
    n: int
    """How many."""
    examples: tuple[str, ...] = ()
    """The first ten."""
    reason: str | None = None
    """Why it is so, as the corpus's row knows it."""


Places = dict[str, str]
"""Split -> the first uid there."""


@dataclass
class Leaks:
    """Collects where things stand, record by record."""

    clips: dict[bytes, Places] = field(default_factory=dict)
    copies: dict[bytes, int] = field(default_factory=dict)
    """Clip -> records of the split that has most."""
    parents: dict[tuple[str, str], Places] = field(default_factory=dict)
    speakers: dict[tuple[str, str], Places] = field(default_factory=dict)
    twins: dict[tuple[str, float], dict[str, tuple[str, bytes]]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Look at one record. Records without split are in none, so they leak nothing."""
        corpus, split, clip = record.corpus, record.split, record.clip
        if clip is not None:
            digest = bytes.fromhex(clip.sha256)
            self.copies[digest] = self.copies.get(digest, 0) + 1
        if split is None:
            return
        if record.parent is not None:
            self.parents.setdefault((corpus, record.parent), {}).setdefault(split, record.uid)
        if record.speaker is not None:
            self.speakers.setdefault((corpus, record.speaker), {}).setdefault(split, record.uid)
        if clip is None:
            return
        self.clips.setdefault(digest, {}).setdefault(split, record.uid)
        text = (record.subtitle() or "").strip().casefold()
        if clip.duration_s is not None and len(text) >= _MIN_TWIN_CHARS:
            key = (text, round(clip.duration_s, 2))
            self.twins.setdefault(key, {}).setdefault(split, (record.uid, digest))

    def findings(self, row_of: Callable[[str], CorpusRow | None]) -> Iterator[Finding]:
        """Yield what was found."""
        yield from self._clips(row_of)
        yield from self._things("parent", "dialogue, session or source video", self.parents, row_of)
        yield from self._things("speaker", "speaker", self.speakers, row_of)
        looks = [
            _line({split: uid for split, (uid, _) in places.items()})
            for places in self.twins.values()
            if len({digest for _, digest in places.values()}) > 1
        ]
        if looks:
            yield Finding(
                kind="twin",
                severity="note",
                what="other bytes, but the same subtitle and the same length in two splits: perhaps one "
                "clip, cut or encoded twice",
                n=len(looks),
                examples=tuple(looks[:SHOWN]),
            )
        n_copies = sum(n > 1 for n in self.copies.values())
        if n_copies:
            yield Finding(
                kind="copy",
                severity="note",
                what="clips stand in several records; `emocache corpus dedupe` leaves one",
                n=n_copies,
            )

    def _clips(self, row_of: Callable[[str], CorpusRow | None]) -> Iterator[Finding]:
        """Yield one finding for each set of corpora and splits."""
        found: dict[tuple[str, ...], list[Places]] = defaultdict(list)
        for places in self.clips.values():
            if len(places) > 1:
                pair = (f"{split} ({uid.partition('/')[0]})" for split, uid in places.items())
                found[tuple(sorted(pair))].append(places)
        for where, cases in sorted(found.items()):
            corpora = {uid.partition("/")[0] for uid in cases[0].values()}
            yield Finding(
                kind="clip",
                severity="finding",
                what=f"the same clip, byte for byte, in {' and '.join(where)}",
                n=len(cases),
                examples=tuple(_line(places) for places in cases[:SHOWN]),
                reason=_about_each_other(corpora, row_of),
            )

    def _things(
        self,
        kind: Literal["parent", "speaker"],
        called: str,
        places_of: Mapping[tuple[str, str], Places],
        row_of: Callable[[str], CorpusRow | None],
    ) -> Iterator[Finding]:
        found: dict[str, list[str]] = defaultdict(list)
        for (corpus, name), places in places_of.items():
            if len(places) > 1:
                found[corpus].append(f"{name}: {_line(places)}")
        for corpus, lines in sorted(found.items()):
            row = row_of(corpus) if kind == "speaker" else None
            reason = (row.expected.shared_speakers or None) if row is not None else None
            yield Finding(
                kind=kind,
                severity="finding" if reason is None else "note",
                what=f"{corpus}: the same {called} in two splits",
                n=len(lines),
                examples=tuple(lines[:SHOWN]),
                reason=reason,
            )


def _line(places: Places) -> str:
    return ", ".join(f"{split}: {uid}" for split, uid in sorted(places.items()))


def _about_each_other(corpora: set[str], row_of: Callable[[str], CorpusRow | None]) -> str | None:
    """Return what one corpus's row knows of another one here."""
    for corpus in sorted(corpora):
        row = row_of(corpus)
        for text in row.expected.known if row is not None else ():
            if any((other := row_of(name)) and other.title in text for name in corpora - {corpus}):
                return text
    return None
