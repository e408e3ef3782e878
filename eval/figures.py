"""How a figure is drawn: once for a page, in its colours, and once as a picture on white.

The SVG takes its colours from CSS variables of the page (`currentColor`, `--rule`, `--muted`,
`--accent`, `--warn`), so one drawing serves light and dark mode. The hues, blue and vermilion of
the Okabe-Ito palette, stay apart for colour-blind readers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from io import BytesIO, StringIO
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cache.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Plot(NamedTuple):
    """One figure in both forms."""

    svg: str
    """An `<svg>` element for an HTML page, without references to anything outside it."""
    png: bytes
    """The same on a white ground, 160 dots per inch."""


class Theme(NamedTuple):
    """Colours of a figure."""

    ink: str
    rule: str
    muted: str
    accent: str
    warn: str
    ground: str


PAPER: Final = Theme("#1b1f24", "#d5dae1", "#68707b", "#0072b2", "#d55e00", "#ffffff")
"""Of a picture on white."""
# Colours that matplotlib can write and that mean nothing but the CSS colour they are replaced by.
_STAND_IN: Final = Theme("#010101", "#020202", "#030303", "#040404", "#050505", "none")
_CSS: Final = {
    _STAND_IN.ink: "currentColor",
    _STAND_IN.rule: "var(--rule)",
    _STAND_IN.muted: "var(--muted)",
    _STAND_IN.accent: "var(--accent)",
    _STAND_IN.warn: "var(--warn)",
}


def draw(build: Callable[[Theme], Figure], name: str) -> Plot:
    """Build a figure in both themes and write it as SVG and PNG, with no global figure state.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise MissingDependencyError(
            "The plots of a report need matplotlib: pip install 'emocache[eval]'"
        ) from error
    svg, png = StringIO(), BytesIO()
    with warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes in the PNG; the SVG has text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        with rc_context(settings_of(_STAND_IN, name)):
            build(_STAND_IN).savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        with rc_context(settings_of(PAPER, name)):
            build(PAPER).savefig(png, format="png", dpi=160, facecolor=PAPER.ground)
    return Plot(_inline(svg.getvalue(), name), png.getvalue())


def settings_of(theme: Theme, name: str) -> dict[Any, Any]:
    """Return matplotlib's settings for a theme; `name` makes the ids in an SVG its own."""
    return {
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "text.parse_math": False,  # a label may hold dollar signs
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "svg.fonttype": "none",  # real text: selectable, in the font of the page
        "svg.hashsalt": name,  # equal data, equal file
    }


def _inline(svg: str, name: str) -> str:
    """Make a stand-alone SVG file an element of a page: own ids, page colours, no namespaces."""

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", tag[0])
        text = text.replace("xlink:href=", "href=")
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
        return re.sub(r"#(0[1-5])\1\1\b", lambda color: _CSS[color[0]], text)

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"<[^>]*>", adapt, svg).strip()


def hide_spines(axes: Axes, *sides: str) -> None:
    """Draw no frame on these sides: `top`, `right`, ..."""
    axes.spines[list(sides)].set_visible(False)


def one_line(text: str, limit: int = 22) -> str:
    """Return a text on one line, without control characters, cut to what fits an axis."""
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
