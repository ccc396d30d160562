"""Convolutions over small maps as matrix products.

At the end of a ResNet a map has 4 x 4 positions, and a third of what a 3x3 convolution multiplies is padding. The
products below leave out the padding left and right. A CPU whose products are fast in a precision does them in two
thirds to four fifths of the time of oneDNN's convolution: Zen 5 in bf16, Intel's in fp32, those with AVX2 alone in
fp32; Zen 4 only the gradient of the weights (fedcil/cpu.py, docs/performance-notes.md). In bf16 sums are kept in
float32 and rounded once, as there; a bias is added after that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POSITIONS = 16  # of the largest map, of what comes out, that is small
WEIGHTS = 1 << 20  # of the smallest kernel for which products pay


def convolve_small_maps_by_products(module: nn.Module, all_passes: bool) -> None:
    """From now on the large convolutions of ``module`` do so wherever their map is small; if not in all passes, then
    for the gradient of their weights.
    """
    for part in module.modules():
        if type(part) is nn.Conv2d and part.weight.numel() >= WEIGHTS and _is_plain(part):
            part.__class__ = SmallMapConv2d if all_passes else WeightsByProducts


def _is_plain(layer: nn.Conv2d) -> bool:
    if isinstance(layer.padding, str) or layer.padding[0] >= layer.kernel_size[0] or "forward" in vars(layer):
        return False
    square = all(one == other for one, other in (layer.kernel_size, layer.stride, layer.padding))
    return square and layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"


class SmallMapConv2d(nn.Conv2d):
    """A plain square convolution that looks at its map, and does as torch's own where products do not pay."""

    all_passes = True

    def forward(self, images: Tensor) -> Tensor:
        """(n, c, h, w) -> (n, o, rows, columns)."""
        kernel, stride, padding = self.kernel_size[0], self.stride[0], cast("tuple[int, int]", self.padding)[0]
        positions = [(size + 2 * padding - kernel) // stride + 1 for size in images.shape[-2:]]
        small = positions[0] * positions[1] <= POSITIONS and images.dim() == 4 and len(images) > 0
        if not small or not (self.all_passes or self.weight.requires_grad):
            return super().forward(images)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else images.dtype
        place = stride, padding, self.all_passes
        output: Tensor = SmallMapConvolution.apply(images.to(dtype), self.weight.to(dtype), *place)
        return output if self.bias is None else output + self.bias.to(dtype)[:, None, None]


class WeightsByProducts(SmallMapConv2d):
    """Torch's own but for the gradient of its weights."""

    all_passes = False


class SmallMapConvolution(torch.autograd.Function):
    """images (n, c, h, w), weight (o, c, k, k), stride, padding -> (n, o, rows, columns), as ``F.conv2d``; channels
    last. The gradient of the weight is made of products, the other passes if ``all_passes``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, weight: Tensor, stride: int, padding: int, all_passes: bool) -> Tensor:
        if not all_passes:
            return F.conv2d(images, weight, stride=stride, padding=padding)
        out, channels, kernel, _ = weight.shape
        taps = weight.permute(0, 3, 2, 1).reshape(out, kernel, kernel * channels).permute(1, 2, 0)
        return _convolve(images.permute(0, 2, 3, 1), taps, stride, padding).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, int, bool], output: Tensor) -> None:  # noqa: ARG004
        images, weight, ctx.stride, ctx.padding, ctx.all_passes = inputs
        ctx.save_for_backward(images, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        images, weight = ctx.saved_tensors
        place = ctx.stride, ctx.padding
        products = ctx.all_passes and ctx.stride == 1
        of_images = _of_images(gradient, images, weight, *place, products) if ctx.needs_input_grad[0] else None
        of_weight = _of_weight(gradient, images, weight.shape[-1], *place) if ctx.needs_input_grad[1] else None
        return of_images, of_weight, None, None, None


def _strips(images: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """(n, h, w, c) -> (n, rows, w, kernel c): for each row of what comes out the ``kernel`` rows that go into it."""
    padded = F.pad(images, (0, 0, 0, 0, padding, padding))
    strips = padded.unfold(1, kernel, stride).movedim(-1, -2)
    return strips.reshape(*strips.shape[:3], kernel * images.shape[3])


def _convolve(images: Tensor, taps: Tensor, stride: int, padding: int) -> Tensor:
    """(n, h, w, c), ``taps`` (kernel, kernel c, o), a matrix for each column of the kernel -> (n, rows, columns, o).

    One product for each column of what comes out, with those columns of the kernel that do not lie in the padding.
    """
    kernel, _, out = taps.shape
    strips = _strips(images, kernel, stride, padding)
    count, rows, width, _ = strips.shape
    columns = []
    for first in range(-padding, width + padding - kernel + 1, stride):
        low, high = max(0, -first), min(kernel, width - first)
        under = strips[:, :, first + low : first + high].reshape(count * rows, -1)
        columns.append(under @ taps[low:high].reshape(-1, out))
    return torch.stack(columns, 1).view(count, rows, len(columns), out)


def _of_images(gradient: Tensor, images: Tensor, weight: Tensor, stride: int, padding: int, products: bool) -> Tensor:
    """dL/d images. Without a stride a convolution of the gradient with the kernel turned round."""
    out, channels, kernel, _ = weight.shape
    if products:
        taps = weight.permute(3, 2, 0, 1).flip(0, 1).reshape(kernel, kernel * out, channels)
        return _convolve(gradient.permute(0, 2, 3, 1), taps, 1, kernel - 1 - padding).permute(0, 3, 1, 2)
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    wanted = [True, False, False]
    found = torch.ops.aten.convolution_backward(gradient, images, weight, None, *geometry, wanted)
    return cast(Tensor, found[0])


def _of_weight(gradient: Tensor, images: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """dL/d weight, one product for each column of the kernel; (o, c, k, k), channels last."""
    gradient = gradient.permute(0, 2, 3, 1)
    _, _, columns, out = gradient.shape
    strips = _strips(images.permute(0, 2, 3, 1), kernel, stride, padding)
    width, under_kernel = strips.shape[2:]
    taps = []
    for column in range(kernel):
        low = max(0, -((column - padding) // stride))
        high = max(low, min(columns, (width - 1 + padding - column) // stride + 1))
        of_output = gradient[:, :, low:high].reshape(-1, out)
        start = low * stride - padding + column
        under = strips[:, :, start : start + (high - low) * stride : stride].reshape(-1, under_kernel)
        taps.append((of_output.t() @ under).view(out, kernel, -1))
    return torch.stack(taps, 2).permute(0, 3, 1, 2)
