"""Parts of benchmarks/train.py, so that it can be relied on when it is run: no timing here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from train.presets import v2

SCRIPTS = (
    *("train_flops", "train_report", "train_setup", "train_input", "train_speed"),
    "train",
)
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def load() -> Iterator[dict[str, ModuleType]]:
    """The scripts as modules, under names of their own: `train` is the package."""
    modules: dict[str, ModuleType] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in SCRIPTS:
            found = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            modules[name] = module
            # Scripts import each other and dataclasses look their module up; the package stays.
            if name != "train":
                patch.setitem(sys.modules, name, module)
            patch.setattr(sys, "path", list(sys.path))
            found.loader.exec_module(module)
        yield modules


@pytest.fixture(scope="module")
def flops(load: dict[str, ModuleType]) -> ModuleType:
    return load["train_flops"]


@pytest.fixture(scope="module")
def report(load: dict[str, ModuleType]) -> ModuleType:
    return load["train_report"]


def test_pairs_are_those_that_causal_attention_sees(flops: ModuleType) -> None:
    assert flops.n_pairs([(0, 3, 0, 0)]) == 1 + 2 + 3
    # A prefix of 3, then two questions of 2 that see it and themselves.
    assert flops.n_pairs([(0, 3, 0, 0), (3, 5, 0, 3), (5, 7, 0, 3)]) == 6 + 2 * (3 * 2 + 3)


def test_llm_by_hand(flops: ModuleType) -> None:
    shape = flops.LlmShape(width=2, n_layers=3, mlp_width=5, vocabulary=7, rank=1)
    found = flops.llm(shape, n_positions=10, pairs=55, n_predicted=4)
    linear = 2 * 10 * (4 * 4 + 3 * 2 * 5)
    scores, lora, logits = 4 * 2 * 55, 2 * 2 * 10 * 2 * 2, 2 * 4 * 2 * 7
    assert found.forward == 3 * (linear + scores + lora) + logits
    assert found.backward == 3 * (linear + 2 * scores + 2 * lora) + logits
    assert found.total == found.forward + found.backward


def test_true_sizes_are_those_of_the_design(load: dict[str, ModuleType], flops: ModuleType) -> None:
    setup = load["train_setup"]
    preset = v2()
    by_stream = {spec.stream: setup.encoder_flops(spec) / 1e12 for spec in preset.tokens.all()}
    assert by_stream["video"] == pytest.approx(8.2, abs=0.3)
    assert by_stream["image"] == pytest.approx(2.1, abs=0.3)
    assert by_stream["audio"] == pytest.approx(2.0, abs=0.3)
    shape = flops.LlmShape(4096, 32, 11008, 32000, 64)
    language = flops.llm(shape, 520, flops.n_pairs([(0, 520, 0, 0)]), 5)
    assert language.total / 1e12 == pytest.approx(14, abs=0.5)
    # The widths of the trainable parts: 23,072,768 + 5,771,264 + 5,246,976 + 1,052,672 with biases.
    shapes = setup.prefix_shape(preset).blocks
    assert sum(n for n, _ in shapes.values()) == 448
    weights = sum((d + 1) * 4096 for _, d in shapes.values())
    assert weights == 23_072_768 + 5_771_264 + 5_246_976 + 1_052_672


def test_prefix_by_hand(flops: ModuleType) -> None:
    shape = flops.PrefixShape({"audio": (4, 3)}, (3, 3, 3), 2, 2, 1)
    found = flops.prefix(shape, llm_width=5)
    assert found.forward == found.backward == 2 * 4 * 3 * 5


def test_positions(flops: ModuleType) -> None:
    assert flops.padded_positions([3, 5, 4]) == 15
    assert flops.shared_positions(450, [50, 60, 70]) == (630, 1530)


def test_goals_and_tables(report: ModuleType) -> None:
    goals = [
        report.Goal("mfu", "speed", ">= 75", 80.0),
        report.Goal("data", "wait", "<= 2", 2.5),
        report.Goal("data", "not run", "<= 2", None),
    ]
    assert [goal.is_met for goal in goals] == [True, False, None]
    text = report.goal_table(goals)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert "MISSED" in lines[3]
    assert "not measured" in lines[4]
    assert report.paired([2.0, 6.0, 4.0], [1.0, 2.0, 4.0]) == 2.0


def test_a_chart_needs_something_to_draw(report: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert not report.plot({}, tmp_path / "none.svg")
    found = {
        "mfu": {"rows": [{"positions": 520, "mfu": 0.8, "plain_mfu": 0.78}]},
        "shared": {"rows": [{"mix": "stage 2", "ratio": 2.1, "predicted": 2.0}]},
    }
    assert report.plot(found, tmp_path / "some.svg")
    assert (tmp_path / "some.svg").stat().st_size > 1000


def test_goals_of_results(load: dict[str, ModuleType]) -> None:
    found = {
        "data": {"rows": [{"budget": "1 clip", "wait": 0.01, "disk_to_memory": 1.2}]},
        "shared": {"rows": [{"mix": "stage 2", "ratio": 2.1}]},
        "mfu": {"rows": [{"positions": 9000, "failed": "out of memory"}]},
    }
    reached = load["train_report"].goals(found)
    assert [goal.is_met for goal in reached] == [True, False, True]


def test_made_up_records_have_what_the_tasks_need(load: dict[str, ModuleType]) -> None:
    records = load["train_setup"].made_up_records(20)
    assert len({record.clip.sha256 for record in records}) == 20
    counts = [len(record.described("multimodal")[0].split()) for record in records]
    assert min(counts) >= 40
    assert max(counts) <= 150
    assert {record.emotion for record in records} == set(load["train_setup"].LABELS)
