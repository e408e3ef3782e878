"""The statistics of a corpus as a page: one self-contained HTML file, its Markdown twin, and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cache.files import write_text_aside
from eval.corpora.plots import draw_corpus, write_plots
from eval.corpora.statistics import SPLITS, CorpusStatistics, total
from eval.formats import escape_markdown, number
from eval.pages import page_environment
from eval.progress import human_time
from extract.annotate.evidence.action_units import load_units

FIELD_NAMES: Final[Mapping[str, str]] = {
    "emotion": "Emotions",
    "emotion_multi": "Several emotions",
    "emotion_ov": "Emotion words",
    "sentiment": "Sentiment",
    "intent": "Intents",
}
MAX_OPEN: Final = 40
"""Labels of a table; of more, the most frequent ones, and a count of the others."""
_CAPTIONS: Final[Mapping[str, str]] = {
    "splits": "Records of each corpus by split.",
    "labels-emotion": "Labels of each corpus in its own space, on one scale. Kin have one hue.",
    "labels-emotion_multi": "Labels of records that may have several, as shares of all labels of the corpus.",
    "labels-emotion_ov": "The most frequent words, as shares of all words of the corpus.",
    "labels-sentiment": "Polarity, as share of the corpus's labelled records.",
    "labels-intent": "Intents, as share of the corpus's labelled records.",
    "families": "The same emotion labels side by side, gathered by kin (happy, joy and happiness, for "
    "example). Only this figure does so: labels stay as their corpus gives them.",
    "durations": "Durations as the containers state them; a bar in orange, if there is one, is all longer "
    "clips.",
    "action-units": "Records in whose peak frame a unit is present.",
    "action-units-by-emotion": "The five units that are present most often, for each emotion.",
    "benchmarks": "Records that each benchmark scores; a record may serve two.",
}


def write_corpus_report(stats: CorpusStatistics, out_dir: Path, created: str) -> tuple[Path, Path]:
    """Write `corpus.html`, `corpus.md`, `corpus.json`, and each figure as PNG and SVG, into a folder.

    The HTML page needs neither network nor script and no other file. Older files are replaced.

    Args:
        stats: What to say.
        out_dir: The folder; it is made.
        created: ISO 8601 date and time; the caller's clock, so that equal data give equal files.

    Returns:
        The paths of the HTML and of the Markdown file.

    Raises:
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    environment = page_environment("A page of statistics")
    from markupsafe import Markup  # jinja2 brings it

    environment.filters.update(
        count=lambda value: f"{value:,}" if value else "\N{EN DASH}",
        number=number,
        lasting=_lasting,
        md=lambda text: Markup(escape_markdown(str(text))),
    )
    plots = draw_corpus(stats)
    context: dict[str, Any] = {
        "stats": stats,
        "created": created,
        "rows": [
            *stats.corpora.items(),
            *([("together", stats.together)] if len(stats.corpora) > 1 else []),
        ],
        "splits": list(stats.together.splits),
        "fields": {
            field: {corpus: _shown(labels) for corpus, labels in corpora.items()}
            for field, corpora in stats.labels.items()
        },
        "field_names": FIELD_NAMES,
        "split_order": [*SPLITS, *(s for s in stats.together.splits if s not in SPLITS)],
        "unit_names": {name: words.name for name, words in load_units().units.items()},
        "captions": _CAPTIONS,
        "figures": {name: Markup(plot.svg) for name, plot in plots.items()},
        "total": total,
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    write_plots(plots, out_dir)
    write_text_aside(out_dir / "corpus.json", stats.model_dump_json(indent=1) + "\n")
    paths = out_dir / "corpus.html", out_dir / "corpus.md"
    for path in paths:
        write_text_aside(path, environment.get_template(f"{path.name}.j2").render(context))
    return paths


def _lasting(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else human_time(3600 * hours)


def _shown(labels: Mapping[str, Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
    """Return the labels of a table: all, or the most frequent, with the others as one row."""
    if len(labels) <= MAX_OPEN:
        return dict(labels)
    names = sorted(labels, key=lambda label: (-total(labels[label]), label))
    rest: dict[str, int] = {}
    for label in names[MAX_OPEN:]:
        for split, n in labels[label].items():
            rest[split] = rest.get(split, 0) + n
    kept = {label: labels[label] for label in names[:MAX_OPEN]}
    return {**kept, f"({len(names) - MAX_OPEN:,} other labels)": rest}
