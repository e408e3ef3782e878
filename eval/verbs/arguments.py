"""What the arguments of the command line mean: presets, devices, weights, specs, times, sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cache.errors import CacheMissError, SchemaError, near_miss

if TYPE_CHECKING:
    from cache.layout import Compression
    from cache.spec import TokenSpec
    from cache.store import TokenStore
    from extract.failures import FailureKind
    from train.config import Preset

_DEVICES = "Allowed: cpu, and cuda or cuda:N on a machine with an NVIDIA GPU."

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:min|[smhd]))+")
_BYTES = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def configure(preset: str, overrides: list[str] | None, with_file: Path | None = None) -> Preset:
    """Return a named preset with the user's settings on top."""
    from train.config import configure
    from train.presets import preset as preset_of

    return configure(preset_of(preset), overrides or [], with_file)


def check_device(name: str, *, is_here: bool = True) -> None:
    """Refuse a device that is misspelt or not there, before any work is done.

    Args:
        name: `cpu`, `cuda` or `cuda:N`.
        is_here: False if the work is done on other machines, so that only the name can be checked.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if found is None:
        raise SchemaError(f"--device {name}: unknown device. {_DEVICES}")
    if name == "cpu" or not is_here:
        return
    import torch  # takes seconds, so only where a GPU is asked for

    if not torch.cuda.is_available():
        raise SchemaError(f"--device {name}: no CUDA device is available. {_DEVICES}")
    n_devices = torch.cuda.device_count()
    if found[1] is not None and int(found[1]) >= n_devices:
        raise SchemaError(
            f"--device {name}: this machine has {n_devices} CUDA device{'s' * (n_devices > 1)}, "
            f"numbered from 0. {_DEVICES}"
        )


def weights_of(preset: Preset, given: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoints by encoder or stream: bundled ones, and NAME=PATH as given."""
    from extract import tiny

    kinds = {spec.encoder.kind for spec in preset.tokens.all()}
    bundled = {
        kind: Path(tiny.__file__).parent / name
        for kind, name in preset.bundled_weights.items()
        if kind in kinds
    }
    return bundled | named_weights(given)


def named_weights(given: Sequence[str]) -> dict[str, Path]:
    """Return the checkpoints that a user gives as NAME=PATH.

    Raises:
        SchemaError: One is not of this form.
    """
    weights = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or not name or not path:
            raise SchemaError(
                f"--encoder-weights {item!r} is not NAME=PATH. Example: --encoder-weights "
                "eva=weights/eva_vit_g.pth"
            )
        weights[name] = Path(path)
    return weights


def duration_s(text: str, option: str) -> float:
    """Return a duration in seconds.

    Args:
        text: `90s`, `15m`, `4h`, `1h30m`, `2d`, `1:30:00` or, as Slurm writes days, `1-12:00:00`.
        option: Whose value it is, for the error message.

    Raises:
        SchemaError: Anything else, and nothing longer than zero.
    """
    clock = _CLOCK.fullmatch(text)
    if clock is not None:
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        found = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    elif _DURATION.fullmatch(text):
        parts = re.findall(r"([\d.]+)(min|[smhd])", text)
        found = sum(float(number) * _SECONDS[unit] for number, unit in parts)
    else:
        raise SchemaError(
            f"{option} {text}: not a duration. Write for example 90s, 15m, 4h, 1h30m, 2d, or 1:30:00 "
            "(hours:minutes:seconds)."
        )
    if found <= 0:
        raise SchemaError(f"{option} {text}: must be longer than zero.")
    return found


def size_bytes(text: str, option: str) -> int:
    """Return a size in bytes.

    Args:
        text: `16GB` (10^9 each) or `16GiB` (2^30 each); KB, MB, TB and KiB, MiB, TiB likewise.
        option: Whose value it is, for the error message.

    Raises:
        SchemaError: Anything else, and nothing larger than zero.
    """
    found = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): n_bytes for unit, n_bytes in _BYTES.items()}
    if found is None or found[2].lower() not in units:
        raise SchemaError(
            f"{option} {text}: not a size. Write for example 16GB (10^9 bytes each) or 16GiB (2^30). "
            f"Units: {', '.join(_BYTES)}"
        )
    n_bytes: int = round(float(found[1]) * units[found[2].lower()])
    if n_bytes <= 0:
        raise SchemaError(f"{option} {text}: must be larger than zero.")
    return n_bytes


@dataclass(frozen=True)
class Wanted:
    """What an extraction is asked to encode."""

    specs: tuple[TokenSpec, ...]
    """Each once; weights digests may be open."""
    names: tuple[str | None, ...]
    """For each spec, what its checkpoint may be given under besides its stream and kind."""
    weights: dict[str, Path]
    """Checkpoints as the user gave them, and bundled ones of presets."""


def wanted(
    words: Sequence[str],
    encoders: Sequence[str] = (),
    given_weights: Sequence[str] = (),
    with_file: Path | None = None,
    specs_file: Path | None = None,
) -> Wanted:
    """Return the specs of some presets and named encoders together, and their checkpoints.

    Args:
        words: Names of presets, and KEY=VALUE settings, which apply to all of them.
        encoders: Lists of encoders as `cache.recipes.token_specs` takes them.
        given_weights: NAME=PATH.
        with_file: Settings of a file, under KEY=VALUE.
        specs_file: Token specs of the user's own, as `cache.recipes.read_specs` takes them.

    Raises:
        SchemaError: Nothing is asked for, a name is not known, or a setting fits no preset.
    """
    from cache.recipes import read_specs, token_specs

    presets = [word for word in words if "=" not in word]
    settings = [word for word in words if "=" in word]
    if not presets and not encoders and specs_file is None:
        raise SchemaError(
            "nothing to encode is named. Give a preset (`emocache extract v2 ...`), --encoders NAME or "
            "--specs FILE."
        )
    if not presets and (settings or with_file is not None):
        raise SchemaError(
            f"{settings[0] if settings else f'--with {with_file}'}: settings change a preset, and none is "
            "named. Encoders of --encoders have no settings."
        )
    weights: dict[str, Path] = named_weights(given_weights)
    specs: dict[str, tuple[TokenSpec, str | None]] = {}
    for name in presets:
        chosen = configure(name, settings, with_file)
        bundled = weights_of(chosen, ())
        for spec in chosen.tokens.all():
            kind, own = spec.encoder.kind, f"{name}/{spec.encoder.kind}"
            # What the user gives counts; what is bundled with one preset is nothing to another one.
            is_bundled = kind in bundled and not {kind, spec.stream} & weights.keys()
            if is_bundled:
                weights[own] = bundled[kind]
            specs.setdefault(spec.canonical_json(), (spec, own if is_bundled else None))
    if encoders:
        text = ",".join(encoders)
        token_specs(text)  # the list as a whole: nothing twice
        for item in text.split(","):
            name = item.strip().partition("+")[0].partition(":")[0]
            for spec in token_specs(item):
                specs.setdefault(spec.canonical_json(), (spec, name))
    if specs_file is not None:
        for name, spec in read_specs(specs_file).items():
            specs.setdefault(f"{name} {spec.canonical_json()}", (spec, name))
    return Wanted(
        tuple(spec for spec, _ in specs.values()),
        tuple(name for _, name in specs.values()),
        weights,
    )


def retry_kinds(names: Sequence[str], *, every: bool = False) -> tuple[FailureKind, ...]:
    """Return the kinds of failure that a user wants to try again.

    Args:
        names: Kinds; one text may name several, joined by commas.
        every: All kinds.

    Raises:
        SchemaError: An unknown kind; names the near miss and all kinds.
    """
    from extract.failures import KINDS

    if every:
        return KINDS
    asked = [part.strip() for name in names for part in name.split(",")]
    for name in asked:
        if name not in KINDS:
            raise SchemaError(
                f"{name!r} is no class of failures.{near_miss(name, KINDS)} Allowed: {', '.join(KINDS)}"
            )
    return tuple(kind for kind in KINDS if kind in asked)


def choice(name: str, allowed: Sequence[str], option: str) -> str:
    """Return a name if it is allowed.

    Raises:
        SchemaError: It is not; names the near miss and all that are.
    """
    if name not in allowed:
        raise SchemaError(
            f"{option} {name}: unknown.{near_miss(name, allowed)} Allowed: {', '.join(allowed)}"
        )
    return name


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
        text: `PRESET/INPUT`, for example v2/audio; a JSON file; or, of a store, the first digits of
            a spec_id, or a stream that has one spec only.
        store: Where to look up a spec_id.

    Raises:
        SchemaError: It is none of these.
        CacheMissError: The store has no such spec, or several.
    """
    from cache.schema import decode_json
    from cache.spec import TokenSpec
    from train.config import INPUTS

    name, slash, wanted = text.partition("/")
    if slash and wanted in INPUTS and not Path(text).exists():
        specs = configure(name, None).tokens.by_input()
        if wanted not in specs:
            raise SchemaError(
                f"{text!r}: preset '{name}' has no {wanted} tokens. It has: {', '.join(specs)}."
            )
        return specs[wanted]
    if text.endswith(".json"):
        return decode_json(TokenSpec, Path(text).read_bytes(), text)
    if store is None:
        raise SchemaError(
            f"{text!r} is no spec. Give PRESET/INPUT (v2/audio), a JSON file, or, with --store, the "
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


def one_of_these(option: str, given: str, allowed: Sequence[str]) -> Any:
    """Return a value if it is one of the allowed ones.

    Raises:
        SchemaError: It is not; names the near miss.
    """
    if given not in allowed:
        raise SchemaError(
            f"{option} {given}: unknown.{near_miss(given, allowed)} Allowed: {', '.join(allowed)}"
        )
    return given
