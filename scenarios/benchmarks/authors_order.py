"""MFCL's client step in the order of passes of the authors' program: the plain twin of the product's step.

Slow on purpose, and written from the formulas (mfcl sections 3 and 7): two student passes, three teacher
passes, gradient descent by hand. Nothing of fedcil is imported; a network is anything with ``backbone`` and
a linear ``head``.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor, Tensor]
"""Real images (b, c, h, w), their labels (b,), latents (s, z)."""


def loss(
    student: Any,
    teacher: Any,
    generator: nn.Module,
    batch: Batch,
    *,
    w_ft: float,
    w_kd: float,
    updates: int,
) -> Tensor:
    """L_CE + w_ft L_FT + w_kd L_KD; the student's running statistics move ``updates`` times."""
    images, labels, latents = batch
    real, old = len(images), len(teacher.head.bias)
    generator.eval()
    teacher.eval()
    student.train()
    with torch.no_grad():
        synthetic = generator(latents)
        pseudo = logits(teacher, synthetic).argmax(1)
        logits(teacher, images)  # the program computes these and never uses them
    both = torch.cat([images, synthetic])
    targets = torch.cat([labels, pseudo])

    features = student.backbone(both)
    output = features @ student.head.weight.T + student.head.bias
    ce = cross_entropy(output[:real, old:], labels - old)

    with torch.no_grad():
        again = pass_again(student, both, updates)
    ft = cross_entropy(again @ student.head.weight.T + student.head.bias, targets)

    with torch.no_grad():
        past = logits(teacher, both)
    old_head_on_new_features = features @ teacher.head.weight.T + teacher.head.bias
    kd = (old_head_on_new_features - past).pow(2).sum() / (len(both) * old)
    return ce + w_ft * ft + w_kd * kd


def train(
    student: Any,
    teacher: Any,
    generator: nn.Module,
    batches: Iterable[Batch],
    *,
    lr: float,
    weight_decay: float,
    w_ft: float,
    w_kd: float,
    updates: int,
) -> None:
    """w <- w - lr (gradient + weight_decay w), batch after batch, in place."""
    for batch in batches:
        student.zero_grad()
        loss(student, teacher, generator, batch, w_ft=w_ft, w_kd=w_kd, updates=updates).backward()
        with torch.no_grad():
            for weight in student.parameters():
                weight.sub_(lr * (weight.grad + weight_decay * weight))


def logits(network: Any, images: Tensor) -> Tensor:
    features: Tensor = network.backbone(images)
    return features @ network.head.weight.T + network.head.bias


def cross_entropy(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean of ln(sum_k exp s_k) - s_y."""
    own = scores.gather(1, labels[:, None])[:, 0]
    return (scores.exp().sum(1).log() - own).mean()


def pass_again(student: Any, images: Tensor, updates: int) -> Tensor:
    """The second pass in train mode; with one update, by a copy whose running statistics nobody reads."""
    network = student if updates == 2 else deepcopy(student)
    features: Tensor = network.backbone(images)
    return features
