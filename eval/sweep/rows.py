"""From a sweep file to what is trained: rows with the grid filled in, trials with resolved presets.

::

    sweep  = read_sweep("table11")
    rows   = rows_of(sweep)                      # tuple[Row, ...]: the lines of the table
    trials = trials_of(sweep, rows, "demo")      # tuple[Trial, ...]: each row with each of its seeds
    key    = run_key(trial)                      # equal for trials that can share a training

A trial's preset comes of: the preset by name < the sweep's `set` < the grid < the row's `set` < the seed;
at demo scale then `train.scaling.at_demo_scale` < the sweep's `demo` settings.

A setting is a dotted path as on the command line. `tokens.audio`, `tokens.video`, `tokens.image` and
`tokens.local` also take a name as `emocache extract --encoders` does: `tokens.image: mae-large`,
`tokens.local: mae-large+face+utt`; null leaves the input out.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from cache.errors import EmocacheError, SchemaError, near_miss
from cache.overrides import assign
from cache.recipes import token_specs
from cache.schema import canonical_json, located
from eval.sweep.schema import (
    MAX_NAME,
    MAX_TRIALS,
    Place,
    Row,
    Scale,
    SweepFile,
    SweepRow,
    Trial,
    not_finite,
)
from train.config import GROWING, INPUTS, STREAM_OF, Preset
from train.presets import PRESETS, preset
from train.scaling import at_demo_scale

Setting = tuple[Place, str, Any]
"""Where it stands in the file, its dotted path, its value."""


def rows_of(sweep: SweepFile) -> tuple[Row, ...]:
    """Return the lines of a sweep's table: its rows, each once per combination of the grid.

    With a grid, a row's name is continued by each axis and value (`n_tokens-16`), and its cells by the
    values.

    Raises:
        SchemaError: Too many rows, rows of one name or of too long a one, cells that do not fit the
            columns, or an unknown baseline; names the file and the line.
    """
    _check_number(sweep)
    rows: list[Row] = []
    names: set[str] = set()
    for number, row in enumerate(sweep.rows) if sweep.rows else [(None, None)]:
        place: Place = ("rows", number) if number is not None else ("grid",)
        for values in _combinations(sweep.grid):
            if row is not None and (again := [path for path in values if path in row.set]):
                raise SchemaError(
                    f"{sweep.where(*place, 'set', again[0])}: row '{row.name}' sets {again[0]}, an axis "
                    "of the grid; leave it to one of them"
                )
            made = _row(row, number, values)
            if len(made.name) > MAX_NAME:
                raise SchemaError(
                    f"{sweep.where('grid')}: the grid gives a row a name of {len(made.name)} bytes "
                    f"('{made.name[:40]}...'); names of folders end at {MAX_NAME}. Write rows with names "
                    "of their own in place of the grid, or give shorter values"
                )
            if made.name in names:
                raise SchemaError(
                    f"{sweep.where(*place)}: the grid gives two rows the name '{made.name}'"
                )
            if len(made.cells) != len(sweep.columns):
                raise SchemaError(
                    f"{sweep.where(*place, 'cells')}: row '{made.name}' has {len(made.cells)} cells "
                    f"({', '.join(made.cells)}) for {len(sweep.columns)} columns "
                    f"({', '.join(sweep.columns)})"
                )
            rows.append(made)
            names.add(made.name)
    if sweep.baseline is not None and sweep.baseline not in names:
        known = [row.name for row in rows]
        raise SchemaError(
            f"{sweep.where('baseline')}: no row '{sweep.baseline}' to compare with."
            f"{near_miss(sweep.baseline, known)} Rows: {', '.join(known)}"
        )
    return _with_seeds(sweep, rows)


def select(rows: Sequence[Row], patterns: Sequence[str]) -> tuple[Row, ...]:
    """Return the rows that one of some patterns names, in their own order.

    Args:
        rows: Of a sweep.
        patterns: Names, or patterns with `*`, `?` and `[...]`; none of them selects all.

    Raises:
        SchemaError: A pattern that no row fits.
    """
    names = [row.name for row in rows]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SchemaError(
                f"--rows {pattern}: no such row.{near_miss(pattern, names)} Rows: {', '.join(names)}"
            )
    chosen = patterns or ["*"]
    return tuple(row for row in rows if any(fnmatchcase(row.name, p) for p in chosen))


def trials_of(sweep: SweepFile, rows: Sequence[Row], scale: Scale) -> tuple[Trial, ...]:
    """Return the trials of some rows: each row with each of its seeds, its preset resolved.

    Weights digests are open, as the presets leave them.

    Raises:
        SchemaError: An unknown preset, setting or stage, or a value that does not fit; names the file
            and the line.
        SpecMismatchError: A view that the row's tokens cannot serve; the same.
    """
    return tuple(trial for row in rows for trial in _trials(sweep, row, scale))


def run_key(trial: Trial) -> str:
    """Return what trials that can share a training have in common: 16 hexadecimal digits.

    A digest of the preset without its name and without how it is computed, neither of which changes a
    number. Take it of a trial as `trials_of` gives it: filled-in weights digests would change it.
    """
    fields = trial.preset.model_dump(mode="json", exclude={"name", "execution"})
    return hashlib.sha256(canonical_json(fields).encode()).hexdigest()[:16]


def _check_number(sweep: SweepFile) -> None:
    """Refuse more trials than anybody trains, before any is made."""
    points = math.prod(len(values) for values in sweep.grid.values())
    given = [len(row.seeds or sweep.seeds) for row in sweep.rows] or [len(sweep.seeds)]
    n_trials = points * sum(given)
    if n_trials > MAX_TRIALS:
        at = "grid" if points > 1 else "seeds" if len(sweep.seeds) > 1 else "rows"
        raise SchemaError(
            f"{sweep.where(at)}: rows ({len(given)}) times points of the grid ({points}) times seeds make "
            f"{n_trials} trials; a sweep has at most {MAX_TRIALS}. Leave some out, or make several sweeps"
        )


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield every choice of one value per axis, the last axis fastest; one empty choice without axes."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _row(row: SweepRow | None, number: int | None, values: Mapping[str, Any]) -> Row:
    """Return a row of the file at one point of the grid."""
    words = [row.name] if row else []
    words += [f"{path.rpartition('.')[2]}-{_slug(value)}" for path, value in values.items()]
    cells = ((row.cells or (row.name,)) if row else ()) + tuple(map(_shown, values.values()))
    own = row or SweepRow(name="grid")
    return Row(
        name="-".join(words).lower(),
        cells=cells,
        group=own.group,
        settings={**values, **own.set},
        stage=own.stage,
        published=dict(own.published),
        seeds=own.seeds,
        note=own.note,
        preset=own.preset,
        number=number,
    )


def _with_seeds(sweep: SweepFile, rows: Sequence[Row]) -> tuple[Row, ...]:
    """Fill in the sweep's seeds; refuse one that is given twice."""
    found = []
    for row in rows:
        seeds = row.seeds or sweep.seeds
        if len(set(seeds)) != len(seeds):
            at = (
                ("rows", row.number, "seeds")
                if row.seeds and row.number is not None
                else ("seeds",)
            )
            raise SchemaError(f"{sweep.where(*at)}: a seed is given twice: {list(seeds)}")
        found.append(replace(row, seeds=seeds))
    return tuple(found)


def _slug(value: Any) -> str:
    """Return a value as a part of a row's name."""
    text = _shown(value).lower()
    return re.sub(r"[^a-z0-9._-]+", "-", text).strip("-.") or "none"


def _shown(value: Any) -> str:
    """Return a value as a cell of the table."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (dict, list, tuple)):
        return canonical_json(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _trials(sweep: SweepFile, row: Row, scale: Scale) -> Iterator[Trial]:
    at: Place = ("rows", row.number) if row.number is not None else ("grid",)
    start = _named(sweep, row, at)
    resolved = _resolve(sweep, row.name, start, _settings(sweep, row, at), at)
    if row.stage is not None and row.stage not in (stages := [s.name for s in resolved.stages]):
        raise SchemaError(
            f"{sweep.where(*at, 'stage')}: row '{row.name}': preset '{resolved.name}' has no stage "
            f"'{row.stage}'.{near_miss(row.stage, stages)} Allowed: {', '.join(stages)}"
        )
    _check_axis(sweep, resolved)
    if scale == "demo":
        scaled: list[Setting] = [
            (("demo", path), path, value) for path, value in sweep.demo.items()
        ]
        try:
            small = at_demo_scale(resolved)
        except SchemaError as error:
            raise SchemaError(f"{sweep.where(*at)}: row '{row.name}': {error}") from None
        resolved = _resolve(sweep, row.name, small, scaled, at)
    for seed in row.seeds:
        yield Trial(row.name, seed, resolved.model_copy(update={"seed": seed}), row.stage)


def _check_axis(sweep: SweepFile, resolved: Preset) -> None:
    """Refuse a plot along a setting that there is not."""
    for name in ("key", "by"):
        path = getattr(sweep.plot, name, None)
        if path is not None:
            try:
                assign(resolved.model_dump(mode="json"), path, 0)
            except SchemaError as error:
                raise SchemaError(f"{sweep.where('plot', name)}: {error}") from None


def _named(sweep: SweepFile, row: Row, at: Place) -> Preset:
    """Return the preset that a row starts from."""
    name = row.preset or sweep.preset
    if name not in PRESETS:
        where = sweep.where(*at, "preset") if row.preset else sweep.where("preset")
        raise SchemaError(
            f"{where}: unknown preset '{name}'.{near_miss(name, PRESETS)} Allowed: {', '.join(PRESETS)}"
        )
    return preset(name)


def _settings(sweep: SweepFile, row: Row, at: Place) -> list[Setting]:
    """Return a row's settings, those of the sweep first."""
    own: list[Setting] = []
    for path, value in row.settings.items():
        of_row = row.number is not None and path in sweep.rows[row.number].set
        own.append(((*at, "set", path) if of_row else ("grid", path), path, value))
    return [(("set", path), path, value) for path, value in sweep.set.items()] + own


def _resolve(
    sweep: SweepFile, row: str, start: Preset, settings: Sequence[Setting], at: Place
) -> Preset:
    """Apply settings to a preset; what is wrong is said with the line of the setting at fault."""
    data = start.model_dump(mode="json")
    for place, path, value in settings:
        try:
            assign(data, path, _plain(path, value), GROWING)
        except SchemaError as error:
            raise SchemaError(f"{sweep.where(*place)}: {error}") from None
    try:
        resolved = Preset.model_validate(data)
    except ValidationError as error:
        faults = [
            f"{sweep.where(*_at_fault(loc, settings, at))}: row '{row}': {said}"
            for loc, said in located(Preset, error)
        ]
        raise SchemaError("\n".join(faults)) from None
    # A text such as "inf" passes for a number too.
    if (fault := not_finite(resolved.model_dump(mode="json"))) is not None:
        raise SchemaError(
            f"{sweep.where(*_at_fault(fault, settings, at))}: row '{row}': "
            f"'{'.'.join(map(str, fault))}' must be finite"
        )
    try:
        resolved.view_shapes()
    except EmocacheError as error:
        raise type(error)(f"{sweep.where(*at)}: row '{row}': {error}") from None
    return resolved


def _plain(path: str, value: Any) -> Any:
    """Return the data of a value: a recipe's name for tokens becomes its spec."""
    head, _, name = path.partition(".")
    if head != "tokens" or name not in INPUTS or not isinstance(value, str):
        return value
    stream = STREAM_OF[name]
    encoder, plus, options = value.partition("+")
    text = f"{encoder}{plus}{options}" if ":" in encoder else f"{encoder}:{stream}{plus}{options}"
    try:
        specs = token_specs(text)
    except SchemaError as error:
        raise SchemaError(f"{path}: {str(error).partition(': ')[2]}") from None
    if len(specs) != 1:
        raise SchemaError(f"{path}: {value!r} means {len(specs)} specs; name one encoder")
    return specs[0].model_dump(mode="json")


def _at_fault(loc: Sequence[int | str], settings: Sequence[Setting], at: Place) -> Place:
    """Return the place of the last setting that a fault's location lies in or around; else the row."""
    where = [str(part) for part in loc]
    for place, path, _ in reversed(settings):
        parts = path.split(".")
        shorter = min(len(parts), len(where))
        if where and parts[:shorter] == where[:shorter]:
            return place
    return at
