"""Reading checkpoints safely, and the digest that stands in a TokenSpec.

The digest is of tensors under canonical names, as float32: the same weights in another file format
or half precision are the same weights.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Collection, Iterable, Mapping
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
        return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_map(path))
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint of tensors ({first[:200]}). Files that need code to "
            "load are refused; convert them to safetensors where they were made."
        ) from None


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


def check_shapes(tensors: Mapping[str, torch.Tensor], module: torch.nn.Module, where: Path) -> None:
    """Compare tensors with a module's parameters.

    Raises:
        CheckpointError: Shapes differ; the first five are listed.
    """
    own = module.state_dict()
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


def _preview(names: Collection[str]) -> str:
    shown = ", ".join(sorted(map(str, names))[:3])
    return f"{len(names)} entries such as {shown}" if names else "an empty checkpoint"


def freeze(module: torch.nn.Module, device: str) -> None:
    """Put a module into inference mode on a device, without gradients."""
    module.eval().requires_grad_(requires_grad=False)
    module.to(device)
