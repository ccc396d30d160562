"""fedcil's own engines with clients that do nothing (``empty.py``), as a process of its own.

python -m scenarios.benchmarks.peers.engine CLIENTS MEGABYTES inline|ray

A ``round`` is as many rounds as take a second; costs are those of one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from scenarios.benchmarks.empty import rounds_of
from scenarios.benchmarks.peers.session import answer

REPEAT_S = 1.0  # what a repeat should take
MOST_TURNS = 200  # rounds in a repeat


def rounds_in_a_second(work: Callable[[], object]) -> int:
    """Enough to be told from the ticks of CPU clocks, and no more."""
    work()  # the first round starts what is started once
    started = time.perf_counter()
    work()
    return max(1, min(MOST_TURNS, int(REPEAT_S / (time.perf_counter() - started))))


class Rounds:
    """The peer: ``turns`` rounds at a time."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work, self.turns = work, rounds_in_a_second(work)

    def round(self) -> None:
        for _ in range(self.turns):
            self.work()

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {}


def main() -> None:
    torch.set_num_threads(1)
    with rounds_of(sys.argv[3], int(sys.argv[1]), int(sys.argv[2])) as one_round:
        peer = Rounds(one_round)
        answer(peer, peer.turns)


if __name__ == "__main__":
    main()
