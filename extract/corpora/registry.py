"""Which corpora and readers there are; reading rows and mapping files."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from cache.errors import SchemaError, near_miss
from cache.schema import decode
from extract.corpora.reading import Reader
from extract.corpora.row import CorpusRow
from extract.corpora.tables import READERS as GENERIC

ROWS = Path(__file__).parent / "rows"
"""A YAML file for each corpus that ships with the project."""


def corpus_ids() -> tuple[str, ...]:
    """Return the ids of the corpora that ship with the project, in alphabetical order."""
    return tuple(sorted(path.stem for path in ROWS.glob("*.yaml")))


@lru_cache(maxsize=64)
def corpus_row(name: str) -> CorpusRow:
    """Return a corpus that ships with the project.

    Raises:
        SchemaError: There is none of that name; with a near miss.
    """
    ids = corpus_ids()
    if name not in ids:
        raise SchemaError(
            f"no corpus {name!r}.{near_miss(name, ids)} There are: {', '.join(ids)}. A dataset of your "
            "own takes a mapping file: emocache index --mapping my.yaml DIR --out FILE"
        )
    row = load_row(ROWS / f"{name}.yaml")
    if row.id != name:
        raise SchemaError(f"{ROWS / name}.yaml: its id is {row.id!r}, not the file's name")
    return row


def load_row(path: Path) -> CorpusRow:
    """Read a row or a user's mapping file.

    Every plain value is text, as it is written: `no` is a label, `0` the name of a class, `on` a key.

    Raises:
        SchemaError: No such file, not YAML, a key that stands twice, or not a corpus row.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8-sig"), _TextLoader)
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror})") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = " Put texts that begin with { or * or hold ': ' into quotes."
        raise SchemaError(f"{path}{place}: not YAML: {error.problem}.{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise SchemaError(
            f"{path}: holds a {type(found).__name__}, not a mapping with id, layouts, ... "
            "docs/corpora_own.md has examples."
        )
    return decode(CorpusRow, found, str(path))


def reader(name: str) -> Reader:
    """Return a reader by its name.

    Raises:
        SchemaError: There is none of that name; with a near miss.
    """
    if name in GENERIC:
        return GENERIC[name]
    # Readers of one corpus each may need libraries that the others do not.
    from extract.corpora.readers import READERS

    if name not in READERS:
        known = (*GENERIC, *READERS)
        raise SchemaError(
            f"no reader {name!r}.{near_miss(name, known)} There are: {', '.join(known)}."
        )
    return READERS[name]


_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


class _TextLoader(yaml.SafeLoader):
    """Keeps every plain value as text, and refuses a key that stands twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012  the library's own attribute
        letter: [(tag, regex) for tag, regex in found if tag in (_NULL, _MERGE)]
        for letter, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; raises a ConstructorError for a key that stands twice."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else id(key_node))
        return super().construct_mapping(node, deep=deep)
