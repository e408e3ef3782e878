"""Take the picture of the page that the README shows, of a run that `make demo` trained.

python -m tests.app_picture demo/run docs/app.png
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.app_fakes import Served


def main(run: Path, out: Path, scheme: str = "light", width: int = 1180) -> None:
    """Give the page its first example, ask, and save what stands there."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    command = ("-m", "emocache", "app", "--run", run, "--port", "0")
    with Served(*command) as served, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": width, "height": 700},
            color_scheme=scheme,  # type: ignore[arg-type]
            device_scale_factor=1.25,
        )
        page.goto(served.url)
        page.click(".ec-examples button >> nth=1")
        page.wait_for_selector("#seen .ec-seen")
        page.wait_for_function("() => document.querySelector('.ec-video').readyState >= 2")
        page.click("#ask")
        page.wait_for_selector("#answer .ec-answer:not(.is-writing)")
        page.mouse.move(0, 0)
        page.wait_for_timeout(800)
        page.screenshot(path=out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4])
