"""CREMA-D and EmoDB, whose file names say who speaks what, and how.

::

    1001_IEO_HAP_LO       CREMA-D: actor, sentence, emotion, level
    03a01Wa               EmoDB: speaker, sentence, emotion (German initial), version
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache.errors import ManifestError
from extract.corpora.reading import check_options, relative
from extract.corpora.tables import OPTIONS, read_table
from extract.corpora.values import Row

_CREMA_D = re.compile(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_([A-Z]{1,2})")
_EMODB = re.compile(r"(\d\d)([ab]\d\d)([A-Z])([a-z])")
_FOLD = re.compile(r"_fold_(\d+)$")


def read_crema_d(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read SentenceFilenames.csv, or the name of a media file.

    Args:
        file: A .csv with a column `Filename`, or a media file.
        folder: The dataset's folder.
        options: `texts`: sentence code -> what is said.

    Yields:
        Columns `Filename`, `actor`, `sentence`, `emotion`, `level` and `text`.

    Raises:
        ManifestError: A name that is none of CREMA-D's.
    """
    check_options(options, ("texts",), file.name, "crema-d")
    texts = _texts(options, relative(file, folder))
    if file.suffix.lower() == ".csv":
        rows = read_table(file, folder, {})
    else:
        rows = iter([(relative(file, folder), {"Filename": file.stem})])
    for where, row in rows:
        name = row.get("Filename", "")
        parts = _CREMA_D.fullmatch(name)
        if parts is None:
            raise _unknown(name, where, "CREMA-D", "1001_IEO_HAP_LO")
        actor, sentence, emotion, level = parts.groups()
        yield (
            where,
            {
                **row,
                "actor": actor,
                "sentence": sentence,
                "emotion": emotion,
                "level": level,
                "text": texts.get(sentence, ""),
            },
        )


def read_crema_d_votes(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read summaryTable.csv: what most raters heard, saw, and heard and saw.

    Yields:
        Columns `Filename` and, for `voice`, `face` and `both`, `<which>` (the one winner, or empty
        on a tie) and `<which>_all` (all winners, joined by `;`).

    Raises:
        ManifestError: A column is missing.
    """
    check_options(options, (), file.name, "crema-d-votes")
    columns = {"voice": "VoiceVote", "face": "FaceVote", "both": "MultiModalVote"}
    for where, row in read_table(file, folder, {}):
        lacking = [c for c in ("FileName", *columns.values()) if c not in row]
        if lacking:
            raise ManifestError(
                f"{where}: no column {lacking[0]!r}. Found: {', '.join(row)}. Give "
                "processedResults/summaryTable.csv of CREMA-D."
            )
        found = {"Filename": row["FileName"]}
        for which, column in columns.items():
            winners = [v for v in row[column].split(":") if v]
            found[which] = winners[0] if len(winners) == 1 else ""
            found[f"{which}_all"] = ";".join(winners)
        yield where, found


def read_emodb(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read the name of an EmoDB file.

    Args:
        file: `wav/03a01Wa.wav`.
        folder: The dataset's folder.
        options: `texts`: sentence code -> what is said.

    Yields:
        Columns `code`, `speaker`, `sentence`, `letter`, `version`, `text` and `path`.

    Raises:
        ManifestError: A name that is none of EmoDB's.
    """
    check_options(options, ("texts",), file.name, "emodb")
    name = relative(file, folder)
    yield name, {"path": name, **_emodb(file.stem, name, _texts(options, name))}


def read_emobox(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read an EmoBox file of EmoDB, and add what the names of the sound files say.

    Yields:
        The file's columns, those of `read_emodb`, and `fold` from a name that ends in `_fold_1`.

    Raises:
        ManifestError: An entry without a sound file of EmoDB.
    """
    check_options(options, (*OPTIONS, "texts"), file.name, "emobox")
    texts = _texts(options, relative(file, folder))
    fold = _FOLD.search(file.stem)
    rest = {key: value for key, value in options.items() if key != "texts"}
    for where, row in read_table(file, folder, rest):
        path = row.get("wav", "")
        yield (
            where,
            {
                **row,
                "path": path,
                "fold": fold[1] if fold else "",
                **_emodb(Path(path).stem, where, texts),
            },
        )


def _emodb(code: str, where: str, texts: Mapping[str, str]) -> dict[str, str]:
    parts = _EMODB.fullmatch(code)
    if parts is None:
        raise _unknown(code, where, "EmoDB", "03a01Wa")
    speaker, sentence, letter, version = parts.groups()
    return {
        "code": code,
        "speaker": speaker,
        "sentence": sentence,
        "letter": letter,
        "version": version,
        "text": texts.get(sentence, ""),
    }


def _texts(options: Mapping[str, Any], where: str) -> Mapping[str, str]:
    texts = options.get("texts", {})
    if not isinstance(texts, Mapping):
        raise ManifestError(
            f"{where}: option texts: a {type(texts).__name__}, not a mapping of sentence codes to texts."
        )
    return texts


def _unknown(name: str, where: str, corpus: str, example: str) -> ManifestError:
    return ManifestError(
        f"{where}: {name!r} is no file name of {corpus}, such as {example}. Remove what does not belong "
        "to the corpus, or correct the name."
    )
