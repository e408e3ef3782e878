"""The pure parts of benchmarks/variants.py: what is compared, on what, and how it is summed up."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import variants as module
from benchmarks.variants import (
    METRICS,
    Result,
    Row,
    Variant,
    draw,
    harder,
    page,
    summarize,
    summarize_all,
    table,
    variants,
)
from cache.clip import Clip, Record
from cache.manifest import Manifest
from extract.corpora.demo import EMOTIONS, describe, plan_demo
from tests.conftest import key_of
from tests.training import described, header_of
from train.config import FusionKind
from train.presets import preset

CURRICULUM = "curriculum: perception, then cognition"


def corpus(n_clips: int = 72) -> Manifest:
    return Manifest(
        header=header_of(tuple(EMOTIONS)),
        records=tuple(
            Record(
                uid=f"demo/{row.index}",
                media=row.file,
                clip=Clip(sha256=key_of(row.file), n_bytes=1),
                split=row.split,
                emotion=row.label,
                descriptions=described(describe(row.label)),
            )
            for row in plan_demo(n_clips, seed=0)
        ),
    )


def result(variant: str, seed: int, accuracy: float) -> Result:
    return Result(
        variant=variant, seed=seed, accuracy=accuracy, weighted_f1=accuracy / 2,
        think_accuracy=accuracy / 4, final_loss=accuracy + 1, fusion_parameters=1234, n_steps=80,
        seconds=10.0 * seed,
    )  # fmt: skip


def made_up() -> list[Row]:
    """Every variant has 0.5, 0.6, 0.7: mean 0.6, and the root of (0.01 + 0 + 0.01) / 2 is 0.1."""
    seeds = zip((1, 2, 3), (0.5, 0.6, 0.7), strict=True)
    return summarize_all(
        variants(), [result(v.name, seed, x) for seed, x in seeds for v in variants()]
    )


def test_both_questions_of_the_paper_are_asked() -> None:
    rows = variants()
    orders = [row.preset for row in rows if row.group == "Order of learning"]
    assert orders == ["demo", "demo-single-joint", "demo-perception-only"]
    kinds = [(row.preset, row.fusion) for row in rows if row.group == "Pre-fusion"]
    assert kinds == [("demo", kind) for kind in get_args(FusionKind)]
    assert len({row.name for row in rows}) == len(rows) == 9


@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_settings_differ_from_the_preset_in_what_is_compared(variant: Variant) -> None:
    found, usual = variant.settings(seed=7, steps=30), preset(variant.preset)
    assert found.seed == 7
    assert found.model.fusion == usual.model.fusion.model_copy(update={"kind": variant.fusion})
    n_steps = {"demo": [30, 30], "demo-single-joint": [60], "demo-perception-only": [30]}
    assert [stage.n_steps for stage in found.stages] == n_steps[variant.preset]
    back = {
        "seed": usual.seed,
        "model": usual.model,
        "stages": tuple(
            stage.model_copy(update={"n_steps": known.n_steps})
            for stage, known in zip(found.stages, usual.stages, strict=True)
        ),
    }
    assert found.model_copy(update=back) == usual


def test_a_run_is_known_by_its_folder_and_shared_by_equal_variants() -> None:
    places = [
        v.folder(Path("out"), seed, steps)
        for v in variants()
        for seed in (1, 2)
        for steps in (5, 6)
    ]
    # Of nine rows, the curriculum and conv-attention are one training.
    assert len(set(places)) == 8 * 2 * 2
    (first, *_, last) = variants()
    assert (first.name, last.name) == (CURRICULUM, "conv-attention")
    assert first.folder(Path("out"), 1, 5) == last.folder(Path("out"), 1, 5)
    assert first.settings(1, 5) == last.settings(1, 5)


def test_each_training_runs_once_and_gives_every_row_its_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    class Future:
        def __init__(self, found: Result) -> None:
            self.result = lambda: found

    class Pool:
        def __init__(self, *_: object) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, _: object, variant: Variant, seed: int, *rest: object) -> Future:
            ran.append(variant.folder(tmp_path, seed, 5))
            return Future(result(variant.name, seed, 0.1 * seed))

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(module, "as_completed", list)
    found = module.run_all(variants(), (3, 1), 5, tmp_path, 2)
    assert len(ran) == len(set(ran)) == 16
    assert [r.variant for r in found[:9]] == [v.name for v in variants()]
    assert [r.seed for r in found] == [3] * 9 + [1] * 9


def test_a_harder_corpus_is_small_balanced_and_wrong_in_training_alone() -> None:
    full = corpus()
    found = harder(full, n_train=30, wrong=0.4)
    truth = {r.uid: r for r in full.records}
    assert found.select("test") == full.select("test")
    trained = found.select("train")
    assert Counter(truth[r.uid].emotion for r in trained) == dict.fromkeys(EMOTIONS, 5)
    wrong = [r for r in trained if r.emotion != truth[r.uid].emotion]
    assert Counter(truth[r.uid].emotion for r in wrong) == dict.fromkeys(EMOTIONS, 2)
    assert all(r.emotion and r.described("multimodal") == (describe(r.emotion),) for r in trained)
    backwards = full.model_copy(update={"records": full.records[::-1]})
    again = {r.uid: r for r in harder(backwards, 30, 0.4).records}
    assert again == {r.uid: r for r in found.records}
    assert harder(full, n_train=999, wrong=0).records == full.records


def test_mean_and_standard_deviation() -> None:
    # Mean of 2, 4, 9 is 5; (9 + 1 + 16) / 2 = 13.
    found = summarize([2, 4, 9])
    assert (found.mean, found.values) == (5, (2, 4, 9))
    assert found.std == pytest.approx(13**0.5)
    assert summarize([0.25]).std is None


def test_the_table_has_percent_and_says_who_never_trained_on_a_task() -> None:
    rows = made_up()
    assert [row.trained_on_think for row in rows] == [True, True, False, *[True] * 6]
    assert all(set(row.metrics) == set(METRICS) for row in rows)
    lines = table(rows).splitlines()
    numbers = "60.00 ± 10.00 | 30.00 ± 5.00 | 15.00 ± 2.50 | 1.600 ± 0.100 | 80 | 1,234 | 20 ± 10 |"
    assert lines[3] == f"| {CURRICULUM} | {numbers}"
    assert "| (15.00 ± 2.50) |" in lines[5]
    assert [line for line in lines if "**" in line] == [
        "| **Order of learning** | | | | | | | |",
        "| **Pre-fusion** | | | | | | | |",
    ]
    assert {len(re.findall(r"\|", line)) for line in lines} == {9}


def test_one_seed_has_no_spread() -> None:
    rows = summarize_all(variants(), [result(v.name, 1, 0.5) for v in variants()])
    assert "±" not in table(rows)


def test_the_page_claims_nothing_about_the_paper() -> None:
    text = page(made_up(), (1, 2, 3), harder(corpus(), 30), 40)
    assert "**no\nclaim about the paper**" in text
    assert "3 seeds (1, 2, 3); 30 training clips, 20 % of them" in text
    assert "24 test clips with true labels. One test clip is 4.17 points" in text


def test_the_figure_names_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FONT_TYPE", "none")
    draw(made_up(), tmp_path / "variants.svg")
    svg = (tmp_path / "variants.svg").read_text(encoding="utf-8")
    for word in (*(v.name for v in variants()), "Order of learning", "Pre-fusion"):
        assert f">{word}</text>" in svg
    assert ">15.0, never trained on reasoning</text>" in svg
