"""Small emotion wheel tables, made by hand: three groups, and the quirks of the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

FORMS = {
    "happy": "happy,happiness,happier",
    "joyful": "joyful,joy",
    "sad": "sad,sadness",
    # A base word is a form of itself, listed or not.
    "gloomy": "gloomily",
    "angry": "angry,anger",
    "furious": "furious,fury",
    # "scared" is a form of a base word whose synonyms begin with a happy word.
    "fearless": "fearless,scared",
    "scared": "scared,scaredly",
    "no words": "",
    "null": "null,nan,none",
}
SYNONYMS = (
    {"Happy": "joyful, Cheerful", "sad": "gloomy", "angry": "furious", "brave": "fearless"},
    {"Happy ": "happy", "Terrified": "scared", "angry": "null"},
)
WHEEL = (
    ("Happy", "Brave", "Joyous"),
    (None, None, "Cheerful"),
    ("Sad", "Blue", "Gloomy"),
    (None, "Low", "Twice"),
    (" Angry ", " Mad ", " Twice "),
    ("Scared", "Terrified", "Shy"),
)
WITHOUT_SCARED = WHEEL[:5]
WHEELS = (WHEEL, WITHOUT_SCARED, WHEEL, WHEEL, WHEEL)


def write_wheels(
    folder: Path,
    wheels: Sequence[Sequence[Sequence[str | None]]] = WHEELS,
) -> Path:
    """Write the tables into a new folder and return it."""
    from openpyxl import Workbook

    folder.mkdir()
    lines = ["name,format", *(f'{name},"{forms}"' for name, forms in FORMS.items())]
    (folder / "format.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    book = Workbook()
    sheet = book.active
    sheet.append([f"{kind}_run{run}" for run in (1, 2) for kind in ("word", "synonym")])
    longest = max(map(len, SYNONYMS))
    for at in range(longest):
        row: list[str | None] = []
        for run in SYNONYMS:
            row += list(run.items())[at] if at < len(run) else [None, None]
        sheet.append(row)
    book.save(folder / "synonym.xlsx")
    for number, rows in enumerate(wheels, start=1):
        book = Workbook()
        for row in (("level1", "level2", "level3"), *rows):
            book.active.append(row)
        book.save(folder / f"wheel{number}.xlsx")
    return folder
