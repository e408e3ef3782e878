"""Processes that begin clean: forked from a server that runs nothing but imports.

A test's own process has threads: of the store, of torch, of pytest-xdist. Who forks it may fork a lock
that one of them holds, and waits for ever.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from typing import Any

PRELOADED = [
    "emocache",
    "cache.store",
    "eval.verbs.arguments",
    "eval.progress",
    "peft",
    "tests.faults",
    "tests.training",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.tensorboard",
    "train.loop",
    "transformers.models.llama.modeling_llama",
]
"""What the server imports, once: it is one for all tests of a process, whoever asks first."""


def clean_context() -> ForkServerContext:
    """Return what starts such processes, and what makes their barriers and queues."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_apart(*works: tuple[Callable[..., None], tuple[Any, ...]]) -> list[int | None]:
    """Run functions of modules in processes of their own, at once; return their exit codes."""
    context = clean_context()
    processes = [context.Process(target=function, args=args) for function, args in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return [process.exitcode for process in processes]
