"""What people say about annotations: which records they look at, and the file of their ratings.

A sample is drawn per corpus and label, and depends on the seed and the uids alone. An item is one record
with the texts that are judged; its digest stands for these texts, so that a description that was made
anew is another item. Ratings are JSON lines that are only ever appended; the last one of a rater about an
item counts. What follows from them is in `extract.annotate.people.agreement`.
"""

from __future__ import annotations

import fcntl
import hashlib
import heapq
import logging
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from cache.clip import DescriptionKind, Record
from cache.errors import SchemaError, near_miss
from cache.files import fsync_folder
from cache.labels import LABEL_FIELDS, LabelField
from cache.schema import Model, canonical_json, decode_json

logger = logging.getLogger(__name__)

Aspect = Literal["visual", "audio", "text", "reasoning", "label"]
"""What is judged: the clues by their sense, how they are brought together, and what follows from it."""
ASPECTS: tuple[Aspect, ...] = get_args(Aspect)
Scale = Literal["binary", "graded"]
"""`binary`: accept or reject each aspect. `graded`: also a score of the description as a whole."""
SCALES: tuple[Scale, ...] = get_args(Scale)
Verdict = Literal["accept", "reject"]
MAX_SCORE = 5
"""Of the graded scale, which starts at 0 (Table 9 of the predecessor)."""
PER_CORPUS = 50
"""Records per corpus unless told otherwise: as many as the paper's user study looked at."""
_NO_LABEL = "(no label)"
_MAX_LINE_BYTES = 64 * 1024
_LINE_HEAD = b'{"schema_version":1,"rater":'


# ---------------------------------------------------------------------------- what is looked at


class ReviewItem(Model):
    """A record as a rater sees it: the clip, the clues, the label and the description made of them."""

    uid: str
    corpus: str
    media: str
    target: LabelField | None
    """The label field that the description explains; None if the description does not say."""
    label: str | None
    """What was inferred: one label, or several with commas."""
    subtitles: tuple[tuple[str | None, str, str], ...]
    """Language, origin, text."""
    clues: tuple[tuple[DescriptionKind, str], ...]
    """Kind and text of every clue; a kind may occur more than once."""
    description: str
    writer: str | None
    """The model that wrote the description."""
    digest: str
    """Of all texts that are judged: 64 hexadecimal digits."""

    @property
    def aspects(self) -> tuple[Aspect, ...]:
        """What there is to judge; a clip without sound has no audio clue."""
        kinds = {kind for kind, _ in self.clues}
        there: dict[Aspect, bool] = {
            "visual": bool(kinds & {"visual_expression", "visual_objective"}),
            "audio": "audio_tone" in kinds,
            "text": bool(self.subtitles),
            "reasoning": True,
            "label": self.label is not None,
        }
        return tuple(aspect for aspect in ASPECTS if there[aspect])


def review_item(record: Record, target: LabelField | None = None) -> ReviewItem | None:
    """Return what a rater sees of a record.

    Args:
        record: The record.
        target: The label field whose description is judged; None takes the first description.

    Returns:
        None if the record has no such description.
    """
    made = next(
        (
            d
            for d in record.descriptions
            if d.kind == "multimodal" and (target is None or d.target in (None, target))
        ),
        None,
    )
    if made is None:
        return None
    field = made.target or target or _first_field(record)
    labels = () if field is None else record.labels_of(field)
    subtitles = tuple((s.language, s.origin, s.text) for s in record.subtitles)
    clues = tuple((d.kind, d.text) for d in record.descriptions if d.kind != "multimodal")
    label = ", ".join(labels) or None
    told = {
        "description": made.text,
        "clues": [list(clue) for clue in clues],
        "subtitles": [text for _, _, text in subtitles],
        "target": field,
        "label": label,
    }
    return ReviewItem(
        uid=record.uid,
        corpus=record.corpus,
        media=record.media,
        target=field,
        label=label,
        subtitles=subtitles,
        clues=clues,
        description=made.text,
        writer=made.model,
        digest=hashlib.sha256(canonical_json(told).encode()).hexdigest(),
    )


def _first_field(record: Record) -> LabelField | None:
    return next((field for field in LABEL_FIELDS if record.labels_of(field)), None)


class Sampling(Model):
    """Which records are looked at."""

    per_corpus: int | None = Field(default=PER_CORPUS, ge=1)
    """Records of each corpus, spread over its labels as they occur, and at least one of each label."""
    per_label: int | None = Field(default=None, ge=1)
    """Records of each label of each corpus, in place of the above."""
    seed: int = 0
    target: LabelField | None = None
    """Only descriptions of this label field; None takes the first of each record."""
    corpora: tuple[str, ...] = ()
    """Only these; all if empty."""

    @model_validator(mode="after")
    def _one_way(self) -> Sampling:
        if (self.per_corpus is None) == (self.per_label is None):
            raise ValueError("give per_corpus or per_label, one of them")
        return self


class Stratum(Model):
    """The records of one label of one corpus."""

    corpus: str
    label: str
    n_records: int
    """With a description."""
    n_sampled: int


class Sample(Model):
    """The records to look at, in the order in which every rater sees them."""

    sampling: Sampling
    items: tuple[tuple[Record, ReviewItem], ...]
    strata: tuple[Stratum, ...]
    n_undescribed: int
    """Records without a description, which cannot be judged."""


def draw_sample(records: Iterable[Record], sampling: Sampling) -> Sample:
    """Draw the records to look at; a stream is read once, and only the sample is held.

    Of each label those with the lowest digest of seed and uid are taken. So the order of the records does
    not matter, a larger sample holds the smaller one, and a few more records change a few places only.

    Args:
        records: Any number.
        sampling: How many, and of what.

    Raises:
        SchemaError: No record has a description, or none is of a corpus that was named.
    """
    most = sampling.per_label or sampling.per_corpus or 0
    sizes: Counter[tuple[str, str]] = Counter()
    # The lowest ranks of each stratum, highest first: heapq has the smallest at the front.
    kept: dict[tuple[str, str], list[tuple[int, str, Record, ReviewItem]]] = {}
    n_undescribed = n_records = 0
    corpora: set[str] = set()
    for record in records:
        corpora.add(record.corpus)
        if sampling.corpora and record.corpus not in sampling.corpora:
            continue
        n_records += 1
        item = review_item(record, sampling.target)
        if item is None:
            n_undescribed += 1
            continue
        stratum = (record.corpus, _stratum_label(record, item))
        sizes[stratum] += 1
        entry = (-_rank(sampling.seed, record.uid), record.uid, record, item)
        heap = kept.setdefault(stratum, [])
        if len(heap) < most:
            heapq.heappush(heap, entry)
        elif entry[0] > heap[0][0]:
            heapq.heapreplace(heap, entry)
    for name in sampling.corpora:
        if name not in corpora:
            raise SchemaError(
                f"no record is of corpus '{name}'.{near_miss(name, corpora)} The manifest has: "
                f"{', '.join(sorted(corpora)) or 'no records'}."
            )
    if not sizes:
        of = f" that explains {sampling.target}" if sampling.target else ""
        raise SchemaError(
            f"none of {n_records:,} records has a multimodal description{of}, so there is nothing to judge. "
            "Make them with: emocache annotate MANIFEST --out FILE --work DIR"
        )
    seats = _seats(sizes, sampling)
    chosen = []
    for stratum, heap in kept.items():
        lowest = sorted(heap, key=lambda entry: -entry[0])[: seats[stratum]]
        chosen += [(-rank, record, item) for rank, _, record, item in lowest]
    chosen.sort(key=lambda entry: entry[0])
    return Sample(
        sampling=sampling,
        items=tuple((record, item) for _, record, item in chosen),
        strata=tuple(
            Stratum(corpus=corpus, label=label, n_records=n, n_sampled=seats[corpus, label])
            for (corpus, label), n in sorted(sizes.items())
        ),
        n_undescribed=n_undescribed,
    )


def _rank(seed: int, uid: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{uid}".encode()).digest()[:8], "big")


def _stratum_label(record: Record, item: ReviewItem) -> str:
    # Of several labels the first: every combination would be a stratum of its own.
    labels = () if item.target is None else record.labels_of(item.target)
    return labels[0] if labels else _NO_LABEL


def _seats(sizes: Mapping[tuple[str, str], int], sampling: Sampling) -> dict[tuple[str, str], int]:
    """Return how many records each stratum gives."""
    if sampling.per_label is not None:
        return {stratum: min(n, sampling.per_label) for stratum, n in sizes.items()}
    assert sampling.per_corpus is not None
    found: dict[tuple[str, str], int] = {}
    for corpus in sorted({corpus for corpus, _ in sizes}):
        own = {stratum: n for stratum, n in sizes.items() if stratum[0] == corpus}
        found |= _shares(own, sampling.per_corpus)
    return found


def _shares(sizes: Mapping[tuple[str, str], int], n: int) -> dict[tuple[str, str], int]:
    """Deal n seats out by size, whole seats first and then by remainder; one each, if they suffice."""
    total = sum(sizes.values())
    n = min(n, total)
    by_size = sorted(sizes, key=lambda stratum: (-sizes[stratum], stratum))
    found = {stratum: n * sizes[stratum] // total for stratum in sizes}
    rest = sorted(by_size, key=lambda stratum: -(n * sizes[stratum] % total))
    for stratum in rest[: n - sum(found.values())]:
        found[stratum] += 1
    if n >= len(sizes):
        for poor in [stratum for stratum in by_size if not found[stratum]]:
            rich = max(by_size, key=lambda stratum: found[stratum])
            found[rich] -= 1
            found[poor] = 1
    return found


# ---------------------------------------------------------------------------- what is said of it


class Rating(Model):
    """What one rater said of one item."""

    schema_version: Literal[1] = 1
    rater: str = Field(min_length=1, max_length=80)
    uid: str = Field(min_length=1)
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the texts that were judged."""
    target: LabelField | None = None
    label: str | None = None
    """The label that the description explains, for tables by label."""
    aspects: dict[
        Aspect,
        Annotated[str, Field(min_length=1, max_length=40)] | Annotated[int, Field(strict=True)],
    ] = Field(min_length=1)
    """`accept` or `reject` each; files of other origin may hold other words or numbers."""
    not_shown: tuple[Aspect, ...] = ()
    """Aspects of which the item has nothing to judge: no sound, no subtitle."""
    score: int | None = Field(default=None, ge=0, le=MAX_SCORE)
    """Of the description as a whole; None on the binary scale."""
    comment: str = Field(default="", max_length=4000)
    time: str = ""
    """When, in ISO 8601."""

    @property
    def corpus(self) -> str:
        """First part of the uid."""
        return self.uid.partition("/")[0]

    @property
    def item(self) -> tuple[str, str]:
        """What was judged: uid and digest of the texts."""
        return self.uid, self.digest


def latest(ratings: Iterable[Rating]) -> dict[tuple[str, str, str], Rating]:
    """Return the rating that counts, by rater, uid and digest: the last one."""
    return {(rating.rater, *rating.item): rating for rating in ratings}


class RatingsFile:
    """A file of ratings: JSON lines, only ever appended; several processes may write to it.

    Args:
        path: The file; it is made with the first rating.

    Raises:
        SchemaError: The file holds something else.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        if path.exists():
            for _ in read_ratings(path):  # so that a file of another kind is never written to
                pass
        elif not path.parent.is_dir():
            raise SchemaError(
                f"{path}: there is no folder {path.parent}. Make it, or name another."
            )

    def append(self, rating: Rating) -> None:
        """Add a rating; it is on the disk when this returns.

        Raises:
            OSError: It cannot be written, and is not.
        """
        line = rating.model_dump_json().encode() + b"\n"
        with self._lock:
            is_new = not self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                end = _mend_tail(descriptor, self.path)
                try:
                    done = 0
                    while done < len(line):
                        done += os.write(descriptor, line[done:])
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, end)
                    raise
            finally:
                os.close(descriptor)
            if is_new:
                fsync_folder(self.path.parent)

    def of(self, rater: str) -> dict[tuple[str, str], Rating]:
        """Return what a rater said, by uid and digest."""
        if not self.path.exists():
            return {}
        found = latest(r for r in read_ratings(self.path) if r.rater == rater)
        return {rating.item: rating for rating in found.values()}


def _mend_tail(descriptor: int, path: Path) -> int:
    """Deal with a last line that a kill tore; return where the file ends then, in bytes."""
    end = os.fstat(descriptor).st_size
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return end
    start = max(0, end - _MAX_LINE_BYTES)
    tail = os.pread(descriptor, end - start, start).rpartition(b"\n")[2]
    try:
        decode_json(Rating, tail, str(path))
    except SchemaError:
        # Its rater never saw it confirmed.
        logger.warning("%s: dropped %d bytes of a torn last line", path, len(tail))
        os.ftruncate(descriptor, end - len(tail))
        return end - len(tail)
    os.write(descriptor, b"\n")
    return end + 1


def read_ratings(path: Path) -> Iterator[Rating]:
    """Read a file of ratings, line by line; a torn last line is passed over with a warning.

    Raises:
        SchemaError: A line that is no rating: file, line, field. The file is not there.
        OSError: It cannot be read.
    """
    if not path.is_file():
        raise SchemaError(
            f"{path}: no such file of ratings. They are made with: emocache annotate review MANIFEST "
            f"--out {path} --rater NAME"
        )
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rating = decode_json(Rating, line, f"{path}, line {number}")
            except SchemaError as error:
                if not line.endswith(b"\n") and line[: len(_LINE_HEAD)] == _LINE_HEAD[: len(line)]:
                    logger.warning("%s, line %d: passed over, a torn last line", path, number)
                    return
                raise SchemaError(
                    f"{error}. A file of ratings has one JSON object a line."
                ) from None
            yield rating


def current_items(records: Iterable[Record], ratings: Sequence[Rating]) -> set[tuple[str, str]]:
    """Return those rated items whose texts the records still have.

    Args:
        records: Of the manifest as it is now.
        ratings: Their uids and targets say what to look at.
    """
    wanted: dict[str, set[LabelField | None]] = {}
    for rating in ratings:
        wanted.setdefault(rating.uid, {None}).add(rating.target)
    found = set()
    for record in records:
        for target in wanted.get(record.uid, ()):
            item = review_item(record, target)
            if item is not None:
                found.add((item.uid, item.digest))
    return found
