"""Local SGD of several clients as one model, a form that lost to lanes: weights on a new first axis, batches of each.

``torch.func.vmap`` over the method's loss turns the clients' convolutions into one grouped convolution, their batch
norms into one. Clients do not touch each other, so the gradient of the sum of their losses is each one's own. Orders,
augmentation and draws are those of ``client/training.py``: weights agree with it up to rounding. Clients whose batches
are of equal size are one call; who has no more batches in an epoch is left out of its last calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from client.training import LocalSGD, Recipe, Trained, cut_epoch, inputs
from fedcil.compute import Compute
from fedcil.keys import Key
from fedcil.methods.base import Samples
from fedcil.models.network import Network, set_norm_updates, state_of
from fedcil.tables import TrainingSection
from fedcil.tensors import Tensors

Loss = Callable[[Network, Tensor, Tensor, Any], Tensor]
"""(network, images, labels, draws) -> ()."""


class WideTeachers(Compute):
    """Frozen weights stay in float32: ``torch.func.vmap`` does not bring images to the type of narrow ones."""

    def settle(self, module: nn.Module) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbours in a stack: views of their weights, by the names under ``LossModule``, and their optimiser."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: LocalSGD


class LossModule(nn.Module):
    """A loss as a module over its network, so that ``functional_call`` can put other weights under it."""

    def __init__(self, network: Network, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, images: Tensor, labels: Tensor, draws: Any) -> Tensor:
        return self.loss(self.network, images, labels, draws)


class Stack:
    """``count`` copies of a network's weights, and a step of any run of neighbours among them."""

    def __init__(self, network: Network, count: int, loss: Loss, lr: float, training: TrainingSection) -> None:
        self.module, self.lr, self.training = LossModule(network, loss), lr, training
        named = {f"network.{name}": tensor for name, tensor in state_of(network).items()}
        self.tensors = {name: copies(tensor, count) for name, tensor in named.items()}
        self.learned = [name for name, _ in self.module.named_parameters()]
        self.momenta = [torch.zeros_like(self.tensors[name]) if training.momentum else None for name in self.learned]
        self.parts: dict[tuple[int, int], Part] = {}

    def step(self, start: int, stop: int, images: Tensor, labels: Tensor, draws: Sequence[Any]) -> Tensor:
        """One update of the clients ``start .. stop - 1`` (n of them): images (n, b, c, h, w), labels (n, b), the draws
        of each. Returns their losses (n,).
        """
        part = self._part(start, stop)
        leaves, axes, form = stack_draws(draws, images.device)

        def one(parameters: Tensors, buffers: Tensors, images: Tensor, labels: Tensor, leaves: list[Any]) -> Tensor:
            given = (images, labels, tree_unflatten(leaves, form))
            result: Tensor = functional_call(self.module, {**parameters, **buffers}, given)
            return result

        run = vmap(one, in_dims=(0, 0, 0, 0, axes))
        losses: Tensor = run(part.parameters, part.buffers, images, labels, leaves)
        part.optimizer.step(losses.sum())
        return losses.detach()

    def of(self, place: int) -> dict[str, Tensor]:
        """One client's state by the network's own names: views."""
        return {name.removeprefix("network."): tensor[place] for name, tensor in self.tensors.items()}

    def _part(self, start: int, stop: int) -> Part:
        if (start, stop) not in self.parts:
            views = {name: tensor[start:stop] for name, tensor in self.tensors.items()}
            learned = {name: views.pop(name).requires_grad_() for name in self.learned}
            momenta = [None if momentum is None else momentum[start:stop] for momentum in self.momenta]
            optimizer = LocalSGD(list(learned.values()), self.lr, self.training, momenta)
            self.parts[start, stop] = Part(learned, views, optimizer)
        return self.parts[start, stop]


def copies(tensor: Tensor, count: int) -> Tensor:
    """(...) -> (count, ...), in memory of its own."""
    return tensor.new_empty((count, *tensor.shape)).copy_(tensor)


def stack_draws(draws: Sequence[Any], device: torch.device) -> tuple[list[Any], list[int | None], Any]:
    """The clients' draws as one: leaves with a new first axis (None stays None), the axis of each, their form.

    TypeError for anything but tensors and None in lists, tuples and dictionaries: that cannot be stacked.
    """
    flat, forms = zip(*map(tree_flatten, draws), strict=True)
    if any(form != forms[0] for form in forms):
        raise TypeError("draws of different form")
    leaves: list[Any] = []
    for each in zip(*flat, strict=True):
        if all(isinstance(leaf, Tensor) for leaf in each):
            leaves.append(torch.stack(each).to(device))
        elif all(leaf is None for leaf in each):
            leaves.append(None)
        else:
            raise TypeError(f"draws of type {type(each[0]).__name__}: only tensors can be stacked")
    return leaves, [None if leaf is None else 0 for leaf in leaves], forms[0]


def local_sgd_stacked(
    network: Network, recipe: Recipe, samples: Sequence[Samples], keys: Sequence[Key]
) -> list[tuple[Tensors, Trained]]:
    """``local_sgd`` from the same ``network`` on each of several ``samples``, with the key of each: (state, what it
    says of itself). The network's own weights stay as they are.
    """
    training = recipe.training
    order = sorted(range(len(samples)), key=lambda client: len(samples[client].labels))  # equal ones are neighbours
    plans = [cut_epoch(len(samples[client].labels), training.batch_size, training.batches) for client in order]
    network.train()
    set_norm_updates(network, recipe.norm_updates)
    stack = Stack(network, len(order), recipe.loss, recipe.lr, training)
    losses: list[list[Tensor]] = [[] for _ in order]
    for epoch in range(training.epochs):
        places = [keys[client].at("epoch", epoch) for client in order]
        plan_of = zip(order, plans, places, strict=True)
        streams = [inputs(recipe, samples[client], plan, place) for client, plan, place in plan_of]
        for start, stop in turns(plans):
            recipe.check()
            images, labels, draws = zip(*map(next, streams[start:stop]), strict=True)
            found = stack.step(start, stop, torch.stack(images), torch.stack(labels), draws)
            for mine, value in zip(losses[start:stop], found.unbind(), strict=True):
                mine.append(value)
    return [(stack.of(place), summary(losses[place])) for place in sorted(range(len(order)), key=order.__getitem__)]


def turns(plans: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """(start, stop), step after step of an epoch: neighbours whose next batches are of equal size."""
    for step in range(max(map(len, plans), default=0)):
        sizes = [plan[step] if step < len(plan) else 0 for plan in plans]
        start = 0
        for size, neighbours in groupby(sizes):
            stop = start + len(list(neighbours))
            if size:
                yield start, stop
            start = stop


def summary(losses: list[Tensor]) -> Trained:
    if not losses:
        return Trained(0, float("nan"))
    return Trained(len(losses), torch.stack(losses).double().mean().item())
