"""A corpus as a row of data: where its files are, what their columns mean, what must come out.

The rows that ship with the project (`extract/corpora/rows/*.yaml`) and the mapping file that a user
writes for a dataset of their own have this one schema; docs/corpora.md explains it by example.

::

    files --source.reader--> rows of text {column: value} --mapping--> records --media--> manifest
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cache.clip import DescriptionKind
from cache.labels import LABEL_FIELDS, LabelField, LabelSpace
from cache.schema import Model

Template = str | tuple[str, ...]
"""Text with `{Column}` in it, or several of which the first that is not empty counts. A template is
empty if one of its columns is. `{{` and `}}` are braces."""


class Source(Model):
    """Files that hold rows."""

    files: tuple[str, ...] = Field(min_length=1)
    """Patterns relative to the dataset's folder, as `pathlib.Path.glob` takes them."""
    reader: str = "table"
    """`table` reads .csv, .tsv, .txt, .json, .jsonl and .parquet by their suffix; `paths` makes a row of
    each file's path; others read one dataset's own format, see `extract.corpora.readers`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the reader: delimiter, encoding, pattern, ..."""
    set: dict[str, str] = Field(default_factory=dict)
    """Columns that every row of these files gets, for example `split: train`."""
    optional: bool = False
    """May be missing; otherwise a missing file is an error."""
    may_lack: tuple[str, ...] = ()
    """Columns that some of these files may not have; they are empty then."""


class Join(Source):
    """Files whose rows complete those of the sources."""

    on: str
    """Template over the columns of the joined files: the key."""
    equals: str
    """Template over the columns of the sources that gives the same key."""
    prefix: str = ""
    """Put in front of the joined columns' names."""


class Cell(Model):
    """How one field is read from a row; a bare template is short for `{text: TEMPLATE}`."""

    text: Template
    values: dict[str, str] = Field(default_factory=dict)
    """Value as written -> what it means; others pass as they are. Keys are matched exactly."""
    separator: str | None = None
    """Splits the text into several values: `;`."""
    drop: tuple[str, ...] = ()
    """Values that mean "nothing": `-10`, `nan`."""


def _as_cell(value: Any) -> Any:
    return {"text": value} if isinstance(value, str | list | tuple) else value


class SubtitleRule(Model):
    """A subtitle."""

    text: Template
    language: str | None = None
    """A template, too."""
    origin: str = "official"


class DescriptionRule(Model):
    """A description; left out where its text is empty."""

    kind: DescriptionKind
    text: Template
    target: LabelField | None = None
    model: str | None = None
    version: str | None = None
    prompt_id: str | None = None


class BenchmarkRule(Model):
    """Which records a benchmark scores: all conditions must hold."""

    id: str
    splits: tuple[str, ...] = ()
    """Of `Record.split`; empty: all."""
    axes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Axis of `Record.split_axes` -> allowed values."""
    needs: LabelField | None = None
    labels: tuple[str, ...] = ()
    """Of the field that it needs: one of these; empty: any."""


class FieldMap(Model):
    """Columns to fields of a record. Whatever is left out stays empty."""

    id: Template
    """Source id: the uid is `<corpus>/<id>`. No label or split may be needed to understand it."""
    media: tuple[str, ...] = ()
    """Templates of paths below the media root, tried in order; without a suffix every media suffix is
    tried. Empty: `{id}` anywhere below the media root."""
    split: Cell | None = None
    """As written; `Layout.splits` says what it means."""
    split_axes: dict[str, str] = Field(default_factory=dict)
    parent: str | None = None
    speaker: str | None = None
    person: str | None = None
    language: str | None = None
    subtitles: tuple[SubtitleRule, ...] = ()
    emotion: Cell | None = None
    emotion_multi: Cell | None = None
    emotion_ov: Cell | None = None
    sentiment: Cell | None = None
    intent: Cell | None = None
    sentiment_score: Cell | None = None
    valence: Cell | None = None
    arousal: Cell | None = None
    dominance: Cell | None = None
    peak_index: Cell | None = None
    action_units: dict[str, str] = Field(default_factory=dict)
    """Name -> template."""
    descriptions: tuple[DescriptionRule, ...] = ()

    @field_validator(
        "split", *LABEL_FIELDS, "sentiment_score", "valence", "arousal", "dominance", "peak_index",
        mode="before",
    )  # fmt: skip
    @classmethod
    def _short(cls, value: Any) -> Any:
        return _as_cell(value)

    @field_validator("media", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Layout(Model):
    """One way in which a corpus lies on disk."""

    about: str
    """Which release or which tool makes it."""
    sources: tuple[Source, ...] = Field(min_length=1)
    joins: tuple[Join, ...] = ()
    fields: FieldMap
    where: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Column -> values; rows with another value are no part of the corpus."""
    splits: dict[str, Literal["train", "val", "test"]] = Field(default_factory=dict)
    """Native split -> ours. A native one that is not here is an error; empty: names pass as they are."""
    split_by: dict[str, dict[str, Literal["train", "val", "test"]]] = Field(default_factory=dict)
    """Axis -> its value -> split, where the source has no split of its own (IEMOCAP's sessions)."""
    sentiment_from_score: bool = False
    """Polarity is the sign of `sentiment_score` where the source gives no polarity; 0 is neutral."""
    ids_hold: tuple[Literal["split", "label"], ...] = ()
    """What a reader of the ids could learn; they never reach a prompt."""


class Expected(Model):
    """Counts that a complete copy has."""

    mmeverse: int | None = None
    """Table 1 of the paper."""
    splits: dict[str, int] = Field(default_factory=dict)
    """Split -> records, as the source documents."""
    labels: dict[LabelField, dict[str, int]] = Field(default_factory=dict)
    benchmarks: dict[str, int] = Field(default_factory=dict)
    """Table 2 of the paper."""
    shared_speakers: str = ""
    """Why the same speakers stand in several splits, where the source's own protocol has it so."""
    known: tuple[str, ...] = ()
    """Deviations that are known, each with its reason, one sentence each."""


class CorpusRow(Model):
    """A corpus: of the project, or of a user."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9_.+-]*$")
    """First part of every uid."""
    title: str = ""
    about: str = ""
    """One sentence."""
    licence: str = ""
    """Who may use it; where to ask for it."""
    language: str | None = None
    """Of the subtitles, where the mapping gives none."""
    spaces: dict[LabelField, LabelSpace] = Field(default_factory=dict)
    """A field without a space takes the values that occur, in alphabetical order."""
    scales: dict[Literal["sentiment_score", "vad"], tuple[float, float]] = Field(
        default_factory=dict
    )
    layouts: dict[str, Layout] = Field(min_length=1)
    """Name -> layout; the first whose files are all there is taken."""
    benchmarks: tuple[BenchmarkRule, ...] = ()
    expected: Expected = Expected()

    @model_validator(mode="before")
    @classmethod
    def _named_spaces(cls, data: Any) -> Any:
        """Give each space its name, which is known anyway, so that files need not repeat it."""
        if isinstance(data, dict) and isinstance(data.get("spaces"), dict):
            spaces = {
                field: {"name": f"{data.get('id')}/{field}", **space}
                if isinstance(space, dict)
                else space
                for field, space in data["spaces"].items()
            }
            data = {**data, "spaces": spaces}
        return data
