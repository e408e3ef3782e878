"""A folder of media files, and a table of labels where there is one, to a manifest of records."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cache.clip import Clip, Record, file_sha256
from cache.errors import ManifestError, MediaError, near_miss
from cache.labels import LabelSpace
from cache.manifest import Header, Manifest, relative_root
from cache.schema import decode as decode_model
from extract.decode import probe

logger = logging.getLogger(__name__)

MEDIA_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .3gp "
    ".wav .mp3 .flac .ogg .opus .m4a .aac .wma "
    ".png .jpg .jpeg .bmp .webp".split()
)
"""What a folder is searched for, in any case; a labels table may name other files."""

_TEXTS = ("subtitle", "description", "audio_description", "image_description")
COLUMNS = ("file", "uid", "label", "split", *_TEXTS, "peak_index")
"""Columns of a labels table. `file` or `uid` says which clip a row is about."""


@dataclass
class IndexReport:
    """What indexing found beside the records."""

    left_out: list[str] = field(default_factory=list)
    """One line per file that has no record, with the reason."""
    suspicious: list[str] = field(default_factory=list)
    """Files with a record that could not be opened as media; extraction will mark them failed."""


def index_folder(
    folder: Path,
    manifest_path: Path,
    *,
    labels_csv: Path | None = None,
    label_space: Sequence[str] = (),
    corpus: str | None = None,
    on_file: Callable[[int], None] | None = None,
) -> tuple[Manifest, IndexReport]:
    """Make a manifest of a folder; writes nothing.

    Args:
        folder: The media root, searched with its sub-folders.
        manifest_path: Where the manifest will stand; its media root is stored relative to it.
        labels_csv: Table with a header row, see `COLUMNS`. If given, only its rows become records.
        label_space: Allowed labels in native order; empty takes the labels of the table.
        corpus: First part of every uid; default the folder's name.
        on_file: Called with the number of files still to come.

    Raises:
        ManifestError: No such folder, no media in it, or a table that contradicts itself or the
            folder: missing or unknown column, duplicate uid, unknown label, unknown file.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise ManifestError(f"{folder}: {kind}. Give the folder that holds the media files.")
    corpus = corpus or folder.resolve().name
    report = IndexReport()
    if labels_csv is None:
        rows: list[dict[str, str]] = [{"file": name} for name in _media_files(folder)]
        if not rows:
            raise ManifestError(
                f"{folder}: holds no media files ({', '.join(sorted(MEDIA_SUFFIXES))}). "
                "Give another folder, or a --labels table that names the files."
            )
    else:
        rows = _read_table(labels_csv)
        _name_files(rows, folder, labels_csv)
    space = _label_space(rows, label_space, labels_csv)
    records: list[Record] = []
    places: dict[str, str] = {}
    for number, row in enumerate(rows, start=2):
        if on_file is not None:
            on_file(len(rows) - len(records))
        where = f"{labels_csv}, line {number}" if labels_csv else row["file"]
        source_id = row.get("uid") or PurePosixPath(row["file"]).with_suffix("").as_posix()
        uid = f"{corpus}/{source_id}"
        if uid in places:
            raise ManifestError(
                f"{where}: duplicate uid {uid!r}, already used by {places[uid]}. "
                "Give every row its own uid in a 'uid' column."
            )
        places[uid] = where
        clip = _clip(folder, row["file"], where, report)
        if clip is not None:
            records.append(_record(uid, row, clip, space, where))
    header = Header(media_root=relative_root(folder, manifest_path), label_space=space)
    if not records:
        raise ManifestError(f"{folder}: no file could be read. {report.left_out[0]}")
    return Manifest(header=header, records=tuple(records)), report


def _media_files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in MEDIA_SUFFIXES and not path.name.startswith(".")
    )


def _read_table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = [n.strip() for n in reader.fieldnames or []]
            reader.fieldnames = names
            rows = list(reader)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: not a UTF-8 CSV table ({error})") from None
    unknown = [n for n in names if n not in COLUMNS]
    if unknown:
        raise ManifestError(
            f"{path}: unknown column {unknown[0]!r}.{near_miss(unknown[0], COLUMNS)} "
            f"Allowed: {', '.join(COLUMNS)}. Rename it, or remove it."
        )
    if "file" not in names and "uid" not in names:
        raise ManifestError(
            f"{path}: missing column 'file' (or 'uid'); found {', '.join(names) or 'none'}. "
            "Each row must say which media file it is about."
        )
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise ManifestError(
                f"{path}, line {number}: {'more' if None in row else 'fewer'} values than the header "
                f"has columns ({len(names)}). Quote texts that hold commas."
            )
    if not rows:
        raise ManifestError(f"{path}: no rows below the header")
    return [{k: v.strip() for k, v in row.items()} for row in rows]


def _name_files(rows: list[dict[str, str]], folder: Path, table: Path) -> None:
    """Fill in `file` where a row only gives a uid: the media file of that stem."""
    if all(row.get("file") for row in rows):
        return
    by_stem: dict[str, list[str]] = {}
    for name in _media_files(folder):
        by_stem.setdefault(PurePosixPath(name).with_suffix("").as_posix(), []).append(name)
    for number, row in enumerate(rows, start=2):
        if row.get("file"):
            continue
        found = by_stem.get(row.get("uid", ""), [])
        if len(found) != 1:
            what = f"{len(found)} media files" if found else "no media file"
            hint = "" if found else near_miss(row.get("uid", ""), by_stem)
            raise ManifestError(
                f"{table}, line {number}: {what} for uid {row.get('uid')!r} in {folder}.{hint} "
                "Name the file in a 'file' column."
            )
        row["file"] = found[0]


def _label_space(
    rows: Sequence[dict[str, str]], given: Sequence[str], table: Path | None
) -> LabelSpace | None:
    labels = [label.strip().lower() for label in given]
    if not labels:
        labels = sorted({row["label"].lower() for row in rows if row.get("label")})
    if not labels:
        return None
    return decode_model(LabelSpace, {"name": "emotion", "labels": labels}, str(table or "labels"))


def _clip(folder: Path, name: str, where: str, report: IndexReport) -> Clip | None:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ManifestError(
            f"{where}: media path {name!r} leaves the media root {folder}. "
            "Index the folder that holds all files."
        )
    if path.is_dir():
        report.left_out.append(f"{where}: {name!r} is a folder, not a media file")
        return None
    try:
        sha256, n_bytes = file_sha256(path), path.stat().st_size
    except OSError as error:
        report.left_out.append(f"{where}: {name!r} cannot be read: {error.strerror}")
        return None
    try:
        facts = probe(path)
    except MediaError as error:
        report.suspicious.append(str(error))
        return Clip(sha256=sha256, n_bytes=n_bytes)
    return Clip(
        sha256=sha256,
        n_bytes=n_bytes,
        duration_s=facts.duration_s,
        has_video=facts.has_video and not facts.is_image,
        has_audio=facts.has_audio,
        has_image=facts.has_video,
    )


def _record(
    uid: str, row: dict[str, str], clip: Clip, space: LabelSpace | None, where: str
) -> Record:
    label = row.get("label") or None
    if label is not None:
        assert space is not None
        label = space.canonical(label, where)
    return decode_model(
        Record,
        {
            "uid": uid,
            "media": PurePosixPath(row["file"]).as_posix(),
            "clip": clip,
            "split": row.get("split") or None,
            "label": label,
            "peak_index": row.get("peak_index") or None,
            **{name: row.get(name) or None for name in _TEXTS},
        },
        where,
    )
