"""A preset at demo scale: what shrinks, and what rows of an ablation differ in, which does not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from cache.encoders import NAMED_ENCODERS
from cache.errors import SchemaError
from cache.recipes import token_specs
from cache.spec import TokenSpec, differences
from extract import tiny as bundled
from train.config import Preset, configure
from train.presets import PRESETS, demo, preset, v1, v2, v2_released
from train.scaling import MAX_PREFIX_TOKENS, at_demo_scale, bundled_file

FULL = [name for name in PRESETS if not name.startswith("demo")]


def _with_tokens(**specs: TokenSpec | None) -> Preset:
    """v2 with other tokens, without a pre-fusion."""
    start = v2()
    fields: dict[str, Any] = start.model_dump()
    fields["tokens"] |= {name: spec and spec.model_dump() for name, spec in specs.items()}
    fields["model"]["fusion"]["kind"] = "none"
    return Preset.model_validate(fields)


@pytest.mark.parametrize("name", FULL)
def test_numbers_of_tokens_and_all_that_is_no_size_stay(name: str) -> None:
    full = preset(name)
    small = at_demo_scale(full)
    assert set(small.tokens.by_input()) == set(full.tokens.by_input())
    assert small.views == full.views
    assert small.prefix == full.prefix
    blocks, full_blocks = dict(small.layout().blocks), dict(full.layout().blocks)
    assert blocks.keys() == full_blocks.keys()
    assert all(n == full_blocks[block] for block, n in blocks.items() if block != "image")
    for part in ("prompt", "data", "seed"):
        assert getattr(small, part) == getattr(full, part)
    for one, other in zip(small.stages, full.stages, strict=True):
        assert (one.name, one.tasks, one.corpora) == (other.name, other.tasks, other.corpora)
    sizes = {"width", "n_layers", "depth", "n_heads", "mlp_width", "n_mels"}
    for one_spec, other_spec in zip(small.tokens.all(), full.tokens.all(), strict=True):
        changed = differences(one_spec, other_spec)
        assert set(changed) <= {f"encoder.{field}" for field in sizes} | {"pixels.size_px"}
    fusions = differences(small.model.fusion, full.model.fusion)
    assert set(fusions) <= {"hidden_width", "width", "n_blocks", "out_width"}


def test_the_paper_s_model_runs_on_the_bundled_networks() -> None:
    small, tiny = at_demo_scale(v2()), demo()
    assert small.tokens == tiny.tokens
    assert small.bundled_weights == tiny.bundled_weights
    assert small.model.llm == tiny.model.llm
    assert (small.stages[0].n_steps, small.stages[0].optim.batch_size) == (30, 16)
    assert small.stages[0].optim.lr == pytest.approx(tiny.stages[0].optim.lr)


def test_as_many_of_eva_s_blocks_are_left_out_as_at_full_size() -> None:
    released = at_demo_scale(v2_released()).tokens
    assert released.video is not None
    assert released.image is not None
    video, image = released.video.encoder, released.image.encoder
    # The bundled file has five blocks and a norm, EVA's has 40 and one; the paper takes 39.
    assert differences(video, image) == {"depth": (5, 4), "norm": ("checkpoint", "affine_free")}
    assert bundled_file(video) == bundled_file(image) == "eva_tiny.safetensors"


def test_different_networks_stay_different() -> None:
    specs = [spec for name in NAMED_ENCODERS for spec in token_specs(name)]
    small = []
    for spec in specs:
        none: dict[str, TokenSpec | None] = dict.fromkeys(("audio", "video", "image"))
        whole = _with_tokens(**{**none, spec.stream: spec})
        views = {"views.video.n_frames": min(16, spec.n_steps)} if spec.stream == "video" else {}
        whole = configure(whole, [f"{key}={value}" for key, value in views.items()])
        [one] = at_demo_scale(whole).tokens.all()
        small.append(one)
    for (a, tiny_a), (b, tiny_b) in itertools.combinations(zip(specs, small, strict=True), 2):
        assert (a == b) == (tiny_a == tiny_b), (a, b)
    for one in small:
        file = bundled_file(one.encoder)
        assert file is None or Path(bundled.__file__).with_name(file).is_file()
        assert one.encoder.width <= 96


def test_weights_are_bundled_for_a_kind_only_if_for_all_its_networks() -> None:
    clip, eva = token_specs("clip-large:video,eva-g:video")
    shallow = eva.model_copy(update={"encoder": eva.encoder.model_copy(update={"depth": 12})})
    assert at_demo_scale(_with_tokens(video=clip)).bundled_weights == demo().bundled_weights
    mixed = at_demo_scale(_with_tokens(video=shallow))
    assert mixed.bundled_weights == {"whisper": "whisper_tiny.pt"}


@pytest.mark.parametrize("layer", [0, 8, 23, 31])
def test_a_layer_is_taken_by_its_share_of_the_depth(layer: int) -> None:
    full = configure(v2(), [f"tokens.audio.encoder.layer={layer}"])
    audio = at_demo_scale(full).tokens.audio
    assert audio is not None
    small: Any = audio.encoder
    assert small.layer == layer * 2 // 32  # the bundled Whisper has two blocks


def test_ratios_of_rates_and_lengths_are_kept() -> None:
    first, second = at_demo_scale(v1()).stages
    assert first.optim.lr / second.optim.lr == pytest.approx(10)  # 1e-5 and 1e-6
    assert second.optim.lr_min == pytest.approx(second.optim.lr)
    assert second.optim.warmup_steps == 0
    assert 0 < first.optim.warmup_steps < first.n_steps
    curriculum, joint = (at_demo_scale(preset(name)).stages for name in ("v2", "v2-single-joint"))
    assert joint[0].n_steps == sum(stage.n_steps for stage in curriculum)
    assert first.n_steps == 3 * curriculum[0].n_steps  # 150,000 and 50,000


@pytest.mark.parametrize("join", [1, 2, 4, 8, 16, 64])
def test_patches_of_the_frame_still_divide_into_the_view_s_tokens(join: int) -> None:
    full = configure(v2(), [f"views.image.join={join}", "model.fusion.kind=none"])
    n_tokens, width = at_demo_scale(full).view_shapes()["image"]
    assert n_tokens >= 1
    assert width == 96 * join


@pytest.mark.parametrize("grid", [1, 2, 4, 8, 16])
def test_a_grid_is_stored_as_at_full_size(grid: int) -> None:
    full = configure(v2(), [f"tokens.video.grid={grid}", "views.video.grid=1"])
    video = at_demo_scale(full).tokens.video
    assert video is not None
    assert video.grid == grid
    assert video.patches_per_side % grid == 0


def test_a_tiny_preset_is_returned_as_it_is() -> None:
    assert at_demo_scale(demo()) == demo()
    small = at_demo_scale(v2())
    assert at_demo_scale(small) == small


def test_trained_parts_of_a_full_size_model_are_dropped() -> None:
    assert at_demo_scale(configure(v2(), ["init=somewhere"])).init is None


def test_a_prefix_too_long_for_the_tiny_language_model_is_refused() -> None:
    fitting = ["tokens.video.grid=8", "views.video.grid=8"]
    assert (
        sum(n for _, n in at_demo_scale(configure(v2(), fitting)).layout().blocks)
        <= MAX_PREFIX_TOKENS
    )
    long = [*fitting, "tokens.video.frames.n_frames=32", "views.video.n_frames=32"]
    with pytest.raises(SchemaError, match=r"prefix has 2212 tokens; at demo scale at most 1600"):
        at_demo_scale(configure(v2(), long))
