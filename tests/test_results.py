"""The benchmark report: its tables, its numbers against scikit-learn, its files."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import yaml
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from cache.errors import PredictionError, SchemaError
from eval.benchmarks import benchmarks
from eval.judging.results import (
    EmerScore,
    Judge,
    LexicalScore,
    MixedJudgesError,
    MmeScore,
    Repeated,
)
from eval.results.data import ResultsData, RunScores
from eval.results.latex import escape_latex, latex
from eval.results.page import browse_examples, run_scores, write_results
from eval.results.sets import (
    NONE,
    OTHER,
    SEVERAL,
    calibration_of,
    confusion,
    label_scores,
    mean_likelihoods,
)
from eval.results.tables import (
    Row,
    Table,
    emer_table,
    mme_table,
    protocol_of,
    recognition_tables,
)
from eval.scoring.result import Scored
from tests.results import item, made_up, scored_of

EVIL = '<script>alert("x")</script>'
FEW = ("mer2023", "mosi", "ov-merd", "dfew", "mafw-m")
PUBLISHED = yaml.safe_load(
    (Path(__file__).parents[1] / "eval" / "published.yaml").read_text(encoding="utf-8")
)
JUDGE = Judge(
    model="gpt-4o",
    versions=("gpt-4o-2024-11-20",),
    prompts=("clue-0123", "label-4567"),
    temperature=0.0,
)


class Page(HTMLParser):
    """Collects what a page loads, its tags, its tables and its visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._in_cell = False
        self._skips = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._skips += tag == "style"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True
        for name, value in attrs:
            assert not name.startswith("on"), name
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._skips -= tag == "style"
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._skips:
            return
        self.text += data
        if self._in_cell:
            self.rows[-1][-1] += data


def mean_of(value: float | None, n: int = 10) -> Repeated:
    return Repeated(
        mean=value, by_repeat=(value,), spread=None, standard_error=None, clip_error=0.05, n=n
    )


def emer(name: str = "ours", judge: Judge = JUDGE) -> EmerScore:
    return EmerScore(
        name=name, judge=judge, repeats=1, clue=mean_of(9.5), label=mean_of(None, 0), offered=12,
        reasons={"no number in the answer": 2},
    )  # fmt: skip


def mme(judge: Judge = JUDGE) -> MmeScore:
    return MmeScore(
        name="ours", judge=judge, repeats=1, rec=mean_of(0.99), rea=mean_of(0.5), cot=mean_of(0.745),
        alpha=0.5, steps=4.25, tokens=81.0, token_unit="words", offered=12, tasks={},
    )  # fmt: skip


def some_data() -> ResultsData:
    scored = made_up(fraction=0.15, tasks=FEW)
    items = [*scored["dfew"].items, item("odd & $x_1$", ["fear"], [EVIL], "off_list")]
    scored["dfew"] = scored_of("dfew", items, notes=[f"a note {EVIL}"])
    lexical = LexicalScore(
        name="ours", precision=0.5, recall=0.25, f1=1 / 3, lcs_f1=0.2, offered=4, scored=4
    )
    return ResultsData(
        title=f"Report {EVIL}",
        created="2026-03-01T12:00:00+00:00",
        runs=(run_scores(f"mine_1 & {EVIL}", scored, n_samples=50),),
        judged=(emer(), mme(), lexical),
        provenance={"seed": "0", EVIL: EVIL},
        notes=(f"Made up. {EVIL}",),
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results") / "new"
    paths = write_results(some_data(), folder)
    assert [path.name for path in paths[:2]] == ["benchmark.html", "benchmark.md"]
    assert all(path.is_file() for path in paths)
    return folder


def read(folder: Path, ending: str) -> str:
    return (folder / f"benchmark{ending}").read_text(encoding="utf-8")


def row_of(tables: tuple[Table, ...], model: str, column: str) -> tuple[Row, int]:
    table = next(table for table in tables if column in table.columns)
    return next(row for row in table.rows if row.model == model), table.columns.index(column)


def tables_of(**runs: Mapping[str, Scored]) -> tuple[Table, ...]:
    return recognition_tables(runs, {})


def test_the_page_loads_nothing_and_its_links_lead_somewhere(written: Path) -> None:
    html = read(written, ".html")
    page = Page(html)
    assert [r for r in page.references if not r.startswith("#")] == []
    assert {r[1:] for r in page.references} <= set(page.ids)
    assert {f"set-{task}" for task in FEW} <= set(page.ids)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "http" not in re.sub(r'http-equiv="Content-Security-Policy"', "", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))


def test_text_from_outside_is_escaped(written: Path) -> None:
    html, markdown = read(written, ".html"), read(written, ".md")
    assert "<script" not in html.lower()
    assert "<script" not in markdown.lower()
    # title (twice), rows of the tables, note, note of a set, provenance; the figures cut it short
    assert Page(html).text.count(EVIL) >= 7
    assert r"mine\_1 &amp; &lt;script&gt;" in markdown
    assert r"mine\_1 \& <script>" in read(written, ".tex")


def test_published_rows_are_those_of_the_paper_and_the_best_are_marked() -> None:
    tables = tables_of(mine=made_up(fraction=0.01))
    assert [len(table.columns) for table in tables] == [10, 10]
    for source in PUBLISHED["recognition"]:
        for task, score in source["scores"].items():
            row, at = row_of(tables, source["model"], benchmarks()[task].short)
            assert row.cells[at].text == f"{score:.2f}"
    # A tenth of the items is not ranked, so the marks are those of the paper.
    for task in benchmarks():
        scores = sorted({s["scores"][task] for s in PUBLISHED["recognition"]}, reverse=True)
        for source in PUBLISHED["recognition"]:
            row, at = row_of(tables, source["model"], benchmarks()[task].short)
            score = source["scores"][task]
            assert row.cells[at].rank == (scores.index(score) + 1 if score in scores[:2] else 0)
    twice = [row for row in tables[0].rows if row.cells[1].rank == 1]
    assert [row.model for row in twice] == [f"Emotion-LLaMAv2 (Stage {n})" for n in (1, 2)]


@pytest.mark.parametrize(
    ("offered", "rank", "mark"), [(2341, 1, ""), (2340, 0, "†"), (2342, 1, "†")]
)
def test_only_complete_sets_are_ranked(offered: int, rank: int, mark: str) -> None:
    items = [item(f"c/{i}", ["fear"], ["fear"]) for i in range(offered)]
    (table,) = tables_of(mine={"dfew": scored_of("dfew", items)})
    assert "DFEW" in table.columns  # the other block has no score of ours
    row, at = row_of((table,), "mine", "DFEW")
    assert (row.cells[at].text, row.cells[at].rank, row.cells[at].mark) == ("100.00", rank, mark)
    below = dict(row.below)
    assert below["scored"][at] == below["offered"][at] == f"{offered:,}"
    assert dict(table.foot)["published items"][at] == "2,341"
    assert any("another number of items" in note for note in table.notes) == bool(mark)


def test_an_average_needs_all_its_sets() -> None:
    scored = made_up(fraction=0.05)
    percent = {task: 100 * one.result.score for task, one in scored.items()}
    first, second = tables_of(mine=scored)
    nine = fmean(percent[task] for task in benchmarks() if benchmarks()[task].unibench)
    assert first.rows[-1].cells[-1].text == f"{nine:.2f}"
    assert second.rows[-1].cells[-1].text == f"{fmean(percent.values()):.2f}"
    del scored["iemocap"]
    for table, told in zip(tables_of(mine=scored), ("8 of 9 sets", "17 of 18 sets"), strict=True):
        assert table.rows[-1].cells[-1].text == "\N{EN DASH}"
        assert dict(table.rows[-1].below)["scored"][-1] == told


def test_a_published_average_that_its_row_does_not_give_is_told() -> None:
    _, second = tables_of(mine=made_up(fraction=0.01))
    assert second.notes[-1] == "AffectGPT: Avg-18 as printed, 54.11; its row gives 54.14."


def test_sentiment_by_its_sign_is_not_ranked_beside_the_published_rule() -> None:
    items = [item(f"c/{i}", ["positive"], ["positive"]) for i in range(benchmarks()["mosi"].n)]
    for protocol, rank in (("paper", 1), ("unibench", 0)):
        scored = scored_of("mosi", items, protocol=protocol)  # type: ignore[arg-type]
        row, at = row_of(tables_of(mine={"mosi": scored}), "mine", "MOSI")
        assert row.cells[at].rank == rank


def test_what_may_not_share_a_report_is_refused(tmp_path: Path) -> None:
    paper = made_up(fraction=0.01, tasks=["dfew"])
    other = {"mosi": scored_of("mosi", made_up(tasks=["mosi"])["mosi"].items, protocol="released")}
    assert protocol_of({"a": other}) == "released"

    def refused(*runs: RunScores, judged: tuple[EmerScore, ...] = ()) -> str:
        with pytest.raises((PredictionError, SchemaError, MixedJudgesError)) as caught:
            write_results(ResultsData("t", "c", runs, judged), tmp_path / "none")
        return str(caught.value)

    assert "several protocols" in refused(RunScores("a", paper), RunScores("b", other))
    assert "a, dfew" in refused(RunScores("a", {**paper, **other}))
    assert "two runs are called 'a'" in refused(RunScores("a", paper), RunScores("a", paper))
    assert "filed under 'mosi'" in refused(RunScores("a", {"mosi": paper["dfew"]}))
    assert "nothing to report" in refused()
    another = JUDGE.model_copy(update={"versions": ("gpt-4o-2024-05-13",)})
    assert "different judges" in refused(judged=(emer("a"), emer("b", another)))
    assert not (tmp_path / "none").exists()


def test_ratings_of_our_judge_are_never_ranked_among_published_ones() -> None:
    table = emer_table([emer()])
    (published, rows), (title, ours) = table.groups
    assert (published, title) == (
        "Published, judge gpt-4o",
        "This report, judge gpt-4o (gpt-4o-2024-11-20)",
    )
    marked = {(row.model, i): c.rank for row in rows for i, c in enumerate(row.cells) if c.rank}
    assert marked == {
        ("Emotion-LLaMAv2", 0): 1, ("Emotion-LLaMAv2", 1): 1, ("Emotion-LLaMA", 0): 2,
        ("Emotion-LLaMA", 1): 2,
    }  # fmt: skip
    assert [(cell.text, cell.rank) for cell in ours[0].cells] == [("9.50", 0), ("\N{EN DASH}", 0)]
    assert dict(ours[0].below) == {
        "s.e. over clips": ("±0.05", "±0.05"), "rated": ("10", "0"), "offered": ("12", "12"),
    }  # fmt: skip
    assert any("do not compare" in note for note in table.notes)
    assert any("no number in the answer: 2" in note for note in table.notes)


def test_mme_emotion_is_ranked_within_open_and_closed_models() -> None:
    table = mme_table([mme()])
    (_, opened), (_, closed), (_, ours) = table.groups
    assert (len(opened), len(closed)) == (14, 5)
    for rows, kind in ((opened, "open"), (closed, "closed")):
        sources = [row for row in PUBLISHED["mme-emotion"] if row["kind"] == kind]
        for at, name in ((3, "rec-s"), (4, "rea-s"), (5, "cot-s")):
            best = max(source[name] for source in sources)
            found = [row for row in rows if row.cells[at].rank == 1]
            assert [float(row.cells[at].text) for row in found] == [best]
    assert [cell.text for cell in ours[0].cells] == [
        "\N{EN DASH}",
        "4.2",
        "81.0",
        "99.00",
        "50.00",
        "74.50",
    ]
    assert not any(cell.rank for cell in ours[0].cells)
    assert "Our tokens: words." in table.notes


def test_label_scores_are_those_of_scikit_learn() -> None:
    for task in ("dfew", "mosi", "mafw-m"):
        one = made_up(0.4, fraction=0.3, tasks=[task])[task]
        chosen = [x for x, yes in zip(one.items, one.tally.scored, strict=True) if yes]
        found = label_scores(one)
        labels = [x.label for x in found]
        binary = MultiLabelBinarizer(classes=labels)
        true = binary.fit_transform([x.truth for x in chosen])
        predicted = binary.transform([x.predicted for x in chosen])
        expected = precision_recall_fscore_support(true, predicted, zero_division=0.0)
        assert np.allclose([x[1:5] for x in found], np.array(expected).T)
        assert [x.n_predicted for x in found] == predicted.sum(axis=0).tolist()


def test_the_confusion_matrix_is_that_of_scikit_learn_and_holds_every_item() -> None:
    one = made_up(0.5, fraction=0.2, tasks=["dfew"])["dfew"]
    found = confusion(one)
    assert found is not None
    assert found.columns == (*one.benchmark.options, NONE)
    expected = confusion_matrix(
        [x.truth[0] for x in one.items],
        [x.predicted[0] if x.predicted else NONE for x in one.items],
        labels=[*one.benchmark.options, NONE],
    )
    assert [list(row.counts) for row in found.rows] == expected[:-1].tolist()
    assert sum(row.n for row in found.rows) == len(one.items)


def test_left_out_truths_odd_truths_and_odd_replies_have_places_of_their_own() -> None:
    items = [
        item("a", ["happy"], ["happy"]),
        item("b", ["neutral"], ["happy"]),
        item("c", ["sad"], ["sad", "angry"]),
        item("d", ["sad"], ["bliss"]),
        item("e", ["excited"], []),
    ]
    found = confusion(scored_of("mer2023", items))
    assert found is not None
    assert found.columns[-2:] == (SEVERAL, NONE)
    assert found.columns[found.n_labels - 1] == "excited"
    rows = {row.label: row for row in found.rows}
    assert {label: row.is_scored for label, row in rows.items()} == {
        "happy": True, "sad": True, "excited": True, "neutral": False,
    }  # fmt: skip
    assert rows["sad"].counts[-2:] == (1, 1)
    assert rows["neutral"].counts[found.columns.index("happy")] == 1
    assert {x.label: x.n_true for x in label_scores(scored_of("mer2023", items))}["sad"] == 2


def test_of_too_many_labels_the_rare_ones_share_a_row() -> None:
    items = [item(f"{i}", [f"word {i // 2}"], ["angry"]) for i in range(120)]
    found = confusion(scored_of("dfew", items))
    assert found is not None
    assert found.n_labels == 40
    assert {row.label: row.n for row in found.rows}[OTHER] == 120 - 2 * 33


def test_there_is_no_confusion_matrix_of_several_labels() -> None:
    scored = made_up(fraction=0.05, tasks=["bold", "ov-merd"])
    assert [confusion(one) for one in scored.values()] == [None, None]
    assert label_scores(scored["ov-merd"]) == ()
    assert len(label_scores(scored["bold"])) == 26


def test_likelihoods_are_averaged_by_true_label_and_held_against_the_truth() -> None:
    one = made_up(fraction=0.1, tasks=["dfew"])["dfew"]
    found, calibrated = mean_likelihoods(one), calibration_of(one)
    assert found is not None
    assert calibrated is not None
    given = np.array([list(x.prediction.likelihoods.values()) for x in one.items])  # type: ignore[union-attr]
    truths = np.array([x.truth[0] for x in one.items])
    for label, n, means in found.rows:
        assert n == (truths == label).sum()
        assert np.allclose(means, given[truths == label].mean(axis=0))
    likeliest = np.array(one.benchmark.options)[given.argmax(axis=1)]
    assert calibrated.n == len(one.items)
    assert calibrated.accuracy == pytest.approx((likeliest == truths).mean())
    without = scored_of("dfew", [item("a", ["fear"], ["fear"])])
    assert (mean_likelihoods(without), calibration_of(without)) == (None, None)


def test_page_and_markdown_hold_the_same_rows(written: Path) -> None:
    page, markdown = Page(read(written, ".html")), read(written, ".md")
    run = some_data().runs[0]
    for task, one in run.scored.items():
        result = one.result
        counts = (
            f"{result.counts.scored:,} scored / {result.counts.offered:,} offered / "
            f"{benchmarks()[task].n:,} published"
        )
        for text in (f"{100 * result.score:.2f}", counts):
            assert text in page.text
            assert text in markdown
    rows = {row[0]: row[1:] for row in page.rows if row}
    for label in label_scores(run.scored["mafw-m"]):
        numbers = [f"{100 * x:.2f}" for x in (label.f1, label.precision, label.recall)]
        assert any(row[0] == label.label and row[2:5] == numbers for row in page.rows if row)
        assert f"| {label.label} | {' | '.join(numbers)} |" in markdown
    assert rows["Qwen2-Audio"] == ["7B", "3.0", "40.3", "34.1", "50.4", "42.3"]
    assert "| Qwen2-Audio | 7B | 3.0 | 40.3 | 34.1 | 50.4 | 42.3 |" in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        bars = [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]
        assert len(set(bars)) == 1, block


def test_markdown_links_to_its_figures(written: Path) -> None:
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read(written, ".md"))
    assert linked == [f"benchmark-{x}.png" for x in ("scores", "heat", "confusions", "labels")]
    for name in linked:
        assert (written / name).read_bytes().startswith(b"\x89PNG")
        drawn = (written / name).with_suffix(".svg").read_text(encoding="utf-8")
        assert "xmlns=" in drawn
        assert "var(--" not in drawn


def test_the_csv_files_hold_fractions_and_counts(written: Path) -> None:
    def rows(name: str) -> list[dict[str, str]]:
        with (written / name).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    run = some_data().runs[0]
    by_task = {row["task"]: row for row in rows("benchmark.csv")}
    assert set(by_task) == set(FEW)
    for task, one in run.scored.items():
        row, between = by_task[task], run.intervals[task]
        assert row["run"] == run.name
        assert float(row["score"]) == one.result.score
        assert [float(row[key]) for key in ("low", "high")] == [between.low, between.high]
        assert [int(row[key]) for key in ("offered", "scored", "published")] == [
            len(one.items), int(one.tally.scored.sum()), benchmarks()[task].n,
        ]  # fmt: skip
    parts = {(row["task"], row["part"]): float(row["score"]) for row in rows("benchmark-parts.csv")}
    assert parts["mer2023", "wheel1"] == run.scored["mer2023"].result.parts["wheel1"]
    labels = [row for row in rows("benchmark-labels.csv") if row["task"] == "mafw-m"]
    assert [row["label"] for row in labels] == [x.label for x in label_scores(run.scored["mafw-m"])]


def test_latex_has_a_cell_per_column_and_marks_the_best(written: Path) -> None:
    tables = tables_of(**{"a_b & 50 %": made_up(fraction=0.01)})
    source = latex(tables)
    for table, text in zip(tables, source.split(r"\begin{tabular}")[1:], strict=True):
        lines = [line for line in text.splitlines() if line.endswith(r"\\")]
        lines = [line for line in lines if r"\multicolumn" not in line]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(table.columns)}
        ranks = [cell.rank for row in table.rows for cell in row.cells]
        assert (text.count(r"\best{"), text.count(r"\second{")) == (ranks.count(1), ranks.count(2))
    assert source.count("{") == source.count("}")
    assert r"a\_b \& 50 \%" in source
    assert escape_latex("~^\\{}\n#$±†") == (
        r"\textasciitilde{}\textasciicircum{}\textbackslash{}\{\} \#\$$\pm$\textdagger{}"
    )
    assert r"\textdagger{}" in read(written, ".tex")


def test_examples_are_of_every_set_right_and_wrong_by_the_metric(written: Path) -> None:
    scored = made_up(0.5, fraction=0.1, tasks=FEW)
    items = [item("kin", ["happy"], ["joyful"]), item("far", ["happy"], ["sad"])]
    scored["mer2023"] = scored_of("mer2023", items)
    found = browse_examples([RunScores("a", scored)], 20)
    assert found is not None
    assert found.groups == tuple(benchmarks()[task].title for task in benchmarks() if task in FEW)
    outcomes = {card.id: card.reply.outcome for card in found.cards}
    assert (outcomes["kin"], outcomes["far"]) == ("right", "wrong")  # one group on both wheels
    assert sum(found.outcomes.values()) == sum(int(x.tally.scored.sum()) for x in scored.values())
    assert browse_examples([]) is None
    assert "The voice trembles" in Page(read(written, ".html")).text


def test_runs_stand_beside_one_another(tmp_path: Path) -> None:
    first = run_scores("first", made_up(0.8, fraction=0.05, tasks=["dfew"]), n_samples=0)
    second = run_scores("second", made_up(0.4, fraction=0.05, tasks=["dfew", "mosi"]), n_samples=50)
    assert first.intervals == {}
    html, *_ = write_results(ResultsData("t", "c", (first, second)), tmp_path)
    page = Page(html.read_text(encoding="utf-8"))
    assert page.tags.count("h4") == 3
    names = [row[0] for row in page.rows if row]
    assert names.index("first") < names.index("second")
    score = f"{100 * first.scored['dfew'].result.score:.2f}†"
    assert any(row[0] == "first" and score in row for row in page.rows if row)


def test_equal_data_give_equal_files(tmp_path: Path) -> None:
    data = replace(some_data(), judged=())
    data = replace(data, runs=(RunScores("a", {"mosi": data.runs[0].scored["mosi"]}),))
    texts = []
    for name in ("a", "b"):
        paths = write_results(data, tmp_path / name)
        texts.append([path.read_bytes() for path in paths])
    assert texts[0] == texts[1]


def test_intervals_hold_the_scores_and_slices_their_items() -> None:
    run = run_scores("a", made_up(fraction=0.05), n_samples=200)
    assert set(run.intervals) == {*benchmarks(), "avg-9", "avg-18"}
    for task, one in run.scored.items():
        assert run.intervals[task].low <= one.result.score <= run.intervals[task].high
        for parts in run.slices[task].values():
            assert sum(part.n_offered for part in parts) == len(one.items)


@pytest.mark.slow
def test_eighteen_sets_are_written_fast_and_small(tmp_path: Path) -> None:
    scored = made_up()
    assert sum(len(one.items) for one in scored.values()) == 36_133
    start = time.process_time()  # of this process: other work on the machine does not count
    paths = write_results(ResultsData("t", "c", (run_scores("a", scored),)), tmp_path)
    assert time.process_time() - start < 30
    assert sum(path.stat().st_size for path in paths) < 15_000_000
    assert paths[0].stat().st_size < 1_000_000  # far below: text and two figures
