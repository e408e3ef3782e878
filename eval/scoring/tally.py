"""The one form in which every metric is computed: numbers per item, and a function of their sums.

Hit rate, F, accuracy and mean average precision are all functions of sums over items: so many hits, so
many true, so many predicted. Kept that way, a score of any part of the items (a slice, a bootstrap
sample, a swapped pair of runs) is one matrix product, and no metric is written twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Tally:
    """What n items add to a score.

    Args:
        columns: Names of the k sums.
        values: (n, k) float64: what each item adds to each sum; 0 where it is not scored.
        score: From sums (..., k) to scores (...): a fraction, or NaN where nothing is scored.
        parts: From sums (k,) to the parts of the score, per wheel or class; NaN where undefined.
        scored: (n,) bool: items that enter the score, on one wheel at least.
    """

    columns: tuple[str, ...]
    values: Floats
    score: Callable[[Floats], Floats]
    parts: Callable[[Floats], dict[str, float]]
    scored: npt.NDArray[np.bool_]

    @property
    def sums(self) -> Floats:
        """The sums over all items, (k,)."""
        total: Floats = self.values.sum(axis=0)
        return total

    @property
    def total(self) -> float:
        """The score of all items."""
        return float(self.score(self.sums))

    def of(self, chosen: npt.NDArray[np.bool_]) -> float:
        """Return the score of a part of the items, (n,) bool; NaN if none of them is scored."""
        return float(self.score(self.values[chosen].sum(axis=0)))
