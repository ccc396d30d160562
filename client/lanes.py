"""Local SGD of several clients side by side on a GPU, each in a lane: a network and a stream of its own.

A lane's step is captured once per task and size of batch, over inputs that stay where they are, and replayed for every
client (fedcil/capture.py). Orders, augmentation and draws are those of ``client/training.py``, and so are the weights
up to rounding. On a CPU the same steps run one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from client.local_model import LocalModel
from client.training import LocalSGD, Recipe, Trained, cut_epoch, inputs
from fedcil.capture import repeatable
from fedcil.gradients import as_stored
from fedcil.keys import Key
from fedcil.methods.base import Draws, Samples
from fedcil.models.network import Network, set_norm_updates, trained_parameters
from fedcil.tables import TrainingSection
from fedcil.tensors import Tensors


def make_streams(count: int, device: torch.device) -> list[Any]:
    """For as many lanes; None for each where there are none to be had."""
    return [torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(count)]


class Lane:
    """Trains one client at a time."""

    def __init__(self, network: Network, training: TrainingSection, stream: Any) -> None:
        self.local = LocalModel(network.train())
        self.device = network.head.weight.device
        self.stream = stream
        self.pool = None if stream is None else torch.cuda.graph_pool_handle()
        parameters = trained_parameters(network)
        self.anchor = tuple(torch.empty_like(parameter) for parameter in network.parameters())
        self.momenta = [torch.zeros_like(as_stored(each)) for each in parameters] if training.momentum else []
        # A captured step reads the learning rate anew; fused SGD takes one on the device in float32 only.
        self.lr = torch.zeros((), dtype=torch.float32, device=self.device)
        self.optimizer = LocalSGD(parameters, self.lr, training, [*self.momenta])
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.taken = 0
        self.recipe: Recipe | None = None
        self.steps: dict[int, Step] = {}

    def train(self, tensors: Tensors, recipe: Recipe, samples: Samples, key: Key) -> Iterator[None]:
        """Hand a client's training from ``tensors`` to the device, an epoch for each ``next``. Nothing waits: the
        weights are ready once the lane's stream is done. TypeError if draws are no tensors or change in shape.
        """
        training = recipe.training
        sizes = cut_epoch(len(samples.labels), training.batch_size, training.batches)
        places = [key.at("epoch", epoch) for epoch in range(training.epochs)] if sizes else []
        self._take_up(recipe)
        with self._on_stream():
            self._reset(tensors, recipe)
            if places and set(sizes) - self.steps.keys():
                self._capture(recipe, samples, sizes, places[0])
                self._reset(tensors, recipe)
        self.taken = len(places) * len(sizes)
        for place in places:
            with self._on_stream():
                for images, labels, draws in inputs(recipe, samples, sizes, place):
                    recipe.check()
                    self.steps[len(labels)].run(images, labels, draws)
            yield

    def trained(self) -> Trained:
        """What the last training says about itself; waits for it."""
        return Trained(self.taken, self.loss.item() / self.taken if self.taken else float("nan"))

    def update(self, images: Tensor, labels: Tensor, draws: Draws) -> None:
        """One step on a batch: images (b, c, h, w), labels (b,)."""
        assert self.recipe is not None
        loss = self.recipe.loss(self.local.network, images, labels, draws)
        self.optimizer.step(loss)
        self.loss += loss.detach()
        self.local.take_back()  # a captured step finds buffers where they were

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _take_up(self, recipe: Recipe) -> None:
        """Captured steps hold on to a task's teacher; another task needs others."""
        last, self.recipe = self.recipe, replace(recipe, anchor=self.anchor if recipe.anchor else ())
        same = last and last.prepared is recipe.prepared and last.task == recipe.task
        if not (same and last and bool(last.anchor) == bool(recipe.anchor)):
            self.steps.clear()
            set_norm_updates(self.local.network, recipe.norm_updates)

    def _capture(self, recipe: Recipe, samples: Samples, sizes: list[int], place: Key) -> None:
        """A step for each size of batch; trying them changes the weights."""
        for images, labels, draws in inputs(recipe, samples, sizes, place):
            if len(labels) not in self.steps:
                recipe.check()
                self.steps[len(labels)] = Step(self.update, images, labels, draws, self.pool)

    def _reset(self, tensors: Tensors, recipe: Recipe) -> None:
        self.local.begin(tensors)
        if recipe.anchor:
            torch._foreach_copy_(list(self.anchor), list(recipe.anchor))
        if self.momenta:
            torch._foreach_zero_(self.momenta)
        self.lr.fill_(recipe.lr)
        self.loss.zero_()


class Step:
    """A lane's update for batches of one size, over tensors that stay where they are."""

    def __init__(
        self, update: Callable[[Tensor, Tensor, Draws], None], images: Tensor, labels: Tensor, draws: Draws, pool: Any
    ) -> None:
        leaves, self.form = tree_flatten(draws)
        if any(not isinstance(leaf, Tensor | None) for leaf in leaves):
            raise TypeError("a step can be captured only if its draws are tensors or None")
        own = [leaf if leaf is None else torch.empty_like(leaf, device=images.device) for leaf in leaves]
        self.inputs = [torch.empty_like(images), torch.empty_like(labels), *(leaf for leaf in own if leaf is not None)]
        self._fill(images, labels, draws)
        given = tree_unflatten(own, self.form)
        self.replay = repeatable(lambda: update(self.inputs[0], self.inputs[1], given), images.device, pool)

    def run(self, images: Tensor, labels: Tensor, draws: Draws) -> None:
        self._fill(images, labels, draws)
        self.replay()

    def _fill(self, images: Tensor, labels: Tensor, draws: Draws) -> None:
        leaves, form = tree_flatten(draws)
        tensors = [images, labels, *(leaf for leaf in leaves if leaf is not None)]
        if form != self.form or [each.shape for each in tensors] != [each.shape for each in self.inputs]:
            raise TypeError("draws of another form or shape than those of the batch that the step was captured with")
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given, non_blocking=True)


def local_sgd_in_lanes(
    lanes: Sequence[Lane], tensors: Tensors, recipe: Recipe, samples: Sequence[Samples], keys: Sequence[Key]
) -> list[tuple[Tensors, Trained]]:
    """``local_sgd`` from ``tensors`` on each of several ``samples``, with the key of each, a lane for each:
    (state, what it says of itself). The states are the lanes' memory.
    """
    busy = list(lanes[: len(samples)])
    for lane in busy:
        if lane.stream is not None:
            lane.stream.wait_stream(torch.cuda.current_stream(lane.device))
    training = [lane.train(tensors, recipe, mine, key) for lane, mine, key in zip(busy, samples, keys, strict=True)]
    try:
        for _ in zip_longest(*training):  # epoch by epoch, so that all lanes are at work from the start to the end
            pass
    finally:  # whoever gives up halfway: what lanes still read must not be memory for something else
        for lane in busy:
            if lane.stream is not None:
                torch.cuda.current_stream(lane.device).wait_stream(lane.stream)
    return [(lane.local.state, lane.trained()) for lane in busy]
