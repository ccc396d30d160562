"""Loss terms that more than one method uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy_new(logits: Tensor, labels: Tensor, old: int, seen: int) -> Tensor:
    """Cross-entropy over the new classes' logits alone.

    logits (batch, >= seen), labels (batch,) in [old, seen); returns ().
    """
    return F.cross_entropy(logits[:, old:seen], labels - old)


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Cross-entropy from teacher to student logits, both (batch, classes); returns (). No T^2 factor.

    LwF (arXiv 1606.09282, equation 2) as the FCIL code bases write it. Its value at student == teacher is
    the teacher's entropy, its gradient there is 0.
    """
    return F.cross_entropy(student / temperature, F.softmax(teacher / temperature, dim=1))


def proximal(parameters: Sequence[Tensor], anchor: Sequence[Tensor]) -> Tensor:
    """Squared distance of all parameters to the anchor (FedProx, arXiv 1812.06127, equation 2); returns ()."""
    pairs = zip(parameters, anchor, strict=True)
    return torch.stack([(p - a).square().sum() for p, a in pairs]).sum()
