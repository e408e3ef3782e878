"""The peak rule, the words for a face, and the rules that hint at an emotion."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache.clip import Peak
from cache.errors import SchemaError
from extract.annotate.evidence.action_units import (
    BUILTIN,
    AuTable,
    FrameUnits,
    UnitFrequency,
    UnitTable,
    describe_face,
    load_units,
    peak_frame,
    present_units,
    pseudo_labels,
    unit_frequencies,
    unit_phrases,
)

OPENFACE_UNITS = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 23, 25, 26, 28, 45)


def table_of(*rows: dict[str, float], **more: Any) -> AuTable:
    return AuTable(
        frames=tuple(
            FrameUnits(index=i, pts_s=i / 25, intensities=row) for i, row in enumerate(rows)
        ),
        **more,
    )


# ---- Algorithm 1 ----------------------------------------------------------------------------------


def test_the_peak_is_the_frame_with_the_highest_sum() -> None:
    table = table_of(
        {"AU01": 0.5, "AU12": 1.0},  # 1.5
        {"AU01": 3.0, "AU12": 0.0},  # 3.0, the strongest single unit
        {"AU01": 1.75, "AU12": 1.5},  # 3.25
        {"AU01": 0.0, "AU12": 3.0},  # 3.0
    )
    peak = peak_frame(table)
    assert peak is not None
    assert peak.peak("openface-au-sum") == Peak(
        index=2, pts_s=0.08, method="openface-au-sum", score=3.25
    )


def test_the_first_of_equal_frames_is_the_peak() -> None:
    table = table_of({"AU12": 1.0}, {"AU12": 2.0}, {"AU01": 2.0}, {"AU12": 2.0})
    peak = peak_frame(table)
    assert peak is not None
    assert peak.index == 1


def test_equal_sums_are_equal_in_whatever_order_they_are_added() -> None:
    # Added from the left, 0.1 + 0.2 + 0.3 is more than 0.3 + 0.2 + 0.1.
    assert 0.1 + 0.2 + 0.3 > 0.3 + 0.2 + 0.1
    table = table_of(
        {"AU01": 0.3, "AU02": 0.2, "AU04": 0.1}, {"AU01": 0.1, "AU02": 0.2, "AU04": 0.3}
    )
    peak = peak_frame(table)
    assert peak is not None
    assert peak.index == 0


@pytest.mark.parametrize("rows", [(), ({},), ({"AU12": 0.0}, {"AU01": 0.0})])
def test_without_a_movement_there_is_no_peak(rows: tuple[dict[str, float], ...]) -> None:
    assert peak_frame(table_of(*rows)) is None


def test_units_can_be_left_out_of_the_sum() -> None:
    table = table_of({"AU45": 5.0, "AU12": 0.5}, {"AU12": 2.0})
    first, second = peak_frame(table), peak_frame(table, without=("AU45",))
    assert first is not None
    assert second is not None
    assert (first.index, second.index) == (0, 1)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["AU01", "AU04", "AU12", "AU45"]),
            # Hundredths, as OpenFace writes them, make ties likely.
            st.integers(0, 500).map(lambda n: n / 100),
        ),
        max_size=30,
    )
)
def test_the_peak_rule_is_the_loop_of_the_paper(rows: list[dict[str, float]]) -> None:
    # In hundredths, so that the sums are exact and nothing depends on how floats are added.
    sums = [sum(round(100 * value) for value in row.values()) for row in rows]
    highest, expected = 0, None
    for k, total in enumerate(sums):
        if total > highest:
            highest, expected = total, k
    peak = peak_frame(table_of(*rows))
    assert (None if peak is None else peak.index) == expected
    if peak is not None:
        assert peak.score == pytest.approx(max(sums) / 100)
        assert all(total < highest for total in sums[: peak.index])


@given(
    st.permutations(["AU01", "AU02", "AU04", "AU05"]),
    st.lists(st.floats(0, 5), min_size=4, max_size=4),
)
def test_the_score_does_not_depend_on_the_order_of_the_units(
    names: list[str], values: list[float]
) -> None:
    units = dict(zip(names, values, strict=True))
    score = FrameUnits(index=0, intensities=units).score
    assert score == FrameUnits(index=0, intensities=dict(sorted(units.items()))).score
    assert score == math.fsum(values)


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        ({"index": -1, "intensities": {}}, "greater than or equal to 0"),
        ({"index": 0, "intensities": {"AU1": 1.0}}, "AU"),
        ({"index": 0, "intensities": {"AU12": 5.5}}, "less than or equal to 5"),
        ({"index": 0, "intensities": {"AU12": math.nan}}, "finite|greater"),
        ({"index": 0, "intensities": {"AU12": -0.1}}, "greater than or equal to 0"),
    ],
)
def test_units_out_of_range_are_refused(frame: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        FrameUnits.model_validate(frame)


def test_tables_out_of_order_are_refused() -> None:
    frames = tuple(FrameUnits(index=i, intensities={}) for i in (0, 2, 2))
    with pytest.raises(ValidationError, match="in order"):
        AuTable(frames=frames)
    with pytest.raises(ValidationError, match="outside the 2 frames"):
        AuTable(frames=frames[:2], n_frames=2)


# ---- words ----------------------------------------------------------------------------------------


def test_the_built_in_table_has_words_for_all_that_openface_measures() -> None:
    table = load_units()
    assert [band.name for band in table.bands] == ["slight", "clear", "strong"]
    assert {f"AU{n:02d}" for n in OPENFACE_UNITS} <= table.units.keys()
    assert table.units["AU06"].name == "Cheek raiser"
    assert table.units["AU12"].name == "Lip corner puller"
    phrases = [
        phrase
        for words in table.units.values()
        for options in words.phrases.values()
        for phrase in options
    ]
    assert len(phrases) == len(set(phrases)) == 2 * 3 * len(table.units)
    for phrase in (*phrases, *table.rest):
        assert phrase == phrase.strip()
        assert phrase[0].islower()
        assert not phrase.endswith(".")


@pytest.mark.parametrize(
    ("intensity", "band"),
    [
        (0.0, None), (0.49, None), (0.5, "slight"), (1.49, "slight"), (1.5, "clear"),
        (2.99, "clear"), (3.0, "strong"), (5.0, "strong"),
    ],
)  # fmt: skip
def test_bands_reach_from_their_least_to_the_next(intensity: float, band: str | None) -> None:
    assert load_units().band_of(intensity) == band


def test_the_strongest_unit_is_described_first() -> None:
    intensities = {"AU25": 3.2, "AU01": 0.6, "AU04": 0.2, "AU06": 1.7, "AU12": 3.2}
    phrases = unit_phrases(intensities, "meld/dia0_utt1")
    assert list(phrases) == ["AU12", "AU25", "AU06", "AU01"]  # equals by name; AU04 is too weak
    units = load_units().units
    assert phrases["AU12"] in units["AU12"].phrases["strong"]
    assert phrases["AU06"] in units["AU06"].phrases["clear"]
    assert phrases["AU01"] in units["AU01"].phrases["slight"]


def small_table() -> UnitTable:
    return UnitTable.model_validate(
        {
            "bands": [{"name": "any", "least": 1.0}],
            "units": {
                f"AU{n:02d}": {"name": f"unit {n}", "phrases": {"any": [f"part {n} moves"]}}
                for n in (1, 2, 4, 5)
            },
            "rest": ["nothing moves"],
            "rules": {"mine": {"calm": ["AU01"]}},
        }
    )


@pytest.mark.parametrize(
    ("intensities", "text"),
    [
        ({}, "Nothing moves."),
        ({"AU01": 0.9}, "Nothing moves."),
        ({"AU01": 1.0}, "Part 1 moves."),
        ({"AU01": 1.0, "AU02": 2.0}, "Part 2 moves and part 1 moves."),
        (
            {"AU01": 1.0, "AU02": 2.0, "AU04": 1.5},
            "Part 2 moves, part 4 moves, and part 1 moves.",
        ),
        (
            {"AU01": 1.0, "AU02": 2.0, "AU04": 1.5, "AU05": 1.2},
            "Part 2 moves, part 4 moves, and part 5 moves. Part 1 moves.",
        ),
        ({"AU60": 4.0, "AU01": 1.0}, "Part 1 moves."),  # the table knows no AU60
    ],
)
def test_phrases_become_sentences(intensities: dict[str, float], text: str) -> None:
    assert describe_face(intensities, "any/uid", small_table()) == text


def test_the_choice_of_words_depends_on_the_uid_alone() -> None:
    intensities = {"AU12": 2.0, "AU06": 1.0, "AU25": 3.5}
    texts = {describe_face(intensities, f"mer2023/{n}") for n in range(200)}
    assert len(texts) == 2**3  # two phrases for each of three units, all combinations occur
    again = dict(reversed(intensities.items()))
    assert describe_face(intensities, "mer2023/7") == describe_face(again, "mer2023/7")


# ---- rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("present", "labels"),
    [
        (("AU06", "AU12"), ("happy",)),
        (("AU05", "AU26"), ("surprise",)),
        (("AU01", "AU04", "AU15"), ("sad",)),
        (("AU04", "AU05", "AU07", "AU23"), ("angry",)),
        (("AU12",), ()),
        ((), ()),
        # More units needed, named first; AU05 serves both.
        (("AU04", "AU05", "AU07", "AU23", "AU26"), ("angry", "surprise")),
        # The table's order among rules of the same length.
        (("AU05", "AU06", "AU12", "AU26"), ("happy", "surprise")),
    ],
)
def test_the_four_rules_of_merr(present: tuple[str, ...], labels: tuple[str, ...]) -> None:
    assert pseudo_labels(present) == labels


def test_other_sets_of_rules_go_by_name() -> None:
    assert pseudo_labels(("AU09", "AU15", "AU17"), rules="facs") == ("disgust",)
    with pytest.raises(SchemaError, match=r"'merrr'; there are merr, facs.*mean 'merr'"):
        pseudo_labels((), rules="merrr")


def test_presence_is_the_detectors_word_or_else_the_intensity() -> None:
    frame = FrameUnits(index=0, intensities={"AU12": 0.4, "AU06": 1.0, "AU04": 0.99})
    assert present_units(frame) == ("AU06",)
    told = frame.model_copy(update={"present": ("AU28", "AU12")})
    assert present_units(told) == ("AU12", "AU28")
    assert present_units(frame, small_table()) == ("AU06",)


def test_frequencies_by_hand() -> None:
    found = unit_frequencies([{"AU12": 2.0, "AU01": 0.5}, {"AU12": 1.0}, {}, {"AU06": 4.0}])
    assert found == {
        "AU06": UnitFrequency(1, 0.25, 4.0),
        "AU12": UnitFrequency(2, 0.5, 1.5),
    }
    assert unit_frequencies([{"AU01": 0.5}], least=0.5) == {"AU01": UnitFrequency(1, 1.0, 0.5)}
    assert unit_frequencies([]) == {}


# ---- a user's own table ---------------------------------------------------------------------------


def write(folder: Path, data: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(data))
    return path


def test_a_users_table_holds_only_what_differs(tmp_path: Path) -> None:
    words = {"slight": ["a"], "clear": ["b"], "strong": ["c"]}
    path = write(
        tmp_path,
        {
            "present_from": 2.0,
            "units": {
                "AU12": {"phrases": words},
                "AU01": {"phrases": {"strong": ["d"]}},
                "AU45": None,
            },
            "rules": {"merr": {"disgust": ["AU09"], "sad": None}, "mine": {"calm": ["AU43"]}},
        },
    )
    table, builtin = load_units(path), load_units()
    assert table.units["AU12"].name == "Lip corner puller"
    assert table.units["AU12"].phrases == {k: tuple(v) for k, v in words.items()}
    assert "AU45" not in table.units
    assert len(table.units) == len(builtin.units) - 1
    assert table.units["AU01"].phrases == {**builtin.units["AU01"].phrases, "strong": ("d",)}
    assert table.units["AU02"] == builtin.units["AU02"]
    assert list(table.rules) == ["merr", "facs", "mine"]
    assert list(table.rules["merr"]) == ["happy", "surprise", "angry", "disgust"]
    assert table.rules["facs"] == builtin.rules["facs"]
    assert table.present_from == 2.0
    assert table.bands == builtin.bands
    assert UnitTable.model_validate(json.loads(table.model_dump_json())) == table


def test_other_bands_need_all_units_anew(tmp_path: Path) -> None:
    bands = [{"name": name, "least": least} for name, least in (("weak", 0.2), ("full", 2.5))]
    own = {"AU12": {"name": "Smile", "phrases": {"weak": ["a"], "full": ["b"]}}}
    table = load_units(write(tmp_path, {"bands": bands, "units": own}))
    assert list(table.units) == ["AU12"]
    assert describe_face({"AU12": 2.6, "AU01": 3.0}, "c/1", table) == "B."
    # Other limits of the same bands keep the words.
    limits = [{"name": n, "least": x} for n, x in (("slight", 0.1), ("clear", 1), ("strong", 2))]
    table = load_units(write(tmp_path, {"bands": limits}))
    assert table.units == load_units().units
    assert table.band_of(2.0) == "strong"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([], "holds list, a JSON object is needed"),
        ({"unit": {}}, "unknown field 'unit'.*mean 'units'"),
        ({"units": {"AU12": {"phrases": {"clear": [], "strong": [" "]}}}}, "band clear, strong"),
        (
            {"units": {"AU12": {"phrases": {"slight": None}}}},
            "units.AU12 has no phrase for band slight",
        ),
        ({"units": {"AU60": {"phrases": {}}}}, "missing field 'units.AU60.name'"),
        (
            {"units": {"AU12": {"name": "x", "phrases": {"strongg": ["a"]}}}},
            "no band 'strongg'.*mean 'strong'",
        ),
        ({"units": {"AU1": None, "12": {}}}, "12"),
        ({"bands": [{"name": "a", "least": 1}, {"name": "b", "least": 1}]}, "ascend"),
        ({"rules": {"merr": {"sad": []}}}, "rules.merr.sad: give each unit once"),
        ({"rules": {"merr": {"sad": ["AU01", "AU01"]}}}, "rules.merr.sad: give each unit once"),
        ({"rules": {"merr": {"sad": ["lip"]}}}, "rules.merr.sad"),
        ({"rest": []}, "rest"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, data: Any, problem: str) -> None:
    with pytest.raises(SchemaError, match=problem) as caught:
        load_units(write(tmp_path, data))
    assert str(tmp_path) in str(caught.value)


def test_a_table_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"cannot be read.*Check the path"):
        load_units(tmp_path / "none.json")
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(SchemaError, match=f"not JSON.*{BUILTIN.name}"):
        load_units(tmp_path / "mine.json")
