"""NumPy archives of plain arrays; those of Python objects are refused."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import ManifestError
from extract.corpora.reading import check_options, relative
from extract.corpora.values import Row

MAX_BYTES = 2**30
"""Of all arrays together, unpacked."""


def read_npz(file: Path, folder: Path, options: Mapping[str, Any]) -> Iterator[Row]:
    """Read an .npz whose arrays, all of one length, are the columns.

    Raises:
        ManifestError: Not an .npz, arrays of unequal length or more than one axis, or arrays of Python
            objects: reading those would unpickle them, which runs code that the file brings along.
    """
    name = relative(file, folder)
    check_options(options, (), name, "npz")
    columns: dict[str, list[str]] = {}
    try:
        with file.open("rb") as data:
            # Sizes first: a small archive can hold terabytes of zeros.
            with zipfile.ZipFile(data) as archive:
                if (size := sum(member.file_size for member in archive.infolist())) > MAX_BYTES:
                    raise ManifestError(
                        f"{name}: {size} bytes of arrays; labels have at most {MAX_BYTES}. Give labels, "
                        "not features."
                    )
            data.seek(0)
            with np.load(data, allow_pickle=False) as found:
                for key in found.files:
                    columns[key] = _texts(found, key, name)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"{name}: not a readable .npz archive ({error}). It is damaged or of another kind; get it "
            "again."
        ) from None
    lengths = {len(values) for values in columns.values()}
    if len(lengths) != 1:
        raise ManifestError(
            f"{name}: arrays of different lengths "
            f"({', '.join(f'{k} {len(v)}' for k, v in columns.items()) or 'none at all'}). Each must "
            "have one value per row."
        )
    for number in range(lengths.pop()):
        yield f"{name}, row {number}", {key: values[number] for key, values in columns.items()}


def _texts(found: Any, key: str, name: str) -> list[str]:
    try:
        array = found[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise ManifestError(
            f"{name}: the array {key!r} holds Python objects (MERBench's label.npz does). Reading them "
            "would run code from the file, so emocache never does. Use the corpus's original "
            "annotation files; or convert the archive where you trust it: load it there with "
            "allow_pickle, write a CSV with name and label, and index that with a mapping file."
        ) from None
    if array.ndim != 1:
        raise ManifestError(
            f"{name}: the array {key!r} has {array.ndim} axes; a column has one. Give labels, not "
            "features."
        )
    values = np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    return [str(value) for value in values.tolist()]
