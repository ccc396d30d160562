"""(g) How near the client step is to this machine's floor: its convolutions alone, each at the rate it reaches alone.

The floor is the sum over the layers of what that layer's convolution takes, measured by itself in the same form,
precision, layout and batch, forward and backward as often as a step needs them. What a step takes beyond it is batch
norm, ReLU, additions, casts, the optimiser and Python.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedcil.compute import Precision
from fedcil.methods.mfcl import MFCL
from fedcil.models.network import initialise
from scenarios.benchmarks.step import KEY, RELEASED, TASK, Sizes, compute_in

REPEATS = 5


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


def seconds(layer: Layer, precision: Precision) -> tuple[float, float]:
    """CPU seconds of the convolution alone, channels last: (forward, backward)."""
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
    with torch.no_grad():
        ahead = _cpu(forward)
    return ahead, _cpu(lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True))


def _cpu(work: Callable[[], object]) -> float:
    costs = []
    for _ in range(REPEATS + 1):
        started = time.process_time()
        work()
        costs.append(time.process_time() - started)
    return statistics.median(costs[1:])


def step_floor(sizes: Sizes, precision: Precision) -> float:
    """CPU seconds of a fresh step's convolutions: student forward and backward, teacher and generator forward."""
    compute = compute_in(precision)
    network = compute.network(TASK.seen).eval()
    initialise(network, KEY.torch())
    generator = MFCL(**RELEASED).make_generator(compute).eval()
    initialise(generator, KEY.torch())
    classifier = layers_of(network, torch.zeros(sizes.real + sizes.synthetic, 3, 32, 32))
    drawn = layers_of(generator, torch.zeros(sizes.synthetic, generator.latent))
    total = 0.0
    for layer, count in classifier.items():
        forward, backward = seconds(layer, precision)
        total += count * (2 * forward + backward)
    return total + sum(count * seconds(layer, precision)[0] for layer, count in drawn.items())
