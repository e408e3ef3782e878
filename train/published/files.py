"""The torch files in which checkpoints are published.

A file never brings code along: it is read with `weights_only`, and what needs more is refused.
"""

from __future__ import annotations

import pickle
import re
import struct
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cache.errors import CheckpointError

# What torch.load raises for damaged bytes, found by damaging files at random.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
    OSError,
)


def read_published(path: Path) -> dict[str, Tensor]:
    """Read a published checkpoint's tensors onto the CPU, mapped from the file where it allows.

    Args:
        path: A torch file, with the tensors under `model` or bare, or a safetensors file.

    Raises:
        CheckpointError: Missing, damaged, not a checkpoint, or it needs code to be read.
    """
    return read_file(path)[0]


def read_file(path: Path) -> tuple[dict[str, Tensor], object]:
    """Return the tensors of `read_published`, and the configuration that lies beside them, if any."""
    try:
        with path.open("rb") as file:
            magic = file.read(9)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}). Give the .pth file that was published."
        ) from None
    if path.suffix == ".safetensors" or magic[8:] == b"{":
        try:
            return load_file(path), None
        except SafetensorError as error:
            raise _damaged(path, error) from None
    is_zip = magic[:2] == b"PK"
    if not is_zip and magic[:1] != b"\x80":
        raise CheckpointError(
            f"{path}: not a checkpoint, it begins with {magic!r}. Give the torch file (.pth) "
            "itself, not a web page or a pointer to it, or a safetensors file."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickle protocols, when damaged
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign is None:
            raise _damaged(path, error) from None
        raise CheckpointError(
            f"{path}: refused, it is a pickle that needs {foreign[1]}; only tensors and plain "
            "values are read, and no code was run. Save the state dict alone: "
            "torch.save({'model': state_dict}, FILE)"
        ) from None
    except _DAMAGE as error:
        raise _damaged(path, error) from None
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: {_NO_STATE}, but {type(state).__name__}. {_GIVE_STATE}")
    odd = [str(k) for k, v in state.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if odd:
        raise CheckpointError(
            f"{path}: {_NO_STATE}: {len(odd)} of {len(state)} entries are no tensors, first: "
            f"{', '.join(odd[:5])}. {_GIVE_STATE}"
        )
    return dict(state), content.get("config") if state is not content else None


_NO_STATE = "holds no state dict"
_GIVE_STATE = "A checkpoint is {'model': {key: tensor}}, or the inner mapping alone."


def _damaged(path: Path, error: Exception) -> CheckpointError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"{path}: damaged or not a checkpoint ({first[:200]}). Download it again and compare its "
        "size with the published one."
    )
