"""The page of a sweep, and its Markdown twin."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from eval.figures import Plot
from eval.formats import NONE, escape_markdown, p_value, percent
from eval.pages import page_environment
from eval.sweep.schema import TrialResult
from eval.sweep.state import Begun
from eval.sweep.tables.plots import caption
from eval.sweep.tables.table import ALPHA, SweepTable
from eval.sweep.tables.texts import (
    CLEAR,
    change_span,
    change_text,
    count_text,
    demo_warning,
    method,
    published_change_text,
    published_text,
    ranks,
    remarks,
    score_text,
    seeds_text,
    span_text,
)


class Tile(NamedTuple):
    """A number at the top of the page."""

    name: str
    value: str
    unit: str = ""
    below: str = ""


def render(
    table: SweepTable, begun: Begun, results: Mapping[str, TrialResult], plots: Mapping[str, Plot]
) -> tuple[str, str]:
    """Return a sweep as an HTML page that needs no other file, and as Markdown.

    Args:
        table: What to say.
        begun: What the sweep was begun as.
        results: Trial -> what it came to, for times and places.
        plots: Of the table; the Markdown links to them as `table-NAME.png`.

    Raises:
        MissingDependencyError: jinja2 is not installed.
    """
    environment = page_environment("The table of a sweep")
    from markupsafe import Markup, escape  # jinja2 brings it

    environment.filters.update(
        count=lambda value: f"{value:,}",
        pct=percent,
        p=p_value,
        span=span_text,
        ticks=lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))),
        md=lambda text: Markup(escape_markdown(str(text))),
    )
    context: dict[str, Any] = {
        "table": table,
        "begun": begun,
        "groups": _groups(table),
        "trials": [(trial, results.get(trial.name)) for trial in begun.trials],
        "best": ranks(table),
        "tiles": tiles(table),
        "warning": demo_warning(table),
        "method": method(table),
        "remarks": remarks(table),
        "captions": {name: caption(table, name) for name in plots},
        "figures": {name: Markup(plot.svg) for name, plot in plots.items()},
        "shown": Shown(table),
        "clear": CLEAR,
        "alpha": ALPHA,
        "none": NONE,
        "score_text": score_text,
        "change_text": change_text,
        "change_span": change_span,
        "published_text": published_text,
        "published_change_text": published_change_text,
        "seeds_text": seeds_text,
        "count_text": count_text,
        "said": _said,
        "duration": _duration,
    }
    html, markdown = (
        environment.get_template(f"sweep.{ending}.j2").render(context) for ending in ("html", "md")
    )
    return html, markdown


class Shown:
    """Which columns have anything to show."""

    def __init__(self, table: SweepTable) -> None:
        """Look through the rows."""
        rows = table.rows
        self.changes = {c.name: any(c.name in r.changes for r in rows) for c in table.scores}
        self.published = {c.name: table.has_published(c.name) for c in table.scores}
        self.seeds = any(len(row.seeds) > 1 for row in rows)
        self.trainable = any(row.n_trainable is not None for row in rows)
        self.prefix = any(row.prefix for row in rows)
        self.n_columns = (
            len(table.columns)
            + sum(1 + self.changes[c.name] + self.published[c.name] for c in table.scores)
            + self.seeds
            + self.trainable
            + self.prefix
        )


def tiles(table: SweepTable) -> tuple[Tile, ...]:
    """Return what the table says in a few numbers."""
    n_trials = sum(len(row.seeds) for row in table.rows)
    n_failed = sum(len(row.failures) for row in table.rows)
    told = [
        f"{n_failed} failed" * bool(n_failed),
        f"{n_trials} trials" * (n_trials != len(table.rows)),
    ]
    found = [
        Tile(
            "Rows",
            str(sum(1 for row in table.rows if row.n_done == len(row.seeds))),
            f"of {len(table.rows)} done",
            ", ".join(filter(None, told)),
        )
    ]
    if not any(row.scores for row in table.rows):
        return tuple(found)
    best = ranks(table)
    for column in table.scores:
        first = [row for row in table.rows if best.get((row.name, column.name)) == 1]
        if first:
            names = " and ".join(row.name for row in first[:2])
            more = f" and {len(first) - 2} more" if len(first) > 2 else ""
            found.append(
                Tile(
                    f"Best, {column.heading}", score_text(first[0], column.name), "%", names + more
                )
            )
    if table.n_tests:
        tested = [one for row in table.rows for one in row.changes.values()]
        better = sum(one.is_clear and one.difference > 0 for one in tested)
        worse = sum(one.is_clear and one.difference < 0 for one in tested)
        found.append(
            Tile(
                f"Beyond chance, against {table.baseline}",
                f"{better + worse}",
                f"of {table.n_tests}",
                f"{better} better, {worse} worse",
            )
        )
    return tuple(found)


def _groups(table: SweepTable) -> list[tuple[str | None, list[Any]]]:
    """Return runs of rows under one heading."""
    found: list[tuple[str | None, list[Any]]] = []
    for row in table.rows:
        if not found or found[-1][0] != row.group:
            found.append((row.group, []))
        found[-1][1].append(row)
    return found


def _said(value: object) -> str:
    """Return a setting's value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
