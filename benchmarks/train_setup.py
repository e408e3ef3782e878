"""What `train.py` trains: models of random weights, made-up clips in a store, and online encoders."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import train_flops

from cache.clip import Clip, Description, Record, Subtitle
from cache.commit import ClipTokens, Status
from cache.encoders import NAMED_ENCODERS, EvaEncoder, WhisperEncoder
from cache.labels import LabelSpace
from cache.layout import CLIPS_PER_SHARD
from cache.manifest import Header
from cache.reader import TokenReader
from cache.spec import STREAMS, Stream, TokenSpec
from cache.store import TokenStore
from train.batches.loading import to_device
from train.batches.reading import ViewReader, Views
from train.config import DataConfig, ExecutionConfig, LlmConfig, Preset, StageConfig, Tokens
from train.data import PrefixBatch, Renderer, collate, model_arguments
from train.llm.backbone import TINY_LLM, decoder_layers, load_tokenizer
from train.mixture import Mixture
from train.model import EmotionLlama
from train.packing import Grouper, Pack, Planner
from train.presets import v2
from train.running.stage import make_optimizer

if TYPE_CHECKING:
    from extract.encoders.bank import EncoderBank

LABELS = ("happy", "sad", "angry", "fear", "surprised", "neutral")
# Some are one token of the bundled tokenizer, some several: about 1.4 tokens a word, as English is
# for LLaMA-2's.
WORDS = (
    *"face eyes brows lips mouth jaw voice tone speech words sound pace notes person video clip".split(),
    *"calm loud soft harsh rough smooth slow fast quick bright gentle lively heavy tight wide".split(),
    *"raised lowered lifted drawn opened curved pulled knitted shows says feels seen with from and".split(),
    *"the his her while speaker shoulders forward camera suddenly".split(),
)
Precision = Literal["float32", "bfloat16"]
NATIVE_PX = 224
"""Picture size that position tables are made for."""


@dataclass(frozen=True)
class Scale:
    """How large everything is."""

    name: str
    llm: dict[str, int]
    """Sizes of `LlamaConfig`."""
    dtype: str
    whisper: WhisperEncoder
    eva: EvaEncoder
    """The encoders of the section online."""
    n_clips: int
    repeats: int
    matmul: int
    """Side of the matrix product that is the measure of speed."""
    budgets: tuple[int | None, ...]
    """Positions per forward pass for which FLOP/s are measured; None: one clip."""
    data_budgets: tuple[int | None, ...]
    data_steps: int
    pack_clips: int
    """Clips per batch where packed and padded are compared."""
    is_quick: bool = False


_TRUE = {
    "whisper": WhisperEncoder.model_validate(NAMED_ENCODERS["whisper-large-v3"]),
    "eva": EvaEncoder.model_validate(NAMED_ENCODERS["eva-g"]),
}
LLAMA_2_7B = {
    **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
    **{"intermediate_size": 11008, "vocab_size": 32000},
}
FULL_SCALE = Scale(
    name="LLaMA-2-7B's sizes (4096 x 32), bfloat16",
    llm=LLAMA_2_7B,
    dtype="bfloat16",
    **_TRUE,
    n_clips=96,
    repeats=7,
    matmul=8192,
    budgets=(None, 4096, 8192),
    data_budgets=(None, 4096),
    data_steps=40,
    pack_clips=8,
)
CPU_SCALE = Scale(
    name="hidden 1024 x 8 layers, float32",
    llm={
        **{"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8},
        **{"intermediate_size": 2752, "vocab_size": 768},
    },
    dtype="float32",
    whisper=WhisperEncoder(width=384, n_layers=4, n_heads=6, n_mels=80),
    eva=EvaEncoder(width=384, depth=7, n_heads=6, mlp_width=1536),
    n_clips=64,
    repeats=7,
    matmul=3072,
    budgets=(None, 1400, 2080),
    data_budgets=(None,),
    data_steps=8,
    pack_clips=4,
)
QUICK_SCALE = Scale(
    name="hidden 64 x 2 layers: figures mean nothing",
    llm={
        **{"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"intermediate_size": 128, "vocab_size": 768},
    },
    dtype="float32",
    whisper=WhisperEncoder(width=64, n_layers=1, n_heads=2, n_mels=80),
    eva=EvaEncoder(width=64, depth=1, n_heads=2, mlp_width=128),
    n_clips=8,
    repeats=2,
    matmul=256,
    budgets=(None, 2080),
    data_budgets=(None,),
    data_steps=3,
    pack_clips=2,
    is_quick=True,
)


# ---------------------------------------------------------------- made-up clips


def words(rng: np.random.Generator, n: int) -> str:
    """Return a sentence of `n` made-up words."""
    return " ".join(rng.choice(WORDS, n)) + "."


def described(record: Record, number: int) -> Record:
    """Return a record with a label, a subtitle of 4 to 15 words and reasoning of 40 to 150 words."""
    rng = np.random.default_rng([2, number])
    return record.model_copy(
        update={
            "split": "train",
            "emotion": LABELS[number % len(LABELS)],
            "subtitles": (Subtitle(text=words(rng, int(rng.integers(4, 15, endpoint=True)))),),
            "descriptions": (
                Description(
                    kind="multimodal", text=words(rng, int(rng.integers(40, 150, endpoint=True)))
                ),
            ),
        }
    )


def made_up_records(n: int) -> list[Record]:
    """Return records of clips that no file stands behind."""
    return [
        described(
            Record(
                uid=f"made-up/{i:04d}",
                media=f"{i}.mp4",
                clip=Clip(sha256=hashlib.sha256(f"clip {i}".encode()).hexdigest(), n_bytes=1),
            ),
            i,
        )
        for i in range(n)
    ]


def write_random_tokens(
    store: TokenStore, specs: Sequence[TokenSpec], records: list[Record]
) -> None:
    """Commit random tokens of all streams; sound of 2 to 8 s."""
    lengths = np.random.default_rng(3).integers(100, 400, len(records), endpoint=True)
    for spec in specs:
        n_frames = spec.frames.n_frames if spec.frames else 0
        times_s = tuple(i / 25 for i in range(n_frames))
        for first in range(0, len(records), CLIPS_PER_SHARD):
            unit = []
            for place in range(first, min(first + CLIPS_PER_SHARD, len(records))):
                rng = np.random.default_rng([4, place])
                shape = spec.max_shape
                if spec.stream == "audio":
                    shape = (int(lengths[place]), shape[1])
                tokens = rng.standard_normal(shape, np.float32).astype(spec.dtype)
                key = records[place].token_key(spec)
                frames = tuple(range(n_frames))
                unit.append(
                    ClipTokens(key, Status.OK, tokens, frame_index=frames, frame_pts_s=times_s)
                )
            store.commit(spec, unit, {"made": "up"})


def evict(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def write_encoded(
    store: TokenStore, preset: Preset, records: list[Record], media: Path, bank: EncoderBank
) -> None:
    """Decode and encode clips and commit their tokens."""
    from extract.workers.results import encode_clip

    specs = preset.tokens.all()
    clips = [encode_clip(record, media / record.media, specs, bank) for record in records]
    for spec, tokens in zip(specs, zip(*clips, strict=True), strict=True):
        store.commit(spec, tokens, {"made": "up"})


# ---------------------------------------------------------------- model and batches


def load_bundled_tokenizer() -> Any:
    """Return the tokenizer that ships with the project."""
    return load_tokenizer(LlmConfig(path=TINY_LLM, dtype="float32"))


def preset_of(scale: Scale, *, own_encoders: bool) -> Preset:
    """Return preset v2 with a language model of this scale.

    Args:
        scale: Sizes.
        own_encoders: Tokens of the scale's encoders; False: of the paper's, as they are stored.
    """
    paper = v2()
    nets: dict[Stream, Any] = {"audio": scale.whisper, "video": scale.eva, "image": scale.eva}
    specs = {
        spec.stream: (
            spec.model_copy(update={"encoder": nets[spec.stream]}) if own_encoders else spec
        ).with_weights("00" * 32)
        for spec in paper.tokens.all()
    }
    # The bundled tokenizer; the language model itself is built here.
    llm = LlmConfig(path=TINY_LLM, dtype=scale.dtype)  # type: ignore[arg-type]
    return paper.model_copy(
        update={
            "tokens": Tokens(**specs),
            "model": paper.model.model_copy(update={"llm": llm}),
            "data": DataConfig(memory_bytes=0),
        }
    )


def build_llm(scale: Scale, device: str) -> Any:
    """Return a LLaMA with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, scale.dtype))
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(**scale.llm, max_position_embeddings=4096))
    finally:
        torch.set_default_dtype(before)


class Subject:
    """A model with clips to train it on."""

    def __init__(
        self, scale: Scale, preset: Preset, records: list[Record], store: TokenStore, device: str
    ) -> None:
        """Build the model on a device."""
        self.scale, self.records, self.store = scale, records, store
        self.preset, self.device = preset, torch.device(device)
        self.reader = ViewReader(store, preset, pin_memory=device == "cuda")
        spaces = {"emotion": LabelSpace(name="made-up", labels=LABELS)}
        header = Header(media_root=".", label_spaces=spaces)
        renderer = Renderer(preset, load_tokenizer(preset.model.llm), header)
        self.grouper = Grouper(preset, self.reader, renderer, None)
        llm = build_llm(scale, device)
        self.vocabulary = int(llm.config.vocab_size)
        self.model = EmotionLlama(preset, llm).to(self.device).train()
        self.optimizer = make_optimizer(self.model, preset.stages[0].optim)

    @property
    def base(self) -> Any:
        """The language model without LoRA's wrapper."""
        return self.model.llm.get_base_model()

    def stage(self, number: int, **optim: Any) -> StageConfig:
        """Return stage 1 or 2 with other settings: of OptimConfig, and pairs_per_clip and n_steps."""
        stage = self.preset.stages[number - 1]
        own = {k: optim.pop(k) for k in ("pairs_per_clip", "n_steps") if k in optim}
        return stage.model_copy(update={**own, "optim": stage.optim.model_copy(update=optim)})

    def planner(self, stage: StageConfig) -> Planner:
        """Return the plan of a stage."""
        mixture = Mixture(self.records, stage, self.preset.seed, self.reader.streams_of)
        return Planner(mixture, self.grouper.groups, stage.optim)

    def batch(self, pack: Pack) -> PrefixBatch:
        """Read and lay out a pack."""
        views = self.reader.read([g.record for g in pack], [g.hidden for g in pack])
        return collate(self.preset, pack, views)

    def execute(self, **execution: Any) -> None:
        """Choose a way of execution; unlike the trainer's, it can be taken back."""
        new = "activation_checkpointing_disable"  # renamed in transformers 5.2x
        name = new if hasattr(self.base, new) else "gradient_checkpointing_disable"
        getattr(self.base, name)()
        for layer in decoder_layers(self.base):
            layer._compiled_call_impl = None
        self.model.set_execution(ExecutionConfig(**execution))

    def loss(self, batch: PrefixBatch) -> torch.Tensor:
        """Return the mean loss of a batch in memory."""
        on_device = to_device(batch, self.device)
        found: dict[str, torch.Tensor] = self.model(**model_arguments(on_device))
        return found["loss_sum"] / len(batch["uids"])

    def step(self, batch: PrefixBatch) -> None:
        """Take an optimizer step from a batch in memory."""
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which the model computes, for what goes around it."""
        dtype = getattr(torch, self.scale.dtype)
        if dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype)

    @cached_property
    def shape(self) -> train_flops.LlmShape:
        """Sizes of the language model."""
        sizes = self.scale.llm
        return train_flops.LlmShape(
            sizes["hidden_size"],
            sizes["num_hidden_layers"],
            sizes["intermediate_size"],
            sizes["vocab_size"],
            self.preset.model.lora.r,
        )

    @cached_property
    def prefix_flops(self) -> train_flops.Flops:
        """Of one clip's fusion and adapters."""
        return train_flops.prefix(prefix_shape(self.preset), self.shape.width)

    def flops(self, batch: PrefixBatch) -> train_flops.Flops:
        """Count a batch's operations, packed."""
        pairs = train_flops.n_pairs(batch["segments"].rows)
        language = train_flops.llm(self.shape, len(batch["order"]), pairs, len(batch["predict"]))
        return language + self.prefix_flops * len(batch["tokens"]["audio"])


def prefix_shape(preset: Preset) -> train_flops.PrefixShape:
    """Return the sizes of a preset's fusion (Conv-Attention) and adapters."""
    fusion, shapes = preset.model.fusion, preset.view_shapes()
    counts = dict(preset.layout().blocks)
    channels = {"fusion": fusion.out_width} | {name: shape[1] for name, shape in shapes.items()}
    return train_flops.PrefixShape(
        {name: (n, channels[name]) for name, n in counts.items()},
        (channels["audio"], preset.tokens.image.encoder.width, channels["video"]),
        fusion.hidden_width,
        fusion.width,
        fusion.n_blocks,
    )


# ---------------------------------------------------------------- encoders in the loop


def encoder_flops(spec: TokenSpec) -> float:
    """Count the operations of encoding one clip."""
    encoder = spec.encoder
    if isinstance(encoder, WhisperEncoder):
        sizes = encoder.width, encoder.n_layers, encoder.n_mels, encoder.n_context
        return train_flops.whisper(*sizes).forward
    assert isinstance(encoder, EvaEncoder)
    assert spec.pixels is not None
    assert spec.frames is not None
    return train_flops.vit(
        *(encoder.width, encoder.depth, encoder.mlp_width, encoder.patch_px),
        *(spec.pixels.size_px, spec.frames.n_frames),
    ).forward


def build_encoders(tokens: Tokens, device: str, precision: Precision) -> tuple[Any, Any]:
    """Return Whisper's encoder and EVA with random weights, frozen as extraction does it.

    Raises:
        ImportError: A library is not installed.
    """
    from extract.encoders import whisper
    from extract.encoders.base import freeze
    from extract.encoders.eva import FrozenEva

    torch.manual_seed(0)
    with torch.device(device):
        try:
            network = whisper._openai_module(tokens.audio.encoder)
        except ImportError:
            network = whisper._transformers_module(tokens.audio.encoder)
        audio = whisper.FrozenWhisper(network, tokens.audio.encoder, device, precision)
        eva = FrozenEva(tokens.image.encoder, native_px=NATIVE_PX)
    eva._device, eva._precision = device, precision
    freeze(eva, device, precision)
    return audio, eva


def random_bank(tokens: Tokens) -> EncoderBank:
    """Return extraction's bank with random encoders, handed in instead of loaded."""
    from extract.encoders.bank import EncoderBank

    audio, eva = build_encoders(tokens, "cpu", "float32")

    class RandomBank(EncoderBank):
        """The bank of real checkpoints without checkpoints."""

        def __init__(self) -> None:
            self._device, self._precision, self._compile = "cpu", "float32", False
            self.specs = tokens.all()
            self._paths = {spec.spec_id: Path("random") for spec in self.specs}

        def encoder(self, spec: TokenSpec) -> Any:
            return audio if spec.stream == "audio" else eva

    return RandomBank()


class DeviceEncoders:
    """The same networks on a GPU, without anything beside them: no decoding, no copies back.

    Their tokens are thrown away. So an online step is measured faster than it can be.
    """

    def __init__(self, tokens: Tokens, device: str, precision: Precision = "bfloat16") -> None:
        """Build them, and random inputs of one clip."""
        self._audio, self._eva = build_encoders(tokens, device, precision)
        self._device, self._precision = device, precision
        sound = tokens.audio.encoder
        assert isinstance(sound, WhisperEncoder)
        self._inputs: dict[Stream, torch.Tensor] = {
            "audio": torch.randn(1, sound.n_mels, 2 * sound.n_context, device=device)
        }
        for spec in (tokens.video, tokens.image):
            assert spec.pixels is not None
            assert spec.frames is not None
            size = spec.pixels.size_px
            shape = (spec.frames.n_frames, 3, size, size)
            self._inputs[spec.stream] = torch.randn(shape, device=device)

    @torch.inference_mode()
    def encode(self, stream: Stream) -> None:
        """Encode one clip's stream."""
        from extract.encoders import vit
        from extract.encoders.base import mixed

        given = self._inputs[stream]
        with mixed(self._device, self._precision):
            if stream == "audio":
                self._audio._module(given)
                return
            body = self._eva._body  # as in FrozenEva.encode
            x = body.patch_embed(given)
            x = torch.cat([body.cls_token.expand(len(x), -1, -1), x], dim=1)
            x = x + vit.resized_positions(
                body.pos_embed, vit.patches_per_side(given, self._eva.spec.patch_px)
            )
            for block in body.blocks:
                x = block(x)
            body.norm(x)


class OnlineReader:
    """Like `ViewReader.read`, but some streams are decoded and encoded each time."""

    def __init__(
        self,
        store: TokenStore,
        preset: Preset,
        bank: EncoderBank,
        media: Path,
        online: Collection[Stream],
    ) -> None:
        """Read the other streams from the store."""
        self._preset, self._bank, self._media = preset, bank, media
        specs: dict[Stream, TokenSpec] = {spec.stream: spec for spec in preset.tokens.all()}
        self._online = [specs[s] for s in STREAMS if s in online]
        self._readers = {
            s: TokenReader(store, {s: specs[s]}, {s: getattr(preset.views, s)}, missing="mask")
            for s in STREAMS
            if s not in online
        }

    def read(
        self, records: Sequence[Record], hidden: Sequence[Collection[str]] | None = None
    ) -> Views:
        """Return the views of several records; nothing is hidden."""
        tokens: dict[str, torch.Tensor] = {}
        masks: dict[str, torch.Tensor] = {}
        for stream, reader in self._readers.items():
            batch = reader.read(records)[stream]
            tokens[stream], masks[stream] = batch.tokens, batch.mask
            if batch.cls is not None:
                tokens["image_cls"] = batch.cls
        if self._online:
            self._encode(records, tokens, masks)
        return Views(tokens, masks)

    def _encode(
        self,
        records: Sequence[Record],
        tokens: dict[str, torch.Tensor],
        masks: dict[str, torch.Tensor],
    ) -> None:
        from extract.workers.results import encoder_input

        decoded = [self.decode(record) for record in records]
        for place, spec in enumerate(self._online):
            given = [encoder_input(one, one.streams[place]) for one in decoded]
            view = getattr(self._preset.views, spec.stream)
            found = self._bank.encode(spec, given)
            applied = [view.apply(np.asarray(one)) for one in found]
            tokens[spec.stream] = torch.from_numpy(np.stack([t for t, _ in applied]))
            masks[spec.stream] = torch.from_numpy(np.stack([m for _, m in applied]))
            if spec.stream == "image":
                cls = np.stack([view.cls(np.asarray(one)) for one in found])
                tokens["image_cls"] = torch.from_numpy(cls)

    def decode(self, record: Record) -> Any:
        """Decode what the online streams need of a clip."""
        from extract.inputs import prepare_inputs, request_of

        requests = [request_of(spec, record) for spec in self._online]
        path = self._media / record.media
        return prepare_inputs(path, record.sha256, record.media, requests)


def write_media(folder: Path, real: Path, n_clips: int) -> list[Record]:
    """Copy or draw clips with sound and film, up to 15 s; return their records.

    Args:
        folder: Where they go.
        real: Folder of real clips, which come first; it need not exist.
        n_clips: How many.
    """
    from extract.corpora.demo import write_demo_corpus
    from extract.index import MEDIA_SUFFIXES, index_folder

    (folder / "real").mkdir(parents=True)
    for path in sorted(real.glob("*")) if real.is_dir() else ():
        if path.suffix.lower() in MEDIA_SUFFIXES:
            shutil.copyfile(path, folder / "real" / path.name)
    write_demo_corpus(folder / "generated", n_clips=n_clips)
    manifest, _ = index_folder(folder, folder / "manifest.parquet", corpus="benchmark")
    whole = [
        record
        for record in manifest.records
        if record.seen_clip.has_audio
        and record.seen_clip.has_video
        and 1.5 < (record.seen_clip.duration_s or 0) <= 15
    ]
    whole.sort(key=lambda record: ("/real/" not in record.uid, record.uid))
    half = whole[: n_clips // 2]
    made = [record for record in whole if "/real/" not in record.uid and record not in half]
    return [described(r, i) for i, r in enumerate((half + made)[:n_clips])]
