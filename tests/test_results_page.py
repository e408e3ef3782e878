"""The benchmark report in a real Chromium: nothing fails, nothing sticks out, all can be reached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eval.results.data import ResultsData
from eval.results.page import run_scores, write_results
from tests.browser import chromium, sticks_out
from tests.results import made_up
from tests.test_results import emer, mme

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PRINTED_PX = 703
"""The width of A4 between the margins of the page, at 96 pixels per inch."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scored = made_up(fraction=0.1, tasks=["mer2023", "mosi", "mafw", "mafw-m"])
    runs = run_scores("a model with quite a long name, stage 2", scored, n_samples=50)
    data = ResultsData("Report", "2026-03-01", (runs,), (emer(), mme()))
    return write_results(data, tmp_path_factory.mktemp("page"))[0]


@pytest.fixture
def page(browser: Browser, report: Path) -> Iterator[Page]:
    """The report; the test fails if the page had to be stopped from loading or running something."""
    found = browser.new_page(viewport={"width": 1280, "height": 900})
    complaints: list[str] = []
    found.on("pageerror", lambda error: complaints.append(str(error)))
    found.on("console", lambda said: complaints.append(said.text))
    found.goto(report.as_uri())
    yield found
    found.close()
    assert complaints == []


def test_what_sticks_out_is_found(page: Page) -> None:
    page.evaluate("document.querySelector('h1').style.width = '2000px'")
    assert "H1 " in sticks_out(page)


@pytest.mark.parametrize("width", [1280, 800, 390])
def test_nothing_sticks_out_on_any_screen(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert sticks_out(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_all_of_it_fits_on_paper(page: Page) -> None:
    page.set_viewport_size({"width": PRINTED_PX, "height": 1000})
    page.emulate_media(media="print")
    assert sticks_out(page) == []
    assert len(page.pdf(prefer_css_page_size=True)) > 10_000


def test_every_set_is_reached_from_the_list(page: Page) -> None:
    for name, anchor in (("MOSI", "set-mosi"), ("MAFW-m", "set-mafw-m")):
        page.get_by_role("link", name=name, exact=True).click()
        assert page.url.endswith(f"#{anchor}")
        top = page.locator(f"#{anchor}").bounding_box()
        assert top is not None
        assert abs(top["y"]) < 900


def test_bars_are_as_long_as_they_say(page: Page) -> None:
    lengths = page.locator("#set-mafw .labels td.bar i").evaluate_all(
        """bars => bars.map(e => [parseFloat(e.style.getPropertyValue("--f")),
        parseFloat(getComputedStyle(e).backgroundSize)])"""
    )
    assert len(lengths) == 11
    for share, percent in lengths:
        assert percent == pytest.approx(100 * share, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page: Page, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    ratios = page.evaluate(
        """() => {
        const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const rgb = color => {
            canvas.clearRect(0, 0, 1, 1);
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data];
        };
        const light = color => {
            const [r, g, b] = rgb(color).map(v => v / 255)
                .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b;
        };
        const ground = e => {
            for (; e; e = e.parentElement) {
                const color = getComputedStyle(e).backgroundColor;
                if (rgb(color)[3] == 255) return color;
            }
            return "white";
        };
        return [...document.querySelectorAll("td, th, p, h1, h2, h3, dd, figcaption")]
            .filter(e => e.innerText && !e.matches(".zero"))
            .map(e => [light(getComputedStyle(e).color), light(ground(e))])
            .map(([a, b]) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05));
        }"""
    )
    assert len(ratios) > 300
    assert min(ratios) > 3.9
