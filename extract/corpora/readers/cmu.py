"""CMU-MOSI and CMU-MOSEI: labels in .csd files, the SDK's folds, transcripts of segments."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cache.errors import ManifestError
from extract.corpora.readers.csd import ComputationalSequence, opened
from extract.corpora.readers.lines import numbered_lines
from extract.corpora.reading import check_options, relative
from extract.corpora.values import Row

MAX_SOURCE_BYTES = 4 * 2**20
"""Of a file of folds; the SDK's have 60 kB."""
_ALIGNED = re.compile(r"(.+)\[(\d+)\]")
_FOLD = re.compile(r"standard_(train|valid|test)_fold")
_SILENCE = "sp"
"""The aligner's word for a pause."""


def read_segments(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read the labelled segments of a computational sequence.

    Args:
        file: For example CMU_MOSI_Opinion_Labels.csd.
        folder: The dataset's folder.
        options: `columns`: names of the values of a segment. `first`: number of a video's first
            segment, 0 by default. `rates`: those of `columns` that are emotions. `words`: name of the
            .csd with the words, beside this file or anywhere below the folder; may be absent.

    Yields:
        Columns `video`, `index` (from 0), `number` (from `first`), `start_s`, `end_s`, `at` (video and
        start, to join a transcript), each of `columns`, `rated` (those of `rates` above 0, joined by
        `;`) and `text` (what is said in the segment, empty without words).

    Raises:
        ManifestError: The file is damaged, holds something else, or has another number of values.
        MissingDependencyError: h5py is not installed.
    """
    name = relative(file, folder)
    check_options(options, ("columns", "first", "rates", "words"), name, "csd-segments")
    columns = _texts(options.get("columns", ("value",)))
    rates = _texts(options.get("rates", ()))
    first = int(options.get("first", 0))
    with ExitStack() as stack:
        labels = stack.enter_context(opened(file, name))
        words = None
        if path := _words_file(file, folder, str(options.get("words", ""))):
            words = stack.enter_context(opened(path, relative(path, folder)))
        for key in labels.videos():
            aligned = _ALIGNED.fullmatch(key)
            video, start = (aligned[1], int(aligned[2])) if aligned else (key, 0)
            values, intervals = labels.numbers(key), labels.intervals(key)
            if values.shape != (len(intervals), len(columns)):
                raise ManifestError(
                    f"{name}, {key}: features of shape {values.shape} with {len(intervals)} intervals; "
                    f"expected {len(columns)} values each ({', '.join(columns)}). Give the file of the "
                    "labels, not one of features."
                )
            spoken = _Spoken(words, key if words and key in words else video)
            for n, (row, (begin, end)) in enumerate(zip(values, intervals, strict=True)):
                index = start + n
                found = {c: _number(v) for c, v in zip(columns, row.tolist(), strict=True)}
                yield (
                    f"{name}, {video}[{index}]",
                    {
                        "video": video,
                        "index": str(index),
                        "number": str(first + index),
                        "start_s": _number(float(begin)),
                        "end_s": _number(float(end)),
                        "at": _at(video, float(begin)),
                        **found,
                        "rated": ";".join(c for c in rates if found[c] and float(found[c]) > 0),
                        "text": spoken.between(float(begin), float(end)),
                    },
                )


def read_folds(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read the standard folds of the SDK from its Python source, without running it.

    Args:
        file: `cmu_mosi_std_folds.py`: assignments of lists of texts.
        folder: The dataset's folder.
        options: None.

    Yields:
        Columns `video` and `fold` (`train`, `valid`, `test`).

    Raises:
        ManifestError: Not such a file.
    """
    name = relative(file, folder)
    check_options(options, (), name, "mmsdk-folds")
    try:
        source = file.read_bytes()[: MAX_SOURCE_BYTES + 1]
        if len(source) > MAX_SOURCE_BYTES:
            raise ManifestError(f"{name}: more than {MAX_SOURCE_BYTES} bytes; not a file of folds.")
        tree = ast.parse(source)
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read ({error.strerror})") from None
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ManifestError(
            f"{name}: not a Python source of lists ({error}). Give cmu_mosi_std_folds.py or "
            "cmu_mosei_std_folds.py of the CMU Multimodal SDK."
        ) from None
    n = 0
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        fold = _FOLD.fullmatch(target.id) if isinstance(target, ast.Name) else None
        if fold is None:
            continue
        assert isinstance(node, ast.Assign)
        items = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else []
        for item in items:
            if not (isinstance(item, ast.Constant) and isinstance(item.value, str)):
                raise ManifestError(
                    f"{name}, line {item.lineno}: an entry that is no text; only plain lists are read, "
                    "nothing is executed. Give the SDK's own file."
                )
            n += 1
            yield f"{name}, line {item.lineno}", {"video": item.value.strip(), "fold": fold[1]}
    if not n:
        raise ManifestError(
            f"{name}: no list standard_train_fold, standard_valid_fold or standard_test_fold. Give "
            "cmu_mosi_std_folds.py or cmu_mosei_std_folds.py of the CMU Multimodal SDK."
        )


def read_transcript(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read a transcript of MOSEI: lines `video___clip___start___end___text`.

    Yields:
        Columns `video`, `clip`, `at` (as in `read_segments`) and `transcript`.

    Raises:
        ManifestError: A line of another form.
    """
    check_options(options, (), file.name, "mosei-transcript")
    for where, line in numbered_lines(file, folder, ("utf-8-sig", "cp1252")):
        parts = line.split("___", 4)
        try:
            video, clip, start, _, text = parts
            at = _at(video, float(start))
        except ValueError:
            raise ManifestError(
                f"{where}: {line[:80]!r} is not video___clip___start___end___text. Give the files of "
                "CMU-MOSEI's Raw/Transcript/Segmented/Combined."
            ) from None
        yield where, {"video": video, "clip": clip, "at": at, "transcript": text.strip()}


def read_opinions(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read a transcript of MOSI, `<video>.annotprocessed`: lines `number_DELIM_text`.

    Yields:
        Columns `video`, `number` and `transcript`.

    Raises:
        ManifestError: A line of another form.
    """
    check_options(options, (), file.name, "mosi-transcript")
    for where, line in numbered_lines(file, folder, ("utf-8-sig", "cp1252")):
        number, delimiter, text = line.partition("_DELIM_")
        if not delimiter or not number.isdecimal():
            raise ManifestError(
                f"{where}: {line[:80]!r} is not number_DELIM_text. Give the files of CMU-MOSI's "
                "Raw/Transcript/Segmented."
            )
        yield where, {"video": file.stem, "number": number, "transcript": text.strip()}


class _Spoken:
    """The words of one video, read when they are asked for."""

    def __init__(self, words: ComputationalSequence | None, video: str) -> None:
        self._timed: list[tuple[float, str]] = []
        if words is not None and video in words:
            texts, intervals = words.words(video), words.intervals(video)
            if len(texts) != len(intervals):
                raise ManifestError(
                    f"{words.name}, {video}: {len(texts)} words with {len(intervals)} intervals. Get the "
                    "file again."
                )
            # A word belongs to the segment that holds its middle.
            middles = intervals.mean(axis=1).tolist()
            self._timed = [(m, t) for m, t in zip(middles, texts, strict=True) if t != _SILENCE]

    def between(self, start_s: float, end_s: float) -> str:
        return " ".join(text for middle, text in self._timed if start_s <= middle < end_s)


def _words_file(file: Path, folder: Path, name: str) -> Path | None:
    if not name:
        return None
    if (beside := file.with_name(name)).is_file():
        return beside
    return next(iter(sorted(folder.rglob(name))), None)


def _at(video: str, start_s: float) -> str:
    """Return what joins a segment and its line in the transcript, whose times are rounded."""
    return f"{video}@{start_s:.2f}"


def _number(value: float) -> str:
    # Labels are kept in 32 bits: 2.4000000953674316 is 2.4; and -0.0 is 0.
    return "" if math.isnan(value) else repr(round(value, 6) + 0.0)


def _texts(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(map(str, value))
