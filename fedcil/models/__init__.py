"""Networks: classifiers with a head that grows, and the generators of MFCL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedcil.dotted import load_dotted
from fedcil.errors import ScenarioError
from fedcil.keys import Key, global_draws
from fedcil.models.cnn import CNN, LEAST_SIDE
from fedcil.models.network import Backbone, Network, allocate, initialise
from fedcil.models.resnet import resnet8, resnet18

if TYPE_CHECKING:
    from fedcil.tables import ModelSection

Image = tuple[int, int, int]
"""(channels, height, width)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A classifier as a value.

    ``own``: set for a backbone from outside fedcil, which starts as its constructor fills it (pretrained weights, say);
    the key of what that draws. A shipped one is drawn by fedcil.
    """

    backbone: Callable[[], Backbone]
    image: Image
    own: Key | None = None

    def build(self, classes: int, precision: torch.dtype | None = None) -> Network:
        """A network to load tensors into. What is in a shipped one's memory is not defined."""
        if self.own:
            with global_draws(self.own):
                return Network(self.backbone(), classes, precision)
        with torch.device("meta"):
            network = Network(self.backbone(), classes, precision)
        return allocate(network)

    def start(self, classes: int, generator: torch.Generator) -> Network:
        """The network that a run begins with; ``generator`` draws the head, and a shipped backbone."""
        network = self.build(classes)
        initialise(network.head if self.own else network, generator)
        return network


def make_architecture(section: ModelSection, image: Image, key: Key) -> Architecture:
    """The classifier that ``[model]`` names; a dotted path is called as ``function(channels, section)``, and what it
    draws is drawn from ``key``. ScenarioError for images that are too small for it.
    """
    channels, height, width = image
    match section.name:
        case "cnn":
            if min(height, width) < LEAST_SIDE:
                raise ScenarioError(
                    f"images of {height} x {width} are too small for model.name = 'cnn'",
                    where="model.name, data",
                    allowed=f"images of at least {LEAST_SIDE} x {LEAST_SIDE}",
                    next="set model.name = 'resnet8', data.image_size, or take a backbone of your own",
                )
            return Architecture(lambda: CNN(channels, section.width or 32), image)
        case "resnet8":
            return Architecture(lambda: resnet8(channels, section.width or 16, section.stem), image)
        case "resnet18":
            return Architecture(lambda: resnet18(channels, section.width or 64, section.stem), image)
    build = load_dotted(section.name, "model.name")
    return Architecture(lambda: build(channels, section), image, key)
