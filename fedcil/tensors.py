"""Named tensors: what a model is between trainings, what a client gives of it, and what a cohort's gifts sum to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
"""Named tensors: parameters and floating-point buffers of a model (integer counters are no state and never travel), or
what a method sums or keeps."""

HALF = (torch.float16, torch.bfloat16)
"""Too coarse for sums over clients: eight times 300 is infinite, or 298 in the mean."""


def moved(tensors: Tensors, device: torch.device) -> Tensors:
    """On this device; the same ones where they are there already."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def content_hash(tensors: Tensors) -> str:
    """Hash of names, shapes, dtypes and bytes; the same on every machine."""
    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(flat.shape)}|{flat.dtype}|".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_bytes(tensors: Tensors) -> int:
    """In memory, and on the wire but for names."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one client gives: named tensors and their weight in the mean."""

    tensors: Tensors
    weight: float


@dataclass(frozen=True, slots=True)
class Total:
    """The sum over a cohort: weighted tensors and the sum of weights."""

    tensors: Tensors
    weight: float

    def to(self, device: torch.device) -> Total:
        return Total(moved(self.tensors, device), self.weight)

    def mean(self) -> dict[str, Tensor]:
        """The one division of a weighted mean."""
        return {name: tensor / self.weight for name, tensor in self.tensors.items()}
