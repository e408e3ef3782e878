"""IEMOCAP: the evaluation files and the transcriptions of its dialogues.

::

    [6.2901 - 8.2357]<TAB>Ses01F_impro01_F000<TAB>neu<TAB>[2.5000, 2.5000, 2.5000]   EmoEvaluation/*.txt
    Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.                              transcriptions/*.txt

The lines of single raters (`C-E2:`, `A-E3:`) stand between those of the utterances and are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cache.errors import ManifestError
from extract.corpora.readers.lines import numbered_lines
from extract.corpora.reading import check_options
from extract.corpora.values import Row

_NUMBER = r"-?\d+(?:\.\d+)?"
_UTTERANCE = re.compile(
    rf"\[\s*({_NUMBER})\s*-\s*({_NUMBER})\s*\]\s+(\S+)\s+(\S+)\s+"
    rf"\[\s*({_NUMBER}),\s*({_NUMBER}),\s*({_NUMBER})\s*\]"
)
_SPOKEN = re.compile(rf"(Ses\S+)\s+\[\s*({_NUMBER})\s*-\s*({_NUMBER})\s*\]\s*:?(.*)")
_NAME = re.compile(r"(Ses(\d\d)[FM]_\w+)_([FM])([A-Z]*\d+)")
"""Dialogue, session, who speaks, number; the script dialogues have letters in the number (`MXX0`)."""


def read_evaluation(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read the consensus of an EmoEvaluation file.

    Yields:
        Columns `utterance`, `emotion` (as written: `neu`, `xxx`), `valence`, `activation`, `dominance`,
        `start_s`, `end_s`, `dialogue`, `session` (`1`), `gender` (`F` or `M`) and `speaker`
        (`Ses01_F`).

    Raises:
        ManifestError: The file has no utterance, or a line that opens like one and is not.
    """
    check_options(options, (), file.name, "iemocap-evaluation")
    found = False
    for where, line in numbered_lines(file, folder):
        if not line.startswith("["):
            # Also the header line, which opens with a percent sign.
            continue
        parts = _UTTERANCE.fullmatch(line)
        if parts is None:
            raise ManifestError(
                f"{where}: {line[:100]!r} is no line of an evaluation. Expected: [start - end], the "
                "utterance, its emotion and [valence, activation, dominance]. Get the file again."
            )
        found = True
        start, end, utterance, emotion, valence, activation, dominance = parts.groups()
        yield (
            where,
            {
                "utterance": utterance,
                "emotion": emotion,
                "valence": valence,
                "activation": activation,
                "dominance": dominance,
                "start_s": start,
                "end_s": end,
                **_named(utterance, where),
            },
        )
    if not found:
        raise ManifestError(
            f"{file.name}: no line `[start - end] utterance emotion [v, a, d]`. The files wanted are "
            "those directly in Session*/dialog/EmoEvaluation, not those of its sub-folders."
        )


def read_transcription(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read a dialogue's transcription.

    Lines without an utterance's name and time (remarks such as `F: (laughs)`) are no utterances.

    Yields:
        Columns `utterance` and `text`.

    Raises:
        ManifestError: No line is an utterance.
    """
    check_options(options, (), file.name, "iemocap-transcription")
    found = False
    for where, line in numbered_lines(file, folder, ("utf-8-sig", "cp1252")):
        parts = _SPOKEN.fullmatch(line)
        if parts is None:
            continue
        found = True
        yield where, {"utterance": parts[1], "text": parts[4].strip()}
    if not found:
        raise ManifestError(
            f"{file.name}: no line `utterance [start-end]: text`. The files wanted are those in "
            "Session*/dialog/transcriptions."
        )


def _named(utterance: str, where: str) -> dict[str, str]:
    parts = _NAME.fullmatch(utterance)
    if parts is None:
        raise ManifestError(
            f"{where}: {utterance!r} is no name of an IEMOCAP utterance, such as Ses01F_impro01_F000. "
            "Get the file again."
        )
    session = parts[2]
    return {
        "dialogue": parts[1],
        "session": str(int(session)),
        "gender": parts[3],
        "speaker": f"Ses{session}_{parts[3]}",
    }
