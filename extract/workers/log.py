"""A log file for each worker, where a folder for logs is given."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from extract.config import LoopConfig


def log_path(config: LoopConfig) -> str | None:
    """Return where this process's log stands; None if it has none of its own."""
    if config.log_dir is None:
        return None
    name = f"{config.session}-{os.uname().nodename}-{os.getpid()}.log"
    return str(Path(config.log_dir) / name)


@contextmanager
def log_file(path: str | None) -> Iterator[None]:
    """Write what is logged inside this block to a file, too; None writes none."""
    if path is None:
        yield
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(min(level or logging.INFO, logging.INFO))
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
