"""Frame choice: a table by hand, then properties. `pytest tests/test_sampling.py`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import SchemaError
from extract.sampling import frame_indices, window_draw

BY_HAND: list[tuple[dict[str, Any], list[int]]] = [
    ({"kind": "middle", "n_frames_available": 1}, [0]),
    ({"kind": "middle", "n_frames_available": 2}, [1]),
    ({"kind": "middle", "n_frames_available": 75}, [37]),
    ({"kind": "middle", "n_frames_available": 14}, [7]),
    ({"kind": "first", "n_frames_available": 75}, [0]),
    ({"kind": "peak", "n_frames_available": 75, "peak_index": 74}, [74]),
    ({"kind": "uniform", "n_frames_available": 75, "n_frames": 1}, [37]),
    ({"kind": "uniform", "n_frames_available": 1, "n_frames": 16}, [0] * 16),
    (
        # 14 frames: steps of 0.875 from 0.4375, so two frames are seen twice.
        {"kind": "uniform", "n_frames_available": 14, "n_frames": 16},
        [0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13],
    ),
    ({"kind": "uniform", "n_frames_available": 16, "n_frames": 16}, list(range(16))),
    (
        # 17 frames: the one in the very middle (8) is passed over.
        {"kind": "uniform", "n_frames_available": 17, "n_frames": 16},
        [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16],
    ),
    (
        # 75 frames, a GRID clip: 4.6875 apart from 2.34.
        {"kind": "uniform", "n_frames_available": 75, "n_frames": 16},
        [2, 7, 11, 16, 21, 25, 30, 35, 39, 44, 49, 53, 58, 63, 67, 72],
    ),
    (
        # 59 windows of 75 frames, numbers 0 to 58: 61 is the third one.
        {"kind": "window", "n_frames_available": 75, "n_frames": 16, "draw": 61},
        list(range(2, 18)),
    ),
    # The only window of 17 frames: the last frame is never reached.
    (
        {"kind": "window", "n_frames_available": 17, "n_frames": 16, "draw": 123},
        list(range(16)),
    ),
    ({"kind": "window", "n_frames_available": 16, "n_frames": 16, "draw": 5}, list(range(16))),
    (
        # 5 frames: steps of 4/15 from the first to the last.
        {"kind": "window", "n_frames_available": 5, "n_frames": 16, "draw": 5},
        [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4],
    ),
    ({"kind": "window", "n_frames_available": 5, "n_frames": 1, "draw": 6}, [2]),
    ({"kind": "window", "n_frames_available": 1, "n_frames": 1, "draw": 6}, [0]),
]


@pytest.mark.parametrize(("arguments", "expected"), BY_HAND)
def test_table_by_hand(arguments: dict[str, Any], expected: list[int]) -> None:
    assert frame_indices(**arguments) == expected


@given(available=st.integers(1, 10**7), wanted=st.integers(1, 512))
def test_uniform_properties(available: int, wanted: int) -> None:
    got = frame_indices("uniform", available, wanted)
    assert len(got) == wanted
    assert got == sorted(got)
    assert 0 <= got[0]
    assert got[-1] < available
    # A mirror image up to the rounding: what is left out at the start is left out at the end.
    for i in range(wanted):
        assert 0 <= available - 1 - got[wanted - 1 - i] - got[i] + 1 <= 1
    # Segments are equal, so gaps differ by one frame at most.
    gaps = {b - a for a, b in pairwise(got)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    if available >= wanted:
        assert len(set(got)) == wanted
    else:
        assert set(got) == set(range(available))


@given(available=st.integers(1, 10**6), wanted=st.integers(1, 64), draw=st.integers(0, 2**64 - 1))
def test_window_properties(available: int, wanted: int, draw: int) -> None:
    got = frame_indices("window", available, wanted, draw=draw)
    assert len(got) == wanted
    if available > wanted:
        assert got == list(range(got[0], got[0] + wanted))
        assert 0 <= got[0] < available - wanted  # the released code draws its end from [n, N)
    else:
        assert got[0] == 0
        assert wanted == 1 or got[-1] == available - 1
        assert set(got) <= set(range(available))
        if wanted > 1:
            # numpy's linspace, as the released code calls it, up to its own rounding
            exact = np.linspace(0, available - 1, wanted)
            assert np.all(np.abs(np.array(got) - np.floor(exact + 1e-9)) <= 1e-9)


def test_windows_depend_on_seed_and_digest_alone_and_lie_anywhere() -> None:
    digests = [f"{n:064x}" for n in range(2000)]
    starts = [frame_indices("window", 116, 16, draw=window_draw(42, d))[0] for d in digests]
    again = [frame_indices("window", 116, 16, draw=window_draw(42, d))[0] for d in digests[::-1]]
    assert again[::-1] == starts
    assert window_draw(42, digests[0]) != window_draw(43, digests[0])
    # 100 places, 20 clips each on average; a fair draw leaves none far off (chi-squared, 99 degrees).
    counts = np.bincount(starts, minlength=100)
    assert len(counts) == 100
    assert 60 < ((counts - 20) ** 2 / 20).sum() < 150


@given(available=st.integers(1, 10**7), data=st.data())
def test_single_frames_are_inside(available: int, data: st.DataObject) -> None:
    peak = data.draw(st.integers(0, available - 1))
    assert frame_indices("peak", available, peak_index=peak) == [peak]
    assert frame_indices("middle", available) == frame_indices("uniform", available, 1)
    assert frame_indices("first", available) == [0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "peak", "n_frames_available": 5}, "needs peak_index"),
        ({"kind": "peak", "n_frames_available": 5, "peak_index": 5}, "0 to 4 are allowed"),
        ({"kind": "peak", "n_frames_available": 5, "peak_index": -1}, "peak_index -1 is outside"),
        ({"kind": "middel", "n_frames_available": 5}, "Did you mean 'middle'"),
        ({"kind": "uniform", "n_frames_available": 0, "n_frames": 16}, "from 0 frames"),
        ({"kind": "uniform", "n_frames_available": 5, "n_frames": 0}, "n_frames is 0"),
        ({"kind": "middle", "n_frames_available": 5, "n_frames": 16}, "gives one frame"),
        ({"kind": "window", "n_frames_available": 5, "n_frames": 2}, "needs a draw"),
    ],
)
def test_refusals_say_what_is_allowed(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(SchemaError, match=words):
        frame_indices(**arguments)
