"""fedcil's own engines with clients that do nothing (``empty.py``), as a process of its own.

python -m scenarios.benchmarks.peers.engine CLIENTS MEGABYTES inline|ray
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scenarios.benchmarks.empty import rounds_of
from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.timing import times_in_a_second


@dataclass(frozen=True, slots=True)
class Empty:
    """The peer."""

    round: Callable[[], None]

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {}


def main() -> None:
    torch.set_num_threads(1)
    with rounds_of(sys.argv[3], int(sys.argv[1]), int(sys.argv[2])) as one_round:
        answer(Empty(one_round), times_in_a_second(one_round))


if __name__ == "__main__":
    main()
