"""(g) How near the client step is to its floor: its convolutions alone, each at the rate it reaches alone.

The floor is the sum over the layers of what that layer's convolution takes, by itself, in the same form, precision,
layout and batch, forward and backward as often as a step needs them: work over this machine's rate for it, in turn with
the step. What a step takes beyond it is batch norm, ReLU, additions, casts, the optimiser and Python.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from fedcil.compute import Precision
from fedcil.methods.mfcl import MFCL
from fedcil.models.network import initialise
from scenarios.benchmarks.peers.session import sessions
from scenarios.benchmarks.step import KEY, RELEASED, TASK, Sizes, compute_in, our_step
from scenarios.benchmarks.timing import Figure, against, in_turn


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution as it stands in a network, for one batch, and how it is done there."""

    kind: type[nn.Conv2d]
    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    stride: int
    padding: int
    first: bool  # the stem's input needs no gradient


@torch.no_grad()
def layers_of(network: nn.Module, images: Tensor) -> Counter[Layer]:
    """The convolutions of a network and how often each stands in it."""
    found: Counter[Layer] = Counter()

    def look(layer: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        shape = tuple(inputs[0].shape)
        place = layer.stride[0], int(layer.padding[0])
        found[Layer(type(layer), shape, tuple(layer.weight.shape), *place, first=not found)] += 1

    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(look)
    network(images)
    return found


Work = Callable[[], object]


def passes(layer: Layer, precision: Precision) -> tuple[Work, Work]:
    """The convolution alone, channels last: (forward, backward)."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    out, channels, kernel, _ = layer.weights
    convolution = layer.kind(channels, out, kernel, layer.stride, layer.padding, bias=False)
    convolution = convolution.to(dtype=dtype, memory_format=torch.channels_last)
    x = torch.randn(layer.inputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_(not layer.first)

    def forward() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output: Tensor = convolution(x)
            return output

    y, wanted = forward(), [convolution.weight] if layer.first else [x, convolution.weight]
    grad = torch.ones_like(y)
    return torch.no_grad()(forward), lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def step_floor(sizes: Sizes, precision: Precision) -> Work:
    """A fresh step's convolutions: student forward and backward, teacher and generator forward."""
    compute = compute_in(precision)
    network = compute.network(TASK.seen).eval()
    initialise(network, KEY.torch())
    generator = MFCL(**RELEASED).make_generator(compute).eval()
    initialise(generator, KEY.torch())
    classifier = layers_of(network, torch.zeros(sizes.real + sizes.synthetic, 3, 32, 32))
    drawn = layers_of(generator, torch.zeros(sizes.synthetic, generator.latent))
    of_both = [(*passes(layer, precision), count) for layer, count in classifier.items()]
    of_drawn = [(passes(layer, precision)[0], count) for layer, count in drawn.items()]

    def floor() -> None:
        for forward, backward, count in of_both:
            for _ in range(count):
                forward()
                forward()
                backward()
        for forward, count in of_drawn:
            for _ in range(count):
                forward()

    return floor


def ours_and_floor(sizes: Sizes, precisions: Sequence[str]) -> dict[str, Work]:
    """``<precision>_<step or floor>``, one step each."""
    cases: dict[str, Work] = {}
    for name in precisions:
        precision = cast(Precision, name)
        cases[f"{name}_step"] = our_step(sizes, precision, 0)
        cases[f"{name}_floor"] = step_floor(sizes, precision)
    return cases


def measure(sizes: Sizes, repeats: int, log: Path, precisions: tuple[Precision, ...]) -> dict[str, Figure]:
    """``floor_fraction_<precision>``: floor / step, so the larger the better; ``median_s`` is the floor's."""
    with sessions(log, {"ours": (sys.executable, "ours")}) as sides:
        names = [f"{precision}_{what}" for precision in precisions for what in ("step", "floor")]
        cases = {name: sides["ours"].case(sizes.steps, name) for name in names}
        sides["ours"].begin("floor", sizes.real, sizes.synthetic, sizes.steps, *precisions)
        costs = in_turn(cases, repeats)
    return {
        f"floor_fraction_{precision}": against(costs[f"{precision}_floor"], costs[f"{precision}_step"])
        for precision in precisions
    }
