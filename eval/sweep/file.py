"""Sweep files: YAML in, a checked `SweepFile` out, with the line of every field for messages.

::

    read_sweep("table11")            a shipped one, of eval/sweep/files
    read_sweep("my/sweep.yaml")      one of the user's own
    sweep.where("rows", 3, "set")    "my/sweep.yaml:41"
    sweep.read_from                  Source(path, text, lines), with .digest
    shipped()                        {"table11": PosixPath(".../table11.yaml"), ...}

What is said here needs no preset; `eval.sweep.rows` finds what is wrong with rows and settings.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from cache.errors import SchemaError, near_miss
from cache.schema import located
from eval.benchmarks import benchmarks
from eval.sweep.schema import Place, ScoreColumn, Source, SweepFile
from train.text.tasks import SEVERAL_LABELS, TASK_TABLE, check_task

FOLDER = Path(__file__).with_name("files")
"""The shipped files."""
MAX_VALUES = 100_000
"""Most values of a file with its aliases written out: far more than 1,000 rows have."""
MAX_DEPTH = 50
"""Most brackets around a value; presets nest to a tenth of it."""
_MAX_BITS = 1024
"""Of a whole number: as far as floats reach; longer ones cannot even be printed."""
_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in "map seq str int float bool null".split())
"""What JSON has too."""


def shipped() -> dict[str, Path]:
    """Return the shipped files by name, in the order of their names."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def read_sweep(name_or_path: str | Path) -> SweepFile:
    """Read a sweep file.

    Args:
        name_or_path: A path, or, without a slash and without `.yaml`, the name of a shipped file.

    Returns:
        The sweep; group names among `scores.sets` stand for their benchmarks, and `columns` are filled
        in. `where` and `read_from` say where its fields stand.

    Raises:
        SchemaError: No such file or name, not YAML, an unknown field, or one that contradicts
            another; names the file and the line.
    """
    path, shown = _find(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path}: not a YAML file ({error})") from None
    return parse_sweep(text, shown)


def parse_sweep(text: str, path: str) -> SweepFile:
    """Return the sweep that a text means; `path` is what messages call it. See `read_sweep`."""
    data, source = _parse(text, path)
    _fill_columns(data)
    _name_sets(data, source)
    try:
        sweep = SweepFile.model_validate(data)
    except ValidationError as error:
        raise SchemaError("\n".join(_faults(error, source))) from None
    sweep._source = source
    _check(sweep)
    return sweep


def _faults(error: ValidationError, source: Source) -> list[str]:
    """Return each fault with its line; of nested ones the innermost."""
    found = located(SweepFile, error)
    inner = [place for place, _ in found]
    return [
        f"{source.where(place)}: {said}"
        for place, said in found
        if not any(len(i) > len(place) and i[: len(place)] == place for i in inner)
    ]


def _find(name_or_path: str | Path) -> tuple[Path, str]:
    """Return the path of a sweep file, and what messages call it."""
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in name or name.endswith((".yaml", ".yml")):
        return Path(name), name
    files = shipped()
    if name not in files:
        raise SchemaError(
            f"unknown sweep '{name}'.{near_miss(name, files)} Shipped: {', '.join(files)}. A file of "
            f"your own is given with its ending: {name}.yaml"
        )
    return files[name], f"{name}.yaml"


class _Loader(yaml.SafeLoader):
    """The safe loader, refusing with a line what would take it minutes, all memory or the stack."""

    def __init__(self, text: str, path: str) -> None:
        super().__init__(text)
        self._path = path
        self._depth = 0
        self._n_values = 0
        self._size: dict[int, int] = {}
        """Identity of a node -> values in it, aliases written out."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, counting what it holds: an alias counts as what it stands for."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        before = self._n_values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise SchemaError(_too_deep(self._path, line))
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._size:
                raise SchemaError(
                    f"{self._path}:{line}: an alias of something that it is a part of"
                )
            self._n_values += self._size[id(node)]
        else:
            self._n_values += 1
            self._size[id(node)] = self._n_values - before
        if self._n_values > MAX_VALUES:
            raise SchemaError(
                f"{self._path}:{line}: with its aliases written out the file holds more than "
                f"{MAX_VALUES} values, which no sweep needs; name fewer aliases of aliases"
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node."""
        line = node.start_mark.line + 1
        try:
            value = super().construct_object(node, deep)
        except (SchemaError, yaml.YAMLError):
            raise
        except (ValueError, LookupError) as error:
            # What a tag or the look of a number promises and the text does not hold.
            said = str(error).splitlines()[0] if isinstance(error, ValueError) else "a wrong tag"
            raise SchemaError(f"{self._path}:{line}: not YAML ({said})") from None
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise SchemaError(
                f"{self._path}:{line}: a whole number of {value.bit_length()} bits; at most {_MAX_BITS}"
            )
        return value


def _too_deep(path: str, line: int) -> str:
    return f"{path}:{line}: nested more than {MAX_DEPTH} deep, which no setting is; close some brackets"


def _parse(text: str, path: str) -> tuple[dict[str, Any], Source]:
    """Return the plain data of a YAML text, and the line of each field."""
    lines: dict[Place, int] = {}
    try:
        loader = _Loader(text, path)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SchemaError(f"{path}:{line}: not YAML ({str(error).splitlines()[0]})") from None
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise SchemaError(
                f"{path}: holds no sweep. A sweep is a mapping with name, title, preset, scores and rows"
            )
        _note_lines(node, (), lines, path)
        data: dict[str, Any] = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SchemaError(f"{path}:{line}: not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise SchemaError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    finally:
        loader.dispose()
    return data, Source(path, text, lines)


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int], path: str) -> None:
    """Note the line of every field below a node; refuse what JSON has not, and a key given twice.

    Args:
        node: Where to look.
        place: Of the node.
        lines: Where to note them.
        path: Of the file, for messages.
    """
    lines.setdefault(place, node.start_mark.line + 1)
    # Aliases nest deeper than the text does.
    if len(place) > MAX_DEPTH:
        raise SchemaError(_too_deep(path, lines[place]))
    if node.tag not in _TAGS:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        raise SchemaError(
            f"{path}:{node.start_mark.line + 1}: a value of kind '{kind}'; a sweep file has texts, "
            "numbers, true, false, null, lists and mappings. Put it in quotes if it is a text"
        )
    if isinstance(node, yaml.ScalarNode):
        _check_text(node, path)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_lines(item, (*place, number), lines, path)
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == "tag:yaml.org,2002:merge":
                raise SchemaError(f"{path}:{line}: a sweep file has no merge keys; write them out")
            if not isinstance(key, yaml.ScalarNode):
                raise SchemaError(f"{path}:{line}: a key must be a word")
            if key.tag != "tag:yaml.org,2002:str":
                raise SchemaError(
                    f"{path}:{line}: the key {key.value!r:.60} is no word to YAML; put it in quotes"
                )
            _check_text(key, path)
            if key.value in first:
                raise SchemaError(
                    f"{path}:{line}: '{key.value}' is given twice, first in line {first[key.value]}; "
                    "the second would silently win"
                )
            first[key.value] = line
            lines[(*place, key.value)] = line
            _note_lines(value, (*place, key.value), lines, path)


def _check_text(node: yaml.ScalarNode, path: str) -> None:
    """Refuse half of a character, which no file can hold."""
    try:
        node.value.encode()
    except UnicodeEncodeError:
        raise SchemaError(
            f"{path}:{node.start_mark.line + 1}: a text with half a character ({node.value!r:.60}); "
            "write the character itself"
        ) from None


def _fill_columns(data: dict[str, Any]) -> None:
    """Give the rows' cells headings where the file gives none: the row, and each axis of the grid."""
    grid = data.get("grid")
    if "columns" in data or not isinstance(grid, dict) or not grid:
        return
    axes = [str(path).rpartition(".")[2] for path in grid]
    data["columns"] = ["row", *axes] if data.get("rows") else axes


def _name_sets(data: dict[str, Any], source: Source) -> None:
    """Put the benchmarks in place of a group's name."""
    groups = {
        "mer-unibench": [b.id for b in benchmarks().values() if b.unibench],
        "mmeverse-bench": list(benchmarks()),
    }
    scores = data.get("scores")
    for number, score in enumerate(scores if isinstance(scores, list) else ()):
        sets = score.get("sets") if isinstance(score, dict) else None
        if not isinstance(sets, list):
            continue
        named: list[Any] = []
        for place, name in enumerate(sets):
            if not isinstance(name, str):
                named.append(name)
                continue
            if name not in groups and name not in benchmarks():
                raise SchemaError(
                    f"{source.where(('scores', number, 'sets', place))}: unknown benchmark '{name}'."
                    f"{near_miss(name, [*groups, *benchmarks()])} Allowed: "
                    f"{', '.join([*groups, *benchmarks()])}"
                )
            named += groups.get(name, [name])
        score["sets"] = named


def _check(sweep: SweepFile) -> None:
    """Refuse what contradicts something else in the file."""
    names = [score.name for score in sweep.scores]
    for number, score in enumerate(sweep.scores):
        where = sweep.where("scores", number, "name")
        if names.index(score.name) != number:
            raise SchemaError(f"{where}: two score columns are called '{score.name}'")
        _check_score(score, where)
        _check_task(score, sweep.where("scores", number, "task"))
    first: dict[str, int] = {}
    for number, row in enumerate(sweep.rows):
        if row.name in first:
            raise SchemaError(
                f"{sweep.where('rows', number, 'name')}: a second row '{row.name}'; the first is at "
                f"{sweep.where('rows', first[row.name], 'name')}. Rows are known by their names"
            )
        first[row.name] = number
        _check_published(sweep, number, row.published, names)


def _check_score(score: ScoreColumn, where: str) -> None:
    if score.kind == "benchmark" and not score.sets:
        raise SchemaError(
            f"{where}: score '{score.name}' is of kind benchmark and names no sets. Allowed: "
            f"mer-unibench, mmeverse-bench, {', '.join(benchmarks())}"
        )
    if score.kind == "split" and score.sets:
        raise SchemaError(
            f"{where}: score '{score.name}' is of kind split, which takes no benchmark sets"
        )
    if len(set(score.sets)) != len(score.sets):
        twice = next(name for name in score.sets if score.sets.count(name) > 1)
        raise SchemaError(f"{where}: score '{score.name}' names '{twice}' twice")


def _check_task(score: ScoreColumn, where: str) -> None:
    """Refuse a task whose replies have no labels of a list."""
    allowed = [task for task, row in TASK_TABLE.items() if row.label not in (None, "emotion_ov")]
    if score.task not in allowed:
        raise SchemaError(
            f"{where}: score '{score.name}' is of task '{score.task}', which names no label of a list."
            f"{near_miss(score.task, allowed)} Allowed: {', '.join(allowed)}"
        )
    row = TASK_TABLE[check_task(score.task)]
    if score.reading == "last-word" and (row.label in SEVERAL_LABELS or row.joint):
        raise SchemaError(
            f"{where}: score '{score.name}' reads the last word of replies to '{score.task}', which are "
            "more than one label. Use the reading 'label'."
        )


def _check_published(
    sweep: SweepFile, number: int, published: Mapping[str, float], names: Collection[str]
) -> None:
    for name in published:
        if name not in names:
            raise SchemaError(
                f"{sweep.where('rows', number, 'published', name)}: no score column '{name}'."
                f"{near_miss(name, names)} Allowed: {', '.join(names)}"
            )
