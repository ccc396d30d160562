"""The authors' program as a peer: a client's steps (``../step.py``) or a step at a boundary (``../boundary.py``).

python -m scenarios.benchmarks.peers.authors step 8_32|32_128 _
python -m scenarios.benchmarks.peers.authors boundary BATCH _
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scenarios.benchmarks.boundary import authors_boundary
from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.step import FULL, SMALL, plain_step


@dataclass(frozen=True, slots=True)
class Authors:
    work: Callable[[], object]

    def round(self) -> None:
        self.work()

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {}


def work_of(part: str, size: str) -> Callable[[], object]:
    if part == "boundary":
        return authors_boundary(int(size))
    return plain_step({sizes.name: sizes for sizes in (SMALL, FULL)}[size])


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(Authors(work_of(sys.argv[1], sys.argv[2])))
