"""Gradients for torch's functional optimisers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """d loss / d parameter, None where the loss does not reach.

    Each in its parameter's memory layout, as ``backward`` would store it: a fused optimiser walks through memory and
    does not look at strides.
    """
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [None if g is None else laid_out_like(g, p) for g, p in zip(found, parameters, strict=True)]


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` itself if its elements lie in memory as those of ``other``, else a copy that does."""
    if tensor.stride() == other.stride():
        return tensor
    pairs = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    if all(size == 1 or one == two for size, one, two in pairs):
        return tensor
    return torch.empty_like(other).copy_(tensor)


def as_stored(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order in which they lie in memory: itself, or a view (numel,).

    torch's fused optimisers copy, and throw away, whatever is not contiguous: a tenth of ResNet-18's step.
    ValueError for a tensor with gaps in its memory, which a fused optimiser would write to.
    """
    if tensor.is_contiguous():
        return tensor
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if reach != tensor.numel():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is not dense")
    return tensor.detach().as_strided((tensor.numel(),), (1,))
