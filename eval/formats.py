"""Numbers and foreign text as people read them: percent, points, sizes, excerpts, escaped Markdown.

Scores are fractions everywhere else; what is printed is made here.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from eval.scoring.intervals import Interval, PairedTest

_MINUS: Final = "\N{MINUS SIGN}"
NONE: Final = "\N{EN DASH}"
"""In place of a number that is not there."""


def percent(fraction: float) -> str:
    """Return a fraction as percent with two decimals, without the sign: 0.5 -> `50.00`."""
    return f"{100 * fraction:.2f}"


def points(fraction: float, base: float) -> str:
    """Return the signed distance of two fractions in percentage points: `+1.50`."""
    # The distance of the printed numbers, so that a reader who subtracts finds no contradiction.
    return _signed(round(float(percent(fraction)) - float(percent(base)), 2))


def signed_points(difference: float) -> str:
    """Return a difference of fractions in percentage points, with its sign: `+1.50`."""
    return _signed(round(100 * difference, 2))


def _signed(distance: float) -> str:
    sign = "+" if distance > 0 else _MINUS if distance < 0 else "\N{PLUS-MINUS SIGN}"
    return f"{sign}{abs(distance):.2f}"


def span(interval: Interval | PairedTest, *, signed: bool = False) -> str:
    """Return the borders of an interval in percent, in brackets: `(78.12 to 90.20)`."""
    show = signed_points if signed else percent
    return f"({show(interval.low)} to {show(interval.high)})"


def p_value(p: float) -> str:
    """Return a p value with two significant digits; below 0.001 that alone."""
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def human_size(size_bytes: int) -> str:
    """Return a size in the binary unit that keeps it below 1024: `1.50 MiB`."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if size < 1023.95 or unit == "TiB":
            break
    return f"{size:.2f} {unit}"


def number(value: float | str | None) -> str:
    """Return a number with four significant digits, whole numbers in full; text as it stands."""
    if value is None:
        return NONE
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", _MINUS)
    return f"{value:.4g}".replace("-", _MINUS)


def excerpt(text: str, limit: int = 280) -> str:
    """Return a text cut to a length that fits a table, with the length it had."""
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"


def escape_markdown(text: str) -> str:
    """Escape a text for a Markdown table cell: no HTML, no markup, one line."""
    text = "".join(c for c in " ".join(text.split()) if c.isprintable())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|~$])", r"\\\1", text)
