"""The page of a sweep in a real Chromium: nothing fails, nothing sticks out, headings stay over columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eval.predictions import Prediction
from eval.sweep.schema import SweepRow
from eval.sweep.tables.results import write_results
from tests.browser import chromium, sticks_out
from tests.sweep_results import ACCURACY, F1, replies, sweep_of, write_sweep

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PRINTED_PX = 1032
"""The width of A4 across between the margins of the page, at 96 pixels per inch."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = [
        SweepRow(name=f"row-{i}", cells=("Whisper", "EVA", "a video encoder with a long name"), group=g,
                 published={"acc": 60.0 + i, "f1": 59.0}, set={"model.fusion.kind": "conv"})
        for i, g in enumerate(("One", "One", "Two"))
    ]  # fmt: skip
    sweep = sweep_of(
        given, columns=("Audio", "Image", "Video"), scores=(ACCURACY, F1), seeds=(1, 2),
        baseline="row-1", source="A paper, Table 1", about="What the source leaves open. " * 12,
    )  # fmt: skip
    done: dict[str, dict[int, Sequence[Prediction] | str]] = {
        "row-0": {1: replies(0.4, 40, seed=1), 2: replies(0.41, 40, seed=2)},
        "row-1": {1: replies(0.8, 40, seed=3), 2: replies(0.8, 40, seed=4)},
        "row-2": {1: "the loss is not a number at step 12; " * 9, 2: "no memory left"},
    }
    out = write_sweep(tmp_path_factory.mktemp("sweep"), sweep, done)
    return write_results(out, n_samples=50, n_swaps=50).files[0]


@pytest.fixture
def page(browser: Browser, path: Path) -> Iterator[Page]:
    """The page; the test fails if it had to be stopped from loading or running something."""
    found = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda said: complaints.append(said.text))
    found.on("requestfailed", lambda request: complaints.append(request.url))
    found.goto(path.as_uri())
    found.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    yield found
    found.close()
    assert complaints == []


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_nothing_sticks_out_on_any_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert sticks_out(page, ".wide, pre") == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_nothing_sticks_out_in_print(page: Page) -> None:
    page.set_viewport_size({"width": PRINTED_PX, "height": 700})
    page.emulate_media(media="print")
    assert sticks_out(page, ".wide, pre") == []


def test_the_first_column_stays_when_the_table_scrolls(page: Page) -> None:
    page.set_viewport_size({"width": 390, "height": 900})
    left = "document.querySelector('.rows tbody tr:not(.group) th').getBoundingClientRect().left"
    before = page.evaluate(left)
    page.evaluate("document.querySelector('.rows').parentElement.scrollLeft = 200")
    assert page.evaluate(left) == before


def test_blocks_stand_over_their_columns(page: Page) -> None:
    edges = page.evaluate(
        """() => [".block", "tr:last-child .edge"].map(which =>
        [...document.querySelectorAll(".rows thead " + which)].slice(0, 2)
            .map(e => Math.round(e.getBoundingClientRect().left)))"""
    )
    assert edges[0] == edges[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    ratios = page.evaluate(
        """() => {
        const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * v[0] + 0.7152 * v[1] + 0.0722 * v[2]; };
        const ground = e => { for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (!/, 0\\)$|transparent/.test(c)) return c; } return "rgb(255, 255, 255)"; };
        return [...document.querySelectorAll(".rows td, .rows .small, .rows .word, .tile span, .notes li")]
            .filter(e => e.textContent.trim()).map(e => { const [a, b] =
                [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
                return (a + 0.05) / (b + 0.05); }); }"""
    )
    assert len(ratios) > 30
    assert min(ratios) > 3.5
