"""Lines of a text file, with their places, and the errors that all readers of text share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from cache.errors import ManifestError
from extract.corpora.reading import relative

MAX_LINE_CHARS = 1 << 20
"""No annotation has longer lines; a damaged or foreign file may be one line of gigabytes."""


def numbered_lines(
    file: Path, folder: Path, encodings: Sequence[str] = ("utf-8-sig",)
) -> Iterator[tuple[str, str]]:
    """Yield `(where, line)` of a text file's lines that are not blank, stripped.

    Args:
        file: The file.
        folder: The dataset's folder, which places are told relative to.
        encodings: Tried in order, line by line: some releases mix them.

    Raises:
        ManifestError: The file cannot be read, or a line is in none of the encodings.
    """
    name = relative(file, folder)
    try:
        with file.open("rb") as data:
            number = 0
            while raw := data.readline(MAX_LINE_CHARS + 1):
                number += 1
                if len(raw) > MAX_LINE_CHARS:
                    raise ManifestError(
                        f"{name}, line {number}: longer than {MAX_LINE_CHARS} bytes, so this is not the "
                        "annotation file that the layout expects. Give the original file."
                    )
                text = _decoded(raw, encodings, f"{name}, line {number}").strip()
                if text:
                    yield f"{name}, line {number}", text
    except OSError as error:
        raise ManifestError(f"{name}: cannot be read ({error.strerror})") from None


def _decoded(raw: bytes, encodings: Sequence[str], where: str) -> str:
    if b"\0" in raw:
        raise ManifestError(
            f"{where}: holds NUL bytes, so the file is damaged, binary, or UTF-16. Get it again, or "
            "convert it to UTF-8."
        )
    for encoding in encodings:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise ManifestError(
        f"{where}: not {' or '.join(e.removesuffix('-sig').upper() for e in encodings)} text. The file "
        "was saved in another encoding; convert it to UTF-8."
    )
