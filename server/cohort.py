"""Who is asked in a round."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fedcil.availability import Mask, mask_of
from fedcil.keys import Key
from fedcil.methods.base import Phase


def eligible(
    here: Mask, reachable: Collection[int] | None, busy: Collection[int], counts: NDArray[np.int64], least: int
) -> NDArray[np.int64]:
    """Clients that are here, can be reached (None: all can), are free and have so many samples in this task, sorted."""
    mask = here & (counts >= least)
    if reachable is not None:
        mask &= mask_of(reachable, len(mask))
    mask[list(busy)] = False
    return np.flatnonzero(mask)


def choose(candidates: NDArray[np.int64], phase: Phase, per_round: int, key: Key) -> tuple[int, ...]:
    """A uniform draw without replacement, or everyone if the phase asks everyone; sorted by id."""
    if phase.who == "all" or len(candidates) <= per_round:
        return tuple(candidates.tolist())
    return tuple(sorted(key.numpy().choice(candidates, per_round, replace=False).tolist()))
