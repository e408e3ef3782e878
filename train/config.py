"""The configuration of a full run, one frozen model per owner, and how overrides reach it.

Precedence: preset < `--with file.yaml` < `key=value`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from cache.overrides import configured
from cache.schema import Model
from cache.spec import Stream, TokenSpec
from cache.views import AudioView, ImageView, VideoView
from train.prompt import PrefixLayout, PromptStyle
from train.tasks import Asked, Task, tasks_of


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


FusionKind = Literal[
    "none", "q-former", "affectgpt-attention", "attention", "conv", "conv-attention"
]
"""The pre-fusion variants of the paper's Tables 8 and 9."""


class FusionConfig(Model):
    """Pre-fusion: paper section 4.3, Tables 8 and 9; widths from the released code."""

    kind: FusionKind = "conv-attention"
    """`none` leaves the fusion tokens out of the prefix; see `train.fusion`."""
    hidden_width: int = Field(gt=0)
    """Middle of every two-layer MLP."""
    width: int = Field(gt=0)
    """Channels that each stream is brought to."""
    n_blocks: int = Field(ge=0)
    """Residual convolution blocks, N of equation 4."""
    out_width: int = Field(gt=0)
    """Channels of a fusion token."""
    dropout: float = Field(ge=0, lt=1)
    n_tokens: int | None = Field(default=None, gt=0)
    """Tokens that audio and video are brought to before they are paired, so that either may have
    any number in the prefix; None takes the views' own number, which must then be equal."""
    gate: Literal["linear", "softmax"] = "linear"
    """Weights of the attention branch as they are, as in the released code, or positive with sum 1."""
    n_queries: int = Field(default=32, gt=0)
    """Q-Former: learnt queries, which become the fusion tokens."""
    n_layers: int = Field(default=2, gt=0)
    """Q-Former: blocks of self-attention, cross-attention and feed-forward."""
    n_heads: int = Field(default=4, gt=0)
    """Q-Former: heads of `width` / `n_heads` channels each."""

    @model_validator(mode="after")
    def _divisible(self) -> FusionConfig:
        if self.kind == "q-former" and self.width % self.n_heads:
            raise ValueError(
                f"a Q-Former's width ({self.width}) is divided among n_heads ({self.n_heads}) heads; "
                "choose a multiple"
            )
        return self


class LoraConfig(Model):
    """Low-rank updates of the language model."""

    r: int = Field(gt=0)
    alpha: int = Field(gt=0)
    dropout: float = Field(ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Last parts of the names of linear layers."""


class LlmConfig(Model):
    """The frozen language model."""

    path: str
    """Folder or hub name of a causal chat model; `emocache/tiny` is the bundled one."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the frozen weights; what is trained stays float32."""
    quantize: Literal["8bit", "4bit"] | None = None
    """Frozen weights by bitsandbytes (needs CUDA); `dtype` is then that of the arithmetic."""


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
    """Clips per device and forward pass, unless `max_tokens` is set."""
    max_tokens: int | None = Field(default=None, gt=0)
    """Positions per device and forward pass: as many clips as fit, instead of `batch_size`."""
    accumulate: int = Field(default=1, gt=0)
    """Forward passes per device and optimizer step."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest gradient norm; None, as in the paper, clips nothing."""
    loss_average: Literal["sample", "token"] = "sample"
    """Every answer counts the same, as with the reference's batches of one, or every answer token."""


class CorpusShare(Model):
    """How much of a stage comes from one corpus."""

    weight: float = Field(ge=0)
    """Relative to the other corpora of the stage."""
    tasks: dict[Asked, float] | None = None
    """Task or family -> share within this corpus; None takes the stage's."""

    @model_validator(mode="after")
    def _some_task(self) -> CorpusShare:
        if self.tasks is not None:
            _check_shares(self.tasks, "tasks")
        return self


class StageConfig(Model):
    """One stage of the curriculum: paper section 4.5."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Folder of the stage in the run."""
    tasks: dict[Asked, float]
    """Task -> share of the samples. `recognition` and `joint` stand for whichever label tasks, and
    whichever think tasks, a record can answer."""
    corpora: dict[str, CorpusShare] = Field(default_factory=dict)
    """Corpus (the first part of a uid) -> its share; empty draws every record equally often."""
    pairs_per_clip: int = Field(default=1, gt=0)
    """Questions about a clip whenever it is drawn; they share one encoded prefix."""
    modality_dropout: dict[Stream, float] = Field(default_factory=dict)
    """Stream -> share of the draws in which it is masked, though the clip has it; one always stays."""
    n_steps: int = Field(gt=0)
    """Optimizer steps."""
    optim: OptimConfig

    @model_validator(mode="after")
    def _shares(self) -> StageConfig:
        _check_shares(self.tasks, "tasks")
        if self.corpora:
            _check_shares({name: c.weight for name, c in self.corpora.items()}, "corpora")
        for stream, share in self.modality_dropout.items():
            if not 0 <= share < 1:
                raise ValueError(f"modality_dropout.{stream} must be in [0, 1), got {share}")
        return self


def stage_tasks(stage: StageConfig, corpus: str | None = None) -> dict[Asked, float]:
    """Return the tasks and families that have a share, of a corpus or of the stage in general."""
    own = stage.corpora[corpus].tasks if corpus in stage.corpora else None
    return {asked: share for asked, share in (own or stage.tasks).items() if share > 0}


def tasks_asked(stage: StageConfig) -> tuple[Task, ...]:
    """Return every task that a stage may ask, of any corpus, each once."""
    drawn: list[str | None] = [name for name, c in stage.corpora.items() if c.weight > 0]
    names = [asked for corpus in drawn or [None] for asked in stage_tasks(stage, corpus)]
    return tuple(dict.fromkeys(task for asked in names for task in tasks_of(asked)))


def _check_shares(shares: Mapping[Any, float], what: str) -> None:
    """Refuse an empty mixture."""
    if not shares or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(
            f"{what} need positive shares, got {dict(shares)}; an empty mixture trains nothing"
        )


class PromptConfig(Model):
    """How samples become text."""

    style: PromptStyle = "code"
    instructions: str | None = None
    """JSON file of templates; None takes the bundled ones."""
    chat: Literal["auto", "llama-2"] = "auto"
    """Whose turns surround a sample: the tokenizer's chat template where it has one, or always
    `[INST] ... [/INST]`."""
    max_answer_tokens: int = Field(default=1024, gt=1)
    """Longer reasoning is cut; the label stays."""
    use_subtitle: bool = True
    subtitle_language: str | None = None
    """`en`, `zh`, ...: subtitles in this language alone; None takes each record's first."""
    option_list: Literal["full", "label_conditional"] = "full"
    """`label_conditional`, as the released code: lists without neutral, but only where the true label
    is another one. It tells the model something about the answer."""
    neutral_free_share: float = Field(default=0.5, ge=0, le=1)
    """Share of such lists with `label_conditional`; the released code has 0.5 to 0.8 by corpus."""
    answer_norm: Literal["keep", "blip"] = "keep"
    """`blip`, as the released code: lower case, no punctuation, at most 200 words."""


class DataConfig(Model):
    """What to do about clips without tokens; never decided by accident."""

    absent: Literal["mask", "drop", "refuse"] = "mask"
    """The clip has no such stream: attention mask, leave the record out, or stop."""
    failed: Literal["mask", "drop", "refuse"] = "refuse"
    """The stream could not be encoded."""
    mask_missing: bool = True
    """False, as the released code: a masked stream's zeros are attended to."""
    train_split: str = "train"
    val_split: str | None = "val"
    """Records to validate on; None, or a split that no record is in, validates nothing."""
    memory_bytes: int = Field(default=2 << 30, ge=0)
    """Views kept in memory, so that a small corpus is read from the store once."""


class ExecutionConfig(Model):
    """How a run is computed and watched. A continued run may change all of it: no sample differs."""

    attention: Literal["packed", "padded"] = "packed"
    """Clips of a forward pass end to end in one sequence, or as padded rows; equal numbers."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: a third more arithmetic, far less memory."""
    compile: bool = False
    """Compile the language model's blocks with torch.compile; pays in long runs on a GPU."""
    n_workers: int = Field(default=2, ge=0)
    """Threads that prepare batches; 0 prepares each when it is needed."""
    n_ahead: int = Field(default=4, gt=0)
    """Batches that are prepared ahead."""
    log_every_steps: int = Field(default=50, gt=0)
    save_every_steps: int = Field(default=1000, gt=0)
    keep_last: int = Field(default=2, gt=0)
    """Checkpoints to continue from that are kept."""
    validate_every_steps: int | None = Field(default=None, gt=0)
    """None validates at the end of a stage only."""
    max_val_records: int = Field(default=256, gt=0)
    """The first so many, in an order of their own, of the validation split."""
    best_metric: Literal["loss", "token_accuracy"] = "loss"
    """Of validation: decides what is kept as `best`."""


class Preset(Model):
    """A full named configuration: tokens, views, model, stages."""

    name: str
    tokens: Tokens
    views: Views
    model: ModelConfig
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    prompt: PromptConfig = PromptConfig()
    data: DataConfig = DataConfig()
    init: str | None = None
    """Trained parts to start the first stage from: a run, one of its stages' folders, or what
    `emocache import-checkpoint` wrote; None starts from scratch."""
    execution: ExecutionConfig = ExecutionConfig()
    seed: int = Field(default=42, ge=0)
    bundled_weights: dict[str, str] = Field(default_factory=dict)
    """Encoder kind -> checkpoint file that ships with the project; empty for real encoders."""

    @model_validator(mode="after")
    def _fusable(self) -> Preset:
        n_audio, n_video = (
            self.views.audio.n_tokens,
            self.views.video.n_frames * self.views.video.grid**2,
        )
        fusion = self.model.fusion
        pairs = fusion.kind in ("attention", "conv", "conv-attention")
        if pairs and fusion.n_tokens is None and n_audio != n_video:
            raise ValueError(
                f"{fusion.kind} pairs audio and video token by token: views.audio.n_tokens is "
                f"{n_audio}, but views.video gives {n_video} (n_frames * grid * grid). Set "
                "model.fusion.n_tokens to bring both to one number"
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
        fusion = self.model.fusion
        n_fusion = {
            "none": 0,
            "q-former": fusion.n_queries,
            "affectgpt-attention": 1,
        }.get(fusion.kind, fusion.n_tokens or n["audio"])
        blocks = (
            ("fusion", n_fusion),
            ("image", n["image"]),
            ("video", n["video"]),
            ("audio", n["audio"]),
        )
        return PrefixLayout(tuple(block for block in blocks if block[1]))


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
    return configured(
        preset,
        overrides,
        with_file,
        name=preset.name,
        example="stages.0.optim.lr=1e-5",
        growing=("tasks", "modality_dropout", "corpora"),
    )
