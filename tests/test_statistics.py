"""Statistics of stored tokens: small clips by hand, many by numpy, and the figure."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cache.errors import CorruptTokensError, SpecMismatchError
from cache.spec import TokenSpec
from cache.statistics import StatisticsCollector, TokenStatistics, collect
from eval.plots import plot_statistics
from train.presets import v2


def narrow(stream: str, width: int) -> TokenSpec:
    """Return the paper's spec of a stream with fewer channels and made-up weights."""
    spec: TokenSpec = getattr(v2().tokens, stream).with_weights("ab" * 32)
    return spec.model_copy(update={"encoder": spec.encoder.model_copy(update={"width": width})})


def heavy_clips(n_clips: int, width: int) -> list[npt.NDArray[np.float16]]:
    """Return audio clips of 10 to 600 frames in which channels 3 and 5 are 40 and 20 times larger."""
    rng = np.random.default_rng(0)
    gain = np.ones(width)
    gain[[3, 5]] = 40, 20
    shapes = [(int(n), width) for n in rng.integers(10, 600, n_clips)]
    return [
        (rng.standard_normal(s) * gain * np.exp(rng.normal(0, 0.5, (s[0], 1)))).astype(np.float16)
        for s in shapes
    ]


def test_two_clips_by_hand() -> None:
    """Norms 5, 13, 0 and 17; squares 9 + 25 + 0 + 64 and 16 + 144 + 0 + 225 over 4 tokens."""
    first = np.array([[3, 4], [-5, 12], [0, 0]], np.float16)
    second = np.array([[8, -15]], np.float16)
    found = collect(narrow("audio", 2), [first, second])
    assert (found.n_clips, found.n_tokens, found.n_zero_tokens) == (2, 4, 1)
    assert (found.minimum, found.maximum) == (-15, 12)
    assert found.zero_share == 2 / 8
    assert found.channel_rms == pytest.approx(((98 / 4) ** 0.5, (385 / 4) ** 0.5))
    assert found.median_channel_rms == pytest.approx(sum(found.channel_rms) / 2)
    assert found.outlier_channels == ()
    # Nearest rank of 0, 5, 13, 17: the first, the first, the second, the third, the fourth.
    norms = found.token_norm
    assert (norms.p1, norms.p25) == (0, 0)
    assert (norms.p50, norms.p75, norms.p99) == pytest.approx((5, 13, 17), rel=0.003)
    assert sum(found.token_norms.counts) == 3
    assert found.token_norms.edges[0] <= 5
    assert found.token_norms.edges[-1] >= 17
    assert found.valid_lens == ((1, 1), (3, 1))
    assert (found.valid_len.p50, found.valid_len.p75) == (1, 3)
    assert found.duration_s is not None
    assert (found.duration_s.p50, found.duration_s.p99) == (1 / 50, 3 / 50)
    assert found.durations_s is not None
    assert (found.durations_s.edges, found.durations_s.counts) == ((0, 1), (2,))


def test_durations_fall_into_whole_seconds() -> None:
    clips = [np.ones((n, 1), np.float16) for n in (1, 49, 50, 99, 100, 149, 150)]
    found = collect(narrow("audio", 1), clips).durations_s
    assert found is not None
    # 0.02 and 0.98 s; 1.00 and 1.98 s; 2.00 and 2.98 s, and 3.00 s at the end of the last bin.
    assert (found.edges, found.counts) == ((0, 1, 2, 3), (2, 2, 3))


def test_outlier_channels_by_hand() -> None:
    """Channels of constant size 1, 1, 1, 6, 6.5 and 30: the median is (1 + 6) / 2 = 3.5."""
    tokens = np.tile(np.array([1, -1, 1, 6, 6.5, 30], np.float16), (4, 1))
    found = collect(narrow("audio", 6), [tokens])
    assert found.median_channel_rms == 3.5
    assert [(c.channel, c.rms, c.factor) for c in found.outlier_channels] == [
        (5, 30, pytest.approx(30 / 3.5))
    ]
    exactly_six = np.array([[1, 1, 1, 1, 6]], np.float16)
    assert not collect(narrow("audio", 5), [exactly_six]).outlier_channels
    dead = np.array([[0, 0, 0, 0, 6]], np.float16)
    assert not collect(narrow("audio", 5), [dead]).outlier_channels


def test_many_clips_agree_with_numpy() -> None:
    clips = heavy_clips(40, 32)
    found = collect(narrow("audio", 32), clips)
    every = np.concatenate(clips).astype(np.float64)
    norms = np.linalg.norm(every, axis=1)
    wanted = np.percentile(norms, [1, 25, 50, 75, 99], method="inverted_cdf")
    got = found.token_norm
    np.testing.assert_allclose([got.p1, got.p25, got.p50, got.p75, got.p99], wanted, rtol=0.003)
    np.testing.assert_allclose(found.channel_rms, np.sqrt(np.mean(every**2, axis=0)))
    assert [c.channel for c in found.outlier_channels] == [3, 5]
    assert found.zero_share == np.mean(every == 0)
    lengths = [len(c) for c in clips]
    assert found.valid_len.p50 == np.percentile(lengths, 50, method="inverted_cdf")
    counts, _ = np.histogram(norms, found.token_norms.edges)
    assert counts.tolist() == list(found.token_norms.counts)
    assert len(counts) <= 64
    seconds = np.array(lengths) / 50
    assert found.durations_s is not None
    wanted_counts, _ = np.histogram(seconds, found.durations_s.edges)
    assert wanted_counts.tolist() == list(found.durations_s.counts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_order_of_clips_does_not_matter(lengths: list[int], random: Random) -> None:
    """Whole numbers, so that sums are exact in any order."""
    rng = np.random.default_rng(len(lengths))
    clips = [rng.integers(-9, 9, (n, 3)).astype(np.float16) for n in lengths]
    spec = narrow("audio", 3)
    mixed = list(clips)
    random.shuffle(mixed)
    assert collect(spec, mixed) == collect(spec, clips)


def test_other_streams_have_no_durations() -> None:
    video = collect(narrow("video", 3), [np.ones((16, 4, 3), np.float16)] * 2)
    assert (video.stream, video.n_clips, video.n_tokens) == ("video", 2, 128)
    assert video.valid_lens == ((16, 2),)
    assert (video.duration_s, video.durations_s) == (None, None)
    image = collect(narrow("image", 3), [np.ones((17, 3), np.float16)])
    assert (image.n_tokens, image.valid_len.p50) == (17, 17)
    # All norms are equal: quantiles never leave what was seen.
    assert image.token_norm.p1 == image.token_norm.p99 == 3**0.5


@pytest.mark.parametrize("size", [2.0**-24, 65504])
def test_the_smallest_and_the_largest_float16_are_counted(size: float) -> None:
    found = collect(narrow("audio", 1408), [np.full((2, 1408), size, np.float16)])
    assert found.token_norm.p50 == pytest.approx(size * 1408**0.5)
    assert sum(found.token_norms.counts) == 2


def test_the_result_is_json() -> None:
    found = collect(narrow("audio", 32), heavy_clips(5, 32))
    assert found.spec_id == narrow("audio", 32).spec_id
    assert TokenStatistics.model_validate_json(found.model_dump_json()) == found


def test_a_collector_may_be_asked_at_any_point() -> None:
    collector = StatisticsCollector(narrow("audio", 2))
    collector.add(np.ones((3, 2), np.float16))
    assert collector.result().n_clips == 1
    collector.add(np.ones((4, 2), np.float16))
    assert collector.result().n_tokens == 7


def test_memory_does_not_grow_with_the_clips() -> None:
    """500 clips of 150 frames are 38 MB as float16; what is kept is a fraction of one clip."""
    rng = np.random.default_rng(0)
    clips = (rng.standard_normal((150, 256)).astype(np.float16) for _ in range(500))
    collector = StatisticsCollector(narrow("audio", 256))
    collector.add(next(clips))
    tracemalloc.start()
    for tokens in clips:
        collector.add(tokens)
    del tokens
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50_000


def test_what_does_not_fit_is_refused() -> None:
    collector = StatisticsCollector(narrow("audio", 4))
    with pytest.raises(CorruptTokensError, match=r"no audio clip to take statistics of"):
        collector.result()
    for shape in ((3, 5), (0, 4)):
        with pytest.raises(CorruptTokensError, match=r"at least one token of 4 channels"):
            collector.add(np.ones(shape, np.float16))
    with pytest.raises(CorruptTokensError, match=r"not finite"):
        collector.add(np.array([[1, 2, np.nan, 4]], np.float16))
    collector.add(np.ones((3, 4), np.float16))
    assert collector.result().n_clips == 1  # what was refused left no trace
    with pytest.raises(SpecMismatchError, match=r"names no weights"):
        StatisticsCollector(v2().tokens.audio)


@pytest.mark.parametrize("stream", ["audio", "video", "image"])
def test_the_figure_has_three_panels(stream: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shape = {"audio": (90, 32), "video": (16, 4, 32), "image": (17, 32)}[stream]
    tokens = rng.standard_normal(shape).astype(np.float16)
    tokens[..., 9] *= 20
    path = tmp_path / "statistics.png"
    plot = plot_statistics(collect(narrow(stream, 32), [tokens]), path)
    assert path.read_bytes() == plot.png
    with Image.open(path) as picture:
        assert picture.size == (1568, 528)
    text = re.sub(r"<[^>]*>", " ", plot.svg)
    assert "token norms" in text
    assert re.search(r"1 above 6x the median, no. 9 is \d+x", text)
    assert ("durations" if stream == "audio" else "lengths") in text
    assert "mathdefault" not in text


@pytest.mark.parametrize("value", [0, 1])
def test_the_figure_can_be_drawn_of_dull_tokens(value: int, tmp_path: Path) -> None:
    """All zeros, or all the same: no spread to scale the axes by."""
    found = collect(narrow("audio", 4), [np.full((50, 4), value, np.float16)])
    text = plot_statistics(found, tmp_path / "s.png").svg
    assert "none above 6x the median" in text
    assert ("50 are 0" in text) == (value == 0)
