"""What the arguments of the command line mean: presets, devices, weights, specs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from cache.errors import CacheMissError, SchemaError, near_miss

if TYPE_CHECKING:
    from cache.layout import Compression
    from cache.spec import TokenSpec
    from cache.store import TokenStore
    from train.config import Preset


def configure(preset: str, overrides: list[str] | None, with_file: Path | None = None) -> Preset:
    """Return a named preset with the user's settings on top."""
    from train.config import configure
    from train.presets import preset as preset_of

    return configure(preset_of(preset), overrides or [], with_file)


def check_device(name: str) -> None:
    """Refuse a device that is misspelt or not there, before any work is done."""
    import torch

    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise SchemaError(
            f"--device {name}: {'no CUDA device is available' if kind == 'cuda' else 'unknown device'}. "
            "Allowed: cpu, and cuda or cuda:N on a machine with an NVIDIA GPU."
        )


def weights_of(preset: Preset, given: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoints by encoder or stream: bundled ones, and NAME=PATH as given."""
    from extract import tiny

    weights = {
        kind: Path(tiny.__file__).parent / name for kind, name in preset.bundled_weights.items()
    }
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise SchemaError(
                f"--encoder-weights {item!r} is not NAME=PATH. Example: --encoder-weights "
                "eva=weights/eva_vit_g.pth"
            )
        weights[name] = Path(path)
    return weights


def compression_of(name: str) -> Compression:
    """Return a compression by its name."""
    from cache.layout import Compression

    allowed = get_args(Compression)
    if name not in allowed:
        raise SchemaError(
            f"--compression {name}: unknown.{near_miss(name, allowed)} Allowed: {', '.join(allowed)}"
        )
    return name  # type: ignore[return-value]


def spec_of(text: str, store: TokenStore | None = None) -> TokenSpec:
    """Return the spec that a user names.

    Args:
        text: `PRESET/STREAM`, for example v2/audio; a JSON file; or, of a store, the first digits of
            a spec_id, or a stream that has one spec only.
        store: Where to look up a spec_id.

    Raises:
        SchemaError: It is none of these.
        CacheMissError: The store has no such spec, or several.
    """
    from cache.schema import decode_json
    from cache.spec import STREAMS, TokenSpec

    name, slash, stream = text.partition("/")
    if slash and stream in STREAMS and not Path(text).exists():
        found: TokenSpec = getattr(configure(name, None).tokens, stream)
        return found
    if text.endswith(".json"):
        return decode_json(TokenSpec, Path(text).read_bytes(), text)
    if store is None:
        raise SchemaError(
            f"{text!r} is no spec. Give PRESET/STREAM (v2/audio), a JSON file, or, with --store, the "
            "first digits of a spec_id."
        )
    fitting = [s for s in store.specs.values() if text == s.stream or s.spec_id.startswith(text)]
    if len(fitting) == 1:
        return fitting[0]
    stored = ", ".join(f"{s.stream} {s.spec_id}" for s in store.specs.values()) or "none"
    raise CacheMissError(
        f"{store.root}: {'several specs' if fitting else 'no spec'} fit {text!r}. Stored: {stored}"
    )


def one_of(first_name: str, first: object, second_name: str, second: object) -> None:
    """Refuse two options of which one, and only one, must be given."""
    if (first is None) == (second is None):
        raise SchemaError(
            f"give either {first_name} or {second_name}, "
            f"{'not both' if first is not None else 'got neither'}."
        )
