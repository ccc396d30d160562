"""How many clients train side by side."""

from __future__ import annotations

import math
import os

from fedcil.scenario import Scenario

PIECES = 4  # a worker's share of a round is cut into so many requests, for balance


def worker_count(scenario: Scenario, stack: int = 1) -> int:
    """``engine.workers``, or one per core this process may use and no more than stacks of clients in a round."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return scenario.engine.workers or max(1, min(cores, math.ceil(scenario.clients.per_round / stack)))


def most_pieces(jobs: int, workers: int, stack: int) -> int:
    """Into how many requests a round is cut: several for each worker, but whole stacks."""
    return workers * PIECES if stack == 1 else max(workers, math.ceil(jobs / stack))
