"""Modal adapters: one linear map per stream into the language model's width (equation 5)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class ModalAdapters(nn.Module):
    """A linear map, with bias, for each block of the prefix."""

    def __init__(self, widths: Mapping[str, int], llm_width: int) -> None:
        """Build the maps.

        Args:
            widths: Block name -> channels of its tokens.
            llm_width: Channels of the language model, H.
        """
        super().__init__()
        self.maps = nn.ModuleDict({name: nn.Linear(d, llm_width) for name, d in widths.items()})

    def forward(self, block: str, tokens: Tensor) -> Tensor:
        """Map (B, T, D) tokens of a block to (B, T, H)."""
        mapped: Tensor = self.maps[block](tokens)
        return mapped
