"""A ReLU right before a max-pooling is done after it: of the same numbers the same bits, for a part of the work.

The largest of several rectified numbers is the largest of them, rectified; and where a window has no positive number,
no gradient passes either way.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


def pool_before_relu(module: nn.Module) -> None:
    """From now on every chain of layers in ``module`` (``nn.Sequential``) does so."""
    for part in module.modules():
        if type(part) is nn.Sequential and any(_commute(*pair) for pair in pairwise(part)):
            part.__class__ = PoolsFirst


class PoolsFirst(nn.Sequential):
    """A chain whose layers are where they were, for who goes through them or names them."""

    def forward(self, images: Tensor) -> Tensor:
        """As ``nn.Sequential``, to the last bit, gradients included."""
        layers = list(self)
        for place in range(len(layers) - 1):
            if _commute(layers[place], layers[place + 1]):
                layers[place : place + 2] = layers[place + 1], layers[place]
        for layer in layers:
            images = layer(images)
        return images


def _commute(one: nn.Module, following: nn.Module) -> bool:
    if type(one) is not nn.ReLU or type(following) is not nn.MaxPool2d or following.return_indices:
        return False
    return not (_watched(one) or _watched(following))


def _watched(layer: nn.Module) -> bool:
    """Whether somebody's hook would see other numbers."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
