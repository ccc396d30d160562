"""(g) How near the client step is to this machine's floor: its convolutions alone, each at the rate it reaches alone.

The floor is the sum over the layers of FLOPs / (FLOP/s of that layer's convolution, measured by itself in the same
precision, layout and batch), forward and backward as often as a step needs them. What a step takes beyond it is batch
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
from torch.nn import functional as F

from fedcil.compute import Precision
from fedcil.methods.mfcl import MFCL
from fedcil.models.network import initialise
from scenarios.benchmarks.step import KEY, RELEASED, TASK, Sizes, compute_in

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution as it stands in a network, for one batch."""

    inputs: tuple[int, ...]
    weights: tuple[int, ...]
    stride: int
    padding: int
    first: bool  # the stem's input needs no gradient

    @property
    def flops(self) -> float:
        """Of one forward pass, a multiply-add as two."""
        count, _, height, width = self.inputs
        out, channels, tall, wide = self.weights
        return 2.0 * count * out * channels * tall * wide * (height // self.stride) * (width // self.stride)


@torch.no_grad()
def layers_of(network: nn.Module, images: Tensor) -> Counter[Layer]:
    """The convolutions of a network and how often each stands in it."""
    found: Counter[Layer] = Counter()

    def look(layer: nn.Conv2d, inputs: tuple[Tensor]) -> None:
        shape = tuple(inputs[0].shape)
        found[Layer(shape, tuple(layer.weight.shape), layer.stride[0], int(layer.padding[0]), not found)] += 1

    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_pre_hook(look)
    network(images)
    return found


def seconds(layer: Layer, dtype: torch.dtype) -> tuple[float, float]:
    """CPU seconds of the convolution alone, channels last: (forward, backward)."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(layer.inputs, generator=draws).to(dtype).contiguous(memory_format=torch.channels_last)
    w = torch.randn(layer.weights, generator=draws).to(dtype).contiguous(memory_format=torch.channels_last)
    x.requires_grad_(not layer.first)
    w.requires_grad_()
    y = F.conv2d(x, w, stride=layer.stride, padding=layer.padding)
    grad = torch.ones_like(y)

    def forward() -> None:
        with torch.no_grad():
            F.conv2d(x, w, stride=layer.stride, padding=layer.padding)

    def backward() -> None:
        torch.autograd.grad(y, [w] if layer.first else [x, w], grad, retain_graph=True)

    return _cpu(forward), _cpu(backward)


def _cpu(work: Callable[[], None]) -> float:
    costs = []
    for _ in range(REPEATS + 1):
        started = time.process_time()
        work()
        costs.append(time.process_time() - started)
    return statistics.median(costs[1:])


def step_floor(sizes: Sizes, precision: Precision) -> float:
    """CPU seconds of a fresh step's convolutions: student forward and backward, teacher and generator forward."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    compute = compute_in("fp32")
    network = compute.network(TASK.seen).eval()
    initialise(network, KEY.torch())
    generator = MFCL(**RELEASED).make_generator(compute).eval()
    initialise(generator, KEY.torch())
    classifier = layers_of(network, torch.zeros(sizes.real + sizes.synthetic, 3, 32, 32))
    drawn = layers_of(generator, torch.zeros(sizes.synthetic, generator.latent))
    total = 0.0
    for layer, count in classifier.items():
        forward, backward = seconds(layer, dtype)
        total += count * (2 * forward + backward)
    return total + sum(count * seconds(layer, dtype)[0] for layer, count in drawn.items())
