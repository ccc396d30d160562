"""Training over inputs that stay where they are: the form of an epoch that a CUDA graph can be captured of.

Without a capture the same steps run eagerly, on any device: that is what tests hold against the ordinary step. The
captured form was written without a GPU to try it on; it is a rung of the ladder, no part of the product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, Tensor], object]
"""(images, labels, draws): one update, all of it on the device."""

WARM_UP = 3  # runs before a capture: libraries choose kernels and allocate in the first ones


class Epoch:
    """An epoch of ``step`` over batches of ``sizes``; short ones have a place of their own in the graph.

    images (..., n, c, h, w), labels (..., n) and one tensor of draws per step are examples: later ones must have
    their shapes. What else changes between runs (a learning rate) must be a tensor on the device.
    """

    def __init__(self, step: Step, sizes: Sequence[int], images: Tensor, labels: Tensor, draws: Sequence[Tensor]):
        self.step, self.sizes = step, list(sizes)
        self.images, self.labels, self.draws = images.clone(), labels.clone(), [each.clone() for each in draws]
        self.graph: torch.cuda.CUDAGraph | None = None

    def run(self, images: Tensor, labels: Tensor, draws: Sequence[Tensor]) -> None:
        self.images.copy_(images)
        self.labels.copy_(labels)
        torch._foreach_copy_(self.draws, list(draws))
        if self.graph is None:
            self.steps()
        else:
            self.graph.replay()

    def steps(self) -> None:
        images = self.images.split(self.sizes, dim=-4)
        labels = self.labels.split(self.sizes, dim=-1)
        for batch in zip(images, labels, self.draws, strict=True):
            self.step(*batch)

    def capture(self) -> None:
        """Weights move meanwhile: load them anew afterwards."""
        capture_warm(self.steps, graph := torch.cuda.CUDAGraph())
        self.graph = graph


def capture_warm(work: Callable[[], object], graph: torch.cuda.CUDAGraph) -> None:
    """Capture ``work`` after a few runs on a stream of their own, as torch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        work()
