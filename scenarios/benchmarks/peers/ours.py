"""fedcil's own work as a process of its own that keeps freed memory, as that of ``fedcil run`` does.

python -m scenarios.benchmarks.peers.ours, then begin step|floor REAL SYNTHETIC STEPS PRECISION.., or
begin boundary BATCH PRECISION.., or begin round NET CLIENTS PRECISION..; then round CASE, of which each has several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedcil.allocator import keep_freed_memory
from scenarios.benchmarks.boundary import our_boundary
from scenarios.benchmarks.floor import ours_and_floor
from scenarios.benchmarks.peers.session import answer
from scenarios.benchmarks.rounds import our_rounds
from scenarios.benchmarks.step import Sizes, our_steps

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ours:
    """The peer."""

    cases: Mapping[str, Work]

    def round(self, case: str) -> None:
        self.cases[case]()

    def weights(self) -> dict[str, np.ndarray[Any, Any]]:
        return {}


def cases(opened: ExitStack, part: str, words: tuple[str, ...]) -> Mapping[str, Work]:
    """Of one part of the benchmark; ``opened`` closes what they hold open."""
    match part:
        case "step":
            return our_steps(Sizes(*map(int, words[:3])), words[3:])
        case "floor":
            return ours_and_floor(Sizes(*map(int, words[:3])), words[3:])
        case "boundary":
            return {precision: our_boundary(precision, int(words[0])) for precision in words[1:]}
        case "round":
            return our_rounds(opened, words[0], int(words[1]), words[2:])
    raise SystemExit(f"no part {part!r}")


def main() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    with ExitStack() as opened:

        def begin(part: str, *words: str) -> Ours:
            opened.close()  # what was begun before leaves nothing behind
            return Ours(cases(opened, part, words))

        answer(begin)


if __name__ == "__main__":
    main()
