"""A split's images as a tensor, read by place."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcil.data.dataset import Split


class Images:
    """On a CPU the whole set's, where they lie (memory-mapped, it may be); on a GPU the split's own, there once."""

    def __init__(self, split: Split, device: torch.device) -> None:
        mapped = device.type == "cpu"
        self._stored = torch.from_numpy(split.stored if mapped else split.images).to(device)
        self._rows = torch.from_numpy(split.rows) if mapped and split.rows is not None else None

    def take(self, index: Tensor) -> Tensor:
        """The split's images at ``index`` (n,), on the device: (n, height, width, channels) uint8."""
        return self._stored.index_select(0, index if self._rows is None else self._rows[index])
