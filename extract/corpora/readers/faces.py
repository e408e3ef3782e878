"""DFEW, MAFW and BOLD: labels by class number, by words after a file name, by rates of 26 categories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from cache.errors import ManifestError
from extract.corpora.readers.lines import numbered_lines
from extract.corpora.reading import check_options, relative
from extract.corpora.tables import read_table
from extract.corpora.values import Row

BOLD_CATEGORIES = (
    "Peace", "Affection", "Esteem", "Anticipation", "Engagement", "Confidence", "Happiness",
    "Pleasure", "Excitement", "Surprise", "Sympathy", "Doubt/Confusion", "Disconnect", "Fatigue",
    "Embarrassment", "Yearning", "Disapproval", "Aversion", "Annoyance", "Anger", "Sensitivity",
    "Sadness", "Disquietment", "Fear", "Pain", "Suffering",
)  # fmt: skip
"""Columns 5 to 30 of BOLD's annotation files, which have no header."""
_BOLD_COLUMNS = (
    "video", "person_id", "min_frame", "max_frame", *BOLD_CATEGORIES,
    "valence", "arousal", "dominance", "gender", "age", "ethnicity", "annotation_confidence",
)  # fmt: skip
_SET = re.compile(r"set_?(\d)$")
"""End of the names of DFEW's split files and MAFW's split folders: `set_1`, `single_trainset_1`."""


def read_dfew(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read a split file of DFEW: `video_name,label`.

    Yields:
        Its columns, `number` (the clip without leading zeros), `padded` (with five digits) and `set`
        (the split's number, from the file's name).

    Raises:
        ManifestError: A clip that is no number.
    """
    check_options(options, (), file.name, "dfew")
    found = _SET.search(file.stem)
    for where, row in read_table(file, folder, {}):
        name = row.get("video_name", "")
        if not name.isdecimal():
            raise ManifestError(
                f"{where}: video_name {name!r} is not the number of a clip. Expected a file with the "
                "columns video_name,label, as DFEW's set_1.csv."
            )
        yield (
            where,
            {
                **row,
                "number": str(int(name)),
                "padded": f"{int(name):05d}",
                "set": found[1] if found else "",
            },
        )


def read_mafw(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read a split or label file of MAFW.

    ::

        00001.mp4 anger                                      no_caption
        20045.mp4<TAB>anger_disgust<TAB>Chinese<TAB>English      with_caption

    Yields:
        Columns `clip` (without suffix), `label` (as written), `labels` (several, joined by `;`; empty
        where there is one only), `chinese` and `english` (empty without captions), `set`.

    Raises:
        ManifestError: A line of another form.
    """
    check_options(options, (), file.name, "mafw")
    found = _SET.search(file.parent.name)
    for where, line in numbered_lines(file, folder, ("utf-8-sig", "gb18030", "cp1252")):
        parts = [
            part.strip() for part in (line.split("\t") if "\t" in line else line.split(None, 1))
        ]
        if len(parts) < 2 or not parts[1] or PurePosixPath(parts[0]).suffix.lower() != ".mp4":
            raise ManifestError(
                f"{where}: {line[:80]!r} is not a clip and its label, such as `00001.mp4 anger`. Give "
                "MAFW's own text files."
            )
        clip, label, *captions = parts
        labels = re.split(r"[_,\s]+", label)
        # The captions of some releases open with a line break of HTML.
        chinese, english = ([c.removeprefix("<br>").strip() for c in captions] + ["", ""])[:2]
        yield (
            where,
            {
                "clip": PurePosixPath(clip).stem,
                "label": label,
                "labels": ";".join(labels) if len(labels) > 1 else "",
                "chinese": chinese,
                "english": english,
                "set": found[1] if found else "",
            },
        )


def read_bold(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read an annotation file of BOLD: 37 columns without header.

    Args:
        file: `annotations/train.csv`.
        folder: The dataset's folder.
        options: `threshold`: from which rate on a category counts as a label; 0.5 by default.

    Yields:
        All columns by name, `clip` (the video without its `.mp4`s), `source` (the film it is of),
        `person` and `labels` (the categories from the threshold on, joined by `;`).

    Raises:
        ManifestError: A rate that is no number, or other columns.
    """
    name = relative(file, folder)
    check_options(options, ("threshold",), name, "bold")
    try:
        threshold = float(options.get("threshold", 0.5))
    except ValueError:
        raise ManifestError(
            f"{name}: option threshold: {options['threshold']!r} is not a number from 0 to 1."
        ) from None
    for where, row in read_table(file, folder, {"columns": _BOLD_COLUMNS, "delimiter": ","}):
        try:
            labels = [c for c in BOLD_CATEGORIES if float(row[c]) >= threshold]
            person = str(int(float(row["person_id"])))
        except ValueError as error:
            raise ManifestError(
                f"{where}: {error}. Columns 5 to 30 are rates from 0 to 1, column 2 a person's number; "
                "the file has no header. Give BOLD's annotations/train.csv or val.csv."
            ) from None
        clip = "/".join(part.removesuffix(".mp4") for part in row["video"].split("/"))
        yield (
            where,
            {
                **row,
                "clip": clip,
                "source": clip.rpartition("/")[0],
                "person": person,
                "labels": ";".join(labels),
            },
        )
