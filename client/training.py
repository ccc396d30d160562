"""Local SGD: the shared loop that runs a method's loss over a client's samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fedcil.gradients import as_stored, gradients
from fedcil.keys import Key, global_draws, rng_state
from fedcil.methods.base import TRAINABLE, Batch, Draws, Method, Prepared, Samples
from fedcil.models.network import Network, set_norm_updates, trained_parameters
from fedcil.stream import Task
from fedcil.tables import TrainingSection

AHEAD_BYTES = 1 << 22  # of augmented images that are made ahead of their steps

Augment = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(stored images (n, h, w, c) uint8, indices (b,), generator) -> normalised batch (b, c, h, w)."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How all clients of a round train.

    ``anchor``: the parameters they start from, for losses that hold on to them; not the memory of the model that is
    trained. ``check`` is called at each step and may raise.
    """

    method: Method
    prepared: Prepared
    task: Task
    training: TrainingSection
    lr: float
    augment: Augment
    anchor: tuple[Tensor, ...] = ()
    check: Callable[[], None] = lambda: None

    @property
    def norm_updates(self) -> int:
        """Of running statistics, in a step."""
        return self.method.norm_updates(self.task)

    def loss(self, model: Network, images: Tensor, labels: Tensor, draws: Any) -> Tensor:
        """Of one batch, one number. TypeError if the method gives something else."""
        loss = self.method.loss(model, self.prepared, Batch(images, labels, self.task, self.anchor), draws)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
            raise TypeError(f"the method's loss gave a {type(loss).__name__}{shape}; it must be a scalar tensor")
        return loss


@dataclass(frozen=True, slots=True)
class Trained:
    """What local training says about itself; the trained tensors are the model's."""

    steps: int
    loss: float  # mean over steps; NaN if there were none


def learning_rate(training: TrainingSection, round_in_phase: int, rounds: int) -> float:
    """lr (lr_end / lr)^(r / R): constant within a round, starting anew with every task (mfcl section 3)."""
    return float(training.lr * (training.lr_end / training.lr) ** (round_in_phase / rounds))


def cut_epoch(count: int, batch_size: int, mode: str) -> list[int]:
    """Sizes of an epoch's batches.

    ``even``: equal parts of at most batch_size (3 where it is 2 and the count is odd); ``ragged``: full batches and a
    rest; ``drop_last``: full batches only. Batch norm needs two samples: a rest of one joins the batch before it, and
    one in all is no batch.
    """
    if count < TRAINABLE:
        return []
    full, rest = divmod(count, batch_size)
    if mode == "drop_last":
        return [batch_size] * full
    if mode == "even":
        parts = max(1, min(full + (rest > 0), count // 2))
        return [count // parts + (place < count % parts) for place in range(parts)]
    if rest == 1 and full:
        return [batch_size] * (full - 1) + [batch_size + 1]
    return [batch_size] * full + [rest] * (rest > 0)


def batches(samples: Samples, sizes: list[int], augment: Augment, place: Key) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's batches: augmented images (b, c, h, w) and labels (b,), in an order drawn for this place.

    Images are chosen and augmented for several batches at once, as many as stay below ``AHEAD_BYTES``: for small
    images half of the work is in the calls.
    """
    order = torch.randperm(len(samples.labels), generator=place.at("order").torch())[: sum(sizes)]
    generator = place.at("augment").torch()
    image_bytes = 4 * samples.images[0].numel()
    for group in grouped(sizes, max(1, AHEAD_BYTES // image_bytes)):
        index, order = order[: sum(group)], order[sum(group) :]
        index = index.to(samples.images.device, non_blocking=True)
        images = augment(samples.images, index, generator)
        yield from zip(images.split(group), samples.labels[index].split(group), strict=True)


def inputs(recipe: Recipe, samples: Samples, sizes: list[int], place: Key) -> Iterator[tuple[Tensor, Tensor, Draws]]:
    """``batches``, and what the method draws for each."""
    for step, (images, labels) in enumerate(batches(samples, sizes, recipe.augment, place)):
        yield images, labels, recipe.method.draw(recipe.prepared, len(labels), recipe.task, place.at("draw", step))


def grouped(sizes: list[int], most: int) -> Iterator[list[int]]:
    """Consecutive sizes that sum to at most ``most``; a larger one stands alone."""
    group: list[int] = []
    for size in sizes:
        if group and sum(group) + size > most:
            yield group
            group = []
        group.append(size)
    if group:
        yield group


class LocalSGD:
    """``torch.optim.SGD`` by its functional form: gradients are not stored on parameters, so there is nothing to reset,
    and small networks do not pay for the bookkeeping of an optimiser object (a tenth of LeNet's step).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        lr: float | Tensor,
        training: TrainingSection,
        momenta: list[Tensor | None] | None = None,
    ) -> None:
        self.parameters, self.lr, self.training = parameters, lr, training
        self.stored = [as_stored(parameter) for parameter in parameters]
        self.momenta = momenta or [None] * len(parameters)

    def step(self, loss: Tensor) -> None:
        """One update; a parameter that the loss does not reach stays as it is, as in torch."""
        found = {
            place: as_stored(gradient)
            for place, gradient in enumerate(gradients(loss, self.parameters))
            if gradient is not None
        }
        momenta = [self.momenta[place] for place in found]
        if self.training.momentum and any(momentum is not None for momentum in momenta):
            # One that no loss has reached before: torch's fused kernel has it begin at 0, if it is told so.
            momenta = [torch.zeros_like(g) if m is None else m for m, g in zip(momenta, found.values(), strict=True)]
        sgd(
            [self.stored[place] for place in found],
            list(found.values()),
            momenta,
            fused=True,
            weight_decay=self.training.weight_decay,
            momentum=self.training.momentum,
            lr=self.lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if self.training.momentum:
            for place, momentum in zip(found, momenta, strict=True):
                self.momenta[place] = momentum


@contextmanager
def layers_draw(model: Network, place: Key) -> Iterator[None]:
    """A pass whose layers draw from torch's global generator, if they draw, what belongs to this place. Where they do
    not, the network's later passes need not come here.
    """
    device = model.head.weight.device
    with global_draws(place, device):
        before = rng_state(device)
        yield
        model.random = not torch.equal(before, rng_state(device))


def local_sgd(model: Network, recipe: Recipe, samples: Samples, key: Key) -> Trained:
    """Train ``model`` in place.

    All randomness comes from ``key``: the order of an epoch, the augmentation and the draws of a step.
    """
    training = recipe.training
    sizes = cut_epoch(len(samples.labels), training.batch_size, training.batches)
    if not sizes or not training.epochs:
        return Trained(0, float("nan"))
    optimizer = LocalSGD(trained_parameters(model), recipe.lr, training)
    model.train()
    set_norm_updates(model, recipe.norm_updates)
    losses: list[Tensor] = []
    for epoch in range(training.epochs):
        place = key.at("epoch", epoch)
        for step, (images, labels, draws) in enumerate(inputs(recipe, samples, sizes, place)):
            recipe.check()
            with layers_draw(model, place.at("layers", step)) if model.random else nullcontext():
                loss = recipe.loss(model, images, labels, draws)
            if not loss.requires_grad:
                raise TypeError("the method's loss gave a number that does not depend on the model")
            optimizer.step(loss)
            losses.append(loss.detach())
    return Trained(len(losses), torch.stack(losses).double().mean().item())
