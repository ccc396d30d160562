"""A ReLU right before a max-pooling is done after it: of the same numbers the same bits, for a part of the work.

The largest of several rectified numbers is the largest of them, rectified; and where a window has no positive number,
no gradient passes either way.
"""

from __future__ import annotations

from torch import Tensor, nn

FRESH = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)  # nobody else has what comes out of them, so it may be written to


def pool_before_relu(module: nn.Module) -> None:
    """From now on every chain of layers in ``module`` (``nn.Sequential``) does so."""
    for part in module.modules():
        if type(part) is nn.Sequential and _in_turn(part) != list(part):
            part.__class__ = PoolsFirst


class PoolsFirst(nn.Sequential):
    """A chain whose layers are where they were, for who goes through them or names them."""

    def forward(self, images: Tensor) -> Tensor:
        """As ``nn.Sequential``, to the last bit, gradients included."""
        for layer in _in_turn(self):
            images = layer(images)
        return images


def _in_turn(chain: nn.Sequential) -> list[nn.Module]:
    layers = list(chain)
    for place in range(len(layers) - 1):
        before = layers[place - 1] if place else None
        if _commute(before, layers[place], layers[place + 1]):
            layers[place : place + 2] = layers[place + 1], layers[place]
    return layers


def _commute(before: nn.Module | None, one: nn.Module, following: nn.Module) -> bool:
    if type(one) is not nn.ReLU or type(following) is not nn.MaxPool2d or following.return_indices:
        return False
    alone = not one.inplace or type(before) in FRESH  # or somebody may rely on what it writes into
    return alone and not (_watched(one) or _watched(following))


def _watched(layer: nn.Module) -> bool:
    """Whether somebody's hook would see other numbers."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
