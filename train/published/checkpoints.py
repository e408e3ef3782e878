"""Published checkpoints under our names: Emotion-LLaMAv2, its predecessor, MiniGPT-v2.

They are torch files `{"model": {key: tensor}, ...}` that hold trained parameters only (reference
facts, sections 3, 5 and 9). What `translate` makes of their keys:

::

    conv_pro_module.feats_prep.{0,1,2}                  fusion.prep.{audio,image,video}
    conv_pro_module.attention_mlp                       fusion.attn_mlp
    conv_pro_module.fc_att                              fusion.attn_gate
    conv_pro_module.conv_entry                          fusion.conv_in
    conv_pro_module.conv_module.conv_blocks.K...        fusion.conv_blocks.K.conv
    conv_pro_module.fc_final                            fusion.merge
    llama_proj, llama_proj_{video,audio,fusion}         adapters.maps.{image,video,audio,fusion}
    feats_llama_proj{1,2,3}, cls_tk_llama_proj          adapters.maps.{local,video,audio}, .cls
    llama_model.base_model...lora_A[.default].weight    base_model...lora_A.weight (peft's own)
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cache.errors import CheckpointError
from train.config import Preset
from train.published.files import read_file

Kind = Literal["emotion-llama-v2", "emotion-llama", "minigpt-v2"]

_RENAMED = (
    *(
        (rf"conv_pro_module\.feats_prep\.{place}\.([03])", rf"fusion.prep.{stream}.\1")
        for place, stream in enumerate(("audio", "image", "video"))
    ),
    (r"conv_pro_module\.attention_mlp\.([03])", r"fusion.attn_mlp.\1"),
    (r"conv_pro_module\.fc_att", "fusion.attn_gate"),
    (r"conv_pro_module\.conv_entry", "fusion.conv_in"),
    (
        r"conv_pro_module\.conv_module\.conv_blocks\.(\d+)\.conv_block\.0",
        r"fusion.conv_blocks.\1.conv",
    ),
    (r"conv_pro_module\.fc_final", "fusion.merge"),
    (r"llama_proj", "adapters.maps.image"),
    (r"llama_proj_(video|audio|fusion)", r"adapters.maps.\1"),
)
_LINEAR = [(re.compile(rf"{theirs}\.(weight|bias)"), ours) for theirs, ours in _RENAMED]
# Of one vector each, in the order in which the predecessor stacks them.
_VECTORS = {
    "feats_llama_proj1": "local",
    "feats_llama_proj2": "video",
    "feats_llama_proj3": "audio",
    "cls_tk_llama_proj": "cls",
}
# peft 0.2 leaves the adapter's name out; newer versions put it in front of `weight`.
_LORA = re.compile(r"llama_model\.(base_model\..+\.lora_[AB])(?:\.default)?\.weight")

_ENCODER = ("ln_vision.", "visual_encoder.")
_UNUSED = (
    (_ENCODER, "an encoder's weights: tokens come from the store"),
    (("feats_llama_proj",), "no counterpart: Emotion-LLaMA's streams of one 1024-wide vector each"),
    (("cls_tk_llama_proj",), "no counterpart: here the CLS token enters the fusion"),
    (("attention.",), "a classifier of Emotion-LLaMA that no loss ever reached"),
    (("llama_model.",), "the language model comes from model.llm.path; of it only LoRA is read"),
    (("",), "no counterpart in Emotion-LLaMAv2"),
)
"""Prefixes of keys that have no place here, and why; the first that fits."""


@dataclass(frozen=True)
class ImportReport:
    """What became of a published checkpoint's tensors, and of ours."""

    kind: Kind
    used: dict[str, str]
    """Upstream key -> our key."""
    unused: dict[str, str]
    """Upstream key -> why it is not used."""
    missing: tuple[str, ...]
    """Our keys that the file does not give; they keep their fresh initialisation."""
    lora_rank: int | None
    """None without LoRA."""
    lora_targets: tuple[str, ...]
    n_used: int
    """Parameters that come from the file."""
    n_fresh: int
    """Parameters that keep their fresh initialisation."""
    notes: tuple[str, ...]
    """What fits in shape but may differ in meaning."""

    def lines(self) -> list[str]:
        """Return a summary by component, for people."""
        used = _by_component(self.used.values())
        if "lora" in used:
            used["lora"] += f"; r={self.lora_rank} on {', '.join(self.lora_targets)}"
        lines = [
            f"{self.kind}: {len(self.used)} of {len(self.used) + len(self.unused)} tensors used; "
            f"{self.n_used:,} of {self.n_used + self.n_fresh:,} trained parameters "
            "come from the file"
        ]
        for title, found in (("from the file", used), ("fresh", _by_component(self.missing))):
            listed = ", ".join(f"{name} ({text})" for name, text in found.items())
            lines.append(f"{title}: {listed or 'nothing'}")
        reasons = defaultdict(list)
        for key, reason in self.unused.items():
            reasons[reason].append(key)
        for reason, keys in reasons.items():
            heads = list(dict.fromkeys(key.split(".")[0] for key in keys))
            more = ", ..." if len(heads) > 5 else ""
            lines.append(f"unused: {', '.join(heads[:5])}{more} ({_tensors(len(keys))}): {reason}")
        return [*lines, *(f"note: {note}" for note in self.notes)]


def recognise(state: Mapping[str, Tensor]) -> Kind:
    """Tell by its keys which model a checkpoint belongs to.

    Raises:
        CheckpointError: None that we know.
    """
    heads = {key.split(".")[0] for key in state}
    if heads & {"conv_pro_module", "llama_proj_video", "llama_proj_audio", "llama_proj_fusion"}:
        return "emotion-llama-v2"
    if any(head.startswith(("feats_llama_proj", "cls_tk_llama_proj")) for head in heads):
        return "emotion-llama"
    if "llama_proj" in heads:
        return "minigpt-v2"
    raise CheckpointError(
        f"no published checkpoint that we know: {len(state)} keys, first: "
        f"{', '.join(list(state)[:5]) or 'none'}. Emotion-LLaMAv2 has conv_pro_module.*, "
        "Emotion-LLaMA has feats_llama_proj1.*, MiniGPT-v2 has llama_proj.*; give one of those."
    )


def translate(
    state: Mapping[str, Tensor], vectors: Collection[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Bring a checkpoint's tensors under our names.

    Args:
        state: The checkpoint.
        vectors: Blocks of one token in the model that they are for, see `vector_blocks`: Emotion-LLaMA's
            adapters of its own streams fit those alone.

    Returns:
        `fusion.*` and `adapters.*` float32, LoRA float32 under the keys that peft saves, and the
        upstream keys that have no place here.

    Raises:
        CheckpointError: Two keys mean the same parameter.
    """
    ours = {key: name for key in state if (name := _our_name(key, vectors))}
    twice = [name for name, n in Counter(ours.values()).items() if n > 1]
    if twice:
        keys = [key for key, name in ours.items() if name == twice[0]]
        raise CheckpointError(
            f"{len(twice)} parameters are given twice, first: {' and '.join(keys)}. "
            "Remove one adapter's keys from the file."
        )
    named = {name: state[key].detach().to(torch.float32) for key, name in ours.items()}
    lora = {name: tensor for name, tensor in named.items() if name.startswith("base_model.")}
    parts = {name: tensor for name, tensor in named.items() if name not in lora}
    return parts, lora, [key for key in state if key not in ours]


def vector_blocks(preset: Preset) -> frozenset[str]:
    """Return the blocks of a model's prefix that are one token: the mean of a stream, the CLS token."""
    return frozenset(name for name, n_tokens in preset.layout().blocks if n_tokens == 1)


def import_published(
    path: Path, preset: Preset, wanted: Mapping[str, Tensor], wanted_lora: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], ImportReport]:
    """Fill a freshly initialised model's trained tensors from a published checkpoint.

    A part that the file lacks stays fresh, and a part that the model lacks is left unused; a part
    that both have must agree in every tensor.

    Args:
        path: See `train.published.files.read_published`.
        preset: The configuration of the model.
        wanted: `fusion.*` and `adapters.*` of the model.
        wanted_lora: LoRA of the model, under the keys that peft saves.

    Returns:
        The complete `fusion.*` and `adapters.*`, the complete LoRA, and what was done.

    Raises:
        CheckpointError: The file cannot be read or is none that we know; or its shapes, number of
            blocks or layers, or LoRA's alpha contradict the preset; or it holds non-finite numbers.
    """
    state, config = read_file(path)
    kind, vectors = recognise(state), vector_blocks(preset)
    parts, lora, unused = translate(state, vectors)
    found, model = {**parts, **lora}, {**wanted, **wanted_lora}
    _check_fit(path, found, model, preset)
    shared = found.keys() & model.keys()
    _check_finite(path, {name: found[name] for name in sorted(shared)})
    alphas, bases = (_settings(config, name) for name in ("lora_alpha", "llama_model"))
    with_lora = bool(lora.keys() & shared)
    if with_lora and len(alphas) == 1 and alphas != [preset.model.lora.alpha]:
        raise CheckpointError(
            f"{path}: its LoRA was trained with alpha {alphas[0]}, the preset has "
            f"{preset.model.lora.alpha}: the updates would have another size. "
            f"Set model.lora.alpha={alphas[0]}"
        )
    ours = {key: name for key in state if (name := _our_name(key, vectors))}
    why = {key: _no_place(key, preset) for key in unused}
    why |= {key: _unwanted(name, preset) for key, name in ours.items() if name not in shared}
    report = ImportReport(
        kind=kind,
        used={key: name for key, name in ours.items() if name in shared},
        unused={key: why[key] for key in state if key in why},
        missing=tuple(sorted(model.keys() - shared)),
        lora_rank=_lora_rank(lora),
        lora_targets=tuple(sorted({_target(name) for name in lora})),
        n_used=sum(model[name].numel() for name in shared),
        n_fresh=sum(model[name].numel() for name in model.keys() - shared),
        notes=tuple(_notes(state, shared, model, preset, alphas if with_lora else None, bases)),
    )
    # Copies: the file may be mapped, and a fresh tensor may go on to be trained.
    filled = {
        name: (found[name] if name in shared else fresh.detach()).to("cpu", copy=True).contiguous()
        for name, fresh in model.items()
    }
    return {k: filled[k] for k in wanted}, {k: filled[k] for k in wanted_lora}, report


def _our_name(key: str, vectors: Collection[str]) -> str | None:
    """Return our name of an upstream key; None if it has none."""
    if lora := _LORA.fullmatch(key):
        return f"{lora[1]}.weight"
    head, _, last = key.partition(".")
    if _VECTORS.get(head) in vectors and last in ("weight", "bias"):
        return f"adapters.maps.{_VECTORS[head]}.{last}"
    for pattern, ours in _LINEAR:
        if match := pattern.fullmatch(key):
            return f"{match.expand(ours)}.{match[match.re.groups]}"
    return None


def _target(name: str) -> str:
    """Return the linear layer, such as `q_proj`, of a LoRA key."""
    return name.split(".")[-3]


def _lora_rank(lora: Mapping[str, Tensor]) -> int | None:
    return next((_size(lora, name, 0) for name in lora if "lora_A" in name), None)


def _part(name: str) -> str:
    """Return the part of which a model has every tensor or none."""
    if name.startswith("base_model."):
        return f"LoRA on {_target(name)}"
    deep = name.startswith(("fusion.prep.", "adapters.maps."))
    return ".".join(name.split(".")[: 3 if deep else 2])


def _component(name: str) -> str:
    """Return the component under which a model counts its parameters."""
    if name.startswith("adapters."):
        return f"adapter.{name.split('.')[2]}"
    return "lora" if name.startswith("base_model.") else name.split(".")[0]


def _by_component(names: Iterable[str]) -> dict[str, str]:
    counts = Counter(map(_component, names))
    return {name: _tensors(n) for name, n in sorted(counts.items())}


def _tensors(n: int) -> str:
    return f"{n} tensor{'s' * (n != 1)}"


def _check_fit(
    path: Path, found: Mapping[str, Tensor], model: Mapping[str, Tensor], preset: Preset
) -> None:
    """Refuse other shapes, and parts of which file and model have different tensors."""
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(model[name].shape)}"
        for name in sorted(found.keys() & model.keys())
        if found[name].shape != model[name].shape
    ]
    both = {_part(name) for name in found} & {_part(name) for name in model}
    absent, surplus = (
        [name for name in sorted(names) if _part(name) in both]
        for names in (model.keys() - found.keys(), found.keys() - model.keys())
    )
    problems = [
        f"{_tensors(len(items))} {what}, first: {', '.join(items[:5])}"
        for what, items in (
            ("of another shape", wrong),
            ("missing from parts that it has", absent),
            ("too many", surplus),
        )
        if items
    ]
    if problems:
        about_fusion = any(n.startswith("fusion.") for n in (*wrong, *absent, *surplus))
        advice = _advice(found, model, preset, about_fusion=about_fusion) or [
            "The file is incomplete or belongs to another model."
        ]
        raise CheckpointError(
            f"{path}: does not fit the configuration: {'; '.join(problems)}. {' '.join(advice)}"
        )


def _advice(
    found: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    preset: Preset,
    *,
    about_fusion: bool,
) -> list[str]:
    """Return what would make a file fit, where its shapes tell."""
    fusion, image, image_view = preset.model.fusion, preset.tokens.image, preset.views.image
    implied: dict[str, tuple[object, object]] = {}
    if about_fusion:
        blocks = {name.split(".")[2] for name in found if name.startswith("fusion.conv_blocks.")}
        implied = {
            "model.fusion.kind": ("conv-attention", fusion.kind),
            "model.fusion.hidden_width": (
                _size(found, "fusion.prep.audio.0.weight", 0),
                fusion.hidden_width,
            ),
            "model.fusion.width": (_size(found, "fusion.prep.audio.3.weight", 0), fusion.width),
            "model.fusion.n_blocks": (len(blocks) or None, fusion.n_blocks),
            "model.fusion.out_width": (_size(found, "fusion.merge.weight", 0), fusion.out_width),
        }
    lora = {name: tensor for name, tensor in found.items() if name.startswith("base_model.")}
    implied["model.lora.r"] = (_lora_rank(lora), preset.model.lora.r)
    others = []
    for stream in ("audio", "video", "image", "local", "cls"):
        key = f"adapters.maps.{stream}.weight"
        theirs, ours = _size(found, key, 1), _size(model, key, 1)
        if theirs is None or ours is None or theirs == ours:
            continue
        joined = stream == "image" and image is not None and theirs % image.encoder.width == 0
        if joined and image is not None and image_view is not None:
            implied["views.image.join"] = (theirs // image.encoder.width, image_view.join)
        else:
            others.append(
                f"It wants {stream} tokens of {theirs} channels, the preset's have {ours}: take a "
                "preset with the encoders that it was trained on."
            )
    for name in sorted(found.keys() & model.keys()):
        theirs, ours = _size(found, name, 0), _size(model, name, 0)
        if name.startswith("adapters.maps.") and theirs != ours:
            others.append(
                f"It was trained on a language model of width {theirs}, {preset.model.llm.path} "
                f"has {ours}: give that model with model.llm.path=FOLDER"
            )
            break
    else:
        theirs, ours = (len({_layer(n) for n in names if _layer(n)}) for names in (found, model))
        if theirs and ours and theirs != ours:
            others.append(
                f"It was trained on a language model of {theirs} layers, {preset.model.llm.path} "
                f"has {ours}: give that model with model.llm.path=FOLDER"
            )
    overrides = [f"{k}={a}" for k, (a, b) in implied.items() if a is not None and a != b]
    return ([f"These would fit: {' '.join(overrides)}."] if overrides else []) + others


def _layer(name: str) -> str | None:
    """Return the number of the language model's layer that a LoRA key belongs to."""
    match = re.match(r"base_model\..*?\.(\d+)\.", name)
    return match[1] if match else None


def _size(tensors: Mapping[str, Tensor], name: str, axis: int) -> int | None:
    """Return a tensor's length along an axis; None if there is none."""
    shape = tensors[name].shape if name in tensors else ()
    return int(shape[axis]) if axis < len(shape) else None


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CheckpointError(
            f"{path}: {_tensors(len(bad))} with NaN or infinity, first: {', '.join(bad[:5])}. "
            "The file is damaged or its training diverged; take another one."
        )


def _no_place(key: str, preset: Preset) -> str:
    """Tell why an upstream key has no name of ours."""
    if key.startswith("cls_tk_llama_proj") and preset.model.fusion.kind == "none":
        return "no counterpart: this model's prefix has no CLS token"
    reason = next(why for heads, why in _UNUSED if key.startswith(heads))
    return reason.replace("LLaMAv2", "LLaMA") if preset.prompt.style == "v1" else reason


def _unwanted(name: str, preset: Preset) -> str:
    """Tell why a tensor with a name of ours has no place in this model."""
    if name.startswith("base_model."):
        return f"model.lora.targets has no {_target(name)}"
    block = name.split(".")[2] if name.startswith("adapters.maps.") else "fusion"
    if block != "fusion":
        return f"this model's prefix has no {block}"
    if name.startswith("fusion.conv_blocks.") and preset.model.fusion.n_blocks == 0:
        return "model.fusion.n_blocks=0"
    return f"model.fusion.kind={preset.model.fusion.kind} has no such part"


def _settings(config: object, name: str) -> list[Any]:
    """Return the different values of a setting, wherever it stands in a nested configuration."""
    found: list[Any] = []
    inner: Iterable[object] = ()
    if isinstance(config, dict):
        found += [config[name]] if config.get(name) is not None else []
        inner = config.values()
    elif isinstance(config, list | tuple):
        inner = config
    for item in inner:
        found += _settings(item, name)
    return [value for place, value in enumerate(found) if value not in found[:place]]


def _notes(
    state: Mapping[str, Tensor],
    shared: Iterable[str],
    model: Mapping[str, Tensor],
    preset: Preset,
    alphas: list[Any] | None,
    bases: list[Any],
) -> list[str]:
    """Return what fits in shape but may differ in meaning.

    Args:
        state: The file's tensors.
        shared: Our names that the file gives.
        model: All tensors of the model.
        preset: The configuration of the model.
        alphas: LoRA's alpha as the file states it; None without LoRA.
        bases: The language model as the file states it.
    """
    notes = []
    encoders = [key for key in state if key.startswith(_ENCODER)]
    if encoders:
        notes.append(
            f"the file brings {_tensors(len(encoders))} of an image encoder (first: {encoders[0]}); "
            "it was trained behind them, and tokens extracted without them differ"
        )
    given, all_parts = (Counter(map(_component, names)) for names in (shared, model))
    notes += [
        f"{name} is only in part in the file: {given[name]} of {_tensors(all_parts[name])}"
        for name in sorted(given)
        if given[name] != all_parts[name]
    ]
    if given["fusion"]:
        fusion = preset.model.fusion
        notes += [
            f"the file's fusion was trained with model.fusion.{name}={theirs}, the preset has {ours}"
            for name, theirs, ours in (
                ("kind", "conv-attention", fusion.kind),
                ("gate", "linear", fusion.gate),
            )
            if theirs != ours
        ]
    lora, llm = preset.model.lora, preset.model.llm.path
    if alphas is not None and len(alphas) != 1:
        notes.append(f"the file does not state LoRA's alpha; the preset has {lora.alpha}/{lora.r}")
    stated = ", ".join(map(str, bases))
    notes.append(
        f"trained on the language model {stated or 'LLaMA-2-7B-chat, presumably'}; here it is {llm}"
    )
    return notes
