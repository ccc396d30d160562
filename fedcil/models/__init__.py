"""Networks: classifiers with a head that grows, and the generators of MFCL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedcil.dotted import load_dotted
from fedcil.models.cnn import CNN
from fedcil.models.network import Backbone, Network, allocate
from fedcil.models.resnet import resnet8, resnet18

if TYPE_CHECKING:
    from fedcil.scenario import ModelSection

Image = tuple[int, int, int]
"""(channels, height, width)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A classifier as a value: ``build(classes)`` gives a network with uninitialised memory."""

    backbone: Callable[[], Backbone]
    image: Image

    def build(self, classes: int, precision: torch.dtype | None = None) -> Network:
        with torch.device("meta"):
            network = Network(self.backbone(), classes, precision)
        return allocate(network)


def make_architecture(section: ModelSection, image: Image) -> Architecture:
    """The classifier that ``[model]`` names; a dotted path is called as ``function(channels, section)``."""
    channels = image[0]
    match section.name:
        case "cnn":
            return Architecture(lambda: CNN(channels, section.width or 32), image)
        case "resnet8":
            return Architecture(lambda: resnet8(channels, section.width or 16, section.stem), image)
        case "resnet18":
            return Architecture(lambda: resnet18(channels, section.width or 64, section.stem), image)
    build = load_dotted(section.name, "model.name")
    return Architecture(lambda: build(channels, section), image)
