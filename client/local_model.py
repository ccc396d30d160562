"""A network that one client after another trains, each from what it was sent."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fedcil.models.network import Network, copy_into, state_of
from fedcil.tensors import Tensors


class LocalModel:
    """``state``: what is sent, by name, in the network's own memory; ``parameters``: the names of those that are some.

    A person's layer may keep more in its buffers: what one client leaves there is nothing to the next.
    """

    def __init__(self, network: Network) -> None:
        self.network, self.state = network, state_of(network)
        self.parameters = tuple(name for name, _ in network.named_parameters())
        self._buffers = list(_buffers_of(network))
        self._unsent = [(part, name, now.clone()) for path, part, name, now in self._buffers if path not in self.state]

    def begin(self, tensors: Tensors) -> None:
        """With the tensors that a client was sent, and all else as it was when the network was made."""
        self.take_back()
        copy_into(self.state, tensors)
        for part, name, before in self._unsent:
            part.get_buffer(name).copy_(before)

    @torch.no_grad()
    def take_back(self) -> None:
        """Where a layer has put another tensor in a buffer's place, its numbers go into the one of before. ValueError
        if it has another shape.
        """
        for _, part, name, before in self._buffers:
            now = getattr(part, name)
            if now is before:
                continue
            setattr(part, name, before)
            if now is not None:
                if now.shape != before.shape:
                    shapes = f"{tuple(now.shape)} instead of {tuple(before.shape)}"
                    raise ValueError(f"a layer made its buffer {name} {shapes}")
                before.copy_(now)


def _buffers_of(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(path, module, name in it, tensor) of each."""
    for path, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            yield f"{path}.{name}" if path else name, part, name, buffer
