"""How a user's settings reach a configuration: a YAML file, then `key=value` arguments."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cache.errors import SchemaError, near_miss
from cache.schema import Model, decode

M = TypeVar("M", bound=Model)


def configured(
    start: M,
    overrides: Sequence[str] = (),
    with_file: Path | None = None,
    *,
    name: str,
    example: str,
    shown_by: str = "emocache show",
    growing: Collection[str] = (),
) -> M:
    """Apply a YAML file and `key=value` overrides to a configuration.

    Args:
        start: The starting point, a preset for example.
        overrides: `dotted.path=value`; list items by number (`stages.0.n_steps=10`).
        with_file: YAML or JSON of the same shape, for example a run's config.json.
        name: What the configuration is called, for messages.
        example: An override that shows how they are written.
        shown_by: Command that lists the settings, for messages.
        growing: Fields that map a user's own keys, to which an override may add.

    Raises:
        SchemaError: An unknown path, a value that does not fit, or an unreadable file.
    """
    data = start.model_dump(mode="json")
    if with_file is not None:
        _merge(data, read_yaml(with_file), str(with_file))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise SchemaError(
                f"override {item!r} is not key=value. Example: {example}; "
                f"`{shown_by} {name}` lists the keys."
            )
        assign(data, path, _parse(text, item), growing)
    return decode(type(start), data, f"preset '{name}'")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON file that holds a mapping; raises SchemaError if it does not."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise SchemaError(f"{path}: holds no mapping of settings")
    return found


def _parse(text: str, item: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SchemaError(f"override {item!r}: the value is not YAML; quote it") from None


def _merge(data: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    for key, value in new.items():
        if key not in data:
            raise SchemaError(f"{where}: unknown key '{key}'.{near_miss(key, data)}")
        if isinstance(value, dict) and isinstance(data[key], dict):
            _merge(data[key], value, f"{where}, {key}")
        else:
            data[key] = value


def assign(data: Any, path: str, value: Any, growing: Collection[str] = ()) -> None:
    """Set a dotted path in nested dictionaries and lists.

    Args:
        data: A dumped configuration; changed in place.
        path: `stages.0.n_steps`; list items by number.
        value: Plain data; None takes an item out of a list, and the ones behind it move up.
        growing: Fields that map a user's own keys, to which one may be added.

    Raises:
        SchemaError: No such path; names the near miss and what is allowed there.
    """
    parts = path.split(".")
    node = data
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the configuration"
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise SchemaError(
                    f"unknown key '{path}': {where} is a list of {len(node)}; use 0 to {len(node) - 1}"
                )
            key: Any = int(part)
        elif isinstance(node, dict):
            # A mapping of the user's own keys (tasks of a stage) may grow; fields may not.
            grows = depth > 0 and parts[depth - 1] in growing
            if part not in node and not (grows and last):
                raise SchemaError(
                    f"unknown key '{path}': {where} has no '{part}'.{near_miss(part, node)} "
                    f"Allowed: {', '.join(node)}"
                )
            key = part
        else:
            raise SchemaError(f"unknown key '{path}': {where} is a single value ({node!r})")
        if last and value is None and isinstance(node, list):
            del node[key]
        elif last:
            node[key] = value
        else:
            node = node[key]
