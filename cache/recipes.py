"""Token specs by name, as `emocache extract --encoders whisper-large-v3,eva-g,hubert-large+utt` takes them.

A name brings the usual choices of its network: frames, pixels and pooling as the paper's preset has
them. Whoever wants others writes a preset.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from cache.encoders import NAMED_ENCODERS, SAMPLE_RATE_HZ, Encoder, SoundEncoder, WhisperEncoder
from cache.errors import SchemaError, near_miss
from cache.schema import decode
from cache.spec import FaceCrop, Frames, Pixels, Stream, TokenSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_GRAMMAR = "NAME[:STREAM][+face][+cls][+utt], several joined by commas"

_ENCODER: TypeAdapter[Encoder] = TypeAdapter(Encoder)
_BY_NAME: dict[str, Encoder] = {
    name: _ENCODER.validate_python(fields) for name, fields in NAMED_ENCODERS.items()
}

_STREAMS_OF: dict[str, tuple[Stream, ...]] = {
    "sound": ("audio",),
    "pictures": ("video", "image"),
    "frames": ("video",),
}
"""What a network takes -> the streams that it can make tokens of; all of them if none is named."""

_IMAGENET_BICUBIC = Pixels(size_px=224, mean=IMAGENET_MEAN, std=IMAGENET_STD)
_PIXELS: dict[tuple[str, Stream], Pixels] = {
    ("eva", "video"): Pixels(size_px=224),
    ("eva", "image"): Pixels(size_px=448),
    ("clip", "video"): Pixels(size_px=224),
    ("clip", "image"): Pixels(size_px=224),
    ("mae", "video"): _IMAGENET_BICUBIC,
    ("mae", "image"): _IMAGENET_BICUBIC,
    ("videomae", "video"): _IMAGENET_BICUBIC.model_copy(update={"interpolation": "bilinear"}),
}
"""Kind of encoder and stream -> the pixels that it was trained on, or that the paper gives it."""


def token_specs(text: str) -> tuple[TokenSpec, ...]:
    """Return the specs that a list of names means.

    Args:
        text: `NAME[:STREAM][+face][+cls][+utt]`, several joined by commas. NAME is one of
            `NAMED_ENCODERS`. STREAM is `audio`, `video` or `image`; without one, all that the network
            can make tokens of. `+face` encodes the face alone, by OpenFace's tables. `+cls` stores the
            CLS token alone, `+utt` the mean over time alone, both together the mean of the CLS tokens.

    Returns:
        The specs in the order of the names, of one name in the order of `STREAMS`; weights are open.

    Raises:
        SchemaError: An unknown name, stream or option, one that does not fit, or a spec given twice.
    """
    specs: dict[str, TokenSpec] = {}
    first_given: dict[str, str] = {}
    for item in (part.strip() for part in text.split(",")):
        for spec in _specs_of(item, text):
            key = spec.canonical_json()
            if key in specs:
                raise SchemaError(
                    f"--encoders {text}: '{first_given[key]}' and '{item}' mean the same "
                    f"{spec.stream} tokens; only weights could tell them apart. Give each once, or "
                    "extract them in two runs."
                )
            specs[key], first_given[key] = spec, item
    return tuple(specs.values())


def read_specs(path: Path) -> dict[str, TokenSpec]:
    """Read token specs of one's own from a YAML or JSON file: name -> fields of a `TokenSpec`.

    Names tell apart networks of equal sizes, whose checkpoints are given by name.

    Raises:
        SchemaError: No such file, not YAML, or a spec that does not fit: names the file and the field.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SchemaError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SchemaError(f"{path}: not a YAML file ({error})") from None
    if not isinstance(found, dict) or not found:
        raise SchemaError(
            f"{path}: needs names and their specs, as `NAME: {{stream: ..., encoder: ...}}`; "
            f"got {type(found).__name__}. `emocache show PRESET` prints specs to start from."
        )
    return {
        str(name): decode(TokenSpec, fields, f"{path}, {name}") for name, fields in found.items()
    }


@dataclass(frozen=True)
class _Item:
    """One parsed name with its options."""

    encoder: Encoder
    streams: tuple[Stream, ...]
    face: bool
    cls_only: bool
    utterance: bool


def _specs_of(item: str, text: str) -> list[TokenSpec]:
    parsed = _parse(item, text)
    return [_spec(parsed, stream) for stream in parsed.streams]


def _parse(item: str, text: str) -> _Item:
    where = f"--encoders {text}"
    head, *options = item.split("+")
    name, colon, stream = head.partition(":")
    if not name:
        raise SchemaError(
            f"{where}: an encoder without a name. Write {_GRAMMAR}, for example eva-g:image."
        )
    if name not in _BY_NAME:
        raise SchemaError(
            f"{where}: unknown encoder '{name}'.{near_miss(name, _BY_NAME)} "
            f"Allowed: {', '.join(_BY_NAME)}"
        )
    encoder = _BY_NAME[name]
    streams = _STREAMS_OF[encoder.takes]
    if colon:
        chosen = tuple(known for known in streams if known == stream)
        if not chosen:
            raise SchemaError(
                f"{where}: '{name}' makes no '{stream}' tokens.{near_miss(stream, streams)} "
                f"Allowed: {', '.join(f'{name}:{known}' for known in streams)}"
            )
        streams = chosen
    allowed = {"sound": ["utt"], "pictures": ["face", "cls", "utt"], "frames": ["face", "utt"]}[
        encoder.takes
    ]
    for option in options:
        if option == "face" and option not in allowed:
            raise SchemaError(f"{where}: '{name}' hears sound, so '+face' does not fit.")
        if option == "cls" and option not in allowed:
            raise SchemaError(
                f"{where}: '{name}' has no CLS token, so '+cls' does not fit. "
                "Use '+utt' for one token of a clip."
            )
        if option not in allowed:
            raise SchemaError(
                f"{where}: unknown option '+{option}'.{near_miss(option, allowed)} "
                f"Allowed for '{name}': {', '.join(f'+{known}' for known in allowed)}"
            )
    face, cls_only, utterance = (option in options for option in ("face", "cls", "utt"))
    return _Item(encoder, streams, face=face, cls_only=cls_only, utterance=utterance)


def _spec(item: _Item, stream: Stream) -> TokenSpec:
    fields: dict[str, Any] = {"cls_only": item.cls_only, "utterance": item.utterance}
    if stream == "audio":
        fields["sample_rate_hz"] = SAMPLE_RATE_HZ
    else:
        fields["pixels"] = _PIXELS[item.encoder.kind, stream]
        fields["crop"] = FaceCrop() if item.face else None
        fields["frames"] = (
            Frames(kind="middle") if stream == "image" else Frames(kind="uniform", n_frames=16)
        )
        if stream == "video" and not (item.cls_only or item.utterance):
            fields["grid"] = 2  # 2 x 2 tokens a step: the paper's video tokens
    return TokenSpec(stream=stream, encoder=item.encoder, **fields)


def label_of(spec: TokenSpec) -> str:
    """Return a short label for tables: `video eva-g`, `audio hubert-large+utt`, `audio whisper 64x2`.

    Sizes (width x blocks) stand for a network that has no name. Where several names have the same
    sizes, the plainest of them is shown, with the start of the weights digest once that is known.
    """
    encoder = spec.encoder
    layer = encoder.layer if isinstance(encoder, SoundEncoder) else None
    label = f"{spec.stream} {_name_of(encoder)}"
    if layer is not None:
        label += f" layer {layer}"
    if isinstance(encoder, WhisperEncoder) and encoder.padded:
        label += " padded"
    face = "+face" * (spec.crop is not None)
    return label + face + "+cls" * spec.cls_only + "+utt" * spec.utterance


def _name_of(encoder: Encoder) -> str:
    plain = encoder.model_copy(update={"weights_sha256": None})
    if isinstance(plain, SoundEncoder):
        plain = plain.model_copy(update={"layer": None})
    if isinstance(plain, WhisperEncoder):
        plain = plain.model_copy(update={"padded": False})
    names = sorted((name for name, known in _BY_NAME.items() if known == plain), key=len)
    if not names:
        blocks = encoder.n_layers if isinstance(encoder, SoundEncoder) else encoder.depth
        return f"{encoder.kind} {encoder.width}x{blocks}"
    if len(names) > 1 and encoder.weights_sha256 is not None:
        return f"{names[0]}@{encoder.weights_sha256[:8]}"
    return names[0]
