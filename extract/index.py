"""A dataset, or a folder of media files, to the records of a manifest.

::

    dataset folder --layout, reader, mapping--> drafts --media files, read once--> records
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from cache.clip import Clip, Record
from cache.errors import ManifestError, near_miss
from cache.labels import LABEL_FIELDS, LabelField, LabelSpace
from cache.manifest import CorpusNote, Header, Manifest, ManifestWriter, relative_root
from cache.schema import decode as decode_model
from extract.corpora.findings import MappingReport, Places
from extract.corpora.mapping import Draft, Mapper, OnUnknown, drafts
from extract.corpora.media import MEDIA_SUFFIXES, Looked, MediaFolder, is_media, look_at
from extract.corpora.row import CorpusRow
from extract.corpora.sources import find_layout
from extract.corpora.tables import read_table

__all__ = (
    "COLUMNS", "MEDIA_SUFFIXES", "IndexReport", "Indexed", "index_corpus", "index_folder", "write",
)  # fmt: skip

OnMissing = Literal["error", "drop", "keep"]
"""What to do with a record without its media file; `keep`: it stays without a clip."""

_LABELS = ("label", "emotion", "sentiment", "intent")
_TEXTS = ("subtitle", "description", "audio_description", "image_description")
COLUMNS = ("file", "uid", *_LABELS, "split", *_TEXTS, "peak_index")
"""Columns of a labels table. `file` or `uid` says which clip a row is about; `label` is the emotion."""
_KINDS = {
    "description": "multimodal",
    "audio_description": "audio_tone",
    "image_description": "visual_objective",
}
_OPEN_EXAMPLES = 30
"""Most frequent words that stand for an open vocabulary."""


@dataclass
class IndexReport(MappingReport):
    """What indexing found beside the records."""

    left_out: list[str] = field(default_factory=list)
    """One line per file that has no record, with the reason."""
    suspicious: list[str] = field(default_factory=list)
    """Files with a record that could not be opened as media; extraction will mark them failed."""
    missing: Places = field(default_factory=Places)
    """Records without a media file."""
    n_files: int = 0
    """Media files of the records, each once."""
    n_remembered: int = 0
    """Of them, those that were not read again."""
    looked_at_media: bool = False

    @property
    def n_missing(self) -> int:
        """Records without a media file."""
        return self.missing.n

    @property
    def is_clean(self) -> bool:
        """Whether every row that belongs to the corpus became a whole record."""
        return not (self.left_out or self.suspicious or self.n_dropped or self.n_missing)


class Records:
    """Records that are made when they are asked for, again and again."""

    def __init__(self, found: Sequence[tuple[Draft, str]], clips: Mapping[str, Clip]) -> None:
        """Make none yet.

        Args:
            found: Drafts, and the media file of each.
            clips: Media file -> clip; a record whose file is not there has none.
        """
        self._found, self._clips = found, clips

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Record]:
        for draft, media in self._found:
            fields = {**draft.fields, "media": media, "clip": self._clips.get(media)}
            yield decode_model(Record, fields, draft.where)


class Indexed(NamedTuple):
    """What indexing gives; nothing is written yet."""

    header: Header
    records: Records
    report: IndexReport

    def manifest(self) -> Manifest:
        """Return the manifest, with all records in memory."""
        return Manifest(header=self.header, records=tuple(self.records))


def write(path: Path, found: Indexed) -> None:
    """Write a manifest record by record: whole, or the one that was there before stays.

    Raises:
        OSError: The folder cannot be written.
    """
    with ManifestWriter(path, found.header) as writer:
        for record in found.records:
            writer.write(record)


def index_corpus(
    row: CorpusRow,
    folder: Path,
    manifest_path: Path,
    *,
    layout: str | None = None,
    media: Path | None = None,
    on_unknown: OnUnknown = "error",
    label_map: Mapping[str, str] | None = None,
    on_missing: OnMissing = "error",
    language: str | None = None,
    on_files: Callable[[int], None] | None = None,
    on_file: Callable[[int], None] | None = None,
) -> Indexed:
    """Read a dataset as its row or mapping file says; writes nothing.

    Args:
        row: The corpus.
        folder: The dataset's folder.
        manifest_path: Where the manifest will stand; its media root is stored relative to it.
        layout: One of the row's layouts; default the first whose files are all there.
        media: Folder of the media files; None makes records without clips.
        on_unknown: What to do with labels outside their space.
        label_map: Label as written -> label to take.
        on_missing: What to do with records without a media file.
        language: Of subtitles to which the mapping gives none.
        on_files: Called once with the number of media files to come.
        on_file: Called with the number of files done since the last call.

    Raises:
        ManifestError: No layout fits, a file cannot be read, rows contradict the mapping, media are
            missing, or nothing came out.
        SchemaError: No such layout or reader.
    """
    report = IndexReport()
    name = find_layout(row, folder, layout)
    mapper = Mapper(
        row,
        row.layouts[name],
        report,
        language=language,
        on_unknown=on_unknown,
        label_map=label_map,
    )
    found = list(drafts(row, name, folder, mapper))
    if media is None:
        named = [(draft, draft.media[0] if draft.media else draft.source_id) for draft in found]
        records = Records(named, {})
    else:
        listed = MediaFolder(media)
        paired = _pair(found, listed, report, on_missing)
        names = [media_name for _, media_name in paired if media_name in listed.files]
        records = _finished(paired, _look(media, names, on_files, on_file), report)
    note = CorpusNote(
        title=row.title or None,
        licence=row.licence or None,
        source=f"layout '{name}': {row.layouts[name].about}",
    )
    header = Header(
        media_root=relative_root(media or folder, manifest_path),
        label_spaces=_spaces(row.id, row.spaces, report),
        scales={f"{row.id}/{key}": scale for key, scale in row.scales.items()},
        corpora={row.id: note},
    )
    return Indexed(header, records, report)


def _pair(
    found: Sequence[Draft], listed: MediaFolder, report: IndexReport, on_missing: OnMissing
) -> list[tuple[Draft, str]]:
    """Return each draft with its media file, as `on_missing` says."""
    paired: list[tuple[Draft, str]] = []
    ambiguous = Places()
    for draft in found:
        try:
            name = listed.find(draft.media, draft.source_id)
        except ManifestError as error:
            ambiguous.add(f"{draft.where}: {error}")
            continue
        if name is None:
            wanted = draft.media or (draft.source_id,)
            report.missing.add(f"{draft.where}: {' or '.join(wanted)}")
            if on_missing == "keep":
                paired.append((draft, wanted[0]))
        else:
            paired.append((draft, name))
    if ambiguous.n:
        raise ManifestError(f"{ambiguous}.")
    n = report.missing.n
    if n and (on_missing == "error" or (n == len(found) and on_missing == "drop")):
        links = ""
        if listed.links:
            links = f" {len(listed.links)} links leave the folder and are not followed: {listed.links[0]}."
        raise ManifestError(
            f"{listed.root}: {n:,} of {len(found):,} records have no media file. {report.missing}.{links} "
            f"The folder has {len(listed.media()):,} media files, for example "
            f"{', '.join(listed.media()[:3]) or 'none'}. Give --media the folder that holds them; "
            "--on-missing drop leaves such records out, keep writes them without media."
        )
    return paired


def _look(
    root: Path,
    names: Sequence[str],
    on_files: Callable[[int], None] | None,
    on_file: Callable[[int], None] | None,
) -> Looked:
    once = list(dict.fromkeys(names))
    if on_files is not None:
        on_files(len(once))
    return look_at(root, once, on_file)


def _finished(paired: Sequence[tuple[Draft, str]], looked: Looked, report: IndexReport) -> Records:
    """Leave out records whose file cannot be read, and tell of strange ones."""
    report.looked_at_media = True
    report.n_files = len(looked.clips) + len(looked.unreadable)
    report.n_remembered = looked.n_remembered
    report.suspicious += looked.suspicious.values()
    kept = []
    for draft, name in paired:
        if name in looked.unreadable:
            report.left_out.append(f"{draft.where}: {name!r} {looked.unreadable[name]}")
        else:
            kept.append((draft, name))
    if not kept:
        raise ManifestError(f"no media file could be read. {report.left_out[0]}")
    if len(kept) != report.n_records:
        report.recount(draft.fields for draft, _ in kept)
    return Records(kept, looked.clips)


def _spaces(
    corpus: str, given: Mapping[LabelField, LabelSpace], report: MappingReport
) -> dict[str, LabelSpace]:
    """Return the label spaces of a corpus: those it has, else of the values that occur."""
    spaces = {f"{corpus}/{name}": space for name, space in given.items()}
    for name in LABEL_FIELDS:
        key, found = f"{corpus}/{name}", report.labels.get(name, Counter())
        if key in spaces or not found:
            continue
        is_open = name == "emotion_ov"
        labels = [label for label, _ in found.most_common(_OPEN_EXAMPLES)] if is_open else [*found]
        spaces[key] = LabelSpace(name=key, labels=tuple(sorted(labels)), open=is_open)
    return spaces


# A folder of media files, with or without a table of labels


def index_folder(
    folder: Path,
    manifest_path: Path,
    *,
    labels_csv: Path | None = None,
    label_space: Sequence[str] = (),
    corpus: str | None = None,
    on_files: Callable[[int], None] | None = None,
    on_file: Callable[[int], None] | None = None,
) -> tuple[Manifest, IndexReport]:
    """Make a manifest of a folder; writes nothing.

    Args:
        folder: The media root, searched with its sub-folders.
        manifest_path: Where the manifest will stand; its media root is stored relative to it.
        labels_csv: Table with a header row, see `COLUMNS`. If given, only its rows become records.
        label_space: Allowed emotions in native order; empty takes those of the table.
        corpus: First part of every uid; default the folder's name.
        on_files: Called once with the number of media files to come.
        on_file: Called with the number of files done since the last call.

    Raises:
        ManifestError: No such folder, no media in it, or a table that contradicts itself or the
            folder: missing or unknown column, duplicate uid, unknown label, unknown file.
    """
    listed = MediaFolder(folder)
    corpus = corpus or folder.resolve().name
    report = IndexReport()
    if labels_csv is None:
        paired = _all_files(listed, corpus, report)
        spaces: dict[LabelField, LabelSpace] = {}
    else:
        paired, spaces = _labelled(listed, corpus, labels_csv, label_space, report)
    looked = _look(folder, [name for _, name in paired], on_files, on_file)
    records = _finished(paired, looked, report)
    header = Header(
        media_root=relative_root(folder, manifest_path),
        label_spaces=_spaces(corpus, spaces, report),
    )
    return Manifest(header=header, records=tuple(records)), report


def _all_files(listed: MediaFolder, corpus: str, report: IndexReport) -> list[tuple[Draft, str]]:
    leaving = [name for name in listed.links if is_media(name)]
    if leaving:
        raise ManifestError(_leaves(leaving[0], leaving[0], listed.root))
    report.left_out += [f"{n}: {n!r} is a folder, not a media file" for n in listed.misnamed]
    names = listed.media()
    if not names:
        raise ManifestError(
            f"{listed.root}: holds no media files ({', '.join(sorted(MEDIA_SUFFIXES))}). "
            "Give another folder, or a --labels table that names the files."
        )
    paired = []
    places: dict[str, str] = {}
    for name in names:
        uid = f"{corpus}/{_stem(name)}"
        first = places.setdefault(uid, name)
        if first != name:
            raise ManifestError(
                f"{name}: duplicate uid {uid!r}, already used by {first}. Rename one of the files, or "
                "give a --labels table with a 'uid' column."
            )
        paired.append((Draft(name, _stem(name), {"uid": uid}, (name,)), name))
    report.corpus, report.n_rows = corpus, len(paired)
    return paired


def _labelled(
    listed: MediaFolder,
    corpus: str,
    table: Path,
    label_space: Sequence[str],
    report: IndexReport,
) -> tuple[list[tuple[Draft, str]], dict[LabelField, LabelSpace]]:
    """Map the rows of a labels table, each to the file that it names."""
    rows = list(read_table(table, table.parent, {}))
    names = tuple(dict.fromkeys(name for _, row in rows for name in row))
    unknown = [n for n in names if n not in COLUMNS]
    if unknown:
        raise ManifestError(
            f"{table}: unknown column {unknown[0]!r}.{near_miss(unknown[0], COLUMNS)} "
            f"Allowed: {', '.join(COLUMNS)}. Rename it, or remove it."
        )
    if "file" not in names and "uid" not in names:
        raise ManifestError(
            f"{table}: missing column 'file' (or 'uid'); found {', '.join(names) or 'none'}. "
            "Each row must say which media file it is about."
        )
    labels = tuple(dict.fromkeys(label.strip().lower() for label in label_space))
    spaces: dict[LabelField, LabelSpace] = {}
    if labels:
        spaces["emotion"] = decode_model(
            LabelSpace, {"name": f"{corpus}/emotion", "labels": labels}, str(table)
        )
    row = _table_row(names, spaces)
    mapper = Mapper(row, row.layouts["labels"], report, corpus=corpus, must_tell=False)
    report.columns = dict.fromkeys(names)
    report.read.append(str(table))
    columns = (*names, "name")
    paired = []
    for where, found in rows:
        report.n_rows += 1
        file = _file_of(found, where, listed)
        found["name"] = found.get("uid") or _stem(file)
        draft = mapper.draft(columns, where, found, str(table))
        if draft is not None:
            paired.append((draft, file))
    mapper.finish()
    return paired, spaces


def _table_row(names: Sequence[str], spaces: Mapping[LabelField, LabelSpace]) -> CorpusRow:
    """Return the row that says what the columns of a labels table mean."""
    fields: dict[str, Any] = {"id": "{name}"}
    if "label" in names or "emotion" in names:
        fields["emotion"] = [f"{{{n}}}" for n in ("label", "emotion") if n in names]
    for name in ("sentiment", "intent", "split", "peak_index"):
        if name in names:
            fields[name] = f"{{{name}}}"
    if "subtitle" in names:
        fields["subtitles"] = [{"text": "{subtitle}"}]
    fields["descriptions"] = [
        {"kind": kind, "text": f"{{{name}}}"} for name, kind in _KINDS.items() if name in names
    ]
    layout = {"about": "a labels table", "sources": [{"files": ["*"]}], "fields": fields}
    data = {"id": "labels", "spaces": dict(spaces), "layouts": {"labels": layout}}
    return decode_model(CorpusRow, data, "labels table")


def _file_of(row: Mapping[str, str], where: str, listed: MediaFolder) -> str:
    """Return the file of a row of a labels table: as it says, else the one that its uid names."""
    file = row.get("file", "")
    if file:
        path = listed.root / file
        if not path.resolve().is_relative_to(listed.root.resolve()):
            raise ManifestError(_leaves(where, file, listed.root))
        return PurePosixPath(file).as_posix()
    uid = row.get("uid", "")
    found = listed.named(uid)
    if len(found) == 1:
        return found[0]
    what = f"{len(found)} media files" if found else "no media file"
    hint = "" if found else near_miss(uid, map(_stem, listed.media()))
    raise ManifestError(
        f"{where}: {what} for uid {uid!r} in {listed.root}.{hint} Name the file in a 'file' column."
    )


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()


def _leaves(where: str, file: str, root: Path) -> str:
    return (
        f"{where}: media path {file!r} leaves the media root {root}. Index the folder that holds all "
        "files."
    )
