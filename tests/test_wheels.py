"""The emotion wheels: made by hand, and the real tables against the facts that are known of them."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

import openpyxl
import pytest

from cache.errors import SchemaError
from eval.scoring.rules import hit_rate
from eval.scoring.wheels import PUBLISHED, Wheels, wheels_folder
from tests.conftest import SHARED
from tests.wheel_tables import WHEEL, WITHOUT_SCARED, write_wheels

REAL = SHARED / "reference" / "emotion_wheel"
needs_tables = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the tables in ../shared/reference/emotion_wheel"
)


def test_a_word_goes_over_its_forms_and_synonyms_to_its_ancestor(tmp_path: Path) -> None:
    wheels = Wheels.load(write_wheels(tmp_path / "wheels"))

    assert wheels.names == ("wheel1", "wheel2", "wheel3", "wheel4", "wheel5")
    # happiness -> happy -> happy (a synonym of itself), which stands on the wheel
    assert wheels.group("happiness", 1) == "happy"
    # joy -> joyful, a synonym of happy in run 1; joyful itself stands on no wheel
    assert wheels.group("joy", 1) == "happy"
    # gloomily -> gloomy -> sad; level 3 under Sad
    assert wheels.group("gloomily", 1) == wheels.group("gloomy", 1) == "sad"
    assert wheels.group(" FURY ", 1) == "angry"
    # What a CSV reader takes for a missing value is a word.
    assert wheels.group("nan", 1) == "angry"
    assert wheels.group("null", 1) == "angry"
    # A word on the wheel that is no known form has no group.
    assert wheels.group("blue", 1) is None
    assert wheels.group("no words", 1) is None
    assert wheels.group("", 1) is None


def test_the_first_reachable_word_of_the_alphabet_decides_not_the_word_itself(
    tmp_path: Path,
) -> None:
    wheels = Wheels.load(write_wheels(tmp_path / "wheels"))
    # scared -> fearless -> brave (under Happy), and scared -> terrified and scared (under Scared)
    assert wheels.everywhere("scared") == ("happy",) * 5


def test_of_several_ancestors_the_last_visited_counts(tmp_path: Path) -> None:
    folder = write_wheels(tmp_path / "wheels")
    rows = (("Sad", "Blue", "Brave"), ("Happy", "Glad", "Brave"), ("Sad", "Low", "Down"))
    _write_sheet(folder / "wheel1.xlsx", rows)
    wheels = Wheels.load(folder)
    # Sad comes again later, but is visited where it began: Happy is the last one with brave.
    assert wheels.wheels[0]["brave"] == "happy"
    assert wheels.wheels[0]["down"] == "sad"


def test_blank_cells_continue_the_row_above(tmp_path: Path) -> None:
    wheels = Wheels.load(write_wheels(tmp_path / "wheels"))
    on_first = wheels.wheels[0]
    assert on_first["cheerful"] == on_first["brave"] == on_first["happy"] == "happy"
    assert on_first["mad"] == on_first["twice"] == "angry"  # padded cells


def test_groups_drop_unknown_words_and_repeats(tmp_path: Path) -> None:
    wheels = Wheels.load(write_wheels(tmp_path / "wheels"))
    assert wheels.groups(["joy", "happy", "quixotic", "sad"], 1) == {"happy", "sad"}
    assert wheels.groups([], 1) == frozenset()


def test_equal_tables_are_read_once_and_changed_ones_again(tmp_path: Path) -> None:
    folder = write_wheels(tmp_path / "wheels")
    first = Wheels.load(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert Wheels.load(copy) is first
    with (copy / "format.csv").open("a") as file:
        file.write('merry,"merry"\n')
    other = Wheels.load(copy)
    assert other is not first
    assert other.tables.digest != first.tables.digest
    assert other.tables.files["wheel1.xlsx"] == first.tables.files["wheel1.xlsx"]


def test_tables_of_ones_own_are_said_to_be_so_with_their_digests(tmp_path: Path) -> None:
    wheels = Wheels.load(write_wheels(tmp_path / "wheels", (WHEEL, WITHOUT_SCARED)))
    assert not wheels.tables.published
    other, count = wheels.remarks()
    assert wheels.tables.files["format.csv"] in other
    assert PUBLISHED["format.csv"] in other
    assert count == "2 wheels instead of the published five"


@pytest.mark.parametrize("name", ["format.csv", "synonym.xlsx", "wheel2.xlsx"])
def test_a_missing_table_is_named(tmp_path: Path, name: str) -> None:
    folder = write_wheels(tmp_path / "wheels")
    (folder / name).unlink()
    with pytest.raises(
        SchemaError, match=rf"{name}: this emotion wheel table is missing.*Emotion-LLaMA-v2"
    ):
        Wheels.load(folder)


def test_a_folder_without_any_table_and_no_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SchemaError, match="no such folder"):
        Wheels.load(tmp_path / "nowhere")
    with pytest.raises(SchemaError, match=r"format\.csv: this emotion wheel table is missing"):
        Wheels.load(tmp_path)
    monkeypatch.delenv("EMOCACHE_WHEELS", raising=False)
    with pytest.raises(SchemaError, match=r"--wheels DIR or in EMOCACHE_WHEELS"):
        wheels_folder(None)
    monkeypatch.setenv("EMOCACHE_WHEELS", str(tmp_path))
    assert wheels_folder(None) == tmp_path
    assert wheels_folder(Path("given")) == Path("given")


def test_tables_that_are_none_are_named(tmp_path: Path) -> None:
    folder = write_wheels(tmp_path / "wheels")
    (folder / "wheel3.xlsx").write_bytes(b"")
    with pytest.raises(SchemaError, match=r"wheel3\.xlsx: not a readable \.xlsx workbook"):
        Wheels.load(folder)
    data = (folder / "wheel1.xlsx").read_bytes()
    # Bytes of a compressed sheet that were changed on the way.
    middle = data.index(b"xl/worksheets/sheet1.xml") + 40
    (folder / "wheel3.xlsx").write_bytes(data[:middle] + b"\xff" * 40 + data[middle + 40 :])
    with pytest.raises(SchemaError, match=r"wheel3\.xlsx: not a readable \.xlsx workbook"):
        Wheels.load(folder)
    (folder / "wheel3.xlsx").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        SchemaError, match=r"wheel3\.xlsx: not a readable.*SHA-256 begins [0-9a-f]{16}"
    ):
        Wheels.load(folder)
    _write_sheet(folder / "wheel3.xlsx", [("a", "b", "c")], header=("level1", "level2", "third"))
    with pytest.raises(
        SchemaError, match=r"wheel3\.xlsx: no column 'level3' \(got level1, level2, third"
    ):
        Wheels.load(folder)
    _write_sheet(folder / "wheel3.xlsx", [])
    with pytest.raises(SchemaError, match=r"wheel3\.xlsx: the sheet has no word"):
        Wheels.load(folder)
    _write_sheet(folder / "wheel3.xlsx", WHEEL)
    (folder / "format.csv").write_text("word,forms\na,b\n")
    with pytest.raises(SchemaError, match=r"format\.csv: no column 'name' \(got word, forms\)"):
        Wheels.load(folder)
    (folder / "format.csv").write_text("name,format\nhappy,happy,happiness\n")
    with pytest.raises(SchemaError, match=r"format\.csv, row 2: 3 cells, and the header has 2"):
        Wheels.load(folder)
    (folder / "format.csv").write_bytes(b"name,format\n\xff,b\n")
    with pytest.raises(SchemaError, match=r"format\.csv: not a CSV table in UTF-8"):
        Wheels.load(folder)


def test_the_reading_of_tables_asks_for_the_library_that_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_wheels(tmp_path / "wheels")
    (folder / "format.csv").write_text("name,format\nunseen,unseen\n")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(ImportError, match=r"openpyxl: pip install 'emocache\[eval\]'"):
        Wheels.load(folder)


@needs_tables
def test_the_real_tables_have_the_counts_that_are_known_of_them() -> None:
    wheels = Wheels.load(REAL)
    assert wheels.tables.published
    assert wheels.remarks() == ()
    assert len(wheels.bases) == 7386
    assert len(wheels.synonyms) == 1255
    assert len(set().union(*wheels.wheels)) == 253
    assert [set(wheel.values()) for wheel in wheels.wheels] == [
        set("mad disgusted sad happy surprised scared".split()),
        set("fearful angry disgusted sad surprised happy bad".split()),
        set("mad scared joyful powerful peaceful sad".split()),
        set("joy genius anger sad fear disgust".split()),
        set("mad scared joyful powerful peaceful sad".split()),
    ]


@needs_tables
@pytest.mark.parametrize(
    ("word", "groups"),
    [
        ("neutral", "- - - - -"),
        ("fear", "scared happy joyful genius joyful"),
        ("happy", "happy happy joyful joy powerful"),
        ("surprise", "surprised surprised powerful fear -"),
        ("disgust", "disgusted disgusted - disgust -"),
        ("worried", "scared fearful scared fear scared"),
    ],
)
def test_the_groups_of_the_benchmarks_words_are_the_known_ones(word: str, groups: str) -> None:
    found = Wheels.load(REAL).everywhere(word)
    assert [group or "-" for group in found] == groups.split()


@needs_tables
def test_words_under_several_ancestors_of_wheel_2_go_to_the_last() -> None:
    second = Wheels.load(REAL).wheels[1]
    words = ("overwhelmed", "inferior", "embarrassed", "disappointed")
    assert [second[word] for word in words] == ["bad", "sad", "sad", "sad"]


@needs_tables
@pytest.mark.parametrize(
    ("truths", "scored", "per_wheel"),
    [
        # Section 1: MER2023 323 (305 on wheel 5), MER2024 968 (885), MELD 1354 (1286 on 3, 1005 on 5)
        ("angry 105 happy 93 neutral 88 worried 57 sad 50 surprise 18", 323, {5: 305}),
        ("sad 317 happy 246 neutral 201 angry 163 worried 159 surprise 83", 968, {5: 885}),
        (
            "neutral 1256 joy 402 anger 345 surprise 281 sadness 208 disgust 68 fear 50",
            1354,
            {3: 1286, 5: 1005},
        ),
        ("happiness 612 neutral 386 sadness 311 anger 187", 1110, {}),
    ],
    ids=["mer2023", "mer2024", "meld-e", "iemocap"],
)
def test_as_many_truths_are_scored_as_is_known(
    truths: str, scored: int, per_wheel: dict[int, int]
) -> None:
    words = truths.split()
    counts = Counter({w: int(n) for w, n in zip(words[::2], words[1::2], strict=True)})
    given = list(counts.elements())
    tally = hit_rate(given, [(word,) for word in given], Wheels.load(REAL))
    assert int(tally.scored.sum()) == scored
    sums = dict(zip(tally.columns, tally.sums, strict=True))
    for number in range(1, 6):
        assert sums[f"scored wheel{number}"] == per_wheel.get(number, scored)
    assert tally.total == 1


@needs_tables
def test_joy_hits_a_truth_of_fear_on_wheels_2_and_3_and_scared_misses_on_four() -> None:
    wheels = Wheels.load(REAL)
    joy = hit_rate(["fear"], [("joy",)], wheels)
    assert [name for name, part in joy.parts(joy.sums).items() if part] == ["wheel2", "wheel3"]
    scared = hit_rate(["fear"], [("scared",)], wheels)
    assert list(scared.parts(scared.sums).values()) == [1, 0, 0, 0, 0]


@needs_tables
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_tables_are_a_set_that_lacks_nothing(tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for other in PUBLISHED.keys() - {name}:
        shutil.copyfile(REAL / other, copy / other)
    with pytest.raises(SchemaError, match=f"{name}: this emotion wheel table is missing"):
        Wheels.load(copy)


@needs_tables
def test_an_altered_table_is_used_and_told_with_both_digests(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in PUBLISHED:
        shutil.copyfile(REAL / name, copy / name)
    text = (copy / "format.csv").read_text(encoding="utf-8")
    # What the later revision of the table changed: "fear" is no form of "fearless" any more.
    changed = "\n".join(
        line.replace(",fear,", ",").replace(',fear"', '"').replace('"fear,', '"')
        if line.startswith("fearless,")
        else line
        for line in text.splitlines()
    )
    assert changed != text
    (copy / "format.csv").write_text(changed + "\n", encoding="utf-8")
    wheels = Wheels.load(copy)
    assert not wheels.tables.published
    (remark,) = wheels.remarks()
    assert f"format.csv {wheels.tables.files['format.csv']}" in remark
    assert f"published {PUBLISHED['format.csv']}" in remark
    # And with it, fear lies where one expects it.
    assert wheels.everywhere("fear") == ("scared", "fearful", "scared", "fear", "scared")


def _write_sheet(
    path: Path, rows: object, header: tuple[str, ...] = ("level1", "level2", "level3")
) -> None:
    book = openpyxl.Workbook()
    for row in (header, *rows):  # type: ignore[misc]
        book.active.append(row)
    book.save(path)
