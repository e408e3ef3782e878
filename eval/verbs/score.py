"""`emocache score`: a predictions file to scores, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache.errors import SchemaError
from eval.verbs.console import DONE, FINDINGS, err, out, verb
from eval.verbs.run_options import JudgedOption, ProtocolOption, WheelsOption

if TYPE_CHECKING:
    from rich.table import Table

    from eval.scoring.result import BenchmarkScore, Scored

ALL = "all"


@verb
def score_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS",
            help="Of the released format (JSON lines, a JSON list, CSV) or ours; or a folder with one.",
            show_default=False,
        ),
    ],
    task: Annotated[
        str,
        typer.Option(help="Id of the set, such as dfew; all: every set that a file of ours names."),
    ],
    protocol: ProtocolOption = "paper",
    truths: Annotated[
        Path | None,
        typer.Option(help="True labels (csv, jsonl, npz); default: those of the predictions file."),
    ] = None,
    wheels: WheelsOption = None,
    reading: Annotated[
        str | None,
        typer.Option(
            help="What of a reply is compared: raw, tag (the answer tag's content), label (punctuation and "
            "aliases forgiven) or last-word (anything not offered is neutral, as Emotion-LLaMA's scorer "
            "does). Default: raw under released, else tag."
        ),
    ] = None,
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="Rows with this mode count, instead of the set's own; repeatable; all: every row."
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Truths without a prediction count as wrong.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a report (HTML, Markdown, CSV, LaTeX)."),
    ] = None,
    judged: JudgedOption = None,
    to_json: Annotated[
        bool, typer.Option("--json", help="The scores as one JSON document.")
    ] = False,
) -> int:
    """Score a predictions file by the benchmark's rules; scores are fractions in the JSON.

    Says how many items were scored, were offered, and are published.
    """
    from eval.scoring.score import score_all, score_file

    if judged and report is None:
        raise SchemaError("--judged is laid out in a report. Give its folder too: --report DIR")
    splits = [name.strip() for text in split or () for name in text.split(",") if name.strip()]
    unscored: dict[str, str] = {}
    if task == ALL:
        if truths is not None or allow_missing:
            raise SchemaError(
                "--truths and --allow-missing are for one set. Give its id instead of --task all."
            )
        scored = score_all(
            file,
            protocol=protocol,
            reading=reading,
            wheels=wheels,
            splits=splits or None,
            unscored=unscored,
        )
    else:
        one = score_file(
            file,
            task,
            protocol=protocol,
            reading=reading,
            truths=truths,
            wheels=wheels,
            splits=splits or None,
            allow_missing=allow_missing,
        )
        scored = {task: one}
    # First what may be refused: a JSON document is printed whole, or not at all.
    written = _report(scored, file, report, judged or ()) if report is not None else ()
    if to_json:
        out.file.write(as_json(scored, is_all=task == ALL, unscored=unscored))
    else:
        print_tables(scored)
    print_notes(scored)
    for why in unscored.values():
        err.print(why, markup=False, highlight=False, soft_wrap=True)
    for path in written:
        (err if to_json else out).print(str(path), markup=False, highlight=False, soft_wrap=True)
    return FINDINGS if unscored else DONE


def as_json(
    scored: Mapping[str, Scored], *, is_all: bool, unscored: Mapping[str, str] | None = None
) -> str:
    """Return scores as a JSON document with a line end.

    Args:
        scored: Benchmark id -> its score.
        is_all: Sets by their id under `tasks`, with `averages` and `unscored`; else the one set alone.
        unscored: Sets of which no item can be scored -> why.
    """
    from eval.benchmarks import averages

    results = {name: one.result.model_dump(mode="json") for name, one in scored.items()}
    document: object = next(iter(results.values()))
    if is_all:
        scores = {name: one.result.score for name, one in scored.items()}
        document = {"tasks": results, "averages": averages(scores), "unscored": unscored or {}}
    # ASCII: whatever the terminal's encoding, the document is whole.
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def print_notes(scored: Mapping[str, Scored]) -> None:
    """Print what a reader must know of the scores, apart from the scores."""
    for name, found in scored.items():
        for note in found.result.notes:
            err.print(f"{name}: {note}", markup=False, highlight=False, soft_wrap=True)


def print_tables(scored: Mapping[str, Scored]) -> None:
    """Print a line per set; of a single one also its parts, counts and hard replies."""
    from eval.benchmarks import METRICS

    result = next(iter(scored.values())).result
    metric = f": {METRICS[result.metric]}, in percent" if len(scored) == 1 else ""
    told = f"protocol {result.protocol}, reading {result.reading}{metric}"
    out.print(told, markup=False, highlight=False, soft_wrap=True)
    out.print(_summary(scored))
    if len(scored) > 1:
        return
    out.print(_parts(result))
    lines = {
        "beside it": _fractions(result.extras),
        "other protocols": _fractions(result.other_protocols),
        "not scored": _counts(result.counts.reasons),
        "replies": _counts(result.replies),
    }
    for name, text in lines.items():
        if text:
            out.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)
    for example in result.examples:
        told = f"  {example.how}  {example.id}  {example.reply!r}  (truth {example.truth})"
        out.print(told, markup=False, highlight=False, soft_wrap=True)


def _summary(scored: Mapping[str, Scored]) -> Table:
    """Return a line per set, with its three counts, and the complete averages."""
    from eval.benchmarks import averages
    from eval.scoring.intervals import interval

    columns = ("set", "metric", "score", "95 % interval", "scored", "offered", "published")
    table = _table(columns, 2)
    for name, one in scored.items():
        sure, counts = interval(one.tally), one.result.counts
        table.add_row(
            name,
            one.result.metric,
            _percent(one.result.score),
            f"{_percent(sure.low)}-{_percent(sure.high)}",
            f"{counts.scored:,}",
            f"{counts.offered:,}",
            f"{counts.published:,}" if counts.published is not None else "",
        )
    for name, mean in averages({k: v.result.score for k, v in scored.items()}).items():
        table.add_row(name, "mean of sets", _percent(mean), "", "", "", "")
    return table


def _parts(result: BenchmarkScore) -> Table:
    kinds = {"accuracy": "recall", "waf": "F1", "map": "average precision"}
    is_wheel = result.metric not in kinds
    table = _table(
        ("wheel" if is_wheel else "class", kinds.get(result.metric, "score"), "items"), 1
    )
    for name, part in result.parts.items():
        table.add_row(name, _percent(part), f"{result.part_counts[name]:,}")
    return table


def _table(columns: Sequence[str], first_number: int) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place >= first_number else "left", no_wrap=True)
    return table


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}"


def _fractions(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {_percent(score)}" for name, score in scores.items())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def _report(
    scored: Mapping[str, Scored], file: Path, folder: Path, judged: Sequence[Path]
) -> tuple[Path, ...]:
    from datetime import UTC, datetime

    from eval.judging.results import read_judged
    from eval.results.data import ResultsData
    from eval.results.page import run_scores, write_results

    name = next((one.result.run for one in scored.values() if one.result.run), None) or file.stem
    return write_results(
        ResultsData(
            title="Scores on MMEVerse-Bench",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            runs=(run_scores(name, scored),),
            judged=tuple(read_judged(path) for path in judged),
        ),
        folder,
    )
