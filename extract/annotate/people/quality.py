"""Filters over descriptions: what is too short, in another language, against its label, copied, repeated.

    filters = QualityFilters(header, options_of("mmeverse"), prompts)
    report, flags = examine(iter_records(path), filters)

Every filter is a rule that can be read, none is a model: each is made to be silent where it is not sure.
docs/review.md says what they miss. What is flagged is counted and shown; nothing is changed here but by
`cleaned`, which leaves flagged descriptions out and keeps every record.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, model_validator

from cache.clip import DESCRIPTION_KINDS, Description, DescriptionKind, Record
from cache.errors import SchemaError, near_miss
from cache.labels import LabelField
from cache.manifest import Header
from cache.schema import Model
from extract.annotate.people.contradiction import Contradictions, unquoted

Filter = Literal[
    "length", "language", "contradiction", "copied", "repetition", "shared", "ids", "meta"
]
FILTERS: tuple[Filter, ...] = get_args(Filter)
MEANINGS: dict[Filter, str] = {
    "length": "fewer or more words than its kind has",
    "language": "not in the wanted language",
    "contradiction": "concludes another label than the record has",
    "copied": "repeats words of the prompt",
    "repetition": "says the same again and again",
    "shared": "the same text for many records",
    "ids": "holds an id or a file name of the record",
    "meta": "a refusal, talk about the task, or markup",
}
N_EXAMPLES = 3
_EXCERPT = 160

Flags = dict[int, dict[int, frozenset[Filter]]]
"""Number of the record -> number of its description -> what flagged it."""


@cache
def words_file() -> dict[str, Any]:
    """Return the words that the filters know."""
    path = Path(__file__).with_name("quality_words.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


class QualityOptions(Model):
    """Where the filters draw their lines."""

    language: str | None = "en"
    """The language of all descriptions; None checks none."""
    words: dict[DescriptionKind, tuple[int, int]]
    """Fewest and most words of each kind. In scripts without spaces two characters count as a word."""
    copied_words: int = Field(default=8, ge=3)
    """So many words in a row that are also in a prompt are a copy."""
    max_repeated: float = Field(default=0.3, gt=0, le=1)
    """Share of a text's sequences of three words that stood there before."""
    max_shared: int = Field(default=5, ge=2)
    """The same text for so many records is flagged. Facial expressions are left out: they are made by
    rule, so equal units give equal texts."""

    @model_validator(mode="after")
    def _known(self) -> QualityOptions:
        languages = words_file()["scripts"]
        if self.language is not None and self.language not in languages:
            raise ValueError(
                f"language: no {self.language!r}.{near_miss(self.language, languages)} Allowed: "
                f"{', '.join(languages)}"
            )
        for kind, (fewest, most) in self.words.items():
            if not 0 <= fewest <= most:
                raise ValueError(f"words: {kind} has {fewest} to {most}")
        return self


_WORDS: dict[DescriptionKind, tuple[int, int]] = {
    "visual_expression": (2, 120),
    "visual_objective": (8, 180),
    "audio_tone": (5, 150),
    "multimodal": (15, 220),
}
PRESETS: dict[str, QualityOptions] = {
    "mmeverse": QualityOptions(words=_WORDS),
    # A template of all clues one after another is as long as they are.
    "merr-coarse": QualityOptions(words=_WORDS | {"multimodal": (8, 600)}),
    "merr-fine": QualityOptions(words=_WORDS),
}


def options_of(preset: str, **changes: Any) -> QualityOptions:
    """Return the options of a preset of annotation.

    Args:
        preset: `mmeverse`, `merr-coarse` or `merr-fine`.
        changes: Fields that differ.

    Raises:
        SchemaError: An unknown preset or a value that does not fit.
    """
    if preset not in PRESETS:
        raise SchemaError(
            f"no preset '{preset}' of quality filters.{near_miss(preset, PRESETS)} Allowed: "
            f"{', '.join(PRESETS)}"
        )
    try:
        return QualityOptions.model_validate(PRESETS[preset].model_dump() | changes)
    except ValueError as error:
        raise SchemaError(_first_reason(error)) from None


def _first_reason(error: ValueError) -> str:
    found = getattr(error, "errors", None)
    text = found()[0]["msg"] if callable(found) else str(error)
    return str(text).removeprefix("Value error, ")


class Finding(NamedTuple):
    """One filter about one description."""

    filter: Filter
    why: str


class Example(Model):
    """A flagged description."""

    uid: str
    kind: DescriptionKind
    target: LabelField | None
    why: str
    excerpt: str


class FilterReport(Model):
    """What one filter found."""

    filter: Filter
    n_descriptions: int
    n_records: int
    by_kind: dict[DescriptionKind, int]
    examples: tuple[Example, ...]
    """The first three."""


class QualityReport(Model):
    """What all filters found."""

    n_records: int
    n_descriptions: int
    by_kind: dict[DescriptionKind, int]
    n_flagged: int
    """Descriptions that at least one filter flagged."""
    n_flagged_records: int
    filters: tuple[FilterReport, ...]
    options: QualityOptions
    n_prompts: int
    """Prompt texts that descriptions were compared with."""


_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SENTENCE = re.compile(r"[.!?\u3002\uff01\uff1f]+\s*")
_SCRIPTS = {
    "Latin": "A-Za-z\u00c0-\u024f\u1e00-\u1eff",
    "Han": "\u3400-\u9fff\uf900-\ufaff",
    "Kana": "\u3040-\u30ff",
    "Hangul": "\uac00-\ud7af\u1100-\u11ff",
    "Cyrillic": "\u0400-\u04ff",
    "Arabic": "\u0600-\u06ff",
    "Devanagari": "\u0900-\u097f",
}
_UNSPACED = re.compile(f"[{_SCRIPTS['Han']}{_SCRIPTS['Kana']}]")
_LETTER = re.compile(r"[^\W\d_]")
_FILE_NAME = re.compile(
    r"\b[\w-]+\.(?:mp4|avi|mkv|mov|webm|mpe?g|wav|mp3|flac|jpe?g|png|csv|json)\b", re.IGNORECASE
)
_SLOT = re.compile(r"\{[{%#].*?[#%}]\}", re.DOTALL)
_MARKUP = re.compile(r"[`<>{}\[\]*#]")
_OWN_SCRIPT = 0.8
"""Letters of the wanted language's script, outside quotes."""
_PROSE: tuple[DescriptionKind, ...] = ("visual_objective", "audio_tone", "multimodal")
_PROSE_WORDS, _PROSE_STOP = 15, 0.08
"""Prose of so many words has at least this share of its language's commonest words; English has 0.3-0.5."""
_OTHER_STOP = 0.15


class QualityFilters:
    """The filters that look at one record at a time."""

    def __init__(
        self, header: Header, options: QualityOptions, prompts: Iterable[str] = ()
    ) -> None:
        """Prepare them.

        Args:
            header: Has the label spaces.
            options: Where the lines are drawn.
            prompts: Texts of the prompts that descriptions may have been copied from, slots and all.
                Templates that make descriptions do not belong here.
        """
        self.options = options
        self._contradictions = Contradictions(header, words_file())
        texts = list(prompts)
        self.n_prompts = len(texts)
        n = options.copied_words
        self._copied = {
            sequence
            for text in texts
            for piece in _SLOT.split(text)
            for sequence in _sequences(_words_of(piece), n)
        }
        self._meta = [
            (name, re.compile(pattern, re.IGNORECASE | re.MULTILINE))
            for name, pattern in words_file()["meta"].items()
        ]
        # Without one of these words or characters no pattern can match, and most texts have none.
        self._meta_words = frozenset(words_file()["meta_words"].split())
        stop = {name: frozenset(text.split()) for name, text in words_file()["stop_words"].items()}
        self._own_stop = stop.pop(options.language or "", frozenset())
        self._other_stop = stop
        scripts = words_file()["scripts"].get(options.language or "", [])
        self._is_latin = "Latin" in scripts
        classes = "".join(_SCRIPTS[name] for name in scripts)
        self._own_letter = re.compile(f"[{classes}]") if classes else None

    def check(self, record: Record) -> dict[int, list[Finding]]:
        """Return what is wrong with a record's descriptions, by their number."""
        found: dict[int, list[Finding]] = {}
        ids = _ids_of(record) if record.descriptions else ()
        for number, description in enumerate(record.descriptions):
            findings = list(self._check(record, description, ids))
            if findings:
                found[number] = findings
        return found

    def _check(
        self, record: Record, description: Description, ids: Collection[str]
    ) -> Iterator[Finding]:
        text, kind = description.text, description.kind
        words = _words_of(text)
        checks: tuple[tuple[Filter, Callable[[], str | None]], ...] = (
            ("length", lambda: self._length(kind, text, words)),
            ("language", lambda: self._language(kind, text, words)),
            (
                "contradiction",
                lambda: (
                    self._contradictions.of(record, description) if kind == "multimodal" else None
                ),
            ),
            ("copied", lambda: self._copy(words)),
            ("repetition", lambda: self._repetition(text, words)),
            ("ids", lambda: _leaked(text, ids)),
            ("meta", lambda: self._meta_talk(text, words)),
        )
        for name, check in checks:
            why = check()
            if why is not None:
                yield Finding(name, why)

    def _length(self, kind: DescriptionKind, text: str, words: Sequence[str]) -> str | None:
        limits = self.options.words.get(kind)
        if limits is None:
            return None
        n = len(words)
        if not text.isascii():
            unspaced = len(_UNSPACED.findall(text))
            if unspaced:
                n = len(_WORD.findall(_UNSPACED.sub(" ", text))) + (unspaced + 1) // 2
        if limits[0] <= n <= limits[1]:
            return None
        return f"{n} words; {kind} has {limits[0]} to {limits[1]}"

    def _language(self, kind: DescriptionKind, text: str, words: Sequence[str]) -> str | None:
        if self._own_letter is None:
            return None
        # What somebody says may be quoted in their language.
        may_quote = '"' in text or "'" in text or not text.isascii()
        bare = unquoted(text) if may_quote else text
        if not (self._is_latin and bare.isascii()):
            n_letters = len(_LETTER.findall(bare))
            n_own = len(self._own_letter.findall(bare))
            if n_letters >= 4 and n_own < _OWN_SCRIPT * n_letters:
                share = 1 - n_own / n_letters
                return f"{share:.0%} of the letters are of another script"
        if not self._own_stop:
            return None
        if bare is not text:
            words = _words_of(bare)
        if len(words) < 8:
            return None
        own = len([word for word in words if word in self._own_stop]) / len(words)
        if own >= _OTHER_STOP + 0.1:
            return None
        shares = {
            name: len([word for word in words if word in stop]) / len(words)
            for name, stop in self._other_stop.items()
        }
        name, other = max(shares.items(), key=lambda entry: entry[1], default=("", 0.0))
        if other >= _OTHER_STOP and other > own:
            return f"reads like '{name}': {other:.0%} of its commonest words, {own:.0%} of ours"
        if kind in _PROSE and len(words) >= _PROSE_WORDS and own < _PROSE_STOP:
            return f"only {own:.0%} of the words are common ones of '{self.options.language}'"
        return None

    def _copy(self, words: Sequence[str]) -> str | None:
        if not self._copied:
            return None
        n = self.options.copied_words
        for sequence in _sequences(words, n):
            if sequence in self._copied:
                return f"copied: {sequence}"
        return None

    def _repetition(self, text: str, words: Sequence[str]) -> str | None:
        n = len(words)
        if n < 8:
            return None
        triples = Counter(zip(words, words[1:], words[2:], strict=False))
        repeated = 1 - len(triples) / (n - 2)
        if repeated > self.options.max_repeated:
            triple, times = triples.most_common(1)[0]
            return f"{repeated:.0%} is repeated; '{' '.join(triple)}' stands {times} times"
        if repeated == 0:
            return None
        sentences = Counter(part for part in _SENTENCE.split(text.lower()) if part.count(" ") >= 3)
        sentence, times = max(sentences.items(), key=lambda entry: entry[1], default=("", 0))
        return f"'{_short(sentence, 60)}' stands {times} times" if times > 1 else None

    def _meta_talk(self, text: str, words: Sequence[str]) -> str | None:
        if self._meta_words.isdisjoint(words) and _MARKUP.search(text) is None:
            return None
        bare = unquoted(text)  # "I can't see", somebody says
        for name, pattern in self._meta:
            found = pattern.search(text if name == "holds markup" else bare)
            if found is not None:
                return f"{name}: '{_short(found[0].strip(), 60)}'"
        return None


def examine(records: Iterable[Record], filters: QualityFilters) -> tuple[QualityReport, Flags]:
    """Look at all records, in a stream.

    Args:
        records: In the order that `cleaned` will see again.
        filters: What to look for.

    Returns:
        What was found, and which descriptions are flagged.
    """
    tally = _Tally(filters)
    for record in records:
        tally.add(record)
    return tally.report()


def cleaned(
    records: Iterable[Record], flags: Flags, keep: Collection[Filter] = ()
) -> Iterator[Record]:
    """Yield the records without flagged descriptions; no record is left out.

    Args:
        records: As they were examined.
        flags: What `examine` returned.
        keep: Filters that are reported only: what no other filter flagged stays.
    """
    for row, record in enumerate(records):
        flagged = flags.get(row)
        if not flagged:
            yield record
            continue
        kept = tuple(
            description
            for number, description in enumerate(record.descriptions)
            if not flagged.get(number, frozenset()).difference(keep)
        )
        yield record.model_copy(update={"descriptions": kept})


def n_dropped(flags: Flags, keep: Collection[Filter] = ()) -> int:
    """Return how many descriptions `cleaned` leaves out."""
    return sum(bool(why.difference(keep)) for of in flags.values() for why in of.values())


class _Place(NamedTuple):
    """A description that shares its text with others."""

    row: int
    number: int


class _Tally:
    """What was found so far."""

    def __init__(self, filters: QualityFilters) -> None:
        self._filters = filters
        self._n_records = 0
        self._by_kind: Counter[DescriptionKind] = Counter()
        self._flags: dict[int, dict[int, set[Filter]]] = {}
        self._counts: dict[Filter, Counter[DescriptionKind]] = {name: Counter() for name in FILTERS}
        self._rows: dict[Filter, int] = dict.fromkeys(FILTERS, 0)
        self._examples: dict[Filter, list[Example]] = {name: [] for name in FILTERS}
        # Digest of a text -> its first place; all places, once there is a second one.
        self._first: dict[int, _Place] = {}
        self._places: dict[int, list[_Place]] = {}
        self._shown: dict[int, Example] = {}

    def add(self, record: Record) -> None:
        """Look at one record."""
        row = self._n_records
        self._n_records += 1
        findings = self._filters.check(record)
        seen: set[Filter] = set()
        for number, description in enumerate(record.descriptions):
            self._by_kind[description.kind] += 1
            if description.kind != "visual_expression":
                self._compare(record, description, _Place(row, number))
            for finding in findings.get(number, ()):
                self._flag(finding.filter, row, number, description.kind)
                seen.add(finding.filter)
                if len(self._examples[finding.filter]) < N_EXAMPLES:
                    example = _example(record, description, finding.why)
                    self._examples[finding.filter].append(example)
        for name in seen:
            self._rows[name] += 1

    def _compare(self, record: Record, description: Description, place: _Place) -> None:
        told = f"{description.kind}\0{' '.join(description.text.lower().split())}"
        digest = int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), "big")
        first = self._first.setdefault(digest, place)
        if first is place:
            return
        places = self._places.get(digest)
        if places is None:
            places = self._places[digest] = [first]
            self._shown[digest] = _example(record, description, "")
        places.append(place)

    def _flag(self, name: Filter, row: int, number: int, kind: DescriptionKind) -> None:
        self._flags.setdefault(row, {}).setdefault(number, set()).add(name)
        self._counts[name][kind] += 1

    def report(self) -> tuple[QualityReport, Flags]:
        """Return what was found."""
        rows: set[int] = set()
        for digest, places in self._places.items():
            n = len({place.row for place in places})
            if n < self._filters.options.max_shared:
                continue
            example = self._shown[digest]
            for place in places:
                self._flag("shared", place.row, place.number, example.kind)
                rows.add(place.row)
            if len(self._examples["shared"]) < N_EXAMPLES:
                why = f"the text of {n:,} records"
                self._examples["shared"].append(example.model_copy(update={"why": why}))
        self._rows["shared"] = len(rows)
        flags = {
            row: {number: frozenset(why) for number, why in of.items()}
            for row, of in self._flags.items()
        }
        report = QualityReport(
            n_records=self._n_records,
            n_descriptions=self._by_kind.total(),
            by_kind={kind: self._by_kind[kind] for kind in DESCRIPTION_KINDS},
            n_flagged=sum(map(len, flags.values())),
            n_flagged_records=len(flags),
            filters=tuple(
                FilterReport(
                    filter=name,
                    n_descriptions=self._counts[name].total(),
                    n_records=self._rows[name],
                    by_kind=dict(self._counts[name]),
                    examples=tuple(self._examples[name]),
                )
                for name in FILTERS
            ),
            options=self._filters.options,
            n_prompts=self._filters.n_prompts,
        )
        return report, flags


def _example(record: Record, description: Description, why: str) -> Example:
    return Example(
        uid=record.uid,
        kind=description.kind,
        target=description.target,
        why=why,
        excerpt=_short(description.text, _EXCERPT),
    )


def _short(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _sequences(words: Sequence[str], n: int) -> Iterator[str]:
    for start in range(len(words) - n + 1):
        yield " ".join(words[start : start + n])


def _ids_of(record: Record) -> tuple[str, ...]:
    """Return what names the record and no description may say, in lower case."""
    source = record.uid.partition("/")[2]
    stem = record.media.rpartition("/")[2].rpartition(".")[0]
    named = {record.uid, source, stem, record.parent or "", record.speaker or ""}
    return tuple(name.lower() for name in named if _is_id(name))


def _is_id(name: str) -> bool:
    """Return whether a name is no word or number that a description may well hold."""
    if len(name) < 4 or not any(c.isdigit() for c in name):
        return len(name) >= 5 and ("_" in name or "/" in name)
    return not name.isdigit() or len(name) >= 5


def _leaked(text: str, ids: Collection[str]) -> str | None:
    lowered = text.lower()
    for name in ids:
        if name in lowered and re.search(rf"(?<!\w){re.escape(name)}(?!\w)", lowered):
            return f"holds '{name}'"
    if "." in text and (found := _FILE_NAME.search(text)):
        return f"holds '{found[0]}'"
    return None
