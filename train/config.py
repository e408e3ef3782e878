"""The configuration of a full run, one frozen model per owner, and how overrides reach it.

Precedence: preset < `--with file.yaml` < `key=value`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from cache.errors import SchemaError, near_miss
from cache.schema import Model, decode
from cache.spec import Stream, TokenSpec
from cache.views import AudioView, ImageView, VideoView
from train.prompt import PrefixLayout, PromptStyle, Task


class Tokens(Model):
    """What is stored per stream; weights digests may be open, the store then decides."""

    audio: TokenSpec
    video: TokenSpec
    image: TokenSpec

    @model_validator(mode="after")
    def _under_their_names(self) -> Tokens:
        for name in ("audio", "video", "image"):
            if getattr(self, name).stream != name:
                raise ValueError(
                    f"tokens.{name} is a spec of stream {getattr(self, name).stream!r}"
                )
        return self

    def all(self) -> tuple[TokenSpec, ...]:
        """Return the three specs."""
        return self.audio, self.video, self.image


class Views(Model):
    """What the trainer asks for per stream."""

    audio: AudioView
    video: VideoView
    image: ImageView


class FusionConfig(Model):
    """Conv-Attention pre-fusion: paper section 4.3, widths from the released code."""

    hidden_width: int = Field(gt=0)
    """Middle of every two-layer MLP."""
    width: int = Field(gt=0)
    """Channels that each stream is brought to."""
    n_blocks: int = Field(ge=0)
    """Residual convolution blocks, N of equation 4."""
    out_width: int = Field(gt=0)
    """Channels of a fusion token."""
    dropout: float = Field(ge=0, lt=1)


class LoraConfig(Model):
    """Low-rank updates of the language model."""

    r: int = Field(gt=0)
    alpha: int = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "v_proj")


class LlmConfig(Model):
    """The frozen language model."""

    path: str
    """Folder or hub name of a LLaMA-architecture chat model; `emocache/tiny` is the bundled one."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the frozen weights; what is trained stays float32."""


class ModelConfig(Model):
    """Everything that decides the shape of the model."""

    llm: LlmConfig
    fusion: FusionConfig
    lora: LoraConfig


class OptimConfig(Model):
    """AdamW and its schedule: linear warm-up, one cosine over the stage."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    lr_min: float = Field(ge=0)
    """At the end of the cosine."""
    warmup_steps: int = Field(ge=0)
    """Optimizer steps."""
    weight_decay: float = Field(ge=0)
    """Of matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    batch_size: int = Field(gt=0)
    """Samples per device and forward pass."""
    accumulate: int = Field(default=1, gt=0)
    """Forward passes per optimizer step."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest gradient norm; None, as in the paper, clips nothing."""


class StageConfig(Model):
    """One stage of the curriculum: paper section 4.5."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Folder of the stage in the run."""
    tasks: dict[Task, float]
    """Task -> share of the samples."""
    n_steps: int = Field(gt=0)
    """Optimizer steps."""
    optim: OptimConfig

    @model_validator(mode="after")
    def _some_task(self) -> StageConfig:
        if not self.tasks or min(self.tasks.values()) < 0 or sum(self.tasks.values()) <= 0:
            raise ValueError(f"tasks need positive shares, got {self.tasks}")
        return self


class PromptConfig(Model):
    """How samples become text."""

    style: PromptStyle = "code"
    instructions: str | None = None
    """JSON file of templates; None takes the bundled ones."""
    max_answer_tokens: int = Field(default=1024, gt=1)
    """Longer reasoning is cut; the label stays."""
    use_subtitle: bool = True


class DataConfig(Model):
    """What to do about clips without tokens; never decided by accident."""

    absent: Literal["mask", "drop", "refuse"] = "mask"
    """The clip has no such stream: attention mask, leave the record out, or stop."""
    failed: Literal["mask", "drop", "refuse"] = "refuse"
    """The stream could not be encoded."""
    train_split: str = "train"
    memory_bytes: int = Field(default=2 << 30, ge=0)
    """Views kept in memory, so that a small corpus is read from the store once."""


class Preset(Model):
    """A full named configuration: tokens, views, model, stages."""

    name: str
    tokens: Tokens
    views: Views
    model: ModelConfig
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    prompt: PromptConfig = PromptConfig()
    data: DataConfig = DataConfig()
    seed: int = Field(default=42, ge=0)
    log_every_steps: int = Field(default=50, gt=0)
    save_every_steps: int = Field(default=1000, gt=0)
    bundled_weights: dict[str, str] = Field(default_factory=dict)
    """Encoder kind -> checkpoint file that ships with the project; empty for real encoders."""

    @model_validator(mode="after")
    def _fusable(self) -> Preset:
        n_audio, n_video = (
            self.views.audio.n_tokens,
            self.views.video.n_frames * self.views.video.grid**2,
        )
        if n_audio != n_video:
            raise ValueError(
                f"Conv-Attention pairs audio and video token by token: views.audio.n_tokens is "
                f"{n_audio}, but views.video gives {n_video} (n_frames * grid * grid)"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages share a name: {names}")
        return self

    def view_shapes(self) -> dict[Stream, tuple[int, int]]:
        """Return (tokens, channels) per stream; raises SpecMismatchError for an unservable view."""
        return {
            "audio": self.views.audio.shape(self.tokens.audio),
            "video": self.views.video.shape(self.tokens.video),
            "image": self.views.image.shape(self.tokens.image),
        }

    def layout(self) -> PrefixLayout:
        """Return the prefix: fusion, image, video, audio (paper section 4.1)."""
        n = {stream: shape[0] for stream, shape in self.view_shapes().items()}
        blocks = (
            ("fusion", n["audio"]),
            ("image", n["image"]),
            ("video", n["video"]),
            ("audio", n["audio"]),
        )
        return PrefixLayout(blocks)


def configure(
    preset: Preset, overrides: Sequence[str] = (), with_file: Path | None = None
) -> Preset:
    """Apply a YAML file and `key=value` overrides to a preset.

    Args:
        preset: The starting point.
        overrides: `dotted.path=value`; list items by number (`stages.0.n_steps=10`).
        with_file: YAML or JSON of the same shape as a preset, for example a run's config.json.

    Raises:
        SchemaError: An unknown path, a value that does not fit, or an unreadable file.
    """
    data = preset.model_dump(mode="json")
    if with_file is not None:
        _merge(data, _read_yaml(with_file), str(with_file))
    for item in overrides:
        path, equals, text = item.partition("=")
        if not equals or not path:
            raise SchemaError(
                f"override {item!r} is not key=value. Example: stages.0.optim.lr=1e-5; "
                f"`emocache show {preset.name}` lists the keys."
            )
        _assign(data, path, _parse(text, item))
    return decode(Preset, data, f"preset '{preset.name}'")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise SchemaError(f"{path}: holds no mapping of settings")
    return found


def _parse(text: str, item: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SchemaError(f"override {item!r}: the value is not YAML; quote it") from None


def _merge(data: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    for key, value in new.items():
        if key not in data:
            raise SchemaError(f"{where}: unknown key '{key}'.{near_miss(key, data)}")
        if isinstance(value, dict) and isinstance(data[key], dict):
            _merge(data[key], value, f"{where}, {key}")
        else:
            data[key] = value


def _assign(data: Any, path: str, value: Any) -> None:
    """Set a dotted path in nested dictionaries and lists."""
    parts = path.split(".")
    node = data
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the configuration"
        last = depth == len(parts) - 1
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise SchemaError(
                    f"unknown key '{path}': {where} is a list of {len(node)}; use 0 to {len(node) - 1}"
                )
            key: Any = int(part)
        elif isinstance(node, dict):
            # A mapping of the user's own keys (tasks of a stage) may grow; fields may not.
            if part not in node and not (last and parts[-2:-1] == ["tasks"]):
                raise SchemaError(
                    f"unknown key '{path}': {where} has no '{part}'.{near_miss(part, node)} "
                    f"Allowed: {', '.join(node)}"
                )
            key = part
        else:
            raise SchemaError(f"unknown key '{path}': {where} is a single value ({node!r})")
        if last:
            node[key] = value
        else:
            node = node[key]
