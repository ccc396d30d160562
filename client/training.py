"""Local SGD: the shared loop that runs a method's loss over a client's samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcil.keys import Key
from fedcil.methods.base import Batch, Method, Prepared, Samples
from fedcil.models.network import Network, set_norm_momentum
from fedcil.scenario import TrainingSection
from fedcil.stream import Task

NORM_MOMENTUM = 0.1  # PyTorch's default: the share of the batch in one update of the running statistics

Augment = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(stored images (n, h, w, c) uint8, indices (b,), generator) -> normalised batch (b, c, h, w)."""


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

    ``even``: equal parts of at most batch_size; ``ragged``: full batches and a rest; ``drop_last``: full batches
    only. Batch norm needs two samples: a rest of one joins the batch before it.
    """
    full, rest = divmod(count, batch_size)
    if mode == "drop_last":
        return [batch_size] * full
    if mode == "even":
        parts = max(1, min(full + (rest > 0), count // 2))
        return [count // parts + (place < count % parts) for place in range(parts)]
    if rest == 1 and full:
        return [batch_size] * (full - 1) + [batch_size + 1]
    return [batch_size] * full + [rest] * (rest > 0)


def local_sgd(
    model: Network,
    method: Method,
    prepared: Prepared,
    samples: Samples,
    *,
    task: Task,
    training: TrainingSection,
    lr: float,
    augment: Augment,
    key: Key,
    check: Callable[[], None],
) -> Trained:
    """Train ``model`` in place on at least two samples; ``check`` is called at each step and may raise.

    All randomness comes from ``key``: the order of an epoch, the augmentation and the draws of a step.
    """
    parameters = list(model.parameters())
    anchor = tuple(parameter.detach().clone() for parameter in parameters)
    optimizer = torch.optim.SGD(
        parameters, lr, momentum=training.momentum, weight_decay=training.weight_decay, fused=True
    )
    model.train()
    set_norm_momentum(model, 1 - (1 - NORM_MOMENTUM) ** method.norm_updates(task))
    count = len(samples.labels)
    sizes = cut_epoch(count, training.batch_size, training.batches)
    losses: list[Tensor] = []
    for epoch in range(training.epochs):
        place = key.at("epoch", epoch)
        order = torch.randperm(count, generator=place.at("order").torch())
        generator = place.at("augment").torch()
        for step, index in enumerate(order[: sum(sizes)].split(sizes)):
            check()
            images = augment(samples.images, index, generator)
            labels = samples.labels[index]
            draws = method.draw(prepared, len(index), task, place.at("draw", step))
            loss = method.loss(model, prepared, Batch(images, labels, task, anchor), draws)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    mean = torch.stack(losses).double().mean().item() if losses else float("nan")
    return Trained(len(losses), mean)
