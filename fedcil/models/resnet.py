"""ResNets: the CIFAR form (3x3 stem, no max-pooling), the ImageNet form (7x7 stem), and narrow ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fedcil.models.network import Backbone

Stem = Literal["3x3", "3x3_stride2", "7x7"]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (1x1 convolution where the shape changes).

    With fewer than 8 channels the shortcut's positions are picked before its convolution and not by its stride: on CPUs
    with AVX2 alone oneDNN's gradient of such a weight writes behind its memory (torch 2.14.1).
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.picked = stride if channels < 8 else 1
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            convolution = nn.Conv2d(channels, width, 1, stride // self.picked, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, h, w) -> (n, width, h / stride, w / stride)."""
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        if self.picked > 1:
            x = x[:, :, :: self.picked, :: self.picked]
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x), inplace=True)


class ResNet(Backbone):
    """Stages of blocks with doubling width; each but the first halves the resolution."""

    def __init__(self, channels: int, width: int, blocks: Sequence[int], stem: Stem) -> None:
        super().__init__(width << (len(blocks) - 1))
        self.stem = _stem(channels, width, stem)
        layers: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width << stage
            for place in range(count):
                stride = 2 if stage > 0 and place == 0 else 1
                layers.append(Block(inputs, outputs, stride))
                inputs = outputs
        self.stages = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, height, width) -> (n, width of the last stage)."""
        return cast(Tensor, self.stages(self.stem(images))).mean((2, 3))


def _stem(channels: int, width: int, stem: Stem) -> nn.Sequential:
    if stem == "7x7":
        return nn.Sequential(
            nn.Conv2d(channels, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
    stride = 2 if stem == "3x3_stride2" else 1
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))


def resnet8(channels: int, width: int, stem: Stem) -> ResNet:
    """Three stages of one block, PyTorch's default initialisation: the narrow network for CPU work."""
    return ResNet(channels, width, (1, 1, 1), stem)


def resnet18(channels: int, width: int, stem: Stem) -> ResNet:
    """Four stages of two blocks; with width 64 the networks of the MFCL paper, initialised as there."""
    network = ResNet(channels, width, (2, 2, 2, 2), stem)
    network.he_convolutions = True
    return network
