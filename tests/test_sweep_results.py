"""The table of a sweep: means, intervals and tests against hand calculations and other libraries; layouts."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import f1_score, recall_score

from cache.errors import PredictionError
from eval.predictions import Prediction, write_predictions
from eval.sweep.schema import Axis, ScoreColumn, SweepRow
from eval.sweep.tables.page import tiles
from eval.sweep.tables.plots import draw_table
from eval.sweep.tables.results import FILES, read_table, write_results
from eval.sweep.tables.statistics import read_sides, score_of, side_of, span_over_seeds
from eval.sweep.tables.table import ALPHA, SweepTable, TableRow
from eval.sweep.tables.terminal import terminal_table
from eval.sweep.tables.texts import csv_text, latex
from tests.sweep_results import ACCURACY, F1, LABELS, replies, reply, sweep_of, write_sweep


def right(n_right: int, n: int = 10, start: int = 0) -> list[Prediction]:
    """Return n replies of which n_right are right, from `start` on and around."""
    hits = {(start + i) % n for i in range(n_right)}
    return [reply(i, "happy", "happy" if i in hits else "sad") for i in range(n)]


def rows(*names: str, **more: object) -> list[SweepRow]:
    return [SweepRow.model_validate({"name": name, **more}) for name in names]


def table_of(
    out: Path,
    done: dict[str, dict[int, Sequence[Prediction] | str]],
    *,
    seeds: tuple[int, ...] = (1,),
    n_samples: int = 200,
    n_swaps: int = 2000,
    **more: object,
) -> SweepTable:
    given = {"rows": rows(*done), "seeds": seeds, "baseline": next(iter(done)), **more}
    sweep = sweep_of(given.pop("rows"), **given)  # type: ignore[arg-type]
    return read_table(write_sweep(out, sweep, done), n_samples=n_samples, n_swaps=n_swaps)


def row_of(table: SweepTable, name: str) -> TableRow:
    return next(row for row in table.rows if row.name == name)


# ---------------------------------------------------------------------------- scores


def test_several_seeds_have_students_interval(tmp_path: Path) -> None:
    table = table_of(tmp_path, {"a": {1: right(5), 2: right(6), 3: right(7)}}, seeds=(1, 2, 3))
    score = table.rows[0].scores["acc"]
    assert score.mean == pytest.approx(0.6)
    assert score.by_seed == {"1": 0.5, "2": 0.6, "3": 0.7}
    assert score.span is not None
    assert score.span.over == "seeds"
    # Standard deviation 0.1, Student's t with 2 degrees of freedom 4.302653.
    assert score.span.high - 0.6 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-5)
    assert score.span.low == pytest.approx(0.6 - 4.302653 * 0.1 / math.sqrt(3), rel=1e-5)


def test_an_interval_over_seeds_stays_between_the_bounds() -> None:
    span = span_over_seeds([0.2, 0.9])
    assert span is not None
    assert (span.low, span.high) == (0.0, 1.0)
    assert span_over_seeds([0.5, 0.5, 0.5]) is None


def test_one_seed_has_an_interval_over_clips(tmp_path: Path) -> None:
    table = table_of(tmp_path, {"a": {1: right(280, 400)}}, n_samples=2000)
    score = table.rows[0].scores["acc"]
    assert score.span is not None
    assert score.span.over == "clips"
    assert score.n_items == 400
    half = 1.96 * math.sqrt(0.7 * 0.3 / 400)  # of the binomial distribution
    assert score.span.low == pytest.approx(0.7 - half, abs=0.006)
    assert score.span.high == pytest.approx(0.7 + half, abs=0.006)


def test_a_missing_interval_is_said(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        {"all": {1: right(10), 2: "crashed"}, "same": {1: right(4), 2: right(4)}},
        seeds=(1, 2),
    )
    assert row_of(table, "all").scores["acc"].span is None
    assert "no sample of its clips has another score" in row_of(table, "all").remarks[0]
    assert row_of(table, "same").scores["acc"].span is None
    assert "all seeds have one score" in row_of(table, "same").remarks[0]


@pytest.mark.parametrize("metric", ["accuracy", "weighted_f1", "macro_f1", "uar"])
def test_single_labels_are_scored_as_scikit_learn_does(metric: str) -> None:
    found = replies(0.6, 80)
    side = side_of(found, F1.model_copy(update={"metric": metric}))
    truths, said = [p.truth for p in found], [p.label for p in found]
    expected = {
        "accuracy": np.mean([t == s for t, s in zip(truths, said, strict=True)]),
        "weighted_f1": f1_score(truths, said, average="weighted"),
        "macro_f1": f1_score(truths, said, average="macro"),
        "uar": recall_score(truths, said, average="macro"),
    }[metric]
    assert side.tally.total == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["accuracy", "weighted_f1", "macro_f1", "uar"])
def test_several_labels_are_scored_as_scikit_learn_does(metric: str) -> None:
    rng = np.random.default_rng(3)
    true = rng.random((60, 4)) < 0.4
    true[~true.any(axis=1), 0] = True
    said = np.where(rng.random((60, 4)) < 0.75, true, ~true)
    said[~said.any(axis=1), 1] = True
    found = [
        Prediction(
            uid=f"demo/{i}",
            task="multi-label",
            reply="",
            label=None,
            labels=tuple(np.array(LABELS)[said[i]]),
            parse="exact",
            truth=None,
            truths=tuple(np.array(LABELS)[true[i]]),
            run="run",
            spec_ids={},
        )
        for i in range(60)
    ]
    column = ScoreColumn.model_validate(
        {"name": "m", "heading": "M", "kind": "split", "task": "multi-label", "metric": metric}
    )
    expected = {
        "accuracy": (true == said).all(axis=1).mean(),
        "weighted_f1": f1_score(true, said, average="weighted"),
        "macro_f1": f1_score(true, said, average="macro"),
        "uar": recall_score(true, said, average="macro"),
    }[metric]
    assert side_of(found, column).tally.total == pytest.approx(expected)


def test_replies_without_any_truth_have_no_score() -> None:
    found = [reply(i, "happy", "sad").model_copy(update={"truth": None}) for i in range(3)]
    with pytest.raises(
        PredictionError, match="none of 3 replies for 'test' has a truth that counts"
    ):
        score_of({"test": side_of(found, ACCURACY)})
    with pytest.raises(PredictionError, match="none of 3 replies is to the task 'sentiment'"):
        side_of(found, ACCURACY.model_copy(update={"task": "sentiment"}))


def test_a_benchmark_is_the_mean_over_its_sets(tmp_path: Path) -> None:
    def of(task: str, n_right: int, n: int) -> list[Prediction]:
        return [
            reply(i, "happy", "happy" if i < n_right else "sad",
                  benchmark=task, uid=f"{task}/{i}", reply="<answer>happy</answer>" if i < n_right else
                  "<answer>sad</answer>")
            for i in range(n)
        ]  # fmt: skip

    write_predictions(tmp_path / "predictions.jsonl", [*of("mafw", 6, 8), *of("dfew", 3, 12)])
    column = ScoreColumn(name="b", heading="B", kind="benchmark", sets=("mafw", "dfew"))
    sides = read_sides(tmp_path, column)
    assert [sides[name].tally.total for name in ("mafw", "dfew")] == [0.75, 0.25]
    assert score_of(sides) == 0.5
    with pytest.raises(ValueError, match="no replies for meld, over which 'b' is averaged"):
        read_sides(tmp_path, column.model_copy(update={"sets": ("mafw", "meld")}))


# ---------------------------------------------------------------------------- tests


def test_a_row_is_tested_on_the_same_clips(tmp_path: Path) -> None:
    # Of 40 clips the row has 9 right that the baseline has wrong, and the others alike: by chance
    # alone, all 9 fall to one side in 2 of 2 ** 9 cases.
    table = table_of(
        tmp_path, {"base": {1: right(20, 40)}, "row": {1: right(29, 40)}}, n_swaps=20_000
    )
    change = row_of(table, "row").changes["acc"]
    assert change.difference == pytest.approx(9 / 40)
    assert change.p_value == pytest.approx(2 / 2**9, abs=0.0015)
    assert (change.n_items, change.n_better, change.n_worse) == (40, 9, 0)
    assert change.span.over == "clips"
    assert change.is_clear
    assert not row_of(table, "base").changes


def test_p_values_are_corrected_for_all_rows(tmp_path: Path) -> None:
    done = {"base": {1: right(20, 40)}} | {f"r{k}": {1: right(20 + k, 40)} for k in (0, 6, 9)}
    table = table_of(tmp_path, done, n_swaps=20_000)
    assert table.n_tests == 3
    small, middle, large = (row_of(table, f"r{k}").changes["acc"] for k in (9, 6, 0))
    assert small.p_holm == pytest.approx(3 * small.p_value)
    assert middle.p_holm == pytest.approx(2 * middle.p_value)
    assert middle.p_value == pytest.approx(2 / 2**6, abs=0.004)
    assert large.p_holm == large.p_value == 1.0
    assert (small.is_clear, middle.is_clear, large.is_clear) == (True, False, False)


def test_seeds_are_paired_and_only_common_ones(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        {
            "base": {1: right(10, 40), 2: right(20, 40), 3: right(39, 40)},
            "row": {1: right(15, 40), 2: right(23, 40), 3: "out of memory"},
        },
        seeds=(1, 2, 3),
    )
    row = row_of(table, "row")
    change = row.changes["acc"]
    assert change.n_seeds == 2
    assert change.difference == pytest.approx((5 / 40 + 3 / 40) / 2)
    # Differences 0.125 and 0.075: standard error 0.025, t with one degree of freedom 12.7062.
    assert change.span.over == "seeds"
    assert change.span.high == pytest.approx(0.1 + 12.7062 * 0.025, rel=1e-4)
    assert row.n_done == 2
    assert [failure.seed for failure in row.failures] == [3]


def test_what_seeds_do_not_agree_on_is_not_marked(tmp_path: Path) -> None:
    table = table_of(
        tmp_path,
        {
            "base": {1: right(50, 100), 2: right(50, 100)},
            "row": {1: right(95, 100), 2: right(51, 100)},
        },
        seeds=(1, 2),
    )
    change = row_of(table, "row").changes["acc"]
    assert change.p_holm < ALPHA
    assert change.span.low < 0 < change.span.high
    assert not change.is_clear
    assert any("not marked" in note for note in table.notes)


def test_clips_that_one_row_lacks_are_not_compared(tmp_path: Path) -> None:
    table = table_of(tmp_path, {"base": {1: right(20, 40)}, "row": {1: right(20, 40)[10:]}})
    change = row_of(table, "row").changes["acc"]
    assert change.n_items == 30
    assert change.difference == 0
    row = row_of(table, "row")
    assert row.scores["acc"].mean == pytest.approx(10 / 30)
    assert row.remarks == (
        "Accuracy: scored on 30 clips and base on 40; the change is on the 30 that both have",
    )


def test_truths_that_differ_are_a_remark(tmp_path: Path) -> None:
    other = [reply(i, "sad", "sad") for i in range(10)]
    table = table_of(tmp_path, {"base": {1: right(5)}, "row": {1: other}})
    row = row_of(table, "row")
    assert not row.changes
    assert any("disagree about the truth of 10 of 10" in remark for remark in row.remarks)


def test_replies_that_were_changed_give_neither_interval_nor_test(tmp_path: Path) -> None:
    done: dict[str, dict[int, Sequence[Prediction] | str]] = {
        "base": {1: right(5)},
        "row": {1: right(6)},
    }
    table_of(tmp_path, done)
    write_predictions(tmp_path / "trials/row@1/predictions.jsonl", right(9))
    row = row_of(read_table(tmp_path, n_samples=50, n_swaps=50), "row")
    assert row.scores["acc"].mean == 0.6
    assert row.scores["acc"].span is None
    assert not row.changes
    assert "its replies now give 90.00, its result says 60.00" in row.remarks[0]
    (tmp_path / "trials/row@1/predictions.jsonl").unlink()
    row = row_of(read_table(tmp_path, n_samples=50, n_swaps=50), "row")
    assert "its replies cannot be read" in row.remarks[0]


def test_a_baseline_without_a_score_is_said(tmp_path: Path) -> None:
    table = table_of(tmp_path, {"base": {1: "loss is nan"}, "row": {1: right(5)}})
    assert table.n_tests == 0
    assert any("The baseline base has no score" in note for note in table.notes)


# ---------------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with two scores, groups, published figures, several seeds, a failed and an open row."""
    out = tmp_path_factory.mktemp("sweep")
    given = [
        SweepRow(name="base", cells=("Whisper", "-"), group="One", published={"acc": 60.5, "f1": 58.25}),
        SweepRow(name="better", cells=("HuBERT & <b>x</b>", "EVA_100%"), group="Two",
                 published={"acc": 61.25}, set={"model.fusion.kind": "conv"}),
        SweepRow(name="broken", cells=("Whisper", "CLIP"), group="Two", published={"acc": 63.0}),
        SweepRow(name="open", cells=("HuBERT", "CLIP"), group="Two"),
    ]  # fmt: skip
    sweep = sweep_of(
        given, columns=("Audio", "Image"), scores=(ACCURACY, F1), seeds=(1, 2), baseline="base",
        about="See `--explain` and `<i>`.", source="A paper, Table 1",
        title="Encoders <script>alert(1)</script>",
    )  # fmt: skip
    done: dict[str, dict[int, Sequence[Prediction] | str]] = {
        "base": {1: replies(0.4, seed=1), 2: replies(0.41, seed=2)},
        "better": {1: replies(0.8, seed=3), 2: replies(0.8, seed=4)},
        "broken": {1: "loss <nan> at step 12", 2: replies(0.5, seed=5)},
    }
    write_sweep(out, sweep, done)
    write_results(out, n_samples=100, n_swaps=1000)
    return out


@pytest.fixture(scope="module")
def table(folder: Path) -> SweepTable:
    return read_table(folder, n_samples=100, n_swaps=1000)


def test_equal_trials_give_equal_files(folder: Path) -> None:
    plots = ("table-rows.svg", "table-rows.png")
    before = {name: (folder / name).read_bytes() for name in (*FILES, *plots)}
    written = write_results(folder, n_samples=100, n_swaps=1000)
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert [path.name for path in written.files] == [*FILES]
    assert not list(folder.glob("*.partial"))


def test_the_json_holds_the_table(folder: Path, table: SweepTable) -> None:
    assert SweepTable.model_validate(json.loads((folder / "table.json").read_text())) == table


def test_the_csv_has_a_line_per_row_and_score(table: SweepTable) -> None:
    lines = list(csv.DictReader(StringIO(csv_text(table))))
    assert [(line["row"], line["score"]) for line in lines] == [
        (name, score) for name in ("base", "better", "broken", "open") for score in ("acc", "f1")
    ]
    better = row_of(table, "better")
    assert float(lines[2]["mean"]) == better.scores["acc"].mean
    assert float(lines[2]["p_holm"]) == better.changes["acc"].p_holm
    assert lines[2]["published_percent"] == "61.25"
    assert lines[2]["audio"] == "HuBERT & <b>x</b>"
    assert (lines[4]["status"], lines[6]["status"]) == ("failed", "open")
    assert lines[4]["reason"] == "seed 1, train: loss <nan> at step 12"
    assert lines[6]["mean"] == ""


def test_the_latex_has_equally_many_cells_in_each_line(table: SweepTable) -> None:
    source = latex(table)
    lines = [x for x in source.splitlines() if x.endswith(r"\\") and "multicolumn" not in x]
    assert len(lines) == 1 + len(table.rows)
    # Two cells, then score, change and published of the one and of the other.
    assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {7}
    assert r"HuBERT \& <b>x</b> & EVA\_100\% & \best{" in source
    assert r"\cmidrule(lr){3-5} \cmidrule(lr){6-8}" in source
    assert source.count("{") - source.count(r"\{") == source.count("}") - source.count(r"\}")


def test_markdown_tables_are_tables_and_hold_no_markup(folder: Path) -> None:
    text = (folder / "table.md").read_text()
    assert "<script>" not in text
    assert "<b>" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {18}
    assert "![Scores of each row, in percent." in text
    assert "- broken, seed 1: train: loss &lt;nan&gt; at step 12" in text


def test_the_page_escapes_and_says_what_failed(folder: Path) -> None:
    page = (folder / "table.html").read_text()
    assert "<script" not in page
    assert "<b>x</b>" not in page
    assert "loss &lt;nan&gt; at step 12" in page
    assert "See <code>--explain</code> and <code>&lt;i&gt;</code>." in page
    assert 'href="trials/broken%401/log.txt"' in page
    assert "http" not in re.sub(r"<pre>.*</pre>", "", page, flags=re.DOTALL).replace(
        "http-equiv", ""
    )


def test_published_figures_have_their_own_change(table: SweepTable) -> None:
    assert table.published_change(row_of(table, "better"), "acc") == 0.75
    assert table.published_change(row_of(table, "better"), "f1") is None
    assert table.published_change(row_of(table, "base"), "acc") is None


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_terminal_shows_what_fits(table: SweepTable, width: int) -> None:
    console = Console(width=width, file=StringIO(), color_system=None)
    console.print(terminal_table(table, width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    rule = next(i for i, line in enumerate(text.splitlines()) if line.startswith("─"))
    body = text.splitlines()[rule + 1 : rule + 7]
    assert [line.split()[0] for line in body] == [
        "One",
        "Whisper",
        "Two",
        "HuBERT",
        "Whisper",
        "HuBERT",
    ]
    assert "broken, seed 1: train failed: loss <nan> at step 12" in " ".join(text.split())
    assert ("95 %" in text.splitlines()[rule - 1]) == (width >= 100)
    assert "60.50" in text or width == 60


def test_demo_numbers_say_what_they_are(tmp_path: Path) -> None:
    sweep = sweep_of(rows("a", published={"acc": 66.05}))
    written = write_results(
        write_sweep(tmp_path, sweep, {"a": {42: right(5)}}, scale="demo"), n_samples=50, n_swaps=50
    )
    for path in written.files[:3]:
        assert "say nothing about emotions" in path.read_text()
        assert "full-size models and do not compare" in path.read_text()
    assert "Hollow: published, by full-size models" in (tmp_path / "table.md").read_text()


# ---------------------------------------------------------------------------- plots


def test_a_plot_takes_its_axis_from_the_presets(tmp_path: Path) -> None:
    given = [
        SweepRow(name=f"n{n}-{kind}", set={"views.audio.n_tokens": n, "model.fusion.n_tokens": 64,
                                           "model.fusion.kind": kind})
        for n in (1, 16, 64)
        for kind in ("conv", "attention")
    ]  # fmt: skip
    axis = Axis(
        key="views.audio.n_tokens", heading="Audio tokens", log=True, by="model.fusion.kind"
    )
    sweep = sweep_of(given, plot=axis)
    done = {row.name: {42: right(3 + i)} for i, row in enumerate(given)}
    table = read_table(write_sweep(tmp_path, sweep, done), n_samples=50, n_swaps=50)
    assert [(row.at, row.line) for row in table.rows[:2]] == [(1, "conv"), (1, "attention")]
    plots = draw_table(table)
    assert [*plots] == ["curve"]
    svg = plots["curve"].svg
    for text in ("Audio tokens", "kind conv", "kind attention", ">16<", ">64<"):
        assert text in svg
    assert "var(--accent)" in svg
    assert plots["curve"].png.startswith(b"\x89PNG")


def test_rows_of_the_plot_can_be_told_apart(tmp_path: Path, table: SweepTable) -> None:
    assert ">Whisper + CLIP<" in draw_table(table)["rows"].svg
    given = [SweepRow(name="a", cells=("EVA", "-")), SweepRow(name="b", cells=("-", "EVA"))]
    sweep = sweep_of(given, columns=("Image", "Video"))
    done = {"a": {42: right(4)}, "b": {42: right(5)}}
    other = read_table(write_sweep(tmp_path, sweep, done), n_samples=50, n_swaps=50)
    svg = draw_table(other)["rows"].svg
    assert ">EVA (image)<" in svg
    assert ">EVA (video)<" in svg


def test_first_cells_that_differ_name_the_rows_of_the_plot(tmp_path: Path) -> None:
    given = [SweepRow(name="a", cells=("Frame", "first")), SweepRow(name="b", cells=("BOS", "2"))]
    sweep = sweep_of(given, columns=("Choice", "Value"))
    done = {"a": {42: right(4)}, "b": {42: right(5)}}
    found = read_table(write_sweep(tmp_path, sweep, done), n_samples=50, n_swaps=50)
    svg = draw_table(found)["rows"].svg
    assert ">Frame<" in svg
    assert ">BOS<" in svg
    assert "first" not in svg


def test_values_that_are_no_numbers_stand_beside_one_another(tmp_path: Path) -> None:
    given = [SweepRow(name=kind, set={"model.fusion.kind": kind}) for kind in ("conv", "none")]
    sweep = sweep_of(given, plot=Axis(key="model.fusion.kind", heading="Pre-fusion"))
    done = {row.name: {42: right(3 + i)} for i, row in enumerate(given)}
    table = read_table(write_sweep(tmp_path, sweep, done), n_samples=50, n_swaps=50)
    svg = draw_table(table)["curve"].svg
    assert ">conv<" in svg
    assert ">none<" in svg


def test_a_zero_on_a_logarithmic_axis_stands_beside_the_others(tmp_path: Path) -> None:
    given = [SweepRow(name=f"n{n}", set={"stages.0.optim.warmup_steps": n}) for n in (0, 10, 1000)]
    axis = Axis(key="stages.0.optim.warmup_steps", heading="Warm-up", log=True)
    sweep = sweep_of(given, plot=axis)
    done = {row.name: {42: right(3 + i)} for i, row in enumerate(given)}
    table = read_table(write_sweep(tmp_path, sweep, done), n_samples=50, n_swaps=50)
    svg = draw_table(table)["curve"].svg
    zero, ten, thousand = (
        float(re.findall(rf'<text [^>]*x="([\d.]+)"[^>]*>{n}<', svg)[0]) for n in (0, 10, 1000)
    )
    assert 0 < ten - zero == pytest.approx(thousand - ten)


def test_the_first_numbers_of_the_page(table: SweepTable) -> None:
    first, accuracy, f1, beyond = tiles(table)
    assert first == ("Rows", "2", "of 4 done", "1 failed, 8 trials")
    assert accuracy[0] == "Best, Accuracy"
    assert accuracy[3] == f1[3] == "better"
    # The one row with several seeds that differs from the baseline beyond chance, on both scores.
    clear = sum(c.is_clear for row in table.rows for c in row.changes.values())
    assert beyond == ("Beyond chance, against base", str(clear), "of 4", f"{clear} better, 0 worse")


def test_a_sweep_that_did_nothing_yet_has_a_page(tmp_path: Path) -> None:
    sweep = sweep_of(rows("a", "b"), baseline="a")
    written = write_results(write_sweep(tmp_path, sweep, {}))
    assert written.table.notes == (
        "2 of 2 trials are not done yet.",
        "The baseline a has no score, so no row is tested against it.",
    )
    assert not list(tmp_path.glob("*.svg"))
    assert "0 <small>of 2 done</small>" in (tmp_path / "table.html").read_text()
