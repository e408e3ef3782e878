"""A real Chromium for the tests of pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium(flags: Sequence[str] = ("--no-sandbox", "--disable-gpu")) -> Iterator[Browser]:
    """Start the Chromium on PATH; without one, or without playwright, the test is skipped."""
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"needs a Chromium on PATH: {', '.join(NAMES)}")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=program, args=[*flags])
        yield found
        found.close()


def sticks_out(page: Page, boxes: str = ".wide") -> list[str]:
    """Return what is wider than the window and not inside a box that scrolls.

    Args:
        page: An open page.
        boxes: CSS selector of what may scroll sideways.
    """
    found: list[str] = page.evaluate(
        """boxes => [...document.querySelectorAll("body *")]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1
            && (!e.closest(boxes) || getComputedStyle(e.closest(boxes)).overflowX == "visible"))
        .map(e => e.tagName + " " + (e.className.baseVal ?? e.className))""",
        boxes,
    )
    return found
