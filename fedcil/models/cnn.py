"""A small convolutional network for CPU work."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from fedcil.models.network import Backbone

LEAST_SIDE = 4  # of an image: two poolings leave one position of it


class CNN(Backbone):
    """Three times convolution, batch norm, ReLU with ``width``, 2 and 4 ``width`` channels; max-pooling
    after the first two; global average pooling.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(4 * width)
        self.layers = nn.Sequential(
            *_block(channels, width),
            nn.MaxPool2d(2),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),
            *_block(2 * width, 4 * width),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, 4 width)."""
        return cast(Tensor, self.layers(images)).mean((2, 3))


def _block(channels: int, width: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
