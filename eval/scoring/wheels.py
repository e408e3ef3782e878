"""The emotion wheels: which group a word belongs to, by word forms, synonyms and wheel sheets.

The tables are not shipped. They are read from a folder: `format.csv` (base word -> inflected forms),
`synonym.xlsx` (wheel word -> synonyms, in several runs) and `wheel1.xlsx`, `wheel2.xlsx`, ... (three
levels each). Five wheels make the hit rate and the F-score of MER-UniBench.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar
from xml.etree.ElementTree import ParseError

from cache.errors import MissingDependencyError, SchemaError
from eval.scoring.result import WheelTables

FORMS, SYNONYMS = "format.csv", "synonym.xlsx"
FOLDER_VARIABLE = "EMOCACHE_WHEELS"
"""Environment variable with the folder of the tables."""
SOURCE = (
    "The tables are in the public repository ooochen-30/Emotion-LLaMA-v2, folder evaluation (format.csv, "
    "synonym.xlsx, wheel1.xlsx to wheel5.xlsx)"
)
PUBLISHED: Mapping[str, str] = MappingProxyType(
    {
        FORMS: "ba6de7d61db8e129",
        SYNONYMS: "23f81f9ab1d2418a",
        "wheel1.xlsx": "e70485d354b82a74",
        "wheel2.xlsx": "acc001e076a8e604",
        "wheel3.xlsx": "d62f30bf88c17c55",
        "wheel4.xlsx": "660260561b7fe155",
        "wheel5.xlsx": "2dd4595b2cf8e762",
    }
)
"""File -> SHA-256, 16 hexadecimal digits, of the tables that the published scores rest on."""

_WHEEL = re.compile(r"wheel([1-9]\d*)\.xlsx")
_LEVELS = ("level1", "level2", "level3")


@dataclass(frozen=True)
class Wheels:
    """The tables, ready to look words up.

    Args:
        tables: Which they are.
        bases: Word form -> base words that have it.
        synonyms: Base word -> wheel words that it is a synonym of.
        wheels: Per wheel, word on it -> its group, the ancestor on level 1.
    """

    tables: WheelTables
    bases: Mapping[str, tuple[str, ...]]
    synonyms: Mapping[str, frozenset[str]]
    wheels: tuple[Mapping[str, str], ...]
    _found: dict[str, tuple[str | None, ...]] = field(default_factory=dict, repr=False)

    _read: ClassVar[dict[str, Wheels]] = {}

    @classmethod
    def load(cls, folder: Path) -> Wheels:
        """Read the tables of a folder; the same contents are read once per process.

        Raises:
            SchemaError: A table is missing, unreadable, or lacks a column; the file is named.
        """
        contents = _contents(folder)
        files = {name: _digest(data) for name, data in contents.items()}
        digest = _digest("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode())
        if digest not in cls._read:
            tables = WheelTables(digest=digest, files=files, published=files == PUBLISHED)
            sheets = [name for name in contents if _WHEEL.fullmatch(name)]
            cls._read[digest] = cls(
                tables,
                _read_forms(contents[FORMS], folder / FORMS),
                _read_synonyms(contents[SYNONYMS], folder / SYNONYMS),
                tuple(_read_wheel(contents[name], folder / name) for name in sheets),
            )
        return cls._read[digest]

    @property
    def names(self) -> tuple[str, ...]:
        """`wheel1`, `wheel2`, ..."""
        return tuple(f"wheel{number}" for number in range(1, len(self.wheels) + 1))

    def group(self, word: str, number: int) -> str | None:
        """Return the group of a word on a wheel; None: the wheel does not know it.

        Args:
            word: Case and outer blanks do not matter.
            number: Of the wheel, from 1.
        """
        return self.everywhere(word)[number - 1]

    def groups(self, words: Iterable[str], number: int) -> frozenset[str]:
        """Return the groups of some words on a wheel, from 1; unknown words are dropped."""
        found = (self.everywhere(word)[number - 1] for word in words)
        return frozenset(group for group in found if group is not None)

    def everywhere(self, word: str) -> tuple[str | None, ...]:
        """Return the group of a word on each wheel.

        Of all wheel words that the word leads to, the first in the alphabet that stands on the wheel
        decides; that the word itself stands there gives it no preference.
        """
        if word not in self._found:
            reached = sorted(
                {
                    wheel_word
                    for base in self.bases.get(_plain(word), ())
                    for wheel_word in self.synonyms.get(base, ())
                }
            )
            self._found[word] = tuple(
                next((wheel[known] for known in reached if known in wheel), None)
                for wheel in self.wheels
            )
        return self._found[word]

    def remarks(self) -> tuple[str, ...]:
        """Return what a reader of a score must know of these tables."""
        found = []
        if not self.tables.published:
            other = [
                f"{name} {digest}"
                + (f" (published {PUBLISHED[name]})" if name in PUBLISHED else "")
                for name, digest in self.tables.files.items()
                if PUBLISHED.get(name) != digest
            ]
            found.append(
                f"the wheel tables are not those of the published scores: {', '.join(other)}; scores "
                "are not comparable with published ones"
            )
        if len(self.wheels) != 5:
            found.append(f"{len(self.wheels)} wheels instead of the published five")
        return tuple(found)


def wheels_folder(given: Path | None) -> Path:
    """Return the folder of the wheel tables: the given one, else that of EMOCACHE_WHEELS.

    Raises:
        SchemaError: Neither is given; says where the tables come from.
    """
    if given is not None:
        return given
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    raise SchemaError(
        "hit rate and the F-score of open vocabularies need the emotion wheel tables, and no folder is "
        f"given. {SOURCE}; give their folder with --wheels DIR or in {FOLDER_VARIABLE}."
    )


def _contents(folder: Path) -> dict[str, bytes]:
    """Read the bytes of all tables, wheels in their order; refuse a folder that lacks one."""
    if not folder.is_dir():
        raise SchemaError(
            f"{folder}: no such folder of emotion wheel tables. {SOURCE}; give their folder with --wheels "
            f"DIR or in {FOLDER_VARIABLE}."
        )
    numbers = sorted(
        int(found[1]) for path in folder.iterdir() if (found := _WHEEL.fullmatch(path.name))
    )
    highest = max(numbers, default=1)
    contents = {
        name: _bytes(folder / name)
        for name in (FORMS, SYNONYMS, *(f"wheel{number}.xlsx" for number in range(1, highest + 1)))
    }
    # Of one's own tables there may be any number of wheels; the published ones are a set of five.
    if any(_digest(data) == PUBLISHED.get(name) for name, data in contents.items()):
        for name in PUBLISHED.keys() - contents.keys():
            contents[name] = _bytes(folder / name)
    return contents


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SchemaError(
            f"{path}: this emotion wheel table is missing. {SOURCE}; put all of them into one folder."
        ) from None
    except OSError as error:
        raise SchemaError(
            f"{path}: cannot read this emotion wheel table ({error.strerror})."
        ) from error


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _plain(cell: object) -> str:
    """Return a cell as text in lower case without outer blanks; of an empty cell nothing."""
    return "" if cell is None else str(cell).strip().lower()


def _read_forms(data: bytes, path: Path) -> dict[str, tuple[str, ...]]:
    """Turn base word -> forms around."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SchemaError(
            f"{path}: not a CSV table in UTF-8 ({error}); restore the file."
        ) from None
    places = _places(rows[0] if rows else (), ("name", "format"), path)
    bases: dict[str, dict[str, None]] = {}
    for number, row in enumerate(rows[1:], start=2):
        if len(row) > len(rows[0]):
            raise SchemaError(
                f"{path}, row {number}: {len(row)} cells, and the header has {len(rows[0])}. Quote the list "
                'of forms: name,"form,form".'
            )
        name, forms = (_plain(row[place]) if place < len(row) else "" for place in places)
        if not name:
            continue
        for form in (*forms.split(","), name):
            if form.strip():
                bases.setdefault(form.strip(), {})[name] = None
    return {form: tuple(names) for form, names in bases.items()}


def _read_synonyms(data: bytes, path: Path) -> dict[str, frozenset[str]]:
    """Pool the runs: synonym, or the word itself -> wheel words."""
    rows = _sheet(data, path)
    header = [_plain(cell) for cell in rows[0]] if rows else []
    runs = [name.removeprefix("word_run") for name in header if re.fullmatch(r"word_run\d+", name)]
    wanted = [f"{kind}_run{run}" for run in runs or ["1"] for kind in ("word", "synonym")]
    places = _places(header, wanted, path)
    found: dict[str, set[str]] = {}
    for row in rows[1:]:
        for word_place, synonym_place in zip(places[::2], places[1::2], strict=True):
            word = _plain(row[word_place])
            if not word:
                continue
            for synonym in (*_plain(row[synonym_place]).split(","), word):
                if synonym.strip():
                    found.setdefault(synonym.strip(), set()).add(word)
    return {base: frozenset(words) for base, words in found.items()}


def _read_wheel(data: bytes, path: Path) -> dict[str, str]:
    """Map every word of a sheet to its ancestor on level 1; of several ancestors the last visited."""
    rows = _sheet(data, path)
    places = _places([_plain(cell) for cell in rows[0]] if rows else (), _LEVELS, path)
    groups: dict[str, dict[str, None]] = {}
    first = second = ""
    for row in rows[1:]:
        one, two, three = (_plain(row[place]) for place in places)
        if one:
            # Beneath a new ancestor nothing continues.
            first, second = one, two
        else:
            second = two or second
        if first:
            words = groups.setdefault(first, {})
            words.update(dict.fromkeys(word for word in (first, second, three) if word))
        elif two or three:
            raise SchemaError(
                f"{path}: the first row has no level1; a blank cell stands for the one above."
            )
    if not groups:
        raise SchemaError(f"{path}: the sheet has no word; restore the file.")
    # Groups in the order of their first row, so a group that comes again is visited where it began.
    return {word: group for group, words in groups.items() for word in words}


def _places(header: Sequence[str], wanted: Sequence[str], path: Path) -> list[int]:
    names = [name.strip().lower() for name in header]
    for name in wanted:
        if name not in names:
            raise SchemaError(
                f"{path}: no column '{name}' (got {', '.join(filter(None, names)) or 'none'}). Needed: "
                f"{', '.join(wanted)}."
            )
    return [names.index(name) for name in wanted]


def _sheet(data: bytes, path: Path) -> list[tuple[Any, ...]]:
    """Return the rows of the first sheet of a workbook."""
    try:
        from openpyxl import load_workbook
        from openpyxl.utils.exceptions import InvalidFileException
    except ImportError as error:
        raise MissingDependencyError(
            "Reading the emotion wheel tables needs openpyxl: pip install 'emocache[eval]'"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Workbook contains no default style")
            book = load_workbook(io.BytesIO(data), data_only=True)
        rows = list(book.worksheets[0].iter_rows(values_only=True))
    except (
        InvalidFileException, zipfile.BadZipFile, zlib.error, ParseError, KeyError, IndexError, ValueError,
        TypeError, AttributeError, OSError, EOFError, NotImplementedError, RuntimeError,
    ) as error:  # fmt: skip
        raise SchemaError(
            f"{path}: not a readable .xlsx workbook ({type(error).__name__}: {error}); SHA-256 begins "
            f"{_digest(data)}. {SOURCE}; restore the file."
        ) from error
    return rows
