"""Which files a user means, and what to call their clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cache.errors import MediaError
from extract.corpora.media import MEDIA_SUFFIXES, MediaFolder


class ClipFile(NamedTuple):
    """A file to ask about."""

    path: Path
    name: str
    """What its record is called, unique among those of a call."""


def find_clips(paths: Iterable[Path]) -> tuple[list[ClipFile], list[str]]:
    """Return the files that are named, and those of folders that look like media, each once.

    A clip is called by its file's path below the folder without its ending, as indexing that folder does;
    where two would be called alike, by more of the path.

    Args:
        paths: Files, which are taken whatever they are called, and folders.

    Returns:
        The files in the order in which they are named, and remarks on what was left out.

    Raises:
        MediaError: There is no such file, or a folder without any media file.
    """
    found: dict[Path, tuple[Path, str]] = {}
    remarks: list[str] = []
    for path in paths:
        if path.is_dir():
            inside, left_out = _in_folder(path)
            remarks += left_out
        elif path.exists():
            inside = [(path, path.name)]
        else:
            raise MediaError(f"{path}: there is no such file or folder. Check the path.")
        for file, name in inside:
            found.setdefault(file.resolve(), (file, name))
    files = list(found.values())
    names = _unique(
        files,
        (
            lambda file: PurePosixPath(file[1]).with_suffix("").as_posix(),
            lambda file: file[1],
            lambda file: file[0].as_posix().lstrip("/"),
            lambda file: file[0].resolve().as_posix().lstrip("/"),
        ),
    )
    return [ClipFile(path, name) for (path, _), name in zip(files, names, strict=True)], remarks


def _in_folder(folder: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    listed = MediaFolder(folder)
    names = listed.media()
    if not names:
        raise MediaError(
            f"{folder}: holds no file that is called like media ({', '.join(sorted(MEDIA_SUFFIXES))}). Name "
            "the files themselves if they are called otherwise."
        )
    remarks = []
    n_others = len(listed.files) - len(names)
    if n_others:
        some = "other file is" if n_others == 1 else "other files are"
        remarks.append(f"{folder}: {n_others} {some} not called like media and not asked about")
    for link in listed.links:
        remarks.append(f"{folder}: {link} leads out of the folder and is not followed")
    return [(folder / name, name) for name in names], remarks


def _unique(
    files: Sequence[tuple[Path, str]],
    ways: Sequence[Callable[[tuple[Path, str]], str]],
) -> list[str]:
    """Return a name for each file: by the first way that gives it one for itself alone."""
    names = [ways[0](file) for file in files]
    for way in ways[1:]:
        count = Counter(names)
        names = [
            way(file) if count[name] > 1 else name for file, name in zip(files, names, strict=True)
        ]
    return names
