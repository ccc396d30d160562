"""The generators of MFCL by one scheme (mfcl section 4: CIFAR_GEN, TINYIMNET_GEN and IMNET_GEN)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fedcil.models.network import drop_counters

BLOCK_EPS = 0.8  # the authors pass 0.8 as BatchNorm2d's second argument, which is eps and not momentum
LARGEST_START = 8  # pixels a side before the first up-sampling
HALVING_SIZE = 64  # up to this image size the last block halves the channels


class Generator(nn.Module):
    """Latents (n, latent) -> images (n, channels, size, size), normalised like training images.

    Linear, then ``upsamplings`` times nearest x2 up-sampling and a block; tanh and a batch norm without
    affine parameters at the end, so that each channel has mean 0 and variance 1 in train mode.
    """

    def __init__(
        self,
        *,
        channels: int,
        size: int,
        latent: int,
        width: int,
        upsamplings: int | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        ups = default_upsamplings(size) if upsamplings is None else upsamplings
        if size % (1 << ups):
            raise ValueError(f"{ups} up-samplings do not lead to {size} pixels")
        self.latent, self.width, self.start = latent, width, size >> ups
        self.precision = precision
        self.project = nn.Linear(latent, width * self.start**2)
        self.norm = nn.BatchNorm2d(width)
        last = width // 2 if size <= HALVING_SIZE else width
        outputs = [width] * (ups - 1) + [last] if ups else []
        inputs = [width, *outputs]
        self.blocks = nn.Sequential(*(_block(a, b) for a, b in zip(inputs, outputs, strict=False)))
        self.tail = nn.Conv2d(inputs[-1], channels, 3, padding=1)
        self.whiten = nn.BatchNorm2d(channels, affine=False)
        drop_counters(self)

    def forward(self, latents: Tensor) -> Tensor:
        """(n, latent) -> images (n, channels, size, size) in the type of the latents, normalised channel by channel."""
        with torch.autocast(latents.device.type, self.precision, enabled=self.precision is not None):
            x = self.project(latents).view(-1, self.width, self.start, self.start)
            # Channels last, in words that torch.func.vmap knows (several clients as one model in scenarios/benchmarks).
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
            x = self.tail(self.blocks(self.norm(x)))
        return cast(Tensor, self.whiten(torch.tanh(x.to(latents.dtype))))


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width, BLOCK_EPS),
        nn.LeakyReLU(0.2, inplace=True),
    )


def default_upsamplings(size: int) -> int:
    """At least two, and as many as it takes to start at 8 pixels or less: 2, 3, 5 for 32, 64, 224."""
    ups = 2
    while size >> ups > LARGEST_START and size % (1 << (ups + 1)) == 0:
        ups += 1
    return ups
