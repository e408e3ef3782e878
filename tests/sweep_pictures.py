"""Put the pages of finished sweeps into the documentation.

python -m tests.sweep_pictures docs/sweeps OUT...

Of each sweep's folder, `NAME.md` with its plot as SVG and `NAME.png`, the page as a browser shows it.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from playwright.sync_api import sync_playwright

from eval.sweep.state import read_begun

_WIDTH_PX = 1180


def main(to: Path, folders: Sequence[Path]) -> None:
    """Copy Markdown and plots, and take a picture of each page."""
    from PIL import Image

    to.mkdir(parents=True, exist_ok=True)
    program = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        for folder in folders:
            name = read_begun(folder).sweep.name
            text = (folder / "table.md").read_text(encoding="utf-8")
            for plot in folder.glob("table-*.svg"):
                kept = f"{name}-{plot.stem.removeprefix('table-')}.svg"
                shutil.copyfile(plot, to / kept)
                text = text.replace(f"({plot.stem}.png)", f"({kept})")
            text = re.sub(r"\n{3,}", "\n\n", text)
            (to / f"{name}.md").write_text(text, encoding="utf-8")
            page = browser.new_page(
                viewport={"width": _WIDTH_PX, "height": 800}, color_scheme="light"
            )
            page.goto((folder / "table.html").as_uri())
            taken = Image.open(BytesIO(page.screenshot(full_page=True)))
            # A palette is enough for a page of text and lines, and takes a third of the bytes.
            taken.convert("RGB").quantize(256).save(to / f"{name}.png", optimize=True)
            page.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]])
