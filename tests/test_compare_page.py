"""The page of a comparison: what it says, that it is self-contained, and how a browser takes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eval.results.compare import compare
from eval.results.compare_page import caption, comparison_table, draw_differences, write_comparison
from eval.results.comparison import Comparison
from eval.results.sides import ComparedRun, Run, Side, Unit
from eval.scoring.result import Item
from eval.scoring.rules import accuracy
from tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\"|`*&lt;"
CREATED = "2026-01-02T03:04:05+00:00"
REPLIES = ("happy", "sad", HOSTILE, "", "<think>A smile.</think> <answer>happy</answer>")


def side(shift: int, unit: Unit = "percent") -> Side:
    truths = ["happy", "sad"] * 10
    replies = [REPLIES[(i + shift) % len(REPLIES)] for i in range(20)]
    said = ["happy" if "happy" in r else r for r in replies]
    items = tuple(
        Item(f"set/{i}{HOSTILE}", None, (t,), r, (s,) if s else (), "exact")
        for i, (t, r, s) in enumerate(zip(truths, replies, said, strict=True))
    )
    notes = (f"a note {HOSTILE}",) if shift else ()
    return Side(
        f"Set {HOSTILE}", "accuracy", "set", items, accuracy(truths, said), True, {}, notes, unit
    )


def comparison(names: tuple[str, ...], n_sets: int = 2, unit: Unit = "percent") -> Comparison:
    runs = []
    for shift, name in enumerate(names):
        sides = {f"set{i} {HOSTILE}": side(shift, unit) for i in range(n_sets + (shift == 0))}
        facts = {"run": name, "prompts": "the same"}
        runs.append(
            Run(ComparedRun(name=name, path=f"runs/{name}", file="f", n=20, facts=facts), sides)
        )
    return compare(runs, n_samples=100, n_swaps=100)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    found = comparison(("base", f"tuned {HOSTILE}"))
    html, markdown, document = write_comparison(found, tmp_path_factory.mktemp("page"), CREATED)
    assert Comparison.model_validate_json(document.read_text()) == found
    return html, markdown


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v for name, v in attrs if name in ("src", "href", "xlink:href") and v]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_needs_no_other_file_and_shows_foreign_text_as_text(
    written: tuple[Path, Path],
) -> None:
    seen = _Seen()
    seen.feed(written[0].read_text())
    assert all(link.startswith("#") for link in seen.links)
    assert not {"script", "img", "iframe", "link"} & set(seen.tags)
    shown = "".join(seen.text)
    assert shown.count(HOSTILE) > 10
    assert "A smile." in shown  # the reasoning of a changed reply
    assert "2026-01-02" in shown


def test_page_says_what_differs_and_what_is_left_out(written: tuple[Path, Path]) -> None:
    html = written[0].read_text()
    assert "not compared, since only base has it: set2" in html
    made = html[html.index('id="made"') :]
    assert made.index(">run<") < made.index(">prompts<")  # what differs first
    assert made.count("the same") == 2  # the value, and that the other run has it too


def test_markdown_has_whole_tables(written: tuple[Path, Path]) -> None:
    text = written[1].read_text()
    width = None
    n_rows = 0
    for line in text.split("\n"):
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        assert width in (None, cells), line
        width = cells
        n_rows += 1
    assert n_rows > 20
    assert "<script" not in text
    assert "compare-1.png" in text
    assert (written[1].parent / "compare-1.png").read_bytes().startswith(b"\x89PNG")


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    for name in "ab":
        write_comparison(comparison(("base", "tuned")), tmp_path / name, CREATED)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_ratings_stay_as_they_are() -> None:
    found = comparison(("base", "tuned"), unit="rating")
    assert draw_differences(found, 0) is None  # not on one axis with percent
    assert "ratings of the judge" in caption(found)
    (first, *_) = comparison_table(found).columns[1].cells
    assert str(first) == f"{found.sets[0].scores[0].score:.2f}"


def test_terminal_shows_a_line_per_run() -> None:
    found = comparison(("base", "tuned", "third"))
    table = comparison_table(found)
    assert [str(column.header) for column in table.columns[:3]] == ["set", "run", "score"]
    assert [str(cell) for cell in table.columns[1].cells] == ["base", "tuned", "third"] * 2
    assert "corrected for 4 tests (Holm)" in caption(found)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.mark.parametrize("width", [1280, 390])
def test_page_in_a_browser(browser: Browser, written: tuple[Path, Path], width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda said: complaints.append(said.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(written[0].as_uri())
    assert complaints == []
    assert page.evaluate("window.hacked") is None
    # Wide tables scroll in their own frame, not the page.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("svg").first.is_visible()
    assert page.get_by_role("row", name="Set").count() > 0
    assert page.locator("details[open]").count() > 0
    context.close()
