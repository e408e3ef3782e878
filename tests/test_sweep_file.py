"""Sweep files: what the shipped ones hold, against the papers; what is refused, and with which line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cache.errors import EmocacheError, SchemaError, SpecMismatchError
from cache.spec import TokenSpec, differences
from eval.benchmarks import benchmarks, published
from eval.sweep.file import parse_sweep, read_sweep, shipped
from eval.sweep.rows import rows_of, run_key, select, trials_of
from eval.sweep.schema import Scale, SweepFile, SweepRow, Trial
from train.config import Preset
from train.presets import preset

SHIPPED = {
    "figure3a": (6, 6, 6),
    "figure3b": (6, 6, 6),
    "figure3c": (4, 4, 4),
    "released": (13, 13, 13),
    "table7": (4, 4, 4),
    "table8": (4, 4, 2),
    "table9": (6, 6, 6),
    "table10": (3, 3, 2),
    "table11": (20, 20, 20),
    "v1-data-ratio": (5, 15, 15),
    "v1-encoders": (9, 9, 9),
    "v1-instructions": (3, 3, 2),
    "v1-learning-rate": (3, 3, 3),
}
"""Name -> rows, trials, distinct trainings."""

# Typed from the paper's tables: MER-UniBench, MMEVerse-Bench.
PAPER = {
    "table7": [(61.78, 44.42), (63.08, 48.72), (69.02, 50.44), (78.91, 66.05)],
    "table8": [(77.43, 65.13), (78.91, 66.05), (77.88, 66.47), (78.52, 66.63)],
    "table9": [
        (77.43, 65.13), (77.95, 65.85), (77.65, 65.37), (78.05, 65.68), (77.93, 65.92), (78.91, 66.05),
    ],
    "table10": [(78.91, 66.05), (75.54, 64.20), (78.52, 66.63)],
}  # fmt: skip
TABLE_11 = """
    Whisper - - 56.28 | HuBERT - - 58.92
    - EVA - 57.70 | - MAE - 50.92 | - CLIP - 57.53
    - - VideoMAE 53.39 | - - VideoMAEv2 50.09 | - - EVA 56.52 | - - CLIP 55.69
    HuBERT EVA - 60.62 | Whisper EVA - 61.73 | HuBERT - CLIP 57.88 | HuBERT - EVA 59.31
    Whisper - CLIP 55.76 | Whisper - EVA 60.67
    HuBERT EVA CLIP 63.66 | HuBERT EVA EVA 61.90 | Whisper EVA CLIP 62.46 | Whisper EVA EVA 66.05
    HuBERT EVA MAE+VideoMAE 61.44
"""

SMALL = """\
name: small
title: Small
preset: v2-perception-only
set:
  model.fusion.n_blocks: 2
columns: [Fusion]
baseline: none
scores:
  - {name: f1, heading: F1, kind: split}
rows:
  - name: none
    cells: [without]
    set: {model.fusion.kind: none}
    published: {f1: 50.0}
  - name: conv
    cells: [convolution]
    set:
      model.fusion.kind: conv
      model.fusion.n_blocks: 3
"""


def _trials(name: str, scale: Scale = "full") -> tuple[Trial, ...]:
    sweep = read_sweep(name)
    return trials_of(sweep, rows_of(sweep), scale)


def _presets(name: str) -> dict[str, Preset]:
    return {trial.row: trial.preset for trial in _trials(name)}


def _all_of(text: str, scale: Scale = "full") -> tuple[Trial, ...]:
    sweep = parse_sweep(text, "my.yaml")
    return trials_of(sweep, rows_of(sweep), scale)


# The shipped files


def test_the_shipped_files_are_those_of_the_papers() -> None:
    assert set(shipped()) == set(SHIPPED)
    assert all(read_sweep(name).name == name for name in shipped())


@pytest.mark.parametrize("scale", ["full", "demo"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_row_of_a_shipped_file_has_a_preset_at_each_scale(name: str, scale: Scale) -> None:
    sweep, trials = read_sweep(name), _trials(name, scale)
    n_runs = len({run_key(trial) for trial in trials})
    assert (len(rows_of(sweep)), len(trials), n_runs) == SHIPPED[name]
    assert sweep.baseline in {trial.row for trial in trials}
    assert sweep.source
    assert sweep.about
    tiny = {trial.preset.model.llm.path == "emocache/tiny" for trial in trials}
    assert tiny == {scale == "demo"}


@pytest.mark.parametrize("name", PAPER)
def test_published_figures_are_the_paper_s(name: str) -> None:
    found = [
        (r.published["mer-unibench"], r.published["mmeverse-bench"])
        for r in rows_of(read_sweep(name))
    ]
    assert found == PAPER[name]


def test_the_whole_model_s_figures_are_those_of_table_4() -> None:
    ours = {row.model: row.averages for row in published().recognition}
    by_row = {row.name: row.published for row in read_sweep("table10").rows}
    for row, model in (
        ("perception", "Emotion-LLaMAv2 (Stage 1)"),
        ("perception-to-cognition", "Emotion-LLaMAv2 (Stage 2)"),
    ):
        averages = ours[model]
        assert by_row[row] == {
            "mer-unibench": averages["avg-9"],
            "mmeverse-bench": averages["avg-18"],
        }


def test_table_11_has_all_twenty_rows_of_the_paper() -> None:
    rows = rows_of(read_sweep("table11"))
    printed = [line.split() for line in TABLE_11.replace("|", "\n").splitlines() if line.strip()]
    assert len(printed) == 20
    found = [
        [*(c.replace(" ", "") for c in row.cells), f"{row.published['mmeverse-bench']:.2f}"]
        for row in rows
    ]
    assert found == printed
    assert list(Counter(row.group for row in rows).values()) == [9, 6, 4, 1]


def test_table_11_reads_what_its_cells_say() -> None:
    kinds = {"Whisper": "whisper", "HuBERT": "hubert", "EVA": "eva", "MAE": "mae", "CLIP": "clip"}
    presets = _presets("table11")
    for row in rows_of(read_sweep("table11"))[:-1]:
        tokens = presets[row.name].tokens
        for cell, spec in zip(row.cells, (tokens.audio, tokens.image, tokens.video), strict=True):
            kind = None if spec is None else spec.encoder.kind
            assert kind == (None if cell == "-" else kinds.get(cell, "videomae")), row.name
        n_inputs = len(tokens.by_input())
        assert (presets[row.name].model.fusion.kind == "none") == (n_inputs == 1)
    widths = [
        presets[name].tokens.video.encoder.width for name in ("video-videomae", "video-videomae2")
    ]  # type: ignore[union-attr]
    assert widths == [1024, 1408]
    setup = presets["emotion-llama"]
    assert dict(setup.layout().blocks) == {
        "image": 256,
        "local": 1,
        "video": 1,
        "audio": 1,
        "cls": 1,
    }
    for spec, kind in ((setup.tokens.local, "mae"), (setup.tokens.video, "videomae")):
        assert spec is not None
        assert spec.encoder.kind == kind
        assert spec.crop is not None
        assert spec.utterance


def _distinct(trials: tuple[Trial, ...]) -> list[TokenSpec]:
    """What must be encoded: no spec twice, none that another one serves."""
    digest = "ab" * 32
    specs = {
        spec.with_weights(digest).spec_id: spec.with_weights(digest)
        for trial in trials
        for spec in trial.preset.tokens.all()
    }
    found = list(specs.values())
    return [s for s in found if not any(other is not s and other.serves(s) for other in found)]


@pytest.mark.parametrize("scale", ["full", "demo"])
def test_table_11_needs_each_encoder_once(scale: Scale) -> None:
    trials = _trials("table11", scale)
    distinct = _distinct(trials)
    # Sound: Whisper, HuBERT. Frame: EVA, MAE, CLIP. Frames: VideoMAE, v2, EVA, CLIP. Faces: MAE, VideoMAE.
    assert len(distinct) == 2 + 3 + 4 + 2
    used = Counter(
        (s.encoder.kind, s.encoder.width, s.stream, s.crop is not None) for s in distinct
    )
    assert set(used.values()) == {1}
    # 9 rows of one, 6 of two, 4 of three inputs, 1 of four.
    assert sum(len(trial.preset.tokens.all()) for trial in trials) == 9 + 12 + 12 + 4


@pytest.mark.parametrize("scale", ["full", "demo"])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("figure3a", {1, 8, 16, 32, 64, 128}),
        ("figure3b", {1, 4, 8, 16, 32, 64}),
        ("figure3c", {1, 2, 4, 8}),
    ],
)
def test_the_points_of_figure_3_need_one_stored_tensor_per_stream(
    name: str, values: set[int], scale: Scale
) -> None:
    trials = _trials(name, scale)
    assert sorted(spec.stream for spec in _distinct(trials)) == ["audio", "image", "video"]
    views = [trial.preset.views for trial in trials]
    viewed: dict[str, Callable[[int], int]] = {
        "figure3a": lambda i: views[i].audio.n_tokens,  # type: ignore[union-attr]
        "figure3b": lambda i: views[i].video.n_frames,  # type: ignore[union-attr]
        "figure3c": lambda i: views[i].video.grid,  # type: ignore[union-attr]
    }
    assert {viewed[name](i) for i in range(len(views))} == values
    [default] = [row for row in read_sweep(name).rows if row.published]
    assert default.name == read_sweep(name).baseline
    assert default.published == {"mmeverse-bench": 66.03 if name == "figure3b" else 66.05}


@pytest.mark.parametrize("scale", ["full", "demo"])
def test_cells_of_figure_3c_are_those_of_an_extraction_with_that_grid(scale: Scale) -> None:
    stored = _trials("figure3c", scale)[0].preset.tokens.video
    assert stored is not None
    for grid in (1, 2, 4, 8):
        assert stored.with_weights("ab" * 32).serves(stored.model_copy(update={"grid": grid}))


RELEASED = {
    "peak-frame": {"tokens.image.frames.kind"},
    "window": {"tokens.video.frames.kind"},
    "temporal-eva": {
        "tokens.video.encoder.depth", "tokens.video.encoder.norm", "tokens.video.pixels.interpolation",
        "tokens.video.pixels.mean", "tokens.video.pixels.std",
    },
    "padded-audio": {"tokens.audio.encoder.padded"},
    "unmasked": {"data.mask_missing", "data.failed"},
    "stage1-captions": {"stages"},
    "label-lists": {"prompt.option_list"},
    "wording": {"prompt.style"},
    "two-bos": {"prompt.eval_bos"},
    "answers": {"prompt.answer_norm"},
    "subtitles": {"prompt.subtitle_language", "prompt.eval_subtitle_language"},
}  # fmt: skip


def test_each_row_of_the_released_code_differs_from_the_paper_in_its_choice_alone() -> None:
    presets = _presets("released")
    paper = presets["paper"]
    assert differences(preset("v2"), paper) == {}
    assert set(presets) == {"paper", "released", *RELEASED}
    for row, paths in RELEASED.items():
        found = {
            path
            for path, pair in differences(paper, presets[row]).items()
            if None not in pair or path
        }
        assert {next((p for p in paths if f.startswith(p)), f) for f in found} == paths, row
    assert differences(preset("v2-released"), presets["released"]) == {}


def test_together_the_released_rows_are_the_released_preset() -> None:
    presets = _presets("released")
    together = dict(differences(presets["paper"], presets["released"]))
    alone = {
        path: pair
        for row in RELEASED
        if row not in ("wording", "stage1-captions")
        for path, pair in differences(presets["paper"], presets[row]).items()
    }
    assert {
        path: pair for path, pair in together.items() if path not in ("name", "stages")
    } == alone


def test_rows_of_the_predecessor_are_its_preset_with_inputs_left_out() -> None:
    presets = _presets("v1-encoders")
    assert differences(preset("v1"), presets["all"]) == {}
    of = {"HuBERT": "audio", "EVA": "image", "MAE": "local", "VideoMAE": "video"}
    for row in rows_of(read_sweep("v1-encoders")):
        assert set(presets[row.name].tokens.by_input()) == {of[c] for c in row.cells if c != "-"}


def test_data_ratios_and_learning_rates() -> None:
    shares = {(t.preset.data.train_share, t.seed) for t in _trials("v1-data-ratio")}
    assert shares == {(share, seed) for share in (0.2, 0.4, 0.6, 0.8, 1.0) for seed in (42, 43, 44)}
    rates = [t.preset.stages for t in _trials("v1-learning-rate")]
    assert [(s[0].optim.lr, len(s)) for s in rates] == [(1e-4, 1), (1e-5, 1), (1e-6, 1)]


def test_names_of_groups_stand_for_their_benchmarks() -> None:
    unibench, all_of_them = read_sweep("table9").scores
    assert unibench.sets == tuple(b.id for b in benchmarks().values() if b.unibench)
    assert len(unibench.sets) == 9
    assert all_of_them.sets == tuple(benchmarks())


# Rows and trials


def test_settings_of_a_row_win_over_those_of_the_sweep() -> None:
    none, conv = _all_of(SMALL)
    assert [t.preset.model.fusion.n_blocks for t in (none, conv)] == [2, 3]
    assert [t.preset.model.fusion.kind for t in (none, conv)] == ["none", "conv"]
    assert [t.name for t in (none, conv)] == ["none@42", "conv@42"]


def test_settings_of_the_demo_win_over_all_at_demo_scale_alone() -> None:
    text = SMALL + "demo: {model.fusion.n_blocks: 1, stages.0.n_steps: 7}\n"
    assert [t.preset.model.fusion.n_blocks for t in _all_of(text)] == [2, 3]
    at_demo = _all_of(text, "demo")
    assert [t.preset.model.fusion.n_blocks for t in at_demo] == [1, 1]
    assert [t.preset.stages[0].n_steps for t in at_demo] == [7, 7]


def test_a_grid_gives_every_row_once_per_combination() -> None:
    text = SMALL.replace("columns: [Fusion]\n", "").replace(
        "baseline: none", "baseline: conv-r-8-kind-none"
    )
    text = text.replace("model.fusion.kind: conv\n", "model.fusion.n_blocks: 1\n").replace(
        "      model.fusion.n_blocks: 3\n", ""
    )
    text = text.replace("    set: {model.fusion.kind: none}\n", "")
    text += "grid:\n  model.lora.r: [8, 16]\n  model.fusion.kind: [none, conv]\n"
    sweep = parse_sweep(text, "my.yaml")
    rows = rows_of(sweep)
    assert sweep.columns == ("row", "r", "kind")
    assert [row.name for row in rows][:3] == [
        "none-r-8-kind-none",
        "none-r-8-kind-conv",
        "none-r-16-kind-none",
    ]
    assert rows[-1].cells == ("convolution", "16", "conv")
    assert len(rows) == 8
    last = trials_of(sweep, rows, "full")[-1].preset.model
    assert (last.lora.r, last.fusion.kind, last.fusion.n_blocks) == (16, "conv", 1)


def test_a_grid_needs_no_rows() -> None:
    text = SMALL[: SMALL.index("columns")] + SMALL[SMALL.index("scores") : SMALL.index("rows")]
    text += "grid: {data.train_share: [0.5, 1.0], seed: [7]}\n"
    rows = rows_of(parse_sweep(text, "my.yaml"))
    assert [(row.name, row.cells) for row in rows] == [
        ("train_share-0.5-seed-7", ("0.5", "7")),
        ("train_share-1-seed-7", ("1", "7")),
    ]


def test_every_seed_is_a_trial_of_its_own() -> None:
    text = SMALL.replace("columns:", "seeds: [1, 2]\ncolumns:").replace(
        "    cells: [convolution]", "    cells: [convolution]\n    seeds: [5]"
    )
    trials = _all_of(text)
    assert [t.name for t in trials] == ["none@1", "none@2", "conv@5"]
    assert [t.preset.seed for t in trials] == [1, 2, 5]
    assert len({run_key(t) for t in trials}) == 3


def test_a_training_is_known_by_what_changes_a_number() -> None:
    [trial, other] = _all_of(SMALL)

    def key(**changes: object) -> str:
        changed = trial.preset.model_copy(update=changes)
        return run_key(Trial("x", trial.seed, changed, "stage1"))

    execution = trial.preset.execution.model_copy(update={"n_workers": 0})
    assert key(name="another", execution=execution) == run_key(trial)
    assert key(seed=43) != run_key(trial)
    assert run_key(other) != run_key(trial)


def test_null_leaves_out_an_input_and_a_stage() -> None:
    text = SMALL.replace("v2-perception-only", "v2").replace(
        "{model.fusion.kind: none}", "{model.fusion.kind: none, tokens.video: null, stages.1: null}"
    )
    left, whole = (trial.preset for trial in _all_of(text))
    assert set(left.tokens.by_input()) == {"audio", "image"}
    assert [s.name for s in left.stages] == ["stage1"]
    assert [s.name for s in whole.stages] == ["stage1", "stage2"]


def test_rows_are_selected_by_name_or_pattern_in_their_own_order() -> None:
    rows = rows_of(read_sweep("table9"))
    chosen = select(rows, ["conv*", "none", "conv"])
    assert [row.name for row in chosen] == ["none", "conv", "conv-attention"]
    assert select(rows, []) == rows
    with pytest.raises(SchemaError, match=r"--rows con: no such row.*Did you mean 'conv'"):
        select(rows, ["con"])


def test_a_sweep_made_in_code_needs_no_file() -> None:
    sweep = SweepFile(
        name="mine",
        title="Mine",
        preset="demo",
        scores=read_sweep("v1-encoders").scores,
        rows=(SweepRow(name="a", set={"model.fusion.kindd": "none"}),),
    )
    assert rows_of(sweep)[0].cells == ("a",)
    with pytest.raises(SchemaError, match=r"^sweep 'mine': unknown key 'model.fusion.kindd'"):
        trials_of(sweep, rows_of(sweep), "full")


# What is refused


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        # Known before any preset is looked at.
        ("title: Small", "titel: Small", 2, "unknown field 'titel'. Did you mean 'title'?"),
        ("title: Small\n", "title: Small\nname: other\n", 3, "'name' is given twice, first in line 1"),
        ("kind: split", "kind: splits", 9, "'split'"),
        ("kind: split", "kind: benchmark", 9, "names no sets"),
        ("kind: split", "kind: benchmark, sets: [meldd]", 9, "unknown benchmark 'meldd'. Did you"),
        ("kind: split", "kind: benchmark, sets: [mosi, mosi]", 9, "names 'mosi' twice"),
        ("kind: split", "kind: split, sets: [mosi]", 9, "takes no benchmark sets"),
        ("kind: split", "kind: split, metric: f1", 9, "weighted_f1"),
        ("kind: split", "kind: split, task: emotoin", 9, "mean 'emotion'"),
        ("kind: split", "kind: split, task: open-vocabulary", 9, "names no label of a list"),
        ("kind: split", "kind: split, task: think, reading: last-word", 9, "more than one label"),
        ("kind: split}", "kind: split}\n  - {name: f1, heading: G, kind: split}", 10, "two score columns"),
        ("published: {f1: 50.0}", "published: {f2: 50.0}", 14, "no score column 'f2'. Did you mean 'f1'?"),
        ("name: conv", "name: none", 15, "a second row 'none'; the first is at my.yaml:11"),
        ("name: conv", "name: Conv!", 15, "rows.1.name"),
        ("cells: [convolution]", "cells: [a, convolution]", 16, "2 cells (a, convolution) for 1 columns"),
        ("baseline: none", "baseline: nonne", 7, "no row 'nonne' to compare with. Did you mean 'none'?"),
        ("name: small", "name: [small", 2, "not YAML"),
        ("title: Small", "title: &a {b: *a}", 2, "an alias of something that it is a part of"),
        ("title: Small", "<<: {title: Small}", 2, "no merge keys"),
        ("preset: v2-perception-only", "preset: v2-perception-only\nseeds: [1, 1]", 4, "given twice: [1, 1]"),
        ("cells: [convolution]", "seeds: [3, 3]", 16, "given twice: [3, 3]"),
        # Known once presets are resolved.
        ("preset: v2-perception-only", "preset: v3", 3, "unknown preset 'v3'. Did you mean"),
        ("cells: [convolution]", "cells: [convolution]\n    preset: v2-relesed", 17, "mean 'v2-released'"),
        ("cells: [convolution]", "cells: [convolution]\n    stage: stag1", 17, "mean 'stage1'"),
        ("model.fusion.n_blocks: 2", "model.fusion.n_block: 2", 5, "no 'n_block'. Did you mean 'n_blocks'?"),
        ("model.fusion.n_blocks: 3", "modle.fusion.n_blocks: 3", 19, "Did you mean 'model'?"),
        ("model.fusion.n_blocks: 3", "stages.3.n_steps: 3", 19, "a list of 1"),
        ("model.fusion.n_blocks: 3", "model.fusion.n_blocks: many", 19, "row 'conv': 'model.fusion"),
        ("kind: conv\n", "kind: convolution\n", 18, "Did you mean 'conv"),
        ("kind: none}", "kind: none, tokens.audio: hubert-larg}", 13, "Did you mean 'hubert-large'?"),
        ("kind: none}", "kind: none, tokens.audio: clip-large}", 13, "makes no 'audio' tokens"),
        ("kind: none}", "kind: none, prefix: [[image, audio]]}", 11, "prefix has no place for video"),
        (
            "kind: conv\n", "kind: conv\n      tokens.video: null\n      tokens.audio: null\n",
            15, "at least two",
        ),
        ("columns:", "plot: {key: model.lora.rr, heading: R}\ncolumns:", 6, "no 'rr'"),
        ("columns:", "demo: {stages.0.steps: 3}\ncolumns:", 6, "Did you mean 'n_steps'?"),
        ("columns:", "grid: {model.lora.r: [1, 1]}\ncolumns:", 11 + 1, "two rows the name 'none-r-1'"),
        ("columns:", "grid: {model.fusion.kind: [conv]}\ncolumns:", 14, "an axis of the grid"),
    ],
)  # fmt: skip
def test_faults_are_named_with_their_line(old: str, new: str, line: int, said: str) -> None:
    assert old in SMALL
    head, _, tail = (
        SMALL.rpartition(old)
        if old in ("name: conv", "model.fusion.n_blocks: 3")
        else SMALL.partition(old)
    )
    text = head + new + tail
    if "grid" in new:
        text = text.replace("columns: [Fusion]", "columns: [Fusion, G]").replace(
            "baseline: none\n", "\n"
        )
    with pytest.raises(SchemaError) as caught:
        _all_of(text, "demo")
    told = str(caught.value).splitlines()
    assert any(one.startswith(f"my.yaml:{line}: ") and said in one for one in told), told


def test_a_view_that_tokens_cannot_serve_is_refused_with_its_row() -> None:
    text = SMALL.replace("model.fusion.n_blocks: 3", "views.video.n_frames: 32")
    with pytest.raises(
        SpecMismatchError, match=r"^my.yaml:15: row 'conv': the video view asks for 32"
    ):
        _all_of(text)


def test_several_faults_are_told_together() -> None:
    text = SMALL.replace("title: Small", "title: 3").replace("kind: split", "kind: x")
    with pytest.raises(SchemaError) as caught:
        parse_sweep(text, "my.yaml")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()] == ["2", "9"]


@pytest.mark.parametrize("text", ["", "- a\n", "just words", "3"])
def test_what_is_no_mapping_is_refused(text: str) -> None:
    with pytest.raises(SchemaError, match=r"^my.yaml: holds no sweep"):
        parse_sweep(text, "my.yaml")


def test_a_file_is_found_by_name_or_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALL, encoding="utf-8")
    sweep = read_sweep(path)
    assert sweep == read_sweep(str(path))
    source = sweep.read_from
    assert source is not None
    assert (source.path, source.text) == (str(path), SMALL)
    assert sweep.where("rows", 1, "set", "model.fusion.n_blocks") == f"{path}:19"
    assert sweep.where("rows", 1, "published", "f1") == f"{path}:15"
    with pytest.raises(SchemaError, match=r"unknown sweep 'table12'. Did you mean 'table1"):
        read_sweep("table12")
    with pytest.raises(SchemaError, match=r"cannot be read \(No such file"):
        read_sweep(str(tmp_path / "none.yaml"))
    path.write_bytes(b"name: \xff")
    with pytest.raises(EmocacheError, match="not a YAML file"):
        read_sweep(path)
