"""The terminal: where results, progress and errors go, and how a verb ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

from cache.errors import EmocacheError, StoppedError

out = Console()
"""Results."""
err = Console(stderr=True)
"""Progress, remarks and errors."""

DONE, FINDINGS, REFUSED, INTERRUPTED = 0, 1, 2, 130
"""Exit codes."""
_EXTRAS = {
    "openai": "annotate", "jsonschema": "annotate", "h5py": "exchange", "datasets": "hub",
    "extract": "extract", "index": "extract", "train": "train", "annotate": "extract,annotate",
    "annotate_worker": "extract,annotate", "predict": "extract,train",
}  # fmt: skip
"""Library, or else verb -> what to install."""


def verb(function: Callable[..., int]) -> Callable[..., None]:
    """Turn a handler's result, errors and Ctrl-C into one line and an exit code."""

    @functools.wraps(function)
    def handled(*args: Any, **kwargs: Any) -> None:
        try:
            code = function(*args, **kwargs)
        except EmocacheError as error:
            stopped = isinstance(error, StoppedError)
            err.print(f"[{'yellow' if stopped else 'red'}]emocache:[/] ", end="")
            err.print(str(error), markup=False, highlight=False, soft_wrap=True)
            code = INTERRUPTED if stopped else REFUSED
        except ModuleNotFoundError as error:
            verb_name = function.__name__.removesuffix("_command")
            extra = _EXTRAS.get(str(error.name).partition(".")[0]) or _EXTRAS.get(verb_name, "all")
            err.print(
                f"emocache: {error.name} is not installed. pip install 'emocache[{extra}]'",
                markup=False,
                soft_wrap=True,
            )
            code = REFUSED
        except OSError as error:  # the file system refused: a full disk, a missing permission
            where = f"{error.filename}: " if error.filename else ""
            err.print(
                f"emocache: {where}{error.strerror or error}. Check the path and its permissions.",
                markup=False,
                soft_wrap=True,
            )
            code = REFUSED
        except KeyboardInterrupt:
            err.print(
                "emocache: interrupted. What was committed stays; run the same command to continue.",
                soft_wrap=True,
            )
            code = INTERRUPTED
        raise typer.Exit(code)

    return handled
