"""Rows of text to drafts of records, as a layout says.

A layout is compiled once for each set of columns that its files have; then a row takes some
microseconds. What is wrong with rows is collected, so that one run shows all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cache.errors import ManifestError, near_miss
from cache.labels import LABEL_FIELDS, LabelField
from extract.corpora.cells import (
    NUMBERS,
    TELLING,
    benchmarks_of,
    clean_path,
    fitting,
    named_fields,
    one_value,
    said_in,
    several_values,
)
from extract.corpora.findings import MappingReport, Places, UnknownLabels
from extract.corpora.row import Cell, CorpusRow, Layout
from extract.corpora.sources import rows_of
from extract.corpora.templates import Render, compile_template

OnUnknown = Literal["error", "drop", "map"]
"""What to do with a row whose label is outside the space; `map`: as the label map says, else an error."""

_TEXTS = ("parent", "speaker", "person", "language")


@dataclass(slots=True)
class Draft:
    """A record to be, before anybody looked at the media."""

    where: str
    source_id: str
    fields: dict[str, Any]
    """Of a Record, without `media` and `clip`."""
    media: tuple[str, ...]
    """Paths to try below the media root; empty: a file of that name anywhere below it."""


class Mapper:
    """Maps the rows of one layout of one corpus, and remembers what it found."""

    def __init__(
        self,
        row: CorpusRow,
        layout: Layout,
        report: MappingReport,
        *,
        corpus: str | None = None,
        language: str | None = None,
        on_unknown: OnUnknown = "error",
        label_map: Mapping[str, str] | None = None,
        must_tell: bool = True,
    ) -> None:
        """Compile nothing yet.

        Args:
            row: The corpus.
            layout: One of its layouts.
            report: Filled on the way.
            corpus: First part of every uid; default the corpus's id.
            language: Of subtitles to which the mapping gives none; default the corpus's.
            on_unknown: What to do with labels outside their space.
            label_map: Label as written, in any case -> label to take.
            must_tell: Refuse a mapping that gives neither labels nor texts.

        Raises:
            ManifestError: The mapping maps nothing, or the label map leads nowhere.
        """
        self.layout, self.report = layout, report
        self._row, self._fields = row, layout.fields
        self._corpus = corpus or row.id
        self._language = language or row.language
        self._on_unknown, self._must_tell = on_unknown, must_tell
        self._label_map = {k.strip().lower(): v for k, v in (label_map or {}).items()}
        self._found: dict[LabelField, dict[str, str | None]] = {f: {} for f in LABEL_FIELDS}
        self._problems: dict[str, Places] = {}
        self._places: dict[str, str] = {}
        self._compiled: dict[tuple[str, ...], Callable[[str, dict[str, str]], Draft | None]] = {}
        report.corpus = self._corpus
        report.mapped = named_fields(self._fields)
        self._check()

    def _check(self) -> None:
        telling = [f for f in self.report.mapped if f in TELLING]
        if self._must_tell and not telling:
            raise ManifestError(
                f"{self._row.id}: the mapping maps nothing: neither a label nor a subtitle nor a "
                f"description. It names {', '.join(self.report.mapped) or 'only the id'}; give at least one "
                f"of {', '.join(TELLING)}. Media without labels need no mapping: emocache index DIR --out "
                "FILE"
            )
        for field in ("emotion", "sentiment", "intent"):
            cell: Cell | None = getattr(self._fields, field)
            if cell is not None and cell.separator is not None:
                raise ManifestError(
                    f"{self._row.id}: {field} holds one label, so it takes no separator. Several emotions "
                    "go into emotion_multi or emotion_ov."
                )
        if self._on_unknown == "map" and not self._label_map:
            raise ManifestError(
                "--on-unknown map needs to know what to take instead. Give --map-label OLD=NEW, once for "
                "each label."
            )
        spaces = [self._row.spaces.get(f) for f in LABEL_FIELDS if f in self.report.mapped]
        closed = [space for space in spaces if space is not None]
        for old, new in self._label_map.items():
            if len(closed) == len(spaces) and all(space.find(new) is None for space in closed):
                known = [label for space in closed for label in space.labels]
                raise ManifestError(
                    f"--map-label {old}={new}: {new!r} is in no label space of {self._row.id}."
                    f"{near_miss(new.lower(), known)} Allowed: {', '.join(dict.fromkeys(known))}."
                )

    def problem(self, kind: str, line: str) -> None:
        """Remember what is wrong with a row; `finish` raises it."""
        self._problems.setdefault(kind, Places()).add(line)

    def finish(self) -> None:
        """Raise what was wrong with the rows, and refuse a mapping that gave nothing.

        Raises:
            ManifestError: All problems, with the first ten places of each kind.
        """
        report = self.report
        told = [str(places) for places in self._problems.values()]
        if self._on_unknown != "drop":
            told += [
                f"{found} Correct the file or the label space, or say what to do: --on-unknown drop leaves "
                "such records out, --map-label OLD=NEW takes another label."
                for found in report.unknown.values()
            ]
        if told:
            raise ManifestError(" ".join(told))
        if not report.n_records:
            raise ManifestError(f"{self._corpus}: no record came out. {self._tried()}")
        if self._must_tell and not any(report.filled[name] for name in TELLING):
            raise ManifestError(
                f"{self._corpus}: the mapping maps nothing: none of {report.n_records:,} records has a "
                f"label, a subtitle or a description. {self._tried()}"
            )

    def _tried(self) -> str:
        report = self.report
        parts = [f"Tried layout '{report.layout}': read {report.n_rows:,} rows"]
        if report.n_elsewhere:
            conditions = "; ".join(f"{c}: {', '.join(v)}" for c, v in self.layout.where.items())
            parts.append(f"{report.n_elsewhere:,} are left out by `where` ({conditions})")
        if report.n_dropped:
            parts.append(f"{report.n_dropped:,} have labels outside the space")
        parts.append(f"empty in all: {', '.join(report.empty) or 'nothing'}")
        parts.append(f"columns found: {', '.join(report.columns) or 'none'}")
        return "; ".join(parts) + ". Correct the mapping."

    def draft(
        self, columns: tuple[str, ...], where: str, row: dict[str, str], file: str
    ) -> Draft | None:
        """Map a row.

        Args:
            columns: Of its file.
            where: Its place.
            row: Column -> text; may lack columns.
            file: For errors of the mapping.

        Returns:
            None for a row that is left out; the report says why.

        Raises:
            ManifestError: The mapping names a column that there is not.
        """
        compiled = self._compiled.get(columns)
        if compiled is None:
            compiled = self._compiled[columns] = self._compile(columns, file)
        return compiled(where, row)

    def _compile(
        self, columns: Collection[str], file: str
    ) -> Callable[[str, dict[str, str]], Draft | None]:
        f, layout, report = self._fields, self.layout, self.report

        def text(template: Any, name: str) -> Render:
            return compile_template(template, columns, f"{file}, {name}")

        source_id = text(f.id, "id")
        with_id = (*columns, "id")
        media = [
            compile_template((t,), with_id, f"{file}, media")
            for t in fitting(f.media, with_id, file)
        ]
        keep = [(text(f"{{{c}}}", "where"), frozenset(v), c) for c, v in layout.where.items()]
        split = None if f.split is None else one_value(f.split, text, "split")
        axes = [(axis, text(t, f"split_axes.{axis}")) for axis, t in f.split_axes.items()]
        texts = [(n, text(t, n)) for n in _TEXTS if (t := getattr(f, n)) is not None]
        labels = [
            (field, several_values(cell, text, field), field in ("emotion_multi", "emotion_ov"))
            for field in LABEL_FIELDS
            if (cell := getattr(f, field)) is not None
        ]
        numbers = [
            (n, one_value(c, text, n), self._scale(n))
            for n in NUMBERS
            if (c := getattr(f, n)) is not None
        ]
        peak = None if f.peak_index is None else one_value(f.peak_index, text, "peak_index")
        units = [(n, text(t, f"action_units.{n}")) for n, t in f.action_units.items()]
        subtitles = [
            (
                text(rule.text, "subtitles"),
                None if rule.language is None else text(rule.language, "subtitles.language"),
                rule.origin,
            )
            for rule in f.subtitles
        ]
        descriptions = [
            (
                text(rule.text, "descriptions"),
                {k: v for k, v in rule.model_dump(exclude={"text"}).items() if v is not None},
            )
            for rule in f.descriptions
        ]
        language = self._language

        def draft(where: str, row: dict[str, str]) -> Draft | None:
            for render, allowed, _ in keep:
                if render(row) not in allowed:
                    report.n_elsewhere += 1
                    return None
            name = source_id(row)
            if not name:
                self.problem("id", f"{where}: no id; its columns are empty")
                return None
            found: dict[str, Any] = {"uid": f"{self._corpus}/{name}"}
            is_good = True
            for field, values, is_many in labels:
                native = []
                for value in values(row):
                    label = self._label(field, value, where)
                    if label is None:
                        is_good = False
                    else:
                        native.append(label)
                if native:
                    found[field] = tuple(dict.fromkeys(native)) if is_many else native[0]
            if not is_good:
                report.n_dropped += 1
                return None
            for axis, render in axes:
                if value := render(row):
                    found.setdefault("split_axes", {})[axis] = value
            if split is not None or layout.split_by:
                self._split(found, "" if split is None else split(row), where)
            for field_name, render in texts:
                if value := render(row):
                    found[field_name] = value
            for field_name, render, scale in numbers:
                if value := render(row):
                    number = self._number(value, field_name, where, scale)
                    if number is not None:
                        found[field_name] = number
            if layout.sentiment_from_score and "sentiment" not in found:
                self._polarity(found, where)
            if peak is not None and (value := peak(row)):
                index = self._index(value, where)
                if index is not None:
                    found["peak"] = {"index": index}
            for unit, render in units:
                if value := render(row):
                    number = self._number(value, f"action_units.{unit}", where, None)
                    if number is not None:
                        found.setdefault("action_units", {})[unit] = number
            if subtitles:
                said = said_in(row, subtitles, language)
                if said:
                    found["subtitles"] = said
            told = [{**rest, "text": value} for t, rest in descriptions if (value := t(row))]
            if told:
                found["descriptions"] = told
            benchmarks = benchmarks_of(self._row.benchmarks, found)
            if benchmarks:
                found["benchmarks"] = benchmarks
            first = self._places.setdefault(name, where)
            if first is not where:
                self.problem(
                    "duplicate",
                    f"{where}: duplicate uid {found['uid']!r}, already used by {first}; give every row "
                    "an id of its own",
                )
                return None
            if media:
                row.setdefault("id", name)
            paths = tuple([p for render in media if (p := clean_path(render(row)))])
            report.count(found)
            return Draft(where, name, found, paths)

        return draft

    def _label(self, field: LabelField, text: str, where: str) -> str | None:
        known = self._found[field]
        if text in known:
            label = known[text]
        else:
            wanted = self._label_map.get(text.lower(), text)
            space = self._row.spaces.get(field)
            label = wanted.strip().lower() if space is None else space.find(wanted)
            known[text] = label
        if label is None:
            space = self._row.spaces[field]
            self.report.unknown.setdefault(field, UnknownLabels(space)).add(text, where)
        return label

    def _split(self, found: dict[str, Any], native: str, where: str) -> None:
        layout = self.layout
        if native:
            found["split_native"] = native
            if not layout.splits:
                found["split"] = native
            elif native in layout.splits:
                found["split"] = layout.splits[native]
            else:
                known = ", ".join(layout.splits)
                self.problem(
                    "split",
                    f"{where}: split {native!r} is unknown.{near_miss(native, layout.splits)} Known: "
                    f"{known}; name it in the layout's `splits`",
                )
            return
        for axis, values in layout.split_by.items():
            value = found.get("split_axes", {}).get(axis)
            if value is None:
                continue
            if value in values:
                found["split"] = values[value]
            else:
                self.problem(
                    "split",
                    f"{where}: {axis} {value!r} belongs to no split.{near_miss(value, values)} Known: "
                    f"{', '.join(values)}; name it in the layout's `split_by`",
                )
            return

    def _scale(self, field: str) -> tuple[float, float] | None:
        scales = self._row.scales
        return scales.get("sentiment_score" if field == "sentiment_score" else "vad")

    def _number(
        self, text: str, field: str, where: str, scale: tuple[float, float] | None
    ) -> float | None:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if "_" in text or not math.isfinite(number):
            hint = " Write the decimals behind a point." if "," in text else ""
            self.problem(
                field,
                f"{where}: '{field}' must be a number (got {text!r}).{hint} A mark of \"none\" goes into "
                "the mapping's `drop`",
            )
            return None
        if scale is not None and not scale[0] <= number <= scale[1]:
            self.problem(
                field,
                f"{where}: '{field}' is {text}, outside the scale from {scale[0]:g} to {scale[1]:g}. "
                'Correct the scale, or put a mark of "none" into the mapping\'s `drop`',
            )
            return None
        return number

    def _index(self, text: str, where: str) -> int | None:
        number = self._number(text, "peak_index", where, None)
        if number is None:
            return None
        if number < 0 or number != int(number):
            self.problem(
                "peak_index",
                f"{where}: 'peak_index' must be a whole number from 0 on (got {text!r})",
            )
            return None
        return int(number)

    def _polarity(self, found: dict[str, Any], where: str) -> None:
        score = found.get("sentiment_score")
        if score is None:
            return
        name = "positive" if score > 0 else "negative" if score < 0 else "neutral"
        label = self._label("sentiment", name, where)
        if label is not None:
            found["sentiment"] = label


def drafts(row: CorpusRow, layout_name: str, folder: Path, mapper: Mapper) -> Iterator[Draft]:
    """Read the files of a layout and map their rows.

    Args:
        row: The corpus.
        layout_name: One of its layouts.
        folder: The dataset's folder.
        mapper: Made for that layout; its report is filled on the way.

    Yields:
        Drafts, in the order of the files and their rows.

    Raises:
        ManifestError: A file cannot be read or lacks a column; at the end, whatever is wrong with rows.
    """
    report = mapper.report
    report.layout = layout_name
    for columns, where, found, file in rows_of(row.layouts[layout_name], folder, report):
        draft = mapper.draft(columns, where, found, file)
        if draft is not None:
            yield draft
    mapper.finish()
