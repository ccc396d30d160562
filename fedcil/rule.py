"""What a contribution may be, and how a round's contributions are put together (``[server]``; fedcil/robust.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FoldName = Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"]


@dataclass(frozen=True, slots=True)
class Rule:
    """Norms are L2 norms of a client's update: its contribution less the model that it was sent."""

    fold: FoldName = "mean"
    byzantine: int = 0  # clients of a round that may lie: what trimmed mean and Krum are made for
    norm_limit: float | None = None  # a larger update is refused
    clip_norm: float | None = None  # a larger update is scaled down to it

    @property
    def least(self) -> int:
        """Contributions without which the fold says nothing: 2 f + 1 for trimmed mean, 2 f + 3 for Krum."""
        return {"trimmed_mean": 1, "krum": 3, "multi_krum": 3}.get(self.fold, 0) + 2 * self.byzantine


PLAIN = Rule()
"""The weighted mean of whatever is finite."""
