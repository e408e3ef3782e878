"""Conv-Attention pre-fusion (paper section 4.3, equations 2 to 4).

The paper leaves widths, dropout and the number of blocks open; they follow the released code, the
only structure that yields the paper's 71 M trainable parameters (reference facts, section 2).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from train.config import FusionConfig

N_STREAMS = 3
"""Audio, global image context, video: the order of equation 2."""


def _mlp(d_in: int, hidden: int, d_out: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(d_in, hidden),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, d_out),
        nn.ReLU(),
        nn.Dropout(dropout),
    )


class ConvBlock(nn.Module):
    """`x + Switch(Conv1d(x))` along the token axis (equation 4); Switch is x * sigmoid(x)."""

    def __init__(self, width: int) -> None:
        """Build one block of `width` channels."""
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, T) to (B, C, T)."""
        return x + nn.functional.silu(self.conv(x))


class ConvAttention(nn.Module):
    """Fuse audio, image context and video, token by token."""

    def __init__(
        self, config: FusionConfig, audio_width: int, image_width: int, video_width: int
    ) -> None:
        """Build the module.

        Args:
            config: Widths, blocks, dropout.
            audio_width: Channels of an audio token.
            image_width: Channels of the CLS token.
            video_width: Channels of a video token.
        """
        super().__init__()
        c, hidden = config.width, config.hidden_width
        widths = {"audio": audio_width, "image": image_width, "video": video_width}
        self.prep = nn.ModuleDict(
            {name: _mlp(width, hidden, c, config.dropout) for name, width in widths.items()}
        )
        self.attn_mlp = _mlp(N_STREAMS * c, hidden, c, config.dropout)
        self.attn_gate = nn.Linear(c, N_STREAMS)
        self.conv_in = nn.Conv1d(N_STREAMS * c, c, kernel_size=1)
        self.conv_blocks = nn.Sequential(*(ConvBlock(c) for _ in range(config.n_blocks)))
        self.merge = nn.Linear(c, config.out_width)

    def forward(
        self,
        audio: Tensor,
        image_cls: Tensor,
        video: Tensor,
        audio_mask: Tensor,
        image_mask: Tensor,
        video_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Fuse three streams.

        A masked token contributes nothing: what the first MLP makes of it is set to zero, so an
        absent stream cannot speak through its bias.

        Args:
            audio: (B, T, Da).
            image_cls: (B, Di), broadcast to T.
            video: (B, T, Dv).
            audio_mask: (B, T) bool, True where valid.
            image_mask: (B,) bool.
            video_mask: (B, T) bool.

        Returns:
            (B, T, out_width) and its mask (B, T): valid where any stream is.
        """
        n_tokens = audio.shape[1]
        inputs = {
            "audio": (audio, audio_mask),
            "image": (
                image_cls.unsqueeze(1).expand(-1, n_tokens, -1),
                image_mask.unsqueeze(1).expand(-1, n_tokens),
            ),
            "video": (video, video_mask),
        }
        parts = [self.prep[name](x) * mask.unsqueeze(-1) for name, (x, mask) in inputs.items()]
        f_d = torch.cat(parts, dim=-1)  # (B, T, 3 C)
        f_s = torch.stack(parts, dim=-1)  # (B, T, C, 3)
        gate = self.attn_gate(self.attn_mlp(f_d)).unsqueeze(-1)  # (B, T, 3, 1)
        f_attn = (f_s @ gate).squeeze(-1)  # (B, T, C)
        f_conv = self.conv_blocks(self.conv_in(f_d.transpose(1, 2))).transpose(1, 2)  # (B, T, C)
        fused = cast(Tensor, self.merge(f_attn + f_conv))
        return fused, audio_mask | video_mask | image_mask.unsqueeze(1)
