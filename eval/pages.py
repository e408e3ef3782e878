"""How the project's pages are rendered: each is one HTML file that needs no network and no other file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cache.errors import MissingDependencyError

if TYPE_CHECKING:
    from jinja2 import Environment


def page_environment(what: str) -> Environment:
    """Return what renders `eval/templates`: foreign text is escaped, a misspelt name is an error.

    Args:
        what: The page, for the message: `A report`.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise MissingDependencyError(
            f"{what} needs jinja2: pip install 'emocache[eval]'"
        ) from error
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
