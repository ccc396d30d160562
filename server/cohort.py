"""Who is asked in a round."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fedcil.keys import Key
from fedcil.methods.base import Phase


def eligible(present: Collection[int], counts: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Clients that are there and have at least so many samples in this task, sorted."""
    there = np.zeros(len(counts), dtype=np.bool_)
    there[np.fromiter(present, dtype=np.int64, count=len(present))] = True
    return np.flatnonzero(there & (counts >= least))


def choose(candidates: NDArray[np.int64], phase: Phase, per_round: int, key: Key) -> tuple[int, ...]:
    """A uniform draw without replacement, or everyone if the phase asks everyone; sorted by id."""
    if phase.who == "all" or len(candidates) <= per_round:
        return tuple(candidates.tolist())
    return tuple(sorted(key.numpy().choice(candidates, per_round, replace=False).tolist()))
