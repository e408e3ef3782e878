"""The pure parts of the table of variants."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from train.config import FusionKind

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def variants() -> Any:
    spec = importlib.util.spec_from_file_location("variants", ROOT / "benchmarks" / "variants.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["variants"] = module
    spec.loader.exec_module(module)
    return module


def test_every_scheme_and_every_fusion_has_a_row(variants: Any) -> None:
    rows = variants.variants()
    assert [v.name for v in rows if v.group == "scheme"] == [
        "perception-only", "single-joint", "curriculum",
    ]  # fmt: skip
    assert [v.name for v in rows if v.group == "pre-fusion"] == list(get_args(FusionKind))
    for row in rows:
        preset = variants.shortened(row, 7, 30)
        assert preset.seed == 7
        steps = [stage.n_steps for stage in preset.stages]
        assert steps == {"perception-only": [30], "single-joint": [60]}.get(row.name, [30, 30])
        if row.group == "pre-fusion":
            assert preset.model.fusion.kind == row.name


def test_means_and_spreads_by_hand(variants: Any) -> None:
    values = [0.5, 0.7, 0.9]
    results = [dict.fromkeys(variants.MEASURES, v) for v in values]
    found = variants.summary(results)
    assert found["accuracy"] == pytest.approx((0.7, 0.2))  # sqrt((0.04 + 0 + 0.04) / 2)
    assert variants.summary(results[:1])["loss"] == (0.5, 0.0)
    text = variants.table([(variants.variants()[0], found)], 3)
    assert "| scheme | perception-only | 70.0 ± 20.0 |" in text
    assert "over 3 seeds" in text
