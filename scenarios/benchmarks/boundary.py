"""(e) A step of the generator's training at a boundary, through the frozen ResNet-18: fedcil against the authors' form.

The authors' form: the classifier's parameters still ask for gradients, a hook on each batch-norm layer makes mean and
variance of its input (permuted and made contiguous first), NCHW, fp32. Both are processes of their own
(``peers/ours.py``, ``peers/authors.py``).
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedcil.compute import Precision
from fedcil.methods.adam import Adam
from fedcil.methods.inversion import blur, generator_loss
from fedcil.methods.mfcl import MFCL
from fedcil.models.network import snapshot
from scenarios.benchmarks.peers.session import sessions
from scenarios.benchmarks.step import RELEASED, TASK, compute_in, drawn
from scenarios.benchmarks.timing import Case, Figure, against, in_turn

CLASSES = TASK.old


def our_boundary(precision: Precision, batch: int) -> Callable[[], Tensor]:
    """One step of ``MFCL``'s own training of the generator; gives its loss."""
    compute = compute_in(precision)
    settings = MFCL(**RELEASED)
    classifier = compute.frozen(snapshot(drawn(compute.architecture.build(CLASSES), "teacher")))
    generator = settings.place(drawn(settings.make_generator(compute), "generator"), compute).train()
    optimizer = Adam(generator.parameters(), settings.generator_lr)
    weights = settings.loss_weights()

    def step() -> Tensor:
        latents = torch.randn(batch, settings.latent)
        loss, _ = generator_loss(classifier, generator(latents), weights)
        optimizer.step(loss)
        return loss.detach()

    return step


def authors_boundary(batch: int) -> Callable[[], Tensor]:
    """The same step as the released program does it."""
    compute = compute_in("fp32")
    settings = MFCL(**RELEASED)
    classifier = drawn(compute.architecture.build(CLASSES), "teacher").eval()
    generator = drawn(settings.make_generator(compute), "generator").train()
    optimizer = torch.optim.Adam(generator.parameters(), settings.generator_lr)
    divergences: list[Tensor] = []

    def hook(layer: Any, inputs: tuple[Tensor], _: Tensor) -> None:
        channels = inputs[0].shape[1]
        mean = inputs[0].mean([0, 2, 3])
        var = inputs[0].permute(1, 0, 2, 3).contiguous().view(channels, -1).var(1, unbiased=False) + 1e-8
        running_mean, running_var = layer.running_mean, layer.running_var
        ratio = (running_var + 1e-8 + (running_mean - mean) ** 2) / var
        spread = torch.log(torch.sqrt(var) / torch.sqrt(running_var + 1e-8))
        divergences.append((spread - 0.5 * (1 - ratio)).mean())

    for part in classifier.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_hook(hook)

    def step() -> Tensor:
        divergences.clear()
        images = generator(torch.randn(batch, settings.latent))
        logits = classifier(images)
        mean = F.softmax(logits, 1).mean(0)
        loss = F.cross_entropy(logits / settings.temperature, logits.argmax(1))
        loss = loss + 1 + (mean * mean.log()).sum() / torch.log(torch.tensor(float(CLASSES)))
        loss = loss + settings.w_bn * sum(divergences) / len(divergences)
        loss = loss + settings.w_prior * F.mse_loss(images, blur(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def measure(batch: int, repeats: int, log: Path, precisions: tuple[Precision, ...]) -> dict[str, Figure]:
    """``boundary_<precision>``, and ``..._vs_kept`` against the authors' form with freed memory kept."""
    twins = {"": ("authors",), "_vs_kept": ("authors", "kept")}
    with sessions(
        log, {name: (sys.executable, *words) for name, words in (twins | {"ours": ("ours",)}).items()}
    ) as sides:
        cases: dict[str, Case] = {twin: sides[twin].case() for twin in twins}
        cases |= {precision: sides["ours"].case(1, precision) for precision in precisions}
        for twin in twins:
            sides[twin].begin("boundary", batch)
        sides["ours"].begin("boundary", batch, *precisions)
        costs = in_turn(cases, repeats)
    return {
        f"boundary_{precision}{twin}": against(costs[precision], costs[twin])
        for precision, twin in itertools.product(precisions, twins)
    }
