"""What was computed before, remembered in the user's cache folder. Losing it costs time only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cache.files import write_text_aside


class Memo:
    """JSON values by key, in one file."""

    def __init__(self, name: str) -> None:
        """Read what there is; a damaged file counts as none.

        Args:
            name: Of the file below the cache folder, for example `weights.json`.
        """
        self._file = cache_home() / "emocache" / name
        self._values = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def get(self, key: str) -> Any:
        """Return what is remembered under a key; None if nothing is."""
        return self._values.get(key)

    def put(self, key: str, value: Any) -> None:
        """Remember a value; `save` writes it."""
        self._values[key] = value

    def save(self) -> None:
        """Write what was put, together with what another process has written meanwhile."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._values = {**self._read(), **self._values}
            write_text_aside(self._file, json.dumps(self._values))
        except OSError:  # a read-only home: the next run computes it again
            return


def cache_home() -> Path:
    """Return the user's folder of what may be lost."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
