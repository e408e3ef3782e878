"""Reading checkpoints safely, and the digest that stands in a TokenSpec.

The digest is of tensors under canonical names, as float32: the same weights in another file format
or half precision are the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cache.errors import CheckpointError

Tensors = dict[str, torch.Tensor]


def read_file(path: Path) -> Any:
    """Read a checkpoint file without running code from it.

    Returns:
        What the file holds: a dictionary of tensors, or nested dictionaries (`.pt`, `.pth`).

    Raises:
        CheckpointError: No such file, damaged, or a pickle that holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint file. Give an existing .pt, .pth, .bin or .safetensors file."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with _harmless_classes():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint of tensors ({first[:200]}). Files that need code to "
            "load are refused; convert them to safetensors where they were made."
        ) from None


def _harmless_classes() -> AbstractContextManager[Any]:
    """Accept the training options that MAE's and VideoMAE's trainers save beside the weights.

    They are an `argparse.Namespace`, which holds attributes and runs nothing.
    """
    accept = getattr(torch.serialization, "safe_globals", None)  # torch >= 2.5
    return nullcontext() if accept is None else accept([argparse.Namespace])


def unwrap(found: Any, where: Path) -> dict[str, Any]:
    """Return the tensors of a file that holds them plainly or below `model`, `module` or `state_dict`.

    Raises:
        CheckpointError: Not a dictionary.
    """
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{where}: holds a {type(found).__name__}, not named tensors. Give a checkpoint file."
        )
    return found


def below(tensors: Mapping[str, Any], anchor: str, where: Path, what: str) -> Tensors:
    """Return the tensors of the part that holds `anchor`, without the part's prefix.

    So the encoder is found in a file of a whole model: `encoder.patch_embed.proj.weight` beside
    `decoder.…`.

    Raises:
        CheckpointError: No such tensor, or several.
    """
    found = [n for n in tensors if n == anchor or n.endswith(f".{anchor}")]
    if len(found) != 1:
        got = f"{len(found)} tensors named" if found else "no tensor"
        raise CheckpointError(
            f"{where}: {got} '{anchor}', so not {what} checkpoint. Found {_preview(tensors)}."
        )
    prefix = found[0].removesuffix(anchor)
    return {
        n.removeprefix(prefix): tensor
        for n, tensor in tensors.items()
        if n.startswith(prefix) and isinstance(tensor, torch.Tensor)
    }


def check_model_type(config: Mapping[str, Any], allowed: Collection[str], where: Path) -> None:
    """Compare a folder's `model_type`.

    Raises:
        CheckpointError: It is the folder of another model.
    """
    if config.get("model_type") not in allowed:
        names = " or ".join(repr(name) for name in allowed)
        raise CheckpointError(
            f"{where}: model_type is {config.get('model_type')!r}, expected {names}. Give the folder "
            "of such a model."
        )


def check_sizes(found: Mapping[str, Any], spec: object, what: str, where: Path) -> None:
    """Compare what a checkpoint says of itself, under the spec's names, with the spec.

    Raises:
        CheckpointError: Something differs; all of it is listed.
    """
    wrong = [
        f"{name} is {value!r}, the spec says {getattr(spec, name)!r}"
        for name, value in found.items()
        if value != getattr(spec, name)
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: not the {what} of the spec: {'; '.join(wrong)}. Choose the encoder to fit the "
            "checkpoint."
        )


def check_settings(
    config: Mapping[str, Any], allowed: Mapping[str, Collection[Any]], where: Path
) -> None:
    """Compare settings of a config.json that no spec names, so that only one is supported.

    Args:
        config: May lack a setting; then it has the library's default, which is supported.
        allowed: Setting -> supported values.
        where: For the message.

    Raises:
        CheckpointError: A setting has another value.
    """
    wrong = [
        f"{name} is {config[name]!r}, supported: {', '.join(map(repr, values))}"
        for name, values in allowed.items()
        if name in config and config[name] not in values
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: config.json describes another network: {'; '.join(wrong)}. Give the checkpoint "
            "of a published model, or one trained from it."
        )


def _can_map(path: Path) -> bool:
    """True for the zip format, which torch can map into memory; the old format it cannot."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_folder(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """Read a transformers folder: config.json and its weights, in one file or several.

    Raises:
        CheckpointError: config.json or the weights are missing or damaged.
    """
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise CheckpointError(
            f"{folder}: a folder without config.json. Give a transformers folder or a file."
        )
    try:
        config: dict[str, Any] = json.loads(config_path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{config_path}: not JSON ({error})") from None
    tensors: Tensors = {}
    for stem in ("model.safetensors", "pytorch_model.bin"):
        listing = folder / f"{stem}.index.json"
        if listing.is_file():
            names = sorted(set(json.loads(listing.read_bytes())["weight_map"].values()))
        else:
            names = [stem] if (folder / stem).is_file() else []
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{listing}: names a file outside the folder: {name!r}")
            tensors.update(read_file(folder / name))
        if names:
            return config, tensors
    raise CheckpointError(f"{folder}: holds neither model.safetensors nor pytorch_model.bin")


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 over names, shapes and float32 little-endian values, sorted by name."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().to("cpu", torch.float32).contiguous()
        sha.update(f"{name} {tuple(values.shape)}\n".encode())
        sha.update(values.numpy().data)
    return sha.hexdigest()


def take(tensors: Mapping[str, Any], names: Iterable[str], where: Path) -> Tensors:
    """Return exactly the named tensors.

    Raises:
        CheckpointError: Some are missing; the message shows the first five and a count.
    """
    wanted = list(names)
    missing = [n for n in wanted if not isinstance(tensors.get(n), torch.Tensor)]
    if missing:
        raise CheckpointError(
            f"{where}: {len(missing)} of {len(wanted)} tensors are missing, first: "
            f"{', '.join(missing[:5])}. Found {_preview(tensors)}. Give the checkpoint of the "
            "encoder that the preset names."
        )
    return {n: tensors[n] for n in wanted}


def check_shapes(
    tensors: Mapping[str, torch.Tensor],
    module: torch.nn.Module | Mapping[str, torch.Tensor],
    where: Path,
) -> None:
    """Compare tensors with a module's parameters, or with tensors of the right shapes.

    Raises:
        CheckpointError: Shapes differ; the first five are listed.
    """
    own = module.state_dict() if isinstance(module, torch.nn.Module) else module
    wrong = [
        f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if wrong:
        raise CheckpointError(
            f"{where}: {len(wrong)} tensors have another shape than the spec says, first: "
            f"{'; '.join(wrong[:5])}. Choose the preset's encoder to fit the checkpoint."
        )


def fill(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a module its weights, all of them, as float32 copies.

    The module may be built on torch's `meta` device: nothing is initialised then, which takes seconds
    for a large network.
    """
    copies = {n: t.to(torch.float32, copy=True).contiguous() for n, t in tensors.items()}
    module.load_state_dict(copies, assign=True)


def _preview(names: Collection[str]) -> str:
    shown = ", ".join(sorted(map(str, names))[:3])
    return f"{len(names)} entries such as {shown}" if names else "an empty checkpoint"
