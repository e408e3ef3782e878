"""The configuration of a full run, one frozen model per owner, and how overrides reach it.

Precedence: preset < `--with file.yaml` < `key=value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from cache.errors import SchemaError
from cache.overrides import configured
from cache.schema import Model
from cache.spec import Stream, TokenSpec
from cache.views import AudioView, ImageView, VideoView
from train.prompt import PrefixLayout, PromptStyle
from train.text.tasks import Asked, Task, tasks_of

Input = Literal["audio", "video", "image", "local"]
"""What a model may read of a clip: one token tensor of each. `local` is a second one of the video
stream, for the predecessor's face tokens; the others are called after their streams."""
INPUTS: tuple[Input, ...] = get_args(Input)
STREAM_OF: Mapping[Input, Stream] = {
    "audio": "audio", "video": "video", "image": "image", "local": "video"
}  # fmt: skip
FUSED: tuple[Input, ...] = ("audio", "image", "video")
"""Inputs that the pre-fusion takes, in the order of the paper's equation 2; of the image its CLS token."""
Block = Literal["fusion", "image", "video", "audio", "local", "cls"]
"""A part of the prefix: an input's view, the fusion tokens, or the image's CLS token by itself."""


class Tokens(Model):
    """What is stored per input; weights digests may be open, the store then decides.

    None, `tokens.video=null`, leaves an input out of the model.
    """

    audio: TokenSpec | None = None
    video: TokenSpec | None = None
    image: TokenSpec | None = None
    local: TokenSpec | None = None

    @model_validator(mode="after")
    def _of_their_streams(self) -> Tokens:
        for name, spec in self.by_input().items():
            if spec.stream != STREAM_OF[name]:
                raise ValueError(
                    f"tokens.{name} is a spec of stream {spec.stream!r}, it needs {STREAM_OF[name]!r}"
                )
        if not self.by_input():
            raise ValueError(f"a model without any input; give at least one of {', '.join(INPUTS)}")
        return self

    def by_input(self) -> dict[Input, TokenSpec]:
        """Return the specs of the inputs that the model has, in the order of `INPUTS`."""
        found = {name: getattr(self, name) for name in INPUTS}
        return {name: spec for name, spec in found.items() if spec is not None}

    def all(self) -> tuple[TokenSpec, ...]:
        """Return the specs, each once."""
        return tuple({spec.canonical_json(): spec for spec in self.by_input().values()}.values())


class Views(Model):
    """What the trainer asks for per input; a view of an input that the model lacks says nothing."""

    audio: AudioView | None = None
    video: VideoView | None = None
    image: ImageView | None = None
    local: VideoView | None = None


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
    """`v1`, as the predecessor: two splice points, `<video>...</video> <feature>...</feature>`."""
    instructions: str | None = None
    """JSON file of templates, or `emocache/v1` for the predecessor's pools; None takes the bundled ones."""
    chat: Literal["auto", "llama-2"] = "auto"
    """Whose turns surround a sample: the tokenizer's chat template where it has one, or always
    `[INST] ... [/INST]`."""
    max_answer_tokens: int = Field(default=1024, gt=1)
    """Longer reasoning is cut; the label stays."""
    use_subtitle: bool = True
    subtitle_language: str | dict[str, str] | None = None
    """`en`, `zh`, ...: subtitles in this language alone, or one by corpus, as `{mer2023: en}`; None, and
    for corpora that are not named, takes each record's first."""
    eval_subtitle_language: str | dict[str, str] | None = None
    """The same where the model is asked, not trained; None, and for corpora that are not named, takes
    the language of training. The released code trains on English subtitles of MER2023 and asks with
    Chinese ones."""
    eval_bos: Literal[1, 2] = 1
    """Begin-of-sequence tokens where the model is asked; 2, as the released code, is one more than in
    training."""
    option_list: Literal["full", "label_conditional"] = "full"
    """`label_conditional`, as the released code: lists without neutral, but only where the true label
    is another one. It tells the model something about the answer."""
    neutral_free_share: float = Field(default=0.5, ge=0, le=1)
    """Share of such lists with `label_conditional`; the released code has 0.5 to 0.8 by corpus."""
    description_version: str | None = None
    """Of several descriptions that fit a task take those of this version, where there are any; None takes
    turns. `fine`, of MERR-Fine, is what the predecessor's second stage learns: with `style=v1` such answers
    are asked for by `[reason_v2]`, also where the model is asked."""
    answer_norm: Literal["keep", "blip"] = "keep"
    """`blip`, as the released code: lower case, no punctuation, at most 200 words."""

    def language(self, corpus: str, *, asking: bool = False) -> str | None:
        """Return in which language subtitles of a corpus are read; None: whichever comes first.

        Args:
            corpus: First part of a uid.
            asking: A trained model is asked.
        """
        given = (self.eval_subtitle_language if asking else None, self.subtitle_language)
        for found in given:
            language = found.get(corpus) if isinstance(found, dict) else found
            if language is not None:
                return language
        return None


class DataConfig(Model):
    """What to do about clips without tokens; never decided by accident."""

    absent: Literal["mask", "drop", "refuse"] = "mask"
    """The clip has no such stream: attention mask, leave the record out, or stop."""
    failed: Literal["mask", "drop", "refuse"] = "refuse"
    """The stream could not be encoded."""
    mask_missing: bool = True
    """False, as the released code: a masked stream's zeros are attended to."""
    corpora: tuple[str, ...] | None = None
    """Train and validate on records of these corpora alone; None takes all that the manifest has."""
    train_share: float = Field(default=1.0, gt=0, le=1)
    """Share of each corpus's training records to train on, drawn by `seed`; of two shares the smaller
    one is a part of the larger."""
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
    prefix: tuple[tuple[Block, ...], ...] = (("fusion", "image", "video", "audio"),)
    """Blocks in the order in which they enter the sequence, one group per splice point of the prompt
    (paper, section 4.1). Blocks of inputs that the model lacks are left out."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    prompt: PromptConfig = PromptConfig()
    data: DataConfig = DataConfig()
    init: str | None = None
    """Trained parts to start the first stage from: a run, one of its stages' folders, or what
    `emocache import-checkpoint` wrote; None starts from scratch."""
    execution: ExecutionConfig = ExecutionConfig()
    seed: int = Field(default=42, ge=0, lt=2**63)
    bundled_weights: dict[str, str] = Field(default_factory=dict)
    """Encoder kind -> checkpoint file that ships with the project; empty for real encoders."""

    @model_validator(mode="after")
    def _fusable(self) -> Preset:
        fusion, views = self.model.fusion, self.views
        if fusion.kind == "none":
            return self
        fused = [name for name in FUSED if getattr(self.tokens, name) is not None]
        if len(fused) < 2:
            raise ValueError(
                f"{fusion.kind} fuses at least two of {', '.join(FUSED)}, the model reads {fused or 'none'}; "
                "set model.fusion.kind=none"
            )
        pairs = fusion.kind in ("attention", "conv", "conv-attention")
        if not pairs or fusion.n_tokens is not None or not {"audio", "video"} <= {*fused}:
            return self
        if views.audio is None or views.video is None:
            return self  # said by _viewed
        n_audio, n_video = views.audio.n_tokens, views.video.n_frames * views.video.grid**2
        if n_audio != n_video:
            raise ValueError(
                f"{fusion.kind} pairs audio and video token by token: views.audio.n_tokens is "
                f"{n_audio}, but views.video gives {n_video} (n_frames * grid * grid). Set "
                "model.fusion.n_tokens to bring both to one number"
            )
        return self

    @model_validator(mode="after")
    def _viewed(self) -> Preset:
        for name in self.tokens.by_input():
            if getattr(self.views, name) is None:
                raise ValueError(
                    f"tokens.{name} is given without views.{name}, which says how many tokens the model "
                    "takes of it"
                )
        return self

    @model_validator(mode="after")
    def _placed(self) -> Preset:
        blocks = [block for group in self.prefix for block in group]
        twice = sorted({block for block in blocks if blocks.count(block) > 1})
        if twice:
            raise ValueError(f"prefix names {', '.join(twice)} twice")
        entering: set[str] = {*blocks}
        entering |= {"image"} if "cls" in blocks else set()
        entering |= {*FUSED} if self.model.fusion.kind != "none" and "fusion" in blocks else set()
        left_out = [name for name in self.tokens.by_input() if name not in entering]
        if left_out:
            raise ValueError(
                f"prefix has no place for {', '.join(left_out)}, though tokens.{left_out[0]} is given"
            )
        if self.model.fusion.kind != "none" and "fusion" not in blocks:
            raise ValueError(
                "prefix has no place for fusion; add it, or set model.fusion.kind=none"
            )
        n_splices = 2 if self.prompt.style == "v1" else 1
        if len(self.prefix) != n_splices:
            raise ValueError(
                f"prompt.style={self.prompt.style} has {n_splices} splice point{'s' * (n_splices > 1)}, "
                f"but prefix has {len(self.prefix)} groups of blocks"
            )
        return self

    @model_validator(mode="after")
    def _stages_apart(self) -> Preset:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages share a name: {names}")
        return self

    def view_shapes(self) -> dict[Input, tuple[int, int]]:
        """Return (tokens, channels) per input; raises SpecMismatchError for an unservable view."""
        specs = self.tokens.by_input()
        return {name: getattr(self.views, name).shape(spec) for name, spec in specs.items()}

    def hidden_inputs(self, streams: Iterable[str]) -> tuple[Input, ...]:
        """Return the inputs that are masked where some streams are."""
        hidden = set(streams)
        return tuple(name for name in self.tokens.by_input() if STREAM_OF[name] in hidden)

    def layout(self) -> PrefixLayout:
        """Return the prefix: fusion, image, video, audio (paper section 4.1), or as `prefix` says.

        Raises:
            SpecMismatchError: A view that the tokens cannot serve.
            SchemaError: A prefix without a token.
        """
        n: dict[Block, int] = {name: shape[0] for name, shape in self.view_shapes().items()}
        if self.tokens.image is not None:
            n["cls"] = 1
        fusion = self.model.fusion
        if fusion.kind != "none":
            own = {"q-former": fusion.n_queries, "affectgpt-attention": 1}
            paired = n.get("audio") or n.get("video", 0)
            n["fusion"] = own.get(fusion.kind, fusion.n_tokens or paired)
        groups = tuple(
            tuple((block, n[block]) for block in group if n.get(block)) for group in self.prefix
        )
        if not any(groups):
            raise SchemaError(
                f"nothing of a clip enters the sequence: of {', '.join(self.tokens.by_input())} no block "
                f"of the prefix {[list(group) for group in self.prefix]} has a token. Of an image whose "
                "CLS token alone is stored, put `cls` into the prefix."
            )
        return PrefixLayout.of_groups(groups)


GROWING = ("tasks", "modality_dropout", "corpora")
"""Fields that map a user's own keys: an override may add to them."""


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
        growing=GROWING,
    )
