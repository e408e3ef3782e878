"""The eighteen sets and the published rows, against the paper's own sums and averages."""

from __future__ import annotations

import pytest

from cache.errors import SchemaError
from eval.benchmarks import (
    RecognitionRow,
    averages,
    benchmark,
    benchmarks,
    check_protocol,
    published,
)
from extract.corpora.check import BENCHMARK_GROUPS, ITEMS_IN_TEXT
from extract.corpora.registry import corpus_ids, corpus_row


def test_the_counts_add_up_to_the_papers_total() -> None:
    assert len(benchmarks()) == 18
    assert sum(row.n for row in benchmarks().values()) == ITEMS_IN_TEXT
    grouped = {name for names in BENCHMARK_GROUPS.values() for name in names}
    assert grouped == set(benchmarks())


def test_every_set_is_one_that_a_corpus_row_marks_with_the_same_count_and_labels() -> None:
    for row in benchmarks().values():
        assert row.corpus in corpus_ids()
        corpus = corpus_row(row.corpus)
        assert corpus.expected.benchmarks[row.id] == row.n
        space = corpus.spaces[row.field]
        assert set(row.options) <= set(space.labels), row.id


@pytest.mark.parametrize("row", published().recognition, ids=lambda row: row.model)
def test_a_published_row_has_its_own_average(row: RecognitionRow) -> None:
    found = averages(row.scores)
    for name, printed in row.averages.items():
        if (row.model, name) == ("AffectGPT", "avg-18"):
            # Printed 54.11; the row itself gives 54.14.
            assert (printed, round(found[name], 2)) == (54.11, 54.14)
        else:
            assert found[name] == pytest.approx(printed, abs=0.0051)


def test_the_best_rows_are_those_that_the_text_names() -> None:
    last = published().recognition[-1]
    assert (last.model, last.averages) == (
        "Emotion-LLaMAv2 (Stage 2)",
        {"avg-9": 78.52, "avg-18": 66.63},
    )
    assert (published().emer[-1].clue, published().emer[-1].label) == (7.30, 7.14)
    (own,) = [row for row in published().mme_emotion if row.model.startswith("Emotion-LLaMAv2")]
    # CoT-S is the mean of Rec-S and Rea-S, rounded.
    assert own.cot == pytest.approx((own.rec + own.rea) / 2, abs=0.01)


def test_no_average_is_taken_over_some_of_its_sets() -> None:
    nine = {name: 0.5 for name, row in benchmarks().items() if row.unibench}
    assert averages(nine) == {"avg-9": 0.5}
    assert averages({k: v for k, v in nine.items() if k != "mosi"}) == {}


def test_unknown_names_are_answered_by_known_ones() -> None:
    with pytest.raises(SchemaError, match=r"'dfww'.*Did you mean 'dfew'"):
        benchmark("dfww")
    with pytest.raises(SchemaError, match=r"unknown protocol 'papr'.*released"):
        check_protocol("papr")
