"""What every reader of a dataset's files shares: how it is called, how it names places and options."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.errors import ManifestError, near_miss
from extract.corpora.values import Row

Reader = Callable[[Path, Path, Mapping[str, Any]], Iterator[Row]]
"""Called with the file, the dataset's folder and the options of the source."""


def relative(file: Path, folder: Path) -> str:
    """Return a file's path below the dataset's folder, with forward slashes."""
    try:
        return file.relative_to(folder).as_posix()
    except ValueError:
        return file.name


def check_options(
    options: Mapping[str, Any], allowed: Sequence[str], where: str, reader: str
) -> None:
    """Refuse an option that a reader does not know, with a near miss."""
    for option in options:
        if option not in allowed:
            raise ManifestError(
                f"{where}: the reader '{reader}' has no option {option!r}."
                f"{near_miss(option, allowed)} Allowed: {', '.join(allowed)}."
            )
