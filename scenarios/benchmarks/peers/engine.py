"""fedcil's own engines with clients that do nothing (``empty.py``), as a process of its own.

python -m scenarios.benchmarks.peers.engine MEGABYTES inline|ray, then begin CLIENTS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from scenarios.benchmarks.empty import rounds_of
from scenarios.benchmarks.peers.session import answer


@dataclass(frozen=True, slots=True)
class Empty:
    """The peer."""

    round: Callable[[], None]

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {}


def main() -> None:
    torch.set_num_threads(1)
    with rounds_of(sys.argv[2], int(sys.argv[1])) as one_round:
        answer(lambda clients: Empty(partial(one_round, int(clients))), for_a_second=True)


if __name__ == "__main__":
    main()
