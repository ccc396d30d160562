"""The authors' program as a peer: a client's steps (``../step.py``) or a step at a boundary (``../boundary.py``).

python -m scenarios.benchmarks.peers.authors [kept], then begin step REAL SYNTHETIC STEPS, or begin boundary BATCH

``kept``: freed memory stays with the process, as with fedcil, and not as the C library comes.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedcil.allocator import keep_freed_memory
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
    if sys.argv[1:] == ["kept"]:
        keep_freed_memory()
    answer(begin)
