"""Networks of the round benchmark. They need torch and ``fedcil.models``, which every peer has."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from fedcil.models.network import Backbone
from fedcil.models.resnet import resnet18

CLASSES = 10
NETS = ("lenet", "cnn4", "resnet18")


class Layers(Backbone):
    """A chain of layers that ends in features (n, width)."""

    def __init__(self, width: int, layers: OrderedDict[str, nn.Module]) -> None:
        super().__init__(width)
        self.layers = nn.Sequential(layers)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


def lenet(channels: int, _: object = None) -> Backbone:
    """Two 5x5 convolutions and two linear layers, 62 thousand parameters with the head."""
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(channels, 6, 5),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flat=nn.Flatten(),
        fc1=nn.Linear(400, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
    )
    return Layers(84, layers)


def cnn4(channels: int, _: object = None) -> Backbone:
    """Four 3x3 convolutions 32-64-64-128 with pooling after each, 131 thousand parameters."""
    layers = OrderedDict[str, nn.Module]()
    inputs = channels
    for place, outputs in enumerate((32, 64, 64, 128)):
        layers[f"conv{place}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers[f"relu{place}"] = nn.ReLU()
        layers[f"pool{place}"] = nn.MaxPool2d(2) if place < 3 else nn.AdaptiveAvgPool2d(1)
        inputs = outputs
    layers["flat"] = nn.Flatten()
    return Layers(128, layers)


class Blank(Backbone):
    """``megabytes`` of parameters in 20 tensors, and nothing to compute: what an engine carries."""

    def __init__(self, megabytes: int) -> None:
        super().__init__(1)
        size = megabytes * 10**6 // (4 * 20)
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(size)) for _ in range(20))

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))[:, None]


def blank(_: int, section: Any) -> Backbone:
    """``model.width`` counts megabytes."""
    return Blank(section.width)


def backbone(name: str) -> Backbone:
    return {"lenet": lenet, "cnn4": cnn4, "resnet18": lambda channels: resnet18(channels, 64, "3x3")}[name](3)


class Classifier(nn.Module):
    """Backbone and head under the names that fedcil's own networks use, in plain PyTorch."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.backbone = backbone(name)
        self.head = nn.Linear(self.backbone.width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))
        return logits


def build(name: str, seed: int = 0) -> Classifier:
    """The same weights in every process."""
    torch.manual_seed(seed)
    return Classifier(name)
