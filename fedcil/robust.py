"""Against clients that lie: a limit on the size of an update, and folds that a minority cannot move far.

Robust folds keep every contribution until the round is over (a cohort of models in memory) and make no partial
sums. They count each client once: a weight is what a liar would lie about. All of it is for phases whose
clients send the model; other phases keep their sum.

Clipping: McMahan et al. 2018, arXiv 1710.06963; Sun et al. 2019, arXiv 1911.07963. Median and trimmed mean: Yin et
al. 2018, arXiv 1803.01498. Krum and Multi-Krum: Blanchard et al. 2017, arXiv 1703.02757.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from fedcil.errors import MessageRefused
from fedcil.rule import Rule
from fedcil.tensors import Contribution, Tensors, Total


def admissible(contribution: Contribution, start: Tensors, rule: Rule) -> Contribution:
    """The contribution, clipped where the rule says so. MessageRefused if its update is larger than allowed.

    ``start``: the model that the client was sent. The same bits wherever it is called.
    """
    if rule.norm_limit is None and rule.clip_norm is None:
        return contribution
    norm = distance(contribution.tensors, start)
    if rule.norm_limit is not None and not norm <= rule.norm_limit:
        raise MessageRefused(f"an update of norm {norm:.4g} is larger than server.norm_limit = {rule.norm_limit:g}")
    if rule.clip_norm is None or norm <= rule.clip_norm:
        return contribution
    scale = rule.clip_norm / norm
    clipped = {name: start[name] + (tensor - start[name]) * scale for name, tensor in contribution.tensors.items()}
    return Contribution(clipped, contribution.weight)


def distance(one: Tensors, two: Tensors) -> float:
    """L2 norm of the difference, in float64 by NumPy: its sums do not depend on a number of threads."""
    return math.sqrt(sum(_squared(one[name], two[name]) for name in sorted(one)))


def _squared(one: Tensor, two: Tensor) -> float:
    difference = one.cpu().numpy().ravel() - two.cpu().numpy().ravel().astype(np.float64)
    return float(np.square(difference, out=difference).sum())


def trimmed_mean(given: Sequence[Tensors], cut: int) -> dict[str, Tensor]:
    """Coordinate by coordinate the mean of all but the ``cut`` least and the ``cut`` largest values."""
    return {name: _trimmed(torch.stack([each[name] for each in given]), cut) for name in given[0]}


def _trimmed(values: Tensor, cut: int) -> Tensor:
    kept = values.sort(dim=0).values[cut : len(values) - cut]
    return reduce(torch.add, kept.unbind()) / len(kept)  # one after another: the same bits for any number of threads


def median(given: Sequence[Tensors]) -> dict[str, Tensor]:
    """Coordinate by coordinate the middle value, or the mean of the two in the middle."""
    return trimmed_mean(given, (len(given) - 1) // 2)


def krum_order(given: Sequence[Tensors], byzantine: int) -> list[int]:
    """Places by Krum's score, the sum of squared distances to the n - f - 2 nearest others; equal ones by place."""
    squares = np.zeros((len(given), len(given)))
    for one in range(len(given)):
        for two in range(one):
            squares[one, two] = squares[two, one] = distance(given[one], given[two]) ** 2
    nearest = np.sort(squares, axis=1)[:, 1 : len(given) - byzantine - 1]  # the first is the distance to itself
    return [int(place) for place in np.argsort(nearest.sum(axis=1), kind="stable")]


def multi_krum(given: Sequence[Tensors], byzantine: int, keep: int) -> dict[str, Tensor]:
    """The mean of the ``keep`` contributions that the others are nearest to; of one: Krum."""
    best = sorted(krum_order(given, byzantine)[:keep])
    return trimmed_mean([given[place] for place in best], 0)


Combine = Callable[[Sequence[Tensors], int], Mapping[str, Tensor]]
COMBINE: dict[str, Combine] = {
    "median": lambda given, _: median(given),
    "trimmed_mean": trimmed_mean,
    "krum": lambda given, f: multi_krum(given, f, 1),
    "multi_krum": lambda given, f: multi_krum(given, f, len(given) - f),
}


def combined(given: Sequence[Tensors], rule: Rule) -> Total | None:
    """The rule's answer, of weight 1; None if fewer gave something than the rule needs."""
    if len(given) < max(1, rule.least):
        return None
    return Total(COMBINE[rule.fold](given, rule.byzantine), 1.0)
