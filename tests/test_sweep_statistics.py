"""A sweep's tests with several seeds, columns that differ in what is done, and headings that collide."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import pytest

from eval.predictions import Prediction
from eval.sweep.schema import SweepRow
from eval.sweep.state import read_result, write_result
from eval.sweep.tables.page import tiles
from eval.sweep.tables.results import read_table
from eval.sweep.tables.table import ALPHA, Change, SweepTable, TableRow
from eval.sweep.tables.texts import csv_text, latex, method, score_text, seeds_text
from tests.sweep_results import ACCURACY, F1, replies, reply, sweep_of, write_sweep

Done = dict[str, dict[int, Sequence[Prediction] | str]]


def right(n_right: int, n: int = 40) -> list[Prediction]:
    """Return n replies, the first of them right."""
    return [reply(i, "happy", "happy" if i < n_right else "sad") for i in range(n)]


def constant(which: int, n: int = 60) -> list[Prediction]:
    """Return replies that always say the label which is the `which`-th most common."""
    truths = [p.truth for p in replies(1.0, n)]
    label = Counter(truths).most_common()[which][0]
    return [reply(i, str(truth), label) for i, truth in enumerate(truths)]


def table_of(out: Path, done: Done, seeds: tuple[int, ...] = (1,), **more: object) -> SweepTable:
    given = {"rows": [SweepRow(name=name) for name in done], "baseline": next(iter(done)), **more}
    sweep = sweep_of(given.pop("rows"), seeds=seeds, **given)  # type: ignore[arg-type]
    return read_table(write_sweep(out, sweep, done), n_samples=300, n_swaps=3000)


def row_of(table: SweepTable, name: str) -> TableRow:
    return next(row for row in table.rows if row.name == name)


# ---------------------------------------------------------------------------- several seeds


def copies(out: Path, n: int, **more: object) -> Change:
    """Return the change of a row whose n seeds, and the baseline's, reply alike."""
    seeds = tuple(range(1, n + 1))
    done: Done = {
        "base": dict.fromkeys(seeds, constant(-1)),
        "row": dict.fromkeys(seeds, constant(0)),
    }
    return row_of(table_of(out, done, seeds, **more), "row").changes["acc"]


@pytest.mark.parametrize("score", [ACCURACY, F1.model_copy(update={"name": "acc"})])
def test_copies_of_a_seed_say_no_more_than_the_seed(tmp_path: Path, score: object) -> None:
    one = copies(tmp_path / "1", 1, scores=(score,))
    assert 0.05 < one.p_value < 0.95
    for n in (3, 5):
        many = copies(tmp_path / f"{n}", n, scores=(score,))
        assert many.p_value == one.p_value
        assert many.span.over == "clips"
        assert (many.span.low, many.span.high) == pytest.approx((one.span.low, one.span.high))
        assert many.difference == pytest.approx(one.difference)
        assert (many.n_seeds, many.n_items) == (n, one.n_items)
        assert (many.n_better, many.n_worse) == (one.n_better, one.n_worse)
        assert many.is_clear is one.is_clear is False


def test_a_mean_over_seeds_that_differ_is_tested_as_a_whole(tmp_path: Path) -> None:
    # In one seed the first 8 clips are better, in the other the next 8 worse: the mean is the same.
    flat, up = right(20), right(28)
    down = [*right(20)[:12], *(reply(i, "happy", "sad") for i in range(12, 40))]
    table = table_of(tmp_path, {"base": {1: flat, 2: flat}, "row": {1: up, 2: down}}, (1, 2))
    found = row_of(table, "row").changes["acc"]
    assert found.difference == pytest.approx(0)
    assert found.p_value == 1
    assert (found.n_better, found.n_worse) == (8, 8)


def test_seeds_whose_changes_are_equal_are_marked_by_the_test_on_clips(tmp_path: Path) -> None:
    base, row = right(20), right(32)
    table = table_of(tmp_path, {"base": {1: base, 2: base}, "row": {1: row, 2: row}}, (1, 2))
    found = row_of(table, "row")
    assert found.changes["acc"].is_clear
    assert any("the change is the same in all 2 seeds" in one for one in found.remarks)


@pytest.mark.parametrize("lost", ["row", "base"])
def test_one_common_seed_of_several_gives_no_mark(tmp_path: Path, lost: str) -> None:
    done: Done = {"base": {1: right(20)}, "row": {1: right(32)}}
    other = "base" if lost == "row" else "row"
    done[other][2] = right(25)
    done[lost][2] = "out of memory"
    table = table_of(tmp_path, done, (1, 2))
    row = row_of(table, "row")
    found = row.changes["acc"]
    assert found.p_holm < ALPHA
    assert found.span.over == "clips"
    assert not found.is_clear
    assert (
        "Accuracy: not marked: of several seeds, row and base have only one in common that is done"
        in row.remarks
    )
    assert r"$^*$" not in latex(table)
    # A sweep that asks for one seed marks the same change.
    single = table_of(tmp_path / "one", {"base": {1: right(20)}, "row": {1: right(32)}})
    assert row_of(single, "row").changes["acc"].is_clear
    assert "in all seeds together" in " ".join(method(table))
    assert "in all seeds together" not in " ".join(method(single))


def test_clips_that_a_seed_lacks_are_left_out_in_all(tmp_path: Path) -> None:
    base, row = right(20), right(29)
    done: Done = {"base": {1: base, 2: base}, "row": {1: row, 2: row[10:]}}
    table = table_of(tmp_path, done, (1, 2))
    found = row_of(table, "row").changes["acc"]
    assert found.n_items == 30
    assert found.difference == pytest.approx(9 / 30)
    assert any(
        "the change is on the 30 that all compared seeds have" in one
        for one in row_of(table, "row").remarks
    )


# ---------------------------------------------------------------------------- scores that a row lacks


def lacking(out: Path, status: str = "ok") -> SweepTable:
    """Return a table of two scores in which a row, done or failed, has the one and not the other."""
    given = [SweepRow(name="base"), SweepRow(name="row")]
    sweep = sweep_of(given, scores=(ACCURACY, F1), baseline="base")
    write_sweep(out, sweep, {"base": {42: right(20)}, "row": {42: right(10)}})
    found = read_result(out, "row@42")
    assert found is not None
    more = {"failed_step": "score", "reason": "no memory"} if status == "failed" else {}
    write_result(
        out,
        found.model_copy(
            update={"status": status, "scores": {"acc": 0.25},
                    "predictions": {"acc": found.predictions["acc"]}, **more}
        ),
    )  # fmt: skip
    return read_table(out, n_samples=50, n_swaps=50)


def lines_of(table: SweepTable) -> dict[tuple[str, str], dict[str, str]]:
    return {(one["row"], one["score"]): one for one in csv.DictReader(StringIO(csv_text(table)))}


def test_a_row_that_lacks_a_new_score_is_not_done(tmp_path: Path) -> None:
    table = lacking(tmp_path)
    row = row_of(table, "row")
    assert (row.n_done, row.n_open) == (0, 1)
    assert seeds_text(row) == "0 of 1"
    lines = lines_of(table)
    assert [(lines["row", name]["status"], lines["row", name]["n_seeds"]) for name in ("acc", "f1")] == [
        ("ok", "1"), ("open", "0")
    ]  # fmt: skip
    assert lines["base", "f1"]["status"] == "ok"
    assert tiles(table)[0][:3] == ("Rows", "1", "of 2 done")
    assert "1 of 2 trials are not done yet." in table.notes
    assert (score_text(row, "acc"), score_text(row, "f1")) == ("25.00", "open")


def test_a_failed_trial_shows_the_scores_that_it_has(tmp_path: Path) -> None:
    table = lacking(tmp_path, "failed")
    row = row_of(table, "row")
    assert (row.n_done, row.n_open, len(row.failures)) == (0, 0, 1)
    assert (score_text(row, "acc"), score_text(row, "f1")) == ("25.00", "failed")
    assert row.scores["acc"].by_seed == {"42": 0.25}
    assert [*row.changes] == ["acc"]
    lines = lines_of(table)
    assert (lines["row", "acc"]["status"], lines["row", "f1"]["status"]) == ("ok", "failed")
    assert lines["row", "acc"]["reason"] == ""
    assert lines["row", "f1"]["reason"] == "seed 42, score: no memory"
    assert tiles(table)[0][1:] == ("1", "of 2 done", "1 failed")


def test_a_baseline_that_lacks_one_score_is_said(tmp_path: Path) -> None:
    lacking(tmp_path)
    table = read_table(tmp_path, n_samples=50, n_swaps=50)
    assert not any("has no score" in note for note in table.notes)
    found = read_result(tmp_path, "base@42")
    assert found is not None
    write_result(tmp_path, found.model_copy(update={"scores": {"acc": 0.5}}))
    table = read_table(tmp_path, n_samples=50, n_swaps=50)
    assert any(
        "The baseline base has no score under Weighted F1, so no row is tested on it." in note
        for note in table.notes
    )


# ---------------------------------------------------------------------------- headings and cells


def headings_of(out: Path, columns: tuple[str, ...], cells: tuple[str, ...]) -> dict[str, str]:
    sweep = sweep_of([SweepRow(name="a", cells=cells)], columns=columns)
    table = read_table(write_sweep(out, sweep, {"a": {42: right(30)}}), n_samples=50, n_swaps=50)
    head, line = csv.reader(StringIO(csv_text(table)))
    assert len(head) == len(set(head)) == len(line)
    return dict(zip(head, line, strict=True))


def test_headings_of_the_csv_never_collide(tmp_path: Path) -> None:
    found = headings_of(tmp_path / "1", ("Score", "row", "Audio in"), ("high", "first", "Whisper"))
    assert (found["row"], found["score"]) == ("a", "acc")
    assert (found["cell:score"], found["cell:row"]) == ("high", "first")
    assert found["audio_in"] == "Whisper"
    found = headings_of(tmp_path / "2", ("Kind", "kind", "KIND"), ("x", "y", "z"))
    assert (found["kind"], found["cell:kind"], found["cell:kind_2"]) == ("x", "y", "z")


def test_a_cell_that_repeats_the_name_of_the_row_has_no_column(tmp_path: Path) -> None:
    found = headings_of(tmp_path, ("row",), ())
    assert not any(name.startswith("cell:") for name in found)
    assert [*found][:3] == ["row", "group", "stage"]


def test_a_row_of_the_latex_is_no_argument_of_the_line_above(tmp_path: Path) -> None:
    given = [
        SweepRow(name="a", cells=("[1pt]", "[x]")),
        SweepRow(name="b", cells=("*", "-")),
        SweepRow(name="c", cells=(" [2]", "-")),
    ]
    sweep = sweep_of(given, columns=("[Row]", "Image"))
    source = latex(read_table(write_sweep(tmp_path, sweep, {}), n_samples=50, n_swaps=50))
    starts = [line.lstrip()[:3] for line in source.splitlines() if line.endswith(r"\\")]
    assert starts == ["{[}", "{[}", "{*}", "{[}"]
