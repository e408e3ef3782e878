"""Tables on the terminal: what ratings come to."""

from __future__ import annotations

from typing import Final

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from eval.formats import percent
from extract.annotate.people.agreement import Agreement, Group, Kappa, Pair
from extract.annotate.people.quality import MEANINGS, QualityReport
from extract.annotate.people.review import ASPECTS, Aspect

NAMES: Final[dict[Aspect, str]] = {
    "visual": "visual clues",
    "audio": "audio clues",
    "text": "text clues",
    "reasoning": "reasoning",
    "label": "inferred label",
}
_NONE: Final = "\N{EN DASH}"
_EXCERPT: Final = 40


def agreement_tables(found: Agreement) -> list[Table]:
    """Return what ratings come to as tables: shares, raters, pairs, scores by label."""
    tables = [_rate_table(found), _rater_table(found)]
    pairs = [*found.pairs, *found.corpus_pairs]
    if pairs:
        tables.append(_kappa_table(pairs))
    if found.scores:
        if any(pair.score.n for pair in pairs):
            tables.append(_score_kappa_table(pairs))
        tables.append(_score_table(found))
    return tables


def agreement_lines(found: Agreement) -> list[str]:
    """Return what a reader must know beside the tables."""
    lines = [f"{found.n_ratings:,} ratings of {found.n_items:,} items"]
    if found.n_outdated:
        lines.append(f"{found.n_outdated:,} ratings are of texts that the manifest no longer has")
    if found.n_reworded:
        lines.append(
            f"{found.n_reworded:,} records were rated with more than one version of their texts; each "
            "version is an item"
        )
    rates = found.overall.rates
    for n, what in (
        (sum(rate.n_missing for rate in rates), "verdicts are missing"),
        (sum(rate.n_not_shown for rate in rates), "aspects had nothing to judge, no sound for example"),
        (sum(rate.n_other for rate in rates), "values are neither accept nor reject (--accept-from N)"),
    ):  # fmt: skip
        if n:
            lines.append(f"{n:,} {what}; they enter no share")
    if any(pair.all_aspects.kappa is None for pair in found.pairs):
        lines.append(
            f"{_NONE}: kappa is undefined, because nothing was rated by both or because both gave one and "
            "the same value throughout"
        )
    if not found.pairs:
        lines.append("kappa needs a second rater")
    return lines


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at < left else "right")
    return table


def _short(text: str) -> Text:
    # Not markup: names come from files.
    shown = text if len(text) <= _EXCERPT else text[: _EXCERPT - 1] + "…"
    return Text("".join(c if c.isprintable() else " " for c in shown))


def _rate_table(found: Agreement) -> Table:
    table = _table(
        "Accepted, in percent", "corpus", "items", "ratings", *(NAMES[aspect] for aspect in ASPECTS)
    )
    groups: list[Group] = list(found.corpora) if len(found.corpora) > 1 else []
    for group in [*groups, found.overall]:
        name = group.corpus or ("all" if groups else found.corpora[0].corpus or "all")
        shares = [_NONE if rate.share is None else percent(rate.share) for rate in group.rates]
        table.add_row(_short(name), f"{group.n_items:,}", f"{group.n_ratings:,}", *shares)
    return table


def _rater_table(found: Agreement) -> Table:
    with_scores = bool(found.scores)
    columns = ["rater", "rated", "missing", "changed", "first", "last"]
    table = _table("Raters", *columns, *(["mean score"] if with_scores else []))
    for row in found.raters:
        cells = [
            f"{row.n_items:,}",
            f"{row.n_missing:,}",
            f"{row.n_changed:,}",
            (row.first_time or _NONE)[:16].replace("T", " "),
            (row.last_time or _NONE)[:16].replace("T", " "),
        ]
        if with_scores:
            cells.append(_NONE if row.mean_score is None else f"{row.mean_score:.2f}")
        table.add_row(_short(row.rater), *cells)
    return table


def _kappa_table(pairs: list[Pair]) -> Table:
    table = _table(
        "Cohen's kappa", "raters", "corpus", "both rated", "one only", "all five",
        *(NAMES[aspect] for aspect in ASPECTS),
        left=2,
    )  # fmt: skip
    for pair in pairs:
        table.add_row(
            _short(f"{pair.first}, {pair.second}"),
            _short(pair.corpus or "all"),
            f"{pair.n_items:,}",
            f"{pair.n_only_first + pair.n_only_second:,}",
            _kappa(pair.all_aspects),
            *(_kappa(pair.by_aspect[aspect]) for aspect in ASPECTS),
        )
    return table


def _score_kappa_table(pairs: list[Pair]) -> Table:
    table = _table(
        "Cohen's kappa of the scores", "raters", "corpus", "scores", "unweighted", "linear",
        "quadratic",
        left=2,
    )  # fmt: skip
    for pair in pairs:
        weighted = [
            _NONE if value is None else f"{value:.3f}"
            for value in (pair.score_linear, pair.score_quadratic)
        ]
        table.add_row(
            _short(f"{pair.first}, {pair.second}"),
            _short(pair.corpus or "all"),
            f"{pair.score.n:,}",
            _kappa(pair.score),
            *weighted,
        )
    return table


def _score_table(found: Agreement) -> Table:
    raters = [row.rater for row in found.raters if row.mean_score is not None]
    table = _table("Mean scores", "label", *raters, "all", "scores")
    for row in found.scores:
        means = [f"{row.by_rater[r]:.2f}" if r in row.by_rater else _NONE for r in raters]
        table.add_row(_short(row.label), *means, f"{row.mean:.2f}", f"{row.n:,}")
    table.add_section()
    means = [f"{row.mean_score:.2f}" for row in found.raters if row.mean_score is not None]
    overall = sum(row.mean for row in found.scores) / len(found.scores)
    n = sum(row.n for row in found.scores)
    table.add_row("mean of labels", *means, f"{overall:.2f}", f"{n:,}")
    return table


def _kappa(found: Kappa) -> str:
    return _NONE if found.kappa is None else f"{found.kappa:.3f}"


def quality_table(report: QualityReport) -> Table:
    """Return how many descriptions each filter flagged."""
    kinds = [kind for kind in report.by_kind if report.by_kind[kind]]
    table = _table(
        f"{report.n_descriptions:,} descriptions of {report.n_records:,} records",
        "filter", "flags what", "descriptions", "records", *(kind.replace("_", " ") for kind in kinds),
        left=2,
    )  # fmt: skip
    for found in report.filters:
        cells = [f"{found.by_kind.get(kind, 0):,}" for kind in kinds]
        table.add_row(
            found.filter, MEANINGS[found.filter], f"{found.n_descriptions:,}",
            f"{found.n_records:,}", *cells,
        )  # fmt: skip
    table.add_section()
    table.add_row(
        "any", "", f"{report.n_flagged:,}", f"{report.n_flagged_records:,}", *("" for _ in kinds)
    )
    return table


def quality_example_lines(report: QualityReport) -> list[str]:
    """Return the first examples of each filter."""
    lines = []
    for found in report.filters:
        for example in found.examples:
            what = example.kind if example.target is None else f"{example.kind} ({example.target})"
            excerpt = "".join(c if c.isprintable() else " " for c in example.excerpt)
            lines.append(f"{found.filter}: {example.uid}, {what}: {example.why}")
            lines.append(f"    {excerpt}")
    if not report.n_prompts:
        lines.append("no prompts were given, so nothing was compared with them")
    return lines
