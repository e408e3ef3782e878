"""The report of one or more runs on the benchmarks: HTML, Markdown, CSV, LaTeX rows, figures.

    run = run_scores("our model", scored)
    write_results(ResultsData(title, created, (run,)), out)

`ResultsData` holds all that the report says; `write_results` turns it into files and reads nothing else.
Scores are fractions up to here: percent is made in `eval.results.tables` and by the filters of this file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cache.errors import PredictionError, SchemaError
from cache.files import write_aside, write_text_aside
from eval.benchmarks import (
    METRICS,
    WHEEL_METRICS,
    Protocol,
    averages,
    benchmarks,
    published,
)
from eval.corpora.plots import stand_alone
from eval.figures import Plot
from eval.formats import escape_markdown, excerpt, percent
from eval.judging.results import EmerScore, LexicalScore, MmeScore
from eval.pages import page_environment
from eval.results.csv_files import csv_files
from eval.results.data import ResultsData, RunScores, SetRun, SetView
from eval.results.figures import COMPARED, draw_confusions, draw_heat, draw_labels, draw_scores
from eval.results.latex import latex
from eval.results.sets import (
    MEANINGS,
    READINGS,
    calibration_of,
    confusion,
    label_scores,
    mean_likelihoods,
)
from eval.results.tables import (
    NOTHING,
    OURS,
    Table,
    emer_table,
    lexical_table,
    mme_table,
    protocol_of,
    recognition_tables,
    span,
)
from eval.scoring.intervals import N_SAMPLES, Interval, interval, mean_interval
from eval.scoring.result import Reading, Scored
from eval.scoring.slices import SliceBy, slices

if TYPE_CHECKING:
    from eval.results.examples import ExampleBrowser, Outcome
    from eval.results.pictures import ClipFile

PROTOCOL_WORDS: Final[Mapping[Protocol, str]] = MappingProxyType(
    {
        "paper": "the published sets and rules; of a reply, the content of its answer tag counts",
        "released": "what the scorers released with the paper do: whole replies, and the splits that "
        "they score",
        "unibench": "the rules of MER-UniBench's own scorer: sentiment by its sign",
    }
)
_EXTRA_WORDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "uar": "UAR, mean recall of classes",
        "war": "WAR",
        "map": "mAP",
        **{f"{kind}_f1": f"{kind} F1" for kind in ("weighted", "macro", "micro", "sample")},
    }
)
_SLICE_WORDS: Final[Mapping[SliceBy, str]] = MappingProxyType(
    {
        "corpus": "By corpus",
        "language": "By language",
        "duration": "By duration",
        "missing": "By missing stream",
    }
)


class Tile(NamedTuple):
    """A number at the top of the page."""

    name: str
    value: str
    unit: str
    below: str


def run_scores(name: str, scored: Mapping[str, Scored], *, n_samples: int = N_SAMPLES) -> RunScores:
    """Return a run with confidence intervals, of its complete averages too, and with slices.

    Args:
        name: The row of the tables.
        scored: Benchmark id -> its score.
        n_samples: Bootstrap samples; 0: neither intervals nor slices.
    """
    usable = {task: one for task, one in scored.items() if not math.isnan(one.tally.total)}
    if not n_samples:
        return RunScores(name, scored)
    found = {task: interval(one.tally, n=n_samples) for task, one in usable.items()}
    sets = benchmarks()
    for average in averages(dict.fromkeys(usable, 0.0)):
        tasks = [task for task, row in sets.items() if row.unibench or average == "avg-18"]
        found[average] = mean_interval([usable[task].tally for task in tasks], n=n_samples)
    parts = {
        task: slices(one.tally, [item.prediction for item in one.items], n=n_samples)
        for task, one in usable.items()
    }
    return RunScores(name, scored, found, {task: part for task, part in parts.items() if part})


def browse_examples(
    runs: Sequence[RunScores],
    n: int = 36,
    *,
    files: Mapping[str, ClipFile] | None = None,
    seed: int = 0,
) -> ExampleBrowser | None:
    """Choose examples of the first run for the page: of every set a few, right and wrong ones.

    Args:
        runs: The runs; replies of the others are not shown.
        n: Examples of all sets together; of each set at least two, and at most twelve.
        files: Id of an item -> its clip, for frames, waveform and sound; None: text alone.
        seed: Gives other examples.

    Returns:
        None if no item is scored.
    """
    from eval.results.examples import (
        Choice,
        ExampleCard,
        card_of_item,
        choose_examples,
        make_browser,
    )

    sets = runs[0].scored if runs else {}
    cards: list[ExampleCard] = []
    outcomes: Counter[Outcome] = Counter()
    for number, task in enumerate(task for task in benchmarks() if task in sets):
        one = sets[task]
        found = _outcomes(one)
        outcomes.update(found.values())
        chosen = choose_examples(
            [
                Choice(item.id, ", ".join(item.truth), found[item.id])
                for item in one.items
                if item.id in found
            ],
            min(12, max(2, n // len(sets))),
            lambda choice: choice,
            seed=seed + number,  # else all sets would begin with the same class
        )
        items = {item.id: item for item in one.items}
        title = one.benchmark.title
        cards.extend(card_of_item(items[choice.id], title, choice.outcome) for choice in chosen)
    if not cards:
        return None
    said = [f"Replies of {runs[0].name}."] if len(runs) > 1 else []
    if any(one.benchmark.metric in WHEEL_METRICS for one in sets.values()):
        said.append(
            "On emotion wheels, right is what is right on every wheel, partly right on some."
        )
    return make_browser(cards, outcomes, files=files, notes=said)


def _outcomes(one: Scored) -> dict[str, Outcome]:
    """Return what the metric says of each scored item, by its id: of wheels, related words are right."""
    from eval.results.examples import outcome_of

    is_wheel = one.benchmark.metric in WHEEL_METRICS
    alone = one.tally.score(one.tally.values).tolist() if is_wheel else []
    found: dict[str, Outcome] = {}
    for number, is_scored in enumerate(one.tally.scored.tolist()):
        item = one.items[number]
        if not is_scored:
            continue
        plain = outcome_of(item.truth, item.predicted, item.how)
        if is_wheel and plain not in ("empty", "off list"):
            hit = alone[number]
            plain = "right" if hit > 1 - 1e-9 else "partly right" if hit > 0 else "wrong"
        found[item.id] = plain
    return found


def write_results(data: ResultsData, out: Path) -> tuple[Path, ...]:
    """Write the report into a folder; older files are replaced.

    `benchmark.html` needs neither network nor another file; `benchmark.md` links to the figures beside it,
    which are there as PNG and SVG. `benchmark.csv` has a line per run and set, `benchmark-labels.csv` and
    `benchmark-parts.csv` one per label and per wheel or class, `benchmark.tex` the tables for a paper.

    Returns:
        The paths of the HTML, Markdown, CSV and LaTeX files, the page first.

    Raises:
        PredictionError: Nothing to report, two runs of one name, or scores of several protocols.
        MixedJudgesError: Reasoning was rated by several judges: they may not share a table.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    _check(data)
    scored = {run.name: run.scored for run in data.runs}
    between = {run.name: run.intervals for run in data.runs}
    protocol = protocol_of(scored)
    recognition = recognition_tables(scored, between)
    judged = _judged_tables(data.judged)
    views = _views(data.runs)
    plots = _plots(data, views)
    environment = page_environment("A report")
    from markupsafe import Markup  # jinja2 brings it

    environment.filters.update(
        pct=_percent,
        count=lambda value: f"{value:,}",
        span=span,
        excerpt=excerpt,
        in_order=_in_order,
        md=lambda text: Markup(escape_markdown(str(text))),
    )
    context: dict[str, Any] = {
        "data": data,
        "browser": data.examples or browse_examples(data.runs),
        "protocol": protocol,
        "protocol_words": PROTOCOL_WORDS,
        "recognition": recognition,
        "judged": judged,
        "views": views,
        "tiles": _tiles(data.runs[0]) if len(data.runs) == 1 else (),
        "metrics": METRICS,
        "wheel_metrics": WHEEL_METRICS,
        "reading": _common_reading(views),
        "readings": READINGS,
        "meanings": MEANINGS,
        "slice_words": _SLICE_WORDS,
        "extra_words": _EXTRA_WORDS,
        "ours": OURS,
        "n_runs": len(data.runs),
        "captions": _captions(data),
        "figures": {name: Markup(plot.svg) for name, plot in plots.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, plot in plots.items():
        with write_aside(out / f"benchmark-{name}.png") as aside:
            aside.write_bytes(plot.png)
        write_text_aside(out / f"benchmark-{name}.svg", stand_alone(plot.svg))
    texts = {
        f"benchmark.{ending}": environment.get_template(f"benchmark.{ending}.j2").render(context)
        for ending in ("html", "md")
    }
    texts |= csv_files(data.runs, views)
    texts["benchmark.tex"] = latex([*recognition, *judged])
    for name, text in texts.items():
        write_text_aside(out / name, text)
    return tuple(out / name for name in texts)


def _check(data: ResultsData) -> None:
    if not data.runs and not data.judged:
        raise PredictionError(
            "nothing to report: no run and no judged result. Pass scores of one set at least."
        )
    names = [run.name for run in data.runs]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise PredictionError(
            f"two runs are called '{twice}'; their rows could not be told apart. Name them differently."
        )
    for run in data.runs:
        for task, one in run.scored.items():
            if task != one.benchmark.id or task not in benchmarks():
                raise SchemaError(
                    f"run '{run.name}': the score of '{one.benchmark.id}' is filed under '{task}'. "
                    "Scores are filed under the id of their benchmark."
                )


def _judged_tables(judged: Iterable[EmerScore | MmeScore | LexicalScore]) -> tuple[Table, ...]:
    emer = [score for score in judged if isinstance(score, EmerScore)]
    mme = [score for score in judged if isinstance(score, MmeScore)]
    lexical = [score for score in judged if isinstance(score, LexicalScore)]
    return (
        *([emer_table(emer)] if emer else []),
        *([mme_table(mme)] if mme else []),
        *([lexical_table(lexical)] if lexical else []),
    )


def _views(runs: Sequence[RunScores]) -> tuple[SetView, ...]:
    views = []
    for task, row in benchmarks().items():
        shown = tuple(
            SetRun(
                run.name,
                one := run.scored[task],
                run.intervals.get(task),
                label_scores(one),
                confusion(one),
                run.slices.get(task, {}),
                mean_likelihoods(one),
                calibration_of(one),
            )
            for run in runs
            if task in run.scored
        )
        if shown:
            views.append(SetView(row, shown, _published(task)))
    return tuple(views)


def _common_reading(views: Sequence[SetView]) -> Reading | None:
    """Return how much of a reply all scores compare; None if they differ in that."""
    found = {run.scored.result.reading for view in views for run in view.runs}
    return found.pop() if len(found) == 1 else None


def _published(task: str) -> tuple[tuple[str, float], ...]:
    rows = {row.model: row.scores[task] for row in published().recognition}
    best = max(rows, key=lambda model: rows[model])
    shown = [(name, rows[name]) for name in COMPARED]
    if all(score < rows[best] for _, score in shown):
        shown.append((f"best of all, {best}", rows[best]))
    return tuple(shown)


def _tiles(run: RunScores) -> tuple[Tile, ...]:
    results = [one.result for one in run.scored.values()]
    means = averages({task: one.result.score for task, one in run.scored.items()})
    named = {name: (name.capitalize(), mean) for name, mean in means.items()}
    if len(results) == 1:
        named[results[0].task] = benchmarks()[results[0].task].title, results[0].score
    tiles = [
        Tile(title, _percent(score), "%", _between(run.intervals.get(key)))
        for key, (title, score) in named.items()
    ]
    missing = [row.short for task, row in benchmarks().items() if task not in run.scored]
    told = "" if len(missing) > 4 else f"without {', '.join(missing)}" if missing else ""
    tiles.append(Tile("Sets scored", str(len(results)), f"of {len(benchmarks())}", told))
    n_scored = sum(result.counts.scored for result in results)
    n_offered = sum(result.counts.offered for result in results)
    n_published = sum(benchmarks()[result.task].n for result in results)
    told = f"of {n_offered:,} offered, {n_published:,} published"
    return (*tiles, Tile("Items scored", f"{n_scored:,}", "", told))


def _percent(fraction: float) -> str:
    return NOTHING if math.isnan(fraction) else percent(fraction)


def _between(found: Interval | None) -> str:
    return "" if found is None else f"{100 * found.level:g} % interval {span(found)}"


def _in_order(replies: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return how replies were read, well read ones first."""
    known = list(MEANINGS)
    return sorted(
        replies.items(), key=lambda pair: known.index(pair[0]) if pair[0] in known else len(known)
    )


def _plots(data: ResultsData, views: Sequence[SetView]) -> dict[str, Plot]:
    """Return the figures: all runs in the first two, the first run in the others."""
    if not views:
        return {}
    scored = {run.name: run.scored for run in data.runs}
    plots = {"scores": draw_scores(scored, {run.name: run.intervals for run in data.runs})}
    if (heat := draw_heat(scored)) is not None:
        plots["heat"] = heat
    first = [(view.benchmark.title, view.runs[0]) for view in views]
    first = [(title, run) for title, run in first if run.name == data.runs[0].name]
    matrices = {title: run.confusion for title, run in first if run.confusion is not None}
    if matrices:
        plots["confusions"] = draw_confusions(matrices)
    labels = {title: run.labels for title, run in first if run.labels}
    if labels:
        plots["labels"] = draw_labels(labels)
    return plots


def _captions(data: ResultsData) -> dict[str, str]:
    bars = " with their confidence intervals" if any(run.intervals for run in data.runs) else ""
    whose = f" of {data.runs[0].name}" if len(data.runs) > 1 else ""
    return {
        "scores": f"Our scores{bars}, three published models, and the range of all published models.",
        "heat": "Scores in percent. Within a column, colour runs from the lowest to the highest score; the "
        "highest is bold.",
        "confusions": f"Confusion matrices{whose}: rows are true labels, columns what was replied, cells "
        "the share of the row in percent. In brackets: true labels that the score leaves out. Behind the "
        "labels, in orange: replies that name several of them or none.",
        "labels": f"F1 (bar), precision (hollow mark) and recall (full mark) of each label{whose}.",
    }
