"""Media files below a root: finding those of records, and what their bytes say, read once."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from cache.clip import Clip, file_sha256
from cache.errors import ManifestError, MediaError, SchemaError
from cache.schema import decode as decode_model
from extract.memo import Memo

logger = logging.getLogger(__name__)

_KINDS = {
    suffix: kind
    for kind, suffixes in enumerate(
        (
            ".mp4 .m4v .mov .avi .mkv .webm .mpg .mpeg .wmv .flv .ts .3gp",
            ".wav .mp3 .flac .ogg .opus .m4a .aac .wma",
            ".png .jpg .jpeg .bmp .webp",
        )
    )
    for suffix in suffixes.split()
}
"""Suffix -> 0 video, 1 sound, 2 picture: of several files of one name the richer one is taken."""
MEDIA_SUFFIXES = frozenset(_KINDS)
"""What a folder is searched for, in any case; a table may name other files."""

_RACY_NS = 2_000_000_000
"""A file that changed this recently may change again without another time; it is not remembered."""
_SAVE_EVERY_S = 60.0


def is_media(name: str) -> bool:
    """Return whether a path has the suffix of a media file."""
    return PurePosixPath(name).suffix.lower() in MEDIA_SUFFIXES


class MediaFolder:
    """The media files below a root, listed once."""

    def __init__(self, root: Path) -> None:
        """List the files.

        Raises:
            ManifestError: No such folder.
        """
        if not root.is_dir():
            kind = "is a file" if root.exists() else "does not exist"
            raise ManifestError(f"{root}: {kind}. Give the folder that holds the media files.")
        self.root = root
        self._real = root.resolve()
        self.files: dict[str, None] = {}
        """Paths below the root with forward slashes, of all files that do not begin with a dot."""
        self.links: list[str] = []
        """Links that lead out of the root; nothing behind them is used."""
        self.misnamed: list[str] = []
        """Folders that are called like a media file."""
        self._by_path: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        self._walk(str(root), "")
        for name in self.files:
            stem, dot, suffix = name.rpartition(".")
            if dot and f".{suffix.lower()}" in MEDIA_SUFFIXES:
                self._by_path.setdefault(stem, []).append(name)
                self._by_stem.setdefault(stem.rpartition("/")[2], []).append(name)

    def _walk(self, folder: str, prefix: str) -> None:
        with os.scandir(folder) as entries:
            found = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
        for entry in found:
            name = prefix + entry.name
            if entry.is_symlink():
                real = Path(entry.path).resolve()
                if not real.is_relative_to(self._real):
                    self.links.append(name)
                elif not real.is_dir():  # one that leads nowhere is told when it is read
                    self.files[name] = None
            elif entry.is_dir():
                if is_media(name):
                    self.misnamed.append(name)
                self._walk(entry.path, f"{name}/")
            else:
                self.files[name] = None

    def media(self) -> list[str]:
        """Return the files that look like media, sorted."""
        return sorted(filter(is_media, self.files))

    def named(self, path: str) -> list[str]:
        """Return the media files of a path without its suffix."""
        return self._by_path.get(path, [])

    def find(self, paths: Sequence[str], source_id: str) -> str | None:
        """Return the file of a record.

        Args:
            paths: To try in order; without a media suffix, every one is tried.
            source_id: Without paths, the name of the file, anywhere below the root.

        Raises:
            ManifestError: Several files have that name.
        """
        for path in paths:
            if path in self.files:
                return path
            if path in self._by_path:
                return self._best(self._by_path[path], path)
        if paths:
            return None
        if source_id in self.files:
            return source_id
        named = self._by_path if "/" in source_id else self._by_stem
        found = named.get(source_id)
        return None if found is None else self._best(found, source_id)

    def _best(self, names: list[str], wanted: str) -> str:
        if len(names) == 1:
            return names[0]
        kinds = {n: _KINDS[f".{n.rpartition('.')[2].lower()}"] for n in names}
        best = [n for n in names if kinds[n] == min(kinds.values())]
        if len(best) > 1:
            raise ManifestError(
                f"{len(best)} media files for {wanted!r}: {', '.join(best[:3])}. Give the mapping a `media` "
                "template that names one, or remove the others"
            )
        return best[0]


@dataclass
class Looked:
    """What looking at files gave."""

    clips: dict[str, Clip] = field(default_factory=dict)
    """File -> clip."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """File -> why its bytes cannot be read."""
    suspicious: dict[str, str] = field(default_factory=dict)
    """File with a clip -> why it could not be opened as media."""
    n_remembered: int = 0


def look_at(
    root: Path, files: Sequence[str], on_file: Callable[[int], None] | None = None
) -> Looked:
    """Digest and probe files in parallel; those that did not change since are remembered.

    Args:
        root: The media root.
        files: Paths below it, each once.
        on_file: Called with the number of files done since the last call.
    """
    found = Looked()
    real = root.resolve()
    memo = Memo(f"media/{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json")
    same: dict[str, Clip] = {}
    todo: list[tuple[str, os.stat_result]] = []
    for name in files:
        try:
            stat = (real / name).stat()
        except OSError as error:
            found.unreadable[name] = f"cannot be read: {error.strerror}"
            continue
        clip = _remembered(memo.get(name), stat)
        if clip is None:
            todo.append((name, stat))
        else:
            found.clips[name] = same.setdefault(clip.sha256, clip)
            found.n_remembered += 1
    if on_file is not None and len(files) > len(todo):
        on_file(len(files) - len(todo))
    saved_s = time.monotonic()
    n_threads = min(32, 2 * (os.cpu_count() or 1) + 2)
    pool = ThreadPoolExecutor(n_threads, thread_name_prefix="media")
    waiting = iter(todo)
    try:
        # Few are handed out at a time, so that Ctrl-C need not wait for the rest.
        while batch := list(islice(waiting, 16 * n_threads)):
            for (name, stat), result in zip(
                batch, pool.map(lambda one: _look(real / one[0]), batch), strict=True
            ):
                _take(found, same, memo, name, stat, result)
                if on_file is not None:
                    on_file(1)
            if time.monotonic() - saved_s > _SAVE_EVERY_S:
                memo.save()
                saved_s = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        if todo:
            memo.save()
    return found


_Result = tuple[Clip | None, str | None]


def _look(path: Path) -> _Result:
    """Return the clip of a file and what is wrong with it."""
    from extract.media import probe

    try:
        if not path.is_file():  # to read from a pipe or a device may never end
            what = "a folder" if path.is_dir() else "a pipe or a device"
            return None, f"is {what}, not a media file"
        sha256, n_bytes = file_sha256(path), path.stat().st_size
    except OSError as error:
        return None, f"cannot be read: {error.strerror}"
    try:
        facts = probe(path)
    except MediaError as error:
        return Clip(sha256=sha256, n_bytes=n_bytes), str(error)
    return Clip(
        sha256=sha256,
        n_bytes=n_bytes,
        duration_s=facts.duration_s,
        has_video=facts.has_video and not facts.is_image,
        has_audio=facts.has_audio,
        has_image=facts.has_video,
        container=facts.container,
        video_codec=facts.video_codec,
        audio_codec=facts.audio_codec,
        width_px=facts.width_px,
        height_px=facts.height_px,
        n_frames=facts.n_frames,
        sample_rate_hz=facts.sample_rate_hz,
    ), None


def _take(
    found: Looked,
    same: dict[str, Clip],
    memo: Memo,
    name: str,
    stat: os.stat_result,
    result: _Result,
) -> None:
    clip, problem = result
    if clip is None:
        found.unreadable[name] = problem or "cannot be read"
        return
    found.clips[name] = same.setdefault(clip.sha256, clip)
    if problem is not None:
        found.suspicious[name] = problem
    elif time.time_ns() - stat.st_mtime_ns > _RACY_NS and clip.n_bytes == stat.st_size:
        memo.put(name, [*_stamp(stat), clip.model_dump(exclude_none=True)])


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _remembered(value: Any, stat: os.stat_result) -> Clip | None:
    """Return the remembered clip of a file, if the file has not changed since."""
    if not isinstance(value, list) or len(value) != 4 or value[:3] != _stamp(stat):
        return None
    try:
        return decode_model(Clip, value[3], "memo")
    except SchemaError:  # of another release
        return None
