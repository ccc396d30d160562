"""The authors' program as a peer: a client's steps (``../step.py``) or a step at a boundary (``../boundary.py``).

python -m scenarios.benchmarks.peers.authors, then begin step REAL SYNTHETIC STEPS, or begin boundary BATCH
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from scenarios.benchmarks.boundary import authors_boundary
from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.step import Sizes, plain_step


@dataclass(frozen=True, slots=True)
class Authors:
    work: Callable[[], object]

    def round(self) -> None:
        self.work()

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {}


def begin(part: str, *numbers: str) -> Authors:
    sizes = map(int, numbers)
    return Authors(authors_boundary(*sizes) if part == "boundary" else plain_step(Sizes(*sizes)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    answer(begin)
