"""One process or many: who is who, how gradients meet, and how all agree to stop.

Started by torchrun, `accelerate launch` or srun, which set RANK, WORLD_SIZE and LOCAL_RANK, each
process takes its own packs of every step (`train.packing`), so no sample is seen twice and none is
left out. `ddp` keeps the whole model in each process; `fsdp` shards it, layer by layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cache.errors import SchemaError
from train.llm.backbone import decoder_layers
from train.model import EmotionLlama

Parallel = Literal["ddp", "fsdp"]

_TIMEOUT = timedelta(minutes=30)
"""The first process may write a checkpoint, or load weights from a slow disk, while others wait."""


class Processes:
    """The processes of a run, and this one's place among them."""

    def __init__(self, device: str | None = None, parallel: Parallel = "ddp") -> None:
        """Join the others, if a launcher started several.

        Args:
            device: Torch device; None takes a GPU where there is one.
            parallel: How several processes share the model.

        Raises:
            SchemaError: A device that is not there.
        """
        self.n = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.parallel: Parallel = parallel
        self.device = choose_device(device)
        self._control: Any = None
        self._joined = False
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.n > 1:
            if not dist.is_initialized():
                backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
                dist.init_process_group(backend, timeout=_TIMEOUT)
                self._joined = True
            # Agreement goes through the CPU, so that no GPU has to finish its work for it.
            self._control = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    @property
    def is_first(self) -> bool:
        """True in the one process that writes files and speaks."""
        return self.rank == 0

    def wrap(self, model: EmotionLlama) -> nn.Module:
        """Place a model on this process's device and tie it to those of the others."""
        if self.n > 1 and self.parallel == "fsdp":
            return _shard(model, self.device)
        model.to(self.device)
        if self.n == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    @contextmanager
    def accumulating(self, wrapped: nn.Module, *, is_last: bool) -> Iterator[None]:
        """Exchange gradients in the last of a step's backward passes only."""
        if self.n == 1:
            yield
        elif self.parallel == "fsdp":
            sharded: Any = wrapped
            sharded.set_requires_gradient_sync(is_last)
            yield
        elif is_last:
            yield
        else:
            ddp: Any = wrapped
            with ddp.no_sync():
                yield

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Return, for each flag, whether any process raised it."""
        if self.n == 1:
            return flags
        raised = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._control)
        return tuple(bool(x) for x in raised.tolist())

    def sum_of(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, on the CPU."""
        values = values.detach().cpu()
        if self.n > 1:
            dist.all_reduce(values, group=self._control)
        return values

    def same(self, value: Any) -> Any:
        """Return what the first process holds, in every process."""
        if self.n == 1:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self._control)
        return held[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.n > 1:
            dist.barrier(group=self._control)

    def leave(self) -> None:
        """Part from the others at the end of the program."""
        if self._joined:
            dist.destroy_process_group()


def choose_device(name: str | None = None) -> torch.device:
    """Return the device that a process of this run uses.

    Args:
        name: `cpu`, `cuda` or `cuda:N`; None or `auto` takes a GPU where there is one.

    Raises:
        SchemaError: A GPU that is not there.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "cuda":
        n = torch.cuda.device_count()
        index = int(number) if number else local_rank
        if index >= n:
            raise SchemaError(
                f"--device {name}: this process wants GPU {index}, and {n} are visible. Start as many "
                "processes as there are GPUs (torchrun --nproc-per-node), or use --device cpu."
            )
        return torch.device("cuda", index)
    return torch.device(name)


def _shard(model: EmotionLlama, device: torch.device) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.to(device)
    for layer in decoder_layers(model.llm.get_base_model()):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(tensor: Tensor) -> Tensor:
    """Return a parameter, or its gradient, in full, from whichever processes hold parts of it."""
    full = getattr(tensor, "full_tensor", None)
    return tensor.detach() if full is None else full().detach()


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy full values into a parameter, of which this process may hold a part."""
    with torch.no_grad():
        if hasattr(parameter, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            sharded: Any = parameter
            values = distribute_tensor(
                values.to(parameter.device, parameter.dtype),
                sharded.device_mesh,
                sharded.placements,
            )
        parameter.copy_(values)
