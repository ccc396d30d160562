"""Images from a frozen generator, with what a frozen teacher says of them: fresh ones, or out of a pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcil.keys import Key
from fedcil.models.generator import Generator
from fedcil.models.network import Network

BATCH = 256  # images at once when many are generated


@dataclass(frozen=True, slots=True)
class Pool:
    """Images (n, c, h, w) with what the teacher says of them: old-class logits (n, q)."""

    images: Tensor
    past: Tensor


@dataclass(frozen=True, slots=True)
class Replay:
    """What clients of a task share in one process. Frozen: nothing here changes during training."""

    teacher: Network
    generator: Generator
    pool: Pool | None

    @torch.no_grad()
    def mix(self, real: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Real images, then synthetic ones, and the teacher's logits (b + s, q) of all of them."""
        draws = draws.to(real.device, non_blocking=True)  # indexing with a CPU's tensor would wait for the GPU
        if self.pool is None:
            both = torch.cat([real, self.generator(draws)])
            return both, self.teacher(both)
        both = torch.cat([real, self.pool.images[draws]])
        return both, torch.cat([self.teacher(real), self.pool.past[draws]])


def draw_pool(generator: Generator, teacher: Network, size: int, key: Key) -> Pool:
    """``size`` images from the frozen generator, in memory that is taken once: a pool is the largest thing there is."""
    pool: Pool | None = None
    for start, images, past in drawn(generator, teacher, size, key):
        pool = pool or Pool(room_for(size, images), room_for(size, past))
        pool.images[start : start + len(images)] = images
        pool.past[start : start + len(past)] = past
    assert pool is not None
    return pool


@torch.no_grad()
def drawn(generator: Generator, teacher: Network, size: int, key: Key) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(place of the first, images, the teacher's logits), a batch and a key at a time."""
    device = teacher.head.weight.device
    for start in range(0, size, BATCH):
        draws = key.at(start).torch(device)
        latents = torch.randn(min(BATCH, size - start), generator.latent, generator=draws, device=device)
        images = generator(latents)
        yield start, images, teacher(images)


def room_for(size: int, batch: Tensor) -> Tensor:
    """Uninitialised memory for ``size`` of what ``batch`` has some of, laid out as they are."""
    return batch.new_empty_strided((size, *batch.shape[1:]), batch.stride())
