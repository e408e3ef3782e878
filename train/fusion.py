"""Pre-fusion of audio, image context and video: the variants of the paper's Tables 8 and 9.

    conv-attention       section 4.3, equations 2 to 4: both branches, token by token
    attention, conv      one of its branches alone ("Our Attn", "Our Conv")
    affectgpt-attention  the attention branch over the mean of each stream
    q-former             learnt queries read the tokens of all streams

The paper leaves widths, dropout and the number of blocks open; they follow the released code, the
only structure that yields the paper's 71 M trainable parameters (reference facts, section 2). The
last two follow AffectGPT's code, with the image context as a third stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from cache.errors import SpecMismatchError
from train.config import FUSED, FusionConfig, FusionKind

QUERY_STD = 0.02
"""Initial spread of learnt queries, as in BERT and AffectGPT."""


def make_fusion(
    config: FusionConfig, audio_width: int | None, image_width: int | None, video_width: int | None
) -> PreFusion | None:
    """Build the pre-fusion of `config.kind`; None for a prefix without fusion tokens.

    Args:
        config: Kind and sizes.
        audio_width: Channels of an audio token; None, here and in the next two, leaves the stream out.
        image_width: Channels of the CLS token.
        video_width: Channels of a video token.
    """
    kind = KINDS[config.kind]
    return None if kind is None else kind(config, audio_width, image_width, video_width)


def fused_mask(
    config: FusionConfig,
    audio_mask: Tensor | None,
    image_mask: Tensor | None,
    video_mask: Tensor | None,
) -> Tensor:
    """Return the mask that `PreFusion.forward` would, (B, Tf) bool, without fusing.

    Args:
        config: Kind and numbers of tokens.
        audio_mask: (B, Ta) bool, True where valid; None, here and in the next two, of a stream that
            the pre-fusion was built without.
        image_mask: (B,) bool.
        video_mask: (B, Tv) bool.
    """
    kind = KINDS[config.kind]
    context = None if image_mask is None else image_mask.unsqueeze(1)
    masks = [mask for mask in (audio_mask, context, video_mask) if mask is not None]
    if kind is None:
        return masks[0][:, :0]
    if kind is QFormer:
        present = torch.cat(masks, dim=1).any(dim=1)
        return present.unsqueeze(1).expand(-1, config.n_queries)
    timed = [mask for mask in (audio_mask, video_mask) if mask is not None]
    n = 1 if kind is AffectGptAttention else config.n_tokens or timed[0].shape[1]
    fused = torch.stack([resample(m.unsqueeze(-1).float(), m, n)[1] for m in timed]).any(dim=0)
    return fused if context is None else fused | context


def resample(tokens: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Bring a stream to `n` tokens: bin means for fewer, repeats for more.

    Bin i covers the tokens floor(i T / n) to ceil((i + 1) T / n), as in torch's adaptive pooling;
    it is the mean of its valid tokens, and masked where it has none. For n > T, token i is a copy
    of token floor(i T / n).

    Args:
        tokens: (B, T, D).
        mask: (B, T) bool, True where valid.
        n: Tokens wanted; T returns the inputs themselves.

    Returns:
        (B, n, D) and its mask (B, n).
    """
    n_tokens = tokens.shape[1]
    if n == n_tokens:
        return tokens, mask
    if n > n_tokens:
        index = torch.arange(n, device=tokens.device) * n_tokens // n
        return tokens[:, index], mask[:, index]
    # The mean of the valid tokens is the mean of all, invalid ones as zeros, over the valid share.
    weight = mask.unsqueeze(1).to(tokens.dtype)  # (B, 1, T)
    total = nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2) * weight, n)  # (B, D, n)
    share = nn.functional.adaptive_avg_pool1d(weight, n)  # (B, 1, n)
    valid = share > 0
    return (total / share.masked_fill(~valid, 1.0)).transpose(1, 2), valid.squeeze(1)


def _mlp(d_in: int, hidden: int, d_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d_in, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, d_out),
        nn.ReLU(),
        nn.Dropout(dropout),
    )


class PreFusion(nn.Module, ABC):
    """Two or three streams in, fusion tokens out.

    A masked token contributes nothing: what `prep` makes of it is set to zero, so an absent stream
    cannot speak through its bias.
    """

    def __init__(
        self,
        config: FusionConfig,
        audio_width: int | None,
        image_width: int | None,
        video_width: int | None,
    ) -> None:
        """Build `prep`, which brings each stream to `config.width` channels; see `make_fusion`."""
        super().__init__()
        widths = zip(FUSED, (audio_width, image_width, video_width), strict=True)
        self.prep = nn.ModuleDict(
            {name: self._project(width, config) for name, width in widths if width is not None}
        )

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams that are fused, in the order of equation 2."""
        return tuple(self.prep)

    def _project(self, d_in: int, config: FusionConfig) -> nn.Module:
        return _mlp(d_in, config.hidden_width, config.width, config.dropout)

    @abstractmethod
    def forward(
        self,
        audio: Tensor | None,
        image_cls: Tensor | None,
        video: Tensor | None,
        audio_mask: Tensor | None,
        image_mask: Tensor | None,
        video_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse the streams; those that the module was built without are None, tokens and mask.

        Args:
            audio: (B, Ta, Da).
            image_cls: (B, Di).
            video: (B, Tv, Dv).
            audio_mask: (B, Ta) bool, True where valid.
            image_mask: (B,) bool.
            video_mask: (B, Tv) bool.

        Returns:
            (B, Tf, out_width) and its mask (B, Tf): valid where any stream is.
        """


class ConvBlock(nn.Module):
    """`x + Switch(Conv1d(x))` along the token axis (equation 4); Switch is x * sigmoid(x)."""

    def __init__(self, width: int) -> None:
        """Build one block of `width` channels."""
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T) to (B, C, T)."""
        return x + nn.functional.silu(self.conv(x))


class ConvAttention(PreFusion):
    """Pair audio and video token by token, next to the same image context at each (equation 2)."""

    branches: tuple[Literal["attention", "conv"], ...] = ("attention", "conv")

    def __init__(
        self,
        config: FusionConfig,
        audio_width: int | None,
        image_width: int | None,
        video_width: int | None,
    ) -> None:
        """Build the branches; see `make_fusion` for the arguments."""
        super().__init__(config, audio_width, image_width, video_width)
        self.n_tokens, self.gate = config.n_tokens, config.gate
        c, joint = config.width, len(self.streams) * config.width
        if "attention" in self.branches:
            self.attn_mlp = _mlp(joint, config.hidden_width, c, config.dropout)
            self.attn_gate = nn.Linear(c, len(self.streams))
        if "conv" in self.branches:
            self.conv_in = nn.Conv1d(joint, c, kernel_size=1)
            self.conv_blocks = nn.Sequential(*(ConvBlock(c) for _ in range(config.n_blocks)))
        self.merge = nn.Linear(c, config.out_width)

    def forward(
        self,
        audio: Tensor | None,
        image_cls: Tensor | None,
        video: Tensor | None,
        audio_mask: Tensor | None,
        image_mask: Tensor | None,
        video_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse as `PreFusion.forward` says, into `n_tokens` tokens; None takes audio and video's.

        Raises:
            SpecMismatchError: Without `n_tokens`, audio and video differ in number.
        """
        counts = [x.shape[1] for x in (audio, video) if x is not None]
        n_tokens = self.n_tokens or counts[0]
        if self.n_tokens is None and len({*counts}) > 1:
            raise SpecMismatchError(
                f"audio has {counts[0]} tokens and video {counts[1]}, but they are paired "
                "one by one; set model.fusion.n_tokens to bring both to one number"
            )
        given: dict[str, tuple[Tensor, Tensor]] = {}  # (B, T, D) and its mask (B, T)
        if audio is not None and audio_mask is not None:
            given["audio"] = resample(audio, audio_mask, n_tokens)
        if image_cls is not None and image_mask is not None:
            context = image_cls.unsqueeze(1).expand(-1, n_tokens, -1)
            given["image"] = context, image_mask.unsqueeze(1).expand(-1, n_tokens)
        if video is not None and video_mask is not None:
            given["video"] = resample(video, video_mask, n_tokens)
        parts = [self.prep[name](x) * mask.unsqueeze(-1) for name, (x, mask) in given.items()]
        present = torch.stack([mask for _, mask in given.values()], dim=-1)  # (B, T, 3)
        f_d = torch.cat(parts, dim=-1)  # (B, T, 3 C)
        mixed = []
        if "attention" in self.branches:
            f_s = torch.stack(parts, dim=-1)  # (B, T, C, 3)
            mixed.append((f_s @ self._weights(f_d, present).unsqueeze(-1)).squeeze(-1))
        if "conv" in self.branches:
            mixed.append(self.conv_blocks(self.conv_in(f_d.transpose(1, 2))).transpose(1, 2))
        return self.merge(sum(mixed[1:], mixed[0])), present.any(dim=-1)

    def _weights(self, f_d: Tensor, present: Tensor) -> Tensor:
        """Map F_d (B, T, 3 C) to a weight per stream (B, T, 3), as equation 3 uses it."""
        weights: Tensor = self.attn_gate(self.attn_mlp(f_d))
        if self.gate == "linear":
            return weights
        # Where no stream is present nothing is hidden: a softmax over nothing would be NaN.
        hidden = ~present & present.any(dim=-1, keepdim=True)
        return weights.masked_fill(hidden, float("-inf")).softmax(dim=-1)


class AttentionBranch(ConvAttention):
    """Conv-Attention without the convolutions: equation 3 alone."""

    branches = ("attention",)


class ConvBranch(ConvAttention):
    """Conv-Attention without the attention: equation 4 alone."""

    branches = ("conv",)


class AffectGptAttention(AttentionBranch):
    """AffectGPT's attention: the same weighted sum, over the mean of each stream's valid tokens."""

    def __init__(
        self,
        config: FusionConfig,
        audio_width: int | None,
        image_width: int | None,
        video_width: int | None,
    ) -> None:
        """Build the module; the mean of a stream is its resampling to one token."""
        one = config.model_copy(update={"n_tokens": 1})
        super().__init__(one, audio_width, image_width, video_width)


class QFormer(PreFusion):
    """Learnt queries read the tokens of all streams, which are one memory (AffectGPT)."""

    def __init__(
        self,
        config: FusionConfig,
        audio_width: int | None,
        image_width: int | None,
        video_width: int | None,
    ) -> None:
        """Build queries, stream embeddings and blocks; see `make_fusion` for the arguments."""
        super().__init__(config, audio_width, image_width, video_width)
        c = config.width
        self.queries = nn.Parameter(torch.randn(config.n_queries, c) * QUERY_STD)
        # AffectGPT learns an embedding for each place of the memory, which fixes the number of
        # tokens; a learnt one per stream and fixed waves along it tell the same apart for any.
        self.stream_embeddings = nn.Parameter(torch.randn(len(self.streams), c))
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                c, config.n_heads, config.hidden_width, config.dropout, "gelu", batch_first=True
            )
            for _ in range(config.n_layers)
        )
        self.merge = nn.Linear(c, config.out_width)

    def _project(self, d_in: int, config: FusionConfig) -> nn.Module:
        return nn.Linear(d_in, config.width)

    def forward(
        self,
        audio: Tensor | None,
        image_cls: Tensor | None,
        video: Tensor | None,
        audio_mask: Tensor | None,
        image_mask: Tensor | None,
        video_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Fuse as `PreFusion.forward` says, into `n_queries` tokens."""
        context = None if image_cls is None else image_cls.unsqueeze(1)
        context_mask = None if image_mask is None else image_mask.unsqueeze(1)
        tokens = [x for x in (audio, context, video) if x is not None]
        masks = [m for m in (audio_mask, context_mask, video_mask) if m is not None]
        placed = [
            self.prep[name](x) + own + _waves(x.shape[1], own)
            for name, x, own in zip(self.streams, tokens, self.stream_embeddings, strict=True)
        ]
        mask = torch.cat(masks, dim=1)  # (B, M)
        memory = torch.cat(placed, dim=1) * mask.unsqueeze(-1)  # (B, M, C), M = Ta + 1 + Tv
        present = mask.any(dim=1, keepdim=True)  # (B, 1)
        # A sample without any stream reads zeros: a softmax over nothing would be NaN.
        hidden = ~mask & present
        x = self.queries.expand(len(memory), -1, -1)  # (B, Q, C)
        for block in self.blocks:
            x = block(x, memory, memory_key_padding_mask=hidden)
        return self.merge(x), present.expand(-1, x.shape[1])


def _waves(n_tokens: int, like: Tensor) -> Tensor:
    """Return sinusoidal positions (T, C), sine and cosine by turns, for a parameter (C,)."""
    places = torch.arange(n_tokens, dtype=like.dtype, device=like.device)
    channels = torch.arange(0, len(like), 2, dtype=like.dtype, device=like.device)
    angles = torch.outer(places, 10_000.0 ** (-channels / len(like)))  # (T, ceil(C / 2))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, : len(like)]


KINDS: Mapping[FusionKind, type[PreFusion] | None] = {
    "none": None,
    "q-former": QFormer,
    "affectgpt-attention": AffectGptAttention,
    "attention": AttentionBranch,
    "conv": ConvBranch,
    "conv-attention": ConvAttention,
}
"""Every `FusionConfig.kind`, in the order of Table 9."""
