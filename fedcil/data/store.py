"""A split of a data set on a device: images and labels read by place, and how images become inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fedcil.data.augment import normalise
from fedcil.data.dataset import Dataset, Labels, Split


class StoredSplit:
    """``split`` is one of ``data``; ``labels`` (n,) are its labels in the stream.

    On a CPU its images stay where the whole set's lie (memory-mapped, it may be); on a GPU its own are there, once.
    """

    def __init__(self, data: Dataset, split: Split, labels: Labels, device: torch.device) -> None:
        mapped = device.type == "cpu"
        self._images = torch.from_numpy(split.stored if mapped else split.images).to(device)
        self._rows = torch.from_numpy(split.rows) if mapped and split.rows is not None else None
        self.labels = torch.from_numpy(labels).to(device)
        self.mean = torch.tensor(data.mean, device=device)
        self.std = torch.tensor(data.std, device=device)

    def images(self, index: Tensor) -> Tensor:
        """Those at ``index`` (n,), on the device: (n, height, width, channels) uint8."""
        return self._images.index_select(0, index if self._rows is None else self._rows[index])

    def normalised(self, images: Tensor) -> Tensor:
        """Stored images (n, height, width, channels) uint8 -> (n, channels, height, width), not augmented."""
        return normalise(images, self.mean, self.std)
