"""Batches out of a bank of uint8 images: chosen, augmented and normalised in a few whole-batch operations.

Every augmentation is a map from output pixels to input pixels, so one gather does it. Decisions are drawn
per image on the CPU, from the generator that is given; the index arithmetic runs where the bank is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PAD = 4  # pixels around the image that a random crop may reach
DEGREES = 20.0  # a rotation is drawn uniformly from -DEGREES .. DEGREES


def make_batch(bank: Tensor, index: Tensor, mode: str, generator: torch.Generator, mean: Tensor, std: Tensor) -> Tensor:
    """Images ``index`` of ``bank``, augmented as AUGMENT[``mode``] does and normalised.

    ``bank`` (N, height, width, channels) uint8, on any device; ``index`` (n,) int64; ``generator`` on the
    CPU; ``mean`` and ``std`` (channels,), of pixels in [0, 1]. Returns (n, channels, height, width) float32
    on the bank's device, in channels_last strides.
    """
    images = bank.index_select(0, index.to(bank.device, non_blocking=True))
    return normalise(AUGMENT[mode](images, generator), mean.to(bank.device), std.to(bank.device))


def _as_they_are(images: Tensor, _: torch.Generator) -> Tensor:
    return images


def _flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Left-right, one in two."""
    count, height, width, _ = images.shape
    flips = _draw_flips(count, generator).to(images.device, non_blocking=True)
    rows = torch.arange(height, device=images.device)
    return _gather(images, 0, rows[:, None], _mirrored(width, flips)[:, None, :])


def _crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """PAD pixels around, then a crop of the old size, then a flip. What is put in is black, 0 before normalisation."""
    count, height, width, _ = images.shape
    corners = torch.randint(0, 2 * PAD + 1, (2, count, 1), generator=generator).to(images.device, non_blocking=True)
    flips = _draw_flips(count, generator).to(images.device, non_blocking=True)
    rows = corners[0] + torch.arange(height, device=images.device)
    columns = corners[1] + _mirrored(width, flips)
    return _gather(images, PAD, rows[:, :, None], columns[:, None, :])


def _rotate_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Counter-clockwise by up to DEGREES either way about the centre, nearest pixel, black outside, then a flip."""
    count, height, width, _ = images.shape
    angles = (torch.rand(count, 1, 1, generator=generator) * 2 - 1) * torch.pi * DEGREES / 180
    flips = _draw_flips(count, generator).to(images.device, non_blocking=True)
    sine, cosine = angles.sin().to(images.device, non_blocking=True), angles.cos().to(images.device, non_blocking=True)
    y = _centred(height, images.device)[:, None]
    x = _centred(width, images.device)
    x = torch.where(flips, -x, x)[:, None, :]
    rows = _nearest(sine * x, cosine * y, height)
    columns = _nearest(cosine * x, -sine * y, width)
    return _gather(images, 1, rows, columns)


AUGMENT = {"none": _as_they_are, "flip": _flip, "crop_flip": _crop_flip, "rotate_flip": _rotate_flip}


def _draw_flips(count: int, generator: torch.Generator) -> Tensor:
    """(count, 1) booleans, true for one in two."""
    return torch.rand(count, 1, generator=generator) < 0.5


def _mirrored(width: int, flips: Tensor) -> Tensor:
    """(n, width): the column that each output column shows."""
    column = torch.arange(width, device=flips.device)
    return torch.where(flips, width - 1 - column, column)


def _centred(side: int, device: torch.device) -> Tensor:
    """Pixel centres along a side, 0 in the middle."""
    return torch.arange(side, device=device, dtype=torch.float32) - (side - 1) / 2


def _nearest(across: Tensor, down: Tensor, side: int) -> Tensor:
    """Pixels nearest to ``across + down``, (n, h, w), in an image with a border of 1; all outside ends there.

    ``across`` (n, 1, w) and ``down`` (n, h, 1) are centred coordinates.
    """
    shifted = down + (side + 1) / 2
    return (across + shifted).round_().clamp_(0, side + 1).long()


def _gather(images: Tensor, border: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels ``(rows, columns)`` of the images with ``border`` zeros around them.

    ``rows`` and ``columns`` broadcast to (n, height, width) and count from the border's corner.
    """
    count, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, border, border, border, border))
    tall, wide = padded.shape[1:3]
    first = torch.arange(count, device=images.device)[:, None, None] * tall
    flat = (first + rows) * wide + columns
    return padded.view(-1, channels).index_select(0, flat.flatten()).view(count, height, width, channels)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n, h, w, c) uint8 to (n, c, h, w) in the type of ``mean``: pixel * 1 / (255 std) - mean / std."""
    count, height, width, channels = images.shape
    # Factors repeated along a row: the inner loop is then long and contiguous (4 x quicker than 3 channels).
    scale = (1 / (255 * std)).repeat(width)
    shift = (-mean / std).repeat(width)
    rows = images.reshape(count, height, width * channels).to(scale.dtype)
    return rows.mul_(scale).add_(shift).view(count, height, width, channels).permute(0, 3, 1, 2)
