"""A full-size preset with everything that costs time made small, and everything else left as it was.

Ablations compare settings. To go through one in minutes, on a machine without a GPU, networks, pictures
and steps shrink, while what rows differ in keeps its meaning: numbers of tokens, frames and cells, which
encoders there are, what the pre-fusion joins, the order of stages, ratios of learning rates.
"""

from __future__ import annotations

from typing import Any, cast

from cache.encoders import (
    NAMED_ENCODERS,
    Encoder,
    EvaEncoder,
    SoundEncoder,
    VisionEncoder,
    WhisperEncoder,
)
from cache.errors import SchemaError
from cache.spec import TokenSpec
from cache.views import ImageView
from train.config import (
    ExecutionConfig,
    FusionConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    Preset,
    StageConfig,
    Tokens,
)
from train.presets import demo

STEPS_PER_FULL_STEP = 30 / 50_000
"""The paper's stage of 50,000 steps takes 30."""
CLIPS_PER_FULL_CLIP = 16
"""So many clips in a forward pass for each one at full size; a tiny model on few clips needs them."""
LR_RATIO = 30.0
"""Learning rates of the tiny language model to those of the 7B one: 3e-3 to 1e-4."""
MAX_PREFIX_TOKENS = 1600
"""What the tiny language model's 2048 positions leave beside a question and its answer."""

_WIDTH_RATIO, _DEPTH_RATIO, _N_HEADS = 16, 12, 4
_EVA_BLOCKS, _TINY_EVA_BLOCKS = 40, 5
"""Blocks in EVA's checkpoint, and in the bundled one."""


def at_demo_scale(preset: Preset) -> Preset:
    """Return a resolved full-size preset at the size of the bundled tiny networks.

    - Encoders: Whisper-large-v3 and EVA ViT-g become the bundled ones (of EVA as many blocks are left
      out as before), any other a sixteenth as wide and a twelfth as deep, with weights to be made up.
      Different networks stay different.
    - Pictures: 12 patches a side where there were more than 16, else 8, and more where a view would not
      divide them otherwise. Frames, grids and views keep their numbers.
    - Language model: `emocache/tiny`. LoRA has an eighth of the rank, the pre-fusion half the width.
    - Training: 30 steps for 50,000, 16 clips for one, learning rates times 30, gradients clipped at 1.

    `init` is dropped: a full-size model's trained parts fit no tiny one. A preset that is on the tiny
    language model already is returned as it is.

    Raises:
        SchemaError: The prefix would not fit the tiny language model.
    """
    tiny = demo()
    if preset.model.llm.path == tiny.model.llm.path:
        return preset
    image = preset.views.image
    specs = {
        name: _small_spec(spec, image if spec.stream == "image" else None)
        for name, spec in preset.tokens.by_input().items()
    }
    small = preset.model_copy(
        update={
            "name": f"{preset.name}-at-demo-scale",
            "tokens": Tokens(**specs),
            "model": ModelConfig(
                llm=tiny.model.llm,
                fusion=_small_fusion(preset.model.fusion),
                lora=_small_lora(preset.model.lora),
            ),
            "stages": tuple(_small_stage(stage) for stage in preset.stages),
            "init": None,
            "execution": ExecutionConfig(log_every_steps=5, save_every_steps=20),
            "bundled_weights": _bundled([spec.encoder for spec in specs.values()]),
        }
    )
    small = Preset.model_validate(small.model_dump())
    n_prefix = sum(n for _, n in small.layout().blocks)
    if n_prefix > MAX_PREFIX_TOKENS:
        raise SchemaError(
            f"the prefix has {n_prefix} tokens; at demo scale at most {MAX_PREFIX_TOKENS} fit the tiny "
            "language model. Ask for fewer tokens, or leave this row out"
        )
    return small


def bundled_file(encoder: Encoder) -> str | None:
    """Return the name of the bundled checkpoint that holds an encoder's weights, if one does."""
    tiny = demo()
    for spec in tiny.tokens.all():
        open_fields = {"weights_sha256", "depth", "norm", "layer", "padded"}
        wanted = encoder.model_dump(exclude=open_fields)
        if spec.encoder.model_dump(exclude=open_fields) == wanted:
            deep_enough = not isinstance(encoder, EvaEncoder) or encoder.depth <= _TINY_EVA_BLOCKS
            return tiny.bundled_weights[encoder.kind] if deep_enough else None
    return None


def _bundled(encoders: list[Encoder]) -> dict[str, str]:
    """Return the bundled checkpoint of each kind of encoder all of whose networks it holds."""
    files: dict[str, set[str | None]] = {}
    for encoder in encoders:
        files.setdefault(encoder.kind, set()).add(bundled_file(encoder))
    return {
        kind: name for kind, [name, *others] in files.items() if name is not None and not others
    }


def _small_spec(spec: TokenSpec, image: ImageView | None) -> TokenSpec:
    encoder = _small_encoder(spec.encoder)
    fields: dict[str, Any] = {"encoder": encoder}
    if spec.pixels is not None:
        assert isinstance(encoder, VisionEncoder)
        side = _patches_per_side(spec, image)
        fields["pixels"] = spec.pixels.model_copy(update={"size_px": side * encoder.patch_px})
    return spec.model_copy(update=fields)


def _patches_per_side(spec: TokenSpec, image: ImageView | None) -> int:
    """Return a side of few patches that the spec's grid, and the view's join, still divide."""
    full = spec.patches_per_side
    least = min(full, 12 if full > 16 else 8)
    for side in range(max(least, spec.grid or 1), full):
        joined = image is None or side**2 % image.join == 0
        if joined and (spec.grid is None or side % spec.grid == 0 or full % spec.grid != 0):
            return side
    return full


def _small_encoder(encoder: Encoder) -> Encoder:
    """Return an encoder of the same kind at a size that a CPU runs in milliseconds."""
    tiny = {spec.encoder.kind: spec.encoder for spec in demo().tokens.all()}
    if isinstance(encoder, WhisperEncoder) and _is(encoder, "whisper-large-v3"):
        return _with(encoder, tiny["whisper"], "layer", "n_context", "padded")
    if isinstance(encoder, EvaEncoder) and _is(encoder, "eva-g"):
        left_out = _EVA_BLOCKS - encoder.depth
        if 0 <= left_out < _TINY_EVA_BLOCKS:
            small = _with(encoder, tiny["eva"], "norm")
            return small.model_copy(update={"depth": _TINY_EVA_BLOCKS - left_out})
    small = _made_up(encoder, _N_HEADS * max(4, round(encoder.width / _WIDTH_RATIO / _N_HEADS)))
    # By chance of the size of a bundled one, which stands for another network.
    return small if bundled_file(small) is None else _made_up(encoder, small.width + _N_HEADS)


def _made_up(encoder: Encoder, width: int) -> Encoder:
    fields: dict[str, Any] = {"width": width, "n_heads": _N_HEADS, "weights_sha256": None}
    if isinstance(encoder, SoundEncoder):
        fields["n_layers"] = _fewer(encoder.n_layers)
        if encoder.layer is not None:
            fields["layer"] = encoder.layer * fields["n_layers"] // encoder.n_layers
    else:
        fields["depth"] = _fewer(encoder.depth)
    if not isinstance(encoder, WhisperEncoder):
        fields["mlp_width"] = round(encoder.mlp_width * width / encoder.width)
    return encoder.model_copy(update=fields)


def _fewer(n_blocks: int) -> int:
    return max(1, round(n_blocks / _DEPTH_RATIO))


def _is(encoder: Encoder, name: str) -> bool:
    """Return whether an encoder has the sizes of a named one, whatever runs of it."""
    named = NAMED_ENCODERS[name]
    sizes = ("width", "n_heads", "n_layers", "n_mels", "mlp_width", "patch_px")
    return all(getattr(encoder, key) == named[key] for key in sizes if key in named)


def _with(encoder: Encoder, tiny: Encoder, *kept: str) -> Encoder:
    """Return the bundled network, used as the full one is; its layer by share of the depth."""
    fields = {key: getattr(encoder, key) for key in kept}
    if fields.get("layer") is not None:
        full, small = cast(SoundEncoder, encoder), cast(SoundEncoder, tiny)
        fields["layer"] = fields["layer"] * small.n_layers // full.n_layers
    return tiny.model_copy(update=fields)


def _small_fusion(fusion: FusionConfig) -> FusionConfig:
    n_heads = min(fusion.n_heads, 4)
    return fusion.model_copy(
        update={
            "hidden_width": max(8, fusion.hidden_width // 4),
            "width": n_heads * max(2, fusion.width // 2 // n_heads),
            "n_blocks": (fusion.n_blocks + 1) // 2,
            "out_width": max(8, fusion.out_width // 4),
            "n_heads": n_heads,
        }
    )


def _small_lora(lora: LoraConfig) -> LoraConfig:
    return lora.model_copy(update={"r": max(1, lora.r // 8)})


def _small_stage(stage: StageConfig) -> StageConfig:
    n_steps = max(2, round(stage.n_steps * STEPS_PER_FULL_STEP))
    return stage.model_copy(
        update={"n_steps": n_steps, "optim": _small_optim(stage.optim, stage.n_steps, n_steps)}
    )


def _small_optim(optim: OptimConfig, full_steps: int, n_steps: int) -> OptimConfig:
    # A fiftieth of 30 steps is no warm-up; an eighth is what so few steps need.
    warmup = max(n_steps // 8, round(optim.warmup_steps * n_steps / full_steps))
    return optim.model_copy(
        update={
            "lr": optim.lr * LR_RATIO,
            "lr_min": optim.lr_min * LR_RATIO,
            "warmup_steps": min(n_steps, warmup) if optim.warmup_steps else 0,
            "batch_size": min(64, optim.batch_size * CLIPS_PER_FULL_CLIP),
            "grad_clip": optim.grad_clip or 1.0,
        }
    )
