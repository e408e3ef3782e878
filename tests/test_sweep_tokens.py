"""What a sweep encodes, and what becomes of its rows where an encoder fails."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import emocache
from cache.errors import ExtractionStopped
from cache.manifest import read_manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.sweep.file import parse_sweep
from eval.sweep.planning.plan import SweepPlan, plan_sweep
from eval.sweep.rows import rows_of, run_key, trials_of
from eval.sweep.running.at_work import TOKENS, read_at_work
from eval.sweep.running.run import Crew, Start, encode, open_trials, parts_of
from eval.sweep.running.tokens import TokensOrder
from eval.sweep.state import BegunTrial, read_begun, read_result
from tests.sweeps import SWEEP, Small, start_command
from tests.training import make_corpus

LACKING = SWEEP.replace("  bundled_weights: {}\n", "")
"""With the bundled weights, whose tokens the made-up store does not have."""


class FakeCrew:
    """Encodes nothing, and says of each order why that failed."""

    is_stopping = False

    def __init__(self, why: Callable[[TokensOrder], str | None]) -> None:
        self._why = why
        self.orders: list[TokensOrder] = []

    def encode(self, order: TokensOrder) -> str | None:
        self.orders.append(order)
        return self._why(order)


@pytest.fixture
def planned(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> tuple[Start, SweepPlan, list[BegunTrial]]:
    manifest, where = make_corpus(tmp_path, specs)
    sweep = parse_sweep(LACKING, "small.yaml")
    trials = trials_of(sweep, rows_of(sweep), "full")
    store = TokenStore.open(str(where))
    plan = plan_sweep(trials, read_manifest(manifest), store, scores=sweep.scores)
    plan.check()
    start = Start(
        out=tmp_path / "out", manifest=manifest, media_root=str(tmp_path), store=str(where),
        scale="full", scores=sweep.scores, device="cpu",
    )  # fmt: skip
    begun = [
        BegunTrial(row=t.row, seed=t.seed, stage=t.stage, run_key=run_key(t), preset=t.preset)
        for t in trials
    ]
    return start, plan, begun


def kinds(order: TokensOrder) -> list[str]:
    return [spec.stream for part in order.parts for spec in part.specs]


def test_all_tokens_are_encoded_together(planned: Any) -> None:
    start, plan, trials = planned
    crew: Any = FakeCrew(lambda order: None)
    encode(start, plan, trials, crew)
    (order,) = crew.orders
    assert sorted(kinds(order)) == ["audio", "image", "video"]
    assert order.rows == ("base", "first-stage", "no-audio")
    assert order.parts[0].manifest == str(start.manifest)
    assert len(open_trials(start, trials)) == 3


def test_an_encoder_that_fails_fails_the_rows_that_read_it(planned: Any) -> None:
    start, plan, trials = planned
    crew: Any = FakeCrew(lambda order: "no ears" if "audio" in kinds(order) else None)
    encode(start, plan, trials, crew)
    assert [sorted(kinds(order)) for order in crew.orders] == [
        ["audio", "image", "video"], ["audio"], ["video"], ["image"],
    ]  # fmt: skip
    for order in crew.orders[1:]:
        (part,) = order.parts
        assert set(part.weights) == {spec.spec_id for spec in part.specs}
    for row in ("base", "first-stage"):
        result = read_result(start.out, f"{row}@42")
        assert result is not None
        assert (result.status, result.failed_step, result.reason) == (
            "failed",
            "extract",
            "no ears",
        )
    assert [trial.row for trial in open_trials(start, trials)] == ["no-audio"]


def test_where_nothing_can_be_encoded_no_row_is_to_blame(planned: Any) -> None:
    start, plan, trials = planned
    crew: Any = FakeCrew(lambda order: "disk full")
    with pytest.raises(ExtractionStopped, match="cannot be encoded: disk full"):
        encode(start, plan, trials, crew)
    assert len(open_trials(start, trials)) == 3, "the same command tries again"


def test_rows_whose_tokens_are_stored_go_on_without_an_encoder(planned: Any) -> None:
    start, plan, trials = planned
    (part,) = plan.extractions
    audio = next(spec for spec in part.plan.specs if spec.stream == "audio")
    fewer = type(part.plan)(**{**vars(part.plan), "specs": (audio,), "labels": ("audio",)})
    left = type(part)(part.records, fewer, part.weights)
    crew: Any = FakeCrew(lambda order: "no ears")
    encode(start, SweepPlan(**{**vars(plan), "extractions": (left,)}), trials, crew)
    assert [trial.row for trial in open_trials(start, trials)] == ["no-audio"]
    assert len(crew.orders) == 1


def test_workers_read_no_more_records_than_they_encode(planned: Any) -> None:
    start, plan, _ = planned
    (part,) = plan.extractions
    half = type(part)(part.records[3:9], part.plan, part.weights)
    (made,) = parts_of(start, SweepPlan(**{**vars(plan), "extractions": (half,)}))
    found = read_manifest(Path(made.manifest)).records
    assert [r.uid for r in found] == [r.uid for r in part.records[3:9]]
    assert [r.token_key(made.specs[0]) for r in found] == [
        r.token_key(made.specs[0]) for r in half.records
    ]


# ---------------------------------------------------------------------------- with encoders

DEMO = """\
name: small
title: Tokens of several encoders
preset: v2-perception-only
demo: {stages.0.n_steps: 2}
scores: [{name: wf1, heading: F1, kind: split}]
rows:
  - {name: base}
  - {name: few, set: {views.audio.n_tokens: 8}}
  - {name: clip, set: {tokens.image: clip-large, tokens.video: null}}
"""


def sweep_at_demo_scale(small: Small, *more: str) -> int:
    return emocache.main(
        ["sweep", str(small.file), "--scale", "demo", "--out", str(small.out), *more]
    )


@pytest.mark.slow
@pytest.mark.fault("an encoder that cannot be loaded")
def test_a_damaged_encoder_fails_its_row_and_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(tmp_path, (tmp_path / "none", tmp_path / "none"))
    small.write(DEMO)
    real = Crew.encode
    damaged: list[Path] = []

    def encode_damaged(self: Crew, order: TokensOrder) -> str | None:
        # Behind the plan, which has read its digest.
        for part in order.parts:
            for spec in part.specs:
                path = Path(part.weights[spec.spec_id])
                if spec.encoder.kind == "clip" and not damaged:
                    damaged.append(path)
                    shutil.copytree(path, tmp_path / "good")
                    for file in path.glob("*.safetensors"):
                        file.write_bytes(b"damaged")
        return real(self, order)

    with monkeypatch.context() as patched:
        patched.setattr(Crew, "encode", encode_damaged)
        assert sweep_at_demo_scale(small) == 1
    found = {t.row: read_result(small.out, t.name) for t in read_begun(small.out).trials}
    assert {row: r.status for row, r in found.items() if r} == {
        "base": "ok", "few": "ok", "clip": "failed",
    }  # fmt: skip
    assert found["clip"] is not None
    assert found["clip"].failed_step == "extract"
    store = TokenStore.open(str(small.out / "store"))
    assert len(store.specs) == 3, "few reads base's tokens; clip's image has none"
    shutil.rmtree(damaged[0])
    shutil.copytree(tmp_path / "good", damaged[0])
    assert sweep_at_demo_scale(small, "--retry-failed") == 0


@pytest.mark.slow
@pytest.mark.fault("kill -9 of a sweep")
def test_a_sweep_that_is_killed_in_each_of_its_steps_gives_the_same_table(tmp_path: Path) -> None:
    """While clips are generated, while they are encoded, while a row is trained."""
    small = Small(tmp_path, (tmp_path / "none", tmp_path / "none"))
    small.write(DEMO)
    assert sweep_at_demo_scale(small) == 0
    whole = (small.out / "table.json").read_bytes()
    out = tmp_path / "killed"
    arguments = ["sweep", str(small.file), "--scale", "demo", "--out", str(out)]

    def clips() -> bool:
        return len(list(out.glob("demo/corpus/media/*"))) > 3

    def tokens() -> bool:
        said = read_at_work(out).get(TOKENS)
        return said is not None and said.n_done > 0

    def training() -> bool:
        return any(one.step == "train" and one.n_done > 0 for one in read_at_work(out).values())

    for reached in (clips, tokens, training):
        process = start_command(arguments)
        while not reached():
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.kill()
        process.communicate()
    last = start_command(arguments)
    said, _ = last.communicate(timeout=300)
    assert last.returncode == 0, said
    assert (out / "table.json").read_bytes() == whole
