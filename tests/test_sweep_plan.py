"""The union of a sweep's tokens against a store, what it costs, and what stands in its way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.clip import Record
from cache.commit import ClipTokens, Status
from cache.errors import (
    CheckpointError,
    ManifestError,
    SchemaError,
    SpecMismatchError,
    StoreError,
)
from cache.manifest import Manifest
from cache.spec import TokenSpec
from cache.store import TokenStore
from eval.figures import PAPER, draw
from eval.sweep.planning.costs import reckoned_speed, reuse_costs, row_encodings, training_costs
from eval.sweep.planning.explain import explain_lines, plan_lines, plan_table
from eval.sweep.planning.plan import SweepPlan, plan_sweep, reduced
from eval.sweep.planning.reuse_plot import reuse_figure
from eval.sweep.schema import ScoreColumn, Trial
from extract.costs import clip_flops
from extract.encoders.bank import EncoderBank
from tests.conftest import make_clip
from tests.small_corpora import header, record
from tests.training import described
from train.config import Preset, configure
from train.estimates import estimate
from train.presets import demo

N_TRAIN, N_CLIPS = 6, 9
TEST = ScoreColumn(name="f1", heading="F1", kind="split")


def trial(row: str, *settings: str, seed: int = 42, stage: str | None = None) -> Trial:
    preset = configure(demo(), [*settings, f"seed={seed}"])
    return Trial(row, seed, preset, stage)


ALL = trial("all")
AUDIO = trial("audio", "tokens.video=null", "tokens.image=null", "model.fusion.kind=none")
IMAGE = trial("image", "tokens.video=null", "tokens.audio=null", "model.fusion.kind=none")
FINER = trial("finer", "tokens.video.grid=4")


def manifest(*corpora: str, **facts: Any) -> Manifest:
    """Nine clips of each corpus, of which three are to be scored on; of 3 s with sound unless told."""
    facts = {"duration_s": 3.0, **facts}
    records = tuple(
        record(
            f"{corpus}/{i}",
            "train" if i < N_TRAIN else "test",
            emotion="happy",
            descriptions=described("The voice is low."),
            **facts,
        )
        for corpus in corpora or ("made",)
        for i in range(N_CLIPS)
    )
    return Manifest(header=header(*(corpora or ("made",))), records=records)


def planned(*trials: Trial, of: Manifest | None = None, **options: Any) -> SweepPlan:
    options = {"scores": [TEST], "store": None, **options}
    store = options.pop("store")
    return plan_sweep(trials, of or manifest(), store, **options)


def filled_store(
    root: Path, specs: Sequence[TokenSpec], records: Sequence[Record], **status: Status
) -> TokenStore:
    """A store that holds made-up tokens of some records."""
    store = TokenStore.open_or_create(root)
    for spec in specs:
        clips = []
        for one in records:
            key = one.token_key(spec)
            told = status.get(spec.stream)
            made = make_clip(spec, one.uid)
            tokens = None if told else made.tokens
            clips.append(
                ClipTokens(
                    key, told or Status.OK, tokens,
                    frame_index=() if told else made.frame_index,
                    frame_pts_s=() if told else made.frame_pts_s,
                    reason="undecodable: no" if told is Status.FAILED else None,
                )
            )  # fmt: skip
        store.commit(spec, clips, {"torch": "0"})
    return store


def by_label(plan: SweepPlan) -> dict[str, tuple[int, int]]:
    """Return of each spec how many clips are known and how many are missing."""
    return {w.label: (w.known.total(), w.n_missing) for w in plan.wanted}


# ---------------------------------------------------------------------------- the union


def test_rows_that_read_the_same_tokens_encode_them_once() -> None:
    plan = planned(ALL, AUDIO, IMAGE, trial("again", "stages.0.optim.lr=0.5"))
    assert by_label(plan) == {
        "audio whisper 64x2": (0, 9), "video eva 96x4": (0, 9), "image eva 96x4": (0, 9)
    }  # fmt: skip
    assert [w.rows for w in plan.wanted] == [
        ("all", "audio", "again"), ("all", "again"), ("all", "image", "again")
    ]  # fmt: skip
    (part,) = plan.extractions
    assert len(part.records) == 9
    assert [len(unit.specs) for unit in part.plan.units] == [3]
    assert plan.n_missing == 27


def test_a_finer_grid_of_another_row_is_encoded_in_place_of_a_coarse_one() -> None:
    plan = planned(ALL, FINER)
    video = {w.spec.grid: w for w in plan.wanted if w.spec.stream == "video"}
    assert video[2].is_served
    assert video[2].source == video[4].spec
    assert not video[4].is_served
    assert len(plan.encoded) == 3
    assert video[2].spec not in plan.extractions[0].plan.specs


@given(st.permutations([1, 2, 4, 8]), st.sets(st.sampled_from(["float16", "float32"]), min_size=1))
@settings(deadline=None, max_examples=30)
def test_every_reduced_spec_serves_what_it_stands_for(grids: list[int], dtypes: set[str]) -> None:
    video = demo().tokens.video
    assert video is not None
    specs = [
        video.model_copy(update={"grid": grid, "dtype": dtype})
        for grid in grids
        for dtype in sorted(dtypes)
    ]
    found = reduced(specs)
    assert set(found) == set(specs)
    assert all(source.serves(spec) for spec, source in found.items())
    left = set(found.values())
    assert left == {video.model_copy(update={"grid": 8, "dtype": max(dtypes)})}


def test_what_is_stored_is_not_encoded_again(tmp_path: Path, specs: dict[str, TokenSpec]) -> None:
    held = manifest()
    store = filled_store(tmp_path / "s", list(specs.values()), held.records[:4])
    with_weights = [trial(t.row, *_digests(t)) for t in (ALL, AUDIO)]
    plan = planned(*with_weights, of=held, store=store)
    assert set(by_label(plan).values()) == {(4, 5)}
    assert plan.extractions[0].plan.n_missing == 5
    store = filled_store(tmp_path / "s", list(specs.values()), held.records[4:])
    plan = planned(*with_weights, of=held, store=store)
    assert plan.extractions == ()
    assert plan.n_missing == plan.n_bytes == 0
    plan.check()


def _digests(of: Trial) -> list[str]:
    """Return the settings of a trial, with the weights of `specs` in place of the bundled ones."""
    names = of.preset.tokens.by_input()
    left_out = [f"tokens.{name}=null" for name in ("audio", "video", "image") if name not in names]
    fusion = ["model.fusion.kind=none"] if left_out else []
    digests = [f"tokens.{name}.encoder.weights_sha256={'ab' * 32}" for name in names]
    return ["bundled_weights={}", *left_out, *fusion, *digests]


def test_tokens_of_a_richer_spec_in_the_store_serve(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    held = manifest()
    richer = specs["video"].model_copy(update={"grid": 4})
    store = filled_store(tmp_path / "s", [specs["audio"], richer, specs["image"]], held.records)
    plan = planned(trial("all", *_digests(ALL)), of=held, store=store)
    assert plan.extractions == ()
    (video,) = [w for w in plan.wanted if w.spec.stream == "video"]
    assert video.richer == {richer.spec_id: 9}


def test_a_richer_spec_that_is_stored_is_not_encoded_for_other_rows_records(
    tmp_path: Path,
) -> None:
    of = manifest("a", "b")
    settings = {"coarse": (), "fine": ("tokens.video.grid=4", "data.corpora=[a]")}
    coarse, fine = (
        trial(row, *given, *_digests(trial(row, *given))) for row, given in settings.items()
    )
    specs = {one.row: one.preset.tokens.by_input()["video"] for one in (coarse, fine)}
    both, lacking = of.records, of.records[-4]  # a training clip of b
    store = filled_store(tmp_path / "s", [specs["coarse"]], [r for r in both if r != lacking])
    ours = [r for r in both if r.uid.startswith("a/") or r.split == "test"]
    filled_store(tmp_path / "s", [specs["fine"]], ours)
    store.refresh()
    alone = planned(coarse, of=of, store=store)
    plan = planned(coarse, fine, of=of, store=store)
    video = {w.spec.grid: w for w in plan.wanted if w.spec.stream == "video"}
    assert (video[2].n_missing, video[4].n_missing) == (1, 0)
    assert (video[2].encoded, video[2].is_served) == (specs["coarse"], False)
    left = [
        {label: counts.total() for label, counts in one.plan.misses.items() if "video" in label}
        for one in (part for found in (alone, plan) for part in found.extractions)
    ]
    assert [sum(one.values()) for one in left if one] == [1, 1]


def test_the_store_tells_the_weights_where_no_checkpoint_does(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    held = manifest()
    store = filled_store(tmp_path / "s", list(specs.values()), held.records)
    open_weights = Trial("all", 42, _unbundled(ALL.preset), None)
    plan = planned(open_weights, of=held, store=store)
    assert plan.extractions == ()
    assert plan.trials[0].preset.tokens.all() == tuple(specs.values())
    plan.check()


def _unbundled(preset: Preset) -> Preset:
    return preset.model_copy(update={"bundled_weights": {}})


def test_trials_come_back_with_the_digests_of_their_checkpoints(
    bank: EncoderBank, tiny_weights: dict[str, Path]
) -> None:
    for preset, weights in (
        (ALL.preset, {}),
        (_unbundled(ALL.preset), tiny_weights),
        (
            _unbundled(ALL.preset),
            {s.canonical_json(): tiny_weights[s.encoder.kind] for s in ALL.preset.tokens.all()},
        ),
    ):
        plan = planned(Trial("all", 42, preset, None), weights=weights)
        assert plan.trials[0].preset.tokens.all() == bank.specs
        (part,) = plan.extractions
        assert part.weights == {spec.spec_id: bank.path(spec) for spec in bank.specs}
        plan.check()


def test_rows_of_other_corpora_are_planned_on_their_own_records() -> None:
    first = trial("first", *_without("video", "image"), 'data.corpora=["a"]')
    other = trial("other", *_without("audio", "video"), 'data.corpora=["b"]')
    plan = planned(first, other, of=manifest("a", "b"))
    found = {part.plan.labels: {r.uid for r in part.records} for part in plan.extractions}
    scored = {f"{corpus}/{i}" for corpus in "ab" for i in range(N_TRAIN, N_CLIPS)}
    assert found == {
        ("audio whisper 64x2",): scored | {f"a/{i}" for i in range(N_TRAIN)},
        ("image eva 96x4",): scored | {f"b/{i}" for i in range(N_TRAIN)},
    }


def _without(*names: str) -> list[str]:
    return ["model.fusion.kind=none", *(f"tokens.{name}=null" for name in names)]


def test_a_share_of_the_records_is_the_shares_of_all_seeds() -> None:
    half = [
        trial("half", *_without("video", "image"), "data.train_share=0.5", seed=n) for n in (1, 2)
    ]
    plans = [planned(one) for one in half]
    (both,) = planned(*half).extractions
    read = [{r.uid for r in plan.extractions[0].records} for plan in plans]
    assert [len(uids) for uids in read] == [3 + 3, 3 + 3]  # half of six, and what is scored
    assert {r.uid for r in both.records} == read[0] | read[1]
    assert read[0] != read[1]


def test_benchmarks_are_read_by_the_sets_that_score_a_record() -> None:
    held = manifest()
    asked = tuple(
        r.model_copy(update={"benchmarks": ("mer2023",) if n == 8 else ()})
        for n, r in enumerate(held.records)
    )
    held = Manifest(header=held.header, records=asked)
    column = ScoreColumn(name="bench", heading="Bench", kind="benchmark", sets=("mer2023",))
    plan = planned(AUDIO, of=held, scores=[column])
    assert {r.uid for r in plan.extractions[0].records} == {
        *(f"made/{i}" for i in range(6)),
        "made/8",
    }


def test_rows_that_differ_in_their_stage_share_a_run() -> None:
    plan = planned(trial("one", stage="stage1"), trial("two", stage="stage2"), trial("one", seed=7))
    assert [row.shares_run_with for row in plan.rows] == [None, "one"]
    assert len(plan.runs) == 1
    assert [(t.row, t.seed) for t in plan.trials] == [("one", 42), ("two", 42), ("one", 7)]


# ---------------------------------------------------------------------------- what stands in the way


def refused(plan: SweepPlan, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        plan.check()
    for word in words:
        assert word in str(caught.value)


def test_a_row_that_reads_what_its_corpus_lacks_is_refused_by_name() -> None:
    silent = manifest("a", has_audio=False)
    plan = planned(IMAGE, of=silent)
    plan.check()
    refused(planned(IMAGE, AUDIO, of=silent), ManifestError, "row 'audio'", "corpus a", "sound")
    pictures = manifest("a", has_video=False)
    refused(planned(ALL, of=pictures), ManifestError, "row 'all'", "video", "moving pictures")


def test_one_silent_corpus_of_two_is_remarked_upon() -> None:
    two = Manifest(
        header=header("a", "b"),
        records=(*manifest("a", has_audio=False).records, *manifest("b").records),
    )
    plan = planned(ALL, of=two)
    plan.check()
    assert plan.remarks == (
        "row 'all': no record of corpus 'a' has sound; its audio tokens are masked",
    )
    refused(
        planned(trial("all", "data.absent=refuse"), of=two), ManifestError, "a 6", "mask or drop"
    )


def test_unknown_corpora_splits_and_sets_are_refused() -> None:
    mistyped = trial("x", 'data.corpora=["mad"]')
    refused(planned(mistyped), ManifestError, "row 'x'", "'mad'", "Did you mean 'made'?")
    tested = ScoreColumn(name="f1", heading="F1", kind="split", split="tset")
    refused(planned(ALL, scores=[tested]), ManifestError, "'tset'", "Did you mean 'test'?")
    column = ScoreColumn(name="bench", heading="Bench", kind="benchmark", sets=("mer2023",))
    refused(planned(ALL, scores=[column]), ManifestError, "mer2023", "none")
    elsewhere = trial("x", "data.train_split=dev")
    refused(planned(elsewhere), ManifestError, "row 'x'", "'dev'")


def test_too_little_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(ALL, where=tmp_path / "not" / "there")
    plan.check()
    assert plan.free_bytes is not None
    needed = plan.n_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    planned(ALL, where=tmp_path).check()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    refused(planned(ALL, where=tmp_path), StoreError, str(tmp_path), "--rows")
    assert planned(ALL, where="s3://bucket/store").free_bytes is None


def test_a_checkpoint_is_needed_only_where_something_is_encoded() -> None:
    plan = planned(Trial("all", 42, _unbundled(ALL.preset), None))
    refused(plan, CheckpointError, "audio whisper 64x2 (audio or whisper)", "--encoder-weights")


def test_a_checkpoint_for_nothing_known_is_refused(tiny_weights: dict[str, Path]) -> None:
    with pytest.raises(SchemaError, match="Did you mean 'whisper'"):
        planned(ALL, weights={"whispr": tiny_weights["whisper"]})
    # Of a row that is not selected.
    planned(ALL, weights={"hubert-large": Path("nowhere")}).check()


def test_weights_that_are_not_told_apart_are_refused(
    tmp_path: Path, specs: dict[str, TokenSpec]
) -> None:
    held = manifest()
    other = [spec.with_weights("cd" * 32) for spec in specs.values()]
    store = filled_store(tmp_path / "s", [*specs.values(), *other], held.records)
    plan = planned(Trial("all", 42, _unbundled(ALL.preset), None), of=held, store=store)
    refused(plan, SpecMismatchError, "abab", "cdcd")


def test_faces_need_a_source() -> None:
    plan = planned(trial("faces", 'tokens.video.crop={"by": "openface"}'))
    refused(plan, SchemaError, "--faces")


def test_several_problems_are_said_together() -> None:
    plan = planned(AUDIO, trial("x", 'data.corpora=["mad"]'), of=manifest("made", has_audio=False))
    refused(plan, ManifestError, "row 'audio'", "Besides: row 'x'")


def test_no_rows_are_refused() -> None:
    with pytest.raises(SchemaError, match="at least one row"):
        planned()


# ---------------------------------------------------------------------------- costs


def test_encodings_with_and_without_reuse_by_hand() -> None:
    """Nine clips; alone: 3 specs and 1 and 1 (the stage's row shares its run); together 3 specs."""
    rows = ALL, AUDIO, IMAGE, trial("stage", stage="stage1")
    costs = reuse_costs(planned(*rows))
    audio, video, image = (clip_flops(spec, 3.0) for spec in ALL.preset.tokens.all())
    assert costs.alone.n_encodings == 9 * 5
    assert costs.alone.n_decodings == 9 * 3
    assert costs.alone.flops == pytest.approx(9 * (2 * audio + video + 2 * image))
    assert costs.together.n_encodings == costs.equal.n_encodings == costs.left.n_encodings == 9 * 3
    assert costs.together.n_decodings == 9
    assert costs.together.flops == pytest.approx(9 * (audio + video + image))
    assert costs.left.flops == pytest.approx(costs.together.flops)
    assert costs.ratio == pytest.approx(costs.alone.flops / costs.together.flops)


def test_silent_clips_and_clips_that_occur_twice_cost_nothing() -> None:
    held = manifest()
    records = [
        *held.records,
        *(r.model_copy(update={"uid": f"made/{r.uid}"}) for r in held.records),
    ]
    assert records[0].clip is not None
    mute = records[0].clip.model_copy(update={"has_audio": False})
    records = [
        r.model_copy(update={"clip": mute}) if r.clip == records[0].clip else r for r in records
    ]
    held = Manifest(header=held.header, records=tuple(records))
    costs = reuse_costs(planned(ALL, of=held))
    assert costs.together.n_encodings == costs.left.n_encodings == 9 * 3 - 1


def test_views_save_what_equal_specs_do_not() -> None:
    costs = reuse_costs(planned(ALL, FINER))
    video = clip_flops(demo().tokens.all()[1])
    assert costs.equal.flops - costs.together.flops == pytest.approx(9 * video)
    assert costs.equal.n_bytes > costs.together.n_bytes


ROWS = {
    "all": ALL,
    "audio": AUDIO,
    "image": IMAGE,
    "finer": FINER,
    "more": trial("more", "data.absent=drop"),
}


@given(st.permutations(sorted(ROWS)), st.integers(1, len(ROWS)))
@settings(deadline=None, max_examples=25)
def test_reuse_never_costs_more_and_rows_add_up(names: list[str], n_rows: int) -> None:
    plan = planned(*(ROWS[name] for name in names[:n_rows]))
    costs = reuse_costs(plan)
    assert costs.together.flops <= costs.equal.flops <= costs.alone.flops
    assert costs.together.n_bytes <= costs.equal.n_bytes <= costs.alone.n_bytes
    rows = row_encodings(plan)
    assert [row.row for row in rows] == names[:n_rows]
    assert sum(row.alone.n_encodings for row in rows) == costs.alone.n_encodings
    assert sum(row.new.n_encodings for row in rows) == costs.together.n_encodings
    assert sum(row.new.flops for row in rows) == pytest.approx(costs.together.flops)


def test_training_costs_what_the_runs_own_estimate_says(
    tmp_path: Path, specs: dict[str, TokenSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sound of 3 s has more frames than the view takes, so that nothing depends on what is stored."""
    held = manifest()
    store = filled_store(tmp_path / "s", list(specs.values()), held.records)
    for module in ("train.estimates.estimate", "eval.sweep.planning.costs"):
        monkeypatch.setattr(f"{module}.N_STEPS", 3)
    one = trial("all", *_digests(ALL))
    (cost,) = training_costs(planned(one, of=held, store=store), held)
    import torch

    known = estimate.estimate(one.preset, held, store, device=torch.device("cpu"), flops_per_s=1e9)
    assert cost.n_trainable == known.n_trainable
    assert cost.n_steps == 180
    assert cost.flops == pytest.approx(sum(s.n_steps * s.flops.total for s in known.stages))


def test_a_language_model_that_is_not_at_hand_leaves_the_cost_open(tmp_path: Path) -> None:
    gone = trial("gone", f"model.llm.path={tmp_path / 'gone'}")
    plan = planned(
        ALL, gone, trial("also", f"model.llm.path={tmp_path / 'gone'}", "data.absent=drop")
    )
    found = training_costs(plan, manifest())
    assert [cost.unknown is None for cost in found] == [True, False, False]
    assert "gone" in str(found[1].unknown)
    text = plan_lines(plan, reuse_costs(plan), found)
    assert any("3 runs" in line for line in text)


# ---------------------------------------------------------------------------- words


def test_a_row_is_explained(tmp_path: Path, specs: dict[str, TokenSpec]) -> None:
    held = manifest()
    other = specs["image"].model_copy(update={"dtype": "int8"})
    store = filled_store(tmp_path / "s", [specs["audio"]], held.records)
    store = filled_store(tmp_path / "s", [other], held.records, image=Status.FAILED)
    rows = [trial(t.row, *_digests(t)) for t in (ALL, IMAGE)]
    rows.append(trial("finer", *_digests(ALL), "tokens.video.grid=4"))
    plan = planned(*rows, of=held, store=store)
    text = "\n".join(explain_lines(plan, width=1000))
    audio, first, coarse = specs["audio"].spec_id, specs["image"].spec_id, specs["video"].spec_id
    assert f"audio  audio whisper 64x2 ({audio}), 9 clips: 9 stored" in text
    assert (
        "view: the valid frames (50 per second, at most 1500) by adaptive mean to 16 tokens" in text
    )
    assert f"image eva 96x4 ({first}), 9 clips: 9 to encode, once for 3 rows" in text
    assert (
        "why: encoded under other specs only (9); nearest in the store is image eva 96x4@abababab "
        f"{other.spec_id}: dtype float16 wanted, int8 stored"
    ).replace("@abababab", "") in text.replace("@abababab", "")
    assert "9 to encode, the same as for all" in text
    assert f"({coarse}), 9 clips: 9 to encode" in text
    assert (
        "read from the richer video eva 96x4 (2) that row finer needs (grid 2 here, 4 there)"
        in text
    )
    assert "2x2 by mean of 2x2 stored cells each" in text
    only = explain_lines(plan, ["image"])
    assert only[0] == "image"
    assert sum(not line.startswith(" ") for line in only) == 1
    assert max(map(len, explain_lines(plan, width=80))) <= 80


def test_the_table_and_the_costs_are_said_in_few_columns() -> None:
    plan = planned(ALL, FINER, AUDIO)
    costs = reuse_costs(plan)
    table = plan_table(plan)
    assert table.row_count == 4
    lines = plan_lines(plan, costs, training_costs(plan, manifest()), flops_per_s=1e9, width=80)
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "without reuse 63 encodings of clips" in text
    assert "with reuse 27 encodings of clips" in text
    assert "of which views 9 encodings less" in text
    assert "training 3 runs of 180 steps" in text


def test_marks_of_the_plot_are_what_each_row_encodes_and_finds() -> None:
    """Three tokens of the first row, one more of the third: four full marks, and rings for the others."""
    plan = planned(ALL, AUDIO, trial("wide", "tokens.image.pixels.size_px=224"))
    figure = reuse_figure(plan, ["first", "second", "third"])(PAPER)
    marks, sums = figure.axes
    by_label = {str(c.get_label()): c.get_offsets() for c in marks.collections}
    rows = {label: sorted(float(y) for _, y in found) for label, found in by_label.items()}
    assert rows == {"encoded": [0, 0, 0, 2], "found in the store": [1, 2, 2]}
    alone, shared = (line.get_xdata()[-1] for line in sums.lines)
    costs = reuse_costs(plan)
    assert alone / shared == pytest.approx(costs.alone.flops / costs.together.flops)
    drawn = draw(reuse_figure(plan), "reuse")
    assert "audio whisper 64x2" in drawn.svg
    assert drawn.png.startswith(b"\x89PNG")


def test_a_gpu_that_is_not_here_is_not_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert reckoned_speed("cuda") is None
    monkeypatch.setattr(estimate, "measure_flops_per_s", lambda *_: 1e9)
    assert reckoned_speed("auto") == reckoned_speed("cpu") == pytest.approx(0.7e9)
