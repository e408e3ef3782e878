"""Attention over sequences that lie end to end: nothing is padded, and no mask is ever N x N.

A pack of clips is one sequence of N positions. `Segments` says which keys each run of queries
sees: its own positions, causally, and, where several questions share a clip, the clip's prefix
before them. On a GPU that is one call of variable-length flash attention; elsewhere one call of
torch's scaled dot product attention per segment, which costs what the segments cost, not N x N.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from cache.errors import SchemaError

PACKED = "emocache_packed"
"""Name of this attention among those of transformers."""


class UnpackableError(SchemaError):
    """The language model's attention cannot be computed over packed sequences, only over padded rows."""


@dataclass(frozen=True)
class Segments:
    """Which keys each query of a pack sees."""

    rows: tuple[tuple[int, int, int, int], ...]
    """(first query, end, first key of the shared prefix, end) of each segment, in the order of the
    queries, which they cover without gaps. The keys are the prefix, then the queries' own places;
    the last query sees the last key. A sequence of its own has an empty prefix."""

    @property
    def longest(self) -> int:
        """Keys of the longest segment."""
        return max(end - start + stop - first for start, end, first, stop in self.rows)

    @cached_property
    def questions(self) -> tuple[Tensor, ...]:
        """Return the places (L,) int64 of each question's whole sequence: its prefix, then its own."""
        shared = {(first, stop) for _, _, first, stop in self.rows if stop > first}
        return tuple(
            torch.cat([torch.arange(first, stop), torch.arange(start, end)])
            for start, end, first, stop in self.rows
            if (start, end) not in shared
        )

    @cached_property
    def cu_q(self) -> list[int]:
        """Return where segments of queries start, and the end."""
        return [0, *(end for _, end, _, _ in self.rows)]

    @cached_property
    def cu_k(self) -> list[int]:
        """Return where segments of keys start among all keys laid end to end, and the end."""
        found = [0]
        for start, end, first, stop in self.rows:
            found.append(found[-1] + stop - first + end - start)
        return found

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return `cu_q`, `cu_k` (int32) and the keys' places (int64; None if each is its query's)."""
        known: dict[torch.device, tuple[Tensor, Tensor, Tensor | None]]
        known = self.__dict__.setdefault("_on", {})
        if device not in known:
            places = None
            if any(stop > first for _, _, first, stop in self.rows):
                spans = [
                    torch.arange(a, b)
                    for start, end, first, stop in self.rows
                    for a, b in ((first, stop), (start, end))
                ]
                places = torch.cat(spans).to(device, non_blocking=True)
            counts = torch.tensor([self.cu_q, self.cu_k], dtype=torch.int32).to(
                device, non_blocking=True
            )
            known[device] = counts[0], counts[1], places
        return known[device]


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within the segments of one packed sequence; transformers' attention interface.

    Args:
        module: The calling layer.
        query: (1, heads, N, channels).
        key: (1, key heads, N, channels).
        value: Like `key`.
        attention_mask: Not used; the segments say all.
        segments: Which keys each query sees.
        scaling: Of the products; None is 1 / sqrt(channels).
        dropout: Share of attention weights dropped.
        others: What else a model's layers pass on, for example `sliding_window`.

    Returns:
        (1, N, heads, channels), and no weights.

    Raises:
        UnpackableError: The model's attention is of another kind (a window shorter than a segment,
            capped products).
    """
    window, cap = others.get("sliding_window"), others.get("softcap")
    if cap is not None or (window is not None and segments.longest > window):
        kind = f"sees {window} positions only" if cap is None else "caps its products"
        raise UnpackableError(
            f"this language model's attention {kind}, and the longest sequence has "
            f"{segments.longest}; packed sequences cannot do that. Set execution.attention=padded."
        )
    if not dropout and _has_flash(query):  # flash attention has no dropout
        return _by_flash(query, key, value, segments, scaling).unsqueeze(0), None
    return _by_segment(query, key, value, segments, scaling, dropout), None


def _by_segment(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for start, end, first, stop in segments.rows:
        keys, values, mask = key[:, :, start:end], value[:, :, start:end], None
        if stop > first:
            keys = torch.cat([key[:, :, first:stop], keys], dim=2)
            values = torch.cat([value[:, :, first:stop], values], dim=2)
            mask = torch.ones(end - start, keys.shape[2], dtype=torch.bool, device=key.device)
            mask = mask.tril(stop - first)
        found = scaled_dot_product_attention(
            query[:, :, start:end],
            keys,
            values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        parts.append(found.transpose(1, 2))
    return torch.cat(parts, dim=1)


def _by_flash(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None
) -> Tensor:
    cu_q, cu_k, places = segments.on(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, channels)
    if places is not None:
        k, v = k[places], v[places]
    if k.shape[1] != q.shape[1]:
        n_shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(n_shared, dim=1), v.repeat_interleave(n_shared, dim=1)
    longest_q = max(b - a for a, b in zip(segments.cu_q, segments.cu_q[1:], strict=False))
    attend: Any = _varlen()
    found: Tensor = attend(
        q, k, v, cu_q, cu_k, longest_q, segments.longest, scale=scaling, **_causal()
    )
    return found


def _has_flash(query: Tensor) -> bool:
    """True where variable-length flash attention takes these tensors."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and _varlen() is not None
    )


@cache
def _varlen() -> Any:
    """Return torch's variable-length attention; None before torch 2.10."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


@cache
def _causal() -> dict[str, Any]:
    """Return the argument that asks for causal attention, which changed its name in torch 2.11."""
    names = inspect.signature(_varlen()).parameters
    return {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}


@contextmanager
def attention_of(llm: Any, name: str) -> Iterator[None]:
    """Let a model attend by the named implementation inside this block."""
    config = llm.config
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


# A compiled block ends where attention begins: lengths differ in every batch, and each new set of
# them would be compiled again.
_uncompiled: Any = torch.compiler.disable
AttentionInterface.register(PACKED, _uncompiled(packed_attention))
